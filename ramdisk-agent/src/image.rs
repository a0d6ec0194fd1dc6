//! Builds the image that a node boots: a UKI (UAPI.5) of Debian's kernel and an initrd with this agent in it, and the
//! Reference Values of the two. Only the `agent-image` tool uses this; nothing of it is in the agent.
//!
//! The same inputs make the same octets, so that anybody can build the image again and compare Reference Values.

pub mod elf;
pub mod initrd;
pub mod modules;
pub mod packages;
pub mod reference;
pub mod uki;

use packages::{Packages, PackagesError};
use reference::{ReferenceError, ReferenceValues};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The bar for a UKI: a node fetches it at every boot.
pub const MAX_UKI_BYTES: usize = 40 * 1024 * 1024;

/// The command line that every node's agent is started with, unless the build says otherwise. Fixed, because it is
/// measured; a node's own settings come over the network and are measured apart.
pub const DEFAULT_COMMAND_LINE: &str = "console=tty0 console=ttyS0,115200 panic=30 quiet loglevel=4";

/// What to build.
#[derive(Debug, Clone)]
pub struct Build {
    /// What policies call the image.
    pub name: String,
    /// Where results go.
    pub out: PathBuf,
    /// Where downloaded packages stay.
    pub cache: PathBuf,
    /// The agent's executable.
    pub agent: PathBuf,
    /// A kernel package to use instead of Debian's current cloud kernel.
    pub kernel_deb: Option<PathBuf>,
    /// systemd's UEFI stub.
    pub stub: PathBuf,
    /// The boot program that firmware starts before the UKI.
    pub loader: PathBuf,
    /// The kernel's command line.
    pub command_line: String,
}

/// What was built.
#[derive(Debug)]
pub struct Built {
    /// The UKI.
    pub uki: PathBuf,
    /// Its size.
    pub uki_bytes: usize,
    /// Size of the initrd inside, compressed.
    pub initrd_bytes: usize,
    /// The kernel's version.
    pub kernel: String,
    /// The reference values, as JSON.
    pub reference_file: PathBuf,
    /// The reference values.
    pub reference: ReferenceValues,
}

impl Build {
    /// Builds everything. `progress` is told each step in words.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn run(&self, mut progress: impl FnMut(&str)) -> Result<Built, ImageError> {
        uki::check_command_line(&self.command_line)?;
        progress("looking up packages");
        let packages = Packages::fetch(&self.cache, self.kernel_deb.as_deref())?;
        let kernel = packages.kernel()?;
        progress(&format!("collecting the agent, its libraries and the modules of {}", kernel.version));
        let archive = initrd::archive(&self.agent, &packages, &kernel)?;
        progress(&format!("compressing an initrd of {} MiB", archive.len() / (1024 * 1024)));
        fs::create_dir_all(&self.out).map_err(|source| file_error("creating", &self.out, source))?;
        let initrd = compress(&archive, &self.out)?;
        progress("joining kernel and initrd to a UKI");
        let parts = uki::Parts {
            stub: &self.stub,
            os_release: &os_release(&kernel.version),
            command_line: &self.command_line,
            linux: &read(&kernel.image)?,
            initrd: &initrd,
        };
        let uki = parts.join(&self.out)?;
        if uki.len() > MAX_UKI_BYTES {
            return Err(ImageError::TooLarge { bytes: uki.len() });
        }
        // Beside the image: the same program goes on attesting in tenants' systems.
        let agent = self.out.join("assay-agent");
        fs::copy(&self.agent, &agent).map_err(|source| file_error("copying the agent to", &agent, source))?;
        let uki_path = self.out.join("agent.efi");
        write(&uki_path, &uki)?;
        let reference = ReferenceValues::compute(&self.name, &uki, &read(&self.loader)?, &self.command_line)?;
        let reference_file = self.out.join("reference-values.json");
        write(&reference_file, reference.to_json()?.as_bytes())?;
        Ok(Built {
            uki: uki_path,
            uki_bytes: uki.len(),
            initrd_bytes: initrd.len(),
            kernel: kernel.version,
            reference_file,
            reference,
        })
    }
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A package is missing.
    #[error(transparent)]
    Packages(#[from] PackagesError),
    /// The initrd cannot be put together.
    #[error(transparent)]
    Initrd(#[from] initrd::InitrdError),
    /// The UKI cannot be joined.
    #[error(transparent)]
    Uki(#[from] uki::UkiError),
    /// Its reference values cannot be computed.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A file cannot be read or written.
    #[error("{doing} {}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Over the bar.
    #[error("the UKI has {bytes} octets, more than {MAX_UKI_BYTES}: which module or library grew?")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

/// A tool of the build that failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not there.
    #[error("running {tool}: is it installed?")]
    Start {
        /// Its name.
        tool: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("running {tool}: {output}")]
    Failed {
        /// Its name.
        tool: String,
        /// What it printed to standard error.
        output: String,
    },
}

/// Reads a whole file.
///
/// # Errors
/// [`ImageError::File`].
pub fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    fs::read(path).map_err(|source| file_error("reading", path, source))
}

/// Runs a tool to its end and returns what it printed.
pub(crate) fn run(command: &mut Command) -> Result<Vec<u8>, ToolError> {
    let tool = command.get_program().to_string_lossy().into_owned();
    // The same messages whatever the builder's language.
    let output =
        command.env("LC_ALL", "C").output().map_err(|source| ToolError::Start { tool: tool.clone(), source })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(ToolError::Failed { tool, output: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

fn write(path: &Path, content: &[u8]) -> Result<(), ImageError> {
    fs::write(path, content).map_err(|source| file_error("writing", path, source))
}

fn file_error(doing: &'static str, path: &Path, source: io::Error) -> ImageError {
    ImageError::File { doing, path: path.to_owned(), source }
}

/// Compresses with one thread: the number of threads would show in the result. Level 19 takes ten times as long to save
/// one octet in five hundred, as most of it is a kernel that is compressed already.
fn compress(archive: &[u8], out: &Path) -> Result<Vec<u8>, ImageError> {
    let plain = out.join("initrd.cpio");
    write(&plain, archive)?;
    let compressed = run(Command::new("zstd").args(["-12", "-T1", "-q", "-c"]).arg(&plain))?;
    fs::remove_file(&plain).map_err(|source| file_error("removing", &plain, source))?;
    Ok(compressed)
}

fn os_release(kernel: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "ID=assay-agent\nNAME=\"Assay ramdisk agent\"\nVERSION_ID={version}\nPRETTY_NAME=\"Assay agent {version}, Linux {kernel}\"\n"
    )
}
