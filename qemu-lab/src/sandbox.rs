//! The lab re-executes itself inside fresh mount, PID and network namespaces (and a user namespace where it is not
//! root). It is PID 1 there: when it ends, the kernel kills everything that it started, and nothing on the host was
//! changed.

use crate::command::{command, run};
use crate::error::{LabError, Result};
use std::os::unix::process::CommandExt as _;
use std::time::Duration;

/// Set for the inner execution.
const INSIDE: &str = "ASSAY_LAB_INSIDE";

/// Whether this process runs inside already.
#[must_use]
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Replaces this process by `unshare`, which runs this program with the same arguments inside. Returns only to say why
/// it could not.
#[must_use]
pub fn enter() -> LabError {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(source) => return LabError::Io { doing: "finding this program's own file".into(), source },
    };
    let mut unshare = std::process::Command::new("unshare");
    unshare.args(["--fork", "--kill-child=KILL", "--pid", "--mount-proc", "--mount", "--net"]);
    if !nix::unistd::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let source = unshare.arg("--").arg(program).args(std::env::args_os().skip(1)).env(INSIDE, "1").exec();
    LabError::Io { doing: "entering namespaces with `unshare` (package util-linux)".into(), source }
}

/// What the inside needs before anything else: a `/run` of its own and loopback.
///
/// # Errors
/// A tool fails.
pub async fn prepare() -> Result<()> {
    let mut mount = command("mount");
    mount.args(["-t", "tmpfs", "-o", "mode=0755", "lab", "/run"]);
    run(mount, "mounting the lab's own /run", LIMIT).await?;
    std::fs::create_dir_all(crate::netns::NETNS_FOLDER).map_err(LabError::io("making /run/netns"))?;
    crate::netns::Netns::Site.ip(&["link", "set", "lo", "up"]).await.map(drop)
}

const LIMIT: Duration = Duration::from_secs(10);
