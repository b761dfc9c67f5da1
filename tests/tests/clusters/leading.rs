//! Settings and tags that decide who leads, who confirms commits, and how long a primary may take.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::net::unix::pipe;
use tokio::sync::Mutex;
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Node, Program, Scene, Spec, rest, wait};

/// Changes a node's file, which it reads at its next start or reload.
fn configure(node: &mut Node, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut config = serde_json::from_slice(&std::fs::read(node.config())?)?;
    change(&mut config);
    node.configure(&config.to_string())
}

/// Gives a running member these tags, and waits until the others see them.
async fn tag(node: &mut Node, tags: Value) -> Result<()> {
    configure(node, |config| config["tags"] = tags.clone())?;
    ensure!(rest::post(node.rest_port(), "/reload", &json!({}), LIMIT).await?.status == 202);
    wait::until(format!("{tags} in the cluster"), LIMIT, async || {
        let cluster = rest::get(node.rest_port(), "/cluster").await?.body;
        let members = cluster["members"].as_array().context("members")?;
        ensure!(members.iter().any(|member| member["name"] == node.name() && member["tags"] == tags), "{cluster}");
        Ok(())
    })
    .await
}

/// Commits wait for this member alone, and it may lead.
async fn confirms(scene: &Scene, leader: usize, member: usize) -> Result<()> {
    let name = scene.cluster.nodes[member].name();
    wait::until(format!("{name} to be synchronous"), LIMIT, async || {
        let names = scene.node(leader).query_one("SHOW synchronous_standby_names", LIMIT).await?;
        ensure!(names == name, "commits wait for {names}");
        ensure!(scene.cluster.nodes[member].health("/sync").await == Some(200), "not by its own word");
        Ok(())
    })
    .await
}

/// Both have everything that the leader has written, and it writes no more.
async fn equal(scene: &Scene, leader: usize, members: [usize; 2]) -> Result<()> {
    scene.node(leader).execute("CHECKPOINT", LIMIT).await?;
    wait::until("equal positions", LIMIT, async || {
        let written = scene.node(leader).query_one("SELECT pg_current_wal_lsn()", LIMIT).await?;
        for member in members {
            let received = scene.node(member).query_one("SELECT pg_last_wal_receive_lsn()", LIMIT).await?;
            ensure!(received == written, "{received} of {written}");
        }
        Ok(())
    })
    .await
}

/// What a member says about why it would not lead.
async fn verdict(node: &Node) -> Result<String> {
    let told = rest::get(node.rest_port(), "/why").await?.body;
    Ok(told["verdict"]["reason"].as_str().with_context(|| told.to_string())?.to_owned())
}

async fn refuses(node: &Node, reason: &str) -> Result<()> {
    wait::until(format!("{} to say: {reason}", node.name()), LIMIT, async || {
        let told = verdict(node).await?;
        ensure!(told.contains(reason), "{told}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tags_decide_at_once_who_confirms_who_is_read_and_who_leads() -> Result<()> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs["postgresql"] = json!({ "parameters": { "autovacuum": "off" } });
    let mut scene = Scene::with("tags", 1, spec).await?;
    let first = scene.cluster.settled(LIMIT).await?;
    let [a, b] = [(first + 1) % 3, (first + 2) % 3];

    for (member, tags) in [(b, json!({ "sync_priority": 2 })), (a, json!({ "sync_priority": 3 }))] {
        tag(&mut scene.cluster.nodes[member], tags).await?;
        confirms(&scene, first, member).await?;
    }
    tag(&mut scene.cluster.nodes[a], json!({ "nosync": true, "noloadbalance": true })).await?;
    confirms(&scene, first, b).await?;
    ensure!(scene.cluster.nodes[a].health("/replica").await == Some(503), "noloadbalance");
    for _ in 0..10 {
        let port = scene.read_only().query_one("SELECT inet_server_port()", LIMIT).await?;
        ensure!(port == scene.cluster.nodes[b].port().to_string(), "the router chose port {port}");
    }

    // Among equals the higher priority leads.
    scene.cluster.patch_config(&json!({ "synchronous_mode": false })).await?;
    tag(&mut scene.cluster.nodes[a], json!({ "failover_priority": 5 })).await?;
    tag(&mut scene.cluster.nodes[b], json!({ "failover_priority": 2 })).await?;
    refuses(&scene.cluster.nodes[b], "priority").await?;
    equal(&scene, first, [a, b]).await?;
    scene.cluster.nodes[first].kill_postmaster()?;
    ensure!(scene.cluster.leader_other_than(first, LIMIT).await? == a, "the lower priority leads");

    // Whoever may never lead does not, though nobody else is there.
    tag(&mut scene.cluster.nodes[b], json!({ "nofailover": true })).await?;
    scene.cluster.nodes[first].kill();
    scene.cluster.nodes[a].kill();
    wait::until("the leader's lease to end", LIMIT, async || {
        let cluster = rest::get(scene.cluster.nodes[b].rest_port(), "/patroni").await?.body;
        ensure!(cluster["cluster_unlocked"] == true, "{cluster}");
        Ok(())
    })
    .await?;
    refuses(&scene.cluster.nodes[b], "I am not allowed to promote").await?;
    scene.cluster.nodes[a].start()?;
    ensure!(scene.cluster.leader(LIMIT).await? == a, "somebody else leads");
    let log = scene.cluster.nodes[b].log()?;
    ensure!(!log.contains("promoted, timeline"), "{log}");
    scene.lab.success();
    Ok(())
}

/// A crashed primary is started again where it may take its time, and replaced where it does not come up. One that is asked to
/// hand over and does not end in time is ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_has_the_time_that_the_settings_give_it() -> Result<()> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": true, "primary_start_timeout": 300, "primary_stop_timeout": 4 });
    let mut scene = Scene::with("time", 1, spec).await?;
    let first = scene.cluster.settled(LIMIT).await?;
    let before = scene.cluster.nodes[first].postmaster()?;
    scene.cluster.nodes[first].kill_postmaster()?;
    wait::until("another postmaster", LIMIT, async || {
        ensure!(scene.cluster.nodes[first].postmaster()? != before, "the same one");
        Ok(())
    })
    .await?;
    ensure!(scene.cluster.settled(LIMIT).await? == first, "leadership moved");
    ensure!(scene.cluster.nodes[first].status().await?["timeline"] == 1, "it was promoted again");

    let base = scene.cluster.nodes[first].data_dir().join("postgresql.base.conf");
    let good = std::fs::read(&base)?;
    std::fs::write(&base, [&good[..], b"no such setting\n"].concat())?;
    scene.cluster.nodes[first].kill_postmaster()?;
    let second = scene.cluster.leader_other_than(first, LIMIT).await?;
    std::fs::write(&base, &good)?;
    ensure!(scene.cluster.settled(LIMIT).await? == second, "leadership moved");

    // A fast stop waits until every standby has everything, and this one says nothing.
    let third = 3 - first - second;
    let frozen = match scene.cluster.nodes[third].health("/sync").await {
        Some(200) => first,
        _ => third,
    };
    scene.cluster.nodes[frozen].freeze();
    let successor = 3 - second - frozen;
    scene.cluster.switchover(second, Some(successor)).await?;
    wait::until("the slow stop to be cut short", LIMIT, async || {
        let log = scene.cluster.nodes[second].log()?;
        ensure!(log.contains("the fast stop was not done in time, stopping at once"), "not said");
        ensure!(log.contains("asked to stop 3 s ago") && log.contains("walsender"), "whom it waited for is not said");
        Ok(())
    })
    .await?;
    scene.cluster.nodes[frozen].thaw();
    ensure!(scene.cluster.settled(LIMIT).await? == successor, "somebody else leads");
    scene.lab.success();
    Ok(())
}

/// A node that has missed a promotion does not lead, though nobody else is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_an_older_timeline_waits_for_one_that_has_the_newest() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "check_timeline": true, "primary_start_timeout": 0 });
    let mut scene = Scene::with("timeline", 1, spec).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    scene.cluster.nodes[old].kill();
    let new = scene.cluster.leader_other_than(old, LIMIT).await?;
    wait::until("the new timeline to be known to all", LIMIT, async || {
        let history = rest::get(scene.cluster.nodes[new].rest_port(), "/history").await?.body;
        ensure!(history.as_array().is_some_and(|lines| lines.len() == 1), "{history}");
        Ok(())
    })
    .await?;
    scene.cluster.nodes[new].kill();
    scene.cluster.nodes[old].start()?;
    refuses(&scene.cluster.nodes[old], "this node is on timeline 1, the cluster is on 2").await?;
    ensure!(scene.cluster.nodes[old].health("/primary").await == Some(503), "it leads");
    scene.cluster.nodes[new].start()?;
    ensure!(scene.cluster.settled(LIMIT).await? == new, "the older one leads");
    scene.lab.success();
    Ok(())
}

/// A leader is gone that may have begun a timeline, and nobody can tell: the next one begins another number.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_leaders_never_begin_timelines_of_one_number() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "primary_start_timeout": 0 });
    let mut scene = Scene::with("number", 1, spec).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let short_lived = 1 - old;
    let marker = scene.cluster.nodes[short_lived].dir().join("elected");
    let wait_for_ever = format!("sh -c 'touch {} && sleep 600'", marker.display());
    configure(&mut scene.cluster.nodes[short_lived], |config| {
        config["postgresql"]["pre_promote"] = json!(wait_for_ever)
    })?;
    ensure!(
        rest::post(scene.cluster.nodes[short_lived].rest_port(), "/reload", &json!({}), LIMIT).await?.status == 202
    );
    scene.cluster.nodes[old].kill();
    wait::until("the other one to be elected", LIMIT, async || {
        ensure!(marker.exists(), "not yet");
        Ok(())
    })
    .await?;
    scene.cluster.nodes[short_lived].kill();

    scene.cluster.nodes[old].start()?;
    scene.read_write().execute("CREATE TABLE t (i int)", LIMIT).await?;
    ensure!(scene.cluster.nodes[old].status().await?["timeline"] == 3, "2 may have been begun");
    configure(&mut scene.cluster.nodes[short_lived], |config| config["postgresql"]["pre_promote"] = Value::Null)?;
    scene.cluster.nodes[short_lived].start()?;
    ensure!(scene.cluster.settled(LIMIT).await? == old, "leadership moved");
    // Also what Patroni and its tools take for the cluster's timeline: one past the last line.
    let history = rest::get(scene.cluster.nodes[old].rest_port(), "/history").await?.body;
    let lines: Vec<_> = history.as_array().context("lines")?.iter().map(|line| (&line[0], &line[2])).collect();
    ensure!(lines.len() == 2 && *lines[1].0 == 2 && *lines[1].1 == "number left out", "{history}");

    scene.cluster.switchover(old, Some(short_lived)).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == short_lived, "not switched over");
    ensure!(scene.cluster.nodes[short_lived].status().await?["timeline"] == 4, "not the next one");
    scene.lab.success();
    Ok(())
}

/// Everything that was written to a device of the testing driver.
struct Device(Arc<Mutex<String>>);

impl Device {
    fn open(path: &Path) -> Result<Self> {
        let made = Command::new("mkfifo").args(["-m", "666"]).arg(path).status()?;
        ensure!(made.success(), "mkfifo");
        // Open for writing, too, so that it does not end with the agent.
        let pipe = pipe::OpenOptions::new().read_write(true).open_receiver(path)?;
        let told = Arc::new(Mutex::new(String::new()));
        let telling = told.clone();
        tokio::spawn(async move {
            let mut bytes = [0; 256];
            while pipe.readable().await.is_ok() {
                if let Ok(count) = pipe.try_read(&mut bytes) {
                    telling.lock().await.push_str(&String::from_utf8_lossy(&bytes[..count]));
                }
            }
        });
        Ok(Self(told))
    }

    /// Waits for what ends with `end` and has been said since the last look.
    async fn says(&self, what: &str, end: &str) -> Result<()> {
        wait::until(what, LIMIT, async || {
            let mut told = self.0.lock().await;
            ensure!(told.ends_with(end), "{told:?}");
            told.clear();
            Ok(())
        })
        .await
    }
}

/// A program that notes with which options it is called, and becomes pg_basebackup.
fn noting_basebackup(lab: &Lab) -> Result<PathBuf> {
    let program = lab.make_dir("noting")?.join("pg_basebackup");
    let real = lab.tools().postgres_bin.join("pg_basebackup");
    let script = format!("#!/bin/sh\necho \"$@\" >> \"$0.options\"\nexec {} \"$@\"\n", real.display());
    std::fs::write(&program, script)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

/// The one node has a device of the testing driver, the other one needs a device that is not there; and its copy is made by the
/// second of two methods, with an option of the user's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watchdog_is_kept_and_put_away_and_without_one_that_is_required_nobody_leads() -> Result<()> {
    let lab = Lab::new("watchdog")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.timing.ttl = 10;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    let path = lab.make_dir("device")?.join("watchdog");
    let device = Device::open(&path)?;
    configure(&mut cluster.nodes[0], |config| {
        config["watchdog"] = json!({ "mode": "required", "driver": "testing", "device": path, "safety_margin": -1 });
    })?;
    let noting = noting_basebackup(&lab)?;
    configure(&mut cluster.nodes[1], |config| {
        config["watchdog"] = json!({ "mode": "required", "device": lab.dir().join("nothing") });
        config["postgresql"]["bin_name"] = json!({ "pg_basebackup": noting });
        config["postgresql"]["create_replica_methods"] = json!(["broken", "basebackup"]);
        config["postgresql"]["broken"] = json!({ "command": "/bin/false" });
        config["postgresql"]["basebackup"] = json!([{ "checkpoint": "fast" }, "no-sync", { "max-rate": "200M" }]);
    })?;
    cluster.nodes[1].start()?;
    cluster.nodes[0].start()?;
    ensure!(cluster.settled(LIMIT).await? == 0, "a node without its watchdog leads");
    device.says("a keepalive", "1").await?;
    let (log, options) = (cluster.nodes[1].log()?, std::fs::read_to_string(noting.with_extension("options"))?);
    ensure!(log.contains("making a replica by broken failed"), "{log}");
    ensure!(options.contains("--max-rate=200M"), "{options}");

    // Half of the lease, and of another one.
    cluster.patch_config(&json!({ "ttl": 20 })).await?;
    wait::until("the new timeout", LIMIT, async || {
        let told = device.0.lock().await.clone();
        ensure!(told.contains("Ctimeout=10\n1"), "{told:?}");
        Ok(())
    })
    .await?;
    cluster.patch_config(&json!({ "pause": true })).await?;
    device.says("a pause", "V").await?;
    cluster.patch_config(&json!({ "pause": null })).await?;
    device.says("its end", "1").await?;

    let status = cluster.nodes[1].status().await?;
    ensure!(status["watchdog_failed"] == true, "{status}");
    let body = json!({ "leader": cluster.nodes[0].name(), "candidate": cluster.nodes[1].name() });
    let refused = rest::post(cluster.nodes[0].rest_port(), "/switchover", &body, LIMIT).await?;
    ensure!(refused.status == 412, "{refused:?}");
    cluster.nodes[0].stop(LIMIT).await?;
    device.says("the end", "V").await?;
    refuses(&cluster.nodes[1], "the watchdog is required and does not work").await?;
    ensure!(cluster.nodes[1].health("/primary").await == Some(503), "it leads");
    lab.success();
    Ok(())
}
