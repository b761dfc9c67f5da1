//! What the agent and the router share: the vocabulary ([`Lsn`], [`TimelineId`], [`MemberName`] …), the
//! [`ClusterView`] that every decision is made on, the DCS behind it, the clock, TLS and telemetry.
//!
//! This crate knows the keys in the DCS and what they mean. It never starts a process and never speaks to PostgreSQL.

pub mod clock;
pub mod cluster;
pub mod dcs;
pub mod id;
pub mod lsn;
pub mod metrics;
pub mod shutdown;
pub mod task;
pub mod telemetry;
pub mod timeline;
pub mod tls;

pub use clock::{Clock, Instant, SystemClock, TokioClock};
pub use cluster::{ClusterView, Member};
pub use id::{LeaseId, MemberName, Revision, SystemId};
pub use lsn::Lsn;
pub use task::Task;
pub use timeline::{History, TimelineId};
