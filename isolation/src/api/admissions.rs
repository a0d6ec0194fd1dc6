//! Admissions: a signed attestation result asks for its node's port (boot path step 8).

use super::nodes::{AfterRevision, moved_on};
use super::{Api, Asked, Body, Named};
use crate::commands::Command;
use crate::renewal;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::agreement::Presented;
use assay_wire::id::AdmissionId;
use assay_wire::isolation::{
    Admission, AdmissionRequest, Admissions, MAX_RENEWALS, RenewalAnswer, RenewalRequest, RevokeRequest,
};
use axum::Json;
use axum::extract::State;

async fn find(api: &Api, id: AdmissionId) -> Result<Admission, ApiError> {
    api.store.admission(id).await?.ok_or_else(|| ApiError::not_found(format!("there is no admission {id}")))
}

/// How long an admission that ended is listed.
const LISTED_AFTER_END_MS: i64 = 60 * 60 * 1000;

/// The admissions that stand and those that ended within the last hour: at once, or once it is something else than at
/// revision `after`, or after 25 s.
#[utoipa::path(get, path = "/v1/admissions",
    params(("after" = Option<u64>, Query)),
    responses((status = 200, body = Admissions)))]
pub(super) async fn list(
    caller: Caller,
    State(api): State<Api>,
    Asked(asked): Asked<AfterRevision>,
) -> Result<Json<Admissions>, ApiError> {
    caller.require_service()?;
    let revision = moved_on(api.store.admissions_revision(), &asked).await;
    let ended_after_ms = api.clock.now_ms().saturating_sub(LISTED_AFTER_END_MS);
    Ok(Json(Admissions { revision, admissions: api.store.admissions(ended_after_ms).await? }))
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
    (status = 403, description = "`result-refused`: signature, age, status, node, project, lease or boot; or results that do not agree, or not all that the site requires"),
    (status = 409, description = "`not-in-airlock`, `node-was-reset`, `admission-ended`"),
    (status = 503, description = "`port-not-moved`: closed again, and the admission ended")))]
pub(super) async fn admit(
    caller: Caller,
    State(api): State<Api>,
    Body(request): Body<AdmissionRequest>,
) -> Result<Json<Admission>, ApiError> {
    caller.require_service()?;
    let results = Presented::from_wire(request.result, request.supporting);
    // Unverified: it only says whose driver, and so whose keys, will verify it.
    let (_, lease) = results.lead.unverified_lease().map_err(|e| ApiError::bad_request("result-malformed", e))?;
    let lease = api.store.lease(lease).await?;
    let node = match lease {
        Some((lease, false)) => lease.node,
        Some((_, true)) | None => {
            return Err(ApiError::conflict("no-lease", "the attestation result is for a lease that is not alive"));
        }
    };
    api.fleet.ask(&node, |reply| Command::Admit(results, reply)).await.map(Json)
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

/// Lets admissions stand longer, up to 1,000 at once, each decided by itself: fresh results about the same node, lease,
/// boot, EK, AK and TPM counts, by whom the site requires. What has ended stays ended, and what is not renewed ends by
/// itself.
#[utoipa::path(post, path = "/v1/admission-renewals", request_body = RenewalRequest, responses(
    (status = 200, body = RenewalAnswer),
    (status = 400, description = "`too-many-renewals`")))]
pub(super) async fn renew(
    caller: Caller,
    State(api): State<Api>,
    Body(request): Body<RenewalRequest>,
) -> Result<Json<RenewalAnswer>, ApiError> {
    caller.require_service()?;
    let count = request.renewals.len();
    if count > MAX_RENEWALS {
        let detail = format!("{count} renewals are more than {MAX_RENEWALS}");
        return Err(ApiError::bad_request("too-many-renewals", detail));
    }
    let policy = (&api.config.agreement, api.config.longest_renewal);
    let outcomes = renewal::renew(&api.store, policy, request.renewals, api.clock.now_ms()).await?;
    let undecided = || ApiError::unavailable("undecided", "the renewals could not be decided");
    Ok(Json(RenewalAnswer { outcomes: outcomes.ok_or_else(undecided)? }))
}
