//! The agent's conversation with the verifier, over TLS with the key pinned by the agent's settings:
//!
//! ```text
//! POST /agent/v1/enrol                          EnrolRequest     -> EnrolChallenge
//! POST /agent/v1/sessions/{id}/activate         ActivateRequest  -> EvidenceRequest     (step 4: agent.enrolled)
//! POST /agent/v1/sessions/{id}/evidence         Evidence         -> Verdict             (steps 5 and 6)
//! GET  /agent/v1/sessions/{id}/release          long poll        -> ReleaseStatus       (step 7: the export is made)
//! POST /agent/v1/sessions/{id}/ready            ()               -> ()                  (the port may move: step 8)
//! GET  /agent/v1/sessions/{id}/grant            through the relay -> SealedGrant
//! POST /agent/v1/sessions/{id}/handover         ()               -> ()                  (step 9: tenant.booted)
//! ```
//!
//! From `activate` on, requests carry `Authorization: Bearer <proof>`: the activated secret in hexadecimal, which
//! only the TPM that holds both EK and AK could open.

use crate::encoding::base64_bytes;
use crate::evidence::AGENT_PCR;
use crate::id::{AdmissionId, NodeId, SessionId};
use crate::net::Iqn;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};

/// What netboot tells an agent. It reaches the agent unauthenticated, so the agent measures the document's exact
/// bytes into [`AGENT_PCR`] before it uses them, and the verifier compares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentSettings {
    /// The node that this machine is, as netboot believes by its MAC address.
    pub node: NodeId,
    /// Base URL of the verifier's agent API, like `https://10.99.0.1:8443`.
    pub verifier: String,
    /// SHA-256 of the verifier's TLS key (its `SubjectPublicKeyInfo` in DER), hexadecimal. The only key accepted.
    pub verifier_key_sha256: String,
}

impl AgentSettings {
    /// The PCR into which these settings are measured.
    pub const PCR: u8 = AGENT_PCR;
}

/// The agent introduces itself.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EnrolRequest {
    /// The node it was told to be.
    pub node: NodeId,
    /// `TPMT_PUBLIC` of the EK.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub ek_public: Vec<u8>,
    /// The EK certificate as NV holds it (DER, perhaps followed by padding).
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub ek_certificate: Vec<u8>,
    /// The certificates of the CAs between the EK's and its root, as NV 0x01c00100 to 0x01c001ff hold them (DER, one
    /// after the other, perhaps with padding); empty if the TPM has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "base64_bytes")]
    #[schema(value_type = String)]
    pub ek_chain: Vec<u8>,
    /// What vouches for an EK without a certificate, on machines whose maker certified an IAK instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iak: Option<IakEndorsement>,
    /// `TPMT_PUBLIC` of the AK.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub ak_public: Vec<u8>,
}

/// An initial attestation key (TCG "TPM 2.0 Keys for Device Identity and Attestation") and its word for the EK: the
/// machine's maker vouches for the IAK, and the IAK says that its TPM made the EK. No nonce is needed for that:
/// both keys are fixedTPM, so it stays true, and the EK proves itself by credential activation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct IakEndorsement {
    /// `TPMT_PUBLIC` of the IAK.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub public: Vec<u8>,
    /// Its certificate (DER, perhaps followed by padding).
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub certificate: Vec<u8>,
    /// The certificates of the CAs between it and its root, one after the other.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "base64_bytes")]
    #[schema(value_type = String)]
    pub chain: Vec<u8>,
    /// `TPMS_ATTEST` of `TPM2_CertifyCreation` on the EK.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub attest: Vec<u8>,
    /// The IAK's `TPMT_SIGNATURE` over it.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub signature: Vec<u8>,
}

/// A credential that only the TPM with this EK and this AK can open (TPM 2.0 Part 1, section 24).
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EnrolChallenge {
    /// The session that the answer continues.
    pub session: SessionId,
    /// The credential for `TPM2_ActivateCredential`.
    pub credential: Credential,
}

/// The two inputs of `TPM2_ActivateCredential`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    /// `TPMS_ID_OBJECT`: HMAC (as `TPM2B_DIGEST`) followed by the encrypted identity; without the outer
    /// `TPM2B_ID_OBJECT` size.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub id_object: Vec<u8>,
    /// The content of `TPM2B_ENCRYPTED_SECRET`, without its size.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub encrypted_secret: Vec<u8>,
}

/// The opened credential: proof that EK and AK share a TPM. Both bearer token of the session and secret, so redacted.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ActivateRequest {
    /// The secret, hexadecimal.
    pub proof: String,
}

impl fmt::Debug for ActivateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActivateRequest").field("proof", &"<redacted>").finish()
    }
}

/// What the verifier wants quoted.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvidenceRequest {
    /// The quote's `extraData`: 32 random octets, for one use, expiring.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub nonce: Vec<u8>,
    /// PCR indices of the SHA-256 bank to select.
    pub pcrs: Vec<u8>,
    /// How long the nonce is good for.
    pub expires_in_seconds: u64,
    /// The verifiers whose results the lease's project wants beside this one's: the agent asks them first, and sends what
    /// they say as [`crate::evidence::Evidence::supporting`]. Who must agree is isolation's and imaging's to decide, so
    /// a verifier that names nobody here wins nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub co_verifiers: Vec<CoVerifier>,
}

/// Another verifier that appraises the node and begins no release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CoVerifier {
    /// Base URL of its agent API, like `https://10.99.0.2:8443`.
    pub url: String,
    /// SHA-256 of its TLS key (`SubjectPublicKeyInfo` in DER), hexadecimal. The only key accepted.
    pub key_sha256: String,
}

/// What the verifier thinks of the evidence.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// Good: a release was begun. Poll for it.
    Accepted,
    /// Good, says a verifier that begins no releases: its result is for the one that does.
    Affirmed {
        /// The signed result, as [`crate::result`] describes it.
        result: String,
        /// Its id, under which this verifier goes on attesting the node ([`crate::attestation`]) and its later results
        /// renew it; none if it does not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attestation: Option<AdmissionId>,
    },
    /// Not good: the node stays where it is.
    Rejected {
        /// One sentence a reason, naming PCR and event where there is one.
        reasons: Vec<String>,
    },
}

/// How far the release has come, as far as the agent must know.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "release", rename_all = "kebab-case")]
pub enum ReleaseStatus {
    /// Still being prepared; ask again.
    Pending,
    /// Everything is ready for the node to move: say `ready`, then take this address.
    Move(TenantAddress),
    /// The release was undone; this boot is over.
    Aborted {
        /// Why.
        reason: String,
    },
}

/// The node's address on the project's provisioning network, and what it reaches there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantAddress {
    /// Address and prefix length.
    #[schema(value_type = String, example = "10.20.0.50/24")]
    pub address: Ipv4Net,
    /// Default router, if the network has one.
    #[schema(value_type = Option<String>)]
    pub router: Option<Ipv4Addr>,
    /// The gateway's relay to the verifier's agent API.
    #[schema(value_type = String, example = "10.20.0.1:8443")]
    pub relay: SocketAddrV4,
}

/// A [`Grant`] that only one TPM can open: a credential for (EK, AK name) whose secret is the AES-256-GCM key.
/// The associated data is the export's admission id, so that a grant cannot be replayed into another admission.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SealedGrant {
    /// The admission that this grant belongs to: the associated data, as the UUID's 16 octets.
    pub admission: AdmissionId,
    /// Opens to 32 octets: the key.
    pub credential: Credential,
    /// 12 octets.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub nonce: Vec<u8>,
    /// JSON of a [`Grant`], encrypted, with the 16-octet tag at its end.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub ciphertext: Vec<u8>,
}

/// What an admitted node needs to open its disk. Leaves imaging only inside a [`SealedGrant`].
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The target to log in to.
    pub target: Iqn,
    /// Where it listens.
    pub portal: SocketAddrV4,
    /// Logical unit number; 0.
    pub lun: u16,
    /// The one initiator name that the target accepts.
    pub initiator: Iqn,
    /// CHAP name (RFC 1994).
    pub chap_name: String,
    /// CHAP secret: 16 printable characters (iPXE and Windows take 12 to 16).
    pub chap_secret: String,
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant")
            .field("target", &self.target)
            .field("portal", &self.portal)
            .field("initiator", &self.initiator)
            .field("chap_secret", &"<redacted>")
            .finish_non_exhaustive()
    }
}
