//! Isolation, the relying party: it owns nodes, networks, switches, ports, BMCs and leases, and moves a port only for
//! an attestation result that it verified itself (boot path step 8; the way into the airlock before step 1).
//!
//! Deciding is pure: [`node`] (the life cycle), [`plan`] (what to do next), [`admission`] (from result to port),
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
pub mod node;
pub mod plan;
pub mod record;
pub mod secret;
pub mod store;
pub mod switch;
pub mod validate;

pub use api::openapi;
pub use config::Config;

use assay_service::http::{self, HttpError, Listener, ServiceContext};
use assay_service::store::StoreError;
use std::sync::Arc;
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
    let router = api::router(api::Api { store, fleet: fleet.clone(), drivers, config });
    let served = http::serve(Listener::Tls(listener), router, &context).await;
    fleet.ended().await;
    Ok(served?)
}
