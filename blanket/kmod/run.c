// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * RUN: into the core world, back, and what each way back asks for.
 *
 * Nobody is lost: whoever wants a vCPU's attention sets a bit in its pending
 * word first and looks at vcpu->cpu afterwards; the vCPU stores vcpu->cpu first
 * and looks at signals afterwards, with interrupts off, and the core looks at
 * the pending word before it enters the guest. An IPI that comes in between
 * stays pending in the APIC and ends the guest's first instruction.
 */
#include <linux/hrtimer.h>
#include <linux/ktime.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/smp.h>
#include <asm/cpufeature.h>
#include <asm/debugreg.h>
#include <asm/desc.h>
#include <asm/fpu/api.h>
#include <asm/fpu/types.h>
#include <asm/fpu/xcr.h>
#include <asm/irq_vectors.h>
#include <asm/mmu_context.h>
#include <asm/msr.h>
#include <asm/segment.h>
#include <asm/special_insns.h>
#include <asm/trapnr.h>
#include "internal.h"

/*
 * CR4 bits that the core world keeps from the host. Gone are, among others, PGE
 * (the host's global entries are guest addresses), PCIDE, PKE, SMAP, CET, TSD,
 * UMIP, PCE and FSGSBASE. VMXE cannot be cleared while KVM has VMX on.
 */
#define CORE_CR4 (X86_CR4_DE | X86_CR4_PSE | X86_CR4_PAE | X86_CR4_MCE | \
		  X86_CR4_OSFXSR | X86_CR4_OSXMMEXCPT | X86_CR4_LA57 | \
		  X86_CR4_VMXE | X86_CR4_OSXSAVE | X86_CR4_SMEP)

/* First interrupt vector that is not an exception. */
#define FIRST_VECTOR	32
#define SYSCALL_VECTOR	0x80

/* Newer kernels name these by the operand's letter. */
#ifndef native_wrmsrl
#define native_wrmsrl native_wrmsrq
#define __rdmsr native_rdmsrq
#endif

#define TSS_BUSY	(1ULL << 41)

/* Host state that C code keeps over a visit to the core world. */
struct host_state {
	u64 msrs[4];
	u64 sysenter_cs;
	u64 tsc_aux;
	u64 cpuid;
	u64 xcr0;
	unsigned long dr[4];
	unsigned long dr7;
	bool watchpoints;
};

static const u32 syscall_msrs[4] = {
	MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SYSCALL_MASK,
};

/* ---- other vCPUs ---- */

static u32 pending_set(struct blanket_vcpu *vcpu, u32 bits)
{
	/* Fully ordered: the bit is visible before vcpu->cpu is read. */
	return atomic_fetch_or(bits, (atomic_t *)&vcpu->sw->pending);
}

void blanket_kick(struct blanket_vcpu *vcpu, u32 pending)
{
	int cpu;

	pending_set(vcpu, pending);
	cpu = READ_ONCE(vcpu->cpu);
	/*
	 * A reschedule IPI needs no slot of its own, so it is not lost behind
	 * another and may be sent from anywhere; arriving is all it has to do.
	 * Newer kernels wrap the name in a macro with a trace point; the
	 * parentheses keep it out.
	 */
	if (cpu >= 0 && cpu != raw_smp_processor_id())
		(smp_ops.smp_send_reschedule)(cpu);
	if (wq_has_sleeper(&vcpu->wait))
		wake_up(&vcpu->wait);
}

static void arrived(void *unused)
{
}

static void kick_mask(struct blanket_vcpu *self, u64 mask)
{
	struct blanket_vm *vm = self->vm;
	unsigned int id;

	for (id = 0; id < vm->nr_vcpus; id++)
		if ((mask >> id & 1) && vm->vcpus[id] != self)
			blanket_kick(vm->vcpus[id], BLANKET_PENDING_KICK);
}

/*
 * Returns when each vCPU of the mask has been out of the core world after the
 * call began: every entry loads CR3 anew. @self is left out. Waits with interrupts
 * on, but does not sleep.
 */
void blanket_wait_out(struct blanket_vm *vm, u64 mask, const struct blanket_vcpu *self)
{
	unsigned int id;

	/* The core's table changes, or the gate, before the reads of vcpu->cpu. */
	smp_mb();
	for (id = 0; id < vm->nr_vcpus; id++) {
		int cpu;

		if (!(mask >> id & 1) || vm->vcpus[id] == self)
			continue;
		cpu = READ_ONCE(vm->vcpus[id]->cpu);
		if (cpu >= 0)
			smp_call_function_single(cpu, arrived, NULL, 1);
	}
}

static void vm_kill(struct blanket_vcpu *self)
{
	WRITE_ONCE(self->vm->dead, true);
	kick_mask(self, ~0ULL);
}

/* ---- the timer ---- */

enum hrtimer_restart blanket_timer_fn(struct hrtimer *timer)
{
	struct blanket_vcpu *vcpu = container_of(timer, struct blanket_vcpu, timer);

	WRITE_ONCE(vcpu->sw->armed, U64_MAX);
	blanket_kick(vcpu, BLANKET_PENDING_KICK);
	return HRTIMER_NORESTART;
}

/* Makes the timer follow the core's deadline, on this CPU. */
static void arm_timer(struct blanket_vcpu *vcpu)
{
	struct blanket_switch *sw = vcpu->sw;
	u64 deadline = READ_ONCE(sw->deadline);
	int cpu = raw_smp_processor_id();

	if (deadline == READ_ONCE(sw->armed) &&
	    (deadline == U64_MAX || cpu == vcpu->timer_cpu))
		return;
	if (deadline == U64_MAX || deadline <= ktime_get_ns()) {
		/* One that is just firing does no harm. */
		hrtimer_try_to_cancel(&vcpu->timer);
		WRITE_ONCE(sw->armed, U64_MAX);
		if (deadline != U64_MAX)
			pending_set(vcpu, BLANKET_PENDING_KICK);
		return;
	}
	/*
	 * First the record, so that a timer that fires at once clears it. An old
	 * one that fires in between clears it too early: the core then exits for
	 * a deadline that is armed, and we come here again.
	 */
	WRITE_ONCE(sw->armed, deadline);
	vcpu->timer_cpu = cpu;
	hrtimer_start(&vcpu->timer, ns_to_ktime(min_t(u64, deadline, KTIME_MAX)),
		      HRTIMER_MODE_ABS_PINNED);
}

/* ---- the switch ---- */

/*
 * The transition root: the host's kernel half as it is now, and the hole. The
 * host's top-level entries hardly ever change (memory hotplug), so once a RUN is
 * enough.
 */
static void refresh_root(struct blanket_vcpu *vcpu)
{
	const unsigned int end = BLANKET_HOLE_END_SLOT;
	const u64 *host = __va(__native_read_cr3() & CR3_ADDR_MASK);

	if (blanket_host.la57) {
		memcpy(vcpu->root + 256, host + 256, (511 - 256) * sizeof(u64));
		host = __va(host[511] & ENTRY_FRAME);
	}
	memcpy(vcpu->root_p4d + end, host + end, (512 - end) * sizeof(u64));
}

/* What the CPU says about itself; good until interrupts are enabled. */
static void read_host(const struct blanket_vcpu *vcpu)
{
	struct blanket_switch *sw = vcpu->sw;

	asm volatile("sgdt %0" : "=m" (*(struct desc_ptr *)&sw->host_gdtr.limit));
	asm volatile("sidt %0" : "=m" (*(struct desc_ptr *)&sw->host_idtr.limit));
	asm volatile("str %0" : "=m" (sw->host_tr));
	asm volatile("sldt %0" : "=m" (sw->host_ldt));
	savesegment(ds, sw->host_ds);
	savesegment(es, sw->host_es);
	savesegment(fs, sw->host_fs);
	savesegment(gs, sw->host_gs);
	savesegment(ss, sw->host_ss);
	savesegment(cs, sw->host_cs);
	sw->host_cr3 = __native_read_cr3();
	sw->host_cr4 = native_read_cr4();
	sw->core_cr4 = sw->host_cr4 & CORE_CR4;
	/* A VM without XSAVE: its programs' CPUID says so, and what needs it is #UD. */
	if (!vcpu->vm->xcr0_mask)
		sw->core_cr4 &= ~X86_CR4_OSXSAVE;
	sw->host_fs_base = __rdmsr(MSR_FS_BASE);
	sw->host_gs_base = __rdmsr(MSR_GS_BASE);
	sw->host_kgs_base = __rdmsr(MSR_KERNEL_GS_BASE);
}

/* Copies the host's GDT and makes both TSSs loadable: LTR refuses busy ones. */
static void prepare_gdt(struct blanket_vcpu *vcpu)
{
	struct blanket_switch *sw = vcpu->sw;
	size_t size = min_t(size_t, sw->host_gdtr.limit + 1, PAGE_SIZE);

	memcpy(vcpu->trans_gdt, (void *)sw->host_gdtr.base, size);
	vcpu->trans_gdt[sw->host_tr / 8] &= ~TSS_BUSY;
	vcpu->reserved_gdt[(BLANKET_CORE_TSS & 0xff8) / 8] &= ~TSS_BUSY;
}

static void save_watchpoints(struct host_state *host)
{
	host->watchpoints = hw_breakpoint_active();
	if (likely(!host->watchpoints))
		return;
	host->dr7 = native_get_debugreg(7);
	native_set_debugreg(7, 0);
	host->dr[0] = native_get_debugreg(0);
	host->dr[1] = native_get_debugreg(1);
	host->dr[2] = native_get_debugreg(2);
	host->dr[3] = native_get_debugreg(3);
}

static void restore_watchpoints(const struct host_state *host)
{
	if (likely(!host->watchpoints))
		return;
	native_set_debugreg(0, host->dr[0]);
	native_set_debugreg(1, host->dr[1]);
	native_set_debugreg(2, host->dr[2]);
	native_set_debugreg(3, host->dr[3]);
	native_set_debugreg(6, DR6_RESERVED);
	native_set_debugreg(7, host->dr7);
}

static void swap_msrs_in(const struct blanket_switch *sw, struct host_state *host)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(syscall_msrs); i++) {
		host->msrs[i] = __rdmsr(syscall_msrs[i]);
		native_wrmsrl(syscall_msrs[i], sw->syscall_msrs[i]);
	}
	/* SYSENTER faults without a code segment, and the guest is not told of it. */
	host->sysenter_cs = __rdmsr(MSR_IA32_SYSENTER_CS);
	native_wrmsrl(MSR_IA32_SYSENTER_CS, 0);
	if (blanket_host.tsc_aux) {
		host->tsc_aux = __rdmsr(MSR_TSC_AUX);
		native_wrmsrl(MSR_TSC_AUX, sw->guest_tsc_aux & U32_MAX);
	}
	if (blanket_host.cpuid_msr) {
		host->cpuid = __rdmsr(blanket_host.cpuid_msr);
		native_wrmsrl(blanket_host.cpuid_msr, host->cpuid | blanket_host.cpuid_bit);
	}
}

static void swap_msrs_out(const struct host_state *host)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(syscall_msrs); i++)
		native_wrmsrl(syscall_msrs[i], host->msrs[i]);
	native_wrmsrl(MSR_IA32_SYSENTER_CS, host->sysenter_cs);
	if (blanket_host.tsc_aux)
		native_wrmsrl(MSR_TSC_AUX, host->tsc_aux);
	if (blanket_host.cpuid_msr)
		native_wrmsrl(blanket_host.cpuid_msr, host->cpuid);
}

/* What XSETBV would refuse, or the VM may not have, becomes x87 and SSE. */
static u64 sane_xcr0(const struct blanket_vcpu *vcpu)
{
	const u64 zmm = XFEATURE_MASK_AVX512, xcr0 = vcpu->sw->guest_xcr0;
	bool bad = (xcr0 & ~(u64)vcpu->vm->xcr0_mask) || !(xcr0 & XFEATURE_MASK_FP) ||
		   ((xcr0 & XFEATURE_MASK_YMM) && !(xcr0 & XFEATURE_MASK_SSE)) ||
		   ((xcr0 & zmm) && ((xcr0 & zmm) != zmm || !(xcr0 & XFEATURE_MASK_YMM)));

	return bad ? XFEATURE_MASK_FPSSE : xcr0;
}

/*
 * The whole image is loaded and saved under the mask of all that guests may have:
 * what a guest has switched off in its XCR0 is neither lost nor left to others. What a
 * VM may not have stays in its initial state, which the image has of it from the start.
 */
static void fpu_in(struct blanket_vcpu *vcpu, struct host_state *host)
{
	u64 mask = blanket_host.xcr0_mask, xcr0;

	if (!blanket_host.xsave) {
		asm volatile("fxrstor64 %0" :: "m" (*(struct fxregs_state *)vcpu->xsave));
		return;
	}
	host->xcr0 = xgetbv(XCR_XFEATURE_ENABLED_MASK);
	if (mask != host->xcr0)
		xsetbv(XCR_XFEATURE_ENABLED_MASK, mask);
	asm volatile("xrstor64 %0" :: "m" (*(struct xregs_state *)vcpu->xsave),
		     "a" (-1), "d" (-1) : "memory");
	xcr0 = sane_xcr0(vcpu);
	if (xcr0 != mask)
		xsetbv(XCR_XFEATURE_ENABLED_MASK, xcr0);
}

static void fpu_out(struct blanket_vcpu *vcpu, const struct host_state *host)
{
	u64 mask = blanket_host.xcr0_mask;

	if (!blanket_host.xsave) {
		asm volatile("fxsave64 %0" : "=m" (*(struct fxregs_state *)vcpu->xsave));
		return;
	}
	if (xgetbv(XCR_XFEATURE_ENABLED_MASK) != mask)
		xsetbv(XCR_XFEATURE_ENABLED_MASK, mask);
	asm volatile("xsave64 %0" : "+m" (*(struct xregs_state *)vcpu->xsave)
		     : "a" (-1), "d" (-1) : "memory");
	if (host->xcr0 != mask)
		xsetbv(XCR_XFEATURE_ENABLED_MASK, host->xcr0);
}

/* Selectors that the switch left null. The bases were not to be touched by it. */
static void reload_selectors(const struct blanket_switch *sw)
{
	if (likely(!(sw->host_ds | sw->host_es | sw->host_fs | sw->host_gs)))
		return;
	loadsegment(ds, sw->host_ds);
	loadsegment(es, sw->host_es);
	if (sw->host_fs) {
		loadsegment(fs, sw->host_fs);
		native_wrmsrl(MSR_FS_BASE, sw->host_fs_base);
	}
	if (sw->host_gs) {
		load_gs_index(sw->host_gs);
		native_wrmsrl(MSR_KERNEL_GS_BASE, sw->host_kgs_base);
	}
}

/*
 * Hands what arrived in the core world to the host, interrupts still off. The
 * NMI and machine check that hit the core in ring 0 left a bit, and stay blocked
 * until the handler's IRETQ, just like those that came as exits.
 */
static void dispatch(struct blanket_vcpu *vcpu, u32 reason)
{
	struct blanket_switch *sw = vcpu->sw;
	const u32 traps = BLANKET_PENDING_NMI | BLANKET_PENDING_MCE;
	u32 flagged = 0;

	if (unlikely(READ_ONCE(sw->pending) & traps))
		flagged = atomic_fetch_andnot(traps, (atomic_t *)&sw->pending);
	if (unlikely(reason == BLANKET_EXIT_MCE || (flagged & BLANKET_PENDING_MCE)))
		blanket_interrupt(X86_TRAP_MC);
	if (unlikely(reason == BLANKET_EXIT_NMI || (flagged & BLANKET_PENDING_NMI)))
		blanket_interrupt(X86_TRAP_NMI);
	if (reason == BLANKET_EXIT_INTR && sw->args[0] >= FIRST_VECTOR &&
	    sw->args[0] <= 0xff && sw->args[0] != SYSCALL_VECTOR)
		blanket_interrupt(sw->args[0]);
}

/*
 * Signals, and work that the kernel does for a task only on its way to user
 * space (memory cgroup throttling, NUMA placement, closing files): the VMM is
 * told EINTR, and its next RUN comes after the work.
 */
static bool wants_user(struct task_struct *task)
{
	return signal_pending(task) || test_tsk_thread_flag(task, TIF_NOTIFY_RESUME);
}

/* One visit to the core world. Returns the reason, or 0 if it did not take place. */
static u32 enter(struct blanket_vcpu *vcpu)
{
	struct blanket_switch *sw = vcpu->sw;
	struct host_state host;
	u32 reason;
	u64 start;

	preempt_disable();
	kernel_fpu_begin();
	local_irq_disable();
	WRITE_ONCE(vcpu->cpu, smp_processor_id());
	/* See the head of this file. */
	smp_mb();
	if (need_resched() || wants_user(current) || atomic_read(&vcpu->vm->gate)) {
		WRITE_ONCE(vcpu->cpu, -1);
		local_irq_enable();
		kernel_fpu_end();
		preempt_enable();
		return 0;
	}

	/* Time is the guest's until the interrupt that ends it is accounted. */
	current->flags |= PF_VCPU;
	start = rdtsc();
	read_host(vcpu);
	prepare_gdt(vcpu);
	save_watchpoints(&host);
	swap_msrs_in(sw, &host);
	fpu_in(vcpu, &host);
	/* See watch.c. */
	WRITE_ONCE(sw->watch, 0);
	this_cpu_write(blanket_visit.sw, sw);
	this_cpu_inc(blanket_visit.count);
	blanket_speculation_enter(vcpu->vm);
	blanket_world_switch(sw);
	this_cpu_inc(blanket_visit.count);

	fpu_out(vcpu, &host);
	swap_msrs_out(&host);
	restore_watchpoints(&host);
	reload_selectors(sw);
	vcpu->guest_tsc += rdtsc() - start;
	WRITE_ONCE(vcpu->cpu, -1);
	kernel_fpu_end();

	reason = READ_ONCE(sw->exit);
	/* CPL 3 was a quiescent state; a vCPU that never schedules needs to say so. */
	if (reason == BLANKET_EXIT_INTR)
		rcu_note_context_switch(false);
	dispatch(vcpu, reason);
	current->flags &= ~PF_VCPU;
	local_irq_enable();
	preempt_enable();
	vcpu->exits[min_t(u32, reason, BLANKET_EXIT_REASONS - 1)]++;
	return reason;
}

/* ---- exits ---- */

static void idle(struct blanket_vcpu *vcpu)
{
	struct blanket_switch *sw = vcpu->sw;

	arm_timer(vcpu);
	/* Cut short by a signal, the loop finds it; nothing else ends the sleep in vain. */
	(void)wait_event_interruptible(vcpu->wait,
		READ_ONCE(sw->pending) || READ_ONCE(vcpu->vm->dead) ||
		READ_ONCE(vcpu->run->immediate_exit));
}

static long to_user(struct blanket_vcpu *vcpu, u32 reason)
{
	struct blanket_switch *sw = vcpu->sw;
	struct blanket_run *run = vcpu->run;
	u64 len = 0;

	if (reason == BLANKET_EXIT_CONSOLE || reason == BLANKET_EXIT_CRASH ||
	    reason == BLANKET_EXIT_BALLOON) {
		len = min_t(u64, sw->args[3], BLANKET_RUN_DATA);
		memcpy(run->data, sw->data, len);
	}
	memcpy(run->args, sw->args, sizeof(run->args));
	run->data_len = len;
	run->exit = reason;
	if (reason == BLANKET_EXIT_CRASH)
		vm_kill(vcpu);
	else if (reason == BLANKET_EXIT_BALLOON)
		blanket_frames_out(vcpu->vm, (const u32 *)run->data, len / sizeof(u32));
	return 0;
}

/* The core and the module do not understand each other: the end of this VM. */
static long bad_exit(struct blanket_vcpu *vcpu, u32 reason)
{
	struct blanket_run *run = vcpu->run;

	memset(run->args, 0, sizeof(run->args));
	run->args[0] = BLANKET_CRASH_CORE;
	run->data_len = scnprintf(run->data, sizeof(run->data),
				  "module: vCPU %u left the core for no known reason (%u)",
				  vcpu->id, reason);
	run->exit = BLANKET_EXIT_CRASH;
	vm_kill(vcpu);
	return 0;
}

/* Returns true when the VMM has something to do. */
static bool handle(struct blanket_vcpu *vcpu, u32 reason)
{
	struct blanket_switch *sw = vcpu->sw;
	u64 arg = READ_ONCE(sw->args[0]);

	sw->ret = 0;
	switch (reason) {
	case BLANKET_EXIT_INTR:
	case BLANKET_EXIT_NMI:
	case BLANKET_EXIT_MCE:
	case BLANKET_EXIT_DEADLINE:
	case BLANKET_EXIT_BREATH:
		return false;
	case BLANKET_EXIT_IDLE:
		idle(vcpu);
		return false;
	case BLANKET_EXIT_FRAME:
		sw->ret = blanket_frame(vcpu->vm, arg);
		return false;
	case BLANKET_EXIT_KICK:
		kick_mask(vcpu, arg);
		return false;
	case BLANKET_EXIT_FLUSH:
		blanket_wait_out(vcpu->vm, arg, vcpu);
		return false;
	case BLANKET_EXIT_POOL:
		sw->ret = blanket_pool_grow(vcpu->vm, arg);
		return false;
	case BLANKET_EXIT_TRIM:
		blanket_pool_trim(vcpu, arg);
		return false;
	case BLANKET_EXIT_FILL:
		sw->ret = blanket_pool_fill(vcpu, arg);
		return false;
	case BLANKET_EXIT_YIELD:
		yield();
		return false;
	default:
		if (reason >= BLANKET_EXIT_USER)
			to_user(vcpu, reason);
		else
			bad_exit(vcpu, reason);
		return true;
	}
}

static long run(struct blanket_vcpu *vcpu)
{
	struct blanket_vm *vm = vcpu->vm;

	refresh_root(vcpu);
	for (;;) {
		u32 reason;

		if (READ_ONCE(vm->dead))
			return -EIO;
		if (wants_user(current) || READ_ONCE(vcpu->run->immediate_exit))
			return -EINTR;
		cond_resched();
		/* The host takes frames back (frames.c); that does not take long. */
		wait_event(vm->gate_open, !atomic_read(&vm->gate));
		arm_timer(vcpu);
		blanket_clock_refresh(vm);
		reason = enter(vcpu);
		if (reason && handle(vcpu, reason))
			return 0;
	}
}

long blanket_vcpu_run(struct blanket_vcpu *vcpu)
{
	long ret;

	/* Guest memory is found through the creator's address space. */
	if (current->mm != vcpu->vm->mm)
		return -EPERM;
	if (!mutex_trylock(&vcpu->run_mutex))
		return -EBUSY;
	ret = run(vcpu);
	blanket_speculation_to_user();
	mutex_unlock(&vcpu->run_mutex);
	return ret;
}
