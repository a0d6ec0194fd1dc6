//! Imaging: golden image → clone → iSCSI export; and the gateway that serves the exports on a project's provisioning
//! network.
//!
//! ```text
//! store     golden images and clones, as files
//! db        what is on record
//! catalogue images: records and store, kept in step
//! export    step 7 of the boot path: attestation result → export, in phases that can be undone
//! tree      images from root file systems: folders, tar files, OCI layers
//! uploads   files on their way to become images
//! api       HTTP, for operators, projects and the verifier
//! gateway   a process of its own: iSCSI portal, relay to the verifier, orders from imaging
//! worker    a process for each export: parses what its node sends
//! rbd_disk  a process beside each worker whose disk is on Ceph; rbd_disks starts them
//! ```
//!
//! Imaging never asks who a node is, only whether an attestation result that it verified itself says so.

mod address;
pub mod api;
mod catalogue;
pub mod config;
mod db;
mod export;
pub mod gateway;
mod gateways;
mod lock;
pub mod rbd_disk;
pub mod rbd_disks;
mod renewal;
mod secret;
mod service;
pub mod store;
pub mod tree;
mod uploads;
pub mod worker;

pub use api::openapi;
pub use config::Config;
pub use gateway::file::{ExportFileError, ExportedFile, FileExport, export_file};
pub use gateway::{Gateway, GatewayConfig, GatewayError, RelayConfig};
pub use secret::SecretKeyError;
pub use service::{Imaging, RunError, run};
pub use uploads::UploadError;
