//! One worker process: how it is started, what is said to it, and how it is ended.

use super::GatewayError;
use super::companion::Companion;
use super::supervised::Launch;
use crate::rbd_disk::message::FromRbdDisk;
use crate::worker::disk::DiskOrder;
use crate::worker::message::{Confinement, FromWorker, MESSAGE_BYTES, ToWorker, WorkerStatus, receive, send};
use assay_service::CancellationToken;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

/// From start to readiness, with a large map to read from a slow disk.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a worker gets to ask its initiators to log out, before it is killed.
const END_TIMEOUT: Duration = Duration::from_millis(30);
/// A worker answers at once, or not at all.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);
/// For what an initiator has under way to end, and to be flushed; or for a large map to be read.
const TURN_TIMEOUT: Duration = Duration::from_secs(3);
/// The worker's heap comes back to be used again, not to the kernel and zeroed anew: this much of it at most.
const MALLOC: &str = "glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=4194304:glibc.malloc.mmap_threshold=2097152";

/// Starts workers, each with its death tied to this process's.
pub(super) struct Launcher {
    program: PathBuf,
    starts: mpsc::Sender<Start>,
}

struct Start {
    command: Command,
    started: oneshot::Sender<io::Result<Child>>,
}

/// Why a worker does not run.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// The operating system refused.
    #[error("starting {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It said why not.
    #[error("the export worker refuses: {0}")]
    Refused(String),
    /// It ended, or said something else than that it is ready.
    #[error("the export worker ended before it was ready")]
    Ended,
    /// It took too long.
    #[error("the export worker was not ready within {} s", START_TIMEOUT.as_secs())]
    TimedOut,
}

impl Launcher {
    /// `program`, or `assay-export` beside this one.
    pub(super) fn new(program: Option<PathBuf>) -> Result<Self, GatewayError> {
        let program = match program {
            Some(program) => program,
            None => std::env::current_exe().map_err(GatewayError::OwnPath)?.with_file_name("assay-export"),
        };
        if !program.is_file() {
            return Err(GatewayError::NoWorker { program });
        }
        let (starts, wanted) = mpsc::channel::<Start>();
        let runtime = Handle::current();
        // The kernel kills a worker when the thread that started it ends, so that is one that lasts.
        std::thread::Builder::new()
            .name("worker-launcher".to_owned())
            .spawn(move || {
                let _runtime = runtime.enter();
                while let Ok(Start { mut command, started }) = wanted.recv() {
                    // A child that nobody waits for any more is killed as it is dropped.
                    let _gone = started.send(command.spawn());
                }
            })
            .map_err(GatewayError::OwnPath)?;
        Ok(Self { program, starts })
    }

    /// Starts a worker, and waits until it is ready: confined, with its disk open.
    pub(super) async fn launch(&self, launch: Launch) -> Result<Running, StartError> {
        let Launch { order, files, companion } = launch;
        let failed = |source| StartError::Start { program: self.program.clone(), source };
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|errno| failed(errno.into()))?;
        let mut command = Command::new(&self.program);
        command.env_clear().env("GLIBC_TUNABLES", MALLOC).kill_on_drop(true).current_dir("/");
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        let (started, child) = oneshot::channel();
        let _answers_by_dropping = self.starts.send(Start { command, started });
        let child = child.await.map_err(|_| StartError::Ended)?.map_err(failed)?;
        let link = packets(ours).and_then(|socket| Link::new(socket, companion)).map_err(failed)?;
        let ready = async {
            let fds: Vec<BorrowedFd<'_>> = files.iter().map(OwnedFd::as_fd).collect();
            link.tell(&ToWorker::Serve(Box::new(order)), &fds).await.map_err(|_| StartError::Ended)?;
            loop {
                match link.hear().await {
                    Ok(Some(FromWorker::Ready(confinement))) => return Ok(confinement),
                    Ok(Some(FromWorker::Refused { reason })) => return Err(StartError::Refused(reason)),
                    Ok(Some(FromWorker::Log { .. })) => {}
                    Ok(_) | Err(_) => return Err(StartError::Ended),
                }
            }
        };
        let ready = timeout(START_TIMEOUT, ready).await.unwrap_or(Err(StartError::TimedOut));
        let mut running = Running { child, link: Arc::new(link), confinement: Confinement::default() };
        match ready {
            Ok(confinement) => {
                running.confinement = confinement;
                Ok(running)
            }
            Err(error) => {
                running.kill().await;
                Err(error)
            }
        }
    }
}

/// A socket whose packets are datagrams, but come in order, and have an end.
pub(super) fn packets(socket: OwnedFd) -> io::Result<UnixDatagram> {
    rustix::io::ioctl_fionbio(&socket, true)?;
    UnixDatagram::from_std(socket.into())
}

/// A worker that was ready.
pub(super) struct Running {
    child: Child,
    pub(super) link: Arc<Link>,
    pub(super) confinement: Confinement,
}

impl Running {
    /// Listens to it until it ends by itself. What is for the log goes to `log`.
    pub(super) async fn run(&mut self, mut log: impl FnMut(&FromWorker)) -> io::Result<ExitStatus> {
        loop {
            let heard = tokio::select! {
                heard = self.link.hear() => heard.ok().flatten(),
                said = self.link.companion_says() => said,
                () = self.link.given_up.cancelled() => None,
            };
            let Some(message) = heard else { break };
            match message {
                FromWorker::Log { .. } | FromWorker::LoggedIn { .. } => log(&message),
                FromWorker::Status(status) => self.link.answer(status),
                FromWorker::Paused { problem } => self.link.turned(Turn::Pause, problem),
                FromWorker::Resumed { problem } => self.link.turned(Turn::Resume, problem),
                // Said twice: not a worker of ours any more.
                FromWorker::Ready(_) | FromWorker::Refused { .. } => break,
                #[cfg(feature = "failpoints")]
                FromWorker::Attacked(_) => break,
            }
        }
        // It has hung up, or talks nonsense. Whatever it does, it is over.
        let _ended_already = self.child.start_kill();
        self.child.wait().await
    }

    /// Ends it: when this returns, nothing of it is left, nor of its connections.
    pub(super) async fn end(&mut self, export: &str) {
        let asked = async {
            self.link.tell(&ToWorker::End, &[]).await?;
            self.child.wait().await
        };
        if !matches!(timeout(END_TIMEOUT, asked).await, Ok(Ok(_))) {
            self.kill().await;
        }
        // After it: a worker whose companion is gone could only say that its disk has failed.
        if let Some(companion) = self.link.companion() {
            companion.end(export).await;
        }
    }

    /// Waits until its companion is done with what it had asked for. It has ended by itself.
    pub(super) async fn settle(&self, export: &str) {
        if let Some(companion) = self.link.companion() {
            companion.settle(export).await;
        }
    }

    async fn kill(&mut self) {
        let _ended_already = self.child.start_kill();
        if let Err(error) = self.child.wait().await {
            tracing::error!(event = "worker.not_reaped", %error, "waiting for an export worker's end");
        }
    }
}

/// The socket to a worker.
pub(super) struct Link {
    socket: UnixDatagram,
    /// Who waits for its status.
    asked: Mutex<Vec<oneshot::Sender<WorkerStatus>>>,
    /// Who waits for it to pause, or to go on: one at a time.
    turning: Mutex<Option<(Turn, oneshot::Sender<Option<String>>)>>,
    /// Who has its clone, if that is on Ceph: while it is paused, nobody.
    companion: watch::Sender<Option<Arc<Companion>>>,
    /// It is to end, whatever it does.
    given_up: CancellationToken,
}

/// What a worker is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Pause,
    Resume,
}

/// Why a worker does not pause, or does not go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum TurnError {
    /// It said why.
    #[error("the export worker has a problem: {0}")]
    Problem(String),
    /// It is gone, or says nothing.
    #[error("the export worker did not answer within {} s", TURN_TIMEOUT.as_secs())]
    Silent,
    /// Its companion cannot be listened to.
    #[error("listening to its companion")]
    Companion(#[source] io::Error),
}

impl Link {
    fn new(socket: UnixDatagram, companion: Option<OwnedFd>) -> io::Result<Self> {
        let companion = companion.map(Companion::new).transpose()?.map(Arc::new);
        Ok(Self {
            socket,
            asked: Mutex::default(),
            turning: Mutex::default(),
            companion: watch::Sender::new(companion),
            given_up: CancellationToken::new(),
        })
    }

    /// Hands an initiator's connection over.
    ///
    /// # Errors
    /// The worker is gone, or does not keep up.
    pub(super) fn hand_over(&self, stream: BorrowedFd<'_>, peer: SocketAddr) -> io::Result<()> {
        send(&self.socket, &ToWorker::Connection { peer }, &[stream], SendFlags::DONTWAIT)
    }

    pub(super) async fn tell(&self, message: &ToWorker, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.socket.async_io(Interest::WRITABLE, || send(&self.socket, message, fds, SendFlags::DONTWAIT)).await
    }

    /// How the export goes; nothing if it does not say so in time.
    pub(super) async fn status(&self) -> Option<WorkerStatus> {
        let (answer, status) = oneshot::channel();
        {
            let mut asked = self.asked();
            asked.retain(|waiting| !waiting.is_closed());
            asked.push(answer);
        }
        let asking = async {
            self.tell(&ToWorker::Status, &[]).await.ok()?;
            status.await.ok()
        };
        timeout(STATUS_TIMEOUT, asking).await.ok().flatten()
    }

    /// Has the worker hold commands and close its disk, and waits until it has, and its companion is gone.
    pub(super) async fn pause(&self, export: &str) -> Result<(), TurnError> {
        // Its end is not the worker's from here on.
        let companion = self.companion.send_replace(None);
        let turned = self.turn(Turn::Pause, &ToWorker::Pause, &[]).await;
        let Some(companion) = companion else { return turned };
        match &turned {
            Ok(()) => companion.end(export).await,
            Err(error) => {
                self.companion.send_replace(Some(companion));
                if matches!(error, TurnError::Silent) {
                    // It may pause at any time, and its companion have something under way until then: only after both
                    // may another one have the clone.
                    self.given_up.cancel();
                }
            }
        }
        turned
    }

    /// Has the worker go on with a disk, and waits until it does.
    pub(super) async fn resume(
        &self,
        disk: DiskOrder,
        files: &[OwnedFd],
        companion: Option<OwnedFd>,
    ) -> Result<(), TurnError> {
        let companion = companion.map(Companion::new).transpose().map_err(TurnError::Companion)?;
        self.companion.send_replace(companion.map(Arc::new));
        self.turn(Turn::Resume, &ToWorker::Resume(disk), files).await
    }

    /// Whether it is about to end.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.is_cancelled()
    }

    fn companion(&self) -> Option<Arc<Companion>> {
        self.companion.borrow().clone()
    }

    /// What its companion says, as if it did itself; nothing once that is gone, and with it the worker.
    async fn companion_says(&self) -> Option<FromWorker> {
        let mut current = self.companion.subscribe();
        loop {
            let companion = current.borrow_and_update().clone();
            let said = async {
                match companion {
                    Some(companion) => companion.hear().await,
                    None => std::future::pending().await,
                }
            };
            let said = tokio::select! {
                biased;
                // The sender is our own.
                _ = current.changed() => continue,
                said = said => said,
            };
            return match said? {
                FromRbdDisk::Log { level, event, text } => Some(FromWorker::Log { level, event, text }),
                FromRbdDisk::Ready(_) | FromRbdDisk::Refused { .. } => None,
                #[cfg(feature = "failpoints")]
                FromRbdDisk::Attacked(_) => None,
            };
        }
    }

    async fn turn(&self, turn: Turn, message: &ToWorker, files: &[OwnedFd]) -> Result<(), TurnError> {
        let (answer, turned) = oneshot::channel();
        *self.turning() = Some((turn, answer));
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(OwnedFd::as_fd).collect();
        let asking = async {
            self.tell(message, &fds).await.ok()?;
            turned.await.ok()
        };
        match timeout(TURN_TIMEOUT, asking).await {
            Ok(Some(None)) => Ok(()),
            Ok(Some(Some(problem))) => Err(TurnError::Problem(problem)),
            Ok(None) | Err(_) => Err(TurnError::Silent),
        }
    }

    /// One that comes too late is nobody's answer.
    fn turned(&self, turn: Turn, problem: Option<String>) {
        if let Some((_, waiting)) = self.turning().take_if(|(asked, _)| *asked == turn) {
            let _went_away = waiting.send(problem);
        }
    }

    fn turning(&self) -> MutexGuard<'_, Option<(Turn, oneshot::Sender<Option<String>>)>> {
        self.turning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, status: WorkerStatus) {
        for waiting in self.asked().drain(..) {
            let _went_away = waiting.send(status);
        }
    }

    async fn hear(&self) -> io::Result<Option<FromWorker>> {
        let mut buffer = vec![0; MESSAGE_BYTES];
        let heard = self
            .socket
            .async_io(Interest::READABLE, || receive::<FromWorker>(&self.socket, &mut buffer, RecvFlags::DONTWAIT))
            .await?;
        // It has no descriptors to give; if it sends some, they are closed here.
        Ok(heard.map(|(message, _closed)| message))
    }

    fn asked(&self) -> MutexGuard<'_, Vec<oneshot::Sender<WorkerStatus>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
