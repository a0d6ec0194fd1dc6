//! What to do next for a node. Pure: its record, what was seen of its ports, and the time in; one [`Action`] out.
//!
//! The order is the safety argument: what closes a port comes before everything, and nothing opens one without an
//! admission that stands now.

use crate::admission::Admission;
use crate::record::{Entry, NodeRecord};
use assay_wire::isolation::{NodeState, PortIntent};

/// The next thing to do for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The port is meant to be open, and no admission stands any more: close it, then record that.
    EndAdmission,
    /// A port is not, or not known to be, what it should be: the NIC at this index.
    SetPort(usize),
    /// Power off, move to the airlock, power on.
    EnterAirlock,
    /// No admission in time: close, then record that.
    TimeOut,
    /// Power off; its ports are closed.
    Clean,
    /// Ask the BMC whether the node was reset.
    CheckReset,
    /// Read the ports.
    Observe,
    /// Nothing until then, in ms since the epoch.
    WaitUntil(i64),
}

/// How long things may take, and how often they are looked at; all in ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Periods {
    /// How long a node may be in the airlock.
    pub airlock_timeout_ms: i64,
    /// How often the BMC is asked for resets.
    pub reset_poll_ms: i64,
    /// How often ports are read.
    pub observe_ms: i64,
}

/// What is known since this process began, and not on record.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Whether the ports have been read since the process began: what is on record may be old.
    pub ports_read: bool,
    /// When ports were last read.
    pub observed_ms: i64,
    /// When the BMC was last asked for resets.
    pub reset_checked_ms: i64,
    /// Switch work that failed.
    pub switch_retry: Retry,
    /// BMC work that failed.
    pub bmc_retry: Retry,
}

/// Back-off after failures: 0.5 s doubling to 30 s.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retry {
    failures: u32,
    not_before_ms: i64,
}

impl Retry {
    /// It failed: wait longer than last time.
    pub fn failed(&mut self, now_ms: i64) {
        let delay_ms = (500_i64 << self.failures.min(6)).min(30_000);
        self.failures = self.failures.saturating_add(1);
        self.not_before_ms = now_ms.saturating_add(delay_ms);
    }

    /// It worked.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }
}

/// Decides.
#[must_use]
pub fn select(record: &NodeRecord, progress: &Progress, periods: &Periods, now_ms: i64) -> Action {
    let mut due = Vec::with_capacity(4);
    let opens = |intent: PortIntent| matches!(intent, PortIntent::Access { .. });
    let admitted = Admission::standing(record, now_ms);
    if (record.state == NodeState::Allocated || record.nics.iter().any(|n| opens(n.desired))) && admitted.is_none() {
        match gate(progress.switch_retry, now_ms) {
            None => return Action::EndAdmission,
            Some(at) => due.push(at),
        }
    }
    let observe_at = progress.observed_ms.saturating_add(periods.observe_ms);
    match gate(progress.switch_retry, now_ms) {
        Some(at) => due.push(at),
        None if !progress.ports_read => return Action::Observe,
        None => {
            if let Some(index) = record.nics.iter().position(|n| n.observed != Some(n.desired)) {
                return Action::SetPort(index);
            }
            if now_ms >= observe_at {
                return Action::Observe;
            }
            due.push(observe_at);
        }
    }
    let closed = record.nics.iter().all(|n| n.observed == Some(n.desired));
    let bmc_free = gate(progress.bmc_retry, now_ms);
    match (record.state, record.entry) {
        (NodeState::Airlock, Entry::Pending) if closed => match bmc_free {
            None => return Action::EnterAirlock,
            Some(at) => due.push(at),
        },
        (NodeState::Cleaning, _) if closed => match bmc_free {
            None => return Action::Clean,
            Some(at) => due.push(at),
        },
        (NodeState::Airlock, Entry::Done) | (NodeState::Allocated, _) => {
            let reset_at = progress.reset_checked_ms.saturating_add(periods.reset_poll_ms);
            let timeout_at = record.entered_ms.saturating_add(periods.airlock_timeout_ms);
            if record.state == NodeState::Airlock {
                if now_ms >= timeout_at {
                    return Action::TimeOut;
                }
                due.push(timeout_at);
            }
            match bmc_free {
                None if now_ms >= reset_at => return Action::CheckReset,
                None => due.push(reset_at),
                Some(at) => due.push(at),
            }
        }
        (NodeState::Free | NodeState::Rejected, _) | (NodeState::Airlock | NodeState::Cleaning, _) => {}
    }
    if let (NodeState::Allocated, Some(admission)) = (record.state, &record.admission) {
        due.push(admission.expires_at_ms);
    }
    Action::WaitUntil(due.into_iter().filter(|at| *at > now_ms).min().unwrap_or(observe_at.max(now_ms + 1)))
}

/// None when work may go on; the time to wait for otherwise.
fn gate(retry: Retry, now_ms: i64) -> Option<i64> {
    (retry.not_before_ms > now_ms).then_some(retry.not_before_ms)
}
