//! HTTP listeners: TLS over TCP, TLS over a Unix socket (behind a gateway's relay), plain over a Unix socket (local
//! control), plain over TCP (network boot only). This file owns the services' sockets.

use crate::auth::Tokens;
use crate::clock::Clock;
use crate::owner_socket;
use crate::tls::SiteIdentity;
use axum::body::{Body, HttpBody as _};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::{Extension, Router};
use futures_util::{StreamExt as _, stream};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower_http::timeout::TimeoutLayer;

const MAX_BODY_BYTES: usize = 1 << 20;
/// Until a response begins; longer than any long poll.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(90);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// After `accept` failed (too many open files, say): long enough not to spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// What callers may take before they have shown who they are, and how slowly. Beyond a limit the newest connection goes
/// and the established stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections of one listener. One costs some 40 KiB.
    pub connections: usize,
    /// Connections from one address (IPv6: one /64) to one listener. A node needs two or three, another service a few
    /// more.
    pub connections_per_peer: usize,
    /// For the TLS handshake.
    pub handshake: Duration,
    /// For a request's head, and for the next request on a connection that stays open: idle connections are closed.
    pub header: Duration,
    /// For a request's body, all of it.
    pub body: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 12_288,
            connections_per_peer: 64,
            handshake: Duration::from_secs(10),
            header: Duration::from_secs(15),
            body: Duration::from_secs(30),
        }
    }
}

/// What every service is given.
#[derive(Clone)]
pub struct ServiceContext {
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Who may call.
    pub tokens: Arc<Tokens>,
    /// What to serve TLS with.
    pub identity: Arc<SiteIdentity>,
    /// Cancelled when the process shall end.
    pub shutdown: CancellationToken,
}

/// Where to listen.
#[derive(Debug)]
pub enum Listener {
    /// TLS 1.3 over TCP.
    Tls(TcpListener),
    /// TLS 1.3 over a Unix socket: the far end of a relay.
    UnixTls(PathBuf),
    /// Plain HTTP over a Unix socket that only this user can open.
    Unix(PathBuf),
    /// Plain HTTP over TCP: only for what firmware fetches.
    Plain(TcpListener),
}

/// Why a listener cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("listening on {address}")]
pub struct HttpError {
    address: String,
    source: io::Error,
}

/// The other end of a TCP connection, for handlers that limit by address: an axum `Extension`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerAddress(pub SocketAddr);

/// Binds TCP.
///
/// # Errors
/// Names the address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, HttpError> {
    TcpListener::bind(address).await.map_err(|source| HttpError { address: address.to_string(), source })
}

/// Serves `router` until `context.shutdown`; then lets requests under way finish, for a few seconds.
///
/// # Errors
/// A Unix socket cannot be bound.
pub async fn serve(listener: Listener, router: Router, context: &ServiceContext) -> Result<(), HttpError> {
    serve_within(Limits::default(), listener, router, context).await
}

/// [`serve`] with other limits.
///
/// # Errors
/// A Unix socket cannot be bound.
pub async fn serve_within(
    limits: Limits,
    listener: Listener,
    router: Router,
    context: &ServiceContext,
) -> Result<(), HttpError> {
    let router = router
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(move |request: Request, next: Next| next.run(in_time(request, limits.body))))
        .layer(TimeoutLayer::with_status_code(StatusCode::SERVICE_UNAVAILABLE, REQUEST_TIMEOUT))
        .layer(Extension(Arc::clone(&context.tokens)));
    let tls = TlsAcceptor::from(context.identity.server_config());
    let server = Server {
        router,
        graceful: GracefulShutdown::new(),
        slots: Arc::new(Semaphore::new(limits.connections)),
        peers: Arc::default(),
        limits,
        shutdown: context.shutdown.clone(),
    };
    match listener {
        Listener::Tls(tcp) => server.accept_tcp(tcp, Some(tls)).await,
        Listener::Plain(tcp) => server.accept_tcp(tcp, None).await,
        Listener::UnixTls(path) => server.accept_unix(bind_unix(&path)?, Some(tls)).await,
        Listener::Unix(path) => server.accept_unix(bind_unix(&path)?, None).await,
    }
    Ok(())
}

struct Server {
    router: Router,
    graceful: GracefulShutdown,
    slots: Arc<Semaphore>,
    peers: Arc<Peers>,
    limits: Limits,
    shutdown: CancellationToken,
}

/// How many connections each address has open.
#[derive(Debug, Default)]
struct Peers(Mutex<HashMap<IpAddr, usize>>);

impl Peers {
    /// Counts one more, unless there are `most` already.
    fn enter(self: &Arc<Self>, peer: IpAddr, most: usize) -> Option<PeerSlot> {
        let key = match peer {
            IpAddr::V4(_) => peer,
            // A host has a whole /64 to choose addresses from.
            IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
                Some(v4) => v4.into(),
                None => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
            },
        };
        let mut open = self.open();
        let count = open.entry(key).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(PeerSlot { peers: Arc::clone(self), key })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection of an address, until dropped.
#[derive(Debug)]
struct PeerSlot {
    peers: Arc<Peers>,
    key: IpAddr,
}

impl Drop for PeerSlot {
    fn drop(&mut self) {
        let mut open = self.peers.open();
        if let Entry::Occupied(mut count) = open.entry(self.key) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// A request whose body fails when it has not come by then: who trickles octets holds nothing for long.
fn in_time(request: Request, limit: Duration) -> Request {
    if request.body().is_end_stream() {
        return request;
    }
    let deadline = tokio::time::Instant::now() + limit;
    request.map(|body| {
        Body::from_stream(stream::try_unfold(body.into_data_stream(), move |mut chunks| async move {
            match tokio::time::timeout_at(deadline, chunks.next()).await {
                Ok(Some(chunk)) => chunk.map(|chunk| Some((chunk, chunks))),
                Ok(None) => Ok(None),
                Err(elapsed) => Err(axum::Error::new(elapsed)),
            }
        }))
    })
}

impl Server {
    async fn accept_tcp(self, listener: TcpListener, tls: Option<TlsAcceptor>) {
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let _latency_only = stream.set_nodelay(true);
                    let Some(peer_slot) = self.peers.enter(peer.ip(), self.limits.connections_per_peer) else {
                        tracing::debug!(event = "http.peer_refused", %peer, "too many connections from one address");
                        continue;
                    };
                    let router = self.router.clone().layer(Extension(PeerAddress(peer)));
                    self.spawn(stream, tls.clone(), router, Some(peer_slot));
                }
                Err(error) => back_off(&error).await,
            }
        }
        self.drain().await;
    }

    async fn accept_unix(self, listener: UnixListener, tls: Option<TlsAcceptor>) {
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => self.spawn(stream, tls.clone(), self.router.clone(), None),
                Err(error) => back_off(&error).await,
            }
        }
        self.drain().await;
    }

    /// Serves one connection in a task of its own; over the limit the newest is dropped and the established stay.
    fn spawn<S>(&self, stream: S, tls: Option<TlsAcceptor>, router: Router, peer_slot: Option<PeerSlot>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            tracing::warn!(event = "http.connection_refused", limit = self.limits.connections, "too many connections");
            return;
        };
        let (watcher, limits) = (self.graceful.watcher(), self.limits);
        tokio::spawn(async move {
            let _slots = (slot, peer_slot);
            match tls {
                None => serve_connection(stream, router, watcher, limits).await,
                Some(acceptor) => match tokio::time::timeout(limits.handshake, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => serve_connection(stream, router, watcher, limits).await,
                    Ok(Err(error)) => tracing::debug!(event = "tls.handshake_failed", %error, "TLS handshake failed"),
                    Err(_elapsed) => tracing::debug!(event = "tls.handshake_slow", "TLS handshake took too long"),
                },
            }
        });
    }

    async fn drain(self) {
        if tokio::time::timeout(DRAIN_TIMEOUT, self.graceful.shutdown()).await.is_err() {
            tracing::warn!(event = "http.drain_timeout", "requests were still under way at shutdown");
        }
    }
}

async fn serve_connection<S>(stream: S, router: Router, watcher: hyper_util::server::graceful::Watcher, limits: Limits)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.header);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).into_owned();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(event = "http.connection_failed", %error, "connection ended with an error");
    }
}

fn bind_unix(path: &Path) -> Result<UnixListener, HttpError> {
    let bound = owner_socket::replace(path, |path| UnixListener::bind(path));
    bound.map_err(|source| HttpError { address: path.display().to_string(), source })
}

async fn back_off(error: &io::Error) {
    tracing::warn!(event = "http.accept_failed", %error, "cannot accept a connection");
    tokio::time::sleep(ACCEPT_BACKOFF).await;
}
