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

use crate::handover::{Given, Giver, Taker};
use crate::listeners::{Listeners, Opened, Work};
use crate::router::Router;
use crate::sessions::Cut;
use crate::table::Certainty;
use crate::{accept, relay, session};

/// How long a process that was told to hand over waits for the next one to take.
const TAKE_LIMIT: Duration = Duration::from_secs(30);

/// How long until it waits again after a hand-over that failed.
const GIVE_PAUSE: Duration = Duration::from_millis(200);

/// Sessions on their way to the next process at once.
const LEAVING: usize = 256;

/// How often it is looked whether it is known where sessions may go.
const TABLE_PAUSE: Duration = Duration::from_millis(10);

/// Work that goes on beside the sessions, on a thread of its own.
pub type Background = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What to run.
pub struct Plan {
    /// The router.
    pub router: Arc<Router>,
    /// Its sockets, and what each thread gets of them.
    pub listeners: Arc<Listeners>,
    /// One for each thread.
    pub threads: Vec<mpsc::Receiver<Work>>,
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
        let runtime =
            Builder::new_current_thread().enable_all().on_thread_park(relay::pause::before_waiting).build()?;
        let router = router.clone();
        let thread = std::thread::Builder::new().name(format!("relay-{number}"));
        thread.spawn(move || runtime.block_on(serve(router, opened)))?;
    }
    runtime()?.block_on(async {
        let signals = Signals::new()?;
        if let Some(taker) = taker {
            // The other process may have ended by itself meanwhile: nothing is missing then.
            if let Err(error) = taker.taken() {
                warn!(%error, "the process whose sockets were taken does not know that it may end");
            }
            let (router, listeners) = (router.clone(), listeners.clone());
            let thread = std::thread::Builder::new().name("adoption".into());
            thread.spawn(move || take_sessions(&router, &listeners, &taker))?;
        }
        let handed_over = handed_over(router.clone(), listeners, upgrade_sock)?;
        tokio::spawn(background);
        signals.end(router, handed_over).await;
        Ok(())
    })
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// The sessions of one thread.
async fn serve(router: Arc<Router>, mut work: mpsc::Receiver<Work>) {
    while let Some(work) = work.recv().await {
        match work {
            Work::Accept(Opened { bound, slot, closed }) => match bound.into_listener() {
                Ok(listener) => drop(tokio::spawn(accept::serve(router.clone(), slot, listener, closed))),
                Err(error) => error!(%error, "can't accept"),
            },
            Work::Resume(adopted) => drop(tokio::spawn(session::resume(router.clone(), *adopted))),
        }
    }
    std::future::pending().await
}

/// Becomes ready once another process has taken the sockets; never, where there is no place for it. Sessions follow.
fn handed_over(
    router: Arc<Router>,
    listeners: Arc<Listeners>,
    path: Option<PathBuf>,
) -> io::Result<mpsc::Receiver<()>> {
    let (done, receiver) = mpsc::channel(1);
    let Some(path) = path else { return Ok(receiver) };
    let giver = Giver::at(&path)?;
    let give = move || {
        while !done.is_closed() {
            match giver.give(|| listeners.copies()) {
                Ok(given) => {
                    let _ = done.blocking_send(());
                    return give_sessions(&router, &given);
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

/// Sends every session that can be sent, until this process ends.
fn give_sessions(router: &Router, given: &Given) {
    if let Err(error) = given.ready() {
        return warn!(%error, "the next process takes no sessions; they are drained");
    }
    let (exit, mut leaving) = mpsc::channel(LEAVING);
    router.sessions.leave(exit);
    while let Some(leaving) = leaving.blocking_recv() {
        if let Err(error) = given.session(&leaving) {
            warn!(%error, "a session was lost on its way to the next process");
        }
    }
}

/// Takes the sessions of the process whose sockets were taken, once it is known where sessions may go.
fn take_sessions(router: &Router, listeners: &Listeners, taker: &Taker) {
    let tables = router.tables();
    while tables.borrow().certainty == Certainty::Nothing {
        std::thread::sleep(TABLE_PAUSE);
    }
    let mut count = 0;
    let taken = taker.sessions(|adopted| {
        count += 1;
        listeners.resume(adopted);
    });
    match taken {
        Ok(()) => info!(sessions = count, "the sessions of the process before are here"),
        Err(error) => warn!(sessions = count, %error, "the process before sends no more sessions"),
    }
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
        let handed_over = tokio::select! {
            _ = self.term.recv() => false,
            _ = self.int.recv() => false,
            Some(()) = handed_over.recv() => true,
            _ = self.quit.recv() => match tokio::time::timeout(TAKE_LIMIT, handed_over.recv()).await {
                Ok(taken) => taken.is_some(),
                Err(_) => {
                    warn!("no process has come to take the sockets");
                    false
                }
            },
        };
        if handed_over {
            info!("the next process has the sockets");
        }
        let limit = router.limits().drain_timeout;
        let drained = tokio::select! {
            ended = router.drain(limit, handed_over) => {
                info!(sessions_ended = ended, "drained");
                true
            }
            () = self.another() => {
                warn!("not waiting for sessions any more");
                false
            }
        };
        if handed_over && !drained {
            // Those that have not left end with this process, which therefore does not say that it has none.
            return;
        }
        if !drained {
            router.sessions.end_all(Cut::Drained);
        }
        router.registration.withdraw().await;
    }

    async fn another(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}
