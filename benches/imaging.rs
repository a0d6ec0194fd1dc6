//! What the operations on images and disks take in the local store: each beside its bar, which is what users of M2
//! waited for, divided. `target/tmp` is where the files go: the file system under it is what is measured.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

#[allow(dead_code, reason = "a bar is not measured in turns")]
mod figure;

use assay_imaging::store::{Content, ImageStore, LocalStore, StoreError};
use assay_wire::id::{DiskId, ImageKey, ProjectId};
use figure::{Better, Figure, wanted};
use std::ops::ControlFlow;
use std::time::Instant;

const DISK_BYTES: u64 = 10 << 30;
/// Of them, what is no hole.
const DATA_BYTES: u64 = 256 << 20;
const CLONES: usize = 200;
const SNAPSHOTS: usize = 20;

/// A sparse disk of ten gigabytes.
struct Sparse;

impl Content for Sparse {
    fn virtual_bytes(&self) -> u64 {
        DISK_BYTES
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StoreError> {
        buffer.fill(u8::from(offset < DATA_BYTES));
        Ok(())
    }

    fn identity(&self) -> Option<String> {
        None
    }
}

fn main() {
    if !wanted("imaging") {
        return;
    }
    std::fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = tempfile::Builder::new().prefix("imaging-bench-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = LocalStore::open(folder.path()).unwrap();
    let (golden, project) = (ImageKey::random(), "p1".parse().unwrap());
    store.import(golden, &project, &Sparse, &mut |_, _| ControlFlow::Continue(())).unwrap();
    clones(&store, golden, &project);
    snapshots(&store, golden, &project);
}

fn clones(store: &LocalStore, golden: ImageKey, project: &ProjectId) {
    let disks: Vec<DiskId> = (0..CLONES).map(|_| DiskId::random()).collect();
    let mut each: Vec<f64> =
        disks.iter().map(|disk| milliseconds(|| store.create_disk(*disk, project, golden).unwrap())).collect();
    each.sort_by(f64::total_cmp);
    report("clone of 10 GiB, p50", each[CLONES / 2], 10.0);
    report("clone of 10 GiB, p99", each[CLONES * 99 / 100], 10.0);
    let hundred: Vec<DiskId> = (0..100).map(|_| DiskId::random()).collect();
    let all = milliseconds(|| {
        std::thread::scope(|scope| {
            for some in hundred.chunks(100_usize.div_ceil(16)) {
                scope.spawn(move || some.iter().for_each(|disk| store.create_disk(*disk, project, golden).unwrap()));
            }
        });
    });
    report("100 clones", all, 1000.0);
    let disk = store.open_disk(hundred[0]).unwrap();
    for at in 0..256 {
        disk.write_at(at * (4 << 20), &[7; 1 << 20]).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    report(
        "deprovision of a disk with 256 MiB written",
        milliseconds(|| store.remove_disk(hundred[0]).unwrap()),
        1000.0,
    );
}

fn snapshots(store: &LocalStore, golden: ImageKey, project: &ProjectId) {
    let disk = DiskId::random();
    store.create_disk(disk, project, golden).unwrap();
    let mut each: Vec<f64> = (0..SNAPSHOTS)
        .map(|number| {
            let open = store.open_disk(disk).unwrap();
            open.write_at(number as u64 * (8 << 20), &[9; 4 << 20]).unwrap();
            open.flush().unwrap();
            drop(open);
            milliseconds(|| drop(store.snapshot(disk, ImageKey::random()).unwrap()))
        })
        .collect();
    each.sort_by(f64::total_cmp);
    report("snapshot of 10 GiB, slowest of 20", each[SNAPSHOTS - 1], 100.0);
}

fn milliseconds(work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_secs_f64() * 1000.0
}

fn report(name: &str, ours: f64, bar: f64) {
    Figure { bench: "imaging", name, unit: "ms", ours, against: "the bar", theirs: bar, better: Better::Lower }
        .report();
}
