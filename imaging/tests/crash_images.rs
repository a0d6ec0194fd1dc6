//! Imaging dies at every step of making, changing and removing images and disks. After a restart each operation has
//! happened entirely or not at all, nothing is half visible, everything else is as it was, and asking again does it.
//!
//! Both with images and disks in files and with them on a real Ceph.
//!
//! Not a usual test program: it starts itself again as the process that dies. Run with `--features failpoints`.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test stops where it fails, and says what it has done"
)]

mod rig;

use assay_imaging::config::CephConfig;
use assay_imaging::store::{ImageStore, LocalStore, RbdImageStore};
use assay_rbd::testing::Ceph;
use assay_service::client::{ClientError, ServiceClient};
use assay_service::clock::ManualClock;
use assay_wire::agreement::Agreement;
use assay_wire::id::LeaseId;
use assay_wire::imaging::{
    Disk, DiskRequest, Image, ImageKind, ImageState, ImportRequest, ImportSource, ImportStatus, RestoreRequest,
    SnapshotRequest, SourceFormat,
};
use rig::rbd::table;
use rig::site::{Service, Site};
use rig::{NOW_MS, pattern};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

const SIGABRT: i32 = 6;
const OTHER_LEASE: &str = "6f1cbc1e-9a51-4a57-8d5e-0a6d5b0c9a11";

const RUNNING: &str = "snapshot-running";

/// What is done, and where it dies: the crash point, and whether it has happened by then.
const CASES: [(&str, &[(&str, bool)]); 7] = [
    (
        "import",
        &[
            ("store::import::copied", false),
            ("store::import::described", false),
            ("store::import::published", true),
            ("catalogue::stored", true),
        ],
    ),
    ("clone", &[("store::create-disk::new-top", false), ("store::create-disk::published", true)]),
    (
        "snapshot",
        &[
            ("store::snapshot::new-top", false),
            ("store::snapshot::frozen", false),
            ("store::snapshot::published", true),
            ("catalogue::stored", true),
        ],
    ),
    // While a node runs from the disk: its export goes on by itself.
    (
        RUNNING,
        &[
            ("store::snapshot::new-top", false),
            ("store::snapshot::frozen", false),
            ("store::snapshot::published", true),
        ],
    ),
    ("restore", &[("store::restore::new-top", false), ("store::restore::published", true)]),
    (
        "flatten",
        &[("store::flatten::copied", false), ("store::flatten::published", true), ("catalogue::flattened", true)],
    ),
    ("delete", &[("catalogue::deleting", true), ("store::remove-image::unnamed", true), ("catalogue::removed", true)]),
];

/// The same on Ceph, whose own steps `assay-rbd`'s tests interrupt.
const CASES_ON_CEPH: [(&str, &[(&str, bool)]); 6] = [
    ("import", &[("store::rbd::taken-in", true), ("catalogue::stored", true)]),
    ("clone", &[("store::rbd::cloned", true)]),
    ("snapshot", &[("catalogue::stored", true)]),
    ("restore", &[("store::rbd::restored", true)]),
    ("flatten", &[("store::rbd::taken-in", true), ("catalogue::flattened", true)]),
    ("delete", &[("catalogue::deleting", true), ("store::remove-image::unnamed", true), ("catalogue::removed", true)]),
];

/// Where imaging has its images and disks: in its folder, or on Ceph.
#[derive(Clone)]
struct Place(Option<CephConfig>);

impl Place {
    async fn start(&self, folder: &Path, clock: &Arc<ManualClock>) -> Service {
        Service::start_on(folder, clock, Agreement::default(), self.0.clone()).await
    }

    /// The store, behind imaging's back.
    fn open(&self, folder: &Path) -> Box<dyn ImageStore> {
        let root = folder.join("store");
        let Some(ceph) = &self.0 else { return Box::new(LocalStore::open(&root).unwrap()) };
        let key = std::fs::read_to_string(&ceph.key_file).unwrap();
        let connection = assay_rbd::Connection {
            monitors: ceph.monitors.clone(),
            user: ceph.user.clone(),
            key: assay_rbd::name::CephKey::new(key.trim()).unwrap(),
            patience: assay_rbd::Patience::CONTROL,
        };
        Box::new(RbdImageStore::open(&root, &connection, ceph.pool.clone()).unwrap())
    }

    /// For the process that dies.
    fn to_environment(&self) -> Vec<(&'static str, String)> {
        self.0.as_ref().map(rig::rbd::to_environment).unwrap_or_default()
    }

    fn from_environment() -> Self {
        Self(rig::rbd::from_environment())
    }
}

#[tokio::main]
async fn main() {
    if let (Ok(what), Ok(point), Ok(folder)) =
        (std::env::var("CRASH_DOING"), std::env::var("CRASH_AT"), std::env::var("CRASH_IN"))
    {
        fail::cfg(&point, "return").unwrap();
        let clock = Arc::new(ManualClock::new(NOW_MS));
        let service = Place::from_environment().start(Path::new(&folder), &clock).await;
        let answered = act(&service.operator, &what, Path::new(&folder)).await;
        panic!("lived through {point}: {answered:?}");
    }
    for (what, points) in CASES {
        for (point, happened) in points {
            crash(&Place(None), what, point, *happened).await;
            println!("{what}, crash at {point}: ok");
        }
    }
    let (ceph, keys) = (Ceph::shared(), tempfile::tempdir().unwrap());
    for (what, points) in CASES_ON_CEPH {
        for (point, happened) in points {
            let pool = format!("{what}-{}", point.replace("::", "-"));
            let place = Place(Some(tokio::task::block_in_place(|| table(&ceph, keys.path(), &pool))));
            crash(&place, what, point, *happened).await;
            println!("{what} on Ceph, crash at {point}: ok");
        }
    }
}

/// Does what the case is about.
async fn act(client: &ServiceClient, what: &str, folder: &Path) -> Result<(), String> {
    let text = |error: ClientError| error.to_string();
    let lease = std::fs::read_to_string(folder.join("lease")).unwrap();
    match what {
        "import" => {
            let request = ImportRequest {
                name: "new".parse().unwrap(),
                project: "p1".parse().unwrap(),
                source: ImportSource::Path(folder.join("source.raw").display().to_string()),
                format: SourceFormat::Raw,
                sha256: None,
            };
            work(client, "v1/images", &request).await
        }
        "clone" => {
            let (project, node, image) = ("p1".parse().unwrap(), "n2".parse().unwrap(), "before".parse().unwrap());
            let request = DiskRequest { project, node, image, mac: None };
            client.put::<_, Disk>(&format!("v1/disks/{OTHER_LEASE}"), &request).await.map(drop).map_err(text)
        }
        "snapshot" | RUNNING => {
            let request = SnapshotRequest { name: "new".parse().unwrap() };
            client.post::<_, Image>(&format!("v1/disks/{lease}/snapshot"), &request).await.map(drop).map_err(text)
        }
        "restore" => {
            let request = RestoreRequest { image: "before".parse().unwrap() };
            client.post::<_, Disk>(&format!("v1/disks/{lease}/restore"), &request).await.map(drop).map_err(text)
        }
        "flatten" => work(client, "v1/images/before/flatten", &()).await,
        "delete" => client.delete::<_, ()>("v1/images/before", &()).await.map_err(text),
        other => panic!("{other}"),
    }
}

async fn work(client: &ServiceClient, path: &str, body: &(impl serde::Serialize + Sync)) -> Result<(), String> {
    let answer = client.post_streaming(path, body).await.map_err(|error| error.to_string())?;
    let lines = answer.text().await.map_err(|error| error.to_string())?;
    match serde_json::from_str(lines.lines().last().unwrap_or_default()) {
        Ok(ImportStatus::Done { .. }) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// What a lease's disk holds, read behind imaging's back.
fn disk(place: &Place, folder: &Path, id: assay_wire::id::DiskId) -> Vec<u8> {
    let store = place.open(folder);
    let device = store.open_disk(id).unwrap();
    let mut content = vec![0; usize::try_from(device.byte_len()).unwrap()];
    device.read_at(0, &mut content).unwrap();
    content
}

/// A site with a snapshot `before` of a disk that was written to once before it and once after it.
async fn site(place: &Place) -> (Site, Disk, Vec<u8>, Vec<u8>) {
    let mut site = Site::on(place.0.clone()).await;
    let folder = site.folder.path().to_owned();
    std::fs::write(folder.join("lease"), site.lease.to_string()).unwrap();
    let disk: Disk = site.service.operator.get::<Vec<Disk>>("v1/disks").await.unwrap().pop().unwrap();
    let (mut before, mut now) = (pattern(1 << 20), Vec::new());
    for (fill, at) in [(0x11, 4096), (0x22, 300_000)] {
        site.service.stop().await;
        {
            let store = place.open(&folder);
            let device = store.open_disk(disk.id).unwrap();
            device.write_at(at, &[fill; 8192]).unwrap();
            device.flush().unwrap();
        }
        site.service = place.start(&folder, &site.clock).await;
        let at = usize::try_from(at).unwrap();
        if fill == 0x11 {
            before[at..at + 8192].fill(fill);
            now = before.clone();
            let request = SnapshotRequest { name: "before".parse().unwrap() };
            let _: Image =
                site.service.operator.post(&format!("v1/disks/{}/snapshot", site.lease), &request).await.unwrap();
        } else {
            now[at..at + 8192].fill(fill);
        }
    }
    (site, disk, before, now)
}

async fn crash(place: &Place, what: &str, point: &str, happened: bool) {
    let (mut site, at_first, before, now) = site(place).await;
    let folder = site.folder.path().to_owned();
    let claims = site.claims();
    if what == RUNNING {
        site.service.export(&site.sign(&claims)).await.unwrap();
    }
    site.service.stop().await;
    let died = tokio::process::Command::new(std::env::current_exe().unwrap())
        .env("CRASH_DOING", what)
        .env("CRASH_AT", point)
        .env("CRASH_IN", &folder)
        .envs(place.to_environment())
        .stderr(Stdio::null())
        .status()
        .await
        .unwrap();
    assert_eq!(died.signal(), Some(SIGABRT), "{what} at {point}: {died}");
    site.service = place.start(&folder, &site.clock).await;
    let client = &site.service.operator;
    look(client, what, point, happened).await;
    // What was asked for and has not happened happens now; a name that is taken since it has is as good.
    let again = act(client, what, &folder).await;
    let taken = happened && matches!(what, "import" | "snapshot" | RUNNING | "delete");
    assert!(again.is_ok() != taken, "{what} at {point}: {again:?}");
    look(client, what, point, true).await;
    if what == RUNNING {
        let served = site.gateway.status().await.exports;
        assert_eq!((served.len(), served[0].restarts), (1, 0), "{what} at {point}");
        site.service.end(claims.jti).await.unwrap();
    }
    site.service.stop().await;
    let expected = if what == "restore" { &before } else { &now };
    assert!(
        tokio::task::block_in_place(|| disk(place, &folder, at_first.id)) == *expected,
        "{what} at {point}: the disk"
    );
    if place.0.is_none() {
        strays(&folder, what, point);
    }
    site.service = place.start(&folder, &site.clock).await;
    site.stop().await;
}

/// Nothing is half visible.
async fn look(client: &ServiceClient, what: &str, point: &str, happened: bool) {
    let images: Vec<Image> = client.get("v1/images").await.unwrap();
    let find = |name: &str| images.iter().find(|image| image.name.as_str() == name);
    let ready = |name: &str| find(name).is_some_and(|image| image.state == ImageState::Ready);
    assert!(ready("golden"), "{what} at {point}");
    let disks: Vec<Disk> = client.get("v1/disks").await.unwrap();
    let other: LeaseId = OTHER_LEASE.parse().unwrap();
    let done = match what {
        "import" | "snapshot" | RUNNING => ready("new"),
        "clone" => disks.iter().any(|disk| disk.lease == other) || !happened,
        "restore" => return,
        "flatten" => find("before").is_some_and(|image| image.kind == ImageKind::Golden && image.sha256.is_some()),
        "delete" => find("before").is_none(),
        other => panic!("{other}"),
    };
    let expected = happened || what == "clone";
    assert_eq!(done, expected, "{what} at {point}: {images:?}");
}

/// Every layer belongs to a disk or an image, and no import is left.
fn strays(folder: &Path, what: &str, point: &str) {
    let names = |kind: &str| -> Vec<String> {
        let entries = std::fs::read_dir(folder.join("store").join(kind)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let images = names("images");
    assert!(images.iter().all(|name| !name.starts_with('.')), "{what} at {point}: {images:?}");
    let manifests: String = images
        .iter()
        .map(|name| folder.join("store/images").join(name).join("image.json"))
        .chain(names("disks").iter().map(|name| folder.join("store/disks").join(name)))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    for layer in names("layers") {
        assert!(manifests.contains(&layer), "{what} at {point}: layer {layer} is nobody's");
    }
}
