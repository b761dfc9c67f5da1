//! Situations in plain words, and what must hold in all of them.

mod any;
mod failsafe;
mod following;
mod leading;
mod race;
mod restart;
mod standby_cluster;

use std::time::Duration;

use serde_json::json;
use trunkline_common::cluster::{FailoverRequest, HistoryLine, LeaderKey, Member, RouterRecord, SyncState};
use trunkline_common::{Instant, LeaseId, Lsn, Revision, SystemId, TimelineId};

use super::*;
use crate::ha::situation::{DivergenceState, FailsafeAttempt, Me, Memory, PeerAnswers, Promise, Refusal};
use crate::peer::PeerStatus;
use crate::postgres::{ControlData, ControlState, PgRole, Running};

const NOW: Instant = Instant::from_boot(Duration::from_secs(1000));
const SYSTEM: SystemId = SystemId(7_000_000_000_000_000_001);

/// Everything a situation borrows from, with a healthy cluster of a, b and c led by a as the start; we are b.
#[derive(Debug, Clone)]
struct World {
    me: Me,
    view: Option<ClusterView>,
    leader_until: Option<Instant>,
    /// The leadership is by the members' word, and the key is not known to be ours.
    by_word: bool,
    has_lease: bool,
    /// Where it is not that of the leadership.
    lease_until: Option<Instant>,
    dcs_away: bool,
    pg: PgStatus,
    memory: Memory,
    peers: Option<PeerAnswers>,
}

fn world() -> World {
    let mut view = ClusterView {
        revision: Revision(100),
        initialize: Initialize::Done(SYSTEM),
        leader: Some(key("a")),
        ..ClusterView::default()
    };
    view.settings.ttl = Duration::from_secs(5);
    view.settings.loop_wait = Duration::from_secs(1);
    view.settings.retry_timeout = Duration::from_secs(1);
    view.status.optime = Lsn(1000);
    for (name, port) in [("a", 1), ("b", 2), ("c", 3)] {
        let member = Member {
            conn_url: Some(format!("postgres://127.0.0.1:{port}/postgres")),
            api_url: Some(format!("http://127.0.0.1:800{port}/patroni")),
            state: "running".to_owned(),
            role: if name == "a" { "primary" } else { "replica" }.to_owned(),
            timeline: Some(TimelineId(1)),
            ..Member::default()
        };
        view.members.insert(name.into(), member);
    }
    World {
        me: Me {
            name: "b".into(),
            tags: serde_json::Map::new(),
            may_bootstrap: true,
            use_pg_rewind: true,
            use_slots: true,
            restores_alone: false,
            reclone_diverged: false,
            reclone_unrewindable: false,
        },
        view: Some(view),
        leader_until: None,
        by_word: false,
        has_lease: true,
        lease_until: None,
        dcs_away: false,
        pg: standby(1000),
        memory: Memory::default(),
        peers: None,
    }
}

fn key(name: &str) -> LeaderKey {
    LeaderKey { name: name.into(), lease: LeaseId(7), created: Revision(50), modified: Revision(50) }
}

fn running(role: PgRole, lsn: u64) -> PgStatus {
    PgStatus::Running(Running {
        role,
        system_id: SYSTEM,
        timeline: Some(TimelineId(1)),
        checkpoint_timeline: None,
        lsn: Lsn(lsn),
        receive_lsn: None,
        replay_lsn: None,
        replay_timestamp: None,
        replay_paused: false,
        reads_own_wal: false,
        latest_end_lsn: None,
        replication_state: (role == PgRole::Standby).then(|| "streaming".to_owned()),
        upstream: (role == PgRole::Standby).then(|| "127.0.0.1:1".to_owned()),
        upstream_slot: (role == PgRole::Standby).then(|| "b".to_owned()),
        server_version: 150_018,
        postmaster_start_time: String::new(),
        replication: Vec::new(),
        synchronous_standby_names: String::new(),
        synchronous_commit: "on".to_owned(),
        waits_for_disk: false,
        pending_restart: std::collections::BTreeMap::new(),
        slots: std::collections::BTreeMap::new(),
    })
}

fn standby(lsn: u64) -> PgStatus {
    running(PgRole::Standby, lsn)
}

fn primary(lsn: u64) -> PgStatus {
    running(PgRole::Primary, lsn)
}

fn stopped(state: ControlState, standby: bool) -> PgStatus {
    PgStatus::Stopped(ControlData { system_id: SYSTEM, state, timeline: TimelineId(1), checkpoint: Lsn(900), standby })
}

fn peer(lsn: u64) -> Option<PeerStatus> {
    Some(PeerStatus {
        in_recovery: true,
        holds_key: false,
        lsn: Lsn(lsn),
        timeline: Some(TimelineId(1)),
        failover_priority: 1,
        watchdog_failed: false,
        reads_own_wal: false,
    })
}

impl World {
    fn decide(&self) -> Decision {
        decide(&self.situation())
    }

    fn situation(&self) -> Situation<'_> {
        Situation {
            now: NOW,
            wall: chrono::DateTime::from_timestamp(1_900_000_000, 0).unwrap(),
            me: &self.me,
            view: self.view.as_ref(),
            leader_until: self.leader_until,
            key_until: self.leader_until.filter(|_| !self.by_word),
            promised_until: self.leader_until.filter(|_| self.by_word),
            lease_until: self.has_lease.then(|| self.lease_until.or(self.leader_until).unwrap_or(NOW)),
            ttl: self.view.as_ref().map_or(Duration::from_secs(5), |view| view.settings.ttl),
            dcs_away: self.dcs_away,
            pg: &self.pg,
            memory: &self.memory,
            peers: self.peers.as_ref(),
        }
    }

    fn view(&mut self) -> &mut ClusterView {
        self.view.as_mut().unwrap()
    }

    /// We hold the key.
    fn leading(mut self) -> Self {
        self.view().leader = Some(key("b"));
        self.leader_until = Some(NOW + Duration::from_secs(4));
        self.pg = primary(1000);
        self
    }

    /// Nobody leads; the old leader's keys are gone with its lease.
    fn leaderless(mut self) -> Self {
        self.view().leader = None;
        self.view().members.remove(&"a".into());
        self
    }

    fn answers(mut self, answers: &[(&str, Option<PeerStatus>)]) -> Self {
        self.peers = Some(answers.iter().map(|(name, status)| ((*name).into(), status.clone())).collect());
        self
    }

    fn synchronous(mut self, leader: &str, standbys: &[&str]) -> Self {
        self.view().settings.synchronous_mode = SynchronousMode::On;
        self.view().sync = SyncState {
            leader: Some(leader.into()),
            standbys: standbys.iter().map(|name| (*name).to_owned()).collect(),
            quorum: 0,
            revision: Revision(60),
        };
        self
    }

    /// Failsafe mode is on, and these members are in its key.
    fn failsafe(mut self, members: &[&str]) -> Self {
        self.view().settings.failsafe_mode = true;
        let url = |name: &&str| ((*name).into(), format!("http://{name}/patroni"));
        self.view().failsafe = Some(members.iter().map(url).collect());
        self.view().failsafe_revision = Revision(70);
        self
    }

    /// The lease ends in so many milliseconds.
    fn left(mut self, ms: u64) -> Self {
        self.leader_until = Some(NOW + Duration::from_millis(ms));
        self
    }

    /// c was asked for its word in vain for so many milliseconds, most lately as long ago as that.
    fn refused(mut self, ms: u64) -> Self {
        let (since, until) = (NOW - Duration::from_millis(ms), self.leader_until.unwrap());
        let why = "no promise from c".to_owned();
        self.memory.failsafe_refused = Some(Refusal { since, at: since, until, why });
        self
    }

    /// We have given our word to a.
    fn promised(mut self, ms: u64) -> Self {
        self.memory.promise = Some(Promise {
            leader: "a".into(),
            until: NOW + Duration::from_millis(ms),
            conn_url: Some("postgres://127.0.0.1:1/postgres".to_owned()),
            api_url: Some("http://127.0.0.1:8001/patroni".to_owned()),
            slots: BTreeMap::new(),
        });
        self
    }

    fn requested(mut self, leader: Option<&str>, candidate: Option<&str>) -> Self {
        self.view().failover_revision = Revision(90);
        self.view().failover = Some(FailoverRequest {
            leader: leader.map(Into::into),
            candidate: candidate.map(Into::into),
            scheduled_at: None,
            scheduled_at_text: None,
        });
        self
    }
}
