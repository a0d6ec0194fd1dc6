//! The lab's Debian images: the tenant's golden image, a small system that boots from iSCSI, answers HTTP with its name
//! and goes on attesting; and the [`workbench`], the same with the tools of somebody who tries disks out. Built without
//! root where user namespaces allow it and without loop devices everywhere. Two steps, each kept by a digest of what
//! goes in: the system, which takes a minute, and the agent with its files, which take seconds ([`overlay`]).

mod overlay;

use crate::command::{command, run};
use crate::error::{LabError, Result};
use ring::digest::{Context, SHA256};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

/// Builds the tenant image below `cache` with the agent from `agent_image` (as `make agent-image` leaves it), unless the
/// same one is there. Answers the qcow2 file. `progress` gets a line whenever there is something to say.
///
/// # Errors
/// A tool fails; its last words are in the error.
pub async fn tenant(cache: &Path, agent_image: &Path, progress: impl Fn(&str)) -> Result<PathBuf> {
    fs::create_dir_all(cache).map_err(LabError::io(format!("making {}", cache.display())))?;
    let agent = agent_image.join("assay-agent");
    let agent =
        fs::read(&agent).map_err(LabError::io(format!("reading {} (run `make agent-image`)", agent.display())))?;
    let files = overlay::files(&agent);
    let image = cache.join(format!("tenant-{}-{}.qcow2", TENANT.digest(), overlay::digest(&files)));
    if image.exists() {
        progress(&format!("tenant image: {} (made before)", image.display()));
        return Ok(image);
    }
    let system = system(cache, &TENANT, &progress).await?;
    in_a_work_folder(cache, async |work| add_the_agent(&system, work, &files, &image, &progress).await).await?;
    Ok(image)
}

/// Builds the workbench's image below `cache`, unless the same one is there. Answers the raw disk.
///
/// # Errors
/// A tool fails; its last words are in the error.
pub async fn workbench(cache: &Path, progress: impl Fn(&str)) -> Result<PathBuf> {
    fs::create_dir_all(cache).map_err(LabError::io(format!("making {}", cache.display())))?;
    system(cache, &WORKBENCH, &progress).await
}

/// A system without the agent, built unless it is there.
async fn system(cache: &Path, recipe: &Recipe, progress: &impl Fn(&str)) -> Result<PathBuf> {
    let system = cache.join(format!("{}-system-{}.raw", recipe.name, recipe.digest()));
    if !system.exists() {
        in_a_work_folder(cache, async |work| build_system(recipe, work, &system, progress).await).await?;
    }
    Ok(system)
}

async fn in_a_work_folder(cache: &Path, build: impl AsyncFnOnce(&Path) -> Result<()>) -> Result<()> {
    let work = cache.join(format!("image-work-{}", std::process::id()));
    fs::create_dir_all(&work).map_err(LabError::io(format!("making {}", work.display())))?;
    let built = build(&work).await;
    // What is left of a failed build is of no use; of a good one, everything was renamed.
    let _leftovers = fs::remove_dir_all(&work);
    built
}

async fn add_the_agent(
    system: &Path,
    work: &Path,
    files: &[overlay::OverlayFile<'_>],
    image: &Path,
    progress: &impl Fn(&str),
) -> Result<()> {
    progress("tenant image: adding the agent");
    let disk = work.join("tenant.raw");
    let mut copy = command("cp");
    copy.arg("--sparse=always").arg("--reflink=auto").arg(system).arg(&disk);
    run(copy, "copying the tenant's system", CONVERT_LIMIT).await?;
    overlay::apply(&disk, PARTITION_OFFSET, files, work).await?;
    progress("tenant image: converting to qcow2");
    let finished = work.join("tenant.qcow2");
    let mut convert = command("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&disk).arg(&finished);
    run(convert, "converting the tenant image", CONVERT_LIMIT).await?;
    fs::rename(&finished, image).map_err(LabError::io(format!("keeping {}", image.display())))?;
    let megabytes = fs::metadata(image).map_or(0, |m| m.len() / 1_000_000);
    progress(&format!("tenant image: {} ({megabytes} MB)", image.display()));
    Ok(())
}

/// Debian, without the agent, as a raw disk.
async fn build_system(recipe: &Recipe, work: &Path, system: &Path, progress: &impl Fn(&str)) -> Result<()> {
    let disk = work.join("disk.raw");
    for (name, text) in FILES {
        let path = work.join(name);
        fs::write(&path, text).map_err(LabError::io(format!("writing {}", path.display())))?;
        set_mode(&path, 0o755)?;
    }
    let file = fs::File::create(&disk).map_err(LabError::io(format!("creating {}", disk.display())))?;
    file.set_len(recipe.disk_bytes).map_err(LabError::io(format!("sizing {}", disk.display())))?;
    // Without root, the file system is made by a user that the namespace maps elsewhere.
    set_mode(&disk, 0o666)?;
    partition(&disk, "L").await?;
    progress(&format!("{} image: fetching and unpacking Debian 12 (about half a minute)", recipe.name));
    bootstrap(recipe, work, &disk, progress).await?;
    fs::rename(&disk, system).map_err(LabError::io(format!("keeping {}", system.display())))
}

/// Gives a disk a GPT with one partition of a type that `sfdisk` calls `kind`.
pub(crate) async fn partition(disk: &Path, kind: &str) -> Result<()> {
    let doing = "partitioning a disk image";
    let mut sfdisk = command("/sbin/sfdisk");
    sfdisk.arg("--quiet").arg(disk).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = sfdisk.spawn().map_err(LabError::io(doing))?;
    let script = format!("label: gpt\nstart={PARTITION_OFFSET_SECTORS}, type={kind}, name=tenant\n");
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).await.map_err(LabError::io(doing))?;
    }
    let status = child.wait().await.map_err(LabError::io(doing))?;
    if status.success() { Ok(()) } else { Err(LabError::unexpected(doing, format!("sfdisk failed ({status})"))) }
}

async fn bootstrap(recipe: &Recipe, work: &Path, disk: &Path, progress: &impl Fn(&str)) -> Result<()> {
    let doing = format!("building the {} image", recipe.name);
    let hook = |name: &str, when: &str| format!("--{when}-hook={}", work.join(name).display());
    let mut mmdebstrap = command("mmdebstrap");
    mmdebstrap.args(["--mode=auto", "--variant=minbase", "--format=null"]);
    mmdebstrap.arg(format!("--include={}", recipe.packages().join(",")));
    mmdebstrap.arg("--aptopt=Apt::Install-Recommends \"false\"");
    for unwanted in ["man", "doc", "locale", "info"] {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude=/usr/share/{unwanted}/*"));
    }
    mmdebstrap.arg(hook("before-packages", "essential"));
    if let Some(command) = recipe.customize {
        mmdebstrap.arg(format!("--customize-hook={command}"));
    }
    mmdebstrap.arg(hook("after-packages", "customize")).arg("bookworm");
    mmdebstrap.env("TENANT_FILES", work).env("TENANT_DISK", disk);
    mmdebstrap.env("TENANT_OFFSET", PARTITION_OFFSET.to_string());
    mmdebstrap.env("TENANT_SIZE", format!("{}k", recipe.file_system_bytes() / 1024));
    // mkfs and friends are in /sbin, which an ordinary user's PATH lacks.
    let path = std::env::var("PATH").unwrap_or_default();
    mmdebstrap.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    mmdebstrap.stderr(Stdio::piped()).stdout(Stdio::null());
    let mut child = mmdebstrap.spawn().map_err(LabError::io(format!("{doing}: starting mmdebstrap")))?;
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        let mut lines = BufReader::new(stderr).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Some(step) = line.strip_prefix("I: ").filter(|step| !step.starts_with("running --")) {
                progress(&format!("{} image: {step}", recipe.name));
            }
            said.push_str(&line);
            said.push('\n');
        }
    }
    let status = child.wait().await.map_err(LabError::io(&*doing))?;
    if status.success() {
        return Ok(());
    }
    let (output, status) = (crate::command::tail(said.trim()), status.to_string());
    Err(LabError::Tool { doing, command: "mmdebstrap".to_owned(), status, output })
}

/// What a system is made of.
struct Recipe {
    name: &'static str,
    /// Beside [`PACKAGES`].
    more_packages: &'static [&'static str],
    /// What a shell does to it, whose root is in `$1`, before its file system is made.
    customize: Option<&'static str>,
    disk_bytes: u64,
}

impl Recipe {
    fn packages(&self) -> Vec<&'static str> {
        PACKAGES.iter().chain(self.more_packages).copied().collect()
    }

    /// The partition without the backup of its table at the disk's end.
    fn file_system_bytes(&self) -> u64 {
        self.disk_bytes - (2 << 20)
    }

    /// Digest of everything that decides what the image becomes, short enough for a file name.
    fn digest(&self) -> String {
        let mut context = Context::new(&SHA256);
        for (name, text) in FILES {
            context.update(name.as_bytes());
            context.update(text.as_bytes());
        }
        context.update(self.packages().join(",").as_bytes());
        context.update(self.customize.unwrap_or_default().as_bytes());
        context.update(&self.disk_bytes.to_be_bytes());
        hex::encode(&context.finish().as_ref()[..6])
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(LabError::io(format!("setting the mode of {}", path.display())))
}

const TENANT: Recipe = Recipe { name: "tenant", more_packages: &[], customize: None, disk_bytes: 768 << 20 };
const WORKBENCH: Recipe = Recipe {
    name: "workbench",
    more_packages: &["fio", "multipath-tools"],
    // It does at boot what its second disk says.
    customize: Some("printf '#!/bin/sh\\nexec sh /dev/vdb\\n' > \"$1/etc/rc.local\" && chmod 0755 \"$1/etc/rc.local\""),
    disk_bytes: 1536 << 20,
};
const PACKAGES: [&str; 13] = [
    "systemd-sysv",
    "udev",
    "kmod",
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "open-iscsi",
    "iproute2",
    "zstd",
    "busybox-static",
    // What the agent is linked to, and the way to a TPM that those libraries load.
    "libtss2-esys-3.0.2-0",
    "libtss2-mu0",
    "libtss2-tctildr0",
    "libtss2-tcti-device0",
];
const FILES: [(&str, &str); 4] = [
    ("before-packages", include_str!("../tenant/before-packages")),
    ("after-packages", include_str!("../tenant/after-packages")),
    ("answer-page", include_str!("../tenant/answer-page")),
    ("answer.service", include_str!("../tenant/answer.service")),
];
const PARTITION_OFFSET_SECTORS: u64 = 2048;
/// Where the file system of an image begins, in octets.
pub(crate) const PARTITION_OFFSET: u64 = PARTITION_OFFSET_SECTORS * 512;
const CONVERT_LIMIT: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_system_fits_between_the_partition_tables() {
        for recipe in [TENANT, WORKBENCH] {
            let end = PARTITION_OFFSET + recipe.file_system_bytes();
            assert!(end + 33 * 512 <= recipe.disk_bytes);
            assert_eq!(recipe.file_system_bytes() % 4096, 0);
            assert_eq!(recipe.digest().len(), 12);
        }
        assert_ne!(TENANT.digest(), WORKBENCH.digest());
    }
}
