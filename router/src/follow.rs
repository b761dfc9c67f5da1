//! From what is known of the cluster to where sessions go.
//!
//! Knowledge is graded. *Confirmed*: the table follows the view. *Unconfirmed*, once the DCS has been silent for
//! `stale_after`: that the DCS does not answer is no sign of the leader's death, so every session goes on; but nobody would
//! tell us of a new leader either, so the members are asked over their REST APIs who holds the lock. New sessions go to
//! the one that proves it, and if that is another than before, the old one's end. *Gone*: only the DCS can say that, by
//! an absent key, and then it is at once.
//!
//! The members' word also counts where the DCS names a leader whose record does not say `primary` yet: Patroni writes that
//! seconds after the promotion.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tracing::{debug, info};
use trunkline_common::cluster::LeaderKey;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::{Clock, ClusterView, Instant, LeaseId, MemberName, Revision};

use crate::probe::Prober;
use crate::router::Router;
use crate::table::RouteTable;

/// How often the members are asked while the DCS is silent, and how long they may take to answer.
const PROBE_PAUSE: Duration = Duration::from_millis(500);
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// How often a new leader is asked whether its promotion is complete. One of ours has said so by then in its record.
const PROMOTION_PAUSE: Duration = Duration::from_millis(100);

/// So many questions in a row may go unanswered before a leader's word is over: a busy one must not lose its clients.
const PATIENCE: u32 = 2;

/// Publishes a table for every change of knowledge, until the sender of `knowledge` is gone.
pub async fn run(router: Arc<Router>, prober: Prober, mut knowledge: watch::Receiver<Knowledge>) {
    let mut heard = Heard::default();
    let mut asked_at = router.clock.now();
    loop {
        let known = knowledge.borrow_and_update().clone();
        let now = router.clock.now();
        let stale_at = known.confirmed_at.map(|confirmed| confirmed + router.limits.stale_after);
        let confirmed = stale_at.is_some_and(|stale| now < stale);
        let mut question = None;
        if let Some(view) = &known.view {
            heard.check(view, confirmed && known.trouble.is_none());
            let table = heard.table(view, confirmed);
            question = question_for(view, &table, confirmed && known.trouble.is_none());
            router.publish(table);
        }
        let ask_at = question.as_ref().map(|(_, pause)| asked_at + *pause);
        let stale_at = stale_at.filter(|_| confirmed);
        let wake = ask_at.into_iter().chain(stale_at).min().unwrap_or(now + PROBE_PAUSE);
        let changed = tokio::select! {
            biased;
            changed = knowledge.changed() => changed,
            () = router.clock.sleep_until(wake) => {
                if let (Some((members, _)), Some(view)) = (question, &known.view)
                    && ask_at.is_some_and(|at| at <= router.clock.now())
                {
                    heard.ask(&prober, view, members, knowledge.clone()).await;
                    asked_at = router.clock.now();
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

/// Who is to be asked whether it leads, and how often. `well`: the DCS confirms the view, and there is no doubt.
fn question_for(
    view: &ClusterView,
    table: &RouteTable,
    well: bool,
) -> Option<(BTreeMap<MemberName, String>, Duration)> {
    let urls = view.members.iter().filter_map(|(name, member)| Some((name.clone(), member.api_url.clone()?)));
    if !well {
        return Some((urls.collect(), PROBE_PAUSE));
    }
    let elected: BTreeMap<_, _> = urls.filter(|(name, _)| table.leader.is_none() && view.is_leader(name)).collect();
    (!elected.is_empty()).then_some((elected, PROMOTION_PAUSE))
}

/// What the members said of themselves.
#[derive(Debug, Default)]
struct Heard {
    /// Who said last that it leads. Kept while the DCS is silent: whoever led before has been deposed.
    leader: Option<MemberName>,
    /// The leader key and the holder's record that its word goes with: it is no answer to what was written later.
    about: Option<Subject>,
    /// Questions since then that were not answered.
    unanswered: u32,
}

impl Heard {
    /// Forgets what a newer view has overtaken.
    fn check(&mut self, view: &ClusterView, well: bool) {
        if well && self.about.as_ref().is_some_and(|about| *about != subject(view)) {
            *self = Self::default();
        }
    }

    fn proven(&self) -> Option<&MemberName> {
        self.leader.as_ref().filter(|_| self.unanswered < PATIENCE)
    }

    fn table(&self, view: &ClusterView, confirmed: bool) -> RouteTable {
        let table = match self.leader.as_ref().filter(|name| !confirmed || view.is_leader(name)) {
            Some(name) => RouteTable::from_view(&led_by(view, name)),
            None => RouteTable::from_view(view),
        };
        if confirmed { table } else { table.unconfirmed(self.proven().is_some()) }
    }

    /// Asks them, unless the DCS is heard of first.
    async fn ask(
        &mut self,
        prober: &Prober,
        view: &ClusterView,
        members: BTreeMap<MemberName, String>,
        mut knowledge: watch::Receiver<Knowledge>,
    ) {
        let ask = async |(name, url): (MemberName, String)| (name, prober.is_primary(&url, PROBE_LIMIT).await);
        let answers = tokio::select! {
            biased;
            _ = knowledge.changed() => return,
            answers = join_all(members.into_iter().map(ask)) => answers,
        };
        debug!(?answers, "asked who leads");
        self.hear(view, answers);
    }

    fn hear(&mut self, view: &ClusterView, answers: Vec<(MemberName, Result<bool, String>)>) {
        let leaders: Vec<&MemberName> =
            answers.iter().filter(|(_, answer)| *answer == Ok(true)).map(|(name, _)| name).collect();
        match leaders[..] {
            [leader] => {
                *self = Self { leader: Some(leader.clone()), about: Some(subject(view)), unanswered: 0 };
            }
            // Nobody, or more than one: whose word counted has not repeated it. A silent one gets another chance.
            _ => {
                let silent = |(name, answer): &(MemberName, Result<bool, String>)| {
                    Some(name) == self.leader.as_ref() && answer.is_err()
                };
                self.unanswered = match leaders.is_empty() && answers.iter().any(silent) {
                    true => self.unanswered.saturating_add(1),
                    false => PATIENCE,
                };
            }
        }
    }
}

/// What a member's word is about: the leader key as it was created, and role and state in its holder's record.
#[derive(Debug, PartialEq, Eq)]
struct Subject {
    key: Option<(MemberName, Revision)>,
    record: Option<(String, String)>,
}

fn subject(view: &ClusterView) -> Subject {
    Subject {
        key: view.leader.as_ref().map(|key| (key.name.clone(), key.created)),
        record: view.leader_member().map(|member| (member.role.clone(), member.state.clone())),
    }
}

/// The view as `leader`, who has proven it, would show it.
fn led_by(view: &ClusterView, leader: &MemberName) -> ClusterView {
    let mut view = view.clone();
    if !view.is_leader(leader) {
        // Its key has not been seen; what it was created at comes with the DCS, and with it another epoch.
        view.leader = Some(LeaderKey {
            name: leader.clone(),
            lease: LeaseId(0),
            created: view.revision,
            modified: view.revision,
        });
    }
    for (name, member) in &mut view.members {
        if name == leader {
            (member.role, member.state) = ("primary".to_owned(), "running".to_owned());
        }
    }
    view
}
