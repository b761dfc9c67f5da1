//! etcd is lost, or a part of it.

use std::time::Duration;

use anyhow::{Result, ensure};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::{LIMIT, Program, Scene, Spec, wait};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_the_primary_steps_down_before_its_lease_ends_and_returns_with_it() -> Result<()> {
    let mut scene = Scene::start("dcs-lost", 3).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;

    let lost = SystemClock.now();
    scene.etcd.kill(0);
    let target = scene.node(leader);
    let read_only = wait::until("the primary to step down", LIMIT, async || {
        let answer = target.query_one("SELECT pg_is_in_recovery()", Duration::from_secs(1)).await;
        ensure!(answer.as_deref().unwrap_or("t") == "t", "it still takes writes");
        Ok(())
    });
    read_only.await?;
    let after = SystemClock.now().since(lost);
    let ttl = Duration::from_secs(scene.cluster.spec().timing.ttl.into());
    ensure!(after < ttl, "it stepped down only after {after:?}, its lease may have ended before");
    let last = load.writers.record().writes.iter().map(|write| write.acked).max();
    ensure!(last.is_some_and(|last| last.since(lost) < ttl), "a write was acknowledged after the lease");

    scene.etcd.restart(0).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_etcd_members_may_hang_or_die() -> Result<()> {
    let mut scene = Scene::with("dcs-member", 3, Spec::new(2, &Program::agent()?)).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let failures = load.writers.record().failures;

    // Each in turn, so that etcd's own leader is among them. Not for longer than a lease: an etcd leader that thaws later
    // than that, not knowing yet that it is deposed, revokes every lease it has not seen renewed (seen with 3.4.23).
    for member in 0..3 {
        scene.etcd.freeze(member);
        tokio::time::sleep(Duration::from_millis(3500)).await;
        scene.etcd.thaw(member);
        load.writers.progress(100, LIMIT).await?;
    }
    scene.etcd.kill(1);
    tokio::time::sleep(Duration::from_secs(7)).await;
    scene.etcd.restart(1).await?;
    load.writers.progress(100, LIMIT).await?;

    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    let failed = load.writers.record().failures - failures;
    ensure!(failed == 0, "{failed} statements failed");
    scene.finish(load).await?;
    Ok(())
}
