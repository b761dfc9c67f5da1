//! What a change of leadership does to sessions, and what it must not do.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use trunkline_common::Revision;
use trunkline_config::router::{Limits, NoCandidate, Port, Target};

/// The session is over for the client at once, and its server gets nothing more.
async fn is_ended(client: &mut TcpStream, server: &mut TcpStream) {
    let _ = client.write_all(b"COMMIT").await;
    assert_eq!(rest(client).await, b"");
    assert_eq!(rest(server).await, b"", "not another byte");
}

#[tokio::test]
async fn sessions_of_a_deposed_leader_end_at_once() {
    for what in ["another leader", "key gone", "demoted", "key created anew"] {
        let mut world = World::new(limits());
        let rw = world.open(port(Target::Leader)).await;
        let (old, new) = (Fake::start().await, Fake::start().await);
        world.lead("a", old.at).await;
        // The old server does not read, answer or close: frozen, with a healthy connection.
        let (mut client, mut frozen) = session(rw, &old).await;
        world
            .change(|view| match what {
                "another leader" => {
                    view.leader = Some(key("b", view.revision));
                    view.members.insert("b".into(), member("primary", new.at));
                }
                "key gone" => view.leader = None,
                "demoted" => view.members.get_mut(&"a".into()).unwrap().role = "demoted".into(),
                _ => view.leader = Some(key("a", view.revision)),
            })
            .await;
        is_ended(&mut client, &mut frozen).await;
        eventually(|| world.router.sessions.is_empty() && world.router.connections() == 0).await;
        let text = world.router.metrics.render().unwrap();
        assert!(text.contains("ended_total{port=\"leader\",reason=\"leader_changed\"} 1"), "{what}: {text}");
    }
}

#[tokio::test]
async fn what_is_no_change_of_leadership_ends_nothing() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    let (mut client, mut held) = session(rw, &server).await;
    let at = server.at;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().xlog_location = None).await;
    world.change(|view| view.members.clear()).await;
    world.change(|view| drop(view.members.insert("a".into(), member("primary", at)))).await;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().state = "restarting".into()).await;
    world.change(|view| view.leader.as_mut().unwrap().modified = Revision(99)).await;
    world.change(|view| drop(view.members.insert("b".into(), member("primary", at)))).await;
    passes(&mut client, &mut held, b"still here").await;
    passes(&mut held, &mut client, b"so am I").await;
}

#[tokio::test]
async fn a_leader_that_restarts_gets_no_new_sessions() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().state = "restarting".into()).await;
    let _client = connect(rw, STARTUP).await;
    world.held(1).await;
    server.stays_alone().await;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().state = "running".into()).await;
    server.session().await;
}

#[tokio::test]
async fn a_session_on_a_standby_that_is_promoted_and_deposed_ends_too() {
    let mut world = World::new(limits());
    let ro = world.open(port(Target::Replica)).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    world.lead("a", a.at).await;
    world.follow("b", b.at).await;
    let (mut client, mut server) = session(ro, &b).await;
    world.lead("b", b.at).await;
    passes(&mut client, &mut server, b"readers survive a promotion").await;
    world.lead("a", a.at).await;
    is_ended(&mut client, &mut server).await;
}

#[tokio::test]
async fn readers_of_standbys_and_of_the_leader_are_told_apart() {
    let mut world = World::new(limits());
    let any = world.open(Port { no_candidate: NoCandidate::Hold, ..port(Target::Any) }).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    world.lead("a", a.at).await;
    let (mut on_leader, mut leader_end) = session(any, &a).await;
    world.follow("b", b.at).await;
    let (mut on_standby, mut standby_end) = session(any, &b).await;
    world.change(|view| view.leader = None).await;
    is_ended(&mut on_leader, &mut leader_end).await;
    passes(&mut on_standby, &mut standby_end, b"nothing has changed here").await;
}

#[tokio::test]
async fn a_dial_to_a_frozen_host_is_given_up_when_another_leads() {
    let mut world = World::new(limits());
    let rw = world.open(Port { connect_timeout: PATIENCE, ..port(Target::Leader) }).await;
    // A listener whose queue is full drops what comes: the connect hangs as to a frozen host.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let frozen = socket.listen(0).unwrap();
    let at = frozen.local_addr().unwrap();
    let mut fill = Vec::new();
    while let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(at)).await {
        fill.push(stream);
    }
    world.lead("a", at).await;
    let _client = connect(rw, STARTUP).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let other = Fake::start().await;
    world.lead("b", other.at).await;
    other.session().await;
}

#[tokio::test]
async fn a_silent_dcs_keeps_sessions_and_asks_the_leader_for_new_ones() {
    let mut world = World::new(Limits { stale_after: Duration::from_millis(200), ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    let api = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/patroni", api.local_addr().unwrap());
    world.lead("a", server.at).await;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().api_url = Some(url)).await;
    let (mut client, mut held) = session(rw, &server).await;
    // Silence. The leader is asked, and first says that it is none.
    let (mut question, _) = within(api.accept()).await.unwrap();
    assert!(world.router.table().leader.is_none(), "unproven");
    let _newcomer = connect(rw, STARTUP).await;
    world.held(1).await;
    let mut request = vec![0; 1024];
    let read = within(question.read(&mut request)).await.unwrap();
    assert!(request[..read].starts_with(b"GET /primary HTTP/1."));
    question.write_all(b"HTTP/1.0 503 Service Unavailable\r\n\r\n{\"role\":\"replica\"}").await.unwrap();
    drop(question);
    server.stays_alone().await;
    // Asked again, it proves itself.
    let (mut question, _) = within(api.accept()).await.unwrap();
    within(question.read(&mut request)).await.unwrap();
    question.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"role\":\"primary\"}").await.unwrap();
    question.shutdown().await.unwrap();
    let (_newcomer_end, packet) = server.session().await;
    assert_eq!(packet, STARTUP);
    passes(&mut client, &mut held, b"never noticed").await;
    // The DCS is back, and with it a new leader: now the old sessions end.
    let other = Fake::start().await;
    world.lead("b", other.at).await;
    is_ended(&mut client, &mut held).await;
}

/// A REST API that answers every `GET /primary` with this status and role.
async fn api(status: &'static str, role: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/patroni", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(format!("HTTP/1.0 {status}\r\n\r\n{{\"role\":\"{role}\"}}").as_bytes()).await;
        }
    });
    url
}

#[tokio::test]
async fn with_a_silent_dcs_another_member_can_prove_that_it_leads_now() {
    let mut world = World::new(Limits { stale_after: Duration::from_millis(200), ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    let (deposed, elected) = (api("503 Service Unavailable", "replica").await, api("200 OK", "primary").await);
    world.lead("a", a.at).await;
    world.follow("b", b.at).await;
    let (mut client, mut server) = session(rw, &a).await;
    world
        .change(|view| {
            view.members.get_mut(&"a".into()).unwrap().api_url = Some(deposed);
            view.members.get_mut(&"b".into()).unwrap().api_url = Some(elected);
        })
        .await;
    eventually(|| world.router.table().reign.as_ref().is_some_and(|epoch| epoch.member == "b".into())).await;
    is_ended(&mut client, &mut server).await;
    let (mut client, mut server) = session(rw, &b).await;
    passes(&mut client, &mut server, b"hello").await;
}

#[tokio::test]
async fn a_new_leader_is_asked_where_its_record_is_slow() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    let promoted = api("200 OK", "primary").await;
    world.lead("a", a.at).await;
    world.follow("b", b.at).await;
    world
        .change(|view| {
            view.leader = Some(key("b", view.revision));
            view.members.get_mut(&"b".into()).unwrap().api_url = Some(promoted);
        })
        .await;
    let (mut client, mut server) = session(rw, &b).await;
    // Its record catches up: nothing has changed.
    world.change(|view| view.members.get_mut(&"b".into()).unwrap().role = "primary".into()).await;
    passes(&mut client, &mut server, b"hello").await;
    // A record that denies it counts at once, whatever it said before.
    world.change(|view| view.members.get_mut(&"b".into()).unwrap().role = "demoted".into()).await;
    is_ended(&mut client, &mut server).await;
}
