//! Imaging's API: golden images, disks, exports, gateways.

use crate::agent::{SealedGrant, TenantAddress};
use crate::id::{AdmissionId, DiskId, ImageId, ImageKey, LeaseId, NodeId, ProjectId, UploadId};
use crate::net::{Iqn, MacAddr};
use crate::problem::Problem;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};

/// An image: `GET /v1/images`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Image {
    /// Its name.
    pub name: ImageId,
    /// What it is to the store, whatever it comes to be called.
    pub key: ImageKey,
    /// The project that owns it.
    pub project: ProjectId,
    /// How it is kept.
    pub kind: ImageKind,
    /// How far it has come. Only a ready image can be used.
    pub state: ImageState,
    /// Size of the disk that a node sees, in octets; a multiple of 512.
    pub virtual_bytes: u64,
    /// Octets that are not zero; of a snapshot, those that it takes beside its parent's.
    pub data_bytes: u64,
    /// SHA-256 of the whole raw disk, hexadecimal; of golden images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Root of the hash tree that each block is checked against, hexadecimal; of golden images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// The projects that may make disks of it, beside its owner.
    pub shared_with: BTreeSet<ProjectId>,
    /// Whether every project may.
    pub public: bool,
    /// Words to find it by.
    pub tags: BTreeSet<String>,
    /// Where it came from.
    pub provenance: Provenance,
}

/// Where an image came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Provenance {
    /// What it was made from: a file, an upload, a disk, another image.
    pub source: String,
    /// SHA-256 of that, as it was handed over, hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_sha256: Option<String>,
    /// The image that its disk was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ImageKey>,
    /// The token that asked for it.
    pub made_by: String,
    /// When: milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

/// How an image is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageKind {
    /// By itself, read-only, each block checked.
    Golden,
    /// As what a disk wrote over the image that it was made from.
    Snapshot,
}

/// How far an image has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageState {
    /// Being made, or broken off: asking for the same again goes on with it.
    Importing,
    /// There.
    Ready,
    /// Going.
    Deleting,
}

/// `POST /v1/images`: import from a file or folder on the imaging host. Answers with an [`ImportStatus`] stream
/// (`application/x-ndjson`), the last of which is `done` or `failed`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// The new image's name.
    pub name: ImageId,
    /// The project that will own it.
    pub project: ProjectId,
    /// From where.
    pub source: ImportSource,
    /// What it is.
    pub format: SourceFormat,
    /// SHA-256 that the file must have, hexadecimal; of an OCI layout, that of its manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// `PATCH /v1/images/{image}`: what is given changes, the rest stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ImageChange {
    /// Its new name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<ImageId>,
    /// Its new owner; an operator's to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project: Option<ProjectId>,
    /// Whether every project may make disks of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public: Option<bool>,
    /// Projects that may make disks of it from now on.
    pub share_with: BTreeSet<ProjectId>,
    /// Projects that may no more. What they have made stays.
    pub unshare_with: BTreeSet<ProjectId>,
    /// Tags to add: 1 to 64 printable characters each.
    pub add_tags: BTreeSet<String>,
    /// Tags to take away.
    pub remove_tags: BTreeSet<String>,
}

/// `GET /v1/images/{image}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageDetail {
    /// The image.
    #[serde(flatten)]
    pub image: Image,
    /// What the caller sees that was made of it, and keeps it from being deleted, in words.
    pub dependents: Vec<String>,
}

/// Query of `GET /v1/images/{image}/content`: which file, from which octet on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exporting {
    /// The file's format.
    pub format: ImageFormat,
    /// How much of it is there already.
    #[serde(default)]
    pub offset: u64,
}

/// `POST /v1/images/{image}/copy`: a golden image of the same content. Answers with an [`ImportStatus`] stream.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CopyRequest {
    /// The new image's name.
    pub name: ImageId,
    /// The project that will own it; it must be one that may use the image.
    pub project: ProjectId,
}

/// Where an image is imported from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ImportSource {
    /// A path on the imaging host, below one of the configured import folders; an operator's to say.
    Path(String),
    /// A file that the new image's project has uploaded. It goes once it is imported.
    Upload(UploadId),
}

/// `POST /v1/uploads`: a file comes in pieces of at most 4 MiB, `PUT /v1/uploads/{upload}?offset=`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UploadRequest {
    /// The project that it is for.
    pub project: ProjectId,
    /// How large it is, in octets.
    pub bytes: u64,
    /// SHA-256 of all of it, hexadecimal.
    pub sha256: String,
}

/// A file on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Upload {
    /// Its id.
    pub id: UploadId,
    /// The project that it is for.
    pub project: ProjectId,
    /// How large it will be, in octets.
    pub bytes: u64,
    /// SHA-256 that it must have, hexadecimal.
    pub sha256: String,
    /// How much of it has come: the next piece begins here or later.
    pub received: u64,
}

/// Query of `PUT /v1/uploads/{upload}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PieceOffset {
    /// Where the piece goes.
    pub offset: u64,
}

/// What an image can be imported from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SourceFormat {
    /// A disk: plain octets.
    Raw,
    /// A disk: QEMU copy-on-write 2, without backing file or data file.
    Qcow2,
    /// A root file system: a tar file, compressed with gzip or not. It becomes an ext4 file system.
    Tar,
    /// A root file system: a folder, likewise.
    Folder,
    /// A root file system: an OCI image layout with one image for the imaging host's architecture, likewise.
    Oci,
}

impl From<ImageFormat> for SourceFormat {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
        }
    }
}

/// Format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// Plain octets.
    Raw,
    /// QEMU copy-on-write 2, without backing file or data file.
    Qcow2,
}

/// How far an import, a copy, a flattening or a preparation has come.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "import", rename_all = "kebab-case")]
pub enum ImportStatus {
    /// Under way.
    Copying {
        /// Octets of the virtual disk done.
        done_bytes: u64,
        /// All of them.
        total_bytes: u64,
    },
    /// Complete and on record.
    Done {
        /// The image.
        image: Box<Image>,
    },
    /// What could be gone on with was kept, under the image's name.
    Failed {
        /// Why.
        detail: String,
        /// What to do next, where there is something to do.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

/// `PUT /v1/disks/{lease}`: the disk that a lease's node will get. No data is copied and nothing is exported.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskRequest {
    /// The lessee. The image must be its own, shared with it, or public.
    pub project: ProjectId,
    /// The node.
    pub node: NodeId,
    /// The golden image to clone.
    pub image: ImageId,
    /// The NIC that asks for its address by DHCP on the project's provisioning network, like `52:54:00:12:34:56`. While
    /// the disk is exported, the gateway gives it the address that the export has. Without one, the node has that
    /// address by what the agent configured, and DHCP there does not answer it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// At most so many disks are made in one call.
pub const MAX_NEW_DISKS: usize = 256;

/// `POST /v1/disks`: disks for several leases of one project, of one image.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DisksRequest {
    /// The lessee.
    pub project: ProjectId,
    /// The image; it must be the project's, shared with it, or public.
    pub image: ImageId,
    /// The leases and their nodes; at most 256.
    pub disks: Vec<NewDisk>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewDisk {
    /// The lease.
    pub lease: LeaseId,
    /// The node.
    pub node: NodeId,
    /// As in [`DiskRequest::mac`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// The answer: each lease has its disk, or is told why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DisksAnswer {
    /// In the order of the request.
    pub outcomes: Vec<DiskOutcome>,
}

/// What became of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum DiskOutcome {
    /// The lease has this disk.
    Made {
        /// The disk.
        disk: Disk,
    },
    /// It has not.
    Failed {
        /// The lease.
        lease: LeaseId,
        /// Why.
        problem: Problem,
    },
}

/// `POST /v1/disks/{lease}/snapshot`: an image of what the disk holds.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The new image's name; it is the disk's project's.
    pub name: ImageId,
}

/// `POST /v1/disks/{lease}/restore`: the disk comes to hold what an image holds.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// The image.
    pub image: ImageId,
}

/// A disk: `GET /v1/disks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Disk {
    /// Its id.
    pub id: DiskId,
    /// The lease that it belongs to; deleted with it.
    pub lease: LeaseId,
    /// The lessee.
    pub project: ProjectId,
    /// The node that it is for.
    pub node: NodeId,
    /// Its golden image.
    pub image: ImageId,
    /// Octets written by the node so far.
    pub written_bytes: u64,
}

/// `POST /v1/exports`: a signed attestation result asks for the export of its lease's disk. Idempotent by the
/// result's id.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    /// The result, as [`crate::result`] describes it.
    pub result: String,
    /// Results of other verifiers, as in [`crate::isolation::AdmissionRequest::supporting`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supporting: Vec<String>,
}

/// The answer: where the node will live, and a grant that only its TPM can open.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExportAnswer {
    /// The admission that the export is born of.
    pub admission: AdmissionId,
    /// The node's place on the provisioning network.
    pub address: TenantAddress,
    /// For the node.
    pub grant: SealedGrant,
}

/// An export on record: `GET /v1/exports`.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Export {
    /// The admission that it is born of.
    pub admission: AdmissionId,
    /// The lease.
    pub lease: LeaseId,
    /// The node.
    pub node: NodeId,
    /// The disk.
    pub disk: DiskId,
    /// The target's name.
    pub target: Iqn,
    /// The one initiator that it accepts.
    pub initiator: Iqn,
    /// Until then: milliseconds since the Unix epoch.
    pub expires_at_ms: i64,
    /// Sessions logged in now, as its gateway last said; like all that follows.
    pub sessions: u32,
    /// Octets read since its process was started.
    pub read_bytes: u64,
    /// Octets written.
    pub written_bytes: u64,
    /// How long reads took at the target.
    pub reads: Latency,
    /// How long writes took.
    pub writes: Latency,
}

/// How long operations took, from a command to its answer, in microseconds: upper bounds, at most a quarter too high.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Half of them took no longer.
    pub p50_us: u64,
    /// All but one in a hundred took no longer.
    pub p99_us: u64,
}

/// A project's gateway on its provisioning network: `POST /v1/gateways`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Gateway {
    /// The project it serves: one gateway a project. Projects that share one each have a record of it, with the same
    /// control socket and all else.
    pub project: ProjectId,
    /// Path of the Unix socket on which `assay gateway serve` takes orders.
    pub control_socket: String,
    /// The iSCSI portal.
    #[schema(value_type = String)]
    pub portal: SocketAddrV4,
    /// The relay to the verifier's agent API.
    #[schema(value_type = String)]
    pub relay: SocketAddrV4,
    /// The addresses that nodes get: this subnet's hosts from `.50` on, without the gateway's own.
    #[schema(value_type = String)]
    pub subnet: Ipv4Net,
    /// Default router for nodes, if the network has one.
    #[schema(value_type = Option<String>)]
    pub router: Option<Ipv4Addr>,
    /// How initiators prove that they know their secret, on exports that are put up from now on. Each project's own to
    /// say, on a shared gateway too.
    #[serde(default)]
    pub chap: ChapAlgorithms,
}

/// Which CHAP algorithms an export takes; the strongest that its initiator offers is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ChapAlgorithms {
    /// MD5, too: iPXE, QEMU and open-iscsi as Debian configures it offer nothing else.
    #[default]
    Any,
    /// SHA-256 only.
    Sha256,
}
