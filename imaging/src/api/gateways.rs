//! Gateways: one a project, on its provisioning network.

use super::{db_failed, may_see};
use crate::address;
use crate::service::AppState;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::imaging::Gateway;
use assay_wire::problem::Problem;
use axum::Json;
use axum::extract::State;
use std::sync::Arc;

/// Registers a project's gateway, or replaces it.
#[utoipa::path(post, path = "/v1/gateways", request_body = Gateway, responses(
    (status = 200, description = "On record", body = Gateway),
    (status = 400, description = "Its addresses do not fit together", body = Problem),
    (status = 403, description = "Operators only", body = Problem)))]
pub(super) async fn post_gateway(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(gateway): Json<Gateway>,
) -> Result<Json<Gateway>, ApiError> {
    caller.require_operator()?;
    check(&gateway).map_err(|detail| ApiError::bad_request("gateway-invalid", detail))?;
    state.exporter.db.put_gateway(&gateway).await.map_err(|error| db_failed(&error))?;
    tracing::info!(event = "gateway.recorded", project = %gateway.project, by = caller.name, "gateway recorded");
    Ok(Json(gateway))
}

/// Lists the gateways that the caller may see.
#[utoipa::path(get, path = "/v1/gateways", responses((status = 200, body = Vec<Gateway>)))]
pub(super) async fn get_gateways(
    State(state): State<Arc<AppState>>,
    caller: Caller,
) -> Result<Json<Vec<Gateway>>, ApiError> {
    let mut gateways = state.exporter.db.gateways().await.map_err(|error| db_failed(&error))?;
    gateways.retain(|gateway| may_see(&caller, &gateway.project));
    Ok(Json(gateways))
}

/// Whether nodes could live with this gateway.
fn check(gateway: &Gateway) -> Result<(), String> {
    let subnet = gateway.subnet;
    if address::hosts(subnet).next().is_none() {
        return Err(format!("subnet {subnet} has no host .50 for a node: use a /25 or larger"));
    }
    if let Some(router) = gateway.router.filter(|router| !subnet.contains(router)) {
        return Err(format!("router {router} is outside the subnet {subnet}"));
    }
    if !gateway.control_socket.starts_with('/') {
        return Err(format!("control socket `{}` is not an absolute path", gateway.control_socket));
    }
    Ok(())
}
