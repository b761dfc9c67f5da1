//! What everything in a world shares: time, the network, the servers, the judge.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use serde_json::Value;
use trunkline_common::MemberName;
use trunkline_common::dcs::memory::MemoryDcs;
use trunkline_common::dcs::paths::Paths;

use crate::executor::{Executor, SimClock};
use crate::guard::ModelGuard;
use crate::judge::Judge;
use crate::outside::Outside;
use crate::peers::Api;
use crate::scenario::End;
use crate::server::Server;
use crate::sessions::Sessions;
use crate::trouble::Trouble;

/// The stage of one world. Clones are the same one.
#[derive(Clone)]
pub struct Stage(Arc<Inner>);

struct Inner {
    executor: Executor,
    store: MemoryDcs<SimClock>,
    servers: Mutex<Vec<Server>>,
    network: Mutex<Network>,
    judge: Mutex<Judge>,
    apis: Mutex<BTreeMap<usize, Api>>,
    guards: Mutex<BTreeMap<usize, ModelGuard>>,
    trouble: Mutex<Trouble>,
    outside: Mutex<Option<Outside>>,
    sessions: Mutex<Sessions>,
    next: Mutex<u64>,
}

/// Which packets get lost.
#[derive(Debug, Default)]
pub struct Network {
    cut: BTreeMap<(End, End), u32>,
}

impl Network {
    /// One more (or one less) reason why packets from `from` to `to` get lost.
    pub fn cut(&mut self, from: End, to: End, cut: bool) {
        let reasons = self.cut.entry((from, to)).or_default();
        *reasons = if cut { *reasons + 1 } else { reasons.saturating_sub(1) };
    }

    /// Whether packets from `from` reach `to`.
    pub fn open(&self, from: End, to: End) -> bool {
        self.cut.get(&(from, to)).is_none_or(|reasons| *reasons == 0)
    }
}

impl Stage {
    /// A stage without servers.
    pub fn new(executor: Executor, store: MemoryDcs<SimClock>) -> Self {
        Self(Arc::new(Inner {
            executor,
            store,
            servers: Mutex::default(),
            network: Mutex::default(),
            judge: Mutex::default(),
            apis: Mutex::default(),
            guards: Mutex::default(),
            trouble: Mutex::default(),
            outside: Mutex::default(),
            sessions: Mutex::default(),
            next: Mutex::new(0),
        }))
    }

    /// Time and tasks.
    pub fn executor(&self) -> &Executor {
        &self.0.executor
    }

    /// The store, past all faults.
    pub fn store(&self) -> &MemoryDcs<SimClock> {
        &self.0.store
    }

    /// Everything that is checked.
    pub fn judge<T>(&self, look: impl FnOnce(&mut Judge, Duration) -> T) -> T {
        let now = self.0.executor.now();
        look(&mut self.0.judge.lock(), now)
    }

    /// What routers have open to servers.
    pub fn sessions<T>(&self, look: impl FnOnce(&mut Sessions) -> T) -> T {
        look(&mut self.0.sessions.lock())
    }

    /// The network.
    pub fn network<T>(&self, look: impl FnOnce(&mut Network) -> T) -> T {
        look(&mut self.0.network.lock())
    }

    /// Whether a question from `from` to `to` is answered.
    pub fn talks(&self, from: End, to: End) -> bool {
        self.network(|network| network.open(from, to) && network.open(to, from))
    }

    /// All servers.
    pub fn servers<T>(&self, look: impl FnOnce(&mut Vec<Server>) -> T) -> T {
        look(&mut self.0.servers.lock())
    }

    /// The server of a host.
    pub fn server<T>(&self, host: usize, look: impl FnOnce(&mut Server) -> T) -> T {
        look(&mut self.0.servers.lock()[host])
    }

    /// There is a server outside, for a standby cluster to follow.
    pub fn set_outside(&self, outside: Outside) {
        *self.0.outside.lock() = Some(outside);
    }

    /// The server outside, if there is one.
    pub fn outside<T>(&self, look: impl FnOnce(&mut Outside) -> T) -> Option<T> {
        self.0.outside.lock().as_mut().map(look)
    }

    /// Whether this is a standby cluster now.
    pub fn is_standby_cluster(&self) -> bool {
        self.key("config").is_some_and(|config| config["standby_cluster"].is_object())
    }

    /// Something goes wrong for these nodes (`None`: for all), or is over.
    pub fn trouble(&self, whom: &[Option<usize>], begins: bool) {
        let (now, mut trouble) = (self.0.executor.now(), self.0.trouble.lock());
        for whom in whom {
            match begins {
                true => trouble.begins(*whom),
                false => trouble.ends(*whom, now),
            }
        }
    }

    /// For how long a host has been left alone by all faults; the end of its server is not counted as one.
    pub fn quiet_for(&self, host: usize) -> Duration {
        self.0.trouble.lock().quiet_for(host, self.0.executor.now())
    }

    /// The API of a host's agent, if that runs.
    pub fn api(&self, host: usize) -> Option<Api> {
        self.0.apis.lock().get(&host).filter(|api| self.0.executor.is_alive(api.process)).cloned()
    }

    /// An agent has been started.
    pub fn set_api(&self, host: usize, api: Api) {
        let old = self.0.apis.lock().insert(host, api);
        drop(old);
    }

    /// The guard of a host.
    pub fn guard(&self, host: usize) -> Option<ModelGuard> {
        self.0.guards.lock().get(&host).cloned()
    }

    /// A host has been started, and with it its guard.
    pub fn set_guard(&self, host: usize, guard: ModelGuard) {
        let old = self.0.guards.lock().insert(host, guard);
        drop(old);
    }

    /// Lets go of everything.
    pub fn clear(&self) {
        self.0.servers.lock().clear();
        let apis = std::mem::take(&mut *self.0.apis.lock());
        let guards = std::mem::take(&mut *self.0.guards.lock());
        drop((apis, guards));
    }

    /// A number that is given out once in this world.
    pub fn number(&self) -> u64 {
        let mut next = self.0.next.lock();
        *next += 1;
        *next
    }

    /// A random time between so many microseconds.
    pub async fn micros(&self, between: std::ops::Range<u64>) {
        let micros = self.0.executor.random(|rng| rng.random_range(between));
        self.0.executor.sleep(Duration::from_micros(micros)).await;
    }

    /// What one of the cluster's keys says in truth.
    pub fn key(&self, key: &str) -> Option<Value> {
        let entry = self.0.store.peek(&format!("/service/sim/{key}")).entries.into_iter().next()?;
        serde_json::from_slice(&entry.value).ok()
    }

    /// Who holds the leader key in truth.
    pub fn holder(&self) -> Option<String> {
        let key = self.0.store.peek("/service/sim/leader").entries.into_iter().next()?;
        String::from_utf8(key.value).ok()
    }
}

/// The cluster.
pub const SCOPE: &str = "sim";

/// Where the store has the cluster's keys.
pub fn paths() -> Paths {
    Paths::new("service", SCOPE)
}

/// The name of a host's member.
pub fn name(host: usize) -> MemberName {
    MemberName(format!("n{host}"))
}

/// The host of a member's address (`n2`), if it is one.
pub fn host_of(address: &str) -> Option<usize> {
    address.strip_prefix('n')?.parse().ok()
}
