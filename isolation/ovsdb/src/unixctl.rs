//! `ovs-vswitchd`'s control socket, what `ovs-appctl` speaks: a method, strings in, text out.

use crate::rpc::{Connection, Limits, RpcError};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

/// A control socket.
#[derive(Debug, Clone)]
pub struct Unixctl {
    connection: Connection,
}

impl Unixctl {
    /// Connects. A stopped daemon accepts the connection and then does not answer.
    ///
    /// # Errors
    /// See [`RpcError`].
    pub async fn connect(path: &Path, limits: Limits) -> Result<Self, RpcError> {
        let (connection, _) = Connection::unix(path, limits).await?;
        Ok(Self { connection })
    }

    /// Runs a command, like `revalidator/wait` or `fdb/show` with the bridge's name, and answers its output.
    ///
    /// # Errors
    /// See [`RpcError`].
    pub async fn run(&self, command: &str, arguments: &[&str]) -> Result<String, RpcError> {
        match self.connection.call(command, json!(arguments)).await? {
            serde_json::Value::String(output) => Ok(output),
            _ => Err(RpcError::Malformed {
                peer: Arc::clone(self.connection.peer()),
                method: command.to_owned(),
                expected: "text",
            }),
        }
    }
}
