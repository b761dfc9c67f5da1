//! What operators ask for, through REST or a signal.

use std::future::Future;
use std::time::Duration;

use chrono::DateTime;
use serde_json::Value;
use tracing::{info, warn};
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::dcs::store::Outcome;
use trunkline_common::{Clock, Lsn, MemberName};

use super::decide::restart;
use super::situation::{Promise, clone_source, leader_upstream};
use super::task::{RestartPlan, TaskEnd, TaskKind};
use super::{Ha, me, sync};
use crate::node::{Command, Refusal, Reply, RestartFilter, Word};
use crate::peer::Peers;
use crate::postgres::{PgError, PgRole, PgStatus, Postgres, StartAs, StopMode};

/// The longest ttl that a leader without DCS is given a promise for.
const LONGEST_PROMISE: Duration = Duration::from_secs(3600);

/// How long keeping a promise may take: the leader that waits for it has no more time.
const KEPT_WITHIN: Duration = Duration::from_millis(300);

/// How soon whoever waits for the `sync` key reads it again.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Slots that such a leader may name.
const MOST_SLOTS: usize = 10_000;

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    pub(super) async fn command(&mut self, command: Command) {
        match command {
            Command::Wake => {}
            Command::Reload => self.reload().await,
            Command::Restart(filter, reply) => self.restart(filter, reply),
            Command::ScheduleRestart(schedule, reply) => {
                let _ = reply.send(self.schedule_restart(schedule));
            }
            Command::CancelRestart(reply) => {
                let _ = reply.send(self.scheduled_restart.take().is_some());
            }
            Command::Reinitialize { force, from_leader, reply } => {
                let _ = reply.send(self.reinitialize(force, from_leader).await);
            }
            Command::FailsafePoll { leader, body, reply } => {
                let word = match self.promise(&leader, &body).await {
                    Ok(()) => Word::Given,
                    Err((word, why)) => {
                        warn!("{leader} wants to lead without the DCS and gets no promise: {why}");
                        word
                    }
                };
                let _ = reply.send(word);
            }
        }
    }

    /// A leader without DCS asks for our word not to lead for its ttl (failsafe mode). The time counts from now, which is
    /// after the request was sent. A member that can take writes itself, or knows of another leader, gives none.
    async fn promise(&mut self, leader: &MemberName, body: &Value) -> Result<(), (Word, String)> {
        let now = self.parts.clock.now();
        let session = self.lease.session();
        let text = |field: &str| body.get(field).and_then(Value::as_str);
        if *leader == self.me.name || text("member").is_some_and(|meant| meant != self.me.name.as_str()) {
            return Err((Word::Refused, "it meant another member".to_owned()));
        }
        if session.key_until().is_some_and(|until| now < until) {
            return Err((Word::Leads, "this node leads".to_owned()));
        }
        if self.pg_is_primary() || session.deadline.is_some() {
            return Err((Word::Refused, "this node takes writes, or is about to".to_owned()));
        }
        let other = self.view.as_ref().and_then(|view| view.leader.as_ref()).map(|key| &key.name);
        if let Some(other) = other.filter(|other| session.trouble.is_none() && ![leader, &self.me.name].contains(other))
        {
            return Err((Word::Refused, format!("{other} leads")));
        }
        let asked = body.get("ttl").and_then(Value::as_u64).map_or(Duration::ZERO, Duration::from_secs);
        if asked > LONGEST_PROMISE {
            return Err((Word::Refused, format!("a ttl of {asked:?} is too long")));
        }
        let until = now + asked.max(self.settings().ttl);
        if self.memory.promise.as_ref().is_none_or(|old| old.until < now) {
            info!(
                "{leader} leads without the DCS (failsafe mode); this node has promised not to, until it hears no more"
            );
        }
        let until = self.memory.promise.as_ref().map_or(until, |old| old.until.max(until));
        let (conn_url, api_url) = (text("conn_url").map(str::to_owned), text("api_url").map(str::to_owned));
        let slots = body.get("slots").and_then(Value::as_object).into_iter().flatten();
        let slots = slots.filter_map(|(slot, lsn)| Some((slot.clone(), Lsn(lsn.as_u64()?)))).take(MOST_SLOTS).collect();
        self.memory.promise = Some(Promise { leader: leader.clone(), until, conn_url, api_url, slots });
        // An agent that takes this one's place has to know. A disk that does not take it is no reason to end a leader.
        match self.parts.clock.within(KEPT_WITHIN, self.parts.postgres.keep_promise(until)).await {
            Some(Ok(())) => {}
            Some(Err(error)) => warn!("the promise would not outlive this agent: {error}"),
            None => warn!("the promise may not outlive this agent: it was not on disk within {KEPT_WITHIN:?}"),
        }
        Ok(())
    }

    async fn reload(&mut self) {
        match (self.parts.reload)(&self.parts.local) {
            Ok(local) => {
                info!("reloaded the configuration");
                // Applied by the next turn.
                self.parts.local = local;
                (self.applied, self.configured, self.unapplied) = (None, None, None);
                // Whoever asks after the reload sees the tags of the file, also while the rest is being applied.
                self.me = me(&self.parts.local, &self.parts.postgres.config());
                self.publish_board();
            }
            Err(problems) => warn!("the configuration file has errors, the old one stays in force:\n{problems}"),
        }
    }

    fn restart(&mut self, filter: RestartFilter, reply: tokio::sync::oneshot::Sender<Reply>) {
        let busy = self.task.as_ref().map(|task| task.kind).or(self.preparation.under_way());
        let come_back = match busy {
            Some(kind) => Err(format!("{} already in progress", kind.label())),
            None => restart::decide(&self.situation(None), &filter).map_err(str::to_owned),
        };
        let come_back = match come_back {
            Ok(come_back) => come_back,
            Err(why) => {
                let _ = reply.send(Err(refusal(503, why)));
                return;
            }
        };
        let (let_go, hands) = (self.let_go(), self.hands());
        let (settings, ordinary) = (self.settings(), hands.pg_ctl_timeout());
        let answers = matches!(self.pg, PgStatus::Running(_));
        let plan = RestartPlan {
            names: self.names_at_start(&StartAs::Primary),
            come_back,
            standby_role: self.standby_role(),
            answers,
            // Nobody can take over meanwhile from one that may hang.
            stop_limit: if answers { settings.stop_limit() } else { settings.stop_limit().min(ordinary) },
            start_limit: match filter.timeout.map_or(settings.primary_start_timeout, Duration::from_secs) {
                Duration::ZERO => ordinary,
                limit => limit,
            },
        };
        self.spawn(TaskKind::Restart, async move {
            let_go.await;
            let done = hands.restart(plan).await;
            let answer = match &done {
                Ok(()) => Ok("restarted successfully".to_owned()),
                Err(error @ PgError::Timeout { .. }) => Err(refusal(503, format!("{error}; it goes on"))),
                Err(error) => Err(refusal(503, format!("restart failed: {error}"))),
            };
            let _ = reply.send(answer);
            done.map_or_else(TaskEnd::from, |()| TaskEnd::Done)
        });
    }

    /// Before a standby's server is stopped: returns once no commit waits for it. The leader takes it off the `sync` key as
    /// soon as its member key, which is to be published, does not say `running` any more. It waits as long as Patroni does at
    /// most, and no longer than a lease.
    pub(super) fn let_go(&self) -> impl Future<Output = ()> + Send + 'static {
        let (clock, me) = (self.parts.clock.clone(), self.me.name.clone());
        let mut knowledge = self.parts.knowledge.clone();
        let session = self.lease.session();
        let published = session.lease.is_some() && session.trouble.is_none();
        let running = matches!(&self.pg, PgStatus::Running(running) if running.role == PgRole::Standby);
        let limit = (self.settings().loop_wait * 2).min(self.settings().ttl);
        async move {
            let counts = |known: &Knowledge| known.view.as_ref().is_some_and(|view| sync::counts_on(view, &me));
            if !published || !running || !counts(&knowledge.borrow()) {
                return;
            }
            info!("waiting until commits do not wait for this standby any more");
            let released = async { _ = knowledge.wait_for(|known| !counts(known)).await };
            if clock.within(limit, released).await.is_none() {
                info!("the leader has not replaced this standby as a synchronous one within {limit:?}");
            }
        }
    }

    /// Replaces the data directory by a copy, once nothing is promised any more of what it had; `stop_first`: of what it has, a
    /// server may be running on it.
    pub(super) fn spawn_copy(
        &mut self,
        kind: TaskKind,
        stop_first: bool,
        copy: impl Future<Output = TaskEnd> + Send + 'static,
    ) {
        let (left_out, forgone, postgres) = (self.left_out(), self.forgo_place(), self.parts.postgres.clone());
        self.spawn(kind, async move {
            let failed = |why| TaskEnd::Failed { why, damaged: false };
            if let Err(why) = left_out.await {
                return failed(why);
            }
            if stop_first && let Err(error) = postgres.stop(StopMode::Immediate, Duration::from_secs(20), None).await {
                return error.into();
            }
            match forgone.await {
                Ok(()) => copy.await,
                Err(why) => failed(why),
            }
        });
    }

    /// The `sync` key says of names, not of data directories, who has every commit. Returns once it does not say so of this node,
    /// which its leader sees to as soon as the member key, which is to be published, says what is about to happen. An error says
    /// why that is not certain.
    fn left_out(&self) -> impl Future<Output = Result<(), String>> + Send + 'static {
        let (clock, me) = (self.parts.clock.clone(), self.me.name.clone());
        let mut knowledge = self.parts.knowledge.clone();
        let (session, limit) = (self.lease.session(), self.forgone_within());
        async move {
            let promised = |known: &Knowledge| known.view.as_ref().is_none_or(|view| sync::promises(view, &me));
            if !promised(&knowledge.borrow()) {
                return Ok(());
            }
            if session.lease.is_none() || session.trouble.is_some() {
                return Err("the sync key says that this node has every commit, and the DCS does not answer".to_owned());
            }
            info!("waiting until the sync key does not say any more that this node has every commit");
            let left_out = async { _ = knowledge.wait_for(|known| !promised(known)).await };
            clock.within(limit, left_out).await.ok_or_else(|| kept_on_the_key(limit))
        }
    }

    /// The same once the server is down, for as long as it has no data: what was seen before may have been old, and the leader about
    /// to list a standby that still streamed. Returns once the `sync` key, which does not list this node, has been written anew
    /// after the member key had said what becomes of it: a write that is on its way comes to nothing, and one that names the new
    /// revision comes from a leader that has seen the member key.
    fn forgo_place(&self) -> impl Future<Output = Result<(), String>> + Send + 'static {
        let (clock, me, store) = (self.parts.clock.clone(), self.me.name.clone(), self.parts.store.clone());
        let (mut knowledge, restored) = (self.parts.knowledge.clone(), self.restored.clone());
        let limit = self.forgone_within();
        async move {
            let forgone = async {
                loop {
                    knowledge.mark_unchanged();
                    let view = match store.read().await {
                        Ok(view) => view,
                        Err(error) => return Err(format!("the sync key can't be read: {error}")),
                    };
                    let written_anew = restored.as_ref().is_none_or(|restored| !restored.is_old(&view));
                    if written_anew && sync::is_forgone(&view, &me) {
                        let Some(again) = sync::again(&view) else { return Ok(()) };
                        match store.put_sync(again).await {
                            Ok(Outcome::Done(_)) => return Ok(()),
                            Ok(Outcome::Conflict) => continue,
                            Err(error) => return Err(format!("the sync key can't be written: {error}")),
                        }
                    }
                    let changed = async {
                        if knowledge.changed().await.is_err() {
                            std::future::pending().await
                        }
                    };
                    // Also without a word of it: the watch may be deaf.
                    _ = clock.within(LOOK_AGAIN, changed).await;
                }
            };
            clock.within(limit, forgone).await.unwrap_or_else(|| Err(kept_on_the_key(limit)))
        }
    }

    fn forgone_within(&self) -> Duration {
        (self.settings().loop_wait * 2).min(self.settings().ttl)
    }

    fn schedule_restart(&mut self, schedule: Value) -> Reply {
        if self.scheduled_restart.is_some() {
            return Err(refusal(409, "Another restart is already scheduled"));
        }
        self.scheduled_restart = Some(schedule);
        Ok("Restart scheduled".to_owned())
    }

    /// Starts the planned restart when its time has come (ha-loop §12); a stale one is dropped.
    pub(super) fn start_scheduled_restart(&mut self) {
        let Some(schedule) = self.scheduled_restart.clone() else { return };
        if let Some(at) = restarted_meanwhile(&schedule, &self.pg) {
            info!("the scheduled restart is dropped: PostgreSQL was restarted at {at}");
            self.scheduled_restart = None;
            return;
        }
        if self.task.is_some() || self.preparation.under_way().is_some() || self.settings().pause {
            return;
        }
        let Some(at) =
            schedule.get("schedule").and_then(Value::as_str).and_then(|at| DateTime::parse_from_rfc3339(at).ok())
        else {
            warn!("the scheduled restart has no readable time and is dropped: {schedule}");
            self.scheduled_restart = None;
            return;
        };
        let Ok(late) = (self.parts.clock.wall() - at.to_utc()).to_std() else { return };
        self.scheduled_restart = None;
        if late > self.settings().loop_wait.mul_f32(1.5).max(Duration::from_secs(5)) {
            warn!("the restart scheduled at {at} is {late:.0?} too old and is dropped");
            return;
        }
        let text = |key: &str| schedule.get(key).and_then(Value::as_str).map(str::to_owned);
        let filter = RestartFilter {
            role: text("role"),
            older_than: text("postgres_version").and_then(|version| server_version_num(&version)),
            pending: schedule.get("restart_pending").is_some(),
            timeout: schedule.get("timeout").and_then(Value::as_u64),
        };
        info!("starting the scheduled restart");
        let (reply, _) = tokio::sync::oneshot::channel();
        self.restart(filter, reply);
    }

    async fn reinitialize(&mut self, force: bool, from_leader: bool) -> Reply {
        let Some(view) = self.view.clone() else { return Err(refusal(503, "the DCS has not been read yet")) };
        if view.leader.is_none() {
            return Err(refusal(503, "Cluster has no leader, can not reinitialize"));
        }
        if view.is_leader(&self.me.name) {
            return Err(refusal(503, "I am the leader, can not reinitialize"));
        }
        if let Some(task) = self.task.as_ref().filter(|_| !force) {
            return Err(refusal(503, format!("{} already in progress", task.kind.label())));
        }
        let source = if from_leader { leader_upstream(&self.me, &view) } else { clone_source(&self.me, &view) };
        let Some(source) = source else {
            return Err(refusal(503, "the leader's address is not known"));
        };
        self.abort_task().await;
        info!("making this replica anew from {}", source.name);
        let hands = self.hands();
        self.spawn_copy(TaskKind::Reinitialize, true, hands.reinitialize(source, from_leader));
        Ok("reinitialize started".to_owned())
    }
}

fn kept_on_the_key(limit: Duration) -> String {
    format!("the leader has not taken this node off the sync key within {limit:?}: it would lead without commits")
}

/// When the server was started, if it is not the one any more whose restart was planned.
fn restarted_meanwhile<'a>(schedule: &Value, pg: &'a PgStatus) -> Option<&'a str> {
    let PgStatus::Running(running) = pg else { return None };
    let planned = schedule.get("postmaster_start_time").and_then(Value::as_str)?;
    (planned != running.postmaster_start_time).then_some(&running.postmaster_start_time)
}

fn refusal(status: u16, text: impl Into<String>) -> Refusal {
    Refusal { status, text: text.into() }
}

/// `15.4` → 150004, `9.6.3` → 90603, as in `server_version_num`.
pub fn server_version_num(text: &str) -> Option<u32> {
    let parts: Vec<u32> = text.split('.').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    match parts[..] {
        [major, minor] if major >= 10 => Some(major * 10_000 + minor),
        [major, minor, patch] if major < 10 => Some(major * 10_000 + minor * 100 + patch),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::server_version_num;

    #[test]
    fn versions_as_postgresql_counts_them() {
        assert_eq!(server_version_num("15.4"), Some(150_004));
        assert_eq!(server_version_num("9.6.3"), Some(90_603));
        for bad in ["15", "9.6", "15.4.1", "x.y", ""] {
            assert_eq!(server_version_num(bad), None, "{bad:?}");
        }
    }
}
