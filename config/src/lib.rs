//! Configuration: Patroni's `patroni.yml` with its environment, the dynamic settings of the DCS, and `router.yml`.
//!
//! Reads a file and the environment it is given, nothing else: no socket, no DCS, no clock.

pub mod address;
mod client;
mod document;
pub mod dynamic;
mod env;
mod etcd;
pub mod explain;
pub mod guc;
pub mod local;
pub mod merge;
mod options;
mod port;
pub mod postgres;
mod protected;
mod report;
pub mod router;
pub mod secret;
mod section;
pub mod tags;
mod units;
pub mod validate;
pub mod yaml;
mod yaml_scalar;
mod yaml_text;

pub use address::{join as join_host_port, split as split_host_port};
pub use client::ClientConfig;
pub use dynamic::Settings;
pub use env::Env;
pub use local::Local;
pub use postgres::PostgresConfig;
pub use report::{Errors, Notice, Problem};
pub use router::RouterConfig;
pub use secret::Secret;
