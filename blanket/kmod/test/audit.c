// SPDX-License-Identifier: GPL-2.0 OR MIT
/* The module's audit, in a program: it finds each thing that is wrong. */
#include <stdio.h>
#include "../audit.c"

#define FRAMES	16
#define POOL	10
#define AREA	BLANKET_VCPU

struct page pages[PAGES];
u8 memory[PAGES][4096];
static struct mm_struct mm;
static struct task task = { &mm };
struct task *current = &task;
struct blanket_host blanket_host;
struct page **blanket_shared_pages;
/* Text, entry section, text; read-only data; data, IDT. */
static const struct blanket_image_header header = {
	.entry_start = 0x1000, .entry_end = 0x2000, .text_end = 0x3000,
	.rodata_end = 0x4000, .data_end = 0x6000, .idt = 0x5000,
};
const struct blanket_image_header *blanket_header = &header;

static unsigned int used;
static struct blanket_vm vm;
static struct blanket_vcpu vcpu;
static struct page *owners[FRAMES], *pool[POOL], *shared[4];
static u64 *host_root;
static int failures;

u64 __native_read_cr3(void) { return virt_to_phys(host_root); }

struct page *blanket_shared_page(const struct blanket_vm *of, u64 off)
{
	(void)of;
	return shared[off >> PAGE_SHIFT];
}

int get_user_pages_fast(unsigned long at, int nr, unsigned int flags, struct page **page)
{
	u64 gfn = (at - vm.user_addr) / PAGE_SIZE;

	(void)nr, (void)flags;
	if (gfn >= FRAMES || !owners[gfn])
		return -EFAULT;
	*page = owners[gfn];
	(*page)->references++;
	return 1;
}

static struct page *page(void)
{
	if (used == PAGES)
		abort();
	return &pages[used++];
}

/* A page of the VM's own. */
static struct page *own(enum blanket_page_class class)
{
	struct page *p = page();

	p->private = class;
	p->lru.next = vm.pages.next;
	vm.pages.next = &p->lru;
	return p;
}

u64 *blanket_entry(struct blanket_vm *of, u64 va)
{
	u64 *table = of->l3[(va >> 39 & 511) - BLANKET_HOLE_FIRST_SLOT];
	u32 level;

	for (level = 3; level > 1; level--) {
		u64 entry = table[va >> (12 + 9 * (level - 1)) & 511];

		if (!(entry & ENTRY_P))
			return NULL;
		table = __va(entry & ENTRY_FRAME);
	}
	return &table[va >> 12 & 511];
}

static u64 *leaf(u64 *table, u64 va, u64 user)
{
	u32 level;

	for (level = 3; level > 1; level--) {
		u64 *entry = &table[va >> (12 + 9 * (level - 1)) & 511];

		if (!(*entry & ENTRY_P))
			*entry = page_to_phys(own(CLASS_TABLE)) | ENTRY_P | ENTRY_RW | ENTRY_A |
				 ENTRY_D | user;
		table = __va(*entry & ENTRY_FRAME);
	}
	return &table[va >> 12 & 511];
}

static void map(u64 va, struct page *p, u64 flags)
{
	unsigned int slot = (va >> 39 & 511) - BLANKET_HOLE_FIRST_SLOT;

	*leaf(vm.l3[slot], va, slot == SLOT_M2P ? ENTRY_US : 0) = page_to_phys(p) | flags;
}

static u64 *pool_table(int n) { return page_address(pool[n]); }

#define LINK	(ENTRY_P | ENTRY_RW | ENTRY_US | ENTRY_A)

/* A VM whose core has made a kernel root (1), a user root (2) and tables (3 to 5). */
static void build(bool la57, bool isolated)
{
	struct page *p, *records;
	u64 i, *words;
	int n;

	memset(pages, 0, sizeof(pages));
	memset(memory, 0, sizeof(memory));
	memset(&vm, 0, sizeof(vm));
	memset(&vcpu, 0, sizeof(vcpu));
	used = 0;
	blanket_host.la57 = la57;
	blanket_shared_pages = shared;
	vm.pages.next = &vm.pages;
	vm.mm = &mm;
	vm.user_addr = 0x7f0000000000;
	vm.nr_frames = FRAMES;
	vm.pool_limit = POOL;
	vm.nr_vcpus = 1;
	vm.vcpus[0] = &vcpu;
	vm.isolated = isolated;
	host_root = page_address(page());
	vcpu.root = vcpu.root_p4d = page_address(page());
	vcpu.sw = page_address(page());
	page();
	for (n = 0; n < HOLE_SLOTS; n++) {
		vm.l3[n] = page_address(own(CLASS_TABLE));
		if (n == SLOT_WINDOW || n == SLOT_POOL)
			vm.l3[n][511] = virt_to_phys(vm.l3[n]) | MAP_RO | ENTRY_D;
	}
	p = own(CLASS_M2P);
	words = page_address(p);
	for (i = 0; i < 512; i++)
		words[i] = i;
	map(BLANKET_M2P, p, MAP_USER_RO);
	for (n = 0; n < 6; n++) {
		if (n < 4)
			shared[n] = page();
		map(BLANKET_IMAGE + n * PAGE_SIZE, n < 4 ? shared[n] : own(CLASS_DATA),
		    n < 3 ? MAP_RX : n < 4 ? MAP_RO : MAP_RW);
	}
	p = own(CLASS_DATA);
	vm.page = page_address(p);
	map(BLANKET_VM_PAGE, p, MAP_RW);
	records = own(CLASS_DATA);
	map(BLANKET_POOL_INFO, records, MAP_RW);
	map(AREA + BLANKET_VCPU_ENTRY, shared[1], MAP_RX);
	map(AREA + BLANKET_VCPU_HW - PAGE_SIZE, own(CLASS_DATA), MAP_RW);
	map(AREA + BLANKET_VCPU_HW, virt_to_page(vcpu.sw), MAP_RW);
	map(AREA + BLANKET_VCPU_HW + PAGE_SIZE, virt_to_page((void *)vcpu.sw + PAGE_SIZE), MAP_RW);
	for (i = 0; i < FRAMES; i++) {
		owners[i] = i == 9 ? NULL : page();
		if (owners[i])
			map(BLANKET_WINDOW + i * PAGE_SIZE, owners[i], MAP_RW);
	}
	map(BLANKET_REVOKED, own(CLASS_DATA), MAP_RW);
	for (n = 0; n < POOL / 2; n++)
		map(BLANKET_POOL_GFNS + n * PAGE_SIZE, own(CLASS_DATA), MAP_RW);
	vm.page->pool_pages = POOL;
	for (n = 0; n < POOL; n++) {
		pool[n] = own(CLASS_POOL);
		map(BLANKET_POOL + n * PAGE_SIZE, pool[n], MAP_RW);
	}
	if (isolated) {
		u64 *from = leaf(vm.l3[SLOT_CORE], BLANKET_IMAGE + header.idt, 0), *root;

		vm.entry_l3 = page_address(own(CLASS_TABLE));
		*leaf(vm.entry_l3, BLANKET_IMAGE + header.idt, 0) = *from & ~(ENTRY_RW | ENTRY_D);
		*leaf(vm.entry_l3, AREA + BLANKET_VCPU_ENTRY, 0) =
			*leaf(vm.l3[SLOT_CORE], AREA + BLANKET_VCPU_ENTRY, 0);
		root = page_address(own(CLASS_ROOT));
		for (n = 0; n < HOLE_SLOTS; n++)
			root[256 + n] = hole_entry(&vm, n);
		vm.core_root = virt_to_phys(root);
	}
	for (n = 0; n < 16; n++) {
		vcpu.root[256 + n] = hole_entry(&vm, n);
		pool_table(1)[256 + n] = guest_hole_entry(&vm, n);
		pool_table(2)[256 + n] = n == SLOT_M2P ? 0 : guest_hole_entry(&vm, n);
	}
	host_root[300] = vcpu.root[300] = 0x123000 | ENTRY_P;
	for (n = 1; n <= 2; n++) {
		u8 *record = (u8 *)page_address(records) + n * BLANKET_POOL_INFO_SIZE;

		record[BLANKET_POOL_INFO_STATE] = BLANKET_POOL_SHADOW;
		record[BLANKET_POOL_INFO_LEVEL] = 3 + n;
		pool_table(n)[1] = page_to_phys(pool[3]) | LINK;
	}
	pool_table(3)[2] = page_to_phys(pool[4]) | LINK;
	pool_table(4)[2] = page_to_phys(pool[5]) | LINK;
	pool_table(5)[3] = page_to_phys(owners[7]) | LINK | ENTRY_D | ENTRY_NX;
	/* What the leaves map, as the core notes it: two lists in a page. */
	((u32 *)__va(*blanket_entry(&vm, BLANKET_POOL_GFNS + 2 * PAGE_SIZE) & ENTRY_FRAME))[512 + 3] = 7;
	pool_table(5)[4] = page_to_phys(owners[8]) | ENTRY_P | ENTRY_US | ENTRY_A;
	words = (void *)vcpu.sw + PAGE_SIZE;
	words[(BLANKET_VCPU_KERNEL_CR3 & ~PAGE_MASK) / 8] = page_to_phys(pool[1]);
	words[(BLANKET_VCPU_USER_CR3 & ~PAGE_MASK) / 8] = page_to_phys(pool[2]);
	if (la57) {
		vcpu.root = page_address(page());
		vcpu.root[511] = virt_to_phys(vcpu.root_p4d) | ENTRY_P;
		words = page_address(page());
		words[511] = virt_to_phys(host_root) | ENTRY_P;
		vcpu.root[511] = words[511];
		host_root = words;
		pool_table(6)[0] = pool_table(6)[511] = page_to_phys(pool[1]) | LINK;
		words = (void *)vcpu.sw + PAGE_SIZE;
		words[(BLANKET_VCPU_KERNEL_CR3 & ~PAGE_MASK) / 8] = page_to_phys(pool[6]);
		words[(BLANKET_VCPU_USER_CR3 & ~PAGE_MASK) / 8] = 0;
	}
}

static struct blanket_audit audit(void)
{
	struct blanket_audit out = {};
	long ret = blanket_audit_vm(&vm, &out);
	unsigned int i;

	if (ret)
		printf("FAIL: the audit ends with %ld\n", ret), failures++;
	for (i = 0; i < PAGES; i++)
		if (pages[i].references)
			printf("FAIL: a reference is left\n"), failures++;
	if (vcpu.run_mutex.locked || vm.lock.locked)
		printf("FAIL: a lock is held\n"), failures++;
	return out;
}

static void expect(int line, u32 rule)
{
	struct blanket_audit a = audit();

	if (a.rule != rule || !a.broken != !rule) {
		printf("FAIL line %d: rule %u instead of %u (%llu broken, at %#llx level %u)\n", line,
		       a.rule, rule, a.broken, a.va, a.level);
		failures++;
	}
}

/* Breaks one thing in a new VM, and wants to hear of it. */
#define BREAKS(rule, wreck) do { build(false, false); wreck; expect(__LINE__, rule); } while (0)
#define ISOLATED(rule, wreck) do { build(false, true); wreck; expect(__LINE__, rule); } while (0)
#define OWN(va)		(*leaf(vm.l3[((va) >> 39 & 511) - 256], va, 0))

int main(void)
{
	struct blanket_audit a;
	struct mm_struct other;

	build(false, false);
	a = audit();
	if (a.broken || a.roots != 2 || a.loaded != 2 || a.tables != 5 || a.leaves != 2 ||
	    a.writable != 1 || a.frames != FRAMES - 1 || a.entry_area)
		printf("FAIL: a good VM: rule %u, %llu roots, %llu tables, %llu leaves, %llu frames\n",
		       a.rule, a.roots, a.tables, a.leaves, a.frames), failures++;
	build(true, false);
	expect(__LINE__, 0);
	build(false, true);
	a = audit();
	if (a.broken || a.entry_area != 2)
		printf("FAIL: a good isolated VM: rule %u at %#llx\n", a.rule, a.va), failures++;

	/* The host has taken frame 7 back: its leaf is noted. */
	build(false, false);
	owners[7] = NULL;
	OWN(BLANKET_WINDOW + 7 * PAGE_SIZE) = ENTRY_TAKEN;
	*(u8 *)__va(OWN(BLANKET_REVOKED) & ENTRY_FRAME) = 1 << 7;
	a = audit();
	if (a.broken || a.taken != 1 || a.leaves != 1)
		printf("FAIL: a frame that is taken: rule %u, %llu taken\n", a.rule, a.taken), failures++;
	/* Another one is noted. */
	*(u8 *)__va(OWN(BLANKET_REVOKED) & ENTRY_FRAME) = 1 << 6;
	expect(__LINE__, BLANKET_AUDIT_FOREIGN);
	/* Marks belong into the window, and have no frame. */
	BREAKS(BLANKET_AUDIT_ABSENT, OWN(BLANKET_VM_PAGE) = ENTRY_TAKEN);
	BREAKS(BLANKET_AUDIT_ABSENT, OWN(BLANKET_WINDOW) = ENTRY_TAKEN | 0x5000);

	/* The host's memory, the VM's own pages, a frame that the owner has no more. */
	BREAKS(BLANKET_AUDIT_FOREIGN, pool_table(5)[3] = 0x123000 | LINK);
	BREAKS(BLANKET_AUDIT_FOREIGN, pool_table(5)[3] = page_to_phys(pool[0]) | LINK);
	BREAKS(BLANKET_AUDIT_FOREIGN, pool_table(5)[3] = virt_to_phys(vcpu.sw) | LINK);
	BREAKS(BLANKET_AUDIT_FOREIGN,
	       (owners[7] = NULL, OWN(BLANKET_WINDOW + 7 * PAGE_SIZE) = 0));
	BREAKS(BLANKET_AUDIT_WINDOW, owners[6] = NULL);
	BREAKS(BLANKET_AUDIT_WINDOW, owners[6] = page());
	BREAKS(BLANKET_AUDIT_WINDOW, OWN(BLANKET_WINDOW + 5 * PAGE_SIZE) =
	       page_to_phys(owners[6]) | MAP_RW);
	BREAKS(BLANKET_AUDIT_ABSENT, pool_table(5)[3] &= ~ENTRY_P);
	BREAKS(BLANKET_AUDIT_ABSENT, pool_table(4)[2] &= ~ENTRY_P);
	BREAKS(BLANKET_AUDIT_ABSENT, OWN(BLANKET_VM_PAGE) &= ~ENTRY_P);
	BREAKS(BLANKET_AUDIT_BITS, pool_table(5)[3] |= 1 << 8);
	BREAKS(BLANKET_AUDIT_BITS, pool_table(5)[3] |= 1ULL << 52);
	BREAKS(BLANKET_AUDIT_BITS, pool_table(4)[2] |= 1 << 7);
	BREAKS(BLANKET_AUDIT_RIGHTS, pool_table(5)[3] &= ~ENTRY_US);
	BREAKS(BLANKET_AUDIT_TABLE, pool_table(4)[2] = page_to_phys(owners[7]) | LINK);
	BREAKS(BLANKET_AUDIT_TABLE, vm.l3[SLOT_CORE][5] = page_to_phys(pool[7]) | ENTRY_P |
	       ENTRY_RW | ENTRY_A | ENTRY_D);
	BREAKS(BLANKET_AUDIT_TABLE, vm.l3[SLOT_POOL][5] = vm.l3[SLOT_WINDOW][0]);
	BREAKS(BLANKET_AUDIT_HOLE, pool_table(1)[258] = 0);
	BREAKS(BLANKET_AUDIT_HOLE, pool_table(1)[271] = hole_entry(&vm, SLOT_CORE));
	BREAKS(BLANKET_AUDIT_HOLE, pool_table(2)[256] = hole_entry(&vm, SLOT_M2P));
	BREAKS(BLANKET_AUDIT_RIGHTS, OWN(BLANKET_VM_PAGE) |= ENTRY_US);
	BREAKS(BLANKET_AUDIT_RIGHTS, OWN(BLANKET_VM_PAGE) &= ~ENTRY_NX);
	BREAKS(BLANKET_AUDIT_RIGHTS, OWN(BLANKET_IMAGE) |= ENTRY_RW);
	BREAKS(BLANKET_AUDIT_RIGHTS, OWN(BLANKET_M2P) |= ENTRY_RW);
	BREAKS(BLANKET_AUDIT_OWN, OWN(BLANKET_VM_PAGE) = page_to_phys(own(CLASS_TABLE)) | MAP_RW);
	BREAKS(BLANKET_AUDIT_OWN, OWN(BLANKET_VM_PAGE) = page_to_phys(page()) | MAP_RW);
	BREAKS(BLANKET_AUDIT_OWN, OWN(BLANKET_POOL) = page_to_phys(owners[1]) | MAP_RW);
	BREAKS(BLANKET_AUDIT_OWN, vm.l3[SLOT_POOL][511] |= ENTRY_RW);
	BREAKS(BLANKET_AUDIT_M2P, ((u64 *)__va(OWN(BLANKET_M2P) & ENTRY_FRAME))[10] = 11);
	BREAKS(BLANKET_AUDIT_ROOT, ((u64 *)((u8 *)vcpu.sw - BLANKET_VCPU_HW +
	       BLANKET_VCPU_USER_CR3))[0] = page_to_phys(pool[3]));
	BREAKS(BLANKET_AUDIT_TRANSITION, vcpu.root[1] = pool_table(1)[1]);
	BREAKS(BLANKET_AUDIT_TRANSITION, vcpu.root[301] = 0x456000 | ENTRY_P);

	ISOLATED(BLANKET_AUDIT_HOLE, pool_table(1)[257] = hole_entry(&vm, SLOT_CORE));
	ISOLATED(BLANKET_AUDIT_HOLE, pool_table(1)[258] = hole_entry(&vm, SLOT_WINDOW));
	ISOLATED(BLANKET_AUDIT_OWN, *leaf(vm.entry_l3, AREA + BLANKET_VCPU_HW, 0) =
		 OWN(AREA + BLANKET_VCPU_HW));
	ISOLATED(BLANKET_AUDIT_OWN, *leaf(vm.entry_l3, BLANKET_VM_PAGE, 0) = OWN(BLANKET_VM_PAGE));
	ISOLATED(BLANKET_AUDIT_OWN, *leaf(vm.entry_l3, AREA + BLANKET_VCPU_HW - PAGE_SIZE, 0) =
		 page_to_phys(owners[7]) | MAP_RW);
	ISOLATED(BLANKET_AUDIT_RIGHTS, *leaf(vm.entry_l3, AREA + BLANKET_VCPU_ENTRY, 0) |= ENTRY_US);
	ISOLATED(BLANKET_AUDIT_RIGHTS, *leaf(vm.entry_l3, AREA + BLANKET_VCPU_ENTRY, 0) |= ENTRY_RW);
	ISOLATED(BLANKET_AUDIT_TRANSITION, ((u64 *)__va(vm.core_root))[1] = pool_table(1)[1]);

	build(false, false);
	vcpu.run_mutex.locked = true;
	if (blanket_audit_vm(&vm, &a) != -EBUSY)
		printf("FAIL: a VM that runs is walked\n"), failures++;
	vcpu.run_mutex.locked = false;
	task.mm = &other;
	if (blanket_audit_vm(&vm, &a) != -EPERM)
		printf("FAIL: another process's VM is walked\n"), failures++;

	printf(failures ? "%d FAILURES\n" : "each rule was broken, and found\n", failures);
	return failures != 0;
}
