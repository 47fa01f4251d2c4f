//! What a network device is connected to on the host.

mod frame;
#[cfg(any(test, feature = "testing"))]
pub mod pair;
mod stream;
pub mod tap;
pub mod user;
mod vectors;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use blanket_disk::Buffer;

use super::offload::{Offloads, Undone};
use crate::sync::lock;

pub use tap::Tap;
pub use user::User;

/// A network of the host's, to which one device of a VM is connected, over its reboots.
/// It has one owner, so that no other device uses its ends.
pub trait Link: Send + Sync + fmt::Debug {
    /// What it is, for people: `tap vm1`.
    fn describe(&self) -> String;

    /// Most queues.
    fn max_queues(&self) -> u32;

    /// What may be left undone in packets that it is given.
    fn takes(&self) -> Offloads;

    /// Most bytes of one TCP stream that may be on their way to the guest: a link that drops
    /// what it has no room for would lose more. `None` if the host's kernel sees to that.
    fn room(&self) -> Option<u32> {
        None
    }

    /// Its ends for a guest that connects: one for each of `queues` queues, at most
    /// [`Link::max_queues`]. Packets that they give leave at most `offloads` undone. The
    /// ends of the last time are no longer used.
    ///
    /// # Errors
    /// The host's answer.
    fn open(&self, queues: u32, offloads: Offloads) -> io::Result<Vec<SharedPort>>;

    /// Whether it works.
    fn state(&self) -> LinkState;

    /// Sends a packet of this side's own to the network, once. A link that reaches no
    /// network with switches has no use for it.
    fn announce(&self, _packet: &[u8]) {}
}

/// An end of a link, which a queue's thread holds as long as it lives.
pub type SharedPort = Arc<Mutex<dyn Port>>;

/// An end of a link.
pub trait Port: Send {
    /// Sends a packet that lies in `parts`, which are there until this returns; so are
    /// those of [`Port::receive`].
    ///
    /// # Errors
    /// It was not sent.
    fn send(&mut self, undone: &Undone, parts: &[Buffer]) -> Result<(), NotSent>;

    /// Hands over what [`Port::send`] could not at once. Whether some is left: then the
    /// thread is woken when [`Port::event`] is writable.
    fn flush(&mut self) -> bool;

    /// Whether whoever is at the other end has taken all that was sent. One that does not tell has.
    fn has_taken_all(&self) -> bool {
        true
    }

    /// Receives a packet into `parts`; what is longer is cut off. `None` if there is none
    /// now, or the link is down.
    fn receive(&mut self, parts: &[Buffer]) -> Option<Received>;

    /// Readable when there are packets; `None` if none will come.
    fn event(&self) -> Option<BorrowedFd<'_>>;
}

/// A packet that was received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Its length, bytes.
    pub length: usize,
    /// What was left undone in it; `None` if that cannot be understood.
    pub undone: Option<Undone>,
}

/// Why a packet was not sent.
#[derive(Debug, thiserror::Error)]
pub enum NotSent {
    /// There is no room now. The same packet is sent again when the link is writable.
    #[error("the link is full")]
    Full,
    /// The host does not take this packet.
    #[error("the host refused a packet: {0}")]
    Refused(io::Error),
    /// The link does not work any more.
    #[error("the link is down")]
    Down,
}

/// Whether a link works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// It does.
    Up,
    /// Not any more, and why.
    Down(String),
}

/// The state of a link, which its ends share.
#[derive(Clone, Debug, Default)]
pub(super) struct Health(Arc<(AtomicBool, Mutex<Option<String>>)>);

impl Health {
    pub(super) fn state(&self) -> LinkState {
        match &*lock(&self.0.1) {
            None => LinkState::Up,
            Some(why) => LinkState::Down(why.clone()),
        }
    }

    /// Notes why it works no more. Whether that is news.
    pub(super) fn down(&self, why: impl fmt::Display) -> bool {
        let mut state = lock(&self.0.1);
        *state = Some(why.to_string());
        !self.0.0.swap(true, Ordering::AcqRel)
    }

    pub(super) fn is_up(&self) -> bool {
        !self.0.0.load(Ordering::Acquire)
    }
}

/// Why a link cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/net/tun`.
    #[error("cannot open /dev/net/tun: {source}; {}", tun_advice(source))]
    Tun {
        /// The host's answer.
        source: io::Error,
    },
    /// Not what an interface can be named.
    #[error(
        "{0:?} cannot be the name of a network interface: it has 1 to 15 bytes, none of them a space or /"
    )]
    Name(String),
    /// No such interface.
    #[error(
        "there is no network interface {0}; as root, make it: ip tuntap add {0} mode tap \
         multi_queue user NAME && ip link set {0} up (NAME is who runs the VM)"
    )]
    Missing(String),
    /// Something else than a tap.
    #[error(
        "the network interface {0} is no tap; name one that was made by: ip tuntap add NAME mode tap multi_queue"
    )]
    NoTap(String),
    /// Another user's.
    #[error(
        "the tap {0} is another user's; as root, make it yours: ip tuntap del {0} mode tap, then \
         ip tuntap add {0} mode tap multi_queue user NAME"
    )]
    Permission(String),
    /// Another process has it.
    #[error("the tap {0} is in use by another process; end that, or name another tap")]
    Busy(String),
    /// Another step.
    #[error("cannot set up {what} of {name}: {source}")]
    Host {
        /// Which link.
        name: String,
        /// What.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// No passt.
    #[error(
        "user-mode networking needs the program passt, which is not there; install it: \
         apt-get install passt"
    )]
    NoPasst,
    /// passt ended, or does not answer.
    #[error("passt {how}{}", said(.output))]
    Passt {
        /// What it did.
        how: String,
        /// Its last words.
        output: Vec<String>,
    },
}

fn tun_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "a tap needs the right to open it; user-mode networking needs none"
        }
        _ => "load the kernel module tun, or use user-mode networking",
    }
}

fn said(output: &[String]) -> String {
    if output.is_empty() {
        String::new()
    } else {
        format!("; it said: {}", output.join(" | "))
    }
}
