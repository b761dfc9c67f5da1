//! `router.yml`.

use std::time::Duration;

use crate::local::Etcd;

/// The router's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterConfig {
    /// The cluster's name.
    pub scope: String,
    /// Prefix of the keys.
    pub namespace: String,
    /// Where etcd is.
    pub etcd: Etcd,
    /// The ports applications connect to; never empty, names unique.
    pub ports: Vec<Port>,
    /// Where `/metrics`, `/health` … listen, `host:port`; none = nowhere.
    pub admin: Option<String>,
    /// Threads that move bytes; 0 = one per core.
    pub threads: usize,
    /// Bounds of everything.
    pub limits: Limits,
    /// Logging.
    pub log: crate::local::Log,
}

/// One port.
#[derive(Debug, Clone, PartialEq)]
pub struct Port {
    /// Name in logs and metrics.
    pub name: String,
    /// `host:port` to listen on.
    pub listen: String,
    /// Whom it leads to.
    pub target: Target,
    /// What to do while there is no such server.
    pub no_candidate: NoCandidate,
    /// A standby further behind gets no new sessions, in bytes.
    pub max_lag: Option<u64>,
}

/// Whom a port leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The primary.
    Leader,
    /// Streaming standbys.
    Replica,
    /// Synchronous standbys.
    Sync,
    /// Asynchronous standbys.
    Async,
    /// Everybody who is running.
    Any,
}

/// What a port does while it has no server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoCandidate {
    /// Hold new connections until there is one.
    Hold,
    /// Use the leader.
    Leader,
    /// Answer with an error at once.
    Refuse,
}

/// Bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at once, over all ports.
    pub max_sessions: usize,
    /// Held connections at once, over all ports.
    pub max_held: usize,
    /// How long a connection is held.
    pub hold_timeout: Duration,
    /// Held connections released per second once there is a server, as a pace.
    pub release_rate: u32,
    /// How long a client may take to send its first packet.
    pub startup_timeout: Duration,
    /// How long a server may take to accept.
    pub connect_timeout: Duration,
    /// How old unconfirmed knowledge of the leader may be before new connections are held.
    pub stale_after: Duration,
    /// How long sessions may go on at shutdown.
    pub drain_timeout: Duration,
}
