//! The boot files' HTTP server: plain HTTP on an interface's address, files from memory, one URL shape.
//!
//! Firmware and iPXE are simple clients: they want `HEAD` to be `GET` without body, an exact `Content-Length`, no
//! redirects, and single ranges. Everything that is not `/boot/<token>/<file>` with a good token gets one constant 404.

use crate::boot_token::BootToken;
use crate::range::{Selection, select};
use crate::site::{BootFile, FileName, Site, unmapped};
use bytes::Bytes;
use http_body_util::Either;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use hyper::http::HeaderValue;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::dhcp::server::lock;

/// The server on one interface.
#[derive(Debug)]
pub struct BootHttp {
    listener: TcpListener,
    connections: Arc<Mutex<Connections>>,
}

/// The listening socket could not be had.
#[derive(Debug, thiserror::Error)]
#[error("listening for boot file requests on {address}")]
pub struct HttpListenError {
    address: SocketAddr,
    #[source]
    cause: io::Error,
}

impl BootHttp {
    /// Listens on `address`; with `interface`, for connections that arrive there only.
    ///
    /// # Errors
    /// The address or the interface is not to be had.
    pub fn bind(address: SocketAddr, interface: Option<&str>) -> Result<Self, HttpListenError> {
        let open = || -> io::Result<TcpListener> {
            let kind = socket2::Type::STREAM.nonblocking();
            let socket = socket2::Socket::new(socket2::Domain::for_address(address), kind, None)?;
            if let Some(interface) = interface {
                socket.bind_device(Some(interface.as_bytes()))?;
            }
            // Connections of a former process may linger in TIME_WAIT.
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(128)?;
            TcpListener::from_std(socket.into())
        };
        let listener = open().map_err(|cause| HttpListenError { address, cause })?;
        Ok(Self { listener, connections: Arc::default() })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`; then connections are cut: a client that misses its file asks again.
    pub async fn serve(self, site: Arc<Site>, shutdown: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => self.spawn(stream, peer, Arc::clone(&site), shutdown.clone()),
                Err(error) => {
                    tracing::warn!(event = "http.accept_failed", %error);
                    // Out of file descriptors, most likely: do not spin.
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream, peer: SocketAddr, site: Arc<Site>, shutdown: CancellationToken) {
        let address = unmapped(peer);
        let Some(place) = Place::take(&self.connections, address) else {
            tracing::debug!(event = "http.connection_refused", %peer, "too many connections");
            return;
        };
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(move |request| {
                let response = respond(&request, address, &site);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_headers(MAX_HEADERS)
                .max_buf_size(MAX_BUFFER_BYTES)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = shutdown.cancelled() => {}
                ended = tokio::time::timeout(CONNECTION_LIFETIME, connection) => match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(event = "http.connection_failed", %peer, %error),
                    Err(_elapsed) => tracing::info!(event = "http.connection_too_old", %peer, "a connection was cut"),
                },
            }
        });
    }
}

type FileResponse = Response<Either<FileBody, http_body_util::Empty<Bytes>>>;

fn respond(request: &Request<Incoming>, peer: IpAddr, site: &Site) -> FileResponse {
    let head = request.method() == Method::HEAD;
    if !head && request.method() != Method::GET {
        let mut response = empty(StatusCode::METHOD_NOT_ALLOWED);
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let file = parse_path(request.uri().path()).and_then(|(token, name)| site.boot_file(peer, token, name));
    let Some(file) = file else {
        tracing::debug!(event = "http.not_found", %peer);
        return empty(StatusCode::NOT_FOUND);
    };
    let length = file.content.len();
    let range = request.headers().get(RANGE).map(HeaderValue::as_bytes);
    let (status, selected) = match select(range, length) {
        Selection::Whole => (StatusCode::OK, 0..length),
        Selection::Part(part) => (StatusCode::PARTIAL_CONTENT, part),
        Selection::Unsatisfiable => {
            let mut response = empty(StatusCode::RANGE_NOT_SATISFIABLE);
            put(&mut response, CONTENT_RANGE, &format!("bytes */{length}"));
            return response;
        }
    };
    let body = if head {
        Either::Right(http_body_util::Empty::new())
    } else {
        Either::Left(FileBody { rest: file.content.slice(selected.clone()), file: Some(file.clone()) })
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    put(&mut response, CONTENT_LENGTH, &selected.len().to_string());
    if status == StatusCode::PARTIAL_CONTENT {
        let last = selected.end.saturating_sub(1);
        put(&mut response, CONTENT_RANGE, &format!("bytes {}-{last}/{length}", selected.start));
    }
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(file.name.content_type()));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// `/boot/<token>/<file>` and nothing else: no decoding, no normalising, so nothing to get wrong in either.
fn parse_path(path: &str) -> Option<(BootToken, FileName)> {
    let (token, name) = path.strip_prefix("/boot/")?.split_once('/')?;
    let name = FileName::ALL.into_iter().find(|file| file.as_str() == name)?;
    Some((token.parse().ok()?, name))
}

fn empty(status: StatusCode) -> FileResponse {
    let mut response = Response::new(Either::Right(http_body_util::Empty::new()));
    *response.status_mut() = status;
    response
}

fn put(response: &mut FileResponse, name: hyper::header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

/// A file's bytes, shared with every other reader, in pieces; when the last piece has been taken the file is served.
/// hyper takes a piece when its own buffer has drained, so that is within a buffer of when the client had it.
struct FileBody {
    rest: Bytes,
    file: Option<BootFile>,
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let length = self.rest.len().min(PIECE_BYTES);
        let piece = self.rest.split_to(length);
        if self.rest.is_empty()
            && let Some(file) = self.file.take()
        {
            file.served();
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

/// How many connections there are, by address.
#[derive(Debug, Default)]
struct Connections {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// One connection's place; given back when dropped.
struct Place {
    connections: Arc<Mutex<Connections>>,
    address: IpAddr,
}

impl Place {
    fn take(connections: &Arc<Mutex<Connections>>, address: IpAddr) -> Option<Self> {
        let mut counted = lock(connections);
        let of_address = counted.by_address.get(&address).copied().unwrap_or_default();
        if counted.total >= MAX_CONNECTIONS || of_address >= MAX_CONNECTIONS_PER_ADDRESS {
            return None;
        }
        counted.total += 1;
        counted.by_address.insert(address, of_address + 1);
        Some(Self { connections: Arc::clone(connections), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counted = lock(&self.connections);
        counted.total = counted.total.saturating_sub(1);
        let left = counted.by_address.get(&self.address).copied().unwrap_or_default().saturating_sub(1);
        if left == 0 {
            counted.by_address.remove(&self.address);
        } else {
            counted.by_address.insert(self.address, left);
        }
    }
}

const MAX_CONNECTIONS: usize = 1024;
const MAX_CONNECTIONS_PER_ADDRESS: usize = 8;
const MAX_HEADERS: usize = 32;
/// hyper's smallest.
const MAX_BUFFER_BYTES: usize = 64 * 1024;
const PIECE_BYTES: usize = 64 * 1024;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than any file takes, shorter than anybody's patience: the bound on a client that reads an octet a minute.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
