//! What must be refused, one by one.

use std::process::ExitCode;

use blanket_abi::device::{
    AUDIT, Boot, CREATE_VCPU, CREATE_VM, CreateVm, GET_INFO, GET_STATS, Info, PAUSE, RAISE,
    RAISE_VIRQ, RECLAIM, RUN, TARGET, TRACE, boot_flags, create,
};

use crate::device::{Answer, close, in_child, ioctl, memory, mmap, open, vm};

const PAGES: u64 = 256;

struct Checks {
    failed: u32,
}

impl Checks {
    fn check(&mut self, what: &str, good: bool, found: impl std::fmt::Debug) {
        println!("{} {what}", if good { "PASS" } else { "FAIL" });
        if !good {
            println!("     found {found:?}");
            self.failed += 1;
        }
    }

    fn refused(&mut self, what: &str, answer: Answer, errno: i32) {
        self.check(what, answer == Err(errno), answer);
    }
}

fn create(device: i32, request: &CreateVm) -> Answer {
    ioctl(device, CREATE_VM, (std::ptr::from_ref(request)) as u64)
}

fn build_id(device: i32) -> [u8; 32] {
    let mut info = Info::default();
    let told = ioctl(device, GET_INFO, (&raw mut info) as u64);
    assert!(told.is_ok(), "GET_INFO: {told:?}");
    info.build_id
}

pub fn run() -> ExitCode {
    let mut c = Checks { failed: 0 };
    let Ok(device) = open().map(|fd| fd as i32) else {
        println!("FAIL the device cannot be opened");
        return ExitCode::FAILURE;
    };
    let core = build_id(device);
    let address = memory(PAGES).expect("a megabyte of memory") as u64;
    let good = vm(address, PAGES, 1);
    let made = create(device, &good);
    let machine = made.unwrap_or(-1) as i32;
    c.check("a VM can be made", made.is_ok(), made);
    let vcpu = ioctl(machine, CREATE_VCPU, 0).unwrap_or(-1) as i32;

    core_image(&mut c, device, machine, vcpu);
    c.check(
        "the core is the same afterwards",
        build_id(device) == core,
        (),
    );
    others(&mut c, vcpu);
    arguments(&mut c, device, machine, vcpu, &good);
    limits(&mut c, device, &good);
    for fd in [vcpu, machine, device] {
        close(fd);
    }
    println!("IOCTL-CHECKS {} failed", c.failed);
    ExitCode::from(u8::from(c.failed > 0))
}

/// The core image cannot be replaced, written or mapped by who holds a descriptor.
fn core_image(c: &mut Checks, device: i32, machine: i32, vcpu: i32) {
    let known = [
        GET_INFO,
        CREATE_VM,
        CREATE_VCPU,
        RAISE,
        GET_STATS,
        RUN,
        RAISE_VIRQ,
        TRACE,
        AUDIT,
        TARGET,
        RECLAIM,
        PAUSE,
    ];
    let image = vec![0xccu8; 1 << 20];
    for (name, fd) in [("device", device), ("VM", machine), ("vCPU", vcpu)] {
        // All numbers of the type, with every direction and some sizes.
        let mut taken = Vec::new();
        for nr in 0..256u32 {
            for direction in 0..4u32 {
                for size in [0, 8, 64, 4096, 16383] {
                    let cmd = direction << 30 | size << 16 | 0xb7 << 8 | nr;
                    if !known.contains(&cmd)
                        && ioctl(fd, cmd, image.as_ptr() as u64) != Err(libc::ENOTTY)
                    {
                        taken.push(cmd);
                    }
                }
            }
        }
        c.check(
            &format!("no other ioctl of the {name}"),
            taken.is_empty(),
            taken,
        );
        // SAFETY: a buffer of ours of that size.
        let written = unsafe { libc::write(fd, image.as_ptr().cast(), image.len()) };
        c.check(&format!("no write to the {name}"), written < 0, written);
        let pages: Vec<i64> = (0..64)
            .filter(|page| {
                let prot = libc::PROT_READ | libc::PROT_WRITE;
                (*page != 0 || name != "vCPU")
                    && mmap(fd, 4096, page * 4096, prot, libc::MAP_SHARED).is_ok()
            })
            .collect();
        c.check(
            &format!("no page of the {name} to map"),
            pages.is_empty(),
            pages,
        );
    }
    c.refused(
        "no run page of two pages",
        mmap(vcpu, 8192, 0, 3, libc::MAP_SHARED),
        libc::EINVAL,
    );
}

/// A VM is its maker's process's.
fn others(c: &mut Checks, vcpu: i32) {
    let code = in_child(|| match ioctl(vcpu, RUN, 0) {
        Err(libc::EPERM) => 0,
        _ => 1,
    });
    c.check(
        "another process with the descriptor cannot run it",
        code == 0,
        code,
    );
    let path = format!("/proc/self/fd/{vcpu}\0");
    // SAFETY: a C string.
    let again = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDWR) };
    c.check("it cannot be opened by its name in /proc", again < 0, again);
}

fn arguments(c: &mut Checks, device: i32, machine: i32, vcpu: i32, good: &CreateVm) {
    let with = |change: fn(&mut CreateVm)| {
        let mut request = *good;
        change(&mut request);
        let answer = create(device, &request);
        if let Ok(fd) = answer {
            close(fd as i32);
        }
        answer
    };
    for mask in [1, 2, 4, 5, 0x23, 0x27, 0xe3, 0x107, 1 << 9 | 3, u64::MAX] {
        let answer = create(
            device,
            &CreateVm {
                xcr0_mask: mask,
                ..*good
            },
        );
        c.refused(&format!("XCR0 of {mask:#x}"), answer, libc::EINVAL);
    }
    c.refused("unknown flags", with(|r| r.flags = 1 << 31), libc::EINVAL);
    c.refused(
        "flags that exclude each other",
        with(|r| r.flags = create::ISOLATE | create::SHARE),
        libc::EINVAL,
    );
    c.refused("no vCPU", with(|r| r.nr_vcpus = 0), libc::EINVAL);
    c.refused("65 vCPUs", with(|r| r.nr_vcpus = 65), libc::EINVAL);
    c.refused("no frame", with(|r| r.nr_frames = 0), libc::EINVAL);
    c.refused(
        "too many frames",
        with(|r| r.nr_frames = (1 << 24) + 1),
        libc::EINVAL,
    );
    c.refused(
        "memory inside of a page",
        with(|r| r.user_addr += 8),
        libc::EINVAL,
    );
    c.refused(
        "the kernel's memory",
        with(|r| r.user_addr = 0xffff_8880_0000_0000),
        libc::EFAULT,
    );
    c.refused(
        "memory up to the kernel's",
        with(|r| r.user_addr = (1 << 47) - 8192),
        libc::EFAULT,
    );
    c.refused("a small pool", with(|r| r.pool_limit = 255), libc::EINVAL);
    c.refused(
        "a huge pool",
        with(|r| r.pool_limit = u64::MAX),
        libc::EINVAL,
    );
    c.refused(
        "a core that breaks on purpose",
        with(|r| r.boot.flags = boot_flags::INJECT),
        libc::EPERM,
    );
    c.refused(
        "a request from nowhere",
        ioctl(device, CREATE_VM, 8),
        libc::EFAULT,
    );
    c.refused(
        "an answer to nowhere",
        ioctl(device, GET_INFO, 8),
        libc::EFAULT,
    );
    c.refused(
        "counters to nowhere",
        ioctl(machine, GET_STATS, 8),
        libc::EFAULT,
    );
    c.refused("a vCPU twice", ioctl(machine, CREATE_VCPU, 0), libc::EEXIST);
    c.refused(
        "a vCPU too many",
        ioctl(machine, CREATE_VCPU, 1),
        libc::EINVAL,
    );
    c.refused("a port too many", ioctl(machine, RAISE, 4096), libc::EINVAL);
    c.refused(
        "a VIRQ too many",
        ioctl(machine, RAISE_VIRQ, 64),
        libc::EINVAL,
    );
    c.refused("an argument of RUN", ioctl(vcpu, RUN, 1), libc::EINVAL);
}

/// A user's VMs are counted. Root is not limited.
fn limits(c: &mut Checks, device: i32, good: &CreateVm) {
    // SAFETY: tells a number.
    if unsafe { libc::geteuid() } == 0 {
        return;
    }
    let most: usize = std::fs::read_to_string("/sys/module/blanket/parameters/max_vms")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    let mut fds = Vec::new();
    let refused = loop {
        match create(device, good) {
            Ok(fd) if fds.len() <= most => fds.push(fd as i32),
            other => break other,
        }
    };
    // One was made before.
    c.refused("one VM more than max_vms", refused, libc::EDQUOT);
    c.check("max_vms VMs", fds.len() + 1 == most, fds.len() + 1);
    fds.into_iter().for_each(close);
    let again = create(device, good);
    c.check("and one more when they are gone", again.is_ok(), again);
    close(again.unwrap_or(-1) as i32);
    let large = CreateVm {
        boot: Boot::default(),
        // Where 64 GiB are user addresses, whatever is there.
        user_addr: 1 << 32,
        nr_frames: 1 << 24,
        ..*good
    };
    c.refused(
        "the tables of a VM of 64 GiB",
        create(device, &large),
        libc::ENOMEM,
    );
}
