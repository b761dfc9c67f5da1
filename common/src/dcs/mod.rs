//! The distributed configuration store, from the bytes up:
//!
//! * [`Dcs`]: what a store must offer (read, watch, compare-and-set, leases). [`etcd`] is the real one, [`memory`] the one
//!   of tests and the simulation; [`contract`] is the suite both pass.
//! * [`paths`] and [`codec`]: Patroni's key layout and values.
//! * [`store`]: the operations of an agent and the reading of a [`crate::ClusterView`], on any [`Dcs`].
//! * [`follow`]: keeps a view up to date from the watch and says how old its knowledge is.

pub mod codec;
pub mod contract;
pub mod etcd;
pub mod follow;
pub mod json;
pub mod latency;
pub mod memory;
pub mod paths;
pub mod store;

use std::future::Future;
use std::time::Duration;

use crate::{Instant, LeaseId, Revision};

/// A key with its value and versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The whole key.
    pub key: String,
    /// The raw value.
    pub value: Vec<u8>,
    /// Revision of the key's creation.
    pub created: Revision,
    /// Revision of the key's last write.
    pub modified: Revision,
    /// The lease it is attached to; `LeaseId(0)` without one.
    pub lease: LeaseId,
}

impl KeyValue {
    /// Whether it has this value and is attached to this lease.
    pub fn is(&self, value: &str, lease: LeaseId) -> bool {
        self.value == value.as_bytes() && self.lease == lease
    }
}

/// A linearizable reading of a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// The store's revision when it was read: a watch from the next one misses nothing.
    pub revision: Revision,
    /// Sorted by key.
    pub entries: Vec<KeyValue>,
}

/// What a watch reports. The stream of them ends with an error, after which the reader must read everything again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// Writes of one revision, in their order.
    Changes {
        /// Revision that they belong to.
        revision: Revision,
        /// What was written.
        changes: Vec<Change>,
    },
    /// The store answered a liveness probe: nothing that came before is missing because it hangs.
    Alive,
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key has this value now.
    Put(KeyValue),
    /// The key is gone, by deletion or with its lease.
    Delete(String),
}

/// A condition of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent(String),
    /// The key was last written at this revision; `Revision(0)`: it does not exist.
    Modified(String, Revision),
    /// The key has exactly this value.
    Value(String, Vec<u8>),
    /// The key is attached to this lease.
    Lease(String, LeaseId),
}

/// A write or a read inside a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes the key; with `LeaseId(0)` it stays until deleted.
    Put(String, Vec<u8>, LeaseId),
    /// Deletes the key, if it is there.
    Delete(String),
    /// Deletes every key that starts with this.
    DeletePrefix(String),
    /// Reads the key into [`TxnResult::read`].
    Get(String),
}

/// All of `when` hold → all of `then` happen, at one revision; otherwise all of `otherwise` do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// Conditions, all of which must hold. None: unconditional.
    pub when: Vec<Compare>,
    /// Done when they hold.
    pub then: Vec<Op>,
    /// Done when they don't.
    pub otherwise: Vec<Op>,
}

/// The outcome of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TxnResult {
    /// Which branch ran.
    pub succeeded: bool,
    /// The store's revision after it.
    pub revision: Revision,
    /// What the `Get`s of that branch found, in their order; `None` for an absent key.
    pub read: Vec<Option<KeyValue>>,
}

/// A lease, and until when it is certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The store's name for it.
    pub id: LeaseId,
    /// What the store granted, which may be more than was asked for.
    pub ttl: Duration,
    /// The last acknowledged request's *sending* time and what [lasts](lasts) of `ttl`: before this the store cannot have
    /// ended it.
    pub until: Instant,
}

impl Lease {
    /// One that was granted, or renewed, on a request that was sent at `sent`.
    pub fn counted(id: LeaseId, ttl: Duration, sent: Instant) -> Self {
        Self { id, ttl, until: sent + lasts(ttl) }
    }
}

/// How much of a time that another machine counts has passed here for certain before it has passed there: each of two
/// clocks may be wrong by 500 ppm, which is as much as a kernel lets NTP correct. It matters where nothing else is left
/// between two leaders: a host that was frozen, and thaws in the last milliseconds of its lease.
pub fn lasts(time: Duration) -> Duration {
    time - time / 1000
}

/// The events of a watch, as both stores give them.
pub type Events = std::pin::Pin<Box<dyn futures::Stream<Item = Result<WatchEvent, DcsError>> + Send>>;

/// Why the store did not do what was asked, split by what the caller does next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DcsError {
    /// No answer in time. A write may or may not have happened: look before you act on it.
    #[error("the DCS did not answer within {0:?}")]
    Timeout(Duration),
    /// Nobody to talk to: the request has certainly not been carried out.
    #[error("the DCS is not reachable: {0}")]
    Unavailable(String),
    /// The lease is not known to the store: whatever was attached to it is gone.
    #[error("the lease is gone")]
    LeaseLost,
    /// The watch broke or fell behind compaction: read everything again.
    #[error("the watch ended: {0}")]
    WatchLost(String),
    /// The store is as it was once, and carried out what was decided on something else: read everything again.
    #[error("the DCS went back from revision {known} to {now}: was it restored from a backup?")]
    WentBack {
        /// What had been seen when it was asked for.
        known: Revision,
        /// Where it was carried out.
        now: Revision,
    },
    /// The store understood and refused: credentials, permissions, a malformed request. Trying again won't help.
    #[error("the DCS refused: {0}")]
    Refused(String),
}

/// A store with linearizable reads and transactions, ordered watches and leases: what leadership needs.
///
/// Every call has a deadline of its own and then fails; none waits for ever. The suite in [`contract`] says what is
/// expected in detail.
pub trait Dcs: Clone + Send + Sync + 'static {
    /// The events of one watch. Dropping it ends the watch.
    type Watch: futures::Stream<Item = Result<WatchEvent, DcsError>> + Send + Unpin + 'static;

    /// Reads every key that starts with `prefix`, linearizably.
    fn read(&self, prefix: &str) -> impl Future<Output = Result<Snapshot, DcsError>> + Send;

    /// Reports writes to keys that start with `prefix`, beginning with those of revision `from`.
    fn watch(&self, prefix: &str, from: Revision) -> impl Future<Output = Result<Self::Watch, DcsError>> + Send;

    /// Runs a transaction. Sent again to another endpoint only where it certainly has not been carried out.
    fn txn(&self, txn: Txn) -> impl Future<Output = Result<TxnResult, DcsError>> + Send;

    /// Obtains a new lease.
    fn grant(&self, ttl: Duration) -> impl Future<Output = Result<Lease, DcsError>> + Send;

    /// Prolongs a lease; [`DcsError::LeaseLost`] if it is over. One answer is one proof: `until` counts from sending.
    /// Then reads `key`, linearizably: the store shows by it that it still was in charge when it prolonged the lease, and
    /// what it has found (`None`: no such key) is as it was after that.
    fn renew(
        &self,
        lease: LeaseId,
        key: &str,
    ) -> impl Future<Output = Result<(Lease, Option<KeyValue>), DcsError>> + Send;

    /// Ends a lease now, with every key attached to it.
    fn revoke(&self, lease: LeaseId) -> impl Future<Output = Result<(), DcsError>> + Send;
}
