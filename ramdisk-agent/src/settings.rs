//! The agent's settings, measured before they are read. They come from the airlock network, where anybody may lie;
//! once they are in a PCR, a lie is a verdict.

use crate::pin::{InvalidPin, KeyPin};
use crate::tpm::{Tpm, TpmError};
use assay_wire::agent::AgentSettings;
use assay_wire::evidence::{AgentMeasurement, MeasurementKind};
use std::net::{IpAddr, SocketAddr};
use url::{Host, Url};

/// The most that a settings document may have.
pub const MAX_SETTINGS_BYTES: usize = 64 * 1024;

/// Settings that are in [`AgentSettings::PCR`]. The one way to get them is [`MeasuredSettings::measure`].
#[derive(Debug, Clone)]
pub struct MeasuredSettings {
    settings: AgentSettings,
    verifier: SocketAddr,
    pin: KeyPin,
    measurement: AgentMeasurement,
}

impl MeasuredSettings {
    /// Extends the PCR with SHA-256 of `document`, and only then reads it.
    ///
    /// # Errors
    /// If the TPM refuses, or the document is not one that we can use.
    pub fn measure(document: &[u8], tpm: &mut dyn Tpm) -> Result<Self, SettingsError> {
        tpm.pcr_extend(AgentSettings::PCR, sha256(document))?;
        let (settings, verifier, pin) = parse(document)?;
        let measurement =
            AgentMeasurement { pcr: AgentSettings::PCR, kind: MeasurementKind::AgentSettings, data: document.to_vec() };
        Ok(Self { settings, verifier, pin, measurement })
    }

    /// What the document says.
    #[must_use]
    pub fn settings(&self) -> &AgentSettings {
        &self.settings
    }

    /// Where the verifier listens.
    #[must_use]
    pub fn verifier(&self) -> SocketAddr {
        self.verifier
    }

    /// The verifier's key.
    #[must_use]
    pub fn pin(&self) -> KeyPin {
        self.pin
    }

    /// What was extended, for the Evidence.
    #[must_use]
    pub fn measurement(&self) -> &AgentMeasurement {
        &self.measurement
    }
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// They could not be measured, so they are not read.
    #[error("measuring the agent's settings")]
    Tpm(#[from] TpmError),
    /// Too long.
    #[error("reading the agent's settings: {bytes} octets are more than {MAX_SETTINGS_BYTES}")]
    TooLarge {
        /// How long.
        bytes: usize,
    },
    /// Not the JSON that we expect.
    #[error("reading the agent's settings")]
    Json(#[from] serde_json::Error),
    /// The verifier's URL is not `https://<IPv4 address>:<port>`.
    #[error("reading the agent's settings: verifier `{url}` is not https:// with an IP address (there is no DNS here)")]
    Verifier {
        /// The URL.
        url: String,
    },
    /// The key pin is malformed.
    #[error("reading the agent's settings: verifier_key_sha256")]
    Pin(#[from] InvalidPin),
}

/// SHA-256 of `bytes`.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    digest
}

fn parse(document: &[u8]) -> Result<(AgentSettings, SocketAddr, KeyPin), SettingsError> {
    if document.len() > MAX_SETTINGS_BYTES {
        return Err(SettingsError::TooLarge { bytes: document.len() });
    }
    let settings: AgentSettings = serde_json::from_slice(document)?;
    let verifier = verifier_address(&settings.verifier)
        .ok_or_else(|| SettingsError::Verifier { url: settings.verifier.chars().take(200).collect() })?;
    let pin = settings.verifier_key_sha256.parse()?;
    Ok((settings, verifier, pin))
}

/// The address in a verifier's URL; none if it is not plain `https://` with an IP address.
pub(crate) fn verifier_address(url: &str) -> Option<SocketAddr> {
    let url = Url::parse(url).ok()?;
    let ip = match url.host()? {
        Host::Ipv4(ip) => IpAddr::V4(ip),
        Host::Ipv6(ip) => IpAddr::V6(ip),
        Host::Domain(_) => return None,
    };
    let plain = url.scheme() == "https" && url.path() == "/" && url.query().is_none() && url.username().is_empty();
    plain.then_some(SocketAddr::new(ip, url.port_or_known_default()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn document(verifier: &str, pin: &str) -> Vec<u8> {
        format!(r#"{{"node":"n1","verifier":"{verifier}","verifier_key_sha256":"{pin}"}}"#).into_bytes()
    }

    #[test]
    fn good_settings() {
        let (settings, verifier, pin) = parse(&document("https://10.99.0.1:8443", &"ab".repeat(32))).unwrap();
        assert_eq!(settings.node.as_str(), "n1");
        assert_eq!(verifier, "10.99.0.1:8443".parse().unwrap());
        assert_eq!(pin.to_string(), "ab".repeat(32));
    }

    #[test]
    fn bad_settings_are_named() {
        let pin = "ab".repeat(32);
        for url in
            ["http://10.0.0.1:1", "https://verifier:8443", "https://10.0.0.1:1/x", "https://u@10.0.0.1", "10.0.0.1", ""]
        {
            let error = parse(&document(url, &pin)).unwrap_err();
            assert!(matches!(error, SettingsError::Verifier { .. }), "{url}: {error}");
        }
        assert!(matches!(parse(&document("https://10.0.0.1:1", "abc")), Err(SettingsError::Pin(_))));
        assert!(matches!(parse(br#"{"node":"n1"}"#), Err(SettingsError::Json(_))));
        let unknown = br#"{"node":"n1","verifier":"https://10.0.0.1:1","verifier_key_sha256":"","x":1}"#;
        assert!(matches!(parse(unknown), Err(SettingsError::Json(_))));
        assert!(matches!(parse(&vec![b' '; MAX_SETTINGS_BYTES + 1]), Err(SettingsError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn never_panics_on_odd_urls(url in "[a-z0-9:/@.?#\\[\\]]{0,40}", pin in "[0-9a-fx]{0,70}") {
            let _ = parse(&document(&url, &pin));
        }
    }
}
