//! Writes cpio archives in the `newc` format (kernel documentation, "initramfs buffer format"): the agent's own initrd
//! and what is appended to a tenant's. The same entries make the same octets: everything belongs to root, nothing has
//! a date.

/// The kernel refuses longer names (`PATH_MAX`).
const MAX_NAME_BYTES: usize = 4096;

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";

const REGULAR_FILE: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const SYMBOLIC_LINK: u32 = 0o120_000;

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a regular file. Its directory must come before it.
    ///
    /// # Errors
    /// See [`CpioError`].
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<(), CpioError> {
        self.entry(name, REGULAR_FILE | (permissions & 0o7777), content)
    }

    /// Adds a directory. Its parent must come before it.
    ///
    /// # Errors
    /// See [`CpioError`].
    pub fn directory(&mut self, name: &str) -> Result<(), CpioError> {
        self.entry(name, DIRECTORY | 0o755, &[])
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// See [`CpioError`].
    pub fn symlink(&mut self, name: &str, target: &str) -> Result<(), CpioError> {
        self.entry(name, SYMBOLIC_LINK | 0o777, target.as_bytes())
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// See [`CpioError`].
    pub fn finish(mut self) -> Result<Vec<u8>, CpioError> {
        self.raw_entry(TRAILER, 0, 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), CpioError> {
        let clean = !name.is_empty()
            && name.len() < MAX_NAME_BYTES
            && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
            && !name.contains('\0')
            && name != TRAILER;
        if !clean {
            return Err(CpioError::Name { name: name.chars().take(100).collect() });
        }
        self.entries += 1;
        self.raw_entry(name, self.entries, mode, content)
    }

    fn raw_entry(&mut self, name: &str, inode: u32, mode: u32, content: &[u8]) -> Result<(), CpioError> {
        let too_large = || CpioError::TooLarge { name: name.to_owned(), bytes: content.len() };
        let size = u32::try_from(content.len()).map_err(|_| too_large())?;
        let name_size = u32::try_from(name.len() + 1).map_err(|_| too_large())?;
        // inode, mode, uid, gid, nlink, mtime, size, device (2), of device (2), name size with its zero, checksum
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(MAGIC.as_bytes());
        for field in fields {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// What cannot be in an archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpioError {
    /// Not a plain relative path.
    #[error("archiving `{name}`: it is not a plain relative path")]
    Name {
        /// The name.
        name: String,
    },
    /// The format has 32 bits for a size.
    #[error("archiving `{name}`: {bytes} octets are too many")]
    TooLarge {
        /// The name.
        name: String,
        /// Its size.
        bytes: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::process::Command;

    fn unpack(archive: &[u8], into: &Path) {
        let path = into.join("archive.cpio");
        fs::write(&path, archive).unwrap();
        let status = Command::new("cpio").args(["-i", "--quiet", "-F"]).arg(&path).current_dir(into).status().unwrap();
        assert!(status.success());
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn cpio_unpacks_what_was_archived() {
        let mut archive = Archive::default();
        archive.directory("etc").unwrap();
        archive.file("etc/one", 0o600, b"12345").unwrap();
        archive.symlink("etc/two", "one").unwrap();
        let directory = tempfile::tempdir().unwrap();
        unpack(&archive.finish().unwrap(), directory.path());
        let one = directory.path().join("etc/one");
        assert_eq!(fs::read(&one).unwrap(), b"12345");
        assert_eq!(fs::metadata(&one).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_link(directory.path().join("etc/two")).unwrap(), Path::new("one"));
    }

    #[test]
    fn names_that_leave_the_archive_are_refused() {
        for name in ["", "/etc", "../etc", "a/../b", "a//b", "./a", "a/", "a\0b", TRAILER, &"x".repeat(5000)] {
            assert!(matches!(Archive::default().file(name, 0o644, b""), Err(CpioError::Name { .. })), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn every_entry_starts_at_a_multiple_of_four(
            files in proptest::collection::vec(("[a-z]{1,20}", proptest::collection::vec(any::<u8>(), 0..50)), 0..5)
        ) {
            let mut archive = Archive::default();
            for (name, content) in &files {
                prop_assert_eq!(archive.bytes.len() % 4, 0);
                archive.file(name, 0o644, content).unwrap();
            }
            prop_assert_eq!(archive.finish().unwrap().len() % 4, 0);
        }
    }
}
