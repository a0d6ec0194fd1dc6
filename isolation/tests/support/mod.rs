//! A site on loopback: isolation itself over real HTTPS, a real Open vSwitch, BMCs whose nodes are imaginary.

#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod bmc;

use assay_isolation::Config;
use assay_ovsdb::testing::{OpenVswitch, ScratchNamespace};
use assay_service::CancellationToken;
use assay_service::auth::{Token, Tokens};
use assay_service::client::{ClientError, ServiceClient};
use assay_service::clock::{Clock, SystemClock};
use assay_service::http::{self, ServiceContext};
use assay_service::tls::SiteIdentity;
use assay_wire::id::{AdmissionId, BootId, LeaseId};
use assay_wire::isolation::{
    Admission, AdmissionRequest, AirlockContext, LeaseRequest, NodeLease, NodeState, NodeStatus, PortIntent,
    RevokeRequest,
};
use assay_wire::net::VlanId;
use assay_wire::problem::Problem;
use assay_wire::result::{Claims, EAR_PROFILE, EarStatus, SignedResult, Submod, VerifierId, VerifierKey};
use bmc::TestBmc;
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub(crate) const NET: u16 = 120;
pub(crate) const QUARANTINE: u16 = 998;
pub(crate) const AIRLOCK: u16 = 999;
/// The digest of an EK that isolation never looks into.
const SHA256_OF_NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

pub(crate) struct Site {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) switch: OpenVswitch,
    pub(crate) namespace: ScratchNamespace,
    pub(crate) context: ServiceContext,
    pub(crate) bmc: TestBmc,
    pub(crate) operator: ServiceClient,
    pub(crate) service: ServiceClient,
    pub(crate) key: Ed25519KeyPair,
    pub(crate) overrides: Value,
    pub(crate) base: url::Url,
    pub(crate) clock: Arc<SkippingClock>,
    server: JoinHandle<()>,
    shutdown: CancellationToken,
}

impl Site {
    /// One project `alpha` with network `net-a` (VLAN 120), one node `n1`, registered.
    pub(crate) async fn start() -> Self {
        Self::with(json!({})).await
    }

    pub(crate) async fn with(overrides: Value) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let ovs = folder.path().join("ovs");
        std::fs::create_dir(&ovs).expect("a folder");
        let namespace = ScratchNamespace::new().expect("a namespace");
        let switch = OpenVswitch::start_in(&ovs, &namespace.namespace()).expect("Open vSwitch");
        switch.add_bridge("br0").expect("a bridge");
        // No device behind it: the switch keeps its configuration all the same.
        switch.add_port("br0", "n1-eth0", QUARANTINE, true).expect("a port");
        let clock = Arc::new(SkippingClock::default());
        let context = ServiceContext {
            clock: Arc::clone(&clock) as _,
            tokens: Arc::new(Tokens::load_or_create(folder.path()).expect("tokens")),
            identity: Arc::new(SiteIdentity::load_or_create(folder.path(), &[]).expect("an identity")),
            shutdown: CancellationToken::new(),
        };
        let bmc = TestBmc::start(&context).await;
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
        let key = Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("a key");
        let (base, server, shutdown) = serve(folder.path(), &context, &overrides).await;
        let (operator, service) = clients(folder.path(), &base, &context);
        let site = Self {
            folder,
            switch,
            namespace,
            context,
            bmc,
            operator,
            service,
            key,
            overrides,
            base,
            clock,
            server,
            shutdown,
        };
        site.register().await;
        site
    }

    async fn register(&self) {
        let post = async |path: &str, body: Value| self.operator.post::<_, Value>(path, &body).await.expect(path);
        post("/v1/projects", json!({"name": "alpha", "verifier_keys": [VerifierKey::of(&self.key).to_string()]})).await;
        post("/v1/networks", json!({"name": "net-a", "project": "alpha", "vlan": NET})).await;
        let driver = json!({"kind": "open-vswitch", "ovsdb_socket": self.switch.ovsdb_socket(),
            "control_socket": self.switch.control_socket(), "bridge": "br0"});
        post("/v1/switches", json!({"name": "sw", "driver": driver})).await;
        let nic = json!({"name": "eth0", "mac": "52:54:00:00:00:01", "switch": "sw", "port": "n1-eth0"});
        let node = post("/v1/nodes", json!({"name": "n1", "bmc": self.bmc.record, "nics": [nic]})).await;
        assert!(!node.to_string().contains("calvin"));
    }

    /// Stops the service as a signal would, and starts it again on the same database.
    pub(crate) async fn restart(mut self) -> Self {
        self.stop().await;
        self.start_again().await;
        self
    }

    pub(crate) async fn stop(&mut self) {
        self.shutdown.cancel();
        timeout(Duration::from_secs(20), &mut self.server).await.expect("it stops in time").expect("without panic");
    }

    pub(crate) async fn start_again(&mut self) {
        let (base, server, shutdown) = serve(self.folder.path(), &self.context, &self.overrides).await;
        (self.operator, self.service) = clients(self.folder.path(), &base, &self.context);
        (self.base, self.server, self.shutdown) = (base, server, shutdown);
    }

    pub(crate) async fn node(&self) -> NodeStatus {
        self.operator.get("/v1/nodes/n1").await.expect("the node")
    }

    /// Asks until the node is as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
        let mut last = None;
        let asking = async {
            loop {
                let node = self.node().await;
                if wanted(&node) {
                    return node;
                }
                last = Some(node);
            }
        };
        let node = timeout(Duration::from_secs(60), asking).await;
        node.unwrap_or_else(|_| panic!("never {what}: {last:?}"))
    }

    pub(crate) async fn lease(&self) -> NodeLease {
        let request = LeaseRequest {
            id: LeaseId::random(),
            project: "alpha".parse().expect("a name"),
            node: "n1".parse().expect("a name"),
            network: "net-a".parse().expect("a name"),
        };
        self.operator.post("/v1/leases", &request).await.expect("a lease")
    }

    /// Leases the node and waits until it is on in the airlock.
    pub(crate) async fn airlocked(&self) -> AirlockContext {
        self.lease().await;
        self.entered().await
    }

    pub(crate) async fn entered(&self) -> AirlockContext {
        self.until("in the airlock", |n| n.reason.contains("waiting for its attestation")).await;
        self.service.get("/v1/nodes/n1/airlock").await.expect("the airlock context")
    }

    pub(crate) fn claims(&self, context: &AirlockContext) -> Claims {
        let now = self.clock.now_seconds();
        let submod = Submod { status: EarStatus::Affirming, policy: "sha256:00".into(), rules: BTreeMap::new() };
        Claims {
            eat_profile: EAR_PROFILE.into(),
            iat: now,
            exp: now + 300,
            jti: AdmissionId::random(),
            verifier_id: VerifierId { developer: "assay".into(), build: "test".into() },
            eat_nonce: "AA".into(),
            submods: BTreeMap::from([("tpm".into(), submod)]),
            node: "n1".parse().expect("a name"),
            project: context.project.clone(),
            lease: context.lease,
            boot: context.boot,
            ek_public: String::new(),
            ek_sha256: SHA256_OF_NOTHING.into(),
            ak_name: "000b".into(),
            renews: None,
            reset_count: 1,
            restart_count: 0,
        }
    }

    pub(crate) async fn admit(&self, claims: &Claims) -> Result<Admission, ClientError> {
        self.send(&SignedResult::sign(claims, &self.key)).await
    }

    pub(crate) async fn send(&self, result: &SignedResult) -> Result<Admission, ClientError> {
        self.service
            .post("/v1/admissions", &AdmissionRequest { result: result.as_str().to_owned(), supporting: Vec::new() })
            .await
    }

    pub(crate) async fn revoke(&self, id: AdmissionId) -> Result<Admission, ClientError> {
        let request = RevokeRequest { reason: "bad evidence".into() };
        self.service.delete(&format!("/v1/admissions/{id}"), &request).await
    }

    /// Leases, boots and admits.
    pub(crate) async fn allocated(&self) -> (AirlockContext, Admission) {
        let context = self.airlocked().await;
        let admission = self.admit(&self.claims(&context)).await.expect("admitted");
        (context, admission)
    }

    /// What the switch itself says the port is: tag and protected.
    pub(crate) async fn port(&self) -> (u16, bool) {
        let socket = self.switch.ovsdb_socket();
        let ovsdb = assay_ovsdb::Ovsdb::connect(&socket, assay_ovsdb::Limits::default());
        let select = json!({"op": "select", "table": "Port", "where": [["name", "==", "n1-eth0"]],
            "columns": ["tag", "protected"]});
        let rows = ovsdb.await.expect("ovsdb").transact("Open_vSwitch", vec![select]).await.expect("rows");
        let row = &rows[0]["rows"][0];
        let tag = row["tag"].as_u64().and_then(|tag| u16::try_from(tag).ok());
        (tag.unwrap_or(0), row["protected"] == true)
    }
}

/// The machine's clock, and what a test skipped.
#[derive(Default)]
pub(crate) struct SkippingClock(AtomicI64);

impl SkippingClock {
    pub(crate) fn skip_seconds(&self, seconds: i64) {
        self.0.fetch_add(seconds * 1000, Ordering::SeqCst);
    }
}

impl Clock for SkippingClock {
    fn now_ms(&self) -> i64 {
        SystemClock.now_ms() + self.0.load(Ordering::SeqCst)
    }
}

pub(crate) fn problem(error: &ClientError) -> &Problem {
    error.problem().unwrap_or_else(|| panic!("no problem document: {error}"))
}

pub(crate) fn access() -> PortIntent {
    PortIntent::Access { vlan: VlanId::try_from(u32::from(NET)).expect("a VLAN") }
}

pub(crate) fn in_quarantine(node: &NodeStatus) -> bool {
    node.nics.iter().all(|n| n.observed == Some(PortIntent::Quarantine) && n.desired == PortIntent::Quarantine)
}

pub(crate) fn is(state: NodeState) -> impl Fn(&NodeStatus) -> bool {
    move |node| node.state == state
}

pub(crate) fn other_boot(context: &AirlockContext) -> AirlockContext {
    AirlockContext { boot: BootId::random(), ..context.clone() }
}

async fn serve(
    folder: &std::path::Path,
    context: &ServiceContext,
    overrides: &Value,
) -> (url::Url, JoinHandle<()>, CancellationToken) {
    let mut file = json!({
        "database": assay_service::testing::database_in(folder, "isolation"),
        "listen": "127.0.0.1:0",
        "password_key_file": folder.join("bmc.key"),
        "quarantine_vlan": QUARANTINE,
        "airlock_vlan": AIRLOCK,
        "reset_poll_ms": 50,
        "observe_ms": 100,
        "switch_timeout_ms": 1000,
        "bmc_timeout_ms": 2000,
        "power_timeout_seconds": 2,
    });
    for (field, value) in overrides.as_object().into_iter().flatten() {
        file[field] = value.clone();
    }
    let config: Config = serde_json::from_value(file).expect("a configuration");
    let tcp = http::bind(config.listen).await.expect("a port");
    let base = format!("https://{}/", tcp.local_addr().expect("an address")).parse().expect("a URL");
    // The BMC goes on when the service stops.
    let shutdown = CancellationToken::new();
    let context = ServiceContext { shutdown: shutdown.clone(), ..context.clone() };
    let server = tokio::spawn(async move { assay_isolation::serve(tcp, config, context).await.expect("it runs") });
    (base, server, shutdown)
}

fn clients(folder: &std::path::Path, base: &url::Url, context: &ServiceContext) -> (ServiceClient, ServiceClient) {
    let client = |file: &str| {
        let token = Token::from_text(&std::fs::read_to_string(folder.join(file)).expect("a token"));
        ServiceClient::new(base.clone(), context.identity.ca_pem(), token).expect("a client")
    };
    (client("operator.token"), client("service.token"))
}
