//! A raw file as a target, without imaging: for one-off use and for trying the target out.

use super::process::Launcher;
use super::supervised::{Launch, Supervised};
use super::{GatewayError, Limits, listen, portal, refused};
use crate::store::StoreError;
use crate::worker::BLOCK_BYTES;
use crate::worker::disk::DiskOrder;
use crate::worker::message::WorkerOrder;
use assay_service::CancellationToken;
use assay_wire::imaging::ChapAlgorithms;
use assay_wire::net::Iqn;
use ring::digest::{SHA256, digest};
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// What to export.
#[derive(Debug, Clone)]
pub struct FileExport {
    /// A raw file; what is behind its last whole sector is not seen.
    pub path: PathBuf,
    /// Where to listen.
    pub listen: SocketAddr,
    /// The target's name.
    pub target: Iqn,
    /// The one initiator name that may log in; any, if none is given.
    pub initiator: Option<Iqn>,
    /// CHAP name and secret to ask for.
    pub chap: Option<(String, String)>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What bounds initiators.
    pub limits: Limits,
    /// The worker's program; `assay-export` beside this program if none is given.
    pub worker: Option<PathBuf>,
}

/// Why a file is not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportFileError {
    /// The file.
    #[error("opening {}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process exports it, or has it locked.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// The process that serves it.
    #[error("serving {}", path.display())]
    Worker {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The address, or the worker's program.
    #[error(transparent)]
    Listen(#[from] GatewayError),
}

/// A file whose portal is bound, and whose worker is ready.
pub struct ExportedFile {
    listener: TcpListener,
    address: SocketAddr,
    worker: Arc<Supervised>,
    task: JoinHandle<()>,
}

/// Exports a file until `shutdown`.
///
/// # Errors
/// See [`ExportFileError`].
pub async fn export_file(export: FileExport, shutdown: CancellationToken) -> Result<(), ExportFileError> {
    ExportedFile::bind(export).await?.serve(shutdown).await;
    Ok(())
}

impl ExportedFile {
    /// Opens the file, binds the portal and starts the worker.
    ///
    /// # Errors
    /// See [`ExportFileError`].
    pub async fn bind(export: FileExport) -> Result<Self, ExportFileError> {
        let launcher = Arc::new(Launcher::new(export.worker.clone())?);
        let listener = listen("iSCSI", export.listen).await?;
        let address = listener.local_addr().map_err(|source| refused("iSCSI", export.listen, source))?;
        // Once here, for an error that says what it is about; each worker gets its own.
        open(&export)?;
        let (path, label) = (export.path.clone(), export.target.to_string());
        let recipe = Box::new(move || {
            let failed = |source| StoreError::io("opening", &export.path, source);
            let (file, byte_len) = open(&export).map_err(|error| failed(std::io::Error::other(error)))?;
            let (order, files) = (order(&export, address, byte_len), vec![OwnedFd::from(file)]);
            Ok(Launch { order, files, companion: None })
        });
        let (worker, task) = Supervised::start(label, launcher, recipe)
            .await
            .map_err(|error| ExportFileError::Worker { path, source: Box::new(error) })?;
        Ok(Self { listener, address, worker, task })
    }

    /// Where the portal listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`; then ends the worker.
    pub async fn serve(self, shutdown: CancellationToken) {
        let Self { listener, worker, task, .. } = self;
        let theirs = Arc::clone(&worker);
        portal::serve(listener, move |_whoever| Some(Arc::clone(&theirs)), shutdown).await;
        worker.sever();
        if let Err(error) = task.await {
            tracing::error!(event = "gateway.supervisor_died", %error, "ending the worker");
        }
    }
}

/// The file, locked, and how much of it is whole blocks.
fn open(export: &FileExport) -> Result<(File, u64), ExportFileError> {
    let failed = |source| ExportFileError::Open { path: export.path.clone(), source };
    let file = File::options().read(true).write(!export.read_only).open(&export.path).map_err(failed)?;
    let locked = if export.read_only { file.try_lock_shared() } else { file.try_lock() };
    locked.map_err(|_| ExportFileError::InUse { path: export.path.clone() })?;
    let length = file.metadata().map_err(failed)?.len();
    Ok((file, length - length % u64::from(BLOCK_BYTES)))
}

fn order(export: &FileExport, portal: SocketAddr, byte_len: u64) -> WorkerOrder {
    // The same file gets the same identity every time, so that multipath and by-id links stay.
    let identity = digest(&SHA256, export.path.as_os_str().as_encoded_bytes());
    let identity = identity.as_ref();
    let mut naa = [0; 8];
    naa.copy_from_slice(&identity[..8]);
    WorkerOrder {
        target: export.target.to_string(),
        portal,
        initiator: export.initiator.as_ref().map(Iqn::to_string),
        chap: export.chap.clone(),
        chap_algorithms: ChapAlgorithms::Any,
        naa: u64::from_be_bytes(naa),
        serial: hex::encode(&identity[..16]),
        product: "file".to_owned(),
        read_only: export.read_only,
        disk: DiskOrder::Raw { byte_len },
        limits: export.limits,
        remaining_ms: None,
        uid: None,
        #[cfg(feature = "failpoints")]
        without_seccomp: false,
    }
}
