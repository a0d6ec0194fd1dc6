//! The real services on the lab's site: `assay up` in the site's namespace, one `assay gateway serve` in each project's,
//! and the real client to drive them. What they log becomes the run's events.

use crate::ceph::{LabCeph, disks_socket};
use crate::command::{command, run, wait_until};
use crate::error::{LabError, Result};
use crate::events::{Event, EventLog};
use crate::netns::Netns;
use crate::ramdisk::Ramdisks;
use crate::site::{AIRLOCK_INTERFACE, GATEWAY_INTERFACE, Site};
use crate::topology::{NetworkTopology, Topology};
use assay_wire::id::ProjectId;
use serde_json::{Value, json};
use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::{Child, Command};

/// The services, running. Dropping it kills them as a power cut would.
#[derive(Debug)]
pub struct Services {
    assay: PathBuf,
    folder: PathBuf,
    events: EventLog,
    up: Option<Child>,
    gateways: Vec<Child>,
    failpoints: Option<String>,
}

/// How often nodes attest, and how long they may be silent.
#[derive(Debug, Clone, Copy)]
pub struct AttestationPace {
    /// Between two pieces of evidence.
    pub interval_seconds: u32,
    /// Until an admission that is not renewed ends.
    pub silence_seconds: u32,
}

impl Services {
    /// Writes the configuration of `site`'s services and starts them all.
    ///
    /// # Errors
    /// The `assay` binary is missing or does not become ready; its last words are in the error.
    pub async fn start(
        site: &Site,
        ramdisks: &Ramdisks,
        pace: AttestationPace,
        ceph: Option<&LabCeph>,
        events: EventLog,
    ) -> Result<Self> {
        let assay = assay_binary()?;
        let folder = site.folder.join("services");
        // Databases of an earlier run tell of nodes whose TPMs and ports are gone.
        let _was_there = fs::remove_dir_all(&folder);
        create_folder(&folder.join("gateways"))?;
        let mut services = Self { assay, folder, events, up: None, gateways: Vec::new(), failpoints: None };
        let ceph = ceph.map(|ceph| ceph.table(&services.folder)).transpose()?;
        let imaging = imaging_table(&services.folder, ramdisks, ceph);
        write(&services.folder.join(SITE_FILE), &site_file(site, &services.folder, ramdisks, pace, &imaging)?)?;
        for network in &site.topology.networks {
            let gateway = services.start_gateway(site, network)?;
            services.gateways.push(gateway);
        }
        services.resume().await?;
        Ok(services)
    }

    /// Starts `assay up` and waits until every service answers.
    ///
    /// # Errors
    /// It ends, or does not answer in time.
    pub async fn resume(&mut self) -> Result<()> {
        let mut up = command(&self.assay);
        up.args(["up", "--config"]).arg(self.folder.join(SITE_FILE));
        // The lab's binaries are built with failure points; they do nothing unless this says so.
        up.env("FAILPOINTS", self.failpoints.take().unwrap_or_default());
        self.up = Some(spawn_logged(up, &self.folder.join("assay.err"), "assay", &self.events)?);
        self.ready().await?;
        self.events.lab("services.ready", &json!({}));
        Ok(())
    }

    /// Makes the next start of `assay up` fail at a point, as the `fail` crate writes it.
    pub fn arm(&mut self, failpoints: &str) {
        self.failpoints = Some(failpoints.to_owned());
    }

    /// Kills `assay up` at once.
    pub async fn kill(&mut self) {
        if let Some(mut up) = self.up.take() {
            let _already_dead = up.kill().await;
            self.events.lab("services.killed", &json!({}));
        }
    }

    /// Waits until `assay up` ends by itself.
    ///
    /// # Errors
    /// It still runs after `limit`.
    pub async fn wait_for_end(&mut self, limit: Duration) -> Result<()> {
        let Some(mut up) = self.up.take() else { return Ok(()) };
        let ended = tokio::time::timeout(limit, up.wait()).await;
        self.events.lab("services.ended", &json!({}));
        ended.map(drop).map_err(|_| LabError::Timeout {
            doing: "waiting for `assay up` to end".to_owned(),
            waited: limit,
            hint: "it still runs".to_owned(),
        })
    }

    /// Runs the client and answers its JSON; null if it has nothing to say.
    ///
    /// # Errors
    /// The client fails; its words are in the error.
    pub async fn client(&self, arguments: &[&str]) -> Result<Value> {
        let mut client = command(&self.assay);
        client.args(arguments).args(["--output", "json", "--site"]).arg(self.state_folder());
        let doing = format!("assay {}", arguments.join(" "));
        let output = run(client, &doing, CLIENT_LIMIT).await?;
        if output.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&output).map_err(LabError::service(format!("{doing}: reading its JSON")))
    }

    /// Registers everything that is in the topology, and the golden image.
    ///
    /// # Errors
    /// A service refuses.
    pub async fn provision(&self, site: &Site, image: &Path) -> Result<()> {
        let switch = &site.switch;
        let (ovsdb, control) = (switch.ovsdb_socket(), switch.control_socket());
        let (ovsdb, control) = (ovsdb.display().to_string(), control.display().to_string());
        self.client(&[
            "switch",
            "add",
            SWITCH,
            "--ovsdb",
            &ovsdb,
            "--control",
            &control,
            "--bridge",
            crate::site::BRIDGE,
        ])
        .await?;
        for network in &site.topology.networks {
            self.provision_network(network).await?;
        }
        for (name, node) in &site.nodes {
            let folder = site.folder.join("nodes").join(name);
            let (password, ca) = (folder.join("bmc-password"), folder.join("bmc-ca.pem"));
            write_secret(&password, &node.bmc.password)?;
            write(&ca, &node.bmc.ca_pem)?;
            let (password, ca) = (password.display().to_string(), ca.display().to_string());
            let nic = format!("eth0,{},{SWITCH},{}", node.topology.mac, node.port);
            let system = node.bmc.system_url();
            self.client(&[
                "node",
                "add",
                name,
                "--bmc",
                &system,
                "--bmc-user",
                &node.bmc.username,
                "--bmc-password-file",
                &password,
                "--bmc-ca",
                &ca,
                "--nic",
                &nic,
            ])
            .await?;
        }
        if let Some(network) = site.topology.networks.first() {
            let image = image.display().to_string();
            self.client(&["image", "import", IMAGE, &image, "--project", network.project.as_str()]).await?;
            if site.topology.networks.iter().flat_map(NetworkTopology::projects).nth(1).is_some() {
                self.client(&["image", "share", IMAGE, "--public"]).await?;
            }
        }
        self.events.lab("site.provisioned", &json!({}));
        Ok(())
    }

    /// Leases `node` to its project in the topology, with a clone of the golden image. Answers the lease's id.
    ///
    /// # Errors
    /// The topology has no place for it, or a service refuses.
    pub async fn lease(&self, node: &str, topology: &Topology) -> Result<String> {
        let (project, network) = topology.place(node)?;
        let lease = self
            .client(&[
                "lease",
                "create",
                "--project",
                project.as_str(),
                "--node",
                node,
                "--network",
                network.name.as_str(),
                "--image",
                IMAGE,
            ])
            .await?;
        text(&lease, "id", "creating a lease")
    }

    /// A node as isolation has it.
    ///
    /// # Errors
    /// Isolation does not answer.
    pub async fn node(&self, node: &str) -> Result<Value> {
        self.client(&["node", "show", node]).await
    }

    /// Waits until isolation says that `node` is in `state`.
    ///
    /// # Errors
    /// It is not within `limit`.
    pub async fn wait_for_state(&self, node: &str, state: &str, limit: Duration) -> Result<Value> {
        let doing = format!("waiting for node {node} to be {state}");
        wait_until(&doing, limit, || async {
            let status = self.node(node).await.ok()?;
            (status.get("state").and_then(Value::as_str) == Some(state)).then_some(status)
        })
        .await
    }

    /// The node's latest attestation, as the verifier has it.
    ///
    /// # Errors
    /// The verifier does not answer, or does not attest the node.
    pub async fn attestation(&self, node: &str) -> Result<Value> {
        let attestations = self.client(&["attestation", "show", node]).await?;
        let latest = attestations.as_array().and_then(|list| list.first()).cloned();
        latest.ok_or_else(|| LabError::unexpected(format!("asking for the attestation of {node}"), "there is none"))
    }

    /// Waits until good evidence of `node` has come `renewals` times since it was admitted last.
    ///
    /// # Errors
    /// It has not within `limit`.
    pub async fn wait_for_renewals(&self, node: &str, renewals: u64, limit: Duration) -> Result<Value> {
        let doing = format!("waiting for {renewals} renewals of node {node}");
        wait_until(&doing, limit, || async {
            let attestation = self.attestation(node).await.ok()?;
            let pushes = attestation.get("pushes").and_then(Value::as_u64)?;
            (pushes >= renewals).then_some(attestation)
        })
        .await
    }

    /// The services' folder: keys, databases, `client.toml`.
    #[must_use]
    pub fn state_folder(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// The run's events.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    async fn provision_network(&self, network: &NetworkTopology) -> Result<()> {
        for project in network.projects() {
            self.client(&["project", "create", project.as_str()]).await?;
        }
        let (owner, vlan) = (network.project.as_str(), network.vlan.to_string());
        let mut create = vec!["network", "create", network.name.as_str(), "--project", owner, "--vlan", &vlan];
        create.extend(network.shared_with.iter().flat_map(|project| ["--share-with", project.as_str()]));
        self.client(&create).await?;
        // Projects that share the gateway each have a record of it.
        for project in network.projects() {
            self.provision_gateway(project, network).await?;
        }
        Ok(())
    }

    async fn provision_gateway(&self, project: &ProjectId, network: &NetworkTopology) -> Result<()> {
        let control = control_socket(&self.folder, network).display().to_string();
        let (portal, relay) = (network.portal().to_string(), relay(network).to_string());
        let subnet = network.gateway.trunc().to_string();
        self.client(&[
            "gateway",
            "add",
            "--project",
            project.as_str(),
            "--control",
            &control,
            "--portal",
            &portal,
            "--relay",
            &relay,
            "--subnet",
            &subnet,
        ])
        .await
        .map(drop)
    }

    fn start_gateway(&self, site: &Site, network: &NetworkTopology) -> Result<Child> {
        let file = self.folder.join("gateways").join(format!("{}.toml", network.project));
        write(&file, &gateway_file(&self.folder, network)?)?;
        let netns: &Netns = &site.project(network.project.as_str())?.gateway;
        let mut gateway = netns.command(&self.assay.display().to_string());
        gateway.args(["gateway", "serve", "--config"]).arg(&file);
        let errors = self.folder.join("gateways").join(format!("{}.err", network.project));
        spawn_logged(gateway, &errors, "gateway", &self.events)
    }

    async fn ready(&mut self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        for question in [["project", "list"], ["image", "list"], ["policy", "list"]] {
            loop {
                let Err(refused) = self.client(&question).await else { break };
                let ended = self.up.as_mut().and_then(|up| up.try_wait().ok().flatten());
                if ended.is_some() || tokio::time::Instant::now() >= deadline {
                    let words = fs::read_to_string(self.folder.join("assay.err")).unwrap_or_default();
                    let state = if ended.is_some() { "it has ended" } else { "it does not answer" };
                    let problem = format!("{state}: {} {refused}", crate::command::tail(words.trim()));
                    return Err(LabError::unexpected("starting `assay up`", problem));
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
        Ok(())
    }
}

/// The services' program: beside this one, or where `ASSAY_BIN` says.
/// The `assay` binary: `ASSAY_BIN`, or the one beside this tool.
///
/// # Errors
/// It is not there.
pub fn assay_binary() -> Result<PathBuf> {
    let doing = "finding the `assay` binary";
    if let Some(path) = std::env::var_os("ASSAY_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().map_err(LabError::io(doing))?;
    let assay = own.with_file_name("assay");
    if assay.exists() {
        return Ok(assay);
    }
    Err(LabError::unexpected(doing, format!("{} is not there; run `make build`", assay.display())))
}

/// The site's file. Values are put in as TOML values, never as text.
fn site_file(
    site: &Site,
    folder: &Path,
    ramdisks: &Ramdisks,
    pace: AttestationPace,
    imaging: &Value,
) -> Result<String> {
    let topology = &site.topology;
    let airlock = topology.airlock.addr().to_string();
    let host = |last: u32| std::net::Ipv4Addr::from(u32::from(topology.airlock.network()) + last).to_string();
    let ca_files = site.tpm_authority.ca_files();
    let tables = json!({
        "site": { "state_dir": folder.join("state"), "names": [airlock] },
        "isolation": {
            "quarantine_vlan": topology.quarantine_vlan,
            "airlock_vlan": topology.airlock_vlan,
            "reset_poll_ms": 500,
        },
        "imaging": imaging,
        "verifier": {
            "agent_listen": format!("{airlock}:8443"),
            "agent_socket": agent_socket(folder),
            "ek_ca_files": ca_files,
            "attestation_interval_seconds": pace.interval_seconds,
            "attestation_silence_seconds": pace.silence_seconds,
        },
        "netboot": {
            "verifier_url": format!("https://{airlock}:8443"),
            "interfaces": [{
                "name": AIRLOCK_INTERFACE,
                "server": airlock,
                "network": topology.airlock.trunc(),
                "pool_first": host(100),
                "pool_last": host(199),
            }],
            "ramdisks": ramdisks.tables(),
            "default_ramdisk": crate::ramdisk::GOOD,
            "node_ramdisks": ramdisks.overrides(),
        },
    });
    to_toml(&tables, SITE_FILE)
}

fn imaging_table(folder: &Path, ramdisks: &Ramdisks, ceph: Option<Value>) -> Value {
    let mut table = json!({ "import_folders": [ramdisks.image_folder], "store": image_store(folder) });
    if let (Some(ceph), Some(table)) = (ceph, table.as_object_mut()) {
        table.insert("ceph".to_owned(), ceph);
    }
    table
}

fn gateway_file(folder: &Path, network: &NetworkTopology) -> Result<String> {
    let table = json!({
        "control_socket": control_socket(folder, network),
        "portal": network.portal(),
        "relay": relay(network),
        "verifier_socket": agent_socket(folder),
        "store": image_store(folder),
        "rbd_disks_socket": disks_socket(folder),
        "dhcp": { "interface": GATEWAY_INTERFACE, "network": network.gateway.trunc() },
    });
    to_toml(&table, "the gateway's file")
}

fn to_toml(value: &Value, what: &str) -> Result<String> {
    toml::to_string(value).map_err(LabError::service(format!("writing {what}")))
}

fn relay(network: &NetworkTopology) -> SocketAddrV4 {
    SocketAddrV4::new(network.gateway.addr(), 8443)
}

fn control_socket(folder: &Path, network: &NetworkTopology) -> PathBuf {
    folder.join("gateways").join(format!("{}.sock", network.project))
}

/// Gateways read and write the store that imaging keeps.
fn image_store(folder: &Path) -> PathBuf {
    folder.join("state").join("images")
}

fn agent_socket(folder: &Path) -> PathBuf {
    folder.join("agent.sock")
}

/// Starts a service: its standard output becomes events, its errors go to a file.
fn spawn_logged(mut service: Command, errors: &Path, source: &'static str, events: &EventLog) -> Result<Child> {
    let doing = format!("starting {source}");
    let file = fs::File::create(errors).map_err(LabError::io(format!("creating {}", errors.display())))?;
    service.stdout(Stdio::piped()).stderr(file);
    let mut child = service.spawn().map_err(LabError::io(doing))?;
    if let Some(stdout) = child.stdout.take() {
        tokio::spawn(record_lines(stdout, source, events.clone()));
    }
    Ok(child)
}

async fn record_lines(stdout: impl AsyncRead + Unpin, source: &'static str, events: EventLog) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match Event::parse(&line) {
            Some(event) => events.record(event),
            None => events.lab("service.said", &json!({ "service": source, "line": line })),
        }
    }
}

fn text(value: &Value, field: &str, doing: &str) -> Result<String> {
    let found = value.get(field).and_then(Value::as_str);
    found.map(str::to_owned).ok_or_else(|| LabError::unexpected(doing, format!("the answer has no `{field}`: {value}")))
}

fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(LabError::io(format!("making {}", path.display())))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(LabError::io(format!("writing {}", path.display())))
}

pub(crate) fn write_secret(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let doing = format!("writing {}", path.display());
    let mut options = fs::OpenOptions::new();
    let mut file =
        options.write(true).create(true).truncate(true).mode(0o600).open(path).map_err(LabError::io(&*doing))?;
    file.write_all(text.as_bytes()).map_err(LabError::io(doing))
}

/// The switch's name in isolation.
pub const SWITCH: &str = "lab";
/// The golden image's name in imaging.
pub const IMAGE: &str = "debian-12";
const SITE_FILE: &str = "site.toml";
const CLIENT_LIMIT: Duration = Duration::from_secs(180);
const START_LIMIT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(100);
