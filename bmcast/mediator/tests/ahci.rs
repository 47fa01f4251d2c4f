//! What an AHCI mediator does, case by case, on a model of a controller.

#[allow(dead_code)]
mod common;

use bmcast_image::Sectors;
use bmcast_mediator::Platform as _;

use common::blocks::VISIBLE;
use common::hba::*;
use common::{Kind, MOST, World};

#[test]
fn firmware_polls() {
    for number in [0, 5] {
        let mut world = World::new(number);
        world.start(false);
        world.polled(Kind::Identify, 0, 0).unwrap();
        world.polled(Kind::Read, 3, MOST).unwrap();
        world.polled(Kind::Write, 10, 2).unwrap();
        world.polled(Kind::Read, 8, 8).unwrap();
        world.polled(Kind::Fua, 30, 3).unwrap();
        world.polled(Kind::Trim, 50, 5).unwrap();
        world.polled(Kind::Flush, 0, 0).unwrap();
        assert_ne!(world.polled(Kind::Strange, 0, 1).unwrap_err() & 1, 0);
        assert_ne!(world.polled(Kind::Read, VISIBLE - 1, 2).unwrap_err() & 1, 0);
        assert_ne!(world.polled(Kind::Write, VISIBLE, 1).unwrap_err() & 1, 0);
        world.polled(Kind::Other, 0, 0).unwrap();
        world.polled(Kind::Read, VISIBLE - 1, 1).unwrap_or(0);
        assert!(world.hba.own_commands > 3);
        world.write(IS, !0);
        world.finish();
    }
}

#[test]
fn linux_queues() {
    for by_message in [false, true] {
        let mut world = World::new(1);
        world.by_message = by_message;
        world.start(true);
        world.issue(Kind::Identify, 0, 0, false).unwrap();
        world.settle();
        for n in 0..31 {
            let kind = if n % 3 == 0 { Kind::Write } else { Kind::Read };
            world.issue(kind, n * 7, 5, true).unwrap();
        }
        world.settle();
        assert_eq!((world.done, world.failed, world.dropped), (32, 0, 0));
        world.finish();
    }
}

/// The VMM has its turn although the guest always has something outstanding.
#[test]
fn a_held_read_does_not_starve() {
    let mut world = World::new(0);
    world.blocks.insert(Sectors {
        start: 0,
        count: 64,
    });
    world.hba.fresh[..64].fill(true);
    world.hba.disk = (0..DISK).flat_map(common::blocks::image).collect();
    world.start(true);
    world.issue(Kind::Read, 100, 8, true).unwrap();
    let held = |world: &World| {
        let mut commands = world.slots.iter().flatten();
        commands.any(|command| command.sectors[0].start == 100)
    };
    let mut turns = 0;
    while held(&world) {
        turns += 1;
        assert!(turns < 500, "the read starves");
        for n in 0..4 {
            world.issue(Kind::Read, n * 8, 8, true);
        }
        world.world(turns);
        if world.interrupted() {
            world.handler();
        }
    }
}

/// A read that was issued is on the device.
fn one_own(world: &mut World) {
    world.issue(Kind::Read, 40, 8, true).unwrap();
    world.blocks.fetched();
    world.poll();
    assert!(
        world.hba.get(CLBU) != 0,
        "a command of the VMM's is on the device"
    );
}

#[test]
fn registers_while_the_vmm_uses_the_port() {
    let mut world = World::new(2);
    world.start(true);
    let before: Vec<u32> = (0..15).map(|n| world.hba.get(n * 4)).collect();
    one_own(&mut world);
    for (n, value) in (0..).zip(&before) {
        let register = n * 4;
        let shown = world.read(register);
        match register {
            SACT | CI => assert_eq!(shown, 1),
            _ => assert_eq!(shown, *value, "register {register:#x}"),
        }
    }
    assert_eq!(world.hba.get(IE), 0);
    // What is cleared, or switched on, meanwhile.
    world.write(IS, !0);
    world.write(IE, 0x11);
    assert_eq!(world.read(IE), 0x11);
    assert!(world.hba.get(CLBU) != 0);
    assert!(!world.transparent());
    while world.hba.get(CLBU) != 0 {
        world.world(0);
    }
    assert_eq!(world.hba.get(IE), 0x11);
}

#[test]
fn the_guest_stops_the_port_meanwhile() {
    for (eager, stop_reads) in [(3, 0), (7, 3), (0, 2)] {
        let mut world = World::new(0);
        world.hba.eager = eager;
        world.hba.stop_reads = stop_reads;
        world.start(true);
        one_own(&mut world);
        // A device that never gets there is reset.
        world.hba.hangs = eager == 0;
        world.recover(false);
        assert_eq!(world.blocks.failures, u32::from(eager == 0));
        assert_eq!(world.dropped, 1);
        assert_eq!(world.read(TFD), 0x50);
        world.hba.eager = 5;
        world.finish();
    }
}

#[test]
fn a_disk_that_is_pulled_out_meanwhile() {
    let mut world = World::new(0);
    world.start(true);
    one_own(&mut world);
    world.hba.plug(false);
    assert!(!world.hba.line());
    world.poll();
    assert_eq!(world.blocks.failures, 1);
    assert!(world.hba.line(), "the guest is told");
    assert_eq!(world.read(IS), 1 << 22 | 1 << 6);
    assert_ne!(world.read(SERR) & 1 << 26, 0);
    for n in 0..100 {
        world.world(n);
    }
    assert!(world.hba.get(CLBU) == 0);
    world.hba.plug(true);
    world.recover(true);
    world.finish();
}

/// The status that the guest sees is that of its own last command.
#[test]
fn a_failure_of_the_vmm_s_own() {
    let mut world = World::new(0);
    world.start(true);
    world.hba.fail_own = 1;
    one_own(&mut world);
    while world.blocks.failures == 0 {
        world.world(0);
        assert_eq!(world.read(TFD) & 1, 0);
        assert_eq!(world.read(IS) & TFES, 0);
        assert!(!world.interrupted());
    }
    world.settle();
    assert_eq!((world.done, world.failed), (1, 0));
    world.finish();
}

#[test]
fn a_device_that_never_answers_the_vmm() {
    let mut world = World::new(0);
    world.start(true);
    one_own(&mut world);
    world.hba.hangs = true;
    world.hba.pass(29_000_000);
    world.poll();
    assert_eq!(world.blocks.failures, 0);
    world.hba.pass(2_000_000);
    world.poll();
    assert_eq!(world.blocks.failures, 1);
    world.settle();
    assert_eq!((world.done, world.failed), (1, 0));
    world.finish();
}

#[test]
fn what_is_refused_leaves_no_trace() {
    let mut world = World::new(0);
    world.start(true);
    // Two in other slots wait, and are dropped with it.
    for _ in 0..3 {
        world.issue(Kind::Strange, 0, 1, true).unwrap();
    }
    for n in 0..100 {
        world.world(n);
    }
    assert!(world.interrupted());
    // By a command of the same kind, so that the error's log names it.
    assert_eq!(world.hba.seen, [0x60]);
    assert_eq!(world.read(SACT), 7);
    assert_eq!(world.read(TFD) & 1, 1);
    // The header is the guest's again as soon as the port is stopped: `abandon` looks.
    world.handler();
    assert_eq!((world.failed, world.dropped), (1, 3));
    world.issue(Kind::Strange, 0, 1, false).unwrap();
    world.world(0);
    world.write_global(GHC, 1);
    world.abandon();
    world.start(true);
    world.hba.pass(2_000_000);
    world.finish();
}

/// A command in a slot that has become free between two reads of the mediator's.
#[test]
fn a_slot_is_used_again_at_once() {
    for eager in 1..40 {
        let mut world = World::new(0);
        world.blocks.insert(Sectors {
            start: 0,
            count: 256,
        });
        world.hba.fresh.fill(true);
        world.hba.disk = (0..DISK).flat_map(common::blocks::image).collect();
        world.hba.eager = eager;
        world.start(true);
        for n in 0..50 {
            world.issue(Kind::Read, n, 8, true).unwrap();
            for _ in 0..400 {
                if world.read(SACT) == 0 {
                    break;
                }
            }
            let status = world.read(IS);
            world.write(IS, status);
            world.look();
            assert!(!world.active(), "a command is lost");
        }
    }
}

#[test]
fn queued_bits_that_are_not_issued() {
    let mut world = World::new(0);
    world.start(true);
    world.write(SACT, 6);
    assert_eq!(world.read(SACT), 6);
    assert!(!world.transparent());
    world.stop();
    assert_eq!(world.read(SACT), 0);
    // A port that is off takes none.
    world.write(SACT, 4);
    world.write(CI, 4);
    assert_eq!(world.read(SACT) | world.read(CI), 0);
    world.write(CMD, FRE | ST);
    assert_eq!(world.read(SACT) | world.read(CI), 0);
    world.finish();
}

/// Between its begin and its end the device answers nobody.
#[test]
fn software_reset() {
    let mut world = World::new(0);
    world.start(true);
    world.issue(Kind::Read, 40, 8, true).unwrap();
    world.blocks.fetched();
    world.hba.eager = 3;
    world.recover(false);
    for (control, flags) in [(4, 1 << 8 | 1 << 10), (0, 0)] {
        let mut fis = [0; 20];
        fis[0] = 0x27;
        fis[15] = control;
        world.build(0, fis, 0, flags);
        world.write(CI, 1);
        for n in 0..50 {
            world.world(n);
        }
        assert_eq!(world.read(CI), 0);
        assert_eq!(world.hba.get(CLBU), 0);
        assert_eq!(world.blocks.failures, 0);
        if control != 0 {
            world.hba.eager = 0;
            let before = world.hba.own_commands;
            for n in 0..50 {
                world.hba.pass(10_000);
                world.world(n);
            }
            assert_eq!(world.hba.own_commands, before);
        }
    }
    world.finish();
}

/// A driver that neither takes interrupts nor clears their cause.
#[test]
fn interrupts_that_nobody_takes() {
    let mut world = World::new(0);
    world.start(true);
    world.hba.port[5] |= 1;
    for start in [0, 40, 80] {
        let slot = world.issue(Kind::Read, start, 8, false).unwrap();
        let since = world.hba.now();
        while world.read(CI) & 1 << slot != 0 {
            world.world(0);
        }
        assert!(world.hba.now() - since < 2_000_000);
        world.look();
    }
}

#[test]
fn narrow_and_wide_accesses() {
    let mut world = World::new(1);
    world.start(true);
    let base = world.port;
    assert_eq!(world.read_width(base + CLB + 1, 1), 0x10);
    assert_eq!(world.read_width(base + CMD, 2) & 0xff, u64::from(FRE | ST));
    assert_eq!(world.read_width(base, 8), 0x1000);
    world.write_width(base + IE + 3, 1, 0x41);
    assert_eq!(world.hba.get(IE) >> 24, 0x41);
    assert_eq!(world.hba.get(IE) & 0xffff, 0x7f);
    // Not the second byte of GHC, but its first, is a reset.
    let ie = world.hba.get(IE);
    world.write_width(GHC + 1, 1, 1);
    assert_eq!(world.hba.get(IE), ie);
    assert_eq!(world.hba.ghc & 3, 2);
    // Both halves of queued commands at once.
    let slot = world.issue(Kind::Identify, 0, 0, false).unwrap();
    assert_eq!(slot, 0);
    world.settle();
    world.write_width(0, 8, 1 << 32);
    assert_eq!(world.hba.get(IE), 0);
}

#[test]
fn identify_is_asked_anew() {
    let mut world = World::new(0);
    world.start(true);
    for write_cache in [0, 0x20] {
        world.hba.identity[170] = write_cache;
        let slot = world.issue(Kind::Identify, 0, 0, false).unwrap();
        world.settle();
        assert_eq!(world.data(slot)[170] & 0x20, write_cache);
    }
    // A disk that does not answer the VMM does not answer the guest; the next time it may.
    world.hba.fail_own = 1;
    world.issue(Kind::Identify, 0, 0, false).unwrap();
    world.settle();
    assert_eq!(world.failed, 1);
    world.issue(Kind::Identify, 0, 0, false).unwrap();
    world.settle();
    assert_eq!((world.done, world.failed), (3, 1));
    world.finish();
}

/// All of a TRIM's sectors are the guest's once it is done, and not before.
#[test]
fn a_trim_waits_for_all_its_sectors() {
    let mut world = World::new(0);
    world.blocks.most = 2;
    world.blocks.is_lazy = true;
    world.start(true);
    world.issue(Kind::Trim, 100, 4, false).unwrap();
    for n in 0..20 {
        world.world(n);
    }
    assert_eq!(world.blocks.guest.len(), 2);
    assert!(!world.hba.outstanding());
    assert!(world.blocks.local.iter().all(|local| !local));
    world.blocks.most = 3;
    world.settle();
    assert!(world.blocks.guest.is_empty());
    assert_eq!(
        world.blocks.local.iter().filter(|local| **local).count(),
        12
    );
    world.blocks.is_lazy = false;
    world.finish();
}

#[test]
fn tables_that_make_no_sense() {
    let mut world = World::new(0);
    world.blocks.is_lazy = true;
    world.start(false);
    // An identity has no room; a FIS is short; a tag is another's; a command is queued and is not.
    for what in 0..4 {
        let mut fis = [0; 20];
        fis[..3].copy_from_slice(&[0x27, 0x80, 0xec]);
        fis[7] = 0x40;
        let header = world.build(0, fis, if what == 0 { 511 } else { 512 }, 0);
        match what {
            1 => world.put(0x1000, &[4]),
            2 => {
                world.put(0x1_0000, &[0x27, 0x80, 0x60, 1]);
                world.put(0x1_0000 + 12, &[7 << 3]);
                world.write(SACT, 1);
            }
            3 => world.put(0x1_0000, &[0x27, 0x80, 0x61, 1]),
            _ => {}
        }
        let header: [u8; 4] = if what == 1 {
            world.get(0x1000)
        } else {
            header[..4].try_into().unwrap()
        };
        world.write(CI, 1);
        for n in 0..100 {
            world.world(n);
        }
        assert_eq!(world.read(TFD) & 1, 1, "case {what}");
        world.stop();
        assert_eq!(world.get::<4>(0x1000), header);
        world.write(IS, !0);
        world.write(CMD, FRE | ST);
        world.hba.pass(2_000_000);
    }
    assert!(world.blocks.local.iter().all(|local| !local));
    // A list that is not memory: nothing goes to the device.
    let seen = world.hba.seen.len();
    world.stop();
    world.write(CLBU, 0xffff_0000);
    world.write(CMD, FRE | ST);
    world.write(CI, 0x8001);
    for n in 0..100 {
        world.world(n);
    }
    assert_eq!(world.read(CI), 0x8001);
    assert_eq!(
        world.hba.seen[seen..]
            .iter()
            .filter(|code| **code != 0x35)
            .count(),
        0
    );
    world.stop();
    assert_eq!(world.read(CI), 0);
}

/// That another disk of the controller's is busy does not keep this one from being installed.
#[test]
fn another_port_is_busy() {
    let mut world = World::new(0);
    world.start(true);
    let mut turns = 0;
    while !world.blocks.complete() {
        turns += 1;
        assert!(turns < 5000, "nothing is installed");
        world.write_global(0x180 + IS, 1);
        world.write_global(GLOBAL_IS, 2);
        world.hba.pass(1000);
        world.world(turns);
    }
}

/// A port that has halted after an error gets nothing more, and what was held is dropped with the rest.
#[test]
fn a_failure_of_the_device_s() {
    let mut world = World::new(0);
    world.blocks.most = 1;
    world.blocks.is_lazy = true;
    world.start(true);
    world.issue(Kind::Write, 10, 4, true).unwrap();
    world.issue(Kind::Write, 20, 4, true).unwrap();
    assert!(world.hba.step(0, false));
    assert!(world.hba.step(0, true));
    world.blocks.most = 9;
    for n in 0..10 {
        world.poll();
        world.hba.step(n, false);
    }
    assert_eq!(world.hba.get(SACT), 1);
    assert_eq!(world.read(SACT), 3);
    assert!(world.interrupted());
    world.handler();
    assert_eq!((world.failed, world.dropped), (1, 2));
    assert!(world.blocks.guest.is_empty());
    assert_eq!(world.blocks.local.iter().filter(|local| **local).count(), 4);
}

/// The guest may ask the device about its failure before the VMM uses it.
#[test]
fn the_log_of_a_failure_is_the_guest_s() {
    let mut world = World::new(0);
    world.start(true);
    world.issue(Kind::Read, 270, 4, true).unwrap();
    assert!(world.hba.step(0, false));
    assert!(world.hba.step(0, true));
    world.write(IE, 0);
    world.stop();
    world.abandon();
    world.write(IS, !0);
    world.write(CMD, FRE | ST);
    for n in 0..90 {
        world.hba.pass(10_000);
        world.world(n);
        assert_eq!(world.hba.own_commands, 0);
    }
    for n in 0..90 {
        world.hba.pass(10_000);
        world.world(n);
    }
    assert_ne!(world.hba.own_commands, 0);
}

#[test]
fn status_that_a_polling_driver_has_left() {
    let mut world = World::new(0);
    world.start(false);
    let slot = world.issue(Kind::Other, 0, 0, false).unwrap();
    while world.read(CI) & 1 << slot != 0 {
        world.world(0);
    }
    world.look();
    world.issue(Kind::Read, 40, 8, false).unwrap();
    world.blocks.fetched();
    world.poll();
    assert_ne!(world.hba.get(CLBU), 0);
    assert_eq!((world.hba.get(IS), world.read(IS)), (0, 1));
    // Not enabled: it is no interrupt's.
    assert_eq!(world.read_global(GLOBAL_IS), 0);
    while world.hba.own_commands == 0 || world.hba.get(CLBU) != 0 {
        world.hba.step(0, false);
        world.poll();
    }
    assert_eq!(world.read(IS) & 1, 1);
    assert!(!world.transparent());
    world.write(IS, 1);
    assert_eq!(world.read(IS) & 1, 0);
}

#[test]
fn a_trim_that_has_passed_in_part_is_dropped() {
    let mut world = World::new(0);
    world.blocks.most = 2;
    world.blocks.is_lazy = true;
    world.start(true);
    world.issue(Kind::Trim, 100, 4, false).unwrap();
    assert_eq!(world.blocks.guest.len(), 2);
    world.stop();
    assert!(world.blocks.guest.is_empty());
}

/// What the firmware had issued before there was a mediator.
#[test]
fn commands_of_before() {
    let mut world = World::new(0);
    world.start(true);
    let mut fis = [0; 20];
    fis[..3].copy_from_slice(&[0x27, 0x80, 0xe5]);
    world.build(3, fis, 0, 0);
    world.hba.write_register(0x100 + CI, 4, 8);
    for _ in 0..10 {
        world.hba.pass(10_000);
        world.poll();
    }
    assert_eq!(world.read(CI), 8);
    world.hba.step(0, false);
    world.hba.step(0, false);
    assert_eq!(world.read(CI), 0);
    world.finish();
}

/// How long the VMM waits for an interrupt to be taken is counted for each anew.
#[test]
fn a_later_interrupt_is_not_lost() {
    let mut world = World::new(0);
    world.start(true);
    world.issue(Kind::Read, 270, 4, true).unwrap();
    while world.hba.step(0, false) {}
    world.issue(Kind::Read, 40, 8, true).unwrap();
    world.blocks.fetched();
    world.poll();
    world.hba.pass(6_000);
    world.issue(Kind::Read, 280, 4, true).unwrap();
    assert!(world.hba.outstanding(), "the guest goes on meanwhile");
    world.hba.pass(1_100_000);
    while world.hba.step(0, false) {}
    world.poll();
    assert!(world.hba.line());
    world.settle();
    assert_eq!((world.done, world.failed), (3, 0));
}

#[test]
fn what_the_vmm_leaves_alone() {
    let mut world = World::new(0);
    // A device that is busy with something that nobody has asked for.
    world.start(true);
    *world.hba.at(TFD) = 0xd0;
    for _ in 0..9 {
        world.hba.pass(10_000);
        world.poll();
        assert_eq!(world.hba.get(CLBU), 0);
    }
    *world.hba.at(TFD) = 0x50;
    // A list does not move under its commands.
    one_own(&mut world);
    world.write(CLB, 0x8000);
    assert_eq!(world.read(CLB), 0x1000);
    assert_ne!(world.hba.get(CLBU), 0);
    // What happens to the port while the VMM has it is the guest's to know.
    *world.hba.at(IS) |= 1 << 7;
    assert_eq!(world.read(IS), 1 << 7);
    while world.hba.get(CLBU) != 0 {
        world.hba.step(0, false);
        world.poll();
    }
    assert_eq!(world.read(IS), 1 << 7);
    world.write(CLB, 0x8000);
    assert_eq!(world.hba.get(CLB), 0x1000);
}
