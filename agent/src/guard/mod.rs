//! The guard: what ends writes on this host when the lease is over, whatever has become of the agent.
//!
//! The keeper of the lease (`ha::lease`) fences PostgreSQL before its lease ends, but it is part of a process that can be
//! killed, hang, or be frozen together with its host. It tells the guard its [`Deadline`] beforehand; a guard needs
//! nobody's word to act on it.

use std::fmt::Debug;

use trunkline_common::Instant;

/// When a server here has to have stopped writing, unless that is moved by a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    /// The keeper kills the server: the first line.
    pub fence_at: Instant,
    /// The guard kills it: the second line, early enough that it is over by `until`.
    pub kill_at: Instant,
    /// The end of the lease: from here on somebody else may take writes.
    pub until: Instant,
}

impl Deadline {
    /// Both of the two that come first.
    pub fn sooner(self, other: Deadline) -> Deadline {
        Deadline {
            fence_at: self.fence_at.min(other.fence_at),
            kill_at: self.kill_at.min(other.kill_at),
            until: self.until.min(other.until),
        }
    }
}

/// What the keeper of the lease can do to a guard.
///
/// It is armed before a server here may take writes, every renewal moves the deadline, and it is disarmed once nothing
/// is left that could write, or when an operator has taken over. Calls come one at a time, in order, from wherever the
/// lease changes, so they store and return: nothing here may block or wait.
///
/// A model of it: remember the deadline of the host in a place that outlives the agent (its crash, hang, restart); once
/// the clock has passed `kill_at`, whether the agent lives or not, kill the server as `Fence` does and stay at it until
/// the deadline is moved or removed. A guard that was paused with its host does so at once when it goes on. From `until`
/// on, where there is an egress fence, no answer leaves the server for its clients.
pub trait Guard: Debug + Send + Sync + 'static {
    /// The deadline is this one now, earlier or later than before.
    fn arm(&self, deadline: Deadline);

    /// There is nothing to guard.
    fn disarm(&self);

    /// The deadline in force: after the start that which an earlier agent left behind with its server.
    fn deadline(&self) -> Option<Deadline>;
}

/// Nobody on guard.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoGuard;

impl Guard for NoGuard {
    fn arm(&self, _: Deadline) {}

    fn disarm(&self) {}

    fn deadline(&self) -> Option<Deadline> {
        None
    }
}
