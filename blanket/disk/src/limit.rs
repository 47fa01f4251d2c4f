//! A limit of what a disk does in a second.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// How much a disk may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes read and written in a second; none is no limit.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Requests in a second; none is no limit.
    pub operations_per_second: Option<NonZeroU64>,
    /// How long a disk that was idle may go at any speed: what a second gives, times this, comes
    /// at once.
    pub burst: Duration,
}

impl Default for Limits {
    /// No limits.
    fn default() -> Self {
        Self {
            bytes_per_second: None,
            operations_per_second: None,
            burst: Duration::from_secs(1),
        }
    }
}

/// Says when requests may start.
///
/// Two token buckets, each kept as the time at which it is full again. A request that is larger
/// than a bucket starts when the bucket is full, and those after it wait the longer, so the
/// limits hold in the long run for requests of any size.
#[derive(Clone, Debug)]
pub struct Limiter {
    limits: Limits,
    bytes: Bucket,
    operations: Bucket,
    begin: Instant,
}

/// Times are picoseconds since the limiter's begin: a byte costs less than a nanosecond.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    full: u128,
}

const PICOSECONDS: u128 = 1_000_000_000_000;

fn picoseconds(time: Duration) -> u128 {
    time.as_nanos() * 1000
}

impl Bucket {
    /// How long until something may start.
    fn wait(self, now: u128, burst: u128) -> u128 {
        self.full.saturating_sub(now + burst)
    }

    fn take(&mut self, now: u128, amount: u64, rate: Option<NonZeroU64>) {
        if let Some(rate) = rate {
            let cost = u128::from(amount) * PICOSECONDS / u128::from(rate.get());
            self.full = self.full.max(now) + cost;
        }
    }
}

impl Limiter {
    /// With full buckets.
    #[must_use]
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            bytes: Bucket::default(),
            operations: Bucket::default(),
            begin: now,
        }
    }

    /// What holds now.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// Sets other limits; what was taken beyond the old ones is forgotten.
    pub fn set(&mut self, limits: Limits, now: Instant) {
        *self = Self::new(limits, now);
    }

    /// Takes what a request of `bytes` costs (0 for a flush), if it may start now.
    ///
    /// # Errors
    /// Nothing was taken: ask again after this time.
    pub fn admit(&mut self, now: Instant, bytes: u64) -> Result<(), Duration> {
        let now = picoseconds(now.saturating_duration_since(self.begin));
        let burst = picoseconds(self.limits.burst);
        // A bucket without any burst would never let anything through twice at one time, and
        // that is right; but it must let the first through.
        let wait = self.bytes.wait(now, burst);
        let wait = wait.max(self.operations.wait(now, burst));
        if wait > 0 {
            let nanoseconds = wait.div_ceil(1000);
            return Err(Duration::from_nanos(
                u64::try_from(nanoseconds).unwrap_or(u64::MAX),
            ));
        }
        self.bytes.take(now, bytes, self.limits.bytes_per_second);
        self.operations
            .take(now, 1, self.limits.operations_per_second);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(bytes: u64, operations: u64, burst: Duration) -> Limits {
        Limits {
            bytes_per_second: NonZeroU64::new(bytes),
            operations_per_second: NonZeroU64::new(operations),
            burst,
        }
    }

    #[test]
    fn without_limits_all_starts_at_once() {
        let now = Instant::now();
        let mut limiter = Limiter::new(Limits::default(), now);
        for _ in 0..1000 {
            assert_eq!(limiter.admit(now, u64::MAX), Ok(()));
        }
    }

    #[test]
    fn a_burst_then_the_rate() {
        let begin = Instant::now();
        let mut limiter = Limiter::new(limits(0, 10, Duration::from_secs(1)), begin);
        // Ten are in the bucket, one more starts when it is just empty.
        let started = (0..100).take_while(|_| limiter.admit(begin, 0).is_ok());
        assert_eq!(started.count(), 11);
        assert_eq!(limiter.admit(begin, 0), Err(Duration::from_millis(100)));
        let later = begin + Duration::from_millis(100);
        assert_eq!(limiter.admit(later, 0), Ok(()));
        assert_eq!(limiter.admit(later, 0), Err(Duration::from_millis(100)));
    }

    #[test]
    fn a_large_request_starts_and_others_pay() {
        let begin = Instant::now();
        let mut limiter = Limiter::new(limits(1000, 0, Duration::from_secs(1)), begin);
        assert_eq!(limiter.admit(begin, 5000), Ok(()));
        assert_eq!(limiter.admit(begin, 512), Err(Duration::from_secs(4)));
        // Flushes cost no bytes, but they do not overtake.
        assert_eq!(limiter.admit(begin, 0), Err(Duration::from_secs(4)));
    }

    proptest! {
        /// Never more than the rate gives, plus the burst and one request; and who waits as
        /// long as told may start.
        #[test]
        fn holds_in_the_long_run(
            bytes in 1_000u64..10_000_000,
            operations in 1u64..10_000,
            burst in 0u64..2_000,
            requests in prop::collection::vec((0u64..1_000_000, 0u64..50), 1..200),
        ) {
            let burst = Duration::from_millis(burst);
            let begin = Instant::now();
            let mut now = begin;
            let mut limiter = Limiter::new(limits(bytes, operations, burst), begin);
            let (mut all, mut largest) = (0u64, 0u64);
            for (count, (length, pause)) in requests.iter().enumerate() {
                now += Duration::from_millis(*pause);
                if let Err(wait) = limiter.admit(now, *length) {
                    now += wait;
                    prop_assert_eq!(limiter.admit(now, *length), Ok(()));
                }
                all += length;
                largest = largest.max(*length);
                let time = (now.duration_since(begin) + burst).as_secs_f64();
                let rounding = 1.0 + count as f64;
                prop_assert!(all as f64 <= time * bytes as f64 + largest as f64 + rounding);
                prop_assert!(count as f64 <= time * operations as f64 + rounding.min(1.0) + 1e-3);
            }
        }
    }
}
