//! A soft node: keys as a TPM has them, an event log as firmware writes it, and the agent's conversation with the
//! verifier, from enrolment to the hand-over and on to evidence at run time.

use super::connection::{CallFailed, Connection};
use assay_tpm::soft_keys::{SoftClock, SoftKeys};
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_wire::agent::{
    ActivateRequest, AgentSettings, EnrolChallenge, EnrolRequest, EvidenceRequest, ReleaseStatus, SealedGrant, Verdict,
};
use assay_wire::attestation::{AttestationAnswer, AttestationRequest};
use assay_wire::evidence::{AGENT_PCR, AgentMeasurement, Evidence, MeasurementKind, QUOTED_PCRS, RuntimeEvidence};
use assay_wire::id::{AdmissionId, NodeId, SessionId};
use ring::digest::{SHA256, digest};
use serde_json::json;
use std::time::{Duration, Instant};

/// What every node of the fleet boots.
#[derive(Debug, Clone)]
pub(super) struct Firmware {
    pub(super) log: Vec<u8>,
    /// What the log says was extended.
    pub(super) extensions: Vec<(u8, [u8; 32])>,
    pcrs: Vec<[u8; 32]>,
    /// Reference Values of what is not firmware.
    pub(super) reference_values: serde_json::Value,
}

impl Firmware {
    /// A boot of about 60 events and 13 kB: a UEFI machine with Secure Boot's databases of a virtual machine's size.
    pub(super) fn new() -> Self {
        let secure_boot = EventType::EFI_VARIABLE_DRIVER_CONFIG;
        let mut log = LogWriter::new()
            .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
            .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, sha256(b"firmware"), &[0; 16])
            .measured(7, secure_boot, &variable("SecureBoot", &[1]))
            .measured(7, secure_boot, &variable("PK", &[0x5a; 800]))
            .measured(7, secure_boot, &variable("KEK", &[0x5a; 1500]))
            .measured(7, secure_boot, &variable("db", &[0x5a; 3000]))
            .measured(7, secure_boot, &variable("dbx", &[0x5a; 3700]));
        for entry in 0..12 {
            log = log.measured(1, EventType::EFI_VARIABLE_BOOT, &variable(&format!("Boot{entry:04X}"), &[entry; 100]));
        }
        for driver in 0..8 {
            log = log.event(2, EventType::EFI_BOOT_SERVICES_DRIVER, sha256(&[driver]), &[driver; 64]);
        }
        log = log.measured(4, EventType::EFI_ACTION, b"Calling EFI Application from Boot Option").separators();
        let image = |log: LogWriter, name: &str| {
            log.event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(name.as_bytes()), &[0; 64])
        };
        log = IMAGES.iter().fold(log, |log, name| image(log, name));
        for section in SECTIONS {
            log = log.event(11, EventType::IPL, sha256(section.as_bytes()), section.as_bytes());
        }
        log = log.event(12, EventType::IPL, sha256(COMMAND_LINE), b"agent.efi quiet");
        let reference = |pcr: u8, kind: EventType, measured: &[u8], what: &str| json!({"pcr": pcr, "type": kind, "sha256": hex::encode(sha256(measured)), "description": what});
        let application = EventType::EFI_BOOT_SERVICES_APPLICATION;
        let mut events: Vec<_> = IMAGES.iter().map(|name| reference(4, application, name.as_bytes(), name)).collect();
        events.extend(SECTIONS.iter().map(|name| reference(11, EventType::IPL, name.as_bytes(), name)));
        events.push(reference(12, EventType::IPL, COMMAND_LINE, "command line"));
        let reference_values = json!({"name": "fleet", "command_line": "quiet", "events": events});
        let pcrs = log.pcrs()[..=usize::from(*QUOTED_PCRS.end())].to_vec();
        Self { log: log.finish(), extensions: log.extensions().to_vec(), pcrs, reference_values }
    }
}

/// One node.
pub(super) struct SoftNode {
    pub(super) name: NodeId,
    keys: SoftKeys,
    pcrs: Vec<[u8; 32]>,
    settings: Vec<u8>,
    powered_on: Instant,
    pub(super) connection: Connection,
}

/// A session that was activated.
pub(super) struct Session {
    id: SessionId,
    proof: String,
    nonce: Vec<u8>,
}

/// A node that was handed over.
#[derive(Debug, Clone)]
pub(super) struct Admitted {
    pub(super) admission: AdmissionId,
    proof: String,
}

/// What a good answer to evidence at run time was.
#[derive(Debug)]
pub(super) enum Pushed {
    /// The admission goes on; what to send next.
    Renewed(AttestationRequest),
    /// It is over.
    Revoked(Vec<String>),
}

impl SoftNode {
    /// Boots: its settings are measured after all that `firmware` measured.
    pub(super) fn boot(keys: SoftKeys, firmware: &Firmware, settings: &AgentSettings, connection: Connection) -> Self {
        let document = serde_json::to_vec(settings).unwrap_or_default();
        let mut pcrs = firmware.pcrs.clone();
        if let Some(agent) = pcrs.get_mut(usize::from(AGENT_PCR)) {
            *agent = sha256(&[*agent, sha256(&document)].concat());
        }
        let (name, powered_on) = (settings.node.clone(), Instant::now());
        Self { name, keys, pcrs, settings: document, powered_on, connection }
    }

    /// Steps 4 of the boot path: EK and AK shown to share a TPM.
    pub(super) async fn enrol(&mut self) -> Result<Session, CallFailed> {
        let introduction = EnrolRequest {
            node: self.name.clone(),
            ek_public: self.keys.ek_public.clone(),
            ek_certificate: self.keys.ek_certificate.clone(),
            ek_chain: Vec::new(),
            iak: None,
            ak_public: self.keys.ak_public.clone(),
        };
        let challenge: EnrolChallenge = self.connection.post("/agent/v1/enrol", "", &introduction).await?;
        let secret = self.keys.activate(&challenge.credential);
        let proof = hex::encode(secret.ok_or_else(|| CallFailed::Broken("a credential for another TPM".to_owned()))?);
        let path = format!("/agent/v1/sessions/{}/activate", challenge.session);
        let request = ActivateRequest { proof: proof.clone() };
        let wanted: EvidenceRequest = self.connection.post(&path, &proof, &request).await?;
        Ok(Session { id: challenge.session, proof, nonce: wanted.nonce })
    }

    /// Steps 5 and 6: evidence and its verdict.
    pub(super) async fn attest(&mut self, session: &Session, firmware: &Firmware) -> Result<Verdict, CallFailed> {
        let (attest, signature) = self.keys.quote(&session.nonce, &self.pcrs, self.clock());
        let evidence = Evidence {
            attest,
            signature,
            pcrs: self.pcrs.iter().map(hex::encode).collect(),
            event_log: firmware.log.clone(),
            agent_measurements: vec![AgentMeasurement {
                pcr: AGENT_PCR,
                kind: MeasurementKind::AgentSettings,
                data: self.settings.clone(),
            }],
            ima: None,
            tee: Vec::new(),
            supporting: Vec::new(),
        };
        self.connection.post(&path_of(session.id, "evidence"), &session.proof, &evidence).await
    }

    /// Steps 7 to 9. `before` is called ahead of each call.
    pub(super) async fn release(
        &mut self,
        session: &Session,
        mut before: impl FnMut(&mut Connection),
    ) -> Result<Admitted, CallFailed> {
        loop {
            before(&mut self.connection);
            match self.connection.get(&path_of(session.id, "release"), &session.proof).await? {
                ReleaseStatus::Pending => {}
                ReleaseStatus::Move(_) => break,
                ReleaseStatus::Aborted { reason } => return Err(CallFailed::Broken(format!("undone: {reason}"))),
            }
        }
        before(&mut self.connection);
        self.connection.post::<()>(&path_of(session.id, "ready"), &session.proof, &()).await?;
        before(&mut self.connection);
        let grant: SealedGrant = self.connection.get(&path_of(session.id, "grant"), &session.proof).await?;
        before(&mut self.connection);
        self.connection.post::<()>(&path_of(session.id, "handover"), &session.proof, &()).await?;
        Ok(Admitted { admission: grant.admission, proof: session.proof.clone() })
    }

    /// Asks what to prove.
    pub(super) async fn challenge(&mut self, admitted: &Admitted) -> Result<AttestationRequest, CallFailed> {
        let path = format!("/agent/v1/attestations/{}/challenge", admitted.admission);
        self.connection.post(&path, &admitted.proof, &()).await
    }

    /// Evidence at run time.
    pub(super) async fn push(&mut self, admitted: &Admitted, nonce: &[u8]) -> Result<Pushed, CallFailed> {
        let (attest, signature) = self.keys.quote(nonce, &self.pcrs, self.clock());
        let pcrs = self.pcrs.iter().map(hex::encode).collect();
        let evidence = RuntimeEvidence { attest, signature, pcrs, ima: None, tee: Vec::new(), supporting: Vec::new() };
        let path = format!("/agent/v1/attestations/{}", admitted.admission);
        Ok(match self.connection.post(&path, &admitted.proof, &evidence).await? {
            AttestationAnswer::Renewed { next, .. } => Pushed::Renewed(next),
            AttestationAnswer::Revoked { reasons } => Pushed::Revoked(reasons),
        })
    }

    /// Measures something.
    pub(super) fn extend(&mut self, pcr: u8, digest: [u8; 32]) {
        if let Some(value) = self.pcrs.get_mut(usize::from(pcr)) {
            *value = sha256(&[*value, digest].concat());
        }
    }

    fn clock(&self) -> SoftClock {
        let since_power_on = u64::try_from(self.powered_on.elapsed().as_millis()).unwrap_or(u64::MAX);
        SoftClock { clock_ms: since_power_on, reset_count: 1, restart_count: 0 }
    }
}

/// How long to wait before asking again a verifier that has too much to do: spread, so that not all come at once.
pub(super) fn a_moment(attempt: u32, node: usize) -> Duration {
    let spread = u64::try_from(node.wrapping_mul(37) % 100).unwrap_or(0);
    Duration::from_millis((20 + spread) << attempt.min(5))
}

fn path_of(session: SessionId, call: &str) -> String {
    format!("/agent/v1/sessions/{session}/{call}")
}

/// `UEFI_VARIABLE_DATA`.
fn variable(name: &str, content: &[u8]) -> Vec<u8> {
    let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let count = |length: usize| u64::try_from(length).unwrap_or(u64::MAX).to_le_bytes();
    [&[0x61; 16][..], &count(units.len() / 2), &count(content.len()), &units, content].concat()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut value = [0; 32];
    value.copy_from_slice(digest(&SHA256, bytes).as_ref());
    value
}

const IMAGES: [&str; 3] = ["snponly.efi", "agent.efi", "kernel"];
const SECTIONS: [&str; 5] = [".linux", ".osrel", ".cmdline", ".initrd", ".uname"];
const COMMAND_LINE: &[u8] = b"command line";
