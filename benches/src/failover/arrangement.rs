//! What is compared: who supervises PostgreSQL, and what stands in front.

use anyhow::Result;
use serde::Serialize;
use serde_json::json;
use trunkline_tests::{Cluster, Etcd, Lab, Program, Proxy, Spec, Timing, haproxy, patroni};

/// An agent and a proxy with their settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrangement {
    /// Our agent and our router with their defaults.
    Trunkline,
    /// Patroni and HAProxy, tuned as far as Patroni allows.
    Tuned,
    /// Patroni and HAProxy with the values of their documentation.
    Stock,
}

impl Arrangement {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Arrangement::Trunkline => "Trunkline",
            Arrangement::Tuned => "Patroni + HAProxy, tuned",
            Arrangement::Stock => "Patroni + HAProxy, stock",
        }
    }

    /// Its settings in one line.
    pub fn settings(self, synchronous: bool) -> String {
        let Timing { ttl, loop_wait, retry_timeout } = self.timing();
        let times = format!("ttl {ttl}, loop_wait {loop_wait}, retry_timeout {retry_timeout}");
        let start = if self == Arrangement::Stock { "" } else { ", primary_start_timeout 0" };
        let checks = self.checks().map_or(String::new(), |checks| {
            let haproxy::Checks { interval, fall, rise, connect } = checks;
            format!("; HAProxy: inter {interval} ms, fall {fall}, rise {rise}, on-marked-down shutdown-sessions, timeout connect {connect} ms")
        });
        let mode = if synchronous { "on" } else { "off" };
        format!("{times}{start}, synchronous_mode {mode}{checks}")
    }

    fn timing(self) -> Timing {
        match self {
            Arrangement::Trunkline => Timing::TRUNKLINE,
            Arrangement::Tuned => Timing::PATRONI_LOWEST,
            Arrangement::Stock => Timing::PATRONI_STOCK,
        }
    }

    fn checks(self) -> Option<haproxy::Checks> {
        match self {
            Arrangement::Trunkline => None,
            Arrangement::Tuned => Some(haproxy::Checks::TUNED),
            Arrangement::Stock => Some(haproxy::Checks::STOCK),
        }
    }

    fn agent(self) -> Result<Program> {
        match self {
            Arrangement::Trunkline => Program::agent(),
            Arrangement::Tuned | Arrangement::Stock => patroni::program(),
        }
    }

    /// Starts a cluster of `nodes` and the proxy, with or without synchronous replication.
    ///
    /// # Errors
    /// Something is missing or does not come up.
    pub async fn start(self, lab: &Lab, etcd: &Etcd, nodes: usize, synchronous: bool) -> Result<(Cluster, Proxy)> {
        let mut spec = Spec::new(nodes, &self.agent()?);
        let label = match self {
            Arrangement::Trunkline => "trunkline",
            Arrangement::Tuned => "tuned",
            Arrangement::Stock => "stock",
        };
        spec.scope = label.to_owned();
        spec.prefix = label.to_owned();
        spec.timing = self.timing();
        // Password hashing would cost each new session some milliseconds that have nothing to do with failover.
        spec.trust = true;
        spec.dcs = match self {
            Arrangement::Stock => json!({ "synchronous_mode": synchronous }),
            _ => json!({ "synchronous_mode": synchronous, "primary_start_timeout": 0 }),
        };
        let cluster = Cluster::start(lab, &etcd.endpoints(), spec).await?;
        let proxy = match self.checks() {
            None => cluster.router().await?,
            Some(checks) => haproxy::start(lab, &cluster, checks).await?,
        };
        Ok((cluster, proxy))
    }
}
