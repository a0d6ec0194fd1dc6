//! Imaging over HTTPS with a gateway, a project, a verifier's key, an image and a disk.

use super::*;
use assay_imaging::config::CephConfig;
use assay_imaging::{Config, Imaging};
use assay_service::auth::{Role, Token, Tokens};
use assay_service::http::ServiceContext;
use assay_service::tls::SiteIdentity;
use assay_wire::agreement::Agreement;
use assay_wire::id::{BootId, LeaseId};
use assay_wire::imaging::{
    ChapAlgorithms, Disk, DiskRequest, Export, ExportAnswer, ExportRequest, Gateway as GatewayRecord, ImportRequest,
    ImportSource, ImportStatus,
};
use assay_wire::isolation::Project;
use assay_wire::result::{Claims, EAR_PROFILE, EarStatus, SignedResult, Submod, VerifierId, VerifierKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::Ed25519KeyPair;
use std::collections::BTreeMap;
use tokio::net::TcpListener;

/// The NIC of the node that the disk of [`Site`] is for.
pub(crate) const MAC: &str = "52:54:00:00:00:01";

/// A running imaging service.
pub(crate) struct Service {
    pub(crate) operator: ServiceClient,
    pub(crate) verifier: ServiceClient,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<()>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) base: url::Url,
    pub(crate) ca_pem: String,
}

impl Service {
    pub(crate) async fn start(folder: &Path, clock: &Arc<ManualClock>) -> Self {
        Self::start_with(folder, clock, Agreement::default()).await
    }

    pub(crate) async fn start_with(folder: &Path, clock: &Arc<ManualClock>, agreement: Agreement) -> Self {
        Self::start_on(folder, clock, agreement, None).await
    }

    pub(crate) async fn start_on(
        folder: &Path,
        clock: &Arc<ManualClock>,
        agreement: Agreement,
        ceph: Option<CephConfig>,
    ) -> Self {
        let (config, context) = Self::prepare(folder, clock, agreement, ceph);
        let (shutdown, tokens) = (context.shutdown.clone(), Arc::clone(&context.tokens));
        let ca_pem = context.identity.ca_pem().to_owned();
        let listener = TcpListener::bind(config.listen).await.unwrap();
        let base: url::Url = format!("https://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let imaging = Imaging::open(config, &context).await.unwrap();
        let task = tokio::spawn(async move { imaging.serve(listener, &context).await.unwrap() });
        let client = |name: &str| {
            let text = std::fs::read_to_string(folder.join(format!("site/{name}.token"))).unwrap();
            ServiceClient::new(base.clone(), &ca_pem, Token::from_text(&text)).unwrap()
        };
        let (operator, verifier) = (client("operator"), client("service"));
        Self { operator, verifier, shutdown, task, tokens, base, ca_pem }
    }

    /// What it takes to open imaging.
    pub(crate) fn prepare(
        folder: &Path,
        clock: &Arc<ManualClock>,
        agreement: Agreement,
        ceph: Option<CephConfig>,
    ) -> (Config, ServiceContext) {
        let identity = SiteIdentity::load_or_create(&folder.join("site"), &[]).unwrap();
        let tokens = Arc::new(Tokens::load_or_create(&folder.join("site")).unwrap());
        let context = ServiceContext {
            clock: Arc::<ManualClock>::clone(clock),
            tokens,
            identity: Arc::new(identity),
            shutdown: CancellationToken::new(),
        };
        let config = Config {
            listen: "127.0.0.1:0".parse().unwrap(),
            database: assay_service::testing::database_in(folder, "imaging"),
            store: folder.join("store"),
            ceph,
            key_file: folder.join("imaging.key"),
            import_folders: vec![folder.to_owned()],
            agreement,
            upload_age: Duration::from_secs(7 * 24 * 60 * 60),
            longest_renewal: Duration::from_secs(3600),
        };
        (config, context)
    }

    pub(crate) fn project_client(&self, project: &str) -> ServiceClient {
        let token = self.tokens.issue(project, Role::Project(project.parse().unwrap())).unwrap();
        ServiceClient::new(self.base.clone(), &self.ca_pem, token).unwrap()
    }

    pub(crate) async fn export(&self, result: &SignedResult) -> Result<ExportAnswer, ClientError> {
        let request = ExportRequest { result: result.as_str().to_owned(), supporting: Vec::new() };
        self.verifier.post("v1/exports", &request).await
    }

    pub(crate) async fn end(&self, admission: AdmissionId) -> Result<(), ClientError> {
        self.verifier.delete(&format!("v1/exports/{admission}"), &()).await
    }

    pub(crate) async fn exports(&self) -> Vec<Export> {
        self.verifier.get("v1/exports").await.unwrap()
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap();
    }
}

/// Imaging and a gateway, a project with a verifier, an image, and a disk for one lease.
pub(crate) struct Site {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) service: Service,
    pub(crate) gateway: RunningGateway,
    pub(crate) key: Ed25519KeyPair,
    pub(crate) lease: LeaseId,
}

impl Site {
    pub(crate) async fn new() -> Self {
        Self::on(None).await
    }

    /// With images and disks in a pool of Ceph's.
    pub(crate) async fn on(ceph: Option<CephConfig>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::new(NOW_MS));
        let service = Service::start_on(folder.path(), &clock, Agreement::default(), ceph).await;
        let gateway = RunningGateway::start(folder.path(), &clock).await;
        let rng = ring::rand::SystemRandom::new();
        let key = Ed25519KeyPair::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&rng).unwrap().as_ref()).unwrap();
        let site = Self { folder, clock, service, gateway, key, lease: LeaseId::random() };
        let keys = vec![VerifierKey::of(&site.key).to_string()];
        let project = Project { name: "p1".parse().unwrap(), verifier_keys: keys };
        let _: Project = site.service.operator.post("v1/projects", &project).await.unwrap();
        let _: GatewayRecord = site.service.operator.post("v1/gateways", &site.gateway_record()).await.unwrap();
        std::fs::write(site.folder.path().join("source.raw"), pattern(1 << 20)).unwrap();
        let last = site.import("golden", "source.raw", ImageFormat::Raw).await.unwrap().pop().unwrap();
        assert!(matches!(last, ImportStatus::Done { .. }), "{last:?}");
        let _: Disk = site.put_disk(site.lease).await.unwrap();
        site
    }

    pub(crate) fn gateway_record(&self) -> GatewayRecord {
        let std::net::SocketAddr::V4(portal) = self.gateway.portal else { panic!("not IPv4") };
        GatewayRecord {
            project: "p1".parse().unwrap(),
            control_socket: self.gateway.socket.display().to_string(),
            portal,
            relay: "127.20.0.1:8443".parse().unwrap(),
            subnet: "127.20.0.0/24".parse().unwrap(),
            router: None,
            chap: ChapAlgorithms::Any,
        }
    }

    pub(crate) async fn import(
        &self,
        name: &str,
        source: &str,
        format: ImageFormat,
    ) -> Result<Vec<ImportStatus>, ClientError> {
        let source = self.folder.path().join(source).display().to_string();
        let request = ImportRequest {
            name: name.parse().unwrap(),
            project: "p1".parse().unwrap(),
            source: ImportSource::Path(source),
            format: format.into(),
            sha256: None,
        };
        let answer = self.service.operator.post_streaming("v1/images", &request).await?;
        assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
        let lines = answer.text().await.unwrap();
        Ok(lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    pub(crate) async fn put_disk(&self, lease: LeaseId) -> Result<Disk, ClientError> {
        let (project, node) = ("p1".parse().unwrap(), "n1".parse().unwrap());
        let request = DiskRequest { project, node, image: image(), mac: Some(MAC.parse().unwrap()) };
        self.service.operator.put(&format!("v1/disks/{lease}"), &request).await
    }

    pub(crate) fn claims(&self) -> Claims {
        let submod = Submod { status: EarStatus::Affirming, policy: "sha256:00".into(), rules: BTreeMap::new() };
        Claims {
            eat_profile: EAR_PROFILE.into(),
            iat: NOW_MS / 1000,
            exp: NOW_MS / 1000 + 600,
            jti: AdmissionId::random(),
            verifier_id: VerifierId { developer: "assay".into(), build: "test".into() },
            eat_nonce: "AA".into(),
            submods: BTreeMap::from([("tpm".into(), submod)]),
            node: "n1".parse().unwrap(),
            project: "p1".parse().unwrap(),
            lease: self.lease,
            boot: BootId::random(),
            ek_public: URL_SAFE_NO_PAD.encode(ek_public()),
            ek_sha256: hex::encode(ring::digest::digest(&ring::digest::SHA256, &ek_public())),
            ak_name: format!("000b{}", "5a".repeat(32)),
            renews: None,
            reset_count: 1,
            restart_count: 0,
        }
    }

    pub(crate) fn sign(&self, claims: &Claims) -> SignedResult {
        SignedResult::sign(claims, &self.key)
    }

    pub(crate) async fn stop(self) {
        self.service.stop().await;
        self.gateway.stop().await;
    }
}

/// `TPMT_PUBLIC` of an RSA-2048 EK as of TCG's template L-1, with an odd modulus that nobody has the key for.
pub(crate) fn ek_public() -> Vec<u8> {
    let policy = hex::decode("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa").unwrap();
    let mut modulus = vec![0xc3; 256];
    modulus[255] = 0x01;
    let mut public = hex::decode("0001000b000300b20020").unwrap();
    public.extend(policy);
    public.extend(hex::decode("000600800043001008000000000001 00".replace(' ', "")).unwrap());
    public.extend(modulus);
    public
}

pub(crate) fn kind(error: &ClientError) -> (u16, &str) {
    let problem = error.problem().unwrap_or_else(|| panic!("no problem: {error}"));
    (problem.status, &problem.kind)
}

pub(crate) async fn until(mut what: impl AsyncFnMut() -> bool) {
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let holds = async {
        while !what().await {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), holds).await.unwrap();
}
