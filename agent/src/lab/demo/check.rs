//! The demo without a person: three faults under load, each measured, and then what was promised is verified.

use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use trunkline_common::{Clock, SystemClock};

use super::{Demo, Outcome};
use crate::lab::workload::{Read, Readers, Record, Writers};

/// Pause between two rows of a writer: what the outages are measured with.
const PACE: Duration = Duration::from_millis(2);

/// How long a fault may take until writes go on and until the cluster is whole again.
const LIMIT: Duration = Duration::from_secs(60);

/// Rows that must be acknowledged between two faults.
const ROWS: usize = 100;

/// Runs all of it and prints what came out.
pub(super) async fn run(demo: &mut Demo) -> Result<Outcome> {
    let password = demo.password().to_owned();
    let load = Load {
        writers: Writers::start(&demo.read_write(), 1, 2, PACE),
        direct: Writers::direct(&demo.cluster.targets(), 101, PACE),
        readers: Readers::start(&demo.router.read_only(&password), 1, Duration::from_millis(10)),
    };
    load.writers.progress(ROWS, LIMIT).await.context("before any fault")?;

    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["fault", "write outage", "leader before", "after"]);
    for fault in [Fault::Postmaster, Fault::Switchover, Fault::Node] {
        println!("{} …", fault.name());
        let (outage, before, after) = fault.happen(demo, &load).await.context(fault.name())?;
        table.add_row([fault.name(), &format!("{} ms", outage.as_millis()), &before, &after]);
    }

    let promised = load.end().await;
    println!("\n{table}");
    let leader = demo.cluster.leader(LIMIT).await?;
    let missing = promised.all.missing(&demo.cluster.nodes[leader].target(&password)).await?;
    let wrong = promised.wrong(missing.len());
    println!("{}", promised.summary());
    for sentence in &wrong {
        println!("WRONG: {sentence}");
    }
    Ok(if wrong.is_empty() { Outcome::Done } else { Outcome::Wrong })
}

/// The clients.
struct Load {
    writers: Writers,
    direct: Writers,
    readers: Readers,
}

impl Load {
    async fn end(self) -> Promised {
        let routed = self.writers.stop().await;
        let all = routed.clone().with(self.direct.stop().await);
        Promised { routed, all, reads: self.readers.stop().await }
    }
}

/// What the clients saw.
struct Promised {
    /// What was acknowledged through the router.
    routed: Record,
    /// That, and what was acknowledged past it.
    all: Record,
    /// The answers on the read-only port.
    reads: Vec<Read>,
}

impl Promised {
    fn wrong(&self, missing: usize) -> Vec<String> {
        let mut wrong = Vec::new();
        if missing > 0 {
            wrong.push(format!("{missing} of {} acknowledged rows are missing", self.all.writes.len()));
        }
        if let Some(found) = self.all.two_primaries() {
            wrong.push(format!("two nodes took writes at the same time: {found}"));
        }
        let misled = self.routed.misled(&self.reads).len();
        if misled > 0 {
            wrong.push(format!("{misled} of {} reads on the read-only port came from the primary", self.reads.len()));
        }
        if self.reads.is_empty() {
            wrong.push("nothing could be read on the read-only port".to_owned());
        }
        wrong
    }

    fn summary(&self) -> String {
        let standby = self.reads.iter().filter(|read| read.standby).count();
        format!(
            "{} acknowledged rows ({} through the router, {} statements there failed and were repeated as new ones); \
             {standby} of {} reads came from standbys",
            self.all.writes.len(),
            self.routed.writes.len(),
            self.routed.failures,
            self.reads.len(),
        )
    }
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
