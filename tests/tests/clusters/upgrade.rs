//! A router that is replaced by the next one, with sessions that stay.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio_postgres::{Client, Config, NoTls};
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::process::Proc;
use trunkline_tests::workload::Target;
use trunkline_tests::{LIMIT, Lab, Program, Scene, Spec, certificate, rest, wait};

use crate::ports::{connect, is_standby, scene, scene_with};

/// Opens sessions, one after the other, until told to stop.
async fn visitors(target: Target, stop: Arc<AtomicBool>, served: Arc<AtomicUsize>) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        target.query_one("SELECT 1", LIMIT).await?;
        served.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Asks for 20 MB again and again, which is spliced, and counts the rows.
async fn reader(client: Client, stop: Arc<AtomicBool>, served: Arc<AtomicUsize>) -> Result<()> {
    while !stop.load(Ordering::Relaxed) {
        let rows = client.query("SELECT i, repeat('x', 1000) FROM generate_series(1, 20000) i", &[]).await?;
        let whole =
            rows.iter().zip(1..).all(|(row, i)| row.get::<_, i32>(0) == i && row.get::<_, &str>(1).len() == 1000);
        ensure!(rows.len() == 20_000 && whole, "{} rows", rows.len());
        served.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Eight clients of pgbench for twenty seconds, and what it reports.
async fn pgbench(port: u16, password: String) -> Result<String> {
    let program = trunkline_tests::tools::find_program("pgbench", "postgresql")?;
    let mut command = tokio::process::Command::new(program);
    let port = port.to_string();
    command.args(["-n", "-c", "8", "-T", "20", "-M", "prepared", "-h", "127.0.0.1", "-p", &port, "-U", "postgres"]);
    command.args(["-f", "/dev/stdin", "postgres"]).env("PGPASSWORD", password);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let mut script = child.stdin.take().context("no way to tell the script")?;
    tokio::io::AsyncWriteExt::write_all(&mut script, b"SELECT 1;\n").await?;
    drop(script);
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await??;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(output.status.success(), "{said}");
    Ok(said)
}

/// Counts one up again and again in one session, a transaction each.
async fn counter(client: Client, stop: Arc<AtomicBool>, served: Arc<AtomicUsize>) -> Result<()> {
    let mut expected = 0;
    while !stop.load(Ordering::Relaxed) {
        client.batch_execute("BEGIN; UPDATE counter SET n = n + 1").await?;
        let n: i32 = client.query_one("SELECT n FROM counter", &[]).await?.get(0);
        client.batch_execute("COMMIT").await?;
        expected += 1;
        ensure!(n == expected, "{n} is not {expected}");
        served.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_upgrades_refuse_nobody_and_drop_no_session() -> Result<()> {
    let mut scene = scene("upgrade", |_| Ok(Vec::new())).await?;
    let ports = scene.router.ports();
    scene.router.process().kill();
    let start = |number: i32| {
        let more: &[&str] = if number > 0 { &["--upgrade"] } else { &[] };
        router_process(&scene, &format!("router-{number}"), "router.yml", more)
    };
    let mut running = start(0)?;
    let target = Target::new(ports.read_write, &scene.cluster.spec().password);
    wait::until("the router to serve", LIMIT, async || target.query_one("SELECT 1", LIMIT).await).await?;
    target.execute("CREATE TABLE counter AS SELECT 0 AS n; CREATE TABLE kept (n int)", LIMIT).await?;

    let idle = connect(&scene, ports.read_only, "").await?;
    let in_transaction = connect(&scene, ports.read_write, "").await?;
    in_transaction.batch_execute("BEGIN").await?;
    let stop = Arc::new(AtomicBool::new(false));
    let served: [Arc<AtomicUsize>; 3] = Default::default();
    let mut work = vec![
        tokio::spawn(reader(connect(&scene, ports.read_write, "").await?, stop.clone(), served[0].clone())),
        tokio::spawn(counter(connect(&scene, ports.read_write, "").await?, stop.clone(), served[1].clone())),
    ];
    work.extend((0..2).map(|_| tokio::spawn(visitors(target.clone(), stop.clone(), served[2].clone()))));
    let pgbench = tokio::spawn(pgbench(ports.read_write, scene.cluster.spec().password.clone()));
    let mut number = 0;
    while number < 10 || !pgbench.is_finished() {
        number += 1;
        ensure!(number < 2000, "pgbench does not end");
        let mut next = start(number)?;
        let ended = wait::until("the old router to end, though sessions go on", LIMIT, async || {
            ensure!(next.ended().is_none(), "the new router has ended");
            running.ended().context("it is still there")
        });
        ensure!(ended.await?.success());
        running = next;
        in_transaction.execute("INSERT INTO kept VALUES ($1)", &[&number]).await?;
        ensure!(is_standby(&idle).await?);
        let before: Vec<usize> = served.iter().map(|served| served.load(Ordering::Relaxed)).collect();
        let more = wait::until("everybody to be served", LIMIT, async || {
            let more = served.iter().zip(&before).all(|(served, before)| served.load(Ordering::Relaxed) > *before);
            ensure!(more || work.iter().any(|work| work.is_finished()), "{before:?}");
            Ok(())
        });
        more.await?;
    }
    stop.store(true, Ordering::Relaxed);
    for work in work {
        if let Err(error) = work.await? {
            bail!("somebody was refused or dropped: {error:#}");
        }
    }
    let report = pgbench.await??;
    ensure!(report.contains("number of failed transactions: 0 "), "{report}");
    in_transaction.batch_execute("COMMIT").await?;
    ensure!(target.query_one("SELECT count(*) FROM kept", LIMIT).await? == number.to_string());
    // The idle one, the one in a transaction, the reader's, the counter's: all came by this upgrade.
    let adopted = metric(ports.admin, "trunkline_router_adopted_total").await?;
    ensure!(adopted >= 4.0, "{adopted} sessions were taken over");
    scene.lab.success();
    Ok(())
}

/// A router with a place for a hand-over.
fn router_process(scene: &Scene, name: &str, config: &str, more: &[&str]) -> Result<Proc> {
    let cwd = scene.lab.make_dir("router")?;
    let mut command = scene.lab.command(&Program::router()?, &cwd)?;
    command.arg("--upgrade-sock").arg(cwd.join("upgrade")).args(more).arg(scene.lab.dir().join("etc").join(config));
    scene.lab.spawn(name, command)
}

/// The value of a metric without labels.
async fn metric(admin: u16, name: &str) -> Result<f64> {
    let metrics = rest::get(admin, "/metrics").await?.body;
    let text = metrics.as_str().context("no text")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("no {name} in {text}"))?.parse()?)
}

/// etcd, as the router reaches it.
struct Detour {
    listener: tokio::net::TcpListener,
    etcd: String,
}

impl Detour {
    /// Nobody gets through before [`open`](Self::open).
    async fn to(etcd: &str) -> Result<Self> {
        Ok(Self { listener: tokio::net::TcpListener::bind("127.0.0.1:0").await?, etcd: etcd.to_owned() })
    }

    fn address(&self) -> Result<String> {
        Ok(self.listener.local_addr()?.to_string())
    }

    /// From now on everybody does, also those who have been waiting.
    fn open(self) -> tokio::task::JoinHandle<Result<()>> {
        tokio::spawn(async move {
            loop {
                let (mut client, _) = self.listener.accept().await?;
                let mut server = tokio::net::TcpStream::connect(&self.etcd).await?;
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
            }
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_waits_for_etcd_and_nobody_notices() -> Result<()> {
    let (lab, encrypted) = (Lab::new("upgrade-etcd")?, std::cell::Cell::new(0));
    let (certificate, key) = certificate::own(&lab)?;
    let more = |lab: &Lab| {
        encrypted.set(lab.port()?);
        let tls = json!({"certfile": certificate, "keyfile": key});
        let listen = format!("127.0.0.1:{}", encrypted.get());
        Ok(vec![json!({"name": "tls", "listen": listen, "target": "leader", "tls": tls})])
    };
    let mut scene = scene_with(lab.clone(), Spec::new(2, &Program::agent()?), more).await?;
    let ports = scene.router.ports();
    scene.router.process().kill();
    // The next ones come with a file in which etcd is elsewhere.
    let detours = [Detour::to(&scene.etcd.endpoints()[0]).await?, Detour::to(&scene.etcd.endpoints()[0]).await?];
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(lab.dir().join("etc/router.yml"))?)?;
    config["limits"] = json!({"drain_timeout": 1});
    lab.write_config("before.yml", &config.to_string())?;
    for (detour, file) in detours.iter().zip(["one.yml", "two.yml"]) {
        config["etcd3"]["hosts"] = json!([detour.address()?]);
        config["limits"] = json!({"drain_timeout": 15});
        lab.write_config(file, &config.to_string())?;
    }
    let [first_detour, second_detour] = detours;
    let mut running = router_process(&scene, "before", "before.yml", &[])?;
    let target = Target::new(ports.read_write, &scene.cluster.spec().password);
    wait::until("the router to serve", LIMIT, async || target.query_one("SELECT 1", LIMIT).await).await?;
    target.execute("CREATE TABLE kept (n int)", LIMIT).await?;
    let session = connect(&scene, ports.read_write, "").await?;
    session.batch_execute("BEGIN; INSERT INTO kept VALUES (1)").await?;

    let mut next = router_process(&scene, "next", "one.yml", &["--upgrade"])?;
    wait::until("the next router to be there", LIMIT, async || {
        ensure!(std::fs::read_to_string(next.log())?.contains("following the cluster"));
        Ok(())
    })
    .await?;
    // Longer than it may take to answer anything else.
    let until = SystemClock.now() + Duration::from_secs(12);
    while SystemClock.now() < until {
        ensure!(target.query_one("SELECT 1", LIMIT).await? == "1");
        let health = rest::get(ports.admin, "/health").await?.body;
        ensure!(health["draining"] == false && health["confirmed"] == true, "{health}");
        ensure!(running.ended().is_none() && next.ended().is_none());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    session.execute("INSERT INTO kept VALUES (2)", &[]).await?;

    // One that must stay behind, so that both processes are there for a while.
    let psql = trunkline_tests::tools::find_program("psql", "postgresql-client")?;
    let mut stays = tokio::process::Command::new(psql);
    let connection = format!("host=127.0.0.1 port={} user=postgres sslmode=require", encrypted.get());
    stays.env("PGPASSWORD", &scene.cluster.spec().password).kill_on_drop(true);
    let mut stays = stays.args(["-XAtc", "SELECT pg_sleep(60)", &connection]).spawn()?;
    wait::until("a session with TLS", LIMIT, async || {
        let sessions = rest::get(ports.admin, "/sessions?port=tls").await?.body;
        ensure!(sessions["sessions"].as_array().is_some_and(|list| list.len() == 1), "{sessions}");
        Ok(())
    })
    .await?;
    let forwarding = first_detour.open();
    wait::until("the next router to be in charge", LIMIT, async || {
        let adopted = metric(ports.admin, "trunkline_router_adopted_total").await?;
        ensure!(adopted >= 1.0);
        Ok(())
    })
    .await?;
    for _ in 0..50 {
        let health = rest::get(ports.admin, "/health").await?.body;
        ensure!(health["draining"] == false, "the old router answered: {health}");
    }
    // Longer than it would be given by a SIGTERM.
    let until = SystemClock.now() + Duration::from_secs(3);
    while SystemClock.now() < until {
        ensure!(running.ended().is_none() && stays.try_wait()?.is_none(), "it has a session, which goes on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stays.kill().await?;
    wait::until("the old router to end", LIMIT, async || running.ended().context("it is still there")).await?;
    session.batch_execute("INSERT INTO kept VALUES (3); COMMIT").await?;
    ensure!(target.query_one("SELECT count(*) FROM kept", LIMIT).await? == "3");

    // Told to end, it does not wait for one that is not ready; who comes meanwhile waits for that.
    let third = router_process(&scene, "third", "two.yml", &["--upgrade"])?;
    wait::until("the third router to be there", LIMIT, async || {
        ensure!(std::fs::read_to_string(third.log())?.contains("following the cluster"));
        Ok(())
    })
    .await?;
    drop(session);
    next.signal(Signal::TERM);
    wait::until("it to end", LIMIT, async || next.ended().context("it is still there")).await?;
    let visitor = tokio::spawn(async move { target.query_one("SELECT 'served'", LIMIT).await });
    wait::until("the visitor to be held", LIMIT, async || {
        let health = rest::get(ports.admin, "/health").await?.body;
        ensure!(health["held"] == 1, "{health}");
        Ok(())
    })
    .await?;
    forwarding.abort();
    let forwarding = second_detour.open();
    ensure!(visitor.await?? == "served");
    forwarding.abort();
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_router_that_has_handed_over_and_has_a_session_left() -> Result<()> {
    let (lab, [encrypted, removed]) = (Lab::new("upgrade-threads")?, [const { std::cell::Cell::new(0) }; 2]);
    let (certificate, key) = certificate::own(&lab)?;
    let more = |lab: &Lab| {
        encrypted.set(lab.port()?);
        removed.set(lab.port()?);
        let listen = |port: u16| format!("127.0.0.1:{port}");
        let tls = json!({"certfile": certificate, "keyfile": key});
        Ok(vec![
            json!({"name": "tls", "listen": listen(encrypted.get()), "target": "leader", "tls": tls}),
            json!({"name": "removed", "listen": listen(removed.get()), "target": "leader"}),
        ])
    };
    let mut scene = scene_with(lab.clone(), Spec::new(2, &Program::agent()?), more).await?;
    let ports = scene.router.ports();
    scene.router.process().kill();
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(lab.dir().join("etc/router.yml"))?)?;
    config["threads"] = json!(4);
    lab.write_config("four.yml", &config.to_string())?;
    config["threads"] = json!(1);
    config["ports"].as_array_mut().context("no ports")?.retain(|port| port["name"] != "removed");
    lab.write_config("one.yml", &config.to_string())?;

    let mut running = router_process(&scene, "four", "four.yml", &[])?;
    let target = Target::new(ports.read_write, &scene.cluster.spec().password);
    wait::until("the router to serve", LIMIT, async || target.query_one("SELECT 1", LIMIT).await).await?;
    let goes = connect(&scene, removed.get(), "").await?;
    let psql = trunkline_tests::tools::find_program("psql", "postgresql-client")?;
    let mut stays = tokio::process::Command::new(psql);
    let connection = format!("host=127.0.0.1 port={} user=postgres sslmode=require", encrypted.get());
    stays.env("PGPASSWORD", &scene.cluster.spec().password).kill_on_drop(true);
    let stays = stays.args(["-XAtc", "SELECT pg_sleep(60)", &connection]).spawn()?;
    wait::until("a session with TLS", LIMIT, async || {
        let sessions = rest::get(ports.admin, "/sessions?port=tls").await?.body;
        ensure!(sessions["sessions"].as_array().is_some_and(|list| list.len() == 1), "{sessions}");
        Ok(())
    })
    .await?;

    let mut next = router_process(&scene, "one", "one.yml", &["--upgrade"])?;
    wait::until("the next router to be in charge", LIMIT, async || {
        ensure!(metric(ports.admin, "trunkline_router_adopted_total").await? >= 1.0);
        Ok(())
    })
    .await?;
    for _ in 0..40 {
        ensure!(target.query_one("SELECT 1", Duration::from_secs(5)).await? == "1");
    }
    wait::until("the removed port to be closed", Duration::from_secs(5), async || {
        ensure!(std::net::TcpStream::connect(("127.0.0.1", removed.get())).is_err());
        Ok(())
    })
    .await?;
    ensure!(running.ended().is_none() && next.ended().is_none(), "both are there");
    ensure!(!is_standby(&goes).await?, "whoever came by that port stays");
    drop(stays);
    scene.lab.success();
    Ok(())
}

/// The next router has never heard etcd, and calls the leader's reign by another name than the one before; and than etcd does later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_without_etcd_keeps_the_sessions_of_a_leader_that_proves_itself() -> Result<()> {
    let socket = |lab: &Lab| anyhow::Ok(lab.make_dir("socket")?.join(".s.PGSQL.5000"));
    let local = |lab: &Lab| Ok(vec![json!({"name": "local", "listen": socket(lab)?, "target": "leader"})]);
    let mut scene = scene("upgrade-proven", local).await?;
    let (lab, ports) = (scene.lab.clone(), scene.router.ports());
    scene.router.process().kill();
    let detour = Detour::to(&scene.etcd.endpoints()[0]).await?;
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(lab.dir().join("etc/router.yml"))?)?;
    config["etcd3"]["hosts"] = json!([detour.address()?]);
    let member = |node: &trunkline_tests::Node| {
        let api_url = format!("http://127.0.0.1:{}", node.rest_port());
        json!({"name": node.name(), "api_url": api_url, "connect_address": format!("127.0.0.1:{}", node.port())})
    };
    config["members"] = scene.cluster.nodes.iter().map(member).collect();
    config["limits"] = json!({"stale_after": 1});
    lab.write_config("next.yml", &config.to_string())?;

    let mut running = router_process(&scene, "before", "router.yml", &[])?;
    let target = Target::new(ports.read_write, &scene.cluster.spec().password);
    wait::until("the router to serve", LIMIT, async || target.query_one("SELECT 1", LIMIT).await).await?;
    target.execute("CREATE TABLE kept (n int)", LIMIT).await?;
    let session = connect(&scene, ports.read_write, "").await?;
    session.batch_execute("BEGIN; INSERT INTO kept VALUES (1)").await?;
    let mut by_socket = Config::new();
    let socket = socket(&lab)?;
    by_socket.host_path(socket.parent().context("no directory")?).port(5000).user("postgres");
    by_socket.password(&scene.cluster.spec().password);
    let (local, connection) = tokio::time::timeout(LIMIT, by_socket.connect(NoTls)).await??;
    tokio::spawn(connection);
    local.batch_execute("BEGIN; INSERT INTO kept VALUES (2)").await?;

    let mut next = router_process(&scene, "next", "next.yml", &["--upgrade"])?;
    wait::until("the old router to end", LIMIT, async || {
        ensure!(next.ended().is_none(), "the new router has ended");
        running.ended().context("it is still there")
    })
    .await?;
    let health = rest::get(ports.admin, "/health").await?.body;
    ensure!(health["certainty"] == "unconfirmed, leader proven", "{health}");
    ensure!(metric(ports.admin, "trunkline_router_adopted_total").await? == 2.0);
    session.execute("INSERT INTO kept VALUES (3)", &[]).await?;
    ensure!(target.query_one("SELECT 'served'", LIMIT).await? == "served");

    let forwarding = detour.open();
    wait::until("etcd to be heard", LIMIT, async || {
        let health = rest::get(ports.admin, "/health").await?.body;
        ensure!(health["certainty"] == "confirmed", "{health}");
        Ok(())
    })
    .await?;
    session.batch_execute("COMMIT").await?;
    local.batch_execute("COMMIT").await?;
    ensure!(target.query_one("SELECT count(*) FROM kept", LIMIT).await? == "3");
    let (again, connection) = tokio::time::timeout(LIMIT, by_socket.connect(NoTls)).await??;
    tokio::spawn(connection);
    ensure!(!is_standby(&again).await?);
    forwarding.abort();
    scene.lab.success();
    Ok(())
}
