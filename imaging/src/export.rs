//! Step 7 of the boot path: an attestation result becomes an export.
//!
//! ```text
//!   result verified ──▶ Cloned ──────────▶ TargetUp ─────────▶ Exported
//!                       disk, address,     the gateway         on record: put up
//!                       secret and grant   serves it           again whenever its
//!                       on record                              gateway restarts
//! ```
//!
//! Each phase is a type that only the one before it makes, and each can undo itself and what came before. What ends an
//! export (revocation, expiry, a newer result for the lease) fences first: sessions are severed and the disk's credential
//! revoked, then the record goes.

use crate::address;
use crate::db::exports::{ExportRecord, Phase};
use crate::db::{Db, DbError, DiskRecord, DiskState};
use crate::gateway::order::{ExportOrder, ExportStatus, GatewayStatus, Reservation};
use crate::gateways::{GatewayError, Gateways};
use crate::secret::{ChapSecret, SealedWithAnotherKey, SecretKey};
use crate::store::{DiskLocation, ImageStore, StoreError};
use assay_service::clock::Clock;
use assay_tpm::seal::{SealError, seal_grant};
use assay_wire::agent::{Grant, TenantAddress};
use assay_wire::agreement::{Agreed, Agreement, Disagreement, Presented};
use assay_wire::id::{AdmissionId, DiskId, ImageKey, LeaseId, NodeId, ProjectId};
use assay_wire::imaging::{ExportAnswer, Gateway};
use assay_wire::net::InvalidNetValue;
use assay_wire::result::ResultError;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;
use zeroize::Zeroizing;

/// How long an ended admission is remembered beyond its own expiry, or where that is not known: longer than any result
/// is valid.
const REMEMBER_ENDED_MS: i64 = 30 * 24 * 60 * 60 * 1000;
/// All names of targets and initiators begin with this.
const IQN_PREFIX: &str = "iqn.2026-01.dev.assay";
/// Sessions of one export at once. A node that logs in again takes the place of its own session.
const SESSIONS: u8 = 1;
/// Leases are spread over this many locks.
const LOCKS: usize = 64;

/// Makes, keeps and ends exports.
#[derive(Debug)]
pub(crate) struct Exporter {
    pub(crate) db: Db,
    pub(crate) store: Arc<dyn ImageStore>,
    pub(crate) gateways: Gateways,
    /// Whose results count.
    pub(crate) agreement: Agreement,
    key: SecretKey,
    /// One export of a lease is worked on at a time.
    locks: Vec<Mutex<()>>,
}

/// Why there is no export.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    /// The result is not one.
    #[error("reading the attestation result")]
    Result(#[from] ResultError),
    /// The results do not count.
    #[error("accepting the attestation result")]
    Disagreement(#[from] Disagreement),
    /// Revoked, expired, or replaced by a later one.
    #[error("admission {0} has ended")]
    Ended(AdmissionId),
    /// A result that was issued later has the lease's export.
    #[error("lease {lease} is exported for a later attestation result, admission {admission}")]
    Superseded {
        /// The lease.
        lease: LeaseId,
        /// What has it.
        admission: AdmissionId,
    },
    /// Nobody asked for a disk.
    #[error("lease {0} has no disk")]
    NoDisk(LeaseId),
    /// The disk is for another node or project than the result.
    #[error("the disk of lease {lease} is for node {node} of project {project}, the attestation result is not")]
    OtherDisk {
        /// The lease.
        lease: LeaseId,
        /// The disk's node.
        node: NodeId,
        /// The disk's project.
        project: ProjectId,
    },
    /// The project has no gateway.
    #[error("project {0} has no gateway")]
    NoGateway(ProjectId),
    /// The gateway's subnet is full.
    #[error("no free address on the provisioning network of project {0}")]
    NoAddress(ProjectId),
    /// The EK in the result cannot be sealed to.
    #[error("sealing the grant of admission {admission} to the node's TPM")]
    Seal {
        /// The admission.
        admission: AdmissionId,
        /// Why.
        source: SealError,
    },
    /// The result's EK or AK is not encoded as it must be.
    #[error("the attestation result's `{claim}` cannot be decoded")]
    Claim {
        /// Which claim.
        claim: &'static str,
    },
    /// A name that became too long.
    #[error("naming the target of admission {admission}")]
    Name {
        /// The admission.
        admission: AdmissionId,
        /// Why.
        source: InvalidNetValue,
    },
    /// The gateway.
    #[error("the gateway of project {project}")]
    Gateway {
        /// Whose.
        project: ProjectId,
        /// Why.
        source: GatewayError,
    },
    /// The records.
    #[error("reading or writing the records")]
    Db(#[from] DbError),
    /// The image store.
    #[error("preparing the disk")]
    Store(#[from] StoreError),
    /// The store's golden image is not the one that was imported.
    #[error("disk {disk} stands on image {image} with root {found}, on record is {recorded}")]
    OtherGolden {
        /// Which disk.
        disk: DiskId,
        /// What the store says is below it.
        image: ImageKey,
        /// The root of that one's hash tree.
        found: String,
        /// What was recorded of it.
        recorded: String,
    },
    /// The key file was replaced.
    #[error("restoring an export")]
    Secret(#[from] SealedWithAnotherKey),
}

/// The disk is there; address, secret and grant are on record.
struct Cloned {
    record: ExportRecord,
    gateway: Gateway,
}

/// The gateway serves it.
struct TargetUp {
    cloned: Cloned,
}

/// It is on record as exported.
pub(crate) struct Exported {
    record: ExportRecord,
    gateway: Gateway,
    /// Whether this call made it so, or found it so.
    pub(crate) new: bool,
}

impl Exported {
    /// The node that it is for.
    pub(crate) fn node(&self) -> &NodeId {
        &self.record.node
    }

    /// What the verifier is told.
    pub(crate) fn answer(&self) -> ExportAnswer {
        ExportAnswer {
            admission: self.record.admission,
            address: TenantAddress {
                address: self.record.address,
                router: self.gateway.router,
                relay: self.gateway.relay,
            },
            grant: self.record.sealed_grant.clone(),
        }
    }
}

impl Exporter {
    pub(crate) fn new(db: Db, store: Arc<dyn ImageStore>, key: SecretKey, agreement: Agreement) -> Self {
        let locks = (0..LOCKS).map(|_| Mutex::new(())).collect();
        Self { db, store, gateways: Gateways::default(), agreement, key, locks }
    }

    /// Exports the disk of the results' lease. Idempotent by the leading result's id; a later result takes the lease's
    /// export over, an earlier one is refused.
    pub(crate) async fn export(&self, presented: &Presented, clock: &dyn Clock) -> Result<Exported, ExportError> {
        let (project, lease) = presented.lead.unverified_lease()?;
        let trusted = self.db.trusted_keys(&project).await?;
        let agreed = self.agreement.admits(presented, &trusted, clock.now_seconds())?;
        // From here on only what was verified is looked at.
        agreed.subject().is_for(&project, lease)?;
        let _alone = self.lock(lease).await;
        let admission = agreed.id();
        for result in std::iter::once(admission).chain(agreed.supporting().iter().copied()) {
            if self.db.has_ended(result).await? {
                return Err(ExportError::Ended(result));
            }
        }
        let gateway = self.db.gateway(&project).await?.ok_or_else(|| ExportError::NoGateway(project.clone()))?;
        let cloned = match self.db.export(admission).await? {
            Some(record) => match record.phase {
                Phase::Exported => return Ok(Exported { record, gateway, new: false }),
                Phase::Cloned => Cloned { record, gateway },
                Phase::Ending => return Err(ExportError::Ended(admission)),
            },
            None => self.clone_disk(&agreed, gateway, clock.now_ms()).await?,
        };
        fail::fail_point!("imaging::cloned", |_| std::process::abort());
        let target_up = self.bring_up(cloned).await?;
        fail::fail_point!("imaging::target-up", |_| std::process::abort());
        let exported = self.finish(target_up).await?;
        fail::fail_point!("imaging::exported", |_| std::process::abort());
        Ok(exported)
    }

    /// Ends an admission: severs its sessions, takes its target down, forgets its export. An admission without export
    /// is remembered as ended all the same. Idempotent.
    pub(crate) async fn end(&self, admission: AdmissionId, now_ms: i64) -> Result<(), ExportError> {
        match self.db.export(admission).await? {
            Some(record) => self.remember_ended(&record, now_ms).await?,
            None => self.db.end_admission(admission, now_ms.saturating_add(REMEMBER_ENDED_MS)).await?,
        }
        // Looked up after that: an export that is just being made is either found here, or sees that it has ended.
        let Some(record) = self.db.export(admission).await? else { return Ok(()) };
        let _alone = self.lock(record.lease).await;
        match self.db.export(admission).await? {
            Some(record) => self.take_down(&record).await,
            None => Ok(()),
        }
    }

    /// Its results, leading and supporting, are used up: none of them makes another export.
    async fn remember_ended(&self, record: &ExportRecord, now_ms: i64) -> Result<(), ExportError> {
        let until_ms = record.expires_at_ms.max(now_ms).saturating_add(REMEMBER_ENDED_MS);
        for result in std::iter::once(record.admission).chain(record.supporting.iter().copied()) {
            self.db.end_admission(result, until_ms).await?;
        }
        Ok(())
    }

    /// Ends every export that has expired. One that fails is logged and tried again at the next call.
    pub(crate) async fn expire(&self, now_ms: i64) -> Result<(), ExportError> {
        let due = |record: &&ExportRecord| record.expires_at_ms <= now_ms;
        for record in self.db.exports().await?.iter().filter(due) {
            tracing::info!(event = "export.expired", admission = %record.admission, node = %record.node, "export expired");
            if let Err(error) = self.end(record.admission, now_ms).await {
                let cause = assay_service::error::chain(&error);
                tracing::warn!(event = "export.end_failed", admission = %record.admission, cause, "ending an export");
            }
        }
        self.db.forget_ended(now_ms).await?;
        Ok(())
    }

    /// Makes `gateway` serve what is on record for it, whichever projects share it, no more and no less. Answers what it
    /// served before.
    pub(crate) async fn reconcile(&self, gateway: &Gateway) -> Result<GatewayStatus, ExportError> {
        let failed = |source| ExportError::Gateway { project: gateway.project.clone(), source };
        // The gateway first: what it serves was on record before it was put up.
        let status = match self.gateways.status(gateway).await {
            Ok(status) => status,
            Err(source) => {
                // The store may answer although the gateway does not.
                self.finish_ending(gateway).await?;
                return Err(failed(source));
            }
        };
        let mut records = self.db.exports().await?;
        records.retain(|record| record.gateway == gateway.control_socket);
        for served in &status.exports {
            if !records.iter().any(|record| record.admission == served.admission) {
                tracing::warn!(event = "export.unknown", admission = %served.admission, "gateway serves what is not on record");
                self.gateways.take_down(gateway, served.admission).await.map_err(failed)?;
            }
        }
        let late = |record: &&ExportRecord| {
            let until_ms =
                |served: &ExportStatus| (served.admission == record.admission).then_some(served.expires_at_ms);
            status.exports.iter().find_map(until_ms).is_some_and(|until_ms| until_ms < record.expires_at_ms)
        };
        let renewed: BTreeMap<_, _> =
            records.iter().filter(late).map(|record| (record.admission, record.expires_at_ms)).collect();
        if !renewed.is_empty() {
            self.gateways.renew(gateway, &renewed).await.map_err(failed)?;
        }
        let ended = self.finish_ending(gateway).await;
        for record in &records {
            let served = status.exports.iter().any(|served| served.admission == record.admission);
            match record.phase {
                Phase::Exported if !served || record.moving => self.restore(record, served).await?,
                Phase::Exported | Phase::Cloned | Phase::Ending => {}
            }
        }
        ended?;
        Ok(status)
    }

    /// Takes down what is on record as ending: all of it, whatever becomes of one.
    async fn finish_ending(&self, gateway: &Gateway) -> Result<(), ExportError> {
        let records = self.db.exports().await?;
        let ending = |record: &&ExportRecord| record.gateway == gateway.control_socket && record.phase == Phase::Ending;
        let mut finished = Ok(());
        for record in records.iter().filter(ending) {
            let _alone = self.lock(record.lease).await;
            let ended = self.take_down(record).await;
            finished = finished.and(ended);
        }
        finished
    }

    /// The disk of a lease, with its files made.
    pub(crate) async fn prepare_disk(&self, disk: &DiskRecord) -> Result<(), ExportError> {
        match disk.state {
            DiskState::Ready => Ok(()),
            DiskState::Making => {
                let (store, id, image) = (Arc::clone(&self.store), disk.id, disk.image);
                let project = disk.project.clone();
                blocking(move || store.create_disk(id, &project, image)).await?;
                self.db.disk_is_ready(disk.id).await?;
                Ok(())
            }
        }
    }

    /// Takes a snapshot of an export's disk, which is `work`, while nobody has it open: its node's commands wait meanwhile.
    /// Needs the lease's lock.
    pub(crate) async fn paused<T>(
        &self,
        export: &ExportRecord,
        work: impl Future<Output = T>,
    ) -> Result<T, ExportError> {
        let (project, admission) = (&export.project, export.admission);
        let gateway = self.db.gateway(project).await?.ok_or_else(|| ExportError::NoGateway(project.clone()))?;
        let failed = |source| ExportError::Gateway { project: project.clone(), source };
        let moves = self.store.moves_disks();
        if moves {
            // Before its key ends: whatever becomes of us, the gateway is told where the disk is then.
            self.db.set_moving(admission, true).await?;
        }
        let begun = Instant::now();
        let paused = self.gateways.pause(&gateway, admission).await.map_err(failed)?;
        let done = if moves {
            self.moved(export, &gateway, work).await
        } else {
            let done = work.await;
            // It goes on by itself, too, if this does not reach it.
            if paused && let Err(error) = self.gateways.resume(&gateway, admission).await {
                let cause = assay_service::error::chain(&error);
                tracing::warn!(event = "export.not_resumed", %admission, cause, "resuming an export");
            }
            Ok(done)
        };
        let elapsed_ms = begun.elapsed().as_secs_f64() * 1000.0;
        tracing::info!(event = "export.paused", %admission, elapsed_ms, "an export paused");
        done
    }

    /// Does `work`, which gives an export's disk another place, once whoever had it open can open it no more, and has its
    /// gateway go on with the disk where it is then. What fails of that is done by [`Exporter::reconcile`].
    async fn moved<T>(
        &self,
        export: &ExportRecord,
        gateway: &Gateway,
        work: impl Future<Output = T>,
    ) -> Result<T, ExportError> {
        fail::fail_point!("imaging::moving::paused", |_| std::process::abort());
        let (store, disk, admission) = (Arc::clone(&self.store), export.disk, export.admission);
        let revoked = blocking(move || store.revoke(disk, admission)).await;
        fail::fail_point!("imaging::moving::revoked", |_| std::process::abort());
        self.hold(gateway, admission).await;
        let done = match revoked {
            Ok(()) => Ok(work.await),
            Err(error) => Err(error.into()),
        };
        fail::fail_point!("imaging::moving::taken", |_| std::process::abort());
        self.hold(gateway, admission).await;
        let told = async {
            if self.db.has_ended(admission).await? {
                // Whoever ends it waits for us, and no key is made for it any more.
                return Err(ExportError::Ended(admission));
            }
            let order = self.order(export, gateway).await?;
            fail::fail_point!("imaging::moving::issued", |_| std::process::abort());
            let put_up = self.gateways.put_up(gateway, admission, &order).await;
            put_up.map_err(|source| ExportError::Gateway { project: export.project.clone(), source })?;
            fail::fail_point!("imaging::moving::told", |_| std::process::abort());
            Ok::<_, ExportError>(self.db.set_moving(admission, false).await?)
        };
        if let Err(error) = told.await {
            let cause = assay_service::error::chain(&error);
            tracing::warn!(event = "export.not_moved", %admission, cause, "its gateway is told later where a disk is");
        }
        done
    }

    /// Has a pause go on: monitors may take a second for each thing that they decide. One that has ended stays ended.
    async fn hold(&self, gateway: &Gateway, admission: AdmissionId) {
        if let Err(error) = self.gateways.pause(gateway, admission).await {
            let cause = assay_service::error::chain(&error);
            tracing::debug!(event = "export.not_held", %admission, cause, "a pause may end before a disk has moved");
        }
    }

    /// Puts an export up again on a gateway that lost it, or was not told where its disk is now; unless it was ended meanwhile.
    async fn restore(&self, record: &ExportRecord, served: bool) -> Result<(), ExportError> {
        let _alone = self.lock(record.lease).await;
        let Some(record) = self.db.export(record.admission).await? else { return Ok(()) };
        let Some(gateway) = self.db.gateway(&record.project).await? else { return Ok(()) };
        // Whoever moved its disk may have come to an end since.
        if record.phase != Phase::Exported || (served && !record.moving) {
            return Ok(());
        }
        let (admission, node, moving) = (record.admission, record.node.clone(), record.moving);
        tracing::info!(event = "export.restored", %admission, %node, moving, "putting an export up again");
        self.bring_up(Cloned { record, gateway }).await?;
        if moving {
            self.db.set_moving(admission, false).await?;
        }
        Ok(())
    }

    async fn clone_disk(&self, agreed: &Agreed, gateway: Gateway, now_ms: i64) -> Result<Cloned, ExportError> {
        let claims = agreed.claims();
        let disk = self.db.disk(claims.lease).await?.ok_or(ExportError::NoDisk(claims.lease))?;
        if disk.node != claims.node || disk.project != claims.project {
            return Err(ExportError::OtherDisk { lease: disk.lease, node: disk.node, project: disk.project });
        }
        self.prepare_disk(&disk).await?;
        if let Some(earlier) = self.db.export_of_lease(claims.lease).await? {
            if earlier.issued_at_ms > claims.iat.saturating_mul(1000) {
                return Err(ExportError::Superseded { lease: claims.lease, admission: earlier.admission });
            }
            self.remember_ended(&earlier, now_ms).await?;
            self.take_down(&earlier).await?;
        }
        // Another lease's export may take the same address between looking and recording: then look again.
        loop {
            let taken = self.db.addresses(&gateway).await?;
            let address =
                address::pick(&gateway, &taken).ok_or_else(|| ExportError::NoAddress(claims.project.clone()))?;
            let record = self.draft(agreed, &disk, &gateway, address)?;
            if self.db.insert_export(&record).await? {
                return Ok(Cloned { record, gateway });
            }
        }
    }

    /// The record of a new export, its grant sealed.
    fn draft(
        &self,
        agreed: &Agreed,
        disk: &DiskRecord,
        gateway: &Gateway,
        address: ipnet::Ipv4Net,
    ) -> Result<ExportRecord, ExportError> {
        let (claims, admission) = (agreed.claims(), agreed.id());
        let named = |source| ExportError::Name { admission, source };
        let target = format!("{IQN_PREFIX}:{}", disk.id).parse().map_err(named)?;
        let initiator = format!("{IQN_PREFIX}:node:{}:{admission}", claims.node).parse().map_err(named)?;
        let secret = ChapSecret::random();
        let grant = Grant {
            target,
            portal: gateway.portal,
            lun: 0,
            initiator,
            chap_name: claims.node.to_string(),
            chap_secret: secret.expose().to_owned(),
        };
        let ek_public =
            URL_SAFE_NO_PAD.decode(&claims.ek_public).map_err(|_| ExportError::Claim { claim: "assay.ek-public" })?;
        let ak_name = hex::decode(&claims.ak_name).map_err(|_| ExportError::Claim { claim: "assay.ak-name" })?;
        let json = Zeroizing::new(serde_json::to_vec(&grant).unwrap_or_default());
        let sealed_grant = seal_grant(&ek_public, &ak_name, admission, &json)
            .map_err(|source| ExportError::Seal { admission, source })?;
        Ok(ExportRecord {
            admission,
            lease: claims.lease,
            disk: disk.id,
            project: claims.project.clone(),
            node: claims.node.clone(),
            target: grant.target,
            initiator: grant.initiator,
            gateway: gateway.control_socket.clone(),
            address,
            chap_name: grant.chap_name,
            chap_secret: self.key.seal(admission, &secret),
            sealed_grant,
            phase: Phase::Cloned,
            moving: false,
            issued_at_ms: claims.iat.saturating_mul(1000),
            expires_at_ms: agreed.expires_at_ms(),
            subject: Some(agreed.subject()),
            supporting: agreed.supporting().to_vec(),
        })
    }

    async fn bring_up(&self, cloned: Cloned) -> Result<TargetUp, ExportError> {
        let Cloned { record, gateway } = &cloned;
        let ordered = match self.order(record, gateway).await {
            Ok(order) => self
                .gateways
                .put_up(gateway, record.admission, &order)
                .await
                .map_err(|source| ExportError::Gateway { project: record.project.clone(), source }),
            Err(error) => Err(error),
        };
        match ordered {
            Ok(()) => Ok(TargetUp { cloned }),
            // An export that is on record as made stays so: it is put up again when the gateway answers.
            Err(error) if cloned.record.phase == Phase::Exported => Err(error),
            Err(error) => {
                self.undo_clone(cloned).await;
                Err(error)
            }
        }
    }

    async fn finish(&self, up: TargetUp) -> Result<Exported, ExportError> {
        let admission = up.cloned.record.admission;
        let recorded = match self.db.has_ended(admission).await {
            Ok(true) => Err(ExportError::Ended(admission)),
            Ok(false) => self.db.set_phase(admission, Phase::Exported).await.map_err(ExportError::from),
            Err(error) => Err(error.into()),
        };
        match recorded {
            Ok(()) => {
                let Cloned { mut record, gateway } = up.cloned;
                record.phase = Phase::Exported;
                Ok(Exported { record, gateway, new: true })
            }
            Err(error) => {
                self.undo_target(up).await;
                Err(error)
            }
        }
    }

    /// Undoes [`TargetUp`] and all before it.
    async fn undo_target(&self, up: TargetUp) {
        self.undo_clone(up.cloned).await;
    }

    /// Undoes [`Cloned`]: the record with its address and secret. The disk stays; it is the lease's. The target may
    /// be up although its gateway did not say so, so it is taken down, and the record kept until it is.
    async fn undo_clone(&self, cloned: Cloned) {
        if let Err(error) = self.take_down(&cloned.record).await {
            let cause = assay_service::error::chain(&error);
            tracing::warn!(event = "export.undo_failed", admission = %cloned.record.admission, cause, "undoing an export");
        }
    }

    /// Severs and revokes, then forgets. Needs the lease's lock. When the gateway or the store does not answer, the record
    /// says `ending` and stays, for [`Exporter::reconcile`] to finish.
    ///
    /// The gateway severs the sessions and the store ends what the export's location gave side by side, for each alone stops
    /// the node, and neither builds on the other: a gateway that has severed serves nothing, whatever key it holds; what
    /// still serves when the key has ended is one that the store carries out no write of. Nor does either undo the other: a
    /// gateway that starts the export's process anew in between starts it with a key that is none any more. In which order a
    /// store ends a key and its users is its own to get right.
    async fn take_down(&self, record: &ExportRecord) -> Result<(), ExportError> {
        self.db.set_phase(record.admission, Phase::Ending).await?;
        let gateway = self.db.gateway(&record.project).await?;
        let severed = async {
            let Some(gateway) = &gateway else { return Ok(()) };
            let severed = self.gateways.take_down(gateway, record.admission).await;
            severed.map_err(|source| ExportError::Gateway { project: record.project.clone(), source })
        };
        let (store, disk, admission) = (Arc::clone(&self.store), record.disk, record.admission);
        let revoked = blocking(move || store.revoke(disk, admission));
        let (severed, revoked) = tokio::join!(severed, revoked);
        if let (Err(_), Err(error)) = (&severed, &revoked) {
            // The other is what the caller hears.
            let cause = assay_service::error::chain(error);
            tracing::warn!(event = "export.not_revoked", admission = %record.admission, cause, "revoking an export's key");
        }
        severed?;
        revoked?;
        self.db.remove_export(record.admission).await?;
        tracing::info!(event = "export.ended", admission = %record.admission, node = %record.node, "export ended");
        Ok(())
    }

    async fn order(&self, record: &ExportRecord, gateway: &Gateway) -> Result<ExportOrder, ExportError> {
        let disk = self.db.disk(record.lease).await?.ok_or(ExportError::NoDisk(record.lease))?;
        let secret = self.key.open(record.admission, &record.chap_secret)?;
        let location = self.locate(record).await?;
        Ok(ExportOrder {
            target: record.target.clone(),
            initiator: record.initiator.clone(),
            chap_name: record.chap_name.clone(),
            chap_secret: secret.expose().to_owned(),
            chap: gateway.chap,
            disk: record.disk,
            location,
            address: record.address.addr(),
            sessions: SESSIONS,
            reservation: disk.mac.map(|mac| Reservation { mac, address: record.address }),
            expires_at_ms: record.expires_at_ms,
        })
    }

    /// Where a record's disk is. The store must name the golden image that is on record, by its root.
    async fn locate(&self, record: &ExportRecord) -> Result<DiskLocation, ExportError> {
        let (store, disk, admission) = (Arc::clone(&self.store), record.disk, record.admission);
        let location = blocking(move || store.location(disk, admission)).await?;
        let recorded = self.db.golden_root(location.golden).await?;
        let found = hex::encode(location.root);
        match recorded {
            Some(recorded) if recorded == found => Ok(location),
            recorded => Err(ExportError::OtherGolden {
                disk,
                image: location.golden,
                found,
                recorded: recorded.unwrap_or_else(|| "nothing".to_owned()),
            }),
        }
    }

    /// Both leases' locks, always in the same order.
    pub(crate) async fn lock_both(
        &self,
        one: LeaseId,
        other: LeaseId,
    ) -> (MutexGuard<'_, ()>, Option<MutexGuard<'_, ()>>) {
        let (low, high) = (lock_of(one).min(lock_of(other)), lock_of(one).max(lock_of(other)));
        let first = self.locks[low].lock().await;
        let second = if low == high { None } else { Some(self.locks[high].lock().await) };
        (first, second)
    }

    pub(crate) async fn lock(&self, lease: LeaseId) -> MutexGuard<'_, ()> {
        self.locks[lock_of(lease)].lock().await
    }
}

fn lock_of(lease: LeaseId) -> usize {
    lease.as_bytes().iter().fold(0, |sum, octet| sum ^ usize::from(*octet)) % LOCKS
}

/// Runs what blocks on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(died) => Err(StoreError::Panicked { source: died }),
    }
}
