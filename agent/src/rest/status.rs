//! The documents: how this node is (`/patroni` and every health path, rest-api §3.1), how the cluster is (`/cluster`, §3.2).

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, FixedOffset};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use trunkline_common::cluster::Initialize;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::{Clock, ClusterView, Instant, Lsn, Member, MemberName, SystemId};
use trunkline_config::Settings;
use trunkline_config::dynamic::SynchronousMode;

use super::Observe;
use super::health::{self, Inputs, Query};
use crate::node::{Board, Noted, PATRONI_VERSION};
use crate::peer::{HOLDS_LEADER_KEY, READS_OWN_WAL};
use crate::postgres::{PgRole, PgStatus, Running};

/// How long PostgreSQL may take to answer for a health check or a status document.
const OBSERVE_LIMIT: Duration = Duration::from_millis(1500);

/// How long whoever asks waits if he does not say: so long do Patroni's members.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// Where answers come from.
#[derive(Debug)]
pub struct Sources<'a, P, C> {
    /// The watched cluster.
    pub knowledge: &'a watch::Receiver<Knowledge>,
    /// What the HA loop publishes.
    pub board: &'a watch::Receiver<Board>,
    /// PostgreSQL.
    pub postgres: &'a P,
    /// The time.
    pub clock: &'a C,
}

impl<P: Observe, C: Clock> Sources<'_, P, C> {
    /// Whether `GET /primary` gets 200 and the role of a primary, by which this node proves to a router that it leads.
    pub async fn prove_leadership(&self, name: &MemberName) -> bool {
        let picture = self.picture(PATIENCE).await;
        let code = health::code("/primary", &Query::default(), &picture.inputs(name));
        code == 200 && picture.role() == "primary"
    }

    /// The document of `/patroni`, by which other members judge this one: in time for one who waits for `patience`.
    pub async fn document(&self, scope: &str, name: &MemberName, patience: Duration) -> Value {
        self.picture(patience).await.document(scope, name)
    }

    /// Looks at everything there is to know now, in time for one who waits for `patience`.
    pub(crate) async fn picture(&self, patience: Duration) -> Picture {
        let limit = OBSERVE_LIMIT.min(patience * 3 / 4);
        let look = self.clock.within(limit + limit / 10, self.postgres.observe(limit));
        let postgres = look.await.unwrap_or(PgStatus::Unresponsive);
        // After the look, so that a turn of the loop meanwhile is not missed.
        Picture {
            now: self.clock.now(),
            view: self.confirmed_view(),
            settings: self.settings(),
            board: self.board.borrow().clone(),
            postgres,
        }
    }

    /// The view, unless the DCS has not confirmed it for `ttl`.
    pub(crate) fn confirmed_view(&self) -> Option<Arc<ClusterView>> {
        let knowledge = self.knowledge.borrow();
        let view = knowledge.view.clone()?;
        (knowledge.confirmed_at? + view.settings.ttl > self.clock.now()).then_some(view)
    }

    /// The settings last known, confirmed or not.
    pub(crate) fn settings(&self) -> Settings {
        self.knowledge.borrow().view.as_ref().map(|view| view.settings.clone()).unwrap_or_default()
    }
}

/// Everything one answer is made of, taken together.
#[derive(Debug, Clone)]
pub(crate) struct Picture {
    /// When it was taken.
    pub now: Instant,
    /// The cluster; `None` while the DCS does not confirm it.
    pub view: Option<Arc<ClusterView>>,
    /// The settings last known, confirmed or not.
    pub settings: Settings,
    /// What the HA loop last published.
    pub board: Board,
    /// PostgreSQL, looked at for this answer.
    pub postgres: PgStatus,
}

impl Picture {
    /// What SQL said, where the state lets it count: a server that is being bootstrapped or stopped answers queries too.
    pub fn running(&self) -> Option<&Running> {
        match &self.postgres {
            PgStatus::Running(running) if matches!(self.state(), "running" | "restarting" | "starting") => {
                Some(running)
            }
            _ => None,
        }
    }

    /// The loop's state, corrected by what was just seen where the loop can't have noticed yet.
    pub fn state(&self) -> &str {
        match (self.board.state.as_str(), &self.postgres) {
            ("starting" | "stopped" | "crashed" | "start failed" | "restart failed", PgStatus::Running(_)) => "running",
            ("running", PgStatus::Running(_)) => "running",
            ("running", PgStatus::Starting) => "starting",
            ("running", PgStatus::Stopping) => "stopping",
            ("running", _) => "unknown",
            (state, _) => state,
        }
    }

    /// The role by SQL; the loop's where there is none, and for the standby leader, which SQL can't tell.
    pub fn role(&self) -> &str {
        match self.running().map(|running| running.role) {
            Some(PgRole::Primary) => "primary",
            Some(PgRole::Standby) if self.settings.standby_cluster.is_none() => "replica",
            _ => &self.board.role,
        }
    }

    /// Whether this node holds the leader key and its lease is not over.
    pub fn lock(&self) -> bool {
        self.board.leader_until.is_some_and(|until| until > self.now)
    }

    /// Whether automatic failover is off.
    pub fn pause(&self) -> bool {
        self.settings.pause || self.view.is_none() && self.board.pause
    }

    /// Whether nobody leads, as far as is known.
    pub fn cluster_unlocked(&self) -> bool {
        self.view.as_ref().is_none_or(|view| view.leader.is_none())
    }

    /// Whether a standby of this name is synchronous, and in which of the two ways.
    pub fn synchronous(&self, name: &MemberName) -> Synchronous {
        let listed = self.view.as_ref().is_some_and(|view| view.sync.lists(name));
        if !listed || self.running().is_none() || self.role() != "replica" {
            return Synchronous::No;
        }
        match self.settings.synchronous_mode {
            SynchronousMode::Off => Synchronous::No,
            SynchronousMode::On => Synchronous::Standby,
            SynchronousMode::Quorum => Synchronous::Voter,
        }
    }

    /// The inputs of the health tables.
    pub fn inputs(&self, name: &MemberName) -> Inputs<'_> {
        let running = self.running();
        let standby = running.filter(|running| running.role == PgRole::Standby);
        let synchronous = self.synchronous(name);
        Inputs {
            cluster: self.view.is_some(),
            standby_cluster: self.settings.standby_cluster.is_some(),
            pause: self.pause(),
            lock: self.lock(),
            role: self.role(),
            state: self.state(),
            replication_state: standby.and_then(|running| running.replication_state.as_deref()),
            sync_standby: synchronous == Synchronous::Standby,
            quorum_standby: synchronous == Synchronous::Voter,
            optime: self.view.as_ref().map(|view| view.status.optime).unwrap_or_default(),
            latest_end: standby.and_then(|running| running.latest_end_lsn).unwrap_or_default(),
            received: standby.map(received).unwrap_or_default(),
            replayed: standby.and_then(|running| running.replay_lsn).unwrap_or_default(),
            tags: &self.board.tags,
            failsafe_active: self.board.failsafe_active,
            maximum_lag_on_failover: self.settings.maximum_lag_on_failover,
        }
    }

    /// The status document, its fields in Patroni's order.
    pub fn document(&self, scope: &str, name: &MemberName) -> Value {
        let mut doc = Map::new();
        let running = self.running();
        doc.insert("state".into(), self.state().into());
        if let Some(running) = running {
            doc.insert("postmaster_start_time".into(), running.postmaster_start_time.as_str().into());
        }
        doc.insert("role".into(), self.role().into());
        if let Some(running) = running {
            doc.insert("server_version".into(), running.server_version.into());
            doc.insert("xlog".into(), xlog(running));
            match self.synchronous(name) {
                Synchronous::No => {}
                Synchronous::Standby => drop(doc.insert("sync_standby".into(), true.into())),
                Synchronous::Voter => drop(doc.insert("quorum_standby".into(), true.into())),
            }
            doc.insert("timeline".into(), running.timeline.map_or(Value::Null, |timeline| timeline.0.into()));
            if let (PgRole::Standby, Some(state)) = (running.role, &running.replication_state) {
                doc.insert("replication_state".into(), state.as_str().into());
            }
            if !running.replication.is_empty() {
                doc.insert("replication".into(), replication(running));
            }
        }
        let mut flag = |name: &str, set: bool| {
            if set {
                doc.insert(name.into(), true.into());
            }
        };
        flag("pause", self.pause());
        flag("cluster_unlocked", self.cluster_unlocked());
        flag("failsafe_mode_is_active", self.board.failsafe_active);
        doc.insert("dcs_last_seen".into(), self.board.dcs_last_seen.into());
        if !self.board.tags.is_empty() {
            doc.insert("tags".into(), self.board.tags.clone().into());
        }
        if let Some(system_id) = self.system_id() {
            doc.insert("database_system_identifier".into(), system_id.to_string().into());
        }
        if let Some(running) = running.filter(|running| !running.pending_restart.is_empty()) {
            doc.insert("pending_restart".into(), true.into());
            let reason = running.pending_restart.iter().map(|(name, values)| (name.clone(), values.clone()));
            doc.insert("pending_restart_reason".into(), Value::Object(reason.collect()));
        }
        doc.insert("patroni".into(), json!({"version": PATRONI_VERSION, "scope": scope, "name": name.as_str()}));
        if let Some(Value::Object(planned)) = &self.board.scheduled_restart {
            let mut planned = planned.clone();
            planned.shift_remove("postmaster_start_time");
            doc.insert("scheduled_restart".into(), planned.into());
        }
        if self.board.watchdog_failed {
            doc.insert("watchdog_failed".into(), true.into());
        }
        if self.board.not_gone_until.is_some_and(|until| until > self.now) {
            doc.insert(HOLDS_LEADER_KEY.into(), true.into());
        }
        let guard = &self.board.guard;
        doc.insert(
            "guard".into(),
            json!({
                "process": guard.process.to_string(),
                "egress": guard.egress.to_string(),
                "watchdog": guard.watchdog.to_string(),
            }),
        );
        Value::Object(doc)
    }

    fn system_id(&self) -> Option<SystemId> {
        let of_server = |status: &PgStatus| match status {
            PgStatus::Running(running) => Some(running.system_id),
            PgStatus::Stopped(control) => Some(control.system_id),
            _ => None,
        };
        of_server(&self.postgres).or_else(|| of_server(&self.board.postgres)).or_else(|| {
            match self.view.as_ref()?.initialize {
                Initialize::Done(system_id) => Some(system_id),
                _ => None,
            }
        })
    }
}

/// How a standby takes part in commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Synchronous {
    /// It doesn't.
    No,
    /// Commits wait for it (mode `on`).
    Standby,
    /// Commits wait for some of the voters, of which it is one (mode `quorum`).
    Voter,
}

/// The last received position; the replayed one where nothing was received since the start.
pub(crate) fn received(running: &Running) -> Lsn {
    running.receive_lsn.filter(|lsn| lsn.is_valid()).or(running.replay_lsn).unwrap_or_default()
}

fn xlog(running: &Running) -> Value {
    if running.role == PgRole::Primary {
        return json!({"location": running.lsn.0});
    }
    let mut positions = json!({
        "received_location": received(running).0,
        "replayed_location": running.replay_lsn.unwrap_or_default().0,
        "replayed_timestamp": running.replay_timestamp.as_deref().map(python_time),
        "paused": running.replay_paused,
    });
    if running.reads_own_wal {
        positions[READS_OWN_WAL] = Value::Bool(true);
    }
    positions
}

fn replication(running: &Running) -> Value {
    let sender = |sender: &crate::postgres::WalSender| {
        json!({
            "usename": sender.usename,
            "application_name": sender.application_name,
            "client_addr": sender.client_addr,
            "state": sender.state,
            "sync_state": sender.sync_state,
            "sync_priority": sender.sync_priority,
        })
    };
    running.replication.iter().map(sender).collect()
}

/// PostgreSQL's text of a time stamp as a time; `None` for `infinity` and the like.
pub(crate) fn postgres_time(text: &str) -> Option<DateTime<FixedOffset>> {
    DateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f%#z").ok()
}

/// As Python prints a time with zone: `2031-05-01 10:00:00.123456+00:00`, no fraction where it is zero.
fn python_time(text: &str) -> String {
    let Some(time) = postgres_time(text) else { return text.to_owned() };
    let fraction = if time.timestamp_subsec_micros() == 0 { "" } else { "%.6f" };
    time.format(&format!("%Y-%m-%d %H:%M:%S{fraction}%:z")).to_string()
}

/// `GET /decisions`: what the HA loop decided lately and why, oldest first.
pub(super) fn decisions<'d>(noted: impl IntoIterator<Item = &'d Noted>) -> Value {
    let line = |noted: &Noted| {
        let at = noted.at.to_rfc3339_opts(chrono::SecondsFormat::Millis, false);
        json!({ "time": at, "decision": noted.action, "reason": noted.reason })
    };
    noted.into_iter().map(line).collect()
}

/// The `/cluster` document.
pub(crate) fn cluster(view: &ClusterView, scope: &str) -> Value {
    let mut doc = Map::new();
    doc.insert(
        "members".into(),
        view.members.iter().map(|(name, member)| cluster_member(view, name, member)).collect(),
    );
    if view.settings.pause {
        doc.insert("pause".into(), true.into());
    }
    if let Some(request) = view.failover.as_ref()
        && let Some(at) = request.scheduled_at
    {
        let mut planned = Map::from_iter([("at".to_owned(), super::time::isoformat(at).into())]);
        for (field, name) in [("from", &request.leader), ("to", &request.candidate)] {
            if let Some(name) = name {
                planned.insert(field.into(), name.as_str().into());
            }
        }
        doc.insert("scheduled_switchover".into(), planned.into());
    }
    doc.insert("scope".into(), scope.into());
    Value::Object(doc)
}

fn cluster_member(view: &ClusterView, name: &MemberName, member: &Member) -> Value {
    let leads = view.is_leader(name);
    let role = match view.settings.synchronous_mode {
        _ if leads && view.settings.standby_cluster.is_some() => "standby_leader",
        _ if leads => "leader",
        SynchronousMode::On if view.sync.lists(name) => "sync_standby",
        SynchronousMode::Quorum if view.sync.lists(name) => "quorum_standby",
        _ => "replica",
    };
    let streaming = member.replication_state.as_deref().filter(|_| role != "leader");
    let mut doc = Map::new();
    doc.insert("name".into(), name.as_str().into());
    doc.insert("role".into(), role.into());
    doc.insert("state".into(), streaming.unwrap_or(&member.state).into());
    doc.insert("api_url".into(), member.api_url.as_deref().into());
    if let Some((host, port)) = member.host_port() {
        doc.insert("host".into(), host.into());
        doc.insert("port".into(), port.into());
    }
    let mut optional = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            doc.insert(field.into(), value);
        }
    };
    optional("timeline", member.timeline.map(|timeline| timeline.0.into()));
    optional("pending_restart", member.pending_restart.then(|| true.into()));
    optional("pending_restart_reason", member.pending_restart_reason.clone());
    optional("scheduled_restart", member.scheduled_restart.clone());
    optional("tags", (!member.tags.is_empty()).then(|| member.tags.clone().into()));
    if !leads {
        let positions = [("receive_", member.receive_lsn), ("replay_", member.replay_lsn), ("", member.xlog_location)];
        for (kind, lsn) in positions {
            let (text, lag) = match lsn.filter(|lsn| lsn.is_valid()) {
                Some(lsn) => (Value::from(lsn.to_string()), Value::from(lsn.lag_behind(view.status.optime))),
                None => ("unknown".into(), "unknown".into()),
            };
            doc.insert(format!("{kind}lsn"), text);
            doc.insert(format!("{kind}lag"), lag);
        }
    }
    Value::Object(doc)
}
