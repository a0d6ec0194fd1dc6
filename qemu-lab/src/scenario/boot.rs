//! Whole boots, through real firmware.

use super::bench::{BOOT_LIMIT, Bench, STATE_LIMIT};
use crate::command::{run, wait_until};
use crate::error::{LabError, Result};
use crate::events::Event;
use crate::netns::Netns;
use crate::services::IMAGE;
use crate::steps::{ANSWERED, BootSteps, Progress};
use assay_wire::step::Step;
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::time::Duration;

/// The two nodes of the built-in topology, one after the other.
pub(super) async fn good_and_tampered(bench: &Bench) -> Result<()> {
    bench.trust_the_firmware().await?;
    good_node(bench, GOOD_NODE).await?;
    tampered_node(bench, TAMPERED_NODE).await
}

/// A good node is leased, proves itself, and answers on its tenant's network as its tenant's Debian.
pub(super) async fn good_node(bench: &Bench, node: &str) -> Result<()> {
    let network = bench.network()?;
    bench.tell(&format!("leasing {node} to {} with {IMAGE}", network.project));
    let position = bench.events.position();
    bench.services.lease(node, &bench.site.topology).await?;
    let booted = |event: &Event| event.is(Step::TenantBooted.event(), node) || is_refusal(event, node);
    let last = bench.events.wait_for("the tenant's kernel to start", position, BOOT_LIMIT, booted).await?;
    if is_refusal(&last, node) {
        let verdict = bench.services.client(&["verdict", "show", node]).await?;
        return Err(LabError::unexpected(format!("booting {node}"), format!("it was refused: {verdict}")));
    }
    let address = first_node_address(bench)?;
    let peer = &bench.site.project(network.project.as_str())?.peer;
    let page =
        wait_until("waiting for the tenant's system to answer", TENANT_LIMIT, || page(peer, address, "")).await?;
    bench.events.lab(ANSWERED, &json!({ "node": node, "address": address, "page": page.trim() }));
    bench.tell(&format!("  {node} answers at http://{address}/: {}", page.trim()));
    silent_in_the_airlock(bench, address).await?;
    expect_port(&bench.services.node(node).await?, "access")?;
    super::tenant::goes_on_attesting(bench, node).await?;
    match BootSteps::read(node, &bench.events.since(position)).progress() {
        Progress::Complete => Ok(()),
        Progress::Missing(step) => Err(LabError::unexpected(format!("booting {node}"), format!("{step} is missing"))),
        Progress::OutOfOrder(step) => {
            Err(LabError::unexpected(format!("booting {node}"), format!("{step} came before the step before it")))
        }
    }
}

/// A node with a changed ramdisk is refused, and gets neither network nor disk nor secret.
async fn tampered_node(bench: &Bench, node: &str) -> Result<()> {
    bench.tell(&format!("leasing {node}, whose ramdisk has one byte changed"));
    let position = bench.events.position();
    bench.services.lease(node, &bench.site.topology).await?;
    let judged = |event: &Event| event.is(Step::EvidenceAppraised.event(), node);
    bench.events.wait_for("a verdict", position, BOOT_LIMIT, judged).await?;
    let status = bench.services.wait_for_state(node, "rejected", STATE_LIMIT).await?;
    expect_port(&status, "quarantine")?;
    let verdict = bench.services.client(&["verdict", "show", node]).await?;
    let reasons: Vec<&str> =
        verdict.get("reasons").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    if !reasons.iter().any(|reason| reason.contains("PCR 4") || reason.contains("PCR 11")) {
        return Err(LabError::unexpected("reading the verdict", format!("no reason names the PCR: {reasons:?}")));
    }
    let exports = bench.services.client(&["export", "list"]).await?;
    let exported = exports.as_array().is_some_and(|list| list.iter().any(|e| e.get("node") == Some(&json!(node))));
    let after = BootSteps::read(node, &bench.events.since(position));
    if exported || after.between_ms(Step::EvidenceAppraised, Step::ImageExported).is_some() {
        return Err(LabError::unexpected(format!("refusing {node}"), "it was given an export"));
    }
    bench.events.lab("node.refused", &json!({ "node": node, "reasons": reasons }));
    bench.tell(&format!("  {node} is refused and in quarantine:"));
    reasons.iter().for_each(|reason| bench.tell(&format!("    {reason}")));
    Ok(())
}

/// The tenant resets its node: the port closes.
pub(super) async fn reset_by_the_tenant(bench: &Bench, node: &str) -> Result<()> {
    let network = bench.network()?;
    bench.tell(&format!("resetting {node} behind everybody's back"));
    bench.site.node(node)?.machine.reset().await?;
    let status = bench.services.wait_for_state(node, "rejected", STATE_LIMIT).await?;
    expect_port(&status, "quarantine")?;
    let peer = &bench.site.project(network.project.as_str())?.peer;
    nothing_is_left(bench, node, peer).await?;
    bench.events.lab("node.fenced", &json!({ "node": node }));
    bench.tell(&format!("  {node} is in quarantine"));
    Ok(())
}

/// Nothing of the node's admission is left: it does not answer, and its disk is closed.
pub(super) async fn nothing_is_left(bench: &Bench, node: &str, peer: &Netns) -> Result<()> {
    if let Some(page) = page(peer, first_node_address(bench)?, "").await {
        return Err(LabError::unexpected(format!("fencing {node}"), format!("it still answers: {page}")));
    }
    wait_until("waiting for the fenced node's export to be closed", STATE_LIMIT, || async {
        let exports = bench.services.client(&["export", "list"]).await.ok()?;
        exports.as_array().is_some_and(Vec::is_empty).then_some(())
    })
    .await
}

/// A node that was cut off is sent through the airlock again, and its port opens again.
pub(super) async fn again_through_the_airlock(bench: &Bench, node: &str) -> Result<()> {
    bench.tell(&format!("sending {node} through the airlock again"));
    let position = bench.events.position();
    bench.services.client(&["node", "cycle", node]).await?;
    let moved = |event: &Event| event.is(Step::PortMoved.event(), node);
    bench.events.wait_for("the port to open again", position, BOOT_LIMIT, moved).await?;
    let status = bench.services.wait_for_state(node, "allocated", STATE_LIMIT).await?;
    expect_port(&status, "access")
}

/// Nothing that the node runs answers from where the airlock is.
async fn silent_in_the_airlock(bench: &Bench, address: Ipv4Addr) -> Result<()> {
    // A route that says the node is in the airlock: if a frame of it came through, it would answer.
    let route = format!("{address}/32");
    Netns::Site.ip(&["route", "add", &route, "dev", crate::site::AIRLOCK_INTERFACE]).await?;
    let answer = page(&Netns::Site, address, "").await;
    Netns::Site.ip(&["route", "del", &route, "dev", crate::site::AIRLOCK_INTERFACE]).await?;
    match answer {
        None => {
            bench.events.lab("airlock.silent", &json!({ "address": address }));
            Ok(())
        }
        Some(page) => Err(LabError::unexpected("looking from the airlock", format!("the tenant answers: {page}"))),
    }
}

/// What a tenant's system says on port 80, if it answers.
pub(super) async fn page(from: &Netns, address: Ipv4Addr, path: &str) -> Option<String> {
    let mut curl = from.command("curl");
    curl.args(["--silent", "--fail", "--max-time", "4", &format!("http://{address}/{path}")]);
    run(curl, "asking the tenant's system", PAGE_LIMIT).await.ok()
}

pub(super) fn expect_port(status: &Value, intent: &str) -> Result<()> {
    let observed = status.pointer("/nics/0/observed/intent").and_then(Value::as_str);
    if observed == Some(intent) {
        return Ok(());
    }
    Err(LabError::unexpected("reading the port back", format!("expected {intent}, found {status}")))
}

fn is_refusal(event: &Event, node: &str) -> bool {
    event.is("verdict.rejected", node)
}

/// Imaging hands out a project's addresses from `.50` on; the scenarios' good node is the first to get one.
pub(super) fn first_node_address(bench: &Bench) -> Result<Ipv4Addr> {
    let network = bench.network()?.gateway.network();
    Ok(Ipv4Addr::from(u32::from(network) + 50))
}

/// The node of the built-in topology that boots what was built.
pub(super) const GOOD_NODE: &str = "n1";
/// The one whose ramdisk has a changed byte.
const TAMPERED_NODE: &str = "n2";
/// For the tenant's system to come up, under emulation, on a busy machine.
const TENANT_LIMIT: Duration = Duration::from_secs(180);
const PAGE_LIMIT: Duration = Duration::from_secs(10);
