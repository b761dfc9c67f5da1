//! The members' REST APIs, as other agents reach them.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use trunkline_agent::node::{Board, Command, Word};
use trunkline_agent::peer::{FailsafeAnswer, PeerStatus, Peers};
use trunkline_agent::rest::Sources;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::{Clock, MemberName};
use trunkline_router::probe::Probe;

use crate::executor::{ProcessId, SimClock};
use crate::postgres::ModelPostgres;
use crate::scenario::End;
use crate::stage::{SCOPE, Stage, host_of};

/// What one agent's API can answer with.
#[derive(Clone)]
pub struct Api {
    /// The agent's process.
    pub process: ProcessId,
    /// Its name.
    pub name: MemberName,
    /// Its clock.
    pub clock: SimClock,
    /// What it knows of the cluster.
    pub knowledge: watch::Receiver<Knowledge>,
    /// What its loop publishes.
    pub board: watch::Receiver<Board>,
    /// Its server.
    pub postgres: ModelPostgres,
    /// Its `failover_priority`.
    pub priority: i64,
    /// Its loop.
    pub commands: mpsc::Sender<Command>,
}

impl Api {
    fn sources(&self) -> Sources<'_, ModelPostgres, SimClock> {
        Sources { knowledge: &self.knowledge, board: &self.board, postgres: &self.postgres, clock: &self.clock }
    }
}

/// One request from `from` to the agent behind `api_url`: `None` if there is no answer within `deadline`. The answer is made
/// by that agent's process, and so stands still and dies with it.
async fn ask<T, F>(
    stage: &Stage,
    clock: &SimClock,
    from: End,
    api_url: &str,
    deadline: Duration,
    answer: impl FnOnce(Api) -> F + Send,
) -> Option<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let there = api_url.split("://").nth(1).and_then(|rest| rest.split(':').next()).and_then(host_of)?;
    let to = End::Agent(there);
    let request = async {
        stage.micros(100..2_000).await;
        if !stage.network(|network| network.open(from, to)) {
            return std::future::pending().await;
        }
        // Refused where nobody listens.
        let api = stage.api(there)?;
        let (sender, answered) = oneshot::channel();
        let process = api.process;
        let work = answer(api);
        stage.executor().spawn(process, async move {
            let _ = sender.send(work.await);
        });
        let answer = answered.await.ok()?;
        stage.micros(100..2_000).await;
        if !stage.network(|network| network.open(to, from)) {
            return std::future::pending().await;
        }
        Some(answer)
    };
    clock.within(deadline, request).await.flatten()
}

/// Asks other agents on behalf of a router.
pub struct ModelProber {
    stage: Stage,
    router: usize,
    clock: SimClock,
}

impl ModelProber {
    /// `router` asks.
    pub fn new(stage: &Stage, router: usize, clock: SimClock) -> Self {
        Self { stage: stage.clone(), router, clock }
    }
}

impl Probe for ModelProber {
    async fn is_primary(&self, api_url: &str, limit: Duration) -> Result<bool, String> {
        let answer = ask(&self.stage, &self.clock, End::Router(self.router), api_url, limit, |api| async move {
            api.sources().prove_leadership(&api.name).await
        });
        answer.await.ok_or_else(|| "no answer".to_owned())
    }
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

    async fn ask<T, F>(&self, api_url: &str, deadline: Duration, answer: impl FnOnce(Api) -> F + Send) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        ask(&self.stage, &self.clock, End::Agent(self.host), api_url, deadline, answer).await
    }
}

impl Peers for ModelPeers {
    async fn status(
        &self,
        members: BTreeMap<MemberName, String>,
        deadline: Duration,
    ) -> BTreeMap<MemberName, Option<PeerStatus>> {
        let ask = async |(name, url): (MemberName, String)| {
            let answer = self.ask(&url, deadline, move |api| async move {
                PeerStatus::parse(&api.sources().document(SCOPE, &api.name, deadline).await)
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
                let word = answered.await.unwrap_or(Word::Refused);
                FailsafeAnswer { accepted: word == Word::Given, leads: word == Word::Leads, lsn: None }
            });
            (name, answer.await.unwrap_or_default())
        };
        join_all(members.into_iter().map(ask)).await.into_iter().collect()
    }
}
