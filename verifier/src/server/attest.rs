//! The agents' side of continuous attestation, exactly as [`assay_wire::attestation`] has it: challenge, push, notices.
//!
//! What closes what: a nonce that is not out, or a quote for another one, renews nothing and ends nothing (the agent asks
//! for a challenge). Evidence that the node's TPM signed and that is not good ends the admission. Anything that is
//! wrong here (the database, the policy, a panic) renews nothing, and what is not renewed ends by itself.
//!
//! Where this verifier leads, a fresh result goes to isolation and imaging, with the results of other verifiers that the
//! agent brought: they are not believed here, and one that is missing holds nothing up. Where it supports, its result
//! goes back to the agent.

use super::extract::{BearerProof, Named, Text, parse_json};
use super::verdicts::case_with;
use super::{Verifier, computed, db_failed, policy_refused};
use crate::attestation::appraise::{Decision, RuntimeCase, appraise_runtime};
use crate::attestation::pushes::Recorded;
use crate::attestation::register::{Attested, Known, Progress};
use crate::attestation::{ending, renewed_claims};
use crate::policy::Policy;
use crate::reappraisal::{Again, Reappraisal, ReappraisedWord, reappraise};
use crate::release::journal::ReleaseStep;
use crate::session::{IssuedNonce, Nonce, Proof};
use crate::store::attestations::{Part, PushRecord};
use crate::store::events::{EventKind, notices_of};
use assay_service::error::ApiError;
use assay_wire::agreement::{MAX_SUPPORTING, MAX_SUPPORTING_BYTES, may_be_result};
use assay_wire::attestation::{AttestationAnswer, AttestationRequest, RevocationNotices};
use assay_wire::evidence::{QUOTED_PCRS, RuntimeEvidence};
use assay_wire::id::AdmissionId;
use assay_wire::isolation::Renewal;
use assay_wire::result::Submod;
use axum::Json;
use axum::extract::{Query, State};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

/// How large evidence at run time may be as JSON: a megabyte of measurements in base64, and change.
pub const MAX_RUNTIME_EVIDENCE_BYTES: usize = 2 << 20;

/// The agent asks what to send next. What another verifier has recorded is read first.
#[utoipa::path(post, path = "/agent/v1/attestations/{admission}/challenge", tag = "agent",
    params(("admission" = String, Path, description = "admission")), responses(
    (status = 200, body = AttestationRequest),
    (status = 403, description = "wrong proof, or `admission-ended`", body = assay_wire::problem::Problem),
    (status = 409, description = "`not-handed-over`", body = assay_wire::problem::Problem),
))]
pub(crate) async fn challenge(
    State(verifier): State<Arc<Verifier>>,
    Named(admission): Named<AdmissionId>,
    BearerProof(proof): BearerProof,
) -> Result<Json<AttestationRequest>, ApiError> {
    let now_ms = verifier.clock.now_ms();
    let known = attested_node(&verifier, admission, &proof).await?;
    ask(&verifier, &known.attested, &known.progress, now_ms, 0).map(Json).ok_or_else(no_nonce)
}

/// Evidence at run time: renewed, or cut off.
#[utoipa::path(post, path = "/agent/v1/attestations/{admission}", tag = "agent", request_body = RuntimeEvidence,
    params(("admission" = String, Path, description = "admission")), responses(
    (status = 200, body = AttestationAnswer),
    (status = 400, description = "`too-many-results`, `not-a-result`", body = assay_wire::problem::Problem),
    (status = 403, description = "wrong proof", body = assay_wire::problem::Problem),
    (status = 409, description = "`no-nonce`: ask for a challenge; `not-vouched-for`: nothing is renewed now", body = assay_wire::problem::Problem),
))]
pub(crate) async fn push(
    State(verifier): State<Arc<Verifier>>,
    Named(admission): Named<AdmissionId>,
    BearerProof(proof): BearerProof,
    Text(body): Text<MAX_RUNTIME_EVIDENCE_BYTES>,
) -> Result<Json<AttestationAnswer>, ApiError> {
    let now_ms = verifier.clock.now_ms();
    let known = match verifier.attestations.register.get(admission, now_ms) {
        Some(known) => authenticated(known, &proof)?,
        None => read_again(&verifier, admission, &proof, now_ms).await?,
    };
    if let Some(reasons) = over(&known, now_ms) {
        return Ok(Json(AttestationAnswer::Revoked { reasons }));
    }
    let mut evidence: RuntimeEvidence = parse_json(&body)?;
    let supporting = supporting(&mut evidence.supporting)?;
    let nonce = verifier.attestations.register.take_nonce(admission, now_ms).ok_or_else(no_nonce)?;
    let (known, policy) = match judged_by_todays_policy(&verifier, known, now_ms).await? {
        Ok(judged) => judged,
        Err(answer) => return Ok(Json(answer)),
    };
    let Known { attested, progress, .. } = known;
    let now_seconds = now_ms.div_euclid(1000);
    let (case_of, seen, large) = (Arc::clone(&attested), progress.seen.clone(), body.len() > LARGE_BYTES);
    let tee_collateral = Arc::clone(&verifier.tee_collateral);
    let decide = move || {
        let case = RuntimeCase {
            baseline: &case_of.baseline,
            seen: &seen,
            nonce: &nonce,
            evidence: &evidence,
            policy: &policy,
            tee_collateral: &tee_collateral,
            now_seconds,
        };
        appraise_runtime(&case)
    };
    // A signature takes less than handing it to another thread; a long list does not.
    let decision = if large { computed("appraising evidence at run time", decide).await? } else { decide() };
    let pushed = Pushed { nonce, supporting, now_ms };
    conclude(&verifier, &attested, progress, pushed, decision).await.map(Json)
}

/// The notices of the node's project.
#[utoipa::path(get, path = "/agent/v1/attestations/{admission}/notices", tag = "agent",
    params(("admission" = String, Path, description = "admission"), NoticeQuery), responses(
    (status = 200, body = RevocationNotices),
    (status = 403, description = "wrong proof, or `admission-ended`", body = assay_wire::problem::Problem),
))]
pub(crate) async fn notices(
    State(verifier): State<Arc<Verifier>>,
    Named(admission): Named<AdmissionId>,
    BearerProof(proof): BearerProof,
    Query(query): Query<NoticeQuery>,
) -> Result<Json<RevocationNotices>, ApiError> {
    let now_ms = verifier.clock.now_ms();
    let known = match verifier.attestations.register.get(admission, now_ms) {
        Some(known) => authenticated(known, &proof)?,
        None => read_again(&verifier, admission, &proof, now_ms).await?,
    };
    if let Some(reasons) = over(&known, now_ms) {
        return Err(ApiError::forbidden("admission-ended", reasons.join("; ")));
    }
    let project = &known.attested.project;
    let mut counters = verifier.store.counters().subscribe();
    let name = notices_of(project);
    let wait = Duration::from_secs(query.wait_seconds.unwrap_or(LONG_POLL_SECONDS).min(LONG_POLL_SECONDS));
    let beyond = counters.wait_for(|counters| counters.get(&name).is_some_and(|latest| *latest > query.after));
    // Too late or nobody counts any more: the database has the answer either way.
    let _moved = tokio::time::timeout(wait, beyond).await.is_ok();
    let notices = verifier.store.notices(project, query.after).await.map_err(db_failed)?;
    let latest = notices.last().map_or(query.after, |notice| notice.sequence);
    Ok(Json(RevocationNotices { latest, notices }))
}

/// `?after=N&wait_seconds=S`.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoticeQuery {
    /// The latest sequence number that is known already.
    #[serde(default)]
    after: u64,
    /// How long to wait for one; 25 at most, and by default.
    #[serde(default)]
    wait_seconds: Option<u64>,
}

/// A node whose admission stands, read from the record; for whoever gives it something.
pub(super) async fn attested_node(
    verifier: &Verifier,
    admission: AdmissionId,
    proof: &Proof,
) -> Result<Known, ApiError> {
    let now_ms = verifier.clock.now_ms();
    let known = read_again(verifier, admission, proof, now_ms).await?;
    match over(&known, now_ms) {
        None => Ok(known),
        Some(reasons) => Err(ApiError::forbidden("admission-ended", reasons.join("; "))
            .with_hint("the node boots through the airlock again to be admitted")),
    }
}

/// What is on record, whatever this process remembers; the agent's token is checked against it.
async fn read_again(
    verifier: &Verifier,
    admission: AdmissionId,
    proof: &Proof,
    now_ms: i64,
) -> Result<Known, ApiError> {
    let unknown = || ApiError::not_found(format!("there is no attested admission {admission}"));
    let stored = verifier.store.attestation(admission).await.map_err(db_failed)?.ok_or_else(unknown)?;
    if !stored.attested.proof.matches(proof) {
        return Err(wrong_proof(admission));
    }
    match stored.release {
        // None: another verifier leads, and this one has vouched since its verdict.
        None | Some(ReleaseStep::HandedOver) => {}
        Some(
            step @ (ReleaseStep::Admitted
            | ReleaseStep::Exported
            | ReleaseStep::Ready
            | ReleaseStep::Moved
            | ReleaseStep::Granted),
        ) => {
            return Err(ApiError::conflict("not-handed-over", format!("the release is {step}")));
        }
        Some(ReleaseStep::Unwinding | ReleaseStep::Unwound) => {
            return Err(ApiError::forbidden("admission-ended", "the release was undone"));
        }
    }
    let (register, endings) = (&verifier.attestations.register, &verifier.attestations.endings);
    let mut known = register.put(stored.attested, stored.progress, stored.ended, now_ms);
    // An end that is under way here need not be on record yet.
    if let Some(reasons) = endings.under_way(admission) {
        register.end(admission, &reasons);
        known.ended.get_or_insert(reasons);
    }
    Ok(known)
}

fn authenticated(known: Known, proof: &Proof) -> Result<Known, ApiError> {
    if known.attested.proof.matches(proof) { Ok(known) } else { Err(wrong_proof(known.attested.admission)) }
}

fn wrong_proof(admission: AdmissionId) -> ApiError {
    tracing::warn!(event = "agent.unauthorized", %admission, "a call with the wrong proof");
    ApiError::forbidden("wrong-proof", "the proof is not that of the session that led to this admission")
}

/// Why an admission is over: it was ended, or nothing renewed it in time.
fn over(known: &Known, now_ms: i64) -> Option<Vec<String>> {
    let expired = || (now_ms >= known.progress.expires_at_ms).then(|| vec!["the admission has expired".to_owned()]);
    known.ended.clone().or_else(expired)
}

fn no_nonce() -> ApiError {
    ApiError::conflict("no-nonce", "this verifier has no nonce out for this admission: ask for a challenge")
}

/// A new nonce, for evidence that is wanted `after_ms` from now.
fn ask(
    verifier: &Verifier,
    attested: &Attested,
    progress: &Progress,
    now_ms: i64,
    after_ms: i64,
) -> Option<AttestationRequest> {
    let life_ms = verifier.attestations.times.silence_ms;
    let nonce = Nonce::random();
    let issued = IssuedNonce { nonce, issued_at_ms: now_ms, expires_at_ms: now_ms.saturating_add(life_ms) };
    verifier.attestations.register.issue(attested.admission, issued).then(|| AttestationRequest {
        nonce: nonce.as_bytes().to_vec(),
        pcrs: QUOTED_PCRS.collect(),
        expires_in_seconds: u64::try_from(life_ms / 1000).unwrap_or(0),
        ima_first_entry: progress.seen.ima.entries(),
        after_ms: u64::try_from(after_ms).unwrap_or(0),
    })
}

/// Makes sure that the boot evidence is good under the policy that judges today. The answer instead, if it is not.
async fn judged_by_todays_policy(
    verifier: &Arc<Verifier>,
    known: Known,
    now_ms: i64,
) -> Result<Result<(Known, Arc<Policy>), AttestationAnswer>, ApiError> {
    let policy = verifier.attestations.policy(&verifier.store, now_ms).await.map_err(policy_refused)?;
    let policy = policy.ok_or_else(|| not_vouched_for("no policy is active"))?;
    let digest = policy.digest().to_string();
    if known.progress.policy == digest {
        return Ok(Ok((known, policy)));
    }
    let attested = Arc::clone(&known.attested);
    match reappraised(verifier, &attested, Arc::clone(&policy)).await? {
        Ok(submod) => {
            let admission = attested.admission;
            verifier.store.record_reappraisal(admission, &digest, &submod).await.map_err(db_failed)?;
            let progress = Progress { policy: digest, submod, ..known.progress };
            Ok(Ok((Known { attested, progress, ended: None }, policy)))
        }
        Err(reasons) => {
            let named = |reason| format!("policy `{}`, active now: {reason}", policy.name());
            Ok(Err(cut_off(verifier, &attested, reasons.into_iter().map(named).collect())))
        }
    }
}

/// Appraises the evidence that admitted the node, as it is in the archive, by today's policy.
async fn reappraised(
    verifier: &Arc<Verifier>,
    attested: &Arc<Attested>,
    policy: Arc<Policy>,
) -> Result<Result<Submod, Vec<String>>, ApiError> {
    let archived = verifier.store.evidence(attested.evidence).await.map_err(db_failed)?;
    let archived = archived.ok_or_else(|| not_vouched_for("the evidence at boot is no longer in the archive"))?;
    let case = case_with(verifier, archived).await?;
    let _slot = verifier.slots.appraisals.acquire().await.map_err(|error| ApiError::internal("appraising", &error))?;
    let (tee_collateral, now_seconds) = (Arc::clone(&verifier.tee_collateral), verifier.clock.now_seconds());
    let again = computed("appraising boot evidence again", move || {
        let again = Again { policy: Some(&policy), now_seconds, tee_collateral: Some(&tee_collateral) };
        reappraise(&case, &again)
    });
    let Reappraisal { verdict, reasons, unrecorded, submod, .. } = again.await?.map_err(db_failed)?;
    match (verdict, submod) {
        (ReappraisedWord::Rejected, _) => Ok(Err(reasons)),
        (ReappraisedWord::Accepted, Some(submod)) => Ok(Ok(submod)),
        (ReappraisedWord::Accepted, None) => Err(not_vouched_for("the appraisal of the boot evidence is empty")),
        (ReappraisedWord::Undecided, _) => Err(not_vouched_for(unrecorded.join("; "))),
    }
}

/// What came with evidence and is not appraised.
struct Pushed {
    nonce: Nonce,
    /// Results of other verifiers.
    supporting: Vec<String>,
    now_ms: i64,
}

/// Does what was decided. A result is signed only once the push is on record.
async fn conclude(
    verifier: &Verifier,
    attested: &Attested,
    progress: Progress,
    pushed: Pushed,
    decision: Decision,
) -> Result<AttestationAnswer, ApiError> {
    let Pushed { nonce, supporting, now_ms } = pushed;
    let (admission, times) = (attested.admission, verifier.attestations.times);
    let now_seconds = now_ms.div_euclid(1000);
    let (seen, warnings, whole) = match decision {
        Decision::Renew { seen, warnings } => (seen, warnings, true),
        Decision::GoOn { seen, warnings } => (seen, warnings, false),
        Decision::Stale => return Err(no_nonce()),
        Decision::Withhold(why) => return Err(not_vouched_for(why)),
        Decision::Revoke(reasons) => return Ok(cut_off(verifier, attested, reasons)),
    };
    let mut progress = Progress { sequence: progress.sequence.saturating_add(1), seen, ..progress };
    if whole {
        progress.last_seen_at_ms = Some(now_ms);
        // Results count in whole seconds: what the agent is told is what the result says.
        progress.expires_at_ms = now_seconds.saturating_mul(1000).saturating_add(times.silence_ms);
    }
    let next_expected_at_ms = now_ms.saturating_add(times.interval_ms);
    let record = PushRecord { admission, progress: progress.clone(), warnings, next_expected_at_ms };
    match verifier.attestations.pushes.record(record).await {
        Recorded::Yes => {}
        Recorded::Superseded => {
            verifier.attestations.register.forget(admission);
            return Err(no_nonce());
        }
        Recorded::No => {
            return Err(ApiError::unavailable("not-recorded", "the evidence could not be recorded: try again"));
        }
    }
    verifier.attestations.register.advance(admission, progress.clone());
    // Ended while it was being recorded: nothing is asked for, and nothing passed on.
    let after_ms = if whole { times.interval_ms } else { 0 };
    let next = ask(verifier, attested, &progress, now_ms, after_ms).ok_or_else(no_nonce)?;
    let expires_at_ms = progress.expires_at_ms;
    let mut handed_back = None;
    if whole {
        let claims = renewed_claims(attested, &progress, nonce.as_bytes(), now_seconds);
        let result = verifier.signer.sign(&claims).as_str().to_owned();
        match attested.part {
            Part::Leads => {
                let renewal = Renewal { admission, result, supporting };
                let pass_on = || verifier.attestations.renewals.pass_on(renewal, expires_at_ms);
                if !verifier.attestations.register.unless_over(admission, pass_on) {
                    return Err(no_nonce());
                }
            }
            // The agent hands it to the verifier that leads.
            Part::Supports => handed_back = Some(result),
        }
    }
    Ok(AttestationAnswer::Renewed { expires_at_ms, next, result: handed_back })
}

/// Takes the results of other verifiers out of evidence. They are passed on unread, so they are bounded first: if there
/// are too many, or one that can be none, nothing of the evidence is looked at.
pub(super) fn supporting(results: &mut Vec<String>) -> Result<Vec<String>, ApiError> {
    if results.len() > MAX_SUPPORTING {
        let detail = format!("{} supporting results are more than {MAX_SUPPORTING}", results.len());
        return Err(ApiError::bad_request("too-many-results", detail));
    }
    if let Some(number) = results.iter().position(|result| !may_be_result(result)) {
        let detail =
            format!("supporting result {} is none, or has more than {MAX_SUPPORTING_BYTES} octets", number + 1);
        return Err(ApiError::bad_request("not-a-result", detail));
    }
    Ok(std::mem::take(results))
}

/// Ends the admission.
fn cut_off(verifier: &Verifier, attested: &Attested, reasons: Vec<String>) -> AttestationAnswer {
    let reasons = crate::verdict::printable(&reasons);
    verifier.attestations.endings.begin(ending(attested, EventKind::AdmissionRevoked, reasons.clone()));
    AttestationAnswer::Revoked { reasons }
}

fn not_vouched_for(why: impl Into<String>) -> ApiError {
    let why = why.into();
    tracing::warn!(event = "attestation.withheld", why, "nothing is renewed");
    ApiError::conflict("not-vouched-for", format!("nothing is renewed: {why}"))
        .with_hint("the admission ends at its expiry unless this changes")
}

const LONG_POLL_SECONDS: u64 = 25;
/// Bodies from here on are appraised on a thread of their own.
const LARGE_BYTES: usize = 64 * 1024;
