//! Against a real Ceph, one for all of these tests.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test stops where it fails; its numbers are small"
)]

mod disk;
mod images;
mod keys;
mod restart;
mod site;
mod store;
