//! Errors on the wire: RFC 9457 problem details.

use serde::{Deserialize, Serialize};

/// What an API answers when it refuses or fails, as `application/problem+json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Problem {
    /// A stable, machine-readable word for the class of problem, like `not-found`.
    #[serde(rename = "type")]
    pub kind: String,
    /// HTTP status code, repeated for readers of logs.
    pub status: u16,
    /// What was being done, to which object, and why it failed, in words.
    pub detail: String,
    /// What to do next, where there is something to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}
