//! What settings and tags promise: who is preferred as a leader and as a synchronous standby, who is waited for and how long.
//!
//! Most of it is promised for healthy times only. So each rule looks at those whom the faults have left alone for a while, and
//! says nothing where an operator has asked for something, in worlds with pauses or a store that is restored, or where members have given their word to a
//! leader without DCS.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use trunkline_agent::postgres::{PgRole, Running, WalSender};
use trunkline_common::cluster::Initialize;
use trunkline_common::{ClusterView, MemberName};
use trunkline_config::dynamic::SynchronousMode;

use super::World;
use crate::commit::Names;
use crate::executor::Livelock;
use crate::scenario::Fault;
use crate::server::Server;
use crate::stage::{Stage, host_of};

/// Whom nothing has hit for so long knows what there is to know, and is heard when asked.
const SETTLED: Duration = Duration::from_secs(3);

/// A server that ends so soon after its start has failed to start.
const SHORT_LIFE: Duration = Duration::from_secs(12);

/// What clocks and messages may differ by.
const SLACK: Duration = Duration::from_millis(100);

/// Who led last, and when the leader key was gone, or changed hands.
#[derive(Debug, Clone, Default)]
pub(super) struct Vacancy {
    pub(super) leader: Option<MemberName>,
    pub(super) since: Duration,
}

/// Somebody has the leader key.
pub(super) struct Term {
    /// The last view without it.
    pub(super) before: Arc<ClusterView>,
    pub(super) since: Duration,
    /// How often somebody had begun to take writes.
    pub(super) reigns: u64,
}

impl World {
    /// A standby has taken the leader key: whether its time had come, and nobody else was preferred.
    pub(super) fn wrong_election(&self, before: &ClusterView, view: &ClusterView, vacancy: &Vacancy) -> Option<String> {
        let leader = &view.leader.as_ref()?.name;
        let host = host_of(leader.as_str())?;
        let (unwatched, settled) =
            (self.stage.server(host, |server| server.must_not_lead()), self.stage.quiet_for(host) > SETTLED);
        let paused = self.stage.judge(|judge, _| judge.pauses);
        let known = unwatched.is_some_and(|since| since + SETTLED < self.stage.executor().now());
        // Who makes the cluster looks at it before, and gives the key up as soon as it has it.
        let made = matches!(before.initialize, Initialize::Done(_));
        if known && settled && made && !paused {
            return Some(format!("{leader} leads without the watchdog that is required"));
        }
        let requested = before.failover.is_some() || view.failover.is_some();
        let failsafe = view.settings.failsafe_mode || view.failsafe.as_ref().is_some_and(|list| !list.is_empty());
        let standby_cluster = before.settings.standby_cluster.is_some();
        // Members know more of settings and of who has every commit than a store that has gone back.
        let restored = self.scenario.events.iter().any(|event| matches!(event.what, Fault::RestoreDcs { .. }));
        if requested
            || restored
            || failsafe
            || paused
            || standby_cluster
            || !settled
            || self.stage.server(host, |server| server.is_primary())
        {
            return None;
        }
        self.too_soon(leader, host, view, vacancy)
            .or_else(|| self.not_given_time(leader, view, vacancy))
            .or_else(|| self.not_preferred(leader, host, before))
    }

    /// `primary_race_backoff`: it still gets WAL from a primary that may only be unable to reach the DCS.
    fn too_soon(&self, leader: &MemberName, host: usize, view: &ClusterView, vacancy: &Vacancy) -> Option<String> {
        let vacant = self.stage.executor().now() - vacancy.since;
        let patience = view.settings.primary_race_backoff.min(view.settings.loop_wait);
        let streams = self.stage.server(host, |server| {
            server.running().is_some_and(|p| p.streaming && p.since.streaming + SLACK < vacancy.since)
        });
        (streams && vacant + SLACK < patience)
            .then(|| format!("{leader} takes the leader key after {vacant:?} although a primary sends it WAL"))
    }

    /// `primary_start_timeout`: the last leader's server was killed, and nothing keeps it from starting again.
    fn not_given_time(&self, leader: &MemberName, view: &ClusterView, vacancy: &Vacancy) -> Option<String> {
        let last = vacancy.leader.as_ref().filter(|last| *last != leader)?;
        let host = host_of(last.as_str())?;
        // One that ends soon after its start may be of no use.
        let killed = self.stage.server(host, |server| {
            server.killed.filter(|killed| killed.up > SHORT_LIFE && !server.watchdog_required)
        })?;
        let since = self.stage.executor().now() - killed.at;
        let led = self.stage.judge(|judge, _| judge.began_last) == Some(host);
        let alone = self.stage.quiet_for(host) > since + view.settings.ttl + SETTLED;
        (led && alone && since + Duration::from_secs(1) < view.settings.primary_start_timeout)
            .then(|| format!("{leader} leads {since:?} after the server of {last} ended, which has longer to start"))
    }

    /// `failover_priority`: another one has the same WAL, and is preferred.
    fn not_preferred(&self, leader: &MemberName, host: usize, before: &ClusterView) -> Option<String> {
        let mode = before.settings.synchronous_mode;
        let counts = |name: &MemberName| before.sync.is_active() && before.sync.lists(name);
        if mode == SynchronousMode::Quorum || mode == SynchronousMode::On && !counts(leader) || before.sync.quorum > 0 {
            return None;
        }
        let priority = |host: usize| self.scenario.nodes[host].priority;
        let now = self.stage.executor().now();
        self.stage.servers(|servers| {
            let own = &servers[host].data.as_ref()?.wal;
            let as_far = |server: &Server| {
                server.data.as_ref().is_some_and(|data| data.wal.len() == own.len() && own.is_prefix_of(&data.wal))
                    && server.running().is_some_and(|p| {
                        // What it has not replayed yet after its start it does not know of.
                        let settled = now > p.since.running + SETTLED && now > p.since.grown + SETTLED;
                        p.role == PgRole::Standby && p.replayed.is_none() && settled
                    })
            };
            let preferred = |server: &&Server| {
                server.host != host
                    && priority(server.host) > priority(host)
                    && before.members.contains_key(&server.name)
                    && (mode == SynchronousMode::Off || counts(&server.name))
                    && self.stage.quiet_for(server.host) > SETTLED
                    && server.must_not_lead().is_none()
                    && as_far(server)
            };
            let own = as_far(&servers[host]);
            let better = servers.iter().filter(|_| own).find(preferred)?;
            let [theirs, ours] = [better.host, host].map(priority);
            Some(format!("{leader}, priority {ours}, leads and not {}, as far and priority {theirs}", better.name))
        })
    }

    /// A leader has left in order, and was never promoted, as `pre_promote` did not let it: then `sync` says what it said before, or nobody of those who had every
    /// commit may lead.
    pub(super) fn left_behind(&self, term: &Term, leader: &MemberName, view: &ClusterView) -> Option<String> {
        let host = host_of(leader.as_str())?;
        // The first leader of a cluster was a primary before it had the key.
        let primary = self.stage.server(host, |server| server.data.as_ref().is_some_and(|data| !data.standby));
        let promoted = primary || self.stage.judge(|judge, _| judge.reigns) > term.reigns;
        let lasted = self.stage.executor().now() - term.since;
        let refused =
            self.stage.server(host, |server| server.refuses_promotion.is_some_and(|since| since < term.since));
        let in_order = refused && self.stage.quiet_for(host) > lasted + SETTLED;
        let said = |view: &ClusterView| {
            let leader = view.sync.leader.iter().map(|leader| leader.0.as_str());
            let mut names: Vec<&str> = leader.chain(view.sync.standbys.iter().map(String::as_str)).collect();
            names.sort_unstable();
            (view.sync.quorum, names.join(","))
        };
        let synchronous = term.before.settings.synchronous_mode != SynchronousMode::Off;
        let ((votes, names), (former_votes, former_names)) = (said(view), said(&term.before));
        (synchronous && in_order && !promoted && (votes, &names) != (former_votes, &former_names)).then(|| {
            format!("{leader} gives the leader key up unpromoted; sync has {votes} of [{names}], had {former_votes} of [{former_names}]")
        })
    }

    /// As many standbys as wished confirm commits, and of those that could the preferred ones, once all is well.
    pub(super) fn check_synchronous_set(&self) -> Result<(), Livelock> {
        let end = self.stage.executor().now() + Duration::from_secs(15);
        while let Some(wrong) = self.wrong_set() {
            if self.stage.executor().now() >= end {
                self.stage.judge(|judge, now| judge.violation(now, wrong));
                break;
            }
            self.go_on(self.stage.executor().now() + Duration::from_millis(50))?;
        }
        Ok(())
    }

    fn wrong_set(&self) -> Option<String> {
        let view = self.view();
        let (settings, leader) = (&view.settings, &view.leader.as_ref()?.name);
        let tag = |host: usize, tag: &str| self.scenario.nodes[host].tags.get(tag).cloned();
        // Whom a cascade takes confirmations from is another story.
        let cascade = (0..self.scenario.nodes.len()).any(|host| tag(host, "replicatefrom").is_some());
        if settings.synchronous_mode == SynchronousMode::Off
            || settings.standby_cluster.is_some()
            || cascade
            || self.unwell().1.is_some()
        {
            return None;
        }
        let able = |server: &&Server| {
            let streams = server.running().is_some_and(|postmaster| postmaster.streaming);
            server.name != *leader && streams && tag(server.host, "nosync").is_none()
        };
        let rank = |host: usize| {
            let may_lead = self.scenario.nodes[host].priority > 0;
            (may_lead, tag(host, "sync_priority").and_then(|priority| priority.as_i64()).unwrap_or(1))
        };
        self.stage.servers(|servers| {
            let able: Vec<&Server> = servers.iter().filter(able).collect();
            let (listed, others): (Vec<&Server>, Vec<&Server>) =
                able.iter().partition(|server| view.sync.lists(&server.name));
            let primary = servers.iter().find(|server| server.name == *leader)?;
            let in_force = Names::parse(&primary.running()?.names);
            let quorum = settings.synchronous_mode == SynchronousMode::Quorum;
            if able.is_empty() && settings.synchronous_mode_strict {
                // Commits wait for those who were there last.
                return None;
            }
            let electors = able.iter().filter(|server| rank(server.host).0).count();
            let count = settings.synchronous_node_count.min(able.len());
            let wanted = if quorum { count.max(electors) } else { count };
            if listed.len() != wanted || in_force.count != count {
                let names = &primary.running()?.names;
                let key = view.sync.standbys.join(",");
                return Some(format!(
                    "{count} of {wanted} shall confirm, commits wait for '{names}', the key has [{key}]"
                ));
            }
            let better = |standby: &&&Server| listed.iter().any(|listed| rank(standby.host) > rank(listed.host));
            let passed_over = others.iter().filter(|_| !quorum).find(better)?;
            Some(format!("{} is preferred as a synchronous standby, and is none", passed_over.name))
        })
    }
}

/// `nostream`: such a member connects to nobody.
pub(crate) fn check_receiver(stage: &Stage, host: usize) {
    let member = stage.key(&format!("members/n{host}")).unwrap_or_default();
    if member["tags"]["nostream"] == Value::Bool(true) {
        stage.judge(|judge, now| judge.violation(now, format!("n{host} streams, and is tagged nostream")));
    }
}

/// `clonefrom`: the leader is spared where another member that is tagged for it could be copied.
pub(crate) fn check_source(stage: &Stage, host: usize, source: &MemberName) {
    let leader = stage.holder();
    let willing = |name: &MemberName| {
        let member = stage.key(&format!("members/{name}")).unwrap_or_default();
        member["tags"]["clonefrom"] == Value::Bool(true)
            && member["state"] == "running"
            && Some(&name.0) != leader.as_ref()
    };
    let spare = |server: &&Server| {
        let ready = server.running().is_some_and(|postmaster| {
            postmaster.role == PgRole::Standby && stage.executor().now() > postmaster.since.running + SETTLED
        });
        server.host != host && ready && stage.quiet_for(server.host) > SETTLED && willing(&server.name)
    };
    if stage.quiet_for(host) < SETTLED || willing(source) || Some(&source.0) != leader.as_ref() {
        return;
    }
    let spare = stage.servers(|servers| servers.iter().find(spare).map(|server| server.name.clone()));
    if let Some(spare) = spare {
        let what = format!("n{host} copies {source}, and {spare} is tagged clonefrom");
        stage.judge(|judge, now| judge.violation(now, what));
    }
}

/// `primary_stop_timeout`: a primary that is asked to make room is stopped at once when that has taken so long.
pub(crate) fn watch_stop(stage: &Stage, host: usize, number: u64) {
    let config = stage.key("config").unwrap_or_default();
    let requested = stage.key("failover").is_some_and(|request| request.get("leader").is_some());
    let limit = config["primary_stop_timeout"].as_u64().filter(|limit| *limit > 0 && requested);
    // A candidate has some seconds to get the shutdown checkpoint, whatever the limit.
    let Some(limit) = limit.map(|limit| Duration::from_secs(limit.max(4) + 2)) else { return };
    let watching = stage.clone();
    let process = stage.executor().process(format!("judge of n{host}"));
    stage.executor().spawn(process, async move {
        watching.executor().sleep(limit).await;
        let stopping = watching.server(host, |server| server.postmaster(number).is_some());
        if stopping && watching.quiet_for(host) > limit + SETTLED {
            let what = format!("host {host} has been stopping for {limit:?}, beyond primary_stop_timeout");
            watching.judge(|judge, now| judge.violation(now, what));
        }
    });
}

/// `maximum_lag_on_syncnode`: whoever was seen further behind the best of them is not chosen. `running` is what the agent has
/// seen last, `names` what it wants commits to wait for.
pub(crate) fn check_lag(stage: &Stage, running: &Running, names: &str) {
    let config = stage.key("config").unwrap_or_default();
    let Some(limit) = config["maximum_lag_on_syncnode"].as_u64() else { return };
    let sync = stage.key("sync").unwrap_or_default();
    let kept = sync["sync_standby"].as_str().unwrap_or_default();
    let before = Names::parse(&running.synchronous_standby_names);
    let at = |sender: &WalSender| sender.flush_lsn.unwrap_or_default();
    // Of the others it may not be known whether they are there.
    let sure = |sender: &&WalSender| {
        let member = || stage.key(&format!("members/{}", sender.application_name));
        let settled = || host_of(&sender.application_name).is_some_and(|host| stage.quiet_for(host) > SETTLED);
        sender.state == "streaming" && settled() && member().is_some_and(|member| member["state"] == "running")
    };
    let head = match running.replication.as_slice() {
        [_] => running.lsn,
        senders => senders.iter().filter(sure).map(at).max().unwrap_or_default(),
    };
    for sender in &running.replication {
        let name = &sender.application_name;
        let chosen = Names::parse(names).listed.iter().any(|listed| listed.0 == *name);
        let new = !before.listed.iter().any(|listed| listed.0 == *name) && !kept.split(',').any(|kept| kept == name);
        let lag = at(sender).lag_behind(head);
        if chosen && new && lag > limit {
            let what = format!("commits shall wait for {name}, seen {lag} bytes behind, where {limit} are allowed");
            stage.judge(|judge, now| judge.violation(now, what));
        }
    }
}

/// More than a standby that streams may be behind.
const FAR: u64 = 100_000;

/// A promotion whose replay gets on is waited for: nobody begins another one while it lasts.
pub(crate) fn check_patience(stage: &Stage, host: usize, number: u64) {
    let now = stage.executor().now();
    let begun = stage.server(host, |server| server.postmaster(number)?.promoting.replace(now));
    let Some(lasted) = begun.map(|begun| now - begun) else { return };
    if stage.quiet_for(host) > lasted + SETTLED {
        let what = format!("n{host} is promoted anew after {lasted:?}, and its replay was getting on");
        stage.judge(|judge, now| judge.violation(now, what));
    }
}

/// `primary_start_timeout` 0: a leader whose server was killed does not come back in place while somebody could lead.
pub(crate) fn check_start(stage: &Stage, host: usize) {
    let Some(killed) = stage.server(host, |server| server.killed.take()) else { return };
    let setting = |key: &str| stage.key("config").map(|config| config[key].clone()).unwrap_or_default();
    let failsafe = setting("failsafe_mode") != Value::Bool(false) || stage.key("failsafe").is_some();
    let asked = failsafe || stage.judge(|judge, _| judge.pauses);
    let since = stage.executor().now() - killed.at;
    let name = stage.server(host, |server| server.name.clone());
    if asked || setting("primary_start_timeout") != 0 || stage.holder().as_ref() != Some(&name.0) {
        return;
    }
    if stage.quiet_for(host) < since + SETTLED || since > SETTLED {
        return;
    }
    let synchronous = setting("synchronous_mode");
    let allowed = setting("maximum_lag_on_failover").as_u64().unwrap_or_default();
    if allowed < FAR {
        // What was on its way when it was asked has come since.
        return;
    }
    let listed = stage.key("sync").and_then(|sync| Some(sync["sync_standby"].as_str()?.to_owned())).unwrap_or_default();
    let could = |server: &Server, own: &crate::wal::Wal| {
        let runs = |server: &Server| {
            server
                .running()
                .is_some_and(|p| p.role == PgRole::Standby && stage.executor().now() > p.since.running + SETTLED)
        };
        let near = |server: &Server| {
            server.data.as_ref().is_some_and(|data| {
                let wal = &data.wal;
                wal.is_prefix_of(own) && wal.timeline() == own.timeline() && own.end().lag_behind(wal.end()) <= allowed
            })
        };
        let chosen = match &synchronous {
            Value::Bool(true) => listed.split(',').any(|listed| listed == server.name.0),
            // By votes it takes more than one.
            Value::String(_) => false,
            _ => true,
        };
        let member = stage.key(&format!("members/{}", server.name)).is_some();
        chosen
            && member
            && server.must_not_lead().is_none()
            && runs(server)
            && near(server)
            && stage.quiet_for(server.host) > SETTLED
    };
    let candidate = stage.servers(|servers| {
        let own = servers[host].data.as_ref()?.wal.clone();
        let may = |server: &&Server| stage.api(server.host).is_some_and(|api| api.priority > 0) && server.host != host;
        servers.iter().filter(may).find(|server| could(server, &own)).map(|server| server.name.clone())
    });
    if let Some(candidate) = candidate {
        stage.judge(|judge, now| {
            judge.violation(
                now,
                format!("{name} starts in place, and {candidate} could take over (primary_start_timeout 0)"),
            )
        });
    }
}
