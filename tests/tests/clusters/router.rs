//! The router where its surroundings misbehave: no leader yet, no leader at all, nonsense from clients.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::workload::{Target, Writers, create_table};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Proxy, Scene, Spec, proxy, rest, wait};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_come_before_there_is_a_cluster_are_held_and_then_served() -> Result<()> {
    let lab = Lab::new("held")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), Spec::new(1, &Program::agent()?))?;
    let extra = json!({ "limits": { "hold_timeout": 60 } });
    let (scope, ports) = (cluster.spec().scope.clone(), proxy::Ports::any(&lab)?);
    let router = Proxy::router(&lab, Program::router()?, ports, &scope, &etcd.endpoints(), &extra).await?;

    let target = router.read_write(&cluster.spec().password);
    let early = tokio::spawn(async move { target.query_one("SELECT 'served'", LIMIT).await });
    let held = wait::until("the client to be held", LIMIT, async || {
        let routes = rest::get(ports.admin, "/routes").await?.body;
        ensure!(routes["held"] == 1, "{routes}");
        Ok(())
    });
    held.await?;
    cluster.nodes[0].start()?;
    ensure!(early.await?? == "served");
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_held_too_long_gets_a_reason() -> Result<()> {
    let lab = Lab::new("expiry")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let extra = json!({ "limits": { "hold_timeout": 1 } });
    let ports = proxy::Ports::any(&lab)?;
    let router = Proxy::router(&lab, Program::router()?, ports, "nobody", &etcd.endpoints(), &extra).await?;

    let config = format!("host=127.0.0.1 port={} user=postgres", router.ports().read_write);
    let answer = tokio::time::timeout(LIMIT, tokio_postgres::connect(&config, NoTls)).await?;
    let error = answer.err().context("it was let in to nowhere")?;
    ensure!(error.code() == Some(&SqlState::CANNOT_CONNECT_NOW), "{error:?}");
    ensure!(error.as_db_error().is_some_and(|error| !error.message().contains("127.0.0.1")), "{error:?}");

    // A client that gives up while it is held frees its place.
    let gone = TcpStream::connect(("127.0.0.1", ports.read_write))?;
    drop(gone);
    let none_held = wait::until("nobody to be held", LIMIT, async || {
        let routes = rest::get(ports.admin, "/routes").await?.body;
        ensure!(routes["held"] == 0 && routes["connections"] == 0, "{routes}");
        Ok(())
    });
    none_held.await?;
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_on_its_ports_harms_nobody() -> Result<()> {
    let mut scene = Scene::start("nonsense", 2).await?;
    let load = scene.load().await?;
    let failures = load.writers.record().failures;
    let ports = scene.router.ports();

    let mut packets: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0; 8],
        vec![0xff; 64],
        b"\x7f\xff\xff\xff\x00\x03\x00\x00".to_vec(),
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f".to_vec(),
        b"\x00\x00\x00\x09\x00\x03\x00\x00\x00".to_vec(),
        b"\x00\x00\x00\x0c\x00\x03\x00\x00user".to_vec(),
        b"\x00\x00\x00\x10\x04\xd2\x16\x2e\x00\x00\x00\x00\x00\x00\x00\x00".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        Vec::new(),
    ];
    packets.extend((0..200).map(|_| (0..rand::random_range(1..300)).map(|_| rand::random()).collect()));
    let throw = move || {
        for (i, packet) in packets.iter().enumerate() {
            let port = [ports.read_write, ports.read_only][i % 2];
            let Ok(mut client) = TcpStream::connect(("127.0.0.1", port)) else { continue };
            let _ = client.set_read_timeout(Some(Duration::from_millis(20)));
            let _ = client.write_all(packet);
            let _ = client.read(&mut [0; 512]);
        }
    };
    tokio::task::spawn_blocking(throw).await?;

    load.writers.progress(100, LIMIT).await?;
    ensure!(scene.router.process().ended().is_none(), "the router ended");
    let log = std::fs::read_to_string(scene.router.process().log())?;
    ensure!(!log.contains("panicked"), "{log}");
    let failed = load.writers.record().failures - failures;
    ensure!(failed == 0, "{failed} statements of others failed");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_on_the_read_only_port_can_be_cancelled() -> Result<()> {
    let mut scene = Scene::start("cancel", 3).await?;
    scene.cluster.settled(LIMIT).await?;
    for target in [scene.read_only(), scene.read_write()] {
        // Several at once: with two standbys a request that reaches only one of them would miss some.
        for _ in 0..6 {
            let client = target.connect(LIMIT).await?;
            let token = client.cancel_token();
            let asleep = async { client.batch_execute("SELECT pg_sleep(60)").await };
            let cancelled = tokio::time::timeout(LIMIT, async {
                tokio::pin!(asleep);
                loop {
                    // The request may overtake the query it is meant for, so it is repeated.
                    tokio::select! {
                        answer = &mut asleep => return answer,
                        () = tokio::time::sleep(Duration::from_millis(100)) => {}
                    }
                    let _ = token.cancel_query(NoTls).await;
                }
            });
            let error = cancelled.await?.err().context("it slept to its end")?;
            ensure!(error.code() == Some(&SqlState::QUERY_CANCELED), "{error:?}");
        }
    }
    let metrics = rest::get(scene.router.ports().admin, "/metrics").await?.body;
    let tried = metrics.as_str().is_none_or(|text| text.contains("result=\"forwarded\""));
    ensure!(!tried, "the keys were not learnt: {metrics}");
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_standby_readers_wait_and_a_lost_router_comes_back() -> Result<()> {
    let mut scene = Scene::start("readers", 2).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let standby = 1 - leader;
    let who: Target = scene.read_only();
    let port_sql = "SELECT inet_server_port()";
    let port = scene.cluster.nodes[standby].port().to_string();
    ensure!(who.query_one(port_sql, LIMIT).await? == port);

    scene.cluster.nodes[standby].kill();
    let reader = who.clone();
    let waiting = tokio::spawn(async move { reader.query_one(port_sql, LIMIT).await });
    scene.cluster.nodes[standby].start()?;
    ensure!(waiting.await?? == port, "the reader was sent elsewhere");

    scene.router.restart().await?;
    let primary = scene.cluster.nodes[leader].port().to_string();
    ensure!(scene.read_write().query_one(port_sql, LIMIT).await? == primary);
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_silent_clients_harms_nobody_who_is_there_and_passes() -> Result<()> {
    let lab = Lab::new("flood")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), Spec::new(1, &Program::agent()?)).await?;
    cluster.settled(LIMIT).await?;
    // So few file descriptors that the flood takes the last one.
    let mut program = Program::new("/usr/bin/prlimit");
    program.args = vec!["--nofile=100".into(), lab.reachable(&Program::router()?.path)?.into_os_string()];
    let extra = json!({ "limits": { "startup_timeout": 2 }, "threads": 2 });
    let ports = proxy::Ports::any(&lab)?;
    let router = Proxy::router(&lab, program, ports, &cluster.spec().scope, &etcd.endpoints(), &extra).await?;
    let target = router.read_write(&cluster.spec().password);
    let session = target.connect(LIMIT).await?;

    let flood: Vec<TcpStream> =
        (0..150).map(|_| TcpStream::connect(("127.0.0.1", ports.read_write))).collect::<std::io::Result<_>>()?;
    let log = router.log().to_owned();
    let full = wait::until("the file descriptors to be used up", LIMIT, async || {
        ensure!(std::fs::read_to_string(&log)?.contains("Too many open files"));
        Ok(())
    });
    full.await?;
    let answer = session.query_one("SELECT 42", &[]).await?;
    ensure!(answer.get::<_, i32>(0) == 42, "whoever is there is served");
    // Each of them is sent away in its time, so that a new one gets its turn while the flood is still there.
    ensure!(target.query_one("SELECT 'served'", LIMIT).await? == "served");
    ensure!(session.query_one("SELECT 1", &[]).await?.get::<_, i32>(0) == 1);
    drop(flood);
    lab.success();
    Ok(())
}

/// The file descriptors of a process.
fn descriptors(pid: rustix::process::Pid) -> Result<BTreeSet<u64>> {
    let open = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero()))?;
    open.map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_when_there_is_no_descriptor_for_a_server_is_held_and_then_served() -> Result<()> {
    let lab = Lab::new("no-descriptor")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), Spec::new(1, &Program::agent()?)).await?;
    cluster.settled(LIMIT).await?;
    let ports = proxy::Ports::any(&lab)?;
    let extra =
        json!({ "limits": { "hold_timeout": 60, "startup_timeout": 60 }, "threads": 1, "log": { "level": "DEBUG" } });
    let mut router =
        Proxy::router(&lab, Program::router()?, ports, &cluster.spec().scope, &etcd.endpoints(), &extra).await?;
    ensure!(router.read_write(&cluster.spec().password).query_one("SELECT 1", LIMIT).await? == "1");

    // It is there, and has not said what it wants.
    let pid = router.process().pid();
    let connections = async |count: usize| {
        wait::until("the router to have only so many connections", LIMIT, async || {
            let routes = rest::get(ports.admin, "/routes").await?.body;
            ensure!(routes["connections"] == count, "{routes}");
            Ok(())
        })
        .await
    };
    connections(0).await?;
    let mut client = TcpStream::connect(("127.0.0.1", ports.read_write))?;
    connections(1).await?;
    // Whoever has asked for that is gone.
    let open = wait::until("nothing to be opened or closed", LIMIT, async || {
        let open = descriptors(pid)?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        ensure!(descriptors(pid)? == open);
        Ok(open)
    })
    .await?;
    let free = (0..).find(|number| !open.contains(number)).context("none is free")?;
    // As the router's user.
    let limit = |descriptors: u64| {
        let mut command = lab.command(&Program::new("/usr/bin/prlimit"), lab.dir())?;
        command.arg(format!("--pid={}", pid.as_raw_nonzero())).arg(format!("--nofile={descriptors}:"));
        ensure!(command.status()?.success());
        Ok(())
    };
    limit(free)?;
    client.write_all(b"\0\0\0\x17\0\x03\0\0user\0postgres\0\0")?;
    let log = router.log().to_owned();
    wait::until("a server not to be connected to", LIMIT, async || {
        let log = std::fs::read_to_string(&log)?;
        ensure!(log.lines().any(|line| line.contains("connect failed") && line.contains("Too many open files")));
        Ok(())
    })
    .await?;
    limit(free + 100)?;
    client.set_read_timeout(Some(LIMIT))?;
    let mut answer = [0];
    client.read_exact(&mut answer)?;
    ensure!(answer == *b"R", "{answer:?}");
    let metrics = rest::get(ports.admin, "/metrics").await?.body;
    let held = "trunkline_router_hold_seconds_count{outcome=\"served\"";
    ensure!(metrics.as_str().is_some_and(|text| text.contains(held)), "{metrics}");
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_keeps_a_new_client_no_longer_than_it_may_be_held() -> Result<()> {
    let lab = Lab::new("frozen-server")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), Spec::new(1, &Program::agent()?)).await?;
    cluster.settled(LIMIT).await?;
    let ports = proxy::Ports::any(&lab)?;
    let extra = json!({ "limits": { "hold_timeout": 2, "connect_timeout": 0.5 } });
    let router =
        Proxy::router(&lab, Program::router()?, ports, &cluster.spec().scope, &etcd.endpoints(), &extra).await?;
    let target = router.read_write(&cluster.spec().password);
    ensure!(target.query_one("SELECT 1", LIMIT).await? == "1");

    // The kernel goes on to accept for it, and it leads until the end of its lease.
    cluster.nodes[0].freeze();
    let began = SystemClock.now();
    let client = tokio::spawn(async move { target.connect(LIMIT).await });
    let held = wait::until("the client to be held", LIMIT, async || {
        let routes = rest::get(ports.admin, "/routes").await?.body;
        ensure!(routes["held"] == 1, "{routes}");
        Ok(())
    });
    let held = held.await;
    let answer = client.await?;
    let took = SystemClock.now().since(began);
    cluster.nodes[0].thaw();
    held?;
    let error = answer.err().context("a frozen server let somebody in")?;
    ensure!(format!("{error:#}").contains("no server is available"), "{error:#}");
    println!("a frozen server kept a new client for {took:?}");
    ensure!(took < Duration::from_secs(4), "{took:?}");
    lab.success();
    Ok(())
}

/// The names in an expression of PromQL that begin as our metrics do.
fn metrics_of(expression: &str) -> Vec<&str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    words.filter(|word| word.starts_with("patroni_") || word.starts_with("trunkline_")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_of_the_alert_rules_is_there() -> Result<()> {
    let rules = trunkline_config::yaml::from_str(include_str!("../../../docs/alerts.yml"))?;
    let groups = rules["groups"].as_array().context("no groups")?;
    let mut expressions = Vec::new();
    for rule in groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten()) {
        let (name, expression) = (rule["alert"].as_str().context("no name")?, rule["expr"].as_str());
        let expression = expression.with_context(|| format!("{name} has no expression"))?;
        let told = rule["annotations"]["summary"].is_string() && rule["labels"]["severity"].is_string();
        ensure!(told && !metrics_of(expression).is_empty(), "{name}: {rule}");
        expressions.push((name, expression));
    }
    ensure!(expressions.len() > 30, "{} rules", expressions.len());

    // What there is of a metric with labels is there once it has counted something.
    let lab = Lab::new("alerts")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), Spec::new(2, &Program::agent()?))?;
    let ports = proxy::Ports::any(&lab)?;
    let listen = |port: u16| format!("127.0.0.1:{port}");
    let extra = json!({ "ports": [
        { "name": "rw", "listen": listen(ports.read_write), "target": "leader", "hold_timeout": 60, "max_sessions": 100 },
        { "name": "ro", "listen": listen(ports.read_only), "target": "replica" },
    ]});
    let router =
        Proxy::router(&lab, Program::router()?, ports, &cluster.spec().scope, &etcd.endpoints(), &extra).await?;
    let target = router.read_write(&cluster.spec().password);
    let held = tokio::spawn(async move { target.query_one("SELECT 'served'", LIMIT).await });
    cluster.nodes.iter_mut().try_for_each(|node| node.start())?;
    ensure!(held.await?? == "served");
    cluster.settled(LIMIT).await?;
    let all_there = wait::until("all metrics", LIMIT, async || {
        let mut there = rest::get(ports.admin, "/metrics").await?.body.as_str().context("no text")?.to_owned();
        for node in &cluster.nodes {
            there += rest::get(node.rest_port(), "/metrics").await?.body.as_str().context("no text")?;
        }
        let names: Vec<&str> = there.split(['\n', '{', ' ']).collect();
        for (alert, expression) in &expressions {
            for metric in metrics_of(expression) {
                ensure!(names.contains(&metric), "{alert}: there is no {metric}");
            }
        }
        Ok(())
    });
    all_there.await?;
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_to_end_it_waits_for_sessions_and_no_longer_than_it_may() -> Result<()> {
    let lab = Lab::new("drain")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), Spec::new(1, &Program::agent()?)).await?;
    cluster.settled(LIMIT).await?;
    for (drain_timeout, leaves) in [(60, true), (2, false)] {
        let extra = json!({ "limits": { "drain_timeout": drain_timeout } });
        let (scope, ports) = (&cluster.spec().scope, proxy::Ports::any(&lab)?);
        let mut router = Proxy::router(&lab, Program::router()?, ports, scope, &etcd.endpoints(), &extra).await?;
        let target = router.read_write(&cluster.spec().password);
        let session = target.connect(LIMIT).await?;
        session.batch_execute("BEGIN").await?;
        let told = SystemClock.now();
        router.process().signal(Signal::TERM);
        wait::until("new connections to be refused", LIMIT, async || {
            ensure!(TcpStream::connect(("127.0.0.1", ports.read_write)).is_err());
            Ok(())
        })
        .await?;
        let ready = rest::get(ports.admin, "/ready").await?;
        ensure!(ready.status == 503 && ready.body["draining"] == true, "{}", ready.body);
        session.batch_execute("SELECT 1").await?;
        ensure!(router.process().ended().is_none(), "its session goes on");
        if leaves {
            session.batch_execute("COMMIT").await?;
            drop(session);
        }
        let ended = wait::until("the router to end", LIMIT, async || router.process().ended().context("it is there"));
        ensure!(ended.await?.success());
        let took = SystemClock.now().since(told);
        println!("told to end with a session and {drain_timeout} s for it, the router took {took:?}");
        ensure!(took < Duration::from_secs(10) && (leaves || took >= Duration::from_secs(2)), "{took:?}");
    }
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn router_top_shows_ports_sessions_and_rates_and_who_does_not_answer() -> Result<()> {
    let mut scene = Scene::start("top", 2).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let names: Vec<&str> = scene.cluster.nodes.iter().map(|node| node.name()).collect();
    create_table(&scene.read_write()).await?;
    let _session = scene.read_write().connect(LIMIT).await?;
    let writers = Writers::start(&scene.read_write(), 1, 1, Duration::from_millis(5));
    writers.progress(1, LIMIT).await?;

    let nobody = format!("127.0.0.1:{}", scene.lab.port()?);
    let admin = format!("127.0.0.1:{}", scene.router.ports().admin);
    let program = Program::agent()?.path.with_file_name("trunklinectl");
    let mut top = tokio::process::Command::new(program);
    top.args(["router", "top", &admin, &nobody, "--count", "2", "--watch", "0.5"]).kill_on_drop(true);
    let output = tokio::time::timeout(LIMIT, top.output()).await??;
    let shown = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{shown}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(shown.matches(&format!("Router {nobody} does not answer")).count() == 2, "{shown}");
    ensure!(shown.matches(&format!("Router {admin}: leader {}, confirmed", names[leader])).count() == 2, "{shown}");
    let rows: Vec<Vec<&str>> = shown.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
    let of = |port: &str| rows.iter().filter(|row| row.get(1) == Some(&port)).cloned().collect::<Vec<_>>();
    let [first, second] = &of("read-write")[..] else { anyhow::bail!("{shown}") };
    // Connections, sessions, servers; rates are there from the second look on.
    ensure!(first[2..6] == ["leader", "2", "2", names[leader]] && first[8] == "-", "{shown}");
    ensure!(second[8].ends_with('B') && !second[8].starts_with("0 "), "{shown}");
    ensure!(of("read-only")[0][2..6] == ["replica", "0", "0", names[1 - leader]], "{shown}");
    drop(writers);
    scene.lab.success();
    Ok(())
}
