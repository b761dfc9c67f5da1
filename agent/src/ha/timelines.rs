//! The number of a new timeline. Pure.
//!
//! PostgreSQL takes the first one of which it has not heard. A leader that is gone right after its promotion has told nobody
//! of its own, and the next one would begin another timeline of that number, which nothing can tell from the first: not
//! pg_rewind, not a standby that asks for WAL, not the archive. So the number is claimed in the DCS, together with the leader
//! key, and numbers that were claimed before are left out.

use tracing::warn;
use trunkline_common::{ClusterView, TimelineId};

use crate::postgres::{PgRole, Running};

/// The number of the timeline that a standby will begin, which it claims together with the leader key: a leader that is gone
/// before it has written the history may have begun one all the same, and two of one number could not be told apart.
/// `None`: nothing is begun, as this is a primary, or the timelines are made elsewhere.
pub fn claim(view: &ClusterView, running: &Running) -> Option<TimelineId> {
    let begins = running.role == PgRole::Standby && view.settings.standby_cluster.is_none();
    let last = running.timeline.max(view.timeline()).unwrap_or_default().max(view.claimed);
    begins.then_some(TimelineId(last.0.saturating_add(1)))
}

/// The most numbers that are left out: more than can have been claimed in vain.
pub const LEFT_OUT_MAX: usize = 100;

/// The numbers between a standby's timeline and the one that it has claimed.
pub fn left_out(claimed: TimelineId, own: Option<TimelineId>) -> Vec<TimelineId> {
    let Some(own) = own else { return Vec::new() };
    let between = own.0.saturating_add(1)..claimed.0;
    if between.len() > LEFT_OUT_MAX {
        warn!("the timeline key says {claimed}, which can't be with timeline {own} here; ignored");
        return Vec::new();
    }
    between.map(TimelineId).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_somebody_may_have_used_are_left_out() {
        for (what, claimed, own, expected) in [
            ("the next one is ours", 3, Some(2), vec![]),
            ("claimed by others before", 5, Some(2), vec![3, 4]),
            ("no key", 0, Some(2), vec![]),
            ("promotions that did not claim theirs", 3, Some(7), vec![]),
            ("own timeline not known", 5, None, vec![]),
            ("not believed", u32::MAX, Some(2), vec![]),
        ] {
            let expected: Vec<_> = expected.into_iter().map(TimelineId).collect();
            assert_eq!(left_out(TimelineId(claimed), own.map(TimelineId)), expected, "{what}");
        }
    }
}
