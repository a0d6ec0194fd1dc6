//! Quotes: what a TPM signed, checked. On the boot path: step 5, before anything else in the evidence is looked at.
//!
//! [`verify_quote`] is the one maker of a [`VerifiedQuote`]. What vouches for it: the AK's signature. What vouches for
//! the AK: credential activation against an EK whose certificate chains to a configured CA ([`crate::identity`]).

mod ak;
mod clock;

pub use ak::{AkError, AkPublic};
pub use clock::{ClockChange, ClockCompare, ClockError, ClockInfo, ClockRule, check_clock, fell_back_ms};

use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::attest::{AttestError, Quote};
use assay_tpm::name::Name;
use assay_tpm::public::Scheme;
use assay_tpm::reader::DecodeError;
use assay_wire::evidence::QUOTED_PCRS;
use openssl::error::ErrorStack;
use std::fmt;
use subtle::ConstantTimeEq as _;

/// How many PCRs are quoted.
pub const PCR_COUNT: usize = *QUOTED_PCRS.end() as usize + 1;

/// A quote that a TPM made now, over these PCR values, for this nonce.
#[derive(Debug, Clone)]
pub struct VerifiedQuote {
    pcrs: [PcrValue; PCR_COUNT],
    nonce: [u8; 32],
    ak_name: Name,
    clock: ClockInfo,
}

impl VerifiedQuote {
    /// The value of a quoted PCR of the SHA-256 bank.
    #[must_use]
    pub fn pcr(&self, index: u8) -> Option<&PcrValue> {
        self.pcrs.get(usize::from(index))
    }

    /// All quoted PCRs.
    #[must_use]
    pub fn pcrs(&self) -> &[PcrValue; PCR_COUNT] {
        &self.pcrs
    }

    /// The nonce that was signed.
    #[must_use]
    pub fn nonce(&self) -> &[u8; 32] {
        &self.nonce
    }

    /// Who signed.
    #[must_use]
    pub fn ak_name(&self) -> &Name {
        &self.ak_name
    }

    /// The TPM's clock and counters.
    #[must_use]
    pub fn clock(&self) -> &ClockInfo {
        &self.clock
    }
}

/// What [`verify_quote`] verifies.
#[derive(Debug, Clone, Copy)]
pub struct UnverifiedQuote<'a> {
    /// `TPMS_ATTEST`.
    pub attest: &'a [u8],
    /// `TPMT_SIGNATURE`.
    pub signature: &'a [u8],
    /// The values that the PCRs are said to have.
    pub pcrs: &'a [PcrValue; PCR_COUNT],
}

/// Why a quote is not one.
#[derive(Debug, thiserror::Error)]
pub enum QuoteError {
    /// The attestation is not a quote.
    #[error("reading the quote")]
    Attest(#[from] AttestError),
    /// The signature is not one.
    #[error("reading the quote's signature")]
    Signature(#[from] DecodeError),
    /// Signed in another scheme than the AK is bound to.
    #[error("quote is signed with {found:?}, the AK with {expected:?}")]
    Scheme {
        /// The signature's.
        found: Scheme,
        /// The AK's.
        expected: Scheme,
    },
    /// Not signed by this AK.
    #[error("quote is not signed by this AK")]
    NotSigned,
    /// Signed for something else, or before.
    #[error("quote carries another nonce than it was asked for")]
    Nonce,
    /// Not the PCRs that were asked for.
    #[error("quote selects {found}, not PCRs 0 to 14 of the SHA-256 bank")]
    Selection {
        /// What it selects.
        found: String,
    },
    /// The values are not those that were signed.
    #[error("PCR values are not those that the TPM signed")]
    PcrDigest,
    /// The library failed.
    #[error("checking the quote's signature")]
    Crypto(#[from] ErrorStack),
}

/// Checks that the TPM with `ak` signed `quote` for `nonce`, over exactly the PCRs 0 to 14 of the SHA-256 bank.
///
/// # Errors
/// See [`QuoteError`]. The signature is checked first: nothing that is not signed is looked at.
pub fn verify_quote(quote: &UnverifiedQuote<'_>, ak: &AkPublic, nonce: &[u8; 32]) -> Result<VerifiedQuote, QuoteError> {
    let hash = ak.verify_signature(quote.attest, quote.signature)?;
    let attest = Quote::parse(quote.attest)?;
    if !bool::from(attest.extra_data.ct_eq(nonce)) {
        return Err(QuoteError::Nonce);
    }
    let selected: Vec<_> = attest.selections.iter().map(|selection| (selection.bank, selection.mask)).collect();
    if selected != [(HashAlgorithm::Sha256, QUOTED_MASK)] {
        let found = selected.iter().map(|(bank, mask)| format!("{bank}:{mask:#08x}")).collect::<Vec<_>>().join("+");
        return Err(QuoteError::Selection { found: if found.is_empty() { "nothing".into() } else { found } });
    }
    let values: Vec<u8> = quote.pcrs.iter().flat_map(|value| value.0).collect();
    if hash.digest(&values).as_ref() != attest.pcr_digest {
        return Err(QuoteError::PcrDigest);
    }
    Ok(VerifiedQuote {
        pcrs: *quote.pcrs,
        nonce: *nonce,
        ak_name: ak.name().clone(),
        clock: ClockInfo {
            clock_ms: attest.clock_ms,
            reset_count: attest.reset_count,
            restart_count: attest.restart_count,
            safe: attest.safe,
            firmware_version: attest.firmware_version,
        },
    })
}

/// A PCR of the SHA-256 bank.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PcrValue([u8; 32]);

impl PcrValue {
    /// The value with these octets.
    #[must_use]
    pub fn new(value: [u8; 32]) -> Self {
        Self(value)
    }

    /// The octets.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether nothing was ever extended.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.0 == [0; 32]
    }

    /// Its first octets, for sentences.
    #[must_use]
    pub fn short(&self) -> String {
        short_hex(&self.0)
    }
}

impl fmt::Display for PcrValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for PcrValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PcrValue({self})")
    }
}

/// The first octets of a digest, for sentences.
pub(crate) fn short_hex(digest: &[u8]) -> String {
    format!("{}…", hex::encode(&digest[..digest.len().min(6)]))
}

/// PCRs 0 to 14.
const QUOTED_MASK: u32 = (1 << PCR_COUNT) - 1;
