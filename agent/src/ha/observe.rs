//! What a turn looks at: the newest view, its settings, the server; and what is remembered of it.

use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};
use trunkline_common::cluster::{ConfigRecord, Initialize};
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::store::Outcome;
use trunkline_common::{Clock, ClusterView};
use trunkline_config::dynamic::Settings;
use trunkline_config::{PostgresConfig, tags};

use super::restored::{self, Restored};
use super::situation::{self, DivergenceState};
use super::task::TaskKind;
use super::{Ha, SHORT_LIFE, first_config, me, publish, settings_of, timing};
use crate::peer::Peers;
use crate::postgres::{PgRole, PgStatus, Postgres};

/// How long a primary that may have to give way takes to tell the DCS of its timeline.
const TOLD_WITHIN: Duration = Duration::from_millis(300);

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    /// The newest view, unless what we wrote ourselves is newer.
    pub(super) fn take_view(&mut self) {
        let knowledge = self.parts.knowledge.borrow_and_update().clone();
        let Some(view) = knowledge.view else { return };
        let restored = std::mem::replace(&mut self.restores, knowledge.restores) != knowledge.restores;
        if !restored && self.view.as_ref().is_some_and(|ours| ours.revision > view.revision) {
            return;
        }
        let leader = |view: &ClusterView| view.leader.as_ref().map(|leader| leader.created);
        if restored || self.view.as_ref().is_some_and(|ours| leader(ours) != leader(&view)) {
            // What failed under another leader may work under this one, and a verdict was about the other's history.
            self.memory.retry_at = None;
            self.slots_copied = None;
            if self.memory.failures == 0 && matches!(self.memory.divergence, DivergenceState::Rewind(_)) {
                self.memory.divergence = DivergenceState::Check;
            }
        }
        if let Some(leader) = &view.leader {
            self.memory.former_leader = Some(leader.name.clone());
        }
        let apis = view.members.iter().filter_map(|(name, member)| Some((name.clone(), member.api_url.clone()?)));
        self.memory.apis.extend(apis);
        if restored {
            self.restored = self.view.take().map(|before| Restored::new(before, &view)).or(self.restored.take());
        }
        let mut view = match &self.restored {
            Some(restored) => Arc::new(restored.complete(&view)),
            None => restored::as_told(view),
        };
        self.settle_settings(&mut view);
        if let Some(later) = self.memory.overtaken_by.filter(|later| view.claimed < *later) {
            Arc::make_mut(&mut view).claimed = later;
        }
        if restored {
            // A lease of before may be as long as the settings of before, or of now, say.
            let longest = self.settings.ttl.max(view.settings.ttl);
            self.memory.start_over(self.parts.clock.now() + longest);
            (self.config_kept, self.published.upkept, self.published.status) = (None, None, None);
        }
        self.view = Some(view);
    }

    /// What is not there, or not what it should be, stays as it was in force last, also where that was before this process: by the copy
    /// that is kept on disk.
    fn settle_settings(&self, view: &mut Arc<ClusterView>) {
        let kept = || first_config(&self.parts.local, self.cached_config.as_ref());
        let config = view.config.as_ref().filter(|_| !view.unknown.contains("config"));
        let Some(config) = config else {
            let config = kept();
            let view = Arc::make_mut(view);
            view.settings = settings_of(config.as_ref());
            view.config =
                view.config.take().map(|unknown| ConfigRecord { value: config.unwrap_or(unknown.value), ..unknown });
            return;
        };
        let same =
            |ours: &&Arc<ClusterView>| ours.config.as_ref().is_some_and(|before| before.revision == config.revision);
        let settings = match (self.view.as_ref().filter(same), &self.view) {
            (Some(ours), _) => ours.settings.clone(),
            (None, Some(before)) => Settings::after(&config.value, &before.settings).0,
            (None, None) => Settings::after(&config.value, &settings_of(kept().as_ref())).0,
        };
        if settings != view.settings {
            Arc::make_mut(view).settings = settings;
        }
    }

    /// A DCS that has gone back to an earlier state is told so at once by whoever notices first. If that fails, it goes with the next
    /// write of `sync`.
    pub(super) async fn tell_of_restore(&mut self) {
        let Some(view) = self.view.clone() else { return };
        let Some(record) = view.unsaid.clone() else { return };
        let told = self.parts.store.put_restored(&record, view.restored_revision);
        match self.parts.clock.within(TOLD_WITHIN, told).await {
            Some(Ok(Outcome::Done(revision))) => {
                let mut view = (*view).clone();
                view.revision = revision;
                view.has_said(record, revision);
                self.view = Some(Arc::new(view));
            }
            // Somebody else was faster, and the next view shows it.
            Some(Ok(Outcome::Conflict)) => {}
            Some(Err(error)) => warn!("the DCS could not be told that it went back to an earlier state: {error}"),
            None => warn!("the DCS could not be told within {TOLD_WITHIN:?} that it went back to an earlier state"),
        }
    }

    /// Of timelines that were begun since the backup, a DCS that was restored from it is told before anything else is done: a
    /// primary that gives way to the leader of the backup can't be asked any more once it is down.
    pub(super) async fn tell_forgotten_timelines(&mut self) {
        let (Some(restored), Some(view)) = (&mut self.restored, &self.view) else { return };
        let Some(before) = restored.untold() else { return };
        let told = self.parts.store.put_forgotten_timelines(&before, view);
        match self.parts.clock.within(TOLD_WITHIN, told).await {
            Some(Ok(outcome)) => {
                restored.told();
                if outcome.is_done() {
                    let timeline = before.timeline().max(Some(before.claimed)).unwrap_or_default();
                    info!("told the DCS of timeline {timeline}, which it has forgotten");
                }
            }
            Some(Err(error)) => warn!("the DCS could not be told of the timelines that it has forgotten: {error}"),
            None => warn!("the DCS could not be told of the timelines that it has forgotten within {TOLD_WITHIN:?}"),
        }
    }

    /// What an agent goes by where the DCS has lost its content, also one that is started then.
    pub(super) fn keep_config(&mut self) {
        let Some(view) = &self.view else { return };
        let Some(config) = view.config.clone().filter(|config| self.config_kept != Some(config.revision)) else {
            return;
        };
        if settings_of(Some(&config.value)) != view.settings {
            // Something in it is mistyped. The copy goes on saying what is in force instead.
            self.config_kept = Some(config.revision);
            return;
        }
        let there = !matches!(self.pg, PgStatus::NoData | PgStatus::Broken(_));
        if there {
            self.parts.postgres.cache_config(&config.value);
            self.config_kept = Some(config.revision);
        }
        self.cached_config = Some(config.value);
    }

    /// The leader's address is where writes are taken. An agent that has just started leaves it where it is until it knows
    /// whether the key that bears its name is its own.
    pub(super) fn tell_address(&mut self) {
        let takes_writes = self.pg_is_primary();
        if takes_writes && self.lease.session().leading {
            self.lease.serve(true);
        } else if !takes_writes || self.view.as_ref().is_some_and(|view| !view.is_leader(&self.me.name)) {
            self.lease.serve(false);
        }
    }

    /// The leader of a standby cluster is no replica, though PostgreSQL sees no difference.
    pub(super) fn tell_role(&mut self) {
        let PgStatus::Running(running) = &self.pg else { return };
        if running.role == PgRole::Primary {
            self.memory.standby_role = None;
            return;
        }
        let role = self.standby_role();
        if let Err(error) = self.parts.postgres.standby_role(role) {
            warn!("the settings of a {role} could not be written: {error}");
        }
        if self.memory.standby_role.replace(role).unwrap_or("replica") != role {
            self.parts.postgres.callback("on_role_change", role);
        }
    }

    /// What this node is while its server runs as a standby.
    pub(super) fn standby_role(&self) -> &'static str {
        // One that is about to be promoted, because this is an ordinary cluster again, is no replica in between.
        let outside = self.settings.standby_cluster.is_some() || self.memory.standby_role == Some("standby_leader");
        if outside && self.lease.session().leading { "standby_leader" } else { "replica" }
    }

    pub(super) async fn apply_settings(&mut self) {
        let Some(view) = self.view.clone() else { return };
        self.settings = match view.config {
            Some(_) => view.settings.clone(),
            None => settings_of(first_config(&self.parts.local, self.cached_config.as_ref()).as_ref()),
        };
        self.lease.set_timing(timing(&self.settings));
        let now = self.parts.clock.now();
        let failed_before = self.unapplied.take_if(|(again, _)| *again <= now);
        if self.unapplied.is_some() || self.applied.as_ref() == Some(&self.settings) {
            return;
        }
        let (mut config, notices) = PostgresConfig::effective(&self.parts.local, &self.settings);
        for key in ["restore_command", "archive_cleanup_command", "recovery_min_apply_delay"] {
            let outside = self.settings.standby_cluster.as_ref().and_then(|section| section.get(key));
            if let Some(value) = outside.filter(|value| tags::truthy(value)) {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                config.recovery_conf.insert(key.to_owned(), value);
            }
        }
        self.applied = Some(self.settings.clone());
        if self.configured.as_ref() == Some(&config) {
            return;
        }
        if failed_before.is_none() {
            notices.iter().for_each(|notice| warn!("{notice}"));
        }
        self.me = me(&self.parts.local, &config);
        match self.parts.postgres.configure(config.clone()).await {
            Ok(()) => self.configured = Some(config),
            Err(error) => {
                let words = error.to_string();
                if failed_before.is_none_or(|(_, told)| told != words) {
                    warn!("PostgreSQL's configuration could not be applied, which is tried again: {words}");
                }
                (self.applied, self.unapplied) = (None, Some((now + self.settings.loop_wait, words)));
            }
        }
    }

    pub(super) async fn observe(&mut self) {
        let deadline = self.settings().retry_timeout.clamp(Duration::from_millis(500), Duration::from_secs(3));
        let pg = self.parts.postgres.observe(deadline).await;
        let now = self.parts.clock.now();
        let dry = matches!(&pg, PgStatus::Running(running) if running.role == PgRole::Standby
            && running.replication_state.as_deref() != Some("streaming"));
        self.memory.dry_since = dry.then(|| self.memory.dry_since.unwrap_or(now));
        let promotion_is_over = match &pg {
            PgStatus::Running(running) => running.role == PgRole::Primary,
            PgStatus::Stopped(_) | PgStatus::NoData | PgStatus::Broken(_) => true,
            PgStatus::Starting | PgStatus::Stopping | PgStatus::Unresponsive | PgStatus::Refusing(_) => false,
        };
        if promotion_is_over {
            self.memory.promotions = 0;
        }
        if let PgStatus::Starting | PgStatus::Unresponsive | PgStatus::Refusing(_) = &pg {
            // Who has started it, and as what, this agent may not have seen.
            self.memory.was_primary |= !self.parts.postgres.is_set_to_follow();
        }
        match &pg {
            PgStatus::Running(running) => {
                self.memory.was_primary = running.role == PgRole::Primary;
                self.memory.demoted = false;
                self.memory.fresh_copy = false;
                self.memory.down_since = None;
            }
            PgStatus::NoData => (self.memory.down_since, self.memory.overtaken_by) = (None, None),
            // It serves its clients.
            PgStatus::Refusing(_) if self.memory.was_primary => self.memory.down_since = None,
            _ => {
                self.memory.down_since.get_or_insert(now);
            }
        }
        if let PgStatus::Stopped(control) = &pg
            && !matches!(self.pg, PgStatus::Stopped(_))
            && situation::stopped_as_primary(control)
        {
            // Whatever stopped it, it may have WAL that nobody else has.
            self.memory.was_primary = true;
            if self.memory.divergence == DivergenceState::NotAsked {
                self.memory.divergence = DivergenceState::Check;
            }
        }
        if self.memory.was_primary {
            self.memory.sync_before = None;
        }
        if matches!(pg, PgStatus::Stopped(_) | PgStatus::Broken(_))
            && !matches!(self.memory.divergence, DivergenceState::RewindFailed(_))
            && self.parts.postgres.half_rewound()
        {
            self.memory.divergence = DivergenceState::RewindFailed("it was cut off half-way".to_owned());
        }
        self.memory.half_made = self.parts.postgres.half_made();
        let recorded = self.view.as_ref().map(|view| view.initialize.clone());
        if self.memory.half_made && pg.system_id().is_some_and(|own| recorded == Some(Initialize::Done(own))) {
            match self.parts.postgres.end_bootstrap() {
                Ok(()) => self.memory.half_made = false,
                Err(error) => warn!("{error}"),
            }
        }
        let short_lived = self.memory.up_since.is_some_and(|up| now.since(up) < SHORT_LIFE);
        if matches!(pg, PgStatus::Stopped(_)) && short_lived && !self.memory.demoted && !self.settings.pause {
            self.memory.up_since = None;
            self.note_failure(TaskKind::Start, now, "PostgreSQL ended right after its start".to_owned());
        }
        let leaderless = self.view.as_ref().is_some_and(|view| view.leader.is_none());
        self.memory.leaderless_since = leaderless.then(|| self.memory.leaderless_since.unwrap_or(now));
        self.memory.position_since = match (&pg, self.memory.position_since) {
            (PgStatus::Running(running), Some((lsn, since))) if lsn == running.lsn => Some((lsn, since)),
            (PgStatus::Running(running), _) => Some((running.lsn, now)),
            _ => None,
        };
        let mine = self.view.as_ref().and_then(|view| view.leader.as_ref()).filter(|key| key.name == self.me.name);
        self.memory.key_held = mine.map(|key| match self.memory.key_held {
            Some((created, since)) if created == key.created => (created, since),
            _ => (key.created, now),
        });
        let request = self.view.as_ref().filter(|view| view.leader.is_none() && view.failover.is_some());
        self.memory.unfulfilled = match (request.map(|view| view.failover_revision), self.memory.unfulfilled) {
            (Some(revision), Some((same, since))) if revision == same => Some((revision, since)),
            (Some(revision), _) => Some((revision, now)),
            // While somebody leads who may fail to be promoted, the time goes on.
            (None, kept) => kept.filter(|_| self.view.as_ref().is_some_and(|view| view.failover.is_some())),
        };
        self.memory.silent = match pg {
            PgStatus::Unresponsive => self.memory.silent.saturating_add(1),
            _ => 0,
        };
        self.memory.disk_silent = match (&pg, self.memory.disk_silent) {
            (PgStatus::Running(running), before) if running.waits_for_disk => {
                before.filter(|(lsn, _)| *lsn == running.lsn).or(Some((running.lsn, now)))
            }
            _ => None,
        };
        if std::mem::discriminant(&pg) != std::mem::discriminant(&self.pg) {
            match &pg {
                PgStatus::Unresponsive => info!("PostgreSQL does not answer"),
                PgStatus::Refusing(why) => warn!("PostgreSQL answers with an error: {why}"),
                _ => info!("PostgreSQL is {}", publish::state_text(&pg, None, &self.memory, self.settings.pause)),
            }
        }
        self.pg = pg;
    }
}
