//! The operators' API on identities: which node has which EK, and the incidents that an operator settles.

use super::extract::{JsonBody, Named};
use super::{Verifier, db_failed};
use crate::identity::EkDigest;
use crate::identity::binding::{Identity, IncidentKind, Settlement};
use crate::store::identities::Allowed;
use crate::store::incidents::{Incident, IncidentId, Settled};
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::id::NodeId;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// An operator's word that an EK is a node's: `PUT /v1/identities/{node}`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AllowRequest {
    /// SHA-256 of the EK's DER `SubjectPublicKeyInfo`, hexadecimal.
    pub ek_sha256: String,
}

/// An operator's approval of the first EK that a node came with: `POST /v1/identities/{node}/approve`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ApproveRequest {
    /// Which EK, if the node came with several.
    #[serde(default)]
    pub ek_sha256: Option<String>,
}

/// An operator's decision: `POST /v1/incidents/{id}/settle`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SettleRequest {
    /// What it is.
    pub settlement: Settlement,
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

/// Says beforehand which EK a node has, and vouches for it: it needs no certificate.
#[utoipa::path(put, path = "/v1/identities/{node}", tag = "operator", request_body = AllowRequest,
    params(("node" = String, Path, description = "node")), responses(
    (status = 200, body = Identity),
    (status = 409, description = "node or EK are on record otherwise", body = assay_wire::problem::Problem),
))]
pub(crate) async fn allow_identity(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
    JsonBody(request): JsonBody<AllowRequest>,
) -> Result<Json<Identity>, ApiError> {
    caller.require_operator()?;
    let ek = digest(&request.ek_sha256)?;
    let now_ms = verifier.clock.now_ms();
    match verifier.store.allow_identity(&node, &ek, &caller.name, now_ms).await.map_err(db_failed)? {
        Allowed::Done(identity) => {
            tracing::info!(event = "identity.allowed", %node, %ek, by = caller.name, "EK allowed");
            Ok(Json(identity))
        }
        Allowed::Taken(other) => {
            let detail = format!("allowing EK {ek}: node `{}` is on record with EK {}", other.node, other.ek_sha256);
            Err(ApiError::conflict("identity-taken", detail)
                .with_hint(format!("if that is over: `assay identity forget {}`", other.node)))
        }
    }
}

/// Approves the first EK that a node came with: settles its incident.
#[utoipa::path(post, path = "/v1/identities/{node}/approve", tag = "operator", request_body = ApproveRequest,
    params(("node" = String, Path, description = "node")), responses(
    (status = 200, body = Incident),
    (status = 404, description = "no EK of this node waits", body = assay_wire::problem::Problem),
    (status = 409, description = "several EKs wait", body = assay_wire::problem::Problem),
))]
pub(crate) async fn approve_identity(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
    JsonBody(request): JsonBody<ApproveRequest>,
) -> Result<Json<Incident>, ApiError> {
    caller.require_operator()?;
    let ek = request.ek_sha256.as_deref().map(digest).transpose()?;
    let mut waiting = verifier.store.incidents().await.map_err(db_failed)?;
    waiting.retain(|incident| {
        let named = incident.node == node && ek.as_ref().is_none_or(|ek| incident.ek_sha256 == ek.as_str());
        named && incident.kind == IncidentKind::NewEk && incident.settlement.is_none()
    });
    match waiting.as_slice() {
        [] => Err(ApiError::not_found(format!("no first EK of node `{node}` waits for an operator"))
            .with_hint("`assay incident list` shows what waits")),
        [one] => settle(&verifier, &caller, one.id, Settlement::AcceptEk).await,
        several => {
            let eks = several.iter().map(|incident| incident.ek_sha256.as_str()).collect::<Vec<_>>().join(", ");
            let detail = format!("approving node `{node}`: it came with several EKs: {eks}");
            Err(ApiError::conflict("several-eks", detail).with_hint("name the one with --ek-sha256"))
        }
    }
}

/// Forgets a node's EK: its next enrolment is a first one.
#[utoipa::path(delete, path = "/v1/identities/{node}", tag = "operator",
    params(("node" = String, Path, description = "node")),
    responses((status = 200), (status = 404, body = assay_wire::problem::Problem)))]
pub(crate) async fn forget_identity(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(node): Named<NodeId>,
) -> Result<Json<()>, ApiError> {
    caller.require_operator()?;
    if !verifier.store.clear_identity(&node).await.map_err(db_failed)? {
        return Err(no_identity(&node));
    }
    tracing::info!(event = "identity.forgotten", %node, by = caller.name, "identity forgotten");
    Ok(Json(()))
}

/// What an operator must settle, and has settled: open ones first, then the newest first.
#[utoipa::path(get, path = "/v1/incidents", tag = "operator", responses((status = 200, body = Vec<Incident>)))]
pub(crate) async fn incidents(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
) -> Result<Json<Vec<Incident>>, ApiError> {
    caller.require_service()?;
    verifier.store.incidents().await.map(Json).map_err(db_failed)
}

/// Settles an incident.
#[utoipa::path(post, path = "/v1/incidents/{id}/settle", tag = "operator", request_body = SettleRequest,
    params(("id" = String, Path, description = "incident")), responses(
    (status = 200, body = Incident),
    (status = 404, body = assay_wire::problem::Problem),
    (status = 409, description = "it was settled before", body = assay_wire::problem::Problem),
))]
pub(crate) async fn settle_incident(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Named(id): Named<IncidentId>,
    JsonBody(request): JsonBody<SettleRequest>,
) -> Result<Json<Incident>, ApiError> {
    caller.require_operator()?;
    settle(&verifier, &caller, id, request.settlement).await
}

async fn settle(
    verifier: &Verifier,
    caller: &Caller,
    id: IncidentId,
    settlement: Settlement,
) -> Result<Json<Incident>, ApiError> {
    let now_ms = verifier.clock.now_ms();
    match verifier.store.settle_incident(id, settlement, &caller.name, now_ms).await.map_err(db_failed)? {
        Settled::Done(incident) => {
            let (node, ek) = (&incident.node, &incident.ek_sha256);
            tracing::info!(event = "incident.settled", incident = %id, %node, ek, %settlement, by = caller.name, "settled");
            Ok(Json(incident))
        }
        Settled::Already(incident) => {
            let by = incident.settled_by.as_deref().unwrap_or("nobody");
            let how = incident.settlement.map_or("open", Settlement::as_str);
            Err(ApiError::conflict("incident-settled", format!("settling incident {id}: `{by}` settled it: {how}")))
        }
        Settled::Unknown => {
            Err(ApiError::not_found(format!("there is no incident {id}")).with_hint("`assay incident list` shows them"))
        }
    }
}

fn digest(text: &str) -> Result<EkDigest, ApiError> {
    text.parse().map_err(|error| ApiError::bad_request("malformed", format!("reading `ek_sha256`: {error}")))
}

fn no_identity(node: &NodeId) -> ApiError {
    ApiError::not_found(format!("node `{node}` is bound to no EK"))
}
