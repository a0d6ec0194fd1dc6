//! Which kernel modules the ramdisk carries, and in which order they load. The kernel's own words decide the order:
//! each module names those that it needs (`virtio` needs `virtio_ring`, `virtio_net` needs `net_failover`, …).

use super::elf::{ElfError, module_dependencies};
use super::packages::Kernel;
use crate::init::modules::Group;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What the ramdisk cannot do without.
const REQUIRED: [(Group, &str); 4] =
    [(Group::Early, "virtio_pci"), (Group::Early, "virtio_net"), (Group::Iscsi, "iscsi_tcp"), (Group::Iscsi, "sd_mod")];

/// Taken where the kernel package has them: a cloud kernel has few, a generic one has those of servers.
const OPTIONAL: [(Group, &str); 14] = [
    (Group::Early, "virtio_rng"),
    (Group::Early, "vmxnet3"),
    (Group::Early, "ixgbevf"),
    (Group::Early, "e1000"),
    (Group::Early, "e1000e"),
    (Group::Early, "igb"),
    (Group::Early, "ixgbe"),
    (Group::Early, "i40e"),
    (Group::Early, "ice"),
    (Group::Early, "bnxt_en"),
    (Group::Early, "tg3"),
    (Group::Tee, "tdx_guest"),
    (Group::Iscsi, "crc32c_intel"),
    (Group::Iscsi, "ext4"),
];

/// A module in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// When it loads.
    pub group: Group,
    /// Its name, with `_`.
    pub name: String,
    /// Where it is in the unpacked package.
    pub path: PathBuf,
}

/// The ramdisk's modules, in load order; each once, in the first group that needs it.
///
/// # Errors
/// See [`ModulesError`].
pub fn select(kernel: &Kernel) -> Result<Vec<Module>, ModulesError> {
    let files = index(&kernel.modules)?;
    let built_in = built_in(&kernel.modules)?;
    let mut order = Order { files: &files, built_in: &built_in, chosen: Vec::new(), seen: BTreeSet::new() };
    for (group, name) in REQUIRED {
        order.add(group, name)?;
    }
    for (group, name) in OPTIONAL {
        if files.contains_key(name) {
            order.add(group, name)?;
        }
    }
    // Required ones come first in their group, but the groups themselves must not mix.
    order.chosen.sort_by_key(|module| module.group);
    Ok(order.chosen)
}

/// Why modules cannot be selected.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A directory or file cannot be read.
    #[error("reading kernel modules in {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel package does not have it.
    #[error(
        "selecting kernel modules: the package has no `{name}`, built in or as .ko file (compressed modules are not supported)"
    )]
    Missing {
        /// Its name.
        name: String,
    },
    /// It cannot be parsed.
    #[error("selecting kernel modules: {}", path.display())]
    Elf {
        /// Its file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: ElfError,
    },
}

/// Depth-first: what a module needs comes before it.
struct Order<'a> {
    files: &'a BTreeMap<String, PathBuf>,
    built_in: &'a BTreeSet<String>,
    chosen: Vec<Module>,
    seen: BTreeSet<String>,
}

impl Order<'_> {
    fn add(&mut self, group: Group, name: &str) -> Result<(), ModulesError> {
        if self.built_in.contains(name) || !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name).ok_or_else(|| ModulesError::Missing { name: name.to_owned() })?;
        let file = fs::read(path).map_err(|source| ModulesError::Read { path: path.clone(), source })?;
        let needed = module_dependencies(&file).map_err(|source| ModulesError::Elf { path: path.clone(), source })?;
        for dependency in needed {
            self.add(group, &canonical(&dependency))?;
        }
        self.chosen.push(Module { group, name: name.to_owned(), path: path.clone() });
        Ok(())
    }
}

/// Modules are named with `_`, their files with either.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    Some(canonical(path.file_name()?.to_str()?.strip_suffix(".ko")?))
}

fn index(directory: &Path) -> Result<BTreeMap<String, PathBuf>, ModulesError> {
    let mut found = BTreeMap::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let failed = |source| ModulesError::Read { path: directory.clone(), source };
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            if entry.file_type().map_err(failed)?.is_dir() {
                directories.push(path);
            } else if let Some(name) = module_name(&path) {
                found.insert(name, path);
            }
        }
    }
    Ok(found)
}

fn built_in(directory: &Path) -> Result<BTreeSet<String>, ModulesError> {
    let path = directory.join("modules.builtin");
    let list = fs::read_to_string(&path).map_err(|source| ModulesError::Read { path, source })?;
    Ok(list.lines().filter_map(|line| module_name(Path::new(line))).collect())
}
