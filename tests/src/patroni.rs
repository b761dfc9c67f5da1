//! Patroni from PyPI, as a node's agent.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::Program;

/// The version that `tools/patroni-venv` installs.
const VERSION: &str = "4.1.4";

/// Patroni of the environment that `tools/patroni-venv` makes.
///
/// # Errors
/// That was not run.
pub fn program() -> Result<Program> {
    let path = venv().join("bin/patroni");
    ensure!(path.is_file(), "{} is missing; install it: tools/patroni-venv", path.display());
    Ok(Program::new(path))
}

/// Patroni's command line client.
///
/// # Errors
/// See [`program`].
pub fn ctl() -> Result<Program> {
    program().map(|patroni| Program::new(patroni.path.with_file_name("patronictl")))
}

/// Where `tools/patroni-venv` puts it: for root a place that the unprivileged user of the tests can reach.
fn venv() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return format!("/var/tmp/trunkline-patroni-{VERSION}").into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/patroni-venv")
}
