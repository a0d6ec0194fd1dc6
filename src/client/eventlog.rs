//! `assay eventlog`: boot event logs without a site. What does this log say, and does it explain these PCR values?

use super::output::{self, Format, Row};
use super::{BoxError, Exit};
use assay_service::error::chain;
use assay_tpm::algorithm::HashAlgorithm;
use assay_verifier::event_log::data::EventData;
use assay_verifier::event_log::quirks::DataDigest;
use assay_verifier::event_log::{Event, Limits, Origin, UnverifiedLog};
use assay_verifier::ima::{self, Extension, IMA_PCR, MeasurementList, Replay};
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub(crate) enum EventlogCommand {
    /// Show every event of a log, decoded, and the PCR values that it comes to
    #[command(after_help = "\
Examples:
  assay eventlog show /sys/kernel/security/tpm0/binary_bios_measurements
  ssh node cat /sys/kernel/security/tpm0/binary_bios_measurements | assay eventlog show - --output json
  assay eventlog show /sys/firmware/acpi/tables/data/CCEL
  assay eventlog show log.bin --ima /sys/kernel/security/ima/ascii_runtime_measurements

Nobody vouches for a log that is merely shown: compare it with PCR values (`assay eventlog verify`).
Exit status: 0, or 2 if a file cannot be read.")]
    Show(ShowArguments),
    /// Compare a log with PCR values: does it explain them?
    #[command(after_help = "\
PCRS.json holds values by bank and PCR, as any tool of your trust read them from the TPM:
  {\"sha256\": {\"0\": \"c6800e7e…\", \"7\": \"94b48522…\"}}
A PCR that no event extends must hold what it began with: zeros, or the startup locality in PCR 0.

Exit status: 0 if all of them replay; 1 if not, and each that does not is named; 2 if a file cannot be read.")]
    Verify(VerifyArguments),
}

#[derive(Debug, Args)]
pub(crate) struct ShowArguments {
    #[command(flatten)]
    log: LogArguments,
    /// The kernel's runtime measurement list, binary or ASCII, to say what PCR 10 comes to
    #[arg(long, value_name = "FILE")]
    ima: Option<PathBuf>,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArguments {
    #[command(flatten)]
    log: LogArguments,
    /// The PCR values, JSON
    #[arg(long, value_name = "PCRS.json")]
    pcrs: PathBuf,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Args)]
struct LogArguments {
    /// The log, like `/sys/kernel/security/tpm0/binary_bios_measurements`; `-` is standard input
    file: PathBuf,
    /// Whose log it is
    #[arg(long, value_enum, default_value_t = LogFormat::Auto)]
    format: LogFormat,
}

/// Whose log a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// By the file's name: a confidential computing log if `CCEL` is in it, else a TPM's
    Auto,
    /// A TPM's: TPM 2.0 (crypto-agile) or TPM 1.2, which is told by its content
    Tpm,
    /// A confidential computing log (UEFI 2.10): registers instead of PCRs
    Ccel,
}

pub(crate) fn run(command: EventlogCommand) -> Result<(), BoxError> {
    match command {
        EventlogCommand::Show(arguments) => show(&arguments),
        EventlogCommand::Verify(arguments) => verify(&arguments),
    }
}

/// What `show` says, as JSON has it.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    format: &'static str,
    banks: Vec<&'static str>,
    startup_locality: u8,
    events: Vec<ShownEvent<'a>>,
    pcrs: BTreeMap<&'static str, BTreeMap<u8, String>>,
    /// What the runtime measurement list comes to, where one was given.
    ima_pcr10: Option<BTreeMap<&'static str, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ima_entries: Option<u64>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ShownEvent<'a> {
    index: usize,
    pcr: u32,
    #[serde(rename = "type")]
    kind: String,
    digests: BTreeMap<&'static str, String>,
    /// None where the digest is of something that is not in the log.
    digest_matches_data: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quirk: Option<&'static str>,
    size: usize,
    description: String,
    data: EventData<'a>,
}

fn show(arguments: &ShowArguments) -> Result<(), BoxError> {
    let (name, bytes) = read_log(&arguments.log.file)?;
    let log = parse(&arguments.log, &name, &bytes)?;
    let mut shown = shown(&log);
    if let Some(path) = &arguments.ima {
        replay_ima(path, &mut shown)?;
    }
    match arguments.output {
        Format::Json => output::json(&shown),
        Format::Table => {
            let locality = shown.startup_locality;
            let banks = shown.banks.join(", ");
            output::line(&format!("{name}: {} log, banks {banks}, startup locality {locality}", shown.format))?;
            output::list(Format::Table, &shown.events)?;
            let rows = shown.pcrs.iter().flat_map(|(bank, pcrs)| {
                pcrs.iter().map(|(pcr, value)| PcrRow { bank, pcr: *pcr, value: value.clone() })
            });
            let ima = shown.ima_pcr10.iter().flatten();
            let ima = ima.map(|(bank, value)| PcrRow { bank, pcr: IMA_PCR, value: format!("{value} (IMA)") });
            output::list(Format::Table, &rows.chain(ima).collect::<Vec<_>>())?;
            say_warnings(&shown.warnings)
        }
    }
}

fn shown<'a>(log: &UnverifiedLog<'a>) -> Shown<'a> {
    let mut warnings = log.warnings().to_vec();
    warnings.extend(log.inspect_anomalies().iter().map(ToString::to_string));
    let pcrs = log.banks().iter().map(|bank| {
        let pcrs = log.compute_pcrs(*bank).unwrap_or_default();
        (bank.as_str(), pcrs.into_iter().map(|(pcr, value)| (pcr, hex::encode(value))).collect())
    });
    Shown {
        format: log.format().as_str(),
        banks: log.banks().iter().map(|bank| bank.as_str()).collect(),
        startup_locality: log.startup_locality(),
        events: log.inspect().iter().map(shown_event).collect(),
        pcrs: pcrs.collect(),
        ima_pcr10: None,
        ima_entries: None,
        warnings,
    }
}

/// What the kernel's list comes to, beginning with PCR 10 as a reset leaves it. Kernels from 5.8 on extend each bank
/// with its own digest.
fn replay_ima(path: &Path, shown: &mut Shown<'_>) -> Result<(), Exit> {
    let (name, bytes) = read(path, "the measurement list", ima::Limits::FILE.list_bytes)?;
    let unreadable = |cause: &ima::ImaError| Exit::new(2, format!("reading {name}: {}", chain(cause)));
    let list = MeasurementList::from_file(&bytes).map_err(|cause| unreadable(&cause))?;
    let mut replays = HashAlgorithm::ALL.map(|bank| (bank, Replay::start(bank, Extension::Rehashed)));
    let (mut entries, mut violations, mut elsewhere, mut forged) = (0u64, 0u64, 0u64, 0u64);
    for entry in list.entries() {
        let entry = entry.map_err(|cause| unreadable(&cause))?;
        entries += 1;
        violations += u64::from(entry.is_violation());
        forged += u64::from(entry.template_digest_matches() == Some(false));
        if entry.pcr() == u32::from(IMA_PCR) {
            replays.iter_mut().for_each(|(_, replay)| replay.extend(&entry));
        } else {
            elsewhere += 1;
        }
    }
    let mut warn = |count: u64, what: &str| {
        if count > 0 {
            shown.warnings.push(format!("measurement list: {count} of {entries} entries {what}"));
        }
    };
    warn(violations, "are violations: a file was open for writing while it was measured");
    warn(elsewhere, "are for another PCR than 10, and not in its value");
    warn(forged, "have a template digest that is not of their data");
    shown.ima_pcr10 = Some(replays.iter().map(|(bank, replay)| (bank.as_str(), hex::encode(replay.value()))).collect());
    shown.ima_entries = Some(entries);
    Ok(())
}

fn shown_event<'a>(event: &Event<'a>) -> ShownEvent<'a> {
    let digests =
        HashAlgorithm::ALL.into_iter().filter_map(|bank| Some((bank.as_str(), hex::encode(event.digest(bank)?))));
    let data = event.decoded_data();
    ShownEvent {
        index: event.index(),
        pcr: event.pcr(),
        kind: event.kind().to_string(),
        digests: digests.collect(),
        digest_matches_data: match event.data_digest() {
            DataDigest::Matches => Some(true),
            DataDigest::Differs => Some(false),
            DataDigest::NotOfData => None,
        },
        quirk: event.quirk().map(|quirk| quirk.name),
        size: event.logged_data().len(),
        description: data.to_string(),
        data,
    }
}

impl Row for ShownEvent<'_> {
    const HEAD: &'static [&'static str] = &["EVENT", "PCR", "TYPE", "DIGEST", "OF DATA", "SAYS"];
    fn cells(&self) -> Vec<String> {
        let digest = ["sha256", "sha384", "sha512", "sha1"].iter().find_map(|bank| self.digests.get(bank));
        let digest = digest.map_or_else(String::new, |digest| digest.chars().take(16).collect());
        let of_data = match (self.digest_matches_data, self.quirk) {
            (Some(true), None) => "yes".to_owned(),
            (Some(true), Some(quirk)) => format!("yes ({quirk})"),
            (Some(false), None) => "NO".to_owned(),
            (Some(false), Some(quirk)) => format!("no ({quirk})"),
            (None, _) => "-".to_owned(),
        };
        let pcr = if self.pcr == u32::MAX { "-".to_owned() } else { self.pcr.to_string() };
        vec![self.index.to_string(), pcr, self.kind.clone(), digest, of_data, self.description.clone()]
    }
}

#[derive(Debug, Serialize)]
struct PcrRow<'a> {
    bank: &'a str,
    pcr: u8,
    value: String,
}

impl Row for PcrRow<'_> {
    const HEAD: &'static [&'static str] = &["BANK", "PCR", "VALUE"];
    fn cells(&self) -> Vec<String> {
        vec![self.bank.to_owned(), self.pcr.to_string(), self.value.clone()]
    }
}

/// What `verify` says, as JSON has it.
#[derive(Debug, Serialize)]
struct Verified {
    replays: bool,
    pcrs: Vec<ComparedPcr>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ComparedPcr {
    bank: &'static str,
    pcr: u8,
    replays: bool,
    expected: String,
    /// None if the log has no such bank.
    found: Option<String>,
    /// How many events extend it.
    events: usize,
}

impl Row for ComparedPcr {
    const HEAD: &'static [&'static str] = &["BANK", "PCR", "REPLAYS", "EVENTS", "EXPECTED", "FOUND"];
    fn cells(&self) -> Vec<String> {
        let replays = if self.replays { "yes" } else { "NO" };
        let found = self.found.clone().unwrap_or_else(|| "the log has no such bank".to_owned());
        let (pcr, events) = (self.pcr.to_string(), self.events.to_string());
        vec![self.bank.to_owned(), pcr, replays.to_owned(), events, self.expected.clone(), found]
    }
}

fn verify(arguments: &VerifyArguments) -> Result<(), BoxError> {
    let (name, bytes) = read_log(&arguments.log.file)?;
    let log = parse(&arguments.log, &name, &bytes)?;
    let expected = read_pcrs(&arguments.pcrs)?;
    let verified = compare(&log, &expected);
    match arguments.output {
        Format::Json => output::json(&verified)?,
        Format::Table => {
            output::list(Format::Table, &verified.pcrs)?;
            say_warnings(&verified.warnings)?;
        }
    }
    let wrong: Vec<_> = verified.pcrs.iter().filter(|pcr| !pcr.replays).map(ComparedPcr::sentence).collect();
    if wrong.is_empty() { Ok(()) } else { Err(Exit::new(1, format!("{name}: {}", wrong.join("; "))).into()) }
}

impl ComparedPcr {
    fn sentence(&self) -> String {
        let Self { bank, pcr, expected, found, events, .. } = self;
        match found {
            Some(found) => format!("{bank} PCR {pcr}: {events} events replay to {found}, expected {expected}"),
            None => format!("{bank} PCR {pcr}: the log has no {bank} bank, expected {expected}"),
        }
    }
}

fn compare(log: &UnverifiedLog<'_>, expected: &ExpectedPcrs) -> Verified {
    let compared = expected.iter().flat_map(|(bank, pcrs)| {
        pcrs.iter().map(|(pcr, expected)| {
            let found = log.compute_pcr(*bank, *pcr);
            ComparedPcr {
                bank: bank.as_str(),
                pcr: *pcr,
                replays: found.as_ref().is_some_and(|(value, _)| value == expected),
                expected: hex::encode(expected),
                events: found.as_ref().map_or(0, |(_, events)| *events),
                found: found.map(|(value, _)| hex::encode(value)),
            }
        })
    });
    let pcrs: Vec<_> = compared.collect();
    let mut warnings = log.warnings().to_vec();
    for (bank, given) in expected {
        let extended = log.compute_pcrs(*bank).unwrap_or_default();
        let unsaid: Vec<_> = extended.keys().filter(|pcr| !given.contains_key(pcr)).map(u8::to_string).collect();
        if !unsaid.is_empty() {
            warnings
                .push(format!("nothing vouches for the {bank} events of PCRs {}: no value given", unsaid.join(", ")));
        }
    }
    Verified { replays: pcrs.iter().all(|pcr| pcr.replays), pcrs, warnings }
}

type ExpectedPcrs = BTreeMap<HashAlgorithm, BTreeMap<u8, Vec<u8>>>;

fn read_pcrs(path: &Path) -> Result<ExpectedPcrs, Exit> {
    let (name, bytes) = read(path, "PCR values", Limits::default().log_bytes)?;
    let unreadable = |problem: String| Exit::new(2, format!("reading PCR values from {name}: {problem}"));
    let banks: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_slice(&bytes).map_err(|cause| unreadable(cause.to_string()))?;
    let mut expected = ExpectedPcrs::new();
    for (bank, pcrs) in banks {
        let known = HashAlgorithm::ALL.map(HashAlgorithm::as_str);
        let algorithm = HashAlgorithm::ALL.into_iter().find(|known| known.as_str() == bank.to_ascii_lowercase());
        let algorithm =
            algorithm.ok_or_else(|| unreadable(format!("bank `{bank}` is unknown; known are {}", known.join(", "))))?;
        for (pcr, value) in pcrs {
            let index = pcr.parse().ok().filter(|index| *index < PCR_COUNT);
            let index: u8 = index.ok_or_else(|| unreadable(format!("`{pcr}` is no PCR: they are 0 to 23")))?;
            let digits = value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")).unwrap_or(&value);
            let octets = hex::decode(digits).ok().filter(|octets| octets.len() == algorithm.digest_bytes());
            let size = algorithm.digest_bytes();
            let octets =
                octets.ok_or_else(|| unreadable(format!("{bank} PCR {pcr} is not {size} octets of hexadecimal")))?;
            if expected.entry(algorithm).or_default().insert(index, octets).is_some() {
                return Err(unreadable(format!("{bank} PCR {index} is given twice")));
            }
        }
    }
    if expected.is_empty() {
        return Err(unreadable("no PCR value in it".to_owned()));
    }
    Ok(expected)
}

fn parse<'a>(arguments: &LogArguments, name: &str, bytes: &'a [u8]) -> Result<UnverifiedLog<'a>, Exit> {
    let origin = match arguments.format {
        LogFormat::Tpm => Origin::Tpm,
        LogFormat::Ccel => Origin::ConfidentialComputing,
        LogFormat::Auto if name.to_ascii_lowercase().contains("ccel") => Origin::ConfidentialComputing,
        LogFormat::Auto => Origin::Tpm,
    };
    if bytes.starts_with(b"CCEL") && origin == Origin::ConfidentialComputing {
        let hint = "this is the ACPI table that says where the log is; the log is /sys/firmware/acpi/tables/data/CCEL";
        return Err(Exit::new(2, format!("reading {name}: {hint}")));
    }
    UnverifiedLog::parse_from(origin, bytes).map_err(|cause| Exit::new(2, format!("reading {name}: {}", chain(&cause))))
}

fn read_log(path: &Path) -> Result<(String, Vec<u8>), Exit> {
    read(path, "the event log", Limits::default().log_bytes)
}

/// The file's name and its octets, of which there are no more than are looked at.
fn read(path: &Path, what: &str, limit: usize) -> Result<(String, Vec<u8>), Exit> {
    // One octet more, so that a file that is too long is seen to be.
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    let mut bytes = Vec::new();
    let is_stdin = path == Path::new("-");
    let name = if is_stdin { "standard input".to_owned() } else { path.display().to_string() };
    let done = if is_stdin {
        io::stdin().lock().take(most).read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes))
    };
    done.map_err(|cause| Exit::new(2, format!("reading {what} from {name}: {cause}")))?;
    Ok((name, bytes))
}

fn say_warnings(warnings: &[String]) -> Result<(), BoxError> {
    warnings.iter().try_for_each(|warning| output::line(&output::printable(&format!("warning: {warning}"))))
}

/// PCRs of a TPM for PC clients.
const PCR_COUNT: u8 = 24;
