//! The leader is lost, in each of the ways a leader can be lost.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Scene, Spec, Timing, namespace, rest, wait};

/// With the agent alive nothing has to expire: less than what is left of a lease, on a machine that runs other tests as well.
const AT_ONCE: Duration = Duration::from_millis(3500);

/// The lease (5 s), etcd's sweep (0.5 s), and a busy machine.
const AFTER_LEASE: Duration = Duration::from_secs(12);

/// Ten seconds without an answer, a new session every five, a second between looks, and a busy machine.
const HUNG: Duration = Duration::from_secs(25);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_postmaster_is_replaced_at_once_and_rejoins() -> Result<()> {
    let mut scene = Scene::start("postmaster", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    let fault = SystemClock.now();
    scene.cluster.nodes[old].kill_postmaster()?;
    let new = scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    let settled = scene.cluster.settled(LIMIT).await?;
    ensure!(settled == new, "the cluster settled on another node than the one that took over");

    let outage = load.writers.record().outage(fault);
    ensure!(outage < AT_ONCE, "writes stood still for {outage:?}");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_is_replaced_when_its_lease_is_over_and_rejoins() -> Result<()> {
    let mut scene = Scene::start("node", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    let fault = SystemClock.now();
    scene.cluster.nodes[old].kill();
    scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    let outage = load.writers.record().outage(fault);
    ensure!(outage < AFTER_LEASE, "writes stood still for {outage:?}");

    scene.cluster.nodes[old].start()?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_node_loses_its_sessions_and_takes_no_write_after_its_thaw() -> Result<()> {
    let mut scene = Scene::start("freeze", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let old_port = scene.cluster.nodes[old].port();

    let fault = SystemClock.now();
    scene.cluster.nodes[old].freeze();
    scene.cluster.leader_other_than(old, LIMIT).await?;
    // The writers' sessions were open and mute: only the router can have ended them.
    load.writers.progress(100, LIMIT).await?;
    let outage = load.writers.record().outage(fault);
    ensure!(outage < AFTER_LEASE, "writes stood still for {outage:?}");

    let taken_over = SystemClock.now();
    scene.cluster.nodes[old].thaw();
    load.writers.progress(500, LIMIT).await?;
    let record = load.writers.record();
    let late = record.writes.iter().find(|write| write.port == old_port && write.acked > taken_over);
    ensure!(late.is_none(), "the old leader acknowledged a write after its thaw: {late:?}");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_postmaster_is_taken_for_hung_and_replaced_and_rejoins() -> Result<()> {
    let mut scene = Scene::start("hung", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    // It lets nobody in, but the sessions that it has go on: only a new one can tell.
    let hung = scene.cluster.nodes[old].postmaster()?;
    rustix::process::kill_process(hung, rustix::process::Signal::STOP)?;
    let fault = SystemClock.now();
    let killed = wait::until("the hung postmaster to be killed", LIMIT, async || {
        ensure!(scene.cluster.nodes[old].postmaster().ok() != Some(hung), "it is still there");
        Ok(())
    });
    killed.await?;
    let found = SystemClock.now().since(fault);
    ensure!(found > Duration::from_secs(9), "after {found:?}, nobody can be sure");
    ensure!(found < HUNG, "found only after {found:?}");
    // Somebody else leads, unless nobody answers in time on this machine; then it is started again.
    scene.cluster.settled(LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}

/// A session that is there answers for a minute, and nobody new gets past the postmaster's delay: only a new one can tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lets_nobody_in_is_taken_for_hung_and_replaced() -> Result<()> {
    let mut scene = Scene::start("nobody", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    let hung = scene.cluster.nodes[old].postmaster()?;
    let fault = SystemClock.now();
    let client = scene.node(old).connect(LIMIT).await?;
    client.batch_execute("ALTER SYSTEM SET pre_auth_delay = 60").await?;
    client.batch_execute("SELECT pg_reload_conf()").await?;
    let killed = wait::until("the hung postmaster to be killed", LIMIT, async || {
        ensure!(scene.cluster.nodes[old].postmaster().ok() != Some(hung), "it is still there");
        Ok(())
    });
    killed.await?;
    let found = SystemClock.now().since(fault);
    ensure!(found > Duration::from_secs(9) && found < HUNG, "found after {found:?}");
    let auto = scene.cluster.nodes[old].data_dir().join("postgresql.auto.conf");
    std::fs::write(auto, "")?;
    scene.cluster.settled(LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}

/// A disk of its own for a node, which can be made to take no more writes. Needs root, and a mount namespace to be in.
struct Disk(PathBuf);

impl Disk {
    fn mount(lab: &Lab, data_dir: &Path) -> Result<Self> {
        let disk = lab.make_dir("disk")?;
        let image = disk.with_extension("img");
        File::create(&image)?.set_len(1 << 30)?;
        run("mkfs.ext4", &["-q", "-F", "-m", "0"], &image)?;
        let status = Command::new("mount").args(["-o", "loop"]).args([&image, &disk]).status()?;
        ensure!(status.success(), "mount of a loop device: {status}");
        std::os::unix::fs::symlink(lab.make_dir("disk/data")?, data_dir)?;
        Ok(Self(disk))
    }

    fn freeze(&self) -> Result<()> {
        run("fsfreeze", &["--freeze"], &self.0)
    }

    fn thaw(&self) -> Result<()> {
        run("fsfreeze", &["--unfreeze"], &self.0)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What waits for it can't be killed.
        let _ = self.thaw();
        let _ = run("umount", &["--lazy"], &self.0);
    }
}

fn run(program: &str, arguments: &[&str], path: &Path) -> Result<()> {
    let output = Command::new(program).args(arguments).arg(path).output().with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The server answers everybody, and no commit comes to its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_takes_no_wal_is_replaced_and_rejoins() -> Result<()> {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
        println!("SKIPPED: a disk that can be frozen takes root and loop devices");
        return Ok(());
    }
    if !namespace::inside("--mount", "failover::a_leader_whose_disk_takes_no_wal_is_replaced_and_rejoins")? {
        return Ok(());
    }
    let lab = Lab::new("stalled")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), Spec::new(3, &Program::agent()?))?;
    let disk = Disk::mount(&lab, &cluster.nodes[0].data_dir())?;
    // The first of them makes the cluster.
    cluster.nodes[0].start()?;
    cluster.leader(LIMIT).await?;
    for node in &mut cluster.nodes[1..] {
        node.start()?;
    }
    ensure!(cluster.settled(LIMIT).await? == 0, "another node leads");
    let router = cluster.router().await?;
    let mut scene = Scene { lab, etcd, cluster, router };
    let load = scene.load().await?;
    load.writers.progress(100, LIMIT).await?;

    let fault = SystemClock.now();
    disk.freeze()?;
    let replaced = scene.cluster.leader_other_than(0, LIMIT).await;
    let found = SystemClock.now().since(fault);
    load.writers.progress(100, LIMIT).await?;
    disk.thaw()?;
    replaced?;
    // A killed server that can't end has its key until the lease is over.
    ensure!(found > Duration::from_secs(9) && found < HUNG + AFTER_LEASE, "replaced after {found:?}");
    let dir = scene.lab.dir().to_owned();
    scene.finish(load).await?;
    // What it is mounted on could not be removed.
    drop(disk);
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_asked_to_end_hands_over_first() -> Result<()> {
    let mut scene = Scene::start("sigterm", 3).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;

    let fault = SystemClock.now();
    scene.cluster.nodes[old].stop(LIMIT).await?;
    scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    let outage = load.writers.record().outage(fault);
    ensure!(outage < AT_ONCE, "writes stood still for {outage:?}");

    scene.cluster.nodes[old].start()?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_replica_stops_nothing() -> Result<()> {
    let mut scene = Scene::start("replica", 3).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let replicas: Vec<usize> = (0..3).filter(|node| *node != leader).collect();

    // One after the other, so one of them is the synchronous standby: writes wait until another one takes its place.
    for replica in replicas {
        scene.cluster.nodes[replica].kill();
        load.writers.progress(100, LIMIT).await?;
        scene.cluster.nodes[replica].start()?;
        ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    }
    scene.finish(load).await?;
    Ok(())
}

/// The leader's next look at its standbys is up to `loop_wait` away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_synchronous_standby_is_let_go_before_it_is_restarted_or_stopped() -> Result<()> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.timing = Timing::PATRONI_STOCK;
    let mut scene = Scene::with("let-go", 1, spec).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    for restarts in [true, false] {
        let standby = synchronous(&scene).await?;
        let fault = SystemClock.now();
        if restarts {
            let answer = rest::post(scene.cluster.nodes[standby].rest_port(), "/restart", &json!({}), LIMIT).await?;
            ensure!(answer.status == 200, "{answer:?}");
        } else {
            scene.cluster.nodes[standby].stop(LIMIT).await?;
        }
        load.writers.progress(100, LIMIT).await?;
        let outage = load.writers.record().outage(fault);
        ensure!(outage < Duration::from_secs(2), "writes stood still for {outage:?}");
        ensure!(synchronous(&scene).await? != standby, "nobody has taken its place");
        if !restarts {
            scene.cluster.nodes[standby].start()?;
        }
        ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    }
    scene.finish(load).await?;
    Ok(())
}

/// Who is on the `sync` key.
async fn synchronous(scene: &Scene) -> Result<usize> {
    wait::until("a synchronous standby", LIMIT, async || {
        for (i, node) in scene.cluster.nodes.iter().enumerate() {
            if node.health("/sync").await == Some(200) {
                return Ok(i);
            }
        }
        anyhow::bail!("nobody is")
    })
    .await
}

/// Where commits wait for nobody, nothing but the lease keeps a second primary from being written to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_synchronous_replication_there_is_one_primary_and_a_handover_loses_nothing() -> Result<()> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": false, "primary_start_timeout": 0 });
    let mut scene = Scene::with("async", 1, spec).await?;
    let load = scene.load().await?;

    let first = scene.cluster.settled(LIMIT).await?;
    scene.cluster.switchover(first, None).await?;
    let second = scene.cluster.leader_other_than(first, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.cluster.settled(LIMIT).await?;

    scene.cluster.nodes[second].stop(LIMIT).await?;
    scene.cluster.leader_other_than(second, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.cluster.nodes[second].start()?;
    scene.cluster.settled(LIMIT).await?;

    scene.etcd.kill(0);
    tokio::time::sleep(Duration::from_secs(8)).await;
    scene.etcd.restart(0).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}
