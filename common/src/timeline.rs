//! Timelines: every promotion starts a new one that forks from its parent at a known position.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Lsn;

/// PostgreSQL's `TimeLineID`. 1 is where initdb starts; 0 is "unknown".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(pub u32);

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One finished timeline: a line of a `.history` file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    /// The timeline that ended.
    pub timeline: TimelineId,
    /// Where it ended: the first position that belongs to the next one.
    pub switchpoint: Lsn,
    /// PostgreSQL's words for why.
    pub reason: String,
}

/// The ancestors of a timeline, oldest first, as PostgreSQL's `.history` file lists them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct History(pub Vec<Switch>);

impl History {
    /// Reads a `.history` file: `timeline <tab> lsn <tab> reason` lines, `#` comments and blank lines between.
    /// Lines that are neither are skipped, as PostgreSQL's own tools do.
    pub fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let mut fields = line.trim().splitn(3, ['\t', ' ']);
            let timeline = TimelineId(fields.next()?.parse().ok()?);
            let switchpoint = fields.next()?.parse().ok()?;
            Some(Switch { timeline, switchpoint, reason: fields.next().unwrap_or("").trim().to_owned() })
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// Where `timeline` ended, if it is an ancestor.
    pub fn switchpoint_of(&self, timeline: TimelineId) -> Option<Lsn> {
        self.0.iter().find(|switch| switch.timeline == timeline).map(|switch| switch.switchpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_history_file() {
        let history =
            History::parse("1\t0/3000000\tno recovery target specified\n\n# note\n2\t0/5000148\tbefore 2000-01-01\n");
        assert_eq!(history.0.len(), 2);
        assert_eq!(history.switchpoint_of(TimelineId(2)), Some(Lsn(0x500_0148)));
        assert_eq!(history.switchpoint_of(TimelineId(3)), None);
        assert_eq!(history.0[0].reason, "no recovery target specified");
    }
}
