//! A client, a server and the wire between them, in one thread and by a clock of their own.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::rc::Rc;

use bmcast_net::{Address, Client, FetchError, Need, NetConfig, Server, Ticket};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, HardwareAddress, IpAddress, IpCidr,
    IpEndpoint,
};

pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub const FIRST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub const SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const SOCKETS: usize = 16;
/// What the card of the client holds while nobody polls.
const RING: usize = 1024;

/// How the wire treats frames.
#[derive(Clone)]
pub struct Weather {
    /// Of a thousand, how many are lost.
    pub loss: u64,
    /// Milliseconds on the way, and how many more at most, which puts frames out of order.
    pub delay: u64,
    pub jitter: u64,
    /// Bytes in a millisecond to the client, 0 for no limit.
    pub rate: u64,
    /// Of a thousand frames to the client, how many have some bytes changed.
    pub damage: u64,
    /// Addresses from and to which nothing comes through.
    pub dead: Vec<Ipv4Addr>,
}

pub const CLEAR: Weather = Weather {
    loss: 0,
    delay: 0,
    jitter: 0,
    rate: 0,
    damage: 0,
    dead: Vec::new(),
};

pub struct Wire {
    ways: [Vec<(u64, u64, Vec<u8>)>; 2],
    pub weather: Weather,
    random: u64,
    count: u64,
    free_at: u64,
    pub dropped: u64,
}

impl Wire {
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 8
    }

    fn send(&mut self, to: usize, now: u64, mut frame: Vec<u8>) {
        let dead = |at: usize| {
            frame.get(12..14) == Some(&[8, 0])
                && frame.get(at..at + 4).is_some_and(|address| {
                    let address: [u8; 4] = address.try_into().unwrap();
                    self.weather.dead.contains(&Ipv4Addr::from(address))
                })
        };
        if dead(26) || dead(30) {
            return;
        }
        if self.random() % 1000 < self.weather.loss {
            self.dropped += 1;
            return;
        }
        if to == 0 && self.random() % 1000 < self.weather.damage {
            for _ in 0..=self.random() % 3 {
                // Heads are where it hurts.
                let most = if self.random().is_multiple_of(4) {
                    1514
                } else {
                    80
                };
                let at = usize::try_from(self.random()).unwrap() % frame.len().min(most);
                frame[at] = self.random().to_le_bytes()[0];
            }
            if self.random().is_multiple_of(8) {
                let len = usize::try_from(self.random()).unwrap() % frame.len();
                frame.truncate(len);
            }
        }
        let mut due = (now + self.weather.delay) * 1000;
        if self.weather.rate > 0 && to == 0 {
            // In microseconds, one frame after the other.
            self.free_at =
                self.free_at.max(now * 1000) + frame.len() as u64 * 1000 / self.weather.rate;
            due = self.free_at + self.weather.delay * 1000;
        }
        if self.weather.jitter > 0 {
            due += self.random() % (self.weather.jitter * 1000);
        }
        self.count += 1;
        let entry = (due, self.count, frame);
        let at = self.ways[to].partition_point(|other| (other.0, other.1) < (due, self.count));
        self.ways[to].insert(at, entry);
    }

    fn receive(&mut self, side: usize, now: u64) -> Option<Vec<u8>> {
        let due = self.ways[side].partition_point(|entry| entry.0 <= now * 1000);
        if due == 0 {
            return None;
        }
        if side == 0 && due > RING {
            self.dropped += (due - RING) as u64;
            self.ways[side].drain(RING..due);
        }
        Some(self.ways[side].remove(0).2)
    }
}

/// One end of the wire.
pub struct End {
    pub wire: Rc<RefCell<Wire>>,
    side: usize,
    /// Whether checksums are looked at.
    checks: bool,
}

pub struct Came(Vec<u8>);
pub struct Goes(Rc<RefCell<Wire>>, usize, u64);

impl RxToken for Came {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Goes {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.borrow_mut().send(1 - self.1, self.2, frame);
        result
    }
}

impl Device for End {
    type RxToken<'a> = Came;
    type TxToken<'a> = Goes;

    fn receive(&mut self, now: Instant) -> Option<(Came, Goes)> {
        let now = now.total_millis().unsigned_abs();
        let frame = self.wire.borrow_mut().receive(self.side, now)?;
        Some((Came(frame), Goes(self.wire.clone(), self.side, now)))
    }

    fn transmit(&mut self, now: Instant) -> Option<Goes> {
        let now = now.total_millis().unsigned_abs();
        Some(Goes(self.wire.clone(), self.side, now))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        if !self.checks {
            capabilities.checksum.ipv4 = Checksum::Tx;
            capabilities.checksum.udp = Checksum::Tx;
            capabilities.checksum.tcp = Checksum::Tx;
        }
        capabilities
    }
}

/// A request as the server has read it.
pub struct Asked {
    /// Which address of the server was asked.
    pub server: Ipv4Addr,
    pub method: String,
    pub path: String,
    pub range: Option<(u64, u64)>,
    pub body: Vec<u8>,
}

/// What a server says to it.
pub struct Reply {
    pub bytes: Vec<u8>,
    pub then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Keep,
    Close,
    Reset,
    /// Nothing more is read or said.
    Silent,
}

/// The byte of the image at an offset.
pub fn byte(offset: u64) -> u8 {
    (offset / 251 * 7 + offset % 251).to_le_bytes()[0]
}

pub fn bytes(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(byte).collect()
}

/// As a server should answer.
pub fn proper(asked: &Asked) -> Reply {
    let (head, body) = match asked.range {
        Some((first, last)) => (
            format!(
                "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/99999999\r\n"
            ),
            bytes(first, last - first + 1),
        ),
        None if asked.method == "GET" => (
            "HTTP/1.1 200 OK\r\n".into(),
            asked.path.clone().into_bytes(),
        ),
        None => ("HTTP/1.1 201 Created\r\n".into(), Vec::new()),
    };
    let mut all = format!("{head}Content-Length: {}\r\n\r\n", body.len()).into_bytes();
    all.extend(body);
    Reply {
        bytes: all,
        then: Then::Keep,
    }
}

struct Served {
    handle: SocketHandle,
    input: Vec<u8>,
    output: VecDeque<u8>,
    then: Then,
    /// What was asked is answered at this time.
    busy: u64,
}

type Behaviour = Box<dyn FnMut(&Asked) -> Reply>;

pub struct World {
    pub now: u64,
    pub client: Client<End>,
    pub wire: Rc<RefCell<Wire>>,
    host: Interface,
    end: End,
    sockets: SocketSet<'static>,
    served: Vec<Served>,
    dhcp: SocketHandle,
    /// Whether DHCP is answered, and with which address.
    pub lease: Option<Ipv4Addr>,
    /// Whether connections are taken.
    pub open: bool,
    pub behaviour: Behaviour,
    /// How long it thinks before it answers (ms).
    pub thinks: u64,
    /// How many requests were read.
    pub asked: usize,
    /// Whether the client is polled; if not, the guest runs.
    pub polled: bool,
}

impl World {
    /// If there is damage from the beginning, the client looks at no checksum: the damage gets further.
    pub fn new(
        servers: &[&str],
        address: Address,
        weather: Weather,
        behaviour: impl FnMut(&Asked) -> Reply + 'static,
    ) -> Self {
        let checks = weather.damage == 0;
        let wire = Rc::new(RefCell::new(Wire {
            ways: [Vec::new(), Vec::new()],
            weather,
            random: 0x9e37_79b9_7f4a_7c15,
            count: 0,
            free_at: 0,
            dropped: 0,
        }));
        let end = |side| End {
            wire: wire.clone(),
            side,
            checks: side == 1 || checks,
        };
        let config = NetConfig { mac: MAC, address };
        let servers = servers
            .iter()
            .map(|url| Server::parse(url).unwrap())
            .collect();
        let mut client = Client::new(end(0), config, servers, 7, 0).unwrap();
        client.set_image("image").unwrap();

        let mac = HardwareAddress::Ethernet(EthernetAddress([2, 0, 0, 0, 0, 1]));
        let mut end = end(1);
        let mut host = Interface::new(Config::new(mac), &mut end, Instant::ZERO);
        host.update_ip_addrs(|addresses| {
            for address in [FIRST, SECOND] {
                addresses.push(IpCidr::new(address.into(), 24)).unwrap();
            }
        });
        let mut sockets = SocketSet::new(Vec::new());
        let served = (0..SOCKETS)
            .map(|_| {
                let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
                let mut socket = tcp::Socket::new(buffer(64 << 10), buffer(512 << 10));
                socket.set_congestion_control(tcp::CongestionControl::None);
                socket.set_nagle_enabled(false);
                Served {
                    handle: sockets.add(socket),
                    input: Vec::new(),
                    output: VecDeque::new(),
                    then: Then::Keep,
                    busy: 0,
                }
            })
            .collect();
        let packets = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
        let mut dhcp = udp::Socket::new(packets(), packets());
        dhcp.bind(67).unwrap();
        let dhcp = sockets.add(dhcp);
        Self {
            now: 0,
            client,
            wire,
            host,
            end,
            sockets,
            served,
            dhcp,
            lease: None,
            open: true,
            behaviour: Box::new(behaviour),
            thinks: 0,
            asked: 0,
            polled: true,
        }
    }

    /// With the usual address and the first server.
    pub fn usual(weather: Weather, behaviour: impl FnMut(&Asked) -> Reply + 'static) -> Self {
        Self::new(&["http://10.0.0.1/i"], fixed(), weather, behaviour)
    }

    pub fn weather(&self, weather: Weather) {
        self.wire.borrow_mut().weather = weather;
    }

    /// One millisecond.
    pub fn step(&mut self) {
        self.now += 1;
        let now = Instant::from_millis(i64::try_from(self.now).unwrap());
        self.host.poll(now, &mut self.end, &mut self.sockets);
        self.serve();
        self.serve_dhcp();
        self.host.poll(now, &mut self.end, &mut self.sockets);
        if self.polled {
            // As a VMM does while there is something.
            for _ in 0..64 {
                if !self.client.poll(self.now) {
                    break;
                }
            }
        }
    }

    pub fn run(&mut self, ms: u64) {
        for _ in 0..ms {
            self.step();
        }
    }

    /// Up to the result of the only request.
    pub fn result(&mut self, ticket: Ticket, most_ms: u64) -> Option<Result<Vec<u8>, FetchError>> {
        for _ in 0..most_ms {
            self.step();
            if let Some((over, result)) = self.client.take() {
                assert_eq!(over, ticket);
                return Some(result);
            }
        }
        None
    }

    /// Fetches from 0 on, with all room used, and compares; how long it took.
    pub fn fetch(&mut self, ranges: u64, len: u32, most_ms: u64) -> u64 {
        let begin = self.now;
        let mut waiting = Vec::new();
        let (mut next, mut over) = (0, 0);
        while over < ranges {
            while next < ranges && self.client.room(Need::Background) {
                let offset = next * u64::from(len);
                let ticket = self.client.fetch(offset, len, Need::Background).unwrap();
                waiting.push((ticket, offset));
                next += 1;
            }
            self.step();
            while let Some((ticket, result)) = self.client.take() {
                let at = waiting
                    .iter()
                    .position(|(other, _)| *other == ticket)
                    .unwrap();
                let (_, offset) = waiting.remove(at);
                assert!(
                    result.unwrap() == bytes(offset, len.into()),
                    "range at {offset}"
                );
                over += 1;
            }
            let status = self.client.status();
            assert!(self.now - begin < most_ms, "{over} of {ranges}: {status:?}");
        }
        self.now - begin
    }

    fn serve(&mut self) {
        for served in &mut self.served {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(served.handle);
            if !self.open {
                socket.abort();
            }
            if !socket.is_open() {
                served.input.clear();
                served.output.clear();
                served.then = Then::Keep;
                if self.open {
                    socket.listen(80).unwrap();
                }
                continue;
            }
            let _ = socket.recv(|bytes| {
                served.input.extend_from_slice(bytes);
                (bytes.len(), ())
            });
            let server = socket.local_endpoint();
            while served.then == Then::Keep {
                let Some(asked) = read(&mut served.input, server) else {
                    break;
                };
                self.asked += 1;
                served.busy = self.now + self.thinks;
                let reply = (self.behaviour)(&asked);
                served.output.extend(reply.bytes);
                served.then = reply.then;
            }
            while !served.output.is_empty() && self.now >= served.busy {
                let sent = socket.send_slice(served.output.as_slices().0).unwrap_or(0);
                if sent == 0 {
                    break;
                }
                served.output.drain(..sent);
            }
            if served.output.is_empty() && socket.send_queue() == 0 {
                match served.then {
                    Then::Close => socket.close(),
                    Then::Reset => socket.abort(),
                    Then::Keep if socket.state() == tcp::State::CloseWait => socket.close(),
                    Then::Keep | Then::Silent => {}
                }
            }
        }
    }

    /// RFC 2131, as little of it as there can be.
    fn serve_dhcp(&mut self) {
        let socket = self.sockets.get_mut::<udp::Socket<'_>>(self.dhcp);
        let Ok((packet, _)) = socket.recv() else {
            return;
        };
        let packet = packet.to_vec();
        let packet = DhcpPacket::new_checked(packet.as_slice()).unwrap();
        let asked = DhcpRepr::parse(&packet).unwrap();
        let message_type = match asked.message_type {
            DhcpMessageType::Discover => DhcpMessageType::Offer,
            _ => DhcpMessageType::Ack,
        };
        let Some(lease) = self.lease else {
            return;
        };
        let reply = DhcpRepr {
            message_type,
            your_ip: lease,
            server_ip: FIRST,
            router: Some(FIRST),
            subnet_mask: Some(Ipv4Addr::new(255, 255, 255, 0)),
            server_identifier: Some(FIRST),
            lease_duration: Some(60),
            client_identifier: None,
            requested_ip: None,
            parameter_request_list: None,
            ..asked
        };
        let mut bytes = vec![0; reply.buffer_len()];
        reply
            .emit(&mut DhcpPacket::new_unchecked(&mut bytes))
            .unwrap();
        let to = IpEndpoint::new(IpAddress::Ipv4(Ipv4Addr::BROADCAST), 68);
        socket.send_slice(&bytes, to).unwrap();
    }
}

pub fn fixed() -> Address {
    Address::Static {
        address: CLIENT,
        prefix: 24,
        router: None,
    }
}

/// Takes a request off the bytes, if it is whole.
fn read(input: &mut Vec<u8>, server: Option<IpEndpoint>) -> Option<Asked> {
    let end = input.windows(4).position(|bytes| bytes == b"\r\n\r\n")? + 4;
    let head = String::from_utf8(input[..end].to_vec()).unwrap();
    let field = |name: &str| {
        let mut fields = head.lines().filter_map(|line| line.split_once(": "));
        fields.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    let len: usize = field("Content-Length").map_or(0, |len| len.parse().unwrap());
    if input.len() < end + len {
        return None;
    }
    assert!(field("Host").is_some());
    let range = field("Range").map(|range| {
        let (first, last) = range
            .strip_prefix("bytes=")
            .unwrap()
            .split_once('-')
            .unwrap();
        (first.parse().unwrap(), last.parse().unwrap())
    });
    let mut words = head.split(' ');
    let IpAddress::Ipv4(server) = server?.addr;
    let asked = Asked {
        server,
        method: words.next().unwrap().into(),
        path: words.next().unwrap().into(),
        range,
        body: input[end..end + len].to_vec(),
    };
    input.drain(..end + len);
    Some(asked)
}
