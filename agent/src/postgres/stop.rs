//! Stopping: in order, or at once.

use std::convert::Infallible;
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::oneshot;
use trunkline_common::{Clock, Lsn, SystemClock};

use super::instance::Instance;
use super::ready::Changes;
use super::{ControlState, PgError, Server, StopMode, process, program};

/// After SIGQUIT, how long an immediate stop may take before SIGKILL.
const IMMEDIATE_GRACE: Duration = Duration::from_secs(5);

/// The bound on `before_stop`.
const BEFORE_STOP_LIMIT: Duration = Duration::from_secs(60);

/// An ordinary stop takes less.
const SLOW_STOP: Duration = Duration::from_secs(3);

/// A stop waits for every process of the server: says again and again for whom.
async fn tell_what_is_left(server: Server) -> Infallible {
    let began = SystemClock.now();
    loop {
        tokio::time::sleep(SLOW_STOP).await;
        let (seconds, left) = (SystemClock.now().since(began).as_secs(), process::titles(&server));
        tracing::warn!("PostgreSQL was asked to stop {seconds} s ago; there still are: {}", left.join(", "));
    }
}

impl Instance {
    pub(super) async fn run_stop(
        &self,
        mode: StopMode,
        limit: Duration,
        shut_down: Option<oneshot::Sender<Lsn>>,
    ) -> Result<(), PgError> {
        if mode == StopMode::Immediate {
            let until = self.inner.clock.now() + limit;
            let postmaster = self.process().find();
            self.kill_in_thread((limit / 2).min(IMMEDIATE_GRACE), limit).await?;
            // Nothing is left; whoever watches it knows a moment later, and a caller may look at once.
            if let Some(postmaster) = postmaster {
                let left = until.since(self.inner.clock.now()).max(Duration::from_millis(100));
                let _ = tokio::time::timeout(left, postmaster.gone()).await;
            }
            return Ok(());
        }
        let config = self.config_now();
        if let Some(command) = config.before_stop.as_ref().filter(|_| self.process().find().is_some()) {
            let run = async { program::run(&mut program::shell_words(command)?).await };
            match tokio::time::timeout(BEFORE_STOP_LIMIT, run).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!("before_stop: {error}"),
                Err(_) => tracing::warn!("before_stop was not done in time"),
            }
        }
        let Some(postmaster) = self.process().find() else { return Ok(()) };
        let until = self.inner.clock.now() + limit;
        let mut changes = Changes::of(&config.data_dir);
        postmaster.signal(Signal::INT);
        let stopping = async {
            let checkpointed = || {
                let control = self.control().ok()?;
                (control.state == ControlState::ShutDown).then_some(control.checkpoint)
            };
            if let Some(sender) = shut_down {
                let left = until.since(self.inner.clock.now());
                if let Ok(lsn) = changes.until(&postmaster, left, checkpointed).await {
                    // Nobody waits for it any more: fine.
                    let _ = sender.send(lsn);
                }
            }
            let left = until.since(self.inner.clock.now());
            let gone = tokio::time::timeout(left, postmaster.gone()).await;
            gone.map_err(|_| PgError::Timeout { what: "stopping PostgreSQL".to_owned(), limit })
        };
        tokio::select! {
            stopped = stopping => stopped,
            never = tell_what_is_left(self.server()) => match never {},
        }
    }

    /// On a thread of its own: a fence must not wait for the runtime's workers or its pool of blocking threads.
    pub(super) async fn kill_in_thread(&self, grace: Duration, limit: Duration) -> Result<(), PgError> {
        let (done, outcome) = oneshot::channel();
        let instance = self.clone();
        let kill = move || {
            // The caller may have given up; the kill is still right.
            let _ = done.send(instance.process().kill(grace, limit));
        };
        let spawned = std::thread::Builder::new().name("fence".to_owned()).spawn(kill);
        if spawned.is_err() {
            return self.process().kill(grace, limit);
        }
        outcome.await.unwrap_or_else(|_| Err(PgError::Failed("the killing thread ended".to_owned())))?;
        self.inner.sessions.close().await;
        Ok(())
    }
}
