//! The servers: one PostgreSQL, and every proxy in front of it with one thread each.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use trunkline_tests::process::{Proc, below};
use trunkline_tests::tools::find_program;
use trunkline_tests::{Cluster, Etcd, LIMIT, Lab, Program, Proxy, Spec, proxy, wait};

use super::process;

/// A way to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Way {
    /// No proxy.
    Direct,
    /// `trunkline-router`.
    Trunkline,
    /// HAProxy in TCP mode, as Patroni's documentation has it.
    HAProxy,
    /// PgBouncer in session mode.
    PgBouncer,
    /// nginx's stream module.
    Nginx,
}

impl Way {
    /// All of them, in the order of a round.
    pub const ALL: [Self; 5] = [Self::Direct, Self::Trunkline, Self::HAProxy, Self::PgBouncer, Self::Nginx];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Trunkline => "Trunkline",
            Self::HAProxy => "HAProxy",
            Self::PgBouncer => "PgBouncer",
            Self::Nginx => "nginx",
        }
    }
}

/// A proxy that runs.
pub struct Running {
    /// Where clients connect.
    pub port: u16,
    /// The process that does the work; `None`: there is none.
    pub pid: Option<i32>,
    _process: Held,
}

enum Held {
    Nothing,
    Process { _proc: Proc },
    Router { _proxy: Box<Proxy> },
}

/// Real PostgreSQL with etcd, which our router follows.
pub struct Site {
    /// Where all of it is.
    pub lab: Lab,
    /// The store.
    pub etcd: Etcd,
    /// One node.
    pub cluster: Cluster,
}

impl Site {
    /// A cluster of one, in which everybody on this machine is trusted.
    pub async fn start() -> Result<Self> {
        let lab = Lab::new("bench-relay")?;
        let etcd = Etcd::start(&lab, 1).await?;
        let mut spec = Spec::new(1, &Program::agent()?);
        spec.trust = true;
        let parameters = json!({ "max_connections": 300, "shared_buffers": "512MB", "fsync": "off" });
        spec.dcs = json!({ "synchronous_mode": false, "postgresql": { "parameters": { "max_connections": 300 } } });
        spec.local = json!({ "postgresql": { "parameters": parameters } });
        let cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;
        Ok(Self { lab, etcd, cluster })
    }

    /// PostgreSQL's port.
    pub fn postgres(&self) -> u16 {
        self.cluster.nodes[0].port()
    }

    /// PostgreSQL's processes.
    pub fn backends(&self) -> Vec<i32> {
        below(&self.cluster.nodes[0].data_dir()).into_iter().map(|pid| pid.as_raw_nonzero().get()).collect()
    }

    /// Starts a proxy in front of `port`, for our router the leader's of `scope`.
    pub async fn proxy(&self, way: Way, scope: &str, port: u16) -> Result<Running> {
        if way == Way::Direct {
            return Ok(Running { port, pid: None, _process: Held::Nothing });
        }
        if way == Way::Trunkline {
            let ports = proxy::Ports::any(&self.lab)?;
            let extra = json!({ "threads": 1 });
            let mut router =
                Proxy::router(&self.lab, Program::router()?, ports, scope, &self.etcd.endpoints(), &extra).await?;
            let pid = router.process().pid().as_raw_nonzero().get();
            return Ok(Running {
                port: ports.read_write,
                pid: Some(pid),
                _process: Held::Router { _proxy: Box::new(router) },
            });
        }
        let listen = self.lab.port()?;
        let name = format!("{}-{scope}", way.name().to_lowercase());
        let cwd = self.lab.make_dir(&name)?;
        let config = self.lab.write_config(&name, &configuration(way, listen, port))?;
        let mut command = self.lab.command(&Program::new(find_program(program(way), program(way))?), &cwd)?;
        match way {
            Way::HAProxy => command.arg("-db").arg("-f").arg(&config),
            Way::Nginx => command.arg("-p").arg(&cwd).arg("-c").arg(&config),
            _ => command.arg(&config),
        };
        let mut proc = self.lab.spawn(&name, command)?;
        let up = wait::until(format!("{name} to listen"), LIMIT, async || {
            ensure!(proc.ended().is_none(), "it has ended");
            tokio::net::TcpStream::connect(("127.0.0.1", listen)).await.map(drop).context("not yet")
        });
        up.await.with_context(|| trunkline_tests::process::tail(&self.lab.log(&name), 15))?;
        let own = proc.pid().as_raw_nonzero().get();
        let pid = process::children(own)?.first().copied().unwrap_or(own);
        Ok(Running { port: listen, pid: Some(pid), _process: Held::Process { _proc: proc } })
    }

    /// A program of PostgreSQL's.
    pub fn program(&self, name: &str) -> std::path::PathBuf {
        let bin: &Path = &self.lab.tools().postgres_bin;
        bin.join(name)
    }
}

fn program(way: Way) -> &'static str {
    match way {
        Way::HAProxy => "haproxy",
        Way::PgBouncer => "pgbouncer",
        _ => "nginx",
    }
}

fn configuration(way: Way, listen: u16, port: u16) -> String {
    match way {
        Way::HAProxy => format!(
            "global\n    maxconn 9800\n    nbthread 1\ndefaults\n    mode tcp\n    retries 2\n    timeout client 30m\n    \
             timeout connect 4s\n    timeout server 30m\nlisten primary\n    bind 127.0.0.1:{listen}\n    \
             server postgres 127.0.0.1:{port} maxconn 9800\n"
        ),
        Way::PgBouncer => format!(
            "[databases]\npostgres = host=127.0.0.1 port={port} dbname=postgres user=postgres\n[pgbouncer]\n\
             listen_addr = 127.0.0.1\nlisten_port = {listen}\nauth_type = any\npool_mode = session\n\
             max_client_conn = 5000\ndefault_pool_size = 200\nlog_connections = 0\nlog_disconnections = 0\nunix_socket_dir =\n"
        ),
        _ => format!(
            "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nworker_processes 1;\npid nginx.pid;\n\
             error_log stderr;\nevents {{ worker_connections 16000; }}\nstream {{ server {{ listen 127.0.0.1:{listen} \
             backlog=4096; proxy_pass 127.0.0.1:{port}; proxy_timeout 30m; }} }}\n"
        ),
    }
}
