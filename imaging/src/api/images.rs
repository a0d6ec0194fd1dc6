//! Golden images.

use super::{catalogue_failed, db_failed, may_see, store_failed};
use crate::catalogue::{NewImage, shown};
use crate::db::images::ImageRecord;
use crate::export::blocking;
use crate::service::AppState;
use crate::store::import::Source;
use assay_service::auth::Caller;
use assay_service::error::{ApiError, chain};
use assay_wire::imaging::{Image, ImageKind, ImportRequest, ImportStatus};
use assay_wire::problem::Problem;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Progress is said at most this often: every so many octets.
const PROGRESS_OCTETS: u64 = 16 << 20;
/// Statuses that wait for a slow reader; further ones are left out.
const WAITING_STATUSES: usize = 16;

/// Imports a golden image; the answer is a stream of statuses. Closing it breaks the import off.
#[utoipa::path(post, path = "/v1/images", request_body = ImportRequest, responses(
    (status = 200, description = "A line for each status; the last is `done` or `failed`", body = ImportStatus,
        content_type = "application/x-ndjson"),
    (status = 400, description = "The source is not what it should be", body = Problem),
    (status = 403, description = "Operators only, and from the import folders only", body = Problem),
    (status = 409, description = "The name is taken", body = Problem),
    (status = 429, description = "Others are being imported", body = Problem)))]
pub(super) async fn post_image(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(request): Json<ImportRequest>,
) -> Result<Response, ApiError> {
    caller.require_operator()?;
    let slot = Arc::clone(&state.imports)
        .try_acquire_owned()
        .map_err(|_| ApiError::too_many("other images are being imported; try again when they are done"))?;
    let (path, folders, format) = (PathBuf::from(&request.source), state.import_folders.clone(), request.format);
    let source = blocking(move || Source::open(&path, format, &folders)).await.map_err(|error| store_failed(&error))?;
    tracing::info!(event = "image.import", image = %request.name, source = request.source, by = caller.name, "importing");
    let new = NewImage {
        name: request.name,
        project: request.project,
        kind: ImageKind::Golden,
        source: request.source,
        made_by: caller.name,
        now_ms: state.clock.now_ms(),
    };
    let (record, working) = state.catalogue.announce(new).await.map_err(|error| catalogue_failed(&error))?;
    let (statuses, reader) = mpsc::channel(WAITING_STATUSES);
    tokio::spawn(async move {
        let last = import(&state, record, source, statuses.clone()).await;
        drop((working, slot));
        // A reader that went away wants no last word.
        let _ = statuses.send(last).await;
    });
    let lines = futures_util::stream::unfold(reader, |mut reader| async move {
        let status = reader.recv().await?;
        let mut line = serde_json::to_vec(&status).unwrap_or_default();
        line.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), reader))
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// Imports, and answers the last status.
async fn import(
    state: &AppState,
    record: ImageRecord,
    source: Source,
    statuses: mpsc::Sender<ImportStatus>,
) -> ImportStatus {
    let (name, mut said) = (record.name.clone(), 0);
    let imported = state.catalogue.import(record, source, None, move |done_bytes, total_bytes| {
        if statuses.is_closed() {
            return ControlFlow::Break(());
        }
        if done_bytes == 0 || done_bytes - said >= PROGRESS_OCTETS {
            said = done_bytes;
            let _full_is_fine = statuses.try_send(ImportStatus::Copying { done_bytes, total_bytes });
        }
        ControlFlow::Continue(())
    });
    match imported.await {
        Ok(record) => {
            tracing::info!(event = "image.imported", image = %name, bytes = record.virtual_bytes, "image imported");
            ImportStatus::Done { image: shown(record) }
        }
        Err(error) => {
            tracing::warn!(event = "image.import_failed", image = %name, cause = chain(&error), "import failed");
            ImportStatus::Failed { detail: chain(&error) }
        }
    }
}

/// Lists the images that the caller may see.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, body = Vec<Image>)))]
pub(super) async fn get_images(
    State(state): State<Arc<AppState>>,
    caller: Caller,
) -> Result<Json<Vec<Image>>, ApiError> {
    let mut images = state.exporter.db.images().await.map_err(|error| db_failed(&error))?;
    images.retain(|image| may_see(&caller, &image.project));
    Ok(Json(images.into_iter().map(shown).collect()))
}
