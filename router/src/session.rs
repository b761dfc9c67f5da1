//! One client: read the first packet → find a server, or wait for one ([`search`](crate::search)) → relay → say
//! why it ended.
//!
//! TLS is passed through: where the server agrees to it, everything behind the request is opaque. Where it does not, the
//! client's next packet is read as its first one was, and is a first packet again. Only where the port says so does TLS
//! end, or begin, at the router ([`crypto`](crate::crypto)); then the server never hears of the client's requests for it.

mod course;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tracing::{debug, info};
use trunkline_config::router::{Port, Target};

pub use self::course::resume;
use self::course::{Begun, Encrypted, Ended, resignation, say_farewell, tell};
use crate::accept::Permit;
use crate::crypto::Crypto;
use crate::port::{Counted, Listening, Peer};
use crate::proxy::{self, Header};
use crate::reply::Refusal;
use crate::router::Router;
use crate::search::{Found, Outcome, Request, Search};
use crate::startup::{self, Malformed, Packet, Progress};
use crate::wire::{Leg, Wire};
use crate::{answer, cancel, relay, socket};

/// How long a client that is one too many may take for its own part of the beginning: it is heard, as it may have come to
/// cancel something.
const EXCESS: Duration = Duration::from_secs(2);

/// Kinds of encryption that a client may ask for, one after the other.
const DENIALS: usize = 2;

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
