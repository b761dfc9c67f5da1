//! A deposed primary whose history went another way.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use trunkline_tests::{LIMIT, Program, Scene, Spec, wait};

/// The old primary has rows that nobody else got. It must lose them and follow, by pg_rewind: its data directory stays
/// the same one, which a new copy would not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diverged_primary_is_rewound_and_follows() -> Result<()> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": false, "primary_start_timeout": 0 });
    let mut scene = Scene::with("rewind", 1, spec).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let short = Duration::from_secs(5);
    scene.node(old).execute("CREATE TABLE t (who text)", short).await?;
    let others: Vec<usize> = (0..3).filter(|node| *node != old).collect();
    for node in &others {
        let target = scene.node(*node);
        let copied = async || target.query_one("SELECT count(*) FROM t", short).await;
        wait::until("the table on a replica", LIMIT, copied).await?;
    }
    // Killed, not frozen: what the primary sends to a frozen one waits in its sockets and arrives after all.
    others.iter().for_each(|node| scene.cluster.nodes[*node].kill());
    scene.node(old).execute("INSERT INTO t SELECT 'lost' FROM generate_series(1, 1000); CHECKPOINT", short).await?;
    scene.cluster.nodes[old].kill();
    for node in &others {
        scene.cluster.nodes[*node].start()?;
    }

    let new = scene.cluster.leader_other_than(old, LIMIT).await?;
    // The router holds this until the new leader takes writes; `GET /primary` is 200 a moment before.
    scene.read_write().execute("INSERT INTO t VALUES ('kept')", LIMIT).await?;
    let version_file = scene.cluster.nodes[old].data_dir().join("PG_VERSION");
    let before = version_file.metadata().context("the data directory is gone")?.ino();

    scene.cluster.nodes[old].start()?;
    ensure!(scene.cluster.settled(LIMIT).await? == new, "leadership moved");
    let target = scene.node(old);
    let rows = wait::until("the new row on the old primary", LIMIT, async || {
        let rows = target.query_one("SELECT string_agg(who, ',') FROM t", short).await?;
        ensure!(rows == "kept", "it has {rows:.60}");
        Ok(())
    });
    rows.await?;
    let after = version_file.metadata().context("the data directory is gone")?.ino();
    ensure!(before == after, "the data directory was made anew instead of rewound");
    scene.lab.success();
    Ok(())
}

/// Where pg_rewind can't work the copy is made anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_node_is_cloned_again() -> Result<()> {
    let mut scene = Scene::start("clone", 2).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let replica = &mut scene.cluster.nodes[1 - leader];
    replica.kill();
    let data = replica.data_dir();
    std::fs::remove_dir_all(&data).with_context(|| format!("{}", data.display()))?;
    replica.start()?;
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    scene.finish(load).await?;
    Ok(())
}
