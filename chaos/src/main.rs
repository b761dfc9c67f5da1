//! `make chaos`: see [`trunkline_chaos`].

use std::process::ExitCode;

use clap::Parser;
use trunkline_chaos::{isolate, run};

fn main() -> ExitCode {
    let args = run::Args::parse();
    if args.print.is_none() && !isolate::is_isolated() {
        let Err(error) = isolate::enter() else { return ExitCode::SUCCESS };
        eprintln!("chaos: {error:#}");
        return ExitCode::from(2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().worker_threads(2).build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("chaos: {error}");
            return ExitCode::from(2);
        }
    };
    match runtime.block_on(run::run(args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::from(2)
        }
    }
}
