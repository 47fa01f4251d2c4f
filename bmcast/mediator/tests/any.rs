//! Any order of what a guest, the disk, the network and the VMM do.

#[allow(dead_code)]
mod common;

use proptest::prelude::*;

use common::hba::*;
use common::{Kind, MOST, World};

#[derive(Clone, Debug)]
enum Action {
    Issue(Kind, u64, u64, bool),
    /// The disk does one thing, or fails to.
    Device(u8, bool),
    FailOwn,
    Fetch,
    Poll,
    Pass(u64),
    Handler,
    /// A driver gives up, with or without a reset of the link.
    Recover(bool),
    ResetController,
    Unplug,
    Replug,
    Hang(bool),
    Read(u32),
    /// Sets a register to what it has.
    Rewrite(u32),
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        8 => Just(Kind::Read),
        5 => Just(Kind::Write),
        1 => Just(Kind::Fua),
        1 => Just(Kind::Flush),
        1 => Just(Kind::Trim),
        1 => Just(Kind::Identify),
        1 => Just(Kind::Strange),
        1 => Just(Kind::Other),
    ]
}

/// What happens without failures.
fn good() -> impl Strategy<Value = Action> {
    prop_oneof![
        8 => (kind(), 0..300u64, 1..=MOST, prop::bool::weighted(0.8))
            .prop_map(|(kind, start, count, queued)| Action::Issue(kind, start, count, queued)),
        8 => any::<u8>().prop_map(|which| Action::Device(which, false)),
        4 => Just(Action::Fetch),
        4 => Just(Action::Poll),
        3 => (0..8000u64).prop_map(Action::Pass),
        4 => Just(Action::Handler),
        2 => (0..0x40u32).prop_map(|register| Action::Read(register & !3)),
        1 => prop_oneof![Just(CMD), Just(IE), Just(SCTL)].prop_map(Action::Rewrite),
    ]
}

fn bad() -> impl Strategy<Value = Action> {
    prop_oneof![
        60 => good(),
        4 => any::<u8>().prop_map(|which| Action::Device(which, true)),
        2 => Just(Action::FailOwn),
        2 => any::<bool>().prop_map(Action::Recover),
        1 => Just(Action::ResetController),
        1 => Just(Action::Unplug),
        1 => Just(Action::Replug),
        1 => any::<bool>().prop_map(Action::Hang),
    ]
}

fn restore(world: &mut World) {
    world.hba.hangs = false;
    if world.hba.get(SSTS) == 0 {
        world.hba.plug(true);
        world.recover(true);
    }
}

fn run(
    number: u8,
    eager: u32,
    stop_reads: u32,
    is_lazy: bool,
    by_message: bool,
    actions: &[Action],
) {
    let mut world = World::new(number);
    world.hba.eager = eager;
    world.hba.stop_reads = stop_reads;
    world.hba.is_lazy = is_lazy;
    world.by_message = by_message;
    world.blocks.most = 3;
    world.start(true);
    for action in actions {
        match action.clone() {
            Action::Issue(kind, start, count, queued) => {
                world.issue(kind, start, count, queued);
            }
            Action::Device(which, fails) => {
                world.hba.step(which.into(), fails);
            }
            Action::FailOwn => world.hba.fail_own = 1,
            Action::Fetch => world.blocks.fetched(),
            Action::Poll => world.poll(),
            Action::Pass(micros) => world.hba.pass(micros),
            Action::Handler => {
                if world.interrupted() {
                    // A driver cannot recover a port whose device is away or hangs.
                    restore(&mut world);
                    world.handler();
                }
            }
            Action::Recover(hard) => {
                world.hba.hangs &= hard;
                if world.hba.get(SSTS) != 0 {
                    world.recover(hard);
                }
            }
            Action::ResetController => {
                restore(&mut world);
                world.write_global(GHC, 1);
                world.abandon();
                world.start(true);
            }
            Action::Unplug => {
                world.hba.plug(false);
            }
            Action::Replug => restore(&mut world),
            // A device that hangs does so for less than the 30 seconds that everybody waits.
            Action::Hang(hangs) => world.hba.hangs = hangs && eager != 0,
            Action::Read(register) => {
                world.read(register);
            }
            Action::Rewrite(register) => {
                let value = world.read(register);
                world.write(register, value);
            }
        }
    }
    restore(&mut world);
    world.hba.fail_own = 0;
    world.settle();
    // What a disk has failed at is tried again.
    world.hba.pass(2_000_000);
    world.issue(Kind::Identify, 0, 0, false).expect("a slot");
    world.settle();
    world.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, max_shrink_iters: 3000, ..ProptestConfig::default() })]

    #[test]
    fn all_goes_well(
        number in 0..3u8,
        eager in prop_oneof![Just(0), 2..40u32],
        stop_reads in 0..4u32,
        by_message: bool,
        actions in prop::collection::vec(good(), 1..160),
    ) {
        let eager = if eager == 0 { 50 } else { eager };
        run(number, eager, stop_reads, false, by_message, &actions);
    }

    #[test]
    fn some_goes_wrong(
        number in 0..3u8,
        eager in 2..40u32,
        stop_reads in 0..4u32,
        is_lazy: bool,
        by_message: bool,
        actions in prop::collection::vec(bad(), 1..160),
    ) {
        run(number, eager, stop_reads, is_lazy, by_message, &actions);
    }
}
