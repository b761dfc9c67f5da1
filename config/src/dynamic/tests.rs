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
    assert_eq!(read(json!({"synchronous_node_count": 0, "synchronous_mode_strict": true})).synchronous_node_count, 1);
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
    assert_eq!(notices(value), ["dynamic configuration: ignore_slots[1].nme: unknown key, ignored; name was meant?"]);
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
