//! Redfish (DMTF DSP0266): `ComputerSystem` resources.
//!
//! BMCs accept settings that they do not keep (sushy-tools answers 204 to boot "Once" and then shows "Continuous"), so
//! the boot override is read back. Target must be `Pxe` and mode `UEFI`. Enabled must be `Once`: a BMC that shows
//! `Continuous` is refused unless the site allows it, because every later boot would also come from the network, and a
//! tenant's own reboots would surprise it; nothing less safe happens, so it may be allowed.

use super::{BmcDriver, BmcError, PowerAction, PowerState, SystemReading};
use crate::secret::Password;
use assay_service::tls;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use reqwest::header::{ETAG, IF_MATCH};
use reqwest::{Method, RequestBuilder, Response, redirect};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// More than any `ComputerSystem` that we have seen (about 8 KiB).
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// A system behind a Redfish service.
#[derive(Debug)]
pub struct Redfish {
    http: reqwest::Client,
    system: Url,
    username: String,
    password: Password,
    allow_continuous: bool,
}

/// Where a system is and how to be let in.
#[derive(Debug)]
pub struct RedfishAccess<'a> {
    /// The `ComputerSystem` resource.
    pub system: &'a str,
    /// User name for basic authentication.
    pub username: String,
    /// Its password.
    pub password: Password,
    /// PEM of the CA that signed the BMC's certificate; the system's trust store without it.
    pub ca_pem: Option<&'a str>,
    /// How long one request may take.
    pub timeout: Duration,
    /// Whether a boot override that reads back as `Continuous` will do.
    pub allow_continuous: bool,
}

impl Redfish {
    /// Checks the address and CA; connects to nothing yet.
    ///
    /// # Errors
    /// [`BmcError::Unusable`]: not https, or a CA that is no certificate.
    pub fn new(access: RedfishAccess<'_>) -> Result<Self, BmcError> {
        let unusable = |problem: String| BmcError::Unusable { url: access.system.to_owned(), problem };
        let system: Url = access.system.parse().map_err(|e: url::ParseError| unusable(e.to_string()))?;
        if system.scheme() != "https" {
            return Err(unusable("its address must be https: its password is sent with every request".into()));
        }
        let builder = reqwest::Client::builder()
            .https_only(true)
            .redirect(redirect::Policy::none())
            .no_proxy()
            .connect_timeout(access.timeout)
            .timeout(access.timeout);
        let builder = match access.ca_pem {
            Some(pem) => {
                let config = tls::client_config(pem).map_err(|e| unusable(assay_service::error::chain(&e)))?;
                builder.tls_backend_preconfigured(config)
            }
            None => {
                // reqwest takes its cryptography from the process-wide default; whoever set one before us is left
                // alone.
                let _ = Arc::unwrap_or_clone(tls::provider()).install_default();
                builder
            }
        };
        let http = builder.build().map_err(|e| unusable(assay_service::error::chain(&e)))?;
        let RedfishAccess { username, password, allow_continuous, .. } = access;
        Ok(Self { http, system, username, password, allow_continuous })
    }

    async fn system(&self, doing: &'static str) -> Result<(ComputerSystem, Option<String>), BmcError> {
        let answer = self.send(doing, &self.system, self.request(Method::GET, &self.system)).await?;
        let etag = answer.headers().get(ETAG).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let body = self.body(doing, answer).await?;
        let system = serde_json::from_slice(&body).map_err(|_| self.malformed(doing, "is no ComputerSystem"))?;
        Ok((system, etag))
    }

    async fn reset(&self, action: PowerAction) -> Result<(), BmcError> {
        let (system, _) = self.system("reading the system").await?;
        let doing = match action {
            PowerAction::On => "powering on",
            PowerAction::ForceOff => "powering off",
            PowerAction::ForceRestart => "resetting",
        };
        let target = match system.actions.reset {
            Some(reset) => {
                self.system.join(&reset.target).map_err(|_| self.malformed(doing, "has a bad action target"))?
            }
            None => return Err(self.malformed(doing, "has no ComputerSystem.Reset action")),
        };
        // The password goes to the BMC that the operator named and nowhere else.
        if target.origin() != self.system.origin() {
            return Err(self.malformed(doing, "points its reset action at another host"));
        }
        let request = self.request(Method::POST, &target).json(&json!({"ResetType": action.as_str()}));
        self.send(doing, &target, request).await.map(drop)
    }

    async fn set_boot(&self) -> Result<(), BmcError> {
        let doing = "setting boot once from PXE";
        let (_, etag) = self.system(doing).await?;
        let wanted = json!({"Boot": {"BootSourceOverrideTarget": "Pxe", "BootSourceOverrideEnabled": "Once",
            "BootSourceOverrideMode": "UEFI"}});
        let mut request = self.request(Method::PATCH, &self.system).json(&wanted);
        if let Some(etag) = etag {
            request = request.header(IF_MATCH, etag);
        }
        self.send(doing, &self.system, request).await?;
        let (system, _) = self.system("reading back the boot override").await?;
        if accept_boot(&system.boot, self.allow_continuous) {
            return Ok(());
        }
        Err(BmcError::BootOverride {
            url: self.system.to_string(),
            target: bounded(system.boot.target.as_deref()),
            enabled: bounded(system.boot.enabled.as_deref()),
            mode: bounded(system.boot.mode.as_deref()),
        })
    }

    fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        self.http.request(method, url.clone()).basic_auth(&self.username, Some(self.password.expose()))
    }

    async fn send(&self, doing: &'static str, url: &Url, request: RequestBuilder) -> Result<Response, BmcError> {
        let answer = request.send().await.map_err(|cause| BmcError::Http {
            doing,
            url: url.to_string(),
            cause: cause.without_url(),
        })?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status().as_u16();
        let body = self.body(doing, answer).await.unwrap_or_default();
        let detail = error_message(&body);
        Err(BmcError::Status { doing, url: url.to_string(), status, detail })
    }

    async fn body(&self, doing: &'static str, mut answer: Response) -> Result<Vec<u8>, BmcError> {
        let mut body = Vec::new();
        loop {
            let chunk = answer.chunk().await;
            match chunk.map_err(|cause| BmcError::Http {
                doing,
                url: self.system.to_string(),
                cause: cause.without_url(),
            })? {
                None => return Ok(body),
                Some(chunk) if body.len() + chunk.len() > MAX_ANSWER_BYTES => {
                    return Err(self.malformed(doing, "is longer than 1 MiB"));
                }
                Some(chunk) => body.extend_from_slice(&chunk),
            }
        }
    }

    fn malformed(&self, doing: &'static str, problem: &'static str) -> BmcError {
        BmcError::Malformed { doing, url: self.system.to_string(), problem }
    }
}

impl BmcDriver for Redfish {
    fn read(&self) -> BoxFuture<'_, Result<SystemReading, BmcError>> {
        async {
            let (system, _) = self.system("reading the system").await?;
            Ok(system.reading())
        }
        .boxed()
    }

    fn power(&self, action: PowerAction) -> BoxFuture<'_, Result<(), BmcError>> {
        self.reset(action).boxed()
    }

    fn boot_once_from_pxe(&self) -> BoxFuture<'_, Result<(), BmcError>> {
        self.set_boot().boxed()
    }
}

/// The part of `ComputerSystem` that we use (DSP0268). BMCs send much more.
#[derive(Debug, Deserialize)]
struct ComputerSystem {
    #[serde(rename = "PowerState", default)]
    power_state: Option<String>,
    #[serde(rename = "LastResetTime", default)]
    last_reset_time: Option<String>,
    #[serde(rename = "Boot", default)]
    boot: Boot,
    #[serde(rename = "Actions", default)]
    actions: Actions,
}

#[derive(Debug, Default, Deserialize)]
struct Boot {
    #[serde(rename = "BootSourceOverrideTarget", default)]
    target: Option<String>,
    #[serde(rename = "BootSourceOverrideEnabled", default)]
    enabled: Option<String>,
    #[serde(rename = "BootSourceOverrideMode", default)]
    mode: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Actions {
    #[serde(rename = "#ComputerSystem.Reset", default)]
    reset: Option<ResetAction>,
}

#[derive(Debug, Deserialize)]
struct ResetAction {
    target: String,
}

impl ComputerSystem {
    fn reading(self) -> SystemReading {
        let power = match self.power_state.as_deref() {
            Some("On") => PowerState::On,
            Some("Off") => PowerState::Off,
            Some(_) | None => PowerState::Between,
        };
        let last_reset = self.last_reset_time.filter(|text| !text.is_empty() && text.len() <= 64);
        SystemReading { power, last_reset }
    }
}

fn accept_boot(boot: &Boot, allow_continuous: bool) -> bool {
    let enabled = match boot.enabled.as_deref() {
        Some("Once") => true,
        Some("Continuous") => allow_continuous,
        Some(_) | None => false,
    };
    // A BMC of a machine that knows UEFI only need not show a mode.
    let uefi = boot.mode.as_deref().is_none_or(|mode| mode == "UEFI");
    boot.target.as_deref() == Some("Pxe") && enabled && uefi
}

fn bounded(text: Option<&str>) -> String {
    text.map_or_else(|| "nothing".to_owned(), |t| t.escape_default().take(40).collect())
}

/// Redfish puts words at `error.message` (DSP0266 section 8.6); other servers put them anywhere.
fn error_message(body: &[u8]) -> String {
    let parsed: Value = serde_json::from_slice(body).unwrap_or_default();
    let text =
        parsed["error"]["message"].as_str().map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    text.escape_default().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn boot(target: &str, enabled: &str, mode: &str) -> Boot {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Boot { target: some(target), enabled: some(enabled), mode: some(mode) }
    }

    #[test]
    fn d9_only_pxe_once_in_uefi_is_accepted() {
        assert!(accept_boot(&boot("Pxe", "Once", "UEFI"), false));
        assert!(accept_boot(&boot("Pxe", "Once", ""), false));
        assert!(!accept_boot(&boot("Pxe", "Continuous", "UEFI"), false));
        assert!(accept_boot(&boot("Pxe", "Continuous", "UEFI"), true));
        for bad in [
            boot("Hdd", "Once", "UEFI"),
            boot("Pxe", "Disabled", "UEFI"),
            boot("Pxe", "Once", "Legacy"),
            boot("", "", ""),
        ] {
            assert!(!accept_boot(&bad, true), "{bad:?}");
        }
    }

    #[test]
    fn plain_http_and_bad_certificates_are_refused_before_the_password_leaves() {
        let access = |system, ca_pem| RedfishAccess {
            system,
            username: "root".into(),
            password: Password::new("calvin"),
            ca_pem,
            timeout: Duration::from_secs(1),
            allow_continuous: false,
        };
        for (system, ca_pem) in
            [("http://10.0.0.1/redfish/v1/Systems/1", None), ("nonsense", None), ("https://10.0.0.1/", Some("no PEM"))]
        {
            let error = Redfish::new(access(system, ca_pem)).unwrap_err();
            assert!(!error.to_string().contains("calvin"));
            assert!(matches!(error, BmcError::Unusable { .. }), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..300), text in "(?s).{0,80}") {
            let _ = serde_json::from_slice::<ComputerSystem>(&body);
            prop_assert!(error_message(&body).len() <= 200);
            let body = json!({"PowerState": text, "LastResetTime": text, "Boot": {"BootSourceOverrideTarget": text}});
            let system: ComputerSystem = serde_json::from_value(body).unwrap();
            prop_assert!(!accept_boot(&system.boot, true));
            prop_assert!(system.reading().last_reset.is_none_or(|t| t.len() <= 64));
        }
    }
}
