//! `trunklinectl`: patronictl's commands for clusters of Trunkline and Patroni alike.
//!
//! Commands, options, prompts, texts and exit codes are patronictl's, so that scripts written for it go on working. It
//! reads the DCS linearizably and acts through the members' REST APIs; what it writes to the DCS itself is the
//! configuration (`edit-config`), the switchover request where no REST API answers, and `remove`.

mod args;
mod change;
mod context;
mod edit;
mod error;
mod inquire;
mod list;
mod members;
mod output;
mod pause;
mod prompt;
mod query;
mod reinit;
mod remove;
mod rest;
mod restart;
mod router;
mod select;
mod show;
mod standby;
pub mod table;
mod text;
mod values;
mod yaml;

use std::process::ExitCode;

pub use args::Cli;
pub use error::CtlError;

use args::Command;
use context::Context;

/// Carries out a command line; says on standard error why it did not work.
pub async fn run(cli: Cli) -> ExitCode {
    // An error means that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    if let Command::Demo(args) = cli.command {
        return demo(args).await;
    }
    match dispatch(&cli).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(error.report()),
    }
}

async fn demo(args: crate::lab::demo::DemoArgs) -> ExitCode {
    match crate::lab::demo::run(args).await {
        Ok(code) => code,
        Err(error) => {
            error::complain(&format!("Error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn dispatch(cli: &Cli) -> error::Result<()> {
    if let Command::Version(args) = &cli.command
        && args.cluster.is_none()
    {
        return show::version(None, args).await;
    }
    if let Command::Router(args::RouterCommand::Top(args)) = &cli.command {
        return router::top(args).await;
    }
    let context = &Context::open(cli).await?;
    match &cli.command {
        Command::List(args) => list::list(context, args).await,
        Command::Topology(args) => list::topology(context, args).await,
        Command::History(args) => show::history(context, args).await,
        Command::Decisions(args) => show::decisions(context, args).await,
        Command::Why(args) => inquire::why(context, args).await,
        Command::Rto(args) => inquire::rto(context, args).await,
        Command::Config(args) => match &args.command {
            args::ConfigCommand::Explain(args) => inquire::explain(context, args).await,
        },
        Command::ShowConfig(args) => show::show_config(context, args).await,
        Command::EditConfig(args) => edit::edit_config(context, args).await,
        Command::Switchover(args) => change::switchover(context, args).await,
        Command::Failover(args) => change::failover(context, args).await,
        Command::DemoteCluster(args) => standby::demote(context, args).await,
        Command::PromoteCluster(args) => standby::promote(context, args).await,
        Command::Restart(args) => restart::restart(context, args).await,
        Command::Reload(args) => restart::reload(context, args).await,
        Command::Reinit(args) => reinit::reinit(context, args).await,
        Command::Pause(args) => pause::set(context, args, true).await,
        Command::Resume(args) => pause::set(context, args, false).await,
        Command::Flush(args) => restart::flush(context, args).await,
        Command::Remove(args) => remove::remove(context, args).await,
        Command::Dsn(args) => show::dsn(context, args).await,
        Command::Query(args) => query::query(context, args).await,
        Command::Version(args) => show::version(Some(context), args).await,
        Command::Router(_) | Command::Demo(_) => Ok(()),
    }
}
