//! `assay image export`: an image to a file here. What has come so far is kept beside it under another name, and gone on
//! with; the file has its own name once all of it is there and has the digest that it should.

use super::image::FormatArgument;
use super::output::{self, Format};
use super::{BoxError, Options, Site};
use assay_imaging::store::import::Source;
use assay_wire::id::ImageId;
use assay_wire::imaging::{Image, ImageDetail, ImageFormat};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

/// Zeros of so many octets are not written: they are holes.
const HOLE_BYTES: usize = 64 * 1024;

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// The image
    image: ImageId,
    /// The file to make
    file: PathBuf,
    /// Its format; default: by its ending
    #[arg(long, value_enum)]
    format: Option<FormatArgument>,
    #[command(flatten)]
    options: Options,
}

pub(crate) async fn run(arguments: ExportArguments) -> Result<(), BoxError> {
    let ExportArguments { image, file, format, options } = arguments;
    let format = FormatArgument::of(format, &file);
    if file.exists() {
        return Err(format!("exporting {image}: {} is there already", file.display()).into());
    }
    let site = Site::open(&options)?;
    let detail: ImageDetail = site.imaging.get(&format!("/v1/images/{image}")).await?;
    let name = if format == ImageFormat::Raw { "raw" } else { "qcow2" };
    let part = PathBuf::from(format!("{}.{}.{name}.part", file.display(), detail.image.key));
    let failed = |cause: io::Error| format!("exporting {image}: writing {}: {cause}", part.display());
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&part);
    let mut partial = opened.map_err(failed)?;
    let mut offset = partial.seek(SeekFrom::End(0)).map_err(failed)?;
    let path = format!("/v1/images/{image}/content?format={name}&offset={offset}");
    let mut stream = site.imaging.get_streaming(&path).await?;
    let total = offset + stream.content_length().unwrap_or(0);
    let bar = if let Format::Json = options.output { ProgressBar::hidden() } else { ProgressBar::new(total) };
    bar.set_style(ProgressStyle::with_template("exporting {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")?);
    while let Some(chunk) = stream.chunk().await? {
        write_sparse(&mut partial, &chunk).map_err(failed)?;
        offset += chunk.len() as u64;
        bar.set_position(offset);
    }
    partial.set_len(offset).and_then(|()| partial.sync_all()).map_err(failed)?;
    if offset != total {
        return Err(format!("exporting {image}: cut short at {offset} of {total} octets; ask again to go on").into());
    }
    bar.finish_and_clear();
    let digest = check(&detail.image, &part, format)?;
    std::fs::rename(&part, &file).map_err(failed)?;
    let sentence = match digest {
        Some(digest) => format!("image {image} exported to {}; the disk has SHA-256 {digest}", file.display()),
        None => format!("image {image} exported to {}; a snapshot has no digest to compare with", file.display()),
    };
    output::done(options.output, &sentence, &detail.image)
}

/// Whether the disk in the file is the image's.
fn check(image: &Image, part: &Path, format: ImageFormat) -> Result<Option<String>, BoxError> {
    let Some(expected) = &image.sha256 else { return Ok(None) };
    let absolute = std::path::absolute(part)?;
    let folder = absolute.parent().unwrap_or(Path::new("/")).to_owned();
    let found = Source::open(&absolute, format, &[folder])?.content_sha256()?;
    if found == *expected {
        return Ok(Some(found));
    }
    let detail = format!("{} has a disk of SHA-256 {found}, image {} has {expected}", part.display(), image.name);
    Err(format!("{detail}; remove the file and export again").into())
}

/// Appends, leaving out what is zero; the file's length is set in the end.
fn write_sparse(file: &mut File, chunk: &[u8]) -> io::Result<()> {
    for piece in chunk.chunks(HOLE_BYTES) {
        if piece.iter().all(|octet| *octet == 0) {
            let end = file.seek(SeekFrom::Current(i64::try_from(piece.len()).unwrap_or(i64::MAX)))?;
            // So that the length says how far an export has come, should it be broken off here.
            file.set_len(end)?;
        } else {
            file.write_all(piece)?;
        }
    }
    Ok(())
}
