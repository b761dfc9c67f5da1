//! Planned changes of the leader.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::{LIMIT, Program, Scene, Spec, rest, wait};

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
        ensure!(outage < Duration::from_millis(3500), "writes stood still for {outage:?} in turn {turn}");
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

/// What an operator may ask for by hand and what not: a node that commits do not wait for, none that is down or may never
/// lead, and somebody where nobody leads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manual_failover_goes_to_whoever_is_named_and_can_lead() -> Result<()> {
    let mut scene = Scene::start("manual", 3).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let mut other = None;
    for node in (0..3).filter(|node| *node != leader) {
        if scene.cluster.nodes[node].health("/async").await == Some(200) {
            other = Some(node);
        }
    }
    let other = other.context("no asynchronous standby")?;
    let third = 3 - leader - other;
    let failover = async |scene: &Scene, at: usize, to: usize| {
        let body = json!({ "candidate": scene.cluster.nodes[to].name() });
        rest::post(scene.cluster.nodes[at].rest_port(), "/failover", &body, LIMIT).await
    };
    let answer = failover(&scene, leader, other).await?;
    ensure!(answer.status == 200, "to an asynchronous node: {answer:?}");
    ensure!(scene.cluster.settled(LIMIT).await? == other, "somebody else leads");

    let node = &mut scene.cluster.nodes[third];
    let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
    config["tags"] = json!({ "nofailover": true });
    node.configure(&config.to_string())?;
    ensure!(rest::post(node.rest_port(), "/reload", &json!({}), LIMIT).await?.status == 202);
    wait::until("its tag", LIMIT, async || {
        let status = scene.cluster.nodes[third].status().await?;
        ensure!(status["tags"]["nofailover"] == true, "{status}");
        Ok(())
    })
    .await?;
    let refused = "failover is not possible: no good candidates have been found";
    let answer = failover(&scene, other, third).await?;
    ensure!((answer.status, answer.body.as_str()) == (412, Some(refused)), "to one that may not lead: {answer:?}");

    scene.cluster.nodes[leader].kill();
    let answer = failover(&scene, other, leader).await?;
    ensure!((answer.status, answer.body.as_str()) == (412, Some(refused)), "to a dead one: {answer:?}");
    ensure!(scene.cluster.settled(LIMIT).await? == other, "leadership moved");

    // Nobody leads, and in a pause nobody comes forward by himself.
    scene.cluster.nodes[leader].start()?;
    scene.cluster.settled(LIMIT).await?;
    scene.cluster.patch_config(&json!({ "pause": true })).await?;
    wait::until("the pause", LIMIT, async || {
        ensure!(scene.cluster.nodes[leader].status().await?["pause"] == true);
        Ok(())
    })
    .await?;
    scene.cluster.nodes[other].kill();
    wait::until("the leader key to run out", LIMIT, async || {
        let document = rest::get(scene.cluster.nodes[leader].rest_port(), "/cluster").await?.body;
        ensure!(!document.to_string().contains(r#""role":"leader""#), "{document}");
        Ok(())
    })
    .await?;
    let answer = failover(&scene, third, leader).await?;
    ensure!(answer.status == 200, "without a leader: {answer:?}");
    ensure!(scene.cluster.leader(LIMIT).await? == leader, "somebody else leads");
    scene.lab.success();
    Ok(())
}

/// A session through the read-write port, and how it ended.
async fn session(scene: &Scene) -> Result<(Client, JoinHandle<Result<(), tokio_postgres::Error>>)> {
    let mut config = Config::new();
    let port = scene.router.ports().read_write;
    config.host("127.0.0.1").port(port).user("postgres").password(&scene.cluster.spec().password);
    let (client, connection) = tokio::time::timeout(LIMIT, config.connect(NoTls)).await??;
    Ok((client, tokio::spawn(connection)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_in_flight_end_and_idle_sessions_lose_nothing() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs["switchover_grace"] = json!(30);
    let mut scene = Scene::with("in-flight", 1, spec).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let (idle, idle_ended) = session(&scene).await?;
    idle.batch_execute("CREATE TABLE rows (n int)").await?;
    let (writer, writer_ended) = session(&scene).await?;
    writer.batch_execute("BEGIN; INSERT INTO rows VALUES (1)").await?;
    let work = async {
        // The router has been told once the idle session is over; the other one goes on.
        let ended = tokio::time::timeout(LIMIT, idle_ended).await??;
        let why = ended.err().and_then(|error| error.code().cloned());
        ensure!(why == Some(SqlState::ADMIN_SHUTDOWN), "the idle session ended with {why:?}");
        writer.batch_execute("INSERT INTO rows VALUES (2); COMMIT").await?;
        let ended = tokio::time::timeout(LIMIT, writer_ended).await??;
        let why = ended.err().and_then(|error| error.code().cloned());
        ensure!(why == Some(SqlState::ADMIN_SHUTDOWN), "the writer ended with {why:?}");
        Ok(())
    };
    let (switched, worked) = tokio::join!(scene.cluster.switchover(old, None), work);
    worked?;
    switched?;
    let (reader, _) = session(&scene).await?;
    let rows: i64 = reader.query_one("SELECT count(*) FROM rows", &[]).await?.get(0);
    ensure!(rows == 2, "{rows} rows");
    // A client that has been told is given a moment to go.
    let counted = wait::until("both sessions to be counted", LIMIT, async || {
        let metrics = rest::get(scene.router.ports().admin, "/metrics").await?.body;
        let metrics = metrics.as_str().unwrap_or_default();
        ensure!(metrics.contains(",port=\"read-write\",reason=\"switchover\"} 2"), "{metrics}");
        Ok(())
    });
    counted.await?;
    scene.lab.success();
    Ok(())
}
