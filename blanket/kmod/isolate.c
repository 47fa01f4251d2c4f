// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Isolated guests: their roots hold of the hole only what is used before the entry
 * code has changed CR3, and the core runs on a root of its own, as the kernel does
 * with page-table isolation. For CPUs with Meltdown, and where it is asked for.
 */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <asm/cpufeature.h>
#include "internal.h"

/* A NOP of five bytes, which the image has where a jump may come. */
static const u8 nop[5] = { 0x0f, 0x1f, 0x44, 0x00, 0x00 };

/* The entry section with its jumps, by page; shared by all isolated VMs. */
static struct page **entry_pages;

static u64 entry_count(void)
{
	return (blanket_header->entry_end - blanket_header->entry_start) >> PAGE_SHIFT;
}

bool blanket_cpu_leaks(void)
{
	return boot_cpu_has_bug(X86_BUG_CPU_MELTDOWN);
}

/* One of the shared pages of the image, as this VM has it. */
struct page *blanket_shared_page(const struct blanket_vm *vm, u64 off)
{
	const struct blanket_image_header *h = blanket_header;

	if (vm->isolated && off >= h->entry_start && off < h->entry_end)
		return entry_pages[(off - h->entry_start) >> PAGE_SHIFT];
	return blanket_shared_pages[off >> PAGE_SHIFT];
}

void blanket_isolate_exit(void)
{
	u64 i;

	for (i = 0; entry_pages && i < entry_count(); i++)
		if (entry_pages[i])
			__free_page(entry_pages[i]);
	kvfree(entry_pages);
	entry_pages = NULL;
}

/* The pages are not contiguous, and a site may cross two of them. */
static u8 *entry_byte(u64 off)
{
	off -= blanket_header->entry_start;
	return (u8 *)page_address(entry_pages[off >> PAGE_SHIFT]) + (off & ~PAGE_MASK);
}

static bool put_jump(u64 site, u64 to)
{
	const struct blanket_image_header *h = blanket_header;
	u32 distance = to - (site + sizeof(nop));
	u8 jump[5] = { 0xe9, distance, distance >> 8, distance >> 16, distance >> 24 };
	unsigned int i;

	if (site < h->entry_start || site + sizeof(nop) > h->entry_end ||
	    to < h->entry_start || to >= h->entry_end)
		return false;
	for (i = 0; i < sizeof(nop); i++)
		if (*entry_byte(site + i) != nop[i])
			return false;
	for (i = 0; i < sizeof(nop); i++)
		*entry_byte(site + i) = jump[i];
	return true;
}

int blanket_isolate_init(void)
{
	const struct blanket_image_header *h = blanket_header;
	u64 i, at;

	entry_pages = kvcalloc(entry_count(), sizeof(struct page *), GFP_KERNEL);
	if (!entry_pages)
		return -ENOMEM;
	for (i = 0; i < entry_count(); i++) {
		entry_pages[i] = alloc_page(GFP_KERNEL);
		if (!entry_pages[i]) {
			blanket_isolate_exit();
			return -ENOMEM;
		}
		copy_page(page_address(entry_pages[i]),
			  page_address(blanket_shared_pages[(h->entry_start >> PAGE_SHIFT) + i]));
	}
	for (at = h->isolate; at < h->isolate_end; at += 2 * sizeof(u64)) {
		const u64 *pair = (const u64 *)(blanket_image + at);

		if (!put_jump(pair[0], pair[1])) {
			pr_err("blanket: the core image's jumps are not where it says\n");
			blanket_isolate_exit();
			return -EINVAL;
		}
	}
	return 0;
}

/* The entry for @va in the tables of the entry area, made if need be. */
static u64 *entry_leaf(struct blanket_vm *vm, u64 va)
{
	u64 *table = vm->entry_l3;
	u32 level;

	for (level = 3; level > 1; level--) {
		u64 *entry = &table[va >> (12 + 9 * (level - 1)) & 511];

		if (!(*entry & ENTRY_P)) {
			struct page *page = blanket_page(vm, 0);

			if (!page)
				return NULL;
			set_page_private(page, CLASS_TABLE);
			*entry = page_to_phys(page) | ENTRY_P | ENTRY_RW | ENTRY_A | ENTRY_D;
		}
		table = __va(*entry & ENTRY_FRAME);
	}
	return &table[va >> 12 & 511];
}

/* Shows a range of the hole in the entry area too. */
static int show(struct blanket_vm *vm, u64 va, u64 size)
{
	u64 end = va + size;

	for (; va < end; va += PAGE_SIZE) {
		u64 *to = entry_leaf(vm, va), *from = blanket_entry(vm, va);

		if (!to || !from)
			return -ENOMEM;
		*to = *from;
	}
	return 0;
}

/* What the entry code of a vCPU uses before it has left the guest's root. */
int blanket_show_area(struct blanket_vm *vm, u64 area)
{
	const struct blanket_image_header *h = blanket_header;
	int i, err;

	if (!vm->isolated)
		return 0;
	err = show(vm, area + BLANKET_VCPU_ENTRY, h->entry_end - h->entry_start) ?:
	      show(vm, area + BLANKET_VCPU_HW - PAGE_SIZE, PAGE_SIZE) ?:
	      show(vm, area + BLANKET_VCPU_HW + PAGE_SIZE, PAGE_SIZE) ?:
	      show(vm, area + BLANKET_VCPU_GDT, 15 * PAGE_SIZE) ?:
	      show(vm, area + BLANKET_VCPU_LDT, 16 * PAGE_SIZE);
	for (i = 0; !err && i < IST_STACKS; i++)
		err = show(vm, area + BLANKET_VCPU_IST + (2 * i + 1) * PAGE_SIZE, PAGE_SIZE);
	return err;
}

/* The core's root, and what guests' roots get instead of the hole. */
int blanket_isolate(struct blanket_vm *vm)
{
	const struct blanket_image_header *h = blanket_header;
	struct page *page;
	u64 *root;
	int err;

	memcpy(vm->hole, vm->page->hole, sizeof(vm->hole));
	if (!vm->isolated)
		return 0;
	page = blanket_page(vm, 0);
	if (!page)
		return -ENOMEM;
	set_page_private(page, CLASS_ROOT);
	root = page_address(page);
	memcpy(root + BLANKET_HOLE_FIRST_SLOT, vm->hole, sizeof(vm->hole));
	vm->core_root = page_to_phys(page);
	if (blanket_host.la57) {
		page = blanket_page(vm, 0);
		if (!page)
			return -ENOMEM;
		set_page_private(page, CLASS_ROOT);
		root = page_address(page);
		root[511] = vm->core_root | ENTRY_P | ENTRY_RW | ENTRY_A;
		vm->core_root = page_to_phys(page);
	}
	vm->page->core_cr3 = vm->core_root;

	page = blanket_page(vm, 0);
	if (!page)
		return -ENOMEM;
	set_page_private(page, CLASS_TABLE);
	vm->entry_l3 = page_address(page);
	memset(vm->page->hole + SLOT_CORE, 0, sizeof(vm->hole) - SLOT_CORE * sizeof(u64));
	vm->page->hole[SLOT_CORE] = page_to_phys(page) | ENTRY_P | ENTRY_RW | ENTRY_A;
	err = show(vm, BLANKET_IMAGE + h->entry_start, h->entry_end - h->entry_start) ?:
	      show(vm, BLANKET_IMAGE + h->idt, PAGE_SIZE);
	/* The CPU only reads it. */
	if (!err)
		*entry_leaf(vm, BLANKET_IMAGE + h->idt) &= ~(ENTRY_RW | ENTRY_D);
	return err;
}
