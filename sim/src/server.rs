//! A modelled PostgreSQL server: a data directory, a postmaster, streaming replication and synchronous commit.
//!
//! What is modelled is what high availability depends on: whose WAL is a prefix of whose, which commits wait for whom,
//! what survives which kind of end, and that everything takes time in which something else can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::Rng;
use serde_json::json;
use tokio::sync::{oneshot, watch};
use trunkline_agent::postgres::{ControlState, PgRole, Upstream};
use trunkline_common::{Instant, Lsn, MemberName, SystemId, TimelineId};

use crate::executor::ProcessId;
use crate::judge::{Loss, Reign};
use crate::sessions;
use crate::slots::Logical;
use crate::stage::{Stage, name};
use crate::streaming::{REPLICATION_TIMEOUT, receive};
use crate::wal::{Kind, Record, Wal};
use crate::world::promises;

/// A standby that is started in the time of much replaying has not replayed up to so many records of its WAL.
const UNREPLAYED: usize = 200;

/// One host's PostgreSQL.
pub struct Server {
    /// Its host.
    pub host: usize,
    /// Its member's name.
    pub name: MemberName,
    /// What is on its disk; `None`: nothing.
    pub data: Option<Data>,
    /// What runs.
    pub postmaster: Option<Postmaster>,
    /// Counts the ends of postmasters.
    pub exits: watch::Sender<u64>,
    /// Changes with everything that somebody could wait for.
    pub changed: watch::Sender<u64>,
    /// Nothing can be written.
    pub disk_full: bool,
    /// Since when `pre_promote` says no.
    pub refuses_promotion: Option<Duration>,
    /// The agent's sessions get nothing but errors (no connection left, a password that does not fit); others are served.
    pub refuses_agent: bool,
    /// Until then there is something to be replayed, whatever is asked for.
    pub replays_until: Duration,
    /// Everything that writes much takes seconds.
    pub disk_slow: bool,
    /// The last time that its postmaster was killed, if it was the leader's and took writes.
    pub killed: Option<Killed>,
    /// pg_rewind has been at work in this data directory.
    pub rewound: bool,
    /// It must not lead without a kernel watchdog.
    pub watchdog_required: bool,
    /// Since when that does not work.
    pub watchdog_broken: Option<Duration>,
    /// An operator has asked for a new copy.
    pub reinitialized: bool,
    /// Until when its agents have promised not to lead, by the host's clock.
    pub promised: Option<Instant>,
}

/// A data directory.
#[derive(Debug, Clone)]
pub struct Data {
    /// Of which cluster.
    pub system: SystemId,
    /// Everything flushed.
    pub wal: Wal,
    /// pg_control's state.
    pub state: ControlState,
    /// The timeline of the last checkpoint.
    pub checkpoint_timeline: TimelineId,
    /// The position of the last checkpoint.
    pub checkpoint: Lsn,
    /// `standby.signal` is there.
    pub standby: bool,
    /// Half a copy, or half rewound: it must never be started.
    pub damage: Option<&'static str>,
    /// The bootstrap that made it has not come to its end.
    pub half_made: bool,
    /// `synchronous_standby_names` in its configuration.
    pub names: String,
    /// `primary_conninfo`.
    pub upstream: Option<Upstream>,
    /// The first record that can still be sent to a standby: older WAL has been removed.
    pub oldest: usize,
    /// Where the copy began that this is: older WAL has never been here.
    pub copied_at: usize,
    /// Physical replication slots: the first record that each keeps.
    pub slots: BTreeMap<String, usize>,
    /// From where on each slot could keep WAL when it was first made here: it was too late for what is older.
    pub slots_since: BTreeMap<String, usize>,
    /// Logical replication slots.
    pub logical: BTreeMap<String, Logical>,
}

/// A running server.
#[derive(Debug, Clone)]
pub struct Postmaster {
    /// Its process.
    pub process: ProcessId,
    /// Unique in the world.
    pub number: u64,
    /// How far it is.
    pub phase: Phase,
    /// In recovery or not.
    pub role: PgRole,
    /// While it takes writes.
    pub reign: Option<Reign>,
    /// It began before anybody was told of the cluster: until then its writes are nobody's.
    pub private: bool,
    /// `synchronous_standby_names` as a session shows them.
    pub names_shown: String,
    /// … and as commits wait by them.
    pub names: String,
    /// Standbys that stream from it, by `application_name`.
    pub senders: BTreeMap<MemberName, Sender>,
    /// Logical slots that somebody reads from.
    pub reading: BTreeSet<String>,
    /// Its own WAL receiver streams.
    pub streaming: bool,
    /// It was started as a standby, and has not replayed more of its WAL than this; the rest is on its disk.
    pub replayed: Option<usize>,
    /// Since when it is being promoted.
    pub promoting: Option<Duration>,
    /// It stands still: sessions and its other children go on, nobody new is let in, and no signal arrives.
    pub hung: bool,
    /// Since when it has accepted connections, and streamed without a break; when it was sent WAL last.
    pub since: Since,
}

/// A postmaster was killed.
#[derive(Debug, Clone, Copy)]
pub struct Killed {
    /// When.
    pub at: Duration,
    /// For how long it had accepted connections.
    pub up: Duration,
}

/// Moments in the life of a postmaster.
#[derive(Debug, Clone, Copy, Default)]
pub struct Since {
    /// It has accepted connections since then.
    pub running: Duration,
    /// Its receiver has streamed since then, if it does.
    pub streaming: Duration,
    /// It was sent WAL last.
    pub grown: Duration,
}

/// How far a postmaster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It does not accept connections yet.
    Starting,
    /// It does.
    Running,
    /// It does not any more.
    Stopping,
}

/// A WAL sender.
#[derive(Debug, Clone)]
pub struct Sender {
    /// Tells this connection from an older one of the same standby.
    pub connection: u64,
    /// The standby's postmaster.
    pub owner: u64,
    /// The slot that it streams by.
    pub slot: Option<String>,
    /// Records that the standby has said to have flushed.
    pub flushed: usize,
    /// It has once been level with the primary.
    pub caught_up: bool,
}

impl Server {
    /// A host without data.
    pub fn new(host: usize) -> Self {
        Self {
            host,
            name: name(host),
            data: None,
            postmaster: None,
            exits: watch::Sender::new(0),
            changed: watch::Sender::new(0),
            disk_full: false,
            refuses_promotion: None,
            refuses_agent: false,
            replays_until: Duration::ZERO,
            disk_slow: false,
            killed: None,
            rewound: false,
            watchdog_required: false,
            watchdog_broken: None,
            reinitialized: false,
            promised: None,
        }
    }

    /// Something that somebody could wait for is different.
    pub fn touch(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// The postmaster with this number, if it still runs.
    pub fn postmaster(&mut self, number: u64) -> Option<&mut Postmaster> {
        self.postmaster.as_mut().filter(|postmaster| postmaster.number == number)
    }

    /// Whether it is up and takes writes.
    pub fn is_primary(&self) -> bool {
        self.running().is_some_and(|postmaster| postmaster.role == PgRole::Primary)
    }

    /// The postmaster, if it accepts connections.
    pub fn running(&self) -> Option<&Postmaster> {
        self.postmaster.as_ref().filter(|postmaster| postmaster.phase == Phase::Running)
    }

    /// The postmaster, if it lets anybody in.
    pub fn open(&self, stage: &Stage) -> Option<&Postmaster> {
        self.running().filter(|postmaster| !postmaster.hung && !stage.executor().is_frozen(postmaster.process))
    }

    /// Since when it must not lead: a watchdog that is required does not work.
    pub fn must_not_lead(&self) -> Option<Duration> {
        self.watchdog_broken.filter(|_| self.watchdog_required)
    }
}

/// A signal arrives at the postmaster with this number, or it has ended.
pub async fn signalled(stage: &Stage, host: usize, number: u64) {
    let mut changed = stage.server(host, |server| server.changed.subscribe());
    while stage.server(host, |server| server.postmaster(number).is_some_and(|postmaster| postmaster.hung)) {
        if changed.changed().await.is_err() {
            return;
        }
    }
}

/// Ends the postmaster of a host now, whatever it is doing. What was flushed stays. Its connections are reset at once.
pub fn kill(stage: &Stage, host: usize) {
    if let Some(owner) = end(stage, host) {
        stage.servers(|servers| servers.iter_mut().for_each(|server| forget_sender(server, host, owner)));
    }
}

/// The same in a power cut: nobody is told.
pub fn vanish(stage: &Stage, host: usize) {
    let Some(owner) = end(stage, host) else { return };
    let hosts = stage.servers(|servers| servers.len());
    for other in (0..hosts).filter(|other| *other != host) {
        let Some(process) = stage.server(other, |server| server.postmaster.as_ref().map(|p| p.process)) else {
            continue;
        };
        let waiting = stage.clone();
        stage.executor().spawn(process, async move {
            waiting.executor().sleep(REPLICATION_TIMEOUT).await;
            waiting.server(other, |server| forget_sender(server, host, owner));
        });
    }
}

fn end(stage: &Stage, host: usize) -> Option<u64> {
    let killed = stage.server(host, |server| {
        let postmaster = server.postmaster.take();
        server.touch();
        postmaster
    });
    let killed = killed?;
    stage.executor().kill(killed.process);
    tracing::debug!("postmaster of n{host} is gone");
    // The exit is seen (pidfd) by whoever waits for it.
    stage.server(host, |server| server.exits.send_modify(|count| *count += 1));
    Some(killed.number)
}

/// A standby's connection is gone.
pub fn forget_sender(server: &mut Server, standby: usize, owner: u64) {
    let standby = name(standby);
    if let Some(postmaster) = &mut server.postmaster
        && postmaster.senders.get(&standby).is_some_and(|sender| sender.owner == owner)
    {
        postmaster.senders.remove(&standby);
        server.touch();
    }
}

/// Starts a postmaster on what is in the data directory. It needs a moment, or many, until it accepts connections.
pub fn spawn(stage: &Stage, host: usize) {
    let process = stage.executor().process(format!("n{host}.pg"));
    let number = stage.number();
    let damaged = stage.server(host, |server| {
        let data = server.data.as_mut()?;
        let crashed = matches!(data.state, ControlState::InProduction | ControlState::InCrashRecovery);
        let role = if data.standby { PgRole::Standby } else { PgRole::Primary };
        data.state = match role {
            PgRole::Primary if crashed => ControlState::InCrashRecovery,
            PgRole::Primary => ControlState::Startup,
            PgRole::Standby => ControlState::InArchiveRecovery,
        };
        server.postmaster = Some(Postmaster {
            process,
            number,
            phase: Phase::Starting,
            role,
            reign: None,
            private: false,
            names_shown: data.names.clone(),
            names: data.names.clone(),
            senders: BTreeMap::new(),
            reading: BTreeSet::new(),
            streaming: false,
            replayed: None,
            promoting: None,
            hung: false,
            since: Since::default(),
        });
        let damage = data.damage;
        server.touch();
        damage
    });
    if let Some(damage) = damaged {
        stage.judge(|judge, now| judge.violation(now, format!("n{host} starts on a damaged data directory: {damage}")));
    }
    let starting = stage.clone();
    stage.executor().spawn(process, async move {
        let stage = starting;
        let slow = stage.server(host, |server| server.disk_slow);
        let requested = is_anybody_requested(&stage);
        stage.micros(if slow { 1_000_000..12_000_000 } else { 20_000..150_000 }).await;
        if is_primary_start(&stage, host, number) {
            // A restart in a pause is the operator's.
            let reign = stage.judge(|judge, _| judge.last_reign(host)).filter(|_| is_left_alone(&stage, host));
            begin_writes(&stage, host, number, reign, requested);
        }
        let replays_until = stage.server(host, |server| {
            let standby = server.postmaster(number).is_some_and(|postmaster| postmaster.role == PgRole::Standby);
            Some(server.replays_until).filter(|until| standby && *until > stage.executor().now())
        });
        let left = replays_until.map(|_| stage.executor().random(|rng| rng.random_range(1..UNREPLAYED)));
        stage.server(host, |server| {
            let records = server.data.as_ref().map_or(0, |data| data.wal.len());
            if let Some(postmaster) = server.postmaster(number) {
                postmaster.phase = Phase::Running;
                postmaster.since.running = stage.executor().now();
                postmaster.replayed = left.map(|left| records.saturating_sub(left));
            }
            server.touch();
        });
        if let Some(until) = replays_until {
            stage.executor().sleep(until - stage.executor().now()).await;
            stage.server(host, |server| {
                if let Some(postmaster) = server.postmaster(number) {
                    postmaster.replayed = None;
                }
                server.touch();
            });
        }
        receive(stage, host, number).await;
    });
}

fn is_primary_start(stage: &Stage, host: usize, number: u64) -> bool {
    stage.server(host, |server| server.postmaster(number).is_some_and(|p| p.role == PgRole::Primary))
}

/// Whether there is a cluster that anybody has been told of.
pub fn is_initialised(stage: &Stage) -> bool {
    stage.store().peek("/service/sim/initialize").entries.iter().any(|key| !key.value.is_empty())
}

/// In a pause nothing ends a server with its lease: it is the operator who answers for there being one primary.
fn is_left_alone(stage: &Stage, host: usize) -> bool {
    stage.judge(|judge, _| judge.pauses) && stage.guard(host).is_some_and(|guard| !guard.is_armed())
}

/// The pause is over, but not for this host, whose agent can't hear of it; or somebody else was promoted in it on request:
/// nobody but the operator could have known what still runs here.
pub fn is_forgotten(stage: &Stage, host: usize) -> bool {
    let paused = || stage.key("config").is_some_and(|config| config["pause"] == json!(true));
    is_left_alone(stage, host) && (!paused() || stage.judge(|judge, _| judge.began_last) != Some(host))
}

/// Whether an operator has asked for somebody, who may be behind.
fn is_anybody_requested(stage: &Stage) -> bool {
    let request = stage.key("failover").filter(|request| *request != json!({}));
    request.is_some_and(|request| request["leader"].is_null())
}

/// From here on it takes writes; where it only goes on with those of `reign`, nobody asks by what right. `requested`: an operator had
/// asked for somebody when it was told to.
fn begin_writes(stage: &Stage, host: usize, number: u64, reign: Option<Reign>, requested: bool) {
    // Over time: no answer leaves, and the guard is about to end it. Or a promotion of before a pause is done long after it.
    let mute = stage.guard(host).is_some_and(|guard| !guard.lets_out()) || is_forgotten(stage, host);
    // In failsafe mode a leader goes on without the key, and so does its server after a restart, as long as its
    // deadline is moved on; in a pause until somebody else is promoted.
    let again = stage.judge(|judge, _| judge.began_last) == Some(host);
    let lost = stage.judge(|judge, now| judge.just_revoked(now, host));
    let goes_on = again && (stage.key("failsafe").is_some() || is_left_alone(stage, host)) || lost.is_some();
    let own = || name(host).0;
    let holder = match lost {
        Some(Loss::Restore) => Some(own()),
        _ => stage.holder().or_else(|| goes_on.then(own)),
    };
    let (initialised, standby_cluster) = (is_initialised(stage), stage.is_standby_cluster());
    let requested = requested || is_anybody_requested(stage);
    let known = stage.key("status").and_then(|status| status["optime"].as_u64()).unwrap_or_default();
    stage.servers(|servers| {
        let server = &mut servers[host];
        let Some(data) = &mut server.data else { return };
        if data.state == ControlState::InCrashRecovery {
            // Recovery ends with a checkpoint.
            data.checkpoint = data.wal.end();
            data.checkpoint_timeline = data.wal.timeline();
        }
        data.state = ControlState::InProduction;
        let (wal, name) = (data.wal.clone(), server.name.0.clone());
        if initialised && standby_cluster && !mute {
            stage.judge(|judge, now| judge.violation(now, format!("{name} takes writes in a standby cluster")));
        }
        let Some(postmaster) = server.postmaster(number) else { return };
        postmaster.role = PgRole::Primary;
        // A cluster that is being bootstrapped has no leader key yet, and no clients.
        postmaster.private = !initialised;
        let holder = if initialised && !mute { holder.as_deref() } else { Some(name.as_str()) };
        if reign.is_some() {
            postmaster.reign = reign;
            return;
        }
        // Who comes back in place was elected before, maybe on request.
        if !requested && !mute && !again {
            let from = match wal.records() {
                [.., before, last] if last.kind == Kind::Promotion => before.timeline,
                _ => wal.timeline(),
            };
            sessions::check_let_go(stage, host);
            stage.judge(|judge, now| {
                judge.elected(now, &name, wal.end(), Lsn(known));
                judge.promoted(now, &name, from.0, wal.timeline().0);
            });
        }
        postmaster.reign = Some(stage.judge(|judge, now| judge.begins(now, host, &name, &wal, holder, !mute)));
    });
}

/// Promotion, in the server's own time. It goes on whether or not anybody waits for it.
pub fn promote(
    stage: &Stage,
    host: usize,
    number: u64,
    process: ProcessId,
    left_out: Vec<TimelineId>,
    done: oneshot::Sender<TimelineId>,
) {
    let stage = stage.clone();
    stage.executor().clone().spawn(process, async move {
        let requested = is_anybody_requested(&stage);
        signalled(&stage, host, number).await;
        let slow = stage.server(host, |server| server.disk_slow);
        stage.micros(if slow { 100_000..4_000_000 } else { 3_000..40_000 }).await;
        let replay = stage.server(host, |server| server.replays_until).saturating_sub(stage.executor().now());
        stage.executor().sleep(replay).await;
        let timeline = stage.server(host, |server| {
            let postmaster = server.postmaster(number)?;
            if postmaster.phase != Phase::Running || postmaster.role == PgRole::Primary {
                return None;
            }
            (postmaster.streaming, postmaster.replayed) = (false, None);
            let data = server.data.as_mut()?;
            let mut timeline = TimelineId(data.wal.timeline().0 + 1);
            while left_out.contains(&timeline) {
                timeline.0 += 1;
            }
            data.wal.push(Record { timeline, kind: Kind::Promotion, number: stage.number() });
            data.standby = false;
            Some(timeline)
        });
        let Some(timeline) = timeline else { return };
        begin_writes(&stage, host, number, None, requested);
        stage.server(host, |server| server.touch());
        // Nobody waits any more: it is promoted all the same.
        let _ = done.send(timeline);
    });
}

/// A clean shutdown, in the server's own time. `shut_down` is told where the shutdown checkpoint is.
pub fn shut_down(stage: &Stage, host: usize, number: u64, process: ProcessId, shut_down: Option<oneshot::Sender<Lsn>>) {
    let stage = stage.clone();
    stage.executor().clone().spawn(process, async move {
        signalled(&stage, host, number).await;
        let primary = stage.server(host, |server| {
            let postmaster = server.postmaster(number)?;
            postmaster.phase = Phase::Stopping;
            let primary = postmaster.role == PgRole::Primary;
            server.touch();
            Some(primary)
        });
        let Some(primary) = primary else { return };
        if primary {
            promises::watch_stop(&stage, host, number);
        }
        let slow = stage.server(host, |server| server.disk_slow);
        stage.micros(if slow { 500_000..6_000_000 } else { 5_000..40_000 }).await;
        if primary {
            let at = stage.server(host, |server| {
                let data = server.data.as_mut()?;
                let at = data.wal.end();
                let timeline = data.wal.timeline();
                data.wal.push(Record { timeline, kind: Kind::Shutdown, number: stage.number() });
                data.state = ControlState::ShutDown;
                (data.checkpoint, data.checkpoint_timeline) = (at, timeline);
                server.touch();
                Some(at)
            });
            if let (Some(sender), Some(at)) = (shut_down, at) {
                // Nobody waits any more: fine.
                let _ = sender.send(at);
            }
            wait_for_senders(&stage, host, number).await;
        } else {
            stage.server(host, |server| {
                if let Some(data) = &mut server.data {
                    data.state = ControlState::ShutDownInRecovery;
                }
            });
        }
        kill(&stage, host);
    });
}

/// A primary that shuts down waits until every connected standby has everything.
async fn wait_for_senders(stage: &Stage, host: usize, number: u64) {
    let mut changed = stage.server(host, |server| server.changed.subscribe());
    loop {
        changed.mark_unchanged();
        let waits = stage.server(host, |server| {
            let end = server.data.as_ref().map_or(0, |data| data.wal.len());
            server.postmaster(number).is_some_and(|p| p.senders.values().any(|sender| sender.flushed < end))
        });
        if !waits || changed.changed().await.is_err() {
            return;
        }
    }
}
