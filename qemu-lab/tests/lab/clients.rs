//! Initiators that are not ours.

use crate::play::play;

#[test]
fn linux_loses_nothing_when_one_of_two_paths_is_cut() {
    let played = play("multipath");
    let said = played.event("multipath.verified").text("said").unwrap_or_default().to_owned();
    assert!(said.contains("err= 0") && said.contains("WRITE:"), "{said}");
    let position = |name: &str| played.events.iter().position(|event| event.name() == name);
    assert!(position("path.cut") < position("multipath.verified"), "{}", played.output);
}

#[test]
fn ipxe_boots_from_a_target() {
    let played = play("sanboot");
    let said = played.event("sanboot.booted").text("said").unwrap_or_default().to_owned();
    assert!(said.contains("assay agent"), "{said}");
}
