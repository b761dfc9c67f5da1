//! Promotions that begin timelines, and servers whose histories have parted.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use trunkline_agent::postgres::{Divergence, PgError, Postgres as _, Running, StartAs, StopMode, Upstream};
use trunkline_common::{Clock as _, SystemClock, TimelineId};
use trunkline_config::PostgresConfig;

use crate::nodes::{LIMIT, Place, as_postgres};

/// Two promotions from the same timeline have the same number: neither history files nor pg_rewind see a difference.
#[test]
fn a_timeline_that_was_begun_twice_is_noticed() {
    as_postgres("timelines::a_timeline_that_was_begun_twice_is_noticed", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let (b, c, d) = (place.standby("b", &a).await, place.standby("c", &a).await, place.standby("d", &a).await);
        for node in [&b, &c, &d] {
            assert_eq!(node.pg.promote(LIMIT, Vec::new()).await, Ok(TimelineId(2)));
        }
        c.pg.checkpoint(LIMIT).await.expect("checkpoint");
        c.pg.fence(Duration::from_secs(5)).await.expect("fence");
        let verdict = c.pg.diverged(b.upstream()).await;
        assert!(matches!(verdict, Divergence::Twice(_)), "{verdict:?}");
        // Also where it has come up as a standby of nobody, to be compared with the others.
        c.pg.start(StartAs::Standby(None), LIMIT).await.expect("start");
        c.until("knows its timeline", |running| running.timeline == Some(TimelineId(2))).await;
        let verdict = c.pg.diverged(b.upstream()).await;
        assert!(matches!(verdict, Divergence::Twice(_)), "{verdict:?}");

        // It may have had no checkpoint on its new timeline: then pg_rewind is asked, which recovers it and leaves it at that.
        d.pg.fence(Duration::from_secs(5)).await.expect("fence");
        if matches!(d.pg.diverged(b.upstream()).await, Divergence::Rewind(_)) {
            d.pg.rewind(b.upstream()).await.expect("nothing to do");
        }
        let verdict = d.pg.diverged(b.upstream()).await;
        assert!(matches!(verdict, Divergence::Twice(_)), "{verdict:?}");

        // What was copied while its primary was down is the same.
        b.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        let e = place.node("e");
        let (from, to) = (b.pg.config().data_dir, e.pg.config().data_dir);
        fs::create_dir_all(to.parent().expect("a parent")).expect("directory");
        assert!(std::process::Command::new("cp").arg("-a").args([&from, &to]).status().expect("cp").success());
        b.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        b.sql("CREATE TABLE later (i int)").await.expect("writes");
        assert_eq!(e.pg.diverged(b.upstream()).await, Divergence::None);
        e.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect("start");
        b.until("e streams", |running| running.replication.iter().any(|s| s.application_name == "e")).await;
        e.until("knows its timeline", |running| running.timeline == Some(TimelineId(2))).await;
        assert_eq!(e.pg.diverged(b.upstream()).await, Divergence::None);
    });
}

/// A leader that promised itself a timeline and is gone has perhaps begun it.
#[test]
fn a_number_that_may_be_taken_is_left_out() {
    as_postgres("timelines::a_number_that_may_be_taken_is_left_out", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let (b, c, d) = (place.standby("b", &a).await, place.standby("c", &a).await, place.standby("d", &a).await);
        a.sql("CREATE TABLE t (i int)").await.expect("table");
        let lsn = a.running().await.lsn;
        for node in [&b, &c, &d] {
            node.until("has the table", |running| running.replay_lsn >= Some(lsn)).await;
        }
        a.pg.fence(Duration::from_secs(5)).await.expect("fence");
        // Both at the same position: as alike as two promotions can be.
        assert_eq!(c.pg.promote(LIMIT, Vec::new()).await, Ok(TimelineId(2)));
        c.sql("INSERT INTO t VALUES (2)").await.expect("insert");
        c.sql("SELECT pg_create_physical_replication_slot('s', true)").await.expect("slot");
        c.pg.fence(Duration::from_secs(5)).await.expect("fence");
        assert_eq!(b.pg.promote(LIMIT, vec![TimelineId(2), TimelineId(3)]).await, Ok(TimelineId(4)));
        b.sql("INSERT INTO t VALUES (4)").await.expect("insert");
        b.pg.checkpoint(LIMIT).await.expect("checkpoint");
        let (history, _) = b.pg.history(TimelineId(4)).await.expect("history");
        assert_eq!(history.0.iter().map(|switch| switch.timeline).collect::<Vec<_>>(), [TimelineId(1)], "and no other");
        let of_the_archive = |number: u32| b.dir.join(format!("pg_wal/archive_status/{number:08X}.history.ready"));
        assert!([2, 3].iter().all(|number| of_the_archive(*number).exists()), "it is looked through number by number");

        // One on the old timeline goes over to the new one, past the numbers in between.
        d.pg.follow(Some(b.upstream())).await.expect("follow");
        let lsn = b.running().await.lsn;
        let seen = d.until("has the insert", |running| running.replay_lsn >= Some(lsn)).await;
        assert_eq!(seen.timeline, Some(TimelineId(4)));

        // The other one is told from it, and rewound to where both are the same.
        let verdict = c.pg.diverged(b.upstream()).await;
        assert!(matches!(verdict, Divergence::Rewind(_)), "{verdict:?}");
        c.pg.rewind(b.upstream()).await.expect("rewind");
        assert_eq!(c.pg.diverged(b.upstream()).await, Divergence::None);
        c.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect("start");
        let lsn = b.running().await.lsn;
        c.until("has the new leader's rows", |running| running.replay_lsn >= Some(lsn)).await;
        let rows = "DO $$ BEGIN ASSERT (SELECT array_agg(i) FROM t) = '{4}'; END $$";
        c.sql(rows).await.expect("the new leader's rows only");
        let slots = "DO $$ BEGIN ASSERT NOT EXISTS (SELECT FROM pg_replication_slots); END $$";
        c.sql(slots).await.expect("pg_rewind leaves no slot");

        // And it goes on from there, also from one that has only heard of the numbers.
        b.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        assert_eq!(d.pg.promote(LIMIT, Vec::new()).await, Ok(TimelineId(5)));
        c.pg.follow(Some(d.upstream())).await.expect("follow");
        d.until("c streams", |running| running.replication.iter().any(|s| s.application_name == "c")).await;
        a.pg.rewind(d.upstream()).await.expect("it crashed as a primary");
        a.pg.start(StartAs::Standby(Some(d.upstream())), LIMIT).await.expect("start");
        d.until("a streams", |running| running.replication.iter().any(|s| s.application_name == "a")).await;
    });
}

/// What is on the disk of a standby counts from when it has been replayed: until then it says so.
#[test]
fn a_standby_that_has_not_replayed_its_own_wal_says_so() {
    as_postgres("timelines::a_standby_that_has_not_replayed_its_own_wal_says_so", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let b = place.standby("b", &a).await;
        let delayed = |by: &str| {
            let mut config = b.pg.config();
            config.recovery_conf.insert("recovery_min_apply_delay".into(), by.into());
            b.pg.configure(config)
        };
        delayed("1h").await.expect("configure");
        a.sql("CREATE TABLE t (i int)").await.expect("table");
        let lsn = a.running().await.lsn;
        let seen = b.until("has it on its disk", |running| running.receive_lsn >= Some(lsn)).await;
        assert!(!seen.reads_own_wal && seen.replay_lsn < Some(lsn), "{seen:?}");

        // Nobody is there to ask for more; the delay holds up what is there.
        b.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        b.pg.start(StartAs::Standby(None), LIMIT).await.expect("start");
        let seen = b.running().await;
        assert!(seen.reads_own_wal && seen.lsn < lsn, "{seen:?}");
        delayed("0").await.expect("configure");
        let seen = b.until("has replayed it", |running| !running.reads_own_wal).await;
        assert!(seen.receive_lsn.is_none() && seen.lsn >= lsn, "{seen:?}");

        b.pg.follow(Some(a.upstream())).await.expect("follow");
        b.until("streams", |running| running.receive_lsn.is_some() && !running.reads_own_wal).await;
        assert!(!a.running().await.reads_own_wal);
    });
}

/// A standby that has much to replay yet, from an archive that is slow: nobody gives up as long as it gets on.
#[test]
fn a_promotion_waits_for_replay_that_goes_on() {
    as_postgres("timelines::a_promotion_waits_for_replay_that_goes_on", || async {
        let place = Place::new();
        let archive = place.0.path().join("archive");
        fs::create_dir(&archive).expect("archive");
        let a = place.node("a");
        let mut config = a.pg.config();
        config.parameters.insert("archive_mode".into(), "on".into());
        config.parameters.insert("archive_command".into(), format!("cp %p {}/%f", archive.display()));
        a.pg.configure(config).await.expect("configure");
        a.start_new().await;
        a.sql("CREATE TABLE t (i int)").await.expect("table");
        let (b, c) = (place.node("b"), place.node("c"));
        for node in [&b, &c] {
            node.pg.clone_from(a.upstream()).await.expect("clone");
        }
        for _ in 0..9 {
            a.sql("INSERT INTO t VALUES (1); SELECT pg_switch_wal()").await.expect("a segment of WAL");
        }
        a.pg.stop(StopMode::Fast, LIMIT, None).await.expect("everything is archived");

        // Each segment takes less than the patience, all of them more. The archive is there once the server is up: PostgreSQL
        // that finds nothing there just as it is promoted looks no further.
        let (step, patience) = (Duration::from_millis(700), Duration::from_secs(3));
        let from_archive = |command: String| {
            let mut config = b.pg.config();
            config.recovery_conf.insert("restore_command".into(), command);
            config.recovery_conf
        };
        let (open, found) = (place.0.path().join("open"), place.0.path().join("found"));
        let slow = from_archive(format!(
            "test -e {open} && test -e {archive}/%f && touch {found} && sleep {step} && cp {archive}/%f %p",
            open = open.display(),
            found = found.display(),
            archive = archive.display(),
            step = step.as_secs_f64(),
        ));
        b.pg.configure(PostgresConfig { recovery_conf: slow, ..b.pg.config() }).await.expect("configure");
        b.pg.start(StartAs::Standby(None), LIMIT).await.expect("start");
        fs::write(&open, "").expect("open");
        b.until("reads the archive", |_| found.exists()).await;
        let begun = SystemClock.now();
        assert_eq!(b.pg.promote(patience, Vec::new()).await, Ok(TimelineId(2)));
        let took = SystemClock.now().since(begun);
        assert!(took > patience, "{took:?} were too short to show anything");
        b.sql("DO $$ BEGIN ASSERT (SELECT count(*) FROM t) = 9; END $$").await.expect("all that the archive had");
        let nudges = b.log().matches("received SIGHUP").count();
        assert!(nudges <= 10, "{nudges} in {took:?}");

        // This one's archive has nothing, and in the end it does not even answer.
        let mute = place.0.path().join("mute");
        let stuck = from_archive(format!("test -e {} && exec sleep 60; false", mute.display()));
        c.pg.configure(PostgresConfig { recovery_conf: stuck, ..c.pg.config() }).await.expect("configure");
        c.pg.start(StartAs::Standby(None), LIMIT).await.expect("start");
        fs::write(&mute, "").expect("mute");
        let error = c.pg.promote(patience, Vec::new()).await;
        assert!(matches!(error, Err(PgError::Timeout { limit, .. }) if limit == patience), "{error:?}");
        c.pg.fence(Duration::from_secs(5)).await.expect("fence");
    });
}

/// What is set in files that are not the agent's own is in force all the same.
#[test]
fn a_rewind_and_the_end_of_a_primary_use_the_archive_wherever_it_is_set() {
    as_postgres("timelines::a_rewind_and_the_end_of_a_primary_use_the_archive_wherever_it_is_set", || async {
        let place = Place::new();
        let archive = place.0.path().join("archive");
        fs::create_dir(&archive).expect("archive");
        let a = place.node("a");
        let mut config = a.pg.config();
        // Nothing is kept that is archived.
        config.protected.insert("wal_keep_size".into(), "0".into());
        a.pg.configure(config).await.expect("configure");
        a.start_new().await;
        let base = a.dir.join("postgresql.base.conf");
        let mut text = fs::read_to_string(&base).expect("base");
        text.push_str(&format!("archive_mode = on\nrestore_command = 'cp {}/%f %p'\n", archive.display()));
        fs::write(&base, text).expect("base");
        // As long as this file is there.
        let archives = place.0.path().join("archives");
        fs::write(&archives, "").expect("archives");
        let command = format!("test -e {} && cp %p {}/%f", archives.display(), archive.display());
        a.sql(&format!("ALTER SYSTEM SET archive_command = '{command}'")).await.expect("set");
        a.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        a.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        a.sql("CREATE TABLE t (i int)").await.expect("table");
        let b = place.standby("b", &a).await;
        b.pg.promote(LIMIT, Vec::new()).await.expect("promote");

        // The segment in which the histories part goes to the archive, and out of the data directory.
        let (history, _) = b.pg.history(TimelineId(2)).await.expect("history");
        let fork = history.switchpoint_of(TimelineId(1)).expect("a fork").0;
        let parted = format!("{:08X}{:08X}{:08X}", 1, fork >> 32, (fork & 0xffff_ffff) >> 24);
        let wal = a.dir.join("pg_wal");
        let deadline = SystemClock.now() + LIMIT;
        while wal.join(&parted).exists() || !archive.join(&parted).exists() {
            assert!(SystemClock.now() < deadline, "{parted} is still there");
            a.sql("INSERT INTO t VALUES (1); SELECT pg_switch_wal(); CHECKPOINT").await.expect("another segment");
        }
        b.sql("INSERT INTO t VALUES (-1); CHECKPOINT").await.expect("writes that stay");

        // What comes last does not get there before the server is stopped.
        let names = |dir: &Path, ending: &str| {
            let files = fs::read_dir(dir).expect("a directory").flatten();
            let files = files.filter_map(|file| file.file_name().to_str()?.strip_suffix(ending).map(str::to_owned));
            files.filter(|name| name.len() == 24).collect::<BTreeSet<_>>()
        };
        fs::remove_file(&archives).expect("not any more");
        a.sql("INSERT INTO t VALUES (2); SELECT pg_switch_wal()").await.expect("writes nobody will see");
        a.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        fs::write(&archives, "").expect("again");
        let before = names(&archive, "");
        a.pg.archive_last_wal().await.expect("archived");
        assert_eq!(names(&archive, "").difference(&before).count(), 1, "the segment with the shutdown checkpoint");

        let verdict = a.pg.diverged(b.upstream()).await;
        assert!(matches!(verdict, Divergence::Rewind(_)), "{verdict:?}");
        let waiting = names(&wal.join("archive_status"), ".ready");
        assert!(waiting.iter().any(|name| !archive.join(name).exists()), "{waiting:?} wait for nothing");
        a.pg.rewind(b.upstream()).await.expect("with WAL from the archive");
        assert!(waiting.iter().all(|name| archive.join(name).exists()), "{waiting:?} were not archived");
        a.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect("start");
        b.until("a streams", |running| running.replication.iter().any(|s| s.application_name == "a")).await;
        let rows = "DO $$ BEGIN ASSERT (SELECT array_agg(i) FROM t) = '{-1}'; END $$";
        let lsn = b.running().await.lsn;
        a.until("has the new leader's rows", |running| running.replay_lsn >= Some(lsn)).await;
        a.sql(rows).await.expect("the new leader's rows only");
    });
}

#[test]
fn a_diverged_primary_is_rewound() {
    as_postgres("timelines::a_diverged_primary_is_rewound", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        a.sql("CREATE TABLE t (i int)").await.expect("table");
        let b = place.standby("b", &a).await;
        b.pg.promote(LIMIT, Vec::new()).await.expect("promote");
        a.sql("INSERT INTO t SELECT generate_series(1, 1000)").await.expect("writes nobody will see");
        b.sql("INSERT INTO t VALUES (-1)").await.expect("writes that stay");
        assert!(matches!(a.pg.diverged(b.upstream()).await, Divergence::Unknown(_)), "a running primary");

        // Crashed, so pg_rewind has to recover it first.
        a.pg.fence(Duration::from_secs(5)).await.expect("fence");
        let verdict = a.pg.diverged(b.upstream()).await;
        assert!(matches!(verdict, Divergence::Rewind(_)), "{verdict:?}");
        a.pg.rewind(b.upstream()).await.expect("rewind");
        assert_eq!(a.pg.diverged(b.upstream()).await, Divergence::None);
        a.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect("start");
        let lsn = b.running().await.lsn;
        a.until("has the new leader's history", |r| r.replay_lsn >= Some(lsn) && r.timeline == Some(TimelineId(2)))
            .await;
        a.sql("DO $$ BEGIN ASSERT (SELECT array_agg(i) FROM t) = '{-1}'; END $$")
            .await
            .expect("the new leader's rows only");

        // A clean shutdown behind everybody's back diverges just as well.
        a.pg.promote(LIMIT, Vec::new()).await.expect("promote");
        a.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        assert!(matches!(a.pg.diverged(b.upstream()).await, Divergence::Rewind(_)));

        // As it is left where pg_rewind fails, and where its source goes away meanwhile.
        let config = a.pg.config();
        let rewind_that = async |does: &str| {
            let program = a.dir.join("broken_rewind");
            let said = "pg_rewind: rewinding from last common checkpoint at 0/2000060 on timeline 1";
            fs::write(&program, format!("#!/bin/sh\n{does}\necho '{said}' >&2\nexit 1\n")).expect("script");
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("permissions");
            let mut broken = config.clone();
            broken.bin_name.insert("pg_rewind".to_owned(), program.display().to_string());
            a.pg.configure(broken).await.expect("configure");
            a.pg.rewind(b.upstream()).await.expect_err("it fails");
        };
        rewind_that("true").await;
        assert!(!a.pg.half_rewound(), "the source is there: what it says is why it failed");
        let process = b.pg.config().data_dir.join("postmaster.pid");
        rewind_that(&format!("kill -QUIT $(head -n 1 {0}); while [ -e {0} ]; do sleep 0.1; done", process.display()))
            .await;
        assert!(a.pg.half_rewound(), "it may have begun to write");
        // Its file has gone before it does.
        b.pg.stop(StopMode::Immediate, LIMIT, None).await.expect("all of it has ended");
        b.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        a.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect_err("neither old nor new");
        a.pg.configure(config.clone()).await.expect("configure");
        a.pg.rewind(b.upstream()).await.expect("rewind");

        // As an agent leaves it that dies while pg_rewind is at work.
        assert!(!a.pg.half_rewound());
        fs::write(a.pg.config().data_dir.with_file_name("a.rewinding"), "").expect("mark");
        assert!(a.pg.half_rewound());
        a.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect_err("neither old nor new");
        a.pg.clone_from(b.upstream()).await.expect("clone");
        assert!(!a.pg.half_rewound());
        a.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect("start");
    });
}

/// Several hosts are a cluster of which one is the primary: that one is copied, streamed from and compared with, also after a
/// switchover there.
#[test]
fn of_several_hosts_the_primary_is_followed() {
    as_postgres("timelines::of_several_hosts_the_primary_is_followed", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        // On the port of `a`, at another address.
        let mut b = place.node("b");
        let mut config = b.pg.config();
        (config.port, config.listen_addresses) = (a.port, "127.0.0.2".into());
        config.parameters.insert("unix_socket_directories".into(), place.0.path().to_string_lossy().into_owned());
        b.port = a.port;
        b.pg.configure(config).await.expect("configured");
        b.pg.clone_from(a.upstream()).await.expect("clone");
        b.pg.start(StartAs::Standby(Some(a.upstream())), LIMIT).await.expect("start");
        let outside = Upstream { name: "outside".into(), host: "127.0.0.2,127.0.0.1".into(), port: a.port, slot: None };
        let c = place.node("c");
        c.pg.clone_from(outside.clone()).await.expect("clone");
        c.pg.start(StartAs::Standby(Some(outside.clone())), LIMIT).await.expect("start");
        let at = |host: &str| Some(format!("{host}:{}", a.port));
        let streams = |running: &Running| running.replication_state.as_deref() == Some("streaming");
        let seen = c.until("streams", streams).await;
        assert_eq!(seen.upstream, at("127.0.0.1"), "from a standby");

        a.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        b.pg.promote(LIMIT, Vec::new()).await.expect("promote");
        let successor = Upstream { name: "b".into(), host: "127.0.0.2".into(), port: a.port, slot: None };
        a.pg.start(StartAs::Standby(Some(successor)), LIMIT).await.expect("rejoin");
        c.until("follows", |running| streams(running) && running.upstream == at("127.0.0.2")).await;
        assert_eq!(c.pg.diverged(outside.clone()).await, Divergence::None);
        // The first of these is a standby now.
        let turned = Upstream { host: "127.0.0.1,127.0.0.2".into(), ..outside };
        c.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        assert_eq!(c.pg.diverged(turned.clone()).await, Divergence::None);
        c.pg.start(StartAs::Standby(Some(turned)), LIMIT).await.expect("start");
        let seen = c.until("streams", streams).await;
        assert_eq!(seen.upstream, at("127.0.0.2"), "from a standby");
    });
}
