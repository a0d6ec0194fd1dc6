//! A raw file as a target, without imaging: for one-off use and for trying the target out.

use super::hub::Hub;
use super::portal;
use super::unit::{BLOCK_BYTES, Unit};
use super::{GatewayError, listen, refused};
use crate::store::device::{BlockDevice, DeviceError, check_range};
use crate::store::file::{punch_hole, read_if_cached};
use assay_iscsi::{
    Authentication, ChapAlgorithms, ChapCredentials, ConfigError, Directory, LogicalUnitConfig, Target, TargetConfig,
};
use assay_service::CancellationToken;
use assay_wire::net::Iqn;
use ring::digest::{SHA256, digest};
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;

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
    /// The engine will not have it.
    #[error("putting up the target: {0}")]
    Target(ConfigError),
    /// The address.
    #[error(transparent)]
    Listen(#[from] GatewayError),
}

/// A file whose portal is bound.
pub struct ExportedFile {
    listener: TcpListener,
    address: SocketAddr,
    directory: Arc<dyn Directory>,
    hub: Arc<Hub>,
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
    /// Opens the file and binds the portal.
    ///
    /// # Errors
    /// See [`ExportFileError`].
    pub async fn bind(export: FileExport) -> Result<Self, ExportFileError> {
        let device = RawFile::open(&export)?;
        let unit = Arc::new(Unit::new(Arc::new(device)));
        let listener = listen("iSCSI", export.listen).await?;
        let address = listener.local_addr().map_err(|source| refused("iSCSI", export.listen, source))?;
        let target = Target::new(target(&export, address, unit.blocks())).map_err(ExportFileError::Target)?;
        let (target, hub) = (Arc::new(target), Arc::new(Hub::default()));
        hub.insert(Arc::clone(&target), unit);
        let directory: Arc<dyn Directory> = match export.initiator {
            Some(_) => Arc::clone(&hub.targets) as Arc<dyn Directory>,
            None => Arc::new(ForAnybody(target)),
        };
        Ok(Self { listener, address, directory, hub })
    }

    /// Where the portal listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`.
    pub async fn serve(self, shutdown: CancellationToken) {
        portal::serve(self.listener, self.directory, self.hub, shutdown).await;
    }
}

/// The one target, whoever asks.
struct ForAnybody(Arc<Target>);

impl Directory for ForAnybody {
    fn target(&self, name: &str, _initiator: &str) -> Option<Arc<Target>> {
        (self.0.name() == name).then(|| Arc::clone(&self.0))
    }

    fn visible_to(&self, _initiator: &str) -> Vec<Arc<Target>> {
        vec![Arc::clone(&self.0)]
    }
}

fn target(export: &FileExport, portal: SocketAddr, blocks: u64) -> TargetConfig {
    // The same file gets the same identity every time, so that multipath and by-id links stay.
    let identity = digest(&SHA256, export.path.as_os_str().as_encoded_bytes());
    let identity = identity.as_ref();
    let mut naa = [0; 8];
    naa.copy_from_slice(&identity[..8]);
    let credentials = |(name, secret): &(String, String)| ChapCredentials::new(name.clone(), secret.clone());
    TargetConfig {
        name: export.target.to_string(),
        portal,
        initiator: export.initiator.as_ref().map_or_else(|| "any".to_owned(), Iqn::to_string),
        authentication: match &export.chap {
            Some(chap) => {
                Authentication::Chap { initiator: credentials(chap), target: None, algorithms: ChapAlgorithms::WithMd5 }
            }
            None => Authentication::None,
        },
        logical_unit: LogicalUnitConfig {
            block_bytes: BLOCK_BYTES,
            blocks,
            naa: u64::from_be_bytes(naa) & ((1 << 60) - 1),
            serial: hex::encode(&identity[..16]),
            vendor: "ASSAY".to_owned(),
            product: "file".to_owned(),
            read_only: export.read_only,
            write_cache: true,
        },
    }
}

/// A plain file.
#[derive(Debug)]
struct RawFile {
    file: File,
    byte_len: u64,
    read_only: bool,
}

impl RawFile {
    fn open(export: &FileExport) -> Result<Self, ExportFileError> {
        let failed = |source| ExportFileError::Open { path: export.path.clone(), source };
        let file = File::options().read(true).write(!export.read_only).open(&export.path).map_err(failed)?;
        let locked = if export.read_only { file.try_lock_shared() } else { file.try_lock() };
        locked.map_err(|_| ExportFileError::InUse { path: export.path.clone() })?;
        let length = file.metadata().map_err(failed)?.len();
        Ok(Self { file, byte_len: length - length % u64::from(BLOCK_BYTES), read_only: export.read_only })
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        check_range(offset, length, self.byte_len)?;
        if self.read_only { Err(DeviceError::ReadOnly) } else { Ok(()) }
    }
}

impl BlockDevice for RawFile {
    fn byte_len(&self) -> u64 {
        self.byte_len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(offset, buffer.len() as u64, self.byte_len)?;
        let failed = |source| DeviceError::Io { doing: "reading a file", offset, source };
        self.file.read_exact_at(buffer, offset).map_err(failed)
    }

    fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
        check_range(offset, buffer.len() as u64, self.byte_len)?;
        let failed = |source| DeviceError::Io { doing: "reading a file", offset, source };
        read_if_cached(&self.file, offset, buffer).map_err(failed)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check(offset, data.len() as u64)?;
        let failed = |source| DeviceError::from_io("writing to a file", offset, source);
        self.file.write_all_at(data, offset).map_err(failed)
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DeviceError> {
        self.check(offset, length)?;
        let failed = |source| DeviceError::from_io("unmapping part of a file", offset, source);
        if length == 0 { Ok(()) } else { punch_hole(&self.file, offset, length).map_err(failed) }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::from_io("flushing a file", 0, source);
        self.file.sync_data().map_err(failed)
    }
}
