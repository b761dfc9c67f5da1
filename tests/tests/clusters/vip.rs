//! The leader's address: on one host at a time, whatever happens to an agent. In a network namespace of its own, in which every
//! node has an interface, as if it were a host. Needs root.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Scene, Spec, namespace, wait};

const ADDRESS: &str = "10.77.0.9";

fn ip(arguments: &str) -> Result<String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("iproute2")?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The interfaces that have it.
fn holders() -> Result<BTreeSet<String>> {
    let text = ip("-o -4 addr show")?;
    let here = text.lines().filter(|line| line.contains(ADDRESS));
    Ok(here.filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect())
}

async fn held_by(node: usize) -> Result<()> {
    let wanted = BTreeSet::from([format!("host{node}")]);
    let held = async || {
        let holders = holders()?;
        ensure!(holders == wanted, "it is at {holders:?}, not {wanted:?}");
        Ok(())
    };
    wait::until("the leader's address to be where the leader is", LIMIT, held).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_address_is_where_the_leader_is_and_nowhere_else() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: addresses of a network of its own take root");
        return Ok(());
    }
    if !namespace::inside("--net", "vip::the_address_is_where_the_leader_is_and_nowhere_else")? {
        return Ok(());
    }
    ip("link set lo up")?;
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.cgroups = true;
    for node in 0..3 {
        ip(&format!("link add host{node} type veth peer name wire{node}"))?;
        ip(&format!("link set host{node} up"))?;
    }
    let lab = Lab::new("vip")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    for (i, node) in cluster.nodes.iter_mut().enumerate() {
        let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
        config["vip"] = json!({ "address": format!("{ADDRESS}/32"), "interface": format!("host{i}") });
        node.configure(&config.to_string())?;
        node.start()?;
    }
    let leader = cluster.settled(LIMIT).await?;
    let router = cluster.router().await?;
    let mut scene = Scene { lab, etcd, cluster, router };
    held_by(leader).await?;

    // Looked at all the time: never at two hosts.
    let (over, twice) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (stop, seen) = (over.clone(), twice.clone());
    let watch = std::thread::spawn(move || {
        while !stop.load(Ordering::SeqCst) {
            if holders().is_ok_and(|holders| holders.len() > 1) {
                seen.store(true, Ordering::SeqCst);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    });

    scene.cluster.switchover(leader, None).await?;
    let second = scene.cluster.leader_other_than(leader, LIMIT).await?;
    held_by(second).await?;
    scene.cluster.settled(LIMIT).await?;

    // A new agent finds it where its predecessor left it.
    scene.cluster.nodes[second].kill_agent();
    scene.cluster.nodes[second].start()?;
    scene.cluster.settled(LIMIT).await?;
    held_by(second).await?;

    // Killed for good: its guard gives the address up before another host can have it.
    scene.cluster.nodes[second].kill_agent();
    let third = scene.cluster.leader_other_than(second, LIMIT).await?;
    held_by(third).await?;
    scene.cluster.nodes[second].start()?;
    scene.cluster.settled(LIMIT).await?;

    // Hung.
    let pid = scene.cluster.nodes[third].agent().context("its agent")?.pid();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
    let fourth = scene.cluster.leader_other_than(third, LIMIT).await;
    rustix::process::kill_process(pid, rustix::process::Signal::CONT)?;
    held_by(fourth?).await?;
    scene.cluster.settled(LIMIT).await?;

    over.store(true, Ordering::SeqCst);
    watch.join().map_err(|_| anyhow::anyhow!("the watching thread"))?;
    ensure!(!twice.load(Ordering::SeqCst), "it was at two hosts at once");
    scene.lab.success();
    Ok(())
}
