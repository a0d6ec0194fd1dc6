//! The export worker, program `assay-export`: parses what one node sends, and holds that node's one export and nothing
//! else. Step 8 of the boot path logs in here.
//!
//! A gateway starts it with one end of a socket pair as standard input, and sends the order and the disk's open files
//! ([`message`]). It opens the disk, gives up all else ([`confine`]), and from then on takes the node's TCP connections
//! from the gateway, which reads none of them. It ends when it is told to, when its order expires, and with its gateway.

#[cfg(feature = "failpoints")]
pub mod attack;
pub(crate) mod confine;
mod connection;
pub mod disk;
mod gate;
mod helpers;
mod hub;
mod latency;
pub(crate) mod log;
pub mod message;
mod outbox;
mod pace;
mod rbd;
pub(crate) mod system_calls;
mod unit;

use crate::store::StoreError;
use crate::store::overlay::HostBoot;
use assay_iscsi::{Authentication, ChapAlgorithms, ChapCredentials, LogicalUnitConfig, Target, TargetConfig};
use assay_service::error::chain;
use assay_wire::imaging::ChapAlgorithms as Chap;
use disk::DiskOrder;
use hub::Hub;
use message::{Confinement, FromWorker, MESSAGE_BYTES, ToWorker, WorkerOrder, receive, send};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
pub(crate) use unit::BLOCK_BYTES;
use unit::Unit;

/// How long initiators get to hear that they should log out.
const FAREWELL: Duration = Duration::from_millis(10);

/// Why a worker does not serve.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    /// The socket to the gateway.
    #[error("hearing from the gateway")]
    Gateway(#[source] io::Error),
    /// No order came first.
    #[error("the gateway gave no order")]
    NoOrder,
    /// The disk.
    #[error("opening the disk")]
    Disk(#[from] disk::DiskError),
    /// What tells this boot of the host from others.
    #[error("asking which boot of the host this is")]
    HostBoot(#[from] StoreError),
    /// The engine will not have it.
    #[error("putting up the target")]
    Target(#[from] assay_iscsi::ConfigError),
    /// It cannot be confined.
    #[error("confining the worker")]
    Confine(#[from] confine::ConfineError),
    /// Threads.
    #[error("starting threads")]
    Threads(#[source] io::Error),
}

/// The program: serves until the gateway says otherwise.
#[must_use]
pub fn main() -> ExitCode {
    confine::close_inherited();
    // Nobody hears two of these: this program sets it first.
    let _set_once = tracing::subscriber::set_global_default(log::ToGateway);
    // A thread that is gone would be waited for: rather all of it, and the gateway starts it anew.
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!(event = "worker.panicked", %panic, "the export worker panicked");
        std::process::abort();
    }));
    let gateway = rustix::process::getppid();
    match start(gateway) {
        Ok(serving) => serving.serve(),
        Err(error) => {
            let refused = FromWorker::Refused { reason: chain(&error) };
            let _nobody_to_tell = send(rustix::stdio::stdin(), &refused, &[], SendFlags::empty());
            ExitCode::FAILURE
        }
    }
}

/// An export that is ready, and what it takes to open its disk anew when no file can be opened any more.
struct Serving {
    hub: Arc<Hub>,
    expires_at: Option<Instant>,
    boot: HostBoot,
    read_only: bool,
}

/// From the order to readiness. Has read nothing of a node's when it returns.
fn start(gateway: Option<rustix::process::Pid>) -> Result<Serving, WorkerError> {
    let mut buffer = vec![0; MESSAGE_BYTES];
    let order = receive(rustix::stdio::stdin(), &mut buffer, RecvFlags::empty()).map_err(WorkerError::Gateway)?;
    let Some((ToWorker::Serve(order), files)) = order else { return Err(WorkerError::NoOrder) };
    let expires_at = order.remaining_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
    let count = files.len();
    let boot = HostBoot::current()?;
    let unit = Unit::new(order.disk.clone().open(files, order.read_only, boot)?);
    let target = Target::new(target(&order, unit.blocks()))?;
    let hub = Hub::new(target, order.initiator.is_none(), unit, order.limits);
    let confinement: Confinement = confine::confine(&order, count, gateway)?;
    hub.helpers.start(&hub.unit).map_err(WorkerError::Threads)?;
    send(rustix::stdio::stdin(), &FromWorker::Ready(confinement), &[], SendFlags::empty())
        .map_err(WorkerError::Gateway)?;
    Ok(Serving { hub, expires_at, boot, read_only: order.read_only })
}

impl Serving {
    /// Does what the gateway says until it says no more.
    fn serve(mut self) -> ExitCode {
        let mut buffer = vec![0; MESSAGE_BYTES];
        loop {
            if !wait_until(self.expires_at) {
                tracing::info!(event = "worker.expired", "the export has expired");
                self.hub.end(FAREWELL);
                return ExitCode::SUCCESS;
            }
            let (message, fds) = match receive(rustix::stdio::stdin(), &mut buffer, RecvFlags::DONTWAIT) {
                Ok(Some(received)) => received,
                Ok(None) => return ExitCode::SUCCESS,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => return ExitCode::FAILURE,
            };
            if let Some(code) = self.obey(message, fds) {
                return code;
            }
        }
    }

    /// Does one thing; answers how to end, if that was it.
    fn obey(&mut self, message: ToWorker, mut fds: Vec<OwnedFd>) -> Option<ExitCode> {
        match message {
            ToWorker::Connection { peer } => {
                if let Some(socket) = fds.pop() {
                    connect(&self.hub, socket, peer);
                }
            }
            ToWorker::Renew { remaining_ms } => {
                // Never sooner than before, in whichever order two of these come.
                let until = Instant::now() + Duration::from_millis(remaining_ms);
                self.expires_at = self.expires_at.max(Some(until));
            }
            ToWorker::Status => answer(&FromWorker::Status(self.hub.status())),
            ToWorker::Pause => {
                let problem = self.hub.unit.gate.shut().err().map(|error| chain(&error));
                answer(&FromWorker::Paused { problem });
            }
            ToWorker::Resume(disk) => answer(&FromWorker::Resumed { problem: self.resume(disk, fds).err() }),
            ToWorker::End => {
                self.hub.end(FAREWELL);
                return Some(ExitCode::SUCCESS);
            }
            ToWorker::Serve(_) => return Some(ExitCode::FAILURE),
            #[cfg(feature = "failpoints")]
            ToWorker::Attack(attack) => answer(&FromWorker::Attacked(attack.run())),
        }
        None
    }

    fn resume(&self, disk: DiskOrder, files: Vec<OwnedFd>) -> Result<(), String> {
        let device = disk.open(files, self.read_only, self.boot).map_err(|error| chain(&error))?;
        self.hub.unit.gate.open(device).map_err(|error| chain(&error))
    }
}

fn answer(message: &FromWorker) {
    let _gone_if_it_fails = send(rustix::stdio::stdin(), message, &[], SendFlags::empty());
}

/// Waits for a message. `false` if the order expired first.
fn wait_until(expires_at: Option<Instant>) -> bool {
    loop {
        let left = expires_at.map(|at| at.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return false;
        }
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        match poll(&mut [PollFd::new(&rustix::stdio::stdin(), PollFlags::IN)], timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => {}
            // If it failed, receiving will say so.
            Ok(_) | Err(_) => return true,
        }
    }
}

fn connect(hub: &Arc<Hub>, socket: OwnedFd, peer: SocketAddr) {
    let socket = Arc::new(socket);
    let Some(id) = hub.enter(&socket) else {
        tracing::warn!(event = "portal.refused", %peer, "too many connections, or too many that have not logged in");
        return;
    };
    let theirs = Arc::clone(hub);
    let driving = std::thread::Builder::new().stack_size(helpers::STACK_BYTES).spawn(move || {
        connection::drive(&theirs, id, &socket, peer);
        theirs.leave(id);
    });
    if let Err(error) = driving {
        tracing::error!(event = "portal.no_thread", %error, "starting a thread for a connection");
        hub.leave(id);
    }
}

fn target(order: &WorkerOrder, blocks: u64) -> TargetConfig {
    TargetConfig {
        name: order.target.clone(),
        portal: order.portal,
        initiator: order.initiator.clone().unwrap_or_else(|| "any".to_owned()),
        authentication: match &order.chap {
            Some((name, secret)) => Authentication::Chap {
                initiator: ChapCredentials::new(name.clone(), secret.clone()),
                target: None,
                algorithms: match order.chap_algorithms {
                    Chap::Any => ChapAlgorithms::WithMd5,
                    Chap::Sha256 => ChapAlgorithms::Sha256,
                },
            },
            None => Authentication::None,
        },
        logical_unit: LogicalUnitConfig {
            block_bytes: BLOCK_BYTES,
            blocks,
            naa: order.naa & ((1 << 60) - 1),
            serial: order.serial.clone(),
            vendor: "ASSAY".to_owned(),
            product: order.product.clone(),
            read_only: order.read_only,
            write_cache: true,
        },
    }
}
