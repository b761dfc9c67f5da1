//! `trunklinectl`, the program, in front of a real etcd that holds what Patroni writes, and of a REST API that remembers
//! what it was asked.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use axum::extract::{Request, State};
use serde_json::{Value, json};
use trunkline_agent::lab::{Etcd, Lab};
use trunkline_common::LeaseId;
use trunkline_common::SystemClock;
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::dcs::{Dcs as _, Op, Txn};
use trunkline_config::local;

/// Requests in their order: method, path, body, `Authorization`.
type Seen = Arc<Mutex<Vec<(String, String, Value, String)>>>;

/// A cluster in etcd, and the members' API.
struct World {
    lab: Lab,
    _etcd: Etcd,
    dcs: EtcdDcs<SystemClock>,
    endpoint: String,
    seen: Seen,
}

impl World {
    async fn start() -> Self {
        let lab = Lab::new("ctl").expect("a lab");
        let etcd = Etcd::start(&lab, 1).await.expect("etcd");
        let endpoint = etcd.endpoints().remove(0);
        let config = local::Etcd { endpoints: vec![format!("http://{endpoint}")], ..local::Etcd::default() };
        let dcs = EtcdDcs::connect(&config, SystemClock, std::time::Duration::from_secs(5)).await.expect("connected");
        let seen = Seen::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let api = listener.local_addr().expect("an address").port();
        let app = axum::Router::new().fallback(answer).with_state(Arc::clone(&seen));
        tokio::spawn(async move { axum::serve(listener, app).await });
        let world = Self { lab, _etcd: etcd, dcs, endpoint, seen };
        world.fill(api).await;
        world
    }

    /// Two members with their keys as Patroni 4.1.4 writes them.
    async fn fill(&self, api: u16) {
        let api_url = format!("http://127.0.0.1:{api}/patroni");
        let leader = json!({
            "conn_url": "postgres://10.1.0.5:5432/postgres", "api_url": api_url, "state": "running", "role": "primary",
            "version": "4.1.4", "tags": {"az": "a"}, "xlog_location": 50_819_480, "timeline": 2,
        });
        let standby = json!({
            "conn_url": "postgres://10.1.0.6:5432/postgres", "api_url": api_url, "state": "running", "role": "replica",
            "version": "4.1.4", "xlog_location": 50_819_480, "replay_lsn": 50_819_480, "receive_lsn": 50_819_480,
            "replication_state": "streaming", "timeline": 2,
        });
        let history =
            json!([[1, 50_616_968, "no recovery target specified", "2031-05-01T10:30:59.155169+00:00", "pg-a"]]);
        self.put("initialize", "7100000000000000001").await;
        self.put("leader", "pg-a").await;
        self.put("members/pg-a", &leader.to_string()).await;
        self.put("members/pg-b", &standby.to_string()).await;
        self.put("status", r#"{"optime":50819480}"#).await;
        self.put("sync", r#"{"leader":"pg-a","sync_standby":"pg-b","quorum":0}"#).await;
        self.put("history", &history.to_string()).await;
        self.put("config", r#"{"ttl":30,"loop_wait":1,"synchronous_mode":true}"#).await;
    }

    async fn put(&self, key: &str, value: &str) {
        let put = Op::Put(format!("/service/demo/{key}"), value.into(), LeaseId(0));
        self.dcs.txn(Txn { then: vec![put], ..Txn::default() }).await.expect("written");
    }

    async fn get(&self, key: &str) -> Option<String> {
        let get = Op::Get(format!("/service/demo/{key}"));
        let result = self.dcs.txn(Txn { then: vec![get], ..Txn::default() }).await.expect("read");
        result.read.into_iter().next().flatten().map(|kv| String::from_utf8(kv.value).expect("text"))
    }

    /// The program with nothing but the environment to tell it where etcd is.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trunklinectl"));
        command
            .args(arguments)
            .env_clear()
            .env("TZ", "UTC")
            .env("PATRONI_ETCD3_HOST", &self.endpoint)
            .env("PATRONI_SCOPE", "demo")
            .env("PATRONI_RESTAPI_USERNAME", "u")
            .env("PATRONI_RESTAPI_PASSWORD", "p")
            .stdin(Stdio::null());
        command
    }

    async fn run(&self, arguments: &[&str]) -> Ran {
        let mut command = self.command(arguments);
        Ran::of(blocking(move || command.output().expect("started")).await)
    }

    async fn run_with_input(&self, arguments: &[&str], input: &'static str) -> Ran {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = blocking(move || {
            let mut child = command.spawn().expect("started");
            // Dropped after it, so that the input ends. A child that asks less does not read all of it.
            let _ = child.stdin.take().expect("its input").write_all(input.as_bytes());
            child.wait_with_output().expect("ended")
        });
        Ran::of(output.await)
    }

    fn requests(&self) -> Vec<(String, String, Value, String)> {
        std::mem::take(&mut *self.seen.lock().expect("not poisoned"))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("ended")
}

/// What a run left behind.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

async fn answer(State(seen): State<Seen>, request: Request) -> (axum::http::StatusCode, String) {
    let (parts, body) = request.into_parts();
    let header = parts.headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or("");
    let (method, path, header) = (parts.method.to_string(), parts.uri.path().to_owned(), header.to_owned());
    let body = axum::body::to_bytes(body, 1 << 16).await.unwrap_or_default();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let (status, text) = match (method.as_str(), path.as_str()) {
        ("POST", "/switchover") => (200, "Successfully switched over to \"pg-b\""),
        ("POST", "/restart") => (503, "restart failed"),
        ("GET", "/patroni") => {
            (200, r#"{"state": "running", "server_version": 150018, "patroni": {"version": "4.1.4"}}"#)
        }
        _ => (200, "{}"),
    };
    seen.lock().expect("not poisoned").push((method, path, body, header));
    (axum::http::StatusCode::from_u16(status).expect("a status"), text.to_owned())
}

const TABLE: &str = "\
+ Cluster: demo (7100000000000000001) ----+-----------+----+-------------+-----+------------+-----+-------+
| Member | Host     | Role         | State     | TL | Receive LSN | Lag | Replay LSN | Lag | Tags  |
+--------+----------+--------------+-----------+----+-------------+-----+------------+-----+-------+
| pg-a   | 10.1.0.5 | Leader       | running   |  2 |             |     |            |     | az: a |
| pg-b   | 10.1.0.6 | Sync Standby | streaming |  2 |   0/3077198 |   0 |  0/3077198 |   0 |       |
+--------+----------+--------------+-----------+----+-------------+-----+------------+-----+-------+
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_shows_what_patroni_wrote() {
    let world = World::start().await;
    let listed = world.run(&["list"]).await;
    assert_eq!(listed.code, Some(0), "{listed:?}");
    assert_eq!(listed.out.lines().skip(1).collect::<Vec<_>>(), TABLE.lines().skip(1).collect::<Vec<_>>());

    let json: Value = serde_json::from_str(&world.run(&["list", "-f", "json"]).await.out).expect("JSON");
    let leader = json!({"Cluster": "demo", "Member": "pg-a", "Host": "10.1.0.5", "Role": "Leader", "State": "running",
        "TL": 2, "Tags": {"az": "a"}});
    assert_eq!(json[0], leader);
    assert_eq!(json[1]["Receive Lag"], 0);

    assert_eq!(world.run(&["dsn"]).await.out, "host=10.1.0.5 port=5432\n");
    assert_eq!(world.run(&["dsn", "-r", "replica"]).await.out, "host=10.1.0.6 port=5432\n");
    let config = "loop_wait: 1\nsynchronous_mode: true\nttl: 30\n\n";
    assert_eq!(world.run(&["show-config"]).await.out, config);
    let history = "TL\tLSN\tReason\tTimestamp\tNew Leader\n\
                   1\t50616968\tno recovery target specified\t2031-05-01T10:30:59.155169+00:00\tpg-a\n";
    assert_eq!(world.run(&["history", "-f", "tsv"]).await.out, history);
    let version = world.run(&["version", "demo", "pg-b"]).await.out;
    assert!(version.ends_with("\n\npg-b: Patroni 4.1.4 PostgreSQL 15.18\n"), "{version}");
    world.lab.success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_edits_the_configuration_it_has_seen() {
    let world = World::start().await;
    let arguments = ["edit-config", "-s", "ttl=20", "-p", "superuser_reserved_connections=6"];
    let refused = world.run_with_input(&arguments, "n\n").await;
    let diff = "--- \n+++ \n@@ -1,3 +1,6 @@\n loop_wait: 1\n+postgresql:\n+  parameters:\n\
                +    superuser_reserved_connections: 6\n synchronous_mode: true\n-ttl: 30\n+ttl: 20\n";
    assert_eq!((refused.code, refused.out), (Some(0), format!("{diff}Apply these changes? [y/N]: ")));
    let stored = async || world.get("config").await.expect("a configuration");
    assert_eq!(stored().await, r#"{"ttl":30,"loop_wait":1,"synchronous_mode":true}"#);

    let applied = world.run_with_input(&arguments, "y\n").await;
    assert!(applied.out.ends_with("[y/N]: Configuration changed\n"), "{applied:?}");
    let expected = r#"{"ttl":20,"loop_wait":1,"synchronous_mode":true,"postgresql":{"parameters":{"superuser_reserved_connections":6}}}"#;
    assert_eq!(stored().await, expected);
    assert_eq!(world.run(&arguments).await.out, "Not changed\n");
    world.lab.success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_in_between_is_a_conflict() {
    let world = World::start().await;
    let mut command = world.command(&["edit-config", "-s", "ttl=20"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    let mut answers = child.stdin.take().expect("its input");
    let mut shown = child.stdout.take().expect("its output");
    // It has read the configuration once it asks.
    let shown = blocking(move || {
        use std::io::Read as _;
        let (mut text, mut byte) = (String::new(), [0]);
        while !text.ends_with("[y/N]: ") && shown.read(&mut byte).expect("readable") == 1 {
            text.push(char::from(byte[0]));
        }
        shown
    });
    let shown = shown.await;
    world.put("config", r#"{"ttl":45}"#).await;
    answers.write_all(b"y\n").expect("answered");
    let ran = Ran::of(blocking(move || child.wait_with_output().expect("ended")).await);
    drop(shown);
    assert_eq!(ran.code, Some(1));
    assert_eq!(ran.err, "Error: Config modification aborted due to concurrent changes\n");
    assert_eq!(world.get("config").await.as_deref(), Some(r#"{"ttl":45}"#));
    world.lab.success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_asks_the_leader() {
    let world = World::start().await;
    let switched = world.run(&["switchover", "--force", "--candidate", "pg-b"]).await;
    assert_eq!(switched.code, Some(0), "{switched:?}");
    assert!(switched.out.contains(" Successfully switched over to \"pg-b\"\n"), "{switched:?}");
    assert_eq!(world.run(&["pause"]).await.out, "Success: cluster management is paused\n");
    let failed = world.run(&["restart", "demo", "pg-b", "--force", "--pg-version", "15.20"]).await;
    assert_eq!(failed.code, Some(0), "scripts parse the text");
    assert!(failed.out.ends_with("Failed: restart for member pg-b, status code=503, (restart failed)\n"), "{failed:?}");
    let basic = "Basic dTpw".to_owned();
    let request = |method: &str, path: &str, body| (method.to_owned(), path.to_owned(), body, basic.clone());
    let expected = vec![
        request("POST", "/switchover", json!({"candidate": "pg-b", "leader": "pg-a"})),
        request("PATCH", "/config", json!({"pause": true})),
        request("POST", "/restart", json!({"postgres_version": "15.20"})),
    ];
    assert_eq!(world.requests(), expected);
    world.lab.success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_api_the_request_goes_to_the_dcs_whoever_reads_the_output() {
    let world = World::start().await;
    // Nobody listens on port 1.
    world.fill(1).await;
    for close_stderr in [false, true] {
        world.put("failover", "{}").await;
        let mut command = world.command(&["switchover", "--force", "--candidate", "pg-b"]);
        let (reader, writer) = std::io::pipe().expect("a pipe");
        if close_stderr {
            drop(reader);
            command.stderr(writer);
        }
        let ran = Ran::of(blocking(move || command.output().expect("started")).await);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.out.contains(" Could not switchover using Patroni api, falling back to DCS\n"), "{ran:?}");
        assert_eq!(world.get("failover").await.as_deref(), Some(r#"{"leader":"pg-a","member":"pg-b"}"#));
    }
    world.lab.success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_asks_members_of_patroni_what_they_can_say() {
    let world = World::start().await;
    let why = world.run(&["why"]).await;
    assert!(why.out.starts_with("pg-a leads.\nLast known end of WAL 0/3077198"), "{why:?}");
    assert!(
        why.out.contains("Synchronous: only pg-a and [pg-b] may lead.") && why.out.contains("no verdict"),
        "{why:?}"
    );
    let rto = world.run(&["rto"]).await;
    assert!(rto.err.contains("pg-b: Patroni does not measure") && rto.out.contains("Host death ≤ 30.6 s"), "{rto:?}");
    let explained = world.run(&["config", "explain", "ttl"]).await;
    assert!(explained.err.contains("Patroni does not explain"), "{explained:?}");
    assert!(explained.out.starts_with("ttl: 30, by dynamic configuration\n"), "{explained:?}");
    world.lab.success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removing_needs_three_answers() {
    let world = World::start().await;
    let wrong = world.run_with_input(&["remove", "demo"], "demo\nYes I am aware\npg-b\n").await;
    assert_eq!(
        (wrong.code, wrong.err.as_str()),
        (Some(1), "Error: You did not specify the current leader of the cluster\n")
    );
    assert!(world.get("leader").await.is_some());
    let right = world.run_with_input(&["remove", "demo"], "demo\nYes I am aware\npg-a\n").await;
    assert_eq!(right.code, Some(0), "{right:?}");
    for key in ["leader", "config", "members/pg-a", "initialize"] {
        assert_eq!(world.get(key).await, None, "{key}");
    }
    world.lab.success();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_sentences() {
    let world = World::start().await;
    let table: [(&[&str], i32, &str); 9] = [
        (&["-d", "127.0.0.1:1", "list"], 1, "Error: Can not talk to the DCS at http://127.0.0.1:1: "),
        (
            &["-c", "/nowhere.yml", "list"],
            1,
            "Error: Provided config file /nowhere.yml not existing or no read rights.",
        ),
        (&["switchover", "nosuch", "--force"], 1, "Error: This cluster has no leader\n"),
        (&["failover", "--force"], 1, "Error: Failover could be performed only to a specific candidate\n"),
        (&["switchover"], 1, "Aborted!\n"),
        (&["flush", "demo", "nonsense"], 2, "Error: What shall be forgotten?"),
        (&["demote-cluster"], 1, "Error: At least --host, --port or --restore-command should be specified\n"),
        (&["promote-cluster"], 1, "Error: Cluster is already in the required state\n"),
        (&["list", "-f", "xml"], 2, "error: invalid value 'xml'"),
    ];
    for (arguments, code, message) in table {
        let ran = world.run(arguments).await;
        assert_eq!(ran.code, Some(code), "{ran:?}");
        assert!(ran.err.starts_with(message), "{ran:?}");
    }
    world.lab.success();
}
