//! A worker's log, and its companion's: events go to the gateway, which has a log. One that does not keep up loses some.

use super::message::{FromWorker, send};
use assay_iscsi::SessionRequest;
use rustix::net::SendFlags;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The longest text of one event.
const TEXT_BYTES: usize = 1024;

/// Sends events to the gateway.
pub(crate) struct ToGateway;

/// The one event that others than readers of logs look for.
pub(super) fn logged_in(peer: SocketAddr, request: &SessionRequest) {
    let SessionRequest { target, initiator, .. } = request.clone();
    let _lost =
        send(rustix::stdio::stdin(), &FromWorker::LoggedIn { peer, target, initiator }, &[], SendFlags::DONTWAIT);
}

impl Subscriber for ToGateway {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn event(&self, event: &Event<'_>) {
        let mut said = Said::default();
        event.record(&mut said);
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        let message = FromWorker::Log { level, event: said.event, text: said.text };
        let _lost = send(rustix::stdio::stdin(), &message, &[], SendFlags::DONTWAIT);
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

#[derive(Default)]
struct Said {
    event: String,
    text: String,
}

impl Visit for Said {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "event" {
            value.clone_into(&mut self.event);
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let separator = if self.text.is_empty() { "" } else { " " };
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.text, "{separator}{value:?}"),
            name => write!(self.text, "{separator}{name}={value:?}"),
        };
        let mut end = self.text.len().min(TEXT_BYTES);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        self.text.truncate(end);
    }
}
