// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The frames of a VM's memory: found in the VMM's address space when the guest
 * needs them, and given up when the host wants them back (swap, migration, KSM,
 * unmapping, ...). Nothing is pinned; an interval notifier says when to let go.
 *
 * Three things may lead to a frame: its entry in the window, leaves of shadows,
 * and TLBs. All three are only used in the core world. So whoever takes frames
 * back shuts the gate of the VM: every vCPU is brought out of the core world and
 * none gets in. Then nobody has translations, because every entry loads CR3, and
 * the window's entries are cleared. The leaves, in which the hardware cannot walk
 * as long as no shadow root is loaded, are noted for the core (revoked bits): it
 * removes them at its next entry, on the transition root, before it loads a root.
 *
 * For the core this means: a frame that it has seen present stays so until it
 * leaves the core world the next time.
 *
 * A frame is entered by the sequence protocol of mmu_interval_notifier: found
 * without the lock, entered under frames_lock if no invalidation began meanwhile.
 * frames_lock is never held while memory is allocated or anything sleeps, so
 * ranges that must not block are served like all others.
 */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/sched/signal.h>
#include <linux/wait.h>
#include "internal.h"

#if !IS_ENABLED(CONFIG_MMU_NOTIFIER)
#error "This kernel has no MMU notifiers (CONFIG_MMU_NOTIFIER)."
#endif

/* Frames that one FRAME exit brings in. */
#define FRAME_BLOCK 16
/* Frames that are taken back under one hold of the lock: one leaf table. */
#define REVOKE_CHUNK 512

static u64 *window_entry(struct blanket_vm *vm, u64 gfn)
{
	return blanket_entry(vm, BLANKET_WINDOW + gfn * PAGE_SIZE);
}

/* ---- the gate ---- */

/*
 * Returns when no vCPU is in the core world; none enters until the gate is opened.
 * A vCPU stores vcpu->cpu first and looks at the gate afterwards (enter()).
 */
static void shut_gate(struct blanket_vm *vm)
{
	atomic_inc(&vm->gate);
	blanket_wait_out(vm, ~0ULL, NULL);
}

static void open_gate(struct blanket_vm *vm)
{
	/* A full barrier: who finds the gate open finds the revoked bits as well. */
	if (atomic_dec_and_test(&vm->gate) && wq_has_sleeper(&vm->gate_open))
		wake_up_all(&vm->gate_open);
}

/* ---- taking back ---- */

/* Up to where in [@gfn, @end) one leaf table of the window goes. */
static u64 chunk_end(u64 gfn, u64 end)
{
	return min(round_down(gfn, REVOKE_CHUNK) + REVOKE_CHUNK, end);
}

static bool any_present(struct blanket_vm *vm, u64 gfn, u64 end)
{
	while (gfn < end) {
		const u64 *entry = window_entry(vm, gfn);
		u64 stop = chunk_end(gfn, end);

		for (; gfn < stop; gfn++, entry++)
			if (READ_ONCE(*entry) & ENTRY_P)
				return true;
	}
	return false;
}

/* Clears the entries of [@gfn, @end), in one leaf table. Under the lock, gate shut. */
static void revoke(struct blanket_vm *vm, u64 gfn, u64 end)
{
	u64 block = gfn / BLANKET_REVOKED_BLOCK, count = 0;
	u64 *bits = __va(*blanket_entry(vm, BLANKET_REVOKED + gfn / 8) & ENTRY_FRAME);
	u64 *entry = window_entry(vm, gfn);

	for (; gfn < end; gfn++, entry++) {
		if (!(*entry & ENTRY_P))
			continue;
		WRITE_ONCE(*entry, ENTRY_TAKEN);
		__set_bit(gfn % (PAGE_SIZE * 8), (unsigned long *)bits);
		count++;
	}
	if (!count)
		return;
	__set_bit(block, (unsigned long *)vm->page->revoked);
	WRITE_ONCE(vm->page->revocations, vm->page->revocations + 1);
	vm->revoked += count;
	atomic64_sub(count, &vm->frames);
}

static bool invalidate(struct mmu_interval_notifier *notifier,
		       const struct mmu_notifier_range *range, unsigned long seq)
{
	struct blanket_vm *vm = container_of(notifier, struct blanket_vm, notifier);
	u64 start = max_t(u64, range->start, vm->user_addr) - vm->user_addr;
	u64 size = min_t(u64, range->end - vm->user_addr, vm->nr_frames * PAGE_SIZE);
	u64 gfn = start >> PAGE_SHIFT, end = DIV_ROUND_UP(size, PAGE_SIZE);

	/* From here to the end of the invalidation nothing is entered. */
	spin_lock(&vm->frames_lock);
	mmu_interval_set_seq(notifier, seq);
	spin_unlock(&vm->frames_lock);

	/* Much of what the host moves the guest has not touched lately. */
	if (!any_present(vm, gfn, end))
		return true;
	shut_gate(vm);
	while (gfn < end) {
		u64 stop = chunk_end(gfn, end);

		spin_lock(&vm->frames_lock);
		revoke(vm, gfn, stop);
		spin_unlock(&vm->frames_lock);
		gfn = stop;
		if (mmu_notifier_range_blockable(range))
			cond_resched();
	}
	open_gate(vm);
	atomic64_inc(&vm->revocations);
	return true;
}

static const struct mmu_interval_notifier_ops notifier_ops = {
	.invalidate = invalidate,
};

/* ---- giving ---- */

/* The guest may write to them from now on. */
static void mark_dirty(struct page **pages, int count)
{
	int i;

	for (i = 0; i < count; i++)
		if (!PageDirty(pages[i]))
			set_page_dirty_lock(pages[i]);
}

static void drop(struct page **pages, int count)
{
	int i;

	for (i = 0; i < count; i++)
		put_page(pages[i]);
}

/*
 * The run of frames to bring in for @gfn, inside an aligned block: those that the
 * guest never had. One that the host took comes alone.
 */
static u64 run_around(struct blanket_vm *vm, u64 gfn, int *count)
{
	u64 first = round_down(gfn, FRAME_BLOCK);
	u64 end = min(first + FRAME_BLOCK, vm->nr_frames);
	u64 at;

	*count = 1;
	if (READ_ONCE(*window_entry(vm, gfn)))
		return gfn;
	for (at = gfn; at > first; at--)
		if (READ_ONCE(*window_entry(vm, at - 1)))
			break;
	first = at;
	for (at = gfn + 1; at < end; at++)
		if (READ_ONCE(*window_entry(vm, at)))
			break;
	*count = at - first;
	return first;
}

/* Enters what was found, unless an invalidation has begun since @seq. */
static bool enter_frames(struct blanket_vm *vm, u64 first, struct page **pages, int count,
			 unsigned long seq)
{
	int i;

	spin_lock(&vm->frames_lock);
	if (mmu_interval_read_retry(&vm->notifier, seq)) {
		spin_unlock(&vm->frames_lock);
		return false;
	}
	for (i = 0; i < count; i++) {
		u64 *entry = window_entry(vm, first + i);

		/* Another vCPU was faster: it found the same page. */
		if (*entry & ENTRY_P)
			continue;
		smp_store_release(entry, page_to_phys(pages[i]) | MAP_RW);
		atomic64_inc(&vm->frames);
	}
	spin_unlock(&vm->frames_lock);
	return true;
}

/*
 * Brings in @gfn, and the frames of the block around it that the guest never had, as
 * far as they follow each other.
 *
 * Always for writing: what is shared (zero page, KSM, a fork's copy) is unshared
 * here, so an entry never allows more than the VMM's own page table does. What is
 * entered is marked dirty, because the guest's writes do not pass through the VMM's
 * page table. Whatever makes a page clean again unmaps or write-protects it first,
 * and so takes it back.
 */
long blanket_frame(struct blanket_vm *vm, u64 gfn)
{
	struct page *pages[FRAME_BLOCK];

	if (gfn >= vm->nr_frames)
		return -EINVAL;
	for (;;) {
		unsigned long seq;
		int want, got;
		bool done;
		u64 first;

		if (fatal_signal_pending(current))
			return -EINTR;
		/* Waits for the end of an invalidation that is going on. */
		seq = mmu_interval_read_begin(&vm->notifier);
		first = run_around(vm, gfn, &want);
		got = get_user_pages_fast(vm->user_addr + first * PAGE_SIZE, want,
					  FOLL_WRITE, pages);
		if (got < (int)(gfn - first) + 1) {
			/* Something before it cannot be had; that is not gfn's fault. */
			if (got > 0)
				drop(pages, got);
			first = gfn;
			got = get_user_pages_fast(vm->user_addr + gfn * PAGE_SIZE, 1,
						  FOLL_WRITE, pages);
			if (got < 1)
				return got < 0 ? got : -EFAULT;
		}
		mark_dirty(pages, got);
		done = enter_frames(vm, first, pages, got, seq);
		drop(pages, got);
		if (done)
			return 0;
		cond_resched();
	}
}

/*
 * The guest has given frames up, and the VMM is about to give their memory to the
 * host, which takes back what is in the window. What never was there must not come
 * in beside a neighbour. The list may be read by others: every number is bounded.
 */
void blanket_frames_out(struct blanket_vm *vm, const u32 *gfns, unsigned int count)
{
	unsigned int i;

	for (i = 0; i < count; i++) {
		u32 gfn = READ_ONCE(gfns[i]);
		u64 *entry;

		if (gfn >= vm->nr_frames)
			continue;
		entry = window_entry(vm, gfn);
		spin_lock(&vm->frames_lock);
		if (!*entry)
			WRITE_ONCE(*entry, ENTRY_TAKEN);
		spin_unlock(&vm->frames_lock);
	}
}

/* ---- life ---- */

/*
 * What the guest does not have at the start must not come in beside a neighbour. The
 * boot record is the VMM's, who only harms its own VM: the numbers are bounded.
 */
static int hold_back(struct blanket_vm *vm)
{
	const struct blanket_boot *boot = &vm->page->boot;
	u64 end = min(boot->ram_frames, vm->nr_frames);
	u64 gfn;

	for (gfn = boot->start_frames ?: end; gfn < end; gfn++) {
		*window_entry(vm, gfn) = ENTRY_TAKEN;
		if (gfn & 511)
			continue;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

/* The window's tables for every frame, no leaf entry present. */
int blanket_window_init(struct blanket_vm *vm)
{
	u64 gfn;

	for (gfn = 0; gfn < vm->nr_frames; gfn += 512) {
		if (!blanket_leaf(vm, BLANKET_WINDOW + gfn * PAGE_SIZE, 0))
			return -ENOMEM;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return hold_back(vm);
}

/* Follows the creator's address space from now on. All tables are there. */
int blanket_frames_follow(struct blanket_vm *vm)
{
	int err = mmu_interval_notifier_insert(&vm->notifier, vm->mm, vm->user_addr,
					       vm->nr_frames * PAGE_SIZE, &notifier_ops);

	vm->follows = !err;
	return err;
}

/* The VM has no descriptor left. Waits for invalidations that are going on. */
void blanket_frames_forget(struct blanket_vm *vm)
{
	if (vm->follows)
		mmu_interval_notifier_remove(&vm->notifier);
}
