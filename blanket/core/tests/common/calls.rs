//! Arbitrary hypercalls, traps and registers from a guest of three vCPUs: hypercalls of
//! all numbers with their structures (event channels, grant copies, descriptors, page
//! tables), iret frames, instructions, backends and a host that takes frames away.

use super::guest::{Guest, TEXT, USER};
use super::{ARGS, ARGS_SIZE, Setup, World, fuzz};
use blanket_abi::device::{crash, exit, pending};
use blanket_abi::xen::hypercall as nr;
use blanket_core::machine::Host;
use blanket_core::vcpu::{State, entry};
use proptest::prelude::*;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering::SeqCst;

const VCPUS: u32 = 3;

#[derive(Clone, Debug)]
pub enum Op {
    /// A hypercall, its structure filled with words, straight or in a multicall.
    Call {
        vcpu: u32,
        call: u64,
        args: [u64; 6],
        words: Vec<u64>,
        multi: bool,
    },
    /// An entry by vector, with registers and code.
    Trap {
        vcpu: u32,
        vector: u64,
        error: u64,
        cr2: u64,
        regs: [u64; 16],
        code: Vec<u8>,
    },
    /// The way back to the guest.
    Return {
        vcpu: u32,
    },
    /// iret with an arbitrary frame.
    Iret {
        vcpu: u32,
        words: [u64; 9],
    },
    /// A backend, a toolstack, the clock.
    Host {
        port: u32,
        tsc: u64,
    },
    Revoke {
        gfn: u64,
    },
}

/// Boxed: trees of strategies by value are too large for a test's stack.
fn word() -> BoxedStrategy<u64> {
    let frames = Setup::default().frames();
    prop_oneof![
        6 => 0u64..4,
        6 => 0u64..64,
        // Structures: far enough from the end of the range.
        8 => (0..ARGS_SIZE / 8 - 8192).prop_map(|i| ARGS + 8 * (i & 0x1ff)),
        1 => Just(ARGS + ARGS_SIZE - 4),
        4 => (0..frames + 2).prop_map(Guest::direct),
        2 => 0..frames + 2,
        2 => (0..frames + 2, 0u64..4096).prop_map(|(g, low)| g << 12 | low),
        2 => prop::sample::select(vec![
            0x7ff0, 0x7ff1, TEXT, USER, u64::MAX, 1 << 63, 1 << 31, 1 << 32, 0xffff_8000_0000_0000,
            0xffff_87ff_ffff_fff8, 0x8000_0000_0000, 0x7fff_ffff_fff8, 4095, 4096, 7168, 8192,
        ]),
        1 => any::<u64>(),
    ]
    .boxed()
}

/// Any step.
pub fn op() -> impl Strategy<Value = Op> {
    let vcpu = || 0..VCPUS;
    let call = prop_oneof![9 => 0u64..nr::COUNT, 1 => any::<u64>()];
    let args = (0u64..16, word(), word(), word(), word(), word())
        .prop_map(|(a, b, c, d, e, f)| [a, b, c, d, e, f]);
    let args = prop_oneof![3 => args, 1 => prop::array::uniform6(word())];
    let vector = prop_oneof![
        3 => prop::sample::select(vec![13u64, 14, 6, 1, 3]),
        1 => 0u64..256,
        1 => prop::sample::select(vec![entry::SYSCALL, entry::SYSCALL32, entry::IRET_FAULT]),
    ];
    let insn = prop_oneof![
        prop::sample::select(vec![
            vec![0xcd, 0x80],
            vec![0x0f, 0x30],
            vec![0x0f, 0x32],
            vec![0x0f, 0x22, 0xe0],
            vec![0x0f, 0x20, 0xd8],
            vec![0x0f, 0x23, 0xf8],
            vec![0x0f, 0x01, 0xd1],
            vec![0xed],
            vec![0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2],
            vec![0x48, 0x89, 0x07],
            vec![0x48, 0x87, 0x07],
            vec![0xf0, 0x48, 0x0f, 0xb1, 0x0f],
        ]),
        prop::collection::vec(any::<u8>(), 0..16),
    ];
    prop_oneof![
        10 => (vcpu(), call, args, prop::collection::vec(word(), 0..40), any::<bool>())
            .prop_map(|(vcpu, call, args, words, multi)| Op::Call { vcpu, call, args, words, multi }),
        4 => (vcpu(), vector, word(), word(), prop::array::uniform16(word()), insn).prop_map(
            |(vcpu, vector, error, cr2, regs, code)| Op::Trap { vcpu, vector, error, cr2, regs, code }
        ),
        3 => vcpu().prop_map(|vcpu| Op::Return { vcpu }),
        1 => (vcpu(), prop::array::uniform9(word())).prop_map(|(vcpu, words)| Op::Iret { vcpu, words }),
        1 => (0u32..4096, 0u64..1 << 40).prop_map(|(port, tsc)| Op::Host { port, tsc }),
        1 => (0..Setup::default().frames()).prop_map(|gfn| Op::Revoke { gfn }),
    ]
}

fn step(w: &mut World, op: &Op) {
    match *op {
        Op::Call {
            vcpu,
            call,
            args,
            ref words,
            multi,
        } => {
            let mut all = words.clone();
            all.resize(512, 0);
            w.m.arg_words(0, &all);
            w.on(vcpu, |c| {
                if !c.kernel_mode() {
                    c.to_kernel_mode();
                }
                c.f.rsp = ARGS + ARGS_SIZE / 2;
                if multi {
                    let [a, b, d, e, f, g] = args;
                    let at = c.m.arg_words(0x8_0000, &[call, 0, a, b, d, e, f, g]);
                    (c.f.rax, c.f.rdi, c.f.rsi) = (nr::MULTICALL, at, 1);
                } else {
                    c.f.rax = call;
                    [c.f.rdi, c.f.rsi, c.f.rdx, c.f.r10, c.f.r8, c.f.r9] = args;
                }
                c.f.vector = entry::SYSCALL;
                c.enter();
            });
        }
        Op::Trap {
            vcpu,
            vector,
            error,
            cr2,
            regs,
            ref code,
        } => {
            let at = w.m.arg(0x9_0000, code);
            w.on(vcpu, |c| {
                c.m.cpu().cr2.set(cr2);
                c.f.set_gprs(&regs);
                // Most of the time there is a stack, and the code can be read.
                c.f.rsp = if regs[4] & 7 == 7 {
                    regs[4]
                } else {
                    ARGS + ARGS_SIZE / 2
                };
                c.f.rip = if regs[5] & 7 == 7 { regs[5] } else { at };
                c.f.cs = if regs[6] & 7 == 7 {
                    regs[6] & 0xffff
                } else {
                    0xe033
                };
                // The CPU never reports a reserved bit: shadows have none.
                (c.f.vector, c.f.error) = (vector, error & !8);
                c.enter();
            });
        }
        Op::Return { vcpu } => w.on(vcpu, |c| c.prepare_return()),
        Op::Iret { vcpu, words } => {
            let at = w.m.arg_words(0x8_0000, &words);
            w.on(vcpu, |c| {
                if !c.kernel_mode() {
                    c.to_kernel_mode();
                }
                (c.f.rax, c.f.rsp) = (nr::IRET, at);
                c.hypercall();
            });
        }
        Op::Host { port, tsc } => {
            w.m.tsc.set(w.m.tsc.get().max(tsc));
            w.m.page.raised[port as usize / 64].fetch_or(1 << (port % 64), SeqCst);
            w.m.page.raised_virqs.fetch_or(1 << (port % 64), SeqCst);
            w.m.pending_of(port % VCPUS)
                .fetch_or(pending::RAISED, SeqCst);
        }
        Op::Revoke { gfn } => w.m.revoke(gfn),
    }
    for f in &w.regs {
        // What goes back to the CPU has no privilege.
        assert_eq!(
            f.rflags & (3 << 12 | 1 << 17 | 1 << 19 | 1 << 20),
            0,
            "{op:?}"
        );
    }
}

/// Runs `ops` until the guest ends; how many were done, or what is broken.
pub fn run(
    ops: &[Op],
    la57: bool,
    thief: u64,
    seen: impl FnMut(&World, &Op),
) -> Result<usize, String> {
    let (mut w, _) = fuzz::start(Setup {
        vcpus: VCPUS,
        la57,
        ..Setup::default()
    });
    play(&mut w, ops, thief, seen)
}

/// As [`run`], in a VM that is there already.
pub fn play(
    w: &mut World,
    ops: &[Op],
    thief: u64,
    mut seen: impl FnMut(&World, &Op),
) -> Result<usize, String> {
    let vm = w.vm;
    w.m.thief.set(thief);
    w.m.set_hook(move |_, e| {
        if e.reason == exit::IDLE {
            // Whatever it waits for: somebody brings it up and sends an NMI.
            vm.states[e.vcpu as usize].set(State::UP);
            vm.nmi.fetch_or(1 << e.vcpu, SeqCst);
        }
        let off = e.reason == exit::SHUTDOWN && e.args[0] == nr::sched::SHUTDOWN_POWEROFF;
        assert!(!off, "{ENDED}");
        (e.reason == exit::IDLE).then_some(0)
    });
    for (n, op) in ops.iter().enumerate() {
        w.m.log.borrow_mut().clear();
        if let Err(e) = std::panic::catch_unwind(AssertUnwindSafe(|| step(w, op))) {
            let text = e.downcast_ref::<String>().cloned().unwrap_or_default();
            let crashed = w.m.crashed.borrow_mut().take();
            return if text == ENDED || crashed.is_some_and(|c| c.why == crash::GUEST) {
                Ok(n)
            } else {
                Err(format!("{text} after {op:?}"))
            };
        }
        w.try_audit().map_err(|e| format!("{e:?} after {op:?}"))?;
        seen(w, op);
    }
    Ok(ops.len())
}

const ENDED: &str = "the guest shuts down";
