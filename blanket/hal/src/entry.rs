//! Entry code: how a CPU comes from the guest into the core and goes back.
//!
//! Everything here lives in the section `.entry`, which the module maps twice:
//! as part of the image, where the IDT points, and at the start of every vCPU
//! area, where LSTAR and CSTAR point. In the second place the vCPU's hardware
//! page is at a fixed distance, so `syscall` finds its vCPU relative to RIP and
//! GS stays the guest's.
//!
//! The main stack ends where the hardware page begins, and a `TrapFrame` is the
//! topmost thing on it: `TSS.RSP0`, the fast paths and the slow path all agree
//! on that. Interrupts are off in the core; only #NMI and #MC can come, on
//! stacks of their own.
//!
//! The fast paths (system call from user mode; iret hypercall to user mode)
//! never call Rust. Whatever is unusual sends them to the slow path with the
//! registers as they were: a zero in a field of `Fast`, a pending event, masked
//! events, or a fault on the guest's stack, for which each access has an entry
//! in the exception table.
//!
//! An *isolated* guest's roots hold of the hole only what is used before CR3 changes:
//! this section, the IDT, and of each vCPU the topmost page of the main stack, the
//! second hardware page, the stacks of the IST, GDT and LDT. The places marked with
//! `isolate_site` are NOPs, and jumps to `isolate_*` for such guests: every entry from
//! CPL 3 loads the core's root first, and the last thing before the return is the
//! guest's. The fast paths are not taken then: they need the window.

use crate::machine::{LOCAL, Local};
use blanket_abi::device::{SMAP_CLAC, Switch};
use blanket_abi::layout::{self, VCPU_STRIDE, sel, vcpu as area};
use blanket_core::vcpu::{Fast, TrapFrame, entry, rflags};
use core::arch::global_asm;
use core::mem::offset_of;

/// Offset of [`Fast`] in the hardware page; the switch block comes first.
pub const FAST: usize = 0x1000;

const _: () = assert!(size_of::<TrapFrame>() == 176);
const _: () = assert!(area::HW == area::STACK + area::STACK_SIZE);
// The first hardware page is not in an isolated guest's roots, the second is.
const _: () = assert!(size_of::<Switch>() <= FAST && FAST == 0x1000);
const _: () = assert!(
    area::KERNEL_CR3 == area::HW + (FAST + offset_of!(Fast, kernel_cr3)) as u64
        && area::USER_CR3 == area::HW + (FAST + offset_of!(Fast, user_cr3)) as u64
);

// The 256 stubs come first, 16 bytes apart; AT&T syntax, for an immediate that is
// a symbol.
global_asm!(
    r#"
    .section .entry, "ax"
    .balign 4096
    .global blanket_entry_start
blanket_entry_start:
    .global blanket_stubs
blanket_stubs:
    .set v, 0
    .rept 256
    .balign 16
    # Vectors where the CPU pushes an error code: 8, 10-14, 17, 21, 29, 30.
    .if v == 8 || (v >= 10 && v <= 14) || v == 17 || v == 21 || v == 29 || v == 30
    .else
    pushq $0
    .endif
    pushq $v
    .if v == 1 || v == 2 || v == 8 || v == 18
    jmp ist_entry
    .else
    jmp trap_entry
    .endif
    .set v, v + 1
    .endr
    "#,
    options(att_syntax),
);

global_asm!(
    r#"
    .section .entry, "ax"
    .set hw, blanket_entry_start + {HW}

    # Access to the guest's pages, on and off. These are NOPs until whoever loads the
    # image makes them STAC and CLAC, because it turns SMAP on (inside KVM).
    .macro stac_site
701: .byte 0x0f, 0x1f, 0x00
    .pushsection .smap, "a"
    .quad 701b - {BASE}
    .popsection
    .endm
    .macro clac_site
701: .byte 0x0f, 0x1f, 0x00
    .pushsection .smap, "a"
    .quad 701b - {BASE} + {CLAC}
    .popsection
    .endm

    # A NOP, or a jump for isolated guests.
    .macro isolate_site to
702: .byte 0x0f, 0x1f, 0x44, 0x00, 0x00
    .pushsection .isolate, "a"
    .quad 702b - {BASE}, \to - {BASE}
    .popsection
    .endm

    # General registers in the order of `TrapFrame`, from its top.
    .macro push_all
    push rdi
    push rsi
    push rdx
    push rcx
    push rax
    push r8
    push r9
    push r10
    push r11
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    .endm
    .macro pop_all
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    pop r11
    pop r10
    pop r9
    pop r8
    pop rax
    pop rcx
    pop rdx
    pop rsi
    pop rdi
    .endm
    # Those that a call may change.
    .macro push_clobbered
    push rdi
    push rsi
    push rdx
    push rcx
    push rax
    push r8
    push r9
    push r10
    push r11
    .endm
    .macro pop_clobbered
    pop r11
    pop r10
    pop r9
    pop r8
    pop rax
    pop rcx
    pop rdx
    pop rsi
    pop rdi
    .endm

    # An exception or interrupt. On the stack: vector, error, RIP, CS, RFLAGS, RSP, SS.
    .balign 16
trap_entry:
    test byte ptr [rsp + 24], 3
    jz core_fault
save_and_call:
    push_all
    cld
    clac_site
    isolate_site isolate_enter
    mov rdi, rsp
    # The frame is the topmost thing on the main stack, and the hardware page follows.
    call qword ptr [rsp + {FRAME} + {F_TRAP}]
    .global blanket_return
blanket_return:
    isolate_site isolate_leave
restore:
    pop_all
    add rsp, 16
    .global blanket_iret_slow
blanket_iret_slow:
    iretq

    # The frame is on top of the main stack. The core's frames are kept off that page.
isolate_enter:
    mov rax, [rsp + {FRAME} + {L_CORE}]
    mov cr3, rax
    mov rdi, rsp
    mov rax, [rsp + {FRAME} + {F_TRAP}]
    and rsp, -4096
    call rax
    jmp blanket_return
isolate_leave:
    mov rax, rsp
    and rax, -{STRIDE}
    mov rcx, [rax + {HW} + {L_GUEST}]
    lea rsp, [rax + {HW} - {FRAME}]
    mov cr3, rcx
    jmp restore

    # A fault in ring 0: in the exception table, in an iretq to the guest, or a bug.
core_fault:
    # An interrupt although they are off: QEMU's SVM delivers an injected one twice now
    # and then (docs/kvm-host.md). It was served the first time. The stack may be the
    # guest's, so nothing else is touched.
    cmp qword ptr [rsp], 32
    jb 1f
    test dword ptr [rsp + 32], {IF}
    jnz 1f
    add rsp, 16
    iretq
1:
    push_all
    cld
    mov rdi, rsp
    # In the few instructions between the guest's stack and ours?
    mov rax, rsp
    movabs rcx, {VCPU}
    sub rax, rcx
    cmp rax, {AREAS}
    jae wrong_stack
    isolate_site isolate_fault
    movabs rax, offset blanket_core_fault
    call rax
    # 0: go on at the changed RIP. Otherwise: a trap frame to handle as an entry.
    test rax, rax
    jnz fault_to_entry
    pop_all
    add rsp, 16
    iretq
fault_to_entry:
    clac_site
    mov rsp, rax
    isolate_site isolate_enter
    mov rdi, rax
    call qword ptr [rsp + {FRAME} + {F_TRAP}]
    jmp blanket_return

    # It may have been the IRETQ to the guest, on the guest's root.
isolate_fault:
    mov r12, cr3
    mov rax, rsp
    and rax, -{STRIDE}
    mov rax, [rax + {HW} + {L_CORE}]
    mov cr3, rax
    movabs rax, offset blanket_core_fault
    call rax
    test rax, rax
    jnz fault_to_entry
    mov cr3, r12
    jmp restore

    # The stack is the guest's, and what names the vCPU is the GDT.
wrong_stack:
    sub rsp, 16
    sgdt [rsp + 6]
    mov rsi, [rsp + 8]
    and rsi, -{STRIDE}
    lea rsp, [rsi + {HW} - {FRAME} - 64]
    and rsp, -16
    isolate_site isolate_wrong
call_wrong:
    movabs rax, offset blanket_wrong_stack
    call rax
    ud2
    # The core does not see the guest's stack: it gets a copy of the frame.
isolate_wrong:
    mov r8, rsi
    mov rsi, rdi
    sub rsp, {FRAME}
    mov rdi, rsp
    mov ecx, {FRAME} / 8
    rep movsq
    mov rdi, rsp
    mov rsi, r8
    mov rax, [rsi + {HW} + {L_CORE}]
    mov cr3, rax
    jmp call_wrong

    # Vectors with a stack of their own (#DB, NMI, #DF, #MC). From the guest: move
    # the frame to the main stack and go on as always. From ring 0: note it.
    .balign 16
ist_entry:
    test byte ptr [rsp + 24], 3
    jz 4f
    push rax
    push rcx
    mov rax, rsp
    and rax, -{STRIDE}
    add rax, {HW} - 56
    .irp off, 0, 8, 16, 24, 32, 40, 48
    mov rcx, [rsp + 16 + \off]
    mov [rax + \off], rcx
    .endr
    mov rcx, [rsp + 8]
    mov [rax - 8], rcx
    pop rcx
    lea rsp, [rax - 8]
    pop rax
    jmp save_and_call
4:
    push_clobbered
    cld
    isolate_site isolate_ist
    mov rdi, [rsp + 72]
    lea rsi, [rsp + 88]
    # The interrupted code may have the stack at any alignment: keep ours.
    push rbp
    mov rbp, rsp
    and rsp, -16
    movabs rax, offset blanket_core_ist
    call rax
ist_done:
    mov rsp, rbp
    # 1: an NMI of the watchdog, which is answered, and the next must get through.
    test eax, eax
    jnz 7f
    # Above: rbp, 9 registers, vector, error, RIP, CS, RFLAGS, RSP, SS.
    mov rdx, [rsp + 80]
    cmp edx, 1
    je 7f
    mov rax, [rsp + 120]
    mov rcx, rax
    xor rcx, rsp
    test rcx, -{STRIDE}
    jnz 7f
    # An NMI or machine check on a stack of ours: return without IRETQ, which would
    # unblock NMIs before the host's handler has run.
    mov rcx, [rsp + 96]
    mov [rax - 8], rcx
    mov rcx, [rsp + 112]
    mov [rax - 16], rcx
    sub rax, 16
    mov [rsp + 120], rax
    pop rbp
    pop_clobbered
    mov rsp, [rsp + 40]
    popfq
    ret
7:
    pop rbp
    pop_clobbered
    add rsp, 16
    iretq

    # From ring 0 on either root: back to the same one.
isolate_ist:
    mov rdi, [rsp + 72]
    lea rsi, [rsp + 88]
    push rbp
    mov rbp, rsp
    and rsp, -16
    mov rax, cr3
    push rax
    push rax
    mov rax, rsp
    and rax, -{STRIDE}
    mov rax, [rax + {HW} + {L_CORE}]
    mov cr3, rax
    movabs rax, offset blanket_core_ist
    call rax
    pop rax
    mov cr3, rax
    jmp ist_done

    # ---- syscall, 64-bit ----
    .balign 64
    .global blanket_syscall64
blanket_syscall64:
    mov [rip + hw + {F_RSP}], rsp
    lea rsp, [rip + hw]
    cmp byte ptr [rsp + {F_KMODE}], 0
    jne hypercall
    # From guest user mode to the guest kernel's handler.
    mov [rsp + {F_TMP0}], rax
    mov [rsp + {F_TMP1}], rdx
    cmp qword ptr [rsp + {F_SYSCALL}], 0
    je syscall_restore
    mov rdx, [rsp + {F_INFO}]
    mov rax, [rsp + {F_KSP}]
70: cmp byte ptr [rdx + 1], 0
    jne syscall_restore
    swapgs
    mov rdx, [rsp + {F_KCR3}]
    mov cr3, rdx
    mov rdx, [rsp + {F_RSP}]
    stac_site
71: mov qword ptr [rax - 8], {SS}
72: mov [rax - 16], rdx
73: mov [rax - 24], r11
74: mov qword ptr [rax - 32], {CS}
75: mov [rax - 40], rcx
76: mov [rax - 48], r11
77: mov [rax - 56], rcx
    mov rdx, [rsp + {F_INFO}]
78: mov byte ptr [rdx + 1], 1
    mov byte ptr [rsp + {F_KMODE}], 1
    inc qword ptr [rsp + {F_NSYS}]
    lea rdx, [rax - 56]
    mov [rsp + {F_TMP2}], rdx
    mov rcx, [rsp + {F_SYSCALL}]
    mov r11d, {FLAGS}
    mov rax, [rsp + {F_TMP0}]
    mov rdx, [rsp + {F_TMP1}]
    mov rsp, [rsp + {F_TMP2}]
    sysretq
    # The guest's stack could not be written.
syscall_undo:
    clac_site
    swapgs
syscall_restore:
    mov rax, [rsp + {F_TMP0}]
    mov rdx, [rsp + {F_TMP1}]
syscall_slow:
    push {SS}
    push qword ptr [rsp + {F_RSP} + 8]
    push r11
    push {CS}
    push rcx
    push 0
    push {E_SYSCALL}
    jmp save_and_call

    # ---- hypercall ----
    .balign 16
hypercall:
    cmp rax, 23
    jne syscall_slow
    # iret: the frame is on the guest's stack: rax, r11, rcx, flags, rip, cs,
    # rflags, rsp, ss. RCX and R11 are free.
    cmp byte ptr [rsp + {F_SLOW}], 0
    jne syscall_slow
    mov rcx, [rsp + {F_RSP}]
    # The hypervisor's range is readable here but not the guest's.
    mov r11, rcx
    shr r11, 43
    cmp r11d, 0x1ffff0
    je syscall_slow
    cmp qword ptr [rsp + {F_UCR3}], 0
    je syscall_slow
    stac_site
20: mov r11d, [rcx + 40]
    not r11d
    test r11d, 3
    jnz hypercall_slow
21: bt dword ptr [rcx + 48], 9
    jnc hypercall_slow
22: test dword ptr [rcx + 24], 0x100
    jnz hypercall_slow
    mov r11, [rsp + {F_INFO}]
    test r11, r11
    jz hypercall_slow
23: cmp byte ptr [r11], 0
    jne hypercall_slow
24: movzx r11d, word ptr [rcx + 64]
    or r11d, 3
    push r11
25: push qword ptr [rcx + 56]
26: mov r11, [rcx + 48]
    and r11d, {USER_FLAGS}
    or r11d, {FLAGS}
    push r11
27: movzx r11d, word ptr [rcx + 40]
    or r11d, 3
    push r11
28: push qword ptr [rcx + 32]
29: mov rax, [rcx + 8]
    mov [rsp + 40 + {F_TMP0}], rax
30: mov rax, [rcx]
31: mov rcx, [rcx + 16]
    mov r11, [rsp + 40 + {F_INFO}]
32: mov byte ptr [r11 + 1], 0
    mov byte ptr [rsp + 40 + {F_KMODE}], 0
    inc qword ptr [rsp + 40 + {F_NIRET}]
    mov r11, [rsp + 40 + {F_UCR3}]
    mov cr3, r11
    swapgs
    mov r11, [rsp + 40 + {F_TMP0}]
    .global blanket_iret_fast
blanket_iret_fast:
    iretq
hypercall_undo:
    lea rsp, [rip + hw]
    mov eax, 23
hypercall_slow:
    clac_site
    jmp syscall_slow

    # ---- syscall, 32-bit ----
    .balign 16
    .global blanket_syscall32
blanket_syscall32:
    mov [rip + hw + {F_RSP}], rsp
    lea rsp, [rip + hw]
    push {SS}
    push qword ptr [rsp + {F_RSP} + 8]
    push r11
    push {CS32}
    push rcx
    push 0
    push {E_SYSCALL32}
    jmp save_and_call

    # First instruction of a vCPU, somewhere near the top of its main stack.
    .global blanket_start
blanket_start:
    mov rax, rsp
    and rax, -{STRIDE}
    lea rsp, [rax + {HW} - {FRAME}]
    mov rdi, rsp
    xor ebp, ebp
    movabs rax, offset blanket_start_vcpu
    call rax
    jmp blanket_return

    .balign 4096
    .global blanket_entry_end
blanket_entry_end:

    .section .extable, "a"
    .irp at, 71, 72, 73, 74, 75, 76, 77, 78
    .quad \at\()b, syscall_undo
    .endr
    .quad 70b, syscall_restore
    .irp at, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32
    .quad \at\()b, hypercall_undo
    .endr

    .section .text
    # blanket_copy(to: rdi, from: rsi, bytes: rdx) -> 0, or 1 if an access faulted.
    .global blanket_copy
blanket_copy:
    stac_site
    sub rdx, 16
    jb 34f
33: mov rax, [rsi]
35: mov rcx, [rsi + 8]
36: mov [rdi], rax
37: mov [rdi + 8], rcx
    add rsi, 16
    add rdi, 16
    sub rdx, 16
    jae 33b
34: test dl, 8
    jz 40f
38: mov rax, [rsi]
39: mov [rdi], rax
    add rsi, 8
    add rdi, 8
40: and edx, 7
    jz 45f
43: mov al, [rsi]
44: mov [rdi], al
    inc rsi
    inc rdi
    dec edx
    jnz 43b
45: xor eax, eax
    clac_site
    ret
46: mov eax, 1
    clac_site
    ret

    # blanket_load_selectors(ds: edi, es: esi, fs: edx, gs: ecx) -> faults. A
    # selector that the CPU refuses becomes null. GS bases must be set afterwards.
    .global blanket_load_selectors
blanket_load_selectors:
    xor eax, eax
50: mov ds, edi
51: mov es, esi
52: mov fs, edx
53: mov gs, ecx
    ret
54: xor edi, edi
    inc eax
    jmp 50b
55: xor esi, esi
    inc eax
    jmp 51b
56: xor edx, edx
    inc eax
    jmp 52b
57: xor ecx, ecx
    inc eax
    jmp 53b

    # blanket_load_fpu(image: rdi, xsave: esi) -> 0, or 1 if the CPU refused it.
    .global blanket_load_fpu
blanket_load_fpu:
    mov eax, -1
    mov edx, -1
    test esi, esi
    jz 61f
60: xrstor64 [rdi]
    jmp 62f
61: fxrstor64 [rdi]
62: xor eax, eax
    ret
63: mov eax, 1
    ret

    # blanket_leave(switch: rdi): to the host. The module pops what is pushed here
    # and returns to our caller.
    .global blanket_leave
blanket_leave:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rax, [rdi + {S_TRANS}]
    mov cr3, rax
    mov [rdi + {S_RSP}], rsp
    jmp [rdi + {S_EXIT}]

    .section .extable, "a"
    .irp at, 33, 35, 36, 37, 38, 39, 43, 44
    .quad \at\()b, 46b
    .endr
    .quad 50b, 54b, 51b, 55b, 52b, 56b, 53b, 57b
    .quad 60b, 63b, 61b, 63b
    .text
    "#,
    BASE = const layout::IMAGE,
    CLAC = const SMAP_CLAC,
    IF = const rflags::IF,
    VCPU = const layout::VCPU,
    AREAS = const layout::MAX_VCPUS as u64 * VCPU_STRIDE,
    HW = const area::HW,
    STRIDE = const VCPU_STRIDE,
    FRAME = const size_of::<TrapFrame>(),
    L_CORE = const LOCAL + offset_of!(Local, core_cr3),
    L_GUEST = const LOCAL + offset_of!(Local, guest_cr3),
    F_RSP = const FAST + offset_of!(Fast, scratch_rsp),
    F_TMP0 = const FAST + offset_of!(Fast, tmp),
    F_TMP1 = const FAST + offset_of!(Fast, tmp) + 8,
    F_TMP2 = const FAST + offset_of!(Fast, tmp) + 16,
    F_KCR3 = const FAST + offset_of!(Fast, kernel_cr3),
    F_UCR3 = const FAST + offset_of!(Fast, user_cr3),
    F_KSP = const FAST + offset_of!(Fast, kernel_sp),
    F_SYSCALL = const FAST + offset_of!(Fast, syscall),
    F_INFO = const FAST + offset_of!(Fast, vcpu_info),
    F_KMODE = const FAST + offset_of!(Fast, kernel_mode),
    F_SLOW = const FAST + offset_of!(Fast, slow_iret),
    F_NSYS = const FAST + offset_of!(Fast, fast_syscalls),
    F_TRAP = const FAST + offset_of!(Fast, trap),
    F_NIRET = const FAST + offset_of!(Fast, fast_irets),
    SS = const sel::GUEST_SS,
    CS = const sel::GUEST_CS64,
    CS32 = const sel::GUEST_CS32,
    FLAGS = const rflags::IF | rflags::ONE,
    USER_FLAGS = const 0x3f_7fd5 & !rflags::HYPERVISOR,
    E_SYSCALL = const entry::SYSCALL,
    E_SYSCALL32 = const entry::SYSCALL32,
    S_TRANS = const offset_of!(Switch, trans_cr3),
    S_RSP = const offset_of!(Switch, core_rsp),
    S_EXIT = const offset_of!(Switch, exit_entry),
);

// SAFETY: these are labels in the assembly above; the functions among them
// follow the C calling convention with the signatures given.
unsafe extern "C" {
    pub static blanket_entry_start: u8;
    pub static blanket_entry_end: u8;
    /// End of the text, from the linker script.
    pub static blanket_text_end: u8;
    pub static blanket_syscall64: u8;
    pub static blanket_syscall32: u8;
    pub static blanket_iret_fast: u8;
    pub static blanket_iret_slow: u8;
    pub fn blanket_copy(to: *mut u8, from: *const u8, bytes: usize) -> u64;
    pub fn blanket_load_selectors(ds: u32, es: u32, fs: u32, gs: u32) -> u32;
    pub fn blanket_load_fpu(image: *const u8, xsave: u32) -> u32;
    pub fn blanket_leave(switch: *mut Switch);
    /// The exception table: pairs of (address, where to go on).
    pub static blanket_extable: [u64; 2];
    pub static blanket_extable_end: u8;
}
