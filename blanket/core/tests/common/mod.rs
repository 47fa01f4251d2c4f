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
mod thief;
pub mod trap;
mod world;

#[allow(unused_imports, reason = "not every test program looks")]
pub use world::{Reached, World};

use blanket_abi::device::{
    Boot, COUNTERS, Dtr, EXIT_REASONS, RUN_DATA, Switch, VmPage, crash, exit, host,
};
use blanket_abi::layout::REVOKED_BLOCK;
use blanket_abi::trace::Ring;
use blanket_abi::{Gfn, Va};
use blanket_core::machine::{Cpu, Host, Memory, Words};
use blanket_core::mmu::Mmu;
use blanket_core::pte;
use blanket_core::time::Clock;
use blanket_core::vcpu::NEVER;
use blanket_core::vm::Vm;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
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
    /// Frames of RAM; shared info and two grant frames come on top.
    pub ram: u64,
    /// Most pool pages.
    pub pool: u32,
    pub vcpus: u32,
    pub la57: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            ram: 128,
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
        self.ram + 1 + GRANT_FRAMES
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

impl Memory for FakeMachine {
    fn frame(&self, gfn: Gfn) -> Option<&Words> {
        self.step();
        let f = &self.frames[gfn.0 as usize];
        self.present(gfn.0).then_some(&*f.words)
    }
    fn frame_bytes(&self, gfn: Gfn) -> Option<&[AtomicU8; 4096]> {
        self.present(gfn.0).then(|| self.bytes(gfn.0))
    }
    fn frame_pte(&self, gfn: Gfn) -> u64 {
        if self.present(gfn.0) {
            self.hfn(gfn.0) << 12 | HOST_BITS
        } else {
            0
        }
    }
    fn copy_from_frame(&self, gfn: Gfn, offset: usize, to: &mut [u8]) -> bool {
        self.step();
        let Some(bytes) = self.frame_bytes(gfn) else {
            return false;
        };
        let bytes = &bytes[offset..][..to.len()];
        for (to, byte) in to.iter_mut().zip(bytes) {
            *to = byte.load(SeqCst);
        }
        true
    }
    fn copy_to_frame(&self, gfn: Gfn, offset: usize, from: &[u8]) -> bool {
        self.step();
        let Some(bytes) = self.frame_bytes(gfn) else {
            return false;
        };
        for (from, byte) in from.iter().zip(&bytes[offset..][..from.len()]) {
            byte.store(*from, SeqCst);
        }
        true
    }
    fn pool(&self, page: u32) -> &Words {
        assert!(
            u64::from(page) < self.page.pool_pages.load(SeqCst),
            "pool page {page}"
        );
        assert!(
            !self.pool_taken.borrow().contains(&page),
            "the host has pool page {page}"
        );
        &self.pool[page as usize]
    }
    fn pool_pte(&self, page: u32) -> u64 {
        assert!(
            u64::from(page) < self.page.pool_pages.load(SeqCst),
            "pool page {page}"
        );
        assert!(
            !self.pool_taken.borrow().contains(&page),
            "the host has pool page {page}"
        );
        (POOL_HFN + u64::from(page)) << 12
    }
    fn revoked(&self, block: usize) -> &[AtomicU64; 64] {
        &self.revoked[block]
    }
    fn gfns(&self, page: u32) -> &[AtomicU32; 512] {
        &self.names[page as usize]
    }
    fn copy_from_guest(&self, va: Va, to: &mut [u8]) -> Result<(), Va> {
        self.step();
        assert!(
            va.is_guest() && Va(va.0 + to.len() as u64).is_guest(),
            "{va:?} is not the guest's"
        );
        if Self::in_args(va.0, to.len() as u64) {
            to.copy_from_slice(&self.args.borrow()[(va.0 - ARGS) as usize..][..to.len()]);
            return Ok(());
        }
        self.copy(va, to.len(), false, |i, b| to[i] = b.load(SeqCst))
    }
    fn copy_to_guest(&self, va: Va, from: &[u8]) -> Result<(), Va> {
        self.step();
        assert!(
            va.is_guest() && Va(va.0 + from.len() as u64).is_guest(),
            "{va:?} is not the guest's"
        );
        if Self::in_args(va.0, from.len() as u64) {
            self.arg(va.0 - ARGS, from);
            return Ok(());
        }
        self.copy(va, from.len(), true, |i, b| b.store(from[i], SeqCst))
    }
}

impl Cpu for FakeMachine {
    fn load_root(&self, cr3: u64) {
        assert!(
            self.page.revoked.iter().all(|w| w.load(SeqCst) == 0),
            "a root is loaded while leaves of frames that the host took are there"
        );
        self.cpu().cr3.set(cr3);
        self.cpu().flush();
        self.cpu().loads.set(self.cpu().loads.get() + 1);
    }
    fn invlpg(&self, va: Va) {
        self.cpu().invlpgs.borrow_mut().push(va.0);
        self.cpu().writable.borrow_mut().remove(&(va.0 >> 12));
    }
    fn swapgs(&self) {
        self.cpu().gs.swap(&self.cpu().kgs);
    }
    fn fs_base(&self) -> u64 {
        self.cpu().fs.get()
    }
    fn set_fs_base(&self, base: u64) {
        assert!(Va(base).is_canonical());
        self.cpu().fs.set(base);
    }
    fn gs_base(&self) -> u64 {
        self.cpu().gs.get()
    }
    fn set_gs_base(&self, base: u64) {
        assert!(Va(base).is_canonical());
        self.cpu().gs.set(base);
    }
    fn inactive_gs_base(&self) -> u64 {
        self.cpu().kgs.get()
    }
    fn set_inactive_gs_base(&self, base: u64) {
        assert!(Va(base).is_canonical());
        self.cpu().kgs.set(base);
    }
    fn load_user_gs(&self, sel: u16) {
        self.cpu().user_gs_sel.set(sel);
    }
    fn data_selectors(&self) -> [u16; 4] {
        self.cpu().selectors.get()
    }
    fn load_data_selectors(&self, sel: [u16; 4]) -> bool {
        self.cpu().selectors.set(sel);
        true
    }
    fn tsc(&self) -> u64 {
        self.tsc.get()
    }
    fn set_dr(&self, nr: u8, val: u64) {
        assert!(nr < 4 && Va(val).is_guest() || nr == 7, "DR{nr} = {val:#x}");
        self.cpu().dr.borrow_mut()[usize::from(nr)] = val;
    }
    fn cr2(&self) -> u64 {
        self.cpu().cr2.get()
    }
    fn take_dr6(&self) -> u64 {
        self.cpu().dr6.replace(0xffff_0ff0)
    }
    fn write_gdt(&self, index: u32, desc: u64) {
        self.step();
        assert!(index < 14 * 512, "GDT entry {index}");
        self.cpu().gdt.borrow_mut().insert(index, desc);
    }
    fn write_ldt(&self, index: u32, desc: u64) {
        self.step();
        assert!(index < 8192, "LDT entry {index}");
        self.cpu().ldt.borrow_mut().insert(index, desc);
    }
    fn descriptor(&self, selector: u16) -> u64 {
        let table = if selector & 4 == 0 {
            &self.cpu().gdt
        } else {
            &self.cpu().ldt
        };
        table
            .borrow()
            .get(&u32::from(selector >> 3))
            .copied()
            .unwrap_or(0)
    }
    fn load_ldt(&self, entries: u32) {
        assert!(entries <= 8192);
        self.cpu().ldt_entries.set(entries);
    }
    fn set_tsc_aux(&self, val: u64) {
        self.cpu().tsc_aux.set(val);
    }
}

impl Host for FakeMachine {
    fn exit(&self, reason: u32, args: [u64; 4]) -> i64 {
        let me = self.current.get();
        let out = Exit {
            vcpu: me as u32,
            reason,
            args,
        };
        self.log.borrow_mut().push(out);
        self.work.set((0, self.work.get().1));
        assert!(
            self.log.borrow().len() < 200_000,
            "the core leaves for ever: {out:?}"
        );
        // The rule of `Vm`: no lock is held while the world is left.
        if let Some(vm) = self.vm.get() {
            assert!(
                vm.mmu.try_lock().is_some(),
                "the MMU lock is held at {out:?}"
            );
            assert!(
                vm.ports_lock.try_lock().is_some(),
                "the ports lock is held at {out:?}"
            );
            assert!(
                vm.grants.try_lock().is_some(),
                "the grant lock is held at {out:?}"
            );
            assert!(
                !vm.epochs.inside(me as u32),
                "the epoch was not left at {out:?}"
            );
        }
        self.cpu().flush();
        let hook = self.hook.borrow_mut().take();
        let mut answer = None;
        if let Some(mut f) = hook {
            answer = f(self, out);
            self.current.set(me);
            self.hook.borrow_mut().get_or_insert(f);
        }
        let answer = answer.unwrap_or_else(|| self.serve(out));
        self.steal();
        let sw = self.switch();
        sw.armed.store(sw.deadline.load(Acquire), Release);
        answer
    }
    fn in_place(&self, _: u32) -> bool {
        false
    }
    fn trap_entry(&self, traced: bool) -> u64 {
        0x1000 + u64::from(traced)
    }
    fn trace_ring(&self) -> &Ring {
        &self.cpu().trace
    }
    fn clock(&self) -> Clock {
        Clock::of_page(&self.page)
    }
    fn wall_clock(&self) -> (u64, u32) {
        (
            self.page.wall_sec.load(Acquire),
            self.page.wall_nsec.load(Acquire),
        )
    }
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [
            leaf ^ 0x1111_1111,
            subleaf ^ 0x2222_2222,
            0xffff_ffff,
            0xffff_ffff,
        ]
    }
    fn set_xcr0(&self, val: u64) {
        self.cpu().xcr0.set(val);
    }
    fn switch(&self) -> &Switch {
        &self.switches[self.current.get()]
    }
    fn pending_of(&self, vcpu: u32) -> &AtomicU32 {
        &self.switches[vcpu as usize].pending
    }
    fn preempted(&self, _: u32) -> bool {
        false
    }
    fn vm_page(&self) -> &VmPage {
        &self.page
    }
    fn set_data(&self, text: &[u8]) -> usize {
        let n = text.len().min(RUN_DATA);
        self.texts.borrow_mut().push(text[..n].to_vec());
        n
    }
}

impl FakeMachine {
    /// What the module would do.
    fn serve(&self, out: Exit) -> i64 {
        match out.reason {
            exit::FRAME => {
                if self.refused.borrow().contains(&out.args[0]) {
                    return blanket_abi::xen::errno::ENOMEM;
                }
                // A frame that the guest has given up is not needed by anything.
                if let Some(vm) = self.vm.get() {
                    let mmu = vm.mmu.try_lock().expect("checked above");
                    assert!(
                        mmu.has(Gfn(out.args[0])),
                        "{out:?} asks for a frame that is out"
                    );
                }
                self.give(out.args[0]);
                0
            }
            exit::BALLOON => self.take_given_up(out),
            exit::TRIM => self.take_pool(out),
            exit::FILL => self.fill_pool(out),
            exit::POOL => {
                let now = self.page.pool_pages.load(SeqCst);
                let more = out.args[0].min(self.page.pool_limit - now);
                self.page.pool_pages.store(now + more, SeqCst);
                more.cast_signed()
            }
            exit::FLUSH => {
                let vm = self.vm.get().expect("a VM");
                for (id, cpu) in self.cpus.iter().enumerate() {
                    if out.args[0] & 1 << id != 0 {
                        cpu.flush();
                        if vm.epochs.inside(id as u32) {
                            vm.epochs.enter(id as u32);
                        }
                    }
                }
                0
            }
            exit::IDLE => {
                let sw = self.switch();
                let deadline = sw.deadline.load(Acquire);
                if deadline == NEVER {
                    assert_ne!(
                        sw.pending.load(SeqCst),
                        0,
                        "vCPU {} sleeps for ever",
                        out.vcpu
                    );
                } else {
                    self.tsc.set(self.tsc.get().max(deadline));
                }
                0
            }
            exit::CRASH => {
                let text = self.texts.borrow().last().cloned().unwrap_or_default();
                let text = String::from_utf8_lossy(&text).into_owned();
                let why = out.args[0];
                *self.crashed.borrow_mut() = Some(Crash {
                    why,
                    text: text.clone(),
                });
                panic!("the core ends the VM ({}): {text}", crash_kind(why))
            }
            _ => 0,
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
