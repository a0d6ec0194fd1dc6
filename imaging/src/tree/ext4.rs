//! A root file system becomes an ext4 file system in a file, without root: its files are laid out in a folder of ours,
//! `mkfs.ext4 -d` takes them in, and `debugfs` writes what only root could have laid out: owners, modes, devices.

use super::TreeError;
use super::model::{Content, Model, Node};
use super::tar::Device;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const BLOCK_BYTES: u64 = 4096;
/// For the file system's own tables, its journal, and a little to write.
const SPARE_BYTES: u64 = 64 << 20;
/// What a tool said is kept so far.
const MAX_SAID: usize = 2000;

/// Makes `disk` an ext4 file system that holds `model`, whose files' octets are the
/// numbered files of `octets`. Works in `work`, which is an empty folder.
///
/// # Errors
/// The file system or a tool refuses.
pub fn make(model: &Model, octets: &Path, work: &Path, disk: &Path) -> Result<(), TreeError> {
    let root = work.join("root");
    make_folder(&root)?;
    let plan = lay_out(model, octets, &root)?;
    let script = work.join("script");
    write(&script, plan.script.as_bytes())?;
    for (number, capability) in plan.capabilities.iter().enumerate() {
        write(&work.join(format!("capability-{number}")), capability)?;
    }
    let needed = plan.bytes + plan.bytes / 8 + plan.names * 512 + SPARE_BYTES;
    let byte_len = needed.next_multiple_of(1 << 20);
    let file = File::create(disk).map_err(|source| TreeError::io("making", disk, source))?;
    file.set_len(byte_len).map_err(|source| TreeError::io("sizing", disk, source))?;
    let inodes = (plan.names + plan.names / 4 + 4096).to_string();
    let arguments =
        ["-q", "-F", "-b", "4096", "-I", "256", "-N", &inodes, "-E", "root_owner=0:0", "-d"].map(OsStr::new);
    run("mkfs.ext4", arguments.into_iter().chain([root.as_os_str(), disk.as_os_str()]), work)?;
    let said =
        run("debugfs", [OsStr::new("-w"), OsStr::new("-f"), script.as_os_str(), disk.as_os_str()].into_iter(), work)?;
    // It ends well whatever a command did; each is echoed, and what went wrong is between the echoes.
    let wrong = said
        .lines()
        .find(|line| !line.starts_with("debugfs") && !line.trim().is_empty() && !line.starts_with("Allocated"));
    match wrong {
        Some(line) => Err(TreeError::Tool { tool: "debugfs", said: line.chars().take(MAX_SAID).collect() }),
        None => Ok(()),
    }
}

/// What is still to be done to the laid-out files.
#[derive(Default)]
struct Plan {
    script: String,
    capabilities: Vec<Vec<u8>>,
    bytes: u64,
    names: u64,
}

fn lay_out(model: &Model, octets: &Path, root: &Path) -> Result<Plan, TreeError> {
    let mut plan = Plan::default();
    let mut first: Vec<Option<PathBuf>> = vec![None; model.nodes().len()];
    let mut links = Vec::new();
    plan.metadata("/", &model.nodes()[0], 0o040_000);
    model.walk(|path, index, node| {
        let (place, inside) = (place(root, path), inside(path)?);
        plan.names += 1;
        if let Some(other) = &first[index] {
            return std::fs::hard_link(other, &place).map_err(|source| TreeError::io("linking", place, source));
        }
        match &node.content {
            Content::Folder(_) => {
                make_folder(&place)?;
                plan.metadata(&inside, node, 0o040_000);
                plan.bytes += BLOCK_BYTES;
            }
            Content::File { number, size } => {
                let from = octets.join(number.to_string());
                std::fs::rename(from, &place).map_err(|source| TreeError::io("laying out", place.clone(), source))?;
                plan.metadata(&inside, node, 0o100_000);
                plan.bytes += size.next_multiple_of(BLOCK_BYTES);
                first[index] = Some(place);
            }
            Content::Symlink(target) => {
                // Last of all: nothing is ever written through one.
                links.push((target.clone(), place));
                plan.metadata(&inside, node, 0o120_000);
                plan.bytes += BLOCK_BYTES;
            }
            Content::Device(device) => plan.device(path, &inside, *device, node)?,
        }
        Ok(())
    })?;
    for (target, place) in links {
        let made = std::os::unix::fs::symlink(OsStr::from_bytes(&target), &place);
        made.map_err(|source| TreeError::io("linking", place, source))?;
    }
    Ok(plan)
}

impl Plan {
    fn metadata(&mut self, inside: &str, node: &Node, kind: u32) {
        let mode = kind | if kind == 0o120_000 { 0o777 } else { node.mode };
        let mtime = node.mtime.clamp(0, i64::from(u32::MAX));
        let Node { uid, gid, .. } = node;
        for (field, value) in [
            ("mode", format!("0{mode:o}")),
            ("uid", uid.to_string()),
            ("gid", gid.to_string()),
            ("mtime", format!("@{mtime}")),
        ] {
            let _infallible = writeln!(self.script, "sif \"{inside}\" {field} {value}");
        }
        if let Some(capability) = &node.capability {
            let number = self.capabilities.len();
            self.capabilities.push(capability.clone());
            let _infallible = writeln!(self.script, "ea_set -f capability-{number} \"{inside}\" security.capability");
        }
    }

    /// A second name of a device is a second device, which comes to the same.
    fn device(&mut self, path: &[&[u8]], inside: &str, device: Device, node: &Node) -> Result<(), TreeError> {
        let (above, name) = path.split_at(path.len() - 1);
        let (above, name) = (self::inside(above)?, quoted(name[0])?);
        let (what, kind) = match device {
            Device::Character(major, minor) => (format!("c {major} {minor}"), 0o020_000),
            Device::Block(major, minor) => (format!("b {major} {minor}"), 0o060_000),
            Device::Fifo => ("p".to_owned(), 0o010_000),
        };
        let _infallible = writeln!(self.script, "cd \"{above}\"\nmknod \"{name}\" {what}\ncd /");
        self.metadata(inside, node, kind);
        Ok(())
    }
}

fn place(root: &Path, path: &[&[u8]]) -> PathBuf {
    path.iter().fold(root.to_owned(), |place, part| place.join(OsStr::from_bytes(part)))
}

/// A path as debugfs takes it between quotes.
fn inside(path: &[&[u8]]) -> Result<String, TreeError> {
    path.iter().try_fold(String::from(if path.is_empty() { "/" } else { "" }), |inside, part| {
        Ok(inside + "/" + &quoted(part)?)
    })
}

fn quoted(name: &[u8]) -> Result<String, TreeError> {
    let text = std::str::from_utf8(name).ok().filter(|text| !text.contains(|c: char| c.is_control() || c == '"'));
    let problem = "is a name with quotes, control characters or what is not UTF-8; rename it";
    text.map(str::to_owned).ok_or_else(|| TreeError::name(name, problem))
}

fn make_folder(path: &Path) -> Result<(), TreeError> {
    std::fs::create_dir(path).map_err(|source| TreeError::io("making", path, source))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), TreeError> {
    let written = File::create_new(path).and_then(|mut file| file.write_all(bytes));
    written.map_err(|source| TreeError::io("writing", path, source))
}

/// Runs a tool of e2fsprogs, and answers what it said.
fn run<'a>(tool: &'static str, arguments: impl Iterator<Item = &'a OsStr>, folder: &Path) -> Result<String, TreeError> {
    let mut command = Command::new(tool);
    command
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C");
    let output = command.stdin(Stdio::null()).output().map_err(|source| TreeError::io("running", tool, source))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    if output.status.success() {
        return Ok(said);
    }
    Err(TreeError::Tool { tool, said: said.chars().take(MAX_SAID).collect() })
}
