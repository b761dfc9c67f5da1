//! A cluster of nodes: started together, waited for, asked who leads.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::node::Node;
use super::place::Lab;
use super::proxy::{Ports, Proxy};
use super::tools::Program;
use super::workload::Target;
use super::{files, rest, wait};

/// The superuser of every lab cluster.
pub const SUPERUSER: &str = "postgres";

/// The three times of the HA loop, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// How long the leader key lives without renewal.
    pub ttl: u32,
    /// Pause between two turns.
    pub loop_wait: u32,
    /// How long one operation is tried.
    pub retry_timeout: u32,
}

impl Timing {
    /// Our defaults for a new cluster.
    pub const TRUNKLINE: Self = Self { ttl: 5, loop_wait: 1, retry_timeout: 1 };
    /// The lowest that Patroni accepts.
    pub const PATRONI_LOWEST: Self = Self { ttl: 20, loop_wait: 1, retry_timeout: 3 };
    /// Patroni's defaults.
    pub const PATRONI_STOCK: Self = Self { ttl: 30, loop_wait: 10, retry_timeout: 10 };
}

/// What cluster to start.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The cluster's name.
    pub scope: String,
    /// What the nodes' names begin with. Directories are called like nodes, so two clusters in one lab need two.
    pub prefix: String,
    /// The nodes: their agents.
    pub agents: Vec<Program>,
    /// The HA loop's times.
    pub timing: Timing,
    /// Laid over `bootstrap.dcs`.
    pub dcs: Value,
    /// Laid over every node's `patroni.yml`.
    pub local: Value,
    /// Let everybody on this machine in without a password, so that password hashing is not part of what is measured.
    pub trust: bool,
    /// Each node in a cgroup of its own, allowed to fence PostgreSQL's packets in it. Needs root.
    pub cgroups: bool,
    /// The password of all users.
    pub password: String,
}

impl Spec {
    /// `nodes` nodes that run `agent`, with synchronous replication and failover at once when a postmaster dies.
    pub fn new(nodes: usize, agent: &Program) -> Self {
        Self {
            scope: "demo".to_owned(),
            prefix: "node".to_owned(),
            agents: vec![agent.clone(); nodes],
            timing: Timing::TRUNKLINE,
            dcs: json!({ "synchronous_mode": true, "primary_start_timeout": 0 }),
            local: json!({}),
            trust: false,
            cgroups: false,
            password: format!("{:016x}", rand::random::<u64>()),
        }
    }

    fn is_synchronous(&self) -> bool {
        self.dcs.get("synchronous_mode").is_some_and(|mode| *mode != false && *mode != "off")
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    lab: Lab,
    spec: Spec,
    etcd: Vec<String>,
    /// The nodes, in the order of [`Spec::agents`].
    pub nodes: Vec<Node>,
}

impl Cluster {
    /// Writes the configuration of every node without starting any.
    ///
    /// # Errors
    /// Files or ports.
    pub fn prepare(lab: &Lab, etcd: &[String], spec: Spec) -> Result<Self> {
        let node = |(i, agent): (usize, &Program)| {
            Node::new(lab, &format!("{}{}", spec.prefix, i + 1), agent.clone(), json!({}))
        };
        let nodes = spec.agents.iter().enumerate().map(node).collect::<Result<Vec<Node>>>()?;
        let mut cluster = Self { lab: lab.clone(), spec, etcd: etcd.to_vec(), nodes };
        for i in 0..cluster.nodes.len() {
            let text = files::patroni_yml(&cluster.spec, &cluster.nodes[i], &cluster.etcd);
            cluster.nodes[i].configure(&text)?;
            if cluster.spec.cgroups {
                cluster.nodes[i].confine()?;
            }
        }
        Ok(cluster)
    }

    /// Starts all nodes and waits until one leads, the others stream from it and, with synchronous mode, one of them is
    /// the synchronous standby.
    ///
    /// # Errors
    /// That does not happen within a minute; the last log lines of every node are in the message.
    pub async fn start(lab: &Lab, etcd: &[String], spec: Spec) -> Result<Self> {
        let mut cluster = Self::prepare(lab, etcd, spec)?;
        for node in &mut cluster.nodes {
            node.start()?;
        }
        cluster.settled(Duration::from_secs(60)).await?;
        Ok(cluster)
    }

    /// What it was started with.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// etcd's endpoints, `host:port`.
    pub fn etcd(&self) -> &[String] {
        &self.etcd
    }

    /// Puts `trunkline-router` in front of it.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn router(&self) -> Result<Proxy> {
        Proxy::router(&self.lab, Program::router()?, Ports::any(&self.lab)?, &self.spec.scope, &self.etcd, &json!({}))
            .await
    }

    /// PostgreSQL of every node, past any proxy.
    pub fn targets(&self) -> Vec<Target> {
        self.nodes.iter().map(|node| node.target(&self.spec.password)).collect()
    }

    /// The node of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, name: &str) -> Result<usize> {
        self.nodes.iter().position(|node| node.name() == name).with_context(|| format!("no node {name}"))
    }

    /// Who leads: the node whose `/primary` answers 200. Two of them are an error at once.
    ///
    /// # Errors
    /// Nobody does within `limit`.
    pub async fn leader(&mut self, limit: Duration) -> Result<usize> {
        let nodes = &self.nodes;
        let found = wait::until("a leader", limit, async || {
            let answers = futures::future::join_all(nodes.iter().map(|node| node.health("/primary"))).await;
            let leaders: Vec<usize> = (0..nodes.len()).filter(|i| answers[*i] == Some(200)).collect();
            match leaders[..] {
                [leader] => Ok(leader),
                _ => Err(anyhow!("{} nodes say they lead: {answers:?}", leaders.len())),
            }
        });
        found.await.with_context(|| self.logs())
    }

    /// Waits for another leader than `old`.
    ///
    /// # Errors
    /// There is none within `limit`.
    pub async fn leader_other_than(&mut self, old: usize, limit: Duration) -> Result<usize> {
        let nodes = &self.nodes;
        let what = format!("another leader than {}", nodes[old].name());
        let found = wait::until(what, limit, async || {
            let asked = nodes.iter().map(|node| node.health("/primary"));
            let answers = futures::future::join_all(asked).await;
            let other = (0..nodes.len()).find(|i| *i != old && answers[*i] == Some(200));
            other.with_context(|| format!("GET /primary: {answers:?}"))
        });
        found.await.with_context(|| self.logs())
    }

    /// Waits until every running node takes its part: one leader, the others streaming on its timeline with no lag to
    /// speak of, and a synchronous standby where that mode is on. Returns the leader. The cluster's document alone would
    /// not do: the key of a node that was killed a moment ago still says that it streams.
    ///
    /// # Errors
    /// That is not so within `limit`; the last log lines of every node are in the message.
    pub async fn settled(&mut self, limit: Duration) -> Result<usize> {
        let running: Vec<usize> = (0..self.nodes.len()).filter(|i| self.nodes[*i].is_running()).collect();
        let (nodes, synchronous) = (&self.nodes, self.spec.is_synchronous() && running.len() > 1);
        let settled = wait::until("a settled cluster", limit, async || {
            let mut document = Err(anyhow!("no node runs"));
            for i in &running {
                document = rest::get(nodes[*i].rest_port(), "/cluster").await.map(|answer| answer.body);
                if document.is_ok() {
                    break;
                }
            }
            let members = Members::read(&document?)?;
            let names: Vec<&str> = running.iter().map(|i| nodes[*i].name()).collect();
            let leader = members.settled(&names, synchronous)?;
            let at = running.iter().position(|i| nodes[*i].name() == leader);
            let leader = at.map(|at| running[at]).context("the leader is not running")?;
            ensure!(nodes[leader].health("/primary").await == Some(200), "{} is not primary", nodes[leader].name());
            let timeline = nodes[leader].status().await?["timeline"].clone();
            for node in running.iter().filter(|i| **i != leader).map(|i| &nodes[*i]) {
                follows(&node.status().await?, &timeline).with_context(|| node.name().to_owned())?;
            }
            Ok(leader)
        });
        settled.await.with_context(|| self.logs())
    }

    /// Asks for a planned switchover and returns when the agent says it is done.
    ///
    /// # Errors
    /// It is refused or fails.
    pub async fn switchover(&self, leader: usize, candidate: Option<usize>) -> Result<()> {
        let mut body = json!({ "leader": self.nodes[leader].name() });
        if let Some(candidate) = candidate {
            body["candidate"] = self.nodes[candidate].name().into();
        }
        let port = self.nodes[leader].rest_port();
        let answer = rest::post(port, "/switchover", &body, Duration::from_secs(60)).await?;
        if answer.status != 200 {
            bail!("the switchover was answered with {}: {}", answer.status, answer.body);
        }
        Ok(())
    }

    /// Changes the dynamic configuration.
    ///
    /// # Errors
    /// Nobody takes it.
    pub async fn patch_config(&self, patch: &Value) -> Result<()> {
        let mut last = anyhow!("no nodes");
        for node in &self.nodes {
            match rest::patch(node.rest_port(), "/config", patch).await {
                Ok(answer) if answer.status == 200 => return Ok(()),
                Ok(answer) => last = anyhow!("{}: {}", answer.status, answer.body),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The last lines of every node's log.
    pub fn logs(&self) -> String {
        let of = |node: &Node| format!("last lines of {}:\n{}", node.name(), node.log_tail(12));
        self.nodes.iter().map(of).collect::<Vec<_>>().join("\n")
    }
}

/// Whether a node streams on that timeline, by its own word (`GET /patroni`).
fn follows(status: &Value, timeline: &Value) -> Result<()> {
    ensure!(
        status["state"] == "running" && status["replication_state"] == "streaming" && status["timeline"] == *timeline,
        "it does not stream on timeline {timeline}: {status}"
    );
    Ok(())
}

/// The document of `GET /cluster`, as far as it matters here.
#[derive(Debug, Clone, PartialEq)]
pub struct Members(pub Vec<Member>);

/// One line of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// The member's name.
    pub name: String,
    /// `leader`, `sync_standby`, `replica` …
    pub role: String,
    /// `running`, `streaming` …
    pub state: String,
    /// `host:port` of its PostgreSQL.
    pub address: String,
    /// Its timeline.
    pub timeline: Option<u64>,
    /// Bytes behind; `None`: it leads, or nobody knows.
    pub lag: Option<u64>,
}

impl Members {
    /// Reads the document.
    ///
    /// # Errors
    /// It has no list of members.
    pub fn read(document: &Value) -> Result<Self> {
        let list = document["members"].as_array().with_context(|| format!("no members in {document}"))?;
        let text = |member: &Value, key: &str| member[key].as_str().unwrap_or("").to_owned();
        let member = |member: &Value| Member {
            name: text(member, "name"),
            role: text(member, "role"),
            state: text(member, "state"),
            address: format!("{}:{}", text(member, "host"), member["port"].as_u64().unwrap_or(0)),
            timeline: member["timeline"].as_u64(),
            lag: member["lag"].as_u64(),
        };
        Ok(Self(list.iter().map(member).collect()))
    }

    /// The leader's name if exactly `names` are there, one leads and the others follow closely.
    ///
    /// # Errors
    /// What is not so.
    pub fn settled(&self, names: &[&str], synchronous: bool) -> Result<String> {
        const NO_LAG: u64 = 1 << 20;
        let mut of_interest = self.0.iter().filter(|member| names.contains(&member.name.as_str()));
        let leader =
            of_interest.clone().find(|member| member.role == "leader").context("no leader among the members")?;
        ensure!(leader.state == "running", "the leader is {}", leader.state);
        ensure!(of_interest.clone().count() == names.len(), "not all of {names:?} are in {:?}", self.0);
        for member in of_interest.clone().filter(|member| member.name != leader.name) {
            ensure!(member.state == "streaming", "{} is {} as {}", member.name, member.state, member.role);
            ensure!(member.timeline == leader.timeline, "{} is on timeline {:?}", member.name, member.timeline);
            ensure!(member.lag.is_some_and(|lag| lag < NO_LAG), "{} has lag {:?}", member.name, member.lag);
        }
        let has_sync = of_interest.any(|member| ["sync_standby", "quorum_standby"].contains(&member.role.as_str()));
        ensure!(has_sync || !synchronous, "no synchronous standby");
        Ok(leader.name.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, role: &str, state: &str, timeline: u64) -> Value {
        json!({ "name": name, "role": role, "state": state, "host": "127.0.0.1", "port": 5432, "timeline": timeline, "lag": 0 })
    }

    #[test]
    fn a_cluster_is_settled_when_everybody_streams_from_the_leader() {
        let leader = member("a", "leader", "running", 2);
        let replica = member("b", "replica", "streaming", 2);
        let sync = member("b", "sync_standby", "streaming", 2);
        for (members, synchronous, settled) in [
            (json!([leader, replica]), false, true),
            (json!([leader, sync]), true, true),
            (json!([leader, replica]), true, false),
            (json!([leader]), false, false),
            (json!([replica]), false, false),
            (json!([leader, member("b", "replica", "running", 2)]), false, false),
            (json!([leader, member("b", "replica", "streaming", 1)]), false, false),
            (json!([member("a", "leader", "starting", 2), replica]), false, false),
        ] {
            let document = json!({ "members": members });
            let result = Members::read(&document).unwrap().settled(&["a", "b"], synchronous);
            assert_eq!(result.is_ok(), settled, "{document}: {result:?}");
        }
    }

    #[test]
    fn a_document_without_members_is_an_error() {
        assert!(Members::read(&json!("nonsense")).is_err());
    }
}
