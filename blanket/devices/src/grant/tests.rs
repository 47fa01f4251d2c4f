use std::sync::atomic::{AtomicBool, AtomicU32};

use blanket_abi::xen::domid::BACKEND;
use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;

/// A table of one frame at frame 8, of a VM with 8 frames of RAM.
fn table() -> (Arc<GuestMemory>, Arc<Grants>) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 16 << 12)]).expect("memory");
    let memory = Arc::new(memory);
    let grants = Grants::new(&memory, 8, Gfn(8), 1).expect("inside");
    (memory, Arc::new(grants))
}

#[test]
fn a_granted_page_is_reached_and_marked() {
    let (memory, grants) = table();
    let at = GuestAddress((8 << 12) + 5 * 8);
    memory.write_obj([1u32, 3], at).expect("inside");
    memory
        .write_obj(0x1234_5678u32, GuestAddress(3 << 12 | 16))
        .expect("inside");
    let one = grants.map(5, true).expect("granted");
    assert_eq!(one.page().load(16), 0x1234_5678);
    let two = grants.map(5, false).expect("granted twice");
    drop(one);
    assert_eq!(
        memory.read_obj::<u32>(at).expect("inside"),
        u32::from(flag::PERMIT_ACCESS | flag::READING)
    );
    drop(two);
    assert_eq!(memory.read_obj::<u32>(at).expect("inside"), 1);
}

#[test]
fn frames_that_are_not_ram_are_refused_and_nothing_stays_marked() {
    let (memory, grants) = table();
    for frame in [8u32, 9, 15, 16, u32::MAX] {
        memory
            .write_obj([1u32, frame], GuestAddress(8 << 12))
            .expect("inside");
        let error = grants.map(0, true).expect_err("not RAM");
        assert!(matches!(error, Error::Frame { .. }), "{error}");
        assert_eq!(
            memory
                .read_obj::<u32>(GuestAddress(8 << 12))
                .expect("inside"),
            1
        );
    }
    for gref in [512, 513, 1 << 20, u32::MAX] {
        let error = grants.map(gref, false).expect_err("no such entry");
        assert!(
            matches!(
                error,
                Error::Denied {
                    why: Denied::BadRef,
                    ..
                }
            ),
            "{error}"
        );
    }
}

/// One entry, and a guest that acts between the backend's load and its exchange.
struct Entry {
    head: AtomicU32,
    frame: AtomicU32,
    /// What the guest writes before the next exchanges, last first.
    guest: std::cell::RefCell<Vec<u32>>,
}

impl Entry {
    fn new(flags: u16, dom: u16, frame: u32) -> Self {
        Self {
            head: AtomicU32::new(head(flags, dom)),
            frame: AtomicU32::new(frame),
            guest: Vec::new().into(),
        }
    }
    fn flags(&self) -> u16 {
        (self.head.load(Ordering::SeqCst) & 0xffff) as u16
    }
}

fn head(flags: u16, dom: u16) -> u32 {
    u32::from(flags) | u32::from(dom) << 16
}

impl Entries for Entry {
    fn head(&self, _: u32) -> u32 {
        self.head.load(Ordering::SeqCst)
    }
    fn exchange_head(&self, _: u32, old: u32, new: u32) -> Result<(), u32> {
        if let Some(word) = self.guest.borrow_mut().pop() {
            self.head.store(word, Ordering::SeqCst);
        }
        self.head
            .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .map(|_| ())
    }
    fn clear_flags(&self, _: u32, bits: u16) {
        self.head.fetch_and(!u32::from(bits), Ordering::SeqCst);
    }
    fn frame(&self, _: u32) -> u32 {
        self.frame.load(Ordering::SeqCst)
    }
}

#[test]
fn a_grant_is_marked_while_it_is_used() {
    let e = Entry::new(flag::PERMIT_ACCESS, BACKEND, 77);
    let mut pins = Pins::default();
    assert_eq!(acquire(&e, 512, 8, BACKEND, true), Ok(Gfn(77)));
    pins.add(true);
    assert_eq!(
        e.flags(),
        flag::PERMIT_ACCESS | flag::READING | flag::WRITING
    );
    assert_eq!(acquire(&e, 512, 8, BACKEND, false), Ok(Gfn(77)));
    pins.add(false);
    release(&e, 8, pins.remove(true));
    assert_eq!(e.flags(), flag::PERMIT_ACCESS | flag::READING);
    release(&e, 8, pins.remove(false));
    assert_eq!(e.flags(), flag::PERMIT_ACCESS);
    assert!(pins.is_unused());
    assert_eq!(pins.remove(true), 0, "nothing to end");
}

#[test]
fn denials() {
    let ro = Entry::new(flag::PERMIT_ACCESS | flag::READONLY, BACKEND, 1);
    assert_eq!(acquire(&ro, 512, 0, BACKEND, true), Err(Denied::ReadOnly));
    assert_eq!(acquire(&ro, 512, 512, BACKEND, false), Err(Denied::BadRef));
    assert_eq!(
        acquire(&ro, 512, u32::MAX, BACKEND, false),
        Err(Denied::BadRef)
    );
    assert_eq!(acquire(&ro, 512, 0, 3, false), Err(Denied::NotGranted));
    assert_eq!(acquire(&ro, 512, 0, BACKEND, false), Ok(Gfn(1)));
    for kind in [0, 2, 3] {
        let e = Entry::new(kind, BACKEND, 1);
        assert_eq!(acquire(&e, 512, 0, BACKEND, false), Err(Denied::NotGranted));
        assert_eq!(e.flags(), kind, "untouched");
    }
}

#[test]
fn a_guest_that_keeps_changing_the_entry_gives_up_nothing() {
    let e = Entry::new(flag::PERMIT_ACCESS, BACKEND, 1);
    // Revoked between the load and the exchange.
    e.guest.borrow_mut().push(0);
    assert_eq!(acquire(&e, 512, 0, BACKEND, true), Err(Denied::NotGranted));
    assert_eq!(e.flags(), 0);
    // Toggles for ever.
    let e = Entry::new(flag::PERMIT_ACCESS, BACKEND, 1);
    for i in 0..100u16 {
        e.guest
            .borrow_mut()
            .push(head(flag::PERMIT_ACCESS | (i & 1) << 5, BACKEND));
    }
    assert_eq!(acquire(&e, 512, 0, BACKEND, true), Err(Denied::Unstable));
    assert_eq!(e.flags() & (flag::READING | flag::WRITING), 0);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4000, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn acquire_takes_only_what_is_granted(
        word in any::<u32>(), changes in prop::collection::vec(any::<u32>(), 0..8), write in any::<bool>(),
        likely in any::<bool>(),
    ) {
        // Half of the words are grants to the backend with other bits at random.
        let fix = |w: u32| if likely { w & 0xfffc | 1 } else { w };
        let e = Entry::new(0, 0, 5);
        e.head.store(fix(word), Ordering::SeqCst);
        let changes: Vec<u32> = changes.into_iter().map(fix).collect();
        e.guest.borrow_mut().clone_from(&changes);
        let result = acquire(&e, 512, 3, BACKEND, write);
        // What the guest wrote last: the list is taken from its end.
        let left = e.guest.borrow().len();
        let last = changes.get(left).copied().unwrap_or(fix(word));
        let need = u32::from(flag::READING | if write { flag::WRITING } else { 0 });
        let granted = last & 3 == 1 && last >> 16 == u32::from(BACKEND);
        let writable = !write || last & u32::from(flag::READONLY) == 0;
        match result {
            Ok(frame) => {
                prop_assert!(granted && writable);
                prop_assert_eq!(frame, Gfn(5));
                prop_assert_eq!(e.head(3), last | need);
            }
            Err(denied) => {
                prop_assert_eq!(e.head(3), last, "as the guest left it");
                match denied {
                    Denied::NotGranted => prop_assert!(!granted),
                    Denied::ReadOnly => prop_assert!(granted && !writable),
                    Denied::Unstable => prop_assert_eq!(changes.len() - left, 5),
                    Denied::BadRef => prop_assert!(false, "3 is below 512"),
                }
            }
        }
    }

    #[test]
    fn marks_follow_the_counts(uses in prop::collection::vec(any::<(bool, bool)>(), 1..60)) {
        let e = Entry::new(flag::PERMIT_ACCESS, BACKEND, 9);
        let mut pins = Pins::default();
        let (mut readers, mut writers) = (0u32, 0u32);
        for (begin, write) in uses {
            let count = if write { &mut writers } else { &mut readers };
            if begin {
                acquire(&e, 512, 0, BACKEND, write).unwrap();
                pins.add(write);
                *count += 1;
            } else if *count > 0 {
                *count -= 1;
                release(&e, 0, pins.remove(write));
            }
            let f = e.flags();
            prop_assert_eq!(f & flag::WRITING != 0, writers > 0);
            prop_assert_eq!(f & flag::READING != 0, readers + writers > 0);
        }
    }
}

/// The guest grants and revokes as Linux does (`gnttab_end_foreign_access_ref_v1`)
/// while a backend uses the grant: the guest never succeeds to revoke a grant that
/// is in use. The guest goes on until the two have met often enough, however the host
/// schedules them.
#[test]
fn revoking_and_using_exclude_each_other() {
    struct Shared(AtomicU32);
    impl Entries for Shared {
        fn head(&self, _: u32) -> u32 {
            self.0.load(Ordering::SeqCst)
        }
        fn exchange_head(&self, _: u32, old: u32, new: u32) -> Result<(), u32> {
            self.0
                .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
                .map(|_| ())
        }
        fn clear_flags(&self, _: u32, bits: u16) {
            self.0.fetch_and(!u32::from(bits), Ordering::SeqCst);
        }
        fn frame(&self, _: u32) -> u32 {
            1
        }
    }
    let entry = Shared(AtomicU32::new(0));
    const MEETINGS: u32 = 1_000;
    const ROUNDS: u32 = 50_000_000;
    let granted = AtomicBool::new(false);
    let stop = AtomicBool::new(false);
    let taken = AtomicU32::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            for _ in 0..ROUNDS {
                if taken.load(Ordering::SeqCst) >= MEETINGS {
                    break;
                }
                granted.store(true, Ordering::SeqCst);
                entry
                    .0
                    .store(head(flag::PERMIT_ACCESS, BACKEND), Ordering::SeqCst);
                std::thread::yield_now();
                loop {
                    let word = entry.0.load(Ordering::SeqCst);
                    let used = word & u32::from(flag::READING | flag::WRITING) != 0;
                    if !used
                        && entry
                            .0
                            .compare_exchange(
                                word,
                                word & !0xffff,
                                Ordering::SeqCst,
                                Ordering::SeqCst,
                            )
                            .is_ok()
                    {
                        granted.store(false, Ordering::SeqCst);
                        break;
                    }
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::SeqCst);
        });
        while !stop.load(Ordering::SeqCst) {
            let write = taken.load(Ordering::SeqCst).is_multiple_of(2);
            if acquire(&entry, 512, 0, BACKEND, write).is_ok() {
                for _ in 0..10 {
                    assert!(granted.load(Ordering::SeqCst), "revoked while in use");
                }
                taken.fetch_add(1, Ordering::SeqCst);
                release(&entry, 0, flag::READING | flag::WRITING);
            }
            std::thread::yield_now();
        }
    });
    let taken = taken.into_inner();
    assert!(taken >= MEETINGS, "the two met {taken} times");
}
