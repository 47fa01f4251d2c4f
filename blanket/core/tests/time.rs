//! Clocks, timers and run-states (`public/xen.h`, `public/vcpu.h`).

#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::device::exit;
use blanket_abi::xen::event::{op, virq};
use blanket_abi::xen::hypercall::{self as nr, assist, mmuext, vcpu};
use blanket_abi::xen::shared::{runstate, shared_info, vcpu_info};
use blanket_core::machine::Host;
use blanket_core::vcpu::NEVER;
use common::guest::{EVENT, Guest, KERNEL_RW};
use common::{Setup, World};
use proptest::prelude::*;
use std::sync::atomic::Ordering::SeqCst;

fn world() -> (World, Guest) {
    let (w, g) = World::booted(Setup::default());
    w.m.bytes(w.setup.shared_info())[vcpu_info::MASK as usize].store(0, SeqCst);
    (w, g)
}

fn word(w: &World, gfn: u64, at: u64) -> u64 {
    w.m.words(gfn)[at as usize / 8].load(SeqCst)
}

/// Binds the timer's VIRQ and unmasks it.
fn timer(w: &mut World) -> u64 {
    let at = w.m.arg_words(0, &[u64::from(virq::TIMER), 0]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::BIND_VIRQ, at]), 0);
    let port = w.m.words_at(at + 8, 1)[0] & 0xffff_ffff;
    let at = w.m.arg_words(0, &[port]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::UNMASK, at]), 0);
    port
}

fn fired(w: &World, port: u64) -> bool {
    let bits = word(
        w,
        w.setup.shared_info(),
        shared_info::EVTCHN_PENDING + port / 64 * 8,
    );
    bits >> (port % 64) & 1 != 0
}

fn clear(w: &World, port: u64) {
    let at = (shared_info::EVTCHN_PENDING + port / 64 * 8) as usize / 8;
    w.m.words(w.setup.shared_info())[at].fetch_and(!(1 << (port % 64)), SeqCst);
    w.m.words(w.setup.shared_info())[1].store(0, SeqCst);
}

/// A call of vcpu_op on vCPU 0 with a structure of words.
fn op0(w: &mut World, cmd: u64, words: &[u64]) -> i64 {
    let at = w.m.arg_words(0x400, words);
    w.call(0, nr::VCPU_OP, &[cmd, 0, at])
}

/// What happens when the host enters a vCPU again.
fn reenter(w: &mut World) {
    w.cpu0(|c| {
        c.f.vector = 0xef;
        c.enter();
        c.prepare_return();
    });
}

// ---- clock ----

proptest! {
    #[test]
    fn system_time_is_what_wide_arithmetic_says(
        stamp: u64, time in 0u64..1 << 62, mul: u32, shift in -31i8..32, ticks in 0u64..1 << 62,
    ) {
        let (w, _) = world();
        // What does not fit 64 bits on the way is not a clock.
        let ticks = if shift > 0 { ticks >> shift } else { ticks };
        let p = &w.m.page;
        p.tsc_timestamp.store(stamp, SeqCst);
        p.system_time.store(time, SeqCst);
        p.tsc_mul.store(mul, SeqCst);
        p.tsc_shift.store(shift, SeqCst);
        let mut w = w;
        let clock = w.cpu0(|c| c.m.clock());
        let wide = u128::from(ticks);
        let wide = if shift >= 0 { wide << shift } else { wide >> -shift };
        let want = u128::from(time) + ((wide * u128::from(mul)) >> 32);
        prop_assert_eq!(u128::from(clock.at(stamp.wrapping_add(ticks))), want);
        // Never backwards, and a CPU that lags behind the timestamp shows the timestamp.
        prop_assert!(clock.at(stamp.wrapping_add(ticks + 1)) >= clock.at(stamp.wrapping_add(ticks)));
        prop_assert_eq!(clock.at(stamp.wrapping_sub(1)), time);
        prop_assert_eq!(clock.at(stamp), time);
    }
}

#[test]
fn a_clock_that_is_being_written_does_not_hold_the_core_up() {
    let (mut w, _) = world();
    w.m.page.time_version.store(3, SeqCst);
    w.cpu0(|c| assert_eq!(c.m.clock().version, 3));
}

#[test]
fn time_parameters_reach_both_copies_with_the_version_protocol() {
    let (mut w, _) = world();
    let shared = w.setup.shared_info();
    let read = |w: &World, gfn: u64, at: u64| -> [u64; 4] {
        std::array::from_fn(|i| word(w, gfn, at + 8 * i as u64))
    };
    let first = read(&w, shared, vcpu_info::TIME);
    assert_eq!(first[0] & 1, 0, "even: not being written");
    assert_eq!(
        first[3],
        1 << 31 | 1 << 32 | 1 << 40,
        "multiplier, shift, stable flag"
    );
    assert_eq!(
        op0(
            &mut w,
            vcpu::REGISTER_VCPU_TIME_MEMORY_AREA,
            &[Guest::direct(100) + 64]
        ),
        0
    );
    assert_eq!(read(&w, 100, 64)[1..], first[1..]);

    // The module changes the parameters: both copies follow at the next entry.
    let p = &w.m.page;
    p.tsc_timestamp.store(777, SeqCst);
    p.system_time.store(5_000, SeqCst);
    p.tsc_mul.store(0x8765_4321, SeqCst);
    p.tsc_shift.store(-3, SeqCst);
    p.time_flags.store(0, SeqCst);
    p.time_version.store(4, SeqCst);
    let old = [read(&w, shared, vcpu_info::TIME)[0], read(&w, 100, 64)[0]];
    reenter(&mut w);
    for (i, (gfn, at)) in [(shared, vcpu_info::TIME), (100, 64)]
        .into_iter()
        .enumerate()
    {
        let now = read(&w, gfn, at);
        assert_eq!(now[0], old[i] + 2);
        assert_eq!(now[1..], [777, 5_000, 0x8765_4321 | 0xfd << 32]);
    }
    // Nothing new: nothing is written.
    reenter(&mut w);
    assert_eq!(read(&w, 100, 64)[0], old[1] + 2);
    // And the area goes.
    assert_eq!(op0(&mut w, vcpu::REGISTER_VCPU_TIME_MEMORY_AREA, &[0]), 0);
    w.m.page.time_version.store(6, SeqCst);
    reenter(&mut w);
    assert_eq!(read(&w, 100, 64)[0], old[1] + 2);
}

#[test]
fn the_version_wraps_without_becoming_odd() {
    let (mut w, _) = world();
    let at = vcpu_info::TIME as usize / 8;
    w.m.words(w.setup.shared_info())[at].store(0xffff_fffe, SeqCst);
    w.cpu0(|c| c.publish_time_now());
    assert_eq!(word(&w, w.setup.shared_info(), vcpu_info::TIME), 0);
}

#[test]
fn the_wall_clock_keeps_its_protocol_and_its_upper_half() {
    let (mut w, _) = world();
    let shared = w.setup.shared_info();
    let read = |w: &World| {
        (
            word(w, shared, shared_info::WC_VERSION),
            word(w, shared, shared_info::WC_NSEC),
        )
    };
    let (a, b) = read(&w);
    assert_eq!((a & 1, a >> 32, b), (0, 1_700_000_000, 123_456_789));
    w.m.page.wall_sec.store(5 << 32 | 7, SeqCst);
    w.m.page.wall_nsec.store(999_999_999, SeqCst);
    w.m.page.time_version.store(4, SeqCst);
    reenter(&mut w);
    let (c, d) = read(&w);
    assert_eq!(c, 7 << 32 | ((a & 0xffff_ffff) + 2));
    assert_eq!(d, 5 << 32 | 999_999_999);
}

// ---- timers ----

#[test]
fn a_timer_of_the_past_fires_at_once() {
    let (mut w, _) = world();
    let port = timer(&mut w);
    w.m.log.borrow_mut().clear();
    assert_eq!(op0(&mut w, vcpu::SET_SINGLESHOT_TIMER, &[999, 0]), 0);
    assert!(fired(&w, port));
    assert!(w.m.log.borrow().is_empty(), "nothing to wait for");
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, EVENT);
}

#[test]
fn a_timer_of_the_past_that_must_be_of_the_future_is_refused() {
    let (mut w, _) = world();
    let port = timer(&mut w);
    // VCPU_SSHOTTMR_future: -ETIME, and nothing fires.
    assert_eq!(op0(&mut w, vcpu::SET_SINGLESHOT_TIMER, &[999, 1]), -62);
    assert!(!fired(&w, port));
    assert_eq!(op0(&mut w, vcpu::SET_SINGLESHOT_TIMER, &[1_000_000, 1]), 0);
    assert_eq!(w.m.switch().deadline.load(SeqCst), 1_000_000);
}

#[test]
fn the_world_is_left_only_for_an_earlier_deadline() {
    let (mut w, _) = world();
    let port = timer(&mut w);
    w.m.log.borrow_mut().clear();
    let left = |w: &World| w.m.exits(exit::DEADLINE).len();
    let deadline = |w: &World| w.m.switch().deadline.load(SeqCst);
    for (at, exits) in [
        (50_000, 1),
        (60_000, 1),
        (50_000, 1),
        (40_000, 2),
        (45_000, 2),
    ] {
        assert_eq!(op0(&mut w, vcpu::SET_SINGLESHOT_TIMER, &[at, 0]), 0);
        assert_eq!((left(&w), deadline(&w)), (exits, at), "{at}");
    }
    // Cancelled and set again, still later than what is armed: no exit.
    assert_eq!(op0(&mut w, vcpu::STOP_SINGLESHOT_TIMER, &[]), 0);
    assert_eq!(deadline(&w), NEVER);
    assert_eq!(w.call(0, nr::SET_TIMER_OP, &[55_000]), 0);
    assert_eq!((left(&w), deadline(&w)), (2, 55_000));
    // What was armed has passed: it arms nothing any more.
    w.m.tsc.set(42_000);
    assert_eq!(op0(&mut w, vcpu::SET_SINGLESHOT_TIMER, &[58_000, 0]), 0);
    assert_eq!((left(&w), deadline(&w)), (3, 58_000));
    // It fires when its time has come, and not before.
    w.m.tsc.set(57_999);
    reenter(&mut w);
    assert!(!fired(&w, port));
    w.m.tsc.set(58_000);
    reenter(&mut w);
    assert!(fired(&w, port));
    assert_eq!(deadline(&w), NEVER);
    clear(&w, port);
    reenter(&mut w);
    assert!(!fired(&w, port), "once");
    // Zero cancels.
    assert_eq!(w.call(0, nr::SET_TIMER_OP, &[90_000]), 0);
    assert_eq!(w.call(0, nr::SET_TIMER_OP, &[0]), 0);
    assert_eq!(deadline(&w), NEVER);
}

#[test]
fn periodic_timers_repeat_until_they_are_stopped() {
    let (mut w, _) = world();
    let port = timer(&mut w);
    for bad in [0, 1, 999_999, u64::MAX, 1 << 63] {
        assert_eq!(op0(&mut w, vcpu::SET_PERIODIC_TIMER, &[bad]), -22, "{bad}");
    }
    assert_eq!(op0(&mut w, vcpu::SET_PERIODIC_TIMER, &[10_000_000]), 0);
    let start = w.m.tsc.get();
    for n in 1..5 {
        w.m.tsc.set(start + n * 10_000_000 - 1);
        reenter(&mut w);
        assert!(!fired(&w, port), "{n}");
        w.m.tsc.set(start + n * 10_000_000);
        reenter(&mut w);
        assert!(fired(&w, port), "{n}");
        clear(&w, port);
    }
    assert_eq!(op0(&mut w, vcpu::STOP_PERIODIC_TIMER, &[]), 0);
    w.m.tsc.set(start + 100_000_000);
    reenter(&mut w);
    assert!(!fired(&w, port));
}

#[test]
fn a_late_periodic_timer_starts_its_period_anew() {
    let (mut w, _) = world();
    let port = timer(&mut w);
    assert_eq!(op0(&mut w, vcpu::SET_PERIODIC_TIMER, &[10_000_000]), 0);
    let start = w.m.tsc.get();
    // The host was away for three periods and a half: one event, then a full period,
    // as in Xen (`vcpu_periodic_timer_work`).
    w.m.tsc.set(start + 35_000_000);
    reenter(&mut w);
    assert!(fired(&w, port));
    clear(&w, port);
    assert_eq!(w.m.switch().deadline.load(SeqCst), start + 45_000_000);
    // At the end of time nothing overflows.
    w.m.page.system_time.store(u64::MAX - 1_000, SeqCst);
    w.m.page.tsc_timestamp.store(w.m.tsc.get(), SeqCst);
    reenter(&mut w);
    assert!(fired(&w, port));
    assert_eq!(w.m.switch().deadline.load(SeqCst), NEVER);
}

#[test]
fn blocked_vcpus_wake_at_their_timer() {
    let (mut w, _) = world();
    let port = timer(&mut w);
    assert_eq!(op0(&mut w, vcpu::SET_SINGLESHOT_TIMER, &[70_000, 0]), 0);
    assert_eq!(w.call(0, nr::SCHED_OP, &[nr::sched::BLOCK, 0]), 0);
    assert!(fired(&w, port));
    assert_eq!(w.m.tsc.get(), 70_000);
    let at = w.m.arg_words(0x800, &[0; 6]);
    assert_eq!(w.call(0, nr::VCPU_OP, &[vcpu::GET_RUNSTATE_INFO, 0, at]), 0);
    let r = w.m.words_at(at, 6);
    assert_eq!(r[0], u64::from(runstate::RUNNING));
    assert_eq!(r[1], 70_000, "running since it woke");
    assert_eq!(r[2 + runstate::BLOCKED as usize], 69_000);
}

#[test]
fn polls_end_at_their_limit_or_at_an_event() {
    let (mut w, _) = world();
    let ports = w.m.arg_words(0x100, &[5]);
    let at = w.m.arg_words(0x200, &[ports, 1, 30_000]);
    assert_eq!(w.call(0, nr::SCHED_OP, &[nr::sched::POLL, at]), 0);
    assert_eq!(w.m.tsc.get(), 30_000);
    assert_eq!(w.vm.polling.load(SeqCst), 0);
    // Pending already.
    let index = shared_info::EVTCHN_PENDING as usize / 8;
    w.m.words(w.setup.shared_info())[index].store(1 << 5, SeqCst);
    let at = w.m.arg_words(0x200, &[ports, 1, 0]);
    assert_eq!(w.call(0, nr::SCHED_OP, &[nr::sched::POLL, at]), 0);
    assert_eq!(w.m.tsc.get(), 30_000);
    for (n, port) in [(129, 5), (1, 4096), (1, u64::from(u32::MAX))] {
        let ports = w.m.arg_words(0x100, &[port]);
        let at = w.m.arg_words(0x200, &[ports, n, 0]);
        assert_eq!(w.call(0, nr::SCHED_OP, &[nr::sched::POLL, at]), -22);
    }
}

// ---- run-states ----

#[test]
fn a_runstate_area_may_cross_a_page() {
    let (mut w, mut g) = world();
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    assert_eq!(w.mmuext(0, mmuext::PIN_L4, g.root, 0), 0);
    w.update(0, l1, 0, 90 << 12 | KERNEL_RW);
    w.update(0, l1, 1, 80 << 12 | KERNEL_RW);
    for start in [4096 - 48, 4096 - 40, 4096 - 24, 4096 - 8, 0u64] {
        assert_eq!(
            op0(&mut w, vcpu::REGISTER_RUNSTATE_MEMORY_AREA, &[va + start]),
            0
        );
        w.m.tsc.set(w.m.tsc.get() + 1_000);
        w.cpu0(|c| c.set_runstate(runstate::RUNNING));
        let seen: Vec<u64> = (0..6)
            .map(|i| start + 8 * i)
            .map(|at| {
                if at < 4096 {
                    word(&w, 90, at)
                } else {
                    word(&w, 80, at - 4096)
                }
            })
            .collect();
        let want = w.cpu0(|c| c.runstate_words());
        assert_eq!(seen, want, "at {start}");
        assert_eq!(
            seen[2..].iter().sum::<u64>(),
            w.m.tsc.get(),
            "all time is accounted"
        );
        assert_eq!(seen[1] & runstate::UPDATE, 0);
    }
}

#[test]
fn the_update_mark_is_set_only_while_it_changes() {
    let (mut w, _) = world();
    assert_eq!(
        w.call(0, nr::VM_ASSIST, &[0, assist::RUNSTATE_UPDATE_FLAG]),
        0
    );
    assert_eq!(
        op0(
            &mut w,
            vcpu::REGISTER_RUNSTATE_MEMORY_AREA,
            &[Guest::direct(100)]
        ),
        0
    );
    assert_eq!(op0(&mut w, vcpu::SET_SINGLESHOT_TIMER, &[70_000, 0]), 0);
    // While it sleeps, the area says so.
    let index = 100;
    w.m.set_hook(move |m, e| {
        if e.reason == exit::IDLE {
            let state = m.words(index)[0].load(SeqCst);
            let since = m.words(index)[1].load(SeqCst);
            assert_eq!((state, since), (u64::from(runstate::BLOCKED), 1_000));
        }
        None
    });
    let port = timer(&mut w);
    assert_eq!(w.call(0, nr::SCHED_OP, &[nr::sched::BLOCK, 0]), 0);
    assert!(fired(&w, port));
    assert_eq!(word(&w, 100, 0), u64::from(runstate::RUNNING));
    assert_eq!(word(&w, 100, 8), 70_000);
}

#[test]
fn who_is_taken_off_its_cpu_says_so_and_counts_it_as_stolen() {
    let (mut w, _) = world();
    let area = Guest::direct(100);
    assert_eq!(op0(&mut w, vcpu::REGISTER_RUNSTATE_MEMORY_AREA, &[area]), 0);
    w.m.set_hook(|m, e| {
        let may_wait = matches!(e.reason, exit::INTR | exit::YIELD | exit::BREATH);
        let want = if may_wait {
            runstate::RUNNABLE
        } else {
            runstate::RUNNING
        };
        assert_eq!(m.words(100)[0].load(SeqCst), u64::from(want), "{e:?}");
        m.tsc.set(m.tsc.get() + 5_000);
        None
    });
    let before = w.cpu0(|c| c.runstate_words());
    for (reason, stolen) in [
        (exit::INTR, 5_000),
        (exit::YIELD, 10_000),
        (exit::BREATH, 15_000),
        (exit::DEADLINE, 15_000),
    ] {
        w.cpu0(|c| c.exit(reason, [0; 4]));
        assert_eq!(word(&w, 100, 0), u64::from(runstate::RUNNING));
        let runnable = word(&w, 100, 8 * (2 + u64::from(runstate::RUNNABLE)));
        assert_eq!(
            runnable - before[2 + runstate::RUNNABLE as usize],
            stolen,
            "after exit {reason}"
        );
    }
}

#[test]
fn areas_that_cannot_be_are_refused() {
    let (mut w, _) = world();
    for bad in [
        Guest::direct(100) + 1,
        0x1234_5000,
        0xffff_8000_0000_0000,
        0x8000_0000_0000,
        u64::MAX - 7,
        // The second page is missing.
        0x40_0fe8,
    ] {
        assert!(
            op0(&mut w, vcpu::REGISTER_RUNSTATE_MEMORY_AREA, &[bad]) < 0,
            "{bad:#x}"
        );
        assert!(
            op0(&mut w, vcpu::REGISTER_VCPU_TIME_MEMORY_AREA, &[bad]) < 0,
            "{bad:#x}"
        );
    }
    // Nor does a time area cross a page.
    let va = Guest::direct(100) + 4096 - 24;
    assert!(op0(&mut w, vcpu::REGISTER_VCPU_TIME_MEMORY_AREA, &[va]) < 0);
    for (mfn, offset) in [
        (100, 1),
        (100, 4096 - 56),
        (100, 4096),
        (1 << 30, 0),
        (u64::MAX, 0),
    ] {
        assert!(
            op0(&mut w, vcpu::REGISTER_VCPU_INFO, &[mfn, offset]) < 0,
            "{mfn:#x} {offset}"
        );
    }
    assert_eq!(w.call(0, nr::VCPU_OP, &[vcpu::IS_UP, 1, 0]), -2);
}

// ---- IPIs to oneself ----

fn set_byte(w: &World, field: u64, to: u8) {
    w.m.bytes(w.setup.shared_info())[field as usize].store(to, SeqCst);
}

/// What a guest does in an upcall before it calls the handlers.
fn handled(w: &World, port: u64) {
    set_byte(w, vcpu_info::PENDING, 0);
    clear(w, port);
}

/// Binds an IPI of vCPU 0 and unmasks it.
fn own_ipi(w: &mut World) -> u64 {
    let at = w.m.arg_words(0, &[0]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::BIND_IPI, at]), 0);
    let port = w.m.words_at(at, 1)[0] >> 32;
    let at = w.m.arg_words(0, &[port]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::UNMASK, at]), 0);
    port
}

/// A handler that sends an IPI to its own vCPU, as PREEMPT_RT's RCU does, and takes
/// `handler` ns from the send to its return. Answers how many upcalls came before
/// the interrupted code ran.
fn upcalls_in_a_row(w: &mut World, port: u64, handler: u64) -> u32 {
    const PLACE: u64 = 0xffff_ffff_8120_0005;
    let stack = w.regs[0].rsp;
    for upcalls in 0..100 {
        set_byte(w, vcpu_info::MASK, 1);
        let at = w.m.arg_words(0, &[port]);
        assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::SEND, at]), 0);
        w.m.tsc.set(w.m.tsc.get() + handler);
        w.regs[0].rip = PLACE;
        w.regs[0].rsp = stack;
        set_byte(w, vcpu_info::MASK, 0);
        reenter(w);
        if w.regs[0].rip == PLACE {
            assert!(!fired(w, port));
            return upcalls;
        }
        assert_eq!(w.regs[0].rip, EVENT);
        handled(w, port);
    }
    panic!("nothing but upcalls, with {handler} ns for each");
}

#[test]
fn ipis_to_oneself_let_other_code_run_however_slow_their_handler_is() {
    for handler in [1_000, 90_000, 110_000, 1_000_000, 5_000_000] {
        let (mut w, _) = world();
        let port = own_ipi(&mut w);
        let first = upcalls_in_a_row(&mut w, port, handler);
        assert!(first >= 15, "{first}: two or three are no row");
        // It is late, and not lost.
        w.m.tsc.set(w.m.tsc.get() + 10_000_000);
        reenter(&mut w);
        assert_eq!(w.regs[0].rip, EVENT, "after {handler} ns");
        handled(&w, port);
        // What goes on like that is stopped earlier.
        assert!(upcalls_in_a_row(&mut w, port, handler) <= first);
    }
}

#[test]
fn ipis_to_oneself_from_code_that_gets_on_are_there_at_once() {
    let (mut w, _) = world();
    let port = own_ipi(&mut w);
    for n in 0..1000 {
        let at = w.m.arg_words(0, &[port]);
        assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::SEND, at]), 0);
        w.m.tsc.set(w.m.tsc.get() + 1_000);
        w.regs[0].rip = 0xffff_ffff_8120_0000 + n % 7;
        set_byte(&w, vcpu_info::MASK, 0);
        reenter(&mut w);
        assert_eq!(w.regs[0].rip, EVENT, "send {n}");
        handled(&w, port);
    }
}
