//! Row D5 on the real listener: callers that are slow, idle or many hold nothing for long, and take nothing from others
//! (CVE-2023-38200 is what happens otherwise).

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

use assay_service::CancellationToken;
use assay_service::auth::Tokens;
use assay_service::clock::SystemClock;
use assay_service::http::{Limits, Listener, ServiceContext, serve_within};
use assay_service::tls::{SiteIdentity, client_config};
use axum::Router;
use axum::routing::{get, post};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

struct Server {
    address: SocketAddr,
    ca_pem: String,
    shutdown: CancellationToken,
    _folder: TempDir,
}

impl Server {
    async fn start(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let identity = SiteIdentity::load_or_create(folder.path(), &[]).unwrap();
        let (ca_pem, shutdown) = (identity.ca_pem().to_owned(), CancellationToken::new());
        let context = ServiceContext {
            clock: Arc::new(SystemClock),
            tokens: Arc::new(Tokens::load_or_create(folder.path()).unwrap()),
            identity: Arc::new(identity),
            shutdown: shutdown.clone(),
        };
        let router = Router::new()
            .route("/length", post(async |body: String| body.len().to_string()))
            .route("/hello", get(async || "hello"));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { serve_within(limits, Listener::Tls(listener), router, &context).await.unwrap() });
        Self { address, ca_pem, shutdown, _folder: folder }
    }

    async fn connect_from(&self, host: u8) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into()).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    async fn tls_from(&self, host: u8) -> std::io::Result<TlsStream<TcpStream>> {
        let connector = TlsConnector::from(Arc::new(client_config(&self.ca_pem).unwrap()));
        connector.connect("localhost".try_into().unwrap(), self.connect_from(host).await).await
    }

    /// Asks as everybody else does, and must be answered at once.
    async fn answers(&self) {
        let mut stream = self.tls_from(9).await.unwrap();
        stream.write_all(b"GET /hello HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(Duration::from_secs(5), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{answer}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// How long the server keeps a connection on which nothing more is said, and what it said last.
async fn kept(mut stream: impl AsyncRead + Unpin) -> (Duration, String) {
    let (since, mut said) = (Instant::now(), Vec::new());
    // However it ends: an orderly end, or a connection that is reset.
    let ended = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut said)).await;
    assert!(ended.is_ok(), "the connection was never ended");
    (since.elapsed(), String::from_utf8_lossy(&said).into_owned())
}

fn quick() -> Limits {
    let brief = Duration::from_millis(300);
    Limits { handshake: brief, header: brief, body: brief, ..Limits::default() }
}

#[tokio::test]
async fn d5_a_slow_handshake_head_or_body_is_cut_off_and_an_idle_connection_too() {
    let server = Server::start(quick()).await;
    let silent = server.connect_from(2).await;
    let mut half_a_head = server.tls_from(2).await.unwrap();
    half_a_head.write_all(b"GET /hello HTTP/1.1\r\nhost: loc").await.unwrap();
    let mut half_a_body = server.tls_from(2).await.unwrap();
    half_a_body.write_all(b"POST /length HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf").await.unwrap();
    let mut idle = server.tls_from(2).await.unwrap();
    idle.write_all(b"GET /hello HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    server.answers().await;
    let (silent, head, body, idle) = tokio::join!(kept(silent), kept(half_a_head), kept(half_a_body), kept(idle));
    for (what, (kept, _)) in [("silence", &silent), ("half a head", &head), ("half a body", &body), ("idleness", &idle)]
    {
        assert!(*kept < Duration::from_secs(5), "{what} held a connection for {kept:?}");
    }
    assert!(!body.1.contains("200"), "half a body was taken for a whole one: {}", body.1);
    assert!(idle.1.ends_with("hello"), "{}", idle.1);
}

#[tokio::test]
async fn d5_a_body_that_trickles_is_cut_off_although_something_always_comes() {
    let server = Server::start(Limits { body: Duration::from_millis(700), ..quick() }).await;
    let stream = server.tls_from(2).await.unwrap();
    let (read, mut write) = tokio::io::split(stream);
    let trickle = tokio::spawn(async move {
        write.write_all(b"POST /length HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n").await?;
        let mut drops = tokio::time::interval(Duration::from_millis(50));
        loop {
            drops.tick().await;
            write.write_all(b"x").await?;
            write.flush().await?;
        }
        #[expect(unreachable_code, reason = "names the error type")]
        Ok::<(), std::io::Error>(())
    });
    let (kept, said) = kept(read).await;
    trickle.abort();
    assert!(kept < Duration::from_secs(5), "a trickle held a connection for {kept:?}");
    assert!(!said.contains("200"), "{said}");
}

#[tokio::test]
async fn d5_one_address_cannot_take_the_connections_of_others() {
    let limits = Limits { connections_per_peer: 8, connections: 12, ..Limits::default() };
    let server = Server::start(limits).await;
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(server.tls_from(2).await.unwrap());
    }
    for _ in 0..20 {
        assert!(server.tls_from(2).await.is_err(), "a ninth connection from one address was served");
    }
    server.answers().await;
    // What one gives back, it may have again.
    held.clear();
    let again = async {
        while server.tls_from(2).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), again).await.unwrap();
}

#[tokio::test]
async fn d5_beyond_all_connections_the_newest_goes_and_the_established_stay() {
    let server = Server::start(Limits { connections: 3, ..Limits::default() }).await;
    let mut first = server.tls_from(2).await.unwrap();
    let _others = (server.tls_from(3).await.unwrap(), server.tls_from(4).await.unwrap());
    assert!(server.tls_from(5).await.is_err(), "more connections than there may be");
    first.write_all(b"GET /hello HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(kept(first).await.1.ends_with("hello"));
}
