// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * What one user may take: VMs, and kernel memory for their tables and shadows. The
 * memory is charged to the memory cgroup as well, but not every user has a limit there,
 * and the OOM killer does not see it. CAP_SYS_RESOURCE is exempt.
 */
#include <linux/capability.h>
#include <linux/cred.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/uidgid.h>
#include "internal.h"

static unsigned int max_vms = 256;
module_param(max_vms, uint, 0644);
MODULE_PARM_DESC(max_vms, "VMs that one user may have");

static unsigned long max_pages;
module_param(max_pages, ulong, 0644);
MODULE_PARM_DESC(max_pages, "pages of kernel memory that one user's VMs may take (0: a quarter of all)");

struct blanket_user {
	struct list_head list;
	kuid_t uid;
	unsigned int vms;	/* under the lock */
	atomic64_t pages;
};

static LIST_HEAD(users);
static DEFINE_MUTEX(lock);

static struct blanket_user *find(kuid_t uid)
{
	struct blanket_user *user;

	list_for_each_entry(user, &users, list)
		if (uid_eq(user->uid, uid))
			return user;
	user = kzalloc(sizeof(*user), GFP_KERNEL_ACCOUNT);
	if (user) {
		user->uid = uid;
		list_add(&user->list, &users);
	}
	return user;
}

static void forget(struct blanket_user *user)
{
	if (user->vms)
		return;
	list_del(&user->list);
	kfree(user);
}

/* The VM becomes one of its creator's. */
int blanket_user_get(struct blanket_vm *vm)
{
	struct blanket_user *user;
	int err = 0;

	vm->unlimited = capable(CAP_SYS_RESOURCE);
	mutex_lock(&lock);
	user = find(current_uid());
	if (!user) {
		err = -ENOMEM;
	} else if (!vm->unlimited && user->vms >= READ_ONCE(max_vms)) {
		err = -EDQUOT;
		forget(user);
	} else {
		user->vms++;
		vm->user = user;
	}
	mutex_unlock(&lock);
	return err;
}

/* Under vm->lock, or while the VM is made. */
bool blanket_charge(struct blanket_vm *vm, u64 pages)
{
	u64 limit = READ_ONCE(max_pages) ?: totalram_pages() / 4;
	u64 now = atomic64_add_return(pages, &vm->user->pages);

	if (!vm->unlimited && now > limit) {
		atomic64_sub(pages, &vm->user->pages);
		return false;
	}
	vm->charged += pages;
	return true;
}

void blanket_uncharge(struct blanket_vm *vm, u64 pages)
{
	atomic64_sub(pages, &vm->user->pages);
	vm->charged -= pages;
}

void blanket_user_put(struct blanket_vm *vm)
{
	if (!vm->user)
		return;
	blanket_uncharge(vm, vm->charged);
	mutex_lock(&lock);
	vm->user->vms--;
	forget(vm->user);
	mutex_unlock(&lock);
}
