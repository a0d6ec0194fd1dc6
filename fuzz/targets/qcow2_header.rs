#![no_main]
//! The header of a qcow2 file that somebody wants imported: what is accepted is of a bounded size.

use assay_imaging::store::qcow2::{MAX_VIRTUAL_BYTES, check_header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for file_bytes in [bytes.len() as u64, u64::MAX] {
        if let Ok(virtual_bytes) = check_header(bytes, file_bytes) {
            assert!((1..=MAX_VIRTUAL_BYTES).contains(&virtual_bytes));
        }
    }
});
