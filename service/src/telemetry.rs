//! Log events. Every service logs JSON lines with stable names; the nine steps of the boot path go through
//! [`boot_step`] only, so that they look the same whoever logs them.

use assay_wire::id::NodeId;
use assay_wire::step::Step;
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line, fields at the top level.
    Json,
}

/// Starts logging to standard output. The level is `info` unless `ASSAY_LOG` says otherwise
/// (`tracing_subscriber::EnvFilter` syntax). A second call changes nothing.
pub fn init(format: LogFormat) {
    let filter = EnvFilter::try_from_env("ASSAY_LOG").unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_span_events(FmtSpan::NONE);
    // An error here means that logging runs already: tests start several services in one process.
    let _already_started = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init(),
    };
}

/// Logs one step of the boot path. `elapsed` is what the step took in the service that logs it.
pub fn boot_step(step: Step, node: &NodeId, elapsed: Duration) {
    let elapsed_ms = elapsed.as_secs_f64() * 1000.0;
    tracing::info!(event = step.event(), node = %node, step = step.number(), elapsed_ms, "{}", step.event());
}
