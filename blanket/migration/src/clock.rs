//! How far the destination's clock is ahead of the source's, so that a guest's clock goes on as
//! if it had only stood still, whatever the clocks of its hosts say.
//!
//! As NTP does it (RFC 5905, section 8): the other side was asked and said its time between two
//! of ours. What the answer took both ways is all that may be wrong with it, by half; of several
//! answers the quickest counts.

/// What is known of the other side's clock. Times are nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// How long the quickest answer took, and how far it was ahead by that.
    best: Option<(u64, i64)>,
}

impl Ahead {
    /// The other side was `asked` and its answer `heard` by our clock; by its own clock it `said`
    /// it. What our clock was set in between is not counted.
    pub fn heard(&mut self, asked: u64, said: u64, heard: u64) {
        let Some(took) = heard.checked_sub(asked) else {
            return;
        };
        if self.best.is_some_and(|(quickest, _)| quickest <= took) {
            return;
        }
        let middle = i128::from(asked) + i128::from(took / 2);
        let ahead = i128::from(said) - middle;
        // Who says less or more than that has no clock.
        if let Ok(ahead) = i64::try_from(ahead) {
            self.best = Some((took, ahead));
        }
    }

    /// A time of ours, by the other side's clock; the same if nothing is known of that.
    #[must_use]
    pub fn there(&self, here: u64) -> u64 {
        let ahead = self.best.map_or(0, |(_, ahead)| ahead);
        here.saturating_add_signed(ahead)
    }

    /// How far it is ahead, and how wrong that may be: ns.
    #[must_use]
    pub fn known(&self) -> Option<(i64, u64)> {
        self.best.map(|(took, ahead)| (ahead, took.div_ceil(2)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_not_known_is_the_same() {
        let mut ahead = Ahead::default();
        assert_eq!(ahead.there(7), 7);
        // Our clock was set back.
        ahead.heard(10, 1000, 9);
        assert_eq!((ahead.there(7), ahead.known()), (7, None));
        // It has none.
        ahead.heard(0, u64::MAX, 2);
        assert_eq!((ahead.there(7), ahead.known()), (7, None));
        ahead.heard(1000, 0, 1000);
        assert_eq!((ahead.there(7), ahead.there(1007)), (0, 7));
    }

    proptest! {
        /// It is wrong by no more than it says, and by no more than half of the quickest answer.
        #[test]
        fn it_is_as_right_as_it_says(
            skew in -1_000_000_000_000i64..1_000_000_000_000,
            answers in prop::collection::vec((0u64..1_000_000_000, 0u64..1_000_000_000), 1..20),
        ) {
            let mut ahead = Ahead::default();
            let mut now = 1_700_000_000_000_000_000u64;
            for (to, back) in &answers {
                let said = (now + to).saturating_add_signed(skew);
                ahead.heard(now, said, now + to + back);
                now += to + back + 1;
            }
            let (found, wrong) = ahead.known().expect("heard");
            prop_assert!(found.abs_diff(skew) <= wrong, "{found} {skew} {wrong}");
            let quickest = answers.iter().map(|(to, back)| to + back).min();
            prop_assert_eq!(Some(wrong), quickest.map(|took| took.div_ceil(2)));
            prop_assert_eq!(ahead.there(now), now.saturating_add_signed(found));
        }

        /// Whatever is said.
        #[test]
        fn nothing_that_is_said_is_too_much(all: Vec<(u64, u64, u64)>, here: u64) {
            let mut ahead = Ahead::default();
            for (asked, said, heard) in all {
                ahead.heard(asked, said, heard);
                let _ = (ahead.there(here), ahead.known());
            }
        }
    }
}
