//! Attacks on the event log, against evidence of a real TPM where the TPM has a say, and on the parser alone elsewhere.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod support;

use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::appraisal::{Appraisal, Expected, appraise};
use assay_verifier::event_log::data::EventData;
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::quirks::{BOOT_VARIABLE_CONTENT, DataDigest};
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::event_log::{LogError, UnverifiedLog};
use assay_verifier::evidence::verify;
use assay_verifier::learn::learn;
use proptest::prelude::*;
use support::{ACTION, Node, artefacts, boot_log, boot_log_until_images, first_boot, settings, variable};

/// Octets of [`LogWriter::new`]: header of the SHA-1 form and the Spec ID.
const SPEC_ID_BYTES: usize = 32 + 33;

/// Why the node's evidence with another log is refused.
fn refused_with(node: &Node, log: Vec<u8>) -> Vec<String> {
    let mut evidence = node.evidence();
    evidence.event_log = log;
    verify(&evidence, &node.challenge()).expect_err("a forged log was accepted").reasons()
}

fn problem(log: &[u8]) -> &'static str {
    match UnverifiedLog::parse(log) {
        Err(LogError::Inconsistent { problem, .. }) => problem,
        other => panic!("not an inconsistent log: {other:?}"),
    }
}

#[test]
fn b1_an_event_of_ones_own_is_missed_in_the_quote() {
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let appended = boot_log().event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"rootkit"), b"");
    let reasons = refused_with(&node, appended.finish());
    assert_eq!(reasons.len(), 1);
    assert!(reasons[0].starts_with("PCR 4: 6 events replay to ") && reasons[0].contains("an event is missing, added"));
}

#[test]
fn b2_changed_data_is_not_measured_data() {
    let honest = boot_log().finish();
    let at = honest.windows(4).position(|window| window == b"t\0\0\x01").unwrap();
    let mut forged = honest.clone();
    let content = at + 2; // the octet behind "SecureBoot"
    forged[content] ^= 1;
    for (log, digest) in [(&honest, DataDigest::Matches), (&forged, DataDigest::Differs)] {
        let log = UnverifiedLog::parse(log).unwrap();
        let event = log.inspect().iter().find(|event| event.pcr() == 7).unwrap();
        assert_eq!(event.data_digest(), digest);
        assert_eq!(event.measured_data().is_some(), digest == DataDigest::Matches);
    }
}

#[test]
fn b3_no_action_is_never_extended_and_a_relabelled_event_does_not_replay() {
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let claim = boot_log().event(4, EventType::NO_ACTION, [0; 32], b"Trust me, it's good\0");
    let mut evidence = node.evidence();
    evidence.event_log = claim.finish();
    let replayed = verify(&evidence, &node.challenge()).unwrap();
    assert_eq!(replayed.log().events_of(4).count(), 5, "EV_NO_ACTION is among the events that policies see");

    let hidden = boot_log_until_images()
        .event(4, EventType::NO_ACTION, sha256(b"agent.efi"), b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b"")
        .event(12, EventType::IPL, sha256(b"command line"), b"");
    assert!(refused_with(&node, hidden.finish())[0].starts_with("PCR 4: 4 events replay to "));
}

#[test]
fn b4_dropped_moved_and_doubled_events_are_refused_and_each_pcr_is_named() {
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let reasons = refused_with(&node, boot_log_until_images().finish());
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons[0].starts_with("PCR 4: 3 events replay to "));
    assert!(reasons[1].starts_with("PCR 11 holds ") && reasons[1].ends_with("and no event explains it"));
    assert!(reasons[2].starts_with("PCR 12 holds "));

    let image = EventType::EFI_BOOT_SERVICES_APPLICATION;
    let moved = boot_log_until_images()
        .event(4, image, sha256(b"kernel"), b"")
        .event(4, image, sha256(b"agent.efi"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b"")
        .event(12, EventType::IPL, sha256(b"command line"), b"");
    assert!(refused_with(&node, moved.finish())[0].starts_with("PCR 4: "));
    let doubled = boot_log().event(12, EventType::IPL, sha256(b"command line"), b"");
    assert!(refused_with(&node, doubled.finish())[0].starts_with("PCR 12: 2 events"));
}

#[test]
fn b5_startup_locality_once_early_in_range_and_for_pcr_0() {
    let locality = |pcr: u8, value: &[u8]| {
        let data = [b"StartupLocality\0", value].concat();
        LogWriter::new().event(pcr, EventType::NO_ACTION, [0; 32], &data)
    };
    for value in [0, 3, 4] {
        assert_eq!(UnverifiedLog::parse(&locality(0, &[value]).finish()).unwrap().startup_locality(), value);
    }
    assert_eq!(problem(&locality(0, &[1]).finish()), "StartupLocality is none of 0, 3 and 4");
    assert_eq!(problem(&locality(1, &[3]).finish()), "StartupLocality for another PCR than 0");
    assert_eq!(problem(&locality(0, &[3, 0]).finish()), "StartupLocality is not one octet");
    let data = b"StartupLocality\0\x03";
    let twice = locality(0, &[3]).event(0, EventType::NO_ACTION, [0; 32], data);
    assert_eq!(problem(&twice.finish()), "second StartupLocality");
    let late = LogWriter::new().separators().event(0, EventType::NO_ACTION, [0; 32], data);
    assert_eq!(problem(&late.finish()), "StartupLocality after PCR 0 was extended");

    // A locality that the TPM was not started from does not replay.
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let honest = boot_log().finish();
    let lie = locality(0, &[3]).finish();
    let forged = [&lie[..], &honest[SPEC_ID_BYTES..]].concat();
    assert!(refused_with(&node, forged)[0].starts_with("PCR 0: 3 events replay to "));
}

#[test]
fn b6_a_spec_id_that_lies_is_refused() {
    let honest = LogWriter::new().separators().finish();
    let algorithms = 32 + 24; // offset of numberOfAlgorithms
    let with = |at: usize, octets: &[u8]| {
        let mut log = honest.clone();
        log[at..at + octets.len()].copy_from_slice(octets);
        log
    };
    assert!(UnverifiedLog::parse(&honest).is_ok());
    let count = "Spec ID with no or too many algorithms";
    assert_eq!(problem(&with(algorithms, &0u32.to_le_bytes())), count);
    assert_eq!(problem(&with(algorithms, &u32::MAX.to_le_bytes())), count);
    let size = "Spec ID gives an algorithm a size that is not its digest's";
    for wrong in [0u16, 20, 64, 0xffff] {
        assert_eq!(problem(&with(algorithms + 6, &wrong.to_le_bytes())), size);
    }
    // An algorithm that we do not know, of a possible size: readable, and of no use for a SHA-256 quote.
    let unknown = UnverifiedLog::parse(&honest).unwrap().inspect()[0].logged_data().len();
    assert_eq!(unknown, 33);
    let foreign = with(algorithms + 4, &0x0012u16.to_le_bytes());
    assert_eq!(problem(&foreign), "digest of an algorithm that the Spec ID lacks");
    // Nor may its size be one that no digest has: it decides how much of each event is skipped.
    for wrong in [0u16, 65, 0xffff] {
        let mut foreign = foreign.clone();
        foreign[algorithms + 6..algorithms + 8].copy_from_slice(&wrong.to_le_bytes());
        assert_eq!(problem(&foreign), size);
    }

    let second = LogWriter::new().event(0, EventType::NO_ACTION, [0; 32], b"Spec ID Event03\0");
    assert_eq!(problem(&second.finish()), "second Spec ID event");
    // Two digests of one algorithm, and none.
    let first_count = SPEC_ID_BYTES + 8;
    for wrong in [0u32, 2, u32::MAX] {
        let says = problem(&with(first_count, &wrong.to_le_bytes()));
        assert_eq!(says, "no digest, or more than the Spec ID has algorithms");
    }
}

#[test]
fn b7_sizes_are_compared_before_they_are_believed() {
    let honest = LogWriter::new().separators().finish();
    for size in [u32::MAX, u32::MAX - 15, 1 << 24] {
        let mut log = honest.clone();
        let at = SPEC_ID_BYTES + 12 + 2 + 32;
        log[at..at + 4].copy_from_slice(&size.to_le_bytes());
        assert!(matches!(UnverifiedLog::parse(&log), Err(LogError::Malformed { index: 1, .. })), "{size:#x}");
    }
    // And an event that is really there, in a log that is not too large, and is larger than any event.
    for (bytes, read) in [(512 << 10, true), ((512 << 10) + 1, false)] {
        let log = LogWriter::new().measured(5, EventType::EFI_ACTION, &vec![b'x'; bytes]).finish();
        assert_eq!(UnverifiedLog::parse(&log).is_ok(), read, "{bytes}");
    }
    let huge = vec![0; 100 << 20];
    assert!(matches!(UnverifiedLog::parse(&huge), Err(LogError::TooLarge { .. })));
    let mut many = LogWriter::new();
    for _ in 0..10_000 {
        many = many.event(5, EventType::EFI_ACTION, [1; 32], b"");
    }
    assert!(matches!(UnverifiedLog::parse(&many.finish()), Err(LogError::TooManyEvents { limit: 10_000 })));
    // The SHA-1 form has an event of 32 zeros; ten thousand of them and one octet that is none must not cost their
    // square.
    let mut zeros = vec![0; 32 * 9_999];
    zeros.push(1);
    assert!(matches!(UnverifiedLog::parse(&zeros), Err(LogError::Malformed { index: 9_999, .. })));
    // A variable that says to have a name of 2^63 units is shown as octets.
    let mut data = variable("SecureBoot", &[1]);
    data[23] = 0x80;
    let log = LogWriter::new().measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &data).finish();
    let log = UnverifiedLog::parse(&log).unwrap();
    assert_eq!(log.inspect()[1].decoded_data().to_string(), format!("{} octets", data.len()));
}

#[test]
fn b8_an_empty_log_explains_nothing_and_a_log_for_unquoted_pcrs_counts_for_nothing() {
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    assert_eq!(refused_with(&node, Vec::new()), ["reading the event log: event log is empty"]);
    let reasons = refused_with(&node, LogWriter::new().finish());
    assert_eq!(reasons.len(), 10, "{reasons:?}"); // PCRs 0 to 7, 11 and 12
    assert!(reasons.iter().all(|reason| reason.ends_with("and no event explains it")));
    let mut nowhere = LogWriter::new().separators().finish();
    nowhere[SPEC_ID_BYTES] = 24;
    assert_eq!(problem(&nowhere), "PCR does not exist");
    let unquoted = boot_log().event(16, EventType::IPL, [1; 32], b"");
    assert!(refused_with(&node, unquoted.finish())[0].contains("extends PCR 16, which is not quoted"));
}

/// What the policy that an honest boot teaches says of a machine that boots `log`, extends what it says, and shows it
/// as `shown`.
fn verdict_on(log: &LogWriter, shown: &LogWriter) -> Result<Vec<String>, Vec<String>> {
    let teacher = Node::boot(&boot_log(), KeyKind::Ecc);
    let evidence = teacher.evidence();
    let policy = learn("lab", "n1", &verify(&evidence, &teacher.challenge()).unwrap(), &artefacts()).unwrap();
    let mut node = Node::boot(log, KeyKind::Ecc);
    node.log = shown.finish();
    let evidence = node.evidence();
    let replayed = verify(&evidence, &node.challenge()).unwrap_or_else(|error| panic!("{:?}", error.reasons()));
    match appraise(&policy, &replayed, &Expected { settings: &settings(), boot: &first_boot() }, 0) {
        Appraisal::Accepted(accepted) => Ok(accepted.warnings().to_vec()),
        Appraisal::Refused(refusal) => Err(refusal.reasons().to_vec()),
    }
}

/// Asserts refusal for exactly one reason that ends so.
fn refused_for(log: &LogWriter, shown: &LogWriter, says: &str) {
    match verdict_on(log, shown) {
        Err(reasons) => assert!(reasons.len() == 1 && reasons[0].ends_with(says), "not `{says}`: {reasons:?}"),
        Ok(warnings) => panic!("accepted where `{says}` was expected; {warnings:?}"),
    }
}

/// The events of PCRs that the learnt policy does not list, one after the other.
fn with_events(events: &[(u8, EventType, &[u8])]) -> LogWriter {
    events.iter().fold(boot_log(), |log, (pcr, kind, data)| log.measured(*pcr, *kind, data))
}

#[test]
fn b1_labels_are_held_against_digests_pcrs_and_data() {
    let text = b"Exit Boot Services Invocation";
    let honest = with_events(&[(5, EventType::EFI_ACTION, text)]);
    assert_eq!(verdict_on(&honest, &honest), Ok(Vec::new()));
    // Really extended, and labelled as something that does not belong there, or that it has not the shape of.
    for (kind, says) in [
        (EventType::S_CRTM_VERSION, "has a label that does not belong in this PCR"),
        (EventType::EFI_BOOT_SERVICES_APPLICATION, "has a label that does not belong in this PCR"),
        (EventType::EFI_VARIABLE_AUTHORITY, "has a label that does not belong in this PCR"),
        (EventType::EFI_VARIABLE_BOOT, "is labelled as a variable's, and its data is none"),
        (EventType::EFI_VARIABLE_DRIVER_CONFIG, "is labelled as a variable's, and its data is none"),
        (EventType::EFI_GPT_EVENT, "is labelled as a partition table's, and its data is none"),
    ] {
        refused_for(&honest, &with_events(&[(5, kind, text)]), says);
    }
    let config = with_events(&[(3, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("x", &[1, 2, 3]))]);
    let unlisted = |log: &LogWriter| log.clone().measured(5, EventType::EFI_ACTION, &[1, 2, 3, 0]);
    refused_for(&unlisted(&boot_log()), &unlisted(&boot_log()), "is labelled as an action, and its data is no text");
    // PCR 3 is unlisted too: a variable there passes as what it is.
    assert_eq!(verdict_on(&config, &config), Ok(Vec::new()));
}

#[test]
fn b1_an_image_whose_digest_is_of_its_own_description_is_another_event() {
    // PCR 2 is listed in the policy; an unlisted one that may hold images is not there, so the log is looked at itself.
    let description = b"text that stands in the log and was hashed";
    let log = LogWriter::new().measured(4, EventType::EFI_BOOT_SERVICES_APPLICATION, description).finish();
    let log = UnverifiedLog::parse(&log).unwrap();
    let anomalies = log.inspect_anomalies();
    assert!(anomalies[0].to_string().contains("is of the event's own description"), "{anomalies:?}");
}

#[test]
fn b1_b4_a_separator_under_another_label_hides_nothing() {
    // Secure Boot was off; code that ran later measures that it is on, and a separator; the log is written so that the
    // true separator looks like an action.
    let measured = |first: EventType| {
        LogWriter::new()
            .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("SecureBoot", &[0]))
            .measured(7, first, &[0; 4])
            .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("SecureBoot", &[1]))
            .measured(7, EventType::SEPARATOR, &[0; 4])
            .finish()
    };
    for first in [EventType::SEPARATOR, EventType::EFI_ACTION, EventType::UNUSED] {
        let bytes = measured(first);
        let log = UnverifiedLog::parse(&bytes).unwrap();
        let found: Vec<_> = log.inspect_anomalies().iter().map(ToString::to_string).collect();
        let hidden = found.iter().any(|anomaly| anomaly.ends_with("is a separator's, under another label"));
        assert_eq!(hidden, first != EventType::SEPARATOR, "{found:?}");
        for says in ["configuration after the separator", "was measured before", "has 2 separators instead of one"] {
            assert!(found.iter().any(|anomaly| anomaly.contains(says)), "no `{says}` in {found:?}");
        }
    }
}

#[test]
fn b2_data_under_an_unchanged_digest_is_refused_by_type() {
    // PCRs 1, 5 and 8 are not in the learnt policy.
    let kinds: [(u8, EventType, Vec<u8>, Vec<u8>); 5] = [
        (1, EventType::EFI_VARIABLE_BOOT, variable("Boot0001", b"disk"), variable("Boot0001", b"nets")),
        (1, EventType::EFI_VARIABLE_DRIVER_CONFIG, variable("SecureBoot", &[0]), variable("SecureBoot", &[1])),
        (5, EventType::EFI_ACTION, b"Exit Boot Services".to_vec(), b"Exit Boot Serviced".to_vec()),
        (5, EventType::EFI_VARIABLE_BOOT2, variable("BootOrder", &[1, 0]), variable("BootOrder", &[2, 0])),
        (8, EventType::IPL, b"grub_cmd: set a=1\0".to_vec(), b"grub_cmd: set a=2\0".to_vec()),
    ];
    for (pcr, kind, true_data, shown_data) in kinds {
        // GRUB hashes its text without prefix and final zero.
        let hashed = true_data.strip_prefix(b"grub_cmd: ").map_or(&true_data[..], |text| &text[..text.len() - 1]);
        let honest = boot_log().event(pcr, kind, sha256(hashed), &true_data);
        assert_eq!(verdict_on(&honest, &honest), Ok(Vec::new()), "{kind}");
        let forged = boot_log().event(pcr, kind, sha256(hashed), &shown_data);
        refused_for(&honest, &forged, "is not of the data in the log: data or label were changed");
    }
}

#[test]
fn b2_where_the_policy_knows_the_digest_changed_data_is_only_said() {
    let forged = LogWriter::new()
        .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
        .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, sha256(b"firmware"), &[0xff; 16])
        .event(
            7,
            EventType::EFI_VARIABLE_DRIVER_CONFIG,
            sha256(&variable("SecureBoot", &[0])),
            &variable("SecureBoot", &[1]),
        )
        .measured(1, EventType::EFI_VARIABLE_BOOT, &variable("BootOrder", &[0, 0]))
        .measured(4, EventType::EFI_ACTION, ACTION)
        .separators()
        // Another device path: nothing is measured of it, so nothing depends on it.
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"snponly.efi"), &[0; 32])
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"agent.efi"), &[0xff; 40])
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
        .event(12, EventType::IPL, sha256(b"command line"), b"agent.efi quiet");
    let warnings = verdict_on(&boot_log(), &forged).unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].starts_with("PCR 7 event 3") && warnings[0].ends_with("data or label were changed"));
    // And nobody may take the changed variable for a measured one.
    let bytes = forged.finish();
    let log = UnverifiedLog::parse(&bytes).unwrap();
    assert_eq!(log.inspect()[3].measured_variable(), None);
    assert_eq!(log.inspect()[4].measured_variable().unwrap().name, "BootOrder");
}

#[test]
fn b2_a_variable_measured_by_its_content_alone_vouches_for_no_name() {
    let log =
        LogWriter::new().event(1, EventType::EFI_VARIABLE_BOOT, sha256(b"content"), &variable("Boot0001", b"content"));
    let bytes = log.finish();
    let log = UnverifiedLog::parse(&bytes).unwrap();
    let event = &log.inspect()[1];
    assert_eq!((event.data_digest(), event.quirk()), (DataDigest::Matches, Some(&BOOT_VARIABLE_CONTENT)));
    assert_eq!((event.measured_data(), event.measured_variable()), (None, None));
}

#[test]
fn b3_an_event_that_claims_a_digest_and_was_not_extended_is_said() {
    let claim = boot_log().event(4, EventType::NO_ACTION, sha256(b"agent.efi"), b"claim").finish();
    let log = UnverifiedLog::parse(&claim).unwrap();
    assert_eq!(log.warnings(), ["1 EV_NO_ACTION events have a digest, and nothing was extended for them"]);
}

#[test]
fn b4_a_missing_or_doubled_separator_and_one_of_an_error_are_refused() {
    let without = |missing: u8| {
        let closed = (0..8).filter(|pcr| *pcr != missing);
        let opened = LogWriter::new()
            .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
            .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, sha256(b"firmware"), &[0; 16])
            .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("SecureBoot", &[0]))
            .measured(4, EventType::EFI_ACTION, ACTION);
        closed
            .fold(opened, |log, pcr| log.measured(pcr, EventType::SEPARATOR, &[0; 4]))
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"snponly.efi"), b"")
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"agent.efi"), b"")
            .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
            .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
            .event(12, EventType::IPL, sha256(b"command line"), b"agent.efi quiet")
    };
    for pcr in [1, 3, 5, 6] {
        refused_for(&without(pcr), &without(pcr), &format!("PCR {pcr} has 0 separators instead of one"));
        let doubled = boot_log().measured(pcr, EventType::SEPARATOR, &[0; 4]);
        refused_for(&doubled, &doubled, &format!("PCR {pcr} has 2 separators instead of one"));
        let failed = without(pcr).measured(pcr, EventType::SEPARATOR, &[1, 0, 0, 0]);
        refused_for(&failed, &failed, "is not a separator's, or of a firmware error");
    }
    // In a PCR whose every event the policy knows, it is the policy that misses it.
    let reasons = verdict_on(&without(7), &without(7)).unwrap_err();
    assert!(reasons[0].starts_with("PCR 7: ") && reasons[0].contains("was not measured"), "{reasons:?}");
}

#[test]
fn b6_one_bank_missing_in_one_event_or_twice_is_refused_where_it_counts() {
    use HashAlgorithm::{Sha1, Sha256};
    let honest = LogWriter::of_banks(&[Sha1, Sha256]).separators().finish();
    let spec_id = SPEC_ID_BYTES + 4; // one algorithm more
    let first = |log: &[u8]| UnverifiedLog::parse(log).map(|log| log.inspect()[1].digest(Sha256).is_some());
    assert_eq!(first(&honest), Ok(true));
    // The first event with its SHA-1 digest alone: read, said, and of no use for a SHA-256 quote.
    let mut gap = honest[..spec_id + 8].to_vec();
    gap.extend(1u32.to_le_bytes());
    gap.extend(&honest[spec_id + 12..spec_id + 12 + 22]);
    gap.extend(&honest[spec_id + 12 + 22 + 34..]);
    assert_eq!(first(&gap), Ok(false));
    assert_eq!(UnverifiedLog::parse(&gap).unwrap().warnings(), ["1 events have no sha256 digest (bank-gap)"]);
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    assert_eq!(refused_with(&node, gap), ["replaying the event log: event log, event 1: has no SHA-256 digest"]);
    // Two digests of one algorithm: which one was extended?
    let mut twice = honest.clone();
    twice[spec_id + 12 + 22..spec_id + 12 + 24].copy_from_slice(&Sha1.id().to_le_bytes());
    assert_eq!(problem(&twice), "two digests of one algorithm");
    let mut named_twice = honest.clone();
    named_twice[32 + 28 + 4..32 + 28 + 8].copy_from_slice(&[4, 0, 20, 0]);
    assert_eq!(problem(&named_twice), "Spec ID names an algorithm twice");
    // A log without the quoted bank, and logs that are no TPM 2.0's.
    for (log, says) in [
        (LogWriter::of_banks(&[Sha1]).separators().finish(), "has no SHA-256 digests"),
        (LogWriter::tpm12().separators().finish(), "is in the format of TPM 1.2"),
    ] {
        let reasons = refused_with(&node, log);
        assert!(reasons.len() == 1 && reasons[0].contains(says), "{reasons:?}");
    }
}

#[test]
fn b6_a_bank_that_nothing_here_computes_is_skipped_and_said() {
    let mut log = LogWriter::of_banks(&[HashAlgorithm::Sha256]).finish();
    // The Spec ID of SHA-256 and SM3, then one event with both.
    log[28..32].copy_from_slice(&37u32.to_le_bytes());
    log[32 + 24] = 2;
    log.splice(32 + 32..32 + 32, [0x12, 0, 32, 0]);
    let event = [
        &4u32.to_le_bytes()[..],
        &4u32.to_le_bytes(),
        &2u32.to_le_bytes(),
        &[0x0b, 0],
        &sha256(&[0; 4]),
        &[0x12, 0],
        &[9; 32],
        &4u32.to_le_bytes(),
        &[0; 4],
    ];
    log.extend(event.concat());
    let log = UnverifiedLog::parse(&log).unwrap();
    assert_eq!((log.banks(), log.inspect().len()), (&[HashAlgorithm::Sha256][..], 2));
    assert_eq!(log.warnings(), ["bank sm3_256 is in the log and not replayed: nothing here computes sm3_256"]);
    assert_eq!(log.inspect()[1].data_digest(), DataDigest::Matches);
}

#[test]
fn b7_nested_lengths_are_compared_before_they_are_believed() {
    let shown = |kind: EventType, data: &[u8]| EventData::decode(kind, data).to_string();
    let octets = |data: &[u8]| format!("{} octets", data.len());
    for length in [u64::MAX, u64::MAX / 2 + 1, 1 << 32, 100] {
        let mut by_content = variable("db", &[1; 40]);
        by_content[24..32].copy_from_slice(&length.to_le_bytes());
        assert_eq!(shown(EventType::EFI_VARIABLE_DRIVER_CONFIG, &by_content), octets(&by_content));
        let image = [&[0; 24][..], &length.to_le_bytes(), &[0x7f, 0xff, 4, 0]].concat();
        assert_eq!(shown(EventType::EFI_BOOT_SERVICES_APPLICATION, &image), octets(&image));
        let tables = [&length.to_le_bytes()[..], &[0; 24]].concat();
        assert_eq!(shown(EventType::EFI_HANDOFF_TABLES, &tables), octets(&tables));
    }
    let tag = [&1u32.to_le_bytes()[..], &u32::MAX.to_le_bytes(), b"x"].concat();
    assert_eq!(shown(EventType::EVENT_TAG, &tag), octets(&tag));
    // A path of more nodes than any machine has ends.
    let path = [&[0; 24][..], &(4u64 * 1000).to_le_bytes(), &[4, 4, 4, 0].repeat(1000)].concat();
    assert!(shown(EventType::EFI_BOOT_SERVICES_DRIVER, &path).len() < 300);
    // A count of digests of 2^32 - 16.
    let mut log = LogWriter::new().separators().finish();
    log[SPEC_ID_BYTES + 8..SPEC_ID_BYTES + 12].copy_from_slice(&(u32::MAX - 15).to_le_bytes());
    assert_eq!(problem(&log), "no digest, or more than the Spec ID has algorithms");
}

#[test]
fn b9_option_roms_acpi_tables_and_initrds_that_nobody_approved_are_refused() {
    let rom = boot_log().event(2, EventType::EFI_BOOT_SERVICES_DRIVER, sha256(b"option ROM"), &[0; 32]);
    refused_for(&rom, &rom, "the policy has no event after `0x00000000`");
    let acpi = boot_log().event(0, EventType::POST_CODE, sha256(b"DSDT"), b"ACPI DATA");
    refused_for(&acpi, &acpi, "the policy has no event after `0x00000000`");
    let initrd = boot_log().event(11, EventType::IPL, sha256(b"initrd of another"), b".initrd");
    refused_for(&initrd, &initrd, "the policy has no event after `agent.efi section .initrd`");
    let line = boot_log().event(12, EventType::IPL, sha256(b"init=/bin/sh"), b"agent.efi init=/bin/sh");
    refused_for(&line, &line, "the policy has no event after `kernel command line`");
    // What DHCP and the boot script told the agent is no event of firmware's: it is measured by the agent, once.
    let script = boot_log().measured(14, EventType::IPL, b"#!ipxe");
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    assert!(refused_with(&node, script.finish())[0].starts_with("PCR 14: 2 events replay to "));
}

#[test]
fn b9_a_measurement_that_the_agent_did_not_make_or_hides_is_refused() {
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    let mut hidden = node.evidence();
    hidden.agent_measurements.clear();
    let reasons = verify(&hidden, &node.challenge()).unwrap_err().reasons();
    assert!(reasons[0].starts_with("PCR 14 holds ") && reasons[0].ends_with("and no event explains it"));
    let mut changed = node.evidence();
    changed.agent_measurements[0].data.push(b' ');
    assert!(verify(&changed, &node.challenge()).unwrap_err().reasons()[0].starts_with("PCR 14: 1 events replay"));
    let mut elsewhere = node.evidence();
    elsewhere.agent_measurements[0].pcr = 4;
    let reasons = verify(&elsewhere, &node.challenge()).unwrap_err().reasons();
    assert_eq!(reasons, ["evidence: agent measurement 0 is into PCR 4, not 14"]);
}

#[test]
fn linux_measures_the_boot_aggregate_into_pcr_10_and_nothing_else_may() {
    // security/integrity/ima: template ima-ng, both fields with their sizes before them.
    let aggregate = |pcrs: &[[u8; 32]]| {
        let digest = sha256(&pcrs[..10].concat());
        let fields = [&40u32.to_le_bytes()[..], b"sha256:\0", &digest, &15u32.to_le_bytes(), b"boot_aggregate\0"];
        sha256(&fields.concat())
    };
    let node = Node::boot(&boot_log(), KeyKind::Ecc);
    node.tpm.extend(10, &aggregate(boot_log().pcrs()));
    verify(&node.evidence(), &node.challenge()).unwrap();
    node.tpm.extend(10, &[7; 32]);
    let reasons = verify(&node.evidence(), &node.challenge()).unwrap_err().reasons();
    assert!(reasons[0].starts_with("PCR 10 holds ") && reasons.len() == 1, "{reasons:?}");
}

#[test]
fn padding_is_skipped_and_nothing_else_is() {
    let honest = boot_log().finish();
    let events = UnverifiedLog::parse(&honest).unwrap().inspect().len();
    for padding in [vec![0; 100], vec![0xff; 7], vec![0; 1]] {
        let log = [&honest[..], &padding].concat();
        let log = UnverifiedLog::parse(&log).unwrap();
        assert_eq!((log.inspect().len(), log.warnings().len()), (events, 1));
    }
    assert!(UnverifiedLog::parse(&[&honest[..], &[0, 0, 1]].concat()).is_err());
}

proptest! {
    #[test]
    fn arbitrary_octets_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let honest = LogWriter::new().separators().finish();
        for log in [bytes.clone(), [&honest[..], &bytes].concat()] {
            if let Ok(log) = UnverifiedLog::parse(&log) {
                for event in log.inspect() {
                    let _ = (event.decoded_data().to_string(), event.data_digest());
                }
                let _ = log.compute_pcrs(HashAlgorithm::Sha256);
            }
        }
    }

    #[test]
    fn what_is_written_is_read_and_replays(events in proptest::collection::vec(
        (0u8..15, 4u32..16, proptest::collection::vec(any::<u8>(), 0..80)), 0..40))
    {
        let mut writer = LogWriter::new();
        for (pcr, kind, data) in &events {
            writer = writer.measured(*pcr, EventType::from_code(*kind), data);
        }
        let bytes = writer.finish();
        let log = UnverifiedLog::parse(&bytes).unwrap();
        prop_assert_eq!(log.inspect().len(), events.len() + 1);
        for (event, (pcr, kind, data)) in log.inspect()[1..].iter().zip(&events) {
            prop_assert_eq!((event.pcr(), event.kind().code()), (u32::from(*pcr), *kind));
            prop_assert_eq!(event.measured_data(), Some(&data[..]));
        }
        for (pcr, value) in log.compute_pcrs(HashAlgorithm::Sha256).unwrap() {
            prop_assert_eq!(&value[..], &writer.pcrs()[usize::from(pcr)][..]);
        }
    }

    #[test]
    fn b7_d8_decoding_any_data_never_panics_and_commands_no_terminal(
        kind in prop_oneof![0u32..0x14, 0x8000_0000u32..0x8000_0100],
        data in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let shown = assay_verifier::event_log::data::EventData::decode(EventType::from_code(kind), &data).to_string();
        prop_assert!(!shown.chars().any(char::is_control), "{shown:?}");
    }
}
