//! The dynamic settings: the `config` key of the DCS, or `bootstrap.dcs` of a cluster that is only coming to be.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::report::{Notice, Origins, Report};
use crate::section::Section;
use crate::{postgres, tags};

/// Typed settings with Patroni's defaults for what is absent.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How long a lease lasts without renewal.
    pub ttl: Duration,
    /// Longest pause between two turns of the HA loop.
    pub loop_wait: Duration,
    /// How long one operation on DCS or PostgreSQL is tried.
    pub retry_timeout: Duration,
    /// Bytes a candidate may be behind.
    pub maximum_lag_on_failover: u64,
    /// Bytes a synchronous standby may be behind before another takes its place; `None` = no limit.
    pub maximum_lag_on_syncnode: Option<u64>,
    /// How many lines the `history` key keeps; 0 = all.
    pub max_timelines_history: usize,
    /// How long a crashed primary may take to start before another takes over; zero = fail over at once.
    pub primary_start_timeout: Duration,
    /// How long a stop in order may take; `None` = not said, see [`Settings::stop_limit`].
    pub primary_stop_timeout: Option<Duration>,
    /// How long transactions in flight may take to end once a switchover is announced; zero = they are not waited for.
    pub switchover_grace: Duration,
    /// Longest wait for a still active primary's WAL before a race.
    pub primary_race_backoff: Duration,
    /// Length of the lease with which routers register, and at most what a new leader waits for them; zero = neither.
    pub router_lease: Duration,
    /// Synchronous replication.
    pub synchronous_mode: SynchronousMode,
    /// Rather block writes than be without a synchronous standby.
    pub synchronous_mode_strict: bool,
    /// How many standbys confirm a commit.
    pub synchronous_node_count: usize,
    /// Go on without the DCS while every member answers.
    pub failsafe_mode: bool,
    /// Refuse to promote a node of an older timeline.
    pub check_timeline: bool,
    /// Hands off: no automatic failover.
    pub pause: bool,
    /// How long the slot of an absent member is kept; zero = dropped at once.
    pub member_slots_ttl: Duration,
    /// Permanent slots: name → definition.
    pub slots: Map<String, Value>,
    /// Matchers of slots to leave alone.
    pub ignore_slots: Vec<Map<String, Value>>,
    /// Follow a primary outside the cluster. `None` where it has none of `host`, `port`, `restore_command`.
    pub standby_cluster: Option<Map<String, Value>>,
    /// The `postgresql` section as it stands.
    pub postgresql: Map<String, Value>,
}

/// `synchronous_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SynchronousMode {
    /// Asynchronous.
    #[default]
    Off,
    /// Named standbys confirm each commit, and only they may be promoted.
    On,
    /// Any `n` of the voters confirm each commit.
    Quorum,
}

impl Default for Settings {
    /// Patroni's defaults: what an existing cluster runs with where its `config` key says nothing.
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(30),
            loop_wait: Duration::from_secs(10),
            retry_timeout: Duration::from_secs(10),
            maximum_lag_on_failover: 1_048_576,
            maximum_lag_on_syncnode: None,
            max_timelines_history: 0,
            primary_start_timeout: Duration::from_secs(300),
            primary_stop_timeout: None,
            switchover_grace: Duration::from_secs(1),
            primary_race_backoff: Duration::ZERO,
            router_lease: Duration::ZERO,
            synchronous_mode: SynchronousMode::Off,
            synchronous_mode_strict: false,
            synchronous_node_count: 1,
            failsafe_mode: false,
            check_timeline: false,
            pause: false,
            member_slots_ttl: Duration::from_secs(1800),
            slots: Map::new(),
            ignore_slots: Vec::new(),
            standby_cluster: None,
            postgresql: Map::new(),
        }
    }
}

/// Shortest lease: etcd rounds shorter ones up.
pub const MIN_TTL: i64 = 2;

/// Longest lease of a router, in seconds: a promotion may wait for so long.
pub const MAX_ROUTER_LEASE: i64 = 60;

/// Longest time that any of these settings can mean: a year.
const MAX_SECONDS: i64 = 31_536_000;

/// How long a stop in order may take where `primary_stop_timeout` says nothing.
const STOP_LIMIT: Duration = Duration::from_secs(300);

pub(crate) const KNOWN: &[&str] = &[
    "ttl",
    "loop_wait",
    "retry_timeout",
    "maximum_lag_on_failover",
    "maximum_lag_on_syncnode",
    "max_timelines_history",
    "primary_start_timeout",
    "master_start_timeout",
    "primary_stop_timeout",
    "master_stop_timeout",
    "switchover_grace",
    "primary_race_backoff",
    "router_lease",
    "synchronous_mode",
    "synchronous_mode_strict",
    "synchronous_node_count",
    "failsafe_mode",
    "check_timeline",
    "pause",
    "member_slots_ttl",
    "slots",
    "permanent_slots",
    "permanent_replication_slots",
    "ignore_slots",
    "standby_cluster",
    "postgresql",
];

impl Settings {
    /// How long PostgreSQL may take to stop in order, before it is stopped at once.
    pub fn stop_limit(&self) -> Duration {
        self.primary_stop_timeout.unwrap_or(STOP_LIMIT)
    }

    /// [`Settings::after`] nothing: where a value is not what it should be there is nothing but the default.
    pub fn from_value(value: &Value) -> (Self, Vec<Notice>) {
        Self::after(value, &Self::default())
    }

    /// Reads the value of the `config` key. What is absent has Patroni's default; what is not what it should be stays as it
    /// was `before`, and is told. Never fails: a mistyped setting must not stop a cluster, nor change what it promises.
    pub fn after(value: &Value, before: &Self) -> (Self, Vec<Notice>) {
        let report = Report::new(Origins::new("dynamic configuration"));
        let settings = match value {
            Value::Object(map) => {
                let root = Section::root(map, &report);
                let times = read_times(&root, before);
                read(&root, before, times)
            }
            Value::Null => Self::default(),
            _ => {
                report.notice("", "is no map, and ignored");
                before.clone()
            }
        };
        (settings, report.into_notices())
    }
}

/// The dynamic configuration that a new cluster starts with: `bootstrap.dcs`, and where it does not say: `ttl` 5,
/// `loop_wait` 1, `retry_timeout` 1. A given `loop_wait` or `retry_timeout` makes an absent `ttl` longer.
pub fn new_cluster(bootstrap_dcs: &Map<String, Value>) -> Value {
    let given = |key: &str| bootstrap_dcs.get(key).filter(|value| !value.is_null());
    let number = |key: &str| given(key).and_then(whole);
    let mut config = Map::new();
    let mut fill = |key: &str, seconds: i64| {
        config.insert(key.to_owned(), given(key).cloned().unwrap_or_else(|| Value::from(seconds)));
    };
    let (loop_wait, retry_timeout) = (number("loop_wait").unwrap_or(1), number("retry_timeout").unwrap_or(1));
    fill("ttl", loop_wait.saturating_add(retry_timeout.saturating_mul(2)).max(5));
    fill("loop_wait", 1);
    fill("retry_timeout", 1);
    config.extend(
        bootstrap_dcs.iter().filter(|(key, _)| !TIMES.contains(&key.as_str())).map(|(k, v)| (k.clone(), v.clone())),
    );
    Value::Object(config)
}

const TIMES: &[&str] = &["ttl", "loop_wait", "retry_timeout"];

/// A whole number, given as number or text.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => crate::guc::parse_int(&number.to_string(), None),
        Value::String(text) => crate::guc::parse_int(text, None),
        _ => None,
    }
}

/// For `--validate`: reports what [`Settings::from_value`] would only adjust, too.
pub(crate) fn check(root: &Section<'_>) {
    let least = [("ttl", MIN_TTL), ("loop_wait", 1), ("retry_timeout", 1)];
    let [ttl, loop_wait, retry_timeout] = least.map(|(key, least)| root.integer(key, least..=MAX_SECONDS, Some("s")));
    let needed = loop_wait.unwrap_or(0).saturating_add(retry_timeout.unwrap_or(0).saturating_mul(2));
    if let Some(ttl) = ttl.filter(|ttl| needed > *ttl) {
        let expected = format!("loop_wait + 2 * retry_timeout must not exceed ttl, but {needed} > {ttl}");
        root.wrong_with::<()>("ttl", expected, Some("make ttl longer, or the others shorter"));
    }
    let default = Settings::default();
    read(root, &default, (default.ttl, default.loop_wait, default.retry_timeout));
}

fn read(
    root: &Section<'_>,
    before: &Settings,
    (ttl, loop_wait, retry_timeout): (Duration, Duration, Duration),
) -> Settings {
    root.unknown(KNOWN);
    if let Some(postgresql) = root.section("postgresql") {
        postgres::unknown_keys(&postgresql);
    }
    let default = Settings::default();
    // What counts where no value was read: a value that is given is a wrong one.
    let else_of = |key: &str| if root.has(key) { before } else { &default };
    let boolean = |key, field: fn(&Settings) -> bool| root.boolean(key).unwrap_or_else(|| field(else_of(key)));
    let time = |key, field: fn(&Settings) -> Duration| seconds(root, key).unwrap_or_else(|| field(else_of(key)));
    let count = |key, most, field: fn(&Settings) -> usize| {
        let count = root.integer(key, 0..=most, None).and_then(|count| usize::try_from(count).ok());
        count.unwrap_or_else(|| field(else_of(key)))
    };
    let strict = boolean("synchronous_mode_strict", |s| s.synchronous_mode_strict);
    let standby_cluster = read_standby_cluster(root, else_of("standby_cluster"));
    let synchronous_mode = match &standby_cluster {
        // Commits come from elsewhere.
        Some(_) => SynchronousMode::Off,
        None => {
            let mode = root.choice("synchronous_mode", SYNCHRONOUS);
            mode.unwrap_or_else(|| else_of("synchronous_mode").synchronous_mode)
        }
    };
    let stop = either(root, "primary_stop_timeout", "master_stop_timeout");
    Settings {
        ttl,
        loop_wait,
        retry_timeout,
        maximum_lag_on_failover: root
            .integer("maximum_lag_on_failover", 0..=i64::MAX, Some("B"))
            .map_or_else(|| else_of("maximum_lag_on_failover").maximum_lag_on_failover, i64::unsigned_abs),
        maximum_lag_on_syncnode: root.integer("maximum_lag_on_syncnode", -1..=i64::MAX, Some("B")).map_or_else(
            || else_of("maximum_lag_on_syncnode").maximum_lag_on_syncnode,
            |lag| (lag > 0).then_some(lag.unsigned_abs()),
        ),
        max_timelines_history: count("max_timelines_history", 1_000_000, |s| s.max_timelines_history),
        primary_start_timeout: time(either(root, "primary_start_timeout", "master_start_timeout"), |s| {
            s.primary_start_timeout
        }),
        primary_stop_timeout: seconds(root, stop)
            .map_or_else(|| else_of(stop).primary_stop_timeout, |limit| (!limit.is_zero()).then_some(limit)),
        switchover_grace: time("switchover_grace", |s| s.switchover_grace),
        primary_race_backoff: time("primary_race_backoff", |s| s.primary_race_backoff),
        router_lease: root
            .seconds("router_lease", 0..=MAX_ROUTER_LEASE, Some("s"))
            .map(|lease| if lease.is_zero() { lease } else { lease.max(Duration::from_secs(MIN_TTL.unsigned_abs())) })
            .unwrap_or_else(|| else_of("router_lease").router_lease),
        synchronous_mode,
        synchronous_mode_strict: strict,
        synchronous_node_count: count("synchronous_node_count", 1000, |s| s.synchronous_node_count)
            .max(usize::from(strict)),
        failsafe_mode: boolean("failsafe_mode", |s| s.failsafe_mode),
        check_timeline: boolean("check_timeline", |s| s.check_timeline),
        pause: boolean("pause", |s| s.pause),
        member_slots_ttl: time("member_slots_ttl", |s| s.member_slots_ttl),
        slots: read_slots(root, before),
        ignore_slots: read_ignored_slots(root, before),
        standby_cluster,
        postgresql: root
            .section("postgresql")
            .map_or_else(|| else_of("postgresql").postgresql.clone(), |section| section.map().clone()),
    }
}

/// The words of `synchronous_mode`.
pub(crate) const SYNCHRONOUS: &[(&str, SynchronousMode)] = &[
    ("on", SynchronousMode::On),
    ("off", SynchronousMode::Off),
    ("true", SynchronousMode::On),
    ("false", SynchronousMode::Off),
    ("yes", SynchronousMode::On),
    ("no", SynchronousMode::Off),
    ("1", SynchronousMode::On),
    ("0", SynchronousMode::Off),
    ("quorum", SynchronousMode::Quorum),
];

fn seconds(root: &Section<'_>, key: &str) -> Option<Duration> {
    root.seconds(key, 0..=MAX_SECONDS, Some("s"))
}

/// The present name of a setting, or the old one where only that is given.
fn either<'k>(root: &Section<'_>, name: &'k str, old: &'k str) -> &'k str {
    if root.map().contains_key(name) { name } else { old }
}

/// `ttl`, `loop_wait`, `retry_timeout`, adjusted so that `loop_wait + 2 × retry_timeout ≤ ttl`: a leader must have had two
/// tries at renewing before its lease ends.
fn read_times(root: &Section<'_>, before: &Settings) -> (Duration, Duration, Duration) {
    let default = Settings::default();
    let at_least = |key: &str, minimum: i64, field: fn(&Settings) -> Duration| {
        let Some(seconds) = root.integer(key, i64::MIN..=MAX_SECONDS, Some("s")) else {
            return field(if root.has(key) { before } else { &default });
        };
        if seconds < minimum {
            root.notice(key, format!("{seconds} s is too short; {minimum} s is used"));
        }
        Duration::from_secs(seconds.max(minimum).unsigned_abs())
    };
    let ttl = at_least("ttl", MIN_TTL, |s| s.ttl);
    let given = (at_least("loop_wait", 1, |s| s.loop_wait), at_least("retry_timeout", 1, |s| s.retry_timeout));
    let (loop_wait, retry_timeout) = fit(ttl, given.0, given.1);
    if (loop_wait, retry_timeout) != given {
        root.notice(
            "ttl",
            format!(
                "loop_wait + 2 * retry_timeout must not exceed ttl ({} s); loop_wait {} s and retry_timeout {} s are used",
                ttl.as_secs_f64(),
                loop_wait.as_secs_f64(),
                retry_timeout.as_secs_f64()
            ),
        );
    }
    (ttl, loop_wait, retry_timeout)
}

/// Patroni's way of shortening, in whole seconds where there is room for one.
fn fit(ttl: Duration, loop_wait: Duration, retry_timeout: Duration) -> (Duration, Duration) {
    const SECOND: Duration = Duration::from_secs(1);
    if SECOND + 2 * retry_timeout > ttl {
        let rest = ttl.saturating_sub(SECOND) / 2;
        let whole = Duration::from_secs(rest.as_secs());
        return (SECOND, if whole.is_zero() { rest } else { whole });
    }
    (loop_wait.min(ttl - 2 * retry_timeout), retry_timeout)
}

/// Present only where it says whom to follow.
fn read_standby_cluster(root: &Section<'_>, otherwise: &Settings) -> Option<Map<String, Value>> {
    let Some(section) = root.section("standby_cluster") else { return otherwise.standby_cluster.clone() };
    section.unknown(&[
        "host",
        "port",
        "primary_slot_name",
        "create_replica_methods",
        "restore_command",
        "archive_cleanup_command",
        "recovery_min_apply_delay",
    ]);
    let says = |key: &&str| section.get(key).is_some_and(tags::truthy);
    if ["host", "port", "restore_command"].iter().any(says) {
        return Some(section.map().clone());
    }
    root.notice("standby_cluster", "has no effect without host, port or restore_command");
    None
}

/// The first of the three names that has any. A bad entry is the slot that it was before, or none at all, as with Patroni: one
/// that was meant to be logical and is made physical keeps WAL for nobody.
fn read_slots(root: &Section<'_>, before: &Settings) -> Map<String, Value> {
    let names = ["permanent_replication_slots", "permanent_slots", "slots"];
    let Some(key) = names.into_iter().find(|key| root.get(key).is_some_and(tags::truthy)) else { return Map::new() };
    let Some(section) = root.section(key) else { return before.slots.clone() };
    let mut slots = Map::new();
    for (name, definition) in section.map() {
        if !is_slot_name(name) {
            section.wrong::<()>(name, "a slot's name has 1 to 63 of a-z, 0-9 and _");
        } else if let Err(why) = check_slot(&section, name, definition) {
            // Patroni's words: operators look for them.
            section.wrong::<()>(name, format!("Bad value for slot '{name}': {why}"));
            slots.extend(before.slots.get(name).map(|definition| (name.clone(), definition.clone())));
        } else {
            slots.insert(name.clone(), definition.clone());
        }
    }
    slots
}

/// What is wrong with one of them.
fn check_slot(section: &Section<'_>, name: &str, definition: &Value) -> Result<(), &'static str> {
    if !tags::truthy(definition) {
        return Ok(());
    }
    let Some(map) = definition.as_object() else { return Err("a map (type, database, plugin) is expected") };
    let slot = Section::at(map, section.path(name), section.report());
    slot.unknown(&["type", "database", "plugin", "cluster_type"]);
    match map.get("type").map(Value::as_str) {
        Some(Some("logical")) if logical_slot(definition).is_none() => Err("a logical slot needs database and plugin"),
        Some(Some("logical" | "physical")) => Ok(()),
        Some(_) => Err("type is physical or logical"),
        None => {
            if logical_slot(definition).is_none() && (slot.has("database") || slot.has("plugin")) {
                section.notice(name, "is a physical slot; a logical one needs both database and plugin");
            }
            Ok(())
        }
    }
}

/// Database and plugin of an entry of `slots`; `None`: it is a physical one (config §4).
pub fn logical_slot(definition: &Value) -> Option<(&str, &str)> {
    let text = |key: &str| definition.get(key).and_then(Value::as_str);
    let given = |key: &str| text(key).filter(|text| !text.is_empty());
    (text("type") != Some("physical")).then_some((given("database")?, given("plugin")?))
}

fn is_slot_name(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// The fields of a matcher of `ignore_slots`. Any other says nothing, as with Patroni: a matcher with nothing else is about
/// every slot.
const SLOT_FIELDS: &[&str] = &["name", "type", "database", "plugin"];

fn read_ignored_slots(root: &Section<'_>, before: &Settings) -> Vec<Map<String, Value>> {
    match root.get("ignore_slots") {
        Some(Value::Array(items)) if items.iter().all(Value::is_object) => {
            let matchers: Vec<_> = items.iter().filter_map(Value::as_object).cloned().collect();
            for (at, matcher) in matchers.iter().enumerate() {
                let path = format!("{}[{at}]", root.path("ignore_slots"));
                Section::at(matcher, path, root.report()).unknown(SLOT_FIELDS);
            }
            matchers
        }
        Some(value) if tags::truthy(value) => {
            root.wrong::<()>("ignore_slots", "a list of maps (name, type, database, plugin) is expected");
            before.ignore_slots.clone()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests;
