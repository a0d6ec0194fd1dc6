//! A tenant's disk on Ceph, through an outage.

use super::bench::{BOOT_LIMIT, Bench};
use super::boot;
use crate::command::wait_until;
use crate::error::{LabError, Result};
use crate::events::Event;
use assay_wire::step::Step;
use serde_json::{Value, json};
use std::time::Duration;

/// While a node boots, nothing of Ceph answers for a while. What the node reads of its golden image is on the gateway's
/// host, so that comes all the same; what it writes waits, and arrives when Ceph is back.
pub(super) async fn boots_through_an_outage(bench: &Bench, node: &str) -> Result<()> {
    bench.trust_the_firmware().await?;
    let ceph = bench.ceph.as_ref().ok_or_else(|| LabError::unexpected("killing the OSD", "the lab has no Ceph"))?;
    let position = bench.events.position();
    let booted = |event: &Event| event.is(Step::TenantBooted.event(), node);
    let outages = async {
        bench.events.wait_for("the tenant's kernel to start", position, BOOT_LIMIT, booted).await?;
        let mut written = wait_for_writes(bench, node, 0).await?;
        for _ in 0..MOST_OUTAGES {
            bench.tell("  the OSD is killed");
            ceph.kill_osd().await?;
            bench.events.lab("osd.killed", &json!({ "export": written }));
            tokio::time::sleep(OUTAGE).await;
            ceph.start_osd().await?;
            bench.events.lab("osd.started", &json!({}));
            bench.tell(&format!("  the OSD is back after {} s", OUTAGE.as_secs()));
            written = wait_for_writes(bench, node, number(&written, "/writes/count")?).await?;
            let slowest_ms = number(&written, "/writes/p99_us")? / 1000;
            if slowest_ms >= WAITED.as_millis().try_into().unwrap_or(u64::MAX) {
                bench.events.lab("outage.survived", &json!({ "node": node, "export": written }));
                bench.tell(&format!("  {node} goes on; a write of its had waited {slowest_ms} ms"));
                return Ok(());
            }
        }
        Err(LabError::unexpected("killing the OSD", format!("{node} wrote nothing meanwhile: {written}")))
    };
    tokio::try_join!(boot::good_node(bench, node), outages)?;
    no_errors(bench, node)
}

/// Waits until more than so many of the node's writes are done, and answers how its export goes then.
async fn wait_for_writes(bench: &Bench, node: &str, before: u64) -> Result<Value> {
    let doing = format!("waiting for {node} to write to its disk");
    wait_until(&doing, BOOT_LIMIT, || async {
        let export = export(bench, node).await.ok()?;
        (number(&export, "/writes/count").ok()? > before).then_some(export)
    })
    .await
}

async fn export(bench: &Bench, node: &str) -> Result<Value> {
    let exports = bench.services.client(&["export", "list"]).await?;
    let of_node = |export: &&Value| export.get("node") == Some(&json!(node));
    let found = exports.as_array().into_iter().flatten().find(of_node).cloned();
    found.ok_or_else(|| LabError::unexpected("listing exports", format!("{node} has none: {exports}")))
}

fn number(export: &Value, pointer: &str) -> Result<u64> {
    let found = export.pointer(pointer).and_then(Value::as_u64);
    found.ok_or_else(|| LabError::unexpected("reading an export", format!("it has no {pointer}: {export}")))
}

/// The node's kernel saw no error of its disk's.
fn no_errors(bench: &Bench, node: &str) -> Result<()> {
    let path = bench.site.folder.join("nodes").join(node).join("console.log");
    let said = std::fs::read(&path).map_err(LabError::io(format!("reading {}", path.display())))?;
    let said = String::from_utf8_lossy(&said);
    let wrong = ["I/O error", "Remounting filesystem read-only", "rejecting I/O", "Medium Error"];
    match said.lines().find(|line| wrong.iter().any(|word| line.contains(word))) {
        None => Ok(()),
        Some(line) => Err(LabError::unexpected(format!("reading what {node} said"), line.to_owned())),
    }
}

/// Longer than anybody would take for a slow disk, and shorter than Linux waits for a SCSI command (30 s).
const OUTAGE: Duration = Duration::from_secs(20);
/// An outage in which the node happens to write nothing shows nothing.
const MOST_OUTAGES: u32 = 4;
/// Of a write that the outage held up.
const WAITED: Duration = Duration::from_secs(2);
