//! The kernel's own file systems, which the ramdisk does not have until PID 1 mounts them.

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use std::fs;
use std::io;
use std::path::Path;

/// Where, and what; in this order, as the last one is inside the second.
const MOUNTS: [(&str, &str); 4] =
    [("/proc", "proc"), ("/sys", "sysfs"), ("/sys/kernel/security", "securityfs"), ("/dev", "devtmpfs")];

/// A mount that failed.
#[derive(Debug, thiserror::Error)]
#[error("mounting {kind} on {path}")]
pub struct MountError {
    path: &'static str,
    kind: &'static str,
    #[source]
    source: io::Error,
}

/// Mounts them all. One that is mounted already is left alone.
///
/// # Errors
/// If the kernel refuses.
pub fn mount_all() -> Result<(), MountError> {
    for (path, kind) in MOUNTS {
        fs::create_dir_all(path).map_err(|source| MountError { path, kind, source })?;
        mount_one(path, kind)?;
    }
    Ok(())
}

/// Mounts the file system of the kernel's report interface ([`crate::tee::tsm`]), where the kernel has one: it makes the
/// folder for it.
///
/// # Errors
/// If the kernel refuses.
pub fn mount_configfs() -> Result<(), MountError> {
    if Path::new(CONFIGFS).is_dir() { mount_one(CONFIGFS, "configfs") } else { Ok(()) }
}

fn mount_one(path: &'static str, kind: &'static str) -> Result<(), MountError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    match mount(Some(kind), path, Some(kind), flags, None::<&str>) {
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(MountError { path, kind, source: errno.into() }),
    }
}

const CONFIGFS: &str = "/sys/kernel/config";
