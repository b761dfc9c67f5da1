//! `trunkline-router [--validate] router.yml`

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::system::uname;
use tokio::sync::oneshot;
use tracing::{error, info, warn};
use trunkline_common::SystemClock;
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::dcs::follow::Follower;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::telemetry;
use trunkline_config::router::Port;
use trunkline_config::{Env, RouterConfig};
use trunkline_router::admin::Admin;
use trunkline_router::handover::Taker;
use trunkline_router::listeners::{Inherited, Listeners};
use trunkline_router::probe::Prober;
use trunkline_router::registration::Registrar;
use trunkline_router::reload::Reloader;
use trunkline_router::server::{Background, Plan};
use trunkline_router::{Router, admin, follow, heard, memory, server, socket, survey};

/// How long a request to etcd may take, over all endpoints, before knowledge counts as doubtful.
const DCS_TIMEOUT: Duration = Duration::from_secs(3);

/// Leads applications to the right server of a PostgreSQL cluster.
#[derive(Debug, Parser)]
#[command(name = "trunkline-router", version)]
struct Arguments {
    /// router.yml; without it, the PATRONI_* environment alone.
    config: Option<PathBuf>,
    /// Check the configuration and exit.
    #[arg(long)]
    validate: bool,
    /// Unix socket by which a new process takes the listening sockets of this one over.
    #[arg(long, value_name = "PATH")]
    upgrade_sock: Option<PathBuf>,
    /// Take them over from the process that runs with the same socket, which then drains and ends. SIGUSR2 makes that process
    /// start the next one.
    #[arg(long, requires = "upgrade_sock")]
    upgrade: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let read = RouterConfig::load(arguments.config.as_deref(), &Env::of_process());
    let config = match read {
        Ok((config, notices)) => {
            notices.iter().for_each(|notice| eprintln!("{notice}"));
            config
        }
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.validate {
        return ExitCode::SUCCESS;
    }
    match run(config, arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Said here and not in the log: that may be what could not be opened.
            eprintln!("trunkline-router: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: RouterConfig, arguments: Arguments) -> anyhow::Result<()> {
    let _log = telemetry::init(&config.log).context("the log can't be opened")?;
    raise_file_limit(config.limits.max_sessions);
    look_at_memory(&config);
    let router = Router::new(config.limits)?;
    let threads = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    // With a hand-over the old process has the admin port until this one is in charge.
    let admin = match &config.admin {
        Some(listen) => Some((listen.clone(), bind_admin(listen, arguments.upgrade)?)),
        None => None,
    };
    check_etcd(&config)?;
    let prober = Prober::new(&config.ctl).context("ctl")?;
    let (taker, inherited) = match arguments.upgrade_sock.as_deref().filter(|_| arguments.upgrade) {
        Some(path) => {
            let taken = Taker::take(path).with_context(|| format!("no sockets from {}", path.display()));
            taken.map(|(taker, inherited)| (Some(taker), inherited))?
        }
        None => (None, Inherited::new()),
    };
    if let Some(after) = NonZeroU32::new(config.settle_after) {
        router.lean.start(threads, after).context("threads for sessions that just talk")?;
    }
    let (listeners, threads) = Listeners::new(router.clone(), threads);
    listeners.apply(&config.ports, inherited)?;
    let listeners = Arc::new(listeners);
    let reloader = Reloader {
        router: router.clone(),
        listeners: listeners.clone(),
        path: arguments.config,
        config: config.clone(),
    };
    let (begin, begun) = oneshot::channel();
    let background = background(config, router.clone(), prober, admin, begun, reloader);
    let upgrade_sock = arguments.upgrade_sock;
    server::run(Plan { router, listeners, threads, background, begin, upgrade_sock, taker, command: next_process() })?;
    Ok(())
}

/// The program that is now where this one was, told to take over.
fn next_process() -> Command {
    let mut arguments = std::env::args_os();
    let mut command = Command::new(arguments.next().unwrap_or_else(|| env!("CARGO_BIN_NAME").into()));
    command.args(arguments.filter(|argument| argument != "--upgrade")).arg("--upgrade");
    command
}

/// A session needs two descriptors. What the system permits is taken; if that is too little, it is said.
fn raise_file_limit(sessions: usize) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some() && limit.current != limit.maximum {
        let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
        if let Err(error) = raised {
            warn!(%error, "the limit of open files stays as it is");
        }
    }
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    if limit / 2 < sessions as u64 {
        warn!(limit, max_sessions = sessions, "too few open files are permitted for that many sessions: two for each");
    }
}

/// What must not happen is that sessions end because there are too many of them.
fn look_at_memory(config: &RouterConfig) {
    let sessions = config.limits.max_sessions;
    let needed = memory::needed(sessions, config.ports.iter().any(Port::speaks_tls));
    if let Some(limit) = memory::limit(Path::new("/")).filter(|limit| *limit < needed) {
        let (needed, limit) = (needed >> 20, limit >> 20);
        warn!(max_sessions = sessions, "that many sessions may need {needed} MiB of memory, and there are {limit}");
    }
}

fn bind_admin(listen: &str, shared: bool) -> anyhow::Result<std::net::TcpListener> {
    let bind = || {
        let address = socket::resolve(listen)?;
        if !shared {
            socket::check_free(address)?;
        }
        socket::bind(address)
    };
    bind().with_context(|| format!("the admin port can't listen on {listen}"))
}

/// What can't work with this configuration (certificate files) is said before anything listens.
fn check_etcd(config: &RouterConfig) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(EtcdDcs::connect(&config.etcd, SystemClock, DCS_TIMEOUT)).context("etcd3")?;
    Ok(())
}

/// Follows the cluster, serves the admin port, reloads.
fn background(
    config: RouterConfig,
    router: Arc<Router>,
    prober: Prober,
    admin: Option<(String, std::net::TcpListener)>,
    begun: oneshot::Receiver<()>,
    reloader: Reloader,
) -> Background {
    Box::pin(async move {
        let dcs = match EtcdDcs::connect(&config.etcd, SystemClock, DCS_TIMEOUT).await {
            Ok(dcs) => dcs,
            // The same has just worked in `check_etcd`.
            Err(error) => return error!(%error, "etcd3"),
        };
        if let Err(error) = reloader.start() {
            error!(%error, "changes of the configuration will not be seen");
        }
        tokio::spawn(survey::candidates(router.clone()));
        tokio::spawn(survey::settling(router.clone()));
        tokio::spawn(survey::silence(router.clone()));
        let paths = Paths::new(&config.namespace, &config.scope);
        info!(scope = config.scope, prefix = paths.prefix(), "following the cluster");
        tokio::spawn(dcs.clone().discover());
        let store = ClusterStore::new(dcs, paths);
        let own_name = format!("{}/{}", uname().nodename().to_string_lossy(), std::process::id());
        tokio::spawn(Registrar::new(store.clone(), SystemClock, own_name, &router.registration).run());
        let knowledge = Follower::spawn(store, SystemClock);
        if let Some((listen, listener)) = admin {
            let admin = Admin { router: router.clone(), knowledge: knowledge.clone() };
            let serve = async move {
                // An error means that the process ends.
                if begun.await.is_ok()
                    && let Err(error) = serve_admin(admin, listener).await
                {
                    warn!(listen, %error, "the admin port is closed");
                }
            };
            if let Err(error) = on_own_thread("admin", serve) {
                error!(%error, "the admin port is not served");
            }
        }
        tokio::spawn(survey::positions(router.clone(), prober.clone(), knowledge.clone()));
        let seed = Some(&config.members).filter(|members| !members.is_empty()).map(|members| heard::seed(members));
        follow::run(router, prober, knowledge, seed).await;
    })
}

/// What may take long at a time: nobody shall learn of a new leader late by it.
fn on_own_thread(name: &str, work: impl Future<Output = ()> + Send + 'static) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(name.into()).spawn(move || runtime.block_on(work)).map(drop)
}

async fn serve_admin(admin: Admin, listener: std::net::TcpListener) -> std::io::Result<()> {
    socket::begin_to_listen(&listener)?;
    admin::serve(admin, tokio::net::TcpListener::from_std(listener)?).await
}
