//! The gateway's exports: each an order, an open clone and a target. Served until ordered down, or expired by the
//! gateway's own clock, whether or not imaging still runs.

use super::hub::Hub;
use super::order::{ExportOrder, ExportStatus, GatewayStatus, Reservation};
use super::unit::{BLOCK_BYTES, Unit};
use crate::store::StoreError;
use crate::store::golden::GoldenImage;
use crate::store::overlay::{HostBoot, Overlay};
use assay_iscsi::{
    Authentication, ChapAlgorithms, ChapCredentials, ConfigError, LogicalUnitConfig, Target, TargetConfig,
};
use assay_service::clock::Clock;
use assay_wire::id::{AdmissionId, DiskId, ImageId};
use assay_wire::net::MacAddr;
use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::watch;

/// Exports by admission.
pub(super) struct Exports {
    store: PathBuf,
    portal: SocketAddr,
    hub: Arc<Hub>,
    clock: Arc<dyn Clock>,
    /// Held while an export is put up or taken down, so that the two do not cross.
    changing: tokio::sync::Mutex<()>,
    standing: Mutex<BTreeMap<AdmissionId, Standing>>,
    /// Addresses of the nodes whose exports stand.
    reservations: watch::Sender<Vec<(MacAddr, Ipv4Addr)>>,
    /// Golden images that some clone has open.
    goldens: Mutex<HashMap<ImageId, Weak<GoldenImage>>>,
}

struct Standing {
    order: ExportOrder,
    unit: Arc<Unit>,
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
    /// The target's name is in use.
    #[error("target {target} is up for another admission than {admission}")]
    TargetTaken {
        /// The name.
        target: String,
        /// Who asked for it.
        admission: AdmissionId,
    },
    /// Too late.
    #[error("the export of admission {admission} has expired")]
    Expired {
        /// Whose.
        admission: AdmissionId,
    },
    /// The engine will not have it.
    #[error("putting up the target of admission {admission}: {reason}")]
    Target {
        /// Whose.
        admission: AdmissionId,
        /// Why.
        reason: ConfigError,
    },
    /// The clone cannot be opened.
    #[error("opening disk {disk}")]
    Store {
        /// Which.
        disk: DiskId,
        /// Why.
        source: StoreError,
    },
}

impl Exports {
    pub(super) fn new(store: PathBuf, portal: SocketAddr, hub: Arc<Hub>, clock: Arc<dyn Clock>) -> Self {
        Self {
            store,
            portal,
            hub,
            clock,
            changing: tokio::sync::Mutex::default(),
            standing: Mutex::default(),
            reservations: watch::Sender::default(),
            goldens: Mutex::default(),
        }
    }

    /// Carries out an order. Idempotent.
    pub(super) async fn put_up(self: &Arc<Self>, admission: AdmissionId, order: ExportOrder) -> Result<(), OrderError> {
        let _alone = self.changing.lock().await;
        if order.expires_at_ms <= self.clock.now_ms() {
            return Err(OrderError::Expired { admission });
        }
        if let Some(standing) = self.standing().get(&admission) {
            // It may have been renewed since this order was written: that changes when it ends, and nothing else.
            let same = ExportOrder { expires_at_ms: standing.order.expires_at_ms, ..order } == standing.order;
            return if same { Ok(()) } else { Err(OrderError::Differs { admission }) };
        }
        let unit = Arc::new(Unit::new(Arc::new(self.open(&order).await?)));
        let target = Target::new(self.target(&order, unit.blocks()))
            .map_err(|reason| OrderError::Target { admission, reason })?;
        if !self.hub.insert(Arc::new(target), Arc::clone(&unit)) {
            return Err(OrderError::TargetTaken { target: order.target.to_string(), admission });
        }
        tracing::info!(event = "gateway.export_up", %admission, target = %order.target, "export is up");
        self.standing().insert(admission, Standing { order, unit });
        self.reserve();
        Ok(())
    }

    /// Serves exports until later. One that is not served, or has expired by our clock, is not brought back.
    pub(super) fn renew(&self, until_ms: &BTreeMap<AdmissionId, i64>) {
        let now_ms = self.clock.now_ms();
        let mut standing = self.standing();
        for (admission, until_ms) in until_ms {
            if let Some(Standing { order, .. }) = standing.get_mut(admission)
                && order.expires_at_ms > now_ms
            {
                order.expires_at_ms = order.expires_at_ms.max(*until_ms);
            }
        }
    }

    /// Severs an export's sessions and forgets it, if there is one.
    pub(super) async fn take_down(&self, admission: AdmissionId) {
        let _alone = self.changing.lock().await;
        let standing = self.standing().remove(&admission);
        if let Some(standing) = standing {
            self.reserve();
            self.hub.remove(standing.order.target.as_str()).await;
            tracing::info!(event = "gateway.export_down", %admission, target = %standing.order.target, "export is down");
        }
    }

    /// Takes down every export that has expired.
    pub(super) async fn expire(&self) {
        let now_ms = self.clock.now_ms();
        let due: Vec<AdmissionId> = self
            .standing()
            .iter()
            .filter(|(_, standing)| standing.order.expires_at_ms <= now_ms)
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

    /// What is served.
    pub(super) fn status(&self) -> GatewayStatus {
        let standing = self.standing();
        let exports = standing.iter().map(|(admission, standing)| {
            let (read_bytes, written_bytes) = standing.unit.counters();
            let sessions = self.hub.sessions(standing.order.target.as_str());
            ExportStatus {
                admission: *admission,
                target: standing.order.target.clone(),
                sessions: u32::try_from(sessions).unwrap_or(u32::MAX),
                read_bytes,
                written_bytes,
                expires_at_ms: standing.order.expires_at_ms,
            }
        });
        GatewayStatus { exports: exports.collect() }
    }

    /// Brings the reservations in step with what stands.
    fn reserve(&self) {
        let standing = self.standing();
        let reservation = |Reservation { mac, address }: &Reservation| (*mac, address.addr());
        let reservations =
            standing.values().filter_map(|standing| standing.order.reservation.as_ref().map(reservation)).collect();
        self.reservations.send_replace(reservations);
    }

    async fn open(self: &Arc<Self>, order: &ExportOrder) -> Result<Overlay, OrderError> {
        let (exports, image, disk) = (Arc::clone(self), order.image.clone(), order.disk);
        let opened = crate::export::blocking(move || {
            let golden = exports.golden(&image)?;
            Overlay::open(&exports.store.join("disks").join(disk.to_string()), golden, HostBoot::current()?)
        });
        opened.await.map_err(|source| OrderError::Store { disk, source })
    }

    /// The golden image, shared with the clones that have it open. Blocks.
    fn golden(&self, image: &ImageId) -> Result<Arc<GoldenImage>, StoreError> {
        let mut goldens = self.goldens.lock().unwrap_or_else(PoisonError::into_inner);
        goldens.retain(|_, golden| golden.strong_count() > 0);
        if let Some(golden) = goldens.get(image).and_then(Weak::upgrade) {
            return Ok(golden);
        }
        let golden = Arc::new(GoldenImage::open(&self.store.join("images").join(image.as_str()))?);
        goldens.insert(image.clone(), Arc::downgrade(&golden));
        Ok(golden)
    }

    fn target(&self, order: &ExportOrder, blocks: u64) -> TargetConfig {
        let mut naa = [0; 8];
        naa.copy_from_slice(&order.disk.as_bytes()[8..]);
        TargetConfig {
            name: order.target.to_string(),
            portal: self.portal,
            initiator: order.initiator.to_string(),
            authentication: Authentication::Chap {
                initiator: ChapCredentials::new(order.chap_name.clone(), order.chap_secret.clone()),
                target: None,
                // iPXE and open-iscsi as Debian configures it have nothing else.
                algorithms: ChapAlgorithms::WithMd5,
            },
            logical_unit: LogicalUnitConfig {
                block_bytes: BLOCK_BYTES,
                blocks,
                naa: u64::from_be_bytes(naa) & ((1 << 60) - 1),
                serial: hex::encode(order.disk.as_bytes()),
                vendor: "ASSAY".to_owned(),
                product: "clone".to_owned(),
                read_only: false,
                write_cache: true,
            },
        }
    }

    fn standing(&self) -> MutexGuard<'_, BTreeMap<AdmissionId, Standing>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
