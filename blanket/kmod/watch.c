// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * A core that is in a loop with interrupts off ends its VM only.
 *
 * Nothing but an NMI gets through to it. So each CPU looks at its neighbour twice a
 * second, while there are VMs. One that has not left the core world since the last
 * look gets an interrupt, for its guest may just run for long on a tickless CPU; then,
 * from look to look, an NMI. The core's stub takes the number that was put into the
 * switch block before: an NMI that is not taken is not followed by another, because
 * the CPU then does not run at all (the instance's own host has it elsewhere), which
 * is not the core's fault. At BLANKET_WATCH_LIMIT the core leaves by itself, with the
 * report of a crash.
 *
 * A CPU that is alone has nobody who looks at it.
 */
#include <linux/cpuhotplug.h>
#include <linux/cpumask.h>
#include <linux/hrtimer.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/smp.h>
#include <linux/version.h>
#include <asm/apic.h>
#include <asm/irq_vectors.h>
#include <asm/nmi.h>
#include "internal.h"

#define LOOK_NS	(NSEC_PER_SEC / 2)

/* What a CPU knows of the one that it looks at. */
struct look {
	struct hrtimer timer;
	unsigned int cpu;
	unsigned int rounds;	/* looks since count has been the same */
	u64 count;
};

DEFINE_PER_CPU(struct blanket_visit, blanket_visit);
static DEFINE_PER_CPU(struct look, looks);
/* An NMI of ours is on its way to this CPU: the host need not wonder about it. */
static DEFINE_PER_CPU(int, sent);

static DEFINE_MUTEX(users_lock);
static unsigned int users;
static int hotplug_state;

static void send_nmi(unsigned int cpu)
{
	per_cpu(sent, cpu) = 1;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
	__apic_send_IPI_mask(cpumask_of(cpu), NMI_VECTOR);
#else
	apic->send_IPI_mask(cpumask_of(cpu), NMI_VECTOR);
#endif
}

static int on_nmi(unsigned int type, struct pt_regs *regs)
{
	return this_cpu_xchg(sent, 0) ? NMI_HANDLED : NMI_DONE;
}

/* In interrupt context: blanket_watch_put() waits for it before anything is freed. */
static void nudge(unsigned int cpu, u64 count, unsigned int number)
{
	struct blanket_visit *visit = per_cpu_ptr(&blanket_visit, cpu);
	struct blanket_switch *sw = READ_ONCE(visit->sw);

	WRITE_ONCE(sw->watch, number);
	smp_mb();
	if (READ_ONCE(visit->count) == count)
		send_nmi(cpu);
	else
		WRITE_ONCE(sw->watch, 0);
}

static enum hrtimer_restart look_fn(struct hrtimer *timer)
{
	struct look *look = container_of(timer, struct look, timer);
	unsigned int self = smp_processor_id(), cpu = cpumask_next(self, cpu_online_mask);
	struct blanket_visit *visit;
	u64 count;

	hrtimer_forward_now(timer, ns_to_ktime(LOOK_NS));
	if (cpu >= nr_cpu_ids)
		cpu = cpumask_first(cpu_online_mask);
	if (cpu == self)
		return HRTIMER_RESTART;
	visit = per_cpu_ptr(&blanket_visit, cpu);
	count = READ_ONCE(visit->count);
	if (cpu != look->cpu || count != look->count || !(count & 1)) {
		look->cpu = cpu;
		look->count = count;
		look->rounds = 0;
	} else if (!look->rounds) {
		look->rounds = 1;
		(smp_ops.smp_send_reschedule)(cpu);
	} else if (!READ_ONCE(READ_ONCE(visit->sw)->watch)) {
		nudge(cpu, count, look->rounds++);
	}
	return HRTIMER_RESTART;
}

static int watch_online(unsigned int cpu)
{
	struct look *look = this_cpu_ptr(&looks);

	look->rounds = 0;
	look->cpu = cpu;
	hrtimer_start(&look->timer, ns_to_ktime(LOOK_NS), HRTIMER_MODE_REL_PINNED_HARD);
	return 0;
}

static int watch_offline(unsigned int cpu)
{
	hrtimer_cancel(&per_cpu(looks, cpu).timer);
	return 0;
}

/* The first VM begins the watch. */
int blanket_watch_get(void)
{
	int ret = 0;

	mutex_lock(&users_lock);
	if (!users && num_possible_cpus() > 1) {
		ret = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "blanket:online", watch_online, watch_offline);
		if (ret > 0)
			hotplug_state = ret;
	}
	if (ret >= 0)
		users++;
	mutex_unlock(&users_lock);
	return min(ret, 0);
}

/* Returns when nobody looks at the switch blocks of the caller's VM any more. */
void blanket_watch_put(void)
{
	mutex_lock(&users_lock);
	if (!--users && hotplug_state) {
		cpuhp_remove_state(hotplug_state);
		hotplug_state = 0;
	}
	mutex_unlock(&users_lock);
	synchronize_rcu();
}

int blanket_watch_init(void)
{
	unsigned int cpu;

	for_each_possible_cpu(cpu) {
		struct hrtimer *timer = &per_cpu(looks, cpu).timer;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
		hrtimer_setup(timer, look_fn, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
#else
		hrtimer_init(timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
		timer->function = look_fn;
#endif
	}
	return register_nmi_handler(NMI_LOCAL, on_nmi, 0, "blanket");
}

void blanket_watch_exit(void)
{
	unregister_nmi_handler(NMI_LOCAL, "blanket");
}
