//! `sim`: runs seeds, replays one, shrinks what fails.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use clap::builder::PossibleValuesParser;
use parking_lot::Mutex;
use trunkline_common::{Clock, SystemClock};
use trunkline_sim::draw::scenes;
use trunkline_sim::scenario::Scenario;
use trunkline_sim::world::{self, Report};
use trunkline_sim::{shrink, trace};

/// A world is a million of small things that live for an instant: a fifth of the time was the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs the HA loop in simulated worlds, each from one seed, and looks for what must never happen.
#[derive(Parser)]
#[command(name = "sim", version)]
struct Args {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Stop after so long, whatever is left.
    #[arg(long)]
    minutes: Option<f64>,
    /// Replay this seed alone, with a trace.
    #[arg(long, conflicts_with_all = ["seeds", "from", "scenario"])]
    seed: Option<u64>,
    /// Every world has this scene, not only one in many.
    #[arg(long, value_parser = PossibleValuesParser::new(scenes::names()))]
    scene: Option<String>,
    /// Replay a scenario from a file, with a trace.
    #[arg(long, conflicts_with = "scene")]
    scenario: Option<PathBuf>,
    /// With --seed or --scenario: no trace, only the verdict.
    #[arg(short, long)]
    quiet: bool,
    /// With --seed or --scenario: everything, not only what happens.
    #[arg(short, long)]
    debug: bool,
    /// Leave events out of a failing scenario as long as it fails, and print what is left.
    #[arg(long)]
    shrink: bool,
    /// Go on after a failing seed.
    #[arg(long)]
    keep_going: bool,
    /// Count only violations whose text contains one of these (`TEXT|TEXT`).
    #[arg(long, value_delimiter = '|')]
    only: Vec<String>,
    /// How many threads.
    #[arg(long)]
    threads: Option<usize>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let scenario = match (&args.scenario, args.seed) {
        (Some(path), _) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            Some(serde_json::from_str(&text).with_context(|| path.display().to_string())?)
        }
        (None, seed) => seed.map(|seed| Scenario::draw_with(seed, args.scene.as_deref())),
    };
    match scenario {
        Some(scenario) => replay(&args, &scenario),
        None => Ok(many(&args)),
    }
}

fn replay(args: &Args, scenario: &Scenario) -> anyhow::Result<ExitCode> {
    let scenario = if args.shrink { shrink::shrink(scenario) } else { scenario.clone() };
    if args.shrink {
        println!("{}", serde_json::to_string(&scenario)?);
    }
    if !args.quiet {
        trace::print(if args.debug { tracing::Level::DEBUG } else { tracing::Level::INFO });
    }
    let report = world::run(&scenario);
    println!(
        "seed {}: {} events, {} times somebody began to take writes, {} writes acknowledged, {} steps, whole again after {:?}",
        scenario.seed,
        scenario.events.len(),
        report.reigns,
        report.acked,
        report.polls,
        report.healed
    );
    report.violations.iter().for_each(|violation| println!("VIOLATION {violation}"));
    Ok(if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What many worlds have in common.
#[derive(Default)]
struct Tally {
    failed: Vec<(u64, Report)>,
    reigns: u64,
    acked: u64,
    slowest_leader: (Duration, u64),
    slowest_whole: (Duration, u64),
}

fn many(args: &Args) -> ExitCode {
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let (next, done) = (AtomicU64::new(args.from), AtomicU64::new(0));
    let tally = Mutex::new(Tally::default());
    let begin = SystemClock.now();
    let end = args.minutes.map(|minutes| begin + Duration::from_secs_f64(minutes * 60.0));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let over = end.is_some_and(|end| SystemClock.now() >= end);
            if seed >= args.from + args.seeds || over || (!args.keep_going && !tally.lock().failed.is_empty()) {
                return;
            }
            let mut report = world::run(&Scenario::draw_with(seed, args.scene.as_deref()));
            let counts =
                |violation: &String| args.only.is_empty() || args.only.iter().any(|text| violation.contains(text));
            report.violations.retain(counts);
            let mut tally = tally.lock();
            tally.reigns += report.reigns;
            tally.acked += report.acked as u64;
            if let Some((leader, whole)) = report.healed {
                tally.slowest_leader = tally.slowest_leader.max((leader, seed));
                tally.slowest_whole = tally.slowest_whole.max((whole, seed));
            }
            if !report.violations.is_empty() {
                println!("\rseed {seed}: {}", report.violations.join("\n    "));
                tally.failed.push((seed, report));
            }
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(200) {
                let rate = done as f64 / SystemClock.now().since(begin).as_secs_f64();
                eprint!("\r{done} of {} seeds, {rate:.0} a second, {} failed ", args.seeds, tally.failed.len());
            }
        }
    };
    std::thread::scope(|scope| {
        (0..threads).for_each(|_| {
            scope.spawn(work);
        });
    });
    let (tally, done, elapsed) = (tally.into_inner(), done.into_inner(), SystemClock.now().since(begin).as_secs_f64());
    eprintln!();
    println!(
        "{done} seeds in {elapsed:.1} s ({:.0} a second): {} failed; {} reigns, {} acknowledged writes",
        done as f64 / elapsed,
        tally.failed.len(),
        tally.reigns,
        tally.acked
    );
    println!(
        "slowest to have a leader again: {:.1?} (seed {}), to be whole: {:.1?} (seed {})",
        tally.slowest_leader.0, tally.slowest_leader.1, tally.slowest_whole.0, tally.slowest_whole.1
    );
    for (seed, _) in &tally.failed {
        println!("replay with: sim --seed {seed}      shrink with: sim --seed {seed} --shrink");
    }
    if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
