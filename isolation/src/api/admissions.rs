//! Admissions: a signed attestation result asks for its node's port (boot path step 8).

use super::{Api, Body, Named};
use crate::commands::Command;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::id::AdmissionId;
use assay_wire::isolation::{Admission, AdmissionRequest, RevokeRequest};
use assay_wire::result::SignedResult;
use axum::Json;
use axum::extract::State;

async fn find(api: &Api, id: AdmissionId) -> Result<Admission, ApiError> {
    api.store.admission(id).await?.ok_or_else(|| ApiError::not_found(format!("there is no admission {id}")))
}

/// The newest 1,000 admissions.
#[utoipa::path(get, path = "/v1/admissions", responses((status = 200, body = Vec<Admission>)))]
pub(super) async fn list(caller: Caller, State(api): State<Api>) -> Result<Json<Vec<Admission>>, ApiError> {
    caller.require_service()?;
    Ok(Json(api.store.admissions().await?))
}

/// One admission.
#[utoipa::path(get, path = "/v1/admissions/{admission}",
    params(("admission" = String, Path)),
    responses((status = 200, body = Admission)))]
pub(super) async fn show(
    caller: Caller,
    State(api): State<Api>,
    Named(id): Named<AdmissionId>,
) -> Result<Json<Admission>, ApiError> {
    caller.require_service()?;
    find(&api, id).await.map(Json)
}

/// Verifies the result and moves the port; answers once it reads back. Idempotent by the result's id.
#[utoipa::path(post, path = "/v1/admissions", request_body = AdmissionRequest, responses(
    (status = 200, body = Admission),
    (status = 403, description = "`result-refused`: signature, age, status, node, project, lease or boot"),
    (status = 409, description = "`not-in-airlock`, `node-was-reset`, `admission-ended`"),
    (status = 503, description = "`port-not-moved`: closed again, and the admission ended")))]
pub(super) async fn admit(
    caller: Caller,
    State(api): State<Api>,
    Body(request): Body<AdmissionRequest>,
) -> Result<Json<Admission>, ApiError> {
    caller.require_service()?;
    let result = SignedResult::from_wire(request.result);
    // Unverified: it only says whose driver, and so whose keys, will verify it.
    let (_, lease) = result.unverified_lease().map_err(|e| ApiError::bad_request("result-malformed", e))?;
    let lease = api.store.lease(lease).await?;
    let node = match lease {
        Some((lease, false)) => lease.node,
        Some((_, true)) | None => {
            return Err(ApiError::conflict("no-lease", "the attestation result is for a lease that is not alive"));
        }
    };
    api.fleet.ask(&node, |reply| Command::Admit(result, reply)).await.map(Json)
}

/// Ends an admission: the port closes first, then that is recorded. Idempotent. 404 says that it was never made, and that it
/// cannot be made any more.
#[utoipa::path(delete, path = "/v1/admissions/{admission}",
    params(("admission" = String, Path)), request_body = RevokeRequest,
    responses((status = 200, body = Admission),
        (status = 503, description = "recorded, but the port is not known to be closed")))]
pub(super) async fn revoke(
    caller: Caller,
    State(api): State<Api>,
    Named(id): Named<AdmissionId>,
    Body(request): Body<RevokeRequest>,
) -> Result<Json<Admission>, ApiError> {
    caller.require_service()?;
    if api.store.admission(id).await?.is_none() {
        api.store.revoke_unmade(id).await?;
    }
    // Looked up again: it may have been made in between, and cannot be any more.
    let admission = find(&api, id).await?;
    api.fleet.ask(&admission.node, |reply| Command::Revoke(id, request.reason, reply)).await.map(Json)
}
