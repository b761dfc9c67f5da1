//! Newer PostgreSQL and etcd than Debian's: the main scenarios, and what is new in them.

use std::os::unix::fs::MetadataExt;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use trunkline_tests::{LIMIT, Lab, Program, Scene, Spec, Tools, rest, versions, wait};

/// A synchronous cluster with what is new in that version switched on.
async fn scene(name: &str, tools: Tools, nodes: usize) -> Result<Scene> {
    let mut spec = Spec::new(nodes, &Program::agent()?);
    if tools.postgres_major >= 17 {
        // The slots are copied to standbys with logical WAL and feedback only.
        let parameters = json!({ "summarize_wal": "on", "sync_replication_slots": "on", "wal_level": "logical",
                                 "hot_standby_feedback": "on" });
        spec.dcs["postgresql"] = json!({ "parameters": parameters });
    }
    Scene::in_lab(Lab::with_tools(name, tools)?, 1, spec).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_16_is_bootstrapped_switched_over_and_fails_over() -> Result<()> {
    let Some(tools) = versions::postgres(16)? else { return Ok(()) };
    switched_over_and_lost(scene("postgres16", tools, 2).await?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_18_on_etcd_3_5_is_bootstrapped_switched_over_and_fails_over() -> Result<()> {
    let (Some(tools), Some(etcd)) = (versions::postgres(18)?, versions::etcd_35()?) else { return Ok(()) };
    switched_over_and_lost(scene("postgres18", tools.with_etcd(etcd), 3).await?).await
}

/// Under load with synchronous commit: a switchover, a killed postmaster, a killed node, each of which comes back with its
/// data directory rewound; nothing acknowledged is lost.
async fn switched_over_and_lost(mut scene: Scene) -> Result<()> {
    let load = scene.load().await?;
    let first = scene.cluster.settled(LIMIT).await?;
    scene.cluster.switchover(first, None).await?;
    let second = scene.cluster.leader_other_than(first, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == second, "leadership moved after the switchover");

    let made = |scene: &Scene, node: usize| -> Result<u64> {
        Ok(scene.cluster.nodes[node].data_dir().join("PG_VERSION").metadata().context("no data directory")?.ino())
    };
    let before = made(&scene, second)?;
    scene.cluster.nodes[second].kill_postmaster()?;
    let third = scene.cluster.leader_other_than(second, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == third, "leadership moved after the killed postmaster");
    ensure!(made(&scene, second)? == before, "the data directory was made anew instead of rewound");

    let before = made(&scene, third)?;
    scene.cluster.nodes[third].kill();
    scene.cluster.leader_other_than(third, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.cluster.nodes[third].start()?;
    scene.cluster.settled(LIMIT).await?;
    ensure!(made(&scene, third)? == before, "the data directory was made anew instead of rewound");
    scene.finish(load).await?;
    Ok(())
}

/// Protocol 3.2 has cancel keys of 32 bytes instead of 4.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libpq_18_cancels_by_its_long_key() -> Result<()> {
    let Some(tools) = versions::postgres(18)? else { return Ok(()) };
    let psql = tools.postgres_bin.join("psql");
    let mut scene = scene("longkeys", tools, 3).await?;
    scene.cluster.settled(LIMIT).await?;
    let ports = scene.router.ports();
    for port in [ports.read_write, ports.read_only, ports.read_only, ports.read_only] {
        let mut command = tokio::process::Command::new(&psql);
        command.arg(format!("host=127.0.0.1 port={port} user=postgres dbname=postgres min_protocol_version=3.2"));
        command.env("PGPASSWORD", &scene.cluster.spec().password).args(["-XAt", "-v", "VERBOSITY=sqlstate"]);
        command.args(["-c", "SELECT 'here'", "-c", "SELECT pg_sleep(60)"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let pid = child.id().and_then(|id| rustix::process::Pid::from_raw(id as i32)).context("it has ended")?;
        let asleep = wait::until("psql to sleep", LIMIT, async || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
            let asked = scene.cluster.targets().into_iter().map(async |target| target.query_one(sql, LIMIT).await);
            let counts = futures::future::try_join_all(asked).await?;
            ensure!(counts.iter().any(|count| count != "0"), "nobody sleeps");
            Ok(())
        });
        asleep.await?;
        rustix::process::kill_process(pid, Signal::INT)?;
        let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await.context("it was not cancelled")??;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(said.contains("here") && said.contains("57014"), "{said}");
    }
    let metrics = rest::get(ports.admin, "/metrics").await?.body;
    let metrics = metrics.as_str().context("no text")?;
    ensure!(!metrics.contains("result=\"forwarded\""), "the keys were not learnt: {metrics}");
    scene.lab.success();
    Ok(())
}

/// PostgreSQL copies such slots to the standby itself; what the agent has to do is to give it a database to connect to,
/// to leave them alone, and to drop the old primary's, which would be in the way of the copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_slot_of_postgresql_18_goes_along_there_and_back() -> Result<()> {
    let Some(tools) = versions::postgres(18)? else { return Ok(()) };
    let mut scene = scene("failoverslot", tools, 2).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let sql = "SELECT pg_create_logical_replication_slot('cdc', 'pgoutput', false, false, true)";
    scene.node(leader).execute(sql, LIMIT).await?;
    scene.node(leader).execute("CREATE TABLE t (n int); CREATE PUBLICATION p FOR TABLE t", LIMIT).await?;
    let primary = scene.read_write();
    // Its consumer: a copy becomes whole only after the slot has moved on.
    let consumed = async || {
        primary.execute("INSERT INTO t VALUES (1)", LIMIT).await?;
        let sql = "SELECT count(*) FROM pg_logical_slot_get_binary_changes('cdc', null, null, \
                   'proto_version', '1', 'publication_names', 'p')";
        ensure!(primary.query_one(sql, LIMIT).await? != "0", "the slot has nothing of what was written");
        Ok(())
    };
    for _ in 0..2 {
        let old = scene.cluster.settled(LIMIT).await?;
        let standby = scene.node(1 - old);
        let copied = wait::until("the slot on the standby", LIMIT, async || {
            consumed().await?;
            let state = "SELECT string_agg(format('%s %s %s', slot_name, synced, temporary), ',') \
                         FROM pg_replication_slots WHERE slot_type = 'logical'";
            let state = standby.query_one(state, LIMIT).await?;
            ensure!(state == "cdc t f", "{state}");
            Ok(())
        });
        copied.await.with_context(|| scene.cluster.logs())?;
        scene.cluster.switchover(old, Some(1 - old)).await?;
        ensure!(scene.cluster.leader_other_than(old, LIMIT).await? == 1 - old);
        consumed().await?;
    }
    scene.lab.success();
    Ok(())
}
