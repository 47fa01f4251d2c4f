//! A machine of ordinary memory under the core, and a small PV guest in it.
//!
//! Guest frames have fake host frame numbers that change each time the host takes
//! one away and gives another, and guest accesses walk the *shadow* tables from
//! the loaded root as a CPU does. So a leaf that survives its frame, an entry that
//! points at nothing, or a right too many is seen at the first access.
#![allow(dead_code, reason = "each test program uses a part")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

pub mod calls;
pub mod fuzz;
pub mod guest;
mod hal;
pub mod still;
mod thief;
pub mod trap;
mod world;

#[allow(unused_imports, reason = "not every test program looks")]
pub use world::{Reached, World};

use blanket_abi::device::{
    Boot, COUNTERS, Dtr, EXIT_REASONS, RUN_DATA, Switch, VmPage, crash, host, pending,
};
use blanket_abi::layout::REVOKED_BLOCK;
use blanket_abi::trace::Ring;
use blanket_abi::{Gfn, Va};
use blanket_core::machine::{FpuImage, Words};
use blanket_core::mmu::Mmu;
use blanket_core::pte;
use blanket_core::vcpu::NEVER;
use blanket_core::vm::Vm;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI8, AtomicU8, AtomicU16, AtomicU32, AtomicU64};

/// Host frame numbers of guest frames begin here; 4096 generations for each gfn.
const GUEST_HFN: u64 = 1 << 24;
/// Host frame numbers of pool pages.
const POOL_HFN: u64 = 1 << 37;
/// Host frame numbers of the hypervisor's own tables.
const HOLE_HFN: u64 = 1 << 38;
/// Bits that the host sets in leaves beside the frame number (here: none).
const HOST_BITS: u64 = 0;

/// Guest virtual addresses that work whatever the page tables say, for arguments
/// of hypercalls and for stacks. The tests of page tables do not touch them.
pub const ARGS: u64 = 0x0000_7000_0000_0000;
/// Bytes at [`ARGS`].
pub const ARGS_SIZE: u64 = 1 << 20;

/// A way out of the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// vCPU.
    pub vcpu: u32,
    /// One of `blanket_abi::device::exit`.
    pub reason: u32,
    /// Arguments.
    pub args: [u64; 4],
}

/// How the core ended the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// One of `blanket_abi::device::crash`.
    pub why: u64,
    /// Report.
    pub text: String,
}

struct Frame {
    words: Box<Words>,
    /// Odd while the host has given the frame.
    generation: AtomicU16,
}

/// State of a fake CPU that tests look at.
#[derive(Default)]
pub struct FakeCpu {
    pub cr3: Cell<u64>,
    pub loads: Cell<u64>,
    pub invlpgs: RefCell<Vec<u64>>,
    pub fs: Cell<u64>,
    pub gs: Cell<u64>,
    pub kgs: Cell<u64>,
    pub user_gs_sel: Cell<u16>,
    pub selectors: Cell<[u16; 4]>,
    pub dr: RefCell<[u64; 8]>,
    pub cr2: Cell<u64>,
    pub dr6: Cell<u64>,
    pub gdt: RefCell<BTreeMap<u32, u64>>,
    pub ldt: RefCell<BTreeMap<u32, u64>>,
    pub ldt_entries: Cell<u32>,
    pub xcr0: Cell<u64>,
    pub tsc_aux: Cell<u64>,
    pub fpu: RefCell<Option<FpuImage>>,
    pub fpu_refused: Cell<bool>,
    /// The trace.
    pub trace: Box<Ring>,
    /// Pool pages that were walked since the last load of CR3, and what each was
    /// bound to: what paging-structure caches may hold.
    cached: RefCell<BTreeMap<u32, Option<(u32, u8)>>>,
    /// Frames that the TLB may hold a writable translation of, by page.
    writable: RefCell<BTreeMap<u64, u64>>,
}

impl FakeCpu {
    /// What a load of CR3 does to TLB and paging-structure caches.
    fn flush(&self) {
        self.cached.borrow_mut().clear();
        self.writable.borrow_mut().clear();
    }
}

type Hook = Box<dyn FnMut(&FakeMachine, Exit) -> Option<i64>>;

/// Memory, CPUs and host.
pub struct FakeMachine {
    frames: Vec<Frame>,
    pool: Vec<Box<Words>>,
    names: Vec<[AtomicU32; 512]>,
    revoked: Vec<[AtomicU64; 64]>,
    pub page: Box<VmPage>,
    switches: Vec<Switch>,
    pub cpus: Vec<FakeCpu>,
    current: Cell<usize>,
    pub tsc: Cell<u64>,
    /// Not 0: state of a generator of the frames that the host takes back at exits.
    pub thief: Cell<u64>,
    /// Pool pages that the host has taken.
    pub pool_taken: RefCell<BTreeSet<u32>>,
    /// Frames that the host will not give.
    pub refused: RefCell<BTreeSet<u64>>,
    pub log: RefCell<Vec<Exit>>,
    /// Text of `set_data` calls.
    pub texts: RefCell<Vec<Vec<u8>>>,
    /// Why the core ended the VM.
    pub crashed: RefCell<Option<Crash>>,
    /// Steps since the world was left, and the most that there were.
    pub work: Cell<(u64, u64)>,
    /// Asked at every exit first.
    pub hook: RefCell<Option<Hook>>,
    args: RefCell<Vec<u8>>,
    la57: bool,
    vm: OnceCell<&'static Vm>,
}

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Frames of RAM; shared info, two grant frames and those for the state come on top.
    pub ram: u64,
    /// Frames of it that the guest has at the start; 0 = all.
    pub start: u64,
    /// Frames of it that the guest may have at once; 0 = all.
    pub most: u64,
    /// Most pool pages.
    pub pool: u32,
    pub vcpus: u32,
    pub la57: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            ram: 128,
            start: 0,
            most: 0,
            pool: 128,
            vcpus: 1,
            la57: false,
        }
    }
}

/// Grant frames of the fake VM.
pub const GRANT_FRAMES: u64 = 2;

impl Setup {
    /// Frames of the VM.
    pub fn frames(&self) -> u64 {
        self.state_base() + self.state_frames()
    }
    /// First frame for the VM's state.
    pub fn state_base(&self) -> u64 {
        self.ram + 1 + GRANT_FRAMES
    }
    /// Frames for it.
    pub fn state_frames(&self) -> u64 {
        blanket_abi::state::frames(self.vcpus, self.ram)
    }
    /// gfn of shared info.
    pub fn shared_info(&self) -> u64 {
        self.ram
    }
}

fn zeroed() -> Box<Words> {
    Box::new([const { AtomicU64::new(0) }; 512])
}

/// Level-4 entries of the hypervisor's slots, as the module might make them: the
/// M2P for everyone, three more for the supervisor, the rest empty.
pub fn hole() -> [u64; 16] {
    let mut hole = [0; 16];
    for (i, entry) in hole.iter_mut().enumerate().take(4) {
        *entry =
            (HOLE_HFN + i as u64) << 12 | pte::P | pte::A | if i == 0 { pte::U } else { pte::RW };
    }
    hole
}

fn switch(id: u32) -> Switch {
    Switch {
        core_rsp: 0,
        host_rsp: 0,
        trans_cr3: 0,
        host_cr3: 0,
        host_cr4: 0,
        core_cr4: 0,
        host_fs_base: 0,
        host_gs_base: 0,
        host_kgs_base: 0,
        host_tr: 0,
        host_ldt: 0,
        host_ds: 0,
        host_es: 0,
        host_fs: 0,
        host_gs: 0,
        host_ss: 0,
        host_cs: 0,
        core_gdtr: Dtr::default(),
        core_idtr: Dtr::default(),
        trans_gdtr: Dtr::default(),
        host_gdtr: Dtr::default(),
        host_idtr: Dtr::default(),
        exit: 0,
        pending: AtomicU32::new(0),
        args: [0; 4],
        ret: 0,
        deadline: AtomicU64::new(NEVER),
        armed: AtomicU64::new(NEVER),
        syscall_msrs: [0; 4],
        guest_xcr0: 0,
        guest_tsc_aux: 0,
        guest_dr7: 0,
        vcpu_id: id,
        watch: AtomicU32::new(0),
        exit_entry: 0,
        host_self: 0,
        pv_address: 0,
        in_place: [const { AtomicU64::new(0) }; EXIT_REASONS],
        counters: [const { AtomicU64::new(0) }; COUNTERS],
        data: [0; RUN_DATA],
    }
}

impl FakeMachine {
    pub fn new(setup: Setup, boot: Boot) -> Self {
        let frames = (0..setup.frames())
            .map(|_| Frame {
                words: zeroed(),
                generation: AtomicU16::new(0),
            })
            .collect();
        let page = Box::new(VmPage {
            boot,
            nr_frames: setup.frames(),
            nr_vcpus: setup.vcpus,
            la57: u32::from(setup.la57),
            pool_pages: AtomicU64::new(1),
            time_version: AtomicU32::new(2),
            // One tick is one nanosecond.
            tsc_shift: AtomicI8::new(1),
            time_flags: AtomicU8::new(1),
            pad: 0,
            tsc_mul: AtomicU32::new(1 << 31),
            quirks: 0,
            tsc_timestamp: AtomicU64::new(0),
            system_time: AtomicU64::new(0),
            wall_sec: AtomicU64::new(1_700_000_000),
            wall_nsec: AtomicU32::new(123_456_789),
            xcr0_mask: 7,
            tsc_khz: 1_000_000,
            raised: [const { AtomicU64::new(0) }; 64],
            raised_virqs: AtomicU64::new(0),
            port_vcpu: [const { AtomicU8::new(0) }; 2048],
            pool_limit: u64::from(setup.pool),
            hole: hole(),
            host: host::MODULE,
            kvm_features: 0,
            cpuid_entries: 0,
            core_cr3: 0,
            cpuid_faults: 0,
            revocations: AtomicU64::new(0),
            revoked: [const { AtomicU64::new(0) }; 64],
            trace: AtomicU32::new(0),
            reclaim: AtomicU32::new(0),
            target: AtomicU64::new(0),
            pool_gone: AtomicU64::new(0),
            pause: AtomicU32::new(0),
            pad2: 0,
            cpuid_hidden: [0; 16],
        });
        Self {
            frames,
            pool: (0..setup.pool).map(|_| zeroed()).collect(),
            names: (0..setup.pool)
                .map(|_| [const { AtomicU32::new(0) }; 512])
                .collect(),
            revoked: (0..setup.frames().div_ceil(REVOKED_BLOCK))
                .map(|_| [const { AtomicU64::new(0) }; 64])
                .collect(),
            page,
            switches: (0..setup.vcpus).map(switch).collect(),
            cpus: (0..setup.vcpus).map(|_| FakeCpu::default()).collect(),
            current: Cell::new(0),
            tsc: Cell::new(1_000),
            thief: Cell::new(0),
            pool_taken: RefCell::default(),
            refused: RefCell::default(),
            log: RefCell::default(),
            texts: RefCell::default(),
            crashed: RefCell::default(),
            work: Cell::default(),
            hook: RefCell::default(),
            args: RefCell::new(vec![0; ARGS_SIZE as usize]),
            la57: setup.la57,
            vm: OnceCell::new(),
        }
    }

    /// The CPU that runs.
    pub fn cpu(&self) -> &FakeCpu {
        &self.cpus[self.current.get()]
    }

    /// A frame's words, whether the host has given it or not: what the guest's
    /// memory holds. The tests' own view.
    pub fn words(&self, gfn: u64) -> &Words {
        &self.frames[gfn as usize].words
    }

    /// Whether the host has given the frame.
    pub fn present(&self, gfn: u64) -> bool {
        self.frames[gfn as usize].generation.load(SeqCst) & 1 != 0
    }

    /// The host gives a frame.
    pub fn give(&self, gfn: u64) {
        if !self.present(gfn) {
            self.frames[gfn as usize].generation.fetch_add(1, SeqCst);
        }
    }

    /// The host takes a frame; its content comes back with the next one.
    pub fn take(&self, gfn: u64) {
        if self.present(gfn) {
            self.frames[gfn as usize].generation.fetch_add(1, SeqCst);
        }
    }

    /// What the notifier does: the frame goes, then every leaf of it, then the TLBs.
    pub fn revoke(&self, gfn: u64) {
        self.take(gfn);
        let vm = self.vm.get().expect("a VM");
        vm.mmu
            .try_lock()
            .expect("no operation runs")
            .revoke(self, &vm.epochs, Gfn(gfn));
    }

    fn hfn(&self, gfn: u64) -> u64 {
        let generation = u64::from(self.frames[gfn as usize].generation.load(SeqCst));
        GUEST_HFN + (gfn << 12 | generation & 0xfff)
    }

    /// The pool page that an entry names, if it names one.
    fn pool_page(&self, entry: u64) -> Option<u32> {
        let page = pte::frame(entry).checked_sub(POOL_HFN)?;
        (page < self.pool.len() as u64).then_some(page as u32)
    }

    /// Writes at [`ARGS`] + `at`; returns the address.
    pub fn arg(&self, at: u64, bytes: &[u8]) -> u64 {
        self.args.borrow_mut()[at as usize..][..bytes.len()].copy_from_slice(bytes);
        ARGS + at
    }

    /// Writes words at [`ARGS`] + `at`; returns the address.
    pub fn arg_words(&self, at: u64, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.arg(at, &bytes)
    }

    /// Reads bytes at an address in the argument range.
    pub fn args_at(&self, va: u64, n: usize) -> Vec<u8> {
        self.args.borrow()[(va - ARGS) as usize..][..n].to_vec()
    }

    /// Reads words at an address in the argument range.
    pub fn words_at(&self, va: u64, n: usize) -> Vec<u64> {
        self.args_at(va, 8 * n)
            .chunks(8)
            .map(|c| u64::from_le_bytes(c.try_into().expect("eight bytes")))
            .collect()
    }

    fn in_args(va: u64, len: u64) -> bool {
        va >= ARGS && va.saturating_add(len) <= ARGS + ARGS_SIZE
    }

    /// Walks the shadow tables from the loaded root: the gfn that `va` reaches, or
    /// the error code of the page fault.
    pub fn walk(&self, va: Va, write: bool, fetch: bool, user: bool) -> Result<(u64, u64), u64> {
        let code = if write { pte::PF_WRITE } else { 0 }
            | if fetch { pte::PF_FETCH } else { 0 }
            | if user { pte::PF_USER } else { 0 };
        let cr3 = self.cpu().cr3.get();
        let mut table = self
            .pool_page(cr3)
            .unwrap_or_else(|| panic!("CR3 {cr3:#x} is no pool page"));
        let (mut rw, mut us, mut nx) = (true, true, false);
        let top = if self.la57 { 5 } else { 4 };
        for level in (1..=top).rev() {
            let vm = self.vm.get().expect("a VM");
            if let Some(mmu) = vm.mmu.try_lock() {
                let bound = mmu.binding(table);
                if level < 5 {
                    let (_, l) = bound.unwrap_or_else(|| panic!("walk through free page {table}"));
                    assert_eq!(l.min(4), level, "page {table} is walked at the wrong level");
                }
                self.cpu().cached.borrow_mut().insert(table, bound);
            }
            let entry = self.pool[table as usize][va.index(level)].load(SeqCst);
            if entry & pte::P == 0 {
                return Err(code);
            }
            assert_eq!(
                entry & pte::PS,
                0,
                "a large page in a shadow at level {level}: {entry:#x}"
            );
            rw &= entry & pte::RW != 0;
            us &= entry & pte::U != 0;
            nx |= entry & pte::NX != 0;
            if level > 1 {
                match self.pool_page(entry) {
                    Some(page) => table = page,
                    // The hypervisor's own tables: the guest has no right there.
                    None => {
                        assert!(
                            va.in_hole(),
                            "{va:?}: level {level} entry {entry:#x} is no shadow"
                        );
                        return Err(code | pte::PF_PRESENT);
                    }
                }
            } else {
                if (write && !rw) || (user && !us) || (fetch && nx) {
                    return Err(code | pte::PF_PRESENT);
                }
                let gfn = (pte::frame(entry) - GUEST_HFN) >> 12;
                assert!(
                    gfn < self.frames.len() as u64,
                    "{va:?} reaches a foreign frame"
                );
                assert_eq!(
                    pte::frame(entry),
                    self.hfn(gfn),
                    "{va:?} reaches a frame taken back"
                );
                assert!(
                    self.present(gfn),
                    "{va:?} reaches a frame that is not there"
                );
                if write {
                    self.cpu().writable.borrow_mut().insert(va.0 >> 12, gfn);
                }
                return Ok((gfn, entry));
            }
        }
        unreachable!("level 1 returns")
    }

    fn copy(
        &self,
        va: Va,
        len: usize,
        write: bool,
        mut f: impl FnMut(usize, &AtomicU8),
    ) -> Result<(), Va> {
        for i in 0..len {
            let at = Va(va.0.wrapping_add(i as u64));
            let (gfn, _) = self.walk(at, write, false, false).map_err(|_| at)?;
            let bytes = self.bytes(gfn);
            f(i, &bytes[(at.0 & 0xfff) as usize]);
        }
        Ok(())
    }

    /// A frame as bytes.
    pub fn bytes(&self, gfn: u64) -> &[AtomicU8; 4096] {
        let words: *const Words = &raw const *self.frames[gfn as usize].words;
        // SAFETY: 512 words are 4096 bytes, any alignment suits bytes, the box
        // outlives the borrow of self, and the tests that use both views run on
        // one thread.
        unsafe { &*words.cast::<[AtomicU8; 4096]>() }
    }

    fn step(&self) {
        let (now, most) = self.work.get();
        self.work.set((now + 1, most.max(now + 1)));
    }

    /// Exits of one kind since the log was cleared.
    pub fn exits(&self, reason: u32) -> Vec<Exit> {
        self.log
            .borrow()
            .iter()
            .copied()
            .filter(|e| e.reason == reason)
            .collect()
    }

    pub fn set_hook(&self, f: impl FnMut(&Self, Exit) -> Option<i64> + 'static) {
        *self.hook.borrow_mut() = Some(Box::new(f));
    }

    /// No hook any more.
    pub fn clear_hook(&self) {
        *self.hook.borrow_mut() = None;
    }

    /// Makes CPU `id` the one that runs.
    pub fn be(&self, id: u32) {
        self.current.set(id as usize);
    }

    /// Somebody wants vCPU `id` to look at what is asked of it.
    pub fn kick(&self, id: u32) {
        self.switches[id as usize]
            .pending
            .fetch_or(pending::KICK, SeqCst);
    }

    /// Sees that what CPUs may have cached of the tables is still bound as it was.
    fn check_caches(&self, mmu: &Mmu) {
        for (id, cpu) in self.cpus.iter().enumerate() {
            if !self.vm.get().expect("a VM").epochs.inside(id as u32) {
                continue;
            }
            for (&page, &bound) in cpu.cached.borrow().iter() {
                if bound.is_some() {
                    let now = mmu.binding(page);
                    assert!(
                        now.is_none() || now == bound,
                        "page {page} was {bound:?} in the caches of CPU {id} and is {now:?} now"
                    );
                }
            }
        }
    }
}

impl FakeMachine {
    /// Sees that no TLB holds a writable translation of a page table: writes through
    /// it would go past the core. Holds for guests that keep to the rules.
    pub fn check_tables_not_writable(&self, mmu: &Mmu) {
        for (id, cpu) in self.cpus.iter().enumerate() {
            for (&page, &gfn) in cpu.writable.borrow().iter() {
                assert!(
                    !mmu.is_table(Gfn(gfn)),
                    "the TLB of CPU {id} lets the guest write table {gfn:#x} at page {page:#x}"
                );
            }
        }
    }
}
/// Why a crash was, for messages.
pub fn crash_kind(why: u64) -> &'static str {
    match why {
        crash::GUEST => "guest",
        crash::CORE => "core",
        crash::MEMORY => "memory",
        _ => "unknown",
    }
}
