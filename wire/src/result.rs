//! Attestation results: what a verifier signs and what every relying party checks for itself.
//!
//! A result is a JWS (RFC 7515, compact, `alg` EdDSA with Ed25519) over EAR claims (draft-ietf-rats-ear) and this
//! project's own. [`SignedResult::verify`] is the only maker of a [`VerifiedResult`]; isolation and imaging each call
//! it with the keys that the lease's project trusts, and act on nothing else.

use crate::id::{AdmissionId, BootId, LeaseId, NodeId, ProjectId};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// EAR's profile identifier.
pub const EAR_PROFILE: &str = "tag:github.com,2023:veraison/ear";
const JOSE_HEADER: &str = r#"{"alg":"EdDSA","typ":"JWT"}"#;
/// More than any result we make; anything longer is not decoded.
const MAX_RESULT_BYTES: usize = 64 * 1024;

/// The claims of an attestation result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Always [`EAR_PROFILE`].
    pub eat_profile: String,
    /// Issued at: seconds since the Unix epoch.
    pub iat: i64,
    /// Expires at: seconds since the Unix epoch.
    pub exp: i64,
    /// This result's id, and the id of the admission that it may become.
    pub jti: AdmissionId,
    /// Who appraised.
    #[serde(rename = "ear.verifier-id")]
    pub verifier_id: VerifierId,
    /// The nonce that the quote carried, base64url.
    pub eat_nonce: String,
    /// The appraisal of each attester; here one, named `tpm`.
    pub submods: BTreeMap<String, Submod>,
    /// The node.
    #[serde(rename = "assay.node")]
    pub node: NodeId,
    /// The project that holds the lease.
    #[serde(rename = "assay.project")]
    pub project: ProjectId,
    /// The lease.
    #[serde(rename = "assay.lease")]
    pub lease: LeaseId,
    /// The boot through the airlock that was appraised.
    #[serde(rename = "assay.boot")]
    pub boot: BootId,
    /// `TPMT_PUBLIC` of the EK, base64url: relying parties seal secrets to it.
    #[serde(rename = "assay.ek-public")]
    pub ek_public: String,
    /// SHA-256 of the EK's `TPMT_PUBLIC`, hexadecimal.
    #[serde(rename = "assay.ek-sha256")]
    pub ek_sha256: String,
    /// The AK's TPM name (algorithm and digest), hexadecimal.
    #[serde(rename = "assay.ak-name")]
    pub ak_name: String,
    /// The admission that this result renews; none if it asks for a new one, whose id is then this result's.
    #[serde(rename = "assay.admission", default, skip_serializing_if = "Option::is_none")]
    pub renews: Option<AdmissionId>,
    /// TPM reset count at the quote.
    #[serde(rename = "assay.reset-count")]
    pub reset_count: u32,
    /// TPM restart count at the quote.
    #[serde(rename = "assay.restart-count")]
    pub restart_count: u32,
}

/// Who appraised: `ear.verifier-id`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifierId {
    /// Developer.
    pub developer: String,
    /// Build.
    pub build: String,
}

/// One attester's appraisal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submod {
    /// EAR status.
    #[serde(rename = "ear.status")]
    pub status: EarStatus,
    /// Digest of the policy that judged, `sha256:<hex>`.
    #[serde(rename = "ear.appraisal-policy-id")]
    pub policy: String,
    /// Verdict per rule, like `pcr-4: every event matched`.
    #[serde(rename = "assay.rules")]
    pub rules: BTreeMap<String, String>,
}

/// EAR trust tiers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EarStatus {
    /// No claim.
    None,
    /// Good.
    Affirming,
    /// Good with a warning.
    Warning,
    /// Bad.
    Contraindicated,
}

/// Why a result is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResultError {
    /// Not the JWS that a verifier makes.
    #[error("attestation result is malformed: {0}")]
    Malformed(&'static str),
    /// No trusted key made this signature. An empty list of keys trusts nobody.
    #[error("attestation result is signed by none of the {trusted} verifier keys that the project trusts")]
    UntrustedSignature {
        /// How many keys are trusted.
        trusted: usize,
    },
    /// Too old.
    #[error("attestation result expired {seconds} s ago")]
    Expired {
        /// Since when.
        seconds: i64,
    },
    /// From the future: one of the two clocks is wrong.
    #[error("attestation result was issued {seconds} s in the future")]
    NotYetValid {
        /// How far.
        seconds: i64,
    },
    /// It says that the node is not good.
    #[error("attestation result does not affirm its node")]
    NotAffirming,
}

/// How far a relying party's clock may be behind the verifier's, in seconds.
const CLOCK_SKEW_SECONDS: i64 = 30;

/// An Ed25519 key that may sign results.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct VerifierKey([u8; 32]);

impl VerifierKey {
    /// The public half of `pair`.
    #[must_use]
    pub fn of(pair: &Ed25519KeyPair) -> Self {
        let mut key = [0; 32];
        key.copy_from_slice(pair.public_key().as_ref());
        Self(key)
    }
}

impl fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerifierKey({self})")
    }
}

impl FromStr for VerifierKey {
    type Err = ResultError;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let mut key = [0; 32];
        hex::decode_to_slice(value, &mut key)
            .map_err(|_| ResultError::Malformed("verifier key is not 32 octets of hexadecimal"))?;
        Ok(Self(key))
    }
}

/// A result as it travels: not checked yet.
#[derive(Debug, Clone)]
pub struct SignedResult(String);

impl SignedResult {
    /// Signs `claims`.
    ///
    /// # Panics
    /// Never: the claims are plain data.
    #[must_use]
    pub fn sign(claims: &Claims, key: &Ed25519KeyPair) -> Self {
        let payload = serde_json::to_vec(claims).unwrap_or_default();
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(JOSE_HEADER), URL_SAFE_NO_PAD.encode(payload));
        let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
        Self(format!("{signed}.{signature}"))
    }

    /// Takes a result off the wire.
    #[must_use]
    pub fn from_wire(text: String) -> Self {
        Self(text)
    }

    /// The compact serialisation.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Checks signature, age and status. `now_seconds` is the relying party's clock.
    ///
    /// # Errors
    /// See [`ResultError`]. Nothing in the token is believed before its signature is.
    pub fn verify(&self, trusted: &[VerifierKey], now_seconds: i64) -> Result<VerifiedResult, ResultError> {
        if self.0.len() > MAX_RESULT_BYTES {
            return Err(ResultError::Malformed("longer than any result"));
        }
        let (signed, signature) = self.0.rsplit_once('.').ok_or(ResultError::Malformed("not three parts"))?;
        let (header, payload) = signed.split_once('.').ok_or(ResultError::Malformed("not three parts"))?;
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| ResultError::Malformed("not base64url"));
        // The header is compared, not interpreted: there is one algorithm, so there is none to confuse it with.
        if decode(header)? != JOSE_HEADER.as_bytes() {
            return Err(ResultError::Malformed("JOSE header is not ours"));
        }
        let signature = decode(signature)?;
        let signs =
            |key: &VerifierKey| UnparsedPublicKey::new(&ED25519, key.0).verify(signed.as_bytes(), &signature).is_ok();
        let Some(signed_by) = trusted.iter().copied().find(signs) else {
            return Err(ResultError::UntrustedSignature { trusted: trusted.len() });
        };
        let claims: Claims =
            serde_json::from_slice(&decode(payload)?).map_err(|_| ResultError::Malformed("claims are not ours"))?;
        check_claims(&claims, now_seconds)?;
        Ok(VerifiedResult { claims, signed_by })
    }

    /// The lease that the result *claims* to be for: only to look up which keys to verify it with.
    ///
    /// # Errors
    /// The token is malformed.
    pub fn unverified_lease(&self) -> Result<(ProjectId, LeaseId), ResultError> {
        #[derive(Deserialize)]
        struct LeaseClaims {
            #[serde(rename = "assay.project")]
            project: ProjectId,
            #[serde(rename = "assay.lease")]
            lease: LeaseId,
        }
        if self.0.len() > MAX_RESULT_BYTES {
            return Err(ResultError::Malformed("longer than any result"));
        }
        let payload = self.0.split('.').nth(1).ok_or(ResultError::Malformed("not three parts"))?;
        let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_| ResultError::Malformed("not base64url"))?;
        let claims: LeaseClaims =
            serde_json::from_slice(&payload).map_err(|_| ResultError::Malformed("claims are not ours"))?;
        Ok((claims.project, claims.lease))
    }
}

fn check_claims(claims: &Claims, now_seconds: i64) -> Result<(), ResultError> {
    if claims.eat_profile != EAR_PROFILE {
        return Err(ResultError::Malformed("not an EAR"));
    }
    if claims.exp <= now_seconds {
        return Err(ResultError::Expired { seconds: now_seconds.saturating_sub(claims.exp) });
    }
    if claims.iat > now_seconds.saturating_add(CLOCK_SKEW_SECONDS) {
        return Err(ResultError::NotYetValid { seconds: claims.iat.saturating_sub(now_seconds) });
    }
    // Secrets are sealed to the one and incidents are named by the other: they must not be two EKs.
    let ek_public =
        URL_SAFE_NO_PAD.decode(&claims.ek_public).map_err(|_| ResultError::Malformed("EK is not base64url"))?;
    if hex::encode(digest(&SHA256, &ek_public)) != claims.ek_sha256 {
        return Err(ResultError::Malformed("EK and EK digest differ"));
    }
    // An empty set of appraisals affirms nothing.
    let affirmed = !claims.submods.is_empty() && claims.submods.values().all(|s| s.status == EarStatus::Affirming);
    if affirmed { Ok(()) } else { Err(ResultError::NotAffirming) }
}

/// A result whose signature, age and status were checked. Made by [`SignedResult::verify`] only.
#[derive(Debug, Clone)]
pub struct VerifiedResult {
    claims: Claims,
    signed_by: VerifierKey,
}

impl VerifiedResult {
    /// What the verifier says.
    #[must_use]
    pub fn claims(&self) -> &Claims {
        &self.claims
    }

    /// Which of the trusted keys signed it.
    #[must_use]
    pub fn signed_by(&self) -> VerifierKey {
        self.signed_by
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn key() -> Ed25519KeyPair {
        let rng = ring::rand::SystemRandom::new();
        Ed25519KeyPair::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&rng).unwrap().as_ref()).unwrap()
    }

    pub(crate) fn set_ek(claims: &mut Claims, public: &[u8]) {
        claims.ek_public = URL_SAFE_NO_PAD.encode(public);
        claims.ek_sha256 = hex::encode(digest(&SHA256, public));
    }

    pub(crate) fn claims() -> Claims {
        let submod = Submod { status: EarStatus::Affirming, policy: "sha256:00".into(), rules: BTreeMap::new() };
        let mut claims = Claims {
            eat_profile: EAR_PROFILE.into(),
            iat: 1000,
            exp: 2000,
            jti: AdmissionId::random(),
            verifier_id: VerifierId { developer: "assay".into(), build: "test".into() },
            eat_nonce: "AA".into(),
            submods: BTreeMap::from([("tpm".into(), submod)]),
            node: "n1".parse().unwrap(),
            project: "p1".parse().unwrap(),
            lease: LeaseId::random(),
            boot: BootId::random(),
            ek_public: String::new(),
            ek_sha256: String::new(),
            ak_name: String::new(),
            renews: None,
            reset_count: 1,
            restart_count: 0,
        };
        set_ek(&mut claims, b"an EK");
        claims
    }

    #[test]
    fn a_good_result_verifies_and_says_what_was_signed() {
        let (key, claims) = (key(), claims());
        let signed = SignedResult::sign(&claims, &key);
        assert_eq!(signed.unverified_lease().unwrap(), (claims.project.clone(), claims.lease));
        assert_eq!(signed.verify(&[VerifierKey::of(&key)], 1500).unwrap().claims(), &claims);
    }

    #[test]
    fn no_trusted_key_means_refused() {
        let signed = SignedResult::sign(&claims(), &key());
        assert_eq!(signed.verify(&[], 1500).unwrap_err(), ResultError::UntrustedSignature { trusted: 0 });
        assert_eq!(
            signed.verify(&[VerifierKey::of(&key())], 1500).unwrap_err(),
            ResultError::UntrustedSignature { trusted: 1 }
        );
    }

    #[test]
    fn d3_d10_age_and_status_are_checked() {
        let key = key();
        let trusted = [VerifierKey::of(&key)];
        let signed = SignedResult::sign(&claims(), &key);
        assert_eq!(signed.verify(&trusted, 2000).unwrap_err(), ResultError::Expired { seconds: 0 });
        assert_eq!(signed.verify(&trusted, 900).unwrap_err(), ResultError::NotYetValid { seconds: 100 });
        for status in [EarStatus::None, EarStatus::Warning, EarStatus::Contraindicated] {
            let mut bad = claims();
            bad.submods.insert("other".into(), Submod { status, policy: String::new(), rules: BTreeMap::new() });
            assert_eq!(SignedResult::sign(&bad, &key).verify(&trusted, 1500).unwrap_err(), ResultError::NotAffirming);
        }
        let mut empty = claims();
        empty.submods.clear();
        assert_eq!(SignedResult::sign(&empty, &key).verify(&trusted, 1500).unwrap_err(), ResultError::NotAffirming);
    }

    #[test]
    fn a6_an_ek_that_is_not_the_one_named_is_refused() {
        let key = key();
        let trusted = [VerifierKey::of(&key)];
        let other = Claims { ek_public: URL_SAFE_NO_PAD.encode(b"another EK"), ..claims() };
        assert_eq!(
            SignedResult::sign(&other, &key).verify(&trusted, 1500).unwrap_err(),
            ResultError::Malformed("EK and EK digest differ")
        );
    }

    #[test]
    fn a12_any_changed_character_is_refused() {
        let key = key();
        let signed = SignedResult::sign(&claims(), &key);
        for index in 0..signed.as_str().len() {
            let mut bytes = signed.as_str().as_bytes().to_vec();
            bytes[index] = if bytes[index] == b'A' { b'B' } else { b'A' };
            let changed = SignedResult::from_wire(String::from_utf8(bytes).unwrap());
            assert!(changed.verify(&[VerifierKey::of(&key)], 1500).is_err(), "change at {index} was accepted");
        }
    }
}
