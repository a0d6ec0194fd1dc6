//! End-to-end tests: real firmware, switch, TPMs and services. Each plays a scenario by the `qemu-lab` program, which
//! enters namespaces of its own, and looks at the events that it left; one scenario may be looked at by several tests.

mod attacks;
mod attestation;
mod boot_path;
mod ceph;
mod clients;
mod deployments;
mod hardware;
mod play;
