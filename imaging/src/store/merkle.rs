//! The hash tree of a golden image: SHA-256 of each 64 KiB block, hashes of pages of hashes, and one root that stands for
//! all of it. Whoever knows the root finds any change to the disk or to the tree itself, made by rot or by a hand.
//!
//! ```text
//! level 0   SHA-256 of each block, in order, 128 to a page of 4 KiB, the last page filled up with zeros
//! level 1   SHA-256 of each page of level 0, likewise
//! …         until a level is one page
//! root      SHA-256 of a name, the disk's size in octets (little endian), and SHA-256 of that one page
//! ```
//!
//! The file has the levels one behind the other. A block is checked by the pages between it and the root, read anew each
//! time, so that memory does not grow with the image: 12 KiB are hashed beside 64 for a disk of 128 GiB.

use ring::digest::{Context, SHA256, digest};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::LazyLock;

/// Octets covered by one leaf.
pub const BLOCK_BYTES: u64 = BLOCK_LEN as u64;
/// The same, as the length of a buffer.
pub(super) const BLOCK_LEN: usize = 64 * 1024;
const HASH_LEN: usize = 32;
const PAGE_LEN: usize = 4096;
const PAGE_BYTES: u64 = PAGE_LEN as u64;
const HASHES_PER_PAGE: u64 = (PAGE_LEN / HASH_LEN) as u64;
const NAME: &[u8] = b"assay golden image 2\0";

/// The hash of a block, a page or a whole tree.
pub type Hash = [u8; HASH_LEN];

static ZERO_BLOCK: LazyLock<Hash> = LazyLock::new(|| sha256(&[0; BLOCK_LEN]));

/// A leaf. Zeros, of which sparse disks mostly consist, are recognised faster than they are hashed.
pub(super) fn leaf(block: &[u8]) -> Hash {
    if block.len() == BLOCK_LEN && is_zero(block) { *ZERO_BLOCK } else { sha256(block) }
}

/// Whether a block is zero throughout.
pub(super) fn is_zero(block: &[u8]) -> bool {
    let (words, rest) = block.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|octet| *octet == 0)
}

/// Where the tree of a disk has its levels.
#[derive(Debug)]
pub(super) struct Shape {
    byte_len: u64,
    /// Where each level starts in the file, leaves first.
    levels: Vec<u64>,
    file_bytes: u64,
}

impl Shape {
    /// Of the tree of a disk of `byte_len` octets, of which it has at least one.
    pub(super) fn of(byte_len: u64) -> Self {
        let (mut levels, mut at) = (Vec::new(), 0);
        let mut pages = byte_len.div_ceil(BLOCK_BYTES).div_ceil(HASHES_PER_PAGE).max(1);
        loop {
            levels.push(at);
            at += pages * PAGE_BYTES;
            if pages == 1 {
                return Self { byte_len, levels, file_bytes: at };
            }
            pages = pages.div_ceil(HASHES_PER_PAGE);
        }
    }

    /// Size of the tree's file.
    pub(super) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Whether `leaf` is the hash of block number `block` in the tree in `file` that has `root`.
    pub(super) fn holds(&self, file: &File, root: &Hash, block: u64, leaf: Hash) -> io::Result<bool> {
        let (mut index, mut hash) = (block, leaf);
        let mut page = [0; PAGE_LEN];
        for level in &self.levels {
            let number = index / HASHES_PER_PAGE;
            file.read_exact_at(&mut page, level + number * PAGE_BYTES)?;
            let within = usize::try_from(index % HASHES_PER_PAGE).unwrap_or(usize::MAX) * HASH_LEN;
            if page[within..within + HASH_LEN] != hash {
                return Ok(false);
            }
            (index, hash) = (number, sha256(&page));
        }
        Ok(self.root(&hash) == *root)
    }

    /// The ranges of the disk's octets, in order, outside of which it is zero, as the tree in `file` says; nothing if that
    /// one has not `root`. Reads all of the tree and none of the disk.
    pub(super) fn data_ranges(&self, file: &File, root: &Hash) -> io::Result<Option<Vec<Range<u64>>>> {
        let mut page = [0; PAGE_LEN];
        // What the pages of the level at hand must hash to: of the topmost, the root says so.
        let mut expected: Option<Vec<u8>> = None;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut end = self.file_bytes;
        for start in self.levels.iter().copied().rev() {
            let mut hashes = Vec::new();
            for (number, at) in (start..end).step_by(PAGE_LEN).enumerate() {
                file.read_exact_at(&mut page, at)?;
                let hash = sha256(&page);
                let right = match &expected {
                    None => self.root(&hash) == *root,
                    Some(above) => above.get(number * HASH_LEN..(number + 1) * HASH_LEN) == Some(&hash[..]),
                };
                if !right {
                    return Ok(None);
                }
                if start > 0 {
                    hashes.extend_from_slice(&page);
                } else {
                    self.add_data(number as u64 * HASHES_PER_PAGE, &page, &mut ranges);
                }
            }
            (expected, end) = (Some(hashes), start);
        }
        Ok(Some(ranges))
    }

    /// Adds what a page of leaves, the first of which is of block number `first`, says of its blocks.
    fn add_data(&self, first: u64, page: &[u8; PAGE_LEN], ranges: &mut Vec<Range<u64>>) {
        for (leaf, number) in page.chunks(HASH_LEN).zip(first..) {
            let start = number * BLOCK_BYTES;
            let end = (start + BLOCK_BYTES).min(self.byte_len);
            if start >= end || leaf == self.zeros(end - start) {
                continue;
            }
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
    }

    /// The leaf of a block of so many zeros.
    fn zeros(&self, length: u64) -> Hash {
        if length == BLOCK_BYTES {
            return *ZERO_BLOCK;
        }
        sha256(&[0; BLOCK_LEN][..usize::try_from(length).unwrap_or(BLOCK_LEN)])
    }

    fn root(&self, top_page: &Hash) -> Hash {
        let mut context = Context::new(&SHA256);
        context.update(NAME);
        context.update(&self.byte_len.to_le_bytes());
        context.update(top_page);
        to_hash(context.finish().as_ref())
    }
}

/// Writes a tree, leaf by leaf.
#[derive(Debug)]
pub(super) struct Builder {
    file: File,
    shape: Shape,
    page: Vec<u8>,
    at: u64,
}

impl Builder {
    /// Begins the tree of a disk of `byte_len` octets in `file`.
    pub(super) fn new(file: File, byte_len: u64) -> Self {
        Self { file, shape: Shape::of(byte_len), page: Vec::with_capacity(PAGE_LEN), at: 0 }
    }

    /// Adds the next block's leaf.
    pub(super) fn push(&mut self, hash: &Hash) -> io::Result<()> {
        self.page.extend_from_slice(hash);
        if self.page.len() == PAGE_LEN { self.end_page() } else { Ok(()) }
    }

    /// Adds the levels above the leaves, makes the file durable, and answers the root.
    pub(super) fn finish(mut self) -> io::Result<Hash> {
        self.end_level()?;
        let levels = self.shape.levels.clone();
        let mut page = [0; PAGE_LEN];
        for (below, this) in levels.iter().zip(levels.iter().skip(1)) {
            for at in (*below..*this).step_by(PAGE_LEN) {
                self.file.read_exact_at(&mut page, at)?;
                self.push(&sha256(&page))?;
            }
            self.end_level()?;
        }
        let top = self.shape.file_bytes - PAGE_BYTES;
        self.file.read_exact_at(&mut page, top)?;
        self.file.sync_all()?;
        Ok(self.shape.root(&sha256(&page)))
    }

    fn end_level(&mut self) -> io::Result<()> {
        if self.page.is_empty() && self.at > 0 { Ok(()) } else { self.end_page() }
    }

    fn end_page(&mut self) -> io::Result<()> {
        self.page.resize(PAGE_LEN, 0);
        self.file.write_all_at(&self.page, self.at)?;
        self.at += PAGE_BYTES;
        self.page.clear();
        Ok(())
    }
}

pub(super) fn sha256(bytes: &[u8]) -> Hash {
    to_hash(digest(&SHA256, bytes).as_ref())
}

fn to_hash(digest: &[u8]) -> Hash {
    let mut hash = [0; HASH_LEN];
    hash.copy_from_slice(digest);
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tree(leaves: u64) -> (File, Shape, Hash) {
        let file = tempfile::tempfile().unwrap();
        let byte_len = leaves * BLOCK_BYTES - 512;
        let mut builder = Builder::new(file.try_clone().unwrap(), byte_len);
        for number in 0..leaves {
            builder.push(&sha256(&number.to_le_bytes())).unwrap();
        }
        let root = builder.finish().unwrap();
        let shape = Shape::of(byte_len);
        assert_eq!(file.metadata().unwrap().len(), shape.file_bytes());
        (file, shape, root)
    }

    #[test]
    fn every_leaf_is_held_at_its_place_only() {
        for leaves in [1, 2, 127, 128, 129, 128 * 128, 128 * 128 + 1] {
            let (file, shape, root) = tree(leaves);
            for block in [0, 1, 126, 127, 128, leaves / 2, leaves - 1].into_iter().filter(|block| *block < leaves) {
                let leaf = sha256(&block.to_le_bytes());
                assert!(shape.holds(&file, &root, block, leaf).unwrap(), "{block} of {leaves}");
                let other = sha256(&(block + 1).to_le_bytes());
                assert!(!shape.holds(&file, &root, block, other).unwrap(), "{block} of {leaves}");
            }
        }
    }

    #[test]
    fn the_size_is_part_of_the_root() {
        let (file, _, root) = tree(3);
        let shape = Shape::of(3 * BLOCK_BYTES);
        assert!(!shape.holds(&file, &root, 0, sha256(&0_u64.to_le_bytes())).unwrap());
    }

    #[test]
    fn a_zero_block_has_the_leaf_of_its_zeros() {
        assert_eq!(leaf(&[0; BLOCK_LEN]), sha256(&[0; BLOCK_LEN]));
        assert_eq!(leaf(&[0; 512]), sha256(&[0; 512]));
    }

    #[test]
    fn data_is_where_leaves_are_not_of_zeros() {
        let all = [1, 0, 0, 2, 3, 0, 4];
        for (blocks, short) in [(&all[..1], 512), (&all[..6], 512), (&all[..], 0), (&all.repeat(60)[..], 512)] {
            let byte_len = blocks.len() as u64 * BLOCK_BYTES - short;
            let file = tempfile::tempfile().unwrap();
            let mut builder = Builder::new(file.try_clone().unwrap(), byte_len);
            let mut expected: Vec<Range<u64>> = Vec::new();
            for (fill, number) in blocks.iter().zip(0..) {
                let (start, end) = (number * BLOCK_BYTES, ((number + 1) * BLOCK_BYTES).min(byte_len));
                let block = vec![*fill; usize::try_from(end - start).unwrap()];
                builder.push(&leaf(&block)).unwrap();
                match expected.last_mut() {
                    _ if *fill == 0 => {}
                    Some(last) if last.end == start => last.end = end,
                    _ => expected.push(start..end),
                }
            }
            let root = builder.finish().unwrap();
            let shape = Shape::of(byte_len);
            assert_eq!(shape.data_ranges(&file, &root).unwrap(), Some(expected));
            assert_eq!(shape.data_ranges(&file, &[0; 32]).unwrap(), None);
            for at in (0..shape.file_bytes()).step_by(1019) {
                let mut octet = [0];
                file.read_exact_at(&mut octet, at).unwrap();
                file.write_all_at(&[octet[0] ^ 1], at).unwrap();
                assert_eq!(shape.data_ranges(&file, &root).unwrap(), None, "octet {at} changed");
                file.write_all_at(&octet, at).unwrap();
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_changed_octet_anywhere_is_found(leaves in 1_u64..400, at in any::<u64>(), flip in 1_u8..=255) {
            let (file, shape, root) = tree(leaves);
            let at = at % shape.file_bytes();
            let mut octet = [0];
            file.read_exact_at(&mut octet, at).unwrap();
            file.write_all_at(&[octet[0] ^ flip], at).unwrap();
            let holds = |block: u64| shape.holds(&file, &root, block, sha256(&block.to_le_bytes())).unwrap();
            prop_assert!(!(0..leaves).all(holds), "octet {} of {}", at, shape.file_bytes());
        }
    }
}
