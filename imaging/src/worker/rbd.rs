//! A disk on Ceph as a worker has it: the golden image's file, and channels to the companion that has the clone.

use super::disk::DiskError;
use crate::rbd_disk::client::Channels;
use crate::store::golden::{GoldenFiles, GoldenImage};
use assay_rbd::CloneDisk;
use assay_service::error::chain;
use std::io;
use std::os::fd::OwnedFd;

/// Asks the companion which objects are the clone's own.
pub(super) fn open(
    clone: String,
    object_bytes: u64,
    channels: Vec<OwnedFd>,
    golden: GoldenFiles,
) -> Result<CloneDisk<GoldenImage, Channels>, DiskError> {
    let channels = Channels::new(clone, golden.byte_len, channels, gone);
    let own = channels.own_objects(object_bytes)?;
    Ok(CloneDisk::new(channels, GoldenImage::from_files(golden)?, own)?)
}

/// The worker ends, and its supervisor starts both anew. Nobody hears of an error: an initiator that is cut off asks again.
fn gone(clone: &str, error: &io::Error) -> ! {
    tracing::error!(event = "worker.alone", clone, cause = chain(error), "the companion is gone");
    std::process::exit(1)
}
