//! What is checked of a world as a whole: each revision of the store, and everything once the faults are over.

use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use rand::Rng;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use trunkline_agent::node::Command;
use trunkline_agent::postgres::PgRole;
use trunkline_common::cluster::Initialize;
use trunkline_common::dcs::follow::Follower;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::{Clock, ClusterView, MemberName};
use trunkline_config::dynamic::SynchronousMode;

use super::World;
use super::promises::{Term, Vacancy};
use crate::clients;
use crate::executor::{Drift, Livelock, SimClock};
use crate::outside;
use crate::postgres::HALF_REWOUND;
use crate::reader::{self, Reader};
use crate::scenario::{Event, Fault};
use crate::server::Server;
use crate::stage::{host_of, paths};

/// Records that one may be behind who follows the leader, a fraction of the smallest limit for a failover.
const KEPT_UP: usize = 50;

/// How long a standby may take until it has a logical slot: it tries every ten seconds, and is restarted for it.
const SLOTS_COPIED: Duration = Duration::from_secs(30);

impl World {
    /// What each revision of the store says in itself: the timeline never goes down, nobody who is no primary takes the
    /// leader key in a pause unasked, nobody is promoted or waited for who is tagged against it.
    pub(super) fn watch_store(&self) {
        let executor = self.stage.executor();
        let clock = SimClock::new(executor, self.process, Drift::default(), Arc::default());
        let store = ClusterStore::new(self.stage.store().client(), paths());
        let mut knowledge = Follower::spawn(store, clock);
        let world = self.clone();
        executor.spawn(self.process, async move {
            let mut before = Arc::<ClusterView>::default();
            let mut vacancy = Vacancy::default();
            let mut term = None;
            let mut restores = 0;
            while knowledge.changed().await.is_ok() {
                let known = knowledge.borrow_and_update().clone();
                let Some(view) = known.view else { continue };
                if std::mem::replace(&mut restores, known.restores) != known.restores {
                    // What it says is no change that anybody has made.
                    (before, vacancy, term) = (view, Vacancy::default(), None);
                    continue;
                }
                if let Some(timeline) = view.timeline() {
                    world.stage.judge(|judge, now| judge.timeline(now, timeline.0));
                }
                let leads = view.leader.as_ref().map(|leader| (leader.name.clone(), leader.created));
                world.leads.send_if_modified(|old| std::mem::replace(old, leads.clone()) != leads);
                if let Some(wrong) = world.wrong_in(&before, &view) {
                    world.stage.judge(|judge, now| judge.violation(now, wrong));
                }
                let created = |view: &ClusterView| view.leader.as_ref().map(|leader| leader.created);
                if created(&before) != created(&view) {
                    if let Some(left) = &before.leader {
                        vacancy = Vacancy { leader: Some(left.name.clone()), since: world.stage.executor().now() };
                        let wrong = term.take().and_then(|term: Term| world.left_behind(&term, &left.name, &view));
                        wrong.into_iter().for_each(|wrong| world.stage.judge(|judge, now| judge.violation(now, wrong)));
                    }
                    if view.leader.is_some() {
                        let wrong = world.wrong_election(&before, &view, &vacancy);
                        wrong.into_iter().for_each(|wrong| world.stage.judge(|judge, now| judge.violation(now, wrong)));
                        let (since, reigns) = world.stage.judge(|judge, now| (now, judge.reigns));
                        term = before.leader.is_none().then(|| Term { before: before.clone(), since, reigns });
                    }
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
        // Who led before a store went back has every commit as well, and that store does not know of it.
        let restored = self.scenario.events.iter().any(|event| matches!(event.what, Fault::RestoreDcs { .. }));
        if let Some(name) = view.sync.standbys.iter().find(nosync).filter(|_| !restored) {
            return Some(format!("commits may wait for {name}, which is tagged nosync"));
        }
        let leader = view.leader.as_ref()?;
        let was_primary = || {
            let host = host_of(leader.name.as_str()).unwrap_or_default();
            self.stage.server(host, |server| server.is_primary())
        };
        let unchanged = before.leader.as_ref().is_some_and(|last| last.created == leader.created);
        // Whoever makes a cluster has its first key, also where it is paused meanwhile.
        let makes_it = !matches!(before.initialize, Initialize::Done(_));
        if unchanged || makes_it || was_primary() {
            return None;
        }
        if node(&leader.name).is_some_and(|node| node.priority <= 0) {
            return Some(format!("{} leads and must not be promoted", leader.name));
        }
        let asked = before.failover.is_some() || view.failover.is_some();
        let paused = before.settings.pause && view.settings.pause;
        (paused && !asked).then(|| format!("{} takes the leader key in a pause, unasked", leader.name))
    }

    /// Whether somebody leads, and what is not as it should be.
    pub(super) fn unwell(&self) -> (bool, Option<String>) {
        let Some(leader) = self.stage.holder() else { return (false, Some("nobody holds the leader key".to_owned())) };
        let (members, standby_cluster) = (self.view().members, self.stage.is_standby_cluster());
        let removes = |on| self.scenario.settings["postgresql"][on] == json!(true);
        let replaces = removes("remove_data_directory_on_diverged_timelines");
        let reclones = replaces || removes("remove_data_directory_on_rewind_failure");
        let fills = self.scenario.events.iter().any(|event| matches!(event.what, Fault::DiskFull { .. }));
        let rewinds = replaces || self.scenario.settings["postgresql"]["use_pg_rewind"] != json!(false);
        self.stage.servers(|servers| {
            let Some(primary) = servers.iter().find(|server| server.name.0 == leader) else {
                return (false, Some(format!("{leader} is nobody")));
            };
            if standby_cluster {
                let upstream = primary.data.as_ref().and_then(|data| data.upstream.as_ref());
                let follows = upstream.is_some_and(|upstream| upstream.host == outside::HOST);
                if !follows || !primary.running().is_some_and(|p| p.role == PgRole::Standby && p.streaming) {
                    return (
                        true,
                        Some(format!("{leader} leads a standby cluster and does not follow the server outside")),
                    );
                }
            } else if !primary.is_primary() {
                return (false, Some(format!("{leader} holds the leader key and takes no writes")));
            }
            let Some(wal) = primary.data.as_ref().map(|data| &data.wal) else { return (false, None) };
            // pg_rewind is not allowed, or has failed, and nothing may take its place by itself; or whom it is to follow is a
            // copy that was made while this one was away, and has never had the WAL in between.
            let takes_a_person = |server: &Server| {
                let Some(data) = &server.data else { return false };
                let diverged = !data.wal.is_prefix_of(wal);
                let failed = server.postmaster.is_none() && (data.damage == Some(HALF_REWOUND) || diverged && fills);
                let upstream =
                    data.upstream.as_ref().and_then(|upstream| servers.iter().find(|s| s.name == upstream.name));
                let source = upstream.and_then(|upstream| upstream.data.as_ref());
                let kept = source.is_none_or(|source| source.could_keep(&server.name.slot_name(), data.wal.len()));
                let too_old = !kept && !server.is_primary();
                !reclones && failed || too_old || !rewinds && diverged && !server.is_primary()
            };
            for server in servers.iter().filter(|server| server.name.0 != leader) {
                let Some(data) = &server.data else { return (true, Some(format!("{} has no data", server.name))) };
                if !members.contains_key(&server.name) {
                    return (true, Some(format!("{} is no member", server.name)));
                }
                // Nor does anybody below get what such a member does not get.
                let alone = |server: &Server| self.scenario.nodes[server.host].tags.contains_key("nostream");
                if alone(server) && server.running().is_some_and(|postmaster| postmaster.role == PgRole::Standby) {
                    continue;
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
                if !server.is_primary() && chain.any(|server| takes_a_person(server) || alone(server)) {
                    continue;
                }
                return (true, Some(format!("{} does not follow {leader}", server.name)));
            }
            (true, None)
        })
    }

    /// How long it takes, once all is well, until nobody has anything left of what went wrong.
    fn aftermath(&self) -> Duration {
        for link in self.hosts.lock().iter().filter_map(|host| host.link.as_ref()) {
            link.set_faults(|faults| faults.lost_events = 0);
        }
        let view = self.view();
        let lost = |event: &Event| matches!(event.what, Fault::LoseEvents { .. });
        match view.settings.failsafe_mode || view.failsafe.is_some_and(|members| !members.is_empty()) {
            // A promise not to lead outlasts the trouble that it was given for, and so does the list of those who gave it.
            true => Duration::from_secs(21),
            // Until everything is read once more.
            false if self.scenario.events.iter().any(lost) => Duration::from_secs(11),
            false => Duration::ZERO,
        }
    }

    /// A healthy cluster carries out a switchover, also where it comes right after one that it has to refuse.
    fn check_switchover(&self) -> Result<(), Livelock> {
        self.go_on(self.stage.executor().now() + self.aftermath())?;
        let view = self.view();
        let Some(leader) = view.leader.as_ref().map(|leader| leader.name.clone()) else { return Ok(()) };
        // Nothing takes writes there, and nothing is waited for.
        let standby_cluster = self.stage.is_standby_cluster();
        let synchronous = view.settings.synchronous_mode != SynchronousMode::Off && !standby_cluster;
        let candidate = |outside: bool| {
            self.stage.servers(|servers| {
                let wal = servers.iter().find(|server| server.name == leader).and_then(|server| server.data.as_ref());
                // One may be left to a person, or get nothing, and another that hangs below it with it.
                let follows = |server: &Server| {
                    let own = server.data.as_ref().map(|data| &data.wal);
                    own.zip(wal).is_some_and(|(own, leader)| {
                        own.is_prefix_of(&leader.wal) && leader.wal.len() <= own.len() + KEPT_UP
                    })
                };
                let able = |server: &&Server| {
                    server.name != leader
                        // Its last request for a lease may have got lost, and it has not given it up yet.
                        && view.members.contains_key(&server.name)
                        && server.running().is_some_and(|postmaster| postmaster.streaming)
                        && follows(server)
                        && self.scenario.nodes[server.host].priority > 0
                        && (!synchronous || view.sync.lists(&server.name) != outside)
                };
                servers.iter().find(able).map(|server| (server.host, server.name.clone()))
            })
        };
        // To one outside of the set only by an operator's word, who may lose commits by it; here none can be lost.
        let outside = candidate(true)
            .filter(|_| synchronous && view.settings.synchronous_mode == SynchronousMode::On && self.sometimes(3));
        let (outside, candidate) = (outside.is_some(), outside.or_else(|| candidate(false)));
        // Close to the limit it may rightly be refused.
        let Some((host, candidate)) = candidate.filter(|_| view.settings.maximum_lag_on_failover >= 6_400) else {
            return Ok(());
        };
        let host_of_leader = host_of(leader.as_str()).unwrap_or_default();
        let at = (!outside && self.sometimes(3))
            .then(|| self.clock(host_of_leader, self.process).wall() + TimeDelta::seconds(3));
        let due = at.map_or(Duration::ZERO, |_| self.stage.executor().now() + Duration::from_secs(3));
        let mut request = json!({ "leader": leader.0, "member": candidate.0 });
        if outside {
            request = json!({ "member": candidate.0 });
        }
        if let Some(at) = at {
            request["scheduled_at"] = Value::from(at.to_rfc3339());
        }
        let (acting, former) = (self.clone(), leader.clone());
        self.stage.executor().spawn(self.process, async move {
            let store = acting.store();
            tracing::info!("FINALE a switchover to nobody, then {request}");
            let _ = store.put_failover(&json!({ "leader": former.0, "member": "n9" }), None).await;
            acting.stage.micros(1..20_000).await;
            let _ = store.put_failover(&request, None).await;
        });
        let end = self.stage.executor().now().max(due) + Duration::from_secs(20);
        while self.stage.executor().now() < end {
            self.go_on(self.stage.executor().now() + Duration::from_millis(100))?;
            let view = self.view();
            if synchronous && !outside && view.is_leader(&leader) && !view.sync.lists(&candidate) {
                // Another one has taken its place meanwhile: then it is rightly refused.
                return Ok(());
            }
            let done = self.stage.holder().as_ref() == Some(&candidate.0)
                && (standby_cluster || self.stage.server(host, |s| s.is_primary()));
            if done && self.stage.executor().now() < due {
                self.stage.judge(|judge, now| judge.violation(now, "a scheduled switchover came before its time"));
            }
            if done || self.stage.judge(|judge, _| !judge.violations.is_empty()) {
                return Ok(());
            }
        }
        let what = if outside { "failover" } else { "switchover" };
        self.stage.judge(|judge, now| judge.violation(now, format!("a {what} to {candidate} was not carried out")));
        Ok(())
    }

    /// A permanent slot is on every node that may lead; a logical one once it has been copied, for which servers are restarted.
    fn check_slots(&self) -> Result<(), Livelock> {
        let until = self.stage.executor().now() + SLOTS_COPIED;
        while let Some((name, slot)) = self.lacks_slot() {
            if Some(&slot) != self.scenario.logical_slot().as_ref() || self.stage.executor().now() > until {
                let what = format!("{name} lacks the permanent slot {slot}");
                self.stage.judge(|judge, now| judge.violation(now, what));
                break;
            }
            self.go_on(self.stage.executor().now() + Duration::from_millis(250))?;
        }
        Ok(())
    }

    fn lacks_slot(&self) -> Option<(MemberName, String)> {
        let permanent = self.view().settings.slots;
        // What gets its WAL from an archive, or outside, has no logical slots, nor has anybody below it.
        let no_logical = self.stage.is_standby_cluster() || !self.stage.judge(|judge, _| judge.keeps_slots);
        let logical = self.scenario.logical_slot().filter(|_| !no_logical);
        let leader = self.stage.holder();
        self.stage.servers(|servers| {
            let leads = servers.iter().find(|server| Some(&server.name.0) == leader.as_ref());
            let leads = leads.and_then(|server| server.data.as_ref());
            let end = leads.map_or(0, |data| data.wal.len());
            let lacks = |server: &Server| {
                let (data, postmaster) = server.data.as_ref().zip(server.running())?;
                // Who does not get on is left to a person, or hangs below such a one.
                let streams = postmaster.role == PgRole::Primary || postmaster.streaming;
                let gets_on = streams && data.wal.len() + KEPT_UP >= end;
                let there = |slot: &String| match self.scenario.logical_slot() {
                    Some(name) if name == *slot => logical.is_none() || !gets_on || data.can_decode(slot),
                    _ => data.slots.contains_key(slot),
                };
                permanent.keys().find(|slot| !there(slot)).map(|slot| (server.name.clone(), slot.clone()))
            };
            let may_lead = |server: &&Server| self.scenario.nodes[server.host].priority > 0;
            servers.iter().filter(may_lead).find_map(lacks)
        })
    }

    /// Who reads a logical slot gets everything.
    fn check_reader(&self) -> Result<(), Livelock> {
        let Some(reader) = &self.reader else { return Ok(()) };
        let leads = || self.stage.holder().and_then(|holder| host_of(&holder));
        let keeps_it = |host: &usize| self.scenario.nodes[*host].priority > 0;
        let exempt = self.stage.is_standby_cluster() || !self.stage.judge(|judge, _| judge.keeps_slots);
        let until = self.stage.executor().now() + reader::LIMIT;
        let now = |host| self.stage.server(host, |server| server.data.as_ref().map(|data| data.wal.clone()));
        let Some(wal) = leads().filter(|host| keeps_it(host) && !exempt).and_then(now) else { return Ok(()) };
        while self.stage.executor().now() < until {
            if reader.lock().is_level_with(&wal) {
                return Ok(());
            }
            self.go_on(self.stage.executor().now() + Duration::from_millis(250))?;
        }
        let slot = reader.lock().slot.clone();
        self.stage
            .judge(|judge, now| judge.violation(now, format!("who reads the slot {slot} does not get everything")));
        Ok(())
    }

    /// A standby is restarted when that is due, and not before.
    fn check_scheduled_restart(&self) -> Result<(), Livelock> {
        let leader = self.stage.holder();
        let follows = |server: &&Server| {
            let upstream = server.data.as_ref().and_then(|data| data.upstream.as_ref());
            server.running().is_some_and(|postmaster| postmaster.role == PgRole::Standby && postmaster.streaming)
                && upstream.map(|upstream| &upstream.name.0) == leader.as_ref()
        };
        let standby = self.stage.servers(|servers| servers.iter().find(follows).map(|server| server.host));
        // One that gets a copy of a logical slot is restarted for that.
        let quiet = self.reader.is_none();
        let Some(host) = standby.filter(|_| self.sometimes(4) && quiet) else { return Ok(()) };
        let (before, began) = (self.postgres_process(host), self.stage.executor().now());
        let at = self.clock(host, self.process).wall() + TimeDelta::seconds(3);
        let acting = self.clone();
        self.stage.executor().spawn(self.process, async move {
            let (reply, _) = oneshot::channel();
            let schedule = json!({ "schedule": at.to_rfc3339() });
            acting.command(host, Command::ScheduleRestart(schedule, reply)).await;
        });
        let restarted = || self.postgres_process(host).filter(|new| Some(*new) != before);
        self.go_on(began + Duration::from_millis(2_900))?;
        if restarted().is_some() {
            self.stage.judge(|judge, now| judge.violation(now, format!("host {host} was restarted before its time")));
        }
        while restarted().is_none() && self.stage.executor().now() < began + Duration::from_secs(20) {
            self.go_on(self.stage.executor().now() + Duration::from_millis(100))?;
        }
        if restarted().is_none() {
            self.stage
                .judge(|judge, now| judge.violation(now, format!("host {host} was not restarted when it was due")));
        }
        Ok(())
    }

    /// In one world of `of`.
    fn sometimes(&self, of: u32) -> bool {
        self.stage.executor().random(|rng| rng.random_ratio(1, of))
    }

    /// The servers, for the trace.
    pub(super) fn show(&self) {
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
    pub(super) fn final_checks(&self) -> Result<(), Livelock> {
        let before = self.seen.lock().done;
        self.show();
        self.go_on(self.stage.executor().now() + Duration::from_secs(3))?;
        self.check_slots()?;
        self.check_reader()?;
        // Strict, and nobody can confirm: then commits have to wait.
        let strict = self.view().settings.synchronous_mode_strict;
        let standby_cluster = self.stage.is_standby_cluster();
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
        // A client that has not heard of its last write waits that long before it tries another. The last fault may yet have
        // its consequence, such as a leader that gives up.
        let now = || self.stage.executor().now();
        let (mut end, limit) = (now() + clients::PATIENCE, now() + self.scenario.patience());
        while self.seen.lock().done == before && now() < end.min(limit) && !standby_cluster {
            self.go_on(now() + Duration::from_millis(100))?;
            if self.unwell().1.is_some() {
                end = now() + clients::PATIENCE;
            }
        }
        let after = self.seen.lock().done;
        self.stage.judge(|judge, now| {
            if judge.violations.is_empty() && after == before && (streams || !strict) && !standby_cluster {
                judge.violation(now, "all is well, but no client can write through a router");
            }
        });
        self.check_synchronous_set()?;
        let slot = self.reader.as_ref().map(|reader| {
            let reader = reader.lock();
            (reader.slot.clone(), reader.made)
        });
        let before = slot.map(|(slot, made)| {
            let has_it = |server: &&Server| server.data.as_ref().is_some_and(|data| data.can_decode(&slot));
            let names =
                |servers: &mut Vec<Server>| servers.iter().filter(has_it).map(|server| server.name.0.clone()).collect();
            (made, self.stage.servers(names))
        });
        self.check_switchover()?;
        self.check_reader()?;
        let made_anew = |reader: &Reader| {
            let leader = self.stage.holder();
            let had_it = |names: &Vec<String>| leader.as_ref().is_some_and(|leader| names.contains(leader));
            before.as_ref().is_some_and(|(made, names)| reader.made > *made && had_it(names))
        };
        if let Some(reader) = self.reader.as_ref().map(|reader| reader.lock()).filter(|reader| made_anew(reader)) {
            let what = format!("the slot {} was made anew although the new leader had it", reader.slot);
            self.stage.judge(|judge, now| judge.violation(now, what));
        }
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
        self.check_scheduled_restart()
    }
}
