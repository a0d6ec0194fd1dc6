//! Isolation, the relying party: it owns nodes, networks, switches, ports, BMCs and leases, and moves a port only for
//! an attestation result that it verified itself (boot path step 8; the way into the airlock before step 1).
//!
//! Deciding is pure: [`node`] (the life cycle), [`plan`] (what to do next), [`link`] (what a port's link
//! tells), [`admission`] (from result to port),
//! [`validate`]. Doing is at the edges: [`switch`], [`bmc`], [`store`], and [`hands`], which puts effects in order. A
//! [`driver`] per node owns that node's state; [`fleet`] starts and reaches them; `api` speaks HTTP.

pub mod admission;
mod api;
pub mod bmc;
pub mod commands;
pub mod config;
pub mod driver;
pub mod drivers;
pub mod fleet;
pub mod hands;
pub mod link;
pub mod node;
pub mod plan;
pub mod record;
pub mod renewal;
pub mod secret;
pub mod store;
pub mod switch;
pub mod validate;

pub use api::openapi;
pub use config::Config;

use assay_service::CancellationToken;
use assay_service::clock::Clock;
use assay_service::http::{self, HttpError, Listener, ServiceContext};
use assay_service::store::StoreError;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// Why isolation does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The database.
    #[error("opening isolation's database")]
    Store(#[from] StoreError),
    /// The record.
    #[error("reading isolation's record")]
    Record(#[from] store::RecordError),
    /// The key of the BMC passwords.
    #[error("starting isolation")]
    Password(#[from] secret::PasswordError),
    /// The listener.
    #[error("serving isolation's API")]
    Http(#[from] HttpError),
}

/// Runs isolation until `context.shutdown`. Listens once every port on record has been reconciled, or is known not to
/// be.
///
/// # Errors
/// See [`RunError`].
pub async fn run(config: Config, context: ServiceContext) -> Result<(), RunError> {
    let listener = http::bind(config.listen).await?;
    serve(listener, config, context).await
}

/// As [`run`], on a socket that is bound already; it is accepted on only once ports have been reconciled.
///
/// # Errors
/// See [`RunError`].
pub async fn serve(listener: TcpListener, config: Config, context: ServiceContext) -> Result<(), RunError> {
    let store = store::Store::open(&config.database, Arc::clone(&context.clock)).await?;
    let key = secret::PasswordKey::load_or_create(&config.password_key_file)?;
    let drivers = Arc::new(drivers::SiteDrivers::new(config.clone(), key));
    let driven: Arc<dyn drivers::Drivers> = Arc::clone(&drivers) as _;
    let clock = Arc::clone(&context.clock);
    let fleet = fleet::Fleet::start(store.clone(), clock, driven, config.clone(), context.shutdown.clone()).await?;
    tracing::info!(event = "isolation.ready", "all ports on record have been reconciled");
    let upkeep = upkeep(store.clone(), Arc::clone(&context.clock), context.shutdown.clone());
    let clock = Arc::clone(&context.clock);
    let router = api::router(api::Api { store, fleet: fleet.clone(), drivers, config, clock });
    let (served, ()) = tokio::join!(http::serve(Listener::Tls(listener), router, &context), upkeep);
    fleet.ended().await;
    Ok(served?)
}

/// Forgets what is long over, at the start and every hour.
async fn upkeep(store: store::Store, clock: Arc<dyn Clock>, shutdown: CancellationToken) {
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        match store.forget_ended(clock.now_ms().saturating_sub(REMEMBER_ENDED_MS)).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(event = "admissions.forgotten", count, "admissions that ended long ago"),
            Err(error) => {
                let cause = assay_service::error::chain(&error);
                tracing::error!(event = "admissions.not_forgotten", cause, "forgetting ended admissions");
            }
        }
    }
}

const UPKEEP_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// Longer than any result is valid, so that no result can be used twice.
const REMEMBER_ENDED_MS: i64 = 30 * 24 * 60 * 60 * 1000;
