//! How long operations take: a histogram of fixed size, four buckets to each doubling.

use assay_wire::imaging::Latency;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets for 1 µs to a minute and more.
const BUCKETS: usize = 4 * 27;

/// Counts of operations by how long they took.
#[derive(Debug)]
pub(super) struct Histogram([AtomicU64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Histogram {
    pub(super) fn record(&self, took: Duration) {
        self.0[bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn latency(&self) -> Latency {
        let counts: [u64; BUCKETS] = std::array::from_fn(|index| self.0[index].load(Ordering::Relaxed));
        let count: u64 = counts.iter().sum();
        let percentile = |percent: u64| {
            let rank = (count * percent).div_ceil(100);
            let mut seen = 0;
            let at = counts.iter().position(|counted| {
                seen += counted;
                seen >= rank
            });
            if count == 0 { 0 } else { at.map_or(0, upper_us) }
        };
        Latency { count, p50_us: percentile(50), p99_us: percentile(99) }
    }
}

/// The first four are 0 to 3 µs; then four to each power of two, and everything beyond in the last.
fn bucket(took: Duration) -> usize {
    let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    if us < 4 {
        return usize::try_from(us).unwrap_or(0);
    }
    let power = us.ilog2();
    let quarter = usize::try_from((us >> (power - 2)) & 3).unwrap_or(0);
    (4 * (power as usize - 1) + quarter).min(BUCKETS - 1)
}

/// No operation in this bucket took longer, apart from the last bucket.
fn upper_us(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64;
    }
    let (power, quarter) = (bucket / 4 + 1, bucket % 4);
    ((5 + quarter as u64) << (power - 2)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_says_at_most_a_quarter_too_much(us in 0..60_000_000_u64) {
            let upper = upper_us(bucket(Duration::from_micros(us)));
            prop_assert!(upper >= us && upper * 4 <= us * 5 + 4, "{us} counts as {upper}");
        }
    }

    #[test]
    fn percentiles_are_of_what_was_recorded() {
        let histogram = Histogram::default();
        assert_eq!(histogram.latency(), Latency::default());
        for _ in 0..98 {
            histogram.record(Duration::from_micros(3));
        }
        for _ in 0..2 {
            histogram.record(Duration::from_millis(10));
        }
        let latency = histogram.latency();
        assert_eq!((latency.count, latency.p50_us), (100, 3));
        assert!((10_000..=12_500).contains(&latency.p99_us), "{latency:?}");
        histogram.record(Duration::MAX);
    }
}
