//! Flat, shared, private: which node gets at which disk, through which gateway.

use crate::play::{Played, play};
use assay_qemu_lab::events::Event;

fn events<'a>(played: &'a Played, name: &'a str) -> impl Iterator<Item = &'a Event> {
    played.events.iter().filter(move |event| event.name() == name)
}

/// Each node reads its own disk at this portal, and its frames pass there.
fn own_disks(played: &Played, expected: [(&str, &str, &str); 2]) {
    for (node, project, portal) in expected {
        let found = events(played, "deployment.own_disk").find(|event| event.node() == Some(node));
        let found = found.unwrap_or_else(|| panic!("{node} has no disk\n{}", played.output));
        assert_eq!((found.text("project"), found.text("portal")), (Some(project), Some(portal)));
        assert!(found.number("frames") > Some(0.0), "{:?}", found.fields());
    }
}

/// Neither of two nodes on one network gets at the other's disk, with whatever it has but the other's secret.
fn neighbours_are_refused(played: &Played) {
    for node in ["s1", "s2"] {
        let theirs = |name| events(played, name).filter(move |event| event.node() == Some(node));
        let said: Vec<&str> = theirs("deployment.refused").filter_map(|event| event.text("said")).collect();
        assert_eq!(said.len(), 2, "{}", played.output);
        assert!(said[0].contains("Target not found"), "by address: {}", said[0]);
        assert!(said[1].contains("Authentication"), "by CHAP: {}", said[1]);
        // The forged address did reach the neighbour's process: with the secret, too, it opens.
        let control = theirs("deployment.secret_decides").next();
        assert!(control.is_some_and(|event| event.number("frames") > Some(0.0)), "{}", played.output);
    }
    assert_eq!(events(played, "deployment.silent").count(), 0);
}

#[test]
fn flat() {
    let played = play("deployment-flat");
    own_disks(&played, [("s1", "alpha", "10.20.0.1:3260"), ("s2", "alpha", "10.20.0.1:3260")]);
    neighbours_are_refused(&played);
}

#[test]
fn shared() {
    let played = play("deployment-shared");
    own_disks(&played, [("s1", "alpha", "10.20.0.1:3260"), ("s2", "beta", "10.20.0.1:3260")]);
    neighbours_are_refused(&played);
}

/// One project's portal answers nothing to the other's node: not one frame of the one reaches the other.
#[test]
fn private() {
    let played = play("deployment-private");
    own_disks(&played, [("s1", "alpha", "10.20.0.1:3260"), ("s2", "beta", "10.30.0.1:3260")]);
    let silences: Vec<_> = events(&played, "deployment.silent").collect();
    for (node, portal) in [("s1", "10.30.0.1:3260"), ("s2", "10.20.0.1:3260")] {
        let theirs = silences.iter().filter(|event| event.node() == Some(node) && event.text("portal") == Some(portal));
        assert_eq!(theirs.count(), 2, "as a neighbour, and through its own gateway\n{}", played.output);
    }
    for silence in silences {
        assert!(silence.number("sent") > Some(0.0), "{:?}", silence.fields());
        assert_eq!((silence.number("arrived"), silence.number("answers")), (Some(0.0), Some(0.0)));
    }
}
