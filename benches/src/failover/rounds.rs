//! Faults, one after the other, under load.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use trunkline_common::{Clock, Instant, SystemClock};
use trunkline_tests::workload::{Load, Record};
use trunkline_tests::{Cluster, Etcd, Lab, rest};

use super::arrangement::Arrangement;
use super::stages::{KeyEvents, Stages};

/// How long anything may take: far longer than the slowest arrangement needs.
const LIMIT: Duration = Duration::from_secs(180);

/// Rows that must be acknowledged before a fault counts as over.
const ROWS: usize = 100;

/// What is done to the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// `POST /switchover` without a candidate.
    Switchover,
    /// SIGKILL of the postmaster under a living agent.
    Postmaster,
    /// SIGKILL of the agent and everything of PostgreSQL.
    Node,
}

impl Fault {
    /// In the order in which a round does them.
    pub const ALL: [Fault; 3] = [Fault::Switchover, Fault::Postmaster, Fault::Node];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Switchover => "planned switchover",
            Fault::Postmaster => "SIGKILL of the postmaster",
            Fault::Node => "SIGKILL of the node",
        }
    }

    /// Its name in `GET /rto`.
    fn in_rto(self) -> &'static str {
        match self {
            Fault::Switchover => "switchover",
            Fault::Postmaster => "postmaster_death",
            Fault::Node => "host_death",
        }
    }
}

/// One fault.
#[derive(Debug, Clone, Serialize)]
pub struct Round {
    /// What was done.
    pub fault: Fault,
    /// Milliseconds without an acknowledged write through the proxy.
    pub outage_ms: f64,
    /// Where they went; of ours only.
    pub stages: Option<Stages>,
    /// What `GET /rto` of the leader had said of this fault before; of ours only.
    pub told_ms: Option<f64>,
}

/// What came out of one arrangement.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Which one.
    pub arrangement: Arrangement,
    /// Whether commits waited for a standby: only then must none be lost.
    pub synchronous: bool,
    /// Its settings.
    pub settings: String,
    /// Every fault.
    pub rounds: Vec<Round>,
    /// Rows acknowledged in all.
    pub acknowledged: usize,
    /// How many of them are gone.
    pub lost: usize,
    /// The proof that two nodes took writes at the same time, if there is one.
    pub two_primaries: Option<String>,
}

impl Measured {
    /// The outages of one fault, in milliseconds, shortest first.
    pub fn outages(&self, fault: Fault) -> Vec<f64> {
        let mut outages: Vec<f64> =
            self.rounds.iter().filter(|round| round.fault == fault).map(|round| round.outage_ms).collect();
        outages.sort_by(f64::total_cmp);
        outages
    }
}

/// Starts an arrangement of three nodes, does every fault `rounds` times, and ends it.
///
/// # Errors
/// Something does not come up, or not again after a fault.
pub async fn measure(
    lab: &Lab,
    etcd: &Etcd,
    arrangement: Arrangement,
    synchronous: bool,
    rounds: usize,
) -> Result<Measured> {
    let (mut cluster, proxy) = arrangement.start(lab, etcd, 3, synchronous).await?;
    let load = Load::start(&mut cluster, &proxy).await?;
    let events = KeyEvents::follow(&cluster).await?;
    let mut done = Vec::new();
    for turn in 1..=rounds {
        for fault in Fault::ALL {
            let round = round(&mut cluster, &load, fault, arrangement, &events, &proxy).await;
            let round = round.with_context(|| format!("{}, round {turn}, {}", arrangement.name(), fault.name()))?;
            eprintln!("  {turn}/{rounds} {}: {:.0} ms", fault.name(), round.outage_ms);
            done.push(round);
        }
    }

    let leader = cluster.settled(LIMIT).await?;
    let seen = load.end().await;
    let missing = seen.all.missing(&cluster.nodes[leader].target(&cluster.spec().password)).await?;
    cluster.nodes.iter_mut().for_each(trunkline_tests::Node::kill);
    Ok(Measured {
        arrangement,
        synchronous,
        settings: arrangement.settings(synchronous),
        rounds: done,
        acknowledged: seen.all.writes.len(),
        lost: missing.len(),
        two_primaries: seen.all.two_primaries().map(|found| found.to_string()),
    })
}

async fn round(
    cluster: &mut Cluster,
    load: &Load,
    fault: Fault,
    arrangement: Arrangement,
    events: &KeyEvents,
    proxy: &trunkline_tests::Proxy,
) -> Result<Round> {
    let old = cluster.settled(LIMIT).await?;
    load.writers.progress(ROWS, LIMIT).await?;

    let told_ms = match arrangement {
        Arrangement::Trunkline => {
            let told = rest::get(cluster.nodes[old].rest_port(), "/rto").await?.body;
            told["estimate_ms"][fault.in_rto()].as_f64()
        }
        Arrangement::Tuned | Arrangement::Stock => None,
    };
    let at = SystemClock.now();
    match fault {
        Fault::Switchover => cluster.switchover(old, None).await?,
        Fault::Postmaster => cluster.nodes[old].kill_postmaster()?,
        Fault::Node => cluster.nodes[old].kill(),
    }
    recovered(load, at).await?;
    let record = load.writers.record();
    let outage = record.outage(at);
    let stages = match arrangement {
        Arrangement::Trunkline => {
            Some(Stages::of(at, &record, &load.direct_record(), events, &cluster.nodes[old], proxy))
        }
        Arrangement::Tuned | Arrangement::Stock => None,
    };

    if fault == Fault::Node {
        cluster.nodes[old].start()?;
    }
    Ok(Round { fault, outage_ms: milliseconds(outage), stages, told_ms })
}

/// Waits until rows have been acknowledged that were begun after the fault and after the interruption it caused.
async fn recovered(load: &Load, fault: Instant) -> Result<()> {
    /// Shorter than any interruption, longer than the ordinary time between two rows.
    const INTERRUPTION: Duration = Duration::from_millis(15);
    let interrupted = |record: &Record| record.outage(fault) > INTERRUPTION;
    trunkline_tests::wait::until("writes to stop and go on", LIMIT, async || {
        load.writers.progress(ROWS, LIMIT).await?;
        anyhow::ensure!(interrupted(&load.writers.record()), "they have not stopped yet");
        Ok(())
    })
    .await
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}
