//! The bench that scenarios are played on: site, services, golden image, and a policy that trusts this firmware.

use crate::ceph::{LabCeph, StoreKind};
use crate::error::{LabError, Result};
use crate::events::{Event, EventLog};
use crate::machine::{OVMF_CODE, emulator_version};
use crate::ramdisk::Ramdisks;
use crate::services::{AttestationPace, Services};
use crate::site::Site;
use crate::steps::{ANSWERED, POWERED};
use crate::topology::{NetworkTopology, Topology};
use assay_wire::step::Step;
use ring::digest::{Context, SHA256};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where a bench gets its parts.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Folder of this run.
    pub folder: PathBuf,
    /// Folder of what outlives runs: images, and policies learnt.
    pub cache: PathBuf,
    /// Where `make agent-image` left the agent's image.
    pub agent_image: PathBuf,
    /// The tenant's golden image.
    pub tenant_image: PathBuf,
    /// What to build.
    pub topology: Topology,
    /// Nodes that get the tampered ramdisk.
    pub tampered_nodes: Vec<String>,
    /// How often nodes attest.
    pub pace: AttestationPace,
    /// Where images and disks are.
    pub store: StoreKind,
}

/// A site with its services, ready for leases.
#[derive(Debug)]
pub struct Bench {
    /// The services.
    pub services: Services,
    /// The hardware.
    pub site: Site,
    /// The run's events.
    pub events: EventLog,
    /// The agent's images.
    pub ramdisks: Ramdisks,
    /// Where images and disks are, if that is Ceph.
    pub ceph: Option<LabCeph>,
    cache: PathBuf,
    tell: fn(&str),
}

impl Bench {
    /// Builds everything. `tell` gets a line whenever there is something to say.
    ///
    /// # Errors
    /// A part is missing or does not start.
    pub async fn build(options: BenchOptions, tell: fn(&str)) -> Result<Self> {
        let BenchOptions { folder, cache, agent_image, tenant_image, topology, tampered_nodes, pace, store } = options;
        fs::create_dir_all(&folder).map_err(LabError::io(format!("making {}", folder.display())))?;
        let events = EventLog::create(&folder.join("events.jsonl"))?;
        let image_folder = tenant_image.parent().unwrap_or(Path::new("/")).to_owned();
        let ramdisks = Ramdisks::prepare(&agent_image, &folder.join("ramdisks"), image_folder, tampered_nodes)?;
        tell("building the site: switch, TPMs, nodes, BMCs");
        let site = Site::build(topology, &folder, &events).await?;
        let ceph = match store {
            StoreKind::Local => None,
            StoreKind::Ceph => {
                tell("starting Ceph: a monitor and an OSD");
                Some(LabCeph::start().await?)
            }
        };
        tell("starting the services");
        let services = Services::start(&site, &ramdisks, pace, ceph.as_ref(), events.clone()).await?;
        tell("registering nodes, networks and the golden image");
        services.provision(&site, &tenant_image).await?;
        tokio::spawn(narrate(events.clone(), tell));
        Ok(Self { services, site, events, ramdisks, ceph, cache, tell })
    }

    /// Says something to whoever watches.
    pub fn tell(&self, line: &str) {
        (self.tell)(line);
    }

    /// The network that nodes are leased to.
    ///
    /// # Errors
    /// The topology has none.
    pub fn network(&self) -> Result<&NetworkTopology> {
        let first = self.site.topology.networks.first();
        first.ok_or_else(|| LabError::Topology("there is no network to lease nodes to".to_owned()))
    }

    /// Makes the verifier trust this firmware and this agent: with the policy learnt before, or by booting a node once
    /// without a policy, which is refused, and learning from the evidence that it leaves.
    ///
    /// # Errors
    /// The node does not get as far as a verdict, or the policy is not accepted.
    pub async fn trust_the_firmware(&self) -> Result<()> {
        let policy = self.policy_file().await?;
        if !policy.exists() {
            self.learn("n1", &policy).await?;
        }
        let file = policy.display().to_string();
        self.services.client(&["policy", "approve", &file]).await?;
        self.events.lab("policy.approved", &json!({ "file": file }));
        Ok(())
    }

    /// The policy that trusts this firmware and this agent, once it was learnt.
    pub(super) async fn policy_file(&self) -> Result<PathBuf> {
        Ok(self.cache.join(format!("appraisal-policy-{}.toml", self.measured_digest().await?)))
    }

    async fn learn(&self, node: &str, policy: &Path) -> Result<()> {
        self.tell("no policy for this firmware yet: booting a node once to learn what it measures");
        let position = self.events.position();
        let lease = self.services.lease(node, &self.site.topology).await?;
        let step = Step::EvidenceAppraised.event();
        let is_verdict = |event: &Event| event.is(step, node);
        self.events.wait_for("a verdict without a policy", position, BOOT_LIMIT, is_verdict).await?;
        self.services.wait_for_state(node, "rejected", STATE_LIMIT).await?;
        let values = self.ramdisks.reference_values.display().to_string();
        let draft = policy.with_extension("draft");
        let out = draft.display().to_string();
        self.services.client(&["policy", "learn", node, "--artefacts", &values, "--out", &out]).await?;
        trust_soft_clock(&draft)?;
        fs::rename(&draft, policy).map_err(LabError::io(format!("keeping {}", policy.display())))?;
        self.services.client(&["lease", "end", &lease]).await?;
        // Giving the node back does not wash off a bad verdict: its operator clears it.
        self.services.client(&["node", "clear", node]).await?;
        self.services.wait_for_state(node, "free", STATE_LIMIT).await?;
        Ok(())
    }

    /// Digest of everything that the enforced PCRs depend on.
    async fn measured_digest(&self) -> Result<String> {
        let mut context = Context::new(&SHA256);
        for path in [Path::new(OVMF_CODE), &self.ramdisks.reference_values] {
            context.update(&fs::read(path).map_err(LabError::io(format!("reading {}", path.display())))?);
        }
        context.update(emulator_version().await?.as_bytes());
        Ok(hex::encode(&context.finish().as_ref()[..6]))
    }
}

/// Says what happens, as it happens.
async fn narrate(events: EventLog, tell: fn(&str)) {
    let mut position = 0;
    loop {
        let told = |event: &Event| {
            [POWERED, ANSWERED].contains(&event.name()) || Step::ALL.iter().any(|step| step.event() == event.name())
        };
        let Ok(event) = events.wait_for("anything", position, NARRATION_LIMIT, |_| true).await else { return };
        position += 1;
        if told(&event) {
            let took = event.number("elapsed_ms").map(|ms| format!(" ({ms:.1} ms)")).unwrap_or_default();
            tell(&format!("  {} {}{took}", event.node().unwrap_or("?"), event.name()));
        }
    }
}

/// From power-on to verdict, under emulation, on a busy machine.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// For isolation to act on what was decided.
pub(crate) const STATE_LIMIT: Duration = Duration::from_secs(60);
const NARRATION_LIMIT: Duration = Duration::from_secs(3600);

/// Has a draft tolerate what software TPMs do to their clocks when a node's power is cut. The verifier drafts nothing of
/// the kind by itself, for it cannot tell them from others.
pub(super) fn trust_soft_clock(draft: &Path) -> Result<()> {
    let text = fs::read_to_string(draft).map_err(LabError::io(format!("reading {}", draft.display())))?;
    let mut policy: toml::Table = toml::from_str(&text).map_err(LabError::service("reading a drafted policy"))?;
    let clock = toml::Table::from_iter([
        ("compare".to_owned(), "within-reset".into()),
        ("require_safe".to_owned(), false.into()),
        ("reason".to_owned(), SOFT_CLOCK.into()),
    ]);
    policy.insert("clock".to_owned(), clock.into());
    fs::write(draft, policy.to_string()).map_err(LabError::io(format!("writing {}", draft.display())))
}

/// Behind QEMU, swtpm's clock was seen to fall back by half a boot over a power cut and to call itself safe; killed by
/// itself, swtpm calls it unsafe.
const SOFT_CLOCK: &str = "the lab cuts the power of its software TPMs, whose clocks then fall back";
