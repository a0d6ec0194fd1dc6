//! The boot path end to end: real firmware, TPM, switch, iSCSI and services. One run is looked at from several sides.

use crate::play::{Played, play};
use assay_qemu_lab::steps::{ANSWERED, BootSteps, Progress};
use assay_wire::step::Step;
use std::sync::OnceLock;

/// n1 boots through to its tenant's Debian and goes on attesting, n2's tampered ramdisk is refused; n1 is cut off for a
/// program that no policy knows, boots again, and is reset behind everybody's back.
pub(crate) fn run() -> &'static Played {
    static RUN: OnceLock<Played> = OnceLock::new();
    RUN.get_or_init(|| play("boot-path"))
}

#[test]
fn boot_path() {
    let played = run();
    // n1's first boot: a policy may have been learnt from it before, and it is reset after.
    let answered = played.events.iter().position(|event| event.is(ANSWERED, "n1")).expect("the tenant answered");
    let steps = BootSteps::read("n1", &played.events[..=answered]);
    assert_eq!(steps.progress(), Progress::Complete, "{}", steps.table());
    assert!(played.event(ANSWERED).text("page").is_some_and(|page| page.starts_with("assay tenant")));
    // Nothing answers from the airlock: looked at after the tenant was up.
    let silent = played.events.iter().position(|event| event.name() == "airlock.silent");
    assert!(silent > Some(answered));
    let verdict_to_moved = steps.between_ms(Step::EvidenceAppraised, Step::PortMoved).unwrap();
    println!("verdict to port moved and export ready: {verdict_to_moved:.0} ms\n{}", steps.table());
}

#[test]
fn tampered_ramdisk() {
    let played = run();
    let refused = played.event("node.refused");
    assert_eq!(refused.node(), Some("n2"));
    let reasons = refused.fields()["reasons"].to_string();
    assert!(reasons.contains("PCR 4") || reasons.contains("PCR 11"), "{reasons}");
    for step in [Step::ImageExported, Step::PortMoved, Step::TenantBooted] {
        assert!(!played.events.iter().any(|event| event.is(step.event(), "n2")), "{step} happened to n2");
    }
}

#[test]
fn reboot_without_airlock() {
    let played = run();
    let position = |name: &str| played.events.iter().position(|event| event.is(name, "n1"));
    let (revoked, reset, fenced) = (position("node.revoked"), position("node.reset"), position("node.fenced"));
    assert!(reset.is_some() && fenced > reset, "{}", played.output);
    // Cut off, the port opened again only after another walk through the airlock.
    let since = revoked.expect("n1 was revoked");
    let again = |name: &str| played.events[since..].iter().position(|event| event.is(name, "n1"));
    let (appraised, moved) = (again(Step::EvidenceAppraised.event()), again(Step::PortMoved.event()));
    assert!(appraised.is_some() && moved > appraised, "{}", played.output);
    let last = played.events.iter().rposition(|event| event.is(Step::PortMoved.event(), "n1"));
    assert!(last < fenced, "the port opened again after the reset");
}
