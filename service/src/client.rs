//! A client of the services' APIs: JSON over HTTPS with the site's CA, or over a Unix socket.

use crate::auth::Token;
use crate::tls::{self, TlsError};
use assay_wire::problem::Problem;
use reqwest::{Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::time::Duration;
use url::Url;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than any long poll.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// More than any answer; archived evidence is the largest.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Why a call did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The service answered with a problem.
    #[error("{method} {url}: {}", problem.detail)]
    Refused {
        /// HTTP method.
        method: Method,
        /// What was asked.
        url: Url,
        /// What it answered.
        problem: Box<Problem>,
    },
    /// The service did not answer.
    #[error("{method} {url}: no answer")]
    Unreachable {
        /// HTTP method.
        method: Method,
        /// What was asked.
        url: Url,
        /// Why.
        source: reqwest::Error,
    },
    /// It answered with something else.
    #[error("{method} {url}: the answer makes no sense")]
    Nonsense {
        /// HTTP method.
        method: Method,
        /// What was asked.
        url: Url,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The path given is not one.
    #[error("`{0}` is not a path of an API")]
    Path(String),
}

impl ClientError {
    /// What the service answered, if it answered.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused { problem, .. } => Some(problem),
            Self::Unreachable { .. } | Self::Nonsense { .. } | Self::Path(_) => None,
        }
    }
}

/// Why a client cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewClientError {
    /// The CA.
    #[error("reading the site's CA")]
    Ca(#[from] TlsError),
    /// The HTTP client.
    #[error("making an HTTP client for {base}")]
    Http {
        /// For whom.
        base: Url,
        /// Why.
        source: reqwest::Error,
    },
}

/// Calls one service.
#[derive(Debug, Clone)]
pub struct ServiceClient {
    base: Url,
    http: reqwest::Client,
    token: Option<Token>,
}

impl ServiceClient {
    /// A client of the service at `base`, which must have a certificate of the CA in `ca_pem`.
    ///
    /// # Errors
    /// See [`NewClientError`].
    pub fn new(base: Url, ca_pem: &str, token: Token) -> Result<Self, NewClientError> {
        let builder = reqwest::Client::builder().tls_backend_preconfigured(tls::client_config(ca_pem)?);
        let http = bounded(builder).build().map_err(|source| NewClientError::Http { base: base.clone(), source })?;
        Ok(Self { base, http, token: Some(token) })
    }

    /// A client of the service that listens on the Unix socket `path`.
    ///
    /// # Errors
    /// See [`NewClientError`].
    pub fn over_unix(path: &Path) -> Result<Self, NewClientError> {
        #[expect(clippy::unwrap_used, reason = "a constant URL")]
        let base: Url = Url::parse("http://localhost/").unwrap();
        // No TLS on this socket, but reqwest wants a configuration all the same.
        let nobody = tls::trusting_nobody()?;
        let builder = reqwest::Client::builder().tls_backend_preconfigured(nobody).unix_socket(path.to_owned());
        let http = bounded(builder).build().map_err(|source| NewClientError::Http { base: base.clone(), source })?;
        Ok(Self { base, http, token: None })
    }

    /// `GET path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<B: Serialize + Sync, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, ClientError> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// `PUT path` with a JSON body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put<B: Serialize + Sync, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, ClientError> {
        self.call(Method::PUT, path, Some(body)).await
    }

    /// `PUT path` with octets.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put_octets<T: DeserializeOwned>(&self, path: &str, octets: Vec<u8>) -> Result<T, ClientError> {
        let (method, body) = (Method::PUT, |request: RequestBuilder| request.body(octets));
        let (response, url) = self.send_with(method.clone(), path, Some(REQUEST_TIMEOUT), body).await?;
        Self::json(method, url, response).await
    }

    /// `PATCH path` with a JSON body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn patch<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.call(Method::PATCH, path, Some(body)).await
    }

    /// `DELETE path` with a JSON body.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.call(Method::DELETE, path, Some(body)).await
    }

    /// `POST path`, and the response as it comes: for answers that are streams. Not bounded in time.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post_streaming<B: Serialize + Sync>(&self, path: &str, body: &B) -> Result<Response, ClientError> {
        self.send(Method::POST, path, Some(body), None).await.map(|(response, _)| response)
    }

    /// `GET path`, and the response as it comes: for answers that are streams. Not bounded in time.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get_streaming(&self, path: &str) -> Result<Response, ClientError> {
        self.send(Method::GET, path, None::<&()>, None).await.map(|(response, _)| response)
    }

    async fn call<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let (response, url) = self.send(method.clone(), path, body, Some(REQUEST_TIMEOUT)).await?;
        Self::json(method, url, response).await
    }

    async fn json<T: DeserializeOwned>(method: Method, url: Url, response: Response) -> Result<T, ClientError> {
        let bytes = read_bounded(response).await.map_err(|source| ClientError::Nonsense {
            method: method.clone(),
            url: url.clone(),
            source,
        })?;
        // "No content" reads as JSON null, so that callers may ask for `()`.
        let json: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(json).map_err(|cause| ClientError::Nonsense { method, url, source: cause.into() })
    }

    async fn send<B: Serialize + Sync>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        timeout: Option<Duration>,
    ) -> Result<(Response, Url), ClientError> {
        let with_body = |request: RequestBuilder| match body {
            Some(body) => request.json(body),
            None => request,
        };
        self.send_with(method, path, timeout, with_body).await
    }

    async fn send_with(
        &self,
        method: Method,
        path: &str,
        timeout: Option<Duration>,
        with_body: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<(Response, Url), ClientError> {
        let url = self.base.join(path).map_err(|_| ClientError::Path(path.to_owned()))?;
        let mut request = self.http.request(method.clone(), url.clone());
        if let Some(timeout) = timeout {
            request = request.timeout(timeout);
        }
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        let response = with_body(request).send().await.map_err(|source| ClientError::Unreachable {
            method: method.clone(),
            url: url.clone(),
            source,
        })?;
        if response.status().is_success() {
            return Ok((response, url));
        }
        let status = response.status();
        let problem =
            read_bounded(response).await.ok().and_then(|bytes| serde_json::from_slice::<Problem>(&bytes).ok());
        let problem = problem.unwrap_or_else(|| Problem {
            kind: "http".to_owned(),
            status: status.as_u16(),
            detail: format!("answered {status}"),
            hint: None,
        });
        Err(ClientError::Refused { method, url, problem: Box::new(problem) })
    }
}

fn bounded(builder: reqwest::ClientBuilder) -> reqwest::ClientBuilder {
    builder.connect_timeout(CONNECT_TIMEOUT).no_proxy().redirect(reqwest::redirect::Policy::none())
}

async fn read_bounded(mut response: Response) -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err("longer than 16 MiB".into());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
