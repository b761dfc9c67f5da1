//! `router top`: what routers do, as their admin ports tell it, again and again.

use std::time::Duration;

use serde_json::Value;
use trunkline_common::{Clock, Instant, SystemClock};
use trunkline_config::local::Ctl;

use super::args::TopArgs;
use super::error::{CtlError, Result};
use super::prompt::{clear_screen, echo};
use super::table;
use crate::peer::RestClient;

/// What is waited for at most.
const LOOK: Duration = Duration::from_secs(5);

/// `router top`: until it is interrupted, or as many times as asked for.
pub(super) async fn top(args: &TopArgs) -> Result<()> {
    // A router's admin port asks for no credentials, so it is sent none.
    let client = RestClient::for_operator(&Ctl::default(), false);
    let client = client.map_err(|error| CtlError::new(format!("routers can not be asked: {error}")))?;
    let pause = Duration::from_secs_f64(args.watch.unwrap_or(1.0).max(0.1));
    let mut before: Vec<Option<Sample>> = args.routers.iter().map(|_| None).collect();
    let mut shown = 0;
    loop {
        let mut screen = Vec::new();
        for (address, before) in args.routers.iter().zip(&mut before) {
            match Sample::take(&client, address).await {
                Ok(now) => {
                    screen.push(show(address, before.as_ref(), &now));
                    *before = Some(now);
                }
                Err(why) => screen.push(format!("Router {address} does not answer: {why}")),
            }
        }
        clear_screen()?;
        echo(screen.join("\n"))?;
        shown += 1;
        if args.count.is_some_and(|count| shown >= count) {
            return Ok(());
        }
        SystemClock.sleep_until(SystemClock.now() + pause).await;
    }
}

/// What a router told.
#[derive(Debug)]
struct Sample {
    at: Instant,
    /// `/routes`.
    routes: Value,
    /// `/metrics`.
    metrics: String,
}

impl Sample {
    async fn take(client: &RestClient, address: &str) -> std::result::Result<Self, String> {
        let get = async |path: &str| {
            let url = format!("http://{address}{path}");
            client.request("GET", &url, None, LOOK).await.map(|answer| answer.text).map_err(|error| error.to_string())
        };
        let (metrics, routes) = (get("/metrics").await?, get("/routes").await?);
        let routes = serde_json::from_str(&routes).map_err(|_| "that is no router's admin port".to_owned())?;
        Ok(Self { at: SystemClock.now(), routes, metrics })
    }

    /// The sum of a metric over all its series that have every one of these labels.
    fn sum(&self, metric: &str, labels: &[(&str, &str)]) -> f64 {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
        let lines =
            self.metrics.lines().filter_map(|line| line.strip_prefix("trunkline_router_")?.strip_prefix(metric));
        let values = lines.filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let known = series.is_empty() || series.starts_with('{');
            (known && labels.iter().all(|label| series.contains(label.as_str()))).then(|| value.parse::<f64>().ok())?
        });
        // The sum of nothing is -0.
        values.fold(0.0, |sum, value| sum + value)
    }
}

/// A router as a table, one row for each port. Rates are since `before`.
fn show(address: &str, before: Option<&Sample>, now: &Sample) -> String {
    const COLUMNS: &[&str] =
        &["Port", "Target", "Connections", "Sessions", "Servers", "New/s", "Ended/s", "To server/s", "To client/s"];
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let ports = now.routes["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
    let row = |port: &Value| {
        let name = text(&port["name"]);
        let rate = |metric: &str, more: &[(&str, &str)]| {
            let labels: Vec<_> = [("port", name.as_str())].iter().chain(more).copied().collect();
            let before = before.filter(|before| before.at < now.at)?;
            let grown = now.sum(metric, &labels) - before.sum(metric, &labels);
            Some(grown.max(0.0) / now.at.since(before.at).as_secs_f64())
        };
        let count = |rate: Option<f64>| rate.map_or("-".to_owned(), |rate| format!("{rate:.0}"));
        let bytes = |direction| rate("bytes_total", &[("direction", direction)]).map_or("-".to_owned(), bytes);
        let servers = port["servers"].as_array().map(Vec::as_slice).unwrap_or_default();
        let members: Vec<String> = servers.iter().map(|server| text(&server["member"])).collect();
        vec![
            name.clone(),
            text(&port["target"]),
            port["connections"].to_string(),
            format!("{:.0}", now.sum("sessions", &[("port", &name)])),
            if members.is_empty() { "none".to_owned() } else { members.join(", ") },
            count(rate("accepted_total", &[])),
            count(rate("ended_total", &[])),
            bytes("to_server"),
            bytes("to_client"),
        ]
    };
    let rows: Vec<Vec<String>> = ports.iter().map(row).collect();
    let body = table::pretty(
        "",
        COLUMNS,
        &rows,
        &["Connections", "Sessions", "New/s", "Ended/s", "To server/s", "To client/s"],
    );
    let routes = &now.routes;
    let age = routes["knowledge_age_seconds"].as_f64().filter(|age| *age >= 0.0);
    let age = age.map_or("never confirmed".to_owned(), |age| format!("{age:.1} s old"));
    format!(
        "Router {address}: leader {}, {} ({age}), {} sessions, {} held{}\n{body}",
        text(&routes["leader"]),
        text(&routes["certainty"]),
        routes["sessions"],
        routes["held"],
        if routes["draining"] == true { ", draining" } else { "" },
    )
}

/// A number of bytes, to three digits or so.
fn bytes(count: f64) -> String {
    let units = ["B", "kB", "MB", "GB"];
    let (mut count, mut unit) = (count, 0);
    while count >= 1_000.0 && unit + 1 < units.len() {
        (count, unit) = (count / 1_000.0, unit + 1);
    }
    if unit == 0 { format!("{count:.0} B") } else { format!("{count:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sample(seconds: u64, accepted: u64, sent: u64) -> Sample {
        let metrics = format!(
            "# HELP trunkline_router_sessions Sessions with a server.\n\
             trunkline_router_sessions{{member=\"a\",port=\"rw\"}} 2\ntrunkline_router_sessions{{member=\"b\",port=\"rw\"}} 1\n\
             trunkline_router_sessions{{member=\"b\",port=\"ro\"}} 7\ntrunkline_router_accepted_total{{port=\"rw\"}} {accepted}\n\
             trunkline_router_bytes_total{{direction=\"to_client\",member=\"a\",port=\"rw\"}} {sent}\n"
        );
        let server = json!([{"member": "a"}]);
        let ports = json!([{"name": "rw", "target": "leader", "connections": 4, "servers": server},
                           {"name": "ro", "target": "replica", "connections": 0, "servers": []}]);
        let routes = json!({"leader": "a", "certainty": "confirmed", "knowledge_age_seconds": 0.25, "sessions": 10, "held": 0,
                            "ports": ports});
        Sample { at: Instant::from_boot(Duration::from_secs(seconds)), routes, metrics }
    }

    #[test]
    fn rates_are_since_the_last_look() {
        let (first, second) = (sample(10, 100, 5), sample(12, 120, 3_000_005));
        let expected = "\
Router x:1: leader a, confirmed (0.2 s old), 10 sessions, 0 held
+------+---------+-------------+----------+---------+-------+---------+-------------+-------------+
| Port | Target  | Connections | Sessions | Servers | New/s | Ended/s | To server/s | To client/s |
+------+---------+-------------+----------+---------+-------+---------+-------------+-------------+
| rw   | leader  |           4 |        3 | a       |    10 |       0 |         0 B |      1.5 MB |
| ro   | replica |           0 |        7 | none    |     0 |       0 |         0 B |         0 B |
+------+---------+-------------+----------+---------+-------+---------+-------------+-------------+";
        assert_eq!(show("x:1", Some(&first), &second), expected);
        assert_eq!(format!("{:.0}", first.sum("sessions", &[("port", "other")])), "0");
        assert!(show("x:1", None, &first).contains("|     - |"), "no rate at the first look");
    }
}
