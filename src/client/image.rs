//! `assay image`.

use super::disk::{self, SnapshotArguments};
use super::image_upload;
use super::output::{self, Format, Row};
use super::{BoxError, Options, Site};
use assay_wire::id::{ImageId, ProjectId};
use assay_wire::imaging::{
    CopyRequest, Image, ImageChange, ImageDetail, ImageFormat, ImportRequest, ImportSource, ImportStatus, SourceFormat,
};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Import a golden image from a disk or a root file system on the imaging host; one that was broken off goes on
    Import(ImportArguments),
    /// Export an image to a raw or qcow2 file here; one that was broken off goes on
    Export(super::image_export::ExportArguments),
    /// List the images that you may use
    List(Options),
    /// Show an image, where it came from and what was made of it
    Show(ImageArguments),
    /// Make a golden image of the same content
    Copy(CopyArguments),
    /// Give an image to another project
    Move(MoveArguments),
    /// Let other projects make disks of an image, or no more
    Share(ShareArguments),
    /// Make an image of what a disk holds now; a node that runs from it waits for a moment
    Snapshot(SnapshotArguments),
    /// Make a snapshot a golden image of its own
    Flatten(ImageArguments),
    /// Rename an image
    Rename(RenameArguments),
    /// Add tags to an image, or take them away
    Tag(TagArguments),
    /// Delete an image that nothing was made of
    Delete(ImageArguments),
    /// Check every block of an image, and have it at hand before nodes boot from it
    Prepare(ImageArguments),
}

#[derive(Debug, Args)]
pub(crate) struct ImportArguments {
    /// The new image's name
    name: ImageId,
    /// The file or folder, below one of imaging's import folders; with `--upload`, a file of this machine
    source: PathBuf,
    /// The project that will own it
    #[arg(long)]
    project: ProjectId,
    /// What it is; default: by its ending, and a folder if it is one on this machine
    #[arg(long, value_enum)]
    format: Option<SourceArgument>,
    /// Upload the file; an upload that was broken off goes on
    #[arg(long)]
    upload: bool,
    /// SHA-256 that the file must have; of an OCI layout, that of its manifest
    #[arg(long)]
    sha256: Option<String>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct ImageArguments {
    /// The image
    image: ImageId,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct CopyArguments {
    /// The image
    image: ImageId,
    /// The new image's name
    name: ImageId,
    /// The project that will own it; it must be one that may use the image
    #[arg(long)]
    project: ProjectId,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct MoveArguments {
    /// The image
    image: ImageId,
    /// Its new owner
    project: ProjectId,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("who").required(true).multiple(true)))]
pub(crate) struct ShareArguments {
    /// The image
    image: ImageId,
    /// Projects that may make disks of it
    #[arg(long = "with", group = "who")]
    with: Vec<ProjectId>,
    /// Projects that may no more; what they have made stays
    #[arg(long, group = "who")]
    revoke: Vec<ProjectId>,
    /// Every project may
    #[arg(long, group = "who", conflicts_with = "private")]
    public: bool,
    /// Only its owner and the projects that it is shared with
    #[arg(long, group = "who")]
    private: bool,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct RenameArguments {
    /// The image
    image: ImageId,
    /// Its new name
    name: ImageId,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct TagArguments {
    /// The image
    image: ImageId,
    /// Tags to add
    tags: Vec<String>,
    /// Tags to take away
    #[arg(long)]
    remove: Vec<String>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(super) enum FormatArgument {
    Raw,
    Qcow2,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum SourceArgument {
    Raw,
    Qcow2,
    Tar,
    Folder,
    Oci,
}

impl SourceArgument {
    /// What was said; or what the file's ending says.
    fn of(said: Option<Self>, source: &Path) -> SourceFormat {
        let name = source.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        match said {
            Some(Self::Raw) => SourceFormat::Raw,
            Some(Self::Qcow2) => SourceFormat::Qcow2,
            Some(Self::Tar) => SourceFormat::Tar,
            Some(Self::Folder) => SourceFormat::Folder,
            Some(Self::Oci) => SourceFormat::Oci,
            None if source.join("oci-layout").is_file() => SourceFormat::Oci,
            None if source.is_dir() => SourceFormat::Folder,
            None if [".tar", ".tar.gz", ".tgz"].iter().any(|ending| name.ends_with(ending)) => SourceFormat::Tar,
            None => FormatArgument::of(None, source).into(),
        }
    }
}

impl FormatArgument {
    /// What was said; or what the file's ending says.
    pub(super) fn of(said: Option<Self>, file: &Path) -> ImageFormat {
        match said {
            Some(Self::Raw) => ImageFormat::Raw,
            Some(Self::Qcow2) => ImageFormat::Qcow2,
            None if file.extension().is_some_and(|ending| ending == "qcow2") => ImageFormat::Qcow2,
            None => ImageFormat::Raw,
        }
    }
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

pub(crate) async fn run_image(command: ImageCommand) -> Result<(), BoxError> {
    match command {
        ImageCommand::Import(arguments) => import(arguments).await,
        ImageCommand::Export(arguments) => super::image_export::run(arguments).await,
        ImageCommand::List(options) => {
            let images: Vec<Image> = Site::open(&options)?.imaging.get("/v1/images").await?;
            output::list(options.output, &images)
        }
        ImageCommand::Show(arguments) => show(arguments).await,
        ImageCommand::Copy(CopyArguments { image, name, project, options }) => {
            let request = CopyRequest { name, project };
            work(&options, "copying", &format!("/v1/images/{image}/copy"), &request).await
        }
        ImageCommand::Move(MoveArguments { image, project, options }) => {
            change(&image, &options, ImageChange { project: Some(project), ..ImageChange::default() }).await
        }
        ImageCommand::Share(ShareArguments { image, with, revoke, public, private, options }) => {
            let public = (public || private).then_some(public);
            let (share_with, unshare_with) = (with.into_iter().collect(), revoke.into_iter().collect());
            change(&image, &options, ImageChange { public, share_with, unshare_with, ..ImageChange::default() }).await
        }
        ImageCommand::Snapshot(arguments) => disk::snapshot(arguments).await,
        ImageCommand::Flatten(ImageArguments { image, options }) => {
            work(&options, "flattening", &format!("/v1/images/{image}/flatten"), &()).await
        }
        ImageCommand::Rename(RenameArguments { image, name, options }) => {
            change(&image, &options, ImageChange { name: Some(name), ..ImageChange::default() }).await
        }
        ImageCommand::Tag(TagArguments { image, tags, remove, options }) => {
            let (add_tags, remove_tags) = (tags.into_iter().collect(), remove.into_iter().collect());
            change(&image, &options, ImageChange { add_tags, remove_tags, ..ImageChange::default() }).await
        }
        ImageCommand::Delete(ImageArguments { image, options }) => {
            let () = Site::open(&options)?.imaging.delete(&format!("/v1/images/{image}"), &()).await?;
            output::done(options.output, &format!("image {image} is deleted"), &())
        }
        ImageCommand::Prepare(ImageArguments { image, options }) => {
            work(&options, "preparing", &format!("/v1/images/{image}/prepare"), &()).await
        }
    }
}

async fn change(image: &ImageId, options: &Options, change: ImageChange) -> Result<(), BoxError> {
    let now: Image = Site::open(options)?.imaging.patch(&format!("/v1/images/{image}"), &change).await?;
    output::one(options.output, &now)
}

async fn show(arguments: ImageArguments) -> Result<(), BoxError> {
    let ImageArguments { image, options } = arguments;
    let detail: ImageDetail = Site::open(&options)?.imaging.get(&format!("/v1/images/{image}")).await?;
    if let Format::Json = options.output {
        return output::json(&detail);
    }
    output::one(options.output, &detail.image)?;
    let Image { key, root, shared_with, public, tags, provenance, .. } = &detail.image;
    let joined = |words: &mut dyn Iterator<Item = String>| match words.collect::<Vec<_>>() {
        words if words.is_empty() => "–".to_owned(),
        words => words.join(", "),
    };
    let shared =
        if *public { "every project".to_owned() } else { joined(&mut shared_with.iter().map(ToString::to_string)) };
    let some = |text: Option<String>| text.unwrap_or_else(|| "–".to_owned());
    for (what, is) in [
        ("key", key.to_string()),
        ("tree root", some(root.clone())),
        ("shared with", shared),
        ("tags", joined(&mut tags.iter().cloned())),
        ("made from", provenance.source.clone()),
        ("its SHA-256", some(provenance.source_sha256.clone())),
        ("parent", some(provenance.parent.map(|parent| parent.to_string()))),
        ("made by", provenance.made_by.clone()),
        ("read by", joined(&mut detail.dependents.iter().cloned())),
    ] {
        output::line(&format!("{what:>12}  {}", output::one_line(&is)))?;
    }
    Ok(())
}

async fn import(arguments: ImportArguments) -> Result<(), BoxError> {
    let ImportArguments { name, source, project, format, upload, sha256, options } = arguments;
    let format = SourceArgument::of(format, &source);
    let source = if upload {
        let site = Site::open(&options)?;
        let upload = image_upload::upload(&site, &source, &project, sha256.as_deref(), options.output).await?;
        ImportSource::Upload(upload)
    } else {
        ImportSource::Path(std::path::absolute(&source)?.to_string_lossy().into_owned())
    };
    let request = ImportRequest { name, project, source, format, sha256 };
    work(&options, "importing", "/v1/images", &request).await
}

/// Asks for long work on an image, and shows how far it has come.
async fn work(
    options: &Options,
    doing: &'static str,
    path: &str,
    request: &(impl Serialize + Sync),
) -> Result<(), BoxError> {
    let mut stream = Site::open(options)?.imaging.post_streaming(path, request).await?;
    let bar = match options.output {
        Format::Table => ProgressBar::new(0),
        Format::Json => ProgressBar::hidden(),
    };
    let template = "{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    bar.set_style(ProgressStyle::with_template(template)?);
    bar.set_message(doing);
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
                    return output::done(options.output, &format!("{doing} is done: image {}", image.name), &image);
                }
                ImportStatus::Failed { detail, hint } => {
                    let hint = hint.map_or_else(String::new, |hint| format!(" (try: {hint})"));
                    return Err(format!("{doing}: {detail}{hint}").into());
                }
            }
        }
    }
    Err(format!("{doing}: imaging closed the connection before it was done; ask for the same again to go on").into())
}
