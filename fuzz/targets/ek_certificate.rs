#![no_main]
//! EK, EK certificate as NV holds it (DER, perhaps sloppy, perhaps with padding) and the chain above it. The input is
//! the EK's length in two octets, the EK, the certificate's length likewise, the certificate, the chain. The one CA that
//! counts was made a moment ago and has issued nothing.

use assay_verifier::identity::{EkClaim, Endorsers, TrustAnchors, verify_ek};
use libfuzzer_sys::fuzz_target;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use std::sync::LazyLock;

static ENDORSERS: LazyLock<Endorsers> = LazyLock::new(|| {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).expect("a certificate");
    let anchors = || TrustAnchors::from_pems(&[ca.pem().into_bytes()]).expect("a CA");
    Endorsers { ek_cas: anchors(), iak_cas: anchors() }
});

/// The first part, whose length stands before it, and what follows.
fn part(bytes: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = bytes.split_at_checked(2) else { return (&[], &[]) };
    rest.split_at(usize::from(u16::from_be_bytes([length[0], length[1]])).min(rest.len()))
}

fuzz_target!(|bytes: &[u8]| {
    let (public, rest) = part(bytes);
    let (certificate, chain) = part(rest);
    let claim = EkClaim { public, certificate, chain, iak: None, operator_vouches: false };
    assert!(verify_ek(&ENDORSERS, &claim, 1_800_000_000).is_err(), "a CA that issued nothing vouched");
});
