//! One world, from its first moment to its verdict.

mod checks;
mod faults;
pub(crate) mod promises;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use trunkline_agent::ha::{Ha, Parts};
use trunkline_agent::node::Board;
use trunkline_common::cluster::Initialize;
use trunkline_common::dcs::codec;
use trunkline_common::dcs::follow::{Follower, Knowledge};
use trunkline_common::dcs::memory::MemoryDcs;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::{Clock, ClusterView, MemberName, Revision};
use trunkline_config::{Env, Local, PostgresConfig, Settings};

use crate::clients::{self, Router, Seen};
use crate::executor::{Drift, Executor, Livelock, ProcessId, SimClock};
use crate::guard::ModelGuard;
use crate::outside;
use crate::peers::{Api, ModelPeers};
use crate::postgres::ModelPostgres;
use crate::reader::{self, Reader};
use crate::scenario::{End, Fault, Scenario};
use crate::server::Server;
use crate::stage::{Stage, name, paths};

/// What became of a world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What must not have happened; empty: all is well.
    pub violations: Vec<String>,
    /// How often somebody began to take writes.
    pub reigns: u64,
    /// Acknowledged writes.
    pub acked: usize,
    /// Steps of tasks.
    pub polls: u64,
    /// The same for the same world.
    pub fingerprint: u64,
    /// From the end of the last fault to a leader that takes writes, and to everybody following it.
    pub healed: Option<(Duration, Duration)>,
    /// The longest time without a write through a router.
    pub longest_outage: Duration,
}

/// Runs a scenario to its end.
pub fn run(scenario: &Scenario) -> Report {
    let world = World::new(scenario);
    let calm = Duration::from_millis(scenario.calm_at);
    let mut ended = world.go_on(calm);
    let mut healed = (None, None);
    let patience = scenario.patience();
    while ended.is_ok() && world.stage.judge(|judge, _| judge.violations.is_empty()) {
        let since = world.stage.executor().now() - calm;
        let (leads, unwell) = world.unwell();
        if leads {
            healed.0.get_or_insert(since);
        }
        // A cluster that is being made on a slow disk takes its time.
        let made = || matches!(world.view().initialize, Initialize::Done(_));
        if healed.0.is_none() && since > scenario.patience_for_a_leader() && made() {
            world.show();
            let why = unwell.clone().unwrap_or_default();
            world.stage.judge(|judge, now| {
                judge.violation(now, format!("nobody leads {since:?} after the last fault: {why}"))
            });
        }
        match unwell {
            None => {
                healed.1 = Some(since);
                break;
            }
            Some(why) if since > patience => {
                world.show();
                world.stage.judge(|judge, now| {
                    judge.violation(now, format!("not whole {since:?} after the last fault: {why}"))
                });
            }
            Some(_) => ended = world.go_on(calm + since + Duration::from_millis(250)),
        }
    }
    if ended.is_ok() && healed.1.is_some() {
        ended = world.final_checks();
    }
    if let Err(Livelock(why)) = ended {
        world.stage.judge(|judge, now| judge.violation(now, why));
    }
    let longest_outage = world.seen.lock().longest;
    let report = world.stage.judge(|judge, _| Report {
        violations: judge.violations.clone(),
        reigns: judge.reigns,
        acked: judge.acked.len(),
        polls: 0,
        fingerprint: 0,
        healed: healed.0.zip(healed.1),
        longest_outage,
    });
    let (polls, fingerprint) = (world.stage.executor().polls(), world.stage.executor().fingerprint());
    world.end();
    Report { polls, fingerprint, ..report }
}

/// A host and what belongs to it.
struct Host {
    drift: Drift,
    wall_offset: Arc<AtomicI64>,
    local: Local,
    /// Its connection to the store.
    link: Option<MemoryDcs<SimClock>>,
    slow_dcs: (Duration, Duration),
    slow_watch: Duration,
    agent: Option<Agent>,
    /// Reasons why it stands still, and why it is down.
    frozen: u32,
    down: u32,
}

struct Agent {
    process: ProcessId,
    stop: watch::Sender<bool>,
    /// The keeper ends with it.
    _keeper: Arc<watch::Sender<bool>>,
}

/// A router and its connection to the store.
type Connected = (Router, MemoryDcs<SimClock>);

#[derive(Clone)]
struct World {
    stage: Stage,
    scenario: Arc<Scenario>,
    /// Where events and clients live.
    process: ProcessId,
    hosts: Arc<Mutex<Vec<Host>>>,
    routers: Arc<Mutex<Vec<Connected>>>,
    seen: Arc<Mutex<Seen>>,
    /// The store itself is gone: 1 silent, 2 refusing.
    dcs_down: Arc<Mutex<(u32, u32)>>,
    frozen: Arc<Mutex<BTreeMap<ProcessId, u32>>>,
    /// Who reads a logical slot, if there is one.
    reader: Option<Arc<Mutex<Reader>>>,
    /// Who holds the leader key, and the revision that gave it.
    leads: watch::Sender<Option<(MemberName, Revision)>>,
}

/// The files of the nodes, read once.
static LOCALS: LazyLock<Vec<Local>> = LazyLock::new(|| (0..5).map(local).collect());

fn local(host: usize) -> Local {
    let text = format!(
        "scope: sim\nname: n{host}\nrestapi: {{listen: '127.0.0.1:8008', connect_address: 'n{host}:8008'}}\n\
         etcd3: {{hosts: 'dcs:2379'}}\nbootstrap: {{dcs: {{}}}}\n\
         postgresql: {{listen: '127.0.0.1:5432', connect_address: 'n{host}:5432', data_dir: /nowhere/n{host}, \
         authentication: {{superuser: {{username: s, password: s}}, replication: {{username: replicator, password: r}}}}}}\n"
    );
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("node.yml");
    std::fs::write(&path, text).expect("a temporary file");
    match Local::load(Some(&path), &Env::default()) {
        Ok((local, _)) => local,
        Err(errors) => panic!("the simulation's own configuration: {errors}"),
    }
}

impl World {
    fn new(scenario: &Scenario) -> Self {
        let executor = Executor::new(scenario.seed);
        let process = executor.process("world");
        let dcs = executor.process("dcs");
        let store = MemoryDcs::new(SimClock::new(&executor, dcs, Drift::default(), Arc::default()));
        let stage = Stage::new(executor, store);
        stage.judge(|judge, _| {
            judge.keeps_all = scenario.always_synchronous();
            judge.strict = scenario.always_strict();
            judge.lag_allowed = scenario.largest_lag();
            judge.keeps_slots = !scenario.nodes.iter().any(|node| node.tags.contains_key("nostream"));
            judge.pauses = scenario.events.iter().any(|event| matches!(event.what, Fault::Pause { .. }));
        });
        let world = Self {
            stage,
            scenario: Arc::new(scenario.clone()),
            process,
            hosts: Arc::default(),
            routers: Arc::default(),
            seen: Arc::default(),
            dcs_down: Arc::default(),
            frozen: Arc::default(),
            reader: scenario.logical_slot().map(|slot| Arc::new(Mutex::new(Reader::new(slot)))),
            leads: watch::Sender::default(),
        };
        if scenario.settings["standby_cluster"].is_object() {
            outside::start(&world.stage, process);
        }
        for host in 0..scenario.nodes.len() {
            world.add_host(host);
        }
        for router in 0..scenario.routers {
            world.add_router(router);
        }
        if let (Some(reader), Some((router, _))) = (&world.reader, world.routers.lock().first()) {
            reader::start(&world.stage, (0, router.process), router.tables.clone(), reader.clone());
        }
        for host in 0..scenario.nodes.len() {
            clients::direct(&world.stage, process, host);
        }
        world.watch_store();
        for event in scenario.events.clone() {
            let acting = world.clone();
            world.stage.executor().spawn(process, async move { acting.carry_out(event).await });
        }
        world
    }

    fn go_on(&self, until: Duration) -> Result<(), Livelock> {
        self.stage.executor().run_until(until, || self.stage.judge(|judge, _| !judge.violations.is_empty()))
    }

    /// Everything holds on to everything: let go, or the world stays in memory.
    fn end(self) {
        let executor = self.stage.executor().clone();
        executor.end();
        self.hosts.lock().clear();
        self.routers.lock().clear();
        self.stage.clear();
    }

    fn add_host(&self, host: usize) {
        let node = &self.scenario.nodes[host];
        let mut local = LOCALS[host].clone();
        if let Some(bootstrap) = &mut local.bootstrap {
            bootstrap.dcs = self.scenario.settings.as_object().cloned().unwrap_or_default();
        }
        local.tags = node.tags.clone();
        if node.priority != 1 {
            local.tags.insert("failover_priority".to_owned(), json!(node.priority));
        }
        let drift = Drift { uptime: Duration::from_secs(1_000 * (host as u64 + 1)), ppm: node.ppm };
        self.stage.servers(|servers| {
            servers.push(Server { watchdog_required: node.watchdog, ..Server::new(host) });
        });
        self.hosts.lock().push(Host {
            drift,
            wall_offset: Arc::default(),
            local,
            link: None,
            slow_dcs: (Duration::ZERO, Duration::ZERO),
            slow_watch: Duration::ZERO,
            agent: None,
            frozen: 0,
            down: 0,
        });
        self.boot(host);
    }

    fn clock(&self, host: usize, process: ProcessId) -> SimClock {
        let hosts = self.hosts.lock();
        SimClock::new(self.stage.executor(), process, hosts[host].drift, hosts[host].wall_offset.clone())
    }

    /// The host is up: its guard and its agent start.
    fn boot(&self, host: usize) {
        let process = self.stage.executor().process(format!("n{host}.guard"));
        let guard = ModelGuard::start(&self.stage, host, process, self.clock(host, process));
        self.stage.set_guard(host, guard);
        self.start_agent(host);
    }

    fn start_agent(&self, host: usize) {
        let process = self.stage.executor().process(name(host).0);
        let clock = self.clock(host, process);
        let link = self.stage.store().client_with(clock.clone());
        let store = ClusterStore::new(link.clone(), paths());
        let local = self.hosts.lock()[host].local.clone();
        let (config, _) = PostgresConfig::effective(&local, &Settings::default());
        let postgres = ModelPostgres::new(&self.stage, host, clock.clone(), config);
        let knowledge = Follower::spawn(store.clone(), clock.clone());
        clock.spawn(apply_retry_timeout(link.clone(), knowledge.clone()));
        let (board, published) = watch::channel(Board::starting(clock.now()));
        let (commands, received) = mpsc::channel(64);
        let guard = self.stage.guard(host);
        let parts = Parts {
            store,
            knowledge: knowledge.clone(),
            guard: match guard {
                Some(guard) => Arc::new(guard),
                None => Arc::new(trunkline_agent::guard::NoGuard),
            },
            postgres: postgres.clone(),
            peers: ModelPeers::new(&self.stage, host, clock.clone()),
            clock: clock.clone(),
            local: local.clone(),
            reload: Box::new(move |_| Ok(local.clone())),
            board,
            commands: received,
        };
        let (keeper, keeper_stopped) = watch::channel(false);
        let (stop, stopped) = watch::channel(false);
        let keeper = Arc::new(keeper);
        let (ending, supervisor) = (keeper.clone(), self.clone());
        clock.spawn(async move {
            let exit = Box::pin(Ha::new(parts, keeper_stopped).run(stopped)).await;
            ending.send_replace(true);
            tracing::info!("the agent has ended: {exit:?}");
            supervisor.stage.trouble(&[Some(host)], true);
            supervisor.supervise(host, process);
        });
        let priority = self.scenario.nodes[host].priority;
        let api = Api {
            process,
            name: name(host),
            clock,
            knowledge,
            board: published,
            postgres: postgres.of_the_api(),
            priority,
            commands,
        };
        self.stage.set_api(host, api);
        {
            let mut hosts = self.hosts.lock();
            hosts[host].link = Some(link);
            hosts[host].agent = Some(Agent { process, stop, _keeper: keeper });
        }
        self.refresh_link(host);
    }

    /// The agent has ended by itself: its supervisor ends what is left of it and starts it again.
    fn supervise(&self, host: usize, process: ProcessId) {
        let world = self.clone();
        self.stage.executor().spawn(self.process, async move {
            world.stage.executor().sleep(Duration::from_millis(100)).await;
            world.stage.executor().kill(process);
            world.restart_agent(host, process, 1_000).await;
            world.stage.trouble(&[Some(host)], false);
        });
    }

    /// Starts the agent again `ms` later, unless somebody else has, or the host is down.
    async fn restart_agent(&self, host: usize, old: ProcessId, ms: u64) {
        self.stage.executor().sleep(Duration::from_millis(ms)).await;
        while self.hosts.lock()[host].frozen > 0 {
            self.stage.executor().sleep(Duration::from_millis(100)).await;
        }
        let same = {
            let hosts = self.hosts.lock();
            hosts[host].down == 0 && hosts[host].agent.as_ref().is_some_and(|agent| agent.process == old)
        };
        if same && !self.stage.executor().is_alive(old) {
            self.start_agent(host);
        }
    }

    fn agent_process(&self, host: usize) -> Option<ProcessId> {
        self.hosts.lock()[host].agent.as_ref().map(|agent| agent.process)
    }

    fn postgres_process(&self, host: usize) -> Option<ProcessId> {
        self.stage.server(host, |server| server.postmaster.as_ref().map(|postmaster| postmaster.process))
    }

    fn add_router(&self, router: usize) {
        let executor = self.stage.executor();
        let process = executor.process(format!("router{router}"));
        let clock = SimClock::new(executor, process, Drift::default(), Arc::default());
        let link = self.stage.store().client_with(clock.clone());
        let running = Router::start(&self.stage, router, clock, process, link.clone());
        for _ in 0..2 {
            running.client(&self.stage, router, self.seen.clone());
        }
        self.routers.lock().push((running, link));
    }

    /// Brings a host's connection to the store in line with everything that is wrong with it.
    fn refresh_link(&self, host: usize) {
        let (there, back) = (
            self.stage.network(|network| network.open(End::Agent(host), End::Dcs)),
            self.stage.network(|network| network.open(End::Dcs, End::Agent(host))),
        );
        let (silent, refusing) = *self.dcs_down.lock();
        let hosts = self.hosts.lock();
        let ((request, answer), watch) = (hosts[host].slow_dcs, hosts[host].slow_watch);
        if let Some(link) = &hosts[host].link {
            link.set_faults(|faults| {
                faults.cut = silent > 0;
                (faults.mute, faults.deaf) = (!there, !back);
                faults.refused = refusing > 0;
                faults.request_delay = request;
                faults.answer_delay = answer;
                faults.watch_delay = watch;
            });
        }
    }

    fn refresh_links(&self) {
        (0..self.scenario.nodes.len()).for_each(|host| self.refresh_link(host));
        let (silent, refusing) = *self.dcs_down.lock();
        for (router, (_, link)) in self.routers.lock().iter().enumerate() {
            let open = |from, to| self.stage.network(|network| network.open(from, to));
            link.set_faults(|faults| {
                faults.cut = silent > 0;
                faults.mute = !open(End::Router(router), End::Dcs);
                faults.deaf = !open(End::Dcs, End::Router(router));
                faults.refused = refusing > 0;
            });
        }
    }

    /// The store as an operator reaches it.
    fn store(&self) -> ClusterStore<MemoryDcs<SimClock>> {
        ClusterStore::new(self.stage.store().client(), paths())
    }

    /// What the store has of the cluster, whoever can read it.
    fn view(&self) -> ClusterView {
        let paths = paths();
        codec::view(&paths, &self.stage.store().peek(paths.prefix()), None)
    }
}

/// As in the agent that ships: one call to the store may take as long as `retry_timeout` says.
async fn apply_retry_timeout(link: MemoryDcs<SimClock>, mut knowledge: watch::Receiver<Knowledge>) {
    let mut current = None;
    while knowledge.changed().await.is_ok() {
        let wanted = knowledge.borrow_and_update().view.as_ref().map(|view| view.settings.retry_timeout);
        if let Some(deadline) = wanted.filter(|_| wanted != current) {
            link.set_faults(|faults| faults.deadline = deadline);
            current = wanted;
        }
    }
}
