// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Drives the test core (core.S) through every ioctl and exit; exits 0 if all held. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "../blanket.h"

#define FRAMES 4096
#define USER_GFN 5

static int failures;
#define CHECK(cond) do { if (!(cond)) { failures++; \
	printf("FAIL line %d: %s (errno %d)\n", __LINE__, #cond, errno); } } while (0)
#define FAILS_WITH(call, err) do { errno = 0; CHECK((call) == -1 && errno == (err)); } while (0)

static int dev;

struct vm {
	int fd;
	int vcpus[4];
	struct blanket_run *run[4];
	uint8_t *mem;
	int n;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static struct vm make(int n, uint64_t mode, uint64_t count)
{
	struct vm vm = { .n = n };
	struct blanket_create_vm c = {
		.nr_frames = FRAMES, .nr_vcpus = n,
		.boot = { .flags = mode, .rip = count },
	};
	int mfd = memfd_create("ram", 0);

	CHECK(ftruncate(mfd, FRAMES * 4096) == 0);
	vm.mem = mmap(NULL, FRAMES * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, mfd, 0);
	close(mfd);
	c.user_addr = (uintptr_t)vm.mem;
	vm.fd = ioctl(dev, BLANKET_CREATE_VM, &c);
	CHECK(vm.fd >= 0);
	if (vm.fd < 0)
		exit(1);
	for (int i = 0; i < n; i++) {
		vm.vcpus[i] = ioctl(vm.fd, BLANKET_CREATE_VCPU, i);
		CHECK(vm.vcpus[i] >= 0);
		vm.run[i] = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, vm.vcpus[i], 0);
		CHECK(vm.run[i] != MAP_FAILED);
	}
	return vm;
}

static void drop(struct vm *vm)
{
	for (int i = 0; i < vm->n; i++) {
		munmap(vm->run[i], 4096);
		close(vm->vcpus[i]);
	}
	close(vm->fd);
	munmap(vm->mem, FRAMES * 4096);
}

/* RUN ends with EINTR also when the kernel has work for this thread: again, then. */
static int run_vcpu(int vcpu)
{
	int ret;

	do
		ret = ioctl(vcpu, BLANKET_RUN, 0);
	while (ret == -1 && errno == EINTR);
	return ret;
}

static void *other(void *arg)
{
	struct { struct vm *vm; int i; } *a = arg;

	/* RUN until SHUTDOWN; its counts are in the run page. */
	CHECK(run_vcpu(a->vm->vcpus[a->i]) == 0);
	CHECK(a->vm->run[a->i]->exit == BLANKET_EXIT_SHUTDOWN);
	return NULL;
}

static void everything(int n, uint64_t kicks)
{
	struct vm vm = make(n, 0, kicks);
	struct { struct vm *vm; int i; } args[4];
	struct blanket_vm_stats st;
	pthread_t t[4];
	uint64_t t0;

	for (int i = 1; i < n; i++) {
		args[i].vm = &vm;
		args[i].i = i;
		pthread_create(&t[i], NULL, other, &args[i]);
	}
	CHECK(run_vcpu(vm.vcpus[0]) == 0);
	CHECK(vm.run[0]->exit == BLANKET_EXIT_CONSOLE);
	CHECK(vm.run[0]->data_len == 26 && !memcmp(vm.run[0]->data, "hello from the core world\n", 26));
	t0 = now();
	CHECK(run_vcpu(vm.vcpus[0]) == 0);
	t0 = now() - t0;
	CHECK(vm.run[0]->exit == BLANKET_EXIT_SHUTDOWN);
	printf("vcpu0: exit %u, %llu interrupts, %llu NMIs at CPL 3, %llu in ring 0, %llu ms\n",
	       vm.run[0]->exit, vm.run[0]->args[1], vm.run[0]->args[2], vm.run[0]->args[3],
	       (unsigned long long)t0 / 1000000);
	if (vm.run[0]->exit == BLANKET_EXIT_CRASH)
		printf("crash: vector %llu at %#llx\n", vm.run[0]->args[1], vm.run[0]->args[2]);
	/* The deadline of the sleep is 300 ms after the last time refresh. */
	CHECK(t0 > 150000000);
	CHECK(ioctl(vm.fd, BLANKET_RAISE, 0) == 0);
	for (int i = 1; i < n; i++) {
		/* Ports 0 went to vCPU 0; the others see it at their next interrupt. */
		pthread_join(t[i], NULL);
		printf("vcpu%d: %llu interrupts\n", i, vm.run[i]->args[1]);
	}
	CHECK(ioctl(vm.fd, BLANKET_GET_STATS, &st) == 0);
	CHECK(st.exits[BLANKET_EXIT_KICK] == kicks);
	CHECK(st.exits[BLANKET_EXIT_FLUSH] == 1000);
	CHECK(st.exits[BLANKET_EXIT_IDLE] == 1);
	CHECK(st.frames >= 1 && st.frames <= 16);
	CHECK(st.pool >= 256 && st.guest_ns > 0);
	uint64_t *page = (void *)(vm.mem + USER_GFN * 4096);
	CHECK(page[500] == 0x1234567);
	CHECK(page[0x900 / 8] > 1000);
	CHECK(page[0x908 / 8] == 0);
	printf("user loop counted %llu, %llu exits for interrupts, %llu ms in the core world\n",
	       (unsigned long long)page[0x900 / 8], st.exits[BLANKET_EXIT_INTR], st.guest_ns / 1000000);
	drop(&vm);
}

static void arguments(void)
{
	struct blanket_info info;
	struct blanket_create_vm c = { .nr_vcpus = 1, .nr_frames = 16 };
	struct vm vm;

	CHECK(ioctl(dev, BLANKET_GET_INFO, &info) == 0);
	CHECK(info.api == BLANKET_API_VERSION && info.max_vcpus == BLANKET_MAX_VCPUS);
	printf("info: tsc %llu kHz, features %#llx, build %02x%02x\n", info.tsc_khz,
	       info.features, info.build_id[0], info.build_id[1]);
	FAILS_WITH(ioctl(dev, BLANKET_GET_INFO, 8), EFAULT);
	FAILS_WITH(ioctl(dev, BLANKET_RUN, 0), ENOTTY);
	c.user_addr = 1;
	FAILS_WITH(ioctl(dev, BLANKET_CREATE_VM, &c), EINVAL);
	c.user_addr = 0xffff888000000000;
	FAILS_WITH(ioctl(dev, BLANKET_CREATE_VM, &c), EFAULT);
	c.user_addr = 0;
	c.nr_frames = BLANKET_MAX_FRAMES + 1;
	FAILS_WITH(ioctl(dev, BLANKET_CREATE_VM, &c), EINVAL);
	c.nr_frames = 16;
	c.nr_vcpus = 65;
	FAILS_WITH(ioctl(dev, BLANKET_CREATE_VM, &c), EINVAL);
	c.nr_vcpus = 1;
	c.flags = 1;
	FAILS_WITH(ioctl(dev, BLANKET_CREATE_VM, &c), EINVAL);
	c.flags = 0;
	c.pool_limit = 1;
	FAILS_WITH(ioctl(dev, BLANKET_CREATE_VM, &c), EINVAL);

	vm = make(1, 0, 1);
	FAILS_WITH(ioctl(vm.fd, BLANKET_CREATE_VCPU, 1), EINVAL);
	FAILS_WITH(ioctl(vm.fd, BLANKET_CREATE_VCPU, 0), EEXIST);
	FAILS_WITH(ioctl(vm.fd, BLANKET_RAISE, 4096), EINVAL);
	FAILS_WITH(ioctl(vm.fd, BLANKET_RAISE_VIRQ, 64), EINVAL);
	FAILS_WITH(ioctl(vm.fd, BLANKET_GET_STATS, 8), EFAULT);
	FAILS_WITH(ioctl(vm.vcpus[0], BLANKET_RUN, 1), EINVAL);
	CHECK(mmap(NULL, 8192, PROT_READ, MAP_SHARED, vm.vcpus[0], 0) == MAP_FAILED);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, vm.vcpus[0], 4096) == MAP_FAILED);
	vm.run[0]->immediate_exit = 1;
	FAILS_WITH(ioctl(vm.vcpus[0], BLANKET_RUN, 0), EINTR);
	/* Another address space must not run it. */
	pid_t pid = fork();
	if (!pid)
		_exit(ioctl(vm.vcpus[0], BLANKET_RUN, 0) == -1 && errno == EPERM ? 0 : 1);
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	drop(&vm);

	/* Memory that is not there: FRAME fails, the test core calls it a crash. */
	c.pool_limit = 0;
	c.user_addr = 0x10000;
	int fd = ioctl(dev, BLANKET_CREATE_VM, &c);
	CHECK(fd >= 0);
	int vcpu = ioctl(fd, BLANKET_CREATE_VCPU, 0);
	struct blanket_run *run = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	CHECK(run_vcpu(vcpu) == 0);
	CHECK(run->exit == BLANKET_EXIT_CRASH && run->args[0] == BLANKET_CRASH_CORE);
	FAILS_WITH(ioctl(vcpu, BLANKET_RUN, 0), EIO);
	munmap(run, 4096);
	close(fd);
	close(vcpu);
}

static volatile sig_atomic_t alarms;

static void on_alarm(int sig)
{
	(void)sig;
	alarms = 1;
}

/* A signal ends RUN; SIGKILL ends the process and everything it had. */
static void signals(void)
{
	struct sigaction sa = { .sa_handler = on_alarm };
	struct vm vm = make(1, 1, 0);
	uint64_t t0 = now();
	int status;

	sigaction(SIGALRM, &sa, NULL);
	ualarm(200000, 0);
	while (!alarms)
		FAILS_WITH(ioctl(vm.vcpus[0], BLANKET_RUN, 0), EINTR);
	t0 = now() - t0;
	printf("signal after %llu ms\n", (unsigned long long)t0 / 1000000);
	CHECK(t0 > 150000000 && t0 < 2000000000);
	drop(&vm);

	for (int i = 0; i < 5; i++) {
		pid_t pid = fork();

		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			vm = make(2, 1, 0);
			if (!fork())
				_exit(0);
			run_vcpu(vm.vcpus[0]);
			_exit(1);
		}
		usleep(100000);
		kill(pid, SIGKILL);
		CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
	}
}

int main(int argc, char **argv)
{
	uint64_t n = argc > 2 ? strtoull(argv[2], NULL, 0) : 2000;

	setbuf(stdout, NULL);
	dev = open("/dev/blanket", O_RDWR | O_CLOEXEC);
	if (dev < 0) {
		perror("/dev/blanket");
		return 1;
	}
	if (argc > 1 && !strcmp(argv[1], "spin")) {
		/* Until the VM is raised from outside: for injecting NMIs. */
		struct vm vm = make(1, 1, 0);
		uint64_t end = now() + n * 1000000;
		struct sigaction sa = { .sa_handler = on_alarm };

		sigaction(SIGALRM, &sa, NULL);
		ualarm(20000, 20000);
		while (now() < end)
			ioctl(vm.vcpus[0], BLANKET_RUN, 0);
		ualarm(0, 0);
		ioctl(vm.fd, BLANKET_RAISE, 0);
		while (ioctl(vm.vcpus[0], BLANKET_RUN, 0))
			;
		printf("spin: %llu interrupts, %llu NMIs at CPL 3, %llu in ring 0\n",
		       vm.run[0]->args[1], vm.run[0]->args[2], vm.run[0]->args[3]);
		drop(&vm);
	} else if (argc > 1 && !strcmp(argv[1], "kicks")) {
		struct vm vm = make(1, 2, n);
		uint64_t t0 = now();

		CHECK(run_vcpu(vm.vcpus[0]) == 0);
		t0 = now() - t0;
		printf("%llu round trips, %llu ns each, %llu NMIs in ring 0\n",
		       (unsigned long long)n, (unsigned long long)(t0 / n), vm.run[0]->args[3]);
		drop(&vm);
	} else {
		arguments();
		everything(1, n);
		everything(2, n);
		everything(4, n);
		signals();
	}
	close(dev);
	printf(failures ? "%d FAILURES\n" : "all held\n", failures);
	return failures != 0;
}
