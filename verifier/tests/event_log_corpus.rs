//! Event logs of real machines. The corpus is not part of the repository: `ASSAY_CORPUS` names its folder, and without
//! one these tests say that they skipped.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::event_log::quirks::DataDigest;
use assay_verifier::event_log::{Event, Format, Origin, UnverifiedLog};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The folder of event logs, if it is there.
fn corpus() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let folder = std::env::var_os("ASSAY_CORPUS").map_or(default, PathBuf::from).join("eventlogs");
    if folder.join("cases.json").exists() {
        return Some(folder);
    }
    eprintln!("skipped: no corpus at {} (set ASSAY_CORPUS)", folder.display());
    None
}

/// Each case with its log.
fn cases(folder: &Path) -> Vec<(Value, Vec<u8>)> {
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(folder.join("cases.json")).unwrap()).unwrap();
    let read = |case: Value| {
        let path = folder.join(case["eventlog"].as_str().unwrap());
        std::fs::read(path).ok().map(|log| (case, log))
    };
    cases.into_iter().filter_map(read).collect()
}

#[test]
fn every_log_replays_to_the_published_pcrs() {
    let Some(folder) = corpus() else { return };
    let mut replayed_logs = 0;
    for (case, bytes) in cases(&folder) {
        let id = case["id"].as_str().unwrap();
        let parsed = UnverifiedLog::parse(&bytes);
        if !case["parse_error"].is_null() {
            assert!(parsed.is_err(), "{id}: a broken log was accepted");
            continue;
        }
        let log = parsed.unwrap_or_else(|error| panic!("{id}: {error:?}"));
        let format = if case["format"] == "crypto-agile" { Format::CryptoAgile } else { Format::Sha1 };
        assert_eq!(log.format(), format, "{id}");
        assert_eq!(u64::from(log.startup_locality()), case["startup_locality"].as_u64().unwrap(), "{id}");
        for (name, expected) in case["replayed_pcrs"].as_object().unwrap() {
            let bank = HashAlgorithm::ALL.into_iter().find(|bank| bank.as_str() == name).unwrap();
            let pcrs = log.compute_pcrs(bank).unwrap();
            let found: serde_json::Map<_, _> =
                pcrs.iter().map(|(pcr, value)| (pcr.to_string(), Value::from(hex::encode(value)))).collect();
            assert_eq!(&found, expected.as_object().unwrap(), "{id} {name}");
        }
        replayed_logs += 1;
    }
    assert!(replayed_logs >= 20, "only {replayed_logs} logs were replayed");
}

#[test]
fn data_differs_from_its_digest_exactly_where_genuine_firmware_does_so() {
    let Some(folder) = corpus() else { return };
    for (case, bytes) in cases(&folder) {
        let Ok(log) = UnverifiedLog::parse(&bytes) else { continue };
        let differs: Vec<_> = log
            .inspect()
            .iter()
            .filter(|event| event.data_digest() == DataDigest::Differs)
            .map(|e| e.index())
            .collect();
        let published: Vec<_> = case["data_hash_bad"]
            .as_array()
            .unwrap()
            .iter()
            .map(|bad| usize::try_from(bad["index"].as_u64().unwrap()).unwrap())
            .collect();
        assert_eq!(differs, published, "{}", case["id"]);
    }
}

#[test]
fn genuine_logs_have_quirks_by_name_and_no_anomaly() {
    let Some(folder) = corpus() else { return };
    let mut quirks = BTreeSet::new();
    for (case, bytes) in cases(&folder) {
        let Ok(log) = UnverifiedLog::parse(&bytes) else { continue };
        quirks.extend(log.inspect().iter().filter_map(|event| event.quirk().map(|quirk| quirk.name)));
        // Logs cut down to a single event have no separators.
        let whole = log.inspect().len() > 2;
        let anomalies: Vec<_> = log.inspect_anomalies().iter().map(ToString::to_string).collect();
        assert!(!whole || anomalies.is_empty(), "{}: {anomalies:?}", case["id"]);
    }
    let seen = ["boot-variable-content", "grub-prefix", "shim-authority", "tag-names-content", "windows-trust-point"];
    assert_eq!(quirks.into_iter().collect::<Vec<_>>(), seen);
}

/// Reads and uses everything that a log can be asked.
fn exercise(bytes: &[u8]) {
    let _ = UnverifiedLog::parse_from(Origin::ConfidentialComputing, bytes);
    if let Ok(log) = UnverifiedLog::parse(bytes) {
        let _ = log.inspect_anomalies();
        for event in log.inspect() {
            let _ = (event.decoded_data().to_string(), event.data_digest(), event.measured_data());
        }
        for bank in HashAlgorithm::ALL {
            let _ = log.compute_pcrs(bank);
        }
    }
}

/// Some truncations and flipped bits, all through each log; every one of them where `ASSAY_EXHAUSTIVE` is set.
#[test]
fn no_truncation_and_no_flipped_bit_panics() {
    let Some(folder) = corpus() else { return };
    let exhaustive = std::env::var_os("ASSAY_EXHAUSTIVE").is_some();
    let mut logs: Vec<_> = cases(&folder).into_iter().map(|(_, bytes)| bytes).collect();
    logs.sort();
    logs.dedup();
    for bytes in logs {
        // About 60 of each per log.
        let step = if exhaustive { 1 } else { bytes.len() / 60 + 1 };
        let bits = |at: usize| if exhaustive { 0..8 } else { at % 8..at % 8 + 1 };
        let examine: fn(&[u8], &[u8]) = if exhaustive { exercise_changes } else { |_, bytes| exercise(bytes) };
        for at in (0..bytes.len()).step_by(step) {
            examine(&bytes, &bytes[..at]);
            let mut flipped = bytes.clone();
            for bit in bits(at) {
                flipped[at] ^= 1 << bit;
                examine(&bytes, &flipped);
                flipped[at] ^= 1 << bit;
            }
        }
    }
}

/// The same as [`exercise`] for those events that are not as in the log as it was: the others were exercised already,
/// and hashing and extending do not panic for any value.
fn exercise_changes(original: &[u8], bytes: &[u8]) {
    let Ok(log) = UnverifiedLog::parse(bytes) else { return };
    let original = UnverifiedLog::parse(original);
    let known = original.as_ref().map_or(&[][..], |log| log.inspect());
    for (index, event) in log.inspect().iter().enumerate() {
        let same = |known: &Event<'_>| {
            (known.kind(), known.pcr(), known.logged_data()) == (event.kind(), event.pcr(), event.logged_data())
        };
        if !known.get(index).is_some_and(same) {
            let _ = (event.decoded_data().to_string(), event.data_digest(), event.measured_data());
        }
    }
}
