//! The way for sessions with TLS on one side or on both: everything passes through user space. The rules are those of the
//! plain way: back-pressure, half-close, last words.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{End, LINGER, STEPS, Stop, Watch, pause, yield_to_others};
use crate::key::{KeyWatch, Seen};
use crate::metrics::Meter;
use crate::sessions::Session;
use crate::wire::Leg;

/// What one read may take: a record of TLS.
const BUFFER: usize = 16 << 10;

thread_local! {
    /// Shared by all sessions of the thread.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// Relays until both directions have ended, and says which side ended first. `said`: read of the server already.
pub async fn relay_tls(client: &mut Leg, mut server: Leg, said: Vec<u8>, session: &Session, meter: &Meter) -> End {
    let mut down = Half::new(Some(Watch { key: KeyWatch::default(), session }));
    meter.down(said.len() as u64);
    down.look(&said);
    down.rest = said;
    let mut relay = Relay { up: Half::new(None), down, linger: None, end: None };
    poll_fn(|cx| relay.poll(cx, client, &mut server, meter)).await
}

struct Relay<'a> {
    up: Half<'a>,
    down: Half<'a>,
    linger: Option<Pin<Box<tokio::time::Sleep>>>,
    end: Option<End>,
}

impl Relay<'_> {
    fn poll(&mut self, cx: &mut Context<'_>, client: &mut Leg, server: &mut Leg, meter: &Meter) -> Poll<End> {
        for _ in 0..STEPS {
            // Both are polled even if the first can go on: each must be registered for its own wake-up.
            let up = self.up.poll_step(cx, client, server);
            let down = self.down.poll_step(cx, server, client);
            if let Poll::Ready(bytes @ 1..) = up {
                meter.up(bytes as u64);
                self.linger = None;
            }
            if let Poll::Ready(bytes) = down {
                meter.down(bytes as u64);
            }
            self.end = self.end.or(match (self.up.stop, self.down.stop) {
                (Some(Stop::Read), _) => Some(End::ClientLost),
                (_, Some(Stop::Read)) => Some(End::ServerLost),
                (Some(Stop::Eof), _) => Some(End::Client),
                (_, Some(Stop::Eof)) => Some(End::Server),
                (Some(Stop::Write), _) => Some(End::ServerLost),
                (_, Some(Stop::Write)) => Some(End::ClientLost),
                (None, None) => None,
            });
            let deaf = self.up.stop == Some(Stop::Read) || self.down.stop == Some(Stop::Write);
            if self.up.over() && (self.down.over() || deaf) {
                return Poll::Ready(self.end.unwrap_or(End::Server));
            }
            if up.is_pending() && down.is_pending() {
                return self.poll_linger(cx);
            }
        }
        yield_to_others(cx);
        Poll::Pending
    }

    /// Once the server has closed, the client's silence is limited.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if !self.down.over() {
            return Poll::Pending;
        }
        let linger = self.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        linger.as_mut().poll(cx).map(|()| self.end.unwrap_or(End::Server))
    }
}

/// One direction.
struct Half<'a> {
    watch: Option<Watch<'a>>,
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

impl<'a> Half<'a> {
    fn new(watch: Option<Watch<'a>>) -> Self {
        Self { watch, rest: Vec::new(), unflushed: false, stop: None, closed: false, drained: false }
    }

    fn over(&self) -> bool {
        self.closed || self.drained
    }

    fn look(&mut self, bytes: &[u8]) {
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
