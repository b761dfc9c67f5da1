//! The agent dies or is replaced while PostgreSQL goes on.

use anyhow::{Result, ensure};
use trunkline_tests::{LIMIT, Scene, wait};

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
