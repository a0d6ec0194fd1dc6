//! `TPMS_ATTEST` (TPM 2.0 Part 2, 10.12.12), of a quote and of a key's creation: what an AK signs.
//!
//! Parsing proves nothing; the verifier checks the signature over the very octets that are parsed here.

use crate::algorithm::HashAlgorithm;
use crate::public::MAX_DIGEST_BYTES;
use crate::reader::{DecodeError, Order, Reader};

/// What a TPM says about itself in a quote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote<'a> {
    /// Qualified name of the key that signed.
    pub qualified_signer: &'a [u8],
    /// The nonce.
    pub extra_data: &'a [u8],
    /// Milliseconds that the TPM has been powered, over its life.
    pub clock_ms: u64,
    /// TPM resets (power cycles) since the owner was last cleared.
    pub reset_count: u32,
    /// TPM restarts and resumes since the last reset.
    pub restart_count: u32,
    /// Whether `clock_ms` is certain never to have been reported higher.
    pub safe: bool,
    /// The TPM's firmware.
    pub firmware_version: u64,
    /// Which PCRs of which banks were quoted, in the order of the digest.
    pub selections: Vec<PcrSelection>,
    /// Digest over the selected PCRs' values, in the hash of the signing scheme.
    pub pcr_digest: &'a [u8],
}

/// One bank's selected PCRs (`TPMS_PCR_SELECTION`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PcrSelection {
    /// The bank.
    pub bank: HashAlgorithm,
    /// Bit *n* selects PCR *n*.
    pub mask: u32,
}

/// What a TPM says about a key that it made (`TPMS_CREATION_INFO`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreatedKey<'a> {
    /// The key's name: its algorithm, attributes and public key, hashed.
    pub name: &'a [u8],
}

/// Why an attestation is not the one that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttestError {
    /// The structure was not made by a TPM: a restricted key signs no outside data that begins with the magic.
    #[error("TPMS_ATTEST has magic {found:#010x} instead of TPM_GENERATED_VALUE")]
    NotTpmGenerated {
        /// What it began with.
        found: u32,
    },
    /// Made by a TPM, for another purpose.
    #[error("TPMS_ATTEST is of type {found:#06x}, not a quote")]
    NotAQuote {
        /// `TPMI_ST_ATTEST`.
        found: u16,
    },
    /// Made by a TPM, for another purpose.
    #[error("TPMS_ATTEST is of type {found:#06x}, not of a key's creation")]
    NotACreation {
        /// `TPMI_ST_ATTEST`.
        found: u16,
    },
    /// Not the structure.
    #[error(transparent)]
    Malformed(#[from] DecodeError),
}

impl<'a> Quote<'a> {
    /// Parses a `TPMS_ATTEST`, all of it.
    ///
    /// # Errors
    /// Not exactly one quote.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, AttestError> {
        let mut reader = Reader::new("TPMS_ATTEST", bytes, Order::Big);
        let header = Header::read(&mut reader, TPM_ST_ATTEST_QUOTE, |found| AttestError::NotAQuote { found })?;
        let selections = selections(&mut reader)?;
        let pcr_digest = reader.sized("pcrDigest size", MAX_DIGEST_BYTES)?;
        reader.finish()?;
        Ok(Self {
            qualified_signer: header.qualified_signer,
            extra_data: header.extra_data,
            clock_ms: header.clock_ms,
            reset_count: header.reset_count,
            restart_count: header.restart_count,
            safe: header.safe,
            firmware_version: header.firmware_version,
            selections,
            pcr_digest,
        })
    }
}

impl<'a> CreatedKey<'a> {
    /// Parses a `TPMS_ATTEST`, all of it.
    ///
    /// # Errors
    /// Not exactly one statement on a key's creation.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, AttestError> {
        let mut reader = Reader::new("TPMS_ATTEST", bytes, Order::Big);
        Header::read(&mut reader, TPM_ST_ATTEST_CREATION, |found| AttestError::NotACreation { found })?;
        let name = reader.sized("objectName size", MAX_NAME_BYTES)?;
        reader.sized("creationHash size", MAX_DIGEST_BYTES)?;
        reader.finish()?;
        Ok(Self { name })
    }
}

/// What every `TPMS_ATTEST` begins with.
struct Header<'a> {
    qualified_signer: &'a [u8],
    extra_data: &'a [u8],
    clock_ms: u64,
    reset_count: u32,
    restart_count: u32,
    safe: bool,
    firmware_version: u64,
}

impl<'a> Header<'a> {
    fn read(reader: &mut Reader<'a>, kind: u16, other: fn(u16) -> AttestError) -> Result<Self, AttestError> {
        let magic = reader.u32()?;
        if magic != TPM_GENERATED_VALUE {
            return Err(AttestError::NotTpmGenerated { found: magic });
        }
        let found = reader.u16()?;
        if found != kind {
            return Err(other(found));
        }
        Ok(Self {
            qualified_signer: reader.sized("qualifiedSigner size", MAX_NAME_BYTES)?,
            extra_data: reader.sized("extraData size", MAX_DATA_BYTES)?,
            clock_ms: reader.u64()?,
            reset_count: reader.u32()?,
            restart_count: reader.u32()?,
            safe: match reader.u8()? {
                0 => false,
                1 => true,
                other => return Err(reader.value("safe", other).into()),
            },
            firmware_version: reader.u64()?,
        })
    }
}

fn selections(reader: &mut Reader<'_>) -> Result<Vec<PcrSelection>, DecodeError> {
    let count = reader.u32()?;
    if count > MAX_SELECTIONS {
        return Err(reader.value("PCR selection count", count));
    }
    (0..count)
        .map(|_| {
            let bank = crate::public::hash(reader, "PCR bank")?;
            let size = reader.u8()?;
            if !(1..=4).contains(&size) {
                return Err(reader.value("sizeofSelect", size));
            }
            let mut mask = [0; 4];
            mask[..usize::from(size)].copy_from_slice(reader.bytes(usize::from(size))?);
            Ok(PcrSelection { bank, mask: u32::from_le_bytes(mask) })
        })
        .collect()
}

const TPM_GENERATED_VALUE: u32 = 0xff54_4347;
const TPM_ST_ATTEST_QUOTE: u16 = 0x8018;
const TPM_ST_ATTEST_CREATION: u16 = 0x801a;
/// Algorithm and the largest digest.
const MAX_NAME_BYTES: usize = 2 + MAX_DIGEST_BYTES;
/// `TPM2B_DATA` holds a `TPMT_HA`.
const MAX_DATA_BYTES: usize = 2 + MAX_DIGEST_BYTES;
/// More banks than any TPM has.
const MAX_SELECTIONS: u32 = 16;
