//! Time that counts while the machine sleeps, and the tasks that live by it.
//!
//! A lease goes on running in the DCS while this host is suspended, so everything that compares with a lease's end uses
//! `CLOCK_BOOTTIME`. This file is the only one that asks the operating system what time it is.

use std::future::Future;
use std::ops::{Add, Sub};
use std::time::Duration;

use chrono::{DateTime, Utc};

/// A point on the boot-time clock of this host. Never leaves the host, never compared with another host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(Duration);

impl Instant {
    /// The instant `since_boot` after the host started.
    pub const fn from_boot(since_boot: Duration) -> Self {
        Self(since_boot)
    }

    /// Time since the host started.
    pub const fn since_boot(self) -> Duration {
        self.0
    }

    /// Time from `earlier` to `self`; zero if `earlier` is later.
    pub fn since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, by: Duration) -> Instant {
        Instant(self.0.saturating_add(by))
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, by: Duration) -> Instant {
        Instant(self.0.saturating_sub(by))
    }
}

/// Where time comes from, and what runs in it. The real one is [`SystemClock`] on tokio; the simulation brings its own,
/// which can pause or end all tasks of one simulated process.
pub trait Clock: Clone + Send + Sync + 'static {
    /// Now, on the clock that counts suspend.
    fn now(&self) -> Instant;

    /// The wall clock, for time stamps and schedules only: it jumps, so nothing about leases may depend on it.
    fn wall(&self) -> DateTime<Utc>;

    /// Returns at `deadline` or a little after it.
    fn sleep_until(&self, deadline: Instant) -> impl Future<Output = ()> + Send;

    /// Runs `work` beside its caller, until it ends. [`crate::Task`] is for work with a result.
    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static);

    /// Returns after `duration` or a little more.
    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + Send {
        self.sleep_until(self.now() + duration)
    }

    /// Runs `work` for at most `limit`; `None` if that was not enough. What was being done is dropped, not undone.
    fn within<F: Future + Send>(&self, limit: Duration, work: F) -> impl Future<Output = Option<F::Output>> + Send
    where
        F::Output: Send,
    {
        async move {
            tokio::select! {
                biased;
                output = work => Some(output),
                () = self.sleep(limit) => None,
            }
        }
    }
}

/// The host's own clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Instant(Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32))
    }

    fn wall(&self) -> DateTime<Utc> {
        Utc::now()
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(work);
    }

    async fn sleep_until(&self, deadline: Instant) {
        // tokio counts CLOCK_MONOTONIC, which stands still in suspend: a sleeper may come late, so ask again.
        loop {
            let left = deadline.since(self.now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}

/// Time as tokio's timers tell it: stands still and jumps with `tokio::time::pause` and `advance`, so tests and the
/// simulation take no real time. Never for a real lease: it does not count suspend.
#[derive(Debug, Clone, Copy)]
pub struct TokioClock {
    start: tokio::time::Instant,
    wall: DateTime<Utc>,
}

impl TokioClock {
    /// A clock that starts at zero boot time now, and whose wall clock starts at `wall`.
    pub fn starting_at(wall: DateTime<Utc>) -> Self {
        Self { start: tokio::time::Instant::now(), wall }
    }
}

impl Default for TokioClock {
    /// Starts in 2030, so that nothing depends on the day a test runs.
    fn default() -> Self {
        Self::starting_at(DateTime::from_timestamp(1_893_456_000, 0).unwrap_or_default())
    }
}

impl Clock for TokioClock {
    fn now(&self) -> Instant {
        Instant(self.start.elapsed())
    }

    fn wall(&self) -> DateTime<Utc> {
        self.wall + self.start.elapsed()
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(work);
    }

    async fn sleep_until(&self, deadline: Instant) {
        tokio::time::sleep_until(self.start + deadline.since_boot()).await;
    }
}
