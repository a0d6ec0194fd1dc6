//! `assay disk` and `export`.

use super::output::{self, Row};
use super::{BoxError, Options, Site};
use assay_wire::id::{ImageId, LeaseId, ProjectId};
use assay_wire::imaging::{
    Disk, DiskOutcome, DisksAnswer, DisksRequest, Export, Image, Latency, NewDisk, RestoreRequest, SnapshotRequest,
};
use clap::{Args, Subcommand};
use std::str::FromStr;

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// List disks
    List(Options),
    /// Make disks of an image, one for each lease, however many at once
    Create(CreateArguments),
    /// Delete a lease's disk and all that its node wrote
    Delete(LeaseArguments),
    /// Make an image of what a disk holds now; a node that runs from it waits for a moment
    Snapshot(SnapshotArguments),
    /// Make a disk hold what an image holds; what its node wrote since goes
    Restore(RestoreArguments),
    /// Give a disk, with all that was written to it, to another lease and node
    Move(MoveArguments),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExportCommand {
    /// List exports and their sessions
    List(Options),
}

#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// The image
    image: ImageId,
    /// The project that has the leases
    #[arg(long)]
    project: ProjectId,
    /// A lease and its node, and the MAC address that the node asks for its address with
    #[arg(required = true, value_name = "LEASE=NODE[=MAC]")]
    disks: Vec<Wanted>,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct LeaseArguments {
    /// The lease
    lease: LeaseId,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotArguments {
    /// The lease whose disk it is
    lease: LeaseId,
    /// The new image's name
    name: ImageId,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArguments {
    /// The lease whose disk it is
    lease: LeaseId,
    /// The image
    image: ImageId,
    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct MoveArguments {
    /// The lease that has it
    lease: LeaseId,
    /// The lease and the node that get it
    #[arg(value_name = "LEASE=NODE[=MAC]")]
    to: Wanted,
    #[command(flatten)]
    options: Options,
}

/// `LEASE=NODE[=MAC]`.
#[derive(Debug, Clone)]
pub(crate) struct Wanted(NewDisk);

impl FromStr for Wanted {
    type Err = BoxError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.splitn(3, '=');
        let lease = parts.next().unwrap_or_default().parse()?;
        let node = parts.next().ok_or("no node: write LEASE=NODE")?.parse()?;
        Ok(Self(NewDisk { lease, node, mac: parts.next().map(str::parse).transpose()? }))
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

pub(crate) async fn run_disk(command: DiskCommand) -> Result<(), BoxError> {
    match command {
        DiskCommand::List(options) => {
            let disks: Vec<Disk> = Site::open(&options)?.imaging.get("/v1/disks").await?;
            output::list(options.output, &disks)
        }
        DiskCommand::Create(arguments) => create(arguments).await,
        DiskCommand::Delete(LeaseArguments { lease, options }) => {
            let () = Site::open(&options)?.imaging.delete(&format!("/v1/disks/{lease}"), &()).await?;
            output::done(options.output, &format!("the disk of lease {lease} is deleted"), &())
        }
        DiskCommand::Snapshot(arguments) => snapshot(arguments).await,
        DiskCommand::Restore(RestoreArguments { lease, image, options }) => {
            let (path, request) = (format!("/v1/disks/{lease}/restore"), RestoreRequest { image });
            let disk: Disk = Site::open(&options)?.imaging.post(&path, &request).await?;
            output::done(options.output, &format!("the disk of lease {lease} holds {} again", disk.image), &disk)
        }
        DiskCommand::Move(MoveArguments { lease, to: Wanted(to), options }) => {
            let disk: Disk = Site::open(&options)?.imaging.post(&format!("/v1/disks/{lease}/move"), &to).await?;
            let sentence = format!("the disk of lease {lease} is lease {}'s, for node {}", disk.lease, disk.node);
            output::done(options.output, &sentence, &disk)
        }
    }
}

pub(crate) async fn snapshot(arguments: SnapshotArguments) -> Result<(), BoxError> {
    let SnapshotArguments { lease, name, options } = arguments;
    let (path, request) = (format!("/v1/disks/{lease}/snapshot"), SnapshotRequest { name });
    let image: Image = Site::open(&options)?.imaging.post(&path, &request).await?;
    output::done(options.output, &format!("image {} holds what the disk of lease {lease} does", image.name), &image)
}

async fn create(arguments: CreateArguments) -> Result<(), BoxError> {
    let CreateArguments { image, project, disks, options } = arguments;
    let request = DisksRequest { project, image, disks: disks.into_iter().map(|Wanted(disk)| disk).collect() };
    let answer: DisksAnswer = Site::open(&options)?.imaging.post("/v1/disks", &request).await?;
    let (mut made, mut failed) = (Vec::new(), Vec::new());
    for outcome in answer.outcomes {
        match outcome {
            DiskOutcome::Made { disk } => made.push(disk),
            DiskOutcome::Failed { lease, problem } => failed.push(format!("lease {lease}: {}", problem.detail)),
        }
    }
    output::list(options.output, &made)?;
    match failed.len() {
        0 => Ok(()),
        count => Err(format!("{count} disks were not made: {}", failed.join("; ")).into()),
    }
}

pub(crate) async fn run_export(ExportCommand::List(options): ExportCommand) -> Result<(), BoxError> {
    let exports: Vec<Export> = Site::open(&options)?.imaging.get("/v1/exports").await?;
    output::list(options.output, &exports)
}
