//! The project's own verifiers beside the one that leads. Each is attested to by itself, with a nonce, a quote and a pace
//! of its own; what it signs is held for the leading verifier, which is never kept waiting for more than a moment:
//!
//! ```text
//!  co-verifier   ── challenge ─▶ evidence ─▶ a fresh result, held ─▶ wait …          one such line each
//!                                                   │
//!  leading   … wait ─▶ ask those that were not heard of lately, for a moment ─▶ evidence with what is held ─▶ …
//! ```
//!
//! Whether an admission stands without one of them is isolation's and imaging's to decide. One that says that it is over
//! is asked no more, and what it gave of the tenant's secret goes.

use super::prover::Prover;
use super::state::CoAttestation;
use super::verifier::{AttestationClient, Refusal};
use super::{AttestationError, Round, random};
use crate::backoff::Patience;
use crate::client::CallError;
use crate::console::Chain;
use crate::ima::MeasurementReader;
use crate::tpm::Tpm;
use assay_wire::agreement::may_be_result;
use assay_wire::attestation::{AttestationAnswer, AttestationRequest};
use futures_util::future::join_all;
use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// All of them.
pub(super) struct CoVerifiers {
    each: Vec<CoVerifier>,
    /// The leading verifier is about to be sent evidence.
    wanted: watch::Sender<()>,
}

struct CoVerifier {
    client: AttestationClient,
    heard: watch::Sender<Heard>,
}

/// What was heard of one of them.
#[derive(Debug, Default, PartialEq)]
struct Heard {
    /// When it last found the evidence good.
    at: Option<Instant>,
    /// The last try failed, or it is over: nobody waits for it.
    away: bool,
    result: Option<HeldResult>,
}

#[derive(Debug, PartialEq)]
struct HeldResult {
    text: String,
    /// After that the admission would gain little by it.
    until: Instant,
}

impl Heard {
    /// Whether there is nothing to wait for: it was heard of since then, or does not answer.
    fn is_settled(&self, since: Instant) -> bool {
        self.away || self.is_fresh(since)
    }

    fn is_fresh(&self, since: Instant) -> bool {
        self.at.is_some_and(|at| at >= since)
    }

    fn result(&self, now: Instant) -> Option<String> {
        self.result.as_ref().filter(|held| now < held.until).map(|held| held.text.clone())
    }

    /// Takes a good answer. One without a result has not seen all of the measurement list yet.
    fn renewed(&mut self, result: Option<String>, next: &AttestationRequest, now: Instant) {
        self.away = false;
        match result {
            Some(text) => {
                // A nonce lives as long as a result: half of that is left when this one is passed on last.
                let until = now + Duration::from_secs(next.expires_in_seconds.min(LONGEST_LIFE_SECONDS)) / 2;
                *self = Self { at: Some(now), away: false, result: Some(HeldResult { text, until }) };
            }
            None if next.after_ms > 0 => self.at = Some(now),
            None => {}
        }
    }
}

impl CoVerifiers {
    /// Clients for them. They connect only when called.
    pub(super) fn new(verifiers: &[CoAttestation]) -> Result<Self, rustls::Error> {
        let each = verifiers.iter().map(|verifier| {
            let client = AttestationClient::supporting(verifier)?;
            Ok(CoVerifier { client, heard: watch::Sender::default() })
        });
        Ok(Self { each: each.collect::<Result<_, rustls::Error>>()?, wanted: watch::Sender::default() })
    }

    pub(super) fn clients(&self) -> impl Iterator<Item = &AttestationClient> {
        self.each.iter().map(|verifier| &verifier.client)
    }

    /// The results to send with evidence for the leading verifier: whoever was not heard of lately is asked first, and
    /// waited for, if it answered the last time, for a moment.
    pub(super) async fn fresh_results(&self) -> Vec<String> {
        let since = before(Instant::now(), FRESH);
        self.wanted.send_replace(());
        let mut heard: Vec<_> = self.each.iter().map(|verifier| verifier.heard.subscribe()).collect();
        // Not what it gives: that is a lock, and would be held until the last of them is settled.
        let settled =
            async |heard: &mut watch::Receiver<Heard>| heard.wait_for(|heard| heard.is_settled(since)).await.is_ok();
        let settled = join_all(heard.iter_mut().map(settled));
        // Late or not: what is there is what is sent.
        let _in_time = timeout(MOMENT, settled).await.is_ok();
        let now = Instant::now();
        self.each.iter().filter_map(|verifier| verifier.heard.borrow().result(now)).collect()
    }

    /// Attests to each of them, for ever; `over` is told of the one, by its place, that vouches no more.
    pub(super) async fn follow<T: Tpm>(
        &self,
        prover: &Prover<T>,
        measurements: &Path,
        over: impl Fn(usize),
    ) -> Infallible {
        let over = &over;
        let each = self.each.iter().enumerate().map(|(place, verifier)| async move {
            let reasons = verifier.follow(prover, MeasurementReader::new(measurements), self.wanted.subscribe()).await;
            let address = verifier.client.address();
            for reason in reasons {
                let reason = crate::client::printable(&reason);
                tracing::error!(event = "agent.co_verifier_over", verifier = %address, reason,
                    "the project's verifier at {address} vouches no more: {reason}");
            }
            over(place);
        });
        join_all(each).await;
        std::future::pending().await
    }
}

impl CoVerifier {
    /// Attests until this verifier says that it is over, and why.
    async fn follow<T: Tpm>(
        &self,
        prover: &Prover<T>,
        mut measurements: MeasurementReader,
        mut wanted: watch::Receiver<()>,
    ) -> Vec<String> {
        let mut patience = Patience::default();
        let mut next: Option<Round> = None;
        loop {
            if let Some(round) = &next {
                self.due_or_wanted(round, &mut wanted).await;
            }
            let asking = self.ask(prover, &mut measurements, next.take());
            let failed = match timeout(ANSWER_LIMIT, asking).await {
                Ok(Ok(AttestationAnswer::Renewed { result, next: request, .. })) => {
                    patience = Patience::default();
                    self.renewed(result, &request);
                    let round = Round::new(request);
                    next = Some(Round { due: round.due.max(Instant::now() + LEAST_WAIT), ..round });
                    continue;
                }
                Ok(Ok(AttestationAnswer::Revoked { reasons })) => return self.over(reasons),
                Ok(Err(error)) => match error.refusal() {
                    Refusal::Over | Refusal::Unattested => return self.over(vec![Chain(&error).to_string()]),
                    Refusal::Away | Refusal::Broken => Chain(&error).to_string(),
                },
                Err(_elapsed) => format!("no answer in {} s", ANSWER_LIMIT.as_secs()),
            };
            self.failed(&failed);
            sleep(patience.next_delay(random())).await;
        }
    }

    /// Waits until it wants evidence, or the leading verifier is to be sent some and this one was not heard of lately.
    async fn due_or_wanted(&self, round: &Round, wanted: &mut watch::Receiver<()>) {
        loop {
            tokio::select! {
                () = sleep_until(round.due) => return,
                _asked = wanted.changed() => {}
            }
            if !self.heard.borrow().is_fresh(before(Instant::now(), FRESH)) {
                return;
            }
        }
    }

    async fn ask<T: Tpm>(
        &self,
        prover: &Prover<T>,
        measurements: &mut MeasurementReader,
        round: Option<Round>,
    ) -> Result<AttestationAnswer, AskError> {
        let request = match round {
            Some(round) => round.request,
            None => self.client.challenge().await?,
        };
        let evidence = prover.evidence(measurements, &request)?;
        Ok(self.client.submit(&evidence).await?)
    }

    fn renewed(&self, result: Option<String>, next: &AttestationRequest) {
        let was_away = self.heard.borrow().away;
        // What can be none would have the leading verifier refuse all of the evidence.
        let result = result.filter(|text| may_be_result(text));
        self.heard.send_modify(|heard| heard.renewed(result, next, Instant::now()));
        if was_away {
            let address = self.client.address();
            tracing::info!(event = "agent.co_verifier_back", verifier = %address, "the project's verifier at {address} answers again");
        }
    }

    /// Said once, until it answers again.
    fn failed(&self, why: &str) {
        let mut was_away = false;
        self.heard.send_modify(|heard| was_away = std::mem::replace(&mut heard.away, true));
        if !was_away {
            let address = self.client.address();
            tracing::warn!(event = "agent.co_verifier_away", verifier = %address, "the project's verifier at {address}: {why}");
        }
    }

    fn over(&self, reasons: Vec<String>) -> Vec<String> {
        self.heard.send_replace(Heard { away: true, ..Heard::default() });
        reasons
    }
}

/// Why one of them was not attested to.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Call(#[from] CallError),
    /// It asks for what is not there, or the TPM failed: the leading verifier's evidence will tell.
    #[error(transparent)]
    Evidence(#[from] AttestationError),
}

impl AskError {
    fn refusal(&self) -> Refusal {
        match self {
            Self::Call(error) => Refusal::of(error),
            Self::Evidence(_) => Refusal::Broken,
        }
    }
}

/// `ago` before `now`; a machine that runs for less than that has no such moment, and then it is the first there is.
fn before(now: Instant, ago: Duration) -> Instant {
    now.checked_sub(ago).unwrap_or(now)
}

/// A result that is younger is not asked for again.
const FRESH: Duration = Duration::from_secs(5);
/// How long the leading verifier's evidence waits for others.
const MOMENT: Duration = Duration::from_secs(2);
/// How long one of them may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// None of them keeps the TPM busy.
const LEAST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_LIFE_SECONDS: u64 = 24 * 60 * 60;
