//! pgBackRest beside a cluster: what docs/operations.md says about archives, replicas from a repository, and a cluster made
//! from it as it was at a moment.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use trunkline_tests::tools::find_program;
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Spec, wait};

/// pgBackRest for one node: its stanza is `demo` for all of them, its data directory the node's.
struct Repository {
    program: PathBuf,
    lab: Lab,
}

impl Repository {
    fn new(lab: &Lab) -> Result<Self> {
        lab.make_dir("repository")?;
        Ok(Self { program: find_program("pgbackrest", "pgbackrest")?, lab: lab.clone() })
    }

    /// `pgbackrest` with the configuration file for that node, as the beginning of a command line.
    fn for_node(&self, cluster: &Cluster, node: usize) -> Result<String> {
        let (dir, node) = (self.lab.dir().display(), &cluster.nodes[node]);
        let text = format!(
            "[global]\nrepo1-path={dir}/repository\nlock-path={dir}/repository/lock\nspool-path={dir}/repository/spool\n\
             log-level-file=off\nlog-level-console=info\nstart-fast=y\narchive-timeout=20\nprocess-max=2\n\n\
             [demo]\npg1-path={}\npg1-port={}\npg1-socket-path={}\npg1-user=postgres\n",
            node.data_dir().display(),
            node.port(),
            node.dir().display(),
        );
        let file = self.lab.write_config(&format!("pgbackrest-{}.conf", node.name()), &text)?;
        Ok(format!("{} --config={} --stanza=demo", self.program.display(), file.display()))
    }

    /// Runs a command of pgBackRest's for that node.
    fn run(&self, cluster: &Cluster, node: usize, arguments: &str) -> Result<String> {
        let line = self.for_node(cluster, node)? + " " + arguments;
        let mut words = line.split_whitespace();
        let program = Program::new(words.next().context("no program")?);
        let mut command: Command = self.lab.command(&program, cluster.nodes[node].dir())?;
        let output = command.args(words).output()?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.success(), "{line}: {said}");
        Ok(said)
    }
}

/// Changes the configuration file of every node before its start.
fn configure(cluster: &mut Cluster, change: impl Fn(&Cluster, usize, &mut Value) -> Result<()>) -> Result<()> {
    for node in 0..cluster.nodes.len() {
        let mut config = serde_json::from_slice(&std::fs::read(cluster.nodes[node].config())?)?;
        change(cluster, node, &mut config)?;
        cluster.nodes[node].configure(&config.to_string())?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pgbackrest_archives_makes_replicas_and_a_cluster_as_it_was_at_a_moment() -> Result<()> {
    let lab = Lab::new("pgbackrest")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let repository = Repository::new(&lab)?;
    let mut spec = Spec::new(2, &Program::agent()?);
    spec.trust = true;
    spec.dcs["postgresql"] = json!({ "parameters": { "archive_mode": "on" } });
    let mut cluster = Cluster::prepare(&lab, &etcd.endpoints(), spec.clone())?;
    configure(&mut cluster, |cluster, node, config| {
        let pgbackrest = repository.for_node(cluster, node)?;
        let section = &mut config["postgresql"];
        section["create_replica_methods"] = json!(["pgbackrest", "basebackup"]);
        section["pgbackrest"] =
            json!({ "command": format!("{pgbackrest} --delta restore"), "keep_data": true, "no_params": true });
        section["basebackup"] = json!([{ "max-rate": "100M" }, { "checkpoint": "fast" }, "no-sync"]);
        section["recovery_conf"] = json!({ "restore_command": format!("{pgbackrest} archive-get %f \"%p\"") });
        section["parameters"]["archive_command"] = json!(format!("{pgbackrest} archive-push %p"));
        Ok(())
    })?;
    for node in &mut cluster.nodes {
        node.start()?;
    }
    let leader = cluster.settled(LIMIT).await?;
    let replica = 1 - leader;

    // There is no backup yet, so the first replica was made by the second method.
    let log = cluster.nodes[replica].log()?;
    ensure!(log.contains("making a replica by pgbackrest failed"), "{log}");
    ensure!(log.contains("pg_basebackup from"), "{log}");

    repository.run(&cluster, leader, "stanza-create")?;
    repository.run(&cluster, leader, "check")?;
    repository.run(&cluster, leader, "--type=full backup")?;
    let target = cluster.targets().remove(leader);
    target.execute("CREATE TABLE t (n int); INSERT INTO t VALUES (1)", LIMIT).await?;

    // The next one comes from the repository, and goes on by its archive and then by streaming.
    let before = log.matches("pg_basebackup from").count();
    cluster.nodes[replica].kill();
    std::fs::remove_dir_all(cluster.nodes[replica].data_dir())?;
    cluster.nodes[replica].start()?;
    // Its key from before may still say that it streams.
    let back = wait::until("the replica to say so itself", LIMIT, async || {
        let status = cluster.nodes[replica].health("/replica").await;
        ensure!(status == Some(200), "{status:?}");
        Ok(())
    });
    back.await?;
    ensure!(cluster.settled(LIMIT).await? == leader, "leadership moved");
    let log = cluster.nodes[replica].log()?;
    ensure!(log.matches("pg_basebackup from").count() == before, "it was copied from the leader: {log}");
    ensure!(log.contains("restored log file"), "nothing came from the archive: {log}");
    let copied = cluster.targets().remove(replica);
    wait::until("the row on the replica", LIMIT, async || {
        ensure!(copied.query_one("SELECT count(*) FROM t", LIMIT).await? == "1", "it is not there");
        Ok(())
    })
    .await?;

    // A mistake, and a new cluster as it was before.
    let before = target.query_one("SELECT clock_timestamp()", LIMIT).await?;
    let wal = target.query_one("SELECT pg_walfile_name(pg_current_wal_lsn())", LIMIT).await?;
    target.execute("DELETE FROM t", LIMIT).await?;
    target.execute("SELECT pg_switch_wal()", LIMIT).await?;
    wait::until("the WAL in the archive", LIMIT, async || {
        let last = target.query_one("SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver", LIMIT).await?;
        ensure!(last >= wal, "{last}");
        Ok(())
    })
    .await?;
    let restored = restored(&lab, &etcd, spec, &repository, &before).await?;
    for target in restored.targets() {
        ensure!(target.query_one("SELECT count(*) FROM t", LIMIT).await? == "1", "the row is not there");
    }
    ensure!(target.query_one("SELECT count(*) FROM t", LIMIT).await? == "0", "the old cluster goes on");
    lab.success();
    Ok(())
}

/// Another cluster, made from the repository as it was at that time.
async fn restored(lab: &Lab, etcd: &Etcd, spec: Spec, repository: &Repository, time: &str) -> Result<Cluster> {
    let mut spec = Spec { scope: "restored".to_owned(), prefix: "restored".to_owned(), ..spec };
    spec.dcs["postgresql"] = json!({ "parameters": { "archive_mode": "off" } });
    let mut cluster = Cluster::prepare(lab, &etcd.endpoints(), spec)?;
    configure(&mut cluster, |cluster, node, config| {
        let pgbackrest = repository.for_node(cluster, node)?;
        let command = format!("{pgbackrest} --type=time \"--target={time}\" --target-action=promote restore");
        config["bootstrap"]["method"] = json!("pgbackrest");
        config["bootstrap"]["pgbackrest"] =
            json!({ "command": command, "keep_existing_recovery_conf": true, "no_params": true });
        Ok(())
    })?;
    for node in &mut cluster.nodes {
        node.start()?;
    }
    cluster.settled(LIMIT).await?;
    let log = (0..2).map(|node| cluster.nodes[node].log()).collect::<Result<String>>()?;
    ensure!(log.contains("running custom bootstrap script: pgbackrest"), "{log}");
    ensure!(log.contains("recovery stopping before commit of transaction"), "{log}");
    ensure!(log.contains("pg_basebackup from"), "the second one follows the first: {log}");
    Ok(cluster)
}
