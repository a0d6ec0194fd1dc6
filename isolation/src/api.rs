//! The HTTP API (HTTPS, bearer tokens, RFC 9457 problems). Who may: operators everything; services what the boot path
//! needs (airlock context, admissions, bad verdicts, boot records); projects their own leases and nodes.

mod admissions;
mod inventory;
mod leases;
mod nodes;

use crate::config::Config;
use crate::drivers::SiteDrivers;
use crate::fleet::Fleet;
use crate::store::{AuditEvent, Store};
use assay_service::clock::Clock;
use assay_service::error::ApiError;
use assay_wire::isolation as wire;
use axum::Router;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts};
use axum::routing::{delete, get, post};
use std::sync::Arc;
use utoipa::OpenApi;

/// What handlers work with.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) store: Store,
    pub(crate) fleet: Fleet,
    pub(crate) drivers: Arc<SiteDrivers>,
    pub(crate) config: Config,
    pub(crate) clock: Arc<dyn Clock>,
}

/// A JSON body; what is none is answered as a problem.
#[derive(FromRequest)]
#[from_request(via(axum::Json), rejection(BadInput))]
pub(crate) struct Body<T>(pub(crate) T);

/// Names in the path.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(BadInput))]
pub(crate) struct Named<T>(pub(crate) T);

/// Query parameters.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(BadInput))]
pub(crate) struct Asked<T>(pub(crate) T);

/// Input that does not parse.
pub(crate) struct BadInput(ApiError);

impl axum::response::IntoResponse for BadInput {
    fn into_response(self) -> axum::response::Response {
        self.0.into_response()
    }
}

impl From<JsonRejection> for BadInput {
    fn from(rejection: JsonRejection) -> Self {
        Self(ApiError::bad_request("bad-body", rejection.body_text()))
    }
}

impl From<PathRejection> for BadInput {
    fn from(rejection: PathRejection) -> Self {
        Self(ApiError::bad_request("bad-path", rejection.body_text()))
    }
}

impl From<QueryRejection> for BadInput {
    fn from(rejection: QueryRejection) -> Self {
        Self(ApiError::bad_request("bad-query", rejection.body_text()))
    }
}

pub(crate) fn router(api: Api) -> Router {
    Router::new()
        .route("/v1/projects", get(inventory::projects).post(inventory::add_project))
        .route("/v1/networks", get(inventory::networks).post(inventory::add_network))
        .route("/v1/switches", get(inventory::switches).post(inventory::add_switch))
        .route("/v1/nodes", get(nodes::list).post(inventory::add_node))
        .route("/v1/nodes/{node}", get(nodes::show).delete(nodes::remove))
        .route("/v1/nodes/{node}/airlock", get(nodes::airlock))
        .route("/v1/nodes/{node}/clear", post(nodes::clear))
        .route("/v1/nodes/{node}/cycle", post(nodes::cycle))
        .route("/v1/nodes/{node}/reject", post(nodes::reject))
        .route("/v1/leases", get(leases::list).post(leases::ask))
        .route("/v1/leases/{lease}", delete(leases::end))
        .route("/v1/admissions", get(admissions::list).post(admissions::admit))
        .route("/v1/admissions/{admission}", get(admissions::show).delete(admissions::revoke))
        .route("/v1/admission-renewals", post(admissions::renew).layer(DefaultBodyLimit::max(wire::MAX_RENEWAL_BYTES)))
        .route("/v1/boot-records", get(nodes::boot_records))
        .route("/v1/events", get(nodes::events))
        .with_state(api)
}

/// The API's OpenAPI document.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Assay isolation", description = "The relying party: nodes, networks, switches, leases, admissions."),
    paths(
        inventory::projects,
        inventory::add_project,
        inventory::networks,
        inventory::add_network,
        inventory::switches,
        inventory::add_switch,
        inventory::add_node,
        nodes::list,
        nodes::show,
        nodes::remove,
        nodes::airlock,
        nodes::clear,
        nodes::cycle,
        nodes::reject,
        nodes::boot_records,
        nodes::events,
        leases::list,
        leases::ask,
        leases::end,
        admissions::list,
        admissions::show,
        admissions::admit,
        admissions::revoke,
        admissions::renew
    ),
    components(schemas(
        wire::Project,
        wire::Network,
        wire::Switch,
        wire::Node,
        wire::NodeStatus,
        wire::LeaseRequest,
        wire::NodeLease,
        wire::AdmissionRequest,
        wire::Admission,
        wire::Admissions,
        wire::RenewalRequest,
        wire::RenewalAnswer,
        wire::RevokeRequest,
        wire::RejectRequest,
        wire::AirlockContext,
        wire::BootRecords,
        AuditEvent,
        assay_wire::problem::Problem
    ))
)]
struct Document;
