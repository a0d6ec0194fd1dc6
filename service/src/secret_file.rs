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

/// Reads the secret at `path`; where there is none, makes one with `generate` and writes it first. Of two that make it
/// at once, both get the one that was there first.
///
/// # Errors
/// The file cannot be read or written, or other users can read it.
pub fn load_or_create(path: &Path, generate: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>, SecretFileError> {
    let reading = "reading the secret file";
    if let Err(error) = fs::metadata(path) {
        if error.kind() != io::ErrorKind::NotFound {
            return Err(SecretFileError::new(reading, path)(error));
        }
        let created = write_temporary(path, &generate()).and_then(|temporary| {
            let linked = fs::hard_link(&temporary, path);
            fs::remove_file(&temporary)?;
            match linked {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                linked => linked,
            }
        });
        created.map_err(SecretFileError::new("creating the secret file", path))?;
    }
    let mode = fs::metadata(path).map_err(SecretFileError::new(reading, path))?.permissions().mode();
    if mode & 0o077 != 0 {
        let cause = io::Error::other("other users can read it: set its mode to 0600");
        return Err(SecretFileError::new(reading, path)(cause));
    }
    fs::read(path).map_err(SecretFileError::new(reading, path))
}

/// Writes `secret` to `path` with mode 0600, in place of what was there: whole or not at all.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, secret: &[u8]) -> Result<(), SecretFileError> {
    write_temporary(path, secret)
        .and_then(|temporary| fs::rename(temporary, path))
        .map_err(SecretFileError::new("writing the secret file", path))
}

/// A synced file beside `path`, under a name that nobody else uses.
fn write_temporary(path: &Path, secret: &[u8]) -> io::Result<PathBuf> {
    let temporary = path.with_added_extension(format!("{}.new", hex::encode(random::<8>())));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(secret)?;
    file.sync_all()?;
    Ok(temporary)
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
    fn two_that_create_it_at_once_get_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let create = |mine: u8| load_or_create(&path, || vec![mine]).unwrap();
        let secrets: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|mine| scope.spawn(move || create(mine))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(secrets.iter().all(|secret| *secret == secrets[0]), "{secrets:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "temporary files were left behind");
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
