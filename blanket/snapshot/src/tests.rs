use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    name: String,
    words: Vec<u64>,
}

fn text() -> Text {
    Text {
        name: "web".into(),
        words: vec![0, u64::MAX, 7],
    }
}

fn page(byte: u8) -> Vec<u8> {
    vec![byte; PAGE]
}

fn saved() -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).expect("a writer");
    writer.text(Kind::Machine, &text()).expect("written");
    writer
        .pages(3, &[page(1), page(2)].concat())
        .expect("written");
    writer.pages(9, &page(7)).expect("written");
    writer.text(Kind::State, &text()).expect("written");
    let (bytes, length) = writer.finish().expect("written");
    assert_eq!(bytes.len() as u64, length);
    bytes
}

fn read(bytes: &[u8]) -> Result<(Text, Vec<Run>, Text), Error> {
    let mut reader = Reader::new(bytes)?;
    let machine = reader.text(Kind::Machine)?;
    let mut runs = Vec::new();
    while let Some(part) = reader.part()? {
        let Part::Pages(run) = part else { continue };
        runs.push(run);
    }
    let state = reader.text(Kind::State)?;
    reader.finish()?;
    Ok((machine, runs, state))
}

#[test]
fn what_is_written_is_read() {
    let (machine, runs, state) = read(&saved()).expect("read");
    assert_eq!(machine, text());
    assert_eq!(state, text());
    assert_eq!(runs[0].first, 3);
    assert_eq!(runs[0].bytes, [page(1), page(2)].concat());
    assert_eq!(
        runs[1],
        Run {
            first: 9,
            bytes: page(7)
        }
    );
}

#[test]
fn every_flipped_bit_is_found() {
    let good = saved();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        let error = read(&bad).expect_err(&format!("byte {at}"));
        assert!(
            matches!(
                error,
                Error::Foreign | Error::Version(_) | Error::Damaged(_) | Error::Truncated(_)
            ),
            "byte {at}: {error}"
        );
    }
}

#[test]
fn every_end_that_is_too_early_is_found() {
    let good = saved();
    for length in 0..good.len() {
        let error = read(&good[..length]).expect_err("too short");
        assert!(
            matches!(error, Error::Foreign | Error::Truncated(_)),
            "{error}"
        );
    }
}

#[test]
fn other_versions_kinds_and_fields_are_refused() {
    // The one before, and the next.
    for version in [crate::VERSION - 1, crate::VERSION + 1] {
        let mut other = saved();
        other[8..12].copy_from_slice(&version.to_le_bytes());
        assert!(matches!(read(&other), Err(Error::Version(found)) if found == version));
    }

    let mut writer = Writer::new(Vec::new()).expect("a writer");
    writer.text(Kind::State, &text()).expect("written");
    let (bytes, _) = writer.finish().expect("written");
    let error = read(&bytes).expect_err("no machine");
    assert!(
        error.to_string().contains("where there must be machine"),
        "{error}"
    );

    let mut writer = Writer::new(Vec::new()).expect("a writer");
    writer
        .text(
            Kind::Machine,
            &serde_json::json!({"name": "a", "words": [], "more": 1}),
        )
        .expect("written");
    let (bytes, _) = writer.finish().expect("written");
    let error = read(&bytes).expect_err("a field too many");
    assert!(
        error.to_string().contains("unknown field `more`"),
        "{error}"
    );

    let mut writer = Writer::new(Vec::new()).expect("a writer");
    writer
        .text(Kind::Machine, &serde_json::json!({"name": "a"}))
        .expect("written");
    let (bytes, _) = writer.finish().expect("written");
    let error = read(&bytes).expect_err("a field too few");
    assert!(
        error.to_string().contains("missing field `words`"),
        "{error}"
    );
}

#[test]
fn pages_that_cannot_be_are_refused() {
    let mut writer = Writer::new(Vec::new()).expect("a writer");
    assert!(writer.pages(0, &[]).is_err());
    assert!(writer.pages(0, &[0; 100]).is_err());
    assert!(pages::unpack(&[0; 15]).is_none());
    let mut packed = pages::pack(1, &page(3)).expect("packed");
    packed[8] = 2;
    assert!(pages::unpack(&packed).is_none(), "another number of pages");
    let mut packed = pages::pack(u64::MAX, &page(3)).expect("packed");
    assert!(pages::unpack(&packed).is_none(), "pages beyond the last");
    packed.truncate(20);
    assert!(pages::unpack(&packed).is_none());
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_no_harm(mut bytes: Vec<u8>, headed: bool) {
        if headed {
            let mut all = saved();
            all.truncate(16);
            all.append(&mut bytes);
            bytes = all;
        }
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn arbitrary_packed_pages_do_no_harm(bytes: Vec<u8>) {
        let _ = pages::unpack(&bytes);
    }
}

#[test]
fn pieces_of_disks_are_among_the_pages() {
    let bytes = vec![5; 1536];
    let mut writer = Writer::new(Vec::new()).expect("a writer");
    writer.pages(3, &page(1)).expect("written");
    writer.disk(51712, 65536, &bytes).expect("written");
    writer.text(Kind::State, &text()).expect("written");
    for wrong in [vec![], vec![0; MAX_PIECE + 1]] {
        assert!(writer.disk(0, 0, &wrong).is_err());
    }
    let (file, _) = writer.finish().expect("written");
    let mut reader = Reader::new(&file[..]).expect("one of ours");
    assert!(matches!(reader.part(), Ok(Some(Part::Pages(run))) if run.first == 3));
    let piece = Piece {
        number: 51712,
        offset: 65536,
        bytes,
    };
    assert!(matches!(reader.part(), Ok(Some(Part::Disk(found))) if found == piece));
    assert!(matches!(reader.part(), Ok(None)));
    let _: Text = reader.text(Kind::State).expect("a state");
    reader.finish().expect("the end");
}

proptest! {
    #[test]
    fn any_bytes_as_a_piece(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut writer = Writer::new(Vec::new()).expect("a writer");
        writer.chunk(Kind::Disk, &bytes).expect("written");
        let (file, _) = writer.finish().expect("written");
        let part = Reader::new(&file[..]).expect("one of ours").part();
        if let Ok(Some(Part::Disk(piece))) = part {
            prop_assert!((1..=MAX_PIECE).contains(&piece.bytes.len()));
        }
    }
}

#[test]
fn marks_come_where_they_were_made() {
    let mut writer = Writer::new(Vec::new()).expect("a writer");
    writer.pages(3, &page(1)).expect("written");
    let so_far = writer.mark().expect("written").len();
    writer.pages(3, &page(2)).expect("written");
    writer.chunk(Kind::Mark, b"?").expect("written");
    let (bytes, _) = writer.finish().expect("written");
    let mut reader = Reader::new(&bytes[..]).expect("one");
    assert!(matches!(reader.part(), Ok(Some(Part::Pages(_)))));
    assert!(matches!(reader.part(), Ok(Some(Part::Mark))));
    assert_eq!(
        reader.from_mut().len(),
        bytes.len() - so_far,
        "nothing is read ahead"
    );
    assert!(matches!(reader.part(), Ok(Some(Part::Pages(_)))));
    assert!(reader.part().is_err(), "a mark has nothing in it");
}

/// A chunk of these bytes, as it is read.
fn base_of(bytes: &[u8]) -> Result<Option<Part>, Error> {
    let mut writer = Writer::new(Vec::new()).expect("a writer");
    writer.chunk(Kind::Base, bytes).expect("written");
    let (file, _) = writer.finish().expect("written");
    let mut reader = Reader::new(&file[..]).expect("one of ours");
    let part = reader.part();
    // Where pages stay in their file, these are none of them.
    let mut reader = Reader::new(&file[..]).expect("one of ours");
    let found = reader.found().map(|found| {
        found.map(|found| match found {
            Found::Part(part) => part,
            Found::Pages(place) => panic!("{place:?}"),
        })
    });
    assert_eq!(found.ok(), part.as_ref().ok().cloned());
    part
}

#[test]
fn pages_that_are_named_instead_of_sent() {
    let bytes = [page(1), page(2)].concat();
    let mut writer = Writer::new(Vec::new()).expect("a writer");
    writer.base(51712, 7, 90, &bytes).expect("written");
    for wrong in [0, 100, PAGE + 1, (MAX_BLOCKS + 1) * PAGE] {
        assert!(writer.base(0, 0, 0, &vec![0; wrong]).is_err(), "{wrong}");
    }
    assert!(
        writer.base(0, u64::MAX, 0, &bytes).is_err(),
        "beyond the last page"
    );
    assert!(
        writer.base(0, 0, u64::MAX / 4096, &bytes).is_err(),
        "beyond the last byte"
    );
    let (file, _) = writer.finish().expect("written");
    let mut reader = Reader::new(&file[..]).expect("one of ours");
    let Ok(Some(Part::Base(base))) = reader.part() else {
        panic!("it was written");
    };
    assert_eq!(
        (base.number, base.count, base.first, base.block),
        (51712, 2, 7, 90)
    );
    assert_eq!((base.offset(), base.length()), (90 * 4096, 8192));
    assert!(base.is(&bytes));
    assert!(!base.is(&bytes[..PAGE]) && !base.is(&[page(1), page(3)].concat()));
}

proptest! {
    #[test]
    fn any_pages_are_named(number: u32, first: u64, block in 0..1u64 << 52, seed: u8, count in 1..5usize) {
        let bytes: Vec<u8> = (0..count).flat_map(|n| vec![seed ^ u8::try_from(n).unwrap_or(0); PAGE]).collect();
        let mut writer = Writer::new(Vec::new()).expect("a writer");
        let written = writer.base(number, first, block, &bytes);
        let fits = first.checked_add(count as u64).is_some() && block + (count as u64) < 1 << 52;
        prop_assert_eq!(written.is_ok(), fits);
        if fits {
            let (file, _) = writer.finish().expect("written");
            let part = Reader::new(&file[..]).expect("one of ours").part();
            let Ok(Some(Part::Base(base))) = part else {
                panic!("it was written");
            };
            prop_assert_eq!((base.number, base.first, base.block), (number, first, block));
            prop_assert!(base.is(&bytes));
        }
    }

    #[test]
    fn any_bytes_as_named_pages(bytes in prop::collection::vec(any::<u8>(), 50..70), few: bool) {
        let mut bytes = bytes;
        if few {
            bytes.truncate(56);
            bytes[4..8].copy_from_slice(&7u32.to_le_bytes());
        }
        match base_of(&bytes) {
            Ok(part) => {
                let Some(Part::Base(base)) = part else { panic!("another kind") };
                prop_assert!(bytes.len() == 56 && (1..=MAX_BLOCKS).contains(&(base.count as usize)));
                prop_assert!(base.first.checked_add(base.count.into()).is_some());
                prop_assert!(base.offset().checked_add(base.length() as u64).is_some());
            }
            Err(error) => prop_assert!(matches!(error, Error::Pages(0)), "{error}"),
        }
    }
}
