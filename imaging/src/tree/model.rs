//! A root file system in memory: what the entries of its layers add up to. Pure, but for the octets of files, which go
//! to numbered files of a folder that nobody else writes to.
//!
//! A path is resolved as the booted system would: `..` stops at the root, and a link on the way is followed within the
//! image. Whiteouts are OCI's: `.wh.NAME` takes away what lower layers have at NAME, `.wh..wh..opq` all that they have in
//! a folder.

use super::TreeError;
use super::tar::{Device, Entry, Kind};
use std::collections::BTreeMap;

/// Names of one file system: bounds memory.
const MAX_NODES: usize = 2_000_000;
const MAX_NAME: usize = 255;
const MAX_DEPTH: usize = 128;
/// As Linux.
const MAX_LINKS: usize = 40;
const MAX_TARGET: usize = 4095;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Which node: they never move.
pub type Index = usize;
const ROOT: Index = 0;

/// A file, folder, link or device.
#[derive(Debug, Clone)]
pub struct Node {
    /// What it is.
    pub content: Content,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// `security.capability`, if it has one.
    pub capability: Option<Vec<u8>>,
    /// The layer that last said something of it, or put something into it.
    layer: u32,
    /// The layer that took away what earlier ones had in it.
    cleared: Option<u32>,
}

impl Node {
    fn new(content: Content, mode: u32, layer: u32) -> Self {
        Self { content, mode, uid: 0, gid: 0, mtime: 0, capability: None, layer, cleared: None }
    }
}

/// What a node is.
#[derive(Debug, Clone)]
pub enum Content {
    /// A folder: names and nodes.
    Folder(BTreeMap<Vec<u8>, Index>),
    /// A file, by the number of the one that has its octets.
    File {
        /// Its number.
        number: u64,
        /// Its size.
        size: u64,
    },
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A device or FIFO.
    Device(Device),
}

/// A root file system.
#[derive(Debug)]
pub struct Model {
    nodes: Vec<Node>,
    layer: u32,
}

impl Default for Model {
    fn default() -> Self {
        let root = Node::new(Content::Folder(BTreeMap::new()), 0o755, 0);
        Self { nodes: vec![root], layer: 0 }
    }
}

impl Model {
    /// What follows is of the next layer.
    pub fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// Adds an entry; a file's octets are those of the numbered file.
    ///
    /// # Errors
    /// Its name, or what it links to, cannot be; or there are too many.
    pub fn add(&mut self, entry: Entry, number: u64) -> Result<(), TreeError> {
        let Entry { path, kind, size, mode, uid, gid, mtime, capability } = entry;
        let mut parts = parts(&path)?;
        let Some(name) = parts.pop() else {
            // The root itself: only its metadata.
            let root = &mut self.nodes[ROOT];
            (root.mode, root.uid, root.gid, root.mtime) = (mode, uid, gid, mtime);
            return Ok(());
        };
        let folder = self.folder(&parts, &path)?;
        if name == OPAQUE {
            self.remove_below(folder);
            return Ok(());
        }
        if let Some(name) = name.strip_prefix(WHITEOUT) {
            if let Content::Folder(names) = &mut self.nodes[folder].content {
                names.remove(name);
            }
            return Ok(());
        }
        let content = match kind {
            Kind::Hardlink(target) => {
                let target = self.existing(&target)?;
                return self.put(folder, name, target);
            }
            Kind::Symlink(target) if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) => {
                return Err(TreeError::name(&path, "is a link to what no path can be"));
            }
            Kind::Symlink(target) => Content::Symlink(target),
            Kind::Device(device) => Content::Device(device),
            Kind::File => Content::File { number, size },
            Kind::Folder => match self.child(folder, &name) {
                // A folder on a folder changes what is said of it, not what is in it.
                Some(there) if matches!(self.nodes[there].content, Content::Folder(_)) => {
                    let node = &mut self.nodes[there];
                    (node.mode, node.uid, node.gid, node.mtime, node.layer) = (mode, uid, gid, mtime, self.layer);
                    return Ok(());
                }
                _ => Content::Folder(BTreeMap::new()),
            },
        };
        let node = self.new_node(Node { uid, gid, mtime, capability, ..Node::new(content, mode, self.layer) })?;
        self.put(folder, name, node)
    }

    /// The nodes, the root first. A node may have several names.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// All names below the root, each folder before what is in it.
    pub fn walk(
        &self,
        mut visit: impl FnMut(&[&[u8]], Index, &Node) -> Result<(), TreeError>,
    ) -> Result<(), TreeError> {
        let mut path: Vec<&[u8]> = Vec::new();
        let mut open = vec![self.names(ROOT).iter()];
        while let Some(names) = open.last_mut() {
            match names.next() {
                Some((name, index)) => {
                    path.push(name);
                    visit(&path, *index, &self.nodes[*index])?;
                    if let Content::Folder(names) = &self.nodes[*index].content {
                        open.push(names.iter());
                    } else {
                        path.pop();
                    }
                }
                None => {
                    open.pop();
                    path.pop();
                }
            }
        }
        Ok(())
    }

    fn names(&self, index: Index) -> &BTreeMap<Vec<u8>, Index> {
        static NONE: BTreeMap<Vec<u8>, Index> = BTreeMap::new();
        match &self.nodes[index].content {
            Content::Folder(names) => names,
            _ => &NONE,
        }
    }

    fn child(&self, folder: Index, name: &[u8]) -> Option<Index> {
        self.names(folder).get(name).copied()
    }

    fn new_node(&mut self, node: Node) -> Result<Index, TreeError> {
        if self.nodes.len() >= MAX_NODES {
            return Err(TreeError::TooMuch("2,000,000 files"));
        }
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn put(&mut self, folder: Index, name: Vec<u8>, node: Index) -> Result<(), TreeError> {
        match &mut self.nodes[folder].content {
            Content::Folder(names) => {
                names.insert(name, node);
                Ok(())
            }
            _ => Err(TreeError::name(&name, "is in what is no folder")),
        }
    }

    /// Takes away what earlier layers have in a folder, and below what this layer says of it.
    fn remove_below(&mut self, folder: Index) {
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            // Once a layer: a layer that says it again costs no second look.
            if self.nodes[folder].cleared == Some(self.layer) {
                continue;
            }
            self.nodes[folder].cleared = Some(self.layer);
            let of_this_layer = |index: &Index| self.nodes[*index].layer == self.layer;
            let (kept, gone): (Vec<_>, Vec<_>) = self
                .names(folder)
                .iter()
                .map(|(name, index)| (name.clone(), *index))
                .partition(|(_, index)| of_this_layer(index));
            folders.extend(kept.into_iter().map(|(_, index)| index));
            if let Content::Folder(names) = &mut self.nodes[folder].content {
                names.retain(|name, _| !gone.iter().any(|(other, _)| other == name));
            }
        }
    }

    /// The folder at `parts`, made where nothing is; links on the way are followed.
    fn folder(&mut self, parts: &[Vec<u8>], path: &[u8]) -> Result<Index, TreeError> {
        let resolved = self.resolve(parts, path, true)?;
        match self.nodes[resolved].content {
            Content::Folder(_) => Ok(resolved),
            _ => Err(TreeError::name(path, "is in what is no folder")),
        }
    }

    /// What a hard link is to; a link there is linked to itself, as by `link(2)`.
    fn existing(&mut self, target: &[u8]) -> Result<Index, TreeError> {
        let mut parts = parts(target)?;
        let name = parts.pop().ok_or_else(|| TreeError::name(target, "is what nothing can be a hard link to"))?;
        let folder = self.resolve(&parts, target, false)?;
        let found = self.child(folder, &name).filter(|found| !matches!(self.nodes[*found].content, Content::Folder(_)));
        found.ok_or_else(|| TreeError::name(target, "is what nothing can be a hard link to"))
    }

    fn resolve(&mut self, parts: &[Vec<u8>], path: &[u8], make: bool) -> Result<Index, TreeError> {
        // From the root down, so that `..` after a link means the link's target's parent.
        let (mut trail, mut links) = (vec![ROOT], 0);
        let mut ahead: Vec<Vec<u8>> = parts.iter().rev().cloned().collect();
        while let Some(name) = ahead.pop() {
            let here = *trail.last().unwrap_or(&ROOT);
            if name == b".." {
                trail.truncate(trail.len().saturating_sub(1).max(1));
                continue;
            }
            if trail.len() > MAX_DEPTH {
                return Err(TreeError::name(path, "is too deep"));
            }
            match self.child(here, &name) {
                Some(next) => match &self.nodes[next].content {
                    Content::Symlink(target) => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(TreeError::name(path, "passes through too many links"));
                        }
                        if target.starts_with(b"/") {
                            trail.truncate(1);
                        }
                        let pieces = target.split(|octet| *octet == b'/').filter(|piece| !matches!(*piece, b"" | b"."));
                        ahead.extend(pieces.map(<[u8]>::to_vec).rev());
                    }
                    _ => {
                        trail.push(next);
                        // What this layer puts into a folder stays when it hides what lower ones have there.
                        if make {
                            self.nodes[next].layer = self.layer;
                        }
                    }
                },
                None if make => {
                    let content = Content::Folder(BTreeMap::new());
                    let node = self.new_node(Node::new(content, 0o755, self.layer))?;
                    self.put(here, name, node)?;
                    trail.push(node);
                }
                None => return Err(TreeError::name(path, "is not there")),
            }
        }
        Ok(*trail.last().unwrap_or(&ROOT))
    }
}

/// The parts of an entry's path. A name that goes up is refused, though resolving would keep it inside: no honest layer
/// has one.
fn parts(path: &[u8]) -> Result<Vec<Vec<u8>>, TreeError> {
    let pieces = path.split(|octet| *octet == b'/').filter(|piece| !matches!(*piece, b"" | b"."));
    let parts: Vec<Vec<u8>> = pieces.map(<[u8]>::to_vec).collect();
    if parts.iter().any(|part| part == b"..") {
        return Err(TreeError::name(path, "goes up"));
    }
    if parts.iter().any(|part| part.len() > MAX_NAME || part.contains(&0)) {
        return Err(TreeError::name(path, "has a part that is no file's name"));
    }
    if parts.len() > MAX_DEPTH {
        return Err(TreeError::name(path, "is too deep"));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry { path: path.into(), kind, size: 0, mode: 0o644, uid: 0, gid: 0, mtime: 0, capability: None }
    }

    fn names(model: &Model) -> Vec<String> {
        let mut names = Vec::new();
        let walked = model.walk(|path, _, node| {
            let kind = match &node.content {
                Content::Folder(_) => "/".to_owned(),
                Content::File { number, .. } => format!("={number}"),
                Content::Symlink(target) => format!("->{}", String::from_utf8_lossy(target)),
                Content::Device(_) => "!".to_owned(),
            };
            names.push(String::from_utf8_lossy(&path.join(&b'/')).into_owned() + &kind);
            Ok(())
        });
        walked.unwrap();
        names
    }

    #[test]
    fn layers_add_up() {
        let mut model = Model::default();
        let link = |target: &str| Kind::Symlink(target.into());
        for (number, (path, kind)) in [
            ("usr/bin/a", Kind::File),
            ("bin", link("usr/bin")),
            ("etc/one", Kind::File),
            ("etc/two", Kind::File),
            ("var/deep/x", Kind::File),
            ("etc/three", Kind::Hardlink("/etc/one".into())),
        ]
        .into_iter()
        .enumerate()
        {
            model.add(entry(path, kind), number as u64).unwrap();
        }
        model.next_layer();
        for (number, (path, kind)) in [
            ("bin/b", Kind::File),
            ("etc/.wh.one", Kind::File),
            ("var/deep/y", Kind::File),
            ("var", Kind::Folder),
            ("var/.wh..wh..opq", Kind::File),
            ("abs", link("/usr")),
            ("abs/bin/c", Kind::File),
        ]
        .into_iter()
        .enumerate()
        {
            model.add(entry(path, kind), 10 + number as u64).unwrap();
        }
        let expected = [
            "abs->/usr",
            "bin->usr/bin",
            "etc/",
            "etc/three=2",
            "etc/two=3",
            "usr/",
            "usr/bin/",
            "usr/bin/a=0",
            "usr/bin/b=10",
            "usr/bin/c=16",
            "var/",
            "var/deep/",
            "var/deep/y=12",
        ];
        // What the first layer had in `var` is gone; what the second put there before it said so is not.
        let got = names(&model);
        assert_eq!(got, expected);
    }

    #[test]
    fn nothing_leads_out() {
        let mut model = Model::default();
        let up = model.add(entry("a/../../etc/passwd", Kind::File), 0).unwrap_err();
        assert!(up.to_string().contains("goes up"), "{up}");
        model.add(entry("out", Kind::Symlink(b"../../../..".to_vec())), 0).unwrap();
        model.add(entry("out/etc/passwd", Kind::File), 7).unwrap();
        assert_eq!(names(&model), ["etc/", "etc/passwd=7", "out->../../../.."], "the image's own");
        model.add(entry("loop", Kind::Symlink(b"loop".to_vec())), 0).unwrap();
        let turns = model.add(entry("loop/x", Kind::File), 0).unwrap_err();
        assert!(turns.to_string().contains("too many links"), "{turns}");
        let nowhere = model.add(entry("h", Kind::Hardlink(b"../../etc/shadow".to_vec())), 0).unwrap_err();
        assert!(nowhere.to_string().contains("goes up"), "{nowhere}");
        model.add(entry("h", Kind::Hardlink(b"etc".to_vec())), 0).unwrap_err();
        model.add(entry("etc/passwd/x", Kind::File), 0).unwrap_err();
    }

    proptest! {
        #[test]
        fn every_name_is_one_of_a_file_system(
            steps in prop::collection::vec(("[ab./]{1,9}", "[ab./]{0,7}", 0_u8..5), 0..60)
        ) {
            let mut model = Model::default();
            for (path, target, kind) in steps {
                let kind = match kind {
                    0 => Kind::File,
                    1 => Kind::Folder,
                    2 => Kind::Symlink(target.into()),
                    3 => Kind::Hardlink(target.into()),
                    _ => { model.next_layer(); Kind::File }
                };
                let _refused = model.add(entry(&path, kind), 1);
            }
            model.walk(|path, _, _| {
                assert!(path.iter().all(|part| !matches!(*part, b"" | b"." | b"..") && !part.contains(&b'/')));
                Ok(())
            }).unwrap();
        }
    }
}
