//! What callers ask of a node, done by its driver, one at a time.

use crate::admission::{Admission, AdmissionRefused, Airlocked};
use crate::hands::{Hands, HandsError, reset_seen};
use crate::node::{Event, Refused};
use crate::record::{LeaseRecord, NodeRecord};
use crate::store::{Effect, RecordError};
use assay_service::error::{ApiError, chain};
use assay_service::telemetry::boot_step;
use assay_wire::agreement::Presented;
use assay_wire::id::{AdmissionId, LeaseId};
use assay_wire::isolation::{
    Admission as AdmissionAnswer, LeaseRequest, NodeLease, NodeState, NodeStatus, PortIntent, RejectRequest,
};
use assay_wire::step::Step;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// A command.
#[derive(Debug)]
pub enum Command {
    /// Lease the node.
    Lease(LeaseRequest, Reply<NodeLease>),
    /// End its lease.
    EndLease(LeaseId, Reply<NodeStatus>),
    /// Clear a rejected node.
    Clear(Reply<NodeStatus>),
    /// Through the airlock again.
    Cycle(Reply<NodeStatus>),
    /// A bad verdict.
    Reject(RejectRequest, Reply<NodeStatus>),
    /// Signed results ask for the port.
    Admit(Presented, Reply<AdmissionAnswer>),
    /// End an admission, with the reason.
    Revoke(AdmissionId, String, Reply<AdmissionAnswer>),
    /// Remove the node from the record.
    Remove(Reply<()>),
}

impl Hands {
    /// Does what was asked, and answers. A caller that went away does not undo anything.
    pub async fn handle(&self, command: Command) {
        match command {
            Command::Lease(request, reply) => drop(reply.send(self.lease(request).await)),
            Command::EndLease(lease, reply) => drop(reply.send(self.end_lease(lease).await)),
            Command::Clear(reply) => drop(reply.send(self.clear().await)),
            Command::Cycle(reply) => drop(reply.send(self.cycle().await)),
            Command::Reject(request, reply) => drop(reply.send(self.reject(request).await)),
            Command::Admit(results, reply) => drop(reply.send(self.admit(&results).await)),
            Command::Revoke(id, reason, reply) => drop(reply.send(self.revoke(id, &reason).await)),
            Command::Remove(reply) => drop(reply.send(self.remove().await)),
        }
    }

    async fn lease(&self, request: LeaseRequest) -> Result<NodeLease, ApiError> {
        let LeaseRequest { id, project, node, network } = request;
        let lease = NodeLease { id, project, node, network };
        match self.store.lease(id).await? {
            Some((known, false)) if known == lease => return Ok(known),
            Some((known, false)) => {
                return Err(ApiError::conflict(
                    "lease-exists",
                    format!("lease {id} is of node {} already", known.node),
                ));
            }
            Some((_, true)) => return Err(ApiError::conflict("lease-ended", format!("lease {id} has ended"))),
            None => {}
        }
        let networks = self.store.inventory().await?.networks;
        let network = networks.into_iter().find(|n| n.name == lease.network && n.is_for(&lease.project));
        let vlan = network.map(|n| n.vlan).ok_or_else(|| {
            ApiError::not_found(format!("project {} has no network {}", lease.project, lease.network))
        })?;
        let mut record = self.record().await?;
        self.step(&mut record, Event::Leased, format!("leased by project {}", lease.project))?;
        record.lease = Some(LeaseRecord { lease: lease.clone(), vlan });
        record.enter_anew();
        self.store.save(&record, &[Effect::LeaseBegins(lease.clone())], Event::Leased.as_str()).await?;
        Ok(lease)
    }

    async fn end_lease(&self, id: LeaseId) -> Result<NodeStatus, ApiError> {
        let mut record = self.record().await?;
        if record.lease.as_ref().is_none_or(|l| l.lease.id != id) {
            // It ended before: asking twice is asking once.
            return Ok(record.status());
        }
        let ends = vec![Effect::LeaseEnds(id)];
        if record.state == NodeState::Rejected {
            let reason = format!("{}; its lease ended", record.reason);
            self.step(&mut record, Event::LeaseEnded, reason)?;
            record.lease = None;
            self.store.save(&record, &ends, Event::LeaseEnded.as_str()).await?;
            return Ok(record.status());
        }
        // A fence that failed is no reason to keep a lease: closing goes on while the node is being cleaned.
        let mut record = match self.close(record, Event::LeaseEnded, "its lease ended", ends).await {
            Ok(record) | Err((record, HandsError::Switch(_))) => record,
            Err((_, error)) => return Err(error.into()),
        };
        record.lease = None;
        Ok(record.status())
    }

    async fn clear(&self) -> Result<NodeStatus, ApiError> {
        let mut record = self.record().await?;
        self.step(&mut record, Event::Cleared, "cleared by an operator")?;
        let ends = record.lease.take().map(|l| Effect::LeaseEnds(l.lease.id));
        record.enter_anew();
        record.desire(PortIntent::Quarantine);
        self.store.save(&record, ends.as_slice(), Event::Cleared.as_str()).await?;
        Ok(record.status())
    }

    async fn cycle(&self) -> Result<NodeStatus, ApiError> {
        let record = self.record().await?;
        if record.lease.is_none() {
            let detail =
                format!("node {} is under no lease: there is nothing to go through the airlock for", record.name);
            return Err(ApiError::conflict("no-lease", detail));
        }
        crate::node::next(record.state, Event::Cycled)?;
        let reason = "asked to go through the airlock again";
        let record = self.close(record, Event::Cycled, reason, Vec::new()).await.map_err(|(_, error)| error)?;
        Ok(record.status())
    }

    async fn reject(&self, request: RejectRequest) -> Result<NodeStatus, ApiError> {
        let record = self.record().await?;
        // A report on another boot changes nothing; neither does the same report again.
        if record.boot != Some(request.boot) || record.state == NodeState::Rejected {
            return Ok(record.status());
        }
        let reason = clean(&request.reason);
        let record = self.close(record, Event::Refused, &reason, Vec::new()).await.map_err(|(_, error)| error)?;
        Ok(record.status())
    }

    async fn admit(&self, results: &Presented) -> Result<AdmissionAnswer, ApiError> {
        let started = Instant::now();
        let record = self.record().await?;
        let lease = record.lease.as_ref().map(|l| l.lease.clone());
        let lease =
            lease.ok_or_else(|| ApiError::conflict("no-lease", format!("node {} is under no lease", record.name)))?;
        let trusted = self.store.verifier_keys(&lease.project).await?;
        // Also a repeated request must carry results that are good now.
        let agreed = self.agreement.admits(results, &trusted, self.clock.now_seconds());
        let agreed = agreed.map_err(AdmissionRefused::from)?;
        let id = agreed.id();
        if let Some(known) = self.store.admission(id).await? {
            return self.admitted_before(record, known).await;
        }
        let airlocked = Airlocked::of(&record)?;
        let admission = airlocked.check(&agreed)?;
        // The verdict is about what runs now, if nothing was reset since: ask before the port moves.
        if let Some(reason) = reset_seen(&record, &self.read_bmc().await?) {
            self.check_reset(record).await?;
            return Err(ApiError::conflict("node-was-reset", reason));
        }
        let admitted = airlocked.admit(admission)?;
        let mut record = record;
        self.step(&mut record, Event::Admitted, format!("admitted by {id}"))?;
        record.desire(PortIntent::Access { vlan: admitted.vlan() });
        record.admission = Some(admitted.record());
        let effects: Vec<Effect> = admitted.new_record().map(Effect::Admits).into_iter().collect();
        match self.store.save(&record, &effects, Event::Admitted.as_str()).await {
            Ok(()) => {}
            Err(RecordError::Taken { .. }) => {
                let detail =
                    format!("admission {id} was revoked before it was made, or one of its results was used before");
                return Err(ApiError::conflict("admission-ended", detail));
            }
            Err(error @ (RecordError::Database { .. } | RecordError::Corrupt { .. })) => return Err(error.into()),
        }
        fail::fail_point!("isolation::admitted", |_| std::process::abort());
        if let Err(error) = self.move_to_tenant(&record, admitted).await {
            return Err(self.undo_admission(record, error).await);
        }
        fail::fail_point!("isolation::moved", |_| std::process::abort());
        boot_step(Step::PortMoved, &self.name, started.elapsed());
        self.answer(id).await
    }

    /// The same result again: the caller did not hear our answer, or we ended before we gave one.
    async fn admitted_before(&self, record: NodeRecord, known: AdmissionAnswer) -> Result<AdmissionAnswer, ApiError> {
        let standing = Admission::standing(&record, self.clock.now_ms());
        match standing.filter(|admitted| admitted.record().id == known.id) {
            Some(admitted) => {
                if record.nics.iter().any(|nic| nic.observed != Some(nic.desired)) {
                    if let Some(reason) = reset_seen(&record, &self.read_bmc().await?) {
                        self.check_reset(record).await?;
                        return Err(ApiError::conflict("node-was-reset", reason));
                    }
                    let started = Instant::now();
                    self.move_to_tenant(&record, admitted).await?;
                    boot_step(Step::PortMoved, &self.name, started.elapsed());
                }
                Ok(known)
            }
            None => {
                Err(ApiError::conflict("admission-ended", format!("admission {} does not stand any more", known.id))
                    .with_hint("the node must be appraised again"))
            }
        }
    }

    async fn undo_admission(&self, record: NodeRecord, cause: HandsError) -> ApiError {
        let reason = format!("its port could not be moved: {}", chain(&cause));
        if let Err((_, error)) = self.close(record, Event::AdmissionEnded, &reason, Vec::new()).await {
            tracing::error!(event = "admission.undo_failed", node = %self.name, cause = chain(&error));
        }
        ApiError::unavailable("port-not-moved", reason)
    }

    async fn revoke(&self, id: AdmissionId, reason: &str) -> Result<AdmissionAnswer, ApiError> {
        let record = self.record().await?;
        let reason = clean(reason);
        let current = record.admission.as_ref().is_some_and(|a| a.id == id && a.revoked.is_none());
        if record.state == NodeState::Allocated && current {
            self.close(record, Event::AdmissionEnded, &reason, Vec::new()).await.map_err(|(_, error)| error)?;
        } else if record.nics.iter().any(|nic| nic.observed != Some(nic.desired)) {
            // Revoked before, and closing failed then: "revoked" is answered only of a closed port.
            self.fence(&record).await?;
        }
        self.answer(id).await
    }

    async fn remove(&self) -> Result<(), ApiError> {
        let record = self.record().await?;
        if record.state != NodeState::Free {
            let detail = format!("node {} is {}, and only a free one can be removed", record.name, record.state);
            return Err(ApiError::conflict("node-not-free", detail));
        }
        Ok(self.store.remove_node(&self.name).await?)
    }

    async fn answer(&self, id: AdmissionId) -> Result<AdmissionAnswer, ApiError> {
        self.store.admission(id).await?.ok_or_else(|| ApiError::not_found(format!("there is no admission {id}")))
    }
}

/// Words of callers as they may be shown: one line, no control characters, bounded.
fn clean(words: &str) -> String {
    words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect()
}

impl From<RecordError> for ApiError {
    fn from(error: RecordError) -> Self {
        match &error {
            RecordError::Taken { .. } => Self::conflict("exists", &error),
            RecordError::Database { doing, .. } | RecordError::Corrupt { doing, .. } => Self::internal(doing, &error),
        }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        match refused.event {
            Event::Leased => Self::conflict("node-not-free", refused),
            Event::Admitted | Event::Refused | Event::AirlockTimeout | Event::AdmissionEnded | Event::ResetSeen => {
                Self::conflict("not-in-airlock", refused)
            }
            Event::LeaseEnded | Event::Cleaned | Event::Cleared | Event::Cycled => {
                Self::conflict("wrong-state", refused)
            }
        }
    }
}

impl From<AdmissionRefused> for ApiError {
    fn from(refused: AdmissionRefused) -> Self {
        let detail = chain(&refused);
        match refused {
            AdmissionRefused::Disagreement(_) | AdmissionRefused::Other { .. } => {
                Self::forbidden("result-refused", detail)
            }
            AdmissionRefused::NotInAirlock { .. } | AdmissionRefused::NotEntered { .. } => {
                Self::conflict("not-in-airlock", detail)
            }
        }
    }
}

impl From<HandsError> for ApiError {
    fn from(error: HandsError) -> Self {
        match error {
            HandsError::Record(error) => error.into(),
            HandsError::Refused(refused) => refused.into(),
            HandsError::Switch(_) => Self::unavailable("switch", chain(&error)),
            HandsError::Bmc(_) | HandsError::Power { .. } | HandsError::NoResetTime => {
                Self::unavailable("bmc", chain(&error))
            }
            HandsError::Driver(_) => Self::internal("preparing a driver", &error),
            HandsError::Missing(_) => Self::not_found(&error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d8_words_of_callers_are_one_bounded_line() {
        assert_eq!(clean("PCR 4\u{1b}[31m\r\n\0<b>"), "PCR 4 [31m   <b>");
        assert_eq!(clean(&"x".repeat(100_000)).len(), 500);
    }
}
