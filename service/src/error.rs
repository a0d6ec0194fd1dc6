//! Errors of HTTP handlers. A caller's mistake is answered in words; our own failure is logged with its causes and
//! answered without them.

use assay_wire::problem::Problem;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use std::error::Error;
use std::fmt::Display;

/// What a handler answers when it does not do what was asked: `application/problem+json` (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError(Box<Problem>);

impl ApiError {
    fn new(status: StatusCode, kind: &str, detail: impl Display) -> Self {
        let problem =
            Problem { kind: kind.to_owned(), status: status.as_u16(), detail: detail.to_string(), hint: None };
        Self(Box::new(problem))
    }

    /// 400: the request makes no sense.
    pub fn bad_request(kind: &str, detail: impl Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, kind, detail)
    }

    /// 401: no token, or one that we do not know.
    pub fn unauthorized(detail: impl Display) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
    }

    /// 403: known, but not allowed; also evidence, results and proofs that are not accepted.
    pub fn forbidden(kind: &str, detail: impl Display) -> Self {
        Self::new(StatusCode::FORBIDDEN, kind, detail)
    }

    /// 404: the object named does not exist.
    pub fn not_found(detail: impl Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    /// 409: it exists, in a state in which this cannot be done.
    pub fn conflict(kind: &str, detail: impl Display) -> Self {
        Self::new(StatusCode::CONFLICT, kind, detail)
    }

    /// 429: over a limit.
    pub fn too_many(detail: impl Display) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too-many", detail)
    }

    /// 503: something that we depend on does not answer, or did not do it. Trying again may help.
    pub fn unavailable(kind: &str, detail: impl Display) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, kind, detail)
    }

    /// 500: our failure. Logs `cause` with all its sources; the answer names only what was being done.
    pub fn internal(doing: impl Display, cause: &dyn Error) -> Self {
        tracing::error!(event = "request.failed", doing = %doing, cause = chain(cause), "{doing}");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", format!("{doing}: failed, see the service's log"))
    }

    /// Adds what to do next.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Display) -> Self {
        self.0.hint = Some(hint.to_string());
        self
    }

    /// What will be answered.
    #[must_use]
    pub fn problem(&self) -> &Problem {
        &self.0
    }
}

impl Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.detail)
    }
}

impl Error for ApiError {}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        (status, [(CONTENT_TYPE, "application/problem+json")], body).into_response()
    }
}

/// An error and all its sources, as one line: `a: b: c`.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
