//! Fetches ranges and files from a list of servers.

use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet,
};
use smoltcp::phy::Device;
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Cidr};

use crate::connection::{CONNECT_MS, Connection, DEPTH, Job, Lost, What};
use crate::server::{self, is_host};
use crate::{FetchError, Server, UrlError};

/// Connections to the server. The last one is for what the guest waits for.
const CONNECTIONS: usize = 4;
/// Bytes of a connection's receive window and of its send buffer.
const WINDOW: usize = 256 << 10;
const SEND: usize = 8 << 10;
/// Most bytes of a range.
const MOST_FETCH: u32 = 4 << 20;
/// Most bytes of a body that is sent.
const MOST_PUT: usize = 64 << 10;
/// Most frames that one `poll` takes, and rounds of sending in it.
const FRAMES: usize = 64;
const ROUNDS: usize = 4;
/// Most time that one `poll` lets pass: what is longer was the guest's, and no server's fault.
const STEP_MS: u64 = 250;
/// After a failure, the first time to wait and the longest one (ms).
const BACKOFF_MS: u64 = 200;
const MOST_BACKOFF_MS: u64 = 5000;
/// Failures in a row before the next server's turn.
const STRIKES: u32 = 2;
/// How often the guest's connection is begun while nobody needs it (ms).
const WARM_MS: u64 = 1000;
/// How long another server than the first is used before the first is tried again, and at most (ms).
const PROBE_MS: u64 = 60_000;
const MOST_PROBE_MS: u64 = 600_000;

/// How the client gets its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// By DHCP.
    Dhcp,
    /// It is told.
    Static {
        /// The address.
        address: Ipv4Addr,
        /// Bits of the network, at most 32.
        prefix: u8,
        /// The router, if the servers are not in the network.
        router: Option<Ipv4Addr>,
    },
}

/// How the client is in its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The card's address.
    pub mac: [u8; 6],
    /// The address.
    pub address: Address,
}

/// Who waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The guest: it has a connection of its own, and goes before what waits.
    Guest,
    /// Nobody yet.
    Background,
    /// The VMM itself: files.
    File,
}

impl Need {
    /// How many there may be, from being asked for to being taken.
    fn most(self) -> usize {
        match self {
            Self::Guest => 4,
            Self::Background => (CONNECTIONS - 1) * DEPTH,
            Self::File => 2,
        }
    }
}

/// A request that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// How it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Address and bits of its network, if there is one.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Which server of the list is in use.
    pub server: usize,
    /// Bytes of answers that were taken as right.
    pub received: u64,
    /// How often something was asked for again.
    pub retries: u64,
    /// Failures in a row: 0 while all is well.
    pub failures: u32,
    /// Requests that were made and are not over.
    pub open: usize,
}

/// Fetches over `device`.
///
/// A request stays until it is answered. If a connection fails, or a server is silent, it is made
/// again, without end, at this server and at the next ones of the list: a guest's read
/// cannot be answered with the network's troubles; [`Client::status`] tells of them. What is reported as
/// [`FetchError`] is an answer that is not what was asked for, after each server has had its turn.
pub struct Client<D: Device> {
    device: D,
    interface: Interface,
    sockets: SocketSet<'static>,
    dhcp: Option<SocketHandle>,
    address: Option<Ipv4Cidr>,
    connections: Vec<Connection>,
    servers: Vec<Server>,
    /// The one in use.
    server: usize,
    image: Option<String>,
    queue: VecDeque<Job>,
    done: VecDeque<(Ticket, Need, Result<Vec<u8>, FetchError>)>,
    /// Requests by `Need`, up to being taken.
    open: [usize; 3],
    next_ticket: u64,
    /// The caller's last time, and the client's own, which goes in steps of `STEP_MS` at most.
    last_ms: u64,
    now: u64,
    failures: u32,
    /// No connection is begun before.
    wait: u64,
    /// The guest's connection is not begun before, if nobody needs it.
    warm: u64,
    probe: Probe,
    random: u64,
    received: u64,
    retries: u64,
}

/// Tries the first server while another is in use.
struct Probe {
    handle: SocketHandle,
    running: bool,
    /// When it begins, or ends.
    at: u64,
    every: u64,
}

impl<D: Device> Client<D> {
    /// One over `device` and for `servers`, the first being the best; there is one at least. `seed` is
    /// any number that is not the same each time: ports and sequence numbers come of it. `now_ms` is
    /// a time in milliseconds that does not go back, from any moment on.
    ///
    /// `None` without a server, or with an address that is not one of a host.
    pub fn new(
        mut device: D,
        config: NetConfig,
        servers: Vec<Server>,
        seed: u64,
        now_ms: u64,
    ) -> Option<Self> {
        if servers.is_empty() {
            return None;
        }
        let mac = EthernetAddress(config.mac);
        if !mac.is_unicast() {
            return None;
        }
        let mut settings = Config::new(HardwareAddress::Ethernet(mac));
        settings.random_seed = seed;
        let interface = Interface::new(settings, &mut device, instant(now_ms));
        let mut sockets = SocketSet::new(Vec::new());
        let dhcp = (config.address == Address::Dhcp).then(|| sockets.add(dhcpv4::Socket::new()));
        let connections = (0..CONNECTIONS)
            .map(|_| Connection::new(sockets.add(socket(WINDOW, SEND))))
            .collect();
        let probe = Probe {
            handle: sockets.add(socket(1024, 1024)),
            running: false,
            at: PROBE_MS,
            every: PROBE_MS,
        };
        let mut client = Self {
            device,
            interface,
            sockets,
            dhcp,
            address: None,
            connections,
            servers,
            server: 0,
            image: None,
            queue: VecDeque::new(),
            done: VecDeque::new(),
            open: [0; 3],
            next_ticket: 0,
            last_ms: now_ms,
            now: 0,
            failures: 0,
            wait: 0,
            warm: 0,
            probe,
            random: seed | 1,
            received: 0,
            retries: 0,
        };
        if let Address::Static {
            address,
            prefix,
            router,
        } = config.address
        {
            if prefix > 32 || !is_host(address) || router.is_some_and(|router| !is_host(router)) {
                return None;
            }
            client.set_address(Some((Ipv4Cidr::new(address, prefix), router)));
        }
        Some(client)
    }

    /// Does what can be done at once, and a bounded amount of it. To be called often.
    /// Whether there was something: then there may be more.
    pub fn poll(&mut self, now_ms: u64) -> bool {
        let now_ms = now_ms.max(self.last_ms);
        self.now += (now_ms - self.last_ms).min(STEP_MS);
        self.last_ms = now_ms;
        let instant = instant(now_ms);
        let mut busy = false;

        self.interface.poll_maintenance(instant);
        for _ in 0..FRAMES {
            let (device, sockets) = (&mut self.device, &mut self.sockets);
            match self.interface.poll_ingress_single(instant, device, sockets) {
                PollIngressSingleResult::None => break,
                _ => busy = true,
            }
        }
        self.follow_dhcp();
        self.step();
        self.try_first();
        self.assign();
        self.keep_warm();
        for _ in 0..ROUNDS {
            let (device, sockets) = (&mut self.device, &mut self.sockets);
            match self.interface.poll_egress(instant, device, sockets) {
                PollResult::None => break,
                PollResult::SocketStateChanged => busy = true,
            }
        }
        busy
    }

    /// Which file of the servers' directories `fetch` reads, from now on.
    pub fn set_image(&mut self, path: &str) -> Result<(), UrlError> {
        server::check(path)?;
        self.image = Some(path.to_string());
        Ok(())
    }

    /// Whether another request of this kind is taken.
    pub fn room(&self, need: Need) -> bool {
        self.open[need as usize] < need.most()
    }

    /// Asks for `len` bytes of the image from `offset` on, at most 4 MiB. `None` if there is no room, no image
    /// or no such range.
    pub fn fetch(&mut self, offset: u64, len: u32, need: Need) -> Option<Ticket> {
        offset.checked_add(u64::from(len))?;
        if len == 0 || len > MOST_FETCH {
            return None;
        }
        let path = self.image.clone()?;
        self.admit(need, What::Range { path, offset, len })
    }

    /// Asks for a whole file of at most `limit` bytes; `path` is one below the servers' directories, or from
    /// their root if it begins with a slash. `None` if there is no room, or no such path.
    pub fn get(&mut self, path: &str, limit: u64) -> Option<Ticket> {
        server::check(path).ok()?;
        let path = path.to_string();
        self.admit(Need::File, What::Get { path, limit })
    }

    /// Sends `body`, at most 64 KiB, to `path` by PUT. It may arrive more than once. The result has no bytes.
    pub fn put(&mut self, path: &str, body: &[u8]) -> Option<Ticket> {
        server::check(path).ok()?;
        if body.len() > MOST_PUT {
            return None;
        }
        let (path, body) = (path.to_string(), body.to_vec());
        self.admit(Need::File, What::Put { path, body })
    }

    /// What is over.
    pub fn take(&mut self) -> Option<(Ticket, Result<Vec<u8>, FetchError>)> {
        let (ticket, need, result) = self.done.pop_front()?;
        self.open[need as usize] -= 1;
        Some((ticket, result))
    }

    /// What the server in use gave was wrong in a way that only the caller can see: the next one's turn.
    pub fn distrust(&mut self) {
        self.next_server();
    }

    /// How it goes.
    pub fn status(&self) -> Status {
        Status {
            address: self.address.map(|cidr| (cidr.address(), cidr.prefix_len())),
            server: self.server,
            received: self.received,
            retries: self.retries,
            failures: self.failures,
            open: self.open.iter().sum(),
        }
    }

    /// The servers, in the order that `Status::server` counts.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// The device.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Resets all connections and gives the device back. What was asked for is forgotten.
    pub fn stop(mut self, now_ms: u64) -> D {
        for connection in &mut self.connections {
            connection.end(self.sockets.get_mut(connection.handle));
        }
        let instant = instant(now_ms.max(self.last_ms));
        let (device, sockets) = (&mut self.device, &mut self.sockets);
        self.interface.poll_egress(instant, device, sockets);
        self.device
    }

    fn admit(&mut self, need: Need, what: What) -> Option<Ticket> {
        if !self.room(need) {
            return None;
        }
        self.open[need as usize] += 1;
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let job = Job {
            ticket,
            need,
            what,
            refused: 0,
            not_before: 0,
        };
        let behind = |other: &Job| need == Need::Guest && other.need != Need::Guest;
        let at = self.queue.iter().position(behind);
        self.queue.insert(at.unwrap_or(self.queue.len()), job);
        Some(ticket)
    }

    fn follow_dhcp(&mut self) {
        let Some(handle) = self.dhcp else {
            return;
        };
        let event = self.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll();
        let address = match event {
            None => return,
            Some(dhcpv4::Event::Deconfigured) => None,
            // A server's word: an address that is none is not taken.
            Some(dhcpv4::Event::Configured(config)) => Some((config.address, config.router))
                .filter(|(cidr, _)| is_host(cidr.address()))
                .map(|(cidr, router)| (cidr, router.filter(|router| is_host(*router)))),
        };
        self.set_address(address);
    }

    fn set_address(&mut self, address: Option<(Ipv4Cidr, Option<Ipv4Addr>)>) {
        let cidr = address.map(|(cidr, _)| cidr);
        if self.address != cidr {
            // Connections are of an address.
            for i in 0..self.connections.len() {
                self.lose(i);
            }
        }
        self.address = cidr;
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            // There is room for one.
            let _ = cidr.map(|cidr| addresses.push(IpCidr::Ipv4(cidr)));
        });
        let routes = self.interface.routes_mut();
        routes.remove_default_ipv4_route();
        if let Some(router) = address.and_then(|(_, router)| router) {
            // And for one.
            let _ = routes.add_default_ipv4_route(router);
        }
    }

    /// Lets each connection write and read.
    fn step(&mut self) {
        let mut over = Vec::new();
        for i in 0..self.connections.len() {
            let connection = &mut self.connections[i];
            let server = connection.server;
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
            let stepped =
                connection.step(socket, &self.servers, self.now, self.failures, &mut over);
            for (job, result) in over.drain(..) {
                self.settle(job, server, result);
            }
            if let Err(lost) = stepped {
                self.lose(i);
                if lost != Lost::Ended {
                    self.doubt(server, lost);
                }
            } else if self.connections[i].unused() && server != self.server {
                self.lose(i);
            }
        }
    }

    /// Ends a connection; its requests are to be made again, first.
    fn lose(&mut self, i: usize) {
        let connection = &mut self.connections[i];
        let socket = self.sockets.get_mut(connection.handle);
        for job in connection.end(socket).into_iter().rev() {
            self.retries += 1;
            self.queue.push_front(job);
        }
    }

    /// A server is silent, or is not there. Connections with it that nobody uses are as dead, and would only be
    /// found to be so one after the other.
    fn doubt(&mut self, server: usize, lost: Lost) {
        for i in 0..self.connections.len() {
            if self.connections[i].unused() && self.connections[i].server == server {
                self.lose(i);
            }
        }
        if server == self.server {
            self.strike();
            // One that takes connections and is silent has had its time already.
            if server == self.server && lost == Lost::Silent {
                self.next_server();
            }
        }
    }

    /// The server in use has failed. Several connections that fail together are one failure.
    fn strike(&mut self) {
        if self.now < self.wait {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        let servers = u32::try_from(self.servers.len()).unwrap_or(u32::MAX);
        if servers > 1 && self.failures.is_multiple_of(STRIKES) {
            self.next_server();
        }
        let rounds = (self.failures / servers.saturating_mul(STRIKES)).min(8);
        let most = (BACKOFF_MS << rounds).min(MOST_BACKOFF_MS);
        // Not all machines at the same moment.
        self.wait = self.now + most / 2 + self.random() % (most / 2);
    }

    fn next_server(&mut self) {
        self.server = (self.server + 1) % self.servers.len();
    }

    /// An answer has come.
    fn settle(&mut self, mut job: Job, server: usize, result: Result<Vec<u8>, FetchError>) {
        let servers = u32::try_from(self.servers.len()).unwrap_or(u32::MAX);
        let tries = match result {
            Ok(body) => {
                self.failures = 0;
                self.received += body.len() as u64;
                self.done.push_back((job.ticket, job.need, Ok(body)));
                return;
            }
            // Nothing a server can mend.
            Err(FetchError::Memory(_)) => 1,
            // No server will say anything else a moment later.
            Err(FetchError::Status(400..=407 | 409..=424 | 426..=428 | 430..=499)) => servers,
            Err(FetchError::TooLong { .. }) => servers,
            Err(_) => servers.saturating_add(2),
        };
        job.refused += 1;
        if let (Err(error), true) = (result, job.refused >= tries) {
            self.done.push_back((job.ticket, job.need, Err(error)));
            return;
        }
        self.retries += 1;
        if server == self.server {
            self.next_server();
        }
        if job.refused >= servers {
            job.not_before = self.now + (BACKOFF_MS << job.refused.min(4));
        }
        self.queue.push_front(job);
    }

    /// Gives requests to connections, and begins connections for them.
    fn assign(&mut self) {
        if self.address.is_none() {
            return;
        }
        let mut i = 0;
        while i < self.queue.len() {
            let job = &self.queue[i];
            let connection = (job.not_before <= self.now)
                .then(|| self.pick(job.need))
                .flatten();
            let Some(connection) = connection else {
                i += 1;
                continue;
            };
            if self.connections[connection].idle() && !self.connect(connection) {
                return;
            }
            if let Some(job) = self.queue.remove(i) {
                self.connections[connection].give(job, self.now);
            }
        }
    }

    /// The guest's connection is there before it is needed: a handshake would wait behind all that is on its way.
    fn keep_warm(&mut self) {
        let last = CONNECTIONS - 1;
        let wanted = self.received > 0 && self.failures == 0 && self.address.is_some();
        if wanted && self.now >= self.warm.max(self.wait) && self.connections[last].idle() {
            self.warm = self.now + WARM_MS;
            self.connect(last);
        }
    }

    /// The connection on which a request is answered first.
    fn pick(&self, need: Need) -> Option<usize> {
        let most = match need {
            Need::Background => CONNECTIONS - 1,
            Need::Guest | Need::File => CONNECTIONS,
        };
        let fits = |(_, connection): &(usize, &Connection)| {
            if connection.idle() {
                self.now >= self.wait
            } else {
                connection.server == self.server && connection.jobs() < DEPTH
            }
        };
        let candidates = self.connections[..most].iter().enumerate().filter(fits);
        let key = |(i, connection): &(usize, &Connection)| {
            let order = if need == Need::Guest { most - i } else { *i };
            (connection.load(), order)
        };
        candidates.min_by_key(key).map(|(i, _)| i)
    }

    /// Begins a connection to the server in use.
    fn connect(&mut self, i: usize) -> bool {
        let handle = self.connections[i].handle;
        if !self.dial(handle, self.server) {
            self.strike();
            return false;
        }
        self.connections[i].connecting(self.server, self.now);
        true
    }

    fn dial(&mut self, handle: SocketHandle, server: usize) -> bool {
        let local = 49152 + u16::try_from(self.random() % 16384).unwrap_or(0);
        let server = &self.servers[server];
        let remote = (server.address, server.port);
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket
            .connect(self.interface.context(), remote, local)
            .is_ok()
    }

    /// Goes back to the first server once it can be reached again.
    fn try_first(&mut self) {
        if self.server == 0 || self.address.is_none() {
            if self.probe.running {
                self.probe_over(0);
            }
            self.probe.at = self.now + self.probe.every;
            return;
        }
        let handle = self.probe.handle;
        if !self.probe.running {
            if self.now >= self.probe.at {
                self.probe.running = self.dial(handle, 0);
                self.probe.at = self.now + CONNECT_MS;
            }
            return;
        }
        match self.sockets.get_mut::<tcp::Socket<'_>>(handle).state() {
            tcp::State::SynSent if self.now < self.probe.at => {}
            tcp::State::SynSent | tcp::State::Closed => self.probe_over(self.probe.every),
            _ => {
                self.probe_over(self.probe.every);
                self.server = 0;
                self.failures = 0;
                self.wait = 0;
            }
        }
    }

    fn probe_over(&mut self, longer: u64) {
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.probe.handle);
        socket.abort();
        self.probe.running = false;
        self.probe.every = (self.probe.every + longer).min(MOST_PROBE_MS);
        self.probe.at = self.now + self.probe.every;
    }

    /// xorshift64: for ports and waits, where nothing secret is at stake.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 16
    }
}

fn socket(receive: usize, send: usize) -> tcp::Socket<'static> {
    let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
    let mut socket = tcp::Socket::new(buffer(receive), buffer(send));
    // `poll` takes many frames before it sends: what it acknowledges is one for all of them.
    socket.set_ack_delay(None);
    socket.set_nagle_enabled(false);
    socket
}

fn instant(ms: u64) -> Instant {
    Instant::from_millis(i64::try_from(ms).unwrap_or(i64::MAX))
}
