//! `/dev/blanket`: a safe wrapper of the module's ioctls.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use blanket_abi::device::{
    API_VERSION, AUDIT, Audit, COUNTERS, CREATE_VCPU, CREATE_VM, CreateVm, EXIT_REASONS, GET_INFO,
    GET_STATS, Info, PAUSE, RAISE, RECLAIM, RUN, RUN_DATA, Run, TARGET, TRACE, VmStats, create,
    exit, features,
};
use blanket_abi::layout::vcpu::TRACE_SIZE;
use blanket_abi::trace::Ring;
use vm_memory::{GuestAddress, GuestMemoryBackend as _};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use crate::builder::{Domain, GuestMemory};
use crate::cpu::{Names, Profile};
use crate::hypervisor::{Crash, Exit, Hypervisor, Isolation, Kick, Machine, Vcpu, within_limits};
use crate::kvm;
use crate::shared_page::SharedPage;
use crate::sync::lock;
use crate::trace::Record;

/// Where the module's device is.
pub const PATH: &str = "/dev/blanket";

/// Why the hypervisor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no device.
    #[error("{} does not exist: the kernel module `blanket` is not loaded", .0.display())]
    NoDevice(PathBuf),
    /// The device is there and not for this user.
    #[error("no permission to open {}", .0.display())]
    Permission(PathBuf),
    /// The device cannot be opened for another reason.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// Something else answers at the path.
    #[error("{} is not the device of the module `blanket`: {source}", path.display())]
    NotBlanket {
        /// The device.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// Module and program are of different versions.
    #[error(
        "the loaded module `blanket` speaks version {module} of its interface, \
         this program version {ours}: they are not from the same release"
    )]
    Version {
        /// The module's.
        module: u32,
        /// This program's.
        ours: u32,
    },
    /// More vCPUs than a VM may have.
    #[error("a VM has 1 to {max} vCPUs, not {wanted}")]
    Vcpus {
        /// Asked for.
        wanted: u32,
        /// The module's limit.
        max: u32,
    },
    /// More memory than a VM may have.
    #[error("a VM has at most {max_mib} MiB of memory, not {wanted_mib}")]
    Memory {
        /// Asked for, MiB.
        wanted_mib: u64,
        /// The module's limit, MiB.
        max_mib: u64,
    },
    /// The host has no memory left for this.
    #[error("the host has not enough memory to {0}")]
    NoMemory(&'static str),
    /// The user has as many VMs as the module allows.
    #[error("the module `blanket` allows this user no more VMs (its parameter max_vms)")]
    Quota,
    /// The module refused.
    #[error("the module `blanket` cannot {what}: {source}")]
    Refused {
        /// What it was asked for.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// KVM, instead of the module.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The module returned something that this program does not know.
    #[error("vCPU {vcpu} returned with the unknown exit reason {reason}")]
    UnknownExit {
        /// The vCPU.
        vcpu: u32,
        /// The number.
        reason: u32,
    },
}

fn refused(what: &'static str) -> Error {
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::ENOMEM) => Error::NoMemory(what),
        Some(libc::EDQUOT) => Error::Quota,
        _ => Error::Refused { what, source },
    }
}

/// The opened device.
#[derive(Debug)]
pub struct Device {
    file: File,
    info: Info,
}

impl Device {
    /// Opens `/dev/blanket` and compares versions.
    ///
    /// # Errors
    /// Which of not loaded, no permission, another version holds.
    pub fn open() -> Result<Self, Error> {
        Self::open_at(Path::new(PATH))
    }

    /// As [`Device::open`], for a device at another path.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_at(path: &Path) -> Result<Self, Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| {
                match source.raw_os_error() {
                    // ENXIO, ENODEV: a node without its driver.
                    Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Error::NoDevice(path.into()),
                    Some(libc::EACCES | libc::EPERM) => Error::Permission(path.into()),
                    _ => Error::Open {
                        path: path.into(),
                        source,
                    },
                }
            })?;
        let mut info = Info::default();
        // SAFETY: GET_INFO writes at most size_of::<Info>() bytes to its argument,
        // for which every bit pattern is valid; other drivers refuse the number.
        if unsafe { ioctl_with_mut_ref(&file, GET_INFO.into(), &mut info) } < 0 {
            let source = io::Error::last_os_error();
            return Err(Error::NotBlanket {
                path: path.into(),
                source,
            });
        }
        if info.api != API_VERSION {
            return Err(Error::Version {
                module: info.api,
                ours: API_VERSION,
            });
        }
        Ok(Self { file, info })
    }
}

impl Hypervisor for Device {
    fn name(&self) -> &'static str {
        "module"
    }

    fn info(&self) -> Info {
        self.info
    }

    fn profile(&self, only: Option<&Names>) -> Profile {
        let binds = self.info.features & features::CPUID_PROFILE != 0;
        Profile::of_this(self.info.xcr0_mask, binds, only)
    }

    fn create(
        &self,
        domain: &Domain,
        vcpus: u32,
        pool_limit: u64,
        isolation: Isolation,
        cpu: &Profile,
    ) -> Result<Arc<dyn Machine>, Error> {
        within_limits(&self.info, domain, vcpus)?;
        ask_for_branch_barriers();
        let address = domain
            .memory
            .get_host_address(GuestAddress(0))
            .map_err(|e| Error::Refused {
                what: "find the VM's memory",
                source: io::Error::other(e),
            })?;
        let request = CreateVm {
            user_addr: address as u64,
            nr_frames: domain.frames,
            pool_limit: match pool_limit {
                0 => domain.pool_limit(),
                limit => limit,
            },
            nr_vcpus: vcpus,
            flags: match isolation {
                Isolation::Auto => 0,
                Isolation::On => create::ISOLATE,
                Isolation::Off => create::SHARE,
            },
            boot: domain.boot,
            xcr0_mask: cpu.xcr0_mask,
            cpuid_hidden: cpu.hidden.0,
        };
        let fd = loop {
            // SAFETY: CREATE_VM reads size_of::<CreateVm>() bytes of its argument. The
            // memory that it names is kept mapped by `memory` below; the module itself
            // tolerates that it goes away.
            let fd = unsafe { ioctl_with_ref(&self.file, CREATE_VM.into(), &request) };
            // A signal may come while the kernel takes its locks.
            let again = io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
            match fd {
                0.. => break fd,
                _ if again => {}
                _ => return Err(refused("create a VM")),
            }
        };
        // SAFETY: the module returned a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Arc::new(DeviceVm {
            fd,
            vcpus,
            rings: Mutex::default(),
            _memory: Arc::clone(&domain.memory),
        }))
    }
}

/// Has the host's kernel set a barrier of branch predictors whenever it changes from
/// this thread to a program's or back, also for the threads that this one starts. What
/// a guest trains is its VMM's, for the kernel.
///
/// `Documentation/userspace-api/spec_ctrl.rst` and `include/uapi/linux/prctl.h`; the
/// `libc` crate does not have these.
fn ask_for_branch_barriers() {
    const PR_SET_SPECULATION_CTRL: libc::c_int = 53;
    const PR_SPEC_INDIRECT_BRANCH: libc::c_ulong = 1;
    const PR_SPEC_DISABLE: libc::c_ulong = 1 << 2;
    let none: libc::c_ulong = 0;
    // A host that refuses has no such barrier, or its administrator has decided.
    // SAFETY: the call takes numbers.
    let _ = unsafe {
        libc::prctl(
            PR_SET_SPECULATION_CTRL,
            PR_SPEC_INDIRECT_BRANCH,
            PR_SPEC_DISABLE,
            none,
            none,
        )
    };
}

struct DeviceVm {
    // Before the memory: fields are dropped in order.
    fd: OwnedFd,
    vcpus: u32,
    /// The vCPUs' traces, mapped once one was wanted.
    rings: Mutex<Vec<SharedPage<Ring>>>,
    _memory: Arc<GuestMemory>,
}

impl Machine for DeviceVm {
    fn vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Error> {
        // SAFETY: CREATE_VCPU takes a number.
        let fd = unsafe { ioctl_with_val(&self.fd, CREATE_VCPU.into(), id.into()) };
        if fd < 0 {
            return Err(refused("create a vCPU"));
        }
        // SAFETY: the module returned a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let page = Arc::new(RunPage::map(&fd)?);
        Ok(Box::new(DeviceVcpu { fd, id, page }))
    }

    fn raise(&self, port: u32) -> Result<(), Error> {
        // SAFETY: RAISE takes a number.
        if unsafe { ioctl_with_val(&self.fd, RAISE.into(), port.into()) } < 0 {
            return Err(refused("raise an event"));
        }
        Ok(())
    }

    fn stats(&self) -> Result<VmStats, Error> {
        let mut stats = VmStats {
            exits: [0; EXIT_REASONS],
            counters: [0; COUNTERS],
            frames: 0,
            pool: 0,
            guest_ns: 0,
            revocations: 0,
            revoked: 0,
        };
        // SAFETY: GET_STATS writes at most size_of::<VmStats>() bytes to its
        // argument, for which every bit pattern is valid.
        if unsafe { ioctl_with_mut_ref(&self.fd, GET_STATS.into(), &mut stats) } < 0 {
            return Err(refused("tell its counters"));
        }
        Ok(stats)
    }

    fn target(&self, frames: u64) -> Result<(), Error> {
        // SAFETY: TARGET takes a number.
        if unsafe { ioctl_with_val(&self.fd, TARGET.into(), frames) } < 0 {
            return Err(refused("set the VM's memory target"));
        }
        Ok(())
    }

    fn reclaim(&self) -> Result<(), Error> {
        // SAFETY: RECLAIM takes no argument.
        if unsafe { ioctl(&self.fd, RECLAIM.into()) } < 0 {
            return Err(refused("ask the core for shadow memory"));
        }
        Ok(())
    }

    fn pause(&self, what: u32) -> Result<(), Error> {
        // SAFETY: PAUSE takes a number.
        if unsafe { ioctl_with_val(&self.fd, PAUSE.into(), what.into()) } < 0 {
            return Err(refused("make the VM stand still"));
        }
        Ok(())
    }

    fn system_time(&self) -> Result<u64, Error> {
        // What the module's `ktime_get_ns` is to programs.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let part = |n: i64| u64::try_from(n).unwrap_or(0);
        Ok(part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec))
    }

    fn audit(&self) -> Result<Audit, Error> {
        let mut audit = Audit::default();
        // SAFETY: AUDIT writes at most size_of::<Audit>() bytes to its argument, for
        // which every bit pattern is valid.
        if unsafe { ioctl_with_mut_ref(&self.fd, AUDIT.into(), &mut audit) } < 0 {
            return Err(refused("walk its page tables"));
        }
        Ok(audit)
    }

    fn trace(&self, on: bool) -> Result<(), Error> {
        // SAFETY: TRACE takes a number.
        if unsafe { ioctl_with_val(&self.fd, TRACE.into(), on.into()) } < 0 {
            return Err(refused("switch the trace"));
        }
        let mut rings = lock(&self.rings);
        while on && rings.len() < self.vcpus as usize {
            let at = rings.len() as u64 * TRACE_SIZE;
            let ring = SharedPage::map_at(&self.fd, at).map_err(|source| Error::Refused {
                what: "share a vCPU's trace",
                source,
            })?;
            rings.push(ring);
        }
        Ok(())
    }

    fn trace_records(&self) -> Result<Vec<Record>, Error> {
        let rings = lock(&self.rings);
        let of = |(id, ring): (u32, &SharedPage<Ring>)| {
            // SAFETY: the mapping lives as long as the lock is held, zero is a valid
            // ring, and all of it is atomic.
            let ring = unsafe { &*ring.as_ptr() };
            ring.read().map(|r| Record::of(id, &r)).collect::<Vec<_>>()
        };
        Ok((0u32..).zip(rings.iter()).flat_map(of).collect())
    }
}

/// The page that a vCPU shares with the module. Fields other than `immediate_exit`
/// are read only by the thread that runs the vCPU, after the module has written them;
/// `immediate_exit` is accessed atomically.
struct RunPage(SharedPage<Run>);

impl RunPage {
    fn map(fd: &OwnedFd) -> Result<Self, Error> {
        SharedPage::map(fd)
            .map(Self)
            .map_err(|source| Error::Refused {
                what: "share a vCPU's page",
                source,
            })
    }

    fn immediate_exit(&self) -> &AtomicU32 {
        // SAFETY: the field is an aligned u32 inside of the mapping, which lives as
        // long as `self`; nobody accesses it but through atomics.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
    }

    /// What the module wrote before it returned. The module does not write while
    /// its vCPU is not in RUN, so this is stable.
    fn exit(&self, vcpu: u32) -> Result<Exit, Error> {
        let run = self.0.as_ptr();
        // SAFETY: all reads are inside of the mapping; integers have no invalid
        // values. Volatile, because the writer is not this program.
        let (reason, [arg, second, ..], length) = unsafe {
            (
                (&raw const (*run).exit).read_volatile(),
                (&raw const (*run).args).read_volatile(),
                (&raw const (*run).data_len).read_volatile(),
            )
        };
        let text = || {
            let length = (length as usize).min(RUN_DATA);
            let mut data = vec![0; length];
            // SAFETY: `length` is at most the size of the field.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    (&raw const (*run).data).cast(),
                    data.as_mut_ptr(),
                    length,
                );
            }
            data
        };
        Ok(match reason {
            exit::SEND => Exit::Send(u32::try_from(arg).unwrap_or(u32::MAX)),
            exit::CONSOLE => Exit::Console(text()),
            exit::SHUTDOWN => Exit::Shutdown(arg),
            exit::BALLOON => Exit::Balloon {
                given_up: text(),
                frames: second,
            },
            exit::PAUSED => Exit::Paused(arg.cast_signed()),
            exit::CRASH => Exit::Crash(Crash {
                kind: arg.into(),
                report: String::from_utf8_lossy(&text()).into_owned(),
            }),
            reason => return Err(Error::UnknownExit { vcpu, reason }),
        })
    }
}

impl Kick for RunPage {
    fn stop(&self) {
        self.immediate_exit().store(1, Ordering::Release);
    }

    fn go(&self) {
        self.immediate_exit().store(0, Ordering::Release);
    }
}

struct DeviceVcpu {
    fd: OwnedFd,
    id: u32,
    page: Arc<RunPage>,
}

impl Vcpu for DeviceVcpu {
    fn run(&mut self) -> Result<Exit, Error> {
        // SAFETY: RUN takes no argument; it runs the guest, whose memory this
        // program accesses only as shared with a hostile writer.
        if unsafe { ioctl(&self.fd, RUN.into()) } < 0 {
            let source = io::Error::last_os_error();
            return match source.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) => Ok(Exit::Interrupted),
                Some(libc::EIO) => Ok(Exit::Dead),
                Some(libc::ENOMEM) => Err(Error::NoMemory("run a vCPU")),
                _ => Err(Error::Refused {
                    what: "run a vCPU",
                    source,
                }),
            };
        }
        self.page.exit(self.id)
    }

    fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.page) as Arc<dyn Kick>
    }
}

impl std::fmt::Debug for DeviceVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VM {}", self.fd.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_for_not_opening_is_told_apart() {
        assert!(matches!(
            Device::open_at(Path::new("/does/not/exist")),
            Err(Error::NoDevice(path)) if path == Path::new("/does/not/exist")
        ));
        assert!(matches!(
            Device::open_at(Path::new("/dev/null")),
            Err(Error::NotBlanket { .. })
        ));
        assert!(matches!(
            Device::open_at(Path::new("/")),
            Err(Error::Open { .. })
        ));
    }

    #[test]
    fn errors_name_versions_and_limits() {
        let text = Error::Version {
            module: 2,
            ours: API_VERSION,
        }
        .to_string();
        assert!(text.contains("version 2") && text.contains(&format!("version {API_VERSION}")));
        assert!(
            Error::Vcpus { wanted: 9, max: 8 }
                .to_string()
                .contains("1 to 8")
        );
    }
}
