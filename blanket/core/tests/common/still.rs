//! A VM that stands still.

use super::{FakeMachine, World};
use blanket_abi::device::{crash, exit, pause};
use blanket_core::context::Context;
use blanket_core::vcpu::State;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;

/// All vCPUs stand still, one inside the other as their threads would beside each other,
/// and vCPU 0 does what it is asked for besides (`pause::VM`, `pause::LOG`), one thing after
/// the other. What each said of it.
pub fn stand(w: &mut World, asked: &[u32]) -> Vec<i64> {
    w.m.page.pause.store(pause::VCPUS, SeqCst);
    let said = Rc::new(RefCell::new(Vec::new()));
    // From the last vCPU to the first: the hook of each runs the next.
    let vm = w.vm;
    let mut rest: Vec<_> = (0u32..)
        .zip(
            std::mem::take(&mut w.fast)
                .into_iter()
                .zip(std::mem::take(&mut w.regs)),
        )
        .collect();
    let back = Rc::new(RefCell::new(Vec::new()));
    one(&w.m, vm, &mut rest, asked, &said, &back);
    let mut parts = back.take();
    parts.sort_by_key(|(id, _)| *id);
    for (_, (fast, regs)) in parts {
        w.fast.push(fast);
        w.regs.push(regs);
    }
    let said = said.take();
    assert_eq!(w.m.page.pause.load(SeqCst), pause::NONE);
    said
}

type Parts = (
    u32,
    (blanket_core::vcpu::Fast, blanket_core::vcpu::TrapFrame),
);

fn one(
    m: &FakeMachine,
    vm: &'static blanket_core::vm::Vm,
    rest: &mut Vec<Parts>,
    asked: &[u32],
    said: &Rc<RefCell<Vec<i64>>>,
    back: &Rc<RefCell<Vec<Parts>>>,
) {
    let Some((id, (mut fast, mut regs))) = rest.pop() else {
        return;
    };
    let cell = &vm.vcpus[id as usize];
    let started = vm.states[id as usize].get() == State::UP || id == 0;
    if !started {
        one(m, vm, rest, asked, said, back);
        back.borrow_mut().push((id, (fast, regs)));
        return;
    }
    {
        let mut v = cell.try_lock().expect("a vCPU runs once");
        m.be(id);
        let mut c = Context {
            m,
            vm,
            v: &mut v,
            fast: &mut fast,
            f: &mut regs,
        };
        let mut below = std::mem::take(rest);
        let (said, back) = (Rc::clone(said), Rc::clone(back));
        let asked = asked.to_vec();
        let mut next = asked.clone().into_iter();
        m.set_hook(move |m, e| {
            if e.reason == exit::IDLE && m.page.pause.load(SeqCst) == pause::NONE {
                // It is down, and nobody else is there to bring it up.
                vm.states[id as usize].set(State::UP);
                return Some(0);
            }
            if e.reason != exit::PAUSED {
                return None;
            }
            assert_eq!(e.vcpu, id);
            said.borrow_mut().push(e.args[0].cast_signed());
            if below.is_empty() {
                let next = next.next().unwrap_or(pause::NONE);
                m.page.pause.store(next, SeqCst);
            } else {
                one(m, vm, &mut below, &asked, &said, &back);
            }
            Some(0)
        });
        m.kick(id);
        c.prepare_return();
        m.clear_hook();
    }
    back.borrow_mut().push((id, (fast, regs)));
}

/// What `work` says; `None` if the guest has ended by its own fault, for one that has no
/// stack for an event.
pub fn lives<T>(w: &mut World, work: impl FnOnce(&mut World) -> T) -> Option<T> {
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(w)));
    let own = |w: &World| {
        let crashed = w.m.crashed.borrow_mut().take();
        crashed.is_some_and(|it| it.why == crash::GUEST)
    };
    match done {
        Ok(done) => Some(done),
        Err(_) if own(w) => None,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
