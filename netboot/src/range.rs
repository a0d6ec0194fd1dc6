//! `Range` (RFC 9110 section 14): single byte ranges. Anything else is ignored, as the RFC allows.

use std::ops::Range;

/// Which part of a file to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All of it.
    Whole,
    /// These octets.
    Part(Range<usize>),
    /// The range begins behind the end.
    Unsatisfiable,
}

/// What `header` selects of a file of `length` octets.
#[must_use]
pub fn select(header: Option<&[u8]>, length: usize) -> Selection {
    let spec = header.and_then(|header| std::str::from_utf8(header).ok()).and_then(|text| text.strip_prefix("bytes="));
    // Several ranges would need a multipart body, which no firmware asks for.
    let Some((first, last)) = spec.and_then(|spec| spec.split_once('-')) else {
        return Selection::Whole;
    };
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<usize>().ok()).flatten();
    match (first.is_empty(), number(first), last.is_empty(), number(last)) {
        (false, Some(first), _, _) if first >= length && (last.is_empty() || number(last).is_some()) => {
            Selection::Unsatisfiable
        }
        (false, Some(first), true, _) => Selection::Part(first..length),
        (false, Some(first), false, Some(last)) if first <= last => {
            Selection::Part(first..length.min(last.saturating_add(1)))
        }
        (true, _, false, Some(0)) => Selection::Unsatisfiable,
        (true, _, false, Some(suffix)) if length > 0 => Selection::Part(length - suffix.min(length)..length),
        _ => Selection::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn row_13_single_ranges() {
        for (header, expected) in [
            ("bytes=0-0", Selection::Part(0..1)),
            ("bytes=10-19", Selection::Part(10..20)),
            ("bytes=90-200", Selection::Part(90..100)),
            ("bytes=90-", Selection::Part(90..100)),
            ("bytes=-10", Selection::Part(90..100)),
            ("bytes=-1000", Selection::Part(0..100)),
            ("bytes=100-", Selection::Unsatisfiable),
            ("bytes=-0", Selection::Unsatisfiable),
            ("bytes=20-10", Selection::Whole),
            ("bytes=0-1,5-6", Selection::Whole),
            ("bytes=-", Selection::Whole),
            ("bytes=+1-5", Selection::Whole),
            ("bytes=1-99999999999999999999999", Selection::Whole),
            ("lines=1-2", Selection::Whole),
        ] {
            assert_eq!(select(Some(header.as_bytes()), 100), expected, "{header}");
        }
        assert_eq!(select(None, 100), Selection::Whole);
        assert_eq!(select(Some(b"bytes=0-"), 0), Selection::Unsatisfiable);
    }

    proptest! {
        #[test]
        fn no_range_leaves_the_file(header in "bytes=[0-9,-]{0,45}|\\PC{0,20}", length in 0_usize..50) {
            if let Selection::Part(part) = select(Some(header.as_bytes()), length) {
                prop_assert!(part.start < part.end && part.end <= length);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(header in proptest::collection::vec(any::<u8>(), 0..40), length: usize) {
            let _ = select(Some(&header), length);
        }
    }
}
