//! `TPMT_SIGNATURE` (TPM 2.0 Part 2, 11.3.4).

use crate::public::{ALG_ECDSA, ALG_RSAPSS, ALG_RSASSA, MAX_RSA_BYTES, Scheme, hash};
use crate::reader::{DecodeError, Order, Reader};

/// A signature as it was sent; says which scheme it claims to be, which must be compared with the key's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature<'a> {
    /// The scheme.
    pub scheme: Scheme,
    /// The number or numbers.
    pub value: SignatureValue<'a>,
}

/// The number or numbers of a signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SignatureValue<'a> {
    /// RSA: one big-endian number.
    Rsa(&'a [u8]),
    /// ECDSA.
    Ecdsa {
        /// Big-endian, perhaps without leading zeros.
        r: &'a [u8],
        /// Likewise.
        s: &'a [u8],
    },
}

impl<'a> Signature<'a> {
    /// Parses a `TPMT_SIGNATURE`, all of it.
    ///
    /// # Errors
    /// Not one RSASSA, RSAPSS or ECDSA signature.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("TPMT_SIGNATURE", bytes, Order::Big);
        let algorithm = reader.u16()?;
        let signature = match algorithm {
            ALG_RSASSA | ALG_RSAPSS => {
                let hash = hash(&mut reader, "signature hash")?;
                let scheme = if algorithm == ALG_RSASSA { Scheme::RsaSsa(hash) } else { Scheme::RsaPss(hash) };
                Self { scheme, value: SignatureValue::Rsa(reader.sized("signature size", MAX_RSA_BYTES)?) }
            }
            ALG_ECDSA => {
                let scheme = Scheme::Ecdsa(hash(&mut reader, "signature hash")?);
                let r = reader.sized("signatureR size", MAX_SCALAR_BYTES)?;
                let s = reader.sized("signatureS size", MAX_SCALAR_BYTES)?;
                Self { scheme, value: SignatureValue::Ecdsa { r, s } }
            }
            other => return Err(reader.value("signature algorithm", other)),
        };
        reader.finish()?;
        Ok(signature)
    }
}

/// P-384, the largest curve that we accept.
const MAX_SCALAR_BYTES: usize = 48;
