//! What the end of a task means for what comes next.

use std::time::Duration;

use tracing::{debug, info, warn};
use trunkline_common::dcs::Dcs;
use trunkline_common::{Clock, Instant};

use super::Ha;
use super::decide::DRY;
use super::situation::DivergenceState;
use super::task::{TaskEnd, TaskKind};
use crate::peer::Peers;
use crate::postgres::{Divergence, PgStatus, Postgres};

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    /// What a finished task means.
    pub(super) fn finish(&mut self, end: (TaskKind, TaskEnd)) {
        let (kind, end) = end;
        let now = self.parts.clock.now();
        let started = matches!(kind, TaskKind::Start | TaskKind::Restart) && end == TaskEnd::Done;
        self.memory.up_since = started.then_some(now);
        match (kind, &end) {
            (TaskKind::Promote, TaskEnd::Refused(_)) => {
                self.memory.promotions = self.memory.promotions.saturating_sub(1);
            }
            (TaskKind::Promote, TaskEnd::Promoted(_)) => (self.memory.sync_before, self.memory.promotions) = (None, 0),
            (TaskKind::Promote, _) => self.memory.sync_before = None,
            _ => {}
        }
        match (kind, end) {
            (TaskKind::CopySlots, end) => {
                // The server runs on, or is started like any that was stopped.
                if let TaskEnd::Failed { why, .. } = end {
                    warn!("logical slots could not be copied: {why}");
                }
                return;
            }
            (kind, TaskEnd::Refused(why)) => {
                warn!("{} failed: {why}", kind.label());
                self.note_failure(kind, now, why);
                self.stay_out_after_some(now);
                return;
            }
            (kind, TaskEnd::Failed { why, damaged }) => {
                warn!("{} failed: {why}", kind.label());
                self.note_failure(kind, now, why.clone());
                if kind == TaskKind::Start && self.memory.divergence == DivergenceState::NotAsked {
                    // PostgreSQL refuses to start on a timeline that it is no child of. A former primary that has come back as a
                    // standby since is no other than any standby to an agent that has just started.
                    self.memory.divergence = DivergenceState::DidNotStart;
                }
                if kind == TaskKind::Rewind {
                    self.memory.divergence = match damaged {
                        true => DivergenceState::RewindFailed(why),
                        false => DivergenceState::Check,
                    };
                }
                if matches!(kind, TaskKind::Demote | TaskKind::HandOver | TaskKind::DemoteCluster)
                    && self.lease.session().leading
                {
                    // Processes that wait for a disk can't be killed before that answers; nor can they acknowledge
                    // anything any more. The key is for others once its lease is over.
                    warn!("PostgreSQL could not be stopped; the leader key is left to run out");
                    self.lease.forsake(now);
                    self.memory.abstain_until = Some(now + self.settings().ttl * 2);
                }
                if kind == TaskKind::Promote {
                    self.stay_out_after_some(now);
                }
                return;
            }
            (TaskKind::HandOver | TaskKind::Demote | TaskKind::DemoteCluster, _) => {
                self.memory.demoted = true;
                self.memory.divergence = DivergenceState::Check;
            }
            (_, TaskEnd::Compared(Divergence::None)) => {
                let asked = std::mem::replace(&mut self.memory.divergence, DivergenceState::NotAsked);
                match asked {
                    DivergenceState::NotAsked => debug!("the local history is still a prefix of the leader's"),
                    _ => info!("the local history is a prefix of the leader's"),
                }
                let doubted = !matches!(asked, DivergenceState::NotAsked | DivergenceState::DidNotStart);
                if !doubted && matches!(self.pg, PgStatus::Running(_)) {
                    // Asked because it does not stream, and that is not why: asking again at once would tell nothing new.
                    self.memory.retry_at = Some(now + self.settings().loop_wait.max(DRY));
                    self.memory.last_failure = Some("the server does not stream from the leader yet".to_owned());
                    return;
                }
                if asked == DivergenceState::DidNotStart {
                    // That is not why it did not start: once more at once, and then after longer and longer pauses.
                    self.memory.retry_at = None;
                    return;
                }
            }
            (_, TaskEnd::Compared(Divergence::Rewind(why))) => {
                info!("the local history has left the leader's: {why}");
                self.memory.divergence = DivergenceState::Rewind(why);
            }
            (_, TaskEnd::Compared(Divergence::Twice(why))) => {
                info!("the local history is not the leader's, and pg_rewind is of no use: {why}");
                self.memory.divergence = DivergenceState::RewindFailed(why);
            }
            (_, TaskEnd::Compared(Divergence::Unknown(why))) => {
                if self.memory.divergence == DivergenceState::DidNotStart {
                    // That may have had another reason.
                    self.memory.divergence = DivergenceState::NotAsked;
                }
                self.memory.retry_at = Some(now + Duration::from_millis(200));
                self.memory.last_failure = Some(why);
                return;
            }
            (TaskKind::Restart, _) if matches!(self.memory.divergence, DivergenceState::RewindFailed(_)) => {
                // Somebody has looked into it, and wants it to run: once more from the first rung on.
                self.memory.divergence = DivergenceState::Check;
            }
            (TaskKind::Clone | TaskKind::Reinitialize | TaskKind::Rewind | TaskKind::Discard, _) => {
                self.memory.divergence = DivergenceState::NotAsked;
                self.memory.was_primary = false;
                self.memory.demoted = false;
                self.memory.fresh_copy = true;
                self.slots_copied = None;
            }
            (_, TaskEnd::Promoted(timeline)) => {
                info!("promoted, on timeline {timeline}");
                self.count("promote", "leader_key");
                self.memory.divergence = DivergenceState::NotAsked;
                self.memory.sync_since.clear();
                self.published.upkept = None;
            }
            (
                TaskKind::Bootstrap
                | TaskKind::CustomBootstrap
                | TaskKind::Start
                | TaskKind::Restart
                | TaskKind::Promote
                | TaskKind::CheckDivergence
                | TaskKind::Stop,
                _,
            ) => {}
        }
        self.memory.failures = 0;
        self.memory.retry_at = None;
        self.memory.last_failure = None;
    }

    /// A promotion failed: after some, it is another one's turn.
    fn stay_out_after_some(&mut self, now: Instant) {
        if self.memory.failures >= 3 {
            self.memory.abstain_until = Some(now + self.settings().ttl);
        }
    }

    /// Something failed: not again at once. What reads all data of another server, or all of one's own, waits up to 32 s
    /// for its next try; anything else 8 s, because this may be the only server there is, and its cause is gone.
    pub(super) fn note_failure(&mut self, kind: TaskKind, now: Instant, why: String) {
        let most = match kind {
            TaskKind::Clone | TaskKind::Reinitialize | TaskKind::Rewind | TaskKind::CustomBootstrap => 5,
            _ => 3,
        };
        self.memory.failures = self.memory.failures.saturating_add(1);
        let exponent = (self.memory.failures - 1).min(most);
        let pause = self.settings().loop_wait.min(Duration::from_secs(1)) * 2u32.pow(exponent);
        self.memory.retry_at = Some(now + pause);
        self.memory.last_failure = Some(why);
    }
}
