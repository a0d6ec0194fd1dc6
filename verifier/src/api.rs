//! What the operators' API says, for its clients.

pub use crate::server::operator::{ReleaseRecord, VerifierKeys};
pub use crate::server::policies::{LearnRequest, PolicyDraft, PolicyRequest};
pub use crate::store::archive::{VerdictRecord, VerdictWord};
pub use crate::store::attestations::{AttestationRecord, AttestationState};
pub use crate::store::events::{Event, EventKind};
pub use crate::store::identities::{Identity, Incident};
pub use crate::store::policies::PolicyRecord;
