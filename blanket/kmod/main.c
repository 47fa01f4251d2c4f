// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * blanket.ko: runs Xen PV guests in a world of their own, without VMX or SVM.
 *
 * This file: what the host and the core image must be, the device, descriptors.
 */
#include <linux/anon_inodes.h>
#include <linux/cc_platform.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <asm/cpufeature.h>
#include <asm/fpu/types.h>
#include <asm/fpu/xcr.h>
#include <asm/processor.h>
#include <asm/special_insns.h>
#include <asm/tsc.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 16, 0)
#include <asm/cpuid/api.h>
#endif
#include "internal.h"
#include "build_id.h"

#define CR4_FRED (1ULL << 32)

struct blanket_host blanket_host;
const struct blanket_image_header *blanket_header;
struct page **blanket_shared_pages;

/* ---- descriptors ---- */

static void vm_release(struct kref *ref)
{
	blanket_vm_destroy(container_of(ref, struct blanket_vm, ref));
}

void blanket_vm_put(struct blanket_vm *vm)
{
	kref_put(&vm->ref, vm_release);
}

static long vcpu_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	if (cmd != BLANKET_RUN)
		return -ENOTTY;
	if (arg)
		return -EINVAL;
	return blanket_vcpu_run(file->private_data);
}

static int vcpu_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct blanket_vcpu *vcpu = file->private_data;

	if (vma->vm_pgoff || vma->vm_end - vma->vm_start != PAGE_SIZE)
		return -EINVAL;
	return vm_insert_page(vma, vma->vm_start, virt_to_page(vcpu->run));
}

static int vcpu_release(struct inode *inode, struct file *file)
{
	struct blanket_vcpu *vcpu = file->private_data;

	blanket_vm_put(vcpu->vm);
	return 0;
}

static const struct file_operations vcpu_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = vcpu_ioctl,
	.mmap = vcpu_mmap,
	.release = vcpu_release,
};

static long create_vcpu(struct blanket_vm *vm, unsigned long id)
{
	struct blanket_vcpu *vcpu;
	long fd;

	if (id >= vm->nr_vcpus)
		return -EINVAL;
	vcpu = vm->vcpus[id];
	mutex_lock(&vm->lock);
	if (vcpu->has_fd) {
		fd = -EEXIST;
		goto out;
	}
	kref_get(&vm->ref);
	fd = anon_inode_getfd("blanket-vcpu", &vcpu_fops, vcpu, O_RDWR | O_CLOEXEC);
	if (fd >= 0)
		vcpu->has_fd = true;
out:
	mutex_unlock(&vm->lock);
	/* Never the last reference: the caller holds the VM's descriptor. */
	if (fd < 0 && fd != -EEXIST)
		blanket_vm_put(vm);
	return fd;
}

static long raise(struct blanket_vm *vm, unsigned long port)
{
	u32 vcpu = 0;

	if (port >= BLANKET_RAISED_WORDS * 64)
		return -EINVAL;
	set_bit(port, (unsigned long *)vm->page->raised);
	/* The core fills the table; a stale or wild entry costs a useless wake-up. */
	if (port < BLANKET_PORT_VCPUS)
		vcpu = READ_ONCE(vm->page->port_vcpu[port]);
	if (vcpu >= vm->nr_vcpus)
		vcpu = 0;
	blanket_kick(vm->vcpus[vcpu], BLANKET_PENDING_RAISED);
	return 0;
}

static long raise_virq(struct blanket_vm *vm, unsigned long virq)
{
	if (virq >= 64)
		return -EINVAL;
	set_bit(virq, (unsigned long *)&vm->page->raised_virqs);
	blanket_kick(vm->vcpus[0], BLANKET_PENDING_RAISED);
	return 0;
}

static long get_stats(struct blanket_vm *vm, void __user *to)
{
	struct blanket_vm_stats *stats = kzalloc(sizeof(*stats), GFP_KERNEL);
	unsigned int id, i;
	u64 ticks = 0;
	long ret;

	if (!stats)
		return -ENOMEM;
	for (id = 0; id < vm->nr_vcpus; id++) {
		const struct blanket_vcpu *vcpu = vm->vcpus[id];

		for (i = 0; i < BLANKET_EXIT_REASONS; i++)
			stats->exits[i] += READ_ONCE(vcpu->exits[i]);
		for (i = 0; i < BLANKET_COUNTERS; i++)
			stats->counters[i] += READ_ONCE(vcpu->sw->counters[i]);
		ticks += READ_ONCE(vcpu->guest_tsc);
	}
	stats->frames = atomic64_read(&vm->frames);
	stats->pool = READ_ONCE(vm->page->pool_pages);
	stats->pool -= min_t(u64, stats->pool, READ_ONCE(vm->page->pool_gone));
	stats->revocations = atomic64_read(&vm->revocations);
	stats->revoked = READ_ONCE(vm->revoked);
	stats->guest_ns = mul_u64_u64_div_u64(ticks, NSEC_PER_MSEC, tsc_khz);
	ret = copy_to_user(to, stats, sizeof(*stats)) ? -EFAULT : 0;
	kfree(stats);
	return ret;
}

static long audit(struct blanket_vm *vm, void __user *to)
{
	struct blanket_audit audit = {};
	long ret = blanket_audit_vm(vm, &audit);

	if (ret)
		return ret;
	return copy_to_user(to, &audit, sizeof(audit)) ? -EFAULT : 0;
}

/*
 * The core finds its ring mapped when it reads the word, and reads it when it is
 * kicked. A VM that is never traced has no rings.
 */
static long trace(struct blanket_vm *vm, unsigned long on)
{
	unsigned int id;
	int err = 0;

	if (on > 1)
		return -EINVAL;
	mutex_lock(&vm->lock);
	for (id = 0; on && !err && id < vm->nr_vcpus; id++)
		err = blanket_trace_init(vm->vcpus[id]);
	if (!err)
		smp_store_release(&vm->page->trace, on);
	mutex_unlock(&vm->lock);
	if (err)
		return err;
	for (id = 0; id < vm->nr_vcpus; id++)
		blanket_kick(vm->vcpus[id], BLANKET_PENDING_KICK);
	return 0;
}

/* The rings, one behind the other. The core never reads what is in them. */
static int vm_fd_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct blanket_vm *vm = file->private_data;
	const unsigned long pages = ARRAY_SIZE(vm->vcpus[0]->trace);
	unsigned long at = vma->vm_start, id = vma->vm_pgoff / pages, i;
	int err = 0;

	if (id >= vm->nr_vcpus || vma->vm_pgoff % pages ||
	    vma->vm_end - vma->vm_start != BLANKET_VCPU_TRACE_SIZE)
		return -EINVAL;
	mutex_lock(&vm->lock);
	for (i = 0; !err && i < pages; i++, at += PAGE_SIZE) {
		struct page *page = vm->vcpus[id]->trace[i];

		err = page ? vm_insert_page(vma, at, page) : -ENODATA;
	}
	mutex_unlock(&vm->lock);
	return err;
}

static long vm_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct blanket_vm *vm = file->private_data;
	unsigned int id;

	switch (cmd) {
	case BLANKET_CREATE_VCPU:
		return create_vcpu(vm, arg);
	case BLANKET_RAISE:
		return raise(vm, arg);
	case BLANKET_RAISE_VIRQ:
		return raise_virq(vm, arg);
	case BLANKET_GET_STATS:
		return get_stats(vm, (void __user *)arg);
	case BLANKET_AUDIT:
		return audit(vm, (void __user *)arg);
	case BLANKET_TRACE:
		return trace(vm, arg);
	case BLANKET_TARGET:
		/* The core looks at it when the guest asks for frames. */
		if (!arg || arg > vm->nr_frames)
			return -EINVAL;
		WRITE_ONCE(vm->page->target, arg);
		return 0;
	case BLANKET_PAUSE:
		if (arg > BLANKET_PAUSE_NO_LOG)
			return -EINVAL;
		smp_store_release(&vm->page->pause, (u32)arg);
		for (id = 0; id < vm->nr_vcpus; id++)
			blanket_kick(vm->vcpus[id], BLANKET_PENDING_KICK);
		return 0;
	case BLANKET_RECLAIM:
		smp_store_release(&vm->page->reclaim, 1);
		blanket_kick(vm->vcpus[0], BLANKET_PENDING_KICK);
		return 0;
	default:
		return -ENOTTY;
	}
}

static int vm_fd_release(struct inode *inode, struct file *file)
{
	blanket_vm_put(file->private_data);
	return 0;
}

static const struct file_operations vm_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = vm_ioctl,
	.mmap = vm_fd_mmap,
	.release = vm_fd_release,
};

/* ---- the device ---- */

static long get_info(void __user *to)
{
	struct blanket_info info = {
		.api = BLANKET_API_VERSION,
		.max_vcpus = BLANKET_MAX_VCPUS,
		.max_frames = BLANKET_MAX_FRAMES,
		.build_id = BLANKET_BUILD_ID,
		.tsc_khz = tsc_khz,
		.xcr0_mask = blanket_host.xcr0_mask,
	};

	if (!check_tsc_unstable())
		info.features |= BLANKET_FEATURE_STABLE_TSC;
	if (blanket_host.la57)
		info.features |= BLANKET_FEATURE_LA57;
	if (blanket_host.xsave)
		info.features |= BLANKET_FEATURE_XSAVE;
	if (blanket_host.cpuid_msr)
		info.features |= BLANKET_FEATURE_CPUID_PROFILE;
	if (blanket_cpu_leaks())
		info.features |= BLANKET_FEATURE_ISOLATES;
	return copy_to_user(to, &info, sizeof(info)) ? -EFAULT : 0;
}

static long create_vm(const void __user *from)
{
	struct blanket_create_vm args;
	struct blanket_vm *vm;
	long fd;

	if (copy_from_user(&args, from, sizeof(args)))
		return -EFAULT;
	vm = blanket_vm_create(&args);
	if (IS_ERR(vm))
		return PTR_ERR(vm);
	fd = anon_inode_getfd("blanket-vm", &vm_fops, vm, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		blanket_vm_put(vm);
	return fd;
}

static long dev_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	switch (cmd) {
	case BLANKET_GET_INFO:
		return get_info((void __user *)arg);
	case BLANKET_CREATE_VM:
		return create_vm((const void __user *)arg);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations dev_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = dev_ioctl,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "blanket",
	.fops = &dev_fops,
	.mode = 0600,
};

/* ---- what must hold before anything runs ---- */

static int refuse(const char *why)
{
	pr_err("blanket: cannot run here: %s\n", why);
	return -ENODEV;
}

/* XCR0 bits for guests: no MPX, PKRU or AMX; the standard format fits a page. */
static void find_xsave(void)
{
	const u64 want = XFEATURE_MASK_FPSSE | XFEATURE_MASK_YMM | XFEATURE_MASK_AVX512;
	u32 eax, ebx, ecx, edx;
	unsigned int i;

	blanket_host.xsave_size = sizeof(struct fxregs_state);
	blanket_host.xsave = boot_cpu_has(X86_FEATURE_XSAVE) &&
			     (native_read_cr4() & X86_CR4_OSXSAVE);
	if (!blanket_host.xsave)
		return;
	blanket_host.xcr0_mask = xgetbv(XCR_XFEATURE_ENABLED_MASK) & want;
	if ((blanket_host.xcr0_mask & XFEATURE_MASK_AVX512) != XFEATURE_MASK_AVX512)
		blanket_host.xcr0_mask &= ~XFEATURE_MASK_AVX512;
	blanket_host.xsave_size += sizeof(struct xstate_header);
	for (i = 2; i < 32; i++) {
		if (!(blanket_host.xcr0_mask & BIT(i)))
			continue;
		cpuid_count(0xd, i, &eax, &ebx, &ecx, &edx);
		blanket_host.xsave_size = max(blanket_host.xsave_size, eax + ebx);
	}
}

/*
 * CPUID of guest programs can be trapped on CPUs that have a switch for it: Intel's
 * CPUID faulting (SDM vol. 4, MISC_FEATURES_ENABLES), which Linux finds, and AMD's
 * CpuidUserDis (APM vol. 3, leaf 0x80000021 eax bit 17; HWCR bit 35), which it does not.
 */
static void find_cpuid_faulting(void)
{
	if (boot_cpu_has(X86_FEATURE_CPUID_FAULT)) {
		blanket_host.cpuid_msr = MSR_MISC_FEATURES_ENABLES;
		blanket_host.cpuid_bit = MSR_MISC_FEATURES_ENABLES_CPUID_FAULT;
	} else if (boot_cpu_data.x86_vendor == X86_VENDOR_AMD &&
		   cpuid_eax(0x80000000) >= 0x80000021 &&
		   (cpuid_eax(0x80000021) & BIT(17))) {
		blanket_host.cpuid_msr = MSR_K7_HWCR;
		blanket_host.cpuid_bit = BIT_ULL(35);
	}
}

static int check_host(void)
{
	u64 cr4 = native_read_cr4();

	if (boot_cpu_has(X86_FEATURE_XENPV))
		return refuse("this is itself a Xen PV guest");
	if (cr4 & CR4_FRED)
		return refuse("the kernel uses FRED event delivery (boot with fred=off)");
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT) || cc_platform_has(CC_ATTR_GUEST_MEM_ENCRYPT))
		return refuse("memory is encrypted (SME, SEV or TDX)");
	if (!boot_cpu_has(X86_FEATURE_NX))
		return refuse("no NX");
	if (!tsc_khz)
		return refuse("the TSC cannot be used");
	blanket_host.la57 = cr4 & X86_CR4_LA57;
	blanket_host.tsc_aux = boot_cpu_has(X86_FEATURE_RDTSCP) ||
			       boot_cpu_has(X86_FEATURE_RDPID);
	find_xsave();
	find_cpuid_faulting();
	return 0;
}

static int check_image(void)
{
	const struct blanket_image_header *h = (const void *)blanket_image;
	u64 size = blanket_image_end - blanket_image;

	if (size < sizeof(*h) || h->magic != BLANKET_IMAGE_MAGIC)
		return refuse("no core image inside");
	if (h->api != BLANKET_API_VERSION || h->switch_size != sizeof(struct blanket_switch))
		return refuse("module and core image are of different versions");
	if (!PAGE_ALIGNED(h->entry_start | h->entry_end | h->text_end | h->rodata_end |
			  h->data_end | h->idt) ||
	    h->entry_start > h->entry_end || h->entry_end > h->text_end ||
	    h->text_end > h->rodata_end || h->rodata_end > h->data_end ||
	    h->data_end > BLANKET_IMAGE_MAX || h->file_end > h->data_end ||
	    h->file_end != size || h->entry_end - h->entry_start > BLANKET_VCPU_ENTRY_MAX ||
	    h->start >= h->text_end || h->idt < h->rodata_end || h->idt >= h->data_end ||
	    h->isolate > h->isolate_end || h->isolate_end > h->rodata_end ||
	    h->isolate_end > size || ((h->isolate | h->isolate_end) & 15) ||
	    h->stubs < h->entry_start ||
	    h->stubs + 256 * BLANKET_STUB_STRIDE > h->entry_end)
		return refuse("the core image's header is wrong");
	blanket_header = h;
	return 0;
}

static void free_shared(void)
{
	u64 i;

	for (i = 0; blanket_shared_pages && i < blanket_header->rodata_end >> PAGE_SHIFT; i++)
		if (blanket_shared_pages[i])
			__free_page(blanket_shared_pages[i]);
	kvfree(blanket_shared_pages);
}

/* Text and read-only data, once for all VMs. */
static int load_shared(void)
{
	u64 off, end = blanket_header->rodata_end;

	blanket_shared_pages = kvcalloc(end >> PAGE_SHIFT, sizeof(struct page *), GFP_KERNEL);
	if (!blanket_shared_pages)
		return -ENOMEM;
	for (off = 0; off < end; off += PAGE_SIZE) {
		struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);

		if (!page) {
			free_shared();
			return -ENOMEM;
		}
		blanket_shared_pages[off >> PAGE_SHIFT] = page;
		if (off < blanket_header->file_end)
			memcpy(page_address(page), blanket_image + off,
			       min_t(u64, PAGE_SIZE, blanket_header->file_end - off));
	}
	return 0;
}

static int __init blanket_init(void)
{
	int err;

	err = check_host() ?: check_image() ?: load_shared();
	if (err)
		return err;
	blanket_speculation_init();
	err = blanket_isolate_init();
	if (err)
		goto free;
	err = blanket_watch_init();
	if (err)
		goto isolate;
	err = misc_register(&device);
	if (!err)
		return 0;
	blanket_watch_exit();
isolate:
	blanket_isolate_exit();
free:
	free_shared();
	return err;
}
module_init(blanket_init);

static void __exit blanket_exit(void)
{
	misc_deregister(&device);
	blanket_watch_exit();
	blanket_isolate_exit();
	free_shared();
}
module_exit(blanket_exit);

MODULE_DESCRIPTION("Blanket: paravirtual VMs without nested virtualization");
MODULE_AUTHOR("The Supercloud authors");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_VERSION("0.1.0");
