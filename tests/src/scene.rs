//! What most tests begin and end with: etcd, a cluster, a router, and clients that must have seen nothing wrong.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::workload::{Load, Seen, Target};
use crate::{Cluster, Etcd, Lab, Program, Proxy, Spec};

/// The longest that anything here may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A running cluster with a router in front of it.
#[derive(Debug)]
pub struct Scene {
    /// Where all of it is.
    pub lab: Lab,
    /// Its store.
    pub etcd: Etcd,
    /// Its nodes.
    pub cluster: Cluster,
    /// What applications connect to.
    pub router: Proxy,
}

impl Scene {
    /// `nodes` of our agents, synchronous replication, failover at once, one etcd member.
    ///
    /// # Errors
    /// Something does not come up.
    pub async fn start(name: &str, nodes: usize) -> Result<Self> {
        Self::with(name, 1, Spec::new(nodes, &Program::agent()?)).await
    }

    /// The cluster of `spec` on `etcd` members.
    ///
    /// # Errors
    /// Something does not come up.
    pub async fn with(name: &str, etcd: usize, spec: Spec) -> Result<Self> {
        Self::in_lab(Lab::new(name)?, etcd, spec).await
    }

    /// The same in a lab that is there.
    ///
    /// # Errors
    /// Something does not come up.
    pub async fn in_lab(lab: Lab, etcd: usize, spec: Spec) -> Result<Self> {
        let etcd = Etcd::start(&lab, etcd).await?;
        let cluster = Cluster::start(&lab, &etcd.endpoints(), spec).await?;
        let router = cluster.router().await?;
        Ok(Self { lab, etcd, cluster, router })
    }

    /// Starts the usual clients.
    ///
    /// # Errors
    /// Nothing can be written.
    pub async fn load(&mut self) -> Result<Load> {
        Load::start(&mut self.cluster, &self.router).await
    }

    /// PostgreSQL of a node.
    pub fn node(&self, node: usize) -> Target {
        self.cluster.nodes[node].target(&self.cluster.spec().password)
    }

    /// The router's read-write port.
    pub fn read_write(&self) -> Target {
        self.router.read_write(&self.cluster.spec().password)
    }

    /// The router's read-only port.
    pub fn read_only(&self) -> Target {
        self.router.read_only(&self.cluster.spec().password)
    }

    /// Waits until the cluster is whole, ends the clients and verifies what they saw.
    ///
    /// # Errors
    /// It does not get whole, or they saw something wrong.
    pub async fn finish(self, load: Load) -> Result<Seen> {
        self.verify(load, None).await
    }

    /// The same where commits wait for no standby and the server of `node` was killed while it led: the last rows that
    /// it acknowledged may be lost.
    ///
    /// # Errors
    /// As of [`Scene::finish`].
    pub async fn finish_after_kill(self, load: Load, node: usize) -> Result<Seen> {
        let port = self.cluster.nodes[node].port();
        self.verify(load, Some(port)).await
    }

    async fn verify(mut self, load: Load, killed: Option<u16>) -> Result<Seen> {
        let leader = self.cluster.settled(LIMIT).await?;
        load.writers.progress(100, LIMIT).await.context("at the end")?;
        let seen = load.end().await;
        seen.verify(&self.node(leader), killed).await.with_context(|| self.cluster.logs())?;
        self.lab.success();
        Ok(seen)
    }
}
