//! Restarts that an operator asks for.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use trunkline_tests::{LIMIT, Scene, rest, wait};

/// Changes `pause`, and waits until every member has heard of it.
async fn pause(scene: &Scene, pause: Value) -> Result<()> {
    scene.cluster.patch_config(&json!({ "pause": pause })).await?;
    for node in &scene.cluster.nodes {
        wait::until(format!("{} to hear of pause {pause}", node.name()), LIMIT, async || {
            let status = node.status().await?;
            ensure!(status["pause"] == pause, "{status}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_was_stopped_in_a_pause_is_restarted_as_one() -> Result<()> {
    let mut scene = Scene::start("restart-paused", 2).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let (node, primary) = (&scene.cluster.nodes[leader], scene.node(leader));
    primary.execute("CREATE TABLE t AS SELECT 1 AS n", LIMIT).await?;
    pause(&scene, json!(true)).await?;

    rustix::process::kill_process(node.postmaster()?, Signal::INT)?;
    wait::until("the leader key to be free", LIMIT, async || {
        let (status, cluster) = (node.status().await?, rest::get(node.rest_port(), "/cluster").await?.body);
        ensure!(status["state"] == "stopped" && !cluster.to_string().contains("\"leader\""), "{status}, {cluster}");
        Ok(())
    })
    .await?;
    for other in
        [json!({ "role": "replica" }), json!({ "restart_pending": true }), json!({ "postgres_version": "99.0" })]
    {
        let refused = rest::post(node.rest_port(), "/restart", &other, LIMIT).await?;
        ensure!(refused.status == 503, "{other}: {refused:?}");
    }
    let answer = rest::post(node.rest_port(), "/restart", &json!({ "role": "primary" }), LIMIT).await?;
    ensure!(answer.status == 200, "{answer:?}");

    primary.execute("INSERT INTO t VALUES (2)", LIMIT).await?;
    wait::until("it to lead again", LIMIT, async || {
        ensure!(node.health("/primary").await == Some(200), "not yet");
        Ok(())
    })
    .await?;
    pause(&scene, Value::Null).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    let status = scene.cluster.nodes[leader].status().await?;
    ensure!(status["timeline"] == 1, "it was promoted: {status}");
    scene.read_write().execute("INSERT INTO t VALUES (3)", LIMIT).await?;
    scene.lab.success();
    Ok(())
}
