//! The imaging service: opens everything, serves the API, and keeps gateways and records in step.

use crate::api;
use crate::catalogue::Catalogue;
use crate::config::{CephConfig, Config};
use crate::db::{Db, MIGRATOR};
use crate::export::{Exporter, blocking};
use crate::gateway::order::ExportStatus;
use crate::rbd_disks::{RbdDisks, RbdDisksError};
use crate::secret::{SecretKey, SecretKeyError};
use crate::store::{ImageStore, LocalStore, RbdImageStore, StoreError};
use crate::uploads::{UploadError, Uploads};
use assay_rbd::name::CephKey;
use assay_rbd::{Connection, Patience};
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_service::http::{self, HttpError, Listener, ServiceContext};
use assay_service::{CancellationToken, store as database};
use assay_wire::id::AdmissionId;
use assay_wire::imaging::Gateway;
use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior};
use zeroize::Zeroizing;

/// How often each gateway is compared with the records, and expired exports are looked for.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(1);
/// The longest that a gateway which does not answer is left alone.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// How often uploads are looked through for those that nobody goes on with, by the service's clock.
const SWEEP_INTERVAL_MS: i64 = 60_000;
/// Imports read and hash whole disks; more at once only makes each slower.
const MAX_IMPORTS: usize = 2;

/// Why imaging does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The image store.
    #[error("opening the image store")]
    Store(#[from] StoreError),
    /// The database.
    #[error("opening imaging's database")]
    Database(#[from] database::StoreError),
    /// The folder of uploads.
    #[error("opening the folder of uploads")]
    Uploads(#[from] UploadError),
    /// The key for CHAP secrets.
    #[error("opening imaging's key")]
    Key(#[from] SecretKeyError),
    /// Store and catalogue could not be brought in step.
    #[error("completing what was under way in the image store")]
    Records(#[source] Box<dyn Error + Send + Sync>),
    /// Nobody could be started for disks on Ceph.
    #[error("starting processes for disks on Ceph when gateways ask for them")]
    RbdDisks(#[from] RbdDisksError),
    /// The listener.
    #[error("serving imaging's API")]
    Http(#[from] HttpError),
}

/// Runs imaging until `context.shutdown`.
///
/// # Errors
/// See [`RunError`].
pub async fn run(config: Config, context: ServiceContext) -> Result<(), RunError> {
    let listener = http::bind(config.listen).await?;
    Imaging::open(config, &context).await?.serve(listener, &context).await
}

/// An imaging service that is open but does not serve yet.
pub struct Imaging {
    state: Arc<AppState>,
    /// Where gateways ask for disks on Ceph, if imaging is who starts those processes.
    rbd_disks: Option<RbdDisks>,
}

/// What the API's handlers share.
pub(crate) struct AppState {
    pub(crate) exporter: Exporter,
    pub(crate) catalogue: Catalogue,
    pub(crate) uploads: Arc<Uploads>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) import_folders: Vec<PathBuf>,
    pub(crate) imports: Arc<Semaphore>,
    /// How each export goes, as its gateway last said.
    pub(crate) served: Mutex<HashMap<AdmissionId, ExportStatus>>,
    /// How long an upload is kept that nobody goes on with.
    pub(crate) upload_age: Duration,
    /// The longest that one renewal lasts.
    pub(crate) longest_renewal: Duration,
}

impl Imaging {
    /// Opens store, database and key, and completes or undoes what was under way.
    ///
    /// # Errors
    /// See [`RunError`].
    pub async fn open(config: Config, context: &ServiceContext) -> Result<Self, RunError> {
        let uploads = Uploads::open(config.store.join("uploads"))?;
        let socket = config.ceph.as_ref().and_then(|ceph| ceph.rbd_disks_socket.as_deref());
        let rbd_disks = socket.map(|socket| RbdDisks::bind(socket, None)).transpose()?;
        let (root, work) = (config.store.clone(), config.store.join("work"));
        let store = blocking(move || open_store(&root, config.ceph)).await?;
        let key = SecretKey::load_or_create(&config.key_file)?;
        let db = Db::new(&database::open(&config.database, &MIGRATOR).await?);
        let catalogue = Catalogue::new(db.clone(), Arc::clone(&store), work);
        catalogue.recover().await.map_err(|error| RunError::Records(error.into()))?;
        let state = AppState {
            exporter: Exporter::new(db, store, key, config.agreement),
            catalogue,
            uploads: Arc::new(uploads),
            clock: Arc::clone(&context.clock),
            import_folders: config.import_folders,
            imports: Arc::new(Semaphore::new(MAX_IMPORTS)),
            served: Mutex::default(),
            upload_age: config.upload_age,
            longest_renewal: config.longest_renewal,
        };
        Ok(Self { state: Arc::new(state), rbd_disks })
    }

    /// Serves the API over TLS on `listener` until `context.shutdown`.
    ///
    /// # Errors
    /// See [`RunError`].
    pub async fn serve(self, listener: TcpListener, context: &ServiceContext) -> Result<(), RunError> {
        let Self { state, rbd_disks } = self;
        let router = api::router(Arc::clone(&state));
        tracing::info!(event = "imaging.ready", "the image store is open");
        let upkeep = upkeep(state, context.shutdown.clone());
        let disks = async {
            if let Some(disks) = rbd_disks {
                disks.serve(context.shutdown.clone()).await;
            }
        };
        let (served, (), ()) = tokio::join!(http::serve(Listener::Tls(listener), router, context), upkeep, disks);
        Ok(served?)
    }
}

/// Opens the store that is configured.
fn open_store(root: &Path, ceph: Option<CephConfig>) -> Result<Arc<dyn ImageStore>, StoreError> {
    let Some(CephConfig { monitors, user, key_file, pool, .. }) = ceph else {
        return Ok(Arc::new(LocalStore::open(root)?));
    };
    let text = std::fs::read_to_string(&key_file).map(Zeroizing::new);
    let text = text.map_err(|source| StoreError::io("reading `ceph.key_file`,", &key_file, source))?;
    let key = CephKey::new(&text)
        .map_err(|cause| StoreError::malformed(&key_file, format!("(`ceph.key_file`) has no key: {cause}")))?;
    let connection = Connection { monitors, user, key, patience: Patience::CONTROL };
    Ok(Arc::new(RbdImageStore::open(root, &connection, pool)?))
}

/// Expires exports and uploads and reconciles gateways, each in its own rhythm.
async fn upkeep(state: Arc<AppState>, shutdown: CancellationToken) {
    let mut backoff: HashMap<String, Backoff> = HashMap::new();
    let mut sweep_at_ms = i64::MIN;
    let mut ticks = tokio::time::interval(RECONCILE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let now_ms = state.clock.now_ms();
        if now_ms >= sweep_at_ms {
            sweep_at_ms = now_ms.saturating_add(SWEEP_INTERVAL_MS);
            sweep(&state, now_ms).await;
        }
        if let Err(error) = state.exporter.expire(now_ms).await {
            tracing::error!(event = "export.expiry_failed", cause = chain(&error), "ending expired exports");
        }
        let gateways = match state.exporter.db.gateways().await {
            Ok(gateways) => each_once(gateways),
            Err(error) => {
                tracing::error!(event = "gateway.list_failed", cause = chain(&error), "listing gateways");
                continue;
            }
        };
        let due = gateways.iter().filter(|gateway| backoff.get(&gateway.control_socket).is_none_or(Backoff::is_over));
        let due: Vec<&Gateway> = due.collect();
        let reconciled = futures_util::future::join_all(due.iter().map(|gateway| reconcile(&state, gateway))).await;
        for (gateway, ok) in due.into_iter().zip(reconciled) {
            if ok {
                backoff.remove(&gateway.control_socket);
            } else {
                backoff.entry(gateway.control_socket.clone()).or_default().grow();
            }
        }
    }
}

/// Forgets uploads that nobody goes on with.
async fn sweep(state: &AppState, now_ms: i64) {
    let age_ms = i64::try_from(state.upload_age.as_millis()).unwrap_or(i64::MAX);
    let uploads = Arc::clone(&state.uploads);
    match blocking(move || Ok(uploads.sweep(now_ms.saturating_sub(age_ms)))).await {
        Ok(Ok(swept)) => {
            for upload in swept {
                tracing::info!(event = "upload.expired", %upload, "nobody went on with an upload");
            }
        }
        Ok(Err(error)) => tracing::error!(event = "upload.sweep_failed", cause = chain(&error), "sweeping uploads"),
        Err(error) => tracing::error!(event = "upload.sweep_failed", cause = chain(&error), "sweeping uploads"),
    }
}

/// A gateway that several projects share is on record for each of them.
fn each_once(mut gateways: Vec<Gateway>) -> Vec<Gateway> {
    let mut seen = HashSet::new();
    gateways.retain(|gateway| seen.insert(gateway.control_socket.clone()));
    gateways
}

async fn reconcile(state: &AppState, gateway: &Gateway) -> bool {
    match state.exporter.reconcile(gateway).await {
        Ok(status) => {
            let mut served = state.served.lock().unwrap_or_else(PoisonError::into_inner);
            served.extend(status.exports.into_iter().map(|export| (export.admission, export)));
            true
        }
        Err(error) => {
            let project = &gateway.project;
            tracing::warn!(event = "gateway.out_of_step", %project, cause = chain(&error), "gateway cannot be reconciled");
            false
        }
    }
}

/// How long to leave a gateway alone.
struct Backoff {
    wait: Duration,
    until: Instant,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { wait: RECONCILE_INTERVAL / 2, until: Instant::now() }
    }
}

impl Backoff {
    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }

    fn grow(&mut self) {
        self.wait = (self.wait * 2).min(MAX_BACKOFF);
        self.until = Instant::now() + self.wait;
    }
}
