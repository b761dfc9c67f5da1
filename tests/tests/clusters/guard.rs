//! A primary whose lease is over takes no write, whatever has become of its agent.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::json;
use trunkline_common::{Clock, Instant, SystemClock};
use trunkline_tests::workload::{Load, Writers};
use trunkline_tests::{LIMIT, Lab, Node, Program, Scene, Spec, wait};

/// A little more than the lease of a lab cluster.
const LEASE: Duration = Duration::from_millis(5500);

/// Three nodes where commits wait for nobody, so that nothing but the lease keeps a deposed primary from taking writes.
async fn asynchronous(name: &str) -> Result<(Scene, Load, usize)> {
    asynchronous_in(Lab::new(name)?, json!({})).await
}

/// The same in a lab that is there, with something laid over each `patroni.yml`.
async fn asynchronous_in(lab: Lab, local: serde_json::Value) -> Result<(Scene, Load, usize)> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": false, "primary_start_timeout": 0 });
    spec.local = local;
    let mut scene = Scene::in_lab(lab, 1, spec).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    Ok((scene, load, leader))
}

/// The guard process of a node.
fn guard_of(node: &Node) -> Result<Pid> {
    process_of(node, "trunkline-guard")
}

fn process_of(node: &Node, name: &str) -> Result<Pid> {
    let is_called = |pid: &Pid| {
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_pid()));
        comm.is_ok_and(|comm| comm.trim() == name)
    };
    let found: Vec<Pid> = node.processes().into_iter().filter(is_called).collect();
    ensure!(found.len() == 1, "{} has {} of {name}", node.name(), found.len());
    Ok(found[0])
}

/// Notes when a process ends.
fn end_of(pid: Pid) -> Result<tokio::task::JoinHandle<Instant>> {
    let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    Ok(tokio::task::spawn_blocking(move || {
        let _ = rustix::event::poll(&mut [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)], None);
        SystemClock.now()
    }))
}

/// The old primary is dead before the new one has its first write.
async fn ends_before_the_next(
    name: &str,
    (mut scene, load, old): (Scene, Load, usize),
    fault: impl FnOnce(&mut Node),
    mend: impl FnOnce(&mut Node) -> Result<()>,
) -> Result<()> {
    let old_port = scene.cluster.nodes[old].port();
    let ended = end_of(scene.cluster.nodes[old].postmaster()?)?;
    fault(&mut scene.cluster.nodes[old]);
    let began = SystemClock.now();
    scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;

    let ended = tokio::time::timeout(Duration::from_secs(1), ended).await.context("the old postmaster lives")??;
    let record = load.writers.record().with(load.direct_record());
    let first = record.writes.iter().filter(|write| write.port != old_port).map(|write| write.acked).min();
    let first = first.context("no write by the new primary")?;
    println!("{name}: killed {:?} after the fault, {:?} before the next write", ended.since(began), first.since(ended));
    ensure!(ended < first, "the old postmaster ended {:?} after the first write of the new one", ended.since(first));
    let late = record.writes.iter().find(|write| write.port == old_port && write.acked > first);
    ensure!(late.is_none(), "a write by the old primary after the first one of the new: {late:?}");

    mend(&mut scene.cluster.nodes[old])?;
    scene.finish_after_kill(load, old).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_without_agent_is_ended_by_its_guard() -> Result<()> {
    let name = "guard-kill";
    ends_before_the_next(name, asynchronous(name).await?, Node::kill_agent, Node::start).await
}

/// By `bin_name`. Agent and guard have nothing but the processes to go by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_whose_program_has_another_name_is_taken_over_and_ended_as_any() -> Result<()> {
    let name = "guard-name";
    let lab = Lab::new(name)?;
    let program = lab.make_dir("programs")?.join("elephant");
    std::fs::copy(lab.tools().postgres_bin.join("postgres"), &program)?;
    let program = program.canonicalize()?;
    let local = json!({ "postgresql": { "bin_name": { "postgres": program } } });
    let (mut scene, load, leader) = asynchronous_in(lab, local).await?;
    let node = &mut scene.cluster.nodes[leader];
    let before = node.postmaster()?;
    let runs = std::fs::read_link(format!("/proc/{}/exe", before.as_raw_pid()))?;
    ensure!(runs == program, "the server is {}", runs.display());
    let failures = load.writers.record().failures;
    node.kill_agent();
    node.start()?;
    wait::until("the new agent to lead", LIMIT, async || {
        let status = scene.cluster.nodes[leader].health("/primary").await;
        ensure!(status == Some(200), "GET /primary is {status:?}");
        Ok(())
    })
    .await?;
    load.writers.progress(100, LIMIT).await?;
    ensure!(scene.cluster.nodes[leader].postmaster()? == before, "PostgreSQL was restarted");
    ensure!(load.writers.record().failures == failures, "statements failed");

    ends_before_the_next(name, (scene, load, leader), Node::kill_agent, Node::start).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_agent_hangs_is_ended_by_its_guard() -> Result<()> {
    let signal = |node: &mut Node, signal| {
        if let Some(agent) = node.agent() {
            agent.signal(signal);
        }
    };
    let mend = |node: &mut Node| {
        signal(node, Signal::CONT);
        Ok(())
    };
    let name = "guard-hang";
    ends_before_the_next(name, asynchronous(name).await?, |node| signal(node, Signal::STOP), mend).await
}

/// With and without synchronous replication, and behind an egress fence where that can be; several times, each within the
/// lease and past the one that the dead agent had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_started_again_within_its_lease_costs_no_write() -> Result<()> {
    let missing = fences_can_be_tested().map_err(|why| println!("SKIPPED: behind an egress fence: {why}"));
    let fenced = missing.is_ok();
    for (synchronous, fenced) in [(true, false), (false, fenced)] {
        let mut spec = Spec::new(2, &Program::agent()?);
        spec.dcs = json!({ "synchronous_mode": synchronous, "primary_start_timeout": 0 });
        spec.cgroups = fenced;
        let mut scene = Scene::with("restart", 1, spec).await?;
        let load = scene.load().await?;
        let leader = scene.cluster.settled(LIMIT).await?;
        let postmaster = scene.cluster.nodes[leader].postmaster()?;
        let (before, began) = (load.writers.record(), SystemClock.now());
        for pause in [0, 1000] {
            scene.cluster.nodes[leader].kill_agent();
            tokio::time::sleep(Duration::from_millis(pause)).await;
            scene.cluster.nodes[leader].start()?;
            tokio::time::sleep(LEASE).await;
            ensure!(scene.cluster.nodes[leader].postmaster()? == postmaster, "PostgreSQL was restarted");
            ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
            guard_of(&scene.cluster.nodes[leader])?;
            let guard = scene.cluster.nodes[leader].status().await?["guard"].clone();
            ensure!(guard["process"] == "armed" && (!fenced || guard["egress"] == "armed"), "{guard}");
        }
        load.writers.progress(100, LIMIT).await?;
        let after = load.writers.record();
        let failed = after.failures - before.failures;
        let (rows, longest) = (after.writes.len() - before.writes.len(), after.outage(began));
        println!("synchronous {synchronous}, fenced {fenced}: {rows} rows, {failed} failed, longest pause {longest:?}");
        ensure!(failed == 0, "{failed} statements failed, the last with {:?}", after.last_error);
        scene.finish(load).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guard_that_is_killed_or_hangs_is_replaced() -> Result<()> {
    let (scene, load, leader) = asynchronous("guard-lost").await?;
    let node = &scene.cluster.nodes[leader];
    let mut guard = guard_of(node)?;
    for signal in [Signal::KILL, Signal::STOP] {
        rustix::process::kill_process(guard, signal)?;
        let replaced = wait::until("another guard", LIMIT, async || {
            let new = guard_of(node)?;
            ensure!(new != guard, "the old one is there");
            let status = node.status().await?;
            ensure!(status["guard"]["process"] == "armed", "{}", status["guard"]);
            Ok(new)
        });
        guard = replaced.await?;
    }
    node.says("starting another one", LIMIT).await?;
    ensure!(load.writers.record().failures == 0, "a write failed");
    scene.finish(load).await?;
    Ok(())
}

/// Paused, an operator has taken over: nothing is killed, neither with the agent nor without, nor by one that knows of the pause
/// by what it has kept alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_cluster_is_not_guarded() -> Result<()> {
    let (mut scene, load, leader) = asynchronous("guard-pause").await?;
    scene.cluster.patch_config(&json!({ "pause": true })).await?;
    let disarmed = wait::until("the guard to be disarmed", LIMIT, async || {
        let status = scene.cluster.nodes[leader].status().await?;
        ensure!(status["guard"]["process"] == "ready", "{}", status["guard"]);
        Ok(())
    });
    disarmed.await?;
    let postmaster = scene.cluster.nodes[leader].postmaster()?;
    scene.cluster.nodes[leader].kill_agent();
    let gone = wait::until("the guard to end", LIMIT, async || {
        ensure!(guard_of(&scene.cluster.nodes[leader]).is_err(), "it is there");
        Ok(())
    });
    gone.await?;
    tokio::time::sleep(LEASE).await;
    ensure!(scene.cluster.nodes[leader].postmaster()? == postmaster, "PostgreSQL was killed");
    // Nor by an agent that has never read the DCS.
    scene.etcd.kill(0);
    scene.cluster.nodes[leader].start()?;
    scene.cluster.nodes[leader].says("waiting for the DCS (paused when it was last read)", LIMIT).await?;
    tokio::time::sleep(LEASE).await;
    ensure!(scene.cluster.nodes[leader].postmaster()? == postmaster, "PostgreSQL was stopped");
    let standby = scene.node(leader).query_one("SELECT pg_is_in_recovery()", LIMIT).await?;
    ensure!(standby == "f", "it is a standby");
    scene.etcd.restart(0).await?;
    let leads = wait::until("the primary to have its key again", LIMIT, async || {
        ensure!(scene.cluster.nodes[leader].health("/primary").await == Some(200), "it has not");
        Ok(())
    });
    leads.await?;
    scene.cluster.patch_config(&json!({ "pause": null })).await?;
    scene.finish(load).await?;
    Ok(())
}

/// How often a client of the old primary has had a write acknowledged after its host was thawed: what the fence of the
/// kernel's is for. Not without root, cgroups of version 2 and BPF.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_leaves_a_host_that_was_frozen_beyond_its_lease() -> Result<()> {
    if let Err(why) = fences_can_be_tested() {
        println!("SKIPPED: answers of a thawed host behind an egress fence: {why}");
        return Ok(());
    }
    let slipped = slipped_after_thaw("guard-fence", "automatic").await?;
    ensure!(slipped == 0, "{slipped} writes were acknowledged by a deposed primary");
    Ok(())
}

/// The figure to compare with: run by hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a promise: how many answers the guard process alone is too late for"]
async fn answers_of_a_thawed_host_without_a_fence() -> Result<()> {
    let slipped = slipped_after_thaw("guard-race", "off").await?;
    println!("{slipped} writes slipped through");
    Ok(())
}

fn fences_can_be_tested() -> Result<()> {
    let lab = trunkline_tests::Lab::new("guard-probe")?;
    let probe = lab.cgroup("probe");
    lab.success();
    probe.map(drop)
}

/// How a host goes on after it was frozen for so long, or until somebody else has taken writes.
#[derive(Debug, Clone, Copy)]
enum Thaw {
    /// Everything at the same time.
    AtOnce,
    /// PostgreSQL before whoever could stop it.
    PostgresFirst(Duration),
}

/// Freezes the primary's host past its lease, and counts the writes that clients connected to it directly saw
/// acknowledged after the end of that lease.
async fn slipped_after_thaw(name: &str, egress: &str) -> Result<usize> {
    const CLIENTS: u32 = 8;
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": false, "primary_start_timeout": 0 });
    spec.local = json!({ "guard": { "egress": egress } });
    spec.cgroups = true;
    let mut scene = Scene::with(name, 1, spec).await?;
    let load = scene.load().await?;
    let mut slipped = 0;
    let (soon, minute) = (Duration::ZERO, Duration::from_secs(60));
    let thaws = [(Thaw::AtOnce, soon), (Thaw::AtOnce, minute), (Thaw::PostgresFirst(Duration::from_millis(200)), soon)];
    for (round, (thaw, lasts)) in (1..).zip(thaws) {
        let old = scene.cluster.settled(LIMIT).await?;
        let node = &scene.cluster.nodes[old];
        let status = node.status().await?;
        let expected = if egress == "off" { "off: switched off by guard.egress" } else { "armed" };
        ensure!(status["guard"]["egress"] == expected, "{}", status["guard"]);
        let target = scene.node(old);
        let clients: Vec<Writers> =
            (0..CLIENTS).map(|i| Writers::start(&target, 1000 * round + i, 1, Duration::ZERO)).collect();
        for client in &clients {
            client.progress(20, LIMIT).await?;
        }
        let old_port = node.port();
        let frozen = SystemClock.now();
        let cgroup = node.cgroup().context("no cgroup")?;
        match thaw {
            Thaw::AtOnce => cgroup.freeze(true)?,
            Thaw::PostgresFirst(_) => node.freeze(),
        }
        scene.cluster.leader_other_than(old, LIMIT).await?;
        load.writers.progress(100, LIMIT).await?;
        tokio::time::sleep(lasts.saturating_sub(SystemClock.now().since(frozen)).max(Duration::from_secs(1))).await;

        let thawed = SystemClock.now();
        let node = &scene.cluster.nodes[old];
        match thaw {
            Thaw::AtOnce => node.cgroup().context("no cgroup")?.freeze(false)?,
            Thaw::PostgresFirst(lead) => {
                let others = [guard_of(node)?, process_of(node, "trunkline-agent")?];
                for pid in node.processes().into_iter().filter(|pid| !others.contains(pid)) {
                    let _ = rustix::process::kill_process(pid, Signal::CONT);
                }
                tokio::time::sleep(lead).await;
                node.thaw();
            }
        }
        tokio::time::sleep(Duration::from_secs(4)).await;
        let mut late = Vec::new();
        for client in clients {
            let writes = client.record().writes;
            // Not waited for: one whose answer is held back waits as for a host that has lost its power.
            tokio::spawn(client.stop());
            late.extend(writes.into_iter().filter(|write| write.port == old_port && write.acked > frozen + LEASE));
        }
        let last = late.iter().map(|write| write.acked.since(thawed)).max();
        println!(
            "{thaw:?}: {} writes of {CLIENTS} clients were acknowledged late, the last after {last:?}",
            late.len()
        );
        slipped += late.len();
    }
    load.end().await;
    scene.lab.success();
    Ok(slipped)
}
