//! `assay eventlog` as people and programs meet it: on logs written here, and on those of real machines where the corpus
//! is (`ASSAY_CORPUS`).

#![expect(clippy::unwrap_used, reason = "a test's set-up fails loudly")]

use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::ima::writer::ListWriter;
use serde_json::{Value, json};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn eventlog(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_assay")).arg("eventlog").args(arguments).output().unwrap()
}

fn show(file: &Path, more: &[&str]) -> Value {
    let output = eventlog(&[&["show", file.to_str().unwrap(), "--output", "json"], more].concat());
    assert_eq!(output.status.code(), Some(0), "{}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn verify(file: &Path, pcrs: &Path) -> (Option<i32>, Value, String) {
    let output = eventlog(&["verify", file.to_str().unwrap(), "--pcrs", pcrs.to_str().unwrap(), "--output", "json"]);
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap_or_default(), said)
}

/// Asserts exit status 2 and one line that says all of `words`.
fn unreadable(arguments: &[&str], words: &[&str]) {
    let output = eventlog(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?} printed something");
    for word in words {
        assert!(said.contains(word), "{arguments:?} did not say `{word}`: {said}");
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

fn variable(name: &str, content: &[u8]) -> Vec<u8> {
    let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let sizes = [units.len() / 2, content.len()].map(|size| u64::try_from(size).unwrap().to_le_bytes());
    [&[0x61; 16], &sizes[0][..], &sizes[1], &units, content].concat()
}

fn boot(writer: LogWriter) -> LogWriter {
    writer
        .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
        .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, [1; 32], &[0; 16])
        .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("SecureBoot", &[1]))
        .separators()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, [2; 32], b"")
        .event(8, EventType::IPL, [3; 32], b"grub_cmd: set root=hd0\0")
}

fn hex_of(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

#[test]
fn show_says_every_event_and_what_the_pcrs_come_to() {
    let folder = Folder::new();
    let writer = boot(LogWriter::of_banks(&HashAlgorithm::ALL));
    let file = folder.file("log", writer.finish());
    let shown = show(&file, &[]);
    assert_eq!(shown["format"], "crypto-agile");
    assert_eq!(shown["banks"], json!(["sha1", "sha256", "sha384", "sha512"]));
    assert_eq!(shown["startup_locality"], 0);
    assert_eq!(shown["ima_pcr10"], Value::Null);
    for bank in HashAlgorithm::ALL {
        let pcrs = shown["pcrs"][bank.as_str()].as_object().unwrap();
        assert_eq!(pcrs.len(), 9, "{bank}: PCRs 0 to 8");
        for (pcr, value) in pcrs {
            let expected = &writer.pcrs_of(bank).unwrap()[pcr.parse::<usize>().unwrap()];
            assert_eq!(value, &hex_of(expected), "{bank} PCR {pcr}");
        }
    }
    let events = shown["events"].as_array().unwrap();
    let of_data: Vec<_> = events.iter().map(|event| event["digest_matches_data"].clone()).collect();
    let yes = Value::from(true);
    let mut expected = vec![Value::Null, yes.clone(), Value::Null, yes.clone()];
    expected.extend(vec![yes; 8]);
    expected.extend([Value::Null, Value::from(false)]);
    assert_eq!(of_data, expected);
    assert_eq!((&events[3]["type"], &events[3]["pcr"]), (&json!("EV_EFI_VARIABLE_DRIVER_CONFIG"), &json!(7)));
    assert_eq!(events[3]["data"]["value"]["name"], "SecureBoot");
    assert_eq!(events[3]["data"]["value"]["means"], json!({"kind": "switch", "value": true}));
    // GRUB's text is not what its digest is of: nobody's quirk.
    assert!(shown["warnings"][0].as_str().unwrap().contains("data or label were changed"), "{}", shown["warnings"]);
    let table = String::from_utf8(eventlog(&["show", file.to_str().unwrap()]).stdout).unwrap();
    for words in ["SecureBoot: on", "EV_SEPARATOR", "BANK", "warning: PCR 8 event 13"] {
        assert!(table.contains(words), "no `{words}` in\n{table}");
    }
}

#[test]
fn a_log_may_come_from_standard_input_and_be_of_tpm_1_2_or_no_tpm_at_all() {
    let folder = Folder::new();
    let old = folder.file("old", boot(LogWriter::tpm12()).finish());
    let shown = show(&old, &[]);
    assert_eq!((&shown["format"], &shown["banks"]), (&json!("sha1-legacy"), &json!(["sha1"])));
    let writer = LogWriter::of_banks(&[HashAlgorithm::Sha384]).measured(1, EventType::EFI_HANDOFF_TABLES2, b"x");
    let ccel = folder.file("CCEL", writer.finish());
    let shown = show(&ccel, &[]);
    assert_eq!(shown["format"], "ccel");
    assert_eq!(shown["pcrs"]["sha384"]["1"], hex_of(&writer.pcrs_of(HashAlgorithm::Sha384).unwrap()[1]));
    assert_eq!(show(&ccel, &["--format", "tpm"])["format"], "crypto-agile");
    unreadable(&["show", old.to_str().unwrap(), "--format", "ccel"], &["Spec ID"]);
    let table = folder.file("ccel-table", b"CCEL\x38\0\0\0");
    unreadable(&["show", table.to_str().unwrap()], &["/sys/firmware/acpi/tables/data/CCEL"]);

    let mut child = Command::new(env!("CARGO_BIN_EXE_assay"))
        .args(["eventlog", "show", "-", "--output", "json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&fs::read(&old).unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let piped: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(piped, show(&old, &[]));
}

#[test]
fn verify_names_each_pcr_that_does_not_replay() {
    let folder = Folder::new();
    let writer = boot(LogWriter::new());
    let file = folder.file("log", writer.finish());
    let values: serde_json::Map<_, _> = (0..9)
        .map(|pcr| (pcr.to_string(), json!(format!("0x{}", hex_of(&writer.pcrs()[pcr]).to_uppercase()))))
        .collect();
    let mut good = json!({"sha256": values});
    good["sha256"]["16"] = json!("00".repeat(32)); // nothing extends it
    good["sha256"]["17"] = json!("ff".repeat(32)); // nothing but a dynamic launch does
    let (code, said, error) = verify(&file, &folder.file("good.json", good.to_string()));
    assert_eq!((code, &said["replays"], error.as_str()), (Some(0), &json!(true), ""), "{said}");

    let mut bad = good.clone();
    bad["sha256"]["4"] = json!("11".repeat(32));
    bad["sha256"]["16"] = json!("22".repeat(32));
    let (code, said, error) = verify(&file, &folder.file("bad.json", bad.to_string()));
    assert_eq!((code, &said["replays"]), (Some(1), &json!(false)));
    let wrong: Vec<_> = said["pcrs"].as_array().unwrap().iter().filter(|pcr| pcr["replays"] == false).collect();
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert_eq!((&wrong[0]["pcr"], &wrong[0]["events"]), (&json!(4), &json!(2)));
    assert_eq!(
        (&wrong[0]["expected"], &wrong[0]["found"]),
        (&json!("11".repeat(32)), &json!(hex_of(&writer.pcrs()[4])))
    );
    assert_eq!(error.lines().count(), 1);
    assert!(error.contains("sha256 PCR 4: 2 events replay to ") && error.contains("PCR 16: 0 events"), "{error}");

    let other_bank = folder.file("sha1.json", json!({"SHA1": {"0": "00".repeat(20)}}).to_string());
    let (code, _, error) = verify(&file, &other_bank);
    assert!(code == Some(1) && error.contains("the log has no sha1 bank"), "{error}");
    let few = folder.file("few.json", json!({"sha256": {"16": "00".repeat(32)}}).to_string());
    let (code, said, _) = verify(&file, &few);
    assert_eq!(code, Some(0));
    assert!(said["warnings"][0].as_str().unwrap().contains("PCRs 0, 1, 2, 3, 4, 5, 6, 7, 8: no value given"), "{said}");
}

#[test]
fn the_startup_locality_is_what_pcr_0_begins_with() {
    let folder = Folder::new();
    let log = LogWriter::new().event(0, EventType::NO_ACTION, [0; 32], b"StartupLocality\0\x03").finish();
    let file = folder.file("log", log);
    assert_eq!(show(&file, &[])["startup_locality"], 3);
    let begun = format!("{}03", "00".repeat(31));
    let pcrs = folder.file("pcrs.json", json!({"sha256": {"0": begun}}).to_string());
    assert_eq!(verify(&file, &pcrs).0, Some(0));
}

#[test]
fn what_cannot_be_read_is_said_in_one_line_with_status_2() {
    let folder = Folder::new();
    let log = boot(LogWriter::new()).finish();
    let good = folder.file("log", &log);
    let nowhere = folder.0.path().join("none");
    unreadable(&["show", nowhere.to_str().unwrap()], &["none"]);
    unreadable(&["show", folder.0.path().to_str().unwrap()], &["event log"]);
    for (name, bytes, word) in [
        ("empty", Vec::new(), "empty"),
        ("cut", log[..log.len() - 1].to_vec(), "octets wanted"),
        ("text", b"no log at all\n".to_vec(), "octets wanted"),
        ("huge", vec![0; 3 << 20], "more than"),
    ] {
        let file = folder.file(name, bytes);
        unreadable(&["show", file.to_str().unwrap(), "--output", "json"], &[name, word]);
    }
    let zeros = "00".repeat(32);
    for (pcrs, words) in [
        ("{".to_owned(), vec!["EOF"]),
        ("{}".to_owned(), vec!["no PCR value"]),
        (json!({"md5": {"0": "00"}}).to_string(), vec!["md5", "sha1, sha256, sha384, sha512"]),
        (json!({"sha256": {"0": "00"}}).to_string(), vec!["PCR 0", "32 octets"]),
        (json!({"sha256": {"24": zeros}}).to_string(), vec!["`24`", "0 to 23"]),
        (json!({"sha256": {"0": zeros, "00": zeros}}).to_string(), vec!["given twice"]),
    ] {
        let file = folder.file("pcrs.json", pcrs);
        unreadable(&["verify", good.to_str().unwrap(), "--pcrs", file.to_str().unwrap()], &words);
    }
    unreadable(&["verify", good.to_str().unwrap(), "--pcrs", nowhere.to_str().unwrap()], &["none"]);
}

#[test]
fn a_measurement_list_gives_pcr_10_and_its_oddities_are_said() {
    let folder = Folder::new();
    let log = folder.file("log", boot(LogWriter::new()).finish());
    let list =
        ListWriter::after([0; 32]).boot_aggregate(&[[0; 32]; 10]).file("/usr/bin/true", &[7; 32]).violation("/tmp/x");
    let binary = folder.file("list", list.bytes());
    let shown = show(&log, &["--ima", binary.to_str().unwrap()]);
    assert_eq!(shown["ima_pcr10"]["sha256"], hex_of(&list.pcr10()));
    assert_eq!(shown["ima_pcr10"]["sha1"].as_str().unwrap().len(), 40);
    assert_eq!(shown["ima_entries"], 3);
    let warnings = shown["warnings"].to_string();
    assert!(warnings.contains("measurement list: 1 of 3 entries are violations"), "{warnings}");
    let cut = folder.file("cut", &list.bytes()[..list.bytes().len() - 1]);
    unreadable(&["show", log.to_str().unwrap(), "--ima", cut.to_str().unwrap()], &["cut", "measurement list, entry 2"]);
}

/// The corpus's event logs, if it is there.
fn corpus() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/corpus");
    let folder = std::env::var_os("ASSAY_CORPUS").map_or(default, PathBuf::from).join("eventlogs");
    if folder.join("cases.json").exists() {
        return Some(folder);
    }
    eprintln!("skipped: no corpus at {} (set ASSAY_CORPUS)", folder.display());
    None
}

#[test]
fn logs_of_real_machines_are_shown_and_verified_as_published() {
    let Some(corpus) = corpus() else { return };
    let folder = Folder::new();
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(corpus.join("cases.json")).unwrap()).unwrap();
    for case in &cases {
        let id = case["id"].as_str().unwrap();
        let file = corpus.join(case["eventlog"].as_str().unwrap());
        if !case["parse_error"].is_null() {
            unreadable(&["show", file.to_str().unwrap(), "--output", "json"], &[]);
            continue;
        }
        let shown = show(&file, &[]);
        for field in ["format", "banks", "startup_locality"] {
            assert_eq!(shown[field], case[field], "{id}: {field}");
        }
        assert_eq!(shown["pcrs"], case["replayed_pcrs"], "{id}");
        let events = shown["events"].as_array().unwrap();
        assert_eq!(events.len(), usize::try_from(case["events"].as_u64().unwrap()).unwrap(), "{id}");
        let differs = events.iter().filter(|event| event["digest_matches_data"] == false);
        let differs: Vec<_> =
            differs.map(|event| json!({"index": event["index"], "pcr": event["pcr"], "type": event["type"]})).collect();
        assert_eq!(Value::from(differs), case["data_hash_bad"], "{id}");
        let published = if case["published_pcrs"].is_null() { &case["replayed_pcrs"] } else { &case["published_pcrs"] };
        let pcrs = folder.file("pcrs.json", published.to_string());
        let (code, said, error) = verify(&file, &pcrs);
        assert_eq!(code, Some(0), "{id}: {error} {said}");
    }
    assert!(cases.len() >= 25, "only {} cases", cases.len());
}
