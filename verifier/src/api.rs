//! What the operators' API says, for its clients.

pub use crate::identity::EkDigest;
pub use crate::identity::binding::{Identity, IncidentKind, Origin, Settlement};
pub use crate::reappraisal::{Again, CaseFile, Explanation, Reappraisal, ReappraisedWord};
pub use crate::server::identities::{AllowRequest, ApproveRequest, SettleRequest};
pub use crate::server::operator::{ReleaseRecord, VerifierKeys};
pub use crate::server::policies::{
    LearnRequest, PolicyDraft, PolicyHistory, PolicyRequest, Trial, TryAnswer, TryRequest,
};
pub use crate::store::archive::{VerdictRecord, VerdictWord};
pub use crate::store::attestations::{AttestationRecord, AttestationState};
pub use crate::store::events::{Event, EventKind};
pub use crate::store::incidents::{Incident, IncidentId};
pub use crate::store::policies::PolicyRecord;
