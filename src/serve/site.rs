//! The site's file: one TOML document for every service, in which a table may be short or absent, because this module
//! fills in what follows from the site's folder.

use crate::client::BoxError;
use crate::client::site::{CLIENT_FILE, ClientFile};
use assay_netboot::config::SiteDefaults;
use assay_service::auth::Token;
use assay_service::client::ServiceClient;
use assay_service::config::{self, ConfigError};
use assay_service::http::ServiceContext;
use assay_service::telemetry::LogFormat;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use toml::{Table, Value};

/// The services of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    Isolation,
    Imaging,
    Verifier,
    Netboot,
}

impl Service {
    /// In the order in which they depend on each other.
    pub(crate) const ALL: [Self; 4] = [Self::Isolation, Self::Imaging, Self::Verifier, Self::Netboot];

    fn table(self) -> &'static str {
        match self {
            Self::Isolation => "isolation",
            Self::Imaging => "imaging",
            Self::Verifier => "verifier",
            Self::Netboot => "netboot",
        }
    }

    /// Where its API listens unless the file says otherwise.
    fn default_listen(self) -> Option<&'static str> {
        match self {
            Self::Isolation => Some("127.0.0.1:7442"),
            Self::Verifier => Some("127.0.0.1:7443"),
            Self::Imaging => Some("127.0.0.1:7444"),
            Self::Netboot => None,
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.table())
    }
}

/// A service under way.
pub(crate) type Running = Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SiteFile {
    site: SiteTable,
    #[serde(default)]
    isolation: Table,
    #[serde(default)]
    imaging: Table,
    #[serde(default)]
    verifier: Table,
    #[serde(default)]
    netboot: Table,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SiteTable {
    /// Keys, tokens, databases and images live below it.
    state_dir: PathBuf,
    /// Names and addresses, beside `localhost`, that the services' certificates must carry.
    #[serde(default)]
    names: Vec<String>,
    /// `json` (default) or `text`.
    #[serde(default)]
    log: Log,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Log {
    #[default]
    Json,
    Text,
}

impl SiteFile {
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        config::read(path)
    }

    pub(crate) fn state_dir(&self) -> &Path {
        &self.site.state_dir
    }

    pub(crate) fn has_netboot(&self) -> bool {
        !self.netboot.is_empty()
    }

    pub(crate) fn names(&self) -> &[String] {
        &self.site.names
    }

    pub(crate) fn log_format(&self) -> LogFormat {
        match self.site.log {
            Log::Json => LogFormat::Json,
            Log::Text => LogFormat::Text,
        }
    }

    /// Tells the client on this machine where the services are.
    pub(crate) fn write_client_file(&self) -> Result<(), BoxError> {
        let file = ClientFile {
            ca: "tls/ca.pem".into(),
            token: "operator.token".into(),
            isolation: self.base_url(Service::Isolation)?,
            imaging: self.base_url(Service::Imaging)?,
            verifier: self.base_url(Service::Verifier)?,
        };
        let path = self.state_dir().join(CLIENT_FILE);
        std::fs::write(&path, toml::to_string(&file)?)
            .map_err(|cause| format!("writing {}: {cause}", path.display()))?;
        Ok(())
    }

    /// Checks the service's configuration and prepares it; the future runs it.
    pub(crate) fn start(&self, service: Service, context: &ServiceContext) -> Result<Running, BoxError> {
        let context = context.clone();
        Ok(match service {
            Service::Isolation => {
                let config = checked(service, self.filled(service)?)?;
                Box::pin(async move { Ok(assay_isolation::run(config, context).await?) })
            }
            Service::Imaging => {
                let config = checked(service, self.filled(service)?)?;
                Box::pin(async move { Ok(assay_imaging::run(config, context).await?) })
            }
            Service::Verifier => {
                let config = checked(service, self.filled(service)?)?;
                Box::pin(async move { Ok(assay_verifier::run(config, context).await?) })
            }
            Service::Netboot => {
                let (config, isolation) = (self.netboot_config(&context)?, self.isolation_client(&context)?);
                Box::pin(async move { Ok(assay_netboot::run(config, isolation, context).await?) })
            }
        })
    }

    fn table(&self, service: Service) -> &Table {
        match service {
            Service::Isolation => &self.isolation,
            Service::Imaging => &self.imaging,
            Service::Verifier => &self.verifier,
            Service::Netboot => &self.netboot,
        }
    }

    fn base_url(&self, service: Service) -> Result<url::Url, BoxError> {
        let listen = self.table(service).get("listen").and_then(Value::as_str).or(service.default_listen());
        Ok(format!("https://{}/", listen.unwrap_or_default()).parse()?)
    }

    /// The service's table with everything that follows from the site filled in where the file is silent.
    fn filled(&self, service: Service) -> Result<Table, BoxError> {
        let mut table = self.table(service).clone();
        let mut default = |key: &str, value: Value| {
            table.entry(key).or_insert(value);
        };
        if let Some(listen) = service.default_listen() {
            default("listen", listen.into());
        }
        match service {
            Service::Isolation => {
                default("database", self.database(service));
                default("password_key_file", self.path("bmc-passwords.key"));
            }
            Service::Imaging => {
                default("database", self.database(service));
                default("store", self.path("imaging"));
                default("key_file", self.path("chap-secrets.key"));
            }
            Service::Verifier => {
                default("state_dir", self.path("verifier"));
                default("isolation", self.peer(Service::Isolation)?);
                default("imaging", self.peer(Service::Imaging)?);
            }
            Service::Netboot => {
                if let Some(url) = self.verifier_config()?.map(|verifier| verifier.agent_url) {
                    default("verifier_url", url.into());
                }
            }
        }
        Ok(table)
    }

    fn path(&self, name: &str) -> Value {
        self.state_dir().join(name).to_string_lossy().into_owned().into()
    }

    fn database(&self, service: Service) -> Value {
        format!("sqlite:{}", self.state_dir().join(format!("{service}.db")).display()).into()
    }

    fn peer(&self, service: Service) -> Result<Value, BoxError> {
        let mut peer = Table::new();
        peer.insert("url".to_owned(), self.base_url(service)?.to_string().into());
        peer.insert("token_file".to_owned(), self.path("service.token"));
        Ok(peer.into())
    }

    /// The verifier's configuration, where it runs on this machine.
    fn verifier_config(&self) -> Result<Option<assay_verifier::Config>, BoxError> {
        if self.verifier.is_empty() {
            return Ok(None);
        }
        checked(Service::Verifier, self.filled(Service::Verifier)?).map(Some)
    }

    fn netboot_config(&self, context: &ServiceContext) -> Result<assay_netboot::config::Config, BoxError> {
        let key = match self.verifier_config()? {
            Some(verifier) => Some(assay_verifier::agent_identity(&verifier, context)?.key_sha256().to_owned()),
            None => None,
        };
        let state_dir = self.state_dir().join("netboot");
        std::fs::create_dir_all(&state_dir)?;
        let defaults = SiteDefaults { state_dir: &state_dir, verifier_key_sha256: key.as_deref() };
        let file: assay_netboot::config::File = checked(Service::Netboot, self.filled(Service::Netboot)?)?;
        Ok(assay_netboot::config::Config::from_file(file, defaults)?)
    }

    /// A client of isolation for netboot.
    fn isolation_client(&self, context: &ServiceContext) -> Result<ServiceClient, BoxError> {
        let token = std::fs::read_to_string(self.state_dir().join("service.token"))?;
        let base = self.base_url(Service::Isolation)?;
        Ok(ServiceClient::new(base, context.identity.ca_pem(), Token::from_text(&token))?)
    }
}

/// A table as the service's configuration.
fn checked<T: DeserializeOwned>(service: Service, table: Table) -> Result<T, BoxError> {
    Value::Table(table).try_into().map_err(|error| format!("the site's file, table [{service}]: {error}").into())
}
