//! Images from root file systems: a folder, a tar file, or the layers of an OCI image become an ext4 file system.
//!
//! ```text
//! tar      one entry after the other, bounded
//! model    what the entries add up to, in memory: names never reach the host's file system before it is whole
//! oci      an OCI image layout: which layers, each with its digest
//! folder   a folder of the imaging host
//! ext4     the model, written out and made a file system by `mkfs.ext4` and `debugfs`
//! ```
//!
//! No entry can lead out of the image: links are entries of the model and resolved within it, and what is written out has
//! the folders that we make and no links until all files are there.

pub mod ext4;
pub mod folder;
pub mod model;
pub mod oci;
pub mod tar;

use crate::store::StoreError;
use crate::store::import::{Source, open_beneath};
use assay_wire::imaging::{ImageFormat, SourceFormat};
use model::Model;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// An open source of an image: a disk, or what becomes one.
#[derive(Debug)]
pub enum AnySource {
    /// A disk.
    Disk(Source),
    /// A root file system.
    Tree(TreeSource),
}

/// An open root file system.
#[derive(Debug)]
pub struct TreeSource {
    path: PathBuf,
    file: File,
    format: TreeFormat,
}

#[derive(Debug, Clone, Copy)]
enum TreeFormat {
    Tar,
    Folder,
    Oci,
}

impl AnySource {
    /// Opens `path`, which must lie beneath one of `folders`. Blocks.
    ///
    /// # Errors
    /// It is elsewhere, or not what it should be.
    pub fn open(path: &Path, format: SourceFormat, folders: &[PathBuf]) -> Result<Self, StoreError> {
        let format = match format {
            SourceFormat::Raw => return Source::open(path, ImageFormat::Raw, folders).map(Self::Disk),
            SourceFormat::Qcow2 => return Source::open(path, ImageFormat::Qcow2, folders).map(Self::Disk),
            SourceFormat::Tar => TreeFormat::Tar,
            SourceFormat::Folder => TreeFormat::Folder,
            SourceFormat::Oci => TreeFormat::Oci,
        };
        let file = open_beneath(path, folders)?;
        let metadata = file.metadata().map_err(|source| StoreError::io("reading the kind of", path, source))?;
        let fits = if let TreeFormat::Tar = format { metadata.is_file() } else { metadata.is_dir() };
        if !fits {
            return Err(StoreError::malformed(path, format!("is no {}", format.name())));
        }
        Ok(Self::Tree(TreeSource { path: path.to_owned(), file, format }))
    }
}

impl TreeFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Tar => "tar file",
            Self::Folder => "folder",
            Self::Oci => "OCI image layout, which is a folder",
        }
    }
}

impl TreeSource {
    /// Makes a disk of it, in `work`, which is made for this and must be kept as long as the disk is read. Answers the
    /// source's SHA-256 too, where it has one: a folder has none.
    ///
    /// # Errors
    /// It cannot be read, is not as `expected`, or has what no image can have.
    pub fn build(self, work: &Path, expected: Option<&str>) -> Result<(Source, Option<String>), StoreError> {
        let octets = work.join("octets");
        std::fs::create_dir_all(&octets).map_err(|source| StoreError::io("making", &octets, source))?;
        let mut model = Model::default();
        let differs = |found: &String| expected.is_some_and(|expected| !expected.eq_ignore_ascii_case(found));
        let digest = match self.format {
            TreeFormat::Folder => {
                folder::read(self.file.into(), &octets, &mut model)?;
                None
            }
            TreeFormat::Tar => {
                let digest = digest(&self.file, &self.path)?;
                if !differs(&digest) {
                    oci::read_tar(self.file, &octets, &mut model)?;
                }
                Some(digest)
            }
            TreeFormat::Oci => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                let open = |path: &str| {
                    let opened = rustix::fs::openat2(&self.file, path, flags, Mode::empty(), inside);
                    opened.map(File::from).map_err(io::Error::from)
                };
                Some(oci::read(&open, &octets, &mut model)?)
            }
        };
        let found = digest.clone().unwrap_or_else(|| "none".to_owned());
        if differs(&found) {
            return Err(StoreError::Digest {
                path: self.path,
                found,
                expected: expected.unwrap_or_default().to_owned(),
            });
        }
        let disk = work.join("disk.raw");
        ext4::make(&model, &octets, work, &disk)?;
        Ok((Source::open(&disk, ImageFormat::Raw, &[work.to_owned()])?, digest))
    }
}

fn digest(file: &File, path: &Path) -> Result<String, StoreError> {
    let copy = file.try_clone().map_err(|source| StoreError::io("opening", path, source))?;
    crate::store::import::digest(&copy, path, &mut |_, _| ControlFlow::Continue(()))
}

/// Why a root file system is refused.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The operating system refused.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A tar file ends early, or is none.
    #[error("reading a tar file: {0}")]
    Tar(String),
    /// A name that no file can have, or that nothing can be written for.
    #[error("`{name}` {problem}")]
    Name {
        /// The name, made printable.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// More than we take.
    #[error("more than {0}")]
    TooMuch(&'static str),
    /// An OCI layout is not one, or has what we cannot read.
    #[error("{file}: {problem}")]
    Oci {
        /// Which of its files.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// A blob is not what its name says.
    #[error("blob {expected} has SHA-256 {found}")]
    Digest {
        /// As the manifest says.
        expected: String,
        /// What it has.
        found: String,
    },
    /// A tool failed.
    #[error("{tool} failed: {said}")]
    Tool {
        /// Which.
        tool: &'static str,
        /// What it wrote.
        said: String,
    },
}

impl TreeError {
    fn io(doing: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { doing, path: path.into(), source }
    }

    fn name(name: &[u8], problem: &'static str) -> Self {
        let text = String::from_utf8_lossy(name);
        Self::Name { name: text.chars().take(200).flat_map(char::escape_debug).collect(), problem }
    }
}
