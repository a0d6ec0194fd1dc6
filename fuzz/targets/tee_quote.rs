#![no_main]
//! Quote of a trusted execution environment: read or refused, of either kind. There is no collateral, so none is verified.

use assay_verifier::tee::{Collateral, verify};
use assay_wire::evidence::{TeeKind, TeeQuote};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for kind in [TeeKind::Sgx, TeeKind::Tdx] {
        let quote = TeeQuote { kind, quote: bytes.to_vec() };
        assert!(verify(&quote, &Collateral::default(), 0).is_err());
    }
});
