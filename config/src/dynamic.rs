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
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn notices(value: Value) -> Vec<String> {
        Settings::from_value(&value).1.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nothing_given_means_patronis_defaults() {
        for value in [json!({}), Value::Null] {
            assert_eq!(Settings::from_value(&value), (Settings::default(), vec![]));
        }
        assert_eq!(notices(json!([1])), ["dynamic configuration: is no map, and ignored"]);
    }

    #[test]
    fn times_fit_into_the_lease() {
        let cases = [
            // ttl, loop_wait, retry_timeout -> loop_wait, retry_timeout in ms, whether it is told
            ((30, 10, 10), (10_000, 10_000), false),
            ((5, 1, 1), (1_000, 1_000), false),
            ((5, 1, 2), (1_000, 2_000), false),
            ((5, 10, 2), (1_000, 2_000), true),
            ((5, 10, 10), (1_000, 2_000), true),
            ((20, 10, 10), (1_000, 9_000), true),
            ((20, 10, 6), (8_000, 6_000), true),
            ((2, 1, 1), (1_000, 500), true),
            ((3, 1, 1), (1_000, 1_000), false),
        ];
        for ((ttl, loop_wait, retry_timeout), expected, told) in cases {
            let value = json!({"ttl": ttl, "loop_wait": loop_wait, "retry_timeout": retry_timeout.to_string()});
            let (settings, notices) = Settings::from_value(&value);
            let used = (settings.loop_wait.as_millis(), settings.retry_timeout.as_millis());
            assert_eq!(used, expected, "{value}");
            assert_eq!(!notices.is_empty(), told, "{notices:?}");
        }
        let (settings, notices) = Settings::from_value(&json!({"ttl": 1, "loop_wait": 0, "retry_timeout": -3}));
        assert_eq!(settings.ttl, Duration::from_secs(2));
        assert_eq!(notices.len(), 4);
    }

    #[test]
    fn words_aliases_and_limits() {
        let read = |value| Settings::from_value(&value).0;
        assert_eq!(read(json!({"synchronous_mode": "quorum"})).synchronous_mode, SynchronousMode::Quorum);
        assert_eq!(read(json!({"synchronous_mode": "On"})).synchronous_mode, SynchronousMode::On);
        assert_eq!(read(json!({"synchronous_mode": true})).synchronous_mode, SynchronousMode::On);
        assert_eq!(read(json!({"synchronous_mode": "maybe"})).synchronous_mode, SynchronousMode::Off);
        let standby = json!({"synchronous_mode": true, "standby_cluster": {"host": "h"}});
        assert_eq!(read(standby).synchronous_mode, SynchronousMode::Off);

        assert_eq!(read(json!({"master_start_timeout": 5})).primary_start_timeout.as_secs(), 5);
        let both = json!({"master_start_timeout": 5, "primary_start_timeout": 0});
        assert_eq!(read(both).primary_start_timeout.as_secs(), 0);
        assert_eq!(read(json!({"primary_stop_timeout": 0})).primary_stop_timeout, None);
        assert_eq!(read(json!({"maximum_lag_on_syncnode": 0})).maximum_lag_on_syncnode, None);
        assert_eq!(read(json!({"maximum_lag_on_syncnode": 10})).maximum_lag_on_syncnode, Some(10));
        assert_eq!(read(json!({"synchronous_node_count": 0})).synchronous_node_count, 0);
        assert_eq!(
            read(json!({"synchronous_node_count": 0, "synchronous_mode_strict": true})).synchronous_node_count,
            1
        );
        assert_eq!(read(json!({"member_slots_ttl": "1h"})).member_slots_ttl.as_secs(), 3600);
        assert_eq!(read(json!({"standby_cluster": {"primary_slot_name": "x"}})).standby_cluster, None);
        assert_eq!(
            read(json!({"permanent_slots": {}, "slots": {"a": null}})).slots,
            Map::from_iter([("a".into(), Value::Null)])
        );
        assert!(read(json!({"pause": "on"})).pause);
    }

    #[test]
    fn bad_values_are_told() {
        let value = json!({
            "ttl": "soon", "maximum_lag_on_failover": -1, "pause": [],
            "slots": {
                "Bad-Name": {}, "good": {}, "odd": "x", "lame": {"type": "logical", "database": "d"}, "loud": {"type": "Logical"},
                "half": {"plugin": "p", "databse": "d"}, "kept": {"type": "physical", "database": "d", "plugin": "p"},
            },
            "ignore_slots": "x", "postgresql": 5, "looop_wait": 1, "primary_start_timeout": 1.0e300,
        });
        let (settings, _) = Settings::from_value(&value);
        assert_eq!(settings.slots.keys().collect::<Vec<_>>(), ["good", "half", "kept"]);
        assert_eq!(Settings { slots: Map::new(), ..settings }, Settings::default());
        assert_eq!(
            notices(value),
            [
                "dynamic configuration: looop_wait: unknown key, ignored; loop_wait was meant?",
                "dynamic configuration: slots.half.databse: unknown key, ignored; database was meant?",
                "dynamic configuration: slots.half: is a physical slot; a logical one needs both database and plugin",
                "dynamic configuration: ttl: \"soon\" is ignored: a whole number of at most 31536000 is expected",
                "dynamic configuration: postgresql: 5 is ignored: a section (key: value) is expected",
                "dynamic configuration: maximum_lag_on_failover: -1 is ignored: a whole number of at least 0 is expected",
                "dynamic configuration: primary_start_timeout: 1e+300 is ignored: a whole number from 0 to 31536000 is expected",
                "dynamic configuration: pause: [] is ignored: on, off, true, false, yes or no is expected",
                "dynamic configuration: slots.Bad-Name: {…} is ignored: a slot's name has 1 to 63 of a-z, 0-9 and _",
                "dynamic configuration: slots.odd: \"x\" is ignored: Bad value for slot 'odd': a map (type, database, plugin) is expected",
                "dynamic configuration: slots.lame: {…} is ignored: Bad value for slot 'lame': a logical slot needs database and plugin",
                "dynamic configuration: slots.loud: {…} is ignored: Bad value for slot 'loud': type is physical or logical",
                "dynamic configuration: ignore_slots: \"x\" is ignored: a list of maps (name, type, database, plugin) is expected",
            ]
        );
    }

    #[test]
    fn bad_values_stay_as_they_were() {
        let good = json!({
            "ttl": 20, "loop_wait": 3, "retry_timeout": 4, "maximum_lag_on_failover": 5, "maximum_lag_on_syncnode": 6,
            "max_timelines_history": 7, "master_start_timeout": 8, "primary_stop_timeout": 9, "switchover_grace": 10,
            "primary_race_backoff": 11, "router_lease": 12, "synchronous_mode": "quorum", "synchronous_mode_strict": true,
            "synchronous_node_count": 2, "failsafe_mode": true, "check_timeline": true, "pause": true,
            "member_slots_ttl": 13, "slots": {"a": {"database": "d", "plugin": "p"}}, "ignore_slots": [{"name": "b"}],
            "postgresql": {"parameters": {"work_mem": "1MB"}},
        });
        let Value::Object(keys) = &good else { panic!("no map") };
        let (before, notices) = Settings::from_value(&good);
        assert_eq!(notices, []);
        let bad: Map<String, Value> = keys.keys().map(|key| (key.clone(), json!("onn"))).collect();
        let (settings, notices) = Settings::after(&Value::Object(bad.clone()), &before);
        assert_eq!((&settings, notices.len()), (&before, keys.len()));
        assert_eq!(Settings::after(&Value::Object(bad), &settings).0, before, "however often it is read");
        assert_eq!(Settings::after(&json!([1]), &before).0, before);
        // What is not given is not wrong.
        assert_eq!(Settings::after(&json!({}), &before).0, Settings::default());

        let slots = |value| Settings::after(&json!({ "slots": value }), &before).0.slots;
        assert_eq!(slots(json!({"a": "onn", "c": "onn"})), before.slots);
        assert_eq!(slots(json!({"c": "onn"})), Map::new());
        let outside = Settings::from_value(&json!({"standby_cluster": {"host": "h"}})).0;
        assert_eq!(Settings::after(&json!({"standby_cluster": "onn"}), &outside).0, outside);
    }

    #[test]
    fn what_a_slot_is() {
        for (definition, logical) in [
            (json!({"database": "d", "plugin": "p"}), Some(("d", "p"))),
            (json!({"type": "logical", "database": "d", "plugin": "p"}), Some(("d", "p"))),
            (json!({"type": "physical", "database": "d", "plugin": "p"}), None),
            (json!({"database": "d", "plugin": ""}), None),
            (json!({"plugin": "p"}), None),
            (json!(0), None),
        ] {
            assert_eq!(logical_slot(&definition), logical, "{definition}");
        }
    }

    #[test]
    fn unknown_fields_of_matchers_are_told() {
        let value = json!({"ignore_slots": [{"name": "a"}, {"nme": "b", "type": "logical"}]});
        assert_eq!(Settings::from_value(&value).0.ignore_slots.len(), 2);
        assert_eq!(
            notices(value),
            ["dynamic configuration: ignore_slots[1].nme: unknown key, ignored; name was meant?"]
        );
    }

    #[test]
    fn a_new_cluster_starts_fast() {
        let map = |value| serde_json::from_value::<Map<String, Value>>(value).expect("a map");
        let cases = [
            (json!({}), json!({"ttl": 5, "loop_wait": 1, "retry_timeout": 1})),
            (json!({"ttl": 30, "pause": true}), json!({"ttl": 30, "loop_wait": 1, "retry_timeout": 1, "pause": true})),
            (json!({"loop_wait": 10}), json!({"ttl": 12, "loop_wait": 10, "retry_timeout": 1})),
            (json!({"retry_timeout": "10"}), json!({"ttl": 21, "loop_wait": 1, "retry_timeout": "10"})),
            (json!({"ttl": null}), json!({"ttl": 5, "loop_wait": 1, "retry_timeout": 1})),
        ];
        for (given, expected) in cases {
            assert_eq!(new_cluster(&map(given)), expected);
        }
    }

    proptest! {
        #[test]
        fn the_relation_always_holds(ttl in -5i64..100, loop_wait in -5i64..100, retry_timeout in -5i64..100) {
            let value = json!({"ttl": ttl, "loop_wait": loop_wait, "retry_timeout": retry_timeout});
            let (settings, _) = Settings::from_value(&value);
            prop_assert!(settings.loop_wait + 2 * settings.retry_timeout <= settings.ttl);
            prop_assert!(settings.loop_wait >= Duration::from_secs(1) && !settings.retry_timeout.is_zero());
        }

        #[test]
        fn no_value_panics(text in "[0-9a-z.-]{0,24}", number in any::<f64>(), whole in any::<i64>()) {
            for value in [json!(text), json!(number), json!(whole), json!([text]), json!({&text: whole})] {
                let map: Map<String, Value> = KNOWN.iter().map(|key| ((*key).to_owned(), value.clone())).collect();
                let _ = (new_cluster(&map), Settings::from_value(&Value::Object(map)));
            }
        }
    }
}
