//! The guard of a host: a process of its own that ends the server when the lease is over and takes the leader's address
//! away before that, and an egress fence.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use trunkline_agent::guard::{Deadline, Guard, Status};
use trunkline_common::{Clock, Instant};

use crate::executor::{ProcessId, SimClock};
use crate::server;
use crate::stage::Stage;

/// The guard of one host. It outlives the agent.
#[derive(Clone)]
pub struct ModelGuard {
    process: ProcessId,
    clock: SimClock,
    deadline: Arc<Mutex<watch::Sender<Option<Deadline>>>>,
    /// Until when the leader's address is held here; `None`: not here.
    address: Arc<Mutex<watch::Sender<Option<Instant>>>>,
    stage: Stage,
    host: usize,
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
        let (address, held) = watch::channel(None);
        let guard = Self {
            process,
            clock: clock.clone(),
            deadline: Arc::new(Mutex::new(deadline)),
            address: Arc::new(Mutex::new(address)),
            stage: stage.clone(),
            host,
        };
        clock.spawn(guard.clone().take_address_away(held));
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

    async fn take_address_away(self, mut held: watch::Receiver<Option<Instant>>) {
        loop {
            let until: Option<Instant> = *held.borrow_and_update();
            let over = async {
                match until {
                    Some(until) => self.clock.sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = held.changed() => if changed.is_err() { return },
                () = over => {
                    self.address.lock().send_if_modified(|held| held.take_if(|held| Some(*held) == until).is_some());
                }
            }
        }
    }

    /// Another host has the leader's address as well, and its guard could have taken it away.
    fn address_is_at(&self) -> Option<usize> {
        let others = (0..self.stage.servers(|servers| servers.len())).filter(|other| *other != self.host);
        others.filter_map(|other| self.stage.guard(other)).find_map(|other| {
            let executor = self.stage.executor();
            let runs = executor.is_alive(other.process) && !executor.is_frozen(other.process);
            (runs && other.address.lock().borrow().is_some()).then_some(other.host)
        })
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

    fn hold_address(&self, until: Option<Instant>) {
        if until.is_some_and(|until| until <= self.clock.now()) {
            return;
        }
        let added = self.address.lock().send_replace(until).is_none() && until.is_some();
        if let Some(other) = self.address_is_at().filter(|_| added) {
            let host = self.host;
            self.stage.judge(|judge, now| {
                judge.violation(now, format!("host {host} takes the leader's address while host {other} has it"))
            });
        }
    }

    fn status(&self) -> Status {
        let broken = self.stage.server(self.host, |server| server.must_not_lead());
        Status { must_not_lead: broken.map(|_| "/dev/watchdog: I/O error".to_owned()), ..Status::default() }
    }

    fn deadline(&self) -> Option<Deadline> {
        *self.deadline.lock().borrow()
    }
}
