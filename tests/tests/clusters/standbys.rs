//! Standbys that are not like the others: behind another one, late, fed by the archive, or a whole cluster of them.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use trunkline_tests::workload::Target;
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Node, Program, Spec, rest, wait};

/// Waits until the first column of the first row is that.
async fn has(target: &Target, sql: &str, expected: &str) -> Result<()> {
    wait::until(format!("{expected} from {sql} at port {}", target.port()), LIMIT, async || {
        let answer = target.query_one(sql, LIMIT).await?;
        ensure!(answer == expected, "{answer}");
        Ok(())
    })
    .await
}

/// The port of the server that it streams from.
const SENDER: &str = "SELECT coalesce(max(sender_port), 0) FROM pg_stat_wal_receiver WHERE status = 'streaming'";

fn configure(node: &mut Node, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut config = serde_json::from_slice(&std::fs::read(node.config())?)?;
    change(&mut config);
    node.configure(&config.to_string())
}

/// Makes a node a late one, or one like the others.
async fn delay(node: &mut Node, by: Value) -> Result<()> {
    configure(node, |config| config["postgresql"]["recovery_conf"] = json!({ "recovery_min_apply_delay": by }))?;
    let answer = rest::post(node.rest_port(), "/reload", &json!({}), LIMIT).await?;
    ensure!(answer.status == 202, "{answer:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_may_follow_another_one_be_late_or_live_on_the_archive() -> Result<()> {
    let lab = Lab::new("standbys")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let archive = lab.make_dir("archive")?.display().to_string();
    let mut spec = Spec::new(4, &Program::agent()?);
    let parameters = json!({ "archive_mode": "on", "archive_command": format!("cp %p {archive}/%f") });
    spec.dcs["postgresql"] = json!({ "parameters": parameters });
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    configure(&mut cluster.nodes[1], |config| config["tags"] = json!({ "clonefrom": true }))?;
    configure(&mut cluster.nodes[2], |config| {
        config["tags"] = json!({ "replicatefrom": "node2", "nofailover": true, "nosync": true, "noloadbalance": true });
    })?;
    configure(&mut cluster.nodes[3], |config| {
        config["tags"] = json!({ "nostream": true, "nofailover": true, "nosync": true });
        config["postgresql"]["recovery_conf"] = json!({ "restore_command": format!("cp {archive}/%f %p") });
    })?;
    for node in 0..3 {
        cluster.nodes[node].start()?;
        ensure!(cluster.settled(LIMIT).await? == 0, "the first one leads");
    }
    cluster.nodes[3].start()?;
    let targets = cluster.targets();
    let [leader, middle, late, archived] = &targets[..] else { unreachable!("four nodes") };

    let log = cluster.nodes[2].log()?;
    ensure!(log.contains("pg_basebackup from node2"), "it was not copied from the member with clonefrom: {log}");
    let (first, second) = (cluster.nodes[0].port().to_string(), cluster.nodes[1].port().to_string());
    has(middle, SENDER, &first).await?;
    has(late, SENDER, &second).await?;
    let readers = [cluster.nodes[1].health("/replica").await, cluster.nodes[2].health("/replica").await];
    ensure!(readers == [Some(200), Some(503)], "noloadbalance: {readers:?}");
    has(middle, "SELECT active FROM pg_replication_slots WHERE slot_name = 'node3'", "t").await?;

    // It has received the row, and does not show it. (One that starts with a delay has no WAL receiver before the delay is over.)
    delay(&mut cluster.nodes[2], json!("1h")).await?;
    has(late, "SHOW recovery_min_apply_delay", "1h").await?;
    leader.execute("CREATE TABLE t AS SELECT 1 AS n", LIMIT).await?;
    let position = leader.query_one("SELECT pg_current_wal_lsn()", LIMIT).await?;
    has(middle, "SELECT count(*) FROM pg_class WHERE relname = 't'", "1").await?;
    has(late, &format!("SELECT pg_last_wal_receive_lsn() >= '{position}'"), "t").await?;
    ensure!(late.query_one("SELECT count(*) FROM pg_class WHERE relname = 't'", LIMIT).await? == "0", "it is not late");
    delay(&mut cluster.nodes[2], json!(0)).await?;
    has(late, "SELECT count(*) FROM pg_class WHERE relname = 't'", "1").await?;

    // By the archive alone.
    leader.execute("SELECT pg_switch_wal()", LIMIT).await?;
    has(archived, "SELECT count(*) FROM pg_class WHERE relname = 't'", "1").await?;
    ensure!(archived.query_one("SELECT count(*) FROM pg_stat_wal_receiver", LIMIT).await? == "0", "it streams");
    ensure!(cluster.nodes[3].status().await?["replication_state"] == "in archive recovery");

    // Without the one in the middle it follows the leader, and goes back to it.
    cluster.nodes[1].kill();
    has(late, SENDER, &first).await?;
    cluster.nodes[1].start()?;
    has(middle, SENDER, &first).await?;
    has(late, SENDER, &second).await?;
    lab.success();
    Ok(())
}

/// Whoever is promoted with a slot that is past its own WAL would leave out what it writes there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_standby_gets_a_logical_slot_once_it_has_what_the_reader_has() -> Result<()> {
    let lab = Lab::new("late-slot")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "postgresql": { "parameters": { "wal_level": "logical" } } });
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;
    let leader = cluster.settled(LIMIT).await?;
    let targets = cluster.targets();
    let (primary, late) = (&targets[leader], &targets[1 - leader]);

    delay(&mut cluster.nodes[1 - leader], json!("1h")).await?;
    has(late, "SHOW recovery_min_apply_delay", "1h").await?;
    primary.execute("CREATE TABLE t AS SELECT 1 AS n", LIMIT).await?;
    let changes = json!({ "type": "logical", "database": "postgres", "plugin": "test_decoding" });
    cluster.patch_config(&json!({ "slots": { "changes": changes } })).await?;
    let there = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'changes'";
    has(primary, there, "1").await?;
    wait::until("the standby to say why it has no such slot", LIMIT, async || {
        ensure!(cluster.nodes[1 - leader].log()?.contains("slot changes is not copied yet"));
        Ok(())
    })
    .await?;
    has(late, there, "0").await?;
    delay(&mut cluster.nodes[1 - leader], json!(0)).await?;
    has(late, there, "1").await?;
    lab.success();
    Ok(())
}

/// PostgreSQL pauses replay where a setting is too small for what the primary says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replay_that_is_paused_goes_on_and_a_standby_gets_the_primarys_settings() -> Result<()> {
    let lab = Lab::new("paused-replay")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "postgresql": { "parameters": { "max_connections": 60 } } });
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;
    let leader = cluster.settled(LIMIT).await?;
    let targets = cluster.targets();
    let (primary, standby) = (&targets[leader], &targets[1 - leader]);

    // By hand: as with Patroni it stays like that only in a pause.
    cluster.patch_config(&json!({ "pause": true })).await?;
    wait::until("a pause", LIMIT, async || {
        ensure!(cluster.nodes[1 - leader].status().await?["pause"] == true);
        Ok(())
    })
    .await?;
    standby.execute("SELECT pg_wal_replay_pause()", LIMIT).await?;
    primary.execute("CREATE TABLE t AS SELECT 1 AS n", LIMIT).await?;
    let position = primary.query_one("SELECT pg_current_wal_lsn()", LIMIT).await?;
    has(standby, &format!("SELECT pg_last_wal_receive_lsn() >= '{position}'"), "t").await?;
    has(standby, "SELECT pg_is_wal_replay_paused()", "t").await?;
    cluster.patch_config(&json!({ "pause": null })).await?;
    has(standby, "SELECT count(*) FROM t", "1").await?;

    cluster.patch_config(&json!({ "postgresql": { "parameters": { "max_connections": 70 } } })).await?;
    wait::until("a restart that is due", LIMIT, async || {
        ensure!(cluster.nodes[leader].status().await?["pending_restart"] == true);
        Ok(())
    })
    .await?;
    let answer = rest::post(cluster.nodes[leader].rest_port(), "/restart", &json!({}), LIMIT).await?;
    ensure!(answer.status == 200, "{answer:?}");
    primary.execute("INSERT INTO t VALUES (2)", LIMIT).await?;
    has(standby, "SHOW max_connections", "70").await?;
    has(standby, "SELECT count(*) FROM t", "2").await?;
    ensure!(cluster.settled(LIMIT).await? == leader);
    lab.success();
    Ok(())
}

/// What `trunklinectl` says to a command without questions.
fn ctl(node: &Node, command: &str, args: &[&str]) -> Result<String> {
    let program = Program::agent()?.path.with_file_name("trunklinectl");
    let mut run = Command::new("timeout");
    run.arg("60").arg(program).arg("-c").arg(node.config()).args([command, "--force"]).args(args);
    let output = run.output()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{command}: {said}");
    Ok(said)
}

/// Waits until this node is the standby leader, and returns it.
async fn standby_leader(cluster: &Cluster, but: Option<usize>) -> Result<usize> {
    wait::until("a standby leader", LIMIT, async || {
        for (i, node) in cluster.nodes.iter().enumerate().filter(|(i, _)| Some(*i) != but) {
            if node.health("/standby_leader").await == Some(200) {
                return Ok(i);
            }
        }
        anyhow::bail!("nobody says so")
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_standbys_follows_another_cluster_until_it_is_set_free() -> Result<()> {
    let lab = Lab::new("standby-cluster")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(1, &Program::agent()?);
    spec.dcs = json!({ "slots": { "far": { "type": "physical" } } });
    let main = Cluster::start(&lab, &etcd.endpoints(), spec.clone()).await?;
    let source = main.targets().remove(0);
    source.execute("CREATE TABLE t AS SELECT 1 AS n", LIMIT).await?;

    let outside = json!({ "host": "127.0.0.1", "port": source.port(), "primary_slot_name": "far" });
    let mut spec = Spec { scope: "far".to_owned(), prefix: "far".to_owned(), ..spec };
    spec.agents = vec![Program::agent()?; 2];
    let settings = json!({
        "parameters": { "work_mem": "3MB" }, "parameters_standby_leader": { "work_mem": "5MB" }, "parameters_primary": { "work_mem": "6MB" },
    });
    spec.dcs = json!({ "standby_cluster": outside, "postgresql": settings });
    let mut far = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    for node in &mut far.nodes {
        let note = format!("sh -c 'echo $1 $2 >> {}' note", node.dir().join("notes").display());
        configure(node, |config| {
            config["postgresql"]["callbacks"] = json!({ "on_start": note, "on_restart": note });
        })?;
        node.start()?;
    }
    let targets = far.targets();
    let mut leader = standby_leader(&far, None).await?;
    let main_port = source.port().to_string();
    let follow = async |leader: usize| {
        has(&targets[leader], SENDER, &main_port).await?;
        has(&targets[1 - leader], SENDER, &targets[leader].port().to_string()).await?;
        has(&targets[leader], "SHOW work_mem", "5MB").await?;
        has(&targets[1 - leader], "SHOW work_mem", "3MB").await
    };
    follow(leader).await?;
    ensure!(far.nodes[leader].health("/primary").await == Some(503), "it is no primary");
    for target in &targets {
        has(target, "SELECT count(*) FROM t", "1").await?;
    }

    // Another slot over there.
    source.execute("SELECT pg_create_physical_replication_slot('farther')", LIMIT).await?;
    far.patch_config(&json!({ "standby_cluster": { "primary_slot_name": "farther" } })).await?;
    has(&source, "SELECT string_agg(slot_name, ',') FROM pg_replication_slots WHERE active", "farther").await?;
    far.patch_config(&json!({ "standby_cluster": { "primary_slot_name": "far" } })).await?;
    has(&source, "SELECT string_agg(slot_name, ',') FROM pg_replication_slots WHERE active", "far").await?;

    // Whoever is told by callbacks must not take it for a replica, however its server comes up again.
    let notes = far.nodes[leader].dir().join("notes");
    for event in ["on_restart", "on_start"] {
        std::fs::write(&notes, "")?;
        let postmaster = far.nodes[leader].postmaster()?;
        if event == "on_restart" {
            let answer = rest::post(far.nodes[leader].rest_port(), "/restart", &json!({}), LIMIT).await?;
            ensure!(answer.status == 200, "{answer:?}");
        } else {
            far.nodes[leader].kill_postmaster()?;
        }
        wait::until(format!("{event} of the standby leader"), LIMIT, async || {
            let told = std::fs::read_to_string(&notes)?;
            ensure!(told == format!("{event} standby_leader\n"), "{told:?}");
            ensure!(far.nodes[leader].postmaster()? != postmaster, "the same postmaster");
            Ok(())
        })
        .await?;
        follow(leader).await?;
    }

    // Planned, and when its host dies.
    let body = json!({ "leader": far.nodes[leader].name() });
    let answer = rest::post(far.nodes[leader].rest_port(), "/switchover", &body, LIMIT).await?;
    ensure!(answer.status == 200, "{answer:?}");
    leader = standby_leader(&far, Some(leader)).await?;
    follow(leader).await?;
    far.nodes[leader].kill();
    let lost = leader;
    leader = standby_leader(&far, Some(lost)).await?;
    has(&targets[leader], SENDER, &main_port).await?;
    far.nodes[lost].start()?;
    follow(leader).await?;
    source.execute("INSERT INTO t VALUES (2)", LIMIT).await?;
    for target in &targets {
        has(target, "SELECT count(*) FROM t", "2").await?;
    }

    // Free: it takes writes, on a timeline of its own.
    let told = ctl(&far.nodes[leader], "promote-cluster", &[])?;
    ensure!(told.contains("cluster is successfully promoted"), "{told}");
    let leader = far.settled(LIMIT).await?;
    has(&targets[leader], "SELECT pg_is_in_recovery()", "f").await?;
    has(&targets[leader], "SHOW work_mem", "6MB").await?;
    targets[leader].execute("INSERT INTO t VALUES (3)", LIMIT).await?;
    has(&targets[1 - leader], "SELECT count(*) FROM t", "3").await?;
    ensure!(source.query_one("SELECT count(*) FROM t", LIMIT).await? == "2", "the other cluster has got it");

    // The other way round: it stops, and follows the cluster that it has fed before, whose last write it gets by pg_rewind.
    let port = targets[leader].port().to_string();
    let told = ctl(&main.nodes[0], "demote-cluster", &["--host", "127.0.0.1", "--port", &port])?;
    ensure!(told.contains("cluster is successfully demoted"), "{told}");
    has(&source, SENDER, &targets[leader].port().to_string()).await?;
    has(&source, "SELECT count(*) FROM t", "3").await?;
    ensure!(standby_leader(&main, None).await? == 0);
    lab.success();
    Ok(())
}
