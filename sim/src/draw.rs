//! How a world is drawn from a seed: its nodes, its settings, and what goes wrong in it.

pub mod scenes;

use std::ops::RangeInclusive;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

use crate::scenario::{Aim, End, Event, Fault, Node, Scenario};

impl Scenario {
    /// Draws one.
    pub fn draw(seed: u64) -> Self {
        Self::draw_with(seed, None)
    }

    /// Draws one that has a certain scene of [`scenes::names`], whatever else it has.
    pub fn draw_with(seed: u64, scene: Option<&str>) -> Self {
        // Not the numbers that the world itself draws.
        let mut rng = SmallRng::seed_from_u64(seed ^ 0x5EED_0000_0000);
        let count = *[2, 3, 3, 3, 3, 4, 5].choose(&mut rng).unwrap_or(&3);
        let priority = |rng: &mut SmallRng| if rng.random_ratio(1, 8) { rng.random_range(0..3) } else { 1 };
        let mut nodes: Vec<Node> = (0..count)
            .map(|_| Node {
                ppm: rng.random_range(-500..=500),
                priority: priority(&mut rng),
                watchdog: false,
                tags: Map::new(),
            })
            .collect();
        // At least two that may lead, or nothing of interest happens.
        nodes[0].priority = nodes[0].priority.max(1);
        nodes[1].priority = nodes[1].priority.max(1);
        if rng.random_ratio(1, 4) {
            nodes.iter_mut().for_each(|node| node.tags = tags(&mut rng, count));
        }
        let synchronous = rng.random_ratio(2, 3);
        let mode = if synchronous && rng.random_ratio(1, 3) { json!("quorum") } else { json!(synchronous) };
        let ttl = *[2, 3, 5, 5, 5, 10].choose(&mut rng).unwrap_or(&5);
        let settings = json!({
            "ttl": ttl,
            "loop_wait": 1,
            "retry_timeout": 1,
            "maximum_lag_on_failover": *[640u64, 6_400, 1_048_576].choose(&mut rng).unwrap_or(&6_400),
            "primary_start_timeout": *[0u64, 2, 300].choose(&mut rng).unwrap_or(&2),
            "primary_stop_timeout": *[0u64, 0, 0, 1, 5].choose(&mut rng).unwrap_or(&0),
            "primary_race_backoff": *[0u64, 0, 0, 1].choose(&mut rng).unwrap_or(&0),
            "maximum_lag_on_syncnode": *[-1i64, -1, 640, 6_400].choose(&mut rng).unwrap_or(&-1),
            "synchronous_mode": mode,
            "synchronous_mode_strict": synchronous && rng.random_ratio(1, 4),
            "synchronous_node_count": if count > 3 && rng.random() { 2 } else { 1 },
            "check_timeline": rng.random_ratio(1, 4),
            "failsafe_mode": rng.random_ratio(1, 3),
            "slots": if rng.random_ratio(1, 8) { json!({ "archive": { "type": "physical" } }) } else { json!({}) },
            "postgresql": {
                "use_pg_rewind": rng.random_ratio(7, 8),
                "remove_data_directory_on_rewind_failure": rng.random::<bool>(),
            },
        });
        let routers = rng.random_range(1..=2);
        let mut draw = Draw { shares: shares(&mut rng), rng, count, routers, ttl: ttl * 1000, synchronous };
        let events = draw.events();
        let calm_at = events.iter().map(Event::ends).max().unwrap_or(0).max(BOOTSTRAP) + 100;
        let mut scenario = Self { seed, nodes, routers, settings, events, calm_at };
        scenes::add(seed, scene, &mut scenario);
        scenario
    }
}

impl Scenario {
    fn add(&mut self, at: u64, aim: Option<Aim>, what: Fault) {
        let event = Event { at, aim, what };
        self.calm_at = self.calm_at.max(event.ends() + 100);
        self.events.push(event);
        self.events.sort_by_key(|event| event.at);
    }
}

/// Nothing goes wrong until here, so that there is a cluster to break.
const BOOTSTRAP: u64 = 4_000;

/// Where a node copies and streams from, if not from the leader, and that no commit waits for it.
fn tags(rng: &mut SmallRng, count: usize) -> Map<String, Value> {
    let mut tags = Map::new();
    if rng.random_ratio(1, 4) {
        tags.insert("replicatefrom".to_owned(), Value::from(format!("n{}", rng.random_range(0..count))));
    }
    if rng.random_ratio(1, 8) {
        tags.insert("nosync".to_owned(), Value::from(true));
    }
    tags
}

/// What is drawn first of a [`Fault`].
#[derive(Debug, Clone, Copy)]
enum Kind {
    KillAgent,
    StopAgent,
    KillPostgres,
    CrashHost,
    FreezeAgent,
    FreezePostgres,
    FreezeHost,
    FreezeRouter,
    Cut,
    Isolate,
    DcsDown,
    DcsLeaderChange,
    LoseAnswers,
    SlowDcs,
    SlowWatch,
    LoseEvents,
    BreakWatches,
    Compact,
    DiskFull,
    SlowDisk,
    WallJump,
    Failover,
    Switchover,
    Restart,
    Reinitialize,
    Configure,
    Pause,
}

/// How often each kind is drawn, of a hundred, where a world has no liking of its own.
const SHARES: [(Kind, u32); 27] = [
    (Kind::KillAgent, 8),
    (Kind::StopAgent, 3),
    (Kind::KillPostgres, 7),
    (Kind::CrashHost, 6),
    (Kind::FreezeAgent, 5),
    (Kind::FreezePostgres, 5),
    (Kind::FreezeHost, 7),
    (Kind::FreezeRouter, 2),
    (Kind::Cut, 13),
    (Kind::Isolate, 5),
    (Kind::DcsDown, 3),
    (Kind::DcsLeaderChange, 4),
    (Kind::LoseAnswers, 4),
    (Kind::SlowDcs, 4),
    (Kind::SlowWatch, 3),
    (Kind::LoseEvents, 2),
    (Kind::BreakWatches, 2),
    (Kind::Compact, 1),
    (Kind::DiskFull, 2),
    (Kind::SlowDisk, 3),
    (Kind::WallJump, 1),
    (Kind::Failover, 1),
    (Kind::Switchover, 4),
    (Kind::Restart, 2),
    (Kind::Reinitialize, 1),
    (Kind::Configure, 3),
    (Kind::Pause, 1),
];

/// What a world is fond of: most have no fault of some kinds and many of others. Two rare ones seldom meet where all are
/// drawn alike, and a common one can hide what another would show.
fn shares(rng: &mut SmallRng) -> Vec<(Kind, u32)> {
    if rng.random_ratio(1, 4) {
        return SHARES.to_vec();
    }
    let liking = |rng: &mut SmallRng| *[0, 0, 1, 1, 1, 6].choose(rng).unwrap_or(&1);
    SHARES.iter().map(|(kind, share)| (*kind, share * liking(rng))).collect()
}

struct Draw {
    rng: SmallRng,
    shares: Vec<(Kind, u32)>,
    count: usize,
    routers: usize,
    ttl: u64,
    synchronous: bool,
}

impl Draw {
    fn events(&mut self) -> Vec<Event> {
        // A bootstrap is a time to fail in, too: some worlds break from the start, and end soon.
        let (mut at, until, paces) = match self.rng.random_range(0..10) {
            0..2 => (0, self.rng.random_range(1_000..8_000), [100u64, 300, 1_000]),
            2 => (0, self.rng.random_range(8_000..40_000), [500, 2_000, 5_000]),
            _ => (BOOTSTRAP, self.rng.random_range(10_000..40_000), [500, 2_000, 5_000]),
        };
        let pace = *paces.choose(&mut self.rng).unwrap_or(&2_000);
        let mut events = self.scenes(at);
        if !events.is_empty() && self.rng.random_ratio(3, 4) {
            // Among many others, faults that have to come in their order seldom do.
            at = until;
        }
        while at < until {
            at += self.rng.random_range(1..pace * 2);
            let first = self.event(at);
            let lasts = first.ends() - at;
            events.push(first);
            if self.rng.random_ratio(1, 8) {
                self.hunt(at, &mut events);
            }
            // Trouble seldom comes alone: right after it, or while it lasts.
            let within = *[0, 0, 200, lasts.max(1)].choose(&mut self.rng).unwrap_or(&0);
            if within > 0 {
                let at = at + self.rng.random_range(0..within);
                events.push(self.event(at));
            }
        }
        if self.rng.random_ratio(1, 6) {
            let last = events.last().map_or(BOOTSTRAP, |event| event.at);
            let at = self.rng.random_range(BOOTSTRAP..=last.max(BOOTSTRAP));
            let (node, ms) = (self.rng.random_range(0..self.count), self.rng.random_range(1_000..30_000));
            let aim = self.rng.random::<bool>().then_some(Aim::Synchronous);
            events.push(Event { at, aim, what: Fault::RefusePromotion { node, ms } });
        }
        if self.rng.random_ratio(1, 64) {
            // A world of its own: anything besides would be in the way.
            events = self.hard_start();
        }
        events.sort_by_key(|event| event.at);
        events
    }

    /// Several faults in an order that matters, in some of the worlds.
    fn scenes(&mut self, after: u64) -> Vec<Event> {
        let mut events = Vec::new();
        if after == 0 && self.rng.random() {
            self.hard_bootstrap(&mut events);
        }
        if self.synchronous && self.rng.random_ratio(1, 8) {
            self.hard_change_of_mode(after, &mut events);
        }
        if self.synchronous && self.rng.random_ratio(1, 8) {
            self.hard_return(after, &mut events);
        }
        if !self.synchronous && self.count == 3 && self.rng.random_ratio(1, 8) {
            self.hard_succession(after, &mut events);
        }
        if self.rng.random_ratio(1, 16) {
            self.hard_promise(after, &mut events);
        }
        if self.synchronous && self.rng.random_ratio(1, 16) {
            self.hard_promotion(after, &mut events);
        }
        events
    }

    /// Whoever makes the cluster has a slow disk, and loses its right meanwhile.
    fn hard_bootstrap(&mut self, events: &mut Vec<Event>) {
        let slow = self.rng.random_range(50..600);
        let lost = slow + self.rng.random_range(0..4_000);
        let lasts = self.rng.random_range(self.ttl..self.ttl * 3);
        let faults = [(slow, Fault::SlowDisk { node: 0, ms: 15_000 }), (lost, self.outage(lasts))];
        events.extend(faults.map(|(at, what)| Event { at, aim: Some(Aim::Leader), what }));
    }

    /// The way to wait for standbys changes while one of them gets nothing, and leaders are out one after the other: the
    /// first of them does not see the change, the next one is soon gone.
    fn hard_change_of_mode(&mut self, after: u64, events: &mut Vec<Event>) {
        let quorum = after + self.rng.random_range(500..3_000);
        let behind = quorum + self.rng.random_range(2_000..5_000);
        let first = behind + self.rng.random_range(0..1_500);
        let on = first + self.rng.random_range(0..1_000);
        let second = first + self.rng.random_range(0..self.ttl + 2_500);
        let mode = |at, patch| Event { at, aim: None, what: Fault::Configure { patch } };
        let strict = self.rng.random_ratio(3, 4);
        events.push(mode(quorum, json!({ "synchronous_mode": "quorum" })));
        events.push(mode(on, json!({ "synchronous_mode": true, "synchronous_mode_strict": strict })));
        let standby = self.rng.random_range(0..self.count);
        let ms = self.rng.random_range(self.ttl..self.ttl * 4);
        let cut = |other| Fault::Cut { from: End::Postgres(standby), to: End::Postgres(other), both: true, ms };
        let others = (0..self.count).filter(|other| *other != standby);
        events.extend(others.map(|other| Event { at: behind, aim: None, what: cut(other) }));
        let (second, aim) = if self.rng.random() { (second, Aim::Leader) } else { (first, Aim::NextLeader) };
        for (at, aim) in [(first, Aim::Leader), (second, aim)] {
            let lasts = self.rng.random_range(self.ttl * 2..self.ttl * 4);
            let what = if self.rng.random_ratio(3, 4) { self.host_outage(lasts) } else { self.outage(lasts) };
            events.push(Event { at, aim: Some(aim), what });
        }
    }

    /// A synchronous standby is back while the leader's requests are slow, so that what is written of it comes late: the leader has
    /// crashed meanwhile, its server has come back in place, its agent stands still, and nobody gets its WAL any more.
    fn hard_return(&mut self, after: u64, events: &mut Vec<Event>) {
        let node = 0;
        let gone = after + self.rng.random_range(3_000..8_000);
        let back = gone + self.rng.random_range(1_500..4_000);
        let slow = back - self.rng.random_range(0..500);
        let crash = back + self.rng.random_range(300..2_500);
        let again = self.rng.random_range(1..200);
        let still = crash + again + self.rng.random_range(5..150);
        let request = self.rng.random_range(800..4_000);
        let ms = self.ttl * 3;
        let aimed = |at, aim, what| Event { at, aim: Some(aim), what };
        // Its connection is gone at once, so that the leader takes it off the key.
        events.push(aimed(gone, Aim::Synchronous, Fault::KillAgent { node, ms: back - gone }));
        events.push(aimed(gone, Aim::Synchronous, Fault::KillPostgres { node }));
        events.push(aimed(slow, Aim::Leader, Fault::SlowDcs { node, request, answer: 50, ms: crash - slow }));
        events.push(aimed(crash, Aim::Leader, Fault::KillAgent { node, ms: again }));
        events.push(aimed(crash, Aim::Leader, Fault::KillPostgres { node }));
        for one in 0..self.count {
            let pair = |other| Fault::Cut { from: End::Postgres(one), to: End::Postgres(other), both: true, ms };
            events.extend((0..one).map(|other| Event { at: crash, aim: None, what: pair(other) }));
        }
        events.push(aimed(still, Aim::Leader, Fault::FreezeAgent { node, ms }));
    }

    /// Two leaders go, one soon after the other, and whoever is left hears late of all that: of the time between the two when the
    /// second one is gone as well.
    fn hard_succession(&mut self, after: u64, events: &mut Vec<Event>) {
        let late = self.rng.random_range(0..self.count);
        let delay = self.rng.random_range(6_000..9_000);
        let first = after + self.rng.random_range(1_000..4_000);
        // A leader that stops waits five seconds for somebody who has everything.
        let second = first + self.ttl + delay - 5_000 - self.rng.random_range(0..1_200);
        let ms = self.ttl + 15_000;
        let aimed = |at, aim, what| Event { at, aim, what };
        events.push(aimed(first, None, Fault::SlowWatch { node: late, delay, ms }));
        for other in (0..self.count).filter(|other| *other != late) {
            let cut = Fault::Cut { from: End::Postgres(late), to: End::Postgres(other), both: true, ms };
            events.push(aimed(first, None, cut));
        }
        events.push(aimed(first, Some(Aim::Leader), self.host_outage(ms)));
        events.push(aimed(second, Some(Aim::Leader), Fault::StopAgent { node: 0, ms }));
    }

    /// A leader whose renewal got lost has the word of everybody on the list for failsafe mode. The DCS is there meanwhile, and
    /// with it a member that had been away and was taken off the list; then the leader is cut off from everybody.
    fn hard_promise(&mut self, after: u64, events: &mut Vec<Event>) {
        let away = self.rng.random_range(0..self.count);
        let gone = after + self.rng.random_range(500..2_000);
        let lost = gone + self.ttl + self.rng.random_range(2_000..4_000);
        let cut = self.rng.random_range(200..900);
        let back = lost + self.rng.random_range(0..1_000);
        let again = lost + cut.max(700) + self.rng.random_range(0..700);
        let event = |at, aim, what| Event { at, aim, what };
        events.push(event(gone, None, Fault::Configure { patch: json!({ "failsafe_mode": true, "ttl": 2 }) }));
        events.push(event(gone, None, Fault::KillAgent { node: away, ms: back - gone }));
        let from_dcs = Fault::Cut { from: End::Agent(0), to: End::Dcs, both: true, ms: cut };
        events.push(event(lost, Some(Aim::Leader), from_dcs));
        events.push(event(
            again,
            Some(Aim::Leader),
            Fault::Isolate { node: 0, ms: self.rng.random_range(1_000..4_000) },
        ));
    }

    /// Whoever takes the leader key next has a slow disk, and its agent is killed and started anew while it prepares to be
    /// promoted; nobody else gets its WAL, and it is out soon after.
    fn hard_promotion(&mut self, after: u64, events: &mut Vec<Event>) {
        let node = 0;
        let at = after + self.rng.random_range(1_000..4_000);
        let (short, soon) = (self.rng.random_range(20..400), at + self.rng.random_range(1..30));
        let out = self.host_outage(self.ttl * 4);
        let event = |at, aim, what| Event { at, aim: Some(aim), what };
        if self.rng.random() {
            let quorum = json!({ "synchronous_mode": "quorum" });
            events.push(Event { at: after + 500, aim: None, what: Fault::Configure { patch: quorum } });
        }
        events.push(event(at, Aim::NextLeader, Fault::SlowDisk { node, ms: 6_000 }));
        events.push(event(soon, Aim::NextLeader, Fault::KillAgent { node, ms: short }));
        events.push(event(at + self.ttl + 5_000, Aim::Leader, self.host_outage(self.ttl * 2)));
        events.push(event(at + 40, Aim::Leader, out));
    }

    /// A leader's agent is started anew, finds that it is to hand over, and is stopped at once.
    fn hard_start(&mut self) -> Vec<Event> {
        let at = BOOTSTRAP + self.rng.random_range(0..4_000);
        let ms = self.rng.random_range(50..1_000);
        let stop = at + ms + self.rng.random_range(0..60);
        let aimed = |at, what| Event { at, aim: Some(Aim::Leader), what };
        vec![
            aimed(at, Fault::KillAgent { node: 0, ms }),
            aimed(at + 1, Fault::Switchover { candidate: None }),
            aimed(stop, Fault::StopAgent { node: 0, ms: 5_000 }),
        ]
    }

    /// A node, or its agent, is out for so long.
    fn outage(&mut self, ms: u64) -> Fault {
        let node = 0;
        match self.rng.random_range(0..6) {
            0 => Fault::Cut { from: End::Agent(node), to: End::Dcs, both: true, ms },
            1 => Fault::FreezeAgent { node, ms },
            2 => Fault::KillPostgres { node },
            _ => self.host_outage(ms),
        }
    }

    /// A host is out for so long, with all that runs on it.
    fn host_outage(&mut self, ms: u64) -> Fault {
        let node = 0;
        let kinds = [Fault::Isolate { node, ms }, Fault::CrashHost { node, ms }, Fault::FreezeHost { node, ms }];
        kinds.choose(&mut self.rng).cloned().unwrap_or(Fault::CrashHost { node, ms })
    }

    /// One leader after the other is hit, each soon after it began, or as it begins.
    fn hunt(&mut self, mut at: u64, events: &mut Vec<Event>) {
        events.push(Event { at, aim: Some(Aim::Leader), what: self.fault() });
        for _ in 0..self.rng.random_range(1..4) {
            let aim = if self.rng.random() { Aim::Leader } else { Aim::NextLeader };
            events.push(Event { at, aim: Some(aim), what: self.fault() });
            let within = *[100, 1_000, 3_000].choose(&mut self.rng).unwrap_or(&1_000);
            at += self.rng.random_range(1..within);
        }
    }

    /// Most faults hit anybody; what decides over a cluster is what happens to its leader.
    fn event(&mut self, at: u64) -> Event {
        let aim = match self.rng.random_range(0..16) {
            0..4 => Some(Aim::Leader),
            4..6 => Some(Aim::Synchronous),
            6 => Some(Aim::NextLeader),
            _ => None,
        };
        Event { at, aim, what: self.fault() }
    }

    fn fault(&mut self) -> Fault {
        let node = self.rng.random_range(0..self.count);
        let router = self.rng.random_range(0..self.routers);
        let ms = self.duration();
        let chosen = self.shares.choose_weighted(&mut self.rng, |(_, share)| *share);
        match chosen.map_or(Kind::KillPostgres, |(kind, _)| *kind) {
            Kind::KillAgent => Fault::KillAgent { node, ms },
            Kind::StopAgent => Fault::StopAgent { node, ms },
            Kind::KillPostgres => Fault::KillPostgres { node },
            Kind::CrashHost => Fault::CrashHost { node, ms },
            Kind::FreezeAgent => Fault::FreezeAgent { node, ms },
            Kind::FreezePostgres => Fault::FreezePostgres { node, ms },
            Kind::FreezeHost => Fault::FreezeHost { node, ms },
            Kind::FreezeRouter => Fault::FreezeRouter { router, ms },
            Kind::Cut => {
                let (from, to) = self.ends();
                Fault::Cut { from, to, both: self.rng.random(), ms }
            }
            Kind::Isolate => Fault::Isolate { node, ms },
            Kind::DcsDown => Fault::DcsDown { refused: self.rng.random(), ms },
            Kind::DcsLeaderChange => Fault::DcsLeaderChange { ms: self.rng.random_range(0..3_000) },
            Kind::LoseAnswers => Fault::LoseAnswers { node, count: self.rng.random_range(1..4) },
            Kind::SlowDcs => {
                let delays: RangeInclusive<u64> = 0..=*[50u64, 800, 4_000].choose(&mut self.rng).unwrap_or(&50);
                Fault::SlowDcs {
                    node,
                    request: self.rng.random_range(delays.clone()),
                    answer: self.rng.random_range(delays),
                    ms,
                }
            }
            Kind::SlowWatch => Fault::SlowWatch { node, delay: self.rng.random_range(10..3_000), ms },
            Kind::LoseEvents => Fault::LoseEvents { node, count: self.rng.random_range(1..6) },
            Kind::BreakWatches => Fault::BreakWatches,
            Kind::Compact => Fault::Compact,
            Kind::DiskFull => Fault::DiskFull { node, ms },
            Kind::SlowDisk => Fault::SlowDisk { node, ms },
            Kind::WallJump => Fault::WallJump { node, by: self.rng.random_range(-3_600_000..3_600_000) },
            Kind::Failover if !self.synchronous => Fault::Failover { candidate: node },
            Kind::Failover | Kind::Switchover => {
                Fault::Switchover { candidate: self.rng.random::<bool>().then_some(node) }
            }
            Kind::Restart => Fault::Restart { node },
            Kind::Reinitialize => Fault::Reinitialize { node },
            Kind::Configure => Fault::Configure { patch: self.patch() },
            Kind::Pause => Fault::Pause { ms },
        }
    }

    /// From a blink to far beyond the lease.
    fn duration(&mut self) -> u64 {
        match self.rng.random_range(0..4) {
            0 => self.rng.random_range(1..500),
            1 => self.rng.random_range(500..self.ttl),
            2 => self.rng.random_range(self.ttl * 8 / 10..self.ttl * 12 / 10),
            _ => self.rng.random_range(self.ttl..self.ttl * 3),
        }
    }

    fn ends(&mut self) -> (End, End) {
        let node = self.rng.random_range(0..self.count);
        let other = (node + self.rng.random_range(1..self.count)) % self.count;
        let router = self.rng.random_range(0..self.routers);
        match self.rng.random_range(0..13) {
            0..3 => (End::Agent(node), End::Dcs),
            3 => (End::Dcs, End::Agent(node)),
            4..6 => (End::Agent(node), End::Agent(other)),
            6..9 => (End::Postgres(node), End::Postgres(other)),
            9 => (End::Router(router), End::Postgres(node)),
            10 => (End::Postgres(node), End::Router(router)),
            11 => (End::Router(router), End::Dcs),
            _ => (End::Dcs, End::Router(router)),
        }
    }

    fn patch(&mut self) -> Value {
        match self.rng.random_range(0..if self.synchronous { 11 } else { 7 }) {
            0 => json!({ "ttl": *[2, 3, 5, 10, 20].choose(&mut self.rng).unwrap_or(&5) }),
            1 => json!({ "primary_start_timeout": self.rng.random_range(0..10) }),
            2 => json!({ "maximum_lag_on_failover": self.rng.random_range(64..10_000) }),
            3 => json!({ "synchronous_node_count": self.rng.random_range(1..3) }),
            4 | 5 => json!({ "failsafe_mode": self.rng.random::<bool>() }),
            6 => json!({ "primary_stop_timeout": self.rng.random_range(0..5) }),
            // From one way to wait for standbys to the other, at once or without strictness on the way.
            7 | 8 => json!({ "synchronous_mode": "quorum" }),
            9 => json!({ "synchronous_mode": true }),
            _ => json!({ "synchronous_mode": true, "synchronous_mode_strict": self.rng.random::<bool>() }),
        }
    }
}
