//! The process: threads, signals, hand-over, end.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
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

/// How often the next process, while it is not ready, looks whether the one before is still there.
const ALONE_PAUSE: Duration = Duration::from_millis(100);

/// So long the next process waits for a leader where the DCS says that there is none: one that leads by failsafe mode has no key,
/// and only the process before knows who that is.
const LEADERLESS: Duration = Duration::from_secs(30);

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
    /// Told when this process is in charge.
    pub begin: oneshot::Sender<()>,
    /// Where the next process can take the sockets.
    pub upgrade_sock: Option<PathBuf>,
    /// The process that these sockets were taken from.
    pub taker: Option<Taker>,
    /// How the next process is started.
    pub command: Command,
}

/// Runs until SIGTERM or SIGINT (drain, then end), or until the next process is in charge (the same). SIGQUIT waits for it to
/// come, SIGUSR2 starts it. A second signal to end ends at once. Must not be called inside a runtime.
///
/// # Errors
/// There are no threads, signals or place for the hand-over to be had.
pub fn run(plan: Plan) -> io::Result<()> {
    let Plan { router, listeners, threads, background, begin, upgrade_sock, taker, command } = plan;
    let runtime = runtime()?;
    let end = runtime.block_on(async {
        let mut signals = Signals::new()?;
        tokio::spawn(background);
        if let Some(taker) = &taker {
            tokio::select! {
                () = ready(&router, taker) => {}
                () = signals.stop.told() => return Ok(()),
            }
        }
        listeners.begin()?;
        for (number, work) in threads.into_iter().enumerate() {
            relay_thread(number, router.clone(), work)?;
        }
        let next = Next::expect(router.clone(), listeners.clone(), upgrade_sock, command)?;
        let _ = begin.send(());
        let (arriving, all_here) = oneshot::channel();
        if let Some(taker) = taker {
            // The other process may have ended by itself meanwhile: nothing is missing then.
            if let Err(error) = taker.taken() {
                warn!(%error, "the process whose sockets were taken does not know that it may end");
            }
            let thread = std::thread::Builder::new().name("adoption".into());
            let listeners = listeners.clone();
            thread.spawn(move || take_sessions(arriving, &listeners, &taker))?;
        } else {
            drop(arriving);
            // Of one that takes over the process before has told it.
            tell_systemd(NotifyState::Ready);
        }
        signals.end(router, &listeners, next, all_here).await;
        Ok(())
    });
    // A resolver that hangs has a thread there, which would be waited for.
    runtime.shutdown_background();
    end
}

/// Returns when this process can do better than the one before: it knows of a leader, or has known for a while that there is none, or
/// is alone.
async fn ready(router: &Router, taker: &Taker) {
    let mut tables = router.tables();
    let known = async {
        // The sender lives as long as the router, so this is never an error.
        let _ = tables.wait_for(|table| table.reign.is_some() || table.certainty == Certainty::Confirmed).await;
        let led = tables.wait_for(|table| table.reign.is_some());
        let _ = tokio::time::timeout(LEADERLESS, led).await;
    };
    let alone = async {
        while !taker.is_alone() {
            tokio::time::sleep(ALONE_PAUSE).await;
        }
    };
    tokio::select! {
        () = known => {}
        () = alone => warn!("the process whose sockets were taken has ended"),
    }
}

fn tell_systemd(state: NotifyState<'_>) {
    // Without systemd there is nobody to tell.
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!(%error, "systemd can't be told");
    }
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

fn relay_thread(number: usize, router: Arc<Router>, work: mpsc::Receiver<Work>) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().on_thread_park(relay::pause::before_waiting).build()?;
    let thread = std::thread::Builder::new().name(format!("relay-{number}"));
    thread.spawn(move || runtime.block_on(serve(router, work))).map(drop)
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

/// The process that comes after this one.
struct Next {
    /// Has its id once that is in charge, as far as known; never, where there is no place for it. Sessions follow.
    in_charge: mpsc::Receiver<Option<u32>>,
    /// It is here, and not ready.
    visits: Arc<AtomicBool>,
    /// Starts it; `None` where there is no place for it.
    command: Option<Command>,
}

impl Next {
    fn expect(
        router: Arc<Router>,
        listeners: Arc<Listeners>,
        path: Option<PathBuf>,
        command: Command,
    ) -> io::Result<Self> {
        let (done, in_charge) = mpsc::channel(1);
        let Some(path) = path else { return Ok(Self { in_charge, visits: Arc::default(), command: None }) };
        let giver = Giver::at(&path)?;
        let visits = giver.visited();
        let give = move || {
            while !done.is_closed() {
                match giver.give(|| listeners.copies()) {
                    Ok(given) => {
                        let _ = done.blocking_send(given.pid());
                        return give_sessions(&router, given);
                    }
                    Err(error) => {
                        warn!(%error, "the sockets were not handed over; going on");
                        std::thread::sleep(GIVE_PAUSE);
                    }
                }
            }
        };
        std::thread::Builder::new().name("handover".into()).spawn(give)?;
        Ok(Self { in_charge, visits, command: Some(command) })
    }

    /// Returns when it is in charge; `None`: it has not come in time.
    async fn comes(&mut self) -> Option<Option<u32>> {
        loop {
            match tokio::time::timeout(TAKE_LIMIT, self.in_charge.recv()).await {
                Ok(taken) => return taken,
                Err(_) if self.visits.load(Ordering::Acquire) => {}
                Err(_) => {
                    warn!("no process has come to take the sockets");
                    return None;
                }
            }
        }
    }

    /// Starts the program as it is now, unless the next process is here already.
    fn start(&mut self) {
        let Some(command) = &mut self.command else {
            return warn!("there is no place for a hand-over (--upgrade-sock)");
        };
        if self.visits.load(Ordering::Acquire) {
            return warn!("the next process is here already, and not ready");
        }
        let started = command.spawn().and_then(|mut child| {
            info!(pid = child.id(), "the next process is started");
            let wait = move || match child.wait() {
                Ok(status) => warn!(%status, "the next process has ended"),
                Err(error) => warn!(%error, "the next process can't be waited for"),
            };
            std::thread::Builder::new().name("next".into()).spawn(wait)
        });
        if let Err(error) = started {
            warn!(%error, "the next process can't be started");
        }
    }
}

/// Gives every session that can leave to the next process, until this one ends.
fn give_sessions(router: &Router, given: Given) {
    let mut gone = 0;
    if let Err(error) = given.sessions(&router.sessions, &mut gone) {
        let (stay, limit) = (router.sessions.len(), router.limits().handover_timeout);
        warn!(gone, stay, ?limit, %error, "the next process takes no more sessions; those that stay go on here");
    }
}

/// Takes the sessions of the process whose sockets were taken. More are `arriving` as long as that is not dropped.
fn take_sessions(arriving: oneshot::Sender<()>, listeners: &Listeners, taker: &Taker) {
    let mut count = 0;
    let taken = taker.sessions(|adopted| {
        count += 1;
        listeners.resume(adopted);
    });
    match taken {
        Ok(()) => info!(sessions = count, "the sessions of the process before are here"),
        Err(error) => warn!(sessions = count, %error, "the process before sends no more sessions"),
    }
    drop(arriving);
}

/// Returns once this process has nothing any more, as [`Router::drain`]. Where the next one is in charge, that is not before all
/// are here that the process before still has: they go there through this one.
async fn drained(
    router: &Router,
    limit: Option<Duration>,
    handed_over: bool,
    all_here: oneshot::Receiver<()>,
) -> usize {
    let ended = router.drain(limit, handed_over).await;
    if !handed_over || ended > 0 {
        return ended;
    }
    // Nothing is ever sent.
    let _ = all_here.await;
    router.drain(limit, handed_over).await
}

/// What signals mean.
struct Signals {
    stop: Stop,
    quit: Signal,
    start: Signal,
}

/// SIGTERM and SIGINT.
struct Stop {
    term: Signal,
    int: Signal,
}

impl Stop {
    /// The next one.
    async fn told(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

impl Signals {
    fn new() -> io::Result<Self> {
        let stop = Stop { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? };
        Ok(Self { stop, quit: signal(SignalKind::quit())?, start: signal(SignalKind::user_defined2())? })
    }

    /// Returns when the process shall end.
    async fn end(
        mut self,
        router: Arc<Router>,
        listeners: &Listeners,
        mut next: Next,
        all_here: oneshot::Receiver<()>,
    ) {
        let taken = loop {
            tokio::select! {
                () = self.stop.told() => break None,
                Some(next) = next.in_charge.recv() => break Some(next),
                _ = self.quit.recv() => tokio::select! {
                    () = self.stop.told() => break None,
                    comes = next.comes() => break comes,
                },
                _ = self.start.recv() => next.start(),
            }
        };
        let handed_over = taken.is_some();
        match taken {
            Some(pid) => {
                info!(pid, "the next process is in charge");
                pid.map(NotifyState::MainPid).map(tell_systemd);
            }
            None => tell_systemd(NotifyState::Stopping),
        }
        listeners.close();
        let limits = router.limits();
        let limit = if handed_over { limits.handover_timeout } else { Some(limits.drain_timeout) };
        let drained = tokio::select! {
            ended = drained(&router, limit, handed_over, all_here) => {
                info!(sessions_ended = ended, "drained");
                true
            }
            () = self.stop.told() => {
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
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use trunkline_config::router::Limits;

    use super::*;
    use crate::listeners::Inherited;

    #[tokio::test]
    async fn who_still_gets_sessions_of_the_process_before_is_not_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let giver = Giver::at(&path).unwrap();
        let before = std::thread::spawn(move || giver.give(|| Ok(Inherited::new())).unwrap());
        let (taker, _) = Taker::take(&path).unwrap();
        taker.taken().unwrap();
        let before = before.join().unwrap();
        let router = Router::new(Limits::default()).unwrap();
        let (listeners, _threads) = Listeners::new(router.clone(), 1);
        let (arriving, all_here) = oneshot::channel();
        let takes = std::thread::spawn(move || take_sessions(arriving, &listeners, &taker));
        let mut drains = std::pin::pin!(drained(&router, Some(TAKE_LIMIT), true, all_here));
        assert!(drains.as_mut().now_or_never().is_none(), "the process before may have some");
        drop(before);
        takes.join().unwrap();
        assert_eq!(drains.await, 0);
        let (_arriving, all_here) = oneshot::channel();
        let ends = drained(&router, Some(TAKE_LIMIT), false, all_here).now_or_never();
        assert_eq!(ends, Some(0), "who is told to end does not wait for it");
    }
}
