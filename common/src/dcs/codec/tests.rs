//! Golden files: `testdata/<case>.keys` (a line is a key, a space, the raw value) and `testdata/<case>.view` (the view as
//! Rust prints it). `UPDATE_GOLDEN=1 cargo nextest run -p trunkline-common golden` writes the second ones anew.

use std::path::PathBuf;

use proptest::prelude::*;
use trunkline_config::dynamic::SynchronousMode;

use super::*;
use crate::cluster::host_port;
use crate::dcs::Change;

const KEYS: [&str; 11] = [
    "initialize",
    "leader",
    "config",
    "history",
    "status",
    "optime/leader",
    "failover",
    "sync",
    "failsafe",
    "members/pg-a",
    "routers/7b",
];

fn paths() -> Paths {
    Paths::new("service", "demo")
}

fn testdata(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/dcs/testdata").join(name)
}

fn entry(key: &str, value: &[u8], revision: i64) -> KeyValue {
    let revision = Revision(revision);
    KeyValue { key: key.to_owned(), value: value.to_vec(), created: revision, modified: revision, lease: LeaseId(7) }
}

fn snapshot(case: &str) -> Snapshot {
    let text = std::fs::read_to_string(testdata(&format!("{case}.keys"))).unwrap();
    let line = |(i, line): (usize, &str)| {
        let (key, value) = line.split_once(' ').unwrap();
        entry(key, value.as_bytes(), i as i64 + 1)
    };
    Snapshot { revision: Revision(100), entries: text.lines().enumerate().map(line).collect() }
}

fn one(key: &str, value: &[u8], revision: i64) -> Snapshot {
    Snapshot { revision: Revision(revision), entries: vec![entry(&paths().key(key), value, revision)] }
}

/// Everything but the settings, which are the configuration crate's business and tested there.
fn printed(view: &ClusterView) -> String {
    let ClusterView { revision, initialize, config, settings: _, leader, members, failover, .. } = view;
    let ClusterView { failover_revision, sync, status, history, has_history, failsafe, malformed, .. } = view;
    let parts = [
        format!("{revision:?} {initialize:?} config {config:?}"),
        format!("{leader:?}"),
        format!("{members:#?}"),
        format!("failover {failover_revision:?} {failover:#?}"),
        format!("{sync:#?}"),
        format!("{status:#?}"),
        format!("history {has_history} {history:#?}"),
        format!("failsafe {failsafe:#?}"),
        format!("malformed {malformed:#?}\n"),
    ];
    parts.join("\n")
}

#[test]
fn golden_views() {
    for case in ["switchover", "legacy", "strings", "malformed"] {
        let printed = printed(&view(&paths(), &snapshot(case), None));
        let golden = testdata(&format!("{case}.view"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&golden, &printed).unwrap();
        }
        assert_eq!(printed, std::fs::read_to_string(&golden).unwrap(), "{}", golden.display());
    }
}

#[test]
fn what_patroni_wrote_is_written_the_same() {
    let written = snapshot("switchover");
    let seen = view(&paths(), &written, None);
    let text = |key: &str| {
        let key = paths().key(key);
        String::from_utf8(written.entries.iter().find(|entry| entry.key == key).unwrap().value.clone()).unwrap()
    };
    let ours = |value: Value| String::from_utf8(compact(&value)).unwrap();
    for name in ["pg-a", "pg-b"] {
        assert_eq!(ours(encode_member(&seen.members[&name.into()])), text(&format!("members/{name}")));
    }
    assert_eq!(ours(encode_status(&seen.status)), text("status"));
    assert_eq!(ours(encode_history(&seen.history)), text("history"));
    assert_eq!(ours(encode_failover(seen.failover.as_ref())), text("failover"));
    assert_eq!(ours(encode_failover(None)), "{}");
    assert_eq!(ours(encode_sync(seen.sync.leader.as_ref(), 0, &["pg-c".into(), "pg-b".into()])), text("sync"));
    assert_eq!(ours(encode_sync(Some(&"a".into()), 0, &[])), r#"{"leader":"a","quorum":0,"sync_standby":null}"#);
    assert_eq!(ours(seen.config.unwrap().value), text("config"));
}

#[test]
fn what_was_good_stays_in_force() {
    let good = view(&paths(), &snapshot("switchover"), None);
    let mut broken = snapshot("malformed");
    for entry in &mut broken.entries {
        entry.modified = Revision(entry.modified.0 + 50);
    }
    let seen = view(&paths(), &broken, Some(&good));
    assert_eq!(seen.malformed.len(), 8);
    assert_eq!(seen.config.as_ref().map(|config| &config.value), good.config.as_ref().map(|config| &config.value));
    assert_eq!(seen.config.as_ref().map(|config| config.revision), Some(Revision(51)));
    assert_eq!((&seen.settings, &seen.failover, &seen.history), (&good.settings, &good.failover, &good.history));
    assert_eq!((&seen.status, &seen.members, &seen.failsafe), (&good.status, &good.members, &good.failsafe));
    assert_eq!(seen.sync, SyncState { revision: Revision(59), ..good.sync.clone() });
    assert_eq!(seen.failover_revision, Revision(52));

    assert!(seen.unknown.is_empty());
    // Who has just started has seen nothing better, also when it looks again.
    let first = view(&paths(), &broken, None);
    let again = view_after(&paths(), &broken, Some(&first), broken.revision);
    for seen in [&first, &again] {
        let unknown: Vec<&str> = seen.unknown.iter().map(String::as_str).collect();
        for key in ["config", "failsafe", "history", "status", "sync"] {
            assert!(unknown.contains(&key), "{key}: {unknown:?}");
        }
    }
    assert_eq!(view(&paths(), &snapshot("switchover"), Some(&first)).unknown, Default::default(), "mended");

    // Gone is gone: only what cannot be read stays.
    let empty = view(&paths(), &Snapshot::default(), Some(&good));
    assert_eq!(empty, ClusterView::default());

    // And it is in force as long as the value stays as it is, also over further readings.
    assert_eq!(view(&paths(), &broken, Some(&seen)), seen);
}

#[test]
fn a_restore_is_read_as_it_was_written_with_or_without_a_list() {
    let read = |value: &str| view(&paths(), &one("restored", value.as_bytes(), 9), None);
    let list =
        SyncState { leader: Some("a".into()), standbys: vec!["b".to_owned()], quorum: 1, revision: Revision(8150) };
    for sync in [None, Some(list), Some(SyncState { revision: Revision(3), ..SyncState::default() })] {
        let record = RestoreRecord { count: 2, since: Revision(4711), sync };
        assert_eq!(read(&encode_restored(&record).to_string()).restored, record);
    }
    assert_eq!(read(r#"{"count":1,"since":7,"sync":null}"#).restored.sync, None);
    for broken in [r#"{"count":1}"#, r#"{"count":1,"since":7,"sync":"a"}"#, r#"{"count":1,"since":7,"sync":{}}"#] {
        assert_eq!(read(broken).malformed.len(), 1, "{broken}");
    }
}

#[test]
fn a_mistyped_setting_stays_as_it_was() {
    let read = |value: Value, revision, before: &ClusterView| {
        view(&paths(), &one("config", value.to_string().as_bytes(), revision), Some(before))
    };
    let good = read(json!({"synchronous_mode": "quorum", "ttl": 40}), 1, &ClusterView::default());
    let mistyped = read(json!({"synchronous_mode": "onn", "ttl": 45}), 2, &good);
    let expected = Settings { ttl: Duration::from_secs(45), ..good.settings.clone() };
    assert_eq!((good.settings.synchronous_mode, &mistyped.settings), (SynchronousMode::Quorum, &expected));
    // The key as it stands is what is shown and patched.
    let value = mistyped.config.as_ref().map(|config| &config.value["synchronous_mode"]);
    assert_eq!((value, mistyped.malformed.len()), (Some(&json!("onn")), 0));
    // Another setting is changed, and the mistake is still there.
    let still = read(json!({"synchronous_mode": "onn", "ttl": 40}), 3, &mistyped);
    assert_eq!(still.settings, good.settings);
    assert_eq!(read(json!({"ttl": 40}), 4, &still).settings.synchronous_mode, SynchronousMode::Off);
}

#[test]
fn times_with_an_offset_are_understood() {
    for text in [
        "2031-05-01T10:00:00+00:00",
        "2031-05-01T10:00:00Z",
        "2031-05-01 12:00:00.000+0200",
        "2031-05-01T12:00+02:00",
        "2031-05-01 10:00 Z",
    ] {
        assert_eq!(timestamp(text).map(|at| at.timestamp()), Some(1_935_396_000), "{text}");
    }
    for text in ["2031-05-01T10:00:00", "tomorrow", "", "10:00+00:00"] {
        assert_eq!(timestamp(text), None, "{text}");
    }
}

#[test]
fn members_addresses() {
    for (url, host, port) in [
        ("postgres://10.1.0.5:5433/postgres", "10.1.0.5", 5433),
        ("postgres://u:p@db.example/postgres", "db.example", 5432),
        ("postgres://[fd00::1]:5433/postgres", "fd00::1", 5433),
        ("postgres://[fd00::1]/postgres?x=1", "fd00::1", 5432),
    ] {
        assert_eq!(host_port(url), Some((host.to_owned(), port)), "{url}");
    }
    for url in ["", "postgres://", "postgres://h:99999/x"] {
        assert_eq!(host_port(url), None, "{url}");
    }
}

fn member_value() -> impl Strategy<Value = Member> {
    let text = || proptest::option::of("[a-z:/]{1,12}");
    let lsn = || proptest::option::of(any::<u64>().prop_map(Lsn));
    let tags = proptest::collection::btree_map("[a-z]{1,5}", any::<bool>(), 0..3);
    ((text(), text(), text(), "[a-z ]{1,9}", "[a-z_]{0,9}"), (lsn(), lsn(), lsn()), 0u32.., any::<[bool; 3]>(), tags)
        .prop_map(
            |((conn, api, proxy, state, role), (xlog, receive, replay), timeline, [restart, pause, cap], tags)| {
                Member {
                    conn_url: conn,
                    api_url: api,
                    proxy_url: proxy,
                    state,
                    role,
                    xlog_location: xlog,
                    receive_lsn: receive,
                    replay_lsn: replay,
                    timeline: (timeline > 0).then_some(TimelineId(timeline)),
                    pending_restart: restart,
                    pause,
                    checkpoint_after_promote: cap.then_some(false),
                    tags: tags.into_iter().map(|(tag, on)| (tag, Value::from(on))).collect(),
                    ..Member::default()
                }
            },
        )
}

#[test]
fn routers_round_trip_and_hold_nobody_up_for_long() {
    let router = |lease| RouterRecord { name: "web1/7".into(), lease: Duration::from_secs(lease), epoch: Revision(42) };
    for (written, read) in [(5, 5), (86_400, 60)] {
        let value = compact(&encode_router(&router(written)));
        let seen = view(&paths(), &one("routers/7b", &value, 1), None);
        assert_eq!(seen.routers, BTreeMap::from([("7b".to_owned(), router(read))]));
    }
    let seen = view(&paths(), &one("routers/7b", b"{}", 1), None);
    assert_eq!((seen.routers.len(), seen.malformed.len()), (0, 1));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(key in proptest::sample::select(&KEYS[..]), value: Vec<u8>, before: Vec<u8>) {
        let before = view(&paths(), &one(key, &before, 1), None);
        view(&paths(), &one(key, &value, 2), Some(&before));
    }

    #[test]
    fn arbitrary_json_never_panics(
        key in proptest::sample::select(&KEYS[..]),
        value in r#"[\[\]{}:,"0-9a-z\\. -]{0,40}"#,
    ) {
        view(&paths(), &one(key, value.as_bytes(), 1), None);
    }

    /// What is taken from the view before is what reading it again would give, whatever was written and removed.
    #[test]
    fn a_view_after_events_is_the_view(writes in proptest::collection::vec((0..KEYS.len(), 0..6usize), 1..30)) {
        const VALUES: [&str; 5] = [
            r#"{"ttl": 20, "leader": "pg-a", "sync_standby": "b", "optime": 7, "pg-a": "http://a", "lease": 5, "epoch": 9}"#,
            r#"{"optime": "9", "leader": "b", "member": "c", "quorum": 1, "state": "running"}"#,
            r#"[[1, 67108864, "no recovery target specified"]]"#,
            "12345678901234",
            "nonsense {",
        ];
        let key = |at: usize| format!("{}{}", paths().prefix(), KEYS[at]);
        let (mut snapshot, mut previous) = (Snapshot::default(), ClusterView::default());
        for (at, value) in writes {
            let since = snapshot.revision;
            let revision = Revision(since.0 + 1);
            let change = match VALUES.get(value) {
                Some(value) => Change::Put(entry(&key(at), value.as_bytes(), revision.0)),
                None => Change::Delete(key(at)),
            };
            snapshot.apply(revision, vec![change]);
            let after = view_after(&paths(), &snapshot, Some(&previous), since);
            prop_assert_eq!(&after, &view(&paths(), &snapshot, Some(&previous)));
            previous = after;
        }
    }

    #[test]
    fn members_round_trip(member in member_value()) {
        let value = compact(&encode_member(&member));
        let seen = view(&paths(), &one("members/pg-a", &value, 1), None);
        prop_assert_eq!(&seen.members[&"pg-a".into()], &Member { lease: LeaseId(7), ..member });
    }
}
