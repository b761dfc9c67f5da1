//! How listening sockets pass from one process to the next, so that no connection is ever refused.
//!
//! The running process waits at a unix socket. The next one connects, is sent every listening socket with its name
//! (SCM_RIGHTS, one a packet), and says so once it accepts from them. Until then nothing has changed for the running
//! process, and if the next one fails, nothing will; from then on it drains.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::listeners::Inherited;

/// How long one side may keep the other waiting.
const LIMIT: Duration = Duration::from_secs(10);

/// The longest name of a socket.
const NAME: usize = 512;

/// Behind the last socket.
const END: &[u8] = b"end";
/// The next process accepts.
const TAKEN: &[u8] = b"taken";

/// The running process's end.
#[derive(Debug)]
pub struct Giver(OwnedFd);

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
        Ok(Self(socket))
    }

    /// Waits for the next process and gives it what `sockets` returns. Blocks, for as long as nobody comes.
    ///
    /// # Errors
    /// It has not taken them: everything goes on as before.
    pub fn give(&self, sockets: impl FnOnce() -> io::Result<Inherited>) -> io::Result<()> {
        let peer = rustix::net::accept_with(&self.0, SocketFlags::CLOEXEC)?;
        limit(&peer)?;
        for (name, socket) in sockets()? {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [socket.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&fds));
            rustix::net::sendmsg(&peer, &[IoSlice::new(name.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
        }
        rustix::net::send(&peer, END, SendFlags::NOSIGNAL)?;
        let mut answer = [0; TAKEN.len()];
        let (length, _) = rustix::net::recv(&peer, &mut answer[..], RecvFlags::empty())?;
        if answer[..length] == *TAKEN { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
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

    /// The other process need not accept any more.
    ///
    /// # Errors
    /// It is gone.
    pub fn taken(self) -> io::Result<()> {
        rustix::net::send(&self.0, TAKEN, SendFlags::NOSIGNAL)?;
        Ok(())
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
        let giving = std::thread::spawn(move || giver.give(|| Ok(given)).map(|()| giver));
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
