//! Grants sealed to one TPM: the payload under AES-256-GCM, the key under a credential for (EK, AK). On the boot
//! path: imaging seals the CHAP secret (step 9), everything between carries it, the agent's TPM opens it.

use assay_wire::agent::SealedGrant;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

/// Why a grant could not be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// No credential for this EK and AK.
    #[cfg(feature = "make-credential")]
    #[error("sealing a grant to the node's TPM")]
    Credential(#[from] crate::credential::CredentialError),
    /// No randomness.
    #[error("sealing a grant: no randomness from the system")]
    Random,
    /// The payload is larger than any grant.
    #[error("sealing a grant: {bytes} octets are more than any grant has")]
    TooLarge {
        /// How many.
        bytes: usize,
    },
    /// The sealed grant's parts have the wrong sizes.
    #[error("opening a grant: its {part} has {bytes} octets")]
    Malformed {
        /// Which part.
        part: &'static str,
        /// Octets in it.
        bytes: usize,
    },
    /// Wrong key, wrong admission, or changed on the way.
    #[error("opening a grant: it is not for this key and admission, or was changed")]
    NotAuthentic,
}

/// Seals `grant` so that only the TPM with the EK `ek_public` (`TPMT_PUBLIC`) and the AK named `ak_name` opens it, and
/// only as part of `admission`.
///
/// # Errors
/// See [`SealError`].
#[cfg(feature = "make-credential")]
pub fn seal_grant(
    ek_public: &[u8],
    ak_name: &[u8],
    admission: assay_wire::id::AdmissionId,
    grant: &[u8],
) -> Result<SealedGrant, SealError> {
    use ring::rand::{SecureRandom as _, SystemRandom};

    if grant.len() > MAX_GRANT_BYTES {
        return Err(SealError::TooLarge { bytes: grant.len() });
    }
    let random = SystemRandom::new();
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    let mut nonce = [0; NONCE_LEN];
    random.fill(&mut *key).map_err(|_| SealError::Random)?;
    random.fill(&mut nonce).map_err(|_| SealError::Random)?;
    let credential = crate::credential::make_credential(ek_public, ak_name, &*key)?;

    // Room for the tag: growing would leave the plaintext behind in freed memory.
    let mut sealed = Vec::with_capacity(grant.len() + AES_256_GCM.tag_len());
    sealed.extend_from_slice(grant);
    cipher(&key)?
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(admission.as_bytes()), &mut sealed)
        .map_err(|_| SealError::TooLarge { bytes: grant.len() })?;
    Ok(SealedGrant { admission, credential, nonce: nonce.to_vec(), ciphertext: sealed })
}

/// Opens `sealed` with the `key` that `TPM2_ActivateCredential` gave for its credential.
///
/// # Errors
/// See [`SealError`].
pub fn open_grant(key: &[u8; KEY_BYTES], sealed: &SealedGrant) -> Result<Zeroizing<Vec<u8>>, SealError> {
    let nonce: [u8; NONCE_LEN] = sealed
        .nonce
        .as_slice()
        .try_into()
        .map_err(|_| SealError::Malformed { part: "nonce", bytes: sealed.nonce.len() })?;
    let bytes = sealed.ciphertext.len();
    if bytes > MAX_GRANT_BYTES + AES_256_GCM.tag_len() {
        return Err(SealError::Malformed { part: "ciphertext", bytes });
    }
    let mut opened = Zeroizing::new(sealed.ciphertext.clone());
    let plain_bytes = cipher(key)?
        .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(sealed.admission.as_bytes()), &mut opened)
        .map_err(|_| SealError::NotAuthentic)?
        .len();
    opened.truncate(plain_bytes);
    Ok(opened)
}

fn cipher(key: &[u8; KEY_BYTES]) -> Result<LessSafeKey, SealError> {
    UnboundKey::new(&AES_256_GCM, key).map(LessSafeKey::new).map_err(|_| SealError::NotAuthentic)
}

const KEY_BYTES: usize = 32;
/// A grant is a few hundred octets of JSON; a tenant's secret may be as long as this.
const MAX_GRANT_BYTES: usize = 64 * 1024;
