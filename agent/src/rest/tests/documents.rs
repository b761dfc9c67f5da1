//! What a node and a cluster say of themselves.

use super::*;
use crate::guard::{self, Part};
use crate::ha::situation::{Ground, Me, Memory};
use crate::peer::PeerStatus;

#[tokio::test]
async fn a_primary_with_the_lock() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    put(&node.store, "leader", "pg-a".into()).await;
    node.board.send_modify(lead);
    node.catch_up().await;

    let (status, document) = node.get("/").await;
    assert_eq!(status, 200);
    let expected = json!({
        "state": "running",
        "postmaster_start_time": "2031-05-01 10:00:00.123456+00:00",
        "role": "primary",
        "server_version": 150004,
        "xlog": {"location": 0x300_0148},
        "timeline": 2,
        "replication": [{"usename": "replicator", "application_name": "pg-b", "client_addr": "10.0.0.2",
                         "state": "streaming", "sync_state": "async", "sync_priority": 0}],
        "dcs_last_seen": 1935568800,
        "database_system_identifier": "7100000000000000001",
        "patroni": {"version": "4.1.4", "scope": "demo", "name": "pg-a"},
        "guard": {"process": "off: not started", "egress": "off: not started", "watchdog": "off: not started"},
    });
    assert_eq!(document.to_string(), expected.to_string(), "fields, order and values");
    for (path, expected) in [
        ("/primary", 200),
        ("/read-write", 200),
        ("/leader", 200),
        ("/standby_leader", 503),
        ("/health", 200),
        ("/replica", 503),
        ("/read-only", 200),
        ("/readiness", 200),
        ("/liveness", 200),
        ("/nonsense", 503),
        ("/restart", 503),
    ] {
        assert_eq!(node.get(path).await.0, expected, "{path}");
    }
    node.board.send_modify(|board| board.leader_until = Some(Instant::default()));
    assert_eq!(node.get("/primary").await.0, 503, "a lease that is over counts for nothing");
}

#[tokio::test]
async fn a_streaming_standby() {
    let mut node_board = board("replica");
    node_board.tags.insert("az".into(), "b".into());
    let (process, egress, watchdog) = (Part::Armed, Part::Off("why".into()), Part::Ready);
    node_board.guard = guard::Status { process, egress, watchdog, ..guard::Status::default() };
    let node = Node::start(local("pg-b"), PgStatus::Running(standby()), node_board).await;
    put(&node.store, "leader", "pg-a".into()).await;
    node.catch_up().await;
    let (status, text) = node.request("GET", "/patroni", None).await;
    assert_eq!(status, 200);
    let expected = concat!(
        r#"{"state": "running", "postmaster_start_time": "2031-05-01 10:00:00.123456+00:00", "role": "replica", "#,
        r#""server_version": 150004, "xlog": {"received_location": 50331976, "replayed_location": 50331904, "#,
        r#""replayed_timestamp": "2031-05-01 10:00:00.500000+02:00", "paused": false}, "timeline": 2, "#,
        r#""replication_state": "streaming", "dcs_last_seen": 1935568800, "tags": {"az": "b"}, "#,
        r#""database_system_identifier": "7100000000000000001", "#,
        r#""patroni": {"version": "4.1.4", "scope": "demo", "name": "pg-b"}, "#,
        r#""guard": {"process": "armed", "egress": "off: why", "watchdog": "ready"}}"#,
    );
    assert_eq!(text, expected);
    let peers = HttpPeers::new(RestClient::for_agent(&local("client")).unwrap());
    let status = peers.member_status(&node.url("/patroni"), Duration::from_secs(2)).await.unwrap();
    assert!(status.in_recovery && status.lsn == Lsn(0x300_0148) && status.timeline == Some(TimelineId(2)));

    for (path, expected) in [
        ("/replica", 200),
        ("/replica?lag=71", 503),
        ("/replica?lag=72", 200),
        ("/replica?tag_az=b", 200),
        ("/replica?tag_az=c", 503),
        ("/async", 200),
        ("/sync", 503),
        ("/primary", 503),
        ("/readiness?lag=10&mode=write", 200),
        ("/readiness?lag=10", 503),
    ] {
        assert_eq!(node.get(path).await.0, expected, "{path}");
    }
}

#[tokio::test]
async fn a_hanging_postgresql_does_not_hang_the_answer() {
    let node = Node::start(local("pg-a"), PgStatus::Unresponsive, board("primary")).await;
    let started = SystemClock.now();
    let (status, document) = node.get("/patroni").await;
    assert!(SystemClock.now().since(started) < Duration::from_secs(2));
    assert_eq!((status, &document["state"], &document["role"]), (200, &json!("unknown"), &json!("primary")));
    assert_eq!(document.get("xlog"), None, "so that nobody counts it in a race");
    assert_eq!(PeerStatus::parse(&document), None);
}

#[tokio::test]
async fn whoever_leads_says_so_in_time_whatever_postgresql_does() {
    let mut leader = board("primary");
    leader.not_gone_until = Some(SystemClock.now() + Duration::from_secs(60));
    let node = Node::start(local("pg-a"), PgStatus::Unresponsive, leader).await;
    let started = SystemClock.now();
    let (status, document) = node.get("/patroni?within=200").await;
    assert!(
        SystemClock.now().since(started) < Duration::from_secs(1),
        "well before it would be told that nothing answers"
    );
    assert_eq!((status, &document["holds_leader_key"]), (200, &json!(true)));
    assert!(!PeerStatus::parse(&document).unwrap().in_recovery, "{document}");
    assert_eq!(node.get("/patroni?within=soon").await.0, 200);
    node.board.send_modify(|board| board.not_gone_until = Some(Instant::default()));
    assert_eq!(node.get("/patroni?within=200").await.1.get("holds_leader_key"), None, "its lease is over");
}

#[tokio::test]
async fn what_the_loop_can_not_have_seen_yet() {
    let node = Node::start(local("pg-a"), PgStatus::Running(standby()), board("replica")).await;
    let mut control = board("replica");
    for (state, seen, expected) in [
        ("starting", PgStatus::Running(standby()), "running"),
        ("crashed", PgStatus::Running(standby()), "running"),
        ("stopping", PgStatus::Running(standby()), "stopping"),
        ("creating replica", PgStatus::NoData, "creating replica"),
        ("running", PgStatus::Starting, "starting"),
        ("running", PgStatus::NoData, "unknown"),
    ] {
        control.state = state.into();
        node.board.send_replace(control.clone());
        node.postgres.send_replace(seen);
        assert_eq!(node.get("/health").await.1["state"], expected, "{state}");
    }
}

#[tokio::test]
async fn the_cluster_document() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let member = |name: &str, more: Value| {
        let mut member = json!({"conn_url": format!("postgres://{name}:5432/postgres"),
            "api_url": format!("http://{name}:8008/patroni"), "state": "running", "role": "replica", "version": "4.1.4"});
        member.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        member
    };
    put(&node.store, "config", json!({"ttl": 30, "pause": true, "synchronous_mode": true})).await;
    put(&node.store, "pg-b", member("pg-b", json!({"xlog_location": 100, "receive_lsn": 100, "timeline": 3}))).await;
    put(&node.store, "pg-a", member("pg-a", json!({"role": "primary", "timeline": 3, "tags": {"x": 1}}))).await;
    put(&node.store, "leader", "pg-a".into()).await;
    put(&node.store, "failover", json!({"leader": "pg-a", "scheduled_at": "2031-05-01T10:00:00+00:00"})).await;
    put(&node.store, "history", json!([[1, 100, "why", "2031-01-01T00:00:00+00:00", "pg-b"]])).await;
    let status = json!({"optime": 150});
    assert!(node.store.put_status(&"pg-a".into(), &status).await.unwrap().is_done());
    node.catch_up().await;
    let (status, text) = node.request("GET", "/cluster", None).await;
    let expected = concat!(
        r#"{"members": [{"name": "pg-a", "role": "leader", "state": "running", "api_url": "http://pg-a:8008/patroni", "#,
        r#""host": "pg-a", "port": 5432, "timeline": 3, "tags": {"x": 1}}, "#,
        r#"{"name": "pg-b", "role": "replica", "state": "running", "api_url": "http://pg-b:8008/patroni", "#,
        r#""host": "pg-b", "port": 5432, "timeline": 3, "receive_lsn": "0/64", "receive_lag": 50, "#,
        r#""replay_lsn": "unknown", "replay_lag": "unknown", "lsn": "0/64", "lag": 50}], "pause": true, "#,
        r#""scheduled_switchover": {"at": "2031-05-01T10:00:00+00:00", "from": "pg-a"}, "scope": "demo"}"#,
    );
    assert_eq!((status, text.as_str()), (200, expected));
    let history = json!([[1, 100, "why", "2031-01-01T00:00:00+00:00", "pg-b"]]);
    assert_eq!(node.get("/history").await, (200, history));
}

#[tokio::test]
async fn metrics_have_patronis_names_and_labels() {
    let mut leader = board("primary");
    lead(&mut leader);
    leader.transitions.insert(("promote", "no leader"), 3);
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), leader).await;
    assert_eq!(node.get("/nonsense").await.0, 503);
    let (status, text) = node.request("GET", "/metrics", None).await;
    assert_eq!(status, 200);
    let open_files = text.lines().find_map(|line| line.strip_prefix("process_open_fds ")).unwrap();
    assert!(open_files.parse::<u32>().unwrap() > 3);
    for line in [
        "patroni_version{scope=\"demo\",name=\"pg-a\"} 040104",
        "patroni_postgres_running{scope=\"demo\",name=\"pg-a\"} 1",
        "patroni_postmaster_start_time{scope=\"demo\",name=\"pg-a\"} 1935396000.123456",
        "patroni_primary{scope=\"demo\",name=\"pg-a\"} 1",
        "patroni_xlog_location{scope=\"demo\",name=\"pg-a\"} 50331976",
        "patroni_xlog_replayed_timestamp{scope=\"demo\",name=\"pg-a\"} 0.0",
        "# TYPE patroni_xlog_location counter",
        "patroni_postgres_state{scope=\"demo\",name=\"pg-a\"} 5",
        "patroni_failover_priority{scope=\"demo\",name=\"pg-a\"} 1",
        "patroni_cluster_unlocked{scope=\"demo\",name=\"pg-a\"} 1",
        "trunkline_transitions_total{scope=\"demo\",name=\"pg-a\",kind=\"promote\",reason=\"no leader\"} 3",
        "trunkline_rest_requests_total{code=\"503\"} 1",
        "trunkline_decision{scope=\"demo\",name=\"pg-a\",decision=\"keep\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    let names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let patroni: Vec<&str> = names.iter().copied().filter(|name| name.starts_with("patroni_")).collect();
    assert_eq!(patroni.len(), 26);
    assert!(names.iter().collect::<std::collections::BTreeSet<_>>().len() == names.len(), "each name once");
}

#[tokio::test]
async fn liveness_follows_the_loop() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let now = SystemClock.now();
    for (role, late, pause, expected) in [
        ("primary", 29, false, 200),
        ("primary", 31, false, 503),
        ("primary", 31, true, 200),
        ("replica", 31, false, 200),
        ("replica", 61, false, 503),
    ] {
        node.board.send_modify(|board| {
            board.postgres = PgStatus::Running(primary());
            board.role = role.into();
            board.next_run = now - Duration::from_secs(late);
            board.pause = pause;
        });
        assert_eq!(node.code("GET", "/liveness", None).await, expected, "{role} {late} {pause}");
    }
}

#[tokio::test]
async fn without_the_dcs() {
    let mut leader = board("primary");
    leader.leader_until = Some(SystemClock.now() + Duration::from_secs(60));
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), leader).await;
    put(&node.store, "config", json!({"ttl": 2, "loop_wait": 1, "retry_timeout": 1})).await;
    put(&node.store, "leader", "pg-a".into()).await;
    node.catch_up().await;
    assert_eq!(node.get("/").await.1.get("cluster_unlocked"), None);
    node.store.dcs().set_faults(|faults| faults.refused = true);
    node.store.dcs().break_watches();
    let deadline = SystemClock.now() + Duration::from_secs(6);
    while node.get("/").await.1.get("cluster_unlocked").is_none() {
        assert!(SystemClock.now() < deadline, "a view that nobody confirms is not known for ever");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(node.get("/primary").await.0, 200, "its lease is what counts");
    assert_eq!(node.get("/async").await.0, 503);
    for (method, path, body, expected) in [
        ("GET", "/cluster", None, 503),
        ("GET", "/history", None, 503),
        ("PATCH", "/config", Some(json!({"ttl": 3})), 503),
        ("PUT", "/config", Some(json!({"ttl": 3})), 502),
        ("POST", "/switchover", Some(json!({"leader": "pg-a"})), 503),
        ("POST", "/reinitialize", None, 503),
        ("DELETE", "/switchover", None, 409),
    ] {
        let (status, text) = node.request(method, path, body).await;
        assert!(status == expected && !text.is_empty(), "{method} {path}: {status} {text}");
    }
}

#[tokio::test]
async fn decisions_are_told_with_their_reasons() {
    let node = Node::start(local("pg-a"), PgStatus::Running(standby()), board("replica")).await;
    assert_eq!(node.get("/decisions").await, (200, json!([])));
    let at = chrono::DateTime::from_timestamp(1_935_568_800, 0).unwrap();
    let noted = crate::node::Noted { at, action: "abstain", reason: "pg-b is ahead".to_owned() };
    node.board.send_modify(|board| assert!(noted.note_in(&mut board.decisions)));
    let line = json!({"time": "2031-05-03T10:00:00.000+00:00", "decision": "abstain", "reason": "pg-b is ahead"});
    assert_eq!(node.get("/decisions").await, (200, json!([line])));
}

#[tokio::test]
async fn an_operators_questions() {
    let mut node_board = board("replica");
    let me = Me {
        name: "pg-b".into(),
        tags: Map::new(),
        may_bootstrap: true,
        use_pg_rewind: true,
        use_slots: true,
        restores_alone: false,
        reclone_diverged: false,
        reclone_unrewindable: false,
    };
    let (memory, ttl) = (Memory::default(), Duration::from_secs(30));
    let ground = Ground { me, memory, view: None, lease_until: Some(Instant::default()), ttl, dcs_away: false };
    node_board.ground = Some(Arc::new(ground));
    let mut secured = local("pg-b");
    secured.restapi.authentication = Some(("u".into(), trunkline_config::Secret::new("p")));
    let node = Node::start(secured, PgStatus::Running(standby()), node_board).await;
    put(&node.store, "leader", "pg-a".into()).await;
    put(&node.store, "pg-a", json!({"api_url": "http://127.0.0.1:1/patroni", "role": "primary"})).await;
    put(&node.store, "pg-c", json!({"api_url": "http://127.0.0.1:1/patroni", "role": "replica"})).await;
    node.catch_up().await;

    let (status, told) = node.get("/why").await;
    assert_eq!((status, &told["leads"], &told["leader"]), (200, &json!(false), &json!("pg-a")));
    let verdict = json!({
        "may_lead": true, "decision": "acquire", "if": "pg-a were gone",
        "reason": "at 0/3000148 with priority 1; nobody is a better choice (pg-c did not answer)",
    });
    assert_eq!(told["verdict"], verdict);
    assert_eq!(told["own"], json!({"lsn": "0/3000148", "timeline": 2, "priority": 1}));
    assert_eq!(told["members"], json!({"pg-c": null}), "the leader itself is not asked");
    assert_eq!(told["cluster"]["maximum_lag_on_failover"], 1_048_576);

    let (_, told) = node.get("/rto").await;
    assert_eq!((&told["postgresql"]["stop_ms"], &told["postgresql"]["promotion_ms"]), (&json!(25.0), &Value::Null));
    assert!(told["estimate"].as_str().unwrap().starts_with("host death ≤ 30.6 s"), "{told}");

    assert_eq!(node.get("/explain?key=work_mem").await.0, 401, "a node's file is not for everybody");
}

#[tokio::test]
async fn a_setting_is_explained() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let (status, told) = node.get("/explain?key=work_mem").await;
    assert_eq!((status, &told["name"], &told["key"]), (200, &json!("pg-a"), &json!("postgresql.parameters.work_mem")));
    assert_eq!(told["postgresql"]["file"], "/d/postgresql.auto.conf:3");
    let notes = told["postgresql"]["notes"].to_string();
    assert!(notes.contains("ALTER SYSTEM wins") && notes.contains("role app: 1GB"), "{notes}");
    assert_eq!(node.get("/explain?key=ttl").await.1["value"], "30");
    assert!(node.get("/explain?key=nonsense").await.1["postgresql"]["error"].as_str().unwrap().contains("knows no"));
    assert_eq!(node.get("/explain").await.0, 400);
}
