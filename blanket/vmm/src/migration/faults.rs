//! A userfaultfd (`linux/userfaultfd.h`): whoever touches a page of the guest's memory that has
//! no content yet waits until it is given one.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use blanket_abi::PAGE_SIZE;
use blanket_snapshot::PAGE;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::builder::GuestMemory;

const API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
/// Of `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
/// `UFFD_FEATURE_MISSING_SHMEM` (Linux 4.11).
const FEATURES: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u64 = 0x12;
/// `UFFD_USER_MODE_ONLY` (Linux 5.11).
#[cfg(test)]
const USER_MODE_ONLY: i32 = 1;
/// `struct uffd_msg`.
const MESSAGE: usize = 32;

/// Faults that are taken in at once.
const AT_ONCE: usize = 16;

/// A descriptor that could tell of faults.
#[derive(Debug)]
pub struct UserFaults(File);

impl UserFaults {
    /// Opens one. It must tell of the kernel's own faults, too: the guest's are found by it.
    /// That is not for everybody, so this comes before the process gives up its rights.
    ///
    /// # Errors
    /// Why the memory of a VM cannot follow it here.
    pub fn open() -> Result<Self, String> {
        // Whoever may open the device needs no rights of his own (Linux 6.1).
        let opened = by_call().or_else(|error| by_device().map_err(|_| error));
        let this = opened.map_err(|error| {
            format!(
                "it gets no userfaultfd ({error}): start it as root there, or `sysctl \
                 vm.unprivileged_userfaultfd=1`"
            )
        })?;
        let api = &mut [API, FEATURES, 0];
        let has = this.call(UFFDIO_API, api);
        has.map_err(|error| format!("its kernel's userfaultfd cannot do it: {error}"))?;
        Ok(this)
    }

    /// One that tells of this process's own faults, which anybody may have.
    #[cfg(test)]
    pub(super) fn of_programs() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: takes a number, and opens a descriptor.
        let this = owned(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
        this.call(UFFDIO_API, &mut [API, FEATURES, 0])?;
        Ok(this)
    }

    fn call<const N: usize>(&self, number: u64, argument: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: each number has the size of its argument in it, and is only used with one of
        // that size in this file. What it does to memory is said there.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), number, argument.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn owned(fd: i64) -> io::Result<UserFaults> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just opened it, for nobody else.
        Ok(fd @ 0..) => Ok(UserFaults(unsafe { OwnedFd::from_raw_fd(fd) }.into())),
        _ => Err(io::Error::last_os_error()),
    }
}

fn by_call() -> io::Result<UserFaults> {
    // SAFETY: takes a number, and opens a descriptor.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) })
}

fn by_device() -> io::Result<UserFaults> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes a number, and opens a descriptor.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) }.into())
}

/// A part of a VM's memory, from its beginning, of which pages have no content yet.
#[derive(Debug)]
pub(super) struct Holes {
    faults: UserFaults,
    /// Where the memory is, until it is ended or gone.
    start: u64,
    bytes: u64,
}

impl AsFd for Holes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.0.as_fd()
    }
}

impl Holes {
    /// Tells from now on of all first touches of the first `frames` of `memory`. Where that is not
    /// kept, it is another one's memory that is not given anything.
    pub(super) fn of(faults: UserFaults, memory: &GuestMemory, frames: u64) -> io::Result<Self> {
        // The builder makes one region, from frame 0.
        let region = memory.iter().next().ok_or(io::ErrorKind::NotFound)?;
        let bytes = frames * PAGE_SIZE;
        if bytes > region.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let this = Self {
            faults,
            start: region.as_ptr() as u64,
            bytes,
        };
        // Nothing changes for whoever touches the memory but that he may wait.
        let argument = &mut [this.start, bytes, MODE_MISSING, 0];
        this.faults.call(UFFDIO_REGISTER, argument)?;
        Ok(this)
    }

    /// Frames that somebody waits for; none if nobody does now.
    pub(super) fn waited_for(&self) -> io::Result<Vec<u64>> {
        let mut bytes = [0; MESSAGE * AT_ONCE];
        let got = match (&self.faults.0).read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            got => got?,
        };
        let (messages, _) = bytes[..got].as_chunks::<MESSAGE>();
        let of = |message: &[u8; MESSAGE]| {
            let (words, _) = message.as_chunks::<8>();
            let [event, _, address, _] = <[[u8; 8]; 4]>::try_from(words).ok()?;
            let at = u64::from_le_bytes(address).checked_sub(self.start)?;
            (u64::from_le_bytes(event) & 0xff == EVENT_PAGEFAULT).then_some(at / PAGE_SIZE)
        };
        Ok(messages.iter().filter_map(of).collect())
    }

    /// Gives a frame its content, and wakes who waits for it. Whether it had none until now.
    pub(super) fn fill(&self, frame: u64, content: &[u8; PAGE]) -> io::Result<bool> {
        let at = frame * PAGE_SIZE;
        if at >= self.bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let to = self.start + at;
        // The kernel puts a whole page there if there is none, and nothing else.
        let argument = &mut [to, content.as_ptr() as u64, PAGE_SIZE, 0, 0];
        let copied = loop {
            match self.faults.call(UFFDIO_COPY, argument) {
                // The mappings are being changed.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    std::thread::yield_now();
                }
                copied => break copied,
            }
        };
        match copied {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                // It came between his touch and this.
                self.faults.call(UFFDIO_WAKE, &mut [to, PAGE_SIZE])?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Tells of nothing any more: what has no content is zero.
    pub(super) fn end(&self) -> io::Result<()> {
        let all = [self.start, self.bytes];
        self.faults.call(UFFDIO_UNREGISTER, &mut { all })?;
        // The kernel wakes who waits before it locks the mapping against new faults (Linux 6.18,
        // `userfaultfd_unregister`): one that came in between sleeps, and nobody else wakes it.
        self.faults.call(UFFDIO_WAKE, &mut { all })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;

    #[test]
    fn nobody_waits_any_more_when_it_is_ended() {
        const FRAMES: u64 = 64;
        for _ in 0..2000 {
            let bytes = usize::try_from(FRAMES * PAGE_SIZE).expect("few");
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory");
            let faults = UserFaults::open().or_else(|_| UserFaults::of_programs());
            let faults = faults.expect("a userfaultfd");
            let holes = Holes::of(faults, &memory, FRAMES).expect("registered");
            let both = Barrier::new(2);
            std::thread::scope(|s| {
                s.spawn(|| {
                    both.wait();
                    for frame in 0..FRAMES {
                        let at = GuestAddress(frame * PAGE_SIZE);
                        assert_eq!(memory.read_obj::<u64>(at).expect("inside"), 0);
                    }
                });
                both.wait();
                // Wherever he is: before his touch, in the midst of it, or waiting.
                holes.end().expect("ended");
            });
        }
    }
}
