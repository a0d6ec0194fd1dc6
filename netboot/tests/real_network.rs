//! The boot services on real (virtual) network interfaces, asked by a real DHCP client (`busybox udhcpc`) and by curl.
//!
//! The test runs itself again inside new user and network namespaces, so it needs no privileges and touches nothing of
//! the host's network. Two networks, one client in a namespace of its own on each; the server's interface on the first
//! has two addresses, of which the one that serves is not the primary one.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

use assay_netboot::Services;
use assay_netboot::config::{Config, File, SiteDefaults};
use assay_netboot::dhcp::reservations::ReservedNetwork;
use assay_netboot::records::Records;
use assay_service::clock::SystemClock;
use assay_wire::id::BootId;
use assay_wire::isolation::{BootRecord, NodeState};
use assay_wire::net::MacAddr;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const INSIDE: &str = "ASSAY_TEST_INSIDE_NAMESPACE";
const FIRMWARE: &[&str] = &["-V", "PXEClient:Arch:00007:UNDI:003000", "-x", "0x5d:0007"];
const IPXE: &[&str] = &["-V", "PXEClient:Arch:00007:UNDI:003000", "-x", "0x5d:0007", "-x", "0x4d:69505845"];
const AGENT: &[&str] = &["-V", "AssayAgent"];

#[test]
fn row_9_firmware_ipxe_and_agent_boot_on_two_networks() {
    inside_namespaces("row_9_firmware_ipxe_and_agent_boot_on_two_networks", boot_on_two_networks);
}

#[test]
fn a_gateway_hands_out_reservations_and_nothing_else() {
    inside_namespaces("a_gateway_hands_out_reservations_and_nothing_else", hand_out_reservations);
}

#[test]
#[ignore = "a minute of emulated firmware, and the lab's boot_path covers it: run it alone while working on this crate"]
fn ovmf_and_ipxe_fetch_what_they_are_told() {
    inside_namespaces("ovmf_and_ipxe_fetch_what_they_are_told", boot_real_firmware);
}

/// The loader is the real iPXE; in place of the agent's image there is an EFI application that ends at once, so that
/// the script's next attempts show too.
fn boot_real_firmware() {
    let runtime = runtime();
    let mut lab = Lab::new();
    run("ip", &["tuntap", "add", "first", "mode", "tap"]);
    run("ip", &["address", "add", "10.99.0.1/24", "dev", "first"]);
    run("ip", &["link", "set", "first", "up"]);
    lab.loader = std::fs::read("/usr/lib/ipxe/snponly.efi").expect("the package ipxe is installed");
    std::fs::write(lab.folder.path().join("loader.efi"), &lab.loader).unwrap();
    let mac = "52:54:00:00:00:01".parse().unwrap();
    let boot = Some(BootId::random());
    let record = BootRecord { node: "n1".parse().unwrap(), mac, state: NodeState::Airlock, boot };
    let (_records, receiver) = watch::channel([record].into_iter().collect());
    let config = lab.config(&[("first", "10.99.0")]);
    let shutdown = CancellationToken::new();
    let opened = async { Services::open(&config, receiver, Arc::new(SystemClock), shutdown.clone()).unwrap() };
    let services = runtime.block_on(opened);
    let services = runtime.spawn(services.run());
    let variables = lab.folder.path().join("vars.fd");
    std::fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", &variables).unwrap();
    let console = std::fs::File::create(lab.folder.path().join("console")).unwrap();
    let mut machine = Command::new("qemu-system-x86_64")
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-m", "512", "-nographic", "-monitor", "none"])
        .args(["-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"])
        .args(["-drive", &format!("if=pflash,format=raw,file={}", variables.display())])
        .args(["-netdev", "tap,id=n,ifname=first,script=no,downscript=no"])
        .args(["-device", "virtio-net-pci,netdev=n,romfile=,mac=52:54:00:00:00:01", "-device", "virtio-rng-pci"])
        .stdin(Stdio::null())
        .stdout(console)
        .spawn()
        .unwrap();
    let expected = ["dhcp.offered", "boot_file.served", "dhcp.offered", "ipxe.rendered", "boot_file.served"];
    let arrived = async {
        let mut poll = tokio::time::interval(std::time::Duration::from_millis(250));
        while lab.steps("n1").iter().filter(|step| *step == "boot_file.served").count() < 3 {
            poll.tick().await;
        }
    };
    let arrived = runtime.block_on(async { tokio::time::timeout(std::time::Duration::from_secs(180), arrived).await });
    machine.kill().unwrap();
    machine.wait().unwrap();
    shutdown.cancel();
    runtime.block_on(services).unwrap();
    let console = std::fs::read(lab.folder.path().join("console")).unwrap();
    let log = std::fs::read_to_string(&lab.log).unwrap();
    assert!(arrived.is_ok(), "{:?}\n{log}\n{}", lab.steps("n1"), String::from_utf8_lossy(&console));
    // iPXE may ask twice before it takes an offer.
    let mut steps = lab.steps("n1");
    steps.dedup();
    assert_eq!(steps[..5], expected, "{log}");
    assert!(String::from_utf8_lossy(&console).contains("node n1 is in the airlock"));
}

fn boot_on_two_networks() {
    let runtime = runtime();
    let lab = Lab::new();
    let first = Client::new(&lab, "first", "52:54:00:00:00:01", &["10.99.0.7/24", "10.99.0.1/24"]);
    let second = Client::new(&lab, "second", "52:54:00:00:00:02", &["10.98.0.1/24"]);
    let (records, receiver) = watch::channel(Records::default());
    let config = lab.config(&[("first", "10.99.0"), ("second", "10.98.0")]);
    let shutdown = CancellationToken::new();
    let opened = async { Services::open(&config, receiver, Arc::new(SystemClock), shutdown.clone()).unwrap() };
    let services = runtime.block_on(opened);
    let services = runtime.spawn(services.run());

    assert!(first.dhcp(FIRMWARE).is_none(), "an unknown machine was answered");
    let airlock = [first.record("n1", NodeState::Airlock), second.record("n2", NodeState::Airlock)];
    records.send_replace(airlock.clone().into_iter().collect());
    for (client, network, node) in [(&first, "10.99.0", "n1"), (&second, "10.98.0", "n2")] {
        let server = format!("{network}.1");
        let lease = client.dhcp(FIRMWARE).expect("firmware is answered");
        assert_eq!(lease["serverid"], server);
        assert_eq!(lease["siaddr"], server);
        assert_eq!(lease["boot_file"], "snponly.efi");
        client.set_address(&lease);
        let loader = client.curl(&["--tftp-blksize", "1468", &format!("tftp://{server}/snponly.efi")]);
        assert!(loader.stdout == lab.loader, "{}", String::from_utf8_lossy(&loader.stderr));
        assert!(!client.curl(&[&format!("tftp://{server}/autoexec.ipxe")]).status.success());

        let lease = client.dhcp(IPXE).expect("iPXE is answered");
        let script = client.curl(&[&lease["bootfile"]]);
        let script = String::from_utf8(script.stdout).unwrap();
        let chain = script.lines().find(|line| line.starts_with("chain")).expect("a chain command");
        let agent = client.curl(&[chain.split(' ').nth(2).unwrap()]);
        assert!(agent.stdout == lab.agent, "{}", String::from_utf8_lossy(&agent.stderr));

        let lease = client.dhcp(AGENT).expect("the agent is answered");
        let settings = client.curl(&[&lease["bootfile"]]);
        let settings: serde_json::Value = serde_json::from_slice(&settings.stdout).unwrap();
        assert_eq!(settings["node"], node);
        assert_eq!(settings["verifier"], "https://10.99.0.1:8443");

        // What one node was told is of no use on the other network, and of none to a node that was refused.
        let other = if node == "n1" { &second } else { &first };
        assert_eq!(other.curl(&["--fail", &lease["bootfile"]]).stdout, b"");
        let refused = airlock.clone().map(|record| BootRecord { state: NodeState::Rejected, ..record });
        records.send_replace(refused.into_iter().collect());
        assert!(!client.curl(&["--fail", &lease["bootfile"]]).status.success());
        assert!(client.dhcp(FIRMWARE).is_none(), "a rejected node was answered");
        records.send_replace(airlock.clone().into_iter().collect());
    }

    shutdown.cancel();
    runtime.block_on(services).unwrap();
    let leases = std::fs::read_to_string(&config.lease_log).unwrap();
    assert_eq!(leases.lines().filter(|line| line.contains("52:54:00:00:00:02")).count(), 3, "{leases}");
    let steps = lab.steps("n1");
    let expected = ["dhcp.offered", "boot_file.served", "dhcp.offered", "ipxe.rendered", "boot_file.served"];
    assert_eq!(steps, expected);
    assert_eq!(lab.steps("n2"), expected);
    let log = std::fs::read_to_string(&lab.log).unwrap();
    assert!(log.contains("dhcp.not_served"), "the unknown machine is in the log");
    assert!(!log.contains("/boot/"), "a boot URL is in the log");
}

fn hand_out_reservations() {
    let runtime = runtime();
    let lab = Lab::new();
    let client = Client::new(&lab, "tenant", "52:54:00:00:00:01", &["10.20.0.1/24"]);
    let (first, second): (MacAddr, MacAddr) = (client.mac, "52:54:00:00:00:02".parse().unwrap());
    let address = |host| Ipv4Addr::new(10, 20, 0, host);
    let (reservations, receiver) = watch::channel(Vec::new());
    let shutdown = CancellationToken::new();
    let network = ReservedNetwork {
        interface: "tenant".into(),
        server: address(1),
        network: "10.20.0.0/24".parse().unwrap(),
        router: Some(address(1)),
    };
    let serving = runtime.spawn(assay_netboot::dhcp::serve_reservations(network, receiver, shutdown.clone()));
    assert!(client.dhcp(&[]).is_none(), "a machine without reservation was answered");
    reservations.send_replace(vec![(second, address(51)), (first, address(50))]);
    // It asks for another address than its own: it gets its own.
    let lease = client.dhcp(&[FIRMWARE, &["-r", "10.20.0.51"]].concat()).expect("the reserved client is answered");
    assert_eq!((lease["ip"].as_str(), lease["mask"].as_str()), ("10.20.0.50", "24"));
    assert_eq!((lease["router"].as_str(), lease["serverid"].as_str()), ("10.20.0.1", "10.20.0.1"));
    assert!(!lease.contains_key("bootfile"));
    client.set_mac("52:54:00:00:00:03");
    assert!(client.dhcp(&[]).is_none(), "a machine without reservation was answered while others have one");
    // The address passes to another node, whose predecessor's lease still runs.
    reservations.send_replace(vec![(second, address(50))]);
    client.set_mac("52:54:00:00:00:02");
    assert_eq!(client.dhcp(&[]).expect("the next owner is answered")["ip"], "10.20.0.50");
    client.set_mac("52:54:00:00:00:01");
    assert!(client.dhcp(&["-r", "10.20.0.50"]).is_none(), "a reservation that is gone was honoured");
    reservations.send_replace(vec![(first, Ipv4Addr::new(10, 21, 0, 50))]);
    assert!(client.dhcp(&[]).is_none(), "an address of another network was given");
    shutdown.cancel();
    runtime.block_on(serving).unwrap().unwrap();
}

/// Runs `body` in a process of its own inside new namespaces, in which it may do with the network what it likes.
fn inside_namespaces(test: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        body();
        return;
    }
    let unshare = ["--user", "--map-root-user", "--net", "--fork", "--kill-child"];
    let permitted = Command::new("unshare").args(unshare).arg("true").output().is_ok_and(|o| o.status.success());
    if !permitted {
        println!("SKIPPED {test}: this machine does not let this user create user and network namespaces");
        return;
    }
    let executable = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(unshare).arg(executable).args(["--exact", test, "--nocapture", "--include-ignored"]).env(INSIDE, "1");
    let output = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let passed = output.status.success() && stdout.contains("1 passed");
    assert!(passed, "inside the namespace:\n{stdout}\n{stderr}");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

struct Lab {
    folder: tempfile::TempDir,
    log: PathBuf,
    loader: Vec<u8>,
    agent: Vec<u8>,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |count: u32| (0..count).map(|index| index.to_le_bytes()[0] ^ index.to_le_bytes()[1]).collect();
        let (loader, agent): (Vec<u8>, Vec<u8>) = (bytes(173_792), bytes(5_000_000));
        std::fs::write(folder.path().join("loader.efi"), &loader).unwrap();
        std::fs::write(folder.path().join("agent.efi"), &agent).unwrap();
        let log = folder.path().join("log.jsonl");
        let file = Mutex::new(std::fs::File::create(&log).unwrap());
        let level = tracing_subscriber::filter::LevelFilter::DEBUG;
        tracing_subscriber::fmt().json().flatten_event(true).with_max_level(level).with_writer(file).init();
        Self { folder, log, loader, agent }
    }

    fn config(&self, networks: &[(&str, &str)]) -> Config {
        let folder = self.folder.path().display();
        let interfaces: String = networks
            .iter()
            .map(|(name, network)| {
                format!(
                    "[[interfaces]]\nname = \"{name}\"\nserver = \"{network}.1\"\nnetwork = \"{network}.0/24\"\n\
                     pool_first = \"{network}.50\"\npool_last = \"{network}.60\"\n"
                )
            })
            .collect();
        let text = format!(
            "firmware_loader = \"{folder}/loader.efi\"\ndefault_ramdisk = \"default\"\n\
             verifier_url = \"https://10.99.0.1:8443\"\n{interfaces}\
             [[ramdisks]]\nname = \"default\"\npath = \"{folder}/agent.efi\"\ncommand_line = \"console=ttyS0\"\n"
        );
        let key = "cd".repeat(32);
        let site = SiteDefaults { state_dir: self.folder.path(), verifier_key_sha256: Some(&key) };
        Config::from_file(toml::from_str::<File>(&text).unwrap(), site).unwrap()
    }

    /// The boot steps logged for `node`, in order.
    fn steps(&self, node: &str) -> Vec<String> {
        let log = std::fs::read_to_string(&self.log).unwrap();
        let events = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let steps = events.filter(|event| event["node"] == node && event.get("step").is_some());
        steps.map(|event| event["event"].as_str().unwrap().to_owned()).collect()
    }
}

/// A machine on the far end of a cable: a network namespace of its own, held open by a process.
struct Client {
    holder: Child,
    mac: MacAddr,
    script: PathBuf,
    answer: PathBuf,
}

impl Client {
    /// Lays a cable whose near end is the interface `name` with these addresses.
    fn new(lab: &Lab, name: &str, mac: &str, addresses: &[&str]) -> Self {
        // It says when it is in its namespace, and lives until its standard input is closed.
        let mut holder = Command::new("unshare")
            .args(["--net", "--kill-child", "--fork", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let process = child_of(holder.id()).to_string();
        run("ip", &["link", "add", name, "type", "veth", "peer", "name", "nic", "netns", &process]);
        addresses.iter().for_each(|address| run("ip", &["address", "add", address, "dev", name]));
        run("ip", &["link", "set", name, "up"]);
        let answer = lab.folder.path().join(format!("{name}.answer"));
        let script = lab.folder.path().join(format!("{name}.sh"));
        let text = format!("#!/bin/sh\n[ \"$1\" = bound ] && env > {}\nexit 0\n", answer.display());
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let client = Self { holder, mac: mac.parse().unwrap(), script, answer };
        client.set_mac(mac);
        client
    }

    /// Makes it the machine with that address, as far as anybody on the cable can tell.
    fn set_mac(&self, mac: &str) {
        for arguments in [["link", "set", "nic", "address", mac].as_slice(), &["link", "set", "nic", "up"]] {
            assert!(self.inside("ip", arguments).status.success());
        }
    }

    fn record(&self, node: &str, state: NodeState) -> BootRecord {
        BootRecord { node: node.parse().unwrap(), mac: self.mac, state, boot: Some(BootId::random()) }
    }

    /// Runs the DHCP client; what it was told, or nothing if nobody answered.
    fn dhcp(&self, options: &[&str]) -> Option<HashMap<String, String>> {
        let script = self.script.to_str().unwrap();
        let asked = ["udhcpc", "-i", "nic", "-f", "-q", "-n", "-t", "2", "-T", "1", "-s", script];
        // Ask for what firmware asks for, so that it is handed to the script.
        let wanted = ["-O", "bootfile", "-O", "tftp", "-O", "router"];
        let _ = std::fs::remove_file(&self.answer);
        let output = self.inside("busybox", &[asked.as_slice(), &wanted, options].concat());
        let text = std::fs::read_to_string(&self.answer).ok()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    fn set_address(&self, lease: &HashMap<String, String>) {
        assert_eq!(lease["mask"], "24");
        let address = format!("{}/24", lease["ip"]);
        assert!(self.inside("ip", &["address", "replace", &address, "dev", "nic"]).status.success());
    }

    fn curl(&self, arguments: &[&str]) -> Output {
        self.inside("curl", &[["--silent", "--show-error", "--max-time", "20"].as_slice(), arguments].concat())
    }

    fn inside(&self, program: &str, arguments: &[&str]) -> Output {
        let namespace = format!("--net=/proc/{}/ns/net", child_of(self.holder.id()));
        Command::new("nsenter").args([&namespace, program]).args(arguments).output().unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn child_of(process: u32) -> u32 {
    let children = std::fs::read_to_string(Path::new("/proc").join(format!("{process}/task/{process}/children")));
    children.unwrap().trim().parse().unwrap()
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
