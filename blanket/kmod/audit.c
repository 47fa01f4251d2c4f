// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * What a VM's page tables map: a walk of every root that a CPU may use for it.
 *
 * Whose a frame is comes from others than the tables under test: guest frames
 * from the owner's address space, the hypervisor's from the list of what was
 * allocated, by what it was allocated for. Only which pages of the pool are
 * roots is the core's word; the roots that vCPUs have loaded must be among them.
 *
 * The host may take frames back while this runs, and before. A leaf of such a frame
 * stays until a vCPU comes into the core world, which removes it before it loads a
 * root that it is in. It is counted, and no rule is broken as long as it is noted.
 */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/xarray.h>
#include "internal.h"

/* Beside the classes of the VM's own pages. */
enum {
	CLASS_TEXT = CLASS_ROOT + 1,
	CLASS_RODATA,
	CLASS_GUEST,
};

/*
 * A frame's word: class, a bit for each level that it was walked as, and the number
 * of a page of the pool.
 */
#define CLASS_MASK	0xfUL
#define SEEN(level)	(1UL << (4 + (level)))
#define NUMBER_SHIFT	16

#define ENTRY_FLAGS	(~ENTRY_FRAME)
#define LINK_BITS	(ENTRY_P | ENTRY_RW | ENTRY_US | ENTRY_A | ENTRY_D | ENTRY_NX)

struct walk {
	struct blanket_vm *vm;
	struct blanket_audit *out;
	struct xarray frames;	/* by frame number */
	struct page **guest;	/* by gfn, where the window has something; a reference each */
	int err;
};

static void broken(struct walk *w, u32 rule, u32 level, u64 va, u64 entry)
{
	if (!w->out->broken++) {
		w->out->rule = rule;
		w->out->level = level;
		w->out->va = va;
		w->out->entry = entry & ENTRY_FLAGS;
	}
}

/* ---- whose the frames are ---- */

static void note(struct walk *w, struct page *page, unsigned long class)
{
	int err = xa_err(xa_store(&w->frames, page_to_pfn(page), xa_mk_value(class),
				  GFP_KERNEL_ACCOUNT));

	if (err)
		w->err = err;
}

static unsigned long frame_word(struct walk *w, u64 entry)
{
	void *word = xa_load(&w->frames, (entry & ENTRY_FRAME) >> PAGE_SHIFT);

	return word ? xa_to_value(word) : ~0UL;
}

static unsigned long class_of(struct walk *w, u64 entry)
{
	return frame_word(w, entry) & CLASS_MASK;
}

/* True the first time that a table is walked as one of @level. */
static bool first_time(struct walk *w, u64 table, u32 level)
{
	unsigned long word = frame_word(w, table);

	if (word & SEEN(level))
		return false;
	xa_store(&w->frames, (table & ENTRY_FRAME) >> PAGE_SHIFT,
		 xa_mk_value(word | SEEN(level)), GFP_KERNEL_ACCOUNT);
	cond_resched();
	return true;
}

static u64 *table_at(u64 entry)
{
	return __va(entry & ENTRY_FRAME);
}

static u64 step(u32 level)
{
	return 1ULL << (12 + 9 * (level - 1));
}

/*
 * Asks the owner's address space for each frame that the window has: nothing is
 * brought in that was not there. What the owner does not have any more stays
 * unknown, and a leaf of it is foreign.
 */
static int note_guest(struct walk *w)
{
	struct blanket_vm *vm = w->vm;
	u64 gfn;

	for (gfn = 0; gfn < vm->nr_frames; gfn++) {
		u64 *entry = blanket_entry(vm, BLANKET_WINDOW + gfn * PAGE_SIZE);
		struct page *page;

		if (!(gfn & 511))
			cond_resched();
		if (fatal_signal_pending(current))
			return -EINTR;
		if (!entry || !(READ_ONCE(*entry) & ENTRY_P))
			continue;
		if (get_user_pages_fast(vm->user_addr + gfn * PAGE_SIZE, 1, FOLL_WRITE, &page) != 1)
			continue;
		w->guest[gfn] = page;
		note(w, page, CLASS_GUEST);
		w->out->frames++;
	}
	return 0;
}

static void note_own(struct walk *w)
{
	const struct blanket_image_header *h = blanket_header;
	struct blanket_vm *vm = w->vm;
	struct page *page;
	unsigned int id;
	u64 off;

	for (off = 0; off < h->rodata_end; off += PAGE_SIZE)
		note(w, blanket_shared_page(vm, off),
		     off < h->text_end ? CLASS_TEXT : CLASS_RODATA);
	list_for_each_entry(page, &vm->pages, lru)
		note(w, page, page_private(page));
	for (id = 0; id < vm->nr_vcpus; id++) {
		note(w, virt_to_page(vm->vcpus[id]->sw), CLASS_DATA);
		note(w, virt_to_page((void *)vm->vcpus[id]->sw + PAGE_SIZE), CLASS_DATA);
	}
}

/* ---- the guest's part of a root ---- */

static void guest_table(struct walk *w, u64 at, u32 level, u64 va, bool user_root);

/* Whether the core will remove leaf @i of the pool's page at @table first of all. */
static bool noted(struct walk *w, u64 table, unsigned int i)
{
	u64 number = frame_word(w, table) >> NUMBER_SHIFT;
	u64 at = BLANKET_POOL_GFNS + number * BLANKET_POOL_GFNS_SIZE + i * sizeof(u32), gfn;
	u64 *names = blanket_entry(w->vm, at), *bits;

	if (!names || !(*names & ENTRY_P))
		return false;
	gfn = ((u32 *)table_at(*names))[(at & ~PAGE_MASK) / sizeof(u32)];
	bits = gfn < w->vm->nr_frames ? blanket_entry(w->vm, BLANKET_REVOKED + gfn / 8) : NULL;
	if (!bits || !(*bits & ENTRY_P))
		return false;
	return ((u8 *)table_at(*bits))[gfn / 8 % PAGE_SIZE] >> (gfn % 8) & 1;
}

static void guest_entry(struct walk *w, u64 at, unsigned int i, u32 level, u64 va)
{
	u64 entry = table_at(at)[i];

	if (!(entry & ENTRY_P)) {
		if (entry)
			broken(w, BLANKET_AUDIT_ABSENT, level, va, entry);
		return;
	}
	if (entry & ENTRY_FLAGS & ~LINK_BITS)
		broken(w, BLANKET_AUDIT_BITS, level, va, entry);
	if (!(entry & ENTRY_US))
		broken(w, BLANKET_AUDIT_RIGHTS, level, va, entry);
	if (level > 1) {
		guest_table(w, entry, level - 1, va, false);
		return;
	}
	if (class_of(w, entry) != CLASS_GUEST && noted(w, at, i)) {
		w->out->taken++;
		return;
	}
	w->out->leaves++;
	if (entry & ENTRY_RW)
		w->out->writable++;
	if (class_of(w, entry) != CLASS_GUEST)
		broken(w, BLANKET_AUDIT_FOREIGN, level, va, entry);
}

/* The level-4 entry of one of the hypervisor's slots, as the core's roots have it. */
static u64 hole_entry(struct blanket_vm *vm, unsigned int slot)
{
	u64 entry;

	if (slot >= HOLE_SLOTS)
		return 0;
	entry = virt_to_phys(vm->l3[slot]) | ENTRY_P | ENTRY_RW | ENTRY_A;
	return slot == SLOT_M2P ? entry | ENTRY_US : entry;
}

/* As guests' roots have it: of an isolated guest's, the entry area. */
static u64 guest_hole_entry(struct blanket_vm *vm, unsigned int slot)
{
	if (!vm->isolated || slot == SLOT_M2P)
		return hole_entry(vm, slot);
	if (slot != SLOT_CORE)
		return 0;
	return virt_to_phys(vm->entry_l3) | ENTRY_P | ENTRY_RW | ENTRY_A;
}

static void guest_table(struct walk *w, u64 at, u32 level, u64 va, bool user_root)
{
	u64 *table = table_at(at);
	unsigned int i;

	if (class_of(w, at) != CLASS_POOL) {
		broken(w, BLANKET_AUDIT_TABLE, level + 1, va, at);
		return;
	}
	if (!first_time(w, at, level))
		return;
	w->out->tables++;
	for (i = 0; i < 512; i++) {
		unsigned int slot = i - BLANKET_HOLE_FIRST_SLOT;
		u64 here = va + i * step(level);

		if (level == 4 && i >= 256)
			here |= 0xffffULL << 48;
		if (level == 4 && slot < BLANKET_HOLE_END_SLOT - BLANKET_HOLE_FIRST_SLOT) {
			u64 want = user_root && slot == SLOT_M2P ? 0 :
				   guest_hole_entry(w->vm, slot);

			if (table[i] != want)
				broken(w, BLANKET_AUDIT_HOLE, level, here, table[i]);
			continue;
		}
		guest_entry(w, at, i, level, here);
	}
}

/* ---- the hypervisor's part, the same tables in all roots of the VM ---- */

static void m2p_leaf(struct walk *w, u64 entry, u64 va)
{
	const u64 per_page = PAGE_SIZE / sizeof(u64);
	const u64 *words = table_at(entry);
	u64 i, first = (va - BLANKET_M2P) / sizeof(u64);

	if ((entry & ENTRY_FLAGS) != MAP_USER_RO)
		broken(w, BLANKET_AUDIT_RIGHTS, 1, va, entry);
	if (class_of(w, entry) != CLASS_M2P) {
		broken(w, BLANKET_AUDIT_OWN, 1, va, entry);
		return;
	}
	for (i = 0; i < per_page; i++) {
		if (words[i] != first + i) {
			broken(w, BLANKET_AUDIT_M2P, 1, va, entry);
			return;
		}
	}
}

static void own_leaf(struct walk *w, unsigned int slot, u64 entry, u64 va)
{
	u64 flags = entry & ENTRY_FLAGS, gfn;
	unsigned long class = class_of(w, entry), want;

	w->out->own++;
	switch (slot) {
	case SLOT_M2P:
		m2p_leaf(w, entry, va);
		return;
	case SLOT_WINDOW:
		if (flags != MAP_RW)
			broken(w, BLANKET_AUDIT_RIGHTS, 1, va, entry);
		gfn = (va - BLANKET_WINDOW) / PAGE_SIZE;
		if (gfn >= w->vm->nr_frames || !w->guest[gfn] ||
		    page_to_pfn(w->guest[gfn]) != (entry & ENTRY_FRAME) >> PAGE_SHIFT)
			broken(w, BLANKET_AUDIT_WINDOW, 1, va, entry);
		return;
	case SLOT_POOL:
		want = CLASS_POOL;
		if (class == CLASS_POOL)
			xa_store(&w->frames, (entry & ENTRY_FRAME) >> PAGE_SHIFT,
				 xa_mk_value(frame_word(w, entry) |
					     (va - BLANKET_POOL) / PAGE_SIZE << NUMBER_SHIFT),
				 GFP_KERNEL_ACCOUNT);
		break;
	default:
		want = flags == MAP_RX ? CLASS_TEXT : flags == MAP_RO ? CLASS_RODATA : CLASS_DATA;
	}
	if (flags != MAP_RW && (slot != SLOT_CORE || want == CLASS_DATA))
		broken(w, BLANKET_AUDIT_RIGHTS, 1, va, entry);
	if (class != want)
		broken(w, BLANKET_AUDIT_OWN, 1, va, entry);
}

static void own_table(struct walk *w, unsigned int slot, u64 at, u32 level, u64 va)
{
	u64 *table = table_at(at);
	unsigned int i;

	/* One place for each table: nothing is in two slots. */
	if (class_of(w, at) != CLASS_TABLE || !first_time(w, at, level)) {
		broken(w, BLANKET_AUDIT_TABLE, level + 1, va, at);
		return;
	}
	for (i = 0; i < 512; i++) {
		u64 entry = READ_ONCE(table[i]), here = va + i * step(level);

		if (level == 3 && i == 511 && (slot == SLOT_WINDOW || slot == SLOT_POOL)) {
			/* The tables of this slot, read-only. */
			if (entry != (virt_to_phys(table) | MAP_RO | ENTRY_D))
				broken(w, BLANKET_AUDIT_OWN, level, here, entry);
		} else if (!(entry & ENTRY_P)) {
			/* The mark of a window entry has no bits of a frame. */
			if (entry && !(entry == ENTRY_TAKEN && level == 1 && slot == SLOT_WINDOW))
				broken(w, BLANKET_AUDIT_ABSENT, level, here, entry);
		} else if (level == 1) {
			own_leaf(w, slot, entry, here);
		} else {
			u64 want = ENTRY_P | ENTRY_RW | ENTRY_A | ENTRY_D |
				   (slot == SLOT_M2P ? ENTRY_US : 0);

			if ((entry & ENTRY_FLAGS) != want)
				broken(w, BLANKET_AUDIT_RIGHTS, level, here, entry);
			own_table(w, slot, entry, level - 1, here);
		}
	}
}

/* ---- the entry area ---- */

static bool between(u64 at, u64 first, u64 size)
{
	return at >= first && at - first < size;
}

/* Whether an isolated guest's roots may show the page at @va. */
static bool entry_page(struct blanket_vm *vm, u64 va)
{
	const struct blanket_image_header *h = blanket_header;
	u64 text = h->entry_end - h->entry_start, off;

	if (va < BLANKET_VCPU)
		return between(va, BLANKET_IMAGE + h->entry_start, text) ||
		       va == BLANKET_IMAGE + h->idt;
	off = (va - BLANKET_VCPU) & (BLANKET_VCPU_STRIDE - 1);
	return (va - BLANKET_VCPU) / BLANKET_VCPU_STRIDE < vm->nr_vcpus &&
	       (between(off, BLANKET_VCPU_ENTRY, text) ||
		off == BLANKET_VCPU_HW - PAGE_SIZE || off == BLANKET_VCPU_HW + PAGE_SIZE ||
		between(off, BLANKET_VCPU_IST, 2 * IST_STACKS * PAGE_SIZE) ||
		between(off, BLANKET_VCPU_GDT, 0x10000) ||
		between(off, BLANKET_VCPU_LDT, 0x10000));
}

/* The same pages as in the hole, with no more rights, and only those above. */
static void entry_table(struct walk *w, u64 at, u32 level, u64 va)
{
	u64 *table = table_at(at);
	unsigned int i;

	if (class_of(w, at) != CLASS_TABLE || !first_time(w, at, level)) {
		broken(w, BLANKET_AUDIT_TABLE, level + 1, va, at);
		return;
	}
	for (i = 0; i < 512; i++) {
		u64 entry = table[i], here = va + i * step(level), *own;

		if (!(entry & ENTRY_P)) {
			if (entry)
				broken(w, BLANKET_AUDIT_ABSENT, level, here, entry);
			continue;
		}
		if (level > 1) {
			if ((entry & ENTRY_FLAGS) != (ENTRY_P | ENTRY_RW | ENTRY_A | ENTRY_D))
				broken(w, BLANKET_AUDIT_RIGHTS, level, here, entry);
			entry_table(w, entry, level - 1, here);
			continue;
		}
		w->out->entry_area++;
		own = blanket_entry(w->vm, here);
		if (!entry_page(w->vm, here) || !own || ((*own ^ entry) & ENTRY_FRAME))
			broken(w, BLANKET_AUDIT_OWN, level, here, entry);
		else if ((entry & ~(ENTRY_RW | ENTRY_D)) != (*own & ~(ENTRY_RW | ENTRY_D)) ||
			 (entry & ~*own))
			broken(w, BLANKET_AUDIT_RIGHTS, level, here, entry);
	}
}

/* ---- roots ---- */

/* The level-4 table of a root that the core made: below a level-5 table with LA57. */
static u64 below_wrapper(struct walk *w, u64 root)
{
	u64 *table = table_at(root);
	unsigned int i;

	if (!blanket_host.la57)
		return root;
	if (class_of(w, root) != CLASS_POOL) {
		broken(w, BLANKET_AUDIT_TABLE, 5, 0, root);
		return root;
	}
	for (i = 1; i < 511; i++)
		if (table[i])
			broken(w, BLANKET_AUDIT_ABSENT, 5, 0, table[i]);
	if (table[0] != table[511] || !(table[0] & ENTRY_P))
		broken(w, BLANKET_AUDIT_BITS, 5, 0, table[0]);
	return table[0] & ENTRY_FRAME;
}

static void core_roots(struct walk *w)
{
	struct blanket_vm *vm = w->vm;
	u64 page, pages = min(vm->page->pool_pages, vm->pool_limit);

	for (page = 1; page < pages; page++) {
		u64 info = BLANKET_POOL_INFO + page * BLANKET_POOL_INFO_SIZE;
		u64 *leaf = blanket_entry(vm, BLANKET_POOL + page * PAGE_SIZE);
		const u8 *record;
		u64 *records;
		u8 level;

		/* A record may cross a page; the word with these two fields does not. */
		records = blanket_entry(vm, info + 8);
		if (!leaf || !records || !(*records & ENTRY_P)) {
			broken(w, BLANKET_AUDIT_OWN, 1, info, 0);
			continue;
		}
		record = (u8 *)table_at(*records) + ((info + 8) & ~PAGE_MASK);
		if (!(*leaf & ENTRY_P) && record[BLANKET_POOL_INFO_STATE - 8] != BLANKET_POOL_GONE) {
			broken(w, BLANKET_AUDIT_OWN, 1, info, 0);
			continue;
		}
		if (record[BLANKET_POOL_INFO_STATE - 8] != BLANKET_POOL_SHADOW)
			continue;
		level = record[BLANKET_POOL_INFO_LEVEL - 8];
		if (level != BLANKET_POOL_KERNEL_ROOT && level != BLANKET_POOL_USER_ROOT)
			continue;
		w->out->roots++;
		guest_table(w, *leaf, 4, 0, level == BLANKET_POOL_USER_ROOT);
	}
}

/* What a vCPU will load when it runs on. */
static void loaded_root(struct walk *w, u64 cr3)
{
	u64 root;

	if (!cr3)
		return;
	w->out->loaded++;
	if (cr3 & ~ENTRY_FRAME) {
		broken(w, BLANKET_AUDIT_ROOT, 5, 0, cr3);
		return;
	}
	root = below_wrapper(w, cr3);
	if (class_of(w, root) != CLASS_POOL || !(frame_word(w, root) & SEEN(4)))
		broken(w, BLANKET_AUDIT_ROOT, 4, 0, root);
}

/* The root that is loaded while the worlds change. CPL 3 never runs on it. */
static void transition_root(struct walk *w, struct blanket_vcpu *vcpu)
{
	const u64 *host = __va(__native_read_cr3() & CR3_ADDR_MASK), *top = vcpu->root;
	unsigned int i;

	if (blanket_host.la57) {
		for (i = 0; i < 511; i++)
			if (top[i] && (i < 256 || top[i] != host[i]))
				broken(w, BLANKET_AUDIT_TRANSITION, 5, 0, top[i]);
		host = __va(host[511] & ENTRY_FRAME);
		top = vcpu->root_p4d;
	}
	for (i = 0; i < 512; i++) {
		u64 want = i < BLANKET_HOLE_FIRST_SLOT ? 0 :
			   i < BLANKET_HOLE_END_SLOT ?
				hole_entry(w->vm, i - BLANKET_HOLE_FIRST_SLOT) : host[i];

		/* Before its first RUN a vCPU's has no host half. */
		if (top[i] != want && (top[i] || i < BLANKET_HOLE_END_SLOT))
			broken(w, BLANKET_AUDIT_TRANSITION, 4, i * step(4), top[i]);
	}
}

/* The root that the core of an isolated guest runs on. */
static void core_root(struct walk *w)
{
	u64 at = w->vm->core_root;
	u64 *table = table_at(at);
	unsigned int i;

	if (blanket_host.la57) {
		for (i = 0; i < 511; i++)
			if (table[i])
				broken(w, BLANKET_AUDIT_TRANSITION, 5, 0, table[i]);
		at = table[511];
		table = table_at(at);
	}
	if (class_of(w, at) != CLASS_ROOT || class_of(w, w->vm->core_root) != CLASS_ROOT) {
		broken(w, BLANKET_AUDIT_TRANSITION, 5, 0, at);
		return;
	}
	for (i = 0; i < 512; i++) {
		u64 want = i < BLANKET_HOLE_FIRST_SLOT ? 0 :
			   hole_entry(w->vm, i - BLANKET_HOLE_FIRST_SLOT);

		if (table[i] != want)
			broken(w, BLANKET_AUDIT_TRANSITION, 4, i * step(4), table[i]);
	}
}

static void walk_all(struct walk *w)
{
	struct blanket_vm *vm = w->vm;
	unsigned int id, slot;

	for (slot = 0; slot < HOLE_SLOTS; slot++)
		own_table(w, slot, hole_entry(vm, slot), 3,
			  BLANKET_M2P + slot * step(4));
	if (vm->isolated) {
		entry_table(w, guest_hole_entry(vm, SLOT_CORE), 3, BLANKET_IMAGE);
		core_root(w);
	}
	core_roots(w);
	for (id = 0; id < vm->nr_vcpus; id++) {
		const u8 *hw = (u8 *)vm->vcpus[id]->sw - BLANKET_VCPU_HW;

		loaded_root(w, *(u64 *)(hw + BLANKET_VCPU_KERNEL_CR3));
		loaded_root(w, *(u64 *)(hw + BLANKET_VCPU_USER_CR3));
		transition_root(w, vm->vcpus[id]);
	}
}

/* Takes every vCPU out of the caller's hands, or none. */
static bool lock_vcpus(struct blanket_vm *vm)
{
	unsigned int id;

	for (id = 0; id < vm->nr_vcpus; id++) {
		if (!mutex_trylock(&vm->vcpus[id]->run_mutex)) {
			while (id--)
				mutex_unlock(&vm->vcpus[id]->run_mutex);
			return false;
		}
	}
	return true;
}

static void unlock_vcpus(struct blanket_vm *vm)
{
	unsigned int id;

	for (id = 0; id < vm->nr_vcpus; id++)
		mutex_unlock(&vm->vcpus[id]->run_mutex);
}

long blanket_audit_vm(struct blanket_vm *vm, struct blanket_audit *out)
{
	struct walk w = { .vm = vm, .out = out };
	u64 gfn;

	if (current->mm != vm->mm)
		return -EPERM;
	w.guest = kvcalloc(vm->nr_frames, sizeof(struct page *), GFP_KERNEL_ACCOUNT);
	if (!w.guest)
		return -ENOMEM;
	if (!lock_vcpus(vm)) {
		kvfree(w.guest);
		return -EBUSY;
	}
	xa_init_flags(&w.frames, XA_FLAGS_ACCOUNT);
	w.err = note_guest(&w);
	if (!w.err) {
		mutex_lock(&vm->lock);
		/* Last, so that no guest frame can pass for one of these. */
		note_own(&w);
		if (!w.err)
			walk_all(&w);
		mutex_unlock(&vm->lock);
	}
	unlock_vcpus(vm);
	for (gfn = 0; gfn < vm->nr_frames; gfn++)
		if (w.guest[gfn])
			put_page(w.guest[gfn]);
	xa_destroy(&w.frames);
	kvfree(w.guest);
	return w.err;
}
