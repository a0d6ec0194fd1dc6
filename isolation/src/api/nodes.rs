//! Nodes as they are, and what may be asked of them.

use super::inventory::sees;
use super::{Api, Asked, Body, Named};
use crate::admission::Airlocked;
use crate::commands::Command;
use crate::record::NodeRecord;
use crate::store::AuditEvent;
use assay_service::auth::Caller;
use assay_service::error::ApiError;
use assay_wire::id::NodeId;
use assay_wire::isolation::{AirlockContext, BootRecord, BootRecords, NodeState, NodeStatus, RejectRequest};
use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;

/// How long a poll may wait.
const LONG_POLL: Duration = Duration::from_secs(25);

pub(super) async fn record(api: &Api, node: &NodeId) -> Result<NodeRecord, ApiError> {
    api.store.node(node).await?.ok_or_else(|| ApiError::not_found(format!("there is no node {node}")))
}

pub(super) async fn status(api: &Api, node: &NodeId) -> Result<NodeStatus, ApiError> {
    Ok(record(api, node).await?.status())
}

/// Whether a caller may see a node: it is free, or under a lease of its project.
fn sees_node(caller: &Caller, status: &NodeStatus) -> bool {
    status.lease.as_ref().map_or(status.state == NodeState::Free, |lease| sees(caller, &lease.project))
        || caller.require_service().is_ok()
}

/// Whether a node is under a lease of the caller's project.
fn sees_leased(caller: &Caller, record: &NodeRecord) -> bool {
    record.lease.as_ref().is_some_and(|lease| caller.require_project(&lease.lease.project).is_ok())
}

async fn all(api: &Api) -> Result<Vec<NodeRecord>, ApiError> {
    let mut nodes = Vec::new();
    for name in api.store.node_names().await? {
        nodes.extend(api.store.node(&name).await?);
    }
    Ok(nodes)
}

/// All nodes; a project's token sees free ones and its own.
#[utoipa::path(get, path = "/v1/nodes", responses((status = 200, body = Vec<NodeStatus>)))]
pub(super) async fn list(caller: Caller, State(api): State<Api>) -> Result<Json<Vec<NodeStatus>>, ApiError> {
    let nodes = all(&api).await?.iter().map(NodeRecord::status).collect::<Vec<_>>();
    Ok(Json(nodes.into_iter().filter(|n| sees_node(&caller, n)).collect()))
}

/// One node.
#[utoipa::path(get, path = "/v1/nodes/{node}",
    params(("node" = String, Path)),
    responses((status = 200, body = NodeStatus)))]
pub(super) async fn show(
    caller: Caller,
    State(api): State<Api>,
    Named(node): Named<NodeId>,
) -> Result<Json<NodeStatus>, ApiError> {
    let status = status(&api, &node).await?;
    if !sees_node(&caller, &status) {
        return Err(ApiError::not_found(format!("there is no node {node}")));
    }
    Ok(Json(status))
}

/// Removes a free node from the record.
#[utoipa::path(delete, path = "/v1/nodes/{node}", params(("node" = String, Path)), responses((status = 200)))]
pub(super) async fn remove(
    caller: Caller,
    State(api): State<Api>,
    Named(node): Named<NodeId>,
) -> Result<Json<()>, ApiError> {
    caller.require_operator()?;
    api.fleet.ask(&node, Command::Remove).await.map(Json)
}

/// What a verifier must know before it appraises a node. A project's own verifier asks with the project's token, and hears
/// of nodes under the project's leases.
#[utoipa::path(get, path = "/v1/nodes/{node}/airlock", params(("node" = String, Path)),
    responses((status = 200, body = AirlockContext), (status = 409, description = "`not-in-airlock`")))]
pub(super) async fn airlock(
    caller: Caller,
    State(api): State<Api>,
    Named(node): Named<NodeId>,
) -> Result<Json<AirlockContext>, ApiError> {
    let record = match caller.require_service() {
        Ok(()) => record(&api, &node).await?,
        Err(forbidden) => {
            // Not even whether there is such a node.
            let record = api.store.node(&node).await?.filter(|record| sees_leased(&caller, record));
            record.ok_or(forbidden)?
        }
    };
    Ok(Json(Airlocked::of(&record)?.context()))
}

/// An operator clears a rejected node: Free again. Ends its lease, if it is still under one.
#[utoipa::path(post, path = "/v1/nodes/{node}/clear",
    params(("node" = String, Path)),
    responses((status = 200, body = NodeStatus)))]
pub(super) async fn clear(
    caller: Caller,
    State(api): State<Api>,
    Named(node): Named<NodeId>,
) -> Result<Json<NodeStatus>, ApiError> {
    caller.require_operator()?;
    api.fleet.ask(&node, Command::Clear).await.map(Json)
}

/// Closes the port and takes the node through the airlock again, under the same lease.
#[utoipa::path(post, path = "/v1/nodes/{node}/cycle",
    params(("node" = String, Path)),
    responses((status = 200, body = NodeStatus)))]
pub(super) async fn cycle(
    caller: Caller,
    State(api): State<Api>,
    Named(node): Named<NodeId>,
) -> Result<Json<NodeStatus>, ApiError> {
    match record(&api, &node).await?.lease {
        Some(lease) => caller.require_project(&lease.lease.project)?,
        None => caller.require_operator()?,
    }
    api.fleet.ask(&node, Command::Cycle).await.map(Json)
}

/// A verifier reports a bad verdict, at boot or at run time. A report on another boot than the node's current one changes
/// nothing. A project's own verifier reports with the project's token, on nodes under the project's leases: to close
/// takes no agreement.
#[utoipa::path(post, path = "/v1/nodes/{node}/reject", params(("node" = String, Path)), request_body = RejectRequest,
    responses((status = 200, body = NodeStatus)))]
pub(super) async fn reject(
    caller: Caller,
    State(api): State<Api>,
    Named(node): Named<NodeId>,
    Body(request): Body<RejectRequest>,
) -> Result<Json<NodeStatus>, ApiError> {
    if let Err(forbidden) = caller.require_service() {
        // Not even whether there is such a node.
        api.store.node(&node).await?.filter(|record| sees_leased(&caller, record)).ok_or(forbidden)?;
    }
    api.fleet.ask(&node, |reply| Command::Reject(request, reply)).await.map(Json)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AfterRevision {
    after: Option<u64>,
}

/// Waits until the revision is another than the caller knows, if it knows one. To be asked before the records are read:
/// a change in between is answered twice, never missed.
pub(super) async fn moved_on(mut revisions: watch::Receiver<u64>, asked: &AfterRevision) -> u64 {
    if let Some(after) = asked.after {
        // Not "greater": a revision that we never gave means that the caller knows another past.
        let _ = timeout(LONG_POLL, revisions.wait_for(|now| *now != after)).await;
    }
    *revisions.borrow_and_update()
}

/// What netboot must know of every node, once it is something else than at revision `after`, or after 25 s.
#[utoipa::path(get, path = "/v1/boot-records",
    params(("after" = Option<u64>, Query)),
    responses((status = 200, body = BootRecords)))]
pub(super) async fn boot_records(
    caller: Caller,
    State(api): State<Api>,
    Asked(asked): Asked<AfterRevision>,
) -> Result<Json<BootRecords>, ApiError> {
    caller.require_service()?;
    let revision = moved_on(api.store.revision(), &asked).await;
    let mut records = Vec::new();
    for node in all(&api).await? {
        if let Some(nic) = node.boot_nic() {
            let boot = node.boot.filter(|_| node.state == NodeState::Airlock);
            records.push(BootRecord { node: node.name.clone(), mac: nic.nic.mac, state: node.state, boot });
        }
    }
    Ok(Json(BootRecords { revision, records }))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventsAfter {
    after: Option<String>,
    limit: Option<u16>,
}

/// The audit log: up to `limit` (1,000) entries after the id `after`, oldest first.
#[utoipa::path(get, path = "/v1/events", params(("after" = Option<String>, Query), ("limit" = Option<u16>, Query)),
    responses((status = 200, body = Vec<AuditEvent>)))]
pub(super) async fn events(
    caller: Caller,
    State(api): State<Api>,
    Asked(asked): Asked<EventsAfter>,
) -> Result<Json<Vec<AuditEvent>>, ApiError> {
    caller.require_operator()?;
    let limit = i64::from(asked.limit.unwrap_or(1000).min(1000));
    Ok(Json(api.store.events(&asked.after.unwrap_or_default(), limit).await?))
}
