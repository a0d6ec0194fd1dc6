//! How a thread that waits for its initiator does so: while requests come in quick succession it looks again for a
//! moment before it sleeps, since to fall asleep and to be woken costs more than to answer a small read.
//!
//! Looking is bounded ([`PATIENCE`] for each pause, and only if the one before was shorter), so a connection without
//! traffic costs nothing. It yields the processor between two looks; if anybody took it, processors are scarce, and the
//! thread sleeps at once for the next thousand times, for twice as many if that goes on, and so on.

use nix::libc::c_long;
use nix::sys::resource::{UsageWho, getrusage};
use rustix::thread::sched_yield;
use std::time::{Duration, Instant};

/// How long a pause between two requests may be, to be looked through.
const PATIENCE: Duration = Duration::from_micros(50);
/// Between two looks nobody else has run if they are not farther apart. If they are, the kernel is asked: an interrupt takes
/// as long.
const UNDISTURBED: Duration = Duration::from_micros(8);
/// How often at least and at most the thread sleeps at once after somebody else wanted the processor.
const LEAST_CROWDED: u32 = 1000;
const MOST_CROWDED: u32 = 64_000;

/// One connection's pace.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// The last pause was short.
    brisk: bool,
    /// There was none the last time.
    flowing: bool,
    /// How often it still sleeps at once.
    crowded: u32,
    /// How often it had to the last time, less what was found by looking since.
    penalty: u32,
    /// How often the thread had lost its processor when that was last asked.
    lost: c_long,
}

impl Pace {
    /// Calls `look` until it finds something; gives up after a moment, at once if a look is likely to be in vain.
    pub(super) fn look<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if !self.brisk || self.crowded > 0 {
            // A look in vain is a system call in vain, before each sleep.
            let found = if self.flowing { look() } else { None };
            self.flowing = found.is_some();
            return found;
        }
        let begun = Instant::now();
        let mut last = begun;
        loop {
            if let Some(found) = look() {
                self.penalty = self.penalty.saturating_sub(1);
                return Some(found);
            }
            sched_yield();
            let now = Instant::now();
            if now.duration_since(last) > UNDISTURBED && self.was_disturbed() {
                self.crowded();
                return None;
            }
            if now.duration_since(begun) > PATIENCE {
                self.brisk = false;
                return None;
            }
            last = now;
        }
    }

    /// Whether somebody else had the processor since this was last asked.
    fn was_disturbed(&mut self) -> bool {
        // It cannot fail for one's own thread.
        let lost = getrusage(UsageWho::RUSAGE_THREAD).map_or(c_long::MAX, |usage| usage.involuntary_context_switches());
        lost != std::mem::replace(&mut self.lost, lost)
    }

    /// Somebody else wanted the processor.
    fn crowded(&mut self) {
        self.penalty = (self.penalty * 2).clamp(LEAST_CROWDED, MOST_CROWDED);
        self.crowded = self.penalty;
    }

    /// The thread has slept so long for want of a request.
    pub(super) fn slept(&mut self, long: Duration) {
        self.brisk = long < PATIENCE;
        self.flowing = long < UNDISTURBED;
        self.crowded = self.crowded.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often it looked in vain.
    fn looks(pace: &mut Pace) -> u32 {
        let mut looks = 0;
        assert_eq!(
            pace.look(|| -> Option<()> {
                looks += 1;
                None
            }),
            None
        );
        looks
    }

    #[test]
    fn after_a_long_pause_there_is_no_look() {
        let mut pace = Pace::default();
        assert_eq!(looks(&mut pace), 0);
        pace.slept(PATIENCE);
        assert_eq!(looks(&mut pace), 0);
    }

    #[test]
    fn a_look_is_given_up_and_not_taken_up_before_a_short_pause() {
        let mut pace = Pace::default();
        pace.slept(Duration::ZERO);
        let begun = Instant::now();
        looks(&mut pace);
        assert!(begun.elapsed() < Duration::from_secs(1));
        assert!(looks(&mut pace) <= 1, "neither in vain twice, nor where others want the processor");
        assert_eq!(looks(&mut pace), 0);
    }

    #[test]
    fn where_processors_are_scarce_there_is_one_look_and_only_while_requests_flow() {
        let mut pace = Pace { brisk: true, crowded: 3, ..Pace::default() };
        assert_eq!(looks(&mut pace), 0);
        pace.slept(Duration::ZERO);
        assert_eq!(pace.look(|| Some(7)), Some(7));
        assert_eq!((looks(&mut pace), looks(&mut pace)), (1, 0));
        for _ in 0..2 {
            pace.slept(UNDISTURBED);
        }
        assert_eq!(pace.look(|| Some(7)), Some(7), "{pace:?}");
        assert!(pace.brisk && pace.crowded == 0, "{pace:?}");
    }

    #[test]
    fn the_longer_processors_are_scarce_the_seldomer_it_looks() {
        let mut pace = Pace::default();
        let mut waits = Vec::new();
        for _ in 0..8 {
            pace.crowded();
            waits.push(pace.crowded);
        }
        assert_eq!(waits, [1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 64_000]);
        (pace.crowded, pace.brisk) = (0, true);
        for _ in 0..MOST_CROWDED {
            assert_eq!(pace.look(|| Some(7)), Some(7));
        }
        pace.crowded();
        assert_eq!(pace.crowded, LEAST_CROWDED);
    }
}
