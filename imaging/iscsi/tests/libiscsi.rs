//! libiscsi's tools against the engine over TCP: its conformance suite, header digests, and a login with CHAP.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use assay_iscsi::{Authentication, ChapAlgorithms, ChapCredentials, SessionLimit};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use support::{INITIATOR, NAME, Server, TARGET, config};

/// 256 MiB: the suite wants 65536 blocks and more.
const BLOCKS: u64 = 512 * 1024;

/// Tests that pass without being skipped: fewer is a step back.
const LEAST_PASSES: usize = 200;

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
    let output = run("iscsi-test-cu", &[&names[..], &["-d", "-S", "-v", "-t", "ALL", &url, &url]].concat());
    let log = String::from_utf8_lossy(&output.stdout);
    let outcomes = outcomes(&log);
    assert_eq!(outcomes.len(), 230, "the suite ran to its end:\n{log}");
    let passed = outcomes.values().filter(|outcome| **outcome == Outcome::Passed).count();
    eprintln!("{} tests: {passed} passed without being skipped", outcomes.len());
    let others: BTreeMap<String, Outcome> =
        outcomes.into_iter().filter(|(_, outcome)| *outcome != Outcome::Passed).collect();
    assert_eq!(others, documented(), "docs/iscsi.md has a row for every test that does not pass, and no other:\n{log}");
    assert!(passed >= LEAST_PASSES, "only {passed} passed");
}

/// The rows of `docs/iscsi.md`: what does not pass, each with a reason.
fn documented() -> BTreeMap<String, Outcome> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/iscsi.md");
    let page = std::fs::read_to_string(page).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |")).map(|row| {
        let cells: Vec<&str> = row.split(" | ").collect();
        let [test, outcome, reason] = cells[..] else { panic!("a row of three cells: {row}") };
        assert!(reason.len() > 10, "{test} has no reason");
        let outcome = match outcome {
            "fails" => Outcome::Failed,
            "skipped" => Outcome::Skipped,
            other => panic!("{test}: {other} is no outcome"),
        };
        (test.trim_end_matches('`').to_owned(), outcome)
    });
    rows.collect()
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
fn libiscsi_reads_and_writes_with_header_digests() {
    // libiscsi's own tools offer them and prefer none; QEMU, which uses it, can ask for them.
    for (digest, agreed) in [("none", false), ("crc32c", true)] {
        let server = Server::start(0, config(BLOCKS, Authentication::None), SessionLimit::One);
        let image = format!(
            "driver=iscsi,transport=tcp,portal={},target={TARGET},lun=0,initiator-name={INITIATOR},header-digest={digest}",
            server.address()
        );
        let commands = ["-c", "write -P 0x5a 4k 3M", "-c", "read -P 0x5a 4k 3M", "-c", "read -P 0 0 4k"];
        let output = run("qemu-io", &[&["--image-opts", &image][..], &commands].concat());
        let log = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !log.contains("failed"), "{digest}: {output:?}");
        for done in ["wrote 3145728/3145728", "read 3145728/3145728", "read 4096/4096"] {
            assert!(log.contains(done), "{done}: {log}");
        }
        assert_eq!(server.has_agreed_on_header_digests(), agreed, "{digest}");
    }
}

#[test]
fn libiscsi_logs_in_with_chap_and_not_without() {
    // libiscsi takes the secret from the URL.
    let credentials = ChapCredentials::new(NAME, "twelve-chars-");
    let authentication =
        Authentication::Chap { initiator: credentials, target: None, algorithms: ChapAlgorithms::WithMd5 };
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
        panic!("running {program}: {error}; scripts/packages.txt names what has it");
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
