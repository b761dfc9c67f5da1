//! From what is known of the cluster to where sessions go.
//!
//! Knowledge is graded. *Confirmed*: the table follows the view. *Unconfirmed*, once the DCS has been silent for
//! `stale_after`: that the DCS does not answer is no sign of the leader's death, so every session goes on; but nobody would
//! tell us of a new leader either, so new sessions go to the old one only while it proves over its REST API that it still
//! holds the lock. *Gone*: only the DCS can say that, by an absent key, and then it is at once.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{debug, info};
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::{Clock, ClusterView, Instant};

use crate::probe;
use crate::router::Router;
use crate::table::RouteTable;

/// How often an unconfirmed leader is asked, and how long it may take to answer.
const PROBE_PAUSE: Duration = Duration::from_millis(500);
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// Publishes a table for every change of knowledge, until the sender of `knowledge` is gone.
pub async fn run(router: Arc<Router>, mut knowledge: watch::Receiver<Knowledge>) {
    let mut proof = Proof::default();
    loop {
        let known = knowledge.borrow_and_update().clone();
        let now = router.clock.now();
        let stale_at = known.confirmed_at.map(|confirmed| confirmed + router.limits.stale_after);
        let confirmed = stale_at.is_some_and(|stale| now < stale);
        if confirmed {
            proof = Proof::default();
        }
        if let Some(view) = &known.view {
            let table = RouteTable::from_view(view);
            router.publish(if confirmed { table } else { table.unconfirmed(proof.holds(view)) });
        }
        let wake = match stale_at {
            Some(stale) if confirmed => stale,
            _ => now + PROBE_PAUSE,
        };
        let changed = tokio::select! {
            biased;
            changed = knowledge.changed() => changed,
            () = router.clock.sleep_until(wake) => {
                if let (false, Some(view)) = (confirmed, &known.view) {
                    proof.renew(view, &mut knowledge).await;
                }
                Ok(())
            }
        };
        if changed.is_err() {
            info!("nobody follows the DCS any more");
            return;
        }
    }
}

/// Seconds since the DCS last confirmed what is known, -1 if it never did.
pub fn age(knowledge: &Knowledge, now: Instant) -> f64 {
    knowledge.confirmed_at.map_or(-1.0, |confirmed| now.since(confirmed).as_secs_f64())
}

/// What the leader of a view last said of itself.
#[derive(Debug, Default)]
struct Proof {
    given_by: Option<trunkline_common::cluster::LeaderKey>,
}

impl Proof {
    fn holds(&self, view: &ClusterView) -> bool {
        self.given_by.is_some() && self.given_by == view.leader
    }

    /// Asks again, unless the DCS is heard of first.
    async fn renew(&mut self, view: &ClusterView, knowledge: &mut watch::Receiver<Knowledge>) {
        let url = view.leader_member().and_then(|member| member.api_url.as_deref());
        let Some(url) = url else {
            *self = Proof::default();
            return;
        };
        let mut heard = knowledge.clone();
        let answer = tokio::select! {
            biased;
            _ = heard.changed() => return,
            answer = probe::is_primary(url, PROBE_LIMIT) => answer,
        };
        debug!(?answer, "asked the leader");
        self.given_by = answer.ok().and(view.leader.clone());
    }
}
