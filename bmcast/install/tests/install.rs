//! An installation, step by step.

mod common;

use bmcast_install::{Fetched, Options, State};
use bmcast_mediator::{Blocks as _, Verdict, Work};
use common::{Machine, image, sectors};

#[test]
fn reads_wait_for_their_chunks() {
    let mut machine = Machine::new(image(40), Options::default());
    machine.begin();
    let read = sectors(30, 10);
    assert_eq!(machine.install.read(read), Verdict::Hold);
    let fetches: Vec<u32> = std::iter::from_fn(|| machine.install.next_fetch())
        .take_while(|fetch| fetch.urgent)
        .map(|fetch| fetch.chunk)
        .collect();
    assert_eq!(fetches, [0, 1]);
    let chunk = machine.chunk(0);
    let mut wrong = chunk.clone();
    wrong[77] ^= 1;
    assert_eq!(machine.install.fetched(0, wrong), Fetched::Wrong);
    assert_eq!(machine.install.next(false), None);
    let again = machine.install.next_fetch().unwrap();
    assert_eq!((again.chunk, again.urgent), (0, true));
    assert_eq!(machine.install.fetched(0, chunk.clone()), Fetched::Taken);
    assert_eq!(machine.install.fetched(0, chunk), Fetched::Unasked);
    assert_eq!(machine.install.fetched(1, machine.chunk(1)), Fetched::Taken);
    // Both in one write, though nobody is quiet.
    let Some(Work::Write { to, data }) = machine.install.next(false) else {
        panic!("nothing to write");
    };
    assert_eq!((to, data.len()), (sectors(0, 40), 20480));
    assert_eq!(machine.install.read(read), Verdict::Hold);
    machine.install.done(Ok(()));
    assert_eq!(machine.install.read(read), Verdict::Pass);
    assert_eq!(machine.install.order(), [0, 1]);
}

#[test]
fn all_of_it_is_installed() {
    let mut machine = Machine::new(image(100), Options::default());
    machine.run_quiet();
    let progress = machine.install.progress();
    assert_eq!(
        (progress.state, progress.sectors_left),
        (State::Complete, 0)
    );
    assert_eq!(machine.disk[..machine.image.len()], machine.image[..]);
    // Once more: there is nothing to do.
    let again = machine.restart();
    assert!(again.complete());
}
