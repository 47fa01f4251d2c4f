//! Walks a built domain and verifies each promise of the boot protocol. It uses
//! nothing of the builder but its result, and reads start info back by offset.

use blanket_abi::layout::added_later;
use blanket_abi::state;
use blanket_abi::{Gfn, PAGE_SIZE, Va};
use vm_memory::{Bytes, GuestAddress};

use super::Domain;
use crate::kernel::Kernel;

const PRESENT: u64 = 1;
const RW: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;

/// Reads a number of guest memory.
pub fn read_u64(domain: &Domain, at: u64) -> u64 {
    let mut bytes = [0; 8];
    domain
        .memory
        .read_slice(&mut bytes, GuestAddress(at))
        .expect("inside the VM");
    u64::from_le_bytes(bytes)
}

fn read_u32(domain: &Domain, at: u64) -> u32 {
    let mut bytes = [0; 4];
    domain
        .memory
        .read_slice(&mut bytes, GuestAddress(at))
        .expect("inside the VM");
    u32::from_le_bytes(bytes)
}

/// Walks the tables: the leaf entry and the table frames passed on the way.
fn walk(domain: &Domain, va: u64) -> Option<(u64, Vec<u64>)> {
    let mut table = domain.boot.cr3;
    let mut path = Vec::new();
    for level in (1..=4).rev() {
        assert!(
            table < domain.boot.start_frames,
            "table frame {table:#x} is not RAM"
        );
        path.push(table);
        let entry = read_u64(domain, table * PAGE_SIZE + Va(va).index(level) as u64 * 8);
        if entry & PRESENT == 0 {
            return None;
        }
        assert_eq!(entry >> 52, 0, "no NX, no software bits");
        if level == 1 {
            return Some((entry, path));
        }
        assert_eq!(
            entry & 0xfff,
            PRESENT | RW | USER | ACCESSED | DIRTY,
            "upper entry {entry:#x}"
        );
        table = entry >> 12;
    }
    unreachable!("the loop ends at level 1")
}

/// Panics if the domain is not what fact 2 of the boot protocol promises.
pub fn check(domain: &Domain, kernel: &Kernel, initrd: &[u8], memory: u64, cmdline: &str) {
    check_grows(domain, kernel, initrd, memory, memory, cmdline);
}

/// As [`check`], of a domain that may get up to `most` bytes.
pub fn check_grows(
    domain: &Domain,
    kernel: &Kernel,
    initrd: &[u8],
    memory: u64,
    most: u64,
    cmdline: &str,
) {
    let boot = &domain.boot;
    let ram = memory / PAGE_SIZE;
    let notes = kernel.notes();
    assert_eq!(boot.start_frames, ram);
    assert_eq!(boot.most(), most / PAGE_SIZE);
    let (_, numbers) = added_later(ram, boot.most());
    assert_eq!(boot.ram_frames, numbers);
    assert_eq!(boot.rip, notes.entry);
    assert!(boot.shared_info >= boot.ram_frames && boot.grant_base > boot.shared_info);
    assert_eq!(boot.state_base, boot.grant_base + boot.grant_frames);
    assert_eq!(boot.state_frames, state::frames(1, boot.ram_frames));
    assert_eq!(domain.frames, boot.state_base + boot.state_frames);

    // start_info, found the way the guest finds it: through rsi.
    let (entry, _) = walk(domain, boot.start_info).expect("start_info is mapped");
    let si = (entry & !0xfff) & ((1 << 52) - 1);
    let si_pfn = si / PAGE_SIZE;
    assert_eq!(
        notes.virt_base + si,
        boot.start_info,
        "the first mapping is linear"
    );
    let mut magic = [0; 32];
    domain
        .memory
        .read_slice(&mut magic, GuestAddress(si))
        .expect("inside");
    assert!(magic.starts_with(b"xen-3.0-x86_64\0"));
    assert_eq!(read_u64(domain, si + 32), ram);
    assert_eq!(
        read_u64(domain, si + 40),
        boot.shared_info * PAGE_SIZE,
        "a machine address"
    );
    let flags = read_u32(domain, si + 48);
    let store = read_u64(domain, si + 56);
    assert_eq!(read_u32(domain, si + 64), boot.store_port);
    let console = read_u64(domain, si + 72);
    assert_eq!(read_u32(domain, si + 80), boot.console_port);
    assert!(boot.store_port != 0 && boot.console_port != 0);
    let pt_base = read_u64(domain, si + 88);
    let nr_pt = read_u64(domain, si + 96);
    let mfn_list = read_u64(domain, si + 104);
    let mod_start = read_u64(domain, si + 112);
    let mod_len = read_u64(domain, si + 120);
    let mut line = vec![0; 1024];
    domain
        .memory
        .read_slice(&mut line, GuestAddress(si + 128))
        .expect("inside");
    assert_eq!(line.split(|&b| b == 0).next(), Some(cmdline.as_bytes()));
    assert_eq!(line[1023], 0);
    let first_p2m = read_u64(domain, si + 1152);
    let nr_p2m = read_u64(domain, si + 1160);

    // Order and the tables' own place.
    let kernel_end = kernel.end() / PAGE_SIZE;
    assert!(si_pfn >= kernel_end);
    assert_eq!(store, si_pfn + 1);
    assert_eq!(console, si_pfn + 2);
    assert_eq!(boot.cr3, si_pfn + 3);
    assert_eq!(pt_base, notes.virt_base + boot.cr3 * PAGE_SIZE);
    let tables = boot.cr3..boot.cr3 + nr_pt;
    let stack = (boot.rsp - notes.virt_base) / PAGE_SIZE - 1;
    assert_eq!(boot.rsp % PAGE_SIZE, 0);
    assert_eq!(stack, tables.end, "the stack follows the tables");

    // The mapping: linear from 0, only tables read-only, ends on 4 MiB with slack.
    let mut pfn = 0;
    let mut seen_l1 = Vec::new();
    while let Some((entry, path)) = walk(domain, notes.virt_base + pfn * PAGE_SIZE) {
        assert_eq!(entry >> 12, pfn);
        let bits = entry & 0xfff;
        let want = PRESENT | USER | ACCESSED | DIRTY | if tables.contains(&pfn) { 0 } else { RW };
        assert_eq!(bits, want, "frame {pfn:#x}");
        assert!(path.iter().all(|frame| tables.contains(frame)));
        assert_eq!(
            path[..3],
            [boot.cr3, boot.cr3 + 1, boot.cr3 + 2],
            "L4, L3, one L2"
        );
        if seen_l1.last() != Some(&path[3]) {
            seen_l1.push(path[3]);
        }
        pfn += 1;
        if pfn == 1 << 18 {
            break;
        }
    }
    assert_eq!(
        seen_l1,
        (boot.cr3 + 3..tables.end).collect::<Vec<_>>(),
        "L1s in order"
    );
    assert_eq!(pfn % 1024, 0, "ends on 4 MiB");
    assert!(pfn >= stack + 1 + 128, "512 KiB slack");
    assert!(pfn <= ram);
    for frame in [stack, si_pfn, store, console] {
        assert!(!tables.contains(&frame));
    }

    // Kernel bytes, and zeroes where the file has none.
    for segment in kernel.segments() {
        let bytes = kernel.bytes(segment);
        let mut found = vec![0; usize::try_from(segment.mem_size).expect("fits")];
        domain
            .memory
            .read_slice(&mut found, GuestAddress(segment.paddr))
            .expect("inside");
        let mut wanted = bytes.to_vec();
        wanted.resize(found.len(), 0);
        if let Some(va) = notes.hypercall_page
            && let Ok(at) = usize::try_from((va - notes.virt_base).wrapping_sub(segment.paddr))
            && at < found.len()
        {
            wanted[at..at + 4096].copy_from_slice(&found[at..at + 4096]);
        }
        assert!(found == wanted, "the segment at {:#x}", segment.paddr);
    }

    // The initrd, and that nothing overlaps it.
    assert_eq!(mod_len, initrd.len() as u64);
    let mut used = vec![0..kernel_end, si_pfn..pfn];
    if !initrd.is_empty() {
        let by_frame = flags & 8 != 0;
        assert_eq!(by_frame, notes.mod_start_pfn);
        let first = if by_frame {
            mod_start
        } else {
            (mod_start - notes.virt_base) / PAGE_SIZE
        };
        let mut found = vec![0; initrd.len()];
        domain
            .memory
            .read_slice(&mut found, GuestAddress(first * PAGE_SIZE))
            .expect("inside");
        assert!(found == initrd, "the initrd arrived");
        if by_frame {
            assert!(first >= pfn, "outside of the first mapping");
        } else {
            assert!(first >= kernel_end && first < si_pfn);
        }
        used.push(first..first + mod_len.div_ceil(PAGE_SIZE));
    }

    // The p2m: identity, read through the guest's tables.
    let entries = ram.next_multiple_of(512);
    for index in 0..entries {
        let va = mfn_list + index * 8;
        if va.is_multiple_of(PAGE_SIZE) {
            let (entry, path) = walk(domain, va).expect("the p2m is mapped");
            assert_eq!(entry & 0xfff, PRESENT | RW | USER | ACCESSED | DIRTY);
            let frame = entry >> 12;
            if let Some(wanted) = notes.init_p2m {
                assert_eq!(mfn_list, wanted);
                let owned = first_p2m..first_p2m + nr_p2m;
                assert!(owned.contains(&frame));
                assert!(path[1..].iter().all(|table| owned.contains(table)));
            } else {
                assert_eq!((first_p2m, nr_p2m), (0, 0));
            }
            let mut page = [0; 4096];
            domain
                .memory
                .read_slice(&mut page, GuestAddress(frame * PAGE_SIZE))
                .expect("inside");
            for (index, entry) in (index..).zip(page.chunks_exact(8)) {
                let want = if index < ram { index } else { u64::MAX };
                assert_eq!(entry, want.to_le_bytes());
            }
        }
    }
    if notes.init_p2m.is_some() {
        used.push(first_p2m..first_p2m + nr_p2m);
    }
    used.sort_by_key(|range| range.start);
    assert!(
        used.windows(2).all(|pair| pair[0].end <= pair[1].start),
        "overlap: {used:?}"
    );
    assert!(used.last().is_some_and(|range| range.end <= ram));

    // Rings and reserved grants.
    for frame in [store, console] {
        let mut page = [1; 4096];
        domain
            .memory
            .read_slice(&mut page, GuestAddress(frame * PAGE_SIZE))
            .expect("inside");
        assert!(page.iter().all(|&b| b == 0));
    }
    let grants = Gfn(boot.grant_base).base();
    assert_eq!(read_u64(domain, grants), 1 | console << 32);
    assert_eq!(read_u64(domain, grants + 8), 1 | store << 32);
    assert_eq!(read_u64(domain, grants + 16), 0);
    assert_eq!(boot.hypercall_page, notes.hypercall_page.unwrap_or(0));
}
