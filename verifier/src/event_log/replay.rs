//! Replay: the log's digests extended again, and compared with what a TPM signed. The one maker of [`ReplayedLog`].

use super::{Event, Format, UnverifiedLog};
use crate::quote::{PcrValue, VerifiedQuote};
use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::QUOTED_PCRS;
use ring::digest;
use std::collections::BTreeMap;
use std::fmt;

/// A log whose every event was extended into a quoted PCR, and which explains every quoted PCR.
#[derive(Debug, Clone)]
pub struct ReplayedLog<'a> {
    events: Vec<Event<'a>>,
    startup_locality: u8,
}

impl<'a> ReplayedLog<'a> {
    /// The locality of `TPM2_Startup`: what PCR 0 began with, or else it would not have replayed.
    #[must_use]
    pub fn startup_locality(&self) -> u8 {
        self.startup_locality
    }

    /// The events that were extended into `pcr`, in order.
    pub fn events_of(&self, pcr: u8) -> impl Iterator<Item = &Event<'a>> {
        self.events.iter().filter(move |event| event.is_extended() && event.pcr() == u32::from(pcr))
    }
}

/// Something extended after the firmware's log had ended, so that the log cannot have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaterExtension {
    /// Into which PCR.
    pub pcr: u8,
    /// The SHA-256 digest that was extended.
    pub digest: [u8; 32],
}

/// Why a log does not explain a quote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// The log is of the time before TPM 2.0.
    #[error(
        "event log is in the format of TPM 1.2, which has SHA-1 digests only, and no quote of a SHA-1 bank is accepted: \
         set the TPM to 2.0 and its SHA-256 bank in the firmware's setup"
    )]
    Tpm12,
    /// The log is not of a TPM's PCRs.
    #[error("event log is a confidential computing log: no TPM's quote vouches for it")]
    NotOfTpm,
    /// The firmware did not measure into the quoted bank.
    #[error("event log has no SHA-256 digests, and the quote is of the SHA-256 bank")]
    NoSha256,
    /// An event was not measured into the quoted bank: the gap is for somebody else to extend.
    #[error("event log, event {index}: has no SHA-256 digest")]
    Gap {
        /// Which event.
        index: usize,
    },
    /// Extended events in PCRs that were not quoted: nothing vouches for them.
    #[error("event log, event {index}: extends PCR {pcr}, which is not quoted")]
    NotQuoted {
        /// Which event.
        index: usize,
        /// Its PCR.
        pcr: u32,
    },
    /// These PCRs do not replay.
    #[error("event log does not replay to the quoted PCRs: {}", list(.0))]
    Mismatch(Vec<PcrMismatch>),
}

/// A PCR that does not replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PcrMismatch {
    /// Which.
    pub pcr: u8,
    /// How many events say something about it.
    pub events: usize,
    /// What they come to.
    pub replayed: PcrValue,
    /// What the TPM says.
    pub quoted: PcrValue,
}

impl fmt::Display for PcrMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pcr, events, replayed, quoted } = self;
        let (replayed, quoted) = (replayed.short(), quoted.short());
        match (events, self.quoted.is_zero()) {
            (0, _) => write!(f, "PCR {pcr} holds {quoted}, and no event explains it"),
            (_, true) => write!(f, "PCR {pcr} was never extended, and the log has {events} events for it"),
            (_, false) => write!(
                f,
                "PCR {pcr}: {events} events replay to {replayed}, the TPM quoted {quoted}: \
                 an event is missing, added, moved or changed"
            ),
        }
    }
}

impl<'a> UnverifiedLog<'a> {
    /// Replays the log, and then `later`, against a verified quote.
    ///
    /// # Errors
    /// Names every quoted PCR that does not come out, or the event that no quoted PCR covers.
    pub fn replay(self, quote: &VerifiedQuote, later: &[LaterExtension]) -> Result<ReplayedLog<'a>, ReplayError> {
        match self.format {
            Format::CryptoAgile => {}
            Format::Sha1 => return Err(ReplayError::Tpm12),
            Format::Ccel => return Err(ReplayError::NotOfTpm),
        }
        if !self.banks.contains(&HashAlgorithm::Sha256) {
            return Err(ReplayError::NoSha256);
        }
        let gap = |event: &&Event<'_>| event.is_extended() && event.digest(HashAlgorithm::Sha256).is_none();
        if let Some(event) = self.events.iter().find(gap) {
            return Err(ReplayError::Gap { index: event.index() });
        }
        let unquoted = |event: &&Event<'_>| {
            event.is_extended() && u8::try_from(event.pcr()).ok().and_then(|pcr| quote.pcr(pcr)).is_none()
        };
        if let Some(event) = self.events.iter().find(unquoted) {
            return Err(ReplayError::NotQuoted { index: event.index(), pcr: event.pcr() });
        }
        let mut bank = Bank::start(HashAlgorithm::Sha256, self.startup_locality);
        for event in &self.events {
            bank.extend_event(event);
        }
        for extension in later {
            bank.extend(usize::from(extension.pcr), &extension.digest);
        }
        let mismatches: Vec<_> = QUOTED_PCRS
            .filter_map(|pcr| {
                let (replayed, events) = bank.sha256(pcr);
                let quoted = *quote.pcr(pcr)?;
                (replayed != quoted).then_some(PcrMismatch { pcr, events, replayed, quoted })
            })
            .collect();
        if mismatches.is_empty() {
            Ok(ReplayedLog { events: self.events, startup_locality: self.startup_locality })
        } else {
            Err(ReplayError::Mismatch(mismatches))
        }
    }

    /// What the log comes to in `bank`: every PCR that has an event. To show, or to compare with values that somebody
    /// else vouches for. `None` if the log has no such bank.
    #[must_use]
    pub fn compute_pcrs(&self, bank: HashAlgorithm) -> Option<BTreeMap<u8, Vec<u8>>> {
        let replayed = self.replayed(bank)?;
        let values = (0u8..).zip(&replayed.pcrs).filter(|(_, pcr)| pcr.events > 0);
        Some(values.map(|(index, pcr)| (index, pcr.value[..bank.digest_bytes()].to_vec())).collect())
    }

    /// What `pcr` comes to in `bank`, and by how many events: with none it holds what it began with. `None` if the log
    /// has no such bank, or the TPM no such PCR.
    #[must_use]
    pub fn compute_pcr(&self, bank: HashAlgorithm, pcr: u8) -> Option<(Vec<u8>, usize)> {
        let replayed = self.replayed(bank)?;
        let pcr = replayed.pcrs.get(usize::from(pcr))?;
        Some((pcr.value[..bank.digest_bytes()].to_vec(), pcr.events))
    }

    fn replayed(&self, bank: HashAlgorithm) -> Option<Bank> {
        if !self.banks.contains(&bank) {
            return None;
        }
        let mut replayed = Bank::start(bank, self.startup_locality);
        for event in &self.events {
            replayed.extend_event(event);
        }
        // Static measurement cannot extend these; whoever launches dynamically resets them to zeros first (PTP 1.06,
        // section 4.6).
        if self.format != Format::Ccel {
            let untouched = replayed.pcrs[DYNAMIC_PCRS].iter_mut().filter(|pcr| pcr.events == 0);
            untouched.for_each(|pcr| pcr.value = [0xff; 64]);
        }
        Some(replayed)
    }
}

/// One bank of PCRs while a log is replayed.
struct Bank {
    algorithm: HashAlgorithm,
    pcrs: [Pcr; super::PCR_COUNT as usize],
}

#[derive(Clone, Copy)]
struct Pcr {
    /// As many octets as the algorithm has; 64 is the most.
    value: [u8; 64],
    events: usize,
}

impl Bank {
    /// The values after `TPM2_Startup(CLEAR)`: PCR 0 holds the locality, others up to 16 nothing (PFP 1.06, section
    /// 3.3.2).
    fn start(algorithm: HashAlgorithm, startup_locality: u8) -> Self {
        let mut pcrs = [Pcr { value: [0; 64], events: 0 }; super::PCR_COUNT as usize];
        pcrs[0].value[algorithm.digest_bytes() - 1] = startup_locality;
        Self { algorithm, pcrs }
    }

    fn extend_event(&mut self, event: &Event<'_>) {
        if !event.is_extended() {
            return;
        }
        if let (Ok(pcr), Some(digest)) = (usize::try_from(event.pcr()), event.digest(self.algorithm)) {
            self.extend(pcr, digest);
        }
    }

    /// `new = H(old ‖ digest)`. The parser lets no PCR through that does not exist.
    fn extend(&mut self, pcr: usize, extended: &[u8]) {
        let Some(pcr) = self.pcrs.get_mut(pcr) else { return };
        let mut context = digest::Context::new(self.algorithm.ring());
        context.update(&pcr.value[..self.algorithm.digest_bytes()]);
        context.update(extended);
        pcr.value[..self.algorithm.digest_bytes()].copy_from_slice(context.finish().as_ref());
        pcr.events += 1;
    }

    fn sha256(&self, pcr: u8) -> (PcrValue, usize) {
        let pcr = &self.pcrs[usize::from(pcr)];
        let mut value = [0; 32];
        value.copy_from_slice(&pcr.value[..32]);
        (PcrValue::new(value), pcr.events)
    }
}

fn list(mismatches: &[PcrMismatch]) -> String {
    mismatches.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// PCRs of dynamic measurement, which begin with all ones.
const DYNAMIC_PCRS: std::ops::RangeInclusive<usize> = 17..=22;
