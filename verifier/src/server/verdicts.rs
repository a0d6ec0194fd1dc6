//! The operators' API, verdicts and the evidence that they are on.

use super::extract::Named;
use super::operator::sees;
use super::{Verifier, db_failed};
use crate::store::archive::{ArchivedEvidence, EvidenceId, VerdictRecord};
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::id::NodeId;
use axum::Json;
use axum::extract::State;
use std::sync::Arc;

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

pub(super) async fn last_verdict(verifier: &Verifier, node: &NodeId) -> Result<VerdictRecord, ApiError> {
    verifier.store.latest_verdict(node).await.map_err(db_failed)?.ok_or_else(|| no_verdict(node))
}

pub(super) async fn evidence_by_id(verifier: &Verifier, id: EvidenceId) -> Result<ArchivedEvidence, ApiError> {
    verifier.store.evidence(id).await.map_err(db_failed)?.ok_or_else(|| no_evidence(id))
}

fn no_verdict(node: &NodeId) -> ApiError {
    ApiError::not_found(format!("node `{node}` has no verdict"))
        .with_hint("it gets one when it boots through the airlock")
}

fn no_evidence(id: EvidenceId) -> ApiError {
    ApiError::not_found(format!("there is no evidence {id}; the oldest of each node is dropped"))
}
