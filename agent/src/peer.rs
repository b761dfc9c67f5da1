//! Other members, asked directly: what the DCS can't know fast enough (positions during a race).

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use trunkline_common::{Lsn, MemberName, TimelineId};

/// What a member said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Whether its PostgreSQL is in recovery.
    pub in_recovery: bool,
    /// max(received, replayed) of a standby; 0 of a primary.
    pub lsn: Lsn,
    /// Its timeline, where it knows.
    pub timeline: Option<TimelineId>,
    /// Effective failover priority; ≤ 0: never leader.
    pub failover_priority: i64,
    /// It may not lead because its watchdog doesn't work.
    pub watchdog_failed: bool,
}

/// The members' REST APIs. `None` for a member that did not answer, or whose PostgreSQL doesn't.
pub trait Peers: Clone + Send + Sync + 'static {
    /// Asks all of them (name → `api_url`) at once, each under `deadline`.
    fn status(
        &self,
        members: BTreeMap<MemberName, String>,
        deadline: Duration,
    ) -> impl Future<Output = BTreeMap<MemberName, Option<PeerStatus>>> + Send;
}
