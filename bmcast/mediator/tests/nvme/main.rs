//! What an NVMe mediator does, on a model of a controller.

mod any;
#[path = "../common/blocks.rs"]
mod blocks;
mod controller;
mod hostile;
mod world;

use bmcast_image::Sectors;
use bmcast_mediator::{Blocks, Failed, MAX_WORK, Mediator as _, Nvme, Verdict, Work};

use blocks::VISIBLE;
use controller::*;
use world::{Kind, World};

#[test]
fn firmware_polls() {
    for (ratio, stride) in [(1, 4), (8, 4), (1, 16)] {
        let mut world = World::new(ratio, stride);
        world.start((2, 2), 2, 2);
        let mut run = |kind, start, count| {
            world.issue(1, kind, start, count).unwrap();
            world.settle();
            (world.done, world.failed)
        };
        assert_eq!(run(Kind::Read, 0, 16), (1, 0));
        assert_eq!(run(Kind::Write, 32, 8), (2, 0));
        assert_eq!(run(Kind::Read, 24, 24), (3, 0));
        assert_eq!(run(Kind::Fua, 48, 8), (4, 0));
        assert_eq!(run(Kind::Discard, 64, 24), (5, 0));
        assert_eq!(run(Kind::Compare, 96, 8), (6, 0));
        assert_eq!(run(Kind::Flush, 0, 8), (7, 0));
        assert_eq!(run(Kind::Zeros, 104, 16), (8, 0));
        assert_eq!(run(Kind::Read, 56, 24), (9, 0));
        assert_eq!(run(Kind::Strange, 0, 8), (9, 1));
        assert_eq!(run(Kind::Read, VISIBLE - 1, 8), (9, 2));
        assert_eq!(run(Kind::Write, VISIBLE, 8), (9, 3));
        assert_eq!(run(Kind::Discard, VISIBLE, 8), (9, 4));
        assert_eq!(run(Kind::Read, u64::MAX - 512, 8), (9, 5));
        world.finish();
    }
}

#[test]
fn linux_is_interrupted() {
    let mut world = World::new(1, 4);
    world.by_interrupt = true;
    world.start((32, 32), 4, 32);
    for n in 0..100 {
        let kind = if n % 3 == 0 { Kind::Write } else { Kind::Read };
        world.issue(1 + n % 4, kind, n as u64 * 7 % 290, 5);
    }
    world.settle();
    assert!(world.done > 40);
    assert_eq!((world.failed, world.dropped), (0, 0));
    world.finish();
}

/// The queues are where the driver thinks, whatever their sizes are, or it is told that there is no controller.
#[test]
fn sizes_of_admin_queues() {
    for sizes in [
        (2, 2),
        (2, 3),
        (3, 2),
        (31, 17),
        (32, 32),
        (256, 64),
        (64, 255),
    ] {
        let mut world = World::new(1, 4);
        world.start(sizes, 1, 8);
        world.issue(1, Kind::Read, 5, 5);
        world.settle();
        assert_eq!(world.done, 1);
    }
    let mut world = World::new(1, 4);
    world.write(AQA, 4092 | 4095 << 16);
    world.write(ASQ, 0x1000);
    world.write(ACQ, 0x2000);
    world.write(CC, 0x46_0001);
    assert_eq!((world.read(CC), world.read(CSTS)), (0x46_0001, 2));
    world.write(CC, 0x46_0000);
    assert_eq!((world.read(CC), world.read(CSTS)), (0x46_0000, 0));
    world.start((32, 32), 1, 8);
}

#[test]
fn one_pair_of_queues_is_too_few() {
    let mut world = World::new(1, 4);
    world.device.pairs = 1;
    world.write(AQA, 31 | 31 << 16);
    world.write(ASQ, 0x1000);
    world.write(ACQ, 0x2000);
    world.write(CC, 0x46_0001);
    for _ in 0..100 {
        world.read(CSTS);
    }
    assert_eq!(world.read(CSTS), 2);
    world.disable();
    assert_eq!(world.read(CSTS), 0);
}

/// What would change the disk behind the VMM's back, and its own queues.
#[test]
fn what_is_refused() {
    let mut world = World::new(1, 4);
    world.start((32, 32), 2, 8);
    for opcode in [0x80, 0x84, 0x10, 0x11, 0x0d, 0x15, 0x7c, 0x81, 0xc1] {
        let (status, _) = world.admin(opcode, NSID, 0x4_0000, 0, 0);
        assert_eq!(status, INVALID_OPCODE, "{opcode:#x}");
    }
    let queue = u32::from(world.device.pairs);
    for (opcode, eleven) in [(0, 0), (4, 0), (1, 1 << 16 | 1), (5, 1)] {
        let (status, _) = world.admin(opcode, 0, 0x3_0000, 7 << 16 | queue, eleven);
        assert_eq!(status, INVALID_QUEUE, "{opcode:#x}");
    }
    // Completions to the VMM's queue.
    let (status, _) = world.admin(1, 0, 0x3_0000, 7 << 16 | 3, queue << 16 | 1);
    assert_eq!(status, 0x100);
    assert_eq!(world.admin(0x0a, 0, 0, 7, 0), (0, 6 << 16 | 6));
    assert_eq!(world.admin(0x08, 0, 0, 0, 0), (0, 1));
    assert_eq!((world.read(4) >> 25 & 1, world.read(CMBSZ)), (0, 0));
    world.finish();
}

/// A queue is deleted with what is held in it, and created anew.
#[test]
fn queues_come_and_go() {
    let mut world = World::new(1, 4);
    world.start((32, 32), 2, 8);
    world.blocks.is_lazy = true;
    world.issue(2, Kind::Read, 0, 8).unwrap();
    world.issue(2, Kind::Write, 100, 8).unwrap();
    world.issue(1, Kind::Write, 200, 8).unwrap();
    for opcode in [0, 4] {
        assert_eq!(world.admin(opcode, 0, 0, 2, 0).0, 0);
    }
    let queue = world.queues.pop().unwrap();
    world.drop(&queue);
    world.settle();
    assert_eq!(world.done, 1);
    world.create(2, 16);
    world.issue(2, Kind::Read, 0, 8).unwrap();
    world.settle();
    world.blocks.is_lazy = false;
    world.finish();
}

/// Firmware's driver is there before the mediator sees anything.
#[test]
fn nothing_is_known_at_first() {
    let mut world = World::new(1, 4);
    let mediator = world.mediator.take();
    world.start((2, 2), 1, 4);
    world.mediator = mediator;
    world.device.fresh[..8].fill(true);
    world.admin(0x02, 0, 0x4_0000, 0, 0);
    world.disable();
    world.start((2, 2), 1, 4);
    world.issue(1, Kind::Read, 0, 8).unwrap();
    world.settle();
    assert_eq!(world.done, 1);
    world.finish();
}

/// One write of the VMM's.
struct Once {
    work: Option<Work>,
    result: Option<Result<(), Failed>>,
}

impl Blocks for Once {
    fn visible(&self) -> u64 {
        VISIBLE
    }

    fn read(&mut self, _: Sectors) -> Verdict {
        Verdict::Pass
    }

    fn write(&mut self, _: Sectors, _: bool) -> Verdict {
        Verdict::Pass
    }

    fn written(&mut self, _: Sectors) {}

    fn flush(&mut self) -> Verdict {
        Verdict::Pass
    }

    fn next(&mut self, _: bool) -> Option<Work> {
        self.work.take()
    }

    fn done(&mut self, result: Result<(), Failed>) {
        assert_eq!(self.result.replace(result), None);
    }
}

/// A write of many pages, in as many commands as the controller wants.
#[test]
fn large_writes_are_split() {
    for (most, commands) in [(0, 1), (1, 19), (5, 2), (6, 1)] {
        let mut world = World::new(1, 4);
        world.device.most = most;
        world.start((32, 32), 1, 8);
        let to = Sectors {
            start: 3,
            count: 297,
        };
        let stamp = 0x42;
        let data = (to.start..to.end())
            .flat_map(|n| content(stamp, n))
            .collect();
        let mut once = Once {
            work: Some(Work::Write { to, data }),
            result: None,
        };
        let mediator = world.mediator.as_mut().unwrap();
        let before = world.device.own_commands;
        for _ in 0..1000 {
            mediator.poll(&mut world.device, &mut once);
        }
        assert_eq!(once.result, Some(Ok(())));
        assert_eq!(world.device.own_commands - before, commands);
        let expected: Vec<u8> = (to.start..to.end())
            .flat_map(|n| content(stamp, n))
            .collect();
        assert!(world.device.disk[3 * 512..300 * 512] == expected);
        once.work = Some(Work::Write {
            to,
            data: vec![0; MAX_WORK + 1],
        });
        once.result = None;
        mediator.poll(&mut world.device, &mut once);
        assert!(matches!(once.result, Some(Err(_))));
    }
}

/// Doorbells and addresses that make no sense.
#[test]
fn a_hostile_guest() {
    let mut world = World::new(1, 4);
    world.start((32, 32), 2, 8);
    for bell in (0x1000..0x1048).step_by(4) {
        for value in [0x1_0000, 0xffff, 32, 8] {
            world.write(bell, value);
        }
        world.write_width(bell, 2, 0xffff);
        world.write_width(bell | 1, 1, 0xff);
    }
    world.disable();
    world.start((32, 32), 2, 8);
    // A queue that is no memory.
    let both = 7 << 16 | 3;
    assert_eq!(world.admin(5, 0, !0xfff, both, 1).0, 0);
    assert_eq!(world.admin(1, 0, !0xfff, both, 3 << 16 | 1).0, 0);
    world.write(0x1000 + 6 * 4, 5);
    world.poll();
    world.write(CC, 0x46_0000);
    while world.read(CSTS) != 0 {}
    for base in [u64::MAX, 1 << 63, OWN, MEMORY as u64 - 0x1000] {
        world.write_width(ASQ, 8, base);
        world.write_width(ACQ, 8, base);
        world.write(AQA, u32::MAX);
        world.write(CC, 0x46_0001);
        world.poll();
        assert_eq!(world.read(CSTS), 2);
        world.write(CC, 0);
    }
    let _ = Nvme::new(NSID, 0x2000);
}

/// Two lists that have passed in part would wait for each other.
#[test]
fn lists_do_not_wait_for_each_other() {
    let mut world = World::new(1, 4);
    world.start((32, 32), 3, 8);
    world.device.eager = 0;
    world.blocks.most = 2;
    world.issue(3, Kind::Write, 0, 8).unwrap();
    world.issue(2, Kind::Discard, 100, 8).unwrap();
    world.issue(1, Kind::Discard, 200, 8).unwrap();
    world.settle();
    assert_eq!(world.done, 3);
}

/// By its completion alone, which of two writes is done would not be known.
#[test]
fn an_identifier_is_used_twice() {
    let mut world = World::new(1, 4);
    world.start((32, 32), 1, 8);
    world.device.eager = 0;
    let first = world.issue(1, Kind::Write, 0, 8).unwrap();
    world.queues[1].outstanding.clear();
    world.queues[1].next_cid = first;
    assert_eq!(world.issue(1, Kind::Write, 100, 8), Some(first));
    for n in 0..20 {
        world.device.step(0, false);
        world.poll();
        assert_eq!(world.blocks.guest.is_empty(), n >= 3, "{n}");
    }
}

/// What was written before is durable before what is to be durable at once goes to the disk.
#[test]
fn past_the_cache() {
    for kind in [Kind::Fua, Kind::Flush] {
        let mut world = World::new(1, 4);
        world.blocks.is_lazy = true;
        world.start((32, 32), 1, 8);
        world.issue(1, Kind::Write, 0, 8).unwrap();
        world.settle();
        assert_eq!(world.device.own_commands, 0);
        world.issue(1, kind, 100, 8).unwrap();
        world.settle();
        assert_eq!(world.device.own_commands, 1);
    }
}

/// A controller is told nothing of a queue that it is deleting.
#[test]
fn a_queue_is_being_deleted() {
    let mut world = World::new(1, 4);
    world.start((32, 32), 2, 8);
    world.device.eager = 0;
    world.issue(2, Kind::Read, 0, 8).unwrap();
    let mut entry = [0; 64];
    entry[40] = 2;
    world.submit(0, entry);
    world.blocks.insert(Sectors { start: 0, count: 8 });
    world.device.fresh[..8].fill(true);
    let image: Vec<u8> = (0..8).flat_map(blocks::image).collect();
    world.device.disk[..image.len()].copy_from_slice(&image);
    world.poll();
    assert_eq!(world.device.sqs[&2].tail, 0);
    // It was not there: the queue stays, and goes on.
    let queue = world.device.sqs.remove(&2).unwrap();
    world.device.step(0, false);
    world.device.step(0, false);
    world.device.sqs.insert(2, queue);
    world.settle();
    assert_eq!(world.done, 1);
}
