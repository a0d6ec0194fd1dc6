//! Which site the client talks to: `client.toml` in the site's folder, written by `assay up`.

use super::{BoxError, Options};
use assay_service::auth::Token;
use assay_service::client::ServiceClient;
use assay_service::config;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use url::Url;

/// Name of the file in the site's folder.
pub(crate) const CLIENT_FILE: &str = "client.toml";

/// `client.toml`: paths are relative to the folder that it stands in.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClientFile {
    /// PEM of the CA that signed the services' certificates.
    pub(crate) ca: PathBuf,
    /// File with the bearer token.
    pub(crate) token: PathBuf,
    /// Base URL of isolation.
    pub(crate) isolation: Url,
    /// Base URL of imaging.
    pub(crate) imaging: Url,
    /// Base URL of the verifier.
    pub(crate) verifier: Url,
}

/// Clients of the site's services.
pub(crate) struct Site {
    pub(crate) isolation: ServiceClient,
    pub(crate) imaging: ServiceClient,
    pub(crate) verifier: ServiceClient,
}

impl Site {
    /// Reads the site's folder. `ASSAY_TOKEN`, if set, is used in place of the token file.
    pub(crate) fn open(options: &Options) -> Result<Self, BoxError> {
        Self::with_token(&options.site, std::env::var("ASSAY_TOKEN").ok())
    }

    /// Reads the folder of another site, with the token that is in it.
    pub(crate) fn in_folder(folder: &Path) -> Result<Self, BoxError> {
        Self::with_token(folder, None)
    }

    fn with_token(folder: &Path, token: Option<String>) -> Result<Self, BoxError> {
        let file: ClientFile = config::read(&folder.join(CLIENT_FILE))?;
        let ca = read(&folder.join(&file.ca))?;
        let token = match token {
            Some(token) => token,
            None => read(&folder.join(&file.token))?,
        };
        let client = |base: Url| ServiceClient::new(base, &ca, Token::from_text(&token));
        Ok(Self {
            isolation: client(file.isolation)?,
            imaging: client(file.imaging)?,
            verifier: client(file.verifier)?,
        })
    }
}

fn read(path: &Path) -> Result<String, BoxError> {
    fs::read_to_string(path).map_err(|cause| format!("reading {}: {cause}", path.display()).into())
}
