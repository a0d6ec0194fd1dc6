//! The lab: real firmware, a real switch, real (software) TPMs and the real services, on one machine, for `make lab` and
//! for the end-to-end tests. Everything runs inside namespaces of the lab's own and dies with it.

pub mod bmc;
pub mod ceph;
pub mod command;
pub mod console;
pub mod error;
pub mod events;
pub mod fleet;
pub mod frames;
pub mod image;
pub mod machine;
pub mod netns;
pub mod probe;
pub mod qmp;
pub mod ramdisk;
pub mod sandbox;
pub mod scenario;
pub mod services;
pub mod site;
pub mod steps;
pub mod topology;
pub mod tpm;
