//! Whether a guest really runs: a `/dev/kvm` that opens may still be unable to.
//!
//! The test guest is a PV kernel of a few instructions that goes the way of a real
//! one: domain builder, core, hypercalls by `syscall` from CPL 3, a timer that wakes
//! the vCPU from its sleep, power off.

use std::sync::Arc;
use std::time::Duration;

use super::{Error, Kvm};
use crate::balloon::Balloon;
use crate::builder::{self, Config};
use crate::hypervisor::{Hypervisor as _, Isolation};
use crate::kernel::Kernel;
use crate::vm::{Backends, EarlyConsole, End, Vm};

/// A machine that needs longer for a few hypercalls is of no use.
const PATIENCE: Duration = Duration::from_secs(10);
/// Memory of the test guest; what it does not touch costs nothing.
const MEMORY: u64 = 32 << 20;

// Hypercall numbers and structures: public/xen.h, event_channel.h, vcpu.h, sched.h.
std::arch::global_asm!(
    r#"
    .pushsection .rodata
    .global blanket_probe_start
blanket_probe_start:
    sub rsp, 64
    # event_channel_op(bind_virq, {{timer, vCPU 0}})
    mov qword ptr [rsp], 0
    mov edi, 1
    mov rsi, rsp
    mov eax, 32
    syscall
    test rax, rax
    jnz 2f
    # vcpu_op(get_runstate_info, 0, ...): when it began to run
    mov edi, 4
    xor esi, esi
    mov rdx, rsp
    mov eax, 24
    syscall
    test rax, rax
    jnz 2f
    # set_timer_op(5 ms later)
    mov rdi, [rsp + 8]
    add rdi, 5000000
    mov eax, 15
    syscall
    test rax, rax
    jnz 2f
    # sched_op(block): returns when the timer's event is there
    mov edi, 1
    xor esi, esi
    mov eax, 29
    syscall
    test rax, rax
    jnz 2f
    # sched_op(shutdown, poweroff), or crash
    mov qword ptr [rsp], 0
1:  mov edi, 2
    mov rsi, rsp
    mov eax, 29
    syscall
    ud2
2:  mov qword ptr [rsp], 3
    jmp 1b
    .global blanket_probe_end
blanket_probe_end:
    .popsection
    "#
);

// SAFETY: the two labels of the assembly above.
unsafe extern "C" {
    static blanket_probe_start: u8;
    static blanket_probe_end: u8;
}

fn code() -> Vec<u8> {
    let (start, end) = (&raw const blanket_probe_start, &raw const blanket_probe_end);
    let length = end as usize - start as usize;
    // SAFETY: the two labels bound read-only bytes of this program.
    unsafe { std::slice::from_raw_parts(start, length) }.to_vec()
}

struct Silent;
impl EarlyConsole for Silent {
    fn write(&self, _: &[u8]) {}
}

/// Opens KVM and runs the test guest in it.
///
/// # Errors
/// Why VMs cannot run in this machine's KVM.
pub fn probe() -> Result<Kvm, Error> {
    let kvm = Kvm::open()?;
    run(&kvm)?;
    Ok(kvm)
}

fn run(kvm: &Kvm) -> Result<(), Error> {
    let broken = |error: &dyn std::fmt::Display| Error::Broken(error.to_string());
    let config = Config {
        memory: MEMORY,
        max_memory: MEMORY,
        cmdline: String::new(),
        verbose: false,
        vcpus: 1,
        mergeable: false,
        inject: false,
    };
    let domain =
        builder::build(&Kernel::bare(code()), None, &config).map_err(|error| broken(&error))?;
    let machine = kvm
        .create(&domain, 1, 0, Isolation::Auto, &kvm.profile(None))
        .map_err(|error| match error {
            crate::device::Error::Kvm(error) => error,
            other => broken(&other),
        })?;
    let backends = Backends {
        ports: Arc::default(),
        early_console: Arc::new(Silent),
        balloon: Arc::new(Balloon::new(
            Arc::clone(&domain.memory),
            domain.boot.start_frames,
            None,
        )),
    };
    let vm = Vm::start(machine, 1, backends).map_err(|error| broken(&error))?;
    if !vm.handle().wait_ended(PATIENCE) {
        return Err(Error::Broken(format!(
            "it did not end within {} seconds",
            PATIENCE.as_secs()
        )));
    }
    match vm.wait() {
        End::Poweroff => Ok(()),
        End::Crash(crash) => Err(Error::Broken(crash.report.trim_end().to_owned())),
        End::Failed(failure) => Err(broken(&failure)),
        other => Err(Error::Broken(format!("it ended with {other:?}"))),
    }
}
