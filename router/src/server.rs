//! The process: listeners, threads, signals, hand-over. The only file that names pingora-core.
//!
//! pingora gives the threads (one single-threaded runtime per service), the table of inherited listening sockets and the
//! hand-over of them to a new process. Three things of it are replaced, each by what its own interfaces offer:
//!
//! * Its stream buffers what it reads, which splice would lose: the services here listen by themselves.
//! * It waits a fixed time at the end, empty or not (300 s by default): [`Signals`] does the draining before it tells
//!   pingora to stop at once, so the process ends with its last session.
//! * After a hand-over the waiting can't be avoided, so the process ends itself once it is empty ([`Control`]).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use parking_lot::Mutex;
use pingora_core::server::configuration::{Opt, ServerConf};
use pingora_core::server::{Fds, ListenFds, RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora_core::services::Service;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::accept;
use crate::port::Listening;
use crate::router::Router;
use crate::socket::{Address, Bound, Listener};

/// What pingora can hand over: its message has room for this many sockets.
const HANDED_OVER: usize = 32;

/// Work that goes on beside the sessions, on a thread of its own.
pub type Background = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What to run.
pub struct Plan {
    /// The router.
    pub router: Arc<Router>,
    /// Its ports.
    pub ports: Vec<Arc<Listening>>,
    /// Threads that move bytes, at least one.
    pub threads: usize,
    /// Follows the cluster and serves the admin port.
    pub background: Background,
    /// Where listening sockets are handed over.
    pub handover: Handover,
}

/// How listening sockets pass from one process to the next.
#[derive(Debug, Clone, Default)]
pub struct Handover {
    /// The unix socket for it.
    pub socket: Option<String>,
    /// Take the sockets of the running process, which is then sent SIGQUIT, instead of binding.
    pub take: bool,
}

/// Binds the ports and runs until SIGTERM (drain, then end), SIGINT (the same) or SIGQUIT (hand over, drain, end). A second
/// signal ends at once. Must not be called inside a runtime.
///
/// Fails if an address can't be listened on.
pub fn run(plan: Plan) -> io::Result<()> {
    let Plan { router, ports, threads, background, handover } = plan;
    let threads = threads.max(1);
    if handover.socket.is_some() && threads * ports.len() > HANDED_OVER {
        warn!(threads, ports = ports.len(), limit = HANDED_OVER, "too many sockets to hand them over");
    }
    let services = relays(&router, &ports, threads, handover.take)?;
    let limit = router.limits().drain_timeout;
    let conf = ServerConf {
        threads: 1,
        work_stealing: false,
        grace_period_seconds: Some(limit.as_secs() + 1),
        graceful_shutdown_timeout_seconds: Some(0),
        upgrade_sock: handover.socket.clone().unwrap_or_default(),
        ..ServerConf::default()
    };
    let opt = Opt { upgrade: handover.take, ..Opt::default() };
    let mut server = Server::new_with_opt_and_conf(opt, conf);
    server.bootstrap();
    services.into_iter().for_each(|service| {
        server.add_service(service);
    });
    server.add_service(Control { router: router.clone(), background: Mutex::new(Some(background)) });
    let signals = Signals { router, hands_over: handover.socket.is_some() };
    server.run(RunArgs { shutdown_signal: Box::new(signals) });
    Ok(())
}

/// One service, and so one thread, after the other, each with its own listener of every port.
fn relays(router: &Arc<Router>, ports: &[Arc<Listening>], threads: usize, inherit: bool) -> io::Result<Vec<Relay>> {
    let mut relays: Vec<Relay> = (0..threads).map(|thread| Relay::new(router, thread)).collect();
    for listening in ports {
        let port = listening.settings();
        for listen in &port.listen {
            let describe = |error: io::Error| {
                io::Error::new(error.kind(), format!("port '{}' can't listen on {listen}: {error}", port.name))
            };
            let mut address = Address::of(listen).map_err(describe)?;
            let mut bound = match inherit {
                true => Vec::new(),
                false => Bound::listen(&address, threads).map_err(describe)?,
            };
            if let Some(first) = bound.first() {
                address = first.address().map_err(describe)?;
            }
            for relay in &mut relays {
                let key = format!("{address}#{}", relay.thread);
                let (listening, address) = (listening.clone(), address.clone());
                relay.listeners.push(Socket { listening, address, key, bound: bound.pop() });
            }
            info!(port = port.name, %address, target = port.target.as_str(), threads, "listening");
        }
    }
    Ok(relays)
}

/// The sessions of one thread.
struct Relay {
    name: String,
    thread: usize,
    router: Arc<Router>,
    listeners: Vec<Socket>,
}

struct Socket {
    listening: Arc<Listening>,
    address: Address,
    /// Its name in the table of inherited sockets.
    key: String,
    bound: Option<Bound>,
}

impl Relay {
    fn new(router: &Arc<Router>, thread: usize) -> Self {
        Self { name: format!("relay-{thread}"), thread, router: router.clone(), listeners: Vec::new() }
    }
}

impl Socket {
    /// The socket: bound before, inherited, or (new in this version of the configuration) bound now.
    fn open(&mut self, fds: &ListenFds) -> io::Result<Listener> {
        let mut fds = fds.lock();
        let bound = match (self.bound.take(), fds.get(&self.key)) {
            (Some(bound), _) => bound,
            (None, Some(&fd)) => Bound::inherited(&self.address, inherited(fd)),
            (None, None) => Bound::share(&self.address)?,
        };
        fds.add(self.key.clone(), bound.as_raw_fd());
        bound.into_listener()
    }
}

#[allow(unsafe_code)]
fn inherited(fd: i32) -> OwnedFd {
    // SAFETY: pingora received it from the old process for us, keeps only its number, and names it to one service only.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[async_trait]
impl Service for Relay {
    async fn start_service(&mut self, fds: Option<ListenFds>, _shutdown: ShutdownWatch, _listeners_per_fd: usize) {
        let fds = fds.unwrap_or_else(|| Arc::new(Mutex::new(Fds::new())));
        let router = self.router.clone();
        let serve = self.listeners.iter_mut().map(|listener| {
            let (router, listening, opened) = (router.clone(), listener.listening.clone(), listener.open(&fds));
            async move {
                match opened {
                    Ok(socket) => accept::serve(router, listening, socket, watch::channel(false).1).await,
                    Err(error) => error!(port = &*listening.name, %error, "can't listen"),
                }
            }
        });
        join_all(serve).await;
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        Some(self.listeners.iter().map(|listener| listener.key.clone()).collect())
    }
}

/// What goes on beside the sessions; and the end of a process that has handed its sockets over.
struct Control {
    router: Arc<Router>,
    background: Mutex<Option<Background>>,
}

#[async_trait]
impl Service for Control {
    async fn start_service(&mut self, _fds: Option<ListenFds>, mut shutdown: ShutdownWatch, _listeners_per_fd: usize) {
        if let Some(background) = self.background.lock().take() {
            tokio::spawn(background);
        }
        // Only a hand-over gets here with sessions left: all other ways drain first.
        if shutdown.wait_for(|over| *over).await.is_ok() {
            let ended = self.router.drain(self.router.limits().drain_timeout).await;
            info!(sessions_ended = ended, "drained after the hand-over");
            std::process::exit(0);
        }
    }

    fn name(&self) -> &str {
        "control"
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        Some(Vec::new())
    }
}

/// What signals mean.
struct Signals {
    router: Arc<Router>,
    hands_over: bool,
}

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let (Ok(mut term), Ok(mut int), Ok(mut quit)) =
            (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::quit()))
        else {
            error!("signals can't be handled");
            return ShutdownSignal::FastShutdown;
        };
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            _ = quit.recv() => if self.hands_over {
                return ShutdownSignal::GracefulUpgrade;
            }
        }
        let limit: Duration = self.router.limits().drain_timeout;
        tokio::select! {
            ended = self.router.drain(limit) => info!(sessions_ended = ended, "drained"),
            () = another(&mut term, &mut int) => warn!("not waiting for sessions any more"),
        }
        ShutdownSignal::FastShutdown
    }
}

async fn another(term: &mut Signal, int: &mut Signal) {
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
