//! Switches and BMCs that fail: one clear error, the port closed or where it was, tried again, nothing forgotten.

mod support;

use assay_wire::isolation::{NodeState, NodeStatus};
use serde_json::json;
use support::{AIRLOCK, NET, QUARANTINE, Site, in_quarantine, is, problem};

#[tokio::test]
async fn a_switch_that_does_not_answer_admits_nobody() {
    let site = Site::start().await;
    let context = site.airlocked().await;
    site.switch.freeze();
    let refused = site.admit(&site.claims(&context)).await.unwrap_err();
    let problem = problem(&refused).clone();
    assert_eq!((problem.status, problem.kind.as_str()), (503, "port-not-moved"));
    assert!(problem.detail.contains("switch sw does not answer") && problem.detail.contains("n1-eth0"), "{problem:?}");
    // What the frozen switch will find when it wakes is quarantine.
    assert_eq!(site.port().await, (QUARANTINE, true));
    let node = site.node().await;
    assert_eq!(node.state, NodeState::Rejected);
    assert!(node.reason.contains("switch sw does not answer"), "{}", node.reason);
    assert_eq!(node.nics[0].observed, None, "nobody knows");
    site.switch.thaw();
    site.until("in quarantine", in_quarantine).await;
}

#[tokio::test]
async fn a_bmc_that_fails_is_tried_again_and_the_node_stays_out() {
    let site = Site::start().await;
    site.bmc.change(|bmc| bmc.broken = true);
    site.lease().await;
    let node = site.until("explained", |n| n.reason.contains("it answered 503")).await;
    assert!(node.state == NodeState::Airlock && in_quarantine(&node), "{node:?}");
    assert!(!node.reason.contains("calvin"));
    let refused = site.service.get::<serde_json::Value>("/v1/nodes/n1/airlock").await.unwrap_err();
    assert_eq!(problem(&refused).kind, "not-in-airlock");
    site.bmc.change(|bmc| bmc.broken = false);
    site.entered().await;
    assert_eq!(site.port().await, (AIRLOCK, true));
}

#[tokio::test]
async fn a_bmc_that_does_not_keep_the_boot_override_is_refused_unless_allowed() {
    let site = Site::start().await;
    site.bmc.change(|bmc| bmc.forgets_once = true);
    site.lease().await;
    let node = site.until("explained", |n| n.reason.contains("Continuous")).await;
    assert!(node.reason.contains("allow_continuous_boot_override"), "{}", node.reason);
    assert!(!site.bmc.read().on, "it was powered on although it might boot from anywhere");

    let site = Site::with(json!({"allow_continuous_boot_override": true})).await;
    site.bmc.change(|bmc| bmc.forgets_once = true);
    site.airlocked().await;
}

#[tokio::test]
async fn a_bmc_that_cannot_tell_resets_is_refused() {
    let site = Site::start().await;
    site.bmc.change(|bmc| bmc.silent_about_resets = true);
    site.lease().await;
    site.until("explained", |n| n.reason.contains("LastResetTime")).await;
    site.bmc.change(|bmc| bmc.silent_about_resets = false);
    let context = site.entered().await;
    site.admit(&site.claims(&context)).await.unwrap();
    assert_eq!(site.port().await, (NET, false));
    site.bmc.change(|bmc| bmc.silent_about_resets = true);
    site.until("closed", is(NodeState::Rejected)).await;
    assert_eq!(site.port().await, (QUARANTINE, true));
}

#[tokio::test]
async fn a_bmc_outage_during_a_lease_does_not_cut_the_tenant_off() {
    let site = Site::start().await;
    site.allocated().await;
    site.bmc.change(|bmc| bmc.broken = true);
    site.until("explained", |n| n.reason.contains("it answered 503")).await;
    assert_eq!(site.port().await, (NET, false));
    let node: NodeStatus = site.node().await;
    assert_eq!(node.state, NodeState::Allocated);
    // Trouble that is over is not shown any more.
    site.bmc.change(|bmc| bmc.broken = false);
    site.until("itself again", |n| n.reason.starts_with("admitted by")).await;
}

#[tokio::test]
async fn a_cycle_over_a_frozen_switch_is_a_new_boot_once_the_switch_is_back() {
    let site = Site::start().await;
    let (context, _) = site.allocated().await;
    site.switch.freeze();
    let error = site.operator.post::<_, NodeStatus>("/v1/nodes/n1/cycle", &()).await.unwrap_err();
    assert_eq!(problem(&error).status, 503);
    // The old boot cannot be admitted again, whatever a verifier says of it.
    let refused = site.admit(&site.claims(&context)).await.unwrap_err();
    assert_eq!(problem(&refused).kind, "not-in-airlock");
    site.switch.thaw();
    assert_ne!(site.entered().await.boot, context.boot);
}
