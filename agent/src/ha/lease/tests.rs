//! The keeper against the store in memory, on a clock that takes no time.

use std::sync::Arc;

use parking_lot::Mutex;
use trunkline_common::cluster::ConfigRecord;
use trunkline_common::dcs::lasts;
use trunkline_common::dcs::memory::MemoryDcs;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::store::{Alongside, Seen};
use trunkline_common::{ClusterView, LeaseId, Revision, TokioClock};

use super::*;

const TTL: Duration = Duration::from_secs(5);

/// Notes when it was told to fence.
#[derive(Clone)]
struct Recorder(TokioClock, Arc<Mutex<Vec<Instant>>>);

impl Fence for Recorder {
    async fn fence(&self, _: Duration) -> Result<(), PgError> {
        self.1.lock().push(self.0.now());
        Ok(())
    }
}

/// Keeps the deadline, and until when the leader's address was held last.
#[derive(Debug, Clone, Default)]
struct Paper(Arc<Mutex<Option<Deadline>>>, Arc<Mutex<Vec<Option<Instant>>>>);

impl Guard for Paper {
    fn arm(&self, deadline: Deadline) {
        *self.0.lock() = Some(deadline);
    }

    fn disarm(&self) {
        *self.0.lock() = None;
    }

    fn deadline(&self) -> Option<Deadline> {
        *self.0.lock()
    }

    fn hold_address(&self, until: Option<Instant>) {
        self.1.lock().push(until);
    }
}

struct Bench {
    clock: TokioClock,
    dcs: MemoryDcs<TokioClock>,
    store: ClusterStore<MemoryDcs<TokioClock>>,
    fences: Arc<Mutex<Vec<Instant>>>,
    handle: LeaseHandle,
    guard: Paper,
    stop: watch::Sender<bool>,
}

/// A keeper whose node has just won the leader key.
async fn leading() -> Bench {
    let clock = TokioClock::default();
    let dcs = MemoryDcs::new(clock);
    let store = ClusterStore::new(dcs.client(), Paths::new("service", "demo"));
    let (stop, stopped) = watch::channel(false);
    let recorder = Recorder(clock, Arc::default());
    let fences = recorder.1.clone();
    let timing = Timing { ttl: TTL, loop_wait: Duration::from_secs(1), pause: false };
    let guard = Paper::default();
    let told = Arc::new(guard.clone());
    let handle = Keeper::spawn(store.clone(), recorder, clock, "a".into(), timing, told, stopped);
    let mut session = handle.subscribe();
    let lease = session.wait_for(|session| session.lease.is_some()).await.unwrap().lease.unwrap();
    let won = store.acquire_leader(&"a".into(), lease.id, Seen::default(), Alongside::default()).await.unwrap();
    assert!(won.is_done() && handle.lead(lease));
    Bench { clock, dcs, store, fences, handle, guard, stop }
}

impl Bench {
    /// Lets time pass with a loop that is alive.
    async fn live(&self, time: Duration) {
        let end = self.clock.now() + time;
        while self.clock.now() < end {
            self.handle.beat(self.clock.now());
            self.clock.sleep(Duration::from_millis(50)).await;
        }
    }

    /// When the next renewal that counts was sent, and when it was answered.
    async fn renewal(&self) -> (Instant, Instant) {
        let until = || self.handle.session().lease.map(|lease| lease.until);
        let before = until();
        while until() == before {
            self.handle.beat(self.clock.now());
            self.clock.sleep(Duration::from_millis(1)).await;
        }
        let lease = self.handle.session().lease.unwrap();
        (lease.until - lasts(lease.ttl), self.clock.now())
    }

    fn key_is_there(&self) -> bool {
        self.dcs.peek("/service/demo/leader").entries.len() == 1
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_renews_leads_on() {
    let bench = leading().await;
    bench.live(TTL * 10).await;
    assert!(bench.handle.session().leading && bench.fences.lock().is_empty() && bench.key_is_there());
}

/// One that prolongs the lease, and one that proves it and shows the key in the same breath.
#[tokio::test(start_paused = true)]
async fn a_renewal_takes_two_requests() {
    const ROUND_TRIP: Duration = Duration::from_millis(100);
    let bench = leading().await;
    bench.store.dcs().set_faults(|faults| faults.answer_delay = ROUND_TRIP);
    // One that is under way.
    bench.renewal().await;
    let (sent, answered) = bench.renewal().await;
    assert_eq!(answered.since(sent).as_millis() / ROUND_TRIP.as_millis(), 2);
}

#[tokio::test(start_paused = true)]
async fn who_leads_nothing_renews_half_as_often() {
    let bench = leading().await;
    let pace = async || {
        let (before, _) = bench.renewal().await;
        bench.renewal().await.0.since(before)
    };
    assert_eq!(pace().await, TTL / 10);
    bench.handle.resign();
    bench.renewal().await;
    assert_eq!(pace().await, TTL / 5);
    // From the moment on in which it leads again.
    let (last, _) = bench.renewal().await;
    bench.live(TTL / 10).await;
    assert!(bench.handle.lead(bench.handle.session().lease.unwrap()));
    let (next, _) = bench.renewal().await;
    assert!(next.since(last) <= TTL / 10 + Duration::from_millis(50), "{:?}", next.since(last));
}

#[tokio::test(start_paused = true)]
async fn cut_off_from_the_dcs_it_fences_before_the_key_can_be_taken() {
    let bench = leading().await;
    bench.live(Duration::from_secs(7)).await;
    let until = bench.handle.session().leader_until().unwrap();
    bench.store.dcs().set_faults(|faults| faults.cut = true);
    while bench.fences.lock().is_empty() {
        assert!(bench.key_is_there(), "the key was free before the fence");
        bench.live(Duration::from_millis(50)).await;
    }
    let fenced = bench.fences.lock()[0];
    assert!(
        fenced < until && until.since(fenced) >= Duration::from_millis(300),
        "fenced at {fenced:?}, until {until:?}"
    );
    assert!(!bench.handle.session().leading);
    bench.live(TTL).await;
    assert_eq!(bench.fences.lock().len(), 1, "one fence is enough");
}

#[tokio::test(start_paused = true)]
async fn answers_that_get_lost_do_not_prolong_leadership() {
    let bench = leading().await;
    bench.store.dcs().set_faults(|faults| faults.lost_answers = u32::MAX);
    let until = bench.handle.session().leader_until().unwrap();
    bench.live(TTL + Duration::from_secs(1)).await;
    // The store did renew the lease; but we can't know that.
    assert!(bench.fences.lock().first().is_some_and(|at| *at < until));
}

#[tokio::test(start_paused = true)]
async fn slow_answers_count_from_the_request() {
    let bench = leading().await;
    bench.store.dcs().set_faults(|faults| faults.answer_delay = Duration::from_millis(400));
    bench.live(Duration::from_secs(20)).await;
    let left = bench.handle.session().leader_until().unwrap().since(bench.clock.now());
    assert!(left <= TTL - Duration::from_millis(400), "{left:?} left of {TTL:?}");
    assert!(bench.fences.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stuck_loop_loses_the_lease_and_postgresql_is_fenced_first() {
    let bench = leading().await;
    bench.live(Duration::from_secs(3)).await;
    // No beat from here on.
    let mut sessions = bench.handle.subscribe();
    sessions.wait_for(|session| session.fenced == 1).await.unwrap();
    assert!(bench.key_is_there(), "fenced while the key was still ours");
    tokio::time::sleep(TTL * 2).await;
    assert!(!bench.key_is_there(), "the lease has run out");
}

#[tokio::test(start_paused = true)]
async fn a_key_taken_from_outside_is_noticed_and_the_loop_gets_little_time() {
    let bench = leading().await;
    bench.live(Duration::from_secs(2)).await;
    let began = bench.clock.now();
    bench.store.take_leader(&"b".into(), LeaseId(0)).await.unwrap();
    bench.live(Duration::from_millis(1200)).await;
    let fenced = *bench.fences.lock().first().expect("fenced");
    assert!(fenced.since(began) <= Duration::from_millis(1100), "{:?}", fenced.since(began));
}

#[tokio::test(start_paused = true)]
async fn a_revoked_lease_is_fenced_at_once() {
    let bench = leading().await;
    let lease = bench.handle.session().lease.unwrap();
    bench.dcs.client().revoke(lease.id).await.unwrap();
    bench.live(Duration::from_secs(1)).await;
    assert_eq!(bench.fences.lock().len(), 1);
    assert!(bench.handle.session().lease.is_some_and(|new| new.id != lease.id), "a new lease for the member key");
}

#[tokio::test(start_paused = true)]
async fn who_has_resigned_is_left_alone() {
    let bench = leading().await;
    bench.handle.resign();
    bench.store.dcs().set_faults(|faults| faults.cut = true);
    bench.live(TTL * 2).await;
    assert!(bench.fences.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_paused_leader_is_not_fenced() {
    let bench = leading().await;
    bench.handle.set_timing(Timing { ttl: TTL, loop_wait: Duration::from_secs(1), pause: true });
    bench.store.dcs().set_faults(|faults| faults.refused = true);
    bench.live(TTL * 2).await;
    assert!(bench.fences.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_longer_ttl_moves_the_key_to_a_new_lease() {
    let bench = leading().await;
    let before = bench.handle.session().lease.unwrap();
    bench.handle.set_timing(Timing { ttl: TTL * 4, loop_wait: Duration::from_secs(1), pause: false });
    bench.live(Duration::from_secs(2)).await;
    let after = bench.handle.session();
    assert!(after.leading && after.lease.unwrap().id != before.id && after.lease.unwrap().ttl == TTL * 4);
    assert_eq!(bench.dcs.peek("/service/demo/leader").entries[0].lease, after.lease.unwrap().id);
}

#[tokio::test(start_paused = true)]
async fn a_ttl_that_changes_during_a_renewal_is_asked_for_at_once() {
    let bench = leading().await;
    let hop = Duration::from_millis(100);
    bench.store.dcs().set_faults(|faults| (faults.request_delay, faults.answer_delay) = (hop, hop));
    let (_, answered) = bench.renewal().await;
    let next = answered + TTL / 10;
    bench.clock.sleep_until(next + hop).await;
    bench.handle.set_timing(Timing { ttl: TTL * 2, loop_wait: Duration::from_secs(1), pause: false });
    // What is left of the renewal that is on its way, the grant and the move of the key; the next renewal would come a second later.
    bench.live(hop * 9).await;
    assert_eq!(bench.handle.session().lease.unwrap().ttl, TTL * 2);
}

#[tokio::test(start_paused = true)]
async fn a_shorter_ttl_counts_from_the_moment_the_key_may_have_moved() {
    let bench = leading().await;
    bench.live(Duration::from_secs(2)).await;
    let hop = Duration::from_millis(100);
    bench.store.dcs().set_faults(|faults| (faults.request_delay, faults.answer_delay) = (hop, hop));
    bench.handle.set_timing(Timing { ttl: Duration::from_secs(2), loop_wait: Duration::from_secs(1), pause: false });
    let old = bench.handle.session().lease.unwrap().id;
    let moved = || bench.dcs.peek("/service/demo/leader").entries.first().is_some_and(|key| key.lease != old);
    while !moved() {
        bench.handle.beat(bench.clock.now());
        bench.clock.sleep(Duration::from_millis(5)).await;
    }
    // The key hangs on the short lease now, and we are not told.
    bench.store.dcs().set_faults(|faults| faults.cut = true);
    while bench.fences.lock().is_empty() {
        assert!(bench.key_is_there(), "the key was free before the fence");
        bench.live(Duration::from_millis(50)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_members_word_moves_the_deadline_and_nothing_else_does() {
    let bench = leading().await;
    bench.store.dcs().set_faults(|faults| faults.cut = true);
    for _ in 0..20 {
        let asked_at = bench.clock.now();
        assert!(bench.handle.prolong(asked_at, asked_at + TTL));
        let deadline = bench.guard.deadline().expect("armed");
        assert_eq!((Some(deadline.until), deadline.until), (bench.handle.session().leader_until(), asked_at + TTL));
        bench.live(TTL / 2).await;
    }
    assert!(!bench.key_is_there() && bench.fences.lock().is_empty());
    // No promise any more: it ends with the last one, and a late one does not revive it.
    let until = bench.handle.session().leader_until().unwrap();
    bench.live(TTL / 2 - Duration::from_millis(450)).await;
    assert!(!bench.handle.prolong(bench.clock.now(), bench.clock.now() + TTL), "being fenced");
    bench.live(TTL).await;
    assert!(bench.fences.lock().len() == 1 && bench.fences.lock()[0] < until);
    assert!(!bench.handle.prolong(bench.clock.now(), bench.clock.now() + TTL), "over");
    assert_eq!((bench.handle.session().failsafe, bench.guard.deadline()), (None, None));
}

#[tokio::test(start_paused = true)]
async fn with_the_members_word_a_lost_key_is_no_reason_to_fence_and_can_be_won_back() {
    let bench = leading().await;
    let old = bench.handle.session().lease.unwrap();
    bench.live(Duration::from_secs(1)).await;
    let now = bench.clock.now();
    assert!(bench.handle.prolong(now, now + TTL));
    bench.dcs.client().revoke(old.id).await.unwrap();
    bench.live(Duration::from_secs(1)).await;
    let session = bench.handle.session();
    assert_eq!((session.leading, session.leader_until()), (false, Some(now + TTL)));
    let lease = session.lease.unwrap();
    assert!(
        bench
            .store
            .acquire_leader(&"a".into(), lease.id, Seen::default(), Alongside::default())
            .await
            .unwrap()
            .is_done()
    );
    assert!(bench.handle.lead(lease));
    bench.live(TTL * 3).await;
    assert!(bench.handle.session().leading && bench.fences.lock().is_empty() && bench.key_is_there());
    // The word is over by now: what holds is the lease alone.
    bench.dcs.client().revoke(bench.handle.session().lease.unwrap().id).await.unwrap();
    bench.live(Duration::from_secs(1)).await;
    assert_eq!(bench.fences.lock().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_members_word_is_void_once_one_of_them_leads() {
    let bench = leading().await;
    let lease = bench.handle.session().lease.unwrap();
    let now = bench.clock.now();
    assert!(bench.handle.prolong(now, now + TTL * 4));
    bench.dcs.client().revoke(lease.id).await.unwrap();
    bench.live(Duration::from_secs(1)).await;
    assert!(bench.handle.may_write(bench.clock.now()));
    bench.handle.depose(bench.clock.now());
    assert!(!bench.handle.may_write(bench.clock.now()));
    bench.live(Duration::from_secs(1)).await;
    assert_eq!((bench.fences.lock().len(), bench.handle.session().leader_until()), (1, None));
}

#[tokio::test(start_paused = true)]
async fn who_may_write_is_told_when_that_ends() {
    let bench = leading().await;
    assert!(bench.handle.may_write(bench.clock.now()));
    let lease = bench.handle.session().lease.unwrap();
    let told = bench.handle.must_not_write(&bench.clock);
    let end = async {
        bench.live(TTL * 3).await;
        bench.dcs.client().revoke(lease.id).await.unwrap();
        bench.live(Duration::from_secs(1)).await;
        bench.clock.now()
    };
    tokio::pin!(told, end);
    tokio::select! {
        biased;
        () = &mut told => assert!(!bench.key_is_there()),
        _ = &mut end => panic!("not told"),
    }
    assert!(!bench.handle.may_write(bench.clock.now()));
    bench.handle.set_timing(Timing { ttl: TTL, loop_wait: Duration::from_secs(1), pause: true });
    assert!(bench.handle.may_write(bench.clock.now()), "an operator has taken over");
}

#[tokio::test(start_paused = true)]
async fn who_makes_a_cluster_may_write_as_long_as_its_lease_lives() {
    let bench = leading().await;
    bench.handle.resign();
    assert!(!bench.handle.may_write(bench.clock.now()));
    let lease = bench.handle.session().lease.unwrap();
    assert!(bench.handle.bootstrap(lease));
    bench.live(TTL * 2).await;
    assert!(bench.handle.may_write(bench.clock.now()));
    let told = bench.handle.must_not_write(&bench.clock);
    let (told, ()) = tokio::join!(tokio::time::timeout(TTL * 3, told), async {
        bench.dcs.client().revoke(lease.id).await.unwrap();
        bench.live(TTL * 2).await;
    });
    told.unwrap();
    assert!(!bench.handle.may_write(bench.clock.now()));
}

#[tokio::test(start_paused = true)]
async fn who_is_disowned_is_fenced_soon_and_who_never_led_is_not() {
    let bench = leading().await;
    bench.handle.disown(bench.clock.now());
    assert!(!bench.handle.may_write(bench.clock.now()));
    bench.live(Duration::from_secs(1)).await;
    assert_eq!(bench.fences.lock().len(), 1);
    bench.handle.disown(bench.clock.now());
    bench.live(Duration::from_secs(1)).await;
    assert_eq!(bench.fences.lock().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_guard_has_every_deadline_and_keeps_the_last_one_of_a_dead_agent() {
    let bench = leading().await;
    for _ in 0..20 {
        bench.live(Duration::from_millis(700)).await;
        let until = bench.handle.session().leader_until();
        let deadline = bench.guard.deadline().expect("armed while leading");
        assert_eq!(Some(deadline.until), until);
        assert!(deadline.fence_at < deadline.kill_at && deadline.kill_at < deadline.until);
    }
    bench.stop.send_replace(true);
    bench.live(TTL * 2).await;
    let deadline = bench.guard.deadline().expect("still armed");
    assert!(deadline.until < bench.clock.now() && bench.fences.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_guard_is_disarmed_by_whoever_resigns_fences_or_pauses() {
    let bench = leading().await;
    let timing = Timing { ttl: TTL, loop_wait: Duration::from_secs(1), pause: false };
    bench.handle.set_timing(Timing { pause: true, ..timing });
    assert_eq!(bench.guard.deadline(), None, "paused");
    bench.live(Duration::from_secs(1)).await;
    assert_eq!(bench.guard.deadline(), None, "renewed while paused");
    bench.handle.set_timing(timing);
    assert!(bench.guard.deadline().is_some(), "resumed");
    bench.handle.resign();
    assert_eq!(bench.guard.deadline(), None, "resigned");
    assert!(bench.handle.bootstrap(bench.handle.session().lease.unwrap()));
    assert!(bench.guard.deadline().is_some(), "a new cluster's server takes writes before there is a leader key");
    bench.live(TTL * 2).await;
    assert!(bench.guard.deadline().is_some_and(|deadline| deadline.until > bench.clock.now()), "renewed");
    bench.store.dcs().set_faults(|faults| faults.cut = true);
    bench.live(TTL * 2).await;
    assert_eq!((bench.fences.lock().len(), bench.guard.deadline()), (1, None), "fenced");
}

/// An agent that starts finds the deadline of the one before it, with the server that it is meant for.
#[tokio::test(start_paused = true)]
async fn an_inherited_deadline_is_moved_by_the_new_agent_or_met() {
    for leads in [true, false] {
        let bench = leading().await;
        bench.live(Duration::from_secs(2)).await;
        bench.stop.send_replace(true);
        let left = bench.guard.deadline().expect("armed");
        let (stop, stopped) = watch::channel(false);
        let recorder = Recorder(bench.clock, Arc::default());
        let fences = recorder.1.clone();
        let timing = Timing { ttl: TTL, loop_wait: Duration::from_secs(1), pause: false };
        let told = Arc::new(bench.guard.clone());
        let handle = Keeper::spawn(bench.store.clone(), recorder, bench.clock, "a".into(), timing, told, stopped);
        let new = Bench { handle, fences, stop, ..bench };
        let mut session = new.handle.subscribe();
        let lease = session.wait_for(|session| session.lease.is_some()).await.unwrap().lease.unwrap();
        assert_eq!(new.guard.deadline(), Some(left), "a lease alone moves nothing");
        if leads {
            assert!(new.store.confirm_leader(&"a".into(), lease.id).await.unwrap().is_done());
            assert!(new.handle.lead(lease));
        }
        new.live(TTL * 2).await;
        assert_eq!(new.fences.lock().is_empty(), leads);
        assert_eq!(new.guard.deadline().is_some(), leads);
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_without_answer_cannot_remove_the_key_that_is_won_next() {
    let bench = leading().await;
    let old = bench.handle.session().lease.unwrap().id;
    bench.handle.resign();
    bench.store.dcs().set_faults(|faults| faults.lost_answers = 1);
    assert!(bench.store.release_leader(&"a".into(), old, None, None).await.is_err());
    bench.handle.abandon(old);
    bench.live(Duration::from_millis(150)).await;
    let lease = bench.handle.session().lease.expect("another one was asked for at once");
    assert!(lease.id != old);
    assert!(
        bench
            .store
            .acquire_leader(&"a".into(), lease.id, Seen::default(), Alongside::default())
            .await
            .unwrap()
            .is_done()
    );
    // It was carried out, or is now.
    assert!(!bench.store.release_leader(&"a".into(), old, None, None).await.unwrap().is_done());
    assert!(bench.key_is_there());
}

#[tokio::test(start_paused = true)]
async fn the_address_is_given_up_with_the_key_by_whoever_was_just_started() {
    let bench = leading().await;
    // Not told yet whether it serves: an earlier agent's address is left alone.
    bench.live(TTL).await;
    assert!(bench.guard.1.lock().is_empty());
    bench.handle.resign();
    assert_eq!(bench.guard.1.lock().last(), Some(&None));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_pause_is_heard_without_the_loop() {
    let bench = leading().await;
    let (knowing, knowledge) = watch::channel(Knowledge::default());
    tokio::spawn(bench.handle.clone().hear_of_ends_of_pauses(knowledge));
    let say = |pause| {
        let value = serde_json::json!({ "pause": pause });
        let mut view =
            ClusterView { config: Some(ConfigRecord { value, revision: Revision(9) }), ..Default::default() };
        view.settings.pause = pause;
        knowing.send_replace(Knowledge { view: Some(Arc::new(view)), ..Knowledge::default() });
    };
    bench.handle.set_timing(Timing { ttl: TTL, loop_wait: Duration::from_secs(1), pause: true });
    say(true);
    bench.live(Duration::from_secs(1)).await;
    assert_eq!(bench.guard.deadline(), None, "in a pause nobody is fenced");
    say(false);
    bench.live(Duration::from_millis(100)).await;
    assert_eq!(bench.guard.deadline(), bench.handle.session().deadline);
    assert!(bench.guard.deadline().is_some());
}
