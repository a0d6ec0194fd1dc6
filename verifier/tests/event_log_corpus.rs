//! Event logs of real machines. The corpus is not part of the repository: `ASSAY_CORPUS` names its folder, and without
//! one these tests say that they skipped. `make exhaustive` looks at every change of every log.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod mutations;

use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::event_log::quirks::DataDigest;
use assay_verifier::event_log::{Event, Format, Origin, UnverifiedLog};
use mutations::{each_change, seeds};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The folder of event logs, if it is there.
fn corpus() -> Option<PathBuf> {
    mutations::corpus("eventlogs")
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

/// Asks a log everything that it can be asked. What is asked of an event depends on nothing but that event, so those that
/// `known` has are not asked again; hashing and extending take any octets, so PCRs are computed where digests changed.
fn examine(known: &[Event<'_>], bytes: &[u8]) {
    for origin in [Origin::Tpm, Origin::ConfidentialComputing] {
        let Ok(log) = UnverifiedLog::parse_from(origin, bytes) else { continue };
        let mut extended_the_same = log.inspect().len() == known.len();
        for (index, event) in log.inspect().iter().enumerate() {
            let before = known.get(index);
            let same_extension = before.is_some_and(|known| extends_the_same(known, event));
            extended_the_same &= same_extension;
            if same_extension && before.is_some_and(|known| known.logged_data() == event.logged_data()) {
                continue;
            }
            let data = event.decoded_data();
            assert!(serde_json::to_string(&data).is_ok(), "{data} cannot be written");
            let _judged = (event.data_digest(), event.quirk(), event.measured_data(), event.measured_variable());
        }
        let _odd = log.inspect_anomalies();
        if !extended_the_same {
            for bank in HashAlgorithm::ALL {
                assert_eq!(log.compute_pcrs(bank).is_some(), log.banks().contains(&bank));
            }
        }
    }
}

fn extends_the_same(known: &Event<'_>, event: &Event<'_>) -> bool {
    (known.kind(), known.pcr()) == (event.kind(), event.pcr())
        && HashAlgorithm::ALL.into_iter().all(|bank| known.digest(bank) == event.digest(bank))
}

/// Of the project's own logs, and of the corpus where it is there.
#[test]
fn no_truncation_and_no_flipped_bit_panics() {
    let mut logs = seeds("event_log");
    logs.extend(corpus().iter().flat_map(|folder| cases(folder)).map(|(case, log)| (case["id"].to_string(), log)));
    for (_, log) in &logs {
        examine(&[], log);
    }
    each_change(logs.iter().collect(), |(_, original)| {
        let known = UnverifiedLog::parse(original).map_or_else(|_| Vec::new(), |log| log.inspect().to_vec());
        move |changed| examine(&known, changed)
    });
}
