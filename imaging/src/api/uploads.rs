//! Uploads: files that are imported from elsewhere than the imaging host. They come in pieces, and what was broken off
//! goes on where it stopped; they are imported once, against the digest that was said at first.

use super::store_failed;
use crate::export::blocking;
use crate::service::AppState;
use crate::uploads::{MAX_PIECE_BYTES, UploadError};
use assay_service::auth::Caller;
use assay_service::error::{ApiError, chain};
use assay_wire::id::UploadId;
use assay_wire::imaging::{PieceOffset, Upload, UploadRequest};
use assay_wire::problem::Problem;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use std::sync::Arc;

/// Begins an upload. The same file for the same project goes on with the one that there is.
#[utoipa::path(post, path = "/v1/uploads", request_body = UploadRequest, responses(
    (status = 200, description = "How far it has come", body = Upload),
    (status = 400, description = "The size or the digest is none", body = Problem),
    (status = 403, description = "Another project's", body = Problem),
    (status = 429, description = "The project has too many", body = Problem)))]
pub(super) async fn post_upload(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(request): Json<UploadRequest>,
) -> Result<Json<Upload>, ApiError> {
    caller.require_project(&request.project)?;
    let (uploads, now_ms) = (Arc::clone(&state.uploads), state.clock.now_ms());
    let begun = blocking(move || Ok(uploads.begin(&request, now_ms))).await.map_err(|error| store_failed(&error))?;
    let upload = begun.map_err(|error| upload_failed(&error))?;
    tracing::info!(event = "upload.begun", upload = %upload.id, project = %upload.project, bytes = upload.bytes, by = caller.name, "upload");
    Ok(Json(upload))
}

/// Adds a piece of at most 4 MiB. What lies between the last and this reads as zeros; an empty one ends with them.
#[utoipa::path(put, path = "/v1/uploads/{upload}", params(("upload" = String, Path, format = "uuid"),
    ("offset" = u64, Query)), request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses(
    (status = 200, description = "How far it has come", body = Upload),
    (status = 404, description = "No such upload of the caller's project", body = Problem),
    (status = 409, description = "`offset`: that is there already, or behind the end", body = Problem),
    (status = 503, description = "The imaging host has no room", body = Problem)))]
pub(super) async fn put_piece(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(upload): Path<UploadId>,
    Query(PieceOffset { offset }): Query<PieceOffset>,
    piece: Bytes,
) -> Result<Json<Upload>, ApiError> {
    let found = find(&state, &caller, upload).await?;
    if piece.len() > MAX_PIECE_BYTES {
        return Err(ApiError::bad_request("piece", format!("a piece has at most {MAX_PIECE_BYTES} octets")));
    }
    let (uploads, now_ms) = (Arc::clone(&state.uploads), state.clock.now_ms());
    let added =
        blocking(move || Ok(uploads.add(found, offset, &piece, now_ms))).await.map_err(|error| store_failed(&error))?;
    added.map(Json).map_err(|error| upload_failed(&error))
}

/// How far an upload has come.
#[utoipa::path(get, path = "/v1/uploads/{upload}", params(("upload" = String, Path, format = "uuid")), responses(
    (status = 200, body = Upload),
    (status = 404, description = "No such upload of the caller's project", body = Problem)))]
pub(super) async fn get_upload(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(upload): Path<UploadId>,
) -> Result<Json<Upload>, ApiError> {
    find(&state, &caller, upload).await.map(Json)
}

/// Forgets an upload.
#[utoipa::path(delete, path = "/v1/uploads/{upload}", params(("upload" = String, Path, format = "uuid")), responses(
    (status = 204, description = "It is gone"),
    (status = 404, description = "No such upload of the caller's project", body = Problem)))]
pub(super) async fn delete_upload(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(upload): Path<UploadId>,
) -> Result<StatusCode, ApiError> {
    find(&state, &caller, upload).await?;
    let uploads = Arc::clone(&state.uploads);
    let removed = blocking(move || Ok(uploads.remove(upload))).await.map_err(|error| store_failed(&error))?;
    removed.map(|()| StatusCode::NO_CONTENT).map_err(|error| upload_failed(&error))
}

/// An upload of the caller's project. Another's is as good as none.
pub(super) async fn find(state: &AppState, caller: &Caller, upload: UploadId) -> Result<Upload, ApiError> {
    let uploads = Arc::clone(&state.uploads);
    let found = blocking(move || Ok(uploads.get(upload))).await.map_err(|error| store_failed(&error))?;
    let found = found.map_err(|error| upload_failed(&error))?;
    let own = found.filter(|found| caller.require_project(&found.project).is_ok());
    own.ok_or_else(|| ApiError::not_found(format!("there is no upload {upload}")))
}

fn upload_failed(error: &UploadError) -> ApiError {
    match error {
        UploadError::Malformed(_) => ApiError::bad_request("upload-malformed", error),
        UploadError::TooMany(_) => ApiError::too_many(error).with_hint("import or delete one first"),
        UploadError::Offset { .. } => ApiError::conflict("offset", error).with_hint("go on where it says"),
        UploadError::Io { .. } => ApiError::unavailable("uploads", chain(error)),
    }
}
