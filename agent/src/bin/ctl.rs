//! `trunklinectl`, the operator's command line.

use std::process::ExitCode;

use clap::Parser;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    trunkline_agent::ctl::run(trunkline_agent::ctl::Cli::parse()).await
}
