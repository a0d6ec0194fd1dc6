#![no_main]
//! `TPMT_PUBLIC`: what parses has a name.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(public) = assay_tpm::public::Public::parse(bytes) {
        assert!(!public.name().as_bytes().is_empty());
    }
});
