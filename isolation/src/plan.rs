//! What to do next for a node. Pure: its record, what was seen of its ports, and the time in; one [`Action`] out.
//!
//! The order is the safety argument: what closes a port comes before everything, and nothing opens one without an
//! admission that stands now.

use crate::admission::Admission;
use crate::link::LinkWatch;
use crate::record::{Entry, NicRecord, NodeRecord};
use assay_wire::isolation::{NodeState, PortIntent};

/// The next thing to do for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The port is meant to be open, and must not be any more: close it, then record that.
    EndAdmission(Ending),
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

/// Why an admission ends without anybody asking for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// None stands.
    NoneStands,
    /// The switch has the port in quarantine, which only a decision to close puts it in. If that is not on record, the
    /// record is what was lost: this process ended between fence and record, or an old database was restored.
    FoundFenced,
    /// The port's link has been down for longer than the site allows.
    LinkLost,
}

impl Ending {
    /// In words.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoneStands => "its admission expired or is not on record",
            Self::FoundFenced => "its port was found in quarantine, and the record does not know why",
            Self::LinkLost => "the link of its port went down",
        }
    }
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
    /// How long the link of an admitted node's port may be down.
    pub link_grace_ms: i64,
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
    /// What was seen of the boot NIC's link.
    pub link: LinkWatch,
    /// Switch work that failed.
    pub switch_retry: Retry,
    /// BMC work that failed.
    pub bmc_retry: Retry,
    /// While something fails: what was said of it, and what the node's reason was before.
    pub trouble: Option<Trouble>,
}

/// A node's reason while something fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The failure, as shown.
    pub shown: String,
    /// The reason that it hides.
    pub hidden: String,
}

/// Back-off after failures: 0.5 s, doubling.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retry {
    failures: u32,
    not_before_ms: i64,
}

impl Retry {
    /// It failed: wait twice as long as last time, at most `longest_ms`.
    pub fn failed(&mut self, now_ms: i64, longest_ms: i64) {
        let delay_ms = (500_i64 << self.failures.min(6)).min(longest_ms);
        self.failures = self.failures.saturating_add(1);
        self.not_before_ms = now_ms.saturating_add(delay_ms);
    }

    /// It worked.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Whether nothing failed lately.
    #[must_use]
    pub fn is_clear(self) -> bool {
        self.failures == 0
    }
}

/// Decides.
#[must_use]
pub fn select(record: &NodeRecord, progress: &Progress, periods: &Periods, now_ms: i64) -> Action {
    let mut due = Vec::with_capacity(4);
    if let Some(ending) = ending(record, progress, periods, now_ms) {
        match gate(progress.switch_retry, now_ms) {
            None => return Action::EndAdmission(ending),
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
            let polled_at = progress.reset_checked_ms.saturating_add(periods.reset_poll_ms);
            let reset_at = if progress.link.flapped() { now_ms } else { polled_at };
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

/// Why a node whose port is meant to be open must be closed; none if it need not, or is not meant to be.
fn ending(record: &NodeRecord, progress: &Progress, periods: &Periods, now_ms: i64) -> Option<Ending> {
    let opens = |intent: PortIntent| matches!(intent, PortIntent::Access { .. });
    if record.state != NodeState::Allocated && !record.nics.iter().any(|nic| opens(nic.desired)) {
        return None;
    }
    if Admission::standing(record, now_ms).is_none() {
        return Some(Ending::NoneStands);
    }
    let fenced =
        |nic: &NicRecord| nic.observed == Some(PortIntent::Quarantine) && nic.desired != PortIntent::Quarantine;
    if progress.ports_read && record.nics.iter().any(fenced) {
        return Some(Ending::FoundFenced);
    }
    let admission = record.admission.as_ref().map(|admission| admission.id);
    progress.link.is_lost(admission, periods.link_grace_ms).then_some(Ending::LinkLost)
}

/// None when work may go on; the time to wait for otherwise.
fn gate(retry: Retry, now_ms: i64) -> Option<i64> {
    (retry.not_before_ms > now_ms).then_some(retry.not_before_ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{AdmissionRecord, LeaseRecord};
    use crate::switch::{Link, LinkReading};
    use assay_wire::id::{AdmissionId, BootId, LeaseId};
    use assay_wire::isolation::{Nic, NodeLease};
    use assay_wire::net::VlanId;
    use proptest::prelude::*;

    const PERIODS: Periods =
        Periods { airlock_timeout_ms: 600_000, reset_poll_ms: 1000, observe_ms: 2000, link_grace_ms: 15_000 };

    fn access() -> PortIntent {
        PortIntent::Access { vlan: VlanId::try_from(120).unwrap() }
    }

    fn record(state: NodeState, desired: PortIntent, observed: Option<PortIntent>) -> NodeRecord {
        let nic = Nic {
            name: "eth0".parse().unwrap(),
            mac: "52:54:00:00:00:01".parse().unwrap(),
            switch: "sw".parse().unwrap(),
            port: "p1".into(),
        };
        NodeRecord {
            name: "n1".parse().unwrap(),
            state,
            reason: String::new(),
            since_ms: 0,
            boot: Some(BootId::random()),
            entry: Entry::Done,
            entered_ms: 0,
            reset_time: Some("r".into()),
            machine_resets: 1,
            nics: vec![NicRecord { nic, desired, observed }],
            lease: None,
            admission: None,
        }
    }

    /// Allocated, with an admission until `expires_at_ms`.
    fn allocated(expires_at_ms: i64) -> NodeRecord {
        let mut record = record(NodeState::Allocated, access(), Some(access()));
        let lease = NodeLease {
            id: LeaseId::random(),
            project: "alpha".parse().unwrap(),
            node: record.name.clone(),
            network: "net-a".parse().unwrap(),
        };
        record.admission = Some(AdmissionRecord {
            id: AdmissionId::random(),
            lease: lease.id,
            boot: record.boot.unwrap(),
            ak_name: String::new(),
            expires_at_ms,
            revoked: None,
        });
        record.lease = Some(LeaseRecord { lease, vlan: VlanId::try_from(120).unwrap() });
        record
    }

    fn settled(now_ms: i64) -> Progress {
        Progress { ports_read: true, observed_ms: now_ms, reset_checked_ms: now_ms, ..Progress::default() }
    }

    #[test]
    fn an_admitted_node_is_left_alone_until_its_admission_ends() {
        let record = allocated(5000);
        assert_eq!(select(&record, &settled(4500), &PERIODS, 4500), Action::WaitUntil(5000));
        assert_eq!(select(&record, &settled(5000), &PERIODS, 5000), Action::EndAdmission(Ending::NoneStands));
        let mut revoked = allocated(5000);
        revoked.admission.as_mut().unwrap().revoked = Some("bad".into());
        assert_eq!(select(&revoked, &settled(10), &PERIODS, 10), Action::EndAdmission(Ending::NoneStands));
        let mut other_boot = allocated(5000);
        other_boot.boot = Some(BootId::random());
        assert_eq!(select(&other_boot, &settled(10), &PERIODS, 10), Action::EndAdmission(Ending::NoneStands));
    }

    #[test]
    fn d4_a_port_that_is_found_in_quarantine_is_not_opened_again_by_the_record() {
        let mut node = allocated(5000);
        node.nics[0].observed = Some(PortIntent::Quarantine);
        assert_eq!(select(&node, &settled(10), &PERIODS, 10), Action::EndAdmission(Ending::FoundFenced));
        // What is on record from before this process began may be older than the admission.
        assert_eq!(select(&node, &Progress::default(), &PERIODS, 10), Action::Observe);
        // Anything else is drift, or an opening that was interrupted.
        for observed in [None, Some(PortIntent::Airlock), Some(PortIntent::Access { vlan: 121.try_into().unwrap() })] {
            node.nics[0].observed = observed;
            assert_eq!(select(&node, &settled(10), &PERIODS, 10), Action::SetPort(0));
        }
    }

    #[test]
    fn d1_a_lost_link_ends_the_admission_and_a_flap_has_the_bmc_asked_at_once() {
        let node = allocated(60_000);
        let id = node.admission.as_ref().map(|admission| admission.id);
        let down = LinkReading { link: Link::Down, changes: Some(1) };
        let mut progress = settled(0);
        progress.link.saw(id, LinkReading { link: Link::Up, changes: Some(0) }, 0);
        assert!(matches!(select(&node, &progress, &PERIODS, 500), Action::WaitUntil(_)));
        progress.link.saw(id, down, 600);
        assert_eq!(select(&node, &progress, &PERIODS, 600), Action::CheckReset);
        progress.link.flap_was_looked_into();
        assert!(matches!(select(&node, &progress, &PERIODS, 700), Action::WaitUntil(_)));
        progress.link.saw(id, down, 15_600);
        progress.observed_ms = 15_600;
        assert_eq!(select(&node, &progress, &PERIODS, 15_600), Action::EndAdmission(Ending::LinkLost));
    }

    #[test]
    fn after_a_start_ports_are_read_before_anything_is_believed() {
        assert_eq!(select(&allocated(5000), &Progress::default(), &PERIODS, 10), Action::Observe);
        assert_eq!(
            select(&allocated(5000), &Progress::default(), &PERIODS, 5000),
            Action::EndAdmission(Ending::NoneStands)
        );
    }

    #[test]
    fn d4_d9_the_airlock_is_entered_with_closed_ports_only_and_left_by_the_clock() {
        let mut node = record(NodeState::Airlock, PortIntent::Quarantine, None);
        node.entry = Entry::Pending;
        assert_eq!(select(&node, &settled(0), &PERIODS, 0), Action::SetPort(0));
        // Nor while the switch does not answer, however free the BMC is.
        let mut unanswered = settled(0);
        unanswered.switch_retry.failed(0, 5000);
        assert!(matches!(select(&node, &unanswered, &PERIODS, 0), Action::WaitUntil(_)));
        node.nics[0].observed = Some(PortIntent::Quarantine);
        assert_eq!(select(&node, &settled(0), &PERIODS, 0), Action::EnterAirlock);
        let inside = record(NodeState::Airlock, PortIntent::Airlock, Some(PortIntent::Airlock));
        assert_eq!(select(&inside, &settled(600_000), &PERIODS, 600_000), Action::TimeOut);
        assert_eq!(
            select(&inside, &Progress { reset_checked_ms: 0, ..settled(1500) }, &PERIODS, 1500),
            Action::CheckReset
        );
    }

    #[test]
    fn failures_are_waited_out_longer_each_time_and_forgotten_on_success() {
        let node = record(NodeState::Free, PortIntent::Quarantine, None);
        let mut progress = settled(0);
        let mut delays = Vec::new();
        for _ in 0..9 {
            progress.switch_retry.failed(0, 5000);
            match select(&node, &progress, &PERIODS, 0) {
                Action::WaitUntil(at) => delays.push(at),
                other => panic!("{other:?} although the switch just failed"),
            }
        }
        assert_eq!(delays[..3], [500, 1000, 2000]);
        assert_eq!(delays[8], 5000);
        progress.switch_retry.succeeded();
        assert_eq!(select(&node, &progress, &PERIODS, 0), Action::SetPort(0));
    }

    fn intents() -> impl Strategy<Value = PortIntent> {
        prop_oneof![Just(PortIntent::Quarantine), Just(PortIntent::Airlock), Just(access())]
    }

    proptest! {
        #[test]
        fn an_open_port_without_admission_is_closed_next_whatever_else_is_due(
            state in prop::sample::select(NodeState::ALL.to_vec()), desired in intents(),
            observed in prop::option::of(intents()),
            ports_read: bool, observed_ms in 0_i64..10_000, now_ms in 0_i64..10_000, entered in any::<bool>()
        ) {
            let mut node = record(state, desired, observed);
            node.entry = if entered { Entry::Done } else { Entry::Pending };
            let progress = Progress { ports_read, observed_ms, ..Progress::default() };
            let action = select(&node, &progress, &PERIODS, now_ms);
            if desired == access() || state == NodeState::Allocated {
                prop_assert_eq!(action, Action::EndAdmission(Ending::NoneStands));
            }
            // Power is touched only while every port is known to be closed as desired.
            if matches!(action, Action::EnterAirlock | Action::Clean) {
                prop_assert!(ports_read && observed == Some(desired) && desired != access());
            }
            if let Action::WaitUntil(at) = action {
                prop_assert!(at > now_ms, "waiting for {at} at {now_ms} never ends");
            }
        }
    }
}
