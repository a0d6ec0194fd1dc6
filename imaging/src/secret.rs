//! CHAP secrets: made at random, and kept only encrypted.
//!
//! A grant is sealed to the node's TPM and cannot be made again, so the secret in it must outlive a restart of imaging.
//! In the database it is encrypted with a key that lives in a private file beside it: a copy of the database alone
//! opens no disk.

use assay_service::secret_file::{self, SecretFileError};
use assay_wire::id::AdmissionId;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use std::fmt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Characters of a CHAP secret: iPXE and Windows take 12 to 16 (RFC 7143 section 12.1.3 wants at least 96 bits).
const CHAP_SECRET_CHARACTERS: usize = 16;
/// 64 printable characters that no shell, URL or open-iscsi configuration reads as anything else: 6 bits each.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The shared secret of one admission's CHAP. Redacted when shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ChapSecret(Zeroizing<String>);

impl ChapSecret {
    /// 96 bits from the operating system.
    pub(crate) fn random() -> Self {
        let random = secret_file::random::<CHAP_SECRET_CHARACTERS>();
        Self(Zeroizing::new(random.iter().map(|octet| char::from(ALPHABET[usize::from(octet % 64)])).collect()))
    }

    /// The secret itself.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ChapSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChapSecret(<redacted>)")
    }
}

/// Encrypts secrets for the database.
pub(crate) struct SecretKey(LessSafeKey);

/// Why there is no key to encrypt with.
#[derive(Debug, thiserror::Error)]
pub enum SecretKeyError {
    /// The file.
    #[error("loading the key that CHAP secrets are stored under")]
    File(#[from] SecretFileError),
    /// Not replaced: with it go all secrets that were stored under it.
    #[error("{} does not hold 32 octets in base64", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

/// A stored secret does not open: the key file or the row is another one's.
#[derive(Debug, thiserror::Error)]
#[error("opening the stored CHAP secret of admission {admission}")]
pub(crate) struct SealedWithAnotherKey {
    admission: AdmissionId,
}

impl SecretKey {
    /// Reads the key from `path`, or makes it.
    pub(crate) fn load_or_create(path: &Path) -> Result<Self, SecretKeyError> {
        let text = secret_file::load_or_create(path, || STANDARD.encode(secret_file::random::<32>()).into_bytes())?;
        let key = Zeroizing::new(STANDARD.decode(text.trim_ascii()).unwrap_or_default());
        let key =
            UnboundKey::new(&AES_256_GCM, &key).map_err(|_| SecretKeyError::Malformed { path: path.to_owned() })?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// Encrypts `secret`, bound to `admission`.
    pub(crate) fn seal(&self, admission: AdmissionId, secret: &ChapSecret) -> String {
        let nonce = secret_file::random::<NONCE_LEN>();
        let mut sealed = secret.expose().as_bytes().to_vec();
        let tag = self.0.seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(admission.as_bytes()),
            &mut sealed,
        );
        #[expect(clippy::expect_used, reason = "AES-GCM refuses only plaintexts of 64 GiB and more")]
        let tag = tag.expect("16 octets can be encrypted");
        STANDARD.encode([nonce.as_slice(), &sealed, tag.as_ref()].concat())
    }

    /// Decrypts what [`SecretKey::seal`] made for `admission`.
    pub(crate) fn open(&self, admission: AdmissionId, sealed: &str) -> Result<ChapSecret, SealedWithAnotherKey> {
        let opened = || {
            let mut bytes = STANDARD.decode(sealed).ok()?;
            let (nonce, rest) = bytes.split_at_mut_checked(NONCE_LEN)?;
            let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
            let plain = self.0.open_in_place(nonce, Aad::from(admission.as_bytes()), rest).ok()?;
            let secret = std::str::from_utf8(plain).ok()?.to_owned();
            Some(ChapSecret(Zeroizing::new(secret)))
        };
        opened().ok_or(SealedWithAnotherKey { admission })
    }
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
    fn a_secret_opens_for_its_admission_and_key_only() {
        let folder = tempfile::tempdir().unwrap();
        let key = SecretKey::load_or_create(&folder.path().join("a")).unwrap();
        let (secret, admission) = (ChapSecret::random(), AdmissionId::random());
        assert_eq!(secret.expose().len(), 16);
        assert!(secret.expose().bytes().all(|octet| octet.is_ascii_graphic()));
        let sealed = key.seal(admission, &secret);
        assert!(!sealed.contains(secret.expose()));
        let again = SecretKey::load_or_create(&folder.path().join("a")).unwrap();
        assert_eq!(again.open(admission, &sealed).unwrap(), secret);
        assert!(again.open(AdmissionId::random(), &sealed).is_err());
        assert!(SecretKey::load_or_create(&folder.path().join("b")).unwrap().open(admission, &sealed).is_err());
        assert!(!format!("{secret:?}").contains(secret.expose()));
    }

    #[test]
    fn a_key_file_that_was_cut_short_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        secret_file::write(&path, b"AAAA").unwrap();
        assert!(SecretKey::load_or_create(&path).is_err());
    }

    proptest! {
        #[test]
        fn no_stored_text_makes_it_panic(text in "[A-Za-z0-9+/=]{0,80}") {
            let folder = tempfile::tempdir().unwrap();
            let key = SecretKey::load_or_create(&folder.path().join("a")).unwrap();
            prop_assert!(key.open(AdmissionId::random(), &text).is_err());
        }
    }
}
