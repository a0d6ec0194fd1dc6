//! `SubjectPublicKeyInfo` (RFC 5280 section 4.1.2.7) of a TPM's key: what the key is called outside of TPMs, whatever
//! the public area around it says.

use crate::public::{Curve, KeyPublic};

impl KeyPublic {
    /// The key as a DER `SubjectPublicKeyInfo`, in the one form that OpenSSL writes: RSA with a NULL parameter
    /// (RFC 3279), ECC with a named curve and an uncompressed point (RFC 5480).
    #[must_use]
    pub fn to_spki(&self) -> Vec<u8> {
        let (algorithm, key) = match self {
            Self::Rsa { modulus, exponent } => {
                let key = element(SEQUENCE, &[integer(modulus), integer(&exponent.to_be_bytes())].concat());
                ([OID_RSA, NULL].concat(), key)
            }
            Self::Ecc { curve, x, y } => {
                let named = match curve {
                    Curve::P256 => OID_P256,
                    Curve::P384 => OID_P384,
                };
                ([OID_EC, named].concat(), [&[UNCOMPRESSED][..], x, y].concat())
            }
        };
        let bits = element(BIT_STRING, &[&[0][..], &key].concat());
        element(SEQUENCE, &[element(SEQUENCE, &algorithm), bits].concat())
    }
}

/// A non-negative INTEGER: no leading zeros but the one that keeps it from being negative.
fn integer(number: &[u8]) -> Vec<u8> {
    let first = number.iter().position(|octet| *octet != 0).unwrap_or(number.len());
    let number = &number[first..];
    let sign: &[u8] = if number.first().is_none_or(|top| top & 0x80 != 0) { &[0] } else { &[] };
    element(INTEGER, &[sign, number].concat())
}

fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let first = length.iter().position(|octet| *octet != 0).unwrap_or(length.len() - 1);
    let length = &length[first..];
    let mut element = vec![tag];
    if content.len() >= 0x80 {
        element.push(0x80 | u8::try_from(length.len()).unwrap_or(0)); // eight at most
    }
    element.extend_from_slice(length);
    element.extend_from_slice(content);
    element
}

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const UNCOMPRESSED: u8 = 0x04;
const NULL: &[u8] = &[0x05, 0x00];
/// `rsaEncryption`, 1.2.840.113549.1.1.1.
const OID_RSA: &[u8] = &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
/// `id-ecPublicKey`, 1.2.840.10045.2.1.
const OID_EC: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
/// 1.2.840.10045.3.1.7.
const OID_P256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// 1.3.132.0.34.
const OID_P384: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
