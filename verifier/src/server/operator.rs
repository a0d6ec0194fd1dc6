//! The operators' and services' API: keys, policies, verdicts, evidence, releases, identities.

use super::extract::{JsonBody, Named};
use super::{Verifier, computed, db_failed};
use crate::evidence::{self, Challenge};
use crate::learn;
use crate::policy::{ArtefactReference, Policy};
use crate::quote::AkPublic;
use crate::release::journal::ReleaseStep;
use crate::store::archive::{ArchivedEvidence, EvidenceId, VerdictRecord};
use crate::store::identities::{Identity, Incident};
use crate::store::policies::PolicyRecord;
use crate::store::releases::Release;
use assay_service::auth::{Caller, Role};
use assay_service::error::{ApiError, chain};
use assay_wire::id::{AdmissionId, BootId, LeaseId, NodeId, ProjectId};
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The operators' and services' API.
pub fn router(verifier: Arc<Verifier>) -> Router {
    Router::new()
        .route("/v1/key", get(key))
        .route("/v1/policies", get(policies).post(activate_policy))
        .route("/v1/policies/learn", post(learn_policy))
        .route("/v1/verdicts", get(verdicts))
        .route("/v1/verdicts/{node}", get(verdict))
        .route("/v1/evidence/{id}", get(archived))
        .route("/v1/releases", get(releases))
        .route("/v1/identities", get(identities))
        .route("/v1/identities/{node}", get(identity).delete(clear_identity))
        .route("/v1/incidents", get(incidents))
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

/// A policy to approve: `POST /v1/policies`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyRequest {
    /// The name to list it under; without it, the document's own.
    #[serde(default)]
    pub name: Option<String>,
    /// The policy, TOML or JSON.
    pub document: String,
}

/// A policy to draft: `POST /v1/policies/learn`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LearnRequest {
    /// The node whose last evidence shows the firmware.
    pub node: NodeId,
    /// The draft's name; without it, `learnt-from-<node>`.
    #[serde(default)]
    pub name: Option<String>,
    /// `reference-values.json`, as `agent-image` wrote it.
    pub artefacts: serde_json::Value,
}

/// A draft: nothing is active by it. Read it, then `POST /v1/policies`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PolicyDraft {
    /// The policy, TOML.
    pub document: String,
    /// Its digest.
    pub digest: String,
    /// The evidence that it was learnt from.
    pub evidence: EvidenceId,
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

/// All policies that were ever approved.
#[utoipa::path(get, path = "/v1/policies", tag = "operator", responses((status = 200, body = Vec<PolicyRecord>)))]
pub(crate) async fn policies(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
) -> Result<Json<Vec<PolicyRecord>>, ApiError> {
    caller.require_service()?;
    verifier.store.policies().await.map(Json).map_err(db_failed)
}

/// Approves a policy: from now on it judges.
#[utoipa::path(post, path = "/v1/policies", tag = "operator", request_body = PolicyRequest, responses(
    (status = 200, body = PolicyRecord),
    (status = 400, description = "not a valid policy", body = assay_wire::problem::Problem),
))]
pub(crate) async fn activate_policy(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    JsonBody(request): JsonBody<PolicyRequest>,
) -> Result<Json<PolicyRecord>, ApiError> {
    caller.require_operator()?;
    let policy = Policy::parse(&request.document)
        .map_err(|error| ApiError::bad_request("invalid-policy", format!("reading the policy: {}", chain(&error))))?;
    let record = PolicyRecord {
        name: request.name.unwrap_or_else(|| policy.name().to_owned()),
        digest: policy.digest().to_string(),
        document: request.document,
        added_by: caller.name,
        added_at_ms: verifier.clock.now_ms(),
        active: true,
    };
    verifier.store.activate_policy(&record).await.map_err(db_failed)?;
    tracing::info!(
        event = "policy.activated",
        name = record.name,
        digest = record.digest,
        by = record.added_by,
        "policy is active"
    );
    Ok(Json(record))
}

/// Drafts a policy from a node's last evidence and the artefacts' Reference Values.
#[utoipa::path(post, path = "/v1/policies/learn", tag = "operator", request_body = LearnRequest, responses(
    (status = 200, body = PolicyDraft),
    (status = 409, description = "the evidence cannot be learnt from", body = assay_wire::problem::Problem),
))]
pub(crate) async fn learn_policy(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    JsonBody(request): JsonBody<LearnRequest>,
) -> Result<Json<PolicyDraft>, ApiError> {
    caller.require_operator()?;
    let artefacts = ArtefactReference::from_json(&request.artefacts.to_string()).map_err(|error| {
        ApiError::bad_request(
            "invalid-artefacts",
            format!("reading the artefacts' Reference Values: {}", chain(&error)),
        )
    })?;
    let last = last_verdict(&verifier, &request.node).await?;
    let archived = evidence_by_id(&verifier, last.evidence).await?;
    let name = request.name.unwrap_or_else(|| format!("learnt-from-{}", request.node));
    let drafted = computed("learning a policy", move || draft(&name, &archived, &artefacts)).await?;
    let policy = drafted.map_err(|why| {
        ApiError::conflict(
            "not-learnable",
            format!("learning from the last evidence of node `{}`: {why}", request.node),
        )
    })?;
    Ok(Json(PolicyDraft { document: policy.to_toml(), digest: policy.digest().to_string(), evidence: last.evidence }))
}

/// The latest verdict of every node that the caller may see.
#[utoipa::path(get, path = "/v1/verdicts", tag = "operator", responses((status = 200, body = Vec<VerdictRecord>)))]
pub(crate) async fn verdicts(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
) -> Result<Json<Vec<VerdictRecord>>, ApiError> {
    let mut verdicts = verifier.store.latest_verdicts().await.map_err(db_failed)?;
    verdicts.retain(|verdict| sees(&caller, &verdict.project));
    Ok(Json(verdicts))
}

/// The latest verdict of one node.
#[utoipa::path(get, path = "/v1/verdicts/{node}", tag = "operator", params(("node" = String, Path, description = "node")),
    responses((status = 200, body = VerdictRecord), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn verdict(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
) -> Result<Json<VerdictRecord>, ApiError> {
    let verdict = last_verdict(&verifier, &node).await?;
    // A verdict of another project is answered like none, so that nobody learns who leases what.
    if sees(&caller, &verdict.project) { Ok(Json(verdict)) } else { Err(no_verdict(&node)) }
}

/// Archived evidence.
#[utoipa::path(get, path = "/v1/evidence/{id}", tag = "operator", params(("id" = String, Path, description = "evidence")),
    responses((status = 200, body = ArchivedEvidence), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn archived(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(id): Named<EvidenceId>,
) -> Result<Json<ArchivedEvidence>, ApiError> {
    let archived = evidence_by_id(&verifier, id).await?;
    if sees(&caller, &archived.verdict.project) { Ok(Json(archived)) } else { Err(no_evidence(id)) }
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

/// Which node has which EK.
#[utoipa::path(get, path = "/v1/identities", tag = "operator", responses((status = 200, body = Vec<Identity>)))]
pub(crate) async fn identities(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
) -> Result<Json<Vec<Identity>>, ApiError> {
    caller.require_service()?;
    verifier.store.identities().await.map(Json).map_err(db_failed)
}

/// One node's EK.
#[utoipa::path(get, path = "/v1/identities/{node}", tag = "operator",
    params(("node" = String, Path, description = "node")),
    responses((status = 200, body = Identity), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn identity(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
) -> Result<Json<Identity>, ApiError> {
    caller.require_service()?;
    let known = verifier.store.identities().await.map_err(db_failed)?;
    known.into_iter().find(|identity| identity.node == node).map(Json).ok_or_else(|| no_identity(&node))
}

/// Forgets a node's EK: its next enrolment binds it anew.
#[utoipa::path(delete, path = "/v1/identities/{node}", tag = "operator",
    params(("node" = String, Path, description = "node")),
    responses((status = 200), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn clear_identity(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
) -> Result<Json<()>, ApiError> {
    caller.require_operator()?;
    if !verifier.store.clear_identity(&node).await.map_err(db_failed)? {
        return Err(no_identity(&node));
    }
    tracing::info!(event = "identity.cleared", %node, by = caller.name, "identity cleared");
    Ok(Json(()))
}

/// What an operator should look at, newest first.
#[utoipa::path(get, path = "/v1/incidents", tag = "operator", responses((status = 200, body = Vec<Incident>)))]
pub(crate) async fn incidents(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
) -> Result<Json<Vec<Incident>>, ApiError> {
    caller.require_service()?;
    verifier.store.incidents().await.map(Json).map_err(db_failed)
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

/// Verifies archived evidence again and learns from it. Its verdict does not matter: the first boot of a new model is
/// refused for want of a policy, and is what the policy is learnt from.
fn draft(name: &str, archived: &ArchivedEvidence, artefacts: &ArtefactReference) -> Result<Policy, String> {
    let ak = archived.ak_public_bytes().map_err(|error| chain(&error))?;
    let ak = AkPublic::parse(&ak).map_err(|error| chain(&error))?;
    let nonce = archived.nonce_value().map_err(|error| chain(&error))?;
    let challenge = Challenge { ak: &ak, nonce: nonce.as_bytes(), last_clock: None };
    let replayed = evidence::verify(&archived.evidence, &challenge).map_err(|error| error.reasons().join("; "))?;
    let learned_from = format!("node {} evidence {}", archived.verdict.node, archived.verdict.evidence);
    learn::learn(name, &learned_from, &replayed, artefacts).map_err(|error| error.reasons().join("; "))
}

async fn last_verdict(verifier: &Verifier, node: &NodeId) -> Result<VerdictRecord, ApiError> {
    verifier.store.latest_verdict(node).await.map_err(db_failed)?.ok_or_else(|| no_verdict(node))
}

async fn evidence_by_id(verifier: &Verifier, id: EvidenceId) -> Result<ArchivedEvidence, ApiError> {
    verifier.store.evidence(id).await.map_err(db_failed)?.ok_or_else(|| no_evidence(id))
}

fn sees(caller: &Caller, project: &ProjectId) -> bool {
    match &caller.role {
        Role::Operator | Role::Service => true,
        Role::Project(own) => own == project,
    }
}

fn no_verdict(node: &NodeId) -> ApiError {
    ApiError::not_found(format!("node `{node}` has no verdict"))
        .with_hint("it gets one when it boots through the airlock")
}

fn no_evidence(id: EvidenceId) -> ApiError {
    ApiError::not_found(format!("there is no evidence {id}; the oldest of each node is dropped"))
}

fn no_identity(node: &NodeId) -> ApiError {
    ApiError::not_found(format!("node `{node}` is bound to no EK"))
}
