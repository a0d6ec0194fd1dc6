//! A tenant's disk on Ceph, through an outage.

use super::bench::{BOOT_LIMIT, Bench};
use super::boot;
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
    let outage = async {
        bench.events.wait_for("the tenant's kernel to start", position, BOOT_LIMIT, booted).await?;
        bench.tell("  the OSD is killed");
        ceph.kill_osd().await?;
        bench.events.lab("osd.killed", &json!({}));
        tokio::time::sleep(OUTAGE).await;
        let waiting = export(bench, node).await?;
        ceph.start_osd().await?;
        bench.events.lab("osd.started", &json!({ "export": waiting }));
        bench.tell(&format!("  the OSD is back after {} s", OUTAGE.as_secs()));
        Ok(waiting)
    };
    let ((), before) = tokio::try_join!(boot::good_node(bench, node), outage)?;
    let after = export(bench, node).await?;
    let (slowest_us, writes) = (number(&after, "/writes/p99_us")?, number(&after, "/writes/count")?);
    bench.events.lab("outage.survived", &json!({ "node": node, "before": before, "after": after }));
    if writes <= number(&before, "/writes/count")? {
        return Err(LabError::unexpected("looking at the node's export", format!("it wrote nothing since: {after}")));
    }
    bench
        .tell(&format!("  {node} wrote {writes} times; the slowest hundredth waited {} ms or more", slowest_us / 1000));
    no_errors(bench, node)
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
