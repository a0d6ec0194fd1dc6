//! What the operations on images and disks take in the local store, each beside its bar. `target/tmp` is where the files
//! go: the file system under it is what is measured.

#![allow(clippy::unwrap_used, reason = "a benchmark may end where it cannot go on")]

#[allow(dead_code, reason = "a bar is not measured in turns")]
mod figure;
mod folder;
mod images;

use assay_imaging::store::{ImageStore, LocalStore};
use assay_wire::id::{DiskId, ImageKey, ProjectId};
use figure::wanted;
use folder::folder;
use images::{Sparse, a_hundred, beside_bar, milliseconds, percentile};
use std::ops::ControlFlow;

const CLONES: usize = 200;
const SNAPSHOTS: u64 = 20;

fn main() {
    if !wanted("imaging") {
        return;
    }
    let folder = folder("imaging-bench-");
    let store = LocalStore::open(folder.path()).unwrap();
    let (golden, project) = (ImageKey::random(), "p1".parse().unwrap());
    let content = Sparse { data_bytes: 256 << 20 };
    store.import(golden, &project, &content, &mut |_, _| ControlFlow::Continue(())).unwrap();
    clones(&store, golden, &project);
    snapshots(&store, golden, &project);
}

fn clones(store: &LocalStore, golden: ImageKey, project: &ProjectId) {
    let create = |disk| store.create_disk(disk, project, golden).unwrap();
    let each: Vec<f64> = (0..CLONES).map(|_| milliseconds(|| create(DiskId::random()))).collect();
    report("clone of 10 GiB, p50", percentile(&each, 50), 10.0);
    report("clone of 10 GiB, p99", percentile(&each, 99), 10.0);
    report("100 clones", a_hundred(|| create(DiskId::random())), 1000.0);
    let written = DiskId::random();
    create(written);
    let disk = store.open_disk(written).unwrap();
    for at in 0..256 {
        disk.write_at(at * (4 << 20), &[7; 1 << 20]).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    let removed = milliseconds(|| store.remove_disk(written).unwrap());
    report("deprovision of a disk with 256 MiB written", removed, 1000.0);
}

fn snapshots(store: &LocalStore, golden: ImageKey, project: &ProjectId) {
    let disk = DiskId::random();
    store.create_disk(disk, project, golden).unwrap();
    let each: Vec<f64> = (0..SNAPSHOTS)
        .map(|number| {
            let open = store.open_disk(disk).unwrap();
            open.write_at(number * (8 << 20), &[9; 4 << 20]).unwrap();
            open.flush().unwrap();
            drop(open);
            milliseconds(|| store.snapshot(disk, ImageKey::random()).unwrap())
        })
        .collect();
    report("snapshot of 10 GiB, slowest of 20", percentile(&each, 100), 100.0);
}

fn report(name: &str, ours: f64, bar: f64) {
    beside_bar("imaging", name, ours, bar);
}
