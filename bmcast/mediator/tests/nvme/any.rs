//! Any order of what a guest, the disk, the network and the VMM do.

use proptest::prelude::*;

use super::hostile;
use super::world::{Kind, MOST, World};

#[derive(Clone, Debug)]
enum Action {
    Issue(usize, Kind, u64, u64),
    /// The disk does one thing, or fails to.
    Device(u8, bool),
    FailOwn,
    Fetch,
    Poll,
    Pass(u64),
    Handler(usize),
    Reset,
    Shutdown,
    Leave,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        8 => Just(Kind::Read),
        1 => Just(Kind::Compare),
        5 => Just(Kind::Write),
        1 => Just(Kind::Fua),
        1 => Just(Kind::Zeros),
        1 => Just(Kind::Flush),
        1 => Just(Kind::Discard),
        1 => Just(Kind::Strange),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        80 => (1..4usize, kind(), 0..310u64, 1..=MOST)
            .prop_map(|(queue, kind, start, count)| Action::Issue(queue, kind, start, count)),
        80 => (any::<u8>(), prop::bool::weighted(0.05))
            .prop_map(|(which, fails)| Action::Device(which, fails)),
        30 => Just(Action::Fetch),
        30 => Just(Action::Poll),
        20 => (0..8000u64).prop_map(Action::Pass),
        40 => (1..4usize).prop_map(Action::Handler),
        2 => Just(Action::FailOwn),
        3 => Just(Action::Reset),
        1 => Just(Action::Shutdown),
        1 => Just(Action::Leave),
    ]
}

fn run(ratio: u64, eager: u32, slowness: u32, sizes: (u32, u32, u32), actions: &[Action]) {
    let mut world = World::new(ratio, 4);
    world.device.eager = eager;
    world.device.slowness = slowness;
    world.by_interrupt = sizes.0 > 2;
    world.blocks.most = 3;
    let start = |world: &mut World| {
        // A device that does nothing by itself never becomes ready.
        world.device.eager = eager.max(1);
        world.start((sizes.0, sizes.1), 3, sizes.2);
        world.device.eager = eager;
    };
    let stop = |world: &mut World| {
        world.device.eager = eager.max(1);
        world.disable();
        world.device.eager = eager;
    };
    start(&mut world);
    for action in actions {
        match action.clone() {
            Action::Issue(queue, kind, start, count) => {
                world.issue(queue, kind, start, count);
            }
            Action::Device(which, fails) => {
                world.device.step(which.into(), fails);
            }
            Action::FailOwn => world.device.fail_own = 1,
            Action::Fetch => world.blocks.fetched(),
            Action::Poll => world.poll(),
            Action::Pass(micros) => world.device.pass(micros),
            Action::Handler(queue) => world.handler(queue),
            Action::Reset => {
                stop(&mut world);
                start(&mut world);
            }
            Action::Shutdown => {
                world.settle();
                world.write(super::controller::CC, 0x46_4001);
                stop(&mut world);
                start(&mut world);
            }
            Action::Leave => {
                if world.blocks.complete() {
                    world.leave();
                }
            }
        }
    }
    world.device.fail_own = 0;
    world.settle();
    if world.mediator.is_some() {
        world.finish();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_order(
        ratio in prop_oneof![3 => Just(1u64), 1 => Just(8)],
        eager in 0..5u32,
        slowness in 1..10u32,
        sizes in prop_oneof![Just((2, 2, 2)), Just((32, 32, 8)), Just((5, 3, 3))],
        actions in prop::collection::vec(action(), 1..200),
    ) {
        run(ratio, eager, slowness, sizes, &actions);
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        hostile::run(&bytes);
    }
}
