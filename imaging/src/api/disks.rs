//! Disks: the clone that a lease's node will get.

use super::images::no_image;
use super::{catalogue_failed, db_failed, export_failed, may_see, store_failed};
use crate::catalogue::{CatalogueError, NewImage};
use crate::db::DiskRecord;
use crate::db::exports::Phase;
use crate::db::images::ImageRecord;
use crate::export::{ExportError, blocking};
use crate::service::AppState;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::id::{ImageId, ImageKey, LeaseId, ProjectId};
use assay_wire::imaging::{
    Disk, DiskOutcome, DiskRequest, DisksAnswer, DisksRequest, Image, ImageKind, MAX_NEW_DISKS, NewDisk,
    RestoreRequest, SnapshotRequest,
};
use assay_wire::problem::Problem;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use futures_util::StreamExt as _;
use std::collections::HashMap;
use std::sync::Arc;

/// Disks of one call that are made at the same time: the file system commits them together.
const MADE_AT_ONCE: usize = 16;
/// Disks whose written octets are looked up at the same time.
const COUNTED_AT_ONCE: usize = 8;

/// Makes the lease's disk. Idempotent; takes the same time whatever the image's size.
#[utoipa::path(put, path = "/v1/disks/{lease}", params(("lease" = String, Path, format = "uuid")),
    request_body = DiskRequest, responses(
    (status = 200, description = "The lease has this disk", body = Disk),
    (status = 403, description = "Another project's", body = Problem),
    (status = 404, description = "No such image of the project", body = Problem),
    (status = 409, description = "The lease has another disk", body = Problem)))]
pub(super) async fn put_disk(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(lease): Path<LeaseId>,
    Json(request): Json<DiskRequest>,
) -> Result<Json<Disk>, ApiError> {
    caller.require_project(&request.project)?;
    let image = usable(&state, &request.image, &request.project).await?;
    let disk = make(&state, lease, &request, &image).await?;
    Ok(Json(disk))
}

/// Makes the disks of several leases, each idempotently and by itself: what one is refused for keeps no other.
#[utoipa::path(post, path = "/v1/disks", request_body = DisksRequest, responses(
    (status = 200, description = "One outcome for each", body = DisksAnswer),
    (status = 400, description = "`too-many-disks`", body = Problem),
    (status = 403, description = "Another project's", body = Problem),
    (status = 404, description = "No such image of the project", body = Problem)))]
pub(super) async fn post_disks(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(request): Json<DisksRequest>,
) -> Result<Json<DisksAnswer>, ApiError> {
    caller.require_project(&request.project)?;
    let count = request.disks.len();
    if count > MAX_NEW_DISKS {
        let detail = format!("{count} disks are more than {MAX_NEW_DISKS} in one call");
        return Err(ApiError::bad_request("too-many-disks", detail));
    }
    let DisksRequest { project, image: name, disks } = request;
    let image = usable(&state, &name, &project).await?;
    let made = disks.into_iter().map(async |NewDisk { lease, node, mac }| {
        let request = DiskRequest { project: project.clone(), node, image: name.clone(), mac };
        match make(&state, lease, &request, &image).await {
            Ok(disk) => DiskOutcome::Made { disk },
            Err(error) => DiskOutcome::Failed { lease, problem: error.problem().clone() },
        }
    });
    let outcomes = futures_util::stream::iter(made).buffered(MADE_AT_ONCE).collect().await;
    Ok(Json(DisksAnswer { outcomes }))
}

/// The image, if the project may make disks of it and it is the one that was recorded.
async fn usable(state: &AppState, image: &ImageId, project: &ProjectId) -> Result<ImageRecord, ApiError> {
    let found = state.catalogue.db.image(image).await.map_err(|error| db_failed(&error))?;
    // Another project's image is as good as none, and is not told apart from one.
    let found = found.filter(|image| image.is_for(project)).ok_or_else(|| no_image(image, project))?;
    state.catalogue.checked(&found).await.map_err(|error| catalogue_failed(&error))?;
    Ok(found)
}

async fn make(state: &AppState, lease: LeaseId, request: &DiskRequest, image: &ImageRecord) -> Result<Disk, ApiError> {
    let exporter = &state.exporter;
    let _alone = exporter.lock(lease).await;
    let record = exporter.db.put_disk(lease, request, image.key).await.map_err(|error| db_failed(&error))?;
    let record = record.ok_or_else(|| no_image(&request.image, &request.project))?;
    let asked = (&request.project, &request.node, image.key, request.mac);
    if asked != (&record.project, &record.node, record.image, record.mac) {
        let nic = record.mac.map_or_else(|| "without MAC address".to_owned(), |mac| format!("with MAC address {mac}"));
        let (image, node) = (image_name(state, record.image).await?, &record.node);
        let detail = format!("lease {lease} has a disk of image `{image}` for node `{node}` {nic}");
        return Err(ApiError::conflict("other-disk", detail).with_hint("delete it first"));
    }
    exporter.prepare_disk(&record).await.map_err(|error| export_failed(&error))?;
    tracing::info!(event = "disk.ready", disk = %record.id, %lease, image = %image.name, "disk is ready");
    Ok(shown(state, record, image.name.clone()).await)
}

/// Makes an image of what the lease's disk holds now, in the time that it takes to write a few small files. The commands of
/// a node that runs from it wait for that long; what it has not flushed yet may be missing.
#[utoipa::path(post, path = "/v1/disks/{lease}/snapshot", params(("lease" = String, Path, format = "uuid")),
    request_body = SnapshotRequest, responses(
    (status = 200, description = "The image", body = Image),
    (status = 403, description = "Another project's", body = Problem),
    (status = 404, description = "The lease has no disk", body = Problem),
    (status = 409, description = "The name is taken, or the disk is just being exported", body = Problem),
    (status = 503, description = "The gateway that exports it does not pause", body = Problem)))]
pub(super) async fn snapshot_disk(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(lease): Path<LeaseId>,
    Json(request): Json<SnapshotRequest>,
) -> Result<Json<Image>, ApiError> {
    // To its end, whether or not the caller waits for it: a node may be waiting.
    let taken = tokio::spawn(async move { take_snapshot(&state, &caller, lease, request.name).await });
    taken.await.map_err(|error| ApiError::internal("taking a snapshot", &error))?.map(Json)
}

async fn take_snapshot(state: &AppState, caller: &Caller, lease: LeaseId, name: ImageId) -> Result<Image, ApiError> {
    let exporter = &state.exporter;
    let _alone = exporter.lock(lease).await;
    let disk = made(state, caller, lease).await?;
    let export = exporter.db.export_of_lease(lease).await.map_err(|error| db_failed(&error))?;
    if let Some(export) = export.as_ref().filter(|export| export.phase != Phase::Exported) {
        let detail = format!("the disk of lease {lease} is just being exported for admission {}", export.admission);
        return Err(ApiError::conflict("exported", detail).with_hint("try again in a moment"));
    }
    let new = NewImage {
        name,
        project: disk.project,
        kind: ImageKind::Snapshot,
        source: format!("disk {} of node {}", disk.id, disk.node),
        made_by: caller.name.clone(),
        now_ms: state.clock.now_ms(),
    };
    let taken = state.catalogue.snapshot(new, async |key| {
        let (store, disk) = (Arc::clone(&exporter.store), disk.id);
        let taking = blocking(move || store.snapshot(disk, key));
        let taken = match &export {
            Some(export) => exporter.paused(export, taking).await.map_err(SnapshotError::Export)?,
            None => taking.await,
        };
        taken.map_err(|error| SnapshotError::Catalogue(error.into()))
    });
    let image = taken.await.map_err(|error| match error {
        SnapshotError::Catalogue(error) => catalogue_failed(&error),
        SnapshotError::Export(error) => export_failed(&error),
    })?;
    let running = export.is_some();
    tracing::info!(event = "disk.snapshot", disk = %disk.id, image = %image.name, running, by = caller.name, "snapshot taken");
    Ok(crate::catalogue::shown(image))
}

/// Why a snapshot is not taken.
enum SnapshotError {
    Catalogue(CatalogueError),
    /// The node's export cannot be paused.
    Export(ExportError),
}

impl From<CatalogueError> for SnapshotError {
    fn from(error: CatalogueError) -> Self {
        Self::Catalogue(error)
    }
}

/// Makes the lease's disk hold what an image holds; what its node wrote since goes. Idempotent.
#[utoipa::path(post, path = "/v1/disks/{lease}/restore", params(("lease" = String, Path, format = "uuid")),
    request_body = RestoreRequest, responses(
    (status = 200, description = "The disk", body = Disk),
    (status = 403, description = "Another project's", body = Problem),
    (status = 404, description = "The lease has no disk, or its project no such image", body = Problem),
    (status = 409, description = "It is exported, or the image is of another size", body = Problem)))]
pub(super) async fn restore_disk(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(lease): Path<LeaseId>,
    Json(request): Json<RestoreRequest>,
) -> Result<Json<Disk>, ApiError> {
    let _alone = state.exporter.lock(lease).await;
    let mut disk = stopped(&state, &caller, lease).await?;
    let image = usable(&state, &request.image, &disk.project).await?;
    let (store, id) = (Arc::clone(&state.exporter.store), disk.id);
    blocking(move || store.restore(id, image.key)).await.map_err(|error| store_failed(&error))?;
    state.exporter.db.set_disk_image(disk.id, image.key).await.map_err(|error| db_failed(&error))?;
    disk.image = image.key;
    tracing::info!(event = "disk.restored", disk = %disk.id, image = %image.name, by = caller.name, "disk restored");
    Ok(Json(shown(&state, disk, image.name).await))
}

/// Gives the lease's disk, with all that was written to it, to another lease and node of its project.
#[utoipa::path(post, path = "/v1/disks/{lease}/move", params(("lease" = String, Path, format = "uuid")),
    request_body = NewDisk, responses(
    (status = 200, description = "The disk", body = Disk),
    (status = 403, description = "Another project's", body = Problem),
    (status = 404, description = "The lease has no disk", body = Problem),
    (status = 409, description = "It is exported, or the other lease has a disk", body = Problem)))]
pub(super) async fn move_disk(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(lease): Path<LeaseId>,
    Json(to): Json<NewDisk>,
) -> Result<Json<Disk>, ApiError> {
    let exporter = &state.exporter;
    let _alone = exporter.lock_both(lease, to.lease).await;
    let disk = stopped(&state, &caller, lease).await?;
    if !exporter.db.move_disk(disk.id, &to).await.map_err(|error| db_failed(&error))? {
        let detail = format!("moving the disk of lease {lease}: lease {} has a disk", to.lease);
        return Err(ApiError::conflict("other-disk", detail).with_hint("delete that first"));
    }
    tracing::info!(event = "disk.moved", disk = %disk.id, from = %lease, to = %to.lease, node = %to.node, by = caller.name, "disk moved");
    let name = image_name(&state, disk.image).await?;
    Ok(Json(shown(&state, DiskRecord { lease: to.lease, node: to.node, mac: to.mac, ..disk }, name).await))
}

/// A lease's disk that is made, that the caller may change, and that no node has open.
async fn stopped(state: &AppState, caller: &Caller, lease: LeaseId) -> Result<DiskRecord, ApiError> {
    let disk = made(state, caller, lease).await?;
    not_exported(state, lease).await?;
    Ok(disk)
}

/// A lease's disk that is made, and that the caller may change.
async fn made(state: &AppState, caller: &Caller, lease: LeaseId) -> Result<DiskRecord, ApiError> {
    let exporter = &state.exporter;
    let disk = exporter.db.disk(lease).await.map_err(|error| db_failed(&error))?;
    let disk = disk.ok_or_else(|| ApiError::not_found(format!("lease {lease} has no disk")))?;
    caller.require_project(&disk.project)?;
    exporter.prepare_disk(&disk).await.map_err(|error| export_failed(&error))?;
    Ok(disk)
}

async fn not_exported(state: &AppState, lease: LeaseId) -> Result<(), ApiError> {
    let export = state.exporter.db.export_of_lease(lease).await.map_err(|error| db_failed(&error))?;
    let Some(export) = export else { return Ok(()) };
    let detail = format!(
        "the disk of lease {lease} is exported for admission {}: its node may be writing to it",
        export.admission
    );
    Err(ApiError::conflict("exported", detail).with_hint("turn the node off and end its admission first"))
}

/// Lists the disks that the caller may see.
#[utoipa::path(get, path = "/v1/disks", responses((status = 200, body = Vec<Disk>)))]
pub(super) async fn get_disks(State(state): State<Arc<AppState>>, caller: Caller) -> Result<Json<Vec<Disk>>, ApiError> {
    let records = state.exporter.db.disks().await.map_err(|error| db_failed(&error))?;
    let images = state.exporter.db.images().await.map_err(|error| db_failed(&error))?;
    let names: HashMap<ImageKey, ImageId> = images.into_iter().map(|image| (image.key, image.name)).collect();
    // A disk's image is on record as long as the disk is; one that was read between the two lists is new.
    let seen = records.into_iter().filter(|record| may_see(&caller, &record.project));
    let named = seen.filter_map(|record| names.get(&record.image).map(|name| (record, name.clone())));
    let shown = named.map(async |(record, name)| shown(&state, record, name).await);
    // How much each has written may be counted on Ceph.
    Ok(Json(futures_util::stream::iter(shown).buffered(COUNTED_AT_ONCE).collect().await))
}

/// Deletes the lease's disk and all that its node wrote. Idempotent.
#[utoipa::path(delete, path = "/v1/disks/{lease}", params(("lease" = String, Path, format = "uuid")), responses(
    (status = 204, description = "It is gone"),
    (status = 403, description = "Another project's", body = Problem),
    (status = 409, description = "It is exported", body = Problem)))]
pub(super) async fn delete_disk(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Path(lease): Path<LeaseId>,
) -> Result<StatusCode, ApiError> {
    let exporter = &state.exporter;
    let _alone = exporter.lock(lease).await;
    let record = exporter.db.disk(lease).await.map_err(|error| db_failed(&error))?;
    let Some(record) = record else { return Ok(StatusCode::NO_CONTENT) };
    // A lease's end is isolation's business: it deletes the disk too.
    caller.require_service().or_else(|_| caller.require_project(&record.project))?;
    not_exported(&state, lease).await?;
    let (store, disk) = (Arc::clone(&exporter.store), record.id);
    blocking(move || store.remove_disk(disk)).await.map_err(|error| store_failed(&error))?;
    exporter.db.remove_disk(disk).await.map_err(|error| db_failed(&error))?;
    tracing::info!(event = "disk.deleted", %disk, %lease, by = caller.name, "disk deleted");
    Ok(StatusCode::NO_CONTENT)
}

async fn image_name(state: &AppState, key: ImageKey) -> Result<ImageId, ApiError> {
    let images = state.exporter.db.images().await.map_err(|error| db_failed(&error))?;
    let found = images.into_iter().find(|image| image.key == key);
    found.map(|image| image.name).ok_or_else(|| ApiError::not_found(format!("image {key} is not on record")))
}

async fn shown(state: &AppState, record: DiskRecord, image: ImageId) -> Disk {
    let (store, disk) = (Arc::clone(&state.exporter.store), record.id);
    // A disk that is being made has no files yet.
    let written = blocking(move || store.disk_bytes(disk)).await.unwrap_or(0);
    let DiskRecord { id, lease, project, node, .. } = record;
    Disk { id, lease, project, node, image, written_bytes: written }
}
