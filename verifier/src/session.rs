//! One agent's conversation with the verifier, as typed states. Steps 4 and 5 of the boot path.
//!
//! ```text
//!  enrol ──▶ Challenged ──proof──▶ Enrolled ──evidence──▶ Appraised ──▶ (the release, if accepted)
//!                                   │   ▲
//!                                   └───┘ asks again: a new nonce, the old one is worth nothing
//! ```
//!
//! * **Challenged**: a credential was made for the EK and AK that the agent named. Nothing is proven. Half-open: these
//!   are the sessions that the store evicts first.
//! * **Enrolled**: the credential was opened, so EK and AK share a TPM. Only in this state is there a nonce.
//! * **Appraised**: the nonce was used; there is a verdict and there will be no other.
//!
//! There is no way from `Challenged` to a nonce but through [`Challenged::activate`], and from a nonce to a verdict but
//! through [`Enrolled::nonce`]. That each transition happens once is the store's to ensure (compare and set).

use assay_service::secret_file;
use assay_wire::id::{AdmissionId, NodeId, SessionId};
use assay_wire::isolation::AirlockContext;
use ring::digest::{SHA256, digest};
use std::fmt;
use std::str::FromStr;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// A session in one of its states.
#[derive(Debug, Clone)]
pub enum Session {
    /// A credential is out.
    Challenged(Challenged),
    /// EK and AK share a TPM.
    Enrolled(Enrolled),
    /// There is a verdict.
    Appraised(Appraised),
}

/// Who this session is with. Up to activation merely what the agent says; from [`Enrolled`] on proven to be one TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attester {
    /// The session.
    pub session: SessionId,
    /// The node that it says it is.
    pub node: NodeId,
    /// `TPMT_PUBLIC` of the EK, as in its certificate.
    pub ek_public: Vec<u8>,
    /// `TPMT_PUBLIC` of the AK.
    pub ak_public: Vec<u8>,
    /// What isolation said of the node when it enrolled. Looked up once and carried along, so that no two parts of one
    /// release can be told different things.
    pub airlock: AirlockContext,
    /// When it enrolled.
    pub created_at_ms: i64,
    /// When the session ends, whatever it has come to.
    pub expires_at_ms: i64,
}

/// A credential is out, and nobody has proven to have opened it.
#[derive(Debug, Clone)]
pub struct Challenged {
    /// Who says so.
    pub attester: Attester,
    /// What the opened credential hashes to.
    pub proof: ProofDigest,
    /// Until when it may be opened.
    pub challenge_expires_at_ms: i64,
}

/// EK and AK are proven to share a TPM.
#[derive(Debug, Clone)]
pub struct Enrolled {
    /// Who.
    pub attester: Attester,
    /// The session's bearer token, hashed.
    pub proof: ProofDigest,
    /// The nonce that is out.
    pub nonce: IssuedNonce,
}

/// There is a verdict.
#[derive(Debug, Clone)]
pub struct Appraised {
    /// Who.
    pub attester: Attester,
    /// The session's bearer token, hashed.
    pub proof: ProofDigest,
    /// The admission that the result may become; none for a bad verdict.
    pub admission: Option<AdmissionId>,
}

/// Why a session does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The secret is not this session's.
    #[error("the proof does not open this session")]
    WrongProof,
    /// It waited too long to open its credential.
    #[error("the credential expired before it was opened: enrol again")]
    ChallengeExpired,
    /// The whole session is too old.
    #[error("the session expired: enrol again")]
    SessionExpired,
    /// Evidence or more before activation.
    #[error("the session's credential was not activated")]
    NotActivated,
    /// The nonce is too old.
    #[error("the nonce expired before the evidence arrived: activate again for a new one")]
    NonceExpired,
    /// The nonce was used.
    #[error("the nonce was used: enrol again")]
    NonceUsed,
}

impl Session {
    /// Who the session is with.
    #[must_use]
    pub fn attester(&self) -> &Attester {
        match self {
            Self::Challenged(session) => &session.attester,
            Self::Enrolled(session) => &session.attester,
            Self::Appraised(session) => &session.attester,
        }
    }

    /// Checks a bearer token. A session that was not activated has none.
    ///
    /// # Errors
    /// Wrong token, not activated, or expired.
    pub fn authenticate(&self, proof: &Proof, now_ms: i64) -> Result<(), SessionError> {
        let digest = match self {
            Self::Challenged(_) => return Err(SessionError::NotActivated),
            Self::Enrolled(session) => &session.proof,
            Self::Appraised(session) => &session.proof,
        };
        if !digest.matches(proof) {
            return Err(SessionError::WrongProof);
        }
        if now_ms >= self.attester().expires_at_ms { Err(SessionError::SessionExpired) } else { Ok(()) }
    }
}

impl Challenged {
    /// The agent shows the opened credential and gets `nonce`.
    ///
    /// # Errors
    /// Wrong proof, or too late. Neither leaves a usable session behind.
    pub fn activate(self, proof: &Proof, nonce: IssuedNonce, now_ms: i64) -> Result<Enrolled, SessionError> {
        if now_ms >= self.challenge_expires_at_ms || is_of_the_future(self.attester.created_at_ms, now_ms) {
            return Err(SessionError::ChallengeExpired);
        }
        if !self.proof.matches(proof) {
            return Err(SessionError::WrongProof);
        }
        Ok(Enrolled { attester: self.attester, proof: self.proof, nonce })
    }
}

impl Enrolled {
    /// The agent activates again (it lost the answer, or was slow): `nonce` takes the place of the one before.
    ///
    /// # Errors
    /// Wrong proof, or the session expired.
    pub fn renew(self, proof: &Proof, nonce: IssuedNonce, now_ms: i64) -> Result<Self, SessionError> {
        Session::Enrolled(self.clone()).authenticate(proof, now_ms)?;
        Ok(Self { nonce, ..self })
    }

    /// The nonce that evidence must carry now.
    ///
    /// # Errors
    /// It expired.
    pub fn nonce(&self, now_ms: i64) -> Result<&Nonce, SessionError> {
        if now_ms >= self.nonce.expires_at_ms || is_of_the_future(self.nonce.issued_at_ms, now_ms) {
            return Err(SessionError::NonceExpired);
        }
        Ok(&self.nonce.nonce)
    }
}

/// Whether this verifier's clock has gone back since: what then has an hour to live would live for that hour and a
/// while. Verifiers of one database may differ by a little.
fn is_of_the_future(at_ms: i64, now_ms: i64) -> bool {
    at_ms.saturating_sub(now_ms) > CLOCK_SKEW_MS
}

const CLOCK_SKEW_MS: i64 = 60_000;

/// The secret inside a credential: once opened, the session's bearer token.
pub struct Proof(Zeroizing<[u8; 32]>);

impl Proof {
    /// A new random secret.
    #[must_use]
    pub fn random() -> Self {
        Self(Zeroizing::new(secret_file::random()))
    }

    /// The secret, for the credential and nothing else.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// What is kept of it.
    #[must_use]
    pub fn digest(&self) -> ProofDigest {
        let mut octets = [0; 32];
        octets.copy_from_slice(digest(&SHA256, self.0.as_slice()).as_ref());
        ProofDigest(octets)
    }
}

impl FromStr for Proof {
    type Err = SessionError;
    fn from_str(value: &str) -> Result<Self, Self::Err> {
        let mut octets = Zeroizing::new([0; 32]);
        hex::decode_to_slice(value, octets.as_mut_slice()).map_err(|_| SessionError::WrongProof)?;
        Ok(Self(octets))
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proof(<redacted>)")
    }
}

/// SHA-256 of a [`Proof`]: what the store has, so that a stolen database opens no session.
#[derive(Debug, Clone, Copy)]
pub struct ProofDigest([u8; 32]);

impl ProofDigest {
    /// Whether `proof` is the secret, in constant time.
    #[must_use]
    pub fn matches(&self, proof: &Proof) -> bool {
        self.0.ct_eq(&proof.digest().0).into()
    }

    /// For the store.
    #[must_use]
    pub fn to_hex(self) -> String {
        hex::encode(self.0)
    }

    /// From the store; none if it is not 64 hexadecimal digits.
    #[must_use]
    pub fn from_hex(value: &str) -> Option<Self> {
        let mut octets = [0; 32];
        hex::decode_to_slice(value, &mut octets).ok().map(|()| Self(octets))
    }
}

/// 32 random octets that one quote must carry as its `extraData`. Not secret, but never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce([u8; 32]);

impl Nonce {
    /// A new one.
    #[must_use]
    pub fn random() -> Self {
        Self(secret_file::random())
    }

    /// The octets.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// From the store; none if it is not 64 hexadecimal digits.
    #[must_use]
    pub fn from_hex(value: &str) -> Option<Self> {
        let mut octets = [0; 32];
        hex::decode_to_slice(value, &mut octets).ok().map(|()| Self(octets))
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// A nonce that is out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IssuedNonce {
    /// The nonce.
    pub nonce: Nonce,
    /// When it was given out.
    pub issued_at_ms: i64,
    /// When it stops being good.
    pub expires_at_ms: i64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use assay_wire::id::{BootId, LeaseId};
    use proptest::prelude::*;

    fn challenged(proof: &Proof) -> Challenged {
        let airlock = AirlockContext {
            lease: LeaseId::random(),
            project: "alpha".parse().unwrap(),
            boot: BootId::random(),
            machine_resets: None,
        };
        Challenged {
            attester: Attester {
                session: SessionId::random(),
                node: "n1".parse().unwrap(),
                ek_public: vec![1],
                ak_public: vec![2],
                airlock,
                created_at_ms: 0,
                expires_at_ms: 1_000_000,
            },
            proof: proof.digest(),
            challenge_expires_at_ms: 60_000,
        }
    }

    fn nonce(expires_at_ms: i64) -> IssuedNonce {
        IssuedNonce { nonce: Nonce::random(), issued_at_ms: 0, expires_at_ms }
    }

    #[test]
    fn a1_d10_the_right_proof_in_time_gets_a_nonce_until_it_expires() {
        let proof = Proof::random();
        let issued = nonce(120_000);
        let enrolled = challenged(&proof).activate(&proof, issued, 59_999).unwrap();
        assert_eq!(enrolled.nonce(119_999), Ok(&issued.nonce));
        assert_eq!(enrolled.nonce(120_000), Err(SessionError::NonceExpired));
        let renewed = enrolled.renew(&proof, nonce(240_000), 130_000).unwrap();
        assert_ne!(renewed.nonce(130_000), Ok(&issued.nonce));
    }

    #[test]
    fn d10_what_was_given_out_in_the_future_is_worth_nothing() {
        let proof = Proof::random();
        let enrolled = challenged(&proof).activate(&proof, nonce(120_000), -60_000).unwrap();
        assert!(enrolled.nonce(-60_000).is_ok(), "verifiers of one database may differ by a minute");
        assert_eq!(enrolled.nonce(-60_001), Err(SessionError::NonceExpired));
        let early = challenged(&proof).activate(&proof, nonce(120_000), -60_001);
        assert_eq!(early.unwrap_err(), SessionError::ChallengeExpired);
    }

    #[test]
    fn a8_a_wrong_or_late_proof_enrols_nobody() {
        let (proof, other) = (Proof::random(), Proof::random());
        assert_eq!(challenged(&proof).activate(&other, nonce(1), 0).unwrap_err(), SessionError::WrongProof);
        assert_eq!(challenged(&proof).activate(&proof, nonce(1), 60_000).unwrap_err(), SessionError::ChallengeExpired);
        let unopened = Session::Challenged(challenged(&proof));
        assert_eq!(unopened.authenticate(&proof, 0), Err(SessionError::NotActivated));
    }

    #[test]
    fn d6_one_sessions_proof_opens_no_other_session() {
        let (a, b) = (Proof::random(), Proof::random());
        let session = Session::Enrolled(challenged(&b).activate(&b, nonce(120_000), 0).unwrap());
        assert_eq!(session.authenticate(&a, 0), Err(SessionError::WrongProof));
        assert_eq!(session.authenticate(&b, 0), Ok(()));
        assert_eq!(session.authenticate(&b, 1_000_000), Err(SessionError::SessionExpired));
    }

    #[test]
    fn secrets_are_not_printed() {
        let proof = Proof::random();
        assert!(!format!("{proof:?}").contains(&hex::encode(proof.expose())));
    }

    proptest! {
        #[test]
        fn only_64_hexadecimal_digits_are_a_proof(text in ".{0,80}") {
            let good = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
            prop_assert_eq!(text.parse::<Proof>().is_ok(), good);
            prop_assert_eq!(Nonce::from_hex(&text).is_some(), good);
        }
    }
}
