//! What happened, in order: one JSON object a line, the services' log events beside the lab's own. Every run leaves an
//! `events.jsonl`, scenarios wait for events in it, and `qemu-lab replay` tells the run again from it.

use crate::error::{LabError, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Event(Map<String, Value>);

impl Event {
    /// Reads a line; none if it is not a JSON object.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok().map(Self)
    }

    /// Its stable name, like `port.moved`; empty if it has none.
    #[must_use]
    pub fn name(&self) -> &str {
        self.text("event").unwrap_or_default()
    }

    /// The node that it is about.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.text("node")
    }

    /// A field that is text.
    #[must_use]
    pub fn text(&self, field: &str) -> Option<&str> {
        self.0.get(field).and_then(Value::as_str)
    }

    /// A field that is a number.
    #[must_use]
    pub fn number(&self, field: &str) -> Option<f64> {
        self.0.get(field).and_then(Value::as_f64)
    }

    /// When it happened, by the clock of whoever said so.
    #[must_use]
    pub fn time(&self) -> Option<OffsetDateTime> {
        OffsetDateTime::parse(self.text("timestamp")?, &Rfc3339).ok()
    }

    /// Whether it is this event of this node.
    #[must_use]
    pub fn is(&self, name: &str, node: &str) -> bool {
        self.name() == name && self.node() == Some(node)
    }

    /// All fields.
    #[must_use]
    pub fn fields(&self) -> &Map<String, Value> {
        &self.0
    }
}

/// The run's events: in memory, and in a file as they come.
#[derive(Debug, Clone)]
pub struct EventLog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    events: Mutex<Vec<Event>>,
    changed: watch::Sender<usize>,
    file: Mutex<File>,
}

impl EventLog {
    /// Starts a log in a new file; a file of an earlier run is replaced.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(LabError::io(format!("creating {}", path.display())))?;
        let inner = Inner { events: Mutex::default(), changed: watch::Sender::new(0), file: Mutex::new(file) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Records an event of the lab's own. `fields` is a JSON object.
    pub fn lab(&self, name: &str, fields: &Value) {
        let mut object = Map::new();
        let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        object.insert("timestamp".to_owned(), now.into());
        object.insert("source".to_owned(), "lab".into());
        object.insert("event".to_owned(), name.into());
        object.extend(fields.as_object().cloned().unwrap_or_default());
        self.record(Event(object));
    }

    /// Records an event of a service.
    pub fn record(&self, event: Event) {
        let mut line = Value::Object(event.0.clone()).to_string();
        line.push('\n');
        if let Err(error) = self.inner.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes()) {
            tracing::warn!(event = "lab.event_lost", %error, "cannot write events.jsonl");
        }
        let mut events = self.inner.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(event);
        self.inner.changed.send_replace(events.len());
    }

    /// How many events there are so far: a place to wait from.
    #[must_use]
    pub fn position(&self) -> usize {
        self.inner.events.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The events from `position` on.
    #[must_use]
    pub fn since(&self, position: usize) -> Vec<Event> {
        let events = self.inner.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.get(position..).unwrap_or_default().to_vec()
    }

    /// Waits for an event at or after `position`. `what` names it in the error.
    ///
    /// # Errors
    /// None comes within `limit`; the error shows the last that did.
    pub async fn wait_for(
        &self,
        what: &str,
        position: usize,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let mut changed = self.inner.changed.subscribe();
        let search = async {
            let mut from = position;
            loop {
                let events = self.since(from);
                from += events.len();
                if let Some(event) = events.into_iter().find(|event| wanted(event)) {
                    return event;
                }
                // The sender lives in `inner`, which we hold: this cannot fail.
                let _sender_is_ours = changed.changed().await;
            }
        };
        tokio::time::timeout(limit, search).await.map_err(|_| LabError::Timeout {
            doing: format!("waiting for {what}"),
            waited: limit,
            hint: format!("the last event is {}", self.since(0).last().map_or("none", Event::name)),
        })
    }
}

/// Reads the events of a run that is over. Lines that are not events (a torn last one, say) are left out.
///
/// # Errors
/// The file cannot be read.
pub fn read(path: &Path) -> Result<Vec<Event>> {
    let doing = || format!("reading events from {}", path.display());
    let file = File::open(path).map_err(LabError::io(doing()))?;
    let mut events = Vec::new();
    for line in BufReader::new(file).lines() {
        events.extend(Event::parse(&line.map_err(LabError::io(doing()))?));
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[tokio::test]
    async fn events_are_found_in_memory_and_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let log = EventLog::create(&path).unwrap();
        log.lab("node.powered", &json!({ "node": "n1" }));
        let service = r#"{"timestamp":"2026-01-01T00:00:00.5Z","event":"port.moved","node":"n1","elapsed_ms":12.5}"#;
        log.record(Event::parse(service).unwrap());
        let limit = Duration::from_secs(5);
        let moved = log.wait_for("the port to move", 0, limit, |e| e.is("port.moved", "n1")).await.unwrap();
        assert_eq!(moved.number("elapsed_ms"), Some(12.5));
        assert_eq!(moved.time().unwrap().millisecond(), 500);
        let short = Duration::from_millis(10);
        assert!(log.wait_for("it again", log.position(), short, |e| e.is("port.moved", "n1")).await.is_err());
        assert_eq!(read(&path).unwrap(), log.since(0));
    }

    proptest! {
        #[test]
        fn any_line_is_read_without_panic(line in ".{0,200}") {
            if let Some(event) = Event::parse(&line) {
                let _any = (event.name(), event.node(), event.time());
            }
        }
    }
}
