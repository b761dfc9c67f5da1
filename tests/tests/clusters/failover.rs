//! The leader is lost, in each of the ways a leader can be lost.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::{LIMIT, Program, Scene, Spec, wait};

/// With the agent alive nothing has to expire: less than what is left of a lease, on a machine that runs other tests as well.
const AT_ONCE: Duration = Duration::from_millis(3500);

/// The lease (5 s), etcd's sweep (0.5 s), and a busy machine.
const AFTER_LEASE: Duration = Duration::from_secs(12);

/// Ten seconds without an answer, a new session every five, a second between looks, and a busy machine.
const HUNG: Duration = Duration::from_secs(25);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_postmaster_is_replaced_at_once_and_rejoins() -> Result<()> {
    let mut scene = Scene::start("postmaster", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    let fault = SystemClock.now();
    scene.cluster.nodes[old].kill_postmaster()?;
    let new = scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    let settled = scene.cluster.settled(LIMIT).await?;
    ensure!(settled == new, "the cluster settled on another node than the one that took over");

    let outage = load.writers.record().outage(fault);
    ensure!(outage < AT_ONCE, "writes stood still for {outage:?}");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_is_replaced_when_its_lease_is_over_and_rejoins() -> Result<()> {
    let mut scene = Scene::start("node", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    let fault = SystemClock.now();
    scene.cluster.nodes[old].kill();
    scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    let outage = load.writers.record().outage(fault);
    ensure!(outage < AFTER_LEASE, "writes stood still for {outage:?}");

    scene.cluster.nodes[old].start()?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_node_loses_its_sessions_and_takes_no_write_after_its_thaw() -> Result<()> {
    let mut scene = Scene::start("freeze", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let old_port = scene.cluster.nodes[old].port();

    let fault = SystemClock.now();
    scene.cluster.nodes[old].freeze();
    scene.cluster.leader_other_than(old, LIMIT).await?;
    // The writers' sessions were open and mute: only the router can have ended them.
    load.writers.progress(100, LIMIT).await?;
    let outage = load.writers.record().outage(fault);
    ensure!(outage < AFTER_LEASE, "writes stood still for {outage:?}");

    let taken_over = SystemClock.now();
    scene.cluster.nodes[old].thaw();
    load.writers.progress(500, LIMIT).await?;
    let record = load.writers.record();
    let late = record.writes.iter().find(|write| write.port == old_port && write.acked > taken_over);
    ensure!(late.is_none(), "the old leader acknowledged a write after its thaw: {late:?}");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_postmaster_is_taken_for_hung_and_replaced_and_rejoins() -> Result<()> {
    let mut scene = Scene::start("hung", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    // It lets nobody in, but the sessions that it has go on: only a new one can tell.
    let hung = scene.cluster.nodes[old].postmaster()?;
    rustix::process::kill_process(hung, rustix::process::Signal::STOP)?;
    let fault = SystemClock.now();
    let killed = wait::until("the hung postmaster to be killed", LIMIT, async || {
        ensure!(scene.cluster.nodes[old].postmaster().ok() != Some(hung), "it is still there");
        Ok(())
    });
    killed.await?;
    let found = SystemClock.now().since(fault);
    ensure!(found > Duration::from_secs(9), "after {found:?}, nobody can be sure");
    ensure!(found < HUNG, "found only after {found:?}");
    // Somebody else leads, unless nobody answers in time on this machine; then it is started again.
    scene.cluster.settled(LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_asked_to_end_hands_over_first() -> Result<()> {
    let mut scene = Scene::start("sigterm", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    let fault = SystemClock.now();
    scene.cluster.nodes[old].stop(LIMIT).await?;
    scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    let outage = load.writers.record().outage(fault);
    ensure!(outage < AT_ONCE, "writes stood still for {outage:?}");

    scene.cluster.nodes[old].start()?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_replica_stops_nothing() -> Result<()> {
    let mut scene = Scene::start("replica", 3).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let replicas: Vec<usize> = (0..3).filter(|node| *node != leader).collect();

    // One after the other, so one of them is the synchronous standby: writes wait until another one takes its place.
    for replica in replicas {
        scene.cluster.nodes[replica].kill();
        load.writers.progress(100, LIMIT).await?;
        scene.cluster.nodes[replica].start()?;
        ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    }
    scene.finish(load).await?;
    Ok(())
}

/// Where commits wait for nobody, nothing but the lease keeps a second primary from being written to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_synchronous_replication_there_is_one_primary_and_a_handover_loses_nothing() -> Result<()> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": false, "primary_start_timeout": 0 });
    let mut scene = Scene::with("async", 1, spec).await?;
    let load = scene.load().await?;

    let first = scene.cluster.settled(LIMIT).await?;
    scene.cluster.switchover(first, None).await?;
    let second = scene.cluster.leader_other_than(first, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.cluster.settled(LIMIT).await?;

    scene.cluster.nodes[second].stop(LIMIT).await?;
    scene.cluster.leader_other_than(second, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.cluster.nodes[second].start()?;
    scene.cluster.settled(LIMIT).await?;

    scene.etcd.kill(0);
    tokio::time::sleep(Duration::from_secs(8)).await;
    scene.etcd.restart(0).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}
