//! The shadow MMU under a guest that keeps to the rules: it maps its tables
//! read-only before it uses them, as Linux does. What the shadow translates is what
//! the guest's own tables translate, and an access ends where they say.
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::Va;
use blanket_abi::xen::hypercall::{self as nr, mmuext};
use blanket_core::pte;
use common::guest::{DIRECT, Guest, KERNEL_RW, TABLE, TEXT};
use common::{Setup, World, fuzz};
use proptest::prelude::*;
use std::sync::atomic::Ordering::SeqCst;

/// What a guest that follows the rules does with its tables: Linux's order.
#[derive(Clone, Debug)]
enum Tidy {
    /// Map `data` at page `page` of process `process`.
    Map {
        process: usize,
        page: u64,
        data: u64,
        rights: u64,
        emulate: bool,
    },
    Unmap {
        process: usize,
        page: u64,
    },
    /// A new process beside the others, with a copy of the tables of an old one.
    Fork {
        from: usize,
    },
    Exit {
        process: usize,
    },
    Run {
        cpu: u32,
        process: usize,
    },
    Access {
        cpu: u32,
        page: u64,
        write: bool,
        user: bool,
    },
    Revoke {
        gfn: u64,
    },
    DropAll,
}

/// Page numbers of a process: three regions with tables of their own.
fn tidy_va(page: u64) -> u64 {
    [0x40_0000, 0x5555_5555_0000, 0x7fff_f7fd_0000][page as usize % 3] + ((page / 3) << 12)
}

#[derive(Clone, Debug, Default)]
struct Process {
    root: u64,
    user: u64,
    /// Tables with their level.
    tables: Vec<u64>,
}

struct Tidies {
    w: World,
    free: Vec<u64>,
    processes: Vec<Process>,
    running: [usize; 2],
    kernel: u64,
}

const PAGES: u64 = 12;
const DATA: std::ops::Range<u64> = 60..72;
const TIDY_RAM: u64 = 160;

impl Tidies {
    fn new(pool: u32, la57: bool) -> Self {
        let (mut w, g) = fuzz::start(Setup {
            ram: TIDY_RAM,
            most: 0,
            start: 0,
            pool,
            vcpus: 2,
            la57,
        });
        // The builder's user root goes: processes bring theirs.
        for id in 0..2 {
            w.mmuext(id, mmuext::NEW_USER_BASEPTR, 0, 0);
        }
        let free = (72..TIDY_RAM).collect();
        let mut t = Self {
            w,
            free,
            processes: Vec::new(),
            running: [0; 2],
            kernel: g.root,
        };
        let first = t.create(None);
        t.processes.push(first);
        for cpu in 0..2 {
            t.run(cpu, 0);
        }
        t
    }

    /// Changes the direct map's leaf of a frame. When rights shrink, Linux asks for no
    /// flush before it announces the frame as a table: the hypervisor must see to it.
    fn set_leaf(&mut self, gfn: u64, rights: u64) {
        let va = Guest::direct(gfn);
        let flush = if rights & pte::RW == 0 { 0 } else { 2 | 4 };
        assert_eq!(
            self.w
                .call(0, nr::UPDATE_VA_MAPPING, &[va, gfn << 12 | rights, flush]),
            0
        );
    }

    /// A zeroed frame that becomes a table: filled by `f` while it is writable,
    /// then read-only.
    fn table(&mut self, p: &mut Process, f: impl FnOnce(&mut Self, u64)) -> Option<u64> {
        let gfn = self.free.pop()?;
        let va = Guest::direct(gfn);
        assert_eq!(self.w.access(0, va, true, false), Some(gfn));
        self.w
            .m
            .words(gfn)
            .iter()
            .for_each(|word| word.store(0, SeqCst));
        f(self, gfn);
        self.set_leaf(gfn, pte::P | pte::A);
        p.tables.push(gfn);
        Some(gfn)
    }

    fn create(&mut self, from: Option<&Process>) -> Process {
        let mut p = Process::default();
        let kernel = self.kernel;
        let copy_kernel = |t: &mut Self, to: u64| {
            for i in 272..512 {
                t.w.m.words(to)[i].store(t.w.m.words(kernel)[i].load(SeqCst), SeqCst);
            }
        };
        p.root = self.table(&mut p, copy_kernel).expect("a frame");
        p.user = self.table(&mut p, |_, _| ()).expect("a frame");
        let old = from.map(|f| f.root);
        // Unpinned tables may be filled without telling anyone.
        if let Some(old) = old {
            for page in 0..PAGES {
                let leaf = self.guest_entry(old, tidy_va(page));
                if leaf & pte::P != 0 {
                    self.put(&mut p, tidy_va(page), leaf & !pte::RW, false);
                }
            }
        }
        for root in [p.root, p.user] {
            assert_eq!(self.w.mmuext(0, mmuext::PIN_L4, root, 0), 0);
        }
        p
    }

    /// The guest's own translation: the leaf entry with the rights of all levels.
    fn guest_entry(&self, root: u64, va: u64) -> u64 {
        let (mut table, mut rw, mut nx) = (root, pte::RW, 0);
        for level in [4u8, 3, 2, 1] {
            let e = self.w.m.words(table)[Va(va).index(level)].load(SeqCst);
            if e & pte::P == 0 {
                return 0;
            }
            rw &= e;
            nx |= e & pte::NX;
            if level == 1 {
                return e & !(pte::RW | pte::NX) | rw | nx;
            }
            table = pte::frame(e);
        }
        unreachable!("level 1 returns")
    }

    /// Writes an entry of a table: by hypercall, or as the guest's own store, which
    /// is emulated when the table is in use.
    fn write(&mut self, pinned: bool, gfn: u64, i: usize, val: u64, emulate: bool) {
        if !pinned {
            // Still private to this process: but its frame is read-only already,
            // so the store is by hypercall all the same, as in Linux's late pin.
            assert_eq!(self.w.update(0, gfn, i as u64, val), 0);
        } else if emulate {
            let va = Guest::direct(gfn) + 8 * i as u64;
            let rip = self.w.m.arg(0x3_0000, &[0x48, 0x89, 0x07]);
            self.w.on(0, |c| {
                c.m.cpu().cr2.set(va);
                (c.f.rip, c.f.rax, c.f.rdi) = (rip, val, va);
                (c.f.vector, c.f.error) = (14, pte::PF_WRITE | pte::PF_PRESENT | pte::PF_USER);
                c.enter();
                assert_eq!(c.f.rip, rip + 3, "emulated");
            });
        } else {
            assert_eq!(self.w.update(0, gfn, i as u64, val), 0);
        }
    }

    /// Puts a leaf entry at `va`, with the tables that it needs.
    fn put(&mut self, p: &mut Process, va: u64, leaf: u64, emulate: bool) -> bool {
        let pinned = self.processes.iter().any(|q| q.root == p.root);
        let mut table = p.root;
        for level in [4u8, 3, 2] {
            let i = Va(va).index(level);
            let e = self.w.m.words(table)[i].load(SeqCst);
            if e & pte::P == 0 {
                if leaf == 0 {
                    return true;
                }
                let Some(new) = self.table(p, |_, _| ()) else {
                    return false;
                };
                if pinned && level == 2 {
                    assert_eq!(self.w.mmuext(0, mmuext::PIN_L1, new, 0), 0);
                }
                self.write(pinned, table, i, new << 12 | TABLE, emulate);
                if level == 4 {
                    let user = p.user;
                    self.write(pinned, user, i, new << 12 | TABLE, emulate);
                }
                table = new;
            } else {
                table = pte::frame(e);
            }
        }
        self.write(pinned, table, Va(va).index(1), leaf, emulate);
        true
    }

    fn run(&mut self, cpu: u32, process: usize) {
        let Process { root, user, .. } = self.processes[process];
        self.w.on(cpu, |c| {
            if !c.kernel_mode() {
                c.to_kernel_mode();
            }
        });
        assert_eq!(self.w.mmuext(cpu, mmuext::NEW_BASEPTR, root, 0), 0);
        assert_eq!(self.w.mmuext(cpu, mmuext::NEW_USER_BASEPTR, user, 0), 0);
        self.running[cpu as usize] = process;
    }

    fn step(&mut self, op: &Tidy) {
        let n = self.processes.len();
        match *op {
            Tidy::Map {
                process,
                page,
                data,
                rights,
                emulate,
            } => {
                let mut p = self.processes[process % n].clone();
                // CPU 0 is the one that edits: its address space must know the tables
                // by their direct map, which every process shares.
                self.put(&mut p, tidy_va(page), data << 12 | rights, emulate);
                self.processes[process % n] = p;
                self.flush();
            }
            Tidy::Unmap { process, page } => {
                let mut p = self.processes[process % n].clone();
                self.put(&mut p, tidy_va(page), 0, false);
                self.processes[process % n] = p;
                self.flush();
            }
            Tidy::Fork { from } => {
                if n < 4 && self.free.len() > 30 {
                    let old = self.processes[from % n].clone();
                    let new = self.create(Some(&old));
                    self.processes.push(new);
                }
            }
            Tidy::Exit { process } => {
                let process = process % n;
                if n > 1 && !self.running.contains(&process) {
                    let p = self.processes.remove(process);
                    for r in &mut self.running {
                        *r -= usize::from(*r > process);
                    }
                    for root in [p.root, p.user] {
                        assert_eq!(self.w.mmuext(0, mmuext::UNPIN, root, 0), 0);
                    }
                    for gfn in p.tables {
                        self.set_leaf(gfn, KERNEL_RW);
                        self.free.insert(0, gfn);
                    }
                }
            }
            Tidy::Run { cpu, process } => self.run(cpu, process % n),
            Tidy::Access {
                cpu,
                page,
                write,
                user,
            } => {
                self.w.on(cpu, |c| match (user, c.kernel_mode()) {
                    (true, true) => c.to_user_mode(),
                    (false, false) => c.to_kernel_mode(),
                    _ => (),
                });
                let process = &self.processes[self.running[cpu as usize]];
                let root = if user { process.user } else { process.root };
                let va = tidy_va(page);
                let e = self.guest_entry(root, va);
                let allowed = e & pte::P != 0 && (!write || e & pte::RW != 0);
                let got = self.w.access(cpu, va, write, false);
                assert_eq!(got, allowed.then_some(pte::frame(e)), "{va:#x} {e:#x}");
                if allowed {
                    let e = self.guest_entry(root, va);
                    let want = pte::A | if write { pte::D } else { 0 };
                    assert_eq!(e & want, want, "accessed and dirty bits");
                }
                self.w.on(cpu, |c| {
                    if !c.kernel_mode() {
                        c.to_kernel_mode();
                    }
                });
            }
            Tidy::Revoke { gfn } => self.w.m.revoke(gfn),
            Tidy::DropAll => self.w.vm.mmu.lock().drop_all(&self.w.m, &self.w.vm.epochs),
        }
    }

    fn flush(&mut self) {
        self.w.mmuext(0, mmuext::TLB_FLUSH_ALL, 0, 0);
    }

    /// Whatever the shadow translates, the guest's tables translate to the same.
    fn check(&mut self) {
        let report = self.w.audit();
        assert_eq!(report.writable_tables, 0);
        self.w.m.check_tables_not_writable(&self.w.vm.mmu.lock());
        for cpu in 0..2 {
            let p = &self.processes[self.running[cpu as usize]];
            for (user, root) in [(false, p.root), (true, p.user)] {
                let cr3 = {
                    let f = &self.w.fast[cpu as usize];
                    if user { f.user_cr3 } else { f.kernel_cr3 }
                };
                self.w.switch_to(cpu);
                let kept = self.w.m.cpu().cr3.replace(cr3);
                let pages = (0..PAGES).map(tidy_va);
                for va in pages
                    .chain((0..TIDY_RAM).map(Guest::direct))
                    .chain([TEXT, DIRECT])
                {
                    for (write, fetch) in [(false, false), (true, false), (false, true)] {
                        if let Ok((gfn, _)) = self.w.m.walk(Va(va), write, fetch, true) {
                            let e = self.guest_entry(root, va);
                            assert_ne!(e & pte::P, 0, "{va:#x}: the guest maps nothing");
                            assert_eq!(gfn, pte::frame(e), "{va:#x}");
                            assert!(!write || e & pte::RW != 0, "{va:#x}: not writable");
                            assert!(!fetch || e & pte::NX == 0, "{va:#x}: not executable");
                        }
                    }
                }
                self.w.m.cpu().cr3.set(kept);
            }
        }
    }
}

fn tidy() -> impl Strategy<Value = Tidy> {
    let process = || 0usize..4;
    let rights = prop::sample::select(vec![
        pte::P | pte::U,
        pte::P | pte::U | pte::A,
        pte::P | pte::U | pte::RW,
        pte::P | pte::U | pte::RW | pte::A,
        KERNEL_RW | pte::U,
        KERNEL_RW | pte::U | pte::NX,
    ]);
    prop_oneof![
        6 => (process(), 0..PAGES, DATA, rights, any::<bool>()).prop_map(
            |(process, page, data, rights, emulate)| Tidy::Map { process, page, data, rights, emulate }
        ),
        2 => (process(), 0..PAGES).prop_map(|(process, page)| Tidy::Unmap { process, page }),
        2 => process().prop_map(|from| Tidy::Fork { from }),
        2 => process().prop_map(|process| Tidy::Exit { process }),
        3 => (0u32..2, process()).prop_map(|(cpu, process)| Tidy::Run { cpu, process }),
        8 => (0u32..2, 0..PAGES, any::<bool>(), any::<bool>())
            .prop_map(|(cpu, page, write, user)| Tidy::Access { cpu, page, write, user }),
        1 => (0..TIDY_RAM).prop_map(|gfn| Tidy::Revoke { gfn }),
        1 => Just(Tidy::DropAll),
    ]
}

proptest! {
    #![proptest_config(fuzz::cases(64))]

    #[test]
    fn the_shadow_follows_a_guest_that_keeps_to_the_rules(
        ops in prop::collection::vec(tidy(), 1..80),
        pool in 24u32..80,
        la57: bool,
        thief: Option<u64>,
    ) {
        let mut t = Tidies::new(pool, la57);
        t.w.m.thief.set(thief.unwrap_or(0));
        for op in &ops {
            t.w.m.log.borrow_mut().clear();
            t.step(op);
            t.check();
        }
    }
}
