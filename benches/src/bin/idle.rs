//! `make bench-idle`: what an agent costs while nothing happens, beside Patroni's in the same run.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::json;
use trunkline_benches::table::{markdown, numbers};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Spec, Timing, patroni};

/// Resident memory and processor time of the agents of two idle clusters of three nodes, ours and Patroni's, with loop_wait 1, on
/// one etcd, at the same time.
#[derive(Debug, Parser)]
struct Args {
    /// For how long, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Until both have written what a new cluster writes.
const SETTLE: Duration = Duration::from_secs(15);

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let args = Args::parse();
    let lab = Lab::new("bench-idle")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let spec = |scope: &str, agent: &Program, timing: Timing| Spec {
        scope: scope.to_owned(),
        prefix: scope.to_owned(),
        timing,
        dcs: json!({}),
        ..Spec::new(3, agent)
    };
    let ours = spec("trunkline", &Program::agent()?, Timing::TRUNKLINE);
    let theirs = spec("patroni", &patroni::program()?, Timing::PATRONI_LOWEST);
    let mut clusters = Vec::new();
    for spec in [ours, theirs] {
        clusters.push(Cluster::start(&lab, &etcd.endpoints(), spec).await?);
    }
    tokio::time::sleep(SETTLE).await;

    let mut watched = Vec::new();
    for cluster in &mut clusters {
        let leader = cluster.settled(LIMIT).await?;
        for (i, node) in cluster.nodes.iter_mut().enumerate() {
            let name = format!("{} ({})", node.name(), if i == leader { "leader" } else { "replica" });
            let agent = node.agent().context("its agent runs")?.pid().as_raw_pid();
            watched.push((name.clone(), agent));
            // The guard, which is a process of its own.
            watched
                .extend(children(agent, "trunkline-guard").into_iter().map(|pid| (format!("{name}, its guard"), pid)));
        }
    }
    let cpu = |pid: i32| cpu(pid).with_context(|| format!("process {pid}"));
    let (began, before) = (SystemClock.now(), watched.iter().map(|(_, pid)| cpu(*pid)).collect::<Result<Vec<_>>>()?);
    tokio::time::sleep(Duration::from_secs(args.seconds)).await;
    let time = SystemClock.now().since(began);

    let mut table = markdown(&["process", "resident, MB", "of it private, MB", "threads", "processor, % of a core"]);
    numbers(&mut table, 1..5);
    for ((name, pid), before) in watched.iter().zip(before) {
        let share = (cpu(*pid)? - before).as_secs_f64() / time.as_secs_f64() * 100.0;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let megabytes = |field: &str| number(&status, field) / 1024.0;
        table.add_row([
            name.clone(),
            format!("{:.1}", megabytes("VmRSS:")),
            format!("{:.1}", megabytes("RssAnon:")),
            format!("{:.0}", number(&status, "Threads:")),
            format!("{share:.2}"),
        ]);
    }
    println!("{table}");
    lab.success();
    Ok(())
}

/// The number after `field` in a file of /proc; 0 where there is none.
fn number(text: &str, field: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
}

/// The processor time of all threads so far: exact, where the counters of `stat` count ticks.
fn cpu(pid: i32) -> Result<Duration> {
    let mut nanos = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        nanos += text.split_whitespace().next().and_then(|ran| ran.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos))
}

/// The children of a process that have this name.
fn children(parent: i32, name: &str) -> Vec<i32> {
    let named = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
    let of_parent = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        number(&status, "PPid:") == f64::from(parent)
    };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(named).filter(of_parent).collect()
}
