//! Page tables seen from user space: copy on write, protection, moves,
//! shootdowns between CPUs, large and sparse mappings.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require, slow};
use crate::probe::{self, Code, Ran};
use crate::sys::{self, Region};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("mem_zero_page", zero_page),
    check("mem_cow", cow),
    check("mem_cow_generations", cow_generations),
    check("mem_shared_fork", shared_fork),
    check("mem_mprotect_cycle", mprotect_cycle),
    check("mem_mprotect_parts", mprotect_parts),
    check("mem_exec_toggle", exec_toggle),
    slow("mem_mremap_churn", 120, mremap_churn),
    slow("mem_mremap_page_tables", 120, mremap_page_tables),
    slow("mem_shootdown_mprotect", 120, shootdown_mprotect),
    slow("mem_shootdown_munmap", 120, shootdown_munmap),
    slow("mem_shootdown_dontneed", 120, shootdown_dontneed),
    slow("mem_shootdown_cow", 120, shootdown_cow),
    check("mem_dontneed", dontneed),
    slow("mem_map_unmap_churn", 120, map_unmap_churn),
    slow("mem_sparse", 120, sparse),
    check("mem_huge_reservation", huge_reservation),
    slow("mem_touch_64m", 120, touch_64m),
    check("mem_huge_page_advice", huge_page_advice),
    check("mem_referenced", referenced),
    check("mem_soft_dirty", soft_dirty),
    check("mem_file_mapping", file_mapping),
    check("mem_proc_self_mem", proc_self_mem),
    check("mem_process_vm", process_vm),
    check("mem_fork_touch_tables", fork_touch_tables),
    check("mem_mincore_mlock", mincore_mlock),
];

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn zero_page(_: &Ctx) -> Verdict {
    let region = Region::new(64 * PAGE)?;
    for page in 0..64 {
        equal("untouched page", region.load(page * PAGE + 8), 0)?;
    }
    for page in 0..64 {
        region.store(page * PAGE, page as u64 + 1);
    }
    for page in 0..64 {
        equal("written page", region.load(page * PAGE), page as u64 + 1)?;
        equal("rest of a written page", region.load(page * PAGE + 8), 0)?;
    }
    Ok(Note::Pass)
}

fn cow(ctx: &Ctx) -> Verdict {
    let region = Region::new(128 * PAGE)?;
    for page in 0..128 {
        region.store(page * PAGE, 1000 + page as u64);
    }
    for round in 0..u64::from(ctx.n(100)) {
        let child = sys::fork(|| {
            for page in (0..128).step_by(2) {
                region.store(page * PAGE, round);
            }
            let wrong = (0..128).any(|page| {
                let want = if page % 2 == 0 {
                    round
                } else {
                    1000 + page as u64
                };
                region.load(page * PAGE) != want
            });
            i32::from(wrong)
        })?;
        // The parent stores to the others at the same time.
        for page in (1..128).step_by(2) {
            region.store(page * PAGE + 8, round);
        }
        child.wait_ok("child")?;
        for page in 0..128 {
            equal(
                "parent's page",
                region.load(page * PAGE),
                1000 + page as u64,
            )?;
        }
    }
    Ok(Note::Pass)
}

/// Each generation changes one page and checks all that it inherited.
fn cow_generations(_: &Ctx) -> Verdict {
    fn generation(region: &Region, depth: usize) -> i32 {
        for page in 0..20 {
            let want = if page < depth { page as u64 + 100 } else { 0 };
            if region.load(page * PAGE) != want {
                return depth as i32 + 1;
            }
        }
        if depth == 20 {
            return 0;
        }
        region.store(depth * PAGE, depth as u64 + 100);
        let status = match sys::fork(|| generation(region, depth + 1)).map(sys::Child::wait) {
            Ok(sys::Status::Exit(code)) => code,
            _ => 99,
        };
        // Back in this generation nothing of the child's may show.
        let later = depth + 1..20;
        if status == 0 && later.into_iter().any(|page| region.load(page * PAGE) != 0) {
            return 98;
        }
        status
    }
    let region = Region::new(20 * PAGE)?;
    equal("first generation that failed", generation(&region, 0), 0)?;
    Ok(Note::Pass)
}

fn shared_fork(_: &Ctx) -> Verdict {
    let region = Region::shared(64 * PAGE)?;
    region.store(0, 5);
    sys::fork(|| {
        for page in 0..64 {
            region.store(page * PAGE, region.load(page * PAGE) + 1);
        }
        0
    })?
    .wait_ok("child")?;
    equal("first page", region.load(0), 6)?;
    equal("last page", region.load(63 * PAGE), 1)?;
    Ok(Note::Pass)
}

fn mprotect_cycle(ctx: &Ctx) -> Verdict {
    probe::install();
    let region = Region::new(4 * PAGE)?;
    let store = Code::with_ret(probe::STORE)?;
    for i in 0..u64::from(ctx.n(1000)) {
        region.protect(RW)?;
        store.run(region.addr() + 8192, i).value()?;
        region.protect(libc::PROT_READ)?;
        let fault = store.run(region.addr() + 8192, i + 1).fault()?;
        equal("si_addr", fault.addr, region.addr() + 8192)?;
        equal("value", region.load(8192), i)?;
    }
    Ok(Note::Pass)
}

/// Every second page read-only: large tables change entry by entry.
fn mprotect_parts(ctx: &Ctx) -> Verdict {
    probe::install();
    let pages = ctx.n(512) as usize;
    let region = Region::new(pages * PAGE)?;
    let store = Code::with_ret(probe::STORE)?;
    for page in 0..pages {
        region.store(page * PAGE, 1);
    }
    for page in (0..pages).step_by(2) {
        region.protect_part(page * PAGE, PAGE, libc::PROT_READ)?;
    }
    for page in 0..pages {
        let ran = store.run(region.addr() + (page * PAGE) as u64, 2);
        equal(
            "store faults",
            matches!(ran, Ran::Faulted(_)),
            page % 2 == 0,
        )?;
    }
    region.protect(RW)?;
    for page in 0..pages {
        equal("value", region.load(page * PAGE), 1 + page as u64 % 2)?;
        region.store(page * PAGE, 3);
    }
    Ok(Note::Pass)
}

/// Code that is rewritten between two executions, W xor X.
fn exec_toggle(ctx: &Ctx) -> Verdict {
    probe::install();
    let region = Region::new(PAGE)?;
    for i in 0..ctx.n(500) {
        region.protect(RW)?;
        let mut code = vec![0xb8];
        code.extend(i.to_le_bytes());
        code.push(0xc3);
        region.fill(0, &code);
        region.protect(libc::PROT_READ | libc::PROT_EXEC)?;
        equal(
            "value",
            probe::run(region.addr(), 0, 0).value()?,
            u64::from(i),
        )?;
    }
    Ok(Note::Pass)
}

fn mremap_churn(ctx: &Ctx) -> Verdict {
    let mut region = Region::new(4 * PAGE)?;
    for page in 0..4 {
        region.store(page * PAGE, page as u64 + 7);
    }
    for i in 0..ctx.n(1000) as usize {
        let pages = [4, 700, 8, 64, 1030][i % 5];
        region.remap(pages * PAGE)?;
        for page in 0..4 {
            equal("kept page", region.load(page * PAGE), page as u64 + 7)?;
        }
        region.store((pages - 1) * PAGE + 8, i as u64);
        equal("last page", region.load((pages - 1) * PAGE + 8), i as u64)?;
    }
    Ok(Note::Pass)
}

/// Moves whole page tables: 4 MiB-aligned regions to other addresses.
fn mremap_page_tables(ctx: &Ctx) -> Verdict {
    const LEN: usize = 8 << 20;
    let mut region = Region::new(LEN)?;
    for page in (0..LEN / PAGE).step_by(16) {
        region.store(page * PAGE, page as u64 ^ 0x5a5a);
    }
    for _ in 0..ctx.n(20) {
        let target = Region::new(LEN)?;
        target.store(0, 1);
        region.remap_onto(target)?;
        for page in (0..LEN / PAGE).step_by(16) {
            equal("moved page", region.load(page * PAGE), page as u64 ^ 0x5a5a)?;
        }
    }
    Ok(Note::Pass)
}

/// What the storing thread of a shootdown check does and sees.
struct Writer {
    stop: AtomicBool,
    rounds_done: AtomicU64,
    start: AtomicU64,
}

/// On one CPU a thread stores to a page in a loop until it faults; on another,
/// `revoke` takes the right away. After `revoke` returned, the page must not
/// change any more, and the writer must have faulted.
fn shootdown(rounds: u32, revoke: impl Fn(&Region) -> Result<(), String>) -> Verdict {
    probe::install();
    let cpus = sys::cpus();
    let last = cpus[cpus.len() - 1];
    sys::pin(cpus[0])?;
    let region = Region::new(PAGE)?;
    // L: inc qword [rdi]; jmp L
    let code = Code::new(&[0x48, 0xff, 0x07, 0xeb, 0xfb])?;
    let state = Writer {
        stop: AtomicBool::new(false),
        rounds_done: AtomicU64::new(0),
        start: AtomicU64::new(0),
    };
    let result = std::thread::scope(|scope| {
        let writer = scope.spawn(|| -> Result<(), String> {
            sys::pin(last)?;
            let mut round = 0;
            loop {
                while state.start.load(SeqCst) == round {
                    if state.stop.load(SeqCst) {
                        return Ok(());
                    }
                    sys::yield_now();
                }
                round += 1;
                let fault = code.run(region.addr(), 0).fault()?;
                state.rounds_done.store(round, SeqCst);
                equal("writer's signal", fault.sig, libc::SIGSEGV)?;
                equal("writer's address", fault.addr, region.addr())?;
            }
        });
        let run = || -> Result<(), String> {
            for round in 1..=u64::from(rounds) {
                region.replace(RW)?;
                state.start.store(round, SeqCst);
                while region.load_volatile(0) < 1000 {
                    require(!writer.is_finished(), || {
                        "the writer ended early".to_string()
                    })?;
                    sys::yield_now();
                }
                revoke(&region)?;
                let first = region.load_volatile(0);
                while state.rounds_done.load(SeqCst) < round {
                    require(!writer.is_finished(), || {
                        "the writer ended early".to_string()
                    })?;
                    sys::yield_now();
                }
                equal(
                    "page after it was taken away",
                    region.load_volatile(0),
                    first,
                )?;
            }
            Ok(())
        };
        let result = run();
        // Whatever went wrong, the writer must fault and see the stop.
        state.stop.store(true, SeqCst);
        if result.is_err() {
            region.protect(libc::PROT_READ)?;
        }
        let wrote = writer
            .join()
            .map_err(|_| "the writer panicked".to_string())?;
        result.and(wrote)
    });
    result.map(|()| Note::Pass)
}

fn shootdown_mprotect(ctx: &Ctx) -> Verdict {
    shootdown(ctx.n(200), |region| region.protect(libc::PROT_READ))
}

fn shootdown_munmap(ctx: &Ctx) -> Verdict {
    shootdown(ctx.n(200), |region| {
        region.unmap();
        region.replace(libc::PROT_READ)
    })
}

/// After madvise(DONTNEED) no CPU may read what was there before.
fn shootdown_dontneed(ctx: &Ctx) -> Verdict {
    let cpus = sys::cpus();
    let last = cpus[cpus.len() - 1];
    sys::pin(cpus[0])?;
    let region = Region::new(16 * PAGE)?;
    let (asked, answered) = (AtomicU64::new(0), AtomicU64::new(0));
    let (failed, rounds) = (AtomicU64::new(0), u64::from(ctx.n(300)));
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            if sys::pin(last).is_err() {
                failed.store(1, SeqCst);
            }
            for step in 1..=rounds * 2 {
                while asked.load(SeqCst) < step {
                    sys::yield_now();
                }
                // Odd steps see the pattern, even steps zeros.
                let want = if step % 2 == 1 { step } else { 0 };
                if (0..16).any(|page| region.load_volatile(page * PAGE) != want) {
                    failed.store(step, SeqCst);
                }
                answered.store(step, SeqCst);
            }
        });
        let ask = |step: u64| {
            asked.store(step, SeqCst);
            while answered.load(SeqCst) < step {
                sys::yield_now();
            }
        };
        for round in 0..rounds {
            for page in 0..16 {
                region.store(page * PAGE, round * 2 + 1);
            }
            ask(round * 2 + 1);
            let advised = region.advise(libc::MADV_DONTNEED);
            ask(round * 2 + 2);
            if advised.is_err() {
                failed.store(u64::MAX, SeqCst);
            }
        }
        equal("first wrong step", failed.load(SeqCst), 0)
    });
    result.map(|()| Note::Pass)
}

/// fork write-protects the parent's pages on every CPU: what a thread stores
/// after fork returned must never show in the child.
fn shootdown_cow(ctx: &Ctx) -> Verdict {
    let cpus = sys::cpus();
    let last = cpus[cpus.len() - 1];
    sys::pin(cpus[0])?;
    let region = Region::new(PAGE)?;
    let stop = AtomicBool::new(false);
    let rounds = ctx.n(200);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            // The storing loop does nothing else.
            let _ = sys::pin(last);
            let mut value = 0;
            while !stop.load(SeqCst) {
                value += 1;
                region.store(0, value);
            }
        });
        let run = || -> Result<(), String> {
            for _ in 0..rounds {
                let child = sys::fork(|| {
                    let first = region.load_volatile(0);
                    for _ in 0..200 {
                        if region.load_volatile(0) != first {
                            return 1;
                        }
                        sys::yield_now();
                    }
                    0
                })?;
                child.wait_ok("child that saw a later store")?;
            }
            Ok(())
        };
        let result = run();
        stop.store(true, SeqCst);
        result
    });
    result.map(|()| Note::Pass)
}

fn dontneed(ctx: &Ctx) -> Verdict {
    let region = Region::new(256 * PAGE)?;
    for round in 1..=u64::from(ctx.n(50)) {
        for page in 0..256 {
            region.store(page * PAGE, round);
        }
        region.advise(libc::MADV_DONTNEED)?;
        for page in 0..256 {
            equal("page after DONTNEED", region.load(page * PAGE), 0)?;
        }
    }
    Ok(Note::Pass)
}

fn map_unmap_churn(ctx: &Ctx) -> Verdict {
    let mut held = std::collections::VecDeque::new();
    for i in 0..ctx.n(5000) as usize {
        let len = (i * 7919 % 64 + 1) * PAGE;
        let region = Region::new(len)?;
        region.store(len - 8, i as u64);
        held.push_back((region, i as u64));
        if held.len() > 40
            && let Some((old, value)) = held.pop_front()
        {
            equal("value", old.load(old.len() - 8), value)?;
        }
    }
    Ok(Note::Pass)
}

/// One page every 2 MiB, every 1 GiB and every 512 GiB: many page tables with
/// one entry each, made and freed again.
fn sparse(ctx: &Ctx) -> Verdict {
    for _ in 0..ctx.n(10) {
        for (step, count) in [(2_usize << 20, 500_usize), (1 << 30, 200), (1 << 39, 60)] {
            let Ok(region) = Region::new(step * count) else {
                return Err(format!("cannot reserve {count} steps of {step:#x}"));
            };
            // Without this the kernel may use huge pages where it can.
            region.advise(libc::MADV_NOHUGEPAGE)?;
            for i in 0..count {
                region.store(i * step, i as u64 + 1);
            }
            for i in 0..count {
                equal("value", region.load(i * step), i as u64 + 1)?;
            }
        }
    }
    Ok(Note::Pass)
}

fn huge_reservation(_: &Ctx) -> Verdict {
    let region = Region::new(64 << 40)?;
    for at in [0, 1 << 30, 1 << 40, (64 << 40) - 4096] {
        region.store(at, at as u64 + 1);
        equal("value", region.load(at), at as u64 + 1)?;
    }
    Ok(Note::Pass)
}

/// Dirty and check more pages than any cache of translations holds.
fn touch_64m(ctx: &Ctx) -> Verdict {
    let pages = ctx.n(16384) as usize;
    let region = Region::new(pages * PAGE)?;
    for pass in 0..2 {
        for page in 0..pages {
            region.store(page * PAGE, (page * 31 + pass) as u64);
        }
        for page in (0..pages).rev() {
            equal("value", region.load(page * PAGE), (page * 31 + pass) as u64)?;
        }
    }
    Ok(Note::Pass)
}

/// The contents stay right whether or not huge pages are to be had.
fn huge_page_advice(_: &Ctx) -> Verdict {
    const LEN: usize = 8 << 20;
    let region = Region::new(LEN)?;
    // Refused by kernels without huge pages, which is as good.
    let advised = region.advise(libc::MADV_HUGEPAGE);
    for page in 0..LEN / PAGE {
        region.store(page * PAGE, page as u64);
    }
    sys::fork(|| {
        region.store(0, 99);
        i32::from((1..LEN / PAGE).any(|page| region.load(page * PAGE) != page as u64))
    })?
    .wait_ok("child")?;
    region.protect_part(PAGE, PAGE, libc::PROT_READ)?;
    for page in 0..LEN / PAGE {
        equal("value", region.load(page * PAGE), page as u64)?;
    }
    let huge = smaps_field(region.addr(), "AnonHugePages")?;
    Ok(Note::Info(format!(
        "advice {}, {huge} kB huge",
        if advised.is_ok() { "taken" } else { "refused" }
    )))
}

/// A field of /proc/self/smaps for the mapping that holds `addr`, in kB.
fn smaps_field(addr: u64, field: &str) -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/self/smaps").map_err(|e| format!("smaps: {e}"))?;
    let mut inside = false;
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or("");
        let range = first.split_once('-').and_then(|(a, b)| {
            Some((
                u64::from_str_radix(a, 16).ok()?,
                u64::from_str_radix(b, 16).ok()?,
            ))
        });
        if let Some((start, end)) = range {
            inside = (start..end).contains(&addr);
        } else if inside && first.strip_suffix(':') == Some(field) {
            let value = line.split_whitespace().nth(1).and_then(|v| v.parse().ok());
            return value.ok_or_else(|| format!("smaps line {line:?}"));
        }
    }
    Err(format!("no {field} in smaps for {addr:#x}"))
}

/// Accessed bits: cleared by clear_refs, set again by a touch.
fn referenced(_: &Ctx) -> Verdict {
    let region = Region::new(64 * PAGE)?;
    region.advise(libc::MADV_NOHUGEPAGE)?;
    for page in 0..64 {
        region.store(page * PAGE, 1);
    }
    equal(
        "referenced at first",
        smaps_field(region.addr(), "Referenced")?,
        256,
    )?;
    std::fs::write("/proc/self/clear_refs", "1").map_err(|e| format!("clear_refs: {e}"))?;
    equal(
        "referenced after clearing",
        smaps_field(region.addr(), "Referenced")?,
        0,
    )?;
    // clear_refs leaves cached translations alone; mprotect flushes them.
    region.protect(libc::PROT_READ)?;
    for page in 0..16 {
        region.load_volatile(page * PAGE);
    }
    equal(
        "referenced after 16 reads",
        smaps_field(region.addr(), "Referenced")?,
        64,
    )?;
    Ok(Note::Pass)
}

/// Soft-dirty bits of /proc/self/pagemap, where the kernel has them.
fn soft_dirty(_: &Ctx) -> Verdict {
    use std::os::unix::fs::FileExt;
    let region = Region::new(64 * PAGE)?;
    for page in 0..64 {
        region.store(page * PAGE, 1);
    }
    std::fs::write("/proc/self/clear_refs", "4").map_err(|e| format!("clear_refs: {e}"))?;
    for page in 0..8 {
        region.store(page * PAGE, 2);
    }
    let file = std::fs::File::open("/proc/self/pagemap").map_err(|e| e.to_string())?;
    let mut dirty = 0;
    for page in 0..64 {
        let mut entry = [0; 8];
        let at = (region.addr() / PAGE as u64 + page) * 8;
        file.read_exact_at(&mut entry, at)
            .map_err(|e| format!("pagemap: {e}"))?;
        dirty += u64::from_le_bytes(entry) >> 55 & 1;
    }
    Ok(Note::Info(format!("{dirty} of 64 pages after 8 stores")))
}

/// A shared file mapping and read/write see each other.
fn file_mapping(_: &Ctx) -> Verdict {
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::FileExt;
    // SAFETY: a new memfd, owned by the File; a mapping of all its 64 pages.
    let (file, map) = unsafe {
        let fd = libc::memfd_create(c"abi-test".as_ptr(), 0);
        require(fd >= 0, || format!("memfd: {}", sys::last_error()))?;
        let file = std::fs::File::from_raw_fd(fd);
        file.set_len(64 * PAGE as u64).map_err(|e| e.to_string())?;
        let map = libc::mmap(std::ptr::null_mut(), 64 * PAGE, RW, libc::MAP_SHARED, fd, 0);
        require(map != libc::MAP_FAILED, || {
            format!("mmap: {}", sys::last_error())
        })?;
        (file, map.cast::<u64>())
    };
    for page in 0..64_usize {
        // SAFETY: inside the mapping.
        unsafe { map.add(page * 512).write_volatile(page as u64 + 9) };
        let mut word = [0; 8];
        file.read_exact_at(&mut word, (page * PAGE) as u64)
            .map_err(|e| e.to_string())?;
        equal("by read", u64::from_le_bytes(word), page as u64 + 9)?;
        file.write_all_at(&77_u64.to_le_bytes(), (page * PAGE + 8) as u64)
            .map_err(|e| e.to_string())?;
        // SAFETY: inside the mapping.
        let seen = unsafe { map.add(page * 512 + 1).read_volatile() };
        equal("by mapping", seen, 77)?;
    }
    Ok(Note::Pass)
}

/// Stores to a read-only private page through /proc/self/mem make a copy.
fn proc_self_mem(_: &Ctx) -> Verdict {
    use std::os::unix::fs::FileExt;
    let region = Region::new(PAGE)?;
    region.store(0, 1);
    region.protect(libc::PROT_READ)?;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/mem")
        .map_err(|e| e.to_string())?;
    file.write_all_at(&2_u64.to_le_bytes(), region.addr())
        .map_err(|e| format!("write: {e}"))?;
    equal("after the forced store", region.load_volatile(0), 2)?;
    let mut word = [0; 8];
    for bad in [0x1000, 0xffff_8000_0000_0000, 0xffff_ffff_8100_0000_u64] {
        let read = file.read_exact_at(&mut word, bad);
        require(read.is_err(), || format!("/proc/self/mem reads {bad:#x}"))?;
    }
    Ok(Note::Pass)
}

fn process_vm(_: &Ctx) -> Verdict {
    let region = Region::new(PAGE)?;
    region.store(0, 0x1234);
    let gate = Region::shared(PAGE)?;
    let child = sys::fork(|| {
        region.store(0, 0x9999);
        gate.store(0, 1);
        while gate.load_volatile(8) == 0 {
            sys::yield_now();
        }
        i32::from(region.load_volatile(0) != 0x7777)
    })?;
    while gate.load_volatile(0) == 0 {
        sys::yield_now();
    }
    let mut word = 0_u64;
    let mut ours = libc::iovec {
        iov_base: (&raw mut word).cast(),
        iov_len: 8,
    };
    let theirs = libc::iovec {
        iov_base: region.addr() as *mut libc::c_void,
        iov_len: 8,
    };
    // SAFETY: one valid vector on each side.
    let n = unsafe { libc::process_vm_readv(child.pid, &ours, 1, &theirs, 1, 0) };
    equal("bytes read", n, 8)?;
    equal("child's word", word, 0x9999)?;
    let mut other = 0x7777_u64;
    ours.iov_base = (&raw mut other).cast();
    // SAFETY: one valid vector on each side.
    let n = unsafe { libc::process_vm_writev(child.pid, &ours, 1, &theirs, 1, 0) };
    equal("bytes written", n, 8)?;
    gate.store(8, 1);
    child.wait_ok("child")?;
    equal("our own word", region.load(0), 0x1234)?;
    Ok(Note::Pass)
}

/// Children that make and free page tables next to inherited ones.
fn fork_touch_tables(ctx: &Ctx) -> Verdict {
    let region = Region::new(64 << 20)?;
    region.advise(libc::MADV_NOHUGEPAGE)?;
    for table in 0..16 {
        region.store(table << 22, table as u64 + 1);
    }
    for _ in 0..ctx.n(50) {
        let child = sys::fork(|| {
            for table in 0..32_usize {
                region.store((table << 21) + PAGE, 7);
            }
            let _ = region.advise(libc::MADV_DONTNEED);
            i32::from((0..32_usize).any(|table| region.load((table << 21) + PAGE) != 0))
        })?;
        child.wait_ok("child")?;
        for table in 0..16 {
            equal("parent's table", region.load(table << 22), table as u64 + 1)?;
        }
    }
    Ok(Note::Pass)
}

fn mincore_mlock(_: &Ctx) -> Verdict {
    let region = Region::new(8 * PAGE)?;
    region.store(3 * PAGE, 1);
    let addr = region.addr() as *mut libc::c_void;
    let resident = || -> Result<[u8; 8], String> {
        let mut pages = [0_u8; 8];
        // SAFETY: the vector has one byte for each of the eight pages.
        let r = unsafe { libc::mincore(addr, 8 * PAGE, pages.as_mut_ptr()) };
        equal("mincore", r, 0)?;
        Ok(pages.map(|b| b & 1))
    };
    equal("after one store", resident()?, [0, 0, 0, 1, 0, 0, 0, 0])?;
    // SAFETY: this region's pages.
    let locked = unsafe { libc::mlock(addr, 8 * PAGE) };
    equal("mlock", locked, 0)?;
    equal("pages resident when locked", resident()?, [1; 8])?;
    Ok(Note::Pass)
}
