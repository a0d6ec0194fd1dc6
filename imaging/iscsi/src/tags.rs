//! Maps keyed by a tag. Each has at most as many entries as commands may be outstanding, so that a cheap hash does:
//! tags that an initiator chose to collide cost it a walk over a few dozen.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map from tags.
pub(crate) type TagMap<K, V> = HashMap<K, V, BuildHasherDefault<TagHasher>>;

/// Spreads one number over 64 bits (Fibonacci hashing).
#[derive(Debug, Default)]
pub(crate) struct TagHasher(u64);

impl Hasher for TagHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, octets: &[u8]) {
        for octet in octets {
            self.write_u64(u64::from(*octet));
        }
    }

    fn write_u32(&mut self, tag: u32) {
        self.write_u64(u64::from(tag));
    }

    fn write_u64(&mut self, tag: u64) {
        self.0 = (self.0.rotate_left(5) ^ tag).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_in_a_row_are_spread() {
        let hash = |tag: u32| {
            let mut hasher = TagHasher::default();
            hasher.write_u32(tag);
            hasher.finish()
        };
        let buckets: std::collections::BTreeSet<u64> = (0..128).map(|tag| hash(tag) % 128).collect();
        assert!(buckets.len() > 100, "{} of 128 buckets", buckets.len());
    }
}
