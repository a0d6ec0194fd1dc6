//! `assay events`.

use super::output::{self, Format, Row};
use super::{BoxError, Options, Site};
use assay_verifier::api::Event;
use clap::Args;

/// More than any event as JSON; a longer line is not one.
const MAX_LINE_BYTES: usize = 1 << 20;

#[derive(Debug, Args)]
#[command(
    after_help = "Kinds: verdict.accepted, verdict.rejected, admission.revoked, admission.ended, attestation.silent, \
                  identity.incident, policy.activated.\nA reader that broke off goes on with --after and the id of the \
                  last event that it saw. Webhooks deliver the same events: see [[verifier.webhook]] in the site's file."
)]
pub(crate) struct EventArguments {
    /// Go on printing events as they happen, until interrupted; JSON is then one object a line
    #[arg(long)]
    follow: bool,
    /// Only what came after the event with this id; default: the latest
    #[arg(long, value_name = "ID")]
    after: Option<u64>,
    /// How many to list at most
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    #[command(flatten)]
    options: Options,
}

impl Row for Event {
    const HEAD: &'static [&'static str] = &["ID", "AT", "EVENT", "PROJECT", "NODE", "DETAIL"];
    fn cells(&self) -> Vec<String> {
        let detail: Vec<String> = self.detail.iter().map(|(key, value)| format!("{key}: {value}")).collect();
        let name = |name: Option<String>| name.unwrap_or_else(|| "-".to_owned());
        vec![
            self.id.to_string(),
            output::time(self.at_ms),
            self.event.to_string(),
            name(self.project.as_ref().map(ToString::to_string)),
            name(self.node.as_ref().map(ToString::to_string)),
            detail.join("\n"),
        ]
    }
}

pub(crate) async fn run(arguments: EventArguments) -> Result<(), BoxError> {
    let site = Site::open(&arguments.options)?;
    let after = arguments.after.map(|after| format!("&after={after}")).unwrap_or_default();
    let format = arguments.options.output;
    if arguments.follow {
        return follow(&site, arguments.after, format).await;
    }
    let events: Vec<Event> = site.verifier.get(&format!("/v1/events?limit={}{after}", arguments.limit)).await?;
    output::list(format, &events)
}

async fn follow(site: &Site, after: Option<u64>, format: Format) -> Result<(), BoxError> {
    let after = after.map(|after| format!("?after={after}")).unwrap_or_default();
    let mut response = site.verifier.get_streaming(&format!("/v1/events/stream{after}")).await?;
    let mut pending = Vec::new();
    let mut last = None;
    while let Some(chunk) = response.chunk().await? {
        pending.extend_from_slice(&chunk);
        while let Some(end) = pending.iter().position(|octet| *octet == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if line.trim_ascii().is_empty() {
                continue;
            }
            let event: Event = serde_json::from_slice(&line)?;
            last = Some(event.id);
            match format {
                Format::Json => output::line(&serde_json::to_string(&event)?)?,
                Format::Table => output::line(&output::printable(&event.cells().join("  ").replace('\n', "; ")))?,
            }
        }
        if pending.len() > MAX_LINE_BYTES {
            return Err("the verifier's stream of events has a line that is too long".into());
        }
    }
    let again = last.map(|last| format!(" --after {last}")).unwrap_or_default();
    Err(format!("the verifier ended the stream of events; go on with: assay events --follow{again}").into())
}
