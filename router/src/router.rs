//! What all sessions share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tracing::info;
use trunkline_common::{Clock, Instant, MemberName, SystemClock};
use trunkline_config::router::{Limits, Port};

use crate::cancel::CancelLimit;
use crate::crypto::Crypto;
use crate::hold::Hold;
use crate::lag::Measured;
use crate::metrics::Metrics;
use crate::names::Names;
use crate::places::Places;
use crate::port::Listening;
use crate::registration::Registration;
use crate::relay;
use crate::sessions::{Cut, Sessions};
use crate::table::RouteTable;

/// Pipes for streaming, over all threads: a quarter of what an unprivileged user gets.
const PIPES: usize = 256;

/// How long sessions have to end by themselves once the time for draining is over.
const LAST_CALL: Duration = Duration::from_millis(500);

/// A router: its knowledge, its sessions, its bounds.
#[derive(Debug)]
pub struct Router {
    /// Counters.
    pub metrics: Metrics,
    /// Sessions with a server.
    pub sessions: Arc<Sessions>,
    /// All connections, with a server or without.
    pub places: Arc<Places>,
    /// Connections without one.
    pub hold: Hold,
    /// Connections to a server that does not lead yet.
    pub ahead: Arc<Places>,
    /// Pipes for streaming.
    pub pipes: relay::Pool,
    /// Threads for sessions that just talk, where there are any.
    pub lean: relay::Lean,
    /// How a new leader learns of this router.
    pub registration: Registration,
    /// How many cancel requests are passed on.
    pub cancels: CancelLimit,
    /// Where servers are that are known by name.
    pub names: Arc<Names>,
    /// The clock.
    pub clock: SystemClock,
    /// What members say of their positions, where a port has to know.
    pub measured: watch::Sender<Arc<Measured>>,
    limits: RwLock<Limits>,
    ports: RwLock<BTreeMap<String, Arc<Listening>>>,
    tables: watch::Sender<Arc<RouteTable>>,
    draining: watch::Sender<Draining>,
    outage: Mutex<Outage>,
    config_trouble: Mutex<Option<String>>,
}

/// What the router does not do any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Draining {
    /// Everything is done.
    No,
    /// Accept, as the next process does that.
    HandedOver,
    /// That, and hold.
    Refusing,
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
        Ok(Arc::new(Self {
            metrics: Metrics::new()?,
            sessions: Arc::new(Sessions::default()),
            places: Places::new(limits.max_sessions),
            hold: Hold::new(limits.max_held, limits.release_rate),
            ahead: Places::new(limits.max_ahead),
            pipes: relay::Pool::new(PIPES),
            lean: relay::Lean::default(),
            registration: Registration::default(),
            cancels: CancelLimit::default(),
            names: Arc::default(),
            clock: SystemClock,
            measured: watch::Sender::default(),
            limits: RwLock::new(limits),
            ports: RwLock::default(),
            tables: watch::Sender::new(Arc::new(RouteTable::unknown())),
            draining: watch::Sender::new(Draining::No),
            outage: Mutex::default(),
            config_trouble: Mutex::default(),
        }))
    }

    /// Bounds.
    pub fn limits(&self) -> Limits {
        *self.limits.read()
    }

    /// Other bounds, from now on. Nothing that has a place loses it.
    pub fn set_limits(&self, limits: Limits) {
        self.places.resize(limits.max_sessions);
        self.ahead.resize(limits.max_ahead);
        self.hold.resize(limits.max_held, limits.release_rate);
        *self.limits.write() = limits;
    }

    /// A new port of this router, or the one of this name with other settings.
    pub fn listening(&self, port: &Port, crypto: Crypto) -> Arc<Listening> {
        let mut ports = self.ports.write();
        if let Some(listening) = ports.get(&port.name) {
            listening.set(port.clone(), crypto);
            return listening.clone();
        }
        let listening = Listening::new(port.clone(), crypto);
        ports.insert(port.name.clone(), listening.clone());
        listening
    }

    /// A port that this router does not listen on any more.
    pub fn forget(&self, port: &str) {
        self.ports.write().remove(port);
    }

    /// The port of this name.
    pub fn port(&self, name: &str) -> Option<Arc<Listening>> {
        self.ports.read().get(name).cloned()
    }

    /// The ports of this router, by name.
    pub fn ports(&self) -> Vec<Arc<Listening>> {
        self.ports.read().values().cloned().collect()
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
            let ended = self.sessions.set_reign(table.reign.clone(), table.key);
            let leader = table.reign.as_ref().map(|epoch| &epoch.member);
            info!(leader = leader.map(MemberName::as_str), sessions_ended = ended, "leadership changed");
            if table.reign.is_some() {
                self.metrics.leader_changes.inc();
            }
        }
        self.sessions.set_key(table.key);
        if let Some(asked) = self.sessions.set_resigns(table.resigns) {
            let leader = table.reign.as_ref().map(|epoch| epoch.member.as_str());
            info!(leader, sessions = asked, "the leader is about to stop");
            self.metrics.resignations.inc();
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

    /// What is wrong with the configuration file, if it is not the one in force.
    pub fn config_trouble(&self) -> Option<String> {
        self.config_trouble.lock().clone()
    }

    /// The file has been read again.
    pub fn set_config_trouble(&self, trouble: Option<String>) {
        self.metrics.config_refused.set(i64::from(trouble.is_some()));
        *self.config_trouble.lock() = trouble;
    }

    /// Returns once the router accepts nothing more.
    pub async fn drain_begun(&self) {
        self.drained_to(Draining::HandedOver).await;
    }

    /// Returns once the router serves nobody who has no server.
    pub async fn refusing(&self) {
        self.drained_to(Draining::Refusing).await;
    }

    /// Returns once the next process is in charge.
    pub async fn handed_over(&self) {
        let _ = self.draining.subscribe().wait_for(|now| *now == Draining::HandedOver).await;
    }

    async fn drained_to(&self, least: Draining) {
        // An error would mean that the sender, which is part of `self`, is gone.
        let _ = self.draining.subscribe().wait_for(|now| *now >= least).await;
    }

    /// Whether the router drains.
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow() > Draining::No
    }

    /// Accepts nothing more, waits until every connection has ended but no longer than `limit`, if there is one, then ends the rest: those
    /// between two transactions are told so. With `keep_held` those that wait for a server go on waiting. Returns how many sessions had to be ended.
    pub async fn drain(&self, limit: Option<Duration>, keep_held: bool) -> usize {
        let how_far = if keep_held { Draining::HandedOver } else { Draining::Refusing };
        self.draining.send_modify(|now| *now = how_far.max(*now));
        info!(connections = self.connections(), ?limit, "draining");
        let over = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.places.empty() => return 0,
            () = over => {}
        }
        let asked = self.sessions.close();
        if asked > 0 {
            let _ = tokio::time::timeout(LAST_CALL, self.places.empty()).await;
            self.sessions.end_all(Cut::Drained);
        }
        asked
    }

    /// Connections accepted and not over, with or without a server.
    pub fn connections(&self) -> usize {
        self.places.taken()
    }
}
