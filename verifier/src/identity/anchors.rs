//! Paths from certificates to the CAs that an operator configured, and the revocation lists that are given with them.

use super::IdentityError;
use super::certificate::{Purpose, check_leaf, cut, cut_chain, is_intermediate, is_of, is_signed_well};
use crate::event_log::data::shown;
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::public::KeyPublic;
use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use openssl::stack::Stack;
use openssl::x509::store::{X509Store, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{CrlStatus, X509, X509Crl, X509StoreContext};
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};

/// CAs whose certificates are believed, with the lists of what they took back.
#[derive(Default)]
pub struct TrustAnchors {
    certificates: Vec<X509>,
    crls: Vec<X509Crl>,
}

/// Why a configured file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    /// Not certificates.
    #[error("reading a file of CA certificates")]
    CaFile(#[source] ErrorStack),
    /// Nothing in it.
    #[error("reading a file of CA certificates: it has none")]
    EmptyCaFile,
    /// Not a list.
    #[error("reading a certificate revocation list")]
    CrlFile(#[source] ErrorStack),
    /// A list that says less than it seems to.
    #[error("reading a certificate revocation list: it {0}")]
    UnfitCrl(&'static str),
}

impl TrustAnchors {
    /// Reads PEM files; each may hold several certificates. Without any, nothing is believed.
    ///
    /// # Errors
    /// A file that is not PEM certificates, or has none.
    pub fn from_pems(pems: &[Vec<u8>]) -> Result<Self, AnchorError> {
        let mut certificates = Vec::new();
        for pem in pems {
            let found = X509::stack_from_pem(pem).map_err(AnchorError::CaFile)?;
            if found.is_empty() {
                return Err(AnchorError::EmptyCaFile);
            }
            certificates.extend(found);
        }
        Ok(Self { certificates, crls: Vec::new() })
    }

    /// The same, with revocation lists: each file one in DER, or several in PEM. What a CA without a list issued is not
    /// checked for revocation; what a CA with a list issued is believed only while that list is current.
    ///
    /// # Errors
    /// A file that is no list, or one of a kind that says less than it seems to.
    pub fn with_crls(mut self, files: &[Vec<u8>]) -> Result<Self, AnchorError> {
        for file in files {
            if file.first() == Some(&0x30) {
                self.crls.push(crl(X509Crl::from_der(file).map_err(AnchorError::CrlFile)?)?);
                continue;
            }
            let text = String::from_utf8_lossy(file);
            let mut found = 0_usize;
            for (at, _) in text.match_indices(PEM_CRL) {
                self.crls.push(crl(X509Crl::from_pem(&text.as_bytes()[at..]).map_err(AnchorError::CrlFile)?)?);
                found += 1;
            }
            if found == 0 {
                return Err(AnchorError::UnfitCrl("is neither DER nor PEM"));
            }
        }
        Ok(self)
    }

    /// How many CAs there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.certificates.len()
    }

    /// Whether there is none, so that nothing is believed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }

    /// Checks that `certificate` is one for `purpose`, of `key`, good now, with a path to one of these CAs; `chain` may
    /// help on the way. Gives the certificate's SHA-256, hexadecimal.
    pub(super) fn verify(
        &self,
        purpose: Purpose,
        certificate: &[u8],
        chain: &[u8],
        key: &KeyPublic,
        now_seconds: i64,
    ) -> Result<String, IdentityError> {
        if certificate.is_empty() {
            return Err(IdentityError::NoCertificate(purpose));
        }
        if self.is_empty() {
            return Err(IdentityError::NoCa(purpose));
        }
        let (der, _padding) = cut(certificate).map_err(|problem| purpose.refuses(problem))?;
        let (_, parsed) = X509Certificate::from_der(der).map_err(|_| purpose.refuses("is not DER"))?;
        check_leaf(&parsed, purpose)?;
        if !is_of(&parsed, key) {
            return Err(IdentityError::OtherKey(purpose));
        }
        let leaf = X509::from_der(der).map_err(|_| purpose.refuses("is not DER that OpenSSL reads"))?;
        let issuer = shown(&parsed.issuer().to_string());
        let path = self.path(purpose, &leaf, chain, issuer, now_seconds)?;
        self.check_path(purpose, &path, now_seconds)?;
        Ok(hex::encode(HashAlgorithm::Sha256.digest(der)))
    }

    /// The path from `leaf` to one of these CAs, as OpenSSL finds it good now.
    fn path(
        &self,
        purpose: Purpose,
        leaf: &X509,
        chain: &[u8],
        issuer: String,
        now_seconds: i64,
    ) -> Result<Vec<X509>, IdentityError> {
        let sent: Vec<X509> = cut_chain(chain).into_iter().filter_map(intermediate).collect();
        let candidates = Candidates::above(leaf, &self.certificates, &sent);
        if candidates.trusted.is_empty() {
            return Err(IdentityError::UnknownIssuer { purpose, issuer });
        }
        let store = store(&candidates.trusted, now_seconds)?;
        let mut untrusted = Stack::new()?;
        for certificate in candidates.untrusted {
            untrusted.push(certificate)?;
        }
        let mut context = X509StoreContext::new()?;
        let mut path = Vec::new();
        let (good, problem) = context.init(&store, leaf, &untrusted, |context| {
            let good = context.verify_cert()?;
            path = context.chain().map(|chain| chain.iter().map(ToOwned::to_owned).collect()).unwrap_or_default();
            Ok((good, context.error()))
        })?;
        if good {
            Ok(path)
        } else {
            Err(IdentityError::Chain { purpose, issuer, problem: problem.error_string().into() })
        }
    }

    /// What OpenSSL does not look at: how each certificate is signed, and whether it was taken back.
    fn check_path(&self, purpose: Purpose, path: &[X509], now_seconds: i64) -> Result<(), IdentityError> {
        let now = Asn1Time::from_unix(now_seconds)?;
        for (certificate, issuer) in path.iter().zip(path.iter().skip(1)) {
            let der = certificate.to_der()?;
            let (_, parsed) =
                X509Certificate::from_der(&der).map_err(|_| purpose.refuses("has a CA that is not DER"))?;
            let issuer_name = shown(&parsed.issuer().to_string());
            if !is_signed_well(&parsed.signature_algorithm) {
                let problem = "signed with another hash than SHA-256, SHA-384 or SHA-512".to_owned();
                return Err(IdentityError::Chain { purpose, issuer: issuer_name, problem });
            }
            match self.revocation(certificate, issuer, &now)? {
                Revocation::NoList | Revocation::Good => {}
                Revocation::Stale => return Err(IdentityError::StaleCrl { issuer: issuer_name }),
                Revocation::Revoked => {
                    let subject = shown(&parsed.subject().to_string());
                    return Err(IdentityError::Revoked { purpose, issuer: issuer_name, subject });
                }
            }
        }
        Ok(())
    }

    /// What the lists of `issuer` say of `certificate`. What an old list says was taken back stays so.
    fn revocation(&self, certificate: &X509, issuer: &X509, now: &Asn1Time) -> Result<Revocation, ErrorStack> {
        let name = issuer.subject_name().to_der()?;
        let key = issuer.public_key()?;
        let mut found = Revocation::NoList;
        for crl in &self.crls {
            if crl.issuer_name().to_der()? != name || !crl.verify(&key).unwrap_or(false) {
                continue;
            }
            match crl.get_by_cert(certificate) {
                CrlStatus::Revoked(_) => return Ok(Revocation::Revoked),
                CrlStatus::NotRevoked | CrlStatus::RemoveFromCrl(_) => {}
            }
            let current = crl.last_update() <= now && crl.next_update().is_some_and(|next| next > now);
            found = match found {
                Revocation::Good => Revocation::Good,
                _ if current => Revocation::Good,
                _ => Revocation::Stale,
            };
        }
        Ok(found)
    }
}

impl std::fmt::Debug for TrustAnchors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrustAnchors")
            .field("certificates", &self.certificates.len())
            .field("crls", &self.crls.len())
            .finish()
    }
}

/// What is known of a certificate's revocation.
enum Revocation {
    /// Its issuer has no list here.
    NoList,
    /// Not on a current list.
    Good,
    /// Only on no list that is current.
    Stale,
    /// On a list.
    Revoked,
}

/// The certificates that a path can go through: of each issuer's name those whose key signed. OpenSSL alone takes the
/// first of a name, and makers do have several CAs of one name.
struct Candidates {
    trusted: Vec<X509>,
    untrusted: Vec<X509>,
}

impl Candidates {
    fn above(leaf: &X509, configured: &[X509], sent: &[X509]) -> Self {
        let mut found = Self { trusted: Vec::new(), untrusted: Vec::new() };
        let mut level = vec![leaf.clone()];
        for _ in 0..MAX_PATH {
            let mut next = Vec::new();
            for child in &level {
                let known = |ca: &&X509| !found.trusted.contains(*ca) && !found.untrusted.contains(*ca);
                let trusted: Vec<_> = configured.iter().filter(known).filter(|ca| issued(ca, child)).cloned().collect();
                let untrusted: Vec<_> = sent.iter().filter(known).filter(|ca| issued(ca, child)).cloned().collect();
                next.extend(trusted.iter().chain(&untrusted).cloned());
                found.trusted.extend(trusted);
                found.untrusted.extend(untrusted);
            }
            level = next;
        }
        found
    }
}

fn issued(ca: &X509, child: &X509) -> bool {
    let named = match (ca.subject_name().to_der(), child.issuer_name().to_der()) {
        (Ok(subject), Ok(issuer)) => subject == issuer,
        _ => false,
    };
    named && ca.public_key().is_ok_and(|key| child.verify(&key).unwrap_or(false))
}

/// A certificate that an agent sent for the way, if it may be on it at all.
fn intermediate(der: &[u8]) -> Option<X509> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    is_intermediate(&parsed).then(|| X509::from_der(der).ok()).flatten()
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

/// Refuses lists that cover less than all of what their issuer took back for good.
fn crl(crl: X509Crl) -> Result<X509Crl, AnchorError> {
    let der = crl.to_der().map_err(AnchorError::CrlFile)?;
    let (_, parsed) =
        CertificateRevocationList::from_der(&der).map_err(|_| AnchorError::UnfitCrl("is not strict DER"))?;
    if parsed.next_update().is_none() {
        return Err(AnchorError::UnfitCrl("does not say until when it is current"));
    }
    if !is_signed_well(&parsed.signature_algorithm) {
        return Err(AnchorError::UnfitCrl("is signed with another hash than SHA-256, SHA-384 or SHA-512"));
    }
    for extension in parsed.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::IssuingDistributionPoint(point)
                if point.indirect_crl || point.only_some_reasons.is_some() || point.only_contains_attribute_certs =>
            {
                return Err(AnchorError::UnfitCrl("is indirect or covers only some reasons"));
            }
            ParsedExtension::IssuingDistributionPoint(_) => {}
            _ if extension.critical => {
                return Err(AnchorError::UnfitCrl("has a critical extension: perhaps it is a delta"));
            }
            _ => {}
        }
    }
    Ok(crl)
}

const PEM_CRL: &str = "-----BEGIN X509 CRL-----";
/// Root, two intermediates and the EK's, and one to spare.
const MAX_PATH: i32 = 5;
