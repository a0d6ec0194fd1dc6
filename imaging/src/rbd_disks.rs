//! Starts `assay-rbd-disk` ([`crate::rbd_disk`]) for each connection to a Unix socket, as systemd does for a socket with
//! `Accept=yes`, which may do it in this one's place. It stands where Ceph can be reached; gateways, which cannot, connect
//! here. What it started outlives it, and ends with its connection.

use crate::lock::lock;
use assay_service::{CancellationToken, owner_socket};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::process::Command;

/// Processes at once: more disks than one host serves.
const MOST: usize = 1024;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// The first of the users that they become, each one of its own, where this process may do that: behind those of a
/// gateway's workers.
const USERS: u32 = 0x7002_0000;
/// After `accept` failed, for want of file descriptors say.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Why none are started.
#[derive(Debug, thiserror::Error)]
pub enum RbdDisksError {
    /// The socket cannot be had.
    #[error("listening for disks on Ceph on {}", socket.display())]
    Listen {
        /// Which.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no program to start.
    #[error("the program for disks on Ceph {} is not there", program.display())]
    NoProgram {
        /// Where it should be.
        program: PathBuf,
    },
    /// This process does not know where its own program is.
    #[error("looking for the program for disks on Ceph")]
    OwnPath(#[source] io::Error),
}

/// A socket that is bound.
#[derive(Debug)]
pub struct RbdDisks {
    listener: UnixListener,
    program: PathBuf,
    own_uid: u32,
    /// Users of those that run, by what they are beyond the first.
    users: Arc<Mutex<HashSet<u16>>>,
}

impl RbdDisks {
    /// Binds `socket`, in place of one that a killed predecessor left, for this user and root only. `program` is
    /// `assay-rbd-disk` beside this one if none is given.
    ///
    /// # Errors
    /// The socket cannot be had, or the program is not there.
    pub fn bind(socket: &Path, program: Option<PathBuf>) -> Result<Self, RbdDisksError> {
        let program = match program {
            Some(program) => program,
            None => std::env::current_exe().map_err(RbdDisksError::OwnPath)?.with_file_name("assay-rbd-disk"),
        };
        if !program.is_file() {
            return Err(RbdDisksError::NoProgram { program });
        }
        let failed = |source| RbdDisksError::Listen { socket: socket.to_owned(), source };
        let listener = listener(socket).map_err(failed)?;
        let own_uid = rustix::process::geteuid().as_raw();
        Ok(Self { listener, program, own_uid, users: Arc::default() })
    }

    /// Starts one for each connection until `shutdown`; those that run go on.
    pub async fn serve(self, shutdown: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = self.accept() => accepted,
            };
            match accepted {
                Ok(connection) => self.start(connection),
                Err(error) => {
                    tracing::warn!(event = "rbd_disks.accept_failed", %error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    /// A connection, which waits as its process will have it.
    async fn accept(&self) -> io::Result<OwnedFd> {
        let (connection, _nameless) = self.listener.accept().await?;
        let connection = connection.into_std()?;
        connection.set_nonblocking(false)?;
        Ok(connection.into())
    }

    fn start(&self, connection: OwnedFd) {
        if !owner_socket::is_owners(&connection, self.own_uid, "rbd_disks.refused") {
            return;
        }
        let Some(user) = User::take(&self.users) else {
            tracing::warn!(event = "rbd_disks.refused", most = MOST, "as many disks as may be are open");
            return;
        };
        let mut command = Command::new(&self.program);
        command.arg(user.uid().to_string()).env_clear().current_dir("/");
        command.stdin(Stdio::from(connection)).stdout(Stdio::null()).stderr(Stdio::null());
        match command.spawn() {
            Ok(mut child) => {
                tokio::spawn(async move {
                    let ended = child.wait().await;
                    let how = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
                    tracing::debug!(event = "rbd_disks.ended", uid = user.uid(), how, "a disk's process has ended");
                });
            }
            Err(error) => {
                let program = self.program.display();
                tracing::error!(event = "rbd_disks.not_started", %program, %error, "starting a disk's process");
            }
        }
    }
}

/// A user that no other process of ours has, until this is dropped.
struct User {
    offset: u16,
    taken: Arc<Mutex<HashSet<u16>>>,
}

impl User {
    /// By chance: what an earlier run of this program started may have some still.
    fn take(taken: &Arc<Mutex<HashSet<u16>>>) -> Option<Self> {
        let mut users = lock(taken);
        if users.len() >= MOST {
            return None;
        }
        loop {
            let offset = u16::from_ne_bytes(assay_service::secret_file::random::<2>());
            if users.insert(offset) {
                return Some(Self { offset, taken: Arc::clone(taken) });
            }
        }
    }

    fn uid(&self) -> u32 {
        USERS + u32::from(self.offset)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        lock(&self.taken).remove(&self.offset);
    }
}

/// Of packets, as gateways and their companions exchange them.
fn listener(path: &Path) -> io::Result<UnixListener> {
    let listener = owner_socket::replace(path, |path| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&listener, &SocketAddrUnix::new(path)?)?;
        Ok(listener)
    })?;
    listen(&listener, BACKLOG)?;
    UnixListener::from_std(listener.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use rustix::net::sockopt;
    use rustix::net::{RecvFlags, connect, recv};
    use std::os::unix::fs::PermissionsExt as _;

    /// Connects as this user, and answers whether somebody has the other end.
    fn is_served(socket: &Path, uid: u32) -> bool {
        let connect = || {
            let uid = rustix::process::Uid::from_raw(uid);
            // This thread's, which ends.
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            let stream = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
            connect(&stream, &SocketAddrUnix::new(socket).unwrap()).unwrap();
            let patience = Some(Duration::from_millis(500));
            sockopt::set_socket_timeout(&stream, sockopt::Timeout::Recv, patience).unwrap();
            match recv(&stream, &mut [0; 1], RecvFlags::empty()) {
                Ok((_, 0)) => false,
                Err(Errno::AGAIN) => true,
                other => panic!("{other:?}"),
            }
        };
        std::thread::scope(|scope| scope.spawn(connect).join().unwrap())
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn this_user_and_root_are_served_and_nobody_else() {
        let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (socket, program) = (folder.path().join("socket"), folder.path().join("program"));
        assert!(matches!(RbdDisks::bind(&socket, Some(program.clone())), Err(RbdDisksError::NoProgram { .. })));
        std::fs::write(&program, "#!/bin/sh\nexec cat\n").unwrap();
        open(&program, 0o755);
        // Somebody's who was killed.
        drop(RbdDisks::bind(&socket, Some(program.clone())).unwrap());
        let disks = RbdDisks::bind(&socket, Some(program)).unwrap();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        // As if its mode were not set yet.
        open(folder.path(), 0o755);
        open(&socket, 0o666);
        let (own, shutdown) = (rustix::process::geteuid().as_raw(), CancellationToken::new());
        let serving = tokio::spawn(disks.serve(shutdown.clone()));
        assert!(tokio::task::block_in_place(|| is_served(&socket, own)));
        assert!(!tokio::task::block_in_place(|| is_served(&socket, 65_534)), "another user is served");
        assert!(tokio::task::block_in_place(|| is_served(&socket, own)));
        shutdown.cancel();
        serving.await.unwrap();
    }

    #[test]
    fn users_are_as_many_as_may_be_and_come_back() {
        let taken = Arc::default();
        let users: Vec<User> = std::iter::from_fn(|| User::take(&taken)).collect();
        assert_eq!(users.len(), MOST);
        let uids: HashSet<u32> = users.iter().map(User::uid).collect();
        assert_eq!(uids.len(), MOST);
        drop(users);
        assert!(User::take(&taken).is_some());
    }
}
