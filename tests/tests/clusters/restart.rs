//! Restarts that an operator asks for.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::{LIMIT, Node, Program, Scene, Spec, rest, wait};

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

/// Changes a running node's file.
async fn reload(node: &mut Node, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut config = serde_json::from_slice(&std::fs::read(node.config())?)?;
    change(&mut config);
    node.configure(&config.to_string())?;
    let reloads = |log: &str| log.matches("reloaded the configuration").count();
    let before = reloads(&node.log()?);
    node.agent().context("no agent")?.signal(Signal::HUP);
    wait::until("the reload", LIMIT, async || {
        ensure!(reloads(&node.log()?) > before, "the log does not say so");
        Ok(())
    })
    .await
}

/// Restarts without conditions; returns the new postmaster.
async fn restart(node: &Node) -> Result<Pid> {
    let before = node.postmaster()?;
    let answer = rest::post(node.rest_port(), "/restart", &json!({}), LIMIT).await?;
    ensure!(answer.status == 200, "{answer:?}");
    let after = node.postmaster()?;
    ensure!(before != after, "the postmaster is the same");
    Ok(after)
}

/// `before_stop` takes longer than PostgreSQL may to stop, and takes nothing of that. A stop that waits for a standby which says
/// nothing ends with its time, in a restart and with the agent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_has_the_time_that_primary_stop_timeout_gives_it() -> Result<()> {
    const CUT_SHORT: &str = "the fast stop was not done in time, stopping at once";
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": true, "primary_start_timeout": 300, "primary_stop_timeout": 5 });
    let mut scene = Scene::with("restart-stop", 1, spec).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    reload(&mut scene.cluster.nodes[leader], |config| config["postgresql"]["before_stop"] = json!("sleep 6")).await?;
    restart(&scene.cluster.nodes[leader]).await?;
    let log = scene.cluster.nodes[leader].log()?;
    ensure!(!log.contains(CUT_SHORT), "{log}");
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    reload(&mut scene.cluster.nodes[leader], |config| config["postgresql"]["before_stop"] = Value::Null).await?;

    scene.cluster.nodes[1 - leader].freeze();
    restart(&scene.cluster.nodes[leader]).await?;
    scene.cluster.nodes[leader].says(CUT_SHORT, LIMIT).await?;
    let asked = SystemClock.now();
    scene.cluster.nodes[leader].stop(LIMIT).await?;
    let took = SystemClock.now().since(asked);
    ensure!(took < Duration::from_secs(40), "the agent ended after {took:?}");
    scene.cluster.nodes[1 - leader].thaw();
    scene.cluster.nodes[leader].start()?;
    scene.cluster.settled(LIMIT).await?;
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_is_restarted_and_a_start_that_goes_on_is_told() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": true, "primary_stop_timeout": 2 });
    let mut scene = Scene::with("restart-hang", 1, spec).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let node = &scene.cluster.nodes[1 - leader];
    rustix::process::kill_process(node.postmaster()?, Signal::STOP)?;
    wait::until("the agent to notice", LIMIT, async || {
        ensure!(node.log()?.contains("PostgreSQL does not answer"), "the log does not say so");
        Ok(())
    })
    .await?;
    restart(node).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");

    // As a standby it looks into the archive before it lets anybody in.
    let node = &mut scene.cluster.nodes[1 - leader];
    let slow = json!({ "restore_command": "sh -c 'sleep 5; false'" });
    reload(node, |config| config["postgresql"]["recovery_conf"] = slow).await?;
    let answer = rest::post(node.rest_port(), "/restart", &json!({ "timeout": 1 }), LIMIT).await?;
    let told = answer.body.as_str().unwrap_or_default();
    ensure!(answer.status == 503 && told.contains("starting PostgreSQL") && told.ends_with("it goes on"), "{answer:?}");
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    scene.lab.success();
    Ok(())
}

/// What PostgreSQL or the agent takes at its start only waits for that, and the leader goes on as it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edit_that_takes_a_restart_does_not_end_a_leader() -> Result<()> {
    let mut scene = Scene::start("restart-edit", 2).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let (old, new) = (scene.cluster.nodes[leader].port(), scene.lab.port()?);
    let member = async |scene: &Scene| {
        let cluster = rest::get(scene.cluster.nodes[1 - leader].rest_port(), "/cluster").await?.body;
        let members = cluster["members"].as_array().context("members")?;
        ensure!(members.len() == 2, "{cluster}");
        let name = scene.cluster.nodes[leader].name();
        let member = members.iter().find(|member| member["name"] == name).cloned().context("the member")?;
        ensure!(member["role"] == "leader" && member["state"] == "running", "{member}");
        anyhow::Ok(member)
    };
    let api = member(&scene).await?["api_url"].clone();

    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let listen = format!("127.0.0.1:{new}");
    reload(&mut scene.cluster.nodes[leader], |config| {
        (config["name"], config["scope"], config["namespace"]) = (json!("other"), json!("other"), json!("other"));
        config["restapi"]["listen"] = json!(taken.local_addr().map(|address| address.to_string()).unwrap_or_default());
        config["restapi"]["connect_address"] = config["restapi"]["listen"].clone();
        let section = &mut config["postgresql"];
        (section["listen"], section["connect_address"]) = (json!(listen), json!(listen));
        for key in ["data_dir", "config_dir", "pgpass"] {
            section[key] = json!("/tmp/nowhere/else");
        }
    })
    .await?;
    for key in ["scope", "name", "namespace", "postgresql.data_dir", "postgresql.config_dir", "postgresql.pgpass"] {
        let told = format!("{key} has changed, which takes effect when the agent is restarted");
        scene.cluster.nodes[leader].says(&told, LIMIT).await?;
    }
    scene.cluster.nodes[leader].says("the REST API keeps its old settings", LIMIT).await?;
    let reason = wait::until("the port to wait for a restart", LIMIT, async || {
        let status = scene.cluster.nodes[leader].status().await?;
        ensure!(status["pending_restart"] == true, "{status}");
        Ok(status["pending_restart_reason"].clone())
    })
    .await?;
    ensure!(reason == json!({ "port": { "old_value": old.to_string(), "new_value": new.to_string() } }), "{reason}");
    let told = member(&scene).await?;
    ensure!(told["port"] == old && told["api_url"] == api, "{told}");
    scene.read_write().execute("CREATE TABLE t (i int)", LIMIT).await?;

    restart(&scene.cluster.nodes[leader]).await?;
    wait::until("the new port", LIMIT, async || {
        let told = member(&scene).await?;
        ensure!(told["port"] == new && told["pending_restart"] != true, "{told}");
        Ok(())
    })
    .await?;
    scene.read_write().execute("INSERT INTO t VALUES (1)", LIMIT).await?;
    let status = scene.cluster.nodes[leader].status().await?;
    ensure!(status["timeline"] == 1, "it was promoted: {status}");
    scene.lab.success();
    Ok(())
}

/// What could not be written is written as soon as it can be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_could_not_be_written_is_tried_again() -> Result<()> {
    const FAILED: &str = "PostgreSQL's configuration could not be applied";
    let mut spec = Spec::new(1, &Program::agent()?);
    spec.dcs = json!({});
    let mut scene = Scene::with("restart-unwritten", 1, spec).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let blocked = scene.cluster.nodes[leader].data_dir().join("postgresql.trunkline.tmp");
    std::fs::create_dir(&blocked)?;
    reload(&mut scene.cluster.nodes[leader], |config| {
        config["postgresql"]["parameters"]["work_mem"] = json!("12MB");
    })
    .await?;
    scene.cluster.nodes[leader].says(FAILED, LIMIT).await?;
    std::fs::remove_dir(&blocked)?;
    let log = wait::until("the setting", LIMIT, async || {
        let work_mem = scene.node(leader).query_one("SHOW work_mem", LIMIT).await?;
        ensure!(work_mem == "12MB", "{work_mem}");
        scene.cluster.nodes[leader].log()
    })
    .await?;
    ensure!(log.matches(FAILED).count() == 1, "told more than once: {log}");
    scene.lab.success();
    Ok(())
}
