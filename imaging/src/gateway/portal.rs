//! The iSCSI portal: accepts TCP connections and hands each to the worker of the export whose node has its peer's
//! address. No octet of an initiator is read here, and none of its connections is kept: what has not logged in is
//! bounded by each worker, and what has no export is closed at once.

use super::supervised::Supervised;
use assay_service::CancellationToken;
use rustix::net::sockopt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

/// A dead initiator is noticed after 30 + 3 * 10 seconds. Not by NOP-In: iPXE closes the connection on one.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
/// After `accept` failed, for want of file descriptors say.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// Of those without an export, one is logged in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Hands over connections, to whom `export_of` says, until `shutdown`.
pub(super) async fn serve(
    listener: TcpListener,
    export_of: impl Fn(IpAddr) -> Option<Arc<Supervised>>,
    shutdown: CancellationToken,
) {
    let mut logged_at: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(event = "portal.accept_failed", %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let Some(export) = export_of(peer.ip().to_canonical()) else {
            if logged_at.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
                logged_at = Some(Instant::now());
                tracing::warn!(event = "portal.no_export", %peer, "a connection from an address that has no export");
            }
            continue;
        };
        if let Err(error) = prepare(&stream) {
            tracing::debug!(event = "portal.socket_options", %peer, %error, "setting socket options");
        }
        // A worker's threads wait for their own connection.
        match stream.into_std().and_then(|stream| stream.set_nonblocking(false).map(|()| stream)) {
            Ok(stream) => export.hand_over(stream, peer),
            Err(error) => tracing::warn!(event = "portal.not_handed_over", %peer, %error, "taking a connection out"),
        }
    }
}

fn prepare(stream: &TcpStream) -> Result<(), rustix::io::Errno> {
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)
}
