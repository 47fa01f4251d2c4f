//! In network namespaces of this machine: what needs root, iproute2, nftables and dnsmasq, and no WireGuard, which
//! its kernel may not have (the case `virtual-network` has that).

use std::process::Command;

mod two_nodes;

use super::*;
use crate::key::PublicKey;
use crate::plan::{moved, plan};
use crate::target::target;
use crate::wanted::{Network, NodePeer, Port, Wanted};
use crate::{dnsmasq, firewall};

/// Runs the test on a thread that is in a network namespace of its own.
fn in_a_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: only this thread changes its namespace, and it has no other use.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(done, 0, "{}: run as root", io::Error::last_os_error());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn node(number: u16) -> crate::NodeNumber {
    number.try_into().unwrap()
}

fn mac(text: &str) -> Mac {
    text.parse().unwrap()
}

fn vm(name: &str, last: u8, on: u16) -> Port {
    Port {
        name: name.into(),
        mac: Mac([2, 0, 0, 0, 0, last]),
        address: Ipv4Addr::new(10, 5, 0, last),
        node: node(on),
        arriving: None,
        left: None,
        publish: vec![],
    }
}

fn wanted() -> Wanted {
    let mut wanted = Wanted::new(node(1));
    wanted.peers = (2..4)
        .map(|number| NodePeer {
            node: node(number),
            public_key: PublicKey([number.to_be_bytes()[1]; 32]),
            endpoint: None,
        })
        .collect();
    let mut web = vm("web", 10, 1);
    web.publish = vec!["8080:80".parse().unwrap(), "53/udp".parse().unwrap()];
    wanted.networks = vec![Network {
        name: "demo".into(),
        vni: 5.try_into().unwrap(),
        subnet: "10.5.0.0/16".parse().unwrap(),
        ports: vec![web, vm("db", 11, 2), vm("cache", 12, 3)],
    }];
    wanted.check().unwrap();
    wanted
}

/// The target without what this machine's kernel has not.
fn without_wireguard(wanted: &Wanted) -> State {
    let mut target = target(wanted, PublicKey([1; 32]));
    target.links.remove(names::WIREGUARD);
    target
        .addresses
        .retain(|(name, _)| name != names::WIREGUARD);
    target.settings.remove("ipv6/conf/scwg0/disable_ipv6");
    target.wireguard = Default::default();
    target
}

async fn reach(kernel: &mut Kernel, target: &State) -> Vec<Step> {
    let is = kernel.read(target).await.unwrap();
    let steps = plan(&is, target);
    for step in &steps {
        kernel.step(step, &PrivateKey::generate()).await.unwrap();
    }
    steps
}

fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{line}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn the_kernel_becomes_as_wanted_and_stays_so() {
    in_a_namespace(|| async {
        let mut kernel = Kernel::connect().unwrap();
        let mut wanted = wanted();
        let target = without_wireguard(&wanted);
        assert!(!reach(&mut kernel, &target).await.is_empty());
        assert_eq!(reach(&mut kernel, &target).await, []);

        let is = kernel.read(&target).await.unwrap();
        assert_eq!(is.tunnels, target.tunnels);
        assert_eq!(is.forwards, target.forwards);

        // What somebody changes is mended, and what is his is left.
        for line in [
            "ip link set scv5 nomaster",
            "ip link del sct02000000000a",
            "ip link set scb5 down",
            "ip link del scr5",
            "bridge fdb del 00:00:00:00:00:00 dev scv5 dst 100.127.64.3",
            "bridge fdb replace 02:00:00:00:00:0b dev scv5 self dst 100.127.64.9",
            "bridge fdb add 02:00:00:00:00:77 dev scv5 master static",
            "ip neigh replace 10.5.0.11 lladdr 02:00:00:00:00:99 dev scb5 nud permanent",
            "ip neigh add 10.5.0.99 lladdr 02:00:00:00:00:99 dev scb5 nud permanent",
            "ip link set scb5 address 02:11:11:11:11:11",
            "ip link set dev scv5 mtu 1000",
            "ip link set scv5 type bridge_slave learning on flood on neigh_suppress off",
            "ip addr add 10.99.0.1/24 dev scb5; ip addr del 10.5.0.1/16 dev scb5",
            "echo 0 >/proc/sys/net/ipv4/ip_forward",
            "ip link add scb6 type bridge",
            "ip link del scv5; ip link add scv5 type vxlan id 6 dstport 4789",
            "ip link del scb5",
            "ip rule del pref 20053",
            "ip route flush table 1073823746",
        ] {
            run("ip link add br0 type bridge; ip link add scbridge type bridge");
            run(line);
            let steps = reach(&mut kernel, &target).await;
            assert!(!steps.is_empty(), "{line} is not seen");
            assert_eq!(reach(&mut kernel, &target).await, [], "after {line}");
            run("ip link del br0; ip link del scbridge");
        }

        // A VM moves, twice.
        let mac = mac("02:00:00:00:00:0b");
        for to in [1, 3, 2] {
            for port in &mut wanted.networks[0].ports {
                if port.mac == mac {
                    port.arriving = Some(node(to));
                }
            }
            reach(&mut kernel, &without_wireguard(&wanted)).await;
            assert!(wanted.moved(mac, node(to)));
            for step in moved(&wanted, &wanted.networks[0], mac) {
                kernel.step(&step, &PrivateKey::generate()).await.unwrap();
            }
            let target = without_wireguard(&wanted);
            let is = kernel.read(&target).await.unwrap();
            assert_eq!(is.forwards, target.forwards);
            reach(&mut kernel, &target).await;
        }

        assert!(!reach(&mut kernel, &State::default()).await.is_empty());
        let left = run("ip -br link | grep ^sc || true; ip rule | grep 20053 || true");
        assert_eq!(left, "");
    });
}

#[test]
fn rules_are_loaded_and_listed() {
    in_a_namespace(|| async {
        assert_eq!(firewall::listing().await.unwrap(), "");
        let mut wanted = wanted();
        wanted.moved(mac("02:00:00:00:00:0b"), node(1));
        for router_before in [true, false] {
            let rules = firewall::rules(&wanted, router_before);
            firewall::load(&rules).await.unwrap();
            let first = firewall::listing().await.unwrap();
            firewall::load(&rules).await.unwrap();
            assert_eq!(firewall::listing().await.unwrap(), first);
            assert!(
                first.contains("tcp dport 8080 dnat ip to 10.5.0.10:80"),
                "{first}"
            );
        }
        // None and one are rules too.
        firewall::load(&firewall::rules(&Wanted::new(node(1)), true))
            .await
            .unwrap();
        firewall::load(&firewall::nothing()).await.unwrap();
        assert_eq!(firewall::listing().await.unwrap(), "");
    });
}

#[test]
fn dhcp_and_names_follow_the_records() {
    in_a_namespace(|| async {
        let mut kernel = Kernel::connect().unwrap();
        let mut wanted = wanted();
        run("ip link set lo up");
        reach(&mut kernel, &without_wireguard(&wanted)).await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        // dnsmasq reads as nobody.
        run(&format!("chmod 755 {}", path.display()));
        assert_eq!(dnsmasq::apply(path, &wanted).await.unwrap().len(), 1);
        assert!(dnsmasq::apply(path, &wanted).await.unwrap().is_empty());
        wanted.networks[0].ports.push(vm("late", 13, 1));
        assert_eq!(dnsmasq::apply(path, &wanted).await.unwrap().len(), 1);
        let pid = std::fs::read_to_string(path.join("dnsmasq-5.pid")).unwrap();
        let pid = pid.trim();
        run(&format!(
            "kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do :; done"
        ));
        assert_eq!(dnsmasq::apply(path, &wanted).await.unwrap().len(), 1);
        assert!(dnsmasq::apply(path, &wanted).await.unwrap().is_empty());
        // Written by one who was killed before he had told it.
        let read = path.join("dnsmasq-5.read");
        let text = std::fs::read_to_string(&read).unwrap();
        std::fs::write(&read, text.replace(",late\n", ",early\n")).unwrap();
        let done = dnsmasq::apply(path, &wanted).await.unwrap();
        assert!(done.len() == 1 && done[0].starts_with("tell"), "{done:?}");
        std::fs::write(&read, text.replace("quiet-dhcp", "log-dhcp")).unwrap();
        let done = dnsmasq::apply(path, &wanted).await.unwrap();
        assert!(done.len() == 1 && done[0].starts_with("start"), "{done:?}");
        assert!(dnsmasq::apply(path, &wanted).await.unwrap().is_empty());
        let none = Wanted::new(node(1));
        assert_eq!(dnsmasq::apply(path, &none).await.unwrap().len(), 1);
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
    });
}
