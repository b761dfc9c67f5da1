//! The harness itself, against a stock Patroni cluster with HAProxy: what the benchmark compares with must be set up right.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::workload::{Readers, Writers, create_table};
use trunkline_tests::{Cluster, Etcd, Lab, Spec, Timing, haproxy, patroni};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patroni_behind_haproxy_switches_over_and_fails_over() -> Result<()> {
    let lab = Lab::new("patroni")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let mut spec = Spec::new(3, &patroni::program()?);
    spec.timing = Timing::PATRONI_LOWEST;
    spec.dcs = json!({ "synchronous_mode": true, "primary_start_timeout": 0 });
    let mut cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;
    let proxy = haproxy::start(&lab, &cluster, haproxy::Checks::TUNED).await?;
    let password = cluster.spec().password.clone();

    let leader = cluster.leader(Duration::from_secs(5)).await?;
    create_table(&cluster.nodes[leader].target(&password)).await?;
    let pace = Duration::from_millis(5);
    let writers = Writers::start(&proxy.read_write(&password), 1, 2, pace);
    let readers = Readers::start(&proxy.read_only(&password), 1, Duration::from_millis(20));
    let direct = Writers::direct(&cluster.targets(), 100, pace);
    writers.progress(50, Duration::from_secs(10)).await?;

    let fault = SystemClock.now();
    cluster.switchover(leader, None).await?;
    let second = cluster.leader_other_than(leader, Duration::from_secs(10)).await?;
    cluster.settled(Duration::from_secs(30)).await?;
    writers.progress(50, Duration::from_secs(30)).await?;
    eprintln!("switchover: {:?}", writers.record().outage(fault));

    let fault = SystemClock.now();
    cluster.nodes[second].kill_postmaster()?;
    let third = cluster.leader_other_than(second, Duration::from_secs(30)).await?;
    writers.progress(50, Duration::from_secs(30)).await?;
    cluster.settled(Duration::from_secs(60)).await?;
    eprintln!("postmaster: {:?}", writers.record().outage(fault));

    let fault = SystemClock.now();
    cluster.nodes[third].kill();
    let fourth = cluster.leader_other_than(third, Duration::from_secs(40)).await?;
    writers.progress(50, Duration::from_secs(30)).await?;
    eprintln!("node: {:?}", writers.record().outage(fault));
    cluster.nodes[third].start()?;
    cluster.settled(Duration::from_secs(60)).await?;

    let record = writers.stop().await.with(direct.stop().await);
    let reads = readers.stop().await;
    // HAProxy learns of a promotion by its next check, so some reads of a new primary are to be expected.
    let of_primary = reads.iter().filter(|read| !read.standby).count();
    ensure!(reads.len() > 50 && of_primary * 10 < reads.len(), "{of_primary} of {} reads of a primary", reads.len());
    let missing = record.missing(&cluster.nodes[fourth].target(&password)).await?;
    ensure!(missing.is_empty(), "{} of {} rows are missing: {missing:?}", missing.len(), record.writes.len());
    if let Some(found) = record.two_primaries() {
        anyhow::bail!("two primaries: {found}");
    }
    lab.success();
    Ok(())
}
