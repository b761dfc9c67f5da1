//! What an operator and a monitoring system see: `/metrics`, `/health`, `/ready`, `/routes`. Reads, changes nothing.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router as Routes};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use trunkline_common::Clock;
use trunkline_common::dcs::follow::Knowledge;
use trunkline_config::router::Port;

use crate::follow;
use crate::router::Router;
use crate::table::{Backend, Certainty, RouteTable};

/// What the endpoints look at.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The router.
    pub router: Arc<Router>,
    /// Its ports.
    pub ports: Arc<[Port]>,
    /// What is known of the cluster.
    pub knowledge: watch::Receiver<Knowledge>,
}

/// Serves until the process ends.
pub async fn serve(admin: Admin, listener: TcpListener) -> std::io::Result<()> {
    axum::serve(listener, routes(admin)).await
}

fn routes(admin: Admin) -> Routes {
    Routes::new()
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/routes", get(table))
        .with_state(admin)
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let metrics = &admin.router.metrics;
    metrics.held.set(admin.router.hold.held() as i64);
    metrics.knowledge_age.set(admin.age());
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

/// 200 while new connections on every port would be served at once.
async fn ready(State(admin): State<Admin>) -> Response {
    let table = admin.router.table();
    let unserved: Vec<&str> =
        admin.ports.iter().filter(|port| table.candidates(port).is_empty()).map(|port| port.name.as_str()).collect();
    let ready = unserved.is_empty() && !admin.router.is_draining();
    let mut body = admin.summary();
    body["ports_without_server"] = json!(unserved);
    (if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(body)).into_response()
}

async fn table(State(admin): State<Admin>) -> Response {
    let table = admin.router.table();
    let mut body = admin.summary();
    body["members"] = admin.members(&table);
    body["ports"] = admin.ports.iter().map(|port| admin.port(&table, port)).collect();
    Json(body).into_response()
}

impl Admin {
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

    fn port(&self, table: &RouteTable, port: &Port) -> Value {
        let server = |backend: &Arc<Backend>| {
            json!({
                "member": backend.member.as_str(),
                "host": backend.host,
                "port": backend.port,
                "lag": backend.lag,
                "sync": backend.sync,
                "timeline": backend.timeline.map(|timeline| timeline.0),
            })
        };
        json!({
            "name": port.name,
            "listen": port.listen,
            "target": format!("{:?}", port.target).to_lowercase(),
            "servers": table.candidates(port).iter().map(server).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use trunkline_config::router::{Limits, NoCandidate, Target};

    use super::*;
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
        let limits = Limits {
            max_sessions: 10,
            max_held: 10,
            hold_timeout: Duration::from_secs(1),
            release_rate: 0,
            startup_timeout: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(1),
            stale_after: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(1),
        };
        let router = Router::new(limits).unwrap();
        let port = Port {
            name: "rw".into(),
            listen: "127.0.0.1:0".into(),
            target: Target::Leader,
            no_candidate: NoCandidate::Hold,
            max_lag: None,
        };
        let (_sender, knowledge) = watch::channel(Knowledge { view: None, confirmed_at: None, trouble: None });
        let admin = Admin { router: router.clone(), ports: [port].into(), knowledge };
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
        server.abort();
    }
}
