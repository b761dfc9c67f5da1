//! The guard of a host: a process of its own that ends the server when the lease is over, and an egress fence.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use trunkline_agent::guard::{Deadline, Guard};
use trunkline_common::Clock;

use crate::executor::{ProcessId, SimClock};
use crate::server;
use crate::stage::Stage;

/// The guard of one host. It outlives the agent.
#[derive(Clone)]
pub struct ModelGuard {
    process: ProcessId,
    clock: SimClock,
    deadline: Arc<Mutex<watch::Sender<Option<Deadline>>>>,
}

impl fmt::Debug for ModelGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guard until {:?}", self.deadline())
    }
}

impl ModelGuard {
    /// Starts the guard of `host`, in `process`.
    pub fn start(stage: &Stage, host: usize, process: ProcessId, clock: SimClock) -> Self {
        let (deadline, mut told) = watch::channel(None);
        let guard = Self { process, clock: clock.clone(), deadline: Arc::new(Mutex::new(deadline)) };
        let stage = stage.clone();
        clock.clone().spawn(async move {
            loop {
                let deadline: Option<Deadline> = *told.borrow_and_update();
                match deadline {
                    Some(deadline) if clock.now() >= deadline.kill_at => {
                        // SIGKILL reaches every process of the server at once, also stopped ones.
                        server::kill(&stage, host);
                        stage.micros(500..3_000).await;
                        if !told.has_changed().unwrap_or(false) {
                            clock.sleep(std::time::Duration::from_millis(100)).await;
                        }
                    }
                    Some(deadline) => {
                        tokio::select! {
                            biased;
                            changed = told.changed() => if changed.is_err() { return },
                            () = clock.sleep_until(deadline.kill_at) => {}
                        }
                    }
                    None if told.changed().await.is_err() => return,
                    None => {}
                }
            }
        });
        guard
    }

    /// Its process.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// Whether the server ends with a lease.
    pub fn is_armed(&self) -> bool {
        self.deadline().is_some()
    }

    /// Whether an answer may leave the server now: the egress fence.
    pub fn lets_out(&self) -> bool {
        self.deadline().is_none_or(|deadline| self.clock.now() < deadline.until)
    }
}

impl Guard for ModelGuard {
    fn arm(&self, deadline: Deadline) {
        self.deadline.lock().send_if_modified(|held| held.replace(deadline) != Some(deadline));
    }

    fn disarm(&self) {
        self.deadline.lock().send_if_modified(|held| held.take().is_some());
    }

    fn deadline(&self) -> Option<Deadline> {
        *self.deadline.lock().borrow()
    }
}
