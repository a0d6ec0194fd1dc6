//! `assay image`, `disk` and `export`.

use super::output::{self, Format, Row};
use super::{BoxError, Options, Site};
use assay_wire::id::{ImageId, ProjectId};
use assay_wire::imaging::{Disk, Export, Image, ImageFormat, ImportRequest, ImportStatus, Latency};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Import a golden image from a raw or qcow2 file on the imaging host
    Import(ImportArguments),
    /// List golden images
    List(Options),
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// List disks
    List(Options),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExportCommand {
    /// List exports and their sessions
    List(Options),
}

#[derive(Debug, Args)]
pub(crate) struct ImportArguments {
    /// The new image's name
    name: ImageId,
    /// The file, below one of imaging's import folders
    source: PathBuf,
    /// The project that will own it
    #[arg(long)]
    project: ProjectId,
    /// The file's format; default: by its ending
    #[arg(long, value_enum)]
    format: Option<FormatArgument>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FormatArgument {
    Raw,
    Qcow2,
}

impl Row for Image {
    const HEAD: &'static [&'static str] = &["IMAGE", "PROJECT", "KIND", "STATE", "DISK", "DATA", "SHA-256", "MADE"];
    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            self.project.to_string(),
            format!("{:?}", self.kind).to_lowercase(),
            format!("{:?}", self.state).to_lowercase(),
            output::bytes(self.virtual_bytes),
            output::bytes(self.data_bytes),
            self.sha256.iter().flat_map(|digest| digest.chars().take(16)).collect(),
            output::time(self.provenance.created_at_ms),
        ]
    }
}

impl Row for Disk {
    const HEAD: &'static [&'static str] = &["DISK", "NODE", "PROJECT", "IMAGE", "WRITTEN", "LEASE"];
    fn cells(&self) -> Vec<String> {
        let Self { id, lease, project, node, image, written_bytes } = self;
        let written = output::bytes(*written_bytes);
        vec![id.to_string(), node.to_string(), project.to_string(), image.to_string(), written, lease.to_string()]
    }
}

impl Row for Export {
    const HEAD: &'static [&'static str] =
        &["NODE", "TARGET", "SESSIONS", "READ", "WRITTEN", "READS P50/P99", "WRITES P50/P99", "UNTIL"];
    fn cells(&self) -> Vec<String> {
        vec![
            self.node.to_string(),
            self.target.to_string(),
            self.sessions.to_string(),
            output::bytes(self.read_bytes),
            output::bytes(self.written_bytes),
            latency(&self.reads),
            latency(&self.writes),
            output::time(self.expires_at_ms),
        ]
    }
}

/// As `41/180 µs`.
fn latency(Latency { count, p50_us, p99_us }: &Latency) -> String {
    if *count == 0 { "-".to_owned() } else { format!("{p50_us}/{p99_us} µs") }
}

pub(crate) async fn run_image(command: ImageCommand) -> Result<(), BoxError> {
    match command {
        ImageCommand::Import(arguments) => import(arguments).await,
        ImageCommand::List(options) => {
            let images: Vec<Image> = Site::open(&options)?.imaging.get("/v1/images").await?;
            output::list(options.output, &images)
        }
    }
}

pub(crate) async fn run_disk(DiskCommand::List(options): DiskCommand) -> Result<(), BoxError> {
    let disks: Vec<Disk> = Site::open(&options)?.imaging.get("/v1/disks").await?;
    output::list(options.output, &disks)
}

pub(crate) async fn run_export(ExportCommand::List(options): ExportCommand) -> Result<(), BoxError> {
    let exports: Vec<Export> = Site::open(&options)?.imaging.get("/v1/exports").await?;
    output::list(options.output, &exports)
}

async fn import(arguments: ImportArguments) -> Result<(), BoxError> {
    let ImportArguments { name, source, project, format, options } = arguments;
    let format = match format {
        Some(FormatArgument::Raw) => ImageFormat::Raw,
        Some(FormatArgument::Qcow2) => ImageFormat::Qcow2,
        None if source.extension().is_some_and(|ending| ending == "qcow2") => ImageFormat::Qcow2,
        None => ImageFormat::Raw,
    };
    let source = std::path::absolute(&source)?.to_string_lossy().into_owned();
    let request = ImportRequest { name, project, source, format };
    let mut stream = Site::open(&options)?.imaging.post_streaming("/v1/images", &request).await?;
    let bar = match options.output {
        Format::Table => ProgressBar::new(0),
        Format::Json => ProgressBar::hidden(),
    };
    bar.set_style(ProgressStyle::with_template("importing {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")?);
    let mut lines = Vec::new();
    while let Some(chunk) = stream.chunk().await? {
        lines.extend_from_slice(&chunk);
        while let Some(end) = lines.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = lines.drain(..=end).collect();
            match serde_json::from_slice(&line)? {
                ImportStatus::Copying { done_bytes, total_bytes } => {
                    bar.set_length(total_bytes);
                    bar.set_position(done_bytes);
                }
                ImportStatus::Done { image } => {
                    bar.finish_and_clear();
                    return output::done(options.output, &format!("image {} imported", image.name), &image);
                }
                ImportStatus::Failed { detail } => return Err(format!("importing {}: {detail}", request.name).into()),
            }
        }
    }
    Err(format!("importing {}: imaging closed the connection before it was done; ask `assay image list`", request.name)
        .into())
}
