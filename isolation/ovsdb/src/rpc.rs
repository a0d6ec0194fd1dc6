//! One JSON-RPC 1.0 connection (RFC 7047 section 4): calls out, notifications in, echo answered, everything bounded.
//!
//! The stream belongs to one task. [`Connection`] is a handle on it: dropping the last handle ends the task and closes
//! the stream.

use crate::framing::{FramingError, JsonDecoder};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::codec::Framed;

/// What a peer may cost us.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The longest message held, in octets.
    pub max_message_bytes: usize,
    /// How long connecting, and each call, may take.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_message_bytes: 16 << 20, timeout: Duration::from_secs(5) }
    }
}

/// A connection to one peer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Connection {
    peer: Arc<str>,
    calls: mpsc::Sender<Call>,
    timeout: Duration,
}

/// A message that the peer sent of its own accord, like RFC 7047's `update`.
#[derive(Debug, Clone, PartialEq)]
pub struct Notification {
    /// Its method.
    pub method: String,
    /// Its parameters.
    pub params: Value,
}

/// Why a call brought no result.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// Nobody listens there.
    #[error("connecting to {peer}")]
    Connect {
        /// The peer's socket.
        peer: Arc<str>,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// It is there, and silent.
    #[error("{peer} did not answer `{method}` within {} ms", .after.as_millis())]
    NoAnswer {
        /// The peer's socket.
        peer: Arc<str>,
        /// What was asked.
        method: String,
        /// For how long we waited.
        after: Duration,
    },
    /// The connection is gone; the log says why.
    #[error("connection to {peer} ended before it answered `{method}`")]
    Closed {
        /// The peer's socket.
        peer: Arc<str>,
        /// What was asked.
        method: String,
    },
    /// The peer understood and refused.
    #[error("{peer} refused `{method}`: {detail}")]
    Refused {
        /// The peer's socket.
        peer: Arc<str>,
        /// What was asked.
        method: String,
        /// The peer's words.
        detail: String,
    },
    /// The peer's answer is not what the protocol says it is.
    #[error("{peer} answered `{method}` with something else than {expected}")]
    Malformed {
        /// The peer's socket.
        peer: Arc<str>,
        /// What was asked.
        method: String,
        /// What the protocol promises.
        expected: &'static str,
    },
}

impl Connection {
    /// Connects to a Unix socket.
    ///
    /// # Errors
    /// [`RpcError::Connect`] and [`RpcError::NoAnswer`].
    pub async fn unix(path: &Path, limits: Limits) -> Result<(Self, mpsc::Receiver<Notification>), RpcError> {
        let peer: Arc<str> = path.display().to_string().into();
        match timeout(limits.timeout, UnixStream::connect(path)).await {
            Ok(Ok(stream)) => Ok(Self::over(stream, peer, limits)),
            Ok(Err(cause)) => Err(RpcError::Connect { peer, cause }),
            Err(_) => Err(RpcError::NoAnswer { peer, method: "connect".into(), after: limits.timeout }),
        }
    }

    /// Speaks JSON-RPC on a stream that somebody else connected: TCP, TLS, or a pipe in a test.
    /// A receiver of notifications that is not read fills up and then loses the connection: drop it if unwanted.
    pub fn over<S>(stream: S, peer: impl Into<Arc<str>>, limits: Limits) -> (Self, mpsc::Receiver<Notification>)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let peer = peer.into();
        let (calls, called) = mpsc::channel(64);
        let (notify, notified) = mpsc::channel(256);
        let framed = Framed::new(stream, JsonDecoder::new(limits.max_message_bytes));
        tokio::spawn(own_stream(framed, called, notify, Arc::clone(&peer)));
        (Self { peer, calls, timeout: limits.timeout }, notified)
    }

    /// The peer's name, for errors.
    #[must_use]
    pub fn peer(&self) -> &Arc<str> {
        &self.peer
    }

    /// Calls a method and waits for its result, no longer than the connection's timeout.
    ///
    /// # Errors
    /// See [`RpcError`].
    pub async fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        let (reply, answer) = oneshot::channel();
        let call = Call { method: method.to_owned(), params, reply };
        let closed = || RpcError::Closed { peer: Arc::clone(&self.peer), method: method.to_owned() };
        let exchange = async {
            self.calls.send(call).await.map_err(|_| closed())?;
            answer.await.map_err(|_| closed())
        };
        match timeout(self.timeout, exchange).await {
            Ok(answer) => answer?.map_err(|detail| RpcError::Refused {
                peer: Arc::clone(&self.peer),
                method: method.to_owned(),
                detail,
            }),
            Err(_) => {
                Err(RpcError::NoAnswer { peer: Arc::clone(&self.peer), method: method.to_owned(), after: self.timeout })
            }
        }
    }
}

#[derive(Debug)]
struct Call {
    method: String,
    params: Value,
    reply: oneshot::Sender<Result<Value, String>>,
}

/// What a received message is. Pure, so that arbitrary messages can be tried on it.
#[derive(Debug, PartialEq)]
enum Received {
    Response { id: u64, outcome: Result<Value, String> },
    Echo { id: Value, params: Value },
    Notification(Notification),
    Unknown,
}

fn classify(mut message: Value) -> Received {
    let id = message["id"].take();
    let params = message["params"].take();
    match message["method"].as_str() {
        Some("echo") if !id.is_null() => Received::Echo { id, params },
        Some(method) if id.is_null() => Received::Notification(Notification { method: method.to_owned(), params }),
        Some(_) => Received::Unknown,
        None => {
            let error = message["error"].take();
            let result = message["result"].take();
            let outcome = if error.is_null() { Ok(result) } else { Err(describe(&error)) };
            id.as_u64().map_or(Received::Unknown, |id| Received::Response { id, outcome })
        }
    }
}

/// An error in words: unixctl sends a string, OVSDB an object with `error` and `details`.
pub(crate) fn describe(error: &Value) -> String {
    let text = match (error.as_str(), error["error"].as_str(), error["details"].as_str()) {
        (Some(text), _, _) => text.trim_end().to_owned(),
        (None, Some(class), Some(details)) => format!("{class}: {details}"),
        (None, Some(class), None) => class.to_owned(),
        (None, None, _) => error.to_string(),
    };
    text.chars().take(500).collect()
}

async fn own_stream<S>(
    mut stream: Framed<S, JsonDecoder>,
    mut calls: mpsc::Receiver<Call>,
    notify: mpsc::Sender<Notification>,
    peer: Arc<str>,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut waiting = HashMap::new();
    let mut next_id = 0_u64;
    loop {
        let outcome = tokio::select! {
            call = calls.recv() => {
                let Some(call) = call else { return };
                next_id += 1;
                waiting.retain(|_, reply: &mut oneshot::Sender<_>| !reply.is_closed());
                waiting.insert(next_id, call.reply);
                stream.send(json!({"method": call.method, "params": call.params, "id": next_id})).await
            }
            message = stream.next() => match message {
                None => return tracing::debug!(%peer, "peer closed the connection"),
                Some(Err(error)) => Err(error),
                Some(Ok(message)) => receive(message, &mut stream, &mut waiting, &notify).await,
            },
        };
        if let Err(error) = outcome {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            return tracing::warn!(%peer, %error, cause, "connection lost");
        }
    }
}

async fn receive<S>(
    message: Value,
    stream: &mut Framed<S, JsonDecoder>,
    waiting: &mut HashMap<u64, oneshot::Sender<Result<Value, String>>>,
    notify: &mpsc::Sender<Notification>,
) -> Result<(), FramingError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    match classify(message) {
        Received::Response { id, outcome } => {
            if let Some(reply) = waiting.remove(&id) {
                // Whoever asked may have stopped waiting.
                let _ = reply.send(outcome);
            }
            Ok(())
        }
        Received::Echo { id, params } => stream.send(json!({"id": id, "result": params, "error": null})).await,
        Received::Notification(notification) => match notify.try_send(notification) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            // To skip one update is to believe a state that is not: rather lose the connection and start over.
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(FramingError::Io(std::io::Error::other("notifications are not read fast enough")))
            }
        },
        Received::Unknown => {
            tracing::debug!("message is neither response, echo nor notification: ignored");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    fn limits() -> Limits {
        Limits { max_message_bytes: 4096, timeout: Duration::from_millis(200) }
    }

    async fn read_json(stream: &mut DuplexStream) -> Value {
        let mut octets = [0; 4096];
        let count = stream.read(&mut octets).await.unwrap();
        serde_json::from_slice(&octets[..count]).unwrap()
    }

    #[tokio::test]
    async fn results_and_errors_reach_their_call() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (connection, _) = Connection::over(ours, "peer", limits());
        let call =
            tokio::spawn(
                async move { (connection.call("one", json!([1])).await, connection.call("two", json!([])).await) },
            );
        let first = read_json(&mut theirs).await;
        assert_eq!(first, json!({"method": "one", "params": [1], "id": 1}));
        theirs.write_all(br#"{"id":1,"result":[7],"error":null}"#).await.unwrap();
        read_json(&mut theirs).await;
        theirs.write_all(br#"{"id":2,"result":null,"error":"no such bridge\n"}"#).await.unwrap();
        let (one, two) = call.await.unwrap();
        assert_eq!(one.unwrap(), json!([7]));
        assert_eq!(two.unwrap_err().to_string(), "peer refused `two`: no such bridge");
    }

    #[tokio::test]
    async fn echo_is_answered_and_updates_are_handed_on() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (_connection, mut notifications) = Connection::over(ours, "peer", limits());
        theirs.write_all(br#"{"id":"echo","method":"echo","params":[]}"#).await.unwrap();
        assert_eq!(read_json(&mut theirs).await, json!({"id": "echo", "result": [], "error": null}));
        theirs.write_all(br#"{"id":null,"method":"update","params":[1]}"#).await.unwrap();
        assert_eq!(notifications.recv().await.unwrap(), Notification { method: "update".into(), params: json!([1]) });
    }

    #[tokio::test]
    async fn silence_and_hanging_up_are_told_apart() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let (connection, _) = Connection::over(ours, "peer", limits());
        assert_eq!(
            connection.call("m", json!([])).await.unwrap_err().to_string(),
            "peer did not answer `m` within 200 ms"
        );
        drop(theirs);
        assert!(matches!(connection.call("m", json!([])).await.unwrap_err(), RpcError::Closed { .. }));
    }

    #[tokio::test]
    async fn garbage_ends_the_connection() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (connection, _) = Connection::over(ours, "peer", limits());
        theirs.write_all(b"HTTP/1.1 400 Bad Request\r\n").await.unwrap();
        assert!(matches!(connection.call("m", json!([])).await.unwrap_err(), RpcError::Closed { .. }));
    }

    proptest! {
        #[test]
        fn any_object_is_classified(keys in prop::collection::vec((0_usize..5, -1_i64..3), 0..6)) {
            let names = ["id", "method", "params", "result", "error"];
            let values = [Value::Null, json!("echo"), json!(1), json!({"error": "x"})];
            let object = keys
                .into_iter()
                .map(|(name, value)| (names[name].to_owned(), values[usize::try_from(value + 1).unwrap()].clone()))
                .collect();
            let _ = classify(Value::Object(object));
        }
    }
}
