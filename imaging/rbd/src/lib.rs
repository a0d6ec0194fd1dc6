//! Ceph RBD for imaging: images, clones across namespaces, and keys that open one clone and nothing else.
//!
//! librbd and librados are loaded when first used (`src/ffi`, the one place in Assay with `unsafe`), so that the binary
//! runs where there is no Ceph. Everything here blocks; callers in async code use `spawn_blocking`.

mod cluster;
mod disk;
mod error;
mod ffi;
mod header;
mod image;
pub mod keys;
pub mod name;
mod ownership;
pub mod runs;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use cluster::{Cluster, Connection, DEFAULT_OBJECT_ORDER, ImageLink, Patience, Pool};
pub use disk::{CloneDisk, CloneObjects, GoldenFile, OpenClone};
pub use error::RbdError;
pub use image::{Image, ParentImage};
pub use ownership::OwnObjects;

/// Loads Ceph's libraries now, rather than when they are first needed: for whoever will not be allowed to then.
///
/// # Errors
/// They are not installed, or too old.
pub fn load() -> Result<(), RbdError> {
    ffi::load()
}
