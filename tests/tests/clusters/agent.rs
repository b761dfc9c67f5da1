//! The agent dies or is replaced while PostgreSQL goes on.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::dcs::{Dcs, Op, Txn};
use trunkline_common::{LeaseId, SystemClock};
use trunkline_config::local as config;
use trunkline_tests::workload::{self, Writers};
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Scene, Spec, certificate, namespace, rest, wait};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_agent_takes_over_a_running_postgresql() -> Result<()> {
    let mut scene = Scene::start("takeover", 2).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let failures = load.writers.record().failures;

    for node in [leader, 1 - leader] {
        let before = scene.cluster.nodes[node].postmaster()?;
        scene.cluster.nodes[node].kill_agent();
        ensure!(scene.cluster.nodes[node].postmaster()? == before, "PostgreSQL ended with its agent");
        scene.cluster.nodes[node].start()?;
        let path = if node == leader { "/primary" } else { "/replica" };
        let up = wait::until("the new agent to know its role", LIMIT, async || {
            let status = scene.cluster.nodes[node].health(path).await;
            ensure!(status == Some(200), "GET {path} is {status:?}");
            Ok(())
        });
        up.await?;
        ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
        ensure!(scene.cluster.nodes[node].postmaster()? == before, "PostgreSQL was restarted");
    }
    load.writers.progress(100, LIMIT).await?;
    let failed = load.writers.record().failures - failures;
    ensure!(failed == 0, "{failed} statements failed");
    scene.finish(load).await?;
    Ok(())
}

/// To an agent that is started while the `config` key is no use, or a setting mistyped, nothing else has been in force before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_agent_goes_by_the_settings_that_were_in_force() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": true, "maximum_lag_on_failover": 4_194_304 });
    let mut scene = Scene::with("settings-kept", 1, spec).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let etcd = config::Etcd {
        endpoints: scene.etcd.endpoints().iter().map(|endpoint| format!("http://{endpoint}")).collect(),
        ..config::Etcd::default()
    };
    let client = EtcdDcs::connect(&etcd, SystemClock, LIMIT).await?;
    let scope = scene.cluster.spec().scope.clone();
    let key = |name: &str| format!("/service/{scope}/{name}");
    let value = async |name: &str| -> Result<Value> {
        let read = client.read(&key(name)).await?;
        Ok(serde_json::from_slice(&read.entries.first().context("no such key")?.value)?)
    };
    let good = value("config").await?;
    let mut mistyped = good.clone();
    mistyped["synchronous_mode"] = json!("onn");
    mistyped["maximum_lag_on_failover"] = json!(2_097_152);
    for (what, bad, lag) in [("mistyped", mistyped.to_string(), 2_097_152), ("malformed", "{".to_owned(), 4_194_304)] {
        let put = |text: &str| Txn { then: vec![Op::Put(key("config"), text.into(), LeaseId(0))], ..Txn::default() };
        scene.cluster.nodes[leader].kill_agent();
        client.txn(put(&bad)).await?;
        scene.cluster.nodes[leader].start()?;
        let port = scene.cluster.nodes[leader].rest_port();
        wait::until("the new agent to lead", LIMIT, async || {
            ensure!(scene.cluster.nodes[leader].health("/primary").await == Some(200));
            let told = rest::get(port, "/explain?key=maximum_lag_on_failover").await?.body.to_string();
            ensure!(told.contains(&lag.to_string()), "{told}");
            Ok(())
        })
        .await?;
        // Writes go on, and the standby confirms them: the key is not touched in any turn.
        for _ in 0..3 {
            scene.node(leader).query_one("SELECT pg_switch_wal()", LIMIT).await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
            let sync = value("sync").await?;
            ensure!(sync["sync_standby"] == scene.cluster.nodes[1 - leader].name(), "{what}: {sync}");
        }
        let names = scene.node(leader).query_one("SHOW synchronous_standby_names", LIMIT).await?;
        ensure!(!names.is_empty(), "{what}: commits wait for nobody");
        client.txn(put(&good.to_string())).await?;
        ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
        // Kept again, for the next one.
        let kept = scene.cluster.nodes[leader].data_dir().join("patroni.dynamic.json");
        wait::until("the copy to be as it was", LIMIT, async || {
            let kept: Value = serde_json::from_slice(&std::fs::read(&kept)?)?;
            ensure!(kept == good, "{kept}");
            Ok(())
        })
        .await?;
    }
    scene.lab.success();
    Ok(())
}

/// Nobody renews the lease any more, so another node takes over although PostgreSQL is well; the old one, which knows
/// nothing of it, must not get a write acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_agent_is_failed_over_and_its_postgresql_taken_back() -> Result<()> {
    let mut scene = Scene::start("orphan", 3).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    scene.cluster.nodes[leader].kill_agent();
    let new = scene.cluster.leader_other_than(leader, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.cluster.nodes[leader].start()?;
    ensure!(scene.cluster.settled(LIMIT).await? == new, "leadership moved");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_finds_data_of_another_cluster_stops_its_primary_and_ends() -> Result<()> {
    let mut scene = Scene::start("foreign", 1).await?;
    let node = scene.cluster.settled(LIMIT).await?;
    scene.cluster.nodes[node].kill_agent();
    // initialize = 7000000000000000001, by etcd's JSON gateway.
    let endpoint = scene.etcd.endpoints().swap_remove(0);
    let port: u16 = endpoint.rsplit_once(':').context("a port")?.1.parse()?;
    let put = json!({ "key": "L3NlcnZpY2UvZGVtby9pbml0aWFsaXpl", "value": "NzAwMDAwMDAwMDAwMDAwMDAwMQ==" });
    let answer = rest::post(port, "/v3/kv/put", &put, LIMIT).await?;
    ensure!(answer.status == 200, "{}", answer.body);

    scene.cluster.nodes[node].start()?;
    let ended = wait::until("the agent to end", LIMIT, async || {
        ensure!(!scene.cluster.nodes[node].is_running(), "it still runs");
        Ok(())
    });
    ended.await?;
    ensure!(scene.cluster.nodes[node].postmaster().is_err(), "its primary goes on without it");
    scene.lab.success();
    Ok(())
}

/// What docs/migration.md says of a server that nobody has managed so far.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_of_its_own_becomes_a_cluster_without_a_failed_write() -> Result<()> {
    let lab = Lab::new("stand-alone")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(2, &Program::agent()?);
    // Its own access rules and parameters stay in force.
    spec.local = json!({ "postgresql": { "pg_hba": null, "parameters": null } });
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    let node = &cluster.nodes[0];
    let (data, port) = (node.data_dir(), node.port());
    let run = |tool: &str, arguments: &[&str]| -> Result<()> {
        let program = Program::new(lab.tools().postgres_bin.join(tool));
        let mut command = lab.command(&program, node.dir())?;
        command.arg("-D").arg(&data).args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        ensure!(command.status()?.success(), "{tool} failed");
        Ok(())
    };
    run("initdb", &["-U", "postgres", "-A", "trust", "--no-sync"])?;
    let mut own = std::fs::OpenOptions::new().append(true).open(data.join("postgresql.conf"))?;
    let sockets = node.dir().display();
    writeln!(own, "port = {port}\nunix_socket_directories = '{sockets}'\nwork_mem = '7MB'\nmax_wal_senders = 10")?;
    run("pg_ctl", &["start", "-w", "-s", "-l", "server.log"])?;
    let postmaster = node.postmaster()?;
    let targets = cluster.targets();
    let server = &targets[0];
    let password = &cluster.spec().password;
    for user in ["replicator REPLICATION", "rewind_user SUPERUSER"] {
        server.execute(&format!("CREATE USER {user} PASSWORD '{password}'"), LIMIT).await?;
    }
    workload::create_table(server).await?;
    let writers = Writers::start(server, 0, 2, Duration::from_millis(10));
    writers.progress(20, LIMIT).await?;

    cluster.nodes[0].start()?;
    wait::until("the agent to lead", LIMIT, async || {
        let status = cluster.nodes[0].health("/primary").await;
        ensure!(status == Some(200), "GET /primary is {status:?}");
        Ok(())
    })
    .await?;
    writers.progress(100, LIMIT).await?;
    cluster.nodes[1].start()?;
    ensure!(cluster.settled(LIMIT).await? == 0, "the copy leads");
    writers.progress(100, LIMIT).await?;
    let record = writers.stop().await;
    ensure!(record.failures == 0, "{} statements failed", record.failures);
    ensure!(cluster.nodes[0].postmaster()? == postmaster, "PostgreSQL was restarted");
    wait::until("all rows on the copy", LIMIT, async || {
        let missing = record.missing(&targets[1]).await?;
        ensure!(missing.is_empty(), "{} rows are missing", missing.len());
        Ok(())
    })
    .await?;

    // /service/demo/initialize, by etcd's JSON gateway.
    let endpoint = etcd.endpoints().swap_remove(0);
    let etcd: u16 = endpoint.rsplit_once(':').context("a port")?.1.parse()?;
    let found = rest::post(etcd, "/v3/kv/range", &json!({ "key": "L3NlcnZpY2UvZGVtby9pbml0aWFsaXpl" }), LIMIT).await?;
    let system = "SELECT encode(system_identifier::text::bytea, 'base64') FROM pg_control_system()";
    ensure!(found.body["kvs"][0]["value"] == server.query_one(system, LIMIT).await?, "initialize is {found:?}");

    // Its own settings are in a file of their own, and survive a restart by the agent.
    let base = std::fs::read_to_string(data.join("postgresql.base.conf"))?;
    ensure!(base.contains("work_mem = '7MB'"), "postgresql.base.conf has not its settings");
    let answer = rest::post(cluster.nodes[0].rest_port(), "/restart", &json!({}), LIMIT).await?;
    ensure!(answer.status == 200, "{answer:?}");
    for target in &targets {
        let work_mem = target.query_one("SHOW work_mem", LIMIT).await?;
        ensure!(work_mem == "7MB", "work_mem is {work_mem} at port {}", target.port());
    }
    ensure!(cluster.settled(LIMIT).await? == 0, "leadership moved");
    lab.success();
    Ok(())
}

/// A session that is not ended in order says so in the log, in the middle of which PostgreSQL must not be stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_the_agent_end_in_order() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs["postgresql"]["parameters"] = json!({ "log_min_messages": "debug1" });
    let mut scene = Scene::with("parting", 1, spec).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    // The kept session is opened anew, members ask each other, and servers are stopped and started.
    scene.cluster.switchover(leader, Some(1 - leader)).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == 1 - leader, "{leader} still leads");
    let restarted = rest::post(scene.cluster.nodes[leader].rest_port(), "/restart", &json!({}), LIMIT).await?;
    ensure!(restarted.status == 200, "{restarted:?}");
    for node in &scene.cluster.nodes {
        let log = node.says("DEBUG:", LIMIT).await?;
        let cut_off = log.lines().find(|line| line.contains("unexpected EOF on client connection"));
        ensure!(cut_off.is_none(), "{cut_off:?}");
    }
    scene.lab.success();
    Ok(())
}

/// `sslrootcert: system`, where the machine's list of authorities is the cluster's own certificate, and where it is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_trusted_where_the_system_trusts_it() -> Result<()> {
    /// Where Debian has that list.
    const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
    if !rustix::process::geteuid().is_root() || !Path::new(AUTHORITIES).exists() {
        println!("SKIPPED: it takes root and {AUTHORITIES}");
        return Ok(());
    }
    if !namespace::inside("--mount", "agent::a_server_is_trusted_where_the_system_trusts_it")? {
        return Ok(());
    }
    let lab = Lab::new("system-trust")?;
    let (certificate, key) = certificate::own(&lab)?;
    let list = |command: &mut Command| -> Result<()> {
        ensure!(command.arg(AUTHORITIES).status()?.success(), "{command:?}");
        Ok(())
    };
    list(Command::new("mount").arg("--bind").arg(&certificate))?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(1, &Program::agent()?);
    spec.dcs = json!({});
    spec.local["postgresql"] = json!({
        "authentication": { "superuser": { "sslrootcert": "system" } },
        "parameters": { "ssl": "on", "ssl_cert_file": certificate, "ssl_key_file": key },
        "pg_hba": ["hostssl all all 127.0.0.1/32 scram-sha-256"],
    });
    // The agent gets in.
    let cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;

    let asked = || -> Result<String> {
        let mut command = Command::new(Program::agent()?.path.with_file_name("trunklinectl"));
        command.arg("-c").arg(cluster.nodes[0].config());
        command.args([
            "query",
            "-U",
            "postgres",
            "-d",
            "postgres",
            "-c",
            "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
        ]);
        command.env("PGSSLROOTCERT", "system").env("PGPASSWORD", &cluster.spec().password);
        Ok(String::from_utf8(command.output()?.stdout)?)
    };
    ensure!(asked()? == "ssl\nTrue\n", "{}", asked()?);
    list(&mut Command::new("umount"))?;
    let refused = asked()?;
    ensure!(refused.contains("invalid peer certificate"), "{refused}");
    lab.success();
    Ok(())
}
