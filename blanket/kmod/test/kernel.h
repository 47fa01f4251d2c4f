/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * As much of the kernel as audit.c needs, for a program: memory is an array of
 * pages, an xarray is an array. Headers of the kernel's are empty files.
 */
#ifndef BLANKET_TEST_KERNEL_H
#define BLANKET_TEST_KERNEL_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long s64;

#define PAGE_SHIFT	12
#define PAGE_SIZE	4096UL
#define PAGE_MASK	(~(PAGE_SIZE - 1))
#define READ_ONCE(x)	(*(volatile __typeof__(x) *)&(x))
#define min(a, b)	((a) < (b) ? (a) : (b))
#define asmlinkage
#define DECLARE_PER_CPU(type, name)	extern type name

struct list_head { struct list_head *next, *prev; };
#define list_for_each_entry(at, head, member)					\
	for (at = (void *)((u8 *)(head)->next - offsetof(__typeof__(*at), member));	\
	     &at->member != (head);						\
	     at = (void *)((u8 *)at->member.next - offsetof(__typeof__(*at), member)))

struct page {
	struct list_head lru;
	unsigned long private;
	int references;
};

/* Physical memory: PAGES pages, the first of which is at frame FIRST. */
#define PAGES	512
#define FIRST	0x1000UL
extern struct page pages[PAGES];
extern u8 memory[PAGES][4096];

static inline unsigned long page_to_pfn(const struct page *page) { return page - pages + FIRST; }
static inline u64 page_to_phys(const struct page *page) { return page_to_pfn(page) << PAGE_SHIFT; }
static inline void *page_address(const struct page *page) { return memory[page - pages]; }
static inline unsigned long page_private(const struct page *page) { return page->private; }
static inline void put_page(struct page *page) { page->references--; }
static inline u64 virt_to_phys(const void *at)
{
	return (FIRST << PAGE_SHIFT) + ((u8 *)at - memory[0]);
}
static inline struct page *virt_to_page(const void *at)
{
	return &pages[((u8 *)at - memory[0]) / PAGE_SIZE];
}
static inline void *__va(u64 phys)
{
	/* A stray address ends the test, as it would end the kernel. */
	if (phys >> PAGE_SHIFT < FIRST || phys >> PAGE_SHIFT >= FIRST + PAGES)
		abort();
	return memory[0] + (phys - (FIRST << PAGE_SHIFT));
}

struct xarray { void *slots[PAGES]; };
#define XA_FLAGS_ACCOUNT	0
#define xa_init_flags(xa, flags)	memset(xa, 0, sizeof(*(xa)))
#define xa_destroy(xa)		((void)(xa))
#define xa_err(entry)		((entry) == (void *)-1 ? -ENOMEM : 0)
static inline void *xa_mk_value(unsigned long value) { return (void *)(value << 1 | 1); }
static inline unsigned long xa_to_value(const void *entry) { return (unsigned long)entry >> 1; }
static inline void *xa_load(struct xarray *xa, unsigned long at)
{
	return at < FIRST || at >= FIRST + PAGES ? NULL : xa->slots[at - FIRST];
}
static inline void *xa_store(struct xarray *xa, unsigned long at, void *entry, int flags)
{
	(void)flags;
	if (at < FIRST || at >= FIRST + PAGES)
		return (void *)-1;
	xa->slots[at - FIRST] = entry;
	return NULL;
}

struct mutex { bool locked; };
static inline bool mutex_trylock(struct mutex *m)
{
	bool had = m->locked;

	m->locked = true;
	return !had;
}
#define mutex_lock(m)		((void)mutex_trylock(m))
#define mutex_unlock(m)		((void)((m)->locked = false))

struct mm_struct { int unused; };
struct task { struct mm_struct *mm; };
extern struct task *current;
#define fatal_signal_pending(task)	((void)(task), false)
#define cond_resched()			((void)0)

#define GFP_KERNEL_ACCOUNT	0
#define FOLL_WRITE		1
#define kvcalloc(n, size, flags)	calloc(n, size)
#define kvfree(at)		free(at)
int get_user_pages_fast(unsigned long at, int nr, unsigned int flags, struct page **page);

#define CR3_ADDR_MASK		0x000ffffffffff000ULL
u64 __native_read_cr3(void);

/* What internal.h has and audit.c does not use. */
typedef struct { long counter; } atomic64_t;
typedef int spinlock_t, wait_queue_head_t;
typedef unsigned int gfp_t;
typedef struct { int counter; } atomic_t;
struct mmu_interval_notifier { int unused; };
struct kref { int count; };
struct hrtimer { int unused; };
enum hrtimer_restart { HRTIMER_NORESTART };

#endif
