//! What the ramdisk hands over to the agent in the tenant's system: a file in the initrd that ends up in `/run`, mode
//! 0600. It holds the AK, which no other TPM can use, and the proofs of the sessions, which are secrets.

use crate::pin::{InvalidPin, KeyPin};
use crate::tpm::SavedAk;
use assay_wire::agreement::MAX_SUPPORTING;
use assay_wire::id::{AdmissionId, NodeId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::{SocketAddr, SocketAddrV4};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use zeroize::{Zeroize as _, Zeroizing};

/// Everything that it takes to go on attesting.
#[derive(Clone, PartialEq, Eq)]
pub struct AttestationState {
    /// Who this is.
    pub node: NodeId,
    /// What is renewed.
    pub admission: AdmissionId,
    /// The gateway's relay: the only way to the verifier from here.
    pub relay: SocketAddrV4,
    /// The verifier's key.
    pub pin: KeyPin,
    /// The proof of the session that led to the admission: the bearer token of every call.
    pub proof: Zeroizing<String>,
    /// The AK that was admitted.
    pub ak: SavedAk,
    /// The verifiers of the project's own that affirmed this boot, and go on being asked.
    pub co_verifiers: Vec<CoAttestation>,
}

/// A verifier that vouches beside the one that leads. It stands on no relay, so it is called where it is.
#[derive(Clone, PartialEq, Eq)]
pub struct CoAttestation {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its key.
    pub pin: KeyPin,
    /// What it knows the admission by: the id of its own first result.
    pub admission: AdmissionId,
    /// The proof of the session with it: the bearer token of every call.
    pub proof: Zeroizing<String>,
}

impl AttestationState {
    /// Reads a state that was handed over.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn read(path: &Path) -> Result<Self, StateError> {
        let failed = |source| StateError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(StateError::Exposed { path: path.to_owned(), mode });
        }
        let mut json = Zeroizing::new(Vec::with_capacity(MAX_STATE_BYTES + 1));
        file.take(MAX_STATE_BYTES as u64 + 1).read_to_end(&mut json).map_err(failed)?;
        Self::parse(&json).map_err(|problem| StateError::Content { path: path.to_owned(), problem })
    }

    /// Parses the file's content.
    ///
    /// # Errors
    /// See [`StateProblem`].
    pub fn parse(json: &[u8]) -> Result<Self, StateProblem> {
        if json.len() > MAX_STATE_BYTES {
            return Err(StateProblem::TooLong);
        }
        // The parser's own words might quote the proof, so they are not kept.
        let mut file: StateFile = serde_json::from_slice(json).map_err(|_| StateProblem::Json)?;
        let proof = checked_proof(&mut file.proof)?;
        let key = |text: &str| hex::decode(text).map_err(|_| StateProblem::Ak);
        let ak = SavedAk { public: key(&file.ak_public)?, private: key(&file.ak_private)? };
        let pin = file.verifier_key_sha256.parse()?;
        if file.co_verifiers.len() > MAX_SUPPORTING {
            return Err(StateProblem::CoVerifiers);
        }
        let co_verifiers = file.co_verifiers.iter_mut().map(CoFile::checked).collect::<Result<_, _>>()?;
        Ok(Self { node: file.node.clone(), admission: file.admission, relay: file.relay, pin, proof, ak, co_verifiers })
    }

    /// The file's content.
    ///
    /// # Errors
    /// Never in practice: every part can be written as JSON.
    pub fn to_json(&self) -> Result<Zeroizing<Vec<u8>>, serde_json::Error> {
        let file = StateFile {
            node: self.node.clone(),
            admission: self.admission,
            relay: self.relay,
            verifier_key_sha256: self.pin.to_string(),
            proof: self.proof.to_string(),
            ak_public: hex::encode(&self.ak.public),
            ak_private: hex::encode(&self.ak.private),
            co_verifiers: self.co_verifiers.iter().map(CoFile::of).collect(),
        };
        // Room for all of it: growing would leave the proof behind in freed memory.
        let mut json = Zeroizing::new(Vec::with_capacity(MAX_STATE_BYTES));
        serde_json::to_writer(&mut *json, &file)?;
        Ok(json)
    }

    /// A state for tests, with [`EXAMPLE_PROOF`].
    #[cfg(test)]
    pub(crate) fn example() -> Self {
        Self {
            node: "n1".parse().unwrap(),
            admission: "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap(),
            relay: "10.20.0.1:8443".parse().unwrap(),
            pin: "ab".repeat(32).parse().unwrap(),
            proof: Zeroizing::new(EXAMPLE_PROOF.to_owned()),
            ak: SavedAk { public: vec![1; 90], private: vec![2; 120] },
            co_verifiers: vec![CoAttestation {
                address: "[fd00::2]:8443".parse().unwrap(),
                pin: "cd".repeat(32).parse().unwrap(),
                admission: "01890a5d-ac96-774b-bcce-b302099a8058".parse().unwrap(),
                proof: Zeroizing::new(EXAMPLE_PROOF.to_owned()),
            }],
        }
    }
}

impl fmt::Debug for AttestationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttestationState")
            .field("node", &self.node)
            .field("admission", &self.admission)
            .field("relay", &self.relay)
            .field("pin", &self.pin)
            .field("proof", &"<redacted>")
            .field("co_verifiers", &self.co_verifiers)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for CoAttestation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoAttestation")
            .field("address", &self.address)
            .field("pin", &self.pin)
            .field("admission", &self.admission)
            .field("proof", &"<redacted>")
            .finish()
    }
}

/// Why a state is of no use.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read.
    #[error("reading the attestation's state {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Others than its owner can read it.
    #[error("reading the attestation's state {}: its mode is {mode:o}, so its secret is out; it must be 600", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Its content is not a state.
    #[error("reading the attestation's state {}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        problem: StateProblem,
    },
}

/// What is wrong with a state's content; never the content itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateProblem {
    /// Too long.
    #[error("it has more than {MAX_STATE_BYTES} octets")]
    TooLong,
    /// Not the JSON that it must be.
    #[error("it is not the JSON that a ramdisk hands over")]
    Json,
    /// The proof is malformed.
    #[error("its proof is not hexadecimal")]
    Proof,
    /// The key is malformed.
    #[error("its attestation key is not hexadecimal")]
    Ak,
    /// The pin is malformed.
    #[error("its verifier_key_sha256")]
    Pin(#[from] InvalidPin),
    /// More verifiers than any node is appraised by.
    #[error("it names more than {MAX_SUPPORTING} verifiers beside the one that leads")]
    CoVerifiers,
}

/// The file, as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    node: NodeId,
    admission: AdmissionId,
    relay: SocketAddrV4,
    verifier_key_sha256: String,
    proof: String,
    ak_public: String,
    ak_private: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    co_verifiers: Vec<CoFile>,
}

/// One of the others, as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CoFile {
    address: SocketAddr,
    key_sha256: String,
    admission: AdmissionId,
    proof: String,
}

impl CoFile {
    fn of(of: &CoAttestation) -> Self {
        let CoAttestation { address, pin, admission, proof } = of;
        Self { address: *address, key_sha256: pin.to_string(), admission: *admission, proof: proof.to_string() }
    }

    fn checked(&mut self) -> Result<CoAttestation, StateProblem> {
        let (address, admission, pin) = (self.address, self.admission, self.key_sha256.parse()?);
        Ok(CoAttestation { address, pin, admission, proof: checked_proof(&mut self.proof)? })
    }
}

/// Takes the proof out of what was read.
fn checked_proof(read: &mut String) -> Result<Zeroizing<String>, StateProblem> {
    let proof = Zeroizing::new(std::mem::take(read));
    let good = (1..=MAX_PROOF_CHARS).contains(&proof.len()) && proof.bytes().all(|b| b.is_ascii_hexdigit());
    if good { Ok(proof) } else { Err(StateProblem::Proof) }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        self.proof.zeroize();
    }
}

impl Drop for CoFile {
    fn drop(&mut self) {
        self.proof.zeroize();
    }
}

const MAX_STATE_BYTES: usize = 16 * 1024;
const MAX_PROOF_CHARS: usize = 256;
#[cfg(test)]
pub(crate) const EXAMPLE_PROOF: &str = "5a5a5a5a";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    #[test]
    fn what_is_written_is_read() {
        let state = AttestationState::example();
        assert_eq!(AttestationState::parse(&state.to_json().unwrap()).unwrap(), state);
    }

    #[test]
    fn a_state_without_others_is_as_it_was_and_one_with_too_many_is_refused() {
        let alone = AttestationState { co_verifiers: Vec::new(), ..AttestationState::example() };
        let json = alone.to_json().unwrap();
        assert!(!String::from_utf8_lossy(&json).contains("co_verifiers"));
        assert_eq!(AttestationState::parse(&json).unwrap(), alone);
        let one = AttestationState::example().co_verifiers;
        let with = |count| AttestationState {
            co_verifiers: one.iter().cloned().cycle().take(count).collect(),
            ..AttestationState::example()
        };
        assert_eq!(AttestationState::parse(&with(MAX_SUPPORTING).to_json().unwrap()).unwrap(), with(MAX_SUPPORTING));
        let refused = AttestationState::parse(&with(MAX_SUPPORTING + 1).to_json().unwrap());
        assert_eq!(refused.unwrap_err(), StateProblem::CoVerifiers);
    }

    #[test]
    fn a_state_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("attestation.json");
        fs::write(&path, &*AttestationState::example().to_json().unwrap()).unwrap();
        for (mode, good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(AttestationState::read(&path).is_ok(), good, "{mode:o}");
        }
    }

    #[test]
    fn nothing_shows_the_proof() {
        let state = AttestationState::example();
        assert!(!format!("{state:?}").contains(EXAMPLE_PROOF));
        let json = String::from_utf8(state.to_json().unwrap().to_vec()).unwrap();
        for (from, to) in [("\"n1\"", "\"N 1\""), (EXAMPLE_PROOF, "5a5a5a5aXY"), ("\"proof\"", "\"proofs\"")] {
            let problem = AttestationState::parse(json.replace(from, to).as_bytes()).unwrap_err();
            assert!(!problem.to_string().contains(EXAMPLE_PROOF), "{problem}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = AttestationState::parse(&bytes);
        }

        #[test]
        fn any_key_comes_back(
            public in proptest::collection::vec(any::<u8>(), 0..600),
            private in proptest::collection::vec(any::<u8>(), 0..600),
            proof in "[0-9a-f]{1,128}",
            others in 0..=MAX_SUPPORTING,
        ) {
            let ak = SavedAk { public, private };
            let mut state = AttestationState { proof: Zeroizing::new(proof.clone()), ak, ..AttestationState::example() };
            state.co_verifiers[0].proof = Zeroizing::new(proof);
            state.co_verifiers = state.co_verifiers.iter().cloned().cycle().take(others).collect();
            prop_assert_eq!(AttestationState::parse(&state.to_json().unwrap()).unwrap(), state);
        }
    }
}
