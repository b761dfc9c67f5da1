//! `demote-cluster` and `promote-cluster`: into a standby cluster, and out of it.

use std::time::Duration;

use serde_json::{Map, Value, json};
use trunkline_common::{Clock, ClusterView, MemberName};

use super::args::{DemoteClusterArgs, PromoteClusterArgs};
use super::context::{Cluster, Context, Target};
use super::error::{CtlError, Result};
use super::list::show_members;
use super::output::Format;
use super::prompt::{confirm, echo};
use super::rest::Method;
use super::select::Node;
use super::text::{python_repr, seconds_stamp};

/// How long a change is followed; patronictl follows it for ever.
const GOES_ON: Duration = Duration::from_secs(600);

/// `demote-cluster`: its leader follows a server outside from now on.
pub(super) async fn demote(context: &Context, args: &DemoteClusterArgs) -> Result<()> {
    if args.host.is_none() && args.port.is_none() && args.restore_command.is_none() {
        return Err(CtlError::new("At least --host, --port or --restore-command should be specified"));
    }
    let outside = [
        ("host", args.host.as_deref().map(Value::from)),
        ("port", args.port.map(Value::from)),
        ("primary_slot_name", args.primary_slot_name.as_deref().map(Value::from)),
        ("restore_command", args.restore_command.as_deref().map(Value::from)),
    ];
    let outside = outside.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    let outside = Value::Object(outside.collect::<Map<_, _>>());
    Change { action: "demot", role: "standby_leader", outside }.run(context, args.cluster.as_deref(), args.force).await
}

/// `promote-cluster`: its leader takes writes from now on.
pub(super) async fn promote(context: &Context, args: &PromoteClusterArgs) -> Result<()> {
    let change = Change { action: "promot", role: "primary", outside: Value::Null };
    change.run(context, args.cluster.as_deref(), args.force).await
}

struct Change {
    /// `demot`, `promot`: patronictl makes its words of these.
    action: &'static str,
    /// What the leader is to be.
    role: &'static str,
    /// The new `standby_cluster`.
    outside: Value,
}

impl Change {
    async fn run(&self, context: &Context, cluster: Option<&str>, force: bool) -> Result<()> {
        let (action, name) = (self.action, context.scope(cluster)?);
        let target =
            context.target_in_own_group(&super::args::DefaultGroupArgs { cluster: Some(name.clone()), group: None })?;
        let cluster = target.read().await?;
        let leader = cluster.view.leader.as_ref().map(|leader| leader.name.clone());
        let Some(leader) = leader.filter(|leader| !leader.as_str().is_empty()) else {
            return Err(CtlError::new(format!("Cluster has no leader, {action}ion is not possible")));
        };
        let member = cluster.view.members.get(&leader).cloned().unwrap_or_default();
        if member.role == self.role {
            return Err(CtlError::new("Cluster is already in the required state"));
        }
        echo("Current cluster topology")?;
        show_members(&cluster, false, Format::Pretty)?;
        if !force && !confirm(&format!("Are you sure you want to {action}e {name} cluster?"))? {
            return Err(CtlError::new(format!("Aborted cluster {action}ion")));
        }
        let failed = |why: String| CtlError::new(format!("Failed to {action}e {name} cluster: {why}"));
        let node = Node { name: leader.to_string(), member };
        let body = json!({ "standby_cluster": self.outside });
        let answer = context.rest.call(&node, Method::Patch, "config", Some(&body)).await;
        let answer = answer.map_err(|error| failed(error.to_string()))?;
        if answer.status != 200 {
            return Err(failed(format!("/config PATCH status code={}, ({})", answer.status, answer.body)));
        }
        let cluster = self.follow(context, &target, &leader).await?;
        show_members(&cluster, false, Format::Pretty)
    }

    /// Tells how far it is, every second, until it is done.
    async fn follow(&self, context: &Context, target: &Target, before: &MemberName) -> Result<Cluster> {
        let until = context.clock.now() + GOES_ON;
        loop {
            let cluster = target.read().await?;
            let now = seconds_stamp(context.clock.wall());
            if self.is_done(&cluster.view, before) {
                echo(format!("{now} cluster is successfully {}ed", self.action))?;
                return Ok(cluster);
            }
            echo(format!("{now} {}", self.state(&cluster.view, before)))?;
            if context.clock.now() >= until {
                let why =
                    format!("the cluster is not {}ed after {GOES_ON:?}; it goes on: see list and why", self.action);
                return Err(CtlError::new(why));
            }
            context.clock.sleep(Duration::from_secs(1)).await;
        }
    }

    fn is_demotion(&self) -> bool {
        !self.outside.is_null()
    }

    /// The leader is what it is to be, and after a demotion the one before runs, too.
    fn is_done(&self, view: &ClusterView, before: &MemberName) -> bool {
        let leads = view.leader_member().is_some_and(|leader| leader.role == self.role && leader.state == "running");
        leads && (!self.is_demotion() || view.members.get(before).is_some_and(|member| member.state == "running"))
    }

    fn state(&self, view: &ClusterView, before: &MemberName) -> String {
        let python = |text: Option<&str>| text.unwrap_or("None").to_owned();
        let leader = view.leader_member();
        let mut parts = vec![
            format!("cluster is unlocked: {}", python_repr(&view.leader.is_none().into())),
            format!("leader role: {}", python(leader.map(|leader| leader.role.as_str()))),
            format!("leader state: {}", python(leader.map(|leader| leader.state.as_str()))),
        ];
        let another = view.leader.as_ref().is_some_and(|leader| leader.name != *before);
        if let Some(member) = view.members.get(before).filter(|_| self.is_demotion() && another) {
            parts.push(format!("previous leader state: {}", python_repr(&member.state.as_str().into())));
        }
        parts.join(", ")
    }
}
