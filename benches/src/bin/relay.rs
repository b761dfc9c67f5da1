//! `make bench-relay`: what a proxy costs, beside others and a direct connection in the same run.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::json;
use trunkline_benches::relay::peer::Peer;
use trunkline_benches::relay::report::Figures;
use trunkline_benches::relay::site::{Running, Site, Way};
use trunkline_benches::relay::{figures, process};
use trunkline_tests::made_up;

/// Throughput, CPU, memory and latency through our router, HAProxy, PgBouncer, nginx and a direct connection, in
/// interleaved rounds in front of one PostgreSQL. Needs an idle machine with two CPUs or more.
#[derive(Debug, Parser)]
struct Args {
    /// Rounds over all figures and ways
    #[arg(long, default_value_t = 5)]
    rounds: usize,

    /// Seconds that one figure of one way takes
    #[arg(long, default_value_t = 4)]
    seconds: u64,

    /// Idle sessions held to see what they cost
    #[arg(long, default_value_t = 2000)]
    idle: usize,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let site = Site::start().await?;
    let mut figures = Figures::default();
    real(&site, &args, &mut figures).await?;
    made_up(&site, &args, &mut figures).await?;
    println!("{}", figures.table());
    let path = "target/bench-relay.json";
    std::fs::write(path, json!({ "samples": figures, "rounds": args.rounds, "seconds": args.seconds }).to_string())
        .with_context(|| path.to_owned())?;
    site.lab.success();
    Ok(ExitCode::SUCCESS)
}

/// In front of PostgreSQL.
async fn real(site: &Site, args: &Args, figures: &mut Figures) -> Result<()> {
    let time = Duration::from_secs(args.seconds);
    fill(site).await?;
    let mut ways = Vec::new();
    for way in Way::ALL {
        ways.push((way, site.proxy(way, &site.cluster.spec().scope, site.postgres()).await?));
    }
    for round in 0..args.rounds {
        eprintln!("round {} of {}", round + 1, args.rounds);
        place(site, &ways, "1")?;
        for (way, proxy) in &ways {
            figures::pgbench(site, *way, proxy, 8, time, figures)?;
            figures::pgbench(site, *way, proxy, 1, time, figures)?;
            figures::connects(site, *way, proxy, time, figures)?;
        }
        place(site, &ways, &everywhere())?;
        for (way, proxy) in &ways {
            figures::copy(*way, proxy, time, figures).await?;
            figures::beside(*way, proxy, time, figures).await?;
        }
    }
    Ok(())
}

/// In front of a server that is asked for what PostgreSQL can't be asked for.
async fn made_up(site: &Site, args: &Args, figures: &mut Figures) -> Result<()> {
    let peer = Peer::start().await?;
    made_up::announce(&site.etcd, "made-up", peer.port).await?;
    for way in [Way::Direct, Way::Trunkline, Way::HAProxy, Way::Nginx] {
        eprintln!("{}: memory, stalled readers, ends", way.name());
        let proxy = site.proxy(way, "made-up", peer.port).await?;
        figures::idle(way, &proxy, args.idle, figures).await?;
        figures::stalled(way, &proxy, &peer, figures).await?;
        figures::ends(way, &proxy, &peer, 200, figures).await?;
    }
    Ok(())
}

/// The tables of pgbench, and one of 250 MB for COPY.
async fn fill(site: &Site) -> Result<()> {
    let mut init = std::process::Command::new(site.program("pgbench"));
    init.args([
        "-i",
        "-q",
        "-s",
        "10",
        "-h",
        "127.0.0.1",
        "-U",
        "postgres",
        "-p",
        &site.postgres().to_string(),
        "postgres",
    ]);
    let done = init.output()?;
    anyhow::ensure!(done.status.success(), "pgbench -i: {}", String::from_utf8_lossy(&done.stderr));
    let target = site.cluster.nodes[0].target("");
    let sql = "CREATE TABLE wide AS SELECT i, repeat(md5(i::text), 30) AS t FROM generate_series(1, 250000) AS i";
    target.execute(sql, Duration::from_secs(120)).await?;
    target.execute("VACUUM FREEZE wide", Duration::from_secs(120)).await?;
    Ok(())
}

/// Puts PostgreSQL and all proxies on these CPUs.
fn place(site: &Site, ways: &[(Way, Running)], cpus: &str) -> Result<()> {
    process::pin(site.backends().into_iter().chain(ways.iter().filter_map(|(_, proxy)| proxy.pid)), cpus)
}

fn everywhere() -> String {
    format!("0-{}", std::thread::available_parallelism().map_or(1, usize::from) - 1)
}
