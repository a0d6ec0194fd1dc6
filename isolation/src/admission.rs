//! Admission: the one way from an attestation result to a tenant's network (boot path step 8).
//!
//! [`Admission`] has private fields and two makers, both here: [`Airlocked::check`], which takes results that were
//! verified and agree ([`Agreed`]), and [`Admission::standing`], which takes up one that this service verified and recorded earlier. A port is opened
//! with an [`Admitted`], by value; an [`Airlocked`] node has no way to its tenant's network, so that bug does not
//! compile.

use crate::record::{AdmissionRecord, Entry, NewAdmission, NodeRecord};
use assay_wire::agreement::{Agreed, Disagreement, Subject};
use assay_wire::id::{AdmissionId, BootId, LeaseId, NodeId, ProjectId};
use assay_wire::isolation::{AirlockContext, NodeState};
use assay_wire::net::VlanId;

/// A node in the airlock, powered on there: the only one that can be admitted.
#[derive(Debug)]
pub struct Airlocked {
    node: NodeId,
    project: ProjectId,
    lease: LeaseId,
    boot: BootId,
    machine_resets: u64,
    vlan: VlanId,
}

/// Proof that a trusted verifier affirmed this node, for this lease, in this boot.
#[derive(Debug)]
pub struct Admission {
    id: AdmissionId,
    node: NodeId,
    lease: LeaseId,
    boot: BootId,
    ak_name: String,
    expires_at_ms: i64,
    made_of: Option<MadeOf>,
}

/// What a new admission was made of; one that is taken up again has it on record.
#[derive(Debug)]
struct MadeOf {
    subject: Subject,
    supporting: Vec<AdmissionId>,
}

/// A node with its admission: what opens a port.
#[derive(Debug)]
pub struct Admitted {
    admission: Admission,
    vlan: VlanId,
}

/// Why a result does not admit a node.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionRefused {
    /// The results are not accepted, or do not agree, or not all who must agree have.
    #[error(transparent)]
    Disagreement(#[from] Disagreement),
    /// The result is about something else than what it would be used for.
    #[error("the attestation result is for {what} {said}, not {expected}")]
    Other {
        /// Which claim.
        what: &'static str,
        /// Its value.
        said: String,
        /// What is on record.
        expected: String,
    },
    /// The node is not where results matter.
    #[error("node {node} is {state}, not in the airlock")]
    NotInAirlock {
        /// The node.
        node: NodeId,
        /// Where it stands.
        state: NodeState,
    },
    /// It is on its way into the airlock: whatever was appraised, it was not this boot.
    #[error("node {node} is still being powered on in the airlock")]
    NotEntered {
        /// The node.
        node: NodeId,
    },
}

impl Airlocked {
    /// The node as it stands in the record.
    ///
    /// # Errors
    /// It is not in the airlock, or not powered on there yet.
    pub fn of(record: &NodeRecord) -> Result<Self, AdmissionRefused> {
        let node = || record.name.clone();
        let (NodeState::Airlock, Some(lease)) = (record.state, &record.lease) else {
            return Err(AdmissionRefused::NotInAirlock { node: node(), state: record.state });
        };
        let (Entry::Done, Some(boot)) = (record.entry, record.boot) else {
            return Err(AdmissionRefused::NotEntered { node: node() });
        };
        let (project, machine_resets) = (lease.lease.project.clone(), record.machine_resets);
        Ok(Self { node: node(), project, lease: lease.lease.id, boot, machine_resets, vlan: lease.vlan })
    }

    /// What a verifier must know before it appraises the node.
    #[must_use]
    pub fn context(&self) -> AirlockContext {
        AirlockContext {
            lease: self.lease,
            project: self.project.clone(),
            boot: self.boot,
            machine_resets: Some(self.machine_resets),
        }
    }

    /// That verified results are about this node, lease and boot.
    ///
    /// # Errors
    /// See [`AdmissionRefused`].
    pub fn check(&self, agreed: &Agreed) -> Result<Admission, AdmissionRefused> {
        let claims = agreed.claims();
        same("node", &claims.node, &self.node)?;
        same("project", &claims.project, &self.project)?;
        same("lease", &claims.lease, &self.lease)?;
        same("boot", &claims.boot, &self.boot)?;
        Ok(Admission::of(agreed))
    }

    /// The node leaves the airlock. Consumes the admission: it opens one port, once.
    ///
    /// # Errors
    /// The admission is of another node or boot.
    pub fn admit(self, admission: Admission) -> Result<Admitted, AdmissionRefused> {
        same("node", &admission.node, &self.node)?;
        same("boot", &admission.boot, &self.boot)?;
        Ok(Admitted { admission, vlan: self.vlan })
    }
}

impl Admission {
    fn of(agreed: &Agreed) -> Self {
        let claims = agreed.claims();
        Self {
            id: claims.jti,
            node: claims.node.clone(),
            lease: claims.lease,
            boot: claims.boot,
            ak_name: claims.ak_name.clone(),
            expires_at_ms: agreed.expires_at_ms(),
            made_of: Some(MadeOf { subject: agreed.subject(), supporting: agreed.supporting().to_vec() }),
        }
    }

    /// Takes up the admission under which an Allocated node's port is open, after a restart or when drift is mended.
    /// None unless it stands: on record for this node, lease and boot, not revoked, not expired.
    #[must_use]
    pub fn standing(record: &NodeRecord, now_ms: i64) -> Option<Admitted> {
        let lease = record.lease.as_ref()?;
        let admission = record.admission.as_ref()?;
        let stands = record.state == NodeState::Allocated
            && admission.revoked.is_none()
            && admission.expires_at_ms > now_ms
            && admission.lease == lease.lease.id
            && Some(admission.boot) == record.boot;
        stands.then(|| Admitted {
            admission: Self {
                id: admission.id,
                node: record.name.clone(),
                lease: admission.lease,
                boot: admission.boot,
                ak_name: admission.ak_name.clone(),
                expires_at_ms: admission.expires_at_ms,
                made_of: None,
            },
            vlan: lease.vlan,
        })
    }

    /// The result's id.
    #[must_use]
    pub fn id(&self) -> AdmissionId {
        self.id
    }
}

impl Admitted {
    /// The VLAN of the lease's network.
    #[must_use]
    pub fn vlan(&self) -> VlanId {
        self.vlan
    }

    /// As it is on record.
    #[must_use]
    pub fn record(&self) -> AdmissionRecord {
        let Admission { id, node: _, lease, boot, ref ak_name, expires_at_ms, made_of: _ } = self.admission;
        AdmissionRecord { id, lease, boot, ak_name: ak_name.clone(), expires_at_ms, revoked: None }
    }

    /// What goes on record, in the same transaction as the state; none of an admission that is there already.
    #[must_use]
    pub fn new_record(&self) -> Option<NewAdmission> {
        let MadeOf { subject, supporting } = self.admission.made_of.as_ref()?;
        Some(NewAdmission { record: self.record(), subject: subject.clone(), supporting: supporting.clone() })
    }
}

fn same<T: PartialEq + ToString>(what: &'static str, said: &T, expected: &T) -> Result<(), AdmissionRefused> {
    if said == expected {
        return Ok(());
    }
    Err(AdmissionRefused::Other { what, said: said.to_string(), expected: expected.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::LeaseRecord;
    use assay_wire::agreement::{Agreement, Presented};
    use assay_wire::isolation::NodeLease;
    use assay_wire::result::{Claims, EAR_PROFILE, EarStatus, SignedResult, Submod, VerifierId, VerifierKey};
    use ring::rand::SystemRandom;
    use ring::signature::Ed25519KeyPair;
    use std::collections::BTreeMap;

    fn record(state: NodeState, entry: Entry) -> NodeRecord {
        let node: NodeId = "n1".parse().unwrap();
        let lease = NodeLease {
            id: LeaseId::random(),
            project: "alpha".parse().unwrap(),
            node: node.clone(),
            network: "net-a".parse().unwrap(),
        };
        NodeRecord {
            name: node,
            state,
            reason: String::new(),
            since_ms: 0,
            boot: Some(BootId::random()),
            entry,
            entered_ms: 0,
            reset_time: Some("r".into()),
            machine_resets: 1,
            nics: Vec::new(),
            lease: Some(LeaseRecord { lease, vlan: VlanId::try_from(120).unwrap() }),
            admission: None,
        }
    }

    fn admission_of(airlocked: &Airlocked) -> Admission {
        Admission {
            id: AdmissionId::random(),
            node: airlocked.node.clone(),
            lease: airlocked.lease,
            boot: airlocked.boot,
            ak_name: String::new(),
            expires_at_ms: 1000,
            made_of: None,
        }
    }

    #[test]
    fn d1_only_a_node_that_is_on_in_the_airlock_can_be_admitted() {
        for state in NodeState::ALL {
            for entry in [Entry::Pending, Entry::Done] {
                let airlocked = Airlocked::of(&record(state, entry));
                assert_eq!(airlocked.is_ok(), state == NodeState::Airlock && entry == Entry::Done, "{state} {entry:?}");
            }
        }
        let mut unleased = record(NodeState::Airlock, Entry::Done);
        unleased.lease = None;
        assert!(Airlocked::of(&unleased).is_err());
    }

    type SpoilClaims = fn(&mut Claims);
    type SpoilRecord = fn(&mut NodeRecord);

    /// A result about `airlocked`, but for what `spoil` does to it, as it is after its signature was checked.
    fn agreed(airlocked: &Airlocked, spoil: impl FnOnce(&mut Claims)) -> Agreed {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
        let submod = Submod { status: EarStatus::Affirming, policy: String::new(), rules: BTreeMap::new() };
        let mut claims = Claims {
            eat_profile: EAR_PROFILE.into(),
            iat: 1000,
            exp: 2000,
            jti: AdmissionId::random(),
            verifier_id: VerifierId { developer: "assay".into(), build: "test".into() },
            eat_nonce: String::new(),
            submods: BTreeMap::from([("tpm".into(), submod)]),
            node: airlocked.node.clone(),
            project: airlocked.project.clone(),
            lease: airlocked.lease,
            boot: airlocked.boot,
            ek_public: String::new(),
            // SHA-256 of nothing: nobody seals to this EK.
            ek_sha256: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855".into(),
            ak_name: String::new(),
            renews: None,
            reset_count: 1,
            restart_count: 0,
        };
        spoil(&mut claims);
        let presented = Presented { lead: SignedResult::sign(&claims, &key), supporting: Vec::new() };
        Agreement::default().admits(&presented, &[VerifierKey::of(&key)], 1500).unwrap()
    }

    /// What isolation told the verifier, and what it has on record when the result comes: if they differ, the record counts.
    #[test]
    fn d1_d2_a_result_about_another_node_project_lease_or_boot_is_no_admission() {
        let airlocked = Airlocked::of(&record(NodeState::Airlock, Entry::Done)).unwrap();
        assert_eq!(airlocked.check(&agreed(&airlocked, |_| {})).unwrap().boot, airlocked.boot);
        let spoilers: [(&str, SpoilClaims); 4] = [
            ("node", |claims| claims.node = "n2".parse().unwrap()),
            ("project", |claims| claims.project = "beta".parse().unwrap()),
            ("lease", |claims| claims.lease = LeaseId::random()),
            ("boot", |claims| claims.boot = BootId::random()),
        ];
        for (wrong, spoil) in spoilers {
            let refused = airlocked.check(&agreed(&airlocked, spoil)).unwrap_err();
            assert!(matches!(refused, AdmissionRefused::Other { what, .. } if what == wrong), "{wrong}: {refused}");
        }
    }

    #[test]
    fn d1_an_admission_opens_the_port_of_its_own_node_and_boot_only() {
        let mine = record(NodeState::Airlock, Entry::Done);
        let spoilers: [(&str, SpoilRecord); 2] =
            [("node", |it| it.name = "n2".parse().unwrap()), ("boot", |it| it.boot = Some(BootId::random()))];
        for (wrong, spoil) in spoilers {
            let admission = admission_of(&Airlocked::of(&mine).unwrap());
            let mut other = mine.clone();
            spoil(&mut other);
            let refused = Airlocked::of(&other).unwrap().admit(admission).unwrap_err();
            assert!(matches!(refused, AdmissionRefused::Other { what, .. } if what == wrong), "{wrong}: {refused}");
        }
        let airlocked = Airlocked::of(&mine).unwrap();
        let admission = admission_of(&airlocked);
        assert_eq!(airlocked.admit(admission).unwrap().vlan().get(), 120);
    }

    #[test]
    fn d1_d3_d4_a_recorded_admission_stands_until_it_expires_is_revoked_or_is_of_another_boot() {
        let mut node = record(NodeState::Airlock, Entry::Done);
        let airlocked = Airlocked::of(&node).unwrap();
        let admission = admission_of(&airlocked);
        let recorded = airlocked.admit(admission).unwrap().record();
        node.state = NodeState::Allocated;
        node.admission = Some(recorded.clone());
        assert_eq!(Admission::standing(&node, 999).unwrap().record(), recorded);
        assert!(Admission::standing(&node, 1000).is_none());
        for spoil in [
            |n: &mut NodeRecord| n.boot = Some(BootId::random()),
            |n: &mut NodeRecord| n.lease = None,
            |n: &mut NodeRecord| n.state = NodeState::Airlock,
            |n: &mut NodeRecord| n.admission = None,
            |n: &mut NodeRecord| n.admission.as_mut().unwrap().revoked = Some("bad".into()),
            |n: &mut NodeRecord| n.admission.as_mut().unwrap().lease = LeaseId::random(),
        ] {
            let mut spoiled = node.clone();
            spoil(&mut spoiled);
            assert!(Admission::standing(&spoiled, 999).is_none(), "{spoiled:?}");
        }
    }
}
