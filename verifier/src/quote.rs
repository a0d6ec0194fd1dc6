//! Quotes: what a TPM signed, checked. On the boot path: step 5, before anything else in the evidence is looked at.
//!
//! [`verify_quote`] is the one maker of a [`VerifiedQuote`]. What vouches for it: the AK's signature. What vouches for
//! the AK: credential activation against an EK whose certificate chains to a configured CA ([`crate::identity`]).

use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::attest::{AttestError, Quote};
use assay_tpm::name::Name;
use assay_tpm::public::{Attributes, Curve, KeyPublic, Public, Scheme};
use assay_tpm::reader::DecodeError;
use assay_tpm::signature::{Signature, SignatureValue};
use assay_wire::evidence::QUOTED_PCRS;
use openssl::bn::BigNum;
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::rsa::{Padding, Rsa};
use openssl::sign::{RsaPssSaltlen, Verifier};
use ring::signature as ring_signature;
use serde::{Deserialize, Serialize};
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
    let signature = Signature::parse(quote.signature)?;
    if signature.scheme != ak.scheme {
        return Err(QuoteError::Scheme { found: signature.scheme, expected: ak.scheme });
    }
    let hash = ak.verify(quote.attest, &signature.value)?;
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

/// An AK that is fit to sign quotes: the TPM made it, keeps it, and signs with it only what it made itself.
#[derive(Debug, Clone)]
pub struct AkPublic {
    bytes: Vec<u8>,
    public: Public,
    scheme: Scheme,
}

/// Why a key is not an AK.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AkError {
    /// Not a public area.
    #[error("reading the AK")]
    Malformed(#[from] DecodeError),
    /// A key without these could sign anything, or live outside a TPM.
    #[error("AK is not {0}")]
    Attribute(&'static str),
    /// It could be made to decrypt credentials, too.
    #[error("AK may also decrypt")]
    Decrypts,
    /// Not bound to one good scheme.
    #[error("AK is bound to {0}, not to RSASSA, RSAPSS or ECDSA with SHA-256 or better")]
    Scheme(String),
    /// Too small, or odd.
    #[error("AK is not RSA of at least 2048 bits with exponent 65537, nor P-256 with SHA-256, nor P-384 with SHA-384")]
    Key,
}

impl AkPublic {
    /// Reads a `TPMT_PUBLIC` and checks that it is an AK's.
    ///
    /// # Errors
    /// See [`AkError`].
    pub fn parse(tpmt_public: &[u8]) -> Result<Self, AkError> {
        let public = Public::parse(tpmt_public)?;
        for (attribute, word) in [
            (Attributes::RESTRICTED, "restricted"),
            (Attributes::FIXED_TPM, "fixedTPM"),
            (Attributes::FIXED_PARENT, "fixedParent"),
            (Attributes::SENSITIVE_DATA_ORIGIN, "sensitiveDataOrigin"),
            (Attributes::SIGN, "a signing key"),
        ] {
            if !public.attributes().contains(attribute) {
                return Err(AkError::Attribute(word));
            }
        }
        if public.attributes().contains(Attributes::DECRYPT) {
            return Err(AkError::Decrypts);
        }
        let scheme = public.scheme().ok_or_else(|| AkError::Scheme("no scheme".into()))?;
        let hash = match scheme {
            Scheme::RsaSsa(hash) | Scheme::RsaPss(hash) | Scheme::Ecdsa(hash) => hash,
            Scheme::Other(_) => HashAlgorithm::Sha1, // refused next
        };
        if hash == HashAlgorithm::Sha1 || public.name_algorithm() == HashAlgorithm::Sha1 {
            return Err(AkError::Scheme(format!("{scheme:?}, named with {}", public.name_algorithm())));
        }
        let fit = match (public.key(), scheme) {
            (KeyPublic::Rsa { modulus, exponent }, Scheme::RsaSsa(_) | Scheme::RsaPss(_)) => {
                modulus.len() >= MIN_RSA_BYTES && *exponent == 65537
            }
            (KeyPublic::Ecc { curve: Curve::P256, .. }, Scheme::Ecdsa(hash)) => hash == HashAlgorithm::Sha256,
            (KeyPublic::Ecc { curve: Curve::P384, .. }, Scheme::Ecdsa(hash)) => hash == HashAlgorithm::Sha384,
            (KeyPublic::Rsa { .. } | KeyPublic::Ecc { .. }, _) => false,
        };
        if !fit {
            return Err(AkError::Key);
        }
        Ok(Self { bytes: tpmt_public.to_vec(), public, scheme })
    }

    /// Its name, computed from its public area.
    #[must_use]
    pub fn name(&self) -> &Name {
        self.public.name()
    }

    /// Its `TPMT_PUBLIC`.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        &self.bytes
    }

    /// Checks a signature over `message` in the AK's scheme; gives the scheme's hash.
    fn verify(&self, message: &[u8], signature: &SignatureValue<'_>) -> Result<HashAlgorithm, QuoteError> {
        match (self.public.key(), self.scheme, signature) {
            (KeyPublic::Rsa { modulus, exponent }, Scheme::RsaSsa(hash), SignatureValue::Rsa(signature)) => {
                let key =
                    ring_signature::RsaPublicKeyComponents { n: modulus.as_slice(), e: &exponent.to_be_bytes()[1..] };
                key.verify(rsassa(hash), message, signature).map_err(|_| QuoteError::NotSigned)?;
                Ok(hash)
            }
            (KeyPublic::Rsa { modulus, exponent }, Scheme::RsaPss(hash), SignatureValue::Rsa(signature)) => {
                if verify_pss(modulus, *exponent, hash, message, signature)? {
                    Ok(hash)
                } else {
                    Err(QuoteError::NotSigned)
                }
            }
            (KeyPublic::Ecc { curve, x, y }, Scheme::Ecdsa(hash), SignatureValue::Ecdsa { r, s }) => {
                let point = [&[4][..], x, y].concat();
                let size = curve.coordinate_bytes();
                let signature = [padded(r, size), padded(s, size)].concat();
                ring_signature::UnparsedPublicKey::new(ecdsa(*curve), point)
                    .verify(message, &signature)
                    .map_err(|_| QuoteError::NotSigned)?;
                Ok(hash)
            }
            _ => Err(QuoteError::NotSigned), // `parse` lets no key be bound to another kind's scheme
        }
    }
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

/// `TPMS_CLOCK_INFO` and the TPM's firmware version: what is compared from one quote to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockInfo {
    /// Milliseconds that the TPM has been powered, over its life.
    pub clock_ms: u64,
    /// TPM resets.
    pub reset_count: u32,
    /// TPM restarts since the last reset.
    pub restart_count: u32,
    /// Whether `clock_ms` is certain never to have been reported higher.
    pub safe: bool,
    /// The TPM's firmware.
    pub firmware_version: u64,
}

/// What happened between two quotes of one TPM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockChange {
    /// There was no earlier one.
    First,
    /// The machine has not been reset.
    SameBoot,
    /// The machine was reset or restarted.
    Reset,
}

/// What cannot have happened between two quotes of one TPM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClockError {
    /// A counter went back: an old quote, or another TPM.
    #[error("TPM {counter} went back from {before} to {now}")]
    WentBack {
        /// Which counter.
        counter: &'static str,
        /// Its last value.
        before: u64,
        /// Its value now.
        now: u64,
    },
    /// The TPM's firmware is another: an operator must know of it.
    #[error("TPM firmware version changed from {before:#x} to {now:#x}")]
    Firmware {
        /// The last one.
        before: u64,
        /// This one.
        now: u64,
    },
}

/// Compares the clock of a verified quote with that of the last one of the same TPM.
///
/// # Errors
/// What cannot be: counters going back, another firmware.
pub fn check_clock(previous: Option<&ClockInfo>, now: &ClockInfo) -> Result<ClockChange, ClockError> {
    let Some(before) = previous else { return Ok(ClockChange::First) };
    if before.firmware_version != now.firmware_version {
        return Err(ClockError::Firmware { before: before.firmware_version, now: now.firmware_version });
    }
    let forward = |counter, before: u64, now: u64| match now < before {
        true => Err(ClockError::WentBack { counter, before, now }),
        false => Ok(()),
    };
    forward("reset count", before.reset_count.into(), now.reset_count.into())?;
    let same_reset = before.reset_count == now.reset_count;
    if same_reset {
        forward("restart count", before.restart_count.into(), now.restart_count.into())?;
    }
    // Across a reset it is the reset count that tells old from new: after a power cut the clock falls back to its last
    // stored value. A TPM should then say that it is not safe (Part 1, 36.3.2), but swtpm behind QEMU was seen to fall
    // back by half a boot and say that it is.
    if same_reset {
        forward("clock", before.clock_ms, now.clock_ms)?;
    }
    Ok(if same_reset && before.restart_count == now.restart_count { ClockChange::SameBoot } else { ClockChange::Reset })
}

/// The first octets of a digest, for sentences.
pub(crate) fn short_hex(digest: &[u8]) -> String {
    format!("{}…", hex::encode(&digest[..digest.len().min(6)]))
}

fn rsassa(hash: HashAlgorithm) -> &'static ring_signature::RsaParameters {
    match hash {
        // `AkPublic::parse` refuses SHA-1; no key could verify with it here either.
        HashAlgorithm::Sha1 | HashAlgorithm::Sha256 => &ring_signature::RSA_PKCS1_2048_8192_SHA256,
        HashAlgorithm::Sha384 => &ring_signature::RSA_PKCS1_2048_8192_SHA384,
        HashAlgorithm::Sha512 => &ring_signature::RSA_PKCS1_2048_8192_SHA512,
    }
}

fn ecdsa(curve: Curve) -> &'static ring_signature::EcdsaVerificationAlgorithm {
    match curve {
        Curve::P256 => &ring_signature::ECDSA_P256_SHA256_FIXED,
        Curve::P384 => &ring_signature::ECDSA_P384_SHA384_FIXED,
    }
}

/// RSAPSS by OpenSSL, because TPMs use the longest salt that fits (Part 1, B.7) and ring wants one of the hash's size.
fn verify_pss(
    modulus: &[u8],
    exponent: u32,
    hash: HashAlgorithm,
    message: &[u8],
    signature: &[u8],
) -> Result<bool, ErrorStack> {
    let digest = match hash {
        HashAlgorithm::Sha1 | HashAlgorithm::Sha256 => MessageDigest::sha256(),
        HashAlgorithm::Sha384 => MessageDigest::sha384(),
        HashAlgorithm::Sha512 => MessageDigest::sha512(),
    };
    let rsa = Rsa::from_public_components(BigNum::from_slice(modulus)?, BigNum::from_u32(exponent)?)?;
    let key = PKey::from_rsa(rsa)?;
    let mut verifier = Verifier::new(digest, &key)?;
    verifier.set_rsa_padding(Padding::PKCS1_PSS)?;
    verifier.set_rsa_mgf1_md(digest)?;
    verifier.set_rsa_pss_saltlen(RsaPssSaltlen::custom(RSA_PSS_SALTLEN_AUTO))?;
    verifier.update(message)?;
    // A signature of the wrong length is an error of the library, and to us just not a signature.
    Ok(verifier.verify(signature).unwrap_or(false))
}

fn padded(number: &[u8], size: usize) -> Vec<u8> {
    let mut padded = vec![0; size.saturating_sub(number.len())];
    padded.extend_from_slice(number);
    padded
}

/// PCRs 0 to 14.
const QUOTED_MASK: u32 = (1 << PCR_COUNT) - 1;
const MIN_RSA_BYTES: usize = 2048 / 8;
/// OpenSSL: take the salt's length from the signature.
const RSA_PSS_SALTLEN_AUTO: i32 = -2;

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: ClockInfo =
        ClockInfo { clock_ms: 1000, reset_count: 5, restart_count: 2, safe: true, firmware_version: 7 };

    #[test]
    fn a14_counters_never_go_back() {
        let check = |now: ClockInfo| check_clock(Some(&CLOCK), &now);
        assert_eq!(check_clock(None, &CLOCK), Ok(ClockChange::First));
        assert_eq!(check(CLOCK), Ok(ClockChange::SameBoot));
        assert_eq!(check(ClockInfo { restart_count: 3, ..CLOCK }), Ok(ClockChange::Reset));
        assert_eq!(
            check(ClockInfo { reset_count: 6, restart_count: 0, clock_ms: 1001, ..CLOCK }),
            Ok(ClockChange::Reset)
        );
        for (now, counter) in [
            (ClockInfo { reset_count: 4, clock_ms: 9999, ..CLOCK }, "reset count"),
            (ClockInfo { restart_count: 1, clock_ms: 9999, ..CLOCK }, "restart count"),
            (ClockInfo { clock_ms: 999, ..CLOCK }, "clock"),
            (ClockInfo { clock_ms: 999, safe: false, ..CLOCK }, "clock"),
        ] {
            let error = check(now).unwrap_err();
            assert!(matches!(error, ClockError::WentBack { counter: c, .. } if c == counter), "{error}");
        }
        // A power cut may cost some clock, and a TPM should say so; the reset count has moved on all the same.
        for safe in [false, true] {
            assert_eq!(check(ClockInfo { reset_count: 6, clock_ms: 999, safe, ..CLOCK }), Ok(ClockChange::Reset));
        }
        assert_eq!(check(ClockInfo { firmware_version: 8, ..CLOCK }), Err(ClockError::Firmware { before: 7, now: 8 }));
    }
}
