//! Debian packages as data: the kernel, and the tools that the ramdisk carries. They are downloaded and unpacked, and
//! never installed on the machine that builds.

use super::{ToolError, run};
use crate::settings::sha256;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Depends on the current cloud kernel; itself empty.
const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";

/// `kexec`, `iscsistart`, and the libraries that those two need beside the agent's own.
const TOOL_PACKAGES: [&str; 12] = [
    "kexec-tools",
    "open-iscsi",
    "libopeniscsiusr",
    "libkmod2",
    "libxenmisc4.17",
    "libxentoollog1",
    "libxencall1",
    "libxenevtchn1",
    "libxengnttab1",
    "libxenforeignmemory1",
    "libxendevicemodel1",
    "libxentoolcore1",
];

/// Unpacked packages.
#[derive(Debug)]
pub struct Packages {
    root: PathBuf,
}

/// A kernel out of its package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Like `6.1.0-56-cloud-amd64`.
    pub version: String,
    /// The kernel itself, a PE executable.
    pub image: PathBuf,
    /// Its directory of modules.
    pub modules: PathBuf,
}

impl Packages {
    /// Downloads what `cache` does not hold yet, and unpacks everything anew below it.
    ///
    /// # Errors
    /// See [`PackagesError`].
    pub fn fetch(cache: &Path, kernel_deb: Option<&Path>) -> Result<Self, PackagesError> {
        let debs = cache.join("debs");
        fs::create_dir_all(&debs).map_err(|source| PackagesError::Cache { path: debs.clone(), source })?;
        let mut names: Vec<String> = TOOL_PACKAGES.map(str::to_owned).to_vec();
        if kernel_deb.is_none() {
            names.push(current_kernel()?);
        }
        let wanted = candidates(&names, cache)?;
        if wanted.iter().any(|candidate| !candidate.is_in(&debs)) {
            run(Command::new("apt-get").args(["-q", "download"]).args(&names).current_dir(&debs))?;
        }
        let root = cache.join("root");
        // Left from a build before, perhaps of other versions.
        if let Err(source) = fs::remove_dir_all(&root)
            && source.kind() != io::ErrorKind::NotFound
        {
            return Err(PackagesError::Cache { path: root, source });
        }
        for candidate in &wanted {
            if !candidate.is_in(&debs) {
                return Err(PackagesError::NotDownloaded { file: candidate.file.clone() });
            }
            unpack(&debs.join(&candidate.file), &root)?;
        }
        if let Some(deb) = kernel_deb {
            unpack(deb, &root)?;
        }
        Ok(Self { root })
    }

    /// A file of any of the packages, by its path there.
    #[must_use]
    pub fn file(&self, path: &str) -> Option<PathBuf> {
        Some(self.root.join(path)).filter(|path| path.is_file())
    }

    /// The one kernel among the packages.
    ///
    /// # Errors
    /// If there is none, or several.
    pub fn kernel(&self) -> Result<Kernel, PackagesError> {
        let boot = self.root.join("boot");
        let entries = fs::read_dir(&boot).map_err(|source| PackagesError::Cache { path: boot, source })?;
        let mut kernels: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let version = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
                let modules = ["lib/modules", "usr/lib/modules"]
                    .map(|directory| self.root.join(directory).join(&version))
                    .into_iter()
                    .find(|path| path.is_dir())?;
                Some(Kernel { version, image: entry.path(), modules })
            })
            .collect();
        match (kernels.pop(), kernels.is_empty()) {
            (Some(kernel), true) => Ok(kernel),
            (found, _) => Err(PackagesError::Kernels { count: kernels.len() + usize::from(found.is_some()) }),
        }
    }
}

/// Why packages are missing.
#[derive(Debug, thiserror::Error)]
pub enum PackagesError {
    /// The cache cannot be used.
    #[error("using the package cache {}", path.display())]
    Cache {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// apt or dpkg failed.
    #[error("fetching Debian packages (has `apt-get update` been run?)")]
    Tool(#[from] ToolError),
    /// Not what we know how to read.
    #[error("fetching Debian packages: apt says `{line}`, which is not understood")]
    Answer {
        /// What it says.
        line: String,
    },
    /// apt did not bring it, or brought something else.
    #[error("fetching Debian packages: {file} is not there with the SHA-256 that apt announced")]
    NotDownloaded {
        /// Its name.
        file: String,
    },
    /// Not one kernel.
    #[error("looking for the kernel: {count} packages hold /boot/vmlinuz-* with modules, not one")]
    Kernels {
        /// How many.
        count: usize,
    },
}

/// A package file that apt would download.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    file: String,
    sha256: String,
}

impl Candidate {
    /// Reads a line of `apt-get download --print-uris`: `'url' file size SHA256:digest`.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace().skip(1);
        let file = words.next()?.to_owned();
        let sha256 = words.nth(1)?.strip_prefix("SHA256:")?.to_owned();
        (!file.contains('/')).then_some(Self { file, sha256 })
    }

    fn is_in(&self, directory: &Path) -> bool {
        fs::read(directory.join(&self.file)).is_ok_and(|content| hex::encode(sha256(&content)) == self.sha256)
    }
}

/// What apt would download, whatever is in the cache. It must be asked in an empty directory: it says nothing of files
/// that it finds already there.
fn candidates(names: &[String], cache: &Path) -> Result<Vec<Candidate>, PackagesError> {
    let empty =
        tempfile::tempdir_in(cache).map_err(|source| PackagesError::Cache { path: cache.to_owned(), source })?;
    let mut command = Command::new("apt-get");
    command.args(["-q", "download", "--print-uris"]).args(names).current_dir(empty.path());
    let answer = run(&mut command)?;
    String::from_utf8_lossy(&answer)
        .lines()
        .filter(|line| line.starts_with('\''))
        .map(|line| Candidate::parse(line).ok_or_else(|| PackagesError::Answer { line: line.to_owned() }))
        .collect()
}

/// The package that the kernel's metapackage depends on.
fn current_kernel() -> Result<String, PackagesError> {
    let answer = run(Command::new("apt-cache").args(["depends", KERNEL_METAPACKAGE]))?;
    let answer = String::from_utf8_lossy(&answer);
    answer
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: ").filter(|name| name.starts_with("linux-image-")))
        .map(str::to_owned)
        .ok_or_else(|| PackagesError::Answer { line: answer.lines().next().unwrap_or_default().to_owned() })
}

fn unpack(deb: &Path, root: &Path) -> Result<(), ToolError> {
    run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(root)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_apt_announces() {
        let line = "'http://deb/pool/k_2.0%2bdeb12_amd64.deb' k_2.0+deb12_amd64.deb 85260 SHA256:ab12";
        let expected = Candidate { file: "k_2.0+deb12_amd64.deb".to_owned(), sha256: "ab12".to_owned() };
        assert_eq!(Candidate::parse(line), Some(expected));
        for bad in ["", "'u' f", "'u' f 1 MD5Sum:ab", "'u' ../f 1 SHA256:ab"] {
            assert_eq!(Candidate::parse(bad), None, "{bad:?}");
        }
    }
}
