//! Into the guest and out of it.

use core::arch::naked_asm;

use bmcast_svm::Registers;

/// What FXSAVE saves: SSE's registers are the guest's, and Rust uses them.
#[repr(C, align(16))]
pub struct Fx(pub [u8; 512]);

/// Runs the guest until it exits.
///
/// `vmcb` is physical. RAX and RSP of `registers` are not looked at: the VMCB has them.
///
/// # Safety
///
/// SVM is on with a host save area, the VMM's tables are the CPU's ([`super::host::enter`]), GIF is 0 and the VMCB is
/// one that leaves the VMM's memory alone.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn run(vmcb: u64, registers: &mut Registers, fx: &mut Fx) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rsi",
        "push rdx",
        "mov rax, rdi",
        "fxrstor64 [rdx]",
        "mov rcx, [rsi + 8]",
        "mov rdx, [rsi + 16]",
        "mov rbx, [rsi + 24]",
        "mov rbp, [rsi + 40]",
        "mov rdi, [rsi + 56]",
        "mov r8, [rsi + 64]",
        "mov r9, [rsi + 72]",
        "mov r10, [rsi + 80]",
        "mov r11, [rsi + 88]",
        "mov r12, [rsi + 96]",
        "mov r13, [rsi + 104]",
        "mov r14, [rsi + 112]",
        "mov r15, [rsi + 120]",
        "mov rsi, [rsi + 48]",
        "vmrun rax",
        ".global bmcast_exited",
        "bmcast_exited:",
        // RAX and RSP are the host's again.
        "mov rax, [rsp]",
        "fxsave64 [rax]",
        "mov rax, [rsp + 8]",
        "mov [rax + 8], rcx",
        "mov [rax + 16], rdx",
        "mov [rax + 24], rbx",
        "mov [rax + 40], rbp",
        "mov [rax + 48], rsi",
        "mov [rax + 56], rdi",
        "mov [rax + 64], r8",
        "mov [rax + 72], r9",
        "mov [rax + 80], r10",
        "mov [rax + 88], r11",
        "mov [rax + 96], r12",
        "mov [rax + 104], r13",
        "mov [rax + 112], r14",
        "mov [rax + 120], r15",
        "add rsp, 16",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "cld",
        "ret",
    )
}

unsafe extern "C" {
    static bmcast_exited: u8;
}

/// The instruction behind VMRUN: where the host is when a guest has exited.
pub fn behind_vmrun() -> u64 {
    super::memory::address(&raw const bmcast_exited)
}

/// Calls the resident copy: `entry(handover, stack, resume)`. It returns when it fails, with what it returns; else the
/// CPU comes back as a guest at `resume` with `stack`, and this returns 0.
///
/// # Safety
///
/// `entry` must be [`super::resident::enter`] in the copy, `handover` what it expects.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn call_resident(entry: u64, handover: u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rsp",
        "lea rdx, [rip + 2f]",
        "sub rsp, 8",
        "call rax",
        "add rsp, 8",
        "2:",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

/// Calls `function(argument)` on another stack, from where there is no return.
///
/// # Safety
///
/// `stack` is the end of memory that is a stack and nobody else's.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn on_stack(stack: u64, function: u64, argument: u64) -> ! {
    naked_asm!("mov rsp, rdi", "mov rdi, rdx", "call rsi", "ud2",)
}
