//! Export: an image as a file, from any octet on.

use super::images::find;
use super::{catalogue_failed, store_failed};
use crate::export::blocking;
use crate::service::AppState;
use crate::store::export::Exported;
use assay_service::auth::Caller;
use assay_service::error::{ApiError, chain};
use assay_wire::id::ImageId;
use assay_wire::imaging::{Exporting, ImageFormat};
use assay_wire::problem::Problem;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use std::io;
use std::sync::Arc;

/// Octets that are read at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// Gives an image as a file, from `offset` on. The same image in the same format is always the same octets, so that an
/// export that was broken off can be gone on with.
#[utoipa::path(get, path = "/v1/images/{image}/content", params(("image" = String, Path),
    ("format" = ImageFormat, Query), ("offset" = Option<u64>, Query)), responses(
    (status = 200, description = "The octets", body = Vec<u8>, content_type = "application/octet-stream"),
    (status = 400, description = "The offset is behind the file's end", body = Problem),
    (status = 404, description = "No such image that the caller may use", body = Problem),
    (status = 429, description = "Others are being read or written", body = Problem)))]
pub(super) async fn get_content(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(image): Path<ImageId>,
    Query(Exporting { format, offset }): Query<Exporting>,
) -> Result<Response, ApiError> {
    let record = find(&state, &caller, &image).await?;
    state.catalogue.checked(&record).await.map_err(|error| catalogue_failed(&error))?;
    let slot = super::images::slot(&state)?;
    let (store, key) = (Arc::clone(&state.catalogue.store), record.key);
    let opened = blocking(move || {
        let device = store.open_image(key)?;
        Exported::new(device, format)
    });
    let file = Arc::new(opened.await.map_err(|error| store_failed(&error))?);
    let total = file.byte_len();
    if offset > total {
        let detail = format!("image `{image}` as {format:?} has {total} octets, and none at {offset}");
        return Err(ApiError::bad_request("offset", detail));
    }
    tracing::info!(event = "image.export", %image, ?format, offset, total, by = caller.name, "exporting");
    let chunks = futures_util::stream::try_unfold((file, offset, slot), move |(file, at, slot)| async move {
        if at >= total {
            return Ok::<_, io::Error>(None);
        }
        let (reading, length) = (Arc::clone(&file), CHUNK_BYTES.min(total - at));
        let read = blocking(move || {
            let mut chunk = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
            reading.read_at(at, &mut chunk).map(|()| chunk)
        });
        // The answer has begun: it can only be cut short, and the reader sees that it is.
        let chunk = read.await.map_err(|error| {
            tracing::error!(event = "image.export_failed", at, cause = chain(&error), "an export was cut short");
            io::Error::other(error)
        })?;
        Ok(Some((Bytes::from(chunk), (file, at + length, slot))))
    });
    let headers =
        [(CONTENT_TYPE, "application/octet-stream".to_owned()), (CONTENT_LENGTH, (total - offset).to_string())];
    Ok((headers, Body::from_stream(chunks)).into_response())
}
