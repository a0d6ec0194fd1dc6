//! A boot storm: 64 nodes read at once what a boot reads, each from its own clone of one golden image through a gateway,
//! one process each, against Debian's tgt with 64 targets on the same image's file. The page cache is dropped before.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

#[allow(dead_code, reason = "a storm has costs only")]
mod figure;
mod folder;
mod initiator;
mod storm;
mod targets;

use assay_imaging::store::{ImageStore as _, LocalStore};
use assay_wire::id::ImageKey;
use figure::{Better, Figure, in_turns_of, wanted};
use folder::folder;
use std::fs::DirEntry;
use std::ops::ControlFlow;
use storm::{NODES, Numbered, Site, TGT_NAME, Took, Trace, forget, of_tgt, storm};
use targets::{Tgt, file_lun};

fn main() {
    if !wanted("boot-storm") {
        return;
    }
    let folder = folder("storm-bench-");
    let store = LocalStore::open(&folder.path().join("store")).unwrap();
    let golden = ImageKey::random();
    store.import(golden, &"p1".parse().unwrap(), &Numbered, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let image = folder.path().join("store/images").join(golden.to_string());
    let trace = Trace::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();

    let ours = || {
        forget(&image);
        let site = runtime.block_on(Site::start(folder.path(), None));
        let nodes = runtime.block_on(site.export_clones(&store, golden));
        let storm = storm(&trace, &nodes, || {
            read_by(|name, id, parent| {
                // The gateway is this process: it reads what it checks.
                id == std::process::id() || (name == "assay-export" && parent == std::process::id())
            })
        });
        runtime.block_on(site.stop());
        storm
    };
    let theirs = || {
        forget(&image);
        let luns = vec![file_lun(&image.join("disk.raw")); usize::from(NODES)];
        let tgt = Tgt::start(folder.path(), TGT_NAME, &luns, true);
        storm(&trace, &of_tgt(&tgt), || read_by(|_, id, _| id == tgt.process.id()))
    };
    let (ours, theirs) = in_turns_of(ROUNDS, ours, theirs);
    let median = |storms: &[Took], of: fn(&Took) -> f64| figure::median(storms.iter().map(of).collect());
    let report = |name: &str, unit: &str, ours: f64, against: &str, theirs: f64| {
        Figure { bench: "boot-storm", name, unit, ours, against, theirs, better: Better::Lower }.report();
    };
    let seconds: fn(&Took) -> f64 = |took| took.seconds;
    let disk: fn(&Took) -> f64 = |took| took.mebibytes;
    report("64 boots at once", "s", median(&ours, seconds), "tgt", median(&theirs, seconds));
    report("read from the disk by 64 boots", "MiB", median(&ours, disk), "tgt", median(&theirs, disk));
    report("the same, to what one boot reads", "MiB", median(&ours, disk), "the boot set", trace.set_mebibytes);
}

/// Octets that processes, by name, id and parent, have had read from disks.
fn read_by(which: impl Fn(&str, u32, u32) -> bool) -> u64 {
    // `self` is one that has a number, too.
    let numbered = |entry: &DirEntry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok());
    let processes = std::fs::read_dir("/proc").unwrap().flatten().filter(numbered).map(|entry| entry.path());
    let theirs = processes.filter(|process| {
        let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
        // `pid (name) state parent …`
        let Some((start, rest)) = stat.rsplit_once(')') else { return false };
        let (id, name) = start.split_once(" (").unwrap_or(("", ""));
        let parent = rest.split_whitespace().nth(1).unwrap_or_default();
        which(name, id.parse().unwrap_or(0), parent.parse().unwrap_or(0))
    });
    let octets = theirs.map(|process| {
        let io = std::fs::read_to_string(process.join("io")).expect("its /proc/PID/io can be read");
        let line = io.lines().find_map(|line| line.strip_prefix("read_bytes: "));
        line.and_then(|octets| octets.parse::<u64>().ok()).unwrap()
    });
    octets.sum()
}

/// Fresh clones, fresh processes and an empty page cache for each: fewer than where a second is a round.
const ROUNDS: usize = 3;
