//! What the operators' API says, for its clients.

pub use crate::server::operator::{LearnRequest, PolicyDraft, PolicyRequest, ReleaseRecord, VerifierKeys};
pub use crate::store::archive::{VerdictRecord, VerdictWord};
pub use crate::store::identities::{Identity, Incident};
pub use crate::store::policies::PolicyRecord;
