//! The site's TLS identity: a certificate authority of its own, made at the first start, and certificates that are
//! issued anew at every start, so that there is no expiry to forget. Keys stay; the verifier's agent-facing key is
//! pinned by what nodes measure.

use crate::secret_file::{self, SecretFileError};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData as _,
};
use ring::digest::{SHA256, digest};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use time::{Duration, OffsetDateTime};

const CA_FILE: &str = "ca.pem";
const CERTIFICATE_DAYS: i64 = 397;

/// Why an identity cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A key file.
    #[error("loading a key of the site")]
    Key(#[from] SecretFileError),
    /// A key or certificate that cannot be used.
    #[error("making the certificate `{name}`")]
    Certificate {
        /// Which.
        name: String,
        /// Why.
        source: rcgen::Error,
    },
    /// rustls will not have it.
    #[error("configuring TLS for `{name}`")]
    Configure {
        /// For whom.
        name: String,
        /// Why.
        source: rustls::Error,
    },
    /// The CA's certificate file.
    #[error("reading or writing {path}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not PEM certificates.
    #[error("`{name}` holds no PEM certificate")]
    NoCertificate {
        /// Which.
        name: String,
    },
}

/// A server's key and certificate, and the CA that its clients trust.
#[derive(Debug, Clone)]
pub struct SiteIdentity {
    folder: PathBuf,
    ca_pem: String,
    server_config: Arc<ServerConfig>,
    key_sha256: String,
}

impl SiteIdentity {
    /// Loads the site's CA from `folder`, or makes it, and issues a certificate for `names` (DNS names or addresses;
    /// `localhost` and 127.0.0.1 are always among them).
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn load_or_create(folder: &Path, names: &[String]) -> Result<Self, TlsError> {
        let _first_start = fs::create_dir_all(folder);
        let ca_key = load_key(folder, "ca")?;
        let ca_path = folder.join(CA_FILE);
        if !ca_path.exists() {
            let ca = ca_params()
                .and_then(|params| params.self_signed(&ca_key))
                .map_err(|source| TlsError::Certificate { name: "ca".to_owned(), source })?;
            fs::write(&ca_path, ca.pem()).map_err(|source| TlsError::CaFile { path: ca_path.clone(), source })?;
        }
        Self::issue(folder, "service", names)
    }

    /// The same site's identity with another key, kept as `<name>.key`: for a listener whose key clients pin.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn with_key(&self, name: &str, names: &[String]) -> Result<Self, TlsError> {
        Self::issue(&self.folder, name, names)
    }

    fn issue(folder: &Path, name: &str, names: &[String]) -> Result<Self, TlsError> {
        let failed = |source| TlsError::Certificate { name: name.to_owned(), source };
        let ca_path = folder.join(CA_FILE);
        let ca_pem = fs::read_to_string(&ca_path).map_err(|source| TlsError::CaFile { path: ca_path, source })?;
        let issuer = Issuer::new(ca_params().map_err(failed)?, load_key(folder, "ca")?);
        let key = load_key(folder, name)?;
        let certificate =
            server_params(name, names).and_then(|params| params.signed_by(&key, &issuer)).map_err(failed)?;
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut server_config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map(|builder| builder.with_no_client_auth())
            .and_then(|builder| builder.with_single_cert(vec![certificate.der().clone()], private))
            .map_err(|source| TlsError::Configure { name: name.to_owned(), source })?;
        // Nobody resumes: services keep their connections, and nodes' next call may reach another verifier. What a full
        // handshake costs more is less than two tickets a connection.
        server_config.send_tls13_tickets = 0;
        let key_sha256 = hex::encode(digest(&SHA256, &key.subject_public_key_info()));
        Ok(Self { folder: folder.to_owned(), ca_pem, server_config: Arc::new(server_config), key_sha256 })
    }

    /// PEM of the site's CA: what clients trust.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// SHA-256 of the server's `SubjectPublicKeyInfo` (DER), hexadecimal: what agents pin.
    #[must_use]
    pub fn key_sha256(&self) -> &str {
        &self.key_sha256
    }

    /// For listeners. TLS 1.3 only: every client is ours.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server_config)
    }
}

/// A TLS client configuration that trusts nobody: for clients that speak no TLS and must have one all the same.
///
/// # Errors
/// The library has no protocol version to offer.
pub fn trusting_nobody() -> Result<ClientConfig, TlsError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|source| TlsError::Configure { name: "client".to_owned(), source })?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth())
}

/// A client's configuration that trusts the CAs in `ca_pem` and nobody else.
///
/// # Errors
/// `ca_pem` holds no usable certificate.
pub fn client_config(ca_pem: &str) -> Result<ClientConfig, TlsError> {
    let no_certificate = || TlsError::NoCertificate { name: "CA file".to_owned() };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        let certificate = certificate.map_err(|_| no_certificate())?;
        roots.add(certificate).map_err(|source| TlsError::Configure { name: "CA file".to_owned(), source })?;
    }
    if roots.is_empty() {
        return Err(no_certificate());
    }
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|source| TlsError::Configure { name: "client".to_owned(), source })?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// The cryptography that all TLS here uses.
#[must_use]
pub fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn load_key(folder: &Path, name: &str) -> Result<KeyPair, TlsError> {
    let failed = |source| TlsError::Certificate { name: name.to_owned(), source };
    let fresh = KeyPair::generate().map_err(failed)?;
    let pem = secret_file::load_or_create(&folder.join(format!("{name}.key")), || fresh.serialize_pem().into_bytes())?;
    KeyPair::from_pem(&String::from_utf8_lossy(&pem)).map_err(failed)
}

/// The CA's parameters. The issuer is rebuilt from them at every start, so its name must not vary.
fn ca_params() -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "Assay site CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_after = OffsetDateTime::now_utc() + Duration::days(20 * 365);
    Ok(params)
}

fn server_params(name: &str, names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut all = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    all.extend(names.iter().filter(|name| name.as_str() != "localhost" && name.as_str() != "127.0.0.1").cloned());
    let mut params = CertificateParams::new(all)?;
    params.distinguished_name.push(DnType::CommonName, format!("Assay {name}"));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = OffsetDateTime::now_utc() + Duration::days(CERTIFICATE_DAYS);
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_and_the_keys_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let first = SiteIdentity::load_or_create(folder.path(), &["10.99.0.1".to_owned()]).unwrap();
        let agent = first.with_key("agent", &[]).unwrap();
        let second = SiteIdentity::load_or_create(folder.path(), &[]).unwrap();
        assert_eq!(first.ca_pem(), second.ca_pem());
        assert_eq!(first.key_sha256(), second.key_sha256());
        assert_eq!(agent.key_sha256(), second.with_key("agent", &[]).unwrap().key_sha256());
        assert_ne!(agent.key_sha256(), first.key_sha256());
    }

    #[test]
    fn a_client_without_a_ca_trusts_nobody() {
        assert!(client_config("").is_err());
        assert!(client_config("not pem").is_err());
    }
}
