//! How much a device may do in a second.

use std::time::{Duration, Instant};

/// Limits of a device; what is `None` is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in a second.
    pub bytes: Option<u64>,
    /// Requests or packets in a second.
    pub operations: Option<u64>,
}

/// What is saved up at most, in time: so much may be done at once after a pause.
const BURST: Duration = Duration::from_millis(100);

const NANOS: u128 = 1_000_000_000;

/// Keeps a device within its [`Limits`]. Something large is let through as a whole, and
/// what follows waits for longer.
#[derive(Clone, Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// The time up to which what was allowed has used the rate up.
#[derive(Clone, Debug)]
struct Bucket {
    rate: u64,
    used_until: Option<Instant>,
}

impl Limiter {
    /// With nothing done yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let bucket = |rate: Option<u64>| {
            rate.map(|rate| Bucket {
                rate: rate.max(1),
                used_until: None,
            })
        };
        Self {
            bytes: bucket(limits.bytes),
            operations: bucket(limits.operations),
        }
    }

    /// Whether one operation with so many bytes may be done now; counts it then.
    ///
    /// # Errors
    /// After how long it may.
    pub fn take(&mut self, now: Instant, bytes: u64) -> Result<(), Duration> {
        let both = || [self.bytes.as_ref(), self.operations.as_ref()];
        let wait = both().into_iter().flatten().map(|b| b.wait(now)).max();
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            return Err(wait);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.use_up(now, bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.use_up(now, 1);
        }
        Ok(())
    }
}

impl Bucket {
    fn wait(&self, now: Instant) -> Duration {
        self.used_until
            .map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    fn use_up(&mut self, now: Instant, amount: u64) {
        let nanos = u128::from(amount) * NANOS / u128::from(self.rate);
        let time = u64::try_from(nanos).map_or(Duration::MAX, Duration::from_nanos);
        // What was not used is saved, but not without end.
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let from = self.used_until.unwrap_or(earliest).max(earliest);
        // A time that cannot be is the end of all times.
        self.used_until = from.checked_add(time).or(self.used_until);
    }
}

/// Keeps what a guest can bring about at any rate out of the log, but for one word in a
/// second.
#[derive(Clone, Debug)]
pub(crate) struct Seldom(Limiter);

impl Default for Seldom {
    fn default() -> Self {
        Self(Limiter::new(Limits {
            bytes: None,
            operations: Some(1),
        }))
    }
}

impl Seldom {
    /// Whether something may be said now.
    pub(crate) fn may_speak(&mut self, now: Instant) -> bool {
        self.0.take(now, 0).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Over any time, no more is let through than the rate allows, but for the burst
        /// and one request.
        #[test]
        fn the_rate_is_kept(
            rate in 1u64..1_000_000, steps in proptest::collection::vec((0u64..200, 0u64..5000), 1..300),
        ) {
            let mut limiter = Limiter::new(Limits { bytes: Some(rate), operations: None });
            let start = Instant::now();
            let mut now = start;
            let (mut done, mut largest) = (0u64, 0);
            for (millis, bytes) in steps {
                now += Duration::from_millis(millis);
                match limiter.take(now, bytes) {
                    Ok(()) => {
                        done += bytes;
                        largest = largest.max(bytes);
                    }
                    Err(wait) => prop_assert!(limiter.take(now + wait, 0).is_ok(), "it says when"),
                }
                let seconds = (now - start + BURST).as_secs_f64();
                let allowed = seconds * rate as f64 + largest as f64 + 1.0;
                prop_assert!(done as f64 <= allowed, "{done} of {allowed}");
            }
        }

        /// Who always waits as long as it is told gets the whole rate.
        #[test]
        fn the_rate_is_reached(rate in 10u64..100_000, size in 1u64..4096) {
            let mut limiter = Limiter::new(Limits { bytes: Some(rate), operations: None });
            let start = Instant::now();
            let (mut now, mut done) = (start, 0);
            for _ in 0..200 {
                match limiter.take(now, size) {
                    Ok(()) => done += size,
                    Err(wait) => now += wait,
                }
            }
            let seconds = (now - start).as_secs_f64();
            prop_assert!(done as f64 + size as f64 >= seconds * rate as f64 * 0.99);
        }
    }

    #[test]
    fn operations_are_counted_too() {
        let mut limiter = Limiter::new(Limits {
            bytes: None,
            operations: Some(10),
        });
        let now = Instant::now();
        assert_eq!(limiter.take(now, 1 << 40), Ok(()));
        assert_eq!(
            limiter.take(now, 0),
            Ok(()),
            "a burst of a tenth of a second and one"
        );
        assert!(limiter.take(now, 0).is_err());
        assert_eq!(limiter.take(now + Duration::from_millis(100), 0), Ok(()));
        let mut free = Limiter::new(Limits::default());
        assert!((0..1000).all(|_| free.take(now, u64::MAX).is_ok()));
    }

    #[test]
    fn a_guest_that_fails_all_the_time_is_spoken_of_seldom() {
        let mut seldom = Seldom::default();
        let begin = Instant::now();
        let words = (0..10_000)
            .filter(|ms| seldom.may_speak(begin + Duration::from_millis(*ms)))
            .count();
        assert!((10..=11).contains(&words), "{words} words in ten seconds");
    }
}
