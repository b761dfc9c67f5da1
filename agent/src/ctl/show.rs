//! `history`, `show-config`, `dsn` and `version`: what only looks.

use serde_json::Value;
use trunkline_common::cluster::HistoryLine;

use super::args::{DecisionsArgs, DefaultGroupArgs, DsnArgs, HistoryArgs, Role, VersionArgs};
use super::context::Context;
use super::error::{CtlError, Result, complain};
use super::output::{Sheet, render};
use super::prompt::echo;
use super::rest::Method;
use super::select::{Node, any_member, with_role};
use super::text::{pg_version, python_str};
use super::yaml::document;

/// `history`.
pub(super) async fn history(context: &Context, args: &HistoryArgs) -> Result<()> {
    let cluster = context.target_in_own_group(&args.target)?.read().await?;
    let sheet = Sheet {
        columns: Some(["TL", "LSN", "Reason", "Timestamp", "New Leader"].map(str::to_owned).to_vec()),
        rows: cluster.view.history.iter().map(history_row).collect(),
        right: &["TL", "LSN"],
        ..Sheet::default()
    };
    echo(render(&sheet, args.format.into(), "\t"))
}

fn history_row(line: &HistoryLine) -> Vec<Value> {
    vec![
        line.timeline.0.into(),
        line.switchpoint.0.into(),
        line.reason.as_str().into(),
        line.promoted_at.as_deref().unwrap_or("").into(),
        line.new_leader.as_deref().unwrap_or("").into(),
    ]
}

/// `decisions`: every member's, in the order of their times. Members of Patroni keep none.
pub(super) async fn decisions(context: &Context, args: &DecisionsArgs) -> Result<()> {
    let cluster = context.target_in_own_group(&args.history.target)?.read().await?;
    let mut rows = Vec::new();
    for node in with_role(&cluster, Role::Any) {
        if node.member.api_url.is_none() || args.member.as_ref().is_some_and(|wanted| *wanted != node.name) {
            continue;
        }
        match context.rest.call(&node, Method::Get, "decisions", None).await {
            Ok(answer) => rows.extend(decision_rows(&node.name, &answer.body)),
            Err(error) => complain(&format!("{}: {error}", node.name)),
        }
    }
    rows.sort_by(|a: &Vec<Value>, b| a[0].as_str().cmp(&b[0].as_str()));
    let sheet = Sheet {
        columns: Some(["Time", "Member", "Decision", "Reason"].map(str::to_owned).to_vec()),
        rows,
        ..Sheet::default()
    };
    echo(render(&sheet, args.history.format.into(), "\t"))
}

fn decision_rows(member: &str, document: &str) -> Vec<Vec<Value>> {
    let Ok(Value::Array(lines)) = serde_json::from_str(document) else { return Vec::new() };
    let text = |line: &Value, field: &str| line.get(field).and_then(Value::as_str).unwrap_or_default().into();
    lines.iter().map(|l| vec![text(l, "time"), member.into(), text(l, "decision"), text(l, "reason")]).collect()
}

/// `show-config`.
pub(super) async fn show_config(context: &Context, args: &DefaultGroupArgs) -> Result<()> {
    let cluster = context.target_in_own_group(args)?.read().await?;
    match &cluster.view.config {
        Some(config) => echo(document(&config.value)),
        None => Ok(()),
    }
}

/// `dsn`.
pub(super) async fn dsn(context: &Context, args: &DsnArgs) -> Result<()> {
    let cluster = context.target(&context.scope(args.cluster.as_deref())?, args.group).read().await?;
    let Some(node) = any_member(&cluster, args.role, args.member.as_deref())? else {
        return Err(CtlError::new("Can not find a suitable member"));
    };
    let Some((host, port)) = node.member.host_port() else {
        return Err(CtlError::new(format!("Member {} does not tell its address (no conn_url in its key)", node.name)));
    };
    echo(format!("host={host} port={port}"))
}

/// `version`.
pub(super) async fn version(context: Option<&Context>, args: &VersionArgs) -> Result<()> {
    echo(format!("trunklinectl version {}", env!("CARGO_PKG_VERSION")))?;
    let (Some(name), Some(context)) = (&args.cluster, context) else { return Ok(()) };
    echo("")?;
    let cluster = context.target(name, args.group).read().await?;
    for node in with_role(&cluster, Role::Any) {
        let wanted = args.members.is_empty() || args.members.contains(&node.name);
        if wanted && node.member.api_url.is_some() {
            match member_version(context, &node).await {
                Ok(version) => echo(format!("{}: {version}", node.name))?,
                Err(why) => echo(format!("{}: failed to get version: {why}", node.name))?,
            }
        }
    }
    Ok(())
}

async fn member_version(context: &Context, node: &Node) -> std::result::Result<String, String> {
    let answer = context.rest.call(node, Method::Get, "patroni", None).await.map_err(|error| error.to_string())?;
    let status: Value = serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
    let agent = status.pointer("/patroni/version").map_or_else(|| "None".to_owned(), python_str);
    let server = match status.get("server_version").and_then(Value::as_i64).filter(|version| *version != 0) {
        Some(number) => format!(" PostgreSQL {}", pg_version(number)),
        None => String::new(),
    };
    Ok(format!("Patroni {agent}{server}"))
}
