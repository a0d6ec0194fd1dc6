//! A golden image in one namespace and clones of it in another, and the `rados` tool as an attacker has it.

use assay_rbd::keys::{GoldenScope, Scope};
use assay_rbd::name::{CephKey, CephUser, ImageKind, ImageName, Namespace, SnapshotName};
use assay_rbd::testing::{Ceph, SharedCeph};
use assay_rbd::{Cluster, DEFAULT_OBJECT_ORDER, ParentImage, Pool};
use std::path::Path;
use std::process::Command;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GOLDEN_BYTES: u64 = 16 * MIB;

/// What the golden image holds: its first object, and the second half of its third.
pub(crate) fn golden_content() -> Vec<u8> {
    let mut content = vec![0; GOLDEN_BYTES as usize];
    content[..4 * MIB as usize].fill(0xa5);
    content[10 * MIB as usize..12 * MIB as usize].fill(0x5a);
    content
}

pub(crate) struct Site {
    pub(crate) ceph: SharedCeph,
    pub(crate) cluster: Cluster,
    pub(crate) golden_namespace: Namespace,
    pub(crate) golden_pool: Pool,
    pub(crate) golden: ImageName,
    pub(crate) snapshot: SnapshotName,
    pub(crate) namespace: Namespace,
    pub(crate) pool: Pool,
}

impl Site {
    pub(crate) fn new() -> Self {
        let ceph = Ceph::shared();
        let cluster = ceph.admin();
        let (golden_namespace, golden_pool) = ceph.new_namespace(&cluster);
        let (namespace, pool) = ceph.new_namespace(&cluster);
        let golden = ImageName::derived(ImageKind::Golden, "debian");
        golden_pool.create_image(golden, GOLDEN_BYTES, DEFAULT_OBJECT_ORDER).unwrap();
        let image = golden_pool.open_image(golden).unwrap();
        let content = golden_content();
        image.write_at(0, &content[..4 * MIB as usize]).unwrap();
        image.write_at(10 * MIB, &content[10 * MIB as usize..12 * MIB as usize]).unwrap();
        let snapshot = SnapshotName::new("golden").unwrap();
        image.create_snapshot(&snapshot).unwrap();
        Self { ceph, cluster, golden_namespace, golden_pool, golden, snapshot, namespace, pool }
    }

    /// A clone of the golden image.
    pub(crate) fn disk(&self, number: u128) -> ImageName {
        let name = ImageName::numbered(ImageKind::Disk, number);
        self.pool.clone_image((&self.golden_pool, self.golden, &self.snapshot), name, DEFAULT_OBJECT_ORDER).unwrap();
        name
    }

    pub(crate) fn parent(&self) -> ParentImage {
        let id = self.golden_pool.open_read_only(self.golden, None).unwrap().id().unwrap();
        ParentImage { pool: self.ceph.pool_name(), namespace: self.golden_namespace.clone(), id }
    }

    pub(crate) fn scope(&self, image: ImageName) -> Scope {
        Scope {
            pool: self.ceph.pool_name(),
            namespace: self.namespace.clone(),
            image,
            id: self.pool.open_read_only(image, None).unwrap().id().unwrap(),
            golden: vec![GoldenScope { namespace: self.golden_namespace.clone(), id: self.parent().id }],
        }
    }

    /// The pool as the holder of a key sees it.
    pub(crate) fn as_holder(&self, user: &CephUser, key: &CephKey, namespace: &Namespace) -> Pool {
        let cluster = Cluster::connect(&self.ceph.connection(user.clone(), key.clone())).unwrap();
        cluster.namespace(&self.ceph.pool_name(), namespace).unwrap()
    }
}

/// The command line tools, used with somebody's key.
pub(crate) struct Tools {
    folder: tempfile::TempDir,
    base: Vec<String>,
}

impl Tools {
    pub(crate) fn new(ceph: &Ceph, user: &CephUser, key: &CephKey) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keyring = folder.path().join("keyring");
        std::fs::write(&keyring, format!("[{}]\nkey = {}\n", user.entity(), key.expose())).unwrap();
        let conf = ceph.folder().join("ceph.conf");
        let mut base: Vec<String> = vec!["-c".into(), conf.display().to_string()];
        base.extend(["--id".into(), user.as_str().into(), "--keyring".into(), keyring.display().to_string()]);
        // By default the tool waits for ever for what it may not see.
        base.extend(["--rados-osd-op-timeout", "10", "--client-mount-timeout", "10"].map(str::to_owned));
        Self { base, folder }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs `rados` in a namespace of a pool; what it said is the error if it failed.
    pub(crate) fn rados(&self, pool: &str, namespace: &str, arguments: &[&str]) -> Result<Vec<u8>, String> {
        let mut command = Command::new("rados");
        command.args(&self.base).args(["-p", pool, "-N", namespace]).args(arguments);
        let output = command.current_dir(self.folder.path()).output().unwrap();
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}
