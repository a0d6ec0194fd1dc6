//! Attacks on the quote, each against a real TPM: every row of A that the quote must withstand.

mod support;

use assay_tpm::testing::{KeyKind, SoftTpm};
use assay_verifier::evidence::{Challenge, EvidenceError, verify};
use assay_verifier::quote::{AkError, AkPublic, ClockChange, QuoteError, check_clock};
use support::{NONCE, Node, boot_log};

#[test]
fn good_evidence_verifies_in_every_scheme() {
    for kind in [KeyKind::Rsa, KeyKind::RsaPss, KeyKind::Ecc, KeyKind::EccP384] {
        let node = Node::boot(&boot_log(), kind);
        let evidence = node.evidence();
        let replayed = verify(&evidence, &node.challenge()).unwrap();
        assert_eq!(replayed.quote().ak_name(), node.ak.name(), "{kind:?}");
        assert_eq!(replayed.log().events_of(4).count(), 5);
        assert_eq!(replayed.pcrs().count(), 15);
    }
}

#[test]
fn a1_another_nonce_is_refused() {
    let node = Node::boot(&boot_log(), KeyKind::Rsa);
    let mut evidence = node.evidence();
    let other = [0x12; 32];
    let challenge = Challenge { nonce: &other, ..node.challenge() };
    assert!(matches!(verify(&evidence, &challenge), Err(EvidenceError::Quote(QuoteError::Nonce))));
    for nonce in [&NONCE[..31], &[0x11], &[], &[0; 32]] {
        let quote = node.tpm.quote(nonce, support::QUOTED);
        (evidence.attest, evidence.signature) = (quote.attest, quote.signature);
        let error = verify(&evidence, &node.challenge()).unwrap_err();
        assert!(matches!(error, EvidenceError::Quote(QuoteError::Nonce)), "{} octets: {error:?}", nonce.len());
    }
}

#[test]
fn a3_another_selection_is_refused() {
    let node = Node::boot(&boot_log(), KeyKind::Rsa);
    let mut evidence = node.evidence();
    for selection in ["sha256:0,1,2", "sha256:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,16", "sha256:23"] {
        let quote = node.tpm.quote(&NONCE, selection);
        (evidence.attest, evidence.signature) = (quote.attest, quote.signature);
        let error = verify(&evidence, &node.challenge()).unwrap_err();
        assert!(matches!(error, EvidenceError::Quote(QuoteError::Selection { .. })), "{selection}: {error:?}");
    }
}

#[test]
fn a3_values_that_were_not_quoted_and_quoted_values_that_were_not_sent() {
    let node = Node::boot(&boot_log(), KeyKind::Rsa);
    let good = node.evidence();
    let mut fewer = good.clone();
    fewer.pcrs.pop();
    assert!(matches!(verify(&fewer, &node.challenge()), Err(EvidenceError::PcrCount { found: 14 })));
    let mut more = good.clone();
    more.pcrs.push("00".repeat(32));
    assert!(matches!(verify(&more, &node.challenge()), Err(EvidenceError::PcrCount { found: 16 })));
    for pcr in 0..good.pcrs.len() {
        let mut changed = good.clone();
        changed.pcrs[pcr] = "01".repeat(32);
        let error = verify(&changed, &node.challenge()).unwrap_err();
        assert!(matches!(error, EvidenceError::Quote(QuoteError::PcrDigest)), "PCR {pcr}: {error:?}");
    }
    let mut short = good;
    short.pcrs[3] = "00".repeat(31);
    assert!(matches!(verify(&short, &node.challenge()), Err(EvidenceError::PcrValue { pcr: 3 })));
}

#[test]
fn a4_a_quote_of_another_bank_is_refused() {
    let node = Node::boot(&boot_log(), KeyKind::Rsa);
    let mut evidence = node.evidence();
    for bank in ["sha1", "sha384"] {
        let quote = node.tpm.quote(&NONCE, &support::QUOTED.replace("sha256", bank));
        (evidence.attest, evidence.signature) = (quote.attest, quote.signature);
        let error = verify(&evidence, &node.challenge()).unwrap_err();
        assert!(matches!(error, EvidenceError::Quote(QuoteError::Selection { .. })), "{bank}: {error:?}");
    }
}

#[test]
fn a5_a_key_that_signs_anything_is_no_ak() {
    let tpm = SoftTpm::start();
    let error = AkPublic::parse(&tpm.create_unrestricted_key()).unwrap_err();
    assert_eq!(error, AkError::Attribute("restricted"));

    let ek = tpm.create_ek(KeyKind::Rsa);
    let ak = tpm.create_ak(KeyKind::Rsa);
    assert_eq!(AkPublic::parse(&ek).unwrap_err(), AkError::Attribute("a signing key"));
    // objectAttributes are the four octets from the fifth on: fixedTPM 0x02, fixedParent 0x10, sensitiveDataOrigin
    // 0x20.
    for (octet, bit, word) in [(7, 0x02, "fixedTPM"), (7, 0x10, "fixedParent"), (7, 0x20, "sensitiveDataOrigin")] {
        let mut changed = ak.clone();
        changed[octet] &= !bit;
        assert_eq!(AkPublic::parse(&changed).unwrap_err(), AkError::Attribute(word));
    }
    let mut decrypts = ak;
    decrypts[5] |= 0x02;
    assert_eq!(AkPublic::parse(&decrypts).unwrap_err(), AkError::Decrypts);
}

#[test]
fn a6_another_ak_and_a_foreign_signature_are_refused() {
    let (node, other) = (Node::boot(&boot_log(), KeyKind::Rsa), Node::boot(&boot_log(), KeyKind::Rsa));
    let evidence = node.evidence();
    let challenge = Challenge { ak: &other.ak, ..node.challenge() };
    assert!(matches!(verify(&evidence, &challenge), Err(EvidenceError::Quote(QuoteError::NotSigned))));
    assert_ne!(node.ak.name(), other.ak.name());
}

#[test]
fn a12_any_changed_octet_of_attestation_or_signature_is_refused() {
    for kind in [KeyKind::Rsa, KeyKind::RsaPss, KeyKind::Ecc, KeyKind::EccP384] {
        let node = Node::boot(&boot_log(), kind);
        let good = node.evidence();
        for at in 0..good.attest.len() {
            let mut changed = good.clone();
            changed.attest[at] ^= 1;
            let error = verify(&changed, &node.challenge()).unwrap_err();
            assert!(matches!(error, EvidenceError::Quote(QuoteError::NotSigned)), "{kind:?} octet {at}: {error:?}");
        }
        for at in 0..good.signature.len() {
            let mut changed = good.clone();
            changed.signature[at] ^= 1;
            assert!(verify(&changed, &node.challenge()).is_err(), "{kind:?} signature octet {at}");
        }
    }
}

#[test]
fn a13_another_scheme_or_hash_than_the_aks_is_refused() {
    let node = Node::boot(&boot_log(), KeyKind::Rsa);
    let good = node.evidence();
    // sigAlg RSASSA → RSAPSS; hash SHA-256 → SHA-1 and SHA-384.
    for (at, octet) in [(1, 0x16), (3, 0x04), (3, 0x0c)] {
        let mut changed = good.clone();
        changed.signature[at] = octet;
        let error = verify(&changed, &node.challenge()).unwrap_err();
        assert!(matches!(error, EvidenceError::Quote(QuoteError::Scheme { .. })), "{error:?}");
    }
    // The AK's scheme hash, behind type, nameAlg, attributes, empty policy, NULL symmetric and scheme.
    let mut sha1 = node.ak.public().to_vec();
    assert_eq!(sha1[14..16], [0, 0x0b]);
    sha1[15] = 0x04;
    assert!(matches!(AkPublic::parse(&sha1), Err(AkError::Scheme(_))));
}

#[test]
fn a14_a_clock_that_went_back_is_refused() {
    let node = Node::boot(&boot_log(), KeyKind::Rsa);
    let evidence = node.evidence();
    let now = *verify(&evidence, &node.challenge()).unwrap().clock();
    let mut later = now;
    later.reset_count += 1;
    let challenge = Challenge { last_clock: Some(&later), ..node.challenge() };
    let error = verify(&evidence, &challenge).unwrap_err();
    assert!(matches!(error, EvidenceError::Clock(_)));
    assert!(error.reasons()[0].contains("TPM reset count went back"), "{:?}", error.reasons());
}

#[test]
fn a14_a_power_cut_is_a_reset_and_an_earlier_quote_is_then_old() {
    let mut node = Node::boot(&boot_log(), KeyKind::Ecc);
    let before = *verify(&node.evidence(), &node.challenge()).unwrap().clock();
    node.tpm.cut_power();
    let node = Node::boot_on(node.tpm, &boot_log(), KeyKind::Ecc);
    let evidence = node.evidence();
    let challenge = Challenge { last_clock: Some(&before), ..node.challenge() };
    let replayed = verify(&evidence, &challenge).unwrap();
    assert_eq!(replayed.clock_change(), ClockChange::Reset);
    assert_eq!(replayed.clock().reset_count, before.reset_count + 1);
    assert!(check_clock(Some(replayed.clock()), &before).is_err());
}

#[test]
fn a2_what_a_tpm_signs_for_another_purpose_is_no_quote() {
    let node = Node::boot(&boot_log(), KeyKind::Rsa);
    let mut evidence = node.evidence();
    let nonce = hex::encode(NONCE);
    let arguments = ["-c", "ak.ctx", "-q", &nonce, "-g", "sha256", "--attestation", "attest", "-o", "signature"];
    node.tpm.tool("tpm2_gettime", &[&arguments[..], &["-f", "tss"]].concat());
    let read = |name: &str| std::fs::read(node.tpm.directory().join(name)).unwrap();
    (evidence.attest, evidence.signature) = (read("attest"), read("signature"));
    let error = verify(&evidence, &node.challenge()).unwrap_err();
    assert_eq!(error.reasons(), ["verifying the quote: reading the quote: TPMS_ATTEST is of type 0x8019, not a quote"]);
}
