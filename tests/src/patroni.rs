//! Patroni from PyPI, as a node's agent.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::Program;

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

fn venv() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    workspace.join("target/patroni-venv")
}
