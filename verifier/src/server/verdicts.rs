//! The operators' API, verdicts and the evidence that they are on.

use super::extract::Named;
use super::operator::sees;
use super::{Verifier, computed, db_failed};
use crate::reappraisal::{CASE_FORMAT, CaseContext, CaseFile, Explanation, explain};
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

/// Why a node's latest verdict is what it is: which event, what was expected, who approved that, since when.
#[utoipa::path(get, path = "/v1/verdicts/{node}/explanation", tag = "operator",
    params(("node" = String, Path, description = "node")),
    responses((status = 200, body = Explanation), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn explanation(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
) -> Result<Json<Explanation>, ApiError> {
    let case = case_of(&verifier, &caller, &node).await?;
    computed("explaining a verdict", move || explain(&case)).await?.map(Json).map_err(db_failed)
}

/// A node's latest verdict with all that it depended on: to reach it again offline.
#[utoipa::path(get, path = "/v1/verdicts/{node}/case", tag = "operator",
    params(("node" = String, Path, description = "node")),
    responses((status = 200, body = CaseFile), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn case(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
) -> Result<Json<CaseFile>, ApiError> {
    case_of(&verifier, &caller, &node).await.map(Json)
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

async fn case_of(verifier: &Verifier, caller: &Caller, node: &NodeId) -> Result<CaseFile, ApiError> {
    let last = last_verdict(verifier, node).await?;
    if !sees(caller, &last.project) {
        return Err(no_verdict(node));
    }
    let archived = evidence_by_id(verifier, last.evidence).await?;
    case_with(verifier, archived).await
}

/// Archived evidence with all that the verdict on it depended on.
pub(super) async fn case_with(verifier: &Verifier, archived: ArchivedEvidence) -> Result<CaseFile, ApiError> {
    let (mut policy, mut approvals) = (None, Vec::new());
    if let Some(digest) = &archived.verdict.policy {
        policy = verifier.store.policy(digest).await.map_err(db_failed)?;
        approvals = verifier.store.approvals(digest).await.map_err(db_failed)?;
    }
    let context = context_of(verifier, &archived);
    let named = context.tee_collateral.as_deref().unwrap_or_default();
    let tee_collateral = verifier.store.collateral(named).await.map_err(db_failed)?;
    Ok(CaseFile { format: CASE_FORMAT.to_owned(), archived, context, policy, approvals, tee_collateral })
}

/// What the verdict depended on; for evidence of before that was kept, the settings of now and nothing else.
fn context_of(verifier: &Verifier, archived: &ArchivedEvidence) -> CaseContext {
    archived.context.clone().unwrap_or_else(|| CaseContext {
        settings: verifier.settings_for(&archived.verdict.node),
        last_clock: None,
        now_seconds: archived.verdict.received_at_ms.div_euclid(1000),
        boot: None,
        tee_collateral: None,
    })
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
