//! The members' REST APIs, as other agents reach them.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use trunkline_agent::node::Command;
use trunkline_agent::peer::{FailsafeAnswer, PeerStatus, Peers};
use trunkline_agent::postgres::{PgRole, PgStatus, Postgres};
use trunkline_common::{Clock, MemberName};

use crate::executor::{ProcessId, SimClock};
use crate::postgres::ModelPostgres;
use crate::scenario::End;
use crate::stage::{Stage, host_of};

/// What one agent's API can answer with.
#[derive(Clone)]
pub struct Api {
    /// The agent's process.
    pub process: ProcessId,
    /// Its server.
    pub postgres: ModelPostgres,
    /// Its `failover_priority`.
    pub priority: i64,
    /// Its loop.
    pub commands: mpsc::Sender<Command>,
}

/// Asks other agents on behalf of one.
#[derive(Clone)]
pub struct ModelPeers {
    stage: Stage,
    host: usize,
    clock: SimClock,
}

impl ModelPeers {
    /// The agent of `host` asks.
    pub fn new(stage: &Stage, host: usize, clock: SimClock) -> Self {
        Self { stage: stage.clone(), host, clock }
    }

    /// One request to another agent: `None` if there is no answer within `deadline`. The answer is made by that agent's
    /// process, and so stands still and dies with it.
    async fn ask<T, F>(&self, api_url: &str, deadline: Duration, answer: impl FnOnce(Api) -> F + Send) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let there = api_url.split("://").nth(1).and_then(|rest| rest.split(':').next()).and_then(host_of)?;
        let (from, to) = (End::Agent(self.host), End::Agent(there));
        let request = async {
            self.stage.micros(100..2_000).await;
            if !self.stage.network(|network| network.open(from, to)) {
                return std::future::pending().await;
            }
            // Refused where nobody listens.
            let api = self.stage.api(there)?;
            let (sender, answered) = oneshot::channel();
            let process = api.process;
            let work = answer(api);
            self.stage.executor().spawn(process, async move {
                let _ = sender.send(work.await);
            });
            let answer = answered.await.ok()?;
            self.stage.micros(100..2_000).await;
            if !self.stage.network(|network| network.open(to, from)) {
                return std::future::pending().await;
            }
            Some(answer)
        };
        self.clock.within(deadline, request).await.flatten()
    }
}

impl Peers for ModelPeers {
    async fn status(
        &self,
        members: BTreeMap<MemberName, String>,
        deadline: Duration,
    ) -> BTreeMap<MemberName, Option<PeerStatus>> {
        let ask = async |(name, url): (MemberName, String)| {
            let answer = self.ask(&url, deadline, |api| async move {
                let PgStatus::Running(running) = api.postgres.observe(Duration::from_secs(2)).await else {
                    return None;
                };
                let in_recovery = running.role == PgRole::Standby;
                Some(PeerStatus {
                    in_recovery,
                    lsn: if in_recovery { running.lsn } else { trunkline_common::Lsn::INVALID },
                    timeline: running.timeline,
                    failover_priority: api.priority,
                    watchdog_failed: api.postgres.must_not_lead(),
                })
            });
            (name, answer.await.flatten())
        };
        join_all(members.into_iter().map(ask)).await.into_iter().collect()
    }

    async fn failsafe(
        &self,
        members: BTreeMap<MemberName, String>,
        body: Value,
        deadline: Duration,
    ) -> BTreeMap<MemberName, FailsafeAnswer> {
        let leader = MemberName::from(body.get("name").and_then(Value::as_str).unwrap_or_default());
        let ask = async |(name, url): (MemberName, String)| {
            let (leader, mut body) = (leader.clone(), body.clone());
            body["member"] = Value::from(name.as_str());
            let answer = self.ask(&url, deadline, |api| async move {
                let (reply, answered) = oneshot::channel();
                if api.commands.send(Command::FailsafePoll { leader, body, reply }).await.is_err() {
                    return FailsafeAnswer::default();
                }
                FailsafeAnswer { accepted: answered.await.unwrap_or(false), lsn: None }
            });
            (name, answer.await.unwrap_or_default())
        };
        join_all(members.into_iter().map(ask)).await.into_iter().collect()
    }
}
