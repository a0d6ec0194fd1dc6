//! Who is believed about EKs: swtpm's own certificates, every forgery of row A7 (`pki.toml`), IAKs, and the operator.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod pki;

use assay_service::error::chain;
use assay_tpm::public::Public as TpmPublic;
use assay_tpm::testing::{KeyKind, SoftTpm};
use assay_verifier::identity::anchors::AnchorError;
use assay_verifier::identity::{
    EkClaim, EkDigest, Endorsement, Endorsers, IdentityError, TrustAnchors, VerifiedEk, verify_ek,
};
use assay_wire::agent::IakEndorsement;
use openssl::pkey::{PKey, Public};
use pki::{Case, Certificate, NOW, Pki, Spec};
use proptest::prelude::*;
use std::sync::LazyLock;

static SPEC: LazyLock<Spec> = LazyLock::new(Spec::read);
static PKI: LazyLock<Pki> = LazyLock::new(|| Pki::make(&SPEC));
/// An EK of a real TPM.
static EK: LazyLock<Vec<u8>> = LazyLock::new(|| SoftTpm::start().create_ek(KeyKind::Rsa));

/// The key in a `TPMT_PUBLIC`, as OpenSSL knows it.
fn key_of(public: &[u8]) -> PKey<Public> {
    PKey::public_key_from_der(&TpmPublic::parse(public).unwrap().key().to_spki()).unwrap()
}

fn seconds_now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}

fn claim<'a>(public: &'a [u8], certificate: &'a [u8]) -> EkClaim<'a> {
    EkClaim { public, certificate, chain: &[], iak: None, operator_vouches: false }
}

fn endorsers(pems: &[Vec<u8>]) -> Endorsers {
    Endorsers { ek_cas: TrustAnchors::from_pems(pems).unwrap(), iak_cas: TrustAnchors::default() }
}

fn case(id: &str) -> &'static Case {
    SPEC.ek.iter().find(|case| case.certificate.id == id).unwrap()
}

/// The certificate of a case, as bent as it says.
fn certificate(case: &Case) -> Vec<u8> {
    let stranger = pki::ec_key();
    let key = match case.key.as_deref() {
        None => key_of(&EK),
        Some("another") => PKey::public_key_from_der(&stranger.public_key_to_der().unwrap()).unwrap(),
        Some(other) => panic!("{other}"),
    };
    let mut der = PKI.certificate(&case.certificate, &key, &stranger).to_der().unwrap();
    if let Some(octet) = case.first_octet {
        der[0] = octet;
    }
    if case.flip_last {
        *der.last_mut().unwrap() ^= 1;
    }
    der.truncate(case.cut_to.unwrap_or(der.len()));
    der.extend(vec![0xff; case.padding]);
    der
}

fn verdict(case: &Case, operator_vouches: bool) -> Result<VerifiedEk, IdentityError> {
    let pems: Vec<_> = case.configured.iter().map(|ca| PKI.pem(ca)).collect();
    // Lists come in either form.
    let crls: Vec<_> = case.crls.iter().map(|crl| PKI.crl_der(crl)).collect();
    let ek_cas = TrustAnchors::from_pems(&pems).unwrap().with_crls(&crls).unwrap();
    let chain: Vec<u8> = case.sent.iter().flat_map(|ca| [PKI.der(ca), vec![0xff; 3]].concat()).collect();
    let certificate = certificate(case);
    let claim = EkClaim { chain: &chain, operator_vouches, ..claim(&EK, &certificate) };
    verify_ek(&Endorsers { ek_cas, iak_cas: TrustAnchors::default() }, &claim, NOW)
}

#[test]
fn a7_every_case_of_the_test_pki_ends_as_it_says() {
    let mut wrong = Vec::new();
    for case in &SPEC.ek {
        let id = &case.certificate.id;
        let found = match verdict(case, false) {
            Ok(ek) => {
                assert!(matches!(ek.endorsement(), Endorsement::Certificate(_)), "{id}");
                "good".to_owned()
            }
            Err(error) => chain(&error),
        };
        let as_said = if case.expect == "good" { found == "good" } else { found.contains(&case.expect) };
        if !as_said {
            wrong.push(format!("{id}: expected `{}`, found `{found}`", case.expect));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(SPEC.ek.len() > 40, "cases got lost");
}

#[test]
fn a7_octets_behind_a_certificate_vouch_for_nothing_and_inside_it_there_is_no_room_for_any() {
    let endorsement = |certificate: &[u8]| {
        verify_ek(&endorsers(&[PKI.pem("root")]), &claim(&EK, certificate), NOW).map(|ek| ek.endorsement().clone())
    };
    let good = certificate(case("good"));
    let known = Endorsement::Certificate(hex::encode(openssl::sha::sha256(&good)));
    let (strangers, others) = (certificate(case("of-a-stranger")), certificate(case("another-keys")));
    // NV areas are larger than what they hold. Whatever fills them, it is the certificate alone that is known.
    for behind in [&[0xff; 650][..], &[0; 3], b"vouch for me", &strangers, &good] {
        assert_eq!(endorsement(&[&good[..], behind].concat()).unwrap(), known);
    }
    // Nor is there a second try behind a certificate that is none, of nobody, or of another key.
    for (first, says) in [(&others, "is of another key"), (&strangers, "none signed it"), (&vec![0; 4], "is not DER")] {
        let error = endorsement(&[&first[..], &good].concat()).unwrap_err();
        assert!(chain(&error).contains(says), "{error}");
    }
    // Behind the signature, but within the length that the certificate says to have.
    let mut longer = [&good[..], &[0x05, 0x00]].concat();
    let length = u16::from_be_bytes([longer[2], longer[3]]) + 2;
    longer[2..4].copy_from_slice(&length.to_be_bytes());
    let error = endorsement(&longer).unwrap_err();
    assert!(matches!(error, IdentityError::Certificate { .. }), "{error:?}");
}

#[test]
fn a7_the_operators_word_stands_for_silence_but_not_against_a_cas() {
    for case in &SPEC.ek {
        let silent = ["none signed it", "sent no EK", "no EK CA"].iter().any(|word| case.expect.contains(word));
        let verdict = verdict(case, true);
        let id = &case.certificate.id;
        match verdict {
            Ok(ek) if case.expect == "good" => assert!(matches!(ek.endorsement(), Endorsement::Certificate(_)), "{id}"),
            Ok(ek) => {
                assert!(silent, "{id}: an operator's word stood against `{}`", case.expect);
                assert_eq!(*ek.endorsement(), Endorsement::Operator, "{id}");
            }
            Err(error) => assert!(!silent, "{id}: {error}"),
        }
    }
}

#[test]
fn a7_a_manufactured_tpm_is_believed_by_its_makers_ca_only() {
    let (tpm, pems) = SoftTpm::start_with_ek_certificate();
    let (ek, certificate) = (tpm.create_ek(KeyKind::Rsa), tpm.ek_certificate());
    let now = seconds_now();
    let verified = verify_ek(&endorsers(&pems), &claim(&ek, &certificate), now).unwrap();
    assert_eq!(verified.public(), ek);
    // The issuer alone is enough; NV areas are larger than the certificate.
    let padded = [&certificate[..], &[0xff; 650]].concat();
    let issuer = endorsers(&pems[1..]);
    let again = verify_ek(&issuer, &claim(&ek, &padded), now).unwrap();
    assert_eq!(again.endorsement(), verified.endorsement());
    // The root alone is enough, if the issuer comes along.
    let root = endorsers(&pems[..1]);
    let issuer_der = openssl::x509::X509::from_pem(&pems[1]).unwrap().to_der().unwrap();
    let with_chain = EkClaim { chain: &issuer_der, ..claim(&ek, &certificate) };
    verify_ek(&root, &with_chain, now).unwrap();
    assert!(matches!(verify_ek(&root, &claim(&ek, &certificate), now), Err(IdentityError::UnknownIssuer { .. })));

    let (_other, other_pems) = SoftTpm::start_with_ek_certificate();
    let error = verify_ek(&endorsers(&other_pems), &claim(&ek, &certificate), now).unwrap_err();
    assert!(matches!(error, IdentityError::UnknownIssuer { .. }), "the same name and another key: {error:?}");
    // swtpm's certificates never expire; what is not valid yet is refused.
    let early = verify_ek(&issuer, &claim(&ek, &certificate), now - 86400 * 365);
    assert!(matches!(early, Err(IdentityError::Chain { .. })), "{early:?}");
}

#[test]
fn a_p384_ek_in_the_high_range_is_believed_by_its_certificate() {
    let (tpm, pems) = SoftTpm::start_with_ek_certificate();
    let (ek, certificate) = (tpm.p384_ek(), tpm.p384_ek_certificate());
    let verified = verify_ek(&endorsers(&pems), &claim(&ek, &certificate), seconds_now()).unwrap();
    assert_ne!(verified.sha256(), &EkDigest::of_public(&tpm.create_ek(KeyKind::Rsa)).unwrap());
    // The certificate of the TPM's other EK is not this one's.
    let error = verify_ek(&endorsers(&pems), &claim(&ek, &tpm.ek_certificate()), seconds_now()).unwrap_err();
    assert!(matches!(error, IdentityError::OtherKey(_)), "{error:?}");
}

#[test]
fn a6_one_key_has_one_digest_whatever_its_public_area_says() {
    // authPolicy is the 32 octets from the eleventh on: of the TPM's making, and of nobody else's business.
    let mut other_policy = EK.clone();
    assert_eq!(other_policy[8..10], [0, 32]);
    other_policy[10] ^= 1;
    let mut user_with_auth = EK.clone();
    user_with_auth[7] |= 0x40;
    for forged in [other_policy, user_with_auth] {
        assert_ne!(TpmPublic::parse(&forged).unwrap().name(), TpmPublic::parse(&EK).unwrap().name());
        assert_eq!(EkDigest::of_public(&forged).unwrap(), EkDigest::of_public(&EK).unwrap());
    }
    // It is the digest of what OpenSSL writes, so operators can compute it from a certificate.
    let (tpm, _pems) = SoftTpm::start_with_ek_certificate();
    for (public, certificate) in
        [(tpm.create_ek(KeyKind::Rsa), tpm.ek_certificate()), (tpm.p384_ek(), tpm.p384_ek_certificate())]
    {
        let length = usize::from(u16::from_be_bytes([certificate[2], certificate[3]])) + 4;
        let certificate = openssl::x509::X509::from_der(&certificate[..length]).unwrap();
        let spki = certificate.public_key().unwrap().public_key_to_der().unwrap();
        assert_eq!(EkDigest::of_public(&public).unwrap().as_str(), hex::encode(openssl::sha::sha256(&spki)));
    }
}

#[test]
fn a5_a13_an_ak_and_a_weak_key_are_no_eks() {
    let tpm = SoftTpm::start();
    let _ = tpm.create_ek(KeyKind::Rsa);
    let ak = tpm.create_ak(KeyKind::Rsa);
    let none = Endorsers::default();
    let error = |public: &[u8]| verify_ek(&none, &claim(public, &[]), NOW).unwrap_err();
    assert!(matches!(error(&ak), IdentityError::NotAnEk("is not a decryption key")));
    // objectAttributes are the four octets from the fifth on.
    for (octet, bit, word) in [
        (5, 0x01, "is not restricted"),
        (7, 0x02, "is not fixedTPM"),
        (7, 0x10, "is not fixedParent"),
        (7, 0x20, "is not sensitiveDataOrigin"),
    ] {
        let mut changed = EK.clone();
        changed[octet] &= !bit;
        let error = error(&changed);
        assert!(matches!(error, IdentityError::NotAnEk(found) if found == word), "{error:?}");
    }
    let mut signs = EK.clone();
    signs[5] |= 0x04;
    assert!(matches!(error(&signs), IdentityError::NotAnEk("may also sign")));
    // Name algorithm SHA-1; another exponent.
    let mut sha1 = EK.clone();
    sha1[3] = 0x04;
    assert!(matches!(error(&sha1), IdentityError::NotAnEk(word) if word.contains("template")));
    let mut exponent = EK.clone();
    let at = exponent.len() - 256 - 2 - 4;
    exponent[at + 3] = 3;
    assert!(matches!(error(&exponent), IdentityError::NotAnEk(word) if word.contains("65537")));
}

/// A TPM whose maker certified an IAK and no EK.
struct IakTpm {
    ek: Vec<u8>,
    iak: IakEndorsement,
    cas: Vec<Vec<u8>>,
}

impl IakTpm {
    fn make(described: &Certificate) -> Self {
        let tpm = SoftTpm::start();
        let ek = tpm.create_certifiable_ek();
        let public = tpm.create_ak(KeyKind::Ecc);
        let statement = tpm.certify_ek();
        let certificate = PKI.certificate(described, &key_of(&public), &pki::ec_key()).to_der().unwrap();
        let chain = PKI.der("issuing");
        let (attest, signature) = (statement.attest, statement.signature);
        Self { ek, iak: IakEndorsement { public, certificate, chain, attest, signature }, cas: vec![PKI.pem("root")] }
    }

    fn verify(&self, iak: &IakEndorsement) -> Result<VerifiedEk, IdentityError> {
        let endorsers =
            Endorsers { ek_cas: TrustAnchors::default(), iak_cas: TrustAnchors::from_pems(&self.cas).unwrap() };
        verify_ek(&endorsers, &EkClaim { iak: Some(iak), ..claim(&self.ek, &[]) }, NOW)
    }
}

fn iak_certificate() -> Certificate {
    Certificate {
        id: "iak".to_owned(),
        issuer: Some("issuing".to_owned()),
        key_usage: vec!["digitalSignature".to_owned()],
        eku: vec!["2.23.133.8.3".to_owned()],
        ..Certificate::default()
    }
}

#[test]
fn an_iak_vouches_for_the_ek_of_its_tpm() {
    let tpm = IakTpm::make(&iak_certificate());
    assert!(matches!(tpm.verify(&tpm.iak).unwrap().endorsement(), Endorsement::Iak(_)));
    // By the policy of verified residency, too.
    let policy = Certificate { eku: Vec::new(), policy: Some("2.23.133.11.1.3".to_owned()), ..iak_certificate() };
    let tpm = IakTpm::make(&policy);
    tpm.verify(&tpm.iak).unwrap();
    // Nobody who is not configured.
    let none = Endorsers::default();
    let error = verify_ek(&none, &EkClaim { iak: Some(&tpm.iak), ..claim(&tpm.ek, &[]) }, NOW).unwrap_err();
    assert!(matches!(error, IdentityError::NoCa(_)), "{error:?}");
}

#[test]
fn a5_a6_a12_an_iak_that_may_sign_anything_or_speaks_of_another_key_vouches_for_none() {
    // An IDevID's certificate does not say that its key is restricted.
    let idevid = IakTpm::make(&Certificate { eku: Vec::new(), ..iak_certificate() });
    let error = idevid.verify(&idevid.iak).unwrap_err();
    assert!(
        matches!(error, IdentityError::Certificate { problem, .. } if problem.contains("2.23.133.8.3")),
        "{error:?}"
    );

    let (tpm, other) = (IakTpm::make(&iak_certificate()), IakTpm::make(&iak_certificate()));
    let refused = |change: &dyn Fn(&mut IakEndorsement)| {
        let mut iak = tpm.iak.clone();
        change(&mut iak);
        tpm.verify(&iak).unwrap_err()
    };
    let (attest, signature) = (&other.iak.attest, &other.iak.signature);
    // Another TPM's IAK speaks of another EK, whoever sends it.
    assert!(matches!(other_ek(&tpm, &other), IdentityError::IakOtherKey));
    let error = refused(&|iak| (iak.attest, iak.signature) = (attest.clone(), signature.clone()));
    assert!(matches!(error, IdentityError::IakSignature(_)), "{error:?}");
    let error = refused(&|iak| iak.attest[20] ^= 1);
    assert!(matches!(error, IdentityError::IakSignature(_)), "{error:?}");
    let error = refused(&|iak| iak.certificate.clone_from(&other.iak.certificate));
    assert!(matches!(error, IdentityError::OtherKey(_)), "{error:?}");
    let error = refused(&|iak| iak.chain.clear());
    assert!(matches!(error, IdentityError::UnknownIssuer { .. }), "{error:?}");
    // Not restricted.
    let error = refused(&|iak| iak.public[5] &= !0x01);
    assert!(matches!(error, IdentityError::Iak(_)), "{error:?}");
    // A quote is no statement on a key.
    let soft = SoftTpm::start();
    let ek = soft.create_ek(KeyKind::Rsa);
    let public = soft.create_ak(KeyKind::Ecc);
    let quote = soft.quote(&[1; 32], "sha256:0");
    let certificate = PKI.certificate(&iak_certificate(), &key_of(&public), &pki::ec_key()).to_der().unwrap();
    let (attest, signature) = (quote.attest, quote.signature);
    let iak = IakEndorsement { public, certificate, chain: PKI.der("issuing"), attest, signature };
    let quoting = IakTpm { ek, iak, cas: vec![PKI.pem("root")] };
    let error = quoting.verify(&quoting.iak).unwrap_err();
    assert!(matches!(error, IdentityError::IakAttest(_)), "{error:?}");
}

/// `other`'s whole endorsement, sent for the EK of `tpm`.
fn other_ek(tpm: &IakTpm, other: &IakTpm) -> IdentityError {
    tpm.verify(&other.iak).unwrap_err()
}

#[test]
fn files_that_say_nothing_or_less_than_they_seem_to_are_errors() {
    assert!(matches!(TrustAnchors::from_pems(&[b"nothing".to_vec()]), Err(AnchorError::EmptyCaFile)));
    let broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec();
    assert!(matches!(TrustAnchors::from_pems(&[broken]), Err(AnchorError::CaFile(_))));
    let crls = |file: &[u8]| TrustAnchors::default().with_crls(&[file.to_vec()]);
    assert!(matches!(crls(b""), Err(AnchorError::UnfitCrl(_))));
    assert!(matches!(crls(b"nothing"), Err(AnchorError::UnfitCrl(_))));
    assert!(matches!(crls(&[0x30, 0x00]), Err(AnchorError::CrlFile(_))));
    let two = [PKI.crl_pem("root-current"), PKI.crl_pem("issuing-current")].concat();
    assert!(format!("{:?}", crls(&two).unwrap()).contains("crls: 2"));
    assert!(format!("{:?}", crls(&PKI.crl_der("root-stale")).unwrap()).contains("crls: 1"), "stale is not unfit");
}

/// Makers' certificates, some of which are no strict DER. `ASSAY_CORPUS` as in `event_log_corpus.rs`.
#[test]
fn makers_ca_files_are_read() {
    let default = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let folder = std::env::var_os("ASSAY_CORPUS").map_or(default, std::path::PathBuf::from).join("tpm-vendor-ca");
    let Ok(files) = std::fs::read_dir(&folder) else {
        eprintln!("skipped: no corpus at {} (set ASSAY_CORPUS)", folder.display());
        return;
    };
    let mut all = Vec::new();
    for file in files {
        let path = file.unwrap().path();
        let pem = std::fs::read(&path).unwrap();
        let cas = TrustAnchors::from_pems(std::slice::from_ref(&pem));
        assert!(cas.is_ok_and(|cas| !cas.is_empty()), "{}", path.display());
        all.push(pem);
    }
    assert!(TrustAnchors::from_pems(&all).unwrap().len() >= all.len());
}

proptest! {
    #[test]
    fn a7_arbitrary_certificates_and_chains_never_panic(
        head in 0usize..3, tail in proptest::collection::vec(any::<u8>(), 0..400), chain in proptest::collection::vec(any::<u8>(), 0..400)
    ) {
        static ENDORSERS: LazyLock<Endorsers> = LazyLock::new(|| endorsers(&[PKI.pem("root")]));
        let length = u16::try_from(tail.len()).unwrap().to_be_bytes();
        let heads = [&[][..], &[0x30, 0x82, length[0], length[1]], &[0x30, 0x81, length[1]]];
        let certificate = [heads[head], &tail[..]].concat();
        let claim = EkClaim { chain: &chain, ..claim(&EK, &certificate) };
        prop_assert!(verify_ek(&ENDORSERS, &claim, NOW).is_err());
        prop_assert!(TrustAnchors::default().with_crls(&[certificate]).is_err());
    }

    #[test]
    fn a7_a_bent_certificate_chain_or_list_never_panics_and_vouches_only_as_it_was(at in 0usize..4096, bit in 0u8..8) {
        static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| certificate(case("good-intermediate-from-nv")));
        static ENDORSERS: LazyLock<Endorsers> = LazyLock::new(|| endorsers(&[PKI.pem("root")]));
        let mut bent = GOOD.clone();
        let at_certificate = at % bent.len();
        bent[at_certificate] ^= 1 << bit;
        let chain = PKI.der("issuing");
        let whole = EkClaim { chain: &chain, ..claim(&EK, &bent) };
        prop_assert!(verify_ek(&ENDORSERS, &whole, NOW).is_err(), "octet {at_certificate} does not count");
        let mut bent = chain.clone();
        let at_chain = at % bent.len();
        bent[at_chain] ^= 1 << bit;
        let whole = EkClaim { chain: &bent, ..claim(&EK, &GOOD) };
        prop_assert!(verify_ek(&ENDORSERS, &whole, NOW).is_err(), "octet {at_chain} of the chain does not count");
        let mut list = PKI.crl_der("root-current");
        let at_list = at % list.len();
        list[at_list] ^= 1 << bit;
        let _ = TrustAnchors::default().with_crls(&[list]);
    }
}
