//! What is to happen at a time: switchover and restart.

use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::Pid;
use serde_json::{Value, json};
use trunkline_tests::{LIMIT, Scene, rest, wait};

/// A time so many seconds from now, as the REST API reads it.
async fn after(scene: &Scene, node: usize, seconds: u32) -> Result<String> {
    let sql = format!("SELECT to_json(clock_timestamp() AT TIME ZONE 'UTC' + interval '{seconds} s') #>> '{{}}'");
    Ok(scene.node(node).query_one(&sql, LIMIT).await? + "+00:00")
}

/// Whether that time is over.
async fn is_over(scene: &Scene, node: usize, at: &str) -> Result<bool> {
    Ok(scene.node(node).query_one(&format!("SELECT clock_timestamp() >= '{at}'"), LIMIT).await? == "t")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switchover_and_restart_happen_at_their_time_or_are_taken_back() -> Result<()> {
    let mut scene = Scene::start("schedule", 2).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let port = scene.cluster.nodes[old].rest_port();
    let name = |node: usize| scene.cluster.nodes[node].name().to_owned();
    let (leader, candidate) = (name(old), name(1 - old));
    let request = |at: &str| json!({ "leader": leader, "candidate": candidate, "scheduled_at": at });

    let past = "2020-01-01T00:00:00+00:00";
    let refused = rest::post(port, "/switchover", &request(past), LIMIT).await?;
    ensure!(refused.status == 422, "{refused:?}");
    let taken = rest::post(port, "/switchover", &request(&after(&scene, old, 3600).await?), LIMIT).await?;
    ensure!(taken.status == 202, "{taken:?}");
    let shown = async |there: bool| {
        wait::until(format!("the plan to be shown: {there}"), LIMIT, async || {
            let cluster = rest::get(port, "/cluster").await?.body;
            ensure!((cluster["scheduled_switchover"]["to"] == json!(candidate)) == there, "{cluster}");
            Ok(())
        })
        .await
    };
    shown(true).await?;
    ensure!(rest::delete(port, "/switchover").await?.status == 200);
    shown(false).await?;

    // The same for a restart, which is each member's own.
    let restart = |at: &str| json!({ "schedule": at });
    let replica = scene.cluster.nodes[1 - old].rest_port();
    let taken = rest::post(replica, "/restart", &restart(&after(&scene, old, 3600).await?), LIMIT).await?;
    ensure!(taken.status == 202, "{taken:?}");
    let planned = async || {
        let status = scene.cluster.nodes[1 - old].status().await?;
        ensure!(status["scheduled_restart"] != Value::Null, "{status}");
        Ok(())
    };
    wait::until("the planned restart to be shown", LIMIT, planned).await?;
    ensure!(rest::delete(replica, "/restart").await?.status == 200);

    // One that has taken place meanwhile is not done again.
    let taken = rest::post(replica, "/restart", &restart(&after(&scene, old, 3600).await?), LIMIT).await?;
    ensure!(taken.status == 202, "{taken:?}");
    let done = rest::post(replica, "/restart", &json!({}), LIMIT).await?;
    ensure!(done.status == 200, "{done:?}");
    wait::until("the planned restart to be dropped", LIMIT, async || {
        let status = scene.cluster.nodes[1 - old].status().await?;
        ensure!(status["state"] == "running" && status["scheduled_restart"] == Value::Null, "{status}");
        Ok(())
    })
    .await?;
    let postmaster = scene.cluster.nodes[1 - old].postmaster()?;

    let restart_at = after(&scene, old, 3).await?;
    let taken = rest::post(replica, "/restart", &restart(&restart_at), LIMIT).await?;
    ensure!(taken.status == 202, "{taken:?}");
    let restarted = wait::until("another postmaster", LIMIT, async || {
        let now: Pid = scene.cluster.nodes[1 - old].postmaster()?;
        ensure!(now != postmaster, "the old one is there");
        Ok(())
    });
    restarted.await?;
    ensure!(is_over(&scene, old, &restart_at).await?, "the restart was too early");
    ensure!(scene.cluster.settled(LIMIT).await? == old, "leadership moved");

    let at = after(&scene, old, 3).await?;
    let taken = rest::post(port, "/switchover", &request(&at), LIMIT).await?;
    ensure!(taken.status == 202, "{taken:?}");
    let new = scene.cluster.leader_other_than(old, LIMIT + Duration::from_secs(3)).await?;
    ensure!(is_over(&scene, new, &at).await?, "the switchover was too early");
    ensure!(scene.cluster.settled(LIMIT).await? == new);
    shown(false).await?;
    scene.lab.success();
    Ok(())
}
