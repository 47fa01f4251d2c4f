//! The shadow MMU under arbitrary guests.
//!
//! A hostile guest: any sequence of calls, faults, emulated writes, stores, pokes
//! by backends and reclaims on page tables of any shape. After each step every
//! rule must hold, and what CPUs may have cached of the tables must still be bound
//! as it was.
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::xen::hypercall::{self as nr, mmuext};
use blanket_abi::{Gfn, Va};
use blanket_core::pte;
use common::guest::{Guest, KERNEL_RW, TABLE, TEXT, USER};
use common::{ARGS, ARGS_SIZE, Reached, Setup, World, fuzz};
use proptest::prelude::*;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;

/// RAM of the VM: the guest needs about half of it for itself.
const RAM: u64 = 40;
/// What it can start with.
const LEAST: u64 = 34;
/// Table indices that everything uses, so that things meet: low, the hypervisor's
/// slots and their neighbours, the direct map, text, last.
const INDICES: [u64; 12] = [0, 1, 2, 3, 255, 256, 257, 271, 273, 300, 510, 511];

#[derive(Clone, Debug)]
enum Op {
    Update {
        cpu: u32,
        gfn: u64,
        i: u64,
        val: u64,
        ad: bool,
    },
    UpdateVa {
        cpu: u32,
        va: u64,
        val: u64,
        flags: u64,
    },
    Pin {
        cpu: u32,
        gfn: u64,
        level: u32,
    },
    Unpin {
        cpu: u32,
        gfn: u64,
    },
    Base {
        cpu: u32,
        gfn: u64,
    },
    UserBase {
        cpu: u32,
        gfn: u64,
    },
    Page {
        cpu: u32,
        to: u64,
        from: Option<u64>,
    },
    Access {
        cpu: u32,
        va: u64,
        write: bool,
        fetch: bool,
    },
    Store {
        cpu: u32,
        va: u64,
        val: u64,
    },
    Emulate {
        cpu: u32,
        va: u64,
        val: u64,
    },
    Copy {
        cpu: u32,
        va: u64,
        len: usize,
        write: bool,
        isolated: bool,
    },
    Poke {
        gfn: u64,
        i: u64,
        val: u64,
    },
    User {
        cpu: u32,
    },
    Leave {
        cpu: u32,
    },
    Revoke {
        gfn: u64,
    },
    DropAll,
    /// The host wants shadow pages.
    Reclaim {
        cpu: u32,
    },
    /// Frames given up, or asked for again.
    Balloon {
        cpu: u32,
        gfns: Vec<u64>,
        back: bool,
    },
    Flush {
        cpu: u32,
        cmd: u32,
        va: u64,
    },
}

fn index() -> impl Strategy<Value = u64> {
    prop_oneof![4 => prop::sample::select(INDICES.to_vec()), 1 => 0u64..512]
}

fn gfn() -> impl Strategy<Value = u64> {
    // The last ones do not exist.
    prop_oneof![20 => 0u64..RAM + 3, 1 => Just(RAM + 3), 1 => Just((1 << 40) - 1)]
}

fn va() -> impl Strategy<Value = u64> {
    let from = |(a, b, c, d): (u64, u64, u64, u64)| {
        let low = a << 39 | b << 30 | c << 21 | d << 12;
        if a & 256 != 0 {
            0xffff_0000_0000_0000 | low
        } else {
            low
        }
    };
    let any = (index(), index(), index(), index()).prop_map(from);
    let around = (index(), index()).prop_map(move |(a, b)| from((a, a, b, b)));
    let same = index().prop_map(move |a| from((a, a, a, a)));
    let known = prop_oneof![
        (0..RAM + 3).prop_map(Guest::direct),
        Just(TEXT),
        Just(USER),
        // A table through the direct map, an entry of it.
        (0..RAM + 3, index()).prop_map(|(g, i)| Guest::direct(g) + 8 * i),
    ];
    // The arguments' own range is not subject to the tables.
    prop_oneof![3 => known, 1 => any, 1 => around, 1 => same]
        .prop_filter("no arguments", |va| Va(*va).index(4) != Va(ARGS).index(4))
}

fn entry() -> impl Strategy<Value = u64> {
    let rights = prop_oneof![
        4 => Just(TABLE),
        2 => Just(KERNEL_RW),
        2 => Just(pte::P | pte::A),
        1 => Just(pte::P | pte::RW),
        1 => Just(TABLE | pte::NX),
        1 => Just(TABLE | pte::PS),
        1 => Just(0),
        1 => any::<u64>().prop_map(|v| v & !pte::FRAME),
    ];
    (gfn(), rights).prop_map(|(gfn, rights)| gfn << 12 & pte::FRAME | rights)
}

fn op() -> impl Strategy<Value = Op> {
    let cpu = || 0u32..2;
    prop_oneof![
        8 => (cpu(), gfn(), index(), entry(), any::<bool>())
            .prop_map(|(cpu, gfn, i, val, ad)| Op::Update { cpu, gfn, i, val, ad }),
        3 => (cpu(), va(), entry(), 0u64..8)
            .prop_map(|(cpu, va, val, flags)| Op::UpdateVa { cpu, va, val, flags }),
        2 => (cpu(), gfn(), 0u32..4).prop_map(|(cpu, gfn, level)| Op::Pin { cpu, gfn, level }),
        1 => (cpu(), gfn()).prop_map(|(cpu, gfn)| Op::Unpin { cpu, gfn }),
        2 => (cpu(), gfn()).prop_map(|(cpu, gfn)| Op::Base { cpu, gfn }),
        2 => (cpu(), gfn()).prop_map(|(cpu, gfn)| Op::UserBase { cpu, gfn }),
        1 => (cpu(), gfn(), prop::option::of(gfn()))
            .prop_map(|(cpu, to, from)| Op::Page { cpu, to, from }),
        10 => (cpu(), va(), any::<bool>(), any::<bool>())
            .prop_map(|(cpu, va, write, fetch)| Op::Access { cpu, va, write, fetch }),
        3 => (cpu(), va(), entry()).prop_map(|(cpu, va, val)| Op::Store { cpu, va, val }),
        3 => (cpu(), va(), entry()).prop_map(|(cpu, va, val)| Op::Emulate { cpu, va, val }),
        2 => (cpu(), va(), 1usize..9000, any::<bool>(), any::<bool>())
            .prop_map(|(cpu, va, len, write, isolated)| Op::Copy { cpu, va, len, write, isolated }),
        4 => (gfn(), index(), entry()).prop_map(|(gfn, i, val)| Op::Poke { gfn, i, val }),
        1 => cpu().prop_map(|cpu| Op::User { cpu }),
        1 => cpu().prop_map(|cpu| Op::Leave { cpu }),
        2 => gfn().prop_map(|gfn| Op::Revoke { gfn }),
        1 => Just(Op::DropAll),
        1 => cpu().prop_map(|cpu| Op::Reclaim { cpu }),
        1 => (cpu(), prop::collection::vec(gfn(), 1..3))
            .prop_map(|(cpu, gfns)| Op::Balloon { cpu, gfns, back: false }),
        1 => (cpu(), gfn()).prop_map(|(cpu, first)| Op::Balloon {
            cpu,
            gfns: (first..first + 20).collect(),
            back: true,
        }),
        1 => (cpu(), prop::sample::select(vec![6u32, 7, 8, 9, 10, 11, 12]), va())
            .prop_map(|(cpu, cmd, va)| Op::Flush { cpu, cmd, va }),
    ]
}

/// A host that now and then takes frames while the core has left.
fn reclaiming(w: &World, seed: u64) {
    let state = Cell::new(seed | 1);
    w.m.set_hook(move |m, _| {
        let s = state
            .get()
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state.set(s);
        if s >> 61 == 0 {
            m.revoke(s >> 33 & 31);
        }
        None
    });
}

fn step(w: &mut World, op: &Op) {
    match *op {
        Op::Update {
            cpu,
            gfn,
            i,
            val,
            ad,
        } => {
            let at = w.m.arg_words(
                0x2_0000,
                &[gfn << 12 | i << 3 | if ad { 2 } else { 0 }, val],
            );
            w.call(cpu, nr::MMU_UPDATE, &[at, 1, 0, 0x7ff0]);
        }
        Op::UpdateVa {
            cpu,
            va,
            val,
            flags,
        } => {
            w.call(cpu, nr::UPDATE_VA_MAPPING, &[va, val, flags]);
        }
        Op::Pin { cpu, gfn, level } => {
            w.mmuext(cpu, mmuext::PIN_L1 + level, gfn, 0);
        }
        Op::Unpin { cpu, gfn } => {
            w.mmuext(cpu, mmuext::UNPIN, gfn, 0);
        }
        Op::Base { cpu, gfn } => {
            w.mmuext(cpu, mmuext::NEW_BASEPTR, gfn, 0);
        }
        Op::UserBase { cpu, gfn } => {
            w.mmuext(cpu, mmuext::NEW_USER_BASEPTR, gfn, 0);
        }
        Op::Page { cpu, to, from } => {
            match from {
                Some(from) => w.mmuext(cpu, mmuext::COPY_PAGE, to, from),
                None => w.mmuext(cpu, mmuext::CLEAR_PAGE, to, 0),
            };
        }
        Op::Access {
            cpu,
            va,
            write,
            fetch,
        } => {
            w.try_access(cpu, va, write && !fetch, fetch);
        }
        Op::Store { cpu, va, val } => {
            if let Reached::Frame(gfn) = w.try_access(cpu, va, true, false) {
                w.m.words(gfn)[(va >> 3) as usize & 511].store(val, SeqCst);
            }
        }
        Op::Emulate { cpu, va, val } => {
            // mov %rax, (%rdi)
            let rip = w.m.arg(0x3_0000, &[0x48, 0x89, 0x07]);
            w.switch_to(cpu);
            if let Err(error) = w.m.walk(Va(va & !7), true, false, true) {
                w.m.cpu().cr2.set(va & !7);
                w.on(cpu, |c| {
                    (c.f.rip, c.f.rax, c.f.rdi) = (rip, val, va & !7);
                    (c.f.vector, c.f.error) = (14, error);
                    c.enter();
                    c.f.rsp = ARGS + ARGS_SIZE;
                });
            }
        }
        Op::Copy {
            cpu,
            va,
            len,
            write,
            isolated,
        } => {
            let mut bytes = vec![0; len];
            let mut read = |isolated: bool| {
                w.on(cpu, |c| {
                    c.fast.isolated = u8::from(isolated);
                    let done = if write {
                        c.copy_out(Va(va), &bytes)
                    } else {
                        c.copy_in(Va(va), &mut bytes)
                    };
                    c.fast.isolated = 0;
                    done
                })
                .map(|()| bytes.clone())
            };
            // The outcome is the guest's business.
            let outcome = read(isolated);
            if !write && outcome.is_ok() {
                // Accessed bits are set now, so the tables do not change by reading, and
                // a core on a root of its own reads what one on the guest's does.
                assert_eq!(read(true), read(false), "{len} bytes at {va:#x}");
            }
        }
        Op::Poke { gfn, i, val } => {
            if gfn < w.setup.frames() {
                w.m.words(gfn)[i as usize].store(val, SeqCst);
            }
        }
        Op::User { cpu } => w.on(cpu, |c| {
            if c.kernel_mode() && c.fast.user_cr3 != 0 {
                c.to_user_mode();
            }
        }),
        Op::Leave { cpu } => {
            // As with a host interrupt.
            w.on(cpu, |c| {
                c.f.vector = 0xfd;
                c.enter();
            });
        }
        Op::Revoke { gfn } => {
            if gfn < w.setup.frames() {
                w.m.revoke(gfn);
                assert_eq!(w.vm.mmu.lock().mapped(&w.m, Gfn(gfn)), 0);
            }
        }
        Op::DropAll => w.vm.mmu.lock().drop_all(&w.m, &w.vm.epochs),
        Op::Reclaim { cpu } => w.reclaim(cpu),
        Op::Balloon {
            cpu,
            ref gfns,
            back,
        } => {
            if back {
                // One by one: a list ends at the first that is not out.
                for &gfn in gfns {
                    let before = w.vm.mmu.lock().out();
                    let done = w.balloon(cpu, nr::memory::POPULATE_PHYSMAP, &[gfn]);
                    let mmu = w.vm.mmu.lock();
                    assert_eq!(mmu.out() + done.cast_unsigned(), before);
                    assert!(done == 0 || mmu.has(Gfn(gfn)));
                }
            } else {
                let done = w.balloon(cpu, nr::memory::DECREASE_RESERVATION, gfns);
                let mmu = w.vm.mmu.lock();
                for &gfn in &gfns[..usize::try_from(done).expect("a count")] {
                    assert!(!mmu.has(Gfn(gfn)) && mmu.mapped(&w.m, Gfn(gfn)) == 0);
                }
            }
        }
        Op::Flush { cpu, cmd, va } => {
            let mask = w.m.arg_words(0x4_0000, &[3]);
            w.mmuext(cpu, cmd, va, mask);
        }
    }
}

proptest! {
    #![proptest_config(fuzz::cases(160))]

    #[test]
    fn no_guest_breaks_a_rule(
        ops in prop::collection::vec(op(), 1..120),
        pool in 20u32..64,
        la57: bool,
        start in prop_oneof![Just(0), LEAST..RAM],
        reclaim in prop::option::of(any::<u64>()),
    ) {
        let (mut w, _) = fuzz::start(Setup { ram: RAM, start, most: 0, pool, vcpus: 2, la57 });
        if let Some(seed) = reclaim {
            reclaiming(&w, seed);
        }
        for op in &ops {
            w.m.log.borrow_mut().clear();
            step(&mut w, op);
            if let Err(e) = w.try_audit() {
                return Err(TestCaseError::fail(format!("{e:?} after {op:?}")));
            }
        }
    }
}

#[test]
fn the_generator_reaches_deep() {
    // The fuzzer is worth something only if guests get far: counted over fixed
    // seeds, most runs must make shadows, leaves and faults.
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    for _ in 0..20 {
        let ops = prop::collection::vec(op(), 80..81)
            .new_tree(&mut runner)
            .expect("a value")
            .current();
        let (mut w, _) = fuzz::start(Setup {
            ram: RAM,
            most: 0,
            start: 0,
            pool: 48,
            vcpus: 2,
            la57: false,
        });
        for op in &ops {
            w.m.log.borrow_mut().clear();
            if let Op::Access {
                cpu,
                va,
                write,
                fetch,
            } = *op
            {
                let at = match w.try_access(cpu, va, write && !fetch, fetch) {
                    Reached::Frame(_) => "reached",
                    Reached::Fault => "guest fault",
                    Reached::Never => "never",
                };
                *seen.entry(at).or_default() += 1;
            } else {
                step(&mut w, op);
            }
            let r = w.audit();
            *seen.entry("leaves").or_default() += r.leaves;
            *seen.entry("freed").or_default() += u64::from(r.free);
            *seen.entry("nodes").or_default() += u64::from(r.nodes);
        }
        *seen.entry("made").or_default() += w.vm.mmu.lock().made;
    }
    for (what, least) in [
        ("reached", 40),
        ("guest fault", 40),
        ("leaves", 1000),
        ("freed", 100),
        ("made", 200),
        ("nodes", 1),
    ] {
        assert!(
            seen.get(what).copied().unwrap_or(0) >= least,
            "{what}: {seen:?}"
        );
    }
}
