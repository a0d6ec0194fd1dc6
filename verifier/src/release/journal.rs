//! The release's state machine: which step follows which event, and what must be done next. Steps 6 to 9 of the boot
//! path. Nothing here does anything: a journal entry, the time and what is known of the agent go in, one [`Action`]
//! comes out, so a restarted verifier decides exactly as the one before it would have.
//!
//! ```text
//!            export made       agent ready       port moved       grant fetched       agent hands over
//!  Admitted ────────────▶ Exported ─────▶ Ready ──────────▶ Moved ────────────▶ Granted ────────────▶ HandedOver
//!     │                      │              │                 │                    │
//!     └──────────────────────┴───────┬──────┴─────────────────┴────────────────────┘
//!                                    │ refused, failed for too long, silent or expired
//!                                    ▼
//!                                Unwinding ──── admission and export are gone ────▶ Unwound
//! ```
//!
//! * **Admitted**: the result is signed and archived. Nothing outside the verifier has happened.
//! * **Exported**: imaging answered; disk, target and sealed grant exist. The port is where it was.
//! * **Ready**: the agent knows its address and lets go of the airlock. Only from here may a port move.
//! * **Moved**: isolation answered that the switch says so.
//! * **Granted**: the sealed grant was given out, on the tenant's network.
//! * **HandedOver**: done. From here on the admission is isolation's to end.
//! * **Unwinding**: something may be open; fence first (admission), then the export, again until both answer.
//! * **Unwound**: nothing is open.
//!
//! A step is written when its effect is *done*, so a crash repeats at most one effect, and every effect is idempotent
//! by admission id.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How far a release has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseStep {
    /// The result is signed and archived.
    Admitted,
    /// imaging made clone, export and grant.
    Exported,
    /// The agent said `ready`.
    Ready,
    /// isolation moved the port and read it back.
    Moved,
    /// The agent fetched its grant.
    Granted,
    /// The agent hands over to the tenant's kernel: done.
    HandedOver,
    /// Being undone.
    Unwinding,
    /// Undone: done.
    Unwound,
}

/// What can happen to a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseEvent {
    /// imaging answered the export.
    ExportMade,
    /// The agent said `ready`.
    AgentReady,
    /// isolation answered the admission.
    PortMoved,
    /// The agent asked for its grant.
    GrantFetched,
    /// The agent said that it hands over.
    AgentHandedOver,
    /// It cannot be completed.
    Failed,
    /// isolation and imaging both answered that nothing of it is left.
    Undone,
}

impl ReleaseEvent {
    /// What an agent wanted that says this.
    #[must_use]
    pub fn asked(self) -> &'static str {
        match self {
            Self::AgentReady => "say `ready`",
            Self::GrantFetched => "fetch the grant",
            Self::AgentHandedOver => "hand over",
            Self::ExportMade | Self::PortMoved | Self::Failed | Self::Undone => "act for the verifier",
        }
    }
}

/// An event that the present step does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a release that is {step} cannot take the event {event:?}")]
pub struct OutOfOrder {
    /// Where the release stands.
    pub step: ReleaseStep,
    /// What was tried.
    pub event: ReleaseEvent,
}

impl ReleaseStep {
    /// All steps.
    pub const ALL: [Self; 8] = [
        Self::Admitted,
        Self::Exported,
        Self::Ready,
        Self::Moved,
        Self::Granted,
        Self::HandedOver,
        Self::Unwinding,
        Self::Unwound,
    ];

    /// The step after `event`. What an agent says twice changes nothing the second time.
    ///
    /// # Errors
    /// The event does not belong here; the step stays.
    pub fn next(self, event: ReleaseEvent) -> Result<Self, OutOfOrder> {
        use ReleaseEvent::{AgentHandedOver, AgentReady, ExportMade, Failed, GrantFetched, PortMoved, Undone};
        let refused = Err(OutOfOrder { step: self, event });
        match self {
            Self::Admitted => match event {
                ExportMade => Ok(Self::Exported),
                Failed => Ok(Self::Unwinding),
                AgentReady | PortMoved | GrantFetched | AgentHandedOver | Undone => refused,
            },
            Self::Exported => match event {
                AgentReady => Ok(Self::Ready),
                Failed => Ok(Self::Unwinding),
                ExportMade | PortMoved | GrantFetched | AgentHandedOver | Undone => refused,
            },
            Self::Ready => match event {
                PortMoved => Ok(Self::Moved),
                AgentReady => Ok(self),
                Failed => Ok(Self::Unwinding),
                ExportMade | GrantFetched | AgentHandedOver | Undone => refused,
            },
            Self::Moved => match event {
                GrantFetched => Ok(Self::Granted),
                AgentReady => Ok(self),
                Failed => Ok(Self::Unwinding),
                ExportMade | PortMoved | AgentHandedOver | Undone => refused,
            },
            Self::Granted => match event {
                AgentHandedOver => Ok(Self::HandedOver),
                AgentReady | GrantFetched => Ok(self),
                Failed => Ok(Self::Unwinding),
                ExportMade | PortMoved | Undone => refused,
            },
            Self::HandedOver => match event {
                AgentHandedOver => Ok(self),
                ExportMade | AgentReady | PortMoved | GrantFetched | Failed | Undone => refused,
            },
            Self::Unwinding => match event {
                Undone => Ok(Self::Unwound),
                Failed => Ok(self),
                ExportMade | AgentReady | PortMoved | GrantFetched | AgentHandedOver => refused,
            },
            Self::Unwound => match event {
                Undone => Ok(self),
                ExportMade | AgentReady | PortMoved | GrantFetched | AgentHandedOver | Failed => refused,
            },
        }
    }

    /// Whether nothing is left to do.
    #[must_use]
    pub fn is_finished(self) -> bool {
        match self {
            Self::HandedOver | Self::Unwound => true,
            Self::Admitted | Self::Exported | Self::Ready | Self::Moved | Self::Granted | Self::Unwinding => false,
        }
    }

    /// The step's stable word, as the journal and the API have it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admitted => "admitted",
            Self::Exported => "exported",
            Self::Ready => "ready",
            Self::Moved => "moved",
            Self::Granted => "granted",
            Self::HandedOver => "handed-over",
            Self::Unwinding => "unwinding",
            Self::Unwound => "unwound",
        }
    }
}

impl fmt::Display for ReleaseStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word in the journal that is no step.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no step of a release")]
pub struct UnknownStep(String);

impl FromStr for ReleaseStep {
    type Err = UnknownStep;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|step| step.as_str() == value).ok_or_else(|| UnknownStep(value.to_owned()))
    }
}

/// How long each step may take, and how long the verifier holds back a move. Milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReleaseTimeouts {
    /// For imaging to make the export, retries included.
    pub export_ms: i64,
    /// For the agent to say `ready`.
    pub agent_ready_ms: i64,
    /// For isolation to move the port, retries included; counted from `ready`.
    pub move_ms: i64,
    /// For the agent to fetch its grant; counted from the move.
    pub grant_ms: i64,
    /// For the agent to hand over; counted from the grant.
    pub handover_ms: i64,
    /// From the moment the answer to `ready` left this process to the move: time for the last segment to reach the
    /// agent and be acknowledged before its port goes away.
    pub settle_ms: i64,
    /// After a restart in `ready`: time for an agent that never got its answer to ask again; agents try every 5 s.
    pub resume_grace_ms: i64,
}

impl Default for ReleaseTimeouts {
    fn default() -> Self {
        Self {
            export_ms: 60_000,
            agent_ready_ms: 120_000,
            move_ms: 60_000,
            grant_ms: 120_000,
            handover_ms: 180_000,
            settle_ms: 50,
            resume_grace_ms: 10_000,
        }
    }
}

/// What of a journal entry decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The step that was written last.
    pub step: ReleaseStep,
    /// When it was written.
    pub step_at_ms: i64,
    /// When the attestation result expires.
    pub result_expires_at_ms: i64,
}

/// What the running process knows beside the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    /// When this process took the release up.
    pub resumed_at_ms: i64,
    /// Whether the answer to the agent's `ready` has left.
    pub ready_answer: ReadyAnswer,
    /// Whether an earlier release of the same node is still being undone. Until then its disk may be in use.
    pub predecessor_open: bool,
    /// Why it cannot be completed any more, whatever the agent does.
    pub given_up: Option<Reason>,
}

/// What became of the answer to the agent's `ready`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadyAnswer {
    /// This process has not been asked: it was restarted since.
    NotAsked,
    /// The answer is on its way out.
    Leaving,
    /// The answer was handed to the connection, or the connection is gone.
    Left {
        /// When.
        at_ms: i64,
    },
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `POST /v1/exports` to imaging.
    Export,
    /// `POST /v1/admissions` to isolation.
    Move,
    /// `DELETE` the admission, then the export.
    Unwind,
    /// Nothing until the agent calls or this moment has come.
    Wait {
        /// When to decide again.
        until_ms: i64,
    },
    /// Record that it cannot be completed.
    GiveUp(Reason),
    /// Nothing, ever.
    Finish,
}

/// Why a release is given up without anybody having refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The attestation result is too old to act on.
    ResultExpired,
    /// imaging did not make the export in time.
    ExportTimeout,
    /// The agent did not say `ready` in time.
    ReadyTimeout,
    /// isolation did not move the port in time.
    MoveTimeout,
    /// The agent did not fetch its grant in time.
    GrantTimeout,
    /// The agent did not hand over in time.
    HandoverTimeout,
    /// The node booted again and was accepted again.
    Superseded,
    /// isolation closed the port that it had opened: the node was reset, or an operator ended it.
    AdmissionEnded,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ResultExpired => "the attestation result expired before the release was complete",
            Self::ExportTimeout => "imaging did not make the export in time",
            Self::ReadyTimeout => "the agent did not say `ready` in time",
            Self::MoveTimeout => "isolation did not move the port in time",
            Self::GrantTimeout => "the agent did not fetch its grant in time after its port was moved",
            Self::HandoverTimeout => "the agent did not hand over in time after it got its grant",
            Self::Superseded => "the node was accepted anew, in a later session",
            Self::AdmissionEnded => "isolation has ended the admission before the node was handed over",
        })
    }
}

/// Decides what to do next.
#[must_use]
pub fn decide(position: &Position, presence: &Presence, timeouts: &ReleaseTimeouts, now_ms: i64) -> Action {
    let deadline = |timeout_ms: i64| position.step_at_ms.saturating_add(timeout_ms).min(position.result_expires_at_ms);
    let overdue = |timeout_ms: i64, reason: Reason| {
        if let Some(reason) = presence.given_up {
            Some(Action::GiveUp(reason))
        } else if now_ms >= position.result_expires_at_ms {
            Some(Action::GiveUp(Reason::ResultExpired))
        } else if now_ms >= deadline(timeout_ms) {
            Some(Action::GiveUp(reason))
        } else {
            None
        }
    };
    match position.step {
        ReleaseStep::Admitted => overdue(timeouts.export_ms, Reason::ExportTimeout).unwrap_or({
            if presence.predecessor_open {
                Action::Wait { until_ms: deadline(timeouts.export_ms) }
            } else {
                Action::Export
            }
        }),
        ReleaseStep::Exported => overdue(timeouts.agent_ready_ms, Reason::ReadyTimeout)
            .unwrap_or(Action::Wait { until_ms: deadline(timeouts.agent_ready_ms) }),
        ReleaseStep::Ready => overdue(timeouts.move_ms, Reason::MoveTimeout).unwrap_or_else(|| {
            let move_at_ms = match presence.ready_answer {
                ReadyAnswer::Left { at_ms } => at_ms.saturating_add(timeouts.settle_ms),
                ReadyAnswer::Leaving => deadline(timeouts.move_ms),
                ReadyAnswer::NotAsked => presence.resumed_at_ms.saturating_add(timeouts.resume_grace_ms),
            };
            if now_ms >= move_at_ms { Action::Move } else { Action::Wait { until_ms: move_at_ms } }
        }),
        ReleaseStep::Moved => overdue(timeouts.grant_ms, Reason::GrantTimeout)
            .unwrap_or(Action::Wait { until_ms: deadline(timeouts.grant_ms) }),
        ReleaseStep::Granted => overdue(timeouts.handover_ms, Reason::HandoverTimeout)
            .unwrap_or(Action::Wait { until_ms: deadline(timeouts.handover_ms) }),
        ReleaseStep::Unwinding => Action::Unwind,
        ReleaseStep::HandedOver | ReleaseStep::Unwound => Action::Finish,
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
