//! What operators ask a node about itself: `GET /why` (may you lead?), `GET /rto` (how long will writes be out?) and
//! `GET /explain?key=…` (why is this setting what it is?).

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::latency::{Latency, Times};
use trunkline_common::{Clock, ClusterView, Lsn, MemberName};
use trunkline_config::Local;
use trunkline_config::explain::{self, Sources};

use super::answer::Answer;
use super::health::Query;
use super::{Api, Observe};
use crate::ha::decide::{self, Action, Decision};
use crate::ha::situation::{Ground, PeerAnswers};
use crate::peer::{PeerStatus, Peers};
use crate::postgres::{PgStatus, Running, Setting};
use crate::rto;

/// How long the other members may take to tell their positions.
const PEER_LIMIT: Duration = Duration::from_secs(1);

/// What the API knows of the node beside the cluster and PostgreSQL.
pub struct Edges {
    /// Where the node's own configuration is read from.
    pub sources: Sources,
    /// How long the DCS takes to answer.
    pub latency: Box<dyn Fn() -> Latency + Send + Sync>,
}

impl Default for Edges {
    fn default() -> Self {
        Self { sources: Sources::default(), latency: Box::new(Latency::default) }
    }
}

impl<D: Dcs, P: Observe, C: Clock> Api<D, P, C> {
    /// `GET /why`: this node's verdict on itself, with what it compared. Where somebody leads, it is about what would be if
    /// that one were gone. Decided by the same function as in the HA loop.
    pub(super) async fn why(&self) -> Answer {
        let picture = self.picture().await;
        let board = &picture.board;
        let Some(ground) = board.ground.clone() else {
            return Answer::json(
                503,
                json!({"name": self.identity.name.as_str(), "reason": "the agent has just started"}),
            );
        };
        let view = self.confirmed_view().or_else(|| ground.view.clone());
        let leads = picture.lock();
        let (verdict, asked) = match leads {
            true => (None, PeerAnswers::new()),
            false => {
                let (decision, asked) = self.verdict(&ground, view.as_deref(), &picture.postgres).await;
                (Some(decision), asked)
            }
        };
        let running = match &picture.postgres {
            PgStatus::Running(running) => Some(running),
            _ => None,
        };
        let leader = view.as_ref().and_then(|view| view.leader.as_ref()).map(|leader| leader.name.as_str());
        let document = json!({
            "name": self.identity.name.as_str(),
            "leader": leader,
            "leads": leads,
            "now": {"decision": board.decision, "reason": board.reason, "task": board.task},
            "verdict": verdict.map(|decision| verdict_document(&decision, leader)),
            "own": own_numbers(&ground, running),
            "members": asked.iter().map(|(name, peer)| (name.0.clone(), peer_numbers(peer.as_ref()))).collect::<Map<_, _>>(),
            "cluster": view.as_ref().map(|view| cluster_numbers(view, running)),
        });
        Answer::json(200, document)
    }

    async fn verdict(
        &self,
        ground: &Ground,
        view: Option<&ClusterView>,
        postgres: &PgStatus,
    ) -> (Decision, PeerAnswers) {
        let mut answers: Option<PeerAnswers> = None;
        loop {
            let situation = ground.situation(self.clock.now(), self.clock.wall(), view, postgres, answers.as_ref());
            let decision = decide::without_leader(&situation);
            let members = match &decision.action {
                Action::Ask(members) if answers.is_none() => members.clone(),
                _ => return (decision, answers.unwrap_or_default()),
            };
            answers = Some(self.peers().status(members, PEER_LIMIT).await);
        }
    }

    /// `GET /rto`.
    pub(super) fn rto(&self) -> Answer {
        let (latency, took) = ((self.edges.latency)(), self.postgres.took());
        let estimate = rto::estimate(&self.settings(), &latency, took);
        Answer::json(
            200,
            json!({
                "name": self.identity.name.as_str(),
                "dcs": {"renewal_ms": times(&latency.renewals), "write_ms": times(&latency.writes)},
                "postgresql": {
                    "start_ms": took.start.map(millis), "stop_ms": took.stop.map(millis),
                    "promotion_ms": took.promotion.map(millis),
                },
                "estimate": estimate.to_string(),
                "estimate_ms": {
                    "host_death": millis(estimate.host_death),
                    "postmaster_death": estimate.postmaster_death.map(millis),
                    "switchover": millis(estimate.switchover),
                },
                "warnings": estimate.warnings,
            }),
        )
    }

    /// `GET /explain?key=…`. A node's file may say what not everybody is to know, so it takes the right to change something.
    pub(super) async fn explain(&self, query: &Query) -> Answer {
        let key = query.first("key").unwrap_or_default();
        if key.is_empty() {
            return Answer::text(400, "which setting? ?key=…");
        }
        let picture = self.picture().await;
        let local = self.local.read().clone();
        let layers = self.edges.sources.layers();
        let dynamic = picture.view.as_ref().and_then(|view| view.config.as_ref()).map(|config| config.value.clone());
        let node = explain::Node {
            layers: Some(&layers),
            loaded: Some(&local),
            dynamic: dynamic.as_ref(),
            in_force: picture.view.as_ref().map(|view| &view.settings),
            role: picture.role(),
        };
        let mut document = explain::explain(key, &node).document();
        document["name"] = self.identity.name.as_str().into();
        if let Some(name) = explain::parameter(key) {
            let pending = picture.running().and_then(|running| running.pending_restart.get(&name));
            let setting = self.postgres.setting(&name).await;
            match &setting {
                Ok(Some(setting)) if setting.rejected => not_in_force(&mut document, "PostgreSQL does not accept it"),
                Ok(None) => not_in_force(&mut document, "PostgreSQL knows no setting of this name"),
                _ => {}
            }
            document["postgresql"] = match setting {
                Ok(Some(setting)) => setting_document(&setting, pending),
                Ok(None) => json!({"error": "PostgreSQL knows no setting of this name"}),
                Err(error) => json!({"error": error.to_string()}),
            };
        }
        Answer::json(200, document)
    }

    /// The configuration as the agent goes by it.
    pub(super) fn goes_by(&self, local: &Local) {
        *self.local.write() = Arc::new(local.clone());
    }
}

/// What wins among the layers, and comes to nothing all the same.
fn not_in_force(document: &mut Value, why: &str) {
    for line in document["layers"].as_array_mut().into_iter().flatten() {
        if line["verdict"] == explain::IN_FORCE {
            line["verdict"] = format!("no effect: {why}").into();
        }
    }
}

fn times(times: &Times) -> Value {
    json!({"median": times.median().map(millis), "worst": times.worst().map(millis), "samples": times.count()})
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

fn setting_document(setting: &Setting, pending: Option<&Value>) -> Value {
    let mut notes = Vec::new();
    if setting.rejected {
        notes.push("what is configured is not accepted, and left out of the files".to_owned());
    }
    if let Some((file, _)) = setting.file.as_ref().filter(|(file, _)| file.ends_with("postgresql.auto.conf")) {
        notes.push(format!("ALTER SYSTEM wins over what is configured ({file}): ALTER SYSTEM RESET takes it back"));
    }
    if let Some(change) = pending {
        let value = |which: &str| change.get(which).and_then(Value::as_str).unwrap_or("?").to_owned();
        notes.push(format!("waits for a restart of PostgreSQL: {} -> {}", value("old_value"), value("new_value")));
    } else if setting.pending {
        notes.push("another value waits for a restart of PostgreSQL".to_owned());
    }
    if setting.source == "client" {
        notes.push("as the agent's own session has it".to_owned());
    }
    match setting.context.as_str() {
        "internal" => notes.push("can't be changed".to_owned()),
        "postmaster" => notes.push("a change takes a restart of PostgreSQL".to_owned()),
        _ => {}
    }
    notes.extend(setting.overrides.iter().map(|who| format!("other sessions have a value of their own: {who}")));
    json!({
        "value": if setting.value.contains("password") { "***" } else { &setting.value },
        "source": setting.source,
        "context": setting.context,
        "file": setting.file.as_ref().map(|(file, line)| format!("{file}:{line}")),
        "notes": notes,
    })
}

fn verdict_document(decision: &Decision, leader: Option<&str>) -> Value {
    json!({
        "may_lead": matches!(decision.action, Action::Acquire(_) | Action::Bootstrap | Action::CloneRemote(_)),
        "decision": decision.action.label(),
        "reason": decision.reason,
        "if": leader.map(|leader| format!("{leader} were gone")),
    })
}

fn cluster_numbers(view: &ClusterView, running: Option<&Running>) -> Value {
    let lsn = running.map_or(Lsn::INVALID, |running| running.lsn);
    let sync = view.sync.is_active().then(|| {
        let leader = view.sync.leader.as_ref().map(MemberName::as_str);
        json!({"leader": leader, "standbys": view.sync.standbys, "quorum": view.sync.quorum})
    });
    json!({
        "optime": view.status.optime.to_string(),
        "lag": lsn.lag_behind(view.status.optime),
        "maximum_lag_on_failover": view.settings.maximum_lag_on_failover,
        "timeline": view.timeline().map(|timeline| timeline.0),
        "pause": view.settings.pause,
        "sync": sync,
    })
}

fn own_numbers(ground: &Ground, running: Option<&Running>) -> Value {
    json!({
        "lsn": running.map(|running| running.lsn.to_string()),
        "timeline": running.and_then(|running| running.timeline).map(|timeline| timeline.0),
        "priority": ground.me.failover_priority(),
    })
}

/// Null: it did not answer.
fn peer_numbers(status: Option<&PeerStatus>) -> Value {
    let Some(peer) = status else { return Value::Null };
    json!({
        "lsn": peer.in_recovery.then(|| peer.lsn.to_string()),
        "timeline": peer.timeline.map(|timeline| timeline.0),
        "priority": peer.failover_priority,
        "primary": !peer.in_recovery,
        "watchdog_failed": peer.watchdog_failed,
    })
}
