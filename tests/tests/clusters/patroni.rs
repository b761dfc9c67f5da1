//! Beside stock Patroni: the router in front of it, our agents among its nodes, its own client with our agents, and the
//! set-up that the benchmark compares with.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::workload::{Load, Target};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Scene, Spec, Timing, haproxy, patroni, wait};

fn spec(agents: Vec<Program>) -> Spec {
    let mut spec = Spec::new(agents.len(), &agents[0]);
    spec.agents = agents;
    spec.timing = Timing::PATRONI_LOWEST;
    spec
}

/// Waits until the first column of the first row is that.
async fn has(target: &Target, sql: &str, expected: &str) -> Result<()> {
    wait::until(format!("{expected} from {sql}"), LIMIT, async || {
        let answer = target.query_one(sql, LIMIT).await?;
        ensure!(answer == expected, "{answer}");
        Ok(())
    })
    .await
}

/// Nothing about the cluster is changed for the router: the file has Patroni's own settings and no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_router_in_front_of_stock_patroni() -> Result<()> {
    let program = patroni::program()?;
    let mut scene = Scene::with("stock", 1, spec(vec![program.clone(), program.clone(), program])).await?;
    let load = scene.load().await?;

    let old = scene.cluster.settled(LIMIT).await?;
    let asked = SystemClock.now();
    scene.cluster.switchover(old, None).await?;
    let new = scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    eprintln!("switchover of stock Patroni behind our router: {:?}", load.writers.record().outage(asked));
    scene.cluster.settled(LIMIT).await?;

    let fault = SystemClock.now();
    scene.cluster.nodes[new].kill_postmaster()?;
    scene.cluster.leader_other_than(new, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    eprintln!("postmaster killed: {:?}", load.writers.record().outage(fault));
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_half_patroni_half_ours_switches_both_ways() -> Result<()> {
    let mut scene = Scene::with("mixed", 1, spec(vec![Program::agent()?, patroni::program()?])).await?;
    let load = scene.load().await?;
    for _ in 0..2 {
        let old = scene.cluster.settled(LIMIT).await?;
        scene.cluster.switchover(old, Some(1 - old)).await?;
        ensure!(scene.cluster.leader_other_than(old, LIMIT).await? == 1 - old);
        load.writers.progress(100, LIMIT).await?;
    }
    scene.finish(load).await?;
    Ok(())
}

/// Quorum commit, a permanent slot, an edited configuration and a pause mean the same to both, and each takes over from the other
/// when its postmaster is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_half_patroni_half_ours_fails_over_both_ways_with_quorum_slots_edits_and_pause() -> Result<()> {
    let mut spec = spec(vec![Program::agent()?, patroni::program()?]);
    let slots = json!({ "kept": { "type": "physical" } });
    spec.dcs = json!({ "synchronous_mode": "quorum", "primary_start_timeout": 0, "slots": slots });
    let mut scene = Scene::with("halves", 1, spec).await?;
    let load = scene.load().await?;
    for turn in 0..2 {
        let old = scene.cluster.settled(LIMIT).await?;
        for node in [old, 1 - old] {
            has(&scene.node(node), "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'kept'", "1").await?;
        }
        let work_mem = format!("{}MB", 5 + turn);
        // By way of either: whoever is first in the list of nodes takes it.
        scene.cluster.patch_config(&json!({ "postgresql": { "parameters": { "work_mem": work_mem } } })).await?;
        for node in 0..2 {
            has(&scene.node(node), "SHOW work_mem", &work_mem).await?;
        }
        scene.cluster.nodes[old].kill_postmaster()?;
        ensure!(scene.cluster.leader_other_than(old, LIMIT).await? == 1 - old);
        load.writers.progress(100, LIMIT).await?;
    }

    let leader = scene.cluster.settled(LIMIT).await?;
    for (pause, expected) in [(json!(true), json!(true)), (json!(null), json!(null))] {
        scene.cluster.patch_config(&json!({ "pause": pause })).await?;
        paused(&scene, expected).await?;
    }
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    scene.finish(load).await?;
    Ok(())
}

/// The host of whoever leads dies, first of one product and then of the other.
async fn killed_hosts(name: &str, mode: Value) -> Result<()> {
    let mut spec = spec(vec![Program::agent()?, patroni::program()?]);
    spec.dcs = json!({ "synchronous_mode": mode, "primary_start_timeout": 0 });
    let mut scene = Scene::with(name, 1, spec).await?;
    let load = scene.load().await?;
    for _ in 0..2 {
        let old = scene.cluster.settled(LIMIT).await?;
        scene.cluster.nodes[old].kill();
        ensure!(scene.cluster.leader_other_than(old, LIMIT).await? == 1 - old);
        load.writers.progress(100, LIMIT).await?;
        scene.cluster.nodes[old].start()?;
        ensure!(scene.cluster.settled(LIMIT).await? == 1 - old, "leadership moved");
    }
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_half_patroni_half_ours_outlives_killed_hosts_both_ways_in_synchronous_mode() -> Result<()> {
    killed_hosts("mixed-sync", json!(true)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_half_patroni_half_ours_outlives_killed_hosts_both_ways_with_quorum_commit() -> Result<()> {
    killed_hosts("mixed-quorum", json!("quorum")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patronictl_works_with_our_agents() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    // The key of a router must not disturb it.
    spec.dcs["router_lease"] = json!(5);
    let mut scene = Scene::with("patronictl", 1, spec).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let program = patroni::ctl()?;
    let config = scene.cluster.nodes[old].config().to_owned();
    let patronictl = |args: &[&str]| -> Result<String> {
        let output = Command::new(&program.path).arg("-c").arg(&config).args(args).output().context("patronictl")?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success(), "patronictl {args:?}: {said}");
        Ok(said)
    };

    let name = |node: usize| scene.cluster.nodes[node].name().to_owned();
    let (leader, other) = (&name(old), &name(1 - old));
    let list = patronictl(&["list", "demo"])?;
    let row = |name: &str, role: &str, state: &str| {
        list.lines().any(|line| [name, role, state].iter().all(|word| line.contains(word)))
    };
    ensure!(row(leader, "Leader", "running") && row(other, "Sync Standby", "streaming"), "{list}");
    patronictl(&["switchover", "demo", "--leader", leader, "--candidate", other, "--force"])?;
    ensure!(scene.cluster.leader_other_than(old, LIMIT).await? == 1 - old);
    scene.cluster.settled(LIMIT).await?;
    let edited = patronictl(&["edit-config", "demo", "--force", "-s", "maximum_lag_on_failover=12345"])?;
    ensure!(edited.contains("12345"), "{edited}");
    ensure!(patronictl(&["show-config", "demo"])?.contains("maximum_lag_on_failover: 12345"));
    patronictl(&["restart", "demo", other, "--force"])?;
    ensure!(scene.cluster.settled(LIMIT).await? == 1 - old, "leadership moved");
    scene.lab.success();
    Ok(())
}

/// As docs/migration.md says: in a pause Patroni leaves PostgreSQL running, and our agent takes it over; no client notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_patroni_becomes_ours_without_a_restart_or_a_failed_write() -> Result<()> {
    let program = patroni::program()?;
    let mut scene = Scene::with("migration", 1, spec(vec![program.clone(), program])).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let before = [scene.cluster.nodes[0].postmaster()?, scene.cluster.nodes[1].postmaster()?];
    scene.cluster.patch_config(&json!({ "pause": true })).await?;
    paused(&scene, json!(true)).await?;
    for node in [1 - leader, leader] {
        let node = &mut scene.cluster.nodes[node];
        node.agent().context("it runs")?.terminate(LIMIT).await?;
        node.replace_program(Program::agent()?);
        node.start()?;
        let taken_over = wait::until("the agent to take PostgreSQL over", LIMIT, async || {
            let status = node.status().await?;
            ensure!(status["state"] == "running" && status["guard"].is_object(), "{status}");
            Ok(())
        });
        taken_over.await?;
    }
    scene.cluster.patch_config(&json!({ "pause": null })).await?;
    paused(&scene, json!(null)).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    let now = [scene.cluster.nodes[0].postmaster()?, scene.cluster.nodes[1].postmaster()?];
    ensure!(now == before, "PostgreSQL was restarted");
    load.writers.progress(100, LIMIT).await?;
    let record = load.writers.record();
    ensure!(record.failures == 0, "{} statements failed: {:?}", record.failures, record.last_error);

    scene.cluster.switchover(leader, Some(1 - leader)).await?;
    ensure!(scene.cluster.leader_other_than(leader, LIMIT).await? == 1 - leader);
    scene.finish(load).await?;
    Ok(())
}

/// Every member has heard of the pause, or of its end.
async fn paused(scene: &Scene, expected: Value) -> Result<()> {
    for node in &scene.cluster.nodes {
        let heard = wait::until(format!("pause to be {expected} for {}", node.name()), LIMIT, async || {
            let status = node.status().await?;
            ensure!(status["pause"] == expected, "{status}");
            Ok(())
        });
        heard.await?;
    }
    Ok(())
}

/// What the benchmark compares with must be set up right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stock_patroni_behind_haproxy() -> Result<()> {
    let lab = Lab::new("haproxy")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let program = patroni::program()?;
    let mut spec = spec(vec![program.clone(), program]);
    spec.dcs = json!({ "synchronous_mode": true, "primary_start_timeout": 0 });
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;
    let proxy = haproxy::start(&lab, &cluster, haproxy::Checks::TUNED).await?;
    let load = Load::start(&mut cluster, &proxy).await?;

    let leader = cluster.leader(LIMIT).await?;
    let asked = SystemClock.now();
    cluster.switchover(leader, None).await?;
    let new = cluster.leader_other_than(leader, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    cluster.settled(LIMIT).await?;
    let outage = load.writers.record().outage(asked);
    ensure!(outage > Duration::from_millis(200) && outage < Duration::from_secs(20), "it took {outage:?}");

    // HAProxy learns of a promotion by its next check, so its read-only sessions are none of our business.
    let seen = load.end().await;
    let target = cluster.nodes[new].target(&cluster.spec().password);
    ensure!(seen.all.missing(&target).await?.is_empty() && seen.all.two_primaries().is_none());
    lab.success();
    Ok(())
}
