//! A connection as the sessions of a port see it: plain, or with TLS that begins or ends here.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::socket;

/// A socket that others may end at any time, to be read and written as a stream.
#[derive(Debug)]
pub struct Wire {
    socket: Arc<TcpStream>,
    /// Read of it before.
    before: Vec<u8>,
    /// There may be something to read that tokio has reported already.
    unread: bool,
}

/// TLS over it.
pub type Tls = Box<TlsStream<Wire>>;

/// A connection, plain or encrypted.
#[derive(Debug)]
pub enum Leg {
    /// Plain.
    Plain(Wire),
    /// Encrypted.
    Tls(Tls),
}

impl Wire {
    /// What is read begins with `before`.
    pub fn new(socket: Arc<TcpStream>, before: Vec<u8>) -> Self {
        Self { socket, before, unread: false }
    }
}

/// What is read of a plain connection beyond what is needed, at most.
const AHEAD: usize = 512;

impl Leg {
    /// Reads on: `needed` bytes, of which some may have to be read later, and where it is plain whatever else is there.
    ///
    /// # Errors
    /// It has ended, or broke.
    pub async fn read_on(&mut self, bytes: &mut Vec<u8>, needed: usize) -> io::Result<()> {
        let read = match self {
            Leg::Plain(wire) => {
                bytes.reserve(needed.max(AHEAD));
                wire.read_buf(bytes).await?
            }
            Leg::Tls(tls) => tls.take(needed as u64).read_buf(bytes).await?,
        };
        if read == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// What was read first and is not needed yet. Of an encrypted connection there is none.
    pub fn put_back(&mut self, rest: Vec<u8>) {
        if let Leg::Plain(wire) = self {
            wire.before = rest;
        }
    }

    /// The same, again.
    pub fn take_back(&mut self) -> Vec<u8> {
        match self {
            Leg::Plain(wire) => std::mem::take(&mut wire.before),
            Leg::Tls(_) => Vec::new(),
        }
    }

    /// Whether there is some.
    pub fn is_ahead(&self) -> bool {
        matches!(self, Leg::Plain(wire) if !wire.before.is_empty())
    }

    /// Something may have come that tokio will not report again.
    pub fn look_again(&mut self) {
        match self {
            Leg::Plain(wire) => wire.unread = true,
            Leg::Tls(tls) => match &mut **tls {
                TlsStream::Client(tls) => tls.get_mut().0.unread = true,
                TlsStream::Server(tls) => tls.get_mut().0.unread = true,
            },
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.before.is_empty() {
            let length = self.before.len().min(buffer.remaining());
            buffer.put_slice(&self.before[..length]);
            self.before.drain(..length);
            return Poll::Ready(Ok(()));
        }
        if std::mem::take(&mut self.unread) {
            // An end and an error are not used up by this: the ordinary read finds them again.
            if let Ok((bytes @ 1.., _)) =
                rustix::net::recv(&*self.socket, buffer.initialize_unfilled(), RecvFlags::empty())
            {
                buffer.advance(bytes);
                self.unread = true;
                return Poll::Ready(Ok(()));
            }
        }
        let bytes = ready!(socket::poll_read(cx, &self.socket, buffer.initialize_unfilled()))?;
        buffer.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.poll_write_ready(cx))?;
            match self.socket.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Write)?))
    }
}

impl AsyncRead for Leg {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Leg::Plain(wire) => Pin::new(wire).poll_read(cx, buffer),
            Leg::Tls(tls) => match ready!(Pin::new(tls).poll_read(cx, buffer)) {
                // Many clients end TLS without saying so. PostgreSQL's messages have lengths, so nothing can be cut off
                // unnoticed.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
                outcome => Poll::Ready(outcome),
            },
        }
    }
}

impl AsyncWrite for Leg {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Leg::Plain(wire) => Pin::new(wire).poll_write(cx, bytes),
            Leg::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Leg::Plain(wire) => Pin::new(wire).poll_flush(cx),
            Leg::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Leg::Plain(wire) => Pin::new(wire).poll_shutdown(cx),
            Leg::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
