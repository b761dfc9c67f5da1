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
    /// Bytes of the last move, and how many of them are still in the pipe.
    taken: usize,
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
        !self.streams && self.is_drained()
    }

    /// Whether it has nothing in a pipe.
    pub(super) fn is_drained(&self) -> bool {
        self.pipe.is_none()
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

    /// The pipe is empty again. Before that nothing may be copied: it would come before what is in the pipe.
    fn moved(&mut self) {
        self.vote(self.taken < SMALL, SMALL_MOVES);
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
        if !self.way.streams {
            return self.poll_copy(cx, sockets);
        }
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
                (self.way.taken, self.way.filled) = (bytes, bytes);
                pause::streamed();
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
            self.way.moved();
        }
        Poll::Ready(Ok(()))
    }
}

fn splice(from: impl std::os::fd::AsFd, to: impl std::os::fd::AsFd, length: usize) -> io::Result<usize> {
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    Ok(rustix::pipe::splice(from, None, to, None, length, flags)?)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::os::unix::net::UnixStream;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PIECE: usize = 200;

    /// A direction that streams, and its ends.
    struct Scene {
        sender: TcpStream,
        from: TcpStream,
        half: Half<'static>,
        pool: Pool,
        to: TcpStream,
        receiver: TcpStream,
        /// What the sender has sent.
        sent: Vec<u8>,
        /// What the receiver got before that, past the half.
        before: usize,
    }

    /// Of unix sockets: what one takes and the other has are the same at any time.
    fn pair() -> (TcpStream, TcpStream) {
        let open = |socket: UnixStream| {
            socket.set_nonblocking(true).unwrap();
            TcpStream::from_std(OwnedFd::from(socket).into()).unwrap()
        };
        let (one, other) = UnixStream::pair().unwrap();
        (open(one), open(other))
    }

    impl Scene {
        /// So many pieces have passed before the receiver stalled, and two have come since.
        async fn stalled(passed: usize) -> Self {
            let ((sender, from), (to, receiver)) = (pair(), pair());
            let half = Half { way: Way::streaming(), ..Half::default() };
            let mut scene = Self { sender, from, half, pool: Pool::new(1), to, receiver, sent: Vec::new(), before: 0 };
            for _ in 0..passed {
                scene.piece().await;
                scene.receiver.read_exact(&mut [0; PIECE]).await.unwrap();
            }
            scene.sent.clear();
            scene.to.writable().await.unwrap();
            while let Ok(bytes) = scene.to.try_write(&[0; PIECE]) {
                scene.before += bytes;
            }
            scene.piece().await;
            scene.piece().await;
            scene
        }

        /// The sender sends one, with which a step is made.
        async fn piece(&mut self) {
            let piece = pattern(self.sent.len(), PIECE);
            self.sender.write_all(&piece).await.unwrap();
            self.sent.extend(piece);
            self.from.readable().await.unwrap();
            let Self { from, to, half, pool, .. } = self;
            let step = poll_fn(|cx| Poll::Ready(half.poll_step(cx, Sockets { from, to }, pool, false)));
            let _ = step.await;
        }

        /// The sender sends so much more and ends; what the receiver gets of that, which reads again.
        async fn rest(mut self, more: usize) -> (Vec<u8>, Vec<u8>) {
            let bytes = pattern(self.sent.len(), more);
            self.sent.extend(&bytes);
            let mut sender = self.sender;
            let sends = async {
                sender.write_all(&bytes).await.unwrap();
                sender.shutdown().await.unwrap();
            };
            let (half, sockets) = (&mut self.half, Sockets { from: &self.from, to: &self.to });
            let relays = poll_fn(|cx| {
                while half.poll_step(cx, sockets, &self.pool, false).is_ready() {}
                if half.ended() { Poll::Ready(()) } else { Poll::Pending }
            });
            let mut got = Vec::new();
            let (.., read) = tokio::join!(sends, relays, self.receiver.read_to_end(&mut got));
            read.unwrap();
            (got.split_off(self.before), self.sent)
        }
    }

    /// Bytes that show any loss, repetition or exchange.
    fn pattern(from: usize, length: usize) -> Vec<u8> {
        (from as u32..).take(length).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    /// In whatever state a stall meets a half that moves small pieces.
    const STATES: std::ops::Range<usize> = 0..2 * SMALL_MOVES as usize;

    #[tokio::test]
    async fn a_stall_among_small_pieces_changes_no_order() {
        for passed in STATES {
            let (got, sent) = Scene::stalled(passed).await.rest(1 << 20).await;
            assert!(got == sent, "{passed} pieces before: {} of {} bytes, or not in order", got.len(), sent.len());
        }
    }

    #[tokio::test]
    async fn an_end_in_a_stall_loses_nothing() {
        for passed in STATES {
            let (got, sent) = Scene::stalled(passed).await.rest(0).await;
            assert!(got == sent, "{passed} pieces before: {} of {} bytes, or not in order", got.len(), sent.len());
        }
    }

    #[tokio::test]
    async fn who_leaves_in_a_stall_takes_all_along_in_order() {
        for passed in STATES {
            let mut scene = Scene::stalled(passed).await;
            let mut got = scene.half.take_rest();
            let mut unread = vec![0; scene.sent.len() - got.len()];
            scene.from.read_exact(&mut unread).await.unwrap();
            got.extend(unread);
            assert!(got == scene.sent, "{passed} pieces before");
        }
    }
}
