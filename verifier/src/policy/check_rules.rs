//! What must hold of a policy's named rules before they may judge. Each answers the rule's name and what is wrong.

use super::check::{MAX_ALTERNATIVES, MAX_EVENTS, is_text};
use super::rules::{FirmwareRule, Keys, ListedEvent, SecureBootRule};
use super::{EventDigest, File};

pub(super) fn rule_problem(file: &File) -> Option<(&'static str, &'static str)> {
    let named = |name, problem: Option<&'static str>| problem.map(|problem| (name, problem));
    let boot_images = file.boot_images.as_ref().and_then(|rule| listed_problem(&rule.image));
    let option_roms = file.option_roms.as_ref().and_then(|rule| listed_problem(&rule.image));
    let command_line = file.command_line.as_ref().and_then(|rule| texts_problem(&rule.text));
    named("boot_images", boot_images)
        .or(named("option_roms", option_roms))
        .or(named("command_line", command_line))
        .or(named("firmware", file.firmware.as_ref().and_then(firmware_problem)))
        .or(named("secure_boot", file.secure_boot.as_ref().and_then(secure_boot_problem)))
}

fn firmware_problem(rule: &FirmwareRule) -> Option<&'static str> {
    match (rule.versions.is_empty(), rule.blob.is_empty()) {
        (true, true) => Some("says nothing: give versions, or blobs by digest"),
        (false, _) if texts_problem(&rule.versions).is_some() => texts_problem(&rule.versions),
        (true | false, false) => listed_problem(&rule.blob),
        (false, true) => None,
    }
}

fn secure_boot_problem(rule: &SecureBootRule) -> Option<&'static str> {
    let keys = [&rule.pk, &rule.kek, &rule.db].into_iter().flatten();
    if let Some(problem) = keys.into_iter().find_map(keys_problem) {
        Some(problem)
    } else if rule.dbx_at_least.len() > MAX_REVOCATIONS {
        Some("lists too many revocations")
    } else if rule.sbat_at_least.len() > MAX_ALTERNATIVES || rule.sbat_at_least.keys().any(|name| !is_text(name)) {
        Some("has an SBAT component without a name, or too many")
    } else {
        None
    }
}

fn keys_problem(keys: &Keys) -> Option<&'static str> {
    if keys.certificates.is_empty() && keys.sha256.is_empty() {
        Some("has a variable with neither certificates nor digests: nobody could match it")
    } else if keys.certificates.len() > MAX_EVENTS || keys.sha256.len() > MAX_ALTERNATIVES {
        Some("lists too many keys")
    } else {
        None
    }
}

fn listed_problem(listed: &[ListedEvent]) -> Option<&'static str> {
    let digests = |digests: &[EventDigest]| digests.is_empty() || digests.len() > MAX_ALTERNATIVES;
    if listed.is_empty() || listed.len() > MAX_EVENTS {
        Some("lists nothing, or too much")
    } else if listed.iter().any(|event| digests(&event.sha256)) {
        Some("lists something with no digest or too many")
    } else if listed.iter().any(|event| !is_text(&event.description)) {
        Some("lists something whose description is empty or too long")
    } else {
        None
    }
}

fn texts_problem(texts: &[String]) -> Option<&'static str> {
    let too_long = |text: &String| text.is_empty() || text.len() > MAX_COMMAND_LINE_BYTES;
    if texts.is_empty() || texts.len() > MAX_ALTERNATIVES || texts.iter().any(too_long) {
        Some("has no text, too many, or one that is empty or too long")
    } else {
        None
    }
}

/// Microsoft's list of 2025 has some 450 digests.
const MAX_REVOCATIONS: usize = 10_000;
/// What Linux takes on x86-64.
const MAX_COMMAND_LINE_BYTES: usize = 2048;
