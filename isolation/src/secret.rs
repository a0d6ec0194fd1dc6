//! BMC passwords at rest: AES-256-GCM under a key in a private file, bound to the node's name so that one node's
//! password cannot be put in another's place.

use assay_service::secret_file::{self, SecretFileError};
use assay_wire::id::NodeId;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use std::fmt;
use std::path::Path;

/// The key that seals passwords.
pub struct PasswordKey(LessSafeKey);

/// A password, in memory. `Debug` does not show it.
#[derive(Clone)]
pub struct Password(String);

/// Why a password could not be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    /// The key file.
    #[error("using the BMC password key")]
    KeyFile(#[from] SecretFileError),
    /// The key file holds something else than a key.
    #[error("the BMC password key is not 32 octets")]
    KeyLength,
    /// Sealing failed.
    #[error("sealing the BMC password of node {0}")]
    Seal(NodeId),
    /// What is on record is not what was sealed, or the key is another one.
    #[error("the BMC password of node {0} does not open with this key: was the key file replaced?")]
    Open(NodeId),
}

impl PasswordKey {
    /// Reads the key at `path`; makes one where there is none.
    ///
    /// # Errors
    /// See [`PasswordError`].
    pub fn load_or_create(path: &Path) -> Result<Self, PasswordError> {
        let key = secret_file::load_or_create(path, || secret_file::random::<32>().to_vec())?;
        let key = UnboundKey::new(&AES_256_GCM, &key).map_err(|_| PasswordError::KeyLength)?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// Base64 of nonce, ciphertext and tag. The nonce is random: with one sealing a node, 96 bits do not repeat.
    ///
    /// # Errors
    /// See [`PasswordError`].
    pub fn seal(&self, node: &NodeId, password: &str) -> Result<String, PasswordError> {
        let nonce = secret_file::random::<NONCE_LEN>();
        let mut sealed = password.as_bytes().to_vec();
        self.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad(node), &mut sealed)
            .map_err(|_| PasswordError::Seal(node.clone()))?;
        Ok(STANDARD.encode([nonce.as_slice(), &sealed].concat()))
    }

    /// Opens what [`PasswordKey::seal`] made for the same node.
    ///
    /// # Errors
    /// See [`PasswordError`].
    pub fn open(&self, node: &NodeId, sealed: &str) -> Result<Password, PasswordError> {
        let cannot = || PasswordError::Open(node.clone());
        let sealed = STANDARD.decode(sealed).map_err(|_| cannot())?;
        let (nonce, ciphertext) = sealed.split_first_chunk::<NONCE_LEN>().ok_or_else(cannot)?;
        let mut ciphertext = ciphertext.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = self.0.open_in_place(nonce, aad(node), &mut ciphertext).map_err(|_| cannot())?;
        String::from_utf8(plain.to_vec()).map(Password).map_err(|_| cannot())
    }
}

impl fmt::Debug for PasswordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordKey(<redacted>)")
    }
}

impl Password {
    /// A password that was typed, or is a test's.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The password itself, for the BMC alone.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(<redacted>)")
    }
}

fn aad(node: &NodeId) -> Aad<Vec<u8>> {
    Aad::from(format!("assay bmc password of {node}").into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_opens_for_its_node_and_key_only() {
        let folder = tempfile::tempdir().unwrap();
        let key = PasswordKey::load_or_create(&folder.path().join("key")).unwrap();
        let (n1, n2): (NodeId, NodeId) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let sealed = key.seal(&n1, "calvin").unwrap();
        assert!(!sealed.contains("calvin"));
        let again = PasswordKey::load_or_create(&folder.path().join("key")).unwrap();
        assert_eq!(again.open(&n1, &sealed).unwrap().expose(), "calvin");
        assert!(key.open(&n2, &sealed).is_err());
        assert!(key.open(&n1, "").is_err());
        let other = PasswordKey::load_or_create(&folder.path().join("other")).unwrap();
        assert!(other.open(&n1, &sealed).is_err());
        assert_eq!(format!("{:?}", key.open(&n1, &sealed).unwrap()), "Password(<redacted>)");
    }
}
