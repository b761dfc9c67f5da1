//! A view that is kept up to date: read everything, watch from there, read again on any doubt, and now and then without one.
//!
//! This is on the failover path: an event becomes a published view without a wait in between.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::watch;

use super::codec;
use super::store::ClusterStore;
use super::{Change, Dcs, DcsError, KeyValue, Snapshot, WatchEvent};
use crate::{Clock, ClusterView, Instant, Revision};

/// Pauses before reading again: none the first time, then doubling between these.
const PAUSE: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(500));

/// How often everything is read while a watch is open, and after each write that came too late. Some versions of etcd lose events (its issue 18089), and what was missed
/// once would stay unknown as long as that watch lives. Patroni reads everything every `loop_wait`, 10 s by default.
const REREAD: Duration = Duration::from_secs(10);

/// What is known of the cluster, and since when it is unconfirmed.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Knowledge {
    /// The last view; `None` until the first reading succeeded.
    pub view: Option<Arc<ClusterView>>,
    /// When the DCS last confirmed that nothing is missing from `view` (an event, an answered probe, a reading). A
    /// reading counts from when it was asked for; the others from when they arrived.
    pub confirmed_at: Option<Instant>,
    /// Why there is doubt now, in words; `None` while the watch is alive.
    pub trouble: Option<String>,
    /// How often the DCS had gone back to a state before one that it had shown: it was restored from a backup, or made anew.
    /// `view` is that of now, whose revisions say nothing about those of before.
    pub restores: u64,
}

/// The task behind [`Knowledge`].
pub struct Follower<D, C> {
    store: ClusterStore<D>,
    clock: C,
    publish: watch::Sender<Knowledge>,
    snapshot: Snapshot,
    restores: u64,
    /// Failures since the watch last said something.
    failures: u32,
}

impl<D: Dcs, C: Clock> Follower<D, C> {
    /// Follows the cluster until every receiver is dropped. Runs where `clock` says.
    ///
    /// The receiver is told of every revision, also where the view stays equal, and of every confirmation: compare the
    /// `view` pointers to see only changes.
    pub fn spawn(store: ClusterStore<D>, clock: C) -> watch::Receiver<Knowledge> {
        let (publish, receiver) = watch::channel(Knowledge::default());
        let gone = publish.clone();
        let runtime = clock.clone();
        let follower = Self { store, clock, publish, snapshot: Snapshot::default(), restores: 0, failures: 0 };
        runtime.spawn(async move {
            tokio::select! {
                biased;
                () = gone.closed() => (),
                () = follower.run() => (),
            }
        });
        receiver
    }

    async fn run(mut self) {
        loop {
            let Err(error) = self.follow().await else { continue };
            self.doubt(&error);
            self.failures += 1;
            if self.failures > 1 {
                let doublings = (self.failures - 2).min(16);
                self.clock.sleep((PAUSE.0 * 2u32.pow(doublings)).min(PAUSE.1)).await;
            }
        }
    }

    /// Reads everything and follows the watch until it breaks.
    async fn follow(&mut self) -> Result<(), DcsError> {
        let asked = self.clock.now();
        let snapshot = self.store.dcs().read(self.store.paths().prefix()).await?;
        if snapshot.revision < self.snapshot.revision {
            let (before, now) = (self.snapshot.revision, snapshot.revision);
            tracing::warn!("the DCS went back from revision {before} to {now}: was it restored from a backup?");
            self.restores += 1;
        }
        self.snapshot = snapshot;
        self.publish_view(asked, Revision(0));
        let from = Revision(self.snapshot.revision.0 + 1);
        let mut watch = self.store.dcs().watch(self.store.paths().prefix(), from).await?;
        // Beside the watch: nothing must wait for an answer that is slow.
        let mut reread = pin!(self.read_later());
        loop {
            let event = tokio::select! {
                biased;
                event = watch.next() => event.unwrap_or_else(|| Err(DcsError::WatchLost("closed".to_owned())))?,
                snapshot = &mut reread => {
                    reread.set(self.read_later());
                    match snapshot {
                        Ok((asked, snapshot)) => self.compare(asked, snapshot),
                        Err(lost @ DcsError::WatchLost(_)) => return Err(lost),
                        Err(_) => {}
                    }
                    continue;
                }
            };
            self.failures = 0;
            let now = self.clock.now();
            match event {
                WatchEvent::Alive => self.publish.send_modify(|known| {
                    known.confirmed_at = Some(now);
                    known.trouble = None;
                }),
                WatchEvent::Changes { revision, changes } => {
                    let since = self.snapshot.revision;
                    self.snapshot.apply(revision, changes);
                    self.publish_view(now, since);
                }
            }
        }
    }

    /// Reads everything in a while. [`DcsError::WatchLost`]: there is less than was known when it was asked for, so the watch is
    /// that of a store which is no more.
    fn read_later(&self) -> impl Future<Output = Result<(Instant, Snapshot), DcsError>> + use<D, C> {
        let (store, clock, publish) = (self.store.clone(), self.clock.clone(), self.publish.clone());
        async move {
            let _ = clock.within(REREAD, store.out_of_date()).await;
            let asked = clock.now();
            let known = publish.borrow().view.as_ref().map_or(Revision(0), |view| view.revision);
            let snapshot = store.dcs().read(store.paths().prefix()).await?;
            match snapshot.revision < known {
                true => {
                    Err(DcsError::WatchLost(format!("the DCS is at revision {}, before {known}", snapshot.revision)))
                }
                false => Ok((asked, snapshot)),
            }
        }
    }

    /// Takes what was read beside the watch, unless that has come further meanwhile.
    fn compare(&mut self, asked: Instant, snapshot: Snapshot) {
        if snapshot.revision < self.snapshot.revision {
            return;
        }
        let before = std::mem::replace(&mut self.snapshot, snapshot);
        let missed = before.differs(&self.snapshot);
        if !missed.is_empty() {
            tracing::info!("read what the watch has not told (yet): {}", missed.join(", "));
            self.publish_view(asked, Revision(0));
        }
    }

    /// `since`: what the published view shows of up to this revision is still right.
    fn publish_view(&self, confirmed_at: Instant, since: Revision) {
        let previous = self.publish.borrow().view.clone();
        let view = Arc::new(codec::view_after(self.store.paths(), &self.snapshot, previous.as_deref(), since));
        self.store.note_seen(view.revision);
        self.publish.send_modify(|known| {
            if let Some(trouble) = &known.trouble {
                tracing::info!("the DCS can be followed again at revision {} (was: {trouble})", view.revision);
            }
            *known = Knowledge {
                view: Some(view),
                confirmed_at: Some(confirmed_at),
                trouble: None,
                restores: self.restores,
            };
        });
    }

    fn doubt(&self, error: &DcsError) {
        let trouble = error.to_string();
        self.publish.send_if_modified(|known| {
            match &known.trouble {
                None => tracing::warn!("the DCS cannot be followed: {trouble}"),
                Some(_) => tracing::debug!("the DCS still cannot be followed: {trouble}"),
            }
            let changed = known.trouble.as_ref() != Some(&trouble);
            known.trouble = Some(trouble);
            changed
        });
    }
}

impl Snapshot {
    /// The keys that are not the same in both.
    fn differs<'s>(&'s self, other: &'s Self) -> Vec<&'s str> {
        let not_in = |other: &'s Self| {
            move |kv: &&KeyValue| {
                other
                    .entries
                    .binary_search_by(|have| have.key.cmp(&kv.key))
                    .map_or(true, |at| other.entries[at] != **kv)
            }
        };
        let gone_or_changed = self.entries.iter().filter(not_in(other));
        let new = other.entries.iter().filter(not_in(self));
        let mut keys: Vec<&str> = gone_or_changed.chain(new).map(|kv| kv.key.as_str()).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Makes the snapshot what it is after `changes`. Events at or below its revision are already in it.
    pub fn apply(&mut self, revision: Revision, changes: Vec<Change>) {
        if revision <= self.revision {
            return;
        }
        self.revision = revision;
        for change in changes {
            let key = match &change {
                Change::Put(kv) => &kv.key,
                Change::Delete(key) => key,
            };
            let place = self.entries.binary_search_by(|kv| kv.key.cmp(key));
            match (place, change) {
                (Ok(at), Change::Put(kv)) => self.entries[at] = kv,
                (Err(at), Change::Put(kv)) => self.entries.insert(at, kv),
                (Ok(at), Change::Delete(_)) => drop(self.entries.remove(at)),
                (Err(_), Change::Delete(_)) => (),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dcs::memory::{Backup, MemoryDcs};
    use crate::dcs::paths::Paths;
    use crate::dcs::store::{Outcome, SyncWrite};
    use crate::dcs::{Op, Txn};
    use crate::{LeaseId, TokioClock};
    use proptest::prelude::*;

    struct World {
        dcs: MemoryDcs<TokioClock>,
        store: ClusterStore<MemoryDcs<TokioClock>>,
        link: MemoryDcs<TokioClock>,
        clock: TokioClock,
    }

    fn world() -> World {
        let clock = TokioClock::default();
        let dcs = MemoryDcs::new(clock);
        let (link, paths) = (dcs.client(), Paths::new("service", "demo"));
        World { store: ClusterStore::new(dcs.clone(), paths), link, dcs, clock }
    }

    impl World {
        fn follow(&self) -> watch::Receiver<Knowledge> {
            let store = ClusterStore::new(self.link.clone(), self.store.paths().clone());
            Follower::spawn(store, self.clock)
        }

        async fn lead(&self, name: &str, lease: LeaseId) {
            self.store.take_leader(&name.into(), lease).await.unwrap();
        }
    }

    fn leader(known: &Knowledge) -> Option<&str> {
        known.view.as_ref()?.leader.as_ref().map(|leader| leader.name.as_str())
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_watch_has_lost_is_read() {
        let world = world();
        let mut known = world.follow();
        known.wait_for(|known| known.view.is_some()).await.unwrap();
        world.link.set_faults(|faults| faults.lost_events = 2);
        world.lead("a", LeaseId(0)).await;
        world.store.put_failover(&serde_json::json!({ "candidate": "b" }), None).await.unwrap();
        world.clock.sleep(REREAD / 2).await;
        assert_eq!(leader(&known.borrow()), None, "nobody has told");
        world.clock.sleep(REREAD).await;
        assert_eq!(leader(&known.borrow_and_update()), Some("a"));
        // Whoever was too late looks again at once.
        world.link.set_faults(|faults| faults.lost_events = 1);
        world.lead("c", LeaseId(0)).await;
        let followed = ClusterStore::new(world.link.clone(), world.store.paths().clone());
        let mut known = Follower::spawn(followed.clone(), world.clock);
        known.wait_for(|known| leader(known) == Some("c")).await.unwrap();
        world.link.set_faults(|faults| faults.lost_events = 2);
        world.lead("d", LeaseId(0)).await;
        assert!(!followed.put_status(&"c".into(), &serde_json::json!({})).await.unwrap().is_done());
        world.clock.sleep(Duration::from_millis(1)).await;
        assert_eq!(leader(&known.borrow()), Some("d"));
        // A reading that shows nothing new disturbs nobody, and a store that does not answer delays no event.
        let before = known.borrow().view.clone();
        world.clock.sleep(REREAD * 2).await;
        assert!(Arc::ptr_eq(&known.borrow().view.clone().unwrap(), &before.unwrap()));
        world.link.set_faults(|faults| faults.answer_delay = Duration::from_millis(900));
        world.clock.sleep(REREAD).await;
        world.lead("b", LeaseId(0)).await;
        world.clock.sleep(Duration::from_millis(1)).await;
        assert_eq!(leader(&known.borrow()), Some("b"));
    }

    #[tokio::test(start_paused = true)]
    async fn publishes_every_change_at_once() {
        let world = world();
        let mut known = world.follow();
        known.wait_for(|known| known.view.is_some()).await.unwrap();
        let start = world.clock.now();
        for name in ["a", "b", "c"] {
            world.lead(name, LeaseId(0)).await;
            let seen = known.wait_for(|known| leader(known) == Some(name)).await.unwrap();
            assert_eq!((seen.trouble.clone(), seen.confirmed_at), (None, Some(start)));
        }
        world.store.release_leader(&"c".into(), LeaseId(0), None, None).await.unwrap();
        known.wait_for(|known| leader(known).is_none()).await.unwrap();
        assert_eq!(world.clock.now(), start, "no time passes between a write and the view of it");
    }

    #[tokio::test(start_paused = true)]
    async fn sees_a_lease_run_out() {
        let world = world();
        let mut known = world.follow();
        let granted = world.clock.now();
        let lease = world.dcs.grant(Duration::from_secs(5)).await.unwrap();
        world.lead("a", lease.id).await;
        known.wait_for(|known| leader(known).is_some()).await.unwrap();
        known.wait_for(|known| leader(known).is_none()).await.unwrap();
        assert_eq!(world.clock.now(), granted + lease.ttl);
    }

    #[tokio::test(start_paused = true)]
    async fn confirms_while_nothing_happens_and_says_when_it_cannot() {
        let world = world();
        let mut known = world.follow();
        world.clock.sleep(Duration::from_secs(60)).await;
        let age = |known: &Knowledge, now: Instant| now.since(known.confirmed_at.unwrap());
        assert!(age(&known.borrow(), world.clock.now()) <= Duration::from_secs(1));

        world.link.set_faults(|faults| faults.cut = true);
        let cut = world.clock.now();
        known.wait_for(|known| known.trouble.is_some()).await.unwrap();
        assert!(world.clock.now().since(cut) <= Duration::from_secs(3), "silence is noticed");
        world.lead("a", LeaseId(0)).await;
        world.clock.sleep(Duration::from_secs(20)).await;
        assert!(age(&known.borrow(), world.clock.now()) >= Duration::from_secs(20));
        assert_eq!(leader(&known.borrow()), None, "nothing is known of what happened meanwhile");

        world.link.set_faults(|faults| faults.cut = false);
        let healed = world.clock.now();
        known.wait_for(|known| leader(known) == Some("a") && known.trouble.is_none()).await.unwrap();
        assert!(world.clock.now().since(healed) <= Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_watch_is_replaced_at_once() {
        let world = world();
        let mut known = world.follow();
        known.wait_for(|known| known.view.is_some()).await.unwrap();
        for name in ["a", "b", "c"] {
            let before = world.clock.now();
            world.link.break_watches();
            world.lead(name, LeaseId(0)).await;
            known.wait_for(|known| leader(known) == Some(name)).await.unwrap();
            assert_eq!(world.clock.now(), before);
            // A sign of life in between: otherwise it would be the next failure in a row.
            known.wait_for(|known| known.confirmed_at > Some(before)).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn keeps_the_last_good_settings() {
        let world = world();
        let mut known = world.follow();
        world.store.put_config(&serde_json::json!({"ttl": 20}), None).await.unwrap();
        known.wait_for(|known| known.view.as_ref().is_some_and(|view| view.config.is_some())).await.unwrap();
        let key = world.store.paths().key("config");
        let broken = Txn { then: vec![Op::Put(key.clone(), b"{".to_vec(), LeaseId(0))], ..Txn::default() };
        world.dcs.txn(broken).await.unwrap();
        let malformed = |known: &Knowledge| known.view.as_ref().is_some_and(|view| view.malformed.contains_key(&key));
        let seen = known.wait_for(malformed).await.unwrap().view.clone().unwrap();
        assert_eq!(seen.config.as_ref().unwrap().value, serde_json::json!({"ttl": 20}));
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_went_back_is_followed_from_there() {
        let world = world();
        let mut known = world.follow();
        world.lead("a", LeaseId(0)).await;
        let backup = world.dcs.backup();
        for name in ["b", "c"] {
            world.lead(name, LeaseId(0)).await;
        }
        known.wait_for(|known| leader(known) == Some("c")).await.unwrap();
        let newest = known.borrow().view.clone().unwrap().revision;
        world.dcs.restore(&backup);
        let seen = known.wait_for(|known| leader(known) == Some("a")).await.unwrap().clone();
        assert_eq!((seen.restores, seen.trouble, seen.view.unwrap().revision < newest), (1, None, true));
        world.dcs.restore(&Backup::default());
        let seen = known.wait_for(|known| leader(known).is_none()).await.unwrap().clone();
        assert_eq!((seen.restores, seen.trouble), (2, None));
        world.lead("d", LeaseId(0)).await;
        known.wait_for(|known| leader(known) == Some("d")).await.unwrap();
        assert_eq!(known.borrow().restores, 2);
    }

    /// Its keys have the revisions that the decision was made on.
    #[tokio::test(start_paused = true)]
    async fn what_was_decided_before_the_store_went_back_is_not_done() {
        let world = world();
        let followed = ClusterStore::new(world.link.clone(), world.store.paths().clone());
        let mut known = Follower::spawn(followed.clone(), world.clock);
        let write = |names: &[&str], seen| {
            let standbys: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let value = codec::encode_sync(Some(&"a".into()), 0, &standbys);
            SyncWrite { value: Some(value), seen, restored: None }
        };
        let Outcome::Done(written) = followed.put_sync(write(&["b"], Revision(0))).await.unwrap() else {
            panic!("conflict")
        };
        let backup = world.dcs.backup();
        world.lead("a", LeaseId(0)).await;
        known.wait_for(|known| leader(known) == Some("a")).await.unwrap();
        // The follower is not told: it has no connection.
        let newest = known.borrow().view.clone().unwrap().revision;
        world.link.set_faults(|faults| faults.watch_delay = Duration::from_secs(3600));
        world.dcs.restore(&backup);
        let outcome = followed.put_sync(write(&[], written)).await;
        let now = Revision(written.0 + 1);
        assert_eq!(now, newest, "a revision that has been seen before");
        assert_eq!(outcome, Err(DcsError::WentBack { known: newest, now }), "carried out, and good for nothing");
        world.link.set_faults(|faults| faults.watch_delay = Duration::ZERO);
        world.lead("b", LeaseId(0)).await;
        known.wait_for(|known| leader(known) == Some("b")).await.unwrap();
        assert!(followed.put_sync(write(&[], now)).await.unwrap().is_done(), "decided on what is there");
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_from_a_revision_of_a_store_that_is_no_more_is_found_out() {
        let world = world();
        for name in ["a", "b", "c"] {
            world.lead(name, LeaseId(0)).await;
        }
        // The store goes back between a reading and the watch from there: nothing breaks, and that revision is yet to come.
        let delay = Duration::from_millis(100);
        world.link.set_faults(|faults| faults.answer_delay = delay);
        let mut known = world.follow();
        world.clock.sleep(delay / 2).await;
        world.dcs.restore(&Backup::default());
        world.lead("d", LeaseId(0)).await;
        known.wait_for(|known| leader(known) == Some("c")).await.unwrap();
        world.clock.sleep(REREAD + Duration::from_secs(1)).await;
        assert_eq!((leader(&known.borrow()), known.borrow().restores), (Some("d"), 1));
    }

    #[tokio::test(start_paused = true)]
    async fn ends_with_its_last_receiver() {
        let world = world();
        let known = world.follow();
        let metrics = tokio::runtime::Handle::current().metrics();
        world.clock.sleep(Duration::from_secs(1)).await;
        assert_eq!(metrics.num_alive_tasks(), 1);
        drop(known);
        world.clock.sleep(Duration::from_secs(1)).await;
        assert_eq!(metrics.num_alive_tasks(), 0);
    }

    proptest! {
        /// Whatever was written in whatever order: following the events gives what reading gives.
        #[test]
        fn applying_events_equals_reading(writes in proptest::collection::vec((0..6u8, any::<bool>(), 0..9u8), 0..40)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let world = world();
                let mut watch = world.dcs.watch("/k", Revision(2)).await.unwrap();
                let mut applied = world.dcs.read("/k").await.unwrap();
                for (key, delete, value) in writes {
                    let key = format!("/k{key}");
                    let op = if delete { Op::Delete(key) } else { Op::Put(key, vec![value], LeaseId(0)) };
                    world.dcs.txn(Txn { then: vec![op], ..Txn::default() }).await.unwrap();
                }
                let read = world.dcs.read("/k").await.unwrap();
                while applied.revision < read.revision {
                    if let WatchEvent::Changes { revision, changes } = watch.next().await.unwrap().unwrap() {
                        applied.apply(revision, changes);
                    }
                }
                prop_assert_eq!(applied, read);
                Ok(())
            })?;
        }
    }
}
