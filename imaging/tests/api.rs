//! The whole service over HTTPS, with results signed here, a real gateway, and a real initiator where it matters.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::gateway::order::ExportOrder;
use assay_imaging::store::LocalStore;
use assay_wire::id::{AdmissionId, LeaseId};
use assay_wire::imaging::{ChapAlgorithms, Disk, DiskRequest, Export, Gateway, Image, ImageChange, ImageFormat};
use assay_wire::isolation::Project;
use assay_wire::result::{Claims, EarStatus, SignedResult, VerifierKey};
use rig::site::{MAC, Service, Site, kind, until};
use rig::{NOW_MS, RunningGateway, image, order, pattern, store_with_image};
use ring::signature::Ed25519KeyPair;

#[tokio::test]
async fn a_good_result_becomes_an_export_once() {
    let site = Site::new().await;
    let claims = site.claims();
    let result = site.sign(&claims);
    let answer = site.service.export(&result).await.unwrap();
    assert_eq!(answer.admission, claims.jti);
    assert_eq!(answer.address.address.to_string(), "127.20.0.50/24");
    assert_eq!(answer.address.relay.to_string(), "127.20.0.1:8443");
    assert_eq!(answer.grant.admission, claims.jti);
    let again = site.service.export(&result).await.unwrap();
    assert_eq!(again.grant, answer.grant, "the same secret, not another");
    let served = site.gateway.status().await.exports;
    assert_eq!(served.len(), 1);
    assert_eq!((served[0].admission, served[0].expires_at_ms), (claims.jti, claims.exp * 1000));
    let exports = site.service.exports().await;
    assert_eq!((exports.len(), exports[0].lease, exports[0].node.as_str()), (1, site.lease, "n1"));
    // No secret in the database.
    let database: Vec<u8> = std::fs::read_dir(site.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains("imaging.db"))
        .flat_map(|path| std::fs::read(path).unwrap())
        .collect();
    assert!(!String::from_utf8_lossy(&database).contains("\"chap_secret\""));
    site.service.end(claims.jti).await.unwrap();
    site.service.end(claims.jti).await.unwrap();
    assert!(site.gateway.status().await.exports.is_empty() && site.service.exports().await.is_empty());
    let replayed = site.service.export(&result).await.unwrap_err();
    assert_eq!(kind(&replayed), (409, "admission-ended"));
    site.stop().await;
}

#[tokio::test]
async fn results_that_do_not_count_open_nothing() {
    let site = Site::new().await;
    let rng = ring::rand::SystemRandom::new();
    let stranger = Ed25519KeyPair::from_pkcs8(Ed25519KeyPair::generate_pkcs8(&rng).unwrap().as_ref()).unwrap();
    let mut bad = site.claims();
    bad.submods.get_mut("tpm").unwrap().status = EarStatus::Contraindicated;
    let nothing = hex::encode(ring::digest::digest(&ring::digest::SHA256, b""));
    let no_ek = Claims { ek_public: String::new(), ek_sha256: nothing, ..site.claims() };
    let cases = [
        ("another signer", SignedResult::sign(&site.claims(), &stranger), (403, "result-refused")),
        ("not affirming", site.sign(&bad), (403, "result-refused")),
        ("expired", site.sign(&Claims { exp: NOW_MS / 1000, ..site.claims() }), (403, "result-refused")),
        ("malformed", SignedResult::from_wire("a.b.c".into()), (403, "result-refused")),
        (
            "unknown project",
            site.sign(&Claims { project: "p2".parse().unwrap(), ..site.claims() }),
            (403, "result-refused"),
        ),
        ("another node", site.sign(&Claims { node: "n2".parse().unwrap(), ..site.claims() }), (403, "other-disk")),
        ("no disk", site.sign(&Claims { lease: LeaseId::random(), ..site.claims() }), (409, "no-disk")),
        ("no EK", site.sign(&no_ek), (403, "result-unusable")),
        ("two EKs", site.sign(&Claims { ek_public: String::new(), ..site.claims() }), (403, "result-refused")),
    ];
    for (what, result, expected) in cases {
        let refused = site.service.export(&result).await.unwrap_err();
        assert_eq!(kind(&refused), expected, "{what}: {refused}");
    }
    assert!(site.service.exports().await.is_empty() && site.gateway.status().await.exports.is_empty());
    site.stop().await;
}

#[tokio::test]
async fn a_later_result_takes_the_lease_over_and_an_earlier_one_does_not() {
    let site = Site::new().await;
    let first = site.claims();
    site.service.export(&site.sign(&first)).await.unwrap();
    let later = Claims { iat: first.iat + 10, jti: AdmissionId::random(), ..first.clone() };
    let answer = site.service.export(&site.sign(&later)).await.unwrap();
    assert_eq!(answer.address.address.to_string(), "127.20.0.50/24", "the address was free again");
    let served: Vec<_> = site.gateway.status().await.exports.iter().map(|export| export.admission).collect();
    assert_eq!(served, [later.jti]);
    let replayed = site.service.export(&site.sign(&first)).await.unwrap_err();
    assert_eq!(kind(&replayed), (409, "admission-ended"));
    let earlier = Claims { iat: first.iat - 5, jti: AdmissionId::random(), ..first };
    let refused = site.service.export(&site.sign(&earlier)).await.unwrap_err();
    assert_eq!(kind(&refused), (409, "superseded"));
    site.stop().await;
}

#[tokio::test]
async fn an_admission_that_ended_before_its_export_stays_ended() {
    let site = Site::new().await;
    let claims = site.claims();
    site.service.end(claims.jti).await.unwrap();
    let refused = site.service.export(&site.sign(&claims)).await.unwrap_err();
    assert_eq!(kind(&refused), (409, "admission-ended"));
    site.stop().await;
}

#[tokio::test]
async fn restarts_of_either_side_bring_the_same_export_back() {
    let mut site = Site::new().await;
    let claims = site.claims();
    let answer = site.service.export(&site.sign(&claims)).await.unwrap();
    // The gateway forgets everything when it ends; imaging puts the export up again.
    let portal = site.gateway.portal;
    site.gateway.stop().await;
    site.gateway = RunningGateway::start_on(site.folder.path(), &site.clock, portal).await;
    until(async || site.gateway.status().await.exports.len() == 1).await;
    // Imaging ends: the gateway goes on. It comes back: the same grant, and orders that agree with the gateway's.
    site.service.stop().await;
    assert_eq!(site.gateway.status().await.exports.len(), 1);
    site.service = Service::start(site.folder.path(), &site.clock).await;
    assert_eq!(site.service.export(&site.sign(&claims)).await.unwrap().grant, answer.grant);
    assert_eq!(site.service.exports().await.len(), 1);
    // What the gateway serves but is not on record comes down.
    let stray = stray(&site);
    site.gateway.put_up(AdmissionId::random(), &stray).await.unwrap();
    until(async || site.gateway.status().await.exports.len() == 1).await;
    assert_eq!(site.gateway.status().await.exports[0].admission, claims.jti);
    site.stop().await;
}

/// An order for a disk that was made behind imaging's back.
fn stray(site: &Site) -> ExportOrder {
    let elsewhere = site.folder.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let order = order(&store_with_image(&elsewhere, &pattern(1 << 20)));
    for kind in ["images", "layers", "disks"] {
        for entry in std::fs::read_dir(elsewhere.join("store").join(kind)).unwrap().map(Result::unwrap) {
            std::fs::rename(entry.path(), site.folder.path().join("store").join(kind).join(entry.file_name())).unwrap();
        }
    }
    order
}

#[tokio::test]
async fn an_export_is_gone_when_its_result_expires() {
    let site = Site::new().await;
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap();
    site.clock.advance_ms(600_000);
    until(async || site.service.exports().await.is_empty()).await;
    assert!(site.gateway.status().await.exports.is_empty());
    site.stop().await;
}

#[tokio::test]
async fn addresses_are_reserved_while_exports_stand() {
    let mut site = Site::new().await;
    let reserved = [(MAC.to_owned(), "127.20.0.50".to_owned())];
    assert_eq!(site.gateway.reserved(), []);
    let revoked = site.claims();
    site.service.export(&site.sign(&revoked)).await.unwrap();
    assert_eq!(site.gateway.reserved(), reserved, "there as soon as the verifier is answered");
    site.service.end(revoked.jti).await.unwrap();
    assert_eq!(site.gateway.reserved(), [], "gone as soon as the revocation is answered");
    // A lease whose node's NIC is not known has an export, and no reservation.
    let (lease, unknown) = (LeaseId::random(), AdmissionId::random());
    let (project, node) = ("p1".parse().unwrap(), "n1".parse().unwrap());
    let request = DiskRequest { project, node, image: image(), mac: None };
    let _: Disk = site.service.operator.put(&format!("v1/disks/{lease}"), &request).await.unwrap();
    site.service.export(&site.sign(&Claims { lease, jti: unknown, ..site.claims() })).await.unwrap();
    assert_eq!((site.gateway.status().await.exports.len(), site.gateway.reserved()), (1, vec![]));
    site.service.end(unknown).await.unwrap();
    // A gateway that forgot everything is told again.
    site.service.export(&site.sign(&site.claims())).await.unwrap();
    let portal = site.gateway.portal;
    site.gateway.stop().await;
    site.gateway = RunningGateway::start_on(site.folder.path(), &site.clock, portal).await;
    until(async || site.gateway.reserved() == reserved).await;
    // The gateway's own clock ends it, whether or not imaging still runs.
    site.service.stop().await;
    site.clock.advance_ms(600_000);
    let empty = site.gateway.reservations.wait_for(Vec::is_empty);
    tokio::time::timeout(std::time::Duration::from_secs(5), empty).await.unwrap().unwrap();
    site.gateway.stop().await;
}

#[tokio::test]
async fn a_gateway_that_is_away_fails_the_export_and_leaves_nothing_open() {
    let mut site = Site::new().await;
    let (portal, claims) = (site.gateway.portal, site.claims());
    let result = site.sign(&claims);
    site.gateway.stop().await;
    let refused = site.service.export(&result).await.unwrap_err();
    assert_eq!(kind(&refused), (503, "gateway"), "{refused}");
    site.gateway = RunningGateway::start_on(site.folder.path(), &site.clock, portal).await;
    // The record is unwound as soon as the gateway can say that nothing is up; then the same result may try again.
    until(async || site.service.exports().await.is_empty()).await;
    site.service.export(&result).await.unwrap();
    assert_eq!(site.gateway.status().await.exports.len(), 1);
    site.stop().await;
}

#[tokio::test]
async fn roles_reach_no_further_than_they_should() {
    let site = Site::new().await;
    let (own, other) = (site.service.project_client("p1"), site.service.project_client("p2"));
    let lease = LeaseId::random();
    let (project, node) = ("p1".parse().unwrap(), "n2".parse().unwrap());
    let request = DiskRequest { project, node, image: image(), mac: None };
    let path = format!("v1/disks/{lease}");
    assert_eq!(kind(&other.put::<_, Disk>(&path, &request).await.unwrap_err()).0, 403);
    let disk: Disk = own.put(&path, &request).await.unwrap();
    assert_eq!(own.put::<_, Disk>(&path, &request).await.unwrap(), disk, "idempotent");
    let changed = DiskRequest { node: "n3".parse().unwrap(), ..request.clone() };
    assert_eq!(kind(&own.put::<_, Disk>(&path, &changed).await.unwrap_err()), (409, "other-disk"));
    let changed = DiskRequest { mac: Some(MAC.parse().unwrap()), ..request.clone() };
    assert_eq!(kind(&own.put::<_, Disk>(&path, &changed).await.unwrap_err()), (409, "other-disk"));
    // Another project's image is as good as none.
    let theirs = DiskRequest { project: "p2".parse().unwrap(), ..request };
    let path2 = format!("v1/disks/{}", LeaseId::random());
    assert_eq!(kind(&other.put::<_, Disk>(&path2, &theirs).await.unwrap_err()).0, 404);
    assert_eq!(own.get::<Vec<Disk>>("v1/disks").await.unwrap().len(), 2);
    assert!(other.get::<Vec<Disk>>("v1/disks").await.unwrap().is_empty());
    assert!(other.get::<Vec<Image>>("v1/images").await.unwrap().is_empty());
    assert_eq!(kind(&own.get::<Vec<Export>>("v1/exports").await.unwrap_err()).0, 403);
    assert_eq!(kind(&own.post::<_, Gateway>("v1/gateways", &site.gateway_record()).await.unwrap_err()).0, 403);
    let project = Project { name: "p1".parse().unwrap(), verifier_keys: vec![] };
    assert_eq!(kind(&own.post::<_, Project>("v1/projects", &project).await.unwrap_err()).0, 403);
    assert_eq!(kind(&other.delete::<_, ()>(&path, &()).await.unwrap_err()).0, 403);
    own.delete::<_, ()>(&path, &()).await.unwrap();
    own.delete::<_, ()>(&path, &()).await.unwrap();
    site.stop().await;
}

#[tokio::test]
async fn a_disk_that_is_exported_is_not_deleted() {
    let site = Site::new().await;
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap();
    let path = format!("v1/disks/{}", site.lease);
    let refused = site.service.operator.delete::<_, ()>(&path, &()).await.unwrap_err();
    assert_eq!(kind(&refused), (409, "exported"));
    site.service.end(claims.jti).await.unwrap();
    site.service.operator.delete::<_, ()>(&path, &()).await.unwrap();
    assert!(site.service.operator.get::<Vec<Disk>>("v1/disks").await.unwrap().is_empty());
    assert_eq!(std::fs::read_dir(site.folder.path().join("store/disks")).unwrap().count(), 0);
    site.stop().await;
}

#[tokio::test]
async fn imports_that_cannot_be_are_refused_in_words() {
    let site = Site::new().await;
    let taken = site.import("golden", "source.raw", ImageFormat::Raw).await.unwrap_err();
    assert_eq!(kind(&taken), (409, "image-exists"));
    let malformed = site.import("other", "source.raw", ImageFormat::Qcow2).await.unwrap_err();
    assert_eq!(kind(&malformed), (400, "image-malformed"));
    let outside = site.import("other", "../../etc/passwd", ImageFormat::Raw).await.unwrap_err();
    assert_eq!(kind(&outside), (403, "outside-import-folders"));
    let missing = site.import("other", "none.raw", ImageFormat::Raw).await.unwrap_err();
    assert_eq!(kind(&missing), (503, "store"));
    let images: Vec<Image> = site.service.operator.get("v1/images").await.unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!((images[0].virtual_bytes, images[0].project.as_str()), (1 << 20, "p1"));
    site.stop().await;
}

/// Two projects with one gateway: their nodes' addresses do not clash, and neither's exports are taken for unknown ones.
#[tokio::test]
async fn projects_share_a_gateway() {
    let mut site = Site::new().await;
    let operator = &site.service.operator;
    let other = Project { name: "p2".parse().unwrap(), verifier_keys: vec![VerifierKey::of(&site.key).to_string()] };
    let _: Project = operator.post("v1/projects", &other).await.unwrap();
    // How initiators log in is each project's own to say.
    let chap = ChapAlgorithms::Sha256;
    let same = Gateway { project: "p2".parse().unwrap(), chap, ..site.gateway_record() };
    let differing = Gateway { relay: "127.20.0.2:8443".parse().unwrap(), ..same.clone() };
    assert_eq!(
        kind(&operator.post::<_, Gateway>("v1/gateways", &differing).await.unwrap_err()),
        (409, "gateway-differs")
    );
    let _: Gateway = operator.post("v1/gateways", &same).await.unwrap();
    assert_eq!(operator.get::<Vec<Gateway>>("v1/gateways").await.unwrap(), [site.gateway_record(), same.clone()]);
    let public = ImageChange { public: Some(true), ..ImageChange::default() };
    let _: Image = operator.patch("v1/images/golden", &public).await.unwrap();
    let lease = LeaseId::random();
    let request =
        DiskRequest { project: "p2".parse().unwrap(), node: "n2".parse().unwrap(), image: image(), mac: None };
    let _: Disk = operator.put(&format!("v1/disks/{lease}"), &request).await.unwrap();

    let (ours, theirs) = (site.claims(), site.claims());
    let theirs = Claims { project: "p2".parse().unwrap(), node: "n2".parse().unwrap(), lease, ..theirs };
    let mut addresses = Vec::new();
    for claims in [&ours, &theirs] {
        let answer = site.service.export(&site.sign(claims)).await.unwrap();
        addresses.push(answer.address.address.to_string());
    }
    assert_eq!(addresses, ["127.20.0.50/24", "127.20.0.51/24"]);

    // A gateway that lost them all gets both again, and keeps both.
    let portal = site.gateway.portal;
    site.gateway.stop().await;
    site.gateway = RunningGateway::start_on(site.folder.path(), &site.clock, portal).await;
    until(async || site.gateway.status().await.exports.len() == 2).await;
    // What no project has on record goes: so the gateway was looked at as a whole since.
    site.service.stop().await;
    let store = LocalStore::open(&site.folder.path().join("store")).unwrap();
    let stray = AdmissionId::random();
    let order = ExportOrder { expires_at_ms: NOW_MS + 600_000, ..order(&store) };
    drop(store);
    site.gateway.put_up(stray, &order).await.unwrap();
    site.service = Service::start(site.folder.path(), &site.clock).await;
    until(async || site.gateway.status().await.exports.iter().all(|served| served.admission != stray)).await;
    assert_eq!(site.gateway.status().await.exports.len(), 2);

    // Its exports must be ended by the gateway that has them.
    let operator = &site.service.operator;
    let moved = Gateway { control_socket: "/run/another.sock".into(), ..same };
    assert_eq!(kind(&operator.post::<_, Gateway>("v1/gateways", &moved).await.unwrap_err()), (409, "gateway-in-use"));
    site.service.end(theirs.jti).await.unwrap();
    let _: Gateway = operator.post("v1/gateways", &moved).await.unwrap();
    assert_eq!(site.gateway.status().await.exports.len(), 1);
    site.stop().await;
}
