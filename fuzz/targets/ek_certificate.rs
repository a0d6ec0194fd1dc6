#![no_main]
//! EK certificates as NV holds them: DER, perhaps sloppy, perhaps with padding.

use assay_verifier::identity::{EkCas, verify_ek};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static NOBODY: LazyLock<EkCas> = LazyLock::new(|| EkCas::from_pems(&[]).expect("an empty list is a list"));

fuzz_target!(|bytes: &[u8]| {
    let at = bytes.len() / 2;
    assert!(verify_ek(&NOBODY, &bytes[..at], &bytes[at..], 1_800_000_000).is_err(), "an empty list admitted somebody");
});
