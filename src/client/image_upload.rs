//! `assay image import --upload`: a file of this machine goes to imaging in pieces, zeros left out. What was broken off goes
//! on where it stopped, since an upload is known by its file's digest.

use super::output::Format;
use super::{BoxError, Site};
use assay_imaging::store::import::Source;
use assay_wire::id::{ProjectId, UploadId};
use assay_wire::imaging::{ImageFormat, Upload, UploadRequest};
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const PIECE_BYTES: u64 = 4 << 20;

/// Uploads `path`; answers what to import.
pub(super) async fn upload(
    site: &Site,
    path: &Path,
    project: &ProjectId,
    expected: Option<&str>,
    format: Format,
) -> Result<UploadId, BoxError> {
    let absolute = std::path::absolute(path)?;
    let folder = absolute.parent().unwrap_or(Path::new("/")).to_owned();
    let bar = |total| if let Format::Json = format { ProgressBar::hidden() } else { ProgressBar::new(total) };
    let file = File::open(&absolute).map_err(|cause| format!("uploading {}: {cause}", path.display()))?;
    let bytes = file.metadata()?.len();
    let shown = bar(bytes);
    shown.set_style(ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")?);
    shown.set_message("hashing");
    let sha256 = Source::open(&absolute, ImageFormat::Raw, &[folder])?.digest(expected, &mut |done, _| {
        shown.set_position(done);
        ControlFlow::Continue(())
    })?;
    shown.set_message("uploading");
    let request = UploadRequest { project: project.clone(), bytes, sha256 };
    let Upload { id, mut received, .. } = site.imaging.post("/v1/uploads", &request).await?;
    let mut at = received;
    while at < bytes {
        let mut piece = vec![0; usize::try_from(PIECE_BYTES.min(bytes - at))?];
        file.read_exact_at(&mut piece, at).map_err(|cause| format!("reading {}: {cause}", path.display()))?;
        let (offset, end) = (at, at + piece.len() as u64);
        if piece.iter().any(|octet| *octet != 0) {
            let upload: Upload = site.imaging.put_octets(&format!("/v1/uploads/{id}?offset={offset}"), piece).await?;
            received = upload.received;
        }
        at = end;
        shown.set_position(at);
    }
    if received < bytes {
        let _: Upload = site.imaging.put_octets(&format!("/v1/uploads/{id}?offset={bytes}"), Vec::new()).await?;
    }
    shown.finish_and_clear();
    Ok(id)
}
