//! Logs in to the tenant's target with open-iscsi's `iscsistart`, which leaves a session to the kernel and ends.

use super::{ToolError, run};
use assay_wire::agent::Grant;
use std::time::Duration;
use tokio::process::Command;

/// `iscsistart` itself tries for two minutes; a target that was just made answers in milliseconds.
const LOGIN_LIMIT: Duration = Duration::from_secs(60);

/// No session.
#[derive(Debug, thiserror::Error)]
#[error("logging in to {target} at {portal}")]
pub struct IscsiError {
    target: String,
    portal: String,
    #[source]
    source: ToolError,
}

/// Logs in with CHAP.
pub(super) async fn log_in(grant: &Grant) -> Result<(), IscsiError> {
    tracing::info!(
        event = "agent.logging_in",
        "waiting up to {} s for {} at {}",
        LOGIN_LIMIT.as_secs(),
        grant.target,
        grant.portal
    );
    let mut command = Command::new("/usr/sbin/iscsistart");
    // Its arguments show in /proc, but there is nobody else on the ramdisk to read them.
    command.arg("-i").arg(grant.initiator.as_str()).arg("-t").arg(grant.target.as_str()).args(["-g", "1"]);
    command.arg("-a").arg(grant.portal.ip().to_string()).arg("-p").arg(grant.portal.port().to_string());
    command.arg("-u").arg(&grant.chap_name).arg("-w").arg(&grant.chap_secret);
    run(command, "iscsistart", LOGIN_LIMIT).await.map_err(|source| IscsiError {
        target: grant.target.to_string(),
        portal: grant.portal.to_string(),
        source,
    })
}
