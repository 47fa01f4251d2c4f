//! When memory has been sent often enough.
//!
//! Memory is sent in rounds: first all of it, then what was written meanwhile. After each
//! the question is how long the VM would have to stand still if the rest were sent now.

use std::time::Duration;

/// When the VM goes on at its destination before all of its memory is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PostCopy {
    /// Never.
    #[default]
    Never,
    /// When the guest writes so fast that it would have to be slowed down below
    /// [`AUTO_SHARE`], or rounds are used up.
    Auto,
    /// After the first round.
    Now,
}

/// What a guest has of its time, percent, below which it is not slowed down where the rest of its
/// memory may follow it.
pub const AUTO_SHARE: u32 = 25;

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// How long the VM may stand still.
    pub downtime: Duration,
    /// Rounds after which it is stopped in any case.
    pub rounds: u32,
    /// Whether a part of the memory may follow.
    pub post_copy: PostCopy,
}

impl Default for Wishes {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(300),
            rounds: 30,
            post_copy: PostCopy::Never,
        }
    }
}

/// A round that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Pages that it sent.
    pub sent: u64,
    /// How long it took.
    pub took: Duration,
    /// Pages that were written meanwhile: what the next one would send.
    pub dirty: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another round. The guest is to have this part of its time, in percent.
    Round {
        /// Percent.
        share: u32,
    },
    /// Stop the VM and send the rest.
    Stop,
    /// Stop the VM, hand it over, and send the rest afterwards.
    Switch,
}

/// What a guest has at least of its time, percent. Four vCPUs that do nothing but write need as
/// little on a link of 100 Mbit/s.
const LEAST_SHARE: u32 = 1;
/// A round must leave less than this part of the one before, percent, or the guest is
/// slowed down.
const PROGRESS: u64 = 75;

/// What is little beside the time that a VM may stand still, percent: it is not worth a round.
const LITTLE: u128 = 10;
/// While the rest is more than that, there is one more round as long as each leaves less than this
/// part of what it has sent, percent: it takes no longer than the VM may stand still.
const WORTH: u64 = 50;

/// Decides, round by round.
#[derive(Clone, Copy, Debug)]
pub struct Control {
    wishes: Wishes,
    rounds: u32,
    before: Option<u64>,
    share: u32,
}

impl Control {
    /// Before the first round.
    #[must_use]
    pub fn new(wishes: Wishes) -> Self {
        Self {
            wishes,
            rounds: 0,
            before: None,
            share: 100,
        }
    }

    /// How long it would take to send the rest now, by the pace of the round before.
    #[must_use]
    pub fn rest(round: &Round) -> Duration {
        let nanos = round
            .took
            .as_nanos()
            .saturating_mul(u128::from(round.dirty));
        let nanos = nanos / u128::from(round.sent.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Whether the VM, which may be stopped now, would stand still for much less after one more round.
    fn is_worth_one_more(&self, round: &Round) -> bool {
        let rest = Self::rest(round).as_nanos().saturating_mul(100);
        let much = rest > self.wishes.downtime.as_nanos().saturating_mul(LITTLE);
        let less = round.dirty.saturating_mul(100) < round.sent.saturating_mul(WORTH);
        much && less && self.rounds < self.wishes.rounds
    }

    /// After a round.
    #[must_use]
    pub fn after(&mut self, round: &Round) -> Next {
        self.rounds += 1;
        let short = Self::rest(round) <= self.wishes.downtime;
        let post_copy = self.wishes.post_copy;
        if post_copy == PostCopy::Now && round.dirty > 0 {
            return Next::Switch;
        }
        if short && !self.is_worth_one_more(round) {
            return Next::Stop;
        }
        if self.rounds >= self.wishes.rounds {
            return match post_copy {
                PostCopy::Never => Next::Stop,
                PostCopy::Auto | PostCopy::Now => Next::Switch,
            };
        }
        let slow = !short
            && self.before.is_some_and(|before| {
                round.dirty.saturating_mul(100) > before.saturating_mul(PROGRESS)
            });
        if slow && post_copy == PostCopy::Auto && self.share / 2 < AUTO_SHARE {
            return Next::Switch;
        }
        if slow {
            // Halved again and again, since guests that write without end need it.
            self.share = (self.share / 2).max(LEAST_SHARE);
        }
        self.before = Some(round.dirty);
        Next::Round { share: self.share }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round(sent: u64, millis: u64, dirty: u64) -> Round {
        Round {
            sent,
            took: Duration::from_millis(millis),
            dirty,
        }
    }

    #[test]
    fn a_quiet_guest_is_stopped_at_once() {
        let mut control = Control::new(Wishes::default());
        assert_eq!(control.after(&round(10_000, 1_000, 100)), Next::Stop);
    }

    #[test]
    fn rounds_that_are_worth_it_are_added() {
        let more = Next::Round { share: 100 };
        let mut control = Control::new(Wishes::default());
        // The rest would take 200, 80 and 35 ms; then no less.
        assert_eq!(control.after(&round(10_000, 1_000, 2_000)), more);
        assert_eq!(control.after(&round(2_000, 200, 800)), more);
        assert_eq!(control.after(&round(800, 80, 350)), more);
        assert_eq!(control.after(&round(350, 35, 340)), Next::Stop);
        // Of one that has to do with a single round, or whose first leaves as much again.
        let mut control = Control::new(Wishes {
            rounds: 1,
            ..Wishes::default()
        });
        assert_eq!(control.after(&round(10_000, 1_000, 2_000)), Next::Stop);
        let mut control = Control::new(Wishes::default());
        assert_eq!(control.after(&round(2_000, 200, 1_900)), Next::Stop);
    }

    #[test]
    fn a_busy_guest_is_slowed_down_and_stopped_in_the_end() {
        let mut control = Control::new(Wishes::default());
        let mut shares = Vec::new();
        for _ in 0..100 {
            match control.after(&round(10_000, 1_000, 9_000)) {
                Next::Round { share } => shares.push(share),
                Next::Stop | Next::Switch => break,
            }
        }
        assert_eq!(shares[..4], [100, 50, 25, 12]);
        assert_eq!(shares.len(), 29);
        assert!(shares.iter().all(|share| *share >= LEAST_SHARE));
    }

    fn wishing(post_copy: PostCopy) -> Control {
        Control::new(Wishes {
            post_copy,
            ..Wishes::default()
        })
    }

    #[test]
    fn the_rest_follows_where_it_may() {
        let quiet = round(10_000, 1_000, 100);
        assert_eq!(wishing(PostCopy::Now).after(&quiet), Next::Switch);
        let nothing = round(10_000, 1_000, 0);
        assert_eq!(wishing(PostCopy::Now).after(&nothing), Next::Stop);

        let mut auto = wishing(PostCopy::Auto);
        assert_eq!(auto.after(&quiet), Next::Stop, "it needs none");
        let mut auto = wishing(PostCopy::Auto);
        let busy = round(10_000, 1_000, 9_000);
        let wanted = [100, 50, 25].map(|share| Next::Round { share });
        assert_eq!([(); 3].map(|()| auto.after(&busy)), wanted);
        assert_eq!(auto.after(&busy), Next::Switch);

        let mut auto = wishing(PostCopy::Auto);
        auto.wishes.rounds = 1;
        assert_eq!(auto.after(&busy), Next::Switch, "no round is left");
    }

    proptest! {
        #[test]
        fn it_ends(rounds in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u64>()), 64)) {
            for post_copy in [PostCopy::Never, PostCopy::Auto, PostCopy::Now] {
                let mut control = wishing(post_copy);
                let stops = rounds.iter().any(|&(sent, millis, dirty)| {
                    let next = control.after(&round(sent, millis.into(), dirty));
                    assert!(post_copy != PostCopy::Never || next != Next::Switch);
                    !matches!(next, Next::Round { .. })
                });
                prop_assert!(stops);
            }
        }
    }
}
