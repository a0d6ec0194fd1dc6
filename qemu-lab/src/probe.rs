//! Probe frames: sent without pause from one station, looked for at another. They say whether a switch port carries
//! frames between two networks, whatever the switch says.

use crate::error::{LabError, Result};
use crate::netns::Netns;
use socket2::SockRef;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Frames under way. Dropping it stops them.
#[derive(Debug)]
pub struct Probe {
    began: Instant,
    sightings: Arc<Mutex<Vec<Sighting>>>,
    _stop: DropGuard,
}

/// A frame that came through. Times since the probe began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sighting {
    /// When it was sent.
    pub sent: Duration,
    /// When it was seen.
    pub seen: Duration,
}

impl Probe {
    /// Sends a broadcast frame every millisecond from `interface` in `from`, and looks for them in `to`.
    #[must_use]
    pub fn start(from: &Netns, interface: &'static str, to: &Netns) -> Self {
        let (began, stop) = (Instant::now(), CancellationToken::new());
        let sightings = Arc::<Mutex<Vec<Sighting>>>::default();
        let (sender, receiver) = (from.clone(), to.clone());
        let (stop_sending, stop_looking) = (stop.clone(), stop.clone());
        let seen = Arc::clone(&sightings);
        tokio::spawn(async move {
            let sent = sender.act(PROBE_LIMIT, move || send(interface, began, stop_sending)).await;
            warn("sending probe frames", &sent);
        });
        tokio::spawn(async move {
            let looked = receiver.act(PROBE_LIMIT, move || look(seen, began, stop_looking)).await;
            warn("looking for probe frames", &looked);
        });
        Self { began, sightings, _stop: stop.drop_guard() }
    }

    /// The time, as sightings have it.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// What came through so far.
    #[must_use]
    pub fn sightings(&self) -> Vec<Sighting> {
        self.sightings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn send(interface: &str, began: Instant, stop: CancellationToken) -> Result<()> {
    let doing = || format!("sending probe frames on {interface}");
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await.map_err(LabError::io(doing()))?;
    socket.set_broadcast(true).map_err(LabError::io(doing()))?;
    // The interface may have no address while its node moves: it is the device that frames must leave by.
    SockRef::from(&socket).bind_device(Some(interface.as_bytes())).map_err(LabError::io(doing()))?;
    let everybody = SocketAddrV4::new(Ipv4Addr::BROADCAST, PROBE_PORT);
    let mut pace = tokio::time::interval(Duration::from_millis(1));
    pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = pace.tick() => {}
        }
        let sent = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // A send may fail while the address changes; the next one is a millisecond away.
        let _may_fail = socket.send_to(&sent.to_be_bytes(), everybody).await;
    }
}

async fn look(seen: Arc<Mutex<Vec<Sighting>>>, began: Instant, stop: CancellationToken) -> Result<()> {
    let doing = "looking for probe frames";
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PROBE_PORT)).await.map_err(LabError::io(doing))?;
    let mut frame = [0_u8; 8];
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            received = socket.recv(&mut frame) => {
                received.map_err(LabError::io(doing))?;
                let sighting = Sighting { sent: Duration::from_nanos(u64::from_be_bytes(frame)), seen: began.elapsed() };
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(sighting);
            }
        }
    }
}

fn warn(doing: &str, result: &Result<()>) {
    if let Err(error) = result {
        tracing::error!(event = "probe.failed", error = error.chain(), "{doing} failed");
    }
}

const PROBE_PORT: u16 = 9;
const PROBE_LIMIT: Duration = Duration::from_secs(3600);
