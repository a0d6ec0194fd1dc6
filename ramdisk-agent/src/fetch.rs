//! Fetches the settings document by plain HTTP, with bounds on time and size. What it brings is not believed: it is
//! measured first ([`crate::settings`]).

use crate::settings::MAX_SETTINGS_BYTES;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::Request;
use hyper::header::{CONNECTION, HOST};
use hyper_util::rt::TokioIo;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use url::{Host, Url};

const TIMEOUT: Duration = Duration::from_secs(15);

/// Fetches the document at `url`.
///
/// # Errors
/// See [`FetchError`].
pub async fn settings_document(url: &Url) -> Result<Bytes, FetchError> {
    let address = address(url).ok_or_else(|| FetchError::Url { url: url.to_string() })?;
    timeout(TIMEOUT, get(url, address)).await.unwrap_or(Err(FetchError::Timeout { address }))
}

/// Why there is no document. The URL's path holds the boot's token, so no error shows it.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Not a URL that this client speaks.
    #[error("fetching the agent's settings: `{url}` is not http:// with an IP address")]
    Url {
        /// The URL.
        url: String,
    },
    /// No connection.
    #[error("fetching the agent's settings from {address}: no connection")]
    Connect {
        /// The server.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// HTTP failed.
    #[error("fetching the agent's settings from {address}: HTTP failed")]
    Http {
        /// The server.
        address: SocketAddr,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server refused.
    #[error("fetching the agent's settings from {address}: it answered {status}")]
    Status {
        /// The server.
        address: SocketAddr,
        /// HTTP status code.
        status: u16,
    },
    /// Too slow.
    #[error("fetching the agent's settings from {address}: no answer in {} s", TIMEOUT.as_secs())]
    Timeout {
        /// The server.
        address: SocketAddr,
    },
}

impl FetchError {
    /// Whether the same fetch may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Url { .. } => false,
            Self::Connect { .. } | Self::Http { .. } | Self::Timeout { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429,
        }
    }
}

fn address(url: &Url) -> Option<SocketAddr> {
    let ip = match url.host()? {
        Host::Ipv4(ip) => IpAddr::V4(ip),
        Host::Ipv6(ip) => IpAddr::V6(ip),
        Host::Domain(_) => return None,
    };
    (url.scheme() == "http").then_some(SocketAddr::new(ip, url.port_or_known_default()?))
}

async fn get(url: &Url, address: SocketAddr) -> Result<Bytes, FetchError> {
    let http = |source: Box<dyn std::error::Error + Send + Sync>| FetchError::Http { address, source };
    let tcp = TcpStream::connect(address).await.map_err(|source| FetchError::Connect { address, source })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await.map_err(|e| http(e.into()))?;
    let request = Request::get(url[url::Position::BeforePath..url::Position::AfterQuery].to_owned())
        .header(HOST, address.to_string())
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| http(e.into()))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|e| http(e.into()))?;
        let status = response.status().as_u16();
        if status != 200 {
            return Err(FetchError::Status { address, status });
        }
        Ok(Limited::new(response.into_body(), MAX_SETTINGS_BYTES).collect().await.map_err(http)?.to_bytes())
    };
    let driven = async {
        match connection.await {
            Ok(()) => std::future::pending().await,
            Err(error) => Err(http(error.into())),
        }
    };
    tokio::select! { biased; answer = answer => answer, failed = driven => failed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    /// Serves one connection with `answer`, and returns the request's head.
    async fn serve(answer: Vec<u8>) -> (Result<Bytes, FetchError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}/boot/t0ken/settings.json", listener.local_addr().unwrap())).unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            // The client may hang up on an answer that is too long.
            let _ = stream.write_all(&answer).await;
            String::from_utf8(head).unwrap()
        };
        tokio::join!(settings_document(&url), server)
    }

    #[tokio::test]
    async fn fetches_a_document() {
        let (answer, head) = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}".to_vec()).await;
        assert_eq!(answer.unwrap(), "{}");
        assert!(head.starts_with("GET /boot/t0ken/settings.json HTTP/1.1\r\n"), "{head}");
    }

    #[tokio::test]
    async fn refuses_what_is_too_long_or_not_ok() {
        let mut long = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n".to_vec();
        long.resize(long.len() + 100_000, b' ');
        assert!(matches!(serve(long).await.0, Err(FetchError::Http { .. })));
        let (answer, _) = serve(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec()).await;
        let error = answer.unwrap_err();
        assert!(!error.is_transient() && error.to_string().ends_with("it answered 404"), "{error}");
        assert!(!error.to_string().contains("t0ken"));
    }

    #[tokio::test]
    async fn speaks_only_http_to_addresses() {
        for url in ["https://127.0.0.1/x", "http://name/x", "ftp://127.0.0.1/x", "file:///etc/passwd"] {
            let error = settings_document(&Url::parse(url).unwrap()).await.unwrap_err();
            assert!(matches!(error, FetchError::Url { .. }), "{url}: {error}");
        }
    }
}
