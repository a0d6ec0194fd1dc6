#![no_main]
//! `Range` of a boot file's request: whatever is selected is of the file.

use assay_netboot::range::{Selection, select};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|header: &[u8]| {
    for length in [0, 1, 100, usize::MAX] {
        match select(Some(header), length) {
            Selection::Part(part) => assert!(part.start < part.end && part.end <= length, "{part:?} of {length}"),
            Selection::Whole | Selection::Unsatisfiable => {}
        }
    }
});
