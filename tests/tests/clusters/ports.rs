//! What a router's port can be told, in front of a real cluster.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio_postgres::{Client, Config, NoTls};
use trunkline_tests::workload::Target;
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Proxy, Scene, Spec, certificate, proxy, rest, wait};

/// Two nodes behind a router with these ports beside the usual ones.
pub async fn scene(name: &str, more: impl FnOnce(&Lab) -> Result<Vec<Value>>) -> Result<Scene> {
    scene_with(Lab::new(name)?, Spec::new(2, &Program::agent()?), more).await
}

pub async fn scene_with(lab: Lab, spec: Spec, more: impl FnOnce(&Lab) -> Result<Vec<Value>>) -> Result<Scene> {
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;
    cluster.settled(LIMIT).await?;
    let ports = proxy::Ports::any(&lab)?;
    let listen = |port: u16| format!("127.0.0.1:{port}");
    let mut list = vec![
        json!({"name": "rw", "listen": listen(ports.read_write), "target": "leader", "choice": true, "log_sessions": true}),
        json!({"name": "ro", "listen": listen(ports.read_only), "target": "replica", "end_lag_time": 2}),
    ];
    list.extend(more(&lab)?);
    let (scope, extra) = (cluster.spec().scope.clone(), json!({"ports": list}));
    let router = Proxy::router(&lab, Program::router()?, ports, &scope, &etcd.endpoints(), &extra).await?;
    Ok(Scene { lab, etcd, cluster, router })
}

pub async fn connect(scene: &Scene, port: u16, options: &str) -> Result<Client> {
    let mut config = Config::new();
    config.host("127.0.0.1").port(port).user("postgres").password(&scene.cluster.spec().password).options(options);
    let (client, connection) = tokio::time::timeout(LIMIT, config.connect(NoTls)).await??;
    tokio::spawn(connection);
    Ok(client)
}

pub async fn is_standby(client: &Client) -> Result<bool> {
    Ok(client.query_one("SELECT pg_is_in_recovery()", &[]).await?.get(0))
}

/// Sessions of a port that ended for this reason, on whichever member.
fn ended_by(metrics: &str, port: &str, reason: &str) -> u64 {
    let labels = format!("port=\"{port}\",reason=\"{reason}\"}} ");
    let of_port = |line: &str| -> Option<u64> {
        line.strip_prefix("trunkline_router_ended_total{")?.split_once(&labels)?.1.parse().ok()
    };
    metrics.lines().filter_map(of_port).sum::<u64>()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_port_serves_writers_and_readers_and_tells_who_they_are() -> Result<()> {
    let socket = |lab: &Lab| anyhow::Ok(lab.make_dir("socket")?.join(".s.PGSQL.5000"));
    let local = |lab: &Lab| Ok(vec![json!({"name": "local", "listen": socket(lab)?, "target": "leader"})]);
    let scene = scene("choice", local).await?;
    let (port, admin) = (scene.router.ports().read_write, scene.router.ports().admin);
    ensure!(!is_standby(&connect(&scene, port, "").await?).await?);
    let reader = connect(&scene, port, "-c trunkline.target=replica").await?;
    ensure!(is_standby(&reader).await?);

    // What the server sees of it is what /sessions says.
    let seen: i32 = reader.query_one("SELECT inet_client_port()", &[]).await?.get(0);
    let sessions = rest::get(admin, "/sessions?port=rw").await?.body;
    let known = sessions["sessions"].as_array().context("no list")?;
    let own = format!("127.0.0.1:{seen}");
    ensure!(known.iter().any(|line| line["seen_by_server_as"] == own.as_str()), "{own} is not in {sessions}");

    // And so does the log, at the beginning and at the end.
    let told = |what: &str| {
        let log = std::fs::read_to_string(scene.router.log())?;
        let line = log.lines().find(|line| line.contains(what) && line.contains(&own) && line.contains("INFO"));
        line.map(str::to_owned).with_context(|| format!("no {what} of {own} in {log}"))
    };
    let at: i32 = reader.query_one("SELECT inet_server_port()", &[]).await?.get(0);
    let replica = scene.cluster.nodes.iter().find(|node| i32::from(node.port()) == at).context("whose is it?")?;
    let line = wait::until("the beginning in the log", LIMIT, async || told("session begins")).await?;
    ensure!(line.contains(replica.name()), "{line}");
    drop(reader);
    let line = wait::until("the end in the log", LIMIT, async || told("session ended")).await?;
    ensure!(line.contains("reason=client") && line.contains(&replica.port().to_string()), "{line}");

    let why = rest::get(admin, "/why?port=rw").await?.body;
    let verdicts: Vec<_> = why["why"].as_array().context("no list")?.iter().map(|line| &line["why"]).collect();
    ensure!(verdicts.contains(&&json!("candidate")), "{why}");
    ensure!(verdicts.contains(&&json!("not what target leader means")), "{why}");

    let mut config = Config::new();
    let socket = socket(&scene.lab)?;
    config
        .host_path(socket.parent().context("no directory")?)
        .port(5000)
        .user("postgres")
        .password(&scene.cluster.spec().password);
    let (local, connection) = tokio::time::timeout(LIMIT, config.connect(NoTls)).await??;
    tokio::spawn(connection);
    ensure!(!is_standby(&local).await?);
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_leave_a_standby_that_stops_replaying() -> Result<()> {
    let mut scene = scene("replay", |_| Ok(Vec::new())).await?;
    let leader = scene.cluster.leader(LIMIT).await?;
    let (port, admin) = (scene.router.ports().read_only, scene.router.ports().admin);
    let reader = connect(&scene, port, "").await?;
    ensure!(is_standby(&reader).await?);
    // Replay that is paused by hand is resumed, except in a pause of the cluster.
    scene.cluster.patch_config(&json!({ "pause": true })).await?;
    let paused = wait::until("the standby to hear of the pause", LIMIT, async || {
        let status = scene.cluster.nodes[1 - leader].status().await?;
        ensure!(status["pause"] == true, "{status}");
        Ok(())
    });
    paused.await?;
    reader.execute("SELECT pg_wal_replay_pause()", &[]).await?;
    scene.node(leader).execute("CREATE TABLE not_seen_yet ()", LIMIT).await?;
    let ended = wait::until("the reader's session to end", Duration::from_secs(20), async || {
        ensure!(reader.is_closed() || reader.simple_query("SELECT 1").await.is_err(), "it goes on");
        Ok(())
    });
    ended.await?;
    let metrics = rest::get(admin, "/metrics").await?.body;
    let metrics = metrics.as_str().context("no text")?;
    ensure!(ended_by(metrics, "ro", "lag") == 1, "{metrics}");
    scene.node(1 - leader).execute("SELECT pg_wal_replay_resume()", LIMIT).await?;
    scene.lab.success();
    Ok(())
}

/// Its connections look healthy: the kernel answers for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_leave_a_standby_that_is_frozen_where_the_port_says_so() -> Result<()> {
    let listen = std::cell::Cell::new(0);
    let more = |lab: &Lab| {
        listen.set(lab.port()?);
        let address = format!("127.0.0.1:{}", listen.get());
        Ok(vec![json!({"name": "impatient", "listen": address, "target": "replica", "end_down_time": 1})])
    };
    let mut scene = scene("frozen-standby", more).await?;
    let standby = 1 - scene.cluster.leader(LIMIT).await?;
    let reader = connect(&scene, listen.get(), "").await?;
    ensure!(is_standby(&reader).await?);
    scene.cluster.nodes[standby].freeze();
    let ended = wait::until("the reader's session to end", LIMIT, async || {
        ensure!(reader.is_closed(), "it goes on");
        Ok(())
    });
    let ended = ended.await;
    scene.cluster.nodes[standby].thaw();
    ended?;
    let metrics = rest::get(scene.router.ports().admin, "/metrics").await?.body;
    let metrics = metrics.as_str().context("no text")?;
    ensure!(ended_by(metrics, "impatient", "down") == 1, "{metrics}");
    scene.cluster.settled(LIMIT).await?;
    scene.lab.success();
    Ok(())
}

/// What psql says, with libpq's own TLS.
async fn psql(scene: &Scene, port: u16, options: &str) -> Result<String> {
    let program = trunkline_tests::tools::find_program("psql", "postgresql-client")?;
    let connection = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres connect_timeout=20 {options}");
    let mut command = tokio::process::Command::new(program);
    command.env("PGPASSWORD", &scene.cluster.spec().password);
    command.args(["-XAtc", "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()", &connection]);
    let output = tokio::time::timeout(LIMIT, command.output()).await??;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libpq_speaks_tls_through_the_router_and_with_it() -> Result<()> {
    let lab = Lab::new("tls")?;
    let (certificate, key) = certificate::own(&lab)?;
    let mut spec = Spec::new(2, &Program::agent()?);
    let ssl = json!({"ssl": "on", "ssl_cert_file": certificate, "ssl_key_file": key});
    spec.dcs["postgresql"] = json!({"parameters": ssl});
    let free = [lab.port()?, lab.port()?, lab.port()?];
    let [ends, begins, strict] = free;
    let more = |_: &Lab| {
        let port = |name: &str, port: u16, more: Value| {
            let mut map = json!({"name": name, "listen": format!("127.0.0.1:{port}"), "target": "leader"});
            if let (Some(map), Value::Object(more)) = (map.as_object_mut(), more) {
                map.extend(more);
            }
            map
        };
        let tls = json!({"certfile": certificate, "keyfile": key});
        let to_servers = json!({"mode": "verify-full", "cafile": certificate});
        Ok(vec![
            port("ends", ends, json!({"tls": tls})),
            port("begins", begins, json!({"tls": tls, "server_tls": to_servers})),
            port("strict", strict, json!({"require_tls": true})),
        ])
    };
    let scene = scene_with(lab.clone(), spec, more).await?;
    let verified = format!("sslmode=verify-full sslrootcert={}", certificate.display());
    for (port, options, encrypted_at_server) in [
        (scene.router.ports().read_write, "", "t"),
        (ends, "", "f"),
        (begins, "", "t"),
        // The same certificate on both sides, so that what binds the password to it fits.
        (begins, "channel_binding=require", "t"),
        (strict, "", "t"),
    ] {
        let answer = psql(&scene, port, &format!("{verified} {options}")).await?;
        ensure!(answer == encrypted_at_server, "port {port} {options}: {answer}");
    }
    ensure!(psql(&scene, begins, "sslmode=disable").await? == "t", "only the client's side is in plain text");
    let error = psql(&scene, strict, "sslmode=disable").await.err().context("plain text was accepted")?;
    ensure!(error.to_string().contains("without TLS are not accepted"), "{error}");
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_replaced_is_shown_without_a_restart() -> Result<()> {
    let lab = Lab::new("certificates")?;
    let (certificate, key) = certificate::own(&lab)?;
    let port = lab.port()?;
    let more = |_: &Lab| {
        let tls = json!({"certfile": certificate, "keyfile": key});
        Ok(vec![json!({"name": "tls", "listen": format!("127.0.0.1:{port}"), "target": "leader", "tls": tls})])
    };
    let scene = scene_with(lab.clone(), Spec::new(2, &Program::agent()?), more).await?;
    let old = lab.dir().join("old.pem");
    std::fs::copy(&certificate, &old)?;
    let trusting = |file: &std::path::Path| format!("sslmode=verify-full sslrootcert={}", file.display());
    psql(&scene, port, &trusting(&old)).await?;
    // In place, one file after the other.
    let (certificate, _) = certificate::own(&lab)?;
    let shown = wait::until("the new certificate to be shown", LIMIT, async || {
        psql(&scene, port, &trusting(&certificate)).await?;
        ensure!(psql(&scene, port, &trusting(&old)).await.is_err(), "the old one is");
        Ok(())
    });
    shown.await?;
    scene.lab.success();
    Ok(())
}

/// The state of the configuration, as the router tells it.
async fn configuration(admin: u16) -> Result<String> {
    let health = rest::get(admin, "/health").await?.body;
    Ok(health["configuration"].as_str().context("no word of it")?.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_is_in_force_and_a_wrong_one_is_not() -> Result<()> {
    let mut scene = scene("reload", |_| Ok(Vec::new())).await?;
    let ports = scene.router.ports();
    let client = connect(&scene, ports.read_write, "").await?;
    let file = scene.lab.dir().join("etc/router.yml");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
    let good = |config: &Value| scene.lab.write_config("router.yml", &config.to_string());

    // Found by itself: another port, and one that is gone.
    let new = scene.lab.port()?;
    let list = config["ports"].as_array_mut().context("no ports")?;
    list[1] = json!({"name": "new", "listen": format!("127.0.0.1:{new}"), "target": "any"});
    good(&config)?;
    let known = wait::until("the new port to serve", LIMIT, async || connect(&scene, new, "").await);
    known.await?;
    ensure!(std::net::TcpStream::connect(("127.0.0.1", ports.read_only)).is_err(), "the old port is still there");

    // Refused whole: the other half of it would have been good.
    let wrong = json!({"ports": [{"name": "new", "listen": "nowhere", "target": "any"}], "limits": {"max_held": 1}});
    scene.lab.write_config("router.yml", &wrong.to_string())?;
    let refused = wait::until("the file to be refused", LIMIT, async || {
        let now = configuration(ports.admin).await?;
        ensure!(now.starts_with("refused: ") && now.contains("ports[0].listen"), "{now}");
        Ok(())
    });
    refused.await?;
    connect(&scene, new, "").await?;

    config["limits"] = json!({"max_held": 77});
    good(&config)?;
    scene.router.process().signal(Signal::HUP);
    let in_force = wait::until("the limit to be in force", LIMIT, async || {
        let metrics = rest::get(ports.admin, "/metrics").await?.body;
        ensure!(metrics.as_str().is_some_and(|text| text.contains("limit{limit=\"max_held\"} 77")), "{metrics}");
        ensure!(configuration(ports.admin).await? == "in force");
        Ok(())
    });
    in_force.await?;

    // Its certificate is late.
    let (certificate, key) = certificate::own(&scene.lab)?;
    let late = [scene.lab.dir().join("late.pem"), scene.lab.dir().join("late.key")];
    config["ports"][1]["tls"] = json!({"certfile": late[0], "keyfile": late[1]});
    good(&config)?;
    let refused = wait::until("the file to be refused", LIMIT, async || {
        let now = configuration(ports.admin).await?;
        ensure!(now.starts_with("refused: ") && now.contains("late.pem"), "{now}");
        Ok(())
    });
    refused.await?;
    std::fs::rename(&key, &late[1])?;
    std::fs::rename(&certificate, &late[0])?;
    let in_force = wait::until("the port to speak TLS", LIMIT, async || {
        ensure!(configuration(ports.admin).await? == "in force");
        psql(&scene, new, &format!("sslmode=verify-full sslrootcert={}", late[0].display())).await
    });
    in_force.await?;
    ensure!(!is_standby(&client).await?, "the session from before all this");
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_that_hangs_does_not_keep_the_router_from_following() -> Result<()> {
    let mut scene = scene("hanging-file", |_| Ok(Vec::new())).await?;
    let target = Target::new(scene.router.ports().read_write, &scene.cluster.spec().password);
    ensure!(target.query_one("SELECT 1", LIMIT).await? == "1");
    // Who reads a pipe waits until somebody writes.
    let file = scene.lab.dir().join("etc/router.yml");
    let config = std::fs::read_to_string(&file)?;
    std::fs::remove_file(&file)?;
    let (mode, kind) = (rustix::fs::Mode::from_raw_mode(0o666), rustix::fs::FileType::Fifo);
    rustix::fs::mknodat(rustix::fs::CWD, &file, kind, mode, 0)?;
    rustix::fs::chmod(&file, mode)?;
    let writes = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let reading = wait::until("the router to read", LIMIT, async || {
        Ok(rustix::fs::open(&file, writes, rustix::fs::Mode::empty())?)
    });
    let writer = reading.await?;
    let leader = scene.cluster.leader(LIMIT).await?;
    scene.cluster.nodes[leader].kill();
    let other = scene.cluster.nodes[1 - leader].port().to_string();
    let served = wait::until("the new leader to serve", LIMIT, async || {
        let port = target.query_one("SELECT inet_server_port() WHERE NOT pg_is_in_recovery()", LIMIT).await?;
        ensure!(port == other, "{port}");
        Ok(())
    });
    served.await?;
    rustix::io::write(&writer, config.as_bytes())?;
    scene.lab.success();
    Ok(())
}
