//! The relay: a TCP port on the provisioning network whose every connection is joined to a Unix socket, behind which
//! the verifier speaks TLS. The gateway sees ciphertext only, and holds no key.

use assay_service::CancellationToken;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Connections at a time; a node needs one.
const MAX_CONNECTIONS: usize = 256;
/// The longest that one connection lives: longer than any long poll, and a bound on what a silent peer costs.
const MAX_LIFETIME: Duration = Duration::from_secs(600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After `accept` failed, for want of file descriptors say.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Relays until `shutdown`.
pub(crate) async fn relay(listener: TcpListener, verifier: PathBuf, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let verifier: Arc<Path> = verifier.into();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(event = "relay.accept_failed", %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!(event = "relay.refused", %peer, limit = MAX_CONNECTIONS, "too many connections");
            continue;
        };
        let (verifier, shutdown) = (Arc::clone(&verifier), shutdown.clone());
        tokio::spawn(async move {
            let _slot = slot;
            tokio::select! {
                () = shutdown.cancelled() => {}
                ended = timeout(MAX_LIFETIME, join(stream, &verifier)) => log_end(peer, &ended),
            }
        });
    }
}

async fn join(mut stream: TcpStream, verifier: &Path) -> io::Result<(u64, u64)> {
    let _latency_only = stream.set_nodelay(true);
    let mut upstream = timeout(CONNECT_TIMEOUT, UnixStream::connect(verifier)).await??;
    tokio::io::copy_bidirectional(&mut stream, &mut upstream).await
}

fn log_end(peer: SocketAddr, ended: &Result<io::Result<(u64, u64)>, tokio::time::error::Elapsed>) {
    match ended {
        Ok(Ok((up, down))) => tracing::debug!(event = "relay.closed", %peer, up, down, "relayed connection closed"),
        Ok(Err(error)) => tracing::warn!(event = "relay.failed", %peer, %error, "relaying to the verifier"),
        Err(_elapsed) => tracing::warn!(event = "relay.expired", %peer, "relayed connection lived too long"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn bytes_cross_both_ways_and_a_missing_verifier_closes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("verifier.sock");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let relaying = tokio::spawn(relay(listener, path.clone(), shutdown.clone()));

        let mut early = TcpStream::connect(address).await.unwrap();
        assert_eq!(early.read(&mut [0; 8]).await.unwrap_or(0), 0, "nothing behind the relay");

        let verifier = tokio::net::UnixListener::bind(&path).unwrap();
        let mut agent = TcpStream::connect(address).await.unwrap();
        agent.write_all(b"hello").await.unwrap();
        let (mut served, _) = verifier.accept().await.unwrap();
        let mut five = [0; 5];
        served.read_exact(&mut five).await.unwrap();
        assert_eq!(&five, b"hello");
        served.write_all(b"there").await.unwrap();
        drop(served);
        let mut answer = String::new();
        agent.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "there");

        shutdown.cancel();
        relaying.await.unwrap();
    }
}
