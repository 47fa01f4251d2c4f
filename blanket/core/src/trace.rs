//! The trace: records of what enters the core and of what it asks its host for.
//!
//! Off, it costs no instruction on the way of a hypercall or a fault: the entry code
//! calls one of two functions through a pointer, and only the traced one comes here.
//! What is tested each time are exits, which cost a world switch or an access to a
//! timer anyway.

use crate::context::Context;
use crate::machine::Machine;
use crate::vcpu::entry;
use blanket_abi::trace::{RECORDS, Record, kind};
use core::sync::atomic::Ordering::Acquire;

impl<M: Machine> Context<'_, M> {
    /// Follows the VM's switch. Called when the vCPU was asked to look at something.
    pub fn follow_trace(&mut self) {
        let on = self.m.vm_page().trace.load(Acquire) != 0;
        if on != self.fast.traced {
            self.fast.traced = on;
            self.fast.trap = self.m.trap_entry(on);
        }
    }

    /// Records the entry that is about to be handled.
    pub fn trace_entry(&mut self) {
        let f = &*self.f;
        if f.vector == entry::SYSCALL && self.kernel_mode() {
            let args = [f.rdi, f.rsi, f.rdx, f.r10];
            self.record(kind::HYPERCALL, f.rax, args);
        } else {
            let args = [f.error, self.m.cr2(), f.rsp, f.rax];
            self.record(kind::TRAP, f.vector, args);
        }
    }

    /// Records the entries of a multicall that is about to begin, as they are now: not
    /// in its loop, which has nothing to do with a trace. At most as many as a ring holds.
    #[cold]
    pub fn trace_multicall(&mut self, list: u64, n: u64) {
        for i in 0..n.min(RECORDS as u64) {
            let Ok([op, _, args @ ..]) = self.read_words::<6>(list.wrapping_add(i * 64)) else {
                return;
            };
            self.record(kind::MULTICALL, op, args);
        }
    }

    /// Writes a record. Only while the trace is on.
    #[cold]
    pub fn record(&mut self, kind: u8, what: u64, args: [u64; 4]) {
        self.v.trace_number += 1;
        self.m.trace_ring().write(&Record {
            number: self.v.trace_number,
            tsc: self.m.tsc(),
            kind,
            what: u32::try_from(what).unwrap_or(u32::MAX),
            kernel: self.kernel_mode(),
            rip: self.f.rip,
            args,
        });
    }
}
