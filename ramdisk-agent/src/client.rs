//! HTTP over TLS to the verifier: the one file that owns that socket. A connection serves one request. The port may
//! move or the verifier restart between any two, and then there is nothing half-dead to notice.

use crate::pin::KeyPin;
use assay_wire::problem::Problem;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

/// No answer of the verifier is longer.
pub const MAX_ANSWER_BYTES: usize = 256 * 1024;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the first attempt to connect may take; each further one takes twice as long. The kernel repeats a lost SYN
/// after a second, and just after a port has moved the first is often lost: a new attempt is quicker.
const FIRST_CONNECT_TIMEOUT: Duration = Duration::from_millis(200);

/// Longer than the verifier's long poll.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A verifier at an address, directly or through a relay, known by its key.
#[derive(Clone)]
pub struct Client {
    address: SocketAddr,
    tls: TlsConnector,
    bearer: Option<Arc<Zeroizing<String>>>,
}

impl Client {
    /// A client for the verifier with the key `pin` at `address`. Connects only when called.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn new(address: SocketAddr, pin: KeyPin) -> Result<Self, rustls::Error> {
        Ok(Self { address, tls: TlsConnector::from(Arc::new(pin.client_config()?)), bearer: None })
    }

    /// The same verifier, key and token, but reached at another address.
    #[must_use]
    pub fn through(&self, relay: SocketAddr) -> Self {
        Self { address: relay, ..self.clone() }
    }

    /// Where it connects to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends `Authorization: Bearer <token>` from now on.
    pub fn set_bearer(&mut self, token: Zeroizing<String>) {
        self.bearer = Some(Arc::new(token));
    }

    /// The token that it sends, if it has one.
    #[must_use]
    pub fn bearer(&self) -> Option<Zeroizing<String>> {
        self.bearer.as_deref().cloned()
    }

    /// `GET path`.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CallError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn post<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> Result<T, CallError> {
        let body = serde_json::to_vec(body).map_err(|source| self.error(path, Cause::Json(source)))?;
        self.call(Method::POST, path, body.into()).await
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, CallError> {
        let answer = timeout(ANSWER_TIMEOUT, self.exchange(method, path, body))
            .await
            .unwrap_or(Err(Cause::Timeout(ANSWER_TIMEOUT)))
            .and_then(|(status, body)| decode(status, &body));
        answer.map_err(|cause| self.error(path, cause))
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), Cause> {
        let tcp = connect(self.address).await?;
        tcp.set_nodelay(true).map_err(Cause::Connect)?;
        let tls = self.tls.connect(ServerName::from(self.address.ip()), tcp).await.map_err(tls_cause)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(Cause::Http)?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.address.to_string())
            .header(CONNECTION, "close")
            .header(CONTENT_TYPE, "application/json");
        if let Some(bearer) = &self.bearer {
            request = request.header(AUTHORIZATION, format!("Bearer {}", bearer.as_str()));
        }
        let request = request.body(Full::new(body)).map_err(Cause::Request)?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(Cause::Http)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(body_cause)?;
            Ok((status, body.to_bytes()))
        };
        // The connection only moves while it is polled; its own end is news only if the answer did not come first.
        let driven = async {
            match connection.await {
                Ok(()) => std::future::pending().await,
                Err(error) => Err(Cause::Http(error)),
            }
        };
        tokio::select! { biased; answer = answer => answer, failed = driven => failed }
    }

    fn error(&self, path: &str, cause: Cause) -> CallError {
        CallError { path: path.to_owned(), address: self.address, cause }
    }
}

/// Connects, in attempts that grow longer, for [`CONNECT_TIMEOUT`] in all.
async fn connect(address: SocketAddr) -> Result<TcpStream, Cause> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let mut attempt = FIRST_CONNECT_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Cause::Timeout(CONNECT_TIMEOUT));
        }
        match timeout(attempt.min(left), TcpStream::connect(address)).await {
            Ok(connected) => return connected.map_err(Cause::Connect),
            Err(_elapsed) => attempt *= 2,
        }
    }
}

/// A call that brought no answer to use.
#[derive(Debug, thiserror::Error)]
#[error("calling {path} of the verifier at {address}")]
pub struct CallError {
    path: String,
    address: SocketAddr,
    #[source]
    cause: Cause,
}

impl CallError {
    /// Whether the same call may succeed later: the network, a restart or load was in the way. A wrong key or a
    /// refusal is for good.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match &self.cause {
            Cause::Connect(_) | Cause::Tls(_) | Cause::Http(_) | Cause::Timeout(_) => true,
            Cause::Status { status, .. } => status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS,
            Cause::Key(_) | Cause::Request(_) | Cause::TooLarge | Cause::Json(_) => false,
        }
    }

    /// The HTTP status of a refusal.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match &self.cause {
            Cause::Status { status, .. } => Some(status.as_u16()),
            _ => None,
        }
    }
}

/// What was in the way.
#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error("no connection")]
    Connect(#[source] io::Error),
    #[error("TLS failed")]
    Tls(#[source] io::Error),
    #[error("the server does not have the key that our settings pin")]
    Key(#[source] io::Error),
    #[error("HTTP failed")]
    Http(#[source] hyper::Error),
    #[error("the request cannot be built")]
    Request(#[source] hyper::http::Error),
    #[error("no answer in {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("the answer has more than {MAX_ANSWER_BYTES} octets")]
    TooLarge,
    #[error("the answer is not the JSON that we expect")]
    Json(#[source] serde_json::Error),
    #[error("{status}: {detail}")]
    Status { status: StatusCode, detail: String },
}

fn tls_cause(error: io::Error) -> Cause {
    let rustls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match rustls {
        Some(rustls::Error::InvalidCertificate(_)) => Cause::Key(error),
        _ => Cause::Tls(error),
    }
}

fn body_cause(error: Box<dyn std::error::Error + Send + Sync>) -> Cause {
    match error.downcast::<hyper::Error>() {
        Ok(error) => Cause::Http(*error),
        Err(error) if error.is::<LengthLimitError>() => Cause::TooLarge,
        Err(error) => Cause::Tls(io::Error::other(error)),
    }
}

/// Reads an answer: JSON, or nothing at all where nothing is expected; a problem document otherwise.
fn decode<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, Cause> {
    if status.is_success() {
        let body = if body.is_empty() { b"null" } else { body };
        return serde_json::from_slice(body).map_err(Cause::Json);
    }
    let detail = match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => printable(&problem.detail),
        Err(_) => "without a reason".to_owned(),
    };
    Err(Cause::Status { status, detail })
}

/// At most 500 characters, none of which moves a console's cursor.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(500).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use assay_wire::agent::{EnrolChallenge, EvidenceRequest, ReleaseStatus, SealedGrant, Verdict};
    use proptest::prelude::*;

    #[test]
    fn an_empty_answer_is_nothing() {
        decode::<()>(StatusCode::NO_CONTENT, b"").unwrap();
        decode::<()>(StatusCode::OK, b"null").unwrap();
        assert!(matches!(decode::<Verdict>(StatusCode::OK, b""), Err(Cause::Json(_))));
    }

    #[test]
    fn a_problem_is_told_in_its_own_words_without_control_characters() {
        let body = br#"{"type":"x","status":403,"detail":"not \u001b[2Jyou"}"#;
        let cause = decode::<Verdict>(StatusCode::FORBIDDEN, body).unwrap_err();
        assert_eq!(cause.to_string(), "403 Forbidden: not  [2Jyou");
        let cause = decode::<Verdict>(StatusCode::BAD_GATEWAY, b"<html>").unwrap_err();
        assert_eq!(cause.to_string(), "502 Bad Gateway: without a reason");
    }

    proptest! {
        #[test]
        fn answers_never_panic(status in 100_u16..600, body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let status = StatusCode::from_u16(status).unwrap();
            let _ = decode::<EnrolChallenge>(status, &body);
            let _ = decode::<EvidenceRequest>(status, &body);
            let _ = decode::<Verdict>(status, &body);
            let _ = decode::<ReleaseStatus>(status, &body);
            let _ = decode::<SealedGrant>(status, &body);
        }
    }
}
