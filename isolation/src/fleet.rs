//! All nodes' drivers: started, supervised, reached by name.

use crate::commands::{Command, Reply};
use crate::config::Config;
use crate::driver::Driver;
use crate::drivers::Drivers;
use crate::hands::Hands;
use crate::store::{RecordError, Store};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::error::ApiError;
use assay_wire::id::NodeId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use tokio_util::task::TaskTracker;

/// Commands waiting for one node. Callers beyond that wait in their own requests.
const INBOX: usize = 16;
/// After a driver panicked.
const RESTART_BACKOFF: Duration = Duration::from_secs(1);

/// The drivers of all nodes. Cheap to clone.
#[derive(Clone)]
pub struct Fleet {
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    clock: Arc<dyn Clock>,
    drivers: Arc<dyn Drivers>,
    config: Config,
    shutdown: CancellationToken,
    inboxes: Mutex<HashMap<NodeId, mpsc::Sender<Command>>>,
    tasks: TaskTracker,
}

impl Fleet {
    /// Starts a driver for every node on record, and waits until each has reconciled its ports or failed to: what the
    /// record says is true of the switches, or is known not to be, before anybody may ask.
    ///
    /// # Errors
    /// The record cannot be read.
    pub async fn start(
        store: Store,
        clock: Arc<dyn Clock>,
        drivers: Arc<dyn Drivers>,
        config: Config,
        shutdown: CancellationToken,
    ) -> Result<Self, RecordError> {
        let names = store.node_names().await?;
        let (inboxes, tasks) = (Mutex::default(), TaskTracker::new());
        let fleet = Self { shared: Arc::new(Shared { store, clock, drivers, config, shutdown, inboxes, tasks }) };
        let reconciled: Vec<_> = names.into_iter().map(|name| fleet.add(name)).collect();
        for node in reconciled {
            // A driver that ended without a word has been logged.
            let _ = node.await;
        }
        Ok(fleet)
    }

    /// Starts the driver of a node that is on record. Answers once its ports have been reconciled, or could not be.
    pub fn add(&self, name: NodeId) -> oneshot::Receiver<()> {
        let (tell, reconciled) = oneshot::channel();
        let fleet = self.clone();
        self.shared.tasks.spawn(async move { fleet.supervise(name, tell).await });
        reconciled
    }

    /// Sends a command to a node and waits for the answer.
    ///
    /// # Errors
    /// The node's own, or that there is no such node.
    pub async fn ask<T>(&self, name: &NodeId, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ApiError> {
        let inbox = self.inboxes().get(name).cloned();
        let unknown = || ApiError::not_found(format!("there is no node {name}"));
        let (reply, answer) = oneshot::channel();
        inbox.ok_or_else(unknown)?.send(command(reply)).await.map_err(|_| unknown())?;
        let interrupted = || ApiError::unavailable("interrupted", format!("the driver of node {name} was interrupted"));
        answer.await.map_err(|_| interrupted())?
    }

    /// Waits until all drivers have ended, after shutdown.
    pub async fn ended(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    async fn supervise(&self, name: NodeId, reconciled: oneshot::Sender<()>) {
        let (sender, mut inbox) = mpsc::channel(INBOX);
        self.inboxes().insert(name.clone(), sender);
        let mut reconciled = Some(reconciled);
        loop {
            let driver = self.driver(name.clone(), reconciled.take());
            // A task of its own, so that a panic ends one node's driver for a second and nothing else.
            let running = tokio::spawn(async move {
                driver.run(&mut inbox).await;
            });
            match running.await {
                Ok(()) => break,
                Err(_) if self.shared.shutdown.is_cancelled() => break,
                Err(panic) => {
                    tracing::error!(event = "driver.panicked", node = %name, cause = %panic, "it is started again");
                    sleep(RESTART_BACKOFF).await;
                }
            }
            let (sender, new) = mpsc::channel(INBOX);
            inbox = new;
            self.inboxes().insert(name.clone(), sender);
        }
        self.inboxes().remove(&name);
    }

    fn driver(&self, name: NodeId, reconciled: Option<oneshot::Sender<()>>) -> Driver {
        let Shared { store, clock, drivers, config, shutdown, .. } = &*self.shared;
        let (clock, drivers, agreement) = (Arc::clone(clock), Arc::clone(drivers), config.agreement.clone());
        let hands = Hands::new(name, store.clone(), clock, drivers, config.power_timeout, agreement);
        Driver { hands, periods: config.periods, reconciled, shutdown: shutdown.clone() }
    }

    fn inboxes(&self) -> std::sync::MutexGuard<'_, HashMap<NodeId, mpsc::Sender<Command>>> {
        self.shared.inboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
