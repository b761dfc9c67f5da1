//! `Instance` against a real PostgreSQL: every promise of the trait `Postgres` that only a real server can show.
//!
//! PostgreSQL refuses to run as root, so a test that finds itself root runs itself again as the user `postgres`.

mod nodes;
mod settings;
mod slots;
mod timelines;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use tokio::sync::oneshot;
use trunkline_agent::postgres::{
    CustomBootstrap, Divergence, Instance, PgError, PgRole, PgStatus, Postgres as _, StartAs, StopMode,
};
use trunkline_common::{Clock as _, Lsn, SystemClock, TimelineId};
use trunkline_config::PostgresConfig;

use crate::nodes::{LIMIT, Node, Place, as_postgres, tools};

/// A session is kept for long, and in between it is only seen whether the server would let us in.
#[test]
fn a_server_is_knocked_at_without_a_login_and_without_a_complaint_in_its_log() {
    as_postgres("a_server_is_knocked_at_without_a_login_and_without_a_complaint_in_its_log", || async {
        let place = Place::new();
        let node = place.primary("a").await;
        let count = |what: &str| node.log().matches(what).count();
        let admit = async |method: &str| {
            let hba = format!("host all all 127.0.0.1/32 {method}\n");
            fs::write(node.dir.join("pg_hba.conf"), hba).expect("pg_hba.conf");
            node.sql("SELECT pg_reload_conf()").await.expect("a reload");
        };
        node.running().await;
        node.sql("ALTER SYSTEM SET log_connections = on").await.expect("a setting");
        admit("scram-sha-256").await;
        node.until("knocked at", |_| count("connection received") > 0).await;
        assert_eq!(count("application_name=trunkline-agent"), 0, "that was a login: {}", node.log());
        // Where nobody asks for a password it is let in, and leaves in order.
        admit("trust").await;
        node.until("knocked at", |_| count("application_name=trunkline-agent") > 0).await;
        node.running().await;
        for complaint in ["FATAL", "could not", "unexpected", "incomplete"] {
            assert_eq!(count(complaint), 0, "{}", node.log());
        }
    });
}

#[test]
fn a_new_cluster_has_its_users_and_is_observed() {
    as_postgres("a_new_cluster_has_its_users_and_is_observed", || async {
        let place = Place::new();
        let node = place.node("a");
        assert_eq!(node.pg.observe(Duration::from_secs(1)).await, PgStatus::NoData);
        drop(node);

        let node = place.primary("a").await;
        let running = node.running().await;
        assert_eq!((running.role, running.timeline), (PgRole::Primary, Some(TimelineId(1))));
        assert_eq!(running.server_version / 10000, tools().postgres_major);
        assert!(running.lsn > Lsn(0) && running.pending_restart.is_empty() && running.replication.is_empty());
        assert!(running.postmaster_start_time.ends_with("+00:00"), "{}", running.postmaster_start_time);
        let check = "DO $$ BEGIN
            ASSERT (SELECT rolreplication FROM pg_roles WHERE rolname = 'replicator');
            ASSERT has_function_privilege('rewinder', 'pg_read_binary_file(text)', 'execute');
            ASSERT current_setting('cluster_name') = 'demo' AND current_setting('wal_keep_size') = '128MB';
        END $$";
        node.sql(check).await.expect("users and settings");
        assert!(fs::read_to_string(node.dir.join("postgresql.conf")).expect("conf").contains("postgresql.base.conf"));
        assert!(!node.dir.join("standby.signal").exists());

        node.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        match node.pg.observe(Duration::from_secs(1)).await {
            PgStatus::Stopped(control) => {
                assert_eq!(control.system_id, running.system_id);
                assert_eq!((control.timeline, control.standby), (TimelineId(1), false));
            }
            status => panic!("{status:?}"),
        }
    });
}

/// Port and addresses wait for a restart, and the server is found, by this agent and the next, and told of to others where it is.
#[test]
fn a_server_whose_address_was_edited_is_asked_where_it_listens() {
    as_postgres("a_server_whose_address_was_edited_is_asked_where_it_listens", || async {
        let place = Place::new();
        let node = place.primary("a").await;
        let (before, free) = (node.pg.config(), place.node("b").port);
        for (address, port) in [("127.0.0.1", free), ("127.0.0.2", node.port), ("127.0.0.2", free)] {
            for unix in [false, true] {
                let mut config = before.clone();
                (config.listen_addresses, config.port, config.use_unix_socket) = (address.into(), port, unix);
                config.connect_address = format!("{address}:{port}");
                node.pg.configure(config).await.expect("configured");
                let waits: Vec<_> = node.running().await.pending_restart.into_keys().collect();
                let changed = [("listen_addresses", address != "127.0.0.1"), ("port", port != node.port)];
                let changed: Vec<_> = changed.iter().filter(|(_, changed)| *changed).map(|(name, _)| *name).collect();
                assert_eq!(waits, changed, "{address}:{port}");
                let next = node.restart_handle();
                assert!(matches!(next.observe(LIMIT).await, PgStatus::Running(_)), "{address}:{port}, socket: {unix}");
                for handle in [&node.pg, &next] {
                    assert_eq!(handle.connect_address(), before.connect_address, "{address}:{port}");
                }
            }
        }
        node.pg.stop(StopMode::Restart, LIMIT, None).await.expect("stop");
        node.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        assert!(node.running().await.pending_restart.is_empty());
        assert_eq!(node.pg.connect_address(), format!("127.0.0.2:{free}"));
    });
}

#[test]
fn a_standby_streams_is_promoted_and_the_other_follows_by_reload() {
    as_postgres("a_standby_streams_is_promoted_and_the_other_follows_by_reload", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let b = place.standby("b", &a).await;
        let c = place.standby("c", &a).await;
        a.sql("CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await.expect("write");
        let lsn = a.running().await.lsn;
        let seen = b.until("has the write", |running| running.replay_lsn >= Some(lsn)).await;
        assert_eq!((seen.role, seen.replication_state.as_deref()), (PgRole::Standby, Some("streaming")));
        assert_eq!(seen.upstream, Some(format!("127.0.0.1:{}", a.port)));
        let standbys_before = c.pid();

        // A planned switchover, piece by piece.
        let (sender, shut_down) = oneshot::channel();
        let begun = SystemClock.now();
        let stop = a.pg.stop(StopMode::Fast, LIMIT, Some(sender));
        let caught_up = async {
            let checkpoint = shut_down.await.expect("the shutdown checkpoint is announced");
            b.until("has the shutdown checkpoint", |running| running.lsn > checkpoint).await
        };
        let (stopped, _) = tokio::join!(stop, caught_up);
        stopped.expect("stop");
        println!("stop: {:?}", SystemClock.now().since(begun));

        let begun = SystemClock.now();
        let timeline = b.pg.promote(LIMIT, Vec::new()).await.expect("promote");
        let took = SystemClock.now().since(begun);
        b.sql("INSERT INTO t VALUES (2)").await.expect("writes are accepted when promote returns");
        println!("promote: {took:?}");
        assert_eq!(timeline, TimelineId(2));
        let (history, written) = b.pg.history(TimelineId(2)).await.expect("history");
        assert!(history.switchpoint_of(TimelineId(1)).is_some() && written.contains('T'));

        c.pg.follow(Some(b.upstream())).await.expect("follow");
        b.until("c streams", |running| running.replication.iter().any(|s| s.application_name == "c")).await;
        let lsn = b.running().await.lsn;
        let seen = c.until("follows the new timeline", |running| running.replay_lsn >= Some(lsn)).await;
        assert_eq!(seen.timeline, Some(TimelineId(2)));
        assert_eq!(c.pid(), standbys_before, "followed without a restart");

        // Killed before pg_control knows of the new timeline, and up again with nobody to follow.
        c.pg.stop(StopMode::Immediate, LIMIT, None).await.expect("stop");
        c.pg.start(StartAs::Standby(None), LIMIT).await.expect("start");
        let seen = c.until("replays its WAL", |running| running.replay_lsn >= Some(lsn)).await;
        assert_eq!(seen.timeline, Some(TimelineId(2)));

        // The new primary has everything of the old one: it just follows.
        assert_eq!(a.pg.diverged(b.upstream()).await, Divergence::None);
        a.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect("rejoin");
        b.until("a streams", |running| running.replication.iter().any(|s| s.application_name == "a")).await;
    });
}

#[test]
fn a_killed_postmaster_is_noticed_and_leaves_nobody_behind() {
    as_postgres("a_killed_postmaster_is_noticed_and_leaves_nobody_behind", || async {
        let place = Place::new();
        let node = place.primary("a").await;
        let busy = node.sql("SELECT pg_sleep(60)");
        let kill = async {
            node.until("runs", |_| true).await;
            let mut exits = node.pg.exits();
            exits.mark_unchanged();
            let pid = rustix::process::Pid::from_raw(node.pid()).expect("pid");
            let begun = SystemClock.now();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
            tokio::time::timeout(LIMIT, exits.changed()).await.expect("in time").expect("sender");
            println!("exit noticed: {:?}", SystemClock.now().since(begun));
            assert_eq!(node.processes(), Vec::<String>::new(), "orphans when the exit is reported");
        };
        let (busy, ()) = tokio::join!(busy, kill);
        assert!(busy.is_err());
        match node.pg.observe(Duration::from_secs(1)).await {
            PgStatus::Stopped(control) => assert!(!control.standby),
            status => panic!("{status:?}"),
        }
        node.pg.start(StartAs::Primary, LIMIT).await.expect("it recovers");
    });
}

#[test]
fn a_frozen_postmaster_is_unresponsive_and_fenced_in_time() {
    as_postgres("a_frozen_postmaster_is_unresponsive_and_fenced_in_time", || async {
        let place = Place::new();
        let node = place.primary("a").await;
        node.running().await;
        let pid = rustix::process::Pid::from_raw(node.pid()).expect("pid");
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stop");
        // The kernel stops it a moment after the signal was sent.
        let deadline = SystemClock.now() + LIMIT;
        loop {
            let begun = SystemClock.now();
            let status = node.pg.observe(Duration::from_millis(500)).await;
            assert!(SystemClock.now().since(begun) < Duration::from_millis(900));
            if status == PgStatus::Unresponsive {
                break;
            }
            assert!(SystemClock.now() < deadline, "{status:?}");
        }
        let begun = SystemClock.now();
        node.pg.fence(Duration::from_secs(2)).await.expect("fence");
        println!("fence: {:?}", SystemClock.now().since(begun));
        assert_eq!(node.processes(), Vec::<String>::new());
        node.pg.fence(Duration::from_secs(1)).await.expect("nothing left to fence");
    });
}

#[test]
fn a_running_server_is_taken_over_as_it_is() {
    as_postgres("a_running_server_is_taken_over_as_it_is", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let b = place.standby("b", &a).await;
        a.pg.set_synchronous_standby_names("b".into()).await.expect("names");
        let (pid_a, pid_b) = (a.pid(), b.pid());

        // A new agent: it knows neither the upstream nor the names, and must change neither.
        let (new_a, new_b) = (a.restart_handle(), b.restart_handle());
        let mut exits = new_a.exits();
        new_a.configure(a.pg.config()).await.expect("configure");
        new_b.configure(b.pg.config()).await.expect("configure");
        a.until("still synchronous", |running| running.synchronous_standby_names == "b").await;
        let standby = b.until("still streaming", |r| r.replication_state.as_deref() == Some("streaming")).await;
        assert_eq!(standby.upstream, Some(format!("127.0.0.1:{}", a.port)));
        assert_eq!((a.pid(), b.pid()), (pid_a, pid_b));

        exits.mark_unchanged();
        new_a.stop(StopMode::Fast, LIMIT, None).await.expect("the new agent stops it");
        assert!(exits.has_changed().expect("sender"));
        assert!(matches!(new_a.observe(Duration::from_secs(1)).await, PgStatus::Stopped(_)));
    });
}

#[test]
fn a_restored_cluster_takes_writes_and_has_its_own_access_rules() {
    as_postgres("a_restored_cluster_takes_writes_and_has_its_own_access_rules", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        a.sql("CREATE TABLE t AS SELECT 1 AS n").await.expect("table");
        let backup = place.node("backup");
        backup.pg.clone_from(a.upstream()).await.expect("backup");
        let rules = fs::read_to_string(backup.dir.join("pg_hba.conf")).expect("rules");

        let c = place.node("c");
        let script = place.0.path().join("restore");
        let copy = format!(
            "#!/bin/sh\nfor a; do case $a in --datadir=*) cp -a {} ${{a#*=}};; esac; done\n",
            backup.dir.display()
        );
        fs::write(&script, copy).expect("script");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).expect("mode");
        let section = serde_json::json!({
            "command": script.to_string_lossy(), "recovery_conf": { "recovery_target": "immediate", "recovery_target_action": "promote",
                "restore_command": "false" },
        });
        let section = section.as_object().cloned().expect("a map");
        c.pg.restore(CustomBootstrap { name: "copy".into(), section }).await.expect("restored");
        assert_eq!(c.running().await.role, PgRole::Primary);
        c.pg.create_users(None).await.expect("users");
        c.pg.end_restore().await.expect("finished");
        c.sql("DO $$ BEGIN ASSERT current_setting('hba_file') LIKE '%/pg_hba.conf'; END $$").await.expect("in force");
        c.sql("INSERT INTO t VALUES (2)").await.expect("what was restored, and it takes writes");
        assert_eq!(fs::read_to_string(c.dir.join("pg_hba.conf")).expect("rules"), rules);
        assert!(!c.dir.join("pg_hba.restoring.conf").exists());
    });
}

/// Nobody knows in which order a method of the user's own copies: what it has left half-way is not started, and is there for the next
/// try where `keep_data` says so.
#[test]
fn a_copy_that_was_cut_off_is_no_data() {
    as_postgres("a_copy_that_was_cut_off_is_no_data", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let backup = place.node("backup");
        backup.pg.clone_from(a.upstream()).await.expect("backup");
        let script = place.0.path().join("copy");
        let wait = place.0.path().join("wait");
        let copy = format!(
            "#!/bin/sh\nmkdir -p -m 700 $1/global\ncp {0}/PG_VERSION $1\ncp {0}/global/pg_control $1/global\n\
             touch {1}.begun\nwhile [ -e {1} ]; do sleep 0.01; done\ncp -a {0}/. $1\n",
            backup.dir.display(),
            wait.display()
        );
        fs::write(&script, copy).expect("script");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).expect("mode");
        let b = place.node("b");
        let mut config = b.pg.config();
        config.create_replica_methods = vec!["copy".into()];
        for keep_data in [false, true] {
            let command = format!("{} {}", script.display(), b.dir.display());
            let method = serde_json::json!({ "command": command, "keep_data": keep_data, "no_params": true });
            config.raw.insert("copy".into(), method);
            b.pg.configure(config.clone()).await.expect("configured");
            fs::write(&wait, "").expect("wait");
            let begun = async {
                while !wait.with_extension("begun").exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::select! {
                ended = b.pg.clone_from(a.upstream()) => panic!("it waits: {ended:?}"),
                begun = tokio::time::timeout(LIMIT, begun) => begun.expect("begun"),
            }
            for handle in [&b.pg, &b.restart_handle()] {
                assert_eq!(handle.observe(LIMIT).await, PgStatus::NoData, "half a copy, keep_data: {keep_data}");
            }
            fs::write(b.dir.join("kept"), "").expect("written");
            fs::remove_file(&wait).expect("go on");
            b.pg.clone_from(a.upstream()).await.expect("copied again");
            fs::remove_file(wait.with_extension("begun")).expect("removed");
            assert!(matches!(b.pg.observe(LIMIT).await, PgStatus::Stopped(_)), "a whole copy");
            assert_eq!(b.dir.join("kept").exists(), keep_data);
        }
        b.pg.start(StartAs::Standby(Some(a.upstream())), LIMIT).await.expect("start");
        a.until("streams", |running| running.replication.iter().any(|s| s.application_name == "b")).await;
        b.pg.stop(StopMode::Fast, LIMIT, None).await.expect("stop");
        // One that fails leaves what it has to the next method.
        config.raw.insert("copy".into(), serde_json::json!({ "command": "false", "keep_data": true }));
        b.pg.configure(config.clone()).await.expect("configured");
        assert!(b.pg.clone_from(a.upstream()).await.is_err());
        assert_eq!(b.pg.observe(LIMIT).await, PgStatus::NoData, "nobody knows what it did");
        b.pg.base_backup(a.upstream()).await.expect("a base backup");
        assert!(matches!(b.pg.observe(LIMIT).await, PgStatus::Stopped(_)), "a whole copy");
    });
}

/// PostgreSQL's files stand outside of the data directory, and the agent gets in by the socket alone.
#[test]
fn a_cluster_with_configuration_directories_and_sockets_is_begun_copied_and_rewound() {
    as_postgres("a_cluster_with_configuration_directories_and_sockets_is_begun_copied_and_rewound", || async {
        const LOCAL: [&str; 2] = ["local all all scram-sha-256", "local replication all scram-sha-256"];
        const REMOTE: [&str; 2] =
            ["host all rewinder 127.0.0.1/32 scram-sha-256", "host replication replicator 127.0.0.1/32 scram-sha-256"];
        let place = Place::new();
        let (custom, socket) = (place.0.path().join("custom.conf"), place.0.path().to_string_lossy().into_owned());
        fs::write(&custom, "work_mem = '7MB'\n").expect("custom.conf");
        let configured = async |name, custom_conf: Option<std::path::PathBuf>| {
            let node = place.node(name);
            let mut config = node.pg.config();
            config.config_dir = place.0.path().join(format!("{name}-conf"));
            fs::create_dir(&config.config_dir).expect("directory");
            config.parameters.insert("unix_socket_directories".into(), socket.clone());
            (config.use_unix_socket, config.use_unix_socket_repl) = (true, true);
            config.custom_conf = custom_conf;
            node.pg.configure(config).await.expect("configure");
            node
        };
        let a = configured("a", Some(custom)).await;
        let hba = LOCAL.iter().chain(&REMOTE).map(|line| (*line).to_owned()).collect();
        a.pg.initdb(vec!["--no-sync".into(), "--auth=reject".into()], hba).await.expect("initdb");
        // initdb's own lines come first.
        let generated = fs::read_to_string(a.dir.join("pg_hba.conf")).expect("hba");
        let lines: Vec<_> = generated.lines().filter(|line| !line.ends_with("reject")).collect();
        fs::write(a.dir.join("pg_hba.conf"), lines.join("\n") + "\n").expect("hba");
        a.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        a.pg.create_users(None).await.expect("users");
        let in_force = async |node: &Node, work_mem: &str| {
            let conf = place.0.path().join(format!("{}-conf", node.name));
            let setting = |name: &str, value: &str| format!("ASSERT current_setting('{name}') = '{value}';");
            let files =
                [("config_file", "postgresql.conf"), ("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")];
            let files = files.map(|(name, file)| setting(name, &conf.join(file).to_string_lossy())).concat();
            let check = format!("DO $$ BEGIN {files} {} END $$", setting("work_mem", work_mem));
            node.sql_by(&socket, &check).await.expect("its own files and values");
            assert!(node.sql("SELECT 1").await.is_err_and(|error| error.contains("no pg_hba.conf entry")));
        };
        in_force(&a, "7MB").await;
        a.sql_by(&socket, "CREATE TABLE t (i int)").await.expect("table");

        let (b, c) = (configured("b", None).await, configured("c", None).await);
        for (node, source) in [(&b, &a), (&c, &b)] {
            node.pg.clone_from(source.upstream()).await.expect("clone");
            node.pg.start(StartAs::Standby(Some(source.upstream())), LIMIT).await.expect("start");
            source.until("streams", |r| r.replication.iter().any(|s| s.application_name == node.name)).await;
            in_force(node, "4MB").await;
        }
        b.pg.promote(LIMIT, Vec::new()).await.expect("promote");
        a.sql_by(&socket, "INSERT INTO t VALUES (1)").await.expect("a write that nobody will see");

        // The new primary is asked for a checkpoint, which takes a superuser.
        let superuser = "host all postgres 127.0.0.1/32 scram-sha-256";
        let pg_hba = Some(LOCAL.iter().chain(&REMOTE).chain([&superuser]).map(|line| (*line).to_owned()).collect());
        b.pg.configure(PostgresConfig { pg_hba, ..b.pg.config() }).await.expect("configure");
        // Crashed, so its recovery and pg_rewind need the configuration.
        a.pg.fence(Duration::from_secs(5)).await.expect("fence");
        assert!(matches!(a.pg.diverged(b.upstream()).await, Divergence::Rewind(_)));
        a.pg.rewind(b.upstream()).await.expect("rewind");
        a.pg.start(StartAs::Standby(Some(b.upstream())), LIMIT).await.expect("start");
        b.until("a streams", |running| running.replication.iter().any(|s| s.application_name == "a")).await;
        in_force(&a, "7MB").await;

        // Killed before pg_control knows of the new timeline, so that the server itself is asked, by replication.
        b.sql_by(&socket, "INSERT INTO t VALUES (2)").await.expect("write");
        let lsn = b.running().await.lsn;
        c.until("follows", |r| r.replay_lsn >= Some(lsn) && r.timeline == Some(TimelineId(2))).await;
        c.pg.stop(StopMode::Immediate, LIMIT, None).await.expect("stop");
        let pg_hba = Some(LOCAL.map(str::to_owned).into());
        c.pg.configure(PostgresConfig { pg_hba, ..c.pg.config() }).await.expect("configure");
        c.pg.start(StartAs::Standby(None), LIMIT).await.expect("start");
        c.until("its timeline", |r| r.replay_lsn >= Some(lsn) && r.timeline == Some(TimelineId(2))).await;
    });
}

#[test]
fn everything_goes_over_tls_where_the_users_ask_for_it() {
    as_postgres("everything_goes_over_tls_where_the_users_ask_for_it", || async {
        let place = Place::new();
        let (cert, key) = (place.0.path().join("node.crt"), place.0.path().join("node.key"));
        // Self-signed, as authority, server and client at once: what Patroni's own acceptance suite uses.
        let made = std::process::Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
            .args(["-subj", "/CN=postgres", "-addext", "subjectAltName=IP:127.0.0.1", "-out"])
            .arg(&cert)
            .arg("-keyout")
            .arg(&key)
            .output();
        assert!(made.expect("openssl").status.success());
        let options = [("sslmode", "verify-ca"), ("sslrootcert", &*cert.to_string_lossy())];
        let options = options.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let secure = |node: &Node| {
            let mut config = node.pg.config();
            for user in [&mut config.superuser, &mut config.replication, &mut config.rewind] {
                user.options = options.clone().into();
            }
            config.parameters.insert("ssl".into(), "on".into());
            config.parameters.insert("ssl_cert_file".into(), cert.to_string_lossy().into());
            config.parameters.insert("ssl_key_file".into(), key.to_string_lossy().into());
            config
        };
        let hba = ["hostssl all all 127.0.0.1/32 scram-sha-256", "hostssl replication all 127.0.0.1/32 scram-sha-256"];
        let a = place.node("a");
        a.pg.configure(secure(&a)).await.expect("configure");
        let options = vec!["--no-sync".into(), "--auth=reject".into()];
        a.pg.initdb(options, hba.map(str::to_owned).into()).await.expect("initdb");
        // initdb's own lines come first.
        let generated = fs::read_to_string(a.dir.join("pg_hba.conf")).expect("hba").replace("reject", "trust #");
        let lines: Vec<_> = generated.lines().filter(|line| !line.contains("trust #")).collect();
        fs::write(a.dir.join("pg_hba.conf"), lines.join("\n") + "\n").expect("hba");
        a.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        a.pg.create_users(None).await.expect("users");

        let b = place.node("b");
        b.pg.configure(secure(&b)).await.expect("configure");
        b.pg.clone_from(a.upstream()).await.expect("clone");
        b.pg.start(StartAs::Standby(Some(a.upstream())), LIMIT).await.expect("start");
        a.until("streams", |running| !running.replication.is_empty()).await;
        assert_eq!(b.pg.diverged(a.upstream()).await, Divergence::None);
        assert!(a.sql("SELECT 1").await.is_err(), "without TLS nobody gets in");
    });
}

#[test]
fn a_replica_can_be_made_by_the_users_own_method() {
    as_postgres("a_replica_can_be_made_by_the_users_own_method", || async {
        let place = Place::new();
        let a = place.primary("a").await;
        let b = place.node("b");
        let script = place.0.path().join("copy.sh");
        let text = "#!/bin/sh\nset -e\nfor arg; do case \"$arg\" in --datadir=*) dir=${arg#*=};; --connstring=*) conn=${arg#*=};; \
            --level=*) level=${arg#*=};; esac; done\n[ \"$level\" = 3 ]\nexec \"$0.pg_basebackup\" -D \"$dir\" -d \"$conn\" -X stream -c fast --no-sync\n";
        fs::write(&script, text).expect("script");
        let pg_basebackup = place.0.path().join("copy.sh.pg_basebackup");
        std::os::unix::fs::symlink(tools().postgres_bin.join("pg_basebackup"), pg_basebackup).expect("link");
        let mut config = b.pg.config();
        config.create_replica_methods = vec!["absent".into(), "copy".into()];
        let absent = serde_json::json!({ "command": "/nonexistent/tool" });
        let copy = serde_json::json!({ "command": format!("sh {}", script.display()), "level": 3 });
        config.raw = [("absent".to_owned(), absent), ("copy".to_owned(), copy)].into_iter().collect();
        b.pg.configure(config).await.expect("configure");
        b.pg.clone_from(a.upstream()).await.expect("the second method works");
        b.pg.start(StartAs::Standby(Some(a.upstream())), LIMIT).await.expect("start");
        a.until("streams", |running| !running.replication.is_empty()).await;
    });
}

#[test]
fn what_an_operator_has_to_fix_is_said() {
    as_postgres("what_an_operator_has_to_fix_is_said", || async {
        let place = Place::new();
        let refused = |config: PostgresConfig| match Instance::new(config, "demo", "a".into(), SystemClock) {
            Err(PgError::Unusable(why)) => why,
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("accepted"),
        };
        let node = place.node("a");
        let absent = PostgresConfig { bin_dir: Some("/nonexistent".into()), ..node.pg.config() };
        assert!(refused(absent).contains("/nonexistent/postgres"));
        let old = place.0.path().join("bin");
        fs::create_dir(&old).expect("bin");
        for tool in ["postgres", "initdb", "pg_basebackup"] {
            fs::write(old.join(tool), "#!/bin/sh\necho 'postgres (PostgreSQL) 11.22'\n").expect("script");
            fs::set_permissions(old.join(tool), fs::Permissions::from_mode(0o755)).expect("mode");
        }
        assert!(refused(PostgresConfig { bin_dir: Some(old), ..node.pg.config() }).contains("11"));
        assert!(matches!(node.pg.start(StartAs::Primary, LIMIT).await, Err(PgError::Unusable(_))), "no data");

        let options = || vec!["--no-sync".into()];
        let error = node.pg.initdb(vec!["--pwfile=/x".into()], vec![]).await;
        assert!(matches!(error, Err(PgError::Unusable(why)) if why.contains("pwfile")));
        node.pg.initdb(options(), vec![]).await.expect("initdb");
        let error = node.pg.initdb(options(), vec![]).await;
        assert!(matches!(error, Err(PgError::Failed(why)) if why.contains("exists but is not empty")));
        let _taken = std::net::TcpListener::bind(("127.0.0.1", node.port)).expect("port");
        let error = node.pg.start(StartAs::Primary, LIMIT).await;
        assert!(matches!(error, Err(PgError::Unusable(why)) if why.contains("taken")));
        fs::set_permissions(&node.dir, fs::Permissions::from_mode(0o755)).expect("mode");
        assert!(refused(node.pg.config()).contains("0755"));
        assert!(matches!(node.pg.observe(Duration::from_secs(1)).await, PgStatus::Broken(_)));
        fs::set_permissions(&node.dir, fs::Permissions::from_mode(0o700)).expect("mode");
        node.pg.move_data_aside().await.expect("aside");
        assert!(node.dir.with_extension("failed").join("PG_VERSION").exists());
        assert_eq!(node.pg.observe(Duration::from_secs(1)).await, PgStatus::NoData);
    });
}
