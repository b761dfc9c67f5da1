//! The way for sessions with TLS on one side or on both: everything passes through user space. The rules are those of the
//! plain way: back-pressure, half-close, last words.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::course::{self, Course, Side};
use super::{End, Outcome, Parties, STEPS, Start, Stop, Watch, pause, yield_to_others};
use crate::boundary::Trace;
use crate::key::{KeyWatch, Seen};
use crate::wire::Leg;

/// What one read may take: a record of TLS.
const BUFFER: usize = 16 << 10;

thread_local! {
    /// Shared by all sessions of the thread.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Relays until both directions have ended, and says which side ended first. `said`: read of the server already. Such a
/// session never leaves: what is known of its encryption is known here only.
pub async fn relay_tls(client: &mut Leg, mut server: Leg, said: Vec<u8>, start: Start, parties: &Parties) -> Outcome {
    let Parties { session, meter, .. } = parties;
    if start.unread {
        client.look_again();
    }
    let followed = start.resignation.is_some();
    let up = Half { trace: followed.then(Trace::of_client), ..Half::default() };
    let watch = Some(Watch { key: KeyWatch::default(), session });
    let mut down = Half { watch, trace: followed.then(Trace::of_server), ..Half::default() };
    meter.down(said.len() as u64);
    session.moved(0, said.len() as u64);
    down.look(&said);
    down.rest = said;
    let mut relay = Relay { up, down, course: Course::new(start.resignation) };
    poll_fn(|cx| {
        let call = session.called(cx.waker());
        if course::resigns(call, relay.up.side(), relay.down.side()) {
            return Poll::Ready(Outcome::Resigned { idle: true });
        }
        if let Poll::Ready(end) = relay.poll(cx, client, &mut server, parties) {
            return Poll::Ready(Outcome::Ended(end));
        }
        // This step may have ended a transaction.
        let (up, down) = (relay.up.side(), relay.down.side());
        if course::resigns(call, up, down) {
            return Poll::Ready(Outcome::Resigned { idle: true });
        }
        relay.course.poll(cx, call, up, down)
    })
    .await
}

struct Relay<'a> {
    up: Half<'a>,
    down: Half<'a>,
    course: Course,
}

impl Relay<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, client: &mut Leg, server: &mut Leg, parties: &Parties) -> Poll<End> {
        for _ in 0..STEPS {
            // Both are polled even if the first can go on: each must be registered for its own wake-up.
            let up = self.up.poll_step(cx, client, server);
            let down = self.down.poll_step(cx, server, client);
            if let Poll::Ready(bytes @ 1..) = up {
                parties.meter.up(bytes as u64);
                parties.session.moved(bytes as u64, 0);
                self.course.heard_client(self.down.over());
            }
            if let Poll::Ready(bytes @ 1..) = down {
                parties.meter.down(bytes as u64);
                parties.session.moved(0, bytes as u64);
            }
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
}

/// One direction.
#[derive(Default)]
struct Half<'a> {
    watch: Option<Watch<'a>>,
    /// What has passed, as long as it can be PostgreSQL's.
    trace: Option<Trace>,
    /// Read and not yet written.
    rest: Vec<u8>,
    /// Written, but perhaps not out of the encryption yet.
    unflushed: bool,
    stop: Option<Stop>,
    /// The end has been passed on, as far as there is anybody to pass it to.
    closed: bool,
    /// The source ended after the destination had broken.
    drained: bool,
}

impl Half<'_> {
    fn over(&self) -> bool {
        self.closed || self.drained
    }

    fn side(&self) -> Side<'_> {
        let written = self.rest.is_empty() && !self.unflushed;
        Side { stop: self.stop, ended: self.over(), written, trace: self.trace.as_ref() }
    }

    fn look(&mut self, bytes: &[u8]) {
        if self.trace.as_mut().is_some_and(|trace| !trace.look(bytes)) {
            self.trace = None;
        }
        let Some(watch) = &mut self.watch else { return };
        match watch.key.look(bytes) {
            Seen::More => return,
            Seen::Key(key) => watch.session.learn(key),
            Seen::Nothing => {}
        }
        self.watch = None;
    }

    /// One read and what can be written of it. Ready: bytes read, and there may be more to do at once.
    fn poll_step(&mut self, cx: &mut Context<'_>, from: &mut Leg, to: &mut Leg) -> Poll<usize> {
        match self.stop {
            _ if self.over() => Poll::Pending,
            None => match ready!(self.poll_move(cx, from, to)) {
                Ok(0) => self.stop_by(Stop::Eof),
                Ok(bytes) => Poll::Ready(bytes),
                Err(stop) => self.stop_by(stop),
            },
            Some(Stop::Write) => {
                self.drained = matches!(ready!(poll_read(cx, from, |_| ())), Ok(0) | Err(_));
                Poll::Ready(0)
            }
            Some(Stop::Eof | Stop::Read) => {
                // An error means that the destination is gone, which the other half finds out by itself.
                let _ = ready!(Pin::new(to).poll_shutdown(cx));
                self.closed = true;
                Poll::Ready(0)
            }
        }
    }

    fn stop_by(&mut self, stop: Stop) -> Poll<usize> {
        (self.stop, self.rest) = (Some(stop), Vec::new());
        Poll::Ready(0)
    }

    fn poll_move(&mut self, cx: &mut Context<'_>, from: &mut Leg, to: &mut Leg) -> Poll<Result<usize, Stop>> {
        ready!(self.poll_rest(cx, to))?;
        let mut rest = std::mem::take(&mut self.rest);
        let read = poll_read(cx, from, |bytes| {
            self.look(bytes);
            rest.extend_from_slice(bytes);
        });
        self.rest = rest;
        let bytes = ready!(read).map_err(|_| Stop::Read)?;
        pause::busy();
        // What can't be written now is written by the next step.
        match self.poll_rest(cx, to) {
            Poll::Ready(Err(stop)) => Poll::Ready(Err(stop)),
            _ => Poll::Ready(Ok(bytes)),
        }
    }

    /// Writes what has been read; its memory is given back.
    fn poll_rest(&mut self, cx: &mut Context<'_>, to: &mut Leg) -> Poll<Result<(), Stop>> {
        while !self.rest.is_empty() {
            match ready!(Pin::new(&mut *to).poll_write(cx, &self.rest)) {
                Ok(0) | Err(_) => return Poll::Ready(Err(Stop::Write)),
                Ok(bytes) => drop(self.rest.drain(..bytes)),
            }
            self.unflushed = true;
        }
        self.rest = Vec::new();
        if self.unflushed {
            ready!(Pin::new(to).poll_flush(cx)).map_err(|_| Stop::Write)?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// One read; `take` gets what there is. Ready: bytes, 0 at the end.
fn poll_read(cx: &mut Context<'_>, from: &mut Leg, take: impl FnOnce(&[u8])) -> Poll<io::Result<usize>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(from).poll_read(cx, &mut buffer))?;
        take(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    })
}
