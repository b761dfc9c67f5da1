//! Which sessions there are, whose they are, and the one place that ends them from outside.
//!
//! A session is registered before the first byte of its client reaches the server, under the same lock that a change of
//! leadership takes. So there is no moment in which a session of a deposed leader could slip through: either it is found
//! and ended, or it is refused. Its client is registered once the server has answered; until then the client has no
//! state, is not touched, and can be sent elsewhere.
//!
//! Ending means shutting down both sockets, which needs nothing of the server, nor of the thread that relays: a frozen
//! host with a healthy-looking connection makes no difference. The relay notices by itself and cleans up.

mod handle;
mod live;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use trunkline_common::{Instant, MemberName, Revision};

pub use self::handle::{Call, Session};
use self::live::Live;
pub use self::live::{Cut, Line, Silence};
use crate::handover::Leaving;
use crate::port::Peer;
use crate::socket::Connection;
use crate::table::{Backend, Epoch};

/// Sessions that are looked at under one lock.
const LOOK: usize = 64;

/// All sessions that have a server.
#[derive(Debug, Default)]
pub struct Sessions {
    inner: Mutex<Inner>,
    /// Sessions shall go to the next process.
    leaving: AtomicBool,
    /// The router is about to end: sessions shall end as soon as they can.
    closing: AtomicBool,
    /// The first one has begun, or come back, since somebody asked for those.
    stirs: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    reign: Option<Epoch>,
    /// The leader key that it goes with, where the DCS has shown it.
    key: Option<Revision>,
    /// Who proved last that it leads, and until when that is good for.
    word: Option<(MemberName, Instant)>,
    /// The leader has said that it is about to stop.
    resigns: bool,
    next: u64,
    live: HashMap<u64, Box<Live>>,
    /// `None`: nobody asks for them.
    fresh: Option<Fresh>,
    /// Sessions by the key that cancels them, as far as it is known.
    keys: HashMap<Arc<[u8]>, u64>,
    load: HashMap<MemberName, usize>,
    /// Where sessions go that leave.
    exit: Option<mpsc::Sender<Leaving>>,
}

/// Sessions that have begun, or come back, lately.
#[derive(Debug, Default)]
struct Fresh {
    /// Since it was last asked for them.
    now: Vec<u64>,
    /// Before that, but after the time before.
    before: Vec<u64>,
}

/// What a session is registered as.
#[derive(Debug, Clone)]
pub struct Registered {
    /// The port it came by.
    pub port: Arc<str>,
    /// The client.
    pub client: Peer,
    /// The server.
    pub backend: Arc<Backend>,
    /// For a session of a leader: what is known of its reign. Epochs themselves mean something in one process only.
    pub reign: Option<Reign>,
    /// What cancels it.
    pub key: Option<Arc<[u8]>>,
}

/// What one process tells the next of the reign that a session belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reign {
    /// When the leader key was created, where the DCS has shown it.
    pub key: Option<Revision>,
    /// The leader has proved over its REST API that it leads, and that is good until then.
    pub proven: Option<Instant>,
}

impl Sessions {
    /// Registers a session; `None` if its server has stopped being the leader it was chosen as, or is about to.
    pub fn begin(
        self: &Arc<Self>,
        port: &Arc<str>,
        peer: Peer,
        backend: &Arc<Backend>,
        server: &Arc<TcpStream>,
        now: Instant,
    ) -> Option<Session> {
        let mut inner = self.inner.lock();
        if backend.epoch.is_some() && (backend.epoch != inner.reign || inner.resigns) {
            return None;
        }
        // Chosen as a standby, promoted since: from now on a session of the leader.
        let epoch = inner.reign.clone().filter(|reign| reign.member == backend.member);
        let live = Live::new(port, peer, backend, epoch, server, now);
        Some(self.register(&mut inner, live))
    }

    /// Registers a session of another process, with its client; `None` if it is not certain that its server is still the leader that
    /// the other process knew it as. The leader is that if the key is the same, or if it has proved to the other process a moment ago
    /// that it leads; and if the DCS is not heard here, so that the leader was found by its own word, as it is while one process
    /// goes through the same. In each case it leads *now*, by what is known here, and the other process has not heard of anybody else.
    pub fn adopt(
        self: &Arc<Self>,
        registered: &Registered,
        client: &Arc<TcpStream>,
        server: &Arc<TcpStream>,
        now: Instant,
    ) -> Option<Session> {
        let mut inner = self.inner.lock();
        let backend = &registered.backend;
        let epoch = inner.reign.clone().filter(|reign| reign.member == backend.member);
        if let Some(reign) = registered.reign {
            let proven = reign.proven.is_some_and(|until| now < until);
            let same = inner.key.is_none() || reign.key == inner.key || proven;
            epoch.as_ref().filter(|_| same)?;
        }
        let mut live = Live::new(&registered.port, registered.client, backend, epoch, server, now);
        live.ticket.resign.store(inner.resigns && live.epoch.is_some(), Ordering::Release);
        live.client = Some(Connection::Watched(client.clone()));
        let session = self.register(&mut inner, live);
        inner.note_fresh(session.id, &self.stirs);
        Some(session)
    }

    fn register(self: &Arc<Self>, inner: &mut Inner, live: Box<Live>) -> Session {
        let (id, ticket) = (inner.next, live.ticket.clone());
        inner.next += 1;
        *inner.load.entry(live.backend.member.clone()).or_default() += 1;
        inner.live.insert(id, live);
        Session { id, ticket, sessions: self.clone() }
    }

    /// From now on only sessions of `reign` may talk to a leader; ends those of any other, and says how many.
    pub fn set_reign(&self, reign: Option<Epoch>, key: Option<Revision>) -> usize {
        let mut inner = self.inner.lock();
        inner.key = key;
        if inner.reign == reign {
            return 0;
        }
        (inner.reign, inner.resigns) = (reign, false);
        let Inner { reign, live, .. } = &mut *inner;
        let mut ended = 0;
        for session in live.values_mut() {
            match (&session.epoch, &reign) {
                (Some(own), reign) if Some(own) != reign.as_ref() => {
                    session.end(Cut::LeaderChanged);
                    ended += 1;
                }
                (None, Some(reign)) if reign.member == session.backend.member => session.epoch = Some(reign.clone()),
                _ => {}
            }
        }
        ended
    }

    /// The leader key that the reign goes with from now on, where the DCS has shown it.
    pub fn set_key(&self, key: Option<Revision>) {
        self.inner.lock().key = key;
    }

    /// Who has proved last that it leads, and until when that is good for.
    pub fn set_word(&self, word: Option<(MemberName, Instant)>) {
        self.inner.lock().word = word;
    }

    /// Whether the leader is about to stop: if so, its sessions are asked to end as soon as they can. Says how many are, if
    /// that is new.
    pub fn set_resigns(&self, resigns: bool) -> Option<usize> {
        let mut inner = self.inner.lock();
        if inner.resigns == resigns {
            return None;
        }
        inner.resigns = resigns;
        let reign = inner.reign.clone();
        let of_leader = inner.all().filter(|live| live.epoch.is_some() && live.epoch == reign);
        let asked = |live: &Live| {
            live.ticket.resign.store(resigns, Ordering::Release);
            live.ticket.waker.wake();
        };
        Some(of_leader.map(asked).count()).filter(|_| resigns)
    }

    /// Asks those to settle that have begun, or come back, before the last time. `false`: nobody has since.
    pub fn settle_fresh(&self) -> bool {
        let mut inner = self.inner.lock();
        let fresh = inner.fresh.get_or_insert_default();
        let recent = std::mem::take(&mut fresh.now);
        let more = !recent.is_empty();
        let due = std::mem::replace(&mut fresh.before, recent);
        for live in due.iter().filter_map(|id| inner.live.get(id)) {
            if !matches!(live.server, Some(Connection::Watched(_))) {
                continue;
            }
            live.ticket.settle.store(true, Ordering::Release);
            live.ticket.waker.wake();
        }
        more
    }

    /// Returns when some session has begun, or come back, since this returned last.
    pub async fn stirred(&self) {
        self.stirs.notified().await;
    }

    /// Ends the sessions of a port on a member that `is_over` says yes to, and says how many.
    pub fn end_where(&self, cut: Cut, is_over: impl Fn(&str, &MemberName) -> bool) -> usize {
        let inner = self.inner.lock();
        let over =
            |live: &&Live| live.ticket.cut.load(Ordering::Acquire) == 0 && is_over(&live.port, &live.backend.member);
        inner.all().filter(over).map(|session| session.end(cut)).count()
    }

    /// Gives up clients and servers that do not answer any more, each after as long as `limits` says for the session's port. Says
    /// of one session after the other how many of its two those are; between sessions nothing is locked.
    pub fn give_up_silent(&self, limits: impl Fn(&str) -> Silence) -> impl Iterator<Item = usize> {
        self.look(move |live| live.give_up_silent(limits(&live.port)))
    }

    /// From now on every session that can leave goes to `exit`.
    pub fn leave(&self, exit: mpsc::Sender<Leaving>) {
        let mut inner = self.inner.lock();
        inner.exit = Some(exit);
        self.leaving.store(true, Ordering::Release);
        inner.live.values().for_each(|live| live.ticket.waker.wake());
    }

    /// From now on none does.
    pub fn stay(&self) {
        let mut inner = self.inner.lock();
        inner.exit = None;
        self.leaving.store(false, Ordering::Release);
    }

    /// Asks every session to end as soon as it can, and says how many there are.
    pub fn close(&self) -> usize {
        let inner = self.inner.lock();
        self.closing.store(true, Ordering::Release);
        inner.live.values().for_each(|live| live.ticket.waker.wake());
        inner.live.len()
    }

    /// Ends every session, and says how many.
    pub fn end_all(&self, cut: Cut) -> usize {
        let inner = self.inner.lock();
        inner.live.values().for_each(|session| session.end(cut));
        inner.live.len()
    }

    /// How many sessions `member` has through this router.
    pub fn load(&self, member: &MemberName) -> usize {
        self.inner.lock().load.get(member).copied().unwrap_or(0)
    }

    /// Sessions by member, those without any included once they had one.
    pub fn loads(&self) -> Vec<(MemberName, usize)> {
        let inner = self.inner.lock();
        let mut loads: Vec<_> = inner.load.iter().map(|(member, load)| (member.clone(), *load)).collect();
        loads.sort();
        loads
    }

    /// The server of the session that this key cancels, if it is one of this router's, and known.
    pub fn holder(&self, key: &[u8]) -> Option<Arc<Backend>> {
        let inner = self.inner.lock();
        inner.live.get(inner.keys.get(key)?).map(|live| live.backend.clone())
    }

    /// The servers that `port` has sessions on.
    pub fn backends_of(&self, port: &str) -> Vec<Arc<Backend>> {
        let inner = self.inner.lock();
        let mut found: Vec<Arc<Backend>> = Vec::new();
        for live in inner.live.values().filter(|live| *live.port == *port) {
            if !found.iter().any(|known| known.host == live.backend.host && known.port == live.backend.port) {
                found.push(live.backend.clone());
            }
        }
        found
    }

    /// Up to `limit` of the sessions that `wanted` says yes to, and how many more there are.
    pub fn list(&self, limit: usize, wanted: impl Fn(&Line) -> bool) -> (Vec<Line>, usize) {
        let (mut lines, mut more) = (Vec::new(), 0);
        for line in self.look(Live::line).filter(wanted) {
            if lines.len() < limit {
                lines.push(line);
            } else {
                more += 1;
            }
        }
        (lines, more)
    }

    /// What `see` sees of each session. Some at a time, so that nobody waits for the lock until all have been seen.
    fn look<T>(&self, see: impl Fn(&Live) -> T) -> impl Iterator<Item = T> {
        let ids: Vec<u64> = self.inner.lock().live.keys().copied().collect();
        let chunks = (0..ids.len()).step_by(LOOK);
        chunks.flat_map(move |from| {
            let inner = self.inner.lock();
            let some = ids[from..].iter().take(LOOK);
            some.filter_map(|id| inner.live.get(id)).map(|live| see(live)).collect::<Vec<T>>()
        })
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.inner.lock().live.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many sessions each port has on each member.
    pub fn by_port(&self) -> BTreeMap<(Arc<str>, MemberName), usize> {
        let mut counts = BTreeMap::new();
        for key in self.look(|live| (live.port.clone(), live.backend.member.clone())) {
            *counts.entry(key).or_default() += 1;
        }
        counts
    }
}

impl Inner {
    fn note_fresh(&mut self, id: u64, stirs: &Notify) {
        let Some(fresh) = &mut self.fresh else { return };
        if fresh.now.is_empty() {
            stirs.notify_one();
        }
        fresh.now.push(id);
    }

    fn all(&self) -> impl Iterator<Item = &Live> {
        self.live.values().map(|live| &**live)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    #[tokio::test]
    async fn whoever_looks_at_all_sessions_keeps_nobody_from_beginning_one() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Arc::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let sessions = Arc::new(Sessions::default());
        let backend = Arc::new(Backend::at("a".into(), "10.0.0.1".into(), 5432));
        let begin = || sessions.begin(&"ro".into(), Peer::Unix, &backend, &server, at(10)).unwrap();
        let _there: Vec<Session> = (0..3 * LOOK).map(|_| begin()).collect();
        let (lines, more) = sessions.list(LOOK + 1, |_| {
            assert!(sessions.inner.try_lock().is_some());
            drop(begin());
            true
        });
        assert_eq!((lines.len(), more), (LOOK + 1, 2 * LOOK - 1));
        assert_eq!(sessions.by_port(), [(("ro".into(), "a".into()), 3 * LOOK)].into());
    }

    #[tokio::test]
    async fn only_a_leader_that_is_still_the_same_keeps_the_sessions_of_another_process() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Arc::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let server = Arc::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let epoch = |member: &str, created| Some(Epoch { member: member.into(), created: Revision(created) });
        let key = |created| Some(Revision(created));
        let told = |key, proven| Some(Reign { key, proven });
        for (reign, own_key, told, taken, why) in [
            (epoch("a", 7), key(7), told(key(7), None), true, "the same key"),
            (epoch("a", 5), key(7), told(key(7), None), true, "the same key, whatever the epoch is called here"),
            (epoch("a", 7), key(7), told(key(5), None), false, "another key of the same member"),
            (epoch("a", 7), key(7), told(key(5), Some(at(11))), true, "it took its key anew and led all the time"),
            (epoch("a", 7), key(7), told(key(5), Some(at(10))), false, "that it did so is too long ago"),
            (epoch("a", 7), key(7), told(None, None), false, "nothing is known of the key"),
            (epoch("a", 7), key(7), told(None, Some(at(11))), true, "but it has just proved itself"),
            (epoch("a", 0), None, told(key(5), None), true, "it has proved itself here"),
            (epoch("a", 0), None, told(None, None), true, "to both"),
            (epoch("b", 0), None, told(key(5), Some(at(11))), false, "another one has proved itself here"),
            (epoch("b", 7), key(7), told(key(7), Some(at(11))), false, "another one leads"),
            (None, None, told(key(7), Some(at(11))), false, "nobody leads"),
            (None, None, None, true, "a standby's"),
            (epoch("a", 7), key(7), None, true, "a standby's that leads by now"),
        ] {
            let sessions = Arc::new(Sessions::default());
            sessions.set_reign(reign.clone(), own_key);
            let backend = Arc::new(Backend::at("a".into(), "10.0.0.1".into(), 5432));
            let registered = Registered { port: "rw".into(), client: Peer::Unix, backend, reign: told, key: None };
            let session = sessions.adopt(&registered, &client, &server, at(10));
            assert_eq!(session.is_some(), taken, "{why}");
            // And from then on it is one like any other.
            let of_leader = taken && reign.is_some();
            assert_eq!(sessions.set_reign(epoch("c", 8), key(8)), usize::from(of_leader), "{why}");
        }
    }
}
