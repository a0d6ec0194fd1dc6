//! A node's life, over the real API, on a real switch.

mod support;

use assay_service::auth::Role;
use assay_service::client::ServiceClient;
use assay_wire::id::LeaseId;
use assay_wire::isolation::{BootRecords, NodeState, NodeStatus, PortIntent};
use assay_wire::result::{EarStatus, SignedResult, VerifierKey};
use ring::signature::Ed25519KeyPair;
use serde_json::{Value, json};
use support::{AIRLOCK, NET, QUARANTINE, Site, access, in_quarantine, is, other_boot, problem};

#[tokio::test]
async fn from_free_to_allocated_to_free() {
    let site = Site::start().await;
    let node = site.node().await;
    assert_eq!(node.state, NodeState::Free);
    assert!(in_quarantine(&node), "{node:?}");

    let context = site.airlocked().await;
    assert_eq!(site.bmc.read().asked, ["ForceOff", "pxe", "On"]);
    assert_eq!(site.port().await, (AIRLOCK, true));
    let records: BootRecords = site.service.get("/v1/boot-records").await.unwrap();
    assert_eq!((records.records[0].state, records.records[0].boot), (NodeState::Airlock, Some(context.boot)));

    let claims = site.claims(&context);
    let admission = site.admit(&claims).await.unwrap();
    assert_eq!((admission.id, admission.lease, admission.boot), (claims.jti, context.lease, context.boot));
    assert_eq!(site.port().await, (NET, false));
    let node = site.node().await;
    assert_eq!((node.state, node.nics[0].observed), (NodeState::Allocated, Some(access())));
    // Asking twice is asking once.
    assert_eq!(site.admit(&claims).await.unwrap(), admission);

    let ended: NodeStatus = site.operator.delete(&format!("/v1/leases/{}", context.lease), &()).await.unwrap();
    assert_eq!(ended.state, NodeState::Cleaning);
    assert_eq!(site.port().await, (QUARANTINE, true), "the lease was ended, so the port must be closed by now");
    let node = site.until("free", is(NodeState::Free)).await;
    assert!(in_quarantine(&node) && node.lease.is_none() && node.boot.is_none(), "{node:?}");
    assert!(!site.bmc.read().on);
    // The admission ended with the lease, and its result opens nothing any more.
    let refused = site.admit(&claims).await.unwrap_err();
    assert_eq!(problem(&refused).kind, "no-lease");
    assert!(site.operator.get::<Value>("/v1/admissions").await.unwrap()["admissions"][0]["revoked"].is_string());
}

#[tokio::test]
async fn only_a_trusted_result_for_this_node_lease_and_boot_moves_the_port() {
    let site = Site::start().await;
    let context = site.airlocked().await;
    let good = site.claims(&context);
    let document = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
    let stranger = Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap();
    let sign = |change: &dyn Fn(&mut assay_wire::result::Claims)| {
        let mut claims = good.clone();
        change(&mut claims);
        SignedResult::sign(&claims, &site.key)
    };
    let forged = format!("{}x", sign(&|_| ()).as_str());
    for (what, result, status) in [
        ("forged", SignedResult::from_wire(forged), 403),
        ("of an unknown verifier", SignedResult::sign(&good, &stranger), 403),
        ("expired", sign(&|c| c.exp = c.iat - 1), 403),
        ("from the future", sign(&|c| c.iat += 3600), 403),
        ("not affirming", sign(&|c| c.submods.values_mut().for_each(|s| s.status = EarStatus::Warning)), 403),
        ("of another node", sign(&|c| c.node = "n2".parse().unwrap()), 403),
        ("of another project", sign(&|c| c.project = "beta".parse().unwrap()), 403),
        ("of another boot", sign(&|c| c.boot = other_boot(&context).boot), 403),
        ("of another lease", sign(&|c| c.lease = LeaseId::random()), 409),
        ("no result", SignedResult::from_wire("x".into()), 400),
    ] {
        let refused = site.send(&result).await.unwrap_err();
        assert_eq!(problem(&refused).status, status, "a result {what}: {refused}");
        assert_eq!(site.port().await, (AIRLOCK, true), "a result {what} moved the port");
    }
    assert_eq!(site.node().await.state, NodeState::Airlock);
    // A project that trusts nobody admits nobody.
    let nobody: Vec<String> = Vec::new();
    let project = |keys| json!({"name": "alpha", "verifier_keys": keys});
    site.operator.post::<_, Value>("/v1/projects", &project(json!(nobody))).await.unwrap();
    assert_eq!(problem(&site.admit(&good).await.unwrap_err()).status, 403);
    let keys = json!([VerifierKey::of(&site.key).to_string()]);
    site.operator.post::<_, Value>("/v1/projects", &project(keys)).await.unwrap();
    site.admit(&good).await.unwrap();
}

#[tokio::test]
async fn a_reset_closes_the_port_until_the_node_has_been_through_the_airlock_again() {
    let site = Site::start().await;
    let (context, admission) = site.allocated().await;
    let claims = site.claims(&context);
    site.bmc.change(|bmc| bmc.resets += 1);
    let node = site.until("rejected", is(NodeState::Rejected)).await;
    assert!(node.reason.contains("reset"), "{}", node.reason);
    assert_eq!(site.port().await, (QUARANTINE, true));
    assert_eq!(problem(&site.admit(&claims).await.unwrap_err()).kind, "not-in-airlock");
    let on_record: assay_wire::isolation::Admission =
        site.service.get(&format!("/v1/admissions/{}", admission.id)).await.unwrap();
    assert!(on_record.revoked.unwrap().contains("reset"));

    site.operator.post::<_, NodeStatus>("/v1/nodes/n1/cycle", &()).await.unwrap();
    let again = site.entered().await;
    assert_ne!(again.boot, context.boot);
    assert_eq!(problem(&site.admit(&claims).await.unwrap_err()).kind, "result-refused", "an old boot's result");
    site.admit(&site.claims(&again)).await.unwrap();
    assert_eq!(site.port().await, (NET, false));
}

#[tokio::test]
async fn revocation_expiry_and_bad_verdicts_close_the_port() {
    let site = Site::start().await;
    let (_, admission) = site.allocated().await;
    let revoked = site.revoke(admission.id).await.unwrap();
    assert_eq!(revoked.revoked.as_deref(), Some("bad evidence"));
    assert_eq!(site.port().await, (QUARANTINE, true));
    assert_eq!(site.revoke(admission.id).await.unwrap(), revoked);
    assert_eq!(site.node().await.state, NodeState::Rejected);

    site.operator.post::<_, NodeStatus>("/v1/nodes/n1/cycle", &()).await.unwrap();
    let claims = site.claims(&site.entered().await);
    site.admit(&claims).await.unwrap();
    site.clock.skip_seconds(301);
    let node = site.until("rejected by expiry", is(NodeState::Rejected)).await;
    assert!(node.reason.contains("expired") && in_quarantine(&node), "{node:?}");

    site.operator.post::<_, NodeStatus>("/v1/nodes/n1/cycle", &()).await.unwrap();
    let context = site.entered().await;
    let report = |boot| json!({"boot": boot, "reason": "PCR 4 does not match\n"});
    let stale = report(other_boot(&context).boot);
    let node: NodeStatus = site.service.post("/v1/nodes/n1/reject", &stale).await.unwrap();
    assert_eq!(node.state, NodeState::Airlock, "a report on another boot changes nothing");
    let node: NodeStatus = site.service.post("/v1/nodes/n1/reject", &report(context.boot)).await.unwrap();
    assert_eq!((node.state, node.reason.as_str()), (NodeState::Rejected, "PCR 4 does not match "));
    assert_eq!(site.port().await, (QUARANTINE, true));
    let node: NodeStatus = site.operator.post("/v1/nodes/n1/clear", &()).await.unwrap();
    assert!(node.state == NodeState::Free && node.lease.is_none(), "{node:?}");
}

#[tokio::test]
async fn nobody_comes_out_of_the_airlock_by_waiting() {
    let site = Site::start().await;
    site.airlocked().await;
    site.clock.skip_seconds(601);
    let node = site.until("timed out", is(NodeState::Rejected)).await;
    assert!(node.reason.contains("not admitted in time"), "{}", node.reason);
    assert_eq!(site.port().await, (QUARANTINE, true));
}

#[tokio::test]
async fn drift_is_mended() {
    let site = Site::start().await;
    for change in ["tag=120", "protected=false", "trunks=5", "vlan_mode=trunk"] {
        site.switch.vsctl(&["set", "port", "n1-eth0", change]).unwrap();
        let mended = async { while site.port().await != (QUARANTINE, true) || !in_quarantine(&site.node().await) {} };
        tokio::time::timeout(std::time::Duration::from_secs(60), mended).await.unwrap();
    }
}

#[tokio::test]
async fn a_restart_believes_switches_and_clocks_not_memory() {
    let mut site = Site::start().await;
    let (context, _) = site.allocated().await;
    site.stop().await;
    site.switch.vsctl(&["set", "port", "n1-eth0", "tag=121"]).unwrap();
    site.start_again().await;
    assert_eq!(site.node().await.nics[0].observed, Some(access()), "reconciled before the first answer");
    assert_eq!(site.port().await, (NET, false));
    // Reset while nobody watched, port closed by hand: it is not opened again.
    site.stop().await;
    site.bmc.change(|bmc| bmc.resets += 1);
    site.switch.vsctl(&["set", "port", "n1-eth0", "tag=998", "protected=true"]).unwrap();
    site.start_again().await;
    let node = site.until("rejected", is(NodeState::Rejected)).await;
    assert!(in_quarantine(&node) && node.boot == Some(context.boot), "{node:?}");
}

#[tokio::test]
async fn registration_is_validated_and_projects_see_their_own() {
    let site = Site::start().await;
    let post = async |path: &str, body: Value| {
        let error = site.operator.post::<_, Value>(path, &body).await.unwrap_err();
        (problem(&error).status, problem(&error).detail.clone())
    };
    for vlan in [QUARANTINE, AIRLOCK, NET] {
        assert_eq!(post("/v1/networks", json!({"name": "net-b", "project": "alpha", "vlan": vlan})).await.0, 400);
    }
    assert_eq!(post("/v1/networks", json!({"name": "net-b", "project": "alpha", "vlan": 5000})).await.0, 400);
    let node = |name: &str, mac: &str, bmc: &Value| {
        json!({"name": name, "bmc": bmc,
            "nics": [{"name": "eth0", "mac": mac, "switch": "sw", "port": "p2"}]})
    };
    let bmc = serde_json::to_value(&site.bmc.record).unwrap();
    assert_eq!(post("/v1/nodes", node("n2", "52:54:00:00:00:01", &bmc)).await.0, 409, "one MAC, one NIC");
    let mut plain = bmc.clone();
    plain["system"] = json!("http://127.0.0.1/redfish/v1/Systems/1");
    assert_eq!(post("/v1/nodes", node("n2", "52:54:00:00:00:02", &plain)).await.0, 400);
    // A port that the switch does not have: registered, and said to be wrong.
    let n2: NodeStatus = site.operator.post("/v1/nodes", &node("n2", "52:54:00:00:00:02", &bmc)).await.unwrap();
    assert!(n2.reason.contains("no port p2 on bridge br0") && n2.nics[0].observed.is_none(), "{n2:?}");

    let token = site.context.tokens.issue("beta", Role::Project("beta".parse().unwrap())).unwrap();
    let beta = ServiceClient::new(site.base.clone(), site.context.identity.ca_pem(), token).unwrap();
    let lease = site.lease().await;
    assert!(beta.get::<Value>("/v1/leases").await.unwrap().as_array().unwrap().is_empty());
    for refused in [
        beta.get::<Value>("/v1/nodes/n1").await,
        beta.delete::<_, Value>(&format!("/v1/leases/{}", lease.id), &()).await,
        beta.post::<_, Value>("/v1/leases", &lease).await,
        beta.get::<Value>("/v1/nodes/n1/airlock").await,
        beta.get::<Value>("/v1/events").await,
        beta.post::<_, Value>("/v1/admissions", &json!({"result": "x"})).await,
    ] {
        assert!([403, 404].contains(&problem(&refused.unwrap_err()).status));
    }
    let again = json!({"id": LeaseId::random(), "project": "alpha", "node": "n1", "network": "net-a"});
    let refused = site.operator.post::<_, Value>("/v1/leases", &again).await.unwrap_err();
    assert_eq!(problem(&refused).kind, "node-not-free");
}

/// A network is its owner's; others' nodes join it only if it is shared with them.
#[tokio::test]
async fn projects_that_trust_each_other_share_a_network() {
    let site = Site::start().await;
    for project in ["beta", "gamma"] {
        let project = json!({"name": project, "verifier_keys": []});
        let _created: Value = site.operator.post("/v1/projects", &project).await.unwrap();
    }
    let shared = json!({"name": "common", "project": "alpha", "vlan": 130, "shared_with": ["beta"]});
    let _created: Value = site.operator.post("/v1/networks", &shared).await.unwrap();
    let as_project = |name: &str| {
        let token = site.context.tokens.issue(name, Role::Project(name.parse().unwrap())).unwrap();
        ServiceClient::new(site.base.clone(), site.context.identity.ca_pem(), token).unwrap()
    };
    let seen = async |name: &str| {
        let networks: Vec<Value> = as_project(name).get("/v1/networks").await.unwrap();
        networks.iter().map(|network| network["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(seen("alpha").await, ["common", "net-a"]);
    assert_eq!(seen("beta").await, ["common"]);
    assert!(seen("gamma").await.is_empty());
    let lease = async |project: &str, network: &str| {
        let lease = json!({"id": LeaseId::random(), "project": project, "node": "n1", "network": network});
        as_project(project).post::<_, Value>("/v1/leases", &lease).await
    };
    for (project, network) in [("gamma", "common"), ("beta", "net-a")] {
        let refused = lease(project, network).await.unwrap_err();
        assert!(problem(&refused).detail.contains(&format!("project {project} has no network {network}")));
    }
    assert_eq!(lease("beta", "common").await.unwrap()["network"], "common");
    site.until("leased", is(NodeState::Airlock)).await;
}

#[tokio::test]
async fn netboot_is_told_of_changes() {
    let site = Site::start().await;
    let before: BootRecords = site.service.get("/v1/boot-records").await.unwrap();
    let after = format!("/v1/boot-records?after={}", before.revision);
    let (changed, _) = tokio::join!(site.service.get::<BootRecords>(&after), site.lease());
    let changed = changed.unwrap();
    assert!(changed.revision > before.revision);
    assert_eq!(changed.records[0].state, NodeState::Airlock);
    assert_eq!(site.node().await.nics[0].nic.port, "n1-eth0");
    assert_ne!(site.node().await.nics[0].desired, PortIntent::Access { vlan: 120.try_into().unwrap() });
}

#[tokio::test]
async fn a_revocation_that_overtakes_its_admission_wins() {
    let site = Site::start().await;
    let context = site.airlocked().await;
    let late = site.claims(&context);
    assert_eq!(problem(&site.revoke(late.jti).await.unwrap_err()).status, 404);
    assert_eq!(problem(&site.admit(&late).await.unwrap_err()).kind, "admission-ended");
    assert_eq!(site.port().await, (AIRLOCK, true));
    site.admit(&site.claims(&context)).await.unwrap();
}
