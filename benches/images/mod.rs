//! What the benchmarks of images and disks share: a golden image of ten gigabytes, and how long an
//! operation takes beside its bar, which is what users of M2 waited for, divided.

use crate::figure::{Better, Figure};
use assay_imaging::store::{Content, StoreError};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Instant;

/// A sparse disk of ten gigabytes.
pub(crate) struct Sparse {
    /// Of them, what is no hole.
    pub(crate) data_bytes: u64,
}

impl Content for Sparse {
    fn virtual_bytes(&self) -> u64 {
        10 << 30
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        buffer.fill(u8::from(offset < self.data_bytes));
        Ok(())
    }

    fn identity(&self) -> Option<String> {
        None
    }
}

pub(crate) fn milliseconds(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64() * 1000.0
}

/// Milliseconds of making a hundred disks, sixteen at a time, as the API makes those of one call.
pub(crate) fn a_hundred(make: impl Fn() + Sync) -> f64 {
    let left = AtomicU32::new(100);
    milliseconds(|| {
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
                        make();
                    }
                });
            }
        });
    })
}

/// What so many of a hundred values are below; of all hundred, the largest.
pub(crate) fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

/// A figure beside what it must be below, both in milliseconds.
pub(crate) fn beside_bar(bench: &str, name: &str, ours: f64, bar: f64) {
    Figure { bench, name, unit: "ms", ours, against: "the bar", theirs: bar, better: Better::Lower }.report();
}
