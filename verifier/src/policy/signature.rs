//! Signatures on policies and Reference Values: an operator's Ed25519 key over a digest of the canonical form, kept
//! beside the document. Where a verifier is told whose signatures count, nothing else judges, whatever its database says.

use super::{ArtefactReference, Policy};
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An operator's public key: 64 hexadecimal digits.
#[serde_with::serde_as]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct PolicyKey(#[serde_as(as = "serde_with::hex::Hex")] [u8; 32]);

impl PolicyKey {
    /// From the key's 32 octets.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyKey({self})")
    }
}

impl FromStr for PolicyKey {
    type Err = SignatureError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut key = [0; 32];
        hex::decode_to_slice(text.trim(), &mut key).map_err(|_| SignatureError::Key)?;
        Ok(Self(key))
    }
}

/// A signature that stands beside what it is on.
#[serde_with::serde_as]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetachedSignature {
    /// Whose it is.
    pub key: PolicyKey,
    /// Ed25519, 128 hexadecimal digits.
    #[serde_as(as = "serde_with::hex::Hex")]
    #[schema(value_type = String)]
    pub signature: [u8; 64],
}

impl DetachedSignature {
    /// Reads a signature file.
    ///
    /// # Errors
    /// It is none.
    pub fn from_json(text: &str) -> Result<Self, SignatureError> {
        if text.len() > MAX_SIGNATURE_BYTES {
            return Err(SignatureError::Malformed(None));
        }
        serde_json::from_str(text).map_err(|cause| SignatureError::Malformed(Some(cause)))
    }

    /// The signature file.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // plain data with text keys always serialises
    }
}

/// Why a document counts for nothing.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// Not a key.
    #[error("a policy key is 64 hexadecimal digits")]
    Key,
    /// Not a signature file.
    #[error("reading a detached signature")]
    Malformed(#[source] Option<serde_json::Error>),
    /// Nobody signed.
    #[error("{what} is not signed, and only what one of {keys} policy keys has signed counts here")]
    Unsigned {
        /// What should be.
        what: String,
        /// How many keys there are.
        keys: usize,
    },
    /// Somebody else signed.
    #[error("{what} is signed by {key}, which is not one of the policy keys")]
    Stranger {
        /// What was signed.
        what: String,
        /// By whom.
        key: PolicyKey,
    },
    /// The document or the signature was changed.
    #[error("the signature of {key} is not over {what}")]
    Wrong {
        /// What it should be over.
        what: String,
        /// Whose it claims to be.
        key: PolicyKey,
    },
}

/// Whose signatures count.
#[derive(Debug, Clone, Default)]
pub struct PolicyKeys(Vec<PolicyKey>);

impl PolicyKeys {
    /// These keys; with none, documents need no signature.
    #[must_use]
    pub fn new(keys: Vec<PolicyKey>) -> Self {
        Self(keys)
    }

    /// Whether documents need no signature.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Who signed `policy`. A signature that is there must hold, even if none is needed.
    ///
    /// # Errors
    /// See [`SignatureError`].
    pub fn check_policy(
        &self,
        policy: &Policy,
        signature: Option<&DetachedSignature>,
    ) -> Result<Option<PolicyKey>, SignatureError> {
        self.check(&Signable::from(policy), signature)
    }

    /// Who signed Reference Values.
    ///
    /// # Errors
    /// See [`SignatureError`].
    pub fn check_artefacts(
        &self,
        artefacts: &ArtefactReference,
        signature: Option<&DetachedSignature>,
    ) -> Result<Option<PolicyKey>, SignatureError> {
        self.check(&Signable::from(artefacts), signature)
    }

    fn check(
        &self,
        signable: &Signable,
        signature: Option<&DetachedSignature>,
    ) -> Result<Option<PolicyKey>, SignatureError> {
        match signature {
            None => self.check_unsigned(&signable.what).map(|()| None),
            Some(DetachedSignature { key, signature }) => {
                self.check_bytes(&signable.what, *key, &signable.message, signature).map(|()| Some(*key))
            }
        }
    }

    /// What nobody signed counts only where no signature is needed.
    pub(super) fn check_unsigned(&self, what: &str) -> Result<(), SignatureError> {
        let keys = self.0.len();
        if keys == 0 { Ok(()) } else { Err(SignatureError::Unsigned { what: what.to_owned(), keys }) }
    }

    /// One of these keys, or any where no signature is needed, has signed `message`.
    pub(super) fn check_bytes(
        &self,
        what: &str,
        key: PolicyKey,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), SignatureError> {
        if !self.is_empty() && !self.0.contains(&key) {
            return Err(SignatureError::Stranger { what: what.to_owned(), key });
        }
        let public = UnparsedPublicKey::new(&ED25519, key.0);
        public.verify(message, signature).map_err(|_| SignatureError::Wrong { what: what.to_owned(), key })
    }
}

/// An operator's key that signs policies and Reference Values.
pub struct PolicySigner(Ed25519KeyPair);

impl PolicySigner {
    /// A new key, as PKCS#8: what a key file holds.
    ///
    /// # Errors
    /// The system gives no random numbers.
    pub fn generate() -> Result<Vec<u8>, SignatureError> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| SignatureError::Key)?;
        Ok(pkcs8.as_ref().to_vec())
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// It holds no Ed25519 key in PKCS#8.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, SignatureError> {
        Ed25519KeyPair::from_pkcs8(pkcs8).map(Self).map_err(|_| SignatureError::Key)
    }

    /// What `policy_keys` of a verifier must hold.
    #[must_use]
    pub fn public(&self) -> PolicyKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.0.public_key().as_ref());
        PolicyKey(key)
    }

    /// Signs a policy.
    #[must_use]
    pub fn sign_policy(&self, policy: &Policy) -> DetachedSignature {
        self.sign(&Signable::from(policy))
    }

    /// Signs Reference Values.
    #[must_use]
    pub fn sign_artefacts(&self, artefacts: &ArtefactReference) -> DetachedSignature {
        self.sign(&Signable::from(artefacts))
    }

    fn sign(&self, signable: &Signable) -> DetachedSignature {
        DetachedSignature { key: self.public(), signature: self.sign_bytes(&signable.message) }
    }

    /// For formats with a frame of their own around what is signed.
    pub(super) fn sign_bytes(&self, message: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.0.sign(message).as_ref());
        signature
    }
}

impl fmt::Debug for PolicySigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PolicySigner").field(&self.public()).finish()
    }
}

/// What is signed: a word for what the document is, so that one is never taken for the other, and its digest.
struct Signable {
    what: String,
    message: Vec<u8>,
}

impl From<&Policy> for Signable {
    fn from(policy: &Policy) -> Self {
        let digest = policy.digest();
        Self { what: format!("policy `{}` ({digest})", policy.name()), message: message(POLICY, digest.as_bytes()) }
    }
}

impl From<&ArtefactReference> for Signable {
    fn from(artefacts: &ArtefactReference) -> Self {
        let message = message(REFERENCE_VALUES, &artefacts.digest());
        Self { what: format!("the Reference Values of `{}`", artefacts.name), message }
    }
}

fn message(context: &[u8], digest: &[u8; 32]) -> Vec<u8> {
    [context, digest].concat()
}

const POLICY: &[u8] = b"assay policy v1\0";
const REFERENCE_VALUES: &[u8] = b"assay reference values v1\0";
const MAX_SIGNATURE_BYTES: usize = 1024;
