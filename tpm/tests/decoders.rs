//! Every decoder, on octets that nobody vouches for: never a panic, never a byte unread, sizes as the algorithms have.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

use assay_tpm::attest::{AttestError, Quote};
use assay_tpm::public::{KeyPublic, Public};
use assay_tpm::reader::Problem;
use assay_tpm::signature::{Signature, SignatureValue};
use proptest::prelude::*;

/// A `TPMT_PUBLIC` of an AK, RSA 2048 RSASSA SHA-256, with the given modulus.
fn rsa_public(modulus: &[u8]) -> Vec<u8> {
    let mut bytes = hex::decode("0001000b00050072000000100014000b080000000000").unwrap();
    bytes.extend_from_slice(&u16::try_from(modulus.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(modulus);
    bytes
}

/// A `TPMS_ATTEST` of a quote: one selection of PCR 0 to 14 in SHA-256.
fn attest(nonce: &[u8; 32], clock_ms: u64) -> Vec<u8> {
    let mut bytes = hex::decode("ff54434780180002000b0020").unwrap();
    bytes.extend_from_slice(nonce);
    bytes.extend_from_slice(&clock_ms.to_be_bytes());
    bytes.extend_from_slice(&hex::decode("000000010000000001000000000000000900000001000b03ff7f000020").unwrap());
    bytes.extend_from_slice(&[9; 32]);
    bytes
}

#[test]
fn a13_an_rsa_key_of_another_size_than_it_says_is_refused() {
    let modulus = |bytes: usize| [vec![0x80], vec![1; bytes - 1]].concat();
    assert!(Public::parse(&rsa_public(&modulus(256))).is_ok());
    for bytes in [255, 257, 128, 512, 1] {
        assert!(Public::parse(&rsa_public(&modulus(bytes))).is_err(), "{bytes} octets");
    }
    let error = Public::parse(&rsa_public(&modulus(513))).unwrap_err();
    assert_eq!(error.problem, Problem::Value { field: "modulus size", found: 513 });
    assert!(Public::parse(&rsa_public(&[vec![0], vec![1; 255]].concat())).is_err(), "leading zero");
}

#[test]
fn a2_forged_magic_and_a15_sizes_of_0xffff() {
    let good = attest(&[1; 32], 5);
    assert_eq!(Quote::parse(&good).unwrap().clock_ms, 5);
    let mut forged = good.clone();
    forged[0] = 0;
    assert_eq!(Quote::parse(&forged).unwrap_err(), AttestError::NotTpmGenerated { found: 0x0054_4347 });
    for (offset, field) in [(6, "qualifiedSigner size"), (10, "extraData size")] {
        let mut oversize = good.clone();
        oversize[offset..offset + 2].fill(0xff);
        let Err(AttestError::Malformed(error)) = Quote::parse(&oversize) else { panic!("size 0xffff accepted") };
        assert_eq!(error.problem, Problem::Value { field, found: 0xffff });
    }
    let mut selections = good.clone();
    let count = good.len() - 34 - 10;
    selections[count..count + 4].fill(0xff);
    assert!(matches!(Quote::parse(&selections), Err(AttestError::Malformed(_))));
}

proptest! {
    #[test]
    fn arbitrary_octets_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
        let _ = Public::parse(&bytes);
        let _ = Quote::parse(&bytes);
        let _ = Signature::parse(&bytes);
    }

    #[test]
    fn a_changed_structure_is_refused_or_says_what_changed(
        at in 0usize..105, to in any::<u8>(), nonce: [u8; 32], clock in any::<u64>(),
    ) {
        let original = attest(&nonce, clock);
        let mut changed = original.clone();
        prop_assume!(at < changed.len());
        changed[at] = to;
        if let Ok(quote) = Quote::parse(&changed) {
            // Full consumption: two inputs that differ never parse to the same quote.
            prop_assert_eq!(Quote::parse(&original).unwrap() == quote, original == changed);
        }
    }

    #[test]
    fn public_areas_round_trip_and_names_differ(
        modulus in proptest::collection::vec(any::<u8>(), 256), at in 0usize..256,
    ) {
        let mut modulus = modulus;
        modulus[0] |= 0x80;
        let public = Public::parse(&rsa_public(&modulus)).unwrap();
        prop_assert_eq!(public.key(), &KeyPublic::Rsa { modulus: modulus.clone(), exponent: 65537 });
        let mut other = modulus.clone();
        other[at] ^= 1;
        if let Ok(other) = Public::parse(&rsa_public(&other)) {
            prop_assert_ne!(public.name(), other.name());
        }
    }

    #[test]
    fn signatures_round_trip(
        r in proptest::collection::vec(any::<u8>(), 0..=48), s in proptest::collection::vec(any::<u8>(), 0..=48),
    ) {
        let mut bytes = vec![0, 0x18, 0, 0x0b];
        for number in [&r, &s] {
            bytes.extend_from_slice(&u16::try_from(number.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(number);
        }
        prop_assert_eq!(Signature::parse(&bytes).unwrap().value, SignatureValue::Ecdsa { r: &r, s: &s });
    }
}
