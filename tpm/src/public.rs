//! `TPMT_PUBLIC` (TPM 2.0 Part 2, 12.2.4) of asymmetric keys: what an agent says its EK and AK are.
//!
//! Nobody vouches for a public area by itself: an EK's is vouched for by its certificate, an AK's by credential
//! activation, which binds its name.

use crate::algorithm::HashAlgorithm;
use crate::name::Name;
use crate::reader::{DecodeError, Order, Reader};

/// A key's public area.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Public {
    name_algorithm: HashAlgorithm,
    name: Name,
    attributes: Attributes,
    symmetric: Option<Symmetric>,
    scheme: Option<Scheme>,
    key: KeyPublic,
}

impl Public {
    /// Parses a `TPMT_PUBLIC`, all of it.
    ///
    /// # Errors
    /// Not an RSA or ECC key's public area, of a size that TPMs have.
    pub fn parse(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("TPMT_PUBLIC", bytes, Order::Big);
        let kind = reader.u16()?;
        let name_algorithm = hash(&mut reader, "nameAlg")?;
        let attributes = Attributes(reader.u32()?);
        reader.sized("authPolicy size", MAX_DIGEST_BYTES)?;
        let symmetric = symmetric(&mut reader)?;
        let (scheme, key) = match kind {
            ALG_RSA => rsa(&mut reader)?,
            ALG_ECC => ecc(&mut reader)?,
            other => return Err(reader.value("type", other)),
        };
        reader.finish()?;
        Ok(Self { name_algorithm, name: Name::of(name_algorithm, bytes), attributes, symmetric, scheme, key })
    }

    /// The object's name, computed from the octets that were parsed.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The algorithm of the name.
    #[must_use]
    pub fn name_algorithm(&self) -> HashAlgorithm {
        self.name_algorithm
    }

    /// What the TPM lets the key do.
    #[must_use]
    pub fn attributes(&self) -> Attributes {
        self.attributes
    }

    /// The cipher that protects what the key, if a storage key, is parent of.
    #[must_use]
    pub fn symmetric(&self) -> Option<Symmetric> {
        self.symmetric
    }

    /// The signing scheme that the key is bound to, if any.
    #[must_use]
    pub fn scheme(&self) -> Option<Scheme> {
        self.scheme
    }

    /// The key itself.
    #[must_use]
    pub fn key(&self) -> &KeyPublic {
        &self.key
    }
}

/// `TPMA_OBJECT` (Part 2, 8.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes(u32);

impl Attributes {
    /// The key cannot leave its TPM.
    pub const FIXED_TPM: Self = Self(1 << 1);
    /// The key cannot get another parent.
    pub const FIXED_PARENT: Self = Self(1 << 4);
    /// The TPM made the private part itself; nobody supplied it.
    pub const SENSITIVE_DATA_ORIGIN: Self = Self(1 << 5);
    /// The key works only on structures that the TPM made.
    pub const RESTRICTED: Self = Self(1 << 16);
    /// The key decrypts.
    pub const DECRYPT: Self = Self(1 << 17);
    /// The key signs.
    pub const SIGN: Self = Self(1 << 18);

    /// Whether all of `wanted` are set.
    #[must_use]
    pub fn contains(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }

    /// The raw bits.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }
}

/// `TPMT_SYM_DEF_OBJECT`, of AES in CFB mode: the only one that EK templates use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symmetric {
    /// 128, 192 or 256.
    pub key_bits: u16,
}

/// A signing scheme with its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// RSASSA-PKCS1-v1_5 (RFC 8017 section 8.2).
    RsaSsa(HashAlgorithm),
    /// RSASSA-PSS (RFC 8017 section 8.1).
    RsaPss(HashAlgorithm),
    /// ECDSA.
    Ecdsa(HashAlgorithm),
    /// A scheme that nothing here accepts, by its `TPM_ALG_ID`.
    Other(u16),
}

/// The public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPublic {
    /// RSA.
    Rsa {
        /// Modulus, big-endian, without leading zeros.
        modulus: Vec<u8>,
        /// Public exponent (a zero on the wire means 65537).
        exponent: u32,
    },
    /// ECC.
    Ecc {
        /// The curve.
        curve: Curve,
        /// Affine coordinate, big-endian, padded to the size of the field. Not checked to be on the curve.
        x: Vec<u8>,
        /// The other coordinate, likewise.
        y: Vec<u8>,
    },
}

/// NIST curves (TCG Algorithm Registry, `TPM_ECC_CURVE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// P-256.
    P256,
    /// P-384.
    P384,
}

impl Curve {
    /// Octets in a coordinate.
    #[must_use]
    pub fn coordinate_bytes(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
        }
    }
}

pub(crate) fn hash(reader: &mut Reader<'_>, field: &'static str) -> Result<HashAlgorithm, DecodeError> {
    let id = reader.u16()?;
    HashAlgorithm::from_id(id).ok_or_else(|| reader.value(field, id))
}

fn symmetric(reader: &mut Reader<'_>) -> Result<Option<Symmetric>, DecodeError> {
    let algorithm = reader.u16()?;
    match algorithm {
        ALG_NULL => Ok(None),
        ALG_AES => {
            let key_bits = reader.u16()?;
            let mode = reader.u16()?;
            if !matches!(key_bits, 128 | 192 | 256) {
                return Err(reader.value("symmetric key size", key_bits));
            }
            if mode != ALG_CFB {
                return Err(reader.value("symmetric mode", mode));
            }
            Ok(Some(Symmetric { key_bits }))
        }
        other => Err(reader.value("symmetric algorithm", other)),
    }
}

fn scheme(reader: &mut Reader<'_>) -> Result<Option<Scheme>, DecodeError> {
    let algorithm = reader.u16()?;
    Ok(match algorithm {
        ALG_NULL => None,
        ALG_RSASSA => Some(Scheme::RsaSsa(hash(reader, "scheme hash")?)),
        ALG_RSAPSS => Some(Scheme::RsaPss(hash(reader, "scheme hash")?)),
        ALG_ECDSA => Some(Scheme::Ecdsa(hash(reader, "scheme hash")?)),
        ALG_RSAES => Some(Scheme::Other(algorithm)),
        ALG_OAEP | ALG_ECDH | ALG_SM2 | ALG_ECSCHNORR | ALG_ECMQV => {
            reader.u16()?;
            Some(Scheme::Other(algorithm))
        }
        ALG_ECDAA => {
            reader.u32()?; // hash and counter
            Some(Scheme::Other(algorithm))
        }
        other => return Err(reader.value("scheme", other)),
    })
}

fn rsa(reader: &mut Reader<'_>) -> Result<(Option<Scheme>, KeyPublic), DecodeError> {
    let scheme = scheme(reader)?;
    let key_bits = reader.u16()?;
    let exponent = match reader.u32()? {
        0 => DEFAULT_RSA_EXPONENT,
        other => other,
    };
    let modulus = reader.sized("modulus size", MAX_RSA_BYTES)?;
    // An oversize, short or zero-padded modulus would be another key than the name says.
    let whole = modulus.len() * 8 == usize::from(key_bits) && modulus.first().is_some_and(|top| top & 0x80 != 0);
    if !whole {
        return Err(reader.value("RSA key size", key_bits));
    }
    Ok((scheme, KeyPublic::Rsa { modulus: modulus.to_vec(), exponent }))
}

fn ecc(reader: &mut Reader<'_>) -> Result<(Option<Scheme>, KeyPublic), DecodeError> {
    let scheme = scheme(reader)?;
    let curve = match reader.u16()? {
        0x0003 => Curve::P256,
        0x0004 => Curve::P384,
        other => return Err(reader.value("curve", other)),
    };
    let kdf = reader.u16()?;
    if kdf != ALG_NULL {
        reader.u16()?; // its hash; no key that we accept uses a KDF scheme of its own
    }
    let size = curve.coordinate_bytes();
    let x = coordinate(reader.sized("x size", size)?, size);
    let y = coordinate(reader.sized("y size", size)?, size);
    Ok((scheme, KeyPublic::Ecc { curve, x, y }))
}

/// Pads a coordinate: TPMs may leave out leading zeros (Part 2, 11.2.5.1).
pub(crate) fn coordinate(octets: &[u8], size: usize) -> Vec<u8> {
    let mut padded = vec![0; size.saturating_sub(octets.len())];
    padded.extend_from_slice(octets);
    padded
}

const DEFAULT_RSA_EXPONENT: u32 = 65537;
/// The largest digest of any algorithm.
pub(crate) const MAX_DIGEST_BYTES: usize = 64;
/// RSA-4096.
pub(crate) const MAX_RSA_BYTES: usize = 512;

const ALG_RSA: u16 = 0x0001;
const ALG_AES: u16 = 0x0006;
const ALG_NULL: u16 = 0x0010;
pub(crate) const ALG_RSASSA: u16 = 0x0014;
const ALG_RSAES: u16 = 0x0015;
pub(crate) const ALG_RSAPSS: u16 = 0x0016;
const ALG_OAEP: u16 = 0x0017;
pub(crate) const ALG_ECDSA: u16 = 0x0018;
const ALG_ECDH: u16 = 0x0019;
const ALG_ECDAA: u16 = 0x001a;
const ALG_SM2: u16 = 0x001b;
const ALG_ECSCHNORR: u16 = 0x001c;
const ALG_ECMQV: u16 = 0x001d;
const ALG_ECC: u16 = 0x0023;
const ALG_CFB: u16 = 0x0043;
