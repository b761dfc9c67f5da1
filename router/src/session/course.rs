//! A session that a server has taken: relayed, handed on and back, to the line that says why it ended.

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

use crate::accept::{self, Permit};
use crate::handover::{Adopted, Leaving};
use crate::port::Counted;
use crate::reply::Refusal;
use crate::router::Router;
use crate::sessions::{Cut, Line, Session};
use crate::wire::{Leg, Wire};
use crate::{relay, socket};

/// How long a refused client may take to hear why.
const FAREWELL: Duration = Duration::from_secs(2);

/// Bytes of a refused client that are read and thrown away, so that closing does not reset what it was told.
const FAREWELL_BYTES: usize = 64 << 10;

/// One line of a session or a connection: for everybody where the port says so, else for debugging.
macro_rules! tell {
    ($info:expr, $($told:tt)*) => {
        if $info { info!($($told)*) } else { debug!($($told)*) }
    };
}
pub(super) use tell;

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
pub(super) struct Begun {
    pub(super) parties: relay::Parties,
    pub(super) start: Option<Box<relay::Start>>,
    /// Where TLS ends or begins here.
    pub(super) tls: Option<Box<Encrypted>>,
    /// The right to be there, until it leaves.
    pub(super) permit: Option<Permit>,
    pub(super) _counted: Option<Box<Counted>>,
}

/// A session's connections, of which at least one is encrypted.
pub(super) struct Encrypted {
    pub(super) client: Leg,
    pub(super) server: Leg,
    /// Read of the server already.
    pub(super) said: Vec<u8>,
}

impl Begun {
    pub(super) fn tell_begin(&self, router: &Router, what: &str) {
        let told = line(router, &self.parties.session).filter(|(_, info)| *info || enabled!(Level::DEBUG));
        let Some((line, info)) = told else { return };
        if info {
            self.parties.session.note_told();
        }
        let (port, member, server) = (&*line.port, line.backend.member.as_str(), line.backend.address());
        tell!(info, port, client = %line.client, member, server, seen_as = line.from.map(display), "{what}");
    }

    /// To the end of the session, or until it leaves.
    pub(super) async fn relay(&mut self, router: &Router) -> Ended {
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
    pub(super) fn over(self, router: &Arc<Router>, ended: Ended) {
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

/// How long a session may go on once its server has said that it is about to stop.
pub(super) fn resignation(router: &Router) -> Option<Duration> {
    Some(router.limits().switchover_budget).filter(|budget| !budget.is_zero())
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

/// The last word to a client, which is given the time to hear it.
pub(super) async fn say_farewell(client: &mut Leg, refusal: Refusal) {
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
pub(super) enum Ended {
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
    pub(super) fn label(self) -> &'static str {
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
