//! The store's operations, and what they refuse.

use crate::site::{MIB, Tools};
use assay_rbd::keys::{self, EXPORT_USERS};
use assay_rbd::name::{CephUser, ImageKind, ImageName, Namespace, PoolName};
use assay_rbd::store::{Content, RbdStore, Source, StoredImage, StoredKind};
use assay_rbd::testing::Ceph;
use assay_rbd::{CloneDisk, GoldenFile, RbdError};
use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

pub(crate) const BYTES: u64 = 16 * MIB;

/// Content of an image: one octet in each 4 MiB object, but for the last, which is a hole.
pub(crate) fn content(octet: u8) -> Vec<u8> {
    let mut content = vec![0; BYTES as usize];
    for object in 0..3 {
        content[(object * 4 * MIB + 100) as usize] = octet + object as u8;
    }
    content
}

pub(crate) struct InMemory(pub(crate) Vec<u8>);

impl Source for InMemory {
    fn byte_len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn description(&mut self) -> io::Result<Option<String>> {
        Ok(Some("debian-12".to_owned()))
    }
}

#[derive(Debug)]
struct File(Vec<u8>);

impl GoldenFile for File {
    fn byte_len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buffer).map(|()| true)
    }
}

fn golden(number: u128) -> ImageName {
    ImageName::numbered(ImageKind::Golden, number)
}

fn disk(number: u128) -> ImageName {
    ImageName::numbered(ImageKind::Disk, number)
}

/// A store with an image of one project and the name of another.
struct Rig {
    ceph: assay_rbd::testing::SharedCeph,
    store: RbdStore,
    provider: Namespace,
    project: Namespace,
    base: u128,
    /// A store mends what it finds in its pool, so it has one of its own.
    pool: PoolName,
}

impl Rig {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let ceph = Ceph::shared();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = |what| Namespace::new(&format!("{what}-{number}")).unwrap();
        let (provider, project) = (namespace("provider"), namespace("tenant"));
        let pool = PoolName::new(&format!("store-{number}")).unwrap();
        ceph.create_pool(&ceph.admin(), &pool);
        let store = RbdStore::open(ceph.imaging(&pool), pool.clone()).unwrap();
        let base = u128::from(number) << 64;
        let rig = Self { ceph, store, provider, project, base, pool };
        rig.import(1, 10);
        rig
    }

    fn import(&self, number: u128, octet: u8) -> ImageName {
        let image = golden(self.base + number);
        let mut source = InMemory(content(octet));
        self.store.import(image, &self.provider, &mut source, &mut |_, _| ControlFlow::Continue(())).unwrap();
        image
    }

    fn golden(&self) -> ImageName {
        golden(self.base + 1)
    }

    fn disk(&self, number: u128) -> ImageName {
        let name = disk(self.base + number);
        self.store.create_disk(name, &self.project, self.golden()).unwrap();
        name
    }

    fn write(&self, disk: ImageName, offset: u64, octet: u8) {
        self.store.place(disk).unwrap().open_image(disk).unwrap().write_at(offset, &[octet]).unwrap();
    }

    /// One octet of each object.
    fn read(&self, disk: ImageName) -> [u8; 4] {
        let open = self.store.place(disk).unwrap().open_read_only(disk, None).unwrap();
        octets(|offset, buffer| open.read_at(offset, buffer).unwrap())
    }

    fn reopen(&mut self) {
        self.store = RbdStore::open(self.ceph.imaging(&self.pool), self.pool.clone()).unwrap();
    }
}

fn flatten(store: &RbdStore, image: ImageName) -> Result<StoredImage, RbdError> {
    let mut content = Content(store.open_image(image)?);
    store.flatten(image, &mut content, &mut |_, _| ControlFlow::Continue(()))
}

fn octets(read: impl Fn(u64, &mut [u8])) -> [u8; 4] {
    std::array::from_fn(|object| {
        let mut octet = [0];
        read(object as u64 * 4 * MIB + 100, &mut octet);
        octet[0]
    })
}

#[test]
fn an_import_is_sparse_whole_and_made_once() {
    let rig = Rig::new();
    let image = rig.store.image(rig.golden()).unwrap();
    assert_eq!(
        (image.byte_len, &image.kind),
        (BYTES, &StoredKind::Golden { description: Some("debian-12".to_owned()) })
    );
    assert_eq!(image.namespace, rig.provider);
    let mut read = vec![0; BYTES as usize];
    rig.store.open_image(rig.golden()).unwrap().read_at(0, &mut read).unwrap();
    assert!(read == content(10));
    rig.import(1, 99);
    assert_eq!(octets(|at, buffer| rig.store.open_image(rig.golden()).unwrap().read_at(at, buffer).unwrap())[0], 10);

    let broken = golden(rig.base + 2);
    let answer = rig.store.import(broken, &rig.provider, &mut InMemory(content(1)), &mut |done, _| {
        if done > 4 * MIB { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(answer, Err(RbdError::BrokenOff { .. })), "{answer:?}");
    assert!(rig.store.image(broken).unwrap_err().is_not_found());
    assert!(rig.store.images().unwrap().contains(&image));
}

#[test]
fn an_image_with_clones_stays_and_they_are_named() {
    let rig = Rig::new();
    let first = rig.disk(1);
    let refused = rig.store.remove_image(rig.golden()).unwrap_err();
    let RbdError::HasChildren { children, .. } = &refused else { panic!("{refused}") };
    let named: Vec<_> = children.iter().map(|child| (child.namespace.as_str(), child.name.clone())).collect();
    assert_eq!(named, [(rig.project.as_str(), first.to_string())]);
    rig.store.remove_disk(first).unwrap();
    rig.store.remove_disk(first).unwrap();
    rig.store.remove_image(rig.golden()).unwrap();
    rig.store.remove_image(rig.golden()).unwrap();
    assert!(rig.store.image(rig.golden()).unwrap_err().is_not_found());
    // The image waits in the trash for its clone.
    assert!(rig.store.sweep().unwrap() >= 1);
    rig.store.sweep().unwrap();
    let left = rig.ceph.admin().namespace(&rig.pool, &rig.provider).unwrap();
    assert_eq!(left.trash().unwrap(), []);
    assert!(rig.store.create_disk(disk(rig.base + 9), &rig.project, rig.golden()).unwrap_err().is_not_found());
}

#[test]
fn a_snapshot_keeps_what_a_disk_held_and_can_be_restored_to_and_flattened() {
    let mut rig = Rig::new();
    let (first, image) = (rig.disk(1), golden(rig.base + 5));
    rig.write(first, 100, 77);
    rig.write(first, 12 * MIB + 100, 78);
    let in_use = rig.store.place(first).unwrap().open_image(first).unwrap();
    let refused = rig.store.snapshot(first, image).unwrap_err();
    assert!(matches!(refused, RbdError::InUse { .. }), "{refused}");
    drop(in_use);
    let begun = Instant::now();
    rig.store.snapshot(first, image).unwrap();
    println!("a snapshot took {:?}", begun.elapsed());
    let taken = rig.store.image(image).unwrap();
    assert_eq!(taken.kind, StoredKind::Snapshot { parent: rig.golden(), own_bytes: 8 * MIB });
    rig.store.snapshot(first, image).unwrap();
    assert_eq!(rig.store.image(image).unwrap(), taken, "asked again");
    assert_eq!(rig.read(first), [77, 11, 12, 78]);
    assert_eq!(rig.store.disk_bytes(first).unwrap(), 0);
    rig.write(first, 100, 80);

    rig.store.restore(first, image).unwrap();
    assert_eq!(rig.read(first), [77, 11, 12, 78]);
    rig.store.restore(first, rig.golden()).unwrap();
    assert_eq!(rig.read(first), [10, 11, 12, 0]);

    let second = disk(rig.base + 2);
    rig.store.create_disk(second, &rig.project, image).unwrap();
    let flat = flatten(&rig.store, image).unwrap();
    assert_eq!(flat.kind, StoredKind::Golden { description: None });
    assert_eq!(flatten(&rig.store, image).unwrap(), flat, "asked again");
    assert_eq!(rig.read(second), [77, 11, 12, 78]);
    let third = disk(rig.base + 3);
    rig.store.create_disk(third, &rig.project, image).unwrap();
    assert_eq!(rig.store.access(third).unwrap().scope.golden.len(), 1);
    assert_eq!(rig.store.access(second).unwrap().scope.golden.len(), 2);
    rig.reopen();
    assert_eq!((rig.read(second), rig.read(third)), ([77, 11, 12, 78], [77, 11, 12, 78]));
    assert_eq!(rig.store.image(image).unwrap(), flat);
    // What the second disk reads is in the trash, and the golden image below that is not let go.
    rig.store.sweep().unwrap();
    let refused = rig.store.remove_image(rig.golden()).unwrap_err();
    assert!(refused.to_string().contains(&second.to_string()), "{refused}");
    assert_eq!(rig.read(second), [77, 11, 12, 78]);
}

#[test]
fn an_export_reads_every_layer_below_its_disk_and_nothing_else() {
    let rig = Rig::new();
    let name = rig.disk(1);
    for layer in 0..3 {
        rig.write(name, layer * 4 * MIB + 100, 50 + layer as u8);
        rig.store.snapshot(name, golden(rig.base + 10 + u128::from(layer))).unwrap();
    }
    let scope = rig.store.access(name).unwrap().scope;
    assert_eq!(scope.golden.len(), 4);
    let user = CephUser::new(&format!("layers-{}", rig.project)).unwrap();
    let key = keys::issue(&rig.ceph.admin(), &user, &scope).unwrap();
    let holder = assay_rbd::Cluster::connect(&rig.ceph.connection(user, key)).unwrap();
    let pool = holder.namespace(&rig.pool, &rig.project).unwrap();
    let open = CloneDisk::open(&pool, name, &scope.layers(), File(content(10))).unwrap();
    assert_eq!(octets(|at, buffer| open.read_at(at, buffer).unwrap()), [50, 51, 52, 0]);
    assert_eq!(open.own_objects(), (3, 4), "the layers' objects are Ceph's");
    open.write_at(12 * MIB + 100, &[9]).unwrap();
    assert_eq!(octets(|at, buffer| open.read_at(at, buffer).unwrap()), [50, 51, 52, 9]);
    let layer = golden(rig.base + 10);
    assert!(pool.open_image(layer).unwrap_err().is_denied());
}

#[test]
fn a_disk_that_somebody_has_a_key_for_is_not_changed_under_them() {
    let rig = Rig::new();
    let name = rig.disk(1);
    let user = CephUser::new(&format!("{EXPORT_USERS}keyed-{}", rig.project)).unwrap();
    let (key, access) = rig.store.issue(name, &user).unwrap();
    assert_eq!((access.golden, access.byte_len), (rig.golden(), BYTES));
    assert_eq!(rig.store.issue(name, &user).unwrap(), (key.clone(), access), "asked again");
    let image = golden(rig.base + 5);
    for refused in [rig.store.snapshot(name, image), rig.store.restore(name, rig.golden())] {
        let Err(RbdError::InUse { clients, .. }) = &refused else { panic!("{refused:?}") };
        assert_eq!(*clients, [format!("whoever has the key of {}", user.entity())]);
    }
    rig.store.revoke(name, &user).unwrap();
    rig.store.revoke(name, &user).unwrap();
    rig.store.snapshot(name, image).unwrap();
    let (again, _) = rig.store.issue(name, &user).unwrap();
    assert_ne!(again, key);
    // With the disk goes the key.
    rig.store.remove_disk(name).unwrap();
    let refused = assay_rbd::Cluster::connect(&rig.ceph.connection(user.clone(), again)).unwrap_err();
    assert!(refused.is_denied(), "{refused:?}");
    rig.store.revoke(name, &user).unwrap();
}

#[test]
fn a_snapshot_goes_while_the_disk_that_it_is_of_goes_on() {
    let mut rig = Rig::new();
    let (name, first, second) = (rig.disk(1), golden(rig.base + 5), golden(rig.base + 6));
    rig.write(name, 100, 77);
    rig.store.snapshot(name, first).unwrap();
    rig.write(name, 4 * MIB + 100, 78);
    rig.store.snapshot(name, second).unwrap();
    let taken = rig.store.image(second).unwrap();
    assert_eq!(taken.kind, StoredKind::Snapshot { parent: rig.golden(), own_bytes: 4 * MIB }, "not of the first");
    rig.store.remove_image(first).unwrap();
    assert!(rig.store.image(first).unwrap_err().is_not_found());
    assert_eq!(rig.store.image(second).unwrap(), taken);
    let clone = disk(rig.base + 2);
    rig.store.create_disk(clone, &rig.project, second).unwrap();
    let refused = rig.store.remove_image(second).unwrap_err();
    let RbdError::HasChildren { children, .. } = &refused else { panic!("{refused}") };
    assert_eq!(children.iter().map(|child| child.name.clone()).collect::<Vec<_>>(), [clone.to_string()]);
    rig.store.restore(clone, rig.golden()).unwrap();
    rig.store.remove_image(second).unwrap();
    rig.store.sweep().unwrap();
    rig.reopen();
    assert_eq!(rig.read(name), [77, 78, 12, 0]);
    rig.write(name, 100, 79);
    rig.store.snapshot(name, golden(rig.base + 7)).unwrap();
    assert_eq!(rig.store.access(name).unwrap().scope.golden.len(), 4);
    rig.store.remove_disk(name).unwrap();
    rig.store.remove_image(golden(rig.base + 7)).unwrap();
    rig.store.remove_disk(clone).unwrap();
    while rig.store.sweep().unwrap() > 0 {}
    let left = rig.ceph.admin().namespace(&rig.pool, &rig.project).unwrap();
    assert_eq!(left.trash().unwrap(), [], "nothing keeps them then");
}

#[test]
fn too_many_layers_are_refused_until_they_are_flattened() {
    let rig = Rig::new();
    let name = rig.disk(1);
    let mut number = 20;
    let refused = loop {
        number += 1;
        match rig.store.snapshot(name, golden(rig.base + number)) {
            Ok(_) => assert!(number < 40),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, RbdError::ChainTooLong { .. }), "{refused}");
    assert_eq!(rig.read(name), [10, 11, 12, 0]);
}

/// The holder of a disk's key names another project's image as its parent. Nobody with more rights is taken in.
#[test]
fn a_disk_that_claims_a_parent_which_does_not_know_it_gets_no_key_and_no_snapshot() {
    let rig = Rig::new();
    let secret = rig.import(2, 200);
    let (thief, victim) = (rig.disk(1), disk(rig.base + 2));
    rig.store.create_disk(victim, &rig.project, secret).unwrap();
    let admin = rig.ceph.admin_connection();
    let tools = Tools::new(&rig.ceph, &admin.user, &admin.key);
    let header = |name| format!("rbd_header.{}", rig.store.access(name).unwrap().scope.id);
    let (from, to) = (header(victim), header(thief));
    tools.rados(rig.pool.as_str(), rig.project.as_str(), &["getomapval", &from, "parent", "parent"]).unwrap();
    tools
        .rados(rig.pool.as_str(), rig.project.as_str(), &["setomapval", &to, "parent", "--input-file", "parent"])
        .unwrap();
    let wrong =
        |answer: Result<(), RbdError>| assert!(matches!(answer, Err(RbdError::WrongParent { .. })), "{answer:?}");
    wrong(rig.store.access(thief).map(drop));
    wrong(rig.store.snapshot(thief, golden(rig.base + 7)));
    rig.store.access(victim).unwrap();
}

/// What the crash test's child does until it is killed: everything that takes more than one step. Not a test by itself.
#[test]
#[ignore = "started by what_dies_at_any_moment_is_completed_or_undone"]
fn works_until_it_is_killed() {
    let text = |name: &str| std::env::var(name).unwrap();
    let connection = assay_rbd::Connection {
        monitors: vec![text("CRASH_MONITOR").parse().unwrap()],
        user: CephUser::new("admin").unwrap(),
        key: assay_rbd::name::CephKey::new(&text("CRASH_KEY")).unwrap(),
        patience: assay_rbd::Patience::CONTROL,
    };
    let store =
        RbdStore::open(assay_rbd::Cluster::connect(&connection).unwrap(), PoolName::new(&text("CRASH_POOL")).unwrap())
            .unwrap();
    let (project, from) =
        (Namespace::new(&text("CRASH_PROJECT")).unwrap(), text("CRASH_FROM").parse::<u128>().unwrap());
    for number in from.. {
        println!("begun {number}");
        let (image, taken, name) = (golden(3 * number), golden(3 * number + 1), disk(number));
        let go_on = &mut |_, _| ControlFlow::Continue(());
        store.import(image, &project, &mut InMemory(content(10)), go_on).unwrap();
        store.create_disk(name, &project, image).unwrap();
        store.place(name).unwrap().open_image(name).unwrap().write_at(100, &[77]).unwrap();
        println!("written {number}");
        store.snapshot(name, taken).unwrap();
        println!("taken {number}");
        store.place(name).unwrap().open_image(name).unwrap().write_at(4 * MIB + 100, &[78]).unwrap();
        store.restore(name, taken).unwrap();
        println!("restored {number}");
        flatten(&store, taken).unwrap();
        store.remove_image(image).unwrap();
        println!("done {number}");
    }
}

#[test]
fn what_dies_at_any_moment_is_completed_or_undone() {
    use std::io::{BufRead as _, BufReader};
    let mut rig = Rig::new();
    let admin = rig.ceph.admin_connection();
    // More of them for a search of all moments: ASSAY_CRASH_ROUNDS=200.
    let rounds = std::env::var("ASSAY_CRASH_ROUNDS").map_or(8, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let from = rig.base + 1000 * (1 + u128::from(round));
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::works_until_it_is_killed", "--ignored", "--nocapture"])
            .env("CRASH_MONITOR", admin.monitors[0].to_string())
            .env("CRASH_KEY", admin.key.expose())
            .env("CRASH_POOL", rig.pool.as_str())
            .env("CRASH_PROJECT", rig.project.as_str())
            .env("CRASH_FROM", from.to_string())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        // A step of the work, and some moment in it.
        let step = ["begun", "written", "taken", "restored"][round as usize % 4];
        let first = lines.find(|line| line.contains(step)).expect("the child works");
        let begun = Instant::now();
        while begun.elapsed().as_millis() < u128::from(round * 61_u32 % 150) {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let said: Vec<String> = std::iter::once(first).chain(lines).collect();
        let last = said.iter().rev().find_map(|line| {
            let (reached, number) = line.rsplit_once(' ')?;
            Some((number.parse::<u128>().ok()?, reached.rsplit(' ').next()?.to_owned()))
        });
        let (number, reached) = last.unwrap();
        println!("killed after `{reached}` of {number}");
        let (image, taken, name) = (golden(3 * number), golden(3 * number + 1), disk(number));

        rig.reopen();
        // What the child had been told was done is there; the step that it died in happened, or did not.
        let there = |image| match rig.store.image(image) {
            Ok(_) => true,
            Err(error) => {
                assert!(error.is_not_found(), "{error:?}");
                false
            }
        };
        let has_disk = rig.store.place(name).is_ok();
        match reached.as_str() {
            "begun" => {}
            "written" => assert!(has_disk && rig.read(name) == [77, 11, 12, 0]),
            "taken" => {
                assert!(there(image) && there(taken) && has_disk);
                let read = rig.read(name);
                assert!([[77, 11, 12, 0], [77, 78, 12, 0]].contains(&read), "{read:?}");
            }
            "restored" | "done" => assert!(there(taken) && has_disk && rig.read(name) == [77, 11, 12, 0]),
            other => panic!("`{other}`"),
        }
        // And asking for the same again, as whoever journals it does, ends as if nothing had happened.
        let go_on = &mut |_, _| ControlFlow::Continue(());
        if reached == "begun" {
            rig.store.import(image, &rig.project, &mut InMemory(content(10)), go_on).unwrap();
            rig.store.create_disk(name, &rig.project, image).unwrap();
            rig.write(name, 100, 77);
        }
        if ["begun", "written"].contains(&reached.as_str()) {
            rig.store.snapshot(name, taken).unwrap();
        }
        assert_eq!(rig.read(name)[0], 77);
        flatten(&rig.store, taken).unwrap();
        rig.store.remove_disk(name).unwrap();
        rig.store.remove_image(taken).unwrap();
        rig.store.remove_image(image).unwrap();
        rig.store.sweep().unwrap();
        rig.store.sweep().unwrap();
    }
}

#[test]
fn a_disk_that_was_restored_and_then_removed_stays_removed() {
    let mut rig = Rig::new();
    let name = rig.disk(1);
    rig.store.restore(name, rig.golden()).unwrap();
    rig.store.remove_disk(name).unwrap();
    rig.reopen();
    assert!(rig.store.place(name).unwrap_err().is_not_found());
}

#[test]
fn a_disk_with_a_spoilt_header_keeps_no_store_from_opening() {
    let mut rig = Rig::new();
    let (spoilt, other) = (rig.disk(1), rig.disk(2));
    let admin = rig.ceph.admin_connection();
    let tools = Tools::new(&rig.ceph, &admin.user, &admin.key);
    let header = format!("rbd_header.{}", rig.store.access(spoilt).unwrap().scope.id);
    tools.rados(rig.pool.as_str(), rig.project.as_str(), &["setomapval", &header, "features", "spoilt"]).unwrap();
    rig.reopen();
    assert_eq!(rig.read(other), [10, 11, 12, 0]);
    assert!(rig.store.access(spoilt).is_err());
}

#[test]
fn who_opens_the_store_stops_whoever_had_it() {
    let rig = Rig::new();
    let name = rig.disk(1);
    let before = rig.store.place(name).unwrap().open_image(name).unwrap();
    let now = RbdStore::open(rig.ceph.imaging(&rig.pool), rig.pool.clone()).unwrap();
    let begun = Instant::now();
    let error = loop {
        match before.write_at(0, &[1]) {
            Err(error) => break error,
            Ok(()) => assert!(begun.elapsed().as_secs() < 10, "it goes on writing"),
        }
    };
    assert!(error.is_blocklisted(), "{error:?}");
    now.snapshot(name, golden(rig.base + 3)).unwrap();
}

/// Not a test of speed on shared machines: prints what it measures. Run with `--ignored --nocapture`.
#[test]
#[ignore = "measures"]
fn clones_a_second() {
    let rig = Rig::new();
    let mut took: Vec<_> = (0..100)
        .map(|number| {
            let begun = Instant::now();
            rig.disk(100 + number);
            begun.elapsed()
        })
        .collect();
    took.sort_unstable();
    println!("100 disks: p50 {:?}, p99 {:?}, all {:?}", took[50], took[98], took.iter().sum::<std::time::Duration>());
    let begun = Instant::now();
    rig.store.remove_disk(disk(rig.base + 100)).unwrap();
    println!("a disk removed: {:?}", begun.elapsed());
    let name = disk(rig.base + 101);
    let begun = Instant::now();
    rig.store.snapshot(name, golden(rig.base + 50)).unwrap();
    println!("a snapshot: {:?}", begun.elapsed());
    let scope = rig.store.access(name).unwrap().scope;
    let begun = Instant::now();
    let open = CloneDisk::open(&rig.store.place(name).unwrap(), name, &scope.layers(), File(content(10))).unwrap();
    println!("a disk of {:?} objects opened: {:?}", open.own_objects(), begun.elapsed());
}
