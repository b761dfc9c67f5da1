//! The way of one client to a server: choose, or wait for a choice; dial; register; forward the client's own bytes; hear
//! what the server says first.
//!
//! Until a server has taken the session it has no state anywhere, so it can wait, and be sent elsewhere, as often as
//! needed. What bounds the waiting: a number of places for all ports, `hold_timeout` for each, and no memory but the
//! client's own packet. A client that goes away while it waits gives its place back at once. Whoever has no server after
//! `connect_timeout` waits, whatever it is that keeps it: that there is no server, or one that can't be reached, or one that says
//! nothing.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{debug, warn};
use trunkline_common::{Clock, Instant, MemberName};
use trunkline_config::router::{Balance, NoCandidate, Port, Target};

use crate::answer::{self, Answer};
use crate::crypto::Crypto;
use crate::metrics::Meter;
use crate::places::Place;
use crate::port::{Listening, Peer};
use crate::reply::Refusal;
use crate::router::Router;
use crate::session::No;
use crate::sessions::Session;
use crate::socket::FirstBytes;
use crate::startup::{Malformed, Packet};
use crate::table::{Backend, RouteTable};
use crate::wire::Tls;
use crate::{balance, rule, socket};

/// Pauses between attempts at servers that the table names but that can't be reached. A new table ends a pause.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(250);

/// What a client asks for.
#[derive(Debug)]
pub struct Request {
    /// The kind.
    pub packet: Packet,
    /// The packet as it was sent.
    pub bytes: Vec<u8>,
}

impl Default for Request {
    /// None yet.
    fn default() -> Self {
        Self { packet: Packet::Startup { minor: 0 }, bytes: Vec::new() }
    }
}

/// A server that a client's packet has been forwarded to.
#[derive(Debug)]
pub struct Found {
    /// The connection to it.
    pub server: Arc<TcpStream>,
    /// The registration.
    pub session: Session,
    /// Where its bytes are counted.
    pub meter: Meter,
    /// TLS over the connection, where the router begins it.
    pub tls: Option<Tls>,
    /// What has been read of it, and not passed on.
    pub said: Vec<u8>,
    /// The kind of packet that it was sent last.
    pub packet: Packet,
    backend: Arc<Backend>,
}

/// What comes of a request.
#[derive(Debug)]
pub enum Outcome {
    /// A session.
    Begun(Found),
    /// A server that has no encryption. The search goes on with the client's next request.
    Denied,
}

/// A connection that is made before its server leads.
#[derive(Debug)]
struct Ahead {
    host: String,
    port: u16,
    dialling: JoinHandle<io::Result<TcpStream>>,
    _place: Place,
}

impl Ahead {
    /// `None`: there are as many already as there may be.
    fn dial(router: &Router, port: &Port, elected: &Backend) -> Option<Self> {
        let place = router.ahead.try_take()?;
        let (host, limit, silence) = (elected.host.clone(), port.connect_timeout, port.server_silence);
        let (names, server_port) = (router.names.clone(), elected.port);
        let dialling =
            tokio::spawn(
                async move { socket::dial(&names, &host, server_port, limit, silence, FirstBytes::Later).await },
            );
        Some(Self { host: elected.host.clone(), port: elected.port, dialling, _place: place })
    }

    fn leads_to(&self, backend: &Backend) -> bool {
        (&self.host, self.port) == (&backend.host, backend.port)
    }

    /// The connection, if it came about.
    async fn connection(mut self) -> Option<TcpStream> {
        (&mut self.dialling).await.ok()?.ok()
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.dialling.abort();
    }
}

/// How a search goes on.
#[derive(Debug)]
struct Wait {
    began: Instant,
    /// How long the next server may take. It grows with every one that says nothing: they may be slow.
    patience: Duration,
    /// Since when the client waits, if it does.
    since: Option<Instant>,
    room: Option<Room>,
}

/// A place in the waiting room.
#[derive(Debug)]
struct Room {
    /// When waiting ends.
    deadline: Instant,
    /// When the attempts that go on end: whoever has been given a turn has the time for it.
    until: Instant,
    _place: Place,
}

/// One client's search for a server.
#[derive(Debug)]
pub struct Search<'a> {
    router: &'a Router,
    listening: &'a Listening,
    port: Arc<Port>,
    crypto: &'a Crypto,
    client: &'a Arc<TcpStream>,
    peer: Peer,
    /// What every server is sent first.
    greeting: Vec<u8>,
    /// What the client asks for now.
    request: Request,
    /// Requests for encryption that it was denied; any further server has to deny them, too.
    denied: Vec<Request>,
    /// The server that denied the last one.
    at_hand: Option<Found>,
    /// How long it has waited for answers before this one.
    waited: Duration,
    /// Something unread of the client has been seen, which tokio will not report again.
    looked: AtomicBool,
}

type Tables = watch::Receiver<Arc<RouteTable>>;

impl<'a> Search<'a> {
    /// The search of `client`, which begins with its first request.
    pub fn new(
        router: &'a Router,
        listening: &'a Listening,
        port: Arc<Port>,
        crypto: &'a Crypto,
        client: &'a Arc<TcpStream>,
        peer: Peer,
    ) -> Self {
        let (request, looked) = (Request::default(), AtomicBool::new(false));
        Self {
            router,
            listening,
            port,
            crypto,
            client,
            peer,
            greeting: Vec::new(),
            request,
            denied: Vec::new(),
            at_hand: None,
            waited: Duration::ZERO,
            looked,
        }
    }

    /// The client is another one than whose connection it is, or servers are to be told of it.
    pub fn introduce(&mut self, peer: Peer, greeting: Vec<u8>) {
        (self.peer, self.greeting) = (peer, greeting);
    }

    /// The client.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// What every server is sent first.
    pub fn greeting(&self) -> &[u8] {
        &self.greeting
    }

    /// The client has asked for another kind of server than the port leads to.
    pub fn redirect(&mut self, port: Port) {
        self.port = Arc::new(port);
        let candidates = self.candidates(&self.router.table());
        self.at_hand = self.at_hand.take().filter(|found| candidates.iter().any(|now| now.same_server(&found.backend)));
    }

    /// Whether the client waits for the answer to a request for encryption.
    pub fn awaits_answer(&self) -> bool {
        self.request.packet.awaits_answer()
    }

    /// Whether the client may have sent something that tokio will not report again.
    pub fn has_looked(&self) -> bool {
        self.looked.load(Ordering::Relaxed)
    }

    /// Takes the client's next request.
    pub fn take(&mut self, request: Request) {
        self.request = request;
    }

    /// What the client asks for now.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Tries servers and waits for some until one has answered, the client is gone, or the time is up.
    pub async fn run(&mut self) -> Result<Outcome, No> {
        if self.denied.iter().any(|before| before.packet == self.request.packet) {
            return Err(Malformed::Repeated.into());
        }
        let (began, patience) = (self.router.clock.now(), self.port.connect_timeout);
        let mut wait = Wait { began, patience, since: None, room: None };
        let at_hand = self.at_hand.take();
        let outcome = self.search(at_hand, &mut wait).await;
        if let Some(since) = wait.since {
            self.waited += self.note_wait(since, &outcome);
        }
        let (found, answer) = outcome?;
        let request = std::mem::take(&mut self.request);
        if answer == Answer::Begun {
            // A session lasts; the search need not.
            self.denied = Vec::new();
            return Ok(Outcome::Begun(found));
        }
        self.at_hand = Some(found);
        self.denied.push(request);
        Ok(Outcome::Denied)
    }

    async fn search(&self, at_hand: Option<Found>, wait: &mut Wait) -> Result<(Found, Answer), No> {
        let mut tables = self.router.tables();
        if let Some(found) = at_hand {
            let found = Found { packet: self.request.packet, ..found };
            if let Some(answered) = self.ask(found, tables.clone(), wait.began + wait.patience, wait, &[]).await? {
                return Ok(answered);
            }
        }
        let (mut pause, mut ahead) = (FIRST_PAUSE, None);
        loop {
            if let Some(answered) = self.try_servers(&mut tables, ahead.take(), wait).await? {
                return Ok(answered);
            }
            let room = self.enter(wait)?;
            pause = self.servers_again(&mut tables, &mut ahead, pause, room).await?;
        }
    }

    /// How long the client has waited, of which a note is taken.
    fn note_wait(&self, since: Instant, outcome: &Result<(Found, Answer), No>) -> Duration {
        let label = match outcome {
            Ok(_) => "served",
            Err(No::ClientGone | No::Handshake | No::Excess) => "client_gone",
            Err(No::Refused(Refusal::TooManyHeld)) => "full",
            Err(No::Refused(Refusal::ShuttingDown)) => "shutdown",
            Err(No::Refused(Refusal::EarlyData)) => "early_data",
            Err(No::Refused(_)) => "expired",
        };
        let waited = self.router.clock.now().since(since);
        let seconds = waited.as_secs_f64();
        self.router.metrics.hold_seconds.with_label_values(&[&*self.listening.name, label]).observe(seconds);
        waited
    }

    /// From now on the client waits, in a place of the waiting room, unless it does so already.
    fn enter<'w>(&self, wait: &'w mut Wait) -> Result<&'w mut Room, No> {
        if wait.room.is_none() {
            if self.port.no_candidate == NoCandidate::Refuse {
                return Err(No::Refused(Refusal::NoServer));
            }
            let now = self.router.clock.now();
            wait.since = Some(now);
            let _place = self.router.hold.enter().ok_or(No::Refused(Refusal::TooManyHeld))?;
            let deadline = now + self.port.hold_timeout.saturating_sub(self.waited);
            wait.room = Some(Room { deadline, until: deadline, _place });
        }
        // There is one by now.
        wait.room.as_mut().ok_or(No::Refused(Refusal::NoServer))
    }

    /// Returns when it is this client's turn to try servers again. `pause`: between two attempts without any news; how long the
    /// next one is.
    async fn servers_again(
        &self,
        tables: &mut Tables,
        ahead: &mut Option<Ahead>,
        mut pause: Duration,
        room: &mut Room,
    ) -> Result<Duration, No> {
        loop {
            self.dial_ahead(tables.borrow().elected.as_ref(), ahead);
            let unreachable = !self.candidates(&tables.borrow()).is_empty();
            let now = self.router.clock.now();
            if now >= room.deadline {
                return Err(No::Refused(Refusal::NoServer));
            }
            let retry = now + pause;
            let wake = async {
                tokio::select! {
                    biased;
                    // The sender lives as long as the router, so this is never an error.
                    _ = tables.changed() => FIRST_PAUSE,
                    () = self.router.clock.sleep_until(retry), if unreachable => (pause * 2).min(LAST_PAUSE),
                }
            };
            pause = self.unless_over(room.deadline, wake).await?;
            if self.candidates(&tables.borrow()).is_empty() {
                continue;
            }
            // Who has been given a turn is past the reach of the deadline: turns are bounded by the number of places.
            let turn = self.router.hold.turn(self.router.clock.now());
            self.unless_over(room.deadline.max(turn.at + FIRST_PAUSE), self.router.clock.sleep_until(turn.at)).await?;
            room.until = room.deadline.max(turn.at + self.port.connect_timeout);
            return Ok(pause);
        }
    }

    /// Connects to the server that is about to lead, so that all that is left to do then is to say what the client has said.
    /// So little is no session: no server has been told anything.
    fn dial_ahead(&self, elected: Option<&Arc<Backend>>, ahead: &mut Option<Ahead>) {
        let wanted = elected.filter(|_| self.port.target == Target::Leader);
        if !ahead.as_ref().is_some_and(|ahead| wanted.is_some_and(|elected| ahead.leads_to(elected))) {
            *ahead = wanted.and_then(|elected| Ahead::dial(self.router, &self.port, elected));
        }
    }

    /// What comes of `wait`, unless the client goes away, the router drains or the deadline passes first.
    async fn unless_over<T>(&self, deadline: Instant, wait: impl Future<Output = T>) -> Result<T, No> {
        tokio::select! {
            biased;
            outcome = wait => Ok(outcome),
            gone = self.client_stirs() => Err(gone),
            () = self.router.refusing() => Err(No::Refused(Refusal::ShuttingDown)),
            () = self.router.clock.sleep_until(deadline) => Err(No::Refused(Refusal::NoServer)),
        }
    }

    fn candidates(&self, table: &RouteTable) -> Vec<Arc<Backend>> {
        rule::candidates(table, &self.port, self.router.clock.now())
    }

    /// Tries candidates of the newest table, each once. `None`: none of them takes the session.
    async fn try_servers(
        &self,
        tables: &mut Tables,
        mut ahead: Option<Ahead>,
        wait: &mut Wait,
    ) -> Result<Option<(Found, Answer)>, No> {
        let mut tried: Vec<MemberName> = Vec::new();
        loop {
            let mut candidates = self.candidates(&tables.borrow_and_update());
            candidates.retain(|candidate| !tried.contains(&candidate.member));
            let now = self.router.clock.now();
            let Some(chosen) = self.choose(&candidates).cloned() else { return Ok(None) };
            tried.push(chosen.member.clone());
            let ahead = ahead.take().filter(|ahead| ahead.leads_to(&chosen));
            let in_time = wait.room.as_ref().map_or(now + wait.patience, |room| room.until.min(now + wait.patience));
            if let Some(found) = self.connect(&chosen, tables.clone(), ahead, in_time).await
                && let Some(answered) = self.ask(found, tables.clone(), in_time, wait, &tried).await?
            {
                return Ok(Some(answered));
            }
            // A port that refuses tries all there are instead.
            let now = self.router.clock.now();
            if now.since(wait.began) >= self.port.connect_timeout && self.port.no_candidate != NoCandidate::Refuse {
                let room = self.enter(wait)?;
                if now >= room.until {
                    return Ok(None);
                }
            }
        }
    }

    fn choose<'c>(&self, candidates: &'c [Arc<Backend>]) -> Option<&'c Arc<Backend>> {
        match self.port.balance {
            Balance::TwoChoices => {
                let load = |backend: &Arc<Backend>| self.router.sessions.load(&backend.member);
                balance::two_choices(candidates, load, &mut rand::rng())
            }
            Balance::RoundRobin => balance::round_robin(candidates, self.listening.turn()),
            Balance::ClientAddress => {
                balance::by_address(candidates, |backend| backend.member.as_str(), self.peer.ip())
            }
        }
    }

    /// Dials, registers, and repeats what the client has been through, all before `in_time`.
    async fn connect(
        &self,
        backend: &Arc<Backend>,
        tables: Tables,
        ahead: Option<Ahead>,
        in_time: Instant,
    ) -> Option<Found> {
        let ready = match ahead {
            Some(ahead) => ahead.connection().await,
            None => None,
        };
        let server = match ready {
            Some(server) => {
                self.router.metrics.connects.with_label_values(&[backend.member.as_str(), "ok"]).inc();
                server
            }
            None => self.dial(backend, tables, in_time).await?,
        };
        let server = Arc::new(server);
        let session =
            self.router.sessions.begin(&self.listening.name, self.peer, backend, &server, self.router.clock.now())?;
        let meter = self.router.metrics.meter(&self.listening.name, backend.member.as_str());
        let mut said = Vec::new();
        let repeat = async {
            socket::write_all(&server, &self.greeting).await.ok()?;
            let tls = self.encrypt(&server, backend).await?;
            for request in &self.denied {
                socket::write_all(&server, &request.bytes).await.ok()?;
                (answer::first(&server, request.packet, &mut said).await == Answer::Denied).then_some(())?;
            }
            Some(tls)
        };
        let left = in_time.since(self.router.clock.now());
        let tls = tokio::time::timeout(left, repeat).await.ok()??;
        let packet = self.request.packet;
        Some(Found { server, session, meter, tls, said, packet, backend: backend.clone() })
    }

    /// `None`: the server is to be spoken to in TLS, and can't be.
    async fn encrypt(&self, server: &Arc<TcpStream>, backend: &Backend) -> Option<Option<Tls>> {
        let refused = |error: &io::Error| {
            self.router.metrics.connects.with_label_values(&[backend.member.as_str(), "no_tls"]).inc();
            warn!(member = backend.member.as_str(), %error, "no TLS with a server");
        };
        self.crypto.connect(&self.port, server, &backend.host).await.inspect_err(refused).ok()
    }

    /// Forwards the request and waits for the answer. `None`: this server takes no session, now or any more, or has said nothing
    /// `in_time` and there is another one than those `tried`. Where there is none it may be slow, and goes on to be waited for.
    async fn ask(
        &self,
        mut found: Found,
        mut tables: Tables,
        in_time: Instant,
        wait: &mut Wait,
        tried: &[MemberName],
    ) -> Result<Option<(Found, Answer)>, No> {
        let (bytes, packet, backend) = (&self.request.bytes, self.request.packet, found.backend.clone());
        let other = |table: &Arc<RouteTable>| {
            let untried = |other: &Arc<Backend>| !other.same_server(&backend) && !tried.contains(&other.member);
            self.candidates(table).iter().any(untried)
        };
        let exchange = async {
            match &mut found.tls {
                Some(tls) => answer::first_in_tls(tls, bytes, packet, &mut found.said).await,
                None => match socket::write_all(&found.server, bytes).await {
                    Ok(()) => answer::first(&found.server, packet, &mut found.said).await,
                    Err(_) => Answer::Gone,
                },
            }
        };
        let answer = {
            let mut exchange = std::pin::pin!(exchange);
            let answer = tokio::select! {
                biased;
                answer = &mut exchange => Some(answer),
                gone = self.client_stirs() => return Err(gone),
                () = self.router.clock.sleep_until(in_time) => None,
            };
            match answer {
                Some(answer) => answer,
                None => {
                    self.router.metrics.connects.with_label_values(&[backend.member.as_str(), "silent"]).inc();
                    if self.port.no_candidate != NoCandidate::Refuse {
                        wait.patience = wait.patience.saturating_mul(2);
                    }
                    if other(&tables.borrow_and_update()) {
                        return Ok(None);
                    }
                    let until = self.enter(wait)?.until;
                    let better = async { tables.wait_for(other).await.map(drop) };
                    let answer = async {
                        tokio::select! {
                            biased;
                            answer = exchange => Some(answer),
                            // The sender lives as long as the router, so this is never an error.
                            _ = better => None,
                        }
                    };
                    match self.unless_over(until, answer).await? {
                        Some(answer) => answer,
                        None => return Ok(None),
                    }
                }
            }
        };
        match answer {
            Answer::Denied => Ok(Some((found, answer))),
            Answer::Begun if found.session.begun(self.client) => Ok(Some((found, answer))),
            Answer::Begun | Answer::NotNow | Answer::Gone => {
                debug!(port = &*self.listening.name, ?answer, "this server takes no session");
                Ok(None)
            }
        }
    }

    /// Dials, until the server answers or is no candidate any more: a frozen host must not keep a client that another
    /// server is ready for.
    async fn dial(&self, backend: &Arc<Backend>, mut tables: Tables, in_time: Instant) -> Option<TcpStream> {
        let began = self.router.clock.now();
        let deposed = async {
            loop {
                let named = |table: &RouteTable| self.candidates(table).iter().any(|now| now.same_server(backend));
                if tables.changed().await.is_err() || !named(&tables.borrow()) {
                    return;
                }
            }
        };
        let limit = in_time.since(began).min(self.port.connect_timeout);
        let (names, host, silence) = (&self.router.names, &backend.host, self.port.server_silence);
        let dialled = tokio::select! {
            biased;
            dialled = socket::dial(names, host, backend.port, limit, silence, FirstBytes::AtOnce) => dialled,
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
                let seconds = self.router.clock.now().since(began).as_secs_f64();
                self.router.metrics.connect_seconds.with_label_values(&[backend.member.as_str()]).observe(seconds);
                Some(server)
            }
            Err(error) => {
                debug!(member = backend.member.as_str(), %error, "connect failed");
                None
            }
        }
    }

    /// Returns when the client goes away, or says something while it must be silent.
    async fn client_stirs(&self) -> No {
        loop {
            let Ok(ready) = self.client.ready(Interest::READABLE).await else { return No::ClientGone };
            if ready.is_read_closed() {
                return No::ClientGone;
            }
            let mut seen = Ok(0);
            let looked = self.client.try_io(Interest::READABLE, || {
                seen = socket::peek(self.client);
                // Whatever it is, tokio shall wait for the next event and not for this one to be dealt with.
                io::Result::<()>::Err(io::ErrorKind::WouldBlock.into())
            });
            debug_assert!(looked.is_err());
            match seen {
                Ok(0) => return No::ClientGone,
                Ok(_) if self.awaits_answer() => return No::Refused(Refusal::EarlyData),
                Ok(_) => self.looked.store(true, Ordering::Relaxed),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return No::ClientGone,
            }
        }
    }
}
