//! A tap of the host's (`linux/if_tun.h`), which its owner joins to a bridge, routes, or
//! filters.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::{Arc, Mutex};

use super::frame::Frames;
use super::{Error, Health, Link, LinkState, SharedPort};
use crate::net::MAX_QUEUES;
use crate::net::offload::{HEADER, Offloads};

/// `TUN_F_CSUM`.
const TUN_F_CSUM: u32 = 1;
/// `TUN_F_TSO4`.
const TUN_F_TSO4: u32 = 2;
/// `TUN_F_TSO6`.
const TUN_F_TSO6: u32 = 4;
/// `TUN_F_TSO_ECN`.
const TUN_F_TSO_ECN: u32 = 8;

/// A tap that is open. What the guest sends is written to it from the guest's own pages,
/// and what it gives is read into them.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<Arc<Mutex<Frames>>>,
    /// The first queue once more: whose thread it is has its lock.
    announces: OwnedFd,
    health: Health,
}

impl Tap {
    /// Opens a tap that is there, for at most `queues` queues. One that was not made with
    /// `multi_queue` has one.
    ///
    /// # Errors
    /// What is wrong with it, and what mends that.
    pub fn open(name: &str, queues: u32) -> Result<Self, Error> {
        Self::adopt(name, Self::descriptors(name, queues)?)
    }

    /// Opens a tap for another process, which gives them to [`Tap::adopt`]: a descriptor for
    /// each queue.
    ///
    /// # Errors
    /// What is wrong with it, and what mends that.
    pub fn descriptors(name: &str, queues: u32) -> Result<Vec<OwnedFd>, Error> {
        let valid = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(valid) {
            return Err(Error::Name(name.to_owned()));
        }
        let first = open_tun()?;
        // Opening one that is not there would make it.
        exists(name)?;
        let multi = match attach(&first, name, true) {
            Ok(()) => true,
            // Made without `multi_queue`, or no tap: the next says.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                attach(&first, name, false).map_err(|error| refused(name, error))?;
                false
            }
            Err(error) => return Err(refused(name, error)),
        };
        let mut fds = vec![first];
        if multi {
            for _ in 1..queues.min(MAX_QUEUES) {
                let next = open_tun()?;
                attach(&next, name, true).map_err(|error| refused(name, error))?;
                fds.push(next);
            }
        }
        Ok(fds)
    }

    /// A tap that was opened before: its queues.
    ///
    /// # Errors
    /// The host's answer; the descriptors may not be a tap's.
    pub fn adopt(name: &str, fds: Vec<OwnedFd>) -> Result<Self, Error> {
        let host = |what| {
            let name = format!("the tap {name}");
            move |source| Error::Host { name, what, source }
        };
        let Some(first) = fds.first() else {
            return Err(host("queues")(io::ErrorKind::NotFound.into()));
        };
        let size = libc::c_int::try_from(HEADER).unwrap_or(0);
        // SAFETY: the request reads an int.
        unsafe { ioctl(first, libc::TUNSETVNETHDRSZ, &raw const size) }
            .map_err(host("the header before packets"))?;
        offload(first, Offloads::default()).map_err(host("offloads"))?;
        let announces = first.try_clone().map_err(host("its descriptor"))?;
        let health = Health::default();
        let queues = fds
            .into_iter()
            .map(|fd| Frames::new(fd, format!("the tap {name}"), health.clone()))
            .map(|port| Arc::new(Mutex::new(port)))
            .collect();
        Ok(Self {
            name: name.to_owned(),
            queues,
            announces,
            health,
        })
    }
}

impl Link for Tap {
    fn describe(&self) -> String {
        format!("tap {}", self.name)
    }

    fn max_queues(&self) -> u32 {
        // At most MAX_QUEUES.
        u32::try_from(self.queues.len()).unwrap_or(1)
    }

    fn takes(&self) -> Offloads {
        Offloads::ALL
    }

    fn open(&self, queues: u32, offloads: Offloads) -> io::Result<Vec<SharedPort>> {
        let mut ports = Vec::new();
        for (index, queue) in self.queues.iter().enumerate() {
            let port = crate::sync::lock(queue);
            if index == 0 {
                offload(port.as_fd(), offloads)?;
            }
            let used = index < queues as usize;
            if self.queues.len() > 1 {
                // The host spreads packets over those that are attached only.
                set_attached(port.as_fd(), used)?;
            }
            if used {
                ports.push(Arc::clone(queue) as SharedPort);
            }
        }
        Ok(ports)
    }

    fn state(&self) -> LinkState {
        self.health.state()
    }

    fn announce(&self, packet: &[u8]) {
        let mut whole = vec![0; HEADER];
        whole.extend(packet);
        // A network that is full loses it, as it may lose any.
        let _ = rustix::io::write(&self.announces, &whole);
    }
}

fn open_tun() -> Result<OwnedFd, Error> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|source| Error::Tun { source })?;
    Ok(file.into())
}

/// Whether there is an interface with that name in this network namespace.
fn exists(name: &str) -> Result<(), Error> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
    let host = |source: rustix::io::Errno| Error::Host {
        name: format!("the tap {name}"),
        what: "a socket",
        source: source.into(),
    };
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(host)?;
    match netdevice::name_to_index(&socket, name) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::NODEV) => Err(Error::Missing(name.to_owned())),
        Err(error) => Err(host(error)),
    }
}

/// `TUNSETIFF`.
fn attach(fd: &OwnedFd, name: &str, multi: bool) -> io::Result<()> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = request(flags);
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // SAFETY: the request reads and writes a `struct ifreq`.
    unsafe { ioctl(fd, libc::TUNSETIFF, &raw const request) }
}

/// `TUNSETQUEUE`. One that is as wanted already is no error.
fn set_attached(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let flag = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    let request = request(flag);
    // SAFETY: the request reads a `struct ifreq`.
    match unsafe { ioctl(fd, libc::TUNSETQUEUE, &raw const request) } {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

/// `TUNSETOFFLOAD`: what may be left undone in packets that are read, by the kernel's
/// leave also for the other queues.
fn offload(fd: impl AsFd, offloads: Offloads) -> io::Result<()> {
    let mut flags = 0;
    if offloads.csum4 || offloads.csum6 {
        flags |= TUN_F_CSUM;
    }
    if offloads.tso4 {
        flags |= TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO_ECN;
    }
    if offloads.tso6 {
        flags |= TUN_F_CSUM | TUN_F_TSO6 | TUN_F_TSO_ECN;
    }
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the request takes a number.
    match unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn request(flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all zero is a request without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The flags of a tap have 16 bits (`short`), of which the kernel uses all.
    let [low, high, ..] = flags.to_le_bytes();
    request.ifr_ifru.ifru_flags = libc::c_short::from_le_bytes([low, high]);
    request
}

/// # Safety
/// `argument` is what the request wants.
unsafe fn ioctl<T>(fd: impl AsFd, request: libc::Ioctl, argument: *const T) -> io::Result<()> {
    // SAFETY: the caller's.
    match unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, argument) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn refused(name: &str, source: io::Error) -> Error {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Error::Permission(name.to_owned()),
        Some(libc::EBUSY) => Error::Busy(name.to_owned()),
        Some(libc::EINVAL) => Error::NoTap(name.to_owned()),
        _ => Error::Host {
            name: format!("the tap {name}"),
            what: "a queue",
            source,
        },
    }
}

#[cfg(test)]
mod tests;
