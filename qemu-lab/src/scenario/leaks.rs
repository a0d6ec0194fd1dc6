//! Whether a frame of the node's ever reaches the tenant's network when it may not, asked of frames and not of switches.

use super::attacks::NODE;
use super::bench::{Bench, STATE_LIMIT};
use super::soft::{SoftBoot, SoftFirmware, trust_soft_firmware};
use crate::command::wait_until;
use crate::error::{LabError, Result};
use crate::probe::{Probe, Sighting};
use crate::site::{BRIDGE, PROBE_INTERFACE};
use assay_ovsdb::{Limits, Ovsdb};
use serde_json::json;
use std::time::Duration;

/// Frames flow from the node's cable during whole boots and revocations. None is seen on the tenant's network but
/// between the verdict and the fence. Then the same probe watches a switch that is driven carelessly, and must catch it.
pub(super) async fn none_but_when_admitted(bench: &mut Bench) -> Result<()> {
    let firmware = SoftFirmware::new();
    let network = bench.network()?.clone();
    let node = bench.site.node(NODE)?;
    let no_segment = || LabError::Topology(format!("node {NODE} needs `probe = true`"));
    let segment = node.segment.clone().ok_or_else(no_segment)?;
    let peer = bench.site.project(network.project.as_str())?.peer.clone();
    let probe = Probe::start(&segment, PROBE_INTERFACE, &peer);

    trust_soft_firmware(bench, NODE, &firmware).await?;
    let mut windows = Vec::new();
    for _ in 0..ROUNDS {
        let boot = SoftBoot::cycle(bench, NODE, &firmware).await?;
        // From here on a good verdict may open the port.
        let opens = probe.now();
        boot.run_to_handover().await?;
        bench.services.wait_for_state(NODE, "allocated", STATE_LIMIT).await?;
        let came = |from: Duration| probe.sightings().iter().any(|s| s.seen > from);
        let now = probe.now();
        wait_until("waiting for frames of an admitted node", STATE_LIMIT, || async { came(now).then_some(()) }).await?;
        bench.site.node(NODE)?.machine.reset().await?;
        bench.services.wait_for_state(NODE, "rejected", STATE_LIMIT).await?;
        windows.push((opens, probe.now()));
    }
    let seen = probe.sightings();
    let leaked = seen.iter().filter(|s| !windows.iter().any(|(open, shut)| (open..=shut).contains(&&s.seen))).count();
    bench.events.lab("leaks.counted", &json!({ "rounds": ROUNDS, "seen": seen.len(), "leaked": leaked }));
    bench
        .tell(&format!("  {ROUNDS} boots and revocations: {} frames seen while admitted, {leaked} leaked", seen.len()));
    if leaked > 0 {
        return Err(LabError::unexpected("watching for leaks", format!("{leaked} frames leaked")));
    }

    // The control. Without services, or they would mend what is done here.
    bench.services.kill().await;
    let moves = careless_moves(bench, &probe, network.vlan.get()).await?;
    bench.events.lab("leaks.caught", &json!({ "careless_moves": moves }));
    bench.tell(&format!("  a plain tag change leaks: caught after {moves} careless moves"));
    Ok(())
}

/// Moves the port with nothing but a tag change, until a frame is seen that was sent after the database said "done".
async fn careless_moves(bench: &Bench, probe: &Probe, vlan: u16) -> Result<u32> {
    let port = bench.site.node(NODE)?.port.clone();
    let failed = || LabError::service(format!("moving {port} of {BRIDGE} carelessly"));
    let switch = Ovsdb::connect(&bench.site.switch.ovsdb_socket(), Limits::default()).await.map_err(failed())?;
    // The database has it, so it is done: what a driver believes that neither waits for the switch nor asks it.
    let set = async |vlan: u16| {
        let update = json!({ "op": "update", "table": "Port", "where": [["name", "==", port]],
            "row": { "tag": vlan, "protected": false } });
        switch.transact("Open_vSwitch", vec![update]).await.map(drop).map_err(failed())
    };
    for moves in 1..=MOST_CARELESS_MOVES {
        set(vlan).await?;
        let opened = probe.now();
        let through = |s: &Sighting| s.sent > opened;
        let open = || async { probe.sightings().iter().any(through).then_some(()) };
        wait_until("waiting for frames through an open port", STATE_LIMIT, open).await?;
        set(bench.site.topology.quarantine_vlan.get()).await?;
        let closed = probe.now();
        // Long enough for a frame that slipped through to be seen; a condition that must not come about has no event.
        let late = || async { probe.sightings().iter().any(|s| s.sent > closed).then_some(()) };
        if wait_until("waiting for a leak", LEAK_WINDOW, late).await.is_ok() {
            return Ok(moves);
        }
    }
    Err(LabError::unexpected("watching careless moves", "not one frame leaked: this probe would not see a leak"))
}

const ROUNDS: usize = 3;
const MOST_CARELESS_MOVES: u32 = 1000;
const LEAK_WINDOW: Duration = Duration::from_millis(30);
