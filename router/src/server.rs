//! The process: threads, signals, hand-over, end.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use crate::accept;
use crate::handover::{Giver, Taker};
use crate::listeners::{Listeners, Opened};
use crate::router::Router;

/// How long a process that was told to hand over waits for the next one to take.
const TAKE_LIMIT: Duration = Duration::from_secs(30);

/// How long until it waits again after a hand-over that failed.
const GIVE_PAUSE: Duration = Duration::from_millis(200);

/// Work that goes on beside the sessions, on a thread of its own.
pub type Background = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What to run.
pub struct Plan {
    /// The router.
    pub router: Arc<Router>,
    /// Its sockets, and what each thread gets of them.
    pub listeners: Arc<Listeners>,
    /// One for each thread.
    pub threads: Vec<mpsc::Receiver<Opened>>,
    /// Follows the cluster, serves the admin port, reloads.
    pub background: Background,
    /// Where the next process can take the sockets.
    pub upgrade_sock: Option<PathBuf>,
    /// The process that these sockets were taken from.
    pub taker: Option<Taker>,
}

/// Runs until SIGTERM or SIGINT (drain, then end), or until the next process has taken the sockets (the same). SIGQUIT waits
/// for it to come. A second signal ends at once. Must not be called inside a runtime.
///
/// # Errors
/// There are no threads, signals or place for the hand-over to be had.
pub fn run(plan: Plan) -> io::Result<()> {
    let Plan { router, listeners, threads, background, upgrade_sock, taker } = plan;
    for (number, opened) in threads.into_iter().enumerate() {
        let (runtime, router) = (runtime()?, router.clone());
        let thread = std::thread::Builder::new().name(format!("relay-{number}"));
        thread.spawn(move || runtime.block_on(relay(router, opened)))?;
    }
    runtime()?.block_on(async {
        let signals = Signals::new()?;
        if let Some(taker) = taker {
            // The other process may have ended by itself meanwhile: nothing is missing then.
            if let Err(error) = taker.taken() {
                warn!(%error, "the process whose sockets were taken does not know that it may end");
            }
        }
        let handed_over = handed_over(listeners, upgrade_sock)?;
        tokio::spawn(background);
        signals.end(router, handed_over).await;
        Ok(())
    })
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// The sessions of one thread.
async fn relay(router: Arc<Router>, mut opened: mpsc::Receiver<Opened>) {
    while let Some(Opened { bound, slot, closed }) = opened.recv().await {
        match bound.into_listener() {
            Ok(listener) => drop(tokio::spawn(accept::serve(router.clone(), slot, listener, closed))),
            Err(error) => error!(%error, "can't accept"),
        }
    }
    std::future::pending().await
}

/// Becomes ready once another process has taken the sockets; never, where there is no place for it.
fn handed_over(listeners: Arc<Listeners>, path: Option<PathBuf>) -> io::Result<mpsc::Receiver<()>> {
    let (done, receiver) = mpsc::channel(1);
    let Some(path) = path else { return Ok(receiver) };
    let giver = Giver::at(&path)?;
    let give = move || {
        while !done.is_closed() {
            match giver.give(|| listeners.copies()) {
                Ok(()) => {
                    let _ = done.blocking_send(());
                    return;
                }
                Err(error) => {
                    warn!(%error, "the sockets were not handed over; going on");
                    std::thread::sleep(GIVE_PAUSE);
                }
            }
        }
    };
    std::thread::Builder::new().name("handover".into()).spawn(give)?;
    Ok(receiver)
}

/// What signals mean.
struct Signals {
    term: Signal,
    int: Signal,
    quit: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    /// Returns when the process shall end.
    async fn end(mut self, router: Arc<Router>, mut handed_over: mpsc::Receiver<()>) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
            Some(()) = handed_over.recv() => info!("the next process has the sockets"),
            _ = self.quit.recv() => match tokio::time::timeout(TAKE_LIMIT, handed_over.recv()).await {
                Ok(Some(())) => info!("the next process has the sockets"),
                Ok(None) => {}
                Err(_) => warn!("no process has come to take the sockets"),
            },
        }
        let limit = router.limits().drain_timeout;
        tokio::select! {
            ended = router.drain(limit) => info!(sessions_ended = ended, "drained"),
            () = self.another() => warn!("not waiting for sessions any more"),
        }
    }

    async fn another(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
