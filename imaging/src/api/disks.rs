//! Disks: the clone that a lease's node will get.

use super::{db_failed, export_failed, may_see, store_failed};
use crate::db::DiskRecord;
use crate::export::blocking;
use crate::service::AppState;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::id::{ImageId, ImageKey, LeaseId};
use assay_wire::imaging::{Disk, DiskRequest};
use assay_wire::problem::Problem;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use std::collections::HashMap;
use std::sync::Arc;

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
    let exporter = &state.exporter;
    let image = exporter.db.image(&request.image).await.map_err(|error| db_failed(&error))?;
    // Another project's image is as good as none, and is not told apart from one.
    let missing = || {
        let (image, project) = (&request.image, &request.project);
        ApiError::not_found(format!("project `{project}` has no image `{image}`"))
    };
    let image = image.filter(|image| image.is_for(&request.project)).ok_or_else(missing)?;
    let _alone = exporter.lock(lease).await;
    let record = exporter.db.put_disk(lease, &request, image.key).await.map_err(|error| db_failed(&error))?;
    let record = record.ok_or_else(missing)?;
    let asked = (&request.project, &request.node, image.key, request.mac);
    if asked != (&record.project, &record.node, record.image, record.mac) {
        let nic = record.mac.map_or_else(|| "without MAC address".to_owned(), |mac| format!("with MAC address {mac}"));
        let (image, node) = (image_name(&state, record.image).await?, &record.node);
        let detail = format!("lease {lease} has a disk of image `{image}` for node `{node}` {nic}");
        return Err(ApiError::conflict("other-disk", detail).with_hint("delete it first"));
    }
    exporter.prepare_disk(&record).await.map_err(|error| export_failed(&error))?;
    tracing::info!(event = "disk.ready", disk = %record.id, %lease, image = %record.image, "disk is ready");
    Ok(Json(shown(&state, record, request.image).await))
}

/// Lists the disks that the caller may see.
#[utoipa::path(get, path = "/v1/disks", responses((status = 200, body = Vec<Disk>)))]
pub(super) async fn get_disks(State(state): State<Arc<AppState>>, caller: Caller) -> Result<Json<Vec<Disk>>, ApiError> {
    let records = state.exporter.db.disks().await.map_err(|error| db_failed(&error))?;
    let images = state.exporter.db.images().await.map_err(|error| db_failed(&error))?;
    let names: HashMap<ImageKey, ImageId> = images.into_iter().map(|image| (image.key, image.name)).collect();
    let mut disks = Vec::new();
    for record in records.into_iter().filter(|record| may_see(&caller, &record.project)) {
        // A disk's image is on record as long as the disk is; one that was read between the two lists is new.
        if let Some(name) = names.get(&record.image) {
            disks.push(shown(&state, record, name.clone()).await);
        }
    }
    Ok(Json(disks))
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
    if let Some(export) = exporter.db.export_of_lease(lease).await.map_err(|error| db_failed(&error))? {
        let detail = format!("the disk of lease {lease} is exported for admission {}", export.admission);
        return Err(ApiError::conflict("exported", detail).with_hint("end the admission first"));
    }
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
