//! `trunkline-agent`: arguments, configuration, runtime and signals. What it does is in the library.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use sd_notify::NotifyState;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};
use trunkline_agent::guard::{self, Guard, HostGuard};
use trunkline_agent::ha::{Exit, Ha, Parts};
use trunkline_agent::init;
use trunkline_agent::node::{Board, Command};
use trunkline_agent::peer::RestClient;
use trunkline_agent::postgres::{Instance, Postgres};
use trunkline_agent::rest::{Api, Edges, Server};
use trunkline_agent::rto;
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::dcs::follow::{Follower, Knowledge};
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::shutdown::Signals;
use trunkline_common::telemetry::{self, Telemetry};
use trunkline_common::{Clock, MemberName, SystemClock};
use trunkline_config::explain::Sources;
use trunkline_config::{Env, Local, PostgresConfig, Problem, Settings};

/// Runs one PostgreSQL of a highly available cluster; reads Patroni's patroni.yml.
#[derive(Parser)]
#[command(name = "trunkline-agent", version)]
struct Args {
    /// The configuration file, or a directory of them. Without one, PATRONI_CONFIGURATION or PATRONI_* variables are read.
    config: Option<PathBuf>,
    /// Check the configuration, say everything that is wrong with it, and exit.
    #[arg(long, alias = "validate-config")]
    validate: bool,
    /// With --validate: don't complain about ports that are in use.
    #[arg(short, long)]
    ignore_listen_port: bool,
    /// With --validate: print the configuration that results from file and environment.
    #[arg(short, long)]
    print: bool,
    /// Not for people: the agent starts itself with this as the guard of a data directory.
    #[arg(long, hide = true, value_name = "DATA_DIR")]
    guard: Option<PathBuf>,
    /// Not for people: what the server's program is called where that is not `postgres…`.
    #[arg(long, hide = true, value_name = "FILE_NAME")]
    guard_program: Option<OsString>,
    /// Not for people: an address that the guard gives up.
    #[arg(long, hide = true, value_name = "INTERFACE=ADDRESS")]
    guard_vip: Vec<String>,
}

/// Bound of the queue of commands from REST and signals.
const COMMANDS: usize = 64;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(data_dir) = &args.guard {
        return guard::run(data_dir, args.guard_program.clone(), guard::vip::Vip::of_arguments(&args.guard_vip));
    }
    if init::is_needed() {
        return contain();
    }
    // What this process may do is not for the programs that it starts.
    let _ = rustix::thread::clear_ambient_capability_set();
    let env = Env::of_process();
    if args.validate {
        return validate(&args, &env);
    }
    let (local, notices) = match Local::load(args.config.as_deref(), &env) {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::FAILURE;
        }
    };
    let log = match telemetry::init(&local.log) {
        Ok(log) => Arc::new(log),
        Err(error) => {
            eprintln!("the log can't be opened: {error}");
            return ExitCode::FAILURE;
        }
    };
    for notice in notices {
        warn!("{notice}");
    }
    end_with_any_panic(log.clone());
    // Two threads: one may be busy with a small file while the other renews the lease.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let ended = runtime.context("the runtime could not be started").and_then(|runtime| {
        let ended = runtime.block_on(Box::pin(run(args.config.clone(), env, local, log.clone())));
        runtime.shutdown_timeout(Duration::from_secs(1));
        ended
    });
    let code = match ended {
        Ok(Exit::Stopped) => ExitCode::SUCCESS,
        Ok(Exit::Refused(_)) => ExitCode::FAILURE,
        Err(error) => {
            error!(critical = true, "{error:#}");
            ExitCode::FAILURE
        }
    };
    // The hook above keeps it until the very end: nothing drops it.
    log.flush();
    code
}

/// As the first process of a container: this very program once more, as a child.
fn contain() -> ExitCode {
    let mut command = std::process::Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1));
    init::run(&mut command).unwrap_or_else(|error| {
        eprintln!("the agent can't be started: {error}");
        ExitCode::FAILURE
    })
}

/// An agent of which a part has died must not go on: without its keeper nobody would fence PostgreSQL. The supervisor
/// starts it again, and it takes the running server over.
fn end_with_any_panic(log: Arc<Telemetry>) {
    std::panic::set_hook(Box::new(move |panic| {
        error!(critical = true, "a defect of the agent: {panic}");
        log.flush();
        std::process::abort();
    }));
}

fn validate(args: &Args, env: &Env) -> ExitCode {
    let (mut problems, notices) = trunkline_config::validate::validate(args.config.as_deref(), env);
    let loaded = Local::load(args.config.as_deref(), env).map(|(local, _)| local);
    if let Ok(local) = &loaded
        && !args.ignore_listen_port
    {
        problems.extend(ports_in_use(local, args.config.as_deref()));
    }
    for notice in notices {
        eprintln!("{notice}");
    }
    for problem in &problems {
        eprintln!("{problem}");
    }
    match loaded {
        Ok(local) if problems.is_empty() => {
            if args.print {
                // Whoever reads it may have seen enough.
                let _ = std::io::stdout().write_all(trunkline_config::yaml::to_yaml(&local.raw).as_bytes());
            }
            ExitCode::SUCCESS
        }
        _ => ExitCode::FAILURE,
    }
}

/// The ports that the agent would listen on and that somebody else has.
fn ports_in_use(local: &Local, file: Option<&Path>) -> Vec<Problem> {
    let (config, _) = PostgresConfig::effective(local, &Settings::default());
    let server =
        format!("{}:{}", config.listen_addresses.split(',').next().unwrap_or("*").replace('*', "0.0.0.0"), config.port);
    let taken = |(path, address): (&str, &str)| {
        let error = std::net::TcpListener::bind(address).err()?;
        Some(Problem {
            source: file.map_or("environment".to_owned(), |file| file.display().to_string()),
            path: path.to_owned(),
            value: Some(address.to_owned()),
            expected: format!("can't be listened on: {error}"),
            remedy: Some(
                "choose another port, or say --ignore-listen-port if it is this node that runs already".to_owned(),
            ),
        })
    };
    [("restapi.listen", local.restapi.listen.as_str()), ("postgresql.listen", server.as_str())]
        .into_iter()
        .filter_map(taken)
        .collect()
}

async fn run(path: Option<PathBuf>, env: Env, local: Local, log: Arc<Telemetry>) -> anyhow::Result<Exit> {
    let signals = Signals::listen().context("signals can't be received")?;
    let clock = SystemClock;
    let name = MemberName::from(local.name.as_str());
    let (config, _) = PostgresConfig::effective(&local, &Settings::default());
    let postgres = Instance::new(config, &local.scope, name.clone(), clock)?;
    let etcd = EtcdDcs::connect(&local.etcd, clock, Duration::from_secs(1)).await.context("etcd3")?;
    let store = ClusterStore::new(etcd.clone(), Paths::new(&local.namespace, &local.scope));
    let knowledge = Follower::spawn(store.clone(), clock);
    let client = RestClient::for_agent(&local)?;

    if let Some(taken) = another_of_this_name(&store, &client, &local).await {
        anyhow::bail!("Can't start; there is already a node named '{name}' running ({taken})");
    }

    let (board, board_seen) = watch::channel(Board::starting(clock.now()));
    let (commands, commands_received) = mpsc::channel(COMMANDS);
    let api = Api::new(
        &local,
        store.clone(),
        knowledge.clone(),
        board_seen.clone(),
        commands.clone(),
        postgres.clone(),
        clock,
    )?;
    let asked = etcd.clone();
    let api = Arc::new(api.with_edges(Edges {
        sources: Sources { path: path.clone(), env: env.clone() },
        latency: Box::new(move || asked.latency()),
    }));
    let server = Server::bind(api.clone()).await?;
    // From here on no other agent of this node runs.
    let guard = start_guard(&postgres, &local);

    let (stop, stopped) = watch::channel(false);
    let mut rest_stopped = stopped.clone();
    tokio::spawn(server.run(async move {
        let _ = rest_stopped.wait_for(|stop| *stop).await;
    }));
    tokio::spawn(tell_rto(etcd.clone(), knowledge.clone(), postgres.clone()));
    tokio::spawn(etcd.clone().discover());
    tokio::spawn(apply_retry_timeout(etcd.clone(), knowledge.clone()));
    tokio::spawn(tell_systemd(board_seen));

    let (reload_env, peers) = (env.clone(), api.peers());
    let reload = move |running: &Local| {
        // For Type=notify-reload: from here to READY.
        let now = NotifyState::monotonic_usec_now();
        let _ = now.and_then(|now| sd_notify::notify(&[NotifyState::Reloading, now]));
        let _ready = Readier;
        let (mut local, notices) = Local::load(path.as_deref(), &reload_env).map_err(|errors| errors.to_string())?;
        for notice in notices {
            warn!("{notice}");
        }
        for key in local.keep_until_restart(running) {
            warn!("{key} has changed, which takes effect when the agent is restarted: it stays as it was until then");
        }
        if let Err(error) = log.set_level(&local.log.level) {
            warn!("the log keeps its level: {error}");
        }
        if let Err(error) = api.reload(&local) {
            warn!("the REST API keeps its old settings: {error}");
            // Members must not be sent to where nobody listens.
            local.restapi = running.restapi.clone();
        }
        match etcd.reload(&local.etcd) {
            Ok(true) => info!("etcd is asked as etcd3 says now"),
            Ok(false) => {}
            Err(error) => warn!("etcd is asked as before: etcd3: {error}"),
        }
        Ok(local)
    };
    let parts = Parts {
        store,
        knowledge,
        peers,
        guard: guard.clone(),
        postgres,
        clock,
        local,
        reload: Box::new(reload),
        board,
        commands: commands_received,
    };
    // The keeper outlives the loop's shutdown: the hand-over needs its lease until the very end.
    let (keeper_stop, keeper_stopped) = watch::channel(false);
    let (ha_stop, ha_stopped) = watch::channel(false);
    tokio::spawn(obey(signals, ha_stop, commands));
    let exit = Box::pin(Ha::new(parts, keeper_stopped).run(ha_stopped)).await;
    keeper_stop.send_replace(true);
    stop.send_replace(true);
    guard.end();
    info!("ended");
    Ok(exit)
}

/// Tells systemd that a reload is over, also where it has failed.
struct Readier;

impl Drop for Readier {
    fn drop(&mut self) {
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }
}

/// SIGTERM and SIGINT end the agent in order; SIGHUP reads the file again.
async fn obey(signals: Signals, stop: watch::Sender<bool>, commands: mpsc::Sender<Command>) {
    let mut reload = signals.reload.clone();
    loop {
        tokio::select! {
            () = signals.stopped() => {
                let _ = sd_notify::notify(&[NotifyState::Stopping]);
                stop.send_replace(true);
                return;
            }
            Ok(()) = reload.changed() => {
                let _ = commands.send(Command::Reload).await;
            }
        }
    }
}

/// Before anything can take writes. A deadline that was left behind is good for the server that was left with it.
fn start_guard(postgres: &Instance, local: &Local) -> Arc<HostGuard> {
    let (data_dir, program) = (postgres.config().data_dir, postgres.server().program);
    let guard = HostGuard::start(&data_dir, program, local.guard.egress, &local.watchdog, local.vip.as_ref());
    if guard.deadline().is_some() && !postgres.has_processes() {
        guard.disarm();
    }
    postgres.fence_egress(guard.egress());
    Arc::new(guard)
}

/// Whether another process answers under this name: two of them would both think that they hold the leader key.
async fn another_of_this_name<C: Clock>(
    store: &ClusterStore<EtcdDcs<C>>,
    client: &RestClient,
    local: &Local,
) -> Option<String> {
    let view = store.read().await.ok()?;
    let url = view.members.get(&MemberName::from(local.name.as_str()))?.api_url.clone()?;
    let endpoint = trunkline_agent::peer::endpoint(&url, "/liveness");
    client.request("GET", &endpoint, None, Duration::from_secs(3)).await.ok()?;
    Some(url)
}

/// One call to etcd may take as long as `retry_timeout` says, which is a setting in etcd.
async fn apply_retry_timeout<C: Clock>(etcd: EtcdDcs<C>, mut knowledge: watch::Receiver<Knowledge>) {
    let mut current = None;
    while knowledge.changed().await.is_ok() {
        let wanted = knowledge.borrow_and_update().view.as_ref().map(|view| view.settings.retry_timeout);
        if let Some(timeout) = wanted.filter(|_| wanted != current) {
            etcd.set_retry_timeout(timeout);
            current = wanted;
        }
    }
}

/// How long writes will be out, as far as that is known a little after the start; and again where the times are changed or
/// the DCS has become too slow for them.
async fn tell_rto<C: Clock>(etcd: EtcdDcs<C>, mut knowledge: watch::Receiver<Knowledge>, postgres: Instance) {
    let mut told = None;
    while knowledge.wait_for(|knowledge| knowledge.view.is_some()).await.is_ok() {
        // Some renewals first.
        tokio::time::sleep(Duration::from_secs(if told.is_none() { 5 } else { 60 })).await;
        let Some(settings) = knowledge.borrow().view.as_ref().map(|view| view.settings.clone()) else { continue };
        let estimate = rto::estimate(&settings, &etcd.latency(), postgres.took());
        let times = (settings.ttl, settings.retry_timeout, settings.primary_start_timeout);
        let news = (times, !estimate.warnings.is_empty());
        if told != Some(news) {
            info!("how long writes will be out: {estimate}");
            estimate.warnings.iter().for_each(|warning| warn!("{warning}"));
            told = Some(news);
        }
    }
}

/// READY after the first turn of the loop: from then on the node takes part. After that what it is and does, for
/// `systemctl status`, whenever that changes.
async fn tell_systemd(mut board: watch::Receiver<Board>) {
    let mut told = None;
    while board.changed().await.is_ok() {
        let status = {
            let board = board.borrow_and_update();
            let task = board.task.as_ref().map(|task| format!(" ({task})")).unwrap_or_default();
            format!("{}, {}{task}: {}", board.role, board.state, board.decision)
        };
        if told.as_ref() == Some(&status) {
            continue;
        }
        let line = NotifyState::Status(&status);
        let _ = match told {
            None => sd_notify::notify(&[NotifyState::Ready, line]),
            Some(_) => sd_notify::notify(&[line]),
        };
        told = Some(status);
    }
}
