//! Tenants' secrets at rest: encrypted with a key that lives in a private file beside the database, so that a copy of
//! the database alone gives none away. They leave this process sealed to the TPM of one admitted node.

use assay_service::secret_file::{self, SecretFileError};
use assay_wire::id::{LeaseId, ProjectId};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use std::fmt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// The largest secret of a tenant.
pub const MAX_SECRET_BYTES: usize = 64 * 1024;

/// Encrypts tenants' secrets for the database.
pub struct SecretKey(LessSafeKey);

/// Why there is no key to encrypt with.
#[derive(Debug, thiserror::Error)]
pub enum SecretKeyError {
    /// The file.
    #[error("loading the key that tenants' secrets are stored under")]
    File(#[from] SecretFileError),
    /// Not replaced: with it go all secrets that were stored under it.
    #[error("{} does not hold 32 octets in base64", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

/// A stored secret does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("opening the secret of lease {lease}: it was stored under another key than tenant-secrets.key, or changed")]
pub struct StoredUnderAnotherKey {
    lease: LeaseId,
}

impl SecretKey {
    /// Reads `tenant-secrets.key` in `folder`, or makes it.
    ///
    /// # Errors
    /// See [`SecretKeyError`].
    pub fn load_or_create(folder: &Path) -> Result<Self, SecretKeyError> {
        let path = folder.join("tenant-secrets.key");
        let text = secret_file::load_or_create(&path, || STANDARD.encode(secret_file::random::<32>()).into_bytes())?;
        let key = Zeroizing::new(STANDARD.decode(text.trim_ascii()).unwrap_or_default());
        let key = UnboundKey::new(&AES_256_GCM, &key).map_err(|_| SecretKeyError::Malformed { path })?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// Encrypts `secret`, bound to lease and project.
    #[must_use]
    pub fn seal(&self, lease: LeaseId, project: &ProjectId, secret: &[u8]) -> String {
        let nonce = secret_file::random::<NONCE_LEN>();
        // Room for the tag: growing would leave the plaintext behind in freed memory.
        let mut sealed = Vec::with_capacity(secret.len() + AES_256_GCM.tag_len());
        sealed.extend_from_slice(secret);
        let tag = self.0.seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(bound_to(lease, project)),
            &mut sealed,
        );
        #[expect(clippy::expect_used, reason = "AES-GCM refuses only plaintexts of 64 GiB and more")]
        let tag = tag.expect("64 KiB can be encrypted");
        STANDARD.encode([nonce.as_slice(), &sealed, tag.as_ref()].concat())
    }

    /// Decrypts what [`SecretKey::seal`] made for this lease and project.
    ///
    /// # Errors
    /// It was made with another key, or for another lease or project.
    pub fn open(
        &self,
        lease: LeaseId,
        project: &ProjectId,
        sealed: &str,
    ) -> Result<Zeroizing<Vec<u8>>, StoredUnderAnotherKey> {
        let opened = || {
            let mut bytes = Zeroizing::new(STANDARD.decode(sealed).ok()?);
            let (nonce, rest) = bytes.split_at_mut_checked(NONCE_LEN)?;
            let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
            let plain = self.0.open_in_place(nonce, Aad::from(bound_to(lease, project)), rest).ok()?;
            Some(Zeroizing::new(plain.to_vec()))
        };
        opened().ok_or(StoredUnderAnotherKey { lease })
    }
}

fn bound_to(lease: LeaseId, project: &ProjectId) -> Vec<u8> {
    format!("{lease} {project}").into_bytes()
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(<redacted>)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_secret_opens_for_its_lease_project_and_key_only() {
        let folder = tempfile::tempdir().unwrap();
        let key = SecretKey::load_or_create(folder.path()).unwrap();
        let (lease, alpha, beta) = (LeaseId::random(), "alpha".parse().unwrap(), "beta".parse().unwrap());
        let sealed = key.seal(lease, &alpha, b"disk key");
        assert!(!sealed.contains("disk key"));
        let again = SecretKey::load_or_create(folder.path()).unwrap();
        assert_eq!(again.open(lease, &alpha, &sealed).unwrap().as_slice(), b"disk key");
        assert!(again.open(lease, &beta, &sealed).is_err());
        assert!(again.open(LeaseId::random(), &alpha, &sealed).is_err());
        let other = tempfile::tempdir().unwrap();
        assert!(SecretKey::load_or_create(other.path()).unwrap().open(lease, &alpha, &sealed).is_err());
        assert!(!format!("{key:?}").contains("key\""));
    }

    #[test]
    fn a_key_file_that_was_cut_short_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        secret_file::write(&folder.path().join("tenant-secrets.key"), b"AAAA").unwrap();
        assert!(matches!(SecretKey::load_or_create(folder.path()), Err(SecretKeyError::Malformed { .. })));
    }

    proptest! {
        #[test]
        fn no_stored_text_makes_it_panic(text in "[A-Za-z0-9+/=]{0,80}") {
            let folder = tempfile::tempdir().unwrap();
            let key = SecretKey::load_or_create(folder.path()).unwrap();
            prop_assert!(key.open(LeaseId::random(), &"alpha".parse().unwrap(), &text).is_err());
        }
    }
}
