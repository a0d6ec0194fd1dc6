//! Webhooks: every event, posted to the site's own receivers until each has answered. The queue is the table of events;
//! a receiver that is away loses nothing until that table is full. At least once, in order, and signed as Standard
//! Webhooks has it (`webhook-id`, `webhook-timestamp`, `webhook-signature: v1,<base64 of HMAC-SHA256>` over
//! `id.timestamp.body`), so that a receiver can tell a repetition by its id.

use crate::store::events::{EVENTS, Event, EventKind};
use crate::store::{DbError, VerifierStore};
use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::error::chain;
use assay_service::tls::{TlsError, client_config};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{CONTENT_TYPE, USER_AGENT};
use ring::hmac;
use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;
use url::Url;

/// A receiver, as the configuration has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookConfig {
    /// Where to post.
    pub url: Url,
    /// The file with the secret that deliveries are signed with.
    pub secret_file: PathBuf,
    /// PEM of the CAs that the receiver's certificate may come from.
    pub ca_file: PathBuf,
    /// Which events; all of them if it is empty.
    pub events: BTreeSet<EventKind>,
}

/// Why a webhook cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// A file.
    #[error("reading {what} of webhook {url}: {path}")]
    File {
        /// Which.
        what: &'static str,
        /// Whose.
        url: String,
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Too short to be one.
    #[error("the secret of webhook {url} has {bytes} octets: give it at least {LEAST_SECRET_BYTES}")]
    Secret {
        /// Whose.
        url: String,
        /// How long it is.
        bytes: usize,
    },
    /// The CA.
    #[error("reading the CA of webhook {url}")]
    Ca {
        /// Whose.
        url: String,
        /// Why.
        source: TlsError,
    },
    /// The HTTP client.
    #[error("making an HTTP client for webhook {url}")]
    Http {
        /// Whose.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
}

/// A receiver that can be delivered to.
pub struct Webhook {
    url: Url,
    key: hmac::Key,
    http: reqwest::Client,
    events: BTreeSet<EventKind>,
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook").field("url", &self.url.as_str()).finish_non_exhaustive()
    }
}

impl Webhook {
    /// Reads what the configuration names.
    ///
    /// # Errors
    /// See [`WebhookError`].
    pub fn open(config: &WebhookConfig) -> Result<Self, WebhookError> {
        let url = config.url.to_string();
        let read = |what, path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|source| WebhookError::File {
                what,
                url: config.url.to_string(),
                path: path.clone(),
                source,
            })
        };
        let secret = read("the secret", &config.secret_file)?;
        let secret = secret_octets(secret.trim());
        if secret.len() < LEAST_SECRET_BYTES {
            return Err(WebhookError::Secret { url, bytes: secret.len() });
        }
        let tls = match config.url.scheme() {
            "https" => {
                let ca = read("the CA file", &config.ca_file)?;
                client_config(&ca).map_err(|source| WebhookError::Ca { url: url.clone(), source })?
            }
            _ => {
                assay_service::tls::trusting_nobody().map_err(|source| WebhookError::Ca { url: url.clone(), source })?
            }
        };
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(DELIVERY_TIMEOUT)
            .build()
            .map_err(|source| WebhookError::Http { url: url.clone(), source })?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        Ok(Self { url: config.url.clone(), key, http, events: config.events.clone() })
    }

    /// Posts events from where the receiver is, until shutdown. Of several verifiers one does.
    pub(crate) fn start(
        self,
        store: VerifierStore,
        clock: Arc<dyn Clock>,
        shutdown: CancellationToken,
        tasks: &TaskTracker,
    ) {
        tasks.spawn(async move {
            tokio::select! {
                () = self.run(&store, clock.as_ref()) => {}
                () = shutdown.cancelled() => {}
            }
        });
    }

    async fn run(&self, store: &VerifierStore, clock: &dyn Clock) {
        let mut failures = 0_u32;
        loop {
            match self.deliver_next(store, clock).await {
                Ok(Delivered::Some) => failures = 0,
                Ok(Delivered::AllUpTo(id)) => {
                    failures = 0;
                    let mut counters = store.counters().subscribe();
                    let more = counters.wait_for(|counters| counters.get(EVENTS).is_some_and(|latest| *latest > id));
                    // Looked after now and then all the same: the claim must not run out.
                    let _more = tokio::time::timeout(RECLAIM, more).await.is_ok();
                }
                Ok(Delivered::Elsewhere) => tokio::time::sleep(RECLAIM).await,
                Err(error) => {
                    failures = failures.saturating_add(1);
                    let backoff = (FIRST_BACKOFF * 2_u32.pow(failures.min(MOST_DOUBLINGS))).min(LONGEST_BACKOFF);
                    tracing::warn!(event = "webhook.failed", url = %self.url, failures, cause = chain(&error), "trying again");
                    tokio::time::sleep(backoff).await;
                }
            }
        }
    }

    /// Delivers the next few events.
    async fn deliver_next(&self, store: &VerifierStore, clock: &dyn Clock) -> Result<Delivered, DeliveryError> {
        let now_ms = clock.now_ms();
        let claimed_until_ms = now_ms.saturating_add(CLAIM_MS);
        let Some(delivered) = store.claim_webhook(self.url.as_str(), now_ms, claimed_until_ms).await? else {
            return Ok(Delivered::Elsewhere);
        };
        let events = store.events(delivered, None, BATCH).await?;
        let Some(last) = events.last().map(|event| event.id) else { return Ok(Delivered::AllUpTo(delivered)) };
        for event in &events {
            if self.events.is_empty() || self.events.contains(&event.event) {
                self.post(event, clock.now_seconds()).await?;
            }
            // After each: what was delivered is not repeated for the sake of what was not.
            store.webhook_delivered(self.url.as_str(), event.id).await?;
        }
        tracing::debug!(event = "webhook.delivered", url = %self.url, last, "delivered");
        Ok(Delivered::Some)
    }

    async fn post(&self, event: &Event, now_seconds: i64) -> Result<(), DeliveryError> {
        let id = format!("evt_{}", event.id);
        let body = serde_json::to_string(event).unwrap_or_default();
        let signature = sign(&self.key, &id, now_seconds, &body);
        let response = self
            .http
            .post(self.url.clone())
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("assay/", env!("CARGO_PKG_VERSION")))
            .header("webhook-id", &id)
            .header("webhook-timestamp", now_seconds.to_string())
            .header("webhook-signature", signature)
            .body(body)
            .send()
            .await
            .map_err(|source| DeliveryError::Unreachable { id: event.id, source })?;
        let status = response.status();
        if status.is_success() { Ok(()) } else { Err(DeliveryError::Refused { id: event.id, status: status.as_u16() }) }
    }
}

/// `v1,<base64>`: the signature of one delivery.
fn sign(key: &hmac::Key, id: &str, timestamp: i64, body: &str) -> String {
    let tag = hmac::sign(key, format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(tag))
}

/// `whsec_<base64>`, as Standard Webhooks writes secrets, or any other text as it is.
fn secret_octets(text: &str) -> Vec<u8> {
    let encoded = text.strip_prefix("whsec_").and_then(|encoded| STANDARD.decode(encoded).ok());
    encoded.unwrap_or_else(|| text.as_bytes().to_vec())
}

/// How far a round came.
enum Delivered {
    /// There may be more.
    Some,
    /// The receiver has everything up to here.
    AllUpTo(u64),
    /// Another verifier delivers.
    Elsewhere,
}

/// Why an event was not delivered. It will be tried again.
#[derive(Debug, thiserror::Error)]
enum DeliveryError {
    #[error("delivering event {id}: the receiver answered {status}")]
    Refused { id: u64, status: u16 },
    #[error("delivering event {id}: no answer")]
    Unreachable { id: u64, source: reqwest::Error },
    #[error("reading what is to be delivered")]
    Store(#[from] DbError),
}

const LEAST_SECRET_BYTES: usize = 16;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(15);
const BATCH: u32 = 50;
const CLAIM_MS: i64 = 60_000;
const RECLAIM: Duration = Duration::from_secs(20);
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
const MOST_DOUBLINGS: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deliveries_are_signed_as_standard_webhooks_has_it() {
        // The example of the specification's reference implementations.
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret_octets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"));
        let signature = sign(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn secrets_are_base64_with_their_prefix_and_text_without() {
        assert_eq!(secret_octets("whsec_AAEC"), [0, 1, 2]);
        assert_eq!(secret_octets("AAEC"), b"AAEC");
    }
}
