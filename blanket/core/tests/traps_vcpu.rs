//! vCPUs come up, go down and share a VM (`public/vcpu.h`), and none of them
//! keeps the CPU from the host.
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::device::{Boot, crash, exit, pending};
use blanket_abi::xen::event::op;
use blanket_abi::xen::hypercall::{self as nr, mmuext, vcpu, vgcf};
use blanket_abi::xen::shared::{guest_context as gc, runstate, shared_info, vcpu_info};
use blanket_core::machine::{Cpu, Host};
use blanket_core::vcpu::{State, rflags};
use common::guest::{EVENT, FAILSAFE, Guest, TEXT, handler};
use common::{ARGS, ARGS_SIZE, FakeMachine, Setup, World};
use std::sync::atomic::Ordering::SeqCst;

/// Where the second vCPU's context and its stack are.
const CONTEXT: u64 = 0x8_0000;
const STACK: u64 = ARGS + 0xa_0000;

fn world() -> (World, Guest) {
    World::booted(Setup {
        vcpus: 3,
        ..Setup::default()
    })
}

fn put(m: &FakeMachine, field: u64, val: u64) {
    m.arg_words(CONTEXT + field, &[val]);
}

/// The context that Linux makes for a second vCPU (xen-pv-abi, 3).
fn context(w: &World, g: &Guest) -> u64 {
    let m = &w.m;
    m.arg(CONTEXT, &vec![0; gc::SIZE]);
    put(m, gc::FLAGS, vgcf::IN_KERNEL);
    for i in 0..15 {
        put(m, gc::USER_REGS + 8 * i, 0x1000 + i);
    }
    let reg = |i: u64, val: u64| put(m, gc::USER_REGS + 8 * i, val);
    reg(16, TEXT + 0x20);
    reg(17, 0x10);
    reg(18, 0x1000);
    reg(19, STACK);
    reg(20, 0x18);
    reg(21, 0x2b);
    reg(22, 0x2b);
    put(m, gc::TRAP_CTXT, 0);
    put(m, gc::TRAP_CTXT + 14 * 16, 14 | 4 << 8);
    put(m, gc::TRAP_CTXT + 14 * 16 + 8, handler(14));
    put(m, gc::GDT_FRAMES, 100);
    put(m, gc::GDT_ENTS, 16);
    put(m, gc::KERNEL_SS, 0x18);
    put(m, gc::KERNEL_SP, STACK);
    put(m, gc::CTRLREG + 3 * 8, g.root << 12);
    put(m, gc::EVENT_CALLBACK, EVENT);
    put(m, gc::FAILSAFE_CALLBACK, FAILSAFE);
    put(m, gc::GS_BASE_KERNEL, 0xffff_8880_0001_0000);
    ARGS + CONTEXT
}

fn initialise(w: &mut World, id: u64) -> i64 {
    w.call(0, nr::VCPU_OP, &[vcpu::INITIALISE, id, ARGS + CONTEXT])
}

#[test]
fn a_second_vcpu_starts_as_its_context_says() {
    let (mut w, g) = world();
    context(&w, &g);
    // A code segment in the guest's table.
    w.m.words(100)[2].store(0x00af_9b00_0000_ffff, SeqCst);
    assert_eq!(w.call(0, nr::VCPU_OP, &[vcpu::IS_UP, 1, 0]), 0);
    assert_eq!(
        w.call(0, nr::VCPU_OP, &[vcpu::UP, 1, 0]),
        -22,
        "not initialised"
    );
    assert_eq!(initialise(&mut w, 1), 0);
    assert_eq!(initialise(&mut w, 1), -17, "once");
    assert_eq!(initialise(&mut w, 0), -17, "not itself");
    assert_eq!(initialise(&mut w, 3), -2, "nor one that does not exist");
    assert_eq!(w.vm.states[1].get(), State::DOWN);
    w.m.log.borrow_mut().clear();
    assert_eq!(w.call(0, nr::VCPU_OP, &[vcpu::UP, 1, 0]), 0);
    assert_eq!(w.m.exits(exit::KICK)[0].args[0], 1 << 1);
    w.on(1, |c| {
        c.reset_cpu();
        c.start();
        c.prepare_return();
    });
    let f = w.regs[1];
    assert_eq!((f.rip, f.cs, f.rsp, f.ss), (TEXT + 0x20, 0x13, STACK, 0x1b));
    assert_eq!(f.rflags, rflags::IF | rflags::ONE);
    assert_eq!((f.r15, f.rax, f.rdi), (0x1000, 0x100a, 0x100e));
    w.switch_to(1);
    let cpu = w.m.cpu();
    assert_eq!((cpu.gs.get(), cpu.kgs.get()), (0xffff_8880_0001_0000, 0));
    assert_eq!(
        w.m.descriptor(0x10),
        0x00af_fb00_0000_ffff,
        "privilege level 3"
    );
    assert_eq!(cpu.selectors.get()[..2], [0x2b, 0x2b]);
    let at = shared_info::VCPU_INFO + vcpu_info::SIZE + vcpu_info::PENDING;
    let info = w.m.words(w.setup.shared_info())[at as usize / 8].load(SeqCst);
    assert_eq!(info >> 8 & 0xff, 1, "events are masked");
    assert_eq!(w.access(1, TEXT, false, true), Some(g.text));
    w.audit();
}

#[test]
fn contexts_that_cannot_be_are_refused_and_leave_nothing() {
    let (mut w, g) = world();
    let frames = w.setup.frames();
    for (field, bad) in [
        (gc::FLAGS, 0),
        (gc::TRAP_CTXT + 8, 0xffff_8000_0000_0000),
        (gc::TRAP_CTXT + 255 * 16 + 8, 0x8000_0000_0000),
        (gc::LDT_ENTS, 1),
        (gc::GDT_ENTS, 14 * 512 + 1),
        (gc::GDT_ENTS, u64::MAX),
        (gc::GDT_FRAMES, frames),
        (gc::GDT_FRAMES, u64::MAX),
        (gc::CTRLREG + 3 * 8, frames << 12),
        (gc::CTRLREG + 3 * 8, u64::MAX),
        (gc::CTRLREG + 8, frames << 12),
        (gc::EVENT_CALLBACK, 0x8000_0000_0000),
        (gc::GS_BASE_KERNEL, 0x8000_0000_0000),
        (gc::FS_BASE, 1 << 63),
    ] {
        context(&w, &g);
        put(&w.m, field, bad);
        assert_eq!(initialise(&mut w, 1), -22, "field {field} = {bad:#x}");
        assert_eq!(w.vm.states[1].get(), State::RAW);
    }
    // A structure that cannot be read.
    for at in [0, 0x1234_5000, u64::MAX - 100, 0xffff_8000_0000_0000] {
        assert_eq!(w.call(0, nr::VCPU_OP, &[vcpu::INITIALISE, 1, at]), -14);
    }
    context(&w, &g);
    assert_eq!(initialise(&mut w, 1), 0);
}

/// A second vCPU that runs.
fn second(w: &mut World, g: &Guest, id: u32) {
    context(w, g);
    assert_eq!(initialise(w, u64::from(id)), 0);
    assert_eq!(w.call(0, nr::VCPU_OP, &[vcpu::UP, u64::from(id), 0]), 0);
    w.on(id, |c| {
        c.reset_cpu();
        c.start();
        c.prepare_return();
    });
}

#[test]
fn a_vcpu_goes_down_and_comes_back_where_it_was() {
    let (mut w, g) = world();
    second(&mut w, &g, 1);
    w.m.tsc.set(5_000);
    // It goes down by itself; another one brings it up while it sleeps.
    let vm = w.vm;
    w.m.set_hook(move |m, e| {
        if e.reason == exit::IDLE && e.vcpu == 1 {
            m.tsc.set(9_000);
            vm.states[1].set(State::UP);
            return Some(0);
        }
        None
    });
    assert_eq!(w.call(1, nr::VCPU_OP, &[vcpu::DOWN, 1, 0]), 0);
    assert_eq!(w.call(0, nr::VCPU_OP, &[vcpu::IS_UP, 1, 0]), 0);
    let before = w.regs[1].rip;
    w.on(1, |c| c.prepare_return());
    assert_eq!(w.regs[1].rip, before);
    assert_eq!(w.call(0, nr::VCPU_OP, &[vcpu::IS_UP, 1, 0]), 1);
    let times = w.on(1, |c| c.runstate_words());
    assert_eq!(times[..2], [u64::from(runstate::RUNNING), 9_000]);
    assert_eq!(times[2 + runstate::OFFLINE as usize], 1_000 + 4_000);
}

#[test]
fn the_last_vcpu_that_goes_down_ends_the_vm() {
    let (mut w, _) = world();
    w.m.set_hook(|_, e| {
        assert_ne!(
            e.reason,
            exit::SHUTDOWN,
            "shut down with reason {}",
            e.args[0]
        );
        None
    });
    let run = std::panic::AssertUnwindSafe(|| w.call(0, nr::VCPU_OP, &[vcpu::DOWN, 0, 0]));
    let end = std::panic::catch_unwind(run).expect_err("the VM goes on");
    let text = end.downcast_ref::<String>().expect("a message");
    assert!(text.contains("shut down with reason 0"), "{text}");
}

#[test]
fn what_is_raised_at_a_vcpu_that_goes_down_reaches_the_port() {
    let (mut w, g) = world();
    second(&mut w, &g, 1);
    // Backend port 2 belongs to vCPU 0; the host saw an older binding.
    let port = w.m.arg_words(0, &[2]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::UNMASK, port]), 0);
    let vm = w.vm;
    w.m.set_hook(move |_, e| {
        if e.reason == exit::IDLE {
            vm.states[1].set(State::UP);
            return Some(0);
        }
        None
    });
    w.vm.states[1].set(State::DOWN);
    w.m.page.raised[0].store(1 << 2, SeqCst);
    w.m.pending_of(1).store(pending::RAISED, SeqCst);
    w.on(1, |c| c.prepare_return());
    let at = shared_info::EVTCHN_PENDING as usize / 8;
    assert_eq!(w.m.words(w.setup.shared_info())[at].load(SeqCst), 1 << 2);
    assert_ne!(
        w.m.pending_of(0).load(SeqCst) & pending::KICK,
        0,
        "vCPU 0 is told"
    );
}

#[test]
fn a_moved_vcpu_info_keeps_its_content_and_loses_no_event() {
    let (mut w, _) = world();
    let old = w.setup.shared_info();
    w.m.words(old)[2].store(0xfeed, SeqCst);
    let at = w.m.arg_words(0, &[100, 128]);
    assert_eq!(
        w.call(0, nr::VCPU_OP, &[vcpu::REGISTER_VCPU_INFO, 0, at]),
        0
    );
    let field = |w: &World, f: u64| w.m.words(100)[(128 + f) as usize / 8].load(SeqCst);
    assert_eq!(field(&w, vcpu_info::CR2), 0xfeed);
    assert_eq!(field(&w, vcpu_info::PENDING_SEL), u64::MAX);
    assert_eq!(field(&w, vcpu_info::PENDING) & 0xff, 1);
    assert_eq!(
        w.call(0, nr::VCPU_OP, &[vcpu::REGISTER_VCPU_INFO, 0, at]),
        -16,
        "once"
    );
    // Faults and events go to the new place.
    w.m.cpu().cr2.set(0x1234_5000);
    w.regs[0].rsp = ARGS + ARGS_SIZE;
    w.on(0, |c| {
        (c.f.vector, c.f.error) = (14, 4);
        c.enter();
    });
    assert_eq!(field(&w, vcpu_info::CR2), 0x1234_5000);
    w.m.words(100)[16].store(1, SeqCst);
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, EVENT);
}

#[test]
fn interrupts_between_vcpus_arrive() {
    let (mut w, g) = world();
    second(&mut w, &g, 1);
    let at = w.m.arg_words(0, &[1]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::BIND_IPI, at]), 0);
    let port = w.m.words_at(at, 1)[0] >> 32;
    let at = w.m.arg_words(0, &[port]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::UNMASK, at]), 0);
    w.m.log.borrow_mut().clear();
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::SEND, at]), 0);
    assert_eq!(w.m.exits(exit::KICK)[0].args[0], 2);
    // A second send before it looks costs no exit.
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::SEND, at]), 0);
    assert_eq!(w.m.exits(exit::KICK).len(), 1);
    let mask = (shared_info::VCPU_INFO + vcpu_info::SIZE + vcpu_info::MASK) as usize;
    w.m.bytes(w.setup.shared_info())[mask].store(0, SeqCst);
    w.on(1, |c| c.prepare_return());
    assert_eq!(w.regs[1].rip, EVENT);
}

#[test]
fn flushes_wait_only_for_vcpus_that_are_inside() {
    let (mut w, g) = world();
    second(&mut w, &g, 1);
    let mask = w.m.arg_words(0x4_0000, &[0b110]);
    w.m.log.borrow_mut().clear();
    assert_eq!(w.mmuext(0, mmuext::TLB_FLUSH_MULTI, 0, mask), 0);
    assert_eq!(w.m.exits(exit::FLUSH).len(), 1);
    assert_eq!(w.m.exits(exit::FLUSH)[0].args[0], 0b10, "vCPU 2 never ran");
    w.vm.epochs.leave(1);
    assert_eq!(w.mmuext(0, mmuext::TLB_FLUSH_ALL, 0, 0), 0);
    assert_eq!(w.m.exits(exit::FLUSH).len(), 1);
}

#[test]
fn no_call_keeps_the_cpu_for_long() {
    const LONGEST: u64 = 20_000;
    let (mut w, _) = World::booted(Setup::default());
    let words: Vec<u64> = (0..ARGS_SIZE / 16 - 64)
        .flat_map(|_| [100 << 12, 0])
        .collect();
    let n = words.len() as u64 / 2;
    let at = w.m.arg_words(0, &words);
    assert_eq!(w.call(0, nr::MMU_UPDATE, &[at, n, 0, 0x7ff0]), 0);
    assert!(
        w.m.work.get().1 < LONGEST,
        "mmu_update: {}",
        w.m.work.get().1
    );

    let ops: Vec<u64> = (0..1000).flat_map(|_| [16, 100, 0]).collect();
    let at = w.m.arg_words(0, &ops);
    assert_eq!(w.call(0, nr::MMUEXT_OP, &[at, 1000, 0, 0x7ff0]), 0);
    assert!(
        w.m.work.get().1 < LONGEST,
        "mmuext_op: {}",
        w.m.work.get().1
    );

    // The most costly single calls, 4096 at a time.
    let frames = w.m.arg_words(0xf_0000, &[100; 14]);
    let mut table: Vec<u64> = (0..256).flat_map(|v| [v, TEXT]).collect();
    table.extend([0, 0]);
    let traps = w.m.arg_words(0xe_0000, &table);
    let ldt =
        w.m.arg_words(0xd_0000, &[u64::from(mmuext::SET_LDT), ARGS, 8192]);
    for (call, a, b) in [
        (nr::SET_GDT, frames, 14 * 512),
        (nr::SET_TRAP_TABLE, traps, 0),
        (nr::MMUEXT_OP, ldt, 1),
        (nr::XEN_VERSION, 0, 0),
    ] {
        let (c, d) = if call == nr::MMUEXT_OP {
            (0, 0x7ff0)
        } else {
            (0, 0)
        };
        let many = if call == nr::XEN_VERSION { 4096 } else { 64 };
        let list: Vec<u64> = (0..many)
            .flat_map(|_| [call, 0, a, b, c, d, 0, 0])
            .collect();
        let at = w.m.arg_words(0x4_0000, &list);
        w.m.log.borrow_mut().clear();
        w.cpu0(|c| {
            (c.f.rax, c.f.rdi, c.f.rsi) = (nr::MULTICALL, at, many);
            c.hypercall();
            assert_eq!(c.f.rax, 0);
        });
        assert!(
            w.m.work.get().1 < LONGEST,
            "call {call}: {}",
            w.m.work.get().1
        );
    }
}

#[test]
fn a_boot_record_that_points_outside_the_vm_is_refused() {
    let setup = Setup::default();
    let good = Guest::boot(1, setup);
    let out = setup.frames();
    let bad = [
        Boot { cr3: out, ..good },
        Boot {
            shared_info: out,
            ..good
        },
        Boot {
            shared_info: u64::MAX,
            ..good
        },
        Boot {
            shared_info: 1 << 52 | 1,
            ..good
        },
        Boot {
            ram_frames: out + 1,
            ..good
        },
        Boot {
            start_frames: good.ram_frames + 1,
            ..good
        },
        Boot {
            most_frames: good.ram_frames + 1,
            ..good
        },
        Boot {
            start_frames: 3,
            most_frames: 2,
            ..good
        },
        Boot {
            start_frames: good.ram_frames / 2,
            cr3: good.ram_frames / 2,
            ..good
        },
        Boot {
            start_frames: good.ram_frames / 2,
            shared_info: good.ram_frames - 1,
            ..good
        },
        Boot {
            rip: 0xffff_8080_0000_0000,
            ..good
        },
        Boot {
            rip: 0x8000_0000_0000,
            ..good
        },
    ];
    for boot in bad {
        let mut w = World::new(setup, boot);
        let end = w.crashes(|c| c.boot());
        assert_eq!(end.why, crash::GUEST, "{boot:?}");
        assert!(end.text.contains("boot record"), "{}", end.text);
    }
}
