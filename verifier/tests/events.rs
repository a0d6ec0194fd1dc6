//! Events, webhooks and tenants' secrets, against the verifier as it runs, a real HTTP receiver and a real TPM.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic as the test does")]

mod site;
mod support;

use assay_service::auth::Role;
use assay_tpm::seal::open_grant;
use assay_tpm::testing::sha256;
use assay_verifier::api::{Event, EventKind};
use assay_wire::attestation::{SealedSecret, SecretRequest};
use assay_wire::id::LeaseId;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use site::{Agent, Pusher, Site, refusal, released, revoked};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

const SECRET: &[u8] = b"a webhook's own secret";

/// A receiver of webhooks that refuses the first deliveries.
struct Receiver {
    url: String,
    seen: watch::Receiver<Vec<(HeaderMap, String)>>,
}

struct Script {
    seen: watch::Sender<Vec<(HeaderMap, String)>>,
    refusals: usize,
}

impl Receiver {
    async fn start(refusals: usize) -> Self {
        let (sender, seen) = watch::channel(Vec::new());
        let script = Arc::new(Script { seen: sender, refusals });
        let router = Router::new().route("/hook", post(receive)).with_state(script);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, seen }
    }

    /// Waits for the delivery of an event, and checks that it is signed as Standard Webhooks has it.
    async fn delivered(&self, kind: EventKind) -> (String, Event) {
        let mut seen = self.seen.clone();
        let wanted = |(_, body): &&(HeaderMap, String)| {
            serde_json::from_str::<Event>(body).is_ok_and(|event| event.event == kind)
        };
        let arrived = seen.wait_for(|seen| seen.iter().any(|delivery| wanted(&delivery)));
        let seen = tokio::time::timeout(Duration::from_secs(30), arrived).await.expect("no delivery").unwrap();
        let (headers, body) = seen.iter().find(wanted).unwrap().clone();
        let header = |name: &str| headers.get(name).unwrap().to_str().unwrap().to_owned();
        let (id, timestamp) = (header("webhook-id"), header("webhook-timestamp"));
        let signature = STANDARD.decode(header("webhook-signature").strip_prefix("v1,").unwrap()).unwrap();
        let key = hmac::Key::new(hmac::HMAC_SHA256, SECRET);
        hmac::verify(&key, format!("{id}.{timestamp}.{body}").as_bytes(), &signature).unwrap();
        (id, serde_json::from_str(&body).unwrap())
    }
}

async fn receive(State(script): State<Arc<Script>>, headers: HeaderMap, body: String) -> StatusCode {
    let mut count = 0;
    script.seen.send_modify(|seen| {
        seen.push((headers, body));
        count = seen.len();
    });
    if count <= script.refusals { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::NO_CONTENT }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_is_told_of_every_event_until_it_answers() {
    let receiver = Receiver::start(2).await;
    let files = tempfile::tempdir().unwrap();
    let secret_file = files.path().join("secret");
    std::fs::write(&secret_file, SECRET).unwrap();
    let config = format!("[[webhook]]\nurl = \"{}\"\nsecret_file = \"{}\"\n", receiver.url, secret_file.display());
    let (site, agent, session, admission) = released(&config).await;
    let (first, rejected) = receiver.delivered(EventKind::VerdictRejected).await;
    assert!(rejected.detail["reasons"].contains("no policy"), "{rejected:?}");
    receiver.delivered(EventKind::PolicyActivated).await;
    let (_, accepted) = receiver.delivered(EventKind::VerdictAccepted).await;
    assert_eq!(accepted.admission, Some(admission));
    // The first was refused twice and came again under the same id.
    let ids: Vec<_> =
        receiver.seen.borrow().iter().map(|(h, _)| h["webhook-id"].to_str().unwrap().to_owned()).collect();
    assert_eq!(ids.iter().filter(|id| **id == first).count(), 3, "{ids:?}");
    let pusher = Pusher::new(&site, &session, admission);
    let (_, next) = pusher.renewed(&agent).await;
    agent.tpm.extend(7, &sha256(b"another key"));
    let sent = Instant::now();
    revoked(pusher.push(&agent, &next.nonce).await);
    let (_, event) = receiver.delivered(EventKind::AdmissionRevoked).await;
    println!("bad evidence to webhook: {:?}", sent.elapsed());
    assert!(event.detail["reason"].contains("PCR 7") && event.node.is_some());
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_listed_followed_and_taken_up_by_whom_they_concern() {
    let (site, agent, session, admission) = released("").await;
    let listed: Vec<Event> = site.operator.get("/v1/events").await.unwrap();
    let kinds: Vec<_> = listed.iter().map(|event| event.event).collect();
    assert_eq!(kinds, [EventKind::VerdictRejected, EventKind::PolicyActivated, EventKind::VerdictAccepted]);
    let own = site.client_of(Role::Project("alpha".parse().unwrap()));
    assert_eq!(own.get::<Vec<Event>>("/v1/events").await.unwrap().len(), 2);
    let other = site.client_of(Role::Project("beta".parse().unwrap()));
    assert_eq!(other.get::<Vec<Event>>("/v1/events").await.unwrap(), []);

    // Taken up where it broke off: what has happened since comes first, then what happens.
    let mut stream = site.operator.get_streaming(&format!("/v1/events/stream?after={}", listed[1].id)).await.unwrap();
    let mut foreign = other.get_streaming("/v1/events/stream?after=0").await.unwrap();
    let pusher = Pusher::new(&site, &session, admission);
    let wanted = pusher.challenge().await.unwrap();
    agent.tpm.extend(0, &sha256(b"implant"));
    revoked(pusher.push(&agent, &wanted.nonce).await);
    let mut text = String::new();
    while text.lines().filter(|line| !line.is_empty()).count() < 2 {
        let chunk = tokio::time::timeout(Duration::from_secs(20), stream.chunk()).await.expect("no event").unwrap();
        text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
    }
    let followed: Vec<Event> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(followed[0], listed[2]);
    assert_eq!((followed[1].event, followed[1].admission), (EventKind::AdmissionRevoked, Some(admission)));
    // Another project's reader is told nothing but that there is nothing.
    while let Ok(chunk) = tokio::time::timeout(Duration::from_millis(300), foreign.chunk()).await {
        assert!(chunk.unwrap().unwrap().trim_ascii().is_empty());
    }
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_secret_is_for_its_attested_node_alone() {
    let mut agent = Agent::manufacture("n1");
    let site = Site::start(&agent.ek_cas).await;
    let lease = site.lease("n1").lease;
    agent.boot(&support::boot_log(), &site.keys);
    let (session, admission) = site::admitted(&site, &agent).await;
    let pusher = Pusher::new(&site, &session, admission);
    let own = site.client_of(Role::Project("alpha".parse().unwrap()));
    let other = site.client_of(Role::Project("beta".parse().unwrap()));
    let path = |lease: LeaseId| format!("/v1/leases/{lease}/secret");
    let share = |bytes: &[u8]| SecretRequest { share: bytes.to_vec(), shares: 1 };
    // Neither the provider nor another project says what the node gets.
    assert_eq!(refusal(site.operator.put::<_, ()>(&path(lease), &share(b"forged")).await).0, 403);
    other.put::<_, ()>(&path(lease), &share(b"of another project")).await.unwrap();
    assert_eq!(refusal(own.put::<_, ()>(&path(lease), &share(&[0; 65_537])).await).1, "secret-size");
    own.put::<_, ()>(&path(lease), &share(b"the key of the disk")).await.unwrap();
    let database = std::fs::read(site.folder.path().join("verifier.db-wal")).unwrap_or_default();
    assert!(!database.windows(19).any(|window| window == b"the key of the disk"), "a secret is in the database");

    let secret = format!("{}/secret", pusher.path);
    assert_eq!(refusal(pusher.client.get::<SealedSecret>(&secret).await).1, "not-attested");
    let (_, next) = pusher.renewed(&agent).await;
    let sealed: SealedSecret = pusher.client.get(&secret).await.unwrap();
    let key = agent.tpm.activate(&sealed.sealed.credential).unwrap();
    let opened = open_grant(&key.try_into().unwrap(), &sealed.sealed).unwrap();
    assert_eq!((opened.as_slice(), sealed.shares), (&b"the key of the disk"[..], 1));

    agent.tpm.extend(2, &sha256(b"option ROM"));
    revoked(pusher.push(&agent, &next.nonce).await);
    site.peers.called("revoke", &admission.to_string()).await;
    assert_eq!(refusal(pusher.client.get::<SealedSecret>(&secret).await).1, "admission-ended");
    own.delete::<_, ()>(&path(lease), &()).await.unwrap();
    assert_eq!(refusal(own.delete::<_, ()>(&path(lease), &()).await).0, 404);
    site.stop().await;
}
