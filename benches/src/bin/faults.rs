//! `make bench-faults`: how long writes are out when a host freezes or etcd is lost, one fault after the other.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::json;
use trunkline_common::{Clock, Instant, SystemClock};
use trunkline_tests::workload::{Load, Record};
use trunkline_tests::{Etcd, LIMIT, Program, Scene, Spec, rest, wait};

/// The write outage that clients of the router see, for faults that `bench-failover` has not. Three nodes, synchronous
/// mode, ttl 5; every fault on a cluster of its own. The clients set no timeout and note every answer. Needs an idle
/// machine.
#[derive(Debug, Parser)]
struct Args {
    /// How often a host is frozen, and lost together with etcd's leader
    #[arg(long, default_value_t = 3)]
    rounds: usize,

    /// How long etcd is dead, in seconds
    #[arg(long, default_value_t = 60)]
    outage: u64,
}

/// What PostgreSQL says where a write was led to a standby.
const WRONG_NODE: &str = "read-only transaction";

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let outage = Duration::from_secs(args.outage);
    println!("| fault | writes out for, s | failed statements | wrong-node answers |\n| --- | --- | --- | --- |");
    let mut right = frozen(args.rounds).await?;
    right &= without_etcd(outage, true).await?;
    right &= without_etcd(outage, false).await?;
    right &= with_etcd_leader(args.rounds).await?;
    println!("\nAcknowledged rows lost, two primaries: {}", if right { "none" } else { "SEE ABOVE" });
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Every process of the primary's host is stopped; its connections stay open and mute.
async fn frozen(rounds: usize) -> Result<bool> {
    let mut scene = Scene::start("bench-frozen", 3).await?;
    let mut run = Run::start(&mut scene).await?;
    for _ in 0..rounds {
        let old = scene.cluster.settled(LIMIT).await?;
        run.load.writers.progress(100, LIMIT).await?;
        let at = SystemClock.now();
        scene.cluster.nodes[old].freeze();
        scene.cluster.leader_other_than(old, LIMIT).await?;
        run.measure(at).await?;
        scene.cluster.nodes[old].thaw();
    }
    run.end(scene, "primary's host frozen").await
}

/// The only member of etcd is killed, and started again after `outage`.
async fn without_etcd(outage: Duration, failsafe: bool) -> Result<bool> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": true, "primary_start_timeout": 0, "failsafe_mode": failsafe });
    let mut scene = Scene::with("bench-etcd", 1, spec).await?;
    let mut run = Run::start(&mut scene).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let port = scene.cluster.nodes[leader].rest_port();
    let listed = wait::until("everybody in the failsafe key", LIMIT, async || {
        let members = rest::get(port, "/failsafe").await?.body;
        ensure!(!failsafe || members.as_object().is_some_and(|members| members.len() == 3), "{members}");
        Ok(())
    });
    listed.await?;
    let at = SystemClock.now();
    scene.etcd.kill(0);
    tokio::time::sleep(outage).await;
    scene.etcd.restart(0).await?;
    let dead = SystemClock.now().since(at);
    // What the return of etcd costs belongs to it.
    tokio::time::sleep(Duration::from_secs(15)).await;
    run.measure(at).await?;
    let mode = if failsafe { "on" } else { "off" };
    run.end(scene, &format!("etcd dead for {:.1} s, failsafe {mode}", dead.as_secs_f64())).await
}

/// The primary's host is lost together with the leader of three etcd members.
async fn with_etcd_leader(rounds: usize) -> Result<bool> {
    let mut scene = Scene::with("bench-both", 3, Spec::new(3, &Program::agent()?)).await?;
    let mut run = Run::start(&mut scene).await?;
    for _ in 0..rounds {
        let old = scene.cluster.settled(LIMIT).await?;
        let member = etcd_leader(&scene.etcd).await?;
        run.load.writers.progress(100, LIMIT).await?;
        let at = SystemClock.now();
        scene.etcd.kill(member);
        scene.cluster.nodes[old].kill();
        scene.cluster.leader_other_than(old, LIMIT).await?;
        run.measure(at).await?;
        scene.etcd.restart(member).await?;
        scene.cluster.nodes[old].start()?;
    }
    run.end(scene, "primary's host and etcd's leader lost together").await
}

/// Which member leads etcd, by its own word in its metrics.
async fn etcd_leader(etcd: &Etcd) -> Result<usize> {
    for (member, endpoint) in etcd.endpoints().iter().enumerate() {
        let port: u16 = endpoint.rsplit(':').next().context("no port")?.parse()?;
        let metrics = rest::get(port, "/metrics").await?.body;
        if metrics.as_str().is_some_and(|text| text.lines().any(|line| line == "etcd_server_is_leader 1")) {
            return Ok(member);
        }
    }
    anyhow::bail!("etcd has no leader")
}

/// The clients of one cluster, and what was measured with them.
struct Run {
    load: Load,
    outages: Vec<f64>,
    before: Record,
}

impl Run {
    async fn start(scene: &mut Scene) -> Result<Self> {
        let load = scene.load().await?;
        scene.cluster.settled(LIMIT).await?;
        let before = load.writers.record();
        Ok(Self { load, outages: Vec::new(), before })
    }

    /// Waits until writes go on, and notes the longest time without one since `at`.
    async fn measure(&mut self, at: Instant) -> Result<()> {
        self.load.writers.progress(200, LIMIT).await?;
        let outage = self.load.writers.record().outage(at);
        eprintln!("  {outage:?}");
        self.outages.push(outage.as_secs_f64());
        Ok(())
    }

    /// Prints the row and verifies what the clients saw.
    async fn end(mut self, scene: Scene, fault: &str) -> Result<bool> {
        self.outages.sort_by(f64::total_cmp);
        let outages = self.outages.iter().map(|outage| format!("{outage:.2}")).collect::<Vec<_>>().join(" / ");
        let record = self.load.writers.record();
        let failed = record.failures - self.before.failures;
        let wrong = record.failed_with(WRONG_NODE);
        println!("| {fault} | {outages} | {failed} | {wrong} |");
        for (error, count) in &record.errors {
            eprintln!("  {count} × {error}");
        }
        let verified = scene.finish(self.load).await;
        if let Err(error) = &verified {
            println!("WRONG: {error:#}");
        }
        Ok(verified.is_ok() && wrong == 0)
    }
}
