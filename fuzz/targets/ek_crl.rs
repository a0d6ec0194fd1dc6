#![no_main]
//! Revocation lists of EK CAs, DER or PEM: what is taken is a list that says until when it is current.

use assay_verifier::identity::TrustAnchors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let anchors = TrustAnchors::default().with_crls(&[bytes.to_vec()]);
    assert!(anchors.is_err() || !bytes.is_empty(), "nothing was taken for a list");
});
