//! The operators' API, policies: approve, list, learn.

use super::extract::JsonBody;
use super::verdicts::{evidence_by_id, last_verdict};
use super::{Verifier, computed, db_failed};
use crate::evidence::{self, Challenge};
use crate::learn;
use crate::policy::{ArtefactReference, Policy};
use crate::quote::AkPublic;
use crate::store::archive::{ArchivedEvidence, EvidenceId};
use crate::store::policies::PolicyRecord;
use assay_service::auth::Caller;
use assay_service::error::{ApiError, chain};
use assay_wire::id::NodeId;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

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
