//! One run: the world is built, clients work, faults come and go, and what was seen is judged.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use trunkline_agent::lab::wait;

use crate::check::{self, Findings, Kind, Promises};
use crate::faults;
use crate::files::{Mode, Settings};
use crate::history::{Call, Micros};
use crate::report::{Played, Report};
use crate::schedule::{self, Allowed, Draw, Episode, NODES, ROUTERS};
use crate::wire::Wire;
use crate::workload::{self, Recorder, Workload};
use crate::world::{self, Kind as HostKind, POSTGRES_PORT, READ_ONLY_PORT, READ_WRITE_PORT, World};

/// How long the cluster may take to get whole after the last fault of an episode was healed.
const WHOLE_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to come up at first.
const START_LIMIT: Duration = Duration::from_secs(90);
/// What `maximum_lag_on_failover` is, and what can be written on top: the leader's position is published once a loop.
const LAG_LIMIT: u64 = 1_048_576 + 1_048_576;

/// Starts three nodes, three etcd members and two routers, each in a network namespace of its own, breaks them in
/// every way, and checks what clients saw. Needs root.
#[derive(Debug, Clone, Parser)]
#[command(name = "chaos")]
pub struct Args {
    /// How long faults go on
    #[arg(long, default_value_t = 5)]
    pub minutes: u64,
    /// What the faults are drawn from; default: any
    #[arg(long)]
    pub seed: Option<u64>,
    /// A file with a schedule, one episode a line, instead of a seed; the run ends with it
    #[arg(long)]
    pub schedule: Option<PathBuf>,
    /// Print so many episodes of the seed's schedule, in the form of --schedule, and end
    #[arg(long, value_name = "EPISODES")]
    pub print: Option<usize>,
    /// Without synchronous replication: acknowledged writes may be lost then, within the lag limit
    #[arg(long)]
    pub asynchronous: bool,
    /// In mode quorum: any standby may confirm a commit
    #[arg(long, conflicts_with = "asynchronous")]
    pub quorum: bool,
    /// In strict synchronous mode: without a standby commits wait
    #[arg(long, conflicts_with_all = ["asynchronous", "quorum"])]
    pub strict: bool,
    /// With failsafe mode: the primary goes on without etcd while every member answers
    #[arg(long)]
    pub failsafe: bool,
    /// No jumps of the wall clock, and no libfaketime
    #[arg(long)]
    pub no_clock: bool,
    /// Keep data, logs and history of a run that went well, too
    #[arg(long)]
    pub keep: bool,
}

impl Args {
    fn mode(&self) -> Mode {
        match (self.asynchronous, self.quorum, self.strict) {
            (true, ..) => Mode::Asynchronous,
            (_, true, _) => Mode::Quorum,
            (_, _, true) => Mode::Strict,
            _ => Mode::Synchronous,
        }
    }

    fn allowed(&self, fenced: bool) -> Allowed {
        Allowed { clock: !self.no_clock, synchronous_mode: self.asynchronous, frozen_nodes: fenced }
    }
}

/// Does what the arguments say; whether everything was as promised.
///
/// # Errors
/// The run could not be made.
pub async fn run(args: Args) -> Result<bool> {
    let seed = args.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
    if let Some(count) = args.print {
        for episode in Draw::new(seed, args.allowed(true)).take(count) {
            writeln!(std::io::stdout(), "{}", schedule::line(&episode))?;
        }
        return Ok(true);
    }
    let scheduled = match &args.schedule {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
            Some(schedule::parse(&text)?)
        }
        None => None,
    };
    let preload = if args.no_clock { None } else { world::faketime() };
    let what = match &args.schedule {
        Some(path) => format!("schedule {}", path.display()),
        None => format!("seed {seed}, {} min", args.minutes),
    };
    let mode = args.mode().label();
    let failsafe = if args.failsafe { ", failsafe mode" } else { "" };
    println!("chaos: {what}, {mode} replication{failsafe}; building three nodes, three etcd members, two routers");
    if preload.is_none() && !args.no_clock {
        println!("chaos: no libfaketime here (package libfaketime): clocks stay as they are");
    }

    let settings = Settings { mode: args.mode(), failsafe: args.failsafe };
    let world = World::build(settings, preload.as_deref())?;
    if args.keep {
        world.lab().keep();
    }
    let supervisor = tokio::spawn(world.clone().supervise());
    let outcome = play(&world, settings, seed, scheduled, &args).await;
    supervisor.abort();
    let _ = supervisor.await;

    let report = outcome?;
    report.save(&world.lab().dir().join("logs"))?;
    print!("{}", report.summary());
    let good = report.findings.violations.is_empty();
    if good {
        world.lab().success();
    }
    Ok(good)
}

async fn play(
    world: &Arc<World>,
    settings: Settings,
    seed: u64,
    scheduled: Option<Vec<Episode>>,
    args: &Args,
) -> Result<Report> {
    let start = wait::until("a whole cluster", START_LIMIT, async || world.whole(settings.mode.is_synchronous()).await);
    let leader = start.await?;
    let ready = wait::until("the routers", START_LIMIT, async || routed(world).await);
    ready.await?;
    let fence = world.fence(leader).await?;
    if let Err(why) = &fence {
        println!("chaos: no egress fence here ({why}): nodes are not frozen as a whole, unless a schedule says so");
    }
    let (episodes, limit): (Box<dyn Iterator<Item = Episode>>, Option<Duration>) = match scheduled {
        Some(episodes) => (Box::new(episodes.into_iter()), None),
        None => (Box::new(Draw::new(seed, args.allowed(fence.is_ok()))), Some(Duration::from_secs(60 * args.minutes))),
    };
    let wire = Wire::tap(world);
    if let Err(why) = &wire {
        println!("chaos: what routers send to a deposed leader is not looked at ({why:#})");
    }
    let recorder = Recorder::new(world, leader);
    let workload = Workload::start(world, &recorder, seed).await?;
    let began = world.journal().now();
    println!("chaos: whole after {:.1} s, logs in {}", seconds(began), world.lab().dir().join("logs").display());

    let mut played = Vec::new();
    let mut findings = Findings::default();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut interrupt = std::pin::pin!(async {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
    });
    for (number, episode) in episodes.enumerate() {
        let elapsed = Duration::from_micros(world.journal().now() - began);
        if limit.is_some_and(|limit| elapsed >= limit) || recorder.is_full() {
            break;
        }
        print!("{:3}:{:02} #{} {episode}", elapsed.as_secs() / 60, elapsed.as_secs() % 60, number + 1);
        let _ = std::io::stdout().flush();
        let turn = one_episode(world, &recorder, settings, episode, 100 * number as u64);
        let one = tokio::select! {
            one = turn => one,
            () = &mut interrupt => {
                println!("\nchaos: interrupted");
                break;
            }
        };
        println!(" | whole {:.1} s after the end", seconds(one.whole.unwrap_or(one.healed) - one.healed));
        let (stuck, played_until) = (one.stuck.clone(), one.healed);
        played.push(one);
        if let Some(why) = stuck {
            findings.violation(Kind::NotWhole, Some(played_until), format!("episode {}: {why}", number + 1));
            break;
        }
    }

    world.heal()?;
    world.journal().note("the clients end");
    workload.stop().await;
    let calls = recorder.take();
    let finals = match findings.violations.is_empty() {
        true => last_read(world, settings, &mut findings).await?,
        // Whoever takes writes now has what is left.
        false => {
            workload::finals(world.address(HostKind::Node(recorder.leader()), POSTGRES_PORT)).await.unwrap_or_default()
        }
    };
    let promises = Promises { synchronous: settings.mode.is_synchronous(), lag_limit: LAG_LIMIT };
    let judged = check::check(&calls, &finals, promises);
    findings.violations.extend(judged.violations);
    findings.notes.extend(judged.notes);
    if let Ok(wire) = wire {
        check::deposed(&wire.end(), &router_logs(world)?, &mut findings);
    }
    measure(&mut played, &calls);
    Ok(Report { seed, played, calls, finals, findings, elapsed: world.journal().now() - began })
}

fn router_logs(world: &World) -> Result<Vec<String>> {
    let routers = world.hosts().iter().filter(|host| matches!(host.kind, HostKind::Router(_)));
    let paths = routers.map(|host| world.lab().dir().join("logs").join(format!("{}.log", host.name)));
    paths.map(|path| std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))).collect()
}

/// A calm second, the faults, and the time until everything is as it should be.
async fn one_episode(
    world: &Arc<World>,
    recorder: &Arc<Recorder>,
    settings: Settings,
    episode: Episode,
    first_id: u64,
) -> Played {
    tokio::time::sleep(Duration::from_secs(1)).await;
    let began = world.journal().now();
    world.journal().note(&format!("EPISODE {episode}"));
    faults::play(world, recorder, &episode, first_id).await;
    let healed = world.journal().now();
    world.journal().note("HEALED");
    let whole = wait::until("a whole cluster after all faults ended", WHOLE_LIMIT, async || {
        world.whole(settings.mode.is_synchronous()).await?;
        routed(world).await?;
        ensure!(recorder.last_ack() > healed, "no client wrote since");
        Ok(())
    });
    let stuck = whole.await.err().map(|error| format!("{error:#}"));
    world.journal().note(stuck.as_deref().unwrap_or("WHOLE"));
    let whole = stuck.is_none().then(|| world.journal().now());
    Played { episode, began, healed, whole, outage: check::Gap::default(), stuck }
}

/// Every port of every router leads where it should.
async fn routed(world: &World) -> Result<()> {
    for router in 0..ROUTERS {
        for (port, standby) in [(READ_WRITE_PORT, "f"), (READ_ONLY_PORT, "t")] {
            let address = world.address(HostKind::Router(router), port);
            let rows = workload::query(address, "SELECT pg_is_in_recovery()", Duration::from_secs(3)).await;
            let rows = rows.with_context(|| format!("router {}", router + 1))?;
            ensure!(rows == [[standby]], "port {port} of router {} leads to the wrong side", router + 1);
        }
    }
    Ok(())
}

/// What the leader holds, once the standbys hold the same.
async fn last_read(world: &World, settings: Settings, findings: &mut Findings) -> Result<crate::history::Finals> {
    let leader =
        wait::until("a leader at the end", WHOLE_LIMIT, async || world.whole(settings.mode.is_synchronous()).await);
    let leader = leader.await?;
    let address = |node| world.address(HostKind::Node(node), POSTGRES_PORT);
    let finals = workload::finals(address(leader)).await?;
    for node in (0..NODES).filter(|node| *node != leader) {
        let same = wait::until("a standby that holds the same", Duration::from_secs(30), async || {
            let held = workload::finals(address(node)).await?;
            ensure!(held == finals, "{} rows, the leader has {}", held.rows.len(), finals.rows.len());
            Ok(())
        });
        if let Err(error) = same.await {
            findings.violation(Kind::Diverged, None, format!("node {}: {error:#}", node + 1));
        }
    }
    Ok(finals)
}

fn measure(played: &mut [Played], calls: &[Call]) {
    let acknowledgements = check::acknowledgements(calls);
    for one in played {
        one.outage = check::longest_gap(&acknowledgements, one.began, one.whole.unwrap_or(Micros::MAX));
    }
}

fn seconds(micros: Micros) -> f64 {
    micros as f64 / 1e6
}
