//! Planned changes of the leader.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::{LIMIT, Scene, rest};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_and_back_under_load() -> Result<()> {
    let mut scene = Scene::start("switchover", 2).await?;
    let load = scene.load().await?;
    for turn in 0..4 {
        let old = scene.cluster.settled(LIMIT).await?;
        let new = 1 - old;
        let asked = SystemClock.now();
        // Without and with a named candidate.
        scene.cluster.switchover(old, (turn % 2 == 0).then_some(new)).await?;
        ensure!(scene.cluster.leader(LIMIT).await? == new, "the wrong node leads after turn {turn}");
        load.writers.progress(100, LIMIT).await?;
        let outage = load.writers.record().outage(asked);
        ensure!(outage < Duration::from_millis(2500), "writes stood still for {outage:?} in turn {turn}");
        ensure!(scene.cluster.settled(LIMIT).await? == new, "leadership moved again after turn {turn}");
    }
    let history = rest::get(scene.cluster.nodes[0].rest_port(), "/history").await?.body;
    ensure!(history.as_array().is_some_and(|lines| lines.len() >= 4), "the history is {history}");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_and_changes_nothing() -> Result<()> {
    let mut scene = Scene::start("refusals", 2).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let (name, other) = (scene.cluster.nodes[leader].name(), scene.cluster.nodes[1 - leader].name());
    let port = scene.cluster.nodes[leader].rest_port();
    for (path, body, status) in [
        ("/switchover", json!({}), 400),
        ("/switchover", json!({ "candidate": other }), 400),
        ("/switchover", json!({ "leader": name, "candidate": name }), 400),
        ("/switchover", json!({ "leader": other }), 412),
        ("/switchover", json!({ "leader": name, "candidate": "stranger" }), 412),
        ("/failover", json!({ "leader": null }), 400),
    ] {
        let answer = rest::post(port, path, &body, LIMIT).await?;
        ensure!(answer.status == status, "POST {path} {body} is {}: {}", answer.status, answer.body);
    }
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    scene.lab.success();
    Ok(())
}
