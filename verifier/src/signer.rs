//! The key that signs attestation results: Ed25519, made at the first start, kept in a private file.

use assay_service::secret_file::{self, SecretFileError};
use assay_wire::result::{Claims, SignedResult, VerifierKey};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use std::fmt;
use std::path::Path;

/// Signs attestation results.
pub struct Signer(Ed25519KeyPair);

/// Why there is no signing key.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    /// The file.
    #[error("loading the key that signs attestation results")]
    File(#[from] SecretFileError),
    /// Its content.
    #[error("the file {path} holds no Ed25519 key in PKCS#8: {problem}")]
    Key {
        /// The file.
        path: String,
        /// What is wrong.
        problem: String,
    },
}

impl Signer {
    /// Loads `result-signing.key` from `folder`, or makes it.
    ///
    /// # Errors
    /// See [`SignerError`].
    pub fn load_or_create(folder: &Path) -> Result<Self, SignerError> {
        let path = folder.join("result-signing.key");
        let fresh = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let unusable = |problem: String| SignerError::Key { path: path.display().to_string(), problem };
        let fresh = fresh.map_err(|cause| unusable(cause.to_string()))?;
        let pkcs8 = secret_file::load_or_create(&path, || fresh.as_ref().to_vec())?;
        Ed25519KeyPair::from_pkcs8(&pkcs8).map(Self).map_err(|cause| unusable(cause.to_string()))
    }

    /// Signs.
    #[must_use]
    pub fn sign(&self, claims: &Claims) -> SignedResult {
        SignedResult::sign(claims, &self.0)
    }

    /// The key that relying parties must trust.
    #[must_use]
    pub fn public(&self) -> VerifierKey {
        VerifierKey::of(&self.0)
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Signer").field(&self.public()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_survives_a_restart_and_garbage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let first = Signer::load_or_create(folder.path()).unwrap();
        assert_eq!(Signer::load_or_create(folder.path()).unwrap().public(), first.public());
        let path = folder.path().join("result-signing.key");
        secret_file::write(&path, b"garbage").unwrap();
        let error = Signer::load_or_create(folder.path()).unwrap_err();
        assert!(error.to_string().contains("result-signing.key"), "{error}");
    }
}
