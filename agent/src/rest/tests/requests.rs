//! Requests that change something.

use super::*;
use crate::node::{Refusal, Word};
use crate::peer::{FailsafeAnswer, Peers};

#[tokio::test]
async fn the_dynamic_configuration() {
    let node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    assert_eq!(node.get("/config").await, (200, json!({"ttl": 30, "loop_wait": 10})));
    let patch = json!({"ttl": 20, "loop_wait": null, "slots": {"s1": null}});
    let (status, text) = node.request("PATCH", "/config", Some(patch)).await;
    assert_eq!((status, text.as_str()), (200, r#"{"ttl": 20, "slots": {"s1": null}}"#), "nulls of a new map stay");
    let before = node.store.read().await.unwrap().revision;
    assert_eq!(node.code("PATCH", "/config", Some(json!({"ttl": "20"}))).await, 200);
    assert_eq!(node.store.read().await.unwrap().revision, before, "no write where nothing changes");
    let mistyped = json!({"synchronous_mode": "onn"});
    assert_eq!(node.code("PATCH", "/config", Some(mistyped)).await, 200, "as Patroni's does");
    let replaced = json!({"ttl": 40});
    assert_eq!(node.code("PUT", "/config/whatever", Some(replaced.clone())).await, 200);
    assert_eq!(node.store.read().await.unwrap().config.unwrap().value, replaced);
    for (method, body) in [("PATCH", json!({})), ("PUT", json!({})), ("PATCH", json!([1])), ("PUT", json!("x"))] {
        assert_eq!(node.code(method, "/config", Some(body)).await, 400);
    }
    node.store.delete_cluster().await.unwrap();
    node.catch_up().await;
    assert_eq!(node.get("/config").await.0, 502);
    assert_eq!(node.code("PATCH", "/config", Some(json!({"ttl": 20}))).await, 503);
}

#[tokio::test]
async fn requests_to_the_ha_loop() {
    let mut node = Node::start(local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    let mut planned = false;
    node.on_command(move |command| match command {
        Command::Restart(filter, reply) => {
            let busy = Refusal { status: 503, text: "reinitialize already in progress".into() };
            let answer = if filter.pending { Err(busy) } else { Ok("restarted successfully".into()) };
            let _ = reply.send(answer);
        }
        Command::ScheduleRestart(what, reply) => {
            assert_eq!(what["postmaster_start_time"], "2031-05-01 10:00:00.123456+00:00");
            assert_eq!((&what["role"], &what["timeout"]), (&json!("replica"), &json!(60)));
            let twice = Refusal { status: 409, text: "another restart is scheduled".into() };
            let _ = reply.send(if std::mem::replace(&mut planned, true) { Err(twice) } else { Ok(String::new()) });
        }
        Command::CancelRestart(reply) => drop(reply.send(std::mem::take(&mut planned))),
        Command::Reinitialize { reply, .. } => drop(reply.send(Ok(String::new()))),
        Command::FailsafePoll { reply, leader, .. } => drop(reply.send(match leader.as_str() {
            "pg-a" => Word::Given,
            "pg-c" => Word::Leads,
            _ => Word::Refused,
        })),
        Command::Wake | Command::Reload => {}
    });
    assert_eq!(node.code("POST", "/reload", None).await, 202);
    assert_eq!(node.request("POST", "/restart", None).await, (200, "restarted successfully".into()));
    let refused = node.request("POST", "/restart", Some(json!({"restart_pending": "x"}))).await;
    assert_eq!(refused, (503, "reinitialize already in progress".into()));
    let at = json!({"schedule": "2031-05-01T10:00:00+00:00", "role": "replica", "timeout": "1min"});
    for expected in [202, 409] {
        assert_eq!(node.code("POST", "/restart", Some(at.clone())).await, expected);
    }
    for expected in [200, 404] {
        assert_eq!(node.code("DELETE", "/restart", None).await, expected);
    }
    assert_eq!(node.code("POST", "/restart", Some(json!({"what": 1}))).await, 400);

    assert_eq!(node.code("POST", "/reinitialize", None).await, 503, "no leader");
    put(&node.store, "leader", "pg-b".into()).await;
    let own = node.request("POST", "/reinitialize", None).await;
    assert_eq!(own, (503, "I am the leader, can not reinitialize".into()));
    put(&node.store, "leader", "pg-a".into()).await;
    assert_eq!(node.code("POST", "/reinitialize", Some(json!({"force": "true"}))).await, 200);

    let poll = json!({"name": "pg-a", "conn_url": "x", "api_url": "y"});
    assert_eq!(node.code("POST", "/failsafe", Some(poll.clone())).await, 502, "failsafe mode is off");
    put(&node.store, "config", json!({"failsafe_mode": true})).await;
    node.catch_up().await;
    let peers = HttpPeers::new(RestClient::for_agent(&local("client")).unwrap());
    let everybody = BTreeMap::from([(MemberName::from("pg-b"), node.url("/patroni"))]);
    node.board.send_modify(|board| board.postgres = PgStatus::Running(standby()));
    let answers = peers.failsafe(everybody, poll.clone(), Duration::from_secs(2)).await;
    let answer = answers[&MemberName::from("pg-b")];
    assert!(answer.accepted && answer.lsn == Some(Lsn(0x300_0148)), "{answer:?}");
    for (asker, leads) in [("pg-c", true), ("pg-d", false)] {
        let everybody = BTreeMap::from([(MemberName::from("pg-b"), node.url("/patroni"))]);
        let answers = peers.failsafe(everybody, json!({"name": asker}), Duration::from_secs(2)).await;
        let expected = FailsafeAnswer { leads, ..FailsafeAnswer::default() };
        assert_eq!(answers[&MemberName::from("pg-b")], expected, "{asker}");
    }
    assert_eq!(node.get("/failsafe").await.0, 502);
    assert_eq!(node.code("POST", "/mpp", Some(json!({"type": "x"}))).await, 200);
    assert_eq!(node.code("POST", "/sigterm", None).await, 202);
}

#[tokio::test]
async fn a_switchover_is_answered_when_the_new_leader_is_there() {
    let mut node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    let switchover = |candidate: &str| Some(json!({"leader": "pg-a", "candidate": candidate}));
    put(&node.store, "leader", "pg-a".into()).await;
    let member = |url: String| json!({"api_url": url, "state": "running", "role": "replica"});
    put(&node.store, "pg-a", member(node.url("/patroni"))).await;
    assert_eq!(
        node.request("POST", "/switchover", Some(json!({"leader": "pg-a"}))).await,
        (412, "switchover is not possible: cluster does not have members except leader".into())
    );
    put(&node.store, "pg-c", member("http://127.0.0.1:1/patroni".into())).await;
    assert_eq!(
        node.request("POST", "/switchover", switchover("pg-c")).await,
        (412, "switchover is not possible: no good candidates have been found".into())
    );
    let other = Node::join(node.store.clone(), local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    put(&node.store, "pg-b", member(other.url("/patroni"))).await;

    // The HA loops: on being woken, the leader hands over.
    let store = node.store.clone();
    node.on_command(move |command| {
        if matches!(command, Command::Wake) {
            let store = store.clone();
            tokio::spawn(async move {
                if store.read().await.unwrap().failover.is_some_and(|request| request.scheduled_at.is_none()) {
                    let lease = store.read().await.unwrap().leader.unwrap().lease;
                    store.release_leader(&"pg-a".into(), lease, None, None).await.unwrap();
                    put(&store, "leader", "pg-b".into()).await;
                    put(&store, "failover", json!({})).await;
                }
            });
        }
    });
    let scheduled = json!({"leader": "pg-a", "candidate": "pg-b", "scheduled_at": "2031-05-01T10:00:00+00:00"});
    assert_eq!(node.code("DELETE", "/switchover", None).await, 404);
    assert_eq!(node.code("POST", "/switchover", Some(scheduled)).await, 202);
    assert_eq!(node.code("DELETE", "/switchover", None).await, 200);

    let started = SystemClock.now();
    let answer = node.request("POST", "/switchover", switchover("pg-b")).await;
    assert_eq!(answer, (200, "Successfully switched over to \"pg-b\"".into()));
    assert!(SystemClock.now().since(started) < Duration::from_millis(900), "no poll in between");
    let stale = node.request("POST", "/switchover", switchover("pg-b")).await;
    assert_eq!(stale.0, 412, "{}", stale.1);
}

#[tokio::test]
async fn a_switchover_that_nobody_takes_fails() {
    let mut node = Node::start(local("pg-a"), PgStatus::Running(primary()), board("primary")).await;
    put(&node.store, "leader", "pg-a".into()).await;
    let other = Node::join(node.store.clone(), local("pg-b"), PgStatus::Running(standby()), board("replica")).await;
    put(&node.store, "pg-b", json!({"api_url": other.url("/patroni"), "state": "running"})).await;
    let store = node.store.clone();
    node.on_command(move |_| {
        let store = store.clone();
        tokio::spawn(async move { put(&store, "failover", json!({})).await });
    });
    let body = json!({"leader": "pg-a", "candidate": "pg-b"});
    assert_eq!(node.request("POST", "/switchover", Some(body)).await, (503, "Switchover failed".into()));
}
