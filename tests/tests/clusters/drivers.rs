//! Drivers as applications use them, through the router's ports: in front of our agents in every way of encryption, and in
//! front of stock Patroni.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::join_all;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::drivers::{Driver, Place, Running, here, psycopg_with_libpq_18};
use trunkline_tests::{
    Cluster, Etcd, LIMIT, Lab, Program, Proxy, Scene, Spec, Timing, certificate, patroni, proxy, rest, versions, wait,
};

/// The lease (5 s), etcd's sweep (0.5 s), and a busy machine.
const AFTER_LEASE: Duration = Duration::from_secs(10);

/// With the server's connections closed by its end there is nothing to wait for but a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Drivers that start at the same time: what is shown is no load test, and two cores have a cluster to carry.
const BESIDE: usize = 2;

/// How a session is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Not at all.
    Plain,
    /// From client to server; the router passes it on.
    PassThrough,
    /// From client to router.
    Ended,
    /// From client to router and from there to the server.
    Twice,
}

/// A cluster with a router of two ports for those who encrypt to the server or not at all, two where TLS ends, and two where
/// it begins again.
struct Stage {
    scene: Scene,
    certificate: std::path::PathBuf,
    ended: proxy::Ports,
    twice: proxy::Ports,
}

impl Stage {
    async fn set(lab: Lab, agent: Program, timing: Timing) -> Result<Self> {
        let (certificate, key) = certificate::own(&lab)?;
        // Two, so that whoever reads loses its server as well when the standby is promoted.
        let mut spec = Spec::new(2, &agent);
        spec.timing = timing;
        let ssl = json!({ "ssl": "on", "ssl_cert_file": certificate, "ssl_key_file": key });
        spec.dcs["postgresql"] = json!({ "parameters": ssl });
        let hba = ["local all all scram-sha-256", "host all all 127.0.0.1/32 scram-sha-256"];
        let replication = "host replication all 127.0.0.1/32 scram-sha-256";
        spec.local["postgresql"] = json!({ "pg_hba": [hba[0], hba[1], replication] });
        let etcd = Etcd::start(&lab, 1).await?;
        let cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;

        let [ports, ended, twice] = [proxy::Ports::any(&lab)?, proxy::Ports::any(&lab)?, proxy::Ports::any(&lab)?];
        let port = |port: u16, target: &str, tls: &Value, server_tls: &Value| {
            json!({ "name": format!("{target}-{port}"), "listen": format!("127.0.0.1:{port}"), "target": target,
                    "no_candidate": "hold", "tls": tls, "server_tls": server_tls })
        };
        let (tls, server_tls) = (json!({ "certfile": certificate, "keyfile": key }), json!({ "cafile": certificate }));
        let list = [(ports, &Value::Null, &Value::Null), (ended, &tls, &Value::Null), (twice, &tls, &server_tls)];
        let list = list.iter().flat_map(|(ports, tls, server_tls)| {
            [port(ports.read_write, "leader", tls, server_tls), port(ports.read_only, "replica", tls, server_tls)]
        });
        let extra = json!({ "ports": list.collect::<Vec<_>>() });
        let router = Program::router()?;
        let router = Proxy::router(&lab, router, ports, &cluster.spec().scope, &etcd.endpoints(), &extra).await?;
        Ok(Self { scene: Scene { lab, etcd, cluster, router }, certificate, ended, twice })
    }

    fn place(&self, way: Way, role: &str) -> Place {
        let ports = match way {
            Way::Plain | Way::PassThrough => self.scene.router.ports(),
            Way::Ended => self.ended,
            Way::Twice => self.twice,
        };
        let port = if role == "primary" { ports.read_write } else { ports.read_only };
        self.at(&format!("{way:?}, {role}"), "127.0.0.1", &port.to_string(), way)
    }

    fn at(&self, name: &str, host: &str, port: &str, way: Way) -> Place {
        let text = OsString::from;
        let mut environment = vec![
            ("PGHOST", text(host)),
            ("PGPORT", text(port)),
            ("PGUSER", text("postgres")),
            ("PGDATABASE", text("postgres")),
            ("PGPASSWORD", text(&self.scene.cluster.spec().password)),
            ("PGSSLMODE", text(if way == Way::Plain { "disable" } else { "verify-full" })),
        ];
        if way != Way::Plain {
            environment.push(("PGSSLROOTCERT", self.certificate.clone().into_os_string()));
        }
        Place { name: name.to_owned(), environment }
    }

    /// Every driver does everything it can, in this way, on the port for this role.
    async fn work(&self, way: Way, role: &str) -> Result<()> {
        let place = self.place(way, role);
        let all = here().into_iter().map(|driver| self.work_of(driver, &place, way, role));
        stream::iter(all).buffer_unordered(BESIDE).try_collect().await
    }

    async fn work_of(&self, driver: &Driver, place: &Place, way: Way, role: &str) -> Result<()> {
        let encrypted = if matches!(way, Way::PassThrough | Way::Twice) { "on" } else { "off" };
        let mut expected = if driver.holds.len() > 2 { vec![("role", role), ("tls", encrypted)] } else { Vec::new() };
        expected.extend(driver.anywhere);
        if role == "primary" {
            expected.extend(driver.on_primary);
        }
        let steps: Vec<&str> = expected.iter().map(|(step, _)| *step).collect();
        let mut running = driver.start(&self.scene.lab, place, &steps)?;
        for (step, answer) in expected {
            running.says(step, answer, LIMIT).await?;
        }
        running.ends().await
    }

    /// Every driver is in the middle of each thing that it can be in the middle of, in these ways in turn; on a standby of the
    /// first.
    async fn hold(&self, ways: &[Way], role: &'static str) -> Result<Vec<Held>> {
        let (mut all, mut sessions) = (Vec::new(), 0);
        for (i, driver) in here().into_iter().enumerate() {
            let holds = if role == "primary" { driver.holds } else { &driver.holds[..1] };
            for (j, (step, count)) in holds.iter().enumerate() {
                sessions += count;
                let place = self.place(ways[(i + j) % ways.len()], role);
                all.push(async move {
                    let mut running = driver.start(&self.scene.lab, &place, &[step])?;
                    running.says(step, "waiting", LIMIT).await?;
                    anyhow::Ok(Held { running, step, role })
                });
            }
        }
        let held: Vec<_> = stream::iter(all).buffered(BESIDE).try_collect().await?;
        let admin = self.scene.router.ports().admin;
        let there = wait::until("everybody's session", LIMIT, async || {
            let routes = rest::get(admin, "/routes").await?.body;
            ensure!(routes["sessions"] == sessions, "{sessions} are expected: {routes}");
            Ok(())
        });
        there.await?;
        Ok(held)
    }

    /// Readers whose standby crashes are told at once, and are served when it is back.
    async fn outlives_the_standby(&mut self, ways: &[Way]) -> Result<()> {
        let readers = self.hold(ways, "standby").await?;
        let leader = self.scene.cluster.settled(LIMIT).await?;
        self.scene.cluster.nodes[1 - leader].kill_postmaster()?;
        all_are_back(all_end(readers, AT_ONCE).await?).await?;
        ensure!(self.scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
        Ok(())
    }
}

/// All of it at the same time and to the end, so that the error names everybody who failed.
async fn every<F: Future<Output = Result<()>>>(all: impl IntoIterator<Item = F>) -> Result<()> {
    let failed: Vec<String> =
        join_all(all).await.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// A driver in the middle of something.
struct Held {
    running: Running,
    step: &'static str,
    role: &'static str,
}

/// All of their sessions end, within `limit`.
async fn all_end(mut held: Vec<Held>, limit: Duration) -> Result<Vec<Held>> {
    every(held.iter_mut().map(|held| held.running.says(held.step, "ended", limit))).await?;
    Ok(held)
}

/// All of them find a server of their role again through the same port.
async fn all_are_back(held: Vec<Held>) -> Result<()> {
    let back = async |mut held: Held| {
        held.running.says(held.step, held.role, LIMIT).await?;
        held.running.ends().await
    };
    every(held.into_iter().map(back)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_driver_does_everything_and_outlives_a_frozen_leader() -> Result<()> {
    let mut stage = Stage::set(Lab::new("drivers")?, Program::agent()?, Timing::TRUNKLINE).await?;
    let ways = [Way::Plain, Way::PassThrough, Way::Ended];
    for way in ways {
        for role in ["primary", "standby"] {
            let begun = SystemClock.now();
            stage.work(way, role).await?;
            eprintln!("{way:?}, {role}: {:?}", SystemClock.now().since(begun));
        }
    }

    let ports = stage.scene.router.ports();
    for (order, attributes, role) in [
        ([ports.read_only, ports.read_write], "read-write", "primary"),
        ([ports.read_write, ports.read_only], "standby", "standby"),
        ([ports.read_only, ports.read_write], "primary", "primary"),
        ([ports.read_write, ports.read_only], "prefer-standby", "standby"),
    ] {
        let list = order.map(|port| port.to_string()).join(",");
        let mut place = stage.at(attributes, "127.0.0.1,127.0.0.1", &list, Way::Plain);
        place.environment.push(("PGTARGETSESSIONATTRS", attributes.into()));
        for driver in here().into_iter().filter(|driver| ["psql", "psycopg"].contains(&driver.name)) {
            driver.start(&stage.scene.lab, &place, &["role"])?.says("role", role, LIMIT).await?;
        }
    }

    stage.outlives_the_standby(&ways).await?;
    let writers = stage.hold(&ways, "primary").await?;
    let leader = stage.scene.cluster.settled(LIMIT).await?;
    let fault = SystemClock.now();
    // Its connections stay open and mute: whoever notices has been told by the router.
    stage.scene.cluster.nodes[leader].freeze();
    let writers = all_end(writers, AFTER_LEASE).await?;
    eprintln!("all sessions to the frozen leader had ended {:?} after the fault", SystemClock.now().since(fault));
    all_are_back(writers).await?;
    stage.scene.cluster.nodes[leader].thaw();
    stage.scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_driver_does_everything_in_front_of_stock_patroni() -> Result<()> {
    let mut stage = Stage::set(Lab::new("drivers-patroni")?, patroni::program()?, Timing::PATRONI_LOWEST).await?;
    let ways = [Way::Plain, Way::PassThrough];
    stage.work(Way::Plain, "primary").await?;
    stage.work(Way::PassThrough, "standby").await?;

    stage.outlives_the_standby(&ways).await?;
    let writers = stage.hold(&ways, "primary").await?;
    let leader = stage.scene.cluster.settled(LIMIT).await?;
    stage.scene.cluster.nodes[leader].kill_postmaster()?;
    all_are_back(all_end(writers, AT_ONCE).await?).await?;
    stage.scene.lab.success();
    Ok(())
}

/// `sslnegotiation=direct`: TLS without asking for it, with the protocol named by ALPN, past the router, to it and through it; the
/// certificate is verified, and the channel bound where both ends have the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libpq_18_begins_tls_at_once() -> Result<()> {
    let (Some(tools), Some(driver)) = (versions::postgres_18_with_tls()?, psycopg_with_libpq_18()?) else {
        return Ok(());
    };
    let mut stage = Stage::set(Lab::with_tools("direct-tls", tools)?, Program::agent()?, Timing::TRUNKLINE).await?;
    let direct = |way, role, binding: &str| {
        let mut place = stage.place(way, role);
        place.environment.extend([("PGSSLNEGOTIATION", "direct".into()), ("PGCHANNELBINDING", binding.into())]);
        place
    };
    for (way, binding) in [(Way::PassThrough, "require"), (Way::Ended, "prefer"), (Way::Twice, "require")] {
        for role in ["primary", "standby"] {
            stage.work_of(&driver, &direct(way, role, binding), way, role).await?;
        }
    }
    // The server can't be bound to a channel that it has no part in, and who insists is told so.
    let mut running = driver.start(&stage.scene.lab, &direct(Way::Ended, "primary", "require"), &["role"])?;
    let told = running.line("role", LIMIT).await?;
    ensure!(told.contains("channel binding"), "{told}");

    // In a planned switchover a session ends between two transactions where its messages can be read.
    let mut listener = driver.start(&stage.scene.lab, &direct(Way::Ended, "primary", "prefer"), &["hold-listen"])?;
    listener.says("hold-listen", "waiting", LIMIT).await?;
    let old = stage.scene.cluster.settled(LIMIT).await?;
    // Nobody waits for routers where no transaction is open: the server may be the first to end the session.
    let open = stage.scene.node(old).connect(LIMIT).await?;
    open.batch_execute("BEGIN").await?;
    stage.scene.cluster.switchover(old, None).await?;
    listener.says("hold-listen", "ended", LIMIT).await?;
    listener.says("hold-listen", "primary", LIMIT).await?;
    listener.ends().await?;
    let metrics = rest::get(stage.scene.router.ports().admin, "/metrics").await?.body;
    let counted = format!(",port=\"leader-{}\",reason=\"switchover\"}} 1", stage.ended.read_write);
    ensure!(metrics.as_str().is_some_and(|text| text.contains(&counted)), "{counted} is not in {metrics}");
    stage.scene.lab.success();
    Ok(())
}
