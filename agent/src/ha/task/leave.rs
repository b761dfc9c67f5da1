//! Ways to stop being the leader: with a hand-over, in order, or at once.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;
use tracing::{info, warn};
use trunkline_common::cluster::Status;
use trunkline_common::dcs::store::{Outcome, SyncWrite};
use trunkline_common::dcs::{Dcs, codec};
use trunkline_common::{Clock, ClusterView, Instant, LeaseId, Lsn, MemberName};

use super::{Hands, TaskEnd};
use crate::peer::{PeerStatus, Peers};
use crate::postgres::{Postgres, StopMode};

/// What a hand-over needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct HandOverPlan {
    /// Who may take over (name → `api_url`).
    pub candidates: BTreeMap<MemberName, String>,
    /// The view that it was decided on.
    pub view: std::sync::Arc<ClusterView>,
    /// How long transactions in flight may take to end before the stop.
    pub grace: Duration,
    /// How long the fast stop may take.
    pub stop_limit: Duration,
    /// How long to wait for a candidate to have the shutdown checkpoint.
    pub candidate_limit: Duration,
}

/// How long one that has everything is kept waiting for another one that is preferred (`failover_priority`).
const BETTER_CANDIDATE: Duration = Duration::from_millis(250);

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Hands<D, P, C, R> {
    /// After a checkpoint ([`crate::ha::prepare`]): let transactions end; stop; as soon as a candidate has the shutdown checkpoint, the key is
    /// free.
    pub async fn hand_over(self, plan: HandOverPlan) -> TaskEnd {
        if !plan.grace.is_zero() {
            self.postgres.end_of_transactions(plan.grace).await;
        }
        let (sender, shut_down) = oneshot::channel();
        let stop = self.postgres.stop(StopMode::Fast, plan.stop_limit, Some(sender));
        let release = async {
            // The sender is dropped without a word when the stop was not clean.
            let Ok(position) = shut_down.await else { return };
            self.await_candidate(&plan, position).await;
            self.give_up_key(Some(position), &plan.view).await;
        };
        let (stopped, ()) = tokio::join!(stop, release);
        if let Err(error) = stopped {
            warn!("the fast stop was not done in time, stopping at once: {error}");
            if let Err(error) = self.postgres.stop(StopMode::Immediate, Duration::from_secs(20), None).await {
                return error.into();
            }
        }
        if self.lease.session().leading {
            self.give_up_key(None, &plan.view).await;
        }
        self.postgres.callback("on_role_change", "replica");
        TaskEnd::Done
    }

    /// Waits until a candidate has received the shutdown checkpoint, whose record begins at `position`: then it can be
    /// promoted without leaving this node with WAL of its own. Bounded: a switchover to a slow standby goes on without.
    async fn await_candidate(&self, plan: &HandOverPlan, position: Lsn) {
        if plan.candidates.is_empty() {
            return;
        }
        let give_up = self.clock.now() + plan.candidate_limit;
        let mut first = None;
        while self.clock.now() < give_up {
            let statuses = self.peers.status(plan.candidates.clone(), Duration::from_millis(500)).await;
            if let Some((name, best)) = caught_up(&statuses, position) {
                let since = *first.get_or_insert_with(|| self.clock.now());
                if best || self.clock.now().since(since) >= BETTER_CANDIDATE {
                    info!("{name} has the shutdown checkpoint at {position}");
                    return;
                }
            }
            // The standby has been sent the record before the postmaster can exit; it needs a moment to write it. Where
            // nobody answers there is nothing to be quick for.
            let answered = statuses.values().any(Option::is_some);
            self.clock.sleep(Duration::from_millis(if answered { 2 } else { 50 })).await;
        }
        warn!("no candidate has the shutdown checkpoint at {position} within {:?}", plan.candidate_limit);
    }

    async fn give_up_key(&self, position: Option<Lsn>, view: &ClusterView) {
        let lease = self.lease.session().lease;
        self.lease.resign();
        let status = position.map(|optime| codec::encode_status(&Status { optime, ..view.status.clone() }));
        match lease {
            Some(lease) => self.release(lease.id, status, None).await,
            None => info!("the lease of the leader key was lost already"),
        }
    }

    /// Deletes the leader key, ours under `lease`; `sync` is what that key says from then on.
    pub async fn release(&self, lease: LeaseId, status: Option<Value>, sync: Option<SyncWrite>) {
        let said = if sync.is_some() { ", and the sync key says again what it said before" } else { "" };
        match self.store.release_leader(&self.name, lease, status, sync).await {
            Ok(Outcome::Done(_)) => info!("released the leader key{said}"),
            Ok(Outcome::Conflict) => info!("the leader key was not ours any more"),
            Err(error) => {
                warn!("the leader key could not be released, it ends with its lease: {error}");
                self.lease.abandon(lease);
            }
        }
    }

    /// Stops without order. `by`: the fast stop may take until then.
    pub async fn demote(self, fast_until: Option<Instant>) -> TaskEnd {
        if let Some(until) = fast_until {
            // With the time that before_stop takes.
            let limit = until.since(self.clock.now());
            match self.clock.within(limit, self.postgres.stop(StopMode::Fast, limit, None)).await {
                Some(Ok(())) => {
                    self.lease.resign();
                    self.postgres.callback("on_role_change", "replica");
                    return TaskEnd::Done;
                }
                Some(Err(error)) => warn!("the fast stop was not done, stopping at once: {error}"),
                None => warn!("the fast stop was not done in time, stopping at once"),
            }
        }
        match self.postgres.stop(StopMode::Immediate, Duration::from_secs(5), None).await {
            Ok(()) => {
                self.lease.resign();
                self.postgres.callback("on_role_change", "replica");
                TaskEnd::Done
            }
            Err(error) => error.into(),
        }
    }

    /// The cluster has become a standby cluster: its primary stops in order, and what it wrote last goes to the archive, where
    /// the cluster that is to be followed may need it. The key stays ours. After a checkpoint ([`crate::ha::prepare`]).
    pub async fn demote_cluster(self, limit: Duration) -> TaskEnd {
        if let Err(error) = self.postgres.stop(StopMode::Fast, limit, None).await {
            return error.into();
        }
        if let Err(error) = self.postgres.archive_last_wal().await {
            warn!("the last WAL file could not be archived: {error}");
        }
        TaskEnd::Done
    }
}

/// The most preferred member that has the record at `position`, and whether nobody who answers is preferred to it.
fn caught_up(statuses: &BTreeMap<MemberName, Option<PeerStatus>>, position: Lsn) -> Option<(&MemberName, bool)> {
    let standbys = || {
        let answered = statuses.iter().filter_map(|(name, status)| Some((name, status.as_ref()?)));
        answered.filter(|(_, peer)| peer.in_recovery)
    };
    let (name, peer) = standbys().filter(|(_, peer)| peer.lsn > position).max_by_key(|(_, p)| p.failover_priority)?;
    Some((name, standbys().all(|(_, other)| other.failover_priority <= peer.failover_priority)))
}

#[cfg(test)]
mod tests {
    use trunkline_common::TimelineId;

    use super::*;

    #[test]
    fn the_preferred_candidate_is_waited_for() {
        let peer = |lsn: u64, failover_priority: i64| {
            let timeline = Some(TimelineId(1));
            Some(PeerStatus {
                in_recovery: true,
                holds_key: false,
                lsn: Lsn(lsn),
                timeline,
                failover_priority,
                watchdog_failed: false,
                reads_own_wal: false,
            })
        };
        let verdict = |peers: &[(&str, Option<PeerStatus>)]| {
            let statuses = peers.iter().map(|(name, peer)| ((*name).into(), peer.clone())).collect();
            caught_up(&statuses, Lsn(100)).map(|(name, best)| (name.to_string(), best))
        };
        assert_eq!(verdict(&[("b", peer(100, 1)), ("c", None)]), None, "the record begins there");
        assert_eq!(verdict(&[("b", peer(101, 1)), ("c", peer(90, 1))]), Some(("b".to_owned(), true)));
        assert_eq!(verdict(&[("b", peer(101, 1)), ("c", peer(90, 2))]), Some(("b".to_owned(), false)));
        assert_eq!(verdict(&[("b", peer(101, 1)), ("c", peer(101, 2))]), Some(("c".to_owned(), true)));
    }
}
