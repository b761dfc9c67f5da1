//! Routers and clients: whoever writes, through the real route table and past it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use trunkline_common::dcs::follow::{Follower, Knowledge};
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::{Clock, MemberName};
use trunkline_router::follow::{Grade, Question};
use trunkline_router::heard::Heard;
use trunkline_router::registration::{Registrar, Registration};
use trunkline_router::table::RouteTable;

use crate::commit::{self, Written};
use crate::executor::{ProcessId, SimClock};
use crate::peers::ModelProber;
use crate::scenario::End;
use crate::sessions::Open;
use crate::stage::{Stage, host_of, paths};

/// As long without a word of the DCS, and only proven leaders get new sessions.
const STALE_AFTER: Duration = Duration::from_secs(3);

/// How long a client waits for an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A router that runs: where sessions may go.
pub struct Router {
    /// Its process.
    pub process: ProcessId,
    /// Where it sends new sessions.
    pub tables: watch::Receiver<Arc<RouteTable>>,
}

/// What the clients of a world have seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Writes that a client was told are done.
    pub done: u64,
    /// When the last of them was.
    pub last: Duration,
    /// The longest time without one, once there had been one.
    pub longest: Duration,
}

impl Seen {
    fn note(&mut self, now: Duration) {
        if self.done > 0 {
            self.longest = self.longest.max(now.saturating_sub(self.last));
        }
        self.done += 1;
        self.last = now;
    }
}

impl Router {
    /// Starts one.
    pub fn start(
        stage: &Stage,
        router: usize,
        clock: SimClock,
        process: ProcessId,
        link: trunkline_common::dcs::memory::MemoryDcs<SimClock>,
    ) -> Self {
        let store = ClusterStore::new(link, paths());
        let registration = Registration::default();
        let registrar = Registrar::new(store.clone(), clock.clone(), format!("router{router}"), &registration);
        clock.spawn(registrar.run());
        let knowledge = Follower::spawn(store, clock.clone());
        let (publish, tables) = watch::channel(Arc::new(RouteTable::unknown()));
        let (routing, prober) = (stage.clone(), ModelProber::new(stage, router, clock.clone()));
        clock.clone().spawn(async move {
            route(routing, process, clock, prober, knowledge, registration, publish).await;
        });
        Self { process, tables }
    }

    /// A client that writes through this router, again and again.
    pub fn client(&self, stage: &Stage, router: usize, seen: Arc<Mutex<Seen>>) {
        let (stage, process, mut tables) = (stage.clone(), self.process, self.tables.clone());
        stage.executor().clone().spawn(self.process, async move {
            loop {
                // Held until there is a leader.
                let Ok(table) = tables.wait_for(|table| table.leader.is_some()).await.map(|table| table.clone()) else {
                    return;
                };
                let Some(leader) = &table.leader else { continue };
                if let Some(host) = host_of(&leader.host) {
                    let reign = table.reign.clone();
                    // One session: it ends with the leadership under which it was opened.
                    let mut ends = tables.clone();
                    let _open = Open::new(&stage, process, host);
                    tokio::select! {
                        biased;
                        _ = ends.wait_for(|table| table.reign != reign) => {}
                        () = session(&stage, End::Router(router), host, &seen) => {}
                    }
                }
                stage.micros(5_000..50_000).await;
            }
        });
    }
}

/// The router's own task: a table for every change of what it knows and hears, made as it is in the router that ships.
async fn route(
    stage: Stage,
    process: ProcessId,
    clock: SimClock,
    prober: ModelProber,
    mut knowledge: watch::Receiver<Knowledge>,
    registration: Registration,
    publish: watch::Sender<Arc<RouteTable>>,
) {
    let started = clock.now();
    let (mut heard, mut proved_last, mut asked_at) = (Heard::default(), None::<MemberName>, started);
    let mut registrations = registration.registered.subscribe();
    loop {
        let known = knowledge.borrow_and_update().clone();
        let now = clock.now();
        let grade = Grade::of(&known, started, STALE_AFTER, now);
        let lease = known.view.as_ref().map_or(Duration::ZERO, |view| view.settings.router_lease);
        let registered = *registrations.borrow_and_update();
        let lapses = registered.0.filter(|until| now < *until);
        let asks = lapses.map(|until| until - lease / 2).filter(|at| now < *at);
        let at_risk = !lease.is_zero() && !registered.holds(now + lease / 2);
        let mut question = None;
        if let Some(view) = &known.view {
            heard.restored(known.restores);
            let mut reading = heard.read(view, now, grade.confirmed, grade.well);
            let proven = reading.table.reign.as_ref().is_some_and(|reign| heard.proven() == Some(&reign.member));
            if !lease.is_zero() {
                reading.table = registered.restrict(reading.table, proven, now);
            }
            let promised = !lease.is_zero() && registered.0.is_some() && !proven;
            stage.sessions(|sessions| sessions.register(process, promised));
            let table = &reading.table;
            let holder = view.leader.as_ref().map(|key| &key.name);
            if heard.proven().is_some() {
                proved_last = heard.proven().cloned();
            }
            // The DCS's word counts where it is known. The key of a leader that may go on by failsafe mode vanishes, and where the
            // DCS is silent, members prove that they lead: then old sessions go on also while they don't answer any more.
            let listed =
                |target: &MemberName| view.failsafe.as_ref().is_some_and(|members| members.contains_key(target));
            let goes_on = |target: &MemberName| {
                let trusted = heard.suspect() == Some(target) && heard.waits_until(now).is_some();
                trusted && view.settings.failsafe_mode && listed(target)
            };
            let may = |target: &MemberName, word: Option<&MemberName>| match (grade.confirmed, holder) {
                (true, Some(holder)) => holder == target,
                (true, None) => goes_on(target),
                (false, _) => holder == Some(target) || word == Some(target) || goes_on(target),
            };
            let new = table.leader.iter().map(|leader| (&leader.member, heard.proven()));
            let old = table.reign.iter().map(|reign| (&reign.member, proved_last.as_ref()));
            for (target, _) in new.chain(old).filter(|(target, word)| !may(target, *word)) {
                stage.judge(|judge, now| judge.routes(now, holder, target));
            }
            let unwanted = |name: &MemberName| view.members.get(name).is_some_and(|m| m.tag_is_true("noloadbalance"));
            if let Some(standby) = table.standbys.iter().find(|standby| unwanted(&standby.member)) {
                let what = format!("a router sends reads to {}, which is tagged noloadbalance", standby.member);
                stage.judge(|judge, now| judge.violation(now, what));
            }
            publish.send_if_modified(|old| {
                let changed = **old != *table;
                if changed {
                    *old = Arc::new(table.clone());
                }
                changed
            });
            question = Question::of(&heard, reading, now, grade.well, at_risk);
        }
        // Its sessions end before that is written.
        let epoch = known.view.as_ref().and_then(|view| view.leader.as_ref()).map(|key| key.created);
        registration.follow(lease, epoch);
        let ask_at = question.as_ref().map(|question| asked_at + question.pause);
        let events =
            ask_at.into_iter().chain(Some(grade.stale_at).filter(|_| grade.fresh)).chain(heard.waits_until(now));
        let events = events.chain(lapses).chain(asks);
        let wake = events.min().unwrap_or(now + Duration::from_secs(1));
        tokio::select! {
            biased;
            changed = knowledge.changed() => if changed.is_err() { return },
            changed = registrations.changed() => if changed.is_err() { return },
            () = clock.sleep_until(wake) => {
                let asked = clock.now();
                if let Some(question) = question.filter(|_| ask_at.is_some_and(|at| at <= asked)) {
                    let answers = tokio::select! {
                        biased;
                        () = clock.sleep_until(lapses.unwrap_or_default()), if lapses.is_some() => None,
                        answers = question.ask(&prober, knowledge.clone()) => answers,
                    };
                    if let Some(answers) = answers {
                        heard.hear(&question.reading.view, &answers, asked);
                    }
                    asked_at = clock.now();
                }
            }
        }
    }
}

/// A client's session with one server: writes until something goes wrong.
async fn session(stage: &Stage, from: End, host: usize, seen: &Mutex<Seen>) {
    let to = End::Postgres(host);
    stage.micros(200..2_000).await;
    if !stage.talks(from, to) {
        stage.executor().sleep(Duration::from_millis(500)).await;
        return;
    }
    let number = stage.server(host, |server| match (server.running(), server.open(stage)) {
        (Some(_), None) => None,
        (postmaster, _) => Some(postmaster.map(|postmaster| postmaster.number)),
    });
    let Some(number) = number else {
        stage.executor().sleep(PATIENCE).await;
        return;
    };
    let Some(number) = number else { return };
    loop {
        let id = stage.number();
        stage.micros(100..500).await;
        if !stage.network(|network| network.open(from, to)) {
            stage.executor().sleep(PATIENCE).await;
            return;
        }
        let written = tokio::select! {
            biased;
            written = commit::write(stage, host, number, id) => written,
            () = stage.executor().sleep(PATIENCE) => Written::Unknown,
        };
        if written != Written::Done {
            return;
        }
        if !stage.network(|network| network.open(to, from)) {
            return;
        }
        seen.lock().note(stage.executor().now());
        stage.micros(20_000..120_000).await;
    }
}

/// A client that knows nothing of routers and tries one server, again and again.
pub fn direct(stage: &Stage, process: ProcessId, host: usize) {
    let writing = stage.clone();
    stage.executor().spawn(process, async move {
        let seen = Mutex::default();
        loop {
            let primary = writing.server(host, |server| server.is_primary());
            if primary {
                session(&writing, End::Router(usize::MAX), host, &seen).await;
            }
            writing.micros(20_000..200_000).await;
        }
    });
}
