//! `trunklinectl demo`: a whole cluster in the foreground, to look at or, with `--check`, to be tried out by itself.

mod check;
mod live;

use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::{Cluster, Etcd, Lab, Program, Proxy, Spec, proxy};

/// Arguments of `trunklinectl demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoArgs {
    /// Try it without a person: write, kill the primary's postmaster, switch over, kill a whole node; measure each write
    /// outage, verify that nothing acknowledged is missing, end everything and exit with 0 or 1
    #[arg(long)]
    pub check: bool,

    /// How many nodes to start
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=7))]
    pub nodes: u8,

    /// The port that leads to the primary
    #[arg(long, default_value_t = 5000)]
    pub rw_port: u16,

    /// The port that leads to the standbys
    #[arg(long, default_value_t = 5001)]
    pub ro_port: u16,

    /// Keep data, logs and configuration at the end and say where they are
    #[arg(long)]
    pub keep: bool,
}

/// Starts etcd, the nodes and a router below `/tmp`, shows them or checks them, and ends them again. Ctrl-C and SIGTERM
/// end it at any time, and remove everything.
///
/// # Errors
/// What is missing on this machine (programs, ports), or what did not come up. What a check finds wrong is printed and
/// makes the exit code 1.
pub async fn run(args: DemoArgs) -> Result<ExitCode> {
    if args.rw_port == args.ro_port {
        bail!("--rw-port and --ro-port are both {}: they must differ", args.rw_port);
    }
    // Held until the router takes them, so that nobody else does while the cluster comes up.
    let held = [reserve("--rw-port", args.rw_port)?, reserve("--ro-port", args.ro_port)?];
    let (agent, router) = (Program::agent()?, Program::router()?);
    let lab = Lab::new("demo")?;
    if args.keep {
        lab.keep();
    }

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let outcome = tokio::select! {
        outcome = go(&lab, &args, agent, router, held) => outcome,
        _ = interrupt.recv() => Ok(ended_early(&args)),
        _ = terminate.recv() => Ok(ended_early(&args)),
    };
    // Whoever asked it to stop or saw it succeed has no use for the logs.
    if matches!(outcome, Ok(Outcome::Done | Outcome::Stopped)) {
        lab.success();
    }
    println!("ending every process …");
    drop(lab);
    match outcome? {
        Outcome::Done => Ok(ExitCode::SUCCESS),
        Outcome::Stopped if !args.check => Ok(ExitCode::SUCCESS),
        Outcome::Stopped | Outcome::Wrong => Ok(ExitCode::FAILURE),
    }
}

/// How a demo ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The check found everything right.
    Done,
    /// It found something wrong, and said so.
    Wrong,
    /// A signal ended it.
    Stopped,
}

/// What runs.
struct Demo {
    cluster: Cluster,
    router: Proxy,
    _etcd: Etcd,
}

impl Demo {
    fn password(&self) -> &str {
        &self.cluster.spec().password
    }
}

async fn go(lab: &Lab, args: &DemoArgs, agent: Program, router: Program, held: Held) -> Result<Outcome> {
    let mut demo = start(lab, args, agent, router, held).await?;
    if args.check { check::run(&mut demo).await } else { live::run(lab, &mut demo).await }
}

async fn start(lab: &Lab, args: &DemoArgs, agent: Program, router: Program, held: Held) -> Result<Demo> {
    let tools = lab.tools();
    println!("PostgreSQL {} and etcd, {} nodes, below {}", tools.postgres_major, args.nodes, lab.dir().display());
    println!("starting etcd …");
    let etcd = Etcd::start(lab, 1).await?;
    println!("starting {} agents: the first one makes the cluster, the others copy it …", args.nodes);
    let spec = Spec::new(args.nodes.into(), &agent);
    let cluster = Cluster::start(lab, &etcd.endpoints(), spec).await?;
    println!("starting the router …");
    let ports = proxy::Ports { read_write: args.rw_port, read_only: args.ro_port, admin: lab.port()? };
    let scope = &cluster.spec().scope;
    drop(held);
    let router = Proxy::router(lab, router, ports, scope, &etcd.endpoints(), &json!({})).await?;
    Ok(Demo { cluster, router, _etcd: etcd })
}

fn ended_early(args: &DemoArgs) -> Outcome {
    println!();
    if args.check {
        println!("interrupted: nothing is proven");
    }
    Outcome::Stopped
}

/// The ports of the router, taken.
type Held = [TcpListener; 2];

fn reserve(option: &str, port: u16) -> Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .with_context(|| format!("port {port} of 127.0.0.1 can't be used; choose another one with {option}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_named_with_the_option_to_change() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = format!("{:#}", reserve("--rw-port", port).unwrap_err());
        assert!(error.starts_with(&format!("port {port} of 127.0.0.1 can't be used")), "{error}");
        assert!(error.contains("--rw-port") && error.contains("in use"), "{error}");
    }
}
