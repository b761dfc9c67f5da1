//! The streaming way: socket → pipe → socket by splice(2), without the bytes ever coming to user space.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use rustix::pipe::{PipeFlags, SpliceFlags};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::copy::BUFFER;
use super::{Half, Sockets, Stop, pause, poll_io};

/// A half streams after this many reads in a row that filled half of the buffer, or once it has moved so many bytes since
/// the other one moved any (a sender that is slower than the router fills no buffer) …
const LARGE_READS: u8 = 4;
const UNANSWERED: u32 = 1 << 20;
/// … until this many moves in a row were smaller than [`SMALL`].
const SMALL_MOVES: u8 = 4;
const SMALL: usize = 4 << 10;

/// What one move may take: the size of a pipe.
const MOVE: usize = 64 << 10;

/// Pipes for all threads. Linux gives an unprivileged user 1 024 of 64 KiB (`pipe-user-pages-soft`); the pool stays far
/// below, and whoever gets none goes on copying.
#[derive(Debug)]
pub struct Pool {
    free: Mutex<Vec<Pipe>>,
    made: Arc<AtomicUsize>,
    limit: usize,
}

impl Pool {
    /// At most `limit` pipes.
    pub fn new(limit: usize) -> Self {
        Self { free: Mutex::new(Vec::new()), made: Arc::default(), limit }
    }

    fn take(&self) -> Option<Pipe> {
        if let Some(pipe) = self.free.lock().pop() {
            return Some(pipe);
        }
        let room = |made| (made < self.limit).then_some(made + 1);
        self.made.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).ok()?;
        let counted = Counted(self.made.clone());
        match rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK) {
            Ok((read, write)) => Some(Pipe { read, write, _counted: counted }),
            Err(error) => {
                tracing::debug!(%error, "no pipe");
                None
            }
        }
    }

    fn give_back(&self, pipe: Pipe) {
        self.free.lock().push(pipe);
    }
}

/// An empty pipe, in the pool or lent. One that still has bytes in it is never given back, but dropped.
#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    _counted: Counted,
}

#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How a half moves its bytes, and the pipe it does it with.
#[derive(Debug, Default)]
pub(super) struct Way {
    streams: bool,
    /// Reads or moves in a row that speak for the other way.
    streak: u8,
    /// Bytes copied since the other half moved any.
    unanswered: u32,
    /// Splicing was refused once: this kind of socket can't.
    refused: bool,
    pipe: Option<Pipe>,
    /// Bytes in the pipe.
    filled: usize,
}

impl Way {
    /// What is in the pipe.
    pub(super) fn into_rest(self) -> Vec<u8> {
        let mut rest = vec![0; self.filled];
        let mut have = 0;
        while let Some(pipe) = self.pipe.as_ref().filter(|_| have < rest.len()) {
            match rustix::io::read(&pipe.read, &mut rest[have..]) {
                Ok(bytes @ 1..) => have += bytes,
                // Not possible: so much has been put in.
                Ok(0) | Err(_) => break,
            }
        }
        rest
    }

    /// One that begins with splicing.
    pub(super) fn streaming() -> Self {
        Self { streams: true, ..Self::default() }
    }

    /// Whether it copies and has nothing in a pipe.
    pub(super) fn is_empty(&self) -> bool {
        !self.streams && self.pipe.is_none()
    }

    /// Whether the next step should splice.
    pub(super) fn streams(&self) -> bool {
        self.streams
    }

    /// A read of this size has been copied.
    pub(super) fn copied(&mut self, bytes: usize) {
        self.unanswered = self.unanswered.saturating_add(bytes as u32);
        let large = bytes >= BUFFER / 2 && !self.refused;
        let needed = if self.unanswered >= UNANSWERED { 1 } else { LARGE_READS };
        self.vote(large || (self.unanswered >= UNANSWERED && !self.refused), needed);
    }

    /// The other half has moved something.
    pub(super) fn answered(&mut self) {
        self.unanswered = 0;
    }

    fn moved(&mut self, bytes: usize) {
        self.vote(bytes < SMALL, SMALL_MOVES);
    }

    fn vote(&mut self, change: bool, needed: u8) {
        self.streak = if change { self.streak + 1 } else { 0 };
        if self.streak >= needed {
            self.streams = !self.streams;
            self.streak = 0;
        }
    }
}

impl Half<'_> {
    /// Ready: bytes read, 0 at the end of the source.
    pub(super) fn poll_splice(
        &mut self,
        cx: &mut Context<'_>,
        sockets: Sockets<'_>,
        pool: &Pool,
    ) -> Poll<Result<usize, Stop>> {
        let Sockets { from, to } = sockets;
        ready!(self.poll_rest(cx, to))?;
        ready!(self.poll_drain(cx, to, pool))?;
        let Some(pipe) = self.way.pipe.take().or_else(|| pool.take()) else {
            return self.poll_copy(cx, sockets);
        };
        // Into an empty pipe only: EAGAIN then says that the source has nothing, never that the pipe is full.
        let fill = || splice(from, &pipe.write, MOVE);
        match poll_io(cx, from, Interest::READABLE, fill) {
            Poll::Pending => {
                pool.give_back(pipe);
                Poll::Pending
            }
            Poll::Ready(Ok(0)) => {
                pool.give_back(pipe);
                Poll::Ready(Ok(0))
            }
            Poll::Ready(Ok(bytes)) => {
                self.way.pipe = Some(pipe);
                self.way.filled = bytes;
                pause::streamed();
                self.way.moved(bytes);
                // What can't be written now is written by the next step.
                match self.poll_drain(cx, to, pool) {
                    Poll::Ready(Err(stop)) => Poll::Ready(Err(stop)),
                    _ => Poll::Ready(Ok(bytes)),
                }
            }
            Poll::Ready(Err(error)) => {
                pool.give_back(pipe);
                if error.raw_os_error() != Some(rustix::io::Errno::INVAL.raw_os_error()) {
                    return Poll::Ready(Err(Stop::Read));
                }
                self.way = Way { refused: true, ..Way::default() };
                self.poll_copy(cx, sockets)
            }
        }
    }

    /// Empties the pipe.
    fn poll_drain(&mut self, cx: &mut Context<'_>, to: &TcpStream, pool: &Pool) -> Poll<Result<(), Stop>> {
        let Some(pipe) = &self.way.pipe else { return Poll::Ready(Ok(())) };
        while self.way.filled > 0 {
            let filled = self.way.filled;
            let empty = || splice(&pipe.read, to, filled);
            match ready!(poll_io(cx, to, Interest::WRITABLE, empty)) {
                Ok(0) | Err(_) => return Poll::Ready(Err(Stop::Write)),
                Ok(bytes) => self.way.filled -= bytes,
            }
        }
        if let Some(pipe) = self.way.pipe.take() {
            pool.give_back(pipe);
        }
        Poll::Ready(Ok(()))
    }
}

fn splice(from: impl std::os::fd::AsFd, to: impl std::os::fd::AsFd, length: usize) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    Ok(rustix::pipe::splice(from, None, to, None, length, flags)?)
}
