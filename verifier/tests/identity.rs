//! EK certificates: swtpm's own, and every forgery of row A7.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

use assay_tpm::testing::{KeyKind, SoftTpm};
use assay_verifier::identity::{EkCas, IdentityError, verify_ek};
use openssl::asn1::{Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::BigNum;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private, Public};
use openssl::rsa::Rsa;
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage};
use openssl::x509::{X509, X509Builder, X509Extension, X509Name};
use proptest::prelude::*;
use std::sync::LazyLock;

const NOW: i64 = 1_800_000_000;

/// An authority of the test's own.
struct Ca {
    key: PKey<Private>,
    certificate: X509,
}

impl Ca {
    fn new(name: &str) -> Self {
        let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
        let name = named(name);
        let mut builder = begin(&name, &name, &key);
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        builder.append_extension(KeyUsage::new().critical().key_cert_sign().build().unwrap()).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        Self { key, certificate: builder.build() }
    }

    /// Signs a certificate of `key` with what `add` adds.
    fn certify(&self, key: &PKey<Public>, add: impl FnOnce(&mut X509Builder)) -> Vec<u8> {
        let mut builder = begin(&named("EK"), self.certificate.subject_name(), key);
        add(&mut builder);
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        builder.build().to_der().unwrap()
    }

    fn trusted(&self) -> EkCas {
        EkCas::from_pems(&[self.certificate.to_pem().unwrap()]).unwrap()
    }
}

fn named(name: &str) -> X509Name {
    let mut builder = X509Name::builder().unwrap();
    builder.append_entry_by_text("CN", name).unwrap();
    builder.build()
}

fn begin<T: openssl::pkey::HasPublic>(
    subject: &X509Name,
    issuer: &openssl::x509::X509NameRef,
    key: &PKey<T>,
) -> X509Builder {
    let mut builder = X509Builder::new().unwrap();
    builder.set_version(2).unwrap();
    builder.set_serial_number(&BigNum::from_u32(7).unwrap().to_asn1_integer().unwrap()).unwrap();
    builder.set_subject_name(subject).unwrap();
    builder.set_issuer_name(issuer).unwrap();
    builder.set_pubkey(key).unwrap();
    builder.set_not_before(&Asn1Time::from_unix(NOW - 1000).unwrap()).unwrap();
    builder.set_not_after(&Asn1Time::from_unix(NOW + 1000).unwrap()).unwrap();
    builder
}

/// An EK of a real TPM and its key as OpenSSL knows it.
fn ek() -> (Vec<u8>, PKey<Public>) {
    let public = SoftTpm::start().create_ek(KeyKind::Rsa);
    let modulus = BigNum::from_slice(&public[public.len() - 256..]).unwrap();
    let rsa = Rsa::from_public_components(modulus, BigNum::from_u32(65537).unwrap()).unwrap();
    (public, PKey::from_rsa(rsa).unwrap())
}

fn seconds_now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}

#[test]
fn a_manufactured_tpm_is_believed_by_its_makers_ca_only() {
    let (tpm, pems) = SoftTpm::start_with_ek_certificate();
    let (ek, certificate) = (tpm.create_ek(KeyKind::Rsa), tpm.ek_certificate());
    let now = seconds_now();
    let verified = verify_ek(&EkCas::from_pems(&pems).unwrap(), &ek, &certificate, now).unwrap();
    assert_eq!(verified.public(), ek);
    // The issuer alone is enough; NV areas are larger than the certificate.
    let padded = [&certificate[..], &[0xff; 650]].concat();
    let issuer = EkCas::from_pems(&pems[1..]).unwrap();
    let again = verify_ek(&issuer, &ek, &padded, now).unwrap();
    assert_eq!(again.certificate_sha256_hex(), verified.certificate_sha256_hex());

    let (_other, other_pems) = SoftTpm::start_with_ek_certificate();
    let other = EkCas::from_pems(&other_pems).unwrap();
    let error = verify_ek(&other, &ek, &certificate, now).unwrap_err();
    assert!(matches!(error, IdentityError::Chain { .. }), "a CA with the same name and another key: {error:?}");
    let none = EkCas::from_pems(&[]).unwrap();
    assert!(matches!(verify_ek(&none, &ek, &certificate, now), Err(IdentityError::NoCa)));
    // swtpm's certificates never expire; what is not valid yet is refused.
    let early = verify_ek(&issuer, &ek, &certificate, now - 86400 * 365);
    assert!(matches!(early, Err(IdentityError::Chain { .. })), "{early:?}");
}

#[test]
fn a7_the_certificate_must_be_an_eks_and_of_this_key() {
    let ca = Ca::new("EK CA");
    let (ek, key) = ek();
    let check = |der: &[u8]| verify_ek(&ca.trusted(), &ek, der, NOW);
    let ek_usage = || ExtendedKeyUsage::new().other("2.23.133.8.1").build().unwrap();
    check(&ca.certify(&key, |_| {})).unwrap();
    check(&ca.certify(&key, |c| c.append_extension(ek_usage()).unwrap())).unwrap();

    let ca_leaf = ca.certify(&key, |c| c.append_extension(BasicConstraints::new().ca().build().unwrap()).unwrap());
    assert!(matches!(check(&ca_leaf), Err(IdentityError::Certificate("is a CA's"))));
    let signer = ca.certify(&key, |c| c.append_extension(KeyUsage::new().key_cert_sign().build().unwrap()).unwrap());
    assert!(matches!(check(&signer), Err(IdentityError::Certificate("may sign certificates"))));
    let web = ca.certify(&key, |c| c.append_extension(ExtendedKeyUsage::new().server_auth().build().unwrap()).unwrap());
    assert!(matches!(check(&web), Err(IdentityError::Certificate(problem)) if problem.contains("another purpose")));

    let stranger = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
    let stranger = PKey::public_key_from_der(&stranger.public_key_to_der().unwrap()).unwrap();
    assert!(matches!(check(&ca.certify(&stranger, |_| {})), Err(IdentityError::OtherKey)));

    let critical = |oid: &str| {
        let value = Asn1OctetString::new_from_bytes(&[0x05, 0x00]).unwrap();
        X509Extension::new_from_der(&Asn1Object::from_str(oid).unwrap(), true, &value).unwrap()
    };
    let unknown = ca.certify(&key, |c| c.append_extension(critical("1.2.3.4")).unwrap());
    assert!(matches!(check(&unknown), Err(IdentityError::Certificate(problem)) if problem.contains("critical")));
}

#[test]
fn a7_self_made_expired_changed_and_malformed_certificates_are_refused() {
    let (ca, forger) = (Ca::new("EK CA"), Ca::new("EK CA"));
    let (ek, key) = ek();
    let good = ca.certify(&key, |_| {});
    let check = |der: &[u8], now: i64| verify_ek(&ca.trusted(), &ek, der, now);
    check(&good, NOW).unwrap();
    assert!(matches!(check(&forger.certify(&key, |_| {}), NOW), Err(IdentityError::Chain { .. })));
    for now in [NOW - 2000, NOW + 2000] {
        assert!(matches!(check(&good, now), Err(IdentityError::Chain { .. })), "at {now}");
    }
    for at in 0..good.len() {
        let mut changed = good.clone();
        changed[at] ^= 1;
        assert!(check(&changed, NOW).is_err(), "octet {at} changed and accepted");
    }
    for length in 0..good.len() {
        assert!(check(&good[..length], NOW).is_err(), "{length} octets accepted");
    }
    assert!(matches!(check(&vec![0x30; 9000], NOW), Err(IdentityError::Certificate("is longer than any"))));
}

#[test]
fn issuers_of_one_name_are_told_apart_by_their_keys() {
    let (first, second) = (Ca::new("EK CA"), Ca::new("EK CA"));
    let (ek, key) = ek();
    let pem = |ca: &Ca| ca.certificate.to_pem().unwrap();
    let both = EkCas::from_pems(&[pem(&first), pem(&second)]).unwrap();
    assert_eq!(both.len(), 2);
    for ca in [&first, &second] {
        verify_ek(&both, &ek, &ca.certify(&key, |_| {}), NOW).unwrap();
    }
}

#[test]
fn an_ak_is_no_ek() {
    let tpm = SoftTpm::start();
    let _ = tpm.create_ek(KeyKind::Rsa);
    let ak = tpm.create_ak(KeyKind::Rsa);
    let error = verify_ek(&Ca::new("EK CA").trusted(), &ak, &[], NOW).unwrap_err();
    assert!(matches!(error, IdentityError::NotAnEk("is not a decryption key")), "{error:?}");
}

#[test]
fn a_file_that_is_no_certificate_is_an_error() {
    assert!(matches!(EkCas::from_pems(&[b"nothing".to_vec()]), Err(IdentityError::EmptyCaFile)));
    let broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec();
    assert!(matches!(EkCas::from_pems(&[broken]), Err(IdentityError::CaFile(_))));
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
    for file in files {
        let path = file.unwrap().path();
        let cas = EkCas::from_pems(&[std::fs::read(&path).unwrap()]);
        assert!(cas.is_ok_and(|cas| !cas.is_empty()), "{}", path.display());
    }
}

proptest! {
    #[test]
    fn arbitrary_certificates_never_panic(head in 0usize..3, tail in proptest::collection::vec(any::<u8>(), 0..400)) {
        static FIXTURE: LazyLock<(Vec<u8>, EkCas)> = LazyLock::new(|| (ek().0, Ca::new("CA").trusted()));
        let length = u16::try_from(tail.len()).unwrap().to_be_bytes();
        let heads = [&[][..], &[0x30, 0x82, length[0], length[1]], &[0x30, 0x81, length[1]]];
        let certificate = [heads[head], &tail[..]].concat();
        prop_assert!(verify_ek(&FIXTURE.1, &FIXTURE.0, &certificate, NOW).is_err());
    }
}
