//! Replication slots beside those of the members: permanent ones, those of others, those of members that are gone.

use anyhow::{Result, ensure};
use serde_json::json;
use trunkline_tests::workload::Target;
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Scene, Spec, rest, wait};

/// Waits until the slot is there, or is not.
async fn slot(target: &Target, name: &str, there: bool) -> Result<()> {
    let sql = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{name}'");
    let expected = if there { "1" } else { "0" };
    wait::until(format!("{expected} of slot {name} at port {}", target.port()), LIMIT, async || {
        ensure!(target.query_one(&sql, LIMIT).await? == expected, "not yet");
        Ok(())
    })
    .await
}

/// What a reader of the logical slot gets next.
async fn changes(target: &Target) -> Result<String> {
    let sql = "SELECT coalesce(string_agg(data, ' '), '') FROM pg_logical_slot_get_changes('changes', NULL, NULL)";
    target.query_one(sql, LIMIT).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logical_slots_survive_a_failover_and_others_are_kept_as_they_should_be() -> Result<()> {
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.dcs["postgresql"] = json!({ "parameters": { "wal_level": "logical" } });
    spec.dcs["slots"] = json!({
        "changes": { "type": "logical", "database": "postgres", "plugin": "test_decoding" },
        "backup": { "type": "physical" },
    });
    spec.dcs["ignore_slots"] = json!([{ "name": "theirs", "type": "physical" }]);
    let mut scene = Scene::with("slots", 1, spec).await?;
    let old = scene.cluster.settled(LIMIT).await?;
    let (was, is) = (scene.node(old), scene.node(1 - old));
    for target in [&was, &is] {
        slot(target, "changes", true).await?;
        slot(target, "backup", true).await?;
    }

    // What nobody has told the agent of stays until the server is started the next time, unless it is to be ignored.
    for name in ["theirs", "stranger"] {
        let sql = format!("SELECT pg_create_physical_replication_slot('{name}')");
        was.query_one(&sql, LIMIT).await?;
    }
    // To copy its slot the standby was restarted, and may not be counted on again yet.
    wait::until("a switchover", LIMIT, async || scene.cluster.switchover(old, Some(1 - old)).await).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == 1 - old);
    slot(&was, "stranger", false).await?;
    slot(&was, "theirs", true).await?;

    // The reader has confirmed one row, the standby knows that, and the primary dies with the next one.
    is.execute("CREATE TABLE t (n int); INSERT INTO t VALUES (1)", LIMIT).await?;
    let read = changes(&is).await?;
    ensure!(read.contains("n[integer]:1"), "{read}");
    slot(&was, "changes", true).await?;
    let confirmed = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'changes'";
    let position = is.query_one(confirmed, LIMIT).await?;
    wait::until("the slot of the standby to move along", LIMIT, async || {
        let moved = was.query_one(&format!("SELECT ({confirmed}) >= '{position}'"), LIMIT).await?;
        ensure!(moved == "t", "it is not at {position}");
        Ok(())
    })
    .await?;
    is.execute("INSERT INTO t VALUES (2)", LIMIT).await?;
    scene.cluster.nodes[1 - old].kill_postmaster()?;
    scene.cluster.leader_other_than(1 - old, LIMIT).await?;
    ensure!(scene.cluster.settled(LIMIT).await? == old);
    let read = changes(&was).await?;
    ensure!(read.contains("n[integer]:2") && !read.contains("n[integer]:1"), "{read}");
    slot(&is, "changes", true).await?;

    // The slot of a member that is gone is kept, for a time.
    let gone = scene.cluster.nodes[1 - old].name().to_owned();
    scene.cluster.nodes[1 - old].stop(LIMIT).await?;
    wait::until("the member's key to be gone", LIMIT, async || {
        let cluster = rest::get(scene.cluster.nodes[old].rest_port(), "/cluster").await?.body.to_string();
        ensure!(!cluster.contains(&gone), "{cluster}");
        Ok(())
    })
    .await?;
    slot(&was, &gone, true).await?;
    scene.cluster.patch_config(&json!({ "member_slots_ttl": 1 })).await?;
    slot(&was, &gone, false).await?;
    slot(&was, "backup", true).await?;
    scene.lab.success();
    Ok(())
}

/// A standby has WAL from its base backup on. The reader of a slot may be further behind, and then a copy of the slot alone ends
/// it at "requested WAL segment … has already been removed" after the next failover.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_is_made_late_gets_the_wal_of_a_slot_whose_reader_is_behind() -> Result<()> {
    let lab = Lab::new("behind")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let archive = lab.make_dir("archive")?;
    let mut spec = Spec::new(2, &Program::agent()?);
    // As PostgreSQL's manual has it: what is there already is refused, and then nothing is archived any more.
    let archived = format!("test ! -f {0}/%f && cp %p {0}/%f", archive.display());
    let parameters = json!({ "wal_level": "logical", "archive_mode": "on", "archive_command": archived });
    let changes_slot = json!({ "type": "logical", "database": "postgres", "plugin": "pgoutput" });
    spec.dcs = json!({ "postgresql": { "parameters": parameters }, "slots": { "changes": changes_slot } });
    let initdb = json!([{ "encoding": "UTF8" }, { "locale": "C" }, { "wal-segsize": 1 }, "no-sync"]);
    spec.local = json!({ "bootstrap": { "initdb": initdb } });
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec)?;
    cluster.nodes[0].start()?;
    ensure!(cluster.leader(LIMIT).await? == 0);
    let targets = cluster.targets();
    slot(&targets[0], "changes", true).await?;
    targets[0].execute("CREATE TABLE t (n int); CREATE PUBLICATION p FOR TABLE t", LIMIT).await?;
    for n in 0..4 {
        targets[0].execute(&format!("INSERT INTO t VALUES ({n})"), LIMIT).await?;
        targets[0].query_one("SELECT pg_switch_wal()", LIMIT).await?;
    }

    cluster.nodes[1].start()?;
    slot(&targets[1], "changes", true).await?;
    ensure!(cluster.nodes[1].log()?.contains("fetching WAL from"), "what is tested is not here");
    wait::until("a switchover", LIMIT, async || {
        ensure!(cluster.settled(LIMIT).await? == 0, "leadership moved");
        cluster.switchover(0, Some(1)).await
    })
    .await?;
    ensure!(cluster.settled(LIMIT).await? == 1, "leadership moved");
    targets[1].execute("INSERT INTO t VALUES (4)", LIMIT).await?;
    let inserts = "SELECT count(*) FROM pg_logical_slot_get_binary_changes('changes', NULL, NULL, 'proto_version', '1',
                       'publication_names', 'p') WHERE get_byte(data, 0) = ascii('I')";
    let read = targets[1].query_one(inserts, LIMIT).await?;
    ensure!(read == "5", "{read} rows of five");

    // What came that way has been archived by its primary.
    targets[1].execute("CHECKPOINT", LIMIT).await?;
    targets[1].query_one("SELECT pg_switch_wal()", LIMIT).await?;
    let archiver = "SELECT archived_count > 0, failed_count, last_failed_wal FROM pg_stat_archiver";
    let of_archiver = |column: &str| format!("SELECT {column} FROM ({archiver}) AS archiver (working, failed, file)");
    wait::until("the archiver to work", LIMIT, async || {
        ensure!(targets[1].query_one(&of_archiver("working::text"), LIMIT).await? == "true", "not yet");
        Ok(())
    })
    .await?;
    let failed = targets[1].query_one(&of_archiver("failed::text || ' ' || coalesce(file, '')"), LIMIT).await?;
    ensure!(failed == "0 ", "the archiver failed: {failed}");
    ensure!(!cluster.nodes[1].data_dir().join("pg_wal/trunkline.fetched").exists(), "something is left");
    lab.success();
    Ok(())
}
