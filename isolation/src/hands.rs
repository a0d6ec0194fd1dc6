//! Doing: the sequences of effects on one node's ports and BMC, and putting on record what came of them. Deciding is in
//! [`crate::plan`] and [`crate::node`].
//!
//! Two orders matter here. Closing: fence first, record after, so that no record says "closed" of an open port.
//! Opening: record first, open after, so that no port is open without an admission on record.

use crate::admission::Admitted;
use crate::bmc::{BmcDriver, BmcError, PowerAction, PowerState, SystemReading};
use crate::drivers::{DriverError, Drivers};
use crate::node::{Event, Refused, next};
use crate::record::{Entry, NicRecord, NodeRecord};
use crate::store::{Effect, RecordError, Store};
use crate::switch::{LinkReading, SwitchDriver, SwitchError};
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_wire::agreement::Agreement;
use assay_wire::id::{BootId, NodeId};
use assay_wire::isolation::{NodeState, PortIntent};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};

/// How often power is read while it changes.
const POWER_POLL: Duration = Duration::from_millis(200);

/// Everything that acts on one node.
pub struct Hands {
    /// The node.
    pub name: NodeId,
    /// The record.
    pub store: Store,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Makes drivers.
    pub drivers: Arc<dyn Drivers>,
    /// How long power may take to change.
    pub power_timeout: Duration,
    /// Whose results admit.
    pub agreement: Agreement,
    bmc: OnceCell<Arc<dyn BmcDriver>>,
}

/// Why something was not done to a node.
#[derive(Debug, thiserror::Error)]
pub enum HandsError {
    /// The database.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The switch.
    #[error(transparent)]
    Switch(#[from] SwitchError),
    /// The BMC.
    #[error(transparent)]
    Bmc(#[from] BmcError),
    /// No driver.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The life cycle has no such step.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The BMC said yes and nothing happened.
    #[error("the BMC accepted {} but the node was not {wanted} within {seconds} s", .action.as_str())]
    Power {
        /// What was asked.
        action: PowerAction,
        /// What should have come of it.
        wanted: &'static str,
        /// How long we waited.
        seconds: u64,
    },
    /// Without it a reset could not be seen, and a tenant's port would stay open over a reboot into anything.
    #[error("the BMC does not report LastResetTime, without which resets cannot be seen")]
    NoResetTime,
    /// Registered without NICs, or removed meanwhile.
    #[error("node {0} or its NIC, switch or BMC is not on record any more")]
    Missing(NodeId),
}

impl Hands {
    /// Hands on `name`.
    #[must_use]
    pub fn new(
        name: NodeId,
        store: Store,
        clock: Arc<dyn Clock>,
        drivers: Arc<dyn Drivers>,
        power_timeout: Duration,
        agreement: Agreement,
    ) -> Self {
        Self { name, store, clock, drivers, power_timeout, agreement, bmc: OnceCell::new() }
    }

    /// The node's record.
    ///
    /// # Errors
    /// See [`HandsError`].
    pub async fn record(&self) -> Result<NodeRecord, HandsError> {
        self.store.node(&self.name).await?.ok_or_else(|| HandsError::Missing(self.name.clone()))
    }

    /// Takes the record one step along the life cycle, in memory.
    ///
    /// # Errors
    /// The event has no place in its state.
    pub fn step(&self, record: &mut NodeRecord, event: Event, reason: impl Into<String>) -> Result<(), Refused> {
        let state = next(record.state, event)?;
        if state != record.state {
            let from = record.state;
            tracing::info!(event = "node.state", node = %record.name, %from, to = %state, by = %event, "{state}");
        }
        record.state = state;
        record.reason = reason.into();
        record.since_ms = self.clock.now_ms();
        Ok(())
    }

    /// Puts every port into quarantine, at once and before anything is recorded. The first error is answered when all
    /// have been tried.
    ///
    /// # Errors
    /// See [`HandsError`]. The port may be open still: the caller records the desired state, and it is tried again.
    pub async fn fence(&self, record: &NodeRecord) -> Result<(), HandsError> {
        let mut outcome = Ok(());
        for nic in record.nics.iter().filter(|n| n.desired != PortIntent::Quarantine || n.observed != Some(n.desired)) {
            let fenced = self.apply(nic, PortIntent::Quarantine).await;
            outcome = outcome.and(fenced);
        }
        fail::fail_point!("isolation::fenced", |_| std::process::abort());
        outcome
    }

    /// Fences, then records the end of whatever the node was under. Recorded even if the fence failed: the record is
    /// what is tried again.
    ///
    /// # Errors
    /// See [`HandsError`]: of the fence, once all is recorded.
    pub async fn close(
        &self,
        mut record: NodeRecord,
        event: Event,
        reason: &str,
        mut effects: Vec<Effect>,
    ) -> Result<NodeRecord, (NodeRecord, HandsError)> {
        let fenced = self.fence(&record).await;
        let before = record.clone();
        if let Err(refused) = self.step(&mut record, event, reason) {
            return Err((before, refused.into()));
        }
        record.desire(PortIntent::Quarantine);
        if record.state == NodeState::Airlock {
            record.enter_anew();
        }
        effects.push(Effect::AdmissionsEnd(reason.to_owned()));
        if let Err(error) = &fenced {
            record.reason = format!("{reason}; its port is not known to be closed: {}", chain(error));
            tracing::error!(event = "port.not_fenced", node = %record.name, cause = chain(error), "tried again");
        }
        if let Err(error) = self.store.save(&record, &effects, event.as_str()).await {
            return Err((before, error.into()));
        }
        match fenced {
            Ok(()) => Ok(record),
            Err(error) => Err((record, error)),
        }
    }

    /// Opens the port of an admitted node. By value: an admission opens one port, once.
    ///
    /// # Errors
    /// See [`HandsError`].
    pub async fn move_to_tenant(&self, record: &NodeRecord, admitted: Admitted) -> Result<(), HandsError> {
        let nic = record.boot_nic().ok_or_else(|| HandsError::Missing(self.name.clone()))?;
        self.apply(nic, PortIntent::Access { vlan: admitted.vlan() }).await
    }

    /// Makes a closed port (quarantine or airlock) what the record says.
    ///
    /// # Errors
    /// See [`HandsError`].
    pub async fn set_closed(&self, nic: &NicRecord, intent: ClosedPort) -> Result<(), HandsError> {
        self.apply(nic, intent.into()).await
    }

    async fn apply(&self, nic: &NicRecord, intent: PortIntent) -> Result<(), HandsError> {
        let switch = self.switch(nic).await?;
        // Between here and the read-back nobody knows what the port is, also if this process ends.
        self.store.observed(&self.name, &nic.nic.name, None).await?;
        switch.apply(&nic.nic.port, intent).await?;
        self.store.observed(&self.name, &nic.nic.name, Some(intent)).await?;
        Ok(())
    }

    /// Reads all ports and records what they are. Drift is logged; mending it is the plan's next step. Answers the link of
    /// the NIC that boots.
    ///
    /// # Errors
    /// See [`HandsError`].
    pub async fn observe(&self, record: &NodeRecord) -> Result<Option<LinkReading>, HandsError> {
        let mut link = None;
        for (index, nic) in record.nics.iter().enumerate() {
            let read = match self.switch(nic).await {
                Ok(switch) => switch.observe(&nic.nic.port).await.map_err(HandsError::from),
                Err(error) => Err(error),
            };
            let observed = read.as_ref().ok().and_then(|reading| reading.intent);
            if observed != nic.observed {
                self.store.observed(&self.name, &nic.nic.name, observed).await?;
            }
            let reading = read?;
            if index == 0 {
                link = Some(reading.link);
            }
            if observed != Some(nic.desired) && nic.observed == Some(nic.desired) {
                tracing::warn!(event = "port.drifted", node = %self.name, port = %nic.nic.port,
                    desired = ?nic.desired, observed = ?observed, "somebody else changed this port: it is set back");
            }
        }
        Ok(link)
    }

    /// Reads the system.
    ///
    /// # Errors
    /// See [`HandsError`].
    pub async fn read_bmc(&self) -> Result<SystemReading, HandsError> {
        Ok(self.bmc().await?.read().await?)
    }

    /// The way into the airlock: off, moved, PXE once, on. Every attempt is another boot, so that nothing which an
    /// earlier attempt let run can be admitted.
    ///
    /// # Errors
    /// See [`HandsError`]. The node stays in the airlock, not entered; the whole sequence is tried again.
    pub async fn enter_airlock(&self, mut record: NodeRecord) -> Result<(), HandsError> {
        let nic = record.boot_nic().cloned().ok_or_else(|| HandsError::Missing(self.name.clone()))?;
        let bmc = self.bmc().await?;
        record.boot = Some(BootId::random());
        // Counted before it happens: a crash on the way may count one too many, and never one too few.
        record.machine_resets = record.machine_resets.saturating_add(1);
        record.entry = Entry::Pending;
        record.reset_time = None;
        record.reason = "being powered off, to be moved to the airlock".to_owned();
        self.store.save(&record, &[], "airlock-entry").await?;
        self.power_to(bmc.as_ref(), PowerAction::ForceOff).await?;
        fail::fail_point!("isolation::airlock-off", |_| std::process::abort());
        record.desire(PortIntent::Airlock);
        record.reason = "off; its port is being moved to the airlock".to_owned();
        self.store.save(&record, &[], "airlock-port").await?;
        self.set_closed(&nic, ClosedPort::Airlock).await?;
        bmc.boot_once_from_pxe().await?;
        let reading = self.power_to(bmc.as_ref(), PowerAction::On).await?;
        fail::fail_point!("isolation::airlock-on", |_| std::process::abort());
        record.reset_time = Some(reading.last_reset.ok_or(HandsError::NoResetTime)?);
        record.entry = Entry::Done;
        record.entered_ms = self.clock.now_ms();
        record.reason = "powered on in the airlock; waiting for its attestation".to_owned();
        self.store.save(&record, &[], "airlock-entered").await?;
        Ok(())
    }

    /// Powers off a node whose lease ended. The plan comes here only with its ports closed.
    ///
    /// # Errors
    /// See [`HandsError`].
    pub async fn clean(&self, mut record: NodeRecord) -> Result<(), HandsError> {
        let bmc = self.bmc().await?;
        self.power_to(bmc.as_ref(), PowerAction::ForceOff).await?;
        self.step(&mut record, Event::Cleaned, "powered off, port closed")?;
        record.enter_anew();
        Ok(self.store.save(&record, &[], Event::Cleaned.as_str()).await?)
    }

    /// Asks the BMC whether the node was reset since it was powered on in the airlock. If so: a tenant's node is fenced
    /// and rejected; in the airlock it is another boot, so that nothing appraised before counts.
    ///
    /// # Errors
    /// See [`HandsError`].
    pub async fn check_reset(&self, mut record: NodeRecord) -> Result<(), HandsError> {
        let reading = self.read_bmc().await?;
        let Some(reason) = reset_seen(&record, &reading) else { return Ok(()) };
        tracing::warn!(event = "node.reset", node = %record.name, state = %record.state, "{reason}");
        record.machine_resets = record.machine_resets.saturating_add(1);
        if record.state == NodeState::Allocated {
            return self.close(record, Event::ResetSeen, &reason, Vec::new()).await.map(drop).map_err(|(_, e)| e);
        }
        self.step(&mut record, Event::ResetSeen, reason)?;
        record.boot = Some(BootId::random());
        record.entry = if reading.last_reset.is_some() { Entry::Done } else { Entry::Pending };
        record.reset_time = reading.last_reset;
        Ok(self.store.save(&record, &[], Event::ResetSeen.as_str()).await?)
    }

    /// Asks for a power state and waits until the BMC shows it.
    async fn power_to(&self, bmc: &dyn BmcDriver, action: PowerAction) -> Result<SystemReading, HandsError> {
        let (state, wanted) = match action {
            PowerAction::ForceOff => (PowerState::Off, "off"),
            PowerAction::On | PowerAction::ForceRestart => (PowerState::On, "on"),
        };
        let reading = bmc.read().await?;
        if action == PowerAction::ForceOff && reading.power == state {
            return Ok(reading);
        }
        bmc.power(action).await?;
        let deadline = Instant::now() + self.power_timeout;
        loop {
            let reading = bmc.read().await?;
            if reading.power == state {
                return Ok(reading);
            }
            if Instant::now() >= deadline {
                return Err(HandsError::Power { action, wanted, seconds: self.power_timeout.as_secs() });
            }
            sleep(POWER_POLL).await;
        }
    }

    async fn bmc(&self) -> Result<Arc<dyn BmcDriver>, HandsError> {
        let make = async || {
            let (bmc, sealed) =
                self.store.bmc(&self.name).await?.ok_or_else(|| HandsError::Missing(self.name.clone()))?;
            Ok::<_, HandsError>(self.drivers.bmc(&self.name, &bmc, &sealed)?)
        };
        Ok(Arc::clone(self.bmc.get_or_try_init(make).await?))
    }

    async fn switch(&self, nic: &NicRecord) -> Result<Arc<dyn SwitchDriver>, HandsError> {
        let switches = self.store.inventory().await?.switches;
        let switch = switches.iter().find(|s| s.name == nic.nic.switch);
        Ok(self.drivers.switch(switch.ok_or_else(|| HandsError::Missing(self.name.clone()))?))
    }
}

/// A port intent that reaches no tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClosedPort {
    /// Quarantine.
    Quarantine,
    /// Airlock.
    Airlock,
}

impl From<ClosedPort> for PortIntent {
    fn from(port: ClosedPort) -> Self {
        match port {
            ClosedPort::Quarantine => Self::Quarantine,
            ClosedPort::Airlock => Self::Airlock,
        }
    }
}

/// Why a reading says that the node was reset since it entered the airlock; none if it does not.
#[must_use]
pub fn reset_seen(record: &NodeRecord, reading: &SystemReading) -> Option<String> {
    match (&record.reset_time, &reading.last_reset) {
        (Some(known), Some(read)) if known == read => None,
        (Some(_) | None, Some(_)) => Some("the node was reset: it must go through the airlock again".to_owned()),
        (Some(_) | None, None) => {
            Some("the BMC stopped reporting LastResetTime: the node may have been reset".to_owned())
        }
    }
}
