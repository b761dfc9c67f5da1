//! Nodes of a test: real servers in a directory of their own.

use std::fs;
use std::future::Future;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use trunkline_agent::lab::{Ports, Tools};
use trunkline_agent::postgres::{Instance, PgStatus, Postgres as _, Running, StartAs, Upstream};
use trunkline_common::{Clock as _, MemberName, SystemClock};
use trunkline_config::postgres::Credentials;
use trunkline_config::{PostgresConfig, Secret};

pub const LIMIT: Duration = Duration::from_secs(60);
pub const HBA: [&str; 2] =
    ["host all all 127.0.0.1/32 scram-sha-256", "host replication all 127.0.0.1/32 scram-sha-256"];

/// Runs a test as a user that may run PostgreSQL.
pub fn as_postgres<F: Future<Output = ()>>(test: &str, body: impl FnOnce() -> F) {
    if rustix::process::geteuid().is_root() {
        let passwd = fs::read_to_string("/etc/passwd").expect("passwd");
        let line = passwd.lines().find(|line| line.starts_with("postgres:")).expect("a user postgres");
        let id = |at: usize| line.split(':').nth(at).and_then(|id| id.parse().ok()).expect("uid and gid");
        // A copy, because what lies below /root is out of that user's reach.
        let place = tempfile::Builder::new().prefix("trunkline-test-").tempdir().expect("temp dir");
        let program = place.path().join("postgres-tests");
        fs::copy(std::env::current_exe().expect("own path"), &program).expect("a copy of the tests");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
        let mut command = std::process::Command::new(&program);
        command.args(["--exact", test, "--nocapture"]).current_dir("/tmp").env("HOME", "/tmp");
        let status = command.uid(id(2)).gid(id(3)).status().expect("as postgres");
        assert!(status.success(), "failed as user postgres: {status}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    runtime.block_on(body());
}

/// A node of a test: its server is killed and its files are removed at the end, however the test ends.
pub struct Node {
    pub pg: Instance,
    pub name: &'static str,
    pub dir: PathBuf,
    pub port: u16,
}

/// The directory of a test's nodes, and the ports that they have whether they run or not.
pub struct Place(pub tempfile::TempDir, Ports);

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("trunkline-pg-").tempdir().expect("temp dir");
        Self(dir, Ports::claim().expect("ports"))
    }

    pub fn node(&self, name: &'static str) -> Node {
        let port = self.1.next().expect("a port");
        let dir = self.0.path().join(name);
        let pg = Instance::new(config(&dir, port), "demo", name.into(), SystemClock).expect("instance");
        Node { pg, name, dir, port }
    }

    /// A running primary with users.
    pub async fn primary(&self, name: &'static str) -> Node {
        let node = self.node(name);
        node.start_new().await;
        node
    }

    /// A standby streaming from `source`.
    pub async fn standby(&self, name: &'static str, source: &Node) -> Node {
        let node = self.node(name);
        node.pg.clone_from(source.upstream()).await.expect("clone");
        node.pg.start(StartAs::Standby(Some(source.upstream())), LIMIT).await.expect("start");
        source.until("streams", |running| running.replication.iter().any(|s| s.application_name == name)).await;
        node
    }
}

impl Node {
    /// Makes it a running primary with users.
    pub async fn start_new(&self) {
        let options =
            vec!["--encoding=UTF8".into(), "--locale=C".into(), "--no-sync".into(), "--data-checksums".into()];
        self.pg.initdb(options, HBA.map(str::to_owned).into()).await.expect("initdb");
        self.pg.start(StartAs::Primary, LIMIT).await.expect("start");
        self.pg.create_users(None).await.expect("users");
    }

    /// PostgreSQL's log.
    pub fn log(&self) -> String {
        let files = fs::read_dir(self.dir.join("log")).expect("a log").flatten();
        files.map(|file| fs::read_to_string(file.path()).expect("a file of the log")).collect()
    }

    pub fn upstream(&self) -> Upstream {
        Upstream { name: self.name.into(), host: "127.0.0.1".into(), port: self.port, slot: None }
    }

    pub async fn running(&self) -> Running {
        match self.pg.observe(Duration::from_secs(5)).await {
            PgStatus::Running(running) => running,
            status => panic!("{} is {status:?}", self.name),
        }
    }

    pub async fn until(&self, what: &str, check: impl Fn(&Running) -> bool) -> Running {
        let deadline = SystemClock.now() + LIMIT;
        loop {
            let status = self.pg.observe(Duration::from_secs(5)).await;
            match status {
                PgStatus::Running(running) if check(&running) => return running,
                status if SystemClock.now() > deadline => panic!("{}: not '{what}': {status:?}", self.name),
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    pub async fn sql(&self, text: &str) -> Result<(), String> {
        self.sql_by("127.0.0.1", text).await
    }

    /// By an address or the directory of its socket.
    pub async fn sql_by(&self, host: &str, text: &str) -> Result<(), String> {
        let conninfo = format!("host={host} port={} user=postgres password=postgres-pass dbname=postgres", self.port);
        let (client, connection) =
            tokio_postgres::connect(&conninfo, tokio_postgres::NoTls).await.map_err(|error| format!("{error:?}"))?;
        let driver = tokio::spawn(connection);
        let result = client.batch_execute(text).await.map_err(|error| format!("{error:?}"));
        drop(client);
        let _ = driver.await;
        result
    }

    pub fn pid(&self) -> i32 {
        let text = fs::read_to_string(self.dir.join("postmaster.pid")).expect("postmaster.pid");
        text.lines().next().and_then(|line| line.parse().ok()).expect("a pid")
    }

    /// Processes with the data directory as their working directory.
    pub fn processes(&self) -> Vec<String> {
        let links = fs::read_dir("/proc").expect("/proc").flatten();
        let here = |path: &Path| fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd == self.dir);
        links.map(|e| e.path()).filter(|path| here(path)).map(|path| path.display().to_string()).collect()
    }

    pub fn restart_handle(&self) -> Instance {
        Instance::new(self.pg.config(), "demo", MemberName::from(self.name), SystemClock).expect("a second instance")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let pid_file = fs::read_to_string(self.dir.join("postmaster.pid")).unwrap_or_default();
        let Some(pid) = pid_file.lines().next().and_then(|line| line.parse().ok()) else { return };
        let Some(pid) = rustix::process::Pid::from_raw(pid) else { return };
        // Quits even where a test stopped it.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::CONT);
        for _ in 0..500 {
            if self.processes().is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// The PostgreSQL that all tests run with.
pub fn tools() -> Tools {
    Tools::find().expect("PostgreSQL and etcd")
}

pub fn config(data_dir: &Path, port: u16) -> PostgresConfig {
    let user = |name: &str| Credentials {
        username: name.to_owned(),
        password: Some(Secret::new(format!("{name}-pass"))),
        ..Credentials::default()
    };
    let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    PostgresConfig {
        listen_addresses: "127.0.0.1".into(),
        port,
        connect_address: format!("127.0.0.1:{port}"),
        proxy_address: None,
        data_dir: data_dir.to_owned(),
        config_dir: data_dir.to_owned(),
        bin_dir: Some(tools().postgres_bin),
        bin_name: Default::default(),
        pgpass: data_dir.with_extension("pgpass"),
        database: "postgres".into(),
        superuser: user("postgres"),
        replication: user("replicator"),
        rewind: user("rewinder"),
        parameters: map(&[
            ("unix_socket_directories", "/tmp"),
            ("fsync", "off"),
            ("shared_buffers", "16MB"),
            // With the data, so that a server that is killed leaves nothing in /dev/shm.
            ("dynamic_shared_memory_type", "mmap"),
            ("logging_collector", "on"),
        ]),
        protected: map(&[
            ("wal_level", "hot_standby"),
            ("hot_standby", "on"),
            ("max_connections", "50"),
            ("max_wal_senders", "10"),
            ("max_prepared_transactions", "0"),
            ("max_locks_per_transaction", "64"),
            ("max_replication_slots", "10"),
            ("max_worker_processes", "8"),
            ("wal_log_hints", "on"),
            ("wal_keep_size", "128MB"),
        ]),
        parameters_by_role: Default::default(),
        pg_hba: None,
        pg_ident: None,
        custom_conf: None,
        recovery_conf: Default::default(),
        use_slots: true,
        use_pg_rewind: true,
        remove_data_directory_on_rewind_failure: false,
        remove_data_directory_on_diverged_timelines: false,
        basebackup: vec!["--no-sync".into()],
        rewind_options: vec!["--no-sync".into()],
        create_replica_methods: vec!["basebackup".into()],
        callbacks: Default::default(),
        pre_promote: None,
        before_stop: None,
        pg_ctl_timeout: LIMIT,
        use_unix_socket: false,
        use_unix_socket_repl: false,
        raw: Default::default(),
    }
}
