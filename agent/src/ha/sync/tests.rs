//! The steps of synchronous mode, and the promise they keep: whoever the key names has every acknowledged commit.

use trunkline_common::cluster::{LeaderKey, Member, SyncState};
use trunkline_common::{LeaseId, Revision, SystemId, TimelineId};

use super::*;
use crate::postgres::PgRole;

pub(super) fn view(standbys: &[&str]) -> ClusterView {
    let mut view = ClusterView::default();
    view.settings.synchronous_mode = SynchronousMode::On;
    for name in ["a", "b", "c-1"] {
        let member = Member { state: "running".to_owned(), ..Member::default() };
        view.members.insert(name.into(), member);
    }
    view.sync = SyncState {
        leader: Some("a".into()),
        standbys: standbys.iter().map(|name| (*name).to_owned()).collect(),
        quorum: 0,
        revision: Revision(9),
    };
    view
}

pub(super) fn sender(name: &str, sync_state: &str, flushed: u64) -> WalSender {
    WalSender {
        usename: "replicator".to_owned(),
        application_name: name.to_owned(),
        client_addr: None,
        state: "streaming".to_owned(),
        sync_state: sync_state.to_owned(),
        sync_priority: i32::from(sync_state == "sync"),
        write_lsn: Some(Lsn(flushed)),
        flush_lsn: Some(Lsn(flushed)),
        replay_lsn: Some(Lsn(flushed)),
    }
}

pub(super) fn primary(names: &str, replication: Vec<WalSender>) -> Running {
    Running {
        role: PgRole::Primary,
        system_id: SystemId(1),
        timeline: Some(TimelineId(1)),
        checkpoint_timeline: None,
        lsn: Lsn(1000),
        receive_lsn: None,
        replay_lsn: None,
        replay_timestamp: None,
        replay_paused: false,
        reads_own_wal: false,
        latest_end_lsn: None,
        replication_state: None,
        upstream: None,
        upstream_slot: None,
        server_version: 150_000,
        postmaster_start_time: String::new(),
        replication,
        synchronous_standby_names: names.to_owned(),
        synchronous_commit: "on".to_owned(),
        waits_for_disk: false,
        pending_restart: BTreeMap::new(),
        slots: BTreeMap::new(),
    }
}

fn next(view: &ClusterView, running: &Running, since: &[(&str, u64)]) -> Option<SyncStep> {
    let since = since.iter().map(|(name, lsn)| ((*name).to_owned(), Lsn(*lsn))).collect();
    step(view, running, &since, &"a".into(), "")
}

fn listed(step: Option<SyncStep>) -> Option<Value> {
    match step {
        Some(SyncStep::Key(write, _)) => write.value.map(|value| value["sync_standby"].clone()),
        other => panic!("not a write of the key: {other:?}"),
    }
}

fn names(step: Option<SyncStep>) -> String {
    match step {
        Some(SyncStep::Names(names, _)) => names,
        other => panic!("not a setting: {other:?}"),
    }
}

#[test]
fn a_standby_becomes_synchronous_in_postgresql_first_and_on_the_key_after_it_caught_up() {
    let streaming = primary("", vec![sender("b", "async", 900)]);
    assert_eq!(names(next(&view(&[]), &streaming, &[])), "b");
    let behind = primary("b", vec![sender("b", "sync", 900)]);
    assert_eq!(next(&view(&[]), &behind, &[("b", 1000)]), None);
    let caught_up = primary("b", vec![sender("b", "sync", 1000)]);
    assert_eq!(listed(next(&view(&[]), &caught_up, &[("b", 1000)])), Some("b".into()));
    assert_eq!(next(&view(&["b"]), &caught_up, &[("b", 1000)]), None);
}

#[test]
fn a_lost_standby_leaves_the_key_before_postgresql_stops_waiting_for_it() {
    let alone = primary("b", vec![sender("c-1", "async", 1000)]);
    assert_eq!(listed(next(&view(&["b"]), &alone, &[("b", 1)])), Some(Value::Null));
    assert_eq!(names(next(&view(&[]), &alone, &[("b", 1)])), "\"c-1\"");
    let nobody = primary("b", vec![]);
    assert_eq!(names(next(&view(&[]), &nobody, &[])), "");
}

#[test]
fn strict_mode_goes_on_waiting() {
    let mut strict = view(&["b"]);
    strict.settings.synchronous_mode_strict = true;
    assert_eq!(next(&strict, &primary("b", vec![]), &[]), None);
    strict.sync.standbys.clear();
    assert_eq!(names(next(&strict, &primary("", vec![]), &[])), STRICT_PLACEHOLDER);
}

#[test]
fn nosync_and_lag_count() {
    let mut choosy = view(&[]);
    choosy.members.get_mut(&"b".into()).unwrap().tags.insert("nosync".to_owned(), true.into());
    let both = primary("", vec![sender("b", "async", 1000), sender("c-1", "async", 990)]);
    assert_eq!(names(next(&choosy, &both, &[])), "\"c-1\"");
    let mut strict_lag = view(&[]);
    strict_lag.settings.maximum_lag_on_syncnode = Some(5);
    assert_eq!(names(next(&strict_lag, &both, &[])), "b");
    let mut two = view(&[]);
    two.settings.synchronous_node_count = 2;
    assert_eq!(names(next(&two, &both, &[])), "2 (b,\"c-1\")");
}

#[test]
fn who_may_never_lead_is_synchronous_only_where_nobody_else_is() {
    let both = primary("", vec![sender("b", "async", 1000), sender("c-1", "async", 990)]);
    let mut never = view(&[]);
    let tags = &mut never.members.get_mut(&"b".into()).unwrap().tags;
    tags.extend([("nofailover".to_owned(), true.into()), ("sync_priority".to_owned(), 5.into())]);
    assert_eq!(names(next(&never, &both, &[])), "\"c-1\"");
    assert_eq!(names(next(&never, &primary("", vec![sender("b", "async", 1000)]), &[])), "b");
    never.settings.synchronous_node_count = 2;
    assert_eq!(names(next(&never, &both, &[])), "2 (b,\"c-1\")");
    never.sync.standbys = vec!["b".to_owned()];
    never.settings.synchronous_node_count = 1;
    let led = primary("b", vec![sender("b", "sync", 1000), sender("c-1", "async", 990)]);
    assert_eq!(listed(next(&never, &led, &[("b", 1)])), Some(Value::Null), "it makes room");
}

#[test]
fn who_is_to_stream_from_a_synchronous_one_is_not_synchronous_itself() {
    let both = primary("", vec![sender("b", "async", 1000), sender("c-1", "async", 990)]);
    let only = |name: &str| primary("", vec![sender(name, "async", 1000)]);
    let mut chain = view(&[]);
    chain.settings.synchronous_node_count = 2;
    let replicates_from = |view: &mut ClusterView, name: &str, from: &str| {
        view.members.get_mut(&name.into()).unwrap().tags.insert("replicatefrom".to_owned(), from.into())
    };
    replicates_from(&mut chain, "c-1", "b");
    assert_eq!(names(next(&chain, &both, &[])), "b", "c-1 still streams from here");
    assert_eq!(names(next(&chain, &only("c-1"), &[])), "\"c-1\"", "b does not stream");
    replicates_from(&mut chain, "c-1", "a");
    assert_eq!(names(next(&chain, &both, &[])), "2 (b,\"c-1\")", "from the leader");
    replicates_from(&mut chain, "c-1", "b");
    replicates_from(&mut chain, "b", "c-1");
    assert_eq!(names(next(&chain, &both, &[])), "2 (b,\"c-1\")", "a circle is followed by nobody");
}

#[test]
fn commits_count_on_whom_the_key_of_the_leader_names() {
    let mut led = view(&["b"]);
    let counts = |view: &ClusterView, name: &str| counts_on(view, &name.into());
    assert!(!counts(&led, "b"), "nobody leads");
    led.leader = Some(LeaderKey { name: "a".into(), lease: LeaseId(1), created: Revision(1), modified: Revision(1) });
    assert!(counts(&led, "b") && !counts(&led, "c-1") && !counts(&led, "a"));
    led.sync.leader = Some("c-1".into());
    assert!(!counts(&led, "b"), "the key is an earlier leader's");
    led.sync.leader = Some("a".into());
    led.settings.synchronous_mode = SynchronousMode::Off;
    assert!(!counts(&led, "b"));
}

#[test]
fn switching_the_mode_off_removes_the_key_and_restores_the_operators_setting() {
    let mut off = view(&["b"]);
    off.settings.synchronous_mode = SynchronousMode::Off;
    let running = primary("b", vec![sender("b", "sync", 1000)]);
    let Some(SyncStep::Key(write, _)) = next(&off, &running, &[]) else { panic!() };
    assert_eq!(write, SyncWrite { value: None, seen: Revision(9), restored: None });
    off.sync = SyncState::default();
    assert_eq!(names(next(&off, &running, &[])), "");
}

fn quorum(leader: &str, votes: u32, standbys: &[&str]) -> ClusterView {
    let mut view = view(standbys);
    view.settings.synchronous_mode = SynchronousMode::Quorum;
    view.sync.leader = Some(leader.into());
    view.sync.quorum = votes;
    view
}

#[test]
fn in_quorum_mode_any_of_them_confirm() {
    let both = |state: &str| vec![sender("b", state, 1000), sender("c-1", state, 1000)];
    assert_eq!(names(next(&quorum("a", 0, &[]), &primary("", both("async")), &[])), "ANY 1 (b,\"c-1\")");
    let asked = primary("ANY 1 (b,\"c-1\")", both("quorum"));
    assert_eq!(next(&quorum("a", 0, &[]), &asked, &[("b", 1001), ("c-1", 1001)]), None, "not caught up yet");
    let Some(SyncStep::Key(write, _)) = next(&quorum("a", 0, &[]), &asked, &[("b", 900), ("c-1", 1001)]) else {
        panic!()
    };
    assert_eq!(write.value, Some(json!({ "leader": "a", "quorum": 1, "sync_standby": "b,c-1" })));
    assert_eq!(next(&quorum("a", 1, &["b", "c-1"]), &asked, &[("b", 900)]), None);
    let priority = primary("b", vec![sender("b", "sync", 1000)]);
    assert_eq!(names(next(&quorum("a", 0, &["b"]), &priority, &[("b", 900)])), "ANY 1 (b)", "the mode was on");
}

#[test]
fn a_leader_by_votes_waits_for_as_many_as_leave_no_majority_without_one() {
    let names = |votes, standbys: &[&str], me: &str| names_on_promotion(&quorum("a", votes, standbys), &me.into(), "");
    assert_eq!(names(0, &["b"], "b"), "ANY 1 (a)");
    assert_eq!(names(1, &["b"], "b"), "", "both had to agree, and PostgreSQL takes no ANY 0");
    assert_eq!(names(1, &["b", "c"], "b"), "ANY 1 (a,c)");
    assert_eq!(names(0, &["b", "c"], "b"), "ANY 2 (a,c)");
    assert_eq!(names(1, &["b", "c"], "d"), "ANY 2 (a,b,c)", "it was not among the voters");
    let written = |votes, standbys: &[&str], me: &str| {
        on_promotion(&quorum("a", votes, standbys), &me.into()).and_then(|write| write.value).unwrap_or_default()
    };
    assert_eq!(written(1, &["b", "c"], "b"), json!({ "leader": "b", "quorum": 1, "sync_standby": "a,c" }));
    assert_eq!(written(1, &["b", "c"], "d"), json!({ "leader": "d", "quorum": 1, "sync_standby": "a,b,c" }));
    assert_eq!(written(1, &["b", "c"], "a"), json!({ "leader": "a", "quorum": 1, "sync_standby": "b,c" }));
    let in_place = |view: ClusterView| names_in_key(&view, &"a".into(), "");
    assert_eq!(in_place(quorum("a", 1, &["b", "c"])), "ANY 1 (b,c)");
    assert_eq!(in_place(quorum("a", 1, &["b"])), "", "b alone could not lead");
    assert_eq!(in_place(quorum("b", 1, &["a", "c"])), "ANY 1 (b,c)", "promoted, and not on the key yet");
    let mut strict = quorum("a", 0, &[]);
    strict.settings.synchronous_mode_strict = true;
    assert_eq!(in_place(strict), format!("ANY 1 ({STRICT_PLACEHOLDER})"));
}

#[test]
fn whoever_leads_after_quorum_mode_promises_nothing_of_those_who_had_votes() {
    let mut on = quorum("a", 1, &["b", "c-1"]);
    on.settings.synchronous_mode = SynchronousMode::On;
    on.settings.synchronous_mode_strict = true;
    for me in ["a", "b"] {
        let written = on_promotion(&on, &me.into()).and_then(|write| write.value);
        assert_eq!(written, Some(json!({ "leader": me, "quorum": 0, "sync_standby": null })));
    }
    assert_eq!(names_on_promotion(&on, &"b".into(), ""), "2 (a,\"c-1\")", "commits wait for them nevertheless");
}

#[test]
fn nothing_older_is_carried_out_after_a_start() {
    let written = |view: &ClusterView| on_promotion(view, &"a".into()).map(|write| (write.seen, write.value.unwrap()));
    for (mut view, quorum) in [(view(&[]), 0), (quorum("a", 1, &["b", "c-1"]), 1)] {
        let listed = if quorum == 0 { json!(null) } else { json!("b,c-1") };
        let key = json!({ "leader": "a", "quorum": quorum, "sync_standby": listed });
        let once_more = Some((Revision(9), key.clone()));
        assert_eq!(written(&view), once_more, "an older write may be on its way");
        let leader = |revision| LeaderKey {
            name: "a".into(),
            lease: LeaseId(1),
            created: Revision(revision),
            modified: Revision(revision),
        };
        view.leader = Some(leader(9));
        assert_eq!(written(&view), None, "written with the leader key");
        view.leader = Some(leader(10));
        assert_eq!(written(&view), once_more, "written by whoever led before");
        assert_eq!(settle(&view), Some(SyncWrite { value: Some(key), seen: Revision(9), restored: None }));
        view.settings.synchronous_mode = SynchronousMode::Off;
        assert_eq!(settle(&view), None);
    }
    let mut new = view(&[]);
    new.sync = SyncState::default();
    assert_eq!(settle(&new), None, "nothing is promised");
}

#[test]
fn after_quorum_mode_nobody_is_taken_for_having_everything() {
    let mut on = view(&["b", "c-1"]);
    on.sync.quorum = 1;
    let any = primary("ANY 1 (b,\"c-1\")", vec![sender("b", "quorum", 1000), sender("c-1", "quorum", 1000)]);
    assert_eq!(listed(next(&on, &any, &[("b", 1), ("c-1", 1)])), Some(Value::Null));
    assert_eq!(names(next(&view(&[]), &any, &[("b", 1), ("c-1", 1)])), "b");
}

#[test]
fn who_is_made_anew_is_on_the_key_no_longer() {
    let mut strict = view(&["b", "c-1"]);
    strict.settings.synchronous_mode_strict = true;
    let nobody = primary("2 (b,\"c-1\")", vec![]);
    assert_eq!(next(&strict, &nobody, &[]), None, "they are down, and have every commit");
    strict.members.get_mut(&"b".into()).unwrap().state = BEING_COPIED.to_owned();
    assert_eq!(listed(next(&strict, &nobody, &[])), Some("c-1".into()));
    strict.sync.standbys = vec!["b".to_owned()];
    assert_eq!(listed(next(&strict, &nobody, &[])), Some(Value::Null));
    strict.sync.standbys.clear();
    assert_eq!(names(next(&strict, &nobody, &[])), STRICT_PLACEHOLDER, "commits wait until it has caught up");
}

#[test]
fn a_place_is_forgone_once_the_key_and_the_member_key_say_so() {
    let forgone = |standbys: &[&str], state: &str| {
        let mut view = view(standbys);
        view.members.get_mut(&"b".into()).unwrap().state = state.to_owned();
        is_forgone(&view, &"b".into())
    };
    assert!(forgone(&["c-1"], BEING_COPIED));
    assert!(!forgone(&["b"], BEING_COPIED), "it is listed");
    assert!(!forgone(&["c-1"], "running"), "it may be listed by a leader that knows no better");
    let mut off = view(&["b"]);
    (off.settings.synchronous_mode, off.sync.revision) = (SynchronousMode::Off, Revision(7));
    let again = again(&off).unwrap();
    assert_eq!(
        (again.seen, again.value),
        (Revision(7), Some(json!({ "leader": "a", "quorum": 0, "sync_standby": "b" })))
    );
    assert_eq!(settle(&off), None, "commits do not wait by it");
    off.sync.revision = Revision(0);
    assert_eq!(super::again(&off), None, "there is none");
}

#[test]
fn who_is_made_anew_has_no_vote_any_longer() {
    let next_key = |votes, standbys: &[&str]| {
        let mut strict = quorum("a", votes, standbys);
        strict.settings.synchronous_mode_strict = true;
        strict.members.get_mut(&"b".into()).unwrap().state = BEING_COPIED.to_owned();
        match next(&strict, &primary("ANY 1 (b,\"c-1\")", vec![]), &[]) {
            Some(SyncStep::Key(write, _)) => write.value.unwrap_or_default(),
            other => panic!("{other:?}"),
        }
    };
    let key = |quorum, standbys: Value| json!({ "leader": "a", "quorum": quorum, "sync_standby": standbys });
    assert_eq!(next_key(0, &["b"]), key(0, Value::Null));
    assert_eq!(next_key(0, &["b", "c-1"]), key(0, "c-1".into()), "each of them has every commit");
    assert_eq!(next_key(1, &["b", "c-1"]), key(0, Value::Null), "some commits b alone had");
    assert_eq!(next_key(1, &["b", "c-1", "d"]), key(1, "c-1,d".into()));
}

#[test]
fn strict_mode_says_when_nobody_is_there() {
    let mut strict = view(&["b"]);
    strict.settings.synchronous_mode_strict = true;
    let waits = |view: &ClusterView, running: &Running| waits_in_vain(view, running, &"a".into());
    assert!(waits(&strict, &primary("b", vec![])));
    assert!(!waits(&strict, &primary("b", vec![sender("b", "sync", 1000)])));
    assert!(!waits(&view(&["b"]), &primary("b", vec![])));
}

#[test]
fn names_are_quoted_as_postgresql_wants_them() {
    for (name, text) in
        [("node_1", "node_1"), ("node-1", "\"node-1\""), ("ANY", "\"ANY\""), ("1a", "\"1a\""), ("a\"b", "\"a\"\"b\"")]
    {
        assert_eq!(quoted(name), text);
    }
    assert!(mentions("2 (b,\"c-1\")", "C-1") && !mentions("2 (b,\"c-1\")", "c"));
    assert!(!mentions("2 (\"1\",\"3\")", "2") && !mentions("ANY 1 (b)", "any"), "no names");
    assert!(mentions("\"node 1\"", "node 1") && mentions("2 (\"a,b\",\"c(1)\")", "a,b"), "a name may be anything");
}
