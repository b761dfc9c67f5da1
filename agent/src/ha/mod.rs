//! The HA loop: observe → decide → act.
//!
//! Everything that can wake it does: a change in the DCS, the exit of the postmaster, a command, the end of a task, the
//! lease, the timer. A turn looks once at everything ([`situation`]), decides ([`decide`], pure) and acts; acting is one
//! transaction, or a task ([`task`]) that runs beside the loop and wakes it when it ends. The lease is renewed by
//! [`lease`], which also fences PostgreSQL if the loop does not step down in time.

pub mod decide;
pub mod election;
pub mod lease;
pub mod publish;
pub mod quorum;
pub mod routers;
pub mod situation;
pub mod slots;
pub mod sync;
pub mod task;
pub mod timelines;

mod act;
mod commands;
mod finish;
mod observe;
mod prepare;
mod restored;
mod shutdown;
mod upkeep;
mod wake;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info, warn};
use trunkline_common::cluster::{Member, Status};
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::{Clock, ClusterView, Instant, LeaseId, MemberName, Revision, Task};
use trunkline_config::dynamic::new_cluster;
use trunkline_config::{Local, PostgresConfig, Settings};

use self::decide::{Action, Decision};
use self::lease::{Keeper, LeaseHandle, Timing};
use self::prepare::Preparation;
use self::publish::Urls;
use self::restored::Restored;
use self::shutdown::keep_beating;
use self::situation::{Me, Memory, PeerAnswers, Situation};
use self::task::{Hands, TaskEnd, TaskKind};
use crate::guard::Guard;
use crate::node::{Board, Command, Noted};
use crate::peer::Peers;
use crate::postgres::{PgRole, PgStatus, Postgres, SlotPlan, needs_no_leader};

/// Turns taken without waiting in between; more of them would mean that two rules contradict each other.
const MAX_STEPS: usize = 8;

/// A server that ends sooner than this after its start has failed to start.
const SHORT_LIFE: Duration = Duration::from_secs(10);

/// Why the loop ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It was asked to.
    Stopped,
    /// Going on would do harm; the words say what a person has to do.
    Refused(String),
}

/// Reads this node's configuration again, for an agent that goes by the one it is given; the error is for people.
pub type Reload = Box<dyn Fn(&Local) -> Result<Local, String> + Send>;

/// What the loop is made of.
pub struct Parts<D, P, C, R> {
    /// The cluster's keys.
    pub store: ClusterStore<D>,
    /// The DCS as followed by its watch.
    pub knowledge: watch::Receiver<Knowledge>,
    /// The server.
    pub postgres: P,
    /// The other members.
    pub peers: R,
    /// Who ends writes when this process can't.
    pub guard: Arc<dyn Guard>,
    /// Time.
    pub clock: C,
    /// This node's configuration.
    pub local: Local,
    /// Reads it again.
    pub reload: Reload,
    /// Where state is published.
    pub board: watch::Sender<Board>,
    /// What REST and signals ask for.
    pub commands: mpsc::Receiver<Command>,
}

/// The loop.
pub struct Ha<D, P, C, R> {
    parts: Parts<D, P, C, R>,
    me: Me,
    urls: Urls,
    lease: LeaseHandle,
    memory: Memory,
    /// The newest view: the watch's, or our own with what we have just written in it.
    view: Option<Arc<ClusterView>>,
    /// See [`Knowledge::restores`], of that view.
    restores: u64,
    /// The last time that the DCS went back.
    restored: Option<Restored>,
    /// The view's settings; until there is a cluster, those that this node would bootstrap it with.
    settings: Settings,
    /// The dynamic configuration as it was known last, by this agent or an earlier one.
    cached_config: Option<Value>,
    /// That of this revision is kept beside the data.
    config_kept: Option<Revision>,
    pg: PgStatus,
    task: Option<Running>,
    last: Decision,
    /// A member that was asked for it still runs as primary.
    beside_a_primary: bool,
    /// The settings of the cluster that are in force here, with this node's own.
    applied: Option<Settings>,
    /// What of them was last handed to PostgreSQL.
    configured: Option<PostgresConfig>,
    /// It could not be: when it is tried again, and why, as it was told.
    unapplied: Option<(Instant, String)>,
    published: Published,
    slots_seen: slots::Seen,
    /// Until then members' slots stay, whoever has made them: nobody has published which are retained.
    slots_spared: Option<Instant>,
    /// Permanent logical slots that are called like a member's, as they were told.
    slots_clashing: BTreeSet<String>,
    /// When logical slots were last copied from the primary.
    slots_copied: Option<Instant>,
    /// The postmaster (by its start) and the `synchronous_standby_names` that it has been proven to wait by.
    names_proven: Option<(String, String)>,
    /// Strict synchronous mode makes commits wait for nobody.
    waits_in_vain: bool,
    scheduled_restart: Option<Value>,
    /// How often what happened, and why: metric labels.
    transitions: BTreeMap<(&'static str, &'static str), u64>,
    /// What was decided lately.
    decisions: Arc<VecDeque<Noted>>,
    /// How often the keeper has fenced, as far as that is among them.
    fenced: u64,
    /// The same of the guard.
    killed: u64,
    /// After a promotion.
    checkpoint: Option<Task<()>>,
    /// Before a stop.
    preparation: Preparation,
}

struct Running {
    kind: TaskKind,
    handle: Task<TaskEnd>,
}

/// What was last written, so that nothing is written twice.
#[derive(Default)]
struct Published {
    /// With when: the view shows it a moment later.
    member: Option<(Member, LeaseId, Instant)>,
    status: Option<Status>,
    slots: Option<SlotsKept>,
    /// `initialize`, `config` and `history` are as they should be since this promotion.
    upkept: Option<Revision>,
}

/// The slots as they were last set.
struct SlotsKept {
    /// The server (by its start), and whether it was a primary.
    server: (String, bool),
    plan: SlotPlan,
    /// There is nothing left to do about it.
    settled: bool,
}

/// What a turn leaves to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Look and decide again at once.
    Again,
    /// Decide again on what was seen: only what we hold has changed.
    Decide,
    /// Wait for something to happen.
    Wait,
    /// End.
    Exit,
}

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    /// Puts the loop together and starts its lease keeper.
    pub fn new(parts: Parts<D, P, C, R>, stop_keeper: watch::Receiver<bool>) -> Self {
        let name = MemberName::from(parts.local.name.as_str());
        let cached_config = parts.postgres.cached_config();
        let settings = settings_of(first_config(&parts.local, cached_config.as_ref()).as_ref());
        let timing = timing(&settings);
        let (store, postgres, clock) = (parts.store.clone(), parts.postgres.clone(), parts.clock.clone());
        let promised_before = postgres.kept_promise();
        let (started_at, paused_before) = (clock.now(), settings.pause);
        let memory = Memory { started_at, promised_before, paused_before, ..Memory::default() };
        let mut stopped = stop_keeper.clone();
        let lease = Keeper::spawn(store, postgres, clock, name, timing, parts.guard.clone(), stop_keeper);
        let ends_of_pauses = lease.clone().hear_of_ends_of_pauses(parts.knowledge.clone());
        parts.clock.spawn(async move {
            tokio::select! {
                biased;
                () = ends_of_pauses => {}
                _ = stopped.wait_for(|stop| *stop) => {}
            }
        });
        let config = parts.postgres.config();
        Self {
            me: me(&parts.local, &config),
            urls: urls(&parts.local, &parts.postgres),
            lease,
            memory,
            view: None,
            restores: 0,
            restored: None,
            settings,
            cached_config,
            config_kept: None,
            pg: PgStatus::NoData,
            task: None,
            last: Decision { action: Action::Wait, reason: "starting".to_owned() },
            beside_a_primary: false,
            applied: None,
            configured: None,
            unapplied: None,
            published: Published::default(),
            slots_seen: slots::Seen::new(),
            slots_spared: None,
            slots_clashing: BTreeSet::new(),
            slots_copied: None,
            names_proven: None,
            waits_in_vain: false,
            scheduled_restart: None,
            transitions: BTreeMap::new(),
            decisions: Arc::default(),
            fenced: 0,
            killed: parts.guard.status().kills,
            checkpoint: None,
            preparation: Preparation::default(),
            parts,
        }
    }

    /// Runs until `shutdown` or until going on would do harm.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) -> Exit {
        let mut exits = self.parts.postgres.exits();
        let mut session = self.lease.subscribe();
        loop {
            session.borrow_and_update();
            exits.borrow_and_update();
            let next = self.turn().await;
            self.publish_board();
            if next == Next::Exit {
                error!("{}", self.last.reason);
                self.leave_nobody_behind().await;
                return Exit::Refused(self.last.reason.clone());
            }
            let wake = self.wake_at();
            tokio::select! {
                biased;
                () = said(&mut shutdown) => {
                    // The lease has to live until the key is handed over.
                    let alive = keep_beating(self.lease.clone(), self.parts.clock.clone());
                    tokio::select! {
                        biased;
                        () = self.shut_down() => {}
                        () = alive => {}
                    }
                    return Exit::Stopped;
                }
                _ = exits.changed() => debug!("woken by the exit of the postmaster"),
                end = finished(&mut self.task) => self.finish(end),
                // Whoever has to be rewound waits to hear of it.
                () = done(&mut self.checkpoint) => debug!("woken by the end of the checkpoint after the promotion"),
                () = done(&mut self.preparation.checkpoint) => debug!("woken by the end of the checkpoint before a stop"),
                () = Self::relevant_change(&mut self.parts.knowledge, &self.view, self.restores) => debug!("woken by the DCS"),
                _ = session.changed() => debug!("woken by the lease"),
                Some(command) = self.parts.commands.recv() => self.command(command).await,
                () = self.parts.clock.sleep_until(wake) => {}
            }
        }
    }

    /// Observe, decide, act, until there is nothing left to do at once.
    async fn turn(&mut self) -> Next {
        let mut next = Next::Again;
        for _ in 0..MAX_STEPS {
            self.lease.beat(self.parts.clock.now());
            self.memory.must_not_lead = self.parts.guard.status().must_not_lead;
            if next == Next::Again {
                self.take_view();
                self.tell_of_restore().await;
                self.tell_forgotten_timelines().await;
                self.apply_settings().await;
                self.urls = urls(&self.parts.local, &self.parts.postgres);
                self.start_scheduled_restart();
                if self.task.is_some() {
                    self.publish_member().await;
                    return Next::Wait;
                }
                self.observe().await;
                self.tell_address();
                self.tell_role();
                self.keep_config();
                if !self.deadline_is_settled().await {
                    self.publish_member().await;
                    return Next::Wait;
                }
                // A new primary is announced before anything else is done: routers are waiting for exactly this.
                let announced = self.published.member.as_ref().is_some_and(|(member, _, _)| member.claims_primary());
                if self.pg_is_primary() && !announced {
                    self.publish_member().await;
                }
            }
            let decision = self.decide().await;
            next = self.act(decision).await;
            match next {
                Next::Again | Next::Decide => {}
                Next::Wait => {
                    self.publish_member().await;
                    return Next::Wait;
                }
                Next::Exit => return Next::Exit,
            }
        }
        warn!("still not settled after {MAX_STEPS} steps: {}", self.last.reason);
        self.publish_member().await;
        Next::Wait
    }

    /// Whatever is started while a deadline is being met would be killed with what it is meant for. False: the keeper is
    /// about it, and tells when it is done. One that is left of a server that is gone is removed.
    async fn deadline_is_settled(&mut self) -> bool {
        let session = self.lease.session();
        let Some(deadline) = session.deadline.filter(|_| !self.settings.pause) else { return true };
        if deadline.fence_at <= self.parts.clock.now() {
            // Nothing else is decided until that is done, which may take as long as a disk does not answer.
            let reason = "the right to take writes is over; PostgreSQL is being ended";
            self.last = Decision { action: Action::Wait, reason: reason.to_owned() };
            self.note("fence", reason);
            return false;
        }
        let given_up = session.leader_until().is_none() && !session.bootstrapping;
        if given_up && matches!(self.pg, PgStatus::Stopped(_) | PgStatus::NoData) {
            // A postmaster that was killed leaves children behind.
            if let Err(error) = self.parts.postgres.fence(Duration::from_secs(1)).await {
                warn!("processes of the last server are still there: {error}");
                return false;
            }
            self.lease.resign();
        }
        true
    }

    /// Decides; asks the other members first where the decision depends on them.
    async fn decide(&mut self) -> Decision {
        let fenced = self.lease.session().fenced;
        if std::mem::replace(&mut self.fenced, fenced) < fenced {
            self.note(
                "fence",
                "PostgreSQL was killed: the leader key could not be proven to be ours before its lease ended",
            );
            self.count("fence", "lease");
        }
        let killed = self.parts.guard.status().kills;
        if std::mem::replace(&mut self.killed, killed) < killed {
            self.note("fence", "the guard killed PostgreSQL: its deadline was over, and this agent had not moved it");
            self.count("fence", "guard");
        }
        let mut answers: Option<PeerAnswers> = None;
        let decision = loop {
            let decision = decide::decide(&self.situation(answers.as_ref()));
            let Action::Ask(members) = &decision.action else { break decision };
            if answers.is_some() {
                warn!("the decision asks for members that were asked already: {}", decision.reason);
                break Decision { action: Action::Wait, reason: decision.reason };
            }
            let heard = self.ask(members).await;
            self.hear_timelines(&heard);
            answers = Some(heard);
        };
        self.beside_a_primary =
            answers.iter().flat_map(BTreeMap::values).flatten().any(|peer| !peer.in_recovery || peer.holds_key);
        if self.note(decision.action.label(), &decision.reason) {
            info!("{}", decision.reason);
        } else {
            debug!("{}", decision.reason);
        }
        self.last = decision.clone();
        decision
    }

    /// Who has the leader key and asks may hear that somebody was promoted since, which the DCS has forgotten.
    fn hear_timelines(&mut self, answers: &PeerAnswers) {
        let Some(view) = self.view.as_mut().filter(|view| view.is_leader(&self.me.name)) else { return };
        let heard = answers.values().flatten().filter_map(|peer| peer.timeline).max().unwrap_or_default();
        if heard > view.claimed.max(view.timeline().unwrap_or_default()) && view.settings.standby_cluster.is_none() {
            Arc::make_mut(view).claimed = heard;
            self.memory.overtaken_by = Some(heard);
        }
    }

    /// What a decision is made on; `peers`: what they said, where they were asked.
    fn situation<'a>(&'a self, peers: Option<&'a PeerAnswers>) -> Situation<'a> {
        let (now, session) = (self.parts.clock.now(), self.lease.session());
        Situation {
            now,
            wall: self.parts.clock.wall(),
            me: &self.me,
            view: self.view.as_deref(),
            leader_until: session.leader_until(),
            promised_until: session.failsafe,
            key_until: session.key_until(),
            lease_until: session.lease.map(|lease| lease.until),
            ttl: self.ttl(),
            dcs_away: session.trouble.is_some(),
            pg: &self.pg,
            memory: &self.memory,
            peers,
        }
    }

    /// A member that is slow to answer must not cost a failover its speed. One that is gone from the DCS even less, as its host
    /// may be gone with it, unless it has just answered.
    fn ask(&self, members: &BTreeMap<MemberName, String>) -> impl Future<Output = PeerAnswers> + Send + 'static {
        let there = |name: &MemberName| self.view.as_ref().is_some_and(|view| view.members.contains_key(name));
        let (there, gone): (BTreeMap<_, _>, BTreeMap<_, _>) = members.clone().into_iter().partition(|(n, _)| there(n));
        let ttl = self.settings().ttl;
        let patience = (ttl / 10).clamp(Duration::from_millis(250), Duration::from_secs(2));
        let short = (ttl / 100).max(Duration::from_millis(50)).min(patience);
        let with_gone = if self.beside_a_primary { patience } else { short };
        let peers = self.parts.peers.clone();
        async move {
            let (mut answers, others) = tokio::join!(peers.status(there, patience), peers.status(gone, with_gone));
            answers.extend(others);
            answers
        }
    }

    /// For `GET /decisions` and the log: whether it is news, and not what the last one said with other numbers. A refusal
    /// to race is counted once, not in every turn that it goes on.
    fn note(&mut self, action: &'static str, reason: &str) -> bool {
        let noted = Noted { at: self.parts.clock.wall(), action, reason: reason.to_owned() };
        let news = noted.note_in(&mut self.decisions);
        if news && action == Action::Abstain.label() {
            self.count(action, "no_leader");
        }
        news
    }

    /// For the metrics.
    fn count(&mut self, action: &'static str, cause: &'static str) {
        *self.transitions.entry((action, cause)).or_default() += 1;
    }

    /// See [`Situation::ttl`].
    fn ttl(&self) -> Duration {
        let setting = self.settings.ttl;
        self.lease.session().lease.map_or(setting, |lease| lease.ttl.min(setting))
    }

    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn pg_is_primary(&self) -> bool {
        matches!(&self.pg, PgStatus::Running(running) if running.role == PgRole::Primary)
    }

    fn hands(&self) -> Hands<D, P, C, R> {
        let by_key = self.lease.session().leading && !self.settings.pause;
        let shown = self.view.as_ref().filter(|view| by_key && view.is_leader(&self.me.name));
        Hands {
            store: self.parts.store.clone(),
            postgres: self.parts.postgres.clone(),
            clock: self.parts.clock.clone(),
            peers: self.parts.peers.clone(),
            lease: self.lease.clone(),
            name: self.me.name.clone(),
            knowledge: self.parts.knowledge.clone(),
            leads_since: shown.map(|view| view.revision),
        }
    }

    /// Cuts the task off, and returns once nothing of it goes on: it may be about to spawn a postmaster.
    async fn abort_task(&mut self) -> Option<TaskKind> {
        let running = self.task.take()?;
        running.handle.abort();
        if self.parts.clock.within(Duration::from_secs(10), running.handle).await.is_none() {
            warn!("{} does not end", running.kind.label());
        }
        Some(running.kind)
    }

    fn spawn(&mut self, kind: TaskKind, work: impl Future<Output = TaskEnd> + Send + 'static) {
        self.task = Some(Running { kind, handle: Task::spawn(&self.parts.clock, work) });
        // Whoever asks this node shall hear of it before its effect.
        self.publish_board();
    }
}

/// Returns when it has been said to stop, or nobody is left who could say it.
async fn said(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// Waits for the end of the checkpoint; for ever without one.
async fn done(checkpoint: &mut Option<Task<()>>) {
    let Some(running) = checkpoint else { return std::future::pending().await };
    let _ = running.await;
    *checkpoint = None;
}

/// Waits for the end of the task; for ever without one.
async fn finished(task: &mut Option<Running>) -> (TaskKind, TaskEnd) {
    let Some(running) = task else { return std::future::pending().await };
    let kind = running.kind;
    let end = (&mut running.handle).await;
    *task = None;
    (kind, end.unwrap_or_else(|error| TaskEnd::Failed { why: error.to_string(), damaged: false }))
}

/// The dynamic configuration where the DCS has none: as it was last known, or that of a cluster that does not exist yet.
fn first_config(local: &Local, cached: Option<&Value>) -> Option<Value> {
    cached.cloned().or_else(|| local.bootstrap.as_ref().map(|bootstrap| new_cluster(&bootstrap.dcs)))
}

fn settings_of(config: Option<&Value>) -> Settings {
    config.map_or_else(Settings::default, |config| Settings::from_value(config).0)
}

fn timing(settings: &Settings) -> Timing {
    Timing { ttl: settings.ttl, loop_wait: settings.loop_wait, pause: settings.pause }
}

fn me(local: &Local, config: &PostgresConfig) -> Me {
    Me {
        name: MemberName::from(local.name.as_str()),
        tags: local.tags.clone(),
        may_bootstrap: local.bootstrap.is_some(),
        use_pg_rewind: config.use_pg_rewind,
        use_slots: config.use_slots,
        restores_alone: config.create_replica_methods.iter().any(|method| needs_no_leader(config, method)),
        reclone_diverged: config.remove_data_directory_on_diverged_timelines,
        reclone_unrewindable: config.remove_data_directory_on_rewind_failure,
    }
}

fn urls(local: &Local, server: &impl Postgres) -> Urls {
    let config = server.config();
    let scheme = if local.restapi.certfile.is_some() { "https" } else { "http" };
    let postgres = |address: &str| format!("postgres://{address}/{}", config.database);
    Urls {
        connection: postgres(&server.connect_address()),
        api: format!("{scheme}://{}/patroni", local.restapi.connect_address),
        proxy: config.proxy_address.as_deref().map(postgres),
    }
}
