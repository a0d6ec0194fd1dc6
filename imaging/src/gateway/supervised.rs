//! An export's worker, kept running: one that ends by itself is started anew, the clone as it was left.

use super::companion::OpenError;
use super::process::{Launcher, Link, Running, StartError, TurnError};
use crate::store::StoreError;
use crate::worker::message::{Confinement, FromWorker, ToWorker, WorkerOrder, WorkerStatus};
use assay_service::CancellationToken;
use assay_service::error::chain;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Between the end of a worker and its successor's start; doubled each time.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// One that ran for so long was well.
const STEADY: Duration = Duration::from_secs(30);
/// How long a worker pauses at most: then it goes on, whether whoever had it pause still lives or not.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// How long the disk's files may be somebody else's after that, and how often that is looked at.
const REOPEN_LIMIT: Duration = Duration::from_secs(10);
const REOPEN_INTERVAL: Duration = Duration::from_millis(20);
/// Log events that a worker may have in a row, and how many more each second.
const LOG_BURST: u32 = 100;
const LOG_A_SECOND: u32 = 10;

/// Opens an export's files and says what is to be done with them: each time anew. Blocks.
pub(super) type Recipe = dyn Fn() -> Result<Launch, OpenError> + Send + Sync;

/// What a worker gets, and the connection that keeps its companion, if it has one.
pub(super) struct Launch {
    pub(super) order: WorkerOrder,
    pub(super) files: Vec<OwnedFd>,
    pub(super) companion: Option<OwnedFd>,
}

/// A worker, its successors, and the way to them.
pub(super) struct Supervised {
    /// Of what export, for the log.
    label: String,
    launcher: Arc<Launcher>,
    recipe: Box<Recipe>,
    /// Nothing while there is no worker.
    now: Mutex<Option<(Arc<Link>, Confinement)>>,
    restarts: AtomicU32,
    sever: CancellationToken,
    paused: Mutex<Option<Pause>>,
    /// Held while the worker is paused or resumed, so that the two do not cross.
    turning: tokio::sync::Mutex<()>,
    /// The recipe may come to more than it did.
    moved: Notify,
}

/// A worker that has closed its disk's files. Whoever takes this has it go on.
struct Pause {
    link: Arc<Link>,
    /// Ends the wait for the pause to be long enough.
    over: CancellationToken,
}

/// Why an export is not paused.
#[derive(Debug, thiserror::Error)]
pub(super) enum PauseError {
    /// It has no worker at the moment, and so nobody has the disk open.
    #[error("it has no worker at the moment")]
    NoWorker,
    /// The worker.
    #[error(transparent)]
    Worker(#[from] TurnError),
}

/// Why an export has no worker.
#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    /// The disk cannot be opened.
    #[error(transparent)]
    Open(OpenError),
    /// The process.
    #[error(transparent)]
    Start(StartError),
}

impl Supervised {
    /// Starts an export's first worker; the task ends when it is severed, and has ended the last worker by then.
    pub(super) async fn start(
        label: String,
        launcher: Arc<Launcher>,
        recipe: Box<Recipe>,
    ) -> Result<(Arc<Self>, JoinHandle<()>), WorkerError> {
        let supervised = Arc::new(Self {
            label,
            launcher,
            recipe,
            now: Mutex::default(),
            restarts: AtomicU32::new(0),
            sever: CancellationToken::new(),
            paused: Mutex::default(),
            turning: tokio::sync::Mutex::default(),
            moved: Notify::new(),
        });
        let running = supervised.launch().await?;
        let task = tokio::spawn(Arc::clone(&supervised).supervise(running));
        Ok((supervised, task))
    }

    /// Hands an initiator's connection to the worker. Without one it is closed: initiators try again.
    pub(super) fn hand_over(&self, stream: TcpStream, peer: SocketAddr) {
        let handed = self.link().map(|link| link.hand_over(stream.as_fd(), peer));
        if let Some(Err(error)) = handed {
            tracing::debug!(event = "portal.not_handed_over", export = self.label, %peer, %error, "worker does not take it");
        }
    }

    /// How it goes; nothing if there is no worker that says so.
    pub(super) async fn status(&self) -> Option<WorkerStatus> {
        self.link()?.status().await
    }

    /// What holds the worker, if there is one.
    pub(super) fn confinement(&self) -> Option<Confinement> {
        self.now().as_ref().map(|(_, confinement)| *confinement)
    }

    /// How often a worker ended by itself and was started anew.
    pub(super) fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// Has the worker serve for so long from now, by its own clock.
    pub(super) fn renew(self: &Arc<Self>, remaining_ms: u64) {
        let Some(link) = self.link() else { return };
        // The gateway's own clock decides; a worker that does not hear of it ends early, and is started anew.
        tokio::spawn(async move { link.tell(&ToWorker::Renew { remaining_ms }, &[]).await });
    }

    /// Has the worker hold its initiators' commands and close the disk's files, until [`Supervised::resume`], or for
    /// [`LONGEST_PAUSE`] from now. To its end, whether or not the caller waits for it.
    pub(super) async fn pause(self: &Arc<Self>) -> Result<(), PauseError> {
        let this = Arc::clone(self);
        tokio::spawn(async move { this.shut().await }).await.unwrap_or(Err(PauseError::NoWorker))
    }

    /// Has a paused worker go on with the disk as it is now. To its end, whether or not the caller waits for it.
    pub(super) async fn resume(self: &Arc<Self>) {
        let this = Arc::clone(self);
        if let Err(error) = tokio::spawn(async move { this.open().await }).await {
            tracing::error!(event = "worker.not_resumed", export = self.label, %error, "resuming a worker");
        }
    }

    /// Has the worker, whether it is paused or not, go on with the disk in the place where the recipe finds it from now on. To
    /// its end, whether or not the caller waits for it. If there is no worker, another one is started at once.
    pub(super) async fn moved(self: &Arc<Self>) {
        if let Err(error) = self.pause().await {
            tracing::info!(event = "worker.not_paused", export = self.label, cause = chain(&error), "a disk was moved");
        }
        self.resume().await;
        self.moved.notify_one();
    }

    async fn shut(self: Arc<Self>) -> Result<(), PauseError> {
        let _alone = self.turning.lock().await;
        let link = self.link().ok_or(PauseError::NoWorker)?;
        let over = CancellationToken::new();
        let before = self.paused().replace(Pause { link: Arc::clone(&link), over: over.clone() });
        // Whoever had it paused before may have died since.
        let is_paused = before.is_some_and(|before| {
            before.over.cancel();
            Arc::ptr_eq(&before.link, &link)
        });
        let turned = if is_paused { Ok(()) } else { link.pause(&self.label).await };
        if matches!(turned, Err(TurnError::Problem(_))) || link.is_given_up() {
            *self.paused() = None;
        } else {
            // One that says nothing may have paused all the same.
            let longest = if turned.is_ok() { LONGEST_PAUSE } else { Duration::ZERO };
            tokio::spawn(Arc::clone(&self).end_of_pause(over, longest));
        }
        Ok(turned?)
    }

    async fn end_of_pause(self: Arc<Self>, over: CancellationToken, longest: Duration) {
        tokio::select! {
            () = over.cancelled() => {}
            () = sleep(longest) => {
                tracing::warn!(event = "worker.paused_too_long", export = self.label, "nobody had the export go on");
                self.resume().await;
            }
        }
    }

    /// A worker that cannot go on is ended, and started anew.
    async fn open(self: Arc<Self>) {
        let _alone = self.turning.lock().await;
        let Some(Pause { link, over }) = self.paused().take() else { return };
        over.cancel();
        let resumed = async {
            let Launch { order, files, companion } = self.reopen().await.map_err(|error| chain(&error))?;
            link.resume(order.disk, &files, companion).await.map_err(|error| chain(&error))
        };
        // A worker that died meanwhile has no part in this: its successor opens the disk by itself.
        let is_current = || self.link().is_some_and(|now| Arc::ptr_eq(&now, &link));
        if is_current()
            && let Err(cause) = resumed.await
            && is_current()
        {
            tracing::error!(
                event = "worker.not_resumed",
                export = self.label,
                cause,
                "ending a worker that cannot go on"
            );
            let _gone_already = link.tell(&ToWorker::End, &[]).await;
        }
    }

    /// Opens the disk, once nobody else has it any more.
    async fn reopen(self: &Arc<Self>) -> Result<Launch, OpenError> {
        let until = Instant::now() + REOPEN_LIMIT;
        loop {
            match self.opened().await {
                Err(OpenError::Store(StoreError::InUse { .. })) if Instant::now() < until => {
                    sleep(REOPEN_INTERVAL).await;
                }
                opened => return opened,
            }
        }
    }

    async fn opened(self: &Arc<Self>) -> Result<Launch, OpenError> {
        let opening = Arc::clone(self);
        let opened = tokio::task::spawn_blocking(move || (opening.recipe)()).await;
        opened.unwrap_or_else(|source| Err(StoreError::Panicked { source }.into()))
    }

    /// Has the task end the worker.
    pub(super) fn sever(&self) {
        self.sever.cancel();
    }

    async fn supervise(self: Arc<Self>, mut running: Running) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let begun = Instant::now();
            let mut allowance = Allowance::new(begun);
            let log = |message: &FromWorker| {
                if allowance.take(Instant::now()) {
                    self.log(message);
                }
            };
            let ended = tokio::select! {
                biased;
                () = self.sever.cancelled() => None,
                ended = running.run(log) => Some(ended),
            };
            *self.now() = None;
            let Some(ended) = ended else { return running.end(&self.label).await };
            let how = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
            tracing::warn!(event = "worker.ended", export = self.label, how, "an export's worker ended by itself");
            // Only one process at a time may have a clone.
            let settled = tokio::select! {
                biased;
                () = self.sever.cancelled() => false,
                () = running.settle(&self.label) => true,
            };
            if !settled {
                return running.end(&self.label).await;
            }
            if begun.elapsed() >= STEADY {
                backoff = FIRST_BACKOFF;
            }
            running = loop {
                tokio::select! {
                    biased;
                    () = self.sever.cancelled() => return,
                    () = self.moved.notified() => backoff = FIRST_BACKOFF,
                    () = sleep(backoff) => backoff = (backoff * 2).min(LONGEST_BACKOFF),
                }
                // Who has a disk on Ceph may take long to answer. What comes of it then is dropped, and so ended.
                let launched = tokio::select! {
                    biased;
                    () = self.sever.cancelled() => return,
                    launched = self.launch() => launched,
                };
                match launched {
                    Ok(running) => break running,
                    Err(error) => {
                        let cause = chain(&error);
                        tracing::warn!(
                            event = "worker.not_started",
                            export = self.label,
                            cause,
                            "starting a worker anew"
                        );
                    }
                }
            };
            self.restarts.fetch_add(1, Ordering::Relaxed);
            tracing::info!(event = "worker.restarted", export = self.label, "an export's worker was started anew");
        }
    }

    async fn launch(self: &Arc<Self>) -> Result<Running, WorkerError> {
        let launch = self.opened().await.map_err(WorkerError::Open)?;
        let running = self.launcher.launch(launch).await.map_err(WorkerError::Start)?;
        *self.now() = Some((Arc::clone(&running.link), running.confinement));
        Ok(running)
    }

    /// A worker's own words, which may be its node's.
    fn log(&self, message: &FromWorker) {
        let export = self.label.as_str();
        match message {
            FromWorker::LoggedIn { peer, target, initiator } => {
                tracing::info!(event = "portal.logged_in", export, %peer, target, initiator, "initiator logged in");
            }
            FromWorker::Log { level, event: name, text } => match level.as_str() {
                "error" => tracing::error!(event = "worker.says", export, name, text, "export worker"),
                "warn" => tracing::warn!(event = "worker.says", export, name, text, "export worker"),
                _ => tracing::info!(event = "worker.says", export, name, text, "export worker"),
            },
            _ => {}
        }
    }

    fn link(&self) -> Option<Arc<Link>> {
        self.now().as_ref().map(|(link, _)| Arc::clone(link))
    }

    fn paused(&self) -> MutexGuard<'_, Option<Pause>> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> MutexGuard<'_, Option<(Arc<Link>, Confinement)>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many log events a worker may still have.
struct Allowance {
    left: u32,
    filled_at: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: LOG_BURST, filled_at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.filled_at).as_secs();
        if seconds > 0 {
            let more = u32::try_from(seconds).unwrap_or(u32::MAX).saturating_mul(LOG_A_SECOND);
            self.left = self.left.saturating_add(more).min(LOG_BURST);
            self.filled_at = now;
        }
        let allowed = self.left > 0;
        self.left = self.left.saturating_sub(1);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_talkative_worker_is_not_listened_to_without_end() {
        let begun = Instant::now();
        let mut allowance = Allowance::new(begun);
        let heard = |allowance: &mut Allowance, at| (0..1000).filter(|_| allowance.take(at)).count();
        assert_eq!(heard(&mut allowance, begun), 100);
        assert_eq!(heard(&mut allowance, begun + Duration::from_secs(2)), 20);
        assert_eq!(heard(&mut allowance, begun + Duration::from_secs(3600)), 100);
    }
}
