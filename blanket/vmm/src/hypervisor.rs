//! What a hypervisor must give a VM: the consumer's side of the device, so that
//! the VM logic runs against the module, another host adapter, or a test double.

use std::sync::Arc;

use blanket_abi::PAGE_SIZE;
use blanket_abi::device::{Audit, Info, VmStats, crash};

use crate::builder::Domain;
use crate::cpu::{Names, Profile};
use crate::device::Error;
use crate::trace::Record;

/// Whether the guest's roots hold the entry area only, and the core runs on a root of
/// its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// On CPUs with Meltdown.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Makes VMs.
pub trait Hypervisor: Send + Sync {
    /// Which it is, in a word: `module` or `kvm`.
    fn name(&self) -> &'static str;

    /// What it can do.
    fn info(&self) -> Info;

    /// What its VMs find in the CPU: all that guests may have, or, of that, `only` these features.
    fn profile(&self, only: Option<&Names>) -> Profile;

    /// Makes a VM of a built domain, with a CPU that it can give. It keeps the domain's memory mapped for as
    /// long as it lives.
    ///
    /// # Errors
    /// What the host refused, with the cause.
    fn create(
        &self,
        domain: &Domain,
        vcpus: u32,
        pool_limit: u64,
        isolation: Isolation,
        cpu: &Profile,
    ) -> Result<Arc<dyn Machine>, Error>;
}

/// A VM.
pub trait Machine: Send + Sync {
    /// Makes vCPU `id`; each once.
    ///
    /// # Errors
    /// What the host refused.
    fn vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Error>;

    /// Notifies the guest on an event channel port.
    ///
    /// # Errors
    /// Only for a port that cannot be.
    fn raise(&self, port: u32) -> Result<(), Error>;

    /// Counters of the VM.
    ///
    /// # Errors
    /// What the host refused.
    fn stats(&self) -> Result<VmStats, Error>;

    /// Sets how many frames of RAM the guest may have at most: of what it has given
    /// up it gets no more back. At least one.
    ///
    /// # Errors
    /// What the host refused.
    fn target(&self, frames: u64) -> Result<(), Error>;

    /// Asks the core for the shadow pages that nothing uses; they go to the host soon.
    ///
    /// # Errors
    /// What the host refused.
    fn reclaim(&self) -> Result<(), Error>;

    /// Sets what [`Exit::Paused`] is about: one of `blanket_abi::device::pause`. All
    /// vCPUs are made to look at it.
    ///
    /// # Errors
    /// What the host refused.
    fn pause(&self, what: u32) -> Result<(), Error>;

    /// The host's system time as its cores have it, ns: what a guest's is the sum of,
    /// with `blanket_abi::state::VmState::time_offset`.
    ///
    /// # Errors
    /// What the host refused.
    fn system_time(&self) -> Result<u64, Error>;

    /// Walks all page tables that a CPU may use for the VM. No vCPU may be in
    /// [`Vcpu::run`], and each must be [`Vcpu::at_rest`].
    ///
    /// # Errors
    /// What the host refused; a rule that is broken is no error.
    fn audit(&self) -> Result<Audit, Error>;

    /// Switches the trace on or off.
    ///
    /// # Errors
    /// The host has no memory for it.
    fn trace(&self, on: bool) -> Result<(), Error>;

    /// The last records of all vCPUs; none if the trace was never on.
    ///
    /// # Errors
    /// What the host refused.
    fn trace_records(&self) -> Result<Vec<Record>, Error>;

    /// What the hypervisor below counts besides; empty where it counts nothing.
    fn host_exits(&self) -> Vec<HostExits> {
        Vec::new()
    }
}

/// A counter of the hypervisor below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostExits {
    /// Its own name for it.
    pub name: String,
    /// Sum over the VM's vCPUs.
    pub count: u64,
}

/// Whether a hypervisor can run so large a VM.
///
/// # Errors
/// Which limit it is over.
pub fn within_limits(info: &Info, domain: &Domain, vcpus: u32) -> Result<(), Error> {
    if vcpus == 0 || vcpus > info.max_vcpus {
        return Err(Error::Vcpus {
            wanted: vcpus,
            max: info.max_vcpus,
        });
    }
    if domain.frames > info.max_frames {
        let mib = |frames: u64| (frames * PAGE_SIZE) >> 20;
        return Err(Error::Memory {
            wanted_mib: mib(domain.boot.most()),
            max_mib: mib(info.max_frames),
        });
    }
    Ok(())
}

/// A virtual CPU, used by one thread.
pub trait Vcpu: Send {
    /// Runs the guest until something needs the VMM.
    ///
    /// # Errors
    /// What the host refused; an exit that is not known.
    fn run(&mut self) -> Result<Exit, Error>;

    /// Whether the core is in the middle of nothing, now that the vCPU does not run.
    fn at_rest(&self) -> bool {
        true
    }

    /// The way to make [`Vcpu::run`] return from another thread.
    fn kick(&self) -> Arc<dyn Kick>;

    /// The way to find out whether its core still answers; `None` where the
    /// hypervisor itself ends a core that does not.
    fn pulse(&self) -> Option<Arc<dyn Pulse>> {
        None
    }
}

/// Questions to the core of a vCPU that uses its CPU.
pub trait Pulse: Send + Sync {
    /// Asks for a sign of life: the core notices while its guest runs, and before.
    fn ask(&self);
    /// Whether the last question was answered.
    fn answered(&self) -> bool;
    /// The run that a signal interrupts next ends with the report of a core that does
    /// not answer.
    fn give_up(&self);
}

/// Makes a vCPU leave the guest.
pub trait Kick: Send + Sync {
    /// Makes the current or the next run return [`Exit::Interrupted`], and all
    /// after it. A thread that waits in the kernel needs a signal besides.
    fn stop(&self);

    /// Takes it back.
    fn go(&self);
}

/// Why a vCPU returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest notified a backend's port.
    Send(u32),
    /// The guest wrote with `console_io`.
    Console(Vec<u8>),
    /// The guest has given up the frames of a list, or has got some back.
    Balloon {
        /// Numbers of 32 bits, as the core writes them.
        given_up: Vec<u8>,
        /// Frames of RAM that it has now.
        frames: u64,
    },
    /// The guest ended itself; the reason is one of `SHUTDOWN_*`.
    Shutdown(u64),
    /// The guest cannot go on.
    Crash(Crash),
    /// The vCPU stands still and has written its state down, or a negative errno says
    /// why it could not.
    Paused(i64),
    /// A signal, or [`Kick::stop`].
    Interrupted,
    /// The VM is dead: another vCPU's run has returned, or will return, with the reason.
    Dead,
}

/// Why a guest was ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Whose fault it is.
    pub kind: CrashKind,
    /// The core's report.
    pub report: String,
}

/// Whose fault a crash is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashKind {
    /// The guest did something that has no defined outcome.
    Guest,
    /// The core found its own state wrong.
    Core,
    /// The host could not give memory.
    Memory,
    /// A kind that this version does not know.
    Other(u64),
}

impl From<u64> for CrashKind {
    fn from(number: u64) -> Self {
        match number {
            crash::GUEST => Self::Guest,
            crash::CORE => Self::Core,
            crash::MEMORY => Self::Memory,
            other => Self::Other(other),
        }
    }
}
