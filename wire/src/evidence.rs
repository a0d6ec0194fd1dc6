//! Evidence (RFC 9334): what an agent sends to be appraised. Nobody vouches for any of it until it is verified:
//! the quote is vouched for by the TPM's signature, the event log and the agent's measurements only by replay
//! against the PCR values of a verified quote.

use crate::encoding::base64_bytes;
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

/// The PCR that the agent extends with its own measurements (its settings). No firmware, shim or systemd-stub uses it
/// on this boot path.
pub const AGENT_PCR: u8 = 14;

/// The PCRs that an agent quotes: 0 to 14 of the SHA-256 bank.
pub const QUOTED_PCRS: std::ops::RangeInclusive<u8> = 0..=14;

/// One quote with what explains it.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// `TPMS_ATTEST` as the TPM marshalled it (TPM 2.0 Part 2, 10.12.12).
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub attest: Vec<u8>,
    /// `TPMT_SIGNATURE` over `attest` (Part 2, 11.3.4).
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub signature: Vec<u8>,
    /// The SHA-256 PCR values as the agent read them, in the order of [`QUOTED_PCRS`]; 32 octets each, hexadecimal.
    pub pcrs: Vec<String>,
    /// The firmware's event log, `binary_bios_measurements` as the kernel shows it (TCG PC Client PFP section 10).
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub event_log: Vec<u8>,
    /// What the agent itself extended, in order.
    pub agent_measurements: Vec<AgentMeasurement>,
    /// The kernel's runtime measurement list, if the kernel keeps one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ima: Option<ImaList>,
    /// Quotes of trusted execution environments on this machine, if a policy asks for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tee: Vec<TeeQuote>,
    /// Results of other verifiers about this node and boot, for isolation and imaging. Vouched for by their signatures,
    /// which the relying parties check; the verifier passes them on unread.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supporting: Vec<String>,
}

/// Evidence of a node that was released: what changed since. Its firmware's event log is the one that admitted it, so
/// PCRs 0 to 9 and 11 to 14 must be what they were then; only PCR 10 moves on, as `ima` explains.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RuntimeEvidence {
    /// `TPMS_ATTEST` as the TPM marshalled it.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub attest: Vec<u8>,
    /// `TPMT_SIGNATURE` over `attest`.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub signature: Vec<u8>,
    /// The SHA-256 PCR values as the agent read them, in the order of [`QUOTED_PCRS`]; 32 octets each, hexadecimal.
    pub pcrs: Vec<String>,
    /// What the kernel's runtime measurement list gained since the last evidence; none if the kernel keeps no list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ima: Option<ImaList>,
    /// Quotes of trusted execution environments on this machine, if a policy asks for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tee: Vec<TeeQuote>,
    /// Fresh results of other verifiers about this node, as in [`Evidence::supporting`]: each from evidence of its own,
    /// for a nonce of that verifier's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supporting: Vec<String>,
}

/// Octets of the runtime measurement list that one piece of evidence may carry. What does not fit is for the next.
pub const MAX_IMA_LIST_BYTES: usize = 1 << 20;

/// Octets that one entry of it may have.
pub const MAX_IMA_ENTRY_BYTES: usize = 256 << 10;

/// A stretch of the kernel's runtime measurement list. Vouched for by PCR 10 alone, into which the kernel extends each
/// entry's template digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImaList {
    /// How many entries of the list come before these.
    pub first_entry: u64,
    /// The entries as `binary_runtime_measurements` has them (Linux, Documentation/security/IMA-templates.rst).
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub entries: Vec<u8>,
}

/// A quote of a trusted execution environment. Vouched for by its maker's keys; bound to this TPM and this moment by
/// its report data, whose first 32 octets are SHA-256 of the nonce followed by the AK's name, the others zero.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TeeQuote {
    /// Whose.
    pub kind: TeeKind,
    /// Intel's ECDSA quote, version 3, 4 or 5.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub quote: Vec<u8>,
}

impl TeeQuote {
    /// What a quote's report data must be, so that it is of the machine whose TPM has the AK of this name, and of the
    /// moment of this nonce.
    #[must_use]
    pub fn report_data(nonce: &[u8], ak_name: &[u8]) -> [u8; 64] {
        let mut context = Context::new(&SHA256);
        context.update(nonce);
        context.update(ak_name);
        let mut data = [0; 64];
        data[..32].copy_from_slice(context.finish().as_ref());
        data
    }
}

/// Octets that a quote of a trusted execution environment may have. With its certificates it has about 5 KB.
pub const MAX_TEE_QUOTE_BYTES: usize = 32 << 10;

/// Which trusted execution environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TeeKind {
    /// Intel SGX: an enclave.
    Sgx,
    /// Intel TDX: a trust domain.
    Tdx,
}

/// One extension of a PCR by the agent. The digest that was extended is SHA-256 of `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentMeasurement {
    /// The PCR; always [`AGENT_PCR`] today.
    pub pcr: u8,
    /// What was measured.
    pub kind: MeasurementKind,
    /// The exact bytes that were hashed.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub data: Vec<u8>,
}

/// What an [`AgentMeasurement`] is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MeasurementKind {
    /// The [`crate::agent::AgentSettings`] document, byte for byte as netboot served it.
    AgentSettings,
}
