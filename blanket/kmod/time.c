// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Guest time: pvclock parameters in the VM page.
 *
 * Guest system time follows the host's CLOCK_MONOTONIC, so a guest deadline is
 * an hrtimer expiry as it is. Between two refreshes a guest computes it from the
 * TSC; each refresh starts where the old parameters end (time never jumps back)
 * and bends the rate so that what error there is goes away in about a second.
 */
#include <linux/ktime.h>
#include <linux/math64.h>
#include <asm/msr.h>
#include <asm/tsc.h>
#include "internal.h"

#define REFRESH_MS	100
/* Largest slew in parts per million; far ahead, a larger one has to do. */
#define SLEW_PPM	500
#define SLEW_PPM_AHEAD	100000
/* Guest time is stepped forward when it is behind by more than this. */
#define STEP_NS		(10 * NSEC_PER_MSEC)
/* The rate is measured over windows from the first to the second of these. */
#define WINDOW_MIN_NS	NSEC_PER_SEC
#define WINDOW_MAX_NS	(16ULL * NSEC_PER_SEC)
/* A wall clock that moved less than this is left alone. */
#define WALL_SLACK_NS	NSEC_PER_MSEC
/* A pair of readings further apart than this is taken again. */
#define PAIR_TSC_US	5

/*
 * ns = (tsc << shift) * mul >> 32. The multiplier is kept in the upper half of
 * its 32 bits for precision, with headroom for slewing.
 */
static void scale(u64 khz, s8 *shift, u32 *mul)
{
	u64 m = div64_u64((u64)NSEC_PER_MSEC << 32, khz);
	s8 s = 0;

	while (m >= 0xf0000000ULL) {
		s++;
		m = div64_u64((u64)NSEC_PER_MSEC << (32 - s), khz);
	}
	while (m < 0x70000000ULL && s > -11) {
		s--;
		m = div64_u64((u64)NSEC_PER_MSEC << (32 - s), khz);
	}
	*shift = s;
	*mul = m;
}

/* Monotonic time and the TSC at the same moment, as near as it goes. */
static void read_pair(u64 *tsc, u64 *ns)
{
	u64 limit = div_u64((u64)tsc_khz * PAIR_TSC_US, 1000);
	u64 before, after, best = U64_MAX, n;
	unsigned long flags;
	int tries;

	for (tries = 0; tries < 4 && best > limit; tries++) {
		local_irq_save(flags);
		before = rdtsc_ordered();
		n = ktime_get_ns();
		after = rdtsc_ordered();
		local_irq_restore(flags);
		if (after - before < best) {
			best = after - before;
			*tsc = before + best / 2;
			*ns = n;
		}
	}
}

static u64 predict(const struct blanket_vm_page *p, u64 tsc)
{
	u64 delta = tsc - p->tsc_timestamp;

	if (p->tsc_shift >= 0)
		delta <<= p->tsc_shift;
	else
		delta >>= -p->tsc_shift;
	return p->system_time + mul_u64_u32_shr(delta, p->tsc_mul, 32);
}

/* Measures the multiplier from the anchor to now, once the window is long enough. */
static void measure(struct blanket_clock *c, s8 shift, u64 tsc, u64 ns)
{
	u64 dtsc = tsc - c->anchor_tsc, dns = ns - c->anchor_ns, mul;

	if (dns < WINDOW_MIN_NS)
		return;
	/* The division overflows for a TSC below 32 MHz: it did not run all the time. */
	mul = dtsc > dns / 32 ? mul_u64_u64_div_u64(dns, 1ULL << (32 - shift), dtsc) : 0;
	/* Further off than any crystal: the TSC jumped (suspend, move). */
	if (mul > c->nominal_mul - c->nominal_mul / 64 &&
	    mul < c->nominal_mul + c->nominal_mul / 64)
		c->base_mul = mul;
	if (dns > WINDOW_MAX_NS) {
		c->anchor_tsc = tsc;
		c->anchor_ns = ns;
	}
}

static u32 slewed(const struct blanket_clock *c, s64 err, u64 interval)
{
	s64 span = max_t(s64, NSEC_PER_SEC, 2 * interval);
	s64 ppm, low = err < -(s64)STEP_NS ? -SLEW_PPM_AHEAD : -SLEW_PPM;

	ppm = clamp_t(s64, div64_s64(err * 1000, div64_s64(span, 1000)), low, SLEW_PPM);
	return c->base_mul + div_s64((s64)c->base_mul * ppm, 1000000);
}

static void publish_wall(struct blanket_vm *vm)
{
	s64 wall = ktime_to_ns(ktime_mono_to_real(0));
	u32 nsec;

	if (abs(wall - vm->clock.wall_ns) <= WALL_SLACK_NS)
		return;
	vm->clock.wall_ns = wall;
	WRITE_ONCE(vm->page->wall_sec, div_u64_rem(wall, NSEC_PER_SEC, &nsec));
	WRITE_ONCE(vm->page->wall_nsec, nsec);
}

/* The caller is alone or holds the lock; readers retry while the version is odd. */
static void publish(struct blanket_vm *vm, u64 tsc, u64 mono, u64 system_time, u32 mul)
{
	struct blanket_vm_page *p = vm->page;

	WRITE_ONCE(p->time_version, p->time_version + 1);
	smp_wmb();
	WRITE_ONCE(p->tsc_timestamp, tsc);
	WRITE_ONCE(p->system_time, system_time);
	WRITE_ONCE(p->tsc_mul, mul);
	WRITE_ONCE(p->time_flags, check_tsc_unstable() ? 0 : BLANKET_TIME_STABLE);
	publish_wall(vm);
	smp_wmb();
	WRITE_ONCE(p->time_version, p->time_version + 1);

	vm->clock.last_ns = mono;
	WRITE_ONCE(vm->clock.next_refresh, tsc + (u64)tsc_khz * REFRESH_MS);
}

void blanket_clock_init(struct blanket_vm *vm)
{
	struct blanket_clock *c = &vm->clock;
	u64 tsc, ns;

	spin_lock_init(&c->lock);
	vm->page->tsc_khz = tsc_khz;
	scale(tsc_khz, &vm->page->tsc_shift, &c->nominal_mul);
	c->base_mul = c->nominal_mul;
	read_pair(&tsc, &ns);
	c->anchor_tsc = tsc;
	c->anchor_ns = ns;
	publish(vm, tsc, ns, ns, c->nominal_mul);
}

/* Called before each entry, interrupts on. */
void blanket_clock_refresh(struct blanket_vm *vm)
{
	struct blanket_vm_page *p = vm->page;
	struct blanket_clock *c = &vm->clock;
	u64 tsc, ns, guest;
	s64 err;

	if (likely((s64)(rdtsc() - READ_ONCE(c->next_refresh)) < 0 &&
		   rdtsc() >= READ_ONCE(p->tsc_timestamp)))
		return;
	if (!spin_trylock(&c->lock))
		return;
	read_pair(&tsc, &ns);
	if (tsc < p->tsc_timestamp) {
		/* The TSC was set back. Guest time stands still until it is due. */
		c->anchor_tsc = tsc;
		c->anchor_ns = ns;
		publish(vm, tsc, ns, max(ns, p->system_time), c->base_mul);
		goto out;
	}
	guest = predict(p, tsc);
	err = ns - guest;
	measure(c, p->tsc_shift, tsc, ns);
	if (err > (s64)STEP_NS)
		publish(vm, tsc, ns, ns, c->base_mul);
	else
		publish(vm, tsc, ns, guest, slewed(c, err, ns - c->last_ns));
out:
	spin_unlock(&c->lock);
}
