//! Evidence, joined: quote, clock, event log and the agent's own measurements become one [`ReplayedEvidence`] or an
//! error in words. Pure: the caller brings the AK that was activated, the nonce that was asked for and the last clock.
//!
//! What vouches for what: the AK's signature for the PCR values; replay for the digests in the log and for the agent's
//! measurements. Nothing is decoded before the quote is verified, and nothing of the log is given out before replay.

use crate::event_log::{LaterExtension, LogError, ReplayError, ReplayedLog, UnverifiedLog};
use crate::ima::{BootList, IMA_PCR, ImaError};
use crate::quote::{AkPublic, ClockChange, ClockError, ClockInfo, PCR_COUNT, PcrValue, QuoteError};
use crate::quote::{UnverifiedQuote, VerifiedQuote, check_clock, fell_back_ms, verify_quote};
use crate::tee::{self, Collateral, TeeRule};
use assay_tpm::algorithm::HashAlgorithm;
use assay_wire::evidence::{AGENT_PCR, AgentMeasurement, Evidence, TeeQuote};
use std::error::Error;

/// How large an evidence document may be as JSON: the log at its limit, in base64, and change.
pub const MAX_EVIDENCE_BYTES: usize = 2 << 20;

/// What the evidence must answer.
#[derive(Debug, Clone, Copy)]
pub struct Challenge<'a> {
    /// The AK that was activated in this session.
    pub ak: &'a AkPublic,
    /// The nonce of this session.
    pub nonce: &'a [u8; 32],
    /// The clock of the last verified quote of this EK, if there was one.
    pub last_clock: Option<&'a ClockInfo>,
}

/// Evidence that is what it says: not yet whether that is good.
#[derive(Debug, Clone)]
pub struct ReplayedEvidence<'a> {
    quote: VerifiedQuote,
    clock_change: ClockChange,
    clock_fell_back_ms: Option<u64>,
    log: ReplayedLog<'a>,
    measurements: &'a [AgentMeasurement],
    ima: Option<BootList<'a>>,
    tee: &'a [TeeQuote],
    tee_collateral: Option<(&'a Collateral, i64)>,
}

impl<'a> ReplayedEvidence<'a> {
    /// The quote.
    #[must_use]
    pub fn quote(&self) -> &VerifiedQuote {
        &self.quote
    }

    /// The TPM's clock now: the next evidence's `last_clock`.
    #[must_use]
    pub fn clock(&self) -> &ClockInfo {
        self.quote.clock()
    }

    /// Whether the machine was reset since the last quote.
    #[must_use]
    pub fn clock_change(&self) -> ClockChange {
        self.clock_change
    }

    /// By how much the TPM's clock fell back over a reset: for the policy to judge.
    #[must_use]
    pub fn clock_fell_back_ms(&self) -> Option<u64> {
        self.clock_fell_back_ms
    }

    /// The firmware's events.
    #[must_use]
    pub fn log(&self) -> &ReplayedLog<'_> {
        &self.log
    }

    /// What the agent measured, in order. Replay covered the hash of each one's data.
    #[must_use]
    pub fn measurements(&self) -> &[AgentMeasurement] {
        self.measurements
    }

    /// The agent's kernel's measurement list, if it came along. Replay against PCR 10 covered its entries.
    #[must_use]
    pub fn ima(&self) -> Option<&BootList<'_>> {
        self.ima.as_ref()
    }

    /// The same evidence, with what quotes of trusted execution environments are verified with, and as of when.
    #[must_use]
    pub fn with_tee_collateral(self, collateral: &'a Collateral, at_seconds: i64) -> Self {
        Self { tee_collateral: Some((collateral, at_seconds)), ..self }
    }

    /// What deviates from rules on quotes of trusted execution environments.
    #[must_use]
    pub fn tee_deviations(&self, rules: &[TeeRule]) -> Vec<String> {
        let none = Collateral::default();
        let bound = tee::report_data(self.quote.nonce(), self.quote.ak_name());
        let (collateral, at_seconds) = self.tee_collateral.unwrap_or((&none, 0));
        tee::deviations(rules, self.tee, collateral, &bound, at_seconds)
    }

    /// The quoted PCR values.
    pub fn pcrs(&self) -> impl Iterator<Item = (u8, &PcrValue)> {
        (0u8..).zip(self.quote.pcrs())
    }
}

/// Why evidence is not what it says.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// Not one value for each PCR.
    #[error("evidence has {found} PCR values instead of {PCR_COUNT}")]
    PcrCount {
        /// How many.
        found: usize,
    },
    /// Not a value.
    #[error("evidence: PCR {pcr} is not 32 octets of hexadecimal")]
    PcrValue {
        /// Which.
        pcr: usize,
    },
    /// The agent says that it measured into a PCR which is not its own.
    #[error("evidence: agent measurement {index} is into PCR {pcr}, not {AGENT_PCR}")]
    MeasurementPcr {
        /// Which measurement.
        index: usize,
        /// The PCR.
        pcr: u8,
    },
    /// More than any agent measures.
    #[error(
        "evidence: agent measurements are more than {MAX_MEASUREMENTS} or larger than {MAX_MEASUREMENT_BYTES} octets"
    )]
    TooManyMeasurements,
    /// No good quote.
    #[error("verifying the quote")]
    Quote(#[from] QuoteError),
    /// The TPM's counters went back.
    #[error("comparing the TPM's clock with the last quote's")]
    Clock(#[from] ClockError),
    /// No readable log.
    #[error("reading the event log")]
    Log(#[from] LogError),
    /// The kernel's measurement list cannot be read, or does not explain PCR 10.
    #[error("replaying the measurement list")]
    Ima(#[from] ImaError),
    /// The log does not explain the quote.
    #[error("replaying the event log")]
    Replay(#[from] ReplayError),
}

impl EvidenceError {
    /// One sentence a reason, cause included: for verdicts.
    #[must_use]
    pub fn reasons(&self) -> Vec<String> {
        if let Self::Replay(ReplayError::Mismatch(mismatches)) = self {
            return mismatches.iter().map(ToString::to_string).collect();
        }
        let mut sentence = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            sentence = format!("{sentence}: {error}");
            cause = error.source();
        }
        vec![sentence]
    }
}

/// Verifies and replays `evidence`.
///
/// # Errors
/// See [`EvidenceError`].
pub fn verify<'a>(evidence: &'a Evidence, challenge: &Challenge<'_>) -> Result<ReplayedEvidence<'a>, EvidenceError> {
    let pcrs = pcr_values(&evidence.pcrs)?;
    let unverified = UnverifiedQuote { attest: &evidence.attest, signature: &evidence.signature, pcrs: &pcrs };
    let quote = verify_quote(&unverified, challenge.ak, challenge.nonce)?;
    let clock_change = check_clock(challenge.last_clock, quote.clock())?;
    let clock_fell_back_ms = fell_back_ms(challenge.last_clock, quote.clock());
    let mut later = measured_by_agent(&evidence.agent_measurements)?;
    let log = UnverifiedLog::parse(&evidence.event_log)?;
    let ima = evidence.ima.as_ref().map(|list| BootList::replay(list, quote.pcrs())).transpose()?;
    match &ima {
        Some(list) => later.extend(list.extensions()),
        None => later.extend(measured_by_ima(&quote)),
    }
    let log = log.replay(&quote, &later)?;
    let measurements = &evidence.agent_measurements;
    Ok(ReplayedEvidence {
        quote,
        clock_change,
        clock_fell_back_ms,
        log,
        measurements,
        ima,
        tee: &evidence.tee,
        tee_collateral: None,
    })
}

pub(crate) fn pcr_values(values: &[String]) -> Result<[PcrValue; PCR_COUNT], EvidenceError> {
    if values.len() != PCR_COUNT {
        return Err(EvidenceError::PcrCount { found: values.len() });
    }
    let mut decoded = [PcrValue::new([0; 32]); PCR_COUNT];
    for (pcr, text) in values.iter().enumerate() {
        let mut value = [0; 32];
        hex::decode_to_slice(text, &mut value).map_err(|_| EvidenceError::PcrValue { pcr })?;
        decoded[pcr] = PcrValue::new(value);
    }
    Ok(decoded)
}

fn measured_by_agent(measurements: &[AgentMeasurement]) -> Result<Vec<LaterExtension>, EvidenceError> {
    let too_large = measurements.iter().any(|measurement| measurement.data.len() > MAX_MEASUREMENT_BYTES);
    if measurements.len() > MAX_MEASUREMENTS || too_large {
        return Err(EvidenceError::TooManyMeasurements);
    }
    let extension = |(index, measurement): (usize, &AgentMeasurement)| match measurement.pcr {
        AGENT_PCR => Ok(LaterExtension { pcr: AGENT_PCR, digest: sha256(&[&measurement.data]) }),
        pcr => Err(EvidenceError::MeasurementPcr { index, pcr }),
    };
    measurements.iter().enumerate().map(extension).collect()
}

/// What the agent's kernel extends into PCR 10 without being asked, where its list did not come along: the `boot_aggregate` of IMA, the digest of PCRs 0
/// to 9 (Linux `security/integrity/ima/ima_init.c`), in the template `ima-ng` or `ima-sig`. It follows from the quoted
/// PCRs themselves, so it is not a claim of the node's; given only if PCR 10 holds exactly that.
fn measured_by_ima(quote: &VerifiedQuote) -> Option<LaterExtension> {
    let boot_aggregate = sha256(&quote.pcrs()[..=9].iter().map(|pcr| &pcr.as_bytes()[..]).collect::<Vec<_>>());
    let digest_field = [b"sha256:\0", &boot_aggregate[..]].concat();
    let templates: [&[&[u8]]; 2] = [&[&digest_field, b"boot_aggregate\0"], &[&digest_field, b"boot_aggregate\0", b""]];
    let extensions = templates.map(|fields| {
        let sized = fields.iter().map(|field| {
            let size = u32::try_from(field.len()).unwrap_or(u32::MAX);
            [&size.to_le_bytes()[..], field].concat()
        });
        LaterExtension { pcr: IMA_PCR, digest: sha256(&[&sized.collect::<Vec<_>>().concat()]) }
    });
    extensions.into_iter().find(|extension| {
        let extended = sha256(&[&[0; 32], &extension.digest]);
        quote.pcr(IMA_PCR).is_some_and(|pcr| *pcr.as_bytes() == extended)
    })
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(HashAlgorithm::Sha256.digest(&parts.concat()).as_ref());
    digest
}

const MAX_MEASUREMENTS: usize = 8;
const MAX_MEASUREMENT_BYTES: usize = 64 * 1024;
