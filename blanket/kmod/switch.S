/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * The world switch, and the way back into the host's interrupt handlers.
 *
 * Both directions run with interrupts off, but an NMI or a machine check may
 * arrive between any two instructions. What keeps them survivable:
 *
 *   While the IDT is the host's, the gates' code selector (host CS) and the
 *   interrupted CS and SS (IRETQ loads both, unless SS is null, as it is behind a
 *   trap from the guest) must be in the GDT, CR4 and the GS base must be the
 *   host's (paranoid entry uses RDGSBASE, or the sign of the base), and bit 12
 *   of CR3 must be clear or mean what page-table isolation takes it for.
 *   While the IDT is the core's, CS must be the core's (its NMI stub returns
 *   without IRETQ) and TR must be the core's (it finds its vCPU by the stack).
 *   Either TR is good under the host's IDT: both TSSs have a stack of a page in
 *   IST slots 1 to 4 for the same four vectors, mapped in every root used.
 *
 *   way in, after            | IDT  | TR   | CS   | GDT   | CR4  | GS   | CR3
 *   -------------------------+------+------+------+-------+------+------+------
 *   (entry)                  | host | host | host | host  | host | host | host
 *   mov cr3                  | host | host | host | host  | host | host | trans
 *   lgdt                     | host | host | host | trans | host | host | trans
 *   ltr                      | host | core | host | trans | host | host | trans
 *   lretq                    | host | core | core | trans | host | host | trans
 *   lidt                     | core | core | core | trans | host | host | trans
 *   mov cr4, lldt, SS, DS    | core | core | core | trans | core | host | trans
 *   lgdt                     | core | core | core | core  | core | host | trans
 *
 *   way out, after           |      |      |      |       |      |      |
 *   -------------------------+------+------+------+-------+------+------+------
 *   (entry)                  | core | core | core | core  | core | any  | trans
 *   lgdt                     | core | core | core | trans | core | any  | trans
 *   selectors, wrmsr, dr7, SS| core | core | core | trans | core | host | trans
 *   mov cr4                  | core | core | core | trans | host | host | trans
 *   lidt                     | host | core | core | trans | host | host | trans
 *   lretq                    | host | core | host | trans | host | host | trans
 *   ltr                      | host | host | host | trans | host | host | trans
 *   lgdt, lldt               | host | host | host | host  | host | host | trans
 *   mov cr3                  | host | host | host | host  | host | host | host
 *
 * The transition GDT is a copy of the host's first page with its TSS not busy,
 * and the core's reserved page. The transition root maps the host's kernel half
 * and the hole; it is 8 KiB aligned, so bit 12 of CR3 is clear. CR4.PCIDE can
 * be set again only while CR3[11:0] is 0, hence CR4 before CR3 on the way out.
 */
#include <linux/linkage.h>
#include <linux/objtool.h>
#include <linux/version.h>
#include <asm/asm.h>
#include <asm/msr-index.h>
#include <asm/nospec-branch.h>
#include <asm/unwind_hints.h>
#include "blanket.h"

/* Kernels before 5.18 know nothing of indirect branch tracking. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 18, 0)
#include <asm/ibt.h>
#else
#define ENDBR
#endif

/* Frame of the callers of both halves: six pushed registers, return address. */
#define FRAME_CFA 56

.macro restore_msr msr:req offset:req
	movl	$\msr, %ecx
	movl	\offset(%rdi), %eax
	movl	\offset+4(%rdi), %edx
	wrmsr
.endm

	.text

/*
 * void blanket_world_switch(struct blanket_switch *sw)
 *
 * Into the core world; returns when the core comes back through
 * blanket_world_exit. rdi is the host's address of the block throughout.
 */
SYM_FUNC_START(blanket_world_switch)
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rsp, SW_HOST_RSP(%rdi)

	movq	SW_TRANS_CR3(%rdi), %rax
	movq	%rax, %cr3
	lgdt	SW_TRANS_GDTR+DTR_LIMIT(%rdi)
	movl	$BLANKET_CORE_TSS, %eax
	ltr	%ax
	pushq	$BLANKET_CORE_CS
	leaq	.Lin_core_cs(%rip), %rax
	pushq	%rax
	lretq
.Lin_core_cs:
	UNWIND_HINT sp_reg=ORC_REG_SP sp_offset=FRAME_CFA type=UNWIND_HINT_TYPE_CALL
	lidt	SW_CORE_IDTR+DTR_LIMIT(%rdi)
	movq	SW_CORE_CR4(%rdi), %rax
	movq	%rax, %cr4
	xorl	%eax, %eax
	lldt	%ax
	movl	%eax, %ds
	movl	%eax, %es
	movl	$BLANKET_CORE_SS, %eax
	movl	%eax, %ss
	lgdt	SW_CORE_GDTR+DTR_LIMIT(%rdi)

	/* The core's frame has the same shape, and its start address the first time. */
	movq	SW_CORE_RSP(%rdi), %rsp
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbp
	popq	%rbx
	UNWIND_HINT_FUNC
	RET

/*
 * The core jumps here: transition root loaded, its frame saved, rdi = its own
 * address of the switch block.
 */
SYM_INNER_LABEL(blanket_world_exit, SYM_L_GLOBAL)
	UNWIND_HINT sp_reg=ORC_REG_SP sp_offset=FRAME_CFA type=UNWIND_HINT_TYPE_CALL
	ENDBR
	movq	SW_HOST_SELF(%rdi), %rdi
	lgdt	SW_TRANS_GDTR+DTR_LIMIT(%rdi)
	/* Null is right for nearly every host task; C reloads the others. */
	xorl	%eax, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %fs
	movl	%eax, %gs
	restore_msr MSR_FS_BASE, SW_HOST_FS_BASE
	restore_msr MSR_GS_BASE, SW_HOST_GS_BASE
	restore_msr MSR_KERNEL_GS_BASE, SW_HOST_KGS_BASE
	/* A guest's watchpoints are on addresses that the host uses as well. */
	testl	$0x20ff, SW_GUEST_DR7(%rdi)
	jz	.Lno_watchpoints
	xorl	%eax, %eax
	movq	%rax, %db7
.Lno_watchpoints:
	/* The core's SS, if it came by a system call, is not in the host's GDT. */
	movw	SW_HOST_SS(%rdi), %ss
	movq	SW_HOST_CR4(%rdi), %rax
	movq	%rax, %cr4
	lidt	SW_HOST_IDTR+DTR_LIMIT(%rdi)
	movzwl	SW_HOST_CS(%rdi), %eax
	pushq	%rax
	leaq	.Lin_host_cs(%rip), %rax
	pushq	%rax
	lretq
.Lin_host_cs:
	UNWIND_HINT sp_reg=ORC_REG_SP sp_offset=FRAME_CFA type=UNWIND_HINT_TYPE_CALL
	ltr	SW_HOST_TR(%rdi)
	lgdt	SW_HOST_GDTR+DTR_LIMIT(%rdi)
	lldt	SW_HOST_LDT(%rdi)
	movq	SW_HOST_RSP(%rdi), %rsp
	movq	SW_HOST_CR3(%rdi), %rax
	movq	%rax, %cr3

	/*
	 * The guest's calls left return addresses, some of them where the host has its
	 * kernel. If the host fills the buffer when it changes tasks, it must be filled.
	 */
	FILL_RETURN_BUFFER %rax, RSB_CLEAR_LOOPS, X86_FEATURE_RSB_CTXSW

	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%rbp
	popq	%rbx
	UNWIND_HINT_FUNC
	RET
SYM_FUNC_END(blanket_world_switch)

/*
 * void blanket_interrupt(unsigned int vector)
 *
 * Runs the host's own handler for a vector that arrived in the core world: a
 * software interrupt through the host's IDT, so nothing is assumed about the
 * handler but that it ends in IRETQ. The APIC already has the vector in
 * service, so the handler's EOI is the right one. Returns instead of indirect
 * jumps: neither retpolines nor IBT have an interest in them.
 */
SYM_FUNC_START(blanket_interrupt)
	movzbl	%dil, %eax
	shll	$4, %eax
	leaq	.Lstubs(%rip), %rdx
	addq	%rdx, %rax
	pushq	%rax
	UNWIND_HINT_FUNC
	RET

	.balign	16, 0xcc
.Lstubs:
	.set	vector, 0
	.rept	256
	.balign	16, 0xcc
	ANNOTATE_NOENDBR
	UNWIND_HINT_FUNC
	/* Spelt out: the assembler turns "int $3" into the one-byte form. */
	.byte	0xcd, vector
	RET
	.set	vector, vector + 1
	.endr
SYM_FUNC_END(blanket_interrupt)
