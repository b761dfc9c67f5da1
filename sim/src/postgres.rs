//! [`Postgres`] on a modelled server: what the agent of a host may ask of it, and how long that takes.
//!
//! It keeps the promises of the trait and no others. What the agent starts goes on when the agent dies, where that is so in
//! reality (a promotion, a start, a shutdown), and stops half-way where it is not (a copy, a rewind).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use serde_json::json;
use tokio::sync::{oneshot, watch};
use trunkline_agent::postgres::{
    ControlData, ControlState, Divergence, PgError, PgRole, PgStatus, Postgres, Running, SlotPlan, SlotsDone, StartAs,
    StopMode, Upstream, WalSender, WantedSlot,
};
use trunkline_common::{Clock, History, Instant, Lsn, SystemId, TimelineId};
use trunkline_config::PostgresConfig;

use crate::commit::{self, Names};
use crate::executor::{ProcessId, SimClock};
use crate::outside;
use crate::scenario::End;
use crate::server::{self, Data, Phase, Server};
use crate::slots::{Decoding, outrun};
use crate::stage::{Stage, host_of};
use crate::wal::{Kind, Record, Wal, position};
use crate::world::promises;

/// The server of one host as its agent sees it.
#[derive(Clone)]
pub struct ModelPostgres {
    pub(crate) stage: Stage,
    pub(crate) host: usize,
    clock: SimClock,
    config: PostgresConfig,
    /// What its agent has seen last.
    seen: Arc<Mutex<Option<Running>>>,
    /// What its agent has begun on logical slots.
    pub(crate) decoding: Arc<Mutex<Decoding>>,
}

impl ModelPostgres {
    /// The server of `host`, asked by an agent that lives by `clock`.
    pub fn new(stage: &Stage, host: usize, clock: SimClock, config: PostgresConfig) -> Self {
        Self { stage: stage.clone(), host, clock, config, seen: Arc::default(), decoding: Arc::default() }
    }

    /// The same, asked on behalf of others: what they are told its agent has not seen.
    pub fn of_the_api(&self) -> Self {
        Self { seen: Arc::default(), ..self.clone() }
    }

    /// A watchdog that is required does not work here.
    pub fn must_not_lead(&self) -> bool {
        self.server(|server| server.must_not_lead().is_some())
    }

    pub(crate) fn server<T>(&self, look: impl FnOnce(&mut Server) -> T) -> T {
        self.stage.server(self.host, look)
    }

    /// The postmaster's number and process.
    fn postmaster(&self) -> Option<(u64, ProcessId)> {
        self.server(|server| server.postmaster.as_ref().map(|p| (p.number, p.process)))
    }

    fn frozen(&self) -> bool {
        self.postmaster().is_some_and(|(_, process)| self.stage.executor().is_frozen(process))
    }

    /// Waits until `ready` says something, or for `limit`.
    async fn wait<T: Send>(
        &self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut(&mut Server) -> Option<T> + Send,
    ) -> Result<T, PgError> {
        let mut changed = self.server(|server| server.changed.subscribe());
        let waiting = async {
            loop {
                changed.mark_unchanged();
                if let Some(ready) = self.server(&mut ready) {
                    return ready;
                }
                if changed.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let timeout = PgError::Timeout { what: what.to_owned(), limit };
        self.clock.within(limit, waiting).await.ok_or(timeout)
    }

    /// A running server that does not let its agent in.
    fn check_session(&self) -> Result<(), PgError> {
        match self.server(|server| server.refuses_agent && server.running().is_some()) {
            true => Err(PgError::Failed("sorry, too many clients already".to_owned())),
            false => Ok(()),
        }
    }

    pub(crate) fn check_disk(&self) -> Result<(), PgError> {
        match self.server(|server| server.disk_full) {
            true => Err(PgError::Failed("no space left on device".to_owned())),
            false => Ok(()),
        }
    }

    /// A time that something takes which writes much.
    pub(crate) async fn work(&self, usual: std::ops::Range<u64>) {
        let slow = self.server(|server| server.disk_slow);
        let factor = if slow { 10 } else { 1 };
        let millis = self.stage.executor().random(|rng| rng.random_range(usual)) * factor;
        self.clock.sleep(Duration::from_millis(millis)).await;
    }

    /// What is in another server, if it answers.
    fn source(&self, upstream: &Upstream) -> Option<Source> {
        if upstream.host == outside::HOST {
            return self.stage.outside(|there| Source {
                primary: true,
                checkpointed: true,
                system: there.system,
                wal: there.wal.clone(),
                oldest: 0,
            });
        }
        let from = host_of(&upstream.host)?;
        if !self.stage.talks(End::Postgres(self.host), End::Postgres(from)) {
            return None;
        }
        self.stage.server(from, |server| {
            let postmaster = server.open(&self.stage)?;
            let data = server.data.as_ref()?;
            Some(Source {
                primary: postmaster.role == PgRole::Primary,
                checkpointed: data.checkpoint_timeline == data.wal.timeline(),
                system: data.system,
                wal: data.wal.clone(),
                oldest: data.oldest,
            })
        })
    }

    /// The last copy of the data must never go.
    fn judge_removal(&self, why: &str) {
        let others = self.stage.servers(|servers| {
            let whole = |server: &&mut Server| server.data.as_ref().is_some_and(|data| data.damage.is_none());
            servers.iter_mut().filter(|server| server.host != self.host).filter(whole).count()
        });
        let half = |data: &Data| data.damage == Some(HALF_A_COPY);
        if others == 0 && self.server(|server| server.data.as_ref().is_some_and(|data| !half(data))) {
            let host = self.host;
            self.stage.judge(|judge, now| judge.violation(now, format!("n{host} removes the last copy: {why}")));
        }
    }
}

impl ModelPostgres {
    /// A whole data directory is replaced only where an operator asks for it, or a setting allows just that.
    fn judge_leave(&self) {
        let settings = self.stage.key("config").map(|config| config["postgresql"].clone()).unwrap_or_default();
        let set = |key: &str| settings[key] == json!(true);
        let (diverged, failed) =
            (set("remove_data_directory_on_diverged_timelines"), set("remove_data_directory_on_rewind_failure"));
        let without_leave = self.server(|server| !(server.reinitialized || diverged || failed && server.rewound));
        if without_leave {
            let host = self.host;
            self.stage.judge(|judge, now| judge.violation(now, format!("n{host} removes its data without leave")));
        }
    }
}

const HALF_A_COPY: &str = "half a copy";

/// pg_rewind was cut off: only a copy can take its place.
pub const HALF_REWOUND: &str = "half rewound";

struct Source {
    primary: bool,
    checkpointed: bool,
    system: SystemId,
    wal: Wal,
    oldest: usize,
}

impl Postgres for ModelPostgres {
    async fn observe(&self, deadline: Duration) -> PgStatus {
        if self.server(|server| server.running().is_some() && server.open(&self.stage).is_none()) {
            self.clock.sleep(deadline).await;
            return PgStatus::Unresponsive;
        }
        self.stage.micros(100..1_500).await;
        let status = match (self.server(|server| status(server)), self.check_session()) {
            (PgStatus::Running(_), Err(error)) => PgStatus::Refusing(error.to_string()),
            (status, _) => status,
        };
        *self.seen.lock() = match &status {
            PgStatus::Running(running) => Some(running.clone()),
            _ => None,
        };
        status
    }

    fn exits(&self) -> watch::Receiver<u64> {
        self.server(|server| server.exits.subscribe())
    }

    async fn configure(&self, _: PostgresConfig) -> Result<(), PgError> {
        Ok(())
    }

    fn config(&self) -> PostgresConfig {
        self.config.clone()
    }

    fn connect_address(&self) -> String {
        self.config.connect_address.clone()
    }

    async fn initdb(&self, _: Vec<String>, _: Vec<String>) -> Result<(), PgError> {
        self.check_disk()?;
        self.work(300..1_000).await;
        let system = SystemId(7_000_000_000_000_000_000 + self.stage.number());
        let mut wal = Wal::default();
        wal.push(Record { timeline: TimelineId(1), kind: Kind::Shutdown, number: self.stage.number() });
        self.server(|server| {
            server.data = Some(Data {
                system,
                checkpoint: position(0),
                checkpoint_timeline: TimelineId(1),
                state: ControlState::ShutDown,
                wal,
                standby: false,
                damage: None,
                half_made: true,
                names: String::new(),
                upstream: None,
                oldest: 0,
                copied_at: 0,
                slots: BTreeMap::new(),
                slots_since: BTreeMap::new(),
                logical: BTreeMap::new(),
            });
            server.touch();
        });
        Ok(())
    }

    async fn create_users(&self, _: Option<String>) -> Result<(), PgError> {
        self.work(10..100).await;
        match self.server(|server| server.is_primary()) {
            true => Ok(()),
            false => Err(PgError::Failed("the server is not running".to_owned())),
        }
    }

    async fn clone_from(&self, source: Upstream) -> Result<(), PgError> {
        self.judge_removal("a copy from elsewhere takes its place");
        match self.server(|server| server.data.as_ref().is_some_and(|data| data.damage != Some(HALF_A_COPY))) {
            true => self.judge_leave(),
            false => promises::check_source(&self.stage, self.host, &source.name),
        }
        self.server(|server| {
            (server.reinitialized, server.rewound) = (false, false);
            server.data = None;
        });
        self.check_disk()?;
        let unreachable = || PgError::Failed(format!("{} can't be reached", source.name));
        let begun = self.source(&source).ok_or_else(unreachable)?;
        let copy = Data {
            system: begun.system,
            oldest: begun.wal.len(),
            copied_at: begun.wal.len(),
            slots: BTreeMap::new(),
            slots_since: BTreeMap::new(),
            logical: BTreeMap::new(),
            checkpoint: begun.wal.end(),
            checkpoint_timeline: begun.wal.timeline(),
            state: ControlState::InArchiveRecovery,
            wal: begun.wal,
            standby: true,
            damage: Some(HALF_A_COPY),
            half_made: false,
            names: String::new(),
            upstream: None,
        };
        self.server(|server| server.data = Some(copy));
        self.work(300..2_000).await;
        let done = self.source(&source).ok_or_else(unreachable)?;
        self.check_disk()?;
        self.server(|server| {
            if let Some(data) = &mut server.data {
                data.damage = None;
                data.wal = done.wal;
            }
            server.touch();
        });
        self.stage.servers(|servers| outrun(servers, self.host));
        Ok(())
    }

    async fn clone_remote(&self, source: Option<Upstream>, _: Vec<String>) -> Result<(), PgError> {
        let source = source.ok_or_else(|| PgError::Failed("there is no archive here".to_owned()))?;
        self.clone_from(source).await
    }

    async fn start(&self, role: StartAs, limit: Duration) -> Result<(), PgError> {
        if self.half_rewound() {
            return Err(PgError::Unusable(HALF_REWOUND.to_owned()));
        }
        if self.postmaster().is_none() {
            if role == StartAs::Primary {
                promises::check_start(&self.stage, self.host);
            }
            self.check_disk()?;
            let there = self.server(|server| {
                let Some(data) = &mut server.data else { return false };
                data.standby = role != StartAs::Primary;
                data.upstream = match &role {
                    StartAs::Standby(upstream) => upstream.clone(),
                    StartAs::Primary => None,
                };
                true
            });
            if !there {
                return Err(PgError::Failed("there is no data directory".to_owned()));
            }
            // Until its files are written and the postmaster shows, a fence finds nobody to end.
            let slow = self.server(|server| server.disk_slow);
            self.stage.micros(if slow { 100_000..4_000_000 } else { 1_000..10_000 }).await;
            if self.postmaster().is_none() {
                server::spawn(&self.stage, self.host);
            }
        }
        let Some((number, _)) = self.postmaster() else {
            return Err(PgError::Failed("PostgreSQL ended right away".to_owned()));
        };
        let up = self.wait("starting PostgreSQL", limit, move |server| match server.postmaster(number) {
            None => Some(Err(PgError::Failed("PostgreSQL ended while it started".to_owned()))),
            Some(postmaster) if postmaster.phase == Phase::Starting => None,
            Some(_) => Some(Ok(())),
        });
        up.await?
    }

    async fn stop(
        &self,
        mode: StopMode,
        limit: Duration,
        shut_down: Option<oneshot::Sender<Lsn>>,
    ) -> Result<(), PgError> {
        let Some((number, process)) = self.postmaster() else { return Ok(()) };
        if mode == StopMode::Immediate {
            self.stage.micros(1_000..8_000).await;
            if self.postmaster().is_some_and(|(now, _)| now == number) {
                server::kill(&self.stage, self.host);
            }
            return Ok(());
        }
        server::shut_down(&self.stage, self.host, number, process, shut_down);
        self.wait("stopping PostgreSQL", limit, move |server| server.postmaster(number).is_none().then_some(())).await
    }

    async fn fence(&self, _: Duration) -> Result<(), PgError> {
        self.stage.micros(500..8_000).await;
        server::kill(&self.stage, self.host);
        Ok(())
    }

    async fn promote(&self, patience: Duration, left_out: Vec<TimelineId>) -> Result<TimelineId, PgError> {
        if self.server(|server| server.refuses_promotion.is_some()) {
            self.stage.micros(1_000..20_000).await;
            return Err(PgError::Refused("it ended with exit status: 1".to_owned()));
        }
        let running =
            self.server(|server| server.running().filter(|p| p.role == PgRole::Standby).map(|p| (p.number, p.process)));
        let Some((number, process)) = running else {
            return Err(PgError::Failed("promotion needs a running standby".to_owned()));
        };
        promises::check_patience(&self.stage, self.host, number);
        // It gets on as long as that.
        let replay = self.server(|server| server.replays_until).saturating_sub(self.stage.executor().now());
        let (done, promoted) = oneshot::channel();
        server::promote(&self.stage, self.host, number, process, left_out, done);
        let timeout = PgError::Timeout { what: "promotion".to_owned(), limit: patience };
        let ended = |_| PgError::Failed("PostgreSQL ended while it was promoted".to_owned());
        let timeline = self.clock.within(replay + patience, promoted).await.ok_or(timeout)?.map_err(ended)?;
        // It takes writes, but its agent can't see that.
        self.check_session()?;
        Ok(timeline)
    }

    async fn follow(&self, upstream: Option<Upstream>) -> Result<(), PgError> {
        self.check_disk()?;
        self.stage.micros(500..3_000).await;
        self.server(|server| {
            if let Some(data) = &mut server.data {
                data.upstream = upstream;
            }
            server.touch();
        });
        Ok(())
    }

    async fn diverged(&self, upstream: Upstream) -> Divergence {
        self.stage.micros(1_000..10_000).await;
        let Some(source) = self.source(&upstream) else {
            return Divergence::Unknown(format!("{} can't be reached", upstream.name));
        };
        if !source.primary {
            return Divergence::Unknown(format!("{} is in recovery", upstream.name));
        }
        let Some(own) = self.server(|server| server.data.as_ref().map(|data| data.wal.clone())) else {
            return Divergence::Unknown("there is no data directory".to_owned());
        };
        if own.is_prefix_of(&source.wal) {
            return Divergence::None;
        }
        if !source.checkpointed {
            return Divergence::Unknown(format!("{} has no checkpoint on its timeline yet", upstream.name));
        }
        Divergence::Rewind(format!("{} here, {} at {}", own.end(), source.wal.end(), upstream.name))
    }

    async fn rewind(&self, upstream: Upstream) -> Result<(), PgError> {
        self.server(|server| server.rewound = true);
        self.check_disk()?;
        let unreachable = || PgError::Failed(format!("{} can't be reached", upstream.name));
        let begun = self.source(&upstream).ok_or_else(unreachable)?;
        if !begun.primary || !begun.checkpointed {
            return Err(PgError::Failed(format!("{} is no source for pg_rewind yet", upstream.name)));
        }
        self.server(|server| {
            if let Some(data) = &mut server.data {
                data.damage = Some(HALF_REWOUND);
            }
        });
        self.work(100..1_500).await;
        let done = self.source(&upstream).ok_or_else(unreachable)?;
        self.check_disk()?;
        self.server(|server| {
            if let Some(data) = &mut server.data {
                data.damage = None;
                data.checkpoint = done.wal.end();
                data.checkpoint_timeline = done.wal.timeline();
                // The source's WAL takes the place of what was here, and pg_rewind leaves no slot.
                data.oldest = done.oldest;
                data.copied_at = data.copied_at.max(done.oldest);
                data.forget_slots();
                data.wal = done.wal;
                data.state = ControlState::InArchiveRecovery;
                data.standby = true;
            }
            server.touch();
        });
        Ok(())
    }

    fn half_rewound(&self) -> bool {
        self.server(|server| server.data.as_ref().is_some_and(|data| data.damage == Some(HALF_REWOUND)))
    }

    fn is_set_to_follow(&self) -> bool {
        self.server(|server| server.data.as_ref().is_some_and(|data| data.standby))
    }

    fn half_made(&self) -> bool {
        self.server(|server| server.data.as_ref().is_some_and(|data| data.half_made))
    }

    fn end_bootstrap(&self) -> Result<(), PgError> {
        self.server(|server| {
            if let Some(data) = &mut server.data {
                data.half_made = false;
            }
        });
        Ok(())
    }

    async fn remove_data(&self) -> Result<(), PgError> {
        self.judge_removal("asked to");
        self.work(10..100).await;
        self.server(|server| server.data = None);
        Ok(())
    }

    async fn move_data_aside(&self) -> Result<(), PgError> {
        // Half a cluster may go; what `initialize` names is a whole one.
        let system = self.server(|server| server.data.as_ref().map(|data| data.system.0));
        let recorded = self.stage.key("initialize").and_then(|id| id.as_u64());
        if !self.half_made() || recorded.is_some() && recorded == system {
            self.judge_removal("it is taken for half a cluster");
        }
        self.work(1..5).await;
        self.server(|server| (server.data, server.rewound) = (None, false));
        Ok(())
    }

    async fn checkpoint(&self, limit: Duration) -> Result<(), PgError> {
        let Some((number, _)) = self.postmaster() else {
            return Err(PgError::Failed("the server is not running".to_owned()));
        };
        let since = self.clock.now();
        while self.frozen() {
            let gone = self.wait("CHECKPOINT", limit, |server| server.postmaster(number).is_none().then_some(()));
            tokio::select! {
                biased;
                ended = gone => {
                    ended?;
                    return Err(PgError::Failed("the server ended".to_owned()));
                }
                () = self.clock.sleep(Duration::from_millis(100)) => {
                    if self.clock.now().since(since) >= limit {
                        return Err(PgError::Timeout { what: "CHECKPOINT".to_owned(), limit });
                    }
                }
            }
        }
        self.check_session()?;
        self.work(2..60).await;
        self.check_disk()?;
        self.server(|server| {
            let same = server.postmaster(number).is_some();
            if let (true, Some(data)) = (same, &mut server.data) {
                data.checkpoint = data.wal.end();
                data.checkpoint_timeline = data.wal.timeline();
            }
        });
        Ok(())
    }

    async fn set_synchronous_standby_names(&self, names: String) -> Result<(), PgError> {
        if let Some(running) = self.seen.lock().as_ref().filter(|running| running.role == PgRole::Primary) {
            promises::check_lag(&self.stage, running, &names);
        }
        if names.starts_with("ANY 0") || names.starts_with("0 ") {
            self.stage.judge(|judge, now| judge.violation(now, format!("PostgreSQL does not start with '{names}'")));
        }
        self.check_disk()?;
        self.server(|server| {
            if let Some(data) = &mut server.data {
                data.names = names;
            }
        });
        // They are in its files, and wait there for the next reload.
        self.check_session()?;
        let Some((number, process)) = self.postmaster() else { return Ok(()) };
        let (done, taken_up) = oneshot::channel();
        commit::reload_names(&self.stage, self.host, number, process, done);
        if self.server(|server| server.running().is_none()) {
            return Ok(());
        }
        let limit = Duration::from_secs(5);
        let timeout = PgError::Timeout { what: "synchronous_standby_names".to_owned(), limit };
        let ended = |_| PgError::Failed("the server ended".to_owned());
        self.clock.within(limit, taken_up).await.ok_or(timeout)?.map_err(ended)
    }

    async fn set_slots(&self, plan: SlotPlan) -> Result<SlotsDone, PgError> {
        while self.frozen() {
            self.clock.sleep(Duration::from_millis(100)).await;
        }
        self.stage.micros(200..3_000).await;
        self.check_session()?;
        self.check_disk()?;
        self.apply_slots(plan).await
    }

    async fn copy_slots(&self, wanted: BTreeMap<String, WantedSlot>, source: Upstream) -> Result<Vec<String>, PgError> {
        self.run_copy_slots(wanted, source).await
    }

    async fn history(&self, timeline: TimelineId) -> Option<(History, String)> {
        let wal = self.server(|server| server.data.as_ref().map(|data| data.wal.clone()))?;
        (wal.timeline() == timeline).then(|| (wal.history(), "2030-01-01T00:00:00+00:00".to_owned()))
    }

    fn callback(&self, _: &'static str, _: &str) {}

    async fn keep_promise(&self, until: Instant) -> Result<(), PgError> {
        self.work(1..20).await;
        self.server(|server| server.promised = server.promised.max(Some(until)));
        Ok(())
    }

    fn kept_promise(&self) -> Option<Instant> {
        self.server(|server| server.promised)
    }
}

fn status(server: &Server) -> PgStatus {
    let Some(data) = &server.data else { return PgStatus::NoData };
    let Some(postmaster) = &server.postmaster else {
        if data.damage == Some(HALF_A_COPY) {
            return PgStatus::NoData;
        }
        return PgStatus::Stopped(ControlData {
            system_id: data.system,
            state: data.state,
            timeline: data.checkpoint_timeline,
            checkpoint: data.checkpoint,
            standby: data.standby,
        });
    };
    match postmaster.phase {
        Phase::Starting => return PgStatus::Starting,
        Phase::Stopping => return PgStatus::Stopping,
        Phase::Running => {}
    }
    let standby = postmaster.role == PgRole::Standby;
    let end = postmaster.replayed.map_or(data.wal.end(), position);
    let names = Names::parse(&postmaster.names_shown);
    let chosen = names.chosen(&postmaster.senders);
    let sender = |(name, sender): (&trunkline_common::MemberName, &server::Sender)| {
        let listed = names.listed.iter().position(|listed| listed == name);
        let sync_state = match listed {
            Some(_) if chosen.contains(&name) && names.any => "quorum",
            Some(_) if chosen.contains(&name) => "sync",
            Some(_) => "potential",
            None => "async",
        };
        let at = Some(position(sender.flushed));
        WalSender {
            usename: "replicator".to_owned(),
            application_name: name.0.clone(),
            client_addr: None,
            state: if sender.caught_up { "streaming" } else { "catchup" }.to_owned(),
            sync_state: sync_state.to_owned(),
            sync_priority: listed.map_or(0, |place| place as i32 + 1),
            write_lsn: at,
            flush_lsn: at,
            replay_lsn: at,
        }
    };
    PgStatus::Running(Running {
        role: postmaster.role,
        system_id: data.system,
        timeline: Some(data.wal.timeline()),
        checkpoint_timeline: Some(data.checkpoint_timeline),
        lsn: end,
        receive_lsn: (standby && postmaster.replayed.is_none()).then_some(end),
        replay_lsn: standby.then_some(end),
        reads_own_wal: postmaster.replayed.is_some(),
        replay_timestamp: None,
        replay_paused: false,
        latest_end_lsn: None,
        replication_state: standby
            .then(|| if postmaster.streaming { "streaming" } else { "in archive recovery" }.to_owned()),
        upstream: data
            .upstream
            .as_ref()
            .filter(|_| standby)
            .map(|upstream| format!("{}:{}", upstream.host, upstream.port)),
        upstream_slot: data.upstream.as_ref().filter(|_| standby).and_then(|upstream| upstream.slot.clone()),
        server_version: 150_004,
        postmaster_start_time: format!("2030-01-01 00:00:00.{:06}+00:00", postmaster.number % 1_000_000),
        replication: postmaster.senders.iter().map(sender).collect(),
        synchronous_standby_names: postmaster.names_shown.clone(),
        synchronous_commit: "on".to_owned(),
        waits_for_disk: false,
        pending_restart: BTreeMap::new(),
        slots: data.slot_positions(),
    })
}
