//! The deployments: flat, shared, private. Each node of the topology is attested into its place and gets its own disk
//! through its own gateway; then every node tries to get at every other's.
//!
//! * Nodes on one network are not kept apart, and anybody there can speak from a neighbour's address. What keeps their
//!   disks apart is that a connection goes to the process of the export that its address belongs to, and that this one
//!   wants the CHAP secret, which left imaging sealed to one node's TPM.
//! * Between networks nothing is heard of the other gateway, whichever way it is asked.

use super::bench::{Bench, STATE_LIMIT};
use super::soft::{SoftBoot, SoftFirmware, SoftTenant, take_address, trust_soft_firmware};
use crate::command::outcome;
use crate::error::{LabError, Result};
use crate::frames::Frames;
use crate::netns::Netns;
use crate::site::{GATEWAY_INTERFACE, PROBE_INTERFACE};
use crate::topology::NetworkTopology;
use assay_wire::agent::Grant;
use assay_wire::id::ProjectId;
use assay_wire::net::MacAddr;
use ipnet::Ipv4Net;
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A node in its place, and what stands there.
struct Station {
    node: String,
    project: ProjectId,
    network: NetworkTopology,
    /// As the node's tenant has it.
    tenant: SoftTenant,
    address: Ipv4Net,
    mac: MacAddr,
    /// What it writes to its disk.
    pattern: u8,
    /// What passes at its gateway, and on its own cable.
    at_gateway: Frames,
    on_cable: Frames,
    gateway_mac: MacAddr,
    _boot: SoftBoot,
}

/// Attests every node of the topology into its place, and has each try to get at every other's disk.
pub(super) async fn play(bench: &Bench) -> Result<()> {
    let firmware = SoftFirmware::new();
    let mut stations = Vec::new();
    for (node, pattern) in bench.site.topology.nodes.iter().zip(1_u8..) {
        let name = node.name.as_str();
        let boot = if stations.is_empty() {
            trust_soft_firmware(bench, name, &firmware).await?;
            SoftBoot::cycle(bench, name, &firmware).await?
        } else {
            SoftBoot::lease(bench, name, &firmware).await?
        };
        stations.push(Station::settle(bench, name, pattern, boot).await?);
    }
    for station in &stations {
        station.write().await?;
    }
    for station in &stations {
        station.finds_its_own(bench, &stations).await?;
    }
    for from in &stations {
        for to in stations.iter().filter(|to| to.node != from.node) {
            if from.network == to.network {
                neighbours(bench, from, to).await?;
            } else {
                strangers(bench, from, to).await?;
            }
        }
    }
    Ok(())
}

impl Station {
    /// Takes a boot to its end.
    async fn settle(bench: &Bench, node: &str, pattern: u8, boot: SoftBoot) -> Result<Self> {
        let (project, network) = bench.site.topology.place(node)?;
        let tenant = boot.run_to_handover().await?;
        bench.services.wait_for_state(node, "allocated", STATE_LIMIT).await?;
        let gateway = &bench.site.project(network.project.as_str())?.gateway;
        let expected = network.portal();
        if tenant.grant.portal != expected {
            let found = format!("{node} is told {}, not {expected}", tenant.grant.portal);
            return Err(LabError::unexpected("reading a grant's portal", found));
        }
        Ok(Self {
            node: node.to_owned(),
            project: project.clone(),
            network: network.clone(),
            address: address(&tenant.segment, PROBE_INTERFACE).await?,
            mac: mac(&tenant.segment, PROBE_INTERFACE).await?,
            pattern,
            at_gateway: Frames::count(gateway).await?,
            on_cable: Frames::count(&tenant.segment).await?,
            gateway_mac: mac(gateway, GATEWAY_INTERFACE).await?,
            tenant,
            _boot: boot,
        })
    }

    /// Writes its pattern to its disk.
    async fn write(&self) -> Result<()> {
        let write = format!("write -P {} {PATTERN_AT} {PATTERN_BYTES}", self.pattern);
        let said = open(&self.tenant.segment, &self.tenant.grant, &write).await?;
        expect_opened(&said, &format!("writing to the disk of {}", self.node))
    }

    /// Reads its own pattern, and through its own gateway: no other sees one of its frames.
    async fn finds_its_own(&self, bench: &Bench, all: &[Self]) -> Result<()> {
        let before: Vec<u64> = all.iter().map(|other| other.at_gateway.from(self.mac)).collect();
        let read = format!("read -P {} {PATTERN_AT} {PATTERN_BYTES}", self.pattern);
        let said = open(&self.tenant.segment, &self.tenant.grant, &read).await?;
        expect_opened(&said, &format!("reading the disk of {}", self.node))?;
        let mut own = 0;
        for (other, before) in all.iter().zip(before) {
            let seen = other.at_gateway.from(self.mac) - before;
            let theirs = other.network == self.network;
            own = if theirs { seen } else { own };
            if theirs != (seen > 0) {
                let found = format!("{seen} frames of {} at the gateway of {}", self.node, other.network.name);
                return Err(LabError::unexpected("reading a disk through its gateway", found));
            }
        }
        bench.events.lab(
            "deployment.own_disk",
            &json!({ "node": self.node, "project": self.project, "portal": self.tenant.grant.portal, "frames": own }),
        );
        bench.tell(&format!("  {} of {} reads its own disk at {}", self.node, self.project, self.tenant.grant.portal));
        Ok(())
    }
}

/// On one network: `from` has stolen what it can, and goes for the disk of `to`.
async fn neighbours(bench: &Bench, from: &Station, to: &Station) -> Result<()> {
    let (segment, theirs) = (&from.tenant.segment, &to.tenant.grant);
    let tell = |how: &str, said: &str| {
        let said = said.trim();
        bench
            .events
            .lab("deployment.refused", &json!({ "node": from.node, "disk_of": to.node, "how": how, "said": said }));
        bench.tell(&format!("  {} does not get at the disk of {}, {how}: {}", from.node, to.node, last_line(said)));
    };
    // Even with everything that opens it: the connection goes to the process of this address's export.
    let said = open(segment, theirs, READ).await?;
    expect_refused(&said, "Target not found")?;
    tell(OWN_ADDRESS, &said.words);

    // The neighbour is silent, so that nobody contradicts. Its gateway learns the address from whoever asks by it.
    to.tenant.segment.ip(&["addr", "flush", "dev", PROBE_INTERFACE]).await?;
    speak_from(segment, to.address).await?;
    let seen = from.at_gateway.from(from.mac);
    let own = &from.tenant.grant;
    let guess = Grant { chap_secret: own.chap_secret.clone(), ..theirs.clone() };
    let said = open(segment, &guess, READ).await?;
    expect_refused(&said, "Authentication")?;
    tell(FORGED_ADDRESS, &said.words);
    let frames = from.at_gateway.from(from.mac) - seen;
    // The control: it was the secret that was missing, and nothing else.
    let said = open(segment, theirs, &format!("read -P {} {PATTERN_AT} {PATTERN_BYTES}", to.pattern)).await?;
    expect_opened(&said, "opening a neighbour's disk with its address and its secret")?;
    bench.events.lab("deployment.secret_decides", &json!({ "node": from.node, "disk_of": to.node, "frames": frames }));

    speak_from(segment, from.address).await?;
    speak_from(&to.tenant.segment, to.address).await?;
    for station in [from, to] {
        let said = open(&station.tenant.segment, &station.tenant.grant, READ).await?;
        expect_opened(&said, &format!("opening the disk of {} again", station.node))?;
    }
    Ok(())
}

/// On networks of their own: `from` asks the portal of `to`, in every way that its cable has.
async fn strangers(bench: &Bench, from: &Station, to: &Station) -> Result<()> {
    let segment = &from.tenant.segment;
    // The control: this is how an answer looks.
    expect(reach(segment, from.network.portal()).await?, true, "asking the portal of the node's own gateway")?;
    let their_portal = to.network.portal();
    let (theirs, there) = (their_portal.ip().to_string(), host(&to.network, STRANGER_HOST).to_string());
    let router = from.network.gateway.addr().to_string();
    let ways: [(&str, &[&str]); 2] = [
        (AS_A_NEIGHBOUR, &["addr", "ACTION", &there, "dev", PROBE_INTERFACE]),
        (THROUGH_OWN_GATEWAY, &["route", "ACTION", &theirs, "via", &router, "dev", PROBE_INTERFACE]),
    ];
    for (how, way) in ways {
        let with = |action| way.iter().map(|word| if *word == "ACTION" { action } else { *word }).collect::<Vec<_>>();
        segment.ip(&with("add")).await?;
        let counts =
            || (from.on_cable.from(from.mac), to.at_gateway.from(from.mac), from.on_cable.from(to.gateway_mac));
        let before = counts();
        let answered = reach(segment, their_portal).await?;
        let after = counts();
        segment.ip(&with("del")).await?;
        expect(answered, false, &format!("asking the portal of {}, {how}", to.network.name))?;
        let (sent, arrived, answers) = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
        if sent == 0 || arrived > 0 || answers > 0 {
            let found = format!("{sent} frames sent, {arrived} seen there, {answers} answers");
            return Err(LabError::unexpected(format!("counting frames to {}, {how}", to.network.name), found));
        }
        bench.events.lab(
            "deployment.silent",
            &json!({ "node": from.node, "portal": their_portal, "how": how, "sent": sent, "arrived": arrived,
                "answers": answers }),
        );
        bench
            .tell(&format!("  {} hears nothing of {their_portal}, {how}: {sent} frames sent, none arrived", from.node));
    }
    expect(reach(segment, from.network.portal()).await?, true, "asking the portal of the node's own gateway again")
}

/// What came of opening a disk.
struct Opened {
    worked: bool,
    words: String,
}

/// Has QEMU's initiator open a disk at `segment`'s place, and do one thing.
async fn open(segment: &Netns, grant: &Grant, doing: &str) -> Result<Opened> {
    let Grant { portal, target, lun, initiator, chap_name, chap_secret, .. } = grant;
    let mut initiating = segment.command("qemu-io");
    initiating.args(["--object", &format!("secret,id=chap,data={chap_secret}"), "--image-opts"]);
    initiating.arg(format!(
        "driver=raw,file.driver=iscsi,file.transport=tcp,file.portal={portal},file.target={target},file.lun={lun},\
         file.user={chap_name},file.password-secret=chap,file.initiator-name={initiator}"
    ));
    initiating.args(["-c", doing]);
    let (worked, words) = outcome(initiating, "opening a disk with qemu-io", INITIATOR_LIMIT).await?;
    // It ends well even if what it was told to do failed.
    let worked = worked && !words.contains("verification failed") && words.contains(&format!("/{PATTERN_BYTES} bytes"));
    Ok(Opened { worked, words })
}

fn expect_opened(said: &Opened, doing: &str) -> Result<()> {
    if said.worked { Ok(()) } else { Err(LabError::unexpected(doing, said.words.trim())) }
}

fn expect_refused(said: &Opened, word: &str) -> Result<()> {
    if !said.worked && said.words.contains(word) {
        return Ok(());
    }
    Err(LabError::unexpected(format!("waiting for `{word}`"), said.words.trim()))
}

/// Whether anything answers there: an accepted connection, or a refused one.
async fn reach(segment: &Netns, portal: SocketAddrV4) -> Result<bool> {
    let asking = move || async move {
        match timeout(SILENCE, TcpStream::connect(portal)).await {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(error)) => match error.kind() {
                ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Ok(true),
                // No answer to ARP; or the node's own gateway says that it leads nowhere.
                ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Ok(false),
                _ => Err(LabError::io(format!("connecting to {portal}"))(error)),
            },
            Err(_) => Ok(false),
        }
    };
    segment.act(SILENCE * 2, asking).await
}

fn expect(answered: bool, wanted: bool, doing: &str) -> Result<()> {
    match (answered, wanted) {
        (true, true) | (false, false) => Ok(()),
        (true, false) => Err(LabError::unexpected(doing, "it answers")),
        (false, true) => Err(LabError::unexpected(doing, "nothing answers")),
    }
}

/// Has a node's station speak from this address and no other, and ask anew who its neighbours are.
async fn speak_from(segment: &Netns, address: Ipv4Net) -> Result<()> {
    take_address(segment, address).await?;
    segment.ip(&["neigh", "flush", "dev", PROBE_INTERFACE]).await.map(drop)
}

async fn described(netns: &Netns, interface: &str) -> Result<Value> {
    let said = netns.ip(&["-j", "addr", "show", "dev", interface]).await?;
    let doing = format!("reading what {interface} of {netns} is");
    let interfaces: Value = serde_json::from_str(&said).map_err(LabError::service(&*doing))?;
    interfaces.get(0).cloned().ok_or_else(|| LabError::unexpected(doing, said))
}

async fn mac(netns: &Netns, interface: &str) -> Result<MacAddr> {
    let described = described(netns, interface).await?;
    let address = described.get("address").and_then(Value::as_str).unwrap_or_default();
    address.parse().map_err(LabError::service(format!("reading the MAC address of {interface} of {netns}")))
}

async fn address(netns: &Netns, interface: &str) -> Result<Ipv4Net> {
    let described = described(netns, interface).await?;
    let addresses = described.get("addr_info").and_then(Value::as_array).into_iter().flatten();
    let found =
        addresses.filter(|address| address.get("family").and_then(Value::as_str) == Some("inet")).find_map(|a| {
            let prefix = u8::try_from(a.get("prefixlen")?.as_u64()?).ok()?;
            Ipv4Net::new(a.get("local")?.as_str()?.parse().ok()?, prefix).ok()
        });
    found.ok_or_else(|| LabError::unexpected(format!("reading the address of {interface} of {netns}"), described))
}

fn host(network: &NetworkTopology, last: u32) -> Ipv4Net {
    let host = Ipv4Addr::from(u32::from(network.gateway.network()) + last);
    Ipv4Net::new(host, network.gateway.prefix_len()).unwrap_or(network.gateway)
}

fn last_line(said: &str) -> &str {
    said.lines().last().unwrap_or(said)
}

const OWN_ADDRESS: &str = "with all that opens it, from an address of its own";
const FORGED_ADDRESS: &str = "from its neighbour's address, without its secret";
const AS_A_NEIGHBOUR: &str = "as if it were on its network";
const THROUGH_OWN_GATEWAY: &str = "through its own gateway";
/// Where nodes write, and how much: a block that the golden image leaves alone.
const PATTERN_AT: &str = "64k";
const PATTERN_BYTES: u32 = 4096;
const READ: &str = "read 0 4096";
/// A host number that nobody has.
const STRANGER_HOST: u32 = 200;
/// Longer than Linux goes on asking by ARP, and than the first two tries of a TCP connection.
const SILENCE: Duration = Duration::from_secs(4);
const INITIATOR_LIMIT: Duration = Duration::from_secs(60);
