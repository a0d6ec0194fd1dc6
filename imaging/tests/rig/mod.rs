//! A gateway in this process over a store in a temporary folder, and the real initiators that are run against it.

#![allow(dead_code, unused_imports, reason = "each test file uses its part")]

pub(crate) mod node;
pub(crate) mod rbd;
pub(crate) mod site;
pub(crate) mod writer;

use assay_imaging::gateway::Limits;
use assay_imaging::gateway::order::{ExportOrder, GatewayStatus};
use assay_imaging::store::import::Source;
use assay_imaging::store::{ImageStore as _, LocalStore};
use assay_imaging::{Gateway, GatewayConfig, GatewayError};
use assay_service::CancellationToken;
use assay_service::client::{ClientError, ServiceClient};
use assay_service::clock::ManualClock;
use assay_wire::id::{AdmissionId, DiskId, ImageId, ImageKey};
use assay_wire::imaging::{ChapAlgorithms, ImageFormat};
use assay_wire::net::MacAddr;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The program of the exports' processes.
pub(crate) const WORKER: &str = env!("CARGO_BIN_EXE_assay-export");
/// The first user that they become, where these tests run as root.
pub(crate) const WORKER_USERS: u32 = 1_879_000_000;

/// Where the clocks of these tests stand: 2026-01-01.
pub(crate) const NOW_MS: i64 = 1_767_225_600_000;

/// Content that differs everywhere, with zero stretches.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| if at / 140_000 % 3 == 1 { 0 } else { (at / 7 % 251) as u8 + 1 }).collect()
}

/// A golden image of `content`, in a store in `folder`.
pub(crate) fn store_with_image(folder: &Path, content: &[u8]) -> LocalStore {
    let source = folder.join("source.raw");
    std::fs::write(&source, content).unwrap();
    let store = LocalStore::open(&folder.join("store")).unwrap();
    let source = Source::open(&source, ImageFormat::Raw, &[folder.to_owned()]).unwrap();
    let project = "p1".parse().unwrap();
    store.import(ImageKey::random(), &project, &source, &mut |_, _| ControlFlow::Continue(())).unwrap();
    store
}

pub(crate) fn image() -> ImageId {
    "golden".parse().unwrap()
}

/// A gateway that runs until it is stopped.
pub(crate) struct RunningGateway {
    pub(crate) portal: SocketAddr,
    pub(crate) control: ServiceClient,
    pub(crate) socket: PathBuf,
    pub(crate) reservations: watch::Receiver<Vec<(MacAddr, Ipv4Addr)>>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), GatewayError>>,
}

impl RunningGateway {
    pub(crate) async fn start(folder: &Path, clock: &Arc<ManualClock>) -> Self {
        // A loopback address of its own, so that no other test gets the port between a stop and a start.
        let [high, low] = assay_service::secret_file::random::<2>();
        Self::start_on(folder, clock, SocketAddr::from(([127, 1, high, low.max(1)], 0))).await
    }

    pub(crate) async fn start_on(folder: &Path, clock: &Arc<ManualClock>, portal: SocketAddr) -> Self {
        let socket = folder.join("gateway.sock");
        let config = GatewayConfig {
            control_socket: socket.clone(),
            store: folder.join("store"),
            rbd_disks_socket: Some(folder.join("rbd-disks.sock")),
            portal,
            relay: None,
            worker: Some(WORKER.into()),
            worker_users: Some(WORKER_USERS),
            limits: Limits::default(),
            clock: Arc::<ManualClock>::clone(clock),
        };
        // Another test that is just starting a program holds copies of this process's sockets until it has: so the
        // predecessor's port may be taken for another moment.
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        let bind = async {
            loop {
                ticks.tick().await;
                match Gateway::bind(config.clone()).await {
                    Err(GatewayError::Listen { source, .. }) if source.kind() == ErrorKind::AddrInUse => {}
                    bound => return bound.unwrap_or_else(|error| panic!("{}", assay_service::error::chain(&error))),
                }
            }
        };
        let gateway = tokio::time::timeout(Duration::from_secs(5), bind).await.unwrap();
        let (portal, reservations, shutdown) = (gateway.portal(), gateway.reservations(), CancellationToken::new());
        let task = tokio::spawn(gateway.serve(shutdown.clone()));
        let control = ServiceClient::over_unix(&socket).unwrap();
        Self { portal, control, socket, reservations, shutdown, task }
    }

    pub(crate) async fn put_up(&self, admission: AdmissionId, order: &ExportOrder) -> Result<(), ClientError> {
        self.control.put(&format!("v1/exports/{admission}"), order).await
    }

    pub(crate) async fn take_down(&self, admission: AdmissionId) {
        self.control.delete::<_, ()>(&format!("v1/exports/{admission}"), &()).await.unwrap();
    }

    pub(crate) async fn status(&self) -> GatewayStatus {
        self.control.get("v1/exports").await.unwrap()
    }

    /// Who has which address, as text.
    pub(crate) fn reserved(&self) -> Vec<(String, String)> {
        self.reservations.borrow().iter().map(|(mac, address)| (mac.to_string(), address.to_string())).collect()
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
    }
}

/// An order for a new clone of the one image in `store`.
pub(crate) fn order(store: &LocalStore) -> ExportOrder {
    let (disk, image) = (DiskId::random(), store.images().unwrap()[0].key);
    store.create_disk(disk, &"p1".parse().unwrap(), image).unwrap();
    ExportOrder {
        target: format!("iqn.2026-01.dev.assay:{disk}").parse().unwrap(),
        initiator: "iqn.2026-01.dev.assay:node:n1:boot".parse().unwrap(),
        chap_name: "n1".into(),
        chap_secret: "abcdefgh-_123456".into(),
        chap: ChapAlgorithms::Any,
        disk,
        location: store.location(disk, AdmissionId::random()).unwrap(),
        address: some_address(),
        sessions: 1,
        reservation: None,
        expires_at_ms: NOW_MS + 3_600_000,
    }
}

/// The process that has the order's disk open.
pub(crate) fn worker_of(store: &LocalStore, order: &ExportOrder) -> rustix::process::Pid {
    let data = store.top_folder(order.disk).unwrap().join("data");
    let has_it = |pid: &i32| {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.into_iter().any(|file| std::fs::read_link(file.path()).is_ok_and(|target| target == data))
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pid = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(has_it);
    rustix::process::Pid::from_raw(pid.expect("a worker has the disk open")).unwrap()
}

/// A node's address on loopback that no other node has.
pub(crate) fn some_address() -> Ipv4Addr {
    let [a, b, c] = assay_service::secret_file::random::<3>();
    Ipv4Addr::new(127, a.max(2), b, c.clamp(1, 254))
}

/// Connects as the node with this address does.
pub(crate) async fn connect_from(node: Ipv4Addr, portal: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((node, 0).into())?;
    socket.connect(portal).await
}

/// The node's own way to the portal: real initiators do not say which address they speak from, so they speak to this
/// one, which does.
pub(crate) async fn way(node: Ipv4Addr, portal: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                if let Ok(mut portal) = connect_from(node, portal).await {
                    client.set_nodelay(true).unwrap();
                    portal.set_nodelay(true).unwrap();
                    let _closed_or_reset = tokio::io::copy_bidirectional(&mut client, &mut portal).await;
                }
            });
        }
    });
    address
}

/// Runs a tool of libiscsi with the order's credentials, changed by `change`.
pub(crate) async fn libiscsi(tool: &str, portal: SocketAddr, order: &ExportOrder) -> Output {
    let ExportOrder { target, initiator, chap_name, chap_secret, .. } = order;
    let portal = way(order.address, portal).await;
    let url = format!("iscsi://{chap_name}%{chap_secret}@{portal}/{target}/0");
    run(Command::new(tool).args(["-i", initiator.as_str(), &url])).await
}

/// What `qemu-img` and `qemu-io` need to open an export, from its node.
pub(crate) async fn qemu_options(portal: SocketAddr, order: &ExportOrder) -> [String; 3] {
    qemu_options_at(way(order.address, portal).await, order)
}

/// The same, to speak to this address.
fn qemu_options_at(portal: SocketAddr, order: &ExportOrder) -> [String; 3] {
    let ExportOrder { target, initiator, chap_name, chap_secret, .. } = order;
    [
        "--object".into(),
        format!("secret,id=chap,data={chap_secret}"),
        format!(
            "driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={portal},file.target={target},file.lun=0,\
             file.user={chap_name},file.password-secret=chap,file.initiator-name={initiator}"
        ),
    ]
}

/// `qemu-io` with commands, on an export.
pub(crate) async fn qemu_io(portal: SocketAddr, order: &ExportOrder, commands: &[&str]) -> Output {
    let [object, secret, options] = qemu_options(portal, order).await;
    let mut command = Command::new("qemu-io");
    command.args([&object, &secret, "-t", "writeback", "--image-opts", &options]);
    for text in commands {
        command.args(["-c", text]);
    }
    run(&mut command).await
}

/// `qemu-io` that holds a session open.
pub(crate) struct Held {
    child: tokio::process::Child,
    output: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl Held {
    pub(crate) async fn open(portal: SocketAddr, order: &ExportOrder) -> Self {
        Self::open_at(way(order.address, portal).await, order).await
    }

    /// Speaks to this address, which is a node's way to the portal.
    pub(crate) async fn open_at(portal: SocketAddr, order: &ExportOrder) -> Self {
        let [object, secret, options] = qemu_options_at(portal, order);
        let mut child = tokio::process::Command::new("qemu-io")
            .args([&object, &secret, "--image-opts", &options])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut held = Self { child, output };
        let answer = held.ask("read 0 4096").await;
        assert!(answer.contains("read 4096/4096"), "{answer}");
        held
    }

    pub(crate) async fn ask(&mut self, command: &str) -> String {
        self.say(command).await;
        self.hear().await
    }

    /// Has it begin something.
    pub(crate) async fn say(&mut self, command: &str) {
        self.child.stdin.as_mut().unwrap().write_all(format!("{command}\n").as_bytes()).await.unwrap();
    }

    /// How something ended.
    pub(crate) async fn hear(&mut self) -> String {
        loop {
            let line = tokio::time::timeout(Duration::from_secs(60), self.output.next_line()).await;
            let line = line.unwrap().unwrap().unwrap_or_default();
            // How fast the command before this one was.
            if !line.contains(" ops; ") {
                return line;
            }
        }
    }
}

impl Held {
    /// [`Held::hear`] while something that was begun is under way. Of two lines that come at once, `qemu-io` looks at the
    /// second when there is a third; and what it says of what was begun it says with what it says next.
    pub(crate) async fn hear_meanwhile(&mut self) -> String {
        let hearing = async {
            loop {
                match tokio::time::timeout(Duration::from_millis(100), self.output.next_line()).await {
                    Ok(line) => match line.unwrap().unwrap_or_default() {
                        line if line.contains(" ops; ") => {}
                        line => return line,
                    },
                    Err(_) => self.say("").await,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), hearing).await.unwrap()
    }

    /// All that it says, up to a line with this text.
    pub(crate) async fn hear_until(&mut self, text: &str) -> String {
        let mut said = String::new();
        loop {
            let line = self.hear_meanwhile().await;
            said.push_str(&line);
            if line.contains(text) {
                return said;
            }
            assert!(!line.is_empty(), "it ended: {said}");
        }
    }
}

/// Compares an export with a raw file.
pub(crate) async fn assert_same(portal: SocketAddr, order: &ExportOrder, file: &Path) {
    let [object, secret, options] = qemu_options(portal, order).await;
    let file = format!("driver=raw,file.driver=file,file.filename={}", file.display());
    let output =
        run(Command::new("qemu-img").args(["compare", &object, &secret, "--image-opts", &options, &file])).await;
    assert!(output.status.success(), "{}", text(&output));
}

pub(crate) async fn run(command: &mut Command) -> Output {
    let mut command = tokio::process::Command::from(std::mem::replace(command, Command::new("true")));
    tokio::time::timeout(Duration::from_secs(60), command.kill_on_drop(true).output()).await.unwrap().unwrap()
}

/// Both outputs of a tool.
pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Checks the kernel's own account of a confined process or thread, its `status` in `/proc`: no capabilities, no new
/// privileges, a filter, and this user alone.
pub(crate) fn assert_confined(status: &str, user: u32) {
    let field = |name: &str| {
        let line = status.lines().find(|line| line.split(':').next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name}")).split_once(':').unwrap().1.trim().to_owned()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp"), field("Groups")), ("1".into(), "2".into(), String::new()));
    let user = user.to_string();
    assert!(field("Uid").split_whitespace().chain(field("Gid").split_whitespace()).all(|id| id == user));
}

/// A file system with a size, mounted while this lives.
pub(crate) struct SmallDisk(pub(crate) PathBuf);

impl SmallDisk {
    pub(crate) fn mount(path: &Path, byte_len: u64) -> Self {
        std::fs::create_dir(path).unwrap();
        let size = format!("size={byte_len}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(path).status().unwrap();
        assert!(mounted.success(), "mounting a tmpfs needs root");
        Self(path.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
