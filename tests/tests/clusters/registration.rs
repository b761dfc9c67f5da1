//! `router_lease`: a new leader waits for routers that may still have sessions with the one before.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use trunkline_tests::{LIMIT, Program, Scene, Spec, rest, wait};

/// Two nodes and a router that is registered with a lease of so many seconds.
async fn registered(name: &str, lease: u64) -> Result<Scene> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs["router_lease"] = json!(lease);
    let mut scene = Scene::with(name, 1, spec).await?;
    scene.cluster.settled(LIMIT).await?;
    let admin = scene.router.ports().admin;
    let told = wait::until("the router to be registered", LIMIT, async || {
        let health = rest::get(admin, "/health").await?.body;
        ensure!(health["registered"] == true, "{health}");
        Ok(())
    });
    told.await?;
    Ok(scene)
}

/// Waits until `node` says that it is not promoted because of a router.
async fn waits_for_a_router(scene: &Scene, node: usize) -> Result<()> {
    let port = scene.cluster.nodes[node].rest_port();
    let waits = wait::until("the new leader to wait for the router", LIMIT, async || {
        let decisions = rest::get(port, "/decisions").await?.body;
        ensure!(decisions.to_string().contains("not promoted before"), "{decisions}");
        Ok(())
    });
    waits.await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_router_is_waited_for_until_it_thaws_and_a_healthy_one_is_not_noticed() -> Result<()> {
    // Longer than this test takes: what ends the wait is what the router says.
    let mut scene = registered("frozen-router", 60).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;
    // On a busy machine the other node may not answer in time, and it is refused.
    let switched = wait::until("a switchover", LIMIT, async || scene.cluster.switchover(old, None).await);
    switched.await?;
    let old = scene.cluster.settled(LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;

    scene.router.process().signal(Signal::STOP);
    scene.cluster.nodes[old].kill();
    waits_for_a_router(&scene, 1 - old).await?;
    let standby = scene.node(1 - old).query_one("SELECT pg_is_in_recovery()", LIMIT).await?;
    ensure!(standby == "t", "promoted without the router's word");
    scene.router.process().signal(Signal::CONT);
    ensure!(scene.cluster.leader(LIMIT).await? == 1 - old);
    load.writers.progress(100, LIMIT).await?;
    scene.cluster.nodes[old].start()?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_stays_frozen_is_waited_for_no_longer_than_its_lease() -> Result<()> {
    let mut scene = registered("dead-router", 3).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    scene.router.process().signal(Signal::STOP);
    scene.cluster.nodes[old].kill_postmaster()?;
    waits_for_a_router(&scene, 1 - old).await?;
    let promoted = scene.cluster.leader_other_than(old, LIMIT).await;
    scene.router.process().signal(Signal::CONT);
    ensure!(promoted? == 1 - old);
    let served = scene.read_write().query_one("SELECT pg_is_in_recovery()", LIMIT).await?;
    ensure!(served == "f", "a standby answers on the read-write port");
    scene.lab.success();
    Ok(())
}
