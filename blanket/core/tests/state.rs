//! A VM that stands still is written down, and taken up by another core
//! (`blanket_core::state`).
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::device::{boot_flags, crash, exit, pause};
use blanket_abi::state::{self, VcpuState, VmState, life, mark};
use blanket_abi::xen::hypercall::{self as nr, sched, vcpu};
use blanket_abi::xen::shared::{runstate, shared_info};
use blanket_core::machine::FpuImage;
use blanket_core::vcpu::State;
use common::calls::{op, play};
use common::guest::{Guest, KERNEL_RW, TEXT};
use common::still;
use common::{Setup, World, fuzz};
use proptest::prelude::*;
use std::sync::atomic::Ordering::SeqCst;

/// Another VM with a copy of the memory, taken up.
fn copy(w: &World) -> World {
    let mut boot = w.vm.boot;
    boot.flags |= boot_flags::RESTORE;
    let to = World::new(w.setup, boot);
    for gfn in 0..w.setup.frames() {
        for (to, from) in to.m.words(gfn).iter().zip(w.m.words(gfn)) {
            to.store(from.load(SeqCst), SeqCst);
        }
    }
    to.m.tsc.set(77_000);
    to
}

/// It goes on until each vCPU would return to its guest.
fn resume(w: &mut World) {
    take_up(w);
    let resumed = w.vm.resumed.load(SeqCst);
    for id in (0..w.setup.vcpus).filter(|id| resumed & 1 << id != 0) {
        if w.vm.states[id as usize].get() == State::UP {
            w.on(id, |c| c.prepare_return());
        }
    }
}

fn take_up(w: &mut World) {
    w.cpu0(|c| {
        c.reset_cpu();
        c.resume_vm();
        c.resume_vcpu();
    });
    let resumed = w.vm.resumed.load(SeqCst);
    for id in (1..w.setup.vcpus).filter(|id| resumed & 1 << id != 0) {
        w.on(id, |c| {
            c.reset_cpu();
            c.resume_vcpu();
        });
    }
}

/// All that a core wrote, but what time has changed.
fn written(w: &World) -> Vec<Vec<u64>> {
    let base = w.setup.state_base();
    let mut frames: Vec<Vec<u64>> = (base..base + w.setup.state_frames())
        .map(|gfn| {
            w.m.words(gfn)
                .iter()
                .map(|word| word.load(SeqCst))
                .collect()
        })
        .collect();
    let blank = |frame: &mut Vec<u64>, fields: &[(&str, usize)], name: &str| {
        let at = fields
            .iter()
            .position(|(n, _)| *n == name)
            .expect("a field");
        let first: usize = fields[..at].iter().map(|(_, count)| count).sum();
        frame[first..first + fields[at].1].fill(0);
    };
    for name in ["system_time", "time_offset"] {
        blank(&mut frames[0], VmState::FIELDS, name);
    }
    for id in 0..w.setup.vcpus {
        let frame = &mut frames[state::vcpu_at(id) as usize];
        blank(frame, VcpuState::FIELDS, "runstate");
    }
    frames
}

/// What two cores wrote differently.
fn differences(a: &World, b: &World) -> Vec<String> {
    let mut all = Vec::new();
    for (frame, (a, b)) in written(a).iter().zip(&written(b)).enumerate() {
        for (word, (a, b)) in a.iter().zip(b).enumerate() {
            if a != b {
                all.push(format!("frame {frame} word {word}: {a:#x} and {b:#x}"));
            }
        }
    }
    all
}

fn vcpu_record(w: &World, id: u32) -> VcpuState {
    let frame = w.m.words(w.setup.state_base() + state::vcpu_at(id));
    let mut words = [0; VcpuState::WORDS];
    for (word, from) in words.iter_mut().zip(frame) {
        *word = from.load(SeqCst);
    }
    VcpuState::from_words(&words)
}

#[test]
fn a_vm_goes_on_in_another_core() {
    let (mut w, g) = fuzz::start(Setup {
        vcpus: 3,
        ..Setup::default()
    });
    // vCPU 2 has started, and is down.
    w.vm.states[2].set(State::RAW);
    let image = FpuImage([0x5a; 4096]);
    let mut header = image.clone();
    header.0[512..576].fill(0);
    header.0[512] = 7;
    *w.m.cpus[0].fpu.borrow_mut() = Some(header.clone());
    for regs in &mut w.regs {
        (regs.cs, regs.ss, regs.rflags) = (0xe033, 0xe02b, 0x202);
    }
    w.regs[0].rip = TEXT + 0x77;
    w.regs[0].r12 = 0x1234;
    w.regs[1].rax = 0x5678;
    w.on(0, |c| {
        c.m.be(0);
        use blanket_core::machine::Cpu;
        c.m.set_fs_base(0x7f00_0000_1000);
        c.m.set_gs_base(0xffff_8880_0000_5000);
    });
    assert_eq!(w.mmuext(0, nr::mmuext::PIN_L4, g.user_root, 0), 0);
    let given = g.stack + 20;
    assert_eq!(w.balloon(0, nr::memory::DECREASE_RESERVATION, &[given]), 1);

    assert_eq!(still::stand(&mut w, &[pause::VM]), [0, 0, 0]);
    let record = vcpu_record(&w, 0);
    assert_eq!(record.life, life::UP);
    assert_eq!(record.frame[0], TEXT + 0x77);
    assert_eq!(vcpu_record(&w, 2).life, life::RAW);
    // It goes on here, too.
    assert_eq!(w.access(0, TEXT, false, true), Some(g.text));

    let mut there = copy(&w);
    resume(&mut there);
    assert_eq!(there.regs[0].rip, TEXT + 0x77);
    assert_eq!(there.regs[0].r12, 0x1234);
    assert_eq!(there.regs[1].rax, 0x5678);
    assert_eq!(there.m.cpus[0].fs.get(), 0x7f00_0000_1000);
    assert_eq!(there.m.cpus[0].gs.get(), 0xffff_8880_0000_5000);
    assert_eq!(*there.m.cpus[0].fpu.borrow(), Some(header));
    assert_eq!(there.vm.states[2].get(), State::RAW);
    assert_eq!(there.access(0, TEXT, false, true), Some(g.text));
    assert_eq!(
        there.access(1, Guest::direct(given), false, false),
        None,
        "it was given up"
    );
    // A table is still one: the guest's own write to it is followed.
    let table = g.user_root;
    assert!(there.vm.mmu.lock().mark_of(blanket_abi::Gfn(table)) & mark::LEVELS != 0);
    there.audit();
}

#[test]
fn system_time_goes_on_from_where_it_was() {
    let (mut w, _) = World::booted(Setup::default());
    w.m.tsc.set(5_000_000);
    assert_eq!(w.call(0, nr::SET_TIMER_OP, &[6_000_000]), 0);
    assert_eq!(still::stand(&mut w, &[pause::VM]), [0, 0]);
    let frame = w.m.words(w.setup.state_base());
    let at = |name: &str| {
        VmState::FIELDS
            .iter()
            .take_while(|(n, _)| *n != name)
            .map(|(_, count)| count)
            .sum::<usize>()
    };
    assert_eq!(frame[at("system_time")].load(SeqCst), 5_000_000);
    for host_now in [77_000u64, 9_000_000_000] {
        let mut there = copy(&w);
        there.m.tsc.set(host_now);
        let offset = 5_000_000u64.wrapping_sub(host_now);
        there.m.words(w.setup.state_base())[at("time_offset")].store(offset, SeqCst);
        resume(&mut there);
        assert_eq!(there.cpu0(|c| c.now()), 5_000_000);
        // The timer, in the host's time.
        use blanket_core::machine::Host;
        let deadline = there.m.switch().deadline.load(SeqCst);
        assert_eq!(deadline, host_now + 1_000_000);
        // The wall clock is the host's: at guest time 0 it was `offset` later.
        let words = there.m.words(there.setup.shared_info());
        let sec = words[shared_info::WC_VERSION as usize / 8].load(SeqCst) >> 32;
        let nsec = words[shared_info::WC_NSEC as usize / 8].load(SeqCst) & 0xffff_ffff;
        let host = 1_700_000_000_123_456_789i128;
        assert_eq!(
            i128::from(sec) * 1_000_000_000 + i128::from(nsec),
            host - i128::from(offset.cast_signed())
        );
    }
}

#[test]
fn a_sleep_is_given_up_for_it() {
    let (mut w, _) = World::booted(Setup::default());
    w.m.page.pause.store(pause::NONE, SeqCst);
    w.m.set_hook(|m, e| {
        (e.reason == exit::IDLE).then(|| {
            m.page.pause.store(pause::VCPUS, SeqCst);
            m.kick(0);
            0
        })
    });
    assert_eq!(w.call(0, nr::SCHED_OP, &[sched::BLOCK, 0]), 0);
    assert_eq!(w.m.exits(exit::IDLE).len(), 1);
    w.m.clear_hook();
    assert_eq!(still::stand(&mut w, &[pause::VM]), [0, 0]);
}

#[test]
fn the_time_away_is_stolen_time() {
    let (mut w, _) = World::booted(Setup::default());
    w.m.tsc.set(10_000);
    assert_eq!(still::stand(&mut w, &[pause::VM]), [0, 0]);
    let mut there = copy(&w);
    there.m.tsc.set(25_000);
    resume(&mut there);
    let words = there.cpu0(|c| c.runstate_words());
    assert_eq!(words[0], u64::from(runstate::RUNNING));
    assert_eq!(words[2 + runstate::RUNNABLE as usize], 15_000);
}

#[test]
fn a_vcpu_that_never_ran_starts_there() {
    let (mut w, g) = World::booted(Setup {
        vcpus: 2,
        ..Setup::default()
    });
    // Initialised, not up: as `VCPUOP_initialise` leaves it.
    {
        let mut v = w.vm.vcpus[1].lock();
        v.start = Some(blanket_core::vcpu::Start {
            regs: {
                let mut regs = [0; 25];
                regs[16] = TEXT + 0x20;
                regs[19] = common::ARGS + common::ARGS_SIZE;
                regs
            },
            bases: [0; 3],
            kernel_root: blanket_abi::Gfn(g.root),
            user_root: None,
        });
    }
    w.vm.states[1].set(State::DOWN);
    assert_eq!(still::stand(&mut w, &[pause::VM]), [0, 0]);
    assert_eq!(vcpu_record(&w, 1).life, life::INITIALISED);
    let mut there = copy(&w);
    resume(&mut there);
    assert_eq!(there.vm.states[1].get(), State::DOWN);
    assert_eq!(there.call(0, nr::VCPU_OP, &[vcpu::UP, 1, 0]), 0);
    there.on(1, |c| {
        c.reset_cpu();
        c.start();
    });
    assert_eq!(there.regs[1].rip, TEXT + 0x20);
}

#[test]
fn what_is_no_state_is_refused() {
    let (mut w, _) = World::booted(Setup::default());
    assert_eq!(still::stand(&mut w, &[pause::VM]), [0, 0]);
    let first = w.setup.state_base();
    let vcpu = first + state::vcpu_at(0);
    let field = |fields: &[(&str, usize)], name: &str| -> usize {
        fields
            .iter()
            .take_while(|(n, _)| *n != name)
            .map(|(_, count)| count)
            .sum()
    };
    let of_vm = |name| (first, field(VmState::FIELDS, name));
    let of_vcpu = |name| (vcpu, field(VcpuState::FIELDS, name));
    for ((gfn, at), bad, word) in [
        (of_vm("version"), state::VERSION + 1, "its version"),
        (of_vm("nr_vcpus"), 2, "the size of the VM"),
        (of_vm("ram_frames"), 4, "the size of the VM"),
        (of_vm("grant_frames"), 1 << 40, "grant table"),
        (of_vcpu("life"), 9, "a vCPU's life"),
        (of_vcpu("life"), life::RAW, "never ran"),
        (of_vcpu("roots"), 1 << 40, "a kernel's root"),
        (of_vcpu("info"), 1 << 60 | 1, "a place"),
        (of_vcpu("info"), 0, "no vcpu_info"),
        (of_vcpu("traps"), 0xffff_8000_0000_0000, "a handler"),
        (of_vcpu("callbacks"), 1 << 47, "a handler"),
        (of_vcpu("gdt_entries"), 1 << 20, "a GDT"),
        (of_vcpu("bases"), 1 << 62, "a segment's base"),
        (of_vcpu("kernel_mode"), 2, "its mode"),
        (of_vcpu("kernel_mode"), 0, ""),
        (of_vcpu("debug"), 0xffff_8000_0000_0000, "a debug register"),
        (of_vcpu("xcr0"), 4, "XCR0"),
        (of_vcpu("fpu"), 512, "an FPU"),
        (of_vcpu("period"), 1, "a timer's period"),
        ((first + 1, 5), 0xff, "a port"),
    ] {
        let mut there = copy(&w);
        there.m.words(gfn)[at].store(bad, SeqCst);
        if word.is_empty() {
            resume(&mut there);
            continue;
        }
        let crash = there.crashes(|c| {
            c.reset_cpu();
            c.resume_vm();
            c.resume_vcpu();
        });
        assert_eq!(crash.why, crash::GUEST, "{word}");
        assert!(crash.text.contains(word), "{word}: {}", crash.text);
    }
    // An FPU that the CPU itself refuses.
    let mut there = copy(&w);
    there.m.cpus[0].fpu_refused.set(true);
    let crash = there.crashes(|c| {
        c.reset_cpu();
        c.resume_vm();
        c.resume_vcpu();
    });
    assert!(
        crash.text.contains("this CPU cannot have"),
        "{}",
        crash.text
    );
    // A VM without room for it.
    let mut boot = w.vm.boot;
    boot.state_frames -= 1;
    let mut there = World::new(w.setup, boot);
    let crash = there.crashes(|c| c.resume_vm());
    assert!(crash.text.contains("its frames"), "{}", crash.text);
}

proptest! {
    #![proptest_config(fuzz::cases(60))]

    /// Whatever a guest has done: what another core writes down is what it took up.
    #[test]
    fn taken_up_and_written_down_is_the_same(
        ops in prop::collection::vec(op(), 1..40),
        la57: bool,
    ) {
        let (mut w, _) = fuzz::start(Setup { vcpus: 3, la57, ..Setup::default() });
        let done = play(&mut w, &ops, 0, |_, _| ()).map_err(TestCaseError::fail)?;
        if done < ops.len() {
            // Its guest has ended.
            return Ok(());
        }
        w.m.clear_hook();
        w.m.page.pause.store(pause::NONE, SeqCst);
        for regs in &mut w.regs {
            // As the CPU has them at CPL 3.
            regs.cs = 0xe033;
            regs.ss = 0xe02b;
            regs.rflags = 0x202;
        }
        let Some(said) = still::lives(&mut w, |w| still::stand(w, &[pause::VM])) else {
            return Ok(());
        };
        prop_assert!(said.iter().all(|word| *word == 0), "{said:?}");
        let mut there = copy(&w);
        // No further: what waits for the guest must be what waited there.
        take_up(&mut there);
        there.audit();
        if still::lives(&mut there, |w| still::stand(w, &[pause::VM])).is_none() {
            return Ok(());
        }
        let other = differences(&there, &w);
        prop_assert!(other.is_empty(), "{other:?}");
    }

    /// Any word of a state may be anything.
    #[test]
    fn a_changed_state_breaks_nothing(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), prop_oneof![
            any::<u64>(), 0u64..200, (0u64..200).prop_map(|gfn| gfn << 12 | 1),
            Just(KERNEL_RW), Just(u64::MAX),
        ]), 1..6),
    ) {
        let (mut w, _) = fuzz::start(Setup { vcpus: 2, ..Setup::default() });
        still::stand(&mut w, &[pause::VM]);
        let mut there = copy(&w);
        let (base, frames) = (w.setup.state_base(), w.setup.state_frames() as usize);
        for (frame, word, value) in changes {
            let frame = base + frame.index(frames) as u64;
            there.m.words(frame)[word.index(512)].store(value, SeqCst);
        }
        let run = std::panic::AssertUnwindSafe(|| resume(&mut there));
        if std::panic::catch_unwind(run).is_err() {
            let crash = there.m.crashed.borrow_mut().take();
            let crash = crash.expect("no report of the core's");
            prop_assert_eq!(crash.why, crash::GUEST);
        } else {
            there.audit();
        }
    }
}
