// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Making a VM and its vCPUs: everything that is in place before the first RUN. */
#include <linux/capability.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <asm/desc_defs.h>
#include <asm/fpu/types.h>
#include "internal.h"

/* The TSS lives behind the switch block, in the second hardware page. */
#define TSS_OFFSET	0x1c00
#define TSS_LIMIT	103
#define GDT_PAGES	15
#define LDT_PAGES	16
#define GDT_LIMIT	(GDT_PAGES * PAGE_SIZE - 1)
#define POOL_MIN	256
/* Pages that the pool begins with; the core asks for more. */
#define POOL_FIRST	128

/* Callee-saved registers and the return address below the top of a new stack. */
#define FIRST_FRAME	7

struct tss {
	u32 reserved1;
	u64 rsp[3];
	u64 reserved2;
	u64 ist[7];
	u64 reserved3;
	u16 reserved4;
	u16 iomap_base;
} __packed;
static_assert(sizeof(struct tss) == TSS_LIMIT + 1);
/* The first hardware page is the switch block's; isolated guests' roots have the second. */
static_assert(sizeof(struct blanket_switch) <= PAGE_SIZE);
static_assert(TSS_OFFSET >= PAGE_SIZE);
static_assert(TSS_OFFSET + sizeof(struct tss) <= BLANKET_VCPU_HW_SIZE);
static_assert(sizeof(struct blanket_vm_page) <= PAGE_SIZE);
static_assert(sizeof(struct blanket_run) <= PAGE_SIZE);

#define ASM_OFFSET(name, field) \
	static_assert(name == offsetof(struct blanket_switch, field))
ASM_OFFSET(SW_CORE_RSP, core_rsp);
ASM_OFFSET(SW_HOST_RSP, host_rsp);
ASM_OFFSET(SW_TRANS_CR3, trans_cr3);
ASM_OFFSET(SW_HOST_CR3, host_cr3);
ASM_OFFSET(SW_HOST_CR4, host_cr4);
ASM_OFFSET(SW_CORE_CR4, core_cr4);
ASM_OFFSET(SW_HOST_FS_BASE, host_fs_base);
ASM_OFFSET(SW_HOST_GS_BASE, host_gs_base);
ASM_OFFSET(SW_HOST_KGS_BASE, host_kgs_base);
ASM_OFFSET(SW_HOST_TR, host_tr);
ASM_OFFSET(SW_HOST_LDT, host_ldt);
ASM_OFFSET(SW_HOST_SS, host_ss);
ASM_OFFSET(SW_HOST_CS, host_cs);
ASM_OFFSET(SW_CORE_GDTR, core_gdtr);
ASM_OFFSET(SW_CORE_IDTR, core_idtr);
ASM_OFFSET(SW_TRANS_GDTR, trans_gdtr);
ASM_OFFSET(SW_HOST_GDTR, host_gdtr);
ASM_OFFSET(SW_HOST_IDTR, host_idtr);
ASM_OFFSET(SW_GUEST_DR7, guest_dr7);
ASM_OFFSET(SW_HOST_SELF, host_self);
static_assert(DTR_LIMIT == offsetof(struct blanket_dtr, limit));

/* The M2P of an identity VM: entry i is i. */
static int map_m2p(struct blanket_vm *vm)
{
	const u64 per_page = PAGE_SIZE / sizeof(u64);
	u64 first;

	for (first = 0; first < vm->nr_frames; first += per_page) {
		struct page *page = blanket_page(vm, 0);
		u64 *entry, i;
		int err;

		if (!page)
			return -ENOMEM;
		set_page_private(page, CLASS_M2P);
		entry = page_address(page);
		for (i = 0; i < per_page; i++)
			entry[i] = first + i;
		err = blanket_map(vm, BLANKET_M2P + first * sizeof(u64), page, MAP_USER_RO);
		if (err)
			return err;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

static void fill_idt(struct gate_struct *idt)
{
	unsigned int v;

	for (v = 0; v < 256; v++) {
		u64 addr = BLANKET_IMAGE + blanket_header->stubs + v * BLANKET_STUB_STRIDE;
		unsigned int ist;

		/* Linux's own numbers, so that either IDT can meet either TSS. */
		switch (v) {
		case 8:  ist = 1; break;
		case 2:  ist = 2; break;
		case 1:  ist = 3; break;
		case 18: ist = 4; break;
		default: ist = 0;
		}
		idt[v] = (struct gate_struct) {
			.offset_low = addr & 0xffff,
			.segment = BLANKET_CORE_CS,
			.bits = {
				.ist = ist,
				.type = 0xe,
				.dpl = v == 3 || v == 4 ? 3 : 0,
				.p = 1,
			},
			.offset_middle = (addr >> 16) & 0xffff,
			.offset_high = addr >> 32,
		};
	}
}

/* Text and read-only data are the module's, the rest is this VM's own copy. */
static int map_image(struct blanket_vm *vm)
{
	const struct blanket_image_header *h = blanket_header;
	u64 off;
	int err;

	for (off = 0; off < h->rodata_end; off += PAGE_SIZE) {
		err = blanket_map(vm, BLANKET_IMAGE + off,
				  blanket_shared_page(vm, off),
				  off < h->text_end ? MAP_RX : MAP_RO);
		if (err)
			return err;
	}
	for (; off < h->data_end; off += PAGE_SIZE) {
		struct page *page = blanket_page(vm, 0);

		if (!page)
			return -ENOMEM;
		if (off < h->file_end)
			memcpy(page_address(page), blanket_image + off,
			       min_t(u64, PAGE_SIZE, h->file_end - off));
		if (off == h->idt)
			fill_idt(page_address(page));
		err = blanket_map(vm, BLANKET_IMAGE + off, page, MAP_RW);
		if (err)
			return err;
	}
	return 0;
}

static void fill_reserved_gdt(u64 *gdt, u64 tss)
{
	gdt[(BLANKET_CORE_CS & 0xff8) / 8] = 0x00af9b000000ffffULL;
	gdt[(BLANKET_CORE_SS & 0xff8) / 8] = 0x00cf93000000ffffULL;
	gdt[(BLANKET_GUEST_CS32 & 0xff8) / 8] = 0x00cffb000000ffffULL;
	gdt[(BLANKET_GUEST_SS & 0xff8) / 8] = 0x00cff3000000ffffULL;
	gdt[(BLANKET_GUEST_CS64 & 0xff8) / 8] = 0x00affb000000ffffULL;
	gdt[(BLANKET_CORE_TSS & 0xff8) / 8] = TSS_LIMIT | (tss & 0xffffff) << 16 |
		0x89ULL << 40 | (tss >> 24 & 0xff) << 56;
	gdt[(BLANKET_CORE_TSS & 0xff8) / 8 + 1] = tss >> 32;
}

/* FXSAVE image of a new FPU; the XSAVE header behind it stays zero. */
static void init_fpu(void *xsave)
{
	struct fxregs_state *fx = xsave;

	fx->cwd = 0x37f;
	fx->mxcsr = 0x1f80;
}

static int map_area(struct blanket_vcpu *vcpu, u64 area)
{
	const struct blanket_image_header *h = blanket_header;
	struct blanket_vm *vm = vcpu->vm;
	struct page *page;
	u64 off, *frame;
	int i, err;

	for (off = h->entry_start; off < h->entry_end; off += PAGE_SIZE) {
		err = blanket_map(vm, area + BLANKET_VCPU_ENTRY + off - h->entry_start,
				  blanket_shared_page(vm, off), MAP_RX);
		if (err)
			return err;
	}

	/* The first entry pops zeroes and returns to the image's start. */
	err = blanket_map_new(vm, area + BLANKET_VCPU_STACK,
			      BLANKET_VCPU_STACK_SIZE - PAGE_SIZE, MAP_RW);
	page = err ? NULL : blanket_page(vm, 0);
	if (!page)
		return err ?: -ENOMEM;
	frame = page_address(page) + PAGE_SIZE - FIRST_FRAME * sizeof(u64);
	frame[FIRST_FRAME - 1] = BLANKET_IMAGE + h->start;
	vcpu->sw->core_rsp = area + BLANKET_VCPU_HW - FIRST_FRAME * sizeof(u64);
	err = blanket_map(vm, area + BLANKET_VCPU_HW - PAGE_SIZE, page, MAP_RW);
	if (err)
		return err;

	for (i = 0; i < 2; i++) {
		err = blanket_map(vm, area + BLANKET_VCPU_HW + i * PAGE_SIZE,
				  virt_to_page((void *)vcpu->sw + i * PAGE_SIZE), MAP_RW);
		if (err)
			return err;
	}
	for (i = 0; i < IST_STACKS; i++) {
		err = blanket_map_new(vm, area + BLANKET_VCPU_IST + (2 * i + 1) * PAGE_SIZE,
				      PAGE_SIZE, MAP_RW);
		if (err)
			return err;
	}

	err = blanket_map_new(vm, area + BLANKET_VCPU_GDT, (GDT_PAGES - 1) * PAGE_SIZE, MAP_RW) ?:
	      blanket_map_new(vm, area + BLANKET_VCPU_LDT, LDT_PAGES * PAGE_SIZE, MAP_RW);
	page = err ? NULL : blanket_page(vm, 0);
	if (!page)
		return err ?: -ENOMEM;
	vcpu->reserved_gdt = page_address(page);
	fill_reserved_gdt(vcpu->reserved_gdt, area + BLANKET_VCPU_HW + TSS_OFFSET);
	err = blanket_map(vm, area + BLANKET_VCPU_GDT + BLANKET_RESERVED_PAGE, page, MAP_RW) ?:
	      blanket_map(vm, area + BLANKET_VCPU_TRANS_GDT + BLANKET_RESERVED_PAGE, page, MAP_RW);
	page = err ? NULL : blanket_page(vm, 0);
	if (!page)
		return err ?: -ENOMEM;
	vcpu->trans_gdt = page_address(page);
	return blanket_map(vm, area + BLANKET_VCPU_TRANS_GDT, page, MAP_RW);
}

static void fill_switch(struct blanket_vcpu *vcpu, u64 area)
{
	struct blanket_switch *sw = vcpu->sw;
	struct tss *tss = (void *)sw + TSS_OFFSET;
	int i;

	tss->rsp[0] = area + BLANKET_VCPU_HW;
	for (i = 0; i < IST_STACKS; i++)
		tss->ist[i] = area + BLANKET_VCPU_IST + (2 * i + 2) * PAGE_SIZE;
	tss->iomap_base = sizeof(*tss);

	sw->trans_cr3 = virt_to_phys(vcpu->root);
	sw->core_gdtr.limit = GDT_LIMIT;
	sw->core_gdtr.base = area + BLANKET_VCPU_GDT;
	sw->trans_gdtr.limit = GDT_LIMIT;
	sw->trans_gdtr.base = area + BLANKET_VCPU_TRANS_GDT;
	sw->core_idtr.limit = PAGE_SIZE - 1;
	sw->core_idtr.base = BLANKET_IMAGE + blanket_header->idt;
	sw->deadline = U64_MAX;
	sw->armed = U64_MAX;
	sw->guest_xcr0 = blanket_host.xsave ? XFEATURE_MASK_FPSSE : 0;
	sw->vcpu_id = vcpu->id;
	sw->exit_entry = (u64)blanket_world_exit;
	sw->host_self = (u64)sw;
}

static void init_timer(struct blanket_vcpu *vcpu)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	hrtimer_setup(&vcpu->timer, blanket_timer_fn, CLOCK_MONOTONIC, HRTIMER_MODE_ABS_PINNED);
#else
	hrtimer_init(&vcpu->timer, CLOCK_MONOTONIC, HRTIMER_MODE_ABS_PINNED);
	vcpu->timer.function = blanket_timer_fn;
#endif
}

static int vcpu_create(struct blanket_vm *vm, unsigned int id)
{
	u64 area = BLANKET_VCPU + id * BLANKET_VCPU_STRIDE;
	struct blanket_vcpu *vcpu;
	int err;

	vcpu = kzalloc(sizeof(*vcpu), GFP_KERNEL_ACCOUNT);
	if (!vcpu)
		return -ENOMEM;
	vm->vcpus[id] = vcpu;
	vcpu->vm = vm;
	vcpu->id = id;
	vcpu->cpu = -1;
	vcpu->timer_cpu = -1;
	mutex_init(&vcpu->run_mutex);
	init_waitqueue_head(&vcpu->wait);
	init_timer(vcpu);

	/* What follows, up to the area. */
	if (!blanket_charge(vm, 6 + (1 << get_order(blanket_host.xsave_size))))
		return -ENOMEM;
	vcpu->run = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	vcpu->sw = (void *)__get_free_pages(GFP_KERNEL_ACCOUNT | __GFP_ZERO, 1);
	vcpu->root = (void *)__get_free_pages(GFP_KERNEL_ACCOUNT | __GFP_ZERO, 1);
	/* A power of two from the page allocator: XSAVE wants 64-byte alignment. */
	vcpu->xsave = (void *)__get_free_pages(GFP_KERNEL_ACCOUNT | __GFP_ZERO,
					       get_order(blanket_host.xsave_size));
	if (!vcpu->run || !vcpu->sw || !vcpu->root || !vcpu->xsave)
		return -ENOMEM;
	vcpu->root_p4d = vcpu->root;
	if (blanket_host.la57) {
		vcpu->root_p4d = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
		if (!vcpu->root_p4d)
			return -ENOMEM;
		vcpu->root[511] = virt_to_phys(vcpu->root_p4d) | ENTRY_P | ENTRY_RW | ENTRY_A;
	}
	memcpy(vcpu->root_p4d + BLANKET_HOLE_FIRST_SLOT, vm->hole, sizeof(vm->hole));
	init_fpu(vcpu->xsave);

	err = map_area(vcpu, area) ?: blanket_show_area(vm, area);
	if (err)
		return err;
	fill_switch(vcpu, area);
	return 0;
}

static void vcpu_destroy(struct blanket_vcpu *vcpu)
{
	hrtimer_cancel(&vcpu->timer);
	free_page((unsigned long)vcpu->run);
	if (vcpu->root_p4d != vcpu->root)
		free_page((unsigned long)vcpu->root_p4d);
	free_pages((unsigned long)vcpu->sw, 1);
	free_pages((unsigned long)vcpu->root, 1);
	free_pages((unsigned long)vcpu->xsave, get_order(blanket_host.xsave_size));
	kfree(vcpu);
}

void blanket_vm_destroy(struct blanket_vm *vm)
{
	unsigned int i;

	blanket_frames_forget(vm);
	if (vm->watched)
		blanket_watch_put();
	for (i = 0; i < vm->nr_vcpus; i++)
		if (vm->vcpus[i])
			vcpu_destroy(vm->vcpus[i]);
	blanket_tables_free(vm);
	blanket_user_put(vm);
	mmdrop(vm->mm);
	kfree(vm);
}

static bool inject;
module_param(inject, bool, 0400);
MODULE_PARM_DESC(inject, "VMs may ask for a core that breaks on purpose (for Blanket's own tests)");

/* What the guest may have is what XSETBV would take, or no XSAVE at all. */
static bool xcr0_is_good(u64 mask)
{
	const u64 zmm = XFEATURE_MASK_AVX512;

	if (!mask)
		return true;
	return !(mask & ~(u64)blanket_host.xcr0_mask) &&
	       (mask & XFEATURE_MASK_FPSSE) == XFEATURE_MASK_FPSSE &&
	       (!(mask & zmm) || ((mask & zmm) == zmm && (mask & XFEATURE_MASK_YMM)));
}

static int check_args(const struct blanket_create_vm *a)
{
	if ((a->flags & ~(BLANKET_CREATE_ISOLATE | BLANKET_CREATE_SHARE)) ||
	    a->flags == (BLANKET_CREATE_ISOLATE | BLANKET_CREATE_SHARE))
		return -EINVAL;
	/* The roots would show the guest where the host's kernel is. */
	if ((a->flags & BLANKET_CREATE_SHARE) && blanket_cpu_leaks() && !capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (!a->nr_vcpus || a->nr_vcpus > BLANKET_MAX_VCPUS)
		return -EINVAL;
	if (!a->nr_frames || a->nr_frames > BLANKET_MAX_FRAMES)
		return -EINVAL;
	if (a->pool_limit && (a->pool_limit < POOL_MIN || a->pool_limit > BLANKET_MAX_POOL))
		return -EINVAL;
	if (!PAGE_ALIGNED(a->user_addr) || !xcr0_is_good(a->xcr0_mask))
		return -EINVAL;
	/* A core that is broken on purpose may hold a CPU for seconds: root's decision. */
	if ((a->boot.flags & BLANKET_BOOT_INJECT) && !inject)
		return -EPERM;
	if (!access_ok((void __user *)a->user_addr, a->nr_frames * PAGE_SIZE))
		return -EFAULT;
	return 0;
}

static int vm_build(struct blanket_vm *vm)
{
	u64 frames = vm->nr_frames;
	unsigned int id;
	u64 want, at;
	int err;

	err = blanket_tables_init(vm) ?:
	      map_m2p(vm) ?:
	      map_image(vm) ?:
	      blanket_isolate(vm) ?:
	      blanket_map(vm, BLANKET_VM_PAGE, virt_to_page(vm->page), MAP_RW) ?:
	      blanket_map_new(vm, BLANKET_GFN_INFO,
			      PAGE_ALIGN(frames * BLANKET_GFN_INFO_SIZE), MAP_RW) ?:
	      blanket_map_new(vm, BLANKET_POOL_INFO,
			      PAGE_ALIGN(vm->pool_limit * BLANKET_POOL_INFO_SIZE), MAP_RW) ?:
	      blanket_map_new(vm, BLANKET_REVOKED, PAGE_ALIGN(DIV_ROUND_UP(frames, 8)), MAP_RW) ?:
	      blanket_window_init(vm);
	for (id = 0; !err && id < vm->nr_vcpus; id++)
		err = vcpu_create(vm, id);
	if (err)
		return err;

	want = min_t(u64, POOL_FIRST, vm->pool_limit);
	for (at = 0; at < want; at = vm->page->pool_pages) {
		long added = blanket_pool_grow(vm, want - at);

		if (added < 0)
			return added;
	}
	return blanket_frames_follow(vm);
}

static atomic64_t serials;

struct blanket_vm *blanket_vm_create(const struct blanket_create_vm *args)
{
	struct blanket_vm *vm;
	struct page *page;
	int err;

	err = check_args(args);
	if (err)
		return ERR_PTR(err);
	vm = kzalloc(sizeof(*vm), GFP_KERNEL_ACCOUNT);
	if (!vm)
		return ERR_PTR(-ENOMEM);
	kref_init(&vm->ref);
	vm->serial = atomic64_inc_return(&serials);
	mutex_init(&vm->lock);
	spin_lock_init(&vm->frames_lock);
	init_waitqueue_head(&vm->gate_open);
	INIT_LIST_HEAD(&vm->pages);
	mmgrab(current->mm);
	vm->mm = current->mm;
	vm->user_addr = args->user_addr;
	vm->nr_frames = args->nr_frames;
	vm->nr_vcpus = args->nr_vcpus;
	vm->isolated = args->flags & BLANKET_CREATE_ISOLATE ||
		       (!args->flags && blanket_cpu_leaks());
	vm->pool_limit = args->pool_limit ?: 1024 + args->nr_frames / 16;

	err = blanket_user_get(vm);
	if (err)
		goto fail;
	page = blanket_page(vm, 0);
	if (!page) {
		err = -ENOMEM;
		goto fail;
	}
	vm->page = page_address(page);
	vm->page->boot = args->boot;
	vm->page->nr_frames = vm->nr_frames;
	vm->page->nr_vcpus = vm->nr_vcpus;
	vm->page->la57 = blanket_host.la57;
	vm->page->pool_limit = vm->pool_limit;
	vm->xcr0_mask = args->xcr0_mask;
	vm->page->xcr0_mask = vm->xcr0_mask;
	memcpy(vm->page->cpuid_hidden, args->cpuid_hidden, sizeof(args->cpuid_hidden));
	vm->page->cpuid_faults = blanket_host.cpuid_msr != 0;
	blanket_clock_init(vm);

	err = blanket_watch_get();
	if (err)
		goto fail;
	vm->watched = true;
	err = vm_build(vm);
	if (!err)
		return vm;
fail:
	blanket_vm_destroy(vm);
	return ERR_PTR(err);
}
