//! An agent asks about a release that is not driven here: another verifier of the same database has it, or nobody has.
//!
//! While a release waits for its agent, nothing of it is under way anywhere, so it is simply taken over: from then on it
//! is driven where the agent asks, and what the agent says is written by the one who heard it. While its port moves
//! it is left where it is.

use super::journal::{ReleaseEvent, ReleaseStep};
use std::time::Duration;

/// What to do with an agent's call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elsewhere {
    /// Drive the release here, then answer.
    TakeOver,
    /// Answer at once: what the agent says is in the journal already.
    Repeat,
    /// Look again soon: it is being done.
    Wait,
    /// Say why not.
    Refuse,
}

/// How soon to look again at a release that another process drives.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Decides by the step that the journal shows.
pub(super) fn decide(step: ReleaseStep, event: ReleaseEvent) -> Elsewhere {
    match step {
        ReleaseStep::Exported | ReleaseStep::Moved | ReleaseStep::Granted => Elsewhere::TakeOver,
        ReleaseStep::Ready => match event {
            ReleaseEvent::AgentReady => Elsewhere::Repeat,
            ReleaseEvent::GrantFetched => Elsewhere::Wait,
            ReleaseEvent::AgentHandedOver
            | ReleaseEvent::ExportMade
            | ReleaseEvent::PortMoved
            | ReleaseEvent::Failed
            | ReleaseEvent::Undone => Elsewhere::Refuse,
        },
        ReleaseStep::Admitted | ReleaseStep::HandedOver | ReleaseStep::Unwinding | ReleaseStep::Unwound => {
            Elsewhere::Refuse
        }
    }
}
