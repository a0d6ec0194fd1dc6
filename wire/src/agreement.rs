//! Agreement: whose attestation results a relying party needs before it admits a node, and before an admission stands
//! longer. Isolation and imaging decide it with the same two functions, so that neither opens what the other would not.
//!
//! The first result *leads*: its id becomes the admission's. Others *support* it. Each is verified by itself, all must
//! be about the same [`Subject`], and what they agree on lasts as long as the one that expires first.
//!
//! ```text
//!   require                  who must have signed
//!   any                      the leading result: one of the project's verifiers
//!   provider                 one of the site's own verifiers
//!   project                  one of the project's verifiers that is not also the site's
//!   provider-and-project     both of the above
//! ```

mod batch;

pub use batch::{Batch, Decided};

use crate::id::{AdmissionId, BootId, LeaseId, NodeId, ProjectId};
use crate::result::{Claims, ResultError, SignedResult, VerifiedResult, VerifierKey};
use serde::{Deserialize, Serialize};
use std::fmt;

/// More verifiers than any node is appraised by.
pub const MAX_SUPPORTING: usize = 8;

/// No verifier passes on a longer result of another: several times what one of ours has. What it does not believe must
/// not fill its memory, nor the requests that carry other nodes' results, too.
pub const MAX_SUPPORTING_BYTES: usize = 16 * 1024;

/// Whether `text` may be a result: short enough, and of a compact JWS's characters, which JSON leaves as they are. What
/// is passed on unread is this much.
#[must_use]
pub fn may_be_result(text: &str) -> bool {
    let jws = |octet: u8| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_' | b'.');
    (1..=MAX_SUPPORTING_BYTES).contains(&text.len()) && text.bytes().all(jws)
}

/// Whose results are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Require {
    /// Any verifier that the project trusts.
    #[default]
    Any,
    /// A verifier of the site.
    Provider,
    /// A verifier of the project's own.
    Project,
    /// One of each.
    ProviderAndProject,
}

/// The site's policy: which verifiers must agree. Without a word of configuration, any that the project trusts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "File")]
pub struct Agreement {
    require: Require,
    provider_keys: Vec<VerifierKey>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    require: Require,
    #[serde(default)]
    provider_keys: Vec<String>,
}

impl TryFrom<File> for Agreement {
    type Error = InvalidAgreement;

    fn try_from(file: File) -> Result<Self, InvalidAgreement> {
        let keys = file.provider_keys.iter().map(|key| key.parse().map_err(|_| InvalidAgreement::Key(key.clone())));
        let provider_keys: Vec<VerifierKey> = keys.collect::<Result<_, _>>()?;
        let needs_provider = match file.require {
            Require::Provider | Require::ProviderAndProject => true,
            Require::Any | Require::Project => false,
        };
        if needs_provider && provider_keys.is_empty() {
            return Err(InvalidAgreement::NoProvider);
        }
        Ok(Self { require: file.require, provider_keys })
    }
}

/// Why an `[agreement]` table is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAgreement {
    /// Not a key.
    #[error("agreement.provider_keys: `{0}` is not 32 octets of hexadecimal")]
    Key(String),
    /// Nobody could ever agree.
    #[error("agreement.provider_keys: must name a key, because `require` asks for the provider's verifier")]
    NoProvider,
}

/// Results as they were presented: not checked yet.
#[derive(Debug, Clone)]
pub struct Presented {
    /// The result whose id names the admission.
    pub lead: SignedResult,
    /// Those of other verifiers.
    pub supporting: Vec<SignedResult>,
}

impl Presented {
    /// Takes results off the wire.
    #[must_use]
    pub fn from_wire(result: String, supporting: Vec<String>) -> Self {
        let supporting = supporting.into_iter().map(SignedResult::from_wire).collect();
        Self { lead: SignedResult::from_wire(result), supporting }
    }
}

/// What results are about, and must go on being about for as long as the admission stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// The node.
    pub node: NodeId,
    /// The project that holds the lease.
    pub project: ProjectId,
    /// The lease.
    pub lease: LeaseId,
    /// The boot through the airlock.
    pub boot: BootId,
    /// SHA-256 of the EK's `TPMT_PUBLIC`, hexadecimal.
    pub ek_sha256: String,
    /// The AK's TPM name, hexadecimal.
    pub ak_name: String,
    /// TPM reset count.
    pub reset_count: u32,
    /// TPM restart count.
    pub restart_count: u32,
}

impl Subject {
    /// What `claims` are about.
    #[must_use]
    pub fn of(claims: &Claims) -> Self {
        Self {
            node: claims.node.clone(),
            project: claims.project.clone(),
            lease: claims.lease,
            boot: claims.boot,
            ek_sha256: claims.ek_sha256.clone(),
            ak_name: claims.ak_name.clone(),
            reset_count: claims.reset_count,
            restart_count: claims.restart_count,
        }
    }

    /// That they are for this lease of this project: what was read from the result before it was verified, to find out by
    /// which keys.
    ///
    /// # Errors
    /// They are for another.
    pub fn is_for(&self, project: &ProjectId, lease: LeaseId) -> Result<(), Disagreement> {
        same("project", project, &self.project)?;
        same("lease", &lease, &self.lease)
    }

    /// That `other` is about the same in every respect.
    ///
    /// # Errors
    /// The first respect in which it is not.
    pub fn same_as(&self, other: &Self) -> Result<(), Disagreement> {
        same("node", &self.node, &other.node)?;
        same("project", &self.project, &other.project)?;
        same("lease", &self.lease, &other.lease)?;
        same("boot", &self.boot, &other.boot)?;
        same("EK", &self.ek_sha256, &other.ek_sha256)?;
        same("AK", &self.ak_name, &other.ak_name)?;
        same("TPM reset count", &self.reset_count, &other.reset_count)?;
        same("TPM restart count", &self.restart_count, &other.restart_count)
    }
}

fn same<T: PartialEq + fmt::Display>(what: &'static str, expected: &T, said: &T) -> Result<(), Disagreement> {
    if said == expected {
        return Ok(());
    }
    Err(Disagreement::Other { what, said: said.to_string(), expected: expected.to_string() })
}

/// Results that were verified and agree. Made by [`Agreement::admits`] only.
#[derive(Debug, Clone)]
pub struct Agreed {
    lead: VerifiedResult,
    supporting: Vec<AdmissionId>,
    expires_at_seconds: i64,
}

impl Agreed {
    /// What the leading verifier says.
    #[must_use]
    pub fn claims(&self) -> &Claims {
        self.lead.claims()
    }

    /// The admission's id.
    #[must_use]
    pub fn id(&self) -> AdmissionId {
        self.claims().jti
    }

    /// What all of them are about.
    #[must_use]
    pub fn subject(&self) -> Subject {
        Subject::of(self.claims())
    }

    /// Ids of the supporting results. They are used up with the leading one.
    #[must_use]
    pub fn supporting(&self) -> &[AdmissionId] {
        &self.supporting
    }

    /// When the first of them expires, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn expires_at_ms(&self) -> i64 {
        self.expires_at_seconds.saturating_mul(1000)
    }
}

/// An admission on record, as far as its renewal depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Its id.
    pub admission: AdmissionId,
    /// What the results that made it were about.
    pub subject: Subject,
    /// Ids of the results that supported it: their verifiers know it by them.
    pub supporting: Vec<AdmissionId>,
    /// Until then, in milliseconds since the Unix epoch.
    pub expires_at_ms: i64,
}

/// Why results do not admit, or do not renew.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Disagreement {
    /// The leading result itself is not accepted.
    #[error("the attestation result is not accepted")]
    Lead(#[source] ResultError),
    /// A supporting one is not.
    #[error("supporting attestation result {number} is not accepted")]
    Supporting {
        /// Which, from 1.
        number: usize,
        /// Why.
        #[source]
        cause: ResultError,
    },
    /// More than anybody needs.
    #[error("{count} supporting attestation results are more than {MAX_SUPPORTING}")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// Two of them, or one and the record, are about different things.
    #[error("the attestation result is for {what} {said}, not {expected}")]
    Other {
        /// In which respect.
        what: &'static str,
        /// What it says.
        said: String,
        /// What the leading result, or the record, says.
        expected: String,
    },
    /// Somebody who must agree has not.
    #[error("the site requires an attestation result of {0}, and there is none")]
    Missing(&'static str),
    /// A renewal where an admission is asked for.
    #[error("the attestation result renews admission {0}: it admits nobody")]
    Renews(AdmissionId),
    /// An admission, or another one's renewal, where a renewal is asked for.
    #[error("the attestation result does not renew admission {0}")]
    RenewsNot(AdmissionId),
    /// It expired, or was ended, or never was: a renewal brings nothing back.
    #[error("admission {0} does not stand: the node must be appraised again")]
    Ended(AdmissionId),
}

impl Agreement {
    /// A policy.
    #[must_use]
    pub fn new(require: Require, provider_keys: Vec<VerifierKey>) -> Self {
        Self { require, provider_keys }
    }

    /// Whether `presented` admit a node of a project that trusts `project_keys`.
    ///
    /// # Errors
    /// See [`Disagreement`]. No trusted key means that nobody is admitted.
    pub fn admits(
        &self,
        presented: &Presented,
        project_keys: &[VerifierKey],
        now_seconds: i64,
    ) -> Result<Agreed, Disagreement> {
        let (agreed, all) = self.agreed(presented, project_keys, now_seconds)?;
        match all.iter().find_map(|result| result.claims().renews) {
            Some(renewed) => Err(Disagreement::Renews(renewed)),
            None => Ok(agreed),
        }
    }

    /// Until when `standing` stands if `presented` renew it: never shorter than it does already, and never more than
    /// `longest_ms` from now. In milliseconds since the Unix epoch.
    ///
    /// # Errors
    /// See [`Disagreement`].
    pub fn renews(
        &self,
        presented: &Presented,
        project_keys: &[VerifierKey],
        standing: &Standing,
        longest_ms: i64,
        now_ms: i64,
    ) -> Result<i64, Disagreement> {
        if standing.expires_at_ms <= now_ms {
            return Err(Disagreement::Ended(standing.admission));
        }
        let (agreed, all) = self.agreed(presented, project_keys, now_ms.div_euclid(1000))?;
        let named = |result: &VerifiedResult| {
            // A supporting verifier knows the admission by its own result's id; the leading one by the admission's.
            let leads = result.claims().jti == agreed.id();
            result.claims().renews.is_some_and(|renewed| {
                renewed == standing.admission || (!leads && standing.supporting.contains(&renewed))
            })
        };
        if !all.iter().all(named) {
            return Err(Disagreement::RenewsNot(standing.admission));
        }
        standing.subject.same_as(&agreed.subject())?;
        let wanted = agreed.expires_at_ms().min(now_ms.saturating_add(longest_ms));
        Ok(wanted.max(standing.expires_at_ms))
    }

    fn agreed(
        &self,
        presented: &Presented,
        project_keys: &[VerifierKey],
        now_seconds: i64,
    ) -> Result<(Agreed, Vec<VerifiedResult>), Disagreement> {
        let Presented { lead, supporting } = presented;
        if supporting.len() > MAX_SUPPORTING {
            return Err(Disagreement::TooMany { count: supporting.len() });
        }
        // Where the project's word is what counts, the site's keys vouch for supporting results only.
        let both: Vec<VerifierKey> = self.provider_keys.iter().chain(project_keys).copied().collect();
        let may_lead = if self.require == Require::Any { project_keys } else { &both };
        let lead = lead.verify(may_lead, now_seconds).map_err(Disagreement::Lead)?;
        let mut all = vec![lead.clone()];
        for (number, result) in (1..).zip(supporting) {
            let verified = result.verify(&both, now_seconds);
            all.push(verified.map_err(|cause| Disagreement::Supporting { number, cause })?);
        }
        let subject = Subject::of(lead.claims());
        for result in &all {
            subject.same_as(&Subject::of(result.claims()))?;
            // The bytes to seal to, not only their digest.
            same("EK", &lead.claims().ek_public, &result.claims().ek_public)?;
        }
        self.satisfied(&all)?;
        let expires_at_seconds = all.iter().map(|result| result.claims().exp).min().unwrap_or(now_seconds);
        let supporting = all.iter().skip(1).map(|result| result.claims().jti).collect();
        Ok((Agreed { lead, supporting, expires_at_seconds }, all))
    }

    fn satisfied(&self, all: &[VerifiedResult]) -> Result<(), Disagreement> {
        let provider = all.iter().any(|result| self.provider_keys.contains(&result.signed_by()));
        // A key that is also the site's does not speak for the project: otherwise one verifier would be two.
        let project = all.iter().any(|result| !self.provider_keys.contains(&result.signed_by()));
        let (needs_provider, needs_project) = match self.require {
            Require::Any => (false, false),
            Require::Provider => (true, false),
            Require::Project => (false, true),
            Require::ProviderAndProject => (true, true),
        };
        if needs_provider && !provider {
            return Err(Disagreement::Missing("the provider's verifier"));
        }
        if needs_project && !project {
            return Err(Disagreement::Missing("a verifier of the project's own"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
