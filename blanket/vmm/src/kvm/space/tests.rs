//! Tests of the core's address space inside KVM.

use blanket_abi::device::IMAGE_MAGIC;
use blanket_abi::layout::{POOL_PTES, WINDOW_PTES};

use super::*;
use crate::builder::{self, Config};
use crate::kernel::Kernel;

pub const POOL_PAGES: u64 = 700;
const VCPUS: u32 = 3;

/// An image of six pages: header and text, entry section, text, read-only data
/// with one SMAP site of each kind, data, and a page of zeros with the IDT.
pub fn image() -> Image {
    let mut bytes = vec![0u8; 5 * 4096];
    let words = [
        IMAGE_MAGIC,
        u64::from(blanket_abi::device::API_VERSION) | (size_of::<Switch>() as u64) << 32,
        0x1000,
        0x2000,
        0x3000,
        0x4000,
        0x6000,
        0x5000,
        0x2000,
        0x5000,
        0x1000,
        0x3000,
        0x3010,
        0x3010,
        0x3020,
    ];
    let put = |bytes: &mut Vec<u8>, at: usize, words: &[u64]| {
        for (i, word) in words.iter().enumerate() {
            bytes[at + 8 * i..at + 8 * i + 8].copy_from_slice(&word.to_le_bytes());
        }
    };
    put(&mut bytes, 0, &words);
    for at in [0x2100, 0x2200] {
        bytes[at..at + 3].copy_from_slice(&[0x0f, 0x1f, 0x00]);
    }
    let clac = blanket_abi::device::SMAP_CLAC;
    put(&mut bytes, 0x3000, &[0x2100, 0x2200 | clac]);
    // A jump in the entry section.
    bytes[0x1100..0x1105].copy_from_slice(&[0x0f, 0x1f, 0x44, 0x00, 0x00]);
    put(&mut bytes, 0x3010, &[0x1100, 0x1080]);
    Image::parse(bytes.leak()).expect("a good image")
}

fn domain() -> Domain {
    let config = Config {
        memory: 32 << 20,
        max_memory: 0,
        cmdline: String::new(),
        verbose: false,
        vcpus: 1,
        mergeable: false,
        inject: false,
    };
    builder::build(&Kernel::bare(vec![0x90; 64]), None, &config).expect("it fits")
}

pub fn space(smap: bool) -> (Space, Domain) {
    space_of(smap, false)
}

pub fn space_of(smap: bool, isolate: bool) -> (Space, Domain) {
    let domain = domain();
    let space = Space::build(&Plan {
        image: &image(),
        domain: &domain,
        vcpus: VCPUS,
        pool: POOL_PAGES,
        xcr0_mask: 7,
        tsc_khz: 1_000_000,
        features: 0,
        quirks: 0,
        smap,
        isolate,
        hidden: Hidden::default(),
        cpuid: &[],
    });
    (space.expect("it fits"), domain)
}

impl Space {
    /// The level-4 entries that the core puts into guests' roots.
    pub fn guest_hole(&self) -> Vec<u64> {
        let at = self.vm_page + offset_of!(VmPage, hole) as u64;
        (0..16)
            .map(|slot| {
                let word = self.word(at + slot * 8).expect("inside");
                word.load(Ordering::Relaxed)
            })
            .collect()
    }

    /// What the CPU finds at `va`: physical address, and whether all levels
    /// allow writes, access from CPL 3, and execution.
    fn walk(&self, va: u64) -> Option<(u64, bool, bool, bool)> {
        let mut table = self.root;
        let (mut rw, mut user, mut exec) = (true, true, true);
        for level in [4, 3, 2, 1] {
            let word = self.word(table + index(va, level) * 8).ok()?;
            let word = word.load(Ordering::Relaxed);
            if word & entry::P == 0 {
                return None;
            }
            rw &= word & entry::RW != 0;
            user &= word & entry::US != 0;
            exec &= word & entry::NX == 0;
            let address = word & entry::FRAME;
            if level == 1 {
                return Some((address, rw, user, exec));
            }
            table = address - self.base;
        }
        None
    }
}

/// Every page that any root maps is the core's, the guest's frame in the window,
/// or the M2P; with the rights that its kind has.
#[test]
fn the_hole_maps_what_it_should_and_nothing_else() {
    let (space, domain) = space(false);
    let (base, bytes, _) = space.slot();
    let frames = domain.frames;
    let end = space.next;
    let mut seen = 0u64;
    for slot in 0..512u64 {
        let top = space.word(space.root + slot * 8).expect("in the root");
        let present = top.load(Ordering::Relaxed) & entry::P != 0;
        assert_eq!(present, (256..260).contains(&slot), "slot {slot}");
    }
    let pages = |from: u64, count: u64| (0..count).map(move |n| from + n * PAGE_SIZE);
    for (gfn, va) in (0..).zip(pages(WINDOW, frames)) {
        let found = space.walk(va);
        assert_eq!(
            found,
            Some((RAM_BASE + gfn * PAGE_SIZE, true, false, false))
        );
        // The same entry, as one of the array.
        assert!(space.walk(WINDOW_PTES + gfn * 8).is_some_and(|e| !e.1));
        seen += 1;
    }
    assert_eq!(space.walk(WINDOW + frames * PAGE_SIZE), None);
    for va in pages(POOL, POOL_PAGES) {
        let (address, rw, user, exec) = space.walk(va).expect("a pool page");
        assert!(address >= base && address + PAGE_SIZE <= base + end);
        assert!(rw && !user && !exec);
    }
    assert_eq!(space.walk(POOL + POOL_PAGES * PAGE_SIZE), None);
    assert!(space.walk(POOL_PTES).is_some_and(|e| !e.1 && !e.2));
    for (gfn, va) in (0..).step_by(512).zip(pages(M2P, frames.div_ceil(512))) {
        let (address, rw, user, exec) = space.walk(va).expect("a page of the M2P");
        assert!(!rw && user && !exec);
        let first = space.word(address - base).expect("inside");
        assert_eq!(first.load(Ordering::Relaxed), gfn);
    }
    // Text runs and is not written, data is written and does not run.
    for (page, rw, exec) in [
        (0, false, true),
        (1, false, true),
        (2, false, true),
        (3, false, false),
        (4, true, false),
        (5, true, false),
    ] {
        let found = space.walk(IMAGE + page * PAGE_SIZE).expect("image");
        assert_eq!(
            (found.1, found.2, found.3),
            (rw, false, exec),
            "page {page}"
        );
    }
    for id in 0..u64::from(VCPUS) {
        let at = VCPU + id * VCPU_STRIDE;
        // Guards below the stacks.
        for guard in [area::STACK - PAGE_SIZE, area::IST, area::HW + 0x3000] {
            assert_eq!(space.walk(at + guard), None);
        }
        let entry = space.walk(at + area::ENTRY).expect("entry section");
        assert_eq!(Some(entry), space.walk(IMAGE + 0x1000));
        assert!(space.walk(at + area::PV).is_some_and(|e| e.1 && !e.2));
    }
    assert_eq!(
        space.walk(VCPU + u64::from(VCPUS) * VCPU_STRIDE + area::HW),
        None
    );
    assert!(seen == frames && end <= bytes);
}

#[test]
fn smap_sites_are_patched_only_on_demand() {
    for smap in [false, true] {
        let (space, _) = space(smap);
        let text = |at: u64| {
            let (address, ..) = space.walk(IMAGE + 0x2000).expect("text");
            let word = space.word(address - space.base + at).expect("inside");
            word.load(Ordering::Relaxed) & 0xff_ffff
        };
        let want = if smap {
            (0xcb_010f, 0xca_010f)
        } else {
            (0x00_1f0f, 0x00_1f0f)
        };
        assert_eq!((text(0x100), text(0x200)), want);
    }
}

#[test]
fn events_are_raised_once_until_they_are_seen() {
    let (space, _) = space(false);
    assert_eq!(space.raise(5).expect("a port"), Some(0));
    assert_eq!(
        space.raise(70).expect("a port"),
        None,
        "an interrupt is on its way"
    );
    assert!(matches!(space.raise(4096), Err(Error::NoPort(4096))));
    // Bound to vCPU 2, whose pending word is another one.
    let owners = space.vm_page + offset_of!(VmPage, port_vcpu) as u64;
    space
        .word(owners + 8)
        .expect("inside")
        .store(2 << 8, Ordering::Relaxed);
    assert_eq!(space.raise(9).expect("a port"), Some(2));
    // A number that no vCPU has is not followed.
    space
        .word(owners + 16)
        .expect("inside")
        .store(0xff, Ordering::Relaxed);
    assert_eq!(space.raise(16).expect("a port"), None);
}

#[test]
fn exits_are_read_within_bounds() {
    let (space, _) = space(false);
    assert_eq!(space.text(0, u64::MAX).expect("a vCPU").len(), RUN_DATA);
    assert!(matches!(space.exit(VCPUS), Err(Error::NoVcpu(VCPUS))));
    assert_eq!(space.exit(1).expect("a vCPU"), (0, [0; 4]));
}
