//! `reinit`: clone replicas anew.

use std::time::Duration;

use serde_json::{Value, json};
use trunkline_common::Clock;

use super::args::{ReinitArgs, Role};
use super::context::Context;
use super::error::Result;
use super::prompt::{confirm, echo};
use super::rest::Method;
use super::restart::report;
use super::select::{Choice, Node, choose, confirm_now, names_of};

/// Between two looks at a member that is being cloned.
const POLL: Duration = Duration::from_secs(2);

/// `reinit`.
pub(super) async fn reinit(context: &Context, args: &ReinitArgs) -> Result<()> {
    let cluster = context.target(&args.cluster, args.group).read().await?;
    let choice = Choice {
        names: &args.members,
        role: Role::Replica,
        force: args.force,
        action: "reinitialize",
        quote_role: false,
    };
    let nodes = choose(&cluster, &choice)?;
    confirm_now(&nodes, args.force, "reinitialize")?;
    let mut waiting = Vec::new();
    for node in nodes {
        if start(context, args, &node).await? && args.wait {
            waiting.push(node);
        }
    }
    wait(context, waiting).await
}

/// True: it has begun. Asks once whether to cancel what the member is doing.
async fn start(context: &Context, args: &ReinitArgs, node: &Node) -> Result<bool> {
    let body = |force: bool| json!({"force": force, "from_leader": args.from_leader});
    let answer = context.rest.call(node, Method::Post, "reinitialize", Some(&body(args.force))).await?;
    let started = report(&answer, node, "reinitialize", false)?;
    let is_busy = answer.body.ends_with(" already in progress");
    if started || args.force || !is_busy || !confirm("Do you want to cancel it and reinitialize anyway?")? {
        return Ok(started);
    }
    let answer = context.rest.call(node, Method::Post, "reinitialize", Some(&body(true))).await?;
    report(&answer, node, "reinitialize", false)
}

/// A clone takes as long as it takes; whoever does not want to wait interrupts.
async fn wait(context: &Context, mut waiting: Vec<Node>) -> Result<()> {
    let mut told = 0;
    while !waiting.is_empty() {
        if told != waiting.len() {
            echo(format!("Waiting for reinitialize to complete on: {}", names_of(&waiting)))?;
            told = waiting.len();
        }
        context.clock.sleep(POLL).await;
        let mut still = Vec::new();
        for node in waiting {
            let answer = context.rest.call(&node, Method::Get, "patroni", None).await?;
            let status: Value = serde_json::from_str(&answer.body).unwrap_or_default();
            if status.get("state").and_then(Value::as_str) == Some("creating replica") {
                still.push(node);
            } else {
                echo(format!("Reinitialize is completed on: {}", node.name))?;
            }
        }
        waiting = still;
    }
    Ok(())
}
