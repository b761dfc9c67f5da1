//! What is measured, one figure of one way at a time.

use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use trunkline_common::{Clock, SystemClock};

use super::client::Session;
use super::peer::{self, Peer, words};
use super::process;
use super::report::{Figure, Figures};
use super::site::{Running, Site, Way};

/// The user that PostgreSQL trusts.
const USER: &str = "postgres";

/// pgbench in its select-only mode, everything on one CPU.
pub fn pgbench(
    site: &Site,
    way: Way,
    proxy: &Running,
    clients: u32,
    time: Duration,
    figures: &mut Figures,
) -> Result<()> {
    let bench = bench(site, proxy, clients, time, &["-M", "prepared"])?;
    let (tps, cpu) = match clients {
        1 => (Figure::Tps1, Figure::Cpu1),
        _ => (Figure::Tps8, Figure::Cpu8),
    };
    figures.note(tps, way, bench.tps);
    if let Some(used) = bench.cpu {
        figures.note(cpu, way, used.as_secs_f64() * 1e6 / bench.transactions);
    }
    Ok(())
}

/// The same with a connection for every select.
pub fn connects(site: &Site, way: Way, proxy: &Running, time: Duration, figures: &mut Figures) -> Result<()> {
    let bench = bench(site, proxy, 4, time, &["-C"])?;
    figures.note(Figure::Connects, way, bench.tps);
    if let Some(used) = bench.cpu {
        figures.note(Figure::CpuConnect, way, used.as_secs_f64() * 1e6 / bench.transactions);
    }
    Ok(())
}

struct Bench {
    tps: f64,
    transactions: f64,
    cpu: Option<Duration>,
}

fn bench(site: &Site, proxy: &Running, clients: u32, time: Duration, options: &[&str]) -> Result<Bench> {
    let before = proxy.pid.map(process::cpu).transpose()?;
    let mut command = Command::new("taskset");
    command.args(["-c", "1"]).arg(site.program("pgbench")).args(["-n", "-S", "-j", "1"]).args(options);
    command.args(["-c", &clients.to_string(), "-T", &time.as_secs().to_string()]);
    command.args(["-h", "127.0.0.1", "-p", &proxy.port.to_string(), "-U", USER, "postgres"]);
    let done = command.output()?;
    ensure!(done.status.success(), "pgbench: {}", String::from_utf8_lossy(&done.stderr));
    let after = proxy.pid.map(process::cpu).transpose()?;
    let text = String::from_utf8_lossy(&done.stdout);
    let number = |what: &str| {
        let rest =
            text.lines().find_map(|line| line.strip_prefix(what)).with_context(|| format!("{what} in {text}"))?;
        let digits: String = rest.trim_start().chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        Ok::<f64, anyhow::Error>(digits.parse()?)
    };
    let cpu = after.zip(before).map(|(after, before)| after.saturating_sub(before));
    Ok(Bench { tps: number("tps = ")?, transactions: number("number of transactions actually processed: ")?, cpu })
}

/// A large COPY TO, read as fast as it comes.
pub async fn copy(way: Way, proxy: &Running, time: Duration, figures: &mut Figures) -> Result<()> {
    let mut session = Session::open(proxy.port, USER).await?;
    let before = proxy.pid.map(process::cpu).transpose()?;
    let (begun, mut bytes) = (SystemClock.now(), 0);
    while SystemClock.now().since(begun) < time {
        bytes += session.query(COPY).await?;
    }
    let took = SystemClock.now().since(begun);
    let after = proxy.pid.map(process::cpu).transpose()?;
    figures.note(Figure::CopyRate, way, bytes as f64 / 1e6 / took.as_secs_f64());
    if let Some((after, before)) = after.zip(before) {
        figures.note(Figure::CopyCpu, way, (after - before).as_secs_f64() * 1e3 / (bytes as f64 / 1e9));
    }
    Ok(())
}

const COPY: &str = "COPY wide TO STDOUT";

/// Small selects while another session of the same proxy copies.
pub async fn beside(way: Way, proxy: &Running, time: Duration, figures: &mut Figures) -> Result<()> {
    let mut copying = Session::open(proxy.port, USER).await?;
    let copies = tokio::spawn(async move {
        loop {
            copying.query(COPY).await?;
        }
        #[allow(unreachable_code)]
        Ok::<(), anyhow::Error>(())
    });
    let mut session = Session::open(proxy.port, USER).await?;
    let (begun, mut took) = (SystemClock.now(), Vec::new());
    while SystemClock.now().since(begun) < time {
        let asked = SystemClock.now();
        session.query("SELECT abalance FROM pgbench_accounts WHERE aid = 4711").await?;
        took.push(SystemClock.now().since(asked).as_secs_f64() * 1e6);
    }
    ensure!(!copies.is_finished(), "the COPY ended: {:?}", copies.await);
    copies.abort();
    took.sort_by(f64::total_cmp);
    figures.note(Figure::Beside, way, took[took.len() * 99 / 100]);
    Ok(())
}

/// Resident memory that sessions without anything to do cost.
pub async fn idle(way: Way, proxy: &Running, sessions: usize, figures: &mut Figures) -> Result<()> {
    let Some(pid) = proxy.pid else { return Ok(()) };
    // What the first sessions cost belongs to the process.
    drop(hold(proxy, 100).await?);
    let before = process::resident(pid)?;
    let held = hold(proxy, sessions).await?;
    let after = process::resident(pid)?;
    figures.note(Figure::Idle, way, after.saturating_sub(before) as f64 / 1024.0 / held.len() as f64);
    Ok(())
}

async fn hold(proxy: &Running, sessions: usize) -> Result<Vec<Session>> {
    let mut held = Vec::new();
    for _ in 0..sessions {
        held.push(made_up(proxy, peer::IDLE).await?);
    }
    Ok(held)
}

/// How much a server gets rid of when the client reads nothing.
pub async fn stalled(way: Way, proxy: &Running, server: &Peer, figures: &mut Figures) -> Result<()> {
    let before = server.flooded.load(Ordering::Relaxed);
    let session = made_up(proxy, peer::FLOOD).await;
    let mut last = server.flooded.load(Ordering::Relaxed);
    for _ in 0..60 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = server.flooded.load(Ordering::Relaxed);
        if now == last && now > before {
            break;
        }
        last = now;
    }
    drop(session?);
    figures.note(Figure::Stalled, way, (last - before) as f64 / 1e6);
    Ok(())
}

/// Last bytes that do not arrive, and half-closes that are not passed on.
pub async fn ends(way: Way, proxy: &Running, server: &Peer, times: usize, figures: &mut Figures) -> Result<()> {
    let (mut lost, mut failed) = (0, 0);
    for _ in 0..times {
        if !all_words(made_up(proxy, peer::FAREWELL).await?).await {
            lost += 1;
        }
        let mut session = made_up(proxy, peer::TALLY).await?;
        let before = server.tallied.load(Ordering::Relaxed);
        let sent = session.stream().write_all(&words()).await;
        let ended = session.stream().shutdown().await;
        let heard = sent.is_ok() && ended.is_ok() && all_words(session).await;
        if !heard || server.tallied.load(Ordering::Relaxed) - before != peer::WORDS as u64 {
            failed += 1;
        }
    }
    figures.note(Figure::LostEnds, way, f64::from(lost));
    figures.note(Figure::HalfCloses, way, f64::from(failed));
    Ok(())
}

async fn made_up(proxy: &Running, user: &str) -> Result<Session> {
    Session::open_exactly(proxy.port, user, peer::WELCOME.len()).await
}

/// Whether everything that the peer says comes, and then the end.
async fn all_words(mut session: Session) -> bool {
    let mut heard = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), session.stream().read_to_end(&mut heard)).await;
    matches!(read, Ok(Ok(_))) && heard == words()
}
