//! The clients against a real Open vSwitch.

use assay_ovsdb::ovsdb::OPEN_VSWITCH;
use assay_ovsdb::testing::{OpenVswitch, ScratchNamespace};
use assay_ovsdb::{Limits, Ovsdb, RpcError, Unixctl, value};
use serde_json::json;
use std::time::Duration;

fn start() -> ((tempfile::TempDir, ScratchNamespace), OpenVswitch) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let namespace = ScratchNamespace::new().expect("a namespace");
    let switch = OpenVswitch::start_in(directory.path(), &namespace.namespace()).expect("Open vSwitch starts");
    ((directory, namespace), switch)
}

#[tokio::test]
async fn transactions_monitors_and_control_commands() {
    let (_directory, switch) = start();
    let limits = Limits::default();
    let requests = json!({"Bridge": [{"columns": ["name"]}]});
    let mut monitor = Ovsdb::monitor(&switch.ovsdb_socket(), limits, OPEN_VSWITCH, requests).await.unwrap();
    assert_eq!(monitor.initial, json!({}));
    switch.add_bridge("br0").unwrap();
    let update = monitor.next().await.unwrap();
    let rows = update["Bridge"].as_object().unwrap();
    assert!(rows.values().any(|row| row["insert"]["name"] == "br0"), "{update}");

    let ovsdb = Ovsdb::connect(&switch.ovsdb_socket(), limits).await.unwrap();
    let select = json!({"op": "select", "table": "Bridge", "where": [["name", "==", "br0"]], "columns": ["ports"]});
    let results = ovsdb.transact(OPEN_VSWITCH, vec![select]).await.unwrap();
    assert_eq!(value::as_set(&results[0]["rows"][0]["ports"]).unwrap().len(), 1);

    let control = Unixctl::connect(&switch.control_socket(), limits).await.unwrap();
    assert!(control.run("fdb/show", &["br0"]).await.unwrap().contains("VLAN"));
    let refused = control.run("fdb/show", &["br9"]).await.unwrap_err();
    assert!(matches!(refused, RpcError::Refused { .. }), "{refused}");
}

#[tokio::test]
async fn an_error_inside_result_is_found_and_nothing_is_committed() {
    let (_directory, switch) = start();
    let ovsdb = Ovsdb::connect(&switch.ovsdb_socket(), Limits::default()).await.unwrap();
    let good =
        json!({"op": "update", "table": "Open_vSwitch", "where": [], "row": {"external_ids": ["map", [["a", "b"]]]}});
    let bad = json!({"op": "insert", "table": "No_such_table", "row": {}});
    let refused = ovsdb.transact(OPEN_VSWITCH, vec![good, bad]).await.unwrap_err();
    assert!(refused.to_string().contains("No_such_table"), "{refused}");
    let select = json!({"op": "select", "table": "Open_vSwitch", "where": [], "columns": ["external_ids"]});
    let rows = ovsdb.transact(OPEN_VSWITCH, vec![select]).await.unwrap();
    assert_eq!(rows[0], json!({"rows": [{"external_ids": ["map", []]}]}));
}

#[tokio::test]
async fn a_frozen_switch_is_no_answer_within_the_timeout() {
    let (_directory, switch) = start();
    let limits = Limits { timeout: Duration::from_millis(300), ..Limits::default() };
    let control = Unixctl::connect(&switch.control_socket(), limits).await.unwrap();
    switch.freeze();
    assert!(matches!(control.run("version", &[]).await.unwrap_err(), RpcError::NoAnswer { .. }));
    switch.thaw();
    assert!(control.run("version", &[]).await.unwrap().contains("Open vSwitch"));
}

#[tokio::test]
async fn an_absent_switch_is_a_connect_error_that_names_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock");
    let error = Ovsdb::connect(&socket, Limits::default()).await.unwrap_err();
    assert!(error.to_string().contains("none.sock"), "{error}");
}

#[test]
fn nothing_survives_the_handle() {
    let ((directory, _namespace), switch) = start();
    let pid: u32 = std::fs::read_to_string(directory.path().join("vswitchd.pid")).unwrap().trim().parse().unwrap();
    drop(switch);
    // A killed process may stay a zombie until init reaps it, but it runs no more.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(!stat.contains("(ovs-vswitchd)") || stat.contains(") Z "), "{stat}");
}
