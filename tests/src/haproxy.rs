//! HAProxy in front of a cluster, as Patroni's documentation sets it up.

use std::fmt::Write as _;

use anyhow::Result;

use crate::tools::find_program;
use crate::{Cluster, Lab, Node, Program, Proxy, proxy};

/// How HAProxy checks a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Milliseconds between two checks.
    pub interval: u32,
    /// Failed checks until a server is down.
    pub fall: u32,
    /// Good checks until it is up again.
    pub rise: u32,
    /// Milliseconds that a client waits for a server, connecting or in the queue of a port without one, before it is
    /// dropped and may try again. A server that comes up meanwhile does not shorten it.
    pub connect: u32,
}

impl Checks {
    /// The values of `haproxy.cfg` in Patroni's repository.
    pub const STOCK: Self = Self { interval: 3000, fall: 3, rise: 2, connect: 4000 };
    /// As fast as one would dare: an agent that misses two checks in a row, 0.4 s, is taken for dead.
    pub const TUNED: Self = Self { interval: 200, fall: 2, rise: 1, connect: 300 };
}

/// Starts HAProxy in front of `cluster`.
///
/// # Errors
/// It is not installed, or does not come up.
pub async fn start(lab: &Lab, cluster: &Cluster, checks: Checks) -> Result<Proxy> {
    let program = find_program("haproxy", "haproxy")?;
    let mut program = Program::new(program);
    program.args = ["-db", "-f"].map(Into::into).into();
    let ports = proxy::Ports::any(lab)?;
    let config = config(&cluster.nodes, ports, checks);
    Proxy::start(lab, "haproxy", program, ports, &config).await
}

fn config(nodes: &[Node], ports: proxy::Ports, checks: Checks) -> String {
    let mut text = format!(
        "global\n    maxconn 1000\n\n\
         defaults\n    mode tcp\n    retries 2\n    timeout client 30m\n    timeout connect {}ms\n    \
         timeout server 30m\n    timeout check 5s\n\n\
         listen stats\n    mode http\n    bind 127.0.0.1:{}\n    stats enable\n    stats uri /\n",
        checks.connect, ports.admin
    );
    for (name, port, path) in [("primary", ports.read_write, "/primary"), ("replicas", ports.read_only, "/replica")] {
        let Checks { interval, fall, rise, .. } = checks;
        let _ = write!(
            text,
            "\nlisten {name}\n    bind 127.0.0.1:{port}\n    option httpchk HEAD {path}\n    \
             http-check expect status 200\n    \
             default-server inter {interval}ms fall {fall} rise {rise} on-marked-down shutdown-sessions\n"
        );
        for node in nodes {
            let (name, port, rest) = (node.name(), node.port(), node.rest_port());
            let _ = writeln!(text, "    server {name} 127.0.0.1:{port} maxconn 100 check port {rest}");
        }
    }
    text
}
