//! QEMU Machine Protocol: JSON lines over a Unix socket. Commands are answered by id; events go to a channel.

use crate::error::{LabError, Result};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

/// A QMP connection that is past its greeting.
#[derive(Debug)]
pub struct Qmp {
    writer: tokio::sync::Mutex<Sender>,
    pending: Pending,
}

/// What QEMU says unasked, as far as the lab cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QmpEvent {
    /// The machine was reset, by its guest or by us.
    Reset,
    /// The machine turned itself off, or was turned off.
    Shutdown,
    /// Anything else.
    Other,
}

/// One line from QEMU.
#[derive(Debug, Clone, PartialEq)]
pub enum QmpMessage {
    /// The first line.
    Greeting,
    /// A command's result.
    Return {
        /// The command's id.
        id: u64,
        /// What it returns.
        value: Value,
    },
    /// A command's failure.
    Error {
        /// The command's id, if QEMU could read it.
        id: Option<u64>,
        /// QEMU's words.
        description: String,
    },
    /// An event.
    Event(QmpEvent),
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<std::result::Result<Value, String>>>>>;

#[derive(Debug)]
struct Sender {
    half: OwnedWriteHalf,
    next_id: u64,
}

impl Qmp {
    /// Connects and leaves negotiation mode.
    ///
    /// # Errors
    /// The socket does not answer like QEMU within a few seconds.
    pub async fn connect(socket: &Path) -> Result<(Self, mpsc::UnboundedReceiver<QmpEvent>)> {
        let doing = format!("talking to QEMU at {}", socket.display());
        let stream = UnixStream::connect(socket).await.map_err(LabError::io(doing))?;
        let (read, half) = stream.into_split();
        let pending = Pending::default();
        let (event_sender, events) = mpsc::unbounded_channel();
        tokio::spawn(read_messages(BufReader::new(read), Arc::clone(&pending), event_sender));
        let qmp = Self { writer: tokio::sync::Mutex::new(Sender { half, next_id: 1 }), pending };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok((qmp, events))
    }

    /// Executes a command and answers what it returns.
    ///
    /// # Errors
    /// QEMU refuses, hangs up, or says nothing for 10 s.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        let doing = format!("QMP command {command}");
        let (sender, answer) = oneshot::channel();
        {
            let mut writer = self.writer.lock().await;
            let id = writer.next_id;
            writer.next_id += 1;
            self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
            let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
            line.push('\n');
            writer.half.write_all(line.as_bytes()).await.map_err(LabError::io(doing.clone()))?;
        }
        match tokio::time::timeout(ANSWER_LIMIT, answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(description))) => Err(LabError::unexpected(doing, description)),
            Ok(Err(_)) => Err(LabError::unexpected(doing, "QEMU hung up")),
            Err(_) => Err(LabError::Timeout {
                doing,
                waited: ANSWER_LIMIT,
                hint: "QEMU does not answer on its socket".into(),
            }),
        }
    }
}

impl QmpMessage {
    /// Reads one line.
    ///
    /// # Errors
    /// Says why it is no QMP message.
    pub fn parse(line: &[u8]) -> std::result::Result<Self, &'static str> {
        let value: Value = serde_json::from_slice(line).map_err(|_| "not JSON")?;
        let id = value.get("id").and_then(Value::as_u64);
        if let Some(event) = value.get("event") {
            return Ok(Self::Event(match event.as_str() {
                Some("RESET") => QmpEvent::Reset,
                Some("SHUTDOWN") => QmpEvent::Shutdown,
                Some(_) => QmpEvent::Other,
                None => return Err("an event without a name"),
            }));
        }
        if let Some(error) = value.get("error") {
            let description = error.get("desc").and_then(Value::as_str).unwrap_or("no description").to_owned();
            return Ok(Self::Error { id, description });
        }
        match (value.get("return"), id) {
            (Some(returned), Some(id)) => Ok(Self::Return { id, value: returned.clone() }),
            (Some(_), None) => Err("a result without an id"),
            (None, _) if value.get("QMP").is_some() => Ok(Self::Greeting),
            (None, _) => Err("neither result, error, event nor greeting"),
        }
    }
}

async fn read_messages(
    mut reader: BufReader<OwnedReadHalf>,
    pending: Pending,
    events: mpsc::UnboundedSender<QmpEvent>,
) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        match QmpMessage::parse(&line) {
            Ok(QmpMessage::Return { id, value }) => answer(&pending, id, Ok(value)),
            Ok(QmpMessage::Error { id: Some(id), description }) => answer(&pending, id, Err(description)),
            Ok(QmpMessage::Event(event)) => drop(events.send(event)),
            Ok(QmpMessage::Greeting) => {}
            Ok(QmpMessage::Error { id: None, description }) => {
                tracing::warn!(event = "qmp.error", description, "QEMU could not read a command");
            }
            Err(problem) => tracing::warn!(event = "qmp.malformed", problem, "QEMU sent something that is not QMP"),
        }
    }
    // Dropping the senders tells everyone who still waits.
    pending.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

fn answer(pending: &Pending, id: u64, result: std::result::Result<Value, String>) {
    if let Some(waiting) = pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id) {
        // Whoever asked may have given up meanwhile.
        let _gave_up = waiting.send(result);
    }
}

const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const MAX_LINE_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_of_a_real_qemu() {
        let greeting =
            br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;
        assert_eq!(QmpMessage::parse(greeting), Ok(QmpMessage::Greeting));
        let reset = br#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESET", "data": {"guest": true}}"#;
        assert_eq!(QmpMessage::parse(reset), Ok(QmpMessage::Event(QmpEvent::Reset)));
        let done = br#"{"return": {}, "id": 7}"#;
        assert_eq!(QmpMessage::parse(done), Ok(QmpMessage::Return { id: 7, value: json!({}) }));
        let error = br#"{"id": 8, "error": {"class": "CommandNotFound", "desc": "no such command"}}"#;
        assert_eq!(
            QmpMessage::parse(error),
            Ok(QmpMessage::Error { id: Some(8), description: "no such command".into() })
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _any_answer = QmpMessage::parse(&line);
        }
    }
}
