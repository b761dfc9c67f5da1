//! Moves bytes between a client and a server until both directions have ended.
//!
//! Two independent halves, each "read → write → pass the end on, once". A half copies through a buffer that all sessions
//! of the thread share, which is best for the small messages of which most sessions consist; once it streams, it moves
//! pages by splice(2) through a pipe borrowed from a pool ([`splice`]). Both are correct by themselves, so a pool
//! that is empty costs nothing but speed.
//!
//! Sessions with TLS that ends or begins here have a way of their own ([`relay_tls`]).
//!
//! What is copied of a session, or decrypted, is also followed message by message ([`boundary`]), so that the session can be
//! ended in between when its server is about to stop.
//!
//! What must never be lost:
//! * *Backpressure*: a half holds at most one buffer or one pipe of unwritten bytes and reads nothing more until they are
//!   written.
//! * *Half-close*: the end of one direction is passed on behind its last byte; the other direction goes on.
//! * *Last words*: PostgreSQL may say why it ends a session and close while the client is still sending. A failed write
//!   therefore ends only its own half; what the failing side had sent before is delivered first, and what its peer
//!   still sends is read and thrown away: closing a socket with unread bytes would reset it and destroy the last words.

mod copy;
mod course;
mod lean;
pub mod pause;
mod splice;
mod tls;

use std::future::poll_fn;
use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;

pub use lean::{Back, Direction, Guest, Lean, Why};
pub use splice::Pool;
pub use tls::relay_tls;

use crate::boundary::Trace;
use crate::key::{KeyWatch, Seen};
use crate::metrics::Meter;
use crate::sessions::{Call, Session};
use course::{Course, Side};

/// Steps a session may take before others of its thread get their turn.
const STEPS: usize = 8;

/// Who ended the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client closed.
    Client,
    /// The server closed.
    Server,
    /// The client's connection broke.
    ClientLost,
    /// The server's connection broke.
    ServerLost,
}

/// A session's two ends, and what it is known by.
#[derive(Debug)]
pub struct Parties {
    /// The connection to the client.
    pub client: Arc<TcpStream>,
    /// The connection to the server.
    pub server: Arc<TcpStream>,
    /// The registration.
    pub session: Session,
    /// Where its bytes are counted.
    pub meter: Meter,
}

/// What a relay begins with.
#[derive(Debug, Default)]
pub struct Start {
    /// The client has sent something that tokio has reported already and will not report again.
    pub unread: bool,
    /// Read already of the client and of the server, and looked at by nobody.
    pub ahead: (Vec<u8>, Vec<u8>),
    /// The server is about to start a session in plain text.
    pub plain: bool,
    /// How long the session may go on once its server has said that it is about to stop, where its messages can be followed;
    /// `None`: until the server ends it.
    pub resignation: Option<Duration>,
    /// What it brings along from another process.
    pub carried: Carried,
    /// After so many messages of its client that were each the answer to one of its server, or when it is asked to, it is
    /// [settled](Outcome::Settled).
    pub settles: Option<NonZeroU32>,
    /// Why it came back from [where it was settled](Lean).
    pub why: Option<Why>,
}

/// What a session takes along from one process to the next.
#[derive(Debug, Default)]
pub struct Carried {
    /// Read and not written yet, to the server.
    pub up: Vec<u8>,
    /// The same to the client.
    pub down: Vec<u8>,
    /// What has passed, of the client and of the server, as long as all of it was seen.
    pub traces: Option<(Trace, Trace)>,
    /// What is left of the time that it may go on, if its server is about to stop.
    pub budget: Option<Duration>,
}

/// How a relay ended.
#[derive(Debug)]
pub enum Outcome {
    /// With the session.
    Ended(End),
    /// The server is about to stop, and the client may be told so: it waits for no answer, or for one that has not begun.
    Resigned {
        /// Nothing of what the client has asked for is lost.
        idle: bool,
    },
    /// The server is about to stop, and the session could not be brought to an end in time.
    Overdue,
    /// The session goes on in another process, with these bytes first.
    Left(Box<Carried>),
    /// It just talks: it may go on where that is cheaper. No bytes are left behind.
    Settled(Box<Carried>),
}

/// Relays until both directions have ended, and says which side ended first; or until the session leaves.
pub fn relay<'a>(parties: &'a Parties, start: Start, pool: &'a Pool) -> impl Future<Output = Outcome> + Send + 'a {
    let watch = start.plain.then(|| Box::new(Watch { key: KeyWatch::default(), session: &parties.session }));
    let Carried { up, down, traces, budget } = start.carried;
    let half = |direction| Half {
        way: if start.why == Some(Why::Streams(direction)) { splice::Way::streaming() } else { splice::Way::default() },
        broken: start.why == Some(Why::Broken(direction)),
        ..Half::default()
    };
    let begun = || start.plain.then(|| (Trace::of_client(), Trace::of_server()));
    let (of_client, of_server) = traces.or_else(begun).filter(|_| start.resignation.is_some()).unzip();
    let mut relay = Relay {
        up: Half { unread: start.unread, rest: up, trace: of_client, ..half(Direction::Up) },
        down: Half { watch, rest: down, trace: of_server, ..half(Direction::Down) },
        course: Course::new(budget.or(start.resignation)),
        settling: start.settles.map(|turns| Settling { turns: turns.get(), server_spoke: false }),
    };
    relay.begin(&start.ahead, parties);
    poll_fn(move |cx| {
        let call = parties.session.called(cx.waker());
        if let Some(outcome) = relay.follow(call) {
            return Poll::Ready(outcome);
        }
        match relay.poll(cx, parties, pool) {
            Poll::Ready(end) => Poll::Ready(Outcome::Ended(end)),
            // This step may have ended its start, or a transaction.
            Poll::Pending => match relay.follow(call) {
                Some(outcome) => Poll::Ready(outcome),
                None if relay.is_settled(call) => Poll::Ready(Outcome::Settled(Box::new(relay.carried()))),
                None => relay.course.poll(cx, call, relay.up.side(), relay.down.side()),
            },
        }
    })
}

struct Relay<'a> {
    up: Half<'a>,
    down: Half<'a>,
    course: Course,
    settling: Option<Settling>,
}

impl Relay<'_> {
    /// What has been read already goes first.
    fn begin(&mut self, ahead: &(Vec<u8>, Vec<u8>), parties: &Parties) {
        let Parties { client, server, .. } = parties;
        let up = self.up.begin(&ahead.0, Sockets { from: client, to: server });
        let down = self.down.begin(&ahead.1, Sockets { from: server, to: client });
        self.account(&Poll::Ready(up), &Poll::Ready(down), parties);
    }

    /// Does as it was told from outside, if that can be done now.
    fn follow(&mut self, call: Call) -> Option<Outcome> {
        if call.leave && self.can_leave() {
            return Some(Outcome::Left(Box::new(self.carried())));
        }
        course::resigns(call, self.up.side(), self.down.side()).then_some(Outcome::Resigned { idle: true })
    }

    fn carried(&mut self) -> Carried {
        Carried {
            up: self.up.take_rest(),
            down: self.down.take_rest(),
            traces: self.up.trace.take().zip(self.down.trace.take()),
            budget: self.course.left(),
        }
    }

    /// Whether nothing has ended, and the start is over.
    fn can_leave(&self) -> bool {
        course::is_open(self.up.side(), self.down.side()) && self.down.watch.is_none()
    }

    /// Whether it shall go on elsewhere, and nothing of it is here.
    fn is_settled(&self, call: Call) -> bool {
        let settled = self.settling.as_ref().is_some_and(|settling| settling.turns == 0 || call.settle);
        let is_free = self.can_leave() && self.up.is_empty() && self.down.is_empty();
        settled && is_free && !call.leave && !call.resign
    }

    fn poll(&mut self, cx: &mut Context<'_>, parties: &Parties, pool: &Pool) -> Poll<End> {
        let Parties { client, server, .. } = parties;
        for _ in 0..STEPS {
            // Both are polled even if the first can go on: each must be registered for its own wake-up.
            let up = self.up.poll_step(cx, Sockets { from: client, to: server }, pool, self.down.ended());
            let down = self.down.poll_step(cx, Sockets { from: server, to: client }, pool, self.up.ended());
            self.account(&up, &down, parties);
            if let Some(end) = self.course.finished(self.up.side(), self.down.side()) {
                return Poll::Ready(end);
            }
            if up.is_pending() && down.is_pending() {
                return Poll::Pending;
            }
        }
        yield_to_others(cx);
        Poll::Pending
    }

    fn account(&mut self, up: &Poll<usize>, down: &Poll<usize>, parties: &Parties) {
        let moved = |step: &Poll<usize>| if let Poll::Ready(bytes) = step { *bytes as u64 } else { 0 };
        let (up, down) = (moved(up), moved(down));
        if up > 0 {
            parties.meter.up(up);
            self.down.way.answered();
            self.course.heard_client(self.down.ended());
        }
        if down > 0 {
            parties.meter.down(down);
            self.up.way.answered();
        }
        parties.session.moved(up, down);
        if let Some(settling) = &mut self.settling {
            settling.moved(up > 0, down > 0);
        }
    }
}

/// How far a session is from being settled.
struct Settling {
    /// Messages of its client that still have to come, each after one of its server.
    turns: u32,
    server_spoke: bool,
}

impl Settling {
    fn moved(&mut self, up: bool, down: bool) {
        if up && self.server_spoke {
            self.turns = self.turns.saturating_sub(1);
        }
        self.server_spoke = down || (self.server_spoke && !up);
    }
}

/// Why a half stopped moving bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// The source ended, which has been passed on.
    Eof,
    /// The source broke.
    Read,
    /// The destination broke: what the source still sends is thrown away.
    Write,
}

/// Looks for a session's key.
struct Watch<'a> {
    key: KeyWatch,
    session: &'a Session,
}

/// Where a direction comes from, and where it leads to.
#[derive(Clone, Copy)]
struct Sockets<'s> {
    from: &'s TcpStream,
    to: &'s TcpStream,
}

/// One direction.
#[derive(Default)]
struct Half<'a> {
    way: splice::Way,
    /// There is something to read, whatever tokio says.
    unread: bool,
    /// Until the session's key has passed, or can't any more.
    watch: Option<Box<Watch<'a>>>,
    /// What has passed, as long as all of it was seen.
    trace: Option<Trace>,
    /// Read and not yet written.
    rest: Vec<u8>,
    stop: Option<Stop>,
    /// The source ended after the destination had broken.
    drained: bool,
    /// Its source is known to be broken, behind what can still be read.
    broken: bool,
}

impl Half<'_> {
    fn side(&self) -> Side<'_> {
        let written = self.rest.is_empty();
        Side { stop: self.stop, ended: self.ended(), written, trace: self.trace.as_ref() }
    }

    /// What has been read and not been written.
    fn take_rest(&mut self) -> Vec<u8> {
        [std::mem::take(&mut self.rest), std::mem::take(&mut self.way).into_rest()].concat()
    }

    /// Everything that was read has been written, by copying.
    fn is_empty(&self) -> bool {
        self.rest.is_empty() && self.way.is_empty()
    }

    /// Nothing will be read from the source any more.
    fn ended(&self) -> bool {
        matches!(self.stop, Some(Stop::Eof | Stop::Read)) || self.drained
    }

    /// Some bytes have been copied. While they are looked at, they are not spliced.
    fn copied(&mut self, bytes: &[u8]) {
        if self.trace.as_mut().is_some_and(|trace| !trace.look(bytes)) {
            self.trace = None;
        }
        let Some(watch) = &mut self.watch else { return self.way.copied(bytes.len()) };
        match watch.key.look(bytes) {
            Seen::More => return,
            Seen::Key(key) => watch.session.learn(key),
            Seen::Nothing => {}
        }
        self.watch = None;
    }

    /// What has been read already, if anything, goes first.
    fn begin(&mut self, ahead: &[u8], sockets: Sockets<'_>) -> usize {
        if ahead.is_empty() {
            return 0;
        }
        let passed = self.pass_on(ahead, sockets, false);
        passed.unwrap_or_else(|stop| {
            self.stop = Some(stop);
            0
        })
    }

    /// One read and what can be written of it. Ready: bytes read, and there may be more at once. `last`: the other half has
    /// ended.
    fn poll_step(&mut self, cx: &mut Context<'_>, sockets: Sockets<'_>, pool: &Pool, last: bool) -> Poll<usize> {
        if self.ended() {
            return Poll::Pending;
        }
        if self.stop == Some(Stop::Write) {
            return self.poll_discard(cx, sockets.from);
        }
        let step = match self.way.streams() {
            true => {
                self.trace = None;
                self.poll_splice(cx, sockets, pool)
            }
            false => self.poll_copy(cx, sockets),
        };
        match step {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(0)) => {
                let stop = if self.broken { Stop::Read } else { Stop::Eof };
                self.finish(sockets.to, stop, last);
                Poll::Ready(0)
            }
            Poll::Ready(Ok(bytes)) => Poll::Ready(bytes),
            Poll::Ready(Err(stop)) => {
                self.finish(sockets.to, stop, last);
                Poll::Ready(0)
            }
        }
    }

    /// The last step. Also after a broken read the destination hears an orderly end behind its last byte: by closing, which
    /// follows, if this is the `last` half.
    fn finish(&mut self, to: &TcpStream, stop: Stop, last: bool) {
        self.stop = Some(stop);
        self.rest = Vec::new();
        self.way = splice::Way::default();
        if stop != Stop::Write && !last {
            // An error means that the destination is gone, which the other half finds out by itself.
            let _ = rustix::net::shutdown(to, rustix::net::Shutdown::Write);
        }
    }
}

/// Wakes this task once the thread has looked for events: to wake it at once would let it go on before them.
fn yield_to_others(cx: &mut Context<'_>) {
    // Pending at its first poll, after which it is not needed any more.
    let _ = std::pin::pin!(tokio::task::yield_now()).poll(cx);
}

/// Runs `operation` when `stream` is ready for it, and waits if it isn't.
fn poll_io(
    cx: &mut Context<'_>,
    stream: &TcpStream,
    interest: Interest,
    mut operation: impl FnMut() -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        let ready = match interest.is_readable() {
            true => stream.poll_read_ready(cx),
            false => stream.poll_write_ready(cx),
        };
        match ready {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) => {}
        }
        match stream.try_io(interest, &mut operation) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return Poll::Ready(outcome),
        }
    }
}
