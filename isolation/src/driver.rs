//! The driver of one node: the single owner of its state. A loop of read the record, decide ([`crate::plan`]), do
//! ([`Hands`]); a command interrupts whatever is being done, because everything here can be done again.

use crate::admission::Admission;
use crate::commands::Command;
use crate::hands::{ClosedPort, Hands, HandsError};
use crate::node::Event;
use crate::plan::{Action, Periods, Progress, Trouble, select};
use crate::record::NodeRecord;
use crate::store::RecordError;
use crate::switch::LinkReading;
use assay_service::CancellationToken;
use assay_service::error::chain;
use assay_wire::isolation::PortIntent;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

/// After the database failed.
const RECORD_BACKOFF: Duration = Duration::from_secs(1);
/// The longest back-off for what closes ports and sees resets: how long it may go unnoticed that a switch or BMC is
/// back.
const WATCH_BACKOFF_MS: i64 = 5_000;
/// The longest back-off for power cycles: BMCs lock accounts, and wear out, when they are hammered.
const POWER_BACKOFF_MS: i64 = 30_000;

/// One node's driver, before it runs.
pub struct Driver {
    /// What it acts with.
    pub hands: Hands,
    /// How long, how often.
    pub periods: Periods,
    /// Told once the node's ports have been reconciled, or could not be.
    pub reconciled: Option<oneshot::Sender<()>>,
    /// Cancelled when the process ends.
    pub shutdown: CancellationToken,
}

impl Driver {
    /// Drives until the node is removed, its senders are gone, or the process ends.
    pub async fn run(mut self, inbox: &mut mpsc::Receiver<Command>) {
        let mut progress = Progress::default();
        loop {
            let record = match self.hands.store.node(&self.hands.name).await {
                Ok(Some(record)) => record,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(event = "node.unreadable", node = %self.hands.name, cause = chain(&error));
                    sleep(RECORD_BACKOFF).await;
                    continue;
                }
            };
            let now_ms = self.hands.clock.now_ms();
            let action = select(&record, &progress, &self.periods, now_ms);
            if !matches!(action, Action::Observe | Action::SetPort(_) | Action::EndAdmission(_)) {
                self.tell_reconciled();
            }
            let reason = record.reason.clone();
            let admission = record.admission.as_ref().map(|admission| admission.id);
            let standing = record.clone();
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                command = inbox.recv() => {
                    let Some(command) = command else { return };
                    self.hands.handle(command).await;
                    // What failed before may work now, and somebody is waiting.
                    progress.switch_retry.succeeded();
                    progress.bmc_retry.succeeded();
                }
                outcome = perform(&self.hands, record, action, now_ms) => {
                    let outcome = outcome.map(|link| {
                        if let Some(link) = link {
                            progress.link.saw(admission, link, self.hands.clock.now_ms());
                        }
                    });
                    self.settle(&mut progress, action, reason, outcome).await;
                }
                // A BMC or switch that takes its time does not make an admission last longer. The record is read again:
                // it may have been renewed.
                () = expiry(&standing, now_ms) => {}
            }
        }
    }

    async fn settle(
        &mut self,
        progress: &mut Progress,
        action: Action,
        reason: String,
        outcome: Result<(), HandsError>,
    ) {
        let now_ms = self.hands.clock.now_ms();
        match action {
            Action::Observe => progress.observed_ms = now_ms,
            Action::CheckReset => progress.reset_checked_ms = now_ms,
            Action::EndAdmission(_) | Action::SetPort(_) | Action::EnterAirlock => {}
            Action::TimeOut | Action::Clean | Action::WaitUntil(_) => {}
        }
        let (retry, longest_ms) = match action {
            Action::EndAdmission(_) | Action::SetPort(_) | Action::TimeOut | Action::Observe => {
                (&mut progress.switch_retry, WATCH_BACKOFF_MS)
            }
            Action::CheckReset => (&mut progress.bmc_retry, WATCH_BACKOFF_MS),
            Action::EnterAirlock | Action::Clean => (&mut progress.bmc_retry, POWER_BACKOFF_MS),
            Action::WaitUntil(_) => return,
        };
        let explained = match outcome {
            Ok(()) => {
                retry.succeeded();
                progress.ports_read |= action == Action::Observe;
                if action == Action::CheckReset {
                    progress.link.flap_was_looked_into();
                }
                self.recovered(progress).await
            }
            Err(error) => {
                retry.failed(now_ms, longest_ms);
                let explained = self.failed(progress, action, reason, &error).await;
                // Only now: who waits reads the record, which must say what is wrong.
                self.tell_reconciled();
                explained
            }
        };
        if let Err(error) = explained {
            tracing::error!(event = "node.unwritable", node = %self.hands.name, cause = chain(&error));
        }
    }

    async fn failed(
        &self,
        progress: &mut Progress,
        action: Action,
        reason: String,
        error: &HandsError,
    ) -> Result<(), RecordError> {
        let shown = chain(error);
        let node = &self.hands.name;
        tracing::warn!(event = "node.retry", %node, action = ?action, cause = shown, "failed, will be tried again");
        let hidden = match progress.trouble.take() {
            Some(trouble) if trouble.shown == reason => trouble.hidden,
            Some(_) | None => reason,
        };
        self.hands.store.explain(node, &shown, "retry").await?;
        progress.trouble = Some(Trouble { shown, hidden });
        Ok(())
    }

    /// Nothing fails any more: the node's reason is again what it was, unless something else was recorded since.
    async fn recovered(&self, progress: &mut Progress) -> Result<(), RecordError> {
        if !(progress.switch_retry.is_clear() && progress.bmc_retry.is_clear()) {
            return Ok(());
        }
        let Some(Trouble { shown, hidden }) = progress.trouble.take() else { return Ok(()) };
        self.hands.store.recovered(&self.hands.name, &shown, &hidden).await
    }

    fn tell_reconciled(&mut self) {
        if let Some(reconciled) = self.reconciled.take() {
            let _ = reconciled.send(());
        }
    }
}

/// Over when the admission that stands now expires; never if none does.
async fn expiry(record: &NodeRecord, now_ms: i64) {
    let Some(admitted) = Admission::standing(record, now_ms) else { return std::future::pending().await };
    let left_ms = admitted.record().expires_at_ms.saturating_sub(now_ms);
    sleep(Duration::from_millis(u64::try_from(left_ms).unwrap_or(0))).await;
}

/// Does it. Answers the boot NIC's link, if it was read.
async fn perform(
    hands: &Hands,
    record: NodeRecord,
    action: Action,
    now_ms: i64,
) -> Result<Option<LinkReading>, HandsError> {
    let close = async |record, event, reason| {
        hands.close(record, event, reason, Vec::new()).await.map(drop).map_err(|(_, error)| error)
    };
    let done = match action {
        Action::Observe => return hands.observe(&record).await,
        Action::EndAdmission(ending) => close(record, Event::AdmissionEnded, ending.reason()).await,
        Action::TimeOut => close(record, Event::AirlockTimeout, "it was not admitted in time").await,
        Action::SetPort(index) => set_port(hands, record, index, now_ms).await,
        Action::EnterAirlock => hands.enter_airlock(record).await,
        Action::Clean => hands.clean(record).await,
        Action::CheckReset => hands.check_reset(record).await,
        Action::WaitUntil(until_ms) => {
            sleep(Duration::from_millis(u64::try_from(until_ms.saturating_sub(now_ms)).unwrap_or(0))).await;
            Ok(())
        }
    };
    done.map(|()| None)
}

/// Sets a port to what the record desires. An open one only with the admission that stands, and only if the node was
/// not reset meanwhile: this may be the first thing that runs after hours of absence.
async fn set_port(hands: &Hands, record: NodeRecord, index: usize, now_ms: i64) -> Result<(), HandsError> {
    let Some(nic) = record.nics.get(index) else { return Ok(()) };
    match nic.desired {
        PortIntent::Quarantine => hands.set_closed(nic, ClosedPort::Quarantine).await,
        PortIntent::Airlock => hands.set_closed(nic, ClosedPort::Airlock).await,
        PortIntent::Access { vlan: _ } => {
            let reading = hands.read_bmc().await?;
            if crate::hands::reset_seen(&record, &reading).is_some() {
                return hands.check_reset(record).await;
            }
            match Admission::standing(&record, now_ms) {
                Some(admitted) => hands.move_to_tenant(&record, admitted).await,
                // The plan ends the admission next.
                None => Ok(()),
            }
        }
    }
}
