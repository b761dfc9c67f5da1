//! The usual mix of clients round a fault, and everything that must be true of what they saw.

use std::time::Duration;

use anyhow::{Result, bail};

use super::{Read, Readers, Record, Target, Writers};
use crate::lab::{Cluster, Proxy};

/// Pause between two rows of a writer: what outages are measured with.
const PACE: Duration = Duration::from_millis(2);

/// Two writers and a reader through a proxy, and one writer to every node past it.
#[derive(Debug)]
pub struct Load {
    /// Through the read-write port.
    pub writers: Writers,
    direct: Writers,
    readers: Readers,
}

impl Load {
    /// Starts the clients, and waits for the first acknowledged rows.
    ///
    /// # Errors
    /// The table can't be made, or nothing can be written.
    pub async fn start(cluster: &mut Cluster, proxy: &Proxy) -> Result<Self> {
        let limit = Duration::from_secs(30);
        let password = cluster.spec().password.clone();
        let leader = cluster.leader(limit).await?;
        super::create_table(&cluster.nodes[leader].target(&password)).await?;
        let load = Self {
            writers: Writers::start(&proxy.read_write(&password), 1, 2, PACE),
            direct: Writers::direct(&cluster.targets(), 101, PACE),
            readers: Readers::start(&proxy.read_only(&password), 1, Duration::from_millis(10)),
        };
        load.writers.progress(100, limit).await?;
        Ok(load)
    }

    /// What was acknowledged past the proxy so far.
    pub fn direct_record(&self) -> Record {
        self.direct.record()
    }

    /// Ends the clients.
    pub async fn end(self) -> Seen {
        let routed = self.writers.stop().await;
        let all = routed.clone().with(self.direct.stop().await);
        Seen { routed, all, reads: self.readers.stop().await }
    }
}

/// What the clients of a [`Load`] saw.
#[derive(Debug)]
pub struct Seen {
    /// What was acknowledged through the proxy.
    pub routed: Record,
    /// That, and what was acknowledged past it.
    pub all: Record,
    /// The answers on the read-only port.
    pub reads: Vec<Read>,
}

impl Seen {
    /// What is wrong, as sentences: acknowledged rows that the server behind `leader` does not have, two primaries at
    /// the same time, reads that a known primary answered. Rows are lost rightly where they are the last ones of the
    /// server at the port `killed`, whose commits waited for nobody.
    ///
    /// # Errors
    /// The leader can't be asked.
    pub async fn wrong(&self, leader: &Target, killed: Option<u16>) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let missing = self.all.missing(leader).await?;
        let rightly = killed.is_some_and(|port| self.all.is_tail_of(&missing, port));
        if let Some(first) = missing.first().filter(|_| !rightly) {
            let of = self.all.writes.len();
            wrong.push(format!("{} of {of} acknowledged rows are missing, the first is {first:?}", missing.len()));
        }
        if let Some(found) = self.all.two_primaries() {
            wrong.push(format!("two nodes took writes at the same time: {found}"));
        }
        let misled = self.routed.misled(&self.reads);
        if let Some(first) = misled.first() {
            let of = self.reads.len();
            wrong.push(format!(
                "{} of {of} read-only sessions led to the primary, the first is {first:?}",
                misled.len()
            ));
        }
        if self.reads.is_empty() {
            wrong.push("nothing could be read on the read-only port".to_owned());
        }
        Ok(wrong)
    }

    /// Every acknowledged row is on the server behind `leader` (but for the last ones of the one at the port `killed`,
    /// if any, where commits wait for no standby), there was one primary at a time, and reads went to standbys.
    ///
    /// # Errors
    /// Something is wrong, or the leader can't be asked.
    pub async fn verify(&self, leader: &Target, killed: Option<u16>) -> Result<()> {
        let wrong = self.wrong(leader, killed).await?;
        if !wrong.is_empty() {
            bail!("{}", wrong.join("; "));
        }
        Ok(())
    }

    /// One line of numbers.
    pub fn summary(&self) -> String {
        let standby = self.reads.iter().filter(|read| read.standby).count();
        format!(
            "{} acknowledged rows, {} of them through the router, where {} statements failed; \
             {standby} of {} reads came from standbys",
            self.all.writes.len(),
            self.routed.writes.len(),
            self.routed.failures,
            self.reads.len(),
        )
    }
}
