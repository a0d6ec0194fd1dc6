//! The verifier's two HTTP APIs: [`agent`] for nodes, on listeners of its own with the key that nodes pin, and
//! [`operator`] for people and services.

pub mod agent;
pub mod attest;
pub(crate) mod attestations;
pub(crate) mod enrol;
pub(crate) mod events;
mod extract;
pub mod identities;
mod leaving;
pub mod operator;
pub mod policies;
pub(crate) mod secrets;
pub mod verdicts;

use crate::attestation::Attestations;
use crate::config::{ProjectVerifier, Role, SessionTimes};
use crate::identity::Endorsers;
use crate::identity::binding::EkBinding;
use crate::release::Releases;
use crate::release::peers::Peers;
use crate::release::reports::Reports;
use crate::secret::SecretKey;
use crate::signer::Signer;
use crate::store::attestations::Part;
use crate::store::policies::ActivePolicyError;
use crate::store::{DbError, VerifierStore};
use crate::tee::Collateral;
use assay_service::clock::Clock;
use assay_service::error::{ApiError, chain};
use assay_wire::agent::{AgentSettings, CoVerifier};
use assay_wire::id::{NodeId, ProjectId};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Semaphore;

/// What the handlers work with.
pub struct Verifier {
    /// The database.
    pub store: VerifierStore,
    /// The releases under way.
    pub releases: Releases,
    /// The reporter of bad verdicts.
    pub reports: Reports,
    /// isolation and imaging.
    pub peers: Peers,
    /// Who is believed about EKs. Read anew when the files change.
    pub endorsers: RwLock<Arc<Endorsers>>,
    /// Who binds a node to its first EK.
    pub ek_binding: EkBinding,
    /// What quotes of trusted execution environments are verified with.
    pub tee_collateral: Arc<Collateral>,
    /// Signs good results.
    pub signer: Signer,
    /// Continuous attestation.
    pub attestations: Attestations,
    /// Encrypts tenants' secrets at rest.
    pub secrets: SecretKey,
    /// Whether nodes that are released go on attesting.
    pub continuous: bool,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// How long agents have.
    pub times: SessionTimes,
    /// How long a good result is good for.
    pub result_lifetime: Duration,
    /// What agents' settings must say.
    pub agent_url: String,
    /// The key that agents must have pinned.
    pub agent_key_sha256: String,
    /// Whether a good verdict begins a release.
    pub role: Role,
    /// Other verifiers that agents are sent to.
    pub co_verifiers: Vec<ProjectVerifier>,
    /// Bounds on what is worked on at once.
    pub slots: Slots,
}

/// Bounds on what is worked on at once; beyond them the newest request is told to come again.
#[derive(Debug)]
pub struct Slots {
    /// Enrolments: a call to isolation and a certificate path each.
    enrolments: Semaphore,
    /// Appraisals: megabytes and milliseconds of computing each.
    appraisals: Semaphore,
}

impl Default for Slots {
    fn default() -> Self {
        Self { enrolments: Semaphore::new(64), appraisals: Semaphore::new(8) }
    }
}

impl Verifier {
    /// Who is believed about EKs now.
    #[must_use]
    pub fn endorsers(&self) -> Arc<Endorsers> {
        // A lock that is poisoned still holds one whole value: it is only ever replaced.
        Arc::clone(&self.endorsers.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Believes `endorsers` from now on.
    pub fn set_endorsers(&self, endorsers: Endorsers) {
        *self.endorsers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(endorsers);
    }

    /// What part the attestations of this verifier have.
    #[must_use]
    pub fn part(&self) -> Part {
        match self.role {
            Role::Release => Part::Leads,
            Role::AppraiseOnly => Part::Supports,
        }
    }

    /// The verifiers whose results a project wants beside ours.
    #[must_use]
    pub fn co_verifiers_of(&self, project: &ProjectId) -> Vec<CoVerifier> {
        let theirs = self.co_verifiers.iter().filter(|verifier| verifier.project == *project);
        theirs.map(|verifier| verifier.verifier.clone()).collect()
    }

    /// What this verifier would have told `node`: what must have been measured.
    #[must_use]
    pub fn settings_for(&self, node: &NodeId) -> AgentSettings {
        AgentSettings {
            node: node.clone(),
            verifier: self.agent_url.clone(),
            verifier_key_sha256: self.agent_key_sha256.clone(),
        }
    }
}

/// Answers a failure of the database without its causes.
fn db_failed(error: DbError) -> ApiError {
    ApiError::internal(error.to_string(), &error)
}

/// Nothing is judged by a policy that is not what was approved. No verdict is recorded, so that nodes need not suffer for
/// what was done to a database: they try again, and what they were given expires.
fn policy_refused(error: ActivePolicyError) -> ApiError {
    match error {
        ActivePolicyError::Db(error) => db_failed(error),
        ActivePolicyError::Refused(cause) => {
            let why = chain(&cause);
            tracing::error!(event = "policy.refused", %why, "the active policy is not what was approved: nothing is judged");
            ApiError::unavailable("policy-refused", format!("the active policy is refused: {why}"))
                .with_hint("approve the policy again: assay policy approve FILE --signature FILE.sig")
        }
    }
}

/// Runs `work` where it does not hold up other requests.
async fn computed<T: Send + 'static>(
    doing: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| ApiError::internal(doing, &error))
}
