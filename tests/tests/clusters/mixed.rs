//! Patroni and our agents in one cluster: synchronous mode and quorum commit whichever of them leads, edits of the settings through either,
//! and both command lines, which print the same about it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::workload::{Writers, create_table};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Scene, Spec, Timing, patroni, rest, wait};

/// What every member of the cluster says it is, by one member's word.
async fn roles(scene: &Scene, asked: usize) -> Result<Vec<String>> {
    let document: Value = rest::get(scene.cluster.nodes[asked].rest_port(), "/cluster").await?.body;
    let members = document["members"].as_array().context("members")?;
    Ok(members.iter().map(|member| member["role"].as_str().unwrap_or_default().to_owned()).collect())
}

/// The mode is in force: two standbys confirm by vote, or one is named.
async fn mode_in_force(scene: &Scene, leader: usize, role: &str, standbys: usize) -> Result<()> {
    let in_force = async || {
        let roles = roles(scene, leader).await?;
        ensure!(roles.iter().filter(|r| *r == role).count() == standbys, "{roles:?}, not {standbys} of {role}");
        Ok(())
    };
    wait::until(&format!("{standbys} of {role}"), LIMIT, in_force).await
}

/// An operator edits the settings through the REST API of that member.
async fn edit(scene: &Scene, member: usize, patch: Value) -> Result<()> {
    let answer = rest::patch(scene.cluster.nodes[member].rest_port(), "/config", &patch).await?;
    ensure!(answer.status == 200, "{member}: {} {}", answer.status, answer.body);
    Ok(())
}

fn listed(program: &Program, scene: &Scene) -> Result<Vec<String>> {
    let mut command = Command::new(&program.path);
    command.arg("-c").arg(scene.cluster.nodes[0].config()).args(["list", "demo"]);
    let output = command.output().context("list")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Positions move on between the two.
    let columns = |line: &str| line.split('|').take(6).collect::<Vec<_>>().join("|");
    Ok(text.lines().filter(|line| line.starts_with('|')).map(columns).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_command_lines_print_the_same_whichever_product_leads() -> Result<()> {
    let agents = vec![Program::agent()?, patroni::program()?, Program::agent()?];
    let mut spec = Spec::new(agents.len(), &agents[0]);
    (spec.agents, spec.timing) = (agents, Timing::PATRONI_LOWEST);
    let mut scene = Scene::with("mixed-matrix", 1, spec).await?;
    let load = scene.load().await?;
    let ctl = Program::new(Program::agent()?.path.with_file_name("trunklinectl"));

    // Patroni leads our replicas, then the other way round.
    for leader in [1, 0] {
        let now = scene.cluster.settled(LIMIT).await?;
        if now != leader {
            // Any of them may lead by vote.
            scene.cluster.patch_config(&json!({ "synchronous_mode": "quorum" })).await?;
            mode_in_force(&scene, now, "quorum_standby", 2).await?;
            scene.cluster.switchover(now, Some(leader)).await?;
            ensure!(scene.cluster.leader_other_than(now, LIMIT).await? == leader, "somebody else leads");
            scene.cluster.patch_config(&json!({ "synchronous_mode": true })).await?;
            scene.cluster.settled(LIMIT).await?;
        }
        edit(&scene, leader, json!({ "synchronous_mode": "quorum" })).await?;
        mode_in_force(&scene, leader, "quorum_standby", 2).await?;
        load.writers.progress(50, LIMIT).await?;
        // A replica of the other product takes edits as well.
        edit(&scene, 1 - leader, json!({ "synchronous_mode": true })).await?;
        mode_in_force(&scene, leader, "sync_standby", 1).await?;
        load.writers.progress(50, LIMIT).await?;

        let same = async || {
            let (ours, theirs) = (listed(&ctl, &scene)?, listed(&patroni::ctl()?, &scene)?);
            ensure!(ours.len() == 4 && ours == theirs, "{ours:#?}\n{theirs:#?}");
            Ok(())
        };
        wait::until("both command lines to print the same", LIMIT, same).await?;
    }
    scene.finish(load).await?;
    Ok(())
}

/// One product makes the cluster, the other one copies it, and each takes over from the other, with a logical slot whose reader
/// goes on where it was.
async fn made_by_one_and_copied_by_the_other(name: &str, agents: Vec<Program>) -> Result<()> {
    let lab = Lab::new(name)?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(agents.len(), &agents[0]);
    (spec.agents, spec.timing) = (agents, Timing::PATRONI_LOWEST);
    spec.dcs["postgresql"] = json!({ "parameters": { "wal_level": "logical" } });
    spec.dcs["slots"] = json!({ "changes": { "type": "logical", "database": "postgres", "plugin": "test_decoding" } });
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    cluster.nodes[0].start()?;
    ensure!(cluster.leader(LIMIT).await? == 0);
    let targets = cluster.targets();
    targets[0].execute("CREATE TABLE t (n int)", LIMIT).await?;
    cluster.nodes[1].start()?;

    for (turn, old) in [0, 1, 0].into_iter().enumerate() {
        ensure!(cluster.settled(LIMIT).await? == old, "leadership moved");
        let (was, is) = (&targets[old], &targets[1 - old]);
        was.execute(&format!("INSERT INTO t VALUES ({turn})"), LIMIT).await?;
        let sql = "SELECT coalesce(string_agg(data, ' '), '') FROM pg_logical_slot_get_changes('changes', NULL, NULL)";
        wait::until("the slot to be there", LIMIT, async || {
            let read = was.query_one(sql, LIMIT).await?;
            ensure!(read.contains(&format!("n[integer]:{turn}")), "{read}");
            ensure!(turn == 0 || !read.contains(&format!("n[integer]:{}", turn - 1)), "it is read twice: {read}");
            Ok(())
        })
        .await?;
        let confirmed = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'changes'";
        let position = was.query_one(confirmed, LIMIT).await?;
        wait::until("the slot of the standby to move along", LIMIT, async || {
            let moved = is.query_one(&format!("SELECT ({confirmed}) >= '{position}'"), LIMIT).await?;
            ensure!(moved == "t", "it is not at {position}");
            Ok(())
        })
        .await?;
        // To copy a slot either of them restarts its server, and meanwhile the list of synchronous standbys may do without it.
        wait::until("a switchover", LIMIT, async || {
            ensure!(cluster.settled(LIMIT).await? == old, "leadership moved");
            cluster.switchover(old, Some(1 - old)).await
        })
        .await?;
        ensure!(cluster.leader_other_than(old, LIMIT).await? == 1 - old);
    }
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_patronis_is_copied_by_ours_with_a_logical_slot() -> Result<()> {
    made_by_one_and_copied_by_the_other("copied", vec![patroni::program()?, Program::agent()?]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_ours_is_copied_by_patroni_with_a_logical_slot() -> Result<()> {
    made_by_one_and_copied_by_the_other("copies", vec![Program::agent()?, patroni::program()?]).await
}

/// Nothing ends a primary whose Patroni is frozen, and clients go on writing to it after its lease. `primary_race_backoff` is for
/// that: as long as its WAL arrives our replica leaves it alone, for that time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_patroni_that_is_frozen_is_given_time_while_its_primary_takes_writes() -> Result<()> {
    const BACKOFF: Duration = Duration::from_secs(6);
    let lab = Lab::new("backoff")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let agents = vec![patroni::program()?, Program::agent()?];
    let mut spec = Spec::new(agents.len(), &agents[0]);
    (spec.agents, spec.timing) = (agents, Timing::PATRONI_LOWEST);
    spec.dcs = json!({ "synchronous_mode": false, "primary_race_backoff": BACKOFF.as_secs() });
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    cluster.nodes[0].start()?;
    ensure!(cluster.leader(LIMIT).await? == 0);
    cluster.nodes[1].start()?;
    ensure!(cluster.settled(LIMIT).await? == 0, "leadership moved");
    let primary = cluster.targets().remove(0);
    create_table(&primary).await?;
    let writers = Writers::start(&primary, 1, 1, Duration::from_millis(20));
    writers.progress(10, LIMIT).await?;

    // Its agent alone.
    cluster.nodes[0].agent().context("it runs")?.signal(Signal::STOP);
    let ours = &cluster.nodes[1];
    let said = format!("My ({}) wal position moved since last heart beat loop", ours.name());
    ours.says(&said, LIMIT).await?;
    let free = SystemClock.now();
    ensure!(ours.health("/primary").await == Some(503), "it leads all the same");
    writers.progress(10, LIMIT).await?;
    wait::until("our replica to lead", LIMIT, async || {
        ensure!(ours.health("/primary").await == Some(200), "not yet");
        Ok(())
    })
    .await?;
    let waited = SystemClock.now().since(free);
    // Noticed late on a busy machine.
    ensure!(waited > BACKOFF / 3, "it has waited for {waited:?}");
    lab.success();
    Ok(())
}
