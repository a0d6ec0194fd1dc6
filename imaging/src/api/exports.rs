//! Exports: step 7 of the boot path.

use super::{db_failed, export_failed};
use crate::lock::lock;
use crate::service::AppState;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_service::telemetry::boot_step;
use assay_wire::agreement::Presented;
use assay_wire::id::AdmissionId;
use assay_wire::imaging::{Export, ExportAnswer, ExportRequest};
use assay_wire::isolation::{MAX_RENEWALS, RenewalAnswer, RenewalRequest};
use assay_wire::problem::Problem;
use assay_wire::step::Step;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use std::sync::Arc;
use std::time::Instant;

/// Exports the disk of the lease that a signed attestation result is for. Idempotent by the result's id.
#[utoipa::path(post, path = "/v1/exports", request_body = ExportRequest, responses(
    (status = 200, description = "The target is up", body = ExportAnswer),
    (status = 403, description = "The result does not count", body = Problem),
    (status = 409, description = "The admission has ended, or the lease has no disk", body = Problem),
    (status = 503, description = "The gateway does not answer", body = Problem)))]
pub(super) async fn post_export(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(request): Json<ExportRequest>,
) -> Result<Json<ExportAnswer>, ApiError> {
    caller.require_service()?;
    let begun = Instant::now();
    let presented = Presented::from_wire(request.result, request.supporting);
    // In a task of its own: a caller that goes away does not leave an export between two phases.
    let working = Arc::clone(&state);
    let exported = tokio::spawn(async move { working.exporter.export(&presented, &*working.clock).await })
        .await
        .map_err(|error| ApiError::internal("making an export", &error))?
        .map_err(|error| export_failed(&error))?;
    if exported.new {
        boot_step(Step::ImageExported, exported.node(), begun.elapsed());
    }
    Ok(Json(exported.answer()))
}

/// Lists exports.
#[utoipa::path(get, path = "/v1/exports", responses((status = 200, body = Vec<Export>)))]
pub(super) async fn get_exports(
    State(state): State<Arc<AppState>>,
    caller: Caller,
) -> Result<Json<Vec<Export>>, ApiError> {
    caller.require_service()?;
    let records = state.exporter.db.exports().await.map_err(|error| db_failed(&error))?;
    let served = lock(&state.served);
    let exports = records.into_iter().map(|record| {
        let status = served.get(&record.admission);
        Export {
            sessions: status.map_or(0, |status| status.sessions),
            read_bytes: status.map_or(0, |status| status.read_bytes),
            written_bytes: status.map_or(0, |status| status.written_bytes),
            reads: status.map(|status| status.reads).unwrap_or_default(),
            writes: status.map(|status| status.writes).unwrap_or_default(),
            admission: record.admission,
            lease: record.lease,
            node: record.node,
            disk: record.disk,
            target: record.target,
            initiator: record.initiator,
            expires_at_ms: record.expires_at_ms,
        }
    });
    Ok(Json(exports.collect()))
}

/// Ends an admission: its sessions are severed when this answers. Idempotent, also for admissions never seen.
#[utoipa::path(delete, path = "/v1/exports/{admission}", params(("admission" = String, Path, format = "uuid")),
    responses(
    (status = 204, description = "It is gone"),
    (status = 503, description = "The gateway does not answer; imaging goes on trying", body = Problem)))]
pub(super) async fn delete_export(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(admission): Path<AdmissionId>,
) -> Result<StatusCode, ApiError> {
    caller.require_service()?;
    let working = Arc::clone(&state);
    tokio::spawn(async move { working.exporter.end(admission, working.clock.now_ms()).await })
        .await
        .map_err(|error| ApiError::internal("ending an export", &error))?
        .map_err(|error| export_failed(&error))?;
    lock(&state.served).remove(&admission);
    Ok(StatusCode::NO_CONTENT)
}

/// Lets exports stand longer, up to 1,000 at once, each decided by itself, as `POST /v1/admission-renewals` at
/// isolation. What has ended stays ended, and what is not renewed ends by itself.
#[utoipa::path(post, path = "/v1/export-renewals", request_body = RenewalRequest, responses(
    (status = 200, description = "One outcome for each", body = RenewalAnswer),
    (status = 400, description = "`too-many-renewals`", body = Problem)))]
pub(super) async fn post_renewals(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(request): Json<RenewalRequest>,
) -> Result<Json<RenewalAnswer>, ApiError> {
    caller.require_service()?;
    let count = request.renewals.len();
    if count > MAX_RENEWALS {
        let detail = format!("{count} renewals are more than {MAX_RENEWALS}");
        return Err(ApiError::bad_request("too-many-renewals", detail));
    }
    // In a task of its own: what is on record must reach the gateways also if the caller goes away.
    let working = Arc::clone(&state);
    let outcomes = tokio::spawn(async move {
        working.exporter.renew(request.renewals, working.longest_renewal, working.clock.now_ms()).await
    })
    .await
    .map_err(|error| ApiError::internal("renewing exports", &error))?
    .map_err(|error| export_failed(&error))?;
    let undecided = || ApiError::unavailable("undecided", "the renewals could not be decided");
    Ok(Json(RenewalAnswer { outcomes: outcomes.ok_or_else(undecided)? }))
}
