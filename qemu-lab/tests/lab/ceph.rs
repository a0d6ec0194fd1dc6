//! The boot path with the tenant's disk on a real Ceph.

use crate::play::play;
use assay_qemu_lab::steps::{ANSWERED, BootSteps, Progress};

/// The OSD is killed when the tenant's kernel starts, and comes back: the node's writes wait, and nothing is lost.
#[test]
fn a_node_boots_from_ceph_through_an_outage() {
    let played = play("ceph-boot");
    let position = |name: &str| played.events.iter().position(|event| event.name() == name);
    let answered = played.events.iter().rposition(|event| event.is(ANSWERED, "n1")).expect("the tenant answered");
    let leased = played.events.iter().position(|event| event.name() == "policy.approved").expect("a policy was given");
    let steps = BootSteps::read("n1", &played.events[leased..=answered]);
    assert_eq!(steps.progress(), Progress::Complete, "{}", steps.table());
    assert!(position("osd.killed").is_some() && position("osd.started") > position("osd.killed"), "{}", played.output);
    let export = &played.event("outage.survived").fields()["export"];
    let slowest_us = export["writes"]["p99_us"].as_u64().unwrap();
    assert!(slowest_us > 1_000_000, "no write waited for the OSD: {export}");
}
