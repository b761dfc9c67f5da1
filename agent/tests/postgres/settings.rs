//! Configuration files, and what a running server makes of them.

use std::fs;
use std::time::Duration;

use trunkline_agent::postgres::{PgError, PgStatus, Postgres as _, StartAs, StopMode};
use trunkline_common::{Clock as _, SystemClock};

use crate::nodes::{HBA, LIMIT, Place, as_postgres};

/// What could not be written is written when it is asked for again, and what waits for a restart is known to an agent that finds the
/// server running.
#[test]
fn a_configuration_that_could_not_be_written_is_not_in_force() {
    as_postgres("settings::a_configuration_that_could_not_be_written_is_not_in_force", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let (before, mut config) = (a.pg.config(), a.pg.config());
        config.parameters.insert("work_mem".into(), "12MB".into());
        config.protected.insert("max_connections".into(), "60".into());
        let blocked = a.dir.join("postgresql.trunkline.tmp");
        fs::create_dir(&blocked).expect("in the way");
        let error = a.pg.configure(config.clone()).await.expect_err("written to a directory");
        assert!(error.to_string().contains("can't be written"), "{error}");
        assert_eq!(a.pg.config(), before);
        assert!(a.running().await.pending_restart.is_empty());
        fs::remove_dir(&blocked).expect("removed");
        a.pg.configure(config).await.expect("written");
        a.until("is reloaded", |_| a.log().contains("\"work_mem\" changed to \"12MB\"")).await;
        for handle in [&a.pg, &a.restart_handle()] {
            let PgStatus::Running(running) = handle.observe(LIMIT).await else { panic!("it runs") };
            assert_eq!(running.pending_restart.keys().collect::<Vec<_>>(), ["max_connections"]);
        }
    });
}

#[test]
fn changed_settings_are_reloaded_or_wait_for_a_restart() {
    as_postgres("settings::changed_settings_are_reloaded_or_wait_for_a_restart", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let mut config = a.pg.config();
        config.parameters.insert("work_mem".into(), "7MB".into());
        config.parameters.insert("shared_buffers".into(), "17MB".into());
        config.protected.insert("max_connections".into(), "60".into());
        a.pg.configure(config.clone()).await.expect("configure");
        a.sql("DO $$ BEGIN ASSERT current_setting('work_mem') = '7MB'; END $$").await.expect("reloaded");
        let pending = a.running().await.pending_restart;
        assert_eq!(pending.keys().collect::<Vec<_>>(), ["max_connections", "shared_buffers"]);
        assert_eq!(pending["max_connections"], serde_json::json!({"old_value": "50", "new_value": "60"}));
        assert_eq!(pending["shared_buffers"]["new_value"], "17MB");
        a.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        a.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        assert!(a.running().await.pending_restart.is_empty());
        config.parameters.insert("shared_buffers".into(), "17408kB".into());
        a.pg.configure(config).await.expect("configure");
        assert!(a.running().await.pending_restart.is_empty(), "another spelling of the same value");
    });
}

#[test]
fn settings_and_access_rules_follow_the_role() {
    as_postgres("settings::settings_and_access_rules_follow_the_role", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let b = place.standby("b", &a).await;
        let mut config = b.pg.config();
        for (role, memory) in [("primary", "5MB"), ("replica", "6MB"), ("standby_leader", "7MB")] {
            let overlay = [("work_mem".to_owned(), memory.to_owned())].into();
            config.parameters_by_role.insert(role.to_owned(), overlay);
            let rules = [HBA[0], HBA[1], &format!("host {role} all 127.0.0.1/32 reject")];
            config.raw.insert(format!("pg_hba_{role}"), serde_json::json!(rules));
            config.raw.insert(format!("pg_ident_{role}"), serde_json::json!([format!("{role} x y")]));
        }
        b.pg.configure(config).await.expect("configure");
        let follows = async |role: &str, memory: &str| {
            let check = format!(
                "DO $$ BEGIN
                    ASSERT current_setting('work_mem') = '{memory}', current_setting('work_mem');
                    ASSERT (SELECT database FROM pg_hba_file_rules WHERE auth_method = 'reject') = '{{{role}}}';
                END $$"
            );
            let deadline = SystemClock.now() + LIMIT;
            while let Err(error) = b.sql(&check).await {
                assert!(SystemClock.now() < deadline, "as {role}: {error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let ident = fs::read_to_string(b.dir.join("pg_ident.conf")).expect("pg_ident.conf");
            assert!(ident.ends_with(&format!("{role} x y\n")), "as {role}: {ident}");
        };
        follows("replica", "6MB").await;
        b.pg.standby_role("standby_leader").expect("written");
        follows("standby_leader", "7MB").await;
        // It stays what it is where it is pointed elsewhere, or started again.
        b.pg.follow(Some(a.upstream())).await.expect("follow");
        b.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        b.pg.start(StartAs::Standby(Some(a.upstream())), LIMIT).await.expect("start");
        follows("standby_leader", "7MB").await;
        b.pg.standby_role("replica").expect("written");
        follows("replica", "6MB").await;
        b.pg.promote(LIMIT, Vec::new()).await.expect("promote");
        follows("primary", "5MB").await;
        b.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        b.pg.start(StartAs::Standby(None), LIMIT).await.expect("start");
        follows("replica", "6MB").await;
    });
}

#[test]
fn settings_that_postgresql_rejects_are_left_out() {
    as_postgres("settings::settings_that_postgresql_rejects_are_left_out", || async {
        let place = Place::new();
        let node = place.node("a");
        let mut config = node.pg.config();
        for (name, value) in [("no_such_setting", "1"), ("work_mem", "lots"), ("maintenance_work_mem", "65MB")] {
            config.parameters.insert(name.into(), value.into());
        }
        node.pg.configure(config.clone()).await.expect("configure");
        node.pg.initdb(vec!["--no-sync".into()], vec![]).await.expect("initdb");
        node.pg.start(StartAs::Primary, LIMIT).await.expect("starts without the bad ones");
        node.sql("DO $$ BEGIN ASSERT current_setting('maintenance_work_mem') = '65MB'; END $$")
            .await
            .expect("the good one");
        let conf = fs::read_to_string(node.dir.join("postgresql.conf")).expect("conf");
        assert!(!conf.contains("no_such_setting") && !conf.contains("lots"), "{conf}");

        // What is wrong elsewhere stops it, with PostgreSQL's own words.
        node.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        fs::write(node.dir.join("postgresql.base.conf"), "nonsense = 1\n").expect("base");
        let error = node.pg.start(StartAs::Primary, LIMIT).await;
        assert!(matches!(&error, Err(PgError::Failed(why)) if why.contains("nonsense")), "{error:?}");
    });
}
