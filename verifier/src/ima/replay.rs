//! Replay: what the kernel extended for each entry, extended again. This is the hot path: two digests and an extension
//! an entry.

use super::{Entry, TemplateData, digest};
use assay_tpm::algorithm::HashAlgorithm;
use openssl::sha::{Sha384, Sha512};

/// How the kernel makes what it extends into a bank other than SHA-1's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// The template data hashed with the bank's algorithm: Linux 5.8 and later.
    Rehashed,
    /// The SHA-1 template digest filled with zeros: older kernels. Only SHA-1 vouches for the list then.
    ZeroPaddedSha1,
}

/// PCR 10 of one bank while a list is replayed.
#[derive(Debug, Clone)]
pub struct Replay {
    bank: HashAlgorithm,
    extension: Extension,
    value: Octets,
}

impl Replay {
    /// PCR 10 as the machine's reset left it.
    #[must_use]
    pub fn start(bank: HashAlgorithm, extension: Extension) -> Self {
        Self { bank, extension, value: Octets { octets: [0; 64], len: bank.digest_bytes() } }
    }

    /// PCR 10 of the SHA-256 bank from a known value on.
    #[must_use]
    pub fn resume(value: &[u8; 32], extension: Extension) -> Self {
        Self { bank: HashAlgorithm::Sha256, extension, value: Octets::from(value) }
    }

    /// Extends what the kernel extended for `entry`.
    #[inline]
    pub fn extend(&mut self, entry: &Entry<'_>) {
        let digest = self.extended(entry);
        let (value, len) = (self.value.as_slice(), self.bank.digest_bytes());
        let mut joined = [0; 128];
        joined[..len].copy_from_slice(value);
        joined[len..2 * len].copy_from_slice(digest.as_slice());
        self.value = hash(self.bank, &joined[..2 * len]);
    }

    /// The value now.
    #[must_use]
    pub fn value(&self) -> &[u8] {
        self.value.as_slice()
    }

    /// What the kernel extended for `entry`.
    #[inline]
    fn extended(&self, entry: &Entry<'_>) -> Octets {
        if entry.is_violation() {
            return Octets { octets: [0xff; 64], len: self.bank.digest_bytes() };
        }
        match self.extension {
            Extension::Rehashed => template_digest(entry, self.bank),
            Extension::ZeroPaddedSha1 => {
                let mut padded = Octets { octets: [0; 64], len: self.bank.digest_bytes() };
                let digest = &entry.template_digest[..entry.template_digest.len().min(padded.len)];
                padded.octets[..digest.len()].copy_from_slice(digest);
                padded
            }
        }
    }
}

/// What the kernel extends into the SHA-256 bank for `entry`.
pub(super) fn sha256_extension(entry: &Entry<'_>) -> [u8; 32] {
    let extended = Replay::start(HashAlgorithm::Sha256, Extension::Rehashed).extended(entry);
    let mut digest = [0; 32];
    digest.copy_from_slice(extended.as_slice());
    digest
}

/// The digest of the entry's template data.
#[inline]
pub(super) fn template_digest(entry: &Entry<'_>, algorithm: HashAlgorithm) -> Octets {
    match entry.data {
        TemplateData::Sized(data) => hash(algorithm, data),
        TemplateData::Legacy { digest, name } => {
            let zeros = &[0; LEGACY_NAME_BYTES][name.len().min(LEGACY_NAME_BYTES)..];
            hash(algorithm, &[digest, name, zeros].concat())
        }
    }
}

/// A digest of any algorithm, not on the heap.
#[derive(Debug, Clone, Copy)]
pub(super) struct Octets {
    octets: [u8; 64],
    len: usize,
}

impl Octets {
    pub(super) fn as_slice(&self) -> &[u8] {
        &self.octets[..self.len]
    }
}

impl<const N: usize> From<&[u8; N]> for Octets {
    fn from(digest: &[u8; N]) -> Self {
        let mut octets = [0; 64];
        octets[..N].copy_from_slice(digest);
        Self { octets, len: N }
    }
}

#[inline]
fn hash(algorithm: HashAlgorithm, octets: &[u8]) -> Octets {
    macro_rules! hashed {
        ($hash:ident) => {{
            let mut hash = $hash::new();
            hash.update(octets);
            Octets::from(&hash.finish())
        }};
    }
    match algorithm {
        HashAlgorithm::Sha1 => Octets::from(&digest::sha1(octets)),
        HashAlgorithm::Sha256 => Octets::from(&digest::sha256(octets)),
        HashAlgorithm::Sha384 => hashed!(Sha384),
        HashAlgorithm::Sha512 => hashed!(Sha512),
    }
}

/// `IMA_EVENT_NAME_LEN_MAX` and its NUL: what the name of the template `ima` is filled to before it is hashed.
const LEGACY_NAME_BYTES: usize = 256;
