//! Work that goes on beside its caller, on whatever runs the caller: tokio, or the simulation's own executor.
//!
//! [`Clock::spawn`] starts it. A [`Task`] is the handle of work with a result.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use futures::future::{AbortHandle, Abortable};
use tokio::sync::oneshot;

use crate::Clock;

/// The handle of spawned work, and a future of its result. Dropping it leaves the work going on.
#[derive(Debug)]
pub struct Task<T> {
    abort: AbortHandle,
    result: oneshot::Receiver<T>,
    /// Gone with the work.
    alive: Weak<()>,
}

/// The work was aborted, or ended with a panic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it was cut off")]
pub struct CutOff;

impl<T: Send + 'static> Task<T> {
    /// Starts `work` where `clock` counts the time.
    pub fn spawn<C: Clock>(clock: &C, work: impl Future<Output = T> + Send + 'static) -> Self {
        let (abort, registration) = AbortHandle::new_pair();
        let (sender, result) = oneshot::channel();
        let life = Arc::new(());
        let alive = Arc::downgrade(&life);
        clock.spawn(async move {
            let _life = life;
            if let Ok(output) = Abortable::new(work, registration).await {
                // Nobody may be interested any more.
                let _ = sender.send(output);
            }
        });
        Self { abort, result, alive }
    }

    /// Cuts the work off at its next await. Awaiting the task then tells when nothing of it goes on any more.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Whether it has ended, in whatever way.
    pub fn is_finished(&self) -> bool {
        self.alive.strong_count() == 0
    }
}

impl<T> Future for Task<T> {
    type Output = Result<T, CutOff>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.result).poll(context).map(|ended| ended.map_err(|_| CutOff))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::TokioClock;

    #[tokio::test(start_paused = true)]
    async fn a_task_has_a_result_and_can_be_cut_off() {
        let clock = TokioClock::default();
        let mut done = Task::spawn(&clock, async { 7 });
        assert_eq!((&mut done).await, Ok(7));

        let (held, dropped) = oneshot::channel::<()>();
        let endless = Task::spawn(&clock, async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        clock.sleep(Duration::from_secs(1)).await;
        assert!(!endless.is_finished());
        endless.abort();
        assert_eq!(endless.await, Err(CutOff));
        assert!(dropped.await.is_err(), "what the work held is gone once the task has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_finished_task_says_so_before_it_is_awaited() {
        let clock = TokioClock::default();
        let task = Task::spawn(&clock, async { 7 });
        clock.sleep(Duration::from_secs(1)).await;
        assert!(task.is_finished());
        assert_eq!(task.await, Ok(7));
    }
}
