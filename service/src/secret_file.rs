//! Secrets on disk: files that only their owner can read, written whole or not at all.

use ring::rand::{SecureRandom as _, SystemRandom};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Why a secret could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {path}")]
pub struct SecretFileError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl SecretFileError {
    fn new(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { doing, path, source }
    }
}

/// Reads the secret at `path`; where there is none, makes one with `generate` and writes it first.
///
/// # Errors
/// The file cannot be read or written, or other users can read it.
pub fn load_or_create(path: &Path, generate: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>, SecretFileError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => {
            let cause = io::Error::other("other users can read it: set its mode to 0600");
            Err(SecretFileError::new("reading the secret file", path)(cause))
        }
        Ok(_) => fs::read(path).map_err(SecretFileError::new("reading the secret file", path)),
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => {
            let secret = generate();
            write(path, &secret)?;
            Ok(secret)
        }
        Err(cause) => Err(SecretFileError::new("reading the secret file", path)(cause)),
    }
}

/// Writes `secret` to `path` with mode 0600: to a temporary file beside it, synced, then renamed.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, secret: &[u8]) -> Result<(), SecretFileError> {
    let temporary = path.with_extension("new");
    let written = (|| {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(secret)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    written.map_err(SecretFileError::new("writing the secret file", path))
}

/// `N` octets from the operating system's random source.
///
/// # Panics
/// The operating system has no random source: nothing that we do is safe then.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[expect(clippy::expect_used, reason = "without randomness every secret would be guessable; stop")]
    SystemRandom::new().fill(&mut bytes).expect("the operating system has a random source");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_made_once_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        assert_eq!(load_or_create(&path, || b"one".to_vec()).unwrap(), b"one");
        assert_eq!(load_or_create(&path, || b"two".to_vec()).unwrap(), b"one");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        fs::write(&path, b"one").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(load_or_create(&path, Vec::new).is_err());
    }
}
