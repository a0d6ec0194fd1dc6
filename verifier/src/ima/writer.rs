//! Writes measurement lists as the kernel does, and extends PCR 10 as it does: for tests, benchmarks and soft nodes.
//! Its digests are ring's, so that it is a second opinion on replay.

use super::IMA_PCR;
use assay_tpm::algorithm::HashAlgorithm;

/// A list that grows, and the PCR 10 of the SHA-256 bank that it comes to.
#[derive(Debug, Clone)]
pub struct ListWriter {
    bytes: Vec<u8>,
    entries: u64,
    pcr10: [u8; 32],
    extended: Vec<[u8; 32]>,
}

impl ListWriter {
    /// An empty list of a kernel that found `pcr10` in its PCR: zeros after a reset, or what the kernel before it left.
    #[must_use]
    pub fn after(pcr10: [u8; 32]) -> Self {
        Self { bytes: Vec::new(), entries: 0, pcr10, extended: Vec::new() }
    }

    /// The `boot_aggregate` over PCRs 0 to 9, template `ima-ng`.
    #[must_use]
    pub fn boot_aggregate(self, pcrs: &[[u8; 32]]) -> Self {
        let aggregate = sha256(&pcrs[..=9].concat());
        self.file("boot_aggregate", &aggregate)
    }

    /// A file with this SHA-256 digest, template `ima-ng`.
    #[must_use]
    pub fn file(self, path: &str, sha256: &[u8; 32]) -> Self {
        self.entry("ima-ng", &[&digest_ng("sha256", sha256), &string(path)])
    }

    /// A file with a signature, template `ima-sig`.
    #[must_use]
    pub fn signed_file(self, path: &str, sha256: &[u8; 32], signature: &[u8]) -> Self {
        self.entry("ima-sig", &[&digest_ng("sha256", sha256), &string(path), signature])
    }

    /// A buffer, like a key that came into a keyring, template `ima-buf`.
    #[must_use]
    pub fn buffer(self, name: &str, buffer: &[u8]) -> Self {
        self.entry("ima-buf", &[&digest_ng("sha256", &sha256(buffer)), &string(name), buffer])
    }

    /// A file that was written while it was read, template `ima-ng`.
    #[must_use]
    pub fn violation(mut self, path: &str) -> Self {
        let data = sized_fields(&[&digest_ng("sha256", &[0; 32]), &string(path)]);
        self.push(IMA_PCR, &[0; 20], "ima-ng", &data, [0xff; 32]);
        self
    }

    /// Any entry of a template whose fields are each preceded by their size.
    #[must_use]
    pub fn entry(mut self, template: &str, fields: &[&[u8]]) -> Self {
        let data = sized_fields(fields);
        let digest = HashAlgorithm::Sha1.digest(&data);
        self.push(IMA_PCR, digest.as_ref(), template, &data, sha256(&data));
        self
    }

    /// An entry of the template `ima`.
    #[must_use]
    pub fn legacy(mut self, path: &str, sha1: &[u8; 20]) -> Self {
        let mut hashed = [sha1, path.as_bytes()].concat();
        hashed.resize(20 + 256, 0);
        self.bytes.extend(u32::from(IMA_PCR).to_le_bytes());
        self.bytes.extend(HashAlgorithm::Sha1.digest(&hashed).as_ref());
        self.bytes.extend(sized(b"ima"));
        self.bytes.extend(sha1);
        self.bytes.extend(sized(path.as_bytes()));
        self.extend(sha256(&hashed));
        self
    }

    /// An entry whose every part the caller makes up, for lists that lie.
    pub fn push(&mut self, pcr: u8, digest: &[u8], template: &str, data: &[u8], extended: [u8; 32]) {
        self.bytes.extend(u32::from(pcr).to_le_bytes());
        self.bytes.extend(digest);
        self.bytes.extend(sized(template.as_bytes()));
        self.bytes.extend(sized(data));
        self.extend(extended);
    }

    fn extend(&mut self, digest: [u8; 32]) {
        self.pcr10 = sha256(&[self.pcr10, digest].concat());
        self.extended.push(digest);
        self.entries += 1;
    }

    /// The list.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many entries it has.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// PCR 10 of the SHA-256 bank after the last of them.
    #[must_use]
    pub fn pcr10(&self) -> [u8; 32] {
        self.pcr10
    }

    /// What each of them extended into the SHA-256 bank: to extend a TPM with.
    #[must_use]
    pub fn extended(&self) -> &[[u8; 32]] {
        &self.extended
    }
}

/// The field `d-ng`.
#[must_use]
pub fn digest_ng(algorithm: &str, digest: &[u8]) -> Vec<u8> {
    [algorithm.as_bytes(), b":\0", digest].concat()
}

/// The field `n-ng`.
#[must_use]
pub fn string(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// Fields as template data has them.
#[must_use]
pub fn sized_fields(fields: &[&[u8]]) -> Vec<u8> {
    fields.iter().flat_map(|field| sized(field)).collect()
}

fn sized(octets: &[u8]) -> Vec<u8> {
    let size = u32::try_from(octets.len()).unwrap_or(u32::MAX);
    [&size.to_le_bytes()[..], octets].concat()
}

fn sha256(data: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(HashAlgorithm::Sha256.digest(data).as_ref());
    digest
}
