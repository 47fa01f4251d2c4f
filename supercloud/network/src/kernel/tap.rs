//! Taps (`linux/if_tun.h`): netlink cannot make them.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd as _;

/// Makes a tap with several queues, which stays. Nobody but root may open it: a VM's process does so before it
/// gives its rights up.
pub fn create(name: &str) -> io::Result<()> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all bits zero is a valid ifreq, a struct of C with arrays, integers and pointers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | IFF_MULTI_QUEUE;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(0);
    // SAFETY: the request reads and writes an ifreq, which lives until it returns.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let stays: libc::c_ulong = 1;
    // SAFETY: the request takes a number.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, stays) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `IFF_MULTI_QUEUE`.
const IFF_MULTI_QUEUE: libc::c_int = 0x0100;
