//! Random calls.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};

use blanket_abi::device::{
    AUDIT, CREATE_VCPU, CREATE_VM, CreateVm, GET_INFO, GET_STATS, PAUSE, RAISE, RAISE_VIRQ,
    RECLAIM, RUN, TARGET, TRACE,
};

use crate::device::{
    close, discard, in_child, ioctl, mmap, mprotect, munmap, open, replace, reserve, vm,
};

const THREADS: u64 = 4;
const SLOTS: usize = 24;
/// Pages of a VM that can be made.
const PAGES: u64 = 512;

/// xorshift64* (Vigna).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// What all threads share: descriptors of every kind, mappings, counts.
struct Pool {
    fds: [AtomicI32; SLOTS],
    /// Where the memory of VMs is, in slots of [`PAGES`] pages. The addresses are never
    /// given up: a thread that still has one would else change what another has mapped
    /// there since.
    memory: u64,
    /// Calls that succeeded, by kind.
    done: [AtomicU64; 8],
}

const NAMES: [&str; 8] = [
    "opened", "VMs", "vCPUs", "mapped", "ran", "raised", "other", "forked",
];

impl Pool {
    fn fd(&self, rng: &mut Rng) -> i32 {
        self.fds[rng.below(SLOTS as u64) as usize].load(Relaxed)
    }
    /// Keeps a descriptor and closes the one that was in its place.
    fn keep(&self, rng: &mut Rng, fd: i64) {
        let old = self.fds[rng.below(SLOTS as u64) as usize].swap(fd as i32, Relaxed);
        if old >= 0 {
            close(old);
        }
    }
    fn mapping(&self, rng: &mut Rng) -> u64 {
        self.memory + rng.below(SLOTS as u64) * PAGES * 4096
    }
    fn count(&self, what: usize) {
        self.done[what].fetch_add(1, Relaxed);
    }
}

pub fn run(seed: u64, steps: u64) {
    println!("ioctl-fuzz: seed={seed} steps={steps} threads={THREADS}");
    interrupt_often();
    let pool = Pool {
        fds: [const { AtomicI32::new(-1) }; SLOTS],
        // A VM may be larger than a slot.
        memory: reserve((SLOTS as u64 + 1) * PAGES).expect("addresses") as u64,
        done: [const { AtomicU64::new(0) }; 8],
    };
    replace(pool.memory, SLOTS as u64 * PAGES, true);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let pool = &pool;
            scope.spawn(move || {
                let mut rng =
                    Rng((seed * THREADS + thread).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
                for _ in 0..steps {
                    step(pool, &mut rng);
                }
            });
        }
        // The kernel would give all of them to this one.
        leave_signals_to_others();
    });
    let mut line = format!("IOCTL-FUZZ seed={seed} calls={}", steps * THREADS);
    for (name, count) in NAMES.iter().zip(&pool.done) {
        line.push_str(&format!(" {name}={}", count.load(Relaxed)));
    }
    println!("{line}");
}

/// A signal to one thread or another every few milliseconds: nobody stays in RUN.
fn interrupt_often() {
    extern "C" fn nothing(_: libc::c_int) {}
    let every = libc::timeval {
        tv_sec: 0,
        tv_usec: 3000,
    };
    let timer = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    // SAFETY: a handler that does nothing, without SA_RESTART, and a timer.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
        libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
    }
}

/// Of the thread that waits for the others.
fn leave_signals_to_others() {
    // SAFETY: a set of signals on the stack, filled before it is used.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGALRM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// An argument that is likely to hurt.
fn odd(rng: &mut Rng, pool: &Pool) -> u64 {
    match rng.below(8) {
        0 => 0,
        1 => rng.below(70),
        2 => rng.below(5000),
        3 => 1 << rng.below(64),
        4 => pool.mapping(rng) + rng.below(8192),
        5 => rng.pick(&[
            u64::MAX,
            i64::MAX as u64,
            1 << 47,
            (1 << 47) - 4096,
            0xffff_8080_0000_0000,
        ]),
        6 => rng.next() & 0xffff_ffff,
        _ => rng.next(),
    }
}

fn request(rng: &mut Rng, pool: &Pool) -> CreateVm {
    let address = pool.mapping(rng);
    if rng.once_in(3) {
        // Another VM may have what was there.
        replace(address, PAGES, true);
    }
    let pages = rng.pick(&[1, 33, 34, 64, PAGES, PAGES, PAGES, PAGES + 100]);
    let mut request = vm(address, pages, rng.pick(&[1, 1, 2, 4]));
    let boot = &mut request.boot;
    boot.cr3 = rng.below(PAGES);
    boot.rip = odd(rng, pool);
    boot.rsp = odd(rng, pool);
    request.xcr0_mask = rng.pick(&[0, 3, 7]);
    request.cpuid_hidden = [rng.next() as u32; 16];
    if rng.once_in(4) {
        let value = odd(rng, pool);
        match rng.below(14) {
            0 => request.user_addr = value,
            // Not so large that making it takes long, or beyond the limit.
            1 => request.nr_frames = rng.pick(&[0, 1 << 14, (1 << 24) + 1, u64::MAX, value >> 20]),
            2 => request.nr_vcpus = rng.pick(&[0, 65, 1 << 31, u32::MAX]),
            3 => request.pool_limit = rng.pick(&[0, 1, 255, 300, (1 << 22) + 1, u64::MAX]),
            4 => request.flags = value as u32,
            5 => request.boot.flags = value,
            6 => request.boot.ram_frames = value,
            7 => request.boot.shared_info = value,
            8 => request.boot.grant_base = value,
            9 => request.boot.grant_frames = value,
            10 => request.boot.cr3 = value,
            11 => request.boot.start_frames = value,
            12 => request.xcr0_mask = value,
            _ => request.boot.hypercall_page = value,
        }
    }
    request
}

fn step(pool: &Pool, rng: &mut Rng) {
    let fd = pool.fd(rng);
    match rng.below(40) {
        0 => {
            if let Ok(new) = open() {
                pool.count(0);
                pool.keep(rng, new);
            }
        }
        1..5 => {
            let request = request(rng, pool);
            let device = open().unwrap_or(-1);
            let made = ioctl(device as i32, CREATE_VM, (&raw const request) as u64);
            close(device as i32);
            if let Ok(new) = made {
                pool.count(1);
                pool.keep(rng, new);
                // At once a vCPU of it, which would be rare by chance.
                for id in 0..u64::from(request.nr_vcpus.min(2)) {
                    if let Ok(new) = ioctl(new as i32, CREATE_VCPU, id) {
                        pool.count(2);
                        pool.keep(rng, new);
                    }
                }
            }
        }
        5 | 6 => {
            if let Ok(new) = ioctl(fd, CREATE_VCPU, odd(rng, pool)) {
                pool.count(2);
                pool.keep(rng, new);
            }
        }
        7..19 => {
            if ioctl(fd, RUN, if rng.once_in(20) { odd(rng, pool) } else { 0 }).is_ok() {
                pool.count(4);
            }
        }
        19..23 => {
            let cmd = rng.pick(&[RAISE, RAISE_VIRQ, TRACE, TARGET, RECLAIM, PAUSE]);
            if ioctl(fd, cmd, odd(rng, pool)).is_ok() {
                pool.count(5);
            }
        }
        23..26 => {
            // Answers go to memory of ours, or to none.
            let mut room = [0u64; 1024];
            let to = if rng.once_in(2) {
                (&raw mut room) as u64
            } else {
                odd(rng, pool)
            };
            // Never into the room behind a random number: that may be this program.
            let ours = to == (&raw mut room) as u64 || to < 4096 || to >> 47 != 0;
            if ours && ioctl(fd, rng.pick(&[GET_STATS, GET_INFO, AUDIT]), to).is_ok() {
                pool.count(6);
            }
        }
        26..29 => {
            // Any number of the device's type, and any at all, with no address.
            let cmd = match rng.below(3) {
                0 => rng.next() as u32,
                1 => 0xb700 | rng.below(256) as u32,
                _ => 0xb700 | rng.below(16) as u32 | (rng.next() as u32) << 16,
            };
            if ![GET_INFO, GET_STATS, AUDIT].contains(&cmd) {
                let _ = ioctl(fd, cmd, rng.below(4096));
            }
        }
        29..32 => {
            let length = rng.pick(&[4096, 4096, 4096, 1, 8192, 1 << 20]);
            let offset = rng.pick(&[0, 0, 0, 4096, 1 << 30]);
            let prot = rng.pick(&[libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE, 7, 0]);
            let flags = rng.pick(&[libc::MAP_SHARED, libc::MAP_SHARED, libc::MAP_PRIVATE]);
            if let Ok(at) = mmap(fd, length, offset, prot, flags) {
                pool.count(3);
                if prot & libc::PROT_WRITE != 0 && flags == libc::MAP_SHARED {
                    scribble(at as u64, rng);
                }
                munmap(at as u64, length);
            }
        }
        32 | 33 => {
            // The guest's memory changes below it.
            let page = pool.mapping(rng) + rng.below(PAGES) * 4096;
            match rng.below(4) {
                0 => mprotect(page, 4096, libc::PROT_NONE),
                1 => mprotect(page, 4096, libc::PROT_READ | libc::PROT_WRITE),
                2 => discard(page, 4096),
                _ => replace(page, 1, false),
            }
        }
        34 => {
            // Another process has the descriptors, and may not run what is not its own.
            pool.count(7);
            let code = in_child(|| {
                let ran = ioctl(fd, RUN, 0);
                let _ = ioctl(fd, RAISE, 1);
                i32::from(ran.is_ok())
            });
            assert!(code != 1, "a child process ran its parent's vCPU");
        }
        35 => {
            // SAFETY: nothing is read from or written to but the kernel's files.
            unsafe {
                let mut room = [0u8; 64];
                libc::write(fd, room.as_ptr().cast(), room.len());
                libc::read(fd, room.as_mut_ptr().cast(), room.len());
                libc::lseek(fd, rng.next() as i64, libc::SEEK_SET);
            }
        }
        _ => pool.keep(rng, -1),
    }
}

/// Writes into a vCPU's page, which the module must not believe. Whoever unmaps it
/// meanwhile is this thread alone.
fn scribble(at: u64, rng: &mut Rng) {
    for _ in 0..8 {
        let word = rng.below(512);
        // SAFETY: inside of a mapping that this thread has just made, writable.
        unsafe { ((at + word * 8) as *mut u64).write_volatile(rng.next()) };
    }
}
