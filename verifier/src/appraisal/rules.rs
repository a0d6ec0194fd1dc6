//! The named rules of a policy: each decides on the events that it speaks about, wherever they stand in their PCR.

use super::claims::Claims;
use super::findings::{Findings, Problem, all_digests, subject};
use super::secure_boot::secure_boot;
use crate::event_log::data::{EventData, shown};
use crate::event_log::event_type::EventType;
use crate::event_log::{Event, ReplayedLog};
use crate::policy::{BOOT_IMAGE_PCR, CommandLineRule, File, FirmwareRule, ListedEvent};
use assay_tpm::algorithm::HashAlgorithm;

/// Notes what each named rule comes to, and claims the events that it decided on.
pub(super) fn named_rules(file: &File, log: &ReplayedLog<'_>, claims: &mut Claims, findings: &mut Findings) {
    if let Some(rule) = &file.firmware {
        let problems = firmware(rule, log, claims);
        findings.record("firmware", rule.mode, problems, "as listed");
    }
    if let Some(rule) = &file.option_roms {
        let listed = Listed { rule: "option-roms", pcr: OPTION_ROM_PCR, kinds: &IMAGES, events: &rule.image };
        findings.record("option-roms", rule.mode, listed.problems(log, claims), "as listed");
    }
    if let Some(rule) = &file.boot_images {
        let listed = Listed { rule: "boot-images", pcr: BOOT_IMAGE_PCR, kinds: &IMAGES, events: &rule.image };
        findings.record("boot-images", rule.mode, listed.problems(log, claims), "as listed");
    }
    if let Some(rule) = &file.command_line {
        findings.record("command-line", rule.mode, command_line(rule, log, claims), "as listed");
    }
    if let Some(rule) = &file.secure_boot {
        findings.record("secure-boot", rule.mode, secure_boot(rule, log, claims), "state, keys and revocations hold");
    }
}

/// Events of some types in one PCR, which must be among these, in any order.
struct Listed<'a> {
    rule: &'static str,
    pcr: u8,
    kinds: &'a [EventType],
    events: &'a [ListedEvent],
}

impl Listed<'_> {
    fn problems(&self, log: &ReplayedLog<'_>, claims: &mut Claims) -> Vec<Problem> {
        let Self { rule, pcr, kinds, events } = *self;
        let mut seen = vec![false; events.len()];
        let mut problems = Vec::new();
        for event in log.events_of(pcr).filter(|event| kinds.contains(&event.kind())) {
            claims.claim(event);
            let digest = event.digest(HashAlgorithm::Sha256);
            let known = |listed: &ListedEvent| listed.sha256.iter().any(|known| digest == Some(&known.0));
            match events.iter().position(known) {
                Some(place) => seen[place] = true,
                None => {
                    let (subject, shows) = (subject(event, pcr), event.decoded_data());
                    let sentence = format!("rule `{rule}`: {subject} is none of its (the log says: {shows})");
                    let expected = events.iter().map(|listed| listed.description.clone()).collect();
                    problems.push(Problem::of(pcr, event, sentence).expecting(expected));
                }
            }
        }
        let missing = events.iter().zip(seen).filter(|(listed, seen)| !seen && !listed.optional);
        problems.extend(missing.map(|(listed, _)| {
            let sentence = format!("rule `{rule}`: PCR {pcr}: `{}` was not measured", listed.description);
            Problem::in_pcr(pcr, sentence).expecting(all_digests(&listed.sha256))
        }));
        problems
    }
}

fn firmware(rule: &FirmwareRule, log: &ReplayedLog<'_>, claims: &mut Claims) -> Vec<Problem> {
    let mut problems = Vec::new();
    if !rule.versions.is_empty() {
        let versions: Vec<_> =
            log.events_of(FIRMWARE_PCR).filter(|event| event.kind() == EventType::S_CRTM_VERSION).collect();
        if versions.is_empty() {
            let sentence = format!("rule `firmware`: PCR {FIRMWARE_PCR}: no firmware version was measured");
            problems.push(Problem::in_pcr(FIRMWARE_PCR, sentence).expecting(rule.versions.clone()));
        }
        for event in versions {
            claims.claim(event);
            problems.extend(version_problem(rule, event));
        }
    }
    if !rule.blob.is_empty() {
        let listed = Listed { rule: "firmware", pcr: FIRMWARE_PCR, kinds: &FIRMWARE_CODE, events: &rule.blob };
        problems.extend(listed.problems(log, claims));
    }
    problems
}

/// A version counts only if it is what was measured: some firmware extends the digest of something else.
fn version_problem(rule: &FirmwareRule, event: &Event<'_>) -> Option<Problem> {
    let subject = || subject(event, FIRMWARE_PCR);
    let (found, sentence) = match (event.measured_data(), event.decoded_data()) {
        (Some(_), EventData::Text(version)) if rule.versions.contains(&version) => return None,
        (Some(_), EventData::Text(version)) => {
            let says = shown(&version);
            let sentence = format!("rule `firmware`: {} is version `{says}`, which is not listed", subject());
            (says, sentence)
        }
        (Some(_) | None, data) => {
            let sentence = format!("rule `firmware`: {} is not of the version that the log shows ({data})", subject());
            (data.to_string(), sentence)
        }
    };
    Some(Problem::of(FIRMWARE_PCR, event, sentence).expecting(rule.versions.clone()).found(found))
}

/// systemd-stub measures the options that it was loaded with: UTF-16, with the zero at their end. Known by the digest
/// of the policy's own text, so what the log shows does not matter.
fn command_line(rule: &CommandLineRule, log: &ReplayedLog<'_>, claims: &mut Claims) -> Vec<Problem> {
    let digests: Vec<_> = rule.text.iter().map(|text| measured_options(text)).collect();
    let mut problems = Vec::new();
    let mut measured = false;
    for event in log.events_of(COMMAND_LINE_PCR).filter(|event| event.kind() == EventType::IPL) {
        claims.claim(event);
        if digests.iter().any(|known| event.digest(HashAlgorithm::Sha256) == Some(known)) {
            measured = true;
        } else {
            let (subject, shows) = (subject(event, COMMAND_LINE_PCR), event.decoded_data());
            let sentence =
                format!("rule `command-line`: {subject} is not a command line of the policy (the log says: {shows})");
            problems.push(Problem::of(COMMAND_LINE_PCR, event, sentence).expecting(rule.text.clone()));
        }
    }
    if !measured && problems.is_empty() {
        let sentence = format!("rule `command-line`: PCR {COMMAND_LINE_PCR}: no command line was measured");
        problems.push(Problem::in_pcr(COMMAND_LINE_PCR, sentence).expecting(rule.text.clone()));
    }
    problems
}

fn measured_options(text: &str) -> Vec<u8> {
    let octets: Vec<u8> = text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
    HashAlgorithm::Sha256.digest(&octets).as_ref().to_vec()
}

/// Firmware's own code.
const FIRMWARE_PCR: u8 = 0;
/// Drivers and option ROMs.
const OPTION_ROM_PCR: u8 = 2;
/// systemd-stub's command line.
const COMMAND_LINE_PCR: u8 = 12;
const IMAGES: [EventType; 3] = [
    EventType::EFI_BOOT_SERVICES_APPLICATION,
    EventType::EFI_BOOT_SERVICES_DRIVER,
    EventType::EFI_RUNTIME_SERVICES_DRIVER,
];
const FIRMWARE_CODE: [EventType; 5] = [
    EventType::S_CRTM_CONTENTS,
    EventType::POST_CODE,
    EventType::POST_CODE2,
    EventType::EFI_PLATFORM_FIRMWARE_BLOB,
    EventType::EFI_PLATFORM_FIRMWARE_BLOB2,
];
