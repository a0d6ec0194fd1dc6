//! Octets cut at every place and with every bit flipped, one at a time: all of it with `ASSAY_EXHAUSTIVE` set, and else a
//! sample that is the same in every run. On all processors.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

/// What is changed, with its name.
pub(crate) type Input = (String, Vec<u8>);

/// The corpus, if it is there: `ASSAY_CORPUS`, or a folder beside the repository.
pub(crate) fn corpus(folder: &str) -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let folder = std::env::var_os("ASSAY_CORPUS").map_or(default, PathBuf::from).join(folder);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("skipped: no corpus at {} (set ASSAY_CORPUS)", folder.display());
    None
}

/// The project's own: the seeds of the fuzz target.
pub(crate) fn seeds(target: &str) -> Vec<Input> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let files = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path());
    let inputs: Vec<Input> = files.map(|file| (file.display().to_string(), std::fs::read(&file).unwrap())).collect();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    inputs
}

/// Hands every change of every input to what `examiner` makes of that input as it was, itself among them: the "cut" at
/// its end. Says how many there were and how long they took.
///
/// # Panics
/// An examiner does; the change is named.
pub(crate) fn each_change<'a, F>(mut inputs: Vec<&'a Input>, examiner: impl Fn(&'a Input) -> F + Sync)
where
    F: FnMut(&[u8]),
{
    let exhaustive = std::env::var_os("ASSAY_EXHAUSTIVE").is_some();
    // The same octets under two names are changed once, and in the same order whatever the file system's.
    inputs.sort_by(|one, other| one.1.cmp(&other.1));
    inputs.dedup_by(|one, other| one.1 == other.1);
    let mut stretches = inputs.iter().copied().flat_map(stretches).collect::<Vec<_>>();
    stretches.reverse();
    let (waiting, cases, begun) = (Mutex::new(stretches), AtomicU64::new(0), Instant::now());
    let work = || {
        while let Some((input, places)) = { waiting.lock().unwrap().pop() } {
            let done = change(input, places, exhaustive, &mut examiner(input));
            cases.fetch_add(done, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let (cases, octets) = (cases.into_inner(), inputs.iter().map(|(_, bytes)| bytes.len()).sum::<usize>());
    let how = if exhaustive { "every" } else { "some" };
    let (inputs, took) = (inputs.len(), begun.elapsed());
    eprintln!("{how} cut and flipped bit of {inputs} inputs, {octets} octets: {cases} cases in {took:.1?}");
    assert!(!exhaustive || cases == (octets * 9 + inputs) as u64, "not every case: {cases}");
}

/// Pieces of work of a size that keeps all processors busy to the end.
fn stretches(input: &Input) -> impl Iterator<Item = (&Input, Range<usize>)> {
    let end = input.1.len() + 1;
    (0..end).step_by(STRETCH).map(move |from| (input, from..(from + STRETCH).min(end)))
}

/// Answers how many changes it made.
fn change(input: &Input, places: Range<usize>, exhaustive: bool, examine: &mut impl FnMut(&[u8])) -> u64 {
    let (name, bytes) = input;
    // About 200 places of each input.
    let step = if exhaustive { 1 } else { bytes.len() / 200 + 1 };
    let mut changed = bytes.clone();
    let mut cases = 0;
    for at in places.filter(|at| at % step == 0 || *at == bytes.len()) {
        let mut examined = |case: Case<'_>, bytes: &[u8]| {
            examine(bytes);
            drop(case);
            cases += 1;
        };
        examined(Case { name, at, bit: None }, &bytes[..at]);
        let bits = if exhaustive { 0..8 } else { at % 8..at % 8 + 1 };
        for bit in bits.filter(|_| at < bytes.len()) {
            changed[at] ^= 1 << bit;
            examined(Case { name, at, bit: Some(bit) }, &changed);
            changed[at] ^= 1 << bit;
        }
    }
    cases
}

/// Says which change it was, if the examiner panics.
struct Case<'a> {
    name: &'a str,
    at: usize,
    bit: Option<usize>,
}

impl fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bit {
            None => write!(f, "{} cut at octet {}", self.name, self.at),
            Some(bit) => write!(f, "{} with bit {bit} of octet {} flipped", self.name, self.at),
        }
    }
}

impl Drop for Case<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the panic is of {self}");
        }
    }
}

const STRETCH: usize = 1024;
