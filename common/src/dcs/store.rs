//! One cluster's keys in a [`Dcs`]: what an agent, the command line and the router do with them.
//!
//! Every write that depends on what was read names the revision it was read at (dcs-layout §10).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::codec;
use super::paths::Paths;
use super::{Compare, Dcs, DcsError, KeyValue, Lease, Op, Txn, TxnResult};
use crate::{ClusterView, LeaseId, MemberName, Revision, SystemId};

/// The keys of one cluster.
#[derive(Debug, Clone)]
pub struct ClusterStore<D> {
    dcs: D,
    paths: Arc<Paths>,
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

    fn of(result: &TxnResult) -> Self {
        if result.succeeded { Outcome::Done(result.revision) } else { Outcome::Conflict }
    }
}

/// What a new leader writes to `sync` in the transaction that makes it leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncWrite {
    /// The new value; `None` deletes the key.
    pub value: Option<Value>,
    /// The revision of `sync` that the decision was made on (0 = absent).
    pub seen: Revision,
}

impl<D: Dcs> ClusterStore<D> {
    /// The keys below `paths` in `dcs`.
    pub fn new(dcs: D, paths: Paths) -> Self {
        Self { dcs, paths: Arc::new(paths) }
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
        Ok(codec::view(&self.paths, &snapshot, None))
    }

    /// Creates the leader key with `name` and `lease`, if there is none **and** `sync` still is what the decision was
    /// made on; `sync`, where given, is written in the same step. So a stale view can't elect a node that has been
    /// taken off the synchronous list in the meantime.
    ///
    /// A request of ours that was carried out although its answer got lost counts as done.
    pub async fn acquire_leader(
        &self,
        name: &MemberName,
        lease: LeaseId,
        sync_seen: Revision,
        sync: Option<SyncWrite>,
    ) -> Result<Outcome, DcsError> {
        let leader = self.paths.key("leader");
        let mut then = vec![Op::Put(leader.clone(), name.as_str().into(), lease)];
        then.extend(sync.map(|write| self.sync_op(write.value)));
        let result = self
            .dcs
            .txn(Txn {
                when: vec![Compare::Absent(leader.clone()), Compare::Modified(self.paths.key("sync"), sync_seen)],
                then,
                otherwise: vec![Op::Get(leader)],
            })
            .await?;
        let ours = |kv: &KeyValue| kv.value == name.as_str().as_bytes() && kv.lease == lease;
        match result.read.first() {
            Some(Some(kv)) if !result.succeeded && ours(kv) => Ok(Outcome::Done(kv.modified)),
            _ => Ok(Outcome::of(&result)),
        }
    }

    /// Proves that the leader key is ours and attached to `lease`; moves it there if it is ours by name with another
    /// lease (after a restart of the agent). Conflict: it belongs to somebody else, or is gone.
    pub async fn confirm_leader(&self, name: &MemberName, lease: LeaseId) -> Result<Outcome, DcsError> {
        let leader = self.paths.key("leader");
        let mine = Compare::Value(leader.clone(), name.as_str().into());
        let confirmed = self
            .dcs
            .txn(Txn { when: vec![mine.clone(), Compare::Lease(leader.clone(), lease)], ..Txn::default() })
            .await?;
        if confirmed.succeeded {
            return Ok(Outcome::of(&confirmed));
        }
        let put = Op::Put(leader, name.as_str().into(), lease);
        Ok(Outcome::of(&self.dcs.txn(Txn { when: vec![mine], then: vec![put], otherwise: vec![] }).await?))
    }

    /// Takes the leader key whoever has it: only at the end of a bootstrap, when nobody else can.
    pub async fn take_leader(&self, name: &MemberName, lease: LeaseId) -> Result<(), DcsError> {
        self.put(Op::Put(self.paths.key("leader"), name.as_str().into(), lease)).await
    }

    /// Deletes the leader key if it is ours, writing the last position in the same step.
    pub async fn release_leader(&self, name: &MemberName, status: Option<Value>) -> Result<Outcome, DcsError> {
        let leader = self.paths.key("leader");
        let mut then: Vec<Op> = status.map(|status| self.status_op(&status)).into_iter().collect();
        then.push(Op::Delete(leader.clone()));
        let when = vec![Compare::Value(leader, name.as_str().into())];
        Ok(Outcome::of(&self.dcs.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    /// Writes this member's key.
    pub async fn put_member(&self, name: &MemberName, value: &Value, lease: LeaseId) -> Result<(), DcsError> {
        self.put(Op::Put(self.paths.member(name), codec::compact(value), lease)).await
    }

    /// Writes `status`, only while the leader key is ours.
    pub async fn put_status(&self, name: &MemberName, status: &Value) -> Result<Outcome, DcsError> {
        let when = vec![Compare::Value(self.paths.key("leader"), name.as_str().into())];
        Ok(Outcome::of(&self.dcs.txn(Txn { when, then: vec![self.status_op(status)], otherwise: vec![] }).await?))
    }

    /// Wins or loses the right to bootstrap.
    pub async fn begin_bootstrap(&self) -> Result<Outcome, DcsError> {
        let key = self.paths.key("initialize");
        let then = vec![Op::Put(key.clone(), Vec::new(), LeaseId(0))];
        Ok(Outcome::of(&self.dcs.txn(Txn { when: vec![Compare::Absent(key)], then, otherwise: vec![] }).await?))
    }

    /// Gives the right to bootstrap back, if nobody has finished meanwhile.
    pub async fn cancel_bootstrap(&self) -> Result<Outcome, DcsError> {
        let key = self.paths.key("initialize");
        let when = vec![Compare::Value(key.clone(), Vec::new())];
        Ok(Outcome::of(&self.dcs.txn(Txn { when, then: vec![Op::Delete(key)], otherwise: vec![] }).await?))
    }

    /// The cluster's identity is known.
    pub async fn put_initialize(&self, system: SystemId) -> Result<(), DcsError> {
        self.put(Op::Put(self.paths.key("initialize"), system.to_string().into_bytes(), LeaseId(0))).await
    }

    /// Replaces `config`; with `seen`, only if it still is what was read (0 = absent).
    pub async fn put_config(&self, value: &Value, seen: Option<Revision>) -> Result<Outcome, DcsError> {
        self.put_json("config", value, seen).await
    }

    /// Replaces `failover`; `{}` = no request.
    pub async fn put_failover(&self, value: &Value, seen: Option<Revision>) -> Result<Outcome, DcsError> {
        self.put_json("failover", value, seen).await
    }

    /// Replaces `sync`, or deletes it, if it still is what was read.
    pub async fn put_sync(&self, write: SyncWrite) -> Result<Outcome, DcsError> {
        let when = vec![Compare::Modified(self.paths.key("sync"), write.seen)];
        Ok(Outcome::of(&self.dcs.txn(Txn { when, then: vec![self.sync_op(write.value)], otherwise: vec![] }).await?))
    }

    /// Replaces `history`.
    pub async fn put_history(&self, value: &Value) -> Result<(), DcsError> {
        self.put_json("history", value, None).await.map(|_| ())
    }

    /// Replaces `failsafe`.
    pub async fn put_failsafe(&self, members: &BTreeMap<MemberName, String>) -> Result<(), DcsError> {
        let map = members.iter().map(|(name, url)| (name.0.clone(), Value::from(url.clone()))).collect();
        self.put_json("failsafe", &Value::Object(map), None).await.map(|_| ())
    }

    /// Removes every key of the cluster.
    pub async fn delete_cluster(&self) -> Result<(), DcsError> {
        self.put(Op::DeletePrefix(self.paths.prefix().to_owned())).await
    }

    /// Obtains a lease for this process.
    pub async fn grant(&self, ttl: Duration) -> Result<Lease, DcsError> {
        self.dcs.grant(ttl).await
    }

    async fn put_json(&self, key: &str, value: &Value, seen: Option<Revision>) -> Result<Outcome, DcsError> {
        let key = self.paths.key(key);
        let when = seen.map(|revision| Compare::Modified(key.clone(), revision)).into_iter().collect();
        let then = vec![Op::Put(key, codec::compact(value), LeaseId(0))];
        Ok(Outcome::of(&self.dcs.txn(Txn { when, then, otherwise: vec![] }).await?))
    }

    async fn put(&self, op: Op) -> Result<(), DcsError> {
        self.dcs.txn(Txn { then: vec![op], ..Txn::default() }).await.map(|_| ())
    }

    fn sync_op(&self, value: Option<Value>) -> Op {
        let key = self.paths.key("sync");
        match value {
            Some(value) => Op::Put(key, codec::compact(&value), LeaseId(0)),
            None => Op::Delete(key),
        }
    }

    fn status_op(&self, status: &Value) -> Op {
        Op::Put(self.paths.key("status"), codec::compact(status), LeaseId(0))
    }
}
