//! `switchover` and `failover`: another leader, through the REST API of the present one, or else through the DCS.

use std::convert::Infallible;
use std::time::Duration;

use chrono::{DateTime, FixedOffset};
use serde_json::{Map, Value, json};
use trunkline_common::dcs::store::Outcome;
use trunkline_common::{Clock, MemberName};

use super::args::{FailoverArgs, SwitchoverArgs};
use super::context::{Cluster, Context, Target};
use super::error::{CtlError, Result, complain};
use super::list::show_members;
use super::output::Format;
use super::prompt::{ask, confirm, echo, warning};
use super::rest::{Answer, CallError, Method};
use super::select::Node;
use super::text::{fine_stamp, isoformat, next_hour, parse_schedule, python_repr};
use crate::rest::switchover::Phase;

/// `switchover`.
pub(super) async fn switchover(context: &Context, args: &SwitchoverArgs) -> Result<()> {
    let change = Change {
        verb: "switchover",
        candidate: args.candidate.as_deref(),
        leader: args.leader.as_deref(),
        scheduled: args.scheduled.as_deref(),
        force: args.force,
    };
    change.run(context, args.cluster.as_deref(), args.group).await
}

/// `failover`.
pub(super) async fn failover(context: &Context, args: &FailoverArgs) -> Result<()> {
    let candidate = args.candidate.as_deref();
    let change = Change { verb: "failover", candidate, leader: None, scheduled: None, force: args.force };
    change.run(context, args.cluster.as_deref(), args.group).await
}

/// Reads a schedule.
///
/// # Errors
/// Not a time.
pub(super) fn schedule(context: &Context, text: &str) -> Result<Option<DateTime<FixedOffset>>> {
    parse_schedule(text, context.clock.wall()).map_err(|text| {
        CtlError::new(format!(
            "Unable to parse scheduled timestamp ({text}). It should be in an unambiguous format (e.g. ISO 8601)"
        ))
    })
}

/// What was asked for on the command line.
struct Change<'a> {
    verb: &'static str,
    candidate: Option<&'a str>,
    leader: Option<&'a str>,
    scheduled: Option<&'a str>,
    force: bool,
}

/// What has been settled.
struct Plan {
    leader: Option<String>,
    candidate: Option<String>,
    at: Option<DateTime<FixedOffset>>,
}

impl Change<'_> {
    fn is_switchover(&self) -> bool {
        self.verb == "switchover"
    }

    async fn run(&self, context: &Context, cluster: Option<&str>, group: Option<u32>) -> Result<()> {
        let name = context.scope(cluster)?;
        let mut target = context.target(&name, group);
        let mut cluster = target.read().await?;
        echo("Current cluster topology")?;
        show_members(&cluster, false, Format::Pretty)?;
        if target.citus == Some(None) {
            if self.force {
                cluster.one_group_only()?;
            }
            let group = ask("Citus group", None)?;
            let group = group.trim().parse().map_err(|_| CtlError::new(format!("{group} is not a valid integer.")))?;
            target = context.target(&name, Some(group));
            cluster = target.read().await?;
        }
        let plan = self.settle(context, &cluster)?;
        self.confirm(&cluster, &plan)?;
        self.carry_out(context, &target, cluster, &plan).await
    }

    /// Steps 3 to 8 of cli.md §4.8.
    fn settle(&self, context: &Context, cluster: &Cluster) -> Result<Plan> {
        let view = &cluster.view;
        let current = view.leader.as_ref().map(|leader| leader.name.to_string()).filter(|name| !name.is_empty());
        let leader = if self.is_switchover() { Some(self.settle_leader(cluster, current.as_deref())?) } else { None };

        let is_candidate = |name: &MemberName| current.as_deref() != Some(name.as_str());
        let candidates: Vec<String> = view
            .members
            .iter()
            .filter(|(name, member)| is_candidate(name) && !member.nofailover())
            .map(|(name, _)| name.to_string())
            .collect();
        let candidate = self.settle_candidate(&candidates)?;
        if let Some(candidate) = candidate.as_ref().filter(|candidate| !candidates.contains(candidate)) {
            let name = &cluster.name;
            return Err(CtlError::new(if current.as_ref() == Some(candidate) {
                format!("Member {candidate} is already the leader of cluster {name}")
            } else {
                format!("Member {candidate} does not exist in cluster {name} or is tagged as nofailover")
            }));
        }
        self.confirm_asynchronous(cluster, candidate.as_deref())?;
        Ok(Plan { leader, candidate, at: self.settle_time(context, cluster)? })
    }

    fn settle_leader(&self, cluster: &Cluster, current: Option<&str>) -> Result<String> {
        let current = current.ok_or_else(|| CtlError::new("This cluster has no leader"))?;
        let leader = match self.leader {
            Some(leader) => leader.to_owned(),
            None if self.force => current.to_owned(),
            None => {
                let standby_cluster = cluster.view.settings.standby_cluster.is_some();
                ask(if standby_cluster { "Standby Leader" } else { "Primary" }, Some(current))?
            }
        };
        if leader == current {
            return Ok(leader);
        }
        Err(CtlError::new(format!("Member {leader} is not the leader of cluster {}", cluster.name)))
    }

    fn settle_candidate(&self, candidates: &[String]) -> Result<Option<String>> {
        if candidates.is_empty() {
            return Err(CtlError::new(format!("No candidates found to {} to", self.verb)));
        }
        let candidate = match self.candidate {
            Some(candidate) => Some(candidate.to_owned()),
            None if self.force => None,
            None => Some(ask(&format!("Candidate {}", python_repr(&json!(candidates))), Some(""))?),
        };
        let given = candidate.clone().filter(|candidate| !candidate.is_empty());
        if given.is_none() && !self.is_switchover() {
            return Err(CtlError::new("Failover could be performed only to a specific candidate"));
        }
        // An empty answer is sent as such: it means the same as none.
        Ok(given)
    }

    fn confirm_asynchronous(&self, cluster: &Cluster, candidate: Option<&str>) -> Result<()> {
        let (view, Some(candidate)) = (&cluster.view, candidate) else { return Ok(()) };
        let synchronous = view.settings.synchronous_mode != trunkline_config::dynamic::SynchronousMode::Off
            && view.settings.standby_cluster.is_none();
        let safe = !synchronous || !view.sync.is_active() || view.sync.includes(&MemberName::from(candidate));
        if self.force || self.is_switchover() || safe {
            return Ok(());
        }
        if confirm(&format!("Are you sure you want to failover to the asynchronous node {candidate}?"))? {
            return Ok(());
        }
        Err(CtlError::new(format!("Aborting {}", self.verb)))
    }

    fn settle_time(&self, context: &Context, cluster: &Cluster) -> Result<Option<DateTime<FixedOffset>>> {
        if !self.is_switchover() {
            return Ok(None);
        }
        let text = match self.scheduled {
            Some(text) => text.to_owned(),
            None if self.force => return Ok(None),
            None => {
                let example = next_hour(context.clock.wall());
                ask(&format!("When should the switchover take place (e.g. {example} ) "), Some("now"))?
            }
        };
        let at = schedule(context, &text)?;
        if at.is_some() && cluster.view.settings.pause {
            return Err(CtlError::new("Can't schedule switchover in the paused state"));
        }
        Ok(at)
    }

    fn confirm(&self, cluster: &Cluster, plan: &Plan) -> Result<()> {
        if self.force {
            return Ok(());
        }
        let (verb, name) = (self.verb, &cluster.name);
        let leader = cluster.view.leader.as_ref().map(|leader| format!(", demoting current leader {}", leader.name));
        let demoting = leader.unwrap_or_default();
        match plan.at.map(|at| isoformat(at, 'T')) {
            Some(at) => {
                let question =
                    format!("Are you sure you want to schedule switchover of cluster {name} at {at}{demoting}?");
                if confirm(&question)? { Ok(()) } else { Err(CtlError::new(format!("Aborting scheduled {verb}"))) }
            }
            None => {
                let question = format!("Are you sure you want to {verb} cluster {name}{demoting}?");
                if confirm(&question)? { Ok(()) } else { Err(CtlError::new(format!("Aborting {verb}"))) }
            }
        }
    }

    async fn carry_out(&self, context: &Context, target: &Target, cluster: Cluster, plan: &Plan) -> Result<()> {
        let before = cluster.view.leader.as_ref().map(|leader| leader.name.clone());
        let mut progress = Progress::new(target, before);
        let posted = {
            let post = self.post(context, &cluster, plan);
            tokio::select! {
                answered = post => answered,
                never = progress.watch(SILENT) => match never {},
            }
        };
        let answer = match posted {
            Ok(answer) => answer,
            Err(error) => {
                warning(&error.to_string());
                warning("Failing over to DCS");
                let (now, verb) = (fine_stamp(context.clock.wall()), self.verb);
                // Written before anything is printed: whether somebody reads our output must not decide it.
                let written = write_request(target, plan).await;
                echo(format!("{now} Could not {verb} using Patroni api, falling back to DCS"))?;
                written?;
                return show_members(&cluster, false, Format::Pretty);
            }
        };
        if matches!(answer.status, 200 | 202) {
            let mut cluster = target.read().await?;
            echo(format!("{} {}", fine_stamp(context.clock.wall()), answer.body))?;
            // The key has changed hands; a promotion may take its time all the same (pre_promote).
            let promoting = Phase::of(&cluster.view, progress.before.as_ref());
            if answer.status == 200 && matches!(promoting, Phase::Promoting(_)) {
                progress.promoted(PROMOTION).await;
                cluster = target.read().await?;
            }
            return show_members(&cluster, false, Format::Pretty);
        }
        let unknown = answer.body.to_lowercase().contains("status unknown");
        let verb = if self.is_switchover() { "Switchover" } else { "Failover" };
        let result = if unknown { "result unknown" } else { "failed" };
        echo(format!("{verb} {result}, details: {}, {}", answer.status, answer.body))?;
        if answer.status == 412 {
            complain("What keeps each member from it: trunklinectl why");
        }
        if unknown && plan.at.is_none() {
            complain("It goes on; its end is waited for (Ctrl-C ends the waiting, not the change).");
            let end = progress.end(GOES_ON).await;
            echo(format!("{} {end}", fine_stamp(context.clock.wall())))?;
        }
        Ok(())
    }

    async fn post(&self, context: &Context, cluster: &Cluster, plan: &Plan) -> std::result::Result<Answer, CallError> {
        let view = &cluster.view;
        let name = view.leader.as_ref().map(|leader| leader.name.clone());
        let name = name.or_else(|| plan.candidate.as_deref().map(MemberName::from)).unwrap_or_else(|| "".into());
        let member = view.members.get(&name).cloned().unwrap_or_default();
        let node = Node { name: name.to_string(), member };
        let mut body = Map::from_iter([("candidate".to_owned(), json!(plan.candidate))]);
        if let Some(leader) = &plan.leader {
            body.insert("leader".to_owned(), json!(leader));
        }
        if let Some(at) = plan.at {
            body.insert("scheduled_at".to_owned(), isoformat(at, 'T').into());
        }
        let body = Value::Object(body);
        let answer = context.rest.call(&node, Method::Post, self.verb, Some(&body)).await?;
        // Agents from before 1.4 know only /failover.
        let is_old = answer.status == 501 && answer.body.contains("Server does not support this operation");
        if is_old && self.is_switchover() {
            return context.rest.call(&node, Method::Post, "failover", Some(&body)).await;
        }
        Ok(answer)
    }
}

/// A change that is done sooner needs no words in between.
const SILENT: Duration = Duration::from_secs(1);

/// How long a change whose end the agent has not waited for is followed.
const GOES_ON: Duration = Duration::from_secs(600);

/// How long a new leader's promotion is followed.
const PROMOTION: Duration = Duration::from_secs(60);

/// Between two looks at the DCS.
const LOOK: Duration = Duration::from_millis(250);

/// Follows a change of leaders in the DCS and tells each phase of it, on standard error.
struct Progress<'a> {
    target: &'a Target,
    /// Who led before.
    before: Option<MemberName>,
    told: Option<Phase>,
}

impl<'a> Progress<'a> {
    fn new(target: &'a Target, before: Option<MemberName>) -> Self {
        Self { target, before, told: None }
    }

    /// Tells phases for ever, the first one after `silent`.
    async fn watch(&mut self, silent: Duration) -> Infallible {
        tokio::time::sleep(silent).await;
        loop {
            let _ = self.look().await;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until the new leader takes writes, telling it if that is not at once.
    async fn promoted(&mut self, limit: Duration) {
        let promoted = async {
            tokio::time::sleep(LOOK).await;
            while let Ok(cluster) = self.target.read().await
                && matches!(Phase::of(&cluster.view, self.before.as_ref()), Phase::Promoting(_))
            {
                let _ = self.look().await;
                tokio::time::sleep(LOOK).await;
            }
            if self.told.is_some() {
                let _ = self.look().await;
            }
        };
        let _ = tokio::time::timeout(limit, promoted).await;
    }

    /// Tells phases until the change is over, or has come to nothing; says how it ended.
    async fn end(&mut self, limit: Duration) -> String {
        let over = async {
            loop {
                match self.look().await {
                    Some((phase @ Phase::Done(_), _)) => return phase.words(self.before.as_ref()),
                    Some((Phase::Asked, false)) => {
                        let leader = self.before.as_ref().map_or("the leader", MemberName::as_str);
                        return format!("it has come to nothing: {leader} still leads and the request is gone");
                    }
                    _ => {}
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(limit, over).await.unwrap_or_else(|_| format!("still not over after {limit:?}"))
    }

    /// The phase, and whether the request is still there.
    async fn look(&mut self) -> Option<(Phase, bool)> {
        let view = self.target.read().await.ok()?.view;
        let phase = Phase::of(&view, self.before.as_ref());
        if self.told.as_ref() != Some(&phase) {
            let now = fine_stamp(trunkline_common::SystemClock.wall());
            let words = match (&phase, &self.before) {
                (Phase::Asked, Some(leader)) if view.failover.is_none() => {
                    format!("{leader} still leads; whether another member could is being looked at")
                }
                _ => phase.words(self.before.as_ref()),
            };
            complain(&format!("{now} {words}"));
            self.told = Some(phase.clone());
        }
        Some((phase, view.failover.is_some()))
    }
}

/// Leaves the request in the DCS, where the leader looks in every turn of its loop.
async fn write_request(target: &Target, plan: &Plan) -> Result<()> {
    let mut request = Map::new();
    if let Some(leader) = &plan.leader {
        request.insert("leader".to_owned(), json!(leader));
    }
    if let Some(candidate) = &plan.candidate {
        request.insert("member".to_owned(), json!(candidate));
    }
    if let Some(at) = plan.at {
        request.insert("scheduled_at".to_owned(), isoformat(at, 'T').into());
    }
    match target.store.put_failover(&Value::Object(request), None).await {
        Ok(Outcome::Done(_)) => Ok(()),
        Ok(Outcome::Conflict) => {
            Err(CtlError::new("The request was not written: somebody changed it at the same time"))
        }
        Err(error) => Err(target.error(&error)),
    }
}
