//! One registered session, as others see it: whose it is, what it moves, and how it is ended from outside.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::net::TcpStream;
use trunkline_common::Instant;

use crate::port::Peer;
use crate::silence;
use crate::socket::{self, Connection};
use crate::table::{Backend, Epoch};

/// Why a session was ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Cut {
    /// Its server is not the leader any more.
    LeaderChanged = 1,
    /// The router stops, and the time for draining is over.
    Drained = 2,
    /// Its server is too far behind.
    Lag = 3,
    /// Its server is about to stop, and its transaction took too long.
    Overdue = 4,
    /// Its server has been down for too long.
    Down = 5,
}

/// What reaches a session from outside.
#[derive(Debug, Default)]
pub(super) struct Ticket {
    pub(super) cut: AtomicU8,
    /// Its server is about to stop.
    pub(super) resign: AtomicBool,
    /// It has been there for a while.
    pub(super) settle: AtomicBool,
    /// Its beginning has been told, where its port wants that.
    pub(super) told: AtomicBool,
    pub(super) waker: AtomicWaker,
    /// Bytes relayed to the server, and to the client.
    pub(super) up: AtomicU64,
    pub(super) down: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Live {
    pub(super) port: Arc<str>,
    pub(super) peer: Peer,
    pub(super) backend: Arc<Backend>,
    /// The epoch the session belongs to: that of its opening, or the one its standby began by being promoted.
    pub(super) epoch: Option<Epoch>,
    pub(super) began: Instant,
    /// What cancels it.
    pub(super) key: Option<Arc<[u8]>>,
    /// `None` until the server has taken the session.
    pub(super) client: Option<Connection>,
    /// `None` while it changes hands, which happens under the lock.
    pub(super) server: Option<Connection>,
    pub(super) ticket: Arc<Ticket>,
}

/// What is told of a session.
#[derive(Debug, Clone)]
pub struct Line {
    /// The port it came by.
    pub port: Arc<str>,
    /// The client.
    pub client: Peer,
    /// The server.
    pub backend: Arc<Backend>,
    /// What the server takes for the client's address, as in `pg_stat_activity`.
    pub from: Option<SocketAddr>,
    /// When its server was connected to.
    pub began: Instant,
    /// Bytes relayed to the server by this process, and to the client.
    pub bytes: (u64, u64),
}

/// How long a peer may answer nothing at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Silence {
    /// That of a client; `None`: for ever.
    pub client: Option<Duration>,
    /// The same of a server.
    pub server: Option<Duration>,
}

impl Live {
    pub(super) fn new(
        port: &Arc<str>,
        peer: Peer,
        backend: &Arc<Backend>,
        epoch: Option<Epoch>,
        server: &Arc<TcpStream>,
        began: Instant,
    ) -> Box<Self> {
        Box::new(Self {
            port: port.clone(),
            peer,
            backend: backend.clone(),
            epoch,
            began,
            key: None,
            client: None,
            server: Some(Connection::Watched(server.clone())),
            ticket: Arc::default(),
        })
    }

    pub(super) fn line(&self) -> Line {
        Line {
            port: self.port.clone(),
            client: self.peer,
            backend: self.backend.clone(),
            // Gone already where it is not known.
            from: self.server.as_ref().and_then(Connection::local_addr),
            began: self.began,
            bytes: (self.ticket.up.load(Ordering::Relaxed), self.ticket.down.load(Ordering::Relaxed)),
        }
    }

    /// Only the connections: by that the relay learns who is gone, and ends the session.
    pub(super) fn give_up_silent(&self, limits: Silence) -> usize {
        let legs = [(&self.client, limits.client), (&self.server, limits.server)];
        let known = legs.into_iter().filter_map(|(leg, limit)| leg.as_ref().zip(limit));
        known.filter(|(leg, limit)| silence::is_over(leg, *limit)).map(|(leg, _)| socket::abort(leg)).count()
    }

    pub(super) fn end(&self, cut: Cut) {
        self.ticket.cut.store(cut as u8, Ordering::Release);
        if let Some(server) = &self.server {
            socket::abort(server);
        }
        if let Some(client) = &self.client {
            socket::close_both_ways(client);
        }
    }
}
