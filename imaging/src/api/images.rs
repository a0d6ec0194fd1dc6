//! Images: importing, sharing, changing and deleting them.

use super::{catalogue_failed, db_failed, may_see, store_failed};
use crate::catalogue::{CatalogueError, NewImage, shown};
use crate::db::images::ImageRecord;
use crate::export::blocking;
use crate::service::AppState;
use crate::tree::AnySource;
use assay_service::auth::{Caller, Role};
use assay_service::error::{ApiError, chain};
use assay_wire::id::{ImageId, ProjectId, UploadId};
use assay_wire::imaging::{
    CopyRequest, Image, ImageChange, ImageDetail, ImageKind, ImportRequest, ImportSource, ImportStatus, SourceFormat,
};
use assay_wire::problem::Problem;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// More than anybody reads.
const MAX_TAGS: usize = 32;
/// With more than so many it had better be public.
const MAX_SHARED_WITH: usize = 256;
/// Progress is said at most this often: every so many octets.
const PROGRESS_OCTETS: u64 = 16 << 20;
/// Statuses that wait for a slow reader; further ones are left out.
const WAITING_STATUSES: usize = 16;

/// Imports a golden image; the answer is a stream of statuses. Closing it breaks the import off.
#[utoipa::path(post, path = "/v1/images", request_body = ImportRequest, responses(
    (status = 200, description = "A line for each status; the last is `done` or `failed`", body = ImportStatus,
        content_type = "application/x-ndjson"),
    (status = 400, description = "The source is not what it should be", body = Problem),
    (status = 403, description = "A path is an operator's to say, and below the import folders; an upload its project's",
        body = Problem),
    (status = 409, description = "The name is taken", body = Problem),
    (status = 429, description = "Others are being imported", body = Problem)))]
pub(super) async fn post_image(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(request): Json<ImportRequest>,
) -> Result<Response, ApiError> {
    let source = match &request.source {
        ImportSource::Path(path) => {
            caller.require_operator()?;
            Opening {
                words: path.clone(),
                path: path.into(),
                folders: state.import_folders.clone(),
                sha256: request.sha256,
            }
        }
        ImportSource::Upload(upload) => {
            caller.require_project(&request.project)?;
            uploaded(&state, &caller, *upload, &request).await?
        }
    };
    let slot = slot(&state)?;
    let (format, opening) = (request.format, source.clone());
    let opened = blocking(move || AnySource::open(&opening.path, format, &opening.folders));
    let opened = opened.await.map_err(|error| store_failed(&error))?;
    tracing::info!(event = "image.import", image = %request.name, source = source.words, by = caller.name, "importing");
    let new = NewImage {
        name: request.name,
        project: request.project,
        kind: ImageKind::Golden,
        source: source.words,
        made_by: caller.name,
        now_ms: state.clock.now_ms(),
    };
    let (record, working) = state.catalogue.announce(new).await.map_err(|error| catalogue_failed(&error))?;
    let (expected, from) = (source.sha256, request.source);
    Ok(streamed("import", record.name.clone(), async move |progress| {
        let imported = state.catalogue.import(record, opened, expected, progress).await;
        if let (Ok(_), ImportSource::Upload(upload)) = (&imported, from) {
            let uploads = Arc::clone(&state.uploads);
            let removed = blocking(move || Ok(uploads.remove(upload))).await;
            if let Ok(Err(error)) = removed {
                tracing::warn!(event = "upload.not_removed", %upload, cause = chain(&error), "an imported upload is still there");
            }
        }
        drop((working, slot));
        imported
    }))
}

/// A source that is about to be opened.
#[derive(Debug, Clone)]
struct Opening {
    words: String,
    path: PathBuf,
    folders: Vec<PathBuf>,
    sha256: Option<String>,
}

/// An upload that is all there, of the project that the image will be of, as the file that it was said to be.
async fn uploaded(
    state: &AppState,
    caller: &Caller,
    upload: UploadId,
    request: &ImportRequest,
) -> Result<Opening, ApiError> {
    let found = super::uploads::find(state, caller, upload).await?;
    if found.project != request.project {
        return Err(ApiError::not_found(format!("project `{}` has no upload {upload}", request.project)));
    }
    if found.received != found.bytes {
        let detail = format!("upload {upload} has {} of {} octets", found.received, found.bytes);
        return Err(ApiError::conflict("not-uploaded", detail).with_hint("go on with the upload"));
    }
    if matches!(request.format, SourceFormat::Folder | SourceFormat::Oci) {
        let detail = "a folder or an OCI layout is not uploaded as one file";
        return Err(ApiError::bad_request("format", detail).with_hint("upload it as a tar file"));
    }
    if request.sha256.as_ref().is_some_and(|said| !said.eq_ignore_ascii_case(&found.sha256)) {
        let detail = format!("upload {upload} was begun for SHA-256 {}", found.sha256);
        return Err(ApiError::bad_request("digest-differs", detail));
    }
    let (folder, path) = state.uploads.place(upload);
    Ok(Opening { words: format!("upload {upload}"), path, folders: vec![folder], sha256: Some(found.sha256) })
}

/// Lists the images that the caller may use.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, body = Vec<Image>)))]
pub(super) async fn get_images(
    State(state): State<Arc<AppState>>,
    caller: Caller,
) -> Result<Json<Vec<Image>>, ApiError> {
    let mut images = state.catalogue.db.images().await.map_err(|error| db_failed(&error))?;
    images.retain(|image| may_use(&caller, image));
    Ok(Json(images.into_iter().map(|image| seen_by(&caller, image)).collect()))
}

/// Shows an image, and what was made of it.
#[utoipa::path(get, path = "/v1/images/{image}", params(("image" = String, Path)), responses(
    (status = 200, body = ImageDetail),
    (status = 404, description = "No such image that the caller may use", body = Problem)))]
pub(super) async fn get_image(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(image): Path<ImageId>,
) -> Result<Json<ImageDetail>, ApiError> {
    let record = find(&state, &caller, &image).await?;
    let db = &state.catalogue.db;
    let images = db.images().await.map_err(|error| db_failed(&error))?;
    let disks = db.disks().await.map_err(|error| db_failed(&error))?;
    let children = images.iter().filter(|child| child.kind == ImageKind::Snapshot && child.parent == Some(record.key));
    let children = children.filter(|child| may_see(&caller, &child.project));
    let clones = disks.iter().filter(|disk| disk.image == record.key && may_see(&caller, &disk.project));
    let children = children.map(|child| format!("image `{}`", child.name));
    let clones = clones.map(|disk| format!("the disk of node `{}` (lease {})", disk.node, disk.lease));
    let dependents = children.chain(clones).collect();
    Ok(Json(ImageDetail { image: seen_by(&caller, record), dependents }))
}

/// Changes what an image is called, whose it is, who may use it, or its tags.
#[utoipa::path(patch, path = "/v1/images/{image}", params(("image" = String, Path)), request_body = ImageChange,
    responses(
    (status = 200, description = "As it is now", body = Image),
    (status = 400, description = "A tag is none", body = Problem),
    (status = 403, description = "Another project's, or an operator's to say", body = Problem),
    (status = 404, description = "No such image that the caller may use", body = Problem),
    (status = 409, description = "The name is taken, or the image is not ready", body = Problem)))]
pub(super) async fn patch_image(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(image): Path<ImageId>,
    Json(change): Json<ImageChange>,
) -> Result<Json<Image>, ApiError> {
    let was = find(&state, &caller, &image).await?;
    caller.require_project(&was.project)?;
    let mut now = was.clone();
    if let Some(project) = change.project {
        caller.require_operator()?;
        now.project = project;
    }
    now.name = change.name.unwrap_or(now.name);
    now.public = change.public.unwrap_or(now.public);
    now.shared_with.extend(change.share_with);
    now.shared_with.retain(|project| !change.unshare_with.contains(project));
    now.tags.extend(change.add_tags);
    now.tags.retain(|tag| !change.remove_tags.contains(tag));
    if now.tags.len() > MAX_TAGS || now.shared_with.len() > MAX_SHARED_WITH {
        let detail = format!("an image has at most {MAX_TAGS} tags and is shared with {MAX_SHARED_WITH} projects");
        return Err(ApiError::bad_request("too-many", detail));
    }
    if let Some(tag) = now.tags.iter().find(|tag| !is_tag(tag)) {
        let detail = format!("`{}` is no tag: use 1 to 64 printable characters", tag.escape_debug());
        return Err(ApiError::bad_request("tag-malformed", detail));
    }
    let now = state.catalogue.change(was, now).await.map_err(|error| catalogue_failed(&error))?;
    tracing::info!(event = "image.changed", image = %image, now = %now.name, project = %now.project, public = now.public,
        shared_with = now.shared_with.len(), by = caller.name, "image changed");
    Ok(Json(shown(now)))
}

/// Deletes an image that nothing was made of, or what there is of one that was never finished.
#[utoipa::path(delete, path = "/v1/images/{image}", params(("image" = String, Path)), responses(
    (status = 204, description = "It is gone"),
    (status = 403, description = "Another project's", body = Problem),
    (status = 404, description = "No such image that the caller may use", body = Problem),
    (status = 409, description = "`has-dependents`: they are named", body = Problem)))]
pub(super) async fn delete_image(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(image): Path<ImageId>,
) -> Result<StatusCode, ApiError> {
    let record = find(&state, &caller, &image).await?;
    caller.require_project(&record.project)?;
    state.catalogue.delete(record).await.map_err(|error| catalogue_failed(&error))?;
    tracing::info!(event = "image.deleted", %image, by = caller.name, "image deleted");
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a snapshot a golden image of its own; the answer is a stream of statuses. Closing it breaks the work off.
#[utoipa::path(post, path = "/v1/images/{image}/flatten", params(("image" = String, Path)), responses(
    (status = 200, description = "A line for each status; the last is `done` or `failed`", body = ImportStatus,
        content_type = "application/x-ndjson"),
    (status = 403, description = "Another project's", body = Problem),
    (status = 404, description = "No such image that the caller may use", body = Problem)))]
pub(super) async fn flatten_image(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(image): Path<ImageId>,
) -> Result<Response, ApiError> {
    let record = find(&state, &caller, &image).await?;
    caller.require_project(&record.project)?;
    Ok(streamed("flatten", image, async move |progress| state.catalogue.flatten(record, progress).await))
}

/// Reads all of an image, so that each block is checked and at hand before nodes boot from it; the answer is a stream of
/// statuses.
#[utoipa::path(post, path = "/v1/images/{image}/prepare", params(("image" = String, Path)), responses(
    (status = 200, description = "A line for each status; the last is `done` or `failed`", body = ImportStatus,
        content_type = "application/x-ndjson"),
    (status = 404, description = "No such image that the caller may use", body = Problem)))]
pub(super) async fn prepare_image(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(image): Path<ImageId>,
) -> Result<Response, ApiError> {
    let record = find(&state, &caller, &image).await?;
    let slot = slot(&state)?;
    Ok(streamed("prepare", image, async move |progress| {
        let prepared = state.catalogue.prepare(record, progress).await;
        drop(slot);
        prepared
    }))
}

/// Makes a golden image of the same content; the answer is a stream of statuses. Asked for again after it was broken off,
/// it goes on.
#[utoipa::path(post, path = "/v1/images/{image}/copy", params(("image" = String, Path)), request_body = CopyRequest,
    responses(
    (status = 200, description = "A line for each status; the last is `done` or `failed`", body = ImportStatus,
        content_type = "application/x-ndjson"),
    (status = 403, description = "Another project's", body = Problem),
    (status = 404, description = "No such image of the project", body = Problem),
    (status = 409, description = "The name is taken", body = Problem)))]
pub(super) async fn copy_image(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(image): Path<ImageId>,
    Json(request): Json<CopyRequest>,
) -> Result<Response, ApiError> {
    let of = find(&state, &caller, &image).await?;
    caller.require_project(&request.project)?;
    if !of.is_for(&request.project) {
        return Err(no_image(&image, &request.project));
    }
    let slot = slot(&state)?;
    let new = NewImage {
        name: request.name,
        project: request.project,
        kind: ImageKind::Golden,
        source: format!("image {}", of.key),
        made_by: caller.name,
        now_ms: state.clock.now_ms(),
    };
    let (record, working) = state.catalogue.announce(new).await.map_err(|error| catalogue_failed(&error))?;
    Ok(streamed("copy", record.name.clone(), async move |progress| {
        let copied = state.catalogue.copy(&of, record, progress).await;
        drop((working, slot));
        copied
    }))
}

/// The image of that name, if the caller may use it. Another's is as good as none, and is not told apart from one.
pub(super) async fn find(state: &AppState, caller: &Caller, image: &ImageId) -> Result<ImageRecord, ApiError> {
    let found = state.catalogue.db.image(image).await.map_err(|error| db_failed(&error))?;
    let hidden = || ApiError::not_found(format!("there is no image `{image}`, or it is not shared with you"));
    found.filter(|record| may_use(caller, record)).ok_or_else(hidden)
}

pub(super) fn no_image(image: &ImageId, project: &ProjectId) -> ApiError {
    ApiError::not_found(format!("project `{project}` has no image `{image}`"))
        .with_hint("its owner can share it: assay image share")
}

fn may_use(caller: &Caller, image: &ImageRecord) -> bool {
    match &caller.role {
        Role::Operator | Role::Service => true,
        Role::Project(project) => image.is_for(project),
    }
}

/// With whom else an image is shared is its owner's business.
fn seen_by(caller: &Caller, record: ImageRecord) -> Image {
    let own = may_see(caller, &record.project);
    let mut image = shown(record);
    if let (false, Role::Project(project)) = (own, &caller.role) {
        image.shared_with.retain(|with| with == project);
    }
    image
}

fn is_tag(tag: &str) -> bool {
    (1..=64).contains(&tag.chars().count()) && !tag.chars().any(char::is_control)
}

pub(super) fn slot(state: &AppState) -> Result<OwnedSemaphorePermit, ApiError> {
    let taken = || ApiError::too_many("other images are being read or written; try again when they are done");
    Arc::clone(&state.imports).try_acquire_owned().map_err(|_| taken())
}

/// Does long work in a task of its own, and answers with a stream of how far it has come.
fn streamed<W, F>(doing: &'static str, image: ImageId, work: W) -> Response
where
    W: FnOnce(Said) -> F + Send + 'static,
    F: Future<Output = Result<ImageRecord, CatalogueError>> + Send + 'static,
{
    let (statuses, reader) = mpsc::channel(WAITING_STATUSES);
    tokio::spawn(async move {
        let last = match work(said(statuses.clone())).await {
            Ok(record) => {
                tracing::info!(event = "image.work_done", doing, %image, bytes = record.virtual_bytes, "work on an image is done");
                ImportStatus::Done { image: Box::new(shown(record)) }
            }
            Err(error) => {
                tracing::warn!(event = "image.work_failed", doing, %image, cause = chain(&error), "work on an image failed");
                let problem = catalogue_failed(&error).problem().clone();
                ImportStatus::Failed { detail: chain(&error), hint: problem.hint }
            }
        };
        // A reader that went away wants no last word.
        let _ = statuses.send(last).await;
    });
    let lines = futures_util::stream::unfold(reader, |mut reader| async move {
        let status = reader.recv().await?;
        let mut line = serde_json::to_vec(&status).unwrap_or_default();
        line.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), reader))
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

type Said = Box<dyn FnMut(u64, u64) -> ControlFlow<()> + Send>;

/// Says progress to a reader, and breaks off once it has gone away.
fn said(statuses: mpsc::Sender<ImportStatus>) -> Said {
    let mut said = 0;
    Box::new(move |done_bytes, total_bytes| {
        if statuses.is_closed() {
            return ControlFlow::Break(());
        }
        if done_bytes == 0 || done_bytes < said || done_bytes - said >= PROGRESS_OCTETS {
            said = done_bytes;
            let _full_is_fine = statuses.try_send(ImportStatus::Copying { done_bytes, total_bytes });
        }
        ControlFlow::Continue(())
    })
}
