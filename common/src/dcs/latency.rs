//! How long the store takes to answer, as measured by those who ask it anyway.

use std::collections::VecDeque;
use std::time::Duration;

/// How many answers are remembered: about a minute of renewals with the default settings.
const REMEMBERED: usize = 128;

/// What was measured lately.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Latency {
    /// Renewals of a lease: two round trips, without a disk.
    pub renewals: Times,
    /// Writes: a round trip with the store's consensus and fsync.
    pub writes: Times,
}

/// Times of the last answers, the oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Times(VecDeque<Duration>);

impl Times {
    /// Adds one; the oldest is forgotten.
    pub fn add(&mut self, time: Duration) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(time);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The one in the middle.
    pub fn median(&self) -> Option<Duration> {
        let mut sorted: Vec<Duration> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }

    /// The longest.
    pub fn worst(&self) -> Option<Duration> {
        self.0.iter().max().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_times_count() {
        let mut times = Times::default();
        assert_eq!((times.count(), times.median(), times.worst()), (0, None, None));
        for ms in [900, 1, 3, 2] {
            times.add(Duration::from_millis(ms));
        }
        assert_eq!((times.median(), times.worst()), (Some(Duration::from_millis(3)), Some(Duration::from_millis(900))));
        (0..REMEMBERED).for_each(|_| times.add(Duration::from_millis(5)));
        assert_eq!((times.count(), times.worst()), (REMEMBERED, Some(Duration::from_millis(5))));
    }
}
