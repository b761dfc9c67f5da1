//! How far behind a standby is. Pure.
//!
//! In bytes: the leader's last known position less the one up to which the standby has replayed, which is what its readers
//! see. In time: how long ago the leader was first known to have what the standby lacks. That needs no clock but the
//! router's, and is 0 for a standby that lacks nothing, however long ago the last write was.
//!
//! Both sides publish their positions in the DCS once per `loop_wait`; where a port limits lag in time, the members are
//! also asked over their REST APIs every second.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use trunkline_common::{ClusterView, Instant, Lsn, MemberName};

use crate::table::{Backend, Epoch, RouteTable};

/// So many positions of the leader are remembered: more than an hour, the longest limit, at one a second.
const REMEMBERED: usize = 4_096;

/// Positions as members say them over their REST APIs: the leader's last one, a standby's replayed one.
pub type Measured = BTreeMap<MemberName, Lsn>;

/// Where the leader was when.
#[derive(Debug, Default)]
pub struct Lags {
    epoch: Option<Epoch>,
    /// Rising in both.
    leader: VecDeque<(Instant, Lsn)>,
}

impl Lags {
    /// Takes note of the leader's position, and writes into `table` how far its standbys are behind.
    pub fn complete(&mut self, table: &mut RouteTable, view: &ClusterView, measured: &Measured, now: Instant) {
        if self.epoch != table.reign {
            // Another leader may be at an earlier position than the last one was.
            *self = Self { epoch: table.reign.clone(), leader: VecDeque::new() };
        }
        let fresh = table.reign.as_ref().and_then(|reign| measured.get(&reign.member)).copied();
        let published = Some(view.status.optime).filter(|optime| optime.is_valid());
        let Some(position) = fresh.max(published) else { return };
        self.note(now, position);
        let position = self.leader.back().map_or(position, |(_, last)| *last);
        for standby in &mut table.standbys {
            let record = view.members.get(&standby.member);
            let published = record.and_then(|member| member.replay_lsn.or(member.xlog_location).or(member.receive_lsn));
            let replayed = measured.get(&standby.member).copied().max(published);
            let (lag, behind_since) = match replayed {
                Some(replayed) => (Some(replayed.lag_behind(position)), self.behind_since(replayed)),
                None => (None, None),
            };
            if (standby.lag, standby.behind_since) != (lag, behind_since) {
                *standby = Arc::new(Backend { lag, behind_since, ..(**standby).clone() });
            }
        }
    }

    fn note(&mut self, now: Instant, position: Lsn) {
        if self.leader.back().is_some_and(|(_, last)| *last >= position) {
            return;
        }
        self.leader.push_back((now, position));
        if self.leader.len() > REMEMBERED {
            self.leader.pop_front();
        }
    }

    /// Since when the leader has been known to be ahead of `position`.
    fn behind_since(&self, position: Lsn) -> Option<Instant> {
        let first_ahead = self.leader.partition_point(|(_, known)| *known <= position);
        self.leader.get(first_ahead).map(|(since, _)| *since)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use trunkline_common::cluster::Status;

    use super::*;
    use crate::table::tests::{member, view};

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn seen(
        lags: &mut Lags,
        leader: (&str, i64, u64),
        standby: Option<u64>,
        measured: Option<u64>,
        now: u64,
    ) -> (Option<u64>, Option<Instant>) {
        let record = trunkline_common::Member { xlog_location: standby.map(Lsn), ..member("replica", "running") };
        let mut view = view(Some((leader.0, leader.1)), &[(leader.0, member("primary", "running")), ("z", record)]);
        view.status = Status { optime: Lsn(leader.2), ..Status::default() };
        let mut table = RouteTable::from_view(&view);
        let measured = measured.map(|at| ("z".into(), Lsn(at))).into_iter().collect();
        lags.complete(&mut table, &view, &measured, at(now));
        (table.standbys[0].lag, table.standbys[0].behind_since)
    }

    #[test]
    fn lag_is_counted_from_when_the_leader_was_ahead() {
        let mut lags = Lags::default();
        assert_eq!(seen(&mut lags, ("a", 1, 100), Some(100), None, 10), (Some(0), None));
        assert_eq!(seen(&mut lags, ("a", 1, 200), Some(100), None, 20), (Some(100), Some(at(20))));
        assert_eq!(
            seen(&mut lags, ("a", 1, 300), Some(150), None, 30),
            (Some(150), Some(at(20))),
            "still behind the second"
        );
        assert_eq!(seen(&mut lags, ("a", 1, 300), Some(250), None, 31), (Some(50), Some(at(30))));
        assert_eq!(seen(&mut lags, ("a", 1, 300), Some(250), Some(300), 32), (Some(0), None), "its own word is newer");
        assert_eq!(seen(&mut lags, ("a", 1, 300), Some(400), None, 33), (Some(0), None), "ahead of what is known");
        assert_eq!(seen(&mut lags, ("a", 1, 300), None, None, 34), (None, None), "unknown");
    }

    #[test]
    fn another_leader_begins_anew() {
        let mut lags = Lags::default();
        seen(&mut lags, ("a", 1, 900), Some(100), None, 10);
        assert_eq!(seen(&mut lags, ("b", 2, 500), Some(500), None, 20), (Some(0), None));
        assert_eq!(seen(&mut lags, ("b", 2, 0), Some(500), None, 20), (None, None), "no position published yet");
    }

    #[test]
    fn memory_is_bounded_and_an_hour_long() {
        let mut lags = Lags::default();
        for second in 0..10_000 {
            lags.note(at(second), Lsn(1_000 + second));
        }
        assert_eq!(lags.leader.len(), REMEMBERED);
        let since = lags.behind_since(Lsn(1_000)).unwrap();
        assert!(at(10_000).since(since) > Duration::from_secs(3_600), "{since:?}");
    }
}
