//! `TPM2_MakeCredential` in software (TPM 2.0 Part 1, section 24): a secret that only the TPM which holds both an
//! EK and an AK can open.

use crate::algorithm::HashAlgorithm;
use crate::kdf::{hmac_algorithm, kdfa, kdfe};
use crate::public::{Curve, KeyPublic, Public};
use crate::reader::DecodeError;
use assay_wire::agent::Credential;
use openssl::bn::{BigNum, BigNumContext};
use openssl::derive::Deriver;
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::md::{Md, MdRef};
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::pkey_ctx::PkeyCtx;
use openssl::rsa::{Padding, Rsa};
use openssl::symm::{Cipher, Crypter, Mode};
use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};
use zeroize::Zeroizing;

/// Why no credential could be made.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The EK's public area cannot be read.
    #[error("making a credential: EK public area")]
    Ek(#[from] DecodeError),
    /// The EK cannot be what a credential is made for.
    #[error("making a credential: EK {0}")]
    UnfitEk(&'static str),
    /// The AK's name is not a name.
    #[error("making a credential: AK name has {bytes} octets")]
    AkName {
        /// How many.
        bytes: usize,
    },
    /// `TPM2_ActivateCredential` gives back at most one digest of the EK's name algorithm.
    #[error("making a credential: secret has {bytes} octets, the EK takes {limit}")]
    SecretSize {
        /// How many there are.
        bytes: usize,
        /// How many there may be.
        limit: usize,
    },
    /// No randomness.
    #[error("making a credential: no randomness from the system")]
    Random,
    /// The library refused, for instance a point that is not on its curve.
    #[error("making a credential: encrypting to the EK")]
    Crypto(#[from] ErrorStack),
}

/// Makes a credential of `secret` for the TPM with the EK `ek_public` (`TPMT_PUBLIC`) and the object named `ak_name`
/// (algorithm and digest).
///
/// # Errors
/// See [`CredentialError`].
pub fn make_credential(ek_public: &[u8], ak_name: &[u8], secret: &[u8]) -> Result<Credential, CredentialError> {
    let ek = Public::parse(ek_public)?;
    let hash = ek.name_algorithm();
    if hash == HashAlgorithm::Sha1 {
        return Err(CredentialError::UnfitEk("uses SHA-1"));
    }
    let Some(symmetric) = ek.symmetric() else {
        return Err(CredentialError::UnfitEk("is not a storage key: it has no symmetric cipher"));
    };
    if !(MIN_NAME_BYTES..=MAX_NAME_BYTES).contains(&ak_name.len()) {
        return Err(CredentialError::AkName { bytes: ak_name.len() });
    }
    if secret.is_empty() || secret.len() > hash.digest_bytes() {
        return Err(CredentialError::SecretSize { bytes: secret.len(), limit: hash.digest_bytes() });
    }
    let (seed, encrypted_secret) = match ek.key() {
        KeyPublic::Rsa { modulus, exponent } => rsa_seed(hash, modulus, *exponent)?,
        KeyPublic::Ecc { curve, x, y } => ecc_seed(hash, *curve, x, y)?,
    };

    let key = kdfa(hash, &seed, "STORAGE", ak_name, &[], symmetric.key_bits / 8);
    let mut identity = Zeroizing::new(Vec::with_capacity(2 + secret.len()));
    identity.extend_from_slice(&u16_of(secret.len()).to_be_bytes());
    identity.extend_from_slice(secret);
    let identity = encrypt_cfb(symmetric.key_bits, &key, &identity)?;

    let key = kdfa(hash, &seed, "INTEGRITY", &[], &[], u16_of(hash.digest_bytes()));
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac_algorithm(hash), &key));
    context.update(&identity);
    context.update(ak_name);
    let outer = context.sign();

    let mut id_object = u16_of(outer.as_ref().len()).to_be_bytes().to_vec();
    id_object.extend_from_slice(outer.as_ref());
    id_object.extend_from_slice(&identity);
    Ok(Credential { id_object, encrypted_secret })
}

/// A random seed, and the seed under OAEP (Part 1, B.10.4).
fn rsa_seed(
    hash: HashAlgorithm,
    modulus: &[u8],
    exponent: u32,
) -> Result<(Zeroizing<Vec<u8>>, Vec<u8>), CredentialError> {
    let mut seed = Zeroizing::new(vec![0; hash.digest_bytes()]);
    SystemRandom::new().fill(&mut seed).map_err(|_| CredentialError::Random)?;
    let rsa = Rsa::from_public_components(BigNum::from_slice(modulus)?, BigNum::from_u32(exponent)?)?;
    let key = PKey::from_rsa(rsa)?;
    let mut context = PkeyCtx::new(&key)?;
    context.encrypt_init()?;
    context.set_rsa_padding(Padding::PKCS1_OAEP)?;
    context.set_rsa_oaep_md(md(hash))?;
    context.set_rsa_mgf1_md(md(hash))?;
    context.set_rsa_oaep_label(b"IDENTITY\0")?;
    let mut encrypted = Vec::new();
    context.encrypt_to_vec(&seed, &mut encrypted)?;
    Ok((seed, encrypted))
}

/// A seed agreed with the EK by an ephemeral key, and that key's point (Part 1, C.6.4).
fn ecc_seed(
    hash: HashAlgorithm,
    curve: Curve,
    x: &[u8],
    y: &[u8],
) -> Result<(Zeroizing<Vec<u8>>, Vec<u8>), CredentialError> {
    let group = EcGroup::from_curve_name(match curve {
        Curve::P256 => Nid::X9_62_PRIME256V1,
        Curve::P384 => Nid::SECP384R1,
    })?;
    let size = i32::try_from(curve.coordinate_bytes()).unwrap_or(i32::MAX);
    // OpenSSL refuses coordinates that are not on the curve here.
    let ek = EcKey::from_public_key_affine_coordinates(&group, &*BigNum::from_slice(x)?, &*BigNum::from_slice(y)?)?;
    let ephemeral = EcKey::generate(&group)?;
    let (mut eph_x, mut eph_y) = (BigNum::new()?, BigNum::new()?);
    let mut numbers = BigNumContext::new()?;
    ephemeral.public_key().affine_coordinates(&group, &mut eph_x, &mut eph_y, &mut numbers)?;
    let (eph_x, eph_y) = (eph_x.to_vec_padded(size)?, eph_y.to_vec_padded(size)?);

    let (ephemeral, ek) = (PKey::from_ec_key(ephemeral)?, PKey::from_ec_key(ek)?);
    let mut deriver = Deriver::new(&ephemeral)?;
    deriver.set_peer(&ek)?;
    let z = Zeroizing::new(deriver.derive_to_vec()?);
    let seed = kdfe(hash, &z, "IDENTITY", &eph_x, x, u16_of(hash.digest_bytes()));

    let mut point = Vec::with_capacity(4 + eph_x.len() + eph_y.len());
    for coordinate in [eph_x, eph_y] {
        point.extend_from_slice(&u16_of(coordinate.len()).to_be_bytes());
        point.extend_from_slice(&coordinate);
    }
    Ok((seed, point))
}

/// AES-CFB with a zero IV, as every use of a key derived from a fresh seed may have.
fn encrypt_cfb(key_bits: u16, key: &[u8], plain: &[u8]) -> Result<Vec<u8>, ErrorStack> {
    let cipher = match key_bits {
        128 => Cipher::aes_128_cfb128(),
        192 => Cipher::aes_192_cfb128(),
        _ => Cipher::aes_256_cfb128(), // the parser lets no fourth size through
    };
    let mut crypter = Crypter::new(cipher, Mode::Encrypt, key, Some(&[0; 16]))?;
    let mut encrypted = vec![0; plain.len() + cipher.block_size()];
    let mut count = crypter.update(plain, &mut encrypted)?;
    count += crypter.finalize(&mut encrypted[count..])?;
    encrypted.truncate(count);
    Ok(encrypted)
}

fn md(hash: HashAlgorithm) -> &'static MdRef {
    match hash {
        HashAlgorithm::Sha1 => Md::sha1(),
        HashAlgorithm::Sha256 => Md::sha256(),
        HashAlgorithm::Sha384 => Md::sha384(),
        HashAlgorithm::Sha512 => Md::sha512(),
    }
}

/// Sizes here are of digests and coordinates: at most 64.
fn u16_of(size: usize) -> u16 {
    u16::try_from(size).unwrap_or(u16::MAX)
}

/// Algorithm and a SHA-256 digest.
const MIN_NAME_BYTES: usize = 2 + 32;
/// Algorithm and a SHA-512 digest.
const MAX_NAME_BYTES: usize = 2 + 64;
