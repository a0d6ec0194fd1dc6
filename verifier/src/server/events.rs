//! The operators' API, events: what happened, as a list and as a stream that can be taken up where it broke off. An
//! operator sees all of it, a project what is its own.

use super::{Verifier, db_failed};
use crate::store::events::{EVENTS, Event};
use assay_service::auth::{Caller, Role};
use assay_service::error::{ApiError, chain};
use assay_wire::id::ProjectId;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Deserialize;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

/// `?after=N&limit=M`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventQuery {
    /// Only what came after this event.
    #[serde(default)]
    after: Option<u64>,
    /// At most so many; 1,000 at most, 100 by default.
    #[serde(default)]
    limit: Option<u32>,
}

/// Events after `after`, oldest first; without it, the latest.
#[utoipa::path(get, path = "/v1/events", tag = "operator", params(EventQuery),
    responses((status = 200, body = Vec<Event>)))]
pub(crate) async fn events(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Query(query): Query<EventQuery>,
) -> Result<Json<Vec<Event>>, ApiError> {
    let limit = query.limit.unwrap_or(LISTED).min(MOST_LISTED);
    let project = visible(&caller);
    let events = match query.after {
        Some(after) => verifier.store.events(after, project, limit).await,
        None => verifier.store.latest_events(project, limit).await,
    };
    events.map(Json).map_err(db_failed)
}

/// Events after `after` as they come, one JSON object a line, without end; without `after`, only those to come. An empty
/// line now and then says that there is none.
#[utoipa::path(get, path = "/v1/events/stream", tag = "operator", params(EventQuery),
    responses((status = 200, content_type = "application/x-ndjson", body = Event)))]
pub(crate) async fn event_stream(
    State(verifier): State<Arc<Verifier>>,
    caller: Caller,
    Query(query): Query<EventQuery>,
) -> Result<Response, ApiError> {
    let after = match query.after {
        Some(after) => after,
        None => verifier.store.latest_events(None, 1).await.map_err(db_failed)?.last().map_or(0, |event| event.id),
    };
    let reader = Reader { verifier, project: visible(&caller).cloned(), after };
    let lines = stream::unfold(reader, |reader| async move { reader.next().await });
    let mut response = Body::from_stream(lines).into_response();
    let ndjson = axum::http::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(CONTENT_TYPE, ndjson);
    Ok(response)
}

/// Whose events a caller sees; none for everybody's.
fn visible(caller: &Caller) -> Option<&ProjectId> {
    match &caller.role {
        Role::Operator | Role::Service => None,
        Role::Project(own) => Some(own),
    }
}

/// Who reads the stream.
struct Reader {
    verifier: Arc<Verifier>,
    project: Option<ProjectId>,
    after: u64,
}

impl Reader {
    /// The next lines; the stream ends with the process, and when the database does not answer: the reader comes again.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        let mut counters = self.verifier.store.counters().subscribe();
        let after = self.after;
        let more = counters.wait_for(|counters| counters.get(EVENTS).is_some_and(|latest| *latest > after));
        let shutdown = self.verifier.releases.shutdown().clone();
        tokio::select! {
            // If nobody counts any more, the process ends.
            moved = more => { moved.ok()?; }
            () = tokio::time::sleep(HEARTBEAT) => return Some((Ok(Bytes::from_static(b"\n")), self)),
            () = shutdown.cancelled() => return None,
        }
        let latest = counters.borrow().get(EVENTS).copied().unwrap_or(after);
        let events = match self.verifier.store.events(after, self.project.as_ref(), MOST_LISTED).await {
            Ok(events) => events,
            Err(error) => {
                tracing::error!(event = "events.stream_failed", cause = chain(&error), "a reader is sent away");
                return None;
            }
        };
        let full = events.len() >= usize::try_from(MOST_LISTED).unwrap_or(usize::MAX);
        // What is not this reader's is passed over, too.
        self.after = events.last().map_or(latest, |event| if full { event.id } else { event.id.max(latest) });
        let lines: String =
            events.iter().filter_map(|event| serde_json::to_string(event).ok()).map(|line| line + "\n").collect();
        Some((Ok(Bytes::from(lines)), self))
    }
}

const LISTED: u32 = 100;
const MOST_LISTED: u32 = 1_000;
const HEARTBEAT: Duration = Duration::from_secs(15);
