//! `make bench-sessions`: many sessions at once, and very many one after the other.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::task::JoinSet;
use trunkline_benches::relay::client::Session;
use trunkline_benches::relay::peer::{self, Peer};
use trunkline_benches::relay::process;
use trunkline_benches::relay::site::{Running, Site, Way};
use trunkline_benches::table;
use trunkline_common::{Clock, SystemClock};
use trunkline_tests::made_up;

/// Sessions held at once, and sessions opened and closed one after the other, through our router and HAProxy with one thread
/// each, in front of a server that just says it is PostgreSQL. Whatever grows with the number of sessions shows.
#[derive(Debug, Parser)]
struct Args {
    /// Sessions at once
    #[arg(long, default_value_t = 10_000)]
    held: usize,

    /// Sessions opened and closed
    #[arg(long, default_value_t = 500_000)]
    total: usize,

    /// Clients that open and close them
    #[arg(long, default_value_t = 8)]
    clients: usize,

    /// Be the server, and say on which port
    #[arg(long, hide = true)]
    serve: bool,
}

/// Files that a proxy has open besides two for each session, at most.
const OTHER_FILES: usize = 100;

/// Parts that the sessions opened and closed are told in.
const PARTS: usize = 10;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let limit = raise_file_limit()?;
    if args.serve {
        return serve().await;
    }
    // The limit of open files is that of a process: what needs more is shared out.
    let proxies = (2 * args.held).div_ceil(limit.saturating_sub(OTHER_FILES).max(1)).max(1);
    let site = Site::start().await?;
    let peer = Server::start()?;
    made_up::announce(&site.etcd, "made-up", peer.port).await?;
    let mut held = table::markdown(&["sessions at once", "held", "by processes", "KiB each", "one more"]);
    let mut parts =
        table::markdown(&["sessions opened and closed", "until", "per second", "CPU µs each", "resident KiB"]);
    for way in [Way::Trunkline, Way::HAProxy] {
        let mut holders = Vec::new();
        for _ in 0..proxies {
            holders.push(site.proxy(way, "made-up", peer.port).await?);
        }
        held.add_row(hold(way, &holders, args.held).await?);
        eprintln!("{}: {} sessions held", way.name(), args.held);
        drop(holders);
        if args.total == 0 {
            continue;
        }
        let proxy = Arc::new(site.proxy(way, "made-up", peer.port).await?);
        for part in 1..=PARTS {
            parts.add_row(churn(way, &proxy, &args, part).await?);
            eprintln!("{}: {part} of {PARTS}", way.name());
        }
    }
    table::numbers(&mut held, 1..5);
    table::numbers(&mut parts, 1..5);
    println!("{held}\n\n{parts}");
    site.lab.success();
    Ok(ExitCode::SUCCESS)
}

/// What the system permits is taken: said is how many files that is.
fn raise_file_limit() -> Result<usize> {
    let now = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: now.maximum, ..now }).context("the limit of open files")?;
    Ok(now.maximum.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX))
}

/// The server of all sessions, in a process of its own: the other ends are this one's.
struct Server {
    port: u16,
    process: Child,
}

impl Server {
    fn start() -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut process = command.arg("--serve").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut said = String::new();
        BufReader::new(process.stdout.take().context("no output")?).read_line(&mut said)?;
        Ok(Self { port: said.trim().parse().context("the server says no port")?, process })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already, or ends now.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Serves until whoever asked for it is gone.
async fn serve() -> Result<ExitCode> {
    println!("{}", Peer::start().await?.port);
    tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await??;
    Ok(ExitCode::SUCCESS)
}

async fn hold(way: Way, proxies: &[Running], count: usize) -> Result<Vec<String>> {
    let resident = || {
        let each = proxies.iter().map(|proxy| process::resident(proxy.pid.context("a proxy")?));
        each.sum::<Result<u64>>()
    };
    let mut sessions = Vec::new();
    let before = resident()?;
    for (number, proxy) in proxies.iter().cycle().take(count).enumerate() {
        let opened = Session::open_exactly(proxy.port, peer::IDLE, peer::WELCOME.len()).await;
        sessions.push(opened.with_context(|| format!("session {number}"))?);
    }
    let used = resident()?.saturating_sub(before);
    let asked = SystemClock.now();
    let another = Session::open_exactly(proxies[0].port, peer::IDLE, peer::WELCOME.len()).await?;
    let took = SystemClock.now().since(asked);
    for (number, session) in sessions.iter_mut().enumerate() {
        ensure!(is_open(session), "session {number} has ended");
    }
    drop(another);
    let each = used as f64 / 1024.0 / count as f64;
    let numbers = [count.to_string(), proxies.len().to_string(), format!("{each:.2}"), format!("{took:.1?}")];
    Ok([way.name().to_owned()].into_iter().chain(numbers).collect())
}

/// Whether there is neither an end nor an error.
fn is_open(session: &mut Session) -> bool {
    let read = session.stream().try_read(&mut [0]);
    matches!(read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

async fn churn(way: Way, proxy: &Arc<Running>, args: &Args, part: usize) -> Result<Vec<String>> {
    let pid = proxy.pid.context("a proxy")?;
    let count = args.total / PARTS;
    let (before, began) = (process::cpu(pid)?, SystemClock.now());
    let begun = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..args.clients {
        let (proxy, begun) = (proxy.clone(), begun.clone());
        clients.spawn(async move {
            while begun.fetch_add(1, Ordering::Relaxed) < count {
                drop(Session::open_exactly(proxy.port, peer::IDLE, peer::WELCOME.len()).await?);
            }
            Ok::<(), anyhow::Error>(())
        });
    }
    while let Some(done) = clients.join_next().await {
        done??;
    }
    let took = SystemClock.now().since(began);
    // What is still being closed belongs to them.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let used = process::cpu(pid)?.saturating_sub(before);
    Ok(vec![
        way.name().into(),
        (part * count).to_string(),
        format!("{:.0}", count as f64 / took.as_secs_f64()),
        format!("{:.0}", used.as_secs_f64() * 1e6 / count as f64),
        (process::resident(pid)? / 1024).to_string(),
    ])
}
