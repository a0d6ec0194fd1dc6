//! A site's Ceph: one monitor and one OSD on loopback, in the namespace of the services. Gateways do not reach it.

use crate::error::{LabError, Result};
use assay_rbd::testing::{Ceph, ObjectStore};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Where a site keeps its images and disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum StoreKind {
    /// In files of imaging's host.
    Local,
    /// On a Ceph of the lab's own.
    Ceph,
}

/// The cluster, running. It ends with its last owner.
#[derive(Debug, Clone)]
pub struct LabCeph(Arc<Mutex<Ceph>>);

impl LabCeph {
    /// Starts it. What was acknowledged outlives its OSD.
    ///
    /// # Errors
    /// It does not start; Debian's packages `ceph-mon`, `ceph-osd` and `ceph-common` are needed.
    pub async fn start() -> Result<Self> {
        let started = tokio::task::spawn_blocking(|| Ceph::start(ObjectStore::Bluestore)).await;
        let ceph = started.map_err(LabError::service("starting Ceph"))?;
        Ok(Self(Arc::new(Mutex::new(ceph))))
    }

    /// Imaging's table `[ceph]`, its key beside the file that the table goes into.
    ///
    /// # Errors
    /// The key cannot be written.
    pub fn table(&self, folder: &Path) -> Result<Value> {
        let ceph = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = ceph.imaging_connection(&ceph.pool_name());
        let key_file = folder.join("ceph.key");
        crate::services::write_secret(&key_file, connection.key.expose())?;
        Ok(json!({
            "monitors": connection.monitors,
            "user": connection.user,
            "key_file": key_file,
            "pool": ceph.pool_name(),
            "rbd_disks_socket": disks_socket(folder),
        }))
    }

    /// Kills the OSD: whatever needs it waits.
    ///
    /// # Errors
    /// The cluster is gone.
    pub async fn kill_osd(&self) -> Result<()> {
        self.with("killing the OSD", Ceph::kill_osd).await
    }

    /// Starts the OSD again.
    ///
    /// # Errors
    /// It does not come.
    pub async fn start_osd(&self) -> Result<()> {
        self.with("starting the OSD", Ceph::start_osd).await
    }

    async fn with(&self, doing: &'static str, order: fn(&mut Ceph)) -> Result<()> {
        let ceph = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || order(&mut ceph.lock().unwrap_or_else(PoisonError::into_inner)));
        done.await.map_err(LabError::service(doing))
    }
}

/// Where gateways ask for disks on Ceph.
pub(crate) fn disks_socket(folder: &Path) -> std::path::PathBuf {
    folder.join("rbd-disks.sock")
}
