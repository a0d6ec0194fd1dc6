//! Linux' interface for reports of confidential guests (Documentation/ABI/testing/configfs-tsm-report, kernel 6.7): a
//! folder is made, the kernel fills it with attributes, `inblob` takes 64 octets, `outblob` gives the report, and the
//! folder is removed. The one file that touches it.
//!
//! ```text
//! mkdir ─▶ provider ─▶ generation ─▶ inblob ─▶ outblob ─▶ generation ─▶ rmdir
//!   └ ENXIO: no guest of any maker's      └──────── one more, or not ours ┘
//! ```
//!
//! What was run: these steps, against folders that a test fills as the kernel does. No machine with Intel TDX was at
//! hand, so the kernel's own interface, and a quote from it, were not.

use super::{Generation, Provider};
use assay_wire::evidence::MAX_TEE_QUOTE_BYTES;
use nix::errno::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// The kernel's folder of reports.
pub const REPORTS: &str = "/sys/kernel/config/tsm/report";

/// The interface.
#[derive(Debug, Clone)]
pub struct Interface {
    /// The folder of reports.
    pub reports: PathBuf,
    /// Makes a report's folder: `mkdir`, but in tests, as no file system that a test can make fills a new folder.
    pub make: fn(&Path) -> io::Result<()>,
    /// Removes it: `rmdir`, but in tests. The kernel's has attributes in it and is removed all the same.
    pub remove: fn(&Path) -> io::Result<()>,
}

impl Default for Interface {
    fn default() -> Self {
        Self { reports: REPORTS.into(), make: |path| fs::create_dir(path), remove: |path| fs::remove_dir(path) }
    }
}

/// Why there is no quote although the interface is there.
#[derive(Debug, thiserror::Error)]
pub enum TsmError {
    /// The kernel refuses a step.
    #[error("{doing} {}", path.display())]
    Io {
        /// Which step.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is longer than any quote.
    #[error("reading {}: it has more than {limit} octets", path.display())]
    TooLarge {
        /// Where.
        path: PathBuf,
        /// What it may have.
        limit: usize,
    },
    /// Not a count.
    #[error("reading {}: it is no number", path.display())]
    Generation {
        /// Where.
        path: PathBuf,
    },
    /// Somebody else writes to our report, or the kernel did not take what we wrote.
    #[error("the report {} is not of what was written to it, {ATTEMPTS} times in a row", path.display())]
    NotOurs {
        /// Where.
        path: PathBuf,
    },
    /// The AK is not a key.
    #[error("reading the attestation key")]
    Ak(#[from] assay_tpm::reader::DecodeError),
}

impl Interface {
    /// A quote of this trust domain over `report_data`; none if this machine is none, or its kernel does not tell.
    ///
    /// # Errors
    /// The interface is there, and fails.
    pub fn tdx_quote(&self, report_data: &[u8; 64]) -> Result<Option<Vec<u8>>, TsmError> {
        for _attempt in 0..ATTEMPTS {
            let Some(report) = self.report()? else { return Ok(None) };
            match report.quote(report_data)? {
                Answer::NoDomain => return Ok(None),
                Answer::Quote(quote) => return Ok(Some(quote)),
                Answer::NotOurs => {}
            }
        }
        Err(TsmError::NotOurs { path: self.reports.join(NAME) })
    }

    /// A report of our own; none if nothing here gives any.
    fn report(&self) -> Result<Option<Report<'_>>, TsmError> {
        let path = self.reports.join(NAME);
        let made = match (self.make)(&path) {
            // Left by an agent that was killed. One that lives shows in the generation.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (self.remove)(&path).map_err(failed("removing the report", &path))?;
                (self.make)(&path)
            }
            made => made,
        };
        match made {
            Ok(()) => Ok(Some(Report { interface: self, path })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // The interface is loaded, and no guest's module stands behind it.
            Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => Ok(None),
            Err(error) => Err(failed("making the report", &path)(error)),
        }
    }
}

/// A report's folder, which goes with this value.
struct Report<'a> {
    interface: &'a Interface,
    path: PathBuf,
}

enum Answer {
    /// Not a trust domain of Intel TDX.
    NoDomain,
    /// The report is of another input.
    NotOurs,
    /// A quote.
    Quote(Vec<u8>),
}

impl Report<'_> {
    fn quote(&self, report_data: &[u8; 64]) -> Result<Answer, TsmError> {
        match Provider::read(&self.attribute("provider")?) {
            Provider::Tdx => {}
            Provider::Other => return Ok(Answer::NoDomain),
        }
        let before = self.generation()?;
        self.write("inblob", report_data)?;
        let quote = self.read("outblob", MAX_TEE_QUOTE_BYTES)?;
        let after = self.generation()?;
        Ok(if before.is_followed_by(after) { Answer::Quote(quote) } else { Answer::NotOurs })
    }

    fn generation(&self) -> Result<Generation, TsmError> {
        let path = self.path.join("generation");
        Generation::read(&self.attribute("generation")?).ok_or(TsmError::Generation { path })
    }

    fn attribute(&self, name: &str) -> Result<String, TsmError> {
        self.read(name, MAX_ATTRIBUTE_BYTES).map(|octets| String::from_utf8_lossy(&octets).into_owned())
    }

    fn read(&self, name: &str, limit: usize) -> Result<Vec<u8>, TsmError> {
        let path = self.path.join(name);
        let mut octets = Vec::new();
        let file = File::open(&path).map_err(failed("opening", &path))?;
        file.take(limit as u64 + 1).read_to_end(&mut octets).map_err(failed("reading", &path))?;
        if octets.len() > limit { Err(TsmError::TooLarge { path, limit }) } else { Ok(octets) }
    }

    /// In one piece, and closed: only then does the kernel look at it, and it tells nobody what it thinks of it.
    fn write(&self, name: &str, octets: &[u8]) -> Result<(), TsmError> {
        let path = self.path.join(name);
        let mut file = OpenOptions::new().write(true).open(&path).map_err(failed("opening", &path))?;
        file.write_all(octets).map_err(failed("writing", &path))
    }
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        if let Err(error) = (self.interface.remove)(&self.path) {
            tracing::warn!(event = "agent.report_left", "removing the report {}: {error}", self.path.display());
        }
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TsmError {
    let path = path.to_owned();
    move |source| TsmError::Io { doing, path, source }
}

/// Ours among the reports.
const NAME: &str = "assay-agent";
const ATTEMPTS: u32 = 3;
/// A page, as every attribute.
const MAX_ATTRIBUTE_BYTES: usize = 4096;
