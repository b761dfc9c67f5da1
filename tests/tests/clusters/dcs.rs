//! etcd is lost, or a part of it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::{Clock, Instant, LeaseId, SystemClock};
use trunkline_config::local as config;
use trunkline_tests::workload::Target;
use trunkline_tests::{Cluster, Etcd, Gate, LIMIT, Lab, Program, Proxy, Scene, Spec, Timing, proxy, rest, wait};

/// Waits until the server takes no writes any more. Returns how long after `fault` it was seen to take them, at least: who
/// asks late on a busy machine does not make it longer.
async fn open_for(target: &Target, fault: Instant) -> Result<Duration> {
    let mut open = Duration::ZERO;
    let closed = wait::until("the primary to step down", LIMIT, async || {
        let asked = SystemClock.now();
        let answer = target.query_one("SELECT pg_is_in_recovery()", Duration::from_secs(1)).await;
        if answer.is_ok_and(|standby| standby == "f") {
            open = asked.since(fault);
            bail!("it still takes writes");
        }
        Ok(())
    });
    closed.await?;
    Ok(open)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcd_the_primary_steps_down_before_its_lease_ends_and_returns_with_it() -> Result<()> {
    let mut scene = Scene::start("dcs-lost", 3).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;

    let lost = SystemClock.now();
    scene.etcd.kill(0);
    let target = scene.node(leader);
    let open = open_for(&target, lost).await?;
    let ttl = Duration::from_secs(scene.cluster.spec().timing.ttl.into());
    ensure!(open < ttl, "it was open for {open:?}, its lease may have ended before");
    let last = load.writers.record().writes.iter().map(|write| write.acked).max();
    ensure!(last.is_some_and(|last| last.since(lost) < ttl), "a write was acknowledged after the lease");

    scene.etcd.restart(0).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_etcd_members_may_hang_or_die() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    // etcd's disk may hang besides.
    spec.timing = Timing { ttl: 10, loop_wait: 1, retry_timeout: 1 };
    let mut scene = Scene::with("dcs-member", 3, spec).await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let failures = load.writers.record().failures;

    // Each in turn, so that etcd's own leader is among them. Not for longer than a lease: an etcd leader that thaws later
    // than that, not knowing yet that it is deposed, revokes every lease it has not seen renewed (seen with 3.4.23).
    for member in 0..3 {
        scene.etcd.freeze(member);
        tokio::time::sleep(Duration::from_millis(3500)).await;
        scene.etcd.thaw(member);
        load.writers.progress(100, LIMIT).await?;
    }
    scene.etcd.kill(1);
    tokio::time::sleep(Duration::from_secs(12)).await;
    scene.etcd.restart(1).await?;
    load.writers.progress(100, LIMIT).await?;

    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    let failed = load.writers.record().failures - failures;
    ensure!(failed == 0, "{failed} statements failed");
    scene.finish(load).await?;
    Ok(())
}

/// What the router's read-write port must never say, whatever happens to the nodes behind it.
const WRONG_NODE: &str = "read-only transaction";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_etcd_without_failsafe_mode_ends_with_it_and_nobody_is_led_to_a_standby() -> Result<()> {
    let mut scene = Scene::start("dcs-outage", 3).await?;
    let load = scene.load().await?;
    scene.cluster.settled(LIMIT).await?;

    scene.etcd.kill(0);
    let down = SystemClock.now();
    // Longer than a lease, with time to step down and to notice that etcd is gone.
    tokio::time::sleep(Duration::from_secs(9)).await;
    let back = SystemClock.now();
    scene.etcd.restart(0).await?;
    load.writers.progress(100, LIMIT).await?;
    let record = load.writers.record();
    ensure!(record.failed_with(WRONG_NODE) == 0, "a write was sent to a standby: {:?}", record.errors);
    let writes = record.recovered(down).context("no write after the outage")?;
    ensure!(writes.since(back) < Duration::from_secs(20), "writes came back {:?} after etcd", writes.since(back));
    scene.finish(load).await?;
    Ok(())
}

/// etcd begins anew, or with an old copy of its data, under agents and a router that go on: its revisions are lower than what
/// they have seen, whatever it says of leader and `sync` is of yesterday, and settings may be missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_is_restored_or_made_anew_gets_its_cluster_back() -> Result<()> {
    let mut scene = Scene::start("dcs-restored", 3).await?;
    let load = scene.load().await?;
    let first = scene.cluster.settled(LIMIT).await?;
    let backup = scene.etcd.copy_data(0)?;
    // It may have taken longer than a lease.
    if scene.cluster.settled(LIMIT).await? == first {
        scene.cluster.switchover(first, None).await?;
    }
    ensure!(scene.cluster.settled(LIMIT).await? != first, "the backup is to name another leader");
    load.writers.progress(100, LIMIT).await?;

    // Another leader's key, while the leader of now has time left on its lease.
    scene.etcd.restore(0, Some(&backup)).await?;
    load.writers.progress(100, LIMIT).await.context("after a restore within the lease")?;
    // The same when its lease is over, and then nothing at all: settings are then those that were known last.
    for copy in [Some(backup.as_path()), None] {
        let leader = scene.cluster.settled(LIMIT).await?;
        scene.cluster.patch_config(&json!({ "member_slots_ttl": "7min" })).await?;
        load.writers.progress(100, LIMIT).await?;
        let (target, lost) = (scene.node(leader), SystemClock.now());
        scene.etcd.kill(0);
        open_for(&target, lost).await?;
        scene.etcd.restore(0, copy).await?;
        load.writers.progress(100, LIMIT).await.with_context(|| format!("after a restore of {copy:?}"))?;
    }
    let leader = scene.cluster.settled(LIMIT).await?;
    let config = rest::get(scene.cluster.nodes[leader].rest_port(), "/config").await?.body;
    ensure!(config["synchronous_mode"] == true && config["member_slots_ttl"] == "7min", "settings were lost: {config}");
    let record = load.writers.record();
    ensure!(record.failed_with(WRONG_NODE) == 0, "a write was sent to a standby: {:?}", record.errors);
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_knows_one_member_of_etcd_goes_on_with_the_others() -> Result<()> {
    let lab = Lab::new("dcs-discovered")?;
    let mut etcd = Etcd::start(&lab, 3).await?;
    let cluster = Cluster::start(&lab, &etcd.endpoints()[..1], Spec::new(2, &Program::agent()?)).await?;
    let router = cluster.router().await?;
    let logs = cluster.nodes.iter().map(|node| lab.log(node.name())).chain([router.log().to_owned()]);
    for log in logs.collect::<Vec<_>>() {
        let found = wait::until("the others to be found", LIMIT, async || {
            ensure!(std::fs::read_to_string(&log)?.contains("beside those that are configured"), "{}", log.display());
            Ok(())
        });
        found.await?;
    }
    etcd.kill(0);
    let mut scene = Scene { lab, etcd, cluster, router };
    let load = scene.load().await?;
    // A lease that nobody renews would be over by then, and a router that hears nothing would ask the members.
    let leader = scene.cluster.settled(LIMIT).await?;
    let until = SystemClock.now() + Duration::from_secs((2 * scene.cluster.spec().timing.ttl).into());
    while SystemClock.now() < until {
        load.writers.progress(100, LIMIT).await?;
    }
    scene.cluster.switchover(leader, None).await?;
    ensure!(scene.cluster.settled(LIMIT).await? != leader, "it leads still");
    load.writers.progress(100, LIMIT).await?;
    let routes = rest::get(scene.router.ports().admin, "/health").await?.body;
    ensure!(routes["certainty"] == "confirmed", "{routes}");
    scene.finish(load).await?;
    Ok(())
}

/// Three nodes in failsafe mode.
fn failsafe_spec() -> Result<Spec> {
    let mut spec = Spec::new(3, &Program::agent()?);
    spec.dcs = json!({ "synchronous_mode": true, "primary_start_timeout": 0, "failsafe_mode": true });
    // Every member has to answer in time, on a machine that runs other tests as well.
    spec.timing = Timing { ttl: 10, loop_wait: 1, retry_timeout: 2 };
    Ok(spec)
}

/// A cluster of three in failsafe mode, all of them in the key.
async fn failsafe_scene(name: &str) -> Result<Scene> {
    listed(Scene::with(name, 1, failsafe_spec()?).await?).await
}

/// The same, each node with a way to etcd of its own.
async fn gated_failsafe_scene(name: &str) -> Result<(Scene, Vec<Gate>)> {
    let (scene, gates) = gated_scene(name, failsafe_spec()?).await?;
    Ok((listed(scene).await?, gates))
}

/// The cluster of `spec`, each node with a way to etcd of its own.
async fn gated_scene(name: &str, spec: Spec) -> Result<(Scene, Vec<Gate>)> {
    let lab = Lab::new(name)?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    let mut gates = Vec::new();
    for node in &mut cluster.nodes {
        let gate = Gate::before(&etcd.endpoints()[0]).await?;
        let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
        config["etcd3"]["hosts"] = json!([gate.address()]);
        node.configure(&config.to_string())?;
        node.start()?;
        gates.push(gate);
    }
    cluster.settled(LIMIT).await?;
    let router = cluster.router().await?;
    Ok((Scene { lab, etcd, cluster, router }, gates))
}

/// Waits until the `failsafe` key names all three.
async fn listed(mut scene: Scene) -> Result<Scene> {
    let leader = scene.cluster.settled(LIMIT).await?;
    let port = scene.cluster.nodes[leader].rest_port();
    let listed = wait::until("everybody in the failsafe key", LIMIT, async || {
        let answer = rest::get(port, "/failsafe").await?;
        ensure!(answer.body.as_object().is_some_and(|members| members.len() == 3), "{}", answer.body);
        Ok(())
    });
    listed.await?;
    Ok(scene)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_failsafe_mode_writes_go_on_without_etcd_until_a_member_is_missing() -> Result<()> {
    let mut scene = failsafe_scene("failsafe").await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let failures = load.writers.record().failures;

    let lost = SystemClock.now();
    scene.etcd.kill(0);
    let ttl = Duration::from_secs(scene.cluster.spec().timing.ttl.into());
    while SystemClock.now().since(lost) < ttl * 5 / 2 {
        load.writers.progress(20, LIMIT).await?;
        let answer = scene.cluster.nodes[leader].health("/primary").await;
        ensure!(answer == Some(200), "the primary does not say that it leads: {answer:?}");
    }
    let newcomer = scene.read_write().query_one("SELECT 1", Duration::from_secs(10)).await;
    ensure!(newcomer.is_ok(), "a new session is not let in: {newcomer:?}");
    let status = scene.cluster.nodes[leader].status().await?;
    ensure!(status["failsafe_mode_is_active"] == true, "not said in the status: {status}");
    let record = load.writers.record();
    ensure!(record.failures == failures, "statements failed: {:?}", record.last_error);

    // One member less: its word is missing, and without it nobody knows that it does not lead.
    let missing = (leader + 1) % 3;
    let gone = SystemClock.now();
    scene.cluster.nodes[missing].kill();
    let target = scene.node(leader);
    let open = open_for(&target, gone).await?;
    ensure!(open < ttl + Duration::from_secs(2), "it was open for {open:?}");

    scene.cluster.nodes[missing].start()?;
    scene.etcd.restart(0).await?;
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_failsafe_mode_members_are_asked_with_the_password_of_the_last_reload() -> Result<()> {
    let mut spec = failsafe_spec()?;
    let authentication = |password: &str| json!({ "username": "admin", "password": password });
    spec.local = json!({ "restapi": { "authentication": authentication("first") } });
    let mut scene = listed(Scene::with("failsafe-password", 1, spec).await?).await?;
    for node in &mut scene.cluster.nodes {
        let mut config: Value = serde_json::from_slice(&std::fs::read(node.config())?)?;
        config["restapi"]["authentication"] = authentication("second");
        node.configure(&config.to_string())?;
        node.agent().context("no agent")?.signal(Signal::HUP);
        wait::until("the reload", LIMIT, async || {
            ensure!(node.log()?.contains("reloaded the configuration"), "the log does not say so");
            Ok(())
        })
        .await?;
    }
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let failures = load.writers.record().failures;

    let lost = SystemClock.now();
    scene.etcd.kill(0);
    let ttl = Duration::from_secs(scene.cluster.spec().timing.ttl.into());
    while SystemClock.now().since(lost) < ttl * 2 {
        load.writers.progress(20, LIMIT).await?;
    }
    let status = scene.cluster.nodes[leader].status().await?;
    ensure!(status["failsafe_mode_is_active"] == true, "not said in the status: {status}");
    let record = load.writers.record();
    ensure!(record.failures == failures, "statements failed: {:?}", record.last_error);

    scene.etcd.restart(0).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_failsafe_mode_writes_go_on_without_etcd_while_a_switchover_waits_for_its_checkpoint() -> Result<()> {
    let mut scene = failsafe_scene("failsafe-checkpoint").await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let (failures, target) = (load.writers.record().failures, scene.node(leader));

    let of = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'";
    let checkpointer = target.query_one(of, LIMIT).await?.parse().ok().and_then(Pid::from_raw).context("no pid")?;
    kill_process(checkpointer, Signal::STOP)?;
    let (port, body) =
        (scene.cluster.nodes[leader].rest_port(), json!({ "leader": scene.cluster.nodes[leader].name() }));
    let asked = tokio::spawn(async move { rest::post(port, "/switchover", &body, LIMIT).await });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE query = 'CHECKPOINT' AND state = 'active'";
    let prepares = wait::until("the checkpoint before the switchover", LIMIT, async || {
        let waiting = target.query_one(waits, Duration::from_secs(5)).await?;
        ensure!(waiting == "1", "{waiting} sessions wait for it");
        Ok(())
    });
    prepares.await?;

    let lost = SystemClock.now();
    scene.etcd.kill(0);
    let ttl = Duration::from_secs(scene.cluster.spec().timing.ttl.into());
    while SystemClock.now().since(lost) < ttl * 2 {
        load.writers.progress(20, LIMIT).await?;
    }
    let record = load.writers.record();
    ensure!(record.failures == failures, "statements failed: {:?}", record.last_error);
    ensure!(target.query_one(waits, LIMIT).await? == "1", "the checkpoint was made meanwhile, so this shows nothing");

    kill_process(checkpointer, Signal::CONT)?;
    scene.etcd.restart(0).await?;
    // What was asked for is carried out now, or given up, as nobody may take over for the time of a promise.
    asked.abort();
    load.writers.progress(100, LIMIT).await?;
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_by_failsafe_mode_keeps_its_place_when_etcd_has_ended_its_lease() -> Result<()> {
    let mut scene = failsafe_scene("failsafe-lease").await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let failures = load.writers.record().failures;

    // Frozen for longer than a lease, etcd ends all of them when it goes on: every node sees the leader key vanish.
    scene.etcd.freeze(0);
    tokio::time::sleep(Duration::from_secs(12)).await;
    scene.etcd.thaw(0);
    load.writers.progress(200, LIMIT).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    let record = load.writers.record();
    ensure!(record.failures == failures, "statements failed: {:?}", record.errors);
    let timelines: BTreeSet<u32> = record.writes.iter().map(|write| write.timeline).collect();
    ensure!(timelines.len() == 1, "there was a promotion: {timelines:?}");
    scene.finish(load).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_by_failsafe_mode_that_alone_is_cut_off_from_etcd_goes_on_behind_the_router() -> Result<()> {
    let (mut scene, gates) = gated_failsafe_scene("failsafe-alone").await?;
    let load = scene.load().await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let (failures, began) = (load.writers.record().failures, SystemClock.now());

    // Every other node and the router see the leader key vanish.
    gates[leader].open(false);
    let other = scene.cluster.nodes[(leader + 1) % 3].rest_port();
    let vanished = wait::until("the leader key to vanish", LIMIT, async || {
        let members = rest::get(other, "/cluster").await?.body["members"].to_string();
        ensure!(!members.contains("\"leader\""), "{members}");
        Ok(())
    });
    vanished.await?;
    let gone = SystemClock.now();
    while SystemClock.now().since(gone) < Duration::from_secs(10) {
        load.writers.progress(20, LIMIT).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let newcomer = scene.read_write().query_one("SELECT pg_is_in_recovery()", Duration::from_secs(10)).await;
    ensure!(newcomer.as_deref().is_ok_and(|answer| answer == "f"), "a new session is not let in: {newcomer:?}");

    gates[leader].open(true);
    let whole = scene.cluster.settled(LIMIT).await?;
    ensure!(whole == leader, "leadership moved");
    load.writers.progress(100, LIMIT).await?;
    let record = load.writers.record();
    println!("without its key for 10 s: longest pause {:?}", record.outage(began));
    ensure!(record.failures == failures, "statements failed: {:?}", record.last_error);
    let timelines: BTreeSet<u32> = record.writes.iter().map(|write| write.timeline).collect();
    ensure!(timelines.len() == 1, "there was a promotion: {timelines:?}");
    scene.finish(load).await?;
    Ok(())
}

/// Who comes new can't know who leads by failsafe mode: the router that does goes on until the key is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_is_upgraded_while_its_leader_has_no_key_keeps_the_sessions() -> Result<()> {
    let (mut scene, gates) = gated_failsafe_scene("failsafe-upgrade").await?;
    let (leader, ports) = (scene.cluster.settled(LIMIT).await?, scene.router.ports());
    scene.router.process().kill();
    let start = |name: &str, more: &[&str]| {
        let cwd = scene.lab.make_dir("router")?;
        let mut command = scene.lab.command(&Program::router()?, &cwd)?;
        command.arg("--upgrade-sock").arg(cwd.join("upgrade")).args(more).arg(scene.lab.dir().join("etc/router.yml"));
        scene.lab.spawn(name, command)
    };
    let mut running = start("before", &[])?;
    let target = scene.read_write();
    wait::until("the router to serve", LIMIT, async || target.query_one("SELECT 1", LIMIT).await).await?;
    let session = target.connect(LIMIT).await?;
    session.batch_execute("CREATE TABLE kept (n int); BEGIN; INSERT INTO kept VALUES (1)").await?;

    gates[leader].open(false);
    wait::until("the router to go by the leader's word", LIMIT, async || {
        let health = rest::get(ports.admin, "/health").await?.body;
        ensure!(health["certainty"] == "unconfirmed, leader proven", "{health}");
        Ok(())
    })
    .await?;
    let mut next = start("next", &["--upgrade"])?;
    wait::until("the next router to be there", LIMIT, async || {
        ensure!(std::fs::read_to_string(next.log())?.contains("following the cluster"));
        Ok(())
    })
    .await?;
    let there = SystemClock.now();
    while SystemClock.now().since(there) < Duration::from_secs(5) {
        ensure!(target.query_one("SELECT pg_is_in_recovery()", LIMIT).await? == "f");
        session.batch_execute("INSERT INTO kept VALUES (2)").await?;
        ensure!(running.ended().is_none() && next.ended().is_none());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    gates[leader].open(true);
    wait::until("the old router to end", LIMIT, async || {
        ensure!(next.ended().is_none(), "the new router has ended");
        running.ended().context("it is still there")
    })
    .await?;
    session.batch_execute("INSERT INTO kept VALUES (3); COMMIT").await?;
    ensure!(target.query_one("SELECT max(n) FROM kept", LIMIT).await? == "3");
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_started_without_etcd_asks_the_members_that_it_knows() -> Result<()> {
    let mut scene = failsafe_scene("dcs-unread").await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    scene.etcd.kill(0);
    let known = |node: &trunkline_tests::Node| {
        json!({
            "name": node.name(),
            "api_url": format!("http://127.0.0.1:{}", node.rest_port()),
            "connect_address": format!("127.0.0.1:{}", node.port()),
        })
    };
    let members: Vec<Value> = scene.cluster.nodes.iter().map(known).collect();
    let extra = json!({ "members": members, "limits": { "stale_after": 1 } });
    let (ports, scope) = (proxy::Ports::any(&scene.lab)?, scene.cluster.spec().scope.clone());
    let etcd = scene.etcd.endpoints();
    scene.router = Proxy::router(&scene.lab, Program::router()?, ports, &scope, &etcd, &extra).await?;
    let write = "CREATE TABLE written_without_etcd ()";
    scene.read_write().execute(write, LIMIT).await.context("through a router that never saw etcd")?;
    let health = rest::get(ports.admin, "/health").await?.body;
    ensure!(health["certainty"] == "unconfirmed, leader proven", "{health}");

    scene.etcd.restart(0).await?;
    let confirmed = wait::until("etcd to confirm it", LIMIT, async || {
        let health = rest::get(ports.admin, "/health").await?.body;
        ensure!(health["confirmed"] == true && health["leader"].is_string(), "{health}");
        Ok(())
    });
    confirmed.await?;
    let metrics = rest::get(ports.admin, "/metrics").await?.body;
    let metrics = metrics.as_str().context("no text")?;
    ensure!(metrics.contains("leader_changes_total 1"), "its sessions were ended: {metrics}");
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    scene.lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_lease_is_revoked_is_gone_before_another_one_is_promoted() -> Result<()> {
    let mut spec = Spec::new(3, &Program::agent()?);
    // No standby holds its commits up, and it hears of its end later than everybody else.
    spec.dcs = json!({ "synchronous_mode": false, "primary_start_timeout": 0 });
    spec.timing = Timing { ttl: 20, loop_wait: 1, retry_timeout: 2 };
    let (mut scene, gates) = gated_scene("revoked", spec).await?;
    let load = scene.load().await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let old_name = scene.cluster.nodes[old].name().to_owned();
    let config = config::Etcd {
        endpoints: scene.etcd.endpoints().iter().map(|endpoint| format!("http://{endpoint}")).collect(),
        ..config::Etcd::default()
    };
    let client = EtcdDcs::connect(&config, SystemClock, Duration::from_secs(5)).await?;
    let key = format!("/service/{}/leader", scene.cluster.spec().scope);
    let lease = async || -> Result<LeaseId> {
        Ok(client.read(&key).await?.entries.first().context("there is no leader key")?.lease)
    };
    gates[old].slow(Duration::from_millis(300));
    // The others wait for it while it runs. Mostly its renewal says that the lease is gone, which ends it; where its watch is
    // faster, it may take the key back before that, and then the scene has not taken place.
    let mut fault = SystemClock.now();
    for _ in 0..5 {
        let revoked = lease().await?;
        fault = SystemClock.now();
        client.revoke(revoked).await?;
        let taken = wait::until("the key to be taken", LIMIT, async || {
            let read = client.read(&key).await?;
            let holder = read.entries.first().context("there is no leader key")?;
            ensure!(holder.lease != revoked, "it still hangs on the revoked lease");
            Ok(holder.value != old_name.as_bytes())
        });
        if taken.await? {
            break;
        }
    }
    scene.cluster.leader_other_than(old, LIMIT).await?;
    load.writers.progress(100, LIMIT).await?;
    let outage = load.writers.record().outage(fault);
    println!("a revoked lease: writes stood still for {outage:?}");
    ensure!(outage < Duration::from_secs(10), "writes stood still for {outage:?}");
    gates[old].slow(Duration::ZERO);
    scene.finish_after_kill(load, old).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_counts_from_the_request_however_late_the_answer_comes() -> Result<()> {
    const LATE: Duration = Duration::from_millis(500);
    let lab = Lab::new("late")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let gate = Gate::before(&etcd.endpoints()[0]).await?;
    let config = config::Etcd { endpoints: vec![format!("http://{}", gate.address())], ..config::Etcd::default() };
    let client = EtcdDcs::connect(&config, SystemClock, Duration::from_secs(5)).await?;
    // What comes before the first request of all takes round trips of its own.
    let lease = client.grant(Duration::from_secs(30)).await?;
    gate.slow(LATE);
    for what in ["renewed", "granted"] {
        let asked = SystemClock.now();
        let lease = match what {
            "renewed" => client.renew(lease.id, "/x").await?.0,
            _ => client.grant(Duration::from_secs(30)).await?,
        };
        let answered = SystemClock.now();
        ensure!(answered.since(asked) >= LATE, "{what} after {:?}: the gate does not hold", answered.since(asked));
        ensure!(lease.until + LATE <= answered + lease.ttl, "{what}: the time of the answer counts");
    }
    lab.success();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_whose_way_to_etcd_is_slow_and_then_dead_ends_no_session() -> Result<()> {
    let mut scene = Scene::start("slow", 3).await?;
    let leader = scene.cluster.settled(LIMIT).await?;
    let gate = Gate::before(&scene.etcd.endpoints()[0]).await?;
    let (ports, scope) = (proxy::Ports::any(&scene.lab)?, scene.cluster.spec().scope.clone());
    let hosts = [gate.address().to_owned()];
    let extra = json!({ "limits": { "stale_after": 1 } });
    scene.router = Proxy::router(&scene.lab, Program::router()?, ports, &scope, &hosts, &extra).await?;
    let load = scene.load().await?;
    let failures = load.writers.record().failures;

    gate.slow(Duration::from_millis(1500));
    load.writers.progress(300, LIMIT).await?;
    gate.open(false);
    let health = async || {
        let health = rest::get(ports.admin, "/health").await?.body;
        ensure!(health["confirmed"] == false, "{health}");
        Ok(())
    };
    wait::until("the router to know that it knows nothing new", LIMIT, health).await?;
    load.writers.progress(300, LIMIT).await?;
    let write = "CREATE TABLE written_by_a_new_session ()";
    scene.read_write().execute(write, LIMIT).await.context("a new session, the members say who leads")?;
    gate.slow(Duration::ZERO);
    gate.open(true);
    load.writers.progress(300, LIMIT).await?;

    ensure!(load.writers.record().failures == failures, "writes failed: {:?}", load.writers.record().failures);
    let metrics = rest::get(ports.admin, "/metrics").await?.body;
    let metrics = metrics.as_str().context("no text")?;
    ensure!(!metrics.contains("reason=\"leader_changed\""), "its sessions were ended: {metrics}");
    ensure!(scene.cluster.settled(LIMIT).await? == leader, "leadership moved");
    scene.finish(load).await?;
    Ok(())
}
