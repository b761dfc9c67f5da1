//! The API as clients see it: a server in this process over a store in memory, with a PostgreSQL that says what the test
//! wants.

mod access;
mod documents;
mod requests;
mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use trunkline_common::dcs::follow::Follower;
use trunkline_common::dcs::memory::MemoryDcs;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::{Instant, LeaseId, Lsn, SystemClock, SystemId, TimelineId};
use trunkline_config::local::{Ctl, Etcd, Log, RestApi};

use super::*;
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

    async fn setting(&self, name: &str) -> Result<Option<Setting>, PgError> {
        let file = Some(("/d/postgresql.auto.conf".to_owned(), 3));
        let overrides = vec!["role app: 1GB".to_owned()];
        let setting = Setting {
            value: "9MB".into(),
            context: "user".into(),
            source: "configuration file".into(),
            file,
            pending: false,
            rejected: true,
            overrides,
        };
        Ok((name == "work_mem").then_some(setting))
    }

    fn took(&self) -> Took {
        Took { stop: Some(Duration::from_millis(25)), ..Took::default() }
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
        watchdog: trunkline_config::local::Watchdog::default(),
        guard: trunkline_config::local::Guard::default(),
        vip: None,
        log: Log::default(),
        raw: json!({}),
    }
}

fn standby() -> Running {
    Running {
        role: PgRole::Standby,
        system_id: SystemId(7_100_000_000_000_000_001),
        timeline: Some(TimelineId(2)),
        checkpoint_timeline: None,
        lsn: Lsn(0x300_0148),
        receive_lsn: Some(Lsn(0x300_0148)),
        replay_lsn: Some(Lsn(0x300_0100)),
        replay_timestamp: Some("2031-05-01 10:00:00.5+02".into()),
        replay_paused: false,
        reads_own_wal: false,
        latest_end_lsn: Some(Lsn(0x300_0148)),
        replication_state: Some("streaming".into()),
        upstream: None,
        upstream_slot: None,
        server_version: 150_004,
        postmaster_start_time: "2031-05-01 10:00:00.123456+00:00".into(),
        replication: Vec::new(),
        synchronous_standby_names: String::new(),
        synchronous_commit: "on".to_owned(),
        waits_for_disk: false,
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
        not_gone_until: None,
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
        decisions: Arc::default(),
        failsafe_active: false,
        ground: None,
        guard: crate::guard::Status::default(),
    }
}

async fn put(store: &TestStore, key: &str, value: Value) {
    match key {
        "config" => drop(store.put_config(&value, None).await.unwrap()),
        "failover" => drop(store.put_failover(&value, None).await.unwrap()),
        "history" => {
            let view = store.read().await.unwrap();
            let leader = view.leader.expect("only a leader writes history").name;
            assert!(store.put_history(&leader, &value, view.history_revision, None).await.unwrap().is_done());
        }
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
        let knowledge = Follower::spawn(store.clone(), SystemClock);
        let mut seen = knowledge.clone();
        let api = Api::new(&local, store.clone(), knowledge, board_seen, sender, Glass(glass), SystemClock).unwrap();
        let api = Arc::new(api);
        let server = Server::bind(api.clone()).await.unwrap();
        let address = server.local_addr().unwrap();
        let tasks = vec![tokio::spawn(server.run(std::future::pending()))];
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

fn lead(board: &mut Board) {
    board.leader_until = Some(SystemClock.now() + Duration::from_secs(30));
}
