//! Power cuts at any moment: what a guest was told to be durable is there, and everything else is what
//! the image has or what the guest wrote.

mod common;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;

use bmcast_image::{Manifest, Sectors};
use bmcast_install::{Fetched, Install, OpenError, Options};
use bmcast_mediator::{Blocks as _, Failed, Verdict, Work};
use common::{boot, bytes, image, manifest, sectors};
use proptest::prelude::*;

type Sector = [u8; 512];
const GARBAGE: Sector = [0x5a; 512];

/// Subsets that nobody has chosen with care.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % sides
    }
}

/// A disk with a cache that loses anything when the power goes.
#[derive(Default)]
struct Disk {
    stable: HashMap<u64, Sector>,
    /// What was written to each sector since it was stable, in order, with when that was.
    cache: HashMap<u64, Vec<(u64, Sector)>>,
    time: u64,
}

impl Disk {
    fn get(&self, sector: u64) -> Sector {
        let cached = self.cache.get(&sector).and_then(|all| all.last());
        match cached {
            Some((_, data)) => *data,
            None => *self.stable.get(&sector).unwrap_or(&GARBAGE),
        }
    }

    fn put(&mut self, sector: u64, data: Sector) {
        self.time += 1;
        let time = self.time;
        self.cache.entry(sector).or_default().push((time, data));
    }

    /// A flush that began at `began` is done: what was written later may be lost still.
    fn flush(&mut self, began: u64) {
        for (sector, all) in &mut self.cache {
            let behind = all.partition_point(|(time, _)| *time <= began);
            if let Some((_, data)) = all[..behind].last() {
                self.stable.insert(*sector, *data);
                all.drain(..behind);
            }
        }
        self.cache.retain(|_, all| !all.is_empty());
    }

    /// The power goes: of each sector, any of what was written since it was stable, or nothing. Of the
    /// record, whose pieces are made for disks that have sectors of 4 KiB, such a sector may be lost.
    fn cut(&mut self, record: u64, dice: &mut Dice) {
        let mut cache: Vec<_> = self.cache.drain().collect();
        cache.sort_unstable_by_key(|(sector, _)| *sector);
        for (sector, all) in cache {
            let which = dice.roll(all.len() + 1);
            if let Some((_, data)) = all.get(which) {
                self.stable.insert(sector, *data);
            }
            if sector >= record && sector % 8 == 0 && dice.roll(4) == 0 {
                for sector in sector..sector + 8 {
                    self.stable.insert(sector, [0xbd; 512]);
                }
            }
        }
    }

    fn read(&self, at: Sectors, into: &mut [u8]) -> Result<(), Infallible> {
        for (sector, into) in (at.start..).zip(into.chunks_exact_mut(512)) {
            into.copy_from_slice(&self.get(sector));
        }
        Ok(())
    }
}

/// What a guest asks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Request {
    Read(Sectors),
    Write {
        to: Sectors,
        fua: bool,
        version: u32,
    },
    /// And all versions up to this one were written when it was asked.
    Flush {
        up_to: u32,
        began: u64,
    },
}

/// What happens.
#[derive(Clone, Debug)]
enum Event {
    Read(Sectors),
    Write(Sectors, bool),
    Flush,
    /// What is held is asked again.
    Poll,
    /// A command of the guest's is done.
    GuestDone(usize),
    /// The VMM's next command is on the device.
    Work(bool),
    WorkDone,
    WorkFails(u64),
    Fetch,
    Come(usize),
    ComeWrong(usize),
    Tick(u64),
    Cut(u64),
}

/// Of the guest's view, a sector.
#[derive(Clone, Default)]
struct Truth {
    /// What the guest has written, the last of it last: version, and whether the device said that it is
    /// done. The first one is what it is for sure at least; 0 is the image.
    versions: Vec<(u32, bool)>,
}

struct World {
    image: Vec<u8>,
    manifest: Manifest,
    options: Options,
    size: u64,
    disk: Disk,
    install: Install,
    /// Of sectors that the guest has written.
    truth: BTreeMap<u64, Truth>,
    held: VecDeque<Request>,
    /// On the device, the guest's.
    guest: Vec<Request>,
    /// On the device, the VMM's, and since when.
    own: Option<(Work, u64)>,
    fetching: Vec<u32>,
    version: u32,
    boots: u8,
    now: u64,
}

impl World {
    fn new(image: Vec<u8>, options: Options) -> Self {
        let manifest = manifest(&image, vec![2, 0]);
        let size = image.len() as u64 / 512 + 200;
        let disk = Disk::default();
        let install = open(&disk, size, &manifest, 1, options);
        Self {
            image,
            manifest,
            options,
            size,
            disk,
            install,
            truth: BTreeMap::new(),
            held: VecDeque::new(),
            guest: Vec::new(),
            own: None,
            fetching: Vec::new(),
            version: 0,
            boots: 1,
            now: 0,
        }
    }

    fn content(&self, sector: u64, version: u32) -> Sector {
        if version == 0 {
            return self.image[bytes(sectors(sector, 1))].try_into().unwrap();
        }
        let mut data = [0xee; 512];
        data[..4].copy_from_slice(&version.to_le_bytes());
        data[8..16].copy_from_slice(&sector.to_le_bytes());
        data
    }

    /// The version that the guest reads: the last one that is done.
    fn current(&self, sector: u64) -> u32 {
        let truth = self.truth.get(&sector);
        truth.map_or(0, |truth| {
            let done = truth.versions.iter().rev().find(|(_, done)| *done);
            done.map_or(0, |(version, _)| *version)
        })
    }

    fn is_busy(&self, range: Sectors) -> bool {
        self.guest
            .iter()
            .chain(&self.held)
            .any(|request| match request {
                Request::Write { to, .. } => to.meets(range),
                _ => false,
            })
    }

    fn ask(&mut self, request: Request) -> bool {
        let verdict = match request {
            Request::Read(from) => self.install.read(from),
            Request::Write { to, fua, .. } => self.install.write(to, fua),
            Request::Flush { .. } => self.install.flush(),
        };
        if verdict == Verdict::Hold {
            return false;
        }
        match request {
            Request::Read(from) => {
                for sector in from.start..from.end() {
                    let expected = self.content(sector, self.current(sector));
                    assert_eq!(self.disk.get(sector), expected, "sector {sector}");
                }
            }
            Request::Write { to, fua, .. } => {
                self.version += 1;
                let version = self.version;
                if let Some((Work::Write { to: own, .. }, _)) = &self.own {
                    assert!(!own.meets(to), "the guest writes {to:?} below {own:?}");
                }
                for sector in to.start..to.end() {
                    let truth = self.truth.entry(sector).or_insert_with(|| Truth {
                        versions: vec![(0, true)],
                    });
                    truth.versions.push((version, false));
                }
                self.guest.push(Request::Write { to, fua, version });
            }
            Request::Flush { up_to, .. } => {
                let began = self.disk.time;
                self.guest.push(Request::Flush { up_to, began });
            }
        }
        true
    }

    fn new_request(&mut self, request: Request) {
        if self.held.len() < 6 && !self.ask(request) {
            self.held.push_back(request);
        }
    }

    fn poll(&mut self) {
        for _ in 0..self.held.len() {
            if let Some(request) = self.held.pop_front()
                && !self.ask(request)
            {
                self.held.push_back(request);
            }
        }
    }

    fn guest_done(&mut self, which: usize) {
        if self.guest.is_empty() {
            return;
        }
        match self.guest.swap_remove(which % self.guest.len()) {
            Request::Read(_) => {}
            Request::Write { to, fua, version } => {
                for sector in to.start..to.end() {
                    self.disk.put(sector, self.content(sector, version));
                    let truth = self.truth.get_mut(&sector).unwrap();
                    truth.versions.last_mut().unwrap().1 = true;
                    if fua {
                        // It is durable, and so none before it is left.
                        truth.versions.drain(..truth.versions.len() - 1);
                        let all = self.disk.cache.remove(&sector).unwrap();
                        self.disk.stable.insert(sector, all.last().unwrap().1);
                    }
                }
                self.install.written(to);
            }
            Request::Flush { up_to, began } => {
                self.disk.flush(began);
                for truth in self.truth.values_mut() {
                    let done = |(version, done): &(u32, bool)| *done && *version <= up_to;
                    let last = truth.versions.iter().rposition(done);
                    truth.versions.drain(..last.unwrap_or(0));
                }
            }
        }
    }

    fn work(&mut self, quiet: bool) {
        if self.own.is_some() {
            return;
        }
        let Some(work) = self.install.next(quiet) else {
            return;
        };
        if let Work::Write { to, data } = &work {
            assert_eq!(to.count * 512, data.len() as u64);
            assert!(to.end() <= self.size);
            let visible = self.install.visible();
            assert!(to.end() <= self.image.len() as u64 / 512 || to.start >= visible);
            for request in &self.guest {
                if let Request::Write { to: guest, .. } = request {
                    assert!(!guest.meets(*to), "{to:?} below the guest's {guest:?}");
                }
            }
            if to.start < visible {
                for sector in to.start..to.end() {
                    assert_eq!(self.current(sector), 0, "{sector} is the guest's");
                }
            }
        }
        self.own = Some((work, self.disk.time));
    }

    fn work_done(&mut self) {
        let Some((work, began)) = self.own.take() else {
            return;
        };
        match work {
            Work::Flush => self.disk.flush(began),
            Work::Write { to, data } => {
                for (sector, data) in (to.start..).zip(data.chunks_exact(512)) {
                    self.disk.put(sector, data.try_into().unwrap());
                }
            }
        }
        self.install.done(Ok(()));
    }

    fn work_fails(&mut self, dice: &mut Dice) {
        if let Some((work, _)) = self.own.take() {
            if let Work::Write { to, data } = work {
                for (sector, data) in (to.start..).zip(data.chunks_exact(512)) {
                    if dice.roll(2) == 0 {
                        self.disk.put(sector, data.try_into().unwrap());
                    }
                }
            }
            self.install.done(Err(Failed { status: 0x40 }));
        }
    }

    fn come(&mut self, which: usize, wrong: bool) {
        if self.fetching.is_empty() {
            return;
        }
        let chunk = self.fetching.swap_remove(which % self.fetching.len());
        let mut data = self.image[bytes(self.manifest.chunks().sectors(chunk))].to_vec();
        match (wrong, which % 3) {
            (false, _) => assert_eq!(self.install.fetched(chunk, data), Fetched::Taken),
            (true, 0) => self.install.fetch_failed(chunk),
            (true, 1) => assert_eq!(self.install.fetched(chunk, vec![1; 5]), Fetched::Wrong),
            (true, _) => {
                let last = data.len() - 1;
                data[last] ^= 1;
                assert_eq!(self.install.fetched(chunk, data), Fetched::Wrong);
            }
        }
    }

    fn cut(&mut self, dice: &mut Dice) {
        // What is on the device may have come to the cache, sector by sector.
        let mut on_device: Vec<(u64, Sector)> = Vec::new();
        for request in &self.guest {
            if let Request::Write { to, version, .. } = request {
                let all =
                    (to.start..to.end()).map(|sector| (sector, self.content(sector, *version)));
                on_device.extend(all);
            }
        }
        if let Some((Work::Write { to, data }, _)) = &self.own {
            let all = (to.start..).zip(data.chunks_exact(512));
            on_device.extend(all.map(|(sector, data)| (sector, data.try_into().unwrap())));
        }
        for (sector, data) in on_device {
            self.disk.put(sector, data);
        }
        self.disk.cut(self.install.visible(), dice);
        self.guest.clear();
        self.held.clear();
        self.fetching.clear();
        self.own = None;
        self.boots += 1;
        self.install = self.open();
        // What the guest finds.
        let mut probe = self.open();
        let truth = std::mem::take(&mut self.truth);
        for sector in 0..self.image.len() as u64 / 512 {
            let is_on_disk = probe.read(sectors(sector, 1)) == Verdict::Pass;
            let found = match is_on_disk {
                true => self.disk.get(sector),
                false => self.content(sector, 0),
            };
            let allowed: Vec<u32> = match truth.get(&sector) {
                Some(truth) => truth.versions.iter().map(|(version, _)| *version).collect(),
                None => vec![0],
            };
            let is = allowed
                .iter()
                .find(|version| self.content(sector, **version) == found);
            let Some(is) = is else {
                panic!(
                    "sector {sector}, on disk: {is_on_disk}: not {allowed:?}: {:x?}",
                    &found[..16]
                );
            };
            if *is != 0 {
                let versions = vec![(*is, true)];
                self.truth.insert(sector, Truth { versions });
            }
        }
    }

    fn open(&self) -> Install {
        let mut install = open(
            &self.disk,
            self.size,
            &self.manifest,
            self.boots,
            self.options,
        );
        install.tick(self.now);
        install
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Read(from) => self.new_request(Request::Read(from)),
            Event::Write(to, fua) => {
                if !self.is_busy(to) {
                    let version = 0;
                    self.new_request(Request::Write { to, fua, version });
                }
            }
            Event::Flush => self.new_flush(),
            Event::Poll => self.poll(),
            Event::GuestDone(which) => self.guest_done(which),
            Event::Work(quiet) => self.work(quiet),
            Event::WorkDone => self.work_done(),
            Event::WorkFails(seed) => self.work_fails(&mut Dice(seed | 1)),
            Event::Fetch => {
                if let Some(fetch) = self.install.next_fetch() {
                    assert!(!self.fetching.contains(&fetch.chunk));
                    self.fetching.push(fetch.chunk);
                }
            }
            Event::Come(which) => self.come(which, false),
            Event::ComeWrong(which) => self.come(which, true),
            Event::Tick(micros) => {
                self.now += micros;
                self.install.tick(self.now);
            }
            Event::Cut(seed) => self.cut(&mut Dice(seed | 1)),
        }
    }

    /// A flush covers what is done when it is asked: versions are in the order in which they came to
    /// the device, and those from the first one on that is not done are not counted.
    fn new_flush(&mut self) {
        let open = self.guest.iter().filter_map(|request| match request {
            Request::Write { version, .. } => Some(version - 1),
            _ => None,
        });
        let up_to = open.min().unwrap_or(self.version);
        self.new_request(Request::Flush { up_to, began: 0 });
    }

    /// Nothing goes wrong any more: all that waits is done, and all is installed.
    fn end(&mut self) {
        for _ in 0..20_000 {
            self.poll();
            while !self.guest.is_empty() {
                self.guest_done(0);
            }
            self.happen(Event::Fetch);
            self.come(0, false);
            self.work_done();
            self.work(true);
            self.happen(Event::Tick(100_000));
            if self.install.complete() && self.held.is_empty() {
                break;
            }
        }
        assert!(self.held.is_empty(), "for ever: {:?}", self.held);
        assert!(self.install.complete(), "{:?}", self.install.progress());
        for sector in 0..self.image.len() as u64 / 512 {
            let expected = self.content(sector, self.current(sector));
            assert_eq!(self.disk.get(sector), expected, "sector {sector}");
        }
    }
}

fn open(disk: &Disk, size: u64, manifest: &Manifest, number: u8, options: Options) -> Install {
    let read = |at: Sectors, into: &mut [u8]| disk.read(at, into);
    Install::open(size, manifest.clone(), boot(number, true), options, read).unwrap()
}

/// A range near one of these sectors, within the image.
fn range(image: u64, near: &'static [u64]) -> impl Strategy<Value = Sectors> {
    let start = proptest::sample::select(near);
    (start, 0..24u64, prop_oneof![4 => 1..12u64, 1 => 1..70u64]).prop_map(
        move |(near, off, count)| {
            let start = (near + off).min(image - 1);
            sectors(start, count.min(image - start))
        },
    )
}

fn event(image: u64, near: &'static [u64]) -> impl Strategy<Value = Event> {
    let range = move || range(image, near);
    prop_oneof![
        3 => range().prop_map(Event::Read),
        6 => (range(), prop::bool::weighted(0.15)).prop_map(|(to, fua)| Event::Write(to, fua)),
        2 => Just(Event::Flush),
        4 => Just(Event::Poll),
        6 => (0..8usize).prop_map(Event::GuestDone),
        8 => any::<bool>().prop_map(Event::Work),
        8 => Just(Event::WorkDone),
        1 => any::<u64>().prop_map(Event::WorkFails),
        4 => Just(Event::Fetch),
        4 => (0..8usize).prop_map(Event::Come),
        1 => (0..8usize).prop_map(Event::ComeWrong),
        1 => (1..3_000_000u64).prop_map(Event::Tick),
        1 => any::<u64>().prop_map(Event::Cut),
    ]
}

/// Chunks of which are many at once, and a record that is written often.
const OPTIONS: Options = Options {
    memory: 64 << 10,
    in_flight: 3,
    rate: None,
    commit_bytes: 40 << 10,
    commit_micros: 2_000_000,
};

const SMALL: u64 = 150;
const BLOCK: u64 = 7 * 4032;

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_small_image(events in prop::collection::vec(event(SMALL, &[0, 20, 60, 90, 128]), 1..400)) {
        let mut world = World::new(image(SMALL), OPTIONS);
        for event in events {
            world.happen(event);
        }
        world.end();
        world.cut(&mut Dice(99));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// Of two blocks of the record.
    #[test]
    fn a_large_image(events in prop::collection::vec(event(BLOCK + 300, &[0, 60, BLOCK - 30, BLOCK, BLOCK + 90]), 1..250)) {
        let mut world = World::new(image(BLOCK + 300), OPTIONS);
        for event in events {
            world.happen(event);
        }
        world.end();
        world.cut(&mut Dice(99));
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Until the new record is there, the one before it says the truth.
    #[test]
    fn an_installation_over_another(steps in prop_oneof![0..8usize, 0..40usize], seed in any::<u64>()) {
        let mut world = World::new(image(SMALL), OPTIONS);
        world.end();
        let mut other = world.image.clone();
        other.iter_mut().for_each(|byte| *byte ^= 0xff);
        let before = std::mem::replace(&mut world.manifest, manifest(&other, Vec::new()));
        let image = std::mem::replace(&mut world.image, other);
        world.install = world.open();
        for _ in 0..steps {
            world.happen(Event::Write(sectors(3, 4), false));
            world.poll();
            world.guest_done(0);
            world.happen(Event::Fetch);
            world.come(0, false);
            world.work_done();
            world.work(true);
        }
        world.cut(&mut Dice(seed | 1));
        // There is one record at any moment; if it is the first image's, all of that is there.
        let read = |at: Sectors, into: &mut [u8]| world.disk.read(at, into);
        let found = Install::open(world.size, world.manifest.clone(), boot(8, false), OPTIONS, read);
        let is_other = matches!(found, Err(OpenError::OtherImage(id)) if id == before.id());
        prop_assert!(is_other || found.is_ok(), "{:?}", found.err());
        let mut probe = open(&world.disk, world.size, &before, 9, OPTIONS);
        prop_assert_eq!(probe.complete(), is_other);
        if is_other {
            prop_assert_eq!(probe.read(sectors(0, SMALL)), Verdict::Pass);
            for sector in 0..SMALL {
                prop_assert_eq!(&world.disk.get(sector)[..], &image[bytes(sectors(sector, 1))]);
            }
        }
        world.end();
    }
}
