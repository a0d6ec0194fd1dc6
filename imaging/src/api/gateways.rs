//! Gateways: one a project, on its provisioning network. Projects that share a network share its gateway, and each has a
//! record of it.

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
    (status = 403, description = "Operators only", body = Problem),
    (status = 409, description = "`gateway-differs`: another project's record of it says otherwise; `gateway-in-use`: \
        the project has exports at another one", body = Problem)))]
pub(super) async fn post_gateway(
    State(state): State<Arc<AppState>>,
    caller: Caller,
    Json(gateway): Json<Gateway>,
) -> Result<Json<Gateway>, ApiError> {
    caller.require_operator()?;
    check(&gateway).map_err(|detail| ApiError::bad_request("gateway-invalid", detail))?;
    let known = state.exporter.db.gateways().await.map_err(|error| db_failed(&error))?;
    if let Some(other) = known.iter().find(|other| contradicts(other, &gateway)) {
        let detail = format!(
            "project {} has the gateway at {} with portal {}, relay {} and subnet {}",
            other.project, other.control_socket, other.portal, other.relay, other.subnet
        );
        return Err(ApiError::conflict("gateway-differs", detail)
            .with_hint("say the same to share it, or give it a control socket of its own"));
    }
    if !state.exporter.db.put_gateway(&gateway).await.map_err(|error| db_failed(&error))? {
        let detail = format!("project {} has exports at its gateway, which is another one", gateway.project);
        return Err(ApiError::conflict("gateway-in-use", detail).with_hint("end its admissions first"));
    }
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

/// Whether two projects' records are of one gateway, and do not agree.
fn contradicts(known: &Gateway, new: &Gateway) -> bool {
    let said = |gateway: &Gateway| (gateway.portal, gateway.relay, gateway.subnet, gateway.router);
    known.control_socket == new.control_socket && known.project != new.project && said(known) != said(new)
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
