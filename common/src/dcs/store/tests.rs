use super::*;
use crate::Lsn;
use crate::TokioClock;
use crate::cluster::{HistoryLine, Initialize, SyncState};
use crate::dcs::memory::MemoryDcs;
use serde_json::json;

type Store = ClusterStore<MemoryDcs<TokioClock>>;

fn store() -> Store {
    ClusterStore::new(MemoryDcs::new(TokioClock::default()), Paths::new("service", "demo"))
}

async fn lease(store: &Store) -> LeaseId {
    store.grant(Duration::from_secs(5)).await.unwrap().id
}

fn name(name: &str) -> MemberName {
    name.into()
}

async fn leader(store: &Store) -> Option<(String, LeaseId)> {
    store.read().await.unwrap().leader.map(|leader| (leader.name.0, leader.lease))
}

fn at(sync: Revision) -> Seen {
    Seen { sync, ..Seen::default() }
}

#[tokio::test(start_paused = true)]
async fn a_router_says_what_it_follows_and_hears_who_leads() {
    crate::dcs::contract::routers(&store()).await;
}

#[tokio::test(start_paused = true)]
async fn a_move_of_the_leader_key_that_comes_late_moves_nothing() {
    let store = store();
    crate::dcs::contract::late_moves(store.dcs().clone(), store.paths().clone()).await;
}

#[tokio::test(start_paused = true)]
async fn one_acquires_and_a_stale_sync_list_elects_nobody() {
    let store = store();
    let (a, b) = (lease(&store).await, lease(&store).await);
    let written = codec::encode_sync(Some(&name("a")), 0, &["b".into()]);
    let first = store.put_sync(SyncWrite { value: Some(written), seen: Revision(0), restored: None }).await.unwrap();
    let Outcome::Done(seen) = first else { panic!("{first:?}") };
    assert_eq!(store.acquire_leader(&name("c"), b, Seen::default(), Alongside::default()).await, Ok(Outcome::Conflict));
    let write = SyncWrite { value: Some(codec::encode_sync(Some(&name("b")), 0, &[])), seen, restored: None };
    assert!(
        store
            .acquire_leader(&name("b"), b, at(seen), Alongside { sync: Some(write), ..Alongside::default() })
            .await
            .unwrap()
            .is_done()
    );
    let view = store.read().await.unwrap();
    assert_eq!((view.sync.leader, view.sync.standbys), (Some(name("b")), vec![]));
    assert_eq!(view.leader.unwrap().modified, view.sync.revision, "in one step");
    assert_eq!(
        store.acquire_leader(&name("a"), a, at(view.sync.revision), Alongside::default()).await,
        Ok(Outcome::Conflict)
    );
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_does_not_lose_what_was_won() {
    let store = store();
    let a = lease(&store).await;
    store.dcs().set_faults(|faults| faults.lost_answers = 1);
    assert!(store.begin_bootstrap(a).await.is_err());
    assert!(store.begin_bootstrap(a).await.unwrap().is_done());
    store.cancel_bootstrap(a).await.unwrap();
    store.dcs().set_faults(|faults| faults.lost_answers = 1);
    assert!(store.acquire_leader(&name("a"), a, Seen::default(), Alongside::default()).await.is_err());
    assert!(store.acquire_leader(&name("a"), a, Seen::default(), Alongside::default()).await.unwrap().is_done());
}

#[tokio::test(start_paused = true)]
async fn the_leader_key_follows_its_name_to_a_new_lease() {
    let store = store();
    let (old, new) = (lease(&store).await, lease(&store).await);
    store.acquire_leader(&name("a"), old, Seen::default(), Alongside::default()).await.unwrap();
    let created = store.read().await.unwrap().leader.unwrap().created;
    assert!(store.confirm_leader(&name("a"), old).await.unwrap().is_done());
    assert_eq!(store.read().await.unwrap().leader.unwrap().modified, created, "confirming writes nothing");
    assert!(store.confirm_leader(&name("a"), new).await.unwrap().is_done());
    assert_eq!(leader(&store).await, Some(("a".to_owned(), new)));
    assert_eq!(store.read().await.unwrap().leader.unwrap().created, created);
    assert_eq!(store.confirm_leader(&name("b"), old).await, Ok(Outcome::Conflict));
    assert!(store.names_leader(&name("a")).await.unwrap().is_done());
    assert_eq!(leader(&store).await, Some(("a".to_owned(), new)), "it stays where it is");
    assert_eq!(store.names_leader(&name("b")).await, Ok(Outcome::Conflict));
    store.dcs().revoke(new).await.unwrap();
    assert_eq!(store.confirm_leader(&name("a"), old).await, Ok(Outcome::Conflict), "gone is gone");
    assert_eq!(store.names_leader(&name("a")).await, Ok(Outcome::Conflict));
}

#[tokio::test(start_paused = true)]
async fn settings_and_requests_of_yesterday_elect_nobody() {
    let store = store();
    let a = lease(&store).await;
    let before = Seen::of(&store.read().await.unwrap());
    store.put_config(&json!({"pause": true}), None).await.unwrap();
    assert_eq!(store.acquire_leader(&name("a"), a, before, Alongside::default()).await, Ok(Outcome::Conflict));
    let before = Seen::of(&store.read().await.unwrap());
    store.put_failover(&json!({"member": "b"}), None).await.unwrap();
    assert_eq!(store.acquire_leader(&name("a"), a, before, Alongside::default()).await, Ok(Outcome::Conflict));
    let now = Seen::of(&store.read().await.unwrap());
    assert!(store.acquire_leader(&name("a"), a, now, Alongside::default()).await.unwrap().is_done());
}

#[tokio::test(start_paused = true)]
async fn a_restore_is_told_with_the_list_that_is_newer_than_it() {
    let store = store();
    let sync = SyncState { leader: Some(name("a")), standbys: vec!["c".into()], quorum: 1, revision: Revision(6) };
    let record = RestoreRecord { count: 2, since: Revision(7), sync: Some(sync) };
    let value = Some(codec::encode_sync(Some(&name("a")), 0, &["b".into()]));
    let write = |seen| SyncWrite { value: value.clone(), seen, restored: Some(record.clone()) };
    assert_eq!(store.put_sync(write(Revision(5))).await, Ok(Outcome::Conflict));
    let before = store.read().await.unwrap();
    assert_eq!((before.sync.revision, before.restored), (Revision(0), RestoreRecord::default()), "neither of them");
    assert!(store.put_sync(write(Revision(0))).await.unwrap().is_done());
    let after = store.read().await.unwrap();
    assert_eq!((after.sync.standbys, after.restored), (vec!["b".to_owned()], record));
    assert_eq!(after.restored_revision, after.sync.revision, "in one step");
}

#[tokio::test(start_paused = true)]
async fn what_sync_said_is_given_back_with_the_key() {
    let store = store();
    let a = lease(&store).await;
    let list = |leader: &str| json!({ "leader": leader, "sync_standby": null });
    let write = |leader, seen| SyncWrite { value: Some(list(leader)), seen, restored: None };
    let before = store.put_sync(write("b", Revision(0))).await.unwrap();
    let Outcome::Done(before) = before else { panic!() };
    let seen = Seen { sync: before, ..Seen::default() };
    let also = Alongside { sync: Some(write("a", before)), ..Alongside::default() };
    let Outcome::Done(taken) = store.acquire_leader(&name("a"), a, seen, also).await.unwrap() else { panic!() };
    let back = |seen| Some(write("b", seen));
    let refused = store.release_leader(&name("a"), a, None, back(before)).await;
    assert_eq!(refused, Ok(Outcome::Conflict), "written since");
    assert!(store.release_leader(&name("a"), a, None, back(taken)).await.unwrap().is_done());
    let view = store.read().await.unwrap();
    assert_eq!((view.leader, view.sync.leader), (None, Some(name("b"))));
}

#[tokio::test(start_paused = true)]
async fn every_leader_claims_a_number_of_its_own() {
    let store = store();
    let (a, b) = (lease(&store).await, lease(&store).await);
    let claims = |number| Alongside { claims: Some(TimelineId(number)), ..Alongside::default() };
    let nothing = Seen::default();
    assert!(store.acquire_leader(&name("a"), a, nothing, claims(2)).await.unwrap().is_done());
    let view = store.read().await.unwrap();
    assert_eq!(view.claimed, TimelineId(2));
    let (seen, again) = (view.claimed_revision, TimelineId(3));
    assert_eq!(store.put_claim(&name("b"), b, again, seen).await, Ok(Outcome::Conflict), "not the leader");
    assert_eq!(store.put_claim(&name("a"), b, again, seen).await, Ok(Outcome::Conflict), "by another lease");
    assert!(store.put_claim(&name("a"), a, again, seen).await.unwrap().is_done());
    assert_eq!(store.put_claim(&name("a"), a, again, seen).await, Ok(Outcome::Conflict), "claimed meanwhile");
    store.release_leader(&name("a"), a, None, None).await.unwrap();
    assert_eq!(store.acquire_leader(&name("b"), b, nothing, claims(2)).await, Ok(Outcome::Conflict), "taken");
    let now = Seen::of(&store.read().await.unwrap());
    assert!(store.acquire_leader(&name("b"), b, now, claims(4)).await.unwrap().is_done());
    assert_eq!(store.read().await.unwrap().claimed, TimelineId(4), "it stays when a leader goes");
}

#[tokio::test(start_paused = true)]
async fn forgotten_timelines_are_told_once() {
    let store = store();
    let line = HistoryLine {
        timeline: TimelineId(1),
        switchpoint: Lsn(2),
        reason: String::new(),
        promoted_at: None,
        new_leader: None,
    };
    let mut before = ClusterView { has_history: true, history: vec![line], ..ClusterView::default() };
    (before.claimed, before.status.optime) = (TimelineId(3), Lsn(9));
    let backup = store.read().await.unwrap();
    assert!(store.put_forgotten_timelines(&before, &backup).await.unwrap().is_done());
    let told = store.read().await.unwrap();
    assert_eq!((told.timeline(), told.claimed, told.status.optime), (before.timeline(), TimelineId(3), Lsn(9)));
    assert_eq!(store.put_forgotten_timelines(&before, &backup).await, Ok(Outcome::Conflict), "told meanwhile");
    let a = lease(&store).await;
    let claims = Alongside { claims: Some(TimelineId(4)), ..Alongside::default() };
    assert!(store.acquire_leader(&name("a"), a, Seen::of(&told), claims).await.unwrap().is_done());
    assert_eq!(store.put_forgotten_timelines(&before, &told).await, Ok(Outcome::Conflict), "a newer one is claimed");
}

#[tokio::test(start_paused = true)]
async fn only_the_holder_releases_and_reports() {
    let store = store();
    let (a, other) = (lease(&store).await, lease(&store).await);
    assert_eq!(store.put_initialize(&name("a"), SystemId(1_000_000_001)).await, Ok(Outcome::Conflict));
    store.acquire_leader(&name("a"), a, Seen::default(), Alongside::default()).await.unwrap();
    assert!(store.put_initialize(&name("a"), SystemId(1_000_000_001)).await.unwrap().is_done());
    let status = json!({"optime": 7});
    assert_eq!(store.put_status(&name("b"), &status).await, Ok(Outcome::Conflict));
    let (none, line) = (Revision(0), json!([[1, 2, "why"]]));
    assert_eq!(store.put_history(&name("b"), &json!([]), none, None).await, Ok(Outcome::Conflict));
    assert!(store.put_history(&name("a"), &line, none, Some(&json!({ "optime": 3 }))).await.unwrap().is_done());
    assert_eq!(store.put_history(&name("a"), &json!([]), none, None).await, Ok(Outcome::Conflict), "written meanwhile");
    let seen = store.read().await.unwrap().history_revision;
    assert!(store.put_history(&name("a"), &line, seen, None).await.unwrap().is_done());
    assert_eq!(store.release_leader(&name("b"), a, Some(status.clone()), None).await, Ok(Outcome::Conflict));
    assert_eq!(store.release_leader(&name("a"), other, Some(status.clone()), None).await, Ok(Outcome::Conflict));
    assert_eq!(store.read().await.unwrap().status.optime.0, 3);
    assert!(store.release_leader(&name("a"), a, Some(status), None).await.unwrap().is_done());
    let view = store.read().await.unwrap();
    assert_eq!((view.leader.as_ref(), view.status.optime.0), (None, 7));
    let acquired = store.acquire_leader(&name("b"), other, Seen::default(), Alongside::default()).await;
    assert_eq!(acquired, Ok(Outcome::Conflict), "by an older position of the leader before");
    let acquired = store.acquire_leader(&name("b"), other, Seen::of(&view), Alongside::default()).await;
    assert!(acquired.unwrap().is_done());
}

#[tokio::test(start_paused = true)]
async fn the_failsafe_list_is_the_leaders_and_a_stale_one_elects_nobody() {
    let store = store();
    let (a, b) = (lease(&store).await, lease(&store).await);
    let members = BTreeMap::from([(name("a"), "http://a/patroni".to_owned())]);
    assert_eq!(store.put_failsafe(&name("a"), a, &members, Revision(0)).await, Ok(Outcome::Conflict), "no leader");
    store.acquire_leader(&name("a"), a, Seen::default(), Alongside::default()).await.unwrap();
    assert_eq!(store.put_failsafe(&name("a"), b, &members, Revision(0)).await, Ok(Outcome::Conflict), "not by it");
    assert!(store.put_failsafe(&name("a"), a, &members, Revision(0)).await.unwrap().is_done());
    assert_eq!(store.put_failsafe(&name("a"), a, &members, Revision(0)).await, Ok(Outcome::Conflict), "changed");
    let view = store.read().await.unwrap();
    assert_eq!(view.failsafe, Some(members));
    store.release_leader(&name("a"), a, None, None).await.unwrap();
    assert_eq!(store.acquire_leader(&name("b"), b, Seen::default(), Alongside::default()).await, Ok(Outcome::Conflict));
    assert!(store.acquire_leader(&name("b"), b, Seen::of(&view), Alongside::default()).await.unwrap().is_done());
}

#[tokio::test(start_paused = true)]
async fn there_is_one_cluster_the_new_one_or_the_old_one() {
    let store = store();
    let (making, leading) = (lease(&store).await, lease(&store).await);
    let before = store.read().await.unwrap();
    let also = Alongside { initialize: Some(SystemId(1_000_000_001)), ..Alongside::default() };
    assert!(store.begin_bootstrap(making).await.unwrap().is_done());
    let beside = store.acquire_leader(&name("b"), leading, Seen::of(&before), also.clone()).await;
    assert_eq!(beside, Ok(Outcome::Conflict), "decided before the other one began");
    store.cancel_bootstrap(making).await.unwrap();
    assert!(store.acquire_leader(&name("b"), leading, Seen::of(&before), also).await.unwrap().is_done());
    assert_eq!(store.begin_bootstrap(making).await, Ok(Outcome::Conflict));
    let view = store.read().await.unwrap();
    assert_eq!(view.initialize, crate::cluster::Initialize::Done(SystemId(1_000_000_001)));
    assert_eq!(view.initialize_revision, view.leader.unwrap().created, "in one step");
}

#[tokio::test(start_paused = true)]
async fn a_bootstrap_ends_with_its_agent() {
    let store = store();
    let (frozen, next) = (lease(&store).await, store.grant(Duration::from_secs(60)).await.unwrap().id);
    assert!(store.begin_bootstrap(frozen).await.unwrap().is_done());
    assert_eq!(store.begin_bootstrap(next).await, Ok(Outcome::Conflict));
    tokio::time::advance(Duration::from_secs(6)).await;
    assert!(store.begin_bootstrap(next).await.unwrap().is_done());
    // The first one wakes up.
    let late = store.finish_bootstrap(&name("a"), frozen, SystemId(1_000_000_001), true).await;
    assert!(!matches!(late, Ok(Outcome::Done(_))), "{late:?}");
    assert_eq!(store.cancel_bootstrap(frozen).await, Ok(Outcome::Conflict));
    store.dcs().set_faults(|faults| faults.lost_answers = 2);
    assert!(store.finish_bootstrap(&name("b"), next, SystemId(1_000_000_002), true).await.unwrap().is_done());
    let view = store.read().await.unwrap();
    assert_eq!(view.initialize, Initialize::Done(SystemId(1_000_000_002)));
    assert_eq!(leader(&store).await, Some(("b".to_owned(), next)));
    store.dcs().revoke(next).await.unwrap();
    assert_eq!(store.read().await.unwrap().initialize, Initialize::Done(SystemId(1_000_000_002)), "stays");
}

#[tokio::test(start_paused = true)]
async fn writes_name_the_revision_they_were_decided_on() {
    let store = store();
    let value = json!({"ttl": 30});
    let Outcome::Done(first) = store.put_config(&value, Some(Revision(0))).await.unwrap() else { panic!("absent") };
    assert_eq!(store.put_config(&value, Some(Revision(0))).await, Ok(Outcome::Conflict));
    assert!(store.put_config(&value, Some(first)).await.unwrap().is_done());
    assert_eq!(store.put_config(&value, Some(first)).await, Ok(Outcome::Conflict));
    let other = name("b");
    assert_eq!(
        store.put_missing_config(&other, &value).await,
        Ok(Outcome::Conflict),
        "it is there, and b does not lead"
    );
    let gone = SyncWrite { value: None, seen: Revision(0), restored: None };
    assert!(store.put_sync(gone).await.unwrap().is_done(), "deleting what is not there");
    store.delete_cluster().await.unwrap();
    assert_eq!(store.read().await.unwrap().config, None);
}
