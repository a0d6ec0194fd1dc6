//! Extractors whose refusals are problems in words (RFC 9457), not a framework's plain text.

use crate::session::Proof;
use assay_service::error::ApiError;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use futures_util::StreamExt as _;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::str::FromStr;

/// A JSON body of at most 1 MiB.
#[derive(Debug)]
pub(crate) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let Text(text) = Text::<MAX_JSON_BYTES>::from_request(request, state).await?;
        parse_json(&text).map(Self)
    }
}

/// A body of at most `LIMIT` octets of UTF-8.
#[derive(Debug)]
pub(crate) struct Text<const LIMIT: usize>(pub(super) String);

impl<const LIMIT: usize, S: Send + Sync> FromRequest<S> for Text<LIMIT> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let malformed =
            |problem: String| ApiError::bad_request("malformed", format!("reading the request's body: {problem}"));
        let mut chunks = request.into_body().into_data_stream();
        let (mut body, mut received) = (Vec::new(), 0_usize);
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|cause| malformed(cause.to_string()))?;
            received = received.saturating_add(chunk.len());
            if received <= LIMIT {
                body.extend_from_slice(&chunk);
            } else if received > LIMIT.saturating_mul(DISCARDED) {
                break;
            }
            // Else read on and discard: who is still writing does not see an answer, only a connection that is reset.
        }
        if received > LIMIT {
            return Err(malformed(format!("it is longer than {LIMIT} octets")));
        }
        String::from_utf8(body).map(Self).map_err(|_| malformed("it is not UTF-8".to_owned()))
    }
}

/// Parses a body; the error says where it is wrong, which tells the sender nothing that it did not send.
pub(super) fn parse_json<T: DeserializeOwned>(text: &str) -> Result<T, ApiError> {
    serde_json::from_str(text)
        .map_err(|cause| ApiError::bad_request("malformed", format!("parsing the request's body: {cause}")))
}

/// The one parameter of a path. What is no such name names no such object.
#[derive(Debug)]
pub(crate) struct Named<T>(pub(super) T);

impl<T, S> FromRequestParts<S> for Named<T>
where
    T: FromStr<Err: Display> + Send,
    S: Send + Sync,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|cause| ApiError::not_found(format!("reading the path: {cause}")))?;
        text.parse().map(Self).map_err(|cause: T::Err| ApiError::not_found(format!("reading the path: {cause}")))
    }
}

/// An agent's bearer token: its opened credential.
#[derive(Debug)]
pub(crate) struct BearerProof(pub(super) Proof);

impl<S: Send + Sync> FromRequestParts<S> for BearerProof {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let bearer = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let proof = bearer.ok_or_else(|| ApiError::unauthorized("no bearer token given"))?;
        proof.trim().parse().map(Self).map_err(|_| ApiError::unauthorized("the bearer token is not a proof"))
    }
}

const MAX_JSON_BYTES: usize = 1 << 20;
/// How many times the limit is read, and thrown away, before the connection is given up.
const DISCARDED: usize = 4;
