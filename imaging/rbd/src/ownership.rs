//! Which objects of a clone are its own, and which are still its golden image's. Pure: what is on Ceph is
//! [`super::disk`]'s to find out.
//!
//! A bit only ever goes from 0 to 1. It goes before a write is issued: a read that comes after the write was acknowledged
//! then asks Ceph, and one that asks Ceph for an object that is not there after all gets the golden image's content all
//! the same, through the clone's parent.

use crate::runs::{Run, runs};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A bit for each object.
#[derive(Debug)]
pub struct OwnObjects {
    words: Vec<AtomicU64>,
    object_bytes: u64,
    byte_len: u64,
}

impl OwnObjects {
    /// A disk of `byte_len` octets in objects of `object_bytes` (not 0), none of which is its own.
    #[must_use]
    pub fn new(byte_len: u64, object_bytes: u64) -> Self {
        let objects = byte_len.div_ceil(object_bytes);
        Self { words: (0..objects.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), object_bytes, byte_len }
    }

    /// How many octets the disk has.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// How many objects there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.byte_len.div_ceil(self.object_bytes)
    }

    /// How many are the clone's own.
    #[must_use]
    pub fn own_count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// Takes over the objects that hold `range`, which lies on the disk.
    pub(crate) fn take(&self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        let objects = range.start / self.object_bytes..=(range.end - 1) / self.object_bytes;
        objects.for_each(|object| self.take_object(object));
    }

    /// Takes over one object.
    pub(crate) fn take_object(&self, object: u64) {
        let (word, bit) = place(object);
        // Most writes are to what is the clone's already: no need to fight over the line then.
        if self.words[word].load(Ordering::Acquire) & bit == 0 {
            self.words[word].fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Octets of the map as it goes from one process to another: a bit for each object, the lowest first.
    #[must_use]
    pub fn map_len(&self) -> u64 {
        self.count().div_ceil(8)
    }

    /// Part of that map, from its octet `at`: what is behind its end is zero.
    #[must_use]
    pub fn map(&self, at: u64, length: usize) -> Vec<u8> {
        let octet = |at: u64| {
            let word = usize::try_from(at / 8).ok().and_then(|word| self.words.get(word));
            word.map_or(0, |word| word.load(Ordering::Acquire).to_le_bytes()[usize::try_from(at % 8).unwrap_or(0)])
        };
        (0..length).map(|index| octet(at.saturating_add(index as u64))).collect()
    }

    /// Takes over the objects that such a part says. What it says of objects that are not there is nothing.
    pub fn take_map(&self, at: u64, map: &[u8]) {
        let octets = map.iter().enumerate().filter(|(_, octet)| **octet != 0);
        for (index, octet) in octets {
            let first = at.saturating_add(index as u64).saturating_mul(8);
            let said = (0..8).filter(|bit| octet & (1 << bit) != 0).map(|bit| first.saturating_add(bit));
            said.filter(|object| *object < self.count()).for_each(|object| self.take_object(object));
        }
    }

    /// Cuts a range of the disk into parts that come from one place each, in order.
    pub(crate) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        runs(range, self.object_bytes, |at| self.is_own(at))
    }

    /// The parts of the disk that are its own, an object each.
    pub(crate) fn own_ranges(&self) -> Vec<Range<u64>> {
        let of = |object: u64| object * self.object_bytes..((object + 1) * self.object_bytes).min(self.byte_len);
        (0..self.count()).map(of).filter(|range| self.is_own(range.start)).collect()
    }

    fn is_own(&self, offset: u64) -> bool {
        let (word, bit) = place(offset / self.object_bytes);
        self.words[word].load(Ordering::Acquire) & bit != 0
    }
}

fn place(object: u64) -> (usize, u64) {
    (usize::try_from(object / 64).unwrap_or(usize::MAX), 1 << (object % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_alternate_and_cover_the_range() {
        let map = OwnObjects::new(100, 10);
        map.take(&(25..31));
        map.take(&(40..40));
        let runs: Vec<_> = map.runs(5..95).collect();
        let run = |range, own| Run { range, own };
        assert_eq!(runs, [run(5..20, false), run(20..40, true), run(40..95, false)]);
        assert_eq!(map.own_ranges(), [20..30, 30..40]);
        assert_eq!((map.count(), map.own_count()), (10, 2));
    }

    proptest! {
        #[test]
        fn no_map_says_more_than_there_is(byte_len in 0_u64..5000, at: u64, map in prop::collection::vec(any::<u8>(), 0..99)) {
            let objects = OwnObjects::new(byte_len, 10);
            objects.take_map(at % 100, &map);
            objects.take_map(at, &map);
            prop_assert!(objects.own_count() <= objects.count());
        }

        #[test]
        fn taken_objects_and_no_others_are_own(
            byte_len in 1_u64..5000,
            object_bytes in 1_u64..200,
            ranges in prop::collection::vec((0_u64..5000, 0_u64..600), 0..8),
            read in (0_u64..5000, 0_u64..5000),
        ) {
            let map = OwnObjects::new(byte_len, object_bytes);
            let mut model = vec![false; usize::try_from(map.count()).unwrap()];
            for (start, length) in ranges {
                let (start, end) = (start.min(byte_len), (start + length).min(byte_len));
                map.take(&(start..end));
                for octet in start..end {
                    model[usize::try_from(octet / object_bytes).unwrap()] = true;
                }
            }
            prop_assert_eq!(map.own_count(), model.iter().filter(|own| **own).count() as u64);
            let arrived = OwnObjects::new(byte_len, object_bytes);
            let whole = usize::try_from(map.map_len()).unwrap();
            for at in (0..whole).step_by(3) {
                arrived.take_map(at as u64, &map.map(at as u64, 3));
            }
            prop_assert_eq!(arrived.map(0, whole + 1), map.map(0, whole + 1));
            prop_assert_eq!(arrived.own_count(), map.own_count());
            let read = read.0.min(byte_len)..read.1.min(byte_len);
            let mut at = read.start;
            for run in map.runs(read.clone()) {
                prop_assert_eq!(run.range.start, at);
                prop_assert!(run.range.end > at);
                for octet in run.range.clone() {
                    prop_assert_eq!(model[usize::try_from(octet / object_bytes).unwrap()], run.own);
                }
                at = run.range.end;
            }
            prop_assert_eq!(at, read.end.max(read.start));
        }
    }
}
