//! What the death of a verifier leaves of continuous attestation, and whom a revocation reaches: real verifiers, which die
//! as a power cut would have them (`std::process::abort`), on SQLite, where the same is started again, and on PostgreSQL,
//! where another takes over.

#![expect(clippy::unwrap_used, reason = "a test's set-up fails loudly")]

use assay_qemu_lab::command::wait_until;
use assay_qemu_lab::fleet::{Answer, FleetNode, FleetSite, Renewed, SiteOptions, VerifierProcess};
use assay_ramdisk_agent::attestation::state::AttestationState;
use assay_ramdisk_agent::attestation::{Attester, Ended, Places};
use assay_ramdisk_agent::client::Client;
use assay_ramdisk_agent::tpm::esapi::EsapiTpm;
use assay_service::CancellationToken;
use assay_service::testing::TestDatabase;
use assay_tpm::public::Public;
use assay_tpm::testing::{NetworkTpm, sha256};
use assay_wire::attestation::{RevocationNotice, RevocationNotices};
use assay_wire::id::AdmissionId;
use serde_json::Value;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::task::JoinSet;

/// Longer than anything here takes; on a busy machine, too.
const LIMIT: Duration = Duration::from_secs(60);

/// A site whose one verifier dies, and on PostgreSQL another, which does not.
struct Bench {
    site: FleetSite,
    doomed: VerifierProcess,
    other: Option<VerifierProcess>,
    _folder: TempDir,
    _database: Option<TestDatabase>,
}

impl Bench {
    async fn start(database: Option<TestDatabase>, interval_seconds: u64, more_ek_cas: Vec<u8>) -> Self {
        let assay = Path::new(env!("CARGO_BIN_EXE_qemu-lab")).with_file_name("assay");
        assert!(assay.exists(), "{} is not there: run the tests of the whole workspace", assay.display());
        let folder = tempfile::tempdir().unwrap();
        let url = database.as_ref().map(|database| database.url().to_owned());
        let folder_of_site = folder.path().join("site");
        let options =
            SiteOptions { assay, folder: folder_of_site, database: url.clone(), interval_seconds, more_ek_cas };
        let (site, doomed) = FleetSite::start(options).await.unwrap();
        let other = match url {
            Some(_) => {
                Some(VerifierProcess::start("other", &site.options, &site.peers, Some(&doomed), "").await.unwrap())
            }
            None => None,
        };
        Self { site, doomed, other, _folder: folder, _database: database }
    }

    /// Plays `case` on every database that is there, at the same time.
    async fn on_each<F>(case: impl Fn(Self, &'static str) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut running = JoinSet::new();
        running.spawn(case(Self::start(None, 5, Vec::new()).await, "SQLite"));
        if let Some(database) = TestDatabase::postgresql() {
            running.spawn(case(Self::start(Some(database), 5, Vec::new()).await, "PostgreSQL"));
        }
        while let Some(played) = running.join_next().await {
            played.unwrap();
        }
    }

    /// The doomed verifier will die at one of these points.
    async fn doom(&mut self, failpoints: &str) {
        if self.doomed.pid().is_some() {
            self.doomed.kill().await.unwrap();
        }
        self.doomed.start_again(failpoints).await.unwrap();
    }

    /// Waits until the doomed verifier is dead.
    async fn dead(&mut self) {
        self.doomed.ended().await.unwrap();
    }

    /// Who goes on: the other one, or the same again.
    async fn heir(&mut self) -> &VerifierProcess {
        if self.other.is_none() {
            self.doomed.start_again("").await.unwrap();
        }
        self.other.as_ref().unwrap_or(&self.doomed)
    }

    /// A node that was renewed once, at both.
    async fn renewed_node(&self, name: &str) -> FleetNode {
        let mut node = self.site.admit_one(name, &[&self.doomed]).await.unwrap();
        assert_eq!(node.attest(&self.doomed).await, Answer::Renewed, "{name}");
        self.renewed_to(&node, Renewed { isolation: 1, imaging: 1 }).await;
        node
    }

    async fn renewed_to(&self, node: &FleetNode, wanted: Renewed) {
        wait_until("waiting for the renewals", LIMIT, || async {
            (self.site.peers.renewed(node.admission()) == wanted).then_some(())
        })
        .await
        .unwrap();
    }
}

/// What a verifier has on record of a node.
async fn record(verifier: &VerifierProcess, node: &str) -> Value {
    let records: Value = verifier.operator().unwrap().get(&format!("/v1/attestations/{node}")).await.unwrap();
    records[0].clone()
}

/// Waits until a verifier has on record that a node is cut off. Answers why.
async fn ended(verifier: &VerifierProcess, node: &str, limit: Duration) -> String {
    let record = wait_until("waiting for the end on record", limit, || async {
        let record = record(verifier, node).await;
        (record["state"] == "ended").then_some(record)
    });
    record.await.unwrap_or_else(|error| panic!("{node}: {error}"))["reasons"].to_string()
}

/// The words of the events of an admission's end: one, whoever was told how often.
async fn ends(verifier: &VerifierProcess, admission: AdmissionId) -> Vec<String> {
    let events: Value = verifier.operator().unwrap().get("/v1/events?limit=1000").await.unwrap();
    let of_it = events.as_array().unwrap().iter().filter(|event| event["admission"] == admission.to_string());
    let words = of_it.map(|event| event["event"].as_str().unwrap().to_owned());
    words.filter(|word| word.starts_with("admission.")).collect()
}

/// How an end that a death interrupted comes to be finished.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Finished {
    /// It was on record.
    FromTheRecord,
    /// isolation was told, and says so to whoever follows its admissions.
    FromIsolation,
    /// Nobody knows of it but imaging, or nobody at all: the node shows again what it is. It cannot show anything else, since
    /// no PCR can be taken back without a reset, which the TPM counts; and a node that shows nothing ends by silence.
    ByTheNextEvidence,
}

/// Where a verifier dies while it ends an admission: points; whether port and disk are open then, where that is certain;
/// and what finishes it.
type Death = (&'static str, [Option<bool>; 2], Finished);

/// Before anything; then after each of the three effects that are had side by side, the others held back in turn; then
/// after all of them, and after the last word.
const DEATHS: [Death; 8] = [
    ("before-fence=return", [Some(true), Some(true)], Finished::ByTheNextEvidence),
    ("hold-record=return;hold-sever=return;port-closed=return", [Some(false), Some(true)], Finished::FromIsolation),
    (
        "hold-record=return;hold-fence=return;disk-severed=return",
        [Some(true), Some(false)],
        Finished::ByTheNextEvidence,
    ),
    ("hold-fence=return;hold-sever=return;recorded=return", [Some(true), Some(true)], Finished::FromTheRecord),
    ("hold-fence=return;recorded=return", [Some(true), None], Finished::FromTheRecord),
    ("hold-sever=return;recorded=return", [None, Some(true)], Finished::FromTheRecord),
    ("fenced=return", [Some(false), Some(false)], Finished::FromTheRecord),
    ("ended=return", [Some(false), Some(false)], Finished::FromTheRecord),
];

fn points(of: &str) -> String {
    of.split(';').map(|point| format!("attestation::{point}")).collect::<Vec<_>>().join(";")
}

async fn revocation_survives(bench: &mut Bench, on: &str, number: usize, (at, open, finished): Death) {
    let (name, case) = (format!("n{number}"), format!("died at {at} on {on}"));
    bench.doom(&points(at)).await;
    let mut node = bench.renewed_node(&name).await;
    let admission = node.admission();
    node.extend(7, sha256(b"another key"));
    let answer = node.attest(&bench.doomed).await;
    // The word and the death are a race.
    assert!(matches!(answer, Answer::Revoked(_) | Answer::Unanswered), "{answer:?}, {case}");
    bench.dead().await;
    let alone = bench.other.is_none();
    let (port, export) = (bench.site.peers.port_is_open(admission), bench.site.peers.export_is_open(admission));
    for (open, is) in open.into_iter().zip([port, export]) {
        // Another verifier may have finished it by now.
        assert!(open.is_none_or(|open| open == is || !alone), "port {port}, export {export}, {case}");
    }
    let told_before = bench.site.peers.revocations(admission).len();
    let heir = bench.heir().await;
    if finished == Finished::ByTheNextEvidence {
        let Answer::Revoked(reasons) = node.attest(heir).await else { panic!("not revoked, {case}") };
        assert!(reasons.iter().any(|reason| reason.contains("PCR 7")), "{reasons:?}, {case}");
    }
    let why = ended(heir, &name, LIMIT).await;
    assert!(why.contains("PCR 7"), "{why}, {case}");
    // Another verifier hears from isolation that the port is closed before it is on record why, and leaves that to whoever
    // had it closed.
    assert_eq!(why.contains("isolation has ended"), finished == Finished::FromIsolation, "{why}, {case}");
    let word = if finished == Finished::FromIsolation { "admission.ended" } else { "admission.revoked" };
    assert_eq!(ends(heir, admission).await, [word], "{case}");
    // It is over for the node, too, and was not renewed by anybody.
    assert_eq!(node.attest(heir).await, Answer::Refused("admission-ended".to_owned()), "{case}");
    assert_eq!(record(heir, &name).await["pushes"], 1, "{case}");
    let peers = &bench.site.peers;
    assert_eq!(peers.renewed(admission), Renewed { isolation: 1, imaging: 1 }, "{case}");
    assert!(!peers.port_is_open(admission) && !peers.export_is_open(admission), "{case}");
    let told = peers.revocations(admission);
    assert!(told.iter().all(|reason| reason.contains("PCR 7")), "{told:?}, {case}");
    // What may not have been done is done again.
    let again = usize::from(alone && at != "ended=return");
    assert!(told.len() >= told_before.max(1) && told.len() >= again + told_before, "{told:?}, {case}");
    assert_eq!(peers.violations(), Vec::<String>::new(), "{case}");
}

#[tokio::test(flavor = "multi_thread")]
async fn d4_a_revocation_is_finished_wherever_its_verifier_dies() {
    Bench::on_each(|mut bench, on| async move {
        for (number, death) in DEATHS.into_iter().enumerate() {
            revocation_survives(&mut bench, on, number, death).await;
        }
    })
    .await;
}

/// The worst of those deaths, of a node that is never heard of again: the disk is gone, the port is open, and nothing is
/// on record.
#[tokio::test(flavor = "multi_thread")]
async fn d4_a_revocation_that_nobody_knows_of_ends_by_silence() {
    Bench::on_each(|mut bench, on| async move {
        bench.doom(&points("hold-record=return;hold-fence=return;disk-severed=return")).await;
        let mut node = bench.renewed_node("n1").await;
        node.extend(7, sha256(b"another key"));
        let _lost = node.attest(&bench.doomed).await;
        bench.dead().await;
        let admission = node.admission();
        assert!(bench.site.peers.port_is_open(admission) && !bench.site.peers.export_is_open(admission), "on {on}");
        let heir = bench.heir().await;
        let why = ended(heir, "n1", LIMIT).await;
        assert!(why.contains("silence"), "{why}, on {on}");
        assert!(!bench.site.peers.port_is_open(admission), "on {on}");
        assert_eq!(bench.site.peers.violations(), Vec::<String>::new(), "on {on}");
    })
    .await;
}

/// Where a verifier dies while it renews an admission: the point; the pushes that are on record then; and whether a
/// relying party may have been told.
const LOST_RENEWALS: [(&str, u64, bool); 4] =
    [("before-push", 0, false), ("push-recorded", 1, false), ("before-renewal", 1, false), ("renewed", 1, true)];

async fn renewal_survives(bench: &mut Bench, on: &str, (at, pushes, told): (&str, u64, bool)) {
    let case = format!("died at {at} on {on}");
    bench.doom(&format!("attestation::{at}=return")).await;
    let mut node = bench.site.admit_one(at, &[&bench.doomed]).await.unwrap();
    let admission = node.admission();
    let answer = node.attest(&bench.doomed).await;
    // Results are passed on after the answer, in batches.
    let answered = matches!(at, "before-renewal" | "renewed");
    assert_eq!(answer, if answered { Answer::Renewed } else { Answer::Unanswered }, "{case}");
    bench.dead().await;
    let before = bench.site.peers.renewed(admission);
    assert_eq!(before != Renewed::default(), told, "{before:?}, {case}");
    let heir = bench.heir().await;
    assert_eq!(record(heir, at).await["pushes"], pushes, "{case}");
    // What was recorded and not passed on is not passed on by the heir: the next evidence is.
    assert_eq!(node.attest(heir).await, Answer::Renewed, "{case}");
    let seen = record(heir, at).await;
    assert_eq!((&seen["pushes"], &seen["state"]), (&Value::from(pushes + 1), &Value::from("standing")), "{case}");
    let after = Renewed { isolation: before.isolation + 1, imaging: before.imaging + 1 };
    bench.renewed_to(&node, after).await;
    let peers = &bench.site.peers;
    assert!(peers.port_is_open(admission) && peers.export_is_open(admission), "{case}");
    assert_eq!(peers.violations(), Vec::<String>::new(), "{case}");
}

#[tokio::test(flavor = "multi_thread")]
async fn d4_what_was_not_recorded_renews_nothing_and_the_next_evidence_does() {
    Bench::on_each(|mut bench, on| async move {
        for lost in LOST_RENEWALS {
            renewal_survives(&mut bench, on, lost).await;
        }
    })
    .await;
}

/// A node with a TPM of its own and the agent's own code, in folders of its own.
struct AgentNode {
    name: &'static str,
    tpm: NetworkTpm,
    folder: TempDir,
    places: Places,
    stop: CancellationToken,
}

impl AgentNode {
    fn manufacture(name: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let hooks = folder.path().join("revocation.d");
        fs::create_dir(&hooks).unwrap();
        let hook = hooks.join("10-drop-keys");
        // A name that the folder never has before all of the notice is there.
        let script = format!("#!/bin/sh\nset -e\ncp \"$1\" {0}/new\nmv {0}/new {0}/dropped\n", folder.path().display());
        fs::write(&hook, script).unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        let (run, measurements) = (folder.path().join("run"), folder.path().join("none"));
        let places = Places { run, hooks, measurements, ..Places::default() };
        Self { name, tpm: NetworkTpm::start(), folder, places, stop: CancellationToken::new() }
    }

    async fn hand_over(
        &self,
        site: &FleetSite,
        project: &str,
        [verifier, later]: [&VerifierProcess; 2],
    ) -> AttestationState {
        site.peers.lease_to(self.name, project).unwrap();
        let mut tpm = EsapiTpm::open(&self.tpm.tcti()).unwrap();
        site.hand_over(self.name, &mut tpm, verifier, later).await.unwrap()
    }

    /// Attests, on a thread of its own, until it is revoked or stopped. (A TPM is used by one thread.)
    fn attest(&self, state: AttestationState) -> JoinHandle<Option<Ended>> {
        let (tcti, places, stop) = (self.tpm.tcti(), self.places.clone(), self.stop.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let attester = Attester::new(state, EsapiTpm::open(&tcti).unwrap(), places).unwrap();
                tokio::select! {
                    ended = attester.run() => Some(ended.unwrap()),
                    () = stop.cancelled() => None,
                }
            })
        })
    }

    /// The notice of a node, as the agent wrote it.
    fn notice_of(&self, node: &str) -> PathBuf {
        self.places.run.join(format!("revoked/{node}.json"))
    }

    /// What its hook was started with.
    fn dropped(&self) -> Option<RevocationNotice> {
        serde_json::from_slice(&fs::read(self.folder.path().join("dropped")).ok()?).ok()
    }

    /// Something is measured that no admitted node may measure.
    fn measure_something(&self) {
        let extension = format!("7:sha256={}", hex::encode(sha256(b"another key")));
        let tool = Command::new("tpm2_pcrextend").arg(extension).env("TPM2TOOLS_TCTI", self.tpm.tcti()).output();
        let tool = tool.unwrap();
        assert!(tool.status.success(), "{}", String::from_utf8_lossy(&tool.stderr));
    }
}

/// All notices that there are for a node, at once.
async fn notices_for(state: &AttestationState) -> Vec<RevocationNotice> {
    let mut client = Client::new(SocketAddr::V4(state.relay), state.pin).unwrap();
    client.set_bearer(state.proof.clone());
    let path = format!("/agent/v1/attestations/{}/notices?after=0&wait_seconds=0", state.admission);
    client.get::<RevocationNotices>(&path).await.unwrap().notices
}

/// What a project's other nodes may count on: a notice, its file and the hooks, whoever of the site's verifiers they ask.
/// What the revoked node itself may count on is nothing: it hears why while it can be heard, as here, and may be cut off
/// before it does.
async fn revoked_node_is_told_of(database: Option<TestDatabase>) {
    let nodes = ["n1", "n2", "n3"].map(AgentNode::manufacture);
    let cas = nodes.iter().flat_map(|node| node.tpm.ek_cas()).flatten().copied().collect();
    let bench = Bench::start(database, 2, cas).await;
    // n2 asks another verifier than n1, where there is one.
    let (first, other) = (&bench.doomed, bench.other.as_ref().unwrap_or(&bench.doomed));
    let mut states = Vec::new();
    for (node, project, later) in [(0, "alpha", first), (1, "alpha", other), (2, "beta", first)] {
        states.push(nodes[node].hand_over(&bench.site, project, [first, later]).await);
    }
    let mut running: Vec<_> = nodes.iter().zip(&states).map(|(node, state)| node.attest(state.clone())).collect();
    for state in &states {
        wait_until("waiting for the nodes to be renewed", LIMIT, || async {
            (bench.site.peers.renewed(state.admission).isolation > 1).then_some(())
        })
        .await
        .unwrap();
    }
    nodes[0].measure_something();
    let closed = || async { (!bench.site.peers.port_is_open(states[0].admission)).then(Instant::now) };
    let closed = wait_until("waiting for n1 to be cut off", LIMIT, closed).await.unwrap();
    let heard = wait_until("waiting for n2 to hear of it", LIMIT, || async { nodes[1].dropped() }).await.unwrap();
    let took = closed.elapsed();
    // A long poll that nothing ends takes 25 s.
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!((heard.sequence, heard.node.as_str(), heard.admission), (1, "n1", states[0].admission));
    assert_eq!(heard.ak_name, Public::parse(&states[0].ak.public).unwrap().name().to_string());
    assert!(heard.reason.contains("PCR 7"), "{}", heard.reason);
    let written: RevocationNotice = serde_json::from_slice(&fs::read(nodes[1].notice_of("n1")).unwrap()).unwrap();
    assert_eq!(written, heard);
    // n1 heard why, and did for itself what the others do about it.
    let ended = tokio::task::spawn_blocking({
        let own = running.remove(0);
        move || own.join().unwrap()
    });
    let Some(Ended::Revoked { reasons }) = tokio::time::timeout(LIMIT, ended).await.unwrap().unwrap() else {
        panic!("n1 was not told");
    };
    assert!(reasons.iter().any(|reason| reason.contains("PCR 7")), "{reasons:?}");
    let own = nodes[0].dropped().unwrap();
    assert_eq!((own.sequence, own.admission), (0, states[0].admission));
    // n2 goes on, and knows of n1 alone; beta's n3 has heard nothing, and there is nothing for it to hear.
    assert_eq!(notices_for(&states[1]).await, [heard]);
    assert_eq!(notices_for(&states[2]).await, []);
    assert!(nodes[2].dropped().is_none() && !nodes[2].notice_of("n1").exists());
    for state in &states[1..] {
        assert!(bench.site.peers.port_is_open(state.admission) && bench.site.peers.export_is_open(state.admission));
    }
    assert_eq!(bench.site.peers.violations(), Vec::<String>::new());
    for (node, running) in nodes[1..].iter().zip(running) {
        node.stop.cancel();
        assert_eq!(running.join().unwrap(), None, "{} ended by itself", node.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_nodes_project_hears_of_it_and_nobody_else() {
    revoked_node_is_told_of(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_nodes_project_hears_of_it_from_another_verifier() {
    let Some(database) = TestDatabase::postgresql() else { return };
    revoked_node_is_told_of(Some(database)).await;
}
