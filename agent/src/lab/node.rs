//! One node: an agent (or Patroni) and the PostgreSQL it runs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use serde_json::Value;

use super::cgroup::Cgroup;
use super::place::Lab;
use super::process::{self, Proc};
use super::rest;
use super::tools::Program;
use super::wait;
use super::workload::Target;

/// One member of a cluster. Dropping it kills the agent; PostgreSQL ends with the lab.
#[derive(Debug)]
pub struct Node {
    name: String,
    lab: Lab,
    dir: PathBuf,
    program: Program,
    rest_port: u16,
    port: u16,
    local: Value,
    config: PathBuf,
    proc: Option<Proc>,
    cgroup: Option<Cgroup>,
}

/// The data directory's name below the node's.
const DATA: &str = "data";

impl Node {
    pub(super) fn new(lab: &Lab, name: &str, program: Program, local: Value) -> Result<Self> {
        let dir = lab.make_dir(name)?;
        let (rest_port, port) = (lab.port()?, lab.port()?);
        let config = PathBuf::new();
        let name = name.to_owned();
        let (proc, cgroup) = (None, None);
        Ok(Self { name, lab: lab.clone(), dir, program, rest_port, port, local, config, proc, cgroup })
    }

    /// The member's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its REST port.
    pub fn rest_port(&self) -> u16 {
        self.rest_port
    }

    /// PostgreSQL's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The node's directory: everything of it works in here.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// PostgreSQL's data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join(DATA)
    }

    /// The agent's configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// What of `patroni.yml` is this node's own.
    pub fn local(&self) -> &Value {
        &self.local
    }

    pub(super) fn postgres_bin(&self) -> &Path {
        &self.lab.tools().postgres_bin
    }

    /// Writes the agent's configuration file. A running agent reads it after [`Node::reload`].
    ///
    /// # Errors
    /// It can't be written.
    pub fn configure(&mut self, patroni_yml: &str) -> Result<()> {
        self.config = self.lab.write_config(&format!("{}.yml", self.name), patroni_yml)?;
        Ok(())
    }

    /// From the next start on it runs in a cgroup of its own.
    pub(super) fn confine(&mut self) -> Result<()> {
        self.cgroup = Some(self.lab.cgroup(&format!("{}-{}", self.name, self.rest_port))?);
        Ok(())
    }

    /// Its cgroup, where it has one.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Replaces the program that will be started next time.
    pub fn replace_program(&mut self, program: Program) {
        self.program = program;
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// It runs already, or does not start.
    pub fn start(&mut self) -> Result<()> {
        ensure!(!self.is_running(), "{} runs already", self.name);
        let mut command = match &self.cgroup {
            Some(cgroup) => self.lab.command_in(cgroup, &self.program, &self.dir)?,
            None => self.lab.command(&self.program, &self.dir)?,
        };
        command.arg(&self.config);
        self.proc = Some(self.lab.spawn(&self.name, command)?);
        Ok(())
    }

    /// Whether the agent runs.
    pub fn is_running(&mut self) -> bool {
        self.proc.as_mut().is_some_and(|proc| proc.ended().is_none())
    }

    /// The agent's process, if it was started.
    pub fn agent(&mut self) -> Option<&mut Proc> {
        self.proc.as_mut()
    }

    /// Asks the agent to end (SIGTERM) and waits until it and its PostgreSQL are gone.
    ///
    /// # Errors
    /// They are not within `limit`, or the agent said it failed.
    pub async fn stop(&mut self, limit: Duration) -> Result<()> {
        let Some(mut proc) = self.proc.take() else { return Ok(()) };
        let status = proc.terminate(limit).await.with_context(|| format!("stopping {}", self.name))?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        let left = process::below(&self.dir);
        ensure!(left.is_empty(), "{} ended but left processes: {left:?}", self.name);
        Ok(())
    }

    /// Kills the agent alone (SIGKILL); PostgreSQL goes on.
    pub fn kill_agent(&mut self) {
        self.proc = None;
    }

    /// Kills the postmaster alone (SIGKILL); its children end by themselves.
    ///
    /// # Errors
    /// None is running.
    pub fn kill_postmaster(&self) -> Result<()> {
        let pid = self.postmaster()?;
        rustix::process::kill_process(pid, Signal::KILL).with_context(|| format!("killing the postmaster {pid:?}"))
    }

    /// Kills agent, postmaster and all their children at once, as if the host had lost its power. The data stays.
    pub fn kill(&mut self) {
        process::signal_below(&self.dir, Signal::KILL);
        self.proc = None;
        process::kill_below(&self.dir);
    }

    /// Stops every process of the node without ending it (SIGSTOP): its connections stay open and mute.
    pub fn freeze(&self) {
        process::signal_below(&self.dir, Signal::STOP);
    }

    /// Ends a freeze (SIGCONT).
    pub fn thaw(&self) {
        process::signal_below(&self.dir, Signal::CONT);
    }

    /// The postmaster's pid, from its lock file.
    ///
    /// # Errors
    /// There is no such file, or nobody of that pid works in the data directory.
    pub fn postmaster(&self) -> Result<Pid> {
        let data = self.data_dir();
        let text = std::fs::read_to_string(data.join("postmaster.pid")).context("postmaster.pid")?;
        let pid = text.lines().next().and_then(|line| line.trim().parse().ok()).and_then(Pid::from_raw);
        match pid.filter(|pid| process::below(&data).contains(pid)) {
            Some(pid) => Ok(pid),
            None => bail!("no postmaster runs for {}", self.name),
        }
    }

    /// Everything that runs for this node.
    pub fn processes(&self) -> Vec<Pid> {
        process::below(&self.dir)
    }

    /// The status code of `GET <path>`; `None` if nobody answers.
    pub async fn health(&self, path: &str) -> Option<u16> {
        rest::get(self.rest_port, path).await.ok().map(|answer| answer.status)
    }

    /// The document of `GET /patroni`.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn status(&self) -> Result<Value> {
        Ok(rest::get(self.rest_port, "/patroni").await?.body)
    }

    /// Its PostgreSQL, past any proxy.
    pub fn target(&self, password: &str) -> Target {
        Target::new(self.port, password)
    }

    /// The last `lines` lines of the agent's log.
    pub fn log_tail(&self, lines: usize) -> String {
        process::tail(&self.lab.log(&self.name), lines)
    }

    /// The whole log of the agent and its PostgreSQL.
    ///
    /// # Errors
    /// It can't be read.
    pub fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(self.lab.log(&self.name))?).into_owned())
    }

    /// The whole log, once it says `what`: lines are written by a thread of their own, so what they tell may be seen before them.
    ///
    /// # Errors
    /// It does not say so within `limit`.
    pub async fn says(&self, what: &str, limit: Duration) -> Result<String> {
        wait::until(format_args!("{} to say {what:?}", self.name), limit, async || {
            let log = self.log()?;
            ensure!(log.contains(what), "its last lines: {}", self.log_tail(12));
            Ok(log)
        })
        .await
    }
}
