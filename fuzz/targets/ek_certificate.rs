#![no_main]
//! EK and EK certificate as NV holds it: DER, perhaps sloppy, perhaps with padding. The input is the EK's length in two
//! octets, the EK, the certificate. The one CA that counts was made a moment ago and has issued nothing.

use assay_verifier::identity::{EkCas, verify_ek};
use libfuzzer_sys::fuzz_target;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use std::sync::LazyLock;

static CAS: LazyLock<EkCas> = LazyLock::new(|| {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).expect("a certificate");
    EkCas::from_pems(&[ca.pem().into_bytes()]).expect("a CA")
});

fuzz_target!(|bytes: &[u8]| {
    let Some((length, rest)) = bytes.split_at_checked(2) else { return };
    let at = usize::from(u16::from_be_bytes([length[0], length[1]])).min(rest.len());
    let (public, certificate) = rest.split_at(at);
    assert!(verify_ek(&CAS, public, certificate, 1_800_000_000).is_err(), "a CA that issued nothing vouched");
});
