//! Hypercalls: dispatch, multicalls, and the calls by family.

pub mod coverage;
mod descriptor;
mod domain;
mod event;
mod memory;
mod mmu;
mod sched;
mod vcpu;

use crate::context::{Context, Hyper, Text};
use crate::machine::Machine;
use blanket_abi::device::{boot_flags, exit};
use blanket_abi::xen::errno;
use blanket_abi::xen::hypercall as nr;

/// Arguments in the order of the ABI: rdi, rsi, rdx, r10, r8, r9.
pub type Args = [u64; 6];

/// Entries that one multicall may have; Linux batches 32.
const MULTICALL_MAX: u64 = 4096;

impl<M: Machine> Context<'_, M> {
    /// The hypercall that the guest's registers name.
    pub fn hypercall(&mut self) {
        let call = self.f.rax;
        self.v.work = 0;
        if call == nr::IRET {
            self.count(crate::idx(nr::IRET));
            self.iret();
            return;
        }
        let args = [
            self.f.rdi, self.f.rsi, self.f.rdx, self.f.r10, self.f.r8, self.f.r9,
        ];
        let result = if call == nr::MULTICALL {
            self.count(crate::idx(nr::MULTICALL));
            if self.fast.traced {
                self.trace_multicall(args[0], args[1]);
            }
            self.multicall(args[0], args[1])
        } else {
            self.dispatch(call, args)
        };
        self.f.rax = result.unwrap_or_else(|e| e).cast_unsigned();
    }

    /// One call, as from a register frame or a multicall entry.
    pub fn dispatch(&mut self, call: u64, a: Args) -> Hyper {
        let result = self.run_call(call, a);
        // Linux asks for thousands of vCPUs that do not exist.
        if let Err(error) = result
            && self.vm.boot.flags & boot_flags::VERBOSE != 0
            && (call != nr::VCPU_OP || error != errno::ENOENT)
        {
            self.log_refusal(call, a, error);
        }
        result
    }

    /// Tells the VMM's console of a call that was refused.
    #[cold]
    fn log_refusal(&mut self, call: u64, a: Args, error: i64) {
        let text = Text::new(format_args!(
            "blanket: vCPU {} {} ({call}) {:#x} {:#x} {:#x} {:#x} at {:#x}: {error}\n",
            self.v.id,
            nr::name(call).unwrap_or("hypercall"),
            a[0],
            a[1],
            a[2],
            a[3],
            self.f.rip,
        ));
        let len = self.m.set_data(text.bytes());
        self.exit(exit::CONSOLE, [0, 0, 0, len as u64]);
    }

    fn run_call(&mut self, call: u64, a: Args) -> Hyper {
        if call < nr::COUNT {
            self.count(crate::idx(call));
        }
        match call {
            nr::MMU_UPDATE => self.mmu_update(a[0], a[1], a[2], a[3]),
            nr::UPDATE_VA_MAPPING => self.update_va_mapping(a[0], a[1], a[2]),
            nr::MMUEXT_OP => self.mmuext_op(a[0], a[1], a[2], a[3]),
            nr::STACK_SWITCH => self.stack_switch(a[0], a[1]),
            nr::SET_SEGMENT_BASE => self.set_segment_base(a[0], a[1]),
            // TS is never set for real: the guest's FPU state is always its own.
            nr::FPU_TASKSWITCH => Ok(0),
            nr::UPDATE_DESCRIPTOR => self.update_descriptor(a[0], a[1]),
            nr::XEN_VERSION => self.xen_version(a[0], a[1]),
            nr::VCPU_OP => self.vcpu_op(a[0], a[1], a[2]),
            nr::SCHED_OP => self.sched_op(a[0], a[1]),
            nr::EVENT_CHANNEL_OP => self.event_channel_op(a[0], a[1]),
            nr::SET_TRAP_TABLE => self.set_trap_table(a[0]),
            nr::SET_GDT => self.set_gdt(a[0], a[1]),
            nr::SET_CALLBACKS => self.set_callbacks(a[0], a[1], a[2]),
            nr::CALLBACK_OP => self.callback_op(a[0], a[1]),
            nr::SET_DEBUGREG => self.set_debugreg(a[0], a[1]).map(|()| 0),
            nr::GET_DEBUGREG => Ok(self.get_debugreg(a[0])),
            nr::MEMORY_OP => self.memory_op(a[0], a[1]),
            nr::SET_TIMER_OP => self.set_timer_op(a[0]),
            nr::CONSOLE_IO => self.console_io(a[0], a[1], a[2]),
            nr::GRANT_TABLE_OP => self.grant_table_op(a[0], a[1], a[2]),
            nr::VM_ASSIST => self.vm_assist(a[0], a[1]),
            nr::PHYSDEV_OP => self.physdev_op(a[0], a[1]),
            nr::MULTICALL => Err(errno::EINVAL),
            nr::PLATFORM_OP | nr::SYSCTL | nr::DOMCTL => Err(errno::EPERM),
            _ => Err(errno::ENOSYS),
        }
    }

    /// `multicall(entries, n)`: entries of {op, result, args\[6\]} (`public/xen.h`).
    fn multicall(&mut self, list: u64, n: u64) -> Hyper {
        if n > MULTICALL_MAX {
            return Err(errno::EINVAL);
        }
        for i in 0..n {
            let at = list.wrapping_add(i * 64);
            let [op, _, a @ ..] = self.read_words::<8>(at)?;
            let result = self.dispatch(op, a).unwrap_or_else(|e| e);
            self.breathe(1);
            self.write_words(at.wrapping_add(8), [result.cast_unsigned()])?;
        }
        Ok(0)
    }
}
