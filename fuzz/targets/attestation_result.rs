#![no_main]
//! Attestation results off the wire: never accepted without a key.

use assay_wire::result::SignedResult;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let result = SignedResult::from_wire(text.to_owned());
    let _lease = result.unverified_lease();
    assert!(result.verify(&[], 1_800_000_000).is_err());
});
