//! A userfaultfd on the VM's memory (`linux/userfaultfd.h`), and the thread that answers.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::Result;
use crate::memory::{Memory, PAGE, done};

const API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_WRITEPROTECT: u64 = 0xc018_aa06;
/// Missing pages of a shared file; write protection of its pages (Linux 5.19).
const FEATURES: u64 = 1 << 5 | 1 << 12;
const EVENT_PAGEFAULT: u64 = 0x12;
const FLAG_WP: u64 = 1 << 1;

/// What is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Mode {
    Missing = 1,
    WriteProtect = 2,
}

/// `struct uffd_msg`, as words.
type Message = [u64; 4];

pub struct Faults {
    fd: OwnedFd,
    memory: Memory,
}

impl Faults {
    /// Registers all of `memory`.
    pub fn on(memory: Memory, mode: Mode) -> Result<Arc<Self>> {
        // SAFETY: a new descriptor. Faults of the kernel count, too: the host finds
        // guest memory through this process.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(fd).map_err(|e| e.to_string())?;
        done("userfaultfd", fd)?;
        // SAFETY: it was just opened.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let this = Self { fd, memory };
        this.call("UFFDIO_API", UFFDIO_API, &mut [API, FEATURES, 0])?;
        let (start, length) = (memory.start as u64, memory.length as u64);
        this.call(
            "UFFDIO_REGISTER",
            UFFDIO_REGISTER,
            &mut [start, length, mode as u64, 0],
        )?;
        Ok(Arc::new(this))
    }

    fn call(&self, name: &str, number: u64, argument: &mut [u64]) -> Result<()> {
        // SAFETY: the argument has the size that is in the number; the callers see to it.
        done(name, unsafe {
            libc::ioctl(self.fd.as_raw_fd(), number, argument.as_mut_ptr())
        })
    }

    /// Gives a page its content. Whether it was missing until now.
    pub fn fill(&self, page: usize, content: &[u8; PAGE]) -> Result<bool> {
        let to = (self.memory.start + page * PAGE) as u64;
        let mut argument = [to, content.as_ptr() as u64, PAGE as u64, 0, 0];
        match self.call("UFFDIO_COPY", UFFDIO_COPY, &mut argument) {
            Ok(()) => Ok(true),
            Err(_) if std::io::Error::last_os_error().raw_os_error() == Some(libc::EEXIST) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Protects pages against writing, or allows it again.
    pub fn protect(&self, page: usize, count: usize, on: bool) -> Result<()> {
        let start = (self.memory.start + page * PAGE) as u64;
        let mut argument = [start, (count * PAGE) as u64, u64::from(on)];
        self.call("UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT, &mut argument)
    }

    /// The page of the next fault and whether it was one of protection, if there is one
    /// within a tenth of a second.
    fn next(&self) -> Result<Option<(usize, bool)>> {
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry.
        done("poll", unsafe { libc::poll(&raw mut poll, 1, 100) })?;
        let mut message: Message = [0; 4];
        let size = size_of::<Message>();
        // SAFETY: a buffer of that size.
        let got = unsafe { libc::read(poll.fd, message.as_mut_ptr().cast(), size) };
        if usize::try_from(got) != Ok(size) || message[0] & 0xff != EVENT_PAGEFAULT {
            return Ok(None);
        }
        let address = usize::try_from(message[2]).map_err(|e| e.to_string())?;
        let page = (address - self.memory.start) / PAGE;
        Ok(Some((page, message[1] & FLAG_WP != 0)))
    }
}

/// A thread that answers faults until it is told to stop.
pub struct Handler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<BTreeSet<usize>>>,
}

impl Handler {
    /// `answer` makes the page one that can be used.
    pub fn start(
        faults: Arc<Faults>,
        mode: Mode,
        answer: impl Fn(&Faults, usize) -> Result<()> + Send + 'static,
    ) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = BTreeSet::new();
            while !asked.load(Ordering::Acquire) {
                let Some((page, protection)) = faults.next()? else {
                    continue;
                };
                if protection != (mode == Mode::WriteProtect) {
                    return Err(format!("a fault of the other kind on page {page}"));
                }
                seen.insert(page);
                answer(&faults, page)?;
            }
            Ok(seen)
        });
        Self { stop, thread }
    }

    /// All pages that had faults.
    pub fn stop(self) -> Result<BTreeSet<usize>> {
        self.stop.store(true, Ordering::Release);
        self.thread
            .join()
            .map_err(|_| "the thread that answers faults panicked".to_owned())?
    }
}
