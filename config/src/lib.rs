//! Configuration: Patroni's `patroni.yml` with its environment, the dynamic settings of the DCS, and `router.yml`.
//!
//! Reads a file and the environment it is given, nothing else: no socket, no DCS, no clock.

pub mod dynamic;
pub mod local;
pub mod postgres;
pub mod router;
pub mod secret;
pub mod tags;

pub use dynamic::Settings;
pub use local::Local;
pub use postgres::PostgresConfig;
pub use router::RouterConfig;
pub use secret::Secret;
