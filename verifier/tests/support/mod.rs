//! A node in miniature: a real software TPM whose PCRs hold what a log says, and evidence quoted from it.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]
#![allow(dead_code, reason = "each test uses its part")]

use assay_tpm::testing::{KeyKind, SoftTpm, sha256};
use assay_verifier::boot_count::BootFacts;
use assay_verifier::event_log::event_type::EventType;
use assay_verifier::event_log::writer::LogWriter;
use assay_verifier::evidence::Challenge;
use assay_verifier::policy::ArtefactReference;
use assay_verifier::quote::AkPublic;
use assay_wire::agent::AgentSettings;
use assay_wire::evidence::{AGENT_PCR, AgentMeasurement, Evidence, MeasurementKind, QUOTED_PCRS};
use assay_wire::id::BootId;

pub(crate) const NONCE: [u8; 32] = [0x11; 32];
pub(crate) const QUOTED: &str = "sha256:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14";
pub(crate) const ACTION: &[u8] = b"Calling EFI Application from Boot Option";

/// A booted machine.
pub(crate) struct Node {
    pub(crate) tpm: SoftTpm,
    pub(crate) ak: AkPublic,
    pub(crate) log: Vec<u8>,
    pub(crate) settings: Vec<u8>,
}

impl Node {
    /// Boots: extends what the log says and what the agent would measure.
    pub(crate) fn boot(log: &LogWriter, kind: KeyKind) -> Self {
        Self::boot_on(SoftTpm::start(), log, kind)
    }

    /// Boots with a TPM that was just powered on.
    pub(crate) fn boot_on(tpm: SoftTpm, log: &LogWriter, kind: KeyKind) -> Self {
        let _ = tpm.create_ek(KeyKind::Rsa);
        let ak = AkPublic::parse(&tpm.create_ak(kind)).unwrap();
        for (pcr, digest) in log.extensions() {
            tpm.extend(*pcr, digest);
        }
        let settings = serde_json::to_vec(&settings()).unwrap();
        tpm.extend(AGENT_PCR, &sha256(&settings));
        Self { tpm, ak, log: log.finish(), settings }
    }

    /// What its agent would send.
    pub(crate) fn evidence(&self) -> Evidence {
        let quote = self.tpm.quote(&NONCE, QUOTED);
        Evidence {
            attest: quote.attest,
            signature: quote.signature,
            pcrs: self.tpm.pcrs()[..=usize::from(*QUOTED_PCRS.end())].iter().map(hex::encode).collect(),
            event_log: self.log.clone(),
            agent_measurements: vec![AgentMeasurement {
                pcr: AGENT_PCR,
                kind: MeasurementKind::AgentSettings,
                data: self.settings.clone(),
            }],
            ima: None,
            tee: Vec::new(),
            supporting: Vec::new(),
        }
    }

    /// What it was asked.
    pub(crate) fn challenge(&self) -> Challenge<'_> {
        Challenge { ak: &self.ak, nonce: &NONCE, last_clock: None }
    }
}

/// A boot by a TPM that no verifier has seen.
pub(crate) fn first_boot() -> BootFacts {
    BootFacts::first(BootId::random())
}

/// What the verifier tells the node.
pub(crate) fn settings() -> AgentSettings {
    AgentSettings {
        node: "n1".parse().unwrap(),
        verifier: "https://10.99.0.1:8443".into(),
        verifier_key_sha256: "ab".repeat(32),
    }
}

/// A whole boot in a dozen events, as OVMF, iPXE and systemd-stub write them.
pub(crate) fn boot_log() -> LogWriter {
    boot_log_with(sha256(b"agent.efi"))
}

/// The same with another UKI.
pub(crate) fn boot_log_with(agent_image: [u8; 32]) -> LogWriter {
    boot_log_until_images()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, agent_image, b"")
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"kernel"), b"")
        .event(11, EventType::IPL, sha256(b"initrd"), b".initrd")
        .event(12, EventType::IPL, sha256(b"command line"), b"agent.efi quiet")
}

/// The boot as far as the boot loader.
pub(crate) fn boot_log_until_images() -> LogWriter {
    LogWriter::new()
        .measured(0, EventType::S_CRTM_VERSION, b"1\0.\x000\0\0\0")
        .event(0, EventType::EFI_PLATFORM_FIRMWARE_BLOB, sha256(b"firmware"), &[0; 16])
        .measured(7, EventType::EFI_VARIABLE_DRIVER_CONFIG, &variable("SecureBoot", &[0]))
        .measured(1, EventType::EFI_VARIABLE_BOOT, &variable("BootOrder", &[0, 0]))
        .measured(4, EventType::EFI_ACTION, ACTION)
        .separators()
        .event(4, EventType::EFI_BOOT_SERVICES_APPLICATION, sha256(b"snponly.efi"), b"")
}

/// `UEFI_VARIABLE_DATA`.
pub(crate) fn variable(name: &str, content: &[u8]) -> Vec<u8> {
    let mut data = vec![0x61; 16];
    let units: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    data.extend_from_slice(&u64::try_from(units.len() / 2).unwrap().to_le_bytes());
    data.extend_from_slice(&u64::try_from(content.len()).unwrap().to_le_bytes());
    data.extend_from_slice(&units);
    data.extend_from_slice(content);
    data
}

/// The Reference Values of what [`boot_log`] boots.
pub(crate) fn artefacts() -> ArtefactReference {
    let event = |pcr: u8, kind: EventType, data: &[u8], description: &str| serde_json::json!({"pcr": pcr, "type": kind, "sha256": hex::encode(sha256(data)), "description": description});
    let image = EventType::EFI_BOOT_SERVICES_APPLICATION;
    let document = serde_json::json!({
        "name": "default",
        "command_line": "quiet",
        "events": [
            event(4, image, b"snponly.efi", "snponly.efi (iPXE)"),
            event(4, image, b"agent.efi", "agent.efi (UKI)"),
            event(4, image, b"kernel", "kernel inside agent.efi"),
            event(11, EventType::IPL, b"initrd", "agent.efi section .initrd"),
            event(12, EventType::IPL, b"command line", "kernel command line"),
        ],
    });
    ArtefactReference::from_json(&document.to_string()).unwrap()
}
