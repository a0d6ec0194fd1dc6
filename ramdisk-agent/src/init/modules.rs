//! Kernel modules, in the order that the image's build worked out from their dependencies (`agent-image`).
//! The image has no modprobe, and the kernel's own requests for modules find nobody.

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// The image's list: one module a line, group and path with a blank between them.
pub const LIST: &str = "/etc/assay/modules";

/// When modules are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// At once: the bus and the NICs.
    Early,
    /// For quotes of a trust domain.
    Tee,
    /// For the hand-over: iSCSI and SCSI disks.
    Iscsi,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Early => "early",
            Self::Tee => "tee",
            Self::Iscsi => "iscsi",
        })
    }
}

/// Loads the modules of a group, in order. Loaded ones are skipped; one whose hardware is not there is no error.
///
/// # Errors
/// See [`ModuleError`].
pub fn load(group: Group) -> Result<(), ModuleError> {
    let list = fs::read_to_string(LIST).map_err(|source| ModuleError::List { source })?;
    for path in of_group(&list, group) {
        load_one(path).map_err(|source| ModuleError::Load { path: path.to_owned(), source })?;
    }
    Ok(())
}

/// Why a module is not there.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// No list.
    #[error("reading the list of kernel modules {LIST}")]
    List {
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses one.
    #[error("loading the kernel module {}", path.display())]
    Load {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn of_group(list: &str, group: Group) -> impl Iterator<Item = &Path> {
    let wanted = group.to_string();
    list.lines().filter_map(move |line| {
        let (group, path) = line.split_once(' ')?;
        (group == wanted).then_some(Path::new(path))
    })
}

fn load_one(path: &Path) -> io::Result<()> {
    match finit_module(File::open(path)?, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_kept_apart_and_in_order() {
        let list = "early /m/b.ko\niscsi /m/c.ko\nearly /m/a.ko\n\n";
        assert_eq!(of_group(list, Group::Early).collect::<Vec<_>>(), [Path::new("/m/b.ko"), Path::new("/m/a.ko")]);
        assert_eq!(of_group(list, Group::Iscsi).collect::<Vec<_>>(), [Path::new("/m/c.ko")]);
    }
}
