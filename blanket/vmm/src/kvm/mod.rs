//! The second host adapter: the same core at CPL 0 of a KVM VM, for instances that
//! do have virtualization. No module of ours, no root where the user may open
//! `/dev/kvm`.
//!
//! The guest is what it is under the module: a Xen PV kernel at CPL 3. KVM sees a VM
//! with two memory slots, the guest's frames and the core's memory ([`space`]), and
//! a local APIC for each vCPU. What the core asks of its host it mostly answers
//! itself (`blanket/hal/src/kvm.rs`); the rest are exits through one port, served
//! in [`vcpu`].

mod audit;
mod cpuid;
mod image;
mod meltdown;
mod probe;
mod space;
mod stats;
mod vcpu;

use std::ffi::CStr;
use std::fs;
use std::io;
use std::sync::Arc;

use blanket_abi::PAGE_SIZE;
use blanket_abi::device::{API_VERSION, Audit, Info, VmStats, features};
use blanket_abi::kvm::{RAM_BASE, vector};
use blanket_abi::layout::{MAX_FRAMES, MAX_POOL, MAX_VCPUS};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap};

use crate::builder::{Domain, GuestMemory};
use crate::core_image::BUILD_ID;
use crate::cpu::{Names, Profile};
use crate::device;
use crate::hypervisor::{HostExits, Hypervisor, Isolation, Machine, Vcpu, within_limits};
use crate::trace::Record;
use cpuid::{Cpuid, quirks};
use image::Image;
use space::{Plan, Space};

pub use probe::probe;

/// Where KVM's device is.
pub const PATH: &CStr = c"/dev/kvm";
/// Set in the environment, KVM may run on shadow paging: to test our TLB discipline
/// against a software TLB that keeps what it may keep.
const ANY_PAGING: &str = "BLANKET_KVM_ANY_PAGING";

const RAM_SLOT: u32 = 0;
const CORE_SLOT: u32 = 1;

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no device.
    #[error(
        "/dev/kvm does not exist: this machine offers no virtualization, or its kvm module is not loaded"
    )]
    NoDevice,
    /// The device is there and not for this user.
    #[error("no permission to open /dev/kvm")]
    Permission,
    /// Another hypervisor has the CPU's virtualization.
    #[error("KVM is busy: another hypervisor on this machine uses the CPU's virtualization")]
    Busy,
    /// KVM lacks something.
    #[error("the KVM of this machine lacks {0}")]
    Lacks(&'static str),
    /// Guest-physical addresses are not translated by hardware.
    #[error("KVM works without nested paging here ({0})")]
    NoNestedPaging(String),
    /// Some other KVM.
    #[error("what answers at /dev/kvm is neither kvm_amd nor kvm_intel")]
    UnknownKind,
    /// A VM with our memory does not fit the CPU's addresses.
    #[error("the VM needs {needed} bits of physical addresses, the CPU gives {given}")]
    PhysicalBits {
        /// Bits needed.
        needed: u32,
        /// Bits that there are.
        given: u32,
    },
    /// This program has no core in it.
    #[error("this program was built without the core image: build it with `cargo xtask build`")]
    NoImage,
    /// The core in this program is of no use.
    #[error("the core image in this program is bad: {0}")]
    BadImage(&'static str),
    /// The host has no memory left for this.
    #[error("the host has not enough memory to {0}")]
    NoMemory(&'static str),
    /// The core's memory cannot be filled.
    #[error("the core's memory: {0}")]
    Memory(Box<dyn std::error::Error + Send + Sync>),
    /// The CPU's features cannot be given to a VM.
    #[error("KVM's CPUID: {0}")]
    Cpuid(&'static str),
    /// There is no such vCPU.
    #[error("the VM has no vCPU {0}")]
    NoVcpu(u32),
    /// There is no such event channel port.
    #[error("there is no event channel port {0}")]
    NoPort(u32),
    /// KVM refused.
    #[error("KVM cannot {what}: {source}")]
    Refused {
        /// What it was asked for.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// It is there, and a guest does not run in it.
    #[error("a test guest does not run in the KVM of this machine: {0}")]
    Broken(String),
}

impl Error {
    fn memory(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Memory(error.into())
    }
}

/// The command or step that mends it, if there is one.
#[must_use]
pub fn mend(error: &Error) -> Option<&'static str> {
    Some(match error {
        Error::Permission => "sudo usermod -aG kvm $USER, then log in again",
        Error::Busy => "end the other hypervisor (VirtualBox, VMware, ...)",
        Error::NoNestedPaging(_) => {
            "load kvm_amd with npt=1 or kvm_intel with ept=1, if the CPU has nested paging"
        }
        Error::NoMemory(_) => "end other programs, or use less memory",
        Error::NoImage | Error::BadImage(_) => "install the package, or: cargo xtask build",
        Error::PhysicalBits { .. } => "use less memory",
        _ => return None,
    })
}

/// Turns KVM's errno into an error that says what was asked for.
fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| match error.errno() {
        libc::ENOMEM => Error::NoMemory(what),
        libc::EBUSY => Error::Busy,
        errno => Error::Refused {
            what,
            source: io::Error::from_raw_os_error(errno),
        },
    }
}

/// KVM, opened and found fit.
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
    image: Image,
    cpuid: Cpuid,
    info: Info,
}

impl Kvm {
    /// Opens `/dev/kvm` and looks whether it has what the core needs. A guest may
    /// still not run in it: [`probe`] tries.
    ///
    /// # Errors
    /// What is missing.
    pub fn open() -> Result<Self, Error> {
        let kvm = kvm_ioctls::Kvm::new_with_path(PATH).map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => Error::NoDevice,
            libc::EACCES | libc::EPERM => Error::Permission,
            _ => refused("be opened")(error),
        })?;
        for (cap, name) in [
            (Cap::SplitIrqchip, "a split interrupt controller"),
            (Cap::X2ApicApi, "x2APIC"),
            (Cap::TscDeadlineTimer, "the TSC-deadline timer"),
            (Cap::ImmediateExit, "immediate exits"),
            (Cap::SignalMsi, "message-signalled interrupts"),
            (Cap::GetTscKhz, "the frequency of the TSC"),
            (Cap::MpState, "control of CPU states"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(Error::Lacks(name));
            }
        }
        if std::env::var_os(ANY_PAGING).is_none() {
            nested_paging()?;
        }
        let image = Image::built_in()?;
        let tsc_khz = tsc_khz(&kvm)?;
        let cpuid = Cpuid::of_host(&kvm, tsc_khz)?;
        let most = kvm.get_max_vcpus().min(kvm.get_max_vcpu_id());
        let xsave = if cpuid.xcr0_mask == 0 {
            0
        } else {
            features::XSAVE
        };
        let isolates = if meltdown::affects(&kvm)? {
            features::ISOLATES
        } else {
            0
        };
        let info = Info {
            api: API_VERSION,
            max_vcpus: u32::try_from(most).unwrap_or(MAX_VCPUS).min(MAX_VCPUS),
            max_frames: MAX_FRAMES,
            build_id: BUILD_ID,
            features: xsave | features::CPUID_PROFILE | isolates,
            tsc_khz,
            xcr0_mask: cpuid.xcr0_mask.into(),
        };
        Ok(Self {
            kvm,
            image,
            cpuid,
            info,
        })
    }

    /// What keeps the core from the guest's pages, beside its own care.
    #[must_use]
    pub fn protections(&self) -> String {
        let all = [
            (true, "NX"),
            (self.cpuid.smep, "SMEP"),
            (self.cpuid.smap, "SMAP"),
        ];
        let given: Vec<&str> = all
            .iter()
            .filter_map(|(has, name)| has.then_some(*name))
            .collect();
        given.join(", ")
    }

    fn create_vm(
        &self,
        domain: &Domain,
        vcpus: u32,
        pool_limit: u64,
        isolation: Isolation,
        cpu: &Profile,
    ) -> Result<Arc<KvmVm>, Error> {
        let cpuid = self.cpuid.given(cpu);
        let pool = match pool_limit {
            0 => domain.pool_limit(),
            limit => limit.min(MAX_POOL),
        };
        let space = Space::build(&Plan {
            image: &self.image,
            domain,
            vcpus,
            pool,
            xcr0_mask: cpuid.xcr0_mask,
            tsc_khz: self.info.tsc_khz,
            features: cpuid.features,
            quirks: quirks(),
            smap: cpuid.smap,
            isolate: match isolation {
                Isolation::On => true,
                Isolation::Off => false,
                Isolation::Auto => self.info.features & features::ISOLATES != 0,
            },
            hidden: cpu.hidden,
            cpuid: &cpuid.for_core(),
        })?;
        let (base, bytes, address) = space.slot();
        let needed = u64::BITS - (base + bytes).leading_zeros();
        if needed > cpuid.physical_bits {
            return Err(Error::PhysicalBits {
                needed,
                given: cpuid.physical_bits,
            });
        }
        let fd = create_vm(&self.kvm)?;
        // User space has no interrupt controllers to route from.
        enable(
            &fd,
            KVM_CAP_SPLIT_IRQCHIP,
            0,
            "split its interrupt controller",
        )?;
        let api = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(&fd, KVM_CAP_X2APIC_API, api.into(), "use x2APIC ids")?;
        let ram = domain
            .memory
            .get_host_address(GuestAddress(0))
            .map_err(Error::memory)?;
        for (slot, guest, size, host) in [
            (RAM_SLOT, RAM_BASE, domain.frames * PAGE_SIZE, ram as u64),
            (CORE_SLOT, base, bytes, address),
        ] {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: guest,
                memory_size: size,
                userspace_addr: host,
            };
            // SAFETY: both mappings are owned by the VM made below and live as long
            // as its descriptor; this program shares them with a hostile writer.
            unsafe { fd.set_user_memory_region(region) }.map_err(refused("map memory"))?;
        }
        Ok(Arc::new(KvmVm {
            fd,
            space,
            memory: Arc::clone(&domain.memory),
            image: self.image,
            cpuid,
            stats: stats::Stats::default(),
        }))
    }
}

fn enable(fd: &VmFd, cap: u32, arg: u64, what: &'static str) -> Result<(), Error> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = arg;
    fd.enable_cap(&request).map_err(refused(what))
}

/// Checks a core image; the bytes of it that are loaded.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn parse_image(bytes: &'static [u8]) -> Result<u64, Error> {
    Image::parse(bytes).map(|image| image.header.file_end)
}

/// The kernel gives up its locks for whatever is to be done first: a signal, or what an
/// `io_uring` of this thread has finished (`mm_take_all_locks`, `mm/mmap.c`).
fn create_vm(kvm: &kvm_ioctls::Kvm) -> Result<VmFd, Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            created => return created.map_err(refused("create a VM")),
        }
    }
}

/// A VM's TSC runs at the host's frequency.
fn tsc_khz(kvm: &kvm_ioctls::Kvm) -> Result<u64, Error> {
    let vm = create_vm(kvm)?;
    let vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
    let khz = vcpu
        .get_tsc_khz()
        .map_err(refused("tell the frequency of the TSC"))?;
    Ok(khz.into())
}

/// Without nested paging KVM shadows the core's shadow tables: slow, and what the
/// kernel's hypervisor does then was never tried in earnest.
fn nested_paging() -> Result<(), Error> {
    let kinds = [("kvm_amd", "npt"), ("kvm_intel", "ept")];
    for (module, parameter) in kinds {
        let path = format!("/sys/module/{module}/parameters/{parameter}");
        if let Ok(value) = fs::read_to_string(&path) {
            return match value.trim() {
                "Y" | "1" => Ok(()),
                _ => Err(Error::NoNestedPaging(format!("{path} is {}", value.trim()))),
            };
        }
    }
    Err(Error::UnknownKind)
}

impl Hypervisor for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn info(&self) -> Info {
        self.info
    }

    fn profile(&self, only: Option<&Names>) -> Profile {
        self.cpuid.profile(only)
    }

    fn create(
        &self,
        domain: &Domain,
        vcpus: u32,
        pool_limit: u64,
        isolation: Isolation,
        cpu: &Profile,
    ) -> Result<Arc<dyn Machine>, device::Error> {
        within_limits(&self.info, domain, vcpus)?;
        let vm = self.create_vm(domain, vcpus, pool_limit, isolation, cpu)?;
        Ok(Arc::new(Handle(vm)))
    }
}

/// A VM.
struct KvmVm {
    // Before the memory: fields are dropped in order.
    fd: VmFd,
    space: Space,
    memory: Arc<GuestMemory>,
    image: Image,
    cpuid: Cpuid,
    stats: stats::Stats,
}

impl KvmVm {
    /// Interrupts a vCPU so that it looks at its pending word.
    fn interrupt(&self, vcpu: u32) -> Result<(), Error> {
        // Fixed delivery to a physical destination (Intel SDM vol. 3, 11.11).
        let message = kvm_msi {
            address_lo: 0xfee0_0000 | vcpu << 12,
            data: vector::KICK.into(),
            ..Default::default()
        };
        self.fd
            .signal_msi(message)
            .map(drop)
            .map_err(refused("interrupt a vCPU"))
    }
}

/// What the rest of the program holds of a VM.
struct Handle(Arc<KvmVm>);

/// Pages of a region that are in memory.
fn resident(region: &GuestRegionMmap) -> u64 {
    let length = region.len();
    let pages = length.div_ceil(PAGE_SIZE);
    let (Ok(bytes), Ok(count)) = (usize::try_from(length), usize::try_from(pages)) else {
        return 0;
    };
    let mut states = vec![0u8; count];
    // SAFETY: the region is mapped for as long as it can be named, and mincore(2)
    // writes one byte for each of its pages.
    let done = unsafe { libc::mincore(region.as_ptr().cast(), bytes, states.as_mut_ptr()) };
    let there = states.iter().filter(|state| *state & 1 != 0).count();
    if done == 0 { there as u64 } else { 0 }
}

impl Machine for Handle {
    fn vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, device::Error> {
        Ok(Box::new(vcpu::KvmVcpu::new(Arc::clone(&self.0), id)?))
    }

    fn raise(&self, port: u32) -> Result<(), device::Error> {
        if let Some(vcpu) = self.0.space.raise(port)? {
            self.0.interrupt(vcpu)?;
        }
        Ok(())
    }

    fn stats(&self) -> Result<VmStats, device::Error> {
        let (exits, counters) = self.0.space.counters()?;
        let frames = self.0.memory.iter().map(resident);
        Ok(VmStats {
            exits,
            counters,
            frames: frames.sum(),
            pool: self.0.space.pool_pages()?,
            guest_ns: 0,
            revocations: 0,
            revoked: 0,
        })
    }

    fn target(&self, frames: u64) -> Result<(), device::Error> {
        Ok(self.0.space.set_target(frames)?)
    }

    fn reclaim(&self) -> Result<(), device::Error> {
        if self.0.space.reclaim()? {
            self.0.interrupt(0)?;
        }
        Ok(())
    }

    fn pause(&self, what: u32) -> Result<(), device::Error> {
        for vcpu in self.0.space.pause(what)? {
            // As for `trace`.
            if let Err(error) = self.0.interrupt(vcpu) {
                tracing::debug!(vcpu, %error, "not interrupted");
            }
        }
        Ok(())
    }

    fn system_time(&self) -> Result<u64, device::Error> {
        let clock = self.0.fd.get_clock().map_err(refused("tell its clock"))?;
        Ok(clock.clock)
    }

    fn audit(&self) -> Result<Audit, device::Error> {
        Ok(self.0.space.audit()?)
    }

    fn trace(&self, on: bool) -> Result<(), device::Error> {
        for vcpu in self.0.space.trace(on)? {
            // KVM refuses for a vCPU that is not made yet, which looks when it starts.
            if let Err(error) = self.0.interrupt(vcpu) {
                tracing::debug!(vcpu, %error, "not interrupted");
            }
        }
        Ok(())
    }

    fn trace_records(&self) -> Result<Vec<Record>, device::Error> {
        Ok(self.0.space.trace_records()?)
    }

    fn host_exits(&self) -> Vec<HostExits> {
        self.0.stats.read()
    }
}
