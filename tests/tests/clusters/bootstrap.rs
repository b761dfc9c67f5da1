//! Three empty nodes become one cluster.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Scene, Spec, rest, wait};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_cluster_is_moved_aside_and_made_anew() -> Result<()> {
    let lab = Lab::new("half-made")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), Spec::new(2, &Program::agent()?))?;
    // The first bootstrap does not come to its end.
    let begun = lab.make_dir("begun")?;
    let stuck = format!("sh -c 'mkdir {0}/once 2>/dev/null || exit 0; sleep 600' --", begun.display());
    for node in &mut cluster.nodes {
        let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
        config["bootstrap"]["post_bootstrap"] = Value::from(stuck.as_str());
        node.configure(&config.to_string())?;
    }
    cluster.nodes[0].start()?;
    wait::until("the script of the first bootstrap", LIMIT, async || {
        ensure!(begun.join("once").exists());
        Ok(())
    })
    .await?;
    cluster.nodes[0].kill();
    for node in &mut cluster.nodes {
        node.start()?;
    }
    // The other one may have been first, and copies need the users that the first bootstrap had not made.
    cluster.settled(LIMIT).await?;
    let data_dir = cluster.nodes[0].data_dir();
    let aside = data_dir.with_file_name(format!("{}.failed", data_dir.file_name().unwrap_or_default().display()));
    ensure!(aside.join("PG_VERSION").exists(), "{} is not there", aside.display());
    cluster.nodes[0].says("the bootstrap of an earlier agent was cut off", LIMIT).await?;
    lab.success();
    Ok(())
}

/// A cluster without what `post_bootstrap` was to make of it is none: it is moved aside, and made again until that works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bootstrap_whose_last_step_fails_is_taken_back_and_tried_again() -> Result<()> {
    let lab = Lab::new("post-bootstrap")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let works = lab.make_dir("notes")?.join("works");
    let mut spec = Spec::new(1, &Program::agent()?);
    spec.local = json!({ "bootstrap": { "post_bootstrap": format!("sh -c 'test -e {}'", works.display()) } });
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    cluster.nodes[0].start()?;
    let aside = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains(".failed"))
    };
    let dir = cluster.nodes[0].dir().to_owned();
    wait::until("half a cluster aside", LIMIT, async || {
        ensure!(std::fs::read_dir(&dir)?.any(aside), "there is none");
        Ok(())
    })
    .await?;
    ensure!(cluster.nodes[0].health("/primary").await != Some(200), "it leads without it");
    ensure!(cluster.nodes[0].is_running(), "the agent has ended");
    std::fs::write(&works, "")?;
    ensure!(cluster.settled(LIMIT).await? == 0);
    cluster.nodes[0].says("the bootstrap failed: ", LIMIT).await?;
    lab.success();
    Ok(())
}

/// A method of the operator's own that makes nothing, then half a cluster, and then one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_custom_bootstrap_that_fails_is_taken_back_and_tried_again() -> Result<()> {
    let lab = Lab::new("custom-bootstrap")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let notes = lab.make_dir("notes")?;
    let script = notes.join("restore");
    let text = format!(
        "for arg; do case $arg in --datadir=*) data=${{arg#*=}};; esac; done
         echo tried >> {notes}/tries
         case $(wc -l < {notes}/tries) in
             1) echo 'there is no backup' >&2; exit 1;;
             2) mkdir -m 700 \"$data\" && touch \"$data/half\"; exit 2;;
             3) until test -e {notes}/works; do sleep 0.1; done
         esac
         exec {initdb} --no-sync --username=postgres --pgdata=\"$data\"\n",
        notes = notes.display(),
        initdb = lab.tools().postgres_bin.join("initdb").display(),
    );
    std::fs::write(&script, text)?;
    let mut spec = Spec::new(1, &Program::agent()?);
    let method = json!({ "command": format!("sh {}", script.display()) });
    spec.local = json!({ "bootstrap": { "method": "restore", "restore": method } });
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    cluster.nodes[0].start()?;
    wait::until("the third try", LIMIT, async || {
        let tries = std::fs::read_to_string(notes.join("tries"))?;
        ensure!(tries.lines().count() == 3, "{tries}");
        Ok(())
    })
    .await?;
    let data_dir = cluster.nodes[0].data_dir();
    let aside = data_dir.with_file_name(format!("{}.failed", data_dir.file_name().unwrap_or_default().display()));
    ensure!(aside.join("half").exists(), "{} is not there", aside.display());
    for why in ["exit status: 1: there is no backup", "exit status: 2"] {
        cluster.nodes[0].says(&format!("the bootstrap failed: sh ended with {why}"), LIMIT).await?;
    }
    let log = cluster.nodes[0].log()?;
    ensure!(!log.contains("cleaning up after the failed bootstrap"), "what there was not could not be removed: {log}");
    std::fs::write(notes.join("works"), "")?;
    ensure!(cluster.settled(LIMIT).await? == 0);
    lab.success();
    Ok(())
}

/// Strict synchronous mode counts from the first moment on at which clients are sent to a new cluster.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_strict_cluster_commits_nothing_before_a_standby_confirms() -> Result<()> {
    let lab = Lab::new("strict")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs["synchronous_mode_strict"] = Value::from(true);
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    cluster.nodes[0].start()?;
    let first = wait::until("a leader", LIMIT, async || {
        ensure!(cluster.nodes[0].health("/primary").await == Some(200), "nobody leads");
        Ok(())
    });
    first.await?;
    let (alone, short) = (cluster.nodes[0].target(&cluster.spec().password), Duration::from_secs(3));
    let names = alone.query_one("SHOW synchronous_standby_names", short).await?;
    ensure!(names.contains("strict_sync"), "commits wait for '{names}'");
    ensure!(alone.execute("CREATE TABLE t (id int)", short).await.is_err(), "a commit that one node alone has");
    cluster.nodes[1].start()?;
    cluster.settled(LIMIT).await?;
    alone.execute("CREATE TABLE u (id int)", Duration::from_secs(10)).await?;
    lab.success();
    Ok(())
}
