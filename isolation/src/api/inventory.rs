//! Registering projects, networks, switches and nodes: an operator's work.

use super::{Api, Body};
use crate::store::NewNode;
use crate::validate;
use assay_service::auth::{Caller, Role};
use assay_service::error::ApiError;
use assay_wire::isolation::{Bmc, Network, Node, NodeStatus, Project, Switch};
use axum::Json;
use axum::extract::State;

fn invalid(reason: validate::Invalid) -> ApiError {
    ApiError::bad_request("invalid", reason)
}

/// Whether a caller may see what belongs to `project`.
pub(super) fn sees(caller: &Caller, project: &assay_wire::id::ProjectId) -> bool {
    match &caller.role {
        Role::Operator | Role::Service => true,
        Role::Project(own) => own == project,
    }
}

/// All projects; a project's token sees its own.
#[utoipa::path(get, path = "/v1/projects", responses((status = 200, body = Vec<Project>)))]
pub(super) async fn projects(caller: Caller, State(api): State<Api>) -> Result<Json<Vec<Project>>, ApiError> {
    let projects = api.store.inventory().await?.projects;
    Ok(Json(projects.into_iter().filter(|p| sees(&caller, &p.name)).collect()))
}

/// Registers a project, or replaces the verifier keys that a known one trusts.
#[utoipa::path(post, path = "/v1/projects", request_body = Project, responses((status = 200, body = Project)))]
pub(super) async fn add_project(
    caller: Caller,
    State(api): State<Api>,
    Body(project): Body<Project>,
) -> Result<Json<Project>, ApiError> {
    caller.require_operator()?;
    validate::project(&project).map_err(invalid)?;
    api.store.put_project(&project).await?;
    Ok(Json(project))
}

/// All networks; a project's token sees its own and those that are shared with it.
#[utoipa::path(get, path = "/v1/networks", responses((status = 200, body = Vec<Network>)))]
pub(super) async fn networks(caller: Caller, State(api): State<Api>) -> Result<Json<Vec<Network>>, ApiError> {
    let networks = api.store.inventory().await?.networks;
    let joins = |n: &Network| std::iter::once(&n.project).chain(&n.shared_with).any(|project| sees(&caller, project));
    Ok(Json(networks.into_iter().filter(joins).collect()))
}

/// Registers a network. Its VLAN must be nobody else's.
#[utoipa::path(post, path = "/v1/networks", request_body = Network, responses((status = 200, body = Network)))]
pub(super) async fn add_network(
    caller: Caller,
    State(api): State<Api>,
    Body(network): Body<Network>,
) -> Result<Json<Network>, ApiError> {
    caller.require_operator()?;
    validate::network(&network, &api.store.inventory().await?, api.config.vlans).map_err(invalid)?;
    api.store.add_network(&network).await?;
    Ok(Json(network))
}

/// All switches.
#[utoipa::path(get, path = "/v1/switches", responses((status = 200, body = Vec<Switch>)))]
pub(super) async fn switches(caller: Caller, State(api): State<Api>) -> Result<Json<Vec<Switch>>, ApiError> {
    caller.require_operator()?;
    Ok(Json(api.store.inventory().await?.switches))
}

/// Registers a switch.
#[utoipa::path(post, path = "/v1/switches", request_body = Switch, responses((status = 200, body = Switch)))]
pub(super) async fn add_switch(
    caller: Caller,
    State(api): State<Api>,
    Body(switch): Body<Switch>,
) -> Result<Json<Switch>, ApiError> {
    caller.require_operator()?;
    validate::switch(&switch).map_err(invalid)?;
    api.store.add_switch(&switch).await?;
    Ok(Json(switch))
}

/// Registers a node: Free, its ports set to quarantine. The answer shows whether they read back so.
#[utoipa::path(post, path = "/v1/nodes", request_body = Node, responses((status = 200, body = NodeStatus)))]
pub(super) async fn add_node(
    caller: Caller,
    State(api): State<Api>,
    Body(node): Body<Node>,
) -> Result<Json<NodeStatus>, ApiError> {
    caller.require_operator()?;
    validate::node(&node, &api.store.inventory().await?).map_err(invalid)?;
    let Node { name, bmc: Bmc::Redfish { system, username, password, ca_pem }, nics } = node;
    let sealed = api.drivers.key().seal(&name, &password).map_err(|e| ApiError::internal("sealing a password", &e))?;
    let bmc = Bmc::Redfish { system, username, password: String::new(), ca_pem };
    crate::drivers::Drivers::bmc(api.drivers.as_ref(), &name, &bmc, &sealed)
        .map_err(|e| ApiError::bad_request("invalid", assay_service::error::chain(&e)))?;
    api.store.add_node(&NewNode { name: name.clone(), bmc, password_sealed: sealed, nics }).await?;
    let reconciled = api.fleet.add(name.clone());
    // Whether it worked is in the status.
    let _ = reconciled.await;
    super::nodes::status(&api, &name).await.map(Json)
}
