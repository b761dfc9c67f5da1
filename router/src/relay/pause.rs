//! A pause for a thread that moves nothing but streams.
//!
//! A stream that is fast wakes its thread for every few kilobytes that arrive, and most of what that costs is waking up. A
//! thread on which nothing else happens therefore sleeps a moment before it waits for more: then there is more to move at
//! once. Anything else that happens (a small message, a new session) ends that for a while, so the pause is in nobody's way but
//! once.

use std::cell::Cell;
use std::time::Duration;

/// How long. The kernel adds its timer slack of 50 µs.
const PAUSE: Duration = Duration::from_micros(100);

/// So many turns in a row must have moved nothing but streams.
const QUIET_TURNS: u32 = 64;

thread_local! {
    static TURN: Cell<Turn> = const { Cell::new(Turn { quiet: 0, streamed: false }) };
}

/// What a thread has done since it waited last.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// Turns in a row, before this one, without anything but streams.
    quiet: u32,
    streamed: bool,
}

/// A stream has been moved on.
pub(super) fn streamed() {
    TURN.with(|turn| turn.set(Turn { streamed: true, ..turn.get() }));
}

/// Something else has been done, which must not wait.
pub fn busy() {
    TURN.with(|turn| turn.set(Turn { quiet: 0, ..turn.get() }));
}

/// To be called when the thread is about to wait for events.
pub fn before_waiting() {
    let Turn { quiet, streamed } = TURN.get();
    if !streamed {
        return;
    }
    TURN.set(Turn { quiet: (quiet + 1).min(QUIET_TURNS), streamed: false });
    if quiet == QUIET_TURNS {
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use trunkline_common::{Clock, SystemClock};

    use super::*;

    #[test]
    fn only_a_thread_with_nothing_but_streams_pauses() {
        let pauses = || {
            let before = SystemClock.now();
            before_waiting();
            SystemClock.now().since(before) >= PAUSE
        };
        before_waiting();
        assert_eq!(TURN.get().quiet, 0, "nothing at all is no reason to be late");
        for _ in 0..QUIET_TURNS {
            streamed();
            before_waiting();
        }
        assert_eq!(TURN.get().quiet, QUIET_TURNS);
        streamed();
        assert!(pauses());
        streamed();
        busy();
        before_waiting();
        assert_eq!(TURN.get().quiet, 1, "from the start");
    }
}
