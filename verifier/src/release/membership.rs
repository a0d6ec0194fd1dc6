//! The verifiers of one database: this one says that it lives, and takes over what dead ones drove.
//!
//! Clocks are not compared. A verifier is dead when its counter has stood still for [`PATIENCE`] looks in a row of one
//! who was awake for all of them; to remove it is a compare-and-set on that counter. One that was removed although it
//! lives (it was stopped for a while, say) can write no journal any more, learns of it at its next heartbeat, and ends,
//! so that its supervisor starts it anew.

use super::{Releases, chain};
use crate::store::DbError;
use crate::store::verifiers::{Beat, RunId};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Until shutdown, or until this process finds itself replaced; then everything is shut down.
pub(super) async fn run(releases: Releases) {
    let shutdown = releases.shared.shutdown.clone();
    let mut watched = Watched::default();
    loop {
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
        match round(&releases, &mut watched).await {
            Ok(true) => {}
            Ok(false) => {
                tracing::error!(
                    event = "verifier.replaced",
                    "another verifier has this one's name, or the others took it for dead: it stops"
                );
                releases.shared.replaced.store(true, Ordering::SeqCst);
                shutdown.cancel();
                return;
            }
            Err(error) => {
                tracing::warn!(event = "verifier.heartbeat_failed", cause = chain(&error), "will try again");
            }
        }
    }
}

/// Answers whether this process is still counted on.
async fn round(releases: &Releases, watched: &mut Watched) -> Result<bool, DbError> {
    let store = &releases.shared.store;
    if !store.beat().await? {
        return Ok(false);
    }
    for dead in watched.look(&store.other_beats().await?) {
        if store.bury(dead).await? {
            tracing::warn!(event = "verifier.buried", run = %dead.run, "a verifier has died: its releases are taken over");
        }
    }
    store.adopt_orphans().await?;
    // Also what is this process's and not under way: its driver has panicked.
    releases.take_up_owned().await?;
    Ok(true)
}

/// How often each of the others was seen without having moved.
#[derive(Debug, Default)]
struct Watched(HashMap<RunId, (i64, u32)>);

impl Watched {
    /// Takes one look. Answers those that have stood still for too long.
    fn look(&mut self, beats: &[Beat]) -> Vec<Beat> {
        let before = std::mem::take(&mut self.0);
        let mut dead = Vec::new();
        for beat in beats {
            let still = match before.get(&beat.run) {
                Some((seen, still)) if *seen == beat.beat => still + 1,
                Some(_) | None => 0,
            };
            if still >= PATIENCE {
                dead.push(*beat);
            }
            self.0.insert(beat.run, (beat.beat, still));
        }
        dead
    }
}

/// Between two heartbeats, and between two looks at the others'.
const INTERVAL: Duration = Duration::from_secs(1);
/// Looks at a counter that does not move before its verifier is dead: ten seconds, if this one is awake.
const PATIENCE: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn run_of(digit: char) -> RunId {
        format!("00000000-0000-4000-8000-00000000000{digit}").parse().unwrap()
    }

    #[test]
    fn only_a_counter_that_stands_still_long_enough_is_dead() {
        let mut watched = Watched::default();
        let (quick, slow) = (run_of('1'), run_of('2'));
        for look in 0..i64::from(PATIENCE) {
            let beats = [Beat { run: quick, beat: look }, Beat { run: slow, beat: 7 }];
            assert_eq!(watched.look(&beats), [], "look {look}");
        }
        assert_eq!(watched.look(&[Beat { run: slow, beat: 7 }]), [Beat { run: slow, beat: 7 }]);
        // It moves again before it was buried: the count begins anew.
        assert_eq!(watched.look(&[Beat { run: slow, beat: 8 }]), []);
        assert_eq!(watched.look(&[Beat { run: slow, beat: 8 }]), []);
    }
}
