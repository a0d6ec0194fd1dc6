//! Attacks that no PCR shows, through the verifier's API with a real software TPM: a TPM that is reset by itself and
//! filled by software (B11), and one that resumed from sleep (B12).

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_tpm::testing::KeyKind;
use assay_verifier::api::{LearnRequest, PolicyDraft, PolicyRecord, PolicyRequest};
use assay_wire::agent::Verdict;
use site::{Agent, Site};
use support::{artefacts, boot_log};

/// The machine is powered off and on, and boots what it should; or, which looks the same to every PCR, its TPM alone is
/// reset and software extends what that boot would have.
fn reset_and_boot(agent: &mut Agent, site: &Site) {
    agent.tpm.tool("tpm2_shutdown", &["--clear"]);
    boot_again(agent, site);
}

fn boot_again(agent: &mut Agent, site: &Site) {
    agent.tpm.cut_power();
    let _ = agent.tpm.create_ek(KeyKind::Rsa);
    agent.ak_public = agent.tpm.create_ak(KeyKind::Ecc);
    agent.boot(&boot_log(), &site.keys);
}

/// A site whose policy is learnt from the node's first boot.
async fn site_and_agent() -> (Site, Agent) {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    agent.boot(&boot_log(), &site.keys);
    lease(&site, 1);
    let (_, verdict) = agent.attest(&site).await;
    assert!(matches!(verdict, Verdict::Rejected { .. }), "accepted without a policy");
    let request = LearnRequest {
        node: "n1".parse().unwrap(),
        name: None,
        artefacts: serde_json::to_value(artefacts()).unwrap(),
        artefacts_signature: None,
        from_rejected: false,
    };
    let draft: PolicyDraft = site.operator.post("/v1/policies/learn", &request).await.unwrap();
    assert!(draft.document.contains("startup_locality = 0"), "{}", draft.document);
    let request = PolicyRequest { name: Some("default".to_owned()), document: draft.document, signature: None };
    let _: PolicyRecord = site.operator.post("/v1/policies", &request).await.unwrap();
    (site, agent)
}

/// Isolation orders a boot, the `machine_resets`th reset of the machine.
fn lease(site: &Site, machine_resets: u64) {
    site.lease("n1");
    site.peers.airlock.lock().unwrap().get_mut("n1").unwrap().machine_resets = Some(machine_resets);
}

async fn reasons(agent: &Agent, site: &Site) -> Vec<String> {
    match agent.attest(site).await.1 {
        Verdict::Rejected { reasons } => reasons,
        other => panic!("not rejected: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn b11_pcrs_that_software_filled_after_a_reset_of_the_tpm_are_refused() {
    let (site, mut agent) = site_and_agent().await;
    // Within one boot.
    reset_and_boot(&mut agent, &site);
    let found = reasons(&agent, &site).await;
    assert!(found.len() == 1 && found[0].contains("reset 1 times within one boot"), "{found:?}");
    // However often it asks.
    assert_eq!(reasons(&agent, &site).await, found);
    // In a new boot, of which isolation knows one reset.
    reset_and_boot(&mut agent, &site);
    reset_and_boot(&mut agent, &site);
    lease(&site, 2);
    let found = reasons(&agent, &site).await;
    assert!(found.len() == 1 && found[0].contains("reset 2 times and the machine 1 times"), "{found:?}");
    assert_eq!(reasons(&agent, &site).await, found);
    // As many as isolation knows of: another attempt may have come to nothing.
    reset_and_boot(&mut agent, &site);
    reset_and_boot(&mut agent, &site);
    lease(&site, 4);
    let verdict = agent.attest(&site).await.1;
    assert!(matches!(verdict, Verdict::Accepted), "{verdict:?}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b11_a_tpm_that_was_not_reset_by_the_boot_that_isolation_ordered_is_refused() {
    let (site, agent) = site_and_agent().await;
    lease(&site, 2);
    let found = reasons(&agent, &site).await;
    assert!(found.len() == 1 && found[0].contains("the TPM was not reset since the quote before"), "{found:?}");
    assert_eq!(reasons(&agent, &site).await, found);
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn b12_a_tpm_that_was_restarted_and_not_reset_is_refused() {
    let (site, mut agent) = site_and_agent().await;
    reset_and_boot(&mut agent, &site);
    // What an operating system does before it sleeps; the power that comes back is no TPM reset then.
    agent.tpm.tool("tpm2_shutdown", &[]);
    boot_again(&mut agent, &site);
    lease(&site, 2);
    let found = reasons(&agent, &site).await;
    assert!(found.iter().any(|reason| reason.contains("restarted 1 times since its reset")), "{found:?}");
    site.stop().await;
}
