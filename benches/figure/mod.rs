//! What every benchmark shares: two rates taken in turns, and the line that `scripts/bench.sh` reads.
//!
//! A number alone says more about the machine than about us, so a figure is always ours beside a peer's or a ceiling's
//! from the same run, and their ratio.

use std::time::{Duration, Instant};

/// How often each side is measured. The medians count.
pub(crate) const ROUNDS: usize = 7;

/// Which way is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    /// A rate.
    Higher,
    /// A cost.
    #[allow(dead_code, reason = "not every benchmark has costs")]
    Lower,
}

/// One line of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figure<'a> {
    /// The part measured.
    pub(crate) bench: &'a str,
    /// What was measured.
    pub(crate) name: &'a str,
    /// Of both values.
    pub(crate) unit: &'a str,
    /// Ours.
    pub(crate) ours: f64,
    /// Who the other value is of: a peer or a ceiling.
    pub(crate) against: &'a str,
    /// Its value.
    pub(crate) theirs: f64,
    /// Which way is good.
    pub(crate) better: Better,
}

impl Figure<'_> {
    /// Says it, as one line of JSON.
    #[expect(clippy::print_stdout, reason = "what a benchmark is for")]
    pub(crate) fn report(&self) {
        let Self { bench, name, unit, ours, against, theirs, better } = *self;
        let ratio = ours / theirs;
        let better = match better {
            Better::Higher => "higher",
            Better::Lower => "lower",
        };
        println!(
            r#"{{"bench":"{bench}","figure":"{name}","unit":"{unit}","ours":{ours:.3},"against":"{against}","theirs":{theirs:.3},"ratio":{ratio:.4},"better":"{better}"}}"#
        );
    }
}

/// Whether the benchmark `name` is asked for: by no filter at all, or by one that it contains.
pub(crate) fn wanted(name: &str) -> bool {
    let mut filters = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).peekable();
    filters.peek().is_none() || filters.any(|filter| name.contains(&filter))
}

/// Measures both in turns, so that whatever else the machine does meets both alike; gives the medians.
pub(crate) fn in_turns(ours: impl FnMut() -> f64, theirs: impl FnMut() -> f64) -> (f64, f64) {
    let (our_values, their_values) = in_turns_of(ROUNDS, ours, theirs);
    (median(our_values), median(their_values))
}

/// The same, so often, with whatever was measured.
pub(crate) fn in_turns_of<T>(
    rounds: usize,
    mut ours: impl FnMut() -> T,
    mut theirs: impl FnMut() -> T,
) -> (Vec<T>, Vec<T>) {
    (0..rounds).map(|_| (ours(), theirs())).unzip()
}

/// How often a second `work` is done, over about a quarter of a second; `work` says how much one call was.
#[allow(dead_code, reason = "programs measure themselves")]
pub(crate) fn rate(mut work: impl FnMut() -> u64) -> f64 {
    let (started, mut done) = (Instant::now(), 0);
    loop {
        done += work();
        let elapsed = started.elapsed();
        if elapsed >= ONE_MEASUREMENT {
            #[expect(clippy::cast_precision_loss, reason = "a figure has three digits that count")]
            return done as f64 / elapsed.as_secs_f64();
        }
    }
}

/// The one in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

const ONE_MEASUREMENT: Duration = Duration::from_millis(250);
