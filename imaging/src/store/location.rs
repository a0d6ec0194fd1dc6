//! What an export order says of where its disk is: enough for a gateway to open it, and to see that it is the right one.

use super::merkle::Hash;
use assay_rbd::ParentImage;
use assay_rbd::name::{CephKey, CephUser, ImageName, Namespace, PoolName};
use assay_wire::id::ImageKey;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A disk: what its node wrote, over a golden image that lies on the gateway's host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLocation {
    /// The golden image at the bottom.
    pub golden: ImageKey,
    /// The root of its hash tree, as it is on record: no file of the host's is believed to say that.
    pub root: Hash,
    /// What is above it.
    pub upper: Upper,
}

/// Where a node's writes go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Upper {
    /// To files of the local store that the gateway is configured with.
    Files,
    /// To Ceph.
    Rbd(Box<RbdClone>),
}

/// A clone on Ceph, and the one key that opens it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RbdClone {
    /// The monitors, by their messenger v2 addresses.
    pub monitors: Vec<SocketAddr>,
    /// A user of this admission's own.
    pub user: CephUser,
    /// Its key.
    pub key: CephKey,
    /// The clone's pool.
    pub pool: PoolName,
    /// The clone's namespace.
    pub namespace: Namespace,
    /// The clone.
    pub image: ImageName,
    /// Images that it reads what it has not from: its parent first, the golden image last.
    pub layers: Vec<ParentImage>,
    /// Size of the disk in octets.
    pub byte_len: u64,
}
