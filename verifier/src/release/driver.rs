//! The driver: one task that owns one journal entry. It asks [`journal::decide`] what to do, does it, and writes the
//! step; agents' calls reach it through a mailbox, so nothing else ever changes the entry.
//!
//! **The answer to `ready` must reach the agent before its port leaves the airlock.** The step is written first, so an
//! agent that loses the answer can ask again. Then the answer goes out with an [`AnswerLeaving`] inside its body:
//! hyper drops the body when the last of it is in the connection's buffer and flushes in the same turn, so the token's
//! end says "handed to the kernel" (or "the connection is gone"). The move begins [`ReleaseTimeouts::settle_ms`] later,
//! which covers the one-way trip and the acknowledgement on a local network. An answer that is lost all the same costs a
//! boot, not safety: the agent never fetches its grant and the release is undone.

use super::journal::{Action, Presence, ReadyAnswer, ReleaseEvent, ReleaseStep, decide};
use super::peers::EffectError;
use super::{AgentCall, CallError, Progress, Shared, Status, crash_point};
use crate::store::releases::Release;
use crate::store::verifiers::Owner;
use assay_service::error::chain;
use assay_service::telemetry::boot_step;
use assay_wire::agent::SealedGrant;
use assay_wire::imaging::ExportAnswer;
use assay_wire::step::Step;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Lives as long as the answer to `ready` is on its way out. Put it into the response's body.
#[derive(Debug)]
pub struct AnswerLeaving(#[expect(dead_code, reason = "its drop is the message")] oneshot::Sender<()>);

impl AnswerLeaving {
    /// For an answer that holds nothing back: `ready` is in the journal, and another process moves the port.
    pub(super) fn repeated() -> Self {
        Self(oneshot::channel().0)
    }
}

/// Drives one release to its end.
pub(crate) struct Driver {
    shared: Arc<Shared>,
    release: Release,
    mailbox: mpsc::Receiver<AgentCall>,
    publish: watch::Sender<Progress>,
    predecessors: Vec<watch::Receiver<Progress>>,
    presence: Presence,
    answer_leaving: Option<oneshot::Receiver<()>>,
    /// Agents that asked for the grant while the port was being moved.
    held: Vec<oneshot::Sender<Result<SealedGrant, CallError>>>,
    retry: Retry,
}

/// The driver cannot go on: another one has the entry, or the process ends.
struct Stopped;

impl Driver {
    pub(crate) fn new(
        shared: Arc<Shared>,
        release: Release,
        mailbox: mpsc::Receiver<AgentCall>,
        publish: watch::Sender<Progress>,
        predecessors: Vec<watch::Receiver<Progress>>,
    ) -> Self {
        let presence = Presence {
            resumed_at_ms: shared.clock.now_ms(),
            ready_answer: ReadyAnswer::NotAsked,
            predecessor_open: !predecessors.is_empty(),
            given_up: None,
        };
        let (answer_leaving, held, retry) = (None, Vec::new(), Retry::default());
        Self { shared, release, mailbox, publish, predecessors, presence, answer_leaving, held, retry }
    }

    /// Runs until the release is finished, the process ends, or another driver has it.
    pub(crate) async fn run(mut self) {
        let shutdown = self.shared.shutdown.clone();
        let end = tokio::select! {
            end = self.drive() => end,
            () = shutdown.cancelled() => Err(Stopped),
        };
        if end.is_err() {
            tracing::info!(
                event = "release.left",
                node = %self.release.node,
                admission = %self.release.admission,
                release_step = %self.release.step,
                "this process no longer drives the release"
            );
        }
    }

    async fn drive(&mut self) -> Result<(), Stopped> {
        loop {
            self.answer_held().await?;
            self.presence.predecessor_open = self.predecessors.iter().any(|p| !p.borrow().step.is_finished());
            let now_ms = self.shared.clock.now_ms();
            let action = decide(&self.release.position(), &self.presence, &self.shared.timeouts, now_ms);
            let done = match (action, self.retry.at_ms) {
                (Action::Finish, _) => return Ok(()),
                (Action::Wait { until_ms }, _) => self.wait(until_ms).await,
                (Action::Export | Action::Move | Action::Unwind, Some(at_ms)) if now_ms < at_ms => {
                    self.wait(at_ms).await
                }
                (Action::GiveUp(reason), _) => self.fail(reason.to_string()).await,
                (Action::Export, _) => self.export().await,
                (Action::Move, _) => self.move_port().await,
                (Action::Unwind, _) => self.unwind().await,
            };
            match done {
                Ok(()) => {}
                Err(Trouble::Stopped(stopped)) => return Err(stopped),
                Err(Trouble::Journal) => self.retry.later(self.shared.clock.now_ms()),
            }
            if self.retry.journal_failed {
                self.retry.journal_failed = false;
                // Nothing may be decided on a step that is not written; the only thing to do is to wait.
                tokio::time::sleep(JOURNAL_BACKOFF).await;
            }
        }
    }

    async fn export(&mut self) -> Result<(), Trouble> {
        crash_point("release::before-export");
        let (shared, release) = (Arc::clone(&self.shared), self.release.clone());
        let outcome = self.while_answering(async move { shared.peers.export(&release).await }).await?;
        match outcome {
            Ok(ExportAnswer { address, grant, .. }) => {
                crash_point("release::after-export");
                let mut next = self.release.clone();
                next.address = Some(address);
                next.grant = Some(grant);
                self.write(ReleaseEvent::ExportMade, next).await
            }
            Err(error) => self.effect_failed("making the export", &error).await,
        }
    }

    async fn move_port(&mut self) -> Result<(), Trouble> {
        crash_point("release::before-move");
        let (shared, release) = (Arc::clone(&self.shared), self.release.clone());
        let outcome = self.while_answering(async move { shared.peers.admit(&release).await }).await?;
        match outcome {
            Ok(()) => {
                crash_point("release::after-move");
                self.write(ReleaseEvent::PortMoved, self.release.clone()).await
            }
            Err(error) => self.effect_failed("moving the port", &error).await,
        }
    }

    /// Fences first: the admission, and with it the port, then the export. Never given up.
    async fn unwind(&mut self) -> Result<(), Trouble> {
        crash_point("release::before-unwind");
        let (shared, admission) = (Arc::clone(&self.shared), self.release.admission);
        let reason = self.release.failure.clone().unwrap_or_default();
        let outcome = self
            .while_answering(async move {
                shared.peers.revoke(admission, &reason).await?;
                crash_point("release::between-unwinds");
                shared.peers.unexport(admission).await
            })
            .await?;
        match outcome {
            Ok(()) => self.write(ReleaseEvent::Undone, self.release.clone()).await,
            Err(error) => {
                self.log_retry("undoing the release", &error);
                self.retry.later(self.shared.clock.now_ms());
                Ok(())
            }
        }
    }

    /// A refusal ends the release; anything else is tried again until the step's deadline.
    async fn effect_failed(&mut self, doing: &'static str, error: &EffectError) -> Result<(), Trouble> {
        if error.is_final() {
            self.fail(format!("{doing}: {}", chain(error))).await
        } else {
            self.log_retry(doing, error);
            self.retry.last_error = Some(format!("{doing}: {}", chain(error)));
            self.retry.later(self.shared.clock.now_ms());
            Ok(())
        }
    }

    async fn fail(&mut self, mut reason: String) -> Result<(), Trouble> {
        // What was tried before says more than the deadline, or than a peer that has closed up since.
        if let Some(before) = &self.retry.last_error {
            reason = format!("{reason}; before that, {before}");
        }
        tracing::warn!(
            event = "release.failed",
            node = %self.release.node,
            admission = %self.release.admission,
            release_step = %self.release.step,
            reason,
            "undoing a release"
        );
        let mut next = self.release.clone();
        next.failure = Some(reason);
        self.write(ReleaseEvent::Failed, next).await
    }

    /// Writes the step that follows `event`, with what `next` has learnt. Only then is it so.
    async fn write(&mut self, event: ReleaseEvent, mut next: Release) -> Result<(), Trouble> {
        let from = self.release.step;
        let Ok(step) = from.next(event) else {
            // decide() and take() offer only events that the step allows; the property test holds them to it.
            tracing::error!(event = "release.out_of_order", step = %from, ?event, "journal entry left as it is");
            return Err(Trouble::Journal);
        };
        let now_ms = self.shared.clock.now_ms();
        (next.step, next.step_at_ms) = (step, now_ms);
        let written = self.shared.store.write_step(&next, from).await.map_err(|error| {
            tracing::error!(
                event = "release.journal_failed",
                cause = chain(&error),
                "cannot write the release journal"
            );
            self.retry.journal_failed = true;
            Trouble::Journal
        })?;
        if !written {
            return Err(Trouble::Stopped(Stopped));
        }
        let since_ms = self.release.step_at_ms;
        self.release = next;
        self.retry = Retry::default();
        crash_point(written_point(step));
        tracing::info!(
            event = "release.step",
            node = %self.release.node,
            admission = %self.release.admission,
            release_step = %step,
            elapsed_ms = now_ms - since_ms,
            since_verdict_ms = now_ms - self.release.created_at_ms,
            "release is {step}"
        );
        if step == ReleaseStep::HandedOver {
            boot_step(Step::TenantBooted, &self.release.node, elapsed(since_ms, now_ms));
        }
        self.publish.send_replace(progress(&self.release));
        Ok(())
    }

    /// Serves the mailbox until `until_ms`, or until something happened that may change the decision.
    async fn wait(&mut self, until_ms: i64) -> Result<(), Trouble> {
        // Short naps, so that a clock that jumps is noticed.
        let nap = elapsed(self.shared.clock.now_ms(), until_ms).clamp(Duration::from_millis(1), LONGEST_NAP);
        let predecessor_moves = async {
            match self.predecessors.iter_mut().find(|p| !p.borrow().step.is_finished()) {
                // A driver that has stopped without finishing leaves its release open: then the deadline decides.
                Some(predecessor) => {
                    if predecessor.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        let answer_leaves = async {
            match self.answer_leaving.as_mut() {
                Some(leaving) => drop(leaving.await),
                None => std::future::pending().await,
            }
        };
        let call = tokio::select! {
            call = self.mailbox.recv() => call,
            () = answer_leaves => {
                self.answer_leaving = None;
                self.presence.ready_answer = ReadyAnswer::Left { at_ms: self.shared.clock.now_ms() };
                None
            }
            () = predecessor_moves => None,
            () = tokio::time::sleep(nap) => None,
        };
        match call {
            Some(call) => self.take(call).await,
            None => Ok(()),
        }
    }

    /// Waits for an effect while the agent may call: it must not time out because imaging is slow.
    async fn while_answering<T>(&mut self, effect: impl Future<Output = T>) -> Result<T, Trouble> {
        tokio::pin!(effect);
        loop {
            tokio::select! {
                outcome = &mut effect => return Ok(outcome),
                Some(call) = self.mailbox.recv() => match self.take(call).await {
                    // The caller was told; the effect goes on.
                    Ok(()) | Err(Trouble::Journal) => {}
                    Err(Trouble::Stopped(stopped)) => return Err(Trouble::Stopped(stopped)),
                },
            }
        }
    }

    async fn take(&mut self, call: AgentCall) -> Result<(), Trouble> {
        let step = self.release.step;
        // Another process may have taken the release over since: then this one knows nothing to answer with, and who
        // asks looks in the journal.
        if !matches!(call, AgentCall::GiveUp(_)) && !self.still_ours().await? {
            return Err(Trouble::Stopped(Stopped));
        }
        match call {
            AgentCall::GiveUp(reason) => {
                self.presence.given_up = Some(reason);
                Ok(())
            }
            AgentCall::Ready(reply) => {
                let answer = match step.next(ReleaseEvent::AgentReady) {
                    Err(_) => Err(refusal(&self.release, ReleaseEvent::AgentReady.asked())),
                    Ok(next) if next == step => Ok(self.answer_ready()),
                    Ok(_) => match self.write(ReleaseEvent::AgentReady, self.release.clone()).await {
                        Ok(()) => Ok(self.answer_ready()),
                        Err(trouble) => return trouble.told(reply),
                    },
                };
                // If nobody waits for the answer any more, the token ends here and the move goes on all the same.
                let _nobody_waits = reply.send(answer);
                Ok(())
            }
            AgentCall::Grant(reply) => {
                if step == ReleaseStep::Ready {
                    self.held.push(reply);
                    return Ok(());
                }
                self.give_grant(reply).await
            }
            AgentCall::Handover(reply) => {
                let answer = match step.next(ReleaseEvent::AgentHandedOver) {
                    Err(_) => Err(refusal(&self.release, ReleaseEvent::AgentHandedOver.asked())),
                    Ok(next) if next == step => Ok(()),
                    Ok(_) => match self.write(ReleaseEvent::AgentHandedOver, self.release.clone()).await {
                        Ok(()) => Ok(()),
                        Err(trouble) => return trouble.told(reply),
                    },
                };
                let _nobody_waits = reply.send(answer);
                Ok(())
            }
        }
    }

    async fn still_ours(&mut self) -> Result<bool, Trouble> {
        let owner = self.shared.store.owner(self.release.admission).await.map_err(|error| {
            tracing::error!(event = "release.journal_failed", cause = chain(&error), "cannot read the release journal");
            Trouble::Journal
        })?;
        Ok(owner == Owner::Us)
    }

    fn answer_ready(&mut self) -> AnswerLeaving {
        let (leaving, left) = oneshot::channel();
        if self.release.step == ReleaseStep::Ready {
            self.presence.ready_answer = ReadyAnswer::Leaving;
            self.answer_leaving = Some(left);
        }
        AnswerLeaving(leaving)
    }

    async fn give_grant(&mut self, reply: oneshot::Sender<Result<SealedGrant, CallError>>) -> Result<(), Trouble> {
        let answer = match (self.release.step.next(ReleaseEvent::GrantFetched), self.release.grant.clone()) {
            (Ok(next), Some(grant)) => {
                if next != self.release.step
                    && let Err(trouble) = self.write(ReleaseEvent::GrantFetched, self.release.clone()).await
                {
                    return trouble.told(reply);
                }
                Ok(grant)
            }
            (Err(_), _) | (_, None) => Err(refusal(&self.release, ReleaseEvent::GrantFetched.asked())),
        };
        let _nobody_waits = reply.send(answer);
        Ok(())
    }

    /// Answers those who asked for the grant too early, if the port has moved or never will.
    async fn answer_held(&mut self) -> Result<(), Stopped> {
        if self.release.step == ReleaseStep::Ready {
            self.held.retain(|reply| !reply.is_closed());
            return Ok(());
        }
        for reply in std::mem::take(&mut self.held) {
            match self.give_grant(reply).await {
                Ok(()) | Err(Trouble::Journal) => {}
                Err(Trouble::Stopped(stopped)) => return Err(stopped),
            }
        }
        Ok(())
    }

    fn log_retry(&self, doing: &'static str, error: &EffectError) {
        tracing::warn!(
            event = "release.retry",
            node = %self.release.node,
            admission = %self.release.admission,
            cause = chain(error),
            "{doing} failed; trying again"
        );
    }
}

/// Why an action did not lead to a new step.
enum Trouble {
    /// The driver is done.
    Stopped(Stopped),
    /// The journal stands where it stood.
    Journal,
}

impl Trouble {
    /// Tells the caller that nothing was done; without a word if another process may have done it.
    fn told<T>(self, reply: oneshot::Sender<Result<T, CallError>>) -> Result<(), Self> {
        match &self {
            Self::Journal => drop(reply.send(Err(CallError::Busy))),
            Self::Stopped(_) => drop(reply),
        }
        Err(self)
    }
}

/// When to try the present effect again.
#[derive(Debug, Default)]
struct Retry {
    at_ms: Option<i64>,
    failures: u32,
    journal_failed: bool,
    last_error: Option<String>,
}

impl Retry {
    fn later(&mut self, now_ms: i64) {
        let backoff_ms = FIRST_BACKOFF_MS << self.failures.min(MOST_DOUBLINGS);
        self.failures = self.failures.saturating_add(1);
        self.at_ms = Some(now_ms.saturating_add(backoff_ms));
    }
}

/// What an agent and an operator see of a journal entry.
pub(crate) fn progress(release: &Release) -> Progress {
    let status = match release.step {
        ReleaseStep::Admitted => Status::Pending,
        ReleaseStep::Exported
        | ReleaseStep::Ready
        | ReleaseStep::Moved
        | ReleaseStep::Granted
        | ReleaseStep::HandedOver => match &release.address {
            Some(address) => Status::Move(address.clone()),
            None => Status::Aborted("the journal has no address for this node".to_owned()),
        },
        ReleaseStep::Unwinding | ReleaseStep::Unwound => Status::Aborted(release.failure.clone().unwrap_or_default()),
    };
    Progress { step: release.step, status }
}

/// Why a release at this step does not do what was asked.
pub(crate) fn refusal(release: &Release, asked: &'static str) -> CallError {
    match release.step {
        ReleaseStep::Unwinding | ReleaseStep::Unwound => {
            CallError::Undone { reason: release.failure.clone().unwrap_or_default() }
        }
        ReleaseStep::HandedOver => CallError::Complete,
        step @ (ReleaseStep::Admitted
        | ReleaseStep::Exported
        | ReleaseStep::Ready
        | ReleaseStep::Moved
        | ReleaseStep::Granted) => CallError::TooEarly { step, asked },
    }
}

fn elapsed(from_ms: i64, to_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(to_ms.saturating_sub(from_ms)).unwrap_or(0))
}

/// The crash point after a step was written.
fn written_point(step: ReleaseStep) -> &'static str {
    match step {
        ReleaseStep::Admitted => "release::admitted",
        ReleaseStep::Exported => "release::exported",
        ReleaseStep::Ready => "release::ready",
        ReleaseStep::Moved => "release::moved",
        ReleaseStep::Granted => "release::granted",
        ReleaseStep::HandedOver => "release::handed-over",
        ReleaseStep::Unwinding => "release::unwinding",
        ReleaseStep::Unwound => "release::unwound",
    }
}

const FIRST_BACKOFF_MS: i64 = 100;
/// 100 ms doubled six times: at most 6.4 s between two tries.
const MOST_DOUBLINGS: u32 = 6;
pub(super) const JOURNAL_BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_NAP: Duration = Duration::from_secs(1);
