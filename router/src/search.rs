//! The way of one client to a server: choose, or wait for a choice; dial; register; forward the client's own bytes.
//!
//! Until its first packet is forwarded a session has no state anywhere, so it can wait, and be sent elsewhere, as often as
//! needed. What bounds the waiting: a number of places for all ports, `hold_timeout` for each, and no memory but the first
//! packet's. A client that goes away while it waits gives its place back at once.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tracing::debug;
use trunkline_common::{Clock, Instant, MemberName};
use trunkline_config::router::NoCandidate;

use crate::reply::Refusal;
use crate::router::{Listening, Router};
use crate::session::No;
use crate::sessions::Session;
use crate::startup::Packet;
use crate::table::{Backend, RouteTable};
use crate::{balance, socket};

/// Pauses between attempts at servers that the table names but that can't be reached. A new table ends a pause.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(250);

/// Servers tried before a pause.
const ATTEMPTS: usize = 4;

/// What a search is about.
#[derive(Debug)]
pub struct Search<'a> {
    /// Whose knowledge and bounds.
    pub router: &'a Router,
    /// Where the client connected.
    pub listening: &'a Listening,
    /// The client.
    pub client: &'a Arc<TcpStream>,
    /// Its first packet …
    pub packet: Packet,
    /// … as it was sent.
    pub bytes: &'a [u8],
}

/// A session whose first packet has been forwarded.
#[derive(Debug)]
pub struct Found {
    /// The connection to the server.
    pub server: Arc<TcpStream>,
    /// The registration.
    pub session: Session,
}

type Tables = watch::Receiver<Arc<RouteTable>>;

impl Search<'_> {
    /// Tries servers and waits for some until the first packet has been forwarded to one, the client is gone, or the time
    /// is up.
    pub async fn run(&self) -> Result<Found, No> {
        if self.packet.awaits_answer() && self.has_sent_more() {
            return Err(No::Refused(Refusal::EarlyData));
        }
        let mut tables = self.router.tables();
        if let Some(found) = self.try_servers(&mut tables).await {
            return Ok(found);
        }
        if self.listening.port.no_candidate == NoCandidate::Refuse {
            return Err(No::Refused(Refusal::NoServer));
        }
        let began = self.router.clock.now();
        let outcome = self.hold(&mut tables, began).await;
        let label = match &outcome {
            Ok(_) => "served",
            Err(No::ClientGone) => "client_gone",
            Err(No::Refused(Refusal::TooManyHeld)) => "full",
            Err(No::Refused(Refusal::ShuttingDown)) => "shutdown",
            Err(No::Refused(Refusal::EarlyData)) => "early_data",
            Err(No::Refused(_)) => "expired",
        };
        let seconds = self.router.clock.now().since(began).as_secs_f64();
        self.router.metrics.hold_seconds.with_label_values(&[&*self.listening.name, label]).observe(seconds);
        outcome
    }

    /// Waits for a server in a place of the waiting room.
    async fn hold(&self, tables: &mut Tables, began: Instant) -> Result<Found, No> {
        let _place = self.router.hold.enter().ok_or(No::Refused(Refusal::TooManyHeld))?;
        let deadline = began + self.router.limits.hold_timeout;
        let mut pause = FIRST_PAUSE;
        loop {
            let unreachable = !self.candidates(&tables.borrow()).is_empty();
            let retry = self.router.clock.now() + pause;
            let wake = async {
                tokio::select! {
                    biased;
                    // The sender lives as long as the router, so this is never an error.
                    _ = tables.changed() => FIRST_PAUSE,
                    () = self.router.clock.sleep_until(retry), if unreachable => (pause * 2).min(LAST_PAUSE),
                }
            };
            pause = self.unless_over(deadline, wake).await?;
            if self.candidates(&tables.borrow()).is_empty() {
                continue;
            }
            // Who has been given a turn is past the reach of the deadline: turns are bounded by the number of places.
            let turn = self.router.hold.turn(self.router.clock.now());
            self.unless_over(deadline.max(turn + FIRST_PAUSE), self.router.clock.sleep_until(turn)).await?;
            if let Some(found) = self.try_servers(tables).await {
                return Ok(found);
            }
        }
    }

    /// What comes of `wait`, unless the client goes away, the router drains or the deadline passes first.
    async fn unless_over<T>(&self, deadline: Instant, wait: impl Future<Output = T>) -> Result<T, No> {
        tokio::select! {
            biased;
            outcome = wait => Ok(outcome),
            gone = self.client_stirs() => Err(gone),
            () = self.router.drain_begun() => Err(No::Refused(Refusal::ShuttingDown)),
            () = self.router.clock.sleep_until(deadline) => Err(No::Refused(Refusal::NoServer)),
        }
    }

    fn candidates(&self, table: &RouteTable) -> Vec<Arc<Backend>> {
        table.candidates(&self.listening.port)
    }

    /// Tries the candidates of the newest table, each once.
    async fn try_servers(&self, tables: &mut Tables) -> Option<Found> {
        let mut candidates = self.candidates(&tables.borrow_and_update());
        for _ in 0..ATTEMPTS {
            let load = |backend: &Arc<Backend>| self.router.sessions.load(&backend.member);
            let chosen = balance::pick(&candidates, load, &mut rand::rng())?.clone();
            if let Some(found) = self.try_server(&chosen, tables.clone()).await {
                return Some(found);
            }
            candidates.retain(|candidate| candidate.member != chosen.member);
        }
        None
    }

    async fn try_server(&self, backend: &Arc<Backend>, tables: Tables) -> Option<Found> {
        let server = Arc::new(self.dial(backend, tables).await?);
        let session = self.router.sessions.begin(&self.listening.name, backend, self.client, &server)?;
        let sent = tokio::time::timeout(self.router.limits.connect_timeout, send_all(&server, self.bytes)).await;
        matches!(sent, Ok(Ok(()))).then_some(Found { server, session })
    }

    /// Dials, until the server answers or is no candidate any more: a frozen host must not keep a client that another
    /// server is ready for.
    async fn dial(&self, backend: &Arc<Backend>, mut tables: Tables) -> Option<TcpStream> {
        let began = self.router.clock.now();
        let deposed = async {
            loop {
                let named = |table: &RouteTable| self.candidates(table).iter().any(|now| now.same_server(backend));
                if tables.changed().await.is_err() || !named(&tables.borrow()) {
                    return;
                }
            }
        };
        let dialled = tokio::select! {
            biased;
            dialled = socket::dial(&backend.host, backend.port, self.router.limits.connect_timeout) => dialled,
            () = deposed => Err(io::Error::new(io::ErrorKind::Interrupted, "not a candidate any more")),
        };
        let result = match &dialled {
            Ok(_) => "ok",
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused => "refused",
                io::ErrorKind::TimedOut => "timeout",
                io::ErrorKind::Interrupted => "abandoned",
                _ => "error",
            },
        };
        self.router.metrics.connects.with_label_values(&[backend.member.as_str(), result]).inc();
        match dialled {
            Ok(server) => {
                self.router.metrics.connect_seconds.observe(self.router.clock.now().since(began).as_secs_f64());
                Some(server)
            }
            Err(error) => {
                debug!(member = MemberName::as_str(&backend.member), %error, "connect failed");
                None
            }
        }
    }

    /// Whether something follows the first packet already.
    fn has_sent_more(&self) -> bool {
        matches!(peek(self.client), Ok(1..))
    }

    /// Returns when the client goes away, or says something while it must be silent.
    async fn client_stirs(&self) -> No {
        loop {
            let Ok(ready) = self.client.ready(Interest::READABLE).await else { return No::ClientGone };
            if ready.is_read_closed() {
                return No::ClientGone;
            }
            // Reported as `WouldBlock`, so that tokio waits for the next event and not for these bytes to be read.
            let mut seen = Ok(0);
            let _ = self.client.try_io(Interest::READABLE, || {
                seen = peek(self.client);
                io::Result::<()>::Err(io::ErrorKind::WouldBlock.into())
            });
            match seen {
                Ok(0) => return No::ClientGone,
                Ok(_) if self.packet.awaits_answer() => return No::Refused(Refusal::EarlyData),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return No::ClientGone,
                Ok(_) | Err(_) => {}
            }
        }
    }
}

fn peek(stream: &TcpStream) -> io::Result<usize> {
    Ok(rustix::net::recv(stream, &mut [0u8; 1], RecvFlags::PEEK)?.0)
}

async fn send_all(server: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        server.writable().await?;
        match server.try_write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
