//! Patroni from PyPI, as a node's agent, and its `patronictl`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::json;

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

/// What a command line says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Said {
    /// The exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// `patronictl`, loaded once for many command lines. It ends when this is dropped.
#[derive(Debug)]
pub struct Ctl {
    cases: ChildStdin,
    answers: BufReader<ChildStdout>,
    _process: Child,
}

impl Ctl {
    /// Loads it.
    ///
    /// # Errors
    /// It is not there, or does not start.
    pub fn load(environment: &[(&str, String)]) -> Result<Self> {
        let mut command = Command::new(program()?.path.with_file_name("python3"));
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/patronictl.py"));
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("patronictl")?;
        let cases = process.stdin.take().context("its input")?;
        let answers = BufReader::new(process.stdout.take().context("its output")?);
        Ok(Self { cases, answers, _process: process })
    }

    /// Carries out a command line with that typed.
    ///
    /// # Errors
    /// It can't be asked any more.
    pub fn run(&mut self, arguments: &[&str], input: &str) -> Result<Said> {
        writeln!(self.cases, "{}", json!({ "arguments": arguments, "input": input }))?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("no answer about {arguments:?}"))
    }
}
