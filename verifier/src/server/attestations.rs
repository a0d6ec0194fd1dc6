//! The operators' API, continuous attestation: which nodes go on proving themselves, and since when not.

use super::extract::Named;
use super::operator::sees;
use super::{Verifier, db_failed};
use crate::store::attestations::AttestationRecord;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::id::NodeId;
use axum::Json;
use axum::extract::State;
use std::sync::Arc;

/// The latest attestation of every node that the caller may see.
#[utoipa::path(get, path = "/v1/attestations", tag = "operator", responses((status = 200, body = Vec<AttestationRecord>)))]
pub(crate) async fn attestations(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
) -> Result<Json<Vec<AttestationRecord>>, ApiError> {
    let mut records = verifier.store.attestations().await.map_err(db_failed)?;
    records.retain(|record| sees(&caller, &record.project));
    Ok(Json(records))
}

/// The attestations of one node, newest first.
#[utoipa::path(get, path = "/v1/attestations/{node}", tag = "operator",
    params(("node" = String, Path, description = "node")),
    responses((status = 200, body = Vec<AttestationRecord>), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn attestations_of(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
) -> Result<Json<Vec<AttestationRecord>>, ApiError> {
    let mut records = verifier.store.attestations_of(&node).await.map_err(db_failed)?;
    records.retain(|record| sees(&caller, &record.project));
    if records.is_empty() {
        return Err(ApiError::not_found(format!("node `{node}` is not attested")).with_hint(
            "attestation begins when it is released, unless the verifier's configuration says `continuous = \"off\"`",
        ));
    }
    Ok(Json(records))
}
