//! Who calls: bearer tokens, stored as SHA-256 digests. A token has 256 random bits, so a plain digest is enough.

use crate::error::ApiError;
use crate::secret_file::{self, SecretFileError};
use assay_wire::id::ProjectId;
use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::SystemTime;

/// What a caller may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The provider's people: everything.
    Operator,
    /// Another service of the site.
    Service,
    /// The members of one project.
    Project(ProjectId),
}

/// A bearer token. `Debug` does not show it.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// 256 random bits, hexadecimal.
    #[must_use]
    pub fn random() -> Self {
        Self(hex::encode(secret_file::random::<32>()))
    }

    /// A token as a client keeps it, in a file or an environment variable.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        Self(text.trim().to_owned())
    }

    /// The secret itself, to send or to write to a private file.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    fn digest(&self) -> String {
        hex::encode(digest(&SHA256, self.0.as_bytes()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(<redacted>)")
    }
}

/// An authenticated caller: an axum extractor that answers 401 to everybody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// Name of the token, for the audit log.
    pub name: String,
    /// What it may do.
    pub role: Role,
}

impl Caller {
    /// # Errors
    /// 403 unless the caller is an operator.
    pub fn require_operator(&self) -> Result<(), ApiError> {
        match self.role {
            Role::Operator => Ok(()),
            Role::Service | Role::Project(_) => Err(self.refused("an operator's")),
        }
    }

    /// # Errors
    /// 403 unless the caller is a service of the site, or an operator.
    pub fn require_service(&self) -> Result<(), ApiError> {
        match self.role {
            Role::Operator | Role::Service => Ok(()),
            Role::Project(_) => Err(self.refused("a service's or an operator's")),
        }
    }

    /// # Errors
    /// 403 unless the caller belongs to `project`, or is an operator.
    pub fn require_project(&self, project: &ProjectId) -> Result<(), ApiError> {
        match &self.role {
            Role::Operator => Ok(()),
            Role::Project(own) if own == project => Ok(()),
            Role::Project(_) | Role::Service => Err(self.refused(&format!("project `{project}`'s or an operator's"))),
        }
    }

    fn refused(&self, needed: &str) -> ApiError {
        ApiError::forbidden("forbidden", format!("token `{}` may not do this: it takes {needed} token", self.name))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let bearer = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let token = bearer.map(Token::from_text).ok_or_else(|| {
            ApiError::unauthorized("no bearer token given")
                .with_hint("the client reads it from the site's folder: --site")
        })?;
        let tokens = parts.extensions.get::<Arc<Tokens>>().cloned();
        let caller = tokens.and_then(|tokens| tokens.caller(&token));
        caller.ok_or_else(|| ApiError::unauthorized("this bearer token is not known here"))
    }
}

/// The tokens that are known, backed by a private file that is read again when it changes.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    known: RwLock<Known>,
}

/// Which file it was: every write renames a new file into place, so the inode tells two writes of one clock tick apart.
type FileVersion = (u64, SystemTime);

#[derive(Debug, Default)]
struct Known {
    version: Option<FileVersion>,
    by_digest: HashMap<String, Caller>,
}

impl Tokens {
    /// Reads `tokens.json` in `folder`. On the first start makes an operator's and a service's token and writes them
    /// to `operator.token` and `service.token` there, mode 0600.
    ///
    /// # Errors
    /// The files cannot be read or written.
    pub fn load_or_create(folder: &Path) -> Result<Self, SecretFileError> {
        let path = folder.join("tokens.json");
        if !path.exists() {
            let mut by_digest = HashMap::new();
            for (name, role) in [("operator", Role::Operator), ("service", Role::Service)] {
                let text = secret_file::load_or_create(&folder.join(format!("{name}.token")), || {
                    Token::random().expose().as_bytes().to_vec()
                })?;
                let token = Token::from_text(&String::from_utf8_lossy(&text));
                by_digest.insert(token.digest(), Caller { name: name.to_owned(), role });
            }
            secret_file::write(&path, &serde_json::to_vec_pretty(&by_digest).unwrap_or_default())?;
        }
        let tokens = Self { path, known: RwLock::default() };
        tokens.reload();
        Ok(tokens)
    }

    /// Makes a token, records its digest and returns it: the only time that it can be seen.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn issue(&self, name: &str, role: Role) -> Result<Token, SecretFileError> {
        self.reload();
        let token = Token::random();
        let mut by_digest = self.read().by_digest.clone();
        by_digest.insert(token.digest(), Caller { name: name.to_owned(), role });
        secret_file::write(&self.path, &serde_json::to_vec_pretty(&by_digest).unwrap_or_default())?;
        self.reload();
        Ok(token)
    }

    fn caller(&self, token: &Token) -> Option<Caller> {
        let digest = token.digest();
        if let Some(caller) = self.read().by_digest.get(&digest) {
            return Some(caller.clone());
        }
        self.reload();
        self.read().by_digest.get(&digest).cloned()
    }

    /// Reads the file again if it changed. A file that cannot be read leaves what is known as it is.
    fn reload(&self) {
        let version = std::fs::metadata(&self.path).and_then(|m| Ok((m.ino(), m.modified()?))).ok();
        if version.is_none() || version == self.read().version {
            return;
        }
        match std::fs::read(&self.path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(by_digest)) => {
                let mut known = self.known.write().unwrap_or_else(std::sync::PoisonError::into_inner);
                *known = Known { version, by_digest };
            }
            Ok(Err(_)) | Err(_) => {
                tracing::error!(event = "tokens.unreadable", path = %self.path.display(), "cannot read the token file");
            }
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_known_by_digest_only() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::load_or_create(folder.path()).unwrap();
        let alpha: ProjectId = "alpha".parse().unwrap();
        let token = tokens.issue("alpha-ci", Role::Project(alpha.clone())).unwrap();
        assert_eq!(tokens.caller(&token).unwrap().role, Role::Project(alpha));
        assert!(tokens.caller(&Token::random()).is_none());
        let stored = std::fs::read_to_string(folder.path().join("tokens.json")).unwrap();
        assert!(!stored.contains(token.expose()));
    }

    #[test]
    fn a_token_issued_by_another_process_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) =
            (Tokens::load_or_create(folder.path()).unwrap(), Tokens::load_or_create(folder.path()).unwrap());
        let token = other.issue("late", Role::Service).unwrap();
        assert_eq!(one.caller(&token).unwrap().name, "late");
    }

    #[test]
    fn a10_roles_do_not_reach_beyond_themselves() {
        let (alpha, beta): (ProjectId, ProjectId) = ("alpha".parse().unwrap(), "beta".parse().unwrap());
        let caller = |role| Caller { name: "t".into(), role };
        let project = caller(Role::Project(alpha.clone()));
        assert!(project.require_project(&alpha).is_ok());
        assert!(project.require_project(&beta).is_err());
        assert!(project.require_service().is_err());
        assert!(project.require_operator().is_err());
        assert!(caller(Role::Service).require_operator().is_err());
        assert!(caller(Role::Service).require_project(&alpha).is_err());
        assert!(caller(Role::Operator).require_service().is_ok());
    }
}
