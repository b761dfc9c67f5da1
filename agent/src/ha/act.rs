//! From a decision to its effect: one transaction, or a task.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tracing::{info, warn};
use trunkline_common::cluster::{Initialize, LeaderKey, SyncState};
use trunkline_common::dcs::store::{Alongside, Outcome, Seen, SyncWrite};
use trunkline_common::dcs::{Dcs, DcsError, codec, lasts};
use trunkline_common::{Clock, ClusterView, LeaseId, MemberName, Revision, TimelineId};
use trunkline_config::dynamic::{SynchronousMode, new_cluster};

use super::decide::{Action, Decision, DemoteMode, step_down_margin};
use super::prepare::Stop;
use super::situation::{DivergenceState, Refusal};
use super::task::{BootstrapPlan, HandOverPlan, START_LIMIT, StandbyNames, TaskKind};
use super::{Ha, Next, sync, timelines};
use crate::peer::Peers;
use crate::postgres::{CustomBootstrap, PgRole, PgStatus, Postgres, Running, StartAs};

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    pub(super) async fn act(&mut self, decision: Decision) -> Next {
        if let Some(cause) = self.cause(&decision.action) {
            self.count(decision.action.label(), cause);
        }
        match decision.action {
            Action::Wait | Action::Abstain | Action::Ask(_) => {
                self.idle_upkeep().await;
                Next::Wait
            }
            Action::Exit => Next::Exit,
            Action::Lead => self.lead().await,
            Action::Confirm => self.confirm().await,
            Action::Failsafe(members) => self.ask_for_word(members).await,
            Action::Acquire(write) => self.acquire(write).await,
            Action::Release => self.release().await,
            Action::Resign => {
                self.lease.resign();
                Next::Wait
            }
            Action::ClearFailover => self.clear_failover().await,
            Action::Promote(write) => self.promote(write).await,
            Action::HandOver => self.hand_over().await,
            Action::DemoteCluster => self.demote_cluster().await,
            Action::Bootstrap => self.bootstrap().await,
            Action::Follow(upstream) => {
                if let Err(error) = self.parts.postgres.follow(upstream).await {
                    warn!("PostgreSQL could not be pointed at its new upstream: {error}");
                }
                Next::Wait
            }
            Action::ResumeReplay => match self.parts.postgres.resume_replay().await {
                Ok(()) => Next::Again,
                Err(error) => {
                    warn!("replay could not be resumed: {error}");
                    Next::Wait
                }
            },
            action => self.start_task(action),
        }
    }

    /// The decisions whose whole effect is a task.
    fn start_task(&mut self, action: Action) -> Next {
        let hands = self.hands();
        match action {
            Action::Demote(mode) => {
                let until = self.lease.session().deadline.filter(|_| mode == DemoteMode::Offline);
                let until = until.map(|deadline| deadline.fence_at);
                self.spawn(TaskKind::Demote, hands.demote(until));
            }
            Action::Clone(source) => self.spawn_copy(TaskKind::Clone, false, hands.clone_from(source)),
            Action::RestoreReplica => self.spawn(TaskKind::Clone, hands.restore_replica()),
            Action::Reclone(source) => self.spawn_copy(TaskKind::Clone, true, hands.clone_from(source)),
            Action::Start(role) => {
                let names = self.names_at_start(&role);
                let (limit, told) = match role {
                    // Nothing is decided while it starts, and after that time somebody else may be preferred.
                    StartAs::Primary => {
                        (self.settings().primary_start_timeout.clamp(Duration::from_secs(1), START_LIMIT), "primary")
                    }
                    StartAs::Standby(_) => {
                        self.memory.was_primary = false;
                        (hands.pg_ctl_timeout(), self.standby_role())
                    }
                };
                self.spawn(TaskKind::Start, hands.start(role, names, limit, Some(told)));
            }
            Action::CloneRemote(source) => {
                let section = self.settings().standby_cluster.as_ref();
                let methods = section.and_then(|section| section.get("create_replica_methods")?.as_array());
                let methods = methods.into_iter().flatten().filter_map(|method| Some(method.as_str()?.to_owned()));
                self.spawn(TaskKind::Clone, hands.clone_remote(source, methods.collect()));
            }
            Action::CheckDivergence(upstream) => self.spawn(TaskKind::CheckDivergence, hands.compare(upstream)),
            Action::Discard(system) => self.spawn(TaskKind::Discard, hands.discard(system)),
            Action::Rewind(upstream) => self.spawn(TaskKind::Rewind, hands.rewind(upstream)),
            _ => {}
        }
        Next::Wait
    }

    /// What is counted as it is begun, and under which cause; steady states are not. The key and a promotion are counted once
    /// they are had.
    fn cause(&self, action: &Action) -> Option<&'static str> {
        match action {
            Action::Release if self.memory.must_not_lead.is_some() => Some("watchdog"),
            Action::Release if self.settings.pause => Some("paused"),
            Action::Release if matches!(self.pg, PgStatus::Running(_)) => Some("not_won"),
            Action::Release => Some("postgresql_down"),
            Action::Resign => Some("dcs_away"),
            Action::Demote(DemoteMode::LostKey) => Some("lost_key"),
            Action::Demote(DemoteMode::Offline) => Some("dcs_away"),
            Action::Demote(DemoteMode::Sick) => Some("postgresql_sick"),
            Action::Rewind(_) | Action::Reclone(_) => Some("diverged"),
            _ => None,
        }
    }

    /// Steps down in order once the checkpoint for it is made, and leads on until then: routers take sessions away as soon as it is
    /// told that this server stops, so not before it is about to.
    async fn hand_over(&mut self) -> Next {
        let Some(plan) = self.hand_over_plan(self.requested_candidate()) else { return Next::Wait };
        if !self.is_prepared(Stop::HandOver(plan.view.failover_revision)) {
            return self.lead().await;
        }
        self.count(Action::HandOver.label(), "requested");
        let hands = self.hands();
        self.spawn(TaskKind::HandOver, hands.hand_over(plan));
        Next::Wait
    }

    async fn demote_cluster(&mut self) -> Next {
        if !self.is_prepared(Stop::DemoteCluster) {
            return self.lead().await;
        }
        self.count(Action::DemoteCluster.label(), "standby_cluster");
        let (hands, limit) = (self.hands(), self.settings().stop_limit());
        self.spawn(TaskKind::DemoteCluster, hands.demote_cluster(limit));
        Next::Wait
    }

    /// The transaction that makes a leader. What it wrote is put into our copy of the view: the promotion must not wait
    /// for the watch to tell us what we did.
    async fn acquire(&mut self, write: Option<SyncWrite>) -> Next {
        let (Some(view), Some(lease)) = (self.view.clone(), self.lease.session().lease) else { return Next::Wait };
        let seen = Seen::of(&view);
        let PgStatus::Running(running) = &self.pg else { return Next::Wait };
        // Whoever leads first after the DCS was lost, or in it for the first time, says which cluster it is.
        let system = running.system_id;
        let initialize = (view.initialize != Initialize::Done(system)).then_some(system);
        let claims = timelines::claim(&view, running);
        let promotes = running.role == PgRole::Standby;
        let also = Alongside { sync: write.clone(), initialize, claims };
        let acquired = self.parts.store.acquire_leader(&self.me.name, lease.id, seen, also).await;
        match acquired {
            Ok(Outcome::Done(revision)) => {
                if !self.lease.lead(lease) {
                    warn!("acquired the leader key with a lease that is lost already");
                    return Next::Wait;
                }
                // Patroni's words: operators look for them.
                info!(
                    "{}",
                    match (running.role, view.settings.standby_cluster.is_some()) {
                        (_, true) => "promoted self to a standby leader by acquiring session lock",
                        (PgRole::Primary, false) => "acquired session lock as a leader",
                        (PgRole::Standby, false) => "promoted self to leader by acquiring session lock",
                    }
                );
                self.count("acquire", "no_leader");
                self.memory.elected = Some(revision);
                self.memory.leading_since = revision;
                if claims.is_some() {
                    self.memory.claimed_at = revision;
                }
                // A server that takes writes already goes on: nobody has them all but who is waited for from now on.
                self.memory.sync_before = write.as_ref().filter(|_| promotes).map(|_| unwritten(&view.sync, revision));
                self.memory.sync_settled |= write.is_some();
                if !view.settings.router_lease.is_zero() {
                    // Which routers there are must have been seen after that: the next view shows it, and the key.
                    return Next::Wait;
                }
                let mut view = match &write {
                    Some(write) => with(&view, write, revision),
                    None => ClusterView { revision, ..(*view).clone() },
                };
                let key =
                    LeaderKey { name: self.me.name.clone(), lease: lease.id, created: revision, modified: revision };
                view.leader = Some(key);
                if initialize.is_some() {
                    view.initialize = Initialize::Done(system);
                    view.initialize_revision = revision;
                }
                if let Some(number) = claims {
                    (view.claimed, view.claimed_revision) = (number, revision);
                }
                // A request that this fulfils is cleared once writes go on: the leader finds it out of date.
                self.view = Some(Arc::new(view));
                Next::Decide
            }
            Ok(Outcome::Conflict) => {
                info!("lost the race for the leader key, or the view was out of date");
                Next::Wait
            }
            Err(DcsError::LeaseLost) => {
                // Known before the keeper's next renewal: another one is asked for at once.
                self.lease.abandon(lease.id);
                Next::Wait
            }
            Err(error) => {
                warn!("the leader key could not be acquired: {error}");
                Next::Wait
            }
        }
    }

    /// An agent restarted under its own leader key, a lease was lost and found, or the view shows another leader than we
    /// thought: prove it before acting as leader.
    async fn confirm(&mut self) -> Next {
        let Some(lease) = self.lease.session().lease else { return Next::Wait };
        let led = self.lease.session().leading;
        let in_view = self.view.as_ref().is_some_and(|view| view.is_leader(&self.me.name));
        let confirmed = match led {
            // Which lease it is attached to is the keeper's to see to: it may be moving the key to another one than we know of.
            true => self.parts.store.names_leader(&self.me.name).await,
            false => self.parts.store.confirm_leader(&self.me.name, lease.id).await,
        };
        match confirmed {
            // Where the view does not show it yet, the next one will.
            Ok(Outcome::Done(revision)) if self.lease.lead(lease) => {
                self.memory.leading_since = revision;
                if !led {
                    // What was compared when it was won may be long out of date.
                    self.memory.elected = None;
                }
                if in_view {
                    return Next::Decide;
                }
                self.parts.store.doubt();
                Next::Wait
            }
            Ok(Outcome::Conflict) if led => {
                self.lease.disown(self.parts.clock.now());
                Next::Decide
            }
            Ok(_) => {
                // The key went away since the view was made. The next view says who has it.
                Next::Wait
            }
            Err(error) => {
                warn!("the leader key could not be confirmed: {error}");
                Next::Wait
            }
        }
    }

    /// Failsafe mode: with the word of every member that could take the key, this primary leads on until the first of them
    /// may break it, which is not before the time of asking plus ttl. One that is missing is enough to end it.
    async fn ask_for_word(&mut self, members: BTreeMap<MemberName, String>) -> Next {
        let ttl = self.settings().ttl;
        let asked_at = self.parts.clock.now();
        let until = self.lease.session().leader_until().unwrap_or(asked_at);
        let left = until.since(asked_at);
        let patience =
            left.saturating_sub(step_down_margin(self.ttl())).clamp(Duration::from_millis(300), Duration::from_secs(2));
        let status = self.view.as_ref().and_then(|view| self.status(view));
        let slots = status.and_then(|status| status.slots).unwrap_or_default().into_iter();
        let slots: serde_json::Map<_, _> = slots.map(|(name, lsn)| (name, lsn.0.into())).collect();
        let body = json!({
            "name": self.me.name.as_str(),
            "conn_url": self.urls.connection,
            "api_url": self.urls.api,
            "slots": slots,
            "ttl": ttl.as_secs_f64().ceil() as u64,
        });
        let answers = self.parts.peers.failsafe(members.clone(), body, patience).await;
        if let Some((name, _)) = answers.iter().find(|(_, answer)| answer.leads) {
            warn!("failsafe mode: {name} holds the leader key");
            self.lease.depose(self.parts.clock.now());
            return Next::Decide;
        }
        let missing = |name: &&MemberName| !answers.get(*name).is_some_and(|answer| answer.accepted);
        let missing: Vec<&str> = members.keys().filter(missing).map(MemberName::as_str).collect();
        let now = self.parts.clock.now();
        if !missing.is_empty() {
            let why = format!("no promise from {}", missing.join(", "));
            let before = self.memory.failsafe_refused.as_ref().filter(|before| before.until == until);
            if before.is_none_or(|before| before.why != why) {
                warn!("failsafe mode: {why}");
            }
            let since = before.map_or(now, |before| before.since);
            self.memory.failsafe_refused = Some(Refusal { since, at: now, until, why });
            return Next::Decide;
        }
        self.memory.failsafe_refused = None;
        self.memory.heard = answers.iter().filter_map(|(name, answer)| Some((name.clone(), answer.lsn?))).collect();
        if !self.lease.prolong(now, asked_at + lasts(ttl)) {
            warn!("failsafe mode: all members agree, but too late");
        }
        self.upkeep_slots().await;
        Next::Wait
    }

    async fn release(&mut self) -> Next {
        if matches!(self.pg, PgStatus::Stopped(_)) && self.memory.was_primary && !self.memory.demoted {
            self.parts.postgres.callback("on_role_change", "demoted");
        }
        let session = self.lease.session();
        let held = session.lease.filter(|_| session.leading).map(|lease| lease.id);
        let named = self.view.as_ref().and_then(|view| view.leader.as_ref()).map(|leader| leader.lease);
        self.lease.resign();
        // Whoever hears of it asks this node at once.
        self.publish_board();
        if let Some(lease) = held.or(named) {
            self.tell_who_overtook(lease).await;
            let sync = self.memory.sync_before.take();
            self.hands().release(lease, None, sync).await;
        }
        // Not into the race again at once: whoever can take over shall.
        let pause = self.parts.clock.now() + self.settings().loop_wait.min(Duration::from_secs(1));
        self.memory.abstain_until = self.memory.abstain_until.max(Some(pause));
        Next::Wait
    }

    /// The DCS learns what this node has heard, or the next leader might begin a timeline of the same number.
    async fn tell_who_overtook(&mut self, lease: LeaseId) {
        let (Some(view), Some(later)) = (&self.view, self.memory.overtaken_by) else { return };
        if view.claimed != later {
            return;
        }
        match self.parts.store.put_claim(&self.me.name, lease, later, view.claimed_revision).await {
            Ok(Outcome::Done(_)) => info!("told the DCS of timeline {later}"),
            Ok(Outcome::Conflict) => info!("the timeline key has changed meanwhile and is left alone"),
            Err(error) => warn!("the DCS could not be told of timeline {later}: {error}"),
        }
    }

    pub(super) async fn clear_failover(&mut self) -> Next {
        let Some(view) = self.view.clone() else { return Next::Wait };
        match self.parts.store.put_failover(&json!({}), Some(view.failover_revision)).await {
            Ok(Outcome::Done(_)) => {
                let mut view = (*view).clone();
                view.failover = None;
                self.view = Some(Arc::new(view));
            }
            Ok(Outcome::Conflict) => info!("the failover request has changed meanwhile and is left alone"),
            Err(error) => warn!("the failover request could not be cleared: {error}"),
        }
        Next::Wait
    }

    async fn promote(&mut self, write: Option<SyncWrite>) -> Next {
        let (Some(view), PgStatus::Running(running)) = (self.view.clone(), self.pg.clone()) else { return Next::Wait };
        if self.memory.abstain_until.is_some_and(|until| self.parts.clock.now() < until) {
            // A promotion that got stuck may still go on: the key is given up only once the server is down.
            info!("this node could not be promoted; stopping it before the leader key is given back");
            return self.start_task(Action::Demote(DemoteMode::Sick));
        }
        // Also where there is nothing new to say: whom the first commits don't wait for must not get onto the key late.
        if let Some(write) = write.or_else(|| self.unsettled(&view)) {
            match self.put_sync(write.clone()).await {
                Ok(Outcome::Done(revision)) => {
                    let before = self.memory.sync_before.take().map_or_else(
                        || unwritten(&view.sync, revision),
                        |before| SyncWrite { seen: revision, ..before },
                    );
                    self.memory.sync_before = Some(before);
                    self.view = Some(Arc::new(with(&view, &write, revision)));
                }
                Ok(Outcome::Conflict) => {
                    info!("the sync key has changed; not promoting on an old list");
                    return Next::Wait;
                }
                Err(error) => {
                    warn!("the sync key could not be written; not promoting: {error}");
                    return Next::Wait;
                }
            }
        }
        let Some(claimed) = self.claim(&view, &running).await else { return Next::Wait };
        let names = sync::names_on_promotion(&view, &self.me.name, &self.configured_names());
        let hands = self.hands();
        let left_out = timelines::left_out(claimed, running.timeline);
        self.memory.promotions += 1;
        self.spawn(TaskKind::Promote, hands.promote(names, running.synchronous_standby_names, left_out));
        Next::Wait
    }

    /// The number of the timeline that is begun now. A leader that has come back as a standby, was one in a standby
    /// cluster, or has its key from a backup, has claimed none with its key. `None`: it could not be claimed.
    async fn claim(&mut self, view: &ClusterView, running: &Running) -> Option<TimelineId> {
        let ours = view.claimed_revision == self.memory.claimed_at && Some(view.claimed) > running.timeline;
        let number = timelines::claim(view, running).filter(|_| !ours);
        let Some(number) = number else { return Some(view.claimed) };
        let lease = self.lease.session().lease?.id;
        match self.parts.store.put_claim(&self.me.name, lease, number, view.claimed_revision).await {
            Ok(Outcome::Done(revision)) => {
                self.memory.claimed_at = revision;
                return Some(number);
            }
            Ok(Outcome::Conflict) => info!("the timeline key has changed; not promoting on an old one"),
            Err(error) => warn!("the timeline key could not be written; not promoting: {error}"),
        }
        None
    }

    async fn bootstrap(&mut self) -> Next {
        let (Some(bootstrap), Some(lease)) = (self.parts.local.bootstrap.clone(), self.lease.session().lease) else {
            return Next::Wait;
        };
        match self.parts.store.begin_bootstrap(lease.id).await {
            Ok(Outcome::Done(_)) => {}
            Ok(Outcome::Conflict) => {
                info!("another member was faster to bootstrap the cluster");
                return Next::Wait;
            }
            Err(error) => {
                // It may have been, or may yet be: then the right is ours, and nobody else's while its lease lives.
                warn!("the initialize key could not be created, if it was it ends with its lease: {error}");
                self.lease.abandon(lease.id);
                return Next::Wait;
            }
        }
        if !self.lease.bootstrap(lease) {
            warn!("the right to bootstrap came with a lease that is lost already");
            return Next::Wait;
        }
        let section = bootstrap.raw.get(&bootstrap.method).and_then(|section| section.as_object().cloned());
        let method = section.filter(|_| bootstrap.method != "initdb");
        let method = method.map(|section| CustomBootstrap { name: bootstrap.method.clone(), section });
        let kind = if method.is_some() { TaskKind::CustomBootstrap } else { TaskKind::Bootstrap };
        let plan = BootstrapPlan {
            method,
            initdb: bootstrap.initdb.clone(),
            hba: bootstrap.pg_hba.clone(),
            post_bootstrap: bootstrap.post_bootstrap.clone(),
            config: new_cluster(&bootstrap.dcs),
            config_seen: self.view.as_ref().and_then(|view| view.config.as_ref()).map_or(Revision(0), |c| c.revision),
        };
        let hands = self.hands();
        self.spawn(kind, hands.bootstrap(plan, lease));
        Next::Wait
    }

    fn requested_candidate(&self) -> Option<MemberName> {
        self.view.as_ref()?.failover.as_ref()?.candidate.clone()
    }

    /// Who could take over, and how long to give them.
    pub(super) fn hand_over_plan(&self, candidate: Option<MemberName>) -> Option<HandOverPlan> {
        let view = self.view.clone()?;
        let synchronous = view.settings.synchronous_mode != SynchronousMode::Off && view.sync.is_active();
        let wanted = |name: &MemberName| match &candidate {
            Some(candidate) => candidate == name,
            None => *name != self.me.name && (!synchronous || view.sync.lists(name)),
        };
        let candidates = view.members.iter().filter(|(name, member)| wanted(name) && !member.nofailover());
        let candidates =
            candidates.filter_map(|(name, member)| Some((name.clone(), member.api_url.clone()?))).collect();
        Some(HandOverPlan {
            candidates,
            grace: view.settings.switchover_grace,
            stop_limit: view.settings.stop_limit(),
            candidate_limit: Duration::from_secs(3),
            view,
        })
    }

    /// `synchronous_standby_names` for a start. A primary that comes back in place must wait for exactly those that the
    /// `sync` key promises to have everything; a standby waits for nobody.
    pub(super) fn names_at_start(&self, role: &StartAs) -> StandbyNames {
        match (&self.view, role) {
            (Some(view), StartAs::Primary) => StandbyNames {
                text: sync::names_in_key(view, &self.me.name, &self.configured_names()),
                settle: self.unsettled(view),
            },
            _ => StandbyNames::default(),
        }
    }

    /// What settles the `sync` key, where a write of it may still be on its way: comes before every change of whom commits
    /// wait for.
    pub(super) fn unsettled(&self, view: &ClusterView) -> Option<SyncWrite> {
        sync::settle(view).filter(|_| !self.memory.sync_settled)
    }

    pub(super) fn configured_names(&self) -> String {
        let config = self.parts.postgres.config();
        config.parameters.get("synchronous_standby_names").cloned().unwrap_or_default()
    }

    /// The running standby follows somebody: doubts are cleared by streaming.
    pub(super) fn settle_divergence(&mut self) {
        if let PgStatus::Running(running) = &self.pg
            && running.replication_state.as_deref() == Some("streaming")
            && self.memory.divergence != DivergenceState::NotAsked
        {
            self.memory.divergence = DivergenceState::NotAsked;
        }
    }
}

/// The write that takes the one of `revision` back.
fn unwritten(before: &SyncState, revision: Revision) -> SyncWrite {
    let encoded = codec::encode_sync(before.leader.as_ref(), before.quorum, &before.standbys);
    SyncWrite { value: (before.revision > Revision(0)).then_some(encoded), seen: revision, restored: None }
}

/// `view` once `write` is done, at `revision`.
pub(super) fn with(view: &ClusterView, write: &SyncWrite, revision: Revision) -> ClusterView {
    let mut view = ClusterView { revision, sync: written(write, revision), ..view.clone() };
    if let Some(record) = write.restored.clone() {
        view.has_said(record, revision);
    }
    view
}

/// The `sync` key as we have just written it.
fn written(write: &SyncWrite, revision: Revision) -> SyncState {
    let Some(value) = &write.value else { return SyncState::default() };
    let leader = value.get("leader").and_then(|name| name.as_str()).map(MemberName::from);
    let listed = value.get("sync_standby").and_then(|names| names.as_str()).unwrap_or_default();
    let standbys = listed.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
    let quorum = value.get("quorum").and_then(|quorum| quorum.as_u64()).and_then(|quorum| quorum.try_into().ok());
    SyncState { leader, standbys, quorum: quorum.unwrap_or(0), revision }
}
