//! The demo without a person: three faults under load, each measured, and then what was promised is verified.

use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use trunkline_common::{Clock, SystemClock};

use super::{Demo, Outcome};
use crate::lab::workload::Load;

/// How long a fault may take until writes go on and until the cluster is whole again.
const LIMIT: Duration = Duration::from_secs(60);

/// Rows that must be acknowledged between two faults.
const ROWS: usize = 100;

/// Runs all of it and prints what came out.
pub(super) async fn run(demo: &mut Demo) -> Result<Outcome> {
    let load = Load::start(&mut demo.cluster, &demo.router).await.context("before any fault")?;

    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["fault", "write outage", "leader before", "after"]);
    for fault in [Fault::Postmaster, Fault::Switchover, Fault::Node] {
        println!("{} …", fault.name());
        let (outage, before, after) = fault.happen(demo, &load).await.context(fault.name())?;
        table.add_row([fault.name(), &format!("{} ms", outage.as_millis()), &before, &after]);
    }

    let seen = load.end().await;
    println!("\n{table}");
    let leader = demo.cluster.leader(LIMIT).await?;
    let wrong = seen.wrong(&demo.cluster.nodes[leader].target(demo.password()), None).await?;
    println!("{}", seen.summary());
    for sentence in &wrong {
        println!("WRONG: {sentence}");
    }
    Ok(if wrong.is_empty() { Outcome::Done } else { Outcome::Wrong })
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    Postmaster,
    Switchover,
    Node,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Fault::Postmaster => "SIGKILL of the primary's postmaster",
            Fault::Switchover => "planned switchover",
            Fault::Node => "SIGKILL of the primary's whole node",
        }
    }

    /// Does it to the leader and waits until another node leads, writes go on, and the cluster is whole again. Returns
    /// the write outage and the names of the old and the new leader.
    async fn happen(self, demo: &mut Demo, load: &Load) -> Result<(Duration, String, String)> {
        let cluster = &mut demo.cluster;
        let old = cluster.settled(LIMIT).await?;
        let at = SystemClock.now();
        match self {
            Fault::Postmaster => cluster.nodes[old].kill_postmaster()?,
            Fault::Switchover => cluster.switchover(old, None).await?,
            Fault::Node => cluster.nodes[old].kill(),
        }
        let new = cluster.leader_other_than(old, LIMIT).await?;
        load.writers.progress(ROWS, LIMIT).await?;
        if matches!(self, Fault::Node) {
            cluster.nodes[old].start()?;
        }
        cluster.settled(LIMIT).await?;
        let outage = load.writers.record().outage(at);
        Ok((outage, cluster.nodes[old].name().to_owned(), cluster.nodes[new].name().to_owned()))
    }
}
