//! Looks at all frames that pass in a network namespace, and counts them by who sent them. It says what reached a place,
//! whatever switch, firewall or address says.

use crate::error::{LabError, Result};
use crate::netns::Netns;
use assay_wire::net::MacAddr;
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::HashMap;
use std::io::Read as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Frames being counted. Dropping it ends that.
#[derive(Debug)]
pub struct Frames {
    sent_by: Arc<Mutex<HashMap<[u8; 6], u64>>>,
    _stop: DropGuard,
}

impl Frames {
    /// Counts, from now on, the frames that pass in `netns`, on any of its interfaces.
    ///
    /// # Errors
    /// The socket is not to be had.
    pub async fn count(netns: &Netns) -> Result<Self> {
        let doing = format!("looking at the frames of {netns}");
        let opening = doing.clone();
        // A socket stays in the namespace that it was made in.
        let open = move || async move {
            let every = Protocol::from(i32::from(EVERY_PROTOCOL.to_be()));
            Socket::new(Domain::PACKET, Type::RAW, Some(every)).map_err(LabError::io(opening))
        };
        let socket = netns.act(OPEN_LIMIT, open).await?;
        // So that whoever looks sees that nobody wants to know any more.
        socket.set_read_timeout(Some(LOOK_INTERVAL)).map_err(LabError::io(doing))?;
        let (sent_by, stop) = (Arc::<Mutex<HashMap<_, _>>>::default(), CancellationToken::new());
        let (counted, stopped) = (Arc::clone(&sent_by), stop.clone());
        std::thread::spawn(move || look(&socket, &counted, &stopped));
        Ok(Self { sent_by, _stop: stop.drop_guard() })
    }

    /// How many frames of this sender were seen. Where a namespace bridges, each is seen on every interface that it
    /// passes.
    #[must_use]
    pub fn from(&self, sender: MacAddr) -> u64 {
        let sent_by = self.sent_by.lock().unwrap_or_else(PoisonError::into_inner);
        sent_by.get(&sender.octets()).copied().unwrap_or(0)
    }
}

fn look(mut socket: &Socket, sent_by: &Mutex<HashMap<[u8; 6], u64>>, stop: &CancellationToken) {
    let mut frame = [0_u8; HEADER_BYTES];
    while !stop.is_cancelled() {
        // An interface that goes down is an error, once; so is a wait that was in vain.
        let Ok(HEADER_BYTES) = socket.read(&mut frame) else { continue };
        let mut sender = [0; 6];
        sender.copy_from_slice(&frame[6..12]);
        *sent_by.lock().unwrap_or_else(PoisonError::into_inner).entry(sender).or_default() += 1;
    }
}

/// `ETH_P_ALL`.
const EVERY_PROTOCOL: u16 = 3;
/// Destination, source and type.
const HEADER_BYTES: usize = 14;
const OPEN_LIMIT: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
