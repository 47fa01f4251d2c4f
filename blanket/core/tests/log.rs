//! The dirty log: whoever copies what it names has the guest's memory
//! (`blanket_core::mmu`, `log.rs`).
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::Gfn;
use blanket_abi::device::pause;
use blanket_abi::state;
use blanket_abi::xen::hypercall as nr;
use blanket_core::pte;
use common::guest::{Guest, KERNEL_RW};
use common::still;
use common::{Setup, World, fuzz};
use proptest::prelude::*;
use std::sync::atomic::Ordering::SeqCst;

const VCPUS: u32 = 2;

/// A copy of a guest's RAM that is kept up to date by the log.
struct Replica(Vec<Vec<u64>>);

fn frame(w: &World, gfn: u64) -> Vec<u64> {
    let words = w.m.words(gfn).iter();
    words.map(|word| word.load(SeqCst)).collect()
}

impl Replica {
    /// Begins to log, and copies everything.
    fn new(w: &mut World) -> Self {
        take(w);
        Self((0..w.setup.ram).map(|gfn| frame(w, gfn)).collect())
    }

    /// One round. The frames that were copied.
    fn follow(&mut self, w: &mut World) -> Vec<u64> {
        let taken = take(w);
        for &gfn in &taken {
            self.0[gfn as usize] = frame(w, gfn);
        }
        taken
    }

    /// What the copy lacks of what the guest has.
    fn lacks(&self, w: &World) -> Vec<u64> {
        let mmu = w.vm.mmu.try_lock().expect("nothing runs");
        (0..w.setup.ram)
            .filter(|&gfn| mmu.has(Gfn(gfn)) && self.0[gfn as usize] != frame(w, gfn))
            .collect()
    }
}

/// What the core writes down as written.
fn take(w: &mut World) -> Vec<u64> {
    let said = still::stand(w, &[pause::LOG]);
    assert!(said.iter().all(|error| *error == 0), "{said:?}");
    w.audit();
    let log = w.setup.state_base() + state::log_at(w.setup.vcpus, w.setup.ram);
    let words = frame(w, log);
    (0..w.setup.ram)
        .filter(|&gfn| words[(gfn / 64) as usize] >> (gfn % 64) & 1 != 0)
        .collect()
}

#[derive(Clone, Debug)]
enum Op {
    Store {
        vcpu: u32,
        gfn: u64,
        val: u64,
    },
    Read {
        vcpu: u32,
        gfn: u64,
    },
    /// A leaf of the direct map.
    Map {
        at: u64,
        gfn: u64,
        rights: u64,
    },
    /// A hypercall that answers in the guest's memory.
    Ask {
        vcpu: u32,
        gfn: u64,
    },
    /// A breakpoint, on a stack in this frame.
    Trap {
        vcpu: u32,
        gfn: u64,
    },
    Pin {
        gfn: u64,
    },
    Clear {
        gfn: u64,
    },
    GiveUp {
        gfn: u64,
    },
    TakeIn {
        gfn: u64,
    },
    /// The host takes a frame.
    Revoke {
        gfn: u64,
    },
    RunState {
        vcpu: u32,
        gfn: u64,
    },
    Round,
    /// A log is given up, and another one begun later.
    Again,
}

fn op() -> impl Strategy<Value = Op> {
    let gfn = || 0..Setup::default().ram;
    let vcpu = || 0..VCPUS;
    let rights = prop::sample::select(vec![
        KERNEL_RW,
        KERNEL_RW & !pte::D,
        pte::P | pte::RW,
        pte::P | pte::A,
        0,
    ]);
    prop_oneof![
        8 => (vcpu(), gfn(), any::<u64>()).prop_map(|(vcpu, gfn, val)| Op::Store { vcpu, gfn, val }),
        2 => (vcpu(), gfn()).prop_map(|(vcpu, gfn)| Op::Read { vcpu, gfn }),
        4 => (gfn(), gfn(), rights).prop_map(|(at, gfn, rights)| Op::Map { at, gfn, rights }),
        3 => (vcpu(), gfn()).prop_map(|(vcpu, gfn)| Op::Ask { vcpu, gfn }),
        3 => (vcpu(), gfn()).prop_map(|(vcpu, gfn)| Op::Trap { vcpu, gfn }),
        1 => gfn().prop_map(|gfn| Op::Pin { gfn }),
        1 => gfn().prop_map(|gfn| Op::Clear { gfn }),
        1 => gfn().prop_map(|gfn| Op::GiveUp { gfn }),
        1 => gfn().prop_map(|gfn| Op::TakeIn { gfn }),
        1 => gfn().prop_map(|gfn| Op::Revoke { gfn }),
        1 => (vcpu(), gfn()).prop_map(|(vcpu, gfn)| Op::RunState { vcpu, gfn }),
        3 => Just(Op::Round),
        1 => Just(Op::Again),
    ]
}

fn step(w: &mut World, g: &mut Guest, op: &Op) {
    match *op {
        Op::Store { vcpu, gfn, val } => {
            let _ = w.try_access(vcpu, Guest::direct(gfn), true, false);
            // It may fault: then nothing is stored.
            if let common::Reached::Frame(to) = w.try_access(vcpu, Guest::direct(gfn), true, false)
            {
                w.m.words(to)[(val & 511) as usize].store(val, SeqCst);
            }
        }
        Op::Read { vcpu, gfn } => {
            let _ = w.try_access(vcpu, Guest::direct(gfn), false, false);
        }
        Op::Map { at, gfn, rights } => {
            let va = Guest::direct(at);
            let table = g.leaf_table(&w.m, g.root, va);
            let index = blanket_abi::Va(va).index(1) as u64;
            let _ = w.update(0, table, index, gfn << 12 | rights);
        }
        Op::Ask { vcpu, gfn } => {
            let at = Guest::direct(gfn) + 64;
            let _ = w.call(vcpu, nr::XEN_VERSION, &[nr::version::EXTRAVERSION, at]);
        }
        Op::Trap { vcpu, gfn } => w.on(vcpu, |c| {
            let sp = c.f.rsp;
            c.f.rsp = Guest::direct(gfn) + 0x800;
            c.f.vector = 3;
            let reaches = c.resolve(blanket_abi::Va(c.f.rsp - 0x80), true).is_ok();
            if reaches {
                c.enter();
            }
            c.f.rsp = sp;
        }),
        Op::Pin { gfn } => {
            let _ = w.mmuext(0, nr::mmuext::PIN_L1, gfn, 0);
        }
        Op::Clear { gfn } => {
            let _ = w.mmuext(0, nr::mmuext::CLEAR_PAGE, gfn, 0);
        }
        Op::GiveUp { gfn } => {
            let _ = w.balloon(0, nr::memory::DECREASE_RESERVATION, &[gfn]);
        }
        Op::TakeIn { gfn } => {
            let _ = w.balloon(0, nr::memory::POPULATE_PHYSMAP, &[gfn]);
        }
        Op::Revoke { gfn } => w.revoke(gfn),
        Op::RunState { vcpu, gfn } => {
            let at = w.m.arg_words(0x4_0000, &[Guest::direct(gfn) + 256]);
            let register = nr::vcpu::REGISTER_RUNSTATE_MEMORY_AREA;
            let _ = w.call(vcpu, nr::VCPU_OP, &[register, vcpu.into(), at]);
        }
        Op::Round | Op::Again => {}
    }
}

fn holds(ops: &[Op], isolated: bool) -> Result<(), TestCaseError> {
    let (mut w, mut g) = fuzz::start(Setup {
        vcpus: VCPUS,
        ..Setup::default()
    });
    for fast in &mut w.fast {
        fast.isolated = isolated.into();
    }
    // What is in tables and code stays what it is: the guest must go on.
    let kept = |gfn: u64| g.tables.contains(&gfn) || gfn <= g.stack;
    let ops: Vec<Op> = ops
        .iter()
        .filter(|op| match op {
            Op::Clear { gfn } | Op::Store { gfn, .. } | Op::Trap { gfn, .. } => !kept(*gfn),
            Op::Ask { gfn, .. } | Op::RunState { gfn, .. } => !kept(*gfn),
            Op::Map { at, gfn, .. } => !kept(*at) && !kept(*gfn),
            Op::GiveUp { gfn } => !kept(*gfn),
            _ => true,
        })
        .cloned()
        .collect();
    let mut replica = Replica::new(&mut w);
    for op in &ops {
        if still::lives(&mut w, |w| step(w, &mut g, op)).is_none() {
            return Ok(());
        }
        match op {
            Op::Round => {
                replica.follow(&mut w);
                prop_assert_eq!(replica.lacks(&w), Vec::<u64>::new());
            }
            Op::Again => {
                still::stand(&mut w, &[pause::NO_LOG]);
                w.audit();
                replica = Replica::new(&mut w);
            }
            _ => {}
        }
    }
    replica.follow(&mut w);
    prop_assert_eq!(replica.lacks(&w), Vec::<u64>::new());
    Ok(())
}

proptest! {
    #![proptest_config(fuzz::cases(300))]

    #[test]
    fn a_replica_follows(ops in prop::collection::vec(op(), 1..60), isolated: bool) {
        holds(&ops, isolated)?;
    }
}

#[test]
fn a_round_names_what_was_written_and_little_else() {
    let (mut w, mut g) = fuzz::start(Setup {
        vcpus: VCPUS,
        ..Setup::default()
    });
    let (a, b) = (g.alloc(), g.alloc());
    let mut replica = Replica::new(&mut w);
    let always = replica.follow(&mut w);
    assert!(always.len() < 16, "{always:?}");

    assert!(w.store(0, Guest::direct(a), 1));
    assert!(w.store(1, Guest::direct(a) + 8, 2));
    assert_eq!(w.access(0, Guest::direct(b), false, false), Some(b));
    let taken = replica.follow(&mut w);
    assert!(taken.contains(&a) && !taken.contains(&b), "{taken:?}");
    assert_eq!(replica.lacks(&w), Vec::<u64>::new());

    // Nothing since; then without a log, and a new one.
    assert!(!replica.follow(&mut w).contains(&a));
    still::stand(&mut w, &[pause::NO_LOG]);
    assert!(w.store(0, Guest::direct(b), 3));
    assert_eq!(replica.lacks(&w), [b], "nobody said so");
    let mut replica = Replica::new(&mut w);
    assert!(w.store(0, Guest::direct(b), 4));
    assert!(replica.follow(&mut w).contains(&b));
}

/// A frame that was a table and is mapped writable loses its mark when it is written,
/// log or not.
#[test]
fn a_table_that_becomes_memory_again() {
    let (mut w, mut g) = fuzz::start(Setup::default());
    let frame = g.alloc();
    assert_eq!(w.mmuext(0, nr::mmuext::PIN_L1, frame, 0), 0);
    let mut replica = Replica::new(&mut w);
    assert!(w.vm.mmu.lock().is_table(Gfn(frame)));
    assert_eq!(w.access(0, Guest::direct(frame), false, false), Some(frame));
    assert!(w.vm.mmu.lock().is_table(Gfn(frame)), "it was only read");
    assert!(w.store(0, Guest::direct(frame), 7));
    assert!(!w.vm.mmu.lock().is_table(Gfn(frame)));
    assert!(replica.follow(&mut w).contains(&frame));
}
