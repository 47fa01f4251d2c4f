// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The tables of a VM's hole, and its shadow pool.
 *
 * Entries are added while a VM lives, each by one store under vm->lock; vCPUs walk
 * the tables meanwhile. A CPU does not cache the absence of a translation, so nothing
 * has to be flushed. Two kinds of leaf entries also go: the window's (frames.c), and
 * those of pool pages that the core gives back (blanket_pool_trim).
 */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include "internal.h"

/* Pages that one POOL exit adds at most. */
#define POOL_BATCH 512
/* For pages that the core can do without. */
#define SOFT (__GFP_NORETRY | __GFP_NOWARN)
/* L3 index of the recursive entry of the window and the pool. */
#define RECURSIVE 511

static unsigned int index_at(u64 va, unsigned int level)
{
	return (va >> (12 + 9 * (level - 1))) & 511;
}

static u64 *table_of(u64 entry)
{
	return __va(entry & ENTRY_FRAME);
}

/* A zeroed page that lives and is accounted as long as the VM. */
struct page *blanket_page(struct blanket_vm *vm, gfp_t extra)
{
	struct page *page;

	/* Allocating may sleep: never on the way into the core world or out of it. */
	if (WARN_ON_ONCE(irqs_disabled()))
		return NULL;
	if (!blanket_charge(vm, 1))
		return NULL;
	page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO | extra);
	if (page)
		list_add(&page->lru, &vm->pages);
	else
		blanket_uncharge(vm, 1);
	return page;
}

static bool recursive_slot(unsigned int slot)
{
	return slot == SLOT_WINDOW || slot == SLOT_POOL;
}

int blanket_tables_init(struct blanket_vm *vm)
{
	unsigned int slot;

	for (slot = 0; slot < HOLE_SLOTS; slot++) {
		struct page *page = blanket_page(vm, 0);
		u64 entry;

		if (!page)
			return -ENOMEM;
		set_page_private(page, CLASS_TABLE);
		vm->l3[slot] = page_address(page);
		entry = page_to_phys(page) | ENTRY_P | ENTRY_RW | ENTRY_A;
		/* Read-only at this level: the core sees its leaf entries, no more. */
		if (recursive_slot(slot))
			vm->l3[slot][RECURSIVE] = page_to_phys(page) | MAP_RO | ENTRY_D;
		if (slot == SLOT_M2P)
			entry |= ENTRY_US;
		vm->page->hole[slot] = entry;
	}
	return 0;
}

/* The leaf entry for an address, with its tables made. Under vm->lock. */
u64 *blanket_leaf(struct blanket_vm *vm, u64 va, gfp_t extra)
{
	unsigned int slot = index_at(va, 4) - BLANKET_HOLE_FIRST_SLOT;
	unsigned int level;
	u64 *table;

	if (WARN_ON_ONCE(slot >= HOLE_SLOTS))
		return NULL;
	table = vm->l3[slot];
	for (level = 3; level > 1; level--) {
		u64 *entry = &table[index_at(va, level)];

		if (!(*entry & ENTRY_P)) {
			struct page *page = blanket_page(vm, extra);
			u64 val;

			if (!page)
				return NULL;
			set_page_private(page, CLASS_TABLE);
			/* D too: through the recursive entry, tables are leaves. */
			val = page_to_phys(page) | ENTRY_P | ENTRY_RW | ENTRY_A | ENTRY_D;
			if (slot == SLOT_M2P)
				val |= ENTRY_US;
			smp_store_release(entry, val);
		}
		table = table_of(*entry);
	}
	return &table[index_at(va, 1)];
}

int blanket_map(struct blanket_vm *vm, u64 va, struct page *page, u64 flags)
{
	u64 *entry = blanket_leaf(vm, va, 0);

	if (!entry)
		return -ENOMEM;
	smp_store_release(entry, page_to_phys(page) | flags);
	return 0;
}

/* Maps new zeroed pages over a range. */
int blanket_map_new(struct blanket_vm *vm, u64 va, u64 size, u64 flags)
{
	u64 end = va + size;

	for (; va < end; va += PAGE_SIZE) {
		struct page *page = blanket_page(vm, 0);
		int err;

		if (!page)
			return -ENOMEM;
		err = blanket_map(vm, va, page, flags);
		if (err)
			return err;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

/*
 * Adds up to @pages pages to the shadow pool. Returns how many, or -ENOMEM.
 * Failing is ordinary here (the core reclaims), so the allocator is asked to
 * fail rather than to kill something.
 */
long blanket_pool_grow(struct blanket_vm *vm, u64 pages)
{
	u64 have, added = 0;

	mutex_lock(&vm->lock);
	have = vm->page->pool_pages;
	pages = min3(pages, (u64)POOL_BATCH, vm->pool_limit - have);
	while (added < pages) {
		u64 nr = have + added;
		u64 gfns = BLANKET_POOL_GFNS + nr * BLANKET_POOL_GFNS_SIZE;
		u64 *entry = blanket_leaf(vm, gfns & PAGE_MASK, SOFT);
		struct page *page;

		if (!entry)
			break;
		if (!(*entry & ENTRY_P)) {
			page = blanket_page(vm, SOFT);
			if (!page)
				break;
			smp_store_release(entry, page_to_phys(page) | MAP_RW);
		}
		entry = blanket_leaf(vm, BLANKET_POOL + nr * PAGE_SIZE, SOFT);
		page = entry ? blanket_page(vm, SOFT) : NULL;
		if (!page)
			break;
		set_page_private(page, CLASS_POOL);
		smp_store_release(entry, page_to_phys(page) | MAP_RW);
		added++;
	}
	/* The core may use a page as soon as it reads the count. */
	smp_store_release(&vm->page->pool_pages, have + added);
	mutex_unlock(&vm->lock);
	return added ? added : -ENOMEM;
}

/* The leaf entry of a pool page of the core's list, or NULL. Under vm->lock. */
static u64 *listed(struct blanket_vcpu *vcpu, u64 i)
{
	u32 nr = READ_ONCE(((const u32 *)vcpu->sw->data)[i]);

	/* Page 0 is none; the others are there up to the count. */
	if (!nr || nr >= vcpu->vm->page->pool_pages)
		return NULL;
	return blanket_entry(vcpu->vm, BLANKET_POOL + nr * PAGE_SIZE);
}

/*
 * Takes pages of the pool that nothing refers to. A CPU in the core world may still
 * have a translation of one, through which nobody reads or writes; it must be gone
 * before the memory is somebody else's, and before another page is in its place.
 */
void blanket_pool_trim(struct blanket_vcpu *vcpu, u64 count)
{
	struct blanket_vm *vm = vcpu->vm;
	struct page *page, *next;
	LIST_HEAD(taken);
	u64 i;

	count = min_t(u64, count, BLANKET_RUN_DATA / sizeof(u32));
	mutex_lock(&vm->lock);
	for (i = 0; i < count; i++) {
		u64 *entry = listed(vcpu, i);

		if (!entry || !(*entry & ENTRY_P))
			continue;
		page = virt_to_page(table_of(*entry));
		WRITE_ONCE(*entry, 0);
		list_move(&page->lru, &taken);
	}
	mutex_unlock(&vm->lock);
	blanket_wait_out(vm, ~0ULL, vcpu);
	list_for_each_entry_safe(page, next, &taken, lru) {
		list_del(&page->lru);
		set_page_private(page, CLASS_DATA);
		__free_page(page);
		blanket_uncharge(vm, 1);
	}
}

/* Gives pages for those that were taken. Returns how many, the first of the list. */
long blanket_pool_fill(struct blanket_vcpu *vcpu, u64 count)
{
	struct blanket_vm *vm = vcpu->vm;
	long done = 0;

	count = min_t(u64, count, BLANKET_RUN_DATA / sizeof(u32));
	mutex_lock(&vm->lock);
	while (done < count) {
		u64 *entry = listed(vcpu, done);

		if (!entry)
			break;
		if (!(*entry & ENTRY_P)) {
			struct page *page = blanket_page(vm, SOFT);

			if (!page)
				break;
			set_page_private(page, CLASS_POOL);
			smp_store_release(entry, page_to_phys(page) | MAP_RW);
		}
		done++;
	}
	mutex_unlock(&vm->lock);
	return done;
}

/* The leaf entry for an address whose tables exist, or NULL. */
u64 *blanket_entry(struct blanket_vm *vm, u64 va)
{
	u64 *table = vm->l3[index_at(va, 4) - BLANKET_HOLE_FIRST_SLOT];
	unsigned int level;

	for (level = 3; level > 1; level--) {
		u64 entry = table[index_at(va, level)];

		if (!(entry & ENTRY_P))
			return NULL;
		table = table_of(entry);
	}
	return &table[index_at(va, 1)];
}

/* The vCPU's trace, the first time that it is wanted. Under vm->lock. */
int blanket_trace_init(struct blanket_vcpu *vcpu)
{
	u64 at = BLANKET_VCPU + vcpu->id * BLANKET_VCPU_STRIDE + BLANKET_VCPU_TRACE;
	unsigned int i;
	int err;

	for (i = 0; i < ARRAY_SIZE(vcpu->trace); i++) {
		if (vcpu->trace[i])
			continue;
		vcpu->trace[i] = blanket_page(vcpu->vm, 0);
		if (!vcpu->trace[i])
			return -ENOMEM;
		err = blanket_map(vcpu->vm, at + i * PAGE_SIZE, vcpu->trace[i], MAP_RW);
		if (err) {
			/* The page itself is freed with the VM. */
			vcpu->trace[i] = NULL;
			return err;
		}
	}
	return 0;
}

/*
 * Everything goes: the VM has no descriptor left, so no CPU uses its tables. The
 * guest's frames are not ours; the window only names them.
 */
void blanket_tables_free(struct blanket_vm *vm)
{
	struct page *page, *next;

	list_for_each_entry_safe(page, next, &vm->pages, lru) {
		list_del(&page->lru);
		__free_page(page);
		cond_resched();
	}
}
