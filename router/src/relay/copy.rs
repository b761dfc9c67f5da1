//! The copying way: read into the thread's buffer, write from it at once.

use std::cell::RefCell;
use std::io;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{Half, Sockets, Stop, pause, poll_io};

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
        ready!(self.poll_rest(cx, to))?;
        SCRATCH.with_borrow_mut(|scratch| {
            let bytes = match self.read_unread(from, scratch) {
                Some(bytes) => bytes,
                None => ready!(poll_read(cx, from, scratch)).map_err(|_| Stop::Read)?,
            };
            pause::busy();
            self.copied(&scratch[..bytes]);
            let sent = send_now(to, &scratch[..bytes]).map_err(|_| Stop::Write)?;
            self.rest.extend_from_slice(&scratch[sent..bytes]);
            Poll::Ready(Ok(bytes))
        })
    }

    /// The very first read, past tokio. Whatever it does not take is reported anew.
    fn read_unread(&mut self, from: &TcpStream, scratch: &mut [u8]) -> Option<usize> {
        if !std::mem::take(&mut self.unread) {
            return None;
        }
        // An end and an error are not used up by this: the ordinary read finds them again.
        rustix::net::recv(from, scratch, RecvFlags::empty()).ok().map(|(bytes, _)| bytes).filter(|bytes| *bytes > 0)
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
            if !matches!(ready!(poll_read(cx, from, scratch)), Ok(1..)) {
                self.drained = true;
            }
            // Counted as nothing: these bytes have not been relayed.
            Poll::Ready(0)
        })
    }
}

/// A read that comes back short has emptied the socket: the next one would only learn that, at the price of a system call.
/// So readiness is cleared right away (by reporting `WouldBlock` to tokio, as its own `poll_read` does internally; a byte
/// that arrives meanwhile sets it again, and the end of the stream is never cleared).
fn poll_read(cx: &mut Context<'_>, stream: &TcpStream, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
    let mut short = None;
    let outcome = loop {
        ready!(stream.poll_read_ready(cx))?;
        let outcome = stream.try_io(Interest::READABLE, || {
            let bytes = rustix::net::recv(stream, &mut *buffer, RecvFlags::empty())?.0;
            if bytes > 0 && bytes < buffer.len() {
                short = Some(bytes);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(bytes)
        });
        match outcome {
            Err(_) if short.is_some() => break Ok(short.unwrap_or_default()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            outcome => break outcome,
        }
    };
    Poll::Ready(outcome)
}

/// Writes what the socket takes now.
fn send_now(to: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        let write = || Ok(rustix::net::send(to, &bytes[sent..], SendFlags::NOSIGNAL)?);
        match to.try_io(Interest::WRITABLE, write) {
            Ok(more) => sent += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}
