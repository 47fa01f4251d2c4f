use core::convert::Infallible;

use alloc::vec;

use proptest::prelude::*;

use super::*;

const IMAGE: u64 = COVERS * 2 + 100;
const DISK: u64 = IMAGE + 107;
const NAME: Hash = Hash([7; 32]);
const KEY: Key = Key([3; 32]);

fn layout() -> Layout {
    Layout::new(DISK, IMAGE).unwrap()
}

struct Medium(Vec<u8>);

impl Medium {
    fn new() -> Self {
        Self(vec![
            0xa5;
            usize::try_from((DISK - layout().visible()) * SECTOR)
                .unwrap()
        ])
    }

    fn range(at: Sectors) -> core::ops::Range<usize> {
        let start = usize::try_from((at.start - layout().visible()) * SECTOR).unwrap();
        start..start + usize::try_from(at.count * SECTOR).unwrap()
    }

    fn write(&mut self, piece: &Piece) {
        self.0[Self::range(piece.to)].copy_from_slice(&piece.data);
    }

    fn find(&self, name: Hash) -> Result<Found, RecordError<Infallible>> {
        self.find_by(name, KEY)
    }

    fn find_by(&self, name: Hash, key: Key) -> Result<Found, RecordError<Infallible>> {
        Record::find(layout(), name, key, [9; 16], |at, bytes| {
            bytes.copy_from_slice(&self.0[Self::range(at)]);
            Ok(())
        })
    }

    fn record(&self) -> Record {
        match self.find(NAME).unwrap() {
            Found::This(record) => *record,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn sizes() {
    let layout = layout();
    // Three blocks and a header, twice, on a boundary of 4 KiB.
    assert_eq!(layout.visible(), DISK / 8 * 8 - 64);
    assert_eq!(layout.header(1).end(), DISK / 8 * 8);
    assert_eq!(layout.block(2, 1).end(), layout.header(0).start);
    let error = Layout::new(IMAGE + 63, IMAGE).unwrap_err();
    assert_eq!((error.disk, error.image), (IMAGE + 63, IMAGE));
    assert!(Layout::new(IMAGE + error.record, IMAGE).is_ok() || error.record > 64);
    assert!(Layout::new(0, 1).is_err());
}

#[test]
fn an_old_record_is_another_until_the_new_one_is_there() {
    let mut medium = Medium::new();
    assert!(matches!(medium.find(NAME), Ok(Found::Nothing)));
    let old = Record::begin(layout(), Hash([1; 32]), KEY, [1; 16], None);
    let mut local = SectorSet::new(IMAGE);
    local.insert(Sectors { start: 0, count: 9 });
    for piece in old.commit(&local, vec![0, 1], 4096).pieces() {
        medium.write(piece);
    }
    let Ok(Found::Other(header)) = medium.find(NAME) else {
        panic!("it is there");
    };
    assert!(!header.complete);
    let new = Record::begin(layout(), NAME, KEY, [2; 16], Some(&header));
    for piece in new.commit(&local, vec![], 4096).pieces() {
        medium.write(piece);
    }
    // Blocks of the old one are still there, and say nothing.
    assert_eq!(medium.record().durable().missing(), IMAGE);
}

#[test]
fn a_record_by_another_key_is_none_and_is_written_over() {
    let mut medium = Medium::new();
    let other = Key([4; 32]);
    let mut left = Record::begin(layout(), NAME, other, [1; 16], None);
    for _ in 0..7 {
        let commit = left.completion();
        medium.write(&commit.pieces()[0]);
        left.committed(&commit);
    }
    assert!(matches!(medium.find(NAME), Ok(Found::Nothing)));
    assert!(matches!(medium.find_by(NAME, other), Ok(Found::This(_))));
    let new = Record::begin(layout(), NAME, KEY, [2; 16], None);
    let begin = new.commit(&SectorSet::new(IMAGE), vec![], 8192);
    begin.pieces().iter().for_each(|piece| medium.write(piece));
    assert!(matches!(medium.find_by(NAME, other), Ok(Found::Nothing)));
    assert_eq!(medium.record().durable().missing(), IMAGE);
}

#[test]
fn generations_that_were_not_counted_are_no_generations() {
    let mut medium = Medium::new();
    let mut record = Record::begin(layout(), NAME, KEY, [2; 16], None);
    record.header.generation = MOST_GENERATIONS - 1;
    medium.write(&record.completion().pieces()[0]);
    assert!(matches!(medium.find(NAME), Ok(Found::Nothing)));
}

#[test]
fn complete() {
    let mut medium = Medium::new();
    let mut record = Record::begin(layout(), NAME, KEY, [2; 16], None);
    let commit = record.completion();
    medium.write(&commit.pieces()[0]);
    record.committed(&commit);
    for record in [record, medium.record()] {
        assert!(record.complete());
        assert_eq!(record.durable().missing(), 0);
    }
}

#[test]
fn other_versions_and_disks_are_refused() {
    let mut medium = Medium::new();
    let mut record = Record::begin(layout(), NAME, KEY, [2; 16], None);
    record.header.disk += 8;
    medium.write(&record.completion().pieces()[0]);
    let error = medium.find(NAME).unwrap_err();
    assert!(matches!(error, RecordError::Geometry { .. }), "{error}");
    let mut piece = record.completion().pieces()[0].clone();
    piece.data[40] = 9;
    seal(&mut piece.data, HEADER_MAGIC, &KEY, [0; MARK]);
    medium.write(&piece);
    assert!(matches!(medium.find(NAME), Err(RecordError::Version(9))));
}

#[test]
fn sectors_of_two_cut_writes_make_up_none() {
    let mut local = SectorSet::new(IMAGE);
    let begin = |random| {
        let mut record = Record::begin(layout(), NAME, KEY, [2; 16], None);
        record.mark = random;
        record
    };
    local.insert(Sectors { start: 0, count: 9 });
    let first = begin([1; MARK]).commit(&local, vec![0], BLOCK);
    local.insert(Sectors { start: 9, count: 9 });
    let second = begin([2; MARK]).commit(&local, vec![0], BLOCK);
    let (first, second) = (&first.pieces()[0].data, &second.pieces()[0].data);
    for mix in 0..1u32 << (BLOCK / 512) {
        let mut bytes = first.clone();
        for (n, sector) in bytes.chunks_exact_mut(512).enumerate() {
            if mix >> n & 1 == 1 {
                sector.copy_from_slice(&second[n * 512..][..512]);
            }
        }
        assert_eq!(is_whole(&bytes, BLOCK_MAGIC, &KEY), mix == 0 || mix == 0xff);
    }
}

proptest! {
    /// Steps of which each but the last is written whole, and of the last one some sectors.
    #[test]
    fn a_cut_step_loses_and_invents_nothing(
        steps in prop::collection::vec((0..IMAGE, 1..5000u64), 1..12),
        cut in any::<u64>(),
    ) {
        let mut medium = Medium::new();
        let mut record = Record::begin(layout(), NAME, KEY, [2; 16], None);
        let begin = record.commit(&SectorSet::new(IMAGE), vec![], 4096);
        begin.pieces().iter().for_each(|piece| medium.write(piece));
        record.committed(&begin);
        let mut local = SectorSet::new(IMAGE);
        let last = steps.len() - 1;
        for (n, (start, count)) in steps.into_iter().enumerate() {
            let before = local.clone();
            let new = Sectors { start, count };
            local.insert(new);
            let touched = layout().block_of(start)..=layout().block_of(new.end().min(IMAGE) - 1);
            let commit = record.commit(&local, touched.collect(), 8192);
            prop_assert!(commit.pieces().iter().all(|piece| piece.data.len() <= 8192));
            if n < last {
                commit.pieces().iter().for_each(|piece| medium.write(piece));
                record.committed(&commit);
                prop_assert_eq!(record.durable(), &local);
                let again = medium.record();
                prop_assert_eq!(again.durable(), &local);
                continue;
            }
            let mut bit = 0;
            for piece in commit.pieces() {
                for (sector, data) in (piece.to.start..).zip(piece.data.chunks_exact(512)) {
                    if cut >> (bit % 64) & 1 == 1 {
                        let to = Sectors { start: sector, count: 1 };
                        medium.write(&Piece { to, data: data.to_vec() });
                    }
                    bit += 1;
                }
            }
            let after = medium.record();
            let (mut union, all) = (before.clone(), Sectors { start: 0, count: IMAGE });
            let mut at = all;
            while let Some(run) = before.next_missing(at) {
                // What was not there before may be there if the step says so.
                for sector in run.start..run.end() {
                    let one = Sectors { start: sector, count: 1 };
                    if after.durable().contains(one) {
                        prop_assert!(local.contains(one));
                        union.insert(one);
                    }
                }
                at = Sectors { start: run.end(), count: IMAGE - run.end() };
            }
            prop_assert_eq!(after.durable(), &union);
        }
    }
}
