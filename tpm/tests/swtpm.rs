//! Against a real TPM: names, structures, credentials and sealed grants are what swtpm says that they are.

use assay_tpm::attest::{AttestError, CreatedKey, Quote};
use assay_tpm::credential::{CredentialError, make_credential};
use assay_tpm::public::{Attributes, Curve, KeyPublic, Public, Scheme};
use assay_tpm::reader::Problem;
use assay_tpm::seal::{SealError, open_grant, seal_grant};
use assay_tpm::signature::Signature;
use assay_tpm::testing::{KeyKind, SoftTpm};
use assay_wire::id::AdmissionId;

const SECRET: [u8; 32] = [0x5a; 32];

/// EK and AK kinds that are in the field.
const KINDS: [(KeyKind, KeyKind); 3] =
    [(KeyKind::Rsa, KeyKind::Rsa), (KeyKind::Rsa, KeyKind::RsaPss), (KeyKind::Ecc, KeyKind::Ecc)];

#[test]
fn the_tpm_opens_a_credential_made_here() {
    for (ek_kind, ak_kind) in KINDS {
        let tpm = SoftTpm::start();
        let ek = tpm.create_ek(ek_kind);
        let ak = Public::parse(&tpm.create_ak(ak_kind)).unwrap();
        // Activation compares the name inside the credential with the loaded key's: the name that we computed is right.
        let credential = make_credential(&ek, ak.name().as_bytes(), &SECRET).unwrap();
        assert_eq!(tpm.activate(&credential).unwrap(), SECRET, "{ek_kind:?} {ak_kind:?}");
    }
}

#[test]
fn a_p384_ek_opens_a_credential_made_here() {
    let (tpm, _cas) = SoftTpm::start_with_ek_certificate();
    let ek = tpm.p384_ek();
    assert!(matches!(Public::parse(&ek).unwrap().key(), KeyPublic::Ecc { curve: Curve::P384, .. }));
    let ak = Public::parse(&tpm.create_ak_under_p384_ek()).unwrap();
    // 48 octets: as many as its name algorithm's digest has.
    for secret in [&SECRET[..], &[0xa5; 48]] {
        let credential = make_credential(&ek, ak.name().as_bytes(), secret).unwrap();
        assert_eq!(tpm.activate_with_p384_ek(&credential).unwrap(), secret);
    }
    let error = make_credential(&ek, ak.name().as_bytes(), &[0; 49]).unwrap_err();
    assert!(matches!(error, CredentialError::SecretSize { bytes: 49, limit: 48 }), "{error}");
    // The secret of a grant is sealed to it, too.
    let sealed = seal_grant(&ek, ak.name().as_bytes(), AdmissionId::random(), b"chap secret").unwrap();
    let key: [u8; 32] = tpm.activate_with_p384_ek(&sealed.credential).unwrap().try_into().unwrap();
    assert_eq!(open_grant(&key, &sealed).unwrap().as_slice(), b"chap secret");
}

#[test]
fn a13_an_ek_that_is_no_point_of_its_curve_gets_no_credential() {
    let tpm = SoftTpm::start();
    let ek = tpm.create_ek(KeyKind::Ecc);
    let ak = Public::parse(&tpm.create_ak(KeyKind::Ecc)).unwrap();
    let mut off = ek;
    *off.last_mut().unwrap() ^= 1;
    assert!(Public::parse(&off).is_ok(), "the structure is whole");
    let error = make_credential(&off, ak.name().as_bytes(), &SECRET).unwrap_err();
    assert!(matches!(error, CredentialError::Crypto(_)), "{error}");
}

#[test]
fn what_a_tpm_says_of_a_key_that_it_made_is_read() {
    let tpm = SoftTpm::start();
    let ek = tpm.create_certifiable_ek();
    let _iak = tpm.create_ak(KeyKind::Ecc);
    let statement = tpm.certify_ek();
    assert_eq!(CreatedKey::parse(&statement.attest).unwrap().name, Public::parse(&ek).unwrap().name().as_bytes());
    // A quote is none, a statement is no quote, and A15: nothing is left out or over.
    let quote = tpm.quote(&[7; 32], "sha256:0");
    assert!(matches!(CreatedKey::parse(&quote.attest), Err(AttestError::NotACreation { found: 0x8018 })));
    assert!(matches!(Quote::parse(&statement.attest), Err(AttestError::NotAQuote { found: 0x801a })));
    for length in 0..statement.attest.len() {
        assert!(CreatedKey::parse(&statement.attest[..length]).is_err(), "{length} octets");
    }
    assert!(CreatedKey::parse(&[&statement.attest[..], &[0]].concat()).is_err());
}

#[test]
fn a8_no_other_key_and_no_other_tpm_opens_it() {
    let (tpm, other) = (SoftTpm::start(), SoftTpm::start());
    let ek = tpm.create_ek(KeyKind::Rsa);
    let first = Public::parse(&tpm.create_ak(KeyKind::Rsa)).unwrap();
    let credential = make_credential(&ek, first.name().as_bytes(), &SECRET).unwrap();
    let _ = tpm.create_ak(KeyKind::Rsa); // now the AK is another one
    assert!(tpm.activate(&credential).unwrap_err().contains("integrity check failed"));

    let _ = other.create_ek(KeyKind::Rsa);
    let stranger = Public::parse(&other.create_ak(KeyKind::Rsa)).unwrap();
    let credential = make_credential(&ek, stranger.name().as_bytes(), &SECRET).unwrap();
    assert!(other.activate(&credential).is_err(), "a credential for one EK was opened with another");
}

#[test]
fn a_grant_opens_in_its_tpm_and_admission_only() {
    let tpm = SoftTpm::start();
    let ek = tpm.create_ek(KeyKind::Rsa);
    let ak = Public::parse(&tpm.create_ak(KeyKind::Rsa)).unwrap();
    let sealed = seal_grant(&ek, ak.name().as_bytes(), AdmissionId::random(), b"chap secret").unwrap();
    assert!(!sealed.ciphertext.windows(4).any(|window| window == b"chap"));

    let key: [u8; 32] = tpm.activate(&sealed.credential).unwrap().try_into().unwrap();
    assert_eq!(open_grant(&key, &sealed).unwrap().as_slice(), b"chap secret");

    let mut moved = sealed.clone();
    moved.admission = AdmissionId::random();
    assert!(matches!(open_grant(&key, &moved), Err(SealError::NotAuthentic)));
    let mut changed = sealed.clone();
    changed.ciphertext[0] ^= 1;
    assert!(matches!(open_grant(&key, &changed), Err(SealError::NotAuthentic)));
    let mut short = sealed.clone();
    short.nonce.pop();
    assert!(matches!(open_grant(&key, &short), Err(SealError::Malformed { part: "nonce", bytes: 11 })));
    assert!(matches!(open_grant(&[0; 32], &sealed), Err(SealError::NotAuthentic)));
}

#[test]
fn public_areas_say_what_the_tpm_made() {
    let tpm = SoftTpm::start();
    let ek = Public::parse(&tpm.create_ek(KeyKind::Rsa)).unwrap();
    assert!(ek.attributes().contains(Attributes::RESTRICTED) && ek.attributes().contains(Attributes::DECRYPT));
    assert!(!ek.attributes().contains(Attributes::SIGN));
    assert_eq!(ek.symmetric().unwrap().key_bits, 128);
    assert!(matches!(ek.key(), KeyPublic::Rsa { modulus, exponent: 65537 } if modulus.len() == 256));

    for (kind, scheme) in
        [(KeyKind::Rsa, "RsaSsa(Sha256)"), (KeyKind::RsaPss, "RsaPss(Sha256)"), (KeyKind::Ecc, "Ecdsa(Sha256)")]
    {
        let ak = Public::parse(&tpm.create_ak(kind)).unwrap();
        assert_eq!(ak.scheme().map(|s: Scheme| format!("{s:?}")).as_deref(), Some(scheme));
        assert!(ak.attributes().contains(Attributes::RESTRICTED) && ak.attributes().contains(Attributes::SIGN));
    }
}

#[test]
fn a15_every_truncation_and_any_trailing_octet_is_refused() {
    let tpm = SoftTpm::start();
    let ek = tpm.create_ek(KeyKind::Ecc);
    let ak = tpm.create_ak(KeyKind::Rsa);
    let quote = tpm.quote(&[7; 32], "sha256:0,1,2");
    assert_eq!(Quote::parse(&quote.attest).unwrap().extra_data, [7; 32]);
    Signature::parse(&quote.signature).unwrap();

    for public in [&ek, &ak] {
        for length in 0..public.len() {
            assert!(Public::parse(&public[..length]).is_err(), "{length} of {} octets", public.len());
        }
        let error = Public::parse(&[&public[..], &[0]].concat()).unwrap_err();
        assert_eq!(error.problem, Problem::Trailing { left: 1 });
    }
    for length in 0..quote.attest.len() {
        assert!(Quote::parse(&quote.attest[..length]).is_err());
    }
    assert!(Quote::parse(&[&quote.attest[..], &[0]].concat()).is_err());
    for length in 0..quote.signature.len() {
        assert!(Signature::parse(&quote.signature[..length]).is_err());
    }
    assert!(Signature::parse(&[&quote.signature[..], &[0]].concat()).is_err());
}
