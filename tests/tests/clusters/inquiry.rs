//! What operators ask of a cluster: may this member lead, how long will writes be out, why is this setting what it is.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::cluster::Members;
use trunkline_tests::{LIMIT, Program, Scene, rest, wait};

/// Beside the agent.
fn program() -> Result<Program> {
    Ok(Program::new(Program::agent()?.path.with_file_name("trunklinectl")))
}

/// Runs `trunklinectl` with the file of a node; what it prints.
fn ctl(scene: &Scene, args: &[&str]) -> Result<String> {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program()?.path).arg("-c").arg(scene.cluster.nodes[0].config()).args(args);
    let output = command.output().context("timeout(1)")?;
    let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
    ensure!(output.status.success(), "{args:?}: {}: {text}", output.status);
    Ok(text)
}

fn rows(text: &str) -> Result<Vec<Value>> {
    serde_json::from_str(text).with_context(|| text.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_say_whether_they_may_lead_and_how_long_that_would_take() -> Result<()> {
    let mut scene = Scene::start("inquiry", 3).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let name = scene.cluster.nodes[leader].name().to_owned();
    let may = |rows: &[Value], verdict: &str| rows.iter().filter(|row| row["May lead"] == *verdict).count();

    // In synchronous mode one of the two standbys may.
    let told = rows(&ctl(&scene, &["why", "-f", "json"])?)?;
    ensure!((may(&told, "leads"), may(&told, "yes"), may(&told, "no")) == (1, 1, 1), "{told:?}");
    let refused = told.iter().find(|row| row["May lead"] == "no").context("one that may not")?;
    let verdict = refused["Verdict"].as_str().unwrap_or_default();
    ensure!(verdict.starts_with(&format!("if {name} were gone: not among the synchronous nodes")), "{verdict}");
    let text = ctl(&scene, &["why"])?;
    ensure!(text.contains(&format!("{name} leads.")) && text.contains("Synchronous: only"), "{text}");

    // One that does not answer does not keep the others from it.
    let mute = (leader + 1) % 3;
    scene.cluster.nodes[mute].kill_agent();
    let text = ctl(&scene, &["why", "-f", "tsv"])?;
    ensure!(text.contains("Is its agent running?"), "{text}");
    scene.cluster.nodes[mute].start()?;
    scene.cluster.settled(LIMIT).await?;

    let measured = async || {
        let told = ctl(&scene, &["rto"])?;
        ensure!(told.contains("Host death ≤ 5.") && !told.contains("not measured yet: renewal"), "{told}");
        Ok(())
    };
    wait::until("the round trips to be measured", LIMIT, measured).await?;
    let log = async || {
        let log = scene.cluster.nodes[leader].log()?;
        ensure!(log.contains("how long writes will be out: host death ≤ 5."), "not yet");
        Ok(())
    };
    wait::until("the line in the log", LIMIT, log).await?;
    scene.lab.success();
    Ok(())
}

/// One line with its reason in the log, the same words in `GET /decisions`, and a count in `GET /metrics`.
async fn told(scene: &Scene, node: usize, reason: &str, counted: (&str, &str)) -> Result<()> {
    let node = &scene.cluster.nodes[node];
    let told = async || {
        let log = node.log()?;
        let line = log.lines().find(|line| line.contains(reason)).context("not in the log")?;
        let decisions = rest::get(node.rest_port(), "/decisions").await?.body;
        let mut reasons = decisions.as_array().into_iter().flatten().filter_map(|noted| noted["reason"].as_str());
        ensure!(reasons.any(|noted| noted.contains(reason) && line.contains(noted)), "{line} is not in {decisions}");
        let metrics = rest::get(node.rest_port(), "/metrics").await?.body;
        let metrics = metrics.as_str().context("no text")?;
        let (kind, cause) = counted;
        let labels = format!("name=\"{}\",kind=\"{kind}\",reason=\"{cause}\"}} ", node.name());
        let count = metrics.lines().find_map(|line| line.split_once(&labels)).map(|(_, count)| count.trim());
        ensure!(count.is_some_and(|count| count != "0"), "{labels} is not in {metrics}");
        Ok(())
    };
    wait::until(format!("{} to say: {reason}", node.name()), LIMIT, told).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_failover_and_demotion_has_a_line_an_entry_and_a_count() -> Result<()> {
    let mut scene = Scene::start("reasons", 3).await?;
    let load = scene.load().await?;
    let first = scene.cluster.settled(LIMIT).await?;
    let document = rest::get(scene.cluster.nodes[first].rest_port(), "/cluster").await?.body;
    let members = Members::read(&document)?;
    let standby = members.0.iter().find(|member| member.role == "sync_standby").context("a synchronous standby")?;
    let standby = scene.cluster.find(&standby.name)?;

    // The only one that may lead stands still, and the third one says why it doesn't.
    scene.cluster.nodes[standby].freeze();
    scene.cluster.nodes[first].kill();
    let refused =
        told(&scene, 3 - first - standby, "not among the synchronous nodes (", ("abstain", "no_leader")).await;
    scene.cluster.nodes[standby].thaw();
    refused?;
    told(&scene, standby, "no other member could lead", ("acquire", "no_leader")).await?;
    told(&scene, standby, "holding the leader key", ("promote", "leader_key")).await?;
    scene.cluster.nodes[first].start()?;
    scene.cluster.settled(LIMIT).await?;

    scene.cluster.nodes[standby].kill_postmaster()?;
    told(&scene, standby, "PostgreSQL is down, and node", ("release", "postgresql_down")).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    scene.etcd.kill(0);
    told(&scene, leader, "demoting self because DCS is not accessible and I was a leader", ("demote", "dcs_away"))
        .await?;
    scene.etcd.restart(0).await?;
    scene.finish(load).await?;
    Ok(())
}

/// What `trunklinectl rto` says beside what clients see. A busy machine makes everything late, so the figures are printed,
/// and only those that nothing explains are an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outages_that_clients_see_are_those_that_were_told() -> Result<()> {
    const BUSY: Duration = Duration::from_secs(5);
    let mut scene = Scene::start("rto", 3).await?;
    let load = scene.load().await?;
    // The first one measures how long stop and promotion take here.
    for fault in ["", "switchover", "postmaster_death", "host_death"] {
        let old = scene.cluster.settled(LIMIT).await?;
        let port = scene.cluster.nodes[old].rest_port();
        let told = wait::until("the round trips to be measured", LIMIT, async || {
            let told = rest::get(port, "/rto").await?.body;
            ensure!(!told["estimate"].to_string().contains("renewal"), "{told}");
            Ok(told["estimate_ms"][fault].as_f64().unwrap_or_default())
        });
        let told = Duration::from_secs_f64(told.await? / 1000.0);
        let began = SystemClock.now();
        match fault {
            "host_death" => scene.cluster.nodes[old].kill(),
            "postmaster_death" => scene.cluster.nodes[old].kill_postmaster()?,
            _ => scene.cluster.switchover(old, None).await?,
        }
        scene.cluster.leader_other_than(old, LIMIT).await?;
        load.writers.progress(100, LIMIT).await?;
        if fault == "host_death" {
            scene.cluster.nodes[old].start()?;
        }
        if !fault.is_empty() {
            let outage = load.writers.record().outage(began);
            println!("{fault}: told {told:.2?}, seen {outage:.2?}");
            ensure!(outage < told + BUSY, "{fault}: {told:?} was told, but it took {outage:?}");
            ensure!(
                fault != "host_death" || outage > told / 2,
                "{fault}: {told:?} was told, but it took only {outage:?}"
            );
        }
    }
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_are_explained_with_what_postgresql_says() -> Result<()> {
    let mut scene = Scene::start("explain", 2).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let member = scene.cluster.nodes[leader].name().to_owned();
    let explain = |key: &str| -> Result<Value> {
        let told = ctl(&scene, &["config", "explain", key, "-m", &member, "-f", "json"])?;
        Ok(rows(&told)?.swap_remove(0))
    };
    let told = explain("max_connections")?;
    ensure!(told["from"] == "Patroni's default" && told["postgresql"]["source"] == "command line", "{told}");

    let parameters = json!({"work_mem": "5MB", "max_connections": 120, "port": 1});
    scene.cluster.patch_config(&json!({"postgresql": {"parameters": parameters}})).await?;
    let pending = async || {
        let told = explain("max_connections")?;
        let notes = told["postgresql"]["notes"].to_string();
        ensure!(told["value"] == "120" && notes.contains("waits for a restart of PostgreSQL: 100 -> 120"), "{told}");
        Ok(())
    };
    wait::until("the pending restart to be explained", LIMIT, pending).await?;
    let told = explain("work_mem")?;
    ensure!(told["from"] == "dynamic configuration" && told["postgresql"]["value"] == "5MB", "{told}");
    ensure!(explain("port")?["from"] == "Trunkline", "the port is the agent's");

    let client = scene.node(leader).connect(LIMIT).await?;
    client.batch_execute("ALTER SYSTEM SET work_mem = '7MB'").await?;
    client.batch_execute("SELECT pg_reload_conf()").await?;
    let altered = async || {
        let told = explain("work_mem")?;
        let notes = told["postgresql"]["notes"].to_string();
        ensure!(told["postgresql"]["value"] == "7MB" && notes.contains("ALTER SYSTEM wins"), "{told}");
        Ok(())
    };
    wait::until("ALTER SYSTEM to be named", LIMIT, altered).await?;

    let text = ctl(&scene, &["config", "explain", "ttl"])?;
    ensure!(text.contains("ttl on ") && text.contains("bootstrap.dcs"), "{text}");

    // One name that PostgreSQL does not know would keep it from taking anything else from its files.
    let parameters = json!({"no_such_setting": 1, "temp_buffers": "lots", "maintenance_work_mem": "77MB"});
    let change = json!({"synchronous_mode": false, "postgresql": {"parameters": parameters}});
    scene.cluster.patch_config(&change).await?;
    wait::until("what can be used to be in force", LIMIT, async || {
        let asked = "SELECT current_setting('maintenance_work_mem') || current_setting('synchronous_standby_names')";
        let told = scene.node(leader).query_one(asked, LIMIT).await?;
        ensure!(told == "77MB", "{told}");
        Ok(())
    })
    .await?;
    let told = explain("temp_buffers")?;
    ensure!(told["layers"][0]["verdict"] == "no effect: PostgreSQL does not accept it", "{told}");
    let log = scene.cluster.nodes[leader].says("PostgreSQL rejects", LIMIT).await?;
    ensure!(log.contains("no_such_setting"), "{log}");
    scene.lab.success();
    Ok(())
}

/// Rules of access are in force as soon as the server has read them, whichever way they come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edits_of_pg_hba_and_pg_ident_are_in_force_after_a_reload() -> Result<()> {
    let mut scene = Scene::start("access", 1).await?;
    scene.node(0).execute("CREATE USER app PASSWORD 'secret'", LIMIT).await?;
    let (dir, port) = (scene.cluster.nodes[0].dir().to_owned(), scene.cluster.nodes[0].port());
    let psql = Program::new(scene.lab.tools().postgres_bin.join("psql"));
    let lab = scene.lab.clone();
    let connect = |host: &str| -> Result<String> {
        let to = format!("host={host} port={port} user=app dbname=postgres connect_timeout=10");
        let mut command = lab.command(&psql, &dir)?;
        command.env("PGPASSWORD", "secret").args(["-X", "-w", "-A", "-t", "-c", "SELECT current_user", "-d", &to]);
        let output = command.output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned())
    };
    let says = async |host: &str, expected: &str| {
        wait::until(format!("{expected} from {host}"), LIMIT, async || {
            let said = connect(host)?;
            ensure!(said.contains(expected), "{said}");
            Ok(())
        })
        .await
    };
    let sockets = dir.display().to_string();
    says("127.0.0.1", "app").await?;

    // By the file: refused over TCP, and by the name of the operating system's user over the socket.
    let node = &mut scene.cluster.nodes[0];
    let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
    let rules = config["postgresql"]["pg_hba"].as_array_mut().context("no pg_hba")?;
    rules.insert(0, json!("host all app 127.0.0.1/32 reject"));
    rules.insert(0, json!("local all app peer map=lab"));
    node.configure(&config.to_string())?;
    let answer = rest::post(node.rest_port(), "/reload", &json!({}), LIMIT).await?;
    ensure!(answer.status == 202, "{answer:?}");
    says("127.0.0.1", "pg_hba.conf rejects connection").await?;
    says(&sockets, "Peer authentication failed").await?;

    // By the dynamic configuration.
    scene.cluster.patch_config(&json!({ "postgresql": { "pg_ident": ["lab /^.*$ app"] } })).await?;
    says(&sockets, "app").await?;
    scene.cluster.patch_config(&json!({ "postgresql": { "pg_ident": ["lab nobody-of-that-name app"] } })).await?;
    says(&sockets, "Peer authentication failed").await?;
    scene.lab.success();
    Ok(())
}
