//! Every fuzz target for a moment, so that none rots: its seeds, their near neighbours, and noise. Without coverage
//! this finds only the shallow; `make fuzz TARGET=…` digs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Noise; libFuzzer does not build upon seeds where it sees no coverage.
const RUNS: u32 = 20_000;
/// Of each seed, made here for the same reason.
const NEIGHBOURS: u64 = 200;
const MOST_SECONDS: u32 = 5;

fn targets() -> Vec<String> {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).expect("our manifest");
    let named = manifest.lines().filter_map(|line| line.strip_prefix("name = \"fuzz-")?.strip_suffix('"'));
    named.map(str::to_owned).collect()
}

fn smoke(target: &str, programs: &Path) -> Result<(), String> {
    let scratch = tempfile::tempdir().map_err(|error| error.to_string())?;
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    write_neighbours(&seeds, scratch.path()).map_err(|error| format!("{target}: making inputs: {error}"))?;
    let mut fuzz = Command::new(programs.join(format!("fuzz-{target}")));
    fuzz.arg("-seed=1").arg(format!("-runs={RUNS}")).arg(format!("-max_total_time={MOST_SECONDS}"));
    fuzz.args(["-max_len=65536", "-rss_limit_mb=1024"]);
    // New inputs go to the first folder; the seeds are only read.
    fuzz.arg(format!("-artifact_prefix={}/", scratch.path().display())).arg(scratch.path()).arg(seeds);
    let output = fuzz.output().map_err(|error| format!("starting fuzz-{target}: {error}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    // libFuzzer says DONE only after it has run the target.
    if output.status.success() && words.contains("DONE") {
        return Ok(());
    }
    let tail: Vec<&str> = words.lines().rev().take(30).collect();
    Err(format!("{target}:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n")))
}

fn write_neighbours(seeds: &Path, folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(seeds)? {
        let entry = entry?;
        let (seed, name) = (fs::read(entry.path())?, entry.file_name());
        for number in 0..NEIGHBOURS {
            let path = folder.join(format!("{}-{number}", name.to_string_lossy()));
            fs::write(path, neighbour(&seed, number))?;
        }
    }
    Ok(())
}

/// `seed` with one to four changes that decoders trip over, the same for the same `number`.
fn neighbour(seed: &[u8], number: u64) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let mut state = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut below = |limit: usize| {
        // xorshift64: repeatable, and good enough to choose places.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).unwrap_or(0) % limit.max(1)
    };
    for _ in 0..=below(4) {
        let at = below(bytes.len());
        match (below(6), bytes.get_mut(at)) {
            (0, Some(byte)) => *byte ^= 1 << below(8),
            (1, Some(byte)) => *byte = [0, 1, 0x7f, 0x80, 0xff][below(5)],
            (2, Some(byte)) => *byte = byte.wrapping_add(1),
            (3, _) => bytes.truncate(at),
            (4, _) => bytes.extend_from_within(at..),
            (_, _) => drop(bytes.splice(at..at, [0; 4])),
        }
    }
    bytes
}

#[test]
fn every_target_survives_a_moment() {
    let programs: PathBuf = Path::new(env!("CARGO_BIN_EXE_fuzz-event_log")).parent().expect("a folder").to_owned();
    let targets = targets();
    assert!(targets.len() >= 10, "only {} targets in the manifest", targets.len());
    let failures: Vec<String> = targets.iter().filter_map(|target| smoke(target, &programs).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}
