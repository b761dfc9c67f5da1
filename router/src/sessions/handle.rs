//! What a session does with its own registration.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::live::{Cut, Line, Ticket};
use super::{Registered, Reign, Sessions};
use crate::handover::Leaving;
use crate::socket::Connection;

/// What a session is asked to do as soon as it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Call {
    /// To go to the next process.
    pub leave: bool,
    /// To end, as its server or the router is about to stop.
    pub resign: bool,
    /// To [settle](crate::relay::Lean): it has been there for a while.
    pub settle: bool,
}

/// A registered session; dropping it ends the registration.
#[derive(Debug)]
pub struct Session {
    pub(super) id: u64,
    pub(super) ticket: Arc<Ticket>,
    pub(super) sessions: Arc<Sessions>,
}

impl Session {
    /// The server has taken the session: from now on it ends together with its client's connection. `false`: it has been
    /// ended already or is about to be, and the client has not noticed.
    pub fn begun(&self, client: &Arc<TcpStream>) -> bool {
        let mut inner = self.sessions.inner.lock();
        if self.cut().is_some() || self.ticket.resign.load(Ordering::Acquire) {
            return false;
        }
        inner.note_fresh(self.id, &self.sessions.stirs);
        if let Some(live) = inner.live.get_mut(&self.id) {
            live.client = Some(Connection::Watched(client.clone()));
        }
        true
    }

    /// The server has told the client how to cancel it.
    pub fn learn(&self, key: Box<[u8]>) {
        let key: Arc<[u8]> = key.into();
        let mut inner = self.sessions.inner.lock();
        if let Some(live) = inner.live.get_mut(&self.id) {
            live.key = Some(key.clone());
            inner.keys.insert(key, self.id);
        }
    }

    /// What is told of it.
    pub fn line(&self) -> Option<Line> {
        self.sessions.inner.lock().live.get(&self.id).map(|live| live.line())
    }

    /// Its beginning has been told, so that its end will be, whatever becomes of its port.
    pub fn note_told(&self) {
        self.ticket.told.store(true, Ordering::Relaxed);
    }

    /// Whether its beginning has been told.
    pub fn is_told(&self) -> bool {
        self.ticket.told.load(Ordering::Relaxed)
    }

    /// So many bytes have been relayed to the server, and to the client.
    pub fn moved(&self, up: u64, down: u64) {
        // Nobody else writes.
        let add = |sum: &AtomicU64, more| sum.store(sum.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
        add(&self.ticket.up, up);
        add(&self.ticket.down, down);
    }

    /// What it shall do; `waker` is woken when that changes.
    pub fn called(&self, waker: &Waker) -> Call {
        self.ticket.waker.register(waker);
        Call {
            leave: self.sessions.leaving.load(Ordering::Acquire),
            resign: self.ticket.resign.load(Ordering::Acquire) || self.closes(),
            settle: self.ticket.settle.load(Ordering::Acquire),
        }
    }

    /// Whether it shall end because the router does.
    pub fn closes(&self) -> bool {
        self.sessions.closing.load(Ordering::Acquire)
    }

    /// Takes both connections from the runtime; they still end with the session.
    ///
    /// # Errors
    /// The connections are lost.
    pub fn unwatch(&self, client: Arc<TcpStream>, server: Arc<TcpStream>) -> io::Result<(Arc<OwnedFd>, Arc<OwnedFd>)> {
        self.change_hands(|| {
            let (client, server) = (Connection::unwatch(client)?, Connection::unwatch(server)?);
            Ok(((client.clone(), server.clone()), Connection::Bare(client), Connection::Bare(server)))
        })
    }

    /// Gives them to the runtime that this is called in.
    ///
    /// # Errors
    /// The connections are lost.
    pub fn watch(&self, client: Arc<OwnedFd>, server: Arc<OwnedFd>) -> io::Result<(Arc<TcpStream>, Arc<TcpStream>)> {
        self.change_hands(|| {
            let (client, server) = (Connection::watch(client)?, Connection::watch(server)?);
            Ok(((client.clone(), server.clone()), Connection::Watched(client), Connection::Watched(server)))
        })
    }

    /// Under the lock, so that whoever ends the session finds either the one or the other.
    fn change_hands<T>(&self, change: impl FnOnce() -> io::Result<(T, Connection, Connection)>) -> io::Result<T> {
        let mut inner = self.sessions.inner.lock();
        // One that comes back does not go again at once.
        self.ticket.settle.store(false, Ordering::Release);
        inner.note_fresh(self.id, &self.sessions.stirs);
        let live = inner.live.get_mut(&self.id).ok_or(io::ErrorKind::NotFound)?;
        // Whoever changes has the last references.
        (live.client, live.server) = (None, None);
        let (changed, client, server) = change()?;
        (live.client, live.server) = (Some(client), Some(server));
        Ok(changed)
    }

    /// Where it goes, and what it was registered as.
    pub fn exit(&self) -> Option<(mpsc::Sender<Leaving>, Registered)> {
        let inner = self.sessions.inner.lock();
        let live = inner.live.get(&self.id).filter(|_| self.cut().is_none())?;
        let (port, client, backend) = (live.port.clone(), live.peer, live.backend.clone());
        // One of another epoch has been cut.
        let reign = live.epoch.as_ref().map(|epoch| {
            let word = inner.word.as_ref().filter(|(name, _)| *name == epoch.member);
            Reign { key: inner.key, proven: word.map(|(_, until)| *until) }
        });
        let registered = Registered { port, client, backend, reign, key: live.key.clone() };
        Some((inner.exit.clone()?, registered))
    }

    /// Ends it as if from outside.
    pub fn end(&self, cut: Cut) {
        if let Some(live) = self.sessions.inner.lock().live.get(&self.id) {
            live.end(cut);
        }
    }

    /// Why it was ended from outside, if it was.
    pub fn cut(&self) -> Option<Cut> {
        match self.ticket.cut.load(Ordering::Acquire) {
            1 => Some(Cut::LeaderChanged),
            2 => Some(Cut::Drained),
            3 => Some(Cut::Lag),
            4 => Some(Cut::Overdue),
            5 => Some(Cut::Down),
            _ => None,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut inner = self.sessions.inner.lock();
        let Some(live) = inner.live.remove(&self.id) else { return };
        if let Some(key) = live.key.filter(|key| inner.keys.get(key) == Some(&self.id)) {
            inner.keys.remove(&key);
        }
        if let Some(load) = inner.load.get_mut(&live.backend.member) {
            *load = load.saturating_sub(1);
        }
    }
}
