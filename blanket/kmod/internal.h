/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* What the module's files share. Locks are described in docs/module-abi.md. */
#ifndef BLANKET_INTERNAL_H
#define BLANKET_INTERNAL_H

#include <linux/hrtimer.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/wait.h>
#include "blanket.h"

/* Page-table entry bits of the tables that we build. */
#define ENTRY_P		(1ULL << 0)
#define ENTRY_RW	(1ULL << 1)
#define ENTRY_US	(1ULL << 2)
#define ENTRY_A		(1ULL << 5)
#define ENTRY_D		(1ULL << 6)
#define ENTRY_NX	(1ULL << 63)
#define ENTRY_FRAME	0x000ffffffffff000ULL

/*
 * An absent entry of the window with this bit: the host has had the frame back. It
 * is brought in again only when it is needed itself, for it may be swapped out.
 */
#define ENTRY_TAKEN	(1ULL << 9)

#define MAP_RX		(ENTRY_P | ENTRY_A)
#define MAP_RO		(ENTRY_P | ENTRY_A | ENTRY_NX)
#define MAP_RW		(ENTRY_P | ENTRY_RW | ENTRY_A | ENTRY_D | ENTRY_NX)
#define MAP_USER_RO	(MAP_RO | ENTRY_US)

/* Slots of the hole that have tables. */
#define HOLE_SLOTS	4
#define SLOT_M2P	0
#define SLOT_CORE	1
#define SLOT_WINDOW	2
#define SLOT_POOL	3

#define IST_STACKS	4

/* What a page of vm->pages is for; kept in its private word, for the audit. */
enum blanket_page_class {
	CLASS_DATA,		/* as the allocator leaves the word */
	CLASS_TABLE,		/* of the hole */
	CLASS_POOL,
	CLASS_M2P,
	CLASS_ROOT,		/* of the core */
};

struct blanket_vm;
struct blanket_user;

/* Guest time, see time.c; all under the lock but next_refresh. */
struct blanket_clock {
	spinlock_t lock;
	u64 next_refresh;	/* TSC at which to refresh */
	u64 anchor_tsc;		/* start of the window that the rate is measured over */
	u64 anchor_ns;
	u64 last_ns;		/* time of the last refresh */
	u32 nominal_mul;
	u32 base_mul;		/* multiplier by measurement */
	s64 wall_ns;		/* published wall clock at system time 0 */
};

struct blanket_vcpu {
	struct blanket_vm *vm;
	unsigned int id;
	bool has_fd;			/* under vm->lock */
	struct mutex run_mutex;		/* held by the thread in RUN */
	struct blanket_switch *sw;	/* host's address of the switch block */
	struct blanket_run *run;	/* page shared with the VMM */
	void *xsave;			/* guest FPU state, standard format */
	u64 *root;			/* transition root: two pages, the first is used */
	u64 *root_p4d;			/* its level-4 table: == root without LA57 */
	u64 *reserved_gdt;		/* page 14 of both GDTs */
	u64 *trans_gdt;			/* page 0 of the transition GDT */
	struct hrtimer timer;
	wait_queue_head_t wait;
	int cpu;			/* CPU whose core world this vCPU is in, or -1 */
	int timer_cpu;			/* where the timer was last started */
	u64 guest_tsc;			/* TSC ticks in the core world */
	u64 exits[BLANKET_EXIT_REASONS];
	struct page *trace[BLANKET_VCPU_TRACE_SIZE / PAGE_SIZE];	/* under vm->lock */
};

struct blanket_vm {
	struct kref ref;
	u64 serial;			/* no other VM has had it, not 0 */
	struct mm_struct *mm;		/* compared only; holds an mm_count */
	u64 user_addr;
	u64 nr_frames;
	u64 pool_limit;
	u32 nr_vcpus;
	u32 xcr0_mask;			/* XCR0 bits that the guest may have */
	struct blanket_user *user;	/* whose VM it is */
	u64 charged;			/* pages that count as that user's */
	bool unlimited;			/* and that are not limited */
	bool watched;			/* holds a reference of the watchdog */
	bool dead;			/* a vCPU crashed: nothing runs any more */
	struct mutex lock;		/* tables, pool, fds */
	struct list_head pages;		/* every single page that the VM owns */
	u64 *l3[HOLE_SLOTS];
	u64 hole[16];		/* level-4 entries of the hole */
	bool isolated;
	u64 core_root;		/* physical; 0 if the core runs on the guest's roots */
	u64 *entry_l3;		/* the part of slot 257 that isolated guests' roots hold */
	struct blanket_vm_page *page;
	atomic64_t frames;		/* guest frames in the window */
	/* What follows is frames.c's. */
	struct mmu_interval_notifier notifier;
	bool follows;			/* the notifier is in place */
	spinlock_t frames_lock;		/* the window's leaf entries, what they imply */
	atomic_t gate;			/* not 0: no vCPU enters the core world */
	wait_queue_head_t gate_open;
	atomic64_t revocations;		/* times that the gate was shut */
	u64 revoked;			/* frames taken back; under frames_lock */
	struct blanket_clock clock;
	struct blanket_vcpu *vcpus[BLANKET_MAX_VCPUS];
};

/* The host, found out once when the module is loaded (main.c). */
struct blanket_host {
	bool la57;
	bool xsave;
	bool tsc_aux;
	u32 cpuid_msr;		/* where CPUID at CPL 3 can be made to fault, or 0 */
	u64 cpuid_bit;
	u32 xcr0_mask;		/* XCR0 bits that guests may use */
	u32 xsave_size;
	u8 build_id[32];
};
extern struct blanket_host blanket_host;

/* image.S */
extern const u8 blanket_image[], blanket_image_end[];

/* main.c */
extern const struct blanket_image_header *blanket_header;
extern struct page **blanket_shared_pages;	/* text and read-only data */
void blanket_vm_put(struct blanket_vm *vm);

/* vm.c */
struct blanket_vm *blanket_vm_create(const struct blanket_create_vm *args);
void blanket_vm_destroy(struct blanket_vm *vm);

/* memory.c */
int blanket_tables_init(struct blanket_vm *vm);
void blanket_tables_free(struct blanket_vm *vm);
struct page *blanket_page(struct blanket_vm *vm, gfp_t extra);
int blanket_map(struct blanket_vm *vm, u64 va, struct page *page, u64 flags);
int blanket_map_new(struct blanket_vm *vm, u64 va, u64 size, u64 flags);
u64 *blanket_leaf(struct blanket_vm *vm, u64 va, gfp_t extra);
u64 *blanket_entry(struct blanket_vm *vm, u64 va);
long blanket_pool_grow(struct blanket_vm *vm, u64 pages);
void blanket_pool_trim(struct blanket_vcpu *vcpu, u64 count);
long blanket_pool_fill(struct blanket_vcpu *vcpu, u64 count);
int blanket_trace_init(struct blanket_vcpu *vcpu);

/* frames.c */
int blanket_window_init(struct blanket_vm *vm);
int blanket_frames_follow(struct blanket_vm *vm);
void blanket_frames_forget(struct blanket_vm *vm);
long blanket_frame(struct blanket_vm *vm, u64 gfn);
void blanket_frames_out(struct blanket_vm *vm, const u32 *gfns, unsigned int count);

/* isolate.c */
bool blanket_cpu_leaks(void);
int blanket_isolate_init(void);
void blanket_isolate_exit(void);
struct page *blanket_shared_page(const struct blanket_vm *vm, u64 off);
int blanket_isolate(struct blanket_vm *vm);
int blanket_show_area(struct blanket_vm *vm, u64 area);

/* audit.c */
long blanket_audit_vm(struct blanket_vm *vm, struct blanket_audit *out);

/* run.c */
long blanket_vcpu_run(struct blanket_vcpu *vcpu);
void blanket_kick(struct blanket_vcpu *vcpu, u32 pending);
void blanket_wait_out(struct blanket_vm *vm, u64 mask, const struct blanket_vcpu *self);
enum hrtimer_restart blanket_timer_fn(struct hrtimer *timer);

/* user.c */
int blanket_user_get(struct blanket_vm *vm);
bool blanket_charge(struct blanket_vm *vm, u64 pages);
void blanket_uncharge(struct blanket_vm *vm, u64 pages);
void blanket_user_put(struct blanket_vm *vm);

/* watch.c */
struct blanket_visit {
	u64 count;			/* odd while this CPU is in the core world */
	struct blanket_switch *sw;	/* of the vCPU that is there */
};
DECLARE_PER_CPU(struct blanket_visit, blanket_visit);
int blanket_watch_init(void);
void blanket_watch_exit(void);
int blanket_watch_get(void);
void blanket_watch_put(void);

/* time.c */
void blanket_clock_init(struct blanket_vm *vm);
void blanket_clock_refresh(struct blanket_vm *vm);

/* speculation.c */
void blanket_speculation_init(void);
void blanket_speculation_enter(const struct blanket_vm *vm);
void blanket_speculation_to_user(void);

/* switch.S */
asmlinkage void blanket_world_switch(struct blanket_switch *sw);
asmlinkage void blanket_interrupt(unsigned int vector);
extern const u8 blanket_world_exit[];

#endif
