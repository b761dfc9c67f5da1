//! What a leader keeps up to date, and what every node publishes of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, info, warn};
use trunkline_common::cluster::{Initialize, Member, Status};
use trunkline_common::dcs::store::{Outcome, SyncWrite};
use trunkline_common::dcs::{Dcs, DcsError, codec};
use trunkline_common::{Clock, ClusterView, MemberName, Task};
use trunkline_config::dynamic::new_cluster;

use super::situation::{FailsafeAttempt, Ground, by_promise, leader_upstream, upstream};
use super::sync::{self, SyncStep};
use super::task::TaskKind;
use super::{Ha, Next, SlotsKept, act, decide, first_config, publish, slots};
use crate::node::Board;
use crate::peer::Peers;
use crate::postgres::{PgError, PgRole, PgStatus, Postgres, SlotPlan};

/// How long the watch may take to show what was written.
const SHOWN_WITHIN: Duration = Duration::from_secs(1);

/// Each copy of logical slots costs a restart: not again sooner, but after a change of leader or with a new copy of its data.
const COPY_AGAIN: Duration = Duration::from_secs(10);

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    /// A leader's turn without incident. It is cut short once the DCS falls silent: every write would wait for its deadline,
    /// and the loop has to be awake to ask for the members' word or to step down in order.
    pub(super) async fn lead(&mut self) -> Next {
        let mut session = self.lease.subscribe();
        tokio::select! {
            biased;
            () = async { _ = session.wait_for(|session| session.trouble.is_some()).await } => Next::Wait,
            next = self.upkeep() => next,
        }
    }

    /// Status, slots, synchronous set; after a promotion also history and checkpoint.
    async fn upkeep(&mut self) -> Next {
        self.settle_divergence();
        self.introduce();
        self.publish_member().await;
        self.checkpoint_after_promotion();
        // Before the status is written, which goes with the history: it says what is kept here, for members that are away too.
        self.upkeep_slots().await;
        self.upkeep_keys().await;
        self.upkeep_status().await;
        self.upkeep_failsafe().await;
        self.upkeep_sync().await
    }

    /// What a node does that has nothing to do.
    pub(super) async fn idle_upkeep(&mut self) {
        self.settle_divergence();
        if matches!(self.pg, PgStatus::Running(_)) && !self.pg_is_primary() {
            self.introduce();
            let missing = self.upkeep_slots().await;
            self.copy_slots(missing);
        }
    }

    /// A server that an agent before has left running, or somebody else has started.
    fn introduce(&self) {
        if matches!(self.pg, PgStatus::Running(_)) {
            self.parts.postgres.introduce(publish::role_text(&self.pg, &self.memory));
        }
    }

    /// `initialize`, `config` and `history`: once after a promotion, and whenever the view shows them wrong.
    async fn upkeep_keys(&mut self) {
        let (Some(view), PgStatus::Running(running)) = (self.view.clone(), self.pg.clone()) else { return };
        if view.initialize != Initialize::Done(running.system_id)
            && let Err(error) = self.parts.store.put_initialize(&self.me.name, running.system_id).await
        {
            warn!("the initialize key could not be written: {error}");
        }
        if view.config.is_none() {
            let config = first_config(&self.parts.local, self.cached_config.as_ref());
            let config = config.unwrap_or_else(|| new_cluster(&Default::default()));
            match self.parts.store.put_missing_config(&self.me.name, &config).await {
                Ok(Outcome::Done(_)) => info!("wrote the config key, which was missing"),
                Ok(Outcome::Conflict) => info!("the config key is there by now, or this node leads no more"),
                Err(error) => warn!("the config key could not be written: {error}"),
            }
        }
        if running.role == PgRole::Standby {
            // The history of a standby cluster is another cluster's.
            return;
        }
        let Some(timeline) = running.timeline.filter(|_| self.published.upkept != Some(view.revision)) else { return };
        if view.timeline() == Some(timeline) || (timeline.0 <= 1 && view.history.is_empty()) {
            return;
        }
        let Some((local, written_at)) = self.parts.postgres.history(timeline).await else { return };
        if let Some(lines) = publish::history(&view, &self.me.name, timeline, &local, &written_at) {
            let value = codec::encode_history(&lines);
            let status = self.status(&view).map(|status| codec::encode_status(&status));
            match self.parts.store.put_history(&self.me.name, &value, view.history_revision, status.as_ref()).await {
                Ok(_) => self.published.upkept = Some(view.revision),
                Err(error) => warn!("the history key could not be written: {error}"),
            }
        }
    }

    /// pg_rewind needs a checkpoint on the new timeline (ha-loop §11.3). It may take long, so it runs beside everything;
    /// one that fails is tried again, also by an agent that finds a primary in need of one.
    fn checkpoint_after_promotion(&mut self) {
        let PgStatus::Running(running) = &self.pg else { return };
        if !running.awaits_checkpoint() || self.checkpoint.as_ref().is_some_and(|running| !running.is_finished()) {
            return;
        }
        let postgres = self.parts.postgres.clone();
        self.checkpoint = Some(Task::spawn(&self.parts.clock, async move {
            if let Err(error) = postgres.checkpoint(Duration::from_secs(3600)).await {
                warn!("the checkpoint after the promotion failed: {error}");
            }
        }));
    }

    /// The names of logical slots that only the primary has.
    pub(super) async fn upkeep_slots(&mut self) -> BTreeSet<String> {
        let nothing = BTreeSet::new();
        let (Some(view), PgStatus::Running(running)) = (self.cluster(), &self.pg) else { return nothing };
        if !self.me.use_slots {
            // Slots are then the operator's own business.
            return nothing;
        }
        let primary = self.pg_is_primary();
        let leads = primary || self.lease.session().leading;
        let now = self.parts.clock.now();
        if self.slots_seen.is_empty() && view.status.retain_slots.is_none() {
            // Members whose keys went with an outage of the DCS are back by then.
            self.slots_spared = Some(now + view.settings.ttl);
        }
        let spares = self.slots_spared.is_some_and(|until| now < until);
        slots::note(&mut self.slots_seen, &view, &self.me, leads, now);
        let part = if leads { slots::Part::Leader } else { slots::Part::Replica };
        let reached = slots::Reached { timeline: running.timeline, replayed: running.replay_lsn };
        let wanted = slots::wanted(&view, &self.me, part, reached, &self.slots_seen, &self.memory.heard);
        let clashes = slots::clashes(&view, &wanted);
        for slot in clashes.difference(&self.slots_clashing) {
            // Patroni's words: operators look for them.
            warn!(
                "Permanent logical replication slot {slot} is conflicting with physical replication slot for cluster member; it is not made"
            );
        }
        self.slots_clashing = clashes;
        let mut plan = SlotPlan {
            wanted,
            known: None,
            ignored: view.settings.ignore_slots.clone(),
            may_drop: !view.settings.pause,
            spares,
            // Before it is promoted a new leader may yet be followed with what those slots hold back.
            may_clean: view.leader.as_ref().is_some_and(|leader| primary || leader.name != self.me.name),
            feedback: slots::needs_feedback(&view, &self.me),
        };
        let server = (running.postmaster_start_time.clone(), primary);
        // Everything is looked at once after a start and a change of role; later on, what somebody else has made stays.
        if let Some(kept) = &self.published.slots
            && kept.server == server
            && (kept.plan.may_drop || !plan.may_drop)
            && (spares || !kept.plan.spares)
        {
            let before = || kept.plan.wanted.keys().cloned();
            plan.known = match &kept.plan.known {
                _ if kept.settled => Some(before().collect()),
                None => None,
                Some(known) => Some(known.iter().cloned().chain(before()).collect()),
            };
            if kept.settled && kept.plan == plan {
                return nothing;
            }
        }
        let limit = self.sql_limit();
        let set = self.parts.clock.within(limit, self.parts.postgres.set_slots(plan.clone())).await;
        let set = set.unwrap_or(Err(PgError::Timeout { what: "changing slots".to_owned(), limit }));
        let settled = set.as_ref().is_ok_and(|done| !done.again);
        self.published.slots = Some(SlotsKept { server, plan, settled });
        match set {
            Ok(done) => done.missing,
            Err(error) => {
                debug!("the replication slots could not all be set: {error}");
                nothing
            }
        }
    }

    /// Logical slots that this standby lacks, from a primary that is certainly one.
    fn copy_slots(&mut self, missing: BTreeSet<String>) {
        let now = self.parts.clock.now();
        let lately = self.slots_copied.is_some_and(|at| now.since(at) < COPY_AGAIN);
        let (Some(view), Some(kept)) = (self.view.clone(), &self.published.slots) else { return };
        let certain = self.lease.session().trouble.is_none() && !view.settings.pause;
        let promoted = view.leader_member().is_some_and(Member::claims_primary);
        if missing.is_empty() || lately || !certain || !promoted || self.task.is_some() {
            return;
        }
        let Some(source) = leader_upstream(&self.me, &view) else { return };
        let wanted = kept.plan.wanted.iter().filter(|(name, _)| missing.contains(*name));
        let wanted = wanted.map(|(name, slot)| (name.clone(), slot.clone())).collect();
        self.slots_copied = Some(now);
        let hands = self.hands();
        let upstream = upstream(&self.me, &view);
        self.spawn(TaskKind::CopySlots, hands.copy_slots(wanted, source, upstream));
    }

    /// The cluster as this node has to see it: without DCS by the word of the leader to whom it has given its own.
    fn cluster(&self) -> Option<Arc<ClusterView>> {
        let view = self.view.clone()?;
        let now = self.parts.clock.now();
        let promise = self.memory.promise.as_ref().filter(|promise| now < promise.until && !self.pg_is_primary());
        Some(promise.and_then(|promise| by_promise(promise, &self.me.name, &view)).map_or(view, Arc::new))
    }

    pub(super) fn status(&self, view: &ClusterView) -> Option<Status> {
        let empty = BTreeMap::new();
        let kept = self.published.slots.as_ref().map_or(&empty, |kept| &kept.plan.wanted);
        publish::status(view, &self.me, &self.pg, kept, &self.slots_seen)
    }

    async fn upkeep_status(&mut self) {
        let Some(view) = self.view.clone() else { return };
        let Some(status) = self.status(&view) else { return };
        if self.published.status.as_ref() == Some(&status) && view.status == status {
            return;
        }
        match self.parts.store.put_status(&self.me.name, &codec::encode_status(&status)).await {
            Ok(Outcome::Done(_)) => self.published.status = Some(status),
            Ok(Outcome::Conflict) => debug!("status is not ours to write any more"),
            Err(error) => debug!("the status key could not be written: {error}"),
        }
    }

    /// The list of those whose word a leader without DCS needs: every member with an API. What is tried counts as long as
    /// it is not known whether it is in force. Emptied when the mode is turned off: who isn't on a list may not lead.
    async fn upkeep_failsafe(&mut self) {
        let session = self.lease.session();
        let (Some(view), Some(lease)) = (self.view.clone(), session.lease.filter(|_| session.leading)) else { return };
        let mut wanted = BTreeMap::new();
        if view.settings.failsafe_mode {
            let url = |member: &Member| member.api_url.clone();
            wanted.extend(view.members.iter().filter_map(|(name, member)| Some((name.clone(), url(member)?))));
            wanted.insert(self.me.name.clone(), self.urls.api.clone());
        }
        if view.failsafe.as_ref() == Some(&wanted) || (view.failsafe.is_none() && wanted.is_empty()) {
            return;
        }
        let (now, seen) = (self.parts.clock.now(), view.failsafe_revision);
        if session.failsafe.is_some_and(|until| now < until) {
            // Who is put on the key may lead, and has promised nothing yet; so may everybody once it is empty.
            return;
        }
        let earlier = self.memory.failsafe_attempt.take().filter(|attempt| attempt.seen == seen);
        if let Some(earlier) = earlier.as_ref().filter(|attempt| now.since(attempt.at) < SHOWN_WITHIN) {
            self.memory.failsafe_attempt = Some(earlier.clone());
            return;
        }
        let mut members = earlier.map(|attempt| attempt.members).unwrap_or_default();
        members.extend(wanted.clone());
        self.memory.failsafe_attempt = Some(FailsafeAttempt { seen, members, at: now });
        match self.parts.store.put_failsafe(&self.me.name, lease.id, &wanted, seen).await {
            Ok(Outcome::Done(_)) => info!("failsafe key: {}", names(&wanted)),
            Ok(Outcome::Conflict) => debug!("the failsafe key has changed meanwhile, or is not ours to write"),
            Err(error) => debug!("the failsafe key could not be written: {error}"),
        }
    }

    /// One step towards the wanted synchronous set; the next one follows at once.
    async fn upkeep_sync(&mut self) -> Next {
        let (Some(view), PgStatus::Running(running)) = (self.view.clone(), self.pg.clone()) else { return Next::Wait };
        if let Some(write) = self.unsettled(&view) {
            // Carried out late, that write would promise for somebody whom commits wait for no longer.
            return self.write_sync(write, "an earlier write of it may still be on its way".to_owned()).await;
        }
        let in_force = running.synchronous_standby_names.clone();
        let proof = (running.postmaster_start_time.clone(), in_force.clone());
        if decide::synchronous(&view) && !in_force.is_empty() && self.names_proven.as_ref() != Some(&proof) {
            // A session that shows the value proves nothing: commits wait once the checkpointer has taken it up, which
            // may be after a long checkpoint. Until then nobody may be promised to have every commit.
            self.memory.sync_since.clear();
            return if self.set_names(in_force, proof.0).await { Next::Again } else { Next::Wait };
        }
        self.memory.sync_since.retain(|name, _| sync::mentions(&in_force, name));
        for sender in running.replication.iter().filter(|sender| sync::mentions(&in_force, &sender.application_name)) {
            // The first sight of a name in force: from this position on every commit waits for it.
            self.memory.sync_since.entry(sender.application_name.clone()).or_insert(running.lsn);
        }
        let in_vain = sync::waits_in_vain(&view, &running, &self.me.name);
        if in_vain && !std::mem::replace(&mut self.waits_in_vain, in_vain) {
            // Patroni's words: operators have alarms for them.
            warn!(
                "No active replication connections from Patroni members and synchronous_mode_strict is requested. Commits will be delayed."
            );
        }
        self.waits_in_vain = in_vain;
        let configured = self.configured_names();
        match sync::step(&view, &running, &self.memory.sync_since, &self.me.name, &configured) {
            None => Next::Wait,
            Some(SyncStep::Key(write, why)) => self.write_sync(write, why).await,
            Some(SyncStep::Names(names, why)) => {
                info!("synchronous_standby_names = '{names}': {why}");
                if !sync::all_confirm(&running.synchronous_standby_names) {
                    // Until now others may have confirmed in their place: whoever is asked from here on has to catch up.
                    self.memory.sync_since.clear();
                }
                if self.set_names(names, running.postmaster_start_time).await { Next::Again } else { Next::Wait }
            }
        }
    }

    /// Sets `synchronous_standby_names`; true once the postmaster that was started at `postmaster` has them in force.
    async fn set_names(&mut self, names: String, postmaster: String) -> bool {
        let limit = self.sql_limit();
        let set = self.parts.postgres.set_synchronous_standby_names(names.clone());
        let set = self.parts.clock.within(limit, set).await;
        match set.unwrap_or(Err(PgError::Timeout { what: "taking up the new value".to_owned(), limit })) {
            Ok(()) => {
                self.names_proven = Some((postmaster, names));
                true
            }
            Err(error) => {
                warn!("synchronous_standby_names could not be set: {error}");
                self.names_proven = None;
                false
            }
        }
    }

    /// How long a leader's turn waits for its own server: renewals depend on the loop going on.
    fn sql_limit(&self) -> Duration {
        (self.settings().ttl / 4).clamp(Duration::from_millis(500), Duration::from_secs(2))
    }

    async fn write_sync(&mut self, write: SyncWrite, why: String) -> Next {
        match self.put_sync(write.clone()).await {
            Ok(Outcome::Done(revision)) => {
                info!("sync key updated: {why}");
                // The watch would show us nothing new, and a server that has to be started before it does must already wait
                // for whom the key names.
                let Some(view) = &self.view else { return Next::Wait };
                self.view = Some(Arc::new(act::with(view, &write, revision)));
                Next::Again
            }
            Ok(Outcome::Conflict) => {
                info!("the sync key has changed meanwhile; looking again");
                Next::Wait
            }
            Err(error) => {
                warn!("the sync key could not be written: {error}");
                Next::Wait
            }
        }
    }

    /// What is written settles what was asked before: the key has a newer revision then than any earlier write names. Without
    /// an answer, also because the turn is cut off meanwhile, or where the key is not what was seen any more, nothing is settled.
    pub(super) async fn put_sync(&mut self, write: SyncWrite) -> Result<Outcome, DcsError> {
        self.memory.sync_settled = false;
        let outcome = self.parts.store.put_sync(write).await;
        self.memory.sync_settled = matches!(outcome, Ok(Outcome::Done(_)));
        outcome
    }

    /// Writes the member key, if it would say something new.
    pub(super) async fn publish_member(&mut self) {
        let session = self.lease.session();
        let Some(lease) = session.lease.filter(|_| session.trouble.is_none()) else { return };
        let task = self.task.as_ref().map(|task| &task.kind);
        let mut member = publish::member(&self.me, &self.urls, &self.pg, task, &self.memory, self.view.as_deref());
        member.scheduled_restart = self.scheduled_restart.clone();
        let now = self.parts.clock.now();
        if let Some((published, with, at)) = &self.published.member
            && (published, *with) == (&member, lease.id)
        {
            // What is there counts, not what was sent: an older write whose answer never came may be carried out later.
            let value = codec::encode_member(&member);
            let there = self.view.as_ref().and_then(|view| view.members.get(&self.me.name));
            let shown = there.is_some_and(|there| there.lease == lease.id && codec::encode_member(there) == value);
            if shown || now.since(*at) < SHOWN_WITHIN {
                return;
            }
        }
        match self.parts.store.put_member(&self.me.name, &codec::encode_member(&member), lease.id).await {
            Ok(()) => self.published.member = Some((member, lease.id, now)),
            Err(error) => debug!("the member key could not be written: {error}"),
        }
    }

    pub(super) fn publish_board(&mut self) {
        let task = self.task.as_ref().map(|task| task.kind);
        let now = self.parts.clock.now();
        let knowledge = self.parts.knowledge.borrow();
        let session = self.lease.session();
        let by_word = session.trouble.is_some() || !session.leading;
        let promised = self.memory.promise.as_ref().is_some_and(|promise| now < promise.until);
        let failsafe_active = promised || (by_word && session.failsafe.is_some_and(|until| now < until));
        // Who hands over gives the key up before its server is down.
        let not_gone_until = match task {
            Some(TaskKind::HandOver) => None,
            _ if session.leader_until().is_some() => session.leader_until(),
            _ => self.parts.board.borrow().not_gone_until.filter(|_| self.situation(None).may_take_writes()),
        };
        let silent_for = knowledge.confirmed_at.map_or(0, |at| now.since(at).as_secs());
        let board = Board {
            state: publish::state_text(&self.pg, task.as_ref(), &self.memory, self.settings.pause).to_owned(),
            role: publish::role_text(&self.pg, &self.memory).to_owned(),
            postgres: self.pg.clone(),
            leader_until: session.leader_until(),
            not_gone_until,
            pause: self.view.as_ref().is_some_and(|view| view.settings.pause),
            task: task.map(|task| task.label().to_owned()),
            tags: trunkline_config::tags::published(&self.me.tags),
            scheduled_restart: self.scheduled_restart.clone(),
            reason: self.last.reason.clone(),
            decision: self.last.action.label(),
            next_run: self.wake_at(),
            dcs_last_seen: self.parts.clock.wall().timestamp() - i64::try_from(silent_for).unwrap_or(0),
            watchdog_failed: self.memory.must_not_lead.is_some(),
            transitions: self.transitions.clone(),
            decisions: self.decisions.clone(),
            failsafe_active,
            ground: Some(Arc::new(Ground {
                me: self.me.clone(),
                memory: self.memory.clone(),
                view: self.view.clone(),
                lease_until: session.lease.map(|lease| lease.until),
                ttl: self.ttl(),
                dcs_away: session.trouble.is_some(),
            })),
            guard: self.parts.guard.status(),
        };
        drop(knowledge);
        self.parts.board.send_replace(board);
    }
}

fn names(members: &BTreeMap<MemberName, String>) -> String {
    match members.is_empty() {
        true => "nobody".to_owned(),
        false => members.keys().map(MemberName::as_str).collect::<Vec<_>>().join(", "),
    }
}
