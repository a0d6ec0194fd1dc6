#![no_main]
//! Policy files, TOML and JSON: what parses keeps its digest when written and read again.

use assay_verifier::policy::Policy;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(policy) = Policy::parse(text) {
        let again = Policy::parse(&policy.to_json()).expect("what we wrote parses");
        assert_eq!(policy.digest().to_string(), again.digest().to_string());
    }
});
