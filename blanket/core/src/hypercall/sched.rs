//! sched_op (`public/sched.h`) and the old timer call.

use super::super::context::{Context, Hyper};
use crate::machine::Machine;
use crate::vcpu::NEVER;
use blanket_abi::device::exit;
use blanket_abi::xen::errno;
use blanket_abi::xen::hypercall::sched;
use blanket_abi::xen::shared::runstate;
use core::sync::atomic::Ordering::SeqCst;

/// Ports that one poll may name (`xen/common/sched/core.c`).
const POLL_MAX: u64 = 128;

impl<M: Machine> Context<'_, M> {
    /// `sched_op(cmd, ptr)`.
    pub(super) fn sched_op(&mut self, cmd: u64, ptr: u64) -> Hyper {
        match cmd {
            sched::YIELD => {
                self.exit(exit::YIELD, [0; 4]);
                Ok(0)
            }
            sched::BLOCK => {
                self.set_events_masked(false);
                self.idle(Self::event_pending);
                Ok(0)
            }
            sched::SHUTDOWN => {
                let reason = u64::from(self.read_u32(ptr)?);
                let given = self.vm.shutdown_code.load(SeqCst);
                let reason = if reason == sched::SHUTDOWN_CRASH && given != 0 {
                    given - 1
                } else {
                    reason
                };
                // The VMM decides what comes next; a suspend that it cancels
                // returns 1 to the guest.
                self.exit(exit::SHUTDOWN, [reason, 0, 0, 0]);
                Ok(1)
            }
            sched::SHUTDOWN_CODE => {
                let reason = u64::from(self.read_u32(ptr)?);
                self.vm.shutdown_code.store(reason + 1, SeqCst);
                Ok(0)
            }
            sched::POLL => self.poll(ptr),
            _ => Err(errno::ENOSYS),
        }
    }

    /// Sleeps until `awake`, or something that [`Self::prepare_return`] must see.
    fn idle(&mut self, awake: impl Fn(&Self) -> bool) {
        self.v.check_timers = true;
        let mut slept = false;
        loop {
            if self.v.check_timers {
                self.v.check_timers = false;
                self.publish_time();
                self.run_timers();
            }
            self.take_pending();
            let nmi = self.vm.nmi.load(SeqCst) & 1 << self.v.id != 0;
            let down = self.vm.states[self.v.id as usize].get() != crate::vcpu::State::UP;
            if awake(self) || nmi || down || self.v.pause_asked {
                break;
            }
            if !slept {
                slept = true;
                self.set_runstate(runstate::BLOCKED);
            }
            self.exit(exit::IDLE, [0; 4]);
        }
        if slept {
            self.set_runstate(runstate::RUNNING);
        }
    }

    /// `SCHEDOP_poll`: ports pointer, count, absolute time limit (0 = none).
    fn poll(&mut self, ptr: u64) -> Hyper {
        let [list, n, until] = self.read_words::<3>(ptr)?;
        let n = n & 0xffff_ffff;
        if n > POLL_MAX {
            return Err(errno::EINVAL);
        }
        let mut words = [0u64; 64];
        for i in 0..n {
            let port = self.read_u32(list.wrapping_add(4 * i))?;
            if port >= blanket_abi::xen::event::PORTS {
                return Err(errno::EINVAL);
            }
            words[port as usize / 64] |= 1 << (port % 64);
        }
        let me = 1u64 << self.v.id;
        self.v.poll_until = if until == 0 { NEVER } else { until };
        // Senders look at this after they have set the pending bit.
        self.vm.polling.fetch_or(me, SeqCst);
        self.idle(|c| {
            c.v.poll_until <= c.now()
                || (c.event_pending() && !c.events_masked())
                || words
                    .iter()
                    .enumerate()
                    .any(|(w, &mask)| mask != 0 && c.pending_ports(w) & mask != 0)
        });
        self.vm.polling.fetch_and(!me, SeqCst);
        self.v.poll_until = NEVER;
        Ok(0)
    }

    /// `set_timer_op(ns)`: 0 cancels.
    pub(super) fn set_timer_op(&mut self, at: u64) -> Hyper {
        if at == 0 {
            self.v.singleshot = NEVER;
            self.arm();
        } else {
            self.set_singleshot(at);
        }
        Ok(0)
    }
}
