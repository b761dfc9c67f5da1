//! `make bench-failover`: the write outage that clients see, ours beside Patroni and HAProxy.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::{Value, json};
use trunkline_benches::failover::{Arrangement, Measured, measure, report};
use trunkline_tests::{Etcd, Lab, Program, patroni};

/// The write outage that clients see when the leader changes: Trunkline beside Patroni + HAProxy, one after the other on
/// the same etcd and PostgreSQL. Needs an idle machine.
#[derive(Debug, Parser)]
struct Args {
    /// How often each fault is done to ours
    #[arg(long, default_value_t = 10)]
    rounds: usize,

    /// How often to Patroni and HAProxy, tuned; 0 leaves them out
    #[arg(long, default_value_t = 5)]
    tuned_rounds: usize,

    /// How often to Patroni and HAProxy with the values of their documentation; 0 leaves them out
    #[arg(long, default_value_t = 2)]
    stock_rounds: usize,

    /// Without synchronous replication; a killed primary may then take acknowledged rows with it
    #[arg(long)]
    asynchronous: bool,

    /// Where the figures go
    #[arg(long, default_value = "target/bench-failover.json")]
    json: PathBuf,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let wanted = [
        (Arrangement::Trunkline, args.rounds),
        (Arrangement::Tuned, args.tuned_rounds),
        (Arrangement::Stock, args.stock_rounds),
    ];
    let lab = Lab::new("bench")?;
    let etcd = Etcd::start(&lab, 1).await?;
    let environment =
        environment(&lab, wanted.iter().any(|(which, rounds)| *which != Arrangement::Trunkline && *rounds > 0))?;

    let mut all: Vec<Measured> = Vec::new();
    for (arrangement, rounds) in wanted.into_iter().filter(|(_, rounds)| *rounds > 0) {
        eprintln!("{} ({})", arrangement.name(), arrangement.settings(!args.asynchronous));
        all.push(measure(&lab, &etcd, arrangement, !args.asynchronous, rounds).await?);
    }

    println!("{}\n", environment_line(&environment));
    all.iter().for_each(|measured| println!("* {}: {}", measured.arrangement.name(), measured.settings));
    println!("\n{}", report::outages(&all));
    if let Some(ours) = all.iter().find(|measured| measured.arrangement == Arrangement::Trunkline) {
        println!("\n{}", report::stages(ours));
    }
    println!();
    report::verdicts(&all).iter().for_each(|verdict| println!("* {verdict}"));

    if let Some(dir) = args.json.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("{}", dir.display()))?;
    }
    std::fs::write(&args.json, format!("{:#}\n", report::json(&all, &environment)))
        .with_context(|| format!("{}", args.json.display()))?;
    println!("\nevery figure: {}", args.json.display());
    if report::is_right(&all) {
        lab.success();
        return Ok(ExitCode::SUCCESS);
    }
    println!("WRONG: ours lost rows or had two primaries");
    Ok(ExitCode::FAILURE)
}

/// What the figures were measured on.
fn environment(lab: &Lab, with_peers: bool) -> Result<Value> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, model)| model);
    let mut environment = json!({
        "date": chrono::Utc::now().format("%Y-%m-%d").to_string(),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu": model,
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "postgresql": version(&Program::new(lab.tools().postgres_bin.join("postgres")), "--version"),
        "etcd": version(&Program::new(&lab.tools().etcd), "--version"),
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
    });
    if with_peers {
        environment["patroni"] = version(&patroni::program()?, "--version").into();
        environment["haproxy"] =
            version(&Program::new(trunkline_tests::tools::find_program("haproxy", "haproxy")?), "-v").into();
    }
    Ok(environment)
}

fn environment_line(environment: &Value) -> String {
    let Value::Object(fields) = environment else { return String::new() };
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    fields.iter().map(|(key, value)| format!("{key}: {}", text(value))).collect::<Vec<_>>().join(" · ")
}

/// The first line of what a program says about its version.
fn version(program: &Program, argument: &str) -> String {
    let output = Command::new(&program.path).arg(argument).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").trim().to_owned()
}
