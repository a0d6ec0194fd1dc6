//! Nodes that lie, and services that die.

use super::bench::{Bench, STATE_LIMIT};
use super::soft::{Conduct, Outcome, SoftBoot, SoftFirmware, trust_soft_firmware};
use crate::error::{LabError, Result};
use serde_json::{Value, json};
use std::time::Duration;

/// Every lie is refused with its reason, and costs the node its place.
pub(super) async fn lies(bench: &Bench) -> Result<()> {
    let firmware = SoftFirmware::new();
    trust_soft_firmware(bench, NODE, &firmware).await?;
    for (conduct, word) in Conduct::DISHONEST {
        let name = conduct.name();
        let mut boot = SoftBoot::cycle(bench, NODE, &firmware).await?;
        if conduct == Conduct::ForeignAk {
            boot.borrow_tpm(bench, LENDER).await?;
        }
        let Outcome::Rejected(reasons) = boot.attest(conduct).await? else {
            return Err(LabError::unexpected(name, "the node was believed"));
        };
        if !reasons.iter().any(|reason| reason.contains(word)) {
            return Err(LabError::unexpected(name, format!("no reason says `{word}`: {reasons:?}")));
        }
        let status = bench.services.wait_for_state(NODE, "rejected", STATE_LIMIT).await?;
        expect_closed(&status)?;
        bench.events.lab("lie.refused", &json!({ "node": NODE, "conduct": name, "reasons": reasons }));
        bench.tell(&format!("  {name}: {}", reasons.join("; ")));
    }
    // The same node, honest, is believed: it was the lies that were refused, not the lab.
    let boot = SoftBoot::cycle(bench, NODE, &firmware).await?;
    boot.run_to_handover().await?;
    let status = bench.services.wait_for_state(NODE, "allocated", STATE_LIMIT).await?;
    bench.events.lab("honesty.believed", &json!({ "node": NODE, "status": status }));
    Ok(())
}

/// `assay up` dies after each entry of the release's journal; after its restart there is all of the release or none.
pub(super) async fn crashes(bench: &mut Bench) -> Result<()> {
    let firmware = SoftFirmware::new();
    trust_soft_firmware(bench, NODE, &firmware).await?;
    for step in JOURNAL_STEPS {
        bench.services.kill().await;
        bench.services.arm(&format!("release::{step}=return"));
        bench.services.resume().await?;
        let boot = SoftBoot::cycle(bench, NODE, &firmware).await?;
        let (services, events) = (&mut bench.services, &bench.events);
        // The agent goes on knocking while the services are away, as a real one does.
        let (agent, restarted) = tokio::join!(boot.run_to_handover(), async {
            services.wait_for_end(CRASH_LIMIT).await?;
            services.resume().await
        });
        restarted?;
        let outcome = settled(bench).await?;
        let agent = agent.as_ref().err().map(LabError::chain);
        events_of_crash(events, step, outcome, agent.as_deref());
        bench.tell(&format!("  died at `{step}`: {outcome} after the restart"));
    }
    Ok(())
}

fn events_of_crash(events: &crate::events::EventLog, step: &str, outcome: &str, agent: Option<&str>) {
    events.lab("crash.survived", &json!({ "node": NODE, "step": step, "outcome": outcome, "agent": agent }));
}

/// Waits until every release is at its end, then compares ports, admissions and exports: all or nothing.
async fn settled(bench: &Bench) -> Result<&'static str> {
    let doing = "waiting for every release to be at its end";
    let release = crate::command::wait_until(doing, SETTLE_LIMIT, || async {
        let releases = bench.services.client(&["release", "list"]).await.ok()?;
        let releases = releases.as_array()?;
        let done = |r: &&Value| matches!(r.get("step").and_then(Value::as_str), Some("handed-over" | "unwound"));
        if releases.iter().all(|r| done(&r)) { releases.last().cloned() } else { None }
    })
    .await?;
    let status = bench.services.node(NODE).await?;
    let admissions = bench.services.client(&["admission", "list"]).await?;
    let live = admissions.as_array().into_iter().flatten().any(|a| a.get("revoked").is_none_or(Value::is_null));
    let exports = bench.services.client(&["export", "list"]).await?;
    let exported = exports.as_array().is_some_and(|list| !list.is_empty());
    let open = status.pointer("/nics/0/observed/intent").and_then(Value::as_str) == Some("access");
    match (open, live, exported) {
        (true, true, true) => Ok("all of it"),
        (false, false, false) => Ok("none of it"),
        (open, live, exported) => Err(LabError::unexpected(
            "comparing after a crash",
            format!("port open: {open}, admission: {live}, export: {exported}, release: {release}, node: {status}"),
        )),
    }
}

pub(super) fn expect_closed(status: &Value) -> Result<()> {
    let observed = status.pointer("/nics/0/observed/intent").and_then(Value::as_str);
    if observed == Some("quarantine") {
        return Ok(());
    }
    Err(LabError::unexpected("reading the port back", format!("expected quarantine, found {status}")))
}

pub(super) const NODE: &str = "s1";
/// Never leased: it lends its TPM to forgers.
const LENDER: &str = "s2";
const JOURNAL_STEPS: [&str; 6] = ["admitted", "exported", "ready", "moved", "granted", "handed-over"];
const CRASH_LIMIT: Duration = Duration::from_secs(90);
const SETTLE_LIMIT: Duration = Duration::from_secs(400);
