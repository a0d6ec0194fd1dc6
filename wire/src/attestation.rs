//! Continuous attestation: after the release, the agent in the tenant's operating system goes on proving what runs, and
//! the verifier goes on vouching for it. What is not renewed ends by itself: silence closes.
//!
//! ```text
//! POST /agent/v1/attestations/{admission}/challenge       ()              -> AttestationRequest
//! POST /agent/v1/attestations/{admission}                 RuntimeEvidence -> AttestationAnswer
//! GET  /agent/v1/attestations/{admission}/notices?after=N long poll       -> RevocationNotices
//! ```
//!
//! Through the gateway's relay, over TLS with the pinned key, with `Authorization: Bearer <proof>`: the proof of the
//! session that led to the admission. Each answer carries the next nonce, so one round trip an interval is enough; an
//! agent whose nonce a verifier does not know (it restarted, or it is another one of the site's) is answered
//! 409 `no-nonce` and asks for a challenge.

use crate::encoding::base64_bytes;
use crate::id::{AdmissionId, NodeId};
use serde::{Deserialize, Serialize};

/// What the verifier wants next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttestationRequest {
    /// The quote's `extraData`: 32 random octets, for one use, expiring.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub nonce: Vec<u8>,
    /// PCR indices of the SHA-256 bank to select.
    pub pcrs: Vec<u8>,
    /// How long the nonce is good for.
    pub expires_in_seconds: u64,
    /// The first entry of the runtime measurement list that the verifier does not have yet.
    pub ima_first_entry: u64,
    /// When the verifier wants it: this many milliseconds from now.
    pub after_ms: u64,
}

/// What the verifier thinks of evidence at run time.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum AttestationAnswer {
    /// Good: the admission goes on.
    Renewed {
        /// Until when it stands now, unless it is renewed again: milliseconds since the Unix epoch.
        expires_at_ms: i64,
        /// What to send next.
        next: AttestationRequest,
    },
    /// Not good, or over: the node is being cut off.
    Revoked {
        /// One sentence a reason.
        reasons: Vec<String>,
    },
}

/// Tells a project's nodes that another of them is no longer trusted, so that they drop the keys they share with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RevocationNotice {
    /// Grows by one with each notice of the project.
    pub sequence: u64,
    /// Who is no longer trusted.
    pub node: NodeId,
    /// Its admission, which has ended.
    pub admission: AdmissionId,
    /// The AK that it attested with: its TPM name, hexadecimal.
    pub ak_name: String,
    /// Why, in words.
    pub reason: String,
    /// When: milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// The notices of a node's project after a sequence number. Answers when there is one, or after 25 s with none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RevocationNotices {
    /// The latest sequence number: the next call's `after`.
    pub latest: u64,
    /// The notices, oldest first.
    pub notices: Vec<RevocationNotice>,
}
