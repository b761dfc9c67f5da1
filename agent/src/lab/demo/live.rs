//! The demo with a person in front of it: a table that is redrawn in place, and what to paste.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use anyhow::Result;
use comfy_table::{Table, presets};
use serde_json::Value;
use trunkline_common::{Clock, Instant, SystemClock};

use super::{Demo, Outcome};
use crate::lab::cluster::{Member, Members, SUPERUSER};
use crate::lab::{Cluster, Lab, rest};

/// Pause between two drawings.
const PACE: Duration = Duration::from_millis(250);

/// An agent that was killed comes back after this time, as under a service manager.
const RESTART_AFTER: Duration = Duration::from_secs(5);

/// Redraws until the caller drops it.
pub(super) async fn run(lab: &Lab, demo: &mut Demo) -> Result<Outcome> {
    println!("\n{}", instructions(lab, demo));
    let in_place = std::io::stdout().is_terminal();
    let mut supervisor = Supervisor { down_since: vec![None; demo.cluster.nodes.len()] };
    let mut shown = String::new();
    loop {
        supervisor.turn(&mut demo.cluster)?;
        let picture = picture(demo).await;
        if picture != shown {
            let mut out = std::io::stdout().lock();
            if in_place && !shown.is_empty() {
                write!(out, "\x1b[{}A\x1b[J", shown.lines().count())?;
            }
            writeln!(out, "{picture}")?;
            out.flush()?;
            shown = picture;
        }
        tokio::time::sleep(PACE).await;
    }
}

fn instructions(lab: &Lab, demo: &Demo) -> String {
    let (ports, password) = (demo.router.ports(), demo.password());
    let psql = |port: u16| format!("PGPASSWORD={password} psql -h 127.0.0.1 -p {port} -U {SUPERUSER}");
    let config = demo.cluster.nodes[0].config().display().to_string();
    let leader_pid = format!("$(head -1 {}/nodeN/data/postmaster.pid)", lab.dir().display());
    format!(
        "read-write (always the primary):  {}\n\
         read-only  (always a standby):    {}\n\n\
         things to try in another terminal:\n  \
         trunklinectl -c {config} list\n  \
         trunklinectl -c {config} switchover --force\n  \
         kill -9 {leader_pid}      N = the leader\n\n\
         Ctrl-C ends everything and removes it.\n",
        psql(ports.read_write),
        psql(ports.read_only),
    )
}

/// What the screen shows now.
async fn picture(demo: &Demo) -> String {
    let members = members(&demo.cluster).await;
    let routes = rest::get(demo.router.ports().admin, "/routes").await.map(|answer| answer.body).unwrap_or_default();
    let mut text = table(&members, &routes).to_string();
    let _ = write!(text, "\n{}", router_line(&routes));
    text
}

/// From whichever agent answers; none, if none does.
async fn members(cluster: &Cluster) -> Vec<Member> {
    for node in &cluster.nodes {
        let answer = rest::get(node.rest_port(), "/cluster").await;
        if let Ok(Members(members)) = answer.and_then(|answer| Members::read(&answer.body)) {
            return members;
        }
    }
    Vec::new()
}

fn table(members: &[Member], routes: &Value) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["member", "address", "role", "state", "timeline", "lag", "sessions"]);
    for member in members {
        let number = |number: Option<u64>| number.map_or(String::new(), |number| number.to_string());
        let lag = if member.role == "leader" { String::new() } else { lag(member.lag) };
        let row = [
            member.name.clone(),
            member.address.clone(),
            member.role.replace('_', " "),
            member.state.clone(),
            number(member.timeline),
            lag,
            number(sessions(routes, &member.name)),
        ];
        table.add_row(row);
    }
    table
}

fn lag(bytes: Option<u64>) -> String {
    match bytes {
        None => "unknown".to_owned(),
        Some(bytes) if bytes < 1024 => format!("{bytes} B"),
        Some(bytes) if bytes < 1024 * 1024 => format!("{} KiB", bytes / 1024),
        Some(bytes) => format!("{} MiB", bytes / (1024 * 1024)),
    }
}

/// How many sessions the router has with a member.
fn sessions(routes: &Value, member: &str) -> Option<u64> {
    let members = routes["members"].as_array()?;
    members.iter().find(|entry| entry["name"] == member)?["sessions"].as_u64()
}

fn router_line(routes: &Value) -> String {
    if routes.is_null() {
        return "router: not running".to_owned();
    }
    let count = |key: &str| routes[key].as_u64().unwrap_or(0);
    let leader = routes["leader"].as_str().unwrap_or("nobody, so connections are held");
    format!("router: writes go to {leader}; {} sessions, {} held", count("sessions"), count("held"))
}

/// Starts ended agents again after a while.
struct Supervisor {
    down_since: Vec<Option<Instant>>,
}

impl Supervisor {
    fn turn(&mut self, cluster: &mut Cluster) -> Result<()> {
        let now = SystemClock.now();
        for (node, down_since) in cluster.nodes.iter_mut().zip(&mut self.down_since) {
            if node.is_running() {
                *down_since = None;
            } else if now.since(*down_since.get_or_insert(now)) >= RESTART_AFTER {
                node.start()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_joins_members_with_the_routers_sessions() {
        let member = |name: &str, role: &str, lag| Member {
            name: name.to_owned(),
            role: role.to_owned(),
            state: "running".to_owned(),
            address: "127.0.0.1:5432".to_owned(),
            timeline: Some(3),
            lag,
        };
        let members =
            [member("a", "leader", None), member("b", "sync_standby", Some(5000)), member("c", "replica", None)];
        let routes = json!({ "leader": "a", "sessions": 7, "held": 0, "members": [{ "name": "a", "sessions": 4 }] });
        let text = table(&members, &routes).to_string();
        let rows: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.contains("127.0.0.1"))
            .map(|line| line.split(['│', '┆']).map(str::trim).filter(|cell| !cell.is_empty()).collect())
            .collect();
        assert_eq!(rows[0], ["a", "127.0.0.1:5432", "leader", "running", "3", "4"]);
        assert_eq!(rows[1], ["b", "127.0.0.1:5432", "sync standby", "running", "3", "4 KiB"]);
        assert_eq!(rows[2], ["c", "127.0.0.1:5432", "replica", "running", "3", "unknown"]);
        assert_eq!(router_line(&routes), "router: writes go to a; 7 sessions, 0 held");
        assert_eq!(router_line(&Value::Null), "router: not running");
        assert!(router_line(&json!({})).contains("held"));
    }
}
