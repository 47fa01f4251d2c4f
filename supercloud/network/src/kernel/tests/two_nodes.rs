//! Two nodes, two VMs and somebody outside, each a network namespace: all but WireGuard, in whose place the nodes
//! have a cable. VMs are namespaces too, so their taps are pairs of devices.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use super::*;

/// A network namespace with a name of its own.
struct Namespace(String);

impl Namespace {
    fn new(what: &str) -> Self {
        let name = format!("sc{}-{what}", std::process::id());
        run(&format!("ip netns add {name}; ip -n {name} link set lo up"));
        Self(name)
    }

    fn sh(&self, line: &str) -> String {
        let line = line.replace('\'', r"'\''");
        run(&format!("ip netns exec {} sh -ec '{line}'", self.0))
    }

    /// On a thread that is in it.
    fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.beside(work).join().unwrap()
    }

    fn beside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let path = format!("/run/netns/{}", self.0);
        std::thread::spawn(move || {
            let file = std::fs::File::open(path).unwrap();
            // SAFETY: the descriptor is open, and only this thread changes its namespace.
            let done = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
            work()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

const ELSEWHERE: &str = "veth whose peer is elsewhere";

/// A node: its namespace, its records, its files.
struct Node {
    namespace: Namespace,
    wanted: Wanted,
    dir: tempfile::TempDir,
}

impl Node {
    fn new(number: u16, networks: Vec<Network>) -> Self {
        let mut wanted = Wanted::new(node(number));
        wanted.peers = vec![NodePeer {
            node: node(3 - number),
            public_key: PublicKey([9; 32]),
            endpoint: None,
        }];
        wanted.networks = networks;
        wanted.check().unwrap();
        let dir = tempfile::tempdir().unwrap();
        run(&format!("chmod 755 {}", dir.path().display()));
        Self {
            namespace: Namespace::new(&format!("node{number}")),
            wanted,
            dir,
        }
    }

    /// As `Fabric::apply`, but for WireGuard and taps.
    fn apply(&self) {
        let (wanted, dir) = (self.wanted.clone(), self.dir.path().to_owned());
        self.namespace.within(move || {
            blocking(async move {
                firewall::load(&firewall::rules(&wanted, false))
                    .await
                    .unwrap();
                let mut target = without_wireguard(&wanted);
                let whole = crate::target::target(&wanted, PublicKey([1; 32]));
                let mut cable = whole.links[names::WIREGUARD].clone();
                cable.kind = Kind::Other(ELSEWHERE.into());
                target.links.insert(names::WIREGUARD.into(), cable);
                target.addresses = whole.addresses;
                for link in target.links.values_mut() {
                    if link.kind == Kind::Tap {
                        link.kind = Kind::Other(ELSEWHERE.into());
                    }
                }
                let mut kernel = Kernel::connect().unwrap();
                reach(&mut kernel, &target).await;
                dnsmasq::apply(&dir, &wanted).await.unwrap();
            });
        });
    }

    fn moved(&mut self, mac: Mac, to: u16) {
        assert!(self.wanted.moved(mac, node(to)));
        let wanted = self.wanted.clone();
        self.namespace.within(move || {
            blocking(async move {
                let mut kernel = Kernel::connect().unwrap();
                for step in moved(&wanted, &wanted.networks[0], mac) {
                    kernel.step(&step, &PrivateKey::generate()).await.unwrap();
                }
            });
        });
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let dir = self.dir.path().to_owned();
        blocking(async move { dnsmasq::clear(&dir).await.unwrap() });
    }
}

fn blocking<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

/// A VM: a namespace with a device for each node, of which one is its own at a time, as the tap of a VM that has
/// moved is another one.
struct Vm {
    namespace: Namespace,
    port: Port,
}

impl Vm {
    fn new(port: &Port, on: &Node) -> Self {
        let vm = Self {
            namespace: Namespace::new(&port.name),
            port: port.clone(),
        };
        vm.has_tap(on);
        vm
    }

    /// Before it comes there.
    fn has_tap(&self, on: &Node) {
        let (tap, vm) = (names::tap(self.port.mac), &self.namespace.0);
        let (number, node) = (on.wanted.node, &on.namespace.0);
        run(&format!(
            "ip link add {tap} netns {node} type veth peer name at{number} netns {vm}; \
             ip -n {vm} link set at{number} address {}",
            self.port.mac
        ));
    }

    /// Its one device is on that node from now on: the name and the addresses go with it.
    fn runs_on(&self, number: u16) {
        self.namespace.sh(&format!(
            "! ip link show eth0 2>/dev/null || {{ ip link set eth0 down; ip link set eth0 name was; \
             ip addr flush dev was; }}; ip link set at{number} name eth0; ip link set eth0 mtu 1370 up"
        ));
    }

    /// As the guest that has moved finds itself: with the address that it had.
    fn keeps_its_address(&self) {
        self.namespace.sh(&format!(
            "ip addr add {}/16 dev eth0; ip route add default via 10.5.0.1",
            self.port.address
        ));
    }

    /// By DHCP: what it was told.
    fn lease(&self) -> String {
        self.namespace.sh(
            "cat >/tmp/sc-lease.$$ <<E\n#!/bin/sh\n\
             [ \\$1 = bound ] || exit 0\n\
             ip addr replace \\$ip/\\$mask dev eth0; ip route replace default via \\$router\n\
             echo \\$ip/\\$mask \\$mtu \\$router \\$dns \\$search \\$hostname\nE\n\
             chmod 755 /tmp/sc-lease.$$; trap \"rm -f /tmp/sc-lease.$$\" EXIT; \
             busybox udhcpc -f -n -q -t 30 -T 1 -i eth0 -O mtu -O search -O hostname -s /tmp/sc-lease.$$ 2>/dev/null",
        )
    }
}

/// What goes round a connection.
fn goes_round(stream: &mut TcpStream, what: &str) {
    let sent = what.as_bytes();
    stream.write_all(sent).unwrap();
    let mut back = vec![0; sent.len()];
    if let Err(error) = stream.read_exact(&mut back) {
        panic!("{what}: {error}");
    }
    assert_eq!(sent, back, "{what}");
}

/// Answers what it gets, on each connection; with `peer` it says first who is there.
fn echo(at: &Namespace, port: u16) {
    let ready = at.within(move || TcpListener::bind(("0.0.0.0", port)).unwrap());
    at.beside(move || {
        for stream in ready.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let who = format!("{:<32}", stream.peer_addr().unwrap().ip());
                let _ = stream.write_all(who.as_bytes());
                let mut out = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut stream, &mut out);
            });
        }
    });
}

/// A connection, and whom the other side sees.
fn connect(from: &Namespace, to: &str) -> (TcpStream, String) {
    let to: SocketAddr = to.parse().unwrap();
    from.within(move || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))
            .unwrap_or_else(|error| panic!("{to}: {error}"));
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut who = [0; 32];
        stream.read_exact(&mut who).unwrap();
        let who = String::from_utf8(who.to_vec()).unwrap();
        (stream, who.trim().to_owned())
    })
}

/// Nothing answers, not even that nothing is there.
fn is_shut(from: &Namespace, to: &str) {
    let to: SocketAddr = to.parse().unwrap();
    let answer = from.within(move || TcpStream::connect_timeout(&to, Duration::from_millis(700)));
    let error = answer.expect_err("it is open");
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{to}: {error}");
}

#[test]
fn vms_keep_their_connections() {
    let mut web = vm("web", 10, 1);
    web.publish = vec!["8080:80".parse().unwrap()];
    let network = |name: &str, vni: u16, subnet: &str, ports| Network {
        name: name.into(),
        vni: vni.try_into().unwrap(),
        subnet: subnet.parse().unwrap(),
        ports,
    };
    let mut stranger = vm("stranger", 20, 1);
    stranger.address = Ipv4Addr::new(10, 6, 0, 20);
    let networks = vec![
        network("demo", 5, "10.5.0.0/16", vec![web.clone(), vm("db", 11, 2)]),
        network("other", 6, "10.6.0.0/16", vec![stranger.clone()]),
    ];
    let mut one = Node::new(1, networks.clone());
    let mut two = Node::new(2, networks);
    let outside = Namespace::new("outside");
    let (a, b, out) = (&one.namespace.0, &two.namespace.0, &outside.0);
    run(&format!(
        "ip link add scwg0 netns {a} type veth peer name scwg0 netns {b}
         ip link add out netns {a} type veth peer name one netns {out}
         ip link add out netns {b} type veth peer name two netns {out}
         ip -n {a} addr add 192.0.2.1/24 dev out; ip -n {a} link set out up
         ip -n {b} addr add 198.51.100.1/24 dev out; ip -n {b} link set out up
         ip -n {a} route add default via 192.0.2.9; ip -n {b} route add default via 198.51.100.9
         ip -n {out} addr add 192.0.2.9/24 dev one; ip -n {out} link set one up
         ip -n {out} addr add 198.51.100.9/24 dev two; ip -n {out} link set two up
         ip -n {out} addr add 203.0.113.9/32 dev lo; ip -n {out} addr add 169.254.169.254/32 dev lo
         ip netns exec {out} sysctl -qw net.ipv4.ip_forward=1"
    ));
    let web = Vm::new(&web, &one);
    let db = Vm::new(&vm("db", 11, 2), &two);
    let stranger = Vm::new(&stranger, &one);
    one.apply();
    two.apply();
    web.runs_on(1);
    stranger.runs_on(1);
    db.namespace
        .sh("ip link set at2 name eth0; ip link set eth0 mtu 1370 up");

    let told = "10.5.0.10/16 1370 10.5.0.1 10.5.0.1 demo.internal web\n";
    assert_eq!(web.lease(), told);
    assert_eq!(
        db.lease(),
        "10.5.0.11/16 1370 10.5.0.1 10.5.0.1 demo.internal db\n"
    );
    stranger.lease();
    let names = web
        .namespace
        .sh("busybox nslookup db.demo.internal 10.5.0.1");
    assert!(names.contains("10.5.0.11"), "{names}");

    // Inside, out, in; the largest packets too.
    for (at, port) in [
        (&db.namespace, 7000),
        (&outside, 9000),
        (&web.namespace, 80),
        (&one.namespace, 22),
    ] {
        echo(at, port);
    }
    web.namespace
        .sh("busybox ping -q -c 1 -W 5 -s 1342 10.5.0.11");
    let (mut inside, who) = connect(&web.namespace, "10.5.0.11:7000");
    assert_eq!(who, "10.5.0.10");
    let (mut to_outside, who) = connect(&web.namespace, "203.0.113.9:9000");
    assert_eq!(who, "192.0.2.1");
    let (mut from_outside, who) = connect(&outside, "192.0.2.1:8080");
    assert_eq!(who, "10.5.255.254");
    let (mut by_the_other, who) = connect(&outside, "198.51.100.1:8080");
    assert_eq!(who, "10.5.255.253");
    let (_, who) = connect(&one.namespace, "192.0.2.1:8080");
    assert_eq!(who, "10.5.255.254");

    // What nobody may.
    for to in [
        "10.5.0.1:22",
        "192.0.2.1:22",
        "100.127.64.1:22",
        "100.127.64.2:22",
        "10.6.0.20:80",
        "169.254.169.254:9000",
    ] {
        is_shut(&web.namespace, to);
    }
    run(&format!(
        "ip -n {} route add 10.5.0.0/16 via 192.0.2.1",
        outside.0
    ));
    is_shut(&outside, "10.5.0.10:80");
    // A guest with another's address, or another's MAC.
    for lie in [
        "ip addr add 10.5.0.99/16 dev eth0; busybox ping -c 1 -W 1 -I 10.5.0.99 10.5.0.11",
        "ip link set eth0 address 02:00:00:00:00:99; busybox ping -c 1 -W 1 10.5.0.11",
    ] {
        let said = web
            .namespace
            .sh(&format!("{lie} >/dev/null && echo heard || true"));
        assert_eq!(said, "", "{lie}");
    }
    web.namespace
        .sh("ip addr del 10.5.0.99/16 dev eth0; ip link set eth0 address 02:00:00:00:00:0a");

    // Broadcasts reach the others, as many as are allowed.
    let all = db
        .namespace
        .within(|| UdpSocket::bind("0.0.0.0:9999").unwrap());
    all.set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    web.namespace.within(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_broadcast(true).unwrap();
        for _ in 0..2000 {
            socket.send_to(b"all", "10.5.255.255:9999").unwrap();
        }
    });
    let heard = (0..2000)
        .take_while(|_| all.recv(&mut [0; 9]).is_ok())
        .count();
    assert!((50..1000).contains(&heard), "{heard} broadcasts of 2000");

    // It moves, there and back, and to where it was before.
    for to in [2, 1, 2] {
        web.has_tap(if to == 1 { &one } else { &two });
        for node in [&mut one, &mut two] {
            assert!(node.wanted.arriving(web.port.mac, Some(super::node(to))));
            node.apply();
        }
        web.runs_on(to);
        web.keeps_its_address();
        one.moved(web.port.mac, to);
        two.moved(web.port.mac, to);
        for (what, stream) in [
            ("inside", &mut inside),
            ("from outside", &mut from_outside),
            ("by the other node", &mut by_the_other),
            ("to the outside", &mut to_outside),
        ] {
            goes_round(stream, &format!("{what}, on node {to}"));
        }
        one.apply();
        two.apply();
        goes_round(&mut to_outside, &format!("to the outside, on node {to}"));
        assert_eq!(web.lease(), told, "on node {to}");
        let (_, who) = connect(&web.namespace, "203.0.113.9:9000");
        assert_eq!(who, ["192.0.2.1", "198.51.100.1"][usize::from(to) - 1]);
        let (_, who) = connect(&outside, "192.0.2.1:8080");
        assert_eq!(who, "10.5.255.254");
    }
}
