//! What some worlds have besides: settings, tags, and faults in an order in which a promise is put to the test. Each is drawn from
//! numbers of its own, so that all other worlds are as they were without it.

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

use super::BOOTSTRAP;
use crate::outside;
use crate::scenario::{Aim, End, Fault, Scenario};
use crate::slots::FOREIGN_SLOT;

/// One kind of addition.
struct Scene {
    /// As `--scene` calls it.
    name: &'static str,
    /// Makes its draws its own.
    own: u64,
    /// One world in so many has it.
    every: u32,
    add: fn(&mut SmallRng, &mut Scenario),
}

macro_rules! scene {
    ($own:literal, $every:literal, $add:ident) => {
        Scene { name: stringify!($add), own: $own, every: $every, add: $add }
    };
}

/// In the order in which they are drawn.
const SCENES: [Scene; 20] = [
    scene!(0x0B, 12, timing),
    scene!(0x01, 1, preferences),
    scene!(0x03, 24, standby_cluster),
    scene!(0x04, 8, nostream),
    scene!(0x02, 1, trials),
    scene!(0x0A, 48, slow_replay),
    scene!(0x05, 32, revocations),
    scene!(0x06, 48, words),
    scene!(0x07, 32, late_word),
    scene!(0x08, 32, restored),
    scene!(0x09, 32, copies),
    scene!(0x0C, 8, registrations),
    scene!(0x0D, 12, deaf_routers),
    scene!(0x0E, 8, logical_slots),
    scene!(0x0F, 32, power_loss),
    scene!(0x10, 48, late_answers),
    scene!(0x11, 32, led_by_word),
    scene!(0x12, 32, paused),
    scene!(0x13, 16, refusals),
    scene!(0x14, 16, hung_postmasters),
];

/// All of them.
pub fn names() -> impl Iterator<Item = &'static str> {
    SCENES.iter().map(|scene| scene.name)
}

/// Adds to a world what its seed has for it, and the scene of the name `certain` in any case.
pub(super) fn add(seed: u64, certain: Option<&str>, scenario: &mut Scenario) {
    for scene in SCENES {
        let mut rng = SmallRng::seed_from_u64(seed ^ 0x5EED_0000_0000 ^ scene.own);
        if rng.random_ratio(1, scene.every) || certain == Some(scene.name) {
            (scene.add)(&mut rng, scenario);
        }
    }
}

/// A new leader waits for routers, one of which may hear nothing while the leader changes.
fn registrations(rng: &mut SmallRng, scenario: &mut Scenario) {
    let (lease, ttl): (u64, u64) = (rng.random_range(1..=5), scenario.settings["ttl"].as_u64().unwrap_or(5));
    scenario.settings["router_lease"] = json!(lease);
    for _ in 0..rng.random_range(0..3) {
        let (at, number) = (BOOTSTRAP + rng.random_range(1_000..20_000), rng.random_range(0..scenario.routers));
        let (router, ms) = (End::Router(number), (ttl + lease * 3) * 1_000);
        let (from, to) = if rng.random() { (router, End::Dcs) } else { (End::Dcs, router) };
        let deaf = match rng.random() {
            true => Fault::Cut { from, to, both: rng.random(), ms },
            false => Fault::SlowRouter { router: number, delay: rng.random_range(500..lease * 3_000), ms },
        };
        scenario.add(at, None, deaf);
        let gone = match rng.random_range(0..3) {
            0 => Fault::KillPostgres { node: 0 },
            1 => Fault::Switchover { candidate: None },
            // Its sessions do not end by that.
            _ => Fault::FreezeHost { node: 0, ms },
        };
        scenario.add(at + rng.random_range(0..500), Some(Aim::Leader), gone);
    }
}

/// Routers that members can't answer, or that can't ask.
fn deaf_routers(rng: &mut SmallRng, scenario: &mut Scenario) {
    for _ in 0..rng.random_range(1..4) {
        let router = End::Router(rng.random_range(0..scenario.routers));
        let agent = End::Agent(rng.random_range(0..scenario.nodes.len()));
        let (from, to) = if rng.random() { (router, agent) } else { (agent, router) };
        let (both, ms) = (rng.random(), rng.random_range(500..15_000));
        scenario.add(rng.random_range(BOOTSTRAP..25_000), None, Fault::Cut { from, to, both, ms });
    }
}

/// Servers that have no connection left for their agent, or do not know its password any more.
fn refusals(rng: &mut SmallRng, scenario: &mut Scenario) {
    one_after_the_other(rng, scenario, |node, ms| Fault::RefuseAgent { node, ms });
}

/// Postmasters that let nobody in, while whoever is connected goes on.
fn hung_postmasters(rng: &mut SmallRng, scenario: &mut Scenario) {
    one_after_the_other(rng, scenario, |node, ms| Fault::FreezePostmaster { node, ms });
}

fn one_after_the_other(rng: &mut SmallRng, scenario: &mut Scenario, fault: impl Fn(usize, u64) -> Fault) {
    for _ in 0..rng.random_range(1..4) {
        let (node, ms) = (rng.random_range(0..scenario.nodes.len()), rng.random_range(200..15_000));
        let aims = [None, Some(Aim::Leader), Some(Aim::Leader), Some(Aim::NextLeader), Some(Aim::Synchronous)];
        let aim = *aims.choose(rng).unwrap_or(&None);
        scenario.add(rng.random_range(BOOTSTRAP..25_000), aim, fault(node, ms));
    }
}

/// Turns of the loop that are longer, requests that may take longer, and others from some moment on.
fn timing(rng: &mut SmallRng, scenario: &mut Scenario) {
    let drawn = |rng: &mut SmallRng| {
        let (loop_wait, retry_timeout) = (rng.random_range(1..=3), rng.random_range(1..=2));
        let ttl: u64 = loop_wait + 2 * retry_timeout + *[0, 1, 3].choose(rng).unwrap_or(&1);
        [("ttl", ttl), ("loop_wait", loop_wait), ("retry_timeout", retry_timeout)]
    };
    for (key, seconds) in drawn(rng) {
        scenario.settings[key] = json!(seconds);
    }
    for _ in 0..rng.random_range(0..3) {
        let patch = Map::from_iter(drawn(rng).map(|(key, seconds)| (key.to_owned(), json!(seconds))));
        scenario.add(BOOTSTRAP + rng.random_range(0..25_000), None, Fault::Configure { patch: Value::Object(patch) });
    }
}

/// Who is preferred for what.
fn preferences(rng: &mut SmallRng, scenario: &mut Scenario) {
    if rng.random_ratio(1, 8) {
        let may_lead = scenario.nodes.iter_mut().filter(|node| node.priority > 0);
        may_lead.for_each(|node| node.priority = rng.random_range(1..=3));
    }
    if scenario.settings["synchronous_mode"] != json!(false) && rng.random_ratio(1, 4) {
        for node in scenario.nodes.iter_mut().filter(|node| !node.tags.contains_key("nosync")) {
            node.tags.insert("sync_priority".to_owned(), json!(rng.random_range(1..=3)));
        }
    }
    if rng.random_ratio(1, 8) {
        scenario.settings["postgresql"]["remove_data_directory_on_diverged_timelines"] = json!(true);
    }
    for tag in ["clonefrom", "noloadbalance"] {
        if rng.random_ratio(1, 6) {
            let tagged = scenario.nodes.iter_mut().filter(|_| rng.random());
            tagged.for_each(|node| drop(node.tags.insert(tag.to_owned(), json!(true))));
        }
    }
    if rng.random_ratio(1, 12) {
        scenario.settings["ignore_slots"] = json!([{ "name": FOREIGN_SLOT, "type": "physical" }]);
        scenario.add(BOOTSTRAP + rng.random_range(0..10_000), Some(Aim::Leader), Fault::MakeSlot { node: 0 });
    }
    if rng.random_ratio(1, 12) {
        scenario.nodes.iter_mut().for_each(|node| node.watchdog = true);
        for _ in 0..rng.random_range(1..4) {
            let (node, ms) = (rng.random_range(0..scenario.nodes.len()), rng.random_range(1_000..20_000));
            let aim = rng.random::<bool>().then_some(Aim::Leader);
            scenario.add(rng.random_range(BOOTSTRAP..25_000), aim, Fault::BreakWatchdog { node, ms });
        }
    }
}

/// A member that gets no WAL but what an archive has, and here there is none.
fn nostream(rng: &mut SmallRng, scenario: &mut Scenario) {
    if scenario.nodes.len() > 3 {
        let node = rng.random_range(0..scenario.nodes.len());
        scenario.nodes[node].tags.insert("nostream".to_owned(), json!(true));
    }
}

/// A standby cluster, which may become an ordinary one.
fn standby_cluster(rng: &mut SmallRng, scenario: &mut Scenario) {
    scenario.settings["standby_cluster"] = json!({ "host": outside::HOST, "port": 5432 });
    if rng.random() {
        let promoted = BOOTSTRAP + rng.random_range(0..25_000);
        scenario.add(promoted, None, Fault::Configure { patch: json!({ "standby_cluster": null }) });
    }
}

/// Faults in an order in which a promise of the settings is put to the test.
fn trials(rng: &mut SmallRng, scenario: &mut Scenario) {
    let count = scenario.nodes.len();
    if count < 3 {
        return;
    }
    let (at, node) = (BOOTSTRAP + rng.random_range(1_000..20_000), rng.random_range(0..count));
    if rng.random_ratio(1, 16) {
        // A standby stands still, and the leader that is to make room waits for it.
        scenario.settings["primary_stop_timeout"] = json!(1);
        scenario.add(at, None, Fault::FreezePostgres { node, ms: rng.random_range(9_000..15_000) });
        let asked = at + rng.random_range(100..1_500);
        scenario.add(asked, None, Fault::Switchover { candidate: None });
    }
    if scenario.settings["synchronous_mode"] == json!(true) && rng.random_ratio(1, 16) {
        // What a standby confirms gets lost, and the one that commits have waited for is out.
        scenario.settings["maximum_lag_on_syncnode"] = json!(640);
        for other in (0..count).filter(|other| *other != node) {
            let cut = Fault::Cut { from: End::Postgres(node), to: End::Postgres(other), both: false, ms: 12_000 };
            scenario.add(at, None, cut);
        }
        let gone = at + rng.random_range(1_500..4_000);
        scenario.add(gone, Some(Aim::Synchronous), Fault::KillAgent { node, ms: 5_000 });
        scenario.add(gone, Some(Aim::Synchronous), Fault::KillPostgres { node });
    }
}

/// The store ends leases of leaders that live, and may hear of it late. Only who can be asked is known to lead no longer, so
/// nothing else goes wrong in such a world.
fn revocations(rng: &mut SmallRng, scenario: &mut Scenario) {
    (scenario.events, scenario.calm_at) = (Vec::new(), BOOTSTRAP);
    let mut at = BOOTSTRAP;
    for _ in 0..rng.random_range(1..4) {
        at += rng.random_range(1_000..8_000);
        if rng.random() {
            let delay = rng.random_range(100..3_000);
            scenario.add(at - 50, Some(Aim::Leader), Fault::SlowWatch { node: 0, delay, ms: 2_000 });
        }
        scenario.add(at, Some(Aim::Leader), Fault::RevokeLease { node: 0 });
    }
}

/// The only standby is back, and gone again before the leader has an answer to what it writes of it. That is carried out when
/// the leader is out, which went on alone meanwhile. A world of its own: anything besides would be in the way.
fn late_word(rng: &mut SmallRng, scenario: &mut Scenario) {
    if scenario.settings["synchronous_mode"] == json!(false) {
        return;
    }
    let count = scenario.nodes.len();
    let standby = rng.random_range(0..count);
    let other = (standby + rng.random_range(1..count)) % count;
    let ttl = scenario.settings["ttl"].as_u64().unwrap_or(5) * 1_000;
    let gone = BOOTSTRAP + ttl * 2 + rng.random_range(3_000..6_000);
    let back = gone + rng.random_range(500..3_000);
    let slow = back + rng.random_range(0..1_500);
    let again = slow + rng.random_range(200..2_500);
    let still = again + rng.random_range(20..1_500);
    let (request, lasts) = (rng.random_range(2_000..8_000), rng.random_range(200..1_500));
    let ms = ttl * 4;
    scenario.events.clear();
    let leader = Some(Aim::Leader);
    for out in (0..count).filter(|node| ![standby, other].contains(node)) {
        scenario.add(BOOTSTRAP, None, Fault::CrashHost { node: out, ms: still + ms });
    }
    let mut leaves = |at, ms| {
        scenario.add(at, None, Fault::KillAgent { node: standby, ms });
        scenario.add(at, None, Fault::KillPostgres { node: standby });
    };
    leaves(gone, back - gone);
    leaves(again, rng.random_range(200..2_000));
    let cut = Fault::Cut { from: End::Postgres(standby), to: End::Postgres(other), both: true, ms };
    scenario.add(again, None, cut);
    scenario.add(slow, leader, Fault::SlowDcs { node: 0, request, answer: 0, ms: lasts });
    if rng.random() {
        scenario.add(again, leader, Fault::KillAgent { node: 0, ms: rng.random_range(1..200) });
    }
    scenario.add(still, leader, Fault::FreezeAgent { node: 0, ms });
}

/// A leader that alone has lost the DCS leads on by the word of the others. The ttl is cut meanwhile, which it can't see, and their
/// agents are started anew.
fn words(rng: &mut SmallRng, scenario: &mut Scenario) {
    const TTL: u64 = 10;
    (scenario.events, scenario.calm_at) = (Vec::new(), BOOTSTRAP);
    scenario.settings["failsafe_mode"] = json!(true);
    scenario.settings["ttl"] = json!(TTL);
    let lost = BOOTSTRAP + rng.random_range(1_000..4_000);
    let lower = lost + TTL * 1_000 + rng.random_range(0..3_000);
    let again = lower + rng.random_range(200..3_000);
    let ms = again + rng.random_range(5_000..15_000) - lost;
    let cut = Fault::Cut { from: End::Agent(0), to: End::Dcs, both: true, ms };
    scenario.add(lost, Some(Aim::Leader), cut);
    scenario.add(lower, None, Fault::Configure { patch: json!({ "ttl": 2 }) });
    for node in 0..scenario.nodes.len() {
        if rng.random_ratio(3, 4) {
            scenario.add(again + rng.random_range(0..1_000), None, Fault::KillAgent { node, ms: 100 });
        }
    }
}

/// The leader goes on by the word of the others while the store is away, and has the key again afterwards; what it writes meanwhile
/// nobody gets. Then its server is down, and it may not lead: its watchdog is broken, or somebody has paused the cluster. A world of
/// its own.
fn led_by_word(rng: &mut SmallRng, scenario: &mut Scenario) {
    if scenario.settings["synchronous_mode"] == json!(false) {
        return;
    }
    (scenario.events, scenario.calm_at) = (Vec::new(), BOOTSTRAP);
    scenario.settings["failsafe_mode"] = json!(true);
    scenario.settings["synchronous_mode_strict"] = json!(false);
    let ttl = scenario.settings["ttl"].as_u64().unwrap_or(5) * 1_000;
    let away = BOOTSTRAP + rng.random_range(1_000..4_000);
    let ms = ttl + rng.random_range(500..3_000);
    let back = away + ms;
    let down = back + rng.random_range(200..4_000);
    scenario.add(away, None, Fault::DcsDown { refused: rng.random(), ms });
    let alone = away + rng.random_range(0..ms);
    for other in 0..scenario.nodes.len() {
        let cut = Fault::Cut { from: End::Postgres(0), to: End::Postgres(other), both: true, ms: down - alone + ttl };
        scenario.add(alone, Some(Aim::Leader), cut);
    }
    if rng.random() {
        scenario.nodes.iter_mut().for_each(|node| node.watchdog = true);
        scenario.add(down, Some(Aim::Leader), Fault::BreakWatchdog { node: 0, ms: 30_000 });
    } else {
        scenario.add(down, None, Fault::Pause { ms: rng.random_range(500..ttl) });
    }
    scenario.add(down, Some(Aim::Leader), Fault::KillPostgres { node: 0 });
}

/// Things happen in a pause: servers end, agents are started anew, the store is away, operators switch over. A world of its own: nothing else takes
/// away what is left of it when the pause is over.
fn paused(rng: &mut SmallRng, scenario: &mut Scenario) {
    (scenario.events, scenario.calm_at) = (Vec::new(), BOOTSTRAP);
    let ttl = scenario.settings["ttl"].as_u64().unwrap_or(5) * 1_000;
    let begins = BOOTSTRAP + rng.random_range(500..3_000);
    let ms = rng.random_range(1_000..ttl * 4);
    scenario.add(begins, None, Fault::Pause { ms });
    for _ in 0..rng.random_range(1..6) {
        let at = begins + rng.random_range(0..ms + 500);
        let node = rng.random_range(0..scenario.nodes.len());
        let aim = *[None, Some(Aim::Leader), Some(Aim::Leader), Some(Aim::Synchronous)].choose(rng).unwrap_or(&None);
        let lasts = rng.random_range(100..ttl * 2);
        let what = match rng.random_range(0..10) {
            0..3 => Fault::KillPostgres { node },
            3 => Fault::KillAgent { node, ms: lasts },
            4 => Fault::StopAgent { node, ms: lasts },
            5 => Fault::DcsDown { refused: rng.random(), ms: lasts },
            6 => Fault::Cut { from: End::Agent(node), to: End::Dcs, both: true, ms: lasts },
            7 => Fault::Switchover { candidate: rng.random::<bool>().then_some(node) },
            8 => Fault::Restart { node },
            _ => Fault::CrashHost { node, ms: lasts },
        };
        scenario.add(at, aim, what);
    }
}

/// The store is lost, and comes back from a backup, or with nothing in it; since the backup somebody else leads, and who leads
/// may be out when it comes back. A world of its own: whoever is started anew knows only what the store says.
fn restored(rng: &mut SmallRng, scenario: &mut Scenario) {
    if scenario.settings["standby_cluster"].is_object() {
        return;
    }
    let ttl = scenario.settings["ttl"].as_u64().unwrap_or(5) * 1_000;
    let backup = BOOTSTRAP + rng.random_range(2_000..6_000);
    let (age, ms) = (rng.random_range(500..15_000), rng.random_range(10..ttl * 2));
    let (lost, back) = (backup + age, backup + age + ms);
    scenario.events.clear();
    scenario.add(backup, None, Fault::RestoreDcs { age, anew: rng.random_ratio(1, 3), ms });
    if rng.random() {
        let at = rng.random_range(backup..lost);
        let what = if rng.random() { Fault::Switchover { candidate: None } } else { Fault::KillPostgres { node: 0 } };
        scenario.add(at, Some(Aim::Leader), what);
    }
    if rng.random() {
        // Also before the leader has heard of it, who does things by what it knew.
        let when = if rng.random() { back + 10..back + 500 } else { lost - 200..back + ttl };
        let (at, lasts) = (rng.random_range(when), rng.random_range(ttl..ttl * 3));
        let outages = [
            Fault::CrashHost { node: 0, ms: lasts },
            Fault::Isolate { node: 0, ms: lasts },
            Fault::Cut { from: End::Agent(0), to: End::Dcs, both: true, ms: lasts },
            Fault::FreezeHost { node: 0, ms: lasts },
        ];
        let what = outages.choose(rng).cloned().unwrap_or(Fault::BreakWatches);
        scenario.add(at, Some(Aim::Leader), what);
    }
}

/// Whoever leads next has much to replay before it takes writes.
fn slow_replay(rng: &mut SmallRng, scenario: &mut Scenario) {
    let at = BOOTSTRAP + rng.random_range(1_000..20_000);
    let ms = rng.random_range(80_000..110_000);
    for node in 0..scenario.nodes.len() {
        scenario.add(at, None, Fault::SlowReplay { node, ms });
    }
    scenario.add(at + 1, Some(Aim::Leader), Fault::CrashHost { node: 0, ms: rng.random_range(5_000..20_000) });
}

/// All hosts lose power, the leader's for long. One standby has not got what was confirmed last by the other, and who comes back
/// has to replay what is on its disk. A world of its own.
fn power_loss(rng: &mut SmallRng, scenario: &mut Scenario) {
    let count = scenario.nodes.len();
    if scenario.settings["synchronous_mode"] == json!(false) || count < 3 {
        return;
    }
    (scenario.events, scenario.calm_at) = (Vec::new(), BOOTSTRAP);
    scenario.settings["synchronous_mode"] = json!("quorum");
    scenario.settings["maximum_lag_on_failover"] = json!(1_048_576);
    let ttl = scenario.settings["ttl"].as_u64().unwrap_or(5) * 1_000;
    let lost = BOOTSTRAP + rng.random_range(500..5_000);
    let off = lost + rng.random_range(100..2_000);
    let behind = rng.random_range(0..count);
    let cut = Fault::Cut { from: End::Postgres(0), to: End::Postgres(behind), both: true, ms: off - lost + ttl };
    scenario.add(lost, Some(Aim::Leader), cut);
    scenario.add(off, Some(Aim::Leader), Fault::CrashHost { node: 0, ms: rng.random_range(ttl..ttl * 4) });
    for node in 0..count {
        scenario.add(off, None, Fault::CrashHost { node, ms: rng.random_range(100..3_000) });
        if node != behind && rng.random_ratio(3, 4) {
            scenario.add(off, None, Fault::SlowReplay { node, ms: rng.random_range(1_000..ttl * 3) });
        }
    }
}

/// The leader's renewals are answered late, as late as it waits for them, until they arrive no more. A world of its own: nothing else ends
/// its reign.
fn late_answers(rng: &mut SmallRng, scenario: &mut Scenario) {
    (scenario.events, scenario.calm_at) = (Vec::new(), BOOTSTRAP);
    let (ttl, retry_timeout) = (20, 6);
    for (setting, value) in [("ttl", ttl), ("loop_wait", 2), ("retry_timeout", retry_timeout)] {
        scenario.settings[setting] = json!(value);
    }
    scenario.settings["failsafe_mode"] = json!(false);
    let late = BOOTSTRAP + rng.random_range(1_000..5_000);
    let answer = rng.random_range(2_000..retry_timeout * 1_000);
    let gone = late + rng.random_range(2..4) * answer + rng.random_range(1_000..10_000);
    let slow = Fault::SlowDcs { node: 0, request: 0, answer, ms: gone - late + ttl * 1_000 };
    scenario.add(late, Some(Aim::Leader), slow);
    let cut = |to, both| Fault::Cut { from: End::Agent(0), to, both, ms: ttl * 3_000 };
    scenario.add(gone, Some(Aim::Leader), cut(End::Dcs, rng.random_ratio(1, 4)));
    // Nor can the others ask whether it still runs as primary, for which they would wait.
    for other in 0..scenario.nodes.len() {
        scenario.add(gone, Some(Aim::Leader), cut(End::Agent(other), true));
    }
}

/// A synchronous standby is made anew, of a member that lacks what was written lately, while the leader's agent stands still, or in
/// strict mode; then the leader is out. It may not know that it is one again, after a restart of which it hears late.
fn copies(rng: &mut SmallRng, scenario: &mut Scenario) {
    let synchronous = scenario.settings["synchronous_mode"] == json!(true);
    if !synchronous || scenario.nodes.len() < 3 {
        return;
    }
    (scenario.events, scenario.calm_at) = (Vec::new(), BOOTSTRAP);
    let (ttl, strict) = (scenario.settings["ttl"].as_u64().unwrap_or(5) * 1_000, rng.random_ratio(1, 3));
    scenario.settings["synchronous_mode_strict"] = json!(strict);
    scenario.settings["maximum_lag_on_failover"] = json!(1_048_576);
    let behind = rng.random_range(0..scenario.nodes.len());
    scenario.nodes[behind].tags = Map::from_iter(["nosync", "clonefrom"].map(|tag| (tag.to_owned(), json!(true))));
    let lost = BOOTSTRAP + rng.random_range(0..2_000);
    let unaware = !strict && rng.random_ratio(3, 4);
    let anew = lost + rng.random_range(500..3_000) + if unaware { 3_000 } else { 0 };
    let out = anew + rng.random_range(100..2_500);
    let cut = Fault::Cut { from: End::Postgres(0), to: End::Postgres(behind), both: true, ms: out + ttl * 3 - lost };
    scenario.add(lost, Some(Aim::Leader), cut);
    if unaware {
        let delay = rng.random_range(1_000..2_000);
        let restart = anew - delay - rng.random_range(50..500);
        scenario.add(restart - 50, Some(Aim::Synchronous), Fault::SlowWatch { node: 0, delay, ms: 5_000 });
        scenario.add(restart, Some(Aim::Synchronous), Fault::KillPostgres { node: 0 });
    }
    if !strict {
        scenario.add(anew - 20, Some(Aim::Leader), Fault::FreezeAgent { node: 0, ms: out - anew + 20 });
    }
    scenario.add(anew, Some(Aim::Synchronous), Fault::Reinitialize { node: 0 });
    scenario.add(out, Some(Aim::Leader), Fault::CrashHost { node: 0, ms: ttl * 3 });
}

/// A permanent logical slot, and somebody who reads it. Where commits wait for nobody, a leader may be out whose last ones only the
/// reader has; and so may the next one.
fn logical_slots(rng: &mut SmallRng, scenario: &mut Scenario) {
    scenario.settings["slots"]["feed"] = json!({ "type": "logical", "database": "app", "plugin": "test_decoding" });
    let count = scenario.nodes.len();
    if scenario.settings["synchronous_mode"] != json!(false) || count < 3 || rng.random() {
        return;
    }
    (scenario.events, scenario.calm_at) = (Vec::new(), BOOTSTRAP);
    scenario.settings["maximum_lag_on_failover"] = json!(1_048_576);
    let ttl = scenario.settings["ttl"].as_u64().unwrap_or(5) * 1_000;
    let lost = BOOTSTRAP + rng.random_range(4_000..8_000);
    let leader = Some(Aim::Leader);
    let cut = |to, ms| Fault::Cut { from: End::Postgres(0), to: End::Postgres(to), both: true, ms };
    if rng.random() {
        // The next leader's word of its slots comes late, and others have its WAL meanwhile.
        let out = lost + rng.random_range(300..2_000);
        (0..count).for_each(|other| scenario.add(lost, leader, cut(other, ttl * 2)));
        scenario.add(out, leader, Fault::CrashHost { node: 0, ms: ttl * 6 });
        let (request, lasts) = (rng.random_range(1_000..4_000), rng.random_range(2_000..5_000));
        scenario.add(out, Some(Aim::NextLeader), Fault::SlowDcs { node: 0, request, answer: 0, ms: lasts });
        let again = out + ttl + rng.random_range(0..3_500) - 500;
        scenario.add(again, leader, Fault::CrashHost { node: 0, ms: ttl * 3 });
    } else {
        // One is made anew behind another, which gets nothing from the leader.
        let above = rng.random_range(0..count);
        let below = (above + rng.random_range(1..count)) % count;
        scenario.nodes[below].tags.insert("replicatefrom".to_owned(), json!(format!("n{above}")));
        scenario.add(lost, leader, cut(above, ttl * 4));
        scenario.add(lost + rng.random_range(0..2_000), None, Fault::Reinitialize { node: below });
        let out = lost + rng.random_range(3_000..8_000);
        scenario.add(out, leader, Fault::CrashHost { node: 0, ms: ttl * 4 });
    }
}
