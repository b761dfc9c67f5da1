//! One client: read the first packet → find a server, or wait for one ([`search`](crate::search)) → relay → say
//! why it ended.
//!
//! TLS is passed through: where the server agrees to it, everything behind the request is opaque. Where it does not, the
//! client's next packet is read as its first one was, and is a first packet again. Only where the port says so does TLS
//! end, or begin, at the router ([`crypto`](crate::crypto)); then the server never hears of the client's requests for it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc::error::SendError;
use tokio::sync::oneshot;
use tracing::field::display;
use tracing::{Level, debug, enabled, info};
use trunkline_common::Clock;
use trunkline_config::router::{Port, Target};

use crate::accept::{self, Permit};
use crate::crypto::Crypto;
use crate::handover::{Adopted, Leaving};
use crate::port::{Counted, Listening, Peer};
use crate::proxy::{self, Header};
use crate::reply::Refusal;
use crate::router::Router;
use crate::search::{Found, Outcome, Request, Search};
use crate::sessions::{Cut, Line, Session};
use crate::startup::{self, Malformed, Packet, Progress};
use crate::wire::{Leg, Wire};
use crate::{answer, cancel, relay, socket};

/// How long a client that is one too many may take for its own part of the beginning: it is heard, as it may have come to
/// cancel something.
const EXCESS: Duration = Duration::from_secs(2);

/// How long a refused client may take to hear why.
const FAREWELL: Duration = Duration::from_secs(2);

/// Kinds of encryption that a client may ask for, one after the other.
const DENIALS: usize = 2;

/// Bytes of a refused client that are read and thrown away, so that closing does not reset what it was told.
const FAREWELL_BYTES: usize = 64 << 10;

/// Why there will be no session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum No {
    /// The client closed before it had a server.
    ClientGone,
    /// It did not come to TLS, so there is no way to tell the client anything.
    Handshake,
    /// Its address has too many connections, and it has not even said what it wants.
    Excess,
    /// The client is told so.
    Refused(Refusal),
}

impl From<Malformed> for No {
    fn from(what: Malformed) -> Self {
        No::Refused(Refusal::Malformed(what))
    }
}

/// One line of a session or a connection: for everybody where the port says so, else for debugging.
macro_rules! tell {
    ($info:expr, $($told:tt)*) => {
        if $info { info!($($told)*) } else { debug!($($told)*) }
    };
}

/// The setting by which a client asks for another target than that of its port.
const TARGET: &str = "trunkline.target";

/// Serves one accepted connection from its first byte to its end. The permit is the right to be there.
pub fn serve(
    router: Arc<Router>,
    listening: Arc<Listening>,
    client: TcpStream,
    peer: Peer,
    permit: Permit,
) -> impl Future<Output = ()> + Send {
    // In a box that is gone once there is a session: those last, and are many.
    let beginning = Box::pin(begin(router.clone(), listening.clone(), client, peer, permit));
    async move {
        router.metrics.accepted.with_label_values(&[&*listening.name]).inc();
        // Relayed where it lies: a match by value would keep its memory twice.
        let mut begun = beginning.await;
        let ended = match &mut begun {
            Ok(begun) => {
                begun.tell_begin(&router, "session begins");
                begun.relay(&router).await
            }
            Err((ended, _)) => *ended,
        };
        match begun {
            Ok(begun) => begun.over(&router, ended),
            Err((ended, peer)) => {
                let reason = ended.label();
                tell!(listening.settings().log_sessions, port = &*listening.name, %peer, reason, "connection ended");
                router.metrics.ended.with_label_values(&[&*listening.name, "", reason]).inc();
            }
        }
    }
}

/// Goes on with a session of another process.
pub async fn resume(router: Arc<Router>, adopted: Adopted) {
    let (name, member) = (adopted.registered.port.clone(), adopted.registered.backend.member.clone());
    match adopt(&router, adopted) {
        Ok(mut begun) => {
            begun.tell_begin(&router, "session taken over");
            let ended = begun.relay(&router).await;
            begun.over(&router, ended);
        }
        Err(ended) => {
            debug!(port = &*name, %member, reason = ended.label(), "session not taken over");
            router.metrics.ended.with_label_values(&[&*name, member.as_str(), ended.label()]).inc();
        }
    }
}

fn adopt(router: &Router, adopted: Adopted) -> Result<Begun, Ended> {
    let Adopted { registered, client, server, carried } = adopted;
    let open = |socket: OwnedFd| TcpStream::from_std(socket.into()).map(Arc::new);
    let (Ok(client), Ok(server)) = (open(client), open(server)) else { return Err(Ended::ClientGone) };
    let permit = accept::permit_for_adopted(router, &registered.port);
    // It has its place among those of its client as well.
    let counted = router.port(&registered.port).and_then(|port| {
        let counts = port.settings().max_per_client.is_some();
        port.clients.enter(registered.client.ip(), usize::MAX).filter(|_| counts)
    });
    let Some(session) = router.sessions.adopt(&registered, &client, &server, router.clock.now()) else {
        // Its server is not the leader any more.
        socket::abort(&server);
        return Err(Ended::Cut(Cut::LeaderChanged));
    };
    if let Some(key) = registered.key {
        session.learn(key.as_ref().into());
    }
    let meter = router.metrics.meter(&registered.port, registered.backend.member.as_str());
    router.metrics.adopted.inc();
    let parties = relay::Parties { client, server, session, meter };
    let start = goes_on(router, carried, None);
    Ok(Begun { parties, start, tls: None, permit: Some(permit), _counted: counted.map(Box::new) })
}

/// Goes on with a session that has just talked.
async fn come_back(router: Arc<Router>, back: relay::Back, permit: Option<Permit>, counted: Option<Box<Counted>>) {
    let relay::Back { client, server, session, meter, carried, why } = back;
    let Ok((client, server)) = session.watch(client, server) else {
        return tell_end(&router, &session, Ended::Relayed(relay::End::ServerLost));
    };
    let parties = relay::Parties { client, server, session, meter };
    let start = goes_on(&router, carried, Some(why));
    let mut begun = Begun { parties, start, tls: None, permit, _counted: counted };
    let ended = begun.relay(&router).await;
    begun.over(&router, ended);
}

/// Goes on with a session that the next process has not taken.
async fn stay(router: Arc<Router>, mut begun: Begun) {
    let carried = begun.start().carried;
    begun.start = goes_on(&router, carried, None);
    let ended = begun.relay(&router).await;
    begun.over(&router, ended);
}

/// What a session begins with that has been relayed before: whatever that was, its start is over.
fn goes_on(router: &Router, carried: relay::Carried, why: Option<relay::Why>) -> Option<Box<relay::Start>> {
    let (resignation, settles) = (resignation(router), router.lean.after());
    Some(Box::new(relay::Start { resignation, carried, settles, why, ..relay::Start::default() }))
}

/// A session that a server has taken. As it lasts, what it needs at the start or seldom is in boxes.
struct Begun {
    parties: relay::Parties,
    start: Option<Box<relay::Start>>,
    /// Where TLS ends or begins here.
    tls: Option<Box<Encrypted>>,
    /// The right to be there, until it leaves.
    permit: Option<Permit>,
    _counted: Option<Box<Counted>>,
}

/// A session's connections, of which at least one is encrypted.
struct Encrypted {
    client: Leg,
    server: Leg,
    /// Read of the server already.
    said: Vec<u8>,
}

impl Begun {
    fn tell_begin(&self, router: &Router, what: &str) {
        let told = line(router, &self.parties.session).filter(|(_, info)| *info || enabled!(Level::DEBUG));
        let Some((line, info)) = told else { return };
        if info {
            self.parties.session.note_told();
        }
        let (port, member, server) = (&*line.port, line.backend.member.as_str(), line.backend.address());
        tell!(info, port, client = %line.client, member, server, seen_as = line.from.map(display), "{what}");
    }

    /// To the end of the session, or until it leaves.
    async fn relay(&mut self, router: &Router) -> Ended {
        if self.tls.is_some() {
            return Box::pin(self.relay_tls()).await;
        }
        let start = self.start();
        match relay::relay(&self.parties, start, &router.pipes).await {
            relay::Outcome::Ended(end) => self.ended(end),
            relay::Outcome::Settled(carried) => self.goes_on(*carried, Ended::Settled),
            other => Box::pin(self.part(other, None)).await,
        }
    }

    async fn relay_tls(&mut self) -> Ended {
        let Some(tls) = self.tls.take() else { return Ended::ClientGone };
        let Encrypted { mut client, server, said } = *tls;
        let start = self.start();
        let outcome = relay::relay_tls(&mut client, server, said, start, &self.parties).await;
        self.part(outcome, Some(client)).await
    }

    fn start(&mut self) -> relay::Start {
        self.start.take().map(|start| *start).unwrap_or_default()
    }

    fn ended(&self, end: relay::End) -> Ended {
        self.parties.session.cut().map_or(Ended::Relayed(end), Ended::Cut)
    }

    /// The ends of a session, which may be no end. The client is spoken to by `leg`, or in plain text.
    async fn part(&mut self, outcome: relay::Outcome, leg: Option<Leg>) -> Ended {
        let (told, overdue) = match self.parties.session.closes() {
            true => (Refusal::Closing, Cut::Drained),
            false => (Refusal::Switchover, Cut::Overdue),
        };
        let idle = match outcome {
            relay::Outcome::Ended(end) => return self.ended(end),
            relay::Outcome::Left(carried) => return self.leave(carried).await,
            relay::Outcome::Settled(carried) => return self.goes_on(*carried, Ended::Settled),
            relay::Outcome::Overdue => {
                self.parties.session.end(overdue);
                return Ended::Cut(overdue);
            }
            relay::Outcome::Resigned { idle } => idle,
        };
        // Before the client hears of it: nothing that it says from now on may reach the server.
        socket::close_both_ways(&self.parties.server);
        let mut leg = leg.unwrap_or_else(|| Leg::Plain(Wire::new(self.parties.client.clone(), Vec::new())));
        say_farewell(&mut leg, told).await;
        if idle { Ended::Told(told) } else { Ended::Cut(overdue) }
    }

    /// With these bytes first, in another way.
    fn goes_on(&mut self, carried: relay::Carried, how: Ended) -> Ended {
        self.start = Some(Box::new(relay::Start { carried, ..relay::Start::default() }));
        how
    }

    /// Its relay is over, here at least.
    fn over(self, router: &Arc<Router>, ended: Ended) {
        match ended {
            Ended::Settled => self.settle(router),
            Ended::Stays => drop(tokio::spawn(stay(router.clone(), self))),
            ended => tell_end(router, &self.parties.session, ended),
        }
    }

    /// To where it just talks, and comes back from when it has something else to do.
    fn settle(mut self, router: &Arc<Router>) {
        let traces = self.start.take().and_then(|start| start.carried.traces);
        let Begun { parties, permit, _counted, .. } = self;
        let relay::Parties { client, server, session, meter } = parties;
        let Ok((client, server)) = session.unwatch(client, server) else {
            return tell_end(router, &session, Ended::Relayed(relay::End::ServerLost));
        };
        let (runtime, back) = (tokio::runtime::Handle::current(), router.clone());
        let take_back = Box::new(move |guest| drop(runtime.spawn(come_back(back, guest, permit, _counted))));
        router.lean.enter(relay::Guest { client, server, session, meter, traces, take_back });
    }

    /// To the next process, if that takes it.
    async fn leave(&mut self, carried: Box<relay::Carried>) -> Ended {
        if let Some(cut) = self.parties.session.cut() {
            return Ended::Cut(cut);
        }
        let Some((exit, registered)) = self.parties.session.exit() else { return self.goes_on(*carried, Ended::Stays) };
        let (client, server) = (self.parties.client.clone(), self.parties.server.clone());
        let (stays, stayed) = oneshot::channel();
        let returned = match exit.send(Leaving { registered, client, server, carried, stays }).await {
            Ok(()) => stayed.await.ok(),
            Err(SendError(leaving)) => Some(leaving.carried),
        };
        returned.map_or(Ended::Left, |carried| self.goes_on(*carried, Ended::Stays))
    }
}

fn tell_end(router: &Router, session: &Session, ended: Ended) {
    let Some((line, info)) = line(router, session) else { return };
    let (port, member, reason) = (&*line.port, line.backend.member.as_str(), ended.label());
    router.metrics.ended.with_label_values(&[port, member, reason]).inc();
    if !info && !enabled!(Level::DEBUG) {
        return;
    }
    let (server, seconds) = (line.backend.address(), router.clock.now().since(line.began).as_secs_f64());
    let ((to_server, to_client), seen_as) = (line.bytes, line.from.map(display));
    tell!(
        info, port, client = %line.client, member, server, seen_as, reason, seconds, to_server, to_client, "session ended"
    );
}

/// What is told of a session, and whether its port wants it told. Of one that is gone, it did if the beginning was.
fn line(router: &Router, session: &Session) -> Option<(Line, bool)> {
    let line = session.line()?;
    let info = router.port(&line.port).map_or(session.is_told(), |port| port.settings().log_sessions);
    Some((line, info))
}

/// From the first packet to a session, or to why there is none, which the client has been told.
async fn begin(
    router: Arc<Router>,
    listening: Arc<Listening>,
    client: TcpStream,
    peer: Peer,
    permit: Permit,
) -> Result<Begun, (Ended, Peer)> {
    let (router, listening) = (&*router, &*listening);
    let (port, crypto) = listening.terms();
    relay::pause::busy();
    let client = Arc::new(client);
    let leg = Leg::Plain(Wire::new(client.clone(), Vec::new()));
    let turn = Turn { left: port.startup_timeout };
    let mut guest = Guest { stream: client.clone(), leg, turn, excess: None };
    let mut search = Search::new(router, listening, port.clone(), &crypto, &client, peer);
    let outcome = converse(router, listening, &port, &crypto, &mut guest, &mut search).await;
    let (unread, awaits_answer) = (search.has_looked(), search.awaits_answer());
    drop(search);
    let Guest { mut leg, mut turn, excess: _excess, .. } = guest;
    match outcome {
        Ok(Met::Session(found, _counted)) => {
            let Found { server, session, meter, tls, said, packet, .. } = found;
            let plain = matches!(packet, Packet::Startup { .. });
            let resignation = resignation(router);
            let settles = router.lean.after();
            let mut start = relay::Start { unread, plain, resignation, settles, ..relay::Start::default() };
            let tls = if matches!(leg, Leg::Tls(_)) || tls.is_some() {
                let plain = || Leg::Plain(Wire::new(server.clone(), Vec::new()));
                Some(Box::new(Encrypted { client: leg, server: tls.map_or_else(plain, Leg::Tls), said }))
            } else {
                start.ahead = (leg.take_back(), said);
                None
            };
            let (start, _counted) = (Some(Box::new(start)), _counted.map(Box::new));
            let parties = relay::Parties { client, server, session, meter };
            Ok(Begun { parties, start, tls, permit: Some(permit), _counted })
        }
        Ok(Met::Cancel(result)) => Err((Ended::Cancel(result), peer)),
        Err(No::ClientGone) => Err((Ended::ClientGone, peer)),
        Err(No::Handshake) => Err((Ended::Handshake, peer)),
        Err(No::Excess) => Err((Ended::Refused(Refusal::TooManyOfClient), peer)),
        Err(No::Refused(refusal)) => {
            let at_once = matches!(refusal, Refusal::EarlyData | Refusal::Malformed(_));
            let denials = if awaits_answer && !at_once { DENIALS } else { 0 };
            refuse(&mut leg, refusal, denials, &mut turn).await;
            Err((Ended::Refused(refusal), peer))
        }
    }
}

/// How long a session may go on once its server has said that it is about to stop.
fn resignation(router: &Router) -> Option<Duration> {
    Some(router.limits().switchover_budget).filter(|budget| !budget.is_zero())
}

/// A client that is beginning.
struct Guest {
    stream: Arc<TcpStream>,
    leg: Leg,
    turn: Turn,
    /// It is one too many of its address: until it has been told so.
    excess: Option<Counted>,
}

/// The time that a client has for all of its own part of the beginning, in whatever pieces. Waiting for a server is not its part.
struct Turn {
    left: Duration,
}

impl Turn {
    /// What the client does; `None`: not in time.
    async fn take<T>(&mut self, part: impl Future<Output = T>) -> Option<T> {
        let end = tokio::time::Instant::now() + self.left;
        let done = tokio::time::timeout_at(end, part).await;
        self.left = end.saturating_duration_since(tokio::time::Instant::now());
        done.ok()
    }
}

/// What a client has come for, and got.
enum Met {
    Session(Found, Option<Counted>),
    Cancel(&'static str),
}

async fn converse(
    router: &Router,
    listening: &Listening,
    port: &Port,
    crypto: &Crypto,
    guest: &mut Guest,
    search: &mut Search<'_>,
) -> Result<Met, No> {
    let Guest { stream: client, leg, turn, excess } = guest;
    let (peer, greeting) = introduction(port, client, search.peer(), turn).await?;
    search.introduce(peer, greeting);
    let counted = port.max_per_client.and_then(|limit| listening.clients.enter(peer.ip(), limit));
    let too_many = port.max_per_client.filter(|_| counted.is_none());
    if let Some(limit) = too_many {
        turn.left = turn.left.min(EXCESS);
        *excess = Some(listening.excess.enter(peer.ip(), limit).ok_or(No::Excess)?);
    }
    let mut answered = Vec::new();
    // Bounded: each kind of encryption is asked for once, after which only another kind of packet gets on.
    loop {
        let request = match first_packet(leg, turn).await {
            Err(No::Refused(Refusal::TooSlow)) if too_many.is_some() => return Err(No::Excess),
            request => request?,
        };
        match request.packet {
            Packet::Cancel => {
                let greeting = search.greeting();
                let result = cancel::forward(router, listening, port, crypto, peer, greeting, &request.bytes).await;
                // In TLS an end that is not announced is an error, which libpq tells its user.
                let _ = leg.shutdown().await;
                return Ok(Met::Cancel(result));
            }
            packet if port.speaks_tls() && packet.asks_for_encryption() => {
                if answered.contains(&packet) {
                    return Err(Malformed::Repeated.into());
                }
                answered.push(packet);
                encrypt(crypto, client, leg, request, turn).await?;
                continue;
            }
            Packet::Startup { .. } if port.require_tls && matches!(leg, Leg::Plain(_)) => {
                return Err(No::Refused(Refusal::PlainText));
            }
            _ => search.take(request),
        }
        if too_many.is_some() {
            return Err(No::Refused(Refusal::TooManyOfClient));
        }
        if search.awaits_answer() && leg.is_ahead() {
            return Err(No::Refused(Refusal::EarlyData));
        }
        if let Some(target) = chosen(port, search.request())? {
            search.redirect(port.with_target(target));
        }
        match search.run().await? {
            Outcome::Denied => socket::write_all(client, b"N").await.map_err(|_| No::ClientGone)?,
            Outcome::Begun(mut found) => {
                if let (Leg::Plain(_), Some(tls)) = (&*leg, &mut found.tls) {
                    // Whoever takes longer than this for a message that has begun is passed on as it is.
                    let unbound = answer::without_binding(tls, &mut found.said);
                    let _ = tokio::time::timeout(port.connect_timeout, unbound).await;
                }
                return Ok(Met::Session(found, counted));
            }
        }
    }
}

/// Answers a request for encryption where the router speaks TLS itself.
async fn encrypt(
    crypto: &Crypto,
    client: &Arc<TcpStream>,
    leg: &mut Leg,
    request: Request,
    turn: &mut Turn,
) -> Result<(), No> {
    let direct = request.packet == Packet::DirectTls;
    if matches!(leg, Leg::Tls(_)) {
        return Err(Malformed::Repeated.into());
    }
    if !direct && (leg.is_ahead() || socket::has_data(client)) {
        return Err(No::Refused(Refusal::EarlyData));
    }
    let agreed = crypto.accepts() && request.packet != Packet::GssEncRequest;
    if !direct {
        let answer = if agreed { b"S" } else { b"N" };
        socket::write_all(client, answer).await.map_err(|_| No::ClientGone)?;
    }
    if agreed {
        let before = if direct { request.bytes } else { Vec::new() };
        match turn.take(crypto.accept(client, before, direct)).await {
            Some(Ok(tls)) => *leg = Leg::Tls(tls),
            Some(Err(error)) => {
                debug!(%error, "no TLS with a client");
                return Err(No::Handshake);
            }
            None => return Err(No::Handshake),
        }
    }
    if direct && !agreed { Err(No::Handshake) } else { Ok(()) }
}

/// Who the client really is, and what servers are to be told of it first.
async fn introduction(port: &Port, client: &TcpStream, peer: Peer, turn: &mut Turn) -> Result<(Peer, Vec<u8>), No> {
    let header = match port.proxied.contains(peer.ip()) {
        true => proxy_header(client, turn).await?,
        false => Header::default(),
    };
    let peer = header.addresses.map_or(peer, |(from, _)| Peer::Tcp(from));
    let greeting = port.send_proxy.map(|version| {
        let addresses = header.addresses.or_else(|| match peer {
            Peer::Tcp(from) => client.local_addr().ok().map(|to| (from, to)),
            Peer::Unix => None,
        });
        proxy::write(version, addresses)
    });
    Ok((peer, greeting.unwrap_or_default()))
}

/// Reads a PROXY header and not one byte more.
async fn proxy_header(client: &TcpStream, turn: &mut Turn) -> Result<Header, No> {
    let read = async {
        let mut bytes = Vec::new();
        loop {
            match proxy::read(&bytes).map_err(|_| No::Refused(Refusal::NoProxyHeader))? {
                proxy::Progress::Header(header) => return Ok(header),
                proxy::Progress::Need(more) => {
                    let have = bytes.len();
                    bytes.resize(have + more, 0);
                    socket::read_exact(client, &mut bytes[have..]).await.map_err(|_| No::ClientGone)?;
                }
            }
        }
    };
    turn.take(read).await.unwrap_or(Err(No::Refused(Refusal::TooSlow)))
}

/// The target that a start-up packet asks for, where the port lets clients choose.
fn chosen(port: &Port, request: &Request) -> Result<Option<Target>, No> {
    if !port.choice || !matches!(request.packet, Packet::Startup { .. }) {
        return Ok(None);
    }
    let Some(word) = startup::setting(&request.bytes, TARGET) else { return Ok(None) };
    let target = Target::parse(&word).ok_or(No::Refused(Refusal::UnknownTarget))?;
    Ok(Some(target).filter(|target| *target != port.target))
}

/// Reads one packet. What comes behind it stays with the connection.
async fn first_packet(client: &mut Leg, turn: &mut Turn) -> Result<Request, No> {
    let read = async {
        let mut bytes = Vec::new();
        loop {
            match startup::read(&bytes)? {
                Progress::Packet(packet) => {
                    client.put_back(bytes.split_off(startup::length(&bytes)));
                    bytes.shrink_to_fit();
                    return Ok(Request { packet, bytes });
                }
                Progress::Need(more) => client.read_on(&mut bytes, more).await.map_err(|_| No::ClientGone)?,
            }
        }
    };
    turn.take(read).await.unwrap_or(Err(No::Refused(Refusal::TooSlow)))
}

/// Says why. Who has asked for encryption and waits for the answer is told "no" first, and refused at the start-up packet:
/// an ErrorResponse in place of that answer is something that clients must not show (CVE-2024-10977), and most of them
/// would just connect again, and wait again.
async fn refuse(client: &mut Leg, refusal: Refusal, denials: usize, turn: &mut Turn) {
    let mut left = denials;
    while left > 0 {
        if client.write_all(b"N").await.is_err() {
            return;
        }
        left = match first_packet(client, turn).await {
            Ok(next) if next.packet.awaits_answer() => left - 1,
            Ok(_) => 0,
            Err(_) => return,
        };
    }
    say_farewell(client, refusal).await;
}

/// The last word to a client, which is given the time to hear it.
async fn say_farewell(client: &mut Leg, refusal: Refusal) {
    let farewell = async {
        client.write_all(&refusal.packet()).await?;
        client.shutdown().await?;
        let mut scratch = [0; 512];
        let mut read = 0;
        while read < FAREWELL_BYTES {
            match client.read(&mut scratch).await? {
                0 => break,
                bytes => read += bytes,
            }
        }
        std::io::Result::Ok(())
    };
    // Whether the client hears it is up to the client.
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Relayed(relay::End),
    Cut(Cut),
    Refused(Refusal),
    ClientGone,
    Handshake,
    /// Between two transactions, as its server or the router is about to stop.
    Told(Refusal),
    /// The next process has it.
    Left,
    /// That has not taken it.
    Stays,
    /// It goes on elsewhere in this process.
    Settled,
    Cancel(&'static str),
}

impl Ended {
    fn label(self) -> &'static str {
        match self {
            Ended::Relayed(relay::End::Client) => "client",
            Ended::Relayed(relay::End::Server) => "server",
            Ended::Relayed(relay::End::ClientLost) => "client_lost",
            Ended::Relayed(relay::End::ServerLost) => "server_lost",
            Ended::Cut(Cut::LeaderChanged) => "leader_changed",
            Ended::Cut(Cut::Drained) => "drained",
            Ended::Cut(Cut::Lag) => "lag",
            Ended::Cut(Cut::Down) => "down",
            Ended::Cut(Cut::Overdue) => "switchover_overdue",
            Ended::Told(refusal) | Ended::Refused(refusal) => refusal.label(),
            Ended::ClientGone => "client_gone",
            Ended::Handshake => "no_tls",
            Ended::Left => "handed_over",
            // Never told.
            Ended::Stays => "stays",
            Ended::Settled => "settled",
            Ended::Cancel(_) => "cancel",
        }
    }
}
