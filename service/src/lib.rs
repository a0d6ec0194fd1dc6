//! What every Assay service needs and none should write again: bearer tokens ([`auth`]), an API client ([`client`]),
//! a clock that tests can wind ([`clock`]), configuration files ([`config`]), errors as RFC 9457 problems ([`error`]),
//! HTTPS listeners ([`http`]), Unix sockets for one user ([`owner_socket`]), secrets on disk ([`secret_file`]), the database ([`store`]), log events ([`telemetry`])
//! and the site's own certificate authority ([`tls`]).

pub mod auth;
pub mod client;
pub mod clock;
pub mod config;
pub mod error;
pub mod http;
pub mod owner_socket;
pub mod secret_file;
pub mod store;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
pub mod tls;

pub use tokio_util::sync::CancellationToken;
