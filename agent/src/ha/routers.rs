//! Whom a new leader waits for before it is promoted (`router_lease`): routers that still may have sessions with the leader
//! before. Pure.
//!
//! The leader key is ours by then, so nobody else can be promoted. A router that has seen that says so in its own key, once
//! it has ended every session to a leader before. One that can't say so has ended them by itself when its lease is over,
//! which by its own count it cannot have renewed since it could have seen our key (`router/src/registration.rs`): so nobody
//! is waited for longer than for one lease, counted from when the key was seen to be ours.

use std::time::Duration;

use trunkline_common::{ClusterView, Instant, Revision};

/// Routers that are waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Awaited {
    /// What they call themselves.
    pub names: Vec<String>,
    /// How much longer at most.
    pub left: Duration,
}

/// Who is waited for by the holder of the leader key in `view`; `held`: the key (by its creation) that this node has been
/// seen to hold, and since when. `None`: nobody, or nobody any more.
pub fn awaited(view: &ClusterView, held: Option<(Revision, Instant)>, now: Instant) -> Option<Awaited> {
    let key = view.leader.as_ref().filter(|_| !view.settings.router_lease.is_zero())?;
    let waited = held.filter(|(created, _)| *created == key.created).map_or(Duration::ZERO, |(_, at)| now.since(at));
    // One that was created later than ours is from before the DCS was restored from a backup.
    let behind = view.routers.values().filter(|router| router.epoch != key.created && waited < router.lease);
    let (names, left): (Vec<_>, Vec<_>) = behind.map(|router| (router.name.clone(), router.lease - waited)).unzip();
    Some(Awaited { left: left.into_iter().max()?, names })
}

#[cfg(test)]
mod tests {
    use trunkline_common::LeaseId;
    use trunkline_common::cluster::{LeaderKey, RouterRecord};

    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    /// The key was created at 50; routers follow the leader keys of these revisions, with leases of these lengths.
    fn view(routers: &[(&str, i64, u64)]) -> ClusterView {
        let key = Revision(50);
        let leader = LeaderKey { name: "b".into(), lease: LeaseId(7), created: key, modified: key };
        let mut view = ClusterView { leader: Some(leader), ..ClusterView::default() };
        view.settings.router_lease = Duration::from_secs(5);
        let record = |(name, epoch, lease): &(&str, i64, u64)| {
            let lease = Duration::from_secs(*lease);
            ((*name).to_owned(), RouterRecord { name: (*name).to_owned(), lease, epoch: Revision(*epoch) })
        };
        view.routers = routers.iter().map(record).collect();
        view
    }

    #[test]
    fn those_behind_are_waited_for_while_their_leases_last() {
        let told = |routers: &[(&str, i64, u64)], held: Option<(i64, u64)>, now: u64| {
            let held = held.map(|(created, since)| (Revision(created), at(since)));
            awaited(&view(routers), held, at(now)).map(|awaited| (awaited.names.join(" "), awaited.left.as_secs()))
        };
        let some = |names: &str, left| Some((names.to_owned(), left));
        let held = Some((50, 100));
        assert_eq!(told(&[], held, 100), None, "there is none");
        assert_eq!(told(&[("x", 50, 5), ("y", 50, 5)], held, 100), None, "all have said it");
        assert_eq!(
            told(&[("x", 51, 5)], held, 100),
            some("x", 5),
            "it can't have seen a later one while there is ours"
        );
        assert_eq!(told(&[("x", 50, 5), ("y", 49, 5)], held, 100), some("y", 5));
        assert_eq!(told(&[("x", 0, 5), ("y", 49, 20)], held, 104), some("x y", 16));
        assert_eq!(told(&[("x", 0, 5), ("y", 49, 20)], held, 105), some("y", 15));
        assert_eq!(told(&[("x", 0, 5), ("y", 49, 20)], held, 120), None, "never longer than their leases");
        assert_eq!(told(&[("x", 40, 5)], None, 200), some("x", 5), "the key has just been seen");
        assert_eq!(told(&[("x", 40, 5)], Some((48, 100)), 200), some("x", 5), "that was another key");
    }

    #[test]
    fn nobody_is_waited_for_unless_the_setting_says_so() {
        let mut view = view(&[("x", 0, 5)]);
        view.settings.router_lease = Duration::ZERO;
        assert_eq!(awaited(&view, None, at(100)), None);
        view.settings.router_lease = Duration::from_secs(5);
        view.leader = None;
        assert_eq!(awaited(&view, None, at(100)), None);
    }
}
