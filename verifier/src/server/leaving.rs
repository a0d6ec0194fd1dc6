//! An answer that tells when it has left: the one to `ready`, after which the node's port moves.

use crate::release::driver::AnswerLeaving;
use axum::body::{Body, Bytes};
use axum::http::HeaderValue;
use axum::http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt as _, stream};
use std::convert::Infallible;

/// JSON `null`, with the token inside the body: it ends when the body is in the connection's buffer, or with the
/// connection.
#[derive(Debug)]
pub(crate) struct LeavingAnswer(pub(super) AnswerLeaving);

impl IntoResponse for LeavingAnswer {
    fn into_response(self) -> Response {
        let content = stream::iter([Ok::<_, Infallible>(Bytes::from_static(NULL))]);
        // Polled only after the content was taken, if at all; dropped with the body in either case.
        let end = stream::once(async move {
            drop(self.0);
            Ok(Bytes::new())
        });
        let mut response = Response::new(Body::from_stream(content.chain(end)));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // With a length, hyper ends the body at its last octet and does not wait for another chunk.
        headers.insert(CONTENT_LENGTH, HeaderValue::from(NULL.len()));
        // The node's address is about to change: this connection has no future.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        response
    }
}

const NULL: &[u8] = b"null";
