#![no_main]
//! `TPMT_SIGNATURE`.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _refused = assay_tpm::signature::Signature::parse(bytes);
});
