//! The binary as people and programs meet it: its errors, its tables and JSON, its start and its stop.

#![expect(clippy::unwrap_used, reason = "a test's set-up fails loudly")]

mod site;

use serde_json::Value;
use site::{Site, assay, refused};
use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn a_wrong_file_gets_one_error_that_names_file_and_field() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("site.toml");
    let name = path.display().to_string();
    refused(&["up", "--config", &name], &["reading the configuration file", &name]);
    let state = folder.path().join("state").display().to_string();
    let site = format!("[site]\nstate_dir = {state:?}\n");
    for (rest, words) in [
        ("[site", vec!["parsing", name.as_str()]),
        ("[colour]\n", vec!["colour"]),
        ("[isolation]\nquarantine_vlan = 1\nairlock_vlan = 1\n", vec!["[isolation]", "airlock_vlan"]),
        ("[isolation]\nquarantine_vlan = 5000\nairlock_vlan = 1\n", vec!["[isolation]", "5000"]),
        (
            "[isolation]\nquarantine_vlan = 1\nairlock_vlan = 2\n[imaging]\nimport_folders = [\"x\"]\n",
            vec!["[imaging]", "import_folders"],
        ),
    ] {
        fs::write(&path, format!("{site}{rest}")).unwrap();
        refused(&["up", "--config", &name], &words);
    }
}

#[test]
fn a_client_without_a_site_says_what_it_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("none").display().to_string();
    refused(&["node", "list", "--site", &nowhere], &["client.toml", &nowhere]);
}

#[test]
fn a_site_starts_answers_and_stops() {
    let mut site = Site::start();
    let key = site.client(&["key"]).trim().to_owned();
    assert_eq!(key.len(), 64, "{key}");
    site.client(&["project", "create", "alpha"]);
    let projects = site.json(&["project", "list"]);
    assert_eq!(projects, serde_json::json!([{ "name": "alpha", "verifier_keys": [key] }]));
    assert!(site.client(&["project", "list"]).contains("alpha"));
    site.client(&["network", "create", "alpha-net", "--project", "alpha", "--vlan", "120"]);
    assert_eq!(site.json(&["network", "list"])[0]["vlan"], 120);
    for list in
        ["switch", "node", "image", "disk", "export", "lease", "admission", "verdict", "policy", "release", "gateway"]
    {
        assert_eq!(site.json(&[list, "list"]), serde_json::json!([]), "{list}");
    }
    refusals(&site);
    tokens(&site);

    let pid = site.up.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let mut stopped = 0;
    while let Some(event) = site.next_event() {
        stopped += usize::from(event.get("event").and_then(Value::as_str) == Some("service.stopped"));
    }
    assert_eq!(stopped, 3, "not every service stopped in order");
    assert!(site.up.wait().unwrap().success());
}

fn refusals(site: &Site) {
    let state = site.state();
    refused(&["network", "create", "x", "--project", "alpha", "--vlan", "999", "--site", &state], &["VLAN 999"]);
    refused(&["network", "create", "x", "--project", "beta", "--vlan", "5", "--site", &state], &["beta"]);
    refused(&["node", "show", "n9", "--site", &state], &["n9"]);
    refused(&["image", "import", "x", "/etc/passwd", "--project", "alpha", "--site", &state], &["/etc/passwd"]);
    // Malformed arguments never reach a service.
    let output = assay(&["network", "create", "Bad Name", "--project", "alpha", "--vlan", "5", "--site", &state]);
    assert_eq!(output.status.code(), Some(2));
}

fn tokens(site: &Site) {
    let token = site.client(&["token", "create", "alpha-ci", "--project", "alpha"]).trim().to_owned();
    let as_project = |arguments: &[&str]| {
        let mut client = Command::new(env!("CARGO_BIN_EXE_assay"));
        client.args(arguments).args(["--site", &site.state()]).env("ASSAY_TOKEN", &token).output().unwrap()
    };
    assert!(as_project(&["verdict", "list"]).status.success());
    assert!(!as_project(&["project", "create", "mine"]).status.success());
    for file in ["tokens.json", "operator.token", "tls/ca.key"] {
        use std::os::unix::fs::PermissionsExt as _;
        let path = Path::new(&site.state()).join(file);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0, "{file} can be read by others");
        assert!(!fs::read_to_string(&path).unwrap().contains(&token), "{file} holds a token in the clear");
    }
}

#[test]
fn identities_are_named_beforehand_and_forgotten() {
    let site = Site::start();
    let state = site.state();
    let (ek, other) = ("ab".repeat(32), "cd".repeat(32));
    let done = site.client(&["identity", "allow", "--node", "n1", "--ek-sha256", &format!("sha256:{ek}")]);
    assert!(done.contains("n1") && done.contains(&ek), "{done}");
    let identity = &site.json(&["identity", "list"])[0];
    assert_eq!((identity["node"].as_str(), identity["ek_sha256"].as_str()), (Some("n1"), Some(ek.as_str())));
    assert_eq!(identity["origin"], "allowed");
    assert!(site.client(&["identity", "show", "n1"]).contains("never"), "n1 has not been seen");
    // What is on record is named, with the way out of it.
    let taken = ["identity", "allow", "--node", "n2", "--ek-sha256", &ek, "--site", &state];
    refused(&taken, &["n1", &ek, "assay identity forget n1"]);
    refused(&["identity", "allow", "--node", "n1", "--ek-sha256", &other, "--site", &state], &["n1", &ek]);
    refused(&["identity", "approve", "n1", "--site", &state], &["n1", "assay incident list"]);
    site.client(&["identity", "forget", "n1"]);
    refused(&["identity", "show", "n1", "--site", &state], &["node `n1` is bound to no EK"]);
    assert_eq!(site.json(&["incident", "list"]), Value::Array(Vec::new()));
    let unknown = "01890a5d-ac96-774b-bcce-b302099a8057";
    refused(&["incident", "settle", unknown, "--keep", "--site", &state], &["there is no incident", unknown]);
    // A decision must be made, and one only.
    for arguments in [&["incident", "settle", unknown][..], &["incident", "settle", unknown, "--keep", "--accept-ek"]] {
        assert_eq!(assay(arguments).status.code(), Some(2), "{arguments:?}");
    }
}
