//! `pause` and `resume`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use trunkline_common::{Clock, Member, MemberName};

use super::args::PauseArgs;
use super::context::{Cluster, Context, Target};
use super::error::{CtlError, Result};
use super::prompt::{echo, warning};
use super::rest::Method;
use super::select::leader_first;
use super::text::python_str;

/// `loop_wait` of a cluster whose configuration does not say.
const DEFAULT_LOOP_WAIT: u64 = 10;

/// `pause` (`paused`) or `resume`: through the leader, or any member that answers.
pub(super) async fn set(context: &Context, args: &PauseArgs, paused: bool) -> Result<()> {
    let target = context.target_in_own_group(&args.target)?;
    let cluster = target.read().await?;
    if cluster.view.settings.pause == paused {
        return Err(CtlError::new(format!("Cluster is {} paused", if paused { "already" } else { "not" })));
    }
    if !paused && cluster.view.leader.is_none() {
        // Not fenced in a pause, and after it only by an agent that has heard of its end.
        warning(
            "nobody holds the leader key; a PostgreSQL whose agent is down may still run as primary beside the next one",
        );
    }
    let body = json!({"pause": if paused { Value::from(true) } else { Value::Null }});
    for node in leader_first(&cluster.view) {
        let answer = match context.rest.call(&node, Method::Patch, "config", Some(&body)).await {
            Ok(answer) => answer,
            Err(error) => {
                warning(&error.to_string());
                warning(&format!("Member {} is not accessible", node.name));
                continue;
            }
        };
        if answer.status != 200 {
            let action = if paused { "pause" } else { "resume" };
            let (status, body) = (answer.status, answer.body);
            return echo(format!("Failed: {action} cluster management status code={status}, ({body})"));
        }
        return if args.wait { wait(context, &target, &cluster, paused).await } else { done(paused) };
    }
    Err(CtlError::new("Can not find accessible cluster member"))
}

/// Seconds between two turns of the members' HA loops, as the configuration spells it.
pub(super) fn loop_wait(cluster: &Cluster) -> String {
    let configured = cluster.setting("loop_wait").filter(|value| trunkline_config::tags::truthy(value));
    configured.map_or_else(|| DEFAULT_LOOP_WAIT.to_string(), python_str)
}

fn done(paused: bool) -> Result<()> {
    echo(format!("Success: cluster management is {}", if paused { "paused" } else { "resumed" }))
}

async fn wait(context: &Context, target: &Target, before: &Cluster, paused: bool) -> Result<()> {
    let action = if paused { "pause" } else { "resume" };
    echo(format!("'{action}' request sent, waiting until it is recognized by all nodes"))?;
    let asked: BTreeMap<&MemberName, &Member> =
        before.view.members.iter().filter(|(_, member)| member.api_url.is_some()).collect();
    let seconds = loop_wait(before);
    let patience = Duration::from_secs(seconds.parse().unwrap_or(DEFAULT_LOOP_WAIT)) + Duration::from_secs(1);
    let until = context.clock.now() + patience;
    let mut cluster = target.read().await?;
    let deaf = |cluster: &Cluster| -> Vec<(MemberName, Member)> {
        let members =
            cluster.view.members.iter().filter(|(name, member)| asked.contains_key(name) && member.pause != paused);
        members.map(|(name, member)| (name.clone(), member.clone())).collect()
    };
    while !deaf(&cluster).is_empty() {
        if context.clock.now() >= until {
            // Whoever has written its key since then is alive and should have known.
            let late =
                deaf(&cluster).into_iter().filter(|(name, member)| asked.get(name).is_some_and(|old| *old != member));
            let late: Vec<String> = late.map(|(name, _)| name.to_string()).collect();
            if late.is_empty() {
                break;
            }
            let late = late.join(", ");
            return echo(format!("{late} members didn't recognized pause state after {seconds} seconds"));
        }
        context.clock.sleep(Duration::from_secs(1)).await;
        cluster = target.read().await?;
    }
    done(paused)
}
