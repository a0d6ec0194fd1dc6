//! Archived evidence appraised again by whoever does so: `assay policy try`, `assay verdict explain` and `replay`, and
//! the verifier itself when its policy changes while nodes are up. What was good stays good, what is bad is refused for
//! the reason that it would be refused for live, and what older versions did not keep is neither.
//!
//! The quote of a trust domain is a real one, from the package of `dcap-qvl` in Cargo's registry. Nobody here can make
//! one that is bound to a TPM of the test's, so by a policy that demands one the best there is is refused for that and
//! nothing else: its signature, its collateral and its time were then found good.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_service::clock::{Clock, SystemClock};
use assay_service::testing::database_in;
use assay_tpm::testing::KeyKind;
use assay_verifier::api::{
    Again, AllowRequest, CaseFile, Explanation, LearnRequest, PolicyDraft, PolicyRecord, PolicyRequest, Reappraisal,
    ReappraisedWord, TryAnswer, TryRequest, VerdictRecord,
};
use assay_verifier::policy::Policy;
use assay_verifier::policy::signature::PolicyKeys;
use assay_verifier::reappraisal::reappraise;
use assay_verifier::tee::{read_folder, samples};
use assay_wire::agent::Verdict;
use assay_wire::attestation::AttestationAnswer;
use assay_wire::evidence::{TeeKind, TeeQuote};
use serde_json::{Value, json};
use site::{Agent, AgentSession, Pusher, Site, release};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use support::{artefacts, boot_log};

/// The machine's clock, shifted.
struct ShiftedClock(AtomicI64);

impl ShiftedClock {
    fn starting_at(seconds: i64) -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(seconds * 1000 - SystemClock.now_ms())))
    }
}

impl Clock for ShiftedClock {
    fn now_ms(&self) -> i64 {
        SystemClock.now_ms() + self.0.load(Ordering::SeqCst)
    }
}

fn lease(site: &Site, machine_resets: u64) {
    site.lease("n1");
    site.peers.airlock.lock().unwrap().get_mut("n1").unwrap().machine_resets = Some(machine_resets);
}

/// Boots with so many resets of the TPM.
fn boot(agent: &mut Agent, site: &Site, tpm_resets: u32) {
    for _ in 0..tpm_resets {
        agent.tpm.tool("tpm2_shutdown", &["--clear"]);
        agent.tpm.cut_power();
    }
    let _ = agent.tpm.create_ek(KeyKind::Rsa);
    agent.ak_public = agent.tpm.create_ak(KeyKind::Ecc);
    agent.boot(&boot_log(), &site.keys);
}

/// Enrols, activates and sends evidence with quotes of trust domains.
async fn attest(agent: &Agent, site: &Site, tee: &[TeeQuote]) -> (AgentSession, Verdict) {
    let session = agent.session(site).await.unwrap();
    let mut evidence = agent.evidence(&session.nonce);
    evidence.tee = tee.to_vec();
    let client = site.agent_client(&session.proof);
    let verdict = client.post(&session.path("evidence"), &evidence).await.unwrap();
    (session, verdict)
}

fn refused(verdict: Verdict) -> Vec<String> {
    match verdict {
        Verdict::Rejected { reasons } => reasons,
        other => panic!("not rejected: {other:?}"),
    }
}

/// The policy that the node's last evidence teaches.
async fn learn(site: &Site) -> Policy {
    let request = LearnRequest {
        node: "n1".parse().unwrap(),
        name: None,
        artefacts: serde_json::to_value(artefacts()).unwrap(),
        artefacts_signature: None,
        from_rejected: true,
    };
    let draft: PolicyDraft = site.operator.post("/v1/policies/learn", &request).await.unwrap();
    Policy::parse(&draft.document).unwrap()
}

/// The same policy under another name, with more in it.
fn policy(from: &Policy, name: &str, change: impl FnOnce(&mut Value)) -> Policy {
    let mut json: Value = serde_json::from_str(&from.to_json()).unwrap();
    json["name"] = name.into();
    change(&mut json);
    Policy::from_json(&json.to_string()).unwrap()
}

async fn approve(site: &Site, policy: &Policy) {
    let request = PolicyRequest { document: policy.to_json(), ..PolicyRequest::default() };
    let _: PolicyRecord = site.operator.post("/v1/policies", &request).await.unwrap();
}

async fn tried(site: &Site, policy: &Policy) -> Reappraisal {
    let request = TryRequest { document: policy.to_json(), after: None };
    let mut answer: TryAnswer = site.operator.post("/v1/policies/try", &request).await.unwrap();
    answer.trials.remove(0).would
}

async fn explained(site: &Site) -> Explanation {
    site.operator.get("/v1/verdicts/n1/explanation").await.unwrap()
}

async fn exported(site: &Site) -> Value {
    site.operator.get("/v1/verdicts/n1/case").await.unwrap()
}

/// Offline, as of the verdict.
fn replayed(case: &Value, policy: &Policy, tee_collateral: Option<&Path>) -> Reappraisal {
    let case = CaseFile::from_json(&case.to_string()).unwrap();
    let given = tee_collateral.map(|folder| read_folder(folder).unwrap());
    let now_seconds = case.context.now_seconds;
    reappraise(&case, &Again { policy: Some(policy), now_seconds, tee_collateral: given.as_ref() }).unwrap()
}

fn says(again: &Reappraisal) -> (ReappraisedWord, Vec<String>) {
    (again.verdict, again.reasons.clone())
}

/// The admission that the last good verdict led to.
async fn released(site: &Site, agent: &Agent, session: &AgentSession) -> Pusher {
    release(site, agent, session).await;
    let record: VerdictRecord = site.operator.get("/v1/verdicts/n1").await.unwrap();
    Pusher::new(site, session, record.admission.unwrap())
}

/// Pushes until the verifier, which looks once a second, has judged by the policy of this digest.
async fn renewed_by(site: &Site, pusher: &Pusher, agent: &Agent, policy: &Policy) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        pusher.renewed(agent).await;
        let records: Vec<Value> = site.operator.get("/v1/attestations/n1").await.unwrap();
        if records[0]["policy"] == policy.digest().to_string() {
            return;
        }
        assert!(Instant::now() < deadline, "the new policy was not seen");
    }
}

/// Pushes until the verifier cuts the node off.
async fn revoked(pusher: &Pusher, agent: &Agent) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let wanted = pusher.challenge().await.unwrap();
        match pusher.push(agent, &wanted.nonce).await.unwrap() {
            AttestationAnswer::Revoked { reasons } => return reasons,
            AttestationAnswer::Renewed { .. } => assert!(Instant::now() < deadline, "the node was not cut off"),
        }
    }
}

fn named(policy: &Policy, reason: &str) -> String {
    format!("policy `{}`, active now: {reason}", policy.name())
}

/// A site whose policy is learnt from its node's first boot, and one that allows two resets of the TPM for a boot.
async fn two_policies() -> (Site, Agent, Policy, Policy) {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    agent.boot(&boot_log(), &site.keys);
    lease(&site, 1);
    attest(&agent, &site, &[]).await;
    let strict = learn(&site).await;
    let lax = policy(&strict, "lax", |json| json["boot"]["most_tpm_resets"] = 2.into());
    (site, agent, strict, lax)
}

/// What a version wrote that kept neither boot facts nor collateral.
fn of_an_older_version(case: &Value) -> Value {
    let mut old = case.clone();
    old["format"] = "assay-verdict/1".into();
    old.as_object_mut().unwrap().remove("tee_collateral");
    for context in ["/context", "/archived/context"] {
        let context = old.pointer_mut(context).unwrap().as_object_mut().unwrap();
        context.remove("boot").unwrap();
        context.remove("tee_collateral");
    }
    old
}

#[tokio::test(flavor = "multi_thread")]
async fn b11_the_counts_of_a_boot_are_judged_again_as_they_were() {
    let (site, mut agent, strict, lax) = two_policies().await;
    approve(&site, &strict).await;
    // Live.
    boot(&mut agent, &site, 2);
    lease(&site, 2);
    let live = refused(attest(&agent, &site, &[]).await.1);
    assert!(live.len() == 1 && live[0].contains("reset 2 times and the machine 1 times"), "{live:?}");
    let why = explained(&site).await;
    assert!(why.reproduced && why.unrecorded.is_empty(), "{why:?}");
    assert_eq!(why.deviations.iter().map(|found| found.rule.as_str()).collect::<Vec<_>>(), ["boot"]);
    let bad = (ReappraisedWord::Rejected, live.clone());
    let good = (ReappraisedWord::Accepted, Vec::new());
    let case = exported(&site).await;
    assert_eq!((says(&replayed(&case, &strict, None)), says(&tried(&site, &strict).await)), (bad.clone(), bad.clone()));
    assert_eq!((says(&replayed(&case, &lax, None)), says(&tried(&site, &lax).await)), (good.clone(), good.clone()));

    // Such a boot by a policy that allows it, and what each policy makes of it while the node is up.
    approve(&site, &lax).await;
    boot(&mut agent, &site, 2);
    lease(&site, 3);
    let (session, verdict) = attest(&agent, &site, &[]).await;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    let pusher = released(&site, &agent, &session).await;
    pusher.renewed(&agent).await;
    assert!(explained(&site).await.reproduced);
    let case = exported(&site).await;
    assert_eq!((says(&replayed(&case, &lax, None)), says(&tried(&site, &lax).await)), (good.clone(), good));
    assert_eq!((says(&replayed(&case, &strict, None)), says(&tried(&site, &strict).await)), (bad.clone(), bad));
    let renamed = policy(&lax, "lax too", |_| {});
    approve(&site, &renamed).await;
    renewed_by(&site, &pusher, &agent, &renamed).await;
    approve(&site, &strict).await;
    assert_eq!(revoked(&pusher, &agent).await, [named(&strict, &live[0])]);
    site.stop().await;

    // Of an older version: by a rule that is no stricter the verdict stands, by any other nobody knows.
    let old = of_an_older_version(&case);
    let stands = replayed(&old, &lax, None);
    assert_eq!((stands.verdict, stands.unrecorded.len(), stands.warnings.len()), (ReappraisedWord::Accepted, 0, 1));
    let unknown = replayed(&old, &strict, None);
    assert_eq!((says(&unknown), unknown.unrecorded.len()), ((ReappraisedWord::Undecided, Vec::new()), 1));
    // What is bad whatever the counts were is bad.
    let locality = policy(&lax, "locality", |json| json["boot"]["startup_locality"] = 4.into());
    let other = replayed(&old, &locality, None);
    assert_eq!((other.verdict, other.reasons.len()), (ReappraisedWord::Rejected, 1), "{other:?}");
    let judged = CaseFile::from_json(&old.to_string()).unwrap().policy.unwrap().admit(&PolicyKeys::default());
    assert_eq!(judged.unwrap().digest(), lax.digest());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_older_version_did_not_keep_accuses_no_node_that_is_up() {
    let (site, mut agent, strict, lax) = two_policies().await;
    approve(&site, &lax).await;
    boot(&mut agent, &site, 2);
    lease(&site, 2);
    let (session, verdict) = attest(&agent, &site, &[]).await;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    let pusher = released(&site, &agent, &session).await;
    pusher.renewed(&agent).await;
    forget_boot_facts(&site).await;
    // By a rule that is no stricter the verdict stands.
    let renamed = policy(&lax, "lax too", |_| {});
    approve(&site, &renamed).await;
    renewed_by(&site, &pusher, &agent, &renamed).await;
    let why = explained(&site).await;
    assert!(why.reproduced && why.unrecorded.is_empty(), "{why:?}");
    // By a stricter one nobody knows: nothing is renewed, and nobody is cut off for it.
    approve(&site, &strict).await;
    assert_eq!(tried(&site, &strict).await.verdict, ReappraisedWord::Undecided);
    let deadline = Instant::now() + Duration::from_secs(20);
    let refusal = loop {
        let wanted = pusher.challenge().await.unwrap();
        match pusher.push(&agent, &wanted.nonce).await {
            Ok(AttestationAnswer::Renewed { .. }) => assert!(Instant::now() < deadline, "the policy was not seen"),
            Ok(AttestationAnswer::Revoked { reasons }) => panic!("cut off: {reasons:?}"),
            refused @ Err(_) => break site::refusal(refused),
        }
    };
    assert_eq!((refusal.0, refusal.1.as_str()), (409, "not-vouched-for"), "{}", refusal.2);
    assert!(refusal.2.contains("was not kept with this verdict"), "{}", refusal.2);
    assert!(site.peers.calls().iter().all(|call| call.name != "revoke"));
    // The way back is the operator's.
    approve(&site, &lax).await;
    while pusher.push(&agent, &pusher.challenge().await.unwrap().nonce).await.is_err() {
        assert!(Instant::now() < deadline + Duration::from_secs(20), "the policy was not seen");
    }
    site.stop().await;
}

/// Makes the node's last verdict one of a version that kept no boot facts.
async fn forget_boot_facts(site: &Site) {
    let case = exported(site).await;
    let old = of_an_older_version(&case);
    sqlx::any::install_default_drivers();
    let database = sqlx::AnyPool::connect(&database_in(site.folder.path(), "verifier")).await.unwrap();
    let done = sqlx::query("UPDATE evidence SET context = $1 WHERE id = $2")
        .bind(old["archived"]["context"].to_string())
        .bind(case["archived"]["verdict"]["evidence"].as_str().unwrap())
        .execute(&database)
        .await
        .unwrap();
    assert_eq!(done.rows_affected(), 1);
    database.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quote_of_a_trust_domain_is_judged_again_with_the_collateral_of_then() {
    let Some(domain) = Domain::recorded() else { return };
    let mut agent = Agent::manufacture("n1");
    // Made today, and this verifier lives in the summer of the quote.
    agent.ek_certificate = Vec::new();
    let clock = ShiftedClock::starting_at(samples::GOOD_AT);
    let more = format!("tee_collateral_dir = \"{}\"", domain.collateral().display());
    let site = Site::start_with(&[], &more, Arc::clone(&clock) as Arc<dyn Clock>).await;
    let allow = AllowRequest { ek_sha256: agent.ek().to_string() };
    let _: Value = site.operator.put("/v1/identities/n1", &allow).await.unwrap();
    agent.boot(&boot_log(), &site.keys);
    lease(&site, 1);
    let quotes = [domain.quote.clone()];
    attest(&agent, &site, &quotes).await;
    let plain = learn(&site).await;
    let demanding = policy(&plain, "demanding", |json| json["tee"] = json!([domain.rule()]));
    let stranger = policy(&plain, "stranger", |json| {
        json["tee"] = json!([domain.rule()]);
        json["tee"][0]["mr_td"] = json!(["ab".repeat(48)]);
    });

    // A policy that demands none does not look at it.
    approve(&site, &plain).await;
    let (session, verdict) = attest(&agent, &site, &quotes).await;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    let pusher = released(&site, &agent, &session).await;
    pusher.renewed(&agent).await;
    let case = exported(&site).await;
    let unbound = (ReappraisedWord::Rejected, vec![UNBOUND.to_owned()]);
    let good = (ReappraisedWord::Accepted, Vec::new());
    assert_eq!(says(&tried(&site, &demanding).await), unbound);
    assert_eq!(says(&replayed(&case, &demanding, None)), unbound);
    assert_eq!((says(&tried(&site, &plain).await), says(&replayed(&case, &plain, None))), (good.clone(), good));
    let foreign = tried(&site, &stranger).await;
    assert!(foreign.reasons.len() == 2 && foreign.reasons[0].starts_with("MRTD is "), "{foreign:?}");

    // While the node is up, and live.
    approve(&site, &demanding).await;
    assert_eq!(revoked(&pusher, &agent).await, [named(&demanding, UNBOUND)]);
    assert_eq!(refused(attest(&agent, &site, &quotes).await.1), [UNBOUND]);
    assert!(explained(&site).await.reproduced);

    // A year later the collateral is out of date, and what it said then is as true as then.
    clock.0.fetch_add(365 * 86_400_000, Ordering::SeqCst);
    assert!(explained(&site).await.reproduced);
    assert_eq!(says(&tried(&site, &demanding).await), unbound);
    let late = refused(attest(&agent, &site, &quotes).await.1);
    assert!(late.len() == 1 && late[0].contains("is refused by each of 1 documents of collateral"), "{late:?}");
    assert!(explained(&site).await.reproduced);
    site.stop().await;

    offline(&case, &demanding, &domain);
}

/// A verdict's file that has the collateral, one that lost it, and one of an older version.
fn offline(case: &Value, demanding: &Policy, domain: &Domain) {
    let unbound = (ReappraisedWord::Rejected, vec![UNBOUND.to_owned()]);
    assert_eq!(case["tee_collateral"].as_array().unwrap().len(), 1);
    let mut lost = case.clone();
    lost.as_object_mut().unwrap().remove("tee_collateral");
    for file in [lost, of_an_older_version(case)] {
        let unknown = replayed(&file, demanding, None);
        assert_eq!(says(&unknown), (ReappraisedWord::Undecided, Vec::new()), "{unknown:?}");
        assert_eq!(unknown.unrecorded.len(), 1, "{unknown:?}");
        assert!(unknown.unrecorded[0].contains("--tee-collateral"), "{unknown:?}");
        assert_eq!(says(&replayed(&file, demanding, Some(&domain.collateral()))), unbound);
    }
    // Evidence without a quote needs no collateral to be refused.
    let mut none = of_an_older_version(case);
    none["archived"]["evidence"].as_object_mut().unwrap().remove("tee");
    let none = replayed(&none, demanding, None);
    assert_eq!(says(&none).1, ["evidence has no TDX quote, which the policy demands"]);
}

/// A trust domain's recorded quote, with a folder of collateral of its time.
struct Domain {
    quote: TeeQuote,
    folder: tempfile::TempDir,
}

impl Domain {
    fn recorded() -> Option<Self> {
        let sample = samples::folder()?;
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(sample.join("tdx_quote_collateral.json"), folder.path().join("tdx.json")).unwrap();
        let quote = std::fs::read(sample.join("tdx_quote")).unwrap();
        Some(Self { quote: TeeQuote { kind: TeeKind::Tdx, quote }, folder })
    }

    fn collateral(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// A rule that it meets, but for the binding.
    fn rule(&self) -> Value {
        // `TDREPORT` begins after the header's 48 octets, and MRTD 136 octets into it.
        let mr_td = hex::encode(&self.quote.quote[48 + 136..48 + 136 + 48]);
        json!({"kind": "tdx", "mr_td": [mr_td], "tcb_status": ["UpToDate", "SWHardeningNeeded", "OutOfDate"]})
    }
}

const UNBOUND: &str = "the TDX quote is not bound to this TPM and nonce: its report data is another";
