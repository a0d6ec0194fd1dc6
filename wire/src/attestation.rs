//! Continuous attestation: after the release, the agent in the tenant's operating system goes on proving what runs, and
//! the verifier goes on vouching for it. What is not renewed ends by itself: silence closes.
//!
//! ```text
//! POST /agent/v1/attestations/{admission}/challenge       ()              -> AttestationRequest
//! POST /agent/v1/attestations/{admission}                 RuntimeEvidence -> AttestationAnswer
//! GET  /agent/v1/attestations/{admission}/notices?after=N long poll       -> RevocationNotices
//! GET  /agent/v1/attestations/{admission}/secret          once attested   -> SealedSecret, or 404
//! PUT  /v1/leases/{lease}/secret                          SecretRequest   -> ()   (the project's token)
//! ```
//!
//! Through the gateway's relay, over TLS with the pinned key, with `Authorization: Bearer <proof>`: the proof of the
//! session that led to the admission. Each answer carries the next nonce, so one round trip an interval is enough; an
//! agent whose nonce a verifier does not know (it restarted, or it is another one of the site's) is answered
//! 409 `no-nonce` and asks for a challenge.
//!
//! A verifier of the project's own that affirmed the boot (`Verdict::Affirmed`) has the same API, where its
//! configuration says, with the proof of its own session and the id of its own first result in place of the admission's.
//! It hands its fresh results to the agent, who hands them on with its evidence ([`RuntimeEvidence::supporting`]).

use crate::agent::SealedGrant;
use crate::encoding::base64_bytes;
#[cfg(doc)]
use crate::evidence::RuntimeEvidence;
use crate::id::{AdmissionId, NodeId};
use serde::{Deserialize, Serialize};
use std::fmt;

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
        /// The fresh signed result of a verifier that begins no releases: for the one that leads. None from the one that
        /// leads, and none while the measurement list goes on beyond this evidence.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        result: Option<String>,
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

/// A tenant's secret for the node of a lease, or this verifier's share of it: `PUT /v1/leases/{lease}/secret`. The secret
/// is the exclusive-or of all its shares, so a verifier that has one of several has nothing.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretRequest {
    /// The share; the secret itself if there is one share.
    #[serde(with = "base64_bytes")]
    #[schema(value_type = String)]
    pub share: Vec<u8>,
    /// How many shares there are.
    pub shares: u8,
}

impl fmt::Debug for SecretRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretRequest").field("share", &"<redacted>").field("shares", &self.shares).finish()
    }
}

/// A [`SecretRequest`]'s share that only the admitted node's TPM can open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SealedSecret {
    /// How many shares there are: the secret is the exclusive-or of what that many verifiers release.
    pub shares: u8,
    /// The share.
    pub sealed: SealedGrant,
}

/// Makes `masks.len() + 1` shares of `secret`: the masks, which must be random and as long as the secret, and one more.
/// Any of them missing, the others say nothing of the secret. None if a mask has another length.
#[must_use]
pub fn split_secret(secret: &[u8], masks: Vec<Vec<u8>>) -> Option<Vec<Vec<u8>>> {
    let mut shares = masks;
    shares.push(secret.to_vec());
    let last = join_shares(&shares)?;
    shares.pop();
    shares.push(last);
    Some(shares)
}

/// The exclusive-or of `shares`: the secret, if they are all of it. None if there are none or their lengths differ.
#[must_use]
pub fn join_shares<S: AsRef<[u8]>>(shares: &[S]) -> Option<Vec<u8>> {
    let (first, others) = shares.split_first()?;
    let mut joined = first.as_ref().to_vec();
    for share in others.iter().map(AsRef::as_ref) {
        if share.len() != joined.len() {
            return None;
        }
        for (octet, other) in joined.iter_mut().zip(share) {
            *octet ^= other;
        }
    }
    Some(joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_all_of_its_shares_and_nothing_less() {
        let masks = vec![vec![0x5a; 9], vec![0xc3; 9]];
        let shares = split_secret(b"a disk\0ke", masks).unwrap();
        assert_eq!(shares.len(), 3);
        assert_eq!(join_shares(&shares).unwrap(), b"a disk\0ke");
        for missing in 0..3 {
            let mut others = shares.clone();
            others.remove(missing);
            assert_ne!(join_shares(&others).unwrap(), b"a disk\0ke");
        }
        assert_eq!(split_secret(b"alone", Vec::new()).unwrap(), [b"alone".to_vec()]);
        assert_eq!(split_secret(b"secret", vec![vec![0; 5]]), None);
        assert_eq!(join_shares::<Vec<u8>>(&[]), None);
    }

    #[test]
    fn a_share_is_not_printed() {
        let request = SecretRequest { share: b"hidden".to_vec(), shares: 1 };
        assert!(!format!("{request:?}").contains("104"));
    }
}
