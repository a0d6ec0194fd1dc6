//! Leases: a project gets a node.

use super::inventory::sees;
use super::{Api, Body, Named};
use crate::commands::Command;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::id::LeaseId;
use assay_wire::isolation::{LeaseRequest, NodeLease, NodeStatus};
use axum::Json;
use axum::extract::State;

/// All live leases; a project's token sees its own.
#[utoipa::path(get, path = "/v1/leases", responses((status = 200, body = Vec<NodeLease>)))]
pub(super) async fn list(caller: Caller, State(api): State<Api>) -> Result<Json<Vec<NodeLease>>, ApiError> {
    let leases = api.store.leases().await?;
    Ok(Json(leases.into_iter().filter(|l| sees(&caller, &l.project)).collect()))
}

/// Leases a free node; it is power-cycled into the airlock. Asking twice with one id is asking once.
#[utoipa::path(post, path = "/v1/leases", request_body = LeaseRequest, responses((status = 200, body = NodeLease)))]
pub(super) async fn ask(
    caller: Caller,
    State(api): State<Api>,
    Body(request): Body<LeaseRequest>,
) -> Result<Json<NodeLease>, ApiError> {
    caller.require_project(&request.project)?;
    let node = request.node.clone();
    api.fleet.ask(&node, |reply| Command::Lease(request, reply)).await.map(Json)
}

/// Ends a lease: the port closes, the node is powered off and becomes free.
#[utoipa::path(delete, path = "/v1/leases/{lease}",
    params(("lease" = String, Path)),
    responses((status = 200, body = NodeStatus)))]
pub(super) async fn end(
    caller: Caller,
    State(api): State<Api>,
    Named(id): Named<LeaseId>,
) -> Result<Json<NodeStatus>, ApiError> {
    let (lease, _ended) =
        api.store.lease(id).await?.ok_or_else(|| ApiError::not_found(format!("there is no lease {id}")))?;
    caller.require_project(&lease.project)?;
    api.fleet.ask(&lease.node, |reply| Command::EndLease(id, reply)).await.map(Json)
}
