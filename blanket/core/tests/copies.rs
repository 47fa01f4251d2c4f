//! Copies of a core on a root of its own: the guest's tables are walked, with the
//! guest's rights, and the bits are set that a CPU would set.

mod common;

use blanket_abi::Va;
use blanket_abi::xen::errno;
use blanket_core::pte;
use common::guest::{Guest, KERNEL_RW, USER};
use common::{Setup, World};
use std::sync::atomic::Ordering::SeqCst;

/// Where the tests' pages are mapped, in the kernel's root.
const AT: u64 = 0xffff_c900_0000_0000;

/// A guest with two frames mapped at [`AT`], far apart from each other, whose core is
/// on a root of its own. The frames, and the table with the two leaves.
fn isolated(rights: u64) -> (World, [u64; 2], u64) {
    let (mut w, mut g) = World::booted(Setup::default());
    let frames = [g.alloc(), g.alloc() + 7];
    for (page, gfn) in frames.into_iter().enumerate() {
        g.map(&w.m, g.root, AT + ((page as u64) << 12), gfn, rights);
    }
    let table = g.leaf_table(&w.m, g.root, AT);
    w.cpu0(|c| c.fast.isolate());
    (w, frames, table)
}

#[test]
fn bytes_go_to_the_frames_that_the_guest_maps() {
    let (mut w, [first, second], table) = isolated(pte::P | pte::RW);
    let bytes: Vec<u8> = (0..200u8).collect();
    let at = Va(AT + 4096 - 100);
    assert_eq!(w.cpu0(|c| c.copy_out(at, &bytes)), Ok(()));
    assert_eq!(w.m.bytes(first)[4000].load(SeqCst), bytes[4]);
    assert_eq!(w.m.bytes(second)[0].load(SeqCst), bytes[100]);
    let mut back = [0; 200];
    assert_eq!(w.cpu0(|c| c.copy_in(at, &mut back)), Ok(()));
    assert_eq!(back[..], bytes[..]);
    for page in 0..2 {
        let leaf = w.m.words(table)[page].load(SeqCst);
        assert_eq!(leaf & (pte::A | pte::D), pte::A | pte::D);
    }
    w.audit();
}

#[test]
fn the_guests_rights_hold() {
    let (mut w, [first, _], table) = isolated(pte::P);
    let mut byte = [0; 1];
    assert_eq!(w.cpu0(|c| c.copy_in(Va(AT), &mut byte)), Ok(()));
    assert_eq!(w.cpu0(|c| c.copy_out(Va(AT), &[1])), Err(errno::EFAULT));
    // Not even with bits that say it was written before.
    let entry = first << 12 | pte::P | pte::A | pte::D;
    w.m.words(table)[0].store(entry, SeqCst);
    assert_eq!(w.cpu0(|c| c.copy_out(Va(AT), &[1])), Err(errno::EFAULT));
    assert_eq!(w.m.bytes(first)[0].load(SeqCst), 0);
    // What is not mapped, a large page, a frame that there is not.
    let missing = w.cpu0(|c| c.copy_in(Va(AT + (5 << 12)), &mut byte));
    assert_eq!(missing, Err(errno::EFAULT));
    w.m.words(table)[0].store(1 << 40 | KERNEL_RW, SeqCst);
    assert_eq!(w.cpu0(|c| c.copy_in(Va(AT), &mut byte)), Err(errno::EFAULT));
    // The hypervisor's own addresses.
    let own = blanket_abi::layout::WINDOW;
    assert_eq!(
        w.cpu0(|c| c.copy_in(Va(own), &mut byte)),
        Err(errno::EFAULT)
    );
    w.audit();
}

#[test]
fn the_root_in_use_counts_and_frames_come_on_demand() {
    let (mut w, [first, _], _) = isolated(KERNEL_RW);
    w.m.revoke(first);
    let mut byte = [0; 1];
    assert_eq!(w.cpu0(|c| c.copy_in(Va(AT), &mut byte)), Ok(()));
    assert!(w.m.present(first), "it was asked for");
    // User mode has its program, and nothing of the kernel's.
    w.cpu0(|c| c.to_user_mode());
    assert_eq!(w.cpu0(|c| c.copy_in(Va(USER), &mut byte)), Ok(()));
    assert_eq!(w.cpu0(|c| c.copy_in(Va(AT), &mut byte)), Err(errno::EFAULT));
    let direct = Va(Guest::direct(first));
    assert_eq!(w.cpu0(|c| c.copy_in(direct, &mut byte)), Err(errno::EFAULT));
    w.audit();
}

#[test]
fn the_fast_paths_stay_off() {
    let (mut w, _, _) = isolated(KERNEL_RW);
    w.cpu0(|c| {
        c.v.kernel_sp = Guest::direct(3);
        c.info_publish();
    });
    assert_eq!(w.fast[0].syscall, 0);
    // Also behind an NMI of the guest, which has a bit of its own.
    assert_ne!(w.fast[0].slow_iret & !1, 0);
}
