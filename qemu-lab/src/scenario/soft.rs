//! Scenarios without firmware: a real TPM on a real cable, the agent's own code, and an event log that the lab wrote and
//! extended into the TPM. Quick, and free to lie where an honest node could not.

use super::bench::{Bench, STATE_LIMIT};
use crate::command::wait_until;
use crate::error::{LabError, Result};
use crate::events::Event;
use crate::netns::Netns;
use crate::site::{PROBE_INTERFACE, SiteNode};
use crate::steps::POWERED;
use crate::tpm::RunningTpm;
use assay_ramdisk_agent::attestation::state::AttestationState;
use assay_ramdisk_agent::client::Client;
use assay_ramdisk_agent::network::ask_neighbours_often;
use assay_ramdisk_agent::session::{Session, SessionError, enrol_request};
use assay_ramdisk_agent::settings::MeasuredSettings;
use assay_ramdisk_agent::tpm::Tpm;
use assay_ramdisk_agent::tpm::esapi::EsapiTpm;
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_wire::agent::{AgentSettings, Grant};
use assay_wire::evidence::{Evidence, QUOTED_PCRS};
use assay_wire::id::NodeId;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

/// What a soft node's firmware did: the log, and what to extend for it to be true.
#[derive(Debug, Clone)]
pub(super) struct SoftFirmware {
    log: Vec<u8>,
    /// The same log without one event that was extended.
    log_with_a_gap: Vec<u8>,
    extensions: Vec<(u8, [u8; 32])>,
    reference_values: Value,
}

/// How a soft node behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Conduct {
    /// As an agent should.
    Honest,
    /// It sends the evidence of its previous session.
    ReplayedQuote,
    /// It lets another TPM quote.
    ForeignAk,
    /// It has another nonce quoted.
    WrongNonce,
    /// It leaves an event out of its log.
    MissingEvent,
    /// It was given settings that name another verifier, and measured them.
    TamperedSettings,
}

impl Conduct {
    /// Every dishonest one, with a word that the reason for its refusal must have.
    pub(super) const DISHONEST: [(Self, &'static str); 5] = [
        (Self::ReplayedQuote, "nonce"),
        (Self::ForeignAk, "not signed by this AK"),
        (Self::WrongNonce, "nonce"),
        (Self::MissingEvent, "PCR"),
        (Self::TamperedSettings, "PCR 14"),
    ];

    /// The scenario's word.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Honest => "honest",
            Self::ReplayedQuote => "replayed_quote",
            Self::ForeignAk => "foreign_ak",
            Self::WrongNonce => "wrong_nonce",
            Self::MissingEvent => "missing_event",
            Self::TamperedSettings => "tampered_settings",
        }
    }
}

/// What came of a conversation with the verifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A good verdict.
    Accepted,
    /// A bad one.
    Rejected(Vec<String>),
}

impl SoftFirmware {
    /// Firmware that loads an agent which is not there.
    pub(super) fn new() -> Self {
        let image = sha256(b"an agent's image");
        let command_line = b"console=ttyS0";
        let write =
            |gap: bool| {
                let log = LogWriter::new()
                    .measured(0, EventType::S_CRTM_VERSION, b"qemu-lab soft firmware 1")
                    .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, b"SecureBoot=0");
                let log = if gap { log } else { log.measured(2, EventType::EFI_ACTION, b"an option ROM's action") };
                log.separators()
                    .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, image, b"agent.efi")
                    .measured(11, EventType::IPL, b".linux")
                    .measured(12, EventType::IPL, command_line)
            };
        let (whole, gap) = (write(false), write(true));
        let reference = |pcr: u8, kind: &str, value: [u8; 32], what: &str| json!({ "pcr": pcr, "type": kind, "sha256": hex::encode(value), "description": what });
        let reference_values = json!({
            "name": "soft",
            "command_line": "console=ttyS0",
            "events": [
                reference(4, "EV_EFI_BOOT_SERVICES_APPLICATION", image, "agent.efi"),
                reference(11, "EV_IPL", sha256(b".linux"), ".linux"),
                reference(12, "EV_IPL", sha256(command_line), "command line"),
            ],
        });
        Self {
            log: whole.finish(),
            log_with_a_gap: gap.finish(),
            extensions: whole.extensions().to_vec(),
            reference_values,
        }
    }
}

/// A soft node in the airlock: power-cycled, its TPM on, its station in the airlock's subnet.
pub(super) struct SoftBoot {
    node: NodeId,
    segment: Netns,
    tcti: String,
    /// Another node's TPM, for forgers.
    foreign: Option<(RunningTpm, String)>,
    settings: AgentSettings,
    firmware: SoftFirmware,
    _tpm: RunningTpm,
}

impl SoftBoot {
    /// Sends `node` through the airlock again, and begins that boot.
    pub(super) async fn cycle(bench: &Bench, node: &str, firmware: &SoftFirmware) -> Result<Self> {
        let position = bench.events.position();
        bench.services.client(&["node", "cycle", node]).await?;
        Self::begin(bench, node, firmware, position).await
    }

    /// Leases `node`, and begins its first boot.
    pub(super) async fn lease(bench: &Bench, node: &str, firmware: &SoftFirmware) -> Result<Self> {
        let position = bench.events.position();
        bench.services.lease(node, &bench.site.topology).await?;
        Self::begin(bench, node, firmware, position).await
    }

    /// Gets the TPM of a node that is off, to forge with.
    pub(super) async fn borrow_tpm(&mut self, bench: &Bench, lender: &str) -> Result<()> {
        let tpm = &bench.site.node(lender)?.tpm;
        self.foreign = Some(tpm.power_on_for_software(&self.segment, FOREIGN_TPM_PORT).await?);
        Ok(())
    }

    /// Waits until `node`, turned on at or after `position`, may enrol; gives it a TPM that has just been reset.
    async fn begin(bench: &Bench, node: &str, firmware: &SoftFirmware, position: usize) -> Result<Self> {
        let powered = |event: &Event| event.is(POWERED, node);
        bench.events.wait_for("the soft node to be turned on", position, STATE_LIMIT, powered).await?;
        wait_until("waiting for the soft node's boot to be on record", STATE_LIMIT, || async {
            let status = bench.services.node(node).await.ok()?;
            let in_airlock = status.get("state").and_then(Value::as_str) == Some("airlock");
            (in_airlock && status.get("boot").is_some_and(Value::is_string)).then_some(())
        })
        .await?;
        let place: &SiteNode = bench.site.node(node)?;
        let segment = segment(place)?;
        let airlock = bench.site.topology.airlock;
        let station = ipnet::Ipv4Net::new(host(airlock, 150), airlock.prefix_len()).unwrap_or(airlock);
        take_address(&segment, station).await?;
        let (tpm, tcti) = place.tpm.power_on_for_software(&segment, TPM_PORT).await?;
        let key = bench.services.client(&["key"]).await?;
        let field = |name: &str| key.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let node: NodeId = node.parse().map_err(LabError::service("naming the soft node"))?;
        let settings = AgentSettings {
            node: node.clone(),
            verifier: field("agent_url"),
            verifier_key_sha256: field("agent_key_sha256"),
        };
        Ok(Self { node, segment, tcti, foreign: None, settings, firmware: firmware.clone(), _tpm: tpm })
    }

    /// Talks to the verifier up to its verdict.
    pub(super) async fn attest(&self, conduct: Conduct) -> Result<Outcome> {
        let attempt = self.attempt(conduct);
        self.segment
            .act(CONVERSATION_LIMIT, move || async move {
                match attempt.verdict().await {
                    Ok(_accepted) => Ok(Outcome::Accepted),
                    Err(Failure::Session(SessionError::Rejected { reasons })) => Ok(Outcome::Rejected(reasons)),
                    Err(failure) => Err(failure.into()),
                }
            })
            .await
    }

    /// Goes on to the end as far as an agent can without a kernel to start: release, move, grant, hand-over. Answers
    /// what a tenant's system would have.
    pub(super) async fn run_to_handover(&self) -> Result<SoftTenant> {
        let attempt = self.attempt(Conduct::Honest);
        let (segment, tcti) = (self.segment.clone(), self.tcti.clone());
        self.segment
            .act(CONVERSATION_LIMIT, move || async move {
                let (node, settings) = (attempt.node.clone(), document(&attempt.settings)?);
                let (accepted, mut tpm) = attempt.verdict().await?;
                let released = accepted.await_release().await.map_err(Failure::Session)?;
                let moved = released.ready().await.map_err(Failure::Session)?;
                ask_neighbours_often(PROBE_INTERFACE);
                take_address(&segment, moved.address().address).await?;
                let granted = moved.fetch_grant(&mut tpm).await.map_err(Failure::Session)?;
                let pin = measured_elsewhere(&settings)?.pin();
                let ak = tpm.saved_ak().map_err(Failure::other)?;
                let (grant, state) = (granted.grant().clone(), granted.attestation(node, pin, ak));
                granted.handover().await.map_err(Failure::Session)?;
                Ok(SoftTenant { segment, tcti, grant, state })
            })
            .await
    }

    fn attempt(&self, conduct: Conduct) -> Attempt {
        Attempt {
            conduct,
            node: self.node.clone(),
            tcti: self.tcti.clone(),
            foreign_tcti: self.foreign.as_ref().map(|(_, tcti)| tcti.clone()),
            settings: self.settings.clone(),
            firmware: self.firmware.clone(),
        }
    }
}

/// What a soft node's tenant has after the hand-over.
pub(super) struct SoftTenant {
    /// Where the node's station is.
    pub(super) segment: Netns,
    /// Its TPM.
    pub(super) tcti: String,
    /// What opens its disk.
    pub(super) grant: Grant,
    /// What it goes on attesting with.
    pub(super) state: AttestationState,
}

/// Leases the soft node and teaches the verifier its firmware, which costs the node its place.
pub(super) async fn trust_soft_firmware(bench: &Bench, node: &str, firmware: &SoftFirmware) -> Result<()> {
    let boot = SoftBoot::lease(bench, node, firmware).await?;
    if boot.attest(Conduct::Honest).await? == Outcome::Accepted {
        return Err(LabError::unexpected("attesting without a policy", "it was accepted"));
    }
    bench.services.wait_for_state(node, "rejected", STATE_LIMIT).await?;
    let folder = &bench.site.folder;
    let (values, policy) = (folder.join("soft-reference-values.json"), folder.join("soft-policy.toml"));
    fs::write(&values, firmware.reference_values.to_string())
        .map_err(LabError::io(format!("writing {}", values.display())))?;
    let (values, draft) = (values.display().to_string(), policy.display().to_string());
    bench.services.client(&["policy", "learn", node, "--artefacts", &values, "--out", &draft]).await?;
    super::bench::trust_soft_clock(&policy)?;
    let policy = draft;
    bench.services.client(&["policy", "approve", &policy]).await?;
    Ok(())
}

/// One conversation, as plain data that can go to another thread.
struct Attempt {
    conduct: Conduct,
    node: NodeId,
    tcti: String,
    foreign_tcti: Option<String>,
    settings: AgentSettings,
    firmware: SoftFirmware,
}

impl Attempt {
    async fn verdict(self) -> std::result::Result<(assay_ramdisk_agent::session::Accepted, EsapiTpm), Failure> {
        let mut tpm = self.booted_tpm(&self.tcti)?;
        // Whatever the node was told, this is whom it talks to: a lie in its settings must show in its evidence.
        let truth = document(&self.settings)?;
        let told = match self.conduct {
            Conduct::TamperedSettings => {
                let other = AgentSettings { verifier: "https://10.99.0.66:8443".to_owned(), ..self.settings.clone() };
                document(&other)?
            }
            Conduct::Honest
            | Conduct::ReplayedQuote
            | Conduct::ForeignAk
            | Conduct::WrongNonce
            | Conduct::MissingEvent => truth.clone(),
        };
        let measured = MeasuredSettings::measure(&told, &mut tpm).map_err(Failure::other)?;
        let verifier = measured_elsewhere(&truth)?;
        let client = Client::new(verifier.verifier(), verifier.pin()).map_err(Failure::other)?;
        let keys = tpm.create_keys().map_err(Failure::other)?;
        let request = enrol_request(self.node.clone(), &keys);
        let enrol = async |tpm: &mut EsapiTpm| {
            let challenged = Session::enrol(client.clone(), &request).await.map_err(Failure::Session)?;
            challenged.activate(tpm).await.map_err(Failure::Session)
        };
        let mut activated = enrol(&mut tpm).await?;
        let measurements = vec![measured.measurement().clone()];
        let log = match self.conduct {
            Conduct::MissingEvent => self.firmware.log_with_a_gap.clone(),
            Conduct::Honest
            | Conduct::ReplayedQuote
            | Conduct::ForeignAk
            | Conduct::WrongNonce
            | Conduct::TamperedSettings => self.firmware.log.clone(),
        };
        let mut evidence = activated.quote(&mut tpm, log, measurements).map_err(Failure::Session)?;
        match self.conduct {
            Conduct::Honest | Conduct::MissingEvent | Conduct::TamperedSettings => {}
            Conduct::ReplayedQuote => activated = enrol(&mut tpm).await?,
            Conduct::WrongNonce => requote(&mut evidence, &mut tpm, &sha256(b"another nonce"))?,
            Conduct::ForeignAk => {
                let nobody = || LabError::unexpected("forging a quote", "no TPM was lent for it");
                let mut foreign = self.booted_tpm(self.foreign_tcti.as_ref().ok_or_else(nobody)?)?;
                MeasuredSettings::measure(&told, &mut foreign).map_err(Failure::other)?;
                foreign.create_keys().map_err(Failure::other)?;
                let nonce = activated.request().nonce.clone();
                requote(&mut evidence, &mut foreign, &nonce)?;
            }
        }
        let accepted = activated.send_evidence(&evidence).await.map_err(Failure::Session)?;
        Ok((accepted, tpm))
    }

    /// A TPM that has seen this firmware's boot.
    fn booted_tpm(&self, tcti: &str) -> std::result::Result<EsapiTpm, Failure> {
        let mut tpm = EsapiTpm::open(tcti).map_err(Failure::other)?;
        for (pcr, value) in &self.firmware.extensions {
            tpm.pcr_extend(*pcr, *value).map_err(Failure::other)?;
        }
        Ok(tpm)
    }
}

/// Replaces the quote in `evidence` by one of `tpm` over `nonce`.
fn requote(evidence: &mut Evidence, tpm: &mut dyn Tpm, nonce: &[u8]) -> std::result::Result<(), Failure> {
    let pcrs: Vec<u8> = QUOTED_PCRS.collect();
    let quote = tpm.quote(nonce, &pcrs).map_err(Failure::other)?;
    let values = tpm.pcr_read(&pcrs).map_err(Failure::other)?;
    evidence.attest = quote.attest;
    evidence.signature = quote.signature;
    evidence.pcrs = values.iter().map(hex::encode).collect();
    Ok(())
}

/// The settings, parsed and checked as an agent would, without a TPM that notices.
fn measured_elsewhere(document: &[u8]) -> std::result::Result<MeasuredSettings, Failure> {
    MeasuredSettings::measure(document, &mut NoTpm).map_err(Failure::other)
}

/// A TPM for code that only wants its settings checked.
struct NoTpm;

impl Tpm for NoTpm {
    fn pcr_extend(&mut self, _: u8, _: [u8; 32]) -> std::result::Result<(), assay_ramdisk_agent::tpm::TpmError> {
        Ok(())
    }
    fn pcr_read(&mut self, _: &[u8]) -> std::result::Result<Vec<[u8; 32]>, assay_ramdisk_agent::tpm::TpmError> {
        Err(no_keys("reading PCRs"))
    }
    fn create_keys(
        &mut self,
    ) -> std::result::Result<assay_ramdisk_agent::tpm::AttesterKeys, assay_ramdisk_agent::tpm::TpmError> {
        Err(no_keys("making keys"))
    }
    fn activate_credential(
        &mut self,
        _: &assay_wire::agent::Credential,
    ) -> std::result::Result<zeroize::Zeroizing<Vec<u8>>, assay_ramdisk_agent::tpm::TpmError> {
        Err(no_keys("opening a credential"))
    }
    fn quote(
        &mut self,
        _: &[u8],
        _: &[u8],
    ) -> std::result::Result<assay_ramdisk_agent::tpm::Quote, assay_ramdisk_agent::tpm::TpmError> {
        Err(no_keys("quoting"))
    }
}

fn no_keys(doing: &'static str) -> assay_ramdisk_agent::tpm::TpmError {
    assay_ramdisk_agent::tpm::TpmError::NoKeys { doing }
}

/// Why a conversation ended early.
enum Failure {
    Session(SessionError),
    Other(LabError),
}

impl Failure {
    fn other<E: std::error::Error + Send + Sync + 'static>(error: E) -> Self {
        Self::Other(LabError::service("acting for a soft node")(error))
    }
}

impl From<LabError> for Failure {
    fn from(error: LabError) -> Self {
        Self::Other(error)
    }
}

impl From<Failure> for LabError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Session(error) => Self::service("talking to the verifier")(error),
            Failure::Other(error) => error,
        }
    }
}

fn document(settings: &AgentSettings) -> std::result::Result<Vec<u8>, Failure> {
    serde_json::to_vec(settings).map_err(Failure::other)
}

/// Gives the node's station this address and no other.
pub(super) async fn take_address(segment: &Netns, address: ipnet::Ipv4Net) -> Result<()> {
    segment.ip(&["addr", "flush", "dev", PROBE_INTERFACE]).await?;
    segment.address(PROBE_INTERFACE, address).await
}

fn segment(node: &SiteNode) -> Result<Netns> {
    let missing = || LabError::Topology(format!("soft node {} needs `probe = true`", node.topology.name));
    node.segment.clone().ok_or_else(missing)
}

fn host(network: ipnet::Ipv4Net, last: u32) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::from(u32::from(network.network()) + last)
}

fn sha256(data: &[u8]) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(digest(&SHA256, data).as_ref());
    value
}

const TPM_PORT: u16 = 2321;
const FOREIGN_TPM_PORT: u16 = 2331;
/// Longer than any wait of the agent's own.
const CONVERSATION_LIMIT: Duration = Duration::from_secs(400);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_with_a_gap_misses_one_extension() {
        let firmware = SoftFirmware::new();
        assert!(firmware.log_with_a_gap.len() < firmware.log.len());
        assert!(firmware.extensions.iter().any(|(pcr, _)| *pcr == 2));
    }
}
