//! Programs of the operator's that the agent runs: callbacks, `post_bootstrap`, `pre_promote`, `before_stop`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Scene, Spec, rest, wait};

/// Appends its arguments to the file that is the first of them.
const NOTE: &str = "sh -c 'file=$1; shift; echo \"$@\" >> \"$file\"' note";

/// What was noted of a node.
struct Notes(PathBuf);

impl Notes {
    fn lines(&self) -> Vec<String> {
        std::fs::read_to_string(&self.0).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// Waits until these lines are there in this order, whatever stands between them, and forgets all.
    async fn are(&self, expected: &[&str]) -> Result<()> {
        wait::until(format!("{expected:?}"), LIMIT, async || {
            let lines = self.lines();
            let mut rest = lines.iter();
            ensure!(expected.iter().all(|line| rest.any(|found| found == line)), "{} has {lines:?}", self.0.display());
            Ok(())
        })
        .await?;
        std::fs::write(&self.0, "")?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_operators_programs_are_run_at_their_moments_and_pre_promote_can_refuse() -> Result<()> {
    let lab = Lab::new("hooks")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), Spec::new(2, &Program::agent()?))?;
    let mut notes = Vec::new();
    for node in &mut cluster.nodes {
        let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
        let file = node.dir().join("notes");
        let note = format!("{NOTE} {}", file.display());
        let events = ["on_start", "on_stop", "on_restart", "on_reload", "on_role_change"];
        config["postgresql"]["callbacks"] = events.iter().map(|event| (*event, note.as_str())).collect();
        config["postgresql"]["before_stop"] = format!("{note} before_stop").into();
        let veto = node.dir().join("veto");
        config["postgresql"]["pre_promote"] = format!("sh -c 'test ! -e {}'", veto.display()).into();
        // It is given a connection string, and the passwords of it by PGPASSFILE.
        let psql = "psql -X -d \"$1\" -c \"CREATE TABLE made AS SELECT 1 AS n\"";
        config["bootstrap"]["post_bootstrap"] = format!("sh -c '{psql}' post_bootstrap").into();
        node.configure(&config.to_string())?;
        notes.push(Notes(file));
    }
    for node in &mut cluster.nodes {
        node.start()?;
    }
    let leader = cluster.settled(LIMIT).await?;
    let replica = 1 - leader;
    let router = cluster.router().await?;
    let mut scene = Scene { lab, etcd, cluster, router };
    ensure!(scene.node(leader).query_one("SELECT n FROM made", LIMIT).await? == "1");
    notes[leader].are(&["on_start primary demo"]).await?;
    notes[replica].are(&["on_start replica demo"]).await?;

    let parameters = json!({ "parameters": { "work_mem": "5MB" } });
    scene.cluster.patch_config(&json!({ "postgresql": parameters })).await?;
    notes[leader].are(&["on_reload primary demo"]).await?;
    notes[replica].are(&["on_reload replica demo"]).await?;
    // Without a change as well: it may be in a file that the agent does not know.
    let port = scene.cluster.nodes[leader].rest_port();
    ensure!(rest::post(port, "/reload", &json!({}), LIMIT).await?.status == 202);
    notes[leader].are(&["on_reload primary demo"]).await?;

    let port = scene.cluster.nodes[replica].rest_port();
    let restarted = rest::post(port, "/restart", &json!({}), LIMIT).await?;
    ensure!(restarted.status == 200, "{restarted:?}");
    wait::until("the callback of the restart", LIMIT, async || {
        let lines = notes[replica].lines();
        ensure!(lines.contains(&"on_restart replica demo".to_owned()), "{lines:?}");
        ensure!(
            !lines.iter().any(|line| line.starts_with("on_st")),
            "a restart is neither a start nor a stop: {lines:?}"
        );
        Ok(())
    })
    .await?;
    notes[replica].are(&["before_stop", "on_restart replica demo"]).await?;

    scene.cluster.settled(LIMIT).await?;
    scene.cluster.switchover(leader, Some(replica)).await?;
    notes[replica].are(&["on_role_change primary demo"]).await?;
    // The two callbacks of a demotion run side by side.
    wait::until("the callbacks of a demotion", LIMIT, async || {
        let lines = notes[leader].lines();
        for line in ["before_stop", "on_stop primary demo", "on_role_change replica demo"] {
            ensure!(lines.iter().any(|found| found == line), "{line} is not in {lines:?}");
        }
        Ok(())
    })
    .await?;
    ensure!(scene.cluster.settled(LIMIT).await? == replica, "somebody else leads");

    // A candidate that may not be promoted gives the key back, until it may.
    std::fs::write(scene.cluster.nodes[leader].dir().join("veto"), "")?;
    scene.cluster.nodes[replica].kill_postmaster()?;
    scene.cluster.nodes[leader].says("pre_promote: sh ended with", LIMIT).await?;
    let still = scene.node(leader).query_one("SELECT pg_is_in_recovery()", LIMIT).await;
    ensure!(still.is_err() || still.is_ok_and(|standby| standby == "t"), "promoted without leave");
    std::fs::remove_file(scene.cluster.nodes[leader].dir().join("veto"))?;
    scene.read_write().execute("INSERT INTO made VALUES (2)", LIMIT).await?;
    let leader = scene.cluster.settled(LIMIT).await?;

    // A new agent finds it running, and whoever is told by callbacks has to hear of that.
    for (node, role) in [(leader, "primary"), (1 - leader, "replica")] {
        scene.cluster.nodes[node].kill_agent();
        std::fs::write(&notes[node].0, "")?;
        scene.cluster.nodes[node].start()?;
        notes[node].are(&[&format!("on_start {role} demo")]).await?;
    }
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");

    scene.cluster.nodes[1 - leader].stop(Duration::from_secs(60)).await?;
    notes[1 - leader].are(&["on_stop replica demo"]).await?;
    scene.lab.success();
    Ok(())
}

/// Nothing is decided while `pre_promote` runs, so it must not run on for another node's key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_that_is_being_asked_for_ends_with_the_leader_key() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": false });
    let mut scene = Scene::with("asked", 1, spec).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let candidate = 1 - leader;
    let node = &mut scene.cluster.nodes[candidate];
    let asked = node.dir().join("asked");
    let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
    config["postgresql"]["pre_promote"] =
        format!("sh -c 'test -e {0} || (echo > {0}; exec sleep 50)'", asked.display()).into();
    node.configure(&config.to_string())?;
    ensure!(rest::post(node.rest_port(), "/reload", &json!({}), LIMIT).await?.status == 202);
    let names = |node: usize| scene.cluster.nodes[node].name().to_owned();
    let request = json!({ "leader": names(leader), "candidate": names(candidate) });
    let port = scene.cluster.nodes[leader].rest_port();
    let switchover = tokio::spawn(async move { rest::post(port, "/switchover", &request, LIMIT).await });
    wait::until("pre_promote to run", LIMIT, async || {
        ensure!(asked.exists(), "not yet");
        Ok(())
    })
    .await?;

    // /service/demo/leader, by etcd's JSON gateway.
    let endpoint = scene.etcd.endpoints().swap_remove(0);
    let etcd: u16 = endpoint.rsplit_once(':').context("a port")?.1.parse()?;
    let gone = rest::post(etcd, "/v3/kv/deleterange", &json!({ "key": "L3NlcnZpY2UvZGVtby9sZWFkZXI=" }), LIMIT).await?;
    ensure!(gone.body["deleted"] == "1", "{gone:?}");
    let limit = Duration::from_secs(20);
    scene.cluster.nodes[candidate].says("the leader key was lost while pre_promote ran", limit).await?;
    scene.read_write().execute("CREATE TABLE t (i int)", LIMIT).await?;
    switchover.abort();
    scene.lab.success();
    Ok(())
}

/// In synchronous mode whoever takes the leader key names itself alone in `sync`. Where it may not be promoted after all,
/// those named before have every commit as well as ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_promotion_leaves_the_lead_to_those_that_were_synchronous_before() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": true });
    let mut scene = Scene::with("refused", 1, spec).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let standby = 1 - leader;
    let node = &mut scene.cluster.nodes[standby];
    let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
    config["postgresql"]["pre_promote"] = "false".into();
    node.configure(&config.to_string())?;
    ensure!(rest::post(node.rest_port(), "/reload", &json!({}), LIMIT).await?.status == 202);
    wait::until("the standby to be synchronous", LIMIT, async || {
        ensure!(scene.cluster.nodes[standby].health("/sync").await == Some(200), "not yet");
        Ok(())
    })
    .await?;
    scene.read_write().execute("CREATE TABLE t (i int)", LIMIT).await?;
    let names = |node: usize| scene.cluster.nodes[node].name().to_owned();
    let request = json!({ "leader": names(leader), "candidate": names(standby) });
    let _ = rest::post(scene.cluster.nodes[leader].rest_port(), "/switchover", &request, LIMIT).await;
    let given_back = "released the leader key, and the sync key says again what it said before";
    scene.cluster.nodes[standby].says(given_back, LIMIT).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "somebody else leads");
    scene.read_write().execute("INSERT INTO t VALUES (1)", LIMIT).await?;
    scene.lab.success();
    Ok(())
}
