//! The agent dies or is replaced while PostgreSQL goes on.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use trunkline_tests::{LIMIT, Scene, rest, wait};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_agent_takes_over_a_running_postgresql() -> Result<()> {
    let mut scene = Scene::start("takeover", 2).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let failures = load.writers.record().failures;

    for node in [leader, 1 - leader] {
        let before = scene.cluster.nodes[node].postmaster()?;
        scene.cluster.nodes[node].kill_agent();
        ensure!(scene.cluster.nodes[node].postmaster()? == before, "PostgreSQL ended with its agent");
        scene.cluster.nodes[node].start()?;
        let path = if node == leader { "/primary" } else { "/replica" };
        let up = wait::until("the new agent to know its role", LIMIT, async || {
            let status = scene.cluster.nodes[node].health(path).await;
            ensure!(status == Some(200), "GET {path} is {status:?}");
            Ok(())
        });
        up.await?;
        ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
        ensure!(scene.cluster.nodes[node].postmaster()? == before, "PostgreSQL was restarted");
    }
    load.writers.progress(100, LIMIT).await?;
    let failed = load.writers.record().failures - failures;
    ensure!(failed == 0, "{failed} statements failed");
    scene.finish(load).await?;
    Ok(())
}

/// Nobody renews the lease any more, so another node takes over although PostgreSQL is well; the old one, which knows
/// nothing of it, must not get a write acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_agent_is_failed_over_and_its_postgresql_taken_back() -> Result<()> {
    let mut scene = Scene::start("orphan", 3).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    scene.cluster.nodes[leader].kill_agent();
    let new = scene.cluster.leader_other_than(leader, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.cluster.nodes[leader].start()?;
    ensure!(scene.cluster.settled(LIMIT).await? == new, "leadership moved");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_finds_data_of_another_cluster_stops_its_primary_and_ends() -> Result<()> {
    let mut scene = Scene::start("foreign", 1).await?;
    let node = scene.cluster.settled(LIMIT).await?;
    scene.cluster.nodes[node].kill_agent();
    // initialize = 7000000000000000001, by etcd's JSON gateway.
    let endpoint = scene.etcd.endpoints().swap_remove(0);
    let port: u16 = endpoint.rsplit_once(':').context("a port")?.1.parse()?;
    let put = json!({ "key": "L3NlcnZpY2UvZGVtby9pbml0aWFsaXpl", "value": "NzAwMDAwMDAwMDAwMDAwMDAwMQ==" });
    let answer = rest::post(port, "/v3/kv/put", &put, LIMIT).await?;
    ensure!(answer.status == 200, "{}", answer.body);

    scene.cluster.nodes[node].start()?;
    let ended = wait::until("the agent to end", LIMIT, async || {
        ensure!(!scene.cluster.nodes[node].is_running(), "it still runs");
        Ok(())
    });
    ended.await?;
    ensure!(scene.cluster.nodes[node].postmaster().is_err(), "its primary goes on without it");
    scene.lab.success();
    Ok(())
}
