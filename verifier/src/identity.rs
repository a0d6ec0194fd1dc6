//! Identity: is this EK a real TPM's? On the boot path: step 4, before any credential is made.
//!
//! What vouches for an EK: its certificate, whose path ends at a CA that the operator configured. No CA, no node. The
//! certificate counts only for the very key in it, which is compared with the public area that credentials are made
//! for.

use crate::event_log::data::shown;
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::name::Name;
use assay_tpm::public::{Attributes, Curve, KeyPublic, Public};
use assay_tpm::reader::DecodeError;
use openssl::error::ErrorStack;
use openssl::stack::Stack;
use openssl::x509::store::{X509Store, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509StoreContext};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::public_key::PublicKey;

/// The CAs whose EK certificates are believed.
pub struct EkCas {
    certificates: Vec<X509>,
}

impl EkCas {
    /// Reads PEM files; each may hold several certificates. Without any, no EK is believed.
    ///
    /// # Errors
    /// A file that is not PEM certificates, or has none.
    pub fn from_pems(pems: &[Vec<u8>]) -> Result<Self, IdentityError> {
        let mut certificates = Vec::new();
        for pem in pems {
            let found = X509::stack_from_pem(pem).map_err(IdentityError::CaFile)?;
            if found.is_empty() {
                return Err(IdentityError::EmptyCaFile);
            }
            certificates.extend(found);
        }
        Ok(Self { certificates })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.certificates.len()
    }

    /// Whether there is none, so that no EK is believed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }

    /// The configured certificates that a path from `leaf` can go through: of each issuer's name those whose key
    /// signed. OpenSSL alone takes the first of a name, and makers do have several CAs of one name.
    fn issuers_of(&self, leaf: &X509) -> Vec<X509> {
        let mut path: Vec<X509> = Vec::new();
        let mut current = leaf.clone();
        for _ in 0..MAX_PATH {
            let name = current.issuer_name().to_der().unwrap_or_default();
            let issued = |ca: &&X509| {
                let named = ca.subject_name().to_der().is_ok_and(|subject| subject == name);
                named && ca.public_key().is_ok_and(|key| current.verify(&key).unwrap_or(false))
            };
            let issuers: Vec<_> = self.certificates.iter().filter(issued).cloned().collect();
            let Some(next) = issuers.first().cloned() else { break };
            path.extend(issuers);
            if next.to_der().ok() == current.to_der().ok() {
                break; // a root issued itself
            }
            current = next;
        }
        path
    }
}

impl std::fmt::Debug for EkCas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EkCas").field("certificates", &self.certificates.len()).finish()
    }
}

/// An EK that a configured CA says is in a TPM. Made by [`verify_ek`] only.
#[derive(Debug, Clone)]
pub struct VerifiedEk {
    public: Vec<u8>,
    name: Name,
    certificate_sha256: String,
}

impl VerifiedEk {
    /// Its `TPMT_PUBLIC`: what credentials are made for.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// SHA-256 of its `TPMT_PUBLIC`, hexadecimal: the node's identity on record.
    #[must_use]
    pub fn sha256_hex(&self) -> String {
        hex::encode(HashAlgorithm::Sha256.digest(&self.public))
    }

    /// SHA-256 of its certificate, hexadecimal.
    #[must_use]
    pub fn certificate_sha256_hex(&self) -> &str {
        &self.certificate_sha256
    }
}

/// Why an EK is not believed.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The operator's file.
    #[error("reading a file of EK CA certificates")]
    CaFile(#[source] ErrorStack),
    /// The operator's file, with nothing in it.
    #[error("reading a file of EK CA certificates: it has none")]
    EmptyCaFile,
    /// Nobody configured a CA.
    #[error("no EK CA is configured, so no EK certificate can be believed")]
    NoCa,
    /// Not a public area.
    #[error("reading the EK")]
    Public(#[from] DecodeError),
    /// Not an EK.
    #[error("EK {0}")]
    NotAnEk(&'static str),
    /// Not a certificate.
    #[error("EK certificate {0}")]
    Certificate(&'static str),
    /// Signed by nobody that we believe, or not now.
    #[error("EK certificate of `{issuer}` does not chain to a configured CA: {problem}")]
    Chain {
        /// Who says to have issued it.
        issuer: String,
        /// What OpenSSL says.
        problem: String,
    },
    /// The certificate is of another key.
    #[error("EK certificate is of another key than the EK that was sent")]
    OtherKey,
    /// The library failed.
    #[error("checking the EK certificate")]
    Crypto(#[from] ErrorStack),
}

/// Checks that `ek_public` (`TPMT_PUBLIC`) is an EK and that `ek_certificate` (DER, perhaps followed by padding) is its
/// certificate, good now and with a path to one of `cas`.
///
/// # Errors
/// See [`IdentityError`].
pub fn verify_ek(
    cas: &EkCas,
    ek_public: &[u8],
    ek_certificate: &[u8],
    now_seconds: i64,
) -> Result<VerifiedEk, IdentityError> {
    if cas.is_empty() {
        return Err(IdentityError::NoCa);
    }
    let public = Public::parse(ek_public)?;
    check_public(&public)?;
    let der = cut(ek_certificate)?;
    let (_, parsed) = X509Certificate::from_der(der).map_err(|_| IdentityError::Certificate("is not DER"))?;
    check_extensions(&parsed)?;
    if !same_key(&parsed, public.key()) {
        return Err(IdentityError::OtherKey);
    }
    check_path(cas, der, &parsed, now_seconds)?;
    Ok(VerifiedEk {
        public: ek_public.to_vec(),
        name: public.name().clone(),
        certificate_sha256: hex::encode(HashAlgorithm::Sha256.digest(der)),
    })
}

/// An EK decrypts credentials and nothing else, and the TPM that made it keeps it.
fn check_public(public: &Public) -> Result<(), IdentityError> {
    for (attribute, word) in [
        (Attributes::RESTRICTED, "is not restricted"),
        (Attributes::DECRYPT, "is not a decryption key"),
        (Attributes::FIXED_TPM, "is not fixedTPM"),
        (Attributes::FIXED_PARENT, "is not fixedParent"),
        (Attributes::SENSITIVE_DATA_ORIGIN, "is not sensitiveDataOrigin"),
    ] {
        if !public.attributes().contains(attribute) {
            return Err(IdentityError::NotAnEk(word));
        }
    }
    if public.attributes().contains(Attributes::SIGN) {
        return Err(IdentityError::NotAnEk("may also sign"));
    }
    if public.name_algorithm() == HashAlgorithm::Sha1 || public.symmetric().is_none() {
        return Err(IdentityError::NotAnEk("is of no template that credentials can be made for"));
    }
    match public.key() {
        KeyPublic::Rsa { modulus, exponent } if modulus.len() < MIN_RSA_BYTES || *exponent != 65537 => {
            Err(IdentityError::NotAnEk("is RSA of less than 2048 bits or of another exponent than 65537"))
        }
        KeyPublic::Rsa { .. } | KeyPublic::Ecc { .. } => Ok(()),
    }
}

/// Cuts at the certificate's own length: NV areas are larger than what they hold, and some makers pad.
fn cut(ek_certificate: &[u8]) -> Result<&[u8], IdentityError> {
    if ek_certificate.len() > MAX_CERTIFICATE_BYTES {
        return Err(IdentityError::Certificate("is longer than any"));
    }
    let (header, length) = match *ek_certificate {
        [0x30, 0x82, high, low, ..] => (4, usize::from(u16::from_be_bytes([high, low]))),
        [0x30, 0x81, length, ..] => (3, usize::from(length)),
        _ => return Err(IdentityError::Certificate("is not DER")),
    };
    ek_certificate.get(..header + length).ok_or(IdentityError::Certificate("ends too early"))
}

/// TCG EK Credential Profile 2.6, section 3.2, as far as makers keep to it.
fn check_extensions(certificate: &X509Certificate<'_>) -> Result<(), IdentityError> {
    let malformed = |_| IdentityError::Certificate("has malformed extensions");
    if certificate.basic_constraints().map_err(malformed)?.is_some_and(|constraints| constraints.value.ca) {
        return Err(IdentityError::Certificate("is a CA's"));
    }
    if certificate.key_usage().map_err(malformed)?.is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(IdentityError::Certificate("may sign certificates"));
    }
    if let Some(usage) = certificate.extended_key_usage().map_err(malformed)? {
        let ek = usage.value.other.iter().any(|oid| oid.to_id_string() == OID_EK_CERTIFICATE);
        if !ek {
            return Err(IdentityError::Certificate("is for another purpose than 2.23.133.8.1 (tcg-kp-EKCertificate)"));
        }
    }
    let known = |oid: &str| KNOWN_CRITICAL.contains(&oid);
    if certificate.extensions().iter().any(|extension| extension.critical && !known(&extension.oid.to_id_string())) {
        return Err(IdentityError::Certificate("has a critical extension that EK certificates do not have"));
    }
    Ok(())
}

/// Whether the certificate is of this key. The algorithm's OID does not matter: makers also use id-RSAES-OAEP.
fn same_key(certificate: &X509Certificate<'_>, key: &KeyPublic) -> bool {
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

fn check_path(cas: &EkCas, der: &[u8], parsed: &X509Certificate<'_>, now: i64) -> Result<(), IdentityError> {
    let certificate = X509::from_der(der).map_err(|_| IdentityError::Certificate("is not DER that OpenSSL reads"))?;
    let issuers = cas.issuers_of(&certificate);
    let problem = if issuers.is_empty() {
        "none signed it".to_owned()
    } else {
        let store = store(&issuers, now)?;
        let untrusted = Stack::new()?;
        let mut context = X509StoreContext::new()?;
        let (good, problem) =
            context.init(&store, &certificate, &untrusted, |context| Ok((context.verify_cert()?, context.error())))?;
        if good {
            return Ok(());
        }
        problem.error_string().to_owned()
    };
    Err(IdentityError::Chain { issuer: shown(&parsed.issuer().to_string()), problem })
}

/// The store for one check: its time is the caller's, so it cannot be shared.
fn store(trusted: &[X509], now_seconds: i64) -> Result<X509Store, ErrorStack> {
    let mut builder = X509StoreBuilder::new()?;
    for certificate in trusted {
        builder.add_cert(certificate.clone())?;
    }
    let mut parameters = X509VerifyParam::new()?;
    // Critical extensions were looked at before: EK certificates have a critical subjectAltName or
    // subjectDirectoryAttributes, of which OpenSSL knows nothing. An intermediate may be configured without its root.
    parameters.set_flags(X509VerifyFlags::IGNORE_CRITICAL | X509VerifyFlags::PARTIAL_CHAIN)?;
    parameters.set_depth(MAX_PATH);
    parameters.set_time(now_seconds);
    builder.set_param(&parameters)?;
    Ok(builder.build())
}

/// `tcg-kp-EKCertificate`.
const OID_EK_CERTIFICATE: &str = "2.23.133.8.1";
const OID_P256: &str = "1.2.840.10045.3.1.7";
const OID_P384: &str = "1.3.132.0.34";
/// Subject directory attributes, key usage, subject alternative name, basic constraints, certificate policies, extended
/// key usage.
const KNOWN_CRITICAL: [&str; 6] = ["2.5.29.9", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.32", "2.5.29.37"];
const MIN_RSA_BYTES: usize = 2048 / 8;
const MAX_CERTIFICATE_BYTES: usize = 8 * 1024;
/// Root, two intermediates and the EK's, and one to spare.
const MAX_PATH: i32 = 5;
