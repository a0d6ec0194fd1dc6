//! What revocation notices become on a node: a file each, and the programs of a folder, started with that file's name.
//! What was acted upon is known by the files, so that an agent which starts again begins where it was.

use super::verifier::AttestationClient;
use crate::backoff::Patience;
use crate::console::Chain;
use assay_wire::attestation::RevocationNotice;
use nix::unistd::{AccessFlags, access};
use std::convert::Infallible;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::timeout;

/// Where notices go, and what they start.
#[derive(Debug, Clone)]
pub struct Notices {
    revoked: PathBuf,
    hooks: PathBuf,
}

impl Notices {
    /// Makes the folder of notices, `revoked` below `run`, if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(run: &Path, hooks: &Path) -> Result<Self, NoticeError> {
        let revoked = run.join("revoked");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&revoked).map_err(writing(&revoked))?;
        Ok(Self { revoked, hooks: hooks.to_owned() })
    }

    /// Follows the project's notices for ever.
    pub async fn follow(&self, client: &AttestationClient) -> Infallible {
        let mut patience = Patience::default();
        let mut after = self.last_sequence();
        loop {
            match client.notices(after).await {
                Ok(answer) => {
                    let mut missed = false;
                    for notice in &answer.notices {
                        if let Err(error) = self.act_upon(notice).await {
                            tracing::error!(event = "agent.notice_failed", node = %notice.node, "{}", Chain(&error));
                            missed = true;
                            break;
                        }
                        after = after.max(notice.sequence);
                    }
                    if missed {
                        tokio::time::sleep(patience.next_delay(super::random())).await;
                        continue;
                    }
                    // A verifier that answers at once with nothing is asked again only after a moment.
                    let idle = answer.notices.is_empty() && answer.latest <= after;
                    after = after.max(answer.latest);
                    patience = Patience::default();
                    if idle {
                        tokio::time::sleep(patience.next_delay(super::random())).await;
                    }
                }
                Err(error) => {
                    let delay = patience.next_delay(super::random());
                    tracing::debug!(event = "agent.no_notices", "{}", Chain(&error));
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    /// Writes the notice, then starts every program of the folder, in the order of their names, one after the other. A
    /// program that fails is logged: the others are started all the same.
    ///
    /// # Errors
    /// The notice cannot be written.
    pub async fn act_upon(&self, notice: &RevocationNotice) -> Result<(), NoticeError> {
        let node = &notice.node;
        tracing::warn!(
            event = "agent.notice",
            %node,
            sequence = notice.sequence,
            "{node} is no longer trusted: {}",
            crate::client::printable(&notice.reason)
        );
        // A node's name is a label: it cannot leave the folder.
        let path = self.revoked.join(format!("{node}.json"));
        let json = serde_json::to_vec_pretty(notice).map_err(|source| NoticeError::Json { source })?;
        write_private(&path, &json)?;
        for hook in self.programs() {
            match run_hook(&hook, &path).await {
                Ok(()) => tracing::info!(event = "agent.hook", %node, "{} dealt with {node}", hook.display()),
                Err(problem) => {
                    tracing::error!(event = "agent.hook_failed", %node, "{}: {problem}", hook.display());
                }
            }
        }
        Ok(())
    }

    /// The highest sequence number that was acted upon.
    fn last_sequence(&self) -> u64 {
        let files = fs::read_dir(&self.revoked).into_iter().flatten().flatten();
        let notices =
            files.filter_map(|file| serde_json::from_slice::<RevocationNotice>(&fs::read(file.path()).ok()?).ok());
        notices.map(|notice| notice.sequence).max().unwrap_or(0)
    }

    /// The programs, by name. No folder is no programs.
    fn programs(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(&self.hooks).into_iter().flatten().flatten().map(|file| file.path());
        let mut programs: Vec<PathBuf> =
            files.filter(|path| path.is_file() && access(path, AccessFlags::X_OK).is_ok()).collect();
        programs.sort();
        programs
    }
}

/// Why a notice could not be acted upon.
#[derive(Debug, thiserror::Error)]
pub enum NoticeError {
    /// It cannot be written.
    #[error("writing {}", path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It cannot be put in JSON.
    #[error("writing a revocation notice as JSON")]
    Json {
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
}

/// Replaces `path`, whole or not at all, with a file for root alone.
pub(super) fn write_private(path: &Path, content: &[u8]) -> Result<(), NoticeError> {
    let fresh = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&fresh).map_err(writing(&fresh))?;
    file.write_all(content).map_err(writing(&fresh))?;
    fs::rename(&fresh, path).map_err(writing(path))
}

fn writing(path: &Path) -> impl FnOnce(io::Error) -> NoticeError {
    let path = path.to_owned();
    move |source| NoticeError::Write { path, source }
}

/// Runs one program to its end, within [`HOOK_LIMIT`], with nothing of our environment.
async fn run_hook(hook: &Path, notice: &Path) -> Result<(), String> {
    let mut command = Command::new(hook);
    command.arg(notice).env_clear().env("PATH", HOOK_PATH);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| format!("it cannot be started: {error}"))?;
    match timeout(HOOK_LIMIT, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("it ended with {status}")),
        Ok(Err(error)) => Err(format!("waiting for it: {error}")),
        Err(_elapsed) => Err(format!("it did not end within {} s", HOOK_LIMIT.as_secs())),
    }
}

const HOOK_LIMIT: Duration = Duration::from_secs(30);
const HOOK_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn notice(node: &str, sequence: u64) -> RevocationNotice {
        RevocationNotice {
            sequence,
            node: node.parse().unwrap(),
            admission: "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap(),
            ak_name: format!("000b{}", "cd".repeat(32)),
            reason: "PCR 12 changed".to_owned(),
            at_ms: 1,
        }
    }

    fn program(path: &Path, mode: u32, script: &str) {
        fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn a_notice_is_written_and_every_program_is_started_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let hooks = folder.path().join("hooks");
        fs::create_dir(&hooks).unwrap();
        let seen = folder.path().join("seen");
        // The second fails, the third is no program: neither keeps the last from being started.
        program(&hooks.join("10-first"), 0o755, &format!("echo first $1 $HOME >> {}", seen.display()));
        program(&hooks.join("20-fails"), 0o755, "exit 3");
        program(&hooks.join("30-data"), 0o644, &format!("echo data >> {}", seen.display()));
        program(&hooks.join("40-last"), 0o755, &format!("echo last $1 >> {}", seen.display()));
        let notices = Notices::open(folder.path(), &hooks).unwrap();
        assert_eq!(notices.last_sequence(), 0);
        notices.act_upon(&notice("n2", 7)).await.unwrap();
        let file = folder.path().join("revoked/n2.json");
        let expected = format!("first {0}\nlast {0}\n", file.display());
        assert_eq!(fs::read_to_string(&seen).unwrap(), expected);
        assert_eq!(serde_json::from_slice::<RevocationNotice>(&fs::read(&file).unwrap()).unwrap(), notice("n2", 7));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        notices.act_upon(&notice("n3", 5)).await.unwrap();
        assert_eq!(Notices::open(folder.path(), &hooks).unwrap().last_sequence(), 7);
    }

    #[tokio::test]
    async fn no_folder_of_programs_is_no_trouble() {
        let folder = tempfile::tempdir().unwrap();
        let notices = Notices::open(folder.path(), &folder.path().join("none")).unwrap();
        notices.act_upon(&notice("n2", 1)).await.unwrap();
        assert!(folder.path().join("revoked/n2.json").exists());
    }
}
