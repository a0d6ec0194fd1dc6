//! Files that are being uploaded: `<store>/uploads/<id>` with the octets that have come, modified when the last of them did,
//! and `<id>.json` with what was said of it. Whatever was written survives the end of this process; the digest is checked
//! when the file is imported, so what a power cut took is found then. One that nobody goes on with is forgotten after a while.

use crate::lock::lock;
use assay_wire::id::{ProjectId, UploadId};
use assay_wire::imaging::{Upload, UploadRequest};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

/// Octets of one piece.
pub(crate) const MAX_PIECE_BYTES: usize = 4 << 20;
/// As the largest disk.
const MAX_BYTES: u64 = crate::store::qcow2::MAX_VIRTUAL_BYTES;
/// Of one project, at a time.
const MAX_UPLOADS: usize = 8;

/// The uploads.
#[derive(Debug)]
pub(crate) struct Uploads {
    folder: PathBuf,
    changing: Mutex<()>,
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// What was said of the file cannot be.
    #[error("an upload has 1 to {MAX_BYTES} octets and a SHA-256 of 64 hexadecimal digits: {0}")]
    Malformed(String),
    /// Each takes room.
    #[error("project `{0}` has {MAX_UPLOADS} uploads")]
    TooMany(ProjectId),
    /// Pieces come in order.
    #[error("upload {upload} has {received} of {bytes} octets: a piece of {length} at {offset} does not go on with it")]
    Offset {
        /// Which.
        upload: UploadId,
        /// How far it is.
        received: u64,
        /// How large it will be.
        bytes: u64,
        /// The piece's length.
        length: u64,
        /// Where it was to go.
        offset: u64,
    },
    /// The file system refused.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Uploads {
    /// Opens the folder, making it where missing.
    pub(crate) fn open(folder: PathBuf) -> Result<Self, UploadError> {
        std::fs::create_dir_all(&folder).map_err(|source| failed("making", &folder, source))?;
        Ok(Self { folder, changing: Mutex::default() })
    }

    /// Begins an upload, or finds the one of the same file.
    pub(crate) fn begin(&self, request: &UploadRequest, now_ms: i64) -> Result<Upload, UploadError> {
        let hex = request.sha256.len() == 64 && request.sha256.bytes().all(|octet| octet.is_ascii_hexdigit());
        if !hex || request.bytes == 0 || request.bytes > MAX_BYTES {
            let said: String = request.sha256.chars().take(80).collect();
            return Err(UploadError::Malformed(format!("not {} and `{}`", request.bytes, said.escape_debug())));
        }
        let _alone = self.alone();
        let sha256 = request.sha256.to_ascii_lowercase();
        let own: Vec<Upload> = self.all()?.into_iter().filter(|upload| upload.project == request.project).collect();
        if let Some(found) = own.iter().find(|upload| upload.sha256 == sha256 && upload.bytes == request.bytes) {
            return Ok(found.clone());
        }
        if own.len() >= MAX_UPLOADS {
            return Err(UploadError::TooMany(request.project.clone()));
        }
        let (id, project, bytes) = (UploadId::random(), request.project.clone(), request.bytes);
        let upload = Upload { id, project, bytes, sha256, received: 0 };
        let path = self.path(id);
        let file = File::create_new(&path).map_err(|source| failed("making", &path, source))?;
        touch(&file, &path, now_ms)?;
        self.describe(&upload)?;
        Ok(upload)
    }

    /// Adds a piece.
    pub(crate) fn add(&self, upload: Upload, offset: u64, piece: &[u8], now_ms: i64) -> Result<Upload, UploadError> {
        let _alone = self.alone();
        let path = self.path(upload.id);
        let file = OpenOptions::new().write(true).open(&path).map_err(|source| failed("opening", &path, source))?;
        let received = file.metadata().map_err(|source| failed("reading the size of", &path, source))?.len();
        let (length, bytes) = (piece.len() as u64, upload.bytes);
        let end = offset.checked_add(length).filter(|end| *end <= bytes && offset >= received);
        let end = end.ok_or(UploadError::Offset { upload: upload.id, received, bytes, length, offset })?;
        // What fails midway is no part of it: the next piece must begin where this one did.
        let written = file.write_all_at(piece, offset).and_then(|()| file.set_len(end));
        if let Err(source) = written {
            let _ = file.set_len(received);
            return Err(failed("writing", &path, source));
        }
        touch(&file, &path, now_ms)?;
        Ok(Upload { received: end, ..upload })
    }

    /// How far an upload has come.
    pub(crate) fn get(&self, upload: UploadId) -> Result<Option<Upload>, UploadError> {
        let Some(upload) = self.described(upload)? else { return Ok(None) };
        let path = self.path(upload.id);
        let received = std::fs::metadata(&path).map_err(|source| failed("reading the size of", &path, source))?.len();
        Ok(Some(Upload { received, ..upload }))
    }

    /// Forgets an upload.
    pub(crate) fn remove(&self, upload: UploadId) -> Result<(), UploadError> {
        let _alone = self.alone();
        self.forget(upload)
    }

    /// Forgets every upload that nobody has gone on with since `before_ms`, and what there is of one that was not begun to
    /// the end. Answers which.
    pub(crate) fn sweep(&self, before_ms: i64) -> Result<Vec<UploadId>, UploadError> {
        let _alone = self.alone();
        let mut swept = Vec::new();
        for id in self.ids("")? {
            // Without a description that can be read it is of no use to anybody.
            let described = self.described(id).is_ok_and(|described| described.is_some());
            if !described || touched_at_ms(&self.path(id)).is_none_or(|at_ms| at_ms < before_ms) {
                self.forget(id)?;
                swept.push(id);
            }
        }
        Ok(swept)
    }

    fn forget(&self, upload: UploadId) -> Result<(), UploadError> {
        let with = |extension| self.path(upload).with_extension(extension);
        for path in [with("json"), with("json-new"), self.path(upload)] {
            match std::fs::remove_file(&path) {
                Err(source) if source.kind() != ErrorKind::NotFound => return Err(failed("removing", &path, source)),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Where uploads are, and where the octets of one.
    pub(crate) fn place(&self, upload: UploadId) -> (PathBuf, PathBuf) {
        (self.folder.clone(), self.path(upload))
    }

    fn all(&self) -> Result<Vec<Upload>, UploadError> {
        // One that was not begun to the end is none.
        Ok(self.ids(".json")?.into_iter().filter_map(|id| self.get(id).ok().flatten()).collect())
    }

    /// The uploads that have a file with such a name.
    fn ids(&self, ending: &str) -> Result<Vec<UploadId>, UploadError> {
        let listing = |source| failed("listing", &self.folder, source);
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(listing)? {
            let name = entry.map_err(listing)?.file_name().to_string_lossy().into_owned();
            ids.extend(name.strip_suffix(ending).and_then(|id| id.parse::<UploadId>().ok()));
        }
        Ok(ids)
    }

    fn describe(&self, upload: &Upload) -> Result<(), UploadError> {
        let path = self.path(upload.id).with_extension("json");
        let json = serde_json::to_vec(upload).map_err(|cause| failed("writing", &path, cause.into()))?;
        let staged = path.with_extension("json-new");
        let written = std::fs::write(&staged, json).and_then(|()| std::fs::rename(&staged, &path));
        written.map_err(|source| failed("writing", &path, source))
    }

    fn described(&self, upload: UploadId) -> Result<Option<Upload>, UploadError> {
        let path = self.path(upload).with_extension("json");
        let json = match std::fs::read(&path) {
            Err(source) if source.kind() == ErrorKind::NotFound => return Ok(None),
            json => json.map_err(|source| failed("reading", &path, source))?,
        };
        serde_json::from_slice(&json).map(Some).map_err(|cause| failed("reading", &path, cause.into()))
    }

    fn path(&self, upload: UploadId) -> PathBuf {
        self.folder.join(upload.to_string())
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        lock(&self.changing)
    }
}

/// Says when the file was begun, or its last piece came: by the service's clock, in milliseconds since the Unix epoch.
fn touch(file: &File, path: &Path, now_ms: i64) -> Result<(), UploadError> {
    let now = SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(now_ms).unwrap_or(0));
    file.set_modified(now).map_err(|source| failed("setting the time of", path, source))
}

fn touched_at_ms(path: &Path) -> Option<i64> {
    let at = std::fs::metadata(path).ok()?.modified().ok()?;
    at.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_millis().try_into().ok()
}

fn failed(doing: &'static str, path: &Path, source: io::Error) -> UploadError {
    UploadError::Io { doing, path: path.to_owned(), source }
}
