//! A [`Dcs`] in memory: the contract of [`super::contract`] without a network, for tests and the simulation.
//!
//! It behaves as etcd does where callers can tell: one revision per writing transaction, a key's creation and
//! modification revisions, values that exist only while their lease does, watches that replay history from a revision
//! and are refused below the compaction. Time is the caller's [`Clock`]; there is no background task: a lease is found
//! expired by the next call, and watches sleep until the next expiry themselves. The same calls in the same order at
//! the same times give the same results.
//!
//! [`MemoryDcs::client`] gives each simulated node its own connection with its own [`Faults`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use super::{Change, Compare, Dcs, DcsError, Events, KeyValue, Lease, Op, Snapshot, Txn, TxnResult, WatchEvent};
use crate::{Clock, Instant, LeaseId, Revision};

/// etcd's floor with its default timers: one and a half election timeouts of a second, rounded up.
pub const MIN_TTL: Duration = Duration::from_secs(2);

/// How often a quiet watch is asked whether it lives.
const PROBE: Duration = Duration::from_secs(1);

/// Transactions kept for watches that begin in the past; older ones are compacted away.
const HISTORY: usize = 100_000;

/// One client of a store in memory. Clones are the same client; [`MemoryDcs::client`] is another one.
#[derive(Clone)]
pub struct MemoryDcs<C> {
    store: Arc<Store<C>>,
    link: Arc<Link>,
    /// The client's own: it says when a request was sent.
    clock: C,
}

/// What is wrong between one client and the store. All of it can change at any time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults {
    /// Requests take this long to get there. They arrive whether or not the caller still waits for the answer.
    pub request_delay: Duration,
    /// Answers take this long to come back. What was asked for has happened by then.
    pub answer_delay: Duration,
    /// Nothing gets through in either direction, and nobody says so: calls time out, watches fall silent.
    pub cut: bool,
    /// Only the way there is cut: no call gets there, but what has been carried out is answered; watches fall silent, as nobody
    /// acknowledges what they send.
    pub mute: bool,
    /// Only the way back is cut: calls take effect and time out, watches fall silent.
    pub deaf: bool,
    /// The store refuses connections: calls fail at once, watches break.
    pub refused: bool,
    /// The answers of this many more calls get lost after the calls have taken effect.
    pub lost_answers: u32,
    /// Watches report this late.
    pub watch_delay: Duration,
    /// So many more events never come, as with some versions of etcd (its issue 18089).
    pub lost_events: u32,
    /// A call without an answer fails after this; so does a watch.
    pub deadline: Duration,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            request_delay: Duration::ZERO,
            answer_delay: Duration::ZERO,
            cut: false,
            mute: false,
            deaf: false,
            refused: false,
            lost_answers: 0,
            watch_delay: Duration::ZERO,
            lost_events: 0,
            deadline: Duration::from_secs(1),
        }
    }
}

/// The content of a store at one moment, as an operator keeps it. The default is that of a new one.
#[derive(Debug, Clone, Default)]
pub struct Backup {
    revision: i64,
    keys: BTreeMap<String, KeyValue>,
    leases: BTreeMap<LeaseId, Duration>,
}

/// One client's connection.
struct Link {
    faults: Mutex<Faults>,
    /// Counts up when this client's watches are to break; also wakes them when the faults change.
    broken: watch::Sender<u64>,
}

struct Store<C> {
    clock: C,
    data: Mutex<Data>,
    /// The revision, for watches to wait on.
    revision: watch::Sender<i64>,
}

#[derive(Default)]
struct Data {
    revision: i64,
    compacted: i64,
    keys: BTreeMap<String, KeyValue>,
    log: VecDeque<Written>,
    /// When this was last looked at.
    now: Instant,
    leases: BTreeMap<LeaseId, HeldLease>,
    last_lease: i64,
    /// How often it was restored.
    restores: u64,
}

/// What one transaction wrote.
#[derive(Clone)]
struct Written {
    revision: i64,
    at: Instant,
    changes: Vec<Change>,
}

struct HeldLease {
    ttl: Duration,
    ends: Instant,
}

impl<C: Clock> MemoryDcs<C> {
    /// An empty store.
    pub fn new(clock: C) -> Self {
        // etcd's first revision is 1, with nothing in it.
        let data = Data { revision: 1, ..Data::default() };
        let store = Store { clock: clock.clone(), data: Mutex::new(data), revision: watch::Sender::new(1) };
        Self { store: Arc::new(store), link: Arc::new(Link::new()), clock }
    }

    /// Another client of the same store, with faults of its own.
    pub fn client(&self) -> Self {
        self.client_with(self.clock.clone())
    }

    /// Another client, on a host whose clock is not the store's.
    pub fn client_with(&self, clock: C) -> Self {
        Self { store: self.store.clone(), link: Arc::new(Link::new()), clock }
    }

    /// Changes what is wrong with this client's connection.
    pub fn set_faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.link.faults.lock());
        self.link.broken.send_modify(|_| ());
    }

    /// Ends this client's open watches, as a restarted member of the store would.
    pub fn break_watches(&self) {
        self.link.broken.send_modify(|count| *count += 1);
    }

    /// Forgets history up to `revision`: watches that still need it are cancelled.
    pub fn compact(&self, revision: Revision) {
        let mut data = self.store.data();
        data.compacted = data.compacted.max(revision.0.min(data.revision));
        let compacted = data.compacted;
        data.log.retain(|written| written.revision >= compacted);
        self.store.revision.send_modify(|_| ());
    }

    /// Gives every lease its full time again, as etcd does when its leader changes (etcd issue 13294).
    pub fn restart_leases(&self) {
        let now = self.store.clock.now();
        let mut data = self.store.data();
        for lease in data.leases.values_mut() {
            lease.ends = now + lease.ttl;
        }
        drop(data);
        self.store.revision.send_modify(|_| ());
    }

    /// What there is now.
    pub fn backup(&self) -> Backup {
        let data = self.store.data();
        let leases = data.leases.iter().map(|(id, held)| (*id, held.ttl)).collect();
        Backup { revision: data.revision, keys: data.keys.clone(), leases }
    }

    /// The store is lost, and its content is that of `backup` again, revision and all: nothing of what was written since is
    /// known. Watches break; leases have their full time, as in etcd. No lease's name is given out twice.
    pub fn restore(&self, backup: &Backup) {
        let now = self.store.clock.now();
        let mut data = self.store.data();
        data.revision = backup.revision.max(1);
        data.compacted = data.revision;
        data.keys = backup.keys.clone();
        data.log.clear();
        let held = |(id, ttl): (&LeaseId, &Duration)| (*id, HeldLease { ttl: *ttl, ends: now + *ttl });
        data.leases = backup.leases.iter().map(held).collect();
        data.restores += 1;
        let revision = data.revision;
        drop(data);
        self.store.revision.send_replace(revision);
    }

    /// Everything in the store, past all faults: for checkers of the simulation.
    pub fn peek(&self, prefix: &str) -> Snapshot {
        self.store.change(|data| data.snapshot(prefix))
    }

    /// One call through this client's faults. `work` happens at one instant or not at all.
    async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Data, Instant) -> Result<T, DcsError> + Send + 'static,
    ) -> Result<T, DcsError> {
        let clock = &self.store.clock;
        let faults = self.link.faults.lock().clone();
        if faults.refused {
            return Err(DcsError::Unavailable("connection refused".to_owned()));
        }
        let answered = async {
            let result = match faults.request_delay.is_zero() {
                true => self.link.reaches().then(|| self.store.change(|data| work(data, clock.now()))),
                false => self.post(faults.request_delay, work).await,
            };
            let lost = result.is_none() || self.link.loses_an_answer();
            clock.sleep(faults.answer_delay).await;
            match result.filter(|_| !lost && self.link.answers()) {
                Some(result) => result,
                None => std::future::pending().await,
            }
        };
        clock.within(faults.deadline, answered).await.unwrap_or(Err(DcsError::Timeout(faults.deadline)))
    }

    /// A request on its way: it arrives also if its sender gives up or dies meanwhile. `None`: it got lost.
    async fn post<T: Send + 'static>(
        &self,
        delay: Duration,
        work: impl FnOnce(&mut Data, Instant) -> Result<T, DcsError> + Send + 'static,
    ) -> Option<Result<T, DcsError>> {
        let (answer, answered) = oneshot::channel();
        let (store, link) = (self.store.clone(), self.link.clone());
        self.store.clock.spawn(async move {
            store.clock.sleep(delay).await;
            if link.reaches() {
                let result = store.change(|data| work(data, store.clock.now()));
                // The sender may have given up.
                let _ = answer.send(result);
            }
        });
        answered.await.ok()
    }
}

impl<C: Clock> Dcs for MemoryDcs<C> {
    type Watch = Events;

    async fn read(&self, prefix: &str) -> Result<Snapshot, DcsError> {
        let prefix = prefix.to_owned();
        self.call(move |data, _| Ok(data.snapshot(&prefix))).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Self::Watch, DcsError> {
        let opened = self.call(move |data, _| data.check_history(from.0).map(|()| (data.revision, data.restores)));
        let (revision, restores) = opened.await?;
        let watcher = Watcher {
            store: self.store.clone(),
            link: self.link.clone(),
            prefix: prefix.to_owned(),
            // As in etcd, 0 is "from now on".
            next: if from.0 > 0 { from.0 } else { revision + 1 },
            revision: self.store.revision.subscribe(),
            broken: self.link.broken.subscribe(),
            restores,
            heard: self.store.clock.now(),
        };
        Ok(Box::pin(watcher.events()))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResult, DcsError> {
        self.call(move |data, _| data.txn(&txn)).await
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, DcsError> {
        let sent = self.clock.now();
        let (id, ttl) = self.call(move |data, now| Ok(data.grant(ttl, now))).await?;
        Ok(Lease::counted(id, ttl, sent))
    }

    async fn renew(&self, lease: LeaseId, key: &str) -> Result<(Lease, Option<KeyValue>), DcsError> {
        let sent = self.clock.now();
        let ttl = self.call(move |data, now| data.renew(lease, now)).await?;
        let key = key.to_owned();
        let found = self.call(move |data, _| Ok(data.keys.get(&key).cloned())).await?;
        Ok((Lease::counted(lease, ttl, sent), found))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), DcsError> {
        self.call(move |data, _| {
            data.end_leases(&BTreeSet::from([lease]));
            Ok(())
        })
        .await
    }
}

impl Link {
    fn new() -> Self {
        Self { faults: Mutex::new(Faults::default()), broken: watch::Sender::new(0) }
    }

    /// Whether a request gets there.
    fn reaches(&self) -> bool {
        let faults = self.faults.lock();
        !faults.cut && !faults.mute
    }

    /// Whether an answer comes back.
    fn answers(&self) -> bool {
        let faults = self.faults.lock();
        !faults.cut && !faults.deaf
    }

    fn loses_an_answer(&self) -> bool {
        take_one(&mut self.faults.lock().lost_answers)
    }

    fn loses_an_event(&self) -> bool {
        take_one(&mut self.faults.lock().lost_events)
    }
}

/// Whether there was one left.
fn take_one(left: &mut u32) -> bool {
    let there = *left > 0;
    *left = left.saturating_sub(1);
    there
}

impl<C: Clock> Store<C> {
    /// The data as of now: what has expired is gone.
    fn data(&self) -> parking_lot::MutexGuard<'_, Data> {
        let mut data = self.data.lock();
        data.now = self.clock.now();
        data.expire();
        data
    }

    fn change<T>(&self, work: impl FnOnce(&mut Data) -> T) -> T {
        let mut data = self.data();
        let result = work(&mut data);
        let revision = data.revision;
        drop(data);
        self.revision.send_if_modified(|seen| std::mem::replace(seen, revision) != revision);
        result
    }
}

impl Data {
    fn snapshot(&self, prefix: &str) -> Snapshot {
        let below = self.keys.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        Snapshot { revision: Revision(self.revision), entries: below.map(|(_, kv)| kv.clone()).collect() }
    }

    fn check_history(&self, from: i64) -> Result<(), DcsError> {
        let missing = from > 0 && from < self.compacted;
        if missing { Err(DcsError::WatchLost(format!("compacted at {}", self.compacted))) } else { Ok(()) }
    }

    fn txn(&mut self, txn: &Txn) -> Result<TxnResult, DcsError> {
        let succeeded = txn.when.iter().all(|compare| self.holds(compare));
        let ops = if succeeded { &txn.then } else { &txn.otherwise };
        self.check(ops)?;
        let revision = Revision(self.revision + 1);
        let mut changes = Vec::new();
        let mut read = Vec::new();
        for op in ops {
            match op {
                Op::Put(key, value, lease) => changes.push(self.put(key, value, *lease, revision)),
                Op::Delete(key) => changes.extend(self.keys.remove(key).map(|kv| Change::Delete(kv.key))),
                Op::DeletePrefix(prefix) => {
                    let gone = self.snapshot(prefix).entries;
                    changes.extend(gone.into_iter().map(|kv| {
                        self.keys.remove(&kv.key);
                        Change::Delete(kv.key)
                    }));
                }
                Op::Get(key) => read.push(self.keys.get(key).cloned()),
            }
        }
        self.commit(changes);
        Ok(TxnResult { succeeded, revision: Revision(self.revision), read })
    }

    fn holds(&self, compare: &Compare) -> bool {
        let kv = |key: &String| self.keys.get(key);
        match compare {
            Compare::Absent(key) => kv(key).is_none(),
            Compare::Modified(key, revision) => kv(key).map_or(Revision(0), |kv| kv.modified) == *revision,
            Compare::Value(key, value) => kv(key).is_some_and(|kv| kv.value == *value),
            Compare::Lease(key, lease) => kv(key).map_or(LeaseId(0), |kv| kv.lease) == *lease,
        }
    }

    /// etcd refuses the whole transaction if a key would be written twice or a lease does not exist.
    fn check(&self, ops: &[Op]) -> Result<(), DcsError> {
        let mut written = BTreeSet::new();
        for op in ops {
            let Op::Put(key, _, lease) = op else { continue };
            if !written.insert(key) {
                return Err(DcsError::Refused("duplicate key given in txn request".to_owned()));
            }
            if lease.0 != 0 && !self.leases.contains_key(lease) {
                return Err(DcsError::LeaseLost);
            }
        }
        let deleted_too = |op: &Op| match op {
            Op::Delete(key) => written.contains(key),
            Op::DeletePrefix(prefix) => written.iter().any(|key| key.starts_with(prefix.as_str())),
            _ => false,
        };
        if ops.iter().any(deleted_too) {
            return Err(DcsError::Refused("duplicate key given in txn request".to_owned()));
        }
        Ok(())
    }

    fn put(&mut self, key: &str, value: &[u8], lease: LeaseId, revision: Revision) -> Change {
        let created = self.keys.get(key).map_or(revision, |kv| kv.created);
        let kv = KeyValue { key: key.to_owned(), value: value.to_vec(), created, modified: revision, lease };
        self.keys.insert(key.to_owned(), kv.clone());
        Change::Put(kv)
    }

    fn commit(&mut self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        self.revision += 1;
        self.log.push_back(Written { revision: self.revision, at: self.now, changes });
        if self.log.len() > HISTORY {
            self.log.pop_front();
            self.compacted = self.log.front().map_or(self.revision, |written| written.revision);
        }
    }

    fn grant(&mut self, ttl: Duration, now: Instant) -> (LeaseId, Duration) {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let ttl = Duration::from_secs(seconds).max(MIN_TTL);
        self.last_lease += 1;
        let id = LeaseId(self.last_lease);
        self.leases.insert(id, HeldLease { ttl, ends: now + ttl });
        (id, ttl)
    }

    fn renew(&mut self, lease: LeaseId, now: Instant) -> Result<Duration, DcsError> {
        let held = self.leases.get_mut(&lease).ok_or(DcsError::LeaseLost)?;
        held.ends = now + held.ttl;
        Ok(held.ttl)
    }

    fn expire(&mut self) {
        let over = |held: &HeldLease| held.ends <= self.now;
        for lease in self.leases.iter().filter(|(_, held)| over(held)).map(|(id, _)| *id).collect::<Vec<_>>() {
            self.end_leases(&BTreeSet::from([lease]));
        }
    }

    /// All keys of a lease go in one revision, as in etcd: a leader and its member key disappear at the same instant.
    fn end_leases(&mut self, leases: &BTreeSet<LeaseId>) {
        self.leases.retain(|id, _| !leases.contains(id));
        let gone: Vec<String> =
            self.keys.values().filter(|kv| leases.contains(&kv.lease)).map(|kv| kv.key.clone()).collect();
        let delete = |key: String| {
            self.keys.remove(&key);
            Change::Delete(key)
        };
        let changes = gone.into_iter().map(delete).collect();
        self.commit(changes);
    }

    fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|held| held.ends).min()
    }

    /// The first transaction at or after `from` that touched `prefix`.
    fn event(&self, prefix: &str, from: i64) -> Option<Written> {
        let below = |change: &Change| match change {
            Change::Put(kv) => kv.key.starts_with(prefix),
            Change::Delete(key) => key.starts_with(prefix),
        };
        let first = self.log.partition_point(|written| written.revision < from);
        self.log.iter().skip(first).find_map(|written| {
            let changes: Vec<Change> = written.changes.iter().filter(|change| below(change)).cloned().collect();
            (!changes.is_empty()).then_some(Written { changes, ..*written })
        })
    }
}

struct Watcher<C> {
    store: Arc<Store<C>>,
    link: Arc<Link>,
    prefix: String,
    next: i64,
    revision: watch::Receiver<i64>,
    broken: watch::Receiver<u64>,
    /// The store's, when this was opened.
    restores: u64,
    heard: Instant,
}

impl<C: Clock> Watcher<C> {
    fn events(self) -> impl Stream<Item = Result<WatchEvent, DcsError>> + Send {
        let breaks = *self.broken.borrow();
        futures::stream::unfold(Some(self), move |watcher| async move {
            let mut watcher = watcher?;
            match watcher.event(breaks).await {
                Ok(event) => Some((Ok(event), Some(watcher))),
                Err(lost) => Some((Err(lost), None)),
            }
        })
    }

    async fn event(&mut self, breaks: u64) -> Result<WatchEvent, DcsError> {
        let clock = self.store.clock.clone();
        loop {
            // Marked as seen before looking, so that what happens after the look wakes the wait below.
            self.revision.mark_unchanged();
            if *self.broken.borrow_and_update() != breaks {
                return Err(DcsError::WatchLost("the connection broke".to_owned()));
            }
            let faults = self.link.faults.lock().clone();
            if faults.refused {
                return Err(DcsError::WatchLost("connection refused".to_owned()));
            }
            let now = clock.now();
            if faults.cut || faults.mute || faults.deaf {
                let silent_until = self.heard + PROBE + faults.deadline;
                if now >= silent_until {
                    return Err(DcsError::WatchLost(format!("silent for {:?}", now.since(self.heard))));
                }
                self.wait(silent_until).await;
                continue;
            }
            let (event, next_expiry) = self.look()?;
            if let Some(Written { revision, at, changes }) = event {
                if at + faults.watch_delay > now {
                    self.wait(at + faults.watch_delay).await;
                    continue;
                }
                self.next = revision + 1;
                self.heard = now;
                if self.link.loses_an_event() {
                    continue;
                }
                return Ok(WatchEvent::Changes { revision: Revision(revision), changes });
            }
            let probe = self.heard + PROBE;
            if now >= probe {
                self.heard = now;
                return Ok(WatchEvent::Alive);
            }
            self.wait(next_expiry.map_or(probe, |expiry| expiry.min(probe))).await;
        }
    }

    fn look(&self) -> Result<(Option<Written>, Option<Instant>), DcsError> {
        self.store.change(|data| {
            if data.restores != self.restores {
                return Err(DcsError::WatchLost("the connection broke".to_owned()));
            }
            data.check_history(self.next)?;
            Ok((data.event(&self.prefix, self.next), data.next_expiry()))
        })
    }

    async fn wait(&mut self, until: Instant) {
        let clock = self.store.clock.clone();
        tokio::select! {
            biased;
            _ = self.revision.changed() => (),
            _ = self.broken.changed() => (),
            () = clock.sleep_until(until) => (),
        }
    }
}

#[cfg(test)]
mod tests;
