use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use super::*;
use crate::net::protocol::{Gso, GsoKind, tx_flag};
use crate::net::tests::Setup;
use crate::net::tests::namespace::{ip, with_own_network};
use crate::net::tests::packets::{Build, pattern, plain};
use crate::net::tests::tcp::Connection;
use crate::testing::{Features, Netfront};

const OURS: Mac = Mac::new([0x00, 0x16, 0x3e, 0, 0, 2]);

/// A host with a network for passt to find. Nothing answers there.
fn with_a_host(work: impl FnOnce() + Send + 'static) {
    with_own_network(|| {
        ip("tuntap add out0 mode tap");
        ip("addr add 10.9.8.7/24 dev out0");
        ip("link set out0 up");
        ip("route add default via 10.9.8.1");
        work();
    });
}

fn forward(host: u16, guest: u16) -> Config {
    Config {
        forwards: vec![Forward {
            transport: Transport::Tcp,
            address: Some(Ipv4Addr::LOCALHOST.into()),
            host,
            guest,
        }],
        mtu: None,
    }
}

fn connect(config: Config) -> (Setup, Netfront, OwnedFd) {
    connect_to(User::start(config, OURS).expect("passt runs"))
}

fn connect_to(user: User) -> (Setup, Netfront, OwnedFd) {
    let process = user
        .process()
        .and_then(|fd| fd.try_clone().ok())
        .expect("a descriptor");
    let setup = Setup::new(Box::new(user), crate::net::Config::new(0, OURS), 1);
    let front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    (setup, front, process)
}

#[test]
fn passt_gives_an_address() {
    with_a_host(|| {
        let (_setup, mut front, _) = connect(Config::default());
        let build = Build {
            to: [0xff; 6],
            from: OURS.bytes(),
            source: ([0; 4], 68),
            target: ([255; 4], 67),
            ..Build::udp4()
        };
        // A DHCPDISCOVER (RFC 2131).
        let mut ask = vec![1, 1, 6, 0, 1, 2, 3, 4, 0, 0, 0x80, 0];
        ask.resize(28, 0);
        ask.extend(OURS.bytes());
        ask.resize(236, 0);
        ask.extend([99, 130, 83, 99, 53, 1, 1, 255]);
        ask.resize(300, 0);
        let queue = &mut front.queues[0];
        let ids = queue.send(&build.blank(&ask), tx_flag::CSUM_BLANK, None);
        assert_eq!(queue.answers(&ids), [0]);
        let offer = loop {
            let bytes = queue.receive().bytes;
            if bytes.len() > 300 && bytes[34..38] == [0, 67, 0, 68] {
                break bytes;
            }
        };
        let payload = &offer[42..];
        assert_eq!(payload[4..8], [1, 2, 3, 4], "to our question");
        assert_eq!(payload[16..20], [10, 9, 8, 7], "the host's own address");
        front.close();
    });
}

#[test]
fn a_forwarded_port_leads_to_the_guest() {
    with_a_host(|| {
        let (_setup, mut front, _) = connect(forward(2222, 22));
        let mut socket = TcpStream::connect("127.0.0.1:2222").expect("passt listens");
        let mut connection = Connection::accept(&mut front.queues[0], 22, &[]);
        let to_guest = pattern(10_000, 3);
        socket.write_all(&to_guest).expect("written");
        connection.receive(to_guest.len());
        assert!(connection.received == to_guest);
        // As one long segment.
        let to_host = pattern(20_000, 4);
        let cut = Gso {
            kind: GsoKind::TcpV4,
            size: 1448,
        };
        connection.send(&to_host, Some(cut));
        let mut arrived = vec![0; to_host.len()];
        socket.read_exact(&mut arrived).expect("all of it");
        assert!(arrived == to_host);
        front.close();
    });
}

/// passt drops what its socket does not hold, and stands still for two seconds then. So it
/// must never be allowed that much, whatever the guest's window: not where its socket can be
/// made large, and not for a user without that right.
#[test]
fn a_large_window_loses_nothing() {
    // Segments of 65480 bytes, windows of up to 8 MiB.
    const OPTIONS: &[u8] = &[2, 4, 0xff, 0xc8, 1, 3, 3, 7];
    // The second is net.core.wmem_max as kernels have it.
    for socket in [SOCKET, 212_992] {
        with_a_host(move || {
            let user = User::start_program(PROGRAM, socket, forward(2222, 22), OURS);
            let (_setup, mut front, _) = connect_to(user.expect("passt runs"));
            let mut socket = TcpStream::connect("127.0.0.1:2222").expect("passt listens");
            let mut connection = Connection::accept(&mut front.queues[0], 22, OPTIONS);
            let bytes = pattern(8 << 20, 5);
            let copy = bytes.clone();
            let writer = std::thread::spawn(move || socket.write_all(&copy));
            connection.receive(bytes.len());
            assert!(connection.received == bytes);
            assert_eq!(connection.gaps, 0);
            writer.join().expect("no panic").expect("written");
            front.close();
        });
    }
}

#[test]
fn its_end_is_seen_and_said() {
    with_a_host(|| {
        let (setup, mut front, process) = connect(Config::default());
        assert_eq!(setup.vif.link().state(), LinkState::Up);
        pidfd_send_signal(&process, Signal::KILL).expect("killed");
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        poll(&mut fds, None).expect("it ends");
        let queue = &mut front.queues[0];
        let packet = Build::tcp4().packet(&[]);
        // The first may still get into the socket.
        while queue
            .send(&packet, 0, None)
            .into_iter()
            .any(|id| queue.answer(id) == 0)
        {}
        assert!(matches!(setup.vif.link().state(), LinkState::Down(_)));
        front.close();
    });
}

#[test]
fn it_ends_with_its_link() {
    with_a_host(|| {
        let user = User::start(Config::default(), OURS).expect("passt runs");
        let process = user
            .process()
            .and_then(|fd| fd.try_clone().ok())
            .expect("a descriptor");
        drop(user);
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&Timespec::default())).expect("polled");
        assert_eq!(ready, 1, "it has ended");
    });
}

#[test]
fn one_that_somebody_else_started_serves_and_ends() {
    with_a_host(|| {
        let outside = Outside::start(&forward(2222, 22), OURS).expect("passt runs");
        let process = outside
            .process()
            .and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let process = pidfd_open(process.expect("a child"), PidfdFlags::empty()).expect("lives");
        let [socket, said] = outside
            .descriptors()
            .map(|fd| fd.try_clone_to_owned().expect("a descriptor"));
        outside.let_go();
        let user = User::adopt(forward(2222, 22), socket, said).expect("a thread");
        assert!(user.process().is_none());
        let setup = Setup::new(Box::new(user), crate::net::Config::new(0, OURS), 1);
        let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
        let mut client = TcpStream::connect("127.0.0.1:2222").expect("passt listens");
        let mut connection = Connection::accept(&mut front.queues[0], 22, &[]);
        let to_guest = pattern(10_000, 3);
        client.write_all(&to_guest).expect("written");
        connection.receive(to_guest.len());
        assert!(connection.received == to_guest);
        front.close();
        drop(setup);
        // Without a signal: its socket is closed.
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        poll(&mut fds, None).expect("it ends");
    });
}

/// Debian 12's passt counts wrongly if it finds both of the last packets of a stream in its socket,
/// and does nothing else any more (`streams.rs`).
#[test]
fn the_end_of_a_stream_does_not_hang_it() {
    with_a_host(|| {
        let (_setup, mut front, process) = connect(forward(2222, 22));
        let queue = &mut front.queues[0];
        for _ in 0..2 {
            let mut socket = TcpStream::connect("127.0.0.1:2222").expect("passt listens");
            let mut connection = Connection::accept(queue, 22, &[]);
            socket.write_all(&pattern(1000, 3)).expect("written");
            connection.receive(1000);
            let ends = std::thread::spawn(move || socket.read_to_end(&mut Vec::new()));
            let ids = connection.end();
            ends.join().expect("no panic").expect("it ends");
            pidfd_send_signal(&process, Signal::STOP).expect("stopped");
            queue.push();
            // All that went into its socket at once is there.
            assert_eq!(queue.answer(ids[0]), 0);
            pidfd_send_signal(&process, Signal::CONT).expect("goes on");
            assert_eq!(queue.answer(ids[1]), 0);
        }
        front.close();
    });
}

/// Debian 12's passt does nothing else until a packet that has begun is there as a whole.
#[test]
fn the_rest_of_a_packet_follows_by_itself() {
    // What Linux gives at least, which holds a part of each of them.
    let (socket, peer) = sockets(0).expect("sockets");
    let (said, _says) = std::io::pipe().expect("a pipe");
    let user = User::adopt(Config::default(), socket, said.into()).expect("a thread");
    let setup = Setup::new(Box::new(user), crate::net::Config::new(0, OURS), 1);
    let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    let peer = File::from(peer);
    for seed in 1..=8 {
        let packet = plain(60_000, seed);
        let queue = &mut front.queues[0];
        let ids = queue.send(&packet, 0, None);
        // The guest has its pages back, and does not notify again.
        assert_eq!(queue.answers(&ids), vec![0; ids.len()]);
        let mut fds = [PollFd::new(&peer, PollFlags::IN)];
        let mut arrived: Vec<u8> = Vec::new();
        while arrived.len() < 4 + packet.len() {
            let patience = Timespec::try_from(Duration::from_secs(20)).expect("a time");
            let ready = poll(&mut fds, Some(&patience)).expect("polled");
            assert_eq!(ready, 1, "{} bytes came", arrived.len());
            fds[0].clear_revents();
            let mut piece = vec![0; 1 << 17];
            let count = (&peer).read(&mut piece).expect("bytes");
            arrived.extend(&piece[..count]);
        }
        assert!(arrived[4..] == packet);
    }
    front.close();
}

#[test]
fn one_that_nobody_takes_is_ended() {
    with_a_host(|| {
        let outside = Outside::start(&Config::default(), OURS).expect("passt runs");
        let process = outside
            .process()
            .and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let process = pidfd_open(process.expect("a child"), PidfdFlags::empty()).expect("lives");
        drop(outside);
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        let ready = poll(&mut fds, Some(&Timespec::default())).expect("polled");
        assert_eq!(ready, 1, "it has ended");
    });
    with_own_network(|| {
        let error = Outside::start(&Config::default(), OURS).expect_err("no network");
        assert!(error.to_string().contains("passt"), "{error}");
    });
}

#[test]
fn errors_say_what_mends_them() {
    let missing = User::start_program("no-such-passt", SOCKET, Config::default(), OURS);
    let error = missing.expect_err("no passt").to_string();
    assert!(error.contains("apt-get install passt"), "{error}");
    with_a_host(|| {
        let _taken = TcpListener::bind("127.0.0.1:2222").expect("a listener");
        let error = User::start(forward(2222, 22), OURS)
            .expect_err("taken")
            .to_string();
        assert!(error.contains("2222"), "{error}");
    });
    with_own_network(|| {
        // No way out of this host.
        let error = User::start(Config::default(), OURS).expect_err("no network");
        let error = error.to_string();
        assert!(
            error.contains("passt ended") && error.contains("it said"),
            "{error}"
        );
    });
}

#[test]
fn forwards_are_read_and_written_as_passt_takes_them() {
    for (text, arguments) in [
        ("2222:22", ["-t", "2222:22"]),
        ("tcp:0.0.0.0/80:8080", ["-t", "0.0.0.0/80:8080"]),
        ("udp:53:5353", ["-u", "53:5353"]),
        ("udp:::1/53:5353", ["-u", "::1/53:5353"]),
    ] {
        let forward: Forward = text.parse().expect("a forward");
        assert_eq!(forward.arguments(), arguments);
    }
    for text in [
        "", "22", "22:", ":22", "0:22", "22:70000", "x/22:22", "sctp:1:2", "tcp:-t",
    ] {
        let error = text.parse::<Forward>().expect_err("no forward").to_string();
        assert!(error.contains("2222:22"), "{error}");
    }
}
