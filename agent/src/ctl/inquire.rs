//! `why`, `rto` and `config explain`: what members say of themselves, side by side.

use std::time::Duration;

use serde_json::{Value, json};
use trunkline_common::ClusterView;
use trunkline_common::dcs::latency::Latency;
use trunkline_config::explain::{self, Node as Asked};

use super::args::{DecisionsArgs, ExplainArgs, HistoryArgs, Role};
use super::context::{Cluster, Context};
use super::error::{CtlError, Result, complain};
use super::output::{Format, Sheet, render};
use super::prompt::echo;
use super::rest::Method;
use super::select::{Node, with_role};
use crate::peer::PeerStatus;
use crate::postgres::Took;
use crate::rto;

/// A member and its answer, or why there is none.
type Said = (Node, std::result::Result<Value, String>);

/// Asks every member (or the one that is wanted) for a document.
async fn ask(context: &Context, cluster: &Cluster, wanted: Option<&str>, path: &str) -> Result<Vec<Said>> {
    let nodes = with_role(cluster, Role::Any).into_iter();
    let nodes: Vec<Node> = nodes.filter(|node| wanted.is_none_or(|wanted| node.name == wanted)).collect();
    if nodes.is_empty() {
        return Err(CtlError::new(match wanted {
            Some(name) => format!("There is no member {name} in cluster {}", cluster.name),
            None => format!("{} cluster doesn't have any members", cluster.name),
        }));
    }
    Ok(futures::future::join_all(nodes.into_iter().map(|node| one(context, node, path))).await)
}

/// Without what stands beside it anyway: who was asked for what.
fn cause(error: &str) -> String {
    let shorter = error.split_once(" for url (").and_then(|(_, rest)| rest.split_once("): "));
    shorter.map_or_else(|| error.to_owned(), |(url, cause)| format!("{url}: {cause}"))
}

async fn one(context: &Context, node: Node, path: &str) -> Said {
    let said = match context.rest.call(&node, Method::Get, path, None).await {
        Ok(answer) if matches!(answer.status, 401 | 403) => Err(format!("refused: {}", answer.body)),
        Ok(answer) => serde_json::from_str(&answer.body).map_err(|_| format!("answered {}", answer.status)),
        Err(error) => Err(cause(&error.to_string())),
    };
    (node, said)
}

fn text(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// `why`.
pub(super) async fn why(context: &Context, args: &DecisionsArgs) -> Result<()> {
    let format: Format = args.history.format.into();
    let cluster = match context.target_in_own_group(&args.history.target)?.read().await {
        Ok(cluster) => cluster,
        Err(error) => {
            own_word(context, format).await?;
            return Err(error);
        }
    };
    let said = ask(context, &cluster, args.member.as_deref(), "why").await?;
    if !format.is_table() {
        let rows = said.iter().map(|(node, said)| why_row(&cluster.view, node, said)).collect();
        return echo(render(&Sheet { columns: Some(why_columns()), rows, ..Sheet::default() }, format, "\t"));
    }
    echo(standing(&cluster.view).join("\n"))?;
    let rows = said.iter().map(|(node, said)| why_row(&cluster.view, node, said)).collect();
    let right = &["TL", "Priority", "Lag"];
    echo(render(&Sheet { columns: Some(why_columns()), rows, right, ..Sheet::default() }, format, "\t"))?;
    for (node, said) in &said {
        let Ok(document) = said else { continue };
        let Some(members) = document.get("members").and_then(Value::as_object).filter(|m| !m.is_empty()) else {
            continue;
        };
        let heard: Vec<String> = members.iter().map(|(name, numbers)| format!("{name}: {}", heard(numbers))).collect();
        echo(format!("{} heard of {}", node.name, heard.join("; ")))?;
    }
    Ok(())
}

/// Without the DCS nobody knows the members, but the file says where the agent of this node is.
async fn own_word(context: &Context, format: Format) -> Result<()> {
    let Some(node) = context.own_member() else { return Ok(()) };
    let said = one(context, node, "why").await;
    if said.1.is_ok() {
        complain("The DCS does not answer; this is what the agent of this node says.");
        let rows = vec![why_row(&ClusterView::default(), &said.0, &said.1)];
        let right = &["TL", "Priority", "Lag"];
        echo(render(&Sheet { columns: Some(why_columns()), rows, right, ..Sheet::default() }, format, "\t"))?;
    }
    Ok(())
}

fn why_columns() -> Vec<String> {
    ["Member", "May lead", "LSN", "Lag", "TL", "Priority", "Verdict"].map(str::to_owned).to_vec()
}

fn why_row(view: &ClusterView, node: &Node, said: &std::result::Result<Value, String>) -> Vec<Value> {
    let lag = |lsn: trunkline_common::Lsn| lsn.lag_behind(view.status.optime);
    let row = |may: &str, numbers: [String; 4], verdict: String| {
        let [lsn, lag, timeline, priority] = numbers;
        vec![
            node.name.as_str().into(),
            may.into(),
            lsn.into(),
            lag.into(),
            timeline.into(),
            priority.into(),
            verdict.into(),
        ]
    };
    let document = match said {
        Ok(document) => document,
        Err(why) => return row("?", Default::default(), why.clone()),
    };
    let Some(own) = document.get("own") else {
        // Patroni answers every path with its status document.
        let Some(peer) = PeerStatus::parse(document) else {
            return row("?", Default::default(), "its PostgreSQL does not answer; Patroni gives no verdict".to_owned());
        };
        let (lsn, behind) = match peer.in_recovery {
            true => (peer.lsn.to_string(), lag(peer.lsn).to_string()),
            false => Default::default(),
        };
        let timeline = peer.timeline.map(|timeline| timeline.0.to_string()).unwrap_or_default();
        let numbers = [lsn, behind, timeline, peer.failover_priority.to_string()];
        return row("?", numbers, "Patroni gives no verdict of its own".to_owned());
    };
    let at = |pointer: &str| text(document.pointer(pointer));
    let leads = document.get("leads") == Some(&Value::Bool(true));
    let numbers = [
        text(own.get("lsn")),
        // Nothing is known of one whose server is down.
        if leads || own.get("lsn").is_none_or(Value::is_null) { String::new() } else { at("/cluster/lag") },
        text(own.get("timeline")),
        text(own.get("priority")),
    ];
    let (may, verdict) = match document.pointer("/verdict/may_lead").and_then(Value::as_bool) {
        _ if leads => ("leads", going_on(at("/now/reason"), &at("/now/task"))),
        Some(may) => {
            let given = at("/verdict/if");
            let given = if given.is_empty() { given } else { format!("if {given}: ") };
            (if may { "yes" } else { "no" }, given + &at("/verdict/reason"))
        }
        None => ("?", at("/now/reason")),
    };
    row(may, numbers, verdict)
}

/// With the long action that is under way, if any.
fn going_on(reason: String, task: &str) -> String {
    if task.is_empty() { reason } else { format!("{reason}; {task} is going on") }
}

fn heard(numbers: &Value) -> String {
    if numbers.is_null() {
        return "no answer".to_owned();
    }
    let lsn = if numbers.get("primary") == Some(&Value::Bool(true)) {
        "runs as primary".to_owned()
    } else {
        text(numbers.get("lsn"))
    };
    let watchdog = if numbers.get("watchdog_failed") == Some(&Value::Bool(true)) { ", its watchdog fails" } else { "" };
    format!("{lsn}, timeline {}, priority {}{watchdog}", text(numbers.get("timeline")), text(numbers.get("priority")))
}

/// Who leads, and what bears on who may, as the DCS has it.
fn standing(view: &ClusterView) -> Vec<String> {
    use trunkline_common::cluster::Initialize;
    let mut lines = Vec::new();
    lines.push(match &view.leader {
        Some(leader) => format!("{} leads.", leader.name),
        None => "Nobody leads.".to_owned(),
    });
    match view.initialize {
        Initialize::Absent => lines.push("The cluster is not initialised.".to_owned()),
        Initialize::Running => lines.push("A member is initialising the cluster.".to_owned()),
        _ => {}
    }
    // Before the first promotion there is no history.
    let timeline = view.timeline().or_else(|| view.leader_member()?.timeline);
    let timeline = timeline.map_or("unknown".to_owned(), |timeline| timeline.to_string());
    lines.push(format!(
        "Last known end of WAL {}, timeline {timeline}; maximum_lag_on_failover {}.",
        view.status.optime, view.settings.maximum_lag_on_failover
    ));
    if view.settings.pause {
        lines.push("Paused: nobody is promoted by itself.".to_owned());
    }
    if view.sync.is_active() {
        let leader = view.sync.leader.as_ref().map_or("nobody", |leader| leader.as_str());
        let standbys = view.sync.standbys.join(", ");
        lines.push(match view.sync.quorum {
            0 if standbys.is_empty() => format!("Synchronous: only {leader} may lead."),
            0 => format!("Synchronous: only {leader} and [{standbys}] may lead."),
            votes => format!("Quorum commit: {leader} and [{standbys}] may lead, with {votes} votes."),
        });
    }
    if let Some(request) = &view.failover {
        let name = |name: &Option<trunkline_common::MemberName>| {
            name.as_ref().map_or("anybody".to_owned(), |name| name.0.clone())
        };
        lines.push(format!("Requested: from {} to {}.", name(&request.leader), name(&request.candidate)));
    }
    lines
}

/// `rto`.
pub(super) async fn rto(context: &Context, args: &HistoryArgs) -> Result<()> {
    let cluster = context.target_in_own_group(&args.target)?.read().await?;
    let said = ask(context, &cluster, None, "rto").await?;
    let mut rows = Vec::new();
    for (node, said) in &said {
        match said {
            Ok(document) if document.get("dcs").is_some() => rows.push(rto_row(&node.name, document)),
            Ok(_) => complain(&format!("{}: Patroni does not measure", node.name)),
            Err(why) => complain(&format!("{}: {why}", node.name)),
        }
    }
    let columns = ["Member", "Renewal", "Worst", "Write", "Start", "Stop", "Promotion"].map(str::to_owned).to_vec();
    let format: Format = args.format.into();
    let right = &["Renewal", "Worst", "Write", "Start", "Stop", "Promotion"];
    echo(render(&Sheet { columns: Some(columns), rows, right, ..Sheet::default() }, format, "\t"))?;
    if !format.is_table() {
        return Ok(());
    }
    let (latency, took) = together(&cluster.view, &said);
    let estimate = rto::estimate(&cluster.view.settings, &latency, took);
    let mut line = estimate.to_string();
    if let Some(first) = line.get(..1).map(str::to_uppercase) {
        line.replace_range(..1, &first);
    }
    echo(line)?;
    estimate.warnings.iter().try_for_each(|warning| echo(format!("Warning: {warning}")))
}

fn rto_row(name: &str, document: &Value) -> Vec<Value> {
    let ms = |pointer: &str| {
        document.pointer(pointer).and_then(Value::as_f64).map_or("-".to_owned(), |ms| rto::millis(millis(ms)))
    };
    let figures = [
        "/dcs/renewal_ms/median",
        "/dcs/renewal_ms/worst",
        "/dcs/write_ms/median",
        "/postgresql/start_ms",
        "/postgresql/stop_ms",
        "/postgresql/promotion_ms",
    ];
    std::iter::once(name.into()).chain(figures.iter().map(|pointer| ms(pointer).into())).collect()
}

fn millis(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

/// What counts for the next change of leaders: the slowest of those who may take part, and the stop of the one who leads.
fn together(view: &ClusterView, said: &[Said]) -> (Latency, Took) {
    let figures = |pointer: &str, only_leader: bool| -> Option<Duration> {
        let documents = said.iter().filter_map(|(node, said)| Some((node, said.as_ref().ok()?)));
        let leads = |node: &Node| view.is_leader(&node.name.as_str().into());
        let of = documents.filter(|(node, _)| !only_leader || leads(node));
        of.filter_map(|(_, document)| document.pointer(pointer)?.as_f64()).map(millis).max()
    };
    let mut latency = Latency::default();
    for (pointer, times) in
        [("/dcs/renewal_ms/median", &mut latency.renewals), ("/dcs/write_ms/median", &mut latency.writes)]
    {
        figures(pointer, false).into_iter().for_each(|time| times.add(time));
    }
    // The worst one is what warnings are about: among many that are ordinary, so that the one in the middle stays.
    if let (Some(worst), Some(median)) = (figures("/dcs/renewal_ms/worst", false), latency.renewals.median()) {
        latency.renewals.add(median);
        latency.renewals.add(worst);
    }
    let stop = figures("/postgresql/stop_ms", true).or_else(|| figures("/postgresql/stop_ms", false));
    (latency, Took { start: None, stop, promotion: figures("/postgresql/promotion_ms", false) })
}

/// `config explain`.
pub(super) async fn explain(context: &Context, args: &ExplainArgs) -> Result<()> {
    let cluster = context.target_in_own_group(&args.of.history.target)?.read().await?;
    let path = format!("explain?key={}", encoded(&args.key));
    let said = ask(context, &cluster, args.of.member.as_deref(), &path).await;
    let mut documents = Vec::new();
    for (node, said) in said.unwrap_or_default() {
        match said {
            Ok(document) if document.get("layers").is_some() => documents.push(document),
            Ok(_) => complain(&format!("{}: Patroni does not explain", node.name)),
            Err(why) => complain(&format!("{}: {why}", node.name)),
        }
    }
    if documents.is_empty() {
        complain("No member could be asked; this is what the dynamic configuration alone says.");
        let dynamic = cluster.view.config.as_ref().map(|config| &config.value);
        let asked = Asked { layers: None, loaded: None, dynamic, in_force: None, role: "primary" };
        documents.push(explain::explain(&args.key, &asked).document());
    }
    let format: Format = args.of.history.format.into();
    if !format.is_table() {
        return echo(match format {
            Format::Yaml => super::yaml::document(&Value::Array(documents)),
            _ => trunkline_common::dcs::codec::python_json(&Value::Array(documents)),
        });
    }
    alike(documents).iter().try_for_each(|(names, document)| explanation(names, document))
}

/// Members that say the same, but for the place of their data directories, are told together.
fn alike(documents: Vec<Value>) -> Vec<(Vec<String>, Value)> {
    let mut said: Vec<(Vec<String>, Value)> = Vec::new();
    for mut document in documents {
        let fields = document.as_object_mut();
        let name = fields.and_then(|fields| fields.shift_remove("name")).map(|name| text(Some(&name)));
        let same = |other: &Value| {
            let place = |document: &Value| {
                let mut document = document.clone();
                document.pointer_mut("/postgresql/file").map(Value::take);
                document
            };
            place(other) == place(&document)
        };
        match said.iter_mut().find(|(_, other)| same(other)) {
            Some((names, _)) => names.extend(name),
            None => said.push((name.into_iter().collect(), document)),
        }
    }
    said
}

/// The explanation of these members, for people.
fn explanation(names: &[String], document: &Value) -> Result<()> {
    let at = |pointer: &str| text(document.pointer(pointer));
    let member = if names.is_empty() { String::new() } else { format!(" on {}", names.join(", ")) };
    let value =
        document.get("value").filter(|value| !value.is_null()).map_or("not set".to_owned(), |value| text(Some(value)));
    echo(format!("{}{member}: {value}, by {}", at("/key"), at("/from")))?;
    let lines = document.get("layers").and_then(Value::as_array).cloned().unwrap_or_default();
    let row = |line: &Value| ["layer", "value", "verdict"].map(|field| json!(text(line.get(field)))).to_vec();
    if !lines.is_empty() {
        let columns = ["Layer", "Value", "What becomes of it"].map(str::to_owned).to_vec();
        let sheet = Sheet { columns: Some(columns), rows: lines.iter().map(row).collect(), ..Sheet::default() };
        echo(render(&sheet, Format::Pretty, "\t"))?;
    }
    let mut notes = list(document.get("notes"));
    if let Some(server) = document.get("postgresql") {
        match server.get("error") {
            Some(error) => notes.push(format!("PostgreSQL: {}", text(Some(error)))),
            None => {
                let place =
                    server.get("file").filter(|file| !file.is_null()).map(|file| format!(", {}", text(Some(file))));
                let (value, source) = (text(server.get("value")), text(server.get("source")));
                notes.push(format!("PostgreSQL: {value} (source: {source}{})", place.unwrap_or_default()));
                notes.extend(list(server.get("notes")).into_iter().map(|note| format!("PostgreSQL: {note}")));
            }
        }
    }
    notes.iter().try_for_each(|note| echo(format!("- {note}")))
}

fn list(value: Option<&Value>) -> Vec<String> {
    value.and_then(Value::as_array).into_iter().flatten().map(|note| text(Some(note))).collect()
}

/// For a query of a URL.
fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use trunkline_common::{Lsn, Member};

    use super::*;

    fn node(name: &str) -> Node {
        Node { name: name.to_owned(), member: Member::default() }
    }

    fn row(document: Value) -> String {
        let mut view = ClusterView::default();
        view.status.optime = Lsn(0x30);
        why_row(&view, &node("b"), &Ok(document)).iter().map(|value| text(Some(value))).collect::<Vec<_>>().join("|")
    }

    #[test]
    fn members_that_say_the_same_are_told_together() {
        let said =
            |name: &str, value: &str, file: &str| json!({"name": name, "value": value, "postgresql": {"file": file}});
        let told = alike(vec![said("a", "1", "/a:1"), said("b", "2", "/b:1"), said("c", "1", "/c:1")]);
        let names: Vec<String> = told.iter().map(|(names, _)| names.join(",")).collect();
        assert_eq!(names, ["a,c", "b"]);
    }

    #[test]
    fn verdicts_of_every_kind_of_member() {
        let own = json!({"lsn": "0/20", "timeline": 2, "priority": 1});
        let verdict = json!({"may_lead": false, "reason": "behind", "if": "a were gone"});
        let table = [
            (
                json!({"leads": false, "own": own, "verdict": verdict, "cluster": {"lag": 16}, "now": {"reason": "no action"}}),
                "b|no|0/20|16|2|1|if a were gone: behind",
            ),
            (
                json!({"leads": true, "own": own, "now": {"reason": "no action"}, "cluster": {"lag": 0}}),
                "b|leads|0/20||2|1|no action",
            ),
            (
                json!({"xlog": {"received_location": 32, "replayed_location": 32}, "timeline": 2, "role": "replica"}),
                "b|?|0/20|16|2|1|Patroni gives no verdict of its own",
            ),
            (json!({"state": "starting"}), "b|?|||||its PostgreSQL does not answer; Patroni gives no verdict"),
        ];
        for (document, expected) in table {
            assert_eq!(row(document), expected);
        }
        assert_eq!(heard(&Value::Null), "no answer");
        assert_eq!(heard(&json!({"lsn": "0/1", "timeline": 1, "priority": 0})), "0/1, timeline 1, priority 0");
    }

    #[test]
    fn the_slowest_member_counts() {
        let document = |write: f64, promotion: Option<f64>| json!({"dcs": {"renewal_ms": {"median": 2.0, "worst": 700.0}, "write_ms": {"median": write}}, "postgresql": {"promotion_ms": promotion}});
        let said = vec![
            (node("a"), Ok(document(4.0, None))),
            (node("b"), Ok(document(9.0, Some(18.0)))),
            (node("c"), Err("gone".into())),
        ];
        let (latency, took) = together(&ClusterView::default(), &said);
        assert_eq!(latency.writes.median(), Some(Duration::from_millis(9)));
        assert_eq!((latency.renewals.median(), latency.renewals.worst()), (Some(millis(2.0)), Some(millis(700.0))));
        assert_eq!((took.stop, took.promotion), (None, Some(millis(18.0))));
    }

    #[test]
    fn keys_in_urls() {
        assert_eq!(encoded("a b.c&d/é"), "a%20b.c%26d%2F%C3%A9");
    }
}
