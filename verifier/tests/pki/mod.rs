//! Certificates and revocation lists made from a short description: `tests/pki.toml`.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]
#![allow(dead_code, reason = "each test uses its part")]

use openssl::asn1::{Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private, Public};
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage};
use openssl::x509::{X509, X509Builder, X509Crl, X509CrlBuilder, X509Extension, X509Name, X509RevokedBuilder};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The time of every check.
pub(crate) const NOW: i64 = 1_800_000_000;

/// `pki.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Spec {
    ca: Vec<Certificate>,
    crl: Vec<List>,
    pub(crate) ek: Vec<Case>,
}

/// One certificate.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Certificate {
    pub(crate) id: String,
    pub(crate) cn: Option<String>,
    pub(crate) issuer: Option<String>,
    pub(crate) ca: Option<bool>,
    pub(crate) key_usage: Vec<String>,
    pub(crate) eku: Vec<String>,
    pub(crate) policy: Option<String>,
    pub(crate) critical: Option<String>,
    pub(crate) hash: Option<String>,
    pub(crate) not_before: Option<i64>,
    pub(crate) not_after: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    id: String,
    issuer: String,
    #[serde(default)]
    revokes: Vec<String>,
    last_update: Option<i64>,
    next_update: Option<i64>,
}

/// An EK certificate and what becomes of it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Case {
    #[serde(flatten)]
    pub(crate) certificate: Certificate,
    pub(crate) key: Option<String>,
    pub(crate) configured: Vec<String>,
    pub(crate) sent: Vec<String>,
    pub(crate) crls: Vec<String>,
    pub(crate) padding: usize,
    pub(crate) cut_to: Option<usize>,
    pub(crate) first_octet: Option<u8>,
    pub(crate) flip_last: bool,
    pub(crate) expect: String,
}

/// A CA as made.
pub(crate) struct Authority {
    pub(crate) key: PKey<Private>,
    pub(crate) certificate: X509,
}

/// Everything that the description names.
pub(crate) struct Pki {
    authorities: BTreeMap<String, Authority>,
    lists: BTreeMap<String, X509Crl>,
    serials: BTreeMap<String, u32>,
}

impl Spec {
    pub(crate) fn read() -> Self {
        toml::from_str(include_str!("../pki.toml")).unwrap()
    }
}

impl Pki {
    pub(crate) fn make(spec: &Spec) -> Self {
        let ids = spec.ca.iter().map(|ca| &ca.id).chain(spec.ek.iter().map(|ek| &ek.certificate.id));
        let serials = ids.cloned().zip(100..).collect();
        let mut pki = Self { authorities: BTreeMap::new(), lists: BTreeMap::new(), serials };
        for ca in &spec.ca {
            let authority = pki.authority(ca);
            assert!(pki.authorities.insert(ca.id.clone(), authority).is_none(), "{} twice", ca.id);
        }
        for list in &spec.crl {
            let made = pki.list(list);
            assert!(pki.lists.insert(list.id.clone(), made).is_none(), "{} twice", list.id);
        }
        pki
    }

    pub(crate) fn pem(&self, ca: &str) -> Vec<u8> {
        self.authorities[ca].certificate.to_pem().unwrap()
    }

    pub(crate) fn der(&self, ca: &str) -> Vec<u8> {
        self.authorities[ca].certificate.to_der().unwrap()
    }

    pub(crate) fn crl_der(&self, crl: &str) -> Vec<u8> {
        self.lists[crl].to_der().unwrap()
    }

    pub(crate) fn crl_pem(&self, crl: &str) -> Vec<u8> {
        self.lists[crl].to_pem().unwrap()
    }

    fn authority(&self, ca: &Certificate) -> Authority {
        let key = ec_key();
        let public = PKey::public_key_from_der(&key.public_key_to_der().unwrap()).unwrap();
        let mut described = Certificate { ca: Some(ca.ca.unwrap_or(true)), ..ca.clone() };
        if described.key_usage.is_empty() {
            described.key_usage = vec!["keyCertSign".to_owned()];
        }
        Authority { certificate: self.certificate(&described, &public, &key), key }
    }

    /// Makes a certificate of `key`; `own` signs if nobody is named.
    pub(crate) fn certificate(&self, described: &Certificate, key: &PKey<Public>, own: &PKey<Private>) -> X509 {
        let cn = described.cn.as_ref().unwrap_or(&described.id);
        let issuer = described.issuer.as_ref().map(|issuer| &self.authorities[issuer]);
        let mut builder = X509Builder::new().unwrap();
        builder.set_version(2).unwrap();
        builder.set_serial_number(&serial(self.serials.get(&described.id).copied().unwrap_or(7))).unwrap();
        builder.set_subject_name(&named(cn)).unwrap();
        match issuer {
            Some(issuer) => builder.set_issuer_name(issuer.certificate.subject_name()).unwrap(),
            None => builder.set_issuer_name(&named(cn)).unwrap(),
        }
        builder.set_pubkey(key).unwrap();
        builder.set_not_before(&at(described.not_before.unwrap_or(-1000))).unwrap();
        builder.set_not_after(&at(described.not_after.unwrap_or(1000))).unwrap();
        extensions(&mut builder, described);
        let hash = match described.hash.as_deref() {
            Some("sha1") => MessageDigest::sha1(),
            Some(other) => panic!("{other}"),
            None => MessageDigest::sha256(),
        };
        builder.sign(issuer.map_or(own, |issuer| &issuer.key), hash).unwrap();
        builder.build()
    }

    fn list(&self, list: &List) -> X509Crl {
        let issuer = &self.authorities[&list.issuer];
        let mut builder = X509CrlBuilder::new().unwrap();
        builder.set_issuer_name(issuer.certificate.subject_name()).unwrap();
        builder.set_last_update(&at(list.last_update.unwrap_or(-500))).unwrap();
        builder.set_next_update(&at(list.next_update.unwrap_or(500))).unwrap();
        for id in &list.revokes {
            let mut revoked = X509RevokedBuilder::new().unwrap();
            revoked.set_serial_number(&serial(self.serials[id])).unwrap();
            revoked.set_revocation_date(&at(-600)).unwrap();
            builder.add_revoked(revoked.build()).unwrap();
        }
        builder.sort().unwrap();
        // cRLNumber 1, and a key identifier, which nothing here compares.
        builder.append_extension(extension("2.5.29.20", false, &[0x02, 0x01, 0x01])).unwrap();
        builder.append_extension(extension("2.5.29.35", false, &[0x30, 0x03, 0x80, 0x01, 0x01])).unwrap();
        builder.sign(&issuer.key, MessageDigest::sha256()).unwrap();
        builder.build().unwrap()
    }
}

fn extensions(builder: &mut X509Builder, described: &Certificate) {
    if let Some(ca) = described.ca {
        let mut constraints = BasicConstraints::new();
        if ca {
            constraints.ca();
        }
        builder.append_extension(constraints.critical().build().unwrap()).unwrap();
    }
    if !described.key_usage.is_empty() {
        let mut usage = KeyUsage::new();
        for word in &described.key_usage {
            match word.as_str() {
                "keyCertSign" => usage.key_cert_sign(),
                "digitalSignature" => usage.digital_signature(),
                "keyEncipherment" => usage.key_encipherment(),
                other => panic!("{other}"),
            };
        }
        builder.append_extension(usage.critical().build().unwrap()).unwrap();
    }
    if !described.eku.is_empty() {
        let mut usage = ExtendedKeyUsage::new();
        for oid in &described.eku {
            usage.other(oid);
        }
        builder.append_extension(usage.build().unwrap()).unwrap();
    }
    if let Some(oid) = &described.policy {
        builder.append_extension(policies(oid)).unwrap();
    }
    if let Some(oid) = &described.critical {
        // An empty SEQUENCE: whatever it should be, it is well-formed.
        builder.append_extension(extension(oid, true, &[0x30, 0x00])).unwrap();
    }
}

/// `certificatePolicies` with one policy.
fn policies(oid: &str) -> X509Extension {
    let oid = Asn1Object::from_str(oid).unwrap();
    let oid = oid.as_slice();
    let tlv = |tag: u8, content: &[u8]| [&[tag, u8::try_from(content.len()).unwrap()], content].concat();
    extension("2.5.29.32", false, &tlv(0x30, &tlv(0x30, &tlv(0x06, oid))))
}

fn extension(oid: &str, critical: bool, content: &[u8]) -> X509Extension {
    let value = Asn1OctetString::new_from_bytes(content).unwrap();
    X509Extension::new_from_der(&Asn1Object::from_str(oid).unwrap(), critical, &value).unwrap()
}

pub(crate) fn ec_key() -> PKey<Private> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

fn named(cn: &str) -> X509Name {
    let mut builder = X509Name::builder().unwrap();
    builder.append_entry_by_text("CN", cn).unwrap();
    builder.build()
}

fn serial(number: u32) -> openssl::asn1::Asn1Integer {
    BigNum::from_u32(number).unwrap().to_asn1_integer().unwrap()
}

fn at(offset: i64) -> Asn1Time {
    Asn1Time::from_unix(NOW + offset).unwrap()
}
