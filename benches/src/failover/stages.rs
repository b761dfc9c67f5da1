//! Where the time of our failover goes: moments after the fault, from etcd's watch, the programs' logs and the clients.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use chrono::{DateTime, NaiveDateTime, Utc};
use futures::StreamExt;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::task::JoinHandle;
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::{Change, Dcs, WatchEvent};
use trunkline_common::{Clock, Instant, Revision, SystemClock};
use trunkline_tests::workload::Record;
use trunkline_tests::{Cluster, Node, Proxy};

use super::rounds::milliseconds;

/// Moments, in milliseconds after the fault. None: not seen, or not part of this fault.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stages {
    /// The old leader's agent says the first thing about it.
    pub detect: Option<f64>,
    /// The leader key is gone.
    pub release: Option<f64>,
    /// It has a new holder.
    pub elect: Option<f64>,
    /// The new leader acknowledges a write to a client past the router.
    pub promote: Option<f64>,
    /// The router says whom it sends writes to.
    pub route: Option<f64>,
    /// A client of the router has its first acknowledgement.
    pub first_write: Option<f64>,
}

impl Stages {
    /// The stages' names, in their order.
    pub const NAMES: [&'static str; 6] = ["detect", "release", "elect", "promote", "route", "first write"];

    /// Their moments, in the same order.
    pub fn moments(&self) -> [Option<f64>; 6] {
        [self.detect, self.release, self.elect, self.promote, self.route, self.first_write]
    }

    pub(super) fn of(
        fault: Instant,
        routed: &Record,
        direct: &Record,
        events: &KeyEvents,
        old: &Node,
        proxy: &Proxy,
    ) -> Self {
        let after = |moment: Option<Instant>| moment.map(|moment| milliseconds(moment.since(fault)));
        let recovered = routed.recovered(fault);
        let new_port = recovered.and_then(|at| routed.writes.iter().find(|write| write.acked == at)).map(|w| w.port);
        let promoted = direct.writes.iter().filter(|write| Some(write.port) == new_port && write.sent >= fault);
        let changes = events.after(fault);
        let released = changes.iter().find(|(_, change)| *change == KeyEvent::Released);
        let taken = changes.iter().find(|(_, change)| matches!(change, KeyEvent::Taken(name) if name != old.name()));
        let router_log = std::fs::read_to_string(proxy.log()).unwrap_or_default();
        let agent_log = old.log().unwrap_or_default();
        Self {
            detect: after(first_line(&agent_log, fault, |_| true)),
            release: after(released.map(|(at, _)| *at)),
            elect: after(taken.map(|(at, _)| *at)),
            promote: after(promoted.map(|write| write.acked).min()),
            route: after(first_line(&router_log, fault, |line| {
                line.contains("server for writes") && !line.contains("no server")
            })),
            first_write: after(recovered),
        }
    }
}

/// What happened to the leader key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum KeyEvent {
    Released,
    Taken(String),
}

/// The leader key's changes with the time they were seen here.
#[derive(Debug)]
pub struct KeyEvents {
    seen: Arc<Mutex<Vec<(Instant, KeyEvent)>>>,
    task: JoinHandle<()>,
}

impl KeyEvents {
    /// Begins to watch.
    ///
    /// # Errors
    /// etcd can't be asked.
    pub async fn follow(cluster: &Cluster) -> Result<Self> {
        let endpoints = cluster.etcd().iter().map(|endpoint| format!("http://{endpoint}")).collect();
        let config = trunkline_config::local::Etcd { endpoints, ..Default::default() };
        let dcs = EtcdDcs::connect(&config, SystemClock, Duration::from_secs(3)).await?;
        let leader = Paths::new("service", &cluster.spec().scope).key("leader");
        let from = Revision(dcs.read(&leader).await?.revision.0 + 1);
        let mut watch = dcs.watch(&leader, from).await?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let write = seen.clone();
        let task = tokio::spawn(async move {
            while let Some(Ok(event)) = watch.next().await {
                let WatchEvent::Changes { changes, .. } = event else { continue };
                let now = SystemClock.now();
                write.lock().extend(changes.into_iter().map(|change| match change {
                    Change::Put(kv) => (now, KeyEvent::Taken(String::from_utf8_lossy(&kv.value).into_owned())),
                    Change::Delete(_) => (now, KeyEvent::Released),
                }));
            }
        });
        Ok(Self { seen, task })
    }

    fn after(&self, fault: Instant) -> Vec<(Instant, KeyEvent)> {
        self.seen.lock().iter().filter(|(at, _)| *at >= fault).cloned().collect()
    }
}

impl Drop for KeyEvents {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// When the first matching line at or after `fault` was written, by its own time stamp.
fn first_line(log: &str, fault: Instant, matching: impl Fn(&str) -> bool) -> Option<Instant> {
    let (now, wall) = (SystemClock.now(), SystemClock.wall());
    let moment = |line: &str| {
        let ago = (wall - time_stamp(line)?).to_std().ok()?;
        Some(now - ago)
    };
    log.lines().filter(|line| matching(line)).filter_map(moment).find(|moment| *moment >= fault)
}

/// `2026-11-20 14:00:26,792 …` as Patroni writes it, or `2026-11-20T14:00:26.792123Z …`. PostgreSQL's own lines, with
/// `14:00:26.792 UTC`, are not meant.
fn time_stamp(line: &str) -> Option<DateTime<Utc>> {
    let first = line.split_whitespace().next()?;
    if let Ok(time) = DateTime::parse_from_rfc3339(first) {
        return Some(time.to_utc());
    }
    let text = line.get(..23)?;
    NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S,%3f").ok().map(|time| {
        // Both programs write local time in this format.
        time.and_local_timezone(chrono::Local).earliest().map_or_else(|| time.and_utc(), |local| local.to_utc())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stamps_of_agents_and_routers_but_not_of_postgresql() {
        let wall = SystemClock.wall();
        let local = wall.with_timezone(&chrono::Local).format("%Y-%m-%d %H:%M:%S,%3f INFO: Lock owner").to_string();
        let utc = wall.format("%Y-%m-%dT%H:%M:%S.%6fZ  INFO router: server for writes").to_string();
        for line in [local, utc] {
            let read = time_stamp(&line).unwrap();
            assert!((wall - read).num_milliseconds().abs() <= 1, "{line}");
        }
        assert_eq!(time_stamp("2026-11-20 14:00:26.792 UTC [18496] ERROR:  x"), None);
        assert_eq!(time_stamp("stack backtrace:"), None);
        assert_eq!(time_stamp(""), None);
    }

    #[test]
    fn the_first_matching_line_after_the_fault() {
        let fault = SystemClock.now() - Duration::from_secs(10);
        let wall = |seconds_ago: i64| (SystemClock.wall() - chrono::Duration::seconds(seconds_ago)).to_rfc3339();
        let log = format!("{} x\n{} y\nnonsense x\n{} x\n", wall(20), wall(9), wall(5));
        let found = first_line(&log, fault, |line| line.ends_with('x')).unwrap();
        let after = found.since(fault);
        assert!(after > Duration::from_millis(4500) && after < Duration::from_millis(5500), "{after:?}");
        assert_eq!(first_line(&log, fault, |line| line.ends_with('z')), None);
    }
}
