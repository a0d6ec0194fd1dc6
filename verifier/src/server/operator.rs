//! The operators' and services' API: its routes, and keys and releases. [`identities`], [`policies`] and [`verdicts`]
//! answer the rest.

use super::{Verifier, attestations, db_failed, events, identities, policies, secrets, verdicts};
use crate::release::journal::ReleaseStep;
use crate::store::releases::Release;
use assay_service::auth::{Caller, Role};
use assay_service::error::ApiError;
use assay_wire::id::{AdmissionId, BootId, LeaseId, NodeId, ProjectId};
use axum::extract::State;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The operators' and services' API.
pub fn router(verifier: Arc<Verifier>) -> Router {
    Router::new()
        .route("/v1/key", get(key))
        .route("/v1/policies", get(policies::policies).post(policies::activate_policy))
        .route("/v1/policies/learn", post(policies::learn_policy))
        .route("/v1/policies/try", post(policies::try_policy))
        .route("/v1/policies/{digest}", get(policies::policy))
        .route("/v1/policies/{digest}/approve", post(policies::approve_again))
        .route("/v1/verdicts", get(verdicts::verdicts))
        .route("/v1/verdicts/{node}", get(verdicts::verdict))
        .route("/v1/verdicts/{node}/case", get(verdicts::case))
        .route("/v1/verdicts/{node}/explanation", get(verdicts::explanation))
        .route("/v1/evidence/{id}", get(verdicts::archived))
        .route("/v1/attestations", get(attestations::attestations))
        .route("/v1/attestations/{node}", get(attestations::attestations_of))
        .route("/v1/events", get(events::events))
        .route("/v1/events/stream", get(events::event_stream))
        .route("/v1/leases/{lease}/secret", put(secrets::put_secret).delete(secrets::delete_secret))
        .route("/v1/releases", get(releases))
        .route("/v1/identities", get(identities::identities))
        .route(
            "/v1/identities/{node}",
            get(identities::identity).put(identities::allow_identity).delete(identities::forget_identity),
        )
        .route("/v1/identities/{node}/approve", post(identities::approve_identity))
        .route("/v1/incidents", get(identities::incidents))
        .route("/v1/incidents/{id}/settle", post(identities::settle_incident))
        .with_state(verifier)
}

/// The keys of this verifier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VerifierKeys {
    /// Ed25519 key that signs attestation results, hexadecimal: what a project's `verifier_keys` must hold.
    pub result_key: String,
    /// SHA-256 of the agent API's TLS key (`SubjectPublicKeyInfo`), hexadecimal: what agents pin.
    pub agent_key_sha256: String,
    /// The agent API's URL, as agents' settings must have it.
    pub agent_url: String,
}

/// A release as the journal has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReleaseRecord {
    /// The admission.
    pub admission: AdmissionId,
    /// The node.
    pub node: NodeId,
    /// The project.
    pub project: ProjectId,
    /// The lease.
    pub lease: LeaseId,
    /// The boot.
    pub boot: BootId,
    /// How far it has come.
    pub step: ReleaseStep,
    /// When it came there: milliseconds since the Unix epoch.
    pub step_at_ms: i64,
    /// When it began: milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// When its result expires: milliseconds since the Unix epoch.
    pub result_expires_at_ms: i64,
    /// Why it was undone.
    pub failure: Option<String>,
}

/// The keys that others must trust.
#[utoipa::path(get, path = "/v1/key", tag = "operator", responses((status = 200, body = VerifierKeys)))]
pub(crate) async fn key(State(verifier): State<Arc<Verifier>>, _anybody: Caller) -> Json<VerifierKeys> {
    Json(VerifierKeys {
        result_key: verifier.signer.public().to_string(),
        agent_key_sha256: verifier.agent_key_sha256.clone(),
        agent_url: verifier.agent_url.clone(),
    })
}

/// The latest releases, newest first.
#[utoipa::path(get, path = "/v1/releases", tag = "operator", responses((status = 200, body = Vec<ReleaseRecord>)))]
pub(crate) async fn releases(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
) -> Result<Json<Vec<ReleaseRecord>>, ApiError> {
    let releases = verifier.store.releases().await.map_err(db_failed)?;
    let seen = releases.into_iter().filter(|release| sees(&caller, &release.project));
    Ok(Json(seen.map(ReleaseRecord::from).collect()))
}

impl From<Release> for ReleaseRecord {
    fn from(release: Release) -> Self {
        Self {
            admission: release.admission,
            node: release.node,
            project: release.project,
            lease: release.lease,
            boot: release.boot,
            step: release.step,
            step_at_ms: release.step_at_ms,
            created_at_ms: release.created_at_ms,
            result_expires_at_ms: release.result_expires_at_ms,
            failure: release.failure,
        }
    }
}

/// Whether `caller` may see what is `project`'s.
pub(super) fn sees(caller: &Caller, project: &ProjectId) -> bool {
    match &caller.role {
        Role::Operator | Role::Service => true,
        Role::Project(own) => own == project,
    }
}
