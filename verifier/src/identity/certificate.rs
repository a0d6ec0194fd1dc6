//! One certificate, as makers write it: cut out of its padding, and checked for its purpose and its key.

use super::IdentityError;
use assay_tpm::public::{Curve, KeyPublic};
use std::fmt;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::X509Certificate;
use x509_parser::public_key::PublicKey;
use x509_parser::signature_algorithm::SignatureAlgorithm;
use x509_parser::x509::AlgorithmIdentifier;

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// An EK's, after TCG's EK Credential Profile.
    Ek,
    /// An IAK's, after TCG's "TPM 2.0 Keys for Device Identity and Attestation".
    Iak,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ek => "EK",
            Self::Iak => "IAK",
        })
    }
}

impl Purpose {
    pub(super) fn refuses(self, problem: &'static str) -> IdentityError {
        IdentityError::Certificate { purpose: self, problem }
    }
}

/// Cuts at the certificate's own length: NV areas are larger than what they hold, and some makers pad. Gives what
/// follows, too.
pub(super) fn cut(der: &[u8]) -> Result<(&[u8], &[u8]), &'static str> {
    let (header, length) = match *der {
        [0x30, 0x82, high, low, ..] => (4, usize::from(u16::from_be_bytes([high, low]))),
        [0x30, 0x81, length, ..] => (3, usize::from(length)),
        _ => return Err("is not DER"),
    };
    if header + length > MAX_CERTIFICATE_BYTES {
        return Err("is longer than any");
    }
    der.split_at_checked(header + length).ok_or("ends too early")
}

/// The certificates in a chain as NV holds it. They are hints on the way to a root: what cannot be read vouches for
/// nothing and is left out.
pub(super) fn cut_chain(mut chain: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while found.len() < MAX_CHAIN_CERTIFICATES {
        let padding = chain.iter().take_while(|octet| matches!(octet, 0x00 | 0xff)).count();
        let Ok((certificate, rest)) = cut(&chain[padding..]) else { break };
        found.push(certificate);
        chain = rest;
    }
    found
}

/// What a leaf must be for its purpose, as far as makers keep to it (TCG EK Credential Profile 2.6, section 3.2; Keys
/// for Device Identity 1.1, section 8).
pub(super) fn check_leaf(certificate: &X509Certificate<'_>, purpose: Purpose) -> Result<(), IdentityError> {
    let malformed = |_| purpose.refuses("has malformed extensions");
    if certificate.basic_constraints().map_err(malformed)?.is_some_and(|constraints| constraints.value.ca) {
        return Err(purpose.refuses("is a CA's"));
    }
    let usage = certificate.key_usage().map_err(malformed)?;
    if usage.as_ref().is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(purpose.refuses("may sign certificates"));
    }
    let extended = certificate.extended_key_usage().map_err(malformed)?;
    let names = |oid: &str| {
        let other = |usage: &x509_parser::extensions::ExtendedKeyUsage<'_>| {
            usage.other.iter().any(|found| found.to_id_string() == oid)
        };
        extended.as_ref().is_some_and(|usage| other(usage.value))
    };
    match purpose {
        Purpose::Ek if extended.is_some() && !names(OID_EK_CERTIFICATE) => {
            return Err(purpose.refuses("is for another purpose than 2.23.133.8.1 (tcg-kp-EKCertificate)"));
        }
        Purpose::Iak if usage.is_some_and(|usage| !usage.value.digital_signature()) => {
            return Err(purpose.refuses("is not for signatures"));
        }
        // An IDevID's key signs anything. That this one is restricted must be the CA's word: the agent's is worth
        // nothing.
        Purpose::Iak if !names(OID_AIK_CERTIFICATE) && !has_policy(certificate, OID_VERIFIED_RESTRICTED) => {
            return Err(purpose.refuses(
                "says neither 2.23.133.8.3 (tcg-kp-AIKCertificate) nor 2.23.133.11.1.3 (tcg-cap-verifiedTPMRestricted)",
            ));
        }
        Purpose::Ek | Purpose::Iak => {}
    }
    check_critical(certificate, &[]).map_err(|problem| purpose.refuses(problem))
}

/// Whether an intermediate that the agent sent may be on a path: a CA's, and nothing in it that we do not know.
/// OpenSSL checks the rest.
pub(super) fn is_intermediate(certificate: &X509Certificate<'_>) -> bool {
    let ca = certificate.basic_constraints().is_ok_and(|found| found.is_some_and(|constraints| constraints.value.ca));
    let signs = certificate.key_usage().is_ok_and(|found| found.is_none_or(|usage| usage.value.key_cert_sign()));
    ca && signs && check_critical(certificate, &CRITICAL_IN_CAS).is_ok()
}

fn check_critical(certificate: &X509Certificate<'_>, more: &[&str]) -> Result<(), &'static str> {
    let known = |oid: &str| KNOWN_CRITICAL.contains(&oid) || more.contains(&oid);
    let unknown = certificate.extensions().iter().any(|found| found.critical && !known(&found.oid.to_id_string()));
    if unknown { Err("has a critical extension that such certificates do not have") } else { Ok(()) }
}

fn has_policy(certificate: &X509Certificate<'_>, oid: &str) -> bool {
    certificate.extensions().iter().any(|extension| match extension.parsed_extension() {
        ParsedExtension::CertificatePolicies(policies) => {
            policies.iter().any(|policy| policy.policy_id.to_id_string() == oid)
        }
        _ => false,
    })
}

/// Whether the certificate is of this key. The algorithm's OID does not matter: makers also use id-RSAES-OAEP.
pub(super) fn is_of(certificate: &X509Certificate<'_>, key: &KeyPublic) -> bool {
    let spki = certificate.public_key();
    match (key, spki.parsed()) {
        (KeyPublic::Ecc { curve, x, y }, Ok(PublicKey::EC(point))) => {
            let parameters = spki.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
            let oid = match curve {
                Curve::P256 => OID_P256,
                Curve::P384 => OID_P384,
            };
            parameters.is_some_and(|found| found.to_id_string() == oid) && point.data() == [&[4][..], x, y].concat()
        }
        (KeyPublic::Rsa { modulus, exponent }, _) => {
            let rsa = x509_parser::public_key::RSAPublicKey::from_der(&spki.subject_public_key.data);
            rsa.is_ok_and(|(rest, rsa)| {
                let found = rsa.modulus.iter().skip_while(|octet| **octet == 0);
                rest.is_empty() && found.eq(modulus.iter()) && rsa.try_exponent() == Ok(u64::from(*exponent))
            })
        }
        (KeyPublic::Ecc { .. }, _) => false,
    }
}

/// Whether a certificate or list is signed with SHA-256 or better: forging one that is signed with SHA-1 is for sale.
pub(super) fn is_signed_well(algorithm: &AlgorithmIdentifier<'_>) -> bool {
    if GOOD_SIGNATURES.contains(&algorithm.algorithm.to_id_string().as_str()) {
        return true;
    }
    match SignatureAlgorithm::try_from(algorithm) {
        Ok(SignatureAlgorithm::RSASSA_PSS(parameters)) => {
            GOOD_HASHES.contains(&parameters.hash_algorithm_oid().to_id_string().as_str())
        }
        _ => false,
    }
}

use x509_parser::prelude::FromDer as _;

/// `tcg-kp-EKCertificate`.
const OID_EK_CERTIFICATE: &str = "2.23.133.8.1";
/// `tcg-kp-AIKCertificate`.
const OID_AIK_CERTIFICATE: &str = "2.23.133.8.3";
/// `tcg-cap-verifiedTPMRestricted`.
const OID_VERIFIED_RESTRICTED: &str = "2.23.133.11.1.3";
const OID_P256: &str = "1.2.840.10045.3.1.7";
const OID_P384: &str = "1.3.132.0.34";
/// Subject directory attributes, key usage, subject alternative name, basic constraints, certificate policies, extended
/// key usage.
const KNOWN_CRITICAL: [&str; 6] = ["2.5.29.9", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.32", "2.5.29.37"];
/// Name constraints, policy constraints, inhibitAnyPolicy: OpenSSL knows them.
const CRITICAL_IN_CAS: [&str; 3] = ["2.5.29.30", "2.5.29.36", "2.5.29.54"];
/// RSA and ECDSA with SHA-256, SHA-384 and SHA-512.
const GOOD_SIGNATURES: [&str; 6] = [
    "1.2.840.113549.1.1.11",
    "1.2.840.113549.1.1.12",
    "1.2.840.113549.1.1.13",
    "1.2.840.10045.4.3.2",
    "1.2.840.10045.4.3.3",
    "1.2.840.10045.4.3.4",
];
/// The same hashes, in RSASSA-PSS.
const GOOD_HASHES: [&str; 3] = ["2.16.840.1.101.3.4.2.1", "2.16.840.1.101.3.4.2.2", "2.16.840.1.101.3.4.2.3"];
const MAX_CERTIFICATE_BYTES: usize = 8 * 1024;
/// More than any maker's chain has.
const MAX_CHAIN_CERTIFICATES: usize = 8;
