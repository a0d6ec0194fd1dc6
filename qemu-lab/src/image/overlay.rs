//! What the lab adds to the tenant's system: the agent that goes on attesting, its unit, what the kernel is to measure,
//! and the lab's hand. Written straight into the ext4 file system by `debugfs`, so that a new agent costs seconds.

use crate::command::{command, run};
use crate::error::{LabError, Result};
use ring::digest::{Context, SHA256};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// A file to add.
#[derive(Debug, Clone, Copy)]
pub(super) struct OverlayFile<'a> {
    /// Its folder, which is there already.
    folder: &'static str,
    name: &'static str,
    mode: u32,
    content: &'a [u8],
}

/// The agent and what belongs to it.
pub(super) fn files(agent: &[u8]) -> [OverlayFile<'_>; 4] {
    let file = |folder, name, mode, content| OverlayFile { folder, name, mode, content };
    [
        file("/usr/local/sbin", "assay-agent", 0o755, agent),
        file(UNITS, UNIT, 0o644, include_bytes!("../../../ramdisk-agent/systemd/assay-agent.service")),
        file("/etc/ima", "ima-policy", 0o644, include_bytes!("../../tenant/ima-policy")),
        file("/usr/local/share/tenant/cgi-bin", "act", 0o755, include_bytes!("../../tenant/act")),
    ]
}

/// Digest of all that is added, short enough for a file name.
pub(super) fn digest(files: &[OverlayFile<'_>]) -> String {
    let mut context = Context::new(&SHA256);
    for file in files {
        context.update(file.folder.as_bytes());
        context.update(file.name.as_bytes());
        context.update(&file.mode.to_be_bytes());
        context.update(&(file.content.len() as u64).to_be_bytes());
        context.update(file.content);
    }
    hex::encode(&context.finish().as_ref()[..6])
}

/// Writes `files` into the file system that starts at `offset` octets of `disk`, and has the agent started at boot.
///
/// # Errors
/// `debugfs` fails, or a file does not read back as it was written.
pub(super) async fn apply(disk: &Path, offset: u64, files: &[OverlayFile<'_>], work: &Path) -> Result<()> {
    let doing = "adding the agent to the tenant image";
    let mut script = String::new();
    for (number, file) in files.iter().enumerate() {
        let source = work.join(format!("overlay-{number}"));
        fs::write(&source, file.content).map_err(LabError::io(format!("writing {}", source.display())))?;
        let (folder, name, mode, source) = (file.folder, file.name, file.mode, source.display());
        // Writing to a string cannot fail.
        let _ = writeln!(script, "cd {folder}\nwrite {source} {name}\nsif {name} mode 0100{mode:o}");
        let _ = writeln!(script, "sif {name} uid 0\nsif {name} gid 0\ndump {folder}/{name} {source}.back");
    }
    let _ = writeln!(script, "cd {UNITS}/multi-user.target.wants\nsymlink {UNIT} ../{UNIT}");
    let commands = work.join("overlay.debugfs");
    fs::write(&commands, script).map_err(LabError::io(format!("writing {}", commands.display())))?;
    let mut debugfs = command("/sbin/debugfs");
    debugfs.arg("-w").arg("-f").arg(&commands).arg(format!("{}?offset={offset}", disk.display()));
    let said = run(debugfs, doing, LIMIT).await?;
    // debugfs succeeds whatever its commands did: only what is read back counts.
    for (number, file) in files.iter().enumerate() {
        let back = work.join(format!("overlay-{number}.back"));
        if fs::read(&back).unwrap_or_default() != file.content {
            let said = crate::command::tail(said.trim());
            return Err(LabError::unexpected(
                doing,
                format!("{}/{} is not as written: {said}", file.folder, file.name),
            ));
        }
    }
    Ok(())
}

const UNITS: &str = "/etc/systemd/system";
const UNIT: &str = "assay-agent.service";
const LIMIT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_agent_is_another_image() {
        assert_eq!(digest(&files(b"one")), digest(&files(b"one")));
        assert_ne!(digest(&files(b"one")), digest(&files(b"two")));
    }

    #[tokio::test]
    async fn files_are_in_the_file_system_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        for made in [
            "usr/local/sbin",
            "etc/ima",
            "usr/local/share/tenant/cgi-bin",
            "etc/systemd/system/multi-user.target.wants",
        ] {
            fs::create_dir_all(root.join(made)).unwrap();
        }
        let disk = folder.path().join("disk.raw");
        fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        let mut mkfs = command("/sbin/mkfs.ext4");
        mkfs.args(["-q", "-E", "offset=1048576", "-d"]).arg(&root).arg(&disk).arg("15360k");
        run(mkfs, "making a file system", LIMIT).await.unwrap();
        apply(&disk, 1 << 20, &files(b"an agent"), folder.path()).await.unwrap();
        let mut look = command("/sbin/debugfs");
        look.args(["-R", "stat /usr/local/sbin/assay-agent"]).arg(format!("{}?offset=1048576", disk.display()));
        let stat = run(look, "looking", LIMIT).await.unwrap();
        assert!(stat.contains("Mode:  0755") && stat.contains("User:     0"), "{stat}");
        let mut link = command("/sbin/debugfs");
        link.args(["-R", "stat /etc/systemd/system/multi-user.target.wants/assay-agent.service"]);
        link.arg(format!("{}?offset=1048576", disk.display()));
        let stat = run(link, "looking", LIMIT).await.unwrap();
        assert!(stat.contains("../assay-agent.service"), "{stat}");
        // A folder that is not there is an error, though debugfs does not mind.
        fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        let mut mkfs = command("/sbin/mkfs.ext4");
        mkfs.args(["-q", "-E", "offset=1048576"]).arg(&disk).arg("15360k");
        run(mkfs, "making an empty file system", LIMIT).await.unwrap();
        fs::remove_file(folder.path().join("overlay-0.back")).unwrap();
        assert!(apply(&disk, 1 << 20, &files(b"an agent"), folder.path()).await.is_err());
    }
}
