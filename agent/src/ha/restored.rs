//! What a node still knows of its cluster when the DCS has gone back to an earlier state: an operator has restored it from a
//! backup, or made it anew. Pure.
//!
//! Revisions start over, so nothing that was concluded from those of before counts ([`Memory::start_over`]). The keys are as
//! old as the backup, or absent. That is what an operator asked for where settings are concerned, but who has every commit
//! and how far the last leader was cannot be asked back: until a leader has written it anew, what was seen last before the DCS
//! went back is newer than what it says.
//!
//! "Anew" is after the revision at which the first agent noticed, and that is said in the key `restored`: at once, or at the latest with
//! the first word of who has every commit ([`ClusterView::unsaid`]). Whoever was away then finds keys that may be of the backup or written since.
//!
//! Timelines only grow. So of those that were begun since the backup the DCS is told at once, by whoever knows of them
//! ([`Restored::untold`]): the leader of the backup, if it has slept since, knows of nobody after it.
//!
//! [`Memory::start_over`]: super::situation::Memory::start_over

use std::sync::Arc;

use trunkline_common::cluster::{Initialize, RestoreRecord, SyncState};
use trunkline_common::{ClusterView, Revision};
use trunkline_config::dynamic::SynchronousMode;

/// A DCS that has gone back.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// The cluster as it was seen last before.
    before: Arc<ClusterView>,
    /// The first revision that this node saw since.
    noticed: Revision,
    /// It knows fewer timelines than `before`, and has not been told yet.
    untold: bool,
}

impl Restored {
    /// Found at `now`, after `before` had been seen.
    pub fn new(before: Arc<ClusterView>, now: &ClusterView) -> Self {
        let same = matches!(now.initialize, Initialize::Done(_)) && now.initialize == before.initialize;
        let untold = same && (before.timeline() > now.timeline() || before.claimed > now.claimed);
        Self { before, noticed: now.revision, untold }
    }

    /// What nobody has said yet of this restore: that there was one, or a newer list of who has every commit. A record with a number
    /// that was seen before came with the backup.
    fn unsaid(&self, view: &ClusterView) -> Option<RestoreRecord> {
        let (said, sync) = (&view.restored, || Some(self.before.sync.clone()));
        if !self.is_said(view) {
            let count = self.before.restored.count.saturating_add(1);
            return Some(RestoreRecord { count, since: self.noticed, sync: sync() });
        }
        let older = self.told_sync(view).is_none() && view.sync.revision <= said.since.min(self.noticed);
        (older && self.saw_it(view)).then(|| RestoreRecord { sync: sync(), ..said.clone() })
    }

    fn is_said(&self, view: &ClusterView) -> bool {
        view.restored.count > self.before.restored.count
    }

    /// Whether `before` is of the time right before the restore of which `view` tells, and not of one before that.
    fn saw_it(&self, view: &ClusterView) -> bool {
        view.restored.count == self.before.restored.count.saturating_add(1)
    }

    /// The list of before that somebody has told, if it is not older than the one that was seen here.
    fn told_sync<'a>(&self, view: &'a ClusterView) -> Option<&'a SyncState> {
        let told = view.restored.sync.as_ref().filter(|_| self.is_said(view))?;
        (!self.saw_it(view) || told.revision >= self.before.sync.revision).then_some(told)
    }

    /// The revision after which everything was written since.
    fn since(&self, view: &ClusterView) -> Revision {
        if self.is_said(view) { view.restored.since.min(self.noticed) } else { self.noticed }
    }

    /// What the DCS has to be told: the cluster as it was before, whose timelines it has forgotten.
    pub fn untold(&self) -> Option<Arc<ClusterView>> {
        self.untold.then(|| self.before.clone())
    }

    /// It has been told, or somebody has written of newer ones.
    pub fn told(&mut self) {
        self.untold = false;
    }

    /// Whether the `sync` key is as old as the backup where commits wait by it: of whoever writes it the others would take it for new.
    pub fn is_old(&self, view: &ClusterView) -> bool {
        view.settings.synchronous_mode != SynchronousMode::Off && view.sync.revision <= self.since(view)
    }

    /// `view` with what is to be said of the restore, and what it has forgotten: who has every commit, the last leader's position, and the numbers of timelines.
    pub fn complete(&self, view: &ClusterView) -> ClusterView {
        let (before, since, mut view) = (&self.before, self.since(view), view.clone());
        view.unsaid = self.unsaid(&view);
        if view.sync.revision <= since {
            let newest = self.told_sync(&view).unwrap_or(&before.sync).clone();
            view.sync = SyncState { revision: view.sync.revision, ..newest };
        }
        if view.status_revision <= since {
            view.status.optime = view.status.optime.max(before.status.optime);
        }
        if view.history_revision <= since && view.timeline() < before.timeline() {
            (view.has_history, view.history) = (before.has_history, before.history.clone());
        }
        if view.claimed_revision <= since {
            view.claimed = view.claimed.max(before.claimed);
        }
        view
    }
}

/// `view` for whoever has not seen the cluster before the DCS went back: with what others have told of it.
pub fn as_told(view: Arc<ClusterView>) -> Arc<ClusterView> {
    let Some(told) = view.sync_before_restore().cloned() else { return view };
    let sync = SyncState { revision: view.sync.revision, ..told };
    Arc::new(ClusterView { sync, ..ClusterView::clone(&view) })
}

#[cfg(test)]
mod tests {
    use trunkline_common::cluster::HistoryLine;
    use trunkline_common::{Lsn, SystemId, TimelineId};

    use super::*;

    fn view(revision: i64, sync: (&str, &str, i64), status: (u64, i64), claimed: (u32, i64)) -> ClusterView {
        let (leader, standby, written) = sync;
        let mut view = ClusterView { revision: Revision(revision), ..ClusterView::default() };
        let standbys = vec![standby.to_owned()];
        view.sync = SyncState { leader: Some(leader.into()), standbys, quorum: 0, revision: Revision(written) };
        (view.status.optime, view.status_revision) = (Lsn(status.0), Revision(status.1));
        (view.claimed, view.claimed_revision) = (TimelineId(claimed.0), Revision(claimed.1));
        view
    }

    #[test]
    fn what_was_seen_before_counts_until_it_is_written_anew() {
        let before = Arc::new(view(100, ("a", "b", 90), (500, 99), (3, 80)));
        let backup = view(50, ("c", "d", 40), (200, 49), (2, 30));
        let restored = Restored::new(before.clone(), &backup);
        let unsaid = |since, view| {
            let unsaid = Some(RestoreRecord { count: 1, since: Revision(since), sync: Some(before.sync.clone()) });
            ClusterView { unsaid, ..view }
        };
        assert_eq!(restored.complete(&backup), unsaid(50, view(50, ("a", "b", 40), (500, 49), (3, 30))));
        let anew = ClusterView { revision: Revision(1), ..ClusterView::default() };
        let empty = Restored::new(before.clone(), &anew).complete(&anew);
        assert_eq!(empty, unsaid(1, view(1, ("a", "b", 0), (500, 0), (3, 0))));
        let written = view(54, ("b", "d", 51), (510, 53), (4, 52));
        assert_eq!(restored.complete(&written), unsaid(50, written));
    }

    #[test]
    fn who_notices_late_goes_by_what_the_first_one_said() {
        let said = |count, since, view| {
            let restored = RestoreRecord { count, since: Revision(since), sync: None };
            ClusterView { restored, ..view }
        };
        let before = Arc::new(said(1, 7, view(100, ("a", "b", 90), (500, 99), (3, 80))));
        let since = view(64, ("a", "c", 58), (700, 60), (4, 59));
        for (what, now, unsaid, sync) in [
            ("nobody has said it", said(0, 0, since.clone()), Some((2, 64)), "b"),
            ("an earlier restore was in the backup", said(1, 7, since.clone()), Some((2, 64)), "b"),
            ("said before the key was written", said(2, 52, since.clone()), None, "c"),
            ("said after it, but not what was known", said(2, 61, since.clone()), Some((2, 61)), "b"),
            ("another one since", said(3, 52, since.clone()), None, "c"),
            ("a revision that is none", said(2, i64::MAX, since), Some((2, i64::MAX)), "b"),
        ] {
            let restored = Restored::new(before.clone(), &now);
            let known = Some(before.sync.clone());
            let said = unsaid.map(|(count, since)| RestoreRecord { count, since: Revision(since), sync: known });
            assert_eq!(restored.unsaid(&now), said, "{what}");
            assert_eq!(restored.complete(&now).sync.standbys, [sync], "{what}");
        }
    }

    #[test]
    fn the_newest_list_of_before_counts_for_all() {
        let before = Arc::new(view(100, ("a", "b", 90), (500, 99), (3, 80)));
        let backup = |count, listed: &str, revision| {
            let mut view = view(64, ("c", "d", 40), (200, 49), (2, 30));
            let sync =
                SyncState { standbys: vec![listed.to_owned()], revision: Revision(revision), ..view.sync.clone() };
            view.restored = RestoreRecord { count, since: Revision(52), sync: Some(sync) };
            view
        };
        for (what, now, counts, tells) in [
            ("others knew less", backup(1, "x", 89), "b", true),
            ("others knew as much", backup(1, "b", 90), "b", false),
            ("others knew more", backup(1, "x", 91), "x", false),
            ("it came with the backup", backup(0, "x", 91), "b", true),
            ("of a restore that was missed here", backup(2, "x", 30), "x", false),
        ] {
            let view = Restored::new(before.clone(), &now).complete(&now);
            assert_eq!((&*view.sync.standbys[0], view.sync.revision), (counts, Revision(40)), "{what}");
            assert_eq!(view.unsaid.is_some(), tells, "{what}");
            if let Some(unsaid) = view.unsaid {
                assert_eq!((unsaid.count, unsaid.sync), (1, Some(before.sync.clone())), "{what}");
            }
        }
        // An agent that was started since.
        let told = |now: ClusterView| as_told(Arc::new(now)).sync.standbys[0].clone();
        assert_eq!(told(backup(1, "x", 91)), "x");
        let mut anew = backup(1, "x", 91);
        anew.sync.revision = Revision(53);
        assert_eq!(told(anew), "d", "it was written since");
    }

    #[test]
    fn timelines_that_were_begun_since_the_backup_are_told() {
        let cluster = |history: &[u32], claimed: u32| {
            let line = |timeline: &u32| HistoryLine {
                timeline: TimelineId(*timeline),
                switchpoint: Lsn(0),
                reason: String::new(),
                promoted_at: None,
                new_leader: None,
            };
            ClusterView {
                revision: Revision(50),
                initialize: Initialize::Done(SystemId(7)),
                has_history: true,
                history: history.iter().map(line).collect(),
                claimed: TimelineId(claimed),
                ..ClusterView::default()
            }
        };
        let restored = |before: ClusterView, now: &ClusterView| Restored::new(Arc::new(before), now);
        for (what, before, now, untold) in [
            ("nobody was promoted since", cluster(&[1], 2), cluster(&[1], 2), false),
            ("somebody was", cluster(&[1, 2], 3), cluster(&[1], 2), true),
            ("and has not lived to write it", cluster(&[1], 3), cluster(&[1], 2), true),
            ("somebody who claims nothing", cluster(&[1, 2], 0), cluster(&[1], 0), true),
            ("this agent saw less", cluster(&[1], 2), cluster(&[1, 2], 3), false),
            ("made anew", cluster(&[1], 2), ClusterView::default(), false),
        ] {
            assert_eq!(restored(before, &now).untold().is_some(), untold, "{what}");
        }
        let (before, now) = (cluster(&[1, 2], 3), cluster(&[1], 2));
        let mut restored = restored(before.clone(), &now);
        assert_eq!(restored.complete(&now).timeline(), before.timeline());
        let later = ClusterView { history_revision: Revision(51), ..cluster(&[1, 3], 4) };
        assert_eq!(restored.complete(&later).timeline(), later.timeline(), "written anew");
        restored.told();
        assert_eq!(restored.untold(), None);
    }
}
