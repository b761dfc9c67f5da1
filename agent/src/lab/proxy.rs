//! What stands in front of a cluster: our router, or another proxy that takes its place.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::place::Lab;
use super::process::{self, Proc};
use super::tools::Program;
use super::wait;
use super::workload::Target;

/// How long a proxy may take to listen.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The ports of a proxy, all on `127.0.0.1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Leads to the primary.
    pub read_write: u16,
    /// Leads to standbys.
    pub read_only: u16,
    /// Metrics and health.
    pub admin: u16,
}

impl Ports {
    /// Three free ports.
    ///
    /// # Errors
    /// The lab has none left.
    pub fn any(lab: &Lab) -> Result<Self> {
        Ok(Self { read_write: lab.port()?, read_only: lab.port()?, admin: lab.port()? })
    }
}

/// A running proxy. Dropping it kills it.
#[derive(Debug)]
pub struct Proxy {
    name: String,
    lab: Lab,
    program: Program,
    config: std::path::PathBuf,
    ports: Ports,
    proc: Proc,
}

impl Proxy {
    /// Starts `program` with `config` written to a file as its last argument, and waits until it listens.
    ///
    /// # Errors
    /// It does not start or not listen; the last lines of its log are in the message.
    pub async fn start(lab: &Lab, name: &str, program: Program, ports: Ports, config: &str) -> Result<Self> {
        let extension = if program.path.ends_with("haproxy") { "cfg" } else { "yml" };
        let config = lab.write_config(&format!("{name}.{extension}"), config)?;
        let proc = Self::spawn(lab, name, &program, &config)?;
        let mut proxy = Self { name: name.to_owned(), lab: lab.clone(), program, config, ports, proc };
        proxy.listening().await?;
        Ok(proxy)
    }

    /// Starts `program`, a `trunkline-router`, in front of `scope`; `extra` is laid over its configuration.
    ///
    /// # Errors
    /// See [`Proxy::start`].
    pub async fn router(
        lab: &Lab,
        program: Program,
        ports: Ports,
        scope: &str,
        etcd: &[String],
        extra: &Value,
    ) -> Result<Self> {
        let config = super::files::router_yml(scope, &ports, etcd, extra);
        Self::start(lab, "router", program, ports, &config).await
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// The read-write port.
    pub fn read_write(&self, password: &str) -> Target {
        Target::new(self.ports.read_write, password)
    }

    /// The read-only port.
    pub fn read_only(&self, password: &str) -> Target {
        Target::new(self.ports.read_only, password)
    }

    /// Where its output goes.
    pub fn log(&self) -> &std::path::Path {
        self.proc.log()
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Proc {
        &mut self.proc
    }

    /// Kills it (SIGKILL) and starts it again with the same configuration.
    ///
    /// # Errors
    /// See [`Proxy::start`].
    pub async fn restart(&mut self) -> Result<()> {
        self.proc.kill();
        self.proc = Self::spawn(&self.lab, &self.name, &self.program, &self.config)?;
        self.listening().await
    }

    fn spawn(lab: &Lab, name: &str, program: &Program, config: &std::path::Path) -> Result<Proc> {
        let cwd = lab.make_dir(name)?;
        let mut command = lab.command(program, &cwd)?;
        command.arg(config);
        lab.spawn(name, command)
    }

    async fn listening(&mut self) -> Result<()> {
        let (proc, ports) = (&mut self.proc, self.ports);
        let up = wait::until(format!("{} to listen", self.name), START_LIMIT, async || {
            ensure!(proc.ended().is_none(), "it has ended");
            for port in [ports.read_write, ports.read_only, ports.admin] {
                tokio::net::TcpStream::connect(("127.0.0.1", port)).await.with_context(|| format!("port {port}"))?;
            }
            Ok(())
        });
        up.await.with_context(|| format!("last lines of its log:\n{}", process::tail(self.proc.log(), 15)))
    }
}
