//! Attacks on the release, by their ids: time between attest and release (D1), answers that differ (D2), restarts and
//! restored databases (D4), what a previous tenant leaves (D9). On a real switch.

mod support;

use assay_wire::id::{AdmissionId, LeaseId};
use assay_wire::isolation::{AirlockContext, NodeState, NodeStatus};
use assay_wire::result::{Claims, SignedResult};
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, Instant};
use support::{AIRLOCK, NET, QUARANTINE, Site, in_quarantine, is, other_boot, problem};

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().expect("ip runs");
    assert!(status.success(), "ip {arguments:?}");
}

/// Gives the node's port a cable: the node's end of it is `n1-nic`, in the switch's namespace too.
fn plug_in(site: &Site) {
    ip(&["-n", site.namespace.name(), "link", "add", "n1-eth0", "type", "veth", "peer", "name", "n1-nic"]);
    ip(&["-n", site.namespace.name(), "link", "set", "n1-eth0", "up"]);
    ip(&["-n", site.namespace.name(), "link", "set", "n1-nic", "up"]);
}

fn cable(site: &Site, state: &str) {
    ip(&["-n", site.namespace.name(), "link", "set", "n1-nic", state]);
}

/// Waits until Open vSwitch says so of the port's link.
async fn link_is(site: &Site, state: &str) {
    let socket = site.switch.ovsdb_socket();
    let ovsdb = assay_ovsdb::Ovsdb::connect(&socket, assay_ovsdb::Limits::default()).await.expect("ovsdb");
    let says = async || {
        let select = json!({"op": "select", "table": "Interface", "where": [["name", "==", "n1-eth0"]],
            "columns": ["link_state"]});
        let rows = ovsdb.transact("Open_vSwitch", vec![select]).await.expect("rows");
        rows[0]["rows"][0]["link_state"] == state
    };
    let waiting = async { while !says().await {} };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("the switch sees the cable");
}

#[tokio::test]
async fn d1_a_reboot_between_verdict_and_move_opens_nothing() {
    let site = Site::with(json!({"reset_poll_ms": 60_000})).await;
    let context = site.airlocked().await;
    // Between the verdict and the move, and the watch has not seen it yet: the move itself looks.
    site.bmc.change(|bmc| bmc.resets += 1);
    let refused = site.admit(&site.claims(&context)).await.unwrap_err();
    assert_eq!(problem(&refused).kind, "node-was-reset");
    assert_eq!(site.port().await, (AIRLOCK, true));
    let after: assay_wire::isolation::AirlockContext = site.service.get("/v1/nodes/n1/airlock").await.unwrap();
    assert_ne!(after.boot, context.boot);
    site.admit(&site.claims(&after)).await.unwrap();
}

#[tokio::test]
async fn d1_an_admission_of_another_boot_opens_nothing() {
    let site = Site::start().await;
    let (first, _) = site.allocated().await;
    site.operator.post::<_, NodeStatus>("/v1/nodes/n1/cycle", &()).await.unwrap();
    let second = site.entered().await;
    for boot in [&first, &other_boot(&second)] {
        let refused = site.admit(&site.claims(boot)).await.unwrap_err();
        assert_eq!(problem(&refused).kind, "result-refused");
        assert_eq!(site.port().await, (AIRLOCK, true));
    }
}

#[tokio::test]
async fn d1_a_reset_after_the_release_takes_the_port_away() {
    let site = Site::start().await;
    site.allocated().await;
    assert_eq!(site.port().await, (NET, false));
    site.bmc.change(|bmc| bmc.resets += 1);
    site.until("rejected", is(NodeState::Rejected)).await;
    assert_eq!(site.port().await, (QUARANTINE, true));
}

#[tokio::test]
async fn d1_a_cable_that_is_pulled_ends_the_admission() {
    let site = Site::with(json!({"link_grace_ms": 0})).await;
    plug_in(&site);
    link_is(&site, "up").await;
    let (context, admission) = site.allocated().await;
    site.until("looked at", |n| n.state == NodeState::Allocated).await;
    cable(&site, "down");
    let node = site.until("rejected", is(NodeState::Rejected)).await;
    assert!(node.reason.contains("link of its port went down") && in_quarantine(&node), "{node:?}");
    // What is plugged in now finds quarantine, and the old verdict opens nothing.
    cable(&site, "up");
    link_is(&site, "up").await;
    assert_eq!(site.port().await, (QUARANTINE, true));
    let replayed = site.admit(&Claims { jti: admission.id, ..site.claims(&context) }).await.unwrap_err();
    assert_eq!(problem(&replayed).kind, "admission-ended");
}

/// A driver that is loaded again takes the link down too: within the grace period that costs nothing, but the BMC is asked
/// at once, long before its poll is due.
#[tokio::test]
async fn d1_a_flap_is_forgiven_unless_the_node_was_reset_meanwhile() {
    let site = Site::with(json!({"link_grace_ms": 60_000, "reset_poll_ms": 600_000})).await;
    plug_in(&site);
    link_is(&site, "up").await;
    site.allocated().await;
    let reads = site.bmc.read().reads;
    cable(&site, "down");
    link_is(&site, "down").await;
    cable(&site, "up");
    link_is(&site, "up").await;
    site.until("asked about", |_| site.bmc.read().reads > reads).await;
    assert_eq!(site.node().await.state, NodeState::Allocated);
    site.bmc.change(|bmc| bmc.resets += 1);
    cable(&site, "down");
    let node = site.until("rejected", is(NodeState::Rejected)).await;
    assert!(node.reason.contains("was reset"), "{}", node.reason);
    assert_eq!(site.port().await, (QUARANTINE, true));
}

/// A BMC that hangs must not make an admission last longer: the driver's own clock closes the port.
#[tokio::test]
async fn d3_a_port_closes_at_expiry_whatever_its_driver_is_waiting_for() {
    let site = Site::with(json!({"bmc_timeout_ms": 30_000})).await;
    let context = site.airlocked().await;
    let mut claims = site.claims(&context);
    claims.exp = claims.iat + 3;
    site.admit(&claims).await.expect("admitted");
    site.bmc.change(|bmc| bmc.hangs = true);
    let left_ms = claims.exp * 1000 - {
        use assay_service::clock::Clock as _;
        site.clock.now_ms()
    };
    let begun = Instant::now();
    site.until("rejected by expiry", is(NodeState::Rejected)).await;
    let late = begun.elapsed().saturating_sub(Duration::from_millis(u64::try_from(left_ms).unwrap_or(0)));
    assert_eq!(site.port().await, (QUARANTINE, true));
    assert!(late < Duration::from_secs(1), "closed {late:?} after its expiry");
}

/// The two answers are isolation's own: what it told the verifier when the node enrolled, and what it has on record when
/// the result arrives. A token that says two things is none.
#[tokio::test]
async fn d2_a_result_that_differs_from_the_record_or_from_itself_opens_nothing() {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let site = Site::start().await;
    let told = site.airlocked().await;
    // Isolation's answer changes between enrolment and result.
    site.bmc.change(|bmc| bmc.resets += 1);
    let changed = |context: &AirlockContext| context.boot != told.boot;
    let now: AirlockContext = loop {
        match site.service.get("/v1/nodes/n1/airlock").await {
            Ok(context) if changed(&context) => break context,
            Ok(_) | Err(_) => {}
        }
    };
    assert_eq!(problem(&site.admit(&site.claims(&told)).await.unwrap_err()).kind, "result-refused");
    // One token, two nodes: which is read depends on the reader, so nobody may read it.
    let claims = serde_json::to_string(&site.claims(&now)).unwrap();
    let doubled =
        claims.replacen('{', r#"{"assay.node":"n2","assay.lease":"00000000-0000-4000-8000-000000000000","#, 1);
    let signed =
        format!("{}.{}", URL_SAFE_NO_PAD.encode(r#"{"alg":"EdDSA","typ":"JWT"}"#), URL_SAFE_NO_PAD.encode(doubled));
    let signature = URL_SAFE_NO_PAD.encode(site.key.sign(signed.as_bytes()));
    let refused = site.send(&SignedResult::from_wire(format!("{signed}.{signature}"))).await.unwrap_err();
    assert_eq!(problem(&refused).kind, "result-malformed");
    assert_eq!(site.port().await, (AIRLOCK, true));
    site.admit(&site.claims(&now)).await.unwrap();
}

#[tokio::test]
async fn d4_a_revocation_that_could_not_be_carried_out_is_recorded_and_carried_out_later() {
    let site = Site::start().await;
    let (_, admission) = site.allocated().await;
    site.switch.freeze();
    let error = site.revoke(admission.id).await.unwrap_err();
    assert_eq!(problem(&error).status, 503);
    assert_eq!(site.node().await.state, NodeState::Rejected);
    let error = site.revoke(admission.id).await.unwrap_err();
    assert_eq!(problem(&error).status, 503, "`revoked` is answered only of a closed port");
    site.switch.thaw();
    site.until("in quarantine", in_quarantine).await;
    assert_eq!(site.revoke(admission.id).await.unwrap().revoked.as_deref(), Some("bad evidence"));
}

#[tokio::test]
async fn d4_while_the_switch_is_away_nothing_is_opened_and_a_restart_forgets_no_revocation() {
    let mut site = Site::start().await;
    let (context, admission) = site.allocated().await;
    site.switch.freeze();
    assert_eq!(problem(&site.revoke(admission.id).await.unwrap_err()).status, 503);
    // Not by another pass through the airlock, not by another result, not by a restart.
    assert_eq!(problem(&site.operator.post::<_, Value>("/v1/nodes/n1/cycle", &()).await.unwrap_err()).status, 503);
    assert_eq!(problem(&site.admit(&site.claims(&context)).await.unwrap_err()).kind, "not-in-airlock");
    let asked = site.bmc.read().asked.len();
    site.stop().await;
    site.start_again().await;
    let node = site.node().await;
    assert!(node.state == NodeState::Airlock && node.nics[0].observed.is_none(), "{node:?}");
    assert_eq!(site.bmc.read().asked.len(), asked, "it was powered on although its port is not known to be closed");
    site.switch.thaw();
    let entered = site.entered().await;
    assert_ne!(entered.boot, context.boot);
    assert_eq!(site.port().await, (AIRLOCK, true));
}

#[tokio::test]
async fn d4_an_admission_that_expired_while_nobody_ran_is_fenced_before_anybody_may_ask() {
    let mut site = Site::start().await;
    site.allocated().await;
    site.stop().await;
    assert_eq!(site.port().await, (NET, false));
    site.clock.skip_seconds(301);
    site.start_again().await;
    let node = site.node().await;
    assert_eq!(node.state, NodeState::Rejected);
    assert_eq!(site.port().await, (QUARANTINE, true));
}

/// Whether the database is a file, which an operator may put back. On a server it is an operator's of databases to do.
fn database_is_a_file(site: &Site) -> bool {
    let is = site.folder.path().join("isolation.db").exists();
    if !is {
        eprintln!("skipped: this run's database is on a server");
    }
    is
}

/// Copies the database of a stopped site.
fn database(site: &Site, to: &str, from: &str) {
    for ending in ["", "-wal", "-shm"] {
        let path = |name: &str| site.folder.path().join(format!("{name}{ending}"));
        let _absent_is_fine = std::fs::remove_file(path(to));
        if path(from).exists() {
            std::fs::copy(path(from), path(to)).expect("a copy");
        }
    }
}

#[tokio::test]
async fn d4_a_restored_database_does_not_bring_back_what_was_revoked() {
    let mut site = Site::start().await;
    let (_, admission) = site.allocated().await;
    if !database_is_a_file(&site) {
        return;
    }
    site.stop().await;
    database(&site, "backup.db", "isolation.db");
    site.start_again().await;
    assert_eq!(site.node().await.state, NodeState::Allocated, "a restart alone ends nothing");
    site.revoke(admission.id).await.expect("revoked");
    site.stop().await;
    // The backup says: Allocated, admitted, unexpired. The switch says: quarantine. The switch knows better.
    database(&site, "isolation.db", "backup.db");
    site.start_again().await;
    let node = site.until("rejected", is(NodeState::Rejected)).await;
    assert!(node.reason.contains("found in quarantine"), "{}", node.reason);
    assert_eq!(site.port().await, (QUARANTINE, true));
}

#[tokio::test]
async fn d4_a_restored_database_does_not_give_the_next_tenants_node_to_the_last_one() {
    let mut site = Site::start().await;
    let (context, _) = site.allocated().await;
    if !database_is_a_file(&site) {
        return;
    }
    site.stop().await;
    database(&site, "backup.db", "isolation.db");
    site.start_again().await;
    let _ended: NodeStatus = site.operator.delete(&format!("/v1/leases/{}", context.lease), &()).await.unwrap();
    site.until("free", is(NodeState::Free)).await;
    site.allocated().await;
    assert_eq!(site.port().await, (NET, false));
    site.stop().await;
    // Now the port is open for the second lease, and the backup has it open for the first: the BMC tells them apart.
    database(&site, "isolation.db", "backup.db");
    site.start_again().await;
    let node = site.until("rejected", is(NodeState::Rejected)).await;
    assert!(node.reason.contains("was reset"), "{}", node.reason);
    assert_eq!(site.port().await, (QUARANTINE, true));
}

/// The process ended between "fence first" and "record after": the record still says that the admission stands.
#[tokio::test]
async fn d4_a_fence_that_was_not_recorded_is_believed_after_a_restart() {
    let mut site = Site::start().await;
    let (_, admission) = site.allocated().await;
    site.stop().await;
    site.switch.vsctl(&["set", "port", "n1-eth0", "tag=998", "protected=true"]).unwrap();
    site.start_again().await;
    let node = site.until("rejected", is(NodeState::Rejected)).await;
    assert!(in_quarantine(&node), "{node:?}");
    let again = site.service.get::<assay_wire::isolation::Admission>(&format!("/v1/admissions/{}", admission.id)).await;
    assert!(again.unwrap().revoked.is_some());
}

/// Whatever a tenant left (boot order, option ROM, TPM objects), the next one's node was off, was told to boot from the
/// network, and was appraised anew: nothing of the last lease's verdicts counts.
#[tokio::test]
async fn d9_every_lease_begins_with_a_full_power_cycle_and_a_verdict_of_its_own() {
    let site = Site::start().await;
    let (first, _) = site.allocated().await;
    assert_eq!(site.bmc.read().asked, ["ForceOff", "pxe", "On"], "whatever ran before was cut off first");
    let _ended: NodeStatus = site.operator.delete(&format!("/v1/leases/{}", first.lease), &()).await.unwrap();
    site.until("free", is(NodeState::Free)).await;
    assert!(!site.bmc.read().on, "a free node is off: nothing of the last tenant runs");
    let before = site.bmc.read().asked.len();
    let second = site.airlocked().await;
    assert!(second.lease != first.lease && second.boot != first.boot);
    assert_eq!(site.bmc.read().asked[before..], ["pxe", "On"], "it was off already; now from the network, once");
    let mut stale = site.claims(&first);
    for (lease, status) in [(first.lease, 409), (second.lease, 403), (LeaseId::random(), 409)] {
        (stale.jti, stale.lease) = (AdmissionId::random(), lease);
        assert_eq!(problem(&site.admit(&stale).await.unwrap_err()).status, status);
    }
    assert_eq!(site.port().await, (AIRLOCK, true));
    site.admit(&site.claims(&second)).await.unwrap();
}

/// A boot order that the previous tenant changed: if firmware obeys it rather than the BMC, the node never attests.
#[tokio::test]
async fn d9_a_node_that_boots_something_else_is_never_admitted() {
    let site = Site::start().await;
    site.bmc.change(|bmc| bmc.forgets_once = true);
    site.lease().await;
    let node = site.until("refused", |n| n.reason.contains("BMC")).await;
    assert!(node.state == NodeState::Airlock && !site.bmc.read().on, "{node:?}");
    site.bmc.change(|bmc| bmc.forgets_once = false);
    site.entered().await;
    // It is on, and boots from its own disk: silence, until the airlock's time is over.
    site.clock.skip_seconds(601);
    site.until("timed out", is(NodeState::Rejected)).await;
    assert_eq!(site.port().await, (QUARANTINE, true));
}
