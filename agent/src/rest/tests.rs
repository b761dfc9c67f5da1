//! The API as clients see it: a server in this process over a store in memory, with a PostgreSQL that says what the test
//! wants.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use futures::StreamExt;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use trunkline_common::dcs::memory::MemoryDcs;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::{Instant, LeaseId, Lsn, Revision, SystemClock, SystemId, TimelineId};
use trunkline_config::Secret;
use trunkline_config::local::{Ctl, Etcd, Log, RestApi};

use super::*;
use crate::node::Refusal;
use crate::postgres::{PgRole, Running, WalSender};

/// A PostgreSQL that is looked at through a slot the test fills.
#[derive(Clone)]
struct Glass(watch::Receiver<PgStatus>);

impl Observe for Glass {
    async fn observe(&self, deadline: Duration) -> PgStatus {
        let status = self.0.borrow().clone();
        if status == PgStatus::Unresponsive {
            tokio::time::sleep(deadline).await;
        }
        status
    }
}

type TestStore = ClusterStore<MemoryDcs<SystemClock>>;

/// A node under test with its strings to pull.
struct Node {
    api: Arc<Api<MemoryDcs<SystemClock>, Glass, SystemClock>>,
    address: SocketAddr,
    store: TestStore,
    postgres: watch::Sender<PgStatus>,
    board: watch::Sender<Board>,
    commands: Option<mpsc::Receiver<Command>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn local(name: &str) -> Local {
    Local {
        scope: "demo".into(),
        name: name.into(),
        namespace: "service".into(),
        restapi: RestApi { listen: "127.0.0.1:0".into(), ..RestApi::default() },
        ctl: Ctl::default(),
        etcd: Etcd::default(),
        postgresql: Map::new(),
        bootstrap: None,
        tags: Map::new(),
        watchdog: Map::new(),
        log: Log { json: false, level: "INFO".into(), format: String::new(), dir: None },
        raw: json!({}),
    }
}

fn standby() -> Running {
    Running {
        role: PgRole::Standby,
        system_id: SystemId(7_100_000_000_000_000_001),
        timeline: Some(TimelineId(2)),
        lsn: Lsn(0x300_0148),
        receive_lsn: Some(Lsn(0x300_0148)),
        replay_lsn: Some(Lsn(0x300_0100)),
        replay_timestamp: Some("2031-05-01 10:00:00.5+02".into()),
        replay_paused: false,
        latest_end_lsn: Some(Lsn(0x300_0148)),
        replication_state: Some("streaming".into()),
        upstream: None,
        server_version: 150_004,
        postmaster_start_time: "2031-05-01 10:00:00.123456+00:00".into(),
        replication: Vec::new(),
        synchronous_standby_names: String::new(),
        pending_restart: BTreeMap::new(),
        slots: BTreeMap::new(),
    }
}

fn primary() -> Running {
    let sender = WalSender {
        usename: "replicator".into(),
        application_name: "pg-b".into(),
        client_addr: Some("10.0.0.2".into()),
        state: "streaming".into(),
        sync_state: "async".into(),
        sync_priority: 0,
        write_lsn: None,
        flush_lsn: None,
        replay_lsn: None,
    };
    Running {
        role: PgRole::Primary,
        receive_lsn: None,
        replay_lsn: None,
        replay_timestamp: None,
        latest_end_lsn: None,
        replication_state: None,
        replication: vec![sender],
        ..standby()
    }
}

fn board(role: &str) -> Board {
    Board {
        state: "running".into(),
        role: role.into(),
        postgres: PgStatus::NoData,
        leader_until: None,
        pause: false,
        task: None,
        tags: Map::new(),
        scheduled_restart: None,
        reason: "no action".into(),
        decision: "keep",
        next_run: SystemClock.now() + Duration::from_secs(1),
        dcs_last_seen: 1_935_568_800,
        watchdog_failed: false,
        transitions: BTreeMap::new(),
        failsafe_active: false,
    }
}

async fn put(store: &TestStore, key: &str, value: Value) {
    match key {
        "config" => drop(store.put_config(&value, None).await.unwrap()),
        "failover" => drop(store.put_failover(&value, None).await.unwrap()),
        "history" => store.put_history(&value).await.unwrap(),
        "leader" => {
            let lease = store.grant(Duration::from_secs(60)).await.unwrap().id;
            store.take_leader(&value.as_str().unwrap().into(), lease).await.unwrap();
        }
        member => store.put_member(&member.into(), &value, LeaseId(0)).await.unwrap(),
    }
}

impl Node {
    /// The node `pg-a` of a cluster that has settings, but no members yet.
    async fn start(local: Local, postgres: PgStatus, board: Board) -> Self {
        let store = ClusterStore::new(MemoryDcs::new(SystemClock), Paths::new("service", "demo"));
        put(&store, "config", json!({"ttl": 30, "loop_wait": 10})).await;
        Self::join(store, local, postgres, board).await
    }

    async fn join(store: TestStore, local: Local, postgres: PgStatus, board: Board) -> Self {
        let (postgres, glass) = watch::channel(postgres);
        let (board, board_seen) = watch::channel(board);
        let (sender, commands) = mpsc::channel(8);
        let nothing = Knowledge { view: None, confirmed_at: None, trouble: None };
        let (know, knowledge) = watch::channel(nothing);
        let mut seen = knowledge.clone();
        let api = Api::new(&local, store.clone(), knowledge, board_seen, sender, Glass(glass), SystemClock).unwrap();
        let api = Arc::new(api);
        let server = Server::bind(api.clone()).await.unwrap();
        let address = server.local_addr().unwrap();
        let tasks = vec![tokio::spawn(server.run(std::future::pending())), tokio::spawn(follow(store.clone(), know))];
        let node = Self { api, address, store, postgres, board, commands: Some(commands), tasks };
        seen.wait_for(|knowledge| knowledge.view.is_some()).await.unwrap();
        node
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    async fn request(&self, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
        let client = RestClient::for_agent(&local("client")).unwrap();
        let answer = client.request(method, &self.url(path), body.as_ref(), Duration::from_secs(10)).await.unwrap();
        (answer.status, answer.text)
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let (status, text) = self.request("GET", path, None).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    async fn code(&self, method: &str, path: &str, body: Option<Value>) -> u16 {
        self.request(method, path, body).await.0
    }

    /// Waits until the node knows what is in the store now.
    async fn catch_up(&self) {
        let revision = self.store.read().await.unwrap().revision;
        let mut knowledge = self.api.knowledge.clone();
        let known = knowledge.wait_for(|k| k.view.as_ref().is_some_and(|view| view.revision >= revision));
        tokio::time::timeout(Duration::from_secs(5), known).await.unwrap().unwrap();
    }

    /// Sends these bytes and reads until the end.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        tokio::time::timeout(Duration::from_secs(10), read).await.unwrap().unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Plays the HA loop: answers commands with `reply` until the node is gone.
    fn on_command(&mut self, mut reply: impl FnMut(Command) + Send + 'static) {
        let mut commands = self.commands.take().unwrap();
        self.tasks.push(tokio::spawn(async move {
            while let Some(command) = commands.recv().await {
                reply(command);
            }
        }));
    }
}

/// Keeps the node's knowledge up to date from the store.
async fn follow(store: TestStore, know: watch::Sender<Knowledge>) {
    let mut events = store.dcs().watch("", Revision(1)).await.unwrap();
    loop {
        let view = store.read().await.unwrap();
        let confirmed_at = Some(SystemClock.now());
        know.send_replace(Knowledge { view: Some(Arc::new(view)), confirmed_at, trouble: None });
        events.next().await.unwrap().unwrap();
    }
}

fn lead(board: &mut Board) {
    board.leader_until = Some(SystemClock.now() + Duration::from_secs(30));
}

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
        r#""patroni": {"version": "4.1.4", "scope": "demo", "name": "pg-b"}}"#,
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
async fn status_only_methods_go_to_the_health_tables() {
    let node = Node::start(local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    for (method, path, expected) in [
        ("OPTIONS", "/replica", 200),
        ("HEAD", "/replica", 200),
        ("OPTIONS", "/", 503),
        ("HEAD", "/patroni", 503),
        ("HEAD", "/liveness", 503),
        ("HEAD", "/metrics", 503),
    ] {
        assert_eq!(node.request(method, path, None).await, (expected, String::new()), "{method} {path}");
    }
    for (method, path) in
        [("POST", "/"), ("DELETE", "/config"), ("TRACE", "/patroni"), ("BREW", "/config"), ("PUT", "/x")]
    {
        assert_eq!(node.code(method, path, None).await, 501, "{method} {path}");
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
async fn the_dynamic_configuration() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    assert_eq!(node.get("/config").await, (200, json!({"ttl": 30, "loop_wait": 10})));
    let patch = json!({"ttl": 20, "loop_wait": null, "slots": {"s1": null}});
    let (status, text) = node.request("PATCH", "/config", Some(patch)).await;
    assert_eq!((status, text.as_str()), (200, r#"{"ttl": 20, "slots": {"s1": null}}"#), "nulls of a new map stay");
    let before = node.store.read().await.unwrap().revision;
    assert_eq!(node.code("PATCH", "/config", Some(json!({"ttl": "20"}))).await, 200);
    assert_eq!(node.store.read().await.unwrap().revision, before, "no write where nothing changes");
    let replaced = json!({"ttl": 40});
    assert_eq!(node.code("PUT", "/config/whatever", Some(replaced.clone())).await, 200);
    assert_eq!(node.store.read().await.unwrap().config.unwrap().value, replaced);
    for (method, body) in [("PATCH", json!({})), ("PUT", json!({})), ("PATCH", json!([1])), ("PUT", json!("x"))] {
        assert_eq!(node.code(method, "/config", Some(body)).await, 400);
    }
    node.store.delete_cluster().await.unwrap();
    node.catch_up().await;
    assert_eq!(node.get("/config").await.0, 502);
    assert_eq!(node.code("PATCH", "/config", Some(json!({"ttl": 20}))).await, 503);
}

#[tokio::test]
async fn requests_to_the_ha_loop() {
    let mut node = Node::start(local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    let mut planned = false;
    node.on_command(move |command| match command {
        Command::Restart(filter, reply) => {
            let busy = Refusal { status: 503, text: "reinitialize already in progress".into() };
            let answer = if filter.pending { Err(busy) } else { Ok("restarted successfully".into()) };
            let _ = reply.send(answer);
        }
        Command::ScheduleRestart(what, reply) => {
            assert_eq!(what["postmaster_start_time"], "2031-05-01 10:00:00.123456+00:00");
            let twice = Refusal { status: 409, text: "another restart is scheduled".into() };
            let _ = reply.send(if std::mem::replace(&mut planned, true) { Err(twice) } else { Ok(String::new()) });
        }
        Command::CancelRestart(reply) => drop(reply.send(std::mem::take(&mut planned))),
        Command::Reinitialize { reply, .. } => drop(reply.send(Ok(String::new()))),
        Command::FailsafePoll { reply, leader, .. } => drop(reply.send(leader.as_str() == "pg-a")),
        Command::Wake | Command::Reload => {}
    });
    assert_eq!(node.code("POST", "/reload", None).await, 202);
    assert_eq!(node.request("POST", "/restart", None).await, (200, "restarted successfully".into()));
    let refused = node.request("POST", "/restart", Some(json!({"restart_pending": "x"}))).await;
    assert_eq!(refused, (503, "reinitialize already in progress".into()));
    let at = json!({"schedule": "2031-05-01T10:00:00+00:00", "role": "replica"});
    for expected in [202, 409] {
        assert_eq!(node.code("POST", "/restart", Some(at.clone())).await, expected);
    }
    for expected in [200, 404] {
        assert_eq!(node.code("DELETE", "/restart", None).await, expected);
    }
    assert_eq!(node.code("POST", "/restart", Some(json!({"what": 1}))).await, 400);

    assert_eq!(node.code("POST", "/reinitialize", None).await, 503, "no leader");
    put(&node.store, "leader", "pg-b".into()).await;
    let own = node.request("POST", "/reinitialize", None).await;
    assert_eq!(own, (503, "I am the leader, can not reinitialize".into()));
    put(&node.store, "leader", "pg-a".into()).await;
    assert_eq!(node.code("POST", "/reinitialize", Some(json!({"force": "true"}))).await, 200);

    let poll = json!({"name": "pg-a", "conn_url": "x", "api_url": "y"});
    assert_eq!(node.code("POST", "/failsafe", Some(poll.clone())).await, 502, "failsafe mode is off");
    put(&node.store, "config", json!({"failsafe_mode": true})).await;
    node.catch_up().await;
    let peers = HttpPeers::new(RestClient::for_agent(&local("client")).unwrap());
    let everybody = BTreeMap::from([(MemberName::from("pg-b"), node.url("/patroni"))]);
    let answers = peers.post_failsafe(everybody, poll.clone(), Duration::from_secs(2)).await;
    let answer = answers[&MemberName::from("pg-b")];
    assert!(answer.accepted && answer.lsn == Some(Lsn(0x300_0148)), "{answer:?}");
    node.postgres.send_replace(PgStatus::Running(primary()));
    assert_eq!(node.code("POST", "/failsafe", Some(poll)).await, 500, "a primary does not accept");
    assert_eq!(node.get("/failsafe").await.0, 502);
    assert_eq!(node.code("POST", "/mpp", Some(json!({"type": "x"}))).await, 200);
    assert_eq!(node.code("POST", "/sigterm", None).await, 202);
}

#[tokio::test]
async fn a_switchover_is_answered_when_the_new_leader_is_there() {
    let mut node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let switchover = |candidate: &str| Some(json!({"leader": "pg-a", "candidate": candidate}));
    put(&node.store, "leader", "pg-a".into()).await;
    let member = |url: String| json!({"api_url": url, "state": "running", "role": "replica"});
    put(&node.store, "pg-a", member(node.url("/patroni"))).await;
    assert_eq!(
        node.request("POST", "/switchover", Some(json!({"leader": "pg-a"}))).await,
        (412, "switchover is not possible: cluster does not have members except leader".into())
    );
    put(&node.store, "pg-c", member("http://127.0.0.1:1/patroni".into())).await;
    assert_eq!(
        node.request("POST", "/switchover", switchover("pg-c")).await,
        (412, "switchover is not possible: no good candidates have been found".into())
    );
    let other = Node::join(node.store.clone(), local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    put(&node.store, "pg-b", member(other.url("/patroni"))).await;

    // The HA loops: on being woken, the leader hands over.
    let store = node.store.clone();
    node.on_command(move |command| {
        if matches!(command, Command::Wake) {
            let store = store.clone();
            tokio::spawn(async move {
                if store.read().await.unwrap().failover.is_some_and(|request| request.scheduled_at.is_none()) {
                    store.release_leader(&"pg-a".into(), None).await.unwrap();
                    put(&store, "leader", "pg-b".into()).await;
                    put(&store, "failover", json!({})).await;
                }
            });
        }
    });
    let scheduled = json!({"leader": "pg-a", "candidate": "pg-b", "scheduled_at": "2031-05-01T10:00:00+00:00"});
    assert_eq!(node.code("DELETE", "/switchover", None).await, 404);
    assert_eq!(node.code("POST", "/switchover", Some(scheduled)).await, 202);
    assert_eq!(node.code("DELETE", "/switchover", None).await, 200);

    let started = SystemClock.now();
    let answer = node.request("POST", "/switchover", switchover("pg-b")).await;
    assert_eq!(answer, (200, "Successfully switched over to \"pg-b\"".into()));
    assert!(SystemClock.now().since(started) < Duration::from_millis(900), "no poll in between");
    let stale = node.request("POST", "/switchover", switchover("pg-b")).await;
    assert_eq!(stale.0, 412, "{}", stale.1);
}

#[tokio::test]
async fn a_switchover_that_nobody_takes_fails() {
    let mut node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    put(&node.store, "leader", "pg-a".into()).await;
    let other = Node::join(node.store.clone(), local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    put(&node.store, "pg-b", json!({"api_url": other.url("/patroni"), "state": "running"})).await;
    let store = node.store.clone();
    node.on_command(move |_| {
        let store = store.clone();
        tokio::spawn(async move { put(&store, "failover", json!({})).await });
    });
    let body = json!({"leader": "pg-a", "candidate": "pg-b"});
    assert_eq!(node.request("POST", "/switchover", Some(body)).await, (503, "Switchover failed".into()));
}

#[tokio::test]
async fn unsafe_requests_need_the_password() {
    let mut guarded = local("pg-a");
    guarded.restapi.authentication = Some(("admin".into(), Secret::new("s3cret")));
    let mut node = Node::start(guarded.clone(), PgStatus::Running(primary()), board("primary")).await;
    node.on_command(|_| {});
    assert_eq!(node.code("POST", "/reload", None).await, 401);
    assert_eq!(node.code("PATCH", "/config", Some(json!({"ttl": 20}))).await, 401);
    assert_eq!(node.get("/config").await.0, 200, "reading is safe");
    let reload = |local: Local| async move {
        let client = RestClient::for_agent(&local).unwrap();
        client
            .request("POST", &format!("http://{}/reload", node.address), None, Duration::from_secs(5))
            .await
            .unwrap()
            .status
    };
    assert_eq!(reload(guarded.clone()).await, 202);
}

#[tokio::test]
async fn unsafe_requests_come_from_the_allowlist() {
    let mut guarded = local("pg-a");
    guarded.restapi.allowlist = vec!["10.0.0.0/8".into()];
    let mut node = Node::start(guarded.clone(), PgStatus::Running(primary()), board("primary")).await;
    node.on_command(|_| {});
    assert_eq!(node.code("POST", "/reload", None).await, 403);
    guarded.restapi.allowlist = vec!["10.0.0.0/8".into(), "localhost".into()];
    node.api.reload(&guarded).unwrap();
    assert_eq!(node.code("POST", "/reload", None).await, 202, "the list was read again");
    guarded.restapi.allowlist = Vec::new();
    guarded.restapi.allowlist_include_members = true;
    node.api.reload(&guarded).unwrap();
    assert_eq!(node.code("POST", "/reload", None).await, 403, "not a member");
    put(&node.store, "pg-x", json!({"api_url": "http://127.0.0.1:8008/patroni"})).await;
    node.catch_up().await;
    assert_eq!(node.code("POST", "/reload", None).await, 202);
}

#[tokio::test]
async fn garbage_gets_a_status_and_a_sentence() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let post = |headers: &str, body: &str| format!("POST /switchover HTTP/1.0\r\n{headers}\r\n{body}").into_bytes();
    let huge = format!("Content-Length: {}\r\n", 1u64 << 40);
    let table = [
        (post("", ""), "411"),
        (post("Content-Length: 0\r\n", ""), "400"),
        (post("Content-Length: 2\r\n", "{}"), "400"),
        (post("Content-Length: 3\r\n", "{x}"), "400"),
        (post("Content-Length: 2\r\n", "[]"), "400"),
        (post("Content-Length: x\r\n", "{}"), "400"),
        (post("Content-Length: 9\r\n", "{}"), "400"),
        (post(&huge, "{}"), "413"),
        (post("Content-Length: 5\r\n", "{\"a\":"), "400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), "400"),
        (b"nonsense\r\n\r\n".to_vec(), "400"),
        (format!("GET /{} HTTP/1.0\r\n\r\n", "x".repeat(100_000)).into_bytes(), "414"),
    ];
    for (request, status) in table {
        let answer = node.raw(&request).await;
        let shown = String::from_utf8_lossy(&request[..request.len().min(80)]).into_owned();
        assert!(answer.split(' ').nth(1) == Some(status), "{shown:?} -> {answer}");
    }
    assert_eq!(node.get("/health").await.0, 200, "and it goes on");
}

#[tokio::test]
async fn a_load_balancer_of_http_1_0() {
    let node = Node::start(local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    let answer = node.raw(b"OPTIONS /replica HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    let answer = node.raw(b"GET /primary HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 503 Service Unavailable\r\n"), "{answer}");
}

#[tokio::test]
async fn metrics_have_patronis_names_and_labels() {
    let mut leader = board("primary");
    lead(&mut leader);
    leader.transitions.insert(("promote", "no leader"), 3);
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), leader).await;
    let (status, text) = node.request("GET", "/metrics", None).await;
    assert_eq!(status, 200);
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
