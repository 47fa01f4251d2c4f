//! Any bytes as what the other side says: what must hold whatever they are. Run by unit tests with
//! bytes at random, and by a fuzz target.

use std::io::Read;

use crate::lanes::{self, Gathered};
use crate::message::{Hello, Message, Verdict, acknowledged};
use crate::pages::Pages;
use crate::pull::{Ask, MOST, Needed, Piece, Pulling, Serving};

/// Pages of the VM.
const FRAMES: u64 = 300;

/// Those that follow it.
fn kept() -> Pages {
    let mut kept = Pages::none(FRAMES);
    (0..FRAMES)
        .filter(|page| page % 3 != 0)
        .for_each(|page| kept.add(page));
    kept
}

/// What was read is said as it was.
fn again<T: PartialEq + std::fmt::Debug, E: std::fmt::Debug>(
    read: &T,
    write: impl FnOnce(&mut Vec<u8>) -> std::io::Result<()>,
    reread: impl FnOnce(&mut &[u8]) -> Result<T, E>,
) {
    let mut bytes = Vec::new();
    write(&mut bytes).expect("memory");
    let mut rest = &bytes[..];
    assert_eq!(&reread(&mut rest).expect("it was read before"), read);
    assert!(rest.is_empty(), "{read:?} is read short");
}

/// What the source makes of what a destination says.
fn asks(mut data: impl Read) {
    let kept = kept();
    let mut serving = Serving::new(kept.clone());
    while let Ok(ask) = Ask::read(&mut data, FRAMES) {
        again(&ask, |to| ask.write(to), |from| Ask::read(from, FRAMES));
        match ask {
            Ask::Missing(pages) => {
                let all = pages.is_in(&kept);
                assert_eq!(serving.misses(pages).is_ok(), all);
            }
            Ask::Want(page) => serving.wants(page),
            Ask::Word(_) => serving.loses(),
            // Some is sent meanwhile.
            Ask::Left(_) => drop(serving.sends()),
        }
    }
    let mut sent = Pages::none(FRAMES);
    while let Some((first, count)) = serving.sends() {
        assert!((1..=MOST).contains(&count));
        for page in first..first + count {
            assert!(kept.has(page) && !sent.has(page), "page {page}");
            sent.add(page);
        }
    }
    assert_eq!(serving.left(), 0);
}

/// What the destination makes of what a source says.
fn pieces(mut data: impl Read) {
    let kept = kept();
    let mut pulling = Pulling::new(kept.clone());
    let mut come = Pages::none(FRAMES);
    while let Ok(piece) = Piece::read(&mut data) {
        again(&piece, |to| piece.write(to), |from| Piece::read(from));
        let (first, count) = match piece {
            Piece::Zero { first, count } => (first, u64::from(count)),
            // As if these were theirs.
            Piece::Pages(packed) => (packed.len() as u64 * 7, packed.len() as u64 % 50),
            Piece::Word(_) => continue,
        };
        pulling.gives_up(first.wrapping_add(count / 2));
        assert!(pulling.needs(first) == Needed::Zero || kept.has(first));
        let Ok(wanted) = pulling.comes(first, count) else {
            continue;
        };
        assert_eq!(wanted.len() as u64, count);
        for page in first..first + count {
            assert!(kept.has(page) && !come.has(page), "page {page}");
            come.add(page);
        }
        pulling.placed(first, count);
    }
    assert_eq!(pulling.missing().count() + come.count(), kept.count());
}

/// What comes over lanes: the first byte says how many.
fn lanes(data: &[u8]) {
    let Some((count, data)) = data.split_first() else {
        return;
    };
    let count = usize::from(count % lanes::MOST) + 1;
    let each = data.len().div_ceil(count).max(1);
    let lanes = data.chunks(each).map(<[u8]>::to_vec).collect();
    let mut all = Vec::new();
    let read = Gathered::of_bytes(lanes)
        .expect("threads")
        .read_to_end(&mut all);
    // There is no end but a lost lane, and a segment has a length that is none of its bytes.
    assert!(read.is_err() && (all.is_empty() || all.len() + 4 <= data.len()));
}

/// All that is said over a link, but the VM itself.
///
/// # Panics
/// If something does not hold.
pub fn link(data: &[u8]) {
    let Some((how, mut data)) = data.split_first() else {
        return;
    };
    match how % 7 {
        0 => {
            if let Ok(hello) = Hello::read(&mut data) {
                again(&hello, |to| hello.write(to), |from| Hello::read(from));
            }
        }
        1 => {
            if let Ok(verdict) = Verdict::read(&mut data) {
                let (Verdict::Fits { whole: text } | Verdict::Unfit(text)) = &verdict;
                assert!(!text.contains(char::is_control));
            }
        }
        2 => {
            if let Ok(word) = Message::read(&mut data) {
                again(&word, |to| word.write(to), |from| Message::read(from));
            }
        }
        3 => drop(acknowledged(&mut data)),
        4 => asks(data),
        6 => lanes(data),
        _ => pieces(data),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::Purpose;

    fn ask() -> impl Strategy<Value = Ask> {
        let set = prop::collection::vec(0..FRAMES, 0..60).prop_map(|pages| {
            let mut set = Pages::none(FRAMES);
            pages.into_iter().for_each(|page| set.add(page));
            set
        });
        prop_oneof![
            set.prop_map(Ask::Missing),
            Just(Ask::Missing(kept())),
            (0..FRAMES).prop_map(Ask::Want),
            (0..=FRAMES).prop_map(Ask::Left),
            Just(Ask::Word(Message::Runs)),
        ]
    }

    fn piece() -> impl Strategy<Value = Piece> {
        prop_oneof![
            (0..FRAMES + 9, 1..=32u32).prop_map(|(first, count)| Piece::Zero { first, count }),
            (0..FRAMES, 1..3u32).prop_map(|(first, count)| Piece::Zero { first, count }),
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Piece::Pages),
            Just(Piece::Word(Message::Known)),
        ]
    }

    proptest! {
        #[test]
        fn any_bytes(data in prop::collection::vec(any::<u8>(), 0..200)) {
            link(&data);
        }

        #[test]
        fn any_asks(asks in prop::collection::vec(ask(), 0..20), tail in any::<[u8; 5]>()) {
            let mut data = vec![4];
            asks.iter().for_each(|ask| ask.write(&mut data).expect("memory"));
            data.extend(tail);
            link(&data);
        }

        #[test]
        fn any_pieces(pieces in prop::collection::vec(piece(), 0..40), tail in any::<[u8; 5]>()) {
            let mut data = vec![5];
            pieces.iter().for_each(|piece| piece.write(&mut data).expect("memory"));
            data.extend(tail);
            link(&data);
        }

        #[test]
        fn a_greeting(id in any::<[u8; 16]>(), secret in any::<[u8; 32]>(), at in 0usize..69, with in any::<u8>()) {
            let purpose = Purpose::Moves { lanes: with % 9 };
            let hello = Hello { id, secret, purpose };
            let mut data = vec![0];
            hello.write(&mut data).expect("memory");
            if let Some(byte) = data.get_mut(at) {
                *byte ^= with;
            }
            link(&data);
        }
    }
}
