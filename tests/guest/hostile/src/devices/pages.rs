//! Grants of a disk's requests that are none, of what is not the guest's, of too little,
//! and that go while they are used.

use core::sync::atomic::Ordering::SeqCst;

use blanket_abi::xen::domid;
use blanket_abi::xen::grant::flag;

use super::blkfront::{Blkfront, WINDOW, op, request, segment};
use super::guest::{FREE_GREFS, claim, revoke, set_grant, share};
use crate::kernel::Kernel;
use crate::rng::Rng;

/// A grant that nothing can be done with.
fn none(k: &Kernel, rng: &mut Rng) -> u32 {
    let gref = FREE_GREFS + rng.below(100) as u32;
    let own = k.scratch_gfn(20);
    match rng.below(9) {
        0 => set_grant(gref, 0, domid::BACKEND, own),
        // Transfer, transitive.
        1 => set_grant(gref, rng.pick(&[2, 3]), domid::BACKEND, own),
        2 => set_grant(
            gref,
            flag::PERMIT_ACCESS,
            rng.pick(&[1, 2, 0x7ff0, 0xffff]),
            own,
        ),
        // Shared info, the grant table itself, beyond, the largest.
        3 => set_grant(gref, flag::PERMIT_ACCESS, domid::BACKEND, k.shared_info),
        4 => {
            let table = k.shared_info + 1 + rng.below(4);
            set_grant(gref, flag::PERMIT_ACCESS, domid::BACKEND, table);
        }
        5 => {
            let beyond = rng.pick(&[
                k.nr_pages,
                k.nr_pages + 64,
                1 << 20,
                0xffff_ffff,
                0x7fff_ffff,
            ]);
            set_grant(gref, flag::PERMIT_ACCESS, domid::BACKEND, beyond);
        }
        // Entries beyond the table, or of frames of it that were never asked for.
        6 => return rng.pick(&[1 << 20, u32::MAX, 1 << 31, 0x7fff_ffff]),
        7 => return 512 + rng.below(10_000) as u32,
        _ => return 300 + rng.below(200) as u32,
    }
    gref
}

pub fn attack(k: &Kernel, disk: &mut Blkfront, rng: &mut Rng) {
    for _ in 0..16 {
        let kind = rng.pick(&[op::READ, op::WRITE]);
        let sector = rng.below(WINDOW - 16);
        let id = disk.id();
        // The second of two: the first must be let go of.
        let gref = none(k, rng);
        let segments = [segment(disk.data(5).gref(), 0, 7), segment(gref, 0, 7)];
        let skip = rng.below(2) as usize;
        let slot = request(kind, 2 - skip as u8, id, sector, &segments[skip..]);
        claim(disk.ask(&slot) == -1, "a grant that is none");
        claim(revoke(disk.data(5).gref()), "no page is kept by a failure");
        share(disk.data(5), false);
        if (FREE_GREFS..300).contains(&gref) {
            set_grant(gref, 0, 0, 0);
        }
    }
    read_only(disk, rng);
    in_flight(disk, rng);
    strange(k, disk, rng);
}

/// A page that may be read only is not read into, and may be written from.
fn read_only(disk: &mut Blkfront, rng: &mut Rng) {
    let page = disk.data(6);
    let gref = share(page, true);
    page.fill(|_| 0x5a5a_5a5a);
    let sector = rng.below(WINDOW - 8);
    let id = disk.id();
    let read = disk.ask(&request(op::READ, 1, id, sector, &[segment(gref, 0, 7)]));
    claim(read == -1, "no reading into a read-only page");
    claim(
        (0..1024).all(|n| page.word(n * 4).load(SeqCst) == 0x5a5a_5a5a),
        "nothing came into it",
    );
    let id = disk.id();
    let written = disk.ask(&request(op::WRITE, 1, id, sector, &[segment(gref, 0, 7)]));
    claim(written == 0, "writing from it");
    share(page, false);
}

/// Grants that are taken back, and changed, while requests use them.
fn in_flight(disk: &mut Blkfront, rng: &mut Rng) {
    for _ in 0..8 {
        let page = disk.data(7);
        let gref = share(page, false);
        for _ in 0..8 {
            let id = disk.id();
            let kind = rng.pick(&[op::READ, op::WRITE]);
            let of = [segment(gref, 0, 7); 11];
            disk.put(&request(kind, 11, id, rng.below(WINDOW / 2), &of));
        }
        disk.push();
        for _ in 0..rng.below(300) {
            match rng.below(4) {
                // As it is done right.
                0 => {
                    revoke(gref);
                }
                // As it is not: in use or not, to another frame, or with the marks that
                // only the backend sets.
                1 => set_grant(gref, 0, 0, 0),
                2 => set_grant(
                    gref,
                    flag::PERMIT_ACCESS | (rng.next() as u16 & 0x1c),
                    domid::BACKEND,
                    rng.pick(&[page.gfn(), page.gfn() + 1, 0xffff_ffff]),
                ),
                _ => {
                    share(page, rng.once_in(2));
                }
            }
        }
        claim(disk.answers(|_| {}), "requests are answered");
        set_grant(gref, 0, 0, 0);
        share(page, false);
    }
}

/// Frames that are the guest's, and should not be read into: the ring itself, and a page
/// table, which is so changed behind the core's back.
fn strange(k: &Kernel, disk: &mut Blkfront, rng: &mut Rng) {
    // Of the ring only where no slot is: the rest is in use by this kernel too.
    let ring = disk.ring(0).gref();
    let id = disk.id();
    let written = disk.ask(&request(
        op::WRITE,
        1,
        id,
        rng.below(64),
        &[segment(ring, 0, 7)],
    ));
    claim(written == 0, "a ring can be written to a disk");
    let gref = FREE_GREFS + 101;
    let table = k.scratch_gfn(rng.below(crate::tables::ROOTS));
    set_grant(gref, flag::PERMIT_ACCESS, domid::BACKEND, table);
    for n in 0..4 {
        let id = disk.id();
        // Sectors 0 to 6: the last has the slots of the kernel.
        let read = disk.ask(&request(op::READ, 1, id, n * 8, &[segment(gref, 0, 6)]));
        claim(read == 0 || read == -1, "a read into a page table");
        crate::tables::enter_root(k, rng.below(crate::tables::ROOTS));
        crate::tables::ext(blanket_abi::xen::hypercall::mmuext::NEW_BASEPTR, k.root, 0);
    }
    claim(revoke(gref), "the page table is not in use");
}
