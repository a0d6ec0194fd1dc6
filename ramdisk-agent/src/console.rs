//! What a person at the node's console sees: one line an event, with the time since the machine's kernel started.

use std::fmt;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Logs events of this crate to the console, `assay: [ 12.3s] message`. A second call does nothing.
pub fn init() {
    let subscriber = tracing_subscriber::fmt().with_max_level(Level::INFO).event_format(ConsoleFormat).finish();
    // The one error is that somebody else was first, and then that is the one who listens.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Logs events as JSON lines on standard output, for programs. A second call does nothing.
pub fn init_json() {
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_max_level(Level::INFO)
        .with_target(false)
        .with_writer(std::io::stdout)
        .finish();
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// An error with its causes, in one line.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

struct ConsoleFormat;

impl<S, N> FormatEvent<S, N> for ConsoleFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut message = Message::default();
        event.record(&mut message);
        let mark = match *event.metadata().level() {
            Level::ERROR => "ERROR: ",
            Level::WARN => "warning: ",
            _ => "",
        };
        writeln!(writer, "assay: [{:>6}s] {mark}{}", uptime(), message.0)
    }
}

/// The event's message; its fields are for programs.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

/// Seconds since the kernel started, with one digit after the point; nothing before `/proc` is there.
fn uptime() -> String {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default();
    format!("{seconds:.1}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_every_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("mounting the disk")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("no such device"));
        assert_eq!(Chain(&error).to_string(), "mounting the disk: no such device");
    }
}
