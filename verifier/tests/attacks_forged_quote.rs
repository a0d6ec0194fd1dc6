//! Forged quotes whose signature is good: what a key in software can sign, and no TPM would. Each clause that is checked
//! after the signature, in rows A2, A3, A4, A13 and A15.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

use assay_tpm::attest::AttestError;
use assay_tpm::public::Scheme;
use assay_tpm::soft_keys::{Maker, SoftClock, SoftKeys};
use assay_tpm::testing::sha256;
use assay_verifier::quote::{
    AkError, AkPublic, PCR_COUNT, PcrValue, QuoteError, UnverifiedQuote, VerifiedQuote, verify_quote,
};
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::{Padding, Rsa};
use openssl::sign::{RsaPssSaltlen, Signer};
use std::sync::LazyLock;

const NONCE: [u8; 32] = [0x11; 32];
const CLOCK: SoftClock = SoftClock { clock_ms: 1000, reset_count: 3, restart_count: 0 };
static KEYS: LazyLock<SoftKeys> = LazyLock::new(|| Maker::new().manufacture());

/// Where the fields of the attestation are: magic, type, name, nonce, clock, counts, safe, firmware, selection, digest.
const TYPE: usize = 4;
const NAME_SIZE: usize = 6;
const NONCE_SIZE: usize = 42;
const SAFE: usize = 44 + 32 + 8 + 4 + 4;
const SELECTIONS: usize = SAFE + 1 + 8;
const DIGEST_SIZE: usize = SELECTIONS + 4 + 6;

fn pcrs() -> [[u8; 32]; PCR_COUNT] {
    std::array::from_fn(|pcr| sha256(&[u8::try_from(pcr).unwrap()]))
}

fn good() -> Vec<u8> {
    KEYS.quote(&NONCE, &pcrs(), CLOCK).0
}

fn verified(attest: &[u8], signature: &[u8]) -> Result<VerifiedQuote, QuoteError> {
    let pcrs = pcrs().map(PcrValue::new);
    let ak = AkPublic::parse(&KEYS.ak_public).unwrap();
    verify_quote(&UnverifiedQuote { attest, signature, pcrs: &pcrs }, &ak, &NONCE)
}

/// The verdict on an attestation that is as it is, and signed so.
fn signed(attest: &[u8]) -> Result<VerifiedQuote, QuoteError> {
    verified(attest, &KEYS.sign(attest))
}

/// The same with some octets put in the place of `range`.
fn with(range: std::ops::Range<usize>, octets: &[u8]) -> Vec<u8> {
    let mut attest = good();
    attest.splice(range, octets.iter().copied());
    attest
}

#[test]
fn what_is_forged_here_is_good_but_for_what_is_forged() {
    let quote = signed(&good()).unwrap();
    assert_eq!((quote.clock().reset_count, quote.clock().safe), (3, true));
    assert_eq!(good()[SELECTIONS..DIGEST_SIZE], [0, 0, 0, 1, 0, 0x0b, 3, 0xff, 0x7f, 0]);
}

#[test]
fn a2_what_no_tpm_made_and_what_is_no_quote_is_refused_under_a_good_signature() {
    for magic in [[0xff, 0x54, 0x43, 0x46], [0; 4], [0x47, 0x43, 0x54, 0xff]] {
        let error = signed(&with(0..4, &magic)).unwrap_err();
        assert!(matches!(error, QuoteError::Attest(AttestError::NotTpmGenerated { .. })), "{error:?}");
    }
    // NV, command audit, session audit, certify, time, creation, NV digest.
    for kind in [0x14, 0x15, 0x16, 0x17, 0x19, 0x1a, 0x1c] {
        let error = signed(&with(TYPE..TYPE + 2, &[0x80, kind])).unwrap_err();
        assert!(matches!(error, QuoteError::Attest(AttestError::NotAQuote { .. })), "{error:?}");
    }
}

#[test]
fn a3_a4_any_other_selection_than_the_one_is_refused_under_a_good_signature() {
    let one = |bank: u8, select: &[u8]| [&[0, bank, u8::try_from(select.len()).unwrap()], select].concat();
    let all = [0xff, 0x7f, 0];
    for (what, banks) in [
        ("no bank", vec![]),
        ("the bank twice", vec![one(0x0b, &all), one(0x0b, &all)]),
        ("the bank in two halves", vec![one(0x0b, &[0xff, 0, 0]), one(0x0b, &[0, 0x7f, 0])]),
        ("an empty second bank", vec![one(0x0b, &all), one(0x04, &[0, 0, 0])]),
        ("SHA-1", vec![one(0x04, &all)]),
        ("SHA-1 beside SHA-256", vec![one(0x04, &all), one(0x0b, &all)]),
        ("SHA-384", vec![one(0x0c, &all)]),
        ("one PCR fewer", vec![one(0x0b, &[0xfe, 0x7f, 0])]),
        ("PCR 15, too", vec![one(0x0b, &[0xff, 0xff, 0])]),
        ("PCR 16, which software resets", vec![one(0x0b, &[0xff, 0x7f, 0x01])]),
        ("PCR 23, which software resets", vec![one(0x0b, &[0xff, 0x7f, 0x80])]),
        ("PCR 24, which is none", vec![one(0x0b, &[0xff, 0x7f, 0, 0x01])]),
    ] {
        let count = u32::try_from(banks.len()).unwrap().to_be_bytes();
        let selection = [&count[..], &banks.concat()].concat();
        let error = signed(&with(SELECTIONS..DIGEST_SIZE, &selection)).unwrap_err();
        assert!(matches!(error, QuoteError::Selection { .. }), "{what}: {error:?}");
    }
    // More octets than needed select the same PCRs: that is the one selection, in a longer form.
    signed(&with(SELECTIONS..DIGEST_SIZE, &[0, 0, 0, 1, 0, 0x0b, 4, 0xff, 0x7f, 0, 0])).unwrap();
}

#[test]
fn a15_sizes_counts_and_values_that_lie_are_refused_under_a_good_signature() {
    let huge = [0xff, 0xff];
    for (what, attest) in [
        ("name of 65535 octets", with(NAME_SIZE..NAME_SIZE + 2, &huge)),
        ("nonce of 65535 octets", with(NONCE_SIZE..NONCE_SIZE + 2, &huge)),
        ("digest of 65535 octets", with(DIGEST_SIZE..DIGEST_SIZE + 2, &huge)),
        ("2^32-1 banks", with(SELECTIONS..SELECTIONS + 4, &[0xff; 4])),
        ("17 banks", with(SELECTIONS..SELECTIONS + 4, &[0, 0, 0, 17])),
        ("17 banks that are all there", {
            let banks = [&[0, 0, 0, 17][..], &[0, 0x0b, 3, 0xff, 0x7f, 0].repeat(17)].concat();
            with(SELECTIONS..DIGEST_SIZE, &banks)
        }),
        ("a selection of no octets", with(SELECTIONS + 6..DIGEST_SIZE, &[0])),
        ("a selection of 255 octets", with(SELECTIONS + 6..SELECTIONS + 7, &[255])),
        ("an unknown bank", with(SELECTIONS + 4..SELECTIONS + 6, &[0x7f, 0xff])),
        ("safe neither yes nor no", with(SAFE..SAFE + 1, &[2])),
        ("an octet more", [good(), vec![0]].concat()),
        ("twice", [good(), good()].concat()),
    ] {
        let error = signed(&attest).unwrap_err();
        assert!(matches!(error, QuoteError::Attest(AttestError::Malformed(_))), "{what}: {error:?}");
    }
    for length in 0..good().len() {
        assert!(signed(&good()[..length]).is_err(), "{length} octets");
    }
    // A digest that is none of the scheme's, though its size says so truly.
    for length in [0_u8, 20, 31, 33, 48] {
        let digest = [&[0, length][..], &vec![7; usize::from(length)]].concat();
        let error = signed(&with(DIGEST_SIZE..good().len(), &digest)).unwrap_err();
        assert!(matches!(error, QuoteError::PcrDigest), "{length}: {error:?}");
    }
    let mut longer = with(NONCE_SIZE..NONCE_SIZE + 2, &[0, 33]);
    longer.insert(NONCE_SIZE + 2, 0x11);
    assert!(matches!(signed(&longer), Err(QuoteError::Nonce)));
}

#[test]
fn a15_a_signature_with_lies_in_it_is_none() {
    let attest = good();
    let signature = KEYS.sign(&attest);
    verified(&attest, &signature).unwrap();
    for (what, octets) in [
        ("an octet more", [&signature[..], &[0]].concat()),
        ("r of 65535 octets", [&signature[..4], &[0xff, 0xff], &signature[6..]].concat()),
        ("r of 49 octets", [&signature[..4], &[0, 49], &[0; 49], &signature[38..]].concat()),
        ("unknown scheme", [&[0, 0x1b], &signature[2..]].concat()),
        ("unknown hash", [&signature[..2], &[0, 0x12], &signature[4..]].concat()),
        ("nothing", Vec::new()),
    ] {
        let error = verified(&attest, &octets).unwrap_err();
        assert!(matches!(error, QuoteError::Signature(_)), "{what}: {error:?}");
    }
    let zero = [&signature[..4], &[0, 32], &[0; 32], &[0, 32], &[0; 32]].concat();
    assert!(matches!(verified(&attest, &zero), Err(QuoteError::NotSigned)));
    let empty = [&signature[..4], &[0, 0, 0, 0]].concat();
    assert!(matches!(verified(&attest, &empty), Err(QuoteError::NotSigned)));
}

#[test]
fn a13_a_point_off_its_curve_is_no_ak() {
    AkPublic::parse(&KEYS.ak_public).unwrap();
    let mut off = KEYS.ak_public.clone();
    *off.last_mut().unwrap() ^= 1;
    assert_eq!(AkPublic::parse(&off).unwrap_err(), AkError::Key);
    // The same point, with a coordinate that is not reduced, and none at all.
    let coordinates = off.len() - 64 - 2;
    for octets in [[0xff; 32], [0; 32]] {
        let mut off = KEYS.ak_public.clone();
        off[coordinates..coordinates + 32].copy_from_slice(&octets);
        assert_eq!(AkPublic::parse(&off).unwrap_err(), AkError::Key);
    }
}

/// An RSA AK in software.
struct RsaAk {
    key: PKey<Private>,
    public: Vec<u8>,
}

const RSASSA: u8 = 0x14;
const RSAPSS: u8 = 0x16;

impl RsaAk {
    fn new(scheme: u8) -> Self {
        let rsa = Rsa::generate(2048).unwrap();
        let modulus = rsa.n().to_vec();
        Self { public: rsa_public(scheme, 0, &modulus), key: PKey::from_rsa(rsa).unwrap() }
    }

    /// Signs in `padding`, and says that it is `scheme` with SHA-256.
    fn sign(&self, padding: Padding, scheme: u8, message: &[u8]) -> Vec<u8> {
        let mut signer = Signer::new(MessageDigest::sha256(), &self.key).unwrap();
        signer.set_rsa_padding(padding).unwrap();
        if padding == Padding::PKCS1_PSS {
            signer.set_rsa_pss_saltlen(RsaPssSaltlen::MAXIMUM_LENGTH).unwrap();
        }
        let signed = signer.sign_oneshot_to_vec(message).unwrap();
        [&[0, scheme, 0, 0x0b, 1, 0], &signed[..]].concat()
    }

    fn verify(&self, attest: &[u8], signature: &[u8]) -> Result<VerifiedQuote, QuoteError> {
        let pcrs = pcrs().map(PcrValue::new);
        let ak = AkPublic::parse(&self.public).unwrap();
        verify_quote(&UnverifiedQuote { attest, signature, pcrs: &pcrs }, &ak, &NONCE)
    }
}

/// `TPMT_PUBLIC` of an RSA AK: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign.
fn rsa_public(scheme: u8, exponent: u32, modulus: &[u8]) -> Vec<u8> {
    let bits = u16::try_from(modulus.len() * 8).unwrap().to_be_bytes();
    let size = u16::try_from(modulus.len()).unwrap().to_be_bytes();
    let head = [0, 0x01, 0, 0x0b, 0, 0x05, 0, 0x72, 0, 0, 0, 0x10, 0, scheme, 0, 0x0b];
    [&head[..], &bits, &exponent.to_be_bytes(), &size, modulus].concat()
}

#[test]
fn a13_one_padding_is_not_taken_for_the_other() {
    let attest = good();
    for (own, other, own_word, other_word) in
        [(Padding::PKCS1, Padding::PKCS1_PSS, RSASSA, RSAPSS), (Padding::PKCS1_PSS, Padding::PKCS1, RSAPSS, RSASSA)]
    {
        let ak = RsaAk::new(own_word);
        ak.verify(&attest, &ak.sign(own, own_word, &attest)).unwrap();
        // The other padding under its own name, under the AK's, and the AK's under the other's name.
        let error = ak.verify(&attest, &ak.sign(other, other_word, &attest)).unwrap_err();
        assert!(matches!(error, QuoteError::Scheme { .. }), "{error:?}");
        let error = ak.verify(&attest, &ak.sign(other, own_word, &attest)).unwrap_err();
        assert!(matches!(error, QuoteError::NotSigned), "{error:?}");
        let error = ak.verify(&attest, &ak.sign(own, other_word, &attest)).unwrap_err();
        assert!(matches!(error, QuoteError::Scheme { .. }), "{error:?}");
        // An ECDSA signature of somebody else's.
        let error = ak.verify(&attest, &KEYS.sign(&attest)).unwrap_err();
        assert!(matches!(error, QuoteError::Scheme { found: Scheme::Ecdsa(_), .. }), "{error:?}");
    }
}

#[test]
fn a13_rsa_keys_of_odd_sizes_and_exponents_are_no_aks() {
    let modulus = |bytes: usize| [&[0x80][..], &vec![1; bytes - 1]].concat();
    AkPublic::parse(&rsa_public(RSASSA, 0, &modulus(256))).unwrap();
    AkPublic::parse(&rsa_public(RSASSA, 65537, &modulus(384))).unwrap();
    for (what, public) in [
        ("1024 bits", rsa_public(RSASSA, 0, &modulus(128))),
        ("2040 bits", rsa_public(RSASSA, 0, &modulus(255))),
        ("exponent 3", rsa_public(RSASSA, 3, &modulus(256))),
        ("exponent 1", rsa_public(RSASSA, 1, &modulus(256))),
    ] {
        assert_eq!(AkPublic::parse(&public).unwrap_err(), AkError::Key, "{what}");
    }
    let mut claims_less = rsa_public(RSASSA, 0, &modulus(256));
    claims_less[16..18].copy_from_slice(&1024_u16.to_be_bytes());
    let leading_zero = [&[0][..], &[0xff; 255]].concat();
    for (what, public) in [
        ("8192 bits", rsa_public(RSASSA, 0, &modulus(1024))),
        ("another size than it says", claims_less),
        ("a modulus with a leading zero", rsa_public(RSASSA, 0, &leading_zero)),
        ("no modulus", rsa_public(RSASSA, 0, &[])),
    ] {
        assert!(matches!(AkPublic::parse(&public), Err(AkError::Malformed(_))), "{what}");
    }
    // Bound to no scheme, it signs in any.
    let mut unbound = rsa_public(RSASSA, 0, &modulus(256));
    unbound.splice(12..16, [0, 0x10]);
    assert!(matches!(AkPublic::parse(&unbound), Err(AkError::Scheme(_))));
}
