//! A link whose other end is in this process, for tests.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::frame::Frames;
use super::{Health, Link, LinkState, SharedPort};
use crate::net::offload::{HEADER, Offloads, Undone};
use crate::sync::lock;

/// The device's end.
#[derive(Debug)]
pub struct Pair {
    queues: Vec<Arc<Mutex<Frames>>>,
    takes: Offloads,
    given: Arc<Mutex<Offloads>>,
    health: Health,
}

/// The other end.
#[derive(Debug)]
pub struct Peer {
    sockets: Vec<OwnedFd>,
    given: Arc<Mutex<Offloads>>,
}

/// A link of `queues` queues that takes packets with `takes` undone.
///
/// # Errors
/// The host has no sockets.
pub fn pair(queues: u32, takes: Offloads) -> io::Result<(Pair, Peer)> {
    let health = Health::default();
    let given = Arc::<Mutex<Offloads>>::default();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..queues {
        let (one, two) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        let port = Frames::new(one, "the pair".into(), health.clone());
        ours.push(Arc::new(Mutex::new(port)));
        theirs.push(two);
    }
    let link = Pair {
        queues: ours,
        takes,
        given: Arc::clone(&given),
        health,
    };
    let sockets = theirs;
    Ok((link, Peer { sockets, given }))
}

impl Link for Pair {
    fn describe(&self) -> String {
        "pair".into()
    }

    fn max_queues(&self) -> u32 {
        u32::try_from(self.queues.len()).unwrap_or(1)
    }

    fn takes(&self) -> Offloads {
        self.takes
    }

    fn open(&self, queues: u32, offloads: Offloads) -> io::Result<Vec<SharedPort>> {
        *lock(&self.given) = offloads;
        let used = self.queues.iter().take(queues as usize);
        Ok(used.map(|queue| Arc::clone(queue) as SharedPort).collect())
    }

    fn state(&self) -> LinkState {
        self.health.state()
    }
}

impl Peer {
    /// What the device said that it may be given undone.
    #[must_use]
    pub fn offloads(&self) -> Offloads {
        *lock(&self.given)
    }

    /// Sends a packet to the device.
    ///
    /// # Errors
    /// The host's; `WouldBlock` when the device reads too slowly.
    pub fn send(&self, queue: usize, undone: &Undone, packet: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + packet.len());
        bytes.extend(undone.encode());
        bytes.extend(packet);
        rustix::io::write(&self.sockets[queue], &bytes)?;
        Ok(())
    }

    /// The next packet from the device, if there is one within the time.
    #[must_use]
    pub fn receive(&self, queue: usize, patience: Duration) -> Option<(Undone, Vec<u8>)> {
        let socket = self.sockets.get(queue)?;
        let timeout = Timespec::try_from(patience).ok();
        let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)];
        let _ = poll(&mut fds, timeout.as_ref());
        let mut bytes = vec![0; HEADER + (1 << 17)];
        let count = rustix::io::read(socket, &mut bytes).ok()?;
        bytes.truncate(count);
        let (header, packet) = bytes.split_first_chunk::<HEADER>()?;
        Some((Undone::decode(header)?, packet.to_vec()))
    }
}
