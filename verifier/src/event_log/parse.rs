//! Octets to events, within limits. Nothing is skipped: what is not understood ends the reading.

use super::event_type::EventType;
use super::quirks::{BANK_GAP, TRUST_POINT};
use super::{Digests, Event, Format, Limits, Origin, PCR_COUNT, UnverifiedLog};
use assay_tpm::algorithm::HashAlgorithm;
use assay_tpm::reader::{DecodeError, Order, Reader};

/// Why a log cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// Longer than any log.
    #[error("event log has {bytes} octets, more than {limit}")]
    TooLarge {
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        limit: usize,
    },
    /// More events than any log.
    #[error("event log has more than {limit} events")]
    TooManyEvents {
        /// How many it may have.
        limit: usize,
    },
    /// Nothing there.
    #[error("event log is empty")]
    Empty,
    /// A confidential computing log is always crypto-agile.
    #[error("event log does not begin with a Spec ID event, as a confidential computing log must")]
    NoSpecId,
    /// An event is not whole.
    #[error("event log, event {index}")]
    Malformed {
        /// Which event.
        index: usize,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// The structure is whole and what it says cannot be.
    #[error("event log, event {index}: {problem}")]
    Inconsistent {
        /// Which event.
        index: usize,
        /// What cannot be.
        problem: &'static str,
    },
}

pub(super) fn parse<'a>(bytes: &'a [u8], origin: Origin, limits: &Limits) -> Result<UnverifiedLog<'a>, LogError> {
    if bytes.is_empty() {
        return Err(LogError::Empty);
    }
    if bytes.len() > limits.log_bytes {
        return Err(LogError::TooLarge { bytes: bytes.len(), limit: limits.log_bytes });
    }
    let mut reader = Reader::new("TCG_PCR_EVENT", bytes, Order::Little);
    let malformed = |index| move |source| LogError::Malformed { index, source };
    let first = sha1_event(&mut reader, 0, limits).map_err(malformed(0))?;
    let agile = first.kind == EventType::NO_ACTION && first.data.starts_with(SPEC_ID_AGILE);
    let sizes = if agile { spec_id(first.data)? } else { Vec::new() };
    let format = match (agile, origin) {
        (true, Origin::Tpm) => Format::CryptoAgile,
        (true, Origin::ConfidentialComputing) => Format::Ccel,
        (false, Origin::Tpm) => Format::Sha1,
        (false, Origin::ConfidentialComputing) => return Err(LogError::NoSpecId),
    };
    let banks = match format {
        Format::CryptoAgile | Format::Ccel => sizes.iter().filter_map(|(id, _)| HashAlgorithm::from_id(*id)).collect(),
        Format::Sha1 => vec![HashAlgorithm::Sha1],
    };
    let warnings = sizes.iter().filter(|(id, _)| HashAlgorithm::from_id(*id).is_none()).map(|(id, _)| skipped(*id));
    let mut log =
        UnverifiedLog { format, banks, events: Vec::new(), startup_locality: 0, warnings: warnings.collect() };
    let mut locality = StartupLocality::default();
    locality.observe(&first)?;
    check(&first, 0, format)?;
    log.events.push(first);
    let padding = padding_start(bytes);
    while reader.left() > 0 && reader.offset() < padding {
        let index = log.events.len();
        if index >= limits.events {
            return Err(LogError::TooManyEvents { limit: limits.events });
        }
        let event = match log.format {
            Format::CryptoAgile | Format::Ccel => agile_event(&mut reader, index, &sizes, limits)?,
            Format::Sha1 => sha1_event(&mut reader, index, limits).map_err(malformed(index))?,
        };
        check(&event, index, format)?;
        locality.observe(&event)?;
        log.events.push(event);
    }
    for bank in log.banks.clone() {
        let gaps = log.events[1..].iter().filter(|event| event.is_extended() && event.digest(bank).is_none()).count();
        if gaps > 0 {
            log.warnings.push(format!("{gaps} events have no {bank} digest ({})", BANK_GAP.name));
        }
    }
    let claims = log.events.iter().filter(|event| claims_extension(event)).count();
    if claims > 0 {
        log.warnings.push(format!("{claims} EV_NO_ACTION events have a digest, and nothing was extended for them"));
    }
    if reader.left() > 0 {
        log.warnings.push(format!("{} octets of padding after the last event", reader.left()));
    }
    if format != Format::Ccel {
        log.startup_locality = locality.value.unwrap_or(0);
    }
    Ok(log)
}

/// What must hold for any event after it was read.
fn check(event: &Event<'_>, index: usize, format: Format) -> Result<(), LogError> {
    let registers = match format {
        Format::CryptoAgile | Format::Sha1 => PCR_COUNT,
        Format::Ccel => CC_REGISTER_COUNT,
    };
    if event.is_extended() && event.pcr >= registers {
        let problem = if format == Format::Ccel { "measurement register does not exist" } else { "PCR does not exist" };
        return Err(LogError::Inconsistent { index, problem });
    }
    if index > 0 && !event.is_extended() && event.data.starts_with(SPEC_ID_PREFIX) {
        return Err(LogError::Inconsistent { index, problem: "second Spec ID event" });
    }
    Ok(())
}

/// An EV_NO_ACTION with a digest says that something was measured, and nothing was. Windows ends its stretch of the log
/// with one.
fn claims_extension(event: &Event<'_>) -> bool {
    let digest = |bank| event.digest(bank).is_some_and(|digest| digest.iter().any(|octet| *octet != 0));
    !event.is_extended() && !TRUST_POINT.is(event) && HashAlgorithm::ALL.into_iter().any(digest)
}

/// A bank that nothing here can replay.
fn skipped(id: u16) -> String {
    match OTHER_ALGORITHMS.iter().find(|(known, _)| *known == id) {
        Some((_, name)) => format!("bank {name} is in the log and not replayed: nothing here computes {name}"),
        None => format!("bank of algorithm {id:#06x} is in the log and not replayed: it is unknown"),
    }
}

/// `TCG_PCClientPCREvent`: also the form of the first event of a crypto-agile log.
fn sha1_event<'a>(reader: &mut Reader<'a>, index: usize, limits: &Limits) -> Result<Event<'a>, DecodeError> {
    let pcr = reader.u32()?;
    let kind = EventType::from_code(reader.u32()?);
    let mut digests = Digests::default();
    digests.set(HashAlgorithm::Sha1, reader.bytes(HashAlgorithm::Sha1.digest_bytes())?);
    let data = data(reader, limits)?;
    Ok(Event { index, pcr, kind, digests, data })
}

/// `TCG_PCR_EVENT2`. An event has at most one digest for each algorithm of the Spec ID. Genuine firmware leaves some
/// out (quirks); a bank with a gap is shown, and refused by replay, because the gap is for somebody else to extend.
fn agile_event<'a>(
    reader: &mut Reader<'a>,
    index: usize,
    sizes: &[(u16, u16)],
    limits: &Limits,
) -> Result<Event<'a>, LogError> {
    let malformed = |source| LogError::Malformed { index, source };
    let pcr = reader.u32().map_err(malformed)?;
    let kind = EventType::from_code(reader.u32().map_err(malformed)?);
    let count = reader.u32().map_err(malformed)?;
    if count == 0 || usize::try_from(count).is_ok_and(|count| count > sizes.len()) {
        let problem = "no digest, or more than the Spec ID has algorithms";
        return Err(LogError::Inconsistent { index, problem });
    }
    let mut digests = Digests::default();
    let mut seen = 0u32;
    for _ in 0..count {
        let id = reader.u16().map_err(malformed)?;
        let Some(position) = sizes.iter().position(|(known, _)| *known == id) else {
            return Err(LogError::Inconsistent { index, problem: "digest of an algorithm that the Spec ID lacks" });
        };
        if seen & (1 << position) != 0 {
            return Err(LogError::Inconsistent { index, problem: "two digests of one algorithm" });
        }
        seen |= 1 << position;
        let digest = reader.bytes(usize::from(sizes[position].1)).map_err(malformed)?;
        if let Some(bank) = HashAlgorithm::from_id(id) {
            digests.set(bank, digest);
        }
    }
    let data = data(reader, limits).map_err(malformed)?;
    Ok(Event { index, pcr, kind, digests, data })
}

fn data<'a>(reader: &mut Reader<'a>, limits: &Limits) -> Result<&'a [u8], DecodeError> {
    let size = reader.u32()?;
    match usize::try_from(size) {
        Ok(bytes) if bytes <= limits.event_bytes => reader.bytes(bytes),
        _ => Err(reader.value("event size", size)),
    }
}

/// `TCG_EfiSpecIDEventStruct`: the algorithms and their digest sizes.
fn spec_id(data: &[u8]) -> Result<Vec<(u16, u16)>, LogError> {
    let malformed = |source| LogError::Malformed { index: 0, source };
    let inconsistent = |problem| LogError::Inconsistent { index: 0, problem };
    let mut reader = Reader::new("TCG_EfiSpecIDEvent", data, Order::Little);
    reader.bytes(SPEC_ID_AGILE.len() + 8).map_err(malformed)?; // signature, class, version, errata, uintn size
    let count = reader.u32().map_err(malformed)?;
    if count == 0 || count > MAX_ALGORITHMS {
        return Err(inconsistent("Spec ID with no or too many algorithms"));
    }
    let mut sizes: Vec<(u16, u16)> = Vec::new();
    for _ in 0..count {
        let (id, size) = (reader.u16().map_err(malformed)?, reader.u16().map_err(malformed)?);
        if sizes.iter().any(|(known, _)| *known == id) {
            return Err(inconsistent("Spec ID names an algorithm twice"));
        }
        let right = match HashAlgorithm::from_id(id) {
            Some(bank) => bank.digest_bytes() == usize::from(size),
            None => (1..=MAX_DIGEST_BYTES).contains(&size),
        };
        if !right {
            return Err(inconsistent("Spec ID gives an algorithm a size that is not its digest's"));
        }
        sizes.push((id, size));
    }
    let vendor = reader.u8().map_err(malformed)?;
    reader.bytes(usize::from(vendor)).map_err(malformed)?;
    reader.finish().map_err(malformed)?;
    Ok(sizes)
}

/// Follows the one claim that EV_NO_ACTION makes and that replay checks: where PCR 0 began (PFP 1.06, section
/// 10.4.5.3).
#[derive(Default)]
struct StartupLocality {
    value: Option<u8>,
    pcr0_extended: bool,
}

impl StartupLocality {
    fn observe(&mut self, event: &Event<'_>) -> Result<(), LogError> {
        let inconsistent = |problem| Err(LogError::Inconsistent { index: event.index, problem });
        if event.is_extended() {
            self.pcr0_extended |= event.pcr == 0;
            return Ok(());
        }
        let Some(rest) = event.data.strip_prefix(STARTUP_LOCALITY) else { return Ok(()) };
        match rest {
            [locality @ (0 | 3 | 4)] if event.pcr == 0 => {
                if self.value.replace(*locality).is_some() {
                    return inconsistent("second StartupLocality");
                }
                if self.pcr0_extended {
                    return inconsistent("StartupLocality after PCR 0 was extended");
                }
                Ok(())
            }
            [_] if event.pcr != 0 => inconsistent("StartupLocality for another PCR than 0"),
            [_] => inconsistent("StartupLocality is none of 0, 3 and 4"),
            _ => inconsistent("StartupLocality is not one octet"),
        }
    }
}

/// Firmware and kernels may hand over the whole log area, unused octets and all: where the last run of 0 or 0xff
/// begins. The run may begin inside the last event, which is then read whole. Found once: a look at the rest before
/// each event would make a log of zeros cost its square.
fn padding_start(log: &[u8]) -> usize {
    match log.last() {
        Some(filler @ (0 | 0xff)) => log.iter().rposition(|octet| octet != filler).map_or(0, |last| last + 1),
        Some(_) | None => log.len(),
    }
}

const SPEC_ID_PREFIX: &[u8] = b"Spec ID Event0";
const SPEC_ID_AGILE: &[u8] = b"Spec ID Event03\0";
pub(super) const STARTUP_LOCALITY: &[u8] = b"StartupLocality\0";
/// Hash algorithms of the TCG Algorithm Registry that no bank here has, by their `TPM_ALG_ID`.
const OTHER_ALGORITHMS: [(u16, &str); 4] =
    [(0x0012, "sm3_256"), (0x0027, "sha3_256"), (0x0028, "sha3_384"), (0x0029, "sha3_512")];
/// MRTD and four RTMRs in TDX, and as many in Arm's and RISC-V's counterparts (UEFI 2.10, table 38-2).
const CC_REGISTER_COUNT: u32 = 5;
/// More than the registry has.
const MAX_ALGORITHMS: u32 = 16;
const MAX_DIGEST_BYTES: u16 = 64;
