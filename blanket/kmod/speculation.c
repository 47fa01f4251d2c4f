// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * What is done against speculation across the world switch; the policy and its
 * reasons are in docs/threat-model.md. The guest runs at CPL 3 but at addresses
 * where the host has its kernel, so on its way out a CPU is like one that comes
 * from a VM, not like one that comes from a program.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <linux/percpu.h>
#include <asm/cpufeature.h>
#include <asm/msr.h>
#include <asm/segment.h>
#include "internal.h"

static bool speculation = true;
module_param(speculation, bool, 0444);
MODULE_PARM_DESC(speculation, "barriers between VMs and the host (on)");

/* Serial number of the last VM on a CPU, and whether it has trained the predictors since. */
static DEFINE_PER_CPU(u64, last_vm);
static DEFINE_PER_CPU(bool, trained);

static bool ibpb, verw;

void blanket_speculation_init(void)
{
	if (!speculation) {
		pr_warn("speculation barriers are off: VMs may read each other's memory\n");
		return;
	}
	ibpb = boot_cpu_has(X86_FEATURE_IBPB);
	/* Without the microcode VERW clears nothing. */
	verw = boot_cpu_has(X86_FEATURE_MD_CLEAR) &&
	       (boot_cpu_has_bug(X86_BUG_MDS) || boot_cpu_has_bug(X86_BUG_TAA)
#ifdef X86_BUG_MMIO_STALE_DATA
		|| boot_cpu_has_bug(X86_BUG_MMIO_STALE_DATA)
#endif
#ifdef X86_BUG_RFDS
		|| boot_cpu_has_bug(X86_BUG_RFDS)
#endif
	       );
	pr_info("speculation: IBPB %s, VERW %s\n", ibpb ? "yes" : "no", verw ? "yes" : "no");
}

static void barrier_of_branches(void)
{
	native_wrmsr(MSR_IA32_PRED_CMD, PRED_CMD_IBPB, 0);
}

/*
 * Interrupts off, the last thing before the world switch. A VM finds no other
 * VM's branch targets, and nothing of the host in the CPU's buffers: from here on
 * only the core of this VM fills them.
 */
void blanket_speculation_enter(const struct blanket_vm *vm)
{
	static const u16 data_segment = __KERNEL_DS;

	if (ibpb) {
		if (this_cpu_read(last_vm) != vm->serial) {
			barrier_of_branches();
			this_cpu_write(last_vm, vm->serial);
		}
		this_cpu_write(trained, true);
	}
	if (verw)
		asm volatile("verw %0" :: "m" (data_segment) : "cc");
}

/*
 * On the way to user space. What the VM has trained would otherwise be used by the
 * VMM, which has the secrets of its devices. Other programs are the business of
 * the host's own barrier when it changes tasks, which the VMM asks for.
 */
void blanket_speculation_to_user(void)
{
	if (!ibpb)
		return;
	preempt_disable();
	if (this_cpu_xchg(trained, false))
		barrier_of_branches();
	preempt_enable();
}
