//! Identity: is this EK a real TPM's, and whose node is it? On the boot path: step 4, before any credential is made.
//!
//! What vouches for an EK, in this order: its certificate, whose path ends at a CA that the operator configured; the
//! machine maker's certificate of an IAK which says that the EK is in its TPM ([`iak`]); the operator's own word for
//! exactly this EK on exactly this node. None of them, no node. A certificate counts only for the very key in it, which
//! is compared with the public area that credentials are made for. Nothing is ever fetched: what is needed travels with
//! the agent or stands in the configuration.
//!
//! Which node an EK is, is [`binding`]'s to decide.

pub mod anchors;
pub mod binding;
mod certificate;
pub mod iak;

pub use anchors::TrustAnchors;

use crate::quote::{AkError, QuoteError};
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::attest::AttestError;
use assay_tpm::name::Name;
use assay_tpm::public::{Attributes, KeyPublic, Public};
use assay_tpm::reader::DecodeError;
use assay_wire::agent::IakEndorsement;
use certificate::Purpose;
use openssl::error::ErrorStack;
use std::fmt;

/// Who is believed about EKs.
#[derive(Debug, Default)]
pub struct Endorsers {
    /// The CAs whose EK certificates are believed.
    pub ek_cas: TrustAnchors,
    /// The CAs whose IAK certificates are believed.
    pub iak_cas: TrustAnchors,
}

/// An EK as an agent presents it.
#[derive(Debug, Clone, Copy)]
pub struct EkClaim<'a> {
    /// `TPMT_PUBLIC`.
    pub public: &'a [u8],
    /// Its certificate, DER, perhaps followed by padding; perhaps empty.
    pub certificate: &'a [u8],
    /// Certificates between it and a root, one after the other.
    pub chain: &'a [u8],
    /// An IAK's word for it.
    pub iak: Option<&'a IakEndorsement>,
    /// Whether an operator said that this EK is this node's.
    pub operator_vouches: bool,
}

/// An EK that somebody whom the operator believes says is in a TPM. Made by [`verify_ek`] only.
#[derive(Debug, Clone)]
pub struct VerifiedEk {
    public: Vec<u8>,
    name: Name,
    sha256: EkDigest,
    endorsement: Endorsement,
}

impl VerifiedEk {
    /// Its `TPMT_PUBLIC`: what credentials are made for.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// What it is known by.
    #[must_use]
    pub fn sha256(&self) -> &EkDigest {
        &self.sha256
    }

    /// Who vouches for it.
    #[must_use]
    pub fn endorsement(&self) -> &Endorsement {
        &self.endorsement
    }
}

/// Who vouches for an EK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endorsement {
    /// The TPM's maker: SHA-256 of the certificate, hexadecimal.
    Certificate(String),
    /// The machine's maker, by an IAK: SHA-256 of its certificate, hexadecimal.
    Iak(String),
    /// The operator.
    Operator,
}

impl fmt::Display for Endorsement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate(sha256) => write!(f, "certificate sha256:{sha256}"),
            Self::Iak(sha256) => write!(f, "IAK certificate sha256:{sha256}"),
            Self::Operator => f.write_str("operator"),
        }
    }
}

/// SHA-256 of an EK's DER `SubjectPublicKeyInfo`, hexadecimal: what an EK is known by everywhere. Of the key, not of its
/// public area: whoever has the TPM can present the same key with other attributes, and must not be another one by it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EkDigest(String);

impl EkDigest {
    /// Of a key.
    #[must_use]
    pub fn of(key: &KeyPublic) -> Self {
        Self(hex::encode(HashAlgorithm::Sha256.digest(&key.to_spki())))
    }

    /// Of a `TPMT_PUBLIC`.
    ///
    /// # Errors
    /// Not a public area.
    pub fn of_public(tpmt_public: &[u8]) -> Result<Self, DecodeError> {
        Public::parse(tpmt_public).map(|public| Self::of(public.key()))
    }

    /// Its 64 hexadecimal digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for EkDigest {
    type Err = NotADigest;
    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let mut octets = [0; 32];
        hex::decode_to_slice(digits, &mut octets).map_err(|_| NotADigest)?;
        Ok(Self(hex::encode(octets)))
    }
}

impl fmt::Display for EkDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that is not an EK's digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an EK is named by the SHA-256 of its public key (DER SubjectPublicKeyInfo), 64 hexadecimal digits")]
pub struct NotADigest;

/// Why an EK is not believed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Nobody configured a CA.
    #[error("no {0} CA is configured, so no {0} certificate can be believed")]
    NoCa(Purpose),
    /// There is nothing to believe.
    #[error("TPM sent no {0} certificate: an operator can vouch for the EK with `assay identity allow`")]
    NoCertificate(Purpose),
    /// Not a public area.
    #[error("reading the EK")]
    Public(#[from] DecodeError),
    /// Not an EK.
    #[error("EK {0}")]
    NotAnEk(&'static str),
    /// Not a certificate for this purpose.
    #[error("{purpose} certificate {problem}")]
    Certificate {
        /// What it should be for.
        purpose: Purpose,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Signed by nobody that we believe.
    #[error("{purpose} certificate of `{issuer}` does not chain to a configured CA: none signed it")]
    UnknownIssuer {
        /// What it is for.
        purpose: Purpose,
        /// Who says to have issued it.
        issuer: String,
    },
    /// Signed by somebody, but not good now.
    #[error("{purpose} certificate of `{issuer}` does not chain to a configured CA: {problem}")]
    Chain {
        /// What it is for.
        purpose: Purpose,
        /// Who says to have issued it.
        issuer: String,
        /// What is wrong.
        problem: String,
    },
    /// Its CA took it, or one of the CAs above it, back.
    #[error("{purpose} certificate is revoked: `{issuer}` took `{subject}` back")]
    Revoked {
        /// What it is for.
        purpose: Purpose,
        /// Whose list it is on.
        issuer: String,
        /// Whose certificate is on it.
        subject: String,
    },
    /// Whether it was taken back cannot be known.
    #[error("revocation list of `{issuer}` is out of date: put a current one into the configured file")]
    StaleCrl {
        /// Whose list.
        issuer: String,
    },
    /// The certificate is of another key.
    #[error("{0} certificate is of another key than the one that was sent")]
    OtherKey(Purpose),
    /// Not an IAK.
    #[error("reading the IAK")]
    Iak(#[from] AkError),
    /// Not a statement on a key.
    #[error("reading what the IAK says of the EK")]
    IakAttest(#[from] AttestError),
    /// Not signed by the IAK.
    #[error("checking what the IAK says of the EK")]
    IakSignature(#[from] QuoteError),
    /// The IAK speaks of another key.
    #[error("IAK vouches for another key than the EK that was sent")]
    IakOtherKey,
    /// The library failed.
    #[error("checking a certificate")]
    Crypto(#[from] ErrorStack),
}

impl IdentityError {
    /// Whether nobody speaks for the EK, rather than somebody against it.
    fn is_silence(&self) -> bool {
        match self {
            Self::NoCa(_) | Self::NoCertificate(_) | Self::UnknownIssuer { .. } => true,
            Self::Public(_)
            | Self::NotAnEk(_)
            | Self::Certificate { .. }
            | Self::Chain { .. }
            | Self::Revoked { .. }
            | Self::StaleCrl { .. }
            | Self::OtherKey(_)
            | Self::Iak(_)
            | Self::IakAttest(_)
            | Self::IakSignature(_)
            | Self::IakOtherKey
            | Self::Crypto(_) => false,
        }
    }
}

/// Checks that `claim` is an EK and that somebody who is believed vouches for it now.
///
/// # Errors
/// See [`IdentityError`].
pub fn verify_ek(endorsers: &Endorsers, claim: &EkClaim<'_>, now_seconds: i64) -> Result<VerifiedEk, IdentityError> {
    let public = Public::parse(claim.public)?;
    check_public(&public)?;
    Ok(VerifiedEk {
        public: claim.public.to_vec(),
        name: public.name().clone(),
        sha256: EkDigest::of(public.key()),
        endorsement: endorse(endorsers, claim, &public, now_seconds)?,
    })
}

/// The first who speaks for the EK. Who speaks against it is heard before who comes next: a revoked certificate is not
/// made good by an operator's list.
fn endorse(
    endorsers: &Endorsers,
    claim: &EkClaim<'_>,
    public: &Public,
    now_seconds: i64,
) -> Result<Endorsement, IdentityError> {
    let (certificate, chain) = (claim.certificate, claim.chain);
    let silence = match endorsers.ek_cas.verify(Purpose::Ek, certificate, chain, public.key(), now_seconds) {
        Ok(sha256) => return Ok(Endorsement::Certificate(sha256)),
        Err(error) if error.is_silence() => error,
        Err(error) => return Err(error),
    };
    let silence = match claim.iak.map(|iak| iak::verify(&endorsers.iak_cas, iak, public.name(), now_seconds)) {
        None => silence,
        Some(Ok(sha256)) => return Ok(Endorsement::Iak(sha256)),
        Some(Err(error)) if error.is_silence() => error,
        Some(Err(error)) => return Err(error),
    };
    if claim.operator_vouches { Ok(Endorsement::Operator) } else { Err(silence) }
}

/// An EK decrypts credentials and nothing else, and the TPM that made it keeps it.
fn check_public(public: &Public) -> Result<(), IdentityError> {
    for (attribute, word) in [
        (Attributes::RESTRICTED, "is not restricted"),
        (Attributes::DECRYPT, "is not a decryption key"),
        (Attributes::FIXED_TPM, "is not fixedTPM"),
        (Attributes::FIXED_PARENT, "is not fixedParent"),
        (Attributes::SENSITIVE_DATA_ORIGIN, "is not sensitiveDataOrigin"),
    ] {
        if !public.attributes().contains(attribute) {
            return Err(IdentityError::NotAnEk(word));
        }
    }
    if public.attributes().contains(Attributes::SIGN) {
        return Err(IdentityError::NotAnEk("may also sign"));
    }
    if public.name_algorithm() == HashAlgorithm::Sha1 || public.symmetric().is_none() {
        return Err(IdentityError::NotAnEk("is of no template that credentials can be made for"));
    }
    match public.key() {
        KeyPublic::Rsa { modulus, exponent } if modulus.len() < MIN_RSA_BYTES || *exponent != 65537 => {
            Err(IdentityError::NotAnEk("is RSA of less than 2048 bits or of another exponent than 65537"))
        }
        KeyPublic::Rsa { .. } | KeyPublic::Ecc { .. } => Ok(()),
    }
}

const MIN_RSA_BYTES: usize = 2048 / 8;
