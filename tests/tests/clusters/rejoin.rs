//! A deposed primary whose history went another way.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use trunkline_tests::{LIMIT, Lab, Program, Scene, Spec, Timing, rest, wait};

/// For one statement.
const SHORT: Duration = Duration::from_secs(5);

/// Until there is such a file beside the data directory nothing can be archived.
const ARCHIVE_OPEN: &str = "archive-open";

/// The old primary has rows that nobody else got, and comes back when somebody else leads. `local` is laid over its
/// `postgresql` section.
async fn diverged(name: &str, local: Value) -> Result<(Scene, usize)> {
    let mut spec = Spec::new(3, &Program::agent()?);
    let own = json!({ "use_pg_rewind": local["use_pg_rewind"] });
    spec.dcs = json!({ "synchronous_mode": false, "primary_start_timeout": 0, "postgresql": own });
    spec.local = json!({ "postgresql": local });
    let mut scene = Scene::with(name, 1, spec).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    scene.node(old).execute("CREATE TABLE t (who text); SELECT pg_switch_wal()", SHORT).await?;
    let others: Vec<usize> = (0..3).filter(|node| *node != old).collect();
    for node in &others {
        let target = scene.node(*node);
        let copied = async || target.query_one("SELECT count(*) FROM t", SHORT).await;
        wait::until("the table on a replica", LIMIT, copied).await?;
    }
    // Killed, not frozen: what the primary sends to a frozen one waits in its sockets and arrives after all.
    others.iter().for_each(|node| scene.cluster.nodes[*node].kill());
    scene.node(old).execute("INSERT INTO t SELECT 'lost' FROM generate_series(1, 1000); CHECKPOINT", SHORT).await?;
    scene.cluster.nodes[old].kill();
    for node in &others {
        scene.cluster.nodes[*node].start()?;
    }
    scene.cluster.leader_other_than(old, LIMIT).await?;
    // The router holds this until the new leader takes writes; `GET /primary` is 200 a moment before.
    scene.read_write().execute("INSERT INTO t VALUES ('kept')", LIMIT).await?;
    std::fs::write(scene.cluster.nodes[old].dir().join(ARCHIVE_OPEN), "")?;
    scene.cluster.nodes[old].start()?;
    Ok((scene, old))
}

/// What tells a data directory from one that was made anew.
fn directory(scene: &Scene, node: usize) -> Result<u64> {
    let version_file = scene.cluster.nodes[node].data_dir().join("PG_VERSION");
    Ok(version_file.metadata().context("the data directory is gone")?.ino())
}

/// It has lost its rows, and follows.
async fn follows(scene: &mut Scene, old: usize) -> Result<()> {
    ensure!(scene.cluster.settled(LIMIT).await? != old, "leadership moved");
    let target = scene.node(old);
    wait::until("the new row on the old primary", LIMIT, async || {
        let rows = target.query_one("SELECT string_agg(who, ',') FROM t", SHORT).await?;
        ensure!(rows == "kept", "it has {rows:.60}");
        Ok(())
    })
    .await
}

/// By pg_rewind its data directory stays the same one, which a new copy would not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diverged_primary_is_rewound_and_follows() -> Result<()> {
    let command = format!("test -e ../{ARCHIVE_OPEN} && mkdir -p ../archive && cp %p ../archive/%f");
    let archives = json!({ "archive_mode": "on", "archive_command": command });
    let (mut scene, old) = diverged("rewind", json!({ "use_pg_rewind": true, "parameters": archives })).await?;
    let before = directory(&scene, old)?;
    follows(&mut scene, old).await?;
    ensure!(directory(&scene, old)? == before, "the data directory was made anew instead of rewound");
    // Nobody else could have archived what it wrote before the others parted from it.
    let archive = std::fs::read_dir(scene.cluster.nodes[old].dir().join("archive")).context("nothing was archived")?;
    let names = archive.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names = names.collect::<Result<Vec<String>>>()?;
    ensure!(names.iter().any(|name| name.starts_with("00000001")), "it has not archived its own timeline: {names:?}");
    scene.lab.success();
    Ok(())
}

/// The same where it has been a standby since, without etcd, and its agent is another one: nothing says any more that it was a primary,
/// and PostgreSQL does not start, as the archive has the new timeline, which it is no child of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diverged_primary_that_was_a_standby_since_is_rewound_by_an_agent_that_knows_nothing_of_it() -> Result<()> {
    let lab = Lab::new("rewind-standby")?;
    let archive = lab.make_dir("archive")?;
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": false, "postgresql": { "use_pg_rewind": true } });
    let copies = json!({
        "archive_mode": "on",
        "archive_command": format!("cp %p {}/%f", archive.display()),
        "restore_command": format!("cp {}/%f %p", archive.display()),
    });
    spec.local = json!({ "postgresql": { "use_pg_rewind": true, "parameters": copies } });
    // It has to stop in order before its lease is over, on a machine that runs other tests as well: killed, it has nothing of its own.
    spec.timing = Timing { ttl: 15, loop_wait: 1, retry_timeout: 2 };
    let mut scene = Scene::in_lab(lab, 1, spec).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    scene.node(old).execute("CREATE TABLE t (who text); SELECT pg_switch_wal()", SHORT).await?;
    let replica = scene.node(1 - old);
    wait::until("the table on the replica", LIMIT, async || replica.query_one("SELECT count(*) FROM t", SHORT).await)
        .await?;
    scene.cluster.nodes[1 - old].kill();
    // The archive has it when it stops, all but its last word.
    scene.node(old).execute("INSERT INTO t VALUES ('archived')", SHORT).await?;
    scene.etcd.kill(0);
    let target = scene.node(old);
    wait::until("the old primary is a standby", LIMIT, async || {
        let standby = target.query_one("SELECT pg_is_in_recovery()", SHORT).await?;
        ensure!(standby == "t", "it is none yet");
        Ok(())
    })
    .await?;
    scene.cluster.nodes[old].stop(LIMIT).await?;
    scene.etcd.restart(0).await?;
    scene.cluster.nodes[1 - old].start()?;
    scene.cluster.leader_other_than(old, LIMIT).await?;
    scene.read_write().execute("INSERT INTO t VALUES ('kept')", LIMIT).await?;
    scene.cluster.nodes[old].start()?;
    ensure!(scene.cluster.settled(LIMIT).await? != old, "leadership moved");
    let rows = async || target.query_one("SELECT string_agg(who, ',') FROM t HAVING count(*) = 2", SHORT).await;
    ensure!(wait::until("the new row on the old primary", LIMIT, rows).await? == "archived,kept");
    scene.cluster.nodes[old].says("pg_rewind to", LIMIT).await?;
    scene.lab.success();
    Ok(())
}

/// Without pg_rewind, and where it fails: a setting each allows a new copy. Without that the directory stays as it is, the reason
/// is said, and whoever made the decision does the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diverged_primary_is_copied_anew_where_a_setting_allows_exactly_that() -> Result<()> {
    let local = json!({ "use_pg_rewind": false, "remove_data_directory_on_diverged_timelines": true });
    let (mut scene, old) = diverged("reclone", local).await?;
    follows(&mut scene, old).await?;
    let log = scene.cluster.nodes[old].log()?;
    ensure!(log.contains("pg_basebackup from") && !log.contains("pg_rewind to"), "{log}");
    scene.lab.success();
    drop(scene);

    let broken = json!({ "use_pg_rewind": true, "bin_name": { "pg_rewind": "/bin/false" } });
    let (mut scene, old) = diverged("no-rewind", broken).await?;
    let before = directory(&scene, old)?;
    let said = "reinitialize this member, or set remove_data_directory_on_rewind_failure";
    scene.cluster.nodes[old].says(said, LIMIT).await?;
    ensure!(directory(&scene, old)? == before, "the data directory was removed without leave");

    let mut config: Value = serde_json::from_slice(&std::fs::read(scene.cluster.nodes[old].config())?)?;
    config["postgresql"]["remove_data_directory_on_rewind_failure"] = json!(true);
    scene.cluster.nodes[old].configure(&config.to_string())?;
    let port = scene.cluster.nodes[old].rest_port();
    ensure!(rest::post(port, "/reload", &json!({}), SHORT).await?.status == 202);
    follows(&mut scene, old).await?;
    scene.cluster.nodes[old].says("copying anew", LIMIT).await?;
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

/// A replica that is made anew goes by the methods of the configuration, unless it is to be copied from the leader itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_made_anew_when_somebody_asks_for_it() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    let lab = Lab::new("reinit")?;
    let tries = lab.make_dir("notes")?.join("tries");
    let method = json!({ "command": format!("sh -c 'echo tried >> {}; false'", tries.display()), "no_params": true });
    spec.local = json!({ "postgresql": { "create_replica_methods": ["own", "basebackup"], "own": method } });
    let mut scene = Scene::in_lab(lab, 1, spec).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let port = scene.cluster.nodes[leader].rest_port();
    let refused = rest::post(port, "/reinitialize", &json!({}), SHORT).await?;
    ensure!(refused.status == 503 && refused.body.to_string().contains("I am the leader"), "{refused:?}");

    let replica = 1 - leader;
    let port = scene.cluster.nodes[replica].rest_port();
    for (body, expected) in [(json!({}), 2), (json!({ "from_leader": true }), 2)] {
        let before = directory(&scene, replica)?;
        let answer = rest::post(port, "/reinitialize", &body, SHORT).await?;
        ensure!(answer.status == 200, "{answer:?}");
        wait::until("another data directory", LIMIT, async || {
            ensure!(directory(&scene, replica)? != before, "it is the old one");
            Ok(())
        })
        .await?;
        ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
        let tried = std::fs::read_to_string(&tries).context("the method was not tried")?.lines().count();
        ensure!(tried == expected, "the other method was tried {tried} times with {body}");
    }
    scene.finish(load).await?;
    Ok(())
}

/// The `sync` key names members: what its standby has is taken from it once it is not named, also in strict mode, and not where its
/// leader does not see to that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_synchronous_standby_is_made_anew_once_nothing_counts_on_it() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": true, "synchronous_mode_strict": true });
    let lab = Lab::new("reinit-sync")?;
    let notes = lab.make_dir("notes")?;
    let (asked, go) = (notes.join("asked"), notes.join("go"));
    let waits = format!("echo asked > {}; until [ -e {} ]; do sleep 0.1; done; false", asked.display(), go.display());
    let method = json!({ "command": format!("sh -c '{waits}'"), "no_params": true });
    spec.local = json!({ "postgresql": { "create_replica_methods": ["own", "basebackup"], "own": method } });
    std::fs::write(&go, "")?;
    let mut scene = Scene::in_lab(lab, 1, spec).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let standby = 1 - leader;
    let port = scene.cluster.nodes[standby].rest_port();
    let anew = async || {
        let answer = rest::post(port, "/reinitialize", &json!({}), SHORT).await?;
        ensure!(answer.status == 200, "{answer:?}");
        anyhow::Ok(())
    };
    std::fs::remove_file(&asked)?;
    std::fs::remove_file(&go)?;

    let before = directory(&scene, standby)?;
    scene.cluster.nodes[leader].agent().context("no agent")?.signal(Signal::STOP);
    anew().await?;
    scene.cluster.nodes[standby].says("it would lead without commits", LIMIT).await?;
    scene.cluster.nodes[leader].agent().context("no agent")?.signal(Signal::CONT);
    ensure!(directory(&scene, standby)? == before && !asked.exists(), "it was copied");
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");

    anew().await?;
    wait::until("the copy to begin", LIMIT, async || {
        ensure!(asked.exists(), "not yet");
        Ok(())
    })
    .await?;
    let members = rest::get(scene.cluster.nodes[leader].rest_port(), "/cluster").await?.body;
    let name = scene.cluster.nodes[standby].name();
    let role = members["members"].as_array().context("no list")?.iter().find(|member| member["name"] == name);
    ensure!(role.context("it is not there")?["role"] == "replica", "{members}");
    std::fs::write(&go, "")?;
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    ensure!(directory(&scene, standby)? != before, "it is the old one");
    scene.lab.success();
    Ok(())
}
