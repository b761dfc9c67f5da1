//! Registration: how a new leader learns that this router has let go of the leader before it (`router_lease`).
//!
//! While the setting is on, the router has a key of its own in the DCS, attached to a lease of its own. The value names the
//! leader key that it follows: every session to a leader before that one is over, and none will be opened. A new leader
//! waits for that, but no longer than the lease.
//!
//! So a router that can't say it must have let go by itself by the end of its lease ([`Registered::restrict`]). The end is
//! counted from when the last renewal was *sent*, and a renewal counts only if a look at the leader key that was sent
//! *after* it has shown no other leader than the one followed: whoever takes the key later does so after that renewal, and
//! waits for a whole lease. Whether the watch has fallen behind makes no difference.
//!
//! What the lease does not end are sessions to a leader that proves itself over its REST API: its agent lives, and by its own
//! clock holds the key.

use std::time::Duration;

use tokio::sync::watch;
use tracing::{debug, info, warn};
use trunkline_common::cluster::RouterRecord;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::dcs::{Dcs, DcsError, Lease};
use trunkline_common::{Clock, Instant, Revision};

use crate::table::RouteTable;

/// Renewals in a lease.
const PACE: u32 = 4;

/// This part of a lease is kept for ending sessions.
const MARGIN: u32 = 10;

/// Pause after a request that failed.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a process that ends takes to give its registration back.
const WITHDRAWAL: Duration = Duration::from_secs(1);

/// What a registration has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Followed {
    /// `router_lease`; zero: routers don't register.
    pub lease: Duration,
    /// When the leader key was created that sessions are opened and kept by; 0 before there was one.
    pub epoch: Revision,
}

/// Until when a new leader waits for this router, unless it says that it has let go; `None` before it ever did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Registered(pub Option<Instant>);

impl Registered {
    /// Whether no new leader can have gone on without this router at `now`.
    pub fn holds(self, now: Instant) -> bool {
        self.0.is_some_and(|until| now < until)
    }

    /// What is left of `table` at `now`: without a registration there are no new sessions to a leader that has not `proven`
    /// itself, and after the end of one those that there are end as well.
    pub fn restrict(self, table: RouteTable, proven: bool, now: Instant) -> RouteTable {
        if self.holds(now) || proven {
            return table;
        }
        let reign = table.reign.clone().filter(|_| self.0.is_none());
        RouteTable { resigns: table.resigns && reign.is_some(), reign, ..table.unconfirmed(false) }
    }
}

/// Both sides of a registration, as all of the router sees it.
#[derive(Debug, Default)]
pub struct Registration {
    /// What it has to say.
    followed: watch::Sender<Followed>,
    /// What has come of it.
    pub registered: watch::Sender<Registered>,
    end: watch::Sender<bool>,
}

impl Registration {
    /// Whoever goes by a leader key that was created before `epoch` has been cut off. `None`: there is no leader key.
    pub fn follow(&self, lease: Duration, epoch: Option<Revision>) {
        self.followed.send_if_modified(|followed| {
            let now = Followed { lease, epoch: epoch.unwrap_or(followed.epoch) };
            std::mem::replace(followed, now) != now
        });
    }

    /// Gives it back: there are no sessions any more, and nobody has to wait for this router.
    pub async fn withdraw(&self) {
        self.end.send_replace(true);
        let mut registered = self.registered.subscribe();
        // Otherwise it ends with its lease.
        let _ = tokio::time::timeout(WITHDRAWAL, registered.wait_for(|registered| registered.0.is_none())).await;
    }
}

/// The task that registers.
#[derive(Debug)]
pub struct Registrar<D, C> {
    store: ClusterStore<D>,
    clock: C,
    /// What this router calls itself.
    name: String,
    followed: watch::Receiver<Followed>,
    registered: watch::Sender<Registered>,
    end: watch::Receiver<bool>,
    lease: Option<Lease>,
    /// It has failed, which is said once.
    in_trouble: bool,
}

impl<D: Dcs, C: Clock> Registrar<D, C> {
    /// A router called `name` that is not registered yet.
    pub fn new(store: ClusterStore<D>, clock: C, name: String, registration: &Registration) -> Self {
        let (followed, registered) = (registration.followed.subscribe(), registration.registered.clone());
        let end = registration.end.subscribe();
        Self { store, clock, name, followed, registered, end, lease: None, in_trouble: false }
    }

    /// Registers while `router_lease` says so, until it is withdrawn.
    pub async fn run(mut self) {
        let mut end = self.end.clone();
        tokio::select! {
            biased;
            _ = end.wait_for(|end| *end) => {}
            () = self.register() => {}
        }
        self.leave().await;
    }

    async fn register(&mut self) {
        let mut renew_at = self.clock.now();
        loop {
            let followed = *self.followed.borrow_and_update();
            let now = self.clock.now();
            if followed.lease.is_zero() {
                self.leave().await;
                renew_at = now;
            } else {
                let due = renew_at <= now;
                if due {
                    renew_at = now + followed.lease / PACE;
                }
                if let Err(error) = self.say(followed, due).await {
                    if !std::mem::replace(&mut self.in_trouble, true) {
                        warn!(%error, "this router can't register, or renew its registration");
                    }
                    // Who may not write today may tomorrow, but not the next moment.
                    let refused = matches!(error, DcsError::Refused(_));
                    renew_at = self.clock.now() + if refused { followed.lease / PACE } else { PAUSE };
                }
            }
            tokio::select! {
                biased;
                changed = self.followed.changed() => if changed.is_err() { return },
                () = self.clock.sleep_until(renew_at), if !followed.lease.is_zero() => {}
            }
        }
    }

    /// Says what is followed, after a renewal if one is `due`, and looks whether that is the newest leader: if so, the last
    /// renewal counts.
    async fn say(&mut self, followed: Followed, due: bool) -> Result<(), DcsError> {
        let lease = match self.lease {
            Some(lease) if !due => lease,
            Some(lease) => self.forget_if_lost(self.store.renew(lease.id).await)?.0,
            None => self.store.grant(followed.lease).await?,
        };
        self.lease = Some(lease);
        let record = RouterRecord { name: self.name.clone(), lease: followed.lease, epoch: followed.epoch };
        let said = self.store.put_router(lease.id, &record).await;
        let newest = self.forget_if_lost(said)?;
        if newest.is_some_and(|newest| newest != followed.epoch) {
            // Which the watch is about to show.
            return Ok(());
        }
        // The store may grant more than was asked for, which nobody waits for; and letting go takes its time.
        let length = followed.lease.min(lease.ttl);
        let until = Some(lease.until - lease.ttl + length - length / MARGIN);
        if std::mem::take(&mut self.in_trouble) || self.registered.borrow().0.is_none() {
            info!(name = self.name, lease = ?followed.lease, "registered: a new leader waits for this router");
        }
        self.registered.send_if_modified(|registered| std::mem::replace(&mut registered.0, until) != until);
        Ok(())
    }

    fn forget_if_lost<T>(&mut self, result: Result<T, DcsError>) -> Result<T, DcsError> {
        if matches!(result, Err(DcsError::LeaseLost)) {
            self.lease = None;
        }
        result
    }

    async fn leave(&mut self) {
        if let Some(lease) = self.lease.take()
            && let Err(error) = self.store.dcs().revoke(lease.id).await
        {
            debug!(%error, "the registration ends with its lease");
        }
        self.registered.send_if_modified(|registered| registered.0.take().is_some());
    }
}

#[cfg(test)]
mod tests {
    use trunkline_common::TokioClock;
    use trunkline_common::dcs::memory::MemoryDcs;
    use trunkline_common::dcs::paths::Paths;
    use trunkline_common::dcs::store::{Alongside, Outcome, Seen};
    use trunkline_common::dcs::{Op, Txn};

    use super::*;
    use crate::table::Certainty;
    use crate::table::tests::{member, view};

    const LEASE: Duration = Duration::from_secs(5);

    #[test]
    fn a_registration_that_is_over_leaves_nothing_to_a_leader_that_has_not_proven_itself() {
        let now = Instant::from_boot(Duration::from_secs(100));
        let table =
            RouteTable::from_view(&view(Some(("a", 7)), &[("a", member("primary", "running")), ("b", standby())]));
        let left = |registered: Option<u64>, proven| {
            let registered = Registered(registered.map(|at| Instant::from_boot(Duration::from_secs(at))));
            let left = registered.restrict(table.clone(), proven, now);
            assert_eq!(left.standbys, table.standbys, "reading is not what this is about");
            (left.leader.is_some(), left.reign.is_some(), left.certainty == Certainty::Confirmed)
        };
        assert_eq!(left(Some(101), false), (true, true, true));
        assert_eq!(left(None, false), (false, true, false), "what there is goes on: nothing was promised yet");
        assert_eq!(left(Some(100), false), (false, false, false));
        assert_eq!(left(Some(100), true), (true, true, true));
        assert_eq!(left(None, true), (true, true, true));
    }

    fn standby() -> trunkline_common::Member {
        member("replica", "running")
    }

    struct World {
        dcs: MemoryDcs<TokioClock>,
        store: ClusterStore<MemoryDcs<TokioClock>>,
        clock: TokioClock,
        registration: Registration,
        registered: watch::Receiver<Registered>,
    }

    /// A router that follows the first leader key.
    async fn world() -> (World, Revision) {
        let clock = TokioClock::default();
        let hub = MemoryDcs::new(clock);
        let (dcs, paths) = (hub.client(), Paths::new("service", "demo"));
        let registration = Registration::default();
        let name = "web1/7".to_owned();
        let registrar = Registrar::new(ClusterStore::new(dcs.clone(), paths.clone()), clock, name, &registration);
        tokio::spawn(registrar.run());
        let registered = registration.registered.subscribe();
        let mut world = World { dcs, store: ClusterStore::new(hub, paths), clock, registration, registered };
        let first = world.elect("a").await;
        world.registration.follow(LEASE, Some(first));
        world.registered.wait_for(|registered| registered.0.is_some()).await.unwrap();
        (world, first)
    }

    impl World {
        async fn elect(&self, name: &str) -> Revision {
            let delete = Op::Delete(self.store.paths().key("leader"));
            self.store.dcs().txn(Txn { then: vec![delete], ..Txn::default() }).await.unwrap();
            let lease = self.store.grant(LEASE * 100).await.unwrap().id;
            match self.store.acquire_leader(&name.into(), lease, Seen::default(), Alongside::default()).await {
                Ok(Outcome::Done(created)) => created,
                other => panic!("{other:?}"),
            }
        }

        async fn records(&self) -> Vec<RouterRecord> {
            self.store.read().await.unwrap().routers.into_values().collect()
        }

        fn until(&self) -> Instant {
            self.registered.borrow().0.unwrap()
        }
    }

    fn record(epoch: Revision) -> RouterRecord {
        RouterRecord { name: "web1/7".into(), lease: LEASE, epoch }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_renewed_says_what_is_followed_and_is_given_back() {
        let (world, first) = world().await;
        assert_eq!(world.records().await, [record(first)]);
        world.clock.sleep(LEASE * 10).await;
        assert_eq!(world.records().await, [record(first)]);
        assert!(world.until() > world.clock.now() + LEASE / 2);

        let second = world.elect("b").await;
        world.registration.follow(LEASE, Some(second));
        let before = world.clock.now();
        while world.records().await != [record(second)] {
            tokio::task::yield_now().await;
        }
        assert_eq!(world.clock.now(), before, "said at once, not with the next renewal");

        world.registration.follow(Duration::ZERO, Some(second));
        world.registered.clone().wait_for(|registered| registered.0.is_none()).await.unwrap();
        assert_eq!(world.records().await, [], "the setting is off");
        world.registration.follow(LEASE, Some(second));
        world.registered.clone().wait_for(|registered| registered.0.is_some()).await.unwrap();
        world.registration.withdraw().await;
        assert_eq!(world.records().await, [], "the process ends");
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_over_here_no_later_than_in_the_dcs() {
        let (world, first) = world().await;
        world.clock.sleep(LEASE * 3).await;
        world.dcs.set_faults(|faults| faults.cut = true);
        let until = world.until();
        world.clock.sleep_until(until - Duration::from_millis(1)).await;
        assert!(!world.registered.borrow().holds(until));
        assert_eq!(world.records().await, [record(first)], "still there until sessions have ended");
        world.clock.sleep(LEASE).await;
        assert_eq!(world.records().await, []);
        world.dcs.set_faults(|faults| faults.cut = false);
        world.registered.clone().wait_for(|registered| registered.holds(world.clock.now())).await.unwrap();
        assert_eq!(world.records().await, [record(first)]);
    }

    /// Whoever does not see the new leader must not go on by renewals: it is waited for no longer than one lease.
    #[tokio::test(start_paused = true)]
    async fn renewals_do_not_count_while_another_leader_is_there_than_the_one_followed() {
        let (world, first) = world().await;
        world.clock.sleep(LEASE * 3).await;
        let second = world.elect("b").await;
        let elected = world.clock.now();
        world.clock.sleep(LEASE).await;
        assert_eq!(world.records().await, [record(first)], "its lease is renewed");
        assert!(world.until() <= elected + LEASE && !world.registered.borrow().holds(world.clock.now()));
        world.registration.follow(LEASE, Some(second));
        world.registered.clone().wait_for(|registered| registered.holds(world.clock.now())).await.unwrap();
        assert_eq!(world.records().await, [record(second)]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_was_removed_by_hand_is_back_with_the_next_renewal() {
        let (world, first) = world().await;
        let key = world.store.dcs().peek("/service/demo/routers/").entries.remove(0);
        world.store.dcs().txn(Txn { then: vec![Op::Delete(key.key)], ..Txn::default() }).await.unwrap();
        world.clock.sleep(LEASE / 2).await;
        assert_eq!(world.records().await, [record(first)]);
        let lease = world.store.dcs().peek("/service/demo/routers/").entries.remove(0).lease;
        world.store.dcs().revoke(lease).await.unwrap();
        world.clock.sleep(LEASE / 2).await;
        assert_eq!(world.records().await, [record(first)]);
    }
}
