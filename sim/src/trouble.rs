//! Whom the faults of a world leave alone, and since when. Some promises are made for healthy times only: who was hit a moment
//! ago may rightly have missed something.

use std::collections::BTreeMap;
use std::time::Duration;

/// What goes wrong now, and when it last did: by node, and (`None`) for all of them.
#[derive(Debug, Default)]
pub struct Trouble(BTreeMap<Option<usize>, Ongoing>);

#[derive(Debug, Default, Clone, Copy)]
struct Ongoing {
    count: u32,
    last: Duration,
}

impl Trouble {
    /// Something goes wrong for this node, or for everybody.
    pub fn begins(&mut self, whom: Option<usize>) {
        self.0.entry(whom).or_default().count += 1;
    }

    /// It is over.
    pub fn ends(&mut self, whom: Option<usize>, now: Duration) {
        let ongoing = self.0.entry(whom).or_default();
        *ongoing = Ongoing { count: ongoing.count.saturating_sub(1), last: now };
    }

    /// For how long nothing has gone wrong for this node.
    pub fn quiet_for(&self, node: usize, now: Duration) -> Duration {
        let last = |whom| match self.0.get(&whom) {
            Some(ongoing) if ongoing.count > 0 => now,
            Some(ongoing) => ongoing.last,
            None => Duration::ZERO,
        };
        now - last(None).max(last(Some(node)))
    }
}
