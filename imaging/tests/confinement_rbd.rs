//! The process that has a clone's key holds that clone and nothing else: an attacker's code is run inside it, as inside a
//! worker (`confinement.rs`), and so is what its key might be good for. Beside each attempt of the first kind that a worker
//! has not, the same from here shows that it works where nothing is confined.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::rbd_disk::attack::RbdAttack;
use assay_imaging::rbd_disk::channel::{ANSWER_BYTES, Answer, CHANNELS, Mapped, REQUEST_BYTES, Range, Request};
use assay_imaging::rbd_disk::message::{FromRbdDisk, Ready};
use assay_imaging::store::RbdClone;
use assay_imaging::worker::attack::{Attack, Outcome};
use assay_imaging::worker::message::{Confinement, MESSAGE_BYTES, receive, send};
use assay_rbd::testing::Ceph;
use rig::rbd::*;
use rig::{WORKER_USERS, assert_confined};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

const SIGSYS: i32 = 31;
const SIGTERM: i32 = 15;
/// Of companions: limits are a user's, so each has its own.
static USERS: AtomicU32 = AtomicU32::new(WORKER_USERS + 70);

/// A companion as systemd would start it.
struct Companion {
    user: u32,
    child: Child,
    control: OwnedFd,
    ready: Ready,
    channels: Vec<UnixStream>,
}

impl Companion {
    fn start(clone: &RbdClone, arguments: &[&str]) -> Self {
        let (control, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let mut command = Command::new(COMPANION);
        let user = USERS.fetch_add(1, Ordering::Relaxed);
        command.arg(user.to_string()).args(arguments).env_clear();
        let child = command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        drop(command);
        send(&control, clone, &[], SendFlags::empty()).unwrap();
        let mut buffer = vec![0; MESSAGE_BYTES];
        let (ready, channels) = match receive(&control, &mut buffer, RecvFlags::empty()).unwrap() {
            Some((FromRbdDisk::Ready(ready), channels)) => (ready, channels),
            other => panic!("not ready: {other:?}"),
        };
        Self { user, child, control, ready, channels: channels.into_iter().map(UnixStream::from).collect() }
    }

    /// Refused with an error, or by death; what it says. Succeeded: nothing.
    fn attempt(&mut self, attack: &RbdAttack) -> Option<String> {
        send(&self.control, attack, &[], SendFlags::empty()).unwrap();
        let mut buffer = vec![0; MESSAGE_BYTES];
        loop {
            match receive(&self.control, &mut buffer, RecvFlags::empty()).unwrap() {
                Some((FromRbdDisk::Attacked(Outcome::Refused { error }), _)) => return Some(error),
                Some((FromRbdDisk::Attacked(Outcome::Succeeded), _)) => return None,
                Some((FromRbdDisk::Log { .. }, _)) => {}
                None => {
                    let died = self.child.wait().unwrap();
                    // Ceph's own refusals kill nobody.
                    let system_call = matches!(
                        attack,
                        RbdAttack::System(_)
                            | RbdAttack::Multipath { .. }
                            | RbdAttack::FastOpen { .. }
                            | RbdAttack::Datagram
                    );
                    assert!(system_call && died.signal() == Some(SIGSYS), "{attack:?}: {died}");
                    return Some("killed".into());
                }
                other => panic!("{attack:?}: {other:?}"),
            }
        }
    }

    fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// The head of the answer to a request.
    fn ask(&mut self, request: Request, data: &[u8]) -> (Answer, Vec<u8>) {
        let channel = &mut self.channels[0];
        channel.write_all(&[&request.encode()[..], data].concat()).unwrap();
        let mut head = [0; ANSWER_BYTES];
        channel.read_exact(&mut head).unwrap();
        let answer = Answer::decode(&head, request).unwrap();
        let mut data = vec![0; if answer == Answer::Done { request.answer_data() } else { 0 }];
        channel.read_exact(&mut data).unwrap();
        (answer, data)
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        let _dead_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

/// Tries each in a companion that still runs.
fn all_are_refused(clone: &RbdClone, attacks: &[RbdAttack], arguments: &[&str]) {
    let mut companion = Companion::start(clone, arguments);
    for attack in attacks {
        if !companion.is_alive() {
            companion = Companion::start(clone, arguments);
        }
        let refused = companion.attempt(attack);
        assert!(refused.is_some(), "{attack:?} succeeded {arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attackers_code_in_a_companion_reaches_no_file_no_program_and_no_port_but_cephs() {
    let site = RbdSite::new(&Ceph::shared(), &[0xee; 4096]).await;
    let clone = site.clone();
    let path = |name: &str| site.folder.path().join(name);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let mut victim = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
    let pid = i32::try_from(victim.id()).unwrap();
    std::fs::create_dir(path("mount")).unwrap();
    let system = |attack| RbdAttack::System(attack);
    // Beneath the system call filter, too.
    let in_depth: Vec<RbdAttack> = vec![
        system(Attack::OpenFile { path: path("local/source.raw") }),
        system(Attack::OpenFile { path: "/etc/passwd".into() }),
        system(Attack::OpenFile { path: "/proc/self/mem".into() }),
        system(Attack::WriteFile { path: path("made") }),
        system(Attack::ListFolder { path: "/proc".into() }),
        system(Attack::Connect { to }),
        system(Attack::Bind),
        system(Attack::UnixConnect { path: path("gateway.sock") }),
        system(Attack::Execute),
        system(Attack::Fork),
        system(Attack::Threads),
        system(Attack::BecomeRoot),
        system(Attack::Trace { pid }),
        system(Attack::Kill { pid }),
        system(Attack::Mount { on: path("mount") }),
    ];
    // What the filter alone keeps.
    let more = vec![
        system(Attack::Socket),
        system(Attack::Netlink),
        system(Attack::Unshare),
        RbdAttack::Multipath { to },
        RbdAttack::FastOpen { to },
        RbdAttack::Datagram,
    ];
    for attack in more.iter().filter(|attack| !matches!(attack, RbdAttack::System(_))) {
        let here = attack.run_anywhere().unwrap();
        // A kernel may have been built without.
        let unknown = matches!(attack, RbdAttack::Multipath { .. }) && here != Outcome::Succeeded;
        assert!(here == Outcome::Succeeded || unknown, "{attack:?} does not even work unconfined: {here:?}");
    }
    all_are_refused(&clone, &[in_depth.clone(), more].concat(), &[]);
    all_are_refused(&clone, &in_depth, &["--without-seccomp"]);
    victim.kill().unwrap();
    victim.wait().unwrap();
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attackers_code_with_a_companions_key_reads_no_sibling_and_orders_nobody_about() {
    let site = RbdSite::new(&Ceph::shared(), &[0xee; 4096]).await;
    let (clone, sibling) = (site.clone(), site.clone());
    let (namespace, _, image) = &site.golden;
    let monitor = |command: &str| RbdAttack::Monitor { command: command.into() };
    let attacks = [
        RbdAttack::OpenSibling { image: sibling.image },
        RbdAttack::ListNamespace,
        RbdAttack::ListTrash,
        RbdAttack::MakeImage,
        RbdAttack::RemoveOwn { image: clone.image },
        RbdAttack::WriteGolden { namespace: namespace.clone(), image: *image },
        RbdAttack::ListGolden { namespace: namespace.clone() },
        monitor(r#"{"prefix":"osd blocklist","blocklistop":"add","addr":"127.0.0.1:0/1","expire":60.0}"#),
        monitor(r#"{"prefix":"auth ls"}"#),
        monitor(r#"{"prefix":"auth get","entity":"client.admin"}"#),
        monitor(r#"{"prefix":"osd pool create","pool":"mine","pg_num":8}"#),
    ];
    all_are_refused(&clone, &attacks, &[]);
    // It may know which cluster it talks to.
    let mut companion = Companion::start(&clone, &[]);
    assert_eq!(companion.attempt(&monitor(r#"{"prefix":"mon dump"}"#)), None);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_says_that_every_thread_of_a_companion_is_confined() {
    let site = RbdSite::new(&Ceph::shared(), &[0xee; 4096]).await;
    let companion = Companion::start(&site.clone(), &[]);
    assert_eq!(companion.ready.confinement, Confinement { own_user: true, landlock_whole: true });
    assert_eq!((companion.ready.byte_len, companion.ready.object_bytes), (DISK_BYTES, 4 << 20));
    assert_eq!(companion.channels.len(), CHANNELS);
    let proc = format!("/proc/{}", companion.child.id());
    let threads: Vec<_> = std::fs::read_dir(format!("{proc}/task")).unwrap().flatten().collect();
    assert!(threads.len() > CHANNELS, "librados has threads of its own");
    for thread in threads {
        let status = std::fs::read_to_string(thread.path().join("status")).unwrap();
        assert_confined(&status, companion.user);
    }
    assert!(std::fs::read(format!("{proc}/environ")).unwrap().is_empty());
    let arguments = std::fs::read_to_string(format!("{proc}/cmdline")).unwrap();
    assert!(arguments.ends_with(&format!("assay-rbd-disk\0{}\0", companion.user)), "{arguments}");
    site.stop().await;
}

/// By then it may be a node that asks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_has_the_channels_has_the_clone_and_no_more() {
    let site = RbdSite::new(&Ceph::shared(), &[0xee; 4096]).await;
    let clone = site.clone();
    let mut companion = Companion::start(&clone, &[]);
    let invalid = Answer::Failed(22);
    let range = |offset, length| Range { offset, length };
    let (end, far) = (range(DISK_BYTES - 512, 1024), range(u64::MAX, 512));
    let outside = [Request::Read(end), Request::Zero(end), Request::Mapped(end)];
    for request in outside.into_iter().chain([Request::Read(far), Request::Zero(far), Request::Mapped(far)]) {
        assert_eq!(companion.ask(request, &[]), (invalid, Vec::new()), "{request:?}");
    }
    assert_eq!(companion.ask(Request::Write(end), &[1; 1024]).0, invalid);
    let (answer, map) = companion.ask(Request::Own(far), &[]);
    assert!(answer == Answer::Done && map == [0; 512]);

    let last = range(DISK_BYTES - 512, 512);
    assert_eq!(companion.ask(Request::Write(last), &[7; 512]).0, Answer::Done);
    assert_eq!(companion.ask(Request::Read(last), &[]), (Answer::Done, vec![7; 512]));
    assert_eq!(companion.ask(Request::Flush, &[]).0, Answer::Done);
    assert!(site.on_ceph(&clone, last.offset, 512) == [7; 512]);
    let (answer, said) = companion.ask(Request::Mapped(last), &[]);
    assert_eq!((answer, said), (Answer::Done, Mapped { mapped: true, length: 512 }.encode().to_vec()));

    // What is no request ends it, whatever else it is asked for.
    companion.channels[1].write_all(&[0xff; REQUEST_BYTES]).unwrap();
    assert_eq!(companion.child.wait().unwrap().signal(), Some(SIGTERM));
    assert!(matches!(companion.channels[0].read(&mut [0; 1]), Ok(0) | Err(_)));

    // Whoever says nothing, or says no order, gets nothing.
    let (control, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mut child = Command::new(COMPANION).env_clear().stdin(theirs).spawn().unwrap();
    send(&control, &"an order", &[], SendFlags::empty()).unwrap();
    let heard = receive::<FromRbdDisk>(&control, &mut vec![0; MESSAGE_BYTES], RecvFlags::empty()).unwrap();
    assert!(matches!(heard, Some((FromRbdDisk::Refused { .. }, _))), "{heard:?}");
    child.wait().unwrap();
    site.stop().await;
}
