//! The copying way: read into the thread's buffer, write from it at once.

use std::cell::RefCell;
use std::io;
use std::task::{Context, Poll, ready};

use futures::FutureExt;
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{Half, Sockets, Stop, pause, poll_io};
use crate::socket;

/// What one read may take.
pub(super) const BUFFER: usize = 32 << 10;

thread_local! {
    /// Shared by all sessions of the thread: an idle session has no buffer at all.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

impl Half<'_> {
    /// Ready: bytes read, 0 at the end of the source.
    pub(super) fn poll_copy(&mut self, cx: &mut Context<'_>, sockets: Sockets<'_>) -> Poll<Result<usize, Stop>> {
        let Sockets { from, to } = sockets;
        debug_assert!(self.way.is_drained(), "what is in the pipe has been read before");
        ready!(self.poll_rest(cx, to))?;
        SCRATCH.with_borrow_mut(|scratch| {
            let bytes = match self.read_unread(from, scratch) {
                Some(bytes) => bytes,
                None => ready!(socket::poll_read(cx, from, scratch)).map_err(|_| Stop::Read)?,
            };
            Poll::Ready(self.pass_on(&scratch[..bytes], sockets, bytes < scratch.len()))
        })
    }

    /// What has been read goes on its way. `all`: there is nothing behind it, but an end maybe.
    pub(super) fn pass_on(
        &mut self,
        bytes: &[u8],
        Sockets { from, to }: Sockets<'_>,
        all: bool,
    ) -> Result<usize, Stop> {
        pause::busy();
        self.copied(bytes);
        // With an end right behind them they leave with it, in one packet: the receiver wakes up once.
        let sent = send_now(to, bytes, all && has_ended(from)).map_err(|_| Stop::Write)?;
        self.rest.extend_from_slice(&bytes[sent..]);
        Ok(bytes.len())
    }

    /// The first reads, past tokio, until one has emptied the socket: what comes after that is reported anew.
    fn read_unread(&mut self, from: &TcpStream, scratch: &mut [u8]) -> Option<usize> {
        if !self.unread {
            return None;
        }
        // An end and an error are not used up by this: the ordinary read finds them again.
        let read = rustix::net::recv(from, &mut *scratch, RecvFlags::empty()).map_or(0, |(bytes, _)| bytes);
        self.unread = read == scratch.len();
        Some(read).filter(|bytes| *bytes > 0)
    }

    /// Writes what an earlier step could not; its memory is given back.
    pub(super) fn poll_rest(&mut self, cx: &mut Context<'_>, to: &TcpStream) -> Poll<Result<(), Stop>> {
        while !self.rest.is_empty() {
            let write = || Ok(rustix::net::send(to, &self.rest, SendFlags::NOSIGNAL)?);
            let sent = ready!(poll_io(cx, to, Interest::WRITABLE, write)).map_err(|_| Stop::Write)?;
            self.rest.drain(..sent);
        }
        self.rest = Vec::new();
        Poll::Ready(Ok(()))
    }

    /// Reads and throws away.
    pub(super) fn poll_discard(&mut self, cx: &mut Context<'_>, from: &TcpStream) -> Poll<usize> {
        SCRATCH.with_borrow_mut(|scratch| {
            if !matches!(ready!(socket::poll_read(cx, from, scratch)), Ok(1..)) {
                self.drained = true;
            }
            // Counted as nothing: these bytes have not been relayed.
            Poll::Ready(0)
        })
    }
}

/// Whether the peer has ended its direction, as far as tokio has heard.
fn has_ended(stream: &TcpStream) -> bool {
    matches!(stream.ready(Interest::READABLE).now_or_never(), Some(Ok(ready)) if ready.is_read_closed())
}

/// Writes what the socket takes now. If there is `more` to come at once, the kernel may keep it for that long (it does not for
/// longer than 200 ms).
fn send_now(to: &TcpStream, bytes: &[u8], more: bool) -> io::Result<usize> {
    let flags = if more { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
    let mut sent = 0;
    while sent < bytes.len() {
        let write = || Ok(rustix::net::send(to, &bytes[sent..], flags)?);
        match to.try_io(Interest::WRITABLE, write) {
            Ok(more) => sent += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}
