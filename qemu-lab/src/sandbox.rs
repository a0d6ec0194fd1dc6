//! The lab re-executes itself inside fresh mount, PID and network namespaces (and a user namespace where it is not
//! root). It is PID 1 there: when it ends, the kernel kills everything that it started, and nothing on the host was
//! changed.

use crate::command::{command, run};
use crate::error::{LabError, Result};
use std::process::{ExitCode, Stdio};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Set for the inner execution.
const INSIDE: &str = "ASSAY_LAB_INSIDE";

/// Whether this process runs inside already.
#[must_use]
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this program with the same arguments inside, and ends as it ends. SIGTERM and SIGHUP end it at once; Ctrl-C
/// reaches the inside by itself, which then has a moment to say goodbye.
///
/// # Errors
/// `unshare` cannot be started, or namespaces are not allowed here.
pub async fn enter() -> Result<ExitCode> {
    let doing = "entering namespaces with `unshare` (package util-linux)";
    let program = std::env::current_exe().map_err(LabError::io("finding this program's own file"))?;
    // If this process dies without a word, the kernel ends `unshare`, and with it PID 1 of the inside.
    let mut unshare = command("setpriv");
    unshare.args(["--pdeathsig", "KILL", "unshare"]);
    unshare.args(["--fork", "--kill-child=KILL", "--pid", "--mount-proc", "--mount", "--net"]);
    if !nix::unistd::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    unshare.arg("--").arg(program).args(std::env::args_os().skip(1)).env(INSIDE, "1");
    unshare.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    let mut inside = unshare.spawn().map_err(LabError::io(doing))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(LabError::io(doing))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(LabError::io(doing))?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(LabError::io(doing))?;
    let patience = async {
        interrupt.recv().await;
        tokio::time::sleep(GOODBYE_LIMIT).await;
    };
    tokio::select! {
        ended = inside.wait() => {
            let code = ended.map_err(LabError::io(doing))?.code().and_then(|code| u8::try_from(code).ok());
            return Ok(ExitCode::from(code.unwrap_or(1)));
        }
        () = patience => {}
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
    inside.kill().await.map_err(LabError::io("ending the lab"))?;
    Ok(ExitCode::from(ENDED_BY_SIGNAL))
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
/// After Ctrl-C.
const GOODBYE_LIMIT: Duration = Duration::from_secs(10);
/// 128 + SIGTERM, as shells say it.
const ENDED_BY_SIGNAL: u8 = 143;
