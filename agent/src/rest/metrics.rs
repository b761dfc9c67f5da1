//! `/metrics`: Patroni's names and order (rest-api §5), then our own.

use std::fmt::{Display, Write};
use std::time::Duration;

use prometheus::process_collector::ProcessCollector;
use prometheus::{IntCounterVec, Opts, Registry, TextEncoder};
use trunkline_common::dcs::follow::Knowledge;
use trunkline_config::tags::failover_priority;

use super::Identity;
use super::status::{Picture, Synchronous, postgres_time, received};
use crate::node::PATRONI_VERSION;
use crate::postgres::PgRole;

/// The values of `state`, in the order of their numbers in `patroni_postgres_state`.
const STATES: [(&str, &str); 15] = [
    ("initializing new cluster", "initdb"),
    ("initdb failed", "initdb_failed"),
    ("running custom bootstrap script", "custom_bootstrap"),
    ("custom bootstrap failed", "custom_bootstrap_failed"),
    ("creating replica", "creating_replica"),
    ("running", "running"),
    ("starting", "starting"),
    ("starting after custom bootstrap", "bootstrap_starting"),
    ("start failed", "start_failed"),
    ("restarting", "restarting"),
    ("restart failed", "restart_failed"),
    ("stopping", "stopping"),
    ("stopped", "stopped"),
    ("stop failed", "stop_failed"),
    ("crashed", "crashed"),
];

/// What the API counts itself, and what the operating system counts of this process.
pub(crate) struct Instruments {
    registry: Registry,
    requests: IntCounterVec,
}

impl Instruments {
    /// Nothing counted yet.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let opts = Opts::new("trunkline_rest_requests_total", "Requests answered, by status.");
        let requests = IntCounterVec::new(opts, &["code"])?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Self { registry, requests })
    }

    /// One more answer.
    pub fn answered(&self, status: u16) {
        self.requests.with_label_values(&[&status.to_string()]).inc();
    }

    /// Their part of the exposition.
    pub fn exposition(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

/// What is known of the node, in Prometheus' text format.
pub(crate) fn exposition(picture: &Picture, knowledge: &Knowledge, identity: &Identity) -> String {
    let scope = escaped(&identity.scope);
    let mut out = Exposition {
        text: String::new(),
        labels: format!("scope=\"{scope}\",name=\"{}\"", escaped(identity.name.as_str())),
    };
    patroni(&mut out, picture, knowledge, identity);
    trunkline(&mut out, picture, knowledge);
    out.text
}

fn patroni(out: &mut Exposition, picture: &Picture, knowledge: &Knowledge, identity: &Identity) {
    let running = picture.running();
    let role = picture.role();
    let standby = running.filter(|running| running.role == PgRole::Standby);
    let primary = running.filter(|running| running.role == PgRole::Primary);
    let synchronous = picture.synchronous(&identity.name);
    let seconds = |text: Option<&str>| text.and_then(postgres_time).map_or(0.0, |t| t.timestamp_micros() as f64 / 1e6);
    let version: String = PATRONI_VERSION.split('.').map(|part| format!("{part:0>2}")).collect();

    out.gauge("patroni_version", "The Patroni version this node is compatible with, two digits a part.", version);
    out.flag("patroni_postgres_running", "Whether PostgreSQL is running.", picture.state() == "running");
    let started = seconds(running.map(|running| running.postmaster_start_time.as_str()));
    out.gauge("patroni_postmaster_start_time", "When the postmaster started, seconds since the epoch.", float(started));
    out.flag("patroni_primary", "Whether this node is the primary.", role == "primary");
    let location = primary.map_or(0, |running| running.lsn.0);
    out.counter("patroni_xlog_location", "WAL position of a primary, 0 elsewhere.", location);
    out.flag("patroni_standby_leader", "Whether this node is a standby leader.", role == "standby_leader");
    out.flag("patroni_replica", "Whether this node is a replica.", role == "replica");
    out.flag(
        "patroni_sync_standby",
        "Whether this node is a synchronous standby.",
        synchronous == Synchronous::Standby,
    );
    out.flag("patroni_quorum_standby", "Whether this node is a quorum voter.", synchronous == Synchronous::Voter);
    let location = standby.map_or(0, |running| received(running).0);
    out.counter("patroni_xlog_received_location", "Received WAL position of a standby, 0 elsewhere.", location);
    let location = standby.and_then(|running| running.replay_lsn).unwrap_or_default().0;
    out.counter("patroni_xlog_replayed_location", "Replayed WAL position of a standby, 0 elsewhere.", location);
    let replayed = seconds(standby.and_then(|running| running.replay_timestamp.as_deref()));
    out.gauge("patroni_xlog_replayed_timestamp", "Commit time of the last replayed transaction.", float(replayed));
    out.flag("patroni_xlog_paused", "Whether replay is paused.", standby.is_some_and(|running| running.replay_paused));
    if running.is_some_and(|running| running.server_version >= 90_600) {
        let state = standby.and_then(|running| running.replication_state.as_deref());
        out.flag("patroni_postgres_streaming", "Whether this standby streams.", state == Some("streaming"));
        let archive = state == Some("in archive recovery");
        out.flag("patroni_postgres_in_archive_recovery", "Whether this standby reads from the archive.", archive);
    }
    let server_version = running.map_or(0, |running| running.server_version);
    out.gauge(
        "patroni_postgres_server_version",
        "PostgreSQL's server_version_num, 0 while it is down.",
        server_version,
    );
    out.flag("patroni_cluster_unlocked", "Whether nobody holds the leader key.", picture.cluster_unlocked());
    out.flag("patroni_failsafe_mode_is_active", "Whether failsafe mode is in use.", picture.board.failsafe_active);
    out.flag("patroni_failsafe_mode_enabled", "Whether failsafe mode is configured.", picture.settings.failsafe_mode);
    let failsafe = knowledge.view.as_ref().and_then(|view| view.failsafe.as_ref());
    let member = failsafe.is_some_and(|members| members.contains_key(&identity.name));
    out.flag("patroni_failsafe_member", "Whether this node is in the failsafe key.", member);
    let timeline = running.and_then(|running| running.timeline).unwrap_or_default();
    out.gauge("patroni_postgres_timeline", "PostgreSQL's timeline, 0 where unknown.", timeline);
    out.gauge("patroni_dcs_last_seen", "When the DCS last answered.", picture.board.dcs_last_seen);
    let pending = running.is_some_and(|running| !running.pending_restart.is_empty());
    out.flag("patroni_pending_restart", "Whether PostgreSQL has to be restarted for a setting.", pending);
    out.flag("patroni_is_paused", "Whether automatic failover is off.", picture.pause());
    let values: Vec<String> = STATES.iter().enumerate().map(|(i, (_, name))| format!("{i}={name}")).collect();
    let state = STATES.iter().position(|(state, _)| *state == picture.state()).map_or(-1, |i| i as i64);
    out.help("patroni_postgres_state", "PostgreSQL's state as a number.");
    out.line(&format!("# Values: {}", values.join(", ")));
    out.line("# TYPE patroni_postgres_state gauge");
    out.sample("patroni_postgres_state", "", state);
    let priority = failover_priority(&picture.board.tags);
    out.gauge("patroni_failover_priority", "Failover priority, 0 = never leader.", priority);
}

fn trunkline(out: &mut Exposition, picture: &Picture, knowledge: &Knowledge) {
    let board = &picture.board;
    let info = |label: &str, value: &str| format!(",{label}=\"{}\"", escaped(value));

    out.head("trunkline_info", "The agent's own version.", "gauge");
    out.sample("trunkline_info", &info("version", env!("CARGO_PKG_VERSION")), 1);
    let left = board.leader_until.map_or(Duration::ZERO, |until| until.since(picture.now));
    out.gauge(
        "trunkline_lease_seconds",
        "Time for which this node may still lead, 0 without the key.",
        float(left.as_secs_f64()),
    );
    let age = knowledge.confirmed_at.map_or(-1.0, |at| picture.now.since(at).as_secs_f64());
    out.gauge(
        "trunkline_dcs_knowledge_age_seconds",
        "Time since the DCS last confirmed what is known of it, -1 = never.",
        float(age),
    );
    out.flag("trunkline_dcs_trouble", "Whether the watch on the DCS is broken now.", knowledge.trouble.is_some());
    let revision = knowledge.view.as_ref().map_or(0, |view| view.revision.0);
    out.gauge("trunkline_dcs_revision", "Revision of the DCS that is known.", revision);
    out.head("trunkline_decision", "What the HA loop decided last.", "gauge");
    out.sample("trunkline_decision", &info("decision", board.decision), 1);
    out.flag("trunkline_task_running", "Whether a long action is going on.", board.task.is_some());
    let due = board.next_run.since(picture.now).as_secs_f64() - picture.now.since(board.next_run).as_secs_f64();
    out.gauge("trunkline_next_turn_seconds", "Time until the HA loop's next turn is due, negative = late.", float(due));
    out.flag("trunkline_watchdog_failed", "Whether a required watchdog does not work.", board.watchdog_failed);
    out.head("trunkline_guard", "Whether what ends writes where the agent can't works.", "gauge");
    for (name, part) in
        [("process", &board.guard.process), ("egress", &board.guard.egress), ("watchdog", &board.guard.watchdog)]
    {
        out.sample("trunkline_guard", &info("part", name), u8::from(part.works()));
    }
    out.head("trunkline_transitions_total", "What this node did about leadership, and why.", "counter");
    for ((kind, reason), times) in &board.transitions {
        out.sample("trunkline_transitions_total", &(info("kind", kind) + &info("reason", reason)), times);
    }
}

/// A number the way Prometheus and Python print a float.
fn float(value: f64) -> String {
    format!("{value:?}")
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Text with the same first labels on every sample.
struct Exposition {
    text: String,
    labels: String,
}

impl Exposition {
    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, help, "gauge");
        self.sample(name, "", value);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, help, "counter");
        self.sample(name, "", value);
    }

    fn flag(&mut self, name: &str, help: &str, set: bool) {
        self.gauge(name, help, u8::from(set));
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        self.help(name, help);
        self.line(&format!("# TYPE {name} {kind}"));
    }

    fn help(&mut self, name: &str, help: &str) {
        self.line(&format!("# HELP {name} {help}"));
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// `more`: further labels, each with a comma before it.
    fn sample(&mut self, name: &str, more: &str, value: impl Display) {
        // Writing to a String can't fail.
        let _ = writeln!(self.text, "{name}{{{}{more}}} {value}", self.labels);
    }
}
