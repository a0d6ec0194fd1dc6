//! What this process remembers of the admissions that it attests: who may push, what was seen last, which nonce is out.
//! All of it but the nonces is in the database, too; what is forgotten is read again, and an agent whose nonce was
//! forgotten asks for a challenge. Bounded, and without a clock of its own.

use super::appraise::{Baseline, Seen};
use crate::session::{IssuedNonce, Nonce, ProofDigest};
use crate::store::archive::EvidenceId;
use crate::store::attestations::Part;
use assay_wire::id::{AdmissionId, NodeId, ProjectId};
use assay_wire::result::{Claims, Submod};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What does not change while an admission stands.
#[derive(Debug, Clone)]
pub struct Attested {
    /// The admission.
    pub admission: AdmissionId,
    /// The node.
    pub node: NodeId,
    /// The project that holds the lease.
    pub project: ProjectId,
    /// The evidence that admitted it.
    pub evidence: EvidenceId,
    /// What the agent's bearer token hashes to: the proof of the session that led here.
    pub proof: ProofDigest,
    /// `TPMT_PUBLIC` of the EK.
    pub ek_public: Vec<u8>,
    /// The result that admitted it.
    pub claims: Claims,
    /// What evidence is compared with.
    pub baseline: Baseline,
    /// Whether this verifier leads.
    pub part: Part,
}

/// What changes with every push.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// How many pushes were recorded: a write from an older view than the database's is refused.
    pub sequence: i64,
    /// What was seen last.
    pub seen: Seen,
    /// Digest of the policy under which the boot evidence was found good last.
    pub policy: String,
    /// That appraisal, for the results.
    pub submod: Submod,
    /// When good evidence came last; none before the first at run time.
    pub last_seen_at_ms: Option<i64>,
    /// Until when the admission stands: milliseconds since the Unix epoch.
    pub expires_at_ms: i64,
}

/// The register of one process.
#[derive(Debug)]
pub struct Register {
    entries: Mutex<HashMap<AdmissionId, Entry>>,
    most: usize,
}

#[derive(Debug)]
struct Entry {
    attested: Arc<Attested>,
    progress: Progress,
    nonce: Option<IssuedNonce>,
    /// Why it ended. Kept, so that an admission which this process has given up is never taken up again from an older
    /// record.
    ended: Option<Vec<String>>,
    touched_at_ms: i64,
}

/// An admission as the register has it.
#[derive(Debug, Clone)]
pub struct Known {
    /// Who.
    pub attested: Arc<Attested>,
    /// How far.
    pub progress: Progress,
    /// Why it is over, if it is.
    pub ended: Option<Vec<String>>,
}

impl Register {
    /// An empty one for at most `most` admissions.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { entries: Mutex::default(), most: most.max(1) }
    }

    /// What is known of `admission`.
    #[must_use]
    pub fn get(&self, admission: AdmissionId, now_ms: i64) -> Option<Known> {
        let mut entries = self.entries();
        let entry = entries.get_mut(&admission)?;
        entry.touched_at_ms = now_ms;
        Some(entry.known())
    }

    /// Takes up what the database says. The nonce that is out stays; an admission that has ended stays so.
    pub fn put(&self, attested: Attested, progress: Progress, ended: Option<Vec<String>>, now_ms: i64) -> Known {
        let mut entries = self.entries();
        if !entries.contains_key(&attested.admission) {
            make_room(&mut entries, self.most);
        }
        let before = entries.remove(&attested.admission);
        let (nonce, over) = before.map_or((None, None), |entry| (entry.nonce, entry.ended));
        let admission = attested.admission;
        let entry =
            Entry { attested: Arc::new(attested), progress, nonce, ended: over.or(ended), touched_at_ms: now_ms };
        let known = entry.known();
        entries.insert(admission, entry);
        known
    }

    /// Gives out `nonce`; the one before is worth nothing now. Answers whether the admission is known and not over.
    pub fn issue(&self, admission: AdmissionId, nonce: IssuedNonce) -> bool {
        match self.entries().get_mut(&admission) {
            Some(entry) if entry.ended.is_none() => {
                entry.nonce = Some(nonce);
                true
            }
            Some(_) | None => false,
        }
    }

    /// Takes the nonce that is out: each is for one use.
    #[must_use]
    pub fn take_nonce(&self, admission: AdmissionId, now_ms: i64) -> Option<Nonce> {
        let issued = self.entries().get_mut(&admission)?.nonce.take()?;
        (now_ms < issued.expires_at_ms).then_some(issued.nonce)
    }

    /// Moves an admission on, once that is recorded.
    pub fn advance(&self, admission: AdmissionId, progress: Progress) {
        if let Some(entry) = self.entries().get_mut(&admission)
            && entry.progress.sequence < progress.sequence
        {
            entry.progress = progress;
        }
    }

    /// Ends an admission. Whatever the database does: this process renews it no more.
    pub fn end(&self, admission: AdmissionId, reasons: &[String]) {
        if let Some(entry) = self.entries().get_mut(&admission) {
            entry.nonce = None;
            entry.ended.get_or_insert_with(|| reasons.to_vec());
        }
    }

    /// Does `act` unless the admission is known to be over, and before it can be ended here. Answers whether it did.
    pub fn unless_over(&self, admission: AdmissionId, act: impl FnOnce()) -> bool {
        let entries = self.entries();
        let over = entries.get(&admission).is_some_and(|entry| entry.ended.is_some());
        if !over {
            act();
        }
        !over
    }

    /// Forgets what is known of an admission that is not over: it is read again when it is needed.
    pub fn forget(&self, admission: AdmissionId) {
        let mut entries = self.entries();
        if entries.get(&admission).is_some_and(|entry| entry.ended.is_none()) {
            entries.remove(&admission);
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<AdmissionId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn known(&self) -> Known {
        Known { attested: Arc::clone(&self.attested), progress: self.progress.clone(), ended: self.ended.clone() }
    }
}

/// Lets the sixteenth go that was not heard of for the longest: one scan for many insertions.
fn make_room(entries: &mut HashMap<AdmissionId, Entry>, most: usize) {
    if entries.len() < most {
        return;
    }
    let mut ages: Vec<_> = entries.iter().map(|(id, entry)| (entry.touched_at_ms, *id)).collect();
    ages.sort_unstable();
    for (_, id) in ages.into_iter().take((most / 16).max(1)) {
        entries.remove(&id);
    }
}
