//! Attacks on the event log, against evidence of a real TPM where the TPM has a say, and on the parser alone elsewhere.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod support;

use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::testing::{KeyKind, sha256};
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::quirks::DataDigest;
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::event_log::{LogError, UnverifiedLog};
use assay_verifier::evidence::verify;
use proptest::prelude::*;
use support::{Node, boot_log, boot_log_until_images, variable};

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
    let unquoted = boot_log().event(16, EventType::IPL, [1; 32], b"");
    assert!(refused_with(&node, unquoted.finish())[0].contains("extends PCR 16, which is not quoted"));
}

#[test]
fn a_measurement_that_the_agent_did_not_make_or_hides_is_refused() {
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
    fn decoding_any_data_as_any_type_never_panics(
        kind in prop_oneof![0u32..0x14, 0x8000_0000u32..0x8000_0100],
        data in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let shown = assay_verifier::event_log::data::EventData::decode(EventType::from_code(kind), &data).to_string();
        prop_assert!(!shown.chars().any(char::is_control), "{shown:?}");
    }
}
