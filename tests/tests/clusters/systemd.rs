//! The unit files in `systemd/` under a real systemd, which is the first process of namespaces of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use trunkline_tests::process::Proc;
use trunkline_tests::workload::Target;
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Spec, wait};

const UNIT: &str = include_str!("../../../systemd/trunkline-agent.service");
const ROUTER_UNIT: &str = include_str!("../../../systemd/trunkline-router.service");
const SYSTEMD: &str = "/lib/systemd/systemd";

/// Makes the namespaces, with a view of cgroups that begins at `$1` of the host's, and becomes systemd, which knows one
/// unit. The host's are not for it: nothing but a target without dependencies is started.
const BOOT: &str = r#"
    set -e
    for hierarchy in $3; do
        mkdir -p "$hierarchy/$1"
        echo $$ > "$hierarchy/$1/cgroup.procs"
    done
    exec unshare --cgroup --pid --mount --uts --ipc --fork --kill-child bash -c '
        set -e
        mount -t proc proc /proc
        mount -t tmpfs tmpfs /run
        if [ "$3" = /sys/fs/cgroup ]; then
            mount -t cgroup2 cgroup2 /sys/fs/cgroup
        else
            mount -t tmpfs tmpfs /sys/fs/cgroup
            mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
            mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
            mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
        fi
        mount -t tmpfs tmpfs /etc/systemd/system
        cp "$2"/* /etc/systemd/system/
        exec env -i container=other PATH=/usr/bin:/bin:/usr/sbin:/sbin "$4" --system --unit=test.target --show-status=no
    ' boot "$@"
"#;

/// systemd, and what it was given of the host.
struct Init {
    /// `unshare`; everything inside ends with it.
    outside: Proc,
    cgroups: Vec<PathBuf>,
    /// The one unit that it has.
    unit: &'static str,
}

impl Init {
    /// Starts it with this unit; `None` where that can't be, with a line of why.
    async fn start(lab: &Lab, name: &'static str, unit: &str) -> Result<Option<Self>> {
        let hierarchies = match Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            true => vec!["/sys/fs/cgroup"],
            false => vec!["/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"],
        };
        let missing = [SYSTEMD, "/etc/systemd/system"].into_iter().chain(hierarchies.iter().copied());
        let missing = missing.filter(|path| !Path::new(path).exists()).collect::<Vec<_>>();
        let user = std::fs::read_to_string("/etc/passwd")?.lines().any(|line| line.starts_with("postgres:"));
        if !rustix::process::geteuid().is_root() || !missing.is_empty() || !user {
            println!("SKIPPED: systemd in namespaces takes root, the user postgres, and {missing:?}");
            return Ok(None);
        }
        let units = lab.make_dir("units")?;
        std::fs::write(units.join(format!("{name}.service")), unit)?;
        let target = format!("[Unit]\nDefaultDependencies=no\nWants={name}.service\n");
        std::fs::write(units.join("test.target"), target)?;
        let cgroup = lab.dir().file_name().context("a name")?.to_string_lossy().into_owned();
        let mut command = Command::new("bash");
        command.args(["-c", BOOT, "boot", &cgroup]).arg(&units).arg(hierarchies.join(" ")).arg(SYSTEMD);
        command.current_dir(lab.dir());
        let outside = lab.spawn("systemd", command)?;
        let cgroups = hierarchies.iter().map(|dir| Path::new(dir).join(&cgroup)).collect();
        let mut init = Self { outside, cgroups, unit: name };
        // A container may not be allowed all of that.
        let up = wait::until("systemd", LIMIT, async || {
            let runs = init.outside.ended().is_none();
            if runs {
                init.told(&["show"])?;
            }
            Ok(runs)
        });
        if up.await? {
            return Ok(Some(init));
        }
        let why = std::fs::read_to_string(init.outside.log())?;
        println!("SKIPPED: systemd can't be started in namespaces here: {why}");
        Ok(None)
    }

    /// The first process inside, as it is called outside.
    fn first(&self) -> Result<String> {
        let pid = self.outside.pid().as_raw_pid();
        let inside = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        Ok(inside.split_whitespace().next().context("it has not begun")?.to_owned())
    }

    /// Whether a process inside is there, by what it is called inside.
    fn runs(&self, pid: &str) -> Result<bool> {
        Ok(Path::new(&format!("/proc/{}/root/proc/{pid}", self.first()?)).try_exists()?)
    }

    /// `systemctl` inside.
    fn systemctl(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.first()?, "-m", "-p", "timeout", "60", "systemctl", "--no-pager"]).args(arguments);
        Ok(command.output()?)
    }

    /// The same, which must succeed.
    fn told(&self, arguments: &[&str]) -> Result<String> {
        let output = self.systemctl(arguments)?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success(), "systemctl {arguments:?}: {said}");
        Ok(said)
    }

    /// Waits until the unit is in this state.
    async fn is(&self, state: &str) -> Result<()> {
        wait::until(format!("the unit to be {state}"), LIMIT, async || {
            let told = self.systemctl(&["show", "-P", "ActiveState", self.unit])?;
            let told = String::from_utf8_lossy(&told.stdout).into_owned();
            ensure!(told.starts_with(state), "{told}");
            Ok(())
        })
        .await
    }

    /// The process that the unit is.
    fn main(&self) -> Result<String> {
        Ok(self.told(&["show", "-P", "MainPID", self.unit])?.trim().to_owned())
    }
}

/// A unit without what it needs of the host's.
fn alone(unit: &str, cwd: &Path) -> Result<String> {
    let unit = unit.replace("[Unit]", "[Unit]\nDefaultDependencies=no");
    let unit = unit.replace("After=network-online.target\nWants=network-online.target\n", "");
    let unit = unit.replace("[Service]", &format!("[Service]\nWorkingDirectory={}", cwd.display()));
    ensure!(!unit.contains("network-online"), "{unit}");
    Ok(unit)
}

impl Drop for Init {
    fn drop(&mut self) {
        self.outside.kill();
        for cgroup in &self.cgroups {
            remove(cgroup);
        }
    }
}

/// A cgroup and those in it, which are empty.
fn remove(cgroup: &Path) {
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    // The kernel counts a killed process in for a moment longer.
    for _ in 0..100 {
        if std::fs::remove_dir(cgroup).is_ok() || !cgroup.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_unit_is_ready_reloaded_restarted_without_postgresql_and_stopped() -> Result<()> {
    let lab = Lab::new("systemd")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), Spec::new(1, &Program::agent()?))?;
    let node = &mut cluster.nodes[0];
    let program = lab.reachable(&Program::agent()?.path)?;
    let line = format!("ExecStart={} {}", program.display(), node.config().display());
    let unit = UNIT.replace("ExecStart=/usr/local/bin/trunkline-agent /etc/trunkline/patroni.yml", &line);
    let unit = alone(&unit, node.dir())?;
    ensure!(unit.contains(&line), "{unit}");
    let Some(init) = Init::start(&lab, "trunkline-agent", &unit).await? else {
        lab.success();
        return Ok(());
    };

    init.is("active").await?;
    let shows = async |text: &str| {
        wait::until(format!("{text} in the status"), LIMIT, async || {
            let told = init.told(&["show", "-P", "StatusText", "trunkline-agent"])?;
            ensure!(told.contains(text), "{told}");
            Ok(())
        })
        .await
    };
    shows("primary, running").await?;
    let status = node.status().await?;
    ensure!(status["guard"]["process"] == "armed", "{}", status["guard"]);
    println!("guard under systemd: {}", status["guard"]);

    // Returns when the file has been taken up, or before with a systemd that only sends the signal.
    let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
    config["tags"] = json!({ "rack": "b7" });
    node.configure(&config.to_string())?;
    init.told(&["reload", "trunkline-agent"])?;
    wait::until("the new tag", LIMIT, async || {
        let status = node.status().await?;
        ensure!(status["tags"]["rack"] == "b7", "{status}");
        Ok(())
    })
    .await?;

    // Killed, it is started again, and PostgreSQL goes on.
    let started = async || Ok::<_, anyhow::Error>(node.status().await?["postmaster_start_time"].clone());
    let (agent, before) = (init.main()?, started().await?);
    init.told(&["kill", "--kill-who=main", "-s", "KILL", "trunkline-agent"])?;
    wait::until("another agent", LIMIT, async || {
        let now = init.main()?;
        ensure!(now != agent && now != "0", "{now}");
        ensure!(node.health("/primary").await == Some(200), "it does not lead");
        Ok(())
    })
    .await?;
    init.is("active").await?;
    ensure!(started().await? == before, "PostgreSQL was restarted");

    init.told(&["stop", "trunkline-agent"])?;
    init.is("inactive").await?;
    ensure!(node.processes().is_empty(), "{:?} are left", node.processes());
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_routers_unit_is_ready_upgraded_without_losing_a_session_and_stopped() -> Result<()> {
    let lab = Lab::new("systemd-router")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), Spec::new(1, &Program::agent()?)).await?;
    cluster.settled(LIMIT).await?;
    // The file of a router that does not run any more.
    let mut before = cluster.router().await?;
    let (ports, config) = (before.ports(), lab.dir().join("etc/router.yml"));
    before.process().kill();
    let cwd = lab.make_dir("router")?;
    let program = lab.reachable(&Program::router()?.path)?;
    let unit = ROUTER_UNIT.replace("/usr/local/bin/trunkline-router", &program.display().to_string());
    let unit = unit.replace("/etc/trunkline/router.yml", &config.display().to_string());
    let unit = alone(&unit.replace("User=trunkline\n", "User=postgres\n"), &cwd)?;
    ensure!(unit.contains(&format!("{} --validate {}", program.display(), config.display())), "{unit}");
    let Some(init) = Init::start(&lab, "trunkline-router", &unit).await? else {
        lab.success();
        return Ok(());
    };
    init.is("active").await?;

    let target = Target::new(ports.read_write, &cluster.spec().password);
    target.execute("CREATE TABLE kept (n int)", LIMIT).await?;
    let session = target.connect(LIMIT).await?;
    session.batch_execute("BEGIN").await?;
    for number in 0..3 {
        let old = init.main()?;
        init.told(&["reload", "trunkline-router"])?;
        wait::until("the next router to be the unit's", LIMIT, async || {
            let now = init.main()?;
            ensure!(now != old && now != "0", "{now}");
            ensure!(!init.runs(&old)?, "{old} is still there");
            Ok(())
        })
        .await?;
        session.execute("INSERT INTO kept VALUES ($1)", &[&number]).await?;
        ensure!(target.query_one("SELECT 1", LIMIT).await? == "1");
    }
    session.batch_execute("COMMIT").await?;
    ensure!(target.query_one("SELECT count(*) FROM kept", LIMIT).await? == "3");

    // A file that would not start is no upgrade.
    let good = std::fs::read_to_string(&config)?;
    lab.write_config("router.yml", "scope: [nothing")?;
    let main = init.main()?;
    let refused = init.systemctl(&["reload", "trunkline-router"])?;
    ensure!(!refused.status.success(), "it was taken");
    ensure!(init.main()? == main && session.query_one("SELECT 1", &[]).await?.get::<_, i32>(0) == 1);
    lab.write_config("router.yml", &good)?;

    // Killed, it is started again.
    init.told(&["kill", "--kill-who=main", "-s", "KILL", "trunkline-router"])?;
    wait::until("another router", LIMIT, async || {
        let now = init.main()?;
        ensure!(now != main && now != "0", "{now}");
        target.query_one("SELECT 1", LIMIT).await
    })
    .await?;
    init.is("active").await?;
    init.told(&["stop", "trunkline-router"])?;
    init.is("inactive").await?;
    ensure!(init.told(&["show", "-P", "Result", "trunkline-router"])?.trim() == "success");
    lab.success();
    Ok(())
}
