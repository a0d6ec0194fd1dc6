//! Every fuzz target for a moment, from its seeds, so that none rots. Without coverage this finds only the shallow;
//! `make fuzz TARGET=…` digs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Enough for the seeds and their near neighbours.
const RUNS: u32 = 20_000;
const MOST_SECONDS: u32 = 5;

fn targets() -> Vec<String> {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).expect("our manifest");
    let named = manifest.lines().filter_map(|line| line.strip_prefix("name = \"fuzz-")?.strip_suffix('"'));
    named.map(str::to_owned).collect()
}

fn smoke(target: &str, programs: &Path) -> Result<(), String> {
    let scratch = tempfile::tempdir().map_err(|error| error.to_string())?;
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    let mut fuzz = Command::new(programs.join(format!("fuzz-{target}")));
    fuzz.arg("-seed=1").arg(format!("-runs={RUNS}")).arg(format!("-max_total_time={MOST_SECONDS}"));
    fuzz.args(["-max_len=65536", "-rss_limit_mb=1024"]);
    // New inputs go to the first folder; the seeds are only read.
    fuzz.arg(format!("-artifact_prefix={}/", scratch.path().display())).arg(scratch.path());
    if seeds.is_dir() {
        fuzz.arg(seeds);
    }
    let output = fuzz.output().map_err(|error| format!("starting fuzz-{target}: {error}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    // libFuzzer says DONE only after it has run the target.
    if output.status.success() && words.contains("DONE") {
        return Ok(());
    }
    let tail: Vec<&str> = words.lines().rev().take(30).collect();
    Err(format!("{target}:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n")))
}

#[test]
fn every_target_survives_a_moment() {
    let programs: PathBuf = Path::new(env!("CARGO_BIN_EXE_fuzz-event_log")).parent().expect("a folder").to_owned();
    let targets = targets();
    assert!(targets.len() >= 10, "only {} targets in the manifest", targets.len());
    let failures: Vec<String> = targets.iter().filter_map(|target| smoke(target, &programs).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}
