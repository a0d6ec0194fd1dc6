//! Continuous attestation: an admission stands while good evidence comes, and no longer. After the release, the agent in
//! the tenant's operating system pushes a quote at every interval; the verifier renews the admission with a result that
//! lives for three of them.
//!
//! ```text
//!                     good evidence: isolation and imaging get a fresh result
//!                         ┌────┐
//!  good verdict ──▶ Standing ◀─┘
//!                     │   bad evidence · silence · isolation says that it is over
//!                     ▼
//!                  Ending ──── isolation and imaging both know ────▶ Ended
//! ```
//!
//! * **Standing**: on record since the verdict; evidence counts from the hand-over on. Nothing has to happen for it to
//!   end: a result that is not renewed expires at isolation and at imaging by itself.
//! * **Ending**: the port is being fenced and the disk cut, both at once and before anything is written; then it is
//!   written, with a notice to the project's other nodes and an event. A verifier that dies here is followed by the next.
//! * **Ended**: for good. No evidence brings an admission back.
//!
//! A project's own verifier (`role = "appraise-only"`) does the same with an attestation that only supports one that
//! another verifier leads ([`Part::Supports`]): its fresh results go back to the agent, who hands them to the leading
//! verifier. It may not end an admission; of bad evidence it tells isolation, and of silence nobody.
//!
//! | deciding, pure | doing |
//! |---|---|
//! | [`appraise`]: is this still the node that was admitted? [`crate::ima`]: does the list explain PCR 10? | [`endings`]: cutting off |
//! | [`register`]: who may push, which nonce is out | [`pushes`], [`renewals`]: recording and passing on, in batches |
//! | | [`sweep`]: silence |

pub mod appraise;
pub mod endings;
pub mod pushes;
pub mod register;
pub mod renewals;
pub mod sweep;

use crate::policy::Policy;
use crate::release::peers::Peers;
use crate::store::VerifierStore;
#[cfg(doc)]
use crate::store::attestations::Part;
use crate::store::attestations::{Ending, TPM_SUBMOD};
use crate::store::policies::ActivePolicyError;
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_wire::id::AdmissionId;
use assay_wire::result::Claims;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use endings::Endings;
use pushes::Pushes;
use register::{Attested, Progress, Register};
use renewals::Renewals;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::task::TaskTracker;

/// How often evidence comes, and how long it is good for. Milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttestationTimes {
    /// From one push to the next.
    pub interval_ms: i64,
    /// How long a renewed result, and a nonce, live.
    pub silence_ms: i64,
}

impl AttestationTimes {
    /// How late evidence may be before somebody is told.
    #[must_use]
    pub fn overdue_ms(&self) -> i64 {
        self.silence_ms.saturating_sub(self.interval_ms) / 2
    }
}

/// The continuous attestation of one verifier.
#[derive(Debug, Clone)]
pub struct Attestations {
    /// Who may push, and what was seen last.
    pub register: Arc<Register>,
    /// Records pushes.
    pub pushes: Pushes,
    /// Passes renewed results on.
    pub renewals: Renewals,
    /// Cuts off.
    pub endings: Endings,
    /// How often, and for how long.
    pub times: AttestationTimes,
    policy: Arc<Mutex<Option<ReadPolicy>>>,
}

#[derive(Debug)]
struct ReadPolicy {
    read_at_ms: i64,
    policy: Option<Arc<Policy>>,
}

impl Attestations {
    /// Starts the tasks that record, pass on, cut off and watch for silence.
    #[must_use]
    pub fn start(
        store: &VerifierStore,
        peers: &Peers,
        clock: &Arc<dyn Clock>,
        times: AttestationTimes,
        shutdown: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Self {
        let register = Arc::new(Register::new(MOST_REGISTERED));
        let pushes = Pushes::start(store.clone(), shutdown.clone(), tasks);
        let renewals = Renewals::start(peers, clock, &register, shutdown, tasks);
        let endings = Endings::new(
            store.clone(),
            peers.clone(),
            Arc::clone(clock),
            Arc::clone(&register),
            renewals.clone(),
            shutdown.clone(),
            tasks.clone(),
        );
        sweep::start(store.clone(), endings.clone(), Arc::clone(clock), times, shutdown.clone(), tasks);
        Self { register, pushes, renewals, endings, times, policy: Arc::default() }
    }

    /// The policy that judges now, at most a second old: thousands of pushes a second need not ask for it each.
    ///
    /// # Errors
    /// The database failed, or holds something else than what was approved. What was read before judges nobody then.
    pub async fn policy(&self, store: &VerifierStore, now_ms: i64) -> Result<Option<Arc<Policy>>, ActivePolicyError> {
        {
            let read = self.policy.lock().unwrap_or_else(PoisonError::into_inner);
            // A clock that went back makes the copy old, too.
            let fresh =
                read.as_ref().filter(|read| (0..POLICY_READ_MS).contains(&now_ms.saturating_sub(read.read_at_ms)));
            if let Some(read) = fresh {
                return Ok(read.policy.clone());
            }
        }
        let policy = store.active_policy().await?;
        let read = ReadPolicy { read_at_ms: now_ms, policy: policy.clone() };
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner) = Some(read);
        Ok(policy)
    }
}

/// The claims that renew an admission: what admitted it, with a new life.
#[must_use]
pub fn renewed_claims(attested: &Attested, progress: &Progress, nonce: &[u8; 32], now_seconds: i64) -> Claims {
    Claims {
        iat: now_seconds,
        exp: progress.expires_at_ms.div_euclid(1000),
        jti: AdmissionId::random(),
        eat_nonce: URL_SAFE_NO_PAD.encode(nonce),
        submods: BTreeMap::from([(TPM_SUBMOD.to_owned(), progress.submod.clone())]),
        renews: Some(attested.admission),
        reset_count: progress.seen.clock.reset_count,
        restart_count: progress.seen.clock.restart_count,
        ..attested.claims.clone()
    }
}

/// The end of an attested admission.
#[must_use]
pub fn ending(attested: &Attested, kind: crate::store::events::EventKind, reasons: Vec<String>) -> Ending {
    Ending {
        admission: attested.admission,
        node: attested.node.clone(),
        project: attested.project.clone(),
        boot: attested.claims.boot,
        ak_name: attested.claims.ak_name.clone(),
        part: attested.part,
        kind,
        reasons,
    }
}

/// Admissions in memory: about 4 KiB each.
const MOST_REGISTERED: usize = 32_768;
const POLICY_READ_MS: i64 = 1_000;

#[cfg(test)]
mod tests;
