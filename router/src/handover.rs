//! How a router passes from one process to the next: first its listening sockets, so that no connection is ever refused, then
//! its sessions, so that none is dropped.
//!
//! The running process waits at a unix socket. The next one connects, is sent every listening socket with its name
//! (SCM_RIGHTS, one a packet), and finds out where sessions may go. That can take long, where the DCS is away. Only then
//! does it accept, and say so. Until then nothing has changed for the running process, and if the next one fails, nothing
//! will; from then on it drains.
//!
//! Then the next process asks for the sessions. Each one that only moves bytes (no TLS of the
//! router's own, start-up over, no side closed) stops where it is and is sent with both its sockets, what it is
//! registered as, and the bytes that have been read and not been written. Everything else is in the kernel's buffers, and
//! stays there. What can't be sent is drained as ever.
//!
//! A session belongs to the next process as soon as that has acknowledged it, and not before. Whatever goes wrong, it has
//! one owner: the running process shuts the connection down before it goes on with a session that was not acknowledged, and
//! from that moment on nobody can.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::sockopt;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};

use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use trunkline_common::{Instant, Revision};

use crate::boundary::Trace;
use crate::listeners::Inherited;
use crate::port::Peer;
use crate::relay::Carried;
use crate::sessions::{Registered, Reign, Sessions};
use crate::table::Backend;

/// How long one side may keep the other waiting.
const LIMIT: Duration = Duration::from_secs(10);

/// The longest name of a socket.
const NAME: usize = 512;

/// Behind the last socket.
const END: &[u8] = b"end";
/// The next process knows where sessions may go, and accepts.
const TAKEN: &[u8] = b"taken";
/// Sessions may come, and each will be acknowledged.
const READY: &[u8] = b"acknowledging";
/// The last session is here.
const HERE: &[u8] = b"here";

/// Sessions on their way to the next process at once.
const LEAVING: usize = 256;

/// What is sent at once of a session's bytes.
const PIECE: usize = 32 << 10;

/// A session on its way to the next process, which waits for what comes of it. Dropping this means that it is there.
#[derive(Debug)]
pub struct Leaving {
    /// What it is registered as.
    pub registered: Registered,
    /// The connection of its client.
    pub client: Arc<TcpStream>,
    /// The connection to its server.
    pub server: Arc<TcpStream>,
    /// What it takes along.
    pub carried: Box<Carried>,
    /// Where that goes if it stays.
    pub stays: oneshot::Sender<Box<Carried>>,
}

impl Leaving {
    /// It goes on here.
    fn stay(self) {
        let Self { client, server, carried, stays, .. } = self;
        // First of all: whoever has the session may need the only references.
        drop((client, server));
        // One that is over does not wait any more.
        let _ = stays.send(carried);
    }
}

/// A session of another process.
#[derive(Debug)]
pub struct Adopted {
    /// What it was registered as.
    pub registered: Registered,
    /// The connection of its client.
    pub client: OwnedFd,
    /// The connection to its server.
    pub server: OwnedFd,
    /// What it takes along.
    pub carried: Carried,
}

/// How a session is told.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    port: String,
    client: Option<SocketAddr>,
    member: String,
    host: String,
    server_port: u16,
    /// For a session of a leader: when its key was created, if the DCS has shown it.
    epoch: Option<i64>,
    /// It is a session of a leader.
    #[serde(default)]
    leader: bool,
    /// Until when its own word is good that it leads, in milliseconds since the host started.
    #[serde(default)]
    proven: Option<u64>,
    key: Option<Vec<u8>>,
    #[serde(default)]
    traces: Option<(Trace, Trace)>,
    /// Milliseconds that are left to it, if its server is about to stop.
    #[serde(default)]
    budget: Option<u64>,
    /// Bytes that follow, to the server and to the client.
    up: usize,
    down: usize,
}

/// The running process's end.
#[derive(Debug)]
pub struct Giver {
    socket: OwnedFd,
    visited: Arc<AtomicBool>,
}

/// The next process's end: it has the sockets, and has not said so yet.
#[derive(Debug)]
pub struct Taker(OwnedFd);

impl Giver {
    /// Waits at `path` from now on; what an earlier process has left there is replaced.
    ///
    /// # Errors
    /// Nothing can be made there.
    pub fn at(path: &Path) -> io::Result<Self> {
        let socket = socket()?;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Whoever can connect gets the sockets, so nobody else may: not even for the moment before a chmod.
        let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let bound = rustix::net::bind(&socket, &SocketAddrUnix::new(path)?);
        rustix::process::umask(before);
        bound?;
        rustix::net::listen(&socket, 1)?;
        Ok(Self { socket, visited: Arc::default() })
    }

    /// Whether the next process is here, and not ready yet.
    pub fn visited(&self) -> Arc<AtomicBool> {
        self.visited.clone()
    }

    /// Waits for the next process and gives it what `sockets` returns. Blocks, for as long as nobody comes, and then for as long
    /// as the one that has come is not ready.
    ///
    /// # Errors
    /// It has not taken them: everything goes on as before.
    pub fn give(&self, sockets: impl FnOnce() -> io::Result<Inherited>) -> io::Result<Given> {
        let peer = rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC)?;
        self.visited.store(true, Ordering::Release);
        let given = give_to(peer, sockets);
        self.visited.store(false, Ordering::Release);
        given
    }
}

fn give_to(peer: OwnedFd, sockets: impl FnOnce() -> io::Result<Inherited>) -> io::Result<Given> {
    limit(&peer)?;
    for (name, socket) in sockets()? {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [socket.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(&peer, &[IoSlice::new(name.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    }
    rustix::net::send(&peer, END, SendFlags::NOSIGNAL)?;
    // As long as it lives: what it waits for may be what its predecessor waits for as well.
    sockopt::set_socket_timeout(&peer, sockopt::Timeout::Recv, None)?;
    let mut answer = [0; TAKEN.len()];
    let (length, _) = rustix::net::recv(&peer, &mut answer[..], RecvFlags::empty())?;
    limit(&peer)?;
    if answer[..length] == *TAKEN { Ok(Given(peer)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// The connection to a process that has taken the sockets.
#[derive(Debug)]
pub struct Given(OwnedFd);

impl Given {
    /// The next process.
    pub fn pid(&self) -> Option<u32> {
        let credentials = sockopt::socket_peercred(&self.0).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }

    /// Gives it every session that can leave, now and later, for as long as there is one. Blocks. `count`: how many it has taken.
    ///
    /// # Errors
    /// It takes no more. Those that it has not taken go on here.
    pub fn sessions(self, sessions: &Sessions, count: &mut usize) -> io::Result<()> {
        self.expect(READY)?;
        let (exit, mut leaving) = mpsc::channel(LEAVING);
        sessions.leave(exit);
        while let Some(next) = leaving.blocking_recv() {
            if let Err(error) = self.session(&next) {
                // First of all, so that none of those that go on wants to leave again.
                sessions.stay();
                leaving.close();
                next.stay();
                std::iter::from_fn(|| leaving.blocking_recv()).for_each(Leaving::stay);
                return Err(error);
            }
            *count += 1;
        }
        Ok(())
    }

    /// # Errors
    /// It has not taken it, and can't do so any more.
    fn session(&self, leaving: &Leaving) -> io::Result<()> {
        let taken = self.send(leaving).and_then(|()| self.expect(HERE));
        taken.or_else(|error| {
            // What it acknowledges from now on does not arrive, and it is told so.
            let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
            self.expect(HERE).map_err(|_| error)
        })
    }

    fn expect(&self, word: &[u8]) -> io::Result<()> {
        let mut answer = [0; NAME];
        let (length, _) = rustix::net::recv(&self.0, &mut answer[..], RecvFlags::empty())?;
        if answer.get(..length) == Some(word) { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn send(&self, leaving: &Leaving) -> io::Result<()> {
        let Leaving { registered, client, server, carried, .. } = leaving;
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let told = Told {
            port: registered.port.to_string(),
            client: match registered.client {
                Peer::Tcp(address) => Some(address),
                Peer::Unix => None,
            },
            member: registered.backend.member.as_str().to_owned(),
            host: registered.backend.host.clone(),
            server_port: registered.backend.port,
            epoch: registered.reign.and_then(|reign| reign.key).map(|key| key.0),
            leader: registered.reign.is_some(),
            proven: registered.reign.and_then(|reign| reign.proven).map(|until| millis(until.since_boot())),
            key: registered.key.as_deref().map(<[u8]>::to_vec),
            traces: carried.traces.clone(),
            budget: carried.budget.map(millis),
            up: carried.up.len(),
            down: carried.down.len(),
        };
        let told = serde_json::to_vec(&told)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [client.as_fd(), server.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(&self.0, &[IoSlice::new(&told)], &mut control, SendFlags::NOSIGNAL)?;
        for piece in carried.up.chunks(PIECE).chain(carried.down.chunks(PIECE)) {
            rustix::net::send(&self.0, piece, SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }
}

impl Taker {
    /// Gets the sockets of the process that waits at `path`.
    ///
    /// # Errors
    /// There is none, or it does not give them in time.
    pub fn take(path: &Path) -> io::Result<(Self, Inherited)> {
        let peer = socket()?;
        limit(&peer)?;
        rustix::net::connect(&peer, &SocketAddrUnix::new(path)?)?;
        let mut sockets = Inherited::new();
        loop {
            let mut name = [0; NAME];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = rustix::net::recvmsg(&peer, &mut [IoSliceMut::new(&mut name)], &mut control, flags)?;
            let name = name.get(..received.bytes).unwrap_or_default();
            let socket = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            match socket {
                Some(socket) => drop(sockets.insert(String::from_utf8_lossy(name).into_owned(), socket)),
                None if name == END => return Ok((Self(peer), sockets)),
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Whether the other process has ended.
    pub fn is_alone(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        rustix::net::recv(&self.0, &mut [0u8; 1][..], flags) != Err(rustix::io::Errno::AGAIN)
    }

    /// The other process need not accept any more.
    ///
    /// # Errors
    /// It is gone.
    pub fn taken(&self) -> io::Result<()> {
        rustix::net::send(&self.0, TAKEN, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Takes the other process's sessions until it has no more. Blocks.
    ///
    /// # Errors
    /// What it sends makes no sense.
    pub fn sessions(&self, mut take: impl FnMut(Adopted)) -> io::Result<()> {
        // From now on it is up to the other process, which has its own bound for draining.
        sockopt::set_socket_timeout(&self.0, sockopt::Timeout::Recv, None)?;
        rustix::net::send(&self.0, READY, SendFlags::NOSIGNAL)?;
        let mut buffer = vec![0; PIECE];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags)?;
            if received.bytes == 0 {
                return Ok(());
            }
            let mut fds = control.drain().flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                _ => Vec::new(),
            });
            let no_session = || io::Error::new(io::ErrorKind::InvalidData, "a session was expected");
            let (client, server) = fds.next().zip(fds.next()).ok_or_else(no_session)?;
            drop(fds);
            let mut told: Told = serde_json::from_slice(buffer.get(..received.bytes).unwrap_or_default())?;
            let (up, down) = (self.pieces(told.up)?, self.pieces(told.down)?);
            let (traces, budget) = (told.traces.take(), told.budget.map(Duration::from_millis));
            let carried = Carried { up, down, traces, budget };
            // If the other process does not hear this, it goes on with the session.
            rustix::net::send(&self.0, HERE, SendFlags::NOSIGNAL)?;
            take(Adopted { registered: told.into_registered(), client, server, carried });
        }
    }

    fn pieces(&self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut piece = vec![0; PIECE.min(length)];
        while bytes.len() < length {
            match rustix::net::recv(&self.0, &mut piece[..], RecvFlags::empty())?.0 {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                have => bytes.extend_from_slice(&piece[..have]),
            }
        }
        Ok(bytes)
    }
}

impl Told {
    fn into_registered(self) -> Registered {
        // A process of an earlier version names the key only.
        let reign = (self.leader || self.epoch.is_some()).then(|| Reign {
            key: self.epoch.map(Revision),
            proven: self.proven.map(|until| Instant::from_boot(Duration::from_millis(until))),
        });
        Registered {
            port: self.port.into(),
            client: self.client.map_or(Peer::Unix, Peer::Tcp),
            backend: Arc::new(Backend::at(self.member.as_str().into(), self.host, self.server_port)),
            reign,
            key: self.key.map(Into::into),
        }
    }
}

fn socket() -> io::Result<OwnedFd> {
    // Packets, so that a name stays with its socket.
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn limit(socket: &OwnedFd) -> io::Result<()> {
    sockopt::set_socket_timeout(socket, sockopt::Timeout::Recv, Some(LIMIT))?;
    sockopt::set_socket_timeout(socket, sockopt::Timeout::Send, Some(LIMIT))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn sockets(count: usize) -> (Vec<std::net::SocketAddr>, Inherited) {
        let listeners: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        (addresses, listeners.into_iter().enumerate().map(|(n, l)| (format!("name {n}"), l.into())).collect())
    }

    #[test]
    fn sockets_pass_with_their_names_and_go_on_listening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("upgrade");
        let giver = Giver::at(&path).unwrap();
        let (addresses, given) = sockets(100);
        let giving = std::thread::spawn(move || giver.give(|| Ok(given)).map(|_| giver));
        let (taker, taken) = Taker::take(&path).unwrap();
        taker.taken().unwrap();
        let giver = giving.join().unwrap().unwrap();
        assert_eq!(taken.len(), 100);
        for (n, address) in addresses.iter().enumerate() {
            let listener = TcpListener::from(taken[&format!("name {n}")].try_clone().unwrap());
            let client = TcpStream::connect(address).unwrap();
            assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
        }
        drop(giver);
        assert!(Giver::at(&path).is_ok(), "what was left is replaced");
    }

    #[tokio::test]
    async fn a_session_that_was_given_up_can_not_be_taken_any_more() {
        let (giver, taker) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (given, taker) = (Given(giver), Taker(taker));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Arc::new(tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let backend = Arc::new(Backend::at("a".into(), "10.0.0.1".into(), 5432));
        let registered = Registered { port: "rw".into(), client: Peer::Unix, backend, reign: None, key: None };
        let leaving = || {
            let carried = Box::new(Carried { up: vec![7; 3 * PIECE], ..Carried::default() });
            let (registered, client, server) = (registered.clone(), client.clone(), client.clone());
            Leaving { registered, client, server, carried, stays: oneshot::channel().0 }
        };
        // The next process hangs, and goes on too late.
        sockopt::set_socket_timeout(&given.0, sockopt::Timeout::Recv, Some(Duration::from_millis(50))).unwrap();
        assert!(given.session(&leaving()).is_err());
        let mut taken = 0;
        assert!(taker.sessions(|_| taken += 1).is_err());
        assert_eq!(taken, 0);
        assert!(given.session(&leaving()).is_err(), "no other one either");
    }

    #[test]
    fn a_taker_that_fails_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("upgrade");
        let giver = Giver::at(&path).unwrap();
        let giving = std::thread::spawn(move || giver.give(|| Ok(sockets(3).1)));
        drop(Taker::take(&path).unwrap());
        assert!(giving.join().unwrap().is_err());
        assert!(Taker::take(&path).is_err(), "nobody waits any more");
        assert!(Taker::take(&dir.path().join("nowhere")).is_err());
    }
}
