//! Images and disks over the API: who may do what, what is refused and how it is named.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_service::client::{ClientError, ServiceClient};
use assay_wire::id::{ImageId, LeaseId, ProjectId};
use assay_wire::imaging::{
    CopyRequest, Disk, DiskOutcome, DiskRequest, DisksAnswer, DisksRequest, Image, ImageChange, ImageDetail,
    ImageFormat, ImageKind, ImageState, ImportRequest, ImportSource, ImportStatus, NewDisk, RestoreRequest,
    SnapshotRequest, SourceFormat, Upload, UploadRequest,
};
use rig::pattern;
use rig::site::{Site, kind, until};
use std::os::unix::fs::FileExt as _;

fn name(text: &str) -> ImageId {
    text.parse().unwrap()
}

fn project(text: &str) -> ProjectId {
    text.parse().unwrap()
}

fn request(project_name: &str, image: &str) -> DiskRequest {
    DiskRequest { project: project(project_name), node: "n1".parse().unwrap(), image: name(image), mac: None }
}

async fn clone(client: &ServiceClient, project: &str, image: &str) -> Result<Disk, ClientError> {
    client.put(&format!("v1/disks/{}", LeaseId::random()), &request(project, image)).await
}

async fn work(client: &ServiceClient, path: &str, body: &(impl serde::Serialize + Sync)) -> ImportStatus {
    let answer = client.post_streaming(path, body).await.unwrap().text().await.unwrap();
    serde_json::from_str(answer.lines().last().unwrap()).unwrap()
}

fn done(status: ImportStatus) -> Image {
    match status {
        ImportStatus::Done { image } => *image,
        other => panic!("{other:?}"),
    }
}

async fn images(client: &ServiceClient) -> Vec<String> {
    client.get::<Vec<Image>>("v1/images").await.unwrap().into_iter().map(|image| image.name.to_string()).collect()
}

#[tokio::test]
async fn an_unshared_image_is_no_other_projects() {
    let site = Site::new().await;
    let (owner, other) = (site.service.project_client("p1"), site.service.project_client("p2"));
    let refused = clone(&other, "p2", "golden").await.unwrap_err();
    assert_eq!(kind(&refused), (404, "not-found"));
    assert_eq!(kind(&other.get::<ImageDetail>("v1/images/golden").await.unwrap_err()), (404, "not-found"));
    let taken = ImageChange { public: Some(true), ..ImageChange::default() };
    assert_eq!(kind(&other.patch::<_, Image>("v1/images/golden", &taken).await.unwrap_err()).0, 404);
    assert_eq!(kind(&other.delete::<_, ()>("v1/images/golden", &()).await.unwrap_err()).0, 404);
    let copy = CopyRequest { name: name("mine"), project: project("p2") };
    let copied = other.post_streaming("v1/images/golden/copy", &copy).await.unwrap_err();
    assert_eq!(kind(&copied).0, 404);
    // Shared, it may be used, and no more than that.
    let share = ImageChange { share_with: [project("p2"), project("p3")].into(), ..ImageChange::default() };
    let shared: Image = owner.patch("v1/images/golden", &share).await.unwrap();
    assert_eq!(shared.shared_with.len(), 2);
    let disk = clone(&other, "p2", "golden").await.unwrap();
    let seen: ImageDetail = other.get("v1/images/golden").await.unwrap();
    assert_eq!(seen.image.shared_with, [project("p2")].into(), "with whom else is not told");
    assert_eq!(seen.dependents, [format!("the disk of node `n1` (lease {})", disk.lease)], "nor who else uses it");
    assert_eq!(kind(&other.patch::<_, Image>("v1/images/golden", &taken).await.unwrap_err()).0, 403);
    assert_eq!(kind(&other.delete::<_, ()>("v1/images/golden", &()).await.unwrap_err()).0, 403);
    assert_eq!(done(work(&other, "v1/images/golden/copy", &copy).await).project, project("p2"));
    // No more shared, what was made stays.
    let unshare = ImageChange { unshare_with: [project("p2")].into(), ..ImageChange::default() };
    let _: Image = owner.patch("v1/images/golden", &unshare).await.unwrap();
    assert_eq!(kind(&clone(&other, "p2", "golden").await.unwrap_err()).0, 404);
    assert_eq!(other.get::<Vec<Disk>>("v1/disks").await.unwrap(), std::slice::from_ref(&disk));
    let (path, golden) = (format!("v1/disks/{}/restore", disk.lease), RestoreRequest { image: name("golden") });
    assert_eq!(kind(&other.post::<_, Disk>(&path, &golden).await.unwrap_err()).0, 404);
    let _: Image = owner.patch("v1/images/golden", &taken).await.unwrap();
    clone(&other, "p2", "golden").await.unwrap();
    assert_eq!(images(&other).await, ["golden", "mine"]);
    site.stop().await;
}

#[tokio::test]
async fn images_are_renamed_moved_and_tagged() {
    let site = Site::new().await;
    let (operator, owner) = (&site.service.operator, site.service.project_client("p1"));
    let change =
        ImageChange { name: Some(name("debian-12")), add_tags: ["stable".into()].into(), ..ImageChange::default() };
    let renamed: Image = owner.patch("v1/images/golden", &change).await.unwrap();
    assert_eq!((renamed.name.as_str(), renamed.tags.len()), ("debian-12", 1));
    assert_eq!(owner.get::<Vec<Disk>>("v1/disks").await.unwrap()[0].image, name("debian-12"), "its disks say so");
    assert_eq!(kind(&owner.get::<ImageDetail>("v1/images/golden").await.unwrap_err()).0, 404);
    site.import("golden", "source.raw", ImageFormat::Raw).await.unwrap();
    let taken = ImageChange { name: Some(name("golden")), ..ImageChange::default() };
    assert_eq!(kind(&owner.patch::<_, Image>("v1/images/debian-12", &taken).await.unwrap_err()), (409, "image-exists"));
    let moved = ImageChange { project: Some(project("p2")), ..ImageChange::default() };
    assert_eq!(kind(&owner.patch::<_, Image>("v1/images/debian-12", &moved).await.unwrap_err()).0, 403);
    let _: Image = operator.patch("v1/images/debian-12", &moved).await.unwrap();
    assert_eq!(images(&owner).await, ["golden"]);
    let bad = ImageChange { add_tags: ["a\u{7}b".into()].into(), ..ImageChange::default() };
    assert_eq!(kind(&owner.patch::<_, Image>("v1/images/golden", &bad).await.unwrap_err()), (400, "tag-malformed"));
    site.stop().await;
}

#[tokio::test]
async fn snapshots_restores_and_moves() {
    let site = Site::new().await;
    let client = site.service.project_client("p1");
    let path = format!("v1/disks/{}", site.lease);
    let claims = site.claims();
    site.service.export(&site.sign(&claims)).await.unwrap();
    // A node that runs from it waits for a moment; its disk is not exchanged below it.
    let running = SnapshotRequest { name: name("running") };
    let running: Image = client.post(&format!("{path}/snapshot"), &running).await.unwrap();
    assert_eq!((running.kind, running.state), (ImageKind::Snapshot, ImageState::Ready));
    let served = site.gateway.status().await.exports;
    assert_eq!((served.len(), served[0].restarts), (1, 0), "served all the time by the same process");
    let to = RestoreRequest { image: name("running") };
    let restored = client.post::<_, Disk>(&format!("{path}/restore"), &to).await.unwrap_err();
    assert_eq!(kind(&restored), (409, "exported"));
    assert!(restored.problem().unwrap().hint.as_ref().unwrap().contains("turn the node off"));
    client.delete::<_, ()>("v1/images/running", &()).await.unwrap();
    let order = SnapshotRequest { name: name("after-setup") };
    site.service.end(claims.jti).await.unwrap();
    let taken: Image = client.post(&format!("{path}/snapshot"), &order).await.unwrap();
    assert_eq!((taken.kind, taken.state, taken.project.as_str()), (ImageKind::Snapshot, ImageState::Ready, "p1"));
    let golden: ImageDetail = client.get("v1/images/golden").await.unwrap();
    assert_eq!(taken.provenance.parent, Some(golden.image.key));
    assert_eq!(golden.dependents.len(), 2, "{:?}", golden.dependents);
    let again = client.post::<_, Image>(&format!("{path}/snapshot"), &order).await.unwrap_err();
    assert_eq!(kind(&again), (409, "image-exists"));
    // What has clones stays, and they are named.
    let refused = client.delete::<_, ()>("v1/images/golden", &()).await.unwrap_err();
    assert_eq!(kind(&refused), (409, "has-dependents"));
    let detail = &refused.problem().unwrap().detail;
    assert!(detail.contains("node `n1`") && detail.contains(&site.lease.to_string()), "{detail}");
    let clone = clone(&client, "p1", "after-setup").await.unwrap();
    assert_eq!(kind(&client.delete::<_, ()>("v1/images/after-setup", &()).await.unwrap_err()), (409, "has-dependents"));
    let restored: Disk = client
        .post(&format!("v1/disks/{}/restore", clone.lease), &RestoreRequest { image: name("golden") })
        .await
        .unwrap();
    assert_eq!((restored.id, restored.image.as_str()), (clone.id, "golden"));
    let flat = done(work(&client, "v1/images/after-setup/flatten", &()).await);
    assert_eq!(flat.kind, ImageKind::Golden);
    assert_eq!(flat.sha256, golden.image.sha256, "nothing was written");
    client.delete::<_, ()>("v1/images/after-setup", &()).await.unwrap();
    // To another lease and node, which is then the one that it is exported for.
    let to = NewDisk { lease: LeaseId::random(), node: "n9".parse().unwrap(), mac: None };
    let occupied = NewDisk { lease: clone.lease, ..to.clone() };
    assert_eq!(
        kind(&client.post::<_, Disk>(&format!("{path}/move"), &occupied).await.unwrap_err()),
        (409, "other-disk")
    );
    let moved: Disk = client.post(&format!("{path}/move"), &to).await.unwrap();
    assert_eq!((moved.lease, moved.node.as_str()), (to.lease, "n9"));
    assert_eq!(kind(&site.service.export(&site.sign(&site.claims())).await.unwrap_err()), (409, "no-disk"));
    site.stop().await;
}

#[tokio::test]
async fn a_hundred_disks_in_one_call() {
    let site = Site::new().await;
    let client = site.service.project_client("p1");
    let new = |node: usize| NewDisk { lease: LeaseId::random(), node: format!("n{node}").parse().unwrap(), mac: None };
    let mut disks: Vec<NewDisk> = (0..100).map(new).collect();
    disks[7].lease = site.lease;
    let request = DisksRequest { project: project("p1"), image: name("golden"), disks };
    let answer: DisksAnswer = client.post("v1/disks", &request).await.unwrap();
    for (at, (outcome, asked)) in answer.outcomes.iter().zip(&request.disks).enumerate() {
        match outcome {
            DiskOutcome::Made { disk } => assert_eq!((disk.lease, &disk.node), (asked.lease, &asked.node)),
            DiskOutcome::Failed { lease, problem } => {
                assert_eq!((at, *lease, problem.kind.as_str()), (7, site.lease, "other-disk"), "{problem:?}");
            }
        }
    }
    assert_eq!(client.get::<Vec<Disk>>("v1/disks").await.unwrap().len(), 100);
    let many = DisksRequest { disks: (0..300).map(new).collect(), ..request };
    assert_eq!(kind(&client.post::<_, DisksAnswer>("v1/disks", &many).await.unwrap_err()), (400, "too-many-disks"));
    site.stop().await;
}

#[tokio::test]
async fn what_was_promised_of_a_source_is_checked() {
    let site = Site::new().await;
    let operator = &site.service.operator;
    std::fs::write(site.folder.path().join("odd.raw"), pattern(700_001)).unwrap();
    let digest = hex::encode(ring::digest::digest(&ring::digest::SHA256, &pattern(700_001)));
    let source = site.folder.path().join("odd.raw").display().to_string();
    let mut import = ImportRequest {
        name: name("odd"),
        project: project("p1"),
        source: ImportSource::Path(source),
        format: SourceFormat::Raw,
        sha256: Some(digest.replace('a', "b")),
    };
    let failed = work(operator, "v1/images", &import).await;
    assert!(matches!(&failed, ImportStatus::Failed { detail, .. } if detail.contains(&digest)), "{failed:?}");
    assert_eq!(images(operator).await, ["golden"], "nothing is left of it");
    import.sha256 = Some(digest.clone());
    let image = done(work(operator, "v1/images", &import).await);
    assert_eq!(image.provenance.source_sha256, Some(digest), "of the file, not of the disk");
    assert_ne!(image.sha256, image.provenance.source_sha256);
    assert_eq!((image.provenance.made_by.as_str(), image.virtual_bytes % 512), ("operator", 0));
    site.stop().await;
}

#[tokio::test]
async fn an_image_that_rots_or_is_exchanged_is_named_and_not_served() {
    let mut site = Site::new().await;
    let operator = &site.service.operator;
    let prepared = done(work(operator, "v1/images/golden/prepare", &()).await);
    let folder = site.folder.path().join("store/images").join(prepared.key.to_string());
    let disk = std::fs::OpenOptions::new().write(true).open(folder.join("disk.raw")).unwrap();
    disk.write_all_at(b"rot", 200_000).unwrap();
    let failed = work(operator, "v1/images/golden/prepare", &()).await;
    assert!(matches!(&failed, ImportStatus::Failed { detail, .. } if detail.contains("196608")), "{failed:?}");
    // Somebody who can write to the store puts another image in its place, with a tree that fits.
    std::fs::write(site.folder.path().join("evil.raw"), vec![7; 1 << 20]).unwrap();
    let last = site.import("evil", "evil.raw", ImageFormat::Raw).await.unwrap().pop().unwrap();
    let evil = done(last);
    let evil_folder = site.folder.path().join("store/images").join(evil.key.to_string());
    for file in ["disk.raw", "tree.sha256", "image.json"] {
        std::fs::copy(evil_folder.join(file), folder.join(file)).unwrap();
    }
    let manifest = std::fs::read_to_string(folder.join("image.json")).unwrap();
    let manifest = manifest.replace(&evil.key.to_string(), &prepared.key.to_string());
    std::fs::write(folder.join("image.json"), manifest).unwrap();
    let refused = clone(operator, "p1", "golden").await.unwrap_err();
    assert_eq!(kind(&refused), (409, "image-tampered"));
    site.service.stop().await;
    site.service = rig::site::Service::start(site.folder.path(), &site.clock).await;
    let refused = clone(&site.service.operator, "p1", "golden").await.unwrap_err();
    assert_eq!(kind(&refused), (409, "image-tampered"), "a restart does not learn the new root");
    site.stop().await;
}

#[tokio::test]
async fn an_image_is_exported_from_any_octet_to_whoever_may_use_it() {
    let site = Site::new().await;
    let (owner, other) = (site.service.project_client("p1"), site.service.project_client("p2"));
    let path = |format: &str, offset: usize| format!("v1/images/golden/content?format={format}&offset={offset}");
    let all = owner.get_streaming(&path("raw", 0)).await.unwrap().bytes().await.unwrap();
    assert!(all[..] == pattern(1 << 20));
    let rest = owner.get_streaming(&path("raw", 700_001)).await.unwrap().bytes().await.unwrap();
    assert!(rest[..] == all[700_001..]);
    let qcow2 = owner.get_streaming(&path("qcow2", 0)).await.unwrap().bytes().await.unwrap();
    let half = owner.get_streaming(&path("qcow2", 100_000)).await.unwrap().bytes().await.unwrap();
    assert!(half[..] == qcow2[100_000..]);
    let behind = owner.get_streaming(&path("raw", (1 << 20) + 1)).await.unwrap_err();
    assert_eq!(kind(&behind), (400, "offset"));
    assert_eq!(kind(&other.get_streaming(&path("raw", 0)).await.unwrap_err()).0, 404);
    site.stop().await;
}

#[tokio::test]
async fn an_upload_goes_on_where_it_was_broken_off_and_is_checked() {
    let site = Site::new().await;
    let (owner, other) = (site.service.project_client("p1"), site.service.project_client("p2"));
    let mut content = pattern(700_000);
    content[300_000..600_000].fill(0);
    let sha256 = hex::encode(ring::digest::digest(&ring::digest::SHA256, &content));
    let request = UploadRequest { project: project("p1"), bytes: 700_000, sha256 };
    assert_eq!(kind(&other.post::<_, Upload>("v1/uploads", &request).await.unwrap_err()).0, 403);
    let begun: Upload = owner.post("v1/uploads", &request).await.unwrap();
    let path = |offset: usize| format!("v1/uploads/{}?offset={offset}", begun.id);
    let first: Upload = owner.put_octets(&path(0), content[..300_000].to_vec()).await.unwrap();
    assert_eq!(first.received, 300_000);
    // Broken off, and begun again: it is the same upload, and what is there is not sent again.
    let again: Upload = owner.post("v1/uploads", &request).await.unwrap();
    assert_eq!(again, first);
    let twice = owner.put_octets::<Upload>(&path(200_000), vec![1; 10]).await.unwrap_err();
    assert_eq!(kind(&twice), (409, "offset"));
    assert!(twice.problem().unwrap().detail.contains("has 300000 of 700000"), "{twice}");
    let import = ImportRequest {
        name: name("uploaded"),
        project: project("p1"),
        source: ImportSource::Upload(begun.id),
        format: SourceFormat::Raw,
        sha256: None,
    };
    let early = owner.post_streaming("v1/images", &import).await.unwrap_err();
    assert_eq!(kind(&early), (409, "not-uploaded"));
    // Zeros are left out.
    let last: Upload = owner.put_octets(&path(600_000), content[600_000..].to_vec()).await.unwrap();
    assert_eq!(last.received, 700_000);
    assert_eq!(kind(&owner.put_octets::<Upload>(&path(700_000), vec![1]).await.unwrap_err()), (409, "offset"));
    assert_eq!(kind(&other.get::<Upload>(&format!("v1/uploads/{}", begun.id)).await.unwrap_err()).0, 404);
    let theirs = ImportRequest { project: project("p2"), ..import.clone() };
    assert_eq!(kind(&other.post_streaming("v1/images", &theirs).await.unwrap_err()).0, 404);
    let by_path = ImportRequest { source: ImportSource::Path("/etc/passwd".into()), ..import.clone() };
    assert_eq!(kind(&owner.post_streaming("v1/images", &by_path).await.unwrap_err()).0, 403, "an operator's to say");
    let image = done(work(&owner, "v1/images", &import).await);
    assert_eq!(image.provenance.source_sha256, Some(request.sha256.clone()));
    let exported = owner.get_streaming("v1/images/uploaded/content?format=raw").await.unwrap().bytes().await.unwrap();
    assert!(exported[..700_000] == content);
    assert_eq!(kind(&owner.get::<Upload>(&format!("v1/uploads/{}", begun.id)).await.unwrap_err()).0, 404, "gone");
    // One that is not what it was begun as becomes no image.
    let begun: Upload = owner.post("v1/uploads", &request).await.unwrap();
    let _: Upload = owner.put_octets(&format!("v1/uploads/{}?offset=0", begun.id), vec![7; 700_000]).await.unwrap();
    let wrong = ImportRequest { name: name("wrong"), source: ImportSource::Upload(begun.id), ..import };
    let failed = work(&owner, "v1/images", &wrong).await;
    assert!(matches!(&failed, ImportStatus::Failed { detail, .. } if detail.contains(&request.sha256)), "{failed:?}");
    assert!(!images(&owner).await.contains(&"wrong".to_owned()));
    site.stop().await;
}

#[tokio::test]
async fn an_upload_that_nobody_goes_on_with_is_forgotten() {
    let site = Site::new().await;
    let owner = site.service.project_client("p1");
    let content = pattern(200_000);
    let begin = async |octets: &[u8]| {
        let sha256 = hex::encode(ring::digest::digest(&ring::digest::SHA256, octets));
        let request = UploadRequest { project: project("p1"), bytes: octets.len() as u64, sha256 };
        owner.post::<_, Upload>("v1/uploads", &request).await.unwrap()
    };
    let (left, going_on) = (begin(&content[..100_000]).await, begin(&content).await);
    let uploads = site.folder.path().join("store/uploads");
    // What a process that died between the two files of an upload leaves.
    std::fs::write(uploads.join(assay_wire::id::UploadId::random().to_string()), b"nobody's").unwrap();
    const DAY_MS: i64 = 24 * 60 * 60 * 1000;
    site.clock.advance_ms(6 * DAY_MS);
    let path = format!("v1/uploads/{}", going_on.id);
    let piece = owner.put_octets::<Upload>(&format!("{path}?offset=0"), content[..50_000].to_vec()).await.unwrap();
    assert_eq!(piece.received, 50_000);
    site.clock.advance_ms(2 * DAY_MS);
    let files = || std::fs::read_dir(&uploads).unwrap().count();
    until(async || files() == 2).await;
    assert_eq!(kind(&owner.get::<Upload>(&format!("v1/uploads/{}", left.id)).await.unwrap_err()).0, 404);
    assert_eq!(owner.get::<Upload>(&path).await.unwrap(), piece, "it had a piece two days ago");
    site.clock.advance_ms(6 * DAY_MS);
    until(async || files() == 0).await;
    assert_eq!(kind(&owner.get::<Upload>(&path).await.unwrap_err()).0, 404);
    site.stop().await;
}
