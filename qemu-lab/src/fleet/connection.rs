//! A soft node's connections: HTTP over TLS, from an address of the node's own, one at a time, kept open or not.

use assay_wire::problem::Problem;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde::de::DeserializeOwned;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;

/// One caller of a verifier's agent API.
pub(super) struct Connection {
    verifier: SocketAddr,
    source: Ipv4Addr,
    tls: TlsConnector,
    kept: bool,
    open: Option<SendRequest<Full<Bytes>>>,
}

/// Why a call did not give what was asked for.
#[derive(Debug, Clone)]
pub(super) enum CallFailed {
    /// The verifier answered with a problem.
    Refused {
        /// The HTTP status.
        status: u16,
        /// The problem's stable word.
        kind: String,
        /// What it says.
        detail: String,
    },
    /// It did not answer, or nothing that makes sense.
    Broken(String),
}

impl CallFailed {
    /// The problem's word, or what broke, for counting.
    pub(super) fn word(&self) -> String {
        match self {
            Self::Refused { status, kind, detail } => format!("{status} {kind}: {detail}"),
            Self::Broken(what) => what.clone(),
        }
    }

    pub(super) fn is(&self, wanted: &str) -> bool {
        match self {
            Self::Refused { kind, .. } => kind == wanted,
            Self::Broken(_) => false,
        }
    }

    /// Whether the verifier says that it has too much to do.
    pub(super) fn asks_to_come_again(&self) -> bool {
        match self {
            Self::Refused { status, .. } => matches!(status, 429 | 503),
            Self::Broken(_) => false,
        }
    }
}

impl Connection {
    pub(super) fn new(verifier: SocketAddr, source: Ipv4Addr, tls: Arc<rustls::ClientConfig>, kept: bool) -> Self {
        Self { verifier, source, tls: TlsConnector::from(tls), kept, open: None }
    }

    /// Asks another verifier from now on.
    pub(super) fn turn_to(&mut self, verifier: SocketAddr) {
        (self.verifier, self.open) = (verifier, None);
    }

    pub(super) async fn get<T: DeserializeOwned>(&mut self, path: &str, bearer: &str) -> Result<T, CallFailed> {
        self.call(Method::GET, path, bearer, Bytes::new()).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &mut self,
        path: &str,
        bearer: &str,
        body: &impl serde::Serialize,
    ) -> Result<T, CallFailed> {
        let body = serde_json::to_vec(body).map_err(|cause| CallFailed::Broken(cause.to_string()))?;
        self.call(Method::POST, path, bearer, body.into()).await
    }

    async fn call<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        bearer: &str,
        body: Bytes,
    ) -> Result<T, CallFailed> {
        let answered = tokio::time::timeout(CALL_LIMIT, self.exchange(method, path, bearer, body)).await;
        let (status, body) = match answered {
            Ok(Ok(answer)) => answer,
            Ok(Err(failed)) => {
                self.open = None;
                return Err(failed);
            }
            Err(_elapsed) => {
                self.open = None;
                return Err(CallFailed::Broken("no answer in time".to_owned()));
            }
        };
        if !self.kept {
            self.open = None;
        }
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|cause| CallFailed::Broken(format!("nonsense: {cause}")));
        }
        let (kind, detail) = match serde_json::from_slice(&body) {
            Ok(Problem { kind, detail, .. }) => (kind, detail),
            Err(_) => ("?".to_owned(), "?".to_owned()),
        };
        Err(CallFailed::Refused { status: status.as_u16(), kind, detail })
    }

    async fn exchange(
        &mut self,
        method: Method,
        path: &str,
        bearer: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), CallFailed> {
        // One that the verifier has closed meanwhile is not an error: it closes what is idle.
        if self.open.as_ref().is_none_or(SendRequest::is_closed) {
            self.open = Some(self.connect().await?);
        }
        let Some(sender) = self.open.as_mut() else { return Err(CallFailed::Broken("not connected".to_owned())) };
        let mut request = Request::builder().method(method).uri(path).header(HOST, "verifier");
        if !bearer.is_empty() {
            request = request.header(AUTHORIZATION, format!("Bearer {bearer}"));
        }
        request = request.header(CONTENT_TYPE, "application/json");
        let request = request.body(Full::new(body)).map_err(|cause| CallFailed::Broken(cause.to_string()))?;
        let answer = sender.send_request(request).await.map_err(|cause| broken("sending", &cause))?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(|cause| broken("reading", &cause))?;
        Ok((status, body.to_bytes()))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, CallFailed> {
        let socket = TcpSocket::new_v4().map_err(|cause| broken("opening a socket", &cause))?;
        socket.bind((self.source, 0).into()).map_err(|cause| broken("taking the node's address", &cause))?;
        let stream = socket.connect(self.verifier).await.map_err(|cause| broken("connecting", &cause))?;
        let _latency_only = stream.set_nodelay(true);
        let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
        let stream = self.tls.connect(name, stream).await.map_err(|cause| broken("TLS handshake", &cause))?;
        let (sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(|cause| broken("HTTP handshake", &cause))?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

/// One word for all errors of a kind, so that they can be counted.
fn broken(doing: &str, cause: &dyn std::error::Error) -> CallFailed {
    CallFailed::Broken(format!("{doing}: {cause}"))
}

const CALL_LIMIT: Duration = Duration::from_secs(60);
