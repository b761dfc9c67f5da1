//! Long work: what takes longer than a query runs beside the loop, one task at a time, and reports back when it ends.
//!
//! While a task runs the loop goes on listening and the keeper goes on renewing; nothing else is decided.

mod bootstrap;
mod leave;

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::dcs::store::{ClusterStore, Outcome, SyncWrite};
use trunkline_common::{Clock, MemberName, Revision, TimelineId};

pub use self::bootstrap::BootstrapPlan;
pub use self::leave::HandOverPlan;
use super::decide::restart::ComeBack;
use super::lease::LeaseHandle;
use crate::peer::Peers;
use crate::postgres::{Divergence, PgError, PgStatus, Postgres, StartAs, StopMode, Upstream, WantedSlot};

/// What is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// initdb and first start of a new cluster.
    Bootstrap,
    /// The same by a method of the user's own.
    CustomBootstrap,
    /// Copying a data directory.
    Clone,
    /// The same because an operator asked for it.
    Reinitialize,
    /// Starting the server.
    Start,
    /// Stopping and starting it because an operator asked for it.
    Restart,
    /// Promotion.
    Promote,
    /// Stepping down in order.
    HandOver,
    /// Stepping down at once.
    Demote,
    /// A primary becomes the leader of a standby cluster.
    DemoteCluster,
    /// Comparing histories.
    CheckDivergence,
    /// pg_rewind.
    Rewind,
    /// Copying logical slots from the primary, for which a standby is restarted.
    CopySlots,
    /// Moving half a cluster aside.
    Discard,
    /// Stopping the server because the agent ends.
    Stop,
}

impl TaskKind {
    /// What status documents and refusals call it.
    pub fn label(self) -> &'static str {
        match self {
            TaskKind::Bootstrap | TaskKind::CustomBootstrap => "bootstrap",
            TaskKind::Clone => "creating replica",
            TaskKind::Reinitialize => "reinitialize",
            TaskKind::Start => "starting",
            TaskKind::Restart => "restart",
            TaskKind::Promote => "promote",
            TaskKind::HandOver => "switchover",
            TaskKind::Demote => "demote",
            TaskKind::DemoteCluster => "demote cluster",
            TaskKind::CheckDivergence => "comparing histories",
            TaskKind::Rewind => "pg_rewind",
            TaskKind::CopySlots => "copying logical slots",
            TaskKind::Discard => "moving half a cluster aside",
            TaskKind::Stop => "stopping",
        }
    }
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskEnd {
    /// As wished.
    Done,
    /// The standby takes writes, on this timeline.
    Promoted(TimelineId),
    /// There is no promotion, for this reason; nothing of it was begun.
    Refused(String),
    /// The histories have been compared.
    Compared(Divergence),
    /// It failed; the words say why. `damaged`: the data directory may be unusable.
    Failed {
        /// Why.
        why: String,
        /// The data directory may be unusable now.
        damaged: bool,
    },
}

impl From<PgError> for TaskEnd {
    fn from(error: PgError) -> Self {
        TaskEnd::Failed { why: error.to_string(), damaged: false }
    }
}

/// Whom commits wait for from the start of a server on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StandbyNames {
    /// `synchronous_standby_names`.
    pub text: String,
    /// To be written before: the `sync` key that this follows from (see [`super::sync::settle`]).
    pub settle: Option<SyncWrite>,
}

/// What tasks need of the node.
#[derive(Debug, Clone)]
pub struct Hands<D, P, C, R> {
    /// The cluster's keys.
    pub store: ClusterStore<D>,
    /// The server.
    pub postgres: P,
    /// Time.
    pub clock: C,
    /// The other members.
    pub peers: R,
    /// The lease.
    pub lease: LeaseHandle,
    /// This member.
    pub name: MemberName,
    /// What the DCS shows meanwhile.
    pub knowledge: watch::Receiver<Knowledge>,
    /// The revision at which the DCS showed the leader key as ours; `None` where it did not, and in a pause.
    pub leads_since: Option<Revision>,
}

/// Longest time a primary's start is waited for, and a promotion that does not get any further. Recovery may take longer;
/// the loop then sees a starting server and decides what `primary_start_timeout` means for it.
pub const START_LIMIT: Duration = Duration::from_secs(60);

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Hands<D, P, C, R> {
    /// How long the start of a standby is waited for, and a stop of which nobody has said how long it may take.
    pub fn pg_ctl_timeout(&self) -> Duration {
        self.postgres.config().pg_ctl_timeout.max(Duration::from_secs(1))
    }

    /// Copies without a running server to copy from; the next turn starts the copy.
    pub async fn restore_replica(self) -> TaskEnd {
        match self.postgres.clone_without_source().await {
            Ok(()) => TaskEnd::Done,
            Err(error) => TaskEnd::Failed { why: error.to_string(), damaged: true },
        }
    }

    /// Copies from `source`; the next turn starts the copy.
    pub async fn clone_from(self, source: Upstream) -> TaskEnd {
        let name = source.name.clone();
        copied(&name, self.postgres.clone_from(source).await)
    }

    /// Makes this replica anew. `afresh`: from the running server itself, not from a backup of it.
    pub async fn reinitialize(self, source: Upstream, afresh: bool) -> TaskEnd {
        if !afresh {
            return self.clone_from(source).await;
        }
        let name = source.name.clone();
        copied(&name, self.postgres.base_backup(source).await)
    }

    /// Starts the server, with `names` from the first moment on: whoever may have been promised to have every commit must
    /// be waited for, and a standby must not bring somebody else's list along. `told`: what `on_start` says that it is.
    pub async fn start(
        self,
        role: StartAs,
        names: StandbyNames,
        limit: Duration,
        told: Option<&'static str>,
    ) -> TaskEnd {
        if let Err(error) = self.set_names(names).await {
            return error.into();
        }
        match self.start_server(role, limit).await {
            Ok(()) => {
                if let Some(told) = told {
                    self.postgres.callback("on_start", told);
                }
                TaskEnd::Done
            }
            Err(error) => error.into(),
        }
    }

    /// Stops in order, or at once where that takes too long, and starts again as what it was.
    pub async fn restart(self, plan: RestartPlan) -> Result<(), PgError> {
        // Nothing else is decided meanwhile, not even a failover to this node.
        let limit_of_checkpoint = Duration::from_secs(300);
        if plan.answers
            && let Err(error) = self.postgres.checkpoint(limit_of_checkpoint).await
        {
            info!("restarting without a checkpoint first: {error}");
        }
        let mut event = "on_restart";
        if let Err(error) = self.postgres.stop(StopMode::Restart, plan.stop_limit, None).await {
            warn!("the fast stop was not done in time, stopping at once: {error}");
            self.postgres.stop(StopMode::Immediate, Duration::from_secs(20), None).await?;
            // Such a stop has been told.
            event = "on_start";
        }
        let left = match self.postgres.observe(Duration::from_secs(5)).await {
            PgStatus::Stopped(left) => left,
            _ => return Err(PgError::Failed("PostgreSQL was stopped, but is not down".to_owned())),
        };
        let role = plan.come_back.role(&left);
        let primary = role == StartAs::Primary;
        self.set_names(if primary { plan.names } else { StandbyNames::default() }).await?;
        self.start_server(role, plan.start_limit).await?;
        self.postgres.callback(event, if primary { "primary" } else { plan.standby_role });
        Ok(())
    }

    async fn set_names(&self, names: StandbyNames) -> Result<(), PgError> {
        if let Some(write) = names.settle {
            match self.store.put_sync(write).await {
                Ok(Outcome::Done(_)) => {}
                Ok(Outcome::Conflict) => return Err(PgError::Failed("the sync key has changed meanwhile".to_owned())),
                Err(error) => return Err(PgError::Failed(format!("the sync key could not be settled: {error}"))),
            }
        }
        self.postgres.set_synchronous_standby_names(names.text).await
    }

    /// Starts the server; one that takes writes only while it may.
    async fn start_server(&self, role: StartAs, limit: Duration) -> Result<(), PgError> {
        match role {
            StartAs::Primary => self.while_it_may(self.postgres.start(role, limit)).await,
            StartAs::Standby(_) => self.postgres.start(role, limit).await,
        }
    }

    /// Work that brings up a server that takes writes. The right to that can be lost at any time: a fence finds nothing to
    /// kill where there is no postmaster yet, and nobody else looks while a task runs.
    async fn while_it_may(&self, work: impl Future<Output = Result<(), PgError>>) -> Result<(), PgError> {
        if self.lease.may_write(self.clock.now()) {
            let done = tokio::select! {
                biased;
                () = self.lease.must_not_write(&self.clock) => None,
                () = self.key_gone() => None,
                done = work => Some(done),
            };
            if let Some(done) = done
                && self.lease.may_write(self.clock.now())
                && !self.leads_no_more(&self.knowledge.borrow())
            {
                return done;
            }
            self.postgres.stop(StopMode::Immediate, Duration::from_secs(5), None).await?;
        }
        Err(PgError::Failed("this node has lost its right to take writes".to_owned()))
    }

    /// Returns once the DCS shows that our leader key is gone: the keeper learns it with its next renewal, and the loop, which would look
    /// into it, decides nothing while a task runs.
    async fn key_gone(&self) {
        let gone = self.knowledge.clone().wait_for(|known| self.leads_no_more(known)).await.is_ok();
        if !gone {
            std::future::pending().await
        }
    }

    /// The key is gone, and whoever could take it has not given its word either: a DCS may come back from an outage without it.
    fn leads_no_more(&self, known: &Knowledge) -> bool {
        self.shows_no_key(known) && self.lease.session().failsafe.is_none_or(|until| until <= self.clock.now())
    }

    fn shows_no_key(&self, known: &Knowledge) -> bool {
        let shown = self.leads_since.zip(known.view.as_ref());
        shown.is_some_and(|(since, view)| view.revision > since && !view.is_leader(&self.name))
    }

    /// Promotes, the key being ours. Lease and key are looked at again right before the point of no return: time may have
    /// passed since it was decided.
    pub async fn promote(self, names: String, current_names: String, left_out: Vec<TimelineId>) -> TaskEnd {
        if let Err(why) = self.may_promote(names, current_names).await {
            return TaskEnd::Refused(why);
        }
        match self.postgres.promote(START_LIMIT, left_out).await {
            Ok(timeline) => {
                self.postgres.callback("on_role_change", "primary");
                TaskEnd::Promoted(timeline)
            }
            Err(error @ PgError::Refused(_)) => TaskEnd::Refused(error.to_string()),
            Err(error) => error.into(),
        }
    }

    /// What has to be done and seen before anything of a promotion is begun; the words say why there will be none.
    async fn may_promote(&self, names: String, current_names: String) -> Result<(), String> {
        tokio::select! {
            biased;
            () = self.lease.must_not_write(&self.clock) => {
                return Err("the leader key was lost while pre_promote ran".to_owned());
            }
            allowed = self.postgres.pre_promote(START_LIMIT) => allowed.map_err(|error| error.to_string())?,
        }
        // Names that a session shows are not yet names that commits wait by: an agent before may have set them just now.
        if !(names.is_empty() && current_names.is_empty()) {
            self.postgres.set_synchronous_standby_names(names).await.map_err(|error| error.to_string())?;
        }
        let until = self.lease.session().leader_until();
        if until.is_none_or(|until| until <= self.clock.now()) || self.shows_no_key(&self.knowledge.borrow()) {
            return Err("the leader key was lost before the promotion".to_owned());
        }
        Ok(())
    }

    /// Copies the server outside that a standby cluster follows; the next turn starts the copy.
    pub async fn clone_remote(self, source: Option<Upstream>, methods: Vec<String>) -> TaskEnd {
        match self.postgres.clone_remote(source, methods).await {
            Ok(()) => TaskEnd::Done,
            Err(error) => TaskEnd::Failed { why: error.to_string(), damaged: true },
        }
    }

    /// Copies logical slots of `source`; the standby, which is restarted for it, goes on following `upstream`.
    pub async fn copy_slots(
        self,
        wanted: BTreeMap<String, WantedSlot>,
        source: Upstream,
        upstream: Option<Upstream>,
    ) -> TaskEnd {
        match self.postgres.copy_slots(wanted, source).await {
            Ok(copied) if copied.is_empty() => TaskEnd::Done,
            Ok(copied) => {
                info!("logical slots copied from the primary: {}", copied.join(", "));
                let limit = self.pg_ctl_timeout();
                self.start(StartAs::Standby(upstream), StandbyNames::default(), limit, None).await
            }
            Err(error) => error.into(),
        }
    }

    /// Compares histories.
    pub async fn compare(self, upstream: Upstream) -> TaskEnd {
        TaskEnd::Compared(self.postgres.diverged(upstream).await)
    }

    /// Stops if need be and rewinds. The next turn starts the server.
    pub async fn rewind(self, upstream: Upstream) -> TaskEnd {
        if let Err(error) = self.postgres.stop(StopMode::Fast, self.pg_ctl_timeout(), None).await {
            return error.into();
        }
        match self.postgres.rewind(upstream.clone()).await {
            // It goes by the numbers of timelines, and finds nothing to do where two nodes have begun the same one.
            Ok(()) => match self.postgres.diverged(upstream).await {
                Divergence::Twice(why) => TaskEnd::Compared(Divergence::Twice(why)),
                Divergence::None | Divergence::Rewind(_) | Divergence::Unknown(_) => TaskEnd::Done,
            },
            Err(error) => {
                // A source that is not there (any more) says nothing about the data directory: tried again later.
                let unreachable = matches!(self.postgres.diverged(upstream).await, Divergence::Unknown(_));
                TaskEnd::Failed { why: error.to_string(), damaged: !unreachable || self.postgres.half_rewound() }
            }
        }
    }
}

/// The end of a copy.
fn copied(source: &MemberName, result: Result<(), PgError>) -> TaskEnd {
    match result {
        Ok(()) => {
            info!("bootstrapped from '{source}'");
            TaskEnd::Done
        }
        Err(error) => TaskEnd::Failed { why: error.to_string(), damaged: true },
    }
}

/// What a restart needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct RestartPlan {
    /// As what the server comes back.
    pub come_back: ComeBack,
    /// Whom commits wait for, if it takes writes then.
    pub names: StandbyNames,
    /// What callbacks are told that it is otherwise.
    pub standby_role: &'static str,
    /// It answers queries.
    pub answers: bool,
    /// How long the stop in order may take.
    pub stop_limit: Duration,
    /// How long the start may take.
    pub start_limit: Duration,
}
