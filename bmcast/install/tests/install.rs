//! An installation, step by step.

mod common;

use std::convert::Infallible;

use bmcast_image::{Manifest, SECTOR, Sectors};
use bmcast_install::{Fetched, Install, OpenError, Options, State};
use bmcast_mediator::{Blocks as _, Failed, MAX_WORK, Verdict, Work};
use common::{CHUNK, boot, bytes, image, manifest, sectors};

fn open(disk: &[u8], manifest: Manifest, number: u8, options: Options) -> Install {
    let read = |at: Sectors, into: &mut [u8]| {
        into.copy_from_slice(&disk[bytes(at)]);
        Ok::<(), Infallible>(())
    };
    let size = disk.len() as u64 / SECTOR;
    Install::open(size, manifest, boot(number, true), options, read).unwrap()
}

/// One whose disk does at once, and durably, what it is told.
struct Machine {
    image: Vec<u8>,
    disk: Vec<u8>,
    install: Install,
    options: Options,
}

impl Machine {
    fn new(image: Vec<u8>, options: Options) -> Self {
        let disk = vec![0x5a; image.len() + 200 * 512];
        let install = open(&disk, manifest(&image, Vec::new()), 1, options);
        Self {
            image,
            disk,
            install,
            options,
        }
    }

    fn chunk(&self, chunk: u32) -> Vec<u8> {
        let chunks = self.install.manifest().chunks();
        self.image[bytes(chunks.sectors(chunk))].to_vec()
    }

    /// Does one work; false if there is none.
    fn work(&mut self, quiet: bool) -> bool {
        match self.install.next(quiet) {
            None => return false,
            Some(Work::Flush) => {}
            Some(Work::Write { to, data }) => self.disk[bytes(to)].copy_from_slice(&data),
        }
        self.install.done(Ok(()));
        true
    }

    /// Fetches one chunk; false if there is none to be fetched.
    fn fetch(&mut self) -> bool {
        let Some(fetch) = self.install.next_fetch() else {
            return false;
        };
        let data = self.chunk(fetch.chunk);
        assert_eq!(data.len(), fetch.length as usize);
        assert_eq!(self.install.fetched(fetch.chunk, data), Fetched::Taken);
        true
    }

    /// The record's first write.
    fn begin(&mut self) {
        while self.work(false) {}
    }

    /// Until nothing is left to do.
    fn run_quiet(&mut self) {
        while self.fetch() || self.work(true) {}
    }

    fn restart(&self) -> Install {
        let manifest = self.install.manifest().clone();
        open(&self.disk, manifest, 2, self.options)
    }
}

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
    // What was there before the guest wanted it is part of the profile, too: the next boot may want it earlier.
    let (last, first) = (sectors(99, 1), sectors(0, 1));
    for read in [last, first, last] {
        assert_eq!(machine.install.read(read), Verdict::Pass);
    }
    let order = machine.install.order();
    assert!(order.len() == 2 && order[1] == 0, "{order:?}");
    let told = machine.install.status("a", true);
    assert_eq!(
        (told.state.name(), told.sectors_left),
        ("de-virtualized", 0)
    );
    // Once more: there is nothing to do.
    let again = machine.restart();
    assert!(again.complete());
}

#[test]
fn zeros_are_not_fetched() {
    let mut machine = Machine::new(vec![0; 4 << 20], Options::default());
    machine.begin();
    assert_eq!(machine.install.next_fetch(), None);
    assert_eq!(machine.install.read(sectors(8000, 1)), Verdict::Hold);
    assert!(machine.work(false));
    assert_eq!(machine.install.read(sectors(8000, 1)), Verdict::Pass);
    assert_eq!(machine.install.progress().state, State::Installing);
    machine.run_quiet();
    assert!(machine.install.complete());
    assert_eq!(machine.install.progress().fetched_bytes, 0);
}

#[test]
fn neighbours_are_written_together() {
    let mut machine = Machine::new(vec![7; 1 << 20], Options::default());
    machine.begin();
    while machine.fetch() {}
    // Of the first chunk the guest has written a part.
    assert_eq!(machine.install.write(sectors(3, 2), false), Verdict::Pass);
    let mut written = Vec::new();
    while let Some(work) = machine.install.next(true) {
        let Work::Write { to, data } = work else {
            break;
        };
        assert!(data.len() <= MAX_WORK);
        written.push(to);
        machine.install.done(Ok(()));
    }
    // The guest's two sectors are not among them, nor waited for.
    let expected = [(0, 3), (5, 512), (517, 512), (1029, 512), (1541, 507)];
    assert_eq!(
        written,
        expected.map(|(start, count)| sectors(start, count))
    );
    assert_eq!(machine.install.read(sectors(3, 1)), Verdict::Hold);
    machine.install.written(sectors(3, 2));
    assert_eq!(machine.install.read(sectors(3, 1)), Verdict::Pass);
}

#[test]
fn memory_is_bounded() {
    let options = Options {
        memory: 4 * CHUNK as usize,
        in_flight: 100,
        ..Options::default()
    };
    let mut machine = Machine::new(vec![7; 1 << 20], options);
    machine.begin();
    let mut fetches = 0;
    while machine.fetch() {
        fetches += 1;
    }
    assert_eq!(fetches, 4);
    // The guest waits, and is not quiet: as much again.
    assert_eq!(machine.install.read(sectors(1024, 1024)), Verdict::Hold);
    while machine.fetch() {
        fetches += 1;
    }
    assert_eq!(fetches, 8);
    while machine.work(false) || machine.fetch() {}
    assert_eq!(machine.install.read(sectors(1024, 1024)), Verdict::Pass);
    // What nobody waits for is where it was.
    assert_eq!(machine.install.read(sectors(0, 1)), Verdict::Hold);
    assert_eq!(machine.install.progress().demand_chunks, 32);
}

#[test]
fn the_profile_comes_first_and_the_guest_before_it() {
    let content = vec![7; 20 * CHUNK as usize];
    let disk = vec![0; content.len() + 200 * 512];
    let mut install = open(&disk, manifest(&content, vec![9, 4]), 1, Options::default());
    assert_eq!(install.read(sectors(17 * 32, 1)), Verdict::Hold);
    let next = |install: &mut Install| -> Vec<u32> {
        let all = std::iter::from_fn(|| install.next_fetch());
        all.map(|fetch| fetch.chunk).take(3).collect()
    };
    // The rest is not in the way while the guest waits.
    assert_eq!(next(&mut install), [17, 9, 4]);
    assert_eq!(install.next_fetch(), None);
    install.fetch_failed(9);
    install.fetch_failed(17);
    assert_eq!(next(&mut install), [17]);
    assert_eq!(install.fetched(17, vec![7; CHUNK as usize]), Fetched::Taken);
    assert_eq!(next(&mut install), [9, 0, 1]);
    // It wants one now that is on its way already.
    assert_eq!(install.read(sectors(9 * 32, 1)), Verdict::Hold);
    assert_eq!(install.next_fetch(), None);
}

#[test]
fn what_nobody_waits_for_is_fetched_at_a_rate() {
    let options = Options {
        rate: Some(1 << 20),
        ..Options::default()
    };
    let mut machine = Machine::new(vec![7; 16 << 20], options);
    machine.begin();
    assert!(!machine.fetch());
    // A microsecond at a time.
    for now in 0..1_000_000 {
        machine.install.tick(now);
        while machine.fetch() {}
        while machine.work(true) {}
    }
    let fetched = machine.install.progress().fetched_bytes;
    assert!(
        fetched.abs_diff(1 << 20) <= 2 * u64::from(CHUNK),
        "{fetched}"
    );
    assert_eq!(machine.install.read(sectors(30_000, 1)), Verdict::Hold);
    assert!(machine.fetch());
}

#[test]
fn a_disk_that_fails_is_tried_again() {
    let mut machine = Machine::new(vec![7; 1 << 20], Options::default());
    machine.begin();
    let failed = Failed { status: 0x51 };
    assert_eq!(machine.install.read(sectors(100, 1)), Verdict::Hold);
    assert!(machine.fetch());
    let mut tries = 0;
    while machine.install.next(true).is_some() {
        machine.install.done(Err(failed));
        tries += 1;
    }
    assert_eq!(tries, 5);
    assert_eq!(machine.install.progress().failed, Some(failed));
    let told = machine.install.status("a", false);
    assert!(told.error.is_some_and(|error| error.contains("0x51")));
    assert!(!machine.fetch());
    machine.install.tick(500_000);
    assert_eq!(machine.install.next(true), None);
    machine.install.tick(1_000_000);
    assert!(machine.work(true));
    assert_eq!(machine.install.progress().failed, None);
    machine.run_quiet();
    assert!(machine.install.complete());
    assert_eq!(machine.disk[..machine.image.len()], machine.image[..]);
}

#[test]
fn durable_writes_wait_until_there_is_something_to_fall_back_to() {
    let mut machine = Machine::new(vec![7; 1 << 20], Options::default());
    machine.begin();
    let to = sectors(10, 4);
    assert_eq!(machine.install.write(to, true), Verdict::Hold);
    assert!(machine.fetch() && machine.work(false));
    assert_eq!(machine.install.write(to, true), Verdict::Hold);
    while machine.work(false) {}
    assert_eq!(machine.install.write(to, true), Verdict::Pass);
    // The record says so, whatever becomes of the write.
    assert_eq!(machine.restart().read(to), Verdict::Pass);
}

#[test]
fn a_flush_does_not_wait_for_writes_behind_it() {
    let mut machine = Machine::new(vec![7; 1 << 20], Options::default());
    machine.begin();
    assert_eq!(machine.install.flush(), Verdict::Pass);
    assert_eq!(machine.install.write(sectors(0, 1), false), Verdict::Pass);
    // It is not done, and so not covered.
    assert_eq!(machine.install.flush(), Verdict::Pass);
    machine.install.written(sectors(0, 1));
    assert_eq!(machine.install.flush(), Verdict::Hold);
    // Whatever else the guest writes, the record is not behind for ever.
    assert_eq!(machine.install.write(sectors(9, 1), false), Verdict::Hold);
    while machine.work(false) {}
    assert_eq!(machine.install.write(sectors(0, 1), false), Verdict::Pass);
    assert_eq!(machine.install.flush(), Verdict::Pass);
    assert_eq!(machine.install.write(sectors(9, 1), false), Verdict::Pass);
    assert_eq!(machine.restart().read(sectors(0, 1)), Verdict::Pass);
    assert_eq!(machine.restart().read(sectors(9, 1)), Verdict::Hold);
}

#[test]
fn all_of_a_disk_may_be_discarded() {
    let mut machine = Machine::new(vec![7; 1 << 20], Options::default());
    machine.begin();
    let all = sectors(0, machine.install.visible());
    assert_eq!(machine.install.write(all, false), Verdict::Pass);
    assert_eq!(machine.install.read(sectors(5, 1)), Verdict::Hold);
    assert!(machine.install.next_fetch().is_none());
    machine.install.written(all);
    machine.run_quiet();
    assert!(machine.install.complete());
    assert_eq!(machine.install.progress().fetched_bytes, 0);
}

#[test]
fn disks_that_are_not_written_over() {
    let content = image(100);
    let disk = vec![0; 100 * 512];
    let open = |disk: &[u8], content: &[u8], may_begin: bool| {
        let size = disk.len() as u64 / SECTOR;
        let manifest = manifest(content, Vec::new());
        Install::open(
            size,
            manifest,
            boot(3, may_begin),
            Options::default(),
            |at, into| {
                into.copy_from_slice(&disk[bytes(at)]);
                Ok::<(), Infallible>(())
            },
        )
    };
    let error = open(&disk, &content, true).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the disk has 100 sectors, and the image (100) with the record of what is installed (36) needs 136"
    );
    let mut machine = Machine::new(content.clone(), Options::default());
    assert_eq!(
        open(&machine.disk, &content, false).unwrap_err(),
        OpenError::NoRecord
    );
    machine.begin();
    assert!(open(&machine.disk, &content, false).is_ok());
    let id = machine.install.manifest().id();
    let other = open(&machine.disk, &image(99), false).unwrap_err();
    assert_eq!(other, OpenError::OtherImage(id));
}
