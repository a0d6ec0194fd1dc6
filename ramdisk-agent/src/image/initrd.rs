//! The ramdisk's file system: the agent as `/init`, two tools, their shared libraries and the kernel modules.

use super::elf::{ElfError, needed_libraries};
use super::modules::{Module, ModulesError, select};
use super::packages::{Kernel, Packages};
use crate::cpio::{Archive, CpioError};
use crate::init::modules::LIST;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Directories, parents first. `dev`, `proc` and `sys` are mount points.
const DIRECTORIES: [&str; 13] = [
    "dev",
    "etc",
    "etc/assay",
    "lib",
    "lib/modules",
    "lib/x86_64-linux-gnu",
    "lib64",
    "proc",
    "run",
    "sys",
    "tmp",
    "usr",
    "usr/sbin",
];

/// Tools: where they go, and where packages have them.
const TOOLS: [(&str, [&str; 2]); 2] = [
    ("usr/sbin/iscsistart", ["sbin/iscsistart", "usr/sbin/iscsistart"]),
    ("usr/sbin/kexec", ["sbin/kexec", "usr/sbin/kexec"]),
];

/// The TPM software stack opens its transport by name at run time, so no ELF header tells of it.
const OPENED_AT_RUN_TIME: [&str; 1] = ["libtss2-tcti-device.so.0"];

/// The program interpreter, at the one path that executables name.
const INTERPRETER: &str = "ld-linux-x86-64.so.2";

/// Where libraries are looked for: in the packages, then on the machine that built the agent against them.
const LIBRARY_DIRECTORIES: [&str; 4] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib64"];

/// Packs the file system into an archive.
///
/// # Errors
/// See [`InitrdError`].
pub fn archive(agent: &Path, packages: &Packages, kernel: &Kernel) -> Result<Vec<u8>, InitrdError> {
    let modules = select(kernel)?;
    let mut programs = BTreeMap::from([("init".to_owned(), read(agent)?)]);
    for (target, sources) in TOOLS {
        let source = sources
            .iter()
            .find_map(|path| packages.file(path))
            .ok_or_else(|| InitrdError::NoTool { tool: target.to_owned() })?;
        programs.insert(target.to_owned(), read(&source)?);
    }
    let libraries = libraries(programs.values(), packages)?;

    let mut archive = Archive::default();
    for directory in DIRECTORIES {
        archive.directory(directory)?;
    }
    archive.file(LIST.trim_start_matches('/'), 0o644, list(&modules).as_bytes())?;
    for (name, content) in &programs {
        archive.file(name, 0o755, content)?;
    }
    for (name, content) in &libraries {
        let directory = if name == INTERPRETER { "lib64" } else { "lib/x86_64-linux-gnu" };
        archive.file(&format!("{directory}/{name}"), 0o755, content)?;
    }
    for module in &modules {
        archive.file(path_in_image(module).trim_start_matches('/'), 0o644, &read(&module.path)?)?;
    }
    Ok(archive.finish()?)
}

/// Why there is no initrd.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// A file cannot be read.
    #[error("reading {} for the initrd", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No package has it.
    #[error("building the initrd: no package holds {tool}")]
    NoTool {
        /// Where it should go.
        tool: String,
    },
    /// Nobody has it.
    #[error("building the initrd: neither the packages nor this machine have the library {name}")]
    NoLibrary {
        /// Its name.
        name: String,
    },
    /// A program or library cannot be parsed.
    #[error("building the initrd: {name}")]
    Elf {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: ElfError,
    },
    /// Modules cannot be selected.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// It cannot be archived.
    #[error("building the initrd")]
    Cpio(#[from] CpioError),
}

/// All libraries that `programs` need, and those that these need, by name.
fn libraries<'a>(
    programs: impl Iterator<Item = &'a Vec<u8>>,
    packages: &Packages,
) -> Result<BTreeMap<String, Vec<u8>>, InitrdError> {
    let mut wanted: Vec<String> = OPENED_AT_RUN_TIME.map(str::to_owned).to_vec();
    wanted.push(INTERPRETER.to_owned());
    for program in programs {
        wanted.extend(needed("a program", program)?);
    }
    let mut found = BTreeMap::new();
    while let Some(name) = wanted.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let path = find(&name, packages).ok_or_else(|| InitrdError::NoLibrary { name: name.clone() })?;
        let content = read(&path)?;
        wanted.extend(needed(&name, &content)?);
        found.insert(name, content);
    }
    Ok(found)
}

fn needed(name: &str, content: &[u8]) -> Result<Vec<String>, InitrdError> {
    needed_libraries(content).map_err(|source| InitrdError::Elf { name: name.to_owned(), source })
}

fn find(name: &str, packages: &Packages) -> Option<PathBuf> {
    let on_this_machine = |directory: &str| Some(Path::new("/").join(directory).join(name)).filter(|p| p.is_file());
    LIBRARY_DIRECTORIES
        .iter()
        .find_map(|directory| packages.file(&format!("{directory}/{name}")))
        .or_else(|| LIBRARY_DIRECTORIES.iter().find_map(|directory| on_this_machine(directory)))
}

fn read(path: &Path) -> Result<Vec<u8>, InitrdError> {
    fs::read(path).map_err(|source| InitrdError::Read { path: path.to_owned(), source })
}

fn path_in_image(module: &Module) -> String {
    format!("/lib/modules/{}.ko", module.name)
}

/// The list that [`crate::init::modules`] reads.
fn list(modules: &[Module]) -> String {
    modules.iter().fold(String::new(), |mut list, module| {
        // Writing to a string cannot fail.
        let _ = writeln!(list, "{} {}", module.group, path_in_image(module));
        list
    })
}
