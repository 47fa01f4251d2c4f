//! The table of the ABI and the dispatcher cannot disagree: every row is asked
//! for, and so is everything that has none.

mod common;

use blanket_abi::device::exit;
use blanket_abi::xen::errno::{EINVAL, ENOSYS, EPERM};
use blanket_abi::xen::hypercall as nr;
use blanket_abi::xen::shared::guest_context as gc;
use blanket_core::hypercall::coverage::{Row, Status, TABLE_ROWS};
use common::guest::{EVENT, FAILSAFE, Guest, KERNEL_RW, SYSCALL, TEXT};
use common::{ARGS, ARGS_SIZE, Setup, World};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering::SeqCst;

const SELF: u64 = 0x7ff0;

fn world() -> (World, Guest) {
    World::booted(Setup {
        vcpus: 2,
        ..Setup::default()
    })
}

/// A context with which Linux would start a second vCPU.
fn ap_context(w: &World, g: &Guest) -> u64 {
    let at = 0x8_0000;
    w.m.arg(at, &vec![0; gc::SIZE]);
    let put = |field: u64, val: u64| w.m.arg_words(at + field, &[val]);
    put(gc::FLAGS, nr::vgcf::IN_KERNEL);
    put(gc::USER_REGS + 16 * 8, TEXT);
    put(gc::USER_REGS + 17 * 8, 0x10);
    put(gc::USER_REGS + 18 * 8, 0x1000);
    put(gc::USER_REGS + 19 * 8, ARGS + ARGS_SIZE / 2);
    put(gc::KERNEL_SP, ARGS + ARGS_SIZE / 2);
    put(gc::EVENT_CALLBACK, EVENT);
    put(gc::FAILSAFE_CALLBACK, FAILSAFE);
    put(gc::CTRLREG + 3 * 8, g.root << 12);
    ARGS + at
}

/// Asks for a row with arguments that a well-behaved guest might give, and returns
/// the answer. Whatever must come first is done first.
#[allow(clippy::too_many_lines, reason = "one line for each call of the ABI")]
fn ask(w: &mut World, g: &Guest, call: u64, sub: Option<u64>) -> i64 {
    let s = sub.unwrap_or(0);
    let ptr = |w: &World, words: &[u64]| w.m.arg_words(0, words);
    let frame = Guest::direct(100);
    // Calls with a command take it first and a pointer second.
    let with = |w: &mut World, words: &[u64]| {
        let at = w.m.arg_words(0, words);
        w.call(0, call, &[s, at])
    };
    let vcpu = |w: &mut World, id: u64, words: &[u64]| {
        let at = w.m.arg_words(0, words);
        w.call(0, call, &[s, id, at])
    };
    let port = |w: &mut World, op: u64, words: &[u64], out: usize| {
        let at = w.m.arg_words(0x100, words);
        assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op, at]), 0);
        let bytes = w.m.args_at(at, 16);
        u64::from(u32::from_le_bytes(
            bytes[4 * out..][..4].try_into().expect("four bytes"),
        ))
    };
    match (call, s) {
        (nr::SET_TRAP_TABLE, _) => {
            let at = ptr(w, &[3, TEXT, 0, 0]);
            w.call(0, call, &[at])
        }
        (nr::MMU_UPDATE, _) => w.update(0, 100, 0, 0),
        (nr::SET_GDT, _) => {
            let at = ptr(w, &[100]);
            w.call(0, call, &[at, 16])
        }
        (nr::STACK_SWITCH, _) => w.call(0, call, &[0xe02b, ARGS + ARGS_SIZE]),
        (nr::SET_CALLBACKS, _) => w.call(0, call, &[EVENT, FAILSAFE, SYSCALL]),
        (nr::SET_DEBUGREG, _) => w.call(0, call, &[0, TEXT]),
        (nr::GET_DEBUGREG, _) => w.call(0, call, &[6]),
        (nr::UPDATE_DESCRIPTOR, _) => w.call(0, call, &[100 << 12 | 8, 0x00af_fb00_0000_ffff]),
        (nr::MEMORY_OP, nr::memory::DECREASE_RESERVATION | nr::memory::POPULATE_PHYSMAP) => {
            let list = w.m.arg_words(0x100, &[100, 101]);
            with(w, &[list, 2, 0, SELF])
        }
        (nr::MEMORY_OP, nr::memory::MEMORY_MAP) => with(w, &[16, ARGS + 0x100]),
        (nr::MULTICALL | nr::IRET, _) => {
            // Only as a call of its own: through the registers.
            let at = match call {
                nr::MULTICALL => ptr(w, &[nr::XEN_VERSION, 1, 0, 0, 0, 0, 0, 0]),
                _ => ptr(
                    w,
                    &[0x5a, 0, 0, 0, TEXT, 0xe030, 0x202, ARGS + ARGS_SIZE, 0xe02b],
                ),
            };
            w.cpu0(|c| {
                (c.f.rax, c.f.rdi, c.f.rsi, c.f.rsp) = (call, at, 1, at);
                c.hypercall();
                c.f.rax.cast_signed()
            })
        }
        (nr::UPDATE_VA_MAPPING, _) => w.call(0, call, &[frame, 100 << 12 | KERNEL_RW, 2]),
        (nr::SET_TIMER_OP, _) => w.call(0, call, &[1 << 40]),
        (nr::CONSOLE_IO, _) => w.call(0, call, &[s, 5, ARGS]),
        (nr::GRANT_TABLE_OP, 8) => {
            let at = ptr(w, &[1]);
            w.call(0, call, &[s, at, 1])
        }
        (nr::GRANT_TABLE_OP, _) => {
            let at = ptr(w, &[SELF | 1 << 32, 0, ARGS + 0x100, 0, 0]);
            w.call(0, call, &[s, at, 1])
        }
        (nr::VM_ASSIST, _) => w.call(0, call, &[0, nr::assist::WRITABLE_PAGETABLES]),
        (nr::VCPU_OP, nr::vcpu::INITIALISE) => {
            let at = ap_context(w, g);
            w.call(0, call, &[s, 1, at])
        }
        (nr::VCPU_OP, nr::vcpu::UP | nr::vcpu::DOWN) => {
            let at = ap_context(w, g);
            assert_eq!(w.call(0, call, &[nr::vcpu::INITIALISE, 1, at]), 0);
            w.call(0, call, &[s, 1, 0])
        }
        (nr::VCPU_OP, nr::vcpu::REGISTER_VCPU_INFO) => vcpu(w, 0, &[100, 64]),
        (
            nr::VCPU_OP,
            nr::vcpu::REGISTER_RUNSTATE_MEMORY_AREA | nr::vcpu::REGISTER_VCPU_TIME_MEMORY_AREA,
        ) => vcpu(w, 0, &[frame]),
        (nr::VCPU_OP, nr::vcpu::SET_PERIODIC_TIMER) => vcpu(w, 0, &[10_000_000]),
        (nr::VCPU_OP, _) => vcpu(w, 0, &[1 << 40, 0]),
        (nr::SET_SEGMENT_BASE, _) => w.call(0, call, &[0, TEXT]),
        (nr::MMUEXT_OP, _) => w.mmuext(0, nr::mmuext::INVLPG_LOCAL, TEXT, 0),
        (nr::SCHED_OP, nr::sched::BLOCK) => {
            // An event waits already.
            w.m.words(w.setup.shared_info())[0].fetch_or(1, SeqCst);
            with(w, &[0])
        }
        (nr::SCHED_OP, nr::sched::POLL) => {
            let ports = w.m.arg_words(0x100, &[5]);
            with(w, &[ports, 1, 1 << 20])
        }
        (nr::CALLBACK_OP, nr::callback::UNREGISTER) => {
            with(w, &[u64::from(nr::callback::SYSENTER)])
        }
        (nr::CALLBACK_OP, _) => with(w, &[u64::from(nr::callback::SYSENTER), TEXT]),
        (nr::EVENT_CHANNEL_OP, 0) => {
            let remote = port(w, 6, &[SELF | SELF << 16], 1);
            with(w, &[SELF | remote << 32, 0])
        }
        (nr::EVENT_CHANNEL_OP, 1) => with(w, &[1, 0]),
        (nr::EVENT_CHANNEL_OP, 3 | 4 | 9) => {
            let p = port(w, 7, &[0], 1);
            with(w, &[p])
        }
        (nr::EVENT_CHANNEL_OP, 5) => {
            let p = port(w, 7, &[0], 1);
            with(w, &[SELF | p << 32, 0, 0])
        }
        (nr::EVENT_CHANNEL_OP, 6) => with(w, &[SELF]),
        (nr::EVENT_CHANNEL_OP, 8) => {
            let p = port(w, 6, &[SELF], 1);
            with(w, &[p | 1 << 32])
        }
        (nr::EVENT_CHANNEL_OP, 10) => with(w, &[SELF]),
        (nr::PHYSDEV_OP, _) => with(w, &[1]),
        // The others take a command and a pointer, or nothing at all.
        _ => with(w, &[0; 32]),
    }
}

fn name(row: &Row) -> String {
    format!(
        "{} {:?} {}",
        nr::name(row.call).unwrap_or("?"),
        row.sub,
        row.name
    )
}

#[test]
fn what_the_table_has_works_and_what_it_refuses_fails() {
    for row in TABLE_ROWS {
        let (mut w, g) = world();
        let answer = ask(&mut w, &g, row.call, row.sub);
        match row.status {
            Status::Full | Status::Partial => {
                assert!(answer >= 0, "{}: {answer}", name(row));
            }
            Status::Refused if row.call == nr::GRANT_TABLE_OP && answer == 0 => {
                // The call succeeds and each operand has a status that says no.
                let at = match row.sub {
                    Some(0) => 18,
                    Some(1 | 7) => 20,
                    Some(4) => 16,
                    Some(5) => 36,
                    Some(9) => 6,
                    other => panic!("grant operation {other:?} has no status"),
                };
                let status =
                    i16::from_le_bytes(w.m.args_at(ARGS + at, 2).try_into().expect("two bytes"));
                assert!(status < 0, "{}: status {status}", name(row));
            }
            Status::Refused => {
                assert!(
                    [ENOSYS, EPERM, EINVAL].contains(&answer),
                    "{}: {answer}",
                    name(row)
                );
            }
        }
        w.audit();
    }
}

#[test]
fn refusals() {
    let mut known: BTreeMap<u64, BTreeSet<Option<u64>>> = BTreeMap::new();
    for row in TABLE_ROWS {
        assert!(
            known.entry(row.call).or_default().insert(row.sub),
            "{} is there twice",
            name(row)
        );
    }
    let (mut w, _) = world();
    let mut asked = 0;
    for call in 0..nr::COUNT {
        let rows = known.get(&call);
        if rows.is_some_and(|r| r.contains(&None)) {
            assert_eq!(
                rows.map(BTreeSet::len),
                Some(1),
                "call {call} has a row for all commands"
            );
            continue;
        }
        for sub in (0..40).chain([u64::from(u32::MAX), u64::MAX]) {
            if rows.is_some_and(|r| r.contains(&Some(sub))) {
                continue;
            }
            let at = w.m.arg_words(0, &[0; 32]);
            // vcpu_op has the vCPU second, grant_table_op and console_io a count.
            let args = match call {
                nr::VCPU_OP => [sub, 0, at],
                nr::GRANT_TABLE_OP => [sub, at, 1],
                nr::CONSOLE_IO => [sub, 1, at],
                _ => [sub, at, at],
            };
            assert_eq!(w.call(0, call, &args), ENOSYS, "{:?} {sub}", nr::name(call));
            asked += 1;
        }
    }
    assert!(asked > 500, "only {asked} calls without a row");
    for call in [48, 49, 55, 63, 64, 256, 1 << 32, u64::MAX] {
        assert_eq!(w.call(0, call, &[]), ENOSYS, "{call:#x}");
    }
    assert!(w.m.exits(exit::CRASH).is_empty());
}

#[test]
fn every_number_of_the_abi_has_a_row() {
    for call in 0..nr::COUNT {
        if nr::name(call).is_some() {
            assert!(TABLE_ROWS.iter().any(|r| r.call == call), "{call}");
        }
    }
}

#[test]
fn rows_name_tests_that_exist_and_say_why() {
    for row in TABLE_ROWS {
        assert!(
            ["lab: boot", "lab: abi-test", "core: coverage"].contains(&row.test),
            "{}: {}",
            name(row),
            row.test
        );
        assert_eq!(
            row.status == Status::Full,
            row.why.is_empty(),
            "{}: {:?}",
            name(row),
            row.why
        );
    }
}

#[test]
fn multicalls_do_not_nest() {
    let (mut w, _) = world();
    assert_eq!(w.call(0, nr::MULTICALL, &[ARGS, 1]), EINVAL);
    let at = w.m.arg_words(
        0,
        &[
            nr::MULTICALL,
            7,
            ARGS,
            1,
            0,
            0,
            0,
            0,
            nr::XEN_VERSION,
            7,
            7,
            0,
            0,
            0,
            0,
            0,
        ],
    );
    w.cpu0(|c| {
        (c.f.rax, c.f.rdi, c.f.rsi) = (nr::MULTICALL, at, 2);
        c.hypercall();
        assert_eq!(c.f.rax, 0);
    });
    let out = w.m.words_at(at, 16);
    assert_eq!((out[1].cast_signed(), out[9]), (EINVAL, 4096));
}
