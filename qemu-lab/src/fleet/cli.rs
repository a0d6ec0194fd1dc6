//! `qemu-lab fleet`: its arguments, its progress bar, its table.

use super::{FleetOptions, FleetReport, Latency, Progress, Stage, run};
use crate::error::{LabError, Result};
use crate::services::assay_binary;
use assay_service::testing::TestDatabase;
use clap::{Args, ValueEnum};
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use std::time::Duration;

/// Drives a fleet of soft nodes against a real verifier process, and says how fast it was and what it cost.
#[derive(Debug, Args)]
#[command(after_help = "\
Each node enrols, sends its boot evidence, is released and handed over, and then attests at the interval, with a real
signature over the verifier's nonce. isolation and imaging are scripted. Verifier and nodes share this machine: read the
figures with `generator` in mind, and use a release build (`cargo build --release --bins`) for any that count.

  qemu-lab fleet --nodes 1000 --interval 1               a thousand attestations a second
  qemu-lab fleet --nodes 10000 --interval 60 --keep-connections=false
  qemu-lab fleet --nodes 200 --interval 1 --database postgresql --output json")]
pub struct FleetArguments {
    /// How many nodes
    #[arg(long, default_value_t = 100)]
    nodes: usize,
    /// Seconds between two attestations of a node
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    interval: f64,
    /// Seconds to measure, once all nodes are admitted; default: two intervals, at least 20 s
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,
    /// Nodes that enrol at the same time
    #[arg(long, default_value_t = 8)]
    enrolling: usize,
    /// Whether nodes keep their connections between two attestations; the verifier closes what is idle for 15 s
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    keep_connections: bool,
    /// What the verifier keeps its records in
    #[arg(long, value_enum, default_value_t = Database::Sqlite)]
    database: Database,
    /// How to say what was measured
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Database {
    /// A file
    Sqlite,
    /// A server of the run's own (Debian package postgresql)
    Postgresql,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

impl FleetArguments {
    /// Runs the fleet in `folder`. Answers what to print.
    ///
    /// # Errors
    /// The verifier does not start, no node can be admitted, or an argument makes no sense.
    pub async fn run(self, folder: &Path) -> Result<String> {
        let seconds = |what: &str, value: f64| {
            Duration::try_from_secs_f64(value)
                .ok()
                .filter(|duration| !duration.is_zero())
                .ok_or_else(|| LabError::unexpected(format!("reading --{what}"), format!("{value} is no time span")))
        };
        let interval = seconds("interval", self.interval)?;
        let duration = match self.duration {
            Some(duration) => seconds("duration", duration)?,
            None => (interval * 2).max(SHORTEST),
        };
        let database = match self.database {
            Database::Sqlite => None,
            Database::Postgresql => Some(TestDatabase::postgresql().ok_or_else(|| {
                LabError::unexpected("starting PostgreSQL", "it is not installed: apt-get install postgresql")
            })?),
        };
        let options = FleetOptions {
            assay: assay_binary()?,
            folder: folder.join("fleet"),
            database: database.as_ref().map(|database| database.url().to_owned()),
            nodes: self.nodes,
            interval,
            duration,
            enrolling: self.enrolling,
            keep_connections: self.keep_connections,
        };
        let bar = ProgressBar::new(1);
        // Nothing is drawn where standard error is no terminal.
        if let Ok(style) = ProgressStyle::with_template("{msg:10} {bar:40} {pos}/{len}  {elapsed}") {
            bar.set_style(style);
        }
        let report = run(options, |progress| show(&bar, progress)).await?;
        bar.finish_and_clear();
        match self.output {
            Output::Table => Ok(table(&report)),
            Output::Json => serde_json::to_string_pretty(&report).map_err(LabError::service("writing the report")),
        }
    }
}

fn show(bar: &ProgressBar, progress: Progress) {
    bar.set_message(match progress.stage {
        Stage::Admitting => "admitting",
        Stage::Measuring => "measuring",
    });
    bar.set_length(progress.of);
    bar.set_position(progress.done);
}

fn table(report: &FleetReport) -> String {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_HORIZONTAL_ONLY).set_header(["figure", "value"]);
    let latency = |latency: &Latency| {
        let Latency { p50_ms, p90_ms, p99_ms, max_ms, .. } = latency;
        format!("p50 {p50_ms:.1} ms, p90 {p90_ms:.1} ms, p99 {p99_ms:.1} ms, max {max_ms:.1} ms")
    };
    let mut row = |figure: &str, value: String| {
        table.add_row([figure.to_owned(), value]);
    };
    let kept = if report.keep_connections { "kept" } else { "one an attestation" };
    row("nodes admitted", format!("{} of {}", report.nodes, report.nodes + report.failed));
    row("admissions", format!("{:.1}/s: {}", report.admitted_per_second, latency(&report.admission)));
    row("interval", format!("{} s, connections {kept}, {}", report.interval_seconds, report.database));
    row("attestations", format!("{:.1}/s over {:.1} s", report.pushes_per_second, report.measured_seconds));
    row("attestation", latency(&report.push));
    row(
        "verifier",
        format!(
            "{:.2} cores, {:.0} µs an attestation, {:.0} MiB now, {:.0} MiB at most",
            report.verifier_cores,
            report.verifier_cpu_us_per_push,
            report.verifier_rss_mib,
            report.verifier_peak_rss_mib
        ),
    );
    row("generator", format!("{:.2} cores", report.generator_cores));
    row("renewals passed on", report.renewals_passed_on.to_string());
    row("put off, late", format!("{}, {}", report.put_off, report.late));
    if report.errors.is_empty() {
        row("errors", "none".to_owned());
    }
    for (word, count) in &report.errors {
        row("error", format!("{count} × {word}"));
    }
    table.to_string()
}

/// Anything shorter says more about the start than about the run.
const SHORTEST: Duration = Duration::from_secs(20);
