//! libiscsi's tools against the engine over TCP: its conformance suite, and a login with CHAP.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use assay_iscsi::{Authentication, ChapCredentials, SessionLimit};
use std::collections::BTreeMap;
use std::process::{Command, Output};
use support::{INITIATOR, NAME, Server, TARGET, config};

/// 256 MiB: the suite wants 65536 blocks and more.
const BLOCKS: u64 = 512 * 1024;

/// Tests that fail, each for a reason that is not ours.
const KNOWN_FAILURES: [&str; 1] = [
    // It asks for the status at LBA i + 1 and expects the answer for i + (blocks per physical block), which SBC-3
    // §5.6 rules out wherever a physical block has more than one logical block.
    "GetLBAStatus.UnmapSingle",
];
/// Tests that pass without being skipped: fewer is a step back.
const LEAST_PASSES: usize = 189;

/// How a test ended. The suite counts a skipped test as passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    Skipped,
    Failed,
}

#[test]
fn the_conformance_suite_passes() {
    let server = Server::start(0, config(BLOCKS, Authentication::None), SessionLimit::Many(8));
    let url = format!("iscsi://{}/{TARGET}/0", server.address());
    // Both of the suite's initiators are the one that the target accepts; the same URL twice is a second path.
    let names = ["-i", INITIATOR, "-I", INITIATOR];
    let output = run("iscsi-test-cu", &[&names[..], &["-d", "-v", "-t", "ALL", &url, &url]].concat());
    let log = String::from_utf8_lossy(&output.stdout);
    let outcomes = outcomes(&log);
    let named = |wanted: Outcome| -> Vec<&str> {
        outcomes.iter().filter(|(_, outcome)| **outcome == wanted).map(|(name, _)| name.as_str()).collect()
    };
    let (passed, skipped) = (named(Outcome::Passed).len(), named(Outcome::Skipped).len());
    eprintln!("{} tests: {passed} passed, {skipped} skipped", outcomes.len());
    assert_eq!(outcomes.len(), 230, "the suite ran to its end:\n{log}");
    assert_eq!(named(Outcome::Failed), KNOWN_FAILURES, "{log}");
    assert!(passed >= LEAST_PASSES, "{passed} passed; skipped: {:?}", named(Outcome::Skipped));
}

#[test]
fn a_read_only_target_refuses_every_write() {
    let mut config = config(BLOCKS, Authentication::None);
    config.logical_unit.read_only = true;
    let server = Server::start(0, config, SessionLimit::One);
    let url = format!("iscsi://{}/{TARGET}/0", server.address());
    let output = run("iscsi-test-cu", &["-i", INITIATOR, "-d", "-v", "-t", "SCSI.ReadOnly", &url]);
    let log = String::from_utf8_lossy(&output.stdout);
    assert_eq!(outcomes(&log).get("ReadOnly.ReadOnlySBC"), Some(&Outcome::Passed), "{log}");
}

#[test]
fn libiscsi_logs_in_with_chap_and_not_without() {
    // libiscsi takes the secret from the URL.
    let credentials = ChapCredentials::new(NAME, "twelve-chars-");
    let authentication = Authentication::Chap { initiator: credentials, target: None };
    let server = Server::start(0, config(BLOCKS, authentication), SessionLimit::One);
    let inquire = |login: &str| {
        let url = format!("iscsi://{login}{}/{TARGET}/0", server.address());
        run("iscsi-inq", &["-i", INITIATOR, &url])
    };
    let good = inquire("n1%twelve-chars-@");
    assert!(String::from_utf8_lossy(&good.stdout).contains("Vendor:ASSAY"), "{good:?}");
    for login in ["", "n1%twelve-chars+@", "n2%twelve-chars-@"] {
        let bad = inquire(login);
        assert!(!bad.status.success(), "{login}");
        assert!(!String::from_utf8_lossy(&bad.stdout).contains("Vendor:ASSAY"), "{login}");
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| {
        panic!("running {program}: {error}; `apt-get install libiscsi-bin` has it");
    })
}

/// Reads the suite's log: `Suite: X`, then `Test: Y ...`, what it says, and `passed` or `FAILED`.
fn outcomes(log: &str) -> BTreeMap<String, Outcome> {
    let mut outcomes = BTreeMap::new();
    let (mut suite, mut test) = (String::new(), String::new());
    for line in log.lines() {
        if let Some(name) = line.strip_prefix("Suite: ") {
            name.trim().clone_into(&mut suite);
        }
        if let Some((name, _)) = line.trim_start().strip_prefix("Test: ").and_then(|rest| rest.split_once(" ...")) {
            test = format!("{suite}.{name}");
            outcomes.insert(test.clone(), Outcome::Passed);
        }
        let Some(outcome) = outcomes.get_mut(&test) else { continue };
        if line.trim_end().ends_with("FAILED") {
            *outcome = Outcome::Failed;
        } else if line.contains("[SKIPPED]") && *outcome == Outcome::Passed {
            *outcome = Outcome::Skipped;
        }
    }
    outcomes
}
