//! A node whose TPM opens the grants that are sealed to it.

use super::site::Site;
use super::*;
use assay_imaging::store::{DiskLocation, Upper};
use assay_tpm::seal::open_grant;
use assay_tpm::soft_keys::{Maker, SoftKeys};
use assay_wire::agent::Grant;
use assay_wire::id::LeaseId;
use assay_wire::imaging::{Disk, DiskRequest, ExportAnswer};
use assay_wire::result::Claims;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};

/// A node with a TPM, a lease and a disk.
pub(crate) struct Node {
    name: &'static str,
    pub(crate) mac: &'static str,
    pub(crate) lease: LeaseId,
    keys: SoftKeys,
}

impl Node {
    pub(crate) async fn with_disk(site: &Site, name: &'static str, mac: &'static str) -> Self {
        Self::with_disk_of(site, image(), name, mac).await
    }

    pub(crate) async fn with_disk_of(site: &Site, image: ImageId, name: &'static str, mac: &'static str) -> Self {
        let node = Self { name, mac, lease: LeaseId::random(), keys: Maker::new().manufacture() };
        let (project, node_id) = ("p1".parse().unwrap(), name.parse().unwrap());
        let request = DiskRequest { project, node: node_id, image, mac: Some(mac.parse().unwrap()) };
        let _: Disk = site.service.operator.put(&format!("v1/disks/{}", node.lease), &request).await.unwrap();
        node
    }

    pub(crate) fn claims(&self, site: &Site) -> Claims {
        Claims {
            jti: AdmissionId::random(),
            node: self.name.parse().unwrap(),
            lease: self.lease,
            ek_public: URL_SAFE_NO_PAD.encode(&self.keys.ek_public),
            ek_sha256: hex::encode(digest(&SHA256, &self.keys.ek_public)),
            ak_name: hex::encode(self.keys.ak_name().as_bytes()),
            ..site.claims()
        }
    }

    pub(crate) async fn exported(&self, site: &Site) -> ExportAnswer {
        site.service.export(&site.sign(&self.claims(site))).await.unwrap()
    }

    /// The grant as this node's TPM opens it; none if it is not for this TPM.
    pub(crate) fn open(&self, answer: &ExportAnswer) -> Option<Grant> {
        let key: [u8; 32] = self.keys.activate(&answer.grant.credential)?.try_into().ok()?;
        serde_json::from_slice(&open_grant(&key, &answer.grant).ok()?).ok()
    }
}

/// What an initiator needs of a grant, and where it speaks from.
pub(crate) fn credentials(answer: &ExportAnswer, grant: &Grant) -> ExportOrder {
    ExportOrder {
        address: answer.address.address.addr(),
        sessions: 1,
        target: grant.target.clone(),
        initiator: grant.initiator.clone(),
        chap_name: grant.chap_name.clone(),
        chap_secret: grant.chap_secret.clone(),
        chap: ChapAlgorithms::Any,
        disk: DiskId::random(),
        location: DiskLocation { golden: ImageKey::random(), root: [0; 32], upper: Upper::Files },
        reservation: None,
        expires_at_ms: 0,
    }
}
