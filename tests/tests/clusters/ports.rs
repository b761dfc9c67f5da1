//! What a router's port can be told, in front of a real cluster.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio_postgres::{Client, Config, NoTls};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Proxy, Scene, Spec, proxy, rest, wait};

/// Two nodes behind a router with these ports beside the usual ones.
async fn scene(name: &str, more: impl FnOnce(&Lab) -> Result<Vec<Value>>) -> Result<Scene> {
    let lab = Lab::new(name)?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), Spec::new(2, &Program::agent()?)).await?;
    cluster.settled(LIMIT).await?;
    let ports = proxy::Ports::any(&lab)?;
    let listen = |port: u16| format!("127.0.0.1:{port}");
    let mut list = vec![
        json!({"name": "rw", "listen": listen(ports.read_write), "target": "leader", "choice": true}),
        json!({"name": "ro", "listen": listen(ports.read_only), "target": "replica", "end_lag_time": 2}),
    ];
    list.extend(more(&lab)?);
    let (scope, extra) = (cluster.spec().scope.clone(), json!({"ports": list}));
    let router = Proxy::router(&lab, Program::router()?, ports, &scope, &etcd.endpoints(), &extra).await?;
    Ok(Scene { lab, etcd, cluster, router })
}

async fn connect(scene: &Scene, port: u16, options: &str) -> Result<Client> {
    let mut config = Config::new();
    config.host("127.0.0.1").port(port).user("postgres").password(&scene.cluster.spec().password).options(options);
    let (client, connection) = tokio::time::timeout(LIMIT, config.connect(NoTls)).await??;
    tokio::spawn(connection);
    Ok(client)
}

async fn is_standby(client: &Client) -> Result<bool> {
    Ok(client.query_one("SELECT pg_is_in_recovery()", &[]).await?.get(0))
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
    reader.execute("SELECT pg_wal_replay_pause()", &[]).await?;
    scene.node(leader).execute("CREATE TABLE not_seen_yet ()", LIMIT).await?;
    let ended = wait::until("the reader's session to end", Duration::from_secs(20), async || {
        ensure!(reader.is_closed() || reader.simple_query("SELECT 1").await.is_err(), "it goes on");
        Ok(())
    });
    ended.await?;
    let metrics = rest::get(admin, "/metrics").await?.body;
    let metrics = metrics.as_str().context("no text")?;
    ensure!(metrics.contains("ended_total{port=\"ro\",reason=\"lag\"} 1"), "{metrics}");
    scene.node(1 - leader).execute("SELECT pg_wal_replay_resume()", LIMIT).await?;
    scene.lab.success();
    Ok(())
}
