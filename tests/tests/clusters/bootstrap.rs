//! Three empty nodes become one cluster.

use std::time::Duration;

use anyhow::{Result, ensure};
use trunkline_tests::{LIMIT, Scene, rest, wait};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_nodes_become_one_leader_and_streaming_replicas() -> Result<()> {
    let mut scene = Scene::start("bootstrap", 3).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let replicas: Vec<usize> = (0..3).filter(|node| *node != leader).collect();

    let short = Duration::from_secs(5);
    scene.node(leader).execute("CREATE TABLE t AS SELECT 42 AS answer", short).await?;
    for replica in &replicas {
        let target = scene.node(*replica);
        let answer = wait::until("the table on a replica", short, async || {
            target.query_one("SELECT answer FROM t", short).await
        });
        ensure!(answer.await? == "42");
        ensure!(target.query_one("SELECT pg_is_in_recovery()", short).await? == "t");
        let write = target.execute("INSERT INTO t VALUES (1)", short).await;
        ensure!(write.is_err(), "a replica took a write");
    }

    let mut systems = Vec::new();
    for node in 0..3 {
        let sql = "SELECT system_identifier FROM pg_control_system()";
        systems.push(scene.node(node).query_one(sql, short).await?);
    }
    ensure!(systems.iter().all(|system| *system == systems[0]), "not one cluster: {systems:?}");

    let slots = "SELECT string_agg(slot_name, ',' ORDER BY slot_name) FROM pg_replication_slots WHERE active";
    let expected: Vec<&str> = replicas.iter().map(|node| scene.cluster.nodes[*node].name()).collect();
    let found = wait::until("a slot for each replica", LIMIT, async || {
        let slots = scene.node(leader).query_one(slots, short).await?;
        ensure!(slots == expected.join(","), "slots are {slots}");
        Ok(())
    });
    found.await?;

    for (node, expected) in [(leader, 200), (replicas[0], 503), (replicas[1], 503)] {
        let answer = rest::get(scene.cluster.nodes[node].rest_port(), "/primary").await?;
        ensure!(answer.status == expected, "GET /primary of node {node} is {}", answer.status);
        let answer = rest::get(scene.cluster.nodes[node].rest_port(), "/replica").await?;
        ensure!((answer.status == 200) == (node != leader), "GET /replica of node {node} is {}", answer.status);
    }
    scene.lab.success();
    Ok(())
}
