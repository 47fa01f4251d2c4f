//! The client of the image's servers.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString as _};
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use bmcast_image::{Network, Server};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Cidr};

use crate::Card;
use crate::card::Wire;
use crate::connection::{Connection, DEPTH, Request, Turn, What};

/// Connections to a server at once.
const CONNECTIONS: usize = 4;
/// Bytes that may come before they are looked at, for each connection.
const WINDOW: usize = 256 << 10;
/// Milliseconds without anything after which a connection is given up.
const SILENCE: u64 = 5_000;
/// Milliseconds before the next try after the first failure; twice that after the next one, and so on.
const PAUSE: u64 = 100;
/// Most milliseconds of it.
const MOST_PAUSE: u64 = 3_000;
/// Failures one after the other after which the next server is asked.
const PATIENCE: u32 = 3;

/// Something that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// Why an answer cannot be used. What is only late, or was cut off, is asked for again without a word.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The server refuses.
    #[error("the server's answer: status {0}")]
    Status(u16),
    /// It sends something else.
    #[error("the server's answer: another range than was asked for")]
    OtherRange,
    /// It sends too much.
    #[error("the server's answer: {0} bytes are too many")]
    TooLong(u64),
    /// It is no HTTP that is understood.
    #[error("{0}")]
    Answer(String),
}

/// How the client begins.
pub struct Options {
    /// How it gets its address.
    pub network: Network,
    /// Whom it asks; the next one when one does not answer.
    pub servers: Vec<Server>,
    /// Anything that differs each time.
    pub seed: u64,
}

/// Why there is no client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("server {0}: a name; without a server of names only IPv4 addresses will do")]
pub struct Nameless(String);

/// See the crate.
pub struct Client {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: Option<SocketHandle>,
    connections: Vec<Connection>,
    waiting: VecDeque<Request>,
    done: VecDeque<(Ticket, Result<Vec<u8>, FetchError>)>,
    servers: Vec<(Server, Ipv4Addr)>,
    server: usize,
    failures: u32,
    retry_at: u64,
    next_ticket: u64,
    next_port: u16,
}

impl Client {
    /// With a card; `now` in milliseconds.
    ///
    /// # Errors
    /// A server's name is no address.
    pub fn new(card: Box<dyn Card>, options: Options, now: u64) -> Result<Self, Nameless> {
        let mut wire = Wire(card);
        let mac = EthernetAddress(wire.0.mac());
        let mut config = Config::new(HardwareAddress::Ethernet(mac));
        config.random_seed = options.seed;
        let mut interface = Interface::new(config, &mut wire, instant(now));
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = match options.network {
            Network::Dhcp => Some(sockets.add(dhcpv4::Socket::new())),
            Network::Static {
                address,
                prefix,
                gateway,
                ..
            } => {
                configure(&mut interface, Ipv4Cidr::new(address, prefix), gateway);
                None
            }
        };
        let connections = (0..CONNECTIONS).map(|_| {
            let buffer = |bytes: usize| tcp::SocketBuffer::new(alloc::vec![0; bytes]);
            let socket = tcp::Socket::new(buffer(WINDOW), buffer(8 << 10));
            Connection::new(sockets.add(socket))
        });
        let connections = connections.collect();
        let servers =
            options
                .servers
                .into_iter()
                .map(|server| match server.host.parse::<Ipv4Addr>() {
                    Ok(address) => Ok((server, address)),
                    Err(_) => Err(Nameless(server.to_string())),
                });
        let [low, high, ..] = options.seed.to_le_bytes();
        Ok(Self {
            wire,
            interface,
            sockets,
            dhcp,
            connections,
            waiting: VecDeque::new(),
            done: VecDeque::new(),
            servers: servers.collect::<Result<_, _>>()?,
            server: 0,
            failures: 0,
            retry_at: 0,
            next_ticket: 0,
            next_port: 0x8000 | u16::from_le_bytes([low, high]),
        })
    }

    /// The card's address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.wire.0.mac()
    }

    /// The address of the network, when there is one.
    #[must_use]
    pub fn address(&self) -> Option<Ipv4Addr> {
        self.interface.ipv4_addr()
    }

    /// The server that is asked.
    #[must_use]
    pub fn server(&self) -> Option<&Server> {
        self.servers.get(self.server).map(|(server, _)| server)
    }

    /// Whether more can be asked for now.
    #[must_use]
    pub fn room(&self) -> bool {
        self.waiting.len() < CONNECTIONS
    }

    /// Asks for a range of the image.
    pub fn fetch(&mut self, offset: u64, length: u32) -> Ticket {
        self.ask(What::Range { offset, length }, false)
    }

    /// The same, before whatever waits.
    pub fn fetch_first(&mut self, offset: u64, length: u32) -> Ticket {
        self.ask(What::Range { offset, length }, true)
    }

    /// Asks for a file beside the image, of at most so many bytes.
    pub fn get(&mut self, name: &str, most: usize) -> Ticket {
        let name = name.into();
        self.ask(What::Get { name, most }, false)
    }

    /// Tells the server something.
    pub fn put(&mut self, name: &str, body: Vec<u8>) -> Ticket {
        let name = name.into();
        self.ask(What::Put { name, body }, false)
    }

    fn ask(&mut self, what: What, first: bool) -> Ticket {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        let request = Request { ticket, what };
        match first {
            true => self.waiting.push_front(request),
            false => self.waiting.push_back(request),
        }
        ticket
    }

    /// What was answered.
    pub fn take(&mut self) -> Option<(Ticket, Result<Vec<u8>, FetchError>)> {
        self.done.pop_front()
    }

    /// Gives the card back: it is reset.
    pub fn stop(&mut self) {
        self.wire.0.stop();
    }

    /// Sends and receives; `now` in milliseconds.
    pub fn poll(&mut self, now: u64) {
        self.interface
            .poll(instant(now), &mut self.wire, &mut self.sockets);
        self.lease();
        if self.address().is_none() {
            return;
        }
        for number in 0..self.connections.len() {
            self.turn(number, now);
        }
        self.interface
            .poll(instant(now), &mut self.wire, &mut self.sockets);
    }

    fn lease(&mut self) {
        let Some(dhcp) = self.dhcp else { return };
        match self.sockets.get_mut::<dhcpv4::Socket<'_>>(dhcp).poll() {
            Some(dhcpv4::Event::Configured(lease)) => {
                configure(&mut self.interface, lease.address, lease.router);
            }
            Some(dhcpv4::Event::Deconfigured) => {
                self.interface
                    .update_ip_addrs(|addresses| addresses.clear());
                self.interface.routes_mut().remove_default_ipv4_route();
            }
            None => {}
        }
    }

    fn turn(&mut self, number: usize, now: u64) {
        let (Some(connection), Some((server, address))) = (
            self.connections.get_mut(number),
            self.servers.get(self.server),
        ) else {
            return;
        };
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
        if !socket.is_open() {
            if self.waiting.is_empty() || now < self.retry_at {
                return;
            }
            self.next_port = self.next_port.wrapping_add(1) | 0x8000;
            let to = (IpAddress::Ipv4(*address), server.port);
            // It fails when it is open or a port is 0: neither is so.
            let _ = socket.connect(self.interface.context(), to, self.next_port);
            connection.since = now;
        }
        if socket.may_send() {
            while connection.requests.len() < DEPTH {
                let Some(request) = self.waiting.pop_front() else {
                    break;
                };
                if connection.requests.is_empty() {
                    connection.since = now;
                }
                connection.ask(request, &server.host, &server.path);
            }
        }
        let answered = self.done.len();
        let turn = connection.turn(socket, now, &mut self.done);
        let idle = connection.requests.is_empty() && socket.may_send();
        let silent = !idle && now.saturating_sub(connection.since) > SILENCE;
        if self.done.len() > answered {
            match self
                .done
                .iter()
                .skip(answered)
                .any(|(_, result)| result.is_err())
            {
                true => self.retry_at = now + PAUSE,
                false => self.failures = 0,
            }
        }
        if turn == Turn::Goes && !silent {
            return;
        }
        socket.abort();
        let unanswered = connection.forget();
        let lost = silent || (!unanswered.is_empty() && self.done.len() == answered);
        for request in unanswered.into_iter().rev() {
            self.waiting.push_front(request);
        }
        if lost {
            self.failures += 1;
            let pause = PAUSE << self.failures.min(8);
            self.retry_at = now + pause.min(MOST_PAUSE);
            if self.failures >= PATIENCE {
                self.failures = 0;
                self.server = (self.server + 1) % self.servers.len().max(1);
            }
        }
    }
}

fn configure(interface: &mut Interface, address: Ipv4Cidr, gateway: Option<Ipv4Addr>) {
    interface.update_ip_addrs(|addresses| {
        addresses.clear();
        // There is room for one.
        let _ = addresses.push(IpCidr::Ipv4(address));
    });
    match gateway {
        Some(gateway) => {
            // There is room for one.
            let _ = interface.routes_mut().add_default_ipv4_route(gateway);
        }
        None => {
            interface.routes_mut().remove_default_ipv4_route();
        }
    }
}

fn instant(now: u64) -> Instant {
    Instant::from_millis(i64::try_from(now).unwrap_or(i64::MAX))
}
