/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * A core image of a page or two that knows no guests: it exercises the module.
 * boot.flags chooses what vCPU 0 does, boot.rip is a count:
 *   0  every exit in turn, then SHUTDOWN with what was counted
 *   1  CPL 3 until RAISE(0)
 *   2  boot.rip KICK round trips, then SHUTDOWN (for counting instructions)
 * Other vCPUs run at CPL 3 until RAISE(0). It does not look at frames that the host takes
 * back: for a host with memory to spare.
 */
#include "../blanket.h"

/* Switch block fields beyond those of the world switch. */
#define SW_EXIT		0xb0
#define SW_PENDING	0xb4
#define SW_ARGS		0xb8
#define SW_RET		0xd8
#define SW_DEADLINE	0xe0
#define SW_VCPU		0x128
#define SW_EXIT_ENTRY	0x130
#define SW_DATA		(0x140 + 8 * BLANKET_COUNTERS)
/* VM page fields. */
#define VP_FLAGS	0x48
#define VP_RIP		0x28
#define VP_LA57		0x84
#define VP_SYSTEM_TIME	0xa8
#define VP_RAISED	0xc8
#define VP_HOLE		(0xc8 + 66 * 8 + 2048)

/* Our own state, behind the switch block. */
#define MY_RIP		0xc00
#define MY_RSP		0xc08
#define MY_FLAGS	0xc10
#define MY_RAX		0xc18
#define MY_RBX		0xc20
#define MY_ROOT		0xc28
#define MY_INTR		0xc30
#define MY_NMI3		0xc38
#define MY_NMI0		0xc40
#define MY_KICKS	0xc48
#define MY_LIMIT	0xc50
#define MY_THEN		0xc58

#define USER_GFN	5
#define USER_VA		0x400000

	.text
header:
	.quad	BLANKET_IMAGE_MAGIC
	.long	BLANKET_API_VERSION
	.long	0xb40
	.quad	entry - header
	.quad	entry_end - header
	.quad	text_end - header
	.quad	rodata_end - header
	.quad	data_end - header
	.quad	data_end - header
	.quad	start - header
	.quad	idt - header
	.quad	stubs - header

/* r15 = switch block, r14 = VM page, throughout. */
start:
	movq	%rsp, %r15
	movabsq	$BLANKET_VM_PAGE, %r14
	call	make_root
	cmpl	$0, SW_VCPU(%r15)
	jne	run_until_raised
	cmpq	$1, VP_FLAGS(%r14)
	je	run_until_raised
	cmpq	$2, VP_FLAGS(%r14)
	jne	1f
	call	kicks
	jmp	finish

1:	leaq	hello(%rip), %rsi
	leaq	SW_DATA(%r15), %rdi
	movl	$hello_len, %ecx
	movq	%rcx, SW_ARGS+24(%r15)
	rep movsb
	movl	$BLANKET_EXIT_CONSOLE, %eax
	call	leave

	call	kicks

	/* Frames: a bad one, a good one; then the window must show it. */
	movq	$-1, SW_ARGS(%r15)
	movl	$BLANKET_EXIT_FRAME, %eax
	call	leave
	cmpq	$-22, SW_RET(%r15)
	jne	fail
	movabsq	$BLANKET_WINDOW + 4096 * USER_GFN, %rbx
	movq	$0x1234567, 8*500(%rbx)

	/* Flush the others, again and again, while they run at CPL 3. */
	movl	$1000, %ebx
1:	movq	$-1, SW_ARGS(%r15)
	movl	$BLANKET_EXIT_FLUSH, %eax
	call	leave
	decl	%ebx
	jnz	1b

	/* Sleep for 300 ms; only the timer can end it. */
	movl	$0, SW_PENDING(%r15)
	movq	VP_SYSTEM_TIME(%r14), %rax
	addq	$300000000, %rax
	movq	%rax, SW_DEADLINE(%r15)
	movl	$BLANKET_EXIT_IDLE, %eax
	call	leave
	testl	$BLANKET_PENDING_KICK, SW_PENDING(%r15)
	jz	fail
	movq	$-1, SW_DEADLINE(%r15)
	movl	$BLANKET_EXIT_DEADLINE, %eax
	call	leave
	movl	$BLANKET_EXIT_YIELD, %eax
	call	leave

	/* CPL 3 until 100 interrupts. */
	movq	$100, MY_LIMIT(%r15)
	leaq	finish(%rip), %rax
	movq	%rax, MY_THEN(%r15)
	jmp	user

run_until_raised:
	movq	$-1, MY_LIMIT(%r15)
	jmp	user

finish:
	movq	$0, SW_ARGS(%r15)
	movq	MY_INTR(%r15), %rax
	movq	%rax, SW_ARGS+8(%r15)
	movq	MY_NMI3(%r15), %rax
	movq	%rax, SW_ARGS+16(%r15)
	movq	MY_NMI0(%r15), %rax
	movq	%rax, SW_ARGS+24(%r15)
	movl	$BLANKET_EXIT_SHUTDOWN, %eax
	call	leave
	jmp	finish

fail:	movl	$BLANKET_EXIT_CRASH, %eax
	movl	$BLANKET_CRASH_CORE, SW_ARGS(%r15)
	movq	$0, SW_ARGS+24(%r15)
	call	leave
	ud2

kicks:	movq	VP_RIP(%r14), %rbx
1:	movq	$0, SW_ARGS(%r15)
	movl	$BLANKET_EXIT_KICK, %eax
	call	leave
	decq	%rbx
	jnz	1b
	ret

/* Leaves with reason eax; all but callee-saved registers are lost. */
leave:
	movl	%eax, SW_EXIT(%r15)
	movq	SW_TRANS_CR3(%r15), %rax
	movq	%rax, %cr3
	pushq	%rbx
	pushq	%rbp
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	movq	%rsp, SW_CORE_RSP(%r15)
	movq	%r15, %rdi
	jmp	*SW_EXIT_ENTRY(%rdi)

/*
 * A root of the core's own: the hole, and one user page. Pool pages 8n to 8n+4
 * belong to vCPU n: L4, L3, L2, L1, and the L5 that a 5-level host needs.
 */
make_root:
	movq	$USER_GFN, SW_ARGS(%r15)
	movl	$BLANKET_EXIT_FRAME, %eax
	call	leave
	cmpq	$0, SW_RET(%r15)
	jne	fail
	movq	$8, SW_ARGS(%r15)
	movl	$BLANKET_EXIT_POOL, %eax
	call	leave
	movl	SW_VCPU(%r15), %ecx
	shll	$3, %ecx
	movabsq	$BLANKET_POOL_PTES, %rsi
	leaq	(%rsi,%rcx,8), %rsi		/* our leaf entries */
	movq	%rcx, %rdi
	shlq	$12, %rdi
	movabsq	$BLANKET_POOL, %rax
	addq	%rax, %rdi			/* our pages */
	movabsq	$0x000ffffffffff000, %rdx
	movq	8(%rsi), %rax
	andq	%rdx, %rax
	orq	$0x27, %rax
	movq	%rax, (%rdi)			/* L4[0] */
	movq	16(%rsi), %rax
	andq	%rdx, %rax
	orq	$0x27, %rax
	movq	%rax, 4096(%rdi)		/* L3[0] */
	movq	24(%rsi), %rax
	andq	%rdx, %rax
	orq	$0x27, %rax
	movq	%rax, 2*4096+8*2(%rdi)		/* L2[2] */
	movabsq	$BLANKET_WINDOW_PTES + 8 * USER_GFN, %rbx
	movq	(%rbx), %rax
	andq	%rdx, %rax
	orq	$0x67, %rax
	movq	%rax, 3*4096(%rdi)		/* L1[0] */
	movq	(%rsi), %rax
	andq	%rdx, %rax
	cmpl	$0, VP_LA57(%r14)
	je	1f
	orq	$0x27, %rax
	movq	%rax, 4*4096(%rdi)
	movq	%rax, 4*4096+8*511(%rdi)
	movq	32(%rsi), %rax
	andq	%rdx, %rax
1:	movq	%rax, MY_ROOT(%r15)
	leaq	8*256(%rdi), %rdi
	leaq	VP_HOLE(%r14), %rsi
	movl	$16, %ecx
	rep movsq
	movq	$USER_VA, MY_RIP(%r15)
	movq	$USER_VA + 0x800, MY_RSP(%r15)
	movq	$0x202, MY_FLAGS(%r15)
	/* The code goes in through the window. */
	leaq	user_code(%rip), %rsi
	movabsq	$BLANKET_WINDOW + 4096 * USER_GFN, %rdi
	movl	$user_len, %ecx
	rep movsb
	ret

/* Goes on at CPL 3. Comes back to `trapped` with an empty main stack. */
user:
	leaq	BLANKET_VCPU_HW - BLANKET_VCPU_HW(%r15), %rsp
	testl	$BLANKET_PENDING_NMI | BLANKET_PENDING_MCE, SW_PENDING(%r15)
	jz	1f
	movl	$BLANKET_EXIT_DEADLINE, %eax
	call	leave
	jmp	user
1:	movl	$0xc0000101, %ecx		/* a GS base like a guest kernel's */
	movl	$0x1000, %eax
	movl	$0xffff8881, %edx
	wrmsr
	movq	MY_ROOT(%r15), %rax
	movq	%rax, %cr3
	pushq	$BLANKET_GUEST_SS
	pushq	MY_RSP(%r15)
	pushq	MY_FLAGS(%r15)
	pushq	$BLANKET_GUEST_CS64
	pushq	MY_RIP(%r15)
	movq	MY_RAX(%r15), %rax
	movq	MY_RBX(%r15), %rbx
	iretq

/* rax = vector, r15 and r14 set, user state saved. */
trapped:
	cmpl	$2, %eax
	je	2f
	cmpl	$32, %eax
	jb	fail
	incq	MY_INTR(%r15)
	movq	%rax, SW_ARGS(%r15)
	movl	$BLANKET_EXIT_INTR, %eax
	jmp	3f
2:	incq	MY_NMI3(%r15)
	movl	$BLANKET_EXIT_NMI, %eax
3:	call	leave
	testl	$BLANKET_PENDING_KICK, SW_PENDING(%r15)
	jz	4f
	lock andl $~BLANKET_PENDING_KICK, SW_PENDING(%r15)
	incq	MY_KICKS(%r15)
4:	testq	$1, VP_RAISED(%r14)
	jz	5f
	cmpq	$-1, MY_LIMIT(%r15)
	je	finish
5:	movq	MY_INTR(%r15), %rax
	cmpq	MY_LIMIT(%r15), %rax
	jb	user
	jmp	*MY_THEN(%r15)

	.balign	4096
entry:
stubs:
	.set	v, 0
	.rept	256
	.balign	16
	.if	!(v == 8 || (v >= 10 && v <= 14) || v == 17 || v == 21 || v == 29 || v == 30)
	pushq	$0
	.endif
	pushq	$v
	jmp	common
	.set	v, v + 1
	.endr

/* [rsp]: vector, error, rip, cs, rflags, rsp, ss */
common:
	testb	$3, 24(%rsp)
	jz	ring0
	pushq	%r15
	movq	%rsp, %r15
	andq	$~(BLANKET_VCPU_STRIDE - 1), %r15
	addq	$BLANKET_VCPU_HW, %r15
	movq	%rax, MY_RAX(%r15)
	movq	%rbx, MY_RBX(%r15)
	movq	24(%rsp), %rax
	movq	%rax, MY_RIP(%r15)
	movq	40(%rsp), %rax
	movq	%rax, MY_FLAGS(%r15)
	movq	48(%rsp), %rax
	movq	%rax, MY_RSP(%r15)
	movq	8(%rsp), %rax
	movq	%r15, %rsp
	movabsq	$BLANKET_VM_PAGE, %r14
	movabsq	$trapped, %rbx
	jmp	*%rbx

ring0:
	pushq	%rax
	pushq	%rcx
	movq	%rsp, %rax
	andq	$~(BLANKET_VCPU_STRIDE - 1), %rax
	cmpl	$2, 16(%rsp)
	jne	1f
	lock orl $BLANKET_PENDING_NMI, BLANKET_VCPU_HW+SW_PENDING(%rax)
	incq	BLANKET_VCPU_HW+MY_NMI0(%rax)
	/* Back without IRETQ: NMIs stay blocked until the host's handler ran. */
	movq	56(%rsp), %rax
	movq	32(%rsp), %rcx
	movq	%rcx, -8(%rax)
	movq	48(%rsp), %rcx
	movq	%rcx, -16(%rax)
	subq	$16, %rax
	movq	%rax, 56(%rsp)
	popq	%rcx
	popq	%rax
	movq	40(%rsp), %rsp
	popfq
	ret
1:	leaq	BLANKET_VCPU_HW(%rax), %r15
	movq	16(%rsp), %rcx
	movq	%rcx, SW_ARGS+8(%r15)
	movq	32(%rsp), %rcx
	movq	%rcx, SW_ARGS+16(%r15)
	movabsq	$fail, %rax
	jmp	*%rax

	.balign	4096
entry_end:
text_end:

hello:	.ascii	"hello from the core world\n"
	.set	hello_len, . - hello
/* Counts, and watches that its SSE register stays its own. */
user_code:
	movabsq	$0x1122334455667788, %rax
	movd	%eax, %xmm3
	movq	%rax, %xmm7
1:	incq	user_code + 0x900(%rip)
	movq	%xmm7, %rbx
	cmpq	%rax, %rbx
	je	1b
	incq	user_code + 0x908(%rip)
	jmp	1b
	.set	user_len, . - user_code
	.balign	4096
rodata_end:
	.fill	4096, 1, 0x5a
idt:	.fill	4096, 1, 0
data_end:
