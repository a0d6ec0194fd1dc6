//! `[secure_boot]`: the state and the keys that firmware measured into PCR 7, and what shim says of SBAT.
//!
//! A variable counts only if GUID, name and content were measured together, before the separator, and once: what else
//! is labelled as configuration stays in PCR 7's list, where nobody expects it.

use super::claims::Claims;
use super::findings::{Problem, all_digests, short_digests, subject};
use crate::event_log::data::{Guid, shown};
use crate::event_log::event_type::EventType;
use crate::event_log::variable::signature_lists;
use crate::event_log::{Event, MeasuredVariable, ReplayedLog};
use crate::policy::{EventDigest, Keys, SecureBootRule};
use assay_tpm::algorithm::HashAlgorithm;
use std::collections::{BTreeMap, HashSet};

pub(super) fn secure_boot(rule: &SecureBootRule, log: &ReplayedLog<'_>, claims: &mut Claims) -> Vec<Problem> {
    let mut pcr = Pcr7 { log, claims, problems: Vec::new() };
    pcr.one("SecureBoot", GLOBAL_VARIABLE, |event, content| {
        let (wanted, found) = (on_or_off(rule.enabled), content == [1]);
        if found == rule.enabled && (found || content == [0]) {
            return None;
        }
        let sentence = format!("{}: Secure Boot is {}, not {wanted}", about(event), on_or_off(found));
        Some(problem(event, sentence).expecting(vec![wanted.to_owned()]).found(on_or_off(found)))
    });
    let listed = [("PK", GLOBAL_VARIABLE, &rule.pk), ("KEK", GLOBAL_VARIABLE, &rule.kek), ("db", DATABASE, &rule.db)];
    for (name, guid, keys) in listed {
        if let Some(keys) = keys {
            pcr.one(name, guid, |event, content| keys_problem(name, keys, event, content));
        }
    }
    if !rule.dbx_at_least.is_empty() {
        pcr.one("dbx", DATABASE, |event, content| revocations_problem(&rule.dbx_at_least, event, content));
    }
    if !rule.sbat_at_least.is_empty() {
        pcr.sbat(&rule.sbat_at_least);
    }
    pcr.problems
}

/// PCR 7 while the rule goes through it.
struct Pcr7<'l, 'a> {
    log: &'l ReplayedLog<'a>,
    claims: &'l mut Claims,
    problems: Vec<Problem>,
}

impl<'a> Pcr7<'_, 'a> {
    /// The one measurement of a variable before the separator; a second one, or one after it, is not claimed and so
    /// stays unexpected.
    fn one(&mut self, name: &str, guid: Guid, check: impl FnOnce(&Event<'a>, &'a [u8]) -> Option<Problem>) {
        let before = self.log.events_of(PCR).take_while(|event| event.kind() != EventType::SEPARATOR);
        let found = before
            .filter(|event| event.kind() == EventType::EFI_VARIABLE_DRIVER_CONFIG)
            .find_map(|event| variable(event, name, guid).map(|variable| (event, variable.content)));
        match found {
            Some((event, content)) => {
                self.claims.claim(event);
                self.problems.extend(check(event, content));
            }
            None => {
                let sentence = format!("rule `secure-boot`: PCR {PCR}: variable `{name}` was not measured");
                self.problems.push(Problem::in_pcr(PCR, sentence));
            }
        }
    }

    /// shim measures its revocation level as an authority. Each measurement of it must be high enough.
    fn sbat(&mut self, least: &BTreeMap<String, u32>) {
        let mut measured = false;
        for event in self.log.events_of(PCR).filter(|event| event.kind() == EventType::EFI_VARIABLE_AUTHORITY) {
            let Some(variable) = variable(event, "SbatLevel", SHIM_LOCK) else { continue };
            measured = true;
            self.claims.claim(event);
            let found = sbat_level(variable.content);
            for (component, least) in least {
                let generation = found.get(component.as_str()).copied();
                if generation.is_none_or(|generation| generation < *least) {
                    let is = generation.map_or_else(|| "not listed".to_owned(), |found| found.to_string());
                    let sentence = format!(
                        "{}: SBAT generation of `{}` is {is}, not {least} or higher",
                        about(event),
                        shown(component)
                    );
                    self.problems
                        .push(problem(event, sentence).expecting(vec![format!("{component},{least}")]).found(is));
                }
            }
        }
        if !measured {
            let sentence = format!("rule `secure-boot`: PCR {PCR}: shim's `SbatLevel` was not measured");
            self.problems.push(Problem::in_pcr(PCR, sentence));
        }
    }
}

fn variable<'a>(event: &Event<'a>, name: &str, guid: Guid) -> Option<MeasuredVariable<'a>> {
    event.measured_variable().filter(|variable| variable.name == name && variable.guid == guid)
}

/// The variable is measured as one of the digests says, or every entry of it is a known key and there is one.
fn keys_problem(name: &str, keys: &Keys, event: &Event<'_>, content: &[u8]) -> Option<Problem> {
    let digest = event.digest(HashAlgorithm::Sha256);
    if keys.sha256.iter().any(|known| digest == Some(&known.0)) {
        return None;
    }
    let expected = [&keys.certificates[..], &keys.sha256].concat();
    let wrong = |what: String| {
        let sentence = format!("{}: `{name}` {what}: expected {}", about(event), short_digests(&expected));
        Some(problem(event, sentence).expecting(all_digests(&expected)))
    };
    let Ok(lists) = signature_lists(content) else {
        return wrong("is not a list of signatures".to_owned());
    };
    let mut entries = lists.iter().flat_map(|list| &list.entries).map(|entry| name_of(entry.data)).peekable();
    if entries.peek().is_none() {
        return wrong("is empty".to_owned());
    }
    let unknown = entries.find(|entry| !keys.certificates.contains(entry));
    unknown.and_then(|entry| wrong(format!("holds {entry}, which is not listed")))
}

/// Every digest is an entry of `dbx`: an image's digest or a `TBSCertificate`'s as it stands, a certificate by its own.
fn revocations_problem(least: &[EventDigest], event: &Event<'_>, content: &[u8]) -> Option<Problem> {
    let Ok(lists) = signature_lists(content) else {
        let sentence = format!("{}: `dbx` is not a list of signatures", about(event));
        return Some(problem(event, sentence).expecting(all_digests(least)));
    };
    let revoked: HashSet<EventDigest> =
        lists.iter().flat_map(|list| &list.entries).map(|entry| name_of(entry.data)).collect();
    let missing: Vec<_> = least.iter().filter(|wanted| !revoked.contains(wanted)).copied().collect();
    if missing.is_empty() {
        return None;
    }
    let sentence = format!(
        "{}: `dbx` lacks {} of {} revocations: {}",
        about(event),
        missing.len(),
        least.len(),
        short_digests(&missing).replace(" or ", ", ")
    );
    let found = format!("{} revocations", revoked.len());
    Some(problem(event, sentence).expecting(all_digests(&missing)).found(found))
}

/// What an entry is called in a policy: a digest by itself (`EFI_CERT_SHA256`; `EFI_CERT_X509_SHA256` has the time of
/// revocation after it), a certificate by its SHA-256. A digest cannot be taken for a certificate: none is so short.
fn name_of(entry: &[u8]) -> EventDigest {
    const DIGEST_BYTES: usize = 32;
    const DIGEST_AND_TIME_BYTES: usize = 48;
    let digest = match entry.len() {
        DIGEST_BYTES | DIGEST_AND_TIME_BYTES => entry[..DIGEST_BYTES].try_into(),
        _ => HashAlgorithm::Sha256.digest(entry).as_ref().try_into(),
    };
    EventDigest(digest.unwrap_or_default()) // both are 32 octets
}

/// `component,generation` line by line, as `SbatLevel` has it; the first line says its own version and date.
fn sbat_level(content: &[u8]) -> BTreeMap<&str, u32> {
    let text = std::str::from_utf8(content).unwrap_or_default().trim_end_matches('\0');
    let fields = text.lines().map(|line| {
        let mut fields = line.split(',');
        (fields.next(), fields.next())
    });
    fields.filter_map(|(component, generation)| Some((component?, generation?.trim().parse().ok()?))).collect()
}

fn about(event: &Event<'_>) -> String {
    format!("rule `secure-boot`: {}", subject(event, PCR))
}

fn problem(event: &Event<'_>, sentence: String) -> Problem {
    Problem::of(PCR, event, sentence)
}

fn on_or_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// Secure Boot's state and keys.
const PCR: u8 = 7;
/// `EFI_GLOBAL_VARIABLE`, 8be4df61-93ca-11d2-aa0d-00e098032b8c.
const GLOBAL_VARIABLE: Guid =
    Guid([0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c]);
/// `EFI_IMAGE_SECURITY_DATABASE_GUID`, d719b2cb-3d3a-4596-a3bc-dad00e67656f.
const DATABASE: Guid =
    Guid([0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f]);
/// `SHIM_LOCK_GUID`, 605dab50-e046-4300-abb6-3dd810dd8b23.
const SHIM_LOCK: Guid =
    Guid([0x50, 0xab, 0x5d, 0x60, 0x46, 0xe0, 0x00, 0x43, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23]);
