//! Nodes that lie, each in one way, against the real services, switch and (software) TPM.

use crate::play::{Played, play};
use std::sync::OnceLock;

fn lies() -> &'static Played {
    static RUN: OnceLock<Played> = OnceLock::new();
    RUN.get_or_init(|| play("lies"))
}

/// The refusal of one lie says why, in these words.
fn refused(conduct: &str, words: &str) {
    let played = lies();
    let mut refusals = played.events.iter().filter(|event| event.name() == "lie.refused");
    let refusal = refusals.find(|event| event.text("conduct") == Some(conduct));
    let reasons = refusal.map(|event| event.fields()["reasons"].to_string()).unwrap_or_default();
    assert!(reasons.contains(words), "{conduct}: `{reasons}` does not say `{words}`\n{}", played.output);
    assert!(played.events.iter().any(|event| event.name() == "honesty.believed"), "nothing was ever believed");
}

#[test]
fn replayed_quote() {
    refused("replayed_quote", "nonce");
}

#[test]
fn foreign_ak() {
    refused("foreign_ak", "not signed by this AK");
}

#[test]
fn wrong_nonce() {
    refused("wrong_nonce", "nonce");
}

#[test]
fn missing_event() {
    refused("missing_event", "PCR");
}

#[test]
fn tampered_settings() {
    refused("tampered_settings", "PCR 14");
}

#[test]
fn release_crash() {
    let played = play("release-crash");
    let survived: Vec<_> = played.events.iter().filter(|event| event.name() == "crash.survived").collect();
    assert_eq!(survived.len(), 6, "{}", played.output);
    assert!(survived.iter().all(|event| matches!(event.text("outcome"), Some("all of it" | "none of it"))));
}

#[test]
fn no_leak() {
    let played = play("no-leak");
    let counted = played.event("leaks.counted");
    assert_eq!(counted.number("leaked"), Some(0.0));
    assert!(counted.number("seen") > Some(0.0), "no frame came through while the node was admitted");
    // The same probe sees what a careless switch driver lets through.
    assert!(played.event("leaks.caught").number("careless_moves") > Some(0.0));
}
