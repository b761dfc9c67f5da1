//! etcd clusters of one or three members on free ports, with faults.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::{Clock, SystemClock};
use trunkline_config::local::Etcd;

/// The bound of calls in these tests.
pub const RETRY_TIMEOUT: Duration = Duration::from_secs(1);

/// A running etcd cluster; its processes end and its files go with it.
pub struct Cluster {
    pub members: Vec<Member>,
    dir: tempfile::TempDir,
    program: PathBuf,
    extra: Vec<String>,
    scheme: &'static str,
    /// As long as this is held the members' ports are theirs.
    _ports: TcpListener,
}

pub struct Member {
    pub url: String,
    name: String,
    pub client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

impl Cluster {
    /// Starts `size` members and waits until they answer.
    pub async fn start(size: usize) -> Self {
        Self::start_of("etcd".into(), size).await
    }

    /// The same with the etcd of that path.
    pub async fn start_of(program: PathBuf, size: usize) -> Self {
        let cluster = Self::start_with(program, size, "http", &[]);
        cluster.ready(&cluster.config()).await;
        cluster
    }

    /// Starts members with further options of etcd, without waiting.
    pub fn start_with(program: PathBuf, size: usize, scheme: &'static str, extra: &[String]) -> Self {
        let (claim, ports) = claim_ports(size as u16 * 2);
        let member = |i: usize| {
            let (client_port, peer_port) = (ports[2 * i], ports[2 * i + 1]);
            let url = format!("{scheme}://127.0.0.1:{client_port}");
            Member { url, name: format!("m{i}"), client_port, peer_port, child: None }
        };
        let dir = tempfile::Builder::new().prefix("trunkline-etcd-").tempdir().expect("a directory");
        let mut cluster = Self {
            members: (0..size).map(member).collect(),
            dir,
            program,
            extra: extra.to_vec(),
            scheme,
            _ports: claim,
        };
        (0..size).for_each(|i| cluster.run(i));
        cluster
    }

    /// The configuration of a client of all members, in their order.
    pub fn config(&self) -> Etcd {
        Etcd { endpoints: self.members.iter().map(|member| member.url.clone()).collect(), ..Etcd::default() }
    }

    /// A client of all members, in their order.
    pub async fn client(&self) -> EtcdDcs<SystemClock> {
        connect(&self.config()).await
    }

    /// Waits until every member answers a linearizable read.
    pub async fn ready(&self, config: &Etcd) {
        for member in &self.members {
            let dcs = connect(&Etcd { endpoints: vec![member.url.clone()], ..config.clone() }).await;
            eventually("etcd answers", Duration::from_secs(20), async || dcs.read("/ready").await.is_ok()).await;
        }
    }

    /// Index of etcd's own leader.
    pub async fn leader(&self) -> usize {
        for (i, member) in self.members.iter().enumerate() {
            let mut client = etcd_client::Client::connect([&member.url], None).await.expect("a client");
            let status = client.status().await.expect("a status");
            if status.header().expect("a header").member_id() == status.leader() {
                return i;
            }
        }
        panic!("no leader among the members");
    }

    /// Makes the member the first in everybody's list.
    pub fn put_first(&mut self, index: usize) {
        self.members.swap(0, index);
    }

    /// The member hangs: connections stay, nothing answers.
    pub fn freeze(&self, index: usize) {
        let pid = self.members[index].pid();
        kill_process(pid, Signal::STOP).expect("SIGSTOP");
        // A thread that runs just then goes on until the kernel has its attention, and may carry out a request meanwhile.
        let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
        let stands = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
        };
        let all_stand = || std::fs::read_dir(&tasks).expect("its threads").flatten().all(stands);
        let stood = (0..2000).any(|_| {
            all_stand() || {
                std::thread::sleep(Duration::from_millis(1));
                false
            }
        });
        assert!(stood, "SIGSTOP did not stop it");
    }

    /// The member goes on.
    pub fn thaw(&self, index: usize) {
        kill_process(self.members[index].pid(), Signal::CONT).expect("SIGCONT");
    }

    /// The member is killed.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut child) = self.members[index].child.take() {
            child.kill().expect("SIGKILL");
            child.wait().expect("its end");
        }
    }

    /// A killed member comes back with its data.
    pub fn run(&mut self, index: usize) {
        let peers: Vec<String> =
            self.members.iter().map(|m| format!("{}=http://127.0.0.1:{}", m.name, m.peer_port)).collect();
        let member = &self.members[index];
        let client = format!("{}://127.0.0.1:{}", self.scheme, member.client_port);
        let peer = format!("http://127.0.0.1:{}", member.peer_port);
        let log = File::options().create(true).append(true).open(self.path(&format!("{}.log", member.name)));
        let log = log.expect("a log file");
        let child = Command::new(&self.program)
            .args(["--name", &member.name, "--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(","), "--initial-cluster-state", "new"])
            .arg("--data-dir")
            .arg(self.path(&member.name))
            .args(&self.extra)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log file"))
            .stderr(log)
            .spawn()
            .expect("etcd is installed");
        self.members[index].child = Some(child);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Member {
    fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("a running member"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|i| self.kill(i));
    }
}

/// etcd 3.5 from where `tools/versions` puts it, with a line of why if it can't be had on this machine.
pub fn etcd_35() -> Option<PathBuf> {
    let root = rustix::process::geteuid().is_root();
    let in_workspace = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/versions");
    let dir = if root { "/var/tmp/trunkline-versions".into() } else { in_workspace() };
    let (program, why) = (dir.join("etcd35"), std::fs::read_to_string(dir.join("unavailable")));
    if let (false, Ok(why)) = (program.exists(), why) {
        println!("SKIPPED: etcd 3.5 can't be had here: {why}");
        return None;
    }
    assert!(program.exists(), "{} is missing; run tools/versions", program.display());
    Some(program)
}

/// A client with the bound of these tests.
pub async fn connect(config: &Etcd) -> EtcdDcs<SystemClock> {
    EtcdDcs::connect(config, SystemClock, RETRY_TIMEOUT).await.expect("a usable configuration")
}

/// Asks until it is so.
pub async fn eventually(what: &str, limit: Duration, mut so: impl AsyncFnMut() -> bool) {
    let deadline = SystemClock.now() + limit;
    while !so().await {
        assert!(SystemClock.now() < deadline, "{what}: not within {limit:?}");
        SystemClock.sleep(Duration::from_millis(20)).await;
    }
}

/// So many ports below the range that the kernel gives to outgoing connections, so that nobody takes that of a member that is
/// down. They are ours as long as the first one's listener is held.
fn claim_ports(count: u16) -> (TcpListener, Vec<u16>) {
    const BLOCK: u16 = 20;
    assert!(count < BLOCK);
    let bind = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok();
    let start = std::process::id() % 100;
    for first in (0..100).map(|i| 30_000 + (start as u16 + i) % 100 * BLOCK) {
        let Some(claim) = bind(first) else { continue };
        let ports: Vec<u16> = (first + 1..first + BLOCK).filter(|port| bind(*port).is_some()).collect();
        if ports.len() >= count.into() {
            return (claim, ports);
        }
    }
    panic!("no free ports of 127.0.0.1 from 30000 on");
}
