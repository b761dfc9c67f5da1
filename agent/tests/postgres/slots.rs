//! Whom commits wait for, and what is kept for whom.

use std::time::Duration;

use trunkline_agent::postgres::{Postgres as _, SlotKind, SlotPlan, StartAs, StopMode, Upstream, WantedSlot};
use trunkline_common::{Clock as _, Lsn, SystemClock};
use trunkline_config::PostgresConfig;

use crate::nodes::{LIMIT, Place, as_postgres};

#[test]
fn synchronous_standby_names_are_in_force_when_set_returns() {
    as_postgres("slots::synchronous_standby_names_are_in_force_when_set_returns", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        a.sql("CREATE TABLE t (i int)").await.expect("table");
        for round in 0..5 {
            let begun = SystemClock.now();
            a.pg.set_synchronous_standby_names("nobody".into()).await.expect("set");
            println!("in force: {:?}", SystemClock.now().since(begun));
            let write = a.sql("INSERT INTO t VALUES (1)");
            let early = tokio::time::timeout(Duration::from_millis(200), write).await;
            assert!(early.is_err(), "round {round}: a commit did not wait: {early:?}");
            a.pg.set_synchronous_standby_names(String::new()).await.expect("unset");
            tokio::time::timeout(LIMIT, a.sql("INSERT INTO t VALUES (2)")).await.expect("no wait").expect("write");
        }

        // Set on a standby, it is what the promoted server begins with.
        let b = place.standby("b", &a).await;
        b.pg.set_synchronous_standby_names("ANY 1 (c)".into()).await.expect("set on a standby");
        b.pg.promote(LIMIT, Vec::new()).await.expect("promote");
        assert_eq!(b.running().await.synchronous_standby_names, "ANY 1 (c)");
        let write = b.sql("INSERT INTO t VALUES (3)");
        assert!(tokio::time::timeout(Duration::from_millis(200), write).await.is_err(), "a commit did not wait");
    });
}

#[test]
fn slots_become_what_is_wanted() {
    as_postgres("slots::slots_become_what_is_wanted", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        a.sql("SELECT pg_create_physical_replication_slot('old', true)").await.expect("slot");
        let wanted = |names: &[(&str, Option<Lsn>)]| {
            let slot = |lsn: Option<Lsn>| WantedSlot { kind: SlotKind::Physical, position: lsn, in_use: None };
            let wanted = names.iter().map(|(name, lsn)| ((*name).to_owned(), slot(*lsn))).collect();
            SlotPlan { wanted, may_drop: true, ..SlotPlan::default() }
        };
        a.pg.set_slots(wanted(&[("b", None), ("c", None)])).await.expect("slots");
        let names: Vec<String> = a.running().await.slots.into_keys().collect();
        assert_eq!(names, ["b", "c"]);

        let b = place.node("b");
        b.pg.clone_from(a.upstream()).await.expect("clone");
        let upstream = Upstream { slot: Some("b".into()), ..a.upstream() };
        b.pg.start(StartAs::Standby(Some(upstream)), LIMIT).await.expect("start");
        a.until("streams", |running| running.replication.iter().any(|s| s.state == "streaming")).await;
        // In use: stays, without being an error.
        a.pg.set_slots(wanted(&[("c", None)])).await.expect("slots");
        assert_eq!(a.running().await.slots.len(), 2);

        b.pg.set_slots(wanted(&[("c", None)])).await.expect("slots on a standby");
        let before = b.running().await.slots["c"];
        a.sql("CREATE TABLE t AS SELECT generate_series(1, 1000); SELECT pg_switch_wal()").await.expect("write");
        let lsn = a.running().await.lsn;
        b.until("replayed", |running| running.replay_lsn >= Some(lsn)).await;
        b.pg.set_slots(wanted(&[("c", Some(lsn))])).await.expect("advance");
        let after = b.running().await.slots["c"];
        assert!(after > before && after <= lsn, "{before} {after} {lsn}");
    });
}

/// A slot is made where the last checkpoint began. On a standby that may be behind where its member is, with no more WAL to come.
#[test]
fn a_slot_that_is_made_anew_is_moved_in_the_next_turn() {
    as_postgres("slots::a_slot_that_is_made_anew_is_moved_in_the_next_turn", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let b = place.standby("b", &a).await;
        a.sql("CREATE TABLE t AS SELECT generate_series(1, 1000)").await.expect("write");
        let lsn = a.running().await.lsn;
        b.until("replayed", |running| running.replay_lsn >= Some(lsn)).await;

        let slot = WantedSlot { kind: SlotKind::Physical, position: Some(lsn), in_use: None };
        let plan = SlotPlan { wanted: [("c".to_owned(), slot)].into(), may_drop: true, ..SlotPlan::default() };
        assert!(b.pg.set_slots(plan.clone()).await.expect("made").again, "nobody would look again");
        assert!(b.running().await.slots["c"] < lsn, "it is there at once: nothing was tested");
        assert!(!b.pg.set_slots(plan).await.expect("moved").again, "it is looked at again and again");
        assert_eq!(b.running().await.slots["c"], lsn);
    });
}

#[test]
fn a_logical_slot_is_made_copied_to_a_standby_and_moved_along_there() {
    as_postgres("slots::a_logical_slot_is_made_copied_to_a_standby_and_moved_along_there", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let mut config = a.pg.config();
        config.protected.insert("wal_level".into(), "logical".into());
        a.pg.configure(config.clone()).await.expect("configure");
        a.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        a.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        let b = place.standby("b", &a).await;
        let config = PostgresConfig { protected: config.protected, ..b.pg.config() };
        b.pg.configure(config).await.expect("configure");
        b.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        b.pg.start(StartAs::Standby(Some(a.upstream())), LIMIT).await.expect("start");

        let kind = SlotKind::Logical { database: "postgres".into(), plugin: "pgoutput".into() };
        let plan = |position| {
            let slot = WantedSlot { kind: kind.clone(), position, in_use: None };
            SlotPlan { wanted: [("l".to_owned(), slot)].into(), may_drop: true, feedback: true, ..SlotPlan::default() }
        };
        assert!(a.pg.set_slots(plan(None)).await.expect("made beside").again);
        let until = SystemClock.now() + LIMIT;
        while a.pg.set_slots(plan(None)).await.expect("being made").again {
            assert!(SystemClock.now() < until, "the slot is not there");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Its position moves on while it is being made.
        let known = a.running().await.slots["l"];

        let done = b.pg.set_slots(plan(Some(known))).await.expect("nothing to do by itself");
        assert_eq!(done.missing.into_iter().collect::<Vec<_>>(), ["l"]);
        assert_eq!(b.pg.copy_slots(plan(Some(known)).wanted, a.upstream()).await, Ok(vec!["l".to_owned()]));
        b.pg.start(StartAs::Standby(Some(a.upstream())), LIMIT).await.expect("start");
        // The server may have gone on making it when it showed already.
        let known = a.running().await.slots["l"];
        assert_eq!(b.running().await.slots["l"], known);

        a.sql("CREATE TABLE t (n int)").await.expect("something to decode");
        let consume = "SELECT pg_logical_slot_get_binary_changes('l', NULL, NULL, 'proto_version', '1', \
                       'publication_names', 'none')";
        a.sql(consume).await.expect("consumed");
        let moved = a.until("moved", |running| running.slots["l"] > known).await.slots["l"];
        b.until("replayed", |running| running.replay_lsn >= Some(moved)).await;
        assert!(b.pg.set_slots(plan(Some(moved))).await.expect("moved beside").again);
        b.until("moved", |running| running.slots["l"] == moved).await;
    });
}
