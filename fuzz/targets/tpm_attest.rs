#![no_main]
//! `TPMS_ATTEST`.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _refused = assay_tpm::attest::Quote::parse(bytes);
});
