//! A folder of the imaging host as a root file system. Links are taken as links; nothing is followed.

use super::TreeError;
use super::model::Model;
use super::tar::{Device, Entry, Kind};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

const MAX_DEPTH: usize = 128;

/// Adds up what is in `folder`. The files' octets are copied to `octets`.
///
/// # Errors
/// Something cannot be read, or has no place in an image.
pub fn read(folder: OwnedFd, octets: &Path, model: &mut Model) -> Result<(), TreeError> {
    let mut reading = Reading { octets, next: 0, linked: HashMap::new(), model };
    let root = rustix::fs::fstat(&folder).map_err(|cause| failed(b".", cause))?;
    reading.model.add(entry(b".".to_vec(), Kind::Folder, 0, &root), 0)?;
    let mut open = vec![(Vec::new(), names(&folder, b".")?, folder)];
    while let Some((path, left, here)) = open.last_mut() {
        let Some(name) = left.pop() else {
            open.pop();
            continue;
        };
        let inside = if path.is_empty() { name.clone() } else { [path.as_slice(), b"/", &name].concat() };
        if let Some(below) = reading.take(here, &name, &inside)? {
            if open.len() > MAX_DEPTH {
                return Err(TreeError::name(&inside, "is too deep"));
            }
            let names = names(&below, &inside)?;
            open.push((inside, names, below));
        }
    }
    Ok(())
}

struct Reading<'a> {
    octets: &'a Path,
    next: u64,
    /// Files with several names, by device and inode.
    linked: HashMap<(u64, u64), Vec<u8>>,
    model: &'a mut Model,
}

impl Reading<'_> {
    /// Adds what is called `name` in `here`; answers it opened if it is a folder.
    fn take(&mut self, here: &OwnedFd, name: &[u8], inside: &[u8]) -> Result<Option<OwnedFd>, TreeError> {
        let failed = |cause| failed(inside, cause);
        let stat = rustix::fs::statat(here, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        let numbers = || (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let open = |flags| rustix::fs::openat(here, name, OFlags::NOFOLLOW | OFlags::CLOEXEC | flags, Mode::empty());
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                self.model.add(entry(inside.to_vec(), Kind::Folder, 0, &stat), 0)?;
                return open(OFlags::RDONLY | OFlags::DIRECTORY).map(Some).map_err(failed);
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(here, name, Vec::new()).map_err(failed)?;
                Kind::Symlink(target.into_bytes())
            }
            FileType::CharacterDevice => Kind::Device(Device::Character(numbers().0, numbers().1)),
            FileType::BlockDevice => Kind::Device(Device::Block(numbers().0, numbers().1)),
            FileType::Fifo => Kind::Device(Device::Fifo),
            // A socket is a running program's.
            FileType::Socket | FileType::Unknown => return Ok(None),
            FileType::RegularFile => {
                let which = (stat.st_dev, stat.st_ino);
                if let Some(other) = self.linked.get(&which) {
                    let link = entry(inside.to_vec(), Kind::Hardlink(other.clone()), 0, &stat);
                    return self.model.add(link, 0).map(|()| None);
                }
                let file = File::from(open(OFlags::RDONLY | OFlags::NONBLOCK).map_err(failed)?);
                let (number, size) = (self.next, self.copy(file)?);
                if stat.st_nlink > 1 {
                    self.linked.insert(which, inside.to_vec());
                }
                return self.model.add(entry(inside.to_vec(), Kind::File, size, &stat), number).map(|()| None);
            }
        };
        self.model.add(entry(inside.to_vec(), kind, 0, &stat), 0).map(|()| None)
    }

    /// By the kernel, which shares blocks where the file system can.
    fn copy(&mut self, mut from: File) -> Result<u64, TreeError> {
        let path = self.octets.join(self.next.to_string());
        self.next += 1;
        let copied = File::create_new(&path).and_then(|mut to| io::copy(&mut from, &mut to));
        copied.map_err(|source| TreeError::io("copying to", path, source))
    }
}

fn names(folder: &OwnedFd, path: &[u8]) -> Result<Vec<Vec<u8>>, TreeError> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder).map_err(|cause| failed(path, cause))? {
        let entry = entry.map_err(|cause| failed(path, cause))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    // The same folder makes the same image.
    names.sort_unstable_by(|one, other| other.cmp(one));
    Ok(names)
}

fn entry(path: Vec<u8>, kind: Kind, size: u64, stat: &Stat) -> Entry {
    let Stat { st_mode, st_uid: uid, st_gid: gid, st_mtime: mtime, .. } = *stat;
    Entry { path, kind, size, mode: st_mode & 0o7777, uid, gid, mtime, capability: None }
}

fn failed(path: &[u8], cause: rustix::io::Errno) -> TreeError {
    TreeError::io("reading", String::from_utf8_lossy(path).into_owned(), cause.into())
}
