//! What an AHCI mediator does, case by case, on a model of a controller.

mod common;

use bmcast_image::Sectors;

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
