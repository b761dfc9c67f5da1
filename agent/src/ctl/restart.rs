//! `restart`, `reload` and `flush`.

use rand::seq::IndexedRandom;
use serde_json::{Map, Value, json};
use trunkline_common::Clock;

use super::args::{FlushArgs, ReloadArgs, RestartArgs};
use super::change::schedule;
use super::context::{Context, Target};
use super::error::{CtlError, Result};
use super::pause::loop_wait;
use super::prompt::{ask, confirm, echo, warning};
use super::rest::{Answer, Method};
use super::select::{Choice, Node, choose, confirm_now, leader_first, names_of};
use super::text::{fine_stamp, isoformat, next_hour};

/// `restart`.
pub(super) async fn restart(context: &Context, args: &RestartArgs) -> Result<()> {
    let cluster = context.target(&args.cluster, args.group).read().await?;
    let choice =
        Choice { names: &args.members, role: args.role, force: args.force, action: "restart", quote_role: true };
    let mut nodes = choose(&cluster, &choice)?;
    let time = match &args.scheduled {
        None if !args.force => {
            let example = next_hour(context.clock.wall());
            Some(ask(&format!("When should the restart take place (e.g. {example}) "), Some("now"))?)
        }
        given => given.clone(),
    };
    let at = schedule(context, time.as_deref().unwrap_or("now"))?;
    // Who needs a scheduled restart is decided when its time comes.
    if args.pending && at.is_none() {
        nodes.retain(|node| node.member.pending_restart);
    }
    if args.any {
        nodes = nodes.choose(&mut rand::rng()).cloned().into_iter().collect();
    }
    match at {
        Some(at) => confirm_schedule(&nodes, args, &isoformat(at, ' '))?,
        None => confirm_now(&nodes, args.force, "restart")?,
    }
    let version = match &args.pg_version {
        None if !args.force => ask("Restart if the PostgreSQL version is less than provided (e.g. 9.5.2) ", Some(""))?,
        given => given.clone().unwrap_or_default(),
    };
    check_version(&version)?;
    if at.is_some() && cluster.view.settings.pause {
        return Err(CtlError::new("Can't schedule restart in the paused state"));
    }
    let mut body = Map::new();
    if args.pending {
        body.insert("restart_pending".to_owned(), true.into());
    }
    if !version.is_empty() {
        body.insert("postgres_version".to_owned(), version.into());
    }
    if let Some(at) = at {
        body.insert("schedule".to_owned(), isoformat(at, 'T').into());
    }
    if let Some(timeout) = &args.timeout {
        body.insert("timeout".to_owned(), timeout.as_str().into());
    }
    let body = Value::Object(body);
    for node in &nodes {
        if at.is_some() && args.force && node.member.scheduled_restart.is_some() {
            let answer = context.rest.call(node, Method::Delete, "restart", None).await?;
            report(&answer, node, "flush scheduled restart", true)?;
        }
        let answer = context.rest.call(node, Method::Post, "restart", Some(&body)).await?;
        echo(restart_line(&answer, &node.name))?;
    }
    Ok(())
}

fn restart_line(answer: &Answer, name: &str) -> String {
    match answer.status {
        200 => format!("Success: restart on member {name}"),
        202 => format!("Success: restart scheduled on member {name}"),
        409 => format!("Failed: another restart is already scheduled on member {name}"),
        status => format!("Failed: restart for member {name}, status code={status}, ({})", answer.body),
    }
}

fn confirm_schedule(nodes: &[Node], args: &RestartArgs, at: &str) -> Result<()> {
    let question = if args.pending {
        "The nodes needing a restart will be identified at the scheduled time, and might be different from the ones \
         showing pending restart right now. Is this fine?"
            .to_owned()
    } else {
        format!("Are you sure you want to schedule restart of members {} at {at}?", names_of(nodes))
    };
    if args.force || confirm(&question)? { Ok(()) } else { Err(CtlError::new("Aborted scheduled restart")) }
}

/// `9.5.2` or `15.4`; empty: no bound.
fn check_version(text: &str) -> Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let parts: Option<Vec<u32>> = text.split('.').map(|part| part.trim().parse().ok()).collect();
    let Some(parts) = parts else { return Err(CtlError::new(format!("Invalid PostgreSQL version: {text}"))) };
    match parts.as_slice() {
        [major, _] if *major >= 10 => Ok(()),
        [_, _, _] => Ok(()),
        _ => Err(CtlError::new(format!("Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: {text}"))),
    }
}

/// `reload`.
pub(super) async fn reload(context: &Context, args: &ReloadArgs) -> Result<()> {
    let cluster = context.target(&args.cluster, args.group).read().await?;
    let choice =
        Choice { names: &args.members, role: args.role, force: args.force, action: "reload", quote_role: true };
    let nodes = choose(&cluster, &choice)?;
    confirm_now(&nodes, args.force, "reload")?;
    for node in &nodes {
        let (name, answer) = (&node.name, context.rest.call(node, Method::Post, "reload", None).await?);
        echo(match answer.status {
            200 => format!("No changes to apply on member {name}"),
            202 => {
                let seconds = loop_wait(&cluster);
                format!("Reload request received for member {name} and will be processed within {seconds} seconds")
            }
            status => format!("Failed: reload for member {name}, status code={status}, ({})", answer.body),
        })?;
    }
    Ok(())
}

/// `flush`; what to forget stands after the members.
pub(super) async fn flush(context: &Context, args: &FlushArgs) -> Result<()> {
    let target = context.target(&args.cluster, args.group);
    match args.members_and_target.split_last() {
        Some((what, members)) if what == "restart" => flush_restart(context, args, &target, members).await,
        Some((what, _)) if what == "switchover" => flush_switchover(context, &target).await,
        _ => Err(CtlError::Usage("What shall be forgotten? The last argument is restart or switchover".to_owned())),
    }
}

async fn flush_restart(context: &Context, args: &FlushArgs, target: &Target, members: &[String]) -> Result<()> {
    let cluster = target.read().await?;
    let choice = Choice { names: members, role: args.role, force: args.force, action: "flush", quote_role: true };
    let nodes = choose(&cluster, &choice)?;
    confirm_now(&nodes, args.force, "flush")?;
    for node in &nodes {
        if node.member.scheduled_restart.is_none() {
            echo(format!("No scheduled restart for member {}", node.name))?;
            continue;
        }
        let answer = context.rest.call(node, Method::Delete, "restart", None).await?;
        report(&answer, node, "flush scheduled restart", false)?;
    }
    Ok(())
}

async fn flush_switchover(context: &Context, target: &Target) -> Result<()> {
    let cluster = target.read().await?;
    if cluster.view.failover.as_ref().and_then(|request| request.scheduled_at).is_none() {
        return echo("No pending scheduled switchover");
    }
    for node in leader_first(&cluster.view) {
        match context.rest.call(&node, Method::Delete, "switchover", None).await {
            Ok(answer) if answer.status == 200 => return echo(format!("Success: {}", answer.body)),
            Ok(answer) if answer.status == 404 => return echo(format!("Failed: {}", answer.body)),
            Ok(answer) => {
                let (status, body) = (answer.status, answer.body);
                echo(format!("Failed: member={}, status_code={status}, ({body})", node.name))?;
            }
            Err(error) => {
                warning(&error.to_string());
                warning(&format!("Member {} is not accessible", node.name));
            }
        }
    }
    warning("Failing over to DCS");
    let now = fine_stamp(context.clock.wall());
    echo(format!("{now} Could not find any accessible member of cluster {}", cluster.name))?;
    let seen = cluster.view.failover_revision;
    match target.store.put_failover(&json!({}), Some(seen)).await {
        Ok(outcome) if outcome.is_done() => Ok(()),
        Ok(_) => Err(CtlError::new("The switchover was not forgotten: somebody changed it at the same time")),
        Err(error) => Err(target.error(&error)),
    }
}

/// Says how a request went; true: well.
pub(super) fn report(answer: &Answer, node: &Node, action: &str, silent_success: bool) -> Result<bool> {
    let name = &node.name;
    if answer.status >= 400 {
        echo(format!("Failed: {action} for member {name}, status code={}, ({})", answer.status, answer.body))?;
        return Ok(false);
    }
    if !silent_success {
        echo(format!("Success: {action} for member {name}"))?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for good in ["", "9.5.2", "10.1", "15.4", "15.0.4"] {
            assert!(check_version(good).is_ok(), "{good}");
        }
        let table = [
            ("a.b.c", "Invalid PostgreSQL version: a.b.c"),
            ("10", "Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: 10"),
            ("9.6", "Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: 9.6"),
        ];
        for (text, message) in table {
            let error = check_version(text).unwrap_err();
            assert!(matches!(&error, CtlError::Message(text) if text == message), "{error:?}");
        }
    }

    #[test]
    fn lines_that_scripts_look_for() {
        let line = |status| restart_line(&Answer { status, body: "why".to_owned() }, "m");
        assert_eq!(line(200), "Success: restart on member m");
        assert_eq!(line(202), "Success: restart scheduled on member m");
        assert_eq!(line(409), "Failed: another restart is already scheduled on member m");
        assert_eq!(line(503), "Failed: restart for member m, status code=503, (why)");
    }
}
