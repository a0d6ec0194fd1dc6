//! Continuous attestation on nodes without firmware: how fast bad evidence cuts a node off, and that silence does.

use super::attacks::{NODE, expect_closed};
use super::bench::{Bench, STATE_LIMIT};
use super::soft::{SoftBoot, SoftFirmware, SoftTenant, trust_soft_firmware};
use crate::command::wait_until;
use crate::error::{LabError, Result};
use crate::netns::Netns;
use crate::probe::Probe;
use crate::site::PROBE_INTERFACE;
use assay_ovsdb::{Limits, Ovsdb};
use assay_ramdisk_agent::attestation::verifier::AttestationClient;
use assay_ramdisk_agent::attestation::{Attester, Places, runtime_evidence};
use assay_ramdisk_agent::ima::MeasurementReader;
use assay_ramdisk_agent::tpm::Tpm as _;
use assay_ramdisk_agent::tpm::esapi::EsapiTpm;
use assay_wire::attestation::AttestationAnswer;
use serde_json::{Value, json};
use std::net::SocketAddrV4;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Child;
use tokio::sync::oneshot;

/// Bad evidence, again and again: from when it is sent, how long until the switch has the port in quarantine, until
/// the last frame came through, and until the gateway has cut the iSCSI session that a real initiator keeps busy.
pub(super) async fn revocations(bench: &Bench, runs: u32) -> Result<()> {
    let firmware = SoftFirmware::new();
    trust_soft_firmware(bench, NODE, &firmware).await?;
    let network = bench.network()?;
    let stations = bench.site.project(network.project.as_str())?;
    let mut cuts = Vec::new();
    for run in 1..=runs {
        let boot = SoftBoot::cycle(bench, NODE, &firmware).await?;
        let tenant = boot.run_to_handover().await?;
        bench.services.wait_for_state(NODE, "allocated", STATE_LIMIT).await?;
        let probe = Probe::start(&tenant.segment, PROBE_INTERFACE, &stations.peer);
        let cut = cut_off(bench, &tenant, &probe, &stations.gateway).await?;
        let status = bench.services.wait_for_state(NODE, "rejected", STATE_LIMIT).await?;
        expect_closed(&status)?;
        bench.events.lab(
            "node.cut_off",
            &json!({ "node": NODE, "run": run, "port_ms": cut.port_ms, "frames_ms": cut.frames_ms,
                "session_ms": cut.session_ms, "reasons": cut.reasons }),
        );
        bench.tell(&format!(
            "  {run}: port in quarantine after {:.0} ms, last frame after {:.0} ms, iSCSI session cut after {:.0} ms: {}",
            cut.port_ms,
            cut.frames_ms,
            cut.session_ms,
            cut.reasons.join("; ")
        ));
        cuts.push(cut);
    }
    let summary = |name: &str, value: fn(&CutOff) -> f64| {
        let mut values: Vec<f64> = cuts.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        json!({ "what": name, "p50_ms": percentile(&values, 50), "p99_ms": percentile(&values, 99),
            "most_ms": values.last() })
    };
    let both = |cut: &CutOff| cut.port_ms.max(cut.frames_ms).max(cut.session_ms);
    let figures = json!({ "runs": runs, "figures": [
        summary("port", |cut| cut.port_ms), summary("frames", |cut| cut.frames_ms),
        summary("session", |cut| cut.session_ms), summary("all", both),
    ] });
    bench.events.lab("cut_offs.measured", &figures);
    for figure in figures.get("figures").and_then(Value::as_array).into_iter().flatten() {
        bench.tell(&format!("  bad evidence → cut off, {runs} runs: {figure}"));
    }
    Ok(())
}

/// The agent dies: the admission ends when its last renewal does, and the port closes.
pub(super) async fn silence(bench: &Bench) -> Result<()> {
    let firmware = SoftFirmware::new();
    trust_soft_firmware(bench, NODE, &firmware).await?;
    let boot = SoftBoot::cycle(bench, NODE, &firmware).await?;
    let tenant = boot.run_to_handover().await?;
    bench.services.wait_for_state(NODE, "allocated", STATE_LIMIT).await?;
    let run = bench.site.folder.join("tenant-run");
    let (stop, stopped) = oneshot::channel::<()>();
    let SoftTenant { segment, tcti, state, .. } = tenant;
    let admission = state.admission;
    let agent = tokio::spawn(async move {
        let failed = LabError::service("attesting for a soft node");
        let places = Places { run, hooks: NOWHERE.into(), measurements: NOWHERE.into(), ..Places::default() };
        segment
            .act(AGENT_LIMIT, move || async move {
                let tpm = EsapiTpm::open(&tcti).map_err(LabError::service("opening the soft node's TPM"))?;
                let attester = Attester::new(state, tpm, places).map_err(failed)?;
                tokio::select! {
                    ended = attester.run() => Err(LabError::unexpected("attesting", format!("it ended: {ended:?}"))),
                    // It dies in the middle of whatever it does.
                    _ = stopped => Ok(()),
                }
            })
            .await
    });
    // Longer than what one renewal is good for: it is the renewals that keep it alive.
    bench.services.wait_for_renewals(NODE, RENEWALS, RENEWAL_LIMIT).await?;
    let status = bench.services.node(NODE).await?;
    if status.get("state").and_then(Value::as_str) != Some("allocated") {
        return Err(LabError::unexpected("renewing", format!("the node is not allocated: {status}")));
    }
    bench.events.lab("node.renewed", &json!({ "node": NODE, "renewals": RENEWALS }));
    let _it_ended = stop.send(());
    agent.await.map_err(LabError::service("waiting for the soft node's agent"))??;
    let silent = Instant::now();
    let status = bench.services.wait_for_state(NODE, "rejected", SILENCE_LIMIT).await?;
    expect_closed(&status)?;
    let took = silent.elapsed().as_secs_f64();
    wait_until("waiting for the silent node's export to be closed", STATE_LIMIT, || async {
        let exports = bench.services.client(&["export", "list"]).await.ok()?;
        exports.as_array().is_some_and(Vec::is_empty).then_some(())
    })
    .await?;
    bench.events.lab("silence.closed", &json!({ "node": NODE, "admission": admission, "seconds": took }));
    bench.tell(&format!("  {RENEWALS} renewals, then silence: port and export closed after {took:.1} s"));
    Ok(())
}

/// How long one revocation took, from when bad evidence was sent.
struct CutOff {
    port_ms: f64,
    frames_ms: f64,
    session_ms: f64,
    reasons: Vec<String>,
}

async fn cut_off(bench: &Bench, tenant: &SoftTenant, probe: &Probe, gateway: &Netns) -> Result<CutOff> {
    let position = bench.events.position();
    let mut initiator = busy_initiator(tenant)?;
    // A connection that is not logged in has no session, and may hang in its login when the port closes; an initiator that
    // is cut off makes another one at once. What is timed is the end of this session's connection.
    let session = wait_until("waiting for the initiator's session", STATE_LIMIT, || async {
        let established = gateway.act(CUT_LIMIT, || async { established_sessions() }).await.ok()?;
        let logged_in = bench.events.since(position);
        let mut logged_in = logged_in.iter().filter(|event| event.name() == "portal.logged_in");
        logged_in.find_map(|event| event.text("peer")?.parse().ok().filter(|peer| established.contains(peer)))
    })
    .await?;
    let began = probe.now();
    wait_until("waiting for frames of an admitted node", STATE_LIMIT, || async {
        probe.sightings().iter().any(|sighting| sighting.seen > began).then_some(())
    })
    .await?;
    // All three watch before anything happens.
    let port = port_closes(bench).await?;
    let watching = gateway.clone();
    let session = tokio::spawn(async move { watching.act(CUT_LIMIT, move || session_ends(session)).await });
    let sent = bad_evidence(tenant).await?;
    let port_closed = port.await.map_err(LabError::service("watching the port"))??;
    let session_ended = session.await.map_err(LabError::service("watching the session"))??;
    let _it_may_have_ended = initiator.kill().await;
    // The probe's clock began when it did: translate. A frame that is under way is seen within this.
    let (now, probe_now) = (Instant::now(), probe.now());
    let last = probe.sightings().iter().map(|sighting| sighting.seen).max().unwrap_or_default();
    let last_seen = now.checked_sub(probe_now.saturating_sub(last)).unwrap_or(now);
    let since = |moment: Instant| moment.saturating_duration_since(sent).as_secs_f64() * 1000.0;
    let attestation = bench.services.attestation(NODE).await?;
    let reasons = attestation.get("reasons").and_then(Value::as_array).into_iter().flatten();
    let reasons = reasons.filter_map(Value::as_str).map(str::to_owned).collect();
    Ok(CutOff { port_ms: since(port_closed), frames_ms: since(last_seen), session_ms: since(session_ended), reasons })
}

/// Renews once, then extends a PCR behind everybody's back and attests again. Answers when that was sent.
async fn bad_evidence(tenant: &SoftTenant) -> Result<Instant> {
    let (tcti, state) = (tenant.tcti.clone(), tenant.state.clone());
    tenant
        .segment
        .act(CUT_LIMIT, move || async move {
            let doing = "attesting for a soft node";
            let mut tpm = EsapiTpm::open(&tcti).map_err(LabError::service(doing))?;
            tpm.load_ak(state.ak.clone()).map_err(LabError::service(doing))?;
            let client = AttestationClient::leading(&state).map_err(LabError::service(doing))?;
            let request = client.challenge().await.map_err(LabError::service(doing))?;
            // Its kernel keeps no list.
            let mut list = MeasurementReader::new(NOWHERE);
            let evidence = runtime_evidence(&mut tpm, &mut list, &request).map_err(LabError::service(doing))?;
            let next = match client.submit(&evidence).await.map_err(LabError::service(doing))? {
                AttestationAnswer::Renewed { next, .. } => next,
                AttestationAnswer::Revoked { reasons } => {
                    return Err(LabError::unexpected(doing, format!("good evidence was refused: {reasons:?}")));
                }
            };
            tpm.pcr_extend(12, [0x55; 32]).map_err(LabError::service(doing))?;
            let evidence = runtime_evidence(&mut tpm, &mut list, &next).map_err(LabError::service(doing))?;
            let sent = Instant::now();
            // The port may close before the answer is through: then it is not heard, and the verifier's record tells.
            match tokio::time::timeout(ANSWER_LIMIT, client.submit(&evidence)).await {
                Ok(Ok(AttestationAnswer::Renewed { .. })) => {
                    Err(LabError::unexpected(doing, "bad evidence was believed"))
                }
                Ok(Ok(AttestationAnswer::Revoked { .. }) | Err(_)) | Err(_) => Ok(sent),
            }
        })
        .await
}

/// An initiator that reads without pause: libiscsi's, with the grant.
fn busy_initiator(tenant: &SoftTenant) -> Result<Child> {
    let grant = &tenant.grant;
    let url =
        format!("iscsi://{}%{}@{}/{}/{}", grant.chap_name, grant.chap_secret, grant.portal, grant.target, grant.lun);
    let mut initiator = tenant.segment.command("iscsi-perf");
    initiator.args(["-i", grant.initiator.as_str(), "-m", "1", "-t", "600", &url]);
    initiator.stdout(Stdio::null()).stderr(Stdio::null());
    initiator.spawn().map_err(LabError::io("starting iscsi-perf (package libiscsi-bin)"))
}

/// Watches the switch's database until the node's port is in the quarantine VLAN.
async fn port_closes(bench: &Bench) -> Result<tokio::task::JoinHandle<Result<Instant>>> {
    let port = bench.site.node(NODE)?.port.clone();
    let quarantine = u64::from(bench.site.topology.quarantine_vlan.get());
    let doing = format!("watching the port {port}");
    let switch = Ovsdb::connect(&bench.site.switch.ovsdb_socket(), Limits::default()).await;
    let switch = switch.map_err(LabError::service(doing.clone()))?;
    Ok(tokio::spawn(async move {
        let select = json!({ "op": "select", "table": "Port", "where": [["name", "==", port]], "columns": ["tag"] });
        let closed = || async {
            let answer = switch.transact("Open_vSwitch", vec![select.clone()]).await.ok()?;
            let tag = answer.first()?.pointer("/rows/0/tag")?.as_u64()?;
            (tag == quarantine).then(Instant::now)
        };
        wait_quickly(&doing, closed).await
    }))
}

/// Waits, inside the gateway's namespace, until the session with that peer is no more.
async fn session_ends(peer: SocketAddrV4) -> Result<Instant> {
    let ended = || async { (!established_sessions().ok()?.contains(&peer)).then(Instant::now) };
    wait_quickly("waiting for the iSCSI session to be cut", ended).await
}

/// The peers of established connections to this thread's port 3260 (`/proc/net/tcp`: local address, remote address,
/// state).
fn established_sessions() -> Result<Vec<SocketAddrV4>> {
    let path = "/proc/thread-self/net/tcp";
    let table = std::fs::read_to_string(path).map_err(LabError::io(format!("reading {path}")))?;
    Ok(table.lines().filter_map(session_peer).collect())
}

fn session_peer(line: &str) -> Option<SocketAddrV4> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, remote, state) = (words.next()?, words.next()?, words.next()?);
    let (address, port) = remote.split_once(':').filter(|_| local.ends_with(":0CBC") && state == "01")?;
    // The address as it lies in memory, read as a number; the port is one.
    let address = u32::from_str_radix(address, 16).ok()?.to_ne_bytes();
    Some(SocketAddrV4::new(address.into(), u16::from_str_radix(port, 16).ok()?))
}

/// Asks every millisecond.
async fn wait_quickly<T, F, Fut>(doing: &str, mut probe: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + CUT_LIMIT;
    let mut pace = tokio::time::interval(Duration::from_millis(1));
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    while Instant::now() < deadline {
        if let Some(answer) = probe().await {
            return Ok(answer);
        }
        pace.tick().await;
    }
    let hint = "the condition never held".to_owned();
    Err(LabError::Timeout { doing: doing.to_owned(), waited: CUT_LIMIT, hint })
}

/// The smallest value that `percent` of the sorted values do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// A path where nothing is.
const NOWHERE: &str = "/nonexistent";
/// More than one result's life, at one a second.
const RENEWALS: u64 = 15;
const AGENT_LIMIT: Duration = Duration::from_secs(180);
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
const CUT_LIMIT: Duration = Duration::from_secs(60);
const RENEWAL_LIMIT: Duration = Duration::from_secs(90);
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_established_connections_to_the_portal() {
        let line =
            |local: &str, state: &str| format!("   1: 0100140A:{local} 3200140A:9C40 {state} 00000000:00000000 00");
        assert_eq!(session_peer(&line("0CBC", "01")), Some(SocketAddrV4::new([10, 20, 0, 50].into(), 40_000)));
        assert_eq!(session_peer(&line("0CBC", "0A")), None);
        assert_eq!(session_peer(&line("20FB", "01")), None);
        assert_eq!(session_peer("  sl  local_address rem_address   st tx_queue"), None);
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99)), (Some(50.0), Some(99.0)));
        assert_eq!((percentile(&[7.0], 99), percentile(&[], 50)), (Some(7.0), None));
    }
}
