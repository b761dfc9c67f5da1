//! One cluster's keys in a [`Dcs`]: what an agent, the command line and the router do with them.
//!
//! Every write that depends on what was read names the revision it was read at (dcs-layout §10).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Notify;

use super::codec;
use super::paths::Paths;
use super::{Compare, Dcs, DcsError, KeyValue, Lease, Op, Txn, TxnResult};
use crate::cluster::{RestoreRecord, RouterRecord};
use crate::{ClusterView, LeaseId, MemberName, Revision, SystemId, TimelineId};

/// The keys of one cluster.
#[derive(Debug, Clone)]
pub struct ClusterStore<D> {
    dcs: D,
    paths: Arc<Paths>,
    /// What the last reading gave: where a value has become malformed since, the good one stays in force.
    last: Arc<Mutex<Option<Arc<ClusterView>>>>,
    /// Told of every conflict.
    out_of_date: Arc<Notify>,
    /// The revision up to which whoever follows the store has seen it.
    known: Arc<AtomicI64>,
}

/// How a write with a condition went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Written, at this revision.
    Done(Revision),
    /// Somebody else was there first: the view it was decided on is out of date.
    Conflict,
}

impl Outcome {
    /// Whether it was written.
    pub fn is_done(self) -> bool {
        matches!(self, Outcome::Done(_))
    }
}

/// A write of `sync`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncWrite {
    /// The new value; `None` deletes the key.
    pub value: Option<Value>,
    /// The revision of `sync` that the decision was made on (0 = absent).
    pub seen: Revision,
    /// What nobody has said yet of a restore of the store, and goes into `restored` in the same step: whoever notices the restore after
    /// this write would take it for one of the backup.
    pub restored: Option<RestoreRecord>,
}

impl SyncWrite {
    /// Replaces the key that `view` shows.
    pub fn new(view: &ClusterView, value: Option<Value>) -> Self {
        Self { value, seen: view.sync.revision, restored: view.unsaid.clone() }
    }
}

/// What a decision to take the leader key was made on (0 = absent): whoever may lead must not have changed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// The revision of `sync`.
    pub sync: Revision,
    /// The revision of `failsafe`.
    pub failsafe: Revision,
    /// The revision of `initialize`: somebody may be making another cluster.
    pub initialize: Revision,
    /// The revision of `status`: nobody leads by the position that a leader had some time before its last one.
    pub status: Revision,
    /// The revision of `config`: nobody leads by settings that were in force before, or into a pause.
    pub config: Revision,
    /// The revision of `failover`: nobody leads by a request that was withdrawn.
    pub failover: Revision,
    /// The revision of `timeline`: two that lead one after the other claim different numbers.
    pub claimed: Revision,
}

impl Seen {
    /// As `view` shows it.
    pub fn of(view: &ClusterView) -> Self {
        Self {
            sync: view.sync.revision,
            failsafe: view.failsafe_revision,
            initialize: view.initialize_revision,
            status: view.status_revision,
            config: view.config.as_ref().map_or(Revision(0), |config| config.revision),
            failover: view.failover_revision,
            claimed: view.claimed_revision,
        }
    }

    fn unchanged(&self, paths: &Paths) -> impl Iterator<Item = Compare> {
        let keys = [
            ("sync", self.sync),
            ("failsafe", self.failsafe),
            ("initialize", self.initialize),
            ("status", self.status),
            ("config", self.config),
            ("failover", self.failover),
            ("timeline", self.claimed),
        ];
        keys.map(|(key, revision)| Compare::Modified(paths.key(key), revision)).into_iter()
    }
}

/// What is written in the transaction that makes a leader, besides its key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Alongside {
    /// The new `sync`.
    pub sync: Option<SyncWrite>,
    /// Which cluster this is, where `initialize` does not say so yet.
    pub initialize: Option<SystemId>,
    /// The number of the timeline that is begun next: nobody else begins one with it, whatever becomes of this leader.
    pub claims: Option<TimelineId>,
}

impl<D: Dcs> ClusterStore<D> {
    /// The keys below `paths` in `dcs`.
    pub fn new(dcs: D, paths: Paths) -> Self {
        Self { dcs, paths: Arc::new(paths), last: Arc::default(), out_of_date: Arc::default(), known: Arc::default() }
    }

    /// What is known of the store is out of date: whoever follows it looks again at once.
    pub fn doubt(&self) {
        self.out_of_date.notify_one();
    }

    /// Returns after a conflict, or once there is doubt: a watch that has not told of it by now may never.
    pub async fn out_of_date(&self) {
        self.out_of_date.notified().await;
    }

    /// Whoever follows the store has seen it up to here, and decisions are made on that.
    pub fn note_seen(&self, revision: Revision) {
        self.known.store(revision.0, Ordering::Release);
    }

    /// What was decided on a view that is newer than the store comes to nothing, though it has been carried out: a store that is
    /// restored has keys with the revisions of before, so conditions alone do not tell.
    async fn txn(&self, txn: Txn) -> Result<TxnResult, DcsError> {
        let puts = |ops: &[Op]| ops.iter().any(|op| matches!(op, Op::Put(..)));
        let (then, otherwise) = (puts(&txn.then), puts(&txn.otherwise));
        let known = Revision(self.known.load(Ordering::Acquire));
        let result = self.dcs.txn(txn).await?;
        // A write has a revision of its own.
        let put = if result.succeeded { then } else { otherwise };
        if result.revision < known || put && result.revision == known {
            self.doubt();
            return Err(DcsError::WentBack { known, now: result.revision });
        }
        Ok(result)
    }

    fn outcome(&self, result: &TxnResult) -> Outcome {
        if result.succeeded {
            return Outcome::Done(result.revision);
        }
        self.doubt();
        Outcome::Conflict
    }

    /// The store below.
    pub fn dcs(&self) -> &D {
        &self.dcs
    }

    /// Where the keys are.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Reads everything, linearizably.
    pub async fn read(&self) -> Result<ClusterView, DcsError> {
        let snapshot = self.dcs.read(self.paths.prefix()).await?;
        let last = self.last.lock().clone();
        let view = codec::view(&self.paths, &snapshot, last.as_deref());
        *self.last.lock() = Some(Arc::new(view.clone()));
        Ok(view)
    }

    /// Creates the leader key with `name` and `lease`, if there is none **and** everything that the decision was made on still
    /// is what was `seen`; `also` is written in the same step. So a stale view can't elect a node that has been taken off the
    /// synchronous list, or off the list that a leader without DCS asks, in the meantime, nor one beside which another
    /// cluster is being made, nor one that is further behind than it knows, nor one by settings or a request of yesterday.
    ///
    /// A request of ours that was carried out although its answer got lost counts as done.
    pub async fn acquire_leader(
        &self,
        name: &MemberName,
        lease: LeaseId,
        seen: Seen,
        also: Alongside,
    ) -> Result<Outcome, DcsError> {
        let leader = self.paths.key("leader");
        let mut then = vec![Op::Put(leader.clone(), name.as_str().into(), lease)];
        then.extend(also.sync.into_iter().flat_map(|write| self.sync_ops(write)));
        let identity =
            |system: SystemId| Op::Put(self.paths.key("initialize"), system.to_string().into_bytes(), LeaseId(0));
        then.extend(also.initialize.map(identity));
        then.extend(also.claims.map(|number| self.claim_op(number)));
        let when = std::iter::once(Compare::Absent(leader.clone())).chain(seen.unchanged(&self.paths)).collect();
        let result = self.txn(Txn { when, then, otherwise: vec![Op::Get(leader)] }).await?;
        match result.read.first() {
            Some(Some(kv)) if !result.succeeded && kv.is(name.as_str(), lease) => Ok(Outcome::Done(kv.modified)),
            _ => Ok(self.outcome(&result)),
        }
    }

    /// Proves that the leader key is ours and attached to `lease` (a renewed lease alone does not: the key may have been
    /// deleted by hand); moves it there if it is ours by name with another lease (after a restart of the agent, or where a
    /// lease of another length is wanted). Conflict: it belongs to somebody else, or is gone.
    ///
    /// A move names the revision that it was decided on. One that gets no answer may be carried out much later, and would
    /// take the key off the lease that is renewed by then, to end with one that nobody renews.
    pub async fn confirm_leader(&self, name: &MemberName, lease: LeaseId) -> Result<Outcome, DcsError> {
        /// What moves our key in between is an earlier request of ours; of those there are few.
        const MOVES: usize = 3;
        let leader = self.paths.key("leader");
        let mut txn = Txn { when: self.held(name, lease), then: vec![], otherwise: vec![Op::Get(leader.clone())] };
        let mut result = self.txn(txn.clone()).await?;
        for _ in 0..MOVES {
            let key = result.read.first().and_then(Option::as_ref).filter(|_| !result.succeeded);
            let Some(key) = key.filter(|key| key.value == name.as_str().as_bytes()) else { break };
            txn.when = vec![Compare::Modified(leader.clone(), key.modified)];
            txn.then = vec![Op::Put(leader.clone(), name.as_str().into(), lease)];
            result = self.txn(txn.clone()).await?;
        }
        Ok(self.outcome(&result))
    }

    /// Proves that the leader key bears `name`, whatever lease it is attached to. Conflict: it belongs to somebody else, or is gone.
    pub async fn names_leader(&self, name: &MemberName) -> Result<Outcome, DcsError> {
        let leader = self.paths.key("leader");
        let when = vec![Compare::Value(leader.clone(), name.as_str().into())];
        Ok(self.outcome(&self.txn(Txn { when, then: vec![], otherwise: vec![Op::Get(leader)] }).await?))
    }

    /// Takes the leader key whoever has it. Nobody who has a rival may do this; see [`Self::finish_bootstrap`].
    pub async fn take_leader(&self, name: &MemberName, lease: LeaseId) -> Result<(), DcsError> {
        self.put(Op::Put(self.paths.key("leader"), name.as_str().into(), lease)).await
    }

    /// Deletes the leader key if it is ours and attached to `lease`, writing the last position in the same step, and `sync`
    /// if it still is what was seen.
    ///
    /// After an error it may still be carried out, much later: whoever gets one must not lead under this lease again.
    pub async fn release_leader(
        &self,
        name: &MemberName,
        lease: LeaseId,
        status: Option<Value>,
        sync: Option<SyncWrite>,
    ) -> Result<Outcome, DcsError> {
        let leader = self.paths.key("leader");
        let mut then: Vec<Op> = status.map(|status| self.status_op(&status)).into_iter().collect();
        then.push(Op::Delete(leader));
        let mut when = self.held(name, lease);
        if let Some(write) = sync {
            when.push(Compare::Modified(self.paths.key("sync"), write.seen));
            then.extend(self.sync_ops(write));
        }
        Ok(self.outcome(&self.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    /// Writes this member's key.
    pub async fn put_member(&self, name: &MemberName, value: &Value, lease: LeaseId) -> Result<(), DcsError> {
        self.put(Op::Put(self.paths.member(name), codec::compact(value), lease)).await
    }

    /// Writes `status`, only while the leader key is ours.
    pub async fn put_status(&self, name: &MemberName, status: &Value) -> Result<Outcome, DcsError> {
        let when = vec![Compare::Value(self.paths.key("leader"), name.as_str().into())];
        Ok(self.outcome(&self.txn(Txn { when, then: vec![self.status_op(status)], otherwise: vec![] }).await?))
    }

    /// Wins or loses the right to bootstrap. The right is attached to `lease`: it ends with the bootstrapping agent, where
    /// Patroni leaves an empty `initialize` key behind that somebody has to delete.
    ///
    /// A request of ours that was carried out although its answer got lost counts as done.
    pub async fn begin_bootstrap(&self, lease: LeaseId) -> Result<Outcome, DcsError> {
        let key = self.paths.key("initialize");
        let then = vec![Op::Put(key.clone(), Vec::new(), lease)];
        let otherwise = vec![Op::Get(key.clone())];
        let result = self.txn(Txn { when: vec![Compare::Absent(key)], then, otherwise }).await?;
        match result.read.first() {
            Some(Some(kv)) if kv.is("", lease) => Ok(Outcome::Done(kv.modified)),
            _ => Ok(self.outcome(&result)),
        }
    }

    /// Gives the right to bootstrap back, if it still is ours.
    pub async fn cancel_bootstrap(&self, lease: LeaseId) -> Result<Outcome, DcsError> {
        let key = self.paths.key("initialize");
        let when = self.bootstrapping(lease);
        Ok(self.outcome(&self.txn(Txn { when, then: vec![Op::Delete(key)], otherwise: vec![] }).await?))
    }

    /// Ends a bootstrap: `initialize` and `leader` in one step, if the right to bootstrap still is ours. An agent that was
    /// frozen meanwhile must not put its cluster over another's. `synchronous`: `sync` says from the first moment on that
    /// nobody but this node has its commits.
    ///
    /// Tried again where no answer came: whoever gives up here has made a cluster that nobody may ever bootstrap again.
    pub async fn finish_bootstrap(
        &self,
        name: &MemberName,
        lease: LeaseId,
        system: SystemId,
        synchronous: bool,
    ) -> Result<Outcome, DcsError> {
        const ATTEMPTS: usize = 5;
        let (initialize, leader) = (self.paths.key("initialize"), self.paths.key("leader"));
        let system = system.to_string().into_bytes();
        let mut then = vec![
            Op::Put(initialize.clone(), system.clone(), LeaseId(0)),
            Op::Put(leader.clone(), name.as_str().into(), lease),
        ];
        then.extend(synchronous.then(|| self.sync_op(Some(codec::encode_sync(Some(name), 0, &[])))));
        let txn = Txn { when: self.bootstrapping(lease), then, otherwise: vec![Op::Get(initialize), Op::Get(leader)] };
        let mut outcome = self.txn(txn.clone()).await;
        for _ in 1..ATTEMPTS {
            if !matches!(outcome, Err(DcsError::Timeout(_) | DcsError::Unavailable(_))) {
                break;
            }
            outcome = self.txn(txn.clone()).await;
        }
        let result = outcome?;
        match result.read.as_slice() {
            // Carried out before, whatever has become of the leader key since: this is the cluster.
            [Some(done), _] if done.value == system => Ok(Outcome::Done(done.modified)),
            _ => Ok(self.outcome(&result)),
        }
    }

    /// The cluster's identity is known; only the leader says so.
    pub async fn put_initialize(&self, name: &MemberName, system: SystemId) -> Result<Outcome, DcsError> {
        let when = vec![Compare::Value(self.paths.key("leader"), name.as_str().into())];
        let then = vec![Op::Put(self.paths.key("initialize"), system.to_string().into_bytes(), LeaseId(0))];
        Ok(self.outcome(&self.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    /// Replaces `config`; with `seen`, only if it still is what was read (0 = absent).
    pub async fn put_config(&self, value: &Value, seen: Option<Revision>) -> Result<Outcome, DcsError> {
        self.put_json("config", value, seen).await
    }

    /// Writes `config` where there is none, for a leader: a write that comes late must not undo what an operator has written since.
    pub async fn put_missing_config(&self, name: &MemberName, value: &Value) -> Result<Outcome, DcsError> {
        let key = self.paths.key("config");
        let leads = Compare::Value(self.paths.key("leader"), name.as_str().into());
        let when = vec![leads, Compare::Absent(key.clone())];
        let then = vec![Op::Put(key, codec::compact(value), LeaseId(0))];
        Ok(self.outcome(&self.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    /// Replaces `failover`; `{}` = no request.
    pub async fn put_failover(&self, value: &Value, seen: Option<Revision>) -> Result<Outcome, DcsError> {
        self.put_json("failover", value, seen).await
    }

    /// Replaces `sync`, or deletes it, if it still is what was read.
    pub async fn put_sync(&self, write: SyncWrite) -> Result<Outcome, DcsError> {
        let when = vec![Compare::Modified(self.paths.key("sync"), write.seen)];
        Ok(self.outcome(&self.txn(Txn { when, then: self.sync_ops(write), otherwise: vec![] }).await?))
    }

    /// Claims the number of the timeline that is begun next ([`Alongside::claims`]), for a leader that is promoted again: if
    /// the key still is what was `seen` (0 = absent) and only while the leader key is ours and attached to `lease`.
    pub async fn put_claim(
        &self,
        name: &MemberName,
        lease: LeaseId,
        number: TimelineId,
        seen: Revision,
    ) -> Result<Outcome, DcsError> {
        let mut when = self.held(name, lease);
        when.push(Compare::Modified(self.paths.key("timeline"), seen));
        Ok(self.outcome(&self.txn(Txn { when, then: vec![self.claim_op(number)], otherwise: vec![] }).await?))
    }

    /// Replaces `history`, if it still is what was `seen` (0 = absent) and only while the leader key is ours: an unanswered
    /// write may be carried out much later, and must not take the cluster's timeline back, under another leader or our own
    /// next leadership. `status` goes with it: a position of the timeline before says nothing of the new one, on which nobody
    /// might be far enough to lead by it.
    pub async fn put_history(
        &self,
        name: &MemberName,
        value: &Value,
        seen: Revision,
        status: Option<&Value>,
    ) -> Result<Outcome, DcsError> {
        let key = self.paths.key("history");
        let leads = Compare::Value(self.paths.key("leader"), name.as_str().into());
        let when = vec![leads, Compare::Modified(key.clone(), seen)];
        let mut then = vec![Op::Put(key, codec::compact(value), LeaseId(0))];
        then.extend(status.map(|status| self.status_op(status)));
        Ok(self.outcome(&self.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    /// Says that the store has gone back to an earlier state, if nobody has said so since `seen` (0 = absent).
    pub async fn put_restored(&self, record: &RestoreRecord, seen: Revision) -> Result<Outcome, DcsError> {
        self.put_json("restored", &codec::encode_restored(record), Some(seen)).await
    }

    /// Writes the timelines of `before` into a store that has gone back to before them: `history`, the highest number that was claimed,
    /// and the `status` that goes with them; if the first two still are what was `seen`. Anybody may who knows, as timelines only grow.
    pub async fn put_forgotten_timelines(&self, before: &ClusterView, seen: &ClusterView) -> Result<Outcome, DcsError> {
        let (history, claim) = (self.paths.key("history"), self.paths.key("timeline"));
        let when = vec![
            Compare::Modified(history.clone(), seen.history_revision),
            Compare::Modified(claim, seen.claimed_revision),
        ];
        let lines = codec::compact(&codec::encode_history(&before.history));
        let mut then = vec![self.status_op(&codec::encode_status(&before.status))];
        then.extend(before.has_history.then_some(Op::Put(history, lines, LeaseId(0))));
        then.push(self.claim_op(before.claimed.max(seen.claimed)));
        Ok(self.outcome(&self.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    /// Replaces `failsafe`, if it still is what was `seen` (0 = absent) and only while the leader key is ours and attached
    /// to `lease`: a leader without DCS counts on it that nobody else has changed the list.
    pub async fn put_failsafe(
        &self,
        name: &MemberName,
        lease: LeaseId,
        members: &BTreeMap<MemberName, String>,
        seen: Revision,
    ) -> Result<Outcome, DcsError> {
        let key = self.paths.key("failsafe");
        let map = members.iter().map(|(name, url)| (name.0.clone(), Value::from(url.clone()))).collect();
        let mut when = self.held(name, lease);
        when.push(Compare::Modified(key.clone(), seen));
        let then = vec![Op::Put(key, codec::compact(&Value::Object(map)), LeaseId(0))];
        Ok(self.outcome(&self.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    /// Sees to it that the router that is registered with `lease` says `record`, and tells when the leader key that there is
    /// now was created. Sent after a renewal, it shows which leader is the newest that could have seen the lease end.
    pub async fn put_router(&self, lease: LeaseId, record: &RouterRecord) -> Result<Option<Revision>, DcsError> {
        let (key, leader) = (self.paths.router(lease), Op::Get(self.paths.key("leader")));
        let value = codec::compact(&codec::encode_router(record));
        let when = vec![Compare::Value(key.clone(), value.clone()), Compare::Lease(key.clone(), lease)];
        let otherwise = vec![Op::Put(key, value, lease), leader.clone()];
        let result = self.txn(Txn { when, then: vec![leader], otherwise }).await?;
        Ok(result.read.into_iter().next().flatten().map(|kv| kv.created))
    }

    /// Removes every key of the cluster.
    pub async fn delete_cluster(&self) -> Result<(), DcsError> {
        self.put(Op::DeletePrefix(self.paths.prefix().to_owned())).await
    }

    /// Obtains a lease for this process.
    pub async fn grant(&self, ttl: Duration) -> Result<Lease, DcsError> {
        self.dcs.grant(ttl).await
    }

    /// Prolongs this process's lease, and shows the leader key as it was after that: a lease says nothing about the keys that
    /// were attached to it.
    pub async fn renew(&self, lease: LeaseId) -> Result<(Lease, Option<KeyValue>), DcsError> {
        self.dcs.renew(lease, &self.paths.key("leader")).await
    }

    async fn put_json(&self, key: &str, value: &Value, seen: Option<Revision>) -> Result<Outcome, DcsError> {
        let key = self.paths.key(key);
        let when = seen.map(|revision| Compare::Modified(key.clone(), revision)).into_iter().collect();
        let then = vec![Op::Put(key, codec::compact(value), LeaseId(0))];
        Ok(self.outcome(&self.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    async fn put(&self, op: Op) -> Result<(), DcsError> {
        self.txn(Txn { then: vec![op], ..Txn::default() }).await.map(|_| ())
    }

    fn bootstrapping(&self, lease: LeaseId) -> Vec<Compare> {
        let key = self.paths.key("initialize");
        vec![Compare::Value(key.clone(), Vec::new()), Compare::Lease(key, lease)]
    }

    fn sync_ops(&self, write: SyncWrite) -> Vec<Op> {
        let said = |record: RestoreRecord| {
            Op::Put(self.paths.key("restored"), codec::compact(&codec::encode_restored(&record)), LeaseId(0))
        };
        std::iter::once(self.sync_op(write.value)).chain(write.restored.map(said)).collect()
    }

    fn sync_op(&self, value: Option<Value>) -> Op {
        let key = self.paths.key("sync");
        match value {
            Some(value) => Op::Put(key, codec::compact(&value), LeaseId(0)),
            None => Op::Delete(key),
        }
    }

    /// The leader key is that of `name`, attached to `lease`.
    fn held(&self, name: &MemberName, lease: LeaseId) -> Vec<Compare> {
        let leader = self.paths.key("leader");
        vec![Compare::Value(leader.clone(), name.as_str().into()), Compare::Lease(leader, lease)]
    }

    fn claim_op(&self, number: TimelineId) -> Op {
        Op::Put(self.paths.key("timeline"), number.to_string().into_bytes(), LeaseId(0))
    }

    fn status_op(&self, status: &Value) -> Op {
        Op::Put(self.paths.key("status"), codec::compact(status), LeaseId(0))
    }
}

#[cfg(test)]
mod tests;
