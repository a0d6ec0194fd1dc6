//! Attacks on exports, by their ids: results that say two things (D2), revocations that are forgotten (D4), another
//! node's disk (D6). With a real gateway, a real initiator, and grants opened by the keys they are sealed to.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test stops where it fails")]

mod rig;

use assay_imaging::gateway::order::ExportOrder;
use assay_wire::result::{Claims, SignedResult};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rig::node::{Node, credentials};
use rig::site::{Site, kind, until};
use rig::{Held, connect_from, libiscsi, text, way};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

async fn logs_in(site: &Site, order: &ExportOrder) -> bool {
    libiscsi("iscsi-inq", site.gateway.portal, order).await.status.success()
}

#[tokio::test]
async fn d6_a_node_opens_its_own_export_and_no_other() {
    let site = Site::new().await;
    let a = Node::with_disk(&site, "n2", "52:54:00:00:00:02").await;
    let b = Node::with_disk(&site, "n3", "52:54:00:00:00:03").await;
    let (answer_a, answer_b) = (a.exported(&site).await, b.exported(&site).await);
    assert!(a.open(&answer_b).is_none(), "another TPM opened the grant");
    let (grant_a, grant_b) = (a.open(&answer_a).unwrap(), b.open(&answer_b).unwrap());
    let (mine, theirs) = (credentials(&answer_a, &grant_a), credentials(&answer_b, &grant_b));
    assert!(logs_in(&site, &mine).await && logs_in(&site, &theirs).await);
    // A stolen secret is of no use elsewhere: A's connections never reach B's process.
    let stolen = ExportOrder { address: mine.address, ..theirs.clone() };
    assert!(!logs_in(&site, &stolen).await, "A opened B's export with B's own secret");
    // Names are no secrets: A knows all of B's, and has its address. Even then its own secret opens nothing of B's.
    let target = ExportOrder { target: theirs.target.clone(), address: theirs.address, ..mine.clone() };
    let initiator = ExportOrder { initiator: theirs.initiator.clone(), ..target.clone() };
    let chap_name = ExportOrder { chap_name: theirs.chap_name.clone(), ..initiator.clone() };
    for (what, order) in [("target", target), ("initiator", initiator), ("CHAP name", chap_name)] {
        assert!(!logs_in(&site, &order).await, "A opened B's export with B's {what}");
    }
    // Nor does A's secret open A's own export for whoever calls itself otherwise: one initiator, one name.
    let other_initiator = ExportOrder { initiator: theirs.initiator.clone(), ..mine.clone() };
    let other_name = ExportOrder { chap_name: theirs.chap_name.clone(), ..mine.clone() };
    for (what, order) in [("initiator", other_initiator), ("CHAP name", other_name)] {
        assert!(!logs_in(&site, &order).await, "A's export was opened by another {what}");
    }
    // And a result about B makes no export of the disk of A's lease.
    let crossed = Claims { lease: a.lease, ..b.claims(&site) };
    assert_eq!(kind(&site.service.export(&site.sign(&crossed)).await.unwrap_err()), (403, "other-disk"));
    // The sealed grant of one admission in the envelope of another: the admission is authenticated with it.
    let mut swapped = answer_a.clone();
    swapped.grant.admission = answer_b.admission;
    assert!(a.open(&swapped).is_none());
    site.stop().await;
}

/// Whoever speaks with B's MAC address gets B's IP address (tinkerbell/tink#507): that must be all it gets.
#[tokio::test]
async fn d6_a_spoofed_mac_gets_an_address_and_no_disk() {
    let site = Site::new().await;
    let b = Node::with_disk(&site, "n3", "52:54:00:00:00:03").await;
    let answer = b.exported(&site).await;
    assert_eq!(site.gateway.reserved(), [(b.mac.to_owned(), answer.address.address.addr().to_string())]);
    let grant = b.open(&answer).unwrap();
    // All that the spoofer can have seen on the wire: names, and no secret.
    let guess = ExportOrder { chap_secret: "0123456789abcdef".into(), ..credentials(&answer, &grant) };
    assert!(!logs_in(&site, &guess).await);
    let url = format!("iscsi://{}/{}/0", way(guess.address, site.gateway.portal).await, grant.target);
    let open = rig::run(std::process::Command::new("iscsi-inq").args(["-i", grant.initiator.as_str(), &url])).await;
    assert!(!open.status.success(), "let in without CHAP: {}", text(&open));
    site.stop().await;
}

#[tokio::test]
async fn d6_an_earlier_admissions_secret_opens_nothing() {
    let site = Site::new().await;
    let a = Node::with_disk(&site, "n2", "52:54:00:00:00:02").await;
    let (earlier, later) = (a.exported(&site).await, a.exported(&site).await);
    let (first, second) = (a.open(&earlier).unwrap(), a.open(&later).unwrap());
    assert!(first.chap_secret != second.chap_secret && first.initiator != second.initiator);
    assert!(!logs_in(&site, &credentials(&later, &first)).await);
    // The disk is the lease's, and so is the target's name: only the credentials changed.
    assert_eq!(first.target, second.target);
    assert!(logs_in(&site, &credentials(&later, &second)).await);
    site.stop().await;
}

#[tokio::test]
async fn d2_a_token_that_says_two_things_makes_no_export() {
    let site = Site::new().await;
    let claims = serde_json::to_string(&site.claims()).unwrap();
    for doubled in [r#"{"assay.project":"p2","#, r#"{"assay.node":"n9","#] {
        let payload = URL_SAFE_NO_PAD.encode(claims.replacen('{', doubled, 1));
        let signed = format!("{}.{payload}", URL_SAFE_NO_PAD.encode(r#"{"alg":"EdDSA","typ":"JWT"}"#));
        let signature = URL_SAFE_NO_PAD.encode(site.key.sign(signed.as_bytes()));
        let result = SignedResult::from_wire(format!("{signed}.{signature}"));
        assert_eq!(kind(&site.service.export(&result).await.unwrap_err()), (403, "result-refused"), "{doubled}");
    }
    assert!(site.service.exports().await.is_empty());
    site.stop().await;
}

/// A site may let results live for days. One whose admission was revoked is remembered for longer than that.
#[tokio::test]
async fn d4_a_revoked_result_stays_revoked_for_as_long_as_it_is_valid() {
    let site = Site::new().await;
    let claims = Claims { exp: site.claims().iat + 7 * 86_400, ..site.claims() };
    // Revoked before it was ever used: nothing but its id is known.
    site.service.end(claims.jti).await.unwrap();
    // And revoked after it was.
    let node = Node::with_disk(&site, "n4", "52:54:00:00:00:04").await;
    let used = Claims { exp: claims.exp, ..node.claims(&site) };
    site.service.export(&site.sign(&used)).await.unwrap();
    site.service.end(used.jti).await.unwrap();
    site.clock.advance_ms(6 * 86_400_000);
    // Upkeep has run when an expired export is gone.
    let probe = Node::with_disk(&site, "n2", "52:54:00:00:00:02").await;
    let soon = Claims { iat: claims.iat + 6 * 86_400, exp: claims.iat + 6 * 86_400 + 60, ..probe.claims(&site) };
    site.service.export(&site.sign(&soon)).await.unwrap();
    site.clock.advance_ms(61_000);
    until(async || site.service.exports().await.is_empty()).await;
    for ended in [&claims, &used] {
        assert_eq!(kind(&site.service.export(&site.sign(ended)).await.unwrap_err()), (409, "admission-ended"));
    }
    site.stop().await;
}

/// A relay from a node to the portal for one connection, that tells when the portal closed it.
async fn witness(node: Ipv4Addr, portal: SocketAddr) -> (SocketAddr, oneshot::Receiver<Instant>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, closed) = oneshot::channel();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_portal, mut to_portal) = connect_from(node, portal).await.unwrap().into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_portal).await });
        let _closed_or_reset = tokio::io::copy(&mut from_portal, &mut to_client).await;
        let _nobody_waits = tell.send(Instant::now());
    });
    (address, closed)
}

/// From the order to end an admission to the moment at which the initiator's connection is gone.
#[tokio::test]
async fn revocation_cuts_the_session_within_a_second() {
    let site = Site::new().await;
    let a = Node::with_disk(&site, "n2", "52:54:00:00:00:02").await;
    let mut taken = Vec::new();
    for _ in 0..10 {
        let answer = a.exported(&site).await;
        let order = credentials(&answer, &a.open(&answer).unwrap());
        let (relay, closed) = witness(order.address, site.gateway.portal).await;
        let held = Held::open_at(relay, &order).await;
        let begun = Instant::now();
        site.service.end(answer.admission).await.unwrap();
        let closed = tokio::time::timeout(Duration::from_secs(10), closed).await.unwrap().unwrap();
        taken.push(closed.saturating_duration_since(begun));
        drop(held);
    }
    taken.sort();
    eprintln!("revocation to session cut: p50 {:?}, longest {:?} of {}", taken[5], taken[9], taken.len());
    assert!(taken[9] < Duration::from_secs(1), "{taken:?}");
    site.stop().await;
}

/// The gateway's own clock severs, whether or not imaging still runs.
#[tokio::test]
async fn d3_expiry_severs_the_session_without_anybodys_order() {
    let site = Site::new().await;
    let a = Node::with_disk(&site, "n2", "52:54:00:00:00:02").await;
    let answer = a.exported(&site).await;
    let order = credentials(&answer, &a.open(&answer).unwrap());
    let (relay, closed) = witness(order.address, site.gateway.portal).await;
    let _held = Held::open_at(relay, &order).await;
    let Site { service, gateway, clock, .. } = site;
    service.stop().await;
    let begun = Instant::now();
    clock.advance_ms(600_000);
    let closed = tokio::time::timeout(Duration::from_secs(10), closed).await.unwrap().unwrap();
    assert!(closed.saturating_duration_since(begun) < Duration::from_secs(1));
    gateway.stop().await;
}
