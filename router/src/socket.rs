//! Sockets: how the router listens, dials, and what it asks of the kernel.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustix::net::sockopt;
use rustix::net::{AddressFamily, RecvFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener};
use trunkline_config::router::Listen;

use crate::names::Names;
use crate::port::Peer;
use crate::silence;

/// Connections the kernel completes before they are accepted; it cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// An address to listen on, resolved.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Address {
    /// Host and port.
    Tcp(SocketAddr),
    /// A file.
    Unix(PathBuf),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix(path) => path.display().fmt(f),
        }
    }
}

impl Address {
    /// Resolves a name.
    pub fn of(listen: &Listen) -> io::Result<Self> {
        match listen {
            Listen::Tcp(text) => resolve(text).map(Address::Tcp),
            Listen::Unix(path) => Ok(Address::Unix(path.clone())),
        }
    }

    /// Whether a connection could be one to either.
    pub fn overlaps(&self, other: &Self) -> bool {
        match (self, other) {
            (Address::Tcp(one), Address::Tcp(other)) => {
                let any = one.ip().is_unspecified() || other.ip().is_unspecified();
                one.port() == other.port() && (any || one.ip() == other.ip())
            }
            _ => self == other,
        }
    }
}

/// Resolves `host:port`; `*` and an empty host mean every address.
pub fn resolve(listen: &str) -> io::Result<SocketAddr> {
    let every = listen.strip_prefix("*:").or_else(|| listen.strip_prefix(':').filter(|rest| !rest.contains(':')));
    let found = match every {
        Some(port) => format!("0.0.0.0:{port}").to_socket_addrs()?.next(),
        None => listen.to_socket_addrs()?.next(),
    };
    found.ok_or_else(|| io::Error::new(io::ErrorKind::AddrNotAvailable, "no address"))
}

/// A socket outside of any runtime that listens, or shall.
#[derive(Debug)]
pub enum Bound {
    /// By TCP.
    Tcp(std::net::TcpListener),
    /// In the file system.
    Unix(std::os::unix::net::UnixListener),
}

impl Bound {
    /// As many sockets as there are threads. By TCP each has a queue of its own (`SO_REUSEPORT`), among which the kernel
    /// spreads the connections; by a unix socket they share one. Nobody can connect before they [listen](Self::listen).
    ///
    /// # Errors
    /// Somebody else listens there, or nobody can.
    pub fn new(address: &Address, threads: usize) -> io::Result<Vec<Self>> {
        if let Address::Tcp(address) = address {
            check_free(*address)?;
        }
        Self::beside(address, threads)
    }

    /// The same where this process, or the one whose sockets it takes, may listen already, at an address that overlaps.
    ///
    /// # Errors
    /// As above, unless whoever listens there shares the address.
    pub fn beside(address: &Address, threads: usize) -> io::Result<Vec<Self>> {
        match address {
            Address::Tcp(address) => {
                let mut bound = vec![bind(*address)?];
                // Port 0 is chosen once, and then shared.
                let address = bound[0].local_addr()?;
                for _ in 1..threads {
                    bound.push(bind(address)?);
                }
                Ok(bound.into_iter().map(Bound::Tcp).collect())
            }
            Address::Unix(path) => {
                let first = bind_unix(path)?;
                let mut bound = Vec::with_capacity(threads);
                for _ in 1..threads {
                    bound.push(Bound::Unix(first.try_clone()?));
                }
                bound.push(Bound::Unix(first));
                Ok(bound)
            }
        }
    }

    /// One more socket beside `other` of the same address.
    pub fn share(address: &Address, other: &Self) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => bind(*address).map(Bound::Tcp),
            Address::Unix(_) => other.try_clone(),
        }
    }

    /// From now on clients can connect, if they could not before.
    ///
    /// # Errors
    /// Somebody else listens there by now.
    pub fn listen(&self) -> io::Result<()> {
        match self {
            Bound::Tcp(listener) => begin_to_listen(listener),
            Bound::Unix(listener) => begin_to_listen(listener),
        }
    }

    /// What accepted connections inherit: no delay, and how soon an idle client that is gone is given up.
    ///
    /// # Errors
    /// The kernel refuses an option.
    pub fn tune(&self, silence: Option<Duration>) -> io::Result<()> {
        let Bound::Tcp(listener) = self else { return Ok(()) };
        sockopt::set_tcp_nodelay(listener, true)?;
        silence::keepalive(listener, silence)
    }

    /// The same socket once more.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Bound::Tcp(listener) => listener.try_clone().map(Bound::Tcp),
            Bound::Unix(listener) => listener.try_clone().map(Bound::Unix),
        }
    }

    /// A socket that another process has listened on.
    pub fn inherited(address: &Address, fd: OwnedFd) -> Self {
        match address {
            Address::Tcp(_) => Bound::Tcp(fd.into()),
            Address::Unix(_) => Bound::Unix(fd.into()),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Bound::Tcp(listener) => listener.local_addr().map(Address::Tcp),
            Bound::Unix(listener) => {
                let path = listener.local_addr()?.as_pathname().map(Path::to_owned);
                path.map(Address::Unix).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
            }
        }
    }

    /// For accepting on the runtime that this is called in.
    pub fn into_listener(self) -> io::Result<Listener> {
        match self {
            Bound::Tcp(listener) => TcpListener::from_std(listener).map(Listener::Tcp),
            Bound::Unix(listener) => UnixListener::from_std(listener).map(Listener::Unix),
        }
    }
}

impl From<Bound> for OwnedFd {
    fn from(bound: Bound) -> Self {
        match bound {
            Bound::Tcp(listener) => listener.into(),
            Bound::Unix(listener) => listener.into(),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// By TCP.
    Tcp(TcpListener),
    /// In the file system.
    Unix(UnixListener),
}

impl Listener {
    /// The next connection.
    pub async fn accept(&self) -> io::Result<(TcpStream, Peer)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((stream, Peer::Tcp(peer)))
            }
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                // To the relay all stream sockets are alike: nothing it asks of one knows addresses.
                let fd = OwnedFd::from(stream.into_std()?);
                Ok((TcpStream::from_std(fd.into())?, Peer::Unix))
            }
        }
    }
}

/// A socket that others may share the address with (`SO_REUSEPORT`). Nobody can connect before [`begin_to_listen`].
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    Ok(socket.into())
}

/// From now on clients can connect.
pub fn begin_to_listen(socket: impl AsFd) -> io::Result<()> {
    Ok(rustix::net::listen(socket, BACKLOG)?)
}

/// The same in the file system, for everybody, as PostgreSQL's own. What a router that is gone has left there is removed.
fn bind_unix(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    use std::os::unix::net;
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        match net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            _ => return Err(io::ErrorKind::AddrInUse.into()),
        }
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777))?;
    Ok(socket.into())
}

/// Fails if somebody who does not share the address has it: with `SO_REUSEPORT` alone, a second router of the same user
/// would silently take half of the connections.
pub fn check_free(address: SocketAddr) -> io::Result<()> {
    if address.port() == 0 {
        return Ok(());
    }
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    Ok(())
}

/// How long an address of a name has for itself before the next one is tried beside it (RFC 8305, section 5).
const HEAD_START: Duration = Duration::from_millis(250);

/// When the first bytes are sent to a server that is dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstBytes {
    /// As soon as it answers.
    AtOnce,
    /// Some day.
    Later,
}

/// Opens a connection to a server by that address of its name which answers first. They are tried in turn, each as soon as those
/// before have failed or had a [head start](HEAD_START): one that swallows packets hides no other. All within `timeout`.
/// For `silence` see [`silence::keepalive`].
pub async fn dial(
    names: &Arc<Names>,
    host: &str,
    port: u16,
    timeout: Duration,
    silence: Option<Duration>,
    first: FirstBytes,
) -> io::Result<TcpStream> {
    let attempt = async {
        let mut last = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
        let mut left = names.resolve(host, port).await?.into_iter();
        let head_start = HEAD_START.min(timeout / (left.len() as u32 + 1));
        let mut dialling = FuturesUnordered::new();
        loop {
            dialling.extend(left.next().map(|address| dial_address(address, silence, first)));
            tokio::select! {
                biased;
                dialled = dialling.next() => match dialled {
                    Some(Ok(stream)) => return Ok(stream),
                    Some(Err(error)) => last = error,
                    None => return Err(last),
                },
                () = tokio::time::sleep(head_start), if left.len() > 0 => {}
            }
        }
    };
    match tokio::time::timeout(timeout, attempt).await {
        Ok(outcome) => outcome,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer within connect_timeout")),
    }
}

async fn dial_address(address: SocketAddr, silence: Option<Duration>, first: FirstBytes) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_nodelay(true)?;
    if first == FirstBytes::AtOnce {
        // The acknowledgement that ends the handshake goes out with them, which saves a packet.
        sockopt::set_tcp_quickack(&socket, false)?;
    }
    silence::keepalive(&socket, silence)?;
    socket.connect(address).await
}

/// Whether there is a byte to read, or an end (0); nothing is taken.
pub fn peek(stream: &TcpStream) -> io::Result<usize> {
    Ok(rustix::net::recv(stream, &mut [0u8; 1], RecvFlags::PEEK)?.1)
}

/// Whether something has come that has not been read.
pub fn has_data(stream: &TcpStream) -> bool {
    matches!(peek(stream), Ok(1..))
}

/// Reads what is there; 0 at the end.
///
/// A read that comes back short has emptied the socket: the next one would only learn that, at the price of a system call.
/// So readiness is cleared right away (by reporting `WouldBlock` to tokio, as its own `poll_read` does internally; a byte
/// that arrives meanwhile sets it again, and the end of the stream is never cleared).
pub fn poll_read(cx: &mut Context<'_>, stream: &TcpStream, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
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

/// Fills `buffer`, and takes nothing beyond it.
pub async fn read_exact(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    let mut have = 0;
    while have < buffer.len() {
        stream.readable().await?;
        match stream.try_read(&mut buffer[have..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `bytes`.
pub async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Ends a connection with a reset, at once and from any thread: what waits in its buffers is neither sent nor read any
/// more. (To connect a TCP socket to `AF_UNSPEC` is how Linux disconnects it.)
pub fn abort(stream: impl AsFd) {
    if rustix::net::connect_unspec(&stream).is_err() {
        close_both_ways(stream);
    }
}

/// Ends both directions, whoever is reading or writing. What was written before is still delivered.
pub fn close_both_ways(stream: impl AsFd) {
    // ENOTCONN: closed already.
    let _ = rustix::net::shutdown(stream, Shutdown::Both);
}

/// A connection, wherever its events are waited for.
#[derive(Debug, Clone)]
pub enum Connection {
    /// By the runtime of a thread.
    Watched(Arc<TcpStream>),
    /// By nobody, or some other way.
    Bare(Arc<OwnedFd>),
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Connection::Watched(stream) => stream.as_fd(),
            Connection::Bare(socket) => socket.as_fd(),
        }
    }
}

impl Connection {
    /// Takes the only reference to a stream from its runtime.
    ///
    /// # Errors
    /// There are other references, or the kernel refuses. The connection is gone then, as far as this reference goes.
    pub fn unwatch(stream: Arc<TcpStream>) -> io::Result<Arc<OwnedFd>> {
        let stream = Arc::into_inner(stream).ok_or(io::ErrorKind::ResourceBusy)?;
        Ok(Arc::new(stream.into_std()?.into()))
    }

    /// The reverse, for the runtime that this is called in.
    ///
    /// # Errors
    /// As above.
    pub fn watch(socket: Arc<OwnedFd>) -> io::Result<Arc<TcpStream>> {
        let socket = Arc::into_inner(socket).ok_or(io::ErrorKind::ResourceBusy)?;
        TcpStream::from_std(socket.into()).map(Arc::new)
    }

    /// The address that its peer sees; `None` where there is none any more.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        rustix::net::getsockname(self).ok()?.try_into().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_to_listen_on() {
        for (listen, expected) in [
            ("127.0.0.1:5000", "127.0.0.1:5000"),
            ("[::1]:5000", "[::1]:5000"),
            ("*:5000", "0.0.0.0:5000"),
            (":5000", "0.0.0.0:5000"),
        ] {
            assert_eq!(resolve(listen).unwrap(), expected.parse().unwrap(), "{listen}");
        }
        assert!(resolve("127.0.0.1").is_err());
    }

    #[test]
    fn a_file_that_was_left_is_used_again_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = Address::Unix(path.clone());
        let bound = Bound::new(&address, 2).unwrap();
        bound[0].listen().unwrap();
        assert_eq!((bound.len(), bound[0].address().unwrap()), (2, address.clone()));
        assert!(Bound::new(&address, 1).is_err(), "in use");
        drop(bound);
        assert!(path.exists() && Bound::new(&address, 1).is_ok(), "left over");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(Bound::new(&address, 1).is_err(), "no socket");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_taken_port_is_noticed_though_it_could_be_shared() {
        let taken = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        begin_to_listen(&taken).unwrap();
        let address = taken.local_addr().unwrap();
        assert!(check_free(address).is_err());
        assert!(bind(address).and_then(begin_to_listen).is_ok(), "threads share it");
    }

    #[tokio::test]
    async fn an_address_that_swallows_packets_hides_no_other_of_its_name() {
        // One whose queue is full drops what comes.
        let swallows = tokio::net::TcpSocket::new_v4().unwrap();
        swallows.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let swallows = swallows.listen(0).unwrap();
        let at = swallows.local_addr().unwrap();
        let soon = Duration::from_millis(200);
        let mut fill = Vec::new();
        while let Ok(Ok(stream)) = tokio::time::timeout(soon, TcpStream::connect(at)).await {
            fill.push(stream);
        }
        let good = TcpListener::bind(("127.0.0.1", at.port())).await.unwrap();
        let dialled = async |addresses: &'static [&str], timeout| {
            let resolve = |_: &str| Ok(addresses.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 0)).collect());
            let names = Arc::new(Names::new(Duration::ZERO, resolve));
            dial(&names, "server", at.port(), timeout, None, FirstBytes::AtOnce).await.and_then(|to| to.peer_addr())
        };
        let good = good.local_addr().unwrap();
        assert_eq!(dialled(&["127.0.0.2", "127.0.0.1"], Duration::from_secs(1)).await.unwrap(), good);
        assert_eq!(dialled(&["127.0.0.2", "127.0.0.2", "127.0.0.1"], soon).await.unwrap(), good);
        assert_eq!(dialled(&["127.0.0.3", "127.0.0.1"], soon).await.unwrap(), good, "one that refuses");
        assert_eq!(dialled(&["127.0.0.2"], soon).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let refused = dialled(&["127.0.0.3", "127.0.0.4"], soon).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(dialled(&[], soon).await.is_err());
    }

    #[tokio::test]
    async fn the_kernel_is_told_to_ask_idle_peers_on_both_legs() {
        let silence = Some(Duration::from_secs(8));
        let bound = Bound::new(&Address::Tcp("127.0.0.1:0".parse().unwrap()), 1).unwrap().remove(0);
        bound.listen().unwrap();
        let Address::Tcp(address) = bound.address().unwrap() else { panic!("{bound:?}") };
        let again = bound.try_clone().unwrap();
        let listener = bound.into_listener().unwrap();
        let legs = async |silence| {
            again.tune(silence).unwrap();
            let (limit, first) = (Duration::from_secs(5), FirstBytes::AtOnce);
            let server = dial(&Arc::default(), "127.0.0.1", address.port(), limit, silence, first).await.unwrap();
            let (client, _) = listener.accept().await.unwrap();
            assert!(client.nodelay().unwrap() && server.nodelay().unwrap());
            [client, server]
        };
        for leg in legs(silence).await {
            assert!(sockopt::socket_keepalive(&leg).unwrap());
            let (idle, interval) = (sockopt::tcp_keepidle(&leg).unwrap(), sockopt::tcp_keepintvl(&leg).unwrap());
            assert_eq!((idle.as_secs(), interval.as_secs(), sockopt::tcp_keepcnt(&leg).unwrap()), (5, 1, 3));
            // A live peer that does not read would be given up by that.
            assert_eq!(sockopt::tcp_user_timeout(&leg).unwrap(), 0);
        }
        // The port has been told otherwise by a reload.
        for leg in legs(None).await {
            assert!(!sockopt::socket_keepalive(&leg).unwrap());
        }
    }
}
