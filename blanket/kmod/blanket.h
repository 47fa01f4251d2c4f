/* SPDX-License-Identifier: (GPL-2.0 WITH Linux-syscall-note) OR MIT */
/*
 * The module's ABI: /dev/blanket for the VMM, the switch block for the core.
 *
 * The same contract as blanket/abi/src/device.rs and layout.rs, in C; a test
 * compares every size, offset and number of the two. Comments are there.
 */
#ifndef BLANKET_H
#define BLANKET_H

/* ---- numbers that the assembly also needs ---- */

#define BLANKET_API_VERSION	7
#define BLANKET_MAX_VCPUS	64
#define BLANKET_MAX_FRAMES	(1ULL << 24)
#define BLANKET_MAX_POOL	(1ULL << 22)
#define BLANKET_RUN_DATA	2048
#define BLANKET_EXIT_REASONS	32
#define BLANKET_COUNTERS	72
#define BLANKET_STUB_STRIDE	16
#define BLANKET_IMAGE_MAGIC	0x45524f43544b4c42ULL

/* Exit reasons; those from USER on are the VMM's. */
#define BLANKET_EXIT_INTR		1
#define BLANKET_EXIT_NMI		2
#define BLANKET_EXIT_MCE		3
#define BLANKET_EXIT_IDLE		4
#define BLANKET_EXIT_FRAME		5
#define BLANKET_EXIT_KICK		6
#define BLANKET_EXIT_FLUSH		7
#define BLANKET_EXIT_DEADLINE		8
#define BLANKET_EXIT_POOL		9
#define BLANKET_EXIT_YIELD		10
#define BLANKET_EXIT_BREATH		11
#define BLANKET_EXIT_XCR0		12
#define BLANKET_EXIT_TRIM		13
#define BLANKET_EXIT_FILL		14
#define BLANKET_EXIT_USER		16
#define BLANKET_EXIT_SEND		16
#define BLANKET_EXIT_CONSOLE		17
#define BLANKET_EXIT_SHUTDOWN		18
#define BLANKET_EXIT_CRASH		19
#define BLANKET_EXIT_BALLOON		20
#define BLANKET_EXIT_PAUSED		21

/* Argument 0 of CRASH. */
#define BLANKET_CRASH_GUEST	1
#define BLANKET_CRASH_CORE	2
#define BLANKET_CRASH_MEMORY	3

/* NMIs of the watchdog that end a visit to the core world. */
#define BLANKET_WATCH_LIMIT	3

/* Rules of an audit. */
#define BLANKET_AUDIT_FOREIGN		1
#define BLANKET_AUDIT_TABLE		2
#define BLANKET_AUDIT_ABSENT		3
#define BLANKET_AUDIT_BITS		4
#define BLANKET_AUDIT_RIGHTS		5
#define BLANKET_AUDIT_HOLE		6
#define BLANKET_AUDIT_WINDOW		7
#define BLANKET_AUDIT_OWN		8
#define BLANKET_AUDIT_M2P		9
#define BLANKET_AUDIT_ROOT		10
#define BLANKET_AUDIT_TRANSITION	11

/* Bits of blanket_switch.pending. */
#define BLANKET_PENDING_KICK	1
#define BLANKET_PENDING_RAISED	2
#define BLANKET_PENDING_NMI		4
#define BLANKET_PENDING_MCE		8
#define BLANKET_PENDING_FLUSH		16

/* Selectors of the core world (Xen's reserved GDT page). */
#define BLANKET_RESERVED_PAGE	0xe000
#define BLANKET_CORE_CS		0xe008
#define BLANKET_CORE_SS		0xe010
#define BLANKET_GUEST_CS32	0xe023
#define BLANKET_GUEST_SS	0xe02b
#define BLANKET_GUEST_CS64	0xe033
#define BLANKET_CORE_TSS	0xe040
#define BLANKET_CORE_LDT	0xe050

/* Offsets in struct blanket_switch; a dtr's ten bytes start 6 into it. */
#define SW_CORE_RSP		0x00
#define SW_HOST_RSP		0x08
#define SW_TRANS_CR3		0x10
#define SW_HOST_CR3		0x18
#define SW_HOST_CR4		0x20
#define SW_CORE_CR4		0x28
#define SW_HOST_FS_BASE		0x30
#define SW_HOST_GS_BASE		0x38
#define SW_HOST_KGS_BASE	0x40
#define SW_HOST_TR		0x48
#define SW_HOST_LDT		0x4a
#define SW_HOST_SS		0x54
#define SW_HOST_CS		0x56
#define SW_CORE_GDTR		0x60
#define SW_CORE_IDTR		0x70
#define SW_TRANS_GDTR		0x80
#define SW_HOST_GDTR		0x90
#define SW_HOST_IDTR		0xa0
#define SW_GUEST_DR7		0x120
#define SW_HOST_SELF		0x138
#define DTR_LIMIT		0x6

/* Hole layout. */
#define BLANKET_HOLE_FIRST_SLOT	256
#define BLANKET_HOLE_END_SLOT	272
#define BLANKET_M2P		0xffff800000000000ULL
#define BLANKET_IMAGE		0xffff808000000000ULL
#define BLANKET_IMAGE_MAX	(16ULL << 20)
#define BLANKET_VCPU		0xffff808010000000ULL
#define BLANKET_VCPU_STRIDE	0x80000ULL
#define BLANKET_VM_PAGE		0xffff808030000000ULL
#define BLANKET_CPUID_TABLE	(BLANKET_VM_PAGE + 0x1000)
#define BLANKET_REVOKED		0xffff808038000000ULL
#define BLANKET_GFN_INFO	0xffff808040000000ULL
#define BLANKET_POOL_INFO	0xffff809000000000ULL
#define BLANKET_POOL_GFNS	0xffff80a000000000ULL
#define BLANKET_WINDOW		0xffff810000000000ULL
#define BLANKET_WINDOW_PTES	(BLANKET_WINDOW + (511ULL << 30))
#define BLANKET_POOL		0xffff818000000000ULL
#define BLANKET_POOL_PTES	(BLANKET_POOL + (511ULL << 30))
#define BLANKET_REVOKED_BLOCK	4096
#define BLANKET_GFN_INFO_SIZE	16
#define BLANKET_POOL_INFO_SIZE	24
#define BLANKET_POOL_GFNS_SIZE	2048
#define BLANKET_POOL_INFO_LEVEL	12
#define BLANKET_POOL_INFO_STATE	13
#define BLANKET_POOL_SHADOW	1
#define BLANKET_POOL_GONE	4
#define BLANKET_POOL_KERNEL_ROOT	4
#define BLANKET_POOL_USER_ROOT	5

/* Offsets in a vCPU area. */
#define BLANKET_VCPU_ENTRY	0x0
#define BLANKET_VCPU_ENTRY_MAX	0x8000
#define BLANKET_VCPU_STACK	0x10000
#define BLANKET_VCPU_STACK_SIZE	0x10000
#define BLANKET_VCPU_HW		0x20000
#define BLANKET_VCPU_HW_SIZE	0x2000
#define BLANKET_VCPU_KERNEL_CR3	0x21020
#define BLANKET_VCPU_USER_CR3	0x21028
#define BLANKET_VCPU_PV		0x22000
#define BLANKET_VCPU_IST	0x24000
#define BLANKET_VCPU_GDT	0x30000
#define BLANKET_VCPU_LDT	0x40000
#define BLANKET_VCPU_TRANS_GDT	0x50000
#define BLANKET_VCPU_TRACE	0x60000
#define BLANKET_VCPU_TRACE_SIZE	0x4000

#ifndef __ASSEMBLER__

#include <linux/ioctl.h>
#include <linux/types.h>

/* ---- the device ---- */

#define BLANKET_FEATURE_STABLE_TSC	(1ULL << 0)
#define BLANKET_FEATURE_LA57		(1ULL << 1)
#define BLANKET_FEATURE_XSAVE		(1ULL << 2)
#define BLANKET_FEATURE_CPUID_PROFILE	(1ULL << 3)
#define BLANKET_FEATURE_ISOLATES	(1ULL << 4)

#define BLANKET_CREATE_ISOLATE	(1U << 0)
#define BLANKET_CREATE_SHARE	(1U << 1)

struct blanket_info {
	__u32 api;
	__u32 max_vcpus;
	__u64 max_frames;
	__u8 build_id[32];
	__u64 features;
	__u64 tsc_khz;
	__u64 xcr0_mask;
};

#define BLANKET_BOOT_VERBOSE	(1ULL << 0)
#define BLANKET_BOOT_INJECT	(1ULL << 1)
#define BLANKET_BOOT_RESTORE	(1ULL << 2)

struct blanket_boot {
	__u64 ram_frames;
	__u64 shared_info;
	__u64 grant_base;
	__u64 grant_frames;
	__u64 cr3;
	__u64 rip;
	__u64 rsp;
	__u64 start_info;
	__u32 store_port;
	__u32 console_port;
	__u64 flags;
	__u64 hypercall_page;
	__u64 start_frames;
	__u64 state_base;
	__u64 state_frames;
	__u64 most_frames;
};

/* Words of features that a VM does not have although its host has them. */
#define BLANKET_HIDDEN_WORDS	16

struct blanket_create_vm {
	__u64 user_addr;
	__u64 nr_frames;
	__u64 pool_limit;
	__u32 nr_vcpus;
	__u32 flags;
	struct blanket_boot boot;
	__u64 xcr0_mask;
	__u32 cpuid_hidden[BLANKET_HIDDEN_WORDS];
};

struct blanket_run {
	__u32 exit;
	__u32 immediate_exit;
	__u64 args[4];
	__u32 data_len;
	__u32 pad;
	__u8 data[BLANKET_RUN_DATA];
};

struct blanket_vm_stats {
	__u64 exits[BLANKET_EXIT_REASONS];
	__u64 counters[BLANKET_COUNTERS];
	__u64 frames;
	__u64 pool;
	__u64 guest_ns;
	__u64 revocations;
	__u64 revoked;
};

struct blanket_audit {
	__u64 roots;
	__u64 loaded;
	__u64 tables;
	__u64 leaves;
	__u64 writable;
	__u64 own;
	__u64 entry_area;
	__u64 taken;
	__u64 frames;
	__u64 broken;
	__u32 rule;
	__u32 level;
	__u64 va;
	__u64 entry;
};

#define BLANKET_IOC		0xb7
#define BLANKET_GET_INFO	_IOR(BLANKET_IOC, 0, struct blanket_info)
#define BLANKET_CREATE_VM	_IOW(BLANKET_IOC, 1, struct blanket_create_vm)
#define BLANKET_CREATE_VCPU	_IO(BLANKET_IOC, 2)
#define BLANKET_RAISE		_IO(BLANKET_IOC, 3)
#define BLANKET_GET_STATS	_IOR(BLANKET_IOC, 4, struct blanket_vm_stats)
#define BLANKET_RUN		_IO(BLANKET_IOC, 5)
#define BLANKET_RAISE_VIRQ	_IO(BLANKET_IOC, 6)
#define BLANKET_TRACE		_IO(BLANKET_IOC, 7)
#define BLANKET_AUDIT		_IOR(BLANKET_IOC, 8, struct blanket_audit)
#define BLANKET_TARGET		_IO(BLANKET_IOC, 9)
#define BLANKET_RECLAIM		_IO(BLANKET_IOC, 10)
#define BLANKET_PAUSE		_IO(BLANKET_IOC, 11)

/* Argument of PAUSE, and blanket_vm_page.pause. */
#define BLANKET_PAUSE_NONE	0
#define BLANKET_PAUSE_VCPUS	1
#define BLANKET_PAUSE_VM	2
#define BLANKET_PAUSE_LOG	3
#define BLANKET_PAUSE_NO_LOG	4

/* ---- between the module and the core ---- */

#define BLANKET_RAISED_WORDS	64
#define BLANKET_PORT_VCPUS	2048
#define BLANKET_REVOKED_WORDS	64
#define BLANKET_TIME_STABLE	1

struct blanket_vm_page {
	struct blanket_boot boot;
	__u64 nr_frames;
	__u32 nr_vcpus;
	__u32 la57;
	__u64 pool_pages;
	__u32 time_version;
	__s8 tsc_shift;
	__u8 time_flags;
	__u16 pad;
	__u32 tsc_mul;
	__u32 quirks;
	__u64 tsc_timestamp;
	__u64 system_time;
	__u64 wall_sec;
	__u32 wall_nsec;
	__u32 xcr0_mask;
	__u64 tsc_khz;
	__u64 raised[BLANKET_RAISED_WORDS];
	__u64 raised_virqs;
	__u8 port_vcpu[BLANKET_PORT_VCPUS];
	__u64 pool_limit;
	__u64 hole[16];
	__u32 host;
	__u32 kvm_features;
	__u32 cpuid_entries;
	__u32 cpuid_faults;
	__u64 revocations;
	__u64 revoked[BLANKET_REVOKED_WORDS];
	__u64 core_cr3;
	__u32 trace;
	__u32 reclaim;
	__u64 target;
	__u64 pool_gone;
	__u32 pause;
	__u32 pad2;
	__u32 cpuid_hidden[BLANKET_HIDDEN_WORDS];
};

#define BLANKET_HOST_MODULE	0
#define BLANKET_HOST_KVM	1

/* What the host does wrong (blanket_vm_page.quirks); 0 under the module. */
#define BLANKET_QUIRK_INTERRUPTS_TWICE 1

/* Only inside KVM. */
struct blanket_cpuid_entry {
	__u32 leaf;
	__u32 subleaf;
	__u32 regs[4];
};

#define BLANKET_CPUID_ANY	0xffffffffU
#define BLANKET_CPUID_MAX	(4096 / sizeof(struct blanket_cpuid_entry))

struct blanket_dtr {
	__u16 pad[3];
	__u16 limit;
	__u64 base;
} __attribute__((aligned(16)));

struct blanket_switch {
	__u64 core_rsp;
	__u64 host_rsp;
	__u64 trans_cr3;
	__u64 host_cr3;
	__u64 host_cr4;
	__u64 core_cr4;
	__u64 host_fs_base;
	__u64 host_gs_base;
	__u64 host_kgs_base;
	__u16 host_tr;
	__u16 host_ldt;
	__u16 host_ds;
	__u16 host_es;
	__u16 host_fs;
	__u16 host_gs;
	__u16 host_ss;
	__u16 host_cs;
	struct blanket_dtr core_gdtr;
	struct blanket_dtr core_idtr;
	struct blanket_dtr trans_gdtr;
	struct blanket_dtr host_gdtr;
	struct blanket_dtr host_idtr;
	__u32 exit;
	__u32 pending;
	__u64 args[4];
	__s64 ret;
	__u64 deadline;
	__u64 armed;
	__u64 syscall_msrs[4];
	__u64 guest_xcr0;
	__u64 guest_tsc_aux;
	__u64 guest_dr7;
	__u32 vcpu_id;
	__u32 watch;
	__u64 exit_entry;
	__u64 host_self;
	__u64 pv_address;
	__u64 in_place[BLANKET_EXIT_REASONS];
	__u64 counters[BLANKET_COUNTERS];
	__u8 data[BLANKET_RUN_DATA];
} __attribute__((aligned(64)));

struct blanket_image_header {
	__u64 magic;
	__u32 api;
	__u32 switch_size;
	__u64 entry_start;
	__u64 entry_end;
	__u64 text_end;
	__u64 rodata_end;
	__u64 data_end;
	__u64 file_end;
	__u64 start;
	__u64 idt;
	__u64 stubs;
	__u64 smap;
	__u64 smap_end;
	__u64 isolate;
	__u64 isolate_end;
};

#define BLANKET_SMAP_CLAC	(1ULL << 63)

#endif /* __ASSEMBLER__ */
#endif /* BLANKET_H */
