//! The ramdisk agent: the first code of ours that runs on a node, and the build of the image that it lives in.
//!
//! On the boot path it stands between iPXE and the tenant's kernel. It brings a NIC up ([`dhcp`], [`network`]),
//! measures its settings ([`settings`]), proves to the verifier what booted ([`session`] over [`client`], with the TPM
//! behind [`tpm`], and [`tee`] beside it), waits for the release, opens the grant and hands the machine over to the tenant's kernel
//! ([`handover`]). There, started by the tenant's init, the same program goes on proving what runs ([`attestation`]). [`run`] puts those steps in order; [`init`] is what PID 1 of the ramdisk needs around them.
//!
//! Nothing that the airlock network says is believed: settings are measured before use, the verifier's key is pinned,
//! and a lie by anybody shows up as a refused verdict.
//!
//! [`image`] is the other half: it builds the UKI from Debian's kernel and this agent, reproducibly, and computes the
//! Reference Values that firmware and systemd-stub will measure when it boots.

pub mod attestation;
pub mod backoff;
pub mod client;
pub mod console;
pub mod cpio;
pub mod dhcp;
pub mod fetch;
pub mod handover;
pub mod ima;
pub mod image;
pub mod init;
pub mod network;
pub mod pin;
pub mod run;
pub mod session;
pub mod settings;
pub mod tee;
pub mod tpm;
