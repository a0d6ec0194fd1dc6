//! Rules about the repository's text that no compiler checks.

#![expect(clippy::unwrap_used, reason = "a test's set-up fails loudly")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// More than this and a file has two subjects.
const MOST_LINES: usize = 800;
const MOST_BLOB_BYTES: u64 = 256 * 1024;

/// Every file that git tracks, with its text where it has any.
fn tracked() -> Vec<(PathBuf, Option<String>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output().unwrap();
    assert!(listed.status.success(), "git ls-files failed: is this a git checkout?");
    let names = String::from_utf8(listed.stdout).unwrap();
    let files: Vec<_> = names
        .split_terminator('\0')
        .filter(|name| root.join(name).is_file())
        .map(|name| (PathBuf::from(name), fs::read_to_string(root.join(name)).ok()))
        .collect();
    assert!(files.len() > 50, "only {} files tracked", files.len());
    files
}

fn rust() -> impl Iterator<Item = (PathBuf, String)> {
    tracked().into_iter().filter_map(|(path, text)| {
        let is_rust = path.extension().is_some_and(|ending| ending == "rs");
        text.filter(|_| is_rust).map(|text| (path, text))
    })
}

fn report(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn every_module_says_what_it_is_for() {
    let silent: Vec<_> = rust()
        .filter(|(_, text)| !text.trim_start_matches("#![no_main]").trim_start().starts_with("//!"))
        .map(|(path, _)| path.display().to_string())
        .collect();
    report("modules without an opening //! comment", &silent);
}

#[test]
fn no_file_has_two_subjects() {
    let long: Vec<_> = rust()
        .filter(|(_, text)| text.lines().count() > MOST_LINES)
        .map(|(path, text)| format!("{}: {} lines", path.display(), text.lines().count()))
        .collect();
    report(&format!("files over {MOST_LINES} lines"), &long);
}

#[test]
fn nothing_is_left_for_later() {
    // Spelt in halves, so that this file does not find itself.
    let marks = [concat!("FIX", "ME"), concat!("TO", "DO"), concat!("XX", "X:"), concat!("Placeholder", ".")];
    let found: Vec<_> = rust()
        .flat_map(|(path, text)| {
            let lines = text.lines().enumerate().filter(|(_, line)| marks.iter().any(|mark| line.contains(mark)));
            lines.map(|(number, line)| format!("{}:{}: {line}", path.display(), number + 1)).collect::<Vec<_>>()
        })
        .collect();
    report("leftovers", &found);
}

#[test]
fn time_and_processes_are_used_at_the_edges_only() {
    // `Clock` is the one reader of the calendar; programs are started by the lab, the agent's edges, the gateway (its
    // workers), tests and build tools.
    let rules: [(&str, &[&str]); 2] = [
        (
            concat!("SystemTime::", "now"),
            &["service/src/clock.rs", "ramdisk-agent/", "qemu-lab/", "/testing", "tests/", "benches/"],
        ),
        (
            concat!("Command::", "new"),
            &[
                "qemu-lab/",
                "ramdisk-agent/src/",
                "/gateway/process.rs",
                "/worker/attack.rs",
                "imaging/src/rbd_disks.rs",
                "/testing",
                "/fixtures.rs",
                "tests/",
                "benches/",
                "/examples/",
                "imaging/src/tree/ext4.rs",
            ],
        ),
    ];
    let mut found = Vec::new();
    for (path, text) in rust() {
        let name = path.display().to_string();
        // Unit tests stand last in a file: what comes before them is the product.
        let product = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (call, edges) in &rules {
            if product.contains(call) && !edges.iter().any(|edge| name.contains(edge)) {
                found.push(format!("{name}: {call}"));
            }
        }
    }
    report("calls outside the edge files", &found);
}

#[test]
fn no_blobs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let blobs: Vec<_> = tracked()
        .into_iter()
        .filter(|(path, _)| fs::metadata(root.join(path)).unwrap().len() > MOST_BLOB_BYTES)
        .map(|(path, _)| path.display().to_string())
        .filter(|name| name != "Cargo.lock")
        .collect();
    report("large files in git", &blobs);
}

#[test]
fn no_machine_of_ours_is_named() {
    let forbidden = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("registry+", "http")];
    let found: Vec<_> = tracked()
        .into_iter()
        .filter(|(path, _)| path != Path::new("Cargo.lock"))
        .filter_map(|(path, text)| {
            let mark = *forbidden.iter().find(|mark| text.as_ref().is_some_and(|text| text.contains(**mark)))?;
            Some(format!("{}: {mark}", path.display()))
        })
        .collect();
    report("paths of one machine", &found);
}

/// The code spans of a cell of `docs/attacks.md`, each the path of a file and the name of a function in it.
fn named_functions(cell: &str) -> impl Iterator<Item = (&str, &str)> {
    cell.split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|span| span.rsplit_once("::"))
        .filter(|(path, _)| path.ends_with(".rs"))
}

#[test]
fn every_attack_has_a_check_and_a_test_that_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = fs::read_to_string(root.join("docs/attacks.md")).unwrap();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|line| line.split(" | ").collect::<Vec<_>>())
        .filter(|row| row.len() == 4)
        .collect();
    let expected = [('A', 15), ('B', 12), ('C', 8), ('D', 10)];
    let ids = expected.into_iter().flat_map(|(row, last)| (1..=last).map(move |number| format!("{row}{number}")));
    let mut wrong = Vec::new();
    for id in ids {
        let [row] = rows.iter().filter(|row| row[0] == id).collect::<Vec<_>>()[..] else {
            wrong.push(format!("{id}: not one row"));
            continue;
        };
        let (checks, tests) = (row[2], row[3]);
        let carries = |name: &str| name.split('_').any(|word| word == id.to_lowercase());
        for (column, cell) in [("checks", checks), ("tests", tests)] {
            if named_functions(cell).next().is_none() {
                wrong.push(format!("{id}: names no {column}"));
            }
            for (path, name) in named_functions(cell) {
                let text = fs::read_to_string(root.join(path)).unwrap_or_default();
                if !text.contains(&format!("fn {name}(")) && !text.contains(&format!("fn {name}<")) {
                    wrong.push(format!("{id}: no fn {name} in {path}"));
                }
                if column == "tests" && !carries(name) {
                    wrong.push(format!("{id}: the name of {name} does not say that it is this row's"));
                }
            }
        }
    }
    report("docs/attacks.md", &wrong);
}
