//! Kernel, initrd and command line on the tenant's root file system. Everything there is the tenant's to shape, so
//! paths are resolved inside it (`openat2(RESOLVE_IN_ROOT)`) and sizes are bounded.

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use std::cmp::Ordering;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Larger than any distribution's kernel or initrd.
const MAX_FILE_BYTES: u64 = 512 * 1024 * 1024;

/// The x86 kernel's own limit (`COMMAND_LINE_SIZE`).
const MAX_COMMAND_LINE_BYTES: u64 = 2048;

/// Where an image says how its kernel wants to be started (kernel-install(8)).
const COMMAND_LINE: &str = "etc/kernel/cmdline";

/// A mounted root file system.
#[derive(Debug)]
pub struct TenantRoot {
    directory: OwnedFd,
    path: PathBuf,
}

/// Paths of what to boot, relative to the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: PathBuf,
}

impl TenantRoot {
    /// Opens a mounted root.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, BootFilesError> {
        let directory = fs::OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_DIRECTORY)
            .open(path)
            .map_err(|source| BootFilesError::Open { path: path.to_owned(), source })?;
        Ok(Self { directory: directory.into(), path: path.to_owned() })
    }

    /// The kernel and initrd that the image means: Debian's links in `/` or `/boot`, else the newest version in `/boot`.
    ///
    /// # Errors
    /// If there is no pair of them.
    pub fn boot_files(&self) -> Result<BootFiles, BootFilesError> {
        let linked = ["", "boot/"].map(|prefix| BootFiles {
            kernel: PathBuf::from(format!("{prefix}vmlinuz")),
            initrd: PathBuf::from(format!("{prefix}initrd.img")),
        });
        let mut versions = self.kernel_versions();
        versions.sort_by(|a, b| compare_versions(b, a));
        let versioned = versions.into_iter().map(|version| BootFiles {
            kernel: PathBuf::from(format!("boot/vmlinuz-{version}")),
            initrd: PathBuf::from(format!("boot/initrd.img-{version}")),
        });
        linked
            .into_iter()
            .chain(versioned)
            .find(|files| self.open_file(&files.kernel).is_ok() && self.open_file(&files.initrd).is_ok())
            .ok_or(BootFilesError::NoKernel)
    }

    /// The image's own command line, if it has one: one line of printable characters.
    ///
    /// # Errors
    /// If it has one that cannot be used.
    pub fn command_line(&self) -> Result<Option<String>, BootFilesError> {
        let path = Path::new(COMMAND_LINE);
        let failed = |source| BootFilesError::Open { path: path.to_owned(), source };
        let file = match self.open_file(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut text = Vec::new();
        file.take(MAX_COMMAND_LINE_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
        parse_command_line(&text).map(Some).ok_or(BootFilesError::CommandLine)
    }

    /// Copies a file of the root to `to`, readable by root only.
    ///
    /// # Errors
    /// If it cannot be read, is too large, or there is no room.
    pub fn copy(&self, from: &Path, to: &Path) -> Result<(), BootFilesError> {
        let failed = |source| BootFilesError::Copy { from: from.to_owned(), to: to.to_owned(), source };
        let source = self.open_file(from).map_err(failed)?;
        let mut target =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(to).map_err(failed)?;
        let copied = io::copy(&mut source.take(MAX_FILE_BYTES + 1), &mut target).map_err(failed)?;
        if copied > MAX_FILE_BYTES {
            return Err(failed(io::Error::other(format!("it has more than {MAX_FILE_BYTES} octets"))));
        }
        Ok(())
    }

    fn open_file(&self, path: &Path) -> io::Result<File> {
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let file = File::from(openat2(&self.directory, path, how)?);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
    }

    fn kernel_versions(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path.join("boot")).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned())).collect()
    }
}

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootFilesError {
    /// It cannot be opened or read.
    #[error("reading {} of the tenant's root file system", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No kernel.
    #[error("looking for the tenant's kernel: neither /, nor /boot has vmlinuz with its initrd.img")]
    NoKernel,
    /// Not one line of text.
    #[error(
        "reading /{COMMAND_LINE} of the tenant's root file system: it is not one line of at most {MAX_COMMAND_LINE_BYTES} printable characters"
    )]
    CommandLine,
    /// Not copied.
    #[error("copying {} of the tenant's root file system to {}", from.display(), to.display())]
    Copy {
        /// What.
        from: PathBuf,
        /// Where.
        to: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn parse_command_line(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text).ok()?.trim();
    let fits = text.len() as u64 <= MAX_COMMAND_LINE_BYTES;
    (fits && !text.chars().any(char::is_control)).then(|| text.to_owned())
}

/// Compares versions like `6.1.0-9` and `6.1.0-10`: runs of digits by value, the rest by character.
fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let ((text_a, rest_a), (text_b, rest_b)) = (split_text(a), split_text(b));
        let ((number_a, rest_a), (number_b, rest_b)) = (split_number(rest_a), split_number(rest_b));
        let by_length = |n: &str| n.trim_start_matches('0').len();
        let order = text_a
            .cmp(text_b)
            .then(by_length(number_a).cmp(&by_length(number_b)))
            .then_with(|| number_a.trim_start_matches('0').cmp(number_b.trim_start_matches('0')));
        if order != Ordering::Equal || (rest_a.is_empty() && rest_b.is_empty()) {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

fn split_text(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| c.is_ascii_digit()).unwrap_or(text.len()))
}

fn split_number(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn root_with(files: &[(&str, &str)]) -> (tempfile::TempDir, TenantRoot) {
        let directory = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let root = TenantRoot::open(directory.path()).unwrap();
        (directory, root)
    }

    #[test]
    fn links_first_and_absolute_ones_stay_inside() {
        let (directory, root) = root_with(&[("boot/vmlinuz-6.1.0-9", "kernel"), ("boot/initrd.img-6.1.0-9", "initrd")]);
        symlink("/boot/vmlinuz-6.1.0-9", directory.path().join("vmlinuz")).unwrap();
        symlink("boot/initrd.img-6.1.0-9", directory.path().join("initrd.img")).unwrap();
        let files = root.boot_files().unwrap();
        assert_eq!(files.kernel, Path::new("vmlinuz"));
        let copy = directory.path().join("copy");
        root.copy(&files.kernel, &copy).unwrap();
        assert_eq!(fs::read_to_string(copy).unwrap(), "kernel");
    }

    #[test]
    fn links_out_of_the_root_lead_nowhere() {
        let (directory, root) = root_with(&[("x", "")]);
        symlink("../../../../../../../../etc/passwd", directory.path().join("vmlinuz")).unwrap();
        symlink("/etc/passwd", directory.path().join("initrd.img")).unwrap();
        assert!(matches!(root.boot_files(), Err(BootFilesError::NoKernel)));
    }

    #[test]
    fn the_newest_version_with_an_initrd() {
        let (_directory, root) = root_with(&[
            ("boot/vmlinuz-6.1.0-9-amd64", ""),
            ("boot/initrd.img-6.1.0-9-amd64", ""),
            ("boot/vmlinuz-6.1.0-10-amd64", ""),
            ("boot/initrd.img-6.1.0-10-amd64", ""),
            ("boot/vmlinuz-6.1.0-11-amd64", ""),
        ]);
        assert_eq!(root.boot_files().unwrap().kernel, Path::new("boot/vmlinuz-6.1.0-10-amd64"));
    }

    #[test]
    fn command_lines() {
        let (_directory, root) = root_with(&[("etc/kernel/cmdline", "root=LABEL=r quiet\n")]);
        assert_eq!(root.command_line().unwrap().as_deref(), Some("root=LABEL=r quiet"));
        let (_directory, root) = root_with(&[]);
        assert_eq!(root.command_line().unwrap(), None);
        let long = "x".repeat(2049);
        for bad in ["a\nb", "a\u{1b}[2J", &long] {
            let (_directory, root) = root_with(&[("etc/kernel/cmdline", bad)]);
            assert!(matches!(root.command_line(), Err(BootFilesError::CommandLine)), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn versions_are_ordered(a in "[0-9a-z.-]{0,12}", b in "[0-9a-z.-]{0,12}") {
            prop_assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
            prop_assert_eq!(compare_versions(&a, &a), Ordering::Equal);
        }

        #[test]
        fn command_lines_never_panic(text in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some(line) = parse_command_line(&text) {
                prop_assert!(!line.contains('\n'));
            }
        }
    }
}
