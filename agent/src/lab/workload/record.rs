//! What was acknowledged, and what follows from it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio_postgres::SimpleQueryMessage;
use trunkline_common::Instant;

use super::Target;

/// An acknowledged row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Who wrote it.
    pub writer: u32,
    /// Its number among this writer's rows.
    pub seq: u64,
    /// When the client began, connecting included.
    pub sent: Instant,
    /// When the client had the acknowledgement.
    pub acked: Instant,
    /// The port of the PostgreSQL that took it.
    pub port: u16,
    /// The timeline it was written on.
    pub timeline: u32,
}

/// An answered read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// When the client began to connect.
    pub sent: Instant,
    /// When it had the answer.
    pub answered: Instant,
    /// The port of the PostgreSQL that answered.
    pub port: u16,
    /// Whether that server was a standby.
    pub standby: bool,
}

/// Everything some writers were promised.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// Acknowledged rows, in the order of their acknowledgement.
    pub writes: Vec<Write>,
    /// How many attempts failed.
    pub failures: u64,
    /// What the last failure said.
    pub last_error: Option<String>,
    /// What failures said, and how often; at most [`MOST_KINDS`] of them.
    pub errors: BTreeMap<String, u64>,
}

/// So many different errors are told apart.
const MOST_KINDS: usize = 100;

/// Two acknowledged rows that no single primary can have taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TwoPrimaries {
    /// Acknowledged first, by the newer primary.
    pub newer: Write,
    /// Sent after that, and yet taken by another one.
    pub older: Write,
}

impl fmt::Display for TwoPrimaries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "port {} took a write on timeline {} that was sent {:?} after port {} had acknowledged one on timeline {}",
            self.older.port,
            self.older.timeline,
            self.older.sent.since(self.newer.acked),
            self.newer.port,
            self.newer.timeline,
        )
    }
}

impl Record {
    pub(super) fn failed(&mut self, error: String) {
        self.failures += 1;
        if self.errors.len() < MOST_KINDS || self.errors.contains_key(&error) {
            *self.errors.entry(error.clone()).or_default() += 1;
        }
        self.last_error = Some(error);
    }

    /// The longest time without an acknowledgement that was going on at `fault` or began after it.
    pub fn outage(&self, fault: Instant) -> Duration {
        self.longest_gap(fault).map_or(Duration::ZERO, |(from, to)| to.since(from))
    }

    /// The first acknowledgement after [`Record::outage`]'s gap.
    pub fn recovered(&self, fault: Instant) -> Option<Instant> {
        self.longest_gap(fault).map(|(_, to)| to)
    }

    fn longest_gap(&self, fault: Instant) -> Option<(Instant, Instant)> {
        let mut acks: Vec<Instant> = self.writes.iter().map(|write| write.acked).collect();
        acks.sort_unstable();
        let pairs = acks.windows(2).map(|pair| (pair[0], pair[1]));
        pairs.filter(|(_, to)| *to >= fault).max_by_key(|(from, to)| to.since(*from))
    }

    /// How many failures said this among other things.
    pub fn failed_with(&self, text: &str) -> u64 {
        self.errors.iter().filter(|(error, _)| error.contains(text)).map(|(_, count)| count).sum()
    }

    /// Acknowledged rows that the server behind `target` does not have.
    ///
    /// # Errors
    /// The table can't be read.
    pub async fn missing(&self, target: &Target) -> Result<Vec<Write>> {
        let limit = Duration::from_secs(60);
        let client = target.connect(limit).await?;
        let rows = tokio::time::timeout(limit, client.simple_query("SELECT writer, seq FROM lab")).await;
        let rows = rows.context("reading the table")??;
        let mut present: HashSet<(u32, u64)> = HashSet::with_capacity(rows.len());
        for row in &rows {
            if let SimpleQueryMessage::Row(row) = row {
                let field = |i: usize| row.get(i).unwrap_or_default();
                present.insert((field(0).parse()?, field(1).parse()?));
            }
        }
        Ok(self.writes.iter().filter(|write| !present.contains(&(write.writer, write.seq))).copied().collect())
    }

    /// Whether `lost` are the last rows that the server at `port` took before it was killed, as a kill may lose where
    /// commits wait for no standby: none of them was acknowledged before a row was sent there that is still present.
    pub fn is_tail_of(&self, lost: &[Write], port: u16) -> bool {
        let kept = self.writes.iter().filter(|write| write.port == port && !lost.contains(write));
        let reigns = kept.fold(BTreeMap::new(), |mut last: BTreeMap<u32, Instant>, write| {
            let sent = last.entry(write.timeline).or_insert(write.sent);
            *sent = write.sent.max(*sent);
            last
        });
        let newest = reigns.keys().next_back().copied().unwrap_or_default();
        lost.iter().all(|write| {
            let last_kept = reigns.get(&write.timeline);
            write.port == port && write.timeline >= newest && last_kept.is_none_or(|sent| write.acked >= *sent)
        })
    }

    /// Two writes that prove two primaries at the same time: one was *sent* after another had been *acknowledged* by a
    /// primary of a later timeline, or by another server on the same timeline.
    pub fn two_primaries(&self) -> Option<TwoPrimaries> {
        let mut by_ack: Vec<&Write> = self.writes.iter().collect();
        by_ack.sort_unstable_by_key(|write| write.acked);
        let mut by_send: Vec<&Write> = self.writes.iter().collect();
        by_send.sort_unstable_by_key(|write| write.sent);

        let mut acked = by_ack.into_iter().peekable();
        let mut newest: Option<&Write> = None;
        for write in by_send {
            while let Some(before) = acked.next_if(|before| before.acked < write.sent) {
                if newest.is_none_or(|newest| before.timeline >= newest.timeline) {
                    newest = Some(before);
                }
            }
            let Some(newest) = newest else { continue };
            let same_reign = newest.timeline == write.timeline && newest.port == write.port;
            if newest.timeline >= write.timeline && !same_reign {
                return Some(TwoPrimaries { newer: *newest, older: *write });
            }
        }
        None
    }

    /// Reads that a primary answered although it was known as such: it had acknowledged the newest write when the read
    /// began, and nobody else one since. A standby that is promoted while it answers is nobody's fault.
    pub fn misled(&self, reads: &[Read]) -> Vec<Read> {
        let mut writes: Vec<&Write> = self.writes.iter().collect();
        writes.sort_unstable_by_key(|write| write.acked);
        let known_primary = |read: &Read| {
            let before = writes.partition_point(|write| write.acked < read.sent);
            let until = writes.partition_point(|write| write.acked < read.answered);
            before > 0 && writes[before - 1..until].iter().all(|write| write.port == read.port)
        };
        reads.iter().filter(|read| !read.standby && known_primary(read)).copied().collect()
    }

    /// This record and another one's rows together.
    pub fn with(mut self, other: Record) -> Record {
        self.writes.extend(other.writes);
        self.failures += other.failures;
        for (error, count) in other.errors {
            *self.errors.entry(error).or_default() += count;
        }
        self.last_error = self.last_error.or(other.last_error);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(ms))
    }

    fn record(writes: &[(u64, u64, u16, u32)]) -> Record {
        let write = |(seq, &(sent, acked, port, timeline)): (usize, &(u64, u64, u16, u32))| Write {
            writer: 1,
            seq: seq as u64,
            sent: at(sent),
            acked: at(acked),
            port,
            timeline,
        };
        Record { writes: writes.iter().enumerate().map(write).collect(), ..Record::default() }
    }

    #[test]
    fn the_outage_is_the_longest_gap_that_touches_the_fault() {
        let writes = [(0, 1, 1, 1), (40, 50, 1, 1), (51, 52, 1, 1), (52, 80, 2, 2), (81, 90, 2, 2)];
        let record = record(&writes);
        assert_eq!(record.outage(at(53)), Duration::from_millis(28));
        assert_eq!(record.recovered(at(53)), Some(at(80)));
        assert_eq!(record.outage(at(10)), Duration::from_millis(49), "the gap was going on at 10");
        assert_eq!(record.outage(at(85)), Duration::from_millis(10));
        assert_eq!(record.outage(at(91)), Duration::ZERO);
    }

    #[test]
    fn two_primaries_are_seen_and_a_clean_handover_is_not() {
        let handover = [(0, 1, 1, 1), (2, 3, 1, 1), (4, 9, 2, 2), (10, 11, 2, 2), (12, 15, 1, 3)];
        assert_eq!(record(&handover).two_primaries(), None);

        let slow_ack = [(0, 10, 1, 1), (3, 8, 2, 2), (11, 12, 2, 2)];
        assert_eq!(record(&slow_ack).two_primaries(), None, "sent before the newer one's first: no proof");

        let old_goes_on = [(0, 1, 1, 1), (2, 5, 2, 2), (6, 7, 1, 1)];
        let found = record(&old_goes_on).two_primaries().unwrap();
        assert_eq!((found.newer.port, found.older.port), (2, 1));
        assert!(found.to_string().starts_with("port 1 took a write on timeline 1 that was sent 1ms after port 2"));

        let same_timeline = [(0, 1, 1, 1), (2, 3, 2, 1)];
        assert!(record(&same_timeline).two_primaries().is_some());
    }

    #[test]
    fn what_a_kill_may_lose_is_the_end_of_what_was_written() {
        let record = record(&[(0, 2, 1, 1), (1, 5, 1, 1), (4, 7, 1, 1), (6, 9, 1, 1), (20, 21, 2, 2)]);
        let lost = |of: &[usize]| of.iter().map(|i| record.writes[*i]).collect::<Vec<Write>>();
        assert!(record.is_tail_of(&[], 1));
        assert!(record.is_tail_of(&lost(&[3]), 1) && record.is_tail_of(&lost(&[2, 3]), 1));
        assert!(record.is_tail_of(&lost(&[2]), 1), "the other one was on its way at the same time");
        assert!(!record.is_tail_of(&lost(&[0, 3]), 1), "a row that was sent after its acknowledgement is there");
        assert!(!record.is_tail_of(&lost(&[4]), 1), "another server's");
        assert!(record.is_tail_of(&lost(&[4]), 2));
    }

    #[test]
    fn a_read_is_misled_when_it_reaches_a_known_primary() {
        let record = record(&[(0, 1, 1, 1), (10, 20, 2, 2)]);
        let read = |sent, port, standby| Read { sent: at(sent), answered: at(sent + 5), port, standby };
        assert_eq!(record.misled(&[read(5, 1, false)]).len(), 1);
        assert_eq!(record.misled(&[read(25, 2, false)]).len(), 1);
        assert_eq!(record.misled(&[read(5, 2, true), read(15, 2, false), read(0, 1, false)]), []);
        let long = Read { sent: at(5), answered: at(30), port: 1, standby: false };
        assert_eq!(record.misled(&[long]), [], "another one led meanwhile, and this one was a standby again");
    }
}
