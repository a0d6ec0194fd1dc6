//! The verifier's TLS key, pinned. The agent has no CA to trust and no name to check: its settings name the one key
//! that it talks to, and the settings are measured.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// SHA-256 of a `SubjectPublicKeyInfo` in DER.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyPin([u8; 32]);

impl KeyPin {
    /// The pin of a key.
    #[must_use]
    pub fn of(subject_public_key_info: &[u8]) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, subject_public_key_info);
        let mut pin = [0; 32];
        pin.copy_from_slice(digest.as_ref());
        Self(pin)
    }

    /// A TLS 1.3 client that accepts a server with this key, and no other.
    ///
    /// # Errors
    /// If the cryptography provider lacks TLS 1.3.
    pub fn client_config(self) -> Result<ClientConfig, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = PinVerifier { pin: self, algorithms: provider.signature_verification_algorithms };
        Ok(client_builder(provider)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth())
    }
}

impl FromStr for KeyPin {
    type Err = InvalidPin;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut pin = [0; 32];
        hex::decode_to_slice(text, &mut pin).map_err(|_| InvalidPin)?;
        Ok(Self(pin))
    }
}

impl fmt::Debug for KeyPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyPin({self})")
    }
}

impl fmt::Display for KeyPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// A pin that is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a key pin is SHA-256 in 64 hexadecimal digits")]
pub struct InvalidPin;

/// Accepts the pinned key. Dates and names in the certificate mean nothing here; possession of the key does, and
/// rustls has it proven by the signature that the two `verify_tls..` functions check.
#[derive(Debug)]
struct PinVerifier {
    pin: KeyPin,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        if KeyPin::of(&certificate.subject_public_key_info()) == self.pin {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn client_builder(
    provider: Arc<CryptoProvider>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, Error> {
    ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_64_hexadecimal_digits() {
        let pin = KeyPin::of(b"a key");
        assert_eq!(pin.to_string().parse(), Ok(pin));
        for bad in ["", "00", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64)] {
            assert_eq!(bad.parse::<KeyPin>(), Err(InvalidPin), "{bad:?} was accepted");
        }
    }

    #[test]
    fn d10_a_node_without_a_clock_takes_the_pinned_key_whatever_the_certificates_dates() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["verifier".to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2050, 1, 1);
        params.not_after = rcgen::date_time_ymd(2050, 2, 1);
        let certificate = params.self_signed(&key).unwrap();
        let pin = KeyPin::of(&ParsedCertificate::try_from(certificate.der()).unwrap().subject_public_key_info());
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        let name = ServerName::try_from("verifier").unwrap();
        for (pin, accepted) in [(pin, true), (KeyPin::of(b"another key"), false)] {
            let verifier = PinVerifier { pin, algorithms };
            // 1970, where a node without a clock begins; within the dates; a century on.
            for seconds in [0, 2_525_000_000, 5_000_000_000] {
                let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
                let verdict = verifier.verify_server_cert(certificate.der(), &[], &name, &[], now);
                assert_eq!(verdict.is_ok(), accepted, "at {seconds}");
            }
        }
    }
}
