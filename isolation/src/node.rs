//! The life cycle of a node. Pure: a state and an event in, the next state or a refusal out.
//!
//! ```text
//!              Leased               (power-cycled onto the airlock network)            Admitted
//!   Free ───────────────▶ Airlock ──────────────────────────────────────────────────────────────▶ Allocated
//!    ▲                      │ Refused, AirlockTimeout, AdmissionEnded                                  │
//!    │                      ▼                                                  AdmissionEnded, Refused, │
//!    │   Cleared         Rejected ◀─────────────────────────────────────────────────────────────────────┤ ResetSeen
//!    │ ◀──────────────────  (quarantine network, evidence kept)                                         │
//!    └──────────────── Cleaning ◀──────────────────────────────────────────────────── LeaseEnded ───────┘
//!         Cleaned        (power off, port closed, then Free; also from Airlock)
//! ```
//!
//! * `Free`: nobody's; its port is in quarantine.
//! * `Airlock`: leased; powered off, moved to the airlock network, booted from PXE, being appraised. `ResetSeen`
//!   keeps it here, as another boot.
//! * `Allocated`: admitted: on its tenant's network for as long as an admission stands.
//! * `Rejected`: on the quarantine network until an operator clears it. `LeaseEnded` keeps it here: a lessee cannot
//!   wash off a bad verdict by giving the node back.
//! * `Cleaning`: its lease ended; being powered off and closed.
//!
//! One departure from the published drawing: `Cycled` leads from Allocated, Rejected or Airlock back to Airlock while
//! the lease is alive. Without it a node that its tenant rebooted could only come back through a new lease. Nothing is
//! won by it: the port closes first, and the node is appraised again as if it were new.

use assay_wire::isolation::NodeState;
use std::fmt;

/// What happens to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A project leased it.
    Leased,
    /// An attestation result was accepted.
    Admitted,
    /// The verifier reported a bad verdict.
    Refused,
    /// It has been in the airlock too long.
    AirlockTimeout,
    /// Its admission was revoked, or expired, or could not be carried out.
    AdmissionEnded,
    /// Its BMC says that it was reset.
    ResetSeen,
    /// Its lease ended.
    LeaseEnded,
    /// It is off, and its port closed.
    Cleaned,
    /// An operator cleared it.
    Cleared,
    /// Operator or lessee asked for another pass through the airlock; the lease is alive.
    Cycled,
}

impl Event {
    /// All events.
    pub const ALL: [Self; 10] = [
        Self::Leased,
        Self::Admitted,
        Self::Refused,
        Self::AirlockTimeout,
        Self::AdmissionEnded,
        Self::ResetSeen,
        Self::LeaseEnded,
        Self::Cleaned,
        Self::Cleared,
        Self::Cycled,
    ];

    /// The event's stable word, in the audit log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Leased => "leased",
            Self::Admitted => "admitted",
            Self::Refused => "refused",
            Self::AirlockTimeout => "airlock-timeout",
            Self::AdmissionEnded => "admission-ended",
            Self::ResetSeen => "reset-seen",
            Self::LeaseEnded => "lease-ended",
            Self::Cleaned => "cleaned",
            Self::Cleared => "cleared",
            Self::Cycled => "cycled",
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An event that has no place in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a node that is {state} cannot be {event}")]
pub struct Refused {
    /// Where the node stands, and stays.
    pub state: NodeState,
    /// What was tried.
    pub event: Event,
}

/// The state after `event`.
///
/// # Errors
/// The event has no place in this state; nothing changes.
pub fn next(state: NodeState, event: Event) -> Result<NodeState, Refused> {
    use Event as E;
    use NodeState as S;
    match (state, event) {
        (S::Free, E::Leased) => Ok(S::Airlock),
        (S::Airlock, E::Admitted) => Ok(S::Allocated),
        (S::Airlock, E::Refused | E::AirlockTimeout | E::AdmissionEnded) => Ok(S::Rejected),
        (S::Airlock, E::ResetSeen | E::Cycled) => Ok(S::Airlock),
        (S::Allocated, E::Refused | E::AdmissionEnded | E::ResetSeen) => Ok(S::Rejected),
        (S::Airlock | S::Allocated, E::LeaseEnded) => Ok(S::Cleaning),
        (S::Allocated | S::Rejected, E::Cycled) => Ok(S::Airlock),
        (S::Rejected, E::LeaseEnded) => Ok(S::Rejected),
        (S::Rejected, E::Cleared) => Ok(S::Free),
        (S::Cleaning, E::Cleaned) => Ok(S::Free),
        (S::Free, E::Admitted | E::Refused | E::AirlockTimeout | E::AdmissionEnded | E::ResetSeen)
        | (S::Free, E::LeaseEnded | E::Cleaned | E::Cleared | E::Cycled)
        | (S::Airlock, E::Leased | E::Cleaned | E::Cleared)
        | (S::Allocated, E::Leased | E::Admitted | E::AirlockTimeout | E::Cleaned | E::Cleared)
        | (S::Rejected, E::Leased | E::Admitted | E::Refused | E::AirlockTimeout | E::AdmissionEnded)
        | (S::Rejected, E::ResetSeen | E::Cleaned)
        | (S::Cleaning, E::Leased | E::Admitted | E::Refused | E::AirlockTimeout | E::AdmissionEnded)
        | (S::Cleaning, E::ResetSeen | E::LeaseEnded | E::Cleared | E::Cycled) => Err(Refused { state, event }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_admission_leads_to_allocated_and_only_from_the_airlock() {
        for state in NodeState::ALL {
            for event in Event::ALL {
                if next(state, event) == Ok(NodeState::Allocated) {
                    assert_eq!((state, event), (NodeState::Airlock, Event::Admitted));
                }
            }
        }
    }

    #[test]
    fn a_rejected_node_is_freed_by_an_operator_only() {
        for event in Event::ALL {
            let after = next(NodeState::Rejected, event);
            assert_eq!(after == Ok(NodeState::Free), event == Event::Cleared, "{event}: {after:?}");
        }
    }

    #[test]
    fn every_state_can_be_left_and_free_can_be_reached_from_everywhere() {
        for start in NodeState::ALL {
            let mut reached = vec![start];
            for index in 0.. {
                let Some(&state) = reached.get(index) else { break };
                let after = Event::ALL.into_iter().filter_map(|event| next(state, event).ok());
                let new: Vec<_> = after.filter(|s| !reached.contains(s)).collect();
                reached.extend(new);
                reached.dedup();
            }
            assert!(reached.contains(&NodeState::Free), "{start} never becomes free");
        }
    }

    #[test]
    fn the_drawing_names_every_state_and_event() {
        let source = include_str!("node.rs");
        let drawing = source.split("use assay_wire").next().unwrap();
        for state in NodeState::ALL {
            assert!(drawing.contains(&format!("{state:?}")), "{state:?} is not in the drawing");
        }
        for event in Event::ALL {
            assert!(drawing.contains(&format!("{event:?}")), "{event:?} is not in the drawing");
        }
    }
}
