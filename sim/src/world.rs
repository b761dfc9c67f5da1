//! One world, from its first moment to its verdict.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use trunkline_agent::guard::Guard;
use trunkline_agent::ha::{Ha, Parts};
use trunkline_agent::node::{Board, Command, RestartFilter};
use trunkline_agent::postgres::PgRole;
use trunkline_common::cluster::Initialize;
use trunkline_common::dcs::codec;
use trunkline_common::dcs::follow::Follower;
use trunkline_common::dcs::memory::MemoryDcs;
use trunkline_common::dcs::store::{ClusterStore, Outcome};
use trunkline_common::{Clock, ClusterView, MemberName};
use trunkline_config::dynamic::SynchronousMode;
use trunkline_config::{Env, Local, PostgresConfig, Settings, merge};

use crate::clients::{self, Router, Seen};
use crate::executor::{Drift, Executor, Livelock, ProcessId, SimClock};
use crate::guard::ModelGuard;
use crate::peers::{Api, ModelPeers};
use crate::postgres::{HALF_REWOUND, ModelPostgres};
use crate::scenario::{Aim, End, Fault, Scenario};
use crate::server::{self, Server};
use crate::stage::{Stage, host_of, name, paths};

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
            judge.lag_allowed = scenario.largest_lag();
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
        };
        for host in 0..scenario.nodes.len() {
            world.add_host(host);
        }
        for router in 0..scenario.routers {
            world.add_router(router);
        }
        for host in 0..scenario.nodes.len() {
            clients::direct(&world.stage, process, host);
        }
        world.watch_store();
        for event in scenario.events.clone() {
            let acting = world.clone();
            world.stage.executor().spawn(process, async move {
                acting.stage.executor().sleep(Duration::from_millis(event.at)).await;
                let what = match event.aim.and_then(|aim| acting.aimed_at(aim)) {
                    Some(node) => event.what.at(node),
                    None => event.what,
                };
                tracing::info!("FAULT {what:?}");
                acting.happen(what).await;
            });
        }
        world
    }

    /// Who that is now.
    fn aimed_at(&self, aim: Aim) -> Option<usize> {
        let name = match aim {
            // Before there is one: whoever makes the cluster.
            Aim::Leader => match self.stage.holder() {
                Some(holder) => holder,
                None => return (0..self.scenario.nodes.len()).find(|host| self.is_guarded(*host)),
            },
            Aim::Synchronous => {
                let sync = self.stage.key("sync")?;
                sync["sync_standby"].as_str()?.split(',').next()?.to_owned()
            }
        };
        host_of(&name).filter(|host| *host < self.scenario.nodes.len())
    }

    fn is_guarded(&self, host: usize) -> bool {
        self.stage.guard(host).is_some_and(|guard| guard.is_armed())
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
        self.stage.servers(|servers| servers.push(Server::new(host)));
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
        let (board, _) = watch::channel(Board::starting(clock.now()));
        let (commands, received) = mpsc::channel(64);
        let guard = self.stage.guard(host);
        let parts = Parts {
            store,
            knowledge,
            guard: match guard {
                Some(guard) => Arc::new(guard),
                None => Arc::new(trunkline_agent::guard::NoGuard),
            },
            postgres: postgres.clone(),
            peers: ModelPeers::new(&self.stage, host, clock.clone()),
            clock: clock.clone(),
            local: local.clone(),
            reload: Box::new(move || Ok(local.clone())),
            board,
            commands: received,
        };
        let (keeper, keeper_stopped) = watch::channel(false);
        let (stop, stopped) = watch::channel(false);
        let keeper = Arc::new(keeper);
        let (ending, supervisor) = (keeper.clone(), self.clone());
        clock.spawn(async move {
            let exit = Ha::new(parts, keeper_stopped).run(stopped).await;
            ending.send_replace(true);
            tracing::info!("the agent has ended: {exit:?}");
            supervisor.supervise(host, process);
        });
        self.stage.set_api(host, Api { process, postgres, priority: self.scenario.nodes[host].priority, commands });
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
        let running = Router::start(&self.stage, clock, process, link.clone());
        for _ in 0..2 {
            running.client(&self.stage, router, self.seen.clone());
        }
        self.routers.lock().push((running, link));
    }

    /// What each revision of the store says in itself: the timeline never goes down, nobody who is no primary takes the
    /// leader key in a pause unasked, nobody is promoted or waited for who is tagged against it.
    fn watch_store(&self) {
        let executor = self.stage.executor();
        let clock = SimClock::new(executor, self.process, Drift::default(), Arc::default());
        let store = ClusterStore::new(self.stage.store().client(), paths());
        let mut knowledge = Follower::spawn(store, clock);
        let world = self.clone();
        executor.spawn(self.process, async move {
            let mut before = Arc::<ClusterView>::default();
            while knowledge.changed().await.is_ok() {
                let Some(view) = knowledge.borrow_and_update().view.clone() else { continue };
                if let Some(timeline) = view.timeline() {
                    world.stage.judge(|judge, now| judge.timeline(now, timeline.0));
                }
                if let Some(wrong) = world.wrong_in(&before, &view) {
                    world.stage.judge(|judge, now| judge.violation(now, wrong));
                }
                before = view;
            }
        });
    }

    fn wrong_in(&self, before: &ClusterView, view: &ClusterView) -> Option<String> {
        let node = |name: &MemberName| host_of(name.as_str()).and_then(|host| self.scenario.nodes.get(host));
        // Who led before has every commit, whatever its tags.
        let nosync = |name: &&String| {
            let led = before.sync.leader.as_ref().is_some_and(|leader| leader.0 == **name);
            let inherited = before.sync.standbys.contains(*name);
            !led && !inherited
                && node(&MemberName::from(name.as_str())).is_some_and(|node| node.tags.contains_key("nosync"))
        };
        if let Some(name) = view.sync.standbys.iter().find(nosync) {
            return Some(format!("commits may wait for {name}, which is tagged nosync"));
        }
        let leader = view.leader.as_ref()?;
        let was_primary = || {
            let host = host_of(leader.name.as_str()).unwrap_or_default();
            self.stage.server(host, |server| server.is_primary())
        };
        let unchanged = before.leader.as_ref().is_some_and(|last| last.created == leader.created);
        if unchanged || before.initialize == Initialize::Absent || was_primary() {
            return None;
        }
        if node(&leader.name).is_some_and(|node| node.priority <= 0) {
            return Some(format!("{} leads and must not be promoted", leader.name));
        }
        let asked = before.failover.is_some() || view.failover.is_some();
        let paused = before.settings.pause && view.settings.pause;
        (paused && !asked).then(|| format!("{} takes the leader key in a pause, unasked", leader.name))
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
                faults.cut = !there || silent > 0;
                faults.deaf = !back;
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
        for (_, link) in self.routers.lock().iter() {
            link.set_faults(|faults| {
                faults.cut = silent > 0;
                faults.refused = refusing > 0;
            });
        }
    }

    fn freeze(&self, process: ProcessId, freeze: bool) {
        let mut frozen = self.frozen.lock();
        let reasons = frozen.entry(process).or_default();
        *reasons = if freeze { *reasons + 1 } else { reasons.saturating_sub(1) };
        self.stage.executor().freeze(process, *reasons > 0);
    }

    async fn frozen_for(&self, processes: impl IntoIterator<Item = ProcessId>, ms: u64) {
        let processes: BTreeSet<ProcessId> = processes.into_iter().collect();
        processes.iter().for_each(|process| self.freeze(*process, true));
        self.stage.executor().sleep(Duration::from_millis(ms)).await;
        processes.iter().for_each(|process| self.freeze(*process, false));
        // Whoever waits for a frozen server looks again.
        self.stage.servers(|servers| servers.iter().for_each(Server::touch));
    }

    async fn cut_for(&self, cuts: Vec<(End, End)>, ms: u64) {
        let set = |cut: bool| {
            self.stage.network(|network| cuts.iter().for_each(|(from, to)| network.cut(*from, *to, cut)));
            self.refresh_links();
        };
        set(true);
        self.stage.executor().sleep(Duration::from_millis(ms)).await;
        set(false);
    }

    async fn wait(&self, ms: u64) {
        self.stage.executor().sleep(Duration::from_millis(ms)).await;
    }

    /// One event, from its beginning to its end.
    async fn happen(&self, what: Fault) {
        match what {
            Fault::KillAgent { node, ms } => {
                let Some(process) = self.agent_process(node) else { return };
                self.stage.executor().kill(process);
                self.restart_agent(node, process, ms).await;
            }
            Fault::StopAgent { node, ms } => {
                let Some(process) = self.agent_process(node) else { return };
                if let Some(agent) = &self.hosts.lock()[node].agent {
                    agent.stop.send_replace(true);
                }
                // It is started again when it has ended; a supervisor loses patience, too.
                self.wait(30_000.max(ms)).await;
                if self.agent_process(node) == Some(process) && self.hosts.lock()[node].down == 0 {
                    self.stage.executor().kill(process);
                    self.restart_agent(node, process, 100).await;
                }
            }
            Fault::KillPostgres { node } => server::kill(&self.stage, node),
            Fault::CrashHost { node, ms } => {
                self.hosts.lock()[node].down += 1;
                if let Some(process) = self.agent_process(node) {
                    self.stage.executor().kill(process);
                }
                server::vanish(&self.stage, node);
                if let Some(guard) = self.stage.guard(node) {
                    self.stage.executor().kill(guard.process());
                    guard.disarm();
                }
                self.wait(ms).await;
                let up = {
                    let mut hosts = self.hosts.lock();
                    hosts[node].down -= 1;
                    hosts[node].down == 0
                };
                if up {
                    self.boot(node);
                }
            }
            Fault::FreezeAgent { node, ms } => self.frozen_for(self.agent_process(node), ms).await,
            Fault::FreezePostgres { node, ms } => self.frozen_for(self.postgres_process(node), ms).await,
            Fault::FreezeHost { node, ms } => {
                self.hosts.lock()[node].frozen += 1;
                let guard = self.stage.guard(node).map(|guard| guard.process());
                let all = [self.agent_process(node), self.postgres_process(node), guard];
                self.frozen_for(all.into_iter().flatten(), ms).await;
                self.hosts.lock()[node].frozen -= 1;
            }
            Fault::FreezeRouter { router, ms } => {
                let process = self.routers.lock().get(router).map(|(router, _)| router.process);
                self.frozen_for(process, ms).await;
            }
            Fault::Cut { from, to, both, ms } => {
                let mut cuts = vec![(from, to)];
                if both {
                    cuts.push((to, from));
                }
                self.cut_for(cuts, ms).await;
            }
            Fault::Isolate { node, ms } => {
                let own = [End::Agent(node), End::Postgres(node)];
                let others = (0..self.scenario.nodes.len()).filter(|other| *other != node);
                let mut ends: Vec<End> = others.flat_map(|other| [End::Agent(other), End::Postgres(other)]).collect();
                ends.extend((0..self.scenario.routers).map(End::Router));
                ends.push(End::Dcs);
                let cuts = own.iter().flat_map(|own| ends.iter().flat_map(|end| [(*own, *end), (*end, *own)]));
                self.cut_for(cuts.collect(), ms).await;
            }
            Fault::DcsDown { refused, ms } => {
                let change = |by: i32| {
                    let mut down = self.dcs_down.lock();
                    let count = if refused { &mut down.1 } else { &mut down.0 };
                    *count = count.saturating_add_signed(by);
                    drop(down);
                    self.refresh_links();
                };
                change(1);
                self.wait(ms).await;
                change(-1);
            }
            Fault::DcsLeaderChange { ms } => {
                self.dcs_down.lock().0 += 1;
                self.refresh_links();
                self.wait(ms).await;
                self.stage.store().restart_leases();
                self.dcs_down.lock().0 -= 1;
                self.refresh_links();
                self.break_watches();
            }
            Fault::LoseAnswers { node, count } => {
                if let Some(link) = &self.hosts.lock()[node].link {
                    link.set_faults(|faults| faults.lost_answers = count);
                }
            }
            Fault::SlowDcs { node, request, answer, ms } => {
                let delays = (Duration::from_millis(request), Duration::from_millis(answer));
                self.hosts.lock()[node].slow_dcs = delays;
                self.refresh_link(node);
                self.wait(ms).await;
                self.hosts.lock()[node].slow_dcs = (Duration::ZERO, Duration::ZERO);
                self.refresh_link(node);
            }
            Fault::SlowWatch { node, delay, ms } => {
                self.hosts.lock()[node].slow_watch = Duration::from_millis(delay);
                self.refresh_link(node);
                self.wait(ms).await;
                self.hosts.lock()[node].slow_watch = Duration::ZERO;
                self.refresh_link(node);
            }
            Fault::BreakWatches => self.break_watches(),
            Fault::Compact => {
                let revision = self.stage.store().peek("").revision;
                self.stage.store().compact(revision);
            }
            Fault::DiskFull { node, ms } => {
                self.stage.server(node, |server| server.disk_full = true);
                self.wait(ms).await;
                self.stage.server(node, |server| {
                    server.disk_full = false;
                    server.touch();
                });
            }
            Fault::SlowDisk { node, ms } => {
                self.stage.server(node, |server| server.disk_slow = true);
                self.wait(ms).await;
                self.stage.server(node, |server| server.disk_slow = false);
            }
            Fault::WallJump { node, by } => {
                self.hosts.lock()[node].wall_offset.fetch_add(by, Ordering::Relaxed);
            }
            Fault::Switchover { candidate } => {
                let Some(leader) = self.stage.holder() else { return };
                let mut request = json!({ "leader": leader });
                if let Some(candidate) = candidate {
                    request["member"] = Value::from(name(candidate).0);
                }
                let _ = self.store().put_failover(&request, None).await;
            }
            Fault::Failover { candidate } => {
                let _ = self.store().put_failover(&json!({ "member": name(candidate).0 }), None).await;
            }
            Fault::Restart { node } => {
                let (reply, _) = oneshot::channel();
                self.command(node, Command::Restart(RestartFilter::default(), reply)).await;
            }
            Fault::Reinitialize { node } => {
                let (reply, _) = oneshot::channel();
                self.command(node, Command::Reinitialize { force: false, from_leader: false, reply }).await;
            }
            Fault::Configure { patch } => self.configure(patch).await,
            Fault::Pause { ms } => {
                self.configure(json!({ "pause": true })).await;
                self.wait(ms).await;
                self.configure(json!({ "pause": null })).await;
            }
        }
    }

    /// Where there is a cluster to configure.
    async fn configure(&self, patch: Value) {
        let (store, Value::Object(patch)) = (self.store(), patch) else { return };
        while let Ok(ClusterView { config: Some(config), .. }) = store.read().await {
            let Value::Object(mut value) = config.value.clone() else { return };
            merge::patch(&mut value, &patch);
            match store.put_config(&Value::Object(value), Some(config.revision)).await {
                Ok(Outcome::Conflict) => {}
                _ => return,
            }
        }
    }

    fn break_watches(&self) {
        self.hosts.lock().iter().filter_map(|host| host.link.as_ref()).for_each(MemoryDcs::break_watches);
        self.routers.lock().iter().for_each(|(_, link)| link.break_watches());
    }

    /// The store as an operator reaches it.
    fn store(&self) -> ClusterStore<MemoryDcs<SimClock>> {
        ClusterStore::new(self.stage.store().client(), paths())
    }

    async fn command(&self, node: usize, command: Command) {
        if let Some(api) = self.stage.api(node) {
            let _ = api.commands.try_send(command);
        }
    }

    /// Whether somebody leads, and what is not as it should be.
    fn unwell(&self) -> (bool, Option<String>) {
        let Some(leader) = self.stage.holder() else { return (false, Some("nobody holds the leader key".to_owned())) };
        let members = self.view().members;
        let reclones = self.scenario.settings["postgresql"]["remove_data_directory_on_rewind_failure"] == json!(true);
        let fills = self.scenario.events.iter().any(|event| matches!(event.what, Fault::DiskFull { .. }));
        let rewinds = self.scenario.settings["postgresql"]["use_pg_rewind"] != json!(false);
        self.stage.servers(|servers| {
            let Some(primary) = servers.iter().find(|server| server.name.0 == leader) else {
                return (false, Some(format!("{leader} is nobody")));
            };
            if !primary.is_primary() {
                return (false, Some(format!("{leader} holds the leader key and takes no writes")));
            }
            let Some(wal) = primary.data.as_ref().map(|data| &data.wal) else { return (false, None) };
            // pg_rewind is not allowed, or has failed, and nothing may take its place by itself.
            let takes_a_person = |server: &Server| {
                let Some(data) = &server.data else { return false };
                let diverged = !data.wal.is_prefix_of(wal);
                let failed = server.postmaster.is_none() && (data.damage == Some(HALF_REWOUND) || diverged && fills);
                !reclones && failed || !rewinds && diverged && !server.is_primary()
            };
            for server in servers.iter().filter(|server| server.name.0 != leader) {
                let Some(data) = &server.data else { return (true, Some(format!("{} has no data", server.name))) };
                if !members.contains_key(&server.name) {
                    return (true, Some(format!("{} is no member", server.name)));
                }
                let follows = server.running().is_some_and(|p| p.role == PgRole::Standby && p.streaming);
                if follows && data.wal.is_prefix_of(wal) {
                    continue;
                }
                let above = |server: &&Server| {
                    let upstream = server.data.as_ref().and_then(|data| data.upstream.as_ref())?;
                    servers.iter().find(|server| server.name == upstream.name && server.name.0 != leader)
                };
                let mut chain = std::iter::successors(Some(server), above).take(servers.len());
                if !server.is_primary() && chain.any(takes_a_person) {
                    continue;
                }
                return (true, Some(format!("{} does not follow {leader}", server.name)));
            }
            (true, None)
        })
    }

    /// What the store has of the cluster, whoever can read it.
    fn view(&self) -> ClusterView {
        let paths = paths();
        codec::view(&paths, &self.stage.store().peek(paths.prefix()), None)
    }

    /// A healthy cluster carries out a switchover, also where it comes right after one that it has to refuse.
    fn check_switchover(&self) -> Result<(), Livelock> {
        if self.view().settings.failsafe_mode {
            // A promise not to lead outlasts the trouble that it was given for.
            self.go_on(self.stage.executor().now() + Duration::from_secs(21))?;
        }
        let view = self.view();
        let Some(leader) = view.leader.as_ref().map(|leader| leader.name.clone()) else { return Ok(()) };
        let synchronous = view.settings.synchronous_mode != SynchronousMode::Off;
        let candidate = self.stage.servers(|servers| {
            let wal = servers.iter().find(|server| server.name == leader).and_then(|server| server.data.as_ref());
            // One may be left to a person, and another that hangs below it with it.
            let follows = |server: &Server| {
                let own = server.data.as_ref().map(|data| &data.wal);
                own.zip(wal).is_some_and(|(own, leader)| own.is_prefix_of(&leader.wal))
            };
            let able = |server: &&Server| {
                server.name != leader
                    && server.running().is_some_and(|postmaster| postmaster.streaming)
                    && follows(server)
                    && self.scenario.nodes[server.host].priority > 0
                    && (!synchronous || view.sync.lists(&server.name))
            };
            servers.iter().find(able).map(|server| (server.host, server.name.clone()))
        });
        // Close to the limit it may rightly be refused.
        let Some((host, candidate)) = candidate.filter(|_| view.settings.maximum_lag_on_failover >= 6_400) else {
            return Ok(());
        };
        let acting = self.clone();
        let wanted = candidate.clone();
        self.stage.executor().spawn(self.process, async move {
            let store = acting.store();
            tracing::info!("FINALE a switchover to nobody, then one to {wanted}");
            let _ = store.put_failover(&json!({ "leader": leader.0, "member": "n9" }), None).await;
            acting.stage.micros(1..20_000).await;
            let _ = store.put_failover(&json!({ "leader": leader.0, "member": wanted.0 }), None).await;
        });
        let end = self.stage.executor().now() + Duration::from_secs(20);
        while self.stage.executor().now() < end {
            self.go_on(self.stage.executor().now() + Duration::from_millis(100))?;
            let done =
                self.stage.holder().as_ref() == Some(&candidate.0) && self.stage.server(host, |s| s.is_primary());
            if done || self.stage.judge(|judge, _| !judge.violations.is_empty()) {
                return Ok(());
            }
        }
        self.stage.judge(|judge, now| judge.violation(now, format!("a switchover to {candidate} was not carried out")));
        Ok(())
    }

    /// The servers, for the trace.
    fn show(&self) {
        self.stage.servers(|servers| {
            for server in servers.iter() {
                let data = server.data.as_ref();
                tracing::debug!(
                    "{}: {:?}, WAL to {:?} of timeline {:?}, {:?}",
                    server.name,
                    data.map(|data| (data.state, data.damage, &data.upstream)),
                    data.map(|data| data.wal.end()),
                    data.map(|data| data.wal.timeline()),
                    server.postmaster
                );
            }
        });
    }

    /// When all is well again: writes go on, and nothing that was promised is missing.
    fn final_checks(&self) -> Result<(), Livelock> {
        let before = self.seen.lock().done;
        self.show();
        self.go_on(self.stage.executor().now() + Duration::from_secs(3))?;
        // Strict, and nobody can confirm: then commits have to wait.
        let strict = self.view().settings.synchronous_mode_strict;
        let leader = self.stage.holder();
        let streams = self.stage.servers(|servers| {
            // One that follows another standby confirms nothing.
            let confirms = |server: &Server| {
                let upstream = server.data.as_ref().and_then(|data| data.upstream.as_ref());
                !self.scenario.nodes[server.host].tags.contains_key("nosync")
                    && server.running().is_some_and(|postmaster| postmaster.streaming)
                    && upstream.map(|upstream| upstream.name.0.as_str()) == leader.as_deref()
            };
            servers.iter().any(confirms)
        });
        // A client that has not heard of its last write waits that long before it tries another.
        let end = self.stage.executor().now() + clients::PATIENCE;
        while self.seen.lock().done == before && self.stage.executor().now() < end {
            self.go_on(self.stage.executor().now() + Duration::from_millis(100))?;
        }
        let after = self.seen.lock().done;
        self.stage.judge(|judge, now| {
            if judge.violations.is_empty() && after == before && (streams || !strict) {
                judge.violation(now, "all is well, but no client can write through a router");
            }
        });
        self.check_switchover()?;
        if self.scenario.always_synchronous() {
            let leader = self.stage.holder();
            let wal = self.stage.servers(|servers| {
                let leader = servers.iter().find(|server| Some(&server.name.0) == leader.as_ref())?;
                Some((leader.name.0.clone(), leader.data.as_ref()?.wal.clone()))
            });
            if let Some((name, wal)) = wal {
                self.stage.judge(|judge, now| judge.check_kept(now, &name, &wal));
            }
        }
        Ok(())
    }
}
