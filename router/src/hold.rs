//! Connections that wait for a server: how many, and at what pace they are let go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use trunkline_common::Instant;

use crate::places::{Place, Places};

/// The waiting room of all ports.
#[derive(Debug)]
pub struct Hold {
    places: Arc<Places>,
    pace: Mutex<Pace>,
    /// Turns that are waited for.
    turns: AtomicU32,
}

/// When one that has been waiting may go on; to be kept until then.
#[derive(Debug)]
pub struct Turn<'h> {
    /// The moment.
    pub at: Instant,
    hold: &'h Hold,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.hold.turns.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Hold {
    /// `capacity` connections at once; `rate` per second are let go, 0 = as fast as they come.
    pub fn new(capacity: usize, rate: u32) -> Self {
        Self { places: Places::new(capacity), pace: Mutex::new(Pace::new(rate)), turns: AtomicU32::new(0) }
    }

    /// Other bounds, from now on.
    pub fn resize(&self, capacity: usize, rate: u32) {
        self.places.resize(capacity);
        self.pace.lock().set_rate(rate);
    }

    /// A place, if there is one. Dropping it frees it.
    pub fn enter(&self) -> Option<Place> {
        self.places.try_take()
    }

    /// How many wait.
    pub fn held(&self) -> usize {
        self.places.taken()
    }

    /// A turn for one that has been waiting, once there is a server.
    pub fn turn(&self, now: Instant) -> Turn<'_> {
        let mut pace = self.pace.lock();
        pace.shorten(now, self.turns.fetch_add(1, Ordering::Relaxed));
        Turn { at: pace.turn(now), hold: self }
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
        Self { gap: gap(rate), next: Instant::default() }
    }

    /// Another rate, from the turn after the next one on.
    pub fn set_rate(&mut self, rate: u32) {
        self.gap = gap(rate);
    }

    /// The next turn.
    pub fn turn(&mut self, now: Instant) -> Instant {
        let turn = self.next.max(now);
        self.next = turn + self.gap;
        turn
    }

    /// So many turns are still waited for, behind the last one that was taken. Nobody waits for the others: whoever they were
    /// given to has gone.
    pub fn shorten(&mut self, now: Instant, turns: u32) {
        self.next = self.next.min(now + self.gap.saturating_mul(turns.saturating_add(1)));
    }
}

fn gap(rate: u32) -> Duration {
    Duration::from_secs(1).checked_div(rate).unwrap_or_default()
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
    fn nobody_waits_for_turns_that_nobody_takes() {
        let hold = Hold::new(10, 100);
        let mut turns: Vec<Turn<'_>> = (0..1_000).map(|_| hold.turn(at(500))).collect();
        assert_eq!(turns[999].at, at(10_490), "each of them may still be taken");
        turns.truncate(1);
        assert_eq!(hold.turn(at(500)).at, at(520));
        drop(turns);
        let turns = [(); 3].map(|()| hold.turn(at(500)));
        assert_eq!(turns.map(|turn| turn.at), [at(510), at(520), at(530)], "and still one after the other");
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
        hold.resize(1, 0);
        assert!(hold.enter().is_none());
    }
}
