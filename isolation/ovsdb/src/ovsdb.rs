//! `ovsdb-server`: transactions and monitors (RFC 7047 section 4.1).

use crate::rpc::{Connection, Limits, Notification, RpcError, describe};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::mpsc;

/// The database that `ovs-vswitchd` follows.
pub const OPEN_VSWITCH: &str = "Open_vSwitch";

/// A connection to `ovsdb-server`.
#[derive(Debug, Clone)]
pub struct Ovsdb {
    connection: Connection,
}

/// What `monitor_cond` says of a row that changed.
#[derive(Debug)]
pub struct Monitor {
    /// Everything that matched when the monitor began: `{table: {row: {"initial": columns}}}`.
    pub initial: Value,
    updates: mpsc::Receiver<Notification>,
    // The stream lives as long as a handle on it does.
    _connection: Connection,
}

impl Ovsdb {
    /// Connects to `ovsdb-server`'s Unix socket.
    ///
    /// # Errors
    /// See [`RpcError`].
    pub async fn connect(path: &Path, limits: Limits) -> Result<Self, RpcError> {
        let (connection, _) = Connection::unix(path, limits).await?;
        Ok(Self { connection })
    }

    /// Speaks OVSDB on a connection made elsewhere.
    #[must_use]
    pub fn on(connection: Connection) -> Self {
        Self { connection }
    }

    /// Runs operations as one transaction; answers one result an operation.
    ///
    /// # Errors
    /// See [`RpcError`]. An operation that failed, or a commit that did, is [`RpcError::Refused`]: `ovsdb-server`
    /// reports it inside `result`, with the top-level `error` null.
    pub async fn transact(&self, database: &str, operations: Vec<Value>) -> Result<Vec<Value>, RpcError> {
        let expected = operations.len();
        let mut params = vec![json!(database)];
        params.extend(operations);
        let answer = self.connection.call("transact", Value::Array(params)).await?;
        let peer = || Arc::clone(self.connection.peer());
        match check_results(answer, expected) {
            Ok(results) => Ok(results),
            Err(ResultFault::Refused(detail)) => {
                Err(RpcError::Refused { peer: peer(), method: "transact".into(), detail })
            }
            Err(ResultFault::Malformed) => Err(RpcError::Malformed {
                peer: peer(),
                method: "transact".into(),
                expected: "one result an operation",
            }),
        }
    }

    /// Follows tables of a database. `requests` is RFC 7047's `<monitor-cond-requests>`, like
    /// `{"Port": [{"columns": ["name", "tag"]}]}`. Takes a connection of its own, so that updates cannot mix.
    ///
    /// # Errors
    /// See [`RpcError`].
    pub async fn monitor(path: &Path, limits: Limits, database: &str, requests: Value) -> Result<Monitor, RpcError> {
        let (connection, updates) = Connection::unix(path, limits).await?;
        let initial = connection.call("monitor_cond", json!([database, null, requests])).await?;
        Ok(Monitor { initial, updates, _connection: connection })
    }
}

impl Monitor {
    /// The next `<table-updates2>`: `{table: {row: {"insert" | "modify" | "delete" | "initial": columns}}}`.
    /// None when the connection is gone: everything may have changed since.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            let mut notification = self.updates.recv().await?;
            if notification.method == "update2" {
                return Some(notification.params[1].take());
            }
        }
    }
}

enum ResultFault {
    Refused(String),
    Malformed,
}

/// `result` is one element an operation, null from the first failed one on, with one more element if the commit failed.
fn check_results(answer: Value, expected: usize) -> Result<Vec<Value>, ResultFault> {
    let Value::Array(results) = answer else {
        return Err(ResultFault::Malformed);
    };
    if let Some(error) = results.iter().find(|r| r.get("error").is_some_and(|e| !e.is_null())) {
        return Err(ResultFault::Refused(describe(error)));
    }
    if results.len() != expected || results.iter().any(Value::is_null) {
        return Err(ResultFault::Malformed);
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_inside_result_is_an_error() {
        let failed = json!([{"count": 1}, {"error": "constraint violation", "details": "tag"}, null]);
        assert!(matches!(check_results(failed, 3), Err(ResultFault::Refused(d)) if d == "constraint violation: tag"));
        let commit = json!([{"count": 1}, {"error": "referential integrity violation"}]);
        assert!(matches!(check_results(commit, 1), Err(ResultFault::Refused(_))));
    }

    #[test]
    fn a_missing_result_is_malformed() {
        for (bad, expected) in [(json!([]), 1), (json!([null]), 1), (json!({}), 0), (json!([{}, {}]), 1)] {
            assert!(matches!(check_results(bad, expected), Err(ResultFault::Malformed)));
        }
        assert!(check_results(json!([{"count": 0}, {}]), 2).is_ok());
    }
}
