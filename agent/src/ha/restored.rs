//! What a node still knows of its cluster when the DCS has gone back to an earlier state: an operator has restored it from a
//! backup, or made it anew. Pure.
//!
//! Revisions start over, so nothing that was concluded from those of before counts ([`Memory::start_over`]). The keys are as
//! old as the backup, or absent. That is what an operator asked for where settings are concerned, but who has every commit
//! and how far the last leader was cannot be asked back: until a leader has written it anew, what was seen last before the DCS
//! went back is newer than what it says.
//!
//! [`Memory::start_over`]: super::situation::Memory::start_over

use std::sync::Arc;

use trunkline_common::cluster::SyncState;
use trunkline_common::{ClusterView, Revision};

/// A DCS that has gone back.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// The cluster as it was seen last before.
    before: Arc<ClusterView>,
    /// The first revision that was seen since.
    since: Revision,
}

impl Restored {
    /// Found at `now`, after `before` had been seen.
    pub fn new(before: Arc<ClusterView>, now: &ClusterView) -> Self {
        Self { before, since: now.revision }
    }

    /// `view` with what it has forgotten: who has every commit, the last leader's position, and the numbers of timelines.
    pub fn complete(&self, view: &ClusterView) -> ClusterView {
        let (before, mut view) = (&self.before, view.clone());
        if view.sync.revision <= self.since {
            view.sync = SyncState { revision: view.sync.revision, ..before.sync.clone() };
        }
        if view.status_revision <= self.since {
            view.status.optime = view.status.optime.max(before.status.optime);
        }
        if view.claimed_revision <= self.since {
            view.claimed = view.claimed.max(before.claimed);
        }
        view
    }
}

#[cfg(test)]
mod tests {
    use trunkline_common::{Lsn, TimelineId};

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
        assert_eq!(restored.complete(&backup), view(50, ("a", "b", 40), (500, 49), (3, 30)));
        let anew = ClusterView { revision: Revision(1), ..ClusterView::default() };
        let empty = Restored::new(before, &anew).complete(&anew);
        assert_eq!(empty, view(1, ("a", "b", 0), (500, 0), (3, 0)));
        let written = view(54, ("b", "d", 51), (510, 53), (4, 52));
        assert_eq!(restored.complete(&written), written);
    }
}
