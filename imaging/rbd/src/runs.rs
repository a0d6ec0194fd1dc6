//! A disk over another: which parts of a range come from which of the two, and where there are data then. Pure.

use std::ops::Range;

/// Part of a disk: from one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Octets of the disk.
    pub range: Range<u64>,
    /// It is the disk's own. Otherwise what is below has it.
    pub own: bool,
}

/// Cuts a range of a disk into parts that come from one place each, in order. `is_own` says of an offset whether the unit
/// of `unit_bytes` (not 0) that it lies in is the disk's own.
pub fn runs(range: Range<u64>, unit_bytes: u64, is_own: impl Fn(u64) -> bool) -> impl Iterator<Item = Run> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let start = at;
        let own = is_own(start);
        while at < range.end && is_own(at) == own {
            at = (at / unit_bytes + 1).saturating_mul(unit_bytes);
        }
        at = at.min(range.end);
        Some(Run { range: start..at, own })
    })
}

/// Where a disk made of `runs` has data: where its `own` lie as far as the runs are its own, and what is `below` elsewhere.
/// All three are in order.
pub fn data_of(runs: impl Iterator<Item = Run>, own: &[Range<u64>], below: &[Range<u64>]) -> Vec<Range<u64>> {
    let (mut own, mut below, mut data) = (own, below, Vec::new());
    for Run { range, own: is_own } in runs {
        let ranges = if is_own { &mut own } else { &mut below };
        while let [first, rest @ ..] = *ranges
            && first.end <= range.start
        {
            *ranges = rest;
        }
        let within = ranges.iter().take_while(|part| part.start < range.end);
        data.extend(within.map(|part| part.start.max(range.start)..part.end.min(range.end)));
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ranges in order, of these lengths, with gaps of these lengths before them.
    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((0_u64..40, 1_u64..60), 0..12).prop_map(|parts| {
            let mut at = 0;
            let mut range = |(gap, length): (u64, u64)| {
                let start = at + gap;
                at = start + length;
                start..at
            };
            parts.into_iter().map(&mut range).collect()
        })
    }

    proptest! {
        #[test]
        fn runs_alternate_and_cover_the_range(
            units in prop::collection::vec(any::<bool>(), 1..40), unit in 1_u64..30, start in 0_u64..500, length in 0_u64..500,
        ) {
            let is_own = |at: u64| units[usize::try_from(at / unit).unwrap() % units.len()];
            let (mut at, mut before) = (start, None);
            for run in runs(start..start + length, unit, is_own) {
                prop_assert_eq!(run.range.start, at);
                prop_assert!(run.range.end > at && before != Some(run.own));
                prop_assert!(run.range.clone().all(|octet| is_own(octet) == run.own));
                (at, before) = (run.range.end, Some(run.own));
            }
            prop_assert_eq!(at, start + length);
        }

        #[test]
        fn data_are_where_whoever_has_a_part_has_data(
            units in prop::collection::vec(any::<bool>(), 1..40), unit in 1_u64..30, own in ranges(), below in ranges(),
        ) {
            let is_own = |at: u64| units[usize::try_from(at / unit).unwrap() % units.len()];
            let data = data_of(runs(0..900, unit, is_own), &own, &below);
            prop_assert!(data.windows(2).all(|pair| pair[0].end <= pair[1].start));
            let among = |ranges: &[Range<u64>], octet| ranges.iter().any(|range| range.contains(&octet));
            for octet in 0..900 {
                let expected = among(if is_own(octet) { &own } else { &below }, octet);
                prop_assert_eq!(among(&data, octet), expected, "{}", octet);
            }
        }
    }
}
