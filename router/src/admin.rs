//! What an operator and a monitoring system see: `/metrics`, `/health`, `/ready`, `/routes`, `/why`, `/sessions`. Reads,
//! changes nothing.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router as Routes};
use prometheus::{GaugeVec, IntGaugeVec};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use trunkline_common::Clock;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_config::router::Port;

use crate::port::Listening;
use crate::router::Router;
use crate::rule::Verdict;
use crate::sessions::Line;
use crate::table::{Backend, Certainty, RouteTable};
use crate::{follow, rule};

/// Sessions listed, unless asked for more.
const LISTED: usize = 1_000;

/// What the endpoints look at.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The router.
    pub router: Arc<Router>,
    /// What is known of the cluster.
    pub knowledge: watch::Receiver<Knowledge>,
}

/// Serves until the process ends, or the next one is in charge: that has a listener of its own at the same address.
pub async fn serve(admin: Admin, listener: TcpListener) -> std::io::Result<()> {
    let router = admin.router.clone();
    let handed_over = async move { router.handed_over().await };
    axum::serve(listener, routes(admin)).with_graceful_shutdown(handed_over).await
}

fn routes(admin: Admin) -> Routes {
    Routes::new()
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/routes", get(table))
        .route("/why", get(why))
        .route("/sessions", get(sessions))
        .with_state(admin)
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let metrics = &admin.router.metrics;
    admin.measure_ports();
    metrics.held.set(admin.router.hold.held() as i64);
    metrics.settled.set(admin.router.lean.sessions() as i64);
    metrics.ahead.set(admin.router.ahead.taken() as i64);
    metrics.knowledge_age.set(admin.age());
    metrics.registered.set(i64::from(admin.registered()));
    metrics.sessions.reset();
    for ((port, member), count) in admin.router.sessions.by_port() {
        metrics.sessions.with_label_values(&[&*port, member.as_str()]).set(count as i64);
    }
    match metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// 200 while the process works, whatever it knows: restarting it would not help.
async fn health(State(admin): State<Admin>) -> Response {
    Json(admin.summary()).into_response()
}

/// 200 while new connections on every port would be served at once, and not too many are held.
async fn ready(State(admin): State<Admin>) -> Response {
    let (table, now) = (admin.router.table(), admin.router.clock.now());
    let ports = admin.router.ports().into_iter().map(|port| port.settings());
    let unserved: Vec<String> =
        ports.filter(|port| rule::candidates(&table, port, now).is_empty()).map(|port| port.name.clone()).collect();
    let many_held = admin.router.hold.held() > admin.router.limits().ready_held;
    let ready = unserved.is_empty() && !many_held && !admin.router.is_draining();
    let mut body = admin.summary();
    body["ports_without_server"] = json!(unserved);
    body["too_many_held"] = json!(many_held);
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(body)).into_response()
}

async fn table(State(admin): State<Admin>) -> Response {
    let table = admin.router.table();
    let mut body = admin.summary();
    body["members"] = admin.members(&table);
    body["ports"] = admin.router.ports().iter().map(|port| admin.port(&table, port)).collect();
    Json(body).into_response()
}

/// What narrows a list down.
#[derive(Debug, Default, Deserialize)]
struct Filter {
    port: Option<String>,
    member: Option<String>,
    /// An address, or an address and a port.
    client: Option<String>,
    limit: Option<usize>,
}

/// Why each member is or is not a candidate of each port.
async fn why(State(admin): State<Admin>, Query(filter): Query<Filter>) -> Response {
    let (table, now) = (admin.router.table(), admin.router.clock.now());
    let is = |wanted: &Option<String>, name: &str| wanted.as_ref().is_none_or(|wanted| wanted == name);
    let mut lines = Vec::new();
    for listening in admin.router.ports().iter().filter(|listening| is(&filter.port, &listening.name)) {
        for (member, verdict) in rule::explain(&table, &listening.settings(), now) {
            if is(&filter.member, member.as_str()) {
                lines.push(json!({
                    "port": &*listening.name,
                    "member": member.as_str(),
                    "candidate": !matches!(verdict, Verdict::No(_)),
                    "why": verdict.to_string(),
                }));
            }
        }
    }
    let mut body = admin.summary();
    body["why"] = lines.into();
    Json(body).into_response()
}

/// Which client is which connection of a server.
async fn sessions(State(admin): State<Admin>, Query(filter): Query<Filter>) -> Response {
    let now = admin.router.clock.now();
    let is = |wanted: &Option<String>, name: &str| wanted.as_ref().is_none_or(|wanted| wanted == name);
    let wanted = |line: &Line| {
        let ip = line.client.ip().map(|ip| ip.to_string()).unwrap_or_default();
        is(&filter.port, &line.port)
            && is(&filter.member, line.backend.member.as_str())
            && (is(&filter.client, &line.client.to_string()) || is(&filter.client, &ip))
    };
    let (lines, left_out) = admin.router.sessions.list(filter.limit.unwrap_or(LISTED), wanted);
    let row = |line: &Line| {
        json!({
            "port": &*line.port,
            "client": line.client.to_string(),
            "member": line.backend.member.as_str(),
            "server": line.backend.address(),
            "seen_by_server_as": line.from.map(|from| from.to_string()),
            "seconds": now.since(line.began).as_secs_f64(),
            "bytes_to_server": line.bytes.0,
            "bytes_to_client": line.bytes.1,
        })
    };
    let lines: Vec<Value> = lines.iter().map(row).collect();
    Json(json!({"sessions": lines, "left_out": left_out})).into_response()
}

/// 0 for never, as it is written.
fn seconds(silence: Option<Duration>) -> f64 {
    silence.unwrap_or_default().as_secs_f64()
}

impl Admin {
    fn measure_ports(&self) {
        let (table, now, metrics) = (self.router.table(), self.router.clock.now(), &self.router.metrics);
        [&metrics.connections, &metrics.candidates, &metrics.lag_bytes].into_iter().for_each(IntGaugeVec::reset);
        [&metrics.lag_seconds, &metrics.port_limits].into_iter().for_each(GaugeVec::reset);
        for listening in self.router.ports() {
            let candidates = rule::candidates(&table, &listening.settings(), now).len();
            let taken = listening.places.taken();
            metrics.connections.with_label_values(&[&*listening.name]).set(taken as i64);
            metrics.candidates.with_label_values(&[&*listening.name]).set(candidates as i64);
            self.tell_bounds(&listening.settings());
        }
        for standby in &table.standbys {
            let Some(lag) = standby.lag else { continue };
            let seconds = standby.behind_since.map_or(0.0, |since| now.since(since).as_secs_f64());
            let member = [standby.member.as_str()];
            metrics.lag_bytes.with_label_values(&member).set(i64::try_from(lag).unwrap_or(i64::MAX));
            metrics.lag_seconds.with_label_values(&member).set(seconds);
        }
        let limits = self.router.limits();
        for (name, value) in [
            ("max_sessions", limits.max_sessions as f64),
            ("max_held", limits.max_held as f64),
            ("max_ahead", limits.max_ahead as f64),
            ("ready_held", limits.ready_held as f64),
            ("release_rate", f64::from(limits.release_rate)),
            ("cancel_rate", f64::from(limits.cancel_rate)),
            ("hold_timeout", limits.hold_timeout.as_secs_f64()),
            ("startup_timeout", limits.startup_timeout.as_secs_f64()),
            ("connect_timeout", limits.connect_timeout.as_secs_f64()),
            ("client_silence", seconds(limits.client_silence)),
            ("server_silence", seconds(limits.server_silence)),
            ("stale_after", limits.stale_after.as_secs_f64()),
            ("switchover_budget", limits.switchover_budget.as_secs_f64()),
            ("drain_timeout", limits.drain_timeout.as_secs_f64()),
            ("handover_timeout", seconds(limits.handover_timeout)),
        ] {
            metrics.limits.with_label_values(&[name]).set(value);
        }
    }

    /// The bounds of a port, those that it has.
    fn tell_bounds(&self, port: &Port) {
        let count = |bound: Option<usize>| bound.map(|bound| bound as f64);
        for (name, value) in [
            ("hold_timeout", Some(port.hold_timeout.as_secs_f64())),
            ("startup_timeout", Some(port.startup_timeout.as_secs_f64())),
            ("connect_timeout", Some(port.connect_timeout.as_secs_f64())),
            ("client_silence", Some(seconds(port.client_silence))),
            ("server_silence", Some(seconds(port.server_silence))),
            ("max_sessions", count(port.max_sessions)),
            ("max_per_client", count(port.max_per_client)),
            ("accept_rate", port.accept_rate.map(f64::from)),
            ("max_lag", port.max_lag.bytes.map(|bytes| bytes as f64)),
            ("max_lag_time", port.max_lag.time.map(|time| time.as_secs_f64())),
            ("end_lag", port.end_lag.bytes.map(|bytes| bytes as f64)),
            ("end_lag_time", port.end_lag.time.map(|time| time.as_secs_f64())),
            ("end_down_time", port.end_down_time.map(|time| time.as_secs_f64())),
        ] {
            let Some(value) = value else { continue };
            self.router.metrics.port_limits.with_label_values(&[port.name.as_str(), name]).set(value);
        }
    }

    fn registered(&self) -> bool {
        self.router.registration.registered.borrow().holds(self.router.clock.now())
    }

    fn age(&self) -> f64 {
        follow::age(&self.knowledge.borrow(), self.router.clock.now())
    }

    fn summary(&self) -> Value {
        let table = self.router.table();
        json!({
            "certainty": table.certainty.as_str(),
            "confirmed": table.certainty == Certainty::Confirmed,
            "knowledge_age_seconds": self.age(),
            "trouble": self.knowledge.borrow().trouble.clone(),
            "revision": table.revision.0,
            "leader": table.leader.as_ref().map(|leader| leader.member.as_str()),
            "configuration": self.router.config_trouble().map_or("in force".to_owned(), |why| format!("refused: {why}")),
            "registered": self.registered(),
            "draining": self.router.is_draining(),
            "connections": self.router.connections(),
            "sessions": self.router.sessions.len(),
            "held": self.router.hold.held(),
        })
    }

    fn members(&self, table: &RouteTable) -> Value {
        let row = |(name, verdict): &(trunkline_common::MemberName, &str)| json!({"name": name.as_str(), "verdict": verdict, "sessions": self.router.sessions.load(name)});
        table.verdicts.iter().map(row).collect()
    }

    fn port(&self, table: &RouteTable, listening: &Listening) -> Value {
        let (port, now) = (listening.settings(), self.router.clock.now());
        let server = |backend: &Arc<Backend>| {
            json!({
                "member": backend.member.as_str(),
                "host": backend.host,
                "port": backend.port,
                "lag": backend.lag,
                "lag_seconds": backend.behind_since.map(|since| now.since(since).as_secs_f64()),
                "sync": backend.sync,
                "timeline": backend.timeline.map(|timeline| timeline.0),
            })
        };
        json!({
            "name": port.name,
            "listen": port.listen.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "target": port.target.as_str(),
            "balance": port.balance.as_str(),
            "connections": listening.places.taken(),
            "max_sessions": port.max_sessions,
            "servers": rule::candidates(table, &port, now).iter().map(server).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use trunkline_config::router::{Limits, Listen, Target};

    use super::*;
    use crate::crypto::Crypto;
    use crate::table::tests::{member, view};

    async fn ask(address: std::net::SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    #[tokio::test]
    async fn endpoints_tell_the_state() {
        let router = Router::new(Limits::default()).unwrap();
        router.listening(&Port::new("rw", Listen::Tcp("127.0.0.1:0".into()), Target::Leader), Crypto::default());
        let (_sender, knowledge) = watch::channel(Knowledge::default());
        let admin = Admin { router: router.clone(), knowledge };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(admin, listener));
        assert_eq!(ask(address, "/ready").await.0, 503);
        assert_eq!(ask(address, "/health").await.0, 200);
        router.publish(RouteTable::from_view(&view(Some(("a", 1)), &[("a", member("primary", "running"))])));
        assert_eq!(ask(address, "/ready").await.0, 200);
        let (status, routes) = ask(address, "/routes").await;
        let routes: Value = serde_json::from_str(&routes).unwrap();
        assert_eq!((status, &routes["ports"][0]["servers"][0]["member"]), (200, &json!("a")), "{routes}");
        let (_, text) = ask(address, "/metrics").await;
        assert!(text.contains("trunkline_router_writable 1"), "{text}");
        assert!(text.contains("trunkline_router_knowledge_age_seconds -1"), "{text}");
        assert!(text.contains("trunkline_router_candidates{port=\"rw\"} 1"), "{text}");
        for line in [
            "trunkline_router_limit{limit=\"max_held\"} 10000",
            "trunkline_router_limit{limit=\"server_silence\"} 8",
            "trunkline_router_port_limit{limit=\"connect_timeout\",port=\"rw\"} 1",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let (status, why) = ask(address, "/why?port=rw&member=a").await;
        let why: Value = serde_json::from_str(&why).unwrap();
        let expected = json!([{"port": "rw", "member": "a", "candidate": true, "why": "candidate"}]);
        assert_eq!((status, &why["why"]), (200, &expected));
        let (status, none) = ask(address, "/why?port=other").await;
        assert_eq!((status, none.contains("\"why\":[]")), (200, true), "{none}");
        assert_eq!(ask(address, "/sessions?limit=5").await, (200, "{\"sessions\":[],\"left_out\":0}".into()));
        assert_eq!(ask(address, "/sessions?limit=many").await.0, 400);
        // Not ready while more are held than `ready_held` says.
        router.set_limits(Limits { ready_held: 1, ..Limits::default() });
        let mut held = vec![router.hold.enter()];
        assert_eq!(ask(address, "/ready").await.0, 200);
        held.push(router.hold.enter());
        let (status, body) = ask(address, "/ready").await;
        assert_eq!((status, body.contains("\"too_many_held\":true")), (503, true), "{body}");
        assert_eq!(ask(address, "/health").await.0, 200);
        held.pop();
        assert_eq!(ask(address, "/ready").await.0, 200);
        server.abort();
    }
}
