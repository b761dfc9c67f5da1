//! A deterministic executor: simulated processes, their tasks, and the time they live in.
//!
//! Time moves only when nobody has anything left to do at this instant; then it jumps to the next timer. Which of several
//! ready tasks goes first is drawn from the world's random numbers: one seed is one order. A process can be frozen (its
//! tasks become ready, but don't run) and killed (they are dropped, in the middle of whatever they await).

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use trunkline_common::{Clock, Instant};

/// Polls at one instant before the world counts as stuck in a loop.
const LIVELOCK: u32 = 200_000;

/// The executor of one world. Clones are handles to the same one.
#[derive(Clone)]
pub struct Executor(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    /// Apart from the state: wakers are called while it is locked.
    ready: Arc<Mutex<Vec<TaskId>>>,
}

struct State {
    /// Since the world began.
    now: Duration,
    timers: BTreeMap<(Duration, u64), Waker>,
    timer_count: u64,
    tasks: Vec<Option<Entry>>,
    processes: Vec<Process>,
    rng: SmallRng,
    polls_now: u32,
    polls: u64,
    /// Of everything that was done, in its order.
    fingerprint: u64,
}

type TaskId = usize;

/// A simulated process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessId(usize);

struct Process {
    name: String,
    alive: bool,
    frozen: bool,
    /// When it was thawed last.
    thawed: Duration,
    /// Tasks that became ready while it was frozen.
    held: Vec<TaskId>,
    tasks: Vec<TaskId>,
}

struct Entry {
    process: ProcessId,
    /// `None` while it is being polled.
    work: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    waker: Arc<TaskWaker>,
}

struct TaskWaker {
    task: TaskId,
    queued: std::sync::atomic::AtomicBool,
    ready: Arc<Mutex<Vec<TaskId>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, std::sync::atomic::Ordering::Relaxed) {
            self.ready.lock().push(self.task);
        }
    }
}

/// Why [`Executor::run_until`] ended before its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Livelock(pub String);

impl Executor {
    /// An empty world whose order of events comes from `seed`.
    pub fn new(seed: u64) -> Self {
        let state = State {
            now: Duration::ZERO,
            timers: BTreeMap::new(),
            timer_count: 0,
            tasks: Vec::new(),
            processes: Vec::new(),
            rng: SmallRng::seed_from_u64(seed),
            polls_now: 0,
            polls: 0,
            fingerprint: 0,
        };
        Self(Arc::new(Inner { state: Mutex::new(state), ready: Arc::default() }))
    }

    /// Time since the world began.
    pub fn now(&self) -> Duration {
        self.0.state.lock().now
    }

    /// How often a task was polled.
    pub fn polls(&self) -> u64 {
        self.0.state.lock().polls
    }

    /// Differs wherever two worlds have taken different ways.
    pub fn fingerprint(&self) -> u64 {
        self.0.state.lock().fingerprint
    }

    /// A new process.
    pub fn process(&self, name: impl Into<String>) -> ProcessId {
        let mut state = self.0.state.lock();
        let (held, tasks) = (Vec::new(), Vec::new());
        let process = Process { name: name.into(), alive: true, frozen: false, thawed: Duration::ZERO, held, tasks };
        state.processes.push(process);
        ProcessId(state.processes.len() - 1)
    }

    /// Runs `work` in `process`; nothing happens if that has been killed.
    pub fn spawn(&self, process: ProcessId, work: impl Future<Output = ()> + Send + 'static) {
        let mut state = self.0.state.lock();
        if !state.processes[process.0].alive {
            // What it would have run is dropped outside of the lock.
            drop(state);
            drop(work);
            return;
        }
        let task = state.tasks.len();
        let waker = TaskWaker { task, queued: true.into(), ready: self.0.ready.clone() };
        state.tasks.push(Some(Entry { process, work: Some(Box::pin(work)), waker: Arc::new(waker) }));
        state.processes[process.0].tasks.push(task);
        self.0.ready.lock().push(task);
    }

    /// Ends a process: its tasks are gone at once.
    pub fn kill(&self, process: ProcessId) {
        let mut state = self.0.state.lock();
        let killed = &mut state.processes[process.0];
        killed.alive = false;
        let tasks = std::mem::take(&mut killed.tasks);
        killed.held.clear();
        let gone: Vec<_> = tasks.into_iter().filter_map(|task| state.tasks[task].take()).collect();
        drop(state);
        drop(gone);
    }

    /// Ends every process.
    pub fn end(&self) {
        let processes = self.0.state.lock().processes.len();
        (0..processes).for_each(|process| self.kill(ProcessId(process)));
    }

    /// Stops a process where it is, or lets it go on.
    pub fn freeze(&self, process: ProcessId, frozen: bool) {
        let mut state = self.0.state.lock();
        let now = state.now;
        let process = &mut state.processes[process.0];
        process.frozen = frozen;
        if !frozen {
            process.thawed = now;
            self.0.ready.lock().append(&mut process.held);
        }
    }

    /// Whether it lives.
    pub fn is_alive(&self, process: ProcessId) -> bool {
        self.0.state.lock().processes[process.0].alive
    }

    /// Whether it is frozen.
    pub fn is_frozen(&self, process: ProcessId) -> bool {
        self.0.state.lock().processes[process.0].frozen
    }

    /// Whether it runs, and has done so for a while: it has come to do what it had to.
    pub fn is_awake(&self, process: ProcessId) -> bool {
        /// Many turns.
        const WHILE: Duration = Duration::from_millis(10);
        let state = self.0.state.lock();
        let Process { alive, frozen, thawed, .. } = state.processes[process.0];
        alive && !frozen && thawed + WHILE < state.now
    }

    /// A random number of this world.
    pub fn random<T>(&self, draw: impl FnOnce(&mut SmallRng) -> T) -> T {
        draw(&mut self.0.state.lock().rng)
    }

    /// Returns `duration` of world time later.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        let until = self.now() + duration;
        Sleep { executor: self.clone(), until, timer: None }
    }

    /// Returns after a random time between the two.
    pub async fn pause(&self, between: std::ops::Range<Duration>) {
        let duration = self.random(|rng| rng.random_range(between));
        self.sleep(duration).await;
    }

    /// Lets the world go on until `end`, or until `stop` says so after a step.
    pub fn run_until(&self, end: Duration, mut stop: impl FnMut() -> bool) -> Result<(), Livelock> {
        loop {
            while let Some((task, process)) = self.next_ready() {
                self.poll(task, process)?;
                if stop() {
                    return Ok(());
                }
            }
            let mut state = self.0.state.lock();
            let Some(at) = state.timers.keys().next().map(|(at, _)| *at).filter(|at| *at <= end) else {
                state.now = end;
                return Ok(());
            };
            state.now = state.now.max(at);
            state.polls_now = 0;
            while let Some(timer) = state.timers.first_entry().filter(|timer| timer.key().0 == at) {
                timer.remove().wake();
            }
        }
    }

    fn next_ready(&self) -> Option<(TaskId, ProcessId)> {
        let mut state = self.0.state.lock();
        let mut ready = self.0.ready.lock();
        while !ready.is_empty() {
            // In an order of our own: who was woken first may depend on tokio's random numbers.
            ready.sort_unstable();
            let chosen = if ready.len() == 1 { 0 } else { state.rng.random_range(0..ready.len()) };
            let task = ready.swap_remove(chosen);
            let Some(entry) = &state.tasks[task] else { continue };
            let process = entry.process;
            if state.processes[process.0].frozen {
                state.processes[process.0].held.push(task);
                continue;
            }
            return Some((task, process));
        }
        None
    }

    fn poll(&self, task: TaskId, process: ProcessId) -> Result<(), Livelock> {
        let mut state = self.0.state.lock();
        state.polls += 1;
        state.polls_now += 1;
        let step = (task as u64) ^ state.now.as_nanos() as u64;
        state.fingerprint = (state.fingerprint.rotate_left(5) ^ step).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        if state.polls_now > LIVELOCK {
            let name = state.processes[process.0].name.clone();
            return Err(Livelock(format!("{LIVELOCK} steps at one instant, the last one of {name}")));
        }
        let Some(entry) = &mut state.tasks[task] else { return Ok(()) };
        let waker = entry.waker.clone();
        let Some(mut work) = entry.work.take() else { return Ok(()) };
        crate::trace::enter(state.now, &state.processes[process.0].name);
        drop(state);
        waker.queued.store(false, std::sync::atomic::Ordering::Relaxed);
        let polled = work.as_mut().poll(&mut Context::from_waker(&Waker::from(waker)));
        let mut state = self.0.state.lock();
        match (&mut state.tasks[task], polled) {
            (Some(entry), Poll::Pending) => entry.work = Some(work),
            (slot, _) => {
                // Done, or killed by what it did itself.
                let entry = slot.take();
                state.processes[process.0].tasks.retain(|other| *other != task);
                drop(state);
                drop((entry, work));
            }
        }
        Ok(())
    }
}

/// A timer.
pub struct Sleep {
    executor: Executor,
    until: Duration,
    timer: Option<(Duration, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let executor = self.executor.clone();
        let mut state = executor.0.state.lock();
        if state.now >= self.until {
            self.timer = None;
            return Poll::Ready(());
        }
        let timer = match self.timer {
            Some(timer) => timer,
            None => {
                state.timer_count += 1;
                let timer = (self.until, state.timer_count);
                self.timer = Some(timer);
                timer
            }
        };
        state.timers.insert(timer, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            let waker = self.executor.0.state.lock().timers.remove(&timer);
            drop(waker);
        }
    }
}

/// How the clocks of a host differ from the world's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drift {
    /// How long the host had been up when the world began.
    pub uptime: Duration,
    /// How much faster (or slower) its clocks run, in millionths.
    pub ppm: i64,
}

/// The clock of a process: of its host in time, of the process in the tasks that it spawns.
#[derive(Clone)]
pub struct SimClock {
    executor: Executor,
    process: ProcessId,
    drift: Drift,
    /// By how much its host's wall clock is off, in milliseconds; changed by faults.
    wall_offset: Arc<std::sync::atomic::AtomicI64>,
}

impl SimClock {
    /// The clock of `process`.
    pub fn new(
        executor: &Executor,
        process: ProcessId,
        drift: Drift,
        wall_offset: Arc<std::sync::atomic::AtomicI64>,
    ) -> Self {
        Self { executor: executor.clone(), process, drift, wall_offset }
    }

    fn rate(&self) -> i128 {
        i128::from(1_000_000 + self.drift.ppm)
    }
}

impl Clock for SimClock {
    fn now(&self) -> Instant {
        let elapsed = self.executor.now().as_nanos() as i128 * self.rate() / 1_000_000;
        Instant::from_boot(self.drift.uptime + Duration::from_nanos(elapsed as u64))
    }

    fn wall(&self) -> DateTime<Utc> {
        let start = DateTime::from_timestamp(1_893_456_000, 0).unwrap_or_default();
        let offset = self.wall_offset.load(std::sync::atomic::Ordering::Relaxed);
        start + self.executor.now() + TimeDelta::milliseconds(offset)
    }

    async fn sleep_until(&self, deadline: Instant) {
        let since_start = deadline.since_boot().saturating_sub(self.drift.uptime).as_nanos() as i128;
        // Rounded up: a sleeper must not wake a moment before its own deadline.
        let world = since_start.saturating_mul(1_000_000) / self.rate() + 1;
        let until = Duration::from_nanos(u64::try_from(world).unwrap_or(u64::MAX / 2));
        if self.now() < deadline {
            Sleep { executor: self.executor.clone(), until, timer: None }.await;
        }
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.executor.spawn(self.process, work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(executor: &Executor, process: ProcessId, ppm: i64) -> SimClock {
        SimClock::new(executor, process, Drift { uptime: Duration::from_secs(100), ppm }, Arc::default())
    }

    #[test]
    fn time_jumps_to_the_next_timer_and_clocks_drift() {
        let executor = Executor::new(1);
        let process = executor.process("p");
        let (fast, slow) = (clock(&executor, process, 500), clock(&executor, process, -500));
        let woken = Arc::new(Mutex::new(Vec::new()));
        for clock in [fast.clone(), slow] {
            let (woken, executor) = (woken.clone(), executor.clone());
            let work = clock.clone();
            clock.spawn(async move {
                let deadline = work.now() + Duration::from_secs(10);
                work.sleep_until(deadline).await;
                assert!(work.now() >= deadline);
                woken.lock().push(executor.now());
            });
        }
        executor.run_until(Duration::from_secs(60), || false).unwrap();
        let woken = woken.lock().clone();
        assert!(woken[0] < Duration::from_secs(10) && woken[1] > Duration::from_secs(10), "{woken:?}");
        assert_eq!(executor.now(), Duration::from_secs(60));
    }

    #[test]
    fn a_frozen_process_stands_still_and_a_killed_one_is_gone() {
        let executor = Executor::new(1);
        let counts = Arc::new(Mutex::new([0u32; 3]));
        let processes = [0, 1, 2].map(|index| {
            let process = executor.process(format!("p{index}"));
            let (counts, ticking) = (counts.clone(), executor.clone());
            executor.spawn(process, async move {
                loop {
                    ticking.sleep(Duration::from_secs(1)).await;
                    counts.lock()[index] += 1;
                }
            });
            process
        });
        executor.run_until(Duration::from_millis(10_500), || false).unwrap();
        executor.freeze(processes[1], true);
        executor.kill(processes[2]);
        executor.run_until(Duration::from_millis(20_500), || false).unwrap();
        executor.freeze(processes[1], false);
        executor.run_until(Duration::from_millis(21_000), || false).unwrap();
        assert_eq!(*counts.lock(), [21, 11, 10], "what came due in a freeze happens once, after it");
    }

    #[test]
    fn one_seed_is_one_order() {
        let order = |seed| {
            let executor = Executor::new(seed);
            let process = executor.process("p");
            let seen = Arc::new(Mutex::new(Vec::new()));
            for index in 0..20 {
                let (seen, executor2) = (seen.clone(), executor.clone());
                executor.spawn(process, async move {
                    executor2.sleep(Duration::from_secs(1)).await;
                    seen.lock().push(index);
                });
            }
            executor.run_until(Duration::from_secs(2), || false).unwrap();
            Arc::into_inner(seen).unwrap().into_inner()
        };
        assert_eq!(order(7), order(7));
        assert_ne!(order(7), order(8));
    }

    #[test]
    fn a_loop_that_takes_no_time_is_found() {
        let executor = Executor::new(1);
        let process = executor.process("busy");
        executor.spawn(process, async {
            loop {
                tokio::task::yield_now().await;
            }
        });
        let Err(Livelock(why)) = executor.run_until(Duration::from_secs(1), || false) else { panic!() };
        assert!(why.contains("busy"), "{why}");
    }
}
