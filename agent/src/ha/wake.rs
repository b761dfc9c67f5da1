//! What wakes the loop: news from the DCS that a decision may depend on, and the next time at which something is due.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::{Clock, ClusterView, Instant, Member};

use super::{Ha, decide, routers};
use crate::peer::Peers;
use crate::postgres::{PgStatus, Postgres};

/// How soon a server that did not answer is looked at again, at the latest.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How soon a primary that has lost its key, and is about to end, is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    /// Returns when the DCS shows something that a decision may depend on. Positions and the like don't count: they
    /// would keep every node awake.
    pub(super) async fn relevant_change(
        knowledge: &mut watch::Receiver<Knowledge>,
        seen: &Option<Arc<ClusterView>>,
        restores: u64,
    ) {
        loop {
            if knowledge.changed().await.is_err() {
                return std::future::pending().await;
            }
            let current = knowledge.borrow().clone();
            let matters = match (&current.view, seen) {
                (Some(_), Some(_)) if current.restores != restores => true,
                (Some(now), Some(before)) => now.revision >= before.revision && matters(before, now),
                (now, before) => now.is_some() != before.is_some(),
            };
            if matters {
                return;
            }
        }
    }

    /// When to look again although nothing has happened: the loop's pace, or something that is due before.
    pub(super) fn wake_at(&self) -> Instant {
        let now = self.parts.clock.now();
        let mut wake = now + self.settings().loop_wait;
        if self.pg == PgStatus::Unresponsive {
            wake = wake.min(now + LOOK_AGAIN);
        }
        let leaderless = self.memory.leaderless_since.is_some_and(|since| now.since(since) < self.settings().ttl);
        if self.beside_a_primary && leaderless {
            // Nothing in the DCS says when it is one no longer.
            wake = wake.min(now + ASK_AGAIN);
        }
        if let Some(until) = self.lease.session().leader_until() {
            let ttl = self.ttl();
            let mut due = until - decide::step_down_margin(ttl);
            if self.settings().failsafe_mode {
                let refused = self.memory.failsafe_refused.as_ref().map(|refusal| refusal.at + decide::FAILSAFE_PAUSE);
                due = due.min(
                    (until - decide::failsafe_margin(ttl, self.lease.session().trouble.is_some()))
                        .max(refused.unwrap_or_default()),
                );
            }
            wake = wake.min(due.max(now + Duration::from_millis(50)));
        }
        let session = self.lease.session();
        let stopped = matches!(self.pg, PgStatus::Stopped(_)) && session.trouble.is_some();
        let lease_until = session.lease.map(|lease| lease.until);
        let trusted = stopped.then(|| decide::trusted_until(self.memory.down_since, lease_until)).flatten();
        let promise = self.memory.promise.as_ref().map(|promise| promise.until);
        let hold = self.settings().failsafe_mode.then_some(self.memory.started_at + self.settings().ttl);
        let (before, forgotten) = (self.memory.promised_before, self.memory.forgotten_until);
        for at in [self.memory.retry_at, self.memory.abstain_until, promise, before, forgotten, hold, trusted]
            .into_iter()
            .flatten()
            .filter(|at| *at > now)
        {
            wake = wake.min(at);
        }
        if let (Some(view), held @ Some(_)) = (&self.view, self.memory.key_held) {
            wake = routers::awaited(view, held, now).map_or(wake, |awaited| wake.min(now + awaited.left));
        }
        let scheduled = self.view.as_ref().and_then(|view| view.failover.as_ref()?.scheduled_at);
        if let Some(left) = scheduled.and_then(|at| (at.to_utc() - self.parts.clock.wall()).to_std().ok()) {
            wake = wake.min(now + left);
        }
        wake
    }
}

/// What makes a leader wait, or not, for the members that are on the `sync` key.
fn synchronous(view: &ClusterView) -> Vec<Option<(bool, bool)>> {
    let member = |name: &String| view.members.get(&name.as_str().into());
    let usable = |member: &Member| (member.is_running(), member.nosync());
    view.sync.standbys.iter().map(|name| member(name).map(usable)).collect()
}

/// Whether two views differ in something that decisions depend on.
fn matters(before: &ClusterView, now: &ClusterView) -> bool {
    let leader = |view: &ClusterView| {
        view.leader_member().map(|member| {
            (
                member.conn_url.clone(),
                member.state.clone(),
                member.role.clone(),
                member.timeline,
                member.checkpoint_after_promote,
            )
        })
    };
    let key = |view: &ClusterView| view.leader.as_ref().map(|leader| (leader.name.clone(), leader.created));
    key(before) != key(now)
        || before.failover != now.failover
        || before.sync != now.sync
        || before.initialize != now.initialize
        || before.config.as_ref().map(|c| c.revision) != now.config.as_ref().map(|c| c.revision)
        || leader(before) != leader(now)
        || before.members.len() != now.members.len()
        || synchronous(before) != synchronous(now)
        || before.routers != now.routers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synchronous_standby_that_is_about_to_stop_wakes_its_leader() {
        let mut before = ClusterView::default();
        for name in ["b", "c"] {
            before.members.insert(name.into(), Member { state: "running".to_owned(), ..Member::default() });
        }
        before.sync.standbys = vec!["b".to_owned()];
        let changed = |name: &str, change: &dyn Fn(&mut Member)| {
            let mut now = before.clone();
            change(now.members.get_mut(&name.into()).unwrap());
            matters(&before, &now)
        };
        let stops = |member: &mut Member| member.state = "stopping".to_owned();
        let refuses = |member: &mut Member| _ = member.tags.insert("nosync".to_owned(), true.into());
        let goes_on = |member: &mut Member| member.xlog_location = Some(trunkline_common::Lsn(1));
        assert_eq!((changed("b", &stops), changed("b", &refuses), changed("b", &goes_on)), (true, true, false));
        assert!(!changed("c", &stops), "nothing waits for it");
    }
}
