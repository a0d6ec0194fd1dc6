//! Which granules of a clone are its own, and which are still its golden image's. Pure: the files that keep it are
//! [`super::overlay`]'s.
//!
//! A bit only ever goes from 0 to 1, so a copy that was torn by a power cut, or is older, is merely incomplete.

use assay_rbd::runs::{Run, runs};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Octets that one bit stands for: what file systems write at once, so that a clone seldom copies before it writes.
pub(crate) const GRANULE_BYTES: u64 = GRANULE_LEN as u64;
/// The same, as the length of a buffer.
pub(crate) const GRANULE_LEN: usize = 4096;
/// Words of the map in one page of its file.
const PAGE_WORDS: usize = 512;

/// A bit for each granule, and which pages of the map have changed since they were last made durable.
#[derive(Debug)]
pub(crate) struct AllocationMap {
    words: Vec<AtomicU64>,
    dirty_pages: Vec<AtomicU64>,
    byte_len: u64,
}

/// A change to write to the file of the map before it is applied.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MapChange {
    /// First word that changes.
    pub(crate) first_word: usize,
    /// Their new values.
    pub(crate) words: Vec<u64>,
}

impl AllocationMap {
    /// A map for a device of `byte_len` octets in which nothing is the clone's own.
    pub(crate) fn new(byte_len: u64) -> Self {
        let words = word_count(byte_len);
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            dirty_pages: (0..words.div_ceil(PAGE_WORDS).div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            byte_len,
        }
    }

    /// Adds bits as a file holds them (little-endian words). Answers whether any was new.
    pub(crate) fn merge(&self, bytes: &[u8]) -> bool {
        let mut grew = false;
        for (index, (word, chunk)) in self.words.iter().zip(bytes.chunks_exact(8)).enumerate() {
            let mut value = [0; 8];
            value.copy_from_slice(chunk);
            let value = u64::from_le_bytes(value);
            if value & !word.fetch_or(value, Ordering::AcqRel) != 0 {
                self.mark_dirty(index);
                grew = true;
            }
        }
        grew
    }

    /// Forgets which pages have changed: the durable file holds them all.
    pub(crate) fn all_durable(&self) {
        self.dirty_pages.iter().for_each(|pages| pages.store(0, Ordering::Release));
    }

    /// Whether nothing is the clone's own.
    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| word.load(Ordering::Acquire) == 0)
    }

    /// Whether the granule that holds `offset` is the clone's own.
    pub(crate) fn is_own(&self, offset: u64) -> bool {
        let granule = index(offset / GRANULE_BYTES);
        self.words[granule / 64].load(Ordering::Acquire) & (1 << (granule % 64)) != 0
    }

    /// Cuts a range into parts that come from one file each, in order.
    pub(crate) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        runs(range, GRANULE_BYTES, |at| self.is_own(at))
    }

    /// What must be written to the map's file to take over the granules that hold `range`; `None` if they are owned
    /// already. Callers serialise this with [`AllocationMap::apply`].
    pub(crate) fn plan(&self, range: &Range<u64>) -> Option<MapChange> {
        let (first, last) = (index(range.start / GRANULE_BYTES), index((range.end - 1) / GRANULE_BYTES));
        let first_word = first / 64;
        let mut changed = false;
        let words = (first_word..=last / 64)
            .map(|word| {
                let low = if word == first_word { u64::MAX << (first % 64) } else { u64::MAX };
                let high = if word == last / 64 { u64::MAX >> (63 - last % 64) } else { u64::MAX };
                let old = self.words[word].load(Ordering::Acquire);
                changed |= old & low & high != low & high;
                old | (low & high)
            })
            .collect();
        changed.then_some(MapChange { first_word, words })
    }

    /// Carries out a change that its file holds.
    pub(crate) fn apply(&self, change: &MapChange) {
        for (word, value) in (change.first_word..).zip(&change.words) {
            self.words[word].store(*value, Ordering::Release);
            self.mark_dirty(word);
        }
    }

    /// Takes the pages that changed since they were last taken: number and content each.
    pub(crate) fn take_dirty_pages(&self) -> Vec<(usize, Vec<u8>)> {
        let mut pages = Vec::new();
        for (group, bits) in self.dirty_pages.iter().enumerate() {
            let mut bits = bits.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let page = group * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let words = self.words.iter().skip(page * PAGE_WORDS).take(PAGE_WORDS);
                pages.push((page, words.flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()));
            }
        }
        pages
    }

    /// Puts back what [`AllocationMap::take_dirty_pages`] gave, after it could not be made durable.
    pub(crate) fn return_dirty_pages(&self, pages: &[(usize, Vec<u8>)]) {
        for (page, _) in pages {
            self.mark_dirty(page * PAGE_WORDS);
        }
    }

    /// The whole map as its file holds it.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()
    }

    /// Size of the device.
    pub(crate) fn byte_len(&self) -> u64 {
        self.byte_len
    }

    fn mark_dirty(&self, word: usize) {
        let page = word / PAGE_WORDS;
        self.dirty_pages[page / 64].fetch_or(1 << (page % 64), Ordering::AcqRel);
    }
}

/// Octets of map for a device of `byte_len` octets.
pub(crate) fn map_bytes(byte_len: u64) -> u64 {
    word_count(byte_len) as u64 * 8
}

/// Where a page of the map lies in it, in octets.
pub(crate) fn page_offset(page: usize) -> u64 {
    page as u64 * PAGE_WORDS as u64 * 8
}

fn word_count(byte_len: u64) -> usize {
    index(byte_len.div_ceil(GRANULE_BYTES).div_ceil(64))
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_alternate_and_cover_the_range() {
        let map = AllocationMap::new(1 << 20);
        let change = map.plan(&(8192..12288)).unwrap();
        map.apply(&change);
        let runs: Vec<_> = map.runs(4000..20000).collect();
        assert_eq!(
            runs,
            [
                Run { range: 4000..8192, own: false },
                Run { range: 8192..12288, own: true },
                Run { range: 12288..20000, own: false }
            ]
        );
        assert_eq!(map.plan(&(8192..8193)), None, "already the clone's own");
    }

    #[test]
    fn dirty_pages_are_taken_once_and_can_be_put_back() {
        let map = AllocationMap::new(1 << 30);
        let change = map.plan(&((1 << 29)..(1 << 29) + 1)).unwrap();
        map.apply(&change);
        let pages = map.take_dirty_pages();
        assert_eq!(pages.len(), 1);
        assert!(map.take_dirty_pages().is_empty());
        map.return_dirty_pages(&pages);
        assert_eq!(map.take_dirty_pages(), pages);
    }

    proptest! {
        #[test]
        fn planned_ranges_and_no_others_become_own(
            ranges in prop::collection::vec((0_u64..1_000_000, 1_u64..300_000), 1..8)
        ) {
            let length = 1_300_000;
            let map = AllocationMap::new(length);
            let mut model = vec![false; usize::try_from(length.div_ceil(GRANULE_BYTES)).unwrap()];
            for (start, len) in ranges {
                if let Some(change) = map.plan(&(start..start + len)) {
                    map.apply(&change);
                }
                for granule in start / GRANULE_BYTES..=(start + len - 1) / GRANULE_BYTES {
                    model[usize::try_from(granule).unwrap()] = true;
                }
            }
            for (granule, own) in model.iter().enumerate() {
                prop_assert_eq!(map.is_own(granule as u64 * GRANULE_BYTES), *own);
            }
            let copy = AllocationMap::new(length);
            copy.merge(&map.to_bytes());
            prop_assert_eq!(copy.to_bytes(), map.to_bytes());
        }
    }
}
