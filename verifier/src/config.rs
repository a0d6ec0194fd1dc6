//! The verifier's configuration: what the file says, checked once, before anything is opened.

use crate::attestation::AttestationTimes;
use crate::identity::binding::EkBinding;
use crate::policy::signature::PolicyKey;
use crate::release::journal::ReleaseTimeouts;
use crate::store::StoreLimits;
use crate::store::events::EventKind;
use crate::webhook::WebhookConfig;
use assay_wire::agent::CoVerifier;
use assay_wire::id::ProjectId;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use url::Url;

/// A valid configuration. Deserializes from the `[verifier]` table of a site's file; every error names its field.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "File")]
pub struct Config {
    /// Keys and, by default, the database live here.
    pub state_dir: PathBuf,
    /// `sqlite:PATH` or `postgres://…`.
    pub database: String,
    /// What this verifier is called among those that share its database; without one, host name and port.
    pub name: Option<String>,
    /// Whether the database may have been another key's so far.
    pub accept_new_keys: bool,
    /// The operators' and services' API.
    pub listen: SocketAddr,
    /// The agents' API, in the airlock.
    pub agent_listen: SocketAddr,
    /// The agents' API for the gateways' relays.
    pub agent_socket: Option<PathBuf>,
    /// How agents in the airlock reach it: what their settings must say.
    pub agent_url: String,
    /// PEM files of the CAs that EK certificates may come from. None of them: nobody enrols.
    pub ek_ca_files: Vec<PathBuf>,
    /// PEM or DER files of those CAs' revocation lists.
    pub ek_crl_files: Vec<PathBuf>,
    /// PEM files of the CAs that IAK certificates may come from.
    pub iak_ca_files: Vec<PathBuf>,
    /// Who binds a node to its first EK.
    pub ek_binding: EkBinding,
    /// A folder of collateral for quotes of trusted execution environments, one JSON document a file.
    pub tee_collateral_dir: Option<PathBuf>,
    /// Where isolation is.
    pub isolation: PeerConfig,
    /// Where imaging is; none for a verifier that begins no releases.
    pub imaging: Option<PeerConfig>,
    /// Whether a good verdict begins a release.
    pub role: Role,
    /// What agents' settings say of the verifier, where that is not us.
    pub settings_say: Option<SettingsSay>,
    /// Other verifiers, by project, whose results are wanted beside ours. Agents call them at the address given here, at
    /// boot from the airlock and then for as long as the admission stands from the tenant's network: no relay leads there.
    pub co_verifiers: Vec<ProjectVerifier>,
    /// How long each step of a release may take.
    pub release: ReleaseTimeouts,
    /// Bounds on what agents can make the database hold.
    pub limits: StoreLimits,
    /// How long an agent has for the conversation.
    pub session: SessionTimes,
    /// How long a good result is good for: the first one of an admission.
    pub result_lifetime: Duration,
    /// Whose signatures on policies and Reference Values count. None of them: policies need no signature.
    pub policy_keys: Vec<PolicyKey>,
    /// Whether nodes that are released go on attesting.
    pub continuous: bool,
    /// How often they do, and how long that is good for.
    pub attestation: AttestationTimes,
    /// Who is told of every event.
    pub webhooks: Vec<WebhookConfig>,
}

/// The files that say who is believed about EKs.
#[derive(Debug, Clone)]
pub struct EndorserFiles {
    /// [`Config::ek_ca_files`].
    pub ek_cas: Vec<PathBuf>,
    /// [`Config::ek_crl_files`].
    pub ek_crls: Vec<PathBuf>,
    /// [`Config::iak_ca_files`].
    pub iak_cas: Vec<PathBuf>,
}

impl Config {
    /// The files that say who is believed about EKs.
    #[must_use]
    pub fn endorser_files(&self) -> EndorserFiles {
        EndorserFiles {
            ek_cas: self.ek_ca_files.clone(),
            ek_crls: self.ek_crl_files.clone(),
            iak_cas: self.iak_ca_files.clone(),
        }
    }
}

/// What follows from a good verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The release: this verifier leads.
    #[default]
    Release,
    /// A signed result for the verifier that leads, at boot and as long as the node shows good evidence, and no release.
    /// What a project runs to see for itself.
    AppraiseOnly,
}

/// What agents' settings say of the verifier that leads. Agents measure their settings, so whoever appraises must know.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SettingsSay {
    /// Base URL of its agent API, byte for byte.
    pub verifier: String,
    /// SHA-256 of its TLS key, hexadecimal.
    pub key_sha256: String,
}

/// A verifier of a project's own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "ProjectVerifierFile")]
pub struct ProjectVerifier {
    /// Whose.
    pub project: ProjectId,
    /// Where, and with which key.
    pub verifier: CoVerifier,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProjectVerifierFile {
    project: ProjectId,
    url: Url,
    key_sha256: String,
}

impl TryFrom<ProjectVerifierFile> for ProjectVerifier {
    type Error = InvalidConfig;

    fn try_from(file: ProjectVerifierFile) -> Result<Self, InvalidConfig> {
        if file.url.scheme() != "https" {
            return Err(invalid("co_verifiers.url", "must be an https:// URL"));
        }
        if file.key_sha256.len() != 64 || !file.key_sha256.bytes().all(|octet| octet.is_ascii_hexdigit()) {
            return Err(invalid("co_verifiers.key_sha256", "must be 32 octets of hexadecimal"));
        }
        let verifier = CoVerifier { url: file.url.to_string(), key_sha256: file.key_sha256 };
        Ok(Self { project: file.project, verifier })
    }
}

/// How to reach another service of the site.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its base URL.
    pub url: Url,
    /// A file with this verifier's bearer token there.
    pub token_file: PathBuf,
    /// PEM of the CA of its certificate; without it, the site's own.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
}

/// How long an agent has for the conversation. Milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionTimes {
    /// To open its credential.
    pub challenge_ms: i64,
    /// To answer a nonce.
    pub nonce_ms: i64,
    /// For everything.
    pub session_ms: i64,
}

/// Why a configuration is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("verifier configuration, field `{field}`: {problem}")]
pub struct InvalidConfig {
    field: &'static str,
    problem: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    state_dir: PathBuf,
    database: Option<String>,
    name: Option<String>,
    #[serde(default)]
    accept_new_keys: bool,
    #[serde(default = "default_listen")]
    listen: SocketAddr,
    agent_listen: SocketAddr,
    agent_socket: Option<PathBuf>,
    agent_url: Option<String>,
    #[serde(default)]
    ek_ca_files: Vec<PathBuf>,
    #[serde(default)]
    ek_crl_files: Vec<PathBuf>,
    #[serde(default)]
    iak_ca_files: Vec<PathBuf>,
    #[serde(default)]
    ek_binding: EkBinding,
    tee_collateral_dir: Option<PathBuf>,
    isolation: PeerConfig,
    imaging: Option<PeerConfig>,
    #[serde(default)]
    role: Role,
    settings_say: Option<SettingsSay>,
    #[serde(default)]
    co_verifiers: Vec<ProjectVerifier>,
    #[serde(default)]
    policy_keys: Vec<PolicyKey>,
    #[serde(default = "minute")]
    challenge_seconds: u32,
    #[serde(default = "two_minutes")]
    nonce_seconds: u32,
    #[serde(default = "half_an_hour")]
    session_seconds: u32,
    result_lifetime_seconds: Option<u32>,
    #[serde(default)]
    continuous: Continuous,
    #[serde(default = "half_a_minute")]
    attestation_interval_seconds: u32,
    #[serde(default = "minute_and_a_half")]
    attestation_silence_seconds: u32,
    #[serde(default)]
    webhook: Vec<WebhookTable>,
    #[serde(default = "two_minutes")]
    agent_ready_timeout_seconds: u32,
    #[serde(default = "two_minutes")]
    grant_timeout_seconds: u32,
    #[serde(default = "three_minutes")]
    handover_timeout_seconds: u32,
}

/// `[[verifier.webhook]]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WebhookTable {
    url: Url,
    secret_file: PathBuf,
    ca_file: Option<PathBuf>,
    #[serde(default)]
    events: BTreeSet<EventKind>,
}

impl WebhookTable {
    fn checked(self) -> Result<WebhookConfig, InvalidConfig> {
        let loopback = match self.url.host() {
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            Some(url::Host::Domain(name)) => name == "localhost",
            None => false,
        };
        match self.url.scheme() {
            "https" => {}
            "http" if loopback => {}
            _ => return Err(invalid("webhook.url", "must be https://, or http:// to this machine itself")),
        }
        let ca_file = self.ca_file.unwrap_or_else(|| PathBuf::from(SYSTEM_CAS));
        Ok(WebhookConfig { url: self.url, secret_file: self.secret_file, ca_file, events: self.events })
    }
}

/// Whether tenants' systems have the agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Continuous {
    /// They have: an admission stands while good evidence comes.
    #[default]
    On,
    /// They have not: an admission stands for as long as its result says.
    Off,
}

impl Continuous {
    /// How long a first result lives unless the file says so.
    fn lifetime_seconds(self) -> u32 {
        match self {
            // Enough for the tenant's system to boot and begin.
            Self::On => 15 * 60,
            Self::Off => 12 * 60 * 60,
        }
    }
}

impl TryFrom<File> for Config {
    type Error = InvalidConfig;

    fn try_from(file: File) -> Result<Self, InvalidConfig> {
        let release = ReleaseTimeouts {
            agent_ready_ms: positive_ms("agent_ready_timeout_seconds", file.agent_ready_timeout_seconds)?,
            grant_ms: positive_ms("grant_timeout_seconds", file.grant_timeout_seconds)?,
            handover_ms: positive_ms("handover_timeout_seconds", file.handover_timeout_seconds)?,
            ..ReleaseTimeouts::default()
        };
        let session = SessionTimes {
            challenge_ms: positive_ms("challenge_seconds", file.challenge_seconds)?,
            nonce_ms: positive_ms("nonce_seconds", file.nonce_seconds)?,
            session_ms: positive_ms("session_seconds", file.session_seconds)?,
        };
        let lifetime_seconds = file.result_lifetime_seconds.unwrap_or(file.continuous.lifetime_seconds());
        positive_ms("result_lifetime_seconds", lifetime_seconds)?;
        if lifetime_seconds > MOST_LIFETIME_SECONDS {
            return Err(invalid("result_lifetime_seconds", "a result may live for 7 days at most"));
        }
        let attestation = AttestationTimes {
            interval_ms: positive_ms("attestation_interval_seconds", file.attestation_interval_seconds)?,
            silence_ms: positive_ms("attestation_silence_seconds", file.attestation_silence_seconds)?,
        };
        if attestation.silence_ms <= attestation.interval_ms {
            let problem =
                "must be longer than attestation_interval_seconds, or every admission ends between two pushes";
            return Err(invalid("attestation_silence_seconds", problem));
        }
        match (file.role, &file.imaging, &file.settings_say) {
            (Role::Release, None, _) => {
                return Err(invalid("imaging", "must be given, unless `role` is `appraise-only`"));
            }
            (Role::AppraiseOnly, _, None) => {
                let problem =
                    "must be given: the agents of the site measure the verifier that leads there, not this one";
                return Err(invalid("settings_say", problem));
            }
            (Role::Release, Some(_), _) | (Role::AppraiseOnly, _, Some(_)) => {}
        }
        let database = match file.database {
            Some(url) if ["sqlite:", "postgres:", "postgresql:"].iter().any(|scheme| url.starts_with(scheme)) => url,
            Some(_) => return Err(invalid("database", "must start with `sqlite:` or `postgres:`")),
            None => format!("sqlite:{}", file.state_dir.join("verifier.db").display()),
        };
        Ok(Self {
            agent_url: agent_url(file.agent_url, file.agent_listen)?,
            isolation: https("isolation.url", file.isolation)?,
            imaging: file.imaging.map(|peer| https("imaging.url", peer)).transpose()?,
            role: file.role,
            settings_say: file.settings_say,
            co_verifiers: file.co_verifiers,
            result_lifetime: Duration::from_secs(lifetime_seconds.into()),
            continuous: file.continuous == Continuous::On,
            webhooks: file.webhook.into_iter().map(WebhookTable::checked).collect::<Result<_, _>>()?,
            attestation,
            state_dir: file.state_dir,
            database,
            name: file.name,
            accept_new_keys: file.accept_new_keys,
            listen: file.listen,
            agent_listen: file.agent_listen,
            agent_socket: file.agent_socket,
            ek_ca_files: file.ek_ca_files,
            ek_crl_files: file.ek_crl_files,
            iak_ca_files: file.iak_ca_files,
            ek_binding: file.ek_binding,
            policy_keys: file.policy_keys,
            tee_collateral_dir: file.tee_collateral_dir,
            release,
            limits: StoreLimits::default(),
            session,
        })
    }
}

/// What agents' settings must say, byte for byte: given, or made from the address to listen on.
fn agent_url(given: Option<String>, listen: SocketAddr) -> Result<String, InvalidConfig> {
    match given {
        None if listen.ip().is_unspecified() => {
            Err(invalid("agent_url", format!("must be given, because agents cannot be told to call {listen}")))
        }
        None => Ok(format!("https://{listen}")),
        Some(url) => {
            let parsed = Url::parse(&url).map_err(|cause| invalid("agent_url", cause.to_string()))?;
            if parsed.scheme() == "https" && parsed.host().is_some() {
                Ok(url)
            } else {
                Err(invalid("agent_url", "must be an https:// URL"))
            }
        }
    }
}

fn https(field: &'static str, peer: PeerConfig) -> Result<PeerConfig, InvalidConfig> {
    if peer.url.scheme() == "https" { Ok(peer) } else { Err(invalid(field, "must be an https:// URL")) }
}

fn positive_ms(field: &'static str, seconds: u32) -> Result<i64, InvalidConfig> {
    if seconds == 0 { Err(invalid(field, "must not be 0")) } else { Ok(i64::from(seconds) * 1000) }
}

fn invalid(field: &'static str, problem: impl Into<String>) -> InvalidConfig {
    InvalidConfig { field, problem: problem.into() }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7443))
}

fn minute() -> u32 {
    60
}

fn two_minutes() -> u32 {
    120
}

fn three_minutes() -> u32 {
    180
}

fn half_an_hour() -> u32 {
    30 * 60
}

fn half_a_minute() -> u32 {
    30
}

fn minute_and_a_half() -> u32 {
    90
}

/// Debian's bundle of public CAs.
const SYSTEM_CAS: &str = "/etc/ssl/certs/ca-certificates.crt";

const MOST_LIFETIME_SECONDS: u32 = 7 * 24 * 60 * 60;

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        state_dir = "/var/lib/assay"
        agent_listen = "10.99.0.1:8443"
        isolation = { url = "https://127.0.0.1:7442", token_file = "service.token" }
        imaging = { url = "https://127.0.0.1:7444", token_file = "service.token" }
    "#;

    #[test]
    fn defaults_fill_what_a_short_file_leaves_out() {
        let config: Config = toml::from_str(GOOD).unwrap();
        assert_eq!(config.database, "sqlite:/var/lib/assay/verifier.db");
        assert_eq!(config.agent_url, "https://10.99.0.1:8443");
        assert_eq!(config.session.nonce_ms, 120_000);
        assert_eq!(config.release.handover_ms, 180_000);
        assert_eq!(config.result_lifetime, Duration::from_secs(900));
        assert!(config.continuous);
        assert_eq!(config.attestation, AttestationTimes { interval_ms: 30_000, silence_ms: 90_000 });
        let off: Config = toml::from_str(&format!("continuous = \"off\"\n{GOOD}")).unwrap();
        assert_eq!((off.continuous, off.result_lifetime), (false, Duration::from_secs(43_200)));
        assert!(config.ek_ca_files.is_empty());
        assert_eq!(config.ek_binding, EkBinding::FirstUse);
    }

    #[test]
    fn a_wrong_file_gets_one_error_that_names_the_field() {
        for (line, field) in [
            ("nonce_seconds = 0", "nonce_seconds"),
            ("result_lifetime_seconds = 99999999", "result_lifetime_seconds"),
            ("attestation_silence_seconds = 30", "attestation_silence_seconds"),
            ("continuous = \"perhaps\"", "continuous"),
            ("webhook = [{ url = \"http://192.0.2.1/x\", secret_file = \"s\" }]", "webhook.url"),
            ("webhook = [{ url = \"https://x/\", secret_file = \"s\", events = [\"nonsense\"] }]", "nonsense"),
            ("database = \"mysql://x\"", "database"),
            ("agent_url = \"http://10.99.0.1\"", "agent_url"),
            ("agent_url = \"nonsense\"", "agent_url"),
            ("ek_binding = \"whoever\"", "ek_binding"),
            ("no_such_field = 1", "no_such_field"),
        ] {
            let error = toml::from_str::<Config>(&format!("{line}\n{GOOD}")).unwrap_err().to_string();
            assert!(error.contains(field), "{line}: {error}");
        }
        let everywhere = GOOD.replace("10.99.0.1", "0.0.0.0");
        assert!(toml::from_str::<Config>(&everywhere).unwrap_err().to_string().contains("agent_url"));
        let plain = GOOD.replace("https://127.0.0.1:7442", "http://127.0.0.1:7442");
        assert!(toml::from_str::<Config>(&plain).unwrap_err().to_string().contains("isolation.url"));
    }
}
