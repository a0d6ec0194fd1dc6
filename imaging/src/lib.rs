//! Imaging: golden image, clone, iSCSI export.

pub mod store;
