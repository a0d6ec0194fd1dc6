//! The hand-over: log in to the tenant's disk with the grant, take its kernel and initrd from its root file system,
//! load them for kexec, let go of the disk. After [`Prepared::start`] the machine is the tenant's.
//!
//! The CHAP secret goes on in the initrd's memory only, in a file of mode 0600, as open-iscsi's initramfs script reads
//! it; never on a kernel command line. So does what the tenant's agent goes on attesting with ([`crate::attestation`]).

pub mod boot_files;
pub mod command_line;
pub mod disk;
pub mod initrd;
mod iscsi;

use crate::attestation::state::AttestationState;
use crate::init::modules::{self, ModuleError};
use assay_wire::agent::{Grant, TenantAddress};
use assay_wire::id::NodeId;
use assay_wire::net::MacAddr;
use boot_files::{BootFilesError, TenantRoot};
use disk::{DiskError, IscsiDisk};
use initrd::InitrdError;
use iscsi::IscsiError;
use nix::sys::reboot::{RebootMode, reboot};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::timeout;

/// Where copies of the tenant's kernel and initrd go: the ramdisk, so they are gone with it.
const STAGING: &str = "/run/assay";

/// Loading a kernel copies it once; this is a bound for software emulation.
const KEXEC_LIMIT: Duration = Duration::from_secs(60);

/// What the tenant's system will be told.
#[derive(Debug)]
pub struct Handover<'a> {
    /// Opens the disk.
    pub grant: &'a Grant,
    /// The node's address on the tenant's network.
    pub address: &'a TenantAddress,
    /// The NIC on that network.
    pub nic: MacAddr,
    /// The node's name, to be its host name.
    pub node: &'a NodeId,
    /// What the agent there goes on attesting with.
    pub attestation: &'a AttestationState,
}

/// The tenant's kernel is loaded and nothing holds the disk.
#[derive(Debug)]
pub struct Prepared(());

impl Handover<'_> {
    /// Does everything up to starting the kernel.
    ///
    /// # Errors
    /// See [`HandoverError`].
    pub async fn prepare(&self) -> Result<Prepared, HandoverError> {
        modules::load(modules::Group::Iscsi)?;
        iscsi::log_in(self.grant).await?;
        let disk = IscsiDisk::wait_for(self.grant.lun).await?;
        tracing::info!(event = "agent.disk_open", "logged in: the disk is {}", disk.name());
        let staged = self.stage(&disk).await?;
        load_kernel(&staged).await?;
        disk.delete()?;
        Ok(Prepared(()))
    }

    /// Copies kernel and initrd off the disk. The file system is unmounted when this returns, also if it fails.
    async fn stage(&self, disk: &IscsiDisk) -> Result<Staged, HandoverError> {
        let partition = disk.wait_for_root().await?;
        let mounted = partition.mount()?;
        let root = TenantRoot::open(mounted.path())?;
        let files = root.boot_files()?;
        let image_line = root.command_line()?;
        let staging = Path::new(STAGING);
        fs::create_dir_all(staging).map_err(|source| staging_error(staging, source))?;
        let staged = Staged {
            kernel: staging.join("vmlinuz"),
            initrd: staging.join("initrd"),
            command_line: command_line::tenant(image_line.as_deref(), &partition.source(), self),
        };
        root.copy(&files.kernel, &staged.kernel)?;
        root.copy(&files.initrd, &staged.initrd)?;
        initrd::append(&staged.initrd, self.grant, self.attestation)?;
        tracing::info!(event = "agent.kernel_found", "the tenant's kernel is {}", files.kernel.display());
        Ok(staged)
    }
}

impl Prepared {
    /// Starts the tenant's kernel. Returns only if the kernel refuses.
    ///
    /// # Errors
    /// [`HandoverError::Start`].
    pub fn start(self) -> Result<std::convert::Infallible, HandoverError> {
        reboot(RebootMode::RB_KEXEC).map_err(|errno| HandoverError::Start { source: errno.into() })
    }
}

/// What was copied.
struct Staged {
    kernel: PathBuf,
    initrd: PathBuf,
    command_line: String,
}

async fn load_kernel(staged: &Staged) -> Result<(), HandoverError> {
    let mut command = Command::new("/usr/sbin/kexec");
    command.args(["-s", "-l"]).arg(&staged.kernel);
    command.arg(format!("--initrd={}", staged.initrd.display()));
    command.arg(format!("--command-line={}", staged.command_line));
    run(command, "kexec", KEXEC_LIMIT).await?;
    for copy in [&staged.kernel, &staged.initrd] {
        fs::remove_file(copy).map_err(|source| staging_error(copy, source))?;
    }
    Ok(())
}

/// Why the tenant's system could not be started.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The kernel has no iSCSI.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// No session with the target.
    #[error(transparent)]
    Iscsi(#[from] IscsiError),
    /// No disk, or no root file system on it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// No kernel on the disk.
    #[error(transparent)]
    BootFiles(#[from] BootFilesError),
    /// The initrd could not be completed.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// No room for the copies.
    #[error("staging the tenant's kernel in {}", path.display())]
    Staging {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The loaded kernel was not started.
    #[error("starting the tenant's kernel")]
    Start {
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// How a tool of the ramdisk failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It could not be started.
    #[error("running {tool}")]
    Start {
        /// Its name.
        tool: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It did not end.
    #[error("running {tool}: it did not end within {} s", limit.as_secs())]
    Timeout {
        /// Its name.
        tool: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// It failed.
    #[error("running {tool}: it ended with {status}: {output}")]
    Failed {
        /// Its name.
        tool: &'static str,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it printed to standard error.
        output: String,
    },
}

/// Runs a tool to its end, within `limit`. Its arguments may hold secrets, so no error shows them.
async fn run(mut command: Command, tool: &'static str, limit: Duration) -> Result<(), ToolError> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let child = command.spawn().map_err(|source| ToolError::Start { tool, source })?;
    let output = timeout(limit, child.wait_with_output())
        .await
        .map_err(|_| ToolError::Timeout { tool, limit })?
        .map_err(|source| ToolError::Start { tool, source })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed nothing");
    Err(ToolError::Failed { tool, status: output.status, output: last.chars().take(300).collect() })
}

fn staging_error(path: &Path, source: io::Error) -> HandoverError {
    HandoverError::Staging { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_tool_that_fails_is_named_with_its_last_words() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo first >&2; echo last >&2; exit 3"]);
        let error = run(command, "sh", Duration::from_secs(10)).await.unwrap_err();
        assert_eq!(error.to_string(), "running sh: it ended with exit status: 3: last");
    }

    #[tokio::test]
    async fn a_tool_that_hangs_is_ended() {
        let mut command = Command::new("tail");
        command.args(["-f", "/dev/null"]);
        let error = run(command, "tail", Duration::from_millis(100)).await.unwrap_err();
        assert!(matches!(error, ToolError::Timeout { .. }), "{error}");
    }
}
