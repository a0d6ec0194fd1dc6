//! Judging entries: is what was measured what the policy allows? Pure; replay has its own file.

use super::policy::{Glob, ImaDigest, ImaPolicy, MeasuredPolicy, Violations};
use super::signature::{self, Key};
use super::state::Facts;
use super::{Entry, FileDigest};
use crate::quote::short_hex;
use openssl::hash::{MessageDigest, hash};

/// Collects what deviates from a policy.
pub(super) struct Judge<'p> {
    policy: &'p ImaPolicy,
    keys: Vec<Key<'p>>,
    problems: Vec<String>,
    more: usize,
    /// Something was measured before the kernel's policy, and it was said.
    late: bool,
}

impl<'p> Judge<'p> {
    pub(super) fn new(policy: &'p ImaPolicy) -> Self {
        // A key that cannot be read signs nothing; `ImaPolicy::problem` refuses such a policy anyway.
        let keys = policy.keys.iter().filter_map(|key| Key::read(key).ok()).collect();
        Self { policy, keys, problems: Vec::new(), more: 0, late: false }
    }

    /// Any entry but the `boot_aggregate`.
    pub(super) fn entry(&mut self, entry: &Entry<'_>, facts: &mut Facts) {
        if entry.is_violation() {
            match self.policy.violations {
                Violations::Allow => {}
                Violations::Refuse => self.deviation(format!(
                    "a file was written while it was measured: a violation, which the list says is of {entry}"
                )),
            }
            return;
        }
        if !entry.is_understood() {
            self.deviation(format!("an entry has the template {}, which is not known", entry.template()));
            return;
        }
        if let Some(measured) = &self.policy.measured_policy
            && self.is_the_policy(measured, entry, facts)
        {
            return;
        }
        let problem = match (entry.buffer(), entry.file_digest()) {
            (Some(buffer), Some(digest)) => self.buffer_problem(entry, buffer, &digest),
            (None, Some(digest)) => self.file_problem(entry, &digest),
            (_, None) => Some(format!("{entry} has no digest")),
        };
        if let Some(problem) = problem {
            self.deviation(problem);
        }
    }

    /// What is asked of the list as a whole, once it explains a quote.
    pub(super) fn whole_list(&mut self, kernel_measured: bool, facts: &Facts) {
        if !kernel_measured {
            self.deviation("PCR 10 holds nothing of the tenant's kernel: IMA is off, or has no TPM".to_owned());
        }
        if let Some(measured) = &self.policy.measured_policy
            && !facts.policy_measured
        {
            self.deviation(format!("the IMA policy `{}` was not loaded", measured.path));
        }
    }

    /// Everything that deviates.
    pub(super) fn problems(self) -> Vec<String> {
        let mut problems = self.problems;
        if self.more > 0 {
            problems.push(format!("and {} more deviations in the measurement list", self.more));
        }
        problems
    }

    /// The warnings if the policy goes no further.
    pub(super) fn verdict(self) -> Result<Vec<String>, Vec<String>> {
        let (mut reasons, mut warnings) = (Vec::new(), Vec::new());
        let policy = self.policy;
        policy.sort(self.problems(), &mut reasons, &mut warnings);
        if reasons.is_empty() { Ok(warnings) } else { Err(reasons) }
    }

    fn deviation(&mut self, problem: String) {
        if self.problems.len() < MOST_PROBLEMS {
            self.problems.push(problem);
        } else {
            self.more += 1;
        }
    }

    /// Whether this entry is the kernel's IMA policy; and if not, whether it may come before it.
    fn is_the_policy(&mut self, measured: &MeasuredPolicy, entry: &Entry<'_>, facts: &mut Facts) -> bool {
        if entry.name() == measured.path.as_bytes() && entry.buffer().is_none() {
            let digest = entry.file_digest().and_then(|digest| ImaDigest::of(&digest));
            let right = digest.is_some_and(|digest| measured.digests.contains(&digest));
            facts.policy_measured |= right;
            return right;
        }
        let may_be_first = facts.policy_measured || matches(&measured.after, entry.name());
        if !may_be_first && !self.late {
            self.late = true;
            self.deviation(format!("{entry} was measured before the IMA policy `{}` was loaded", measured.path));
        }
        false
    }

    fn buffer_problem(&self, entry: &Entry<'_>, buffer: &[u8], digest: &FileDigest<'_>) -> Option<String> {
        if matches(&self.policy.exclude_buffers, entry.name()) {
            return None;
        }
        let computed = MessageDigest::from_name(digest.algorithm).and_then(|algorithm| hash(algorithm, buffer).ok());
        if computed.is_none_or(|computed| *computed != *digest.octets) {
            return Some(format!("buffer {entry} is not what its digest is of"));
        }
        let known = text(entry.name()).and_then(|name| self.policy.buffers.get(name));
        let found = ImaDigest::of(digest);
        match known {
            Some(known) if found.is_some_and(|found| known.contains(&found)) => None,
            Some(_) => Some(format!("buffer {entry} is {}, which the policy does not list", shown(digest))),
            None => Some(format!("buffer {entry} is not in the policy")),
        }
    }

    fn file_problem(&self, entry: &Entry<'_>, digest: &FileDigest<'_>) -> Option<String> {
        let listed = text(entry.name()).and_then(|path| self.policy.files.get(path));
        let right = listed.is_some_and(|known| known.iter().any(|known| known.is(digest)));
        // Nearly every entry of nearly every list.
        if right && self.policy.refuse.is_empty() {
            return None;
        }
        let Some(found) = ImaDigest::of(digest) else {
            return Some(format!("{entry} was measured with {}, which vouches for nothing", digest.algorithm));
        };
        if self.policy.refuse.contains(&found) {
            return Some(format!("{entry} is {}, which the policy refuses", shown(digest)));
        }
        if right || self.policy.digests.contains(&found) {
            return None;
        }
        let signed = match entry.signature() {
            [] => None,
            signature => match signature::verify(&self.keys, entry.name(), digest, signature) {
                Ok(()) => return None,
                Err(problem) => Some(problem),
            },
        };
        // An absolute path only: a name without one may be anything's.
        let excluded = entry.name().starts_with(b"/") && matches(&self.policy.exclude, entry.name());
        let executable = entry.mode().is_some_and(|mode| mode & ANY_EXECUTE != 0);
        if excluded && !executable {
            return None;
        }
        Some(match (listed.is_some(), signed) {
            (true, None) => format!("{entry} is {}, which the policy does not list for it", shown(digest)),
            (true, Some(problem)) => {
                format!("{entry} is {}, which the policy does not list for it, and {problem}", shown(digest))
            }
            (false, Some(problem)) => format!("{entry} ({}) is not in the policy, and {problem}", shown(digest)),
            (false, None) if excluded => {
                format!("{entry} ({}) is an executable under an excluded path", shown(digest))
            }
            (false, None) => format!("{entry} ({}) is not in the policy", shown(digest)),
        })
    }
}

fn matches(globs: &[Glob], name: &[u8]) -> bool {
    globs.iter().any(|glob| glob.matches(name))
}

/// Policies are text; a path that is none is in no policy.
fn text(name: &[u8]) -> Option<&str> {
    std::str::from_utf8(name).ok()
}

fn shown(digest: &FileDigest<'_>) -> String {
    format!("{}:{}", digest.algorithm, short_hex(digest.octets))
}

/// Execute permission of owner, group or others.
const ANY_EXECUTE: u16 = 0o111;
/// Reasons given for one piece of evidence.
const MOST_PROBLEMS: usize = 16;
