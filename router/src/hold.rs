//! Connections that wait for a server: how many, and at what pace they are let go.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use trunkline_common::Instant;

/// The waiting room of all ports.
#[derive(Debug)]
pub struct Hold {
    places: Arc<Semaphore>,
    capacity: usize,
    pace: Mutex<Pace>,
}

impl Hold {
    /// `capacity` connections at once; `rate` per second are let go, 0 = as fast as they come.
    pub fn new(capacity: usize, rate: u32) -> Self {
        let capacity = capacity.min(Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(capacity)), capacity, pace: Mutex::new(Pace::new(rate)) }
    }

    /// A place, if there is one. Dropping it frees it.
    pub fn enter(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok()
    }

    /// How many wait.
    pub fn held(&self) -> usize {
        self.capacity - self.places.available_permits()
    }

    /// When one that has been waiting may go on, once there is a server.
    pub fn turn(&self, now: Instant) -> Instant {
        self.pace.lock().turn(now)
    }
}

/// Turns at even distances; the first one after a pause is at once. Pure.
#[derive(Debug)]
pub struct Pace {
    gap: Duration,
    next: Instant,
}

impl Pace {
    /// `rate` turns per second; 0 = no gaps.
    pub fn new(rate: u32) -> Self {
        Self { gap: Duration::from_secs(1).checked_div(rate).unwrap_or_default(), next: Instant::default() }
    }

    /// The next turn.
    pub fn turn(&mut self, now: Instant) -> Instant {
        let turn = self.next.max(now);
        self.next = turn + self.gap;
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(millis: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(millis))
    }

    #[test]
    fn the_first_goes_at_once_and_the_others_in_step() {
        let mut pace = Pace::new(100);
        assert_eq!([pace.turn(at(500)), pace.turn(at(500)), pace.turn(at(500))], [at(500), at(510), at(520)]);
        assert_eq!(pace.turn(at(524)), at(530), "still in step");
        assert_eq!(pace.turn(at(900)), at(900), "a pause is no credit, and no debt either");
        assert_eq!(pace.turn(at(901)), at(910));
    }

    #[test]
    fn without_a_rate_there_are_no_gaps() {
        let mut pace = Pace::new(0);
        assert_eq!([pace.turn(at(1)), pace.turn(at(1))], [at(1), at(1)]);
    }

    #[test]
    fn places_are_bounded() {
        let hold = Hold::new(2, 0);
        let first = hold.enter();
        let _second = hold.enter();
        assert!(hold.enter().is_none());
        assert_eq!(hold.held(), 2);
        drop(first);
        assert_eq!(hold.held(), 1);
        assert!(hold.enter().is_some());
    }
}
