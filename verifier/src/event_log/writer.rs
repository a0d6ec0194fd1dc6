//! Writes event logs: for tests, and for soft nodes whose logs must be real without firmware. Behind the feature
//! `testing`; nothing shipped writes logs.

use super::PCR_COUNT;
use super::event_type::EventType;
use assay_tpm::algorithm::HashAlgorithm;

/// A log under construction, and the PCR values that go with it.
#[derive(Debug, Clone)]
pub struct LogWriter {
    log: Vec<u8>,
    banks: Vec<(HashAlgorithm, Vec<Vec<u8>>)>,
    /// The form of TPM 1.2.
    legacy: bool,
    pcrs: [[u8; 32]; PCR_COUNT as usize],
    extensions: Vec<(u8, [u8; 32])>,
}

impl Default for LogWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl LogWriter {
    /// A crypto-agile log of the SHA-256 bank, with its Spec ID event.
    #[must_use]
    pub fn new() -> Self {
        Self::of_banks(&[HashAlgorithm::Sha256])
    }

    /// A crypto-agile log of these banks, with its Spec ID event. A confidential computing log is written likewise.
    #[must_use]
    pub fn of_banks(banks: &[HashAlgorithm]) -> Self {
        let mut spec_id = b"Spec ID Event03\0".to_vec();
        spec_id.extend_from_slice(&[0, 0, 0, 0, 0, 2, 0, 2]); // class, version 2.0, errata, uintn size
        spec_id.extend_from_slice(&u32::try_from(banks.len()).unwrap_or(u32::MAX).to_le_bytes());
        for bank in banks {
            spec_id.extend_from_slice(&bank.id().to_le_bytes());
            spec_id.extend_from_slice(&u16::try_from(bank.digest_bytes()).unwrap_or(u16::MAX).to_le_bytes());
        }
        spec_id.push(0); // no vendor information
        let mut log = 0u32.to_le_bytes().to_vec();
        log.extend_from_slice(&EventType::NO_ACTION.code().to_le_bytes());
        log.extend_from_slice(&[0; 20]);
        log.extend_from_slice(&size_of(&spec_id));
        log.extend_from_slice(&spec_id);
        Self::begun(log, banks, false)
    }

    /// A log in the form of TPM 1.2.
    #[must_use]
    pub fn tpm12() -> Self {
        Self::begun(Vec::new(), &[HashAlgorithm::Sha1], true)
    }

    fn begun(log: Vec<u8>, banks: &[HashAlgorithm], legacy: bool) -> Self {
        let zeros = |bank: &HashAlgorithm| (*bank, vec![vec![0; bank.digest_bytes()]; PCR_COUNT as usize]);
        let banks = banks.iter().map(zeros).collect();
        Self { log, banks, legacy, pcrs: [[0; 32]; PCR_COUNT as usize], extensions: Vec::new() }
    }

    /// Appends an event with a digest of something that is not its data, like a loaded image: its SHA-256. Other banks
    /// get their digest of that.
    #[must_use]
    pub fn event(self, pcr: u8, kind: EventType, digest: [u8; 32], data: &[u8]) -> Self {
        let digests = self.banks.iter().map(|(bank, _)| match bank {
            HashAlgorithm::Sha256 => digest.to_vec(),
            HashAlgorithm::Sha1 | HashAlgorithm::Sha384 | HashAlgorithm::Sha512 => {
                bank.digest(&digest).as_ref().to_vec()
            }
        });
        let digests = digests.collect();
        self.append(pcr, kind, digests, data)
    }

    /// Appends an event whose digests are of its data.
    #[must_use]
    pub fn measured(self, pcr: u8, kind: EventType, data: &[u8]) -> Self {
        let digests = self.banks.iter().map(|(bank, _)| bank.digest(data).as_ref().to_vec()).collect();
        self.append(pcr, kind, digests, data)
    }

    fn append(mut self, pcr: u8, kind: EventType, digests: Vec<Vec<u8>>, data: &[u8]) -> Self {
        self.log.extend_from_slice(&u32::from(pcr).to_le_bytes());
        self.log.extend_from_slice(&kind.code().to_le_bytes());
        if !self.legacy {
            self.log.extend_from_slice(&u32::try_from(digests.len()).unwrap_or(u32::MAX).to_le_bytes());
        }
        for ((bank, pcrs), digest) in self.banks.iter_mut().zip(digests) {
            if !self.legacy {
                self.log.extend_from_slice(&bank.id().to_le_bytes());
            }
            self.log.extend_from_slice(&digest);
            if kind == EventType::NO_ACTION {
                continue;
            }
            let value = &mut pcrs[usize::from(pcr)];
            *value = bank.digest(&[&value[..], &digest].concat()).as_ref().to_vec();
            if let (HashAlgorithm::Sha256, Ok(digest)) = (&bank, digest.try_into()) {
                self.pcrs[usize::from(pcr)].copy_from_slice(value);
                self.extensions.push((pcr, digest));
            }
        }
        self.log.extend_from_slice(&size_of(data));
        self.log.extend_from_slice(data);
        self
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

    /// What the PCRs of the SHA-256 bank hold after it.
    #[must_use]
    pub fn pcrs(&self) -> &[[u8; 32]] {
        &self.pcrs
    }

    /// What the PCRs of any of its banks hold after it.
    #[must_use]
    pub fn pcrs_of(&self, bank: HashAlgorithm) -> Option<&[Vec<u8>]> {
        self.banks.iter().find(|(known, _)| *known == bank).map(|(_, pcrs)| &pcrs[..])
    }

    /// What to extend into the SHA-256 bank of a TPM so that it holds that: PCR and digest, in order.
    #[must_use]
    pub fn extensions(&self) -> &[(u8, [u8; 32])] {
        &self.extensions
    }
}

fn size_of(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes()
}
