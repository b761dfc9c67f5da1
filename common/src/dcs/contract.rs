//! What every [`Dcs`] must do, as one suite: the store in memory passes it in unit tests, real etcd in
//! `common/tests/etcd.rs`. A violation panics with what was expected.
//!
//! Leases are real time on the subject's clock; with tokio's time paused the whole suite takes none.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use parking_lot::Mutex;

use super::paths::Paths;
use super::store::{Alongside, ClusterStore, Outcome, Seen};
use super::{Change, Compare, Dcs, DcsError, KeyValue, Lease, Op, Snapshot, Txn, TxnResult, WatchEvent, lasts};
use crate::cluster::RouterRecord;
use crate::{Clock, LeaseId, MemberName, Revision};

/// Longest wait for an event that must come at once, or in a second: of a store on a disk that hangs now and then.
const SOON: Duration = Duration::from_secs(15);

/// A store under test.
pub struct Subject<D, C> {
    /// One client.
    pub dcs: D,
    /// Another client of the same store.
    pub other: D,
    /// The clock that both use.
    pub clock: C,
    /// Keys are made below this; nobody else uses it.
    pub prefix: String,
}

impl<D: Dcs, C: Clock> Subject<D, C> {
    /// Runs everything. `compact` makes the store forget its history up to a revision.
    pub async fn check(&self, compact: impl AsyncFn(Revision)) {
        self.reads_what_was_written().await;
        self.one_of_eight_creates().await;
        self.transactions().await;
        self.refusals_change_nothing().await;
        self.watch_replays_from_a_revision().await;
        self.quiet_watch_is_alive().await;
        self.lease_is_honest().await;
        self.lease_expires_and_is_lost().await;
        self.revoke_takes_every_key_at_once().await;
        self.compaction_ends_a_watch(compact).await;
    }

    /// Revisions of reading and writing fit together, and prefixes are prefixes.
    pub async fn reads_what_was_written(&self) {
        let key = self.key("read/b");
        let first = self.put(&key, "1", LeaseId(0)).await;
        let second = self.put(&key, "2", LeaseId(0)).await;
        self.put(&self.key("read/a"), "x", LeaseId(0)).await;
        self.put(&self.key("read0"), "beside the prefix", LeaseId(0)).await;
        let snapshot = self.other.read(&self.key("read/")).await.expect("a reading");
        let keys: Vec<&str> = snapshot.entries.iter().map(|kv| kv.key.as_str()).collect();
        assert_eq!(keys, [self.key("read/a"), self.key("read/b")], "sorted, and nothing else");
        let kv = &snapshot.entries[1];
        assert_eq!((kv.created, kv.modified, kv.lease), (first.revision, second.revision, LeaseId(0)));
        assert_eq!(kv.value, b"2");
        assert!(snapshot.revision > second.revision, "the reading is newer than what it shows");
    }

    /// The race for a key has one winner, and the losers can see who it was.
    pub async fn one_of_eight_creates(&self) {
        let key = self.key("race");
        let contender = |number: usize| {
            let txn = Txn {
                when: vec![Compare::Absent(key.clone())],
                then: vec![Op::Put(key.clone(), number.to_string().into_bytes(), LeaseId(0))],
                otherwise: vec![Op::Get(key.clone())],
            };
            async move { (number, self.dcs.txn(txn).await.expect("an outcome")) }
        };
        let outcomes = futures::future::join_all((0..8).map(contender)).await;
        let winners: Vec<usize> = outcomes.iter().filter(|(_, r)| r.succeeded).map(|(number, _)| *number).collect();
        assert_eq!(winners.len(), 1, "one winner");
        for (_, result) in outcomes.iter().filter(|(_, r)| !r.succeeded) {
            let kv = result.read[0].as_ref().expect("losers see the key");
            assert_eq!(kv.value, winners[0].to_string().into_bytes());
        }
    }

    /// Every comparison both ways, several operations at one revision, and the reads of the branch that ran.
    pub async fn transactions(&self) {
        let key = self.key("txn/a");
        let absent = self.key("txn/none");
        let lease = self.dcs.grant(Duration::from_secs(60)).await.expect("a lease");
        let written = self.put(&key, "v", lease.id).await.revision;
        let cases = [
            (Compare::Absent(absent.clone()), true),
            (Compare::Absent(key.clone()), false),
            (Compare::Modified(key.clone(), written), true),
            (Compare::Modified(key.clone(), Revision(written.0 - 1)), false),
            (Compare::Modified(absent.clone(), Revision(0)), true),
            (Compare::Modified(key.clone(), Revision(0)), false),
            (Compare::Value(key.clone(), b"v".to_vec()), true),
            (Compare::Value(key.clone(), b"w".to_vec()), false),
            (Compare::Value(absent.clone(), Vec::new()), false),
            (Compare::Lease(key.clone(), lease.id), true),
            (Compare::Lease(key.clone(), LeaseId(0)), false),
        ];
        for (compare, holds) in cases {
            let txn = Txn { when: vec![compare.clone()], then: vec![Op::Get(key.clone())], otherwise: vec![] };
            let result = self.dcs.txn(txn).await.expect("an outcome");
            assert_eq!((result.succeeded, result.read.len()), (holds, usize::from(holds)), "{compare:?}");
            assert!(result.revision >= written, "reads carry the store's revision");
        }
        let both = vec![Compare::Absent(absent.clone()), Compare::Absent(key.clone())];
        assert!(!self.run(both, vec![]).await.succeeded, "all conditions must hold");

        let many = vec![
            Op::Put(self.key("txn/b"), b"1".to_vec(), LeaseId(0)),
            Op::Delete(key.clone()),
            Op::Delete(absent),
            Op::Put(self.key("txn/c"), b"2".to_vec(), LeaseId(0)),
        ];
        let result = self.run(vec![], many).await;
        let snapshot = self.dcs.read(&self.key("txn/")).await.expect("a reading");
        let modified: Vec<Revision> = snapshot.entries.iter().map(|kv| kv.modified).collect();
        assert_eq!(modified, [result.revision; 2], "one revision for one transaction");
        assert!(self.run(vec![], vec![Op::DeletePrefix(self.key("txn/"))]).await.succeeded);
        assert_eq!(self.dcs.read(&self.key("txn/")).await.expect("a reading").entries, []);
        self.dcs.revoke(lease.id).await.expect("revoked");
    }

    /// What the store refuses has no effect.
    pub async fn refusals_change_nothing(&self) {
        let key = self.key("refused");
        let unknown = Txn { then: vec![Op::Put(key.clone(), b"x".to_vec(), LeaseId(0x7eadbeef))], ..Txn::default() };
        assert_eq!(self.dcs.txn(unknown).await, Err(DcsError::LeaseLost), "a key cannot have an unknown lease");
        let put = Op::Put(key.clone(), b"x".to_vec(), LeaseId(0));
        let twice = Txn { then: vec![put.clone(), put], ..Txn::default() };
        assert!(matches!(self.dcs.txn(twice).await, Err(DcsError::Refused(_))), "one key, one write");
        assert_eq!(self.dcs.read(&key).await.expect("a reading").entries, []);
    }

    /// Read, then watch from the next revision: nothing is missing, nothing comes twice, one item per revision.
    pub async fn watch_replays_from_a_revision(&self) {
        let prefix = self.key("watch/");
        let before = self.put(&self.key("watch/a"), "before", LeaseId(0)).await.revision;
        let a = self.put(&self.key("watch/a"), "1", LeaseId(0)).await.revision;
        self.put(&self.key("elsewhere"), "x", LeaseId(0)).await;
        let ops = vec![Op::Put(self.key("watch/b"), b"2".to_vec(), LeaseId(0)), Op::Delete(self.key("watch/a"))];
        let both = self.run(vec![], ops).await.revision;
        let mut watch = self.other.watch(&prefix, Revision(before.0 + 1)).await.expect("a watch");
        let later = self.put(&self.key("watch/b"), "3", LeaseId(0)).await.revision;
        let (revision, changes) = self.changes(&mut watch).await;
        assert_eq!((revision, describe(&changes)), (a, vec![(self.key("watch/a"), Some("1".to_owned()))]));
        let (revision, changes) = self.changes(&mut watch).await;
        let expected = vec![(self.key("watch/b"), Some("2".to_owned())), (self.key("watch/a"), None)];
        assert_eq!((revision, describe(&changes)), (both, expected));
        let (revision, changes) = self.changes(&mut watch).await;
        assert_eq!((revision, describe(&changes)), (later, vec![(self.key("watch/b"), Some("3".to_owned()))]));
        let Some(Change::Put(kv)) = changes.first() else { panic!("a put") };
        assert_eq!((kv.created, kv.modified), (both, later));
    }

    /// A watch without events still proves about every second that it lives.
    pub async fn quiet_watch_is_alive(&self) {
        let now = self.dcs.read(&self.key("quiet/")).await.expect("a reading").revision;
        let mut watch = self.dcs.watch(&self.key("quiet/"), Revision(now.0 + 1)).await.expect("a watch");
        for _ in 0..2 {
            let event = self.clock.within(SOON, watch.next()).await.expect("in time");
            assert_eq!(event, Some(Ok(WatchEvent::Alive)));
        }
    }

    /// The store keeps a lease at least until `until`, which is what fencing relies on; and not much longer.
    pub async fn lease_is_honest(&self) {
        let key = self.key("honest/key");
        let asked = self.clock.now();
        let lease = self.dcs.grant(Duration::from_secs(4)).await.expect("a lease");
        assert!(lease.ttl >= Duration::from_secs(4), "no less than asked for");
        assert!(lease.until >= asked + lasts(lease.ttl), "counted from sending, not before");
        assert!(lease.until <= self.clock.now() + lasts(lease.ttl), "counted from sending, not after");
        let written = self.put(&key, "x", lease.id).await.revision;
        let mut watch = self.other.watch(&self.key("honest/"), Revision(written.0 + 1)).await.expect("a watch");
        self.clock.sleep(lease.ttl / 2).await;
        let (renewed, found) = self.dcs.renew(lease.id, &key).await.expect("renewed");
        assert_eq!((renewed.id, renewed.ttl), (lease.id, lease.ttl));
        assert!(found.is_some_and(|found| found.key == key && found.is("x", lease.id)));
        assert!(renewed.until > lease.until);
        let (_, changes) = self.changes_within(&mut watch, lease.ttl + SOON).await;
        assert_eq!(describe(&changes), [(key, None)]);
        let ended = self.clock.now();
        assert!(ended >= renewed.until, "the lease ended {:?} early", renewed.until.since(ended));
        assert!(ended.since(renewed.until) < SOON, "the lease ended late");
    }

    /// After its end a lease is lost: it cannot be renewed and nothing can be attached to it.
    pub async fn lease_expires_and_is_lost(&self) {
        let key = self.key("late");
        let lease = self.dcs.grant(Duration::from_secs(2)).await.expect("a lease");
        let written = self.put(&key, "x", lease.id).await.revision;
        let mut watch = self.other.watch(&key, Revision(written.0 + 1)).await.expect("a watch");
        self.changes_within(&mut watch, lease.ttl + SOON).await;
        assert_eq!(self.dcs.renew(lease.id, &key).await, Err(DcsError::LeaseLost));
        assert_eq!(self.other.renew(lease.id, &key).await, Err(DcsError::LeaseLost));
        let put = Txn { then: vec![Op::Put(key.clone(), b"x".to_vec(), lease.id)], ..Txn::default() };
        assert_eq!(self.dcs.txn(put).await, Err(DcsError::LeaseLost));
        // Whoever ends a lease that is over has what he wants.
        assert_eq!(self.dcs.revoke(lease.id).await, Ok(()));
    }

    /// The keys of a lease go together, at one revision.
    pub async fn revoke_takes_every_key_at_once(&self) {
        let lease = self.dcs.grant(Duration::from_secs(60)).await.expect("a lease");
        self.put(&self.key("revoke/leader"), "me", lease.id).await;
        let written = self.put(&self.key("revoke/members/me"), "{}", lease.id).await.revision;
        let mut watch = self.other.watch(&self.key("revoke/"), Revision(written.0 + 1)).await.expect("a watch");
        self.dcs.revoke(lease.id).await.expect("revoked");
        let (_, changes) = self.changes(&mut watch).await;
        let gone: BTreeSet<String> = describe(&changes).into_iter().map(|(key, _)| key).collect();
        assert_eq!(gone, BTreeSet::from([self.key("revoke/leader"), self.key("revoke/members/me")]));
        assert_eq!(self.dcs.renew(lease.id, &self.key("revoke/leader")).await, Err(DcsError::LeaseLost));
    }

    /// A watch from a revision that is compacted away fails instead of falling silent.
    pub async fn compaction_ends_a_watch(&self, compact: impl AsyncFn(Revision)) {
        let first = self.put(&self.key("compact/a"), "1", LeaseId(0)).await.revision;
        self.put(&self.key("compact/a"), "2", LeaseId(0)).await;
        let last = self.put(&self.key("compact/a"), "3", LeaseId(0)).await.revision;
        compact(last).await;
        let lost = match self.dcs.watch(&self.key("compact/"), first).await {
            Err(error) => error,
            Ok(mut watch) => match self.clock.within(SOON, watch.next()).await {
                Some(Some(Err(error))) => error,
                other => panic!("a watch below the compaction gave {other:?}"),
            },
        };
        assert!(matches!(lost, DcsError::WatchLost(_)), "{lost:?}");
        let mut watch = self.dcs.watch(&self.key("compact/"), Revision(last.0 + 1)).await.expect("a watch");
        self.put(&self.key("compact/a"), "4", LeaseId(0)).await;
        self.changes(&mut watch).await;
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    async fn run(&self, when: Vec<Compare>, then: Vec<Op>) -> TxnResult {
        self.dcs.txn(Txn { when, then, otherwise: vec![] }).await.expect("an outcome")
    }

    async fn put(&self, key: &str, value: &str, lease: LeaseId) -> TxnResult {
        self.run(vec![], vec![Op::Put(key.to_owned(), value.as_bytes().to_vec(), lease)]).await
    }

    async fn changes(&self, watch: &mut D::Watch) -> (Revision, Vec<Change>) {
        self.changes_within(watch, SOON).await
    }

    async fn changes_within(&self, watch: &mut D::Watch, limit: Duration) -> (Revision, Vec<Change>) {
        let next = async {
            loop {
                match watch.next().await {
                    Some(Ok(WatchEvent::Changes { revision, changes })) => return (revision, changes),
                    Some(Ok(WatchEvent::Alive)) => (),
                    other => panic!("the watch gave {other:?}"),
                }
            }
        };
        self.clock.within(limit, next).await.expect("changes in time")
    }
}

/// A router's registration: it is written once for each thing there is to say, goes with its lease, and every saying of it
/// shows the leader key of that moment.
pub async fn routers<D: Dcs>(store: &ClusterStore<D>) {
    let record = |epoch| RouterRecord { name: "web1/7".to_owned(), lease: Duration::from_secs(60), epoch };
    let lease = store.grant(Duration::from_secs(60)).await.expect("a lease").id;
    assert_eq!(store.put_router(lease, &record(Revision(0))).await, Ok(None), "nobody leads");
    let leads = store.grant(Duration::from_secs(60)).await.expect("a lease").id;
    let won = store.acquire_leader(&"a".into(), leads, Seen::default(), Alongside::default()).await;
    let Ok(Outcome::Done(created)) = won else { panic!("{won:?}") };
    assert_eq!(store.put_router(lease, &record(Revision(0))).await, Ok(Some(created)));
    assert_eq!(store.put_router(lease, &record(created)).await, Ok(Some(created)));
    let before = store.read().await.expect("a reading");
    assert_eq!(before.routers.values().collect::<Vec<_>>(), [&record(created)]);
    assert_eq!(store.put_router(lease, &record(created)).await, Ok(Some(created)));
    let after = store.read().await.expect("a reading");
    assert_eq!(after.revision, before.revision, "what is said already is not written again");
    store.dcs().revoke(lease).await.expect("revoked");
    assert_eq!(store.read().await.expect("a reading").routers.len(), 0);
    assert_eq!(store.put_router(lease, &record(created)).await, Err(DcsError::LeaseLost));
}

/// The leader key hangs on the lease that it was moved to last, also where an earlier move that never got an answer is carried
/// out after that, or in between.
pub async fn late_moves<D: Dcs>(dcs: D, paths: Paths) {
    let late = Late { dcs, next: Arc::default(), kept: Arc::default() };
    let (store, a) = (ClusterStore::new(late.clone(), paths), MemberName::from("a"));
    let lease = async || store.grant(Duration::from_secs(60)).await.expect("a lease").id;
    let attached = async || store.read().await.expect("a reading").leader.map(|key| key.lease);
    let (first, lost, last) = (lease().await, lease().await, lease().await);
    let won = store.acquire_leader(&a, first, Seen::default(), Alongside::default()).await;
    assert!(won.expect("an outcome").is_done());
    for next in [Next::Passes, Next::Follows] {
        assert!(store.confirm_leader(&a, first).await.expect("an outcome").is_done());
        *late.next.lock() = Next::IsKept;
        assert_eq!(store.confirm_leader(&a, lost).await, Err(DcsError::Timeout(Duration::ZERO)));
        *late.next.lock() = next;
        assert!(store.confirm_leader(&a, last).await.expect("an outcome").is_done());
        late.carry_out().await;
        assert_eq!(attached().await, Some(last), "the late one has moved the key");
    }
    for lease in [first, lost, last] {
        store.dcs().revoke(lease).await.expect("revoked");
    }
}

/// A store that keeps a write for later: as a member of etcd that was frozen with the request in its socket.
#[derive(Clone)]
struct Late<D> {
    dcs: D,
    next: Arc<Mutex<Next>>,
    kept: Arc<Mutex<Vec<Txn>>>,
}

/// What becomes of the next transaction that writes.
#[derive(Clone, Copy, Default)]
enum Next {
    #[default]
    Passes,
    /// It gets no answer.
    IsKept,
    /// What was kept goes first.
    Follows,
}

impl<D: Dcs> Late<D> {
    async fn carry_out(&self) {
        let kept = std::mem::take(&mut *self.kept.lock());
        for txn in kept {
            self.dcs.txn(txn).await.expect("an outcome");
        }
    }
}

impl<D: Dcs> Dcs for Late<D> {
    type Watch = D::Watch;

    async fn read(&self, prefix: &str) -> Result<Snapshot, DcsError> {
        self.dcs.read(prefix).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Self::Watch, DcsError> {
        self.dcs.watch(prefix, from).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResult, DcsError> {
        let next = if txn.then.is_empty() { Next::Passes } else { std::mem::take(&mut *self.next.lock()) };
        match next {
            Next::Passes => {}
            Next::IsKept => {
                self.kept.lock().push(txn);
                return Err(DcsError::Timeout(Duration::ZERO));
            }
            Next::Follows => self.carry_out().await,
        }
        self.dcs.txn(txn).await
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, DcsError> {
        self.dcs.grant(ttl).await
    }

    async fn renew(&self, lease: LeaseId, key: &str) -> Result<(Lease, Option<KeyValue>), DcsError> {
        self.dcs.renew(lease, key).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), DcsError> {
        self.dcs.revoke(lease).await
    }
}

fn describe(changes: &[Change]) -> Vec<(String, Option<String>)> {
    let text = |kv: &KeyValue| String::from_utf8_lossy(&kv.value).into_owned();
    let one = |change: &Change| match change {
        Change::Put(kv) => (kv.key.clone(), Some(text(kv))),
        Change::Delete(key) => (key.clone(), None),
    };
    changes.iter().map(one).collect()
}
