//! The server on loopback, asked by sockets: what firmware sends, and what attackers send.

use super::*;
use crate::boot_plan::NodeBoot;
use crate::config::{Config, File, SiteDefaults};
use crate::dhcp::lease::AddressLease;
use crate::dhcp::reply::BootOptions;
use crate::dhcp::{Authority as _, ClientKind, engine::Engine};
use crate::records::Records;
use crate::site::InterfaceSite;
use assay_service::clock::{Clock, ManualClock};
use assay_wire::id::BootId;
use assay_wire::isolation::{BootRecord, NodeState};
use assay_wire::net::MacAddr;
use std::net::Ipv4Addr;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio_util::sync::DropGuard;

struct Lab {
    address: SocketAddr,
    records: watch::Sender<Records>,
    clock: Arc<ManualClock>,
    interface: InterfaceSite,
    boot: NodeBoot,
    _shutdown: DropGuard,
    _folder: tempfile::TempDir,
}

const AGENT_BYTES: usize = 300_000;

fn mac() -> MacAddr {
    "52:54:00:00:00:01".parse().unwrap()
}

fn agent_image() -> Vec<u8> {
    (0..AGENT_BYTES).map(|index| u8::try_from(index % 251).unwrap()).collect()
}

impl Lab {
    /// A server on loopback, and a node n1 in the airlock whose lease is 127.0.0.1.
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("agent.efi"), agent_image()).unwrap();
        std::fs::write(folder.path().join("loader.efi"), b"loader").unwrap();
        let text = format!(
            r#"
            firmware_loader = "{0}/loader.efi"
            default_ramdisk = "default"
            verifier_url = "https://127.0.0.1:8443"
            interfaces = [{{ name = "lo", server = "127.0.0.1", network = "127.0.0.0/8", pool_first = "127.0.0.1", pool_last = "127.0.0.9" }}]
            ramdisks = [{{ name = "default", path = "{0}/agent.efi", command_line = "console=ttyS0 quiet" }}]
            "#,
            folder.path().display()
        );
        let key = "ab".repeat(32);
        let defaults = SiteDefaults { state_dir: folder.path(), verifier_key_sha256: Some(&key) };
        let config = Config::from_file(toml::from_str::<File>(&text).unwrap(), defaults).unwrap();
        let boot = NodeBoot { node: "n1".parse().unwrap(), boot: BootId::random() };
        let (records, receiver) = watch::channel(Records::default());
        let clock = Arc::new(ManualClock::new(1_000_000));
        let site = Arc::new(Site::load(&config, receiver, Arc::clone(&clock) as Arc<dyn Clock>).unwrap());
        let engine = Arc::new(Mutex::new(Engine::new(config.interfaces[0].scope.clone(), Vec::new())));
        let server = BootHttp::bind("127.0.0.1:0".parse().unwrap(), None).unwrap();
        let address = server.local_address().unwrap();
        let mut interface = InterfaceSite::new(&site, &config.interfaces[0], &engine);
        interface.http.set_port(address.port());
        let shutdown = CancellationToken::new();
        tokio::spawn(server.serve(site, shutdown.clone()));
        let lab = Self { address, records, clock, interface, boot, _shutdown: shutdown.drop_guard(), _folder: folder };
        lab.set_state(NodeState::Airlock);
        lab
    }

    fn set_state(&self, state: NodeState) {
        let NodeBoot { node, boot } = self.boot.clone();
        self.records.send_replace([BootRecord { node, mac: mac(), state, boot: Some(boot) }].into_iter().collect());
    }

    /// The path of the URL that DHCP tells `client`, when the NIC has the address `address`.
    fn path_for(&self, client: ClientKind, address: Ipv4Addr) -> String {
        match self.interface.boot(self.clock.now_ms(), mac(), client, address) {
            BootOptions::Url { url } => url.strip_prefix(&format!("http://{}", self.address)).unwrap().to_owned(),
            BootOptions::Tftp { .. } | BootOptions::None => panic!("no URL"),
        }
    }

    async fn ask(&self, request: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer));
        read.await.expect("the server closes").unwrap();
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        (String::from_utf8(answer[..end].to_vec()).unwrap(), answer[end..].to_vec())
    }

    async fn get(&self, path: &str) -> (String, Vec<u8>) {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")).await
    }
}

const LEASED: Ipv4Addr = Ipv4Addr::LOCALHOST;

#[tokio::test]
async fn ipxe_gets_script_and_agent_and_the_agent_its_settings() {
    let lab = Lab::start();
    let script = lab.path_for(ClientKind::Ipxe, LEASED);
    let (head, body) = lab.get(&script).await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let text = String::from_utf8(body).unwrap();
    let chain = text.lines().find(|line| line.starts_with("chain")).unwrap();
    let words: Vec<_> = chain.split(' ').collect();
    assert_eq!(words[3..], ["console=ttyS0", "quiet", "||"]);
    let agent = words[2].strip_prefix(&format!("http://{}", lab.address)).expect("never from the Host header");
    let (head, body) = lab.get(agent).await;
    assert!(head.contains(&format!("content-length: {AGENT_BYTES}\r\n")), "{head}");
    assert!(body == agent_image());
    let (_, body) = lab.get(&lab.path_for(ClientKind::Agent, LEASED)).await;
    let expected =
        format!(r#"{{"node":"n1","verifier":"https://127.0.0.1:8443","verifier_key_sha256":"{}"}}"#, "ab".repeat(32));
    assert_eq!(String::from_utf8(body).unwrap(), expected);
}

#[tokio::test]
async fn row_13_head_is_get_without_the_body_and_ranges_are_exact() {
    let lab = Lab::start();
    let agent = lab.path_for(ClientKind::Ipxe, LEASED).replace("script.ipxe", "agent.efi");
    let (get, _) = lab.get(&agent).await;
    let (head, body) = lab.ask(&format!("HEAD {agent} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")).await;
    let without_date = |text: &str| text.lines().filter(|line| !line.starts_with("date")).collect::<String>();
    assert_eq!(without_date(&head), without_date(&get));
    assert!(body.is_empty());
    let ranged =
        |range: &str| format!("GET {agent} HTTP/1.1\r\nHost: a\r\nRange: {range}\r\nConnection: close\r\n\r\n");
    let (head, body) = lab.ask(&ranged("bytes=1000-1999")).await;
    assert!(head.starts_with("HTTP/1.1 206"), "{head}");
    assert!(head.contains(&format!("content-range: bytes 1000-1999/{AGENT_BYTES}\r\n")), "{head}");
    assert_eq!(body, agent_image()[1000..2000]);
    let (head, body) = lab.ask(&ranged(&format!("bytes={AGENT_BYTES}-"))).await;
    assert!(head.starts_with("HTTP/1.1 416"), "{head}");
    assert!(body.is_empty());
}

#[tokio::test]
async fn row_12_no_file_without_a_good_token_and_no_difference_to_see() {
    let lab = Lab::start();
    let good = lab.path_for(ClientKind::Ipxe, LEASED);
    let (refused, body) = lab.get("/boot/00000000000000000000000000000000/script.ipxe").await;
    assert!(refused.starts_with("HTTP/1.1 404"), "{refused}");
    assert!(body.is_empty());
    let without_date = |text: &str| text.lines().filter(|line| !line.starts_with("date")).collect::<String>();
    for path in [
        "/".to_owned(),
        "//evil.example/".into(),
        "/boot/".into(),
        good.replace("script.ipxe", "passwd"),
        good.replace("script.ipxe", "../settings.json"),
        good.replace("script.ipxe", "script%2eipxe"),
        good.replace("/boot", "/boot/../boot"),
        good.to_uppercase(),
        format!("{good}/"),
    ] {
        let (head, body) = lab.get(&path).await;
        assert_eq!(without_date(&head), without_date(&refused), "{path}");
        assert!(body.is_empty());
    }
    let (head, _) =
        lab.ask(&format!("POST {good} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")).await;
    assert!(head.starts_with("HTTP/1.1 405"), "{head}");
    assert!(lab.get(&good).await.0.starts_with("HTTP/1.1 200"));
    lab.clock.advance_ms(900_000);
    assert!(lab.get(&good).await.0.starts_with("HTTP/1.1 404"), "expired");
    let elsewhere = lab.path_for(ClientKind::Ipxe, Ipv4Addr::new(127, 0, 0, 2));
    assert!(lab.get(&elsewhere).await.0.starts_with("HTTP/1.1 404"), "another lease's token");
}

#[tokio::test]
async fn a_node_that_left_the_airlock_gets_nothing_more() {
    let lab = Lab::start();
    let settings = lab.path_for(ClientKind::Agent, LEASED);
    assert!(lab.get(&settings).await.0.starts_with("HTTP/1.1 200"));
    for state in NodeState::ALL.into_iter().filter(|state| *state != NodeState::Airlock) {
        lab.set_state(state);
        assert!(lab.get(&settings).await.0.starts_with("HTTP/1.1 404"), "{state}");
    }
    lab.set_state(NodeState::Airlock);
    assert!(lab.get(&settings).await.0.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn row_13_one_address_has_eight_connections() {
    let lab = Lab::start();
    let path = lab.path_for(ClientKind::Agent, LEASED);
    let mut idle = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(lab.address).await.unwrap();
        // Half a request, and its answer is never asked for: only a connection that the server has accepted counts.
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\nGET").as_bytes()).await.unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).await.unwrap();
        idle.push(stream);
    }
    let mut ninth = TcpStream::connect(lab.address).await.unwrap();
    let mut rest = Vec::new();
    // Dropped without an answer: the end of the stream, or a reset if the request was already on its way.
    let read = tokio::time::timeout(Duration::from_secs(20), ninth.read_to_end(&mut rest)).await;
    assert!(matches!(read.expect("the server drops it"), Ok(0) | Err(_)));
    drop(idle);
}

#[test]
fn tftp_lends_the_loader_to_the_holder_of_a_lease_only() {
    use assay_tftp::Files as _;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let lab = runtime.block_on(async { Lab::start() });
    let peer = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 5));
    assert_eq!(lab.interface.open(peer, "snponly.efi"), None, "no lease");
    let lease = AddressLease { address: Ipv4Addr::new(127, 0, 0, 5), mac: mac(), until_ms: 2_000_000 };
    lock(&lab.interface.engine).restore(lease);
    assert_eq!(lab.interface.open(peer, "snponly.efi"), Some(Bytes::from_static(b"loader")));
    for other in ["agent.efi", "script.ipxe", "settings.json", "autoexec.ipxe"] {
        assert_eq!(lab.interface.open(peer, other), None, "{other}");
    }
    lab.set_state(NodeState::Rejected);
    assert_eq!(lab.interface.open(peer, "snponly.efi"), None);
    lab.set_state(NodeState::Airlock);
    lab.clock.advance_ms(1_000_000);
    assert_eq!(lab.interface.open(peer, "snponly.efi"), None, "the lease ran out");
}
