//! A port as it runs: its settings, which may be replaced, and what is counted for it.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use trunkline_common::Instant;
use trunkline_config::router::Port;

use crate::crypto::Crypto;
use crate::hold::Pace;
use crate::places::Places;

/// A port of this router.
#[derive(Debug)]
pub struct Listening {
    /// Its name.
    pub name: Arc<str>,
    /// Connections at once.
    pub places: Arc<Places>,
    /// Connections of each client address.
    pub clients: Arc<Clients>,
    /// Those of them that are too many, until they have been told so.
    pub excess: Arc<Clients>,
    /// Read and changed together: what the settings promise takes the certificates.
    terms: RwLock<(Arc<Port>, Arc<Crypto>)>,
    pace: Mutex<Pace>,
    turn: AtomicUsize,
}

impl Listening {
    /// With the settings of `port`, and what belongs to them.
    pub fn new(port: Port, crypto: Crypto) -> Arc<Self> {
        Arc::new(Self {
            name: port.name.as_str().into(),
            places: Places::new(port.max_sessions.unwrap_or(usize::MAX)),
            clients: Arc::default(),
            excess: Arc::default(),
            pace: Mutex::new(Pace::new(port.accept_rate.unwrap_or(0))),
            turn: AtomicUsize::new(0),
            terms: RwLock::new((Arc::new(port), Arc::new(crypto))),
        })
    }

    /// Its settings now.
    pub fn settings(&self) -> Arc<Port> {
        self.terms.read().0.clone()
    }

    /// Its settings now, and the certificates that belong to them. A connection keeps those it was accepted under.
    pub fn terms(&self) -> (Arc<Port>, Arc<Crypto>) {
        self.terms.read().clone()
    }

    /// Other settings, from now on.
    pub fn set(&self, port: Port, crypto: Crypto) {
        self.places.resize(port.max_sessions.unwrap_or(usize::MAX));
        self.pace.lock().set_rate(port.accept_rate.unwrap_or(0));
        *self.terms.write() = (Arc::new(port), Arc::new(crypto));
    }

    /// When the next connection may be accepted, if not at once.
    pub fn accept_at(&self, now: Instant) -> Option<Instant> {
        Some(self.pace.lock().turn(now)).filter(|turn| *turn > now)
    }

    /// The next number of a round.
    pub fn turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }
}

/// Who is at the other end of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// By TCP, from this address.
    Tcp(SocketAddr),
    /// By a unix socket.
    Unix,
}

impl Peer {
    /// The address, without the port.
    pub fn ip(self) -> Option<IpAddr> {
        match self {
            Peer::Tcp(address) => Some(address.ip().to_canonical()),
            Peer::Unix => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            Peer::Unix => f.write_str("unix"),
        }
    }
}

/// How many connections each client address has. Those by unix socket count as one client.
#[derive(Debug, Default)]
pub struct Clients {
    counts: Mutex<HashMap<Option<IpAddr>, usize>>,
}

/// One connection of a client address; dropping it ends the count.
#[derive(Debug)]
pub struct Counted {
    clients: Arc<Clients>,
    ip: Option<IpAddr>,
}

impl Clients {
    /// Counts one more, unless there are `limit` already.
    pub fn enter(self: &Arc<Self>, ip: Option<IpAddr>, limit: usize) -> Option<Counted> {
        let mut counts = self.counts.lock();
        let count = counts.entry(ip).or_default();
        // An entry that was just made has a place: limits are at least 1.
        if *count >= limit.max(1) {
            return None;
        }
        *count += 1;
        Some(Counted { clients: self.clone(), ip })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.clients.counts.lock();
        if let Some(count) = counts.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.ip);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use trunkline_config::router::{Listen, ServerTls, ServerTlsMode, Target};

    use super::*;

    #[test]
    fn settings_are_never_seen_with_the_certificates_of_others() {
        let plain = Port::new("rw", Listen::Tcp("127.0.0.1:0".into()), Target::Leader);
        let tls = ServerTls { mode: ServerTlsMode::Require, cafile: None, certfile: None, keyfile: None };
        let tls = Port { server_tls: Some(tls), ..plain.clone() };
        let [plain, tls] = [plain, tls].map(|port| (Crypto::of(&port).unwrap(), port));
        let listening = Listening::new(plain.1.clone(), plain.0.clone());
        std::thread::scope(|scope| {
            let reloads = || {
                (0..20_000).for_each(|_| {
                    [&tls, &plain].into_iter().for_each(|(crypto, port)| listening.set(port.clone(), crypto.clone()))
                })
            };
            let reloads = scope.spawn(reloads);
            while !reloads.is_finished() {
                let (port, crypto) = listening.terms();
                assert_eq!(port.server_tls.is_some(), crypto.connects());
            }
        });
    }

    #[test]
    fn clients_are_counted_by_address_and_forgotten() {
        let clients = Arc::new(Clients::default());
        let ip = |text: &str| Some(text.parse().unwrap());
        let first = clients.enter(ip("10.0.0.1"), 1);
        assert!(first.is_some());
        assert!(clients.enter(ip("10.0.0.1"), 1).is_none());
        assert!(clients.enter(ip("10.0.0.2"), 1).is_some());
        assert!(clients.enter(None, 1).is_some());
        drop(first);
        assert!(clients.counts.lock().is_empty());
        assert!(clients.enter(ip("10.0.0.1"), 1).is_some());
    }

    #[test]
    fn an_address_is_the_same_by_both_versions_of_ip() {
        let mapped = Peer::Tcp("[::ffff:10.0.0.1]:5".parse().unwrap());
        assert_eq!(mapped.ip(), Peer::Tcp("10.0.0.1:6".parse().unwrap()).ip());
        assert_eq!((mapped.to_string(), Peer::Unix.to_string()), ("[::ffff:10.0.0.1]:5".into(), "unix".into()));
    }
}
