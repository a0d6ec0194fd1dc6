//! Isolation's boot records, followed by long poll. What netboot knows of nodes it knows from here; when isolation has
//! not been heard for a while it knows nothing, and nobody boots.

use crate::supervise::BoxedError;
use assay_service::client::ServiceClient;
use assay_service::error::chain;
use assay_wire::isolation::{BootRecord, BootRecords};
use assay_wire::net::MacAddr;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The records by MAC address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records(HashMap<MacAddr, BootRecord>);

impl Records {
    /// The record of the NIC `mac`.
    #[must_use]
    pub fn get(&self, mac: MacAddr) -> Option<&BootRecord> {
        self.0.get(&mac)
    }
}

impl FromIterator<BootRecord> for Records {
    fn from_iter<I: IntoIterator<Item = BootRecord>>(records: I) -> Self {
        Self(records.into_iter().map(|record| (record.mac, record)).collect())
    }
}

/// Keeps `records` current until `shutdown`.
pub async fn follow(isolation: ServiceClient, records: watch::Sender<Records>, shutdown: CancellationToken) {
    let mut follower = Follower { revision: None, heard: Instant::now(), failures: 0 };
    loop {
        let path = follower.path();
        let answer = tokio::select! {
            () = shutdown.cancelled() => return,
            answer = isolation.get::<BootRecords>(&path) => answer.map_err(BoxedError::from),
        };
        let pause = follower.take(Instant::now(), answer, &records);
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Decides what an answer changes, and how long to wait before the next question.
struct Follower {
    revision: Option<u64>,
    heard: Instant,
    failures: u32,
}

impl Follower {
    fn path(&self) -> String {
        match self.revision {
            Some(revision) => format!("/v1/boot-records?after={revision}"),
            None => "/v1/boot-records".to_owned(),
        }
    }

    fn take(
        &mut self,
        now: Instant,
        answer: Result<BootRecords, BoxedError>,
        records: &watch::Sender<Records>,
    ) -> Duration {
        match answer {
            Ok(answer) => {
                if self.failures > 0 {
                    tracing::info!(event = "records.heard_again", "isolation answers again");
                }
                let unchanged = self.revision == Some(answer.revision);
                *self = Self { revision: Some(answer.revision), heard: now, failures: 0 };
                records.send_if_modified(|known| {
                    let new = answer.records.into_iter().collect();
                    let changed = *known != new;
                    *known = new;
                    changed
                });
                // An answer without news that did not wait, from whatever is in between, must not make this loop spin.
                if unchanged { IDLE_PAUSE } else { Duration::ZERO }
            }
            Err(error) => {
                self.failures += 1;
                if self.failures == 1 {
                    tracing::warn!(
                        event = "records.unreachable",
                        error = chain(&*error),
                        "asking isolation for boot records"
                    );
                }
                if now.duration_since(self.heard) > MAX_AGE {
                    let dropped = records.send_if_modified(|known| {
                        let any = !known.0.is_empty();
                        *known = Records::default();
                        any
                    });
                    if dropped {
                        tracing::error!(
                            event = "records.too_old",
                            "isolation has not answered for a while: no node boots until it does"
                        );
                    }
                    // What was dropped must be asked for again in full.
                    self.revision = None;
                }
                FIRST_PAUSE.saturating_mul(1 << self.failures.min(5)).min(LONGEST_PAUSE)
            }
        }
    }
}

/// How old records may be before they count for nothing.
const MAX_AGE: Duration = Duration::from_secs(90);
const IDLE_PAUSE: Duration = Duration::from_millis(200);
const FIRST_PAUSE: Duration = Duration::from_millis(125);
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use super::*;
    use assay_wire::isolation::NodeState;

    fn answer(revision: u64) -> Result<BootRecords, BoxedError> {
        let mac = "52:54:00:00:00:01".parse().unwrap();
        let record = BootRecord { node: "n1".parse().unwrap(), mac, state: NodeState::Airlock, boot: None };
        Ok(BootRecords { revision, records: vec![record] })
    }

    fn failure() -> Result<BootRecords, BoxedError> {
        Err("unreachable".into())
    }

    #[test]
    fn records_that_are_too_old_are_dropped_and_asked_for_in_full() {
        let start = Instant::now();
        let (sender, receiver) = watch::channel(Records::default());
        let mut follower = Follower { revision: None, heard: start, failures: 0 };
        assert_eq!(follower.path(), "/v1/boot-records");
        assert_eq!(follower.take(start, answer(7), &sender), Duration::ZERO);
        assert_eq!(follower.path(), "/v1/boot-records?after=7");
        let mac = "52:54:00:00:00:01".parse().unwrap();
        assert!(receiver.borrow().get(mac).is_some());
        assert!(follower.take(start + Duration::from_secs(90), failure(), &sender) >= FIRST_PAUSE);
        assert!(receiver.borrow().get(mac).is_some());
        follower.take(start + Duration::from_secs(91), failure(), &sender);
        assert!(receiver.borrow().get(mac).is_none());
        assert_eq!(follower.path(), "/v1/boot-records");
        follower.take(start + Duration::from_secs(100), answer(7), &sender);
        assert!(receiver.borrow().get(mac).is_some());
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        let start = Instant::now();
        let (sender, _receiver) = watch::channel(Records::default());
        let mut follower = Follower { revision: None, heard: start, failures: 0 };
        let pauses: Vec<_> = (0..40).map(|_| follower.take(start, failure(), &sender)).collect();
        assert!(pauses.is_sorted());
        assert_eq!(pauses.last(), Some(&LONGEST_PAUSE));
    }
}
