//! Real clusters under test: [`trunkline_agent::lab`] with the peers that stand beside or behind our programs.
//!
//! `tests/tests/clusters` has one theme a file. Every test starts its own etcd, nodes and router, waits with bounds, and
//! says [`Lab::success`] at its end; without that the logs are kept and their place is printed.

pub use trunkline_agent::lab::*;

pub mod certificate;
pub mod drivers;
pub mod haproxy;
pub mod made_up;
pub mod namespace;
pub mod patroni;
pub mod scene;
pub mod versions;

pub use scene::{LIMIT, Scene};
