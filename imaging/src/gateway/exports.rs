//! The gateway's exports: each an order, and the worker that serves it. Served until ordered down, or expired by the
//! gateway's own clock, whether or not imaging still runs.

use super::checker::Checkers;
use super::companion::{self, OpenError, Opened};
use super::order::{ExportOrder, ExportStatus, GatewayStatus, Reservation};
use super::process::{Launcher, StartError};
use super::supervised::{Launch, PauseError, Recipe, Supervised, WorkerError};
use crate::lock::lock;
use crate::store::golden::GoldenFiles;
use crate::store::overlay::DiskFiles;
use crate::store::{DiskLocation, StoreError, Upper};
use crate::worker::disk::{DiskOrder, GoldenOrder};
use crate::worker::message::{Limits, WorkerOrder};
use assay_service::clock::Clock;
use assay_wire::id::{AdmissionId, DiskId};
use assay_wire::net::{Iqn, MacAddr};
use futures_util::future::join_all;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Users of workers: this many from the configured one on, the lowest that is free for each export.
const WORKER_USERS: u32 = 65_536;
/// Admissions are spread over this many locks: one that is slow to come up must not keep another from going down.
const LOCKS: usize = 64;

/// Exports by admission.
pub(super) struct Exports {
    store: PathBuf,
    rbd_disks_socket: Option<PathBuf>,
    portal: SocketAddr,
    launcher: Arc<Launcher>,
    checkers: Arc<Checkers>,
    /// The first user that a worker may become.
    worker_users: Option<u32>,
    limits: Limits,
    clock: Arc<dyn Clock>,
    /// One of them is held while an export is put up or taken down, so that the two do not cross.
    changing: [tokio::sync::Mutex<()>; LOCKS],
    standing: Mutex<BTreeMap<AdmissionId, Standing>>,
    /// What exports that are just being put up will have.
    claims: Arc<Mutex<BTreeMap<AdmissionId, Claim>>>,
    /// Whose connections go where.
    by_address: RwLock<HashMap<Ipv4Addr, Arc<Supervised>>>,
    /// Addresses of the nodes whose exports stand.
    reservations: watch::Sender<Vec<(MacAddr, Ipv4Addr)>>,
}

/// What one export at a time may have.
struct Claim {
    target: Iqn,
    address: Ipv4Addr,
    user: Option<u32>,
}

/// A claim until it stands; given up when this is dropped.
struct Claimed {
    claims: Arc<Mutex<BTreeMap<AdmissionId, Claim>>>,
    admission: AdmissionId,
    user: Option<u32>,
}

/// What is known of an export that an order is about.
enum Known {
    Not,
    /// Nothing changes.
    AsItIs,
    /// Its disk is elsewhere now.
    Moved(Arc<Supervised>),
}

struct Standing {
    /// As it was put up: [`Standing::expires_at_ms`] is when it ends, [`Standing::location`] where its disk is.
    order: ExportOrder,
    expires_at_ms: Arc<AtomicI64>,
    location: Arc<Mutex<DiskLocation>>,
    user: Option<u32>,
    worker: Arc<Supervised>,
    task: JoinHandle<()>,
}

/// Why an order is not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum OrderError {
    /// Another order stands.
    #[error("admission {admission} is exported under another order")]
    Differs {
        /// Whose.
        admission: AdmissionId,
    },
    /// The target's name or the node's address is in use.
    #[error("{what} is another admission's than {admission}")]
    Taken {
        /// Target or address.
        what: String,
        /// Who asked for it.
        admission: AdmissionId,
    },
    /// Too late.
    #[error("the export of admission {admission} has expired")]
    Expired {
        /// Whose.
        admission: AdmissionId,
    },
    /// Its process does not run.
    #[error("starting the worker for disk {disk}")]
    Worker {
        /// Which disk.
        disk: DiskId,
        /// Why.
        source: StartError,
    },
    /// It is not served here.
    #[error("admission {admission} is not exported here")]
    NotServed {
        /// Whose.
        admission: AdmissionId,
    },
    /// Its process does not pause.
    #[error("pausing the export of admission {admission}")]
    NotPaused {
        /// Whose.
        admission: AdmissionId,
        /// Why.
        source: PauseError,
    },
    /// The clone cannot be opened.
    #[error("opening disk {disk}")]
    Open {
        /// Which.
        disk: DiskId,
        /// Why.
        source: OpenError,
    },
}

impl Exports {
    pub(super) fn new(config: &super::GatewayConfig, portal: SocketAddr, launcher: Launcher) -> Self {
        Self {
            store: config.store.clone(),
            rbd_disks_socket: config.rbd_disks_socket.clone(),
            portal,
            launcher: Arc::new(launcher),
            checkers: Arc::new(Checkers::new()),
            worker_users: config.worker_users,
            limits: config.limits,
            clock: Arc::clone(&config.clock),
            changing: [const { tokio::sync::Mutex::const_new(()) }; LOCKS],
            standing: Mutex::default(),
            claims: Arc::default(),
            by_address: RwLock::default(),
            reservations: watch::Sender::default(),
        }
    }

    /// Carries out an order. Idempotent. Of an export that is served, the disk may have been moved: it goes on there.
    pub(super) async fn put_up(&self, admission: AdmissionId, order: ExportOrder) -> Result<(), OrderError> {
        let alone = self.lock(admission).await;
        if order.expires_at_ms <= self.clock.now_ms() {
            return Err(OrderError::Expired { admission });
        }
        match self.known(admission, &order)? {
            Known::AsItIs => return Ok(()),
            Known::Moved(worker) => {
                // As for a pause: whoever takes the export down takes its worker along.
                drop(alone);
                tracing::info!(event = "gateway.disk_moved", %admission, disk = %order.disk, "an export's disk was moved");
                worker.moved().await;
                return Ok(());
            }
            Known::Not => {}
        }
        let claimed = self.claim(admission, &order)?;
        let user = claimed.user;
        let expires_at_ms = Arc::new(AtomicI64::new(order.expires_at_ms));
        let location = Arc::new(Mutex::new(order.location.clone()));
        let recipe = self.recipe(&order, user, Arc::clone(&expires_at_ms), Arc::clone(&location));
        let (worker, task) = Supervised::start(admission.to_string(), Arc::clone(&self.launcher), recipe)
            .await
            .map_err(|error| match error {
                WorkerError::Open(source) => OrderError::Open { disk: order.disk, source },
                WorkerError::Start(source) => OrderError::Worker { disk: order.disk, source },
            })?;
        if user.is_some() && worker.confinement().is_some_and(|confinement| !confinement.own_user) {
            tracing::warn!(event = "gateway.no_own_user", %admission, "the gateway may not give the worker a user of its own");
        }
        tracing::info!(event = "gateway.export_up", %admission, target = %order.target, address = %order.address, "export is up");
        self.by_address.write().unwrap_or_else(PoisonError::into_inner).insert(order.address, Arc::clone(&worker));
        self.standing().insert(admission, Standing { order, expires_at_ms, location, user, worker, task });
        self.reserve();
        Ok(())
    }

    /// What an order changes, which it has changed when this returns but for the worker.
    fn known(&self, admission: AdmissionId, order: &ExportOrder) -> Result<Known, OrderError> {
        let standing = self.standing();
        let Some(standing) = standing.get(&admission) else { return Ok(Known::Not) };
        // It may have been renewed since the order was written, and its disk moved before: that changes nothing else.
        let ExportOrder { expires_at_ms, location, .. } = standing.order.clone();
        if (ExportOrder { expires_at_ms, location, ..order.clone() }) != standing.order {
            return Err(OrderError::Differs { admission });
        }
        let mut location = lock(&standing.location);
        if *location == order.location {
            return Ok(Known::AsItIs);
        }
        location.clone_from(&order.location);
        Ok(Known::Moved(Arc::clone(&standing.worker)))
    }

    /// Serves exports until later. One that is not served, or has expired by our clock, is not brought back.
    pub(super) fn renew(&self, until_ms: &BTreeMap<AdmissionId, i64>) {
        let now_ms = self.clock.now_ms();
        let standing = self.standing();
        for (admission, until_ms) in until_ms {
            if let Some(Standing { expires_at_ms, worker, .. }) = standing.get(admission)
                && expires_at_ms.load(Ordering::Relaxed) > now_ms
            {
                let until_ms = expires_at_ms.fetch_max(*until_ms, Ordering::Relaxed).max(*until_ms);
                worker.renew(remaining_ms(until_ms, now_ms));
            }
        }
    }

    /// Has an export's worker give up its disk until it is resumed, or for as long as a pause may last.
    pub(super) async fn pause(&self, admission: AdmissionId) -> Result<(), OrderError> {
        // Not alone: an export that is taken down meanwhile takes its worker along, and nobody waits for a pause.
        let worker = self.worker(admission)?;
        worker.pause().await.map_err(|source| OrderError::NotPaused { admission, source })
    }

    /// Has it go on.
    pub(super) async fn resume(&self, admission: AdmissionId) -> Result<(), OrderError> {
        self.worker(admission)?.resume().await;
        Ok(())
    }

    fn worker(&self, admission: AdmissionId) -> Result<Arc<Supervised>, OrderError> {
        let standing = self.standing();
        let standing = standing.get(&admission).ok_or(OrderError::NotServed { admission })?;
        Ok(Arc::clone(&standing.worker))
    }

    /// Severs an export's sessions and forgets it, if there is one: its process is gone when this returns.
    pub(super) async fn take_down(&self, admission: AdmissionId) {
        let _alone = self.lock(admission).await;
        let standing = self.standing().remove(&admission);
        if let Some(Standing { order, worker, task, .. }) = standing {
            self.by_address.write().unwrap_or_else(PoisonError::into_inner).remove(&order.address);
            worker.sever();
            self.reserve();
            if let Err(error) = task.await {
                tracing::error!(event = "gateway.supervisor_died", %admission, %error, "ending an export's worker");
            }
            tracing::info!(event = "gateway.export_down", %admission, target = %order.target, "export is down");
        }
    }

    /// Takes down everything.
    pub(super) async fn take_down_all(&self) {
        let all: Vec<AdmissionId> = self.standing().keys().copied().collect();
        join_all(all.into_iter().map(|admission| self.take_down(admission))).await;
    }

    /// Takes down every export that has expired.
    pub(super) async fn expire(&self) {
        let now_ms = self.clock.now_ms();
        let due: Vec<AdmissionId> = self
            .standing()
            .iter()
            .filter(|(_, standing)| standing.expires_at_ms.load(Ordering::Relaxed) <= now_ms)
            .map(|(admission, _)| *admission)
            .collect();
        for admission in due {
            tracing::info!(event = "gateway.export_expired", %admission, "export expired");
            self.take_down(admission).await;
        }
    }

    /// Who has which address now.
    pub(super) fn reservations(&self) -> watch::Receiver<Vec<(MacAddr, Ipv4Addr)>> {
        self.reservations.subscribe()
    }

    /// Whose connections come from there.
    pub(super) fn at(&self, address: IpAddr) -> Option<Arc<Supervised>> {
        let IpAddr::V4(address) = address else { return None };
        self.by_address.read().unwrap_or_else(PoisonError::into_inner).get(&address).cloned()
    }

    /// What is served. A worker that does not answer is said to have done nothing.
    pub(super) async fn status(&self) -> GatewayStatus {
        let standing: Vec<_> = self
            .standing()
            .iter()
            .map(|(admission, standing)| {
                let expires_at_ms = standing.expires_at_ms.load(Ordering::Relaxed);
                (*admission, standing.order.target.clone(), expires_at_ms, Arc::clone(&standing.worker))
            })
            .collect();
        let exports = standing.into_iter().map(async |(admission, target, expires_at_ms, worker)| {
            let status = worker.status().await.unwrap_or_default();
            ExportStatus {
                admission,
                target,
                sessions: status.sessions,
                read_bytes: status.read_bytes,
                written_bytes: status.written_bytes,
                reads: status.reads,
                writes: status.writes,
                restarts: worker.restarts(),
                confinement: worker.confinement(),
                expires_at_ms,
            }
        });
        GatewayStatus { exports: join_all(exports).await }
    }

    /// Brings the reservations in step with what stands.
    fn reserve(&self) {
        let standing = self.standing();
        let reservation = |Reservation { mac, address }: &Reservation| (*mac, address.addr());
        let reservations =
            standing.values().filter_map(|standing| standing.order.reservation.as_ref().map(reservation)).collect();
        self.reservations.send_replace(reservations);
    }

    async fn lock(&self, admission: AdmissionId) -> tokio::sync::MutexGuard<'_, ()> {
        let index = admission.as_bytes().iter().fold(0, |sum, octet| sum ^ usize::from(*octet)) % LOCKS;
        self.changing[index].lock().await
    }

    fn claim(&self, admission: AdmissionId, order: &ExportOrder) -> Result<Claimed, OrderError> {
        let mut claims = lock(&self.claims);
        let standing = self.standing();
        let orders = standing.values().map(|other| (&other.order.target, other.order.address, other.user));
        let claimed = claims.values().map(|claim| (&claim.target, claim.address, claim.user));
        let mut users = BTreeSet::new();
        for (target, address, user) in orders.chain(claimed) {
            users.extend(user);
            if *target == order.target {
                return Err(OrderError::Taken { what: format!("target {target}"), admission });
            }
            if address == order.address {
                return Err(OrderError::Taken { what: format!("address {address}"), admission });
            }
        }
        let free = |first: u32| (first..first.saturating_add(WORKER_USERS)).find(|user| !users.contains(user));
        let user = self.worker_users.and_then(free);
        claims.insert(admission, Claim { target: order.target.clone(), address: order.address, user });
        Ok(Claimed { claims: Arc::clone(&self.claims), admission, user })
    }

    /// How each of an export's workers gets its order and files.
    fn recipe(
        &self,
        order: &ExportOrder,
        user: Option<u32>,
        expires_at_ms: Arc<AtomicI64>,
        location: Arc<Mutex<DiskLocation>>,
    ) -> Box<Recipe> {
        let (order, portal, limits, clock) = (order.clone(), self.portal, self.limits, Arc::clone(&self.clock));
        let (store, rbd_disks, checkers) =
            (self.store.clone(), self.rbd_disks_socket.clone(), Arc::clone(&self.checkers));
        Box::new(move || {
            let location = lock(&location).clone();
            let Disk { order: disk_order, files, companion } =
                open(&store, rbd_disks.as_deref(), &checkers, order.disk, location)?;
            let mut naa = [0; 8];
            naa.copy_from_slice(&order.disk.as_bytes()[8..]);
            let order = WorkerOrder {
                target: order.target.to_string(),
                portal,
                initiator: Some(order.initiator.to_string()),
                chap: Some((order.chap_name.clone(), order.chap_secret.clone())),
                chap_algorithms: order.chap,
                naa: u64::from_be_bytes(naa),
                serial: hex::encode(order.disk.as_bytes()),
                product: "clone".to_owned(),
                read_only: false,
                disk: disk_order,
                limits: Limits { sessions: order.sessions, ..limits },
                remaining_ms: Some(remaining_ms(expires_at_ms.load(Ordering::Relaxed), clock.now_ms())),
                uid: user,
                #[cfg(feature = "failpoints")]
                without_seccomp: false,
            };
            Ok(Launch { order, files, companion })
        })
    }

    fn standing(&self) -> MutexGuard<'_, BTreeMap<AdmissionId, Standing>> {
        lock(&self.standing)
    }
}

/// An open disk: what is said of it, its files, and the connection to who has the rest of it.
struct Disk {
    order: DiskOrder,
    files: Vec<OwnedFd>,
    companion: Option<OwnedFd>,
}

/// Opens a disk where an order says that it is.
fn open(
    store: &Path,
    rbd_disks: Option<&Path>,
    checkers: &Checkers,
    disk: DiskId,
    location: DiskLocation,
) -> Result<Disk, OpenError> {
    let DiskLocation { golden, root, upper } = location;
    match upper {
        Upper::Files => {
            let mut files = DiskFiles::open(store, disk)?;
            files.check_root(&root)?;
            checkers.serve(&mut files.golden)?;
            let (order, files) = DiskOrder::of(files);
            Ok(Disk { order, files, companion: None })
        }
        Upper::Rbd(clone) => {
            let socket = rbd_disks.ok_or(StoreError::NoCeph { disk })?;
            let mut golden = GoldenFiles::open_cached(store, golden, clone.byte_len, root)?;
            checkers.serve(&mut golden)?;
            let Opened { control, object_bytes, channels } = companion::open(socket, &clone)?;
            let (golden, files) = GoldenOrder::of(golden);
            let order = DiskOrder::Rbd { golden, clone: companion::path(&clone), object_bytes };
            let files = files.into_iter().chain(channels).collect();
            Ok(Disk { order, files, companion: Some(control) })
        }
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        lock(&self.claims).remove(&self.admission);
    }
}

fn remaining_ms(until_ms: i64, now_ms: i64) -> u64 {
    u64::try_from(until_ms.saturating_sub(now_ms)).unwrap_or(0)
}
