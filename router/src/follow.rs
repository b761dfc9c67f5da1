//! From what is known of the cluster to where sessions go.
//!
//! Knowledge is graded. *Confirmed*: the table follows the view. *Unconfirmed*, once the DCS has been silent for
//! `stale_after`: that the DCS does not answer is no sign of the leader's death, so every session goes on; but nobody would
//! tell us of a new leader either, so the members are asked over their REST APIs who holds the lock. New sessions go to
//! the one that proves it, and if that is another than before, the old one's end. *Gone*: only the DCS can say that, by
//! another one's key or an absent one, and then it is at once. An absent key says less where failsafe mode is on: its
//! holder may lead on by the promise of all members. It is asked, and its sessions go on while it proves that.
//!
//! A DCS that has never been reached leaves nothing to go by but members that the configuration names; they are asked in the
//! same way.
//!
//! The members' word also counts where the DCS names a leader whose record does not say `primary` yet: Patroni writes that
//! seconds after the promotion.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tracing::{debug, info};
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::{Clock, ClusterView, Instant, MemberName};

use crate::heard::{Answer, Heard, Reading, subject};
use crate::lag::Lags;
use crate::probe::{Probe, Prober};
use crate::router::Router;

/// How often the members are asked while the DCS is silent, and how long they may take to answer.
const PROBE_PAUSE: Duration = Duration::from_millis(500);
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// How often a new leader is asked whether its promotion is complete (one of ours has said so by then in its record), and
/// one without its key whether it leads on.
const PROMOTION_PAUSE: Duration = Duration::from_millis(100);

/// Publishes a table for every change of knowledge, until the sender of `knowledge` is gone.
/// `seed`: the members that are asked while the DCS has never been reached.
pub async fn run(
    router: Arc<Router>,
    prober: Prober,
    mut knowledge: watch::Receiver<Knowledge>,
    seed: Option<ClusterView>,
) {
    let started = router.clock.now();
    let (mut heard, mut lags) = (Heard::default(), Lags::default());
    let mut measured = router.measured.subscribe();
    let mut registration = router.registration.registered.subscribe();
    let mut asked_at = router.clock.now();
    loop {
        let known = knowledge.borrow_and_update().clone();
        let now = router.clock.now();
        let Grade { stale_at, fresh, confirmed, well } = Grade::of(&known, started, router.limits().stale_after, now);
        let lease = known.view.as_ref().map_or(Duration::ZERO, |view| view.settings.router_lease);
        let registered = *registration.borrow_and_update();
        let lapses = registered.0.filter(|until| now < *until);
        let asks = lapses.map(|until| until - lease / 2).filter(|at| now < *at);
        let at_risk = !lease.is_zero() && !registered.holds(now + lease / 2);
        let mut question = None;
        heard.restored(known.restores);
        let reading = match (&known.view, &seed) {
            (Some(view), _) => Some(heard.read(view, now, confirmed, well)),
            (None, Some(seed)) if !fresh => Some(heard.read_seed(seed, now)),
            (None, _) => None,
        };
        if let Some(mut reading) = reading {
            lags.complete(&mut reading.table, &reading.view, &measured.borrow_and_update(), now);
            if !lease.is_zero() {
                let proven = reading.table.reign.as_ref().is_some_and(|reign| heard.proven() == Some(&reign.member));
                reading.table = registered.restrict(reading.table, proven, now);
            }
            router.publish(reading.table.clone());
            router.sessions.set_word(heard.word());
            question = Question::of(&heard, reading, now, well, at_risk);
        }
        // Only now: whoever is told may lead at once.
        let epoch = known.view.as_ref().and_then(|view| view.leader.as_ref()).map(|key| key.created);
        router.registration.follow(lease, epoch);
        let ask_at = question.as_ref().map(|question| asked_at + question.pause);
        let stale_at = Some(stale_at).filter(|_| fresh);
        let heard_by = heard.waits_until(now).into_iter().chain(heard.excludes_until());
        let events = ask_at.into_iter().chain(stale_at).chain(heard_by).chain(lapses).chain(asks);
        let wake = events.min().unwrap_or(now + PROBE_PAUSE);
        let changed = tokio::select! {
            biased;
            changed = knowledge.changed() => changed,
            changed = measured.changed() => changed,
            changed = registration.changed() => changed,
            () = router.clock.sleep_until(wake) => {
                let asked = router.clock.now();
                if let Some(question) = question.filter(|_| ask_at.is_some_and(|at| at <= asked)) {
                    // A leader that keeps the router waiting must not keep its sessions by that.
                    let answers = tokio::select! {
                        biased;
                        () = router.clock.sleep_until(lapses.unwrap_or_default()), if lapses.is_some() => None,
                        answers = question.ask(&prober, knowledge.clone()) => answers,
                    };
                    if let Some(answers) = answers {
                        heard.hear(&question.reading.view, &answers, asked);
                    }
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

/// How good knowledge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grade {
    /// When it is not fresh any more.
    pub stale_at: Instant,
    /// The DCS has not been silent for too long, or is still given its time to be read for the first time.
    pub fresh: bool,
    /// It has been read, and has not been silent for too long.
    pub confirmed: bool,
    /// Nor is there any doubt.
    pub well: bool,
}

impl Grade {
    /// Of what is known at `now` to who has followed since `started`.
    pub fn of(known: &Knowledge, started: Instant, stale_after: Duration, now: Instant) -> Self {
        let stale_at = known.confirmed_at.unwrap_or(started) + stale_after;
        let fresh = now < stale_at;
        let confirmed = fresh && known.confirmed_at.is_some();
        Self { stale_at, fresh, confirmed, well: confirmed && known.trouble.is_none() }
    }
}

/// Seconds since the DCS last confirmed what is known, -1 if it never did.
pub fn age(knowledge: &Knowledge, now: Instant) -> f64 {
    knowledge.confirmed_at.map_or(-1.0, |confirmed| now.since(confirmed).as_secs_f64())
}

/// Who is to be asked whether it leads, and how often.
#[derive(Debug)]
pub struct Question {
    /// What was known when it came up.
    pub reading: Reading,
    /// After which pause to ask, and to ask again.
    pub pause: Duration,
    /// Their REST APIs.
    members: BTreeMap<MemberName, String>,
    /// It is about a leader whose key has vanished: only another key makes the answer worthless.
    vacant: bool,
    /// The DCS speaks, and its word is good.
    well: bool,
}

impl Question {
    /// `well`: the DCS confirms the view, and there is no doubt. `at_risk`: the leader's sessions end soon unless it proves
    /// itself.
    pub fn of(heard: &Heard, reading: Reading, now: Instant, well: bool, at_risk: bool) -> Option<Self> {
        let view = &reading.view;
        let urls = view.members.iter().filter_map(|(name, member)| Some((name.clone(), member.api_url.clone()?)));
        let suspect = heard.suspect().filter(|_| well);
        let (members, pause): (BTreeMap<_, _>, _) = match suspect {
            Some(name) => {
                let url = view.failsafe.as_ref().and_then(|members| members.get(name));
                let waited_for = heard.proven().is_none() && heard.waits_until(now).is_some();
                let pause = if waited_for { PROMOTION_PAUSE } else { PROBE_PAUSE };
                (url.map(|url| (name.clone(), url.clone())).into_iter().collect(), pause)
            }
            None if !well => (urls.collect(), PROBE_PAUSE),
            None => {
                let unclear = reading.table.leader.is_none() && !reading.table.resigns;
                let elected = |name: &MemberName| (unclear || at_risk) && view.is_leader(name);
                let pause = if unclear { PROMOTION_PAUSE } else { PROBE_PAUSE };
                (urls.filter(|(name, _)| elected(name)).collect(), pause)
            }
        };
        let vacant = suspect.is_some();
        (!members.is_empty() || !well).then_some(Self { reading, members, pause, vacant, well })
    }

    /// Asks them, unless the DCS has an answer first: another [subject], or that it speaks again. Most of what it says is
    /// about something else, and comes more often than some members answer.
    pub async fn ask(&self, prober: &impl Probe, mut knowledge: watch::Receiver<Knowledge>) -> Option<Vec<Answer>> {
        let about = |known: &Knowledge| known.view.as_deref().map(subject);
        let (asked_about, confirmed_at) = {
            let known = knowledge.borrow();
            if known.has_changed() && !self.vacant {
                return None;
            }
            (about(&known), known.confirmed_at)
        };
        let says = |known: &Knowledge| match self.vacant {
            true => known.view.as_ref().is_some_and(|view| view.leader.is_some()),
            false => {
                let speaks_again = !self.well && known.trouble.is_none() && known.confirmed_at != confirmed_at;
                speaks_again || about(known) != asked_about
            }
        };
        // An error means that nobody follows the DCS any more.
        let answered_by_dcs = async { drop(knowledge.wait_for(says).await.map(drop)) };
        let ask = async |(name, url): (&MemberName, &String)| (name.clone(), prober.is_primary(url, PROBE_LIMIT).await);
        let answers = tokio::select! {
            biased;
            () = answered_by_dcs => return None,
            answers = join_all(self.members.iter().map(ask)) => answers,
        };
        debug!(?answers, "asked who leads");
        Some(answers)
    }
}
