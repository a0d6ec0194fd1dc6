//! Writes crypto-agile event logs of the SHA-256 bank: for tests, and for soft nodes whose logs must be real without
//! firmware. Behind the feature `testing`; nothing shipped writes logs.

use super::PCR_COUNT;
use super::event_type::EventType;
use assay_tpm::algorithm::HashAlgorithm;

/// A log under construction, and the PCR values that go with it.
#[derive(Debug, Clone)]
pub struct LogWriter {
    log: Vec<u8>,
    pcrs: [[u8; 32]; PCR_COUNT as usize],
    extensions: Vec<(u8, [u8; 32])>,
}

impl Default for LogWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl LogWriter {
    /// A log with its Spec ID event.
    #[must_use]
    pub fn new() -> Self {
        let mut spec_id = b"Spec ID Event03\0".to_vec();
        spec_id.extend_from_slice(&[0, 0, 0, 0, 0, 2, 0, 2]); // class, version 2.0, errata, uintn size
        spec_id.extend_from_slice(&1u32.to_le_bytes());
        spec_id.extend_from_slice(&HashAlgorithm::Sha256.id().to_le_bytes());
        spec_id.extend_from_slice(&32u16.to_le_bytes());
        spec_id.push(0); // no vendor information
        let mut log = 0u32.to_le_bytes().to_vec();
        log.extend_from_slice(&EventType::NO_ACTION.code().to_le_bytes());
        log.extend_from_slice(&[0; 20]);
        log.extend_from_slice(&size_of(&spec_id));
        log.extend_from_slice(&spec_id);
        Self { log, pcrs: [[0; 32]; PCR_COUNT as usize], extensions: Vec::new() }
    }

    /// Appends an event with a digest of something that is not its data, like a loaded image.
    #[must_use]
    pub fn event(mut self, pcr: u8, kind: EventType, digest: [u8; 32], data: &[u8]) -> Self {
        self.log.extend_from_slice(&u32::from(pcr).to_le_bytes());
        self.log.extend_from_slice(&kind.code().to_le_bytes());
        self.log.extend_from_slice(&1u32.to_le_bytes());
        self.log.extend_from_slice(&HashAlgorithm::Sha256.id().to_le_bytes());
        self.log.extend_from_slice(&digest);
        self.log.extend_from_slice(&size_of(data));
        self.log.extend_from_slice(data);
        if kind != EventType::NO_ACTION {
            let value = &mut self.pcrs[usize::from(pcr)];
            *value = sha256(&[&value[..], &digest].concat());
            self.extensions.push((pcr, digest));
        }
        self
    }

    /// Appends an event whose digest is of its data.
    #[must_use]
    pub fn measured(self, pcr: u8, kind: EventType, data: &[u8]) -> Self {
        self.event(pcr, kind, sha256(data), data)
    }

    /// Appends the separators of PCRs 0 to 7.
    #[must_use]
    pub fn separators(mut self) -> Self {
        for pcr in 0..8 {
            self = self.measured(pcr, EventType::SEPARATOR, &[0; 4]);
        }
        self
    }

    /// The log as the kernel would show it.
    #[must_use]
    pub fn finish(&self) -> Vec<u8> {
        self.log.clone()
    }

    /// What the PCRs hold after it.
    #[must_use]
    pub fn pcrs(&self) -> &[[u8; 32]] {
        &self.pcrs
    }

    /// What to extend into a TPM so that it holds that: PCR and digest, in order.
    #[must_use]
    pub fn extensions(&self) -> &[(u8, [u8; 32])] {
        &self.extensions
    }
}

fn sha256(data: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(HashAlgorithm::Sha256.digest(data).as_ref());
    digest
}

fn size_of(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes()
}
