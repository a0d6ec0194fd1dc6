//! TPM 2.0 without a TPM: the structures that travel, the names of objects, and secrets for one TPM only.
//!
//! On the boot path: the verifier parses what agents send ([`public`], [`attest`], [`signature`]) and makes the
//! enrolment credential ([`credential`]); imaging seals a node's grant ([`seal`]) and the agent opens it.
//!
//! Every parser reads the whole input: a structure with a byte left over is refused, because what a TPM signed or
//! named is exactly one structure. Nothing is allocated by the input's say-so. A parsed structure is *not* vouched for:
//! a [`public::Public`] is whatever was sent, and an [`attest::Quote`] counts only after its signature was checked.

pub mod algorithm;
pub mod attest;
pub mod name;
pub mod public;
pub mod reader;
pub mod seal;
pub mod signature;
mod spki;

#[cfg(feature = "make-credential")]
pub mod credential;
#[cfg(feature = "make-credential")]
mod kdf;

#[cfg(all(feature = "testing", feature = "make-credential"))]
pub mod soft_keys;
#[cfg(feature = "testing")]
pub mod testing;
