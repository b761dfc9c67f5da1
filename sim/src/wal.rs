//! A modelled WAL: records that say who wrote them. Positions are PostgreSQL's in kind: bytes that only grow.

use trunkline_common::timeline::Switch;
use trunkline_common::{History, Lsn, TimelineId};

/// Bytes of one record.
pub const RECORD: u64 = 64;

/// Where the first record begins.
const BASE: u64 = 0x300_0000;

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The commit of a client's write.
    Write(u64),
    /// The beginning of a timeline.
    Promotion,
    /// The checkpoint of a clean shutdown.
    Shutdown,
}

/// One record. No two that were written at different times are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Record {
    /// The timeline it was written on.
    pub timeline: TimelineId,
    /// What it is.
    pub kind: Kind,
    /// Unique in the world.
    pub number: u64,
}

/// The records of one data directory, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wal(Vec<Record>);

impl Wal {
    /// How many records there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    pub fn records(&self) -> &[Record] {
        &self.0
    }

    /// Adds one.
    pub fn push(&mut self, record: Record) {
        self.0.push(record);
    }

    /// Takes over what `other` has more, of which this is a prefix.
    pub fn extend_from(&mut self, other: &Wal) {
        self.0.extend_from_slice(&other.0[self.0.len()..]);
    }

    /// The end: the position of the next record.
    pub fn end(&self) -> Lsn {
        position(self.0.len())
    }

    /// The timeline of the last record.
    pub fn timeline(&self) -> TimelineId {
        self.0.last().map_or(TimelineId(1), |record| record.timeline)
    }

    /// Whether this is a beginning of `other`. Records are unique, so the last one tells.
    pub fn is_prefix_of(&self, other: &Wal) -> bool {
        match self.0.last() {
            None => true,
            Some(last) => other.0.get(self.0.len() - 1) == Some(last),
        }
    }

    /// The timelines that ended before that of the last record.
    pub fn history(&self) -> History {
        let forks = self.0.windows(2).enumerate().filter(|(_, pair)| pair[0].timeline != pair[1].timeline);
        let switch = |(index, pair): (usize, &[Record])| Switch {
            timeline: pair[0].timeline,
            switchpoint: position(index + 1),
            reason: "no recovery target specified".to_owned(),
        };
        History(forks.map(switch).collect())
    }

    /// Whether a client's write is in it.
    pub fn has_write(&self, id: u64) -> bool {
        self.0.iter().any(|record| record.kind == Kind::Write(id))
    }
}

/// Where the record with this index begins.
pub fn position(index: usize) -> Lsn {
    Lsn(BASE + index as u64 * RECORD)
}

/// The index of the record that begins there, or of the first one after it.
pub fn index(at: Lsn) -> usize {
    at.0.saturating_sub(BASE).div_ceil(RECORD) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(timeline: u32, number: u64) -> Record {
        Record { timeline: TimelineId(timeline), kind: Kind::Write(number), number }
    }

    #[test]
    fn forks_are_found() {
        let common = Wal(vec![record(1, 0), record(1, 1)]);
        let (mut a, mut b) = (common.clone(), common.clone());
        a.push(record(1, 2));
        b.push(record(2, 3));
        assert!(common.is_prefix_of(&a) && common.is_prefix_of(&b) && a.is_prefix_of(&a));
        assert!(!a.is_prefix_of(&b) && !a.is_prefix_of(&common));
        assert_eq!(b.history().switchpoint_of(TimelineId(1)), Some(position(2)));
        assert!(a.has_write(2) && !b.has_write(2));
    }
}
