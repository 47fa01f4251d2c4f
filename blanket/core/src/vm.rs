//! The state that a VM's vCPUs share.

use crate::evtchn::Ports;
use crate::grant::GrantTable;
use crate::mmu::{Epochs, Mmu};
use crate::vcpu::{State, Vcpu};
use blanket_abi::device::Boot;
use blanket_abi::layout::MAX_VCPUS;
use core::sync::atomic::{AtomicBool, AtomicU64};
use spin::Mutex;

/// A VM. Lock order: a vCPU's own state, then `mmu`, then nothing; `ports_lock`
/// and `grants` are taken alone. No lock is held while the world is left.
#[derive(Debug)]
pub struct Vm {
    /// What the domain builder made.
    pub boot: Boot,
    /// Frames of the VM, RAM and above.
    pub nr_frames: u64,
    /// vCPUs.
    pub nr_vcpus: u32,
    /// The shadow MMU.
    pub mmu: Mutex<Mmu>,
    /// Frames of RAM that the guest has not got, as [`Mmu::out`]: to be read without the
    /// lock.
    pub out: AtomicU64,
    /// The vCPU that took `mmu` last.
    #[cfg(feature = "lock-stats")]
    pub mmu_holder: core::sync::atomic::AtomicU32,
    /// Who has reloaded CR3 since when.
    pub epochs: Epochs,
    /// Event channels; not in here, since they would be half of it and the core's stack
    /// is small.
    pub ports: &'static Ports,
    /// Serialises changes of `ports`.
    pub ports_lock: Mutex<()>,
    /// Grant table.
    pub grants: Mutex<GrantTable>,
    /// vCPU states.
    pub states: [State; MAX_VCPUS as usize],
    /// Private states, each locked by its own vCPU while it is up.
    pub vcpus: &'static [Mutex<Vcpu>],
    /// Bit per vCPU that waits in a poll.
    pub polling: AtomicU64,
    /// Bit per vCPU that has an NMI to take.
    pub nmi: AtomicU64,
    /// Where each vCPU's vcpu_info is: `gfn << 12 | offset`, 0 = nowhere.
    pub infos: [AtomicU64; MAX_VCPUS as usize],
    /// Run-state areas that a vCPU registered for another one, which takes them
    /// when it comes up: where the area begins, and the frame of its last word plus
    /// one (0 = nothing there).
    pub runstates: [[AtomicU64; 2]; MAX_VCPUS as usize],
    /// Frames of each vCPU's areas (time; run-state, its first word and its last) plus
    /// one, 0 = none: the guest cannot give them up.
    pub areas: [[AtomicU64; 3]; MAX_VCPUS as usize],
    /// Bit per vCPU whose vcpu_info the guest has moved.
    pub infos_moved: AtomicU64,
    /// Shutdown reason given in advance (SCHEDOP_shutdown_code), plus one.
    pub shutdown_code: AtomicU64,
    /// Run-state updates are marked (vm_assist).
    pub runstate_flag: AtomicBool,
    /// What is added to the host's system time to get the guest's, ns, modulo 2^64.
    /// Set before the first vCPU runs.
    pub time_offset: AtomicU64,
    /// Whether it is noted which frames are written, as [`Mmu`] has it: to be read without
    /// the lock. Changes only while all vCPUs stand still.
    pub logging: AtomicBool,
    /// Bit per vCPU that begins with a state that another core has written down.
    pub resumed: AtomicU64,
}

impl Vm {
    /// A VM whose vCPUs have not started. `vcpus` has an entry for each; no port is bound.
    #[must_use]
    pub fn new(
        boot: Boot,
        nr_frames: u64,
        nr_vcpus: u32,
        mmu: Mmu,
        ports: &'static Ports,
        vcpus: &'static [Mutex<Vcpu>],
    ) -> Self {
        ports.set_vcpus(nr_vcpus);
        let mmu = match boot.start_frames {
            0 => mmu,
            start => mmu.without(start, boot.ram_frames),
        };
        let out = mmu.out();
        Self {
            boot,
            nr_frames,
            nr_vcpus,
            mmu: Mutex::new(mmu),
            out: AtomicU64::new(out),
            #[cfg(feature = "lock-stats")]
            mmu_holder: core::sync::atomic::AtomicU32::new(0),
            epochs: Epochs::new(),
            ports,
            ports_lock: Mutex::new(()),
            grants: Mutex::new(GrantTable::new(boot.grant_base, boot.grant_frames)),
            states: [const { State::new() }; MAX_VCPUS as usize],
            vcpus,
            polling: AtomicU64::new(0),
            nmi: AtomicU64::new(0),
            infos: [const { AtomicU64::new(0) }; MAX_VCPUS as usize],
            runstates: [const { [AtomicU64::new(0), AtomicU64::new(0)] }; MAX_VCPUS as usize],
            areas: [const { [const { AtomicU64::new(0) }; 3] }; MAX_VCPUS as usize],
            infos_moved: AtomicU64::new(0),
            shutdown_code: AtomicU64::new(0),
            runstate_flag: AtomicBool::new(false),
            time_offset: AtomicU64::new(0),
            logging: AtomicBool::new(false),
            resumed: AtomicU64::new(0),
        }
    }
}
