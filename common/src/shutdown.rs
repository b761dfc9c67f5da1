//! The signals a daemon listens to: SIGTERM and SIGINT to stop, SIGHUP to read its configuration again.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// What was asked for so far.
#[derive(Debug, Clone)]
pub struct Signals {
    /// How often a stop was asked for. Patroni ignores a second time; the router may hurry.
    pub stop: watch::Receiver<u32>,
    /// How often a reload was asked for.
    pub reload: watch::Receiver<u32>,
}

impl Signals {
    /// Begins to listen. Must be called inside a tokio runtime, once, before anything that takes time: until then the
    /// signals kill the process.
    ///
    /// # Errors
    /// Where the system refuses to install a handler.
    pub fn listen() -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let (stop, stop_seen) = watch::channel(0);
        let (reload, reload_seen) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => stop.send_modify(|count| *count += 1),
                    _ = interrupt.recv() => stop.send_modify(|count| *count += 1),
                    _ = hangup.recv() => reload.send_modify(|count| *count += 1),
                }
            }
        });
        Ok(Self { stop: stop_seen, reload: reload_seen })
    }

    /// Returns once a stop was asked for.
    pub async fn stopped(&self) {
        // An error would mean that nobody listens any more: the runtime is going down.
        let _ = self.stop.clone().wait_for(|count| *count > 0).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Signal, getpid, kill_process};

    #[tokio::test]
    async fn counts_what_is_asked_for() {
        let mut signals = Signals::listen().unwrap();
        kill_process(getpid(), Signal::HUP).unwrap();
        signals.reload.wait_for(|count| *count == 1).await.unwrap();
        assert_eq!(*signals.stop.borrow(), 0);
        kill_process(getpid(), Signal::TERM).unwrap();
        signals.stopped().await;
        kill_process(getpid(), Signal::INT).unwrap();
        signals.stop.wait_for(|count| *count == 2).await.unwrap();
    }
}
