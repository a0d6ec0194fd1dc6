//! `assay image` and `assay disk` as people and programs meet them, against a real site.

#![expect(clippy::unwrap_used, reason = "a test's set-up fails loudly")]

mod site;

use serde_json::Value;
use site::{Site, assay, refused};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const IMAGE_BYTES: usize = 8 << 20;
const LARGE_BYTES: usize = 96 << 20;
const DISKS: usize = 100;
const LIMIT: Duration = Duration::from_secs(60);

/// Content that differs everywhere, with a stretch of zeros in the middle.
fn content(bytes: usize) -> Vec<u8> {
    let zero = bytes / 2..bytes / 2 + bytes / 4;
    (0..bytes).map(|at| if zero.contains(&at) { 0 } else { u8::try_from(at / 7 % 251).unwrap() + 1 }).collect()
}

fn lease(number: usize) -> String {
    format!("6f1cbc1e-9a51-4a57-8d5e-{number:012}")
}

/// A site with two projects and a raw file below its import folder.
fn site() -> (Site, PathBuf) {
    let site = Site::start();
    for project in ["alpha", "beta"] {
        site.client(&["project", "create", project]);
    }
    let source = site.folder.path().join("source.raw");
    fs::write(&source, content(IMAGE_BYTES)).unwrap();
    (site, source)
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|image| image["name"].as_str().unwrap()).collect()
}

#[test]
fn images_from_import_to_deletion() {
    let (site, source) = site();
    let (state, source) = (site.state(), source.display().to_string());
    let done = site.client(&["image", "import", "golden", &source, "--project", "alpha"]);
    assert!(done.contains("importing is done: image golden"), "{done}");
    refused(&["image", "import", "golden", &source, "--project", "alpha", "--site", &state], &["golden"]);
    let golden = site.json(&["image", "show", "golden"]);
    assert_eq!((golden["kind"].as_str(), golden["state"].as_str()), (Some("golden"), Some("ready")));
    assert_eq!(golden["virtual_bytes"], IMAGE_BYTES);
    assert!(golden["data_bytes"].as_u64().unwrap() < IMAGE_BYTES as u64, "sparse stays sparse");
    assert!(site.client(&["image", "show", "golden"]).contains(&source), "where it came from");

    assert_eq!(site.json(&["image", "tag", "golden", "lts", "stable"])["tags"], serde_json::json!(["lts", "stable"]));
    assert_eq!(site.json(&["image", "tag", "golden", "--remove", "lts"])["tags"], serde_json::json!(["stable"]));
    assert_eq!(site.json(&["image", "share", "golden", "--with", "beta"])["shared_with"], serde_json::json!(["beta"]));
    let copy = site.json(&["image", "copy", "golden", "copy", "--project", "alpha"]);
    assert_eq!(copy["sha256"], golden["sha256"]);
    assert_eq!(copy["provenance"]["parent"], golden["key"]);
    assert_eq!(site.json(&["image", "move", "copy", "beta"])["project"], "beta");
    assert_eq!(site.json(&["image", "rename", "copy", "spare"])["key"], copy["key"]);
    assert_eq!(names(&site.json(&["image", "list"])), ["golden", "spare"]);
    assert!(site.client(&["image", "prepare", "golden"]).contains("preparing is done"));

    // A hundred disks in one call, and what they are made of stays while they do.
    let disks: Vec<String> = (0..DISKS).map(|number| format!("{}=n{number}", lease(number))).collect();
    let disks: Vec<&str> = disks.iter().map(String::as_str).collect();
    let made = site.json(&[&["disk", "create", "golden", "--project", "alpha"][..], &disks].concat());
    assert_eq!(made.as_array().unwrap().len(), DISKS);
    refused(&["image", "delete", "golden", "--site", &state], &["golden", "still read by", "n42", &lease(42)]);

    let taken = site.json(&["image", "snapshot", &lease(0), "after-setup"]);
    assert_eq!((taken["kind"].as_str(), &taken["provenance"]["parent"]), (Some("snapshot"), &golden["key"]));
    for number in 0..DISKS {
        site.client(&["disk", "delete", &lease(number)]);
    }
    refused(&["image", "delete", "golden", "--site", &state], &["still read by", "after-setup"]);
    let flat = site.json(&["image", "flatten", "after-setup"]);
    assert_eq!((flat["kind"].as_str(), &flat["sha256"]), (Some("golden"), &golden["sha256"]), "nothing was written");

    for image in ["golden", "spare", "after-setup"] {
        assert!(site.client(&["image", "delete", image]).contains("deleted"));
    }
    assert_eq!(site.json(&["image", "list"]), serde_json::json!([]));
    refused(&["image", "show", "golden", "--site", &state], &["golden"]);
}

#[test]
fn exports_are_checked_and_gone_on_with() {
    let (site, source) = site();
    let (state, folder) = (site.state(), site.folder.path());
    site.client(&["image", "import", "golden", &source.display().to_string(), "--project", "alpha"]);
    let key = site.json(&["image", "show", "golden"])["key"].as_str().unwrap().to_owned();
    let file = |name: &str| folder.join(name).display().to_string();
    let done = site.client(&["image", "export", "golden", &file("out.raw")]);
    assert!(done.contains("the disk has SHA-256"), "{done}");
    assert!(fs::read(file("out.raw")).unwrap() == content(IMAGE_BYTES));
    site.client(&["image", "export", "golden", &file("out.qcow2")]);
    let compared = Command::new("qemu-img")
        .args(["compare", "-f", "qcow2", "-F", "raw", &file("out.qcow2"), &file("out.raw")])
        .output()
        .unwrap();
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
    refused(&["image", "export", "golden", &file("out.raw"), "--site", &state], &["is there already"]);

    // What was broken off is gone on with: only so can a wrong beginning end up in the file, and be found.
    let part = |octets: &[u8]| fs::write(format!("{}.{key}.raw.part", file("again.raw")), octets).unwrap();
    let mut begun = content(IMAGE_BYTES)[..3_000_001].to_vec();
    part(&begun);
    site.client(&["image", "export", "golden", &file("again.raw")]);
    assert!(fs::read(file("again.raw")).unwrap() == content(IMAGE_BYTES));
    fs::remove_file(file("again.raw")).unwrap();
    begun[1000] ^= 1;
    part(&begun);
    let again = ["image", "export", "golden", &file("again.raw"), "--site", &state];
    refused(&again, &["SHA-256", "remove the file and export again"]);
    assert!(!Path::new(&file("again.raw")).exists());
}

#[test]
fn an_upload_whose_client_was_killed_goes_on() {
    let (site, _) = site();
    let large = site.folder.path().join("large.raw");
    fs::write(&large, content(LARGE_BYTES)).unwrap();
    let large = large.display().to_string();
    let state = site.state();
    let import = ["image", "import", "large", &large, "--project", "alpha", "--upload", "--site", &state];
    let mut first = Command::new(env!("CARGO_BIN_EXE_assay"))
        .args(import)
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let uploads = Path::new(&state).join("imaging/uploads");
    // The one upload, and how much of it has come.
    let upload = || {
        let files = fs::read_dir(&uploads).into_iter().flatten().flatten();
        let octets = files.filter(|file| file.path().extension().is_none());
        octets.map(|file| (file.file_name(), file.metadata().map_or(0, |metadata| metadata.len()))).next()
    };
    let begun = Instant::now();
    let (id, _) = loop {
        assert!(begun.elapsed() < LIMIT && first.try_wait().unwrap().is_none(), "it ended before it could be killed");
        match upload() {
            Some((id, octets)) if octets > 0 => break (id, octets),
            _ => std::thread::yield_now(),
        }
    };
    first.kill().unwrap();
    first.wait().unwrap();
    let (_, came) = upload().unwrap();
    assert!(came < LARGE_BYTES as u64, "all of it had come");
    let output = assay(&[&import[..], &["--output", "json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let image: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(image["virtual_bytes"], LARGE_BYTES);
    assert!(image["provenance"]["source"].as_str().unwrap().contains(id.to_str().unwrap()), "{image}");
    assert!(upload().is_none(), "what was imported is kept no longer");
}

#[test]
fn a_terminal_sees_how_far_an_import_is() {
    let (site, source) = site();
    let command = format!(
        "{} image import golden {} --project alpha --site {}",
        env!("CARGO_BIN_EXE_assay"),
        source.display(),
        site.state()
    );
    // A terminal of its own (package bsdutils).
    let output = Command::new("script").args(["-qec", &command, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("B/s") && said.contains("importing is done"), "{said}");
}
