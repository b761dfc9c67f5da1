//! The hosts: three nodes, three etcd members, two routers. Each has a namespace, an address, a small file system and
//! one program that a supervisor starts again when it ends, as systemd would.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal};
use trunkline_agent::lab::cgroup::Cgroup;
use trunkline_agent::lab::cluster::Members;
use trunkline_agent::lab::process::{self, Proc};
use trunkline_agent::lab::tools::own_program;
use trunkline_agent::lab::{Lab, Program, rest};
use trunkline_common::{Clock, Instant, SystemClock};

use crate::files::{self, Settings};
use crate::history::Micros;
use crate::network::{self, Cut, Network};
use crate::schedule::{ETCDS, NODES, Part, ROUTERS};

/// The cluster's name.
pub const SCOPE: &str = "chaos";
/// PostgreSQL, on nodes.
pub const POSTGRES_PORT: u16 = 5432;
/// The agent's REST API, on nodes.
pub const REST_PORT: u16 = 8008;
/// On routers.
pub const READ_WRITE_PORT: u16 = 5000;
/// On routers.
pub const READ_ONLY_PORT: u16 = 5001;
/// On routers.
pub const ROUTER_ADMIN_PORT: u16 = 8009;
const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;

/// How long the supervisor waits before it starts a program again that ended by itself.
const RESTART_AFTER: Duration = Duration::from_millis(500);
/// The file that takes all the room of a full disk.
const BALLAST: &str = "ballast";
/// Where libfaketime reads by how much a host's clock is wrong.
const CLOCK_FILE: &str = "clock";

/// What a host is for. The number counts hosts of the same kind from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An agent with its PostgreSQL.
    Node(usize),
    /// An etcd member.
    Etcd(usize),
    /// A router.
    Router(usize),
}

/// All hosts.
#[derive(Debug)]
pub struct World {
    lab: Lab,
    network: Mutex<Network>,
    hosts: Vec<Host>,
    journal: Journal,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its address.
    pub ip: Ipv4Addr,
    /// What it is for.
    pub kind: Kind,
    /// Its file system: everything that runs on it works in here.
    pub dir: PathBuf,
    program: Program,
    /// Of a node, where there can be one: what the egress fence is attached to, and what freezes all of it at once.
    cgroup: Option<Cgroup>,
    unit: Mutex<Unit>,
}

/// What the supervisor knows of a host's program.
#[derive(Debug, Default)]
struct Unit {
    proc: Option<Proc>,
    /// Not to be started before.
    hold: Instant,
}

/// A hold that only [`World::release`] ends.
const HELD: Instant = Instant::from_boot(Duration::MAX);

impl World {
    /// Makes network, file systems and configuration; starts nothing. `preload` is libfaketime, where clocks are to be
    /// changed.
    ///
    /// # Errors
    /// Not in namespaces of its own, or a tool is missing.
    pub fn build(settings: Settings, preload: Option<&Path>) -> Result<Arc<Self>> {
        let lab = Lab::new("chaos")?;
        let places = places();
        let named: Vec<(String, Ipv4Addr)> = places.iter().map(|(name, ip, _)| (name.clone(), *ip)).collect();
        let network = Network::build(&named)?;
        let journal = Journal::create(&lab.dir().join("logs/events.log"))?;
        let etcd: Vec<String> = named
            .iter()
            .zip(&places)
            .filter(|(_, place)| matches!(place.2, Kind::Etcd(_)))
            .map(|((_, ip), _)| format!("{ip}:{ETCD_PORT}"))
            .collect();
        let mut hosts = Vec::new();
        for (name, ip, kind) in places {
            let dir = lab.make_dir(&name)?;
            let megabytes = match kind {
                Kind::Node(_) => 640,
                Kind::Etcd(_) => 320,
                Kind::Router(_) => 16,
            };
            network::run("mount", &format!("-t tmpfs -o size={megabytes}m {name} {}", dir.display()))?;
            lab.make_dir(&name)?;
            let mut program = match kind {
                Kind::Node(_) => {
                    let text = files::agent(&name, ip, &dir, &lab.tools().postgres_bin, &etcd, settings);
                    with_argument(Program::agent()?, lab.write_config(&format!("{name}.yml"), &text)?)
                }
                Kind::Router(_) => with_argument(
                    Program::router()?,
                    lab.write_config(&format!("{name}.yml"), &files::router(ip, &etcd))?,
                ),
                Kind::Etcd(_) => etcd_program(&lab.tools().etcd, &name, &named),
            };
            if let (Some(preload), Kind::Node(_) | Kind::Router(_)) = (preload, kind) {
                fs::write(dir.join(CLOCK_FILE), "+0s\n")?;
                program.env.extend(clock_environment(preload, &dir.join(CLOCK_FILE)));
            }
            let cgroup = match kind {
                Kind::Node(_) => {
                    lab.cgroup(&name).inspect_err(|error| journal.note(&format!("{name}: {error:#}"))).ok()
                }
                _ => None,
            };
            hosts.push(Host { name, ip, kind, dir, program, cgroup, unit: Mutex::default() });
        }
        Ok(Arc::new(Self { lab, network: Mutex::new(network), hosts, journal }))
    }

    /// Starts every program, and again whenever one ends. Runs until it is dropped.
    pub async fn supervise(self: Arc<Self>) {
        loop {
            for host in 0..self.hosts.len() {
                if let Err(error) = self.look_after(host) {
                    self.journal.note(&format!("{}: {error:#}", self.hosts[host].name));
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn look_after(&self, at: usize) -> Result<()> {
        let host = &self.hosts[at];
        let now = SystemClock.now();
        let mut unit = host.unit.lock();
        if let Some(status) = unit.proc.as_mut().and_then(Proc::ended) {
            self.journal.note(&format!("{}: its program ended ({status})", host.name));
            unit.proc = None;
            unit.hold = unit.hold.max(now + RESTART_AFTER);
        }
        if unit.proc.is_none() && now >= unit.hold {
            let command = match &host.cgroup {
                Some(cgroup) => self.lab.command_in(cgroup, &host.program, &host.dir)?,
                None => self.lab.command(&host.program, &host.dir)?,
            };
            let proc = self.on(at, || self.lab.spawn(&host.name, command));
            unit.hold = now + RESTART_AFTER;
            unit.proc = Some(proc?);
            self.journal.note(&format!("{}: started", host.name));
        }
        Ok(())
    }

    /// Runs `work` on a thread in the namespace of a host: what it starts is on that host.
    ///
    /// # Errors
    /// The namespace can't be entered, or `work` fails.
    pub fn on<T: Send>(&self, host: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.network.lock().on(host, work)
    }

    /// All hosts: nodes, then etcd members, then routers.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Where everything is.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The log of what was done and what happened to programs.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The index of a host.
    pub fn index(&self, kind: Kind) -> usize {
        match kind {
            Kind::Node(i) => i,
            Kind::Etcd(i) => NODES + i,
            Kind::Router(i) => NODES + ETCDS + i,
        }
    }

    /// The address of a port on a host.
    pub fn address(&self, kind: Kind, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.hosts[self.index(kind)].ip, port)
    }

    /// Kills processes of a host. Its program is not started again before [`World::release`] if it was among them.
    pub fn kill(&self, host: usize, part: Part) {
        let host = &self.hosts[host];
        if matches!(part, Part::Host | Part::Main) {
            host.unit.lock().hold = HELD;
        }
        self.signal_part(host, part, Signal::KILL);
    }

    /// Lets the supervisor start the program of a host again.
    pub fn release(&self, host: usize) {
        self.hosts[host].unit.lock().hold = SystemClock.now();
    }

    /// Stops processes of a host without ending them.
    pub fn freeze(&self, host: usize, part: Part) {
        let host = &self.hosts[host];
        match &host.cgroup {
            Some(cgroup) if part == Part::Host => self.report(host, cgroup.freeze(true)),
            _ => self.signal_part(host, part, Signal::STOP),
        }
    }

    /// Lets all processes of a host go on.
    pub fn thaw(&self, host: usize) {
        let host = &self.hosts[host];
        if let Some(cgroup) = &host.cgroup {
            self.report(host, cgroup.freeze(false));
        }
        process::signal_below(&host.dir, Signal::CONT);
    }

    fn report(&self, host: &Host, done: Result<()>) {
        if let Err(error) = done {
            self.journal.note(&format!("{}: {error:#}", host.name));
        }
    }

    fn signal_part(&self, host: &Host, part: Part, signal: Signal) {
        let data = host.dir.join("data");
        match part {
            Part::Host => process::signal_below(&host.dir, signal),
            Part::Main => host.unit.lock().proc.iter().for_each(|proc| proc.signal(signal)),
            Part::Postgres => process::signal_below(&data, signal),
            Part::Postmaster => {
                if let Some(pid) = postmaster(&data) {
                    let _ = rustix::process::kill_process(pid, signal);
                }
            }
        }
    }

    /// Takes packets away until [`World::mend`].
    ///
    /// # Errors
    /// The packet filter can't be loaded.
    pub fn cut(&self, id: u64, cuts: Vec<Cut>) -> Result<()> {
        self.network.lock().cut(id, cuts)
    }

    /// Ends the cuts of this number.
    ///
    /// # Errors
    /// The packet filter can't be loaded.
    pub fn mend(&self, id: u64) -> Result<()> {
        self.network.lock().mend(id)
    }

    /// Ends every fault that is still in force, but changed settings.
    ///
    /// # Errors
    /// The packet filter or a clock's file can't be written.
    pub fn heal(&self) -> Result<()> {
        self.network.lock().mend_all()?;
        for host in 0..self.hosts.len() {
            self.thaw(host);
            self.drain(host);
            self.set_clock(host, 0)?;
            let mut unit = self.hosts[host].unit.lock();
            unit.hold = unit.hold.min(SystemClock.now());
        }
        Ok(())
    }

    /// Takes all the room that is left on a host's file system. Whoever frees some makes room again, so this is to be
    /// repeated.
    ///
    /// # Errors
    /// The ballast can't be written for another reason.
    pub fn fill(&self, host: usize) -> Result<()> {
        static CHUNK: [u8; 1 << 16] = [0; 1 << 16];
        let path = self.hosts[host].dir.join(BALLAST);
        let mut ballast = File::options().create(true).append(true).open(path).context("ballast")?;
        ballast.seek(SeekFrom::End(0))?;
        loop {
            match ballast.write_all(&CHUNK) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error).context("ballast"),
            }
        }
    }

    /// Gives the room back.
    pub fn drain(&self, host: usize) {
        let _ = fs::remove_file(self.hosts[host].dir.join(BALLAST));
    }

    /// Moves the wall clock of a host, as its programs see it, to `seconds` from the true one.
    ///
    /// # Errors
    /// The file that says so can't be written.
    pub fn set_clock(&self, host: usize, seconds: i64) -> Result<()> {
        fs::write(self.hosts[host].dir.join(CLOCK_FILE), format!("{seconds:+}s\n")).context("the clock's file")
    }

    /// Runs `trunklinectl` beside the hosts; what it printed.
    ///
    /// # Errors
    /// It fails or takes longer than a minute.
    pub async fn trunklinectl(&self, arguments: &[&str]) -> Result<String> {
        let config = self.lab.dir().join("etc").join(format!("{}.yml", self.hosts[0].name));
        let mut command = tokio::process::Command::new(own_program("trunklinectl")?);
        command.arg("-c").arg(config).args(arguments).kill_on_drop(true).stdin(std::process::Stdio::null());
        let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await;
        let output = output.context("trunklinectl takes longer than a minute")??;
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{}", text.trim());
        Ok(text)
    }

    /// Who leads, if every agent answers and says that the cluster is whole.
    ///
    /// # Errors
    /// Why it is not.
    pub async fn whole(&self, synchronous: bool) -> Result<usize> {
        let names: Vec<&str> = self.hosts[..NODES].iter().map(|host| host.name.as_str()).collect();
        let asked = (0..NODES).map(|node| rest::get(self.address(Kind::Node(node), REST_PORT), "/cluster"));
        let mut leader = None;
        for (answer, name) in futures::future::join_all(asked).await.into_iter().zip(&names) {
            let members = Members::read(&answer.with_context(|| format!("{name} does not answer"))?.body)?;
            let found = members.settled(&names, synchronous).with_context(|| format!("{name} says"))?;
            ensure!(leader.is_none() || leader.as_ref() == Some(&found), "{name} says that {found} leads");
            leader = Some(found);
        }
        let leader = names.iter().position(|name| Some(*name) == leader.as_deref()).context("no leader")?;
        let health = rest::get(self.address(Kind::Node(leader), REST_PORT), "/primary").await?;
        ensure!(health.status == 200, "{} is not primary", names[leader]);
        Ok(leader)
    }

    /// Whether the kernel lets no packet of this node's PostgreSQL out after the lease, and why not.
    ///
    /// # Errors
    /// Its agent does not answer.
    pub async fn fence(&self, node: usize) -> Result<Result<(), String>> {
        let status = rest::get(self.address(Kind::Node(node), REST_PORT), "/patroni").await?;
        let egress = status.body["guard"]["egress"].as_str().unwrap_or("unknown");
        Ok(if egress == "armed" { Ok(()) } else { Err(egress.to_owned()) })
    }

    /// Which etcd member leads, by asking each.
    pub async fn etcd_leader(&self) -> Option<usize> {
        for member in 0..ETCDS {
            let address = self.address(Kind::Etcd(member), ETCD_PORT);
            let limit = Duration::from_millis(300);
            let body = serde_json::json!({});
            let Ok(answer) = rest::post(address, "/v3/maintenance/status", &body, limit).await else { continue };
            if answer.body["leader"].is_string() && answer.body["leader"] == answer.body["header"]["member_id"] {
                return Some(member);
            }
        }
        None
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for host in &self.hosts {
            host.unit.lock().hold = HELD;
            process::kill_below(&host.dir);
            host.unit.lock().proc = None;
            // Lazily: a process that is being ended may hold it for a moment. The namespace ends soon anyway.
            let _ = network::run("umount", &format!("--lazy {}", host.dir.display()));
        }
    }
}

fn places() -> Vec<(String, Ipv4Addr, Kind)> {
    let place = |name: &str, base: u8, i: usize, kind| {
        (format!("{name}{}", i + 1), Ipv4Addr::new(10, 77, 0, base + i as u8 + 1), kind)
    };
    let nodes = (0..NODES).map(|i| place("pg", 10, i, Kind::Node(i)));
    let etcds = (0..ETCDS).map(|i| place("etcd", 20, i, Kind::Etcd(i)));
    let routers = (0..ROUTERS).map(|i| place("router", 30, i, Kind::Router(i)));
    nodes.chain(etcds).chain(routers).collect()
}

fn with_argument(mut program: Program, argument: PathBuf) -> Program {
    program.args.push(argument.into());
    program
}

fn etcd_program(path: &Path, name: &str, hosts: &[(String, Ipv4Addr)]) -> Program {
    let url = |ip: &Ipv4Addr, port: u16| format!("http://{ip}:{port}");
    let peers = hosts.iter().filter(|(name, _)| name.starts_with("etcd"));
    let cluster: Vec<String> = peers.map(|(name, ip)| format!("{name}={}", url(ip, ETCD_PEER_PORT))).collect();
    let ip = hosts.iter().find(|host| host.0 == name).map_or(Ipv4Addr::LOCALHOST, |host| host.1);
    let (client, peer) = (url(&ip, ETCD_PORT), url(&ip, ETCD_PEER_PORT));
    let mut program = Program::new(path);
    let arguments = ["--name", name, "--data-dir", "data", "--initial-cluster", &cluster.join(",")];
    let listen = ["--listen-client-urls", &client, "--advertise-client-urls", &client];
    let listen_peer = ["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer];
    program.args = arguments.iter().chain(&listen).chain(&listen_peer).map(Into::into).collect();
    let arch = std::env::consts::ARCH.replace("aarch64", "arm64");
    program.env.push(("ETCD_UNSUPPORTED_ARCH".into(), arch.into()));
    program
}

/// Only the wall clock: time for leases and timers is another clock, which nobody can set.
fn clock_environment(preload: &Path, file: &Path) -> [(std::ffi::OsString, std::ffi::OsString); 5] {
    [
        ("LD_PRELOAD".into(), preload.into()),
        ("FAKETIME_TIMESTAMP_FILE".into(), file.into()),
        ("FAKETIME_CACHE_DURATION".into(), "1".into()),
        ("FAKETIME_DONT_FAKE_MONOTONIC".into(), "1".into()),
        ("FAKETIME_DISABLE_SHM".into(), "1".into()),
    ]
}

/// libfaketime for programs with threads, where Debian's package `libfaketime` puts it.
pub fn faketime() -> Option<PathBuf> {
    let arch = std::env::consts::ARCH;
    let path = PathBuf::from(format!("/usr/lib/{arch}-linux-gnu/faketime/libfaketimeMT.so.1"));
    path.is_file().then_some(path)
}

fn postmaster(data: &Path) -> Option<Pid> {
    let text = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let pid = text.lines().next()?.trim().parse().ok().and_then(Pid::from_raw)?;
    process::below(data).contains(&pid).then_some(pid)
}

/// What was done and what happened, with its time since the run began, one line each.
#[derive(Debug)]
pub struct Journal {
    began: Instant,
    file: Mutex<File>,
}

impl Journal {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("{}", path.display()))?;
        Ok(Self { began: SystemClock.now(), file: Mutex::new(file) })
    }

    /// Now, since the run began.
    pub fn now(&self) -> Micros {
        SystemClock.now().since(self.began).as_micros() as Micros
    }

    /// Adds a line.
    pub fn note(&self, text: &str) {
        let wall = SystemClock.wall().format("%H:%M:%S%.3f");
        let _ = writeln!(self.file.lock(), "{wall} {:9.3} {text}", self.now() as f64 / 1e6);
    }
}
