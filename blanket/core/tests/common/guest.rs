//! A small PV guest: page tables as a domain builder and Linux make them.

use super::{FakeMachine, Setup, World};
use blanket_abi::Va;
use blanket_abi::device::Boot;
use blanket_abi::xen::hypercall as nr;
use blanket_core::pte;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering::SeqCst;

/// Where Linux maps all memory (L4 slot 273).
pub const DIRECT: u64 = 0xffff_8880_0000_0000;
/// Where the guest's code is.
pub const TEXT: u64 = 0xffff_ffff_8100_0000;
/// Where its user mode's code is.
pub const USER: u64 = 0x0000_0000_0040_0000;
/// Rights of a kernel page.
pub const KERNEL_RW: u64 = pte::P | pte::RW | pte::A | pte::D;
/// Rights of a table.
pub const TABLE: u64 = pte::P | pte::RW | pte::U | pte::A | pte::D;

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Kernel root and user root.
    pub root: u64,
    pub user_root: u64,
    /// Frame of the code at [`TEXT`], of the user code at [`USER`].
    pub text: u64,
    pub user_text: u64,
    /// Frame of the kernel stack.
    pub stack: u64,
    /// Page tables.
    pub tables: BTreeSet<u64>,
    next: u64,
}

impl Guest {
    /// Address of a frame in the direct map.
    pub fn direct(gfn: u64) -> u64 {
        DIRECT + (gfn << 12)
    }

    /// Top of the kernel stack.
    pub fn stack_top(&self) -> u64 {
        Self::direct(self.stack) + 4096
    }

    /// A frame that nothing uses.
    pub fn alloc(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// The table of `level` - 1 below entry `va` of table `gfn`, made if missing.
    fn below(&mut self, m: &FakeMachine, gfn: u64, level: u8, va: Va) -> u64 {
        let cell = &m.words(gfn)[va.index(level)];
        let entry = cell.load(SeqCst);
        if entry & pte::P != 0 {
            return pte::frame(entry);
        }
        let table = self.alloc();
        self.tables.insert(table);
        cell.store(table << 12 | TABLE, SeqCst);
        table
    }

    /// The leaf table for `va`.
    pub fn leaf_table(&mut self, m: &FakeMachine, root: u64, va: u64) -> u64 {
        let va = Va(va);
        let l3 = self.below(m, root, 4, va);
        let l2 = self.below(m, l3, 3, va);
        self.below(m, l2, 2, va)
    }

    /// Maps a page, before the guest runs.
    pub fn map(&mut self, m: &FakeMachine, root: u64, va: u64, gfn: u64, rights: u64) {
        let l1 = self.leaf_table(m, root, va);
        m.words(l1)[Va(va).index(1)].store(gfn << 12 | rights, SeqCst);
    }

    /// Builds the guest's memory. The direct map holds all frames, those of tables
    /// read-only.
    pub fn build(m: &FakeMachine, setup: Setup) -> Self {
        let mut g = Self {
            root: 0,
            user_root: 0,
            text: 0,
            user_text: 0,
            stack: 0,
            tables: BTreeSet::new(),
            next: 0,
        };
        g.root = g.alloc();
        g.user_root = g.alloc();
        g.tables.extend([g.root, g.user_root]);
        g.text = g.alloc();
        g.user_text = g.alloc();
        g.stack = g.alloc();
        let (root, user_root) = (g.root, g.user_root);
        for gfn in 0..setup.frames() {
            g.map(m, root, Self::direct(gfn), gfn, KERNEL_RW);
        }
        g.map(m, root, TEXT, g.text, pte::P | pte::A);
        g.map(m, root, USER, g.user_text, KERNEL_RW | pte::U);
        g.map(m, user_root, USER, g.user_text, KERNEL_RW | pte::U);
        for t in g.tables.clone() {
            g.map(m, root, Self::direct(t), t, pte::P | pte::A);
        }
        let has = if setup.start == 0 {
            setup.ram
        } else {
            setup.start
        };
        assert!(g.next < has, "the guest does not fit");
        g
    }

    /// How it starts.
    pub fn boot(root: u64, setup: Setup) -> Boot {
        Boot {
            ram_frames: setup.ram,
            start_frames: setup.start,
            most_frames: setup.most,
            shared_info: setup.shared_info(),
            grant_base: setup.ram + 1,
            grant_frames: super::GRANT_FRAMES,
            cr3: root,
            rip: TEXT,
            rsp: super::ARGS + super::ARGS_SIZE,
            start_info: DIRECT,
            store_port: 1,
            console_port: 2,
            state_base: setup.state_base(),
            state_frames: setup.state_frames(),
            ..Boot::default()
        }
    }
}

/// Trap handlers of the guest: vector `v` at `TEXT + 0x800 + v`.
pub fn handler(vector: u8) -> u64 {
    TEXT + 0x800 + u64::from(vector)
}
/// Its other callbacks.
pub const EVENT: u64 = TEXT + 0x400;
pub const FAILSAFE: u64 = TEXT + 0x410;
pub const SYSCALL: u64 = TEXT + 0x420;

impl World {
    /// A guest that has just booted: first vCPU up, in kernel mode, handlers for all
    /// vectors, callbacks and a user root set. Stack and arguments lie in the
    /// range that always works.
    pub fn booted(setup: Setup) -> (Self, Guest) {
        let mut w = Self::new(setup, Guest::boot(1, setup));
        let g = Guest::build(&w.m, setup);
        assert_eq!(g.root, 1);
        w.cpu0(|c| {
            c.reset_cpu();
            c.boot();
        });
        w.start_cpu(0, &g);
        w.m.log.borrow_mut().clear();
        (w, g)
    }

    /// The hypercalls with which a vCPU sets itself up.
    pub fn start_cpu(&mut self, id: u32, g: &Guest) {
        let mut table = Vec::new();
        for v in 0..=255u8 {
            // Breakpoint, overflow and the system call are open to user mode.
            let flags = u64::from(if matches!(v, 3 | 4 | 0x80) { 3u8 } else { 0 });
            table.extend([u64::from(v) | flags << 8, handler(v)]);
        }
        table.extend([0, 0]);
        let list = self.m.arg_words(0x1_0000, &table);
        assert_eq!(self.call(id, nr::SET_TRAP_TABLE, &[list]), 0);
        for (kind, mask, address) in [
            (nr::callback::EVENT, 0, EVENT),
            (nr::callback::FAILSAFE, 1, FAILSAFE),
            (nr::callback::SYSCALL, 1, SYSCALL),
        ] {
            let at = self
                .m
                .arg_words(0x1_0000, &[u64::from(kind) | mask << 16, address]);
            assert_eq!(
                self.call(id, nr::CALLBACK_OP, &[nr::callback::REGISTER, at]),
                0
            );
        }
        let sp = super::ARGS + super::ARGS_SIZE;
        assert_eq!(self.call(id, nr::STACK_SWITCH, &[0xe02b, sp]), 0);
        self.regs[id as usize].rsp = sp;
        if g.user_root != 0 {
            assert_eq!(
                self.mmuext(id, nr::mmuext::NEW_USER_BASEPTR, g.user_root, 0),
                0
            );
        }
    }

    /// A hypercall through the dispatcher, from kernel mode: user mode has none.
    pub fn call(&mut self, id: u32, call: u64, args: &[u64]) -> i64 {
        let mut a = [0; 6];
        a[..args.len()].copy_from_slice(args);
        self.on(id, |c| {
            if !c.kernel_mode() {
                c.to_kernel_mode();
            }
            c.dispatch(call, a)
        })
        .unwrap_or_else(|e| e)
    }

    /// The host asks for shadow pages.
    pub fn reclaim(&mut self, id: u32) {
        self.m.page.reclaim.store(1, SeqCst);
        self.on(id, |c| c.take_pending());
    }

    /// Gives frames up, or asks for them: how many it was.
    pub fn balloon(&mut self, id: u32, cmd: u64, gfns: &[u64]) -> i64 {
        let list = self.m.arg_words(0x2_0000, gfns);
        let at = self
            .m
            .arg_words(0x3_0000, &[list, gfns.len() as u64, 0, 0x7ff0]);
        self.call(id, nr::MEMORY_OP, &[cmd, at])
    }

    /// One mmuext operation.
    pub fn mmuext(&mut self, id: u32, cmd: u32, arg1: u64, arg2: u64) -> i64 {
        let at = self.m.arg_words(0x2_0000, &[u64::from(cmd), arg1, arg2]);
        self.call(id, nr::MMUEXT_OP, &[at, 1, 0, 0x7ff0])
    }

    /// One mmu_update request: entry `i` of frame `gfn`.
    pub fn update(&mut self, id: u32, gfn: u64, i: u64, val: u64) -> i64 {
        let at = self.m.arg_words(0x2_0000, &[gfn << 12 | i << 3, val]);
        self.call(id, nr::MMU_UPDATE, &[at, 1, 0, 0x7ff0])
    }
}
