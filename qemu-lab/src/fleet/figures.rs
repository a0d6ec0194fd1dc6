//! What a fleet's run measured: latencies, errors, and what the processes used.

use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Latencies of one kind of call, in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Latency {
    /// How many there were.
    pub count: u64,
    /// Half of them took no longer.
    pub p50_ms: f64,
    /// 90 in 100 took no longer.
    pub p90_ms: f64,
    /// 99 in 100 took no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Latency {
    fn of(mut samples: Vec<u32>) -> Self {
        samples.sort_unstable();
        let Some(longest) = samples.last().copied() else { return Self::default() };
        let at = |percent: usize| {
            let index = (samples.len() * percent).div_ceil(100).saturating_sub(1);
            f64::from(samples.get(index).copied().unwrap_or(longest)) / 1000.0
        };
        Self {
            count: samples.len().try_into().unwrap_or(u64::MAX),
            p50_ms: at(50),
            p90_ms: at(90),
            p99_ms: at(99),
            max_ms: f64::from(longest) / 1000.0,
        }
    }
}

/// What nodes tell while they live.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    enrolments: Mutex<Vec<u32>>,
    pushes: Mutex<Vec<u32>>,
    errors: Mutex<BTreeMap<String, u64>>,
    /// Whether the time that counts has begun.
    pub(super) measuring: AtomicBool,
    pub(super) admitted: AtomicU64,
    pub(super) failed: AtomicU64,
    /// Calls that the verifier put off because it had too much to do.
    pub(super) put_off: AtomicU64,
    /// Pushes that a node could only send after the next was due.
    pub(super) late: AtomicU64,
}

impl Recorder {
    pub(super) fn enrolment(&self, took: Duration) {
        push(&self.enrolments, took);
    }

    pub(super) fn pushed(&self, took: Duration) {
        if self.measuring.load(Ordering::Relaxed) {
            push(&self.pushes, took);
        }
    }

    pub(super) fn error(&self, word: String) {
        *self.errors.lock().unwrap_or_else(PoisonError::into_inner).entry(word).or_default() += 1;
    }

    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn enrolments(&self) -> Latency {
        Latency::of(take(&self.enrolments))
    }

    pub(super) fn pushes(&self) -> Latency {
        Latency::of(take(&self.pushes))
    }

    pub(super) fn errors(&self) -> BTreeMap<String, u64> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn push(samples: &Mutex<Vec<u32>>, took: Duration) {
    let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
    samples.lock().unwrap_or_else(PoisonError::into_inner).push(micros);
}

fn take(samples: &Mutex<Vec<u32>>) -> Vec<u32> {
    std::mem::take(&mut samples.lock().unwrap_or_else(PoisonError::into_inner))
}

/// What a process has used so far, from `/proc`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    pub(super) cpu_seconds: f64,
    pub(super) rss_mib: f64,
    pub(super) peak_rss_mib: f64,
}

impl Usage {
    /// Of the process `pid`; nothing of one that is gone.
    pub(super) fn of(pid: u32) -> Self {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        // After the command's name, which may hold anything, `utime` and `stime` are the 12th and 13th fields.
        let stat = read("stat");
        let ticks: f64 = stat
            .rsplit_once(')')
            .map(|(_, rest)| {
                rest.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum()
            })
            .unwrap_or_default();
        let status = read("status");
        let mib = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            let kib = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next()?.parse::<f64>().ok());
            kib.unwrap_or_default() / 1024.0
        };
        Self { cpu_seconds: ticks / TICKS_PER_SECOND, rss_mib: mib("VmRSS"), peak_rss_mib: mib("VmHWM") }
    }
}

/// `USER_HZ`: 100 on every Linux that people run.
const TICKS_PER_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_samples() {
        let latency = Latency::of((1..=1000).rev().map(|ms| ms * 1000).collect());
        assert_eq!((latency.count, latency.max_ms), (1000, 1000.0));
        assert_eq!((latency.p50_ms, latency.p90_ms, latency.p99_ms), (500.0, 900.0, 990.0));
        assert_eq!(Latency::of(Vec::new()).count, 0);
    }

    #[test]
    fn this_process_uses_memory() {
        let usage = Usage::of(std::process::id());
        assert!(usage.rss_mib > 0.5 && usage.peak_rss_mib >= usage.rss_mib, "{usage:?}");
    }
}
