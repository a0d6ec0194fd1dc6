//! AKs: keys that are fit to sign quotes, and the check of what they signed. What vouches for an AK: credential
//! activation against an EK that is believed ([`crate::identity`]).

use super::QuoteError;
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::name::Name;
use assay_tpm::public::{Attributes, Curve, KeyPublic, Public, Scheme};
use assay_tpm::reader::DecodeError;
use assay_tpm::signature::{Signature, SignatureValue};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::rsa::{Padding, Rsa};
use openssl::sign::{RsaPssSaltlen, Verifier};
use ring::signature as ring_signature;

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
            (KeyPublic::Ecc { curve, x, y }, Scheme::Ecdsa(hash)) => {
                let wanted = match curve {
                    Curve::P256 => HashAlgorithm::Sha256,
                    Curve::P384 => HashAlgorithm::Sha384,
                };
                hash == wanted && is_on_curve(*curve, x, y)
            }
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

    /// The key itself.
    pub(crate) fn key(&self) -> &KeyPublic {
        self.public.key()
    }

    /// Checks a `TPMT_SIGNATURE` over `message`; gives the hash of the AK's scheme.
    ///
    /// # Errors
    /// Not a signature, of another scheme than the AK's, or not by this AK.
    pub(crate) fn verify_signature(&self, message: &[u8], signature: &[u8]) -> Result<HashAlgorithm, QuoteError> {
        let signature = Signature::parse(signature)?;
        if signature.scheme != self.scheme {
            return Err(QuoteError::Scheme { found: signature.scheme, expected: self.scheme });
        }
        self.verify(message, &signature.value)
    }

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

/// What a signature by a point off its curve means would be the library's accident: it is nobody's key.
fn is_on_curve(curve: Curve, x: &[u8], y: &[u8]) -> bool {
    let read = || -> Result<_, ErrorStack> {
        let group = EcGroup::from_curve_name(match curve {
            Curve::P256 => Nid::X9_62_PRIME256V1,
            Curve::P384 => Nid::SECP384R1,
        })?;
        EcKey::from_public_key_affine_coordinates(&group, &*BigNum::from_slice(x)?, &*BigNum::from_slice(y)?)
    };
    read().is_ok()
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

const MIN_RSA_BYTES: usize = 2048 / 8;
/// OpenSSL: take the salt's length from the signature.
const RSA_PSS_SALTLEN_AUTO: i32 = -2;
