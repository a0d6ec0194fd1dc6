//! Imaging's HTTP API. Handlers check who may ask, and say in words what went wrong; deciding and doing are elsewhere.

mod content;
mod disks;
mod exports;
mod gateways;
mod images;
mod projects;
mod uploads;

use crate::catalogue::CatalogueError;
use crate::db::DbError;
use crate::export::ExportError;
use crate::service::AppState;
use crate::store::StoreError;
use crate::store::device::DeviceError;
use crate::tree::TreeError;
use crate::uploads::MAX_PIECE_BYTES;
use assay_service::auth::{Caller, Role};
use assay_service::error::{ApiError, chain};
use assay_wire::id::ProjectId;
use assay_wire::imaging::ImageState;
use assay_wire::isolation::MAX_RENEWAL_BYTES;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post, put};
use std::sync::Arc;
use utoipa::OpenApi as _;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "Assay imaging", description = "Golden images, disks, exports and gateways."),
    paths(
        projects::post_project,
        projects::get_projects,
        images::post_image,
        images::get_images,
        images::get_image,
        images::patch_image,
        images::delete_image,
        images::flatten_image,
        images::prepare_image,
        images::copy_image,
        content::get_content,
        uploads::post_upload,
        uploads::get_upload,
        uploads::put_piece,
        uploads::delete_upload,
        disks::put_disk,
        disks::get_disks,
        disks::delete_disk,
        disks::post_disks,
        disks::snapshot_disk,
        disks::restore_disk,
        disks::move_disk,
        exports::post_export,
        exports::get_exports,
        exports::delete_export,
        exports::post_renewals,
        gateways::post_gateway,
        gateways::get_gateways,
    ),
    components(schemas(assay_wire::problem::Problem, assay_wire::imaging::ImportStatus))
)]
struct Document;

/// The API's OpenAPI document.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

pub(crate) fn router(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/v1/projects", post(projects::post_project).get(projects::get_projects))
        .route("/v1/images", post(images::post_image).get(images::get_images))
        .route("/v1/images/{image}", get(images::get_image).patch(images::patch_image).delete(images::delete_image))
        .route("/v1/images/{image}/flatten", post(images::flatten_image))
        .route("/v1/images/{image}/prepare", post(images::prepare_image))
        .route("/v1/images/{image}/content", get(content::get_content))
        .route("/v1/images/{image}/copy", post(images::copy_image))
        .route("/v1/uploads", post(uploads::post_upload))
        .route(
            "/v1/uploads/{upload}",
            get(uploads::get_upload)
                .put(uploads::put_piece)
                .delete(uploads::delete_upload)
                .layer(DefaultBodyLimit::max(MAX_PIECE_BYTES)),
        )
        .route("/v1/disks", get(disks::get_disks).post(disks::post_disks))
        .route("/v1/disks/{lease}/snapshot", post(disks::snapshot_disk))
        .route("/v1/disks/{lease}/restore", post(disks::restore_disk))
        .route("/v1/disks/{lease}/move", post(disks::move_disk))
        .route("/v1/disks/{lease}", put(disks::put_disk).delete(disks::delete_disk))
        .route("/v1/exports", post(exports::post_export).get(exports::get_exports))
        .route("/v1/exports/{admission}", axum::routing::delete(exports::delete_export))
        .route("/v1/export-renewals", post(exports::post_renewals).layer(DefaultBodyLimit::max(MAX_RENEWAL_BYTES)))
        .route("/v1/gateways", post(gateways::post_gateway).get(gateways::get_gateways))
        .with_state(state)
}

/// Whether the caller sees what belongs to `project`.
fn may_see(caller: &Caller, project: &ProjectId) -> bool {
    match &caller.role {
        Role::Operator | Role::Service => true,
        Role::Project(own) => own == project,
    }
}

fn db_failed(error: &DbError) -> ApiError {
    ApiError::internal("reading or writing imaging's records", error)
}

fn store_failed(error: &StoreError) -> ApiError {
    match error {
        StoreError::NoImage { .. } | StoreError::NoDisk { .. } => ApiError::not_found(error),
        StoreError::HasDependents { .. } => ApiError::conflict("has-dependents", error),
        StoreError::ChainTooLong { .. } => ApiError::conflict("chain-too-long", error),
        StoreError::SizesDiffer { .. } => ApiError::conflict("sizes-differ", error),
        StoreError::Tree(TreeError::Io { .. }) => ApiError::unavailable("store", chain(error)),
        StoreError::Tree(_) => ApiError::bad_request("image-malformed", chain(error)),
        StoreError::Digest { .. } => ApiError::bad_request("digest-differs", error),
        StoreError::Device(DeviceError::Corrupt { .. }) => ApiError::conflict("image-corrupt", chain(error)),
        StoreError::Device(_) => ApiError::unavailable("store", chain(error)),
        StoreError::OutsideImportFolders { .. } => ApiError::forbidden("outside-import-folders", error),
        StoreError::Qcow2 { .. } | StoreError::Malformed { .. } => {
            ApiError::bad_request("image-malformed", chain(error))
        }
        StoreError::OtherContent { .. } => ApiError::conflict("image-corrupt", error),
        StoreError::Rbd(_) => ApiError::unavailable("store", chain(error)),
        StoreError::NoCeph { .. } => ApiError::unavailable("store", error),
        StoreError::InUse { .. } => ApiError::conflict("in-use", error),
        StoreError::Io { .. } => ApiError::unavailable("store", chain(error)),
        StoreError::Panicked { .. } | StoreError::Cancelled => ApiError::internal("working in the image store", error),
    }
}

fn catalogue_failed(error: &CatalogueError) -> ApiError {
    match error {
        CatalogueError::Db(cause) => db_failed(cause),
        CatalogueError::Store(cause) => store_failed(cause),
        CatalogueError::NameTaken(_) => ApiError::conflict("image-exists", error),
        CatalogueError::Busy(_) => ApiError::conflict("busy", error).with_hint("try again when that is done"),
        CatalogueError::NotReady { state: ImageState::Importing, .. } => {
            ApiError::conflict("not-ready", error).with_hint("import it again to go on, or delete it")
        }
        CatalogueError::NotReady { .. } => ApiError::conflict("not-ready", error),
        CatalogueError::HasDependents { .. } => ApiError::conflict("has-dependents", error)
            .with_hint("delete those first, or flatten images that were made of it"),
        CatalogueError::Tampered { .. } => {
            ApiError::conflict("image-tampered", error).with_hint("import it anew under another name")
        }
    }
}

fn export_failed(error: &ExportError) -> ApiError {
    match error {
        ExportError::Result(_) | ExportError::Disagreement(_) => ApiError::forbidden("result-refused", chain(error)),
        ExportError::Claim { .. } | ExportError::Seal { .. } | ExportError::Name { .. } => {
            ApiError::forbidden("result-unusable", chain(error))
        }
        ExportError::Ended(_) => ApiError::conflict("admission-ended", error),
        ExportError::Superseded { .. } => ApiError::conflict("superseded", error),
        ExportError::NoDisk(_) => {
            ApiError::conflict("no-disk", error).with_hint("make the lease a disk first: PUT /v1/disks/{lease}")
        }
        ExportError::OtherDisk { .. } => ApiError::forbidden("other-disk", error),
        ExportError::NoGateway(_) => {
            ApiError::conflict("no-gateway", error).with_hint("register the project's gateway: POST /v1/gateways")
        }
        ExportError::NoAddress(_) => ApiError::unavailable("no-address", error),
        ExportError::Gateway { .. } => ApiError::unavailable("gateway", chain(error)),
        ExportError::Db(cause) => db_failed(cause),
        ExportError::Store(cause) => store_failed(cause),
        ExportError::OtherGolden { .. } => ApiError::internal("checking the golden image below a disk", error),
        ExportError::Secret(_) => ApiError::internal("restoring an export", error),
    }
}
