//! What all sessions share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tracing::info;
use trunkline_common::{Clock, Instant, MemberName, SystemClock};
use trunkline_config::router::{Limits, Port};

use crate::cancel::CancelLimit;
use crate::hold::Hold;
use crate::metrics::{Meter, Metrics};
use crate::relay;
use crate::sessions::{Cut, Sessions};
use crate::table::RouteTable;

/// Pipes for streaming, over all threads: a quarter of what an unprivileged user gets.
const PIPES: usize = 256;

/// A router: its knowledge, its sessions, its bounds.
#[derive(Debug)]
pub struct Router {
    /// Bounds.
    pub limits: Limits,
    /// Counters.
    pub metrics: Metrics,
    /// Sessions with a server.
    pub sessions: Arc<Sessions>,
    /// Connections without one.
    pub hold: Hold,
    /// Pipes for streaming.
    pub pipes: relay::Pool,
    /// How many cancel requests are passed on.
    pub cancels: CancelLimit,
    /// The clock.
    pub clock: SystemClock,
    tables: watch::Sender<Arc<RouteTable>>,
    permits: Arc<Semaphore>,
    capacity: u32,
    connections: AtomicUsize,
    draining: watch::Sender<bool>,
    outage: Mutex<Outage>,
}

/// A port, and what is counted for it.
#[derive(Debug, Clone)]
pub struct Listening {
    /// Its settings.
    pub port: Arc<Port>,
    /// Its name.
    pub name: Arc<str>,
    /// Its byte counters.
    pub meter: Meter,
}

/// What the router saw of the last outage.
#[derive(Debug, Default)]
struct Outage {
    /// Since when nobody takes writes; `None` while somebody does, and before anybody ever did.
    since: Option<Instant>,
    /// Who took them last.
    last: Option<MemberName>,
}

impl Router {
    /// A router that knows nothing yet. Fails only if the metrics contradict each other.
    pub fn new(limits: Limits) -> prometheus::Result<Arc<Self>> {
        let capacity = u32::try_from(limits.max_sessions).unwrap_or(u32::MAX).min(Semaphore::MAX_PERMITS as u32).max(1);
        Ok(Arc::new(Self {
            metrics: Metrics::new()?,
            sessions: Arc::new(Sessions::default()),
            hold: Hold::new(limits.max_held, limits.release_rate),
            pipes: relay::Pool::new(PIPES),
            cancels: CancelLimit::default(),
            clock: SystemClock,
            tables: watch::Sender::new(Arc::new(RouteTable::unknown())),
            permits: Arc::new(Semaphore::new(capacity as usize)),
            capacity,
            connections: AtomicUsize::new(0),
            draining: watch::Sender::new(false),
            outage: Mutex::default(),
            limits,
        }))
    }

    /// A port of this router.
    pub fn listening(&self, port: &Port) -> Listening {
        Listening {
            name: port.name.as_str().into(),
            meter: self.metrics.meter(&port.name),
            port: Arc::new(port.clone()),
        }
    }

    /// Where sessions may go, now and from now on.
    pub fn tables(&self) -> watch::Receiver<Arc<RouteTable>> {
        self.tables.subscribe()
    }

    /// Where sessions may go now.
    pub fn table(&self) -> Arc<RouteTable> {
        self.tables.borrow().clone()
    }

    /// A new table is in force: first the sessions of a deposed leader end, then new ones may begin.
    pub fn publish(&self, table: RouteTable) {
        let before = self.table();
        if *before == table {
            return;
        }
        if before.reign != table.reign {
            let ended = self.sessions.set_reign(table.reign.clone());
            let leader = table.reign.as_ref().map(|epoch| &epoch.member);
            info!(leader = leader.map(MemberName::as_str), sessions_ended = ended, "leadership changed");
            self.metrics.leader_changes.inc();
        }
        let leader = table.leader.clone();
        if before.certainty != table.certainty {
            info!(certainty = table.certainty.as_str(), "knowledge of the cluster");
        }
        self.metrics.revision.set(table.revision.0);
        self.metrics.confirmed.set(i64::from(table.certainty == crate::table::Certainty::Confirmed));
        self.tables.send_replace(Arc::new(table));
        self.note_outage(leader.map(|backend| backend.member.clone()));
    }

    fn note_outage(&self, leader: Option<MemberName>) {
        self.metrics.writable.set(i64::from(leader.is_some()));
        let now = self.clock.now();
        let mut outage = self.outage.lock();
        match leader {
            None if outage.last.is_some() && outage.since.is_none() => {
                outage.since = Some(now);
                info!(last = outage.last.as_ref().map(MemberName::as_str), "no server for writes");
            }
            None => {}
            Some(leader) => {
                if let Some(since) = outage.since.take() {
                    let seconds = now.since(since).as_secs_f64();
                    self.metrics.outage_seconds.observe(seconds);
                    self.metrics.last_outage.set(seconds);
                    info!(leader = leader.as_str(), seconds, "a server for writes again");
                } else if outage.last.as_ref() != Some(&leader) {
                    info!(leader = leader.as_str(), "server for writes");
                }
                outage.last = Some(leader);
            }
        }
    }

    /// The right to serve one more connection; waits for it. `None` once the router drains.
    pub async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        let mut draining = self.draining.subscribe();
        tokio::select! {
            biased;
            _ = draining.wait_for(|draining| *draining) => None,
            permit = self.permits.clone().acquire_owned() => permit.ok(),
        }
    }

    /// The same, if there is one now, also while the router drains.
    pub fn try_permit(&self) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().try_acquire_owned().ok()
    }

    /// Returns once the router drains.
    pub async fn drain_begun(&self) {
        // An error would mean that the sender, which is part of `self`, is gone.
        let _ = self.draining.subscribe().wait_for(|draining| *draining).await;
    }

    /// Whether the router drains.
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Accepts nothing more, waits until every connection has ended but no longer than `limit`, then ends the rest.
    /// Returns how many had to be ended.
    pub async fn drain(&self, limit: Duration) -> usize {
        self.draining.send_replace(true);
        info!(connections = self.connections(), ?limit, "draining");
        match tokio::time::timeout(limit, self.permits.acquire_many(self.capacity)).await {
            Ok(_) => 0,
            Err(_) => self.sessions.end_all(Cut::Drained),
        }
    }

    /// Connections accepted and not over, with or without a server.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Counts one more of them, until it is dropped.
    pub fn connection(&self) -> Connection<'_> {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Connection(&self.connections)
    }
}

/// See [`Router::connection`].
#[derive(Debug)]
pub struct Connection<'a>(&'a AtomicUsize);

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
